// fp32 vectors of the build's instruction set: 16 lanes with AVX-512, 8 with AVX2, 4 otherwise (SSE2, NEON).
//
// The compiler's vector types carry the arithmetic (+ - *); what they cannot say is here: fma, max, exp2, conversions, partial and
// non-temporal access. Everything is always inlined and lives in the namespace of the build.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define RA_INLINE static inline __attribute__((always_inline))

namespace reinforce_ada::RA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t U16 __attribute__((vector_size(2 * kLanes)));

RA_INLINE F32 broadcast(float x) { return F32{} + x; }

// a * b + c; rounded once where the instruction set has it.
RA_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// a > b ? a : b in every lane, so that a NaN in `a` is passed over and a NaN in `b` stays.
RA_INLINE F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// 2^x, relative error <= 2e-7; exactly 0 below -126.5 (baseline, AVX2) or -149 (AVX-512), also for -inf; NaN stays NaN.
// Above 128 the result means nothing.
RA_INLINE F32 exp2(F32 x) {
#if defined(__AVX512F__)
    const F32 r = _mm512_reduce_ps(x, 0x09);  // x - floor(x); 0 for an infinite x
#else
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, from where it is shifted into the exponent.
    const F32 magic = broadcast(12582912.0f);
    x = max(broadcast(-126.5f), x);
    const F32 shifted = (x - 0.5f) + magic;
    const F32 r = x - (shifted - magic);
    const F32 power = (F32)(((U32)shifted << 23) + 0x3f800000);  // unsigned: above 128 it overflows
#endif
    // Minimax in relative error over [0, 1] with coefficients rounded to fp32: 9.1e-8.
    F32 y = broadcast(0x1.ebd7e2p-10f);
    y = fma(y, r, broadcast(0x1.26b768p-7f));
    y = fma(y, r, broadcast(0x1.c949b8p-5f));
    y = fma(y, r, broadcast(0x1.ebd6c2p-3f));
    y = fma(y, r, broadcast(0x1.62e4eap-1f));
    y = fma(y, r, broadcast(0x1.fffffep-1f));
#if defined(__AVX512F__)
    return _mm512_scalef_ps(y, x);  // y * 2^floor(x)
#else
    return y * power;
#endif
}

RA_INLINE U32 widen(U16 v) {
#if defined(__AVX512F__)
    return (U32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (U32)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, U32);
#endif
}

// Every lane fits into 16 bits.
RA_INLINE U16 narrow(U32 v) {
#if defined(__AVX512F__)
    return (U16)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // packs within each half
    return (U16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
    return __builtin_convertvector(v, U16);
#endif
}

RA_INLINE F32 load(const float* p) {
    F32 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

RA_INLINE F32 load(const BFloat16* p) {
    U16 bits;
    std::memcpy(&bits, p, sizeof bits);
    return (F32)(widen(bits) << 16);
}

RA_INLINE F32 load(const Float16* p) {
    U16 bits;
    std::memcpy(&bits, p, sizeof bits);
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
    return _mm256_cvtph_ps((__m128i)bits);
#else
    const U32 h = widen(bits);
    const F32 magnitude = (F32)((h & 0x7fff) << 13) * 0x1p112f;     // the exponent's bias is 127, not 15
    const U32 special = (U32)(magnitude >= 65536.0f) & 0x7f800000;  // infinity and NaN keep their exponent
    return (F32)((U32)magnitude | special | ((h & 0x8000) << 16));
#endif
}

RA_INLINE void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }

RA_INLINE U16 to_bfloat16(F32 v) {
    const U32 bits = (U32)v;
    const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return narrow(v != v ? U32{} + 0x7fc0 : rounded);
}

RA_INLINE U16 to_float16(F32 v) {
#if defined(__AVX512F__)
    return (U16)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
    return (U16)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
    const U32 bits = (U32)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    // Below 2^-14 the spacing is fixed at 2^-24: adding 2^-1 (whose spacing that is) rounds there.
    const U32 tiny = (U32)((F32)magnitude + 0.5f) - 0x3f000000;
    const U32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const U32 finite = magnitude < 0x38800000 ? tiny : normal;
    const U32 half = magnitude >= 0x477ff000 ? U32{} + 0x7c00 : finite;
    return narrow((v != v ? U32{} + 0x7e00 : half) | sign);
#endif
}

RA_INLINE void store(BFloat16* p, F32 v) {
    const U16 bits = to_bfloat16(v);
    std::memcpy(p, &bits, sizeof bits);
}

RA_INLINE void store(Float16* p, F32 v) {
    const U16 bits = to_float16(v);
    std::memcpy(p, &bits, sizeof bits);
}

// The first n < kLanes elements at p, `fill` in the other lanes.
template <class T>
RA_INLINE F32 load_first(const T* p, int n, float fill) {
    T buffer[kLanes] = {};
    std::memcpy(buffer, p, sizeof(T) * n);
    F32 v = load(buffer);
    for (int lane = n; lane < kLanes; ++lane) v[lane] = fill;
    return v;
}

template <class T>
RA_INLINE void store_first(T* p, F32 v, int n) {
    T buffer[kLanes];
    store(buffer, v);
    std::memcpy(p, buffer, sizeof(T) * n);
}

template <class T>
RA_INLINE float load_one(const T* p) {
    return load_first(p, 1, 0.0f)[0];
}

// A store that does not read the line into the cache first; p is aligned to the bytes it writes. End with stream_fence().
template <class T>
RA_INLINE void stream(T* p, F32 v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        _mm512_stream_ps(reinterpret_cast<float*>(p), v);
    else {
        __m256i bits;
        store(reinterpret_cast<T*>(&bits), v);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
        _mm256_stream_ps(reinterpret_cast<float*>(p), v);
    else {
        __m128i bits;
        store(reinterpret_cast<T*>(&bits), v);
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
    }
#else
    store(p, v);  // half vectors would be 8 bytes: no gain
#endif
}

RA_INLINE void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Lanes are added in order, in double.
RA_INLINE double sum_lanes(F32 v) {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
    return sum;
}

RA_INLINE float max_lanes(F32 v) {
    float m = v[0];
    for (int lane = 1; lane < kLanes; ++lane) m = v[lane] > m ? v[lane] : m;
    return m;
}

}  // namespace reinforce_ada::RA_ISA
