"""A policy is five small pure functions: propose, allocate, decide, select, weight.

Any hashable callable with the right signature (see `contracts`) can be a part of a policy.
"""
