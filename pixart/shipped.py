"""The configurations that are part of this package, by name: `pixart:openmoji`."""

from pathlib import Path

from pixart.errors import InputError, did_you_mean

PREFIX = "pixart:"
PACKAGE = Path(__file__).parent
# in an installed package they lie in it, in a checkout beside it: see `package-dir` in pyproject.toml
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def shipped_configs() -> dict[str, Path]:
    """Name → file, in alphabetical order; a file in a subfolder has the subfolder's name before its own."""
    folder = next(folder for folder in FOLDERS if folder.is_dir())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_shipped(name: str) -> Path:
    """The file of the shipped configuration `name`, without its prefix.

    Raises:
        InputError: there is none.
    """
    known = shipped_configs()
    if name not in known:
        raise InputError(
            f"config {name}: there is no such file and no such configuration in pixart{did_you_mean(name, known)} "
            f"(there are {', '.join(known)})"
        )
    return known[name]


def find_config(name: str | Path) -> Path:
    """A path as it is; for `pixart:NAME`, or NAME alone if there is no such path, the shipped configuration's file.

    Raises:
        InputError: there is no such path, and no shipped configuration of that name.
    """
    text, path = str(name), Path(name)
    if text.startswith(PREFIX):
        return find_shipped(text.removeprefix(PREFIX))
    could_be_a_name = not path.suffix and not path.is_absolute()
    return find_shipped(text) if could_be_a_name and not path.exists() else path
