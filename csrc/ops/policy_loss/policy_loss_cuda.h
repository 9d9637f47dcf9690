// policy_loss on a GPU: value, gradient and every metric of policy_loss.h, in stages that follow each other on the stream. Nothing waits
// for the device, nothing is allocated, sums are in double and in an order that depends on the shapes only. Where cu_seqlens does not go
// from 0 to the number of tokens without falling, all results are NaN, and nothing outside the tensors is read.
//
// Entry points, of C linkage. Types of tensors are numbers of common/dtype.h; a tensor that is not there is null.
//
//   policy_loss_sequences_32, policy_loss_sequences_256          what is counted and summed of each sequence
//     const void* logprobs, i32 logprobs_dtype, const void* mask, i32 float_mask, const void* old_logprobs, i32 old_dtype,
//     const void* rollout_logprobs, i32 rollout_dtype, const i64* cu_seqlens, i64 num_tokens, i64 num_sequences, i64 width,
//     i32 with_ratio, f32 ratio_bound, i32 correction, f32 weight_low, f32 weight_high, f32 weight_scale, i32 allow_missing,
//     f64* sequences
//     grid (num_sequences), blocks of 32 or 256; sequences [num_sequences, 4]: counted tokens (NaN where cu_seqlens is wrong), mean of
//     logprobs - old_logprobs (with_ratio, else 0), rollout weight (of a sequence correction, else 0), and room for the next but one
//   policy_loss_totals                                           what a token counts for
//     const f64* sequences, const i64* cu_seqlens, i64 num_tokens, i64 num_sequences, i64 width, i32 loss_agg, f64 tokens, f64 seqs,
//     f64 length, f64* totals
//     grid (1), blocks of 1024; tokens, seqs, length: the denominators, 0 where they are counted here; totals [1]: the share of a token
//     in the loss, with seq-mean-token-mean to be divided by the tokens of its sequence; NaN where cu_seqlens is wrong
//   policy_loss_through_32, policy_loss_through_256              only where ratios are of sequences with their gradient spread
//     the parameters of policy_loss_tokens up to totals, then f64* sequences
//     grid (num_sequences), blocks of 32 or 256; writes column 3: the derivative of the loss in the mean log-ratio of the sequence
//   policy_loss_tokens                                           gradients, and sums of each kChunk tokens
//     const void* logprobs, i32 logprobs_dtype, const f32* advantages, i32 advantages_per_token, const void* mask, i32 float_mask,
//     const void* old_logprobs, i32 old_dtype, const void* rollout_logprobs, i32 rollout_dtype, const void* ref_logprobs, i32 ref_dtype,
//     const void* entropy, i32 entropy_dtype, const i64* cu_seqlens, i64 num_tokens, i64 num_sequences, i64 width,
//     i32 loss, i32 spread, f32 ratio_low, f32 ratio_high, f32 dual, f32 ratio_bound, i32 correction, f32 weight_low, f32 weight_high,
//     f32 weight_scale, i32 allow_missing, i32 kl, i32 straight_through, f32 kl_coef, i32 kl_weighted, f32 kl_bound, f32 entropy_coef,
//     i32 by_sequence, const f64* totals, const f64* sequences, f64* parts, void* grad, void* grad_entropy
//     grid (ceil(num_tokens / 2048)), blocks of 128; ratio_low, ratio_high: bounds of the clip; by_sequence: seq-mean-token-mean;
//     parts [17, grid], in the order of Part
//   policy_loss_finish                                           the value and the metrics
//     const f64* parts, i64 num_parts, i64 num_tokens, const f64* totals, f32* value, f64* metrics
//     grid (1), blocks of 544
#pragma once

#include <cstdint>

#include "ops/policy_loss/policy_loss.h"

namespace reinforce_ada::cuda {

// Doubles that policy_loss works in.
std::int64_t policy_loss_workspace(std::int64_t num_tokens, std::int64_t num_sequences);

// Arguments as in policy_loss.h, workspace [policy_loss_workspace(num_tokens_total, num_sequences)]. Without tokens loss and metrics are 0.
void policy_loss(int device, std::uintptr_t stream, const void* logprobs, int logprobs_dtype, const float* advantages,
                 bool advantages_per_token, const void* mask, bool float_mask, const void* old_logprobs, int old_dtype,
                 const void* rollout_logprobs, int rollout_dtype, const void* ref_logprobs, int ref_dtype, const void* entropy,
                 int entropy_dtype, const std::int64_t* cu_seqlens, std::int64_t num_tokens_total, std::int64_t num_sequences,
                 std::int64_t width, const PolicyLossNumbers& numbers, double* workspace, float* loss, double* metrics, void* grad,
                 void* grad_entropy);

}  // namespace reinforce_ada::cuda
