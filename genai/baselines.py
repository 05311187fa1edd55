"""Runs `genai baselines` as `python -m genai.baselines`, an older name of the command."""

from genai.commands import baselines

if __name__ == "__main__":
    baselines()
