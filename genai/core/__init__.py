"""Torch and the standard library only: contracts, shapes, counter-based noise."""
