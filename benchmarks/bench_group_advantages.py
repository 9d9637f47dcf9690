"""group_advantages beside its baselines: pytest benchmarks/bench_group_advantages.py [--quick] [--benchmark-json=FILE]"""

OP = "group_advantages"


def test_group_advantages(case, measure):
    measure(case)
