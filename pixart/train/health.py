"""Steps that were not applied: counted, and listed with the ids of their samples; too many in a row end the run."""

from collections.abc import Callable
from pathlib import Path

from pixart.errors import InputError
from pixart.files import append_rows
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes
from pixart.train.state import Progress
from pixart.train.step import StepReport, StepResult, read_results

# skipped steps in a row that end a run; an fp16 loss scaler skips a few to find its scale
MAX_SKIPPED = {"no": 10, "bf16": 10, "fp16": 30}
FILE = "skipped.jsonl"  # a line per skipped step, with all ids; a step repeated after a kill is listed again
REASONS = {
    "non-finite": "its loss ({loss:.4g}) or gradient norm ({norm:.4g}) is not finite",
    "spike": "its gradient norm {norm:.4g} is above optimizer.skip_above",
    "unreadable": "none of its images could be read",
}


class Window:
    """The steps since it was last read: their results on the device, and their samples' ids on the CPU."""

    def __init__(self, run: Path, config: TrainConfig, processes: Processes):
        self.run, self.config, self.processes = run, config, processes
        self._steps: list[tuple[int, StepResult, list[str]]] = []
        self._problems: list[tuple[str, str]] = []

    def add(self, step: int, result: StepResult, ids: list[str], problems: list[tuple[str, str]]) -> None:
        """Add a step's result, the ids of this process's samples in it, and (id, reason) of those not read."""
        self._steps.append((step, result, ids))
        self._problems += problems

    def take_problems(self) -> list[tuple[str, str]]:
        """(id, reason) of the images that this process could not read."""
        problems, self._problems = self._problems, []
        return problems

    def read(self, progress: Progress, say: Callable[[str], None]) -> None:
        """Wait for the device, then count and report the steps it skipped; all processes call it.

        Raises:
            InputError: too many in a row.
        """
        steps, self._steps = self._steps, []
        reports = read_results([result for _, result, _ in steps])
        skipped = [
            (step, report, ids) for (step, _, ids), report in zip(steps, reports, strict=True) if not report.applied
        ]
        everyones = self.processes.gather([ids for _, _, ids in skipped]) if skipped else []
        for i, (step, report, _) in enumerate(skipped):
            self._note(step, report, [name for part in everyones for name in part[i]], say)
        for report, (step, _, _) in zip(reports, steps, strict=True):
            progress.skipped += not report.applied
            progress.spikes += report.outcome == "spike"
            if report.applied:
                progress.skipped_in_row = 0
            elif report.outcome != "unreadable":
                progress.skipped_in_row += 1
            if progress.skipped_in_row >= MAX_SKIPPED[self.config.train.mixed_precision]:
                kind = "above optimizer.skip_above" if report.outcome == "spike" else "not finite"
                raise InputError(
                    f"{progress.skipped_in_row} steps in a row were {kind}, the last at step {step}; lower "
                    "optimizer.lr or optimizer.clip, then resume from the last checkpoint in "
                    f"{self.config.output}; the samples are listed in {FILE} there"
                )

    def _note(self, step: int, report: StepReport, ids: list[str], say: Callable[[str], None]) -> None:
        reason = REASONS[report.outcome].format(loss=report.loss, norm=report.grad_norm)
        more = f" and {len(ids) - 8} more, see {FILE}" if len(ids) > 8 else ""
        say(f"step {step}: {reason}; skipped. Its samples: {', '.join(ids[:8])}{more}")
        if self.processes.rank == 0:
            row = {
                "step": step,
                "reason": report.outcome,
                "loss": repr(report.loss),
                "grad_norm": repr(report.grad_norm),
                "ids": ids,
            }
            try:
                append_rows(self.run / FILE, [row])
            except OSError as error:
                say(f"warning: {self.run / FILE}: cannot be written ({error})")
