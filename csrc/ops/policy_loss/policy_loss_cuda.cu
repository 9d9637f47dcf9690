#include "common/launch.cuh"
#include "ops/policy_loss/policy_loss_cuda.cuh"
#include "ops/policy_loss/policy_loss_cuda.h"

namespace reinforce_ada::cuda {
namespace {

constexpr std::int64_t kTotalNumbers = 2;    // one, and one so that what follows is on 16 bytes
constexpr std::int64_t kLongSequence = 512;  // mean length from which a block of 256 threads takes a sequence, and not a warp

std::int64_t num_parts(std::int64_t num_tokens) { return ceil_div(num_tokens, kChunk); }

}  // namespace

std::int64_t policy_loss_workspace(std::int64_t num_tokens, std::int64_t num_sequences) {
    return kTotalNumbers + kSequenceNumbers * num_sequences + kParts * num_parts(num_tokens);
}

void policy_loss(int device, std::uintptr_t stream, const void* logprobs, int logprobs_dtype, const float* advantages,
                 bool advantages_per_token, const void* mask, bool float_mask, const void* old_logprobs, int old_dtype,
                 const void* rollout_logprobs, int rollout_dtype, const void* ref_logprobs, int ref_dtype, const void* entropy,
                 int entropy_dtype, const std::int64_t* cu_seqlens, std::int64_t num_tokens_total, std::int64_t num_sequences,
                 std::int64_t width, const PolicyLossNumbers& numbers, double* workspace, float* loss, double* metrics, void* grad,
                 void* grad_entropy) {
    const auto number = [&](Number which) { return number_of(numbers, which); };
    const Settings s = settings_of(numbers);
    const Weighing& w = s.weighing;
    const auto loss_agg = static_cast<std::int32_t>(number(Number::loss_agg)), correction = static_cast<std::int32_t>(w.correction);
    const bool with_ratio = old_logprobs && (s.spread || s.loss == Loss::gspo);
    const bool is_long = num_tokens_total > kLongSequence * num_sequences;
    double* const totals = workspace;
    double* const sequences = totals + kTotalNumbers;
    double* const parts = sequences + kSequenceNumbers * num_sequences;

    const Queue queue{device, stream};
    const auto shape = {Size{"num_tokens", num_tokens_total}, Size{"num_sequences", num_sequences}};
    launch(is_long ? policy_loss_sequences_256 : policy_loss_sequences_32, {num_sequences}, is_long ? 256 : 32, queue,
           is_long ? "policy_loss_sequences_256" : "policy_loss_sequences_32", shape, logprobs, logprobs_dtype, mask, float_mask,
           old_logprobs, old_dtype, rollout_logprobs, rollout_dtype, cu_seqlens, num_tokens_total, num_sequences, width, with_ratio,
           s.ratio_bound, correction, w.low, w.high, w.scale, w.allow_missing, sequences);
    launch(policy_loss_totals, {1}, kTotalsThreads, queue, "policy_loss_totals", shape, sequences, cu_seqlens, num_tokens_total,
           num_sequences, width, loss_agg, number(Number::num_tokens), number(Number::num_seqs), number(Number::norm_length), totals);
    const auto sweep_with = [&](auto kernel, const Grid& grid, unsigned threads, const char* name, auto... outputs) {
        launch(kernel, grid, threads, queue, name, shape, logprobs, logprobs_dtype, advantages, advantages_per_token, mask, float_mask,
               old_logprobs, old_dtype, rollout_logprobs, rollout_dtype, ref_logprobs, ref_dtype, entropy, entropy_dtype, cu_seqlens,
               num_tokens_total, num_sequences, width, static_cast<std::int32_t>(s.loss), s.spread, s.low, s.high, s.dual, s.ratio_bound,
               correction, w.low, w.high, w.scale, w.allow_missing, static_cast<std::int32_t>(s.kl), s.straight_through, s.kl_coef,
               s.kl_weighted, s.kl_bound, s.entropy_coef, s.by_sequence, totals, outputs...);
    };
    if (s.spread && is_long) sweep_with(policy_loss_through_256, {num_sequences}, 256, "policy_loss_through_256", sequences);
    if (s.spread && !is_long) sweep_with(policy_loss_through_32, {num_sequences}, 32, "policy_loss_through_32", sequences);
    sweep_with(policy_loss_tokens, {num_parts(num_tokens_total)}, kTokensThreads, "policy_loss_tokens", sequences, parts, grad,
               grad_entropy);
    launch(policy_loss_finish, {1}, kParts * kWarp, queue, "policy_loss_finish", shape, parts, num_parts(num_tokens_total),
           num_tokens_total, totals, loss, metrics);
}

}  // namespace reinforce_ada::cuda
