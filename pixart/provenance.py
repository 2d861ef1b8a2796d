"""What computed a result: versions of the packages, and the git revision of this one."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("pixart", "torch", "accelerate", "timm", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of each of `PACKAGES`; "unknown" where one is not installed, as pixart run from its folder."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@functools.cache
def revision() -> str:
    """The git revision of this package; "unknown" where it is in no repository."""
    here = Path(__file__)
    try:  # an installed copy may lie within some other repository: ask about this very file first
        for question in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            answer = subprocess.run(
                ["git", *question], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
