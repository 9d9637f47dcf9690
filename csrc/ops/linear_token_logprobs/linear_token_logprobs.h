// The three products of an output head in fp32, for float32 and float16, skinny as they are here: few tokens against many rows of the
// weight. Every row of the weight is used where it lies, without the transposed copy of it that a general matrix product makes in each
// call; with 96 tokens that copy costs a third of the product.
//
//   logits = hidden weight^T + bias       grad_hidden += dz weight       grad_weight (+)= dz^T hidden
//
// hidden: [num_tokens, width] of `dtype` (common/dtype.h), rows `hidden_stride` elements apart.
// weight: [num_rows, width] of `dtype`, rows `weight_stride` elements apart.
// logits, dz: [num_tokens, num_rows] fp32, rows `logits_stride` and `dz_stride` apart.
// Every element is summed in one order, whatever the number of threads.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace reinforce_ada {

// packed: the hidden states as linear_logits takes them, width * (num_tokens rounded up to a multiple of 16) floats.
RA_DECLARE_KERNEL(void pack_hidden(const void* hidden, int dtype, std::int64_t num_tokens, std::int64_t width, std::int64_t hidden_stride,
                                   float* packed, int num_threads))

// bias: [num_rows], or null.
RA_DECLARE_KERNEL(void linear_logits(const float* packed, const void* weight, int dtype, const float* bias, std::int64_t num_tokens,
                                     std::int64_t num_rows, std::int64_t width, std::int64_t weight_stride, float* logits,
                                     std::int64_t logits_stride, int num_threads))

// grad_hidden: [num_tokens, width] fp32, contiguous; it is added to.
RA_DECLARE_KERNEL(void linear_grad_hidden(const float* dz, std::int64_t dz_stride, const void* weight, int dtype, std::int64_t num_tokens,
                                          std::int64_t num_rows, std::int64_t width, std::int64_t weight_stride, float* grad_hidden,
                                          int num_threads))

// grad_weight: [num_rows, width] of `dtype`, contiguous; added to, or written where it is the `first`; rounded once a call.
RA_DECLARE_KERNEL(void linear_grad_weight(const float* dz, std::int64_t dz_stride, const void* hidden, int dtype, std::int64_t num_tokens,
                                          std::int64_t num_rows, std::int64_t width, std::int64_t hidden_stride, void* grad_weight,
                                          bool first, int num_threads))

}  // namespace reinforce_ada
