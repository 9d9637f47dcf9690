// Logits of hidden states, z = hidden weight^T in fp32, for float32 and half-precision inputs on CPUs: every row of the weight is used
// where it lies, without the transposed copy of it that a general matrix product makes for each chunk of tokens. With 96 tokens
// that copy costs a third of the product.
//
// The hidden states are packed once: in panels of kPanel tokens, [width][tokens of the panel], so that a vector holds tokens. A
// register tile is then kTileRows weights (broadcast) x kPanel tokens, and each weight is read from memory once a panel.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace reinforce_ada {

// hidden: [num_tokens, width] of `dtype` (common/dtype.h), rows `row_stride` elements apart.
// packed: width * (num_tokens rounded up to a multiple of 16) floats.
RA_DECLARE_KERNEL(void pack_hidden(const void* hidden, int dtype, std::int64_t num_tokens, std::int64_t width, std::int64_t row_stride,
                                   float* packed, int num_threads))

// weight: [num_rows, width] of `dtype`, rows `weight_stride` elements apart.
// logits: [num_tokens, num_rows], rows `logits_stride` apart.
RA_DECLARE_KERNEL(void linear_logits(const float* packed, const void* weight, int dtype, std::int64_t num_tokens, std::int64_t num_rows,
                                     std::int64_t width, std::int64_t weight_stride, float* logits, std::int64_t logits_stride,
                                     int num_threads))

}  // namespace reinforce_ada
