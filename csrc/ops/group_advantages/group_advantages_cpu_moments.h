// Moments of rewards in double: of one group, and of as many groups as a register holds.
#pragma once

#include <cmath>
#include <cstring>

#include "common/simd.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

constexpr int64_t kBlock = 4096;  // rows of one partial sum over the batch; fixed, so that threads do not change the result

// As many rows, or groups, at a time as a register holds in double.
constexpr int64_t kWide = kLanes / 2;
typedef double F64 __attribute__((vector_size(8 * kWide)));
typedef std::int64_t I64 __attribute__((vector_size(8 * kWide)));
typedef float Half __attribute__((vector_size(4 * kWide)));

// Said in intrinsics because compilers take vectors apart to convert them.
RA_INLINE F64 widen(Half v) { return RA_BY_ISA(_mm512_cvtps_pd(v), _mm256_cvtps_pd(v), __builtin_convertvector(v, F64)); }
RA_INLINE Half narrow(F64 v) { return RA_BY_ISA(_mm512_cvtpd_ps(v), _mm256_cvtpd_ps(v), __builtin_convertvector(v, Half)); }

RA_INLINE F64 load_wide(const float* r) {
    Half v;
    std::memcpy(&v, r, sizeof v);
    return widen(v);
}

// As many of r[0], r[1], ... as exist, `left`, and zeros.
RA_INLINE F64 load_wide(const float* r, int64_t left) {
    if (left >= kWide) return load_wide(r);
    float buffer[kWide] = {};
    for (int64_t k = 0; k < left; ++k) buffer[k] = r[k];
    return load_wide(buffer);
}

RA_INLINE F64 gather(const double* p, const int64_t* at) {
    F64 v{};
    for (int64_t k = 0; k < kWide; ++k) v[k] = p[at[k]];
    return v;
}

RA_INLINE F64 sqrt_each(F64 v) {
    double x[kWide];
    std::memcpy(x, &v, sizeof x);
    for (double& y : x) y = std::sqrt(y);
    std::memcpy(&v, x, sizeof x);
    return v;
}

RA_INLINE double sum_of(F64 v) {
#if defined(__AVX512F__)
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
#elif defined(__AVX2__)
    const __m256d four = v;
#endif
#if defined(__AVX2__)
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return two[0] + two[1];
#else
    return v[0] + v[1];
#endif
}

// Whether ids[0] to ids[kWide - 1] are all `id`.
RA_INLINE bool all_are(const int64_t* ids, int64_t id) {
#if defined(__AVX512F__)
    return _mm512_cmpneq_epi64_mask(_mm512_loadu_si512(ids), _mm512_set1_epi64(id)) == 0;
#elif defined(__AVX2__)
    const __m256i other = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids)), _mm256_set1_epi64x(id));
    return _mm256_testz_si256(other, other);
#else
    return ids[0] == id && ids[1] == id;
#endif
}

// Sums of r - shift, where shift is one of the summed rewards: equal rewards then give sum = square = 0 exactly, and the centred
// second moment square - sum^2 / count loses at most a factor `count` to cancellation.
struct Moments {
    double shift, sum, square, count;
};

// Of `count` rewards at r, of which `left` >= count may be read. Without squares there is no need of a shift: n equal fp32 add up
// exactly in double for n < 2^29.
template <bool kSquares>
RA_INLINE Moments moments_of(const float* r, int64_t count, int64_t left) {
    const double shift = kSquares ? r[0] : 0;
    F64 sum{}, square{};
    int64_t i = 0;
    for (; i + kWide <= count; i += kWide) {
        const F64 d = load_wide(r + i) - shift;
        sum += d;
        if (kSquares) square += d * d;
    }
    if (i < count) {
        I64 lane{};
        for (int64_t k = 0; k < kWide; ++k) lane[k] = k;
        const F64 d = lane < count - i ? load_wide(r + i, left - i) - shift : F64{};
        sum += d;
        if (kSquares) square += d * d;
    }
    return {shift, sum_of(sum), kSquares ? sum_of(square) : 0, static_cast<double>(count)};
}

// The moments of as many groups.
class WideMoments {
  public:
    void set(int64_t k, const Moments& m) { shift_[k] = m.shift, sum_[k] = m.sum, square_[k] = m.square, count_[k] = m.count; }
    F64 count() const { return all(count_); }
    F64 mean() const { return all(shift_) + all(sum_) / count(); }
    F64 m2() const {
        const F64 m2 = all(square_) - all(sum_) * all(sum_) / count();
        return m2 < 0 ? F64{} : m2;
    }
    I64 spread() const { return all(square_) != 0; }

  private:
    static F64 all(const double* values) {
        F64 v;
        std::memcpy(&v, values, sizeof v);
        return v;
    }

    double shift_[kWide] = {}, sum_[kWide] = {}, square_[kWide] = {}, count_[kWide] = {};
};

}  // namespace
}  // namespace reinforce_ada::RA_ISA
