"""Caption pictures: python scripts/caption.py DATA … --output captions.jsonl. The same command goes on after a kill."""

from pixart.commands import run

if __name__ == "__main__":
    run("caption")
