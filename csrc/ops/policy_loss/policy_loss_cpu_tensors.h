// The tensors of a call: each is read in fp32 and in whole vectors, whatever it is kept in.
#pragma once

#include <cstring>

#include "common/dtype.h"
#include "common/simd_masks.h"
#include "ops/policy_loss/policy_loss_settings.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

constexpr int64_t kStrip = 32 * kLanes;     // tokens between two additions to the double sums: 32 additions in fp32 a lane
constexpr int64_t kRoom = kStrip + kLanes;  // of a strip in a buffer: the last vector may be written whole

// The last strip of a chunk goes through buffers unless it fills its vectors, so that every vector is read and written whole.
RA_INLINE bool is_whole(int64_t count) { return count % kLanes == 0; }

// One tensor with a value a token.
struct Stream {
    const void* data;
    DType dtype;

    explicit operator bool() const { return data != nullptr; }

    // Tokens [at, at + count) in fp32, to be read in whole vectors: the tensor itself, or a copy of it in `room`.
    const float* values(int64_t at, int64_t count, float* room) const {
        if (!data) return nullptr;
        if (dtype == DType::float32 && is_whole(count)) return static_cast<const float*>(data) + at;
        if (dtype == DType::float32)
            copy(room, static_cast<const float*>(data) + at, count);
        else if (dtype == DType::bfloat16)
            copy(room, static_cast<const BFloat16*>(data) + at, count);
        else
            copy(room, static_cast<const Float16*>(data) + at, count);
        return room;
    }

  private:
    template <class T>
    static void copy(float* room, const T* p, int64_t count) {
        int64_t at = 0;
        for (; at + kLanes <= count; at += kLanes) store(room + at, load(p + at));
        if (at < count) store(room + at, load_first(p + at, static_cast<int>(count - at), 0.0f));
    }
};

// A gradient that is computed in fp32 and kept in its own type.
struct Output {
    void* data;
    DType dtype;

    explicit operator bool() const { return data != nullptr; }

    // Where the values of tokens [at, at + count) are to be put before they are handed to keep().
    float* target(int64_t at, int64_t count, float* room) const {
        return dtype == DType::float32 && is_whole(count) ? static_cast<float*>(data) + at : room;
    }
    void keep(int64_t at, const float* values, int64_t count) const {
        if (dtype == DType::bfloat16)
            convert(values, static_cast<BFloat16*>(data) + at, count);
        else if (dtype == DType::float16)
            convert(values, static_cast<Float16*>(data) + at, count);
        else if (!is_whole(count))
            convert(values, static_cast<float*>(data) + at, count);
    }
};

// The mask: a byte or a float a token.
struct Kept {
    const void* data;
    bool is_float;

    // Of tokens [at, at + count), as a byte each, 0 behind them.
    const std::uint8_t* bytes(int64_t at, int64_t count, std::uint8_t* room) const {
        const auto* p = static_cast<const std::uint8_t*>(data) + at;
        if (!is_float && is_whole(count)) return p;
        std::memset(room + count / kLanes * kLanes, 0, kLanes);
        if (is_float)
            for (int64_t k = 0; k < count; ++k) room[k] = static_cast<const float*>(data)[at + k] != 0.0f;
        else
            std::memcpy(room, p, static_cast<std::size_t>(count));
        return room;
    }

    int64_t count(int64_t begin, int64_t end) const {
        if (!is_float) return count_bytes(static_cast<const std::uint8_t*>(data) + begin, end - begin);
        int64_t sum = 0;
        for (int64_t k = begin; k < end; ++k) sum += static_cast<const float*>(data)[k] != 0.0f;
        return sum;
    }

  private:
    static int64_t count_bytes(const std::uint8_t* p, int64_t count) {
        typedef std::uint8_t Bytes __attribute__((vector_size(64)));
        int64_t sum = 0;
        while (count >= 64) {
            Bytes counts{};
            for (int turn = 0; turn < 255 && count >= 64; ++turn, p += 64, count -= 64) {
                Bytes bytes;
                std::memcpy(&bytes, p, 64);
                counts -= (Bytes)(bytes != 0);  // true is 255: a lane counts up to 255 of them
            }
            for (int lane = 0; lane < 64; ++lane) sum += counts[lane];
        }
        for (; count >= 8; p += 8, count -= 8) {
            std::uint64_t word;
            std::memcpy(&word, p, 8);
            constexpr std::uint64_t kSeven = 0x7f7f7f7f7f7f7f7f;
            sum += __builtin_popcountll((((word & kSeven) + kSeven) | word) & ~kSeven);  // the high bit of every byte that is not 0
        }
        for (; count > 0; ++p, --count) sum += *p != 0;
        return sum;
    }
};

struct Inputs {
    Stream logp, old, rollout, ref, entropy;
    Stream token_advantages;
    const float* advantages;  // of sequences; nullptr where they are of tokens
    Kept mask;
    const int64_t* cu_seqlens;
    int64_t width;

    int64_t begin(int64_t sequence) const { return cu_seqlens ? cu_seqlens[sequence] : sequence * width; }
    int64_t end(int64_t sequence) const { return begin(sequence + 1); }
};

// Buffers of one thread for one strip.
struct Room {
    float logp[kRoom], old[kRoom], rollout[kRoom], ref[kRoom], entropy[kRoom], advantage[kRoom], share[kRoom], log_ratio[kRoom];
    float weight[kRoom], through[kRoom], extra[kRoom], grad[kRoom], grad_entropy[kRoom];
    std::uint8_t mask[kRoom];
};

// Up to kStrip tokens, all in fp32. What is not given is nullptr.
struct Strip {
    int64_t count;
    const std::uint8_t* mask;
    const float *logp, *old, *rollout, *ref, *entropy, *advantage;
    const float *share, *log_ratio, *weight, *extra;  // of their sequence
    float *grad, *grad_entropy, *through;
};

// kLanes neighbouring tokens.
struct Block {
    int64_t at;
    Mask keep;

    RA_METHOD F32 read(const float* p) const {  // 0 where the mask is
#if defined(__AVX512F__)
        return _mm512_maskz_loadu_ps(keep, p + at);
#else
        return select(keep, load(p + at), F32{});
#endif
    }
    RA_METHOD void write(float* p, F32 x) const { store(p + at, x); }
};

template <class Body>
RA_INLINE void for_blocks(const std::uint8_t* mask, int64_t count, Body&& body) {
    for (int64_t at = 0; at < count; at += kLanes) body(Block{at, read_mask(mask + at)});
}

}  // namespace
}  // namespace reinforce_ada::RA_ISA
