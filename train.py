"""Train a model: python train.py [model=] [data=] [experiment=] [key=value ...]; --help lists every key."""

from genai.commands import train

if __name__ == "__main__":
    train()
