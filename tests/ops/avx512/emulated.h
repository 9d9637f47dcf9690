// The AVX-512 intrinsics of the kernels, in AVX2. `make test-avx512` includes this file before every source of the avx512 build, so that
// its code runs, and is tested, on processors that lack AVX-512. Every result has the bits of the instruction (NaN: some NaN), which
// test_avx512.py shows where the processor has both. What stays untested is the compiler's own AVX-512 code and AVX512_BF16.
//
// A kernel that takes up another intrinsic does not compile here until it stands below.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace reinforce_ada::emulated {

#define RA_EMULATED static inline __attribute__((always_inline))

typedef float F32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef double F64x8 __attribute__((vector_size(64), aligned(8), may_alias));

template <class Wide, class Half>
struct Halves {
    Half low, high;
    RA_EMULATED Halves of(Wide v) {
        Halves halves;
        std::memcpy(&halves, &v, sizeof v);
        return halves;
    }
    inline __attribute__((always_inline)) Wide joined() const {
        Wide v;
        std::memcpy(&v, this, sizeof v);
        return v;
    }
};
typedef Halves<__m512, __m256> Floats;
typedef Halves<__m512d, __m256d> Doubles;
typedef Halves<__m512i, __m256i> Integers;

RA_EMULATED __m512 load_ps(const void* p) { return *static_cast<const __m512*>(p); }
RA_EMULATED __m512d loadu_pd(const void* p) { return (__m512d) * static_cast<const F64x8*>(p); }
RA_EMULATED __m512i loadu_si512(const void* p) { return (__m512i) * static_cast<const F64x8*>(p); }
RA_EMULATED void storeu_pd(void* p, __m512d v) { *static_cast<F64x8*>(p) = (F64x8)v; }

RA_EMULATED void stream_ps(float* p, __m512 v) {
    const Floats a = Floats::of(v);
    _mm256_stream_ps(p, a.low);
    _mm256_stream_ps(p + 8, a.high);
}

// The lanes that are not kept are not read either.
RA_EMULATED __m512 maskz_loadu_ps(__mmask16 keep, const float* p) {
    __m512 v{};
    for (int lane = 0; lane < 16; ++lane)
        if (keep >> lane & 1) v[lane] = p[lane];
    return v;
}

RA_EMULATED __m512i set1_epi32(int x) { return (__m512i)((__v16si){} + x); }
RA_EMULATED __m512i set1_epi64(long long x) { return (__m512i)((__v8di){} + x); }
RA_EMULATED __m256 castps512_ps256(__m512 v) { return Floats::of(v).low; }
RA_EMULATED __m256d castpd512_pd256(__m512d v) { return Doubles::of(v).low; }
RA_EMULATED __m256 extractf32x8_ps(__m512 v, int half) { return half ? Floats::of(v).high : Floats::of(v).low; }
RA_EMULATED __m256d extractf64x4_pd(__m512d v, int half) { return half ? Doubles::of(v).high : Doubles::of(v).low; }

RA_EMULATED __m512 fmadd_ps(__m512 x, __m512 y, __m512 z) {
    const Floats a = Floats::of(x), b = Floats::of(y), c = Floats::of(z);
    return Floats{_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}.joined();
}

RA_EMULATED __m512 max_ps(__m512 x, __m512 y) {
    const Floats a = Floats::of(x), b = Floats::of(y);
    return Floats{_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}.joined();
}

RA_EMULATED __m512 min_ps(__m512 x, __m512 y) {
    const Floats a = Floats::of(x), b = Floats::of(y);
    return Floats{_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}.joined();
}

RA_EMULATED double reduce_add_pd(__m512d v) {
    const Doubles a = Doubles::of(v);
    const __m256d four = a.low + a.high;
    const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
    return two[0] + two[1];
}

// x + y rounded down: to nearest first, then down by one place where that was above the sum. x - x is -0.
RA_EMULATED __m256 add_down(__m256 x, __m256 y) {
    const __m256 sum = x + y, part = sum - x;
    const __m256 error = (x - (sum - part)) + (y - part);                                   // x + y - sum, exactly (Knuth)
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(error, __m256{}, _CMP_LT_OQ));  // -1 or 0
    const __m256i away = _mm256_or_si256(_mm256_srai_epi32(_mm256_castps_si256(sum), 31), _mm256_set1_epi32(1));  // -1 or 1
    const __m256 down = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum), _mm256_sign_epi32(above, away)));
    const __m256 zero = _mm256_cmp_ps(sum, __m256{}, _CMP_EQ_OQ);
    return _mm256_blendv_ps(down, _mm256_and_ps(_mm256_or_ps(x, y), _mm256_set1_ps(-0.0f)), zero);
}

// x - floor(32 x) / 32, rounded down; 0 for an infinite x.
RA_EMULATED __m256 above_32nds(__m256 x) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    const __m256 whole = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p18f), _CMP_GE_OQ);  // a multiple of 1/32, like all above it
    const __m256 below = _mm256_blendv_ps(_mm256_floor_ps(x * 32.0f) * 0.03125f, x, whole);
    const __m256 infinite = _mm256_cmp_ps(magnitude, _mm256_set1_ps(__builtin_inff()), _CMP_EQ_OQ);
    return _mm256_andnot_ps(infinite, add_down(x, -below));
}

template <int mode>
RA_EMULATED __m512 reduce_ps(__m512 x) {
    static_assert(mode == 0x59, "5 bits of the fraction, down, no exceptions: the only mode in use");
    const Floats a = Floats::of(x);
    return Floats{above_32nds(a.low), above_32nds(a.high)}.joined();
}

template <int mode>
RA_EMULATED __m512 add_round_ps(__m512 x, __m512 y) {
    static_assert(mode == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), "the only mode in use");
    const Floats a = Floats::of(x), b = Floats::of(y);
    return Floats{add_down(a.low, b.low), add_down(a.high, b.high)}.joined();
}

RA_EMULATED __m512 permutex2var_ps(__m512 first, __m512i index, __m512 second) {
    alignas(64) float table[32];
    std::memcpy(table, &first, 64);
    std::memcpy(table + 16, &second, 64);
    const Integers at = Integers::of(index);
    const __m256i lowest = _mm256_set1_epi32(31);
    return Floats{_mm256_i32gather_ps(table, _mm256_and_si256(at.low, lowest), 4),
                  _mm256_i32gather_ps(table, _mm256_and_si256(at.high, lowest), 4)}
        .joined();
}

// x * 2^floor(power) in double, which holds it exactly, so that it is rounded once.
RA_EMULATED __m128 scaled(__m128 x, __m128 power) {
    const __m128 bounded = _mm_min_ps(_mm_set1_ps(500), _mm_max_ps(_mm_set1_ps(-500), power));
    const __m256i exponent = _mm256_cvtepi32_epi64(_mm_cvttps_epi32(_mm_floor_ps(bounded)));
    const __m256d factor = _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(exponent, _mm256_set1_epi64x(1023)), 52));
    const __m128 result = _mm256_cvtpd_ps(_mm256_cvtps_pd(x) * factor);
    return _mm_blendv_ps(result, power, _mm_cmpunord_ps(power, power));
}

// For an x that is finite and not 0; the instruction has rules of its own for others.
RA_EMULATED __m512 scalef_ps(__m512 x, __m512 power) {
    const Floats a = Floats::of(x), b = Floats::of(power);
    __m128 parts[4] = {
        scaled(_mm256_castps256_ps128(a.low), _mm256_castps256_ps128(b.low)),
        scaled(_mm256_extractf128_ps(a.low, 1), _mm256_extractf128_ps(b.low, 1)),
        scaled(_mm256_castps256_ps128(a.high), _mm256_castps256_ps128(b.high)),
        scaled(_mm256_extractf128_ps(a.high, 1), _mm256_extractf128_ps(b.high, 1)),
    };
    __m512 v;
    std::memcpy(&v, parts, sizeof v);
    return v;
}

RA_EMULATED __m512i cvtepu16_epi32(__m256i v) {
    return Integers{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1))}.joined();
}

RA_EMULATED __m256i cvtepi32_epi16(__m512i v) {
    typedef std::uint16_t U16x16 __attribute__((vector_size(32)));
    return (__m256i) __builtin_convertvector((__v16su)v, U16x16);
}

RA_EMULATED __m512 cvtph_ps(__m256i v) {
    return Floats{_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))}.joined();
}

template <int mode>
RA_EMULATED __m256i cvtps_ph(__m512 v) {
    const Floats a = Floats::of(v);
    return _mm256_set_m128i(_mm256_cvtps_ph(a.high, mode), _mm256_cvtps_ph(a.low, mode));
}

RA_EMULATED __m512d cvtps_pd(__m256 v) {
    return Doubles{_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))}.joined();
}

RA_EMULATED __m256 cvtpd_ps(__m512d v) {
    const Doubles a = Doubles::of(v);
    return _mm256_set_m128(_mm256_cvtpd_ps(a.high), _mm256_cvtpd_ps(a.low));
}

template <int comparison>
RA_EMULATED __mmask16 cmp_ps_mask(__m512 x, __m512 y) {
    const Floats a = Floats::of(x), b = Floats::of(y);
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, comparison));
    return static_cast<__mmask16>(_mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, comparison)) << 8 | low);
}

RA_EMULATED __mmask8 cmpneq_epi64_mask(__m512i x, __m512i y) {
    const Integers a = Integers::of(x), b = Integers::of(y);
    const int low = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(a.low, b.low)));
    const int high = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(a.high, b.high)));
    return static_cast<__mmask8>(~(high << 4 | low));
}

RA_EMULATED __mmask16 test_epi8_mask(__m128i x, __m128i y) {
    const __m128i none = _mm_cmpeq_epi8(_mm_and_si128(x, y), _mm_setzero_si128());
    return static_cast<__mmask16>(~_mm_movemask_epi8(none));
}

// `yes` where the mask is set.
RA_EMULATED __m512 mask_blend_ps(__mmask16 mask, __m512 no, __m512 yes) {
    for (int lane = 0; lane < 16; ++lane) no[lane] = mask >> lane & 1 ? yes[lane] : no[lane];
    return no;
}

RA_EMULATED __m512 mask_min_ps(__m512 rest, __mmask16 mask, __m512 x, __m512 y) { return mask_blend_ps(mask, rest, min_ps(x, y)); }
RA_EMULATED __m512 mask_max_ps(__m512 rest, __mmask16 mask, __m512 x, __m512 y) { return mask_blend_ps(mask, rest, max_ps(x, y)); }

RA_EMULATED __m512i mask_sub_epi32(__m512i rest, __mmask16 mask, __m512i x, __m512i y) {
    return (__m512i)mask_blend_ps(mask, (__m512)rest, (__m512)((__v16su)x - (__v16su)y));
}

}  // namespace reinforce_ada::emulated
