// Huge pages where the system gives them: 160 MB in 4 kB pages are 40000 page faults, more than the kernel that writes them takes.
#pragma once

#include <cstddef>
#include <cstdint>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace reinforce_ada::RA_ISA {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

// For memory about to be written for the first time; what has its pages already keeps them.
inline void advise_huge_pages(void* p, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
    const auto begin = (reinterpret_cast<std::uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
    const auto end = (reinterpret_cast<std::uintptr_t>(p) + bytes) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

}  // namespace reinforce_ada::RA_ISA
