// Log-probability of one token a row, straight from the logits: one sweep, no softmax in memory.
//
//   logprob = z[y] - log sum_j exp(z[j]),  z = logits / temperature,  p = softmax(z)
//   entropy = -sum_j p[j] log p[j],  sum_p2 = sum_j p[j]^2
//   d logits[j] = (g ([j == y] - p[j]) - h p[j] (log p[j] + entropy)) / temperature,  g, h: gradients of logprob and entropy
//
// Work is done in log2 units: u = logits * (log2 e / temperature), rounded to fp32 once, and log2_normalizer = log2 sum_j 2^u[j] is
// kept in double, because fp32 would cost 1.5e-5 where logits reach 200.
//
// logits: [num_tokens, vocab] of `dtype` (common/dtype.h), rows `row_stride` elements apart, which may be odd.
// token_ids: [num_tokens], each in [0, vocab) or kIgnored: such a row is not read, its results and its gradient are 0.
// temperatures: [num_tokens], or null for the one `temperature`.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace reinforce_ada {

constexpr std::int64_t kIgnored = -100;

// The first row whose id is neither in [0, vocab) nor kIgnored; -1 when there is none.
RA_DECLARE_KERNEL(std::int64_t first_invalid_token(const std::int64_t* token_ids, std::int64_t num_tokens, std::int64_t vocab))

// Writes logprobs [num_tokens] and log2_normalizer [num_tokens]; entropy and sum_p2 [num_tokens] unless null.
RA_DECLARE_KERNEL(void token_logprobs_forward(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t vocab,
                                              std::int64_t row_stride, const std::int64_t* token_ids, const float* temperatures,
                                              double temperature, float* logprobs, double* log2_normalizer, float* entropy, float* sum_p2,
                                              int num_threads))

// Writes grad [num_tokens, vocab] of `dtype`, rows `grad_row_stride` apart; it may be the logits themselves. `grad_logprobs` and
// `grad_entropy` [num_tokens] may be null (zero); `entropy` is read when grad_entropy is given. A row whose two gradients are zero
// is not read: prompts and padding, masked out of the loss, cost one write.
RA_DECLARE_KERNEL(void token_logprobs_backward(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t vocab,
                                               std::int64_t row_stride, const std::int64_t* token_ids, const float* temperatures,
                                               double temperature, const double* log2_normalizer, const float* entropy,
                                               const float* grad_logprobs, const float* grad_entropy, void* grad,
                                               std::int64_t grad_row_stride, int num_threads))

}  // namespace reinforce_ada
