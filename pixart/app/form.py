"""What the page's form sends: its inputs in one order, for the page itself and for clients that use it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pixart.app.settings import Settings

ALONE = "—"  # no second model
WITHOUT = "the same model without adapters"
CANVAS = {"background": None, "layers": [], "composite": None}  # an empty one
# the inputs that hold a field of `Settings` each; a strength for each of the page's adapters follows them
FIELDS = tuple(field.name for field in fields(Settings) if field.name != "adapters")


def to_list(model: str, other: str = ALONE, strengths: Sequence[float] = (), **values: Any) -> list[Any]:
    """The inputs from first to last, as a client of Gradio sends them.

    Args:
        strengths: of all adapters of the page, in the order in which they were named.
        values: fields of `Settings`; others have their default, which means the model's own value.
    """
    empty = {name: getattr(Settings, name) for name in FIELDS} | values
    return [model, other, CANVAS, *("" if value is None else value for value in empty.values()), *strengths]


def from_list(sent: Sequence[Any], adapters: Sequence[str]) -> tuple[str, str | None, Any, dict[str, Any]]:
    """The inputs → the model, what it is compared with, the canvas, and the values for `read_form`."""
    model, other, canvas, *rest = sent
    values = dict(zip(FIELDS, rest, strict=False))
    values["adapters"] = dict(zip(adapters, rest[len(FIELDS) :], strict=True))
    return model, None if other == ALONE else other, canvas, values


def in_order(inputs: Mapping[str, Any], adapters: Sequence[Any]) -> list[Any]:
    """Inputs by the names of their fields, or their values, in the order of the form."""
    return [*(inputs[name] for name in FIELDS), *adapters]
