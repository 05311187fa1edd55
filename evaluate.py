"""Measure a checkpoint: python evaluate.py [ckpt=] [metrics=] [split=test] [n=] [key=value ...]."""

from genai.commands import evaluate

if __name__ == "__main__":
    evaluate()
