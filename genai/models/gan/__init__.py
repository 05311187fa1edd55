"""Generative adversarial networks: generator-discriminator pairs, their networks, and their samplers."""
