// Splits a range over OpenMP threads. Every item is computed the same way whichever thread gets it, so a kernel that keeps its
// sums within an item (or within blocks of a fixed size, added in order) does not depend on the number of threads.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace reinforce_ada::RA_ISA {

// Up to this many elements of work a region stays on the calling thread. For a call of token_logprobs, two threads against one:
// 31 us against 26 at 33k elements, 21 against 32 at 66k.
constexpr std::int64_t kGrainElements = 49152;

// Calls body(begin, end) on contiguous, disjoint pieces of [0, items). `num_threads` is torch.get_num_threads() (a team of
// another size than torch's costs milliseconds a call); `elements` is the total work.
template <class Body>
inline void parallel_for(std::int64_t items, std::int64_t elements, int num_threads, const Body& body) {
#ifdef _OPENMP
    if (num_threads > 1 && items > 1 && elements > kGrainElements && !omp_in_parallel()) {
#pragma omp parallel num_threads(num_threads)
        {
            const std::int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
            const std::int64_t begin = items * me / threads, end = items * (me + 1) / threads;
            if (begin < end) body(begin, end);
        }
        return;
    }
#else
    (void)num_threads, (void)elements;
#endif
    if (items > 0) body(std::int64_t{0}, items);
}

}  // namespace reinforce_ada::RA_ISA
