// Log-probability of one token a row, straight from the logits: one sweep, no softmax in memory, whole or piece by piece.
//
//   z = logit_scale x, with a soft cap then soft_cap tanh(z / soft_cap), then / temperature;  p = softmax(z)
//   logprob = z[y] - log sum_j exp(z[j])
//   entropy = -sum_j p[j] log p[j],  sum_p2 = sum_j p[j]^2
//   d x[j] = (g ([j == y] - p[j]) - h p[j] (log p[j] + entropy)) dz[j]/dx[j],  g, h: gradients of logprob and entropy
//
// A piece is the ids [first_id, first_id + piece_size) of every row, so the logits of a vocabulary that is never in memory at once
// can pass through one piece after the other, in any order. The whole-row kernels are the same code with one piece.
//
// Arguments shared by the kernels:
//   logits: [num_tokens, piece_size] of `dtype` (common/dtype.h), rows `row_stride` elements apart, which may be odd.
//   token_ids: [num_tokens], ids of the whole vocabulary, or kIgnored: such a row is not read, its results and its gradient are 0.
//   temperatures: [num_tokens], or null for the one `temperature`. soft_cap: 0 for none.
// Rows are divided among the threads; results do not depend on how many there are.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace reinforce_ada {

constexpr std::int64_t kIgnored = -100;

// The first row whose id is neither in [0, vocab) nor kIgnored; -1 when there is none.
RA_DECLARE_KERNEL(std::int64_t first_invalid_token(const std::int64_t* token_ids, std::int64_t num_tokens, std::int64_t vocab))

// Writes logprobs [num_tokens] and normalizers [num_tokens, 2], an anchor and the log2 of the normalizer relative to it; entropy and
// sum_p2 [num_tokens] unless null.
RA_DECLARE_KERNEL(void token_logprobs_forward(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t vocab,
                                              std::int64_t row_stride, const std::int64_t* token_ids, const float* temperatures,
                                              double temperature, double logit_scale, double soft_cap, float* logprobs, double* normalizers,
                                              float* entropy, float* sum_p2, int num_threads))

// Adds a piece of each row to its six doubles in `state` [num_tokens, 6], which are all 0 before the first piece: what RowState in
// common/logits_sweep.h says. Entropy and sum_p2 are summed only with_entropy and with_sum_p2, which is the same for all pieces.
RA_DECLARE_KERNEL(void token_logprobs_add_piece(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t piece_size,
                                                std::int64_t row_stride, std::int64_t first_id, const std::int64_t* token_ids,
                                                const float* temperatures, double temperature, double logit_scale, double soft_cap,
                                                double* state, bool with_entropy, bool with_sum_p2, int num_threads))

// The results of rows whose pieces have all been added: as token_logprobs_forward. It reads the state and leaves it. A state that is still
// all 0 (an ignored row) gives 0; a token that no piece contained gives a NaN logprob.
RA_DECLARE_KERNEL(void token_logprobs_finish(const double* state, std::int64_t num_tokens, float* logprobs, double* normalizers,
                                             float* entropy, float* sum_p2))

// Writes the gradient of the logits as given, before scale and cap: grad [num_tokens, piece_size] of `dtype`, rows
// `grad_row_stride` apart; it may be the logits themselves. `grad_logprobs` and `grad_entropy` [num_tokens] may be null (zero);
// `entropy` is read when grad_entropy is given. A row whose two gradients are zero is not read: prompts and padding, masked out of the
// loss, cost one write. Unless null, grad_bias [piece_size], that of a bias already in the logits, is increased
// by the sum of the rows, as rounded to `dtype`, in their order.
RA_DECLARE_KERNEL(void token_logprobs_gradient_piece(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t piece_size,
                                                     std::int64_t row_stride, std::int64_t first_id, const std::int64_t* token_ids,
                                                     const float* temperatures, double temperature, double logit_scale, double soft_cap,
                                                     const double* normalizers, const float* entropy, const float* grad_logprobs,
                                                     const float* grad_entropy, void* grad, std::int64_t grad_row_stride, double* grad_bias,
                                                     int num_threads))

}  // namespace reinforce_ada
