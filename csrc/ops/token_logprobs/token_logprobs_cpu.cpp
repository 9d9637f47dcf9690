#include <cstring>

#include "common/huge_pages.h"
#include "common/logits_sweep.h"
#include "common/parallel.h"
#include "ops/token_logprobs/token_logprobs.h"

namespace reinforce_ada::RA_ISA {
namespace {

// Gradients larger than this bypass the cache: they are past the L2 cache long before anyone reads them.
constexpr std::int64_t kStreamBytes = 4 << 20;

// Columns of a gradient that are summed at a time: 4 KiB of sums.
constexpr std::int64_t kColumns = 512;

constexpr std::int64_t kStateSize = sizeof(RowState) / sizeof(double);

// The rows of one call, as its arguments describe them.
template <class T>
struct Rows {
    const void* logits;
    std::int64_t piece_size, row_stride, first_id;
    const std::int64_t* token_ids;
    const float* temperatures;
    double temperature, logit_scale, soft_cap;

    Piece<T> piece(std::int64_t t) const { return {static_cast<const T*>(logits) + t * row_stride, piece_size}; }
    Head head(std::int64_t t) const { return Head(logit_scale, soft_cap, temperatures ? temperatures[t] : temperature); }
    bool ignored(std::int64_t t) const { return token_ids[t] == kIgnored; }
    std::int64_t token(std::int64_t t) const { return token_ids[t] - first_id; }

    void add_to(RowState& state, std::int64_t t, bool with_entropy, bool with_sum_p2) const {
        if (!ignored(t)) add_piece(state, piece(t), head(t), token(t), with_entropy, with_sum_p2);
    }

    template <class Out>
    void write_gradient(std::int64_t t, const Normalizer& normalizer, double entropy, double g, double h, bool streams, Out* out) const {
        const Head head = this->head(t);
        with_constant(is_far(normalizer.anchor), [&](auto far) {
            const RowGradient<far> row(head, normalizer, entropy, g, h);
            reinforce_ada::RA_ISA::write_gradient(piece(t), head, token(t), row, h != 0, streams, out);
        });
    }
};

// sums[j] += x[j].
template <class T>
void add_row(const T* x, std::int64_t n, double* sums) {
    std::int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) add_lanes(sums + j, load(x + j));
    for (; j < n; ++j) sums[j] += load_one(x + j);
}

// Whatever the threads, each column is summed in the order of the rows.
template <class T>
void add_columns(const T* grad, std::int64_t num_tokens, std::int64_t columns, std::int64_t row_stride, double* sums, int num_threads) {
    parallel_for((columns + kColumns - 1) / kColumns, num_tokens * columns, num_threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t first = begin * kColumns; first < end * kColumns; first += kColumns) {
            const std::int64_t last = first + kColumns < columns ? first + kColumns : columns;
            for (std::int64_t t = 0; t < num_tokens; ++t) add_row(grad + t * row_stride + first, last - first, sums + first);
        }
    });
}

}  // namespace

std::int64_t first_invalid_token(const std::int64_t* token_ids, std::int64_t num_tokens, std::int64_t vocab) {
    for (std::int64_t t = 0; t < num_tokens; ++t)
        if (token_ids[t] != kIgnored && (token_ids[t] < 0 || token_ids[t] >= vocab)) return t;
    return -1;
}

void token_logprobs_forward(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t vocab, std::int64_t row_stride,
                            const std::int64_t* token_ids, const float* temperatures, double temperature, double logit_scale,
                            double soft_cap, float* logprobs, double* normalizers, float* entropy, float* sum_p2, int num_threads) {
    const Outputs out{logprobs, reinterpret_cast<Normalizer*>(normalizers), entropy, sum_p2};
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const Rows<T> rows{logits, vocab, row_stride, 0, token_ids, temperatures, temperature, logit_scale, soft_cap};
        parallel_for(num_tokens, num_tokens * vocab, num_threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t t = begin; t < end; ++t) {
                RowState state{};
                rows.add_to(state, t, entropy != nullptr, sum_p2 != nullptr);
                finish(state, out, t);
            }
        });
    });
}

void token_logprobs_add_piece(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t piece_size, std::int64_t row_stride,
                              std::int64_t first_id, const std::int64_t* token_ids, const float* temperatures, double temperature,
                              double logit_scale, double soft_cap, double* state, bool with_entropy, bool with_sum_p2, int num_threads) {
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const Rows<T> rows{logits, piece_size, row_stride, first_id, token_ids, temperatures, temperature, logit_scale, soft_cap};
        parallel_for(num_tokens, num_tokens * piece_size, num_threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t t = begin; t < end; ++t) {
                RowState row;
                std::memcpy(&row, state + t * kStateSize, sizeof row);
                rows.add_to(row, t, with_entropy, with_sum_p2);
                std::memcpy(state + t * kStateSize, &row, sizeof row);
            }
        });
    });
}

void token_logprobs_finish(const double* state, std::int64_t num_tokens, float* logprobs, double* normalizers, float* entropy,
                           float* sum_p2) {
    const Outputs out{logprobs, reinterpret_cast<Normalizer*>(normalizers), entropy, sum_p2};
    for (std::int64_t t = 0; t < num_tokens; ++t) {
        RowState row;
        std::memcpy(&row, state + t * kStateSize, sizeof row);
        finish(row, out, t);
    }
}

void token_logprobs_gradient_piece(const void* logits, int dtype, std::int64_t num_tokens, std::int64_t piece_size, std::int64_t row_stride,
                                   std::int64_t first_id, const std::int64_t* token_ids, const float* temperatures, double temperature,
                                   double logit_scale, double soft_cap, const double* normalizers, const float* entropy,
                                   const float* grad_logprobs, const float* grad_entropy, void* grad, std::int64_t grad_row_stride,
                                   double* grad_bias, int num_threads) {
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const Rows<T> rows{logits, piece_size, row_stride, first_id, token_ids, temperatures, temperature, logit_scale, soft_cap};
        const bool streams = logits != grad && num_tokens * piece_size * static_cast<std::int64_t>(sizeof(T)) > kStreamBytes;
        if (streams && num_tokens > 0) {
            const std::int64_t elements = (num_tokens - 1) * grad_row_stride + piece_size;
            advise_huge_pages(grad, static_cast<std::size_t>(elements) * sizeof(T));
        }
        with_stored_type<T>([&](auto* stored) {
            using Out = std::remove_pointer_t<decltype(stored)>;
            parallel_for(num_tokens, num_tokens * piece_size, num_threads, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t t = begin; t < end; ++t) {
                    Out* out = static_cast<Out*>(grad) + t * grad_row_stride;
                    const double g = grad_logprobs ? grad_logprobs[t] : 0, h = grad_entropy ? grad_entropy[t] : 0;
                    if (rows.ignored(t) || (g == 0 && h == 0))
                        std::memset(static_cast<void*>(out), 0, static_cast<std::size_t>(piece_size) * sizeof(T));
                    else
                        rows.write_gradient(t, {normalizers[2 * t], normalizers[2 * t + 1]}, h != 0 ? entropy[t] : 0, g, h, streams, out);
                }
                if (streams) stream_fence();
            });
        });
        if (grad_bias) add_columns(static_cast<const T*>(grad), num_tokens, piece_size, grad_row_stride, grad_bias, num_threads);
    });
}

}  // namespace reinforce_ada::RA_ISA
