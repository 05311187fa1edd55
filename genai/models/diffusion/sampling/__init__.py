"""Sampling: the times to visit, the solvers, guidance, and the sampler that runs them."""
