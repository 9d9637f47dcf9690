// What the advantages of a group are made of: its own moments, its pool, and the class weights.
#pragma once

#include "ops/group_advantages/group_advantages.h"
#include "ops/group_advantages/group_advantages_cpu_moments.h"

namespace reinforce_ada::RA_ISA {
namespace {

// advantage = (reward - center) * factor, then the class weight.
struct Affine {
    double center, factor;
};

struct WideAffine {
    F64 center, factor;

    Affine operator[](int64_t k) const { return {center[k], factor[k]}; }
};

struct Pool {
    const double *count, *mean, *m2, *min, *max;
};

RA_INLINE F64 divisor(F64 count, F64 m2, I64 spread, double ddof, double eps) {
    const F64 degrees = count - ddof, one = F64{} + 1.0;
    return (degrees > 0) & spread ? sqrt_each(m2 / degrees) + eps : one;
}

// What the advantages of a group need, out of its own moments and its pool.
class Rule {
  public:
    Rule(const Pool& pool, const double* values, const double* class_weights, Baseline baseline, Scale scale, int64_t ddof, double eps,
         bool keep_single)
        : pool_(pool),
          values_(values),
          weights_(class_weights),
          baseline_(baseline),
          scale_(scale),
          pooled_(pool.min && baseline != Baseline::group),
          keep_single_(keep_single),
          ddof_(static_cast<double>(ddof)),
          eps_(eps) {}

    bool needs_moments() const { return needs_squares() || !(pooled_ || baseline_ == Baseline::values); }

    bool needs_squares() const { return scale_ == Scale::group || (scale_ == Scale::pool && !pool_.min); }

    void set_batch(const Moments& m) {
        WideMoments all;
        all.set(0, m);
        batch_ = divisor(all.count(), all.m2(), all.spread(), ddof_, eps_)[0];
    }

    // For the groups g[0] to g[kWide - 1].
    RA_METHOD WideAffine operator()(const int64_t* g, const WideMoments& own) const {
        WideAffine a = baseline_ == Baseline::values ? WideAffine{gather(values_, g), F64{} + 1.0} : center(g, own);
        if (needs_squares())
            a.factor /= divisor(own.count(), own.m2(), own.spread(), ddof_, eps_);
        else if (scale_ == Scale::pool)
            a.factor /= divisor(gather(pool_.count, g), gather(pool_.m2, g), spread(g), ddof_, eps_);
        else if (scale_ == Scale::batch)
            a.factor /= batch_;
        return a;
    }

    RA_METHOD Half advantages(F64 rewards, int64_t g, const Affine& a) const {
        F64 x = (rewards - a.center) * a.factor + 0.0;  // + 0.0: an advantage of zero has no sign
        if (weights_) x *= x >= 0 ? F64{} + weights_[2 * g + 1] : F64{} + weights_[2 * g];
        return narrow(x);
    }

    RA_METHOD float advantage(double reward, int64_t g, const Affine& a) const {
        const double x = (reward - a.center) * a.factor + 0.0;
        return static_cast<float>(weights_ ? x * weights_[2 * g + (x >= 0)] : x);
    }

  private:
    RA_METHOD WideAffine center(const int64_t* g, const WideMoments& own) const {
        WideAffine a{pooled_ ? gather(pool_.mean, g) : own.mean(), F64{} + 1.0};
        // Moments of equal rewards give center == reward exactly; a pool given as numbers may be off by rounding.
        if (pooled_) a.factor = spread(g) ? a.factor : F64{};
        if (baseline_ == Baseline::leave_one_out || keep_single_) {
            const F64 count = pooled_ ? gather(pool_.count, g) : own.count();
            // r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
            if (baseline_ == Baseline::leave_one_out) a.factor *= count > 1 ? count / (count - 1) : F64{};
            if (keep_single_) a = {count <= 1 ? F64{} : a.center, count <= 1 ? F64{} + 1.0 : a.factor};
        }
        return a;
    }

    RA_METHOD I64 spread(const int64_t* g) const { return gather(pool_.min, g) != gather(pool_.max, g); }

    Pool pool_;
    const double *values_, *weights_;
    Baseline baseline_;
    Scale scale_;
    bool pooled_, keep_single_;
    double ddof_, eps_, batch_ = 1;
};

// Rewards and advantages of a call, fp32.
struct Rows {
    const float* rewards;
    float* out;
    int64_t count;
};

}  // namespace
}  // namespace reinforce_ada::RA_ISA
