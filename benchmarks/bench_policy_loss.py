"""policy_loss beside its baselines: pytest benchmarks/bench_policy_loss.py [--quick] [--benchmark-json=FILE]"""

OP = "policy_loss"


def test_policy_loss(case, measure):
    measure(case)
