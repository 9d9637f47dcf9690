// fp32 vectors of the build's instruction set: 16 lanes with AVX-512, 8 with AVX2, 4 otherwise (SSE2, NEON).
//
// The compiler's vector types carry the arithmetic (+ - * /); what they cannot say is here: fma, max, exp2, tanh, conversions, partial
// and non-temporal access. Everything is always inlined and lives in the namespace of the build.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define RA_INLINE static inline __attribute__((always_inline))
#define RA_METHOD inline __attribute__((always_inline))

// The one of the expressions that is for the build's instruction set.
#if defined(__AVX512F__)
#define RA_BY_ISA(avx512, avx2, otherwise) avx512
#elif defined(__AVX2__)
#define RA_BY_ISA(avx512, avx2, otherwise) avx2
#else
#define RA_BY_ISA(avx512, avx2, otherwise) otherwise
#endif
#if defined(__SSE2__)
#define RA_BY_SSE2(sse2, otherwise) sse2
#else
#define RA_BY_SSE2(sse2, otherwise) otherwise
#endif

namespace reinforce_ada::RA_ISA {

constexpr int kLanes = RA_BY_ISA(16, 8, 4);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t U16 __attribute__((vector_size(2 * kLanes)));

RA_INLINE F32 broadcast(float x) { return F32{} + x; }

// a * b + c; rounded once where the instruction set has it.
RA_INLINE F32 fma(F32 a, F32 b, F32 c) { return RA_BY_ISA(_mm512_fmadd_ps(a, b, c), _mm256_fmadd_ps(a, b, c), a * b + c); }

// a > b ? a : b in every lane, so that a NaN in `a` is passed over and a NaN in `b` stays.
RA_INLINE F32 max(F32 a, F32 b) { return RA_BY_ISA(_mm512_max_ps(a, b), _mm256_max_ps(a, b), RA_BY_SSE2(_mm_max_ps(a, b), a > b ? a : b)); }

// a < b ? a : b in every lane, so that a NaN in `b` stays.
RA_INLINE F32 min(F32 a, F32 b) { return RA_BY_ISA(_mm512_min_ps(a, b), _mm256_min_ps(a, b), RA_BY_SSE2(_mm_min_ps(a, b), a < b ? a : b)); }

// Whether exp2 is infinite above 128; otherwise its result means nothing there.
constexpr bool kExp2Overflows = RA_BY_ISA(true, false, false);

// 2^x as a product, which a sum of powers or a scaled power takes in with one fma.
struct Factors {
    F32 power, mantissa;
};

#if defined(__AVX2__)
// The powers of two of the fractions k / kParts, times the value at 0 of the polynomial in exp2_factors.
constexpr int kParts = RA_BY_ISA(32, 8, 0);
constexpr double kRootOfTwo = RA_BY_ISA(1.0218971486541166, 1.0905077326652577, 0), kAtZero = RA_BY_ISA(1 + 5.293e-8, 1 - 1.834e-8, 0);
struct PowersOfParts {
    alignas(64) float value[kParts] = {};
    constexpr PowersOfParts() {
        double power = kAtZero;
        for (float& v : value) {
            v = static_cast<float>(power);
            power *= kRootOfTwo;
        }
    }
};
constexpr PowersOfParts kPowersOfParts;
#endif

// 2^x = power * mantissa, relative error <= 1.7e-7 of the exact product; exactly 0 below -126.5 (baseline), -127 (AVX2, which knows only
// the size from -126 on) or -149 (AVX-512), also for -inf; 1 for 0 (AVX-512, AVX2); NaN stays NaN.
RA_INLINE Factors exp2_factors(F32 x) {
#if defined(__AVX512F__)
    const F32 r = _mm512_reduce_ps(x, 0x59);  // x - floor(32 x) / 32; 0 for an infinite x
    // Adding 1.5 * 2^18 rounds down to a multiple of 1/32, and leaves its fraction in the lowest five bits: all that the permutation reads.
    const F32 index = _mm512_add_round_ps(x, broadcast(393216.0f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const F32 root =
        _mm512_permutex2var_ps(_mm512_load_ps(kPowersOfParts.value), (__m512i)index, _mm512_load_ps(kPowersOfParts.value + 16));
    // Minimax in relative error over [0, 1/32], divided by its value at 0: 5.3e-8.
    const F32 y = fma(fma(broadcast(0x1.f1566ap-3f), r, broadcast(0x1.62e02cp-1f)), r, broadcast(1));
    return {_mm512_scalef_ps(root, x), y};  // root * 2^floor(x)
#elif defined(__AVX2__)
    // Adding 1.5 * 2^20 rounds to a multiple of 1/8, whose fraction is then in the lowest three bits: all that the permutation reads. These
    // are 10 operations where the polynomial below takes 12, and the permutation has a port of its own: about 10 % more logits a second.
    const F32 magic = broadcast(1572864.0f);
    x = max(broadcast(-127), x);
    const F32 shifted = x + magic;
    const F32 r = x - (shifted - magic);
    const I32 eighth = {0, 1, 2, 3, 4, 5, 6, 7};
    // The shift brings the eighths into the mantissa, so the table is without them.
    const I32 roots = (I32)_mm256_load_ps(kPowersOfParts.value) - (eighth << 20);
    const U32 root = (U32)_mm256_permutevar8x32_epi32((__m256i)roots, (__m256i)shifted);
    // Minimax in relative error over [-1/16, 1/16], divided by its value at 0: 2.0e-8.
    const F32 y = fma(fma(fma(broadcast(0x1.c6a5a4p-5f), r, broadcast(0x1.ec0f92p-3f)), r, broadcast(0x1.62e432p-1f)), r, broadcast(1));
    return {(F32)(root + ((U32)shifted << 20)), y};  // unsigned: above 128 it overflows
#else
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, from where it is shifted into the exponent.
    const F32 magic = broadcast(12582912.0f);
    x = max(broadcast(-126.5f), x);
    const F32 shifted = (x - 0.5f) + magic;
    const F32 r = x - (shifted - magic);
    // Minimax in relative error over [0, 1] with coefficients rounded to fp32: 9.1e-8.
    F32 y = broadcast(0x1.ebd7e2p-10f);
    y = fma(y, r, broadcast(0x1.26b768p-7f));
    y = fma(y, r, broadcast(0x1.c949b8p-5f));
    y = fma(y, r, broadcast(0x1.ebd6c2p-3f));
    y = fma(y, r, broadcast(0x1.62e4eap-1f));
    y = fma(y, r, broadcast(0x1.fffffep-1f));
    return {(F32)(((U32)shifted << 23) + 0x3f800000), y};  // unsigned: above 128 it overflows
#endif
}

// 2^x in one rounding more.
RA_INLINE F32 exp2(F32 x) {
    const Factors y = exp2_factors(x);
    return y.power * y.mantissa;
}

// 2 kLanes consecutive elements, in whatever order is cheapest: store_pair and stream_pair know it.
struct Pair {
    F32 first, second;
};

#if defined(__AVX512F__)
// scaled_tanh's unit, so that its argument need not be multiplied first.
constexpr double kTanhUnit = 0.61;

// tanh(kTanhUnit t) on [0, 15], of which 1 + t is in the octaves [1, 2) to [8, 16): 32 intervals, the eighths of [2, 4) first and those
// of [1, 2) last. Row c: coefficient of the c-th power of t less the interval's lower end, minimax in relative error: 7.5e-8.
alignas(64) constexpr float kTanh[5][32] = {
    {0x1.1697d4p-1f, 0x1.48fbfp-1f,  0x1.7271aap-1f, 0x1.93b89p-1f,  0x1.ade726p-1f,
     0x1.c22e76p-1f, 0x1.d1b282p-1f, 0x1.dd7568p-1f, 0x1.e64f9cp-1f, 0x1.f1e14ep-1f,
     0x1.f84782p-1f, 0x1.fbca5cp-1f, 0x1.fdb55cp-1f, 0x1.fec0ecp-1f, 0x1.ff5288p-1f,
     0x1.ffa1b8p-1f, 0x1.ffccc4p-1f, 0x1.fff0ep-1f,  0x1.fffb88p-1f, 0x1.fffeaep-1f,
     0x1.ffff9cp-1f, 0x1.ffffe2p-1f, 0x1.fffff8p-1f, 0x1.fffffep-1f, 0,
     0x1.37b754p-4f, 0x1.35ebd2p-3f, 0x1.cc79e6p-3f, 0x1.2efb96p-2f, 0x1.748608p-2f,
     0x1.b6514ap-2f, 0x1.f3f5dp-2f},
    {0x1.b7b372p-2f,  0x1.6ec03p-2f,    0x1.29a702p-2f,   0x1.d887e2p-3f,  0x1.70858ap-3f,  0x1.1b74cp-3f,   0x1.af7dbp-4f,
     0x1.45c19ep-4f,  0x1.e8d672p-5f,   0x1.0fcab2p-5f,   0x1.2b19ep-6f,   0x1.474e8p-7f,   0x1.6516fcp-8f,  0x1.84de3p-9f,
     0x1.a72d16p-10f, 0x1.cbbc7ep-11f,  0x1.f32b0ep-12f,  0x1.25409cp-13f, 0x1.60c83cp-15f, 0x1.a89442p-17f, 0x1.080a84p-18f,
     0x1.aff38ap-20f, -0x1.61468ep-22f, -0x1.d4dee2p-22f, 0x1.3851eap-1f,  0x1.3682dp-1f,   0x1.312b16p-1f,  0x1.2887f6p-1f,
     0x1.1cfa72p-1f,  0x1.0efc18p-1f,   0x1.fe3036p-2f,   0x1.dbbcfap-2f},
    {-0x1.23fa5p-3f,   -0x1.1fb57ap-3f, -0x1.06e438p-3f,  -0x1.c6bd76p-4f,  -0x1.79d958p-4f,  -0x1.2fd3a2p-4f,  -0x1.df3e28p-5f,
     -0x1.72c344p-5f,  -0x1.1ac92ep-5f, -0x1.41ac42p-6f,  -0x1.664d7p-7f,   -0x1.8b44b2p-8f,  -0x1.b1fdcep-9f,  -0x1.da0292p-10f,
     -0x1.0358dap-10f, -0x1.161dbp-11f, -0x1.2ae822p-12f, -0x1.514f4cp-14f, -0x1.ce9468p-16f, -0x1.38d35ep-17f, -0x1.f66618p-19f,
     -0x1.bfa6ecp-19f, 0x1.959df6p-19f, 0x1.5ad5aep-19f,  0x1.3ef6dp-17f,   -0x1.ccec38p-6f,  -0x1.c30bfcp-5f,  -0x1.455f86p-4f,
     -0x1.9baea4p-4f,  -0x1.e0ab68p-4f, -0x1.0a1eb2p-3f,  -0x1.1b6716p-3f},
    {-0x1.5fe3b2p-8f, 0x1.7c12b4p-7f,   0x1.5d56a2p-6f,   0x1.9cefc4p-6f,  0x1.a24f5ap-6f, 0x1.6d6f7ap-6f,  0x1.42e8a2p-6f,
     0x1.05b9b2p-6f,  0x1.94c05p-7f,    0x1.df8e7cp-8f,   0x1.1067e2p-8f,  0x1.337a06p-9f, 0x1.5a72d2p-10f, 0x1.7e5f86p-11f,
     0x1.b0e21ap-12f, 0x1.a3a7eap-13f,  0x1.b0296cp-14f,  0x1.98aa1p-16f,  0x1.be673p-17f, 0x1.86625ap-18f, 0x1.baf29p-19f,
     0x1.307d88p-18f, -0x1.53aefcp-18f, -0x1.19ae32p-18f, -0x1.3732dep-4f, -0x1.308cfp-4f, -0x1.1864f4p-4f, -0x1.f3b2a8p-5f,
     -0x1.9c2a2ap-5f, -0x1.4f108ap-5f,  -0x1.e7871cp-6f,  -0x1.09441cp-6f},
    {0x1.12ea34p-6f,   0x1.321cbap-7f,   0x1.eb803cp-9f,   -0x1.4ffda6p-14f, -0x1.a1aaecp-9f,  -0x1.4515ep-9f,   -0x1.136c56p-8f,
     -0x1.ceb5eep-9f,  -0x1.43cd46p-9f,  -0x1.958b4cp-10f, -0x1.d64c46p-11f, -0x1.1a693ap-11f, -0x1.576c2ap-12f, -0x1.85ad66p-13f,
     -0x1.e89fbap-14f, -0x1.45a7c6p-15f, -0x1.370644p-16f, -0x1.45b716p-19f, -0x1.f9f61ep-19f, -0x1.140f32p-19f, -0x1.774306p-20f,
     -0x1.264be6p-19f, 0x1.56545ep-19f,  0x1.1a4eep-19f,   0x1.b993d8p-9f,   0x1.5a2544p-7f,   0x1.ad8036p-7f,   0x1.406fb8p-6f,
     0x1.45beep-6f,    0x1.d82fc4p-6f,   0x1.fa024p-6f,    0x1.507732p-6f},
};

struct TanhPart {
    __m512i interval;  // in the lowest five bits, all that the permutation reads
    F32 rest;          // what |t| is above the interval's lower end

    RA_INLINE TanhPart of(F32 t) {
        t = min(broadcast(0x1.dfffep3f), (F32)((U32)t & 0x7fffffffu));  // where tanh is 1
        const U32 bits = (U32)(t + 1.0f);
        return {(__m512i)(bits >> 20), t - ((F32)(bits & 0xfff00000u) - 1.0f)};
    }

    RA_INLINE F32 coefficient(const TanhPart& part, int power) {
        return _mm512_permutex2var_ps(_mm512_load_ps(kTanh[power]), part.interval, _mm512_load_ps(kTanh[power] + 16));
    }
};

RA_INLINE Pair tanh_of_magnitudes(Pair t) {
    const TanhPart a = TanhPart::of(t.first), b = TanhPart::of(t.second);
    Pair y{TanhPart::coefficient(a, 4), TanhPart::coefficient(b, 4)};
    for (int power = 3; power >= 0; --power)
        y = {fma(y.first, a.rest, TanhPart::coefficient(a, power)), fma(y.second, b.rest, TanhPart::coefficient(b, power))};
    return y;
}
#else
constexpr double kTanhUnit = 0.34657359027997264;  // ln(2) / 2

RA_INLINE F32 tanh_of_magnitude(F32 t) {
    // With m = 2^-|t| - 1, tanh = -m / (2 + m). 2^-|t| is rounded to 1 - 2^-24 and less long before |t| = 30.
    const F32 exponent = max(broadcast(-30), -(F32)((U32)t & 0x7fffffffu));
    const F32 magic = broadcast(12582912.0f);  // rounds to an integer, as in exp2
    const F32 shifted = exponent + magic;
    const F32 r = exponent - (shifted - magic);
    const F32 power = (F32)(((I32)shifted << 23) + 0x3f800000);
    // (2^r - 1) / r, minimax in relative error over [-1/2, 1/2]: 2.1e-8.
    F32 y = broadcast(0x1.4308f8p-13f);
    y = fma(y, r, broadcast(0x1.5f07b4p-10f));
    y = fma(y, r, broadcast(0x1.3b2bap-7f));
    y = fma(y, r, broadcast(0x1.c6af6ep-5f));
    y = fma(y, r, broadcast(0x1.ebfbdep-3f));
    y = fma(y, r, broadcast(0x1.62e43p-1f));
    const F32 m = fma(power, y * r, power - 1.0f);
    return -m / (m + 2.0f);
}

RA_INLINE Pair tanh_of_magnitudes(Pair t) { return {tanh_of_magnitude(t.first), tanh_of_magnitude(t.second)}; }
#endif

RA_INLINE F32 with_sign_of(F32 t, F32 magnitude) { return (F32)((U32)magnitude | ((U32)t & 0x80000000u)); }

// tanh(kTanhUnit t), relative error <= 2.5e-7, never above 1; NaN stays NaN. Two at a time: one is a chain of 60 cycles, too long for the
// processor to look past.
RA_INLINE Pair scaled_tanh(Pair t) {
    const Pair y = tanh_of_magnitudes(t);
    return {with_sign_of(t.first, y.first), with_sign_of(t.second, y.second)};
}

RA_INLINE U32 widen(U16 v) {
    return RA_BY_ISA((U32)_mm512_cvtepu16_epi32((__m256i)v), (U32)_mm256_cvtepu16_epi32((__m128i)v), __builtin_convertvector(v, U32));
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

// The bits of v rounded to a bfloat16, in the upper half.
RA_INLINE U32 rounded_to_bfloat16(F32 v) {
    const U32 bits = (U32)v;
    return v != v ? U32{} + 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
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
    const U16 bits = narrow(rounded_to_bfloat16(v) >> 16);
    std::memcpy(p, &bits, sizeof bits);
}

RA_INLINE void store(Float16* p, F32 v) {
    const U16 bits = to_float16(v);
    std::memcpy(p, &bits, sizeof bits);
}

// v in the first n lanes, `fill` in the others.
RA_INLINE F32 keep_first(F32 v, int n, float fill) {
    for (int lane = n; lane < kLanes; ++lane) v[lane] = fill;
    return v;
}

// The first n < kLanes elements at p, `fill` in the other lanes.
template <class T>
RA_INLINE F32 load_first(const T* p, int n, float fill) {
    T buffer[kLanes] = {};
    std::memcpy(buffer, p, sizeof(T) * n);
    return keep_first(load(buffer), n, fill);
}

template <class T>
RA_INLINE void store_first(T* p, F32 v, int n) {
    T buffer[kLanes];
    store(buffer, v);
    std::memcpy(p, buffer, sizeof(T) * n);
}

// to[i] = from[i] for n elements, of which one side is fp32.
template <class From, class To>
RA_INLINE void convert(const From* from, To* to, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store_first(to + i, load_first(from + i, static_cast<int>(n - i), 0), static_cast<int>(n - i));
}

template <class T>
RA_INLINE float load_one(const T* p) {
    return load_first(p, 1, 0.0f)[0];
}

template <class T>
RA_INLINE Pair load_pair(const T* p) {
    return {load(p), load(p + kLanes)};
}

// The even and the odd elements: a bfloat16 is the upper half of a float.
RA_INLINE Pair load_pair(const BFloat16* p) {
    U32 bits;
    std::memcpy(&bits, p, sizeof bits);
    return {(F32)(bits << 16), (F32)(bits & 0xffff0000u)};
}

#if defined(__AVX512F__) && !defined(RA_EMULATED_AVX512)
#define RA_ASKS_FOR_AVX512_BF16
// A bfloat16 that the processor's own instruction rounds; it writes 0 below 2^-126. AVX512_BF16 is not among the build's flags, hence
// assembly, and with_stored_type asks the processor.
struct HardwareBFloat16 : BFloat16 {};

RA_INLINE void store(HardwareBFloat16* p, F32 v) {
    __m256i bits;
    asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(v));
    std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
}

RA_INLINE U32 interleave(HardwareBFloat16*, Pair v) {
    __m512i halves;  // first in the lower half of the register, second in the upper
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(v.first), "v"(v.second));
    const U32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (U32)_mm512_permutexvar_epi16((__m512i)(lane * 0x10001 + 0x100000), halves);  // word j, then word 16 + j
}
#endif

RA_INLINE U32 interleave(BFloat16*, Pair v) { return (rounded_to_bfloat16(v.first) >> 16) | (rounded_to_bfloat16(v.second) & 0xffff0000u); }

// A sweep asks for what lies this far ahead, half a page. On a Sapphire Rapids server the processor itself reads ahead too little where a
// vector takes 20 cycles: bfloat16 logits of 64 MB were swept 3.5 times as fast for it in AVX2, 1.6 times in AVX-512. 1024 bytes gain less
// in AVX2, and 4096 lose in AVX-512 where logits lie in the L3 cache.
constexpr std::uintptr_t kPrefetchBytes = 2048;

// Asks for the lines of n elements that a sweep which has come to p reads next.
template <int n, class T>
RA_INLINE void prefetch_ahead(const T* p) {
    const std::uintptr_t ahead = reinterpret_cast<std::uintptr_t>(p) + kPrefetchBytes;
    for (std::uintptr_t byte = 0; byte < n * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const void*>(ahead + byte));
}

// What load_pair has read from the same place, in its order.
template <class T>
RA_INLINE void store_pair(T* p, Pair v) {
    if constexpr (std::is_base_of_v<BFloat16, T>) {
        const U32 bits = interleave(p, v);
        std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
    } else {
        store(p, v.first);
        store(p + kLanes, v.second);
    }
}

// Calls body with a null pointer of the type to store T as.
template <class T, class Body>
inline void with_stored_type(const Body& body) {
#if defined(RA_ASKS_FOR_AVX512_BF16)
    static const bool has_rounding = __builtin_cpu_supports("avx512bf16");
    if constexpr (std::is_same_v<T, BFloat16>)
        if (has_rounding) return body(static_cast<HardwareBFloat16*>(nullptr));
#endif
    body(static_cast<T*>(nullptr));
}

// store_pair that does not read the lines into the cache first; p is aligned to the bytes of a vector. End with stream_fence().
template <class T>
RA_INLINE void stream_pair(T* p, Pair v) {
    Pair bits = v;
    if constexpr (sizeof(T) == 2) store_pair(reinterpret_cast<T*>(&bits), v);
    [[maybe_unused]] float* const out = reinterpret_cast<float*>(p);
#if defined(__AVX512F__)
    _mm512_stream_ps(out, bits.first);
    if constexpr (sizeof(T) == 4) _mm512_stream_ps(out + kLanes, bits.second);
#elif defined(__AVX2__)
    _mm256_stream_ps(out, bits.first);
    if constexpr (sizeof(T) == 4) _mm256_stream_ps(out + kLanes, bits.second);
#elif defined(__SSE2__)
    _mm_stream_ps(out, bits.first);
    if constexpr (sizeof(T) == 4) _mm_stream_ps(out + kLanes, bits.second);
#else
    std::memcpy(static_cast<void*>(p), &bits, 2 * kLanes * sizeof(T));
#endif
}

RA_INLINE void stream_fence() { RA_BY_SSE2(_mm_sfence(), ); }

// sums[lane] += v[lane], in double.
RA_INLINE void add_lanes(double* sums, F32 v) {
#if defined(__AVX512F__)
    _mm512_storeu_pd(sums, _mm512_loadu_pd(sums) + _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    _mm512_storeu_pd(sums + 8, _mm512_loadu_pd(sums + 8) + _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif defined(__AVX2__)
    _mm256_storeu_pd(sums, _mm256_loadu_pd(sums) + _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
    _mm256_storeu_pd(sums + 4, _mm256_loadu_pd(sums + 4) + _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += v[lane];
#endif
}

// In double, halves first.
RA_INLINE double sum_lanes(F32 v) {
#if defined(__AVX512F__)
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return _mm512_reduce_add_pd(low + high);
#else
    double sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = v[lane];
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
#endif
}

RA_INLINE float max_lanes(F32 v) {
    float m = v[0];
    for (int lane = 1; lane < kLanes; ++lane) m = v[lane] > m ? v[lane] : m;
    return m;
}

}  // namespace reinforce_ada::RA_ISA
