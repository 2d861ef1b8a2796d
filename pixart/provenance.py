"""Provenance of results: versions of the packages, and the git revision of this one."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("pixart", "torch", "accelerate", "timm", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of each of `PACKAGES`; "unknown" if not installed, e.g. pixart run from a checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@functools.cache
def revision() -> str:
    """The git revision of this package; "unknown" if it is not in a repository."""
    here = Path(__file__)
    try:  # an installed copy may be inside another repository, so check first that this file is tracked
        for question in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            answer = subprocess.run(
                ["git", *question], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
