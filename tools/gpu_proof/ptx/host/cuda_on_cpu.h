// Words of CUDA without a meaning: kernels are compiled for their symbols here and never run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>

#define __global__ __attribute__((visibility("default"), used))
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define RA_SHARED(type, name, size) type name[size]

namespace reinforce_ada {

struct Index {
    unsigned x, y, z;
};
inline constexpr Index threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

inline void __syncthreads() { std::abort(); }
inline void __syncwarp(unsigned = 0) { std::abort(); }
template <class T>
T __shfl_xor_sync(unsigned, T, int) {
    std::abort();
}
template <class T>
T __shfl_down_sync(unsigned, T, unsigned) {
    std::abort();
}
template <class T>
T __shfl_sync(unsigned, T, int) {
    std::abort();
}
inline unsigned __ballot_sync(unsigned, int) { std::abort(); }

}  // namespace reinforce_ada
