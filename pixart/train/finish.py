"""The last lines of a finished run: where its model is, whose images it learnt from, the command that samples more."""

import os
import shlex

from pixart.data.openmoji import ATTRIBUTION
from pixart.invocation import command
from pixart.train.config import TrainConfig
from pixart.train.loop import RunResult


def finish(config: TrainConfig, result: RunResult) -> str:
    """The lines to print after a finished run; empty in all processes but the first."""
    if int(os.environ.get("RANK", "0")) != 0:
        return ""
    lines = [f"trained {result.step} steps; model and averaged weights in {result.run}/checkpoints"]
    lines += [ATTRIBUTION] if config.data.prepare else []
    captions = [caption for record in result.data.records[:1] for caption in record.captions]
    prompt = next(prompt for prompt in [*config.prompts, *captions, "a prompt"] if len(prompt) <= 200)
    quoted = shlex.quote(prompt) if set(prompt) & set('"$`\\!') else f'"{prompt}"'
    lines.append(f"sample more: {command('sample')} --model {result.run} {quoted}")
    return "\n".join(lines)
