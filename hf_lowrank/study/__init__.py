"""Studies of several methods: so far, how their learning rates are tuned."""
