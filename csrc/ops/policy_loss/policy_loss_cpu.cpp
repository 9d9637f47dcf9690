#include <algorithm>
#include <vector>

#include "common/huge_pages.h"
#include "common/offsets.h"
#include "common/parallel.h"
#include "ops/policy_loss/policy_loss.h"
#include "ops/policy_loss/policy_loss_cpu_chunks.h"

namespace reinforce_ada::RA_ISA {
namespace {

constexpr int64_t kChunkTokens = 8192;  // whole sequences of at least so many tokens make one partial sum, whatever the threads

// Boundaries of chunks of whole sequences.
std::vector<int64_t> chunk_starts(const Inputs& in, int64_t sequences) {
    std::vector<int64_t> starts{0};
    while (starts.back() < sequences) {
        const int64_t wanted = in.begin(starts.back()) + kChunkTokens;
        int64_t next = sequences;
        if (in.cu_seqlens)
            next = std::lower_bound(in.cu_seqlens + starts.back() + 1, in.cu_seqlens + sequences, wanted) - in.cu_seqlens;
        else if (in.width > 0)
            next = std::min(sequences, starts.back() + (kChunkTokens + in.width - 1) / in.width);
        starts.push_back(next);
    }
    return starts;
}

// What was not given is counted: tokens, sequences with any token, the longest sequence.
void count_missing(const Inputs& in, const std::vector<int64_t>& starts, int64_t total, LossAgg agg, Denominators& den, int num_threads) {
    const bool tokens = agg == LossAgg::token_mean && den.tokens == 0, seqs = agg != LossAgg::token_mean && den.seqs == 0;
    if (tokens || seqs) {
        const int64_t pieces = static_cast<int64_t>(starts.size()) - 1;
        std::vector<int64_t> found(static_cast<std::size_t>(pieces));
        parallel_for(pieces, total, num_threads, [&](int64_t first, int64_t last) {
            for (int64_t c = first; c < last; ++c)
                if (tokens)
                    found[c] = in.mask.count(in.begin(starts[c]), in.begin(starts[c + 1]));
                else
                    for (int64_t i = starts[c]; i < starts[c + 1]; ++i) found[c] += in.mask.count(in.begin(i), in.end(i)) > 0;
        });
        int64_t sum = 0;
        for (int64_t n : found) sum += n;
        (tokens ? den.tokens : den.seqs) = static_cast<double>(std::max(sum, int64_t{1}));
    }
    if (agg == LossAgg::seq_mean_token_sum_norm && den.length == 0) {
        int64_t longest = 1;
        for (int64_t i = 0; i < starts.back(); ++i) longest = std::max(longest, in.end(i) - in.begin(i));
        den.length = static_cast<double>(longest);
    }
}

}  // namespace

int64_t policy_loss(const void* logprobs, int logprobs_dtype, const float* advantages, bool advantages_per_token, const void* mask,
                    bool float_mask, const void* old_logprobs, int old_dtype, const void* rollout_logprobs, int rollout_dtype,
                    const void* ref_logprobs, int ref_dtype, const void* entropy, int entropy_dtype, const int64_t* cu_seqlens,
                    int64_t num_tokens_total, int64_t num_sequences, int64_t width, const PolicyLossNumbers& numbers, float* loss,
                    double* metrics, void* grad, void* grad_entropy, int num_threads) {
    if (cu_seqlens) {
        const int64_t wrong = first_wrong_offset(cu_seqlens, num_sequences, num_tokens_total);
        if (wrong >= 0) return wrong;
    }
    const auto stream = [](const void* data, int dtype) { return Stream{data, static_cast<DType>(dtype)}; };
    const Inputs in{stream(logprobs, logprobs_dtype),
                    stream(old_logprobs, old_dtype),
                    stream(rollout_logprobs, rollout_dtype),
                    stream(ref_logprobs, ref_dtype),
                    stream(entropy, entropy_dtype),
                    Stream{advantages_per_token ? advantages : nullptr, DType::float32},
                    advantages_per_token ? nullptr : advantages,
                    Kept{mask, float_mask},
                    cu_seqlens,
                    width};
    const auto number = [&](Number which) { return number_of(numbers, which); };
    const Settings s = settings_of(numbers);
    const LossAgg agg = static_cast<LossAgg>(number(Number::loss_agg));
    const Output out{grad, in.logp.dtype}, out_entropy{grad_entropy, in.entropy.dtype};
    const std::vector<int64_t> starts = chunk_starts(in, num_sequences);
    Denominators den{number(Number::num_tokens), number(Number::num_seqs), number(Number::norm_length)};
    count_missing(in, starts, num_tokens_total, agg, den, num_threads);

    advise_huge_pages(grad, static_cast<std::size_t>(num_tokens_total) * (in.logp.dtype == DType::float32 ? 4 : 2));
    const int64_t pieces = static_cast<int64_t>(starts.size()) - 1;
    std::vector<Partial> partial(static_cast<std::size_t>(pieces));
    parallel_for(pieces, num_tokens_total, num_threads, [&](int64_t first, int64_t last) {
        Chunks chunks(in, s, agg, den, out, out_entropy);
        for (int64_t c = first; c < last; ++c) partial[c] = chunks.run(starts[c], starts[c + 1]);
    });
    Partial total;
    for (const Partial& p : partial) total += p;
    *loss = static_cast<float>(total.loss);
    name_metrics(total, num_tokens_total, metrics);
    return -1;
}

}  // namespace reinforce_ada::RA_ISA
