"""Train as a config says: python scripts/train.py CONFIG [key=value …]. Several processes: torchrun, accelerate launch.

Exit code 75: a signal ended the run early, all is saved, and the same command goes on.
"""

import argparse

from pixart import cli
from pixart.config import load_config
from pixart.train.config import TrainConfig
from pixart.train.finish import finish
from pixart.train.loop import train
from pixart.train.signals import REQUEUE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as train.steps=100")
    parser.add_argument("--no-onednn", dest="onednn", action="store_false", help=cli.NO_ONEDNN)
    arguments = parser.parse_intermixed_args()
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    result = train(config, onednn=arguments.onednn)
    if not result.finished:
        return REQUEUE
    print(finish(config, result))
    return 0
