// Memory in huge pages where the system gives them: 16 MB in 4 kB pages are 4096 page faults, 1 ns for every fp32 and more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
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

// `count` uninitialised elements, for as long as the object lives.
template <class T>
class Scratch {
  public:
    explicit Scratch(std::int64_t count) {
        const std::size_t needed = static_cast<std::size_t>(count) * sizeof(T);
        const std::size_t alignment = needed < kHugePage ? 64 : kHugePage;
        const std::size_t bytes = (needed + alignment - 1) / alignment * alignment;
        data_.reset(static_cast<T*>(std::aligned_alloc(alignment, bytes)));
        if (!data_ && bytes) throw std::bad_alloc();
        advise_huge_pages(data_.get(), bytes);
    }
    T& operator[](std::int64_t i) { return data_[static_cast<std::size_t>(i)]; }
    T* data() { return data_.get(); }

  private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T[], Free> data_;
};

}  // namespace reinforce_ada::RA_ISA
