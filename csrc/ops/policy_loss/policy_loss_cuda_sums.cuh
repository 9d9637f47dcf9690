// What is summed over the tokens: by a thread in fp32, by a block in double, and over all blocks.
#pragma once

#include "ops/policy_loss/policy_loss_cuda_terms.cuh"

namespace reinforce_ada::cuda {

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

RA_DEVICE double merged_parts(int part, double a, double b) {
    if (part < kSums) return a + b;
    return part == kRatioMin ? (a < b || a != a ? a : b) : (a > b || a != a ? a : b);
}

}  // namespace reinforce_ada::cuda
