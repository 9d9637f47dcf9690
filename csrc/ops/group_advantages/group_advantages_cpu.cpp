#include <algorithm>
#include <vector>

#include "common/huge_pages.h"
#include "common/offsets.h"
#include "ops/group_advantages/group_advantages.h"
#include "ops/group_advantages/group_advantages_cpu_table.h"
#include "ops/group_advantages/group_advantages_cpu_together.h"

namespace reinforce_ada::RA_ISA {
namespace {

// Of all rewards; the blocks have shifts of their own, which join as means do.
Moments batch_moments(const float* rewards, int64_t rows, int num_threads) {
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
    std::vector<Moments> partial(static_cast<std::size_t>(blocks));
    parallel_for(blocks, rows, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t left = rows - b * kBlock;
            partial[b] = moments_of<true>(rewards + b * kBlock, std::min(kBlock, left), left);
        }
    });
    Moments total{rewards[0], 0, 0, static_cast<double>(rows)};
    for (const Moments& m : partial) {
        const double moved = m.shift - total.shift;
        total.square += m.square + moved * (2 * m.sum + moved * m.count);
        total.sum += m.sum + moved * m.count;
    }
    return total;
}

template <class From, class To>
void convert_rows(const From* from, To* to, int64_t rows, int num_threads) {
    parallel_for((rows + kBlock - 1) / kBlock, rows, num_threads, [&](int64_t begin, int64_t end) {
        convert(from + begin * kBlock, to + begin * kBlock, std::min(end * kBlock, rows) - begin * kBlock);
    });
}

}  // namespace

int64_t group_advantages(const void* rewards, int dtype, const int64_t* group_of, const int64_t* cu_seqlens, int64_t num_rows,
                         int64_t num_groups, const double* pool_count, const double* pool_mean, const double* pool_m2,
                         const double* pool_min, const double* pool_max, const double* baseline_values, const double* class_weights,
                         int baseline, int scale, int64_t ddof, double eps, bool keep_single, void* out, int num_threads) {
    if (cu_seqlens) {
        const int64_t wrong = first_wrong_offset(cu_seqlens, num_groups, num_rows);
        if (wrong >= 0) return wrong;
    }
    if (num_rows == 0) return -1;
    Rule rule({pool_count, pool_mean, pool_m2, pool_min, pool_max}, baseline_values, class_weights, static_cast<Baseline>(baseline),
              static_cast<Scale>(scale), ddof, eps, keep_single);

    const auto compute = [&](const float* from, float* to) -> int64_t {
        const Rows rows{from, to, num_rows};
        if (static_cast<Scale>(scale) == Scale::batch) rule.set_batch(batch_moments(from, num_rows, num_threads));
        if (cu_seqlens)
            (rule.needs_squares() ? packed_rows<true> : packed_rows<false>)(rule, rows, cu_seqlens, num_groups, num_threads);
        else if (!(rule.needs_squares() ? sorted_rows<true> : sorted_rows<false>)(rule, rows, group_of, num_groups, num_threads))
            return rows_in_any_order(rule, rows, group_of, num_groups, num_threads);
        return -1;
    };

    int64_t wrong = -1;
    with_element_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        advise_huge_pages(out, static_cast<std::size_t>(num_rows) * sizeof(T));
        if constexpr (std::is_same_v<T, float>) {
            wrong = compute(static_cast<const float*>(rewards), static_cast<float*>(out));
        } else {
            Scratch<float> wide(2 * num_rows);
            convert_rows(static_cast<const T*>(rewards), wide.data(), num_rows, num_threads);
            wrong = compute(wide.data(), wide.data() + num_rows);
            if (wrong < 0) convert_rows(wide.data() + num_rows, static_cast<T*>(out), num_rows, num_threads);
        }
    });
    return wrong;
}

}  // namespace reinforce_ada::RA_ISA
