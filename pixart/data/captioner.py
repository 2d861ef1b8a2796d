"""Captions for the images of any source, by any image-text-to-text model of transformers.

Any number of processes can share the work, each writing its own file; a kill loses at most the current batch.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from pixart.data.caption_files import find_parts, part_name, read_rows
from pixart.data.config import DataConfig
from pixart.data.decoding import Picture, UnreadableImage, open_image
from pixart.data.images import to_rgb
from pixart.data.items import Fields, Item
from pixart.data.sources import read_items
from pixart.errors import InputError
from pixart.files import append_rows, mend_lines, write_json


@dataclass(frozen=True)
class CaptionConfig:
    """The settings that captions depend on; stored beside them, so that captions made with others are not mixed in."""

    model: str = "llava-hf/llava-1.5-7b-hf"
    prompt: str = "Describe this image and its style in a very detailed manner"  # PixArt-α, arXiv 2310.00426
    max_new_tokens: int = 256
    field: str = "llava"  # the captions' name

    def __post_init__(self):
        if self.max_new_tokens < 1 or not self.prompt.strip() or not self.field or self.field == "id":
            raise InputError(
                f"captions: got {self.max_new_tokens} new tokens, the prompt {self.prompt!r} and the field "
                f"{self.field!r}; expected at least 1, a text, and a name other than id"
            )


@dataclass
class CaptionReport:
    """The result of one process; `problems` are (id, reason)."""

    output: Path
    written: int = 0
    done_before: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    def describe(self) -> str:
        lines = [f"{self.output}: {self.written} captions written, {self.done_before} already there"]
        lines += [f"  {name}: {reason}" for name, reason in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"  … and {len(self.problems) - 20} more")
        return "\n".join(lines)


class Captioner:
    """A vision-language model and its processor. Decoding is greedy, so that captions are reproducible."""

    def __init__(self, processor, model: torch.nn.Module, config: CaptionConfig):
        self.processor, self.model, self.config = processor, model.eval().requires_grad_(False), config
        processor.tokenizer.padding_side = "left"  # generation continues after the last token
        self.text = self._make_prompt()

    @classmethod
    def load(cls, config: CaptionConfig, *, dtype: torch.dtype = torch.float32, device="cpu") -> "Captioner":
        """Load `config.model`, a folder or Hub id.

        Raises:
            InputError: it is missing, is not an image-text-to-text model, or does not define where the image belongs in
                its prompt.
        """
        import transformers

        try:
            processor = transformers.AutoProcessor.from_pretrained(config.model, trust_remote_code=False)
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                config.model, dtype=dtype, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise InputError(
                f"captioning model '{config.model}': cannot be loaded ({first}); expected a folder or Hub id of an "
                "image-text-to-text model of transformers"
            ) from error
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise InputError(f"captioning model '{config.model}': its processor does not take both images and text")
        return cls(processor, model.to(device), config)

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """One text per RGB image."""
        options = {}
        bos = self.processor.tokenizer.bos_token
        if bos and self.text.startswith(bos):  # chat templates include it; the tokenizer would add a second
            options["add_special_tokens"] = False
        inputs = self.processor(
            text=[self.text] * len(images),
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
            **options,
        ).to(self.model.device, self.model.dtype)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*do_sample.*"
            )  # warnings about the model's own sampling settings
            tokens = self.model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self.config.max_new_tokens
            )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [" ".join(text.split()) for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _make_prompt(self) -> str:
        """The prompt in the model's own chat format if it has one, else the prompt after its image token."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": self.config.prompt}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        token = getattr(self.processor, "image_token", None)
        if not isinstance(token, str):
            raise InputError(
                f"captioning model '{self.config.model}': its processor has no chat template and no image_token, so "
                "it is unknown where the image belongs in its prompt; expected a model with one of them"
            )
        return f"{token}\n{self.config.prompt}"


def write_captions(
    sources: Sequence[DataConfig],
    output: str | Path,
    config: CaptionConfig,
    *,
    rank: int = 0,
    ranks: int = 1,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CaptionReport:
    """Caption this process's share of the images that have no caption yet; each batch is on the disk before the next.

    Args:
        output: a .jsonl file; with several processes, each writes `NAME-RANK-of-RANKS.jsonl` in its place, and the name
            stands for all of them. A second start resumes, also with another number of processes.

    Raises:
        InputError: there are no images; two images have the same id; `output` holds captions made with other settings,
            or is in use.
    """
    output = Path(output)
    if output.suffix != ".jsonl" or batch_size < 1 or not 0 <= rank < ranks:
        raise InputError(
            f"captions: got the file {output}, batch size {batch_size}, rank {rank} of {ranks}; expected a .jsonl "
            "file, a batch size of at least 1, and a rank from 0 to ranks - 1"
        )
    items = _list_items(sources)[rank::ranks]
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = output.with_suffix(".settings.json")
    _check_settings(settings, config)
    report = CaptionReport(part_name(output, rank, ranks))
    with open(report.output, "ab") as file:
        _lock(file)
        mend_lines(report.output)
        done = {id for part in find_parts(output) for _, id, _ in read_rows(part)}
        todo = [item for item in items if item.id not in done]
        report.done_before = len(items) - len(todo)
        report.problems += [(item.id, item.problem) for item in todo if item.problem]
        todo = [item for item in todo if not item.problem]
        if not todo:
            return report
        captioner = Captioner.load(config, dtype=dtype, device=device)
        write_json(settings, asdict(config), shared=True)
        with tqdm(total=len(todo), desc="captioning", unit="image") as bar:
            for batch, images in _load_ahead(todo, batch_size):
                report.problems += [(i.id, x) for i, x in zip(batch, images, strict=True) if isinstance(x, str)]
                good = [(i.id, x) for i, x in zip(batch, images, strict=True) if not isinstance(x, str)]
                texts = captioner.caption([image for _, image in good]) if good else []
                rows = [{"id": id, config.field: text} for (id, _), text in zip(good, texts, strict=True)]
                append_rows(report.output, rows, durable=True)
                report.problems += [
                    (row["id"], "the model returned an empty text") for row in rows if not row[config.field]
                ]
                report.written += len(texts)
                bar.update(len(batch))
    return report


def _list_items(sources: Sequence[DataConfig]) -> list[Item]:
    items: dict[str, Item] = {}
    for source in sources:
        found = sorted(read_items(source, Fields(()))[1], key=lambda item: item.id)
        for item in found:
            if item.id in items and item.picture is not None:
                raise InputError(
                    f"{source.folder}: '{item.id}' is in another source, too; caption the sources into two files"
                )
            items.setdefault(item.id, item)
    if not items:
        raise InputError(f"no images in {', '.join(source.folder for source in sources)}")
    return list(items.values())


def _check_settings(path: Path, config: CaptionConfig) -> None:
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        settings = {name: (before[name], value) for name, value in asdict(config).items() if before[name] != value}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    for name, (old, new) in settings.items():
        raise InputError(
            f"{path}: the captions there were made with {name} {old!r}, not {new!r}; write to another file"
        )


def _lock(file) -> None:
    """Lock the file, since two processes writing it would write every caption twice."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{file.name}: another process is writing it; give each process its own --rank") from None


def _load_ahead(items: Sequence[Item], batch_size: int) -> Iterator[tuple[Sequence[Item], list[Image.Image | str]]]:
    """Batches and their RGB images, or why one cannot be read; the next batch is read while the model is running."""
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        ahead = [pool.submit(_load, item.picture) for item in batches[0]]
        for number, batch in enumerate(batches):
            now, following = ahead, batches[number + 1] if number + 1 < len(batches) else []
            ahead = [pool.submit(_load, item.picture) for item in following]
            yield batch, [future.result() for future in now]


def _load(picture: Picture) -> Image.Image | str:
    try:
        with open_image(picture) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage as error:
        return f"unreadable: {error}"
