// The kernels of token_logprobs_cuda.h: a block sweeps a row once (forward), or a piece of a row (gradient).
#pragma once

#include "common/device.cuh"
#include "ops/token_logprobs/token_logprobs.h"

namespace reinforce_ada::cuda {

constexpr int kForwardThreads = 512;
constexpr int kGradientThreads = 256;
constexpr int kInFlight = 4;                  // packs that a thread of the forward loads before it uses the first
constexpr int kGradientInFlight = 2;          // with 4, a soft cap would not fit the 64 registers that let four blocks run on an SM
constexpr int kPiece = kGradientThreads * 8;  // packs of a row that one block of the gradient takes
constexpr float kLowest = -3.402823466e38f;   // below every logit but -inf, whose distance to it is -inf and not NaN

// From a logit x to z = outer y; y is the logit, or the tanh of its soft cap (0: none).
struct Head {
    float logit_scale, soft_cap, inverse_cap;

    RA_DEVICE Head(float logit_scale, float soft_cap)
        : logit_scale(logit_scale), soft_cap(soft_cap), inverse_cap(soft_cap != 0 ? 1 / soft_cap : 0) {}

    RA_DEVICE bool capped() const { return soft_cap != 0; }
    RA_DEVICE float outer() const { return capped() ? soft_cap : logit_scale; }
    RA_DEVICE float y(float x) const { return capped() ? tanhf(over_cap(logit_scale * x)) : x; }
    // z / soft_cap. The quotient's remainder makes it as good as a division, whose way out for extremes would cost 40 registers; beyond
    // 16, where tanh is 1, it would only make NaN of infinity.
    RA_DEVICE float over_cap(float z) const {
        const float quotient = z * inverse_cap;
        return -16 < quotient && quotient < 16 ? fmaf(fmaf(-quotient, soft_cap, z), inverse_cap, quotient) : quotient;
    }
    // z - top, of the exact z: rounded first it would be off by 1e-6 where it reaches 30, and by 8e-6 where it reaches 200.
    RA_DEVICE float above(float top, float y) const { return fmaf(outer(), y, -top); }
};

// log2 e / temperature; NaN where the temperature is not positive and finite.
RA_DEVICE float log2_unit(float temperature) { return temperature > 0 && temperature < 3.5e38f ? kLog2E / temperature : quiet_nan(); }

RA_DEVICE float at_least(float least, float x) { return x < least ? least : x; }  // NaN stays NaN, as fmaxf would not have it

// Sums of 2^d, d 2^d and 4^d over logits met so far, d = (z - top) log2 e / temperature. The top is the largest z, or kLowest.
struct RowSums {
    float top, power, weighted, squares;
};

template <bool kMoments>
RA_DEVICE RowSums raised(const RowSums& row, float top, float unit) {
    const float shift = at_least(kVanishing, (row.top - top) * unit), down = exp2f(shift);
    if constexpr (kMoments) return {top, down * row.power, down * fmaf(shift, row.power, row.weighted), down * down * row.squares};
    return {top, down * row.power, 0, 0};
}

template <bool kMoments>
RA_DEVICE RowSums merged(const RowSums& a, const RowSums& b, float unit) {
    const float top = fmaxf(a.top, b.top);
    const RowSums p = raised<kMoments>(a, top, unit), q = raised<kMoments>(b, top, unit);
    return {top, p.power + q.power, p.weighted + q.weighted, p.squares + q.squares};
}

template <bool kMoments, int kSize>
RA_DEVICE void add(RowSums& row, const float (&x)[kSize], const Head& head, float unit) {
    float y[kSize], top = row.top;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
        y[k] = head.y(x[k]);
        top = fmaxf(top, head.outer() * y[k]);
    }
    if (top > row.top) row = raised<kMoments>(row, top, unit);
    float power = 0, weighted = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
        float d = head.above(row.top, y[k]) * unit;
        if constexpr (kMoments) d = at_least(kVanishing, d);
        const float e = exp2f(d);
        power += e;
        if constexpr (kMoments) {
            weighted = fmaf(e, d, weighted);
            squares = fmaf(e, e, squares);
        }
    }
    row.power += power;
    row.weighted += weighted;
    row.squares += squares;
}

// A row as `packs` aligned packs, with single elements before and behind them where it does not begin or end on 16 bytes.
struct Split {
    int head, packs, singles;

    template <class T>
    RA_DEVICE Split(const T* row, int size) {
        constexpr int kPack = kPackSize<T>;
        const int to_aligned = (16 - past_alignment(row)) % 16 / static_cast<int>(sizeof(T));
        head = to_aligned < size ? to_aligned : size;
        packs = (size - head) / kPack;
        singles = size - packs * kPack;
    }
    // Where the single elements are, i < singles: fewer than two packs have room for.
    template <class T>
    RA_DEVICE int single(int i) const {
        return i < head ? i : i + packs * kPackSize<T>;
    }
};

template <class T, bool kMoments>
RA_DEVICE RowSums sweep(const T* x, int vocab, const Head& head, float unit) {
    constexpr int kPack = kPackSize<T>;
    const int me = static_cast<int>(threadIdx.x);
    const Split split(x, vocab);
    RowSums row{kLowest, 0, 0, 0};
    if (me < split.singles) {
        const float single[1] = {to_float(x[split.single<T>(me)])};
        add<kMoments>(row, single, head, unit);
    }
    for (int first = me; first < split.packs; first += kInFlight * kForwardThreads) {
        Pack<T, kPack> packs[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k)
            if (first + k * kForwardThreads < split.packs)
                packs[k] = load_pack<kPack>(x + split.head + (first + k * kForwardThreads) * kPack);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            if (first + k * kForwardThreads >= split.packs) break;
            float values[kPack];
            unpack(packs[k], values);
            add<kMoments>(row, values, head, unit);
        }
    }
    return row;
}

template <class T, bool kMoments>
RA_DEVICE void forward(const T* logits, int vocab, std::int64_t row_stride, const std::int64_t* token_ids, const float* temperatures,
                       double temperature, const Head& head, float* logprobs, float* row_max, float* log2_sum, float* entropy,
                       float* sum_p2) {
    const std::int64_t t = blockIdx.x, token = token_ids[t];
    const T* const x = logits + t * row_stride;
    const double degrees = temperatures ? static_cast<double>(temperatures[t]) : temperature;
    const float unit = log2_unit(static_cast<float>(degrees));
    RowSums row{0, 1, 0, 0};
    if (token != kIgnored) {  // the same for the whole block
        row = reduce_block<kForwardThreads / kWarp>(sweep<T, kMoments>(x, vocab, head, unit),
                                                    [=](const RowSums& a, const RowSums& b) { return merged<kMoments>(a, b, unit); });
    }
    if (threadIdx.x != 0) return;
    const bool ignored = token == kIgnored;
    // In double, since these few operations meet numbers of the size of the logits: fp32 would cost 1e-5 where they reach 200.
    const double log2_power = log2(static_cast<double>(row.power)), ln2 = 0.6931471805599453;
    double logprob = ignored ? 0.0 : static_cast<double>(quiet_nan());
    if (0 <= token && token < vocab) {
        const double z = static_cast<double>(head.outer()) * head.y(to_float(x[token]));
        logprob = (z - row.top) / degrees - ln2 * log2_power;
    }
    logprobs[t] = static_cast<float>(logprob > 0 ? 0 : logprob);  // 2^x may be 1e-7 too small; NaN stays
    row_max[t] = row.top;
    log2_sum[t] = static_cast<float>(log2_power);
    if constexpr (kMoments) {
        if (entropy) entropy[t] = ignored ? 0 : static_cast<float>(ln2 * (log2_power - static_cast<double>(row.weighted) / row.power));
        if (sum_p2) sum_p2[t] = ignored ? 0 : static_cast<float>(row.squares / (static_cast<double>(row.power) * row.power));
    }
}

// The gradient in x is 2^u (constant + slope u) with u = log2 p, plus `at_token` at the token; where capped, times 1 - y^2.
struct RowGradient {
    float row_max, log2_sum, unit, constant, slope, at_token;

    template <bool kEntropy>
    RA_DEVICE float operator()(float x, const Head& head, bool is_token) const {
        const float y = head.y(x);
        float u = head.above(row_max, y) * unit - log2_sum;
        float factor = constant;
        if constexpr (kEntropy) {
            u = at_least(kVanishing, u);
            factor = fmaf(slope, u, constant);
        }
        const float grad = is_token ? fmaf(exp2f(u), factor, at_token) : exp2f(u) * factor;
        return head.capped() ? grad * fmaf(-y, y, 1.0f) : grad;
    }
};

// Packs [blockIdx.y kPiece, (blockIdx.y + 1) kPiece) of a row; the first block has the single elements too.
template <class T>
RA_DEVICE void write_zeros(T* out, int vocab) {
    constexpr int kPack = kPackSize<T>;
    const int me = static_cast<int>(threadIdx.x);
    const Split split(out, vocab);
    if (blockIdx.y == 0 && me < split.singles) out[split.single<T>(me)] = T{};
    const int begin = static_cast<int>(blockIdx.y) * kPiece, end = begin + kPiece < split.packs ? begin + kPiece : split.packs;
#pragma unroll 2
    for (int i = begin + me; i < end; i += kGradientThreads) store_pack(out + split.head + i * kPack, Pack<T, kPack>{});
}

template <class T, bool kEntropy>
RA_DEVICE void write_gradient(const T* x, T* out, int vocab, const Head& head, std::int64_t token, const RowGradient& row) {
    constexpr int kPack = kPackSize<T>;
    const int me = static_cast<int>(threadIdx.x);
    const Split split(x, vocab);
    const bool aligned = past_alignment(out) == past_alignment(x);
    if (blockIdx.y == 0 && me < split.singles) {
        const int j = split.single<T>(me);
        out[j] = from_float<T>(row.operator()<kEntropy>(to_float(x[j]), head, j == token));
    }
    const int begin = static_cast<int>(blockIdx.y) * kPiece, end = begin + kPiece < split.packs ? begin + kPiece : split.packs;
    for (int first = begin + me; first < end; first += kGradientInFlight * kGradientThreads) {
        Pack<T, kPack> packs[kGradientInFlight];
#pragma unroll
        for (int k = 0; k < kGradientInFlight; ++k)
            if (first + k * kGradientThreads < end) packs[k] = load_pack<kPack>(x + split.head + (first + k * kGradientThreads) * kPack);
#pragma unroll
        for (int k = 0; k < kGradientInFlight; ++k) {
            if (first + k * kGradientThreads >= end) break;
            const int j = split.head + (first + k * kGradientThreads) * kPack;
            float values[kPack];
            unpack(packs[k], values);
#pragma unroll
            for (int i = 0; i < kPack; ++i) values[i] = row.operator()<kEntropy>(values[i], head, j + i == token);
            if (aligned) {
                store_pack(out + j, packed<T>(values));
            } else {
#pragma unroll
                for (int i = 0; i < kPack; ++i) out[j + i] = from_float<T>(values[i]);
            }
        }
    }
}

template <class T, bool kEntropy>
RA_DEVICE void gradient(T* grad, std::int64_t grad_row_stride, const T* logits, int vocab, std::int64_t row_stride,
                        const std::int64_t* token_ids, const float* temperatures, double temperature, const Head& head,
                        const float* row_max, const float* log2_sum, const float* entropy, const float* grad_logprobs,
                        const float* grad_entropy) {
    const std::int64_t t = blockIdx.x, token = token_ids[t];
    const float g = grad_logprobs ? grad_logprobs[t] : 0.0f, h = kEntropy && grad_entropy ? grad_entropy[t] : 0.0f;
    T* const out = grad + t * grad_row_stride;
    if (token == kIgnored || (g == 0 && h == 0)) return write_zeros(out, vocab);

    const float degrees = temperatures ? temperatures[t] : static_cast<float>(temperature), dz = head.logit_scale / degrees;
    const bool wrong = g != 0 && !(0 <= token && token < vocab);
    const float h_entropy = h != 0 ? h * entropy[t] : 0.0f;
    const RowGradient row{row_max[t], log2_sum[t], log2_unit(degrees), wrong ? quiet_nan() : -dz * (g + h_entropy), -dz * h * kLn2, dz * g};
    write_gradient<T, kEntropy>(logits + t * row_stride, out, vocab, head, token, row);
}

#define RA_FORWARD(T, name, kMoments)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(kForwardThreads, 2)                                                                     \
        token_logprobs_forward_##name(const T* logits, std::int32_t vocab, std::int64_t row_stride, const std::int64_t* token_ids,       \
                                      const float* temperatures, double temperature, float logit_scale, float soft_cap, float* logprobs, \
                                      float* row_max, float* log2_sum, float* entropy, float* sum_p2) {                                  \
        forward<T, kMoments>(logits, vocab, row_stride, token_ids, temperatures, temperature, Head(logit_scale, soft_cap), logprobs,     \
                             row_max, log2_sum, entropy, sum_p2);                                                                        \
    }
#define RA_GRADIENT(T, name, kEntropy)                                                                                              \
    extern "C" __global__ void __launch_bounds__(kGradientThreads, 4) token_logprobs_gradient_##name(                               \
        T* grad, std::int64_t grad_row_stride, const T* logits, std::int32_t vocab, std::int64_t row_stride,                        \
        const std::int64_t* token_ids, const float* temperatures, double temperature, float logit_scale, float soft_cap,            \
        const float* row_max, const float* log2_sum, const float* entropy, const float* grad_logprobs, const float* grad_entropy) { \
        gradient<T, kEntropy>(grad, grad_row_stride, logits, vocab, row_stride, token_ids, temperatures, temperature,               \
                              Head(logit_scale, soft_cap), row_max, log2_sum, entropy, grad_logprobs, grad_entropy);                \
    }
#define RA_ENTRIES(T, name)             \
    RA_FORWARD(T, name, false)          \
    RA_FORWARD(T, name##_moments, true) \
    RA_GRADIENT(T, name, false)         \
    RA_GRADIENT(T, name##_entropy, true)

RA_ENTRIES(float, float32)
RA_ENTRIES(BFloat16, bfloat16)
RA_ENTRIES(Float16, float16)

#undef RA_ENTRIES
#undef RA_GRADIENT
#undef RA_FORWARD

}  // namespace reinforce_ada::cuda
