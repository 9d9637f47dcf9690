// Conditions a lane, and what is done under them.
#pragma once

#include "common/simd.h"

namespace reinforce_ada::RA_ISA {

// AVX-512 has registers for them, elsewhere one is a vector of 0 and -1.
#if defined(__AVX512F__)
typedef __mmask16 Mask;
RA_INLINE Mask less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }  // false for NaN, as the next
RA_INLINE Mask differs(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_OQ); }
RA_INLINE Mask is_nan(F32 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
RA_INLINE F32 select(Mask condition, F32 yes, F32 no) { return _mm512_mask_blend_ps(condition, no, yes); }
RA_INLINE I32 decrease(I32 x, Mask condition) {
    return (I32)_mm512_mask_sub_epi32((__m512i)x, condition, (__m512i)x, _mm512_set1_epi32(1));
}
RA_INLINE F32 min_where(Mask condition, F32 x, F32 least) { return _mm512_mask_min_ps(least, condition, x, least); }
RA_INLINE F32 max_where(Mask condition, F32 x, F32 most) { return _mm512_mask_max_ps(most, condition, x, most); }
#else
typedef I32 Mask;
RA_INLINE Mask less(F32 a, F32 b) { return a < b; }
RA_INLINE Mask differs(F32 a, F32 b) { return (a < b) | (b < a); }
RA_INLINE Mask is_nan(F32 x) { return x != x; }
RA_INLINE F32 select(Mask condition, F32 yes, F32 no) { return (F32)(((I32)yes & condition) | ((I32)no & ~condition)); }
RA_INLINE I32 decrease(I32 x, Mask condition) { return x + condition; }
RA_INLINE F32 min_where(Mask condition, F32 x, F32 least) { return min(select(condition, x, least), least); }
RA_INLINE F32 max_where(Mask condition, F32 x, F32 most) { return max(select(condition, x, most), most); }
#endif

RA_INLINE F32 select(Mask condition, float yes, F32 no) { return select(condition, broadcast(yes), no); }
RA_INLINE F32 clamp(F32 x, F32 low, F32 high) { return min(high, max(low, x)); }  // NaN stays NaN

// A lane for each of kLanes bytes: whether it is not 0.
RA_INLINE Mask read_mask(const std::uint8_t* p) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_test_epi8_mask(bytes, bytes);
#else
    typedef std::uint8_t U8 __attribute__((vector_size(kLanes)));
    U8 bytes;
    std::memcpy(&bytes, p, kLanes);
    return __builtin_convertvector(bytes, I32) != 0;
#endif
}

}  // namespace reinforce_ada::RA_ISA
