"""Outside the measured process tree: the runner, the sampler, and what they read."""
