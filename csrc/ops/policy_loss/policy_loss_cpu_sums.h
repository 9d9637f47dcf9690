// What is summed over the tokens: in fp32 over a strip, in double over a chunk and over the batch.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/simd.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

typedef double F64 __attribute__((vector_size(8 * kLanes)));

// One chunk's share of the loss and of the metrics.
struct Partial {
    double loss = 0, tokens = 0, d = 0, k3 = 0, ratio = 0, clipped_low = 0, clipped_high = 0, clipped_dual = 0;
    double gap = 0, gap_k3 = 0, weight = 0, weight_square = 0, kl = 0, entropy = 0;
    float ratio_min = kInfinity, ratio_max = -kInfinity, weight_max = -kInfinity;

    void operator+=(const Partial& p) {
        loss += p.loss, tokens += p.tokens, d += p.d, k3 += p.k3, ratio += p.ratio;
        clipped_low += p.clipped_low, clipped_high += p.clipped_high, clipped_dual += p.clipped_dual;
        gap += p.gap, gap_k3 += p.gap_k3, weight += p.weight, weight_square += p.weight_square, kl += p.kl, entropy += p.entropy;
        ratio_min = std::min(ratio_min, p.ratio_min);
        ratio_max = std::max(ratio_max, p.ratio_max);
        weight_max = std::max(weight_max, p.weight_max);
    }
};

// The sum of many vectors, in double.
struct Sum {
    F64 lanes{};

    void add(F32 x) { lanes += __builtin_convertvector(x, F64); }
    double total() const {
        double sum[kLanes];
        std::memcpy(sum, &lanes, sizeof sum);
        for (int half = kLanes / 2; half; half /= 2)
            for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
        return sum[0];
    }
};

RA_INLINE double count(I32 lanes) {  // of what decrease() was called with
    int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum -= lanes[lane];
    return static_cast<double>(sum);
}

// The sums over one strip, a lane each.
struct StripSums {
    F32 loss{}, d{}, k3{}, ratio{}, gap{}, gap_k3{}, weight{}, weight_square{}, kl{}, entropy{};
    I32 clipped_low{}, clipped_high{}, clipped_dual{};  // minus the counts
    F32 ratio_min = broadcast(kInfinity), ratio_max = broadcast(-kInfinity), weight_max = broadcast(-kInfinity);
};

// The same over a chunk.
struct ChunkSums {
    Sum loss, d, k3, ratio, gap, gap_k3, weight, weight_square, kl, entropy;
    I32 clipped_low{}, clipped_high{}, clipped_dual{};
    F32 ratio_min = broadcast(kInfinity), ratio_max = broadcast(-kInfinity), weight_max = broadcast(-kInfinity);

    void operator+=(const StripSums& s) {
        loss.add(s.loss), d.add(s.d), k3.add(s.k3), ratio.add(s.ratio), gap.add(s.gap), gap_k3.add(s.gap_k3);
        weight.add(s.weight), weight_square.add(s.weight_square), kl.add(s.kl), entropy.add(s.entropy);
        clipped_low += s.clipped_low, clipped_high += s.clipped_high, clipped_dual += s.clipped_dual;
        ratio_min = min(ratio_min, s.ratio_min), ratio_max = max(ratio_max, s.ratio_max), weight_max = max(weight_max, s.weight_max);
    }
    // Of chunks with so many counted tokens; `share` is a token's where that is the same for all, or 1.
    Partial total(double tokens, double share, bool sequence_ratio) const {
        Partial p;
        p.tokens = tokens, p.loss = loss.total() * share, p.d = d.total(), p.k3 = k3.total();
        p.ratio = sequence_ratio ? ratio.total() : tokens + p.d + p.k3;  // k3 is r - 1 - d
        p.gap = gap.total(), p.gap_k3 = gap_k3.total(), p.weight = weight.total(), p.weight_square = weight_square.total();
        p.kl = kl.total(), p.entropy = entropy.total();
        p.clipped_low = count(clipped_low), p.clipped_high = count(clipped_high), p.clipped_dual = count(clipped_dual);
        p.ratio_min = -max_lanes(-ratio_min), p.ratio_max = max_lanes(ratio_max), p.weight_max = max_lanes(weight_max);
        return p;
    }
};

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
                             p.kl / n,
                             p.entropy / n};
    std::copy(std::begin(values), std::end(values), metrics);
}

}  // namespace
}  // namespace reinforce_ada::RA_ISA
