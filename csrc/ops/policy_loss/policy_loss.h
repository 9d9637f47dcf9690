// The policy losses: value, gradient and every metric in one sweep over the tokens (gspo and what else looks at whole sequences
// first sums each sequence, then sweeps it).
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace reinforce_ada {

// Codes and bounds shared with ops/policy_loss/settings.py.
enum class Loss : int { reinforce, ppo, cispo, gspo, sapo };
enum class LossAgg : int { token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm };
enum class Kl : int { k1, k2, k3, abs };
enum class Correction : int { none, token_truncate, token_mask, sequence_truncate, sequence_mask };

constexpr float kLogRatioBound = 20.0f;
constexpr float kSequenceLogRatioBound = 10.0f;
constexpr float kKlBound = 10.0f;
constexpr float kSapoTauPositive = 1.0f, kSapoTauOther = 1.05f;

// Sequence i has tokens cu_seqlens[i] up to cu_seqlens[i + 1], or [i * width, (i + 1) * width) where cu_seqlens is nullptr.
//   advantages        one a token, or one a sequence
//   mask              bytes or floats; 0 leaves a token out, whose values are then never looked at
//   old, rollout, ref nullptr where not given; old == nullptr is the on-policy case
//   dual_clip         infinity: none
//   num_tokens, num_seqs, norm_length   denominators; 0: counted here
//   kl, straight_through   the estimator, and whether its gradient is that of k2; read where ref is given
//   loss              the scalar
//   metrics           [16], in the order of METRICS
//   grad              [tokens], of the loss with respect to logprobs
// Returns -1, or the first index at which cu_seqlens is wrong (the outputs are then not to be used).
RA_DECLARE_KERNEL(std::int64_t policy_loss(const float* logprobs, const float* advantages, bool advantages_per_token, const void* mask,
                                           bool float_mask, const float* old_logprobs, const float* rollout_logprobs,
                                           const float* ref_logprobs, const std::int64_t* cu_seqlens, std::int64_t num_tokens_total,
                                           std::int64_t num_sequences, std::int64_t width, int loss_kind, double clip_low, double clip_high,
                                           double dual_clip, int loss_agg, double num_tokens, double num_seqs, double norm_length,
                                           int correction, double correction_low, double correction_high, int kl, bool straight_through,
                                           double kl_coef, float* loss, double* metrics, float* grad, int num_threads))

}  // namespace reinforce_ada
