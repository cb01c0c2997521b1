"""Downstream evaluation: lm-evaluation-harness, tasks that need no download, and modules for `evaluate`."""
