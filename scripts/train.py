"""Train as a config says: python scripts/train.py CONFIG [key=value …]"""

from pixart.commands import run

if __name__ == "__main__":
    run("train")
