"""Ours and diffusers side by side: python scripts/benchmark.py forward backward --preset alpha-256 --size 256"""

from pixart.commands import run

if __name__ == "__main__":
    run("benchmark", keep_memory=False)  # its settings say so
