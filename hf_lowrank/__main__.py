"""`python -m hf_lowrank` is the command `hf-lowrank`, for `accelerate launch -m hf_lowrank`."""

from hf_lowrank.cli import main

main()
