"""What is added to data, and how much at which time."""
