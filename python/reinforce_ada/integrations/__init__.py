"""Adaptive sampling inside the trainers of others: adapters only, one package for each."""
