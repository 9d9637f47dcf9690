// Memory in huge pages where the system gives them: 16 MB in 4 kB pages are 4096 page faults, 1 ns for every fp32 and more, and
// random access to them misses the TLB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace reinforce_ada::RA_ISA {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Asks for huge pages for what is not touched yet of [p, p + bytes), a fresh output for example; whole huge pages within it only.
inline void advise_huge_pages(void* p, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
    const auto begin = (reinterpret_cast<std::uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
    const auto end = (reinterpret_cast<std::uintptr_t>(p) + bytes) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

// `count` elements of zero bytes, aligned to a cache line, for as long as the object lives. From one huge page on they come straight
// from the system: what malloc hands out again stays in the small pages it was first touched with (4M random additions to 8 MB: 13 ms
// there, 8 in fresh huge pages). Such memory costs nothing before it is touched.
template <class T>
class Scratch {
  public:
    explicit Scratch(std::int64_t count) {
        const std::size_t needed = static_cast<std::size_t>(count) * sizeof(T) + kLine;
#ifdef MADV_HUGEPAGE
        if (needed >= kHugePage) {
            bytes_ = (needed + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
            memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory_ == MAP_FAILED) throw std::bad_alloc();
            const auto first = (reinterpret_cast<std::uintptr_t>(memory_) + kHugePage - 1) / kHugePage * kHugePage;
            data_ = reinterpret_cast<T*>(first);
            advise_huge_pages(data_, bytes_ - kHugePage);
            return;
        }
#endif
        memory_ = std::aligned_alloc(kLine, needed / kLine * kLine);
        if (!memory_ && needed >= kLine) throw std::bad_alloc();
        data_ = static_cast<T*>(memory_);
        std::memset(memory_, 0, needed / kLine * kLine);
    }

    ~Scratch() {
#ifdef MADV_HUGEPAGE
        if (bytes_) {
            munmap(memory_, bytes_);
            return;
        }
#endif
        std::free(memory_);
    }

    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    T& operator[](std::int64_t i) { return data_[static_cast<std::size_t>(i)]; }
    T* data() { return data_; }

  private:
    static constexpr std::size_t kLine = 64;

    void* memory_;
    std::size_t bytes_ = 0;  // mapped
    T* data_;
};

}  // namespace reinforce_ada::RA_ISA
