"""Losses that more than one family may use: pure functions of tensors, (B,) each; the caller averages."""
