"""Make the feature store `data.features` of a training config: python scripts/extract.py CONFIG [key=value …]."""

from pixart.commands import run

if __name__ == "__main__":
    run("extract")
