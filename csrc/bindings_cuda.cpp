#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "common/bind.h"
#include "common/cuda_build.h"
#include "ops/group_advantages/group_advantages_cuda.h"
#include "ops/policy_loss/policy_loss_cuda.h"
#include "ops/token_logprobs/token_logprobs_cuda.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict build_info() {
    py::dict info;
    py::list architectures;
    std::istringstream words(reinforce_ada::cuda::architectures());
    for (std::string word; words >> word;) architectures.append(word);
    info["compiler"] = reinforce_ada::cuda::compiler();
    info["architectures"] = architectures;
    info["emulated"] = reinforce_ada::cuda::emulated();
    return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    using namespace reinforce_ada;
    using release_gil = py::call_guard<py::gil_scoped_release>;

    m.def("build_info", &build_info);
    m.def("unusable_device", &cuda::unusable_device, "index"_a, release_gil());

    // token_logprobs
    m.def("token_logprobs_forward", of_addresses(cuda::token_logprobs_forward), "device"_a, "stream"_a, "logits"_a, "dtype"_a,
          "num_tokens"_a, "vocab"_a, "row_stride"_a, "token_ids"_a, "temperatures"_a, "temperature"_a, "logit_scale"_a, "soft_cap"_a,
          "logprobs"_a, "row_max"_a, "log2_sum"_a, "entropy"_a, "sum_p2"_a, release_gil());
    m.def("token_logprobs_gradient", of_addresses(cuda::token_logprobs_gradient), "device"_a, "stream"_a, "grad"_a, "grad_row_stride"_a,
          "logits"_a, "dtype"_a, "num_tokens"_a, "vocab"_a, "row_stride"_a, "token_ids"_a, "temperatures"_a, "temperature"_a,
          "logit_scale"_a, "soft_cap"_a, "row_max"_a, "log2_sum"_a, "entropy"_a, "grad_logprobs"_a, "grad_entropy"_a, release_gil());

    // group_advantages
    m.def("group_advantages_workspace", &cuda::group_advantages_workspace);
    m.def("group_advantages", of_addresses(cuda::group_advantages), "device"_a, "stream"_a, "rewards"_a, "dtype"_a, "order"_a, "offsets"_a,
          "num_rows"_a, "num_segments"_a, "pool_count"_a, "pool_mean"_a, "pool_m2"_a, "pool_min"_a, "pool_max"_a, "baseline_values"_a,
          "class_weights"_a, "baseline"_a, "scale"_a, "ddof"_a, "eps"_a, "keep_single"_a, "workspace"_a, "out"_a, release_gil());

    // policy_loss
    m.def("policy_loss_workspace", &cuda::policy_loss_workspace, "num_tokens"_a, "num_sequences"_a);
    m.def("policy_loss", of_addresses(cuda::policy_loss), "device"_a, "stream"_a, "logprobs"_a, "logprobs_dtype"_a, "advantages"_a,
          "advantages_per_token"_a, "mask"_a, "float_mask"_a, "old_logprobs"_a, "old_dtype"_a, "rollout_logprobs"_a, "rollout_dtype"_a,
          "ref_logprobs"_a, "ref_dtype"_a, "entropy"_a, "entropy_dtype"_a, "cu_seqlens"_a, "num_tokens_total"_a, "num_sequences"_a,
          "width"_a, "numbers"_a, "workspace"_a, "loss"_a, "metrics"_a, "grad"_a, "grad_entropy"_a, release_gil());
}
