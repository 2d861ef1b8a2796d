"""Data sets that are made from installed packages: `data.prepare` names one, `data.folder` is where to write it."""

from pathlib import Path

from pixart.data.compositional import build_compositional, build_openmoji_all
from pixart.data.compositional_parts import build_subject, build_tones
from pixart.data.config import DataConfig
from pixart.data.openmoji import build_openmoji

BUILDERS = {
    "openmoji": build_openmoji,
    "openmoji_all": build_openmoji_all,
    "compositional": build_compositional,
    "tones": build_tones,
    "subject": build_subject,
}


def prepare(data: DataConfig) -> None:
    """Create the content of `data.folder` if it does not exist yet.

    Raises:
        InputError: a package that it needs is not installed, or the folder holds something else.
    """
    if data.prepare:
        BUILDERS[data.prepare](data.folder)


def will_be_made(data: DataConfig, folder: str) -> bool:
    """Whether `prepare` will create `folder`."""
    return bool(data.prepare) and Path(folder).is_relative_to(data.folder)
