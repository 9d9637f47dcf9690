// One row of logits, swept piece by piece: its running state, its results, its gradient.
//
//   z = logit_scale x, with a soft cap then soft_cap tanh(z / soft_cap), then / temperature;  p = softmax(z)
//   logprob = z[y] - log sum_j exp(z[j]),  entropy = -sum_j p[j] log p[j],  sum_p2 = sum_j p[j]^2
//   d x[j] = (g ([j == y] - p[j]) - h p[j] (log p[j] + entropy)) dz[j]/dx[j],  g, h: gradients of logprob and entropy
//
// Work is done in log2 units: u = z log2 e, whose distance to an anchor is rounded to fp32 once. log2 sum_j 2^u[j] is kept as the anchor
// and the logarithm of the sum relative to it, in double: in fp32 it would be off by 1.5e-5 where logits reach 200, and in one double the
// sum of two logits of 1e20 would be lost.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/simd.h"

namespace reinforce_ada::RA_ISA {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kLargest = std::numeric_limits<float>::max();

// A block of fp32 logits is 8 KiB: when it has to be swept twice, the second sweep reads the L1 cache.
constexpr std::int64_t kBlock = 2048;

// A block is accepted while its sum of 2^d is at most 2^24: d is then rounded to 1e-6, and fp32 loses no relative precision.
constexpr float kLargestSum = 0x1p24f;

// With an entropy a block is also swept again when the mean of its d, each with the weight 2^d, is above this: the entropy is a difference
// from that mean, and was off by up to 6e-6 where a row's first block has none of its large logits.
constexpr double kHighestMean = 2;

// Independent accumulators: an fp32 add takes 3-4 cycles and two can start in each.
constexpr int kUnroll = 4;

// u * 2^u is 0 for every u below this, also for -inf, where it would otherwise be NaN.
constexpr float kVanishing = -200;

// An anchor from here on is the u of a logit, and distances to it begin with the difference of two logits. Below, an anchor is as near to
// the largest u as fp32 has it: at 2^22 that is 0.5, but it would be 500 at 1e10, and 2^500 is no number.
constexpr double kFar = 0x1p22;

// What is known of a row after some pieces, all 0 before the first. 2^d, d 2^d and 4^d of d = u - anchor are summed over the ids met so
// far; token_u is the token's own u, and token_met is 1 once its piece has been added.
struct RowState {
    double anchor, power, weighted, squares, token_u, token_met;
};

// From a logit x to u = scale y: y = x, with a soft cap y = tanh(kTanhUnit inner x).
struct Head {
    double scale, slope;  // slope = dz/dx, with a soft cap to be multiplied by 1 - y^2
    float inner;
    bool capped;

    Head(double logit_scale, double soft_cap, double temperature)
        : scale(kLog2E * (soft_cap != 0 ? soft_cap : logit_scale) / temperature),
          slope(logit_scale / temperature),
          inner(soft_cap != 0 ? static_cast<float>(logit_scale / (soft_cap * kTanhUnit)) : 1),
          capped(soft_cap != 0) {}
};

template <bool kCapped>
RA_INLINE Pair y_of(Pair x, float inner) {
    if constexpr (kCapped) return scaled_tanh({x.first * inner, x.second * inner});
    return x;
}

template <bool kCapped>
RA_INLINE F32 y_of(F32 x, float inner) {
    return y_of<kCapped>(Pair{x, x}, inner).first;
}

// Calls body with std::true_type or std::false_type.
template <class Body>
RA_INLINE void with_constant(bool flag, const Body& body) {
    flag ? body(std::true_type{}) : body(std::false_type{});
}

// The logits of consecutive ids.
template <class T>
struct Piece {
    const T* x;
    std::int64_t size;

    bool contains(std::int64_t id) const { return 0 <= id && id < size; }
    float y(const Head& head, std::int64_t id) const {
        const F32 value = broadcast(load_one(x + id));
        return (head.capped ? y_of<true>(value, head.inner) : value)[0];
    }
};

inline bool is_far(double anchor) { return std::fabs(anchor) >= kFar; }

// d = u - anchor for u = scale y, rounded once. Without FMA the product's own rounding (1.5e-5 where u reaches 256) would stay, so
// the difference is taken first: there it is exact near the anchor. With FMA that is done for far anchors only. `anchor` is near the one
// that is asked for; it is the one in use, and asking for it finds it again. The scale's rounding to fp32 (3e-8) counts for the distance
// only: where u reaches 256 it would be 8e-6.
template <bool kIsFar>
struct Distance {
#ifdef __FMA__
    static constexpr bool kDifferenceFirst = kIsFar;
#else
    static constexpr bool kDifferenceFirst = true;
#endif
    double anchor;
    F32 scale, offset;

    Distance(double near_anchor, double exact_scale) {
        const float rounded = static_cast<float>(exact_scale);
        scale = broadcast(rounded);
        if constexpr (kDifferenceFirst) {
            // With a tiny scale the normalizer may be further off than any logit.
            const double exact_y = rounded == 0 ? 0 : near_anchor / exact_scale;
            const float y = static_cast<float>(std::isfinite(near_anchor) ? std::clamp(exact_y, -kLargest, kLargest) : near_anchor);
            anchor = y * exact_scale;
            offset = broadcast(0.5f * y);
            scale *= 2.0f;
        } else {
            const double exactness = rounded == 0 ? 1 : exact_scale / rounded;
            const float product = static_cast<float>(near_anchor / exactness);
            anchor = product * exactness;
            offset = broadcast(-product);
        }
    }

    F32 operator()(F32 y) const {
        if constexpr (kDifferenceFirst)
            return (0.5f * y - offset) * scale;  // of halves, whose difference is never infinite
        else
            return fma(y, scale, offset);
    }
};

// The largest scale y of a block, not below `least`.
template <bool kCapped, class T>
float largest(const T* x, std::int64_t n, float inner, float scale, float least) {
    F32 most = broadcast(least);
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) most = max(y_of<kCapped>(load(x + i), inner) * scale, most);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        const F32 u = y_of<kCapped>(load_first(x + i, rest, 0), inner) * scale;
        most = max(keep_first(u, rest, -kInfinity), most);
    }
    return max_lanes(most);
}

// An anchor for a block: its largest u. Where that is far it is exactly the u of a logit, whatever fp32 makes of the product. When all are
// -inf it is a finite one with a finite y, so that their distance to it is -inf and not NaN.
template <bool kCapped, class T>
double anchor_of(const T* x, std::int64_t n, const Head& head) {
    const float scale = static_cast<float>(head.scale);
    const float u = largest<kCapped>(x, n, head.inner, scale, std::fmax(-1e30f, -1e38f * std::fabs(scale)));
    if (!is_far(u)) return u;
    const float sign = scale < 0 ? -1.0f : 1.0f, y = sign * largest<kCapped>(x, n, head.inner, sign, -kInfinity);
    return std::isfinite(y) ? y * head.scale : u;
}

template <bool kEntropy, bool kSquares>
struct VectorSums {
    F32 power{}, weighted{}, squares{};

    RA_INLINE void add(VectorSums& sums, F32 d) {
        if constexpr (kEntropy) d = max(broadcast(kVanishing), d);
        if constexpr (!kExp2Overflows) d = min(broadcast(127), d);
        const Factors factors = exp2_factors(d);
        sums.power = fma(factors.power, factors.mantissa, sums.power);
        if constexpr (kEntropy || kSquares) {
            const F32 power = factors.power * factors.mantissa;
            if constexpr (kEntropy) sums.weighted = fma(power, d, sums.weighted);
            if constexpr (kSquares) sums.squares = fma(power, power, sums.squares);
        }
    }
};

struct BlockSums {
    double power, weighted, squares;
};

template <bool kCapped, bool kEntropy, bool kSquares, bool kIsFar, class T>
BlockSums sum_block(const T* x, std::int64_t n, float inner, const Distance<kIsFar>& distance) {
    using Sums = VectorSums<kEntropy, kSquares>;
    Sums sums[kUnroll];
    const auto d = [&](F32 x) { return distance(y_of<kCapped>(x, inner)); };
    std::int64_t i = 0;
    for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
        prefetch_ahead<kUnroll * kLanes>(x + i);
        for (int k = 0; k < kUnroll; k += 2) {
            const Pair y = y_of<kCapped>(load_pair(x + i + k * kLanes), inner);
            Sums::add(sums[k], distance(y.first));
            Sums::add(sums[k + 1], distance(y.second));
        }
    }
    for (; i + kLanes <= n; i += kLanes) Sums::add(sums[0], d(load(x + i)));
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        Sums::add(sums[0], keep_first(d(load_first(x + i, rest, 0)), rest, -kInfinity));
    }
    return {sum_lanes((sums[0].power + sums[1].power) + (sums[2].power + sums[3].power)),
            kEntropy ? sum_lanes((sums[0].weighted + sums[1].weighted) + (sums[2].weighted + sums[3].weighted)) : 0,
            kSquares ? sum_lanes((sums[0].squares + sums[1].squares) + (sums[2].squares + sums[3].squares)) : 0};
}

inline void move_anchor(RowState& row, double to) {
    const double down = row.power == 0 ? 0 : std::exp2(row.anchor - to);
    row.weighted = down * (row.weighted + (row.anchor - to) * row.power);
    row.power *= down;
    row.squares *= down * down;
    row.anchor = to;
}

// Moves the anchor a little, to one that distances can be taken to, and sums a block relative to it.
template <bool kCapped, bool kEntropy, bool kSquares, class T>
BlockSums sum_relative_to(double anchor, const T* x, std::int64_t n, const Head& head, RowState& row) {
    BlockSums sums;
    with_constant(is_far(anchor), [&](auto far) {
        const Distance<far> distance(anchor, head.scale);
        if (distance.anchor != row.anchor) move_anchor(row, distance.anchor);
        sums = sum_block<kCapped, kEntropy, kSquares>(x, n, head.inner, distance);
    });
    return sums;
}

template <bool kCapped, bool kEntropy, bool kSquares, class T>
void add_block(const T* x, std::int64_t n, const Head& head, RowState& row) {
    const auto sums_from = [&](double anchor) { return sum_relative_to<kCapped, kEntropy, kSquares>(anchor, x, n, head, row); };
    // Before anything is above 0 (the first block, or all -inf so far) any anchor is as good as another.
    BlockSums sums = sums_from(row.power == 0 ? anchor_of<kCapped>(x, n, head) : row.anchor);
    if (!(sums.power <= kLargestSum && sums.weighted <= kHighestMean * sums.power)) sums = sums_from(anchor_of<kCapped>(x, n, head));
    row.power += sums.power;
    row.weighted += sums.weighted;
    row.squares += sums.squares;
}

template <bool kCapped, bool kEntropy, bool kSquares, class T>
void add_blocks(const Piece<T>& piece, const Head& head, RowState& row) {
    for (std::int64_t begin = 0; begin < piece.size; begin += kBlock)
        add_block<kCapped, kEntropy, kSquares>(piece.x + begin, std::min(kBlock, piece.size - begin), head, row);
}

// Adds a piece; `token` is counted from the piece's first id.
template <class T>
void add_piece(RowState& row, const Piece<T>& piece, const Head& head, std::int64_t token, bool with_entropy, bool with_sum_p2) {
    with_constant(head.capped, [&](auto capped) {
        with_constant(with_entropy, [&](auto entropy) {
            with_constant(with_sum_p2, [&](auto squares) { add_blocks<capped, entropy, squares>(piece, head, row); });
        });
    });
    if (!piece.contains(token)) return;
    row.token_u = static_cast<double>(piece.y(head, token)) * head.scale;
    row.token_met = 1;
}

// log2 sum_j 2^u[j] = anchor + log2_power.
struct Normalizer {
    double anchor, log2_power;
};

// Where the results of rows go; entropy and sum_p2 may be null.
struct Outputs {
    float* logprobs;
    Normalizer* normalizers;
    float *entropy, *sum_p2;
};

// An ignored row has no state, and its results are 0; a row that is all -inf has an anchor.
inline void finish(const RowState& row, const Outputs& out, std::int64_t t) {
    const bool ignored = row.anchor == 0 && row.power == 0;
    const double log2_power = std::log2(row.power);
    const double from_anchor = row.token_u - row.anchor - log2_power;
    const double logprob = row.token_met != 0 ? kLn2 * from_anchor : std::numeric_limits<double>::quiet_NaN();
    const auto result = [&](double value) { return ignored ? 0 : static_cast<float>(value); };
    out.logprobs[t] = result(logprob > 0 ? 0 : logprob);  // the polynomial may be 1e-7 below 2^x; NaN stays
    out.normalizers[t] = ignored ? Normalizer{0, 0} : Normalizer{row.anchor, log2_power};
    if (out.entropy) out.entropy[t] = result(kLn2 * (log2_power - row.weighted / row.power));
    if (out.sum_p2) out.sum_p2[t] = result(row.squares / (row.power * row.power));
}

// The gradient of a row is 2^d (constant + slope d), plus `at_token` at the token; with a soft cap times 1 - y^2.
template <bool kIsFar>
struct RowGradient {
    Distance<kIsFar> distance;
    float constant, slope, at_token;

    // Distances are to the normalizer, where what counts is near 0; from a far anchor 2^d sums to its own power.
    RowGradient(const Head& head, const Normalizer& normalizer, double entropy, double g, double h)
        : distance(kIsFar ? normalizer.anchor : normalizer.anchor + normalizer.log2_power, head.scale) {
        const double rest = normalizer.anchor - distance.anchor + normalizer.log2_power;  // p = 2^d 2^-rest, log2 p = d - rest
        const double p = -std::exp2(-rest) * head.slope;
        constant = static_cast<float>(p * (g + h * (entropy - kLn2 * rest)));
        slope = static_cast<float>(p * h * kLn2);
        at_token = static_cast<float>(g * head.slope);
    }
};

template <bool kCapped, bool kEntropy, bool kIsFar>
RA_INLINE F32 gradient(F32 y, const RowGradient<kIsFar>& row) {
    F32 d = row.distance(y);
    F32 factor = broadcast(row.constant);
    if constexpr (kEntropy) {
        d = max(broadcast(kVanishing), d);
        factor = fma(d, broadcast(row.slope), factor);
    }
    if constexpr (kCapped) factor *= 1.0f - y * y;
    return exp2(d) * factor;
}

// Elements until `p` is aligned for stream_pair(), at most n.
template <class T>
std::int64_t until_aligned(const T* p, std::int64_t n) {
    const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(p) % sizeof(F32);
    const std::int64_t skip = past == 0 ? 0 : static_cast<std::int64_t>((sizeof(F32) - past) / sizeof(T));
    return skip < n ? skip : n;
}

// Writes the gradient of a piece; `token` is counted from the piece's first id. `out` may be the logits.
template <bool kCapped, bool kEntropy, bool kIsFar, class T, class Out>
void write_gradient(const Piece<T>& piece, const Head& head, std::int64_t token, const RowGradient<kIsFar>& row, bool streams, Out* out) {
    const T* const x = piece.x;
    const std::int64_t n = piece.size;
    const bool here = piece.contains(token);
    const float y_token = here ? piece.y(head, token) : 0;  // before the sweep, which may overwrite it

    // Copies: for all that the compiler knows, a store to `out` changes what a reference refers to.
    const auto of = [row = row](F32 y) { return gradient<kCapped, kEntropy>(y, row); };
    const auto of_pair = [of, x, inner = head.inner](std::int64_t i) {
        prefetch_ahead<2 * kLanes>(x + i);
        const Pair y = y_of<kCapped>(load_pair(x + i), inner);
        return Pair{of(y.first), of(y.second)};
    };
    const auto write_few = [&](std::int64_t i, std::int64_t end) {
        for (; i + kLanes <= end; i += kLanes) store(out + i, of(y_of<kCapped>(load(x + i), head.inner)));
        const int rest = static_cast<int>(end - i);
        if (rest > 0) store_first(out + i, of(y_of<kCapped>(load_first(x + i, rest, 0), head.inner)), rest);
    };
    std::int64_t i = streams ? until_aligned(out, n) : 0;
    if (streams) {
        write_few(0, i);
        for (; i + 2 * kLanes <= n; i += 2 * kLanes) stream_pair(out + i, of_pair(i));
    } else {
        for (; i + 2 * kLanes <= n; i += 2 * kLanes) store_pair(out + i, of_pair(i));
    }
    write_few(i, n);

    if (!here) return;
    const float at_token = kCapped ? row.at_token * (1 - y_token * y_token) : row.at_token;
    store_first(out + token, gradient<kCapped, kEntropy>(broadcast(y_token), row) + at_token, 1);
}

template <bool kIsFar, class T, class Out>
void write_gradient(const Piece<T>& piece, const Head& head, std::int64_t token, const RowGradient<kIsFar>& row, bool with_entropy,
                    bool streams, Out* out) {
    with_constant(head.capped, [&](auto capped) {
        with_constant(with_entropy, [&](auto entropy) { write_gradient<capped, entropy>(piece, head, token, row, streams, out); });
    });
}

}  // namespace reinforce_ada::RA_ISA
