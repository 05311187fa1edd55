"""The one generic training loop, and the only place where Lightning is imported."""
