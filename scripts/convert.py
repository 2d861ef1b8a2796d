"""Convert a PixArt: python scripts/convert.py SOURCE TARGET --to ours|official|diffusers|diffusers-pipeline"""

from pixart.commands import run

if __name__ == "__main__":
    run("convert")
