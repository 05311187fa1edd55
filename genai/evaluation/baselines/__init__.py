"""Trivial models of a data set, fitted in seconds: a model is worth something only if it beats them.

`python -m genai.evaluation.baselines data=digits` fits all baselines of a data set, prints their table and writes it as JSON;
`baseline=mixture` takes one. Every metric card lists those of its metric.
"""
