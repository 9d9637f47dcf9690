// Memory in huge pages where the system gives them: 16 MB in 4 kB pages are 4096 page faults, 1 ns for every fp32 and more, and
// random access to them misses the TLB.
#pragma once

#include <cstddef>
#include <cstdint>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace reinforce_ada {

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

}  // namespace reinforce_ada
