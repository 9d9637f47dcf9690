// The kernels of policy_loss_cuda.h.
#pragma once

#include "ops/policy_loss/policy_loss_cuda_sums.cuh"

namespace reinforce_ada::cuda {

constexpr int kTokensThreads = 128;
constexpr int kChunk = kTokensThreads * kQuad * 4;  // tokens of a block, 16 a thread: the sums of a thread are then exact enough in fp32
constexpr int kTotalsThreads = 1024;

// -------------------- sequences

struct SequenceSums {
    double tokens, d, gap;
};

template <int kThreads>
RA_DEVICE void sum_sequence(const Stream& logprobs, const Kept& mask, const Stream& old_logprobs, const Stream& rollout_logprobs,
                            const Layout& layout, bool with_ratio, float ratio_bound, const Weighing& weighing, double* sequences) {
    const std::int64_t i = blockIdx.x, begin = layout.begin(i), end = layout.end(i);
    const bool wrong = layout.is_wrong(i), with_weight = weighing.of_sequences();
    SequenceSums own{0, 0, 0};
    if (!wrong) {
        // Whole quads of the tensor, so that they are aligned; what they have of the neighbours is left out.
        for (std::int64_t at = begin / kQuad * kQuad + kQuad * threadIdx.x; at < end; at += kQuad * kThreads) {
            const int count = layout.count(at);
            const unsigned kept = mask.bits(at, count);
            float logp[kQuad] = {}, old[kQuad] = {}, rollout[kQuad] = {};
            if (with_ratio || with_weight) read_quad(logprobs, at, count, logp);
            if (with_ratio || with_weight) read_quad(old_logprobs, at, count, old);
            if (with_weight) read_quad(rollout_logprobs, at, count, rollout);
#pragma unroll
            for (int k = 0; k < kQuad; ++k) {
                const bool counts = at + k >= begin && at + k < end && (kept >> k & 1);
                own.tokens += counts;
                own.d += counts ? logp[k] - old[k] : 0.0f;
                own.gap += counts ? rollout_gap(old_logprobs ? old[k] : logp[k], rollout[k], weighing) : 0.0f;
            }
        }
    }
    own = reduce_block<kThreads / kWarp>(
        own, [](const SequenceSums& a, const SequenceSums& b) { return SequenceSums{a.tokens + b.tokens, a.d + b.d, a.gap + b.gap}; });
    if (threadIdx.x != 0) return;
    double* const sequence = sequences + kSequenceNumbers * i;
    const float gap = clamp(static_cast<float>(own.gap), -ratio_bound, ratio_bound);
    sequence[0] = wrong ? static_cast<double>(quiet_nan()) : own.tokens;
    sequence[1] = with_ratio ? own.d / (own.tokens > 1 ? own.tokens : 1.0) : 0.0;
    sequence[2] = with_weight ? static_cast<double>(weigh(exponential(gap).value, weighing)) : 0.0;
}

struct Totals {
    double tokens, seqs, longest;
};

extern "C" __global__ void __launch_bounds__(kTotalsThreads)
    policy_loss_totals(const double* sequences, const std::int64_t* cu_seqlens, std::int64_t num_tokens, std::int64_t num_sequences,
                       std::int64_t width, std::int32_t loss_agg, double tokens, double seqs, double length, double* totals) {
    const Layout layout{cu_seqlens, num_tokens, num_sequences, width};
    Totals own{0, 0, 1};
    for (std::int64_t i = threadIdx.x; i < num_sequences; i += kTotalsThreads) {
        const double count = sequences[kSequenceNumbers * i], size = static_cast<double>(layout.end(i) - layout.begin(i));
        own.tokens += count;
        own.seqs += count > 0;
        if (size > own.longest) own.longest = size;
    }
    own = reduce_block<kTotalsThreads / kWarp>(own, [](const Totals& a, const Totals& b) {
        return Totals{a.tokens + b.tokens, a.seqs + b.seqs, a.longest > b.longest ? a.longest : b.longest};
    });
    if (threadIdx.x != 0) return;
    const bool nothing_fits = cu_seqlens && num_sequences == 0 && (num_tokens != 0 || cu_seqlens[0] != 0);
    if (tokens == 0) tokens = own.tokens > 1 ? own.tokens : 1;
    if (seqs == 0) seqs = own.seqs > 1 ? own.seqs : 1;
    if (length == 0) length = own.longest;
    const LossAgg agg = static_cast<LossAgg>(loss_agg);
    const double denominator = agg == LossAgg::token_mean ? tokens : agg == LossAgg::seq_mean_token_sum_norm ? seqs * length : seqs;
    totals[0] = nothing_fits || own.tokens != own.tokens ? static_cast<double>(quiet_nan()) : 1 / denominator;
}

// -------------------- tokens

// The derivative of the loss in each sequence's mean log-ratio, which policy_loss_tokens then spreads over its tokens.
template <int kThreads>
RA_DEVICE void sum_through(const Inputs& in, const Settings& s, double* sequences) {
    const double share = in.totals[0];
    if (share != share) return;  // the same for the whole grid
    const std::int64_t i = blockIdx.x, begin = in.layout.begin(i), end = in.layout.end(i);
    const Sequence sequence = in.sequence(i, s, false);
    double sum = 0;
    for (std::int64_t at = begin / kQuad * kQuad + kQuad * threadIdx.x; at < end; at += kQuad * kThreads) {
        const Quad quad(in, at, in.layout.count(at));
#pragma unroll
        for (int k = 0; k < kQuad; ++k)
            if (at + k >= begin && at + k < end && (quad.kept >> k & 1)) sum += token_of(quad, k, in, sequence, s).through;
    }
    sum = reduce_block<kThreads / kWarp>(sum, [](double a, double b) { return a + b; });
    if (threadIdx.x == 0) sequences[kSequenceNumbers * i + 3] = sum * share * sequence.share;
}

// The gradients of one quad, and what it adds to the sums. [low, high] are the sequences its tokens may be of.
RA_DEVICE void sweep_quad(const Inputs& in, const Settings& s, float common, std::int64_t at, std::int64_t low, std::int64_t high,
                          ThreadParts& parts, void* grad, void* grad_entropy) {
    const int count = in.layout.count(at);
    float grads[kQuad], entropy_grads[kQuad];
    if (common != common) {  // cu_seqlens is wrong
#pragma unroll
        for (int k = 0; k < kQuad; ++k) grads[k] = entropy_grads[k] = common;
    } else {
        const Quad quad(in, at, count);
        std::int64_t i = in.layout.find(at, low, high), end = in.layout.end(i);
        Sequence sequence = in.sequence(i, s, s.spread);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
            grads[k] = entropy_grads[k] = 0;
            if (!(quad.kept >> k & 1)) continue;
            if (at + k >= end) {
                i = in.layout.find(at + k, i + 1, high), end = in.layout.end(i);
                sequence = in.sequence(i, s, s.spread);
            }
            const Token token = token_of(quad, k, in, sequence, s);
            const float share = common * sequence.share;
            grads[k] = token.direct * share + sequence.extra;
            entropy_grads[k] = -s.entropy_coef * share;
            parts.add(token, sequence.share, quad.entropy[k], s.weighing.correction != Correction::none);
        }
    }
    write_quad(grad, in.logprobs.dtype, at, count, grads);
    if (grad_entropy) write_quad(grad_entropy, in.entropy.dtype, at, count, entropy_grads);
}

RA_DEVICE void sweep(const Inputs& in, const Settings& s, double* parts, void* grad, void* grad_entropy) {
    const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kChunk;
    const std::int64_t end = begin + kChunk < in.layout.num_tokens ? begin + kChunk : in.layout.num_tokens;
    const float common = static_cast<float>(in.totals[0]);
    // Each thread then looks between the sequences of the block's first and last token, of which there are few where they are long.
    RA_SHARED(std::int64_t, bounds, 2);
    const int me = static_cast<int>(threadIdx.x);
    if (me % kWarp == 0 && me / kWarp < 2 && common == common)
        bounds[me / kWarp] = in.layout.find(me == 0 ? begin : end - 1, 0, in.layout.num_sequences - 1);
    __syncthreads();
    const std::int64_t low = common == common ? bounds[0] : 0, high = common == common ? bounds[1] : 0;

    ThreadParts own{};
    own.ratio_min = HUGE_VALF, own.ratio_max = own.weight_max = -HUGE_VALF;
#pragma unroll 1
    for (std::int64_t at = begin + kQuad * me; at < end; at += kQuad * kTokensThreads)
        sweep_quad(in, s, common, at, low, high, own, grad, grad_entropy);

    const Parts all = reduce_block<kTokensThreads / kWarp>(own.wide(), [](const Parts& a, const Parts& b) { return a + b; });
    if (me != 0) return;
    double* const part = parts + blockIdx.x;
#pragma unroll
    for (int k = 0; k < kSums; ++k) part[static_cast<std::int64_t>(k) * gridDim.x] = all.sums[k];
    part[static_cast<std::int64_t>(kRatioMin) * gridDim.x] = all.ratio_min;
    part[static_cast<std::int64_t>(kRatioMax) * gridDim.x] = all.ratio_max;
    part[static_cast<std::int64_t>(kWeightMax) * gridDim.x] = all.weight_max;
}

// -------------------- the end

// A warp for each number.
extern "C" __global__ void __launch_bounds__(kParts* kWarp)
    policy_loss_finish(const double* parts, std::int64_t num_parts, std::int64_t num_tokens, const double* totals, float* value,
                       double* metrics) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, part = static_cast<int>(threadIdx.x) / kWarp;
    double own = part < kSums ? 0 : part == kRatioMin ? HUGE_VAL : -HUGE_VAL;
#pragma unroll 4
    for (std::int64_t i = lane; i < num_parts; i += kWarp) own = merged_parts(part, own, parts[part * num_parts + i]);
    own = reduce_lanes<kWarp>(own, [=](double a, double b) { return merged_parts(part, a, b); });
    RA_SHARED(double, all, kParts);
    if (lane == 0) all[part] = own;
    __syncthreads();
    if (threadIdx.x != 0) return;

    const double share = totals[0], tokens = all[kTokens], n = tokens > 1 ? tokens : 1.0, square = all[kWeightSquare];
    const double weight_max = all[kWeightMax];
    const bool any = tokens > 0;
    const double values[] = {tokens,
                             static_cast<double>(num_tokens) - tokens,
                             -all[kD] / n,
                             all[kK3] / n,
                             all[kRatio] / n,
                             any ? all[kRatioMin] : 0.0,
                             any ? all[kRatioMax] : 0.0,
                             all[kLow] / n,
                             all[kHigh] / n,
                             all[kDual] / n,
                             -all[kGap] / n,
                             all[kGapK3] / n,
                             all[kWeight] / n,
                             weight_max == -HUGE_VAL ? 0.0 : weight_max,
                             square > 0 ? all[kWeight] * all[kWeight] / (n * square) : square,
                             all[kKl] / n,
                             all[kEntropy] / n};
    *value = static_cast<float>(all[kLoss] * share);
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof values / sizeof *values); ++k) metrics[k] = share == share ? values[k] : share;
}

// -------------------- entry points

#define RA_SEQUENCES(kThreads)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads) policy_loss_sequences_##kThreads(                                               \
        const void* logprobs, std::int32_t logprobs_dtype, const void* mask, std::int32_t float_mask, const void* old_logprobs,            \
        std::int32_t old_dtype, const void* rollout_logprobs, std::int32_t rollout_dtype, const std::int64_t* cu_seqlens,                  \
        std::int64_t num_tokens, std::int64_t num_sequences, std::int64_t width, std::int32_t with_ratio, float ratio_bound,               \
        std::int32_t correction, float weight_low, float weight_high, float weight_scale, std::int32_t allow_missing, double* sequences) { \
        const Weighing weighing{static_cast<Correction>(correction), weight_low, weight_high, weight_scale, allow_missing != 0};           \
        sum_sequence<kThreads>({logprobs, static_cast<DType>(logprobs_dtype)}, {mask, float_mask != 0},                                    \
                               {old_logprobs, static_cast<DType>(old_dtype)}, {rollout_logprobs, static_cast<DType>(rollout_dtype)},       \
                               {cu_seqlens, num_tokens, num_sequences, width}, with_ratio != 0, ratio_bound, weighing, sequences);         \
    }
RA_SEQUENCES(32)
RA_SEQUENCES(256)
#undef RA_SEQUENCES

// The parameters that policy_loss_through and policy_loss_tokens have in common, and what they are made into.
#define RA_PARAMETERS                                                                                                                     \
    const void *logprobs, std::int32_t logprobs_dtype, const float *advantages, std::int32_t advantages_per_token, const void *mask,      \
        std::int32_t float_mask, const void *old_logprobs, std::int32_t old_dtype, const void *rollout_logprobs,                          \
        std::int32_t rollout_dtype, const void *ref_logprobs, std::int32_t ref_dtype, const void *entropy, std::int32_t entropy_dtype,    \
        const std::int64_t *cu_seqlens, std::int64_t num_tokens, std::int64_t num_sequences, std::int64_t width, std::int32_t loss,       \
        std::int32_t spread, float ratio_low, float ratio_high, float dual, float ratio_bound, std::int32_t correction, float weight_low, \
        float weight_high, float weight_scale, std::int32_t allow_missing, std::int32_t kl, std::int32_t straight_through, float kl_coef, \
        std::int32_t kl_weighted, float kl_bound, float entropy_coef, std::int32_t by_sequence, const double *totals
#define RA_INPUTS                                                                                                         \
    Inputs {                                                                                                              \
        {logprobs, static_cast<DType>(logprobs_dtype)}, {old_logprobs, static_cast<DType>(old_dtype)},                    \
            {rollout_logprobs, static_cast<DType>(rollout_dtype)}, {ref_logprobs, static_cast<DType>(ref_dtype)},         \
            {entropy, static_cast<DType>(entropy_dtype)}, advantages, advantages_per_token != 0, {mask, float_mask != 0}, \
            {cu_seqlens, num_tokens, num_sequences, width}, totals, sequences                                             \
    }
#define RA_SETTINGS                                                                                            \
    Settings{static_cast<Loss>(loss),                                                                          \
             spread != 0,                                                                                      \
             ratio_low,                                                                                        \
             ratio_high,                                                                                       \
             dual,                                                                                             \
             ratio_bound,                                                                                      \
             {static_cast<Correction>(correction), weight_low, weight_high, weight_scale, allow_missing != 0}, \
             static_cast<Kl>(kl),                                                                              \
             straight_through != 0,                                                                            \
             kl_weighted != 0,                                                                                 \
             kl_coef,                                                                                          \
             kl_bound,                                                                                         \
             entropy_coef,                                                                                     \
             by_sequence != 0}

extern "C" __global__ void __launch_bounds__(32) policy_loss_through_32(RA_PARAMETERS, double* sequences) {
    sum_through<32>(RA_INPUTS, RA_SETTINGS, sequences);
}

extern "C" __global__ void __launch_bounds__(256, 2) policy_loss_through_256(RA_PARAMETERS, double* sequences) {
    sum_through<256>(RA_INPUTS, RA_SETTINGS, sequences);
}

extern "C" __global__ void __launch_bounds__(kTokensThreads)
    policy_loss_tokens(RA_PARAMETERS, const double* sequences, double* parts, void* grad, void* grad_entropy) {
    sweep(RA_INPUTS, RA_SETTINGS, parts, grad, grad_entropy);
}

#undef RA_SETTINGS
#undef RA_INPUTS
#undef RA_PARAMETERS

}  // namespace reinforce_ada::cuda
