"""Trivial models of a data set, fitted in seconds: what a figure has to beat before it says anything.

`python -m genai.baselines data=digits` prints the table of a data set and writes it as JSON; `baseline=mixture` fits one of
them, `against=<run>` says which of them the figures of a run beat.
"""
