"""Datasets without Lightning: a data set is splits of arrays, a stream is a pure function of (seed, position)."""
