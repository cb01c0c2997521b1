"""The plugin of toy_method.py: a process that imports it, or finds it by its entry point, knows the method."""

from toy_method import ToyConfig

from hf_lowrank.methods import register

register(ToyConfig)
