"""linear_policy_loss beside its baselines: pytest benchmarks/bench_linear_policy_loss.py [--quick] [--benchmark-json=FILE]"""

OP = "linear_policy_loss"


def test_linear_policy_loss(case, measure):
    measure(case)
