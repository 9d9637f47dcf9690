#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "ops/linear_token_logprobs/linear_token_logprobs.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

// The accumulators of a tile and the vectors of one step fill the registers: 8 x 3 + 3 of 32, or 4 x 3 + 3 of 16, leaving one for a
// weight. 24 fused multiply-adds then wait for 3 + 8 loads.
constexpr int kTileRows = RA_BY_ISA(8, 4, 4), kTileVectors = RA_BY_ISA(3, 3, 2);
constexpr int kPanel = kTileVectors * kLanes;

// Rows of the weight that stay in the L2 cache while every panel passes over them.
constexpr int64_t kStripBytes = 192 * 1024;

// Rows of the weight that are summed into grad_hidden before its tile is written back.
constexpr int64_t kDepth = 192;

// Floats of dz that are laid out by tiles at a time: 384 KiB, beside a panel of the hidden states in the L2 cache.
constexpr int64_t kPackedTiles = 96 * 1024;

// Rows to fetch ahead in each so many steps of a product.
constexpr int64_t kFetchRows = 2, kFetchSteps = 16;

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

// Rows of the weight and what belongs to them.
struct Rows {
    const float *weight, *bias;
    int64_t stride, count, width;

    Rows from(int64_t first, int64_t most) const {
        return {weight + first * stride, bias ? bias + first : nullptr, stride, std::min(most, count - first), width};
    }
};

// kTileRows rows of the weight times a panel of kVectors vectors. Rows that are missing repeat the last one and are not stored.
template <int kVectors>
void multiply_tile(const Rows& rows, const Panel& panel, float* logits, int64_t stride) {
    constexpr int kColumns = kVectors * kLanes;
    const float* w[kTileRows];
    F32 sums[kTileRows][kVectors];
    for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = std::min<int64_t>(r, rows.count - 1);
        w[r] = rows.weight + row * rows.stride;
        for (int c = 0; c < kVectors; ++c) sums[r][c] = broadcast(rows.bias ? rows.bias[row] : 0.0f);
    }
    for (int64_t d = 0; d < rows.width; ++d) {
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
    store_transposed(tile, kColumns, static_cast<int>(rows.count), panel.tokens, logits + panel.first * stride, stride);
}

template <int kVectors>
void multiply_strip(const Rows& rows, const Panel& panel, float* logits, int64_t stride) {
    for (int64_t r = 0; r < rows.count; r += kTileRows) multiply_tile<kVectors>(rows.from(r, kTileRows), panel, logits + r, stride);
}

using Multiply = void (*)(const Rows&, const Panel&, float*, int64_t);
constexpr Multiply kMultiply[] = {multiply_strip<1>, multiply_strip<2>, multiply_strip<3>};

// Where the factors of a tile of the gradients lie: factor (k, r), of row r at step k, at data[k * step + r * row_step].
struct TileFactors {
    const float* data;
    int64_t step, row_step;
};

// Rows that the next panel will pack, a few of them at a time between the steps of a product. Waiting for all of them when they are
// packed takes a sixth of the time (grad_hidden of 96 tokens, V = 60000, D = 896: 82 GFLOP/s, 97 to 99 with this).
class Ahead {
  public:
    Ahead() = default;
    template <class T>
    Ahead(const T* rows, int64_t count, int64_t stride, int columns)
        : next_(reinterpret_cast<const char*>(rows)),
          stride_(stride * static_cast<int64_t>(sizeof(T))),
          count_(count),
          bytes_(columns * static_cast<int64_t>(sizeof(T))) {}

    void fetch(int64_t rows) {
        for (; rows > 0 && count_ > 0; --rows, --count_, next_ += stride_)
            for (int64_t b = 0; b < bytes_; b += 64) __builtin_prefetch(next_ + b, 0, 2);
    }

  private:
    const char* next_ = nullptr;
    int64_t stride_ = 0, count_ = 0, bytes_ = 0;
};

// out [rows, columns] += sum over k of factor (k, row) x panel[k], in a register tile; `=` where it is the `first`.
template <int kVectors, bool kAhead, class T>
void multiply_add(const TileFactors& factors, const float* panel, int64_t depth, int rows, int columns, bool first, T* out, int64_t stride,
                  Ahead& ahead) {
    constexpr int kColumns = kVectors * kLanes;
    const float* x[kTileRows];
    for (int r = 0; r < kTileRows; ++r) x[r] = factors.data + std::min(r, rows - 1) * factors.row_step;
    // What the sums are added to comes from memory, in stretches too short for the hardware to foresee.
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < kVectors; ++c) __builtin_prefetch(out + r * stride + c * kLanes, 1);
    F32 sums[kTileRows][kVectors] = {};
    const int64_t steps = kAhead ? kFetchSteps : depth;
    for (int64_t begin = 0; begin < depth; begin += steps) {
        if constexpr (kAhead) ahead.fetch(kFetchRows);
        for (int64_t k = begin, end = std::min(depth, begin + steps); k < end; ++k) {
            F32 v[kVectors];
            for (int c = 0; c < kVectors; ++c) v[c] = load(panel + k * kColumns + c * kLanes);
            for (int r = 0; r < kTileRows; ++r) {
                const F32 factor = broadcast(x[r][k * factors.step]);
                for (int c = 0; c < kVectors; ++c) sums[r][c] = fma(factor, v[c], sums[r][c]);
            }
        }
    }
    const int last = columns - (kVectors - 1) * kLanes;  // columns in the last vector
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < kVectors; ++c) {
            T* to = out + r * stride + c * kLanes;
            if (c + 1 < kVectors || last == kLanes)
                store(to, first ? sums[r][c] : load(to) + sums[r][c]);
            else
                store_first(to, first ? sums[r][c] : load_first(to, last, 0) + sums[r][c], last);
        }
}

template <bool kAhead, class T>
auto multiply_add_of(int columns) {
    constexpr auto most = multiply_add<kTileVectors, kAhead, T>;
    return columns > 2 * kLanes ? most : columns > kLanes ? multiply_add<2, kAhead, T> : multiply_add<1, kAhead, T>;
}

// Columns [first, first + columns) of rows, in vectors, the last one filled up with 0.
template <class T>
void pack_columns(const T* rows, int64_t count, int64_t stride, int64_t first, int columns, float* panel) {
    const int vectors = (columns + kLanes - 1) / kLanes, last = columns - (vectors - 1) * kLanes;
    for (int64_t k = 0; k < count; ++k)
        for (int c = 0; c < vectors; ++c, panel += kLanes) {
            const T* from = rows + k * stride + first + c * kLanes;
            store(panel, c + 1 < vectors || last == kLanes ? load(from) : load_first(from, last, 0));
        }
}

// Columns [first, first + rows) of dz, tile by tile: [tiles][tokens][kTileRows].
void pack_tiles(const float* dz, int64_t dz_stride, int64_t tokens, int64_t first, int64_t rows, float* out) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const int n = static_cast<int>(std::min<int64_t>(kTileRows, rows - r));
        const float* from = dz + first + r;
        for (int64_t t = 0; t < tokens; ++t, out += kTileRows)
            for (int i = 0; i < n; ++i) out[i] = from[t * dz_stride + i];
    }
}

// Whole tiles of rows with `columns` floats each: about `floats` in all, and not more than there are.
int64_t rows_of_strip(int64_t floats, int64_t columns, int64_t num_rows) {
    const int64_t fit = floats / kTileRows / std::max<int64_t>(columns, 1), all = (num_rows + kTileRows - 1) / kTileRows;
    return std::max<int64_t>(1, std::min(fit, all)) * kTileRows;
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

void linear_logits(const float* packed, const void* weight, int dtype, const float* bias, int64_t num_tokens, int64_t num_rows,
                   int64_t width, int64_t weight_stride, float* logits, int64_t logits_stride, int num_threads) {
    const int64_t strip = rows_of_strip(kStripBytes / 4, width, num_rows);
    const int64_t strips = (num_rows + strip - 1) / strip, panels = panels_of(num_tokens);
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        constexpr bool kWiden = !std::is_same_v<T, float>;
        parallel_for(strips, num_tokens * num_rows, num_threads, [&](int64_t begin, int64_t end) {
            std::vector<float> wide(kWiden ? static_cast<std::size_t>(strip * width) : 0);
            for (int64_t s = begin; s < end; ++s) {
                const int64_t first = s * strip;
                Rows rows{nullptr, bias ? bias + first : nullptr, width, std::min(strip, num_rows - first), width};
                const T* own = static_cast<const T*>(weight) + first * weight_stride;
                if constexpr (kWiden) {
                    for (int64_t r = 0; r < rows.count; ++r) convert(own + r * weight_stride, wide.data() + r * width, width);
                    rows.weight = wide.data();
                } else {
                    rows.weight = own, rows.stride = weight_stride;
                }
                for (int64_t p = 0; p < panels; ++p) {
                    const Panel panel = panel_at(packed, p, num_tokens, width);
                    kMultiply[panel.vectors - 1](rows, panel, logits + first, logits_stride);
                }
            }
        });
    });
}

void linear_grad_hidden(const float* dz, int64_t dz_stride, const void* weight, int dtype, int64_t num_tokens, int64_t num_rows,
                        int64_t width, int64_t weight_stride, float* grad_hidden, int num_threads) {
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const T* rows = static_cast<const T*>(weight);
        // A thread has columns to itself, and so every sum.
        parallel_for((width + kPanel - 1) / kPanel, num_tokens * num_rows, num_threads, [&](int64_t begin, int64_t end) {
            std::vector<float> panel(static_cast<std::size_t>(kDepth * kPanel));
            for (int64_t k = 0; k < num_rows; k += kDepth) {
                const int64_t depth = std::min(kDepth, num_rows - k);
                for (int64_t p = begin; p < end; ++p) {
                    const int columns = static_cast<int>(std::min<int64_t>(kPanel, width - p * kPanel));
                    const auto multiply = multiply_add_of<true, float>(columns);
                    // The next panel, or of the next rows the first.
                    const bool same = p + 1 < end;
                    const int64_t next = same ? k : std::min(k + kDepth, num_rows);
                    Ahead ahead(rows + next * weight_stride + (same ? p + 1 : begin) * kPanel, std::min(kDepth, num_rows - next),
                                weight_stride, kPanel);
                    pack_columns(rows + k * weight_stride, depth, weight_stride, p * kPanel, columns, panel.data());
                    for (int64_t t = 0; t < num_tokens; t += kTileRows)
                        multiply({dz + t * dz_stride + k, 1, dz_stride}, panel.data(), depth,
                                 static_cast<int>(std::min<int64_t>(kTileRows, num_tokens - t)), columns, false,
                                 grad_hidden + t * width + p * kPanel, width, ahead);
                }
            }
        });
    });
}

void linear_grad_weight(const float* dz, int64_t dz_stride, const void* hidden, int dtype, int64_t num_tokens, int64_t num_rows,
                        int64_t width, int64_t hidden_stride, void* grad_weight, bool first, int num_threads) {
    const int64_t strip = rows_of_strip(kPackedTiles, num_tokens, num_rows);
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        parallel_for((num_rows + strip - 1) / strip, num_tokens * num_rows, num_threads, [&](int64_t begin, int64_t end) {
            Ahead nothing;
            std::vector<float> tiles(static_cast<std::size_t>(strip * num_tokens)), panel(static_cast<std::size_t>(num_tokens * kPanel));
            for (int64_t s = begin; s < end; ++s) {
                const int64_t rows = std::min(strip, num_rows - s * strip);
                pack_tiles(dz, dz_stride, num_tokens, s * strip, rows, tiles.data());
                for (int64_t d = 0; d < width; d += kPanel) {
                    const int columns = static_cast<int>(std::min<int64_t>(kPanel, width - d));
                    const auto multiply = multiply_add_of<false, T>(columns);
                    pack_columns(static_cast<const T*>(hidden), num_tokens, hidden_stride, d, columns, panel.data());
                    for (int64_t r = 0; r < rows; r += kTileRows)
                        multiply({tiles.data() + r * num_tokens, kTileRows, 1}, panel.data(), num_tokens,
                                 static_cast<int>(std::min<int64_t>(kTileRows, rows - r)), columns, first,
                                 static_cast<T*>(grad_weight) + (s * strip + r) * width + d, width, nothing);
                }
            }
        });
    });
}

}  // namespace reinforce_ada::RA_ISA
