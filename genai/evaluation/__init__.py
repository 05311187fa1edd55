"""The one room that measures: cards, and what `evaluate.py` and `python -m genai.evaluation.baselines` do."""
