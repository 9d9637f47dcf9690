// The kernels of policy_loss_cuda.h.
#pragma once

#include "common/device.cuh"
#include "ops/policy_loss/policy_loss.h"

namespace reinforce_ada::cuda {

constexpr int kQuad = 4;  // tokens of one access: 16 bytes in fp32
constexpr int kTokensThreads = 128;
constexpr int kChunk = kTokensThreads * kQuad * 4;  // tokens of a block, 16 a thread: the sums of a thread are then exact enough in fp32
constexpr int kTotalsThreads = 1024;
constexpr int kSequenceNumbers = 4;
constexpr float kExponentBound = 88.3f;  // e^88.3 = 2.2e38 is the last to fit fp32, and e^-88.3 becomes zero

// -------------------- numbers

// NaN stays NaN in these three, as fminf and fmaxf would not have it.
RA_DEVICE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
RA_DEVICE float smaller(float a, float b) { return a < b || a != a ? a : b; }
RA_DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

// e^x and e^x - 1 - x, the k3 estimate, for |x| <= kExponentBound. The latter comes from the polynomial where |x| < .35: the
// difference of numbers near 1 would leave 10 % of it at x = 1e-3.
struct Exponential {
    float value, excess;
};

RA_DEVICE Exponential exponential(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const float shifted = fmaf(x, kLog2E, magic), n = shifted - magic;
    const float r = fmaf(n, -kLn2, x);
    // Minimax in relative error over |r| <= ln 2 / 2 with coefficients rounded to fp32: 1.4e-7.
    const float r2 = r * r, low = fmaf(0x1.5554dcp-3f, r, 0.5f);
    const float high = fmaf(0x1.6c6a48p-10f, r2, fmaf(0x1.120c1cp-7f, r, 0x1.5555bap-5f));
    const float rest = fmaf(high, r2, low) * r2;
    const float value = ((rest + r) + 1.0f) * bits_as<float>((bits_as<std::uint32_t>(shifted) << 23) + 0x3f800000u);
    return {value, n == 0 ? rest : value - 1.0f - x};
}

// -------------------- tensors

// One tensor with a value a token.
struct Stream {
    const void* data;
    DType dtype;

    RA_DEVICE explicit operator bool() const { return data != nullptr; }
};

template <class T>
RA_DEVICE void read_quad(const T* p, int count, float (&values)[kQuad]) {
    if (count == kQuad && past_alignment(p) % (kQuad * static_cast<int>(sizeof(T))) == 0) return unpack(load_pack<kQuad>(p), values);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) values[k] = k < count ? to_float(p[k]) : 0.0f;
}

// Tokens [at, at + count), the rest 0; zeros where the tensor is not there.
RA_DEVICE void read_quad(const Stream& stream, std::int64_t at, int count, float (&values)[kQuad]) {
    if (!stream) count = 0;
    if (stream.dtype == DType::float32)
        read_quad(static_cast<const float*>(stream.data) + at, count, values);
    else if (stream.dtype == DType::bfloat16)
        read_quad(static_cast<const BFloat16*>(stream.data) + at, count, values);
    else
        read_quad(static_cast<const Float16*>(stream.data) + at, count, values);
}

template <class T>
RA_DEVICE void write_quad(T* p, int count, const float (&values)[kQuad]) {
    if (count == kQuad && past_alignment(p) % (kQuad * static_cast<int>(sizeof(T))) == 0) return store_pack(p, packed<T>(values));
#pragma unroll
    for (int k = 0; k < kQuad; ++k)
        if (k < count) p[k] = from_float<T>(values[k]);
}

RA_DEVICE void write_quad(void* data, DType dtype, std::int64_t at, int count, const float (&values)[kQuad]) {
    if (dtype == DType::float32)
        write_quad(static_cast<float*>(data) + at, count, values);
    else if (dtype == DType::bfloat16)
        write_quad(static_cast<BFloat16*>(data) + at, count, values);
    else
        write_quad(static_cast<Float16*>(data) + at, count, values);
}

// The mask, a byte or a float a token: bit k for token at + k.
struct Kept {
    const void* data;
    bool is_float;

    RA_DEVICE unsigned bits(std::int64_t at, int count) const {
        unsigned kept = 0;
        if (is_float) {
            float values[kQuad];
            read_quad(static_cast<const float*>(data) + at, count, values);
#pragma unroll
            for (int k = 0; k < kQuad; ++k) kept |= static_cast<unsigned>(values[k] != 0) << k;
            return kept;
        }
        const auto* const p = static_cast<const std::uint8_t*>(data) + at;
        if (count == kQuad && past_alignment(p) % kQuad == 0) {
            const std::uint32_t bytes = load_pack<kQuad>(p).words[0];
#pragma unroll
            for (int k = 0; k < kQuad; ++k) kept |= static_cast<unsigned>((bytes >> 8 * k & 255) != 0) << k;
            return kept;
        }
#pragma unroll
        for (int k = 0; k < kQuad; ++k)
            if (k < count) kept |= static_cast<unsigned>(p[k] != 0) << k;
        return kept;
    }
};

// Which tokens a sequence has.
struct Layout {
    const std::int64_t* cu_seqlens;  // null: each has `width`
    std::int64_t num_tokens, num_sequences, width;

    RA_DEVICE std::int64_t begin(std::int64_t i) const { return cu_seqlens ? cu_seqlens[i] : i * width; }
    RA_DEVICE std::int64_t end(std::int64_t i) const { return begin(i + 1); }
    RA_DEVICE bool is_wrong(std::int64_t i) const {
        return begin(i) < 0 || begin(i) > end(i) || end(i) > num_tokens || (i == 0 && begin(i) != 0) ||
               (i == num_sequences - 1 && end(i) != num_tokens);
    }
    // The sequence of a token, which is one of low, low + 1, ..., high.
    RA_DEVICE std::int64_t find(std::int64_t token, std::int64_t low, std::int64_t high) const {
        if (!cu_seqlens) return token / width;
        while (low < high) {
            const std::int64_t middle = (low + high + 1) / 2;
            if (cu_seqlens[middle] <= token)
                low = middle;
            else
                high = middle - 1;
        }
        return low;
    }
    RA_DEVICE int count(std::int64_t at) const { return num_tokens - at < kQuad ? static_cast<int>(num_tokens - at) : kQuad; }
};

// -------------------- sequences

struct Weighing {
    Correction correction;
    float low, high, scale;
    bool allow_missing;

    RA_DEVICE bool of_sequences() const { return correction == Correction::sequence_truncate || correction == Correction::sequence_mask; }
    RA_DEVICE float weight(float rho) const {
        const bool truncates = correction == Correction::token_truncate || correction == Correction::sequence_truncate;
        return (truncates ? clamp(rho, low, high) : rho < low || high < rho ? 0.0f : rho) * scale;
    }
    RA_DEVICE float gap(float old, float rollout) const { return allow_missing && rollout != rollout ? 0.0f : old - rollout; }
};

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
                own.gap += counts ? weighing.gap(old_logprobs ? old[k] : logp[k], rollout[k]) : 0.0f;
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
    sequence[2] = with_weight ? static_cast<double>(weighing.weight(exponential(gap).value)) : 0.0;
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

struct Settings {
    Loss loss;
    bool spread;  // ratios are of sequences, their gradient goes to all tokens alike
    float low, high, dual, ratio_bound;
    Weighing weighing;
    Kl kl;
    bool straight_through, kl_weighted;
    float kl_coef, kl_bound, entropy_coef;
    bool by_sequence;  // the share of a token is divided by the tokens of its sequence

    RA_DEVICE bool ratio_of_sequence() const { return spread || loss == Loss::gspo; }
};

// What the tokens of a sequence have in common.
struct Sequence {
    float advantage, share, log_ratio, weight, extra;
};

struct Inputs {
    Stream logprobs, old, rollout, ref, entropy;
    const float* advantages;
    bool advantages_per_token;
    Kept mask;
    Layout layout;
    const double *totals, *sequences;

    RA_DEVICE Sequence sequence(std::int64_t i, const Settings& s, bool with_extra) const {
        const double* const of = sequences + kSequenceNumbers * i;
        const double tokens = of[0] > 1 ? of[0] : 1.0;
        return {advantages_per_token ? 0.0f : advantages[i], s.by_sequence ? static_cast<float>(1 / tokens) : 1.0f,
                s.ratio_of_sequence() ? static_cast<float>(of[1]) : 0.0f, s.weighing.of_sequences() ? static_cast<float>(of[2]) : 0.0f,
                with_extra ? static_cast<float>(of[3] / tokens) : 0.0f};
    }
};

struct Quad {
    float logp[kQuad], old[kQuad], rollout[kQuad], ref[kQuad], entropy[kQuad], advantage[kQuad];
    unsigned kept;

    RA_DEVICE Quad(const Inputs& in, std::int64_t at, int count) {
        kept = in.mask.bits(at, count);
        read_quad(in.logprobs, at, count, logp);
        read_quad(in.old, at, count, old);
        read_quad(in.rollout, at, count, rollout);
        read_quad(in.ref, at, count, ref);
        read_quad(in.entropy, at, count, entropy);
        read_quad(Stream{in.advantages, DType::float32}, at, in.advantages_per_token ? count : 0, advantage);
    }
};

// The loss of a token before aggregation; its derivatives in the token's logprob and in its sequence's log-ratio; what is measured.
struct Token {
    float loss, direct, through;
    float d, k3, ratio, clipped_low, clipped_high, clipped_dual, gap, gap_k3, weight, kl;
};

struct Term {
    float loss, slope;
};

RA_DEVICE Term clipped(float ratio, float slope, float adv, const Settings& s, Token& token) {
    const bool low = adv < 0 && ratio < s.low, high = adv > 0 && ratio > s.high;
    Term term{-adv * (low ? s.low : high ? s.high : ratio), low || high ? 0.0f : -adv * slope};
    token.clipped_low = low, token.clipped_high = high;
    if (adv < 0 && term.loss > -adv * s.dual) {
        token.clipped_dual = 1;
        term = {-adv * s.dual, 0.0f};
    }
    return term;
}

RA_DEVICE Term policy_term(float logp, float ratio, float slope, float adv, const Settings& s, Token& token) {
    if (s.loss == Loss::reinforce) return {-adv * logp, -adv};
    if (s.loss == Loss::cispo) {
        token.clipped_low = ratio<s.low, token.clipped_high = ratio> s.high;
        const float pull = -adv * clamp(ratio, s.low, s.high);
        return {pull * logp, pull};
    }
    if (s.loss == Loss::sapo) {
        const float tau = adv > 0 ? kSapoTauPositive : kSapoTauOther;
        const float away = exponential(clamp(-tau * (ratio - 1), -kExponentBound, kExponentBound)).value, gate = 1 / (1 + away);
        return {-adv * gate * (4 / tau), -adv * 4 * gate * (gate * away) * slope};
    }
    return clipped(ratio, slope, adv, s, token);
}

// The estimate from y = l_ref - l, and its derivative in y.
RA_DEVICE Term kl_estimate(float y, const Settings& s) {
    Term kl{-y, -1.0f};
    if (s.kl == Kl::k2) kl = {y * y * 0.5f, y};
    if (s.kl == Kl::abs) kl = {y < 0 ? -y : y, y < 0 ? -1.0f : y > 0 ? 1.0f : y};
    if (s.kl == Kl::k3) {
        const float most = s.kl_bound < HUGE_VALF ? kKlLogRatioBound : kExponentBound, bounded = clamp(y, -most, most);
        const Exponential e = exponential(bounded);
        const bool outside = y != bounded || e.excess > s.kl_bound;
        kl = {e.excess > s.kl_bound ? s.kl_bound : e.excess, outside && y == y ? 0.0f : e.excess + bounded};
    }
    if (s.straight_through) kl.slope = y;
    return kl;
}

RA_DEVICE Token token_of(const Quad& q, int k, const Inputs& in, const Sequence& sequence, const Settings& s) {
    const float logp = q.logp[k], old = in.old ? q.old[k] : logp, adv = in.advantages_per_token ? q.advantage[k] : sequence.advantage;
    Token token{};
    token.ratio = 1;
    float slope = 1;
    if (in.old) {
        token.d = clamp(logp - old, -s.ratio_bound, s.ratio_bound);
        const Exponential e = exponential(token.d);
        token.k3 = e.excess;
        token.ratio = e.value;
        slope = token.d < logp - old || logp - old < token.d ? 0.0f : token.ratio;  // NaN stays
        if (s.ratio_of_sequence()) {
            const float least = s.loss == Loss::gspo ? -kExponentBound : -s.ratio_bound;
            const float most = s.loss == Loss::gspo ? kSequenceLogRatioBound : s.ratio_bound;
            token.ratio = exponential(clamp(sequence.log_ratio, least, most)).value;
            slope = sequence.log_ratio < least || sequence.log_ratio > most ? 0.0f : token.ratio;
        }
    }
    Term term = policy_term(logp, token.ratio, slope, adv, s, token);
    if (in.rollout) {
        const float difference = s.weighing.gap(old, q.rollout[k]);
        token.gap = clamp(difference, -s.ratio_bound, s.ratio_bound);
        const Exponential e = exponential(token.gap);
        token.gap_k3 = e.excess;
        if (s.weighing.correction != Correction::none) {
            token.weight = s.weighing.of_sequences() ? sequence.weight : s.weighing.weight(e.value);
            term = {term.loss * token.weight, term.slope * token.weight};
        }
    }
    const bool through_ratio = s.spread && s.loss != Loss::reinforce && s.loss != Loss::cispo;
    token.loss = term.loss;
    (through_ratio ? token.through : token.direct) = term.slope;
    if (in.ref) {
        Term kl = kl_estimate(q.ref[k] - logp, s);
        token.kl = kl.loss;
        if (s.kl_weighted) {
            (s.spread ? token.through : token.direct) += s.kl_coef * kl.loss * slope;
            kl = {kl.loss * token.ratio, kl.slope * token.ratio};
        }
        token.loss = fmaf(s.kl_coef, kl.loss, token.loss);
        token.direct = fmaf(-s.kl_coef, kl.slope, token.direct);
    }
    if (in.entropy) token.loss -= s.entropy_coef * q.entropy[k];
    return token;
}

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

// Sums over tokens, in the order of policy_loss_finish: kSums that add up, a smallest, two largest.
enum Part { kLoss, kTokens, kD, kK3, kRatio, kLow, kHigh, kDual, kGap, kGapK3, kWeight, kWeightSquare, kKl, kEntropy, kSums };
constexpr int kRatioMin = kSums, kRatioMax = kSums + 1, kWeightMax = kSums + 2, kParts = kSums + 3;

struct Parts {
    double sums[kSums];
    float ratio_min, ratio_max, weight_max;
};

RA_DEVICE Parts operator+(const Parts& a, const Parts& b) {
    Parts both;
#pragma unroll
    for (int k = 0; k < kSums; ++k) both.sums[k] = a.sums[k] + b.sums[k];
    both.ratio_min = smaller(a.ratio_min, b.ratio_min);
    both.ratio_max = larger(a.ratio_max, b.ratio_max);
    both.weight_max = larger(a.weight_max, b.weight_max);
    return both;
}

// The same of one thread, in fp32: the sums times kThreadShare, for 16 ratios of e^88 would not fit.
constexpr float kThreadShare = 0.0625f;
struct ThreadParts {
    float sums[kSums];
    float ratio_min, ratio_max, weight_max;

    RA_DEVICE void add(const Token& t, float share, float entropy, bool corrected) {
        const float values[kSums] = {
            t.loss * share,      1,    t.d,    t.k3, t.ratio, t.clipped_low, t.clipped_high, t.clipped_dual, t.gap, t.gap_k3, t.weight,
            t.weight * t.weight, t.kl, entropy};
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[k] = fmaf(kThreadShare, values[k], sums[k]);
        ratio_min = smaller(ratio_min, t.ratio);
        ratio_max = larger(ratio_max, t.ratio);
        if (corrected) weight_max = larger(weight_max, t.weight);
    }
    RA_DEVICE Parts wide() const {
        Parts parts;
#pragma unroll
        for (int k = 0; k < kSums; ++k) parts.sums[k] = sums[k] / static_cast<double>(kThreadShare);
        parts.ratio_min = ratio_min, parts.ratio_max = ratio_max, parts.weight_max = weight_max;
        return parts;
    }
};

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

RA_DEVICE double merged_parts(int part, double a, double b) {
    if (part < kSums) return a + b;
    return part == kRatioMin ? (a < b || a != a ? a : b) : (a > b || a != a ? a : b);
}

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
