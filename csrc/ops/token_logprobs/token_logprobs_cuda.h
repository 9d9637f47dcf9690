// token_logprobs on a GPU: what token_logprobs.h says, rows in parallel. Nothing waits for the device, nothing is allocated.
//
// A row whose token id is neither in the vocabulary nor kIgnored has a NaN logprob, and a NaN gradient where its grad_logprobs is not 0.
// A row whose temperature is not positive and finite is NaN throughout.
//
// Entry points, for T = float32, bfloat16, float16; all of C linkage:
//
//   token_logprobs_forward_T, token_logprobs_forward_T_moments (the one that also knows entropy and sum_p2)
//     const T* logits, i32 vocab, i64 row_stride, const i64* token_ids, const f32* temperatures, f64 temperature,
//     f32 logit_scale, f32 soft_cap, f32* logprobs, f32* row_max, f32* log2_sum, f32* entropy, f32* sum_p2
//     grid (num_tokens, 1), blocks of 512. entropy and sum_p2 may be null, and are not looked at without _moments.
//
//   token_logprobs_gradient_T, token_logprobs_gradient_T_entropy (the one that also knows grad_entropy)
//     T* grad, i64 grad_row_stride, const T* logits, i32 vocab, i64 row_stride, const i64* token_ids, const f32* temperatures,
//     f64 temperature, f32 logit_scale, f32 soft_cap, const f32* row_max, const f32* log2_sum, const f32* entropy,
//     const f32* grad_logprobs, const f32* grad_entropy
//     grid (num_tokens, ceil(vocab / (2048 * elements in 16 bytes)), at least 1), blocks of 256. grad_logprobs and grad_entropy may be
//     null, and grad_entropy and entropy are not looked at without _entropy.
//
// Strides count elements, soft_cap is 0 for none, temperatures is null for the one temperature.
#pragma once

#include <cstdint>

namespace reinforce_ada::cuda {

// Writes logprobs, row_max (of z, before the temperature) and log2_sum (of 2^((z - row_max) log2 e / temperature)), entropy and sum_p2
// unless null, each [num_tokens]; 0 for ignored rows.
void token_logprobs_forward(int device, std::uintptr_t stream, const void* logits, int dtype, std::int64_t num_tokens, std::int64_t vocab,
                            std::int64_t row_stride, const std::int64_t* token_ids, const float* temperatures, double temperature,
                            double logit_scale, double soft_cap, float* logprobs, float* row_max, float* log2_sum, float* entropy,
                            float* sum_p2);

// Writes the gradient of the logits: grad [num_tokens, vocab] of `dtype`, which may be the logits themselves. row_max, log2_sum and (read
// where grad_entropy is given) entropy are the forward's. A row whose two gradients are 0 is not read.
void token_logprobs_gradient(int device, std::uintptr_t stream, void* grad, std::int64_t grad_row_stride, const void* logits, int dtype,
                             std::int64_t num_tokens, std::int64_t vocab, std::int64_t row_stride, const std::int64_t* token_ids,
                             const float* temperatures, double temperature, double logit_scale, double soft_cap, const float* row_max,
                             const float* log2_sum, const float* entropy, const float* grad_logprobs, const float* grad_entropy);

}  // namespace reinforce_ada::cuda
