"""Diffusion models: a schedule of noise, a network that undoes it, samplers that are tables."""
