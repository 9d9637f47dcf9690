// group_advantages on a GPU: what group_advantages.h says, a warp for each segment of rows. Nothing waits for the device, nothing is
// allocated. Wrong offsets (not from 0, falling, not to num_rows) give NaN everywhere, and nothing outside the tensors is read.
//
// Entry points, for T = float32, bfloat16, float16; all of C linkage:
//
//   group_advantages_survey_T         a look at all rewards and, without order, at all offsets, in parts
//     const T* rewards, const i64* order, const i64* offsets, i64 num_rows, i64 num_segments,
//     i32 by_batch, f64* parts
//     grid (at most 256), blocks of 256; parts [grid, 3]: sum and sum of squares of r - rewards[0] (0 unless by_batch), how many
//     offsets are wrong
//   group_advantages_settle           what the parts make together
//     const f64* parts, i32 num_parts, i64 num_rows, i64 ddof, f64 eps, i32 by_batch, f64* settled
//     grid (1), blocks of 256; settled [2]: the divisor of all advantages (1 unless by_batch), how many offsets are wrong
//   group_advantages_rows_T
//     const T* rewards, const i64* order, const i64* offsets, i64 num_rows, i64 num_segments, const f64* pool_count,
//     const f64* pool_mean, const f64* pool_m2, const f64* pool_min, const f64* pool_max, const f64* baseline_values,
//     const f64* class_weights, i32 baseline, i32 scale, i64 ddof, f64 eps, i32 keep_single, const f64* settled, T* out
//     grid (ceil(max(num_segments, 1) / 8)), blocks of 256; settled may be null: divisor 1 and no offset wrong
#pragma once

#include <cstdint>

namespace reinforce_ada::cuda {

constexpr int kSurveyBlocks = 256;  // at most
constexpr int kSurveyNumbers = 3;   // of each block

// Doubles that group_advantages works in, whatever it is given.
std::int64_t group_advantages_workspace();

// Segment s has the rows order[offsets[s]] up to order[offsets[s + 1]], or with order null the rows offsets[s] up to offsets[s + 1].
// Its number is that of its group wherever something is given a group. With `order`, offsets may leave rows out, whose `out` is left
// alone; without, they are the caller's own and looked at. The rest as in group_advantages.h, workspace [group_advantages_workspace()].
void group_advantages(int device, std::uintptr_t stream, const void* rewards, int dtype, const std::int64_t* order,
                      const std::int64_t* offsets, std::int64_t num_rows, std::int64_t num_segments, const double* pool_count,
                      const double* pool_mean, const double* pool_m2, const double* pool_min, const double* pool_max,
                      const double* baseline_values, const double* class_weights, int baseline, int scale, std::int64_t ddof, double eps,
                      bool keep_single, double* workspace, void* out);

}  // namespace reinforce_ada::cuda
