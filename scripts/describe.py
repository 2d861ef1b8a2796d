"""Say what a checkpoint is, and what would be refused: python scripts/describe.py SOURCE"""

from pixart.commands import run

if __name__ == "__main__":
    run("describe")
