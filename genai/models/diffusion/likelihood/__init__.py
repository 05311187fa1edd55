"""The bound, and the exact likelihood by the ODE."""
