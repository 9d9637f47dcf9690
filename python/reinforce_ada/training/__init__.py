"""The compact trainer: batching, objectives, optimizer, checkpoints, evaluation. Importing this package imports none of its modules."""
