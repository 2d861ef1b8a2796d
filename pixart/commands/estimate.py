"""Estimate what a run takes before it is started: parameters, FLOPs, memory, disk, time.

Nothing needs to be there but the configuration. FLOPs and utilisation are of the model (what gradient checkpointing
repeats is shown apart). --measure takes a few real steps on random data and puts their memory and time beside.

examples:
    pixart estimate finetune_512 --device a100 --utilisation 0.35 --processes 8
    pixart estimate mine.yaml train.batch_size=64 train.parallel=fsdp --images 100000
    pixart estimate openmoji --measure --device here
    pixart estimate --paper --device a100
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", nargs="*", metavar="CONFIG", help="YAML files or names, and key=value overrides")
    add("--paper", action="store_true", help="PixArt-α's five stages, beside the published time")
    add("--processes", type=int, default=1, metavar="N", help="that share a batch (default: 1)")
    add("--device", metavar="NAME", help="time on it: v100, a100, l40s, rtx4090, h100, h200; here: this machine's")
    add("--utilisation", type=float, metavar="X", help="of the device's peak (default: as measured, else 0.4)")
    add("--images", type=int, metavar="N", help="size of a feature store of N images")
    add("--tokens", type=int, metavar="N", help="of a stored caption on average (default: text.length)")
    add("--measure", action="store_true", help="take a few real steps in one process, print memory and time beside")
    add("--json", metavar="FILE", help="write all numbers")


def main(arguments: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from pixart.config import load_config
    from pixart.errors import InputError
    from pixart.files import write_text
    from pixart.train.config import TrainConfig
    from pixart.train.devices import check_utilisation, find_device
    from pixart.train.estimate import estimate
    from pixart.train.estimate_report import PAPER, Costs, compare, describe, to_json
    from pixart.train.rehearsal import rehearse

    a = arguments
    names = [word for word in a.config if "=" not in word] + [*(PAPER if a.paper else ())]
    overrides = [word for word in a.config if "=" in word]
    if not names:
        raise InputError("CONFIG: expected a YAML file, a name as in: pixart configs, or --paper")
    for name in ("images", "tokens"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            raise InputError(f"--{name} {getattr(a, name)}: expected a positive number")
    if a.measure and (a.paper or a.processes > 1):
        raise InputError(
            "--measure: takes its steps in one process; leave out --processes and --paper, or set train.batch_size to "
            "the share of one process"
        )
    if a.utilisation is not None:
        check_utilisation(a.utilisation)
    configs = {name: load_config(TrainConfig, name, overrides) for name in names}
    devices = {}
    if a.device is not None:  # before anything takes time
        for name, config in configs.items():
            devices[name] = find_device(a.device, config.train.autocast_dtype)
            devices[name].peak(config.train.autocast_dtype)
    many = []
    for name, config in configs.items():
        processes = PAPER[name] if a.paper and name in PAPER else a.processes
        found, measured = estimate(config, processes), rehearse(config) if a.measure else None
        many.append(Costs(name, found, devices.get(name), a.utilisation, a.images, a.tokens, measured))
    print(describe(many[0]) if len(many) == 1 else compare(many, paper=a.paper))
    if a.json:
        write_text(Path(a.json), json.dumps([to_json(costs) for costs in many], indent=2) + "\n")
