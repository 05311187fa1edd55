"""Generative adversarial networks: two players, their networks, and ways to sample the one that makes things."""
