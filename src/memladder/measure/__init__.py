"""Measuring one case: a worker inside its own process, a sampler outside it, a record at the end."""
