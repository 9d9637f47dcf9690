// What the CUDA kernels are written in. They use nothing of CUDA but
//
//   threadIdx.x, blockIdx.x, blockIdx.y, blockDim.x, gridDim.x, gridDim.y, __launch_bounds__
//   __syncthreads(), __syncwarp(), __shfl_xor_sync, __shfl_down_sync, __shfl_sync, __ballot_sync
//   RA_SHARED(type, name, size): an array that a block shares, whose elements are read and written whole
//   exp2f, log2f, tanhf, fmaf, sqrt, log2 of C, and what is below
//
// so that a compiler for the CPU can build the same sources against a `cuda_on_cpu.h` that gives these words a meaning there
// (common/launch.cuh says which). Such a build needs -fno-strict-aliasing: tensors are read as words.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#ifdef __CUDACC__
#define RA_SHARED(type, name, size) __shared__ type name[size]
#else
#include "cuda_on_cpu.h"
#endif

#define RA_DEVICE __device__ __forceinline__

namespace reinforce_ada {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// u 2^u is 0 in fp32 for every u below this, also for -inf, where it would otherwise be NaN.
constexpr float kVanishing = -200.0f;

// -------------------- bits and elements

template <class To, class From>
RA_DEVICE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

RA_DEVICE float quiet_nan() { return bits_as<float>(std::uint32_t{0x7fc00000}); }

RA_DEVICE float to_float(float x) { return x; }
RA_DEVICE float to_float(BFloat16 x) { return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16); }
RA_DEVICE float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#elif !defined(__CUDACC__)
    return static_cast<float>(bits_as<_Float16>(x.bits));
#else
    return static_cast<float>(x.bits);  // the host's pass over device code, never run
#endif
}

// Rounded to nearest even; NaN stays NaN. As instructions: cuda_fp16.h and cuda_bf16.h would take half of the time to compile a file.
template <class T>
RA_DEVICE T from_float(float x);

template <>
RA_DEVICE float from_float(float x) {
    return x;
}

template <>
RA_DEVICE BFloat16 from_float(float x) {
#ifdef __CUDA_ARCH__
    BFloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const auto bits = bits_as<std::uint32_t>(x);
    if (x != x) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
RA_DEVICE Float16 from_float(float x) {
#ifdef __CUDA_ARCH__
    Float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#elif !defined(__CUDACC__)
    return {bits_as<std::uint16_t>(static_cast<_Float16>(x))};
#else
    return {static_cast<std::uint16_t>(x)};  // the host's pass over device code, never run
#endif
}

// -------------------- packs: neighbouring elements in one access

// kSize elements in 32-bit words, at an address that is a multiple of their size: one access of up to 16 bytes.
template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
    static_assert(kSize * sizeof(T) == 16 || kSize * sizeof(T) == 8 || kSize * sizeof(T) == 4, "what a thread can access at once");
    std::uint32_t words[kSize * sizeof(T) / 4];
};

// As many elements as 16 bytes hold.
template <class T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

template <int kSize, class T>
RA_DEVICE Pack<T, kSize> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, kSize>*>(p);
}

template <int kSize, class T>
RA_DEVICE void store_pack(T* p, const Pack<T, kSize>& pack) {
    *reinterpret_cast<Pack<T, kSize>*>(p) = pack;
}

template <class T, int kSize>
RA_DEVICE void unpack(const Pack<T, kSize>& pack, float (&values)[kSize]) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
        if constexpr (sizeof(T) == 4)
            values[k] = bits_as<float>(pack.words[k]);
        else
            values[k] = to_float(T{static_cast<std::uint16_t>(pack.words[k / 2] >> (k % 2 * 16))});
    }
}

template <class T, int kSize>
RA_DEVICE Pack<T, kSize> packed(const float (&values)[kSize]) {
    Pack<T, kSize> pack;
#pragma unroll
    for (int k = 0; k < kSize; k += 4 / static_cast<int>(sizeof(T))) {
        if constexpr (sizeof(T) == 4)
            pack.words[k] = bits_as<std::uint32_t>(values[k]);
        else
            pack.words[k / 2] = from_float<T>(values[k]).bits | static_cast<std::uint32_t>(from_float<T>(values[k + 1]).bits) << 16;
    }
    return pack;
}

// Bytes from the last multiple of 16 to p.
RA_DEVICE int past_alignment(const void* p) { return static_cast<int>(reinterpret_cast<std::uintptr_t>(p) % 16); }

// -------------------- reductions, in an order that depends on nothing but the size of the block

// What the lane `mask` away holds; T is made of 32-bit words.
template <class T>
RA_DEVICE T shuffle_xor(const T& value, int mask) {
    std::uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof value);
#pragma unroll
    for (int w = 0; w < static_cast<int>(sizeof(T) / 4); ++w) words[w] = __shfl_xor_sync(kAllLanes, words[w], mask);
    T other;
    memcpy(&other, words, sizeof other);
    return other;
}

// `merge(a, b)`, the same as merge(b, a), over kLanes neighbouring lanes, each of which gets the result.
template <int kLanes, class T, class Merge>
RA_DEVICE T reduce_lanes(T value, const Merge& merge) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) value = merge(value, shuffle_xor(value, mask));
    return value;
}

// The same over a block of kWarps warps, a power of 2: the result is the first warp's. Once in a kernel: the array it shares is not
// guarded against a second use.
template <int kWarps, class T, class Merge>
RA_DEVICE T reduce_block(T value, const Merge& merge) {
    value = reduce_lanes<kWarp>(value, merge);
    if constexpr (kWarps > 1) {
        RA_SHARED(T, of_warps, kWarps);
        const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
        if (lane == 0) of_warps[warp] = value;
        __syncthreads();
        if (warp == 0) {
            value = of_warps[lane % kWarps];
            value = reduce_lanes<kWarps>(value, merge);
        }
    }
    return value;
}

}  // namespace reinforce_ada
