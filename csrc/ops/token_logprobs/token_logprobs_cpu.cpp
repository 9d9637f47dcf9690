#include <cmath>
#include <cstring>
#include <limits>

#include "common/parallel.h"
#include "common/simd.h"
#include "ops/token_logprobs/token_logprobs.h"

namespace reinforce_ada::RA_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A block of fp32 logits is 8 KiB: when it has to be swept twice, the second sweep reads the L1 cache.
constexpr std::int64_t kBlock = 2048;

// Terms up to 2^24 times the anchor's are kept: their sum over a block stays far below 2^128, and fp32 loses no relative precision.
constexpr float kHeadroom = 24;

// Independent accumulators: an fp32 add takes 3-4 cycles and two can start in each.
constexpr int kUnroll = 4;

// u * 2^u is 0 for every u below this, also for -inf, where it would otherwise be NaN.
constexpr float kVanishing = -200;

// Gradients larger than this bypass the cache: they are past the L2 cache long before anyone reads them.
constexpr std::int64_t kStreamBytes = 4 << 20;

// d = u - anchor for u = scale x, rounded once. Without FMA the product's own rounding (1.5e-5 where u reaches 256) would stay, so
// the difference is taken first: there it is exact near the anchor. `anchor` is the one in use, to the last bit.
struct Distance {
    double anchor;
    F32 scale, offset;

    Distance(float x_anchor, float scale_of_x) : scale(broadcast(scale_of_x)) {
#ifdef __FMA__
        anchor = static_cast<float>(static_cast<double>(x_anchor) * scale_of_x);
        offset = broadcast(-static_cast<float>(anchor));
#else
        anchor = static_cast<double>(x_anchor) * scale_of_x;
        offset = broadcast(x_anchor);
#endif
    }

    F32 operator()(F32 x) const {
#ifdef __FMA__
        return fma(x, scale, offset);
#else
        return (x - offset) * scale;
#endif
    }
};

// What one sweep adds up over a row, relative to 2^anchor: 2^d, d 2^d and 4^d.
struct RowSums {
    double anchor = 0, power = 0, weighted = 0, squares = 0;

    void move_anchor(double to) {
        const double down = std::exp2(anchor - to);
        weighted = down * (weighted + (anchor - to) * power);
        power *= down;
        squares *= down * down;
        anchor = to;
    }
};

template <bool kEntropy, bool kSquares>
struct VectorSums {
    F32 power{}, weighted{}, squares{}, largest = broadcast(-kInfinity);

    RA_INLINE void add(VectorSums& sums, F32 x, const Distance& distance) {
        F32 d = distance(x);
        sums.largest = max(d, sums.largest);
        if constexpr (kEntropy) d = max(broadcast(kVanishing), d);
        const F32 power = exp2(d);
        sums.power += power;
        if constexpr (kEntropy) sums.weighted = fma(power, d, sums.weighted);
        if constexpr (kSquares) sums.squares = fma(power, power, sums.squares);
    }
};

template <class T>
float largest_in(const T* x, std::int64_t n) {
    F32 largest = broadcast(-kInfinity);
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) largest = max(load(x + i), largest);
    if (i < n) largest = max(load_first(x + i, static_cast<int>(n - i), -kInfinity), largest);
    return max_lanes(largest);
}

// Adds a block to the sums unless one of its terms is above the headroom; returns the largest d.
template <bool kEntropy, bool kSquares, class T>
float try_block(const T* x, std::int64_t n, const Distance& distance, RowSums& row) {
    using Sums = VectorSums<kEntropy, kSquares>;
    Sums sums[kUnroll];
    std::int64_t i = 0;
    for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes)
        for (int k = 0; k < kUnroll; ++k) Sums::add(sums[k], load(x + i + k * kLanes), distance);
    for (; i + kLanes <= n; i += kLanes) Sums::add(sums[0], load(x + i), distance);
    if (i < n) Sums::add(sums[0], load_first(x + i, static_cast<int>(n - i), -kInfinity), distance);

    for (int k = 1; k < kUnroll; ++k) sums[0].largest = max(sums[k].largest, sums[0].largest);
    const float largest = max_lanes(sums[0].largest);
    if (largest > kHeadroom) return largest;
    row.power += sum_lanes((sums[0].power + sums[1].power) + (sums[2].power + sums[3].power));
    if constexpr (kEntropy) row.weighted += sum_lanes((sums[0].weighted + sums[1].weighted) + (sums[2].weighted + sums[3].weighted));
    if constexpr (kSquares) row.squares += sum_lanes((sums[0].squares + sums[1].squares) + (sums[2].squares + sums[3].squares));
    return largest;
}

template <bool kEntropy, bool kSquares, class T>
RowSums sweep(const T* x, std::int64_t vocab, float scale) {
    // Finite even when the whole block is -inf, so that d is -inf there and not NaN.
    Distance distance(std::fmax(largest_in(x, vocab < kBlock ? vocab : kBlock), -1e30f / scale), scale);
    RowSums row;
    row.anchor = distance.anchor;
    for (std::int64_t i = 0; i < vocab; i += kBlock) {
        const std::int64_t n = vocab - i < kBlock ? vocab - i : kBlock;
        if (try_block<kEntropy, kSquares>(x + i, n, distance, row) > kHeadroom) {
            distance = Distance(largest_in(x + i, n), scale);
            row.move_anchor(distance.anchor);
            try_block<kEntropy, kSquares>(x + i, n, distance, row);
        }
    }
    return row;
}

struct Outputs {
    float* logprobs;
    double* log2_normalizer;
    float *entropy, *sum_p2;
};

template <class T>
void forward_row(const T* x, std::int64_t vocab, std::int64_t token, double temperature, const Outputs& out, std::int64_t t) {
    if (token == kIgnored) {
        out.logprobs[t] = 0;
        out.log2_normalizer[t] = 0;
        if (out.entropy) out.entropy[t] = 0;
        if (out.sum_p2) out.sum_p2[t] = 0;
        return;
    }
    const float scale = static_cast<float>(kLog2E / temperature);
    const RowSums row = out.entropy ? (out.sum_p2 ? sweep<true, true>(x, vocab, scale) : sweep<true, false>(x, vocab, scale))
                                    : (out.sum_p2 ? sweep<false, true>(x, vocab, scale) : sweep<false, false>(x, vocab, scale));
    const double log2_power = std::log2(row.power);
    const double log2_normalizer = row.anchor + log2_power;
    const double logprob = kLn2 * (static_cast<double>(load_one(x + token)) * scale - log2_normalizer);
    out.logprobs[t] = static_cast<float>(logprob > 0 ? 0 : logprob);  // the polynomial may be 1e-7 below 2^x; NaN stays
    out.log2_normalizer[t] = log2_normalizer;
    if (out.entropy) out.entropy[t] = static_cast<float>(kLn2 * (log2_power - row.weighted / row.power));
    if (out.sum_p2) out.sum_p2[t] = static_cast<float>(row.squares / (row.power * row.power));
}

// The gradient of a row is 2^d (constant + slope d), plus `at_token` at the token.
struct RowGradient {
    Distance distance;
    float constant, slope, at_token;
};

RowGradient row_gradient(double temperature, double log2_normalizer, double entropy, double g, double h) {
    const float scale = static_cast<float>(kLog2E / temperature);
    const Distance distance(static_cast<float>(log2_normalizer / scale), scale);
    const double rest = log2_normalizer - distance.anchor;  // p = 2^d 2^-rest, log2 p = d - rest
    const double p = -std::exp2(-rest) / temperature;
    return {distance, static_cast<float>(p * (g + h * (entropy - kLn2 * rest))), static_cast<float>(p * h * kLn2),
            static_cast<float>(g / temperature)};
}

template <bool kEntropy>
RA_INLINE F32 gradient(F32 x, const RowGradient& row) {
    F32 d = row.distance(x);
    if constexpr (!kEntropy) return exp2(d) * row.constant;
    d = max(broadcast(kVanishing), d);
    return exp2(d) * fma(d, broadcast(row.slope), broadcast(row.constant));
}

// Elements until `p` is aligned for stream(), at most n.
template <class T>
std::int64_t until_aligned(const T* p, std::int64_t n) {
    const std::uintptr_t bytes = kLanes * sizeof(T);
    const std::int64_t skip = static_cast<std::int64_t>((bytes - reinterpret_cast<std::uintptr_t>(p) % bytes) % bytes / sizeof(T));
    return skip < n ? skip : n;
}

template <bool kEntropy, bool kStream, class T>
void backward_row(const T* x, std::int64_t vocab, std::int64_t token, const RowGradient& row, T* out) {
    // Before the sweep, which may overwrite it.
    const F32 at_token = gradient<kEntropy>(broadcast(load_one(x + token)), row) + row.at_token;
    std::int64_t i = 0;
    if constexpr (kStream) {
        i = until_aligned(out, vocab);
        if (i > 0) store_first(out, gradient<kEntropy>(load_first(x, static_cast<int>(i), 0), row), static_cast<int>(i));
    }
    for (; i + kLanes <= vocab; i += kLanes) {
        const F32 value = gradient<kEntropy>(load(x + i), row);
        if constexpr (kStream)
            stream(out + i, value);
        else
            store(out + i, value);
    }
    const int rest = static_cast<int>(vocab - i);
    if (rest > 0) store_first(out + i, gradient<kEntropy>(load_first(x + i, rest, 0), row), rest);
    store_first(out + token, at_token, 1);
}

}  // namespace

std::int64_t first_invalid_token(const std::int64_t* token_ids, std::int64_t num_tokens, std::int64_t vocab) {
    for (std::int64_t t = 0; t < num_tokens; ++t)
        if (token_ids[t] != kIgnored && (token_ids[t] < 0 || token_ids[t] >= vocab)) return t;
    return -1;
}

void token_logprobs_forward(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t vocab, std::int64_t row_stride,
                            const std::int64_t* token_ids, const float* temperatures, double temperature, float* logprobs,
                            double* log2_normalizer, float* entropy, float* sum_p2, int num_threads) {
    const Outputs out{logprobs, log2_normalizer, entropy, sum_p2};
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        parallel_for(num_tokens, num_tokens * vocab, num_threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t t = begin; t < end; ++t)
                forward_row(static_cast<const T*>(logits) + t * row_stride, vocab, token_ids[t],
                            temperatures ? temperatures[t] : temperature, out, t);
        });
    });
}

void token_logprobs_backward(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t vocab, std::int64_t row_stride,
                             const std::int64_t* token_ids, const float* temperatures, double temperature, const double* log2_normalizer,
                             const float* entropy, const float* grad_logprobs, const float* grad_entropy, void* grad,
                             std::int64_t grad_row_stride, int num_threads) {
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const bool in_place = logits == grad;
        const bool streams = !in_place && num_tokens * vocab * static_cast<std::int64_t>(sizeof(T)) > kStreamBytes;
        parallel_for(num_tokens, num_tokens * vocab, num_threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t t = begin; t < end; ++t) {
                T* out = static_cast<T*>(grad) + t * grad_row_stride;
                const T* x = static_cast<const T*>(logits) + t * row_stride;
                const double g = grad_logprobs ? grad_logprobs[t] : 0, h = grad_entropy ? grad_entropy[t] : 0;
                if (token_ids[t] == kIgnored || (g == 0 && h == 0)) {
                    std::memset(static_cast<void*>(out), 0, static_cast<std::size_t>(vocab) * sizeof(T));
                    continue;
                }
                const RowGradient row =
                    row_gradient(temperatures ? temperatures[t] : temperature, log2_normalizer[t], h != 0 ? entropy[t] : 0, g, h);
                const auto write = h != 0 ? (streams ? backward_row<true, true, T> : backward_row<true, false, T>)
                                          : (streams ? backward_row<false, true, T> : backward_row<false, false, T>);
                write(x, vocab, token_ids[t], row, out);
            }
            if (streams) stream_fence();
        });
    });
}

}  // namespace reinforce_ada::RA_ISA
