// The law of one token: its loss, the derivatives, and what is measured of it.
#pragma once

#include "ops/policy_loss/policy_loss_cuda_tensors.cuh"

namespace reinforce_ada::cuda {

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

RA_DEVICE float weigh(float rho, const Weighing& w) {
    return (w.truncates() ? clamp(rho, w.low, w.high) : rho < w.low || w.high < rho ? 0.0f : rho) * w.scale;
}

RA_DEVICE float rollout_gap(float old, float rollout, const Weighing& w) {
    return w.allow_missing && rollout != rollout ? 0.0f : old - rollout;
}

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
        if (ratio_of_sequence(s)) {
            const float least = s.loss == Loss::gspo ? -kExponentBound : -s.ratio_bound;
            const float most = s.loss == Loss::gspo ? kSequenceLogRatioBound : s.ratio_bound;
            token.ratio = exponential(clamp(sequence.log_ratio, least, most)).value;
            slope = sequence.log_ratio < least || sequence.log_ratio > most ? 0.0f : token.ratio;
        }
    }
    Term term = policy_term(logp, token.ratio, slope, adv, s, token);
    if (in.rollout) {
        const float difference = rollout_gap(old, q.rollout[k], s.weighing);
        token.gap = clamp(difference, -s.ratio_bound, s.ratio_bound);
        const Exponential e = exponential(token.gap);
        token.gap_k3 = e.excess;
        if (s.weighing.correction != Correction::none) {
            token.weight = s.weighing.of_sequences() ? sequence.weight : weigh(e.value, s.weighing);
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

}  // namespace reinforce_ada::cuda
