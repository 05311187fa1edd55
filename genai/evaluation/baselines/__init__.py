"""Trivial models of a data set, fitted in seconds: what a figure has to beat before it says anything.

`python -m genai.evaluation.baselines data=digits` prints the table of a data set and writes it as JSON, `baseline=mixture`
that of one of them; every card has those of its metric beside it.
"""
