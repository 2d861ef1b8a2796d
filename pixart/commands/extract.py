"""Make the feature store `data.features` of a training config: python scripts/extract.py CONFIG [key=value …].

Any number of processes may share the work, each with its own share: by torchrun or accelerate launch, as a Slurm job or
array, or by --rank I --ranks N. The same command goes on after any interruption.
"""

import argparse
import sys

from pixart import cli
from pixart.config import load_config
from pixart.errors import InputError
from pixart.features import Share, convert_official, extract, summarize
from pixart.features.store import verify
from pixart.train.config import TrainConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as for training")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as data.features=features/mine")
    parser.add_argument("--verify", action="store_true", help="check every file of a finished store, and nothing else")
    parser.add_argument("--official", metavar="FOLDER", help="convert the authors' feature folder instead")
    parser.add_argument("--rank", type=int, help="this process's share, from 0; by default from its environment")
    parser.add_argument("--ranks", type=int, help="number of processes")
    arguments = parser.parse_intermixed_args()
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    if arguments.verify:
        if not config.data.features:
            raise InputError("data.features: expected the feature store to verify")
        damage = verify(config.data.features)
        print("\n".join(damage) or f"{config.data.features}: every file is as it was written")
        return 1 if damage else 0
    share = Share(*cli.find_rank(arguments.rank, arguments.ranks))
    common = {"share": share, "say": lambda text: print(text, file=sys.stderr)}
    sections = (config.data, config.data_spec.table, config.vae, config.text, config.extract)
    if arguments.official:
        result = convert_official(arguments.official, *sections, **common)
    else:
        result = extract(*sections, prompts=config.prompts, device=cli.find_device(), **common)
    print(summarize(result))
    return 0
