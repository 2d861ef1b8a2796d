"""Kill training of several processes again and again, and compare its end with an undisturbed run, bit for bit.

python scripts/chaos.py configs/chaos.yaml --kills 10
"""

import argparse
import tempfile
from pathlib import Path

from pixart import cli
from pixart.evaluate.chaos import chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as train.steps=100")
    parser.add_argument("--kills", type=int, default=10, help="of each kind of run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    good = True
    for kind in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as folder:
            verdict = chaos(
                arguments.config, Path(folder), processes=arguments.processes, kills=arguments.kills,
                seed=arguments.seed, overrides=[*arguments.overrides, f"train.parallel={kind}"],
            )  # fmt: skip
        print(f"{arguments.processes} processes, {kind}: {verdict}", flush=True)
        good = good and verdict.good
    return 0 if good else 1


if __name__ == "__main__":
    cli.run(main)
