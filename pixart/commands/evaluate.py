"""Score a model, or images that somebody else drew.

Prompts come from a file, from a data set with captions, or from a protocol. What a batch of images is worth is written
before the next batch is drawn, so the same command goes on after a kill. Several processes share the work under
torchrun, as a Slurm job or array, or with --rank I --ranks N; the last one to end writes scores.json.

metrics (NAME or NAME:MODEL, several at once):
    fid                     Inception with TensorFlow's weights (pip install 'pixart[evaluate]')
    frechet:MODEL           the same distance by any vision model of timm or transformers; it is never called FID
    kid, prdc               kernel distance; improved precision and recall, density and coverage (also with :MODEL)
    clip_score:MODEL        any CLIP of transformers
    compositional           combinations drawn right, for the embedded set
    tones, subject          the same for what an adapter has been taught, and for what it should have kept
    denoising_error         of a model on the images of --data; by itself, nothing is drawn

examples:
    pixart evaluate runs/openmoji --reference data/compositional --metrics compositional
    pixart evaluate MODEL --prompts prompts.txt --reference photos --metrics fid clip_score:clip-vit-large-patch14
    pixart evaluate --images drawn --reference photos --metrics frechet:efficientnet_lite0 prdc:efficientnet_lite0
    pixart evaluate MODEL --protocol geneval --data geneval/prompts/evaluation_metadata.jsonl
"""

import argparse

from pixart import cli

FILTERS = ("clean", "pil", "none")
KEEPS_MEMORY = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="run or model folder; released model: file, folder or Hub id")
    add("--images", metavar="FOLDER", help="score these images instead of a model's")
    add("--metrics", nargs="+", default=[], metavar="NAME", help="see above")
    add("--reference", metavar="FOLDER", help="real images, or a .npz with mu and sigma")
    add("--prompts", metavar="FILE", help="one prompt a line; with --images, in the order of their names")
    add("--data", metavar="SOURCE", help="a data set whose first captions are the prompts; or a protocol's files")
    add("--protocol", metavar="NAME", help="coco30k, mjhq30k, geneval, dpg or adm-npz")
    add("--out", metavar="FOLDER", help="where scores.json goes (default: evaluation/ in a run, else here)")
    add("--limit", type=int, metavar="N", help="take N images only")
    add("--count", type=int, default=1, metavar="N", help="images of each prompt (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the first image, then one more each (default: 0)")
    add("--height", type=int, metavar="N", help="pixels (default: the model's native size)")
    add("--width", type=int, metavar="N", help="pixels")
    add("--filter", default="clean", choices=FILTERS, help="to the extractor's size (default: clean)")
    add("--reference-fit", default="exact", choices=["exact", "crop", "stretch"], help="references of another size")
    add("--inception", metavar="FILE", help="Inception's weights, by default in torch's cache")
    add("--cache", default="evaluation/references", metavar="FOLDER", help="for features of references")
    add("--keep-images", action="store_true", help="write the images too, to OUT/images")
    add("--truncate", action="store_true", help="cut prompts that are too long for the model or for CLIP")
    add("--batch-size", type=int, default=16, metavar="N", help="images at a time (default: 16)")
    add("--device", help="default: a GPU if there is one")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--raw", action="store_true", help="a run's raw weights instead of the averaged ones")
    cli.add_settings(parser, "sampler=ddim steps=50 guidance=3")
    cli.add_share(parser)
    cli.add_extension(parser)
    cli.add_no_onednn(parser)


def main(arguments: argparse.Namespace) -> None:
    from pixart.evaluate.score import Options, evaluate

    chosen = vars(arguments)
    rank, ranks = cli.find_rank(chosen.pop("rank"), chosen.pop("ranks"))
    chosen["device"] = cli.name_device(chosen["device"])
    chosen["settings"] = chosen.pop("set")
    tuples = {name: tuple(chosen.pop(name)) for name in ("metrics", "extension", "settings")}
    evaluate(Options(**chosen, **tuples), rank, ranks, progress=True, say=print)
