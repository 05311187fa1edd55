"""Autoregressive models: one token after the other."""
