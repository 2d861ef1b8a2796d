"""Write captions for folders of classes, as ImageNet has them: the names of its class for each image.

examples:
    pixart class_captions imagenet/train LOC_synset_mapping.txt
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with one folder of images for each class; a metadata.jsonl is written into it")
    parser.add_argument("names", help="file of one class a line: its folder, then its names separated by commas")


def main(arguments: argparse.Namespace) -> None:
    from pixart.data.class_captions import write_class_captions

    images, classes = write_class_captions(arguments.folder, arguments.names)
    print(f"{arguments.folder}/metadata.jsonl: {images:,} images of {classes:,} classes")
