"""Downstream tasks: lm-evaluation-harness over checkpoints and in training, and the results it leaves."""
