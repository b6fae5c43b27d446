"""Optimizers over the ops; none yet."""
