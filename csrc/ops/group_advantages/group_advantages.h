// Advantages of completions against their group's or pool's rewards: segmented sums in double, then one sweep over the rows.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace reinforce_ada {

// Codes shared with ops/group_advantages/cpu.py.
enum class Baseline : int { pool, group, leave_one_out, values };
enum class Scale : int { none, pool, group, batch };

// out[i] = (rewards[i] - baseline) / (std + eps) * class weight, i in [0, num_rows).
//   rewards, out   [num_rows] of `dtype`
//   group_of       [num_rows], or nullptr where cu_seqlens [num_groups + 1] says which rows a group has
//   num_groups     -1: one more than the largest group_of
//   pool_*         [num_groups] each, of them those that baseline and scale read; pool_min nullptr: the pool is the group
//   baseline_values [num_groups], read for Baseline::values only
//   class_weights  [num_groups, 2]: of advantages < 0, of the others; nullptr: none
//   keep_single    a reward that is alone in what its baseline comes from: its baseline is 0 (else its advantage is)
// Returns -1, or the first index at which group_of or cu_seqlens is wrong (out is then not to be used).
RA_DECLARE_KERNEL(std::int64_t group_advantages(const void* rewards, int dtype, const std::int64_t* group_of,
                                                const std::int64_t* cu_seqlens, std::int64_t num_rows, std::int64_t num_groups,
                                                const double* pool_count, const double* pool_mean, const double* pool_m2,
                                                const double* pool_min, const double* pool_max, const double* baseline_values,
                                                const double* class_weights, int baseline, int scale, std::int64_t ddof, double eps,
                                                bool keep_single, void* out, int num_threads))

}  // namespace reinforce_ada
