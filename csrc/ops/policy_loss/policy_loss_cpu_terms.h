// The law of one token, for kLanes tokens at a time: its loss, the derivative, and what is measured of it.
#pragma once

#include "common/simd_masks.h"
#include "ops/policy_loss/policy_loss_cpu_sums.h"
#include "ops/policy_loss/policy_loss_settings.h"

namespace reinforce_ada::RA_ISA {
namespace {

// e^x and e^x - 1 - x, the k3 estimate, for |x| <= kExponentBound. The latter comes from the polynomial where |x| < .35: the
// difference of numbers near 1 would leave 10 % of it at x = 1e-3.
struct Exponential {
    F32 value, excess;
};

RA_INLINE Exponential exponential(F32 x) {
    const F32 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const F32 shifted = fma(x, broadcast(1.44269504f), magic);
    const F32 n = shifted - magic;
#if defined(__AVX2__)
    const F32 r = fma(n, broadcast(-0.693147182f), x);  // fused: wrong by the 2e-9 n that the constant is
#else
    const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // in two parts, the first with 9 bits: n times it is exact
#endif
    // Minimax in relative error over |r| <= ln 2 / 2 with coefficients rounded to fp32: 1.4e-7.
    const F32 r2 = r * r, low = fma(broadcast(0x1.5554dcp-3f), r, broadcast(0.5f));
    const F32 high = fma(broadcast(0x1.6c6a48p-10f), r2, fma(broadcast(0x1.120c1cp-7f), r, broadcast(0x1.5555bap-5f)));
    const F32 rest = fma(high, r2, low) * r2;
    const F32 power = (F32)(((I32)shifted << 23) + 0x3f800000);
    const F32 value = ((rest + r) + 1.0f) * power;
    return {value, select(differs(n, F32{}), value - 1.0f - x, rest)};
}

RA_INLINE F32 weigh(F32 rho, const Weighing& w) {
    const F32 low = broadcast(w.low), high = broadcast(w.high);
    const F32 weight = w.truncates() ? clamp(rho, low, high) : select(less(rho, low) | less(high, rho), 0.0f, rho);
    return weight * w.scale;
}

RA_INLINE F32 rollout_gap(F32 old, F32 rollout, const Weighing& w) {
    return w.allow_missing ? select(is_nan(rollout), 0.0f, old - rollout) : old - rollout;
}

// The ratio to the old policy, and its derivative in the log-ratio.
struct Ratio {
    F32 value, slope;
};

RA_INLINE Ratio token_ratio(F32 d, F32 bound, StripSums& sums) {
    const F32 bounded = clamp(d, -bound, bound);
    const Exponential e = exponential(bounded);
    sums.d += bounded;
    sums.k3 += e.excess;
    return {e.value, select(differs(d, bounded), F32{}, e.value)};
}

template <Loss kLoss>
RA_INLINE Ratio sequence_ratio(F32 mean, F32 bound) {
    const F32 most = kLoss == Loss::gspo ? broadcast(kSequenceLogRatioBound) : bound;
    const F32 least = kLoss == Loss::gspo ? broadcast(-kExponentBound) : -bound;
    const F32 ratio = exponential(clamp(mean, least, most)).value;
    return {ratio, select(less(most, mean) | less(mean, least), F32{}, ratio)};
}

// The loss of a token before aggregation and its derivative with respect to the token's logprob.
struct Term {
    F32 loss, slope;
};

// Masked tokens have advantage 0 and ratio 1: none of them is clipped, here and in the next two.
RA_INLINE Term clipped(Ratio ratio, F32 adv, const Settings& s, StripSums& sums) {
    const F32 bound_low = broadcast(s.low), bound_high = broadcast(s.high);
    const Mask low = less(adv, F32{}) & less(ratio.value, bound_low), high = less(F32{}, adv) & less(bound_high, ratio.value);
    sums.clipped_low = decrease(sums.clipped_low, low);
    sums.clipped_high = decrease(sums.clipped_high, high);
    return {-adv * select(low, bound_low, select(high, bound_high, ratio.value)), select(low | high, F32{}, -adv * ratio.slope)};
}

RA_INLINE Term clipped_twice(Term term, F32 adv, F32 bound, StripSums& sums) {
    const F32 most = -adv * bound;
    const Mask dual = less(adv, F32{}) & less(most, term.loss);
    sums.clipped_dual = decrease(sums.clipped_dual, dual);
    return {select(dual, most, term.loss), select(dual, F32{}, term.slope)};
}

RA_INLINE Term cispo(F32 logp, F32 ratio, F32 adv, const Settings& s, StripSums& sums) {
    const F32 low = broadcast(s.low), high = broadcast(s.high);
    sums.clipped_low = decrease(sums.clipped_low, less(ratio, low));
    sums.clipped_high = decrease(sums.clipped_high, less(high, ratio));
    const F32 pull = -adv * clamp(ratio, low, high);
    return {pull * logp, pull};
}

RA_INLINE Term sapo(Ratio ratio, F32 adv) {
    const Mask positive = less(F32{}, adv);
    const F32 tau = select(positive, broadcast(kSapoTauPositive), broadcast(kSapoTauOther));
    const F32 four = select(positive, broadcast(4 / kSapoTauPositive), broadcast(4 / kSapoTauOther));
    const F32 bound = broadcast(kExponentBound), away = exponential(clamp(-tau * (ratio.value - 1.0f), -bound, bound)).value;
    const F32 gate = 1.0f / (1.0f + away);
    return {-adv * gate * four, -adv * 4.0f * gate * (gate * away) * ratio.slope};
}

template <Loss kLoss>
RA_INLINE Term policy_term(F32 logp, Ratio ratio, F32 adv, const Settings& s, StripSums& sums) {
    if constexpr (kLoss == Loss::reinforce) return {-adv * logp, -adv};
    if constexpr (kLoss == Loss::cispo) return cispo(logp, ratio.value, adv, s, sums);
    if constexpr (kLoss == Loss::sapo) return sapo(ratio, adv);
    const Term term = clipped(ratio, adv, s, sums);
    return s.dual < kInfinity ? clipped_twice(term, adv, broadcast(s.dual), sums) : term;
}

// The estimate from y = l_ref - l, and its derivative in y.
struct KlTerm {
    F32 value, slope;
};

RA_INLINE KlTerm k3_estimate(F32 y, const Settings& s) {
    const F32 bound = broadcast(s.kl_bound < kInfinity ? kKlLogRatioBound : kExponentBound), most = broadcast(s.kl_bound);
    const F32 bounded = clamp(y, -bound, bound);
    const Exponential e = exponential(bounded);
    const Mask outside = differs(y, bounded) | less(most, e.excess);
    return {min(most, e.excess), select(outside, F32{}, e.excess + bounded)};
}

RA_INLINE KlTerm kl_estimate(F32 y, const Settings& s) {
    KlTerm kl{-y, broadcast(-1.0f)};
    if (s.kl == Kl::k2) kl = {y * y * 0.5f, y};
    if (s.kl == Kl::abs) kl = {max(-y, y), select(less(y, F32{}), -1.0f, select(less(F32{}, y), 1.0f, y))};
    if (s.kl == Kl::k3) kl = k3_estimate(y, s);
    if (s.straight_through) kl.slope = y;
    return kl;
}

}  // namespace
}  // namespace reinforce_ada::RA_ISA
