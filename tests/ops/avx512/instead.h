// Included before a source of the avx512 build: it then finds AVX-512, which is emulated.h.
#pragma once

#include "emulated.h"

#define __AVX512F__ 1
#define RA_EMULATED_AVX512 1

#define _mm512_load_ps reinforce_ada::emulated::load_ps
#define _mm512_loadu_pd reinforce_ada::emulated::loadu_pd
#define _mm512_loadu_si512 reinforce_ada::emulated::loadu_si512
#define _mm512_storeu_pd reinforce_ada::emulated::storeu_pd
#define _mm512_stream_ps reinforce_ada::emulated::stream_ps
#define _mm512_maskz_loadu_ps reinforce_ada::emulated::maskz_loadu_ps
#define _mm512_set1_epi32 reinforce_ada::emulated::set1_epi32
#define _mm512_set1_epi64 reinforce_ada::emulated::set1_epi64
#define _mm512_castps512_ps256 reinforce_ada::emulated::castps512_ps256
#define _mm512_castpd512_pd256 reinforce_ada::emulated::castpd512_pd256
#define _mm512_extractf32x8_ps reinforce_ada::emulated::extractf32x8_ps
#define _mm512_extractf64x4_pd reinforce_ada::emulated::extractf64x4_pd
#define _mm512_fmadd_ps reinforce_ada::emulated::fmadd_ps
#define _mm512_max_ps reinforce_ada::emulated::max_ps
#define _mm512_min_ps reinforce_ada::emulated::min_ps
#define _mm512_reduce_add_pd reinforce_ada::emulated::reduce_add_pd
#define _mm512_permutex2var_ps reinforce_ada::emulated::permutex2var_ps
#define _mm512_scalef_ps reinforce_ada::emulated::scalef_ps
#define _mm512_cvtepu16_epi32 reinforce_ada::emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 reinforce_ada::emulated::cvtepi32_epi16
#define _mm512_cvtph_ps reinforce_ada::emulated::cvtph_ps
#define _mm512_cvtps_pd reinforce_ada::emulated::cvtps_pd
#define _mm512_cvtpd_ps reinforce_ada::emulated::cvtpd_ps
#define _mm512_cmpneq_epi64_mask reinforce_ada::emulated::cmpneq_epi64_mask
#define _mm512_mask_blend_ps reinforce_ada::emulated::mask_blend_ps
#define _mm512_mask_min_ps reinforce_ada::emulated::mask_min_ps
#define _mm512_mask_max_ps reinforce_ada::emulated::mask_max_ps
#define _mm512_mask_sub_epi32 reinforce_ada::emulated::mask_sub_epi32
#define _mm512_reduce_ps(x, mode) reinforce_ada::emulated::reduce_ps<mode>(x)
#define _mm512_add_round_ps(x, y, mode) reinforce_ada::emulated::add_round_ps<mode>(x, y)
#define _mm512_cvtps_ph(x, mode) reinforce_ada::emulated::cvtps_ph<mode>(x)
#define _mm512_cmp_ps_mask(x, y, comparison) reinforce_ada::emulated::cmp_ps_mask<comparison>(x, y)
#define _mm_test_epi8_mask reinforce_ada::emulated::test_epi8_mask
