"""Train the arms of a study with several seeds, compare them fairly, and write a report.

STUDY is a YAML file: a training configuration with a section `study` that lists arms (or axes), seeds and a budget.
The same command resumes a study that was interrupted, trains arms that were added, and tries failed ones again. Several
machines share it by --rank and --ranks, or as a Slurm array. Exit code 1: a run failed; 75: a signal ended it early.

examples:
    pixart study study.yaml --dry-run
    pixart study study.yaml
    pixart study study.yaml --jobs 8
    pixart study pixart:studies/adaln study.seeds=3 output=runs/adaln
    pixart study study.yaml --report
"""

import argparse
import sys

from pixart import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY", help="YAML file, or name as in: pixart configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help="print arms, sizes and the time it will take, and end")
    parser.add_argument("--report", action="store_true", help="write the report of what is finished, and end")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once, sharing GPUs or CPU cores")
    text = 'what starts a training in place of this Python, e.g. "torchrun --nproc-per-node 8"'
    parser.add_argument("--launcher", default="", metavar="COMMAND", help=text)
    cli.add_share(parser)


def main(arguments: argparse.Namespace) -> int:
    from pixart.errors import InputError
    from pixart.study.cost import describe_study
    from pixart.study.plan import plan_study
    from pixart.study.report import REPORT, write_report
    from pixart.study.results import read_results
    from pixart.study.runner import Interrupted, run_study
    from pixart.train.signals import REQUEUE

    if arguments.jobs < 1:
        raise InputError(f"--jobs: got {arguments.jobs}, expected 1 or more")
    rank, ranks = cli.find_rank(arguments.rank, arguments.ranks)
    study = plan_study(arguments.study, arguments.overrides)
    if arguments.dry_run:
        for line in describe_study(study):
            print(line, flush=True)
        return 0
    if not arguments.report:
        try:
            run_study(study, jobs=arguments.jobs, rank=rank, ranks=ranks, launcher=arguments.launcher)
        except Interrupted:
            print("stopped by a signal; trainings are saved, and the same command goes on", file=sys.stderr)
            return REQUEUE
    results = read_results(study)
    write_report(results, [arguments.study, *arguments.overrides])
    for one in results.comparisons:
        print(f"{one.arm}, {one.score.key}: {one.difference.mean:+.3g}: {one.verdict}")
    print(f"{study.folder / REPORT}")
    return int(any(v.failed and not v.finished for of in results.values.values() for v in of.values()))
