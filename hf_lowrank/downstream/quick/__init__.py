"""Our own tasks, which need no network: how their items are made from the held-out files of the embedded corpus."""
