#include <algorithm>
#include <type_traits>

#include "common/launch.cuh"
#include "ops/group_advantages/group_advantages_cuda.cuh"
#include "ops/group_advantages/group_advantages_cuda.h"

namespace reinforce_ada::cuda {
namespace {

// The entry points of an element type, and their names.
template <class T>
struct Kernels {
    void (*survey_rewards)(const T*, const std::int64_t*, const std::int64_t*, std::int64_t, std::int64_t, std::int32_t, double*);
    const char* survey_name;
    void (*write)(const T*, const std::int64_t*, const std::int64_t*, std::int64_t, std::int64_t, const double*, const double*,
                  const double*, const double*, const double*, const double*, const double*, std::int32_t, std::int32_t, std::int64_t,
                  double, std::int32_t, const double*, T*);
    const char* write_name;
};

#define RA_KERNELS(name) \
    {group_advantages_survey_##name, "group_advantages_survey_" #name, group_advantages_rows_##name, "group_advantages_rows_" #name}
template <class T>
const Kernels<T> kKernels;
template <>
const Kernels<float> kKernels<float> = RA_KERNELS(float32);
template <>
const Kernels<BFloat16> kKernels<BFloat16> = RA_KERNELS(bfloat16);
template <>
const Kernels<Float16> kKernels<Float16> = RA_KERNELS(float16);
#undef RA_KERNELS

}  // namespace

std::int64_t group_advantages_workspace() { return kSurveyBlocks * kSurveyNumbers + 2; }

void group_advantages(int device, std::uintptr_t stream, const void* rewards, int dtype, const std::int64_t* order,
                      const std::int64_t* offsets, std::int64_t num_rows, std::int64_t num_segments, const double* pool_count,
                      const double* pool_mean, const double* pool_m2, const double* pool_min, const double* pool_max,
                      const double* baseline_values, const double* class_weights, int baseline, int scale, std::int64_t ddof, double eps,
                      bool keep_single, double* workspace, void* out) {
    if (num_rows == 0) return;
    const bool by_batch = static_cast<Scale>(scale) == Scale::batch, surveyed = by_batch || !order;
    double* const settled = surveyed ? workspace + kSurveyBlocks * kSurveyNumbers : nullptr;
    const Queue queue{device, stream};
    const auto shape = {Size{"num_rows", num_rows}, Size{"num_segments", num_segments}};
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const Kernels<T>& of_type = kKernels<T>;
        const T* const from = static_cast<const T*>(rewards);
        if (surveyed) {
            const std::int64_t wanted = ceil_div(std::max(by_batch ? num_rows : 1, order ? 1 : num_segments), kSurveyed);
            const std::int64_t num_parts = std::clamp(wanted, std::int64_t{1}, std::int64_t{kSurveyBlocks});
            launch(of_type.survey_rewards, {num_parts}, kSurveyThreads, queue, of_type.survey_name, shape, from, order, offsets, num_rows,
                   num_segments, by_batch, workspace);
            launch(group_advantages_settle, {1}, kSurveyBlocks, queue, "group_advantages_settle", shape, workspace,
                   static_cast<std::int32_t>(num_parts), num_rows, ddof, eps, by_batch, settled);
        }
        launch(of_type.write, {ceil_div(std::max(num_segments, std::int64_t{1}), kSegmentsOfBlock)}, kRowsThreads, queue,
               of_type.write_name, shape, from, order, offsets, num_rows, num_segments, pool_count, pool_mean, pool_m2, pool_min, pool_max,
               baseline_values, class_weights, baseline, scale, ddof, eps, keep_single, settled, static_cast<T*>(out));
    });
}

}  // namespace reinforce_ada::cuda
