#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "ops/policy_loss/policy_loss.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

constexpr int64_t kChunkTokens = 8192;  // whole sequences of at least so many tokens make one partial sum, whatever the threads
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef double F64 __attribute__((vector_size(8 * kLanes)));

RA_INLINE F32 select(I32 condition, F32 yes, F32 no) { return (F32)(((I32)yes & condition) | ((I32)no & ~condition)); }
RA_INLINE F32 clamp(F32 x, float low, float high) {  // NaN stays NaN
    return -max(broadcast(-high), -max(broadcast(low), x));
}

// The sum of many vectors, in double: rounding of a token's value is all there is, whatever the number of tokens.
struct Sum {
    F64 lanes{};

    void add(F32 x) { lanes += __builtin_convertvector(x, F64); }
    void add(F32 x, double factor) { lanes += __builtin_convertvector(x, F64) * factor; }
    double total() const {
        double sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
        return sum;
    }
};

struct Count {
    I32 lanes{};

    void add(I32 condition) { lanes -= condition; }  // true is -1
    double total() const {
        int64_t sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
        return static_cast<double>(sum);
    }
};

// e^x and e^x - 1 - x, the k3 estimate. The latter comes from the polynomial where |x| < .35: the difference of numbers near 1
// would leave 10 % of it at x = 1e-3.
struct Exponential {
    F32 value, excess;
};

RA_INLINE Exponential exponential(F32 x) {
    x = clamp(x, -87.0f, 88.0f);
    const F32 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const F32 shifted = fma(x, broadcast(1.44269504f), magic);
    const F32 n = shifted - magic;
    F32 r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts, the first with 9 bits: n times it is exact
    r = fma(n, broadcast(2.12194440e-4f), r);
    F32 q = broadcast(1.0f / 5040);  // Taylor: |r| <= .347 leaves 6e-9 of r^2
    q = fma(q, r, broadcast(1.0f / 720));
    q = fma(q, r, broadcast(1.0f / 120));
    q = fma(q, r, broadcast(1.0f / 24));
    q = fma(q, r, broadcast(1.0f / 6));
    q = fma(q, r, broadcast(0.5f));
    const F32 rest = q * r * r;
    const F32 power = (F32)(((I32)shifted << 23) + 0x3f800000);
    const F32 value = ((rest + r) + 1.0f) * power;
    return {value, select(n == 0.0f, rest, value - 1.0f - x)};
}

struct Inputs {
    const float *logprobs, *advantages, *old, *rollout, *ref;
    const void* mask;
    bool advantages_per_token, float_mask;
    const int64_t* cu_seqlens;
    int64_t width;

    int64_t begin(int64_t sequence) const { return cu_seqlens ? cu_seqlens[sequence] : sequence * width; }
    int64_t end(int64_t sequence) const { return cu_seqlens ? cu_seqlens[sequence + 1] : (sequence + 1) * width; }
};

struct Settings {
    Loss loss;
    float low, high, dual;  // bounds of the ratio; of the loss for negative advantages
    Correction correction;
    float weight_low, weight_high;
    Kl kl;
    bool straight_through;
    float kl_coef;

    bool sequence_weight() const { return correction == Correction::sequence_truncate || correction == Correction::sequence_mask; }
};

// One chunk's share of the loss and of the metrics.
struct Partial {
    double loss = 0, tokens = 0, d = 0, k3 = 0, ratio = 0, clipped_low = 0, clipped_high = 0, clipped_dual = 0;
    double gap = 0, gap_k3 = 0, weight = 0, weight_square = 0, kl = 0;
    float ratio_min = kInfinity, ratio_max = -kInfinity, weight_max = -kInfinity;

    void operator+=(const Partial& p) {
        loss += p.loss, tokens += p.tokens, d += p.d, k3 += p.k3, ratio += p.ratio;
        clipped_low += p.clipped_low, clipped_high += p.clipped_high, clipped_dual += p.clipped_dual;
        gap += p.gap, gap_k3 += p.gap_k3, weight += p.weight, weight_square += p.weight_square, kl += p.kl;
        ratio_min = std::min(ratio_min, p.ratio_min);
        ratio_max = std::max(ratio_max, p.ratio_max);
        weight_max = std::max(weight_max, p.weight_max);
    }
};

// The same, a lane each.
struct Lanes {
    Sum loss, d, k3, ratio, gap, gap_k3, weight, weight_square, kl;
    Count tokens, clipped_low, clipped_high, clipped_dual;
    F32 ratio_min = broadcast(kInfinity), ratio_max = broadcast(-kInfinity), weight_max = broadcast(-kInfinity);

    Partial total() const {
        Partial p;
        p.loss = loss.total(), p.d = d.total(), p.k3 = k3.total(), p.ratio = ratio.total();
        p.gap = gap.total(), p.gap_k3 = gap_k3.total(), p.weight = weight.total(), p.weight_square = weight_square.total();
        p.kl = kl.total(), p.tokens = tokens.total();
        p.clipped_low = clipped_low.total(), p.clipped_high = clipped_high.total(), p.clipped_dual = clipped_dual.total();
        p.ratio_min = -max_lanes(-ratio_min), p.ratio_max = max_lanes(ratio_max), p.weight_max = max_lanes(weight_max);
        return p;
    }
};

// Up to kLanes tokens of one sequence.
struct Block {
    int64_t at;
    int count;
    I32 keep;

    F32 read(const float* p) const {
        const F32 x = count == kLanes ? load(p + at) : load_first(p + at, count, 0.0f);
        return select(keep, x, F32{});
    }
    void write(float* p, F32 x) const {
        if (count == kLanes)
            store(p + at, x);
        else
            store_first(p + at, x, count);
    }
};

RA_INLINE I32 read_mask(const Inputs& in, int64_t at, int count) {
    if (in.float_mask) {
        const float* p = static_cast<const float*>(in.mask) + at;
        return (count == kLanes ? load(p) : load_first(p, count, 0.0f)) != 0.0f;
    }
    typedef std::uint8_t U8 __attribute__((vector_size(kLanes)));
    U8 bytes{};
    std::memcpy(&bytes, static_cast<const std::uint8_t*>(in.mask) + at, count == kLanes ? kLanes : count);
    return __builtin_convertvector(bytes, I32) != 0;
}

template <class Body>
RA_INLINE void for_blocks(const Inputs& in, int64_t begin, int64_t end, const Body& body) {
    for (int64_t at = begin; at < end; at += kLanes) {
        const int count = static_cast<int>(std::min<int64_t>(kLanes, end - at));
        body(Block{at, count, read_mask(in, at, count)});
    }
}

double counted(const Inputs& in, int64_t begin, int64_t end) {
    Count tokens;
    for_blocks(in, begin, end, [&](const Block& block) { tokens.add(block.keep); });
    return tokens.total();
}

// What looks at a whole sequence before its tokens: gspo's ratio, a sequence's weight, a mean over its tokens.
struct SequenceSums {
    double tokens = 0, d = 0, gap = 0;
};

SequenceSums sequence_sums(const Inputs& in, const Settings& s, int64_t begin, int64_t end) {
    Sum d, gap;
    if ((s.loss == Loss::gspo && in.old) || s.sequence_weight())
        for_blocks(in, begin, end, [&](const Block& block) {
            const F32 logp = block.read(in.logprobs);
            const F32 old = in.old ? block.read(in.old) : logp;
            d.add(logp - old);
            if (s.sequence_weight()) gap.add(old - block.read(in.rollout));
        });
    return {counted(in, begin, end), d.total(), gap.total()};
}

// A token's loss before aggregation and its derivative with respect to the token's logprob.
struct Term {
    F32 loss, slope;
};

RA_INLINE Term clipped(F32 ratio, F32 slope_of_ratio, F32 adv, const Settings& s, I32 keep, Lanes& sums) {
    const I32 low = (adv < 0.0f) & (ratio < s.low), high = (adv > 0.0f) & (ratio > s.high);
    sums.clipped_low.add(low & keep);
    sums.clipped_high.add(high & keep);
    F32 loss = -adv * select(low, broadcast(s.low), select(high, broadcast(s.high), ratio));
    F32 slope = select(low | high, F32{}, -adv * slope_of_ratio);
    if (s.dual < kInfinity) {
        const F32 most = -adv * s.dual;
        const I32 dual = (adv < 0.0f) & (loss > most);
        sums.clipped_dual.add(dual & keep);
        loss = select(dual, most, loss);
        slope = select(dual, F32{}, slope);
    }
    return {loss, slope};
}

RA_INLINE F32 weigh(F32 rho, bool truncate, const Settings& s) {
    if (truncate) return select(rho > s.weight_high, broadcast(s.weight_high), rho);
    return select((rho > s.weight_high) | (rho < s.weight_low), F32{}, rho);
}

// A whole sequence: `coefficient` is the share of a token's loss in the aggregate, `own` what sequence_sums found.
template <Loss kLoss>
void sweep(const Inputs& in, const Settings& s, int64_t sequence, double coefficient, const SequenceSums& own, Lanes& sums, float* grad) {
    const int64_t begin = in.begin(sequence), end = in.end(sequence);
    const bool truncate = s.correction == Correction::token_truncate || s.correction == Correction::sequence_truncate;
    const float advantage = in.advantages_per_token ? 0.0f : in.advantages[sequence];
    const float share = static_cast<float>(coefficient);

    F32 sequence_ratio{}, sequence_slope{}, sequence_weight{};
    if (kLoss == Loss::gspo) {
        const float mean = static_cast<float>(own.d / std::max(own.tokens, 1.0));
        sequence_ratio = exponential(broadcast(std::min(mean, kSequenceLogRatioBound))).value;
        sequence_slope = mean > kSequenceLogRatioBound ? F32{} : sequence_ratio;
    }
    if (s.sequence_weight()) {
        const F32 gap = clamp(broadcast(static_cast<float>(own.gap)), -kLogRatioBound, kLogRatioBound);
        sequence_weight = weigh(exponential(gap).value, truncate, s);
    }

    for_blocks(in, begin, end, [&](const Block& block) {
        const I32 keep = block.keep;
        const F32 logp = block.read(in.logprobs);
        const F32 adv = in.advantages_per_token ? block.read(in.advantages) : select(keep, broadcast(advantage), F32{});
        sums.tokens.add(keep);

        F32 old = logp, ratio = broadcast(1.0f), slope = broadcast(1.0f);
        if (in.old) {
            old = block.read(in.old);
            const F32 d = logp - old;
            const F32 bounded = clamp(d, -kLogRatioBound, kLogRatioBound);
            const Exponential e = exponential(bounded);
            sums.d.add(bounded);
            sums.k3.add(e.excess);
            ratio = e.value;
            slope = select((d == bounded) | (d != d), ratio, F32{});
        }
        if (kLoss == Loss::gspo) ratio = sequence_ratio, slope = sequence_slope;
        if (in.old) {
            sums.ratio.add(select(keep, ratio, F32{}));
            sums.ratio_min = -max(-sums.ratio_min, -select(keep, ratio, broadcast(kInfinity)));
            sums.ratio_max = max(sums.ratio_max, select(keep, ratio, broadcast(-kInfinity)));
        }

        Term term;
        if constexpr (kLoss == Loss::reinforce) {
            term = {-adv * logp, -adv};
        } else if constexpr (kLoss == Loss::cispo) {
            const I32 low = ratio<s.low, high = ratio> s.high;
            sums.clipped_low.add(low & keep);
            sums.clipped_high.add(high & keep);
            const F32 pull = -adv * clamp(ratio, s.low, s.high);
            term = {pull * logp, pull};
        } else if constexpr (kLoss == Loss::sapo) {
            const F32 tau = select(adv > 0.0f, broadcast(kSapoTauPositive), broadcast(kSapoTauOther));
            const F32 away = exponential(-tau * (ratio - 1.0f)).value;
            const F32 gate = 1.0f / (1.0f + away);
            term = {-adv * gate * 4.0f / tau, -adv * 4.0f * gate * gate * away * slope};
        } else {
            term = clipped(ratio, slope, adv, s, keep, sums);
        }

        if (in.rollout) {
            const F32 gap = clamp(old - block.read(in.rollout), -kLogRatioBound, kLogRatioBound);
            const Exponential e = exponential(gap);
            sums.gap.add(gap);
            sums.gap_k3.add(e.excess);
            if (s.correction != Correction::none) {
                const F32 weight = select(keep, s.sequence_weight() ? sequence_weight : weigh(e.value, truncate, s), F32{});
                sums.weight.add(weight);
                sums.weight_square.add(weight * weight);
                sums.weight_max = max(sums.weight_max, select(keep, weight, broadcast(-kInfinity)));
                term = {term.loss * weight, term.slope * weight};
            }
        }

        if (in.ref) {
            const F32 x = logp - block.read(in.ref);
            F32 kl = x, kl_slope = broadcast(1.0f);
            if (s.kl == Kl::k2) {
                kl = x * x * 0.5f, kl_slope = x;
            } else if (s.kl == Kl::abs) {
                kl = select(x < 0.0f, -x, x), kl_slope = select(x < 0.0f, broadcast(-1.0f), select(x > 0.0f, broadcast(1.0f), x));
            } else if (s.kl == Kl::k3) {
                const F32 bounded = clamp(-x, -kLogRatioBound, kLogRatioBound);
                const Exponential e = exponential(bounded);
                const I32 inside = (bounded == -x) & (e.excess <= kKlBound);
                kl = clamp(e.excess, -kKlBound, kKlBound);
                kl_slope = select(inside | (x != x), 1.0f - e.value, F32{});
            }
            if (s.straight_through) kl_slope = x;
            sums.kl.add(kl);
            term = {term.loss + s.kl_coef * kl, term.slope + s.kl_coef * kl_slope};
        }

        sums.loss.add(select(keep, term.loss, F32{}), coefficient);
        block.write(grad, select(keep, term.slope * share, F32{}));
    });
}

using Sweep = void (*)(const Inputs&, const Settings&, int64_t, double, const SequenceSums&, Lanes&, float*);

Sweep sweep_of(Loss loss) {
    switch (loss) {
        case Loss::reinforce:
            return sweep<Loss::reinforce>;
        case Loss::cispo:
            return sweep<Loss::cispo>;
        case Loss::gspo:
            return sweep<Loss::gspo>;
        case Loss::sapo:
            return sweep<Loss::sapo>;
        default:
            return sweep<Loss::ppo>;
    }
}

// Boundaries of chunks of whole sequences.
std::vector<int64_t> chunks(const Inputs& in, int64_t sequences) {
    std::vector<int64_t> starts{0};
    for (int64_t i = 0; i < sequences; ++i)
        if (in.end(i) - in.begin(starts.back()) >= kChunkTokens || i + 1 == sequences) starts.push_back(i + 1);
    return starts;
}

struct Denominators {
    double tokens, seqs, length;
};

// What was not given is counted: tokens, sequences with any token, the longest sequence.
void count_missing(const Inputs& in, const std::vector<int64_t>& starts, int64_t total, LossAgg agg, Denominators& den, int num_threads) {
    const bool tokens = agg == LossAgg::token_mean && den.tokens == 0, seqs = agg != LossAgg::token_mean && den.seqs == 0;
    if (tokens || seqs) {
        const int64_t pieces = static_cast<int64_t>(starts.size()) - 1;
        std::vector<Denominators> partial(static_cast<std::size_t>(pieces));
        parallel_for(pieces, total, num_threads, [&](int64_t first, int64_t last) {
            for (int64_t c = first; c < last; ++c)
                for (int64_t i = starts[c]; i < starts[c + 1]; ++i) {
                    const double n = counted(in, in.begin(i), in.end(i));
                    partial[c].tokens += n;
                    partial[c].seqs += n > 0;
                }
        });
        Denominators sum{};
        for (const Denominators& p : partial) sum.tokens += p.tokens, sum.seqs += p.seqs;
        if (tokens) den.tokens = std::max(sum.tokens, 1.0);
        if (seqs) den.seqs = std::max(sum.seqs, 1.0);
    }
    if (agg == LossAgg::seq_mean_token_sum_norm && den.length == 0) {
        int64_t longest = 1;
        for (int64_t i = 0; i < starts.back(); ++i) longest = std::max(longest, in.end(i) - in.begin(i));
        den.length = static_cast<double>(longest);
    }
}

double coefficient(LossAgg agg, const Denominators& den, double tokens_of_sequence) {
    switch (agg) {
        case LossAgg::token_mean:
            return 1 / den.tokens;
        case LossAgg::seq_mean_token_mean:
            return 1 / (den.seqs * std::max(tokens_of_sequence, 1.0));
        case LossAgg::seq_mean_token_sum:
            return 1 / den.seqs;
        default:
            return 1 / (den.seqs * den.length);
    }
}

int64_t first_wrong_offset(const int64_t* cu_seqlens, int64_t sequences, int64_t total) {
    if (cu_seqlens[0] != 0) return 0;
    for (int64_t i = 0; i < sequences; ++i)
        if (cu_seqlens[i + 1] < cu_seqlens[i] || cu_seqlens[i + 1] > total) return i + 1;
    return cu_seqlens[sequences] == total ? -1 : sequences;
}

void name_metrics(const Partial& p, int64_t total, double* metrics) {
    const double n = std::max(p.tokens, 1.0);
    const bool any = p.tokens > 0;
    const double values[] = {p.tokens,
                             static_cast<double>(total) - p.tokens,
                             -p.d / n,
                             p.k3 / n,
                             p.ratio / n,
                             any ? p.ratio_min : 0,
                             any ? p.ratio_max : 0,
                             p.clipped_low / n,
                             p.clipped_high / n,
                             p.clipped_dual / n,
                             -p.gap / n,
                             p.gap_k3 / n,
                             p.weight / n,
                             any ? p.weight_max : 0,
                             p.weight_square > 0 ? p.weight * p.weight / (n * p.weight_square) : 0,
                             p.kl / n};
    std::copy(std::begin(values), std::end(values), metrics);
}

}  // namespace

int64_t policy_loss(const float* logprobs, const float* advantages, bool advantages_per_token, const void* mask, bool float_mask,
                    const float* old_logprobs, const float* rollout_logprobs, const float* ref_logprobs, const int64_t* cu_seqlens,
                    int64_t num_tokens_total, int64_t num_sequences, int64_t width, int loss_kind, double clip_low, double clip_high,
                    double dual_clip, int loss_agg, double num_tokens, double num_seqs, double norm_length, int correction,
                    double correction_low, double correction_high, int kl, bool straight_through, double kl_coef, float* loss,
                    double* metrics, float* grad, int num_threads) {
    if (cu_seqlens) {
        const int64_t wrong = first_wrong_offset(cu_seqlens, num_sequences, num_tokens_total);
        if (wrong >= 0) return wrong;
    }
    const Inputs in{logprobs, advantages,           old_logprobs, rollout_logprobs, ref_logprobs,
                    mask,     advantages_per_token, float_mask,   cu_seqlens,       width};
    const Settings s{static_cast<Loss>(loss_kind),
                     static_cast<float>(1 - clip_low),
                     static_cast<float>(1 + clip_high),
                     static_cast<float>(dual_clip),
                     static_cast<Correction>(correction),
                     static_cast<float>(correction_low),
                     static_cast<float>(correction_high),
                     static_cast<Kl>(kl),
                     straight_through,
                     static_cast<float>(kl_coef)};
    const LossAgg agg = static_cast<LossAgg>(loss_agg);
    const std::vector<int64_t> starts = chunks(in, num_sequences);
    Denominators den{num_tokens, num_seqs, norm_length};
    count_missing(in, starts, num_tokens_total, agg, den, num_threads);

    const Sweep sweep_sequence = sweep_of(s.loss);
    const bool sums_first = s.loss == Loss::gspo || s.sequence_weight() || agg == LossAgg::seq_mean_token_mean;
    const int64_t pieces = static_cast<int64_t>(starts.size()) - 1;
    std::vector<Partial> partial(static_cast<std::size_t>(pieces));
    parallel_for(pieces, num_tokens_total, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
            Lanes sums;
            for (int64_t i = starts[c]; i < starts[c + 1]; ++i) {
                const SequenceSums own = sums_first ? sequence_sums(in, s, in.begin(i), in.end(i)) : SequenceSums{};
                sweep_sequence(in, s, i, coefficient(agg, den, own.tokens), own, sums, grad);
            }
            partial[c] = sums.total();
        }
    });
    Partial total;
    for (const Partial& p : partial) total += p;
    *loss = static_cast<float>(total.loss);
    name_metrics(total, num_tokens_total, metrics);
    return -1;
}

}  // namespace reinforce_ada::RA_ISA
