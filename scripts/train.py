"""Train as a config says: python scripts/train.py CONFIG [key=value …]. Under several processes: accelerate launch."""

import argparse

from pixart import cli
from pixart.config import load_config
from pixart.evaluate.finish import finish
from pixart.train.config import TrainConfig
from pixart.train.loop import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as train.steps=100")
    arguments = parser.parse_args()
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    result = train(config)
    if result.finished:
        print(finish(config, result))
    return 0


if __name__ == "__main__":
    cli.run(main)
