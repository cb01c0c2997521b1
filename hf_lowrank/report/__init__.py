"""Reports of runs as plain data: types, tables and comparisons. Knows nothing of methods, Trainer or Hub."""
