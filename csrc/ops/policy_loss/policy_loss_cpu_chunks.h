// Chunks of whole sequences: what the tokens of a sequence share, then the sweeps over the strips.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/policy_loss/policy_loss_cpu_sweep.h"

namespace reinforce_ada::RA_ISA {
namespace {

// What its tokens have in common.
struct Sequence {
    double tokens = 0;    // counted
    float log_ratio = 0;  // mean of d; read where ratios are of sequences
    float weight = 0;     // read where the correction is of sequences
    float share = 0;      // of a token's loss in the aggregate
    double through = 0;   // derivative of the sequence's loss in its log-ratio
};

Sequence sum_sequence(const Inputs& in, const Settings& s, bool sums_d, int64_t begin, int64_t end, Room& room) {
    Sum d, gap;
    if (sums_d || s.weighing.of_sequences())
        for (int64_t at = begin; at < end; at += kStrip) {
            const int64_t count = std::min(kStrip, end - at);
            const float *logp = in.logp.values(at, count, room.logp), *old = in.old.values(at, count, room.old);
            const float* rollout = s.weighing.of_sequences() ? in.rollout.values(at, count, room.rollout) : nullptr;
            for_blocks(in.mask.bytes(at, count, room.mask), count, [&](const Block& block) {
                const F32 l = block.read(logp), l_old = old ? block.read(old) : l;
                d.add(l - l_old);
                if (rollout) gap.add(rollout_gap(l_old, block.read(rollout), s.weighing));
            });
        }
    Sequence sequence;
    sequence.tokens = static_cast<double>(in.mask.count(begin, end));
    if (sums_d) sequence.log_ratio = static_cast<float>(d.total() / std::max(sequence.tokens, 1.0));
    if (s.weighing.of_sequences()) {
        const F32 bound = broadcast(s.ratio_bound);
        sequence.weight = weigh(exponential(clamp(broadcast(static_cast<float>(gap.total())), -bound, bound)).value, s.weighing)[0];
    }
    return sequence;
}

struct Denominators {
    double tokens, seqs, length;
};

// What one token's loss counts for in the aggregate; `tokens` are those of its sequence.
double share(LossAgg agg, const Denominators& den, double tokens) {
    switch (agg) {
        case LossAgg::token_mean:
            return 1 / den.tokens;
        case LossAgg::seq_mean_token_mean:
            return 1 / (den.seqs * std::max(tokens, 1.0));
        case LossAgg::seq_mean_token_sum:
            return 1 / den.seqs;
        default:
            return 1 / (den.seqs * den.length);
    }
}

// Chunks of whole sequences, in strips.
class Chunks {
  public:
    Chunks(const Inputs& in, const Settings& s, LossAgg agg, const Denominators& den, const Output& grad, const Output& grad_entropy)
        : in_(in),
          s_(s),
          agg_(agg),
          den_(den),
          grad_(grad),
          grad_entropy_(grad_entropy),
          sweep_(sweep_of(in, s)),
          sequence_ratio_(in.old && (s.loss == Loss::gspo || s.spread)),
          spread_(s.spread),
          own_share_(s.by_sequence) {}

    Partial run(int64_t first, int64_t last) {
        first_ = first, last_ = last;
        if (sequence_ratio_ || spread_ || own_share_ || s_.weighing.of_sequences()) {
            sequences_.resize(static_cast<std::size_t>(last - first));
            for (int64_t i = first; i < last; ++i) {
                Sequence& sequence = of(i);
                sequence = sum_sequence(in_, s_, sequence_ratio_, in_.begin(i), in_.end(i), room_);
                sequence.share = static_cast<float>(share(agg_, den_, sequence.tokens));
            }
        }
        if (spread_) strips();  // the derivative in each sequence's log-ratio, which the next pass spreads over its tokens
        return strips();
    }

  private:
    Sequence& of(int64_t sequence) { return sequences_[static_cast<std::size_t>(sequence - first_)]; }

    Partial strips() {
        const double common = own_share_ ? 1.0 : share(agg_, den_, 0);
        ChunkSums sums;
        at_sequence_ = first_, filled_ = -1;
        const int64_t end = in_.begin(last_);
        for (int64_t at = in_.begin(first_); at < end; at += kStrip) {
            const int64_t count = std::min(kStrip, end - at);
            const int64_t sequence = at_sequence_;
            fill(at, count);
            const Strip strip = take(at, count);
            sweep_(s_, strip, static_cast<float>(common), sums);
            if (spread_) add_through(sequence, at, count);
            grad_.keep(at, room_.grad, count);
            if (grad_entropy_) grad_entropy_.keep(at, room_.grad_entropy, count);
        }
        return sums.total(static_cast<double>(in_.mask.count(in_.begin(first_), end)), common, sequence_ratio_);
    }

    Strip take(int64_t at, int64_t count) {
        return {count,
                in_.mask.bytes(at, count, room_.mask),
                in_.logp.values(at, count, room_.logp),
                in_.old.values(at, count, room_.old),
                in_.rollout.values(at, count, room_.rollout),
                in_.ref.values(at, count, room_.ref),
                in_.entropy.values(at, count, room_.entropy),
                in_.advantages ? room_.advantage : in_.token_advantages.values(at, count, room_.advantage),
                own_share_ ? room_.share : nullptr,
                sequence_ratio_ ? room_.log_ratio : nullptr,
                s_.weighing.of_sequences() ? room_.weight : nullptr,
                spread_ ? room_.extra : nullptr,
                grad_.target(at, count, room_.grad),
                grad_entropy_ ? grad_entropy_.target(at, count, room_.grad_entropy) : nullptr,
                spread_ ? room_.through : nullptr};
    }

    // Calls body(sequence, position in the strip, tokens) for the part of every sequence in tokens [at, at + count).
    template <class Body>
    RA_METHOD int64_t for_parts(int64_t sequence, int64_t at, int64_t count, const Body& body) const {
        const Inputs in = in_;  // a copy: what body stores cannot change it
        for (int64_t k = 0;;) {
            const int64_t end = in.end(sequence) - at, part = std::min(end, count) - k;
            if (part > 0) body(sequence, k, part), k += part;
            if (k == count) return sequence;
            ++sequence;
        }
    }

    // What a sequence's tokens share, once for each token.
    void fill(int64_t at, int64_t count) {
        if (filled_ >= 0 && in_.end(filled_) >= at + count) return;  // a long sequence: all of it is there already
        const int64_t first = at_sequence_;
        if (in_.advantages) {
            const float* advantages = in_.advantages;
            float* room = room_.advantage;
            at_sequence_ = for_parts(first, at, count, [=](int64_t i, int64_t k, int64_t part) { put(room + k, advantages[i], part); });
        }
        if (!sequences_.empty())
            at_sequence_ = for_parts(first, at, count, [&](int64_t i, int64_t k, int64_t part) {
                const Sequence& sequence = of(i);
                if (own_share_) put(room_.share + k, sequence.share, part);
                if (sequence_ratio_) put(room_.log_ratio + k, sequence.log_ratio, part);
                if (s_.weighing.of_sequences()) put(room_.weight + k, sequence.weight, part);
                if (spread_) put(room_.extra + k, static_cast<float>(sequence.through / std::max(sequence.tokens, 1.0)), part);
            });
        filled_ = count == kStrip && in_.begin(at_sequence_) <= at ? at_sequence_ : -1;
    }

    RA_METHOD static void put(float* p, float value, int64_t count) {
        for (int64_t k = 0; k < count; k += kLanes) store(p + k, broadcast(value));
    }

    void add_through(int64_t sequence, int64_t at, int64_t count) {
        for_parts(sequence, at, count, [&](int64_t i, int64_t k, int64_t part) {
            for (int64_t j = k; j < k + part; ++j) of(i).through += room_.through[j];
        });
    }

    const Inputs& in_;
    const Settings& s_;
    const LossAgg agg_;
    const Denominators den_;
    const Output grad_, grad_entropy_;
    const SweepFunction sweep_;
    const bool sequence_ratio_, spread_, own_share_;
    int64_t first_ = 0, last_ = 0, at_sequence_ = 0, filled_ = -1;
    std::vector<Sequence> sequences_;
    Room room_;
};

}  // namespace
}  // namespace reinforce_ada::RA_ISA
