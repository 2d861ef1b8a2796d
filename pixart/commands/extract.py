"""Encode a data set once: write the feature store `data.features` of a training configuration.

Any number of processes share the work under torchrun or accelerate launch, as a Slurm job or array, or with --rank I
--ranks N. If the work was interrupted, the same command resumes it.

examples:
    pixart extract mine.yaml
    pixart extract mine.yaml data.features=features/mine
    pixart extract mine.yaml --verify
    torchrun --nproc-per-node 8 -m pixart extract mine.yaml
"""

import argparse

from pixart import cli

KEEPS_MEMORY = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="as for training")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--verify", action="store_true", help="only check every file of a finished store")
    parser.add_argument("--official", metavar="FOLDER", help="convert a feature folder of the authors' layout instead")
    cli.add_share(parser)


def main(arguments: argparse.Namespace) -> int:
    import sys

    from pixart.config import load_config
    from pixart.features import Share, convert_official, extract, summarize
    from pixart.train.config import TrainConfig

    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    if arguments.verify:
        return _verify(config.data.features)
    share = Share(*cli.find_rank(arguments.rank, arguments.ranks))
    common = {"share": share, "say": lambda text: print(text, file=sys.stderr)}
    sections = (config.data, config.data_spec.table, config.vae, config.text, config.extract)
    if arguments.official:
        result = convert_official(arguments.official, *sections, **common)
    else:
        result = extract(*sections, prompts=config.prompts, device=cli.find_device(), **common)
    print(summarize(result))
    return 0


def _verify(store: str | None) -> int:
    import sys
    from pathlib import Path

    from pixart.errors import InputError
    from pixart.features.repair import check_store

    if not store:
        raise InputError("data.features: not set; expected the feature store to verify")
    damage = check_store(Path(store))
    print("\n".join(damage) or f"{store}: every file is as it was written")
    if damage:
        print("the same command without --verify makes these again, and nothing else", file=sys.stderr)
    return 1 if damage else 0
