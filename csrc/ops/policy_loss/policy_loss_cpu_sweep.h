// One sweep over a strip of tokens: their gradients, and what they add to the sums.
#pragma once

#include "ops/policy_loss/policy_loss_cpu_tensors.h"
#include "ops/policy_loss/policy_loss_cpu_terms.h"

namespace reinforce_ada::RA_ISA {
namespace {

// Which tensors a sweep is compiled for: exactly those, with ratios and weights of tokens and k3. kAnything looks at what there is.
constexpr int kAnything = -1, kOld = 1, kRollout = 2, kRef = 4;

template <Loss kLoss, int kTensors>
struct Sweep {
    static constexpr bool kGeneral = kTensors == kAnything;
    static constexpr bool kThroughRatio = kLoss == Loss::ppo || kLoss == Loss::gspo || kLoss == Loss::sapo;

    const Settings s;  // copies: a store to the gradient cannot change them
    const Strip strip;
    const float common_share;
    StripSums sums{};

    RA_METHOD bool has(int tensor, const float* given) const { return kGeneral ? given != nullptr : (kTensors & tensor) != 0; }

    RA_METHOD Ratio ratio(const Block& block, F32 logp, F32 old) {
        if (!has(kOld, strip.old)) return {broadcast(1.0f), broadcast(1.0f)};
        const F32 bound = broadcast(s.ratio_bound);
        Ratio ratio = token_ratio(logp - old, bound, sums);
        if (kGeneral && strip.log_ratio) {
            ratio = sequence_ratio<kLoss>(block.read(strip.log_ratio), bound);
            sums.ratio += select(block.keep, ratio.value, F32{});
        }
        sums.ratio_min = min_where(block.keep, ratio.value, sums.ratio_min);
        sums.ratio_max = max_where(block.keep, ratio.value, sums.ratio_max);
        return ratio;
    }

    RA_METHOD Term corrected(const Block& block, F32 old, Term term) {
        const F32 bound = broadcast(s.ratio_bound);
        const F32 gap = clamp(rollout_gap(old, block.read(strip.rollout), s.weighing), -bound, bound);
        const Exponential e = exponential(gap);
        sums.gap += gap;
        sums.gap_k3 += e.excess;
        if (s.weighing.correction == Correction::none) return term;
        const F32 own = kGeneral && strip.weight ? block.read(strip.weight) : weigh(e.value, s.weighing);
        const F32 weight = select(block.keep, own, F32{});
        sums.weight += weight;
        sums.weight_square = fma(weight, weight, sums.weight_square);
        sums.weight_max = max_where(block.keep, weight, sums.weight_max);
        return {term.loss * weight, term.slope * weight};
    }

    // Adds the KL term to the loss, and to the derivatives in the logprob and in the sequence's log-ratio.
    RA_METHOD void add_kl(F32 y, Ratio ratio, F32& loss, F32& direct, F32& through) {
        const F32 coef = broadcast(s.kl_coef);
        KlTerm kl = kGeneral ? kl_estimate(y, s) : k3_estimate(y, s);
        sums.kl += kl.value;
        if (kGeneral && s.kl_weighted) {
            (strip.through ? through : direct) += coef * kl.value * ratio.slope;
            kl = {kl.value * ratio.value, kl.slope * ratio.value};
        }
        loss = fma(coef, kl.value, loss);
        direct = fma(-coef, kl.slope, direct);
    }

    RA_METHOD void operator()(const Block& block) {
        const F32 logp = block.read(strip.logp), adv = block.read(strip.advantage);
        const F32 share = strip.share ? block.read(strip.share) : broadcast(common_share);
        const F32 old = has(kOld, strip.old) ? block.read(strip.old) : logp;
        const Ratio own = ratio(block, logp, old);
        Term term = policy_term<kLoss>(logp, own, adv, s, sums);
        if (has(kRollout, strip.rollout)) term = corrected(block, old, term);

        F32 through{}, direct = term.slope;
        if (kGeneral && strip.through && kThroughRatio) through = term.slope, direct = F32{};
        if (has(kRef, strip.ref)) add_kl(block.read(strip.ref) - logp, own, term.loss, direct, through);
        if (kGeneral && strip.entropy) {
            const F32 entropy = block.read(strip.entropy);
            sums.entropy += entropy;
            term.loss -= entropy * s.entropy_coef;
            if (strip.grad_entropy) block.write(strip.grad_entropy, select(block.keep, share * -s.entropy_coef, F32{}));
        }
        sums.loss = strip.share ? fma(term.loss, share, sums.loss) : sums.loss + term.loss;

        F32 grad = direct * share;
        if (kGeneral && strip.through) {
            block.write(strip.through, through * share);
            grad += block.read(strip.extra);
        }
        if (kGeneral) grad = select(block.keep, grad, F32{});  // k1's derivative is 1 under the mask too
        block.write(strip.grad, grad);
    }
};

template <Loss kLoss, int kTensors>
void sweep(const Settings& s, const Strip& strip, float common_share, ChunkSums& chunk) {
    Sweep<kLoss, kTensors> one{s, strip, common_share};
    for_blocks(strip.mask, strip.count, one);
    chunk += one.sums;
}

using SweepFunction = void (*)(const Settings&, const Strip&, float, ChunkSums&);

template <Loss kLoss>
SweepFunction sweep_of(int tensors) {
    switch (tensors) {
        case kOld:
            return sweep<kLoss, kOld>;
        case kOld | kRollout:
            return sweep<kLoss, kOld | kRollout>;
        case kOld | kRollout | kRef:
            return sweep<kLoss, kOld | kRollout | kRef>;
        default:
            return sweep<kLoss, kAnything>;
    }
}

SweepFunction sweep_of(const Inputs& in, const Settings& s) {
    const bool other_kl = in.ref && (s.kl != Kl::k3 || s.straight_through || s.kl_weighted);
    const bool special = in.entropy || s.spread || s.weighing.of_sequences() || other_kl;
    const int tensors = special ? kAnything : (in.old ? kOld : 0) | (in.rollout ? kRollout : 0) | (in.ref ? kRef : 0);
    switch (s.loss) {
        case Loss::reinforce:
            return sweep_of<Loss::reinforce>(tensors);
        case Loss::cispo:
            return sweep_of<Loss::cispo>(tensors);
        case Loss::gspo:
            return sweep<Loss::gspo, kAnything>;
        case Loss::sapo:
            return sweep_of<Loss::sapo>(tensors);
        default:
            return sweep_of<Loss::ppo>(tensors);
    }
}

}  // namespace
}  // namespace reinforce_ada::RA_ISA
