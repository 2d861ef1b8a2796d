"""What a finished run says: its score, where its pictures are, and the command that samples more."""

import os

from pixart.cli import find_device
from pixart.cpu import use_onednn
from pixart.data.openmoji import ATTRIBUTION
from pixart.evaluate.retrieval import retrieval
from pixart.inference.pipeline import Pipeline
from pixart.train.config import TrainConfig
from pixart.train.loop import RunResult


def finish(config: TrainConfig, result: RunResult) -> str:
    """Evaluate a finished run as `config.evaluate` says (in one process) → a few lines to print."""
    if int(os.environ.get("RANK", "0")) != 0:
        return ""
    lines = [f"trained {result.step} steps; model and averaged weights in {result.run}/checkpoints"]
    captions = [caption for record in result.data.records[:1] for caption in record.captions]
    prompt = [*config.prompts, *captions, "a prompt"][0]
    if config.evaluate.retrieval:
        pipeline = Pipeline.from_pretrained(result.run, device=find_device())
        if result.onednn:
            use_onednn(pipeline.model)
        credit = ATTRIBUTION if config.data.prepare == "openmoji" else ""
        score = retrieval(pipeline, result.data.records, result.run, config.sample, seed=config.seed, credit=credit)
        lines += [f"picture: {score.sheet} (training image above, sample below; a red caption is a miss)", str(score)]
        lines += [credit] * bool(credit)
    lines.append(f'sample more: python scripts/sample.py --model {result.run} "{prompt}"')
    return "\n".join(lines)
