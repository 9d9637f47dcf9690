// Kernels with one fault each, and their sound forms: what test_cuda_on_cpu_itself.py holds the emulation to.
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "cuda_on_cpu.h"

namespace {

struct alignas(16) Pack {
    float x[4];
};

// What the kernels may touch: kThreads * kBlocks numbers in and out.
constexpr unsigned kBlocks = 3, kThreads = 96;
constexpr unsigned kAll = 0xffffffffu;

float sum_of_warp(float x) {
    for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kAll, x, bits);
    return x;
}

enum class Fault { none, no_barrier_before_read, no_barrier_before_reuse };

// Block sums, twice through the same shared array.
template <Fault kFault>
void sums(const float* in, float* out) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.x * blockDim.x + threadIdx.x;
    RA_SHARED(float, of_warps, 3);
    float total = 0;
    for (int turn = 0; turn < 2; ++turn) {
        const float sum = sum_of_warp(in[i]);
        if (lane == 0) of_warps[warp] = sum;
        if (kFault != Fault::no_barrier_before_read) __syncthreads();
        for (int w = 0; w < 3; ++w) total += of_warps[w];
        if (kFault != Fault::no_barrier_before_reuse) __syncthreads();
    }
    out[i] = total;
}

void shuffles(const float* in, float* out) {
    const unsigned i = threadIdx.x;
    if (i >= 32 || blockIdx.x > 0) return;
    const float down = __shfl_down_sync(kAll, in[i], 3), first = __shfl_sync(kAll, in[i], 0);
    const unsigned votes = __ballot_sync(kAll, i % 3 == 0);
    out[i] = down + 100 * first + static_cast<float>(votes & 0xff);
}

void warp_exchange(const float* in, float* out) {
    const unsigned i = threadIdx.x;
    RA_SHARED(float, line, 96);
    line[i] = in[i];
    __syncwarp();
    out[blockIdx.x * blockDim.x + i] = line[i ^ 1];
}

void warp_exchange_without_syncwarp(const float* in, float* out) {
    const unsigned i = threadIdx.x;
    RA_SHARED(float, line, 96);
    line[i] = in[i];
    out[blockIdx.x * blockDim.x + i] = line[i ^ 1];
}

void across_warps_with_syncwarp_only(const float* in, float* out) {
    const unsigned i = threadIdx.x;
    RA_SHARED(float, line, 96);
    line[i] = in[i];
    __syncwarp();
    out[blockIdx.x * blockDim.x + i] = line[(i + 32) % 96];
}

void exit_before_barrier(const float*, float*) {
    if (threadIdx.x == 40) return;
    __syncthreads();
}

void two_barriers(const float*, float*) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

void lane_missing(const float* in, float* out) {
    if (threadIdx.x % 32 != 7) out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);
}

void lane_at_a_barrier(const float* in, float* out) {
    if (threadIdx.x == 7) __syncthreads();
    out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);
    if (threadIdx.x != 7) __syncthreads();
}

void lane_not_named(const float* in, float* out) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, in[threadIdx.x], 20);
}

void shared_overrun(const float* in, float*) {
    RA_SHARED(float, line, 95);
    line[threadIdx.x] = in[threadIdx.x];
}

void shared_unwritten(const float*, float* out) {
    RA_SHARED(float, line, 96);
    if (threadIdx.x < 95) line[threadIdx.x] = 1;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = line[threadIdx.x];
}

void global_race(const float*, float* out) {
    out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
    if (out[blockIdx.x * blockDim.x + (threadIdx.x + 1) % blockDim.x] > 1) out[0] = 2;
}

void blocks_write_the_same(const float*, float* out) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }

void block_reads_what_another_writes(const float*, float* out) {
    const unsigned next = (blockIdx.x + 1) % gridDim.x;
    if (threadIdx.x == 0) out[blockIdx.x] = out[next] + 1;
}

void global_overrun(const float* in, float* out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[i + 1] > -1e30f ? 1.0f : 0.0f;
}

void global_overwrite(const float* in, float* out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i + 1] = in[i];
}

void misaligned(const float* in, float* out) {
    if (threadIdx.x < 8) *reinterpret_cast<Pack*>(out + 4 * threadIdx.x) = *reinterpret_cast<const Pack*>(in + 4 * threadIdx.x + 1);
}

// In an order that only a barrier could fix.
void order_of_threads(const float*, float* out) {
    if (threadIdx.x < 32) return;
    out[0] = static_cast<float>(threadIdx.x);
}

const struct {
    const char* name;
    void (*kernel)(const float*, float*);
} kKernels[] = {
#define KERNEL(name) {#name, &name}
    {"sums", &sums<Fault::none>},
    {"no_barrier_before_read", &sums<Fault::no_barrier_before_read>},
    {"no_barrier_before_reuse", &sums<Fault::no_barrier_before_reuse>},
    KERNEL(shuffles),
    KERNEL(warp_exchange),
    KERNEL(warp_exchange_without_syncwarp),
    KERNEL(across_warps_with_syncwarp_only),
    KERNEL(exit_before_barrier),
    KERNEL(two_barriers),
    KERNEL(lane_missing),
    KERNEL(lane_at_a_barrier),
    KERNEL(lane_not_named),
    KERNEL(shared_overrun),
    KERNEL(shared_unwritten),
    KERNEL(global_race),
    KERNEL(blocks_write_the_same),
    KERNEL(block_reads_what_another_writes),
    KERNEL(global_overrun),
    KERNEL(global_overwrite),
    KERNEL(misaligned),
    KERNEL(order_of_threads),
};

}  // namespace

// The message of what went wrong, empty for nothing, in `message` of 500 bytes.
extern "C" __attribute__((visibility("default"))) void toy_run(const char* name, const float* in, float* out, char* message) {
    std::string text = "no such kernel";
    for (const auto& [known, kernel] : kKernels) {
        if (std::string(known) != name) continue;
        text.clear();
        try {
            reinforce_ada::run_on_cpu(kBlocks, 1, kThreads, [=, run = kernel] { run(in, out); });
        } catch (const std::runtime_error& error) {
            text = error.what();
        }
    }
    std::snprintf(message, 500, "%s", text.c_str());
}
