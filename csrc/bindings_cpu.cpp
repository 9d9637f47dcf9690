#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/bind.h"
#include "ops/group_advantages/group_advantages.h"
#include "ops/linear_token_logprobs/linear_token_logprobs.h"
#include "ops/policy_loss/policy_loss.h"
#include "ops/token_logprobs/token_logprobs.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict build_info() {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["built_isas"] = reinforce_ada::built_isas();
    info["usable_isas"] = reinforce_ada::usable_isas();
    info["selected_isa"] = reinforce_ada::isa_name(reinforce_ada::selected_isa());
#ifdef __SANITIZE_ADDRESS__
    info["sanitized"] = true;
#else
    info["sanitized"] = false;
#endif
#ifdef RA_EMULATED_AVX512
    info["emulated_avx512"] = true;
#else
    info["emulated_avx512"] = false;
#endif
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    using namespace reinforce_ada;
    using release_gil = py::call_guard<py::gil_scoped_release>;

    m.def("build_info", &build_info);
    m.def("select_isa", &select_isa, "name"_a);
    m.def("limit_isa", &limit_isa, "name"_a);

    // token_logprobs
    m.def("first_invalid_token", RA_KERNEL(first_invalid_token), "token_ids"_a, "num_tokens"_a, "vocab"_a, release_gil());
    m.def("token_logprobs_forward", RA_KERNEL(token_logprobs_forward), "logits"_a, "dtype"_a, "num_tokens"_a, "vocab"_a, "row_stride"_a,
          "token_ids"_a, "temperatures"_a, "temperature"_a, "logit_scale"_a, "soft_cap"_a, "logprobs"_a, "normalizers"_a, "entropy"_a,
          "sum_p2"_a, "num_threads"_a, release_gil());
    m.def("token_logprobs_add_piece", RA_KERNEL(token_logprobs_add_piece), "logits"_a, "dtype"_a, "num_tokens"_a, "piece_size"_a,
          "row_stride"_a, "first_id"_a, "token_ids"_a, "temperatures"_a, "temperature"_a, "logit_scale"_a, "soft_cap"_a, "state"_a,
          "with_entropy"_a, "with_sum_p2"_a, "num_threads"_a, release_gil());
    m.def("token_logprobs_finish", RA_KERNEL(token_logprobs_finish), "state"_a, "num_tokens"_a, "logprobs"_a, "normalizers"_a, "entropy"_a,
          "sum_p2"_a, release_gil());
    m.def("token_logprobs_gradient_piece", RA_KERNEL(token_logprobs_gradient_piece), "logits"_a, "dtype"_a, "num_tokens"_a, "piece_size"_a,
          "row_stride"_a, "first_id"_a, "token_ids"_a, "temperatures"_a, "temperature"_a, "logit_scale"_a, "soft_cap"_a, "normalizers"_a,
          "entropy"_a, "grad_logprobs"_a, "grad_entropy"_a, "grad"_a, "grad_row_stride"_a, "grad_bias"_a, "num_threads"_a, release_gil());

    // linear_token_logprobs, linear_policy_loss
    m.def("pack_hidden", RA_KERNEL(pack_hidden), "hidden"_a, "dtype"_a, "num_tokens"_a, "width"_a, "hidden_stride"_a, "packed"_a,
          "num_threads"_a, release_gil());
    m.def("linear_logits", RA_KERNEL(linear_logits), "packed"_a, "weight"_a, "dtype"_a, "bias"_a, "num_tokens"_a, "num_rows"_a, "width"_a,
          "weight_stride"_a, "logits"_a, "logits_stride"_a, "num_threads"_a, release_gil());

    m.def("linear_grad_hidden", RA_KERNEL(linear_grad_hidden), "dz"_a, "dz_stride"_a, "weight"_a, "dtype"_a, "num_tokens"_a, "num_rows"_a,
          "width"_a, "weight_stride"_a, "grad_hidden"_a, "num_threads"_a, release_gil());
    m.def("linear_grad_weight", RA_KERNEL(linear_grad_weight), "dz"_a, "dz_stride"_a, "hidden"_a, "dtype"_a, "num_tokens"_a, "num_rows"_a,
          "width"_a, "hidden_stride"_a, "grad_weight"_a, "first"_a, "num_threads"_a, release_gil());

    // group_advantages
    m.def("group_advantages", RA_KERNEL(group_advantages), "rewards"_a, "dtype"_a, "group_of"_a, "cu_seqlens"_a, "num_rows"_a,
          "num_groups"_a, "pool_count"_a, "pool_mean"_a, "pool_m2"_a, "pool_min"_a, "pool_max"_a, "baseline_values"_a, "class_weights"_a,
          "baseline"_a, "scale"_a, "ddof"_a, "eps"_a, "keep_single"_a, "out"_a, "num_threads"_a, release_gil());

    // policy_loss
    m.def("policy_loss", RA_KERNEL(policy_loss), "logprobs"_a, "logprobs_dtype"_a, "advantages"_a, "advantages_per_token"_a, "mask"_a,
          "float_mask"_a, "old_logprobs"_a, "old_dtype"_a, "rollout_logprobs"_a, "rollout_dtype"_a, "ref_logprobs"_a, "ref_dtype"_a,
          "entropy"_a, "entropy_dtype"_a, "cu_seqlens"_a, "num_tokens_total"_a, "num_sequences"_a, "width"_a, "numbers"_a, "loss"_a,
          "metrics"_a, "grad"_a, "grad_entropy"_a, "num_threads"_a, release_gil());
}
