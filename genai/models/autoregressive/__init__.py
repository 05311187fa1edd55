"""Autoregressive models, which generate one token at a time."""
