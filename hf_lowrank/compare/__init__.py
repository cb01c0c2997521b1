"""Comparing runs: `hf-lowrank compare` gathers them from folders and the Hub and shows them side by side."""
