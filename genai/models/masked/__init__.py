"""Models of tokens given those around them: BERT and masked diffusion."""
