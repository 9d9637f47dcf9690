#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/bind.h"
#include "ops/group_advantages/group_advantages.h"
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

    // token_logprobs
    m.def("first_invalid_token", RA_KERNEL(first_invalid_token), "token_ids"_a, "num_tokens"_a, "vocab"_a, release_gil());
    m.def("token_logprobs_forward", RA_KERNEL(token_logprobs_forward), "logits"_a, "dtype"_a, "num_tokens"_a, "vocab"_a, "row_stride"_a,
          "token_ids"_a, "temperatures"_a, "temperature"_a, "logprobs"_a, "log2_normalizer"_a, "entropy"_a, "sum_p2"_a, "num_threads"_a,
          release_gil());
    m.def("token_logprobs_backward", RA_KERNEL(token_logprobs_backward), "logits"_a, "dtype"_a, "num_tokens"_a, "vocab"_a, "row_stride"_a,
          "token_ids"_a, "temperatures"_a, "temperature"_a, "log2_normalizer"_a, "entropy"_a, "grad_logprobs"_a, "grad_entropy"_a, "grad"_a,
          "grad_row_stride"_a, "num_threads"_a, release_gil());

    // group_advantages
    m.def("group_advantages", RA_KERNEL(group_advantages), "rewards"_a, "dtype"_a, "group_of"_a, "cu_seqlens"_a, "num_rows"_a,
          "num_groups"_a, "pool_count"_a, "pool_mean"_a, "pool_m2"_a, "pool_min"_a, "pool_max"_a, "baseline_values"_a, "class_weights"_a,
          "baseline"_a, "scale"_a, "ddof"_a, "eps"_a, "keep_single"_a, "out"_a, "num_threads"_a, release_gil());

    // policy_loss
    m.def("policy_loss", RA_KERNEL(policy_loss), "logprobs"_a, "advantages"_a, "advantages_per_token"_a, "mask"_a, "float_mask"_a,
          "old_logprobs"_a, "rollout_logprobs"_a, "ref_logprobs"_a, "cu_seqlens"_a, "num_tokens_total"_a, "num_sequences"_a, "width"_a,
          "loss_kind"_a, "clip_low"_a, "clip_high"_a, "dual_clip"_a, "loss_agg"_a, "num_tokens"_a, "num_seqs"_a, "norm_length"_a,
          "correction"_a, "correction_low"_a, "correction_high"_a, "kl"_a, "straight_through"_a, "kl_coef"_a, "loss"_a, "metrics"_a,
          "grad"_a, "num_threads"_a, release_gil());
}
