"""linear_token_logprobs beside its baselines: pytest benchmarks/bench_linear_token_logprobs.py [--quick] [--benchmark-json=FILE]"""

OP = "linear_token_logprobs"


def test_linear_token_logprobs(case, measure):
    measure(case)
