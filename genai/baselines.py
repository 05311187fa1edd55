"""`python -m genai.baselines`: the command `genai baselines`, by the name of its former place."""

from genai.commands import baselines

if __name__ == "__main__":
    baselines()
