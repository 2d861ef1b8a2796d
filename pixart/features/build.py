"""Building a feature store by any number of processes, without a coordinator, and resumable after any interruption.

The plan fixes what every file will hold before anything is computed, so a process needs to know only its share: files
number rank, rank + ranks, … While a file is being made, whole batches are appended to its part file; once all are there
it is sealed. The process that seals the last file writes the manifest. Batches do not depend on the number of processes
or on interruptions, so the finished store is the same, bit for bit.
"""

import contextlib
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
from pixart.features.plan import check_lost, file_names, generations, locked, shard_count
from pixart.features.repair import is_sealed, note_file, read_note, unsealed
from pixart.features.store import DAMAGED, INDEX, VERSION, caption_file, digest_manifest, join, join_texts, sample_file
from pixart.files import MANIFEST, digest_file, read_json, write_file, write_json
from pixart.seeds import derive_seed


@dataclass(frozen=True)
class Share:
    """A process's share of the files: numbers rank, rank + ranks, …"""

    rank: int = 0
    ranks: int = 1

    def of(self, count: int) -> range:
        return range(self.rank, count, self.ranks)


@dataclass(frozen=True)
class EncodedBatch:
    """Latents of a batch of records, and the records that were left out."""

    good: list[int]  # positions in the batch
    latents: Tensor  # (len(good), V, 2, C, h, w): mean and standard deviation, scaled
    problems: list[tuple[str, str]]  # (id, reason)
    arrays: dict[str, Tensor] = field(default_factory=dict)  # (len(good), V, …) each


def write_captions(
    folder: Path,
    plan: dict,
    captions: Sequence[str | None],
    share: Share,
    encode: Callable[[Sequence[str]], list[Tensor]],
    done: Callable[[int], None],
) -> None:
    """Encode and seal this share's caption files; `encode`: texts → states (L_i, W) of each text's real tokens."""
    size, batch_size = plan["captions_per_shard"], plan["caption_batch"]
    for number in share.of(shard_count(len(captions), size)):
        texts = [text for text in captions[number * size : (number + 1) * size] if text is not None]
        path = folder / caption_file(number)
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


def sample_batches(plan: dict, records: Sequence[Record | None], number: int) -> list[list[int]]:
    """The batches of sample file `number`, as indices of records: bucket by bucket, in order."""
    size, batch_size = plan["samples_per_shard"], plan["batch"]
    by_bucket: dict[tuple[int, int], list[int]] = {}
    for i in range(number * size, min((number + 1) * size, len(records))):
        if (record := records[i]) is not None:
            by_bucket.setdefault((record.bucket.height, record.bucket.width), []).append(i)
    return [group[i : i + batch_size] for group in by_bucket.values() for i in range(0, len(group), batch_size)]


def write_samples(
    folder: Path,
    plan: dict,
    records: Sequence[Record | None],
    caption_numbers: dict[str, int],
    share: Share,
    encode: Callable[[list[list[int]]], Iterator[EncodedBatch]],
    done: Callable[[int], None],
) -> None:
    """Encode and seal this share's sample files; `encode` takes batches of indices of records."""
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
        "bucket": torch.tensor([buckets.index((r.bucket.height, r.bucket.width)) for r in records], dtype=torch.int16),
        "hash": torch.tensor([derive_seed(r.id) for r in records], dtype=torch.int64),
        "size": torch.tensor([(r.height, r.width) for r in records], dtype=torch.int32).view(-1, 2),
        "caption_weight": torch.tensor([w for r in records for w in r.weights], dtype=torch.float64),
    }
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
    """The part file of a store's file, or None if that is sealed already."""
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
            f"{part.path}: cannot be written ({error}); finished work is safe: free some space, then run the same "
            "command again"
        ) from None


def seal(path: Path, tensors: dict[str, Tensor], count: int, problems: Sequence) -> None:
    """Write a finished file, then the note that says so."""
    try:
        write_file(path, lambda partial: save_file(tensors, partial))
        note_file(path, count, problems)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise InputError(
            f"{path}: cannot be written ({error}); finished work is safe: free some space, then run the same command "
            "again"
        ) from None


# --------------------------------------------------------------------------------------------------------- the manifest


def finish(folder: Path, plan: dict, problems: Sequence[tuple[str, str]]) -> dict | None:
    """Write index and manifest if every file is sealed, else return None. All processes call it, and the last one to
    finish writes.

    `problems` are those found by the scan; the manifest lists them together with those found while encoding.
    """
    if unsealed(folder, plan):
        return None
    with locked(folder):
        notes = {name: read_note(folder / name) for name in file_names(plan)}
        _write_index(folder, plan)
        files = {name: {key: note[key] for key in ("bytes", "blake2b")} for name, note in notes.items()}
        files[INDEX] = {"bytes": (folder / INDEX).stat().st_size, "blake2b": digest_file(folder / INDEX)}
        for name in ("vae.json", "text.json"):
            if not (folder / name).exists():
                check_lost(folder, name)
        facts = {name: read_json(folder / f"{name}.json") for name in ("vae", "text")}
        manifest = {
            "version": VERSION,
            **plan,
            **facts,
            "captions": sum(part["captions"] for part in generations(plan)),
            "samples": sum(note["count"] for name, note in notes.items() if name.startswith("samples-")),
            "problems": [*problems, *(problem for note in notes.values() for problem in note["problems"])],
            "files": files,
        }
        manifest["checksum"] = digest_manifest(manifest)
        write_json(folder / MANIFEST, manifest, indent=1)
        (folder / DAMAGED).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.rmdir(folder / "parts")
    return manifest


def _write_index(folder: Path, plan: dict) -> None:
    from safetensors import safe_open

    columns: dict[str, list[Tensor]] = {"bucket": [], "hash": []}
    for shard in (name for name in file_names(plan) if name.startswith("samples-")):
        with safe_open(folder / shard, framework="pt") as file:
            for name, parts in columns.items():
                parts.append(file.get_tensor(name))
    tensors = {name: torch.cat(parts) for name, parts in columns.items()}
    tensors["shard_start"] = join(columns["bucket"])[1]
    write_file(folder / INDEX, lambda partial: save_file(tensors, partial))
