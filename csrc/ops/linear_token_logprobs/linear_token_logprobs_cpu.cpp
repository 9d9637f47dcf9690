#include <algorithm>
#include <memory>

#include "common/parallel.h"
#include "common/simd.h"
#include "ops/linear_token_logprobs/linear_token_logprobs.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

// The accumulators of a tile and the vectors of one step fill the registers: 8 x 3 + 3 of 32, or 4 x 3 + 3 of 16, leaving one for a
// weight. 24 fused multiply-adds then wait for 3 + 8 loads.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileVectors = 3;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
constexpr int kPanel = kTileVectors * kLanes;

// Rows of the weight that stay in the L2 cache while every panel passes over them.
constexpr int64_t kStripBytes = 192 * 1024;

// A panel's place in the packed hidden states, and how many tokens and vectors it has.
struct Panel {
    const float* data;
    int64_t first;
    int tokens, vectors;
};

Panel panel_at(const float* packed, int64_t index, int64_t num_tokens, int64_t width) {
    const int64_t first = index * kPanel;
    const int tokens = static_cast<int>(std::min<int64_t>(kPanel, num_tokens - first));
    return {packed + first * width, first, tokens, (tokens + kLanes - 1) / kLanes};
}

int64_t panels_of(int64_t num_tokens) { return (num_tokens + kPanel - 1) / kPanel; }

template <class T>
void pack_panel(const T* hidden, int64_t width, int64_t row_stride, const Panel& panel, float* out) {
    const int columns = panel.vectors * kLanes;
    for (int t = 0; t < columns; ++t) {
        const T* row = hidden + (panel.first + t) * row_stride;
        int64_t d = 0;
        if (t < panel.tokens)
            for (; d + kLanes <= width; d += kLanes) {
                const F32 v = load(row + d);
                for (int lane = 0; lane < kLanes; ++lane) out[(d + lane) * columns + t] = v[lane];
            }
        for (; d < width; ++d) out[d * columns + t] = t < panel.tokens ? load_one(row + d) : 0.0f;
    }
}

typedef float F4 __attribute__((vector_size(16)));
typedef std::int32_t I4 __attribute__((vector_size(16)));

RA_INLINE F4 load4(const float* p) {
    F4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

RA_INLINE void store4(float* p, F4 v) { std::memcpy(p, &v, sizeof v); }

#ifdef __clang__
#define RA_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define RA_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, I4{i, j, k, l})
#endif

// tile is [rows][columns]; logits gets its transpose, `rows` values for each of `tokens`.
void store_transposed(const float* tile, int columns, int rows, int tokens, float* logits, int64_t stride) {
    if (rows == kTileRows)
        for (int t = 0; t + 4 <= tokens; t += 4)
            for (int r = 0; r < kTileRows; r += 4) {
                const float* in = tile + r * columns + t;
                const F4 a = load4(in), b = load4(in + columns), c = load4(in + 2 * columns), d = load4(in + 3 * columns);
                const F4 ab = RA_SHUFFLE(a, b, 0, 4, 1, 5), cd = RA_SHUFFLE(c, d, 0, 4, 1, 5);
                const F4 ab2 = RA_SHUFFLE(a, b, 2, 6, 3, 7), cd2 = RA_SHUFFLE(c, d, 2, 6, 3, 7);
                float* out = logits + t * stride + r;
                store4(out, RA_SHUFFLE(ab, cd, 0, 1, 4, 5));
                store4(out + stride, RA_SHUFFLE(ab, cd, 2, 3, 6, 7));
                store4(out + 2 * stride, RA_SHUFFLE(ab2, cd2, 0, 1, 4, 5));
                store4(out + 3 * stride, RA_SHUFFLE(ab2, cd2, 2, 3, 6, 7));
            }
    for (int t = rows == kTileRows ? tokens / 4 * 4 : 0; t < tokens; ++t)
        for (int r = 0; r < rows; ++r) logits[t * stride + r] = tile[r * columns + t];
}

// kTileRows rows of the weight times a panel of kVectors vectors. Rows past `rows` repeat the last one and are not stored.
template <int kVectors>
void multiply_tile(const float* weight, int64_t weight_stride, int rows, int64_t width, const Panel& panel, float* logits, int64_t stride) {
    constexpr int kColumns = kVectors * kLanes;
    const float* w[kTileRows];
    for (int r = 0; r < kTileRows; ++r) w[r] = weight + std::min(r, rows - 1) * weight_stride;
    F32 sums[kTileRows][kVectors] = {};
    for (int64_t d = 0; d < width; ++d) {
        F32 h[kVectors];
        for (int c = 0; c < kVectors; ++c) h[c] = load(panel.data + d * kColumns + c * kLanes);
        for (int r = 0; r < kTileRows; ++r) {
            const F32 x = broadcast(w[r][d]);
            for (int c = 0; c < kVectors; ++c) sums[r][c] = fma(x, h[c], sums[r][c]);
        }
    }
    float tile[kTileRows * kColumns];
    for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kVectors; ++c) store(tile + r * kColumns + c * kLanes, sums[r][c]);
    store_transposed(tile, kColumns, rows, panel.tokens, logits + panel.first * stride, stride);
}

template <int kVectors>
void multiply_strip(const float* weight, int64_t weight_stride, int64_t rows, int64_t width, const Panel& panel, float* logits,
                    int64_t stride) {
    for (int64_t r = 0; r < rows; r += kTileRows)
        multiply_tile<kVectors>(weight + r * weight_stride, weight_stride, static_cast<int>(std::min<int64_t>(kTileRows, rows - r)), width,
                                panel, logits + r, stride);
}

using Multiply = void (*)(const float*, int64_t, int64_t, int64_t, const Panel&, float*, int64_t);
constexpr Multiply kMultiply[] = {multiply_strip<1>, multiply_strip<2>, multiply_strip<3>};

template <class T>
void widen_rows(const T* weight, int64_t rows, int64_t width, int64_t stride, float* out) {
    for (int64_t r = 0; r < rows; ++r) {
        const T* in = weight + r * stride;
        int64_t d = 0;
        for (; d + kLanes <= width; d += kLanes) store(out + r * width + d, load(in + d));
        for (; d < width; ++d) out[r * width + d] = load_one(in + d);
    }
}

}  // namespace

void pack_hidden(const void* hidden, int dtype, int64_t num_tokens, int64_t width, int64_t row_stride, float* packed, int num_threads) {
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        parallel_for(panels_of(num_tokens), num_tokens * width, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                const Panel panel = panel_at(packed, p, num_tokens, width);
                pack_panel(static_cast<const T*>(hidden), width, row_stride, panel, packed + panel.first * width);
            }
        });
    });
}

void linear_logits(const float* packed, const void* weight, int dtype, int64_t num_tokens, int64_t num_rows, int64_t width,
                   int64_t weight_stride, float* logits, int64_t logits_stride, int num_threads) {
    if (num_tokens == 0) return;
    const int64_t strip = std::max<int64_t>(1, kStripBytes / 4 / kTileRows / std::max<int64_t>(width, 1)) * kTileRows;
    const int64_t strips = (num_rows + strip - 1) / strip, panels = panels_of(num_tokens);
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        constexpr bool kWiden = !std::is_same_v<T, float>;
        parallel_for(strips, num_tokens * num_rows, num_threads, [&](int64_t begin, int64_t end) {
            const std::unique_ptr<float[]> wide(kWiden ? new float[static_cast<std::size_t>(strip * width)] : nullptr);
            for (int64_t s = begin; s < end; ++s) {
                const int64_t first = s * strip, rows = std::min(strip, num_rows - first);
                const T* own = static_cast<const T*>(weight) + first * weight_stride;
                if constexpr (kWiden) widen_rows(own, rows, width, weight_stride, wide.get());
                for (int64_t p = 0; p < panels; ++p) {
                    const Panel panel = panel_at(packed, p, num_tokens, width);
                    const Multiply multiply = kMultiply[panel.vectors - 1];
                    if constexpr (kWiden)
                        multiply(wide.get(), width, rows, width, panel, logits + first, logits_stride);
                    else
                        multiply(own, weight_stride, rows, width, panel, logits + first, logits_stride);
                }
            }
        });
    });
}

}  // namespace reinforce_ada::RA_ISA
