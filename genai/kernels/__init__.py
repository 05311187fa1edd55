"""The one place for fused kernels."""
