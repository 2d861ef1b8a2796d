"""One file a command: its options are read, one function is called, what it returns is printed. `scripts/` starts them.

Nothing that a program in Python could want may enter it.
"""

import importlib
import os


def run(name: str, *, keep_memory: bool = True) -> None:
    """Run the command of that name on this process's arguments, and exit as `cli.run` does.

    OpenMP's threads sleep while they wait for work, unless the environment says otherwise: threads that spin are hardly
    faster alone (a few %), and slow down whatever else runs on the same cores several times. OpenMP's library reads
    this once, when torch loads it, hence the imports below.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cli, command = (importlib.import_module(f"pixart.{module}") for module in ("cli", f"commands.{name}"))
    cli.run(command.main, keep_memory=keep_memory)
