"""Sampling: the times to visit, solvers, guidance, and the sampler."""
