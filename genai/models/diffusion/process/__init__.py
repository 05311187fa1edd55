"""The forward process: paths from data to noise, noise schedules, and loss weightings over time."""
