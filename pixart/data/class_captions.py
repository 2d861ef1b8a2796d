"""Captions from class folders, as in ImageNet: the names of a class become the captions of each of its images."""

from pathlib import Path

from pixart.data.images import IMAGE_SUFFIXES
from pixart.errors import InputError
from pixart.files import to_json, write_file


def write_class_captions(folder: str | Path, names: str | Path) -> tuple[int, int]:
    """Write `folder`/metadata.jsonl for images in one folder per class → number of images, number of classes.

    Args:
        names: a text file with a line per class: the folder's name, then the class's names separated by commas, as in
            ImageNet's LOC_synset_mapping.txt ("n01440764 tench, Tinca tinca"). Each name is one caption.

    Raises:
        InputError: there is no such folder or file; a folder has no line; metadata.jsonl already exists.
    """
    folder, names = Path(folder), Path(names)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; expected a folder with one folder per class")
    target = folder / "metadata.jsonl"
    if target.exists():
        raise InputError(f"{target} already exists; remove it to write it again")
    captions = _read_names(names)
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if unknown := [path.name for path in classes if path.name not in captions]:
        raise InputError(f"{names}: no line for {len(unknown)} of {len(classes)} folders, the first is {unknown[0]}")
    count = 0

    def write(part: Path) -> None:
        nonlocal count
        with open(part, "w", encoding="utf-8") as file:
            for path in classes:
                for image in sorted(path.rglob("*")):
                    if image.suffix.lower() in IMAGE_SUFFIXES:
                        row = {"file_name": image.relative_to(folder).as_posix(), "text": captions[path.name]}
                        file.write(to_json(row) + "\n")
                        count += 1
        if not count:
            raise InputError(f"{folder}: no images in class folders")

    write_file(target, write)
    return count, len(classes)


def _read_names(path: Path) -> dict[str, list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"class names {path}: cannot be read ({error})") from None
    captions = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        folder, _, rest = line.strip().partition(" ")
        texts = [text.strip() for text in rest.split(",") if text.strip()]
        if not texts or folder in captions:
            raise InputError(f"{path}:{number}: expected a new folder name, then the class's names, got '{line[:60]}'")
        captions[folder] = texts
    return captions
