"""Variational autoencoders: an encoder that guesses latents, a decoder that says how likely the data is, and their bound."""
