"""Benchmarks of the operators: one catalogue of cases, which `reinforce-ada bench` and pytest-benchmark both run."""
