"""Benchmarks of the operators: one catalogue of cases, run by `reinforce-ada bench` and by pytest-benchmark alike."""
