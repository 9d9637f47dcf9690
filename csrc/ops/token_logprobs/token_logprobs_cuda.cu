#include <algorithm>
#include <type_traits>

#include "common/launch.cuh"
#include "ops/token_logprobs/token_logprobs_cuda.cuh"
#include "ops/token_logprobs/token_logprobs_cuda.h"

namespace reinforce_ada::cuda {
namespace {

constexpr std::int64_t kMostLogits = std::int64_t{1} << 28;  // of a row; its elements are counted in 32 bits

// The entry points of an element type, and their names.
template <class T>
struct Kernels {
    void (*forward[2])(const T*, std::int32_t, std::int64_t, const std::int64_t*, const float*, double, float, float, float*, float*,
                       float*, float*, float*);
    const char* forward_names[2];
    void (*gradient[2])(T*, std::int64_t, const T*, std::int32_t, std::int64_t, const std::int64_t*, const float*, double, float, float,
                        const float*, const float*, const float*, const float*, const float*);
    const char* gradient_names[2];
};

#define RA_KERNELS(name)                                                            \
    {{token_logprobs_forward_##name, token_logprobs_forward_##name##_moments},      \
     {"token_logprobs_forward_" #name, "token_logprobs_forward_" #name "_moments"}, \
     {token_logprobs_gradient_##name, token_logprobs_gradient_##name##_entropy},    \
     {"token_logprobs_gradient_" #name, "token_logprobs_gradient_" #name "_entropy"}}
template <class T>
const Kernels<T> kKernels;
template <>
const Kernels<float> kKernels<float> = RA_KERNELS(float32);
template <>
const Kernels<BFloat16> kKernels<BFloat16> = RA_KERNELS(bfloat16);
template <>
const Kernels<Float16> kKernels<Float16> = RA_KERNELS(float16);
#undef RA_KERNELS

std::int32_t checked(std::int64_t vocab) {
    if (vocab > kMostLogits)
        throw std::invalid_argument("token_logprobs: a vocabulary of " + std::to_string(vocab) + "; at most " +
                                    std::to_string(kMostLogits));
    return static_cast<std::int32_t>(vocab);
}

// The logits' factor over the temperature is all that counts: what the factor loses in fp32, 1e-5 where logits reach 400, goes there.
double settled(double temperature, double logit_scale, double soft_cap) {
    const double factor = soft_cap != 0 ? soft_cap : logit_scale, rounded = static_cast<float>(factor);
    return rounded != 0 ? temperature * (rounded / factor) : temperature;
}

}  // namespace

void token_logprobs_forward(int device, std::uintptr_t stream, const void* logits, int dtype, std::int64_t num_tokens, std::int64_t vocab,
                            std::int64_t row_stride, const std::int64_t* token_ids, const float* temperatures, double temperature,
                            double logit_scale, double soft_cap, float* logprobs, float* row_max, float* log2_sum, float* entropy,
                            float* sum_p2) {
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const Kernels<T>& of_type = kKernels<T>;
        const int moments = entropy || sum_p2;
        launch(of_type.forward[moments], {num_tokens}, kForwardThreads, {device, stream}, of_type.forward_names[moments],
               {{"num_tokens", num_tokens}, {"vocab", vocab}, {"row_stride", row_stride}}, static_cast<const T*>(logits), checked(vocab),
               row_stride, token_ids, temperatures, settled(temperature, logit_scale, soft_cap), static_cast<float>(logit_scale),
               static_cast<float>(soft_cap), logprobs, row_max, log2_sum, entropy, sum_p2);
    });
}

void token_logprobs_gradient(int device, std::uintptr_t stream, void* grad, std::int64_t grad_row_stride, const void* logits, int dtype,
                             std::int64_t num_tokens, std::int64_t vocab, std::int64_t row_stride, const std::int64_t* token_ids,
                             const float* temperatures, double temperature, double logit_scale, double soft_cap, const float* row_max,
                             const float* log2_sum, const float* entropy, const float* grad_logprobs, const float* grad_entropy) {
    with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const Kernels<T>& of_type = kKernels<T>;
        const int with_entropy = grad_entropy != nullptr;
        const std::int64_t pieces = std::max(ceil_div(vocab, kPiece * kPackSize<T>), std::int64_t{1});
        launch(of_type.gradient[with_entropy], {num_tokens, pieces}, kGradientThreads, {device, stream},
               of_type.gradient_names[with_entropy],
               {{"num_tokens", num_tokens}, {"vocab", vocab}, {"row_stride", row_stride}, {"grad_row_stride", grad_row_stride}},
               static_cast<T*>(grad), grad_row_stride, static_cast<const T*>(logits), checked(vocab), row_stride, token_ids, temperatures,
               settled(temperature, logit_scale, soft_cap), static_cast<float>(logit_scale), static_cast<float>(soft_cap), row_max,
               log2_sum, entropy, grad_logprobs, grad_entropy);
    });
}

}  // namespace reinforce_ada::cuda
