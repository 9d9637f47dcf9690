// The numbers of a call as what the kernels of all forms compute with.
#pragma once

#include <algorithm>

#include "ops/policy_loss/policy_loss.h"

// A method that kernels call, on a GPU too.
#ifdef __CUDACC__
#define RA_IN_KERNELS __host__ __device__ __forceinline__
#else
#define RA_IN_KERNELS inline __attribute__((always_inline))
#endif

namespace reinforce_ada {

constexpr float kExponentBound = 88.3f;  // e^88.3 = 2.2e38 is the last to fit fp32, and e^-88.3 becomes zero

// What becomes of rollout weights.
struct Weighing {
    Correction correction;
    float low, high, scale;
    bool allow_missing;

    RA_IN_KERNELS bool of_sequences() const {
        return correction == Correction::sequence_truncate || correction == Correction::sequence_mask;
    }
    RA_IN_KERNELS bool truncates() const { return correction == Correction::token_truncate || correction == Correction::sequence_truncate; }
};

struct Settings {
    Loss loss;
    bool spread;                         // ratios are of sequences, their gradient goes to all tokens alike
    float low, high, dual, ratio_bound;  // bounds of the ratio; of the loss for negative advantages; of a log-ratio
    Weighing weighing;
    Kl kl;
    bool straight_through, kl_weighted;
    float kl_coef, kl_bound, entropy_coef;
    bool by_sequence;  // the share of a token is divided by the tokens of its sequence
};

inline double number_of(const PolicyLossNumbers& numbers, Number which) { return numbers[static_cast<std::size_t>(which)]; }

inline Settings settings_of(const PolicyLossNumbers& numbers) {
    const auto number = [&](Number which) { return number_of(numbers, which); };
    const auto real = [&](Number which) { return static_cast<float>(number(which)); };
    const auto yes = [&](Number which) { return number(which) != 0; };
    return {static_cast<Loss>(number(Number::loss)),
            yes(Number::sequence_ratio),
            static_cast<float>(1 - number(Number::clip_low)),
            static_cast<float>(1 + number(Number::clip_high)),
            real(Number::dual_clip),
            std::min(real(Number::log_ratio_bound), kExponentBound),
            {static_cast<Correction>(number(Number::correction)), real(Number::correction_low), real(Number::correction_high),
             real(Number::correction_scale), yes(Number::allow_missing)},
            static_cast<Kl>(number(Number::kl)),
            yes(Number::straight_through),
            yes(Number::kl_weighted),
            real(Number::kl_coef),
            real(Number::kl_bound),
            real(Number::entropy_coef),
            static_cast<LossAgg>(number(Number::loss_agg)) == LossAgg::seq_mean_token_mean};
}

}  // namespace reinforce_ada
