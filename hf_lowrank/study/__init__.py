"""Studies of several methods: planned, tuned, run as jobs, and analysed."""
