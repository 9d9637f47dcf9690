// The tensors of a call, by quads of tokens: which are read, which are kept, and of which sequence each is.
#pragma once

#include "common/device.cuh"
#include "ops/policy_loss/policy_loss_settings.h"

namespace reinforce_ada::cuda {

constexpr int kQuad = 4;  // tokens of one access: 16 bytes in fp32
constexpr int kSequenceNumbers = 4;

// One tensor with a value a token.
struct Stream {
    const void* data;
    DType dtype;

    RA_DEVICE explicit operator bool() const { return data != nullptr; }
};

template <class T>
RA_DEVICE void read_quad(const T* p, int count, float (&values)[kQuad]) {
    if (count == kQuad && past_alignment(p) % (kQuad * static_cast<int>(sizeof(T))) == 0) return unpack(load_pack<kQuad>(p), values);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) values[k] = k < count ? to_float(p[k]) : 0.0f;
}

// Tokens [at, at + count), the rest 0; zeros where the tensor is not there.
RA_DEVICE void read_quad(const Stream& stream, std::int64_t at, int count, float (&values)[kQuad]) {
    if (!stream) count = 0;
    if (stream.dtype == DType::float32)
        read_quad(static_cast<const float*>(stream.data) + at, count, values);
    else if (stream.dtype == DType::bfloat16)
        read_quad(static_cast<const BFloat16*>(stream.data) + at, count, values);
    else
        read_quad(static_cast<const Float16*>(stream.data) + at, count, values);
}

template <class T>
RA_DEVICE void write_quad(T* p, int count, const float (&values)[kQuad]) {
    if (count == kQuad && past_alignment(p) % (kQuad * static_cast<int>(sizeof(T))) == 0) return store_pack(p, packed<T>(values));
#pragma unroll
    for (int k = 0; k < kQuad; ++k)
        if (k < count) p[k] = from_float<T>(values[k]);
}

RA_DEVICE void write_quad(void* data, DType dtype, std::int64_t at, int count, const float (&values)[kQuad]) {
    if (dtype == DType::float32)
        write_quad(static_cast<float*>(data) + at, count, values);
    else if (dtype == DType::bfloat16)
        write_quad(static_cast<BFloat16*>(data) + at, count, values);
    else
        write_quad(static_cast<Float16*>(data) + at, count, values);
}

// The mask, a byte or a float a token: bit k for token at + k.
struct Kept {
    const void* data;
    bool is_float;

    RA_DEVICE unsigned bits(std::int64_t at, int count) const {
        unsigned kept = 0;
        if (is_float) {
            float values[kQuad];
            read_quad(static_cast<const float*>(data) + at, count, values);
#pragma unroll
            for (int k = 0; k < kQuad; ++k) kept |= static_cast<unsigned>(values[k] != 0) << k;
            return kept;
        }
        const auto* const p = static_cast<const std::uint8_t*>(data) + at;
        if (count == kQuad && past_alignment(p) % kQuad == 0) {
            const std::uint32_t bytes = load_pack<kQuad>(p).words[0];
#pragma unroll
            for (int k = 0; k < kQuad; ++k) kept |= static_cast<unsigned>((bytes >> 8 * k & 255) != 0) << k;
            return kept;
        }
#pragma unroll
        for (int k = 0; k < kQuad; ++k)
            if (k < count) kept |= static_cast<unsigned>(p[k] != 0) << k;
        return kept;
    }
};

// Which tokens a sequence has.
struct Layout {
    const std::int64_t* cu_seqlens;  // null: each has `width`
    std::int64_t num_tokens, num_sequences, width;

    RA_DEVICE std::int64_t begin(std::int64_t i) const { return cu_seqlens ? cu_seqlens[i] : i * width; }
    RA_DEVICE std::int64_t end(std::int64_t i) const { return begin(i + 1); }
    RA_DEVICE bool is_wrong(std::int64_t i) const {
        return begin(i) < 0 || begin(i) > end(i) || end(i) > num_tokens || (i == 0 && begin(i) != 0) ||
               (i == num_sequences - 1 && end(i) != num_tokens);
    }
    // The sequence of a token, which is one of low, low + 1, ..., high.
    RA_DEVICE std::int64_t find(std::int64_t token, std::int64_t low, std::int64_t high) const {
        if (!cu_seqlens) return token / width;
        while (low < high) {
            const std::int64_t middle = (low + high + 1) / 2;
            if (cu_seqlens[middle] <= token)
                low = middle;
            else
                high = middle - 1;
        }
        return low;
    }
    RA_DEVICE int count(std::int64_t at) const { return num_tokens - at < kQuad ? static_cast<int>(num_tokens - at) : kQuad; }
};

RA_DEVICE bool ratio_of_sequence(const Settings& s) { return s.spread || s.loss == Loss::gspo; }

// What the tokens of a sequence have in common.
struct Sequence {
    float advantage, share, log_ratio, weight, extra;
};

struct Inputs {
    Stream logprobs, old, rollout, ref, entropy;
    const float* advantages;
    bool advantages_per_token;
    Kept mask;
    Layout layout;
    const double *totals, *sequences;

    RA_DEVICE Sequence sequence(std::int64_t i, const Settings& s, bool with_extra) const {
        const double* const of = sequences + kSequenceNumbers * i;
        const double tokens = of[0] > 1 ? of[0] : 1.0;
        return {advantages_per_token ? 0.0f : advantages[i], s.by_sequence ? static_cast<float>(1 / tokens) : 1.0f,
                ratio_of_sequence(s) ? static_cast<float>(of[1]) : 0.0f, s.weighing.of_sequences() ? static_cast<float>(of[2]) : 0.0f,
                with_extra ? static_cast<float>(of[3] / tokens) : 0.0f};
    }
};

struct Quad {
    float logp[kQuad], old[kQuad], rollout[kQuad], ref[kQuad], entropy[kQuad], advantage[kQuad];
    unsigned kept;

    RA_DEVICE Quad(const Inputs& in, std::int64_t at, int count) {
        kept = in.mask.bits(at, count);
        read_quad(in.logprobs, at, count, logp);
        read_quad(in.old, at, count, old);
        read_quad(in.rollout, at, count, rollout);
        read_quad(in.ref, at, count, ref);
        read_quad(in.entropy, at, count, entropy);
        read_quad(Stream{in.advantages, DType::float32}, at, in.advantages_per_token ? count : 0, advantage);
    }
};

}  // namespace reinforce_ada::cuda
