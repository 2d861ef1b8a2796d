"""Ideas by name: what a setting may choose from, and how a new one is added.

    @MLPS.register("swiglu")
    class SwiGLU(nn.Module): ...

From then on `model.mlp: swiglu` chooses it. A file of one's own registers likewise, see `pixart.extensions`.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from pixart.errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names → implementations of one setting."""

    def __init__(self, setting: str):
        """`setting` is the key of a configuration that takes these names, for errors."""
        self.setting = setting
        self._entries: dict[str, T] = {}
        self._origins: dict[str, str] = {}  # the module that registered each

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that adds what it decorates under `name`.

        Raises:
            InputError: another module has registered that name.
        """
        origin = sys._getframe(1).f_globals.get("__name__", "?")

        def add(entry: T) -> T:
            if self._origins.get(name, origin) != origin:
                raise InputError(f"{self.setting}: '{name}' is taken by {self._origins[name]}; choose another name")
            self._entries[name], self._origins[name] = entry, origin
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """The entry of that name. Raises InputError, with the nearest names, where there is none."""
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            raise InputError(
                f"{self.setting}: there is no '{name}'{hint} (there are {', '.join(self._entries)}; a file that "
                "registers another is given as extensions: [FILE] in a configuration, --extension or extensions=)"
            )
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
