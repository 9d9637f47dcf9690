// The policy losses: value, gradient and every metric in one sweep over the tokens (gspo and what else looks at whole sequences
// first sums each sequence, then sweeps it).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "common/isa.h"

namespace reinforce_ada {

// Codes and bounds shared with ops/policy_loss/settings.py; tests/ops/test_contract.py compares them.
enum class Loss : int { reinforce, ppo, cispo, gspo, sapo };
enum class LossAgg : int { token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm };
enum class Kl : int { k1, k2, k3, abs };
enum class Correction : int { none, token_truncate, token_mask, sequence_truncate, sequence_mask };

constexpr float kSequenceLogRatioBound = 10.0f;
constexpr float kKlLogRatioBound = 20.0f;
constexpr float kSapoTauPositive = 1.0f, kSapoTauOther = 1.05f;

// The numbers of a call, as the fields of Settings in ops/policy_loss/contract.py make them, in their order.
enum class Number : std::size_t {
    loss,              // a Loss
    sequence_ratio,    // 1: ratios are of sequences, with their gradient spread over the tokens
    clip_low,          // widths
    clip_high,         //
    dual_clip,         // infinity: none
    log_ratio_bound,   // infinity: none
    loss_agg,          // a LossAgg
    num_tokens,        // denominators; 0: counted here
    num_seqs,          //
    norm_length,       //
    correction,        // a Correction
    correction_low,    //
    correction_high,   //
    correction_scale,  // factor of every weight
    allow_missing,     // 1: a NaN among the rollout logprobs stands for the old one
    kl,                // a Kl; read where ref is given
    straight_through,  // 1: with the gradient of k2
    kl_coef,           //
    kl_weighted,       // 1: the KL is multiplied by the ratio
    kl_bound,          // of k3; infinity: none
    entropy_coef,      //
    count
};
using PolicyLossNumbers = std::array<double, static_cast<std::size_t>(Number::count)>;

// Sequence i has tokens cu_seqlens[i] up to cu_seqlens[i + 1], or [i * width, (i + 1) * width) where cu_seqlens is nullptr.
//   *_dtype           of the tensor before it, a DType
//   advantages        one a token, or one a sequence
//   mask              bytes or floats; 0 leaves a token out, whose values then never matter
//   old, rollout, ref, entropy   nullptr where not given; old == nullptr is the on-policy case
//   loss              the scalar
//   metrics           [17], in the order of METRICS
//   grad              [tokens], of the loss with respect to logprobs, in their dtype
//   grad_entropy      the same for entropy; nullptr: not wanted
// Returns -1, or the first index at which cu_seqlens is wrong (the outputs are then not to be used).
RA_DECLARE_KERNEL(std::int64_t policy_loss(
    const void* logprobs, int logprobs_dtype, const float* advantages, bool advantages_per_token, const void* mask, bool float_mask,
    const void* old_logprobs, int old_dtype, const void* rollout_logprobs, int rollout_dtype, const void* ref_logprobs, int ref_dtype,
    const void* entropy, int entropy_dtype, const std::int64_t* cu_seqlens, std::int64_t num_tokens_total, std::int64_t num_sequences,
    std::int64_t width, const PolicyLossNumbers& numbers, float* loss, double* metrics, void* grad, void* grad_entropy, int num_threads))

}  // namespace reinforce_ada
