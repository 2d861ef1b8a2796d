"""Captions of class folders (ImageNet): python scripts/class_captions.py FOLDER NAMES.txt"""

import argparse

from pixart.data.class_captions import write_class_captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="with one folder of pictures per class; gets a metadata.jsonl")
    parser.add_argument("names", help="a line per class: its folder and its names, as LOC_synset_mapping.txt has them")
    arguments = parser.parse_args()
    pictures, classes = write_class_captions(arguments.folder, arguments.names)
    print(f"{arguments.folder}/metadata.jsonl: {pictures:,} pictures of {classes:,} classes")
