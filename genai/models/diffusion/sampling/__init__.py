"""From noise to data: levels, solvers, guidance, and the sampler."""
