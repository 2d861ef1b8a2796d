"""Captions of class folders (ImageNet): python scripts/class_captions.py FOLDER NAMES.txt"""

from pixart.commands import run

if __name__ == "__main__":
    run("class_captions")
