"""Sample from a checkpoint: python sample.py [ckpt=] [n=] [seed=] [label=] [sampler=] [key=value ...]."""

from genai.commands import sample

if __name__ == "__main__":
    sample()
