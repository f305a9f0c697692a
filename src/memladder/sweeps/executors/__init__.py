"""How a sweep's cases are run: one file an executor."""
