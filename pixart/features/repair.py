"""Notes beside a store's files that say what each should hold, and repair: only damaged files are made again."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError

from pixart.errors import InputError
from pixart.features.plan import Layout, file_names, locked
from pixart.features.store import DAMAGED, PROMPTS, describe_damage, find_damage, read_manifest, read_names, read_texts
from pixart.files import digest_file, digest_text, read_json, write_json

_KEYS = {"bytes": int, "blake2b": str, "count": int, "problems": list}


def note_file(path: Path, count: int, problems: Sequence, **more: str) -> None:
    """Write a note beside a file; this seals the file."""
    note = {"bytes": path.stat().st_size, "blake2b": digest_file(path), "count": count, "problems": list(problems)}
    note |= more
    write_json(path.with_suffix(".json"), {**note, "checksum": _checksum(note)}, indent=1)


def read_note(path: Path) -> dict | None:
    """The note of a file, or None if it is missing or damaged."""
    try:
        note = read_json(path.with_suffix(".json"))
    except InputError:
        return None
    if not all(isinstance(note.get(key), kind) for key, kind in _KEYS.items()):
        return None
    if note.keys() - {*_KEYS, "prompts", "checksum"}:
        return None
    checksum = note.pop("checksum", None)  # notes of earlier versions have none
    return note if checksum in (None, _checksum(note)) else None


def _checksum(note: Mapping) -> str:
    return digest_text(json.dumps(note, sort_keys=True))


def is_sealed(path: Path) -> bool:
    note = read_note(path)
    return note is not None and path.is_file() and path.stat().st_size == note["bytes"]


def unsealed(folder: Path, plan: dict) -> list[str]:
    """Names of the files that are not finished yet."""
    return [name for name in file_names(plan) if not is_sealed(folder / name)]


def check_store(folder: Path) -> list[str]:
    """`store.verify`, with its result stored in the folder, so that the next extraction makes damaged files again."""
    damage = find_damage(folder)
    with contextlib.suppress(OSError):  # a store without write permission can be checked, too
        if damage:
            write_json(folder / DAMAGED, damage, indent=1)
        else:
            (folder / DAMAGED).unlink(missing_ok=True)
    return describe_damage(damage)


def mend(folder: Path, plan: dict, layout: Layout, say: Callable[[str], None]) -> None:
    """Rewrite damaged notes if the manifest shows that their files are intact, and remove files that are damaged
    themselves, so that they are made again."""
    with locked(folder):
        try:
            manifest = read_manifest(folder)
        except InputError:
            manifest = {}
        known, found = manifest.get("files", {}), _read_damage(folder)
        for name in file_names(plan):
            path, told = folder / name, known.get(name)
            if not path.is_file() or not path.with_suffix(".json").exists():
                continue  # not sealed yet
            note, marked = read_note(path), name in found
            if not marked and note is not None and (told is None or note["blake2b"] == told["blake2b"]):
                continue
            digest = digest_file(path)
            whole = told is not None and digest == told["blake2b"]
            if whole and not (note and note["blake2b"] == digest):
                say(f"{path.stem}.json is damaged, but {name} is intact: the note is rewritten")
                _write_anew(path, manifest, layout, plan)
            elif not whole and not (note and note["blake2b"] == digest):  # else it is newer than the manifest, and good
                why = found.get(name, "its note is damaged, and nothing else shows whether it is intact")
                say(f"{name}: {why}; it is made again")
                path.unlink()
                path.with_suffix(".json").unlink()


def _read_damage(folder: Path) -> dict[str, str]:
    try:
        return read_json(folder / DAMAGED)
    except InputError:
        return {}


def _write_anew(path: Path, manifest: dict, layout: Layout, plan: dict) -> None:
    """Rewrite the note of an intact file from its content and the manifest."""
    kind = path.stem.partition("-")[0]
    try:
        if path.name == PROMPTS:
            prompts = [name.removeprefix("prompt:") for name in read_names(path) if name.startswith("prompt:")]
            more = {"prompts": digest_text("\n".join(sorted(prompts)))} if "null" in read_names(path) else {}
            note_file(path, len(prompts), [], **more)
            return
        texts = [text for text in read_texts(path, "id" if kind == "samples" else "text") if text]
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it and extract again") from None
    if kind == "samples":
        ids = {record.id for record in layout.of(path.name, plan) if record is not None} - {*texts}
        problems = [problem for problem in manifest["problems"] if problem[0] in ids]
    else:
        problems = [p for p in manifest["problems"] if p[1] == "caption without a token" and p[0] in {*texts}]
    note_file(path, len(texts), problems)
