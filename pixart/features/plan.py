"""The plan of a store: what it will hold, fixed before anything is computed, so that all processes and all later starts
agree.

If the data set has grown, a new generation of files is added to the store; captions or images that have changed are
refused by name.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart.data.images import Record
from pixart.errors import InputError
from pixart.features.store import INDEX, PROMPTS, caption_file, read_manifest, read_texts, sample_file
from pixart.files import read_json, write_file, write_json
from pixart.seeds import derive_seed

PLAN, HASHES, LOCK, WORK = "plan.json", "plan.hashes", ".lock", ".work"
_OF_THE_SET = ("samples", "captions", "source", "more")  # keys of a plan that depend on the data, not on the settings
# a file of facts (plan or encoder) → the notes of the files that depend on it
_MADE = {PLAN: "*-*.json", "vae.json": "samples-*.json", "text.json": "captions-*.json"}


@dataclass(frozen=True)
class Layout:
    """Records and captions by number: file n holds those from n · size on. None fills up the last file of a generation,
    so that the next generation starts with a new file."""

    records: list[Record | None]
    captions: list[str | None]

    def of(self, name: str, plan: dict) -> list:
        """The records or captions of file `name`."""
        kind, _, number = Path(name).stem.partition("-")
        items, size = getattr(self, "records" if kind == "samples" else kind), plan[f"{kind}_per_shard"]
        return items[int(number) * size : (int(number) + 1) * size]

    @property
    def numbers(self) -> dict[str, int]:
        return {caption: i for i, caption in enumerate(self.captions) if caption is not None}


def shard_count(count: int, size: int) -> int:
    return -(-count // size)


def generations(plan: dict) -> list[dict]:
    """The first extraction, and each later one that added samples or captions."""
    return [plan, *plan.get("more", [])]


def file_names(plan: dict) -> list[str]:
    """All files of a store except the index."""
    samples, captions = (
        sum(shard_count(part[kind], plan[f"{kind}_per_shard"]) for part in generations(plan))
        for kind in ("samples", "captions")
    )
    return [*map(caption_file, range(captions)), PROMPTS, *map(sample_file, range(samples))]


def describe_set(records: Sequence[Record], captions: Sequence[str]) -> dict:
    """The part of a plan that depends on the data set."""
    source = hashlib.blake2b(digest_size=16)
    for record in records:
        line = [record.id, record.captions, record.weights, record.height, record.width]
        source.update(json.dumps(line).encode() + b"\n")
    return {"samples": len(records), "captions": len(captions), "source": source.hexdigest()}


def sort_captions(records: Sequence[Record]) -> list[str]:
    """All distinct captions, sorted by length."""
    return sorted({c for r in records for c in r.captions}, key=lambda caption: (len(caption), caption))


def settle(folder: Path, plan: dict, records: Sequence[Record], *, write: bool) -> tuple[dict, Layout]:
    """The plan that is valid from now on, and the layout of its files.

    If the folder has no plan, or no work was done under it yet, this is `plan`; otherwise it is the folder's plan,
    extended by what is new in `records`. With `write` it is on the disk when this returns.

    Raises:
        InputError: the folder was started with other settings, or images or captions have since changed or are gone.
    """
    with locked(folder):
        if not (folder / PLAN).exists():
            check_lost(folder, PLAN)
            return _set(folder, plan, records, torch.zeros(len(records), dtype=torch.int16), write)
        found = read_json(folder / PLAN, what="the plan")
        try:
            _compare(folder / PLAN, found, plan, "plan", free=_OF_THE_SET)
            which = _generations_of(folder, found, plan, records)
        except InputError:
            if not is_untouched(folder):
                raise
            return _set(folder, plan, records, torch.zeros(len(records), dtype=torch.int16), write)
        if (which < 0).any():
            new = len(generations(found))
            which = torch.where(which < 0, new, which).to(torch.int16)
            groups = _group(records, which)
            before = {caption for group in groups[:-1] for caption in sort_captions(group)}
            captions = [caption for caption in sort_captions(groups[-1]) if caption not in before]
            found = {**found, "more": [*found.get("more", []), describe_set(groups[-1], captions)]}
        return _set(folder, found, records, which, write)


def _set(folder: Path, plan: dict, records: Sequence[Record], which: Tensor, write: bool) -> tuple[dict, Layout]:
    if write:
        hashes = {**_hash(records), "generation": which}
        hashes["digest"] = _digest(hashes)
        write_file(folder / HASHES, lambda partial: save_file(hashes, partial))
        write_json(folder / PLAN, plan, indent=1)
    rows: list[Record | None] = []
    texts: list[str | None] = []
    for group in _group(records, which):
        known = {*texts}
        for numbers, items, kind in (
            (rows, group, "samples"),
            (texts, [c for c in sort_captions(group) if c not in known], "captions"),
        ):
            size = plan[f"{kind}_per_shard"]
            numbers += [None] * (-len(numbers) % size)
            numbers += items
    return plan, Layout(rows, texts)


def _group(records: Sequence[Record], which: Tensor) -> list[list[Record]]:
    groups: list[list[Record]] = []
    for record, number in zip(records, which.tolist(), strict=True):
        groups += [[] for _ in range(number + 1 - len(groups))]
        groups[number].append(record)
    return groups or [[]]


def _hash(records: Sequence[Record]) -> dict[str, Tensor]:
    """Hashes by which changes of a record, its image and its captions are noticed."""
    columns = {
        "id": [derive_seed(r.id) for r in records],
        "image": [derive_seed(r.length, r.height, r.width) for r in records],
        "captions": [derive_seed(json.dumps([r.captions, r.weights])) for r in records],
    }
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}


def _digest(columns: dict[str, Tensor]) -> Tensor:
    digest = hashlib.blake2b(digest_size=16)
    for _, column in sorted(columns.items()):
        digest.update(column.numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _generations_of(folder: Path, found: dict, plan: dict, records: Sequence[Record]) -> Tensor:
    """The generation that each record belongs to, -1 for new records.

    Raises:
        InputError: some of the store's records have changed or are gone.
    """
    before, now = _read_hashes(folder, found, plan, records), _hash(records)
    place = {id: i for i, id in enumerate(before["id"].tolist())}
    places = torch.tensor([place.get(id, -1) for id in now["id"].tolist()], dtype=torch.int64)
    known = places >= 0
    wrong = []
    if gone := len(place) - int(known.sum()):
        wrong.append(f"samples: {len(place)} there, {len(records)} now: {gone} of the stored images are gone")
    for name, what in (("image", "images were replaced"), ("captions", "captions changed")):
        if name in before:
            changed = known.clone()
            changed[known] = before[name][places[known]] != now[name][known]
            if names := [records[i].id for i in changed.nonzero().flatten().tolist()]:
                wrong.append(f"{what}: {len(names)}, e.g. {', '.join(names[:3])}")
    if wrong:
        raise _other(folder / PLAN, "plan", wrong)
    return torch.where(known, before["generation"][places], -1)


def _read_hashes(folder: Path, found: dict, plan: dict, records: Sequence[Record]) -> dict[str, Tensor]:
    """The hashes of a store's records. A store started by a version without hashes is matched by its `source` digest,
    or by the ids in its files if all files are there."""
    if (folder / HASHES).is_file():
        try:
            hashes = load_file(folder / HASHES)
            if torch.equal(hashes.pop("digest"), _digest(hashes)):
                return hashes
        except (OSError, SafetensorError, KeyError):
            pass  # damaged; the code below works without it
    if found.get("source") == plan["source"]:
        return {"id": _hash(records)["id"], "generation": torch.zeros(len(records), dtype=torch.int16)}
    ids: set[str] = set()
    for name in file_names(found):
        if name.startswith("samples-"):
            note = folder / Path(name).with_suffix(".json")
            if not (folder / name).is_file() or not note.is_file():
                break
            ids |= {*read_texts(folder / name, "id"), *(id for id, _ in read_json(note).get("problems", []))}
    then = [record for record in records if record.id in ids]
    if describe_set(then, [])["source"] != found.get("source"):
        pairs = [f"{key}: {found.get(key)!r} there, {plan[key]!r} now" for key in ("samples", "captions", "source")]
        raise _other(folder / PLAN, "plan", [pair for pair in pairs if pair])
    return {"id": _hash(then)["id"], "generation": torch.zeros(len(then), dtype=torch.int16)}


# ----------------------------------------------------------------------------------------- agreement between processes


def agree(path: Path, facts: dict, what: str, *, free: Sequence[str] = ()) -> None:
    """Write `facts` if the file does not exist or no work depends on it yet; otherwise require that they are equal.

    Keys in `free` may differ, e.g. the path of a model, which depends on the machine.

    Raises:
        InputError: another extraction wrote different facts; the message names them.
    """
    facts = json.loads(json.dumps(facts))
    with locked(path.parent):
        if not path.exists():
            check_lost(path.parent, path.name)
        else:
            try:
                _compare(path, read_json(path, what=f"the facts of the {what}"), facts, what, free=free)
                return
            except InputError:
                if not is_untouched(path.parent):
                    raise
        write_json(path, facts, indent=1)


def _compare(path: Path, found: dict, facts: dict, what: str, *, free: Sequence[str]) -> None:
    if differing := [
        f"{key}: {found.get(key)!r} there, {facts.get(key)!r} now"
        for key in sorted({*found, *facts} - {*free})
        if found.get(key) != facts.get(key)
    ]:
        raise _other(path, what, differing)


def _other(path: Path, what: str, wrong: Sequence[str]) -> InputError:
    return InputError(
        f"{path.parent} was started with another {what} ({'; '.join(wrong)}); choose another folder for data.features, "
        "or undo the change"
    )


def check_lost(folder: Path, name: str) -> None:
    """Refuse to continue if a file of facts is lost, since the files that depend on it may have been made with others.

    If the store is finished, the facts are restored from its manifest.
    """
    if not any(folder.glob(_MADE[name])):
        return
    with contextlib.suppress(InputError):
        if (facts := read_manifest(folder).get(name.removesuffix(".json"))) is not None:
            write_json(folder / name, facts, indent=1)
            return
    raise InputError(
        f"{folder / name} is lost, which says what the files there were made with; restore it, or choose another "
        "folder for data.features"
    )


def is_untouched(folder: Path) -> bool:
    """Whether no file is sealed, no batch is done and no other process is working, so that the settings of an earlier,
    failed attempt need not be kept."""
    if any(folder.glob("*-*.json")) or (folder / INDEX).exists() or (folder / PROMPTS).exists():
        return False
    if any(path.stat().st_size for path in folder.glob("parts/*.part")):
        return False
    return working.alone(folder)


class _Working:
    """A shared lock, held by each process that is working on a store."""

    def __init__(self):
        self.files: dict[Path, object] = {}

    @contextlib.contextmanager
    def __call__(self, folder: Path) -> Iterator[None]:
        with _opened(folder / WORK) as file:
            fcntl.lockf(file, fcntl.LOCK_SH)
            self.files[folder] = file
            try:
                yield
            finally:
                del self.files[folder]

    def alone(self, folder: Path) -> bool:
        """Whether no other process holds the lock."""
        if folder not in self.files:
            return False
        try:
            fcntl.lockf(self.files[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        fcntl.lockf(self.files[folder], fcntl.LOCK_SH)
        return True


working = _Working()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that one process at a time can enter."""
    with _opened(folder / LOCK) as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _opened(path: Path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+")
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written ({error})") from None
