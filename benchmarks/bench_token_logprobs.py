"""token_logprobs beside its baselines: pytest benchmarks/bench_token_logprobs.py [--quick] [--benchmark-json=FILE]"""

OP = "token_logprobs"


def test_token_logprobs(case, measure):
    measure(case)
