"""Variational autoencoders and first stages: encoders, decoders, quantisers, likelihoods and their bounds."""
