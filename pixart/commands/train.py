"""Train a model as a configuration says.

CONFIG is a YAML file, or the name of a configuration that comes with pixart (`pixart configs` lists them). If the run
was interrupted, the same command resumes it. Exit code 75: a signal ended the run early; everything is saved.

examples:
    pixart train openmoji
    pixart train mine.yaml train.steps=2000 output=runs/longer
    torchrun --nproc-per-node 8 -m pixart train mine.yaml
    accelerate launch -m pixart train mine.yaml
"""

import argparse

from pixart import cli

KEEPS_MEMORY = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or name as in: pixart configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    cli.add_no_onednn(parser)


def main(arguments: argparse.Namespace) -> int:
    from pixart.config import load_config
    from pixart.train.config import TrainConfig
    from pixart.train.finish import finish
    from pixart.train.loop import train
    from pixart.train.signals import REQUEUE

    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    result = train(config, onednn=arguments.onednn)
    if not result.finished:
        return REQUEUE
    print(finish(config, result))
    return 0
