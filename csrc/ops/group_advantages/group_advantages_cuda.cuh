// The kernels of group_advantages_cuda.h.
#pragma once

#include "common/device.cuh"
#include "ops/group_advantages/group_advantages.h"
#include "ops/group_advantages/group_advantages_cuda.h"

namespace reinforce_ada::cuda {

constexpr int kSurveyThreads = 256;
constexpr int kSurveyed = 4 * kSurveyThreads;  // rows or offsets that a block takes, until there are kSurveyBlocks of them
constexpr int kRowsThreads = 256;
constexpr int kSegmentsOfBlock = kRowsThreads / kWarp;

// Sums of r - shift, where shift is one of the summed rewards: equal rewards then give sum = square = 0 exactly, and the centred second
// moment square - sum^2 / count loses at most a factor `count` to cancellation.
struct Sums {
    double sum, square;

    RA_DEVICE void add(double d) {
        sum += d;
        square += d * d;
    }
};

struct Survey {
    Sums rewards;
    double wrong;
};

RA_DEVICE Survey operator+(const Survey& a, const Survey& b) {
    return {{a.rewards.sum + b.rewards.sum, a.rewards.square + b.rewards.square}, a.wrong + b.wrong};
}

struct Moments {
    double count, mean, m2;
    bool spread;

    RA_DEVICE Moments(double shift, const Sums& sums, double count) : count(count) {
        mean = shift + sums.sum / count;
        m2 = sums.square - sums.sum * sums.sum / count;
        if (m2 < 0) m2 = 0;
        spread = sums.square != 0;
    }
};

RA_DEVICE double divisor(double count, double m2, bool spread, double ddof, double eps) {
    const double degrees = count - ddof;
    return degrees > 0 && spread ? sqrt(m2 / degrees) + eps : 1.0;
}

template <class T>
RA_DEVICE void survey(const T* rewards, const std::int64_t* order, const std::int64_t* offsets, std::int64_t num_rows,
                      std::int64_t num_segments, bool by_batch, double* parts) {
    const std::int64_t me = static_cast<std::int64_t>(blockIdx.x) * kSurveyThreads + threadIdx.x,
                       all = static_cast<std::int64_t>(gridDim.x) * kSurveyThreads;
    Survey own{};
    if (by_batch) {
        const double shift = to_float(rewards[0]);
        for (std::int64_t i = me; i < num_rows; i += all) own.rewards.add(to_float(rewards[i]) - shift);
    }
    if (!order) {
        if (me == 0) own.wrong = (offsets[0] != 0) + (offsets[num_segments] != num_rows);
        for (std::int64_t s = me; s < num_segments; s += all) own.wrong += offsets[s] > offsets[s + 1];
    }
    own = reduce_block<kSurveyThreads / kWarp>(own, [](const Survey& a, const Survey& b) { return a + b; });
    if (threadIdx.x != 0) return;
    double* const part = parts + kSurveyNumbers * static_cast<std::int64_t>(blockIdx.x);
    part[0] = own.rewards.sum, part[1] = own.rewards.square, part[2] = own.wrong;
}

extern "C" __global__ void __launch_bounds__(kSurveyBlocks)
    group_advantages_settle(const double* parts, std::int32_t num_parts, std::int64_t num_rows, std::int64_t ddof, double eps,
                            std::int32_t by_batch, double* settled) {
    Survey all{};
    if (static_cast<int>(threadIdx.x) < num_parts) {
        const double* const part = parts + kSurveyNumbers * static_cast<std::int64_t>(threadIdx.x);
        all = {{part[0], part[1]}, part[2]};
    }
    all = reduce_block<kSurveyBlocks / kWarp>(all, [](const Survey& a, const Survey& b) { return a + b; });
    if (threadIdx.x != 0) return;
    const Moments batch(0, all.rewards, static_cast<double>(num_rows));
    settled[0] = by_batch ? divisor(batch.count, batch.m2, batch.spread, static_cast<double>(ddof), eps) : 1.0;
    settled[1] = all.wrong;
}

// What the advantages are made with beside the rewards.
struct Rule {
    const double *count, *mean, *m2, *min, *max;  // of pools; min null: the pool is the group
    const double *values, *weights;
    Baseline baseline;
    Scale scale;
    double ddof, eps;
    bool keep_single;

    RA_DEVICE bool pooled() const { return min && baseline != Baseline::group; }
    RA_DEVICE bool pool_spreads(std::int64_t g) const { return min[g] != max[g]; }
    RA_DEVICE bool needs_moments() const {
        return scale == Scale::group || (scale == Scale::pool && !min) || !(pooled() || baseline == Baseline::values);
    }
};

// advantage = (reward - center) * factor, then the class weight.
struct Affine {
    double center, factor;
};

RA_DEVICE Affine centered(const Rule& rule, std::int64_t g, const Moments& own) {
    if (rule.baseline == Baseline::values) return {rule.values[g], 1.0};
    Affine a{rule.pooled() ? rule.mean[g] : own.mean, 1.0};
    // Moments of equal rewards give center == reward exactly; a pool given as numbers may be off by rounding.
    if (rule.pooled() && !rule.pool_spreads(g)) a.factor = 0;
    if (rule.baseline == Baseline::leave_one_out || rule.keep_single) {
        const double count = rule.pooled() ? rule.count[g] : own.count;
        // r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
        if (rule.baseline == Baseline::leave_one_out) a.factor *= count > 1 ? count / (count - 1) : 0.0;
        if (rule.keep_single && count <= 1) a = {0.0, 1.0};
    }
    return a;
}

RA_DEVICE Affine affine(const Rule& rule, std::int64_t g, const Moments& own, double batch) {
    Affine a = centered(rule, g, own);
    if (rule.scale == Scale::group || (rule.scale == Scale::pool && !rule.min))
        a.factor /= divisor(own.count, own.m2, own.spread, rule.ddof, rule.eps);
    else if (rule.scale == Scale::pool)
        a.factor /= divisor(rule.count[g], rule.m2[g], rule.pool_spreads(g), rule.ddof, rule.eps);
    else if (rule.scale == Scale::batch)
        a.factor /= batch;
    return a;
}

RA_DEVICE std::int64_t within(std::int64_t x, std::int64_t most) { return x < 0 ? 0 : x > most ? most : x; }

// A warp writes the rows of a segment. Every lane reads and writes every 32nd.
template <class T>
RA_DEVICE void write_rows(const T* rewards, const std::int64_t* order, std::int64_t begin, std::int64_t end, std::int64_t g,
                          const Rule& rule, double batch, T* out) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto row = [=](std::int64_t i) { return order ? order[i] : i; };
    Sums sums{0, 0};
    const double shift = to_float(rewards[row(begin)]);
    if (rule.needs_moments()) {
        for (std::int64_t i = begin + lane; i < end; i += kWarp) sums.add(to_float(rewards[row(i)]) - shift);
        sums = reduce_lanes<kWarp>(sums, [](const Sums& a, const Sums& b) { return Sums{a.sum + b.sum, a.square + b.square}; });
    }
    const Affine a = affine(rule, g, Moments(shift, sums, static_cast<double>(end - begin)), batch);
    for (std::int64_t i = begin + lane; i < end; i += kWarp) {
        const std::int64_t r = row(i);
        double x = (to_float(rewards[r]) - a.center) * a.factor + 0.0;  // + 0.0: an advantage of zero has no sign
        if (rule.weights) x *= rule.weights[2 * g + (x >= 0)];
        out[r] = from_float<T>(static_cast<float>(x));
    }
}

template <class T>
RA_DEVICE void rows(const T* rewards, const std::int64_t* order, const std::int64_t* offsets, std::int64_t num_rows,
                    std::int64_t num_segments, const Rule& rule, const double* settled, T* out) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const std::int64_t g = static_cast<std::int64_t>(blockIdx.x) * kSegmentsOfBlock + warp;
    if (settled && settled[1] != 0) {  // wrong offsets: the warps share the rows out evenly
        const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * kSegmentsOfBlock, share = (num_rows + warps - 1) / warps;
        const std::int64_t end = within((g + 1) * share, num_rows);
        for (std::int64_t i = g * share + lane; i < end; i += kWarp) out[i] = from_float<T>(quiet_nan());
        return;
    }
    if (g >= num_segments) return;
    const std::int64_t begin = within(offsets[g], num_rows), end = within(offsets[g + 1], num_rows);
    if (begin < end) write_rows(rewards, order, begin, end, g, rule, settled ? settled[0] : 1.0, out);
}

#define RA_ENTRIES(T, name)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(kSurveyThreads)                                                                        \
        group_advantages_survey_##name(const T* rewards, const std::int64_t* order, const std::int64_t* offsets, std::int64_t num_rows, \
                                       std::int64_t num_segments, std::int32_t by_batch, double* parts) {                               \
        survey(rewards, order, offsets, num_rows, num_segments, by_batch != 0, parts);                                                  \
    }                                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(kRowsThreads) group_advantages_rows_##name(                                            \
        const T* rewards, const std::int64_t* order, const std::int64_t* offsets, std::int64_t num_rows, std::int64_t num_segments,     \
        const double* pool_count, const double* pool_mean, const double* pool_m2, const double* pool_min, const double* pool_max,       \
        const double* baseline_values, const double* class_weights, std::int32_t baseline, std::int32_t scale, std::int64_t ddof,       \
        double eps, std::int32_t keep_single, const double* settled, T* out) {                                                          \
        const Rule rule{pool_count,                                                                                                     \
                        pool_mean,                                                                                                      \
                        pool_m2,                                                                                                        \
                        pool_min,                                                                                                       \
                        pool_max,                                                                                                       \
                        baseline_values,                                                                                                \
                        class_weights,                                                                                                  \
                        static_cast<Baseline>(baseline),                                                                                \
                        static_cast<Scale>(scale),                                                                                      \
                        static_cast<double>(ddof),                                                                                      \
                        eps,                                                                                                            \
                        keep_single != 0};                                                                                              \
        rows(rewards, order, offsets, num_rows, num_segments, rule, settled, out);                                                      \
    }

RA_ENTRIES(float, float32)
RA_ENTRIES(BFloat16, bfloat16)
RA_ENTRIES(Float16, float16)

#undef RA_ENTRIES

}  // namespace reinforce_ada::cuda
