"""Kinds of data as a person types, sees and hears them; one file each."""
