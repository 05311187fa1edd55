"""Contrastive models: encoders of several media into one space."""
