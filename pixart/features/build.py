"""Building a feature store by any number of processes, with no coordinator, through any interruption.

What every file will hold is settled before anything is computed (the plan), so a process needs to know only its share:
files number rank, rank + ranks, … A file grows as a part of whole batches and is sealed when all are there; whoever
seals the last one writes the manifest. Batches are the same whatever the share and whatever the kills, so the store is,
bit for bit.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart.data.images import Record
from pixart.errors import InputError
from pixart.features.append_only import PartFile
from pixart.features.store import INDEX, PROMPTS, VERSION, caption_file, digest_manifest, join, join_texts, sample_file
from pixart.files import MANIFEST, digest_file, write_file, write_json
from pixart.seeds import derive_seed

PLAN, LOCK = "plan.json", ".lock"


@dataclass(frozen=True)
class Share:
    """Files number rank, rank + ranks, … are this process's."""

    rank: int = 0
    ranks: int = 1

    def of(self, count: int) -> range:
        return range(self.rank, count, self.ranks)


@dataclass(frozen=True)
class EncodedBatch:
    """Latents of a batch of records, and those left out."""

    good: list[int]  # places in the batch
    latents: Tensor  # (len(good), V, 2, C, h, w): mean and standard deviation, scaled
    problems: list[tuple[str, str]]  # (id, reason)
    arrays: dict[str, Tensor] = field(default_factory=dict)  # (len(good), V, …) each


def agree(path: Path, facts: dict, what: str, *, free: Sequence[str] = ()) -> None:
    """Write `facts` if nothing is there yet, else demand the same ones: all processes, and all starts, are of one mind.

    `free` ones may differ, as the place of a model's files does between machines.

    Raises:
        InputError: another extraction wrote others; names what differs.
    """
    facts = json.loads(json.dumps(facts))
    with locked(path.parent):
        if not path.exists():
            write_json(path, facts, indent=1)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
    if differing := [
        f"{key}: {found.get(key)!r} there, {facts.get(key)!r} now"
        for key in sorted({*found, *facts} - {*free}) if found.get(key) != facts.get(key)
    ]:  # fmt: skip
        raise InputError(
            f"{path.parent} was begun with another {what} ({'; '.join(differing)}); choose another folder for "
            "data.features, or take the change back"
        )


def write_captions(
    folder: Path, plan: dict, captions: Sequence[str], share: Share,
    encode: Callable[[Sequence[str]], list[Tensor]], done: Callable[[int], None],
) -> None:  # fmt: skip
    """Encode and seal this share's caption files; `encode`: texts → states (L_i, W) of real tokens each."""
    size, batch_size = plan["captions_per_shard"], plan["caption_batch"]
    for number in share.of(shard_count(len(captions), size)):
        texts, path = captions[number * size : (number + 1) * size], folder / caption_file(number)
        batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        with open_part(path) as part:
            if part is None:
                done(len(texts))
                continue
            done(sum(map(len, batches[: part.frames])))
            for batch in batches[part.frames :]:
                states, starts = join(encode(batch))
                append(part, {"states": states, "lengths": starts.diff()})
                done(len(batch))
            frames = list(part.read())
            lengths = torch.cat([frame["lengths"] for frame in frames])
            tensors = {"states": torch.cat([frame["states"] for frame in frames])}
            tensors["states_start"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            tensors["text"], tensors["text_start"] = join_texts(list(texts))
            empty = [(texts[i], "caption without a token") for i in (lengths == 0).nonzero().flatten().tolist()]
            seal(path, tensors, len(texts), empty)


def sample_batches(plan: dict, records: Sequence[Record], number: int) -> list[list[int]]:
    """The batches of sample file `number`, as indices of records: bucket by bucket, in order."""
    size, batch_size = plan["samples_per_shard"], plan["batch"]
    by_bucket: dict[tuple[int, int], list[int]] = {}
    for i in range(number * size, min((number + 1) * size, len(records))):
        bucket = records[i].bucket
        by_bucket.setdefault((bucket.height, bucket.width), []).append(i)
    return [group[i : i + batch_size] for group in by_bucket.values() for i in range(0, len(group), batch_size)]


def write_samples(
    folder: Path, plan: dict, records: Sequence[Record], caption_numbers: dict[str, int], share: Share,
    encode: Callable[[list[list[int]]], Iterator[EncodedBatch]], done: Callable[[int], None],
) -> None:  # fmt: skip
    """Encode and seal this share's sample files; `encode` goes through batches of indices of records."""
    for number in share.of(shard_count(len(records), plan["samples_per_shard"])):
        path, batches = folder / sample_file(number), sample_batches(plan, records, number)
        with open_part(path) as part:
            if part is None:
                done(sum(map(len, batches)))
                continue
            done(sum(map(len, batches[: part.frames])))
            todo = batches[part.frames :]
            for batch, encoded in zip(todo, encode(todo), strict=True):
                append(part, _frame([batch[i] for i in encoded.good], encoded))
                done(len(batch))
            found, problems = {}, []
            for frame in part.read():
                values = {name: frame[name] for name in frame if name == "latents" or name.startswith("array.")}
                for place, i in enumerate(frame["records"].tolist()):
                    found[i] = {name: value[place] for name, value in values.items()}
                problems += [tuple(problem) for problem in json.loads(frame["problems"].numpy().tobytes())]
            kept = [(records[i], found[i]) for i in sorted(found)]
            seal(path, _sample_tensors(plan, kept, caption_numbers), len(kept), sorted(problems))


def _frame(records: list[int], encoded: EncodedBatch) -> dict[str, Tensor]:
    problems = json.dumps(encoded.problems).encode()
    return {
        "records": torch.tensor(records, dtype=torch.int64),
        "latents": encoded.latents,
        "problems": torch.frombuffer(bytearray(problems), dtype=torch.uint8),
        **{f"array.{name}": value for name, value in encoded.arrays.items()},
    }


def _sample_tensors(
    plan: dict, kept: list[tuple[Record, dict[str, Tensor]]], numbers: dict[str, int]
) -> dict[str, Tensor]:
    records = [record for record, _ in kept]
    buckets = [(height, width) for _, height, width in plan["buckets"]]
    tensors = {
        "bucket": torch.tensor(
            [buckets.index((r.bucket.height, r.bucket.width)) for r in records], dtype=torch.int16
        ),
        "hash": torch.tensor([derive_seed(r.id) for r in records], dtype=torch.int64),
        "size": torch.tensor([(r.height, r.width) for r in records], dtype=torch.int32).view(-1, 2),
        "caption_weight": torch.tensor([w for r in records for w in r.weights], dtype=torch.float64),
    }  # fmt: skip
    dtype = getattr(torch, plan["latent_dtype"])
    tensors["latents"], tensors["latent_start"] = join(
        [values["latents"].flatten() for _, values in kept] or [torch.empty(0, dtype=dtype)]
    )
    for name in (f"array.{array}" for array in plan.get("arrays", [])):
        values = [values[name] for _, values in kept]
        tensors[name], tensors[f"{name}_start"] = join([value.flatten() for value in values] or [torch.empty(0)])
        tensors[f"{name}_shape"] = torch.tensor([value.shape[1:] for value in values], dtype=torch.int32)
    tensors["id"], tensors["id_start"] = join_texts([r.id for r in records] or [""])
    tensors["caption"], tensors["caption_start"] = join(
        [torch.tensor([numbers[c] for c in r.captions], dtype=torch.int64) for r in records]
        or [torch.empty(0, dtype=torch.int64)]
    )
    return tensors


# ------------------------------------------------------------------------------------------------------ files of work


@contextlib.contextmanager
def open_part(path: Path) -> Iterator[PartFile | None]:
    """The part of a file that is to be sealed, or None if it is."""
    part = PartFile(path.parent / "parts" / f"{path.stem}.part")
    sealed = is_sealed(path)
    try:
        yield None if sealed else part
        sealed = True
    finally:
        part.close(remove=sealed)


def append(part: PartFile, tensors: dict[str, Tensor]) -> None:
    try:
        part.append(tensors)
    except OSError as error:
        raise InputError(
            f"{part.path}: cannot be written ({error}); what was done before is safe: make room, and start the same "
            "command again"
        ) from None


def seal(path: Path, tensors: dict[str, Tensor], count: int, problems: Sequence) -> None:
    """Write a finished file, then the note that it is finished."""
    try:
        write_file(path, lambda partial: save_file(tensors, partial))
        note_file(path, count, problems)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise InputError(
            f"{path}: cannot be written ({error}); what was done before is safe: make room, and start the same command "
            "again"
        ) from None


def note_file(path: Path, count: int, problems: Sequence, **more: str) -> None:
    """Write beside a file what it is: then it is sealed."""
    note = {"bytes": path.stat().st_size, "blake2b": digest_file(path), "count": count, "problems": list(problems)}
    write_json(path.with_suffix(".json"), {**note, **more}, indent=1)


def is_sealed(path: Path) -> bool:
    note = read_note(path)
    return note is not None and path.exists() and path.stat().st_size == note["bytes"]


def read_note(path: Path) -> dict | None:
    try:
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def shard_count(count: int, size: int) -> int:
    return -(-count // size)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from None
    with file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------------------------- the manifest


def unsealed(folder: Path, plan: dict) -> list[str]:
    """Names of the files that are not there yet."""
    return [name for name in file_names(plan) if not is_sealed(folder / name)]


def file_names(plan: dict) -> list[str]:
    samples = [sample_file(i) for i in range(shard_count(plan["samples"], plan["samples_per_shard"]))]
    captions = [caption_file(i) for i in range(shard_count(plan["captions"], plan["captions_per_shard"]))]
    return [*captions, PROMPTS, *samples]


def finish(folder: Path, plan: dict, problems: Sequence[tuple[str, str]]) -> dict | None:
    """Write index and manifest if every file is sealed; else None. Any process may, and the last one does.

    `problems` are those of the scan; the manifest lists them with those met on the way.
    """
    if unsealed(folder, plan):
        return None
    with locked(folder):
        notes = {name: read_note(folder / name) for name in file_names(plan)}
        _write_index(folder, plan)
        files = {name: {key: note[key] for key in ("bytes", "blake2b")} for name, note in notes.items()}
        files[INDEX] = {"bytes": (folder / INDEX).stat().st_size, "blake2b": digest_file(folder / INDEX)}
        facts = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("vae", "text")}
        manifest = {
            "version": VERSION, **plan, **facts,
            "samples": sum(note["count"] for name, note in notes.items() if name.startswith("samples-")),
            "problems": [*problems, *(problem for note in notes.values() for problem in note["problems"])],
            "files": files,
        }  # fmt: skip
        manifest["checksum"] = digest_manifest(manifest)
        write_json(folder / MANIFEST, manifest, indent=1)
        with contextlib.suppress(OSError):
            os.rmdir(folder / "parts")
    return manifest


def _write_index(folder: Path, plan: dict) -> None:
    from safetensors import safe_open

    columns: dict[str, list[Tensor]] = {"bucket": [], "hash": []}
    for i in range(shard_count(plan["samples"], plan["samples_per_shard"])):
        with safe_open(folder / sample_file(i), framework="pt") as file:
            for name, parts in columns.items():
                parts.append(file.get_tensor(name))
    tensors = {name: torch.cat(parts) for name, parts in columns.items()}
    tensors["shard_start"] = join(columns["bucket"])[1]
    write_file(folder / INDEX, lambda partial: save_file(tensors, partial))
