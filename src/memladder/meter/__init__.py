"""Measuring one case: a worker in its own process, a sampler outside it, a record at the end."""
