#include "cuda_on_cpu.h"

#include "machine.h"

using cuda_on_cpu::machine;

CudaIndex threadIdx, blockIdx, blockDim, gridDim;

// -------------------- for kernels

namespace cuda_on_cpu {

void block_barrier(Site site) { machine().block_barrier(site); }

unsigned meet(Site site, unsigned mask, const void* value, void* result, std::size_t size, int source, bool vote) {
    return machine().meet(site, {mask, value, result, size, source, vote, 0});
}

void* shared_array(const void* key, const char* name, std::size_t bytes) { return machine().shared_array(key, name, bytes); }

}  // namespace cuda_on_cpu

void reinforce_ada::run_on_cpu(unsigned grid_x, unsigned grid_y, unsigned threads, const std::function<void()>& thread) {
    machine().run(grid_x, grid_y, threads, thread);
}

// -------------------- for tests

#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default")))

CUDA_ON_CPU_EXPORT void cuda_on_cpu_seed(std::uint64_t seed) { machine().seed = seed; }
CUDA_ON_CPU_EXPORT void cuda_on_cpu_guard(std::uintptr_t begin, std::uintptr_t end) { machine().guard({begin, end}); }
CUDA_ON_CPU_EXPORT void cuda_on_cpu_clear_guards() { machine().clear_guards(); }
