// The words of csrc/common/device.cuh on the CPU, for tests: the CUDA sources compiled with g++ and watched while they run.
//
// Each thread of a block is a fiber. At every synchronisation another fiber of the block goes on, chosen by a seeded random number, and
// the blocks of a grid run one after the other in a random order. A kernel fails, with a message of what and where, when
//   - threads of a block wait at different barriers, or one has exited while the others wait
//   - a shuffle, a ballot or a __syncwarp names a lane that does not take part, or reads one that is not named
//   - a thread writes what another reads or writes and no barrier lies between, in shared or in global memory; blocks have none
//   - shared memory is read before it is written, or an index leaves its array
//   - a guarded address is touched, or an address is not a multiple of what is accessed there
// Where a thread reads and writes is known because the sources are compiled with -fsanitize=thread,alignment, whose callbacks
// accesses.cpp defines. Without that option (the build with the address sanitizer) only synchronisation is checked here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct CudaIndex {
    unsigned x, y;
};
extern CudaIndex threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr int kLanes = 32;

struct Site {
    const char* file;
    int line;
    const char* what;
};

void block_barrier(Site site);

// The lanes of `mask` meet here; `result` is then what lane `source` brought as `value`. Returns the lanes that brought a true vote.
unsigned meet(Site site, unsigned mask, const void* value, void* result, std::size_t size, int source, bool vote);

template <class T>
T shuffle(Site site, unsigned mask, T value, int source) {
    T result;
    meet(site, mask, &value, &result, sizeof value, source, false);
    return result;
}

inline int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

// A lane past the warp's end is the caller's own, as in CUDA.
inline int own_if_past(int source) { return source < kLanes ? source : lane(); }

// The block's memory for the declaration that `key` stands for.
void* shared_array(const void* key, const char* name, std::size_t bytes);

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SITE(what) (::cuda_on_cpu::Site{__FILE__, __LINE__, what})

#define __syncthreads() ::cuda_on_cpu::block_barrier(CUDA_ON_CPU_SITE("__syncthreads"))
#define __syncwarp() ::cuda_on_cpu::meet(CUDA_ON_CPU_SITE("__syncwarp"), 0xffffffffu, nullptr, nullptr, 0, ::cuda_on_cpu::lane(), false)
#define __ballot_sync(mask, vote) \
    ::cuda_on_cpu::meet(CUDA_ON_CPU_SITE("__ballot_sync"), mask, nullptr, nullptr, 0, ::cuda_on_cpu::lane(), vote)
#define __shfl_sync(mask, value, source) \
    ::cuda_on_cpu::shuffle(CUDA_ON_CPU_SITE("__shfl_sync"), mask, value, static_cast<int>(source) % ::cuda_on_cpu::kLanes)
#define __shfl_xor_sync(mask, value, bits) \
    ::cuda_on_cpu::shuffle(CUDA_ON_CPU_SITE("__shfl_xor_sync"), mask, value, ::cuda_on_cpu::own_if_past(::cuda_on_cpu::lane() ^ (bits)))
#define __shfl_down_sync(mask, value, delta)                                  \
    ::cuda_on_cpu::shuffle(CUDA_ON_CPU_SITE("__shfl_down_sync"), mask, value, \
                           ::cuda_on_cpu::own_if_past(::cuda_on_cpu::lane() + static_cast<int>(delta)))

#define RA_SHARED(type, name, size) \
    static char name##_key;         \
    type(&name)[size] = *static_cast<type(*)[size]>(::cuda_on_cpu::shared_array(&name##_key, #name, sizeof(type[size])))

namespace reinforce_ada {

// Runs `thread` for every thread of every block; what a kernel does wrong is a std::runtime_error.
void run_on_cpu(unsigned grid_x, unsigned grid_y, unsigned threads, const std::function<void()>& thread);

}  // namespace reinforce_ada
