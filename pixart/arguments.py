"""Checks of the arguments of public functions by their annotations; for diffusers' names of arguments, the error says
ours."""

import dataclasses
import functools
import inspect
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, ParamSpec, TypeVar, Union

from pixart.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on common file systems
# keyword of diffusers' PixArt pipelines and their `from_pretrained` → its equivalent here
DIFFUSERS_WORDS = {
    "prompt": "prompts",
    "negative_prompt": "negative_prompts",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "generator": "seeds, a number for each image",
    "latents": "seeds, from which each image's noise is drawn",
    "scheduler": "sampler, a name",
    "num_images_per_prompt": "images_per_prompt",
    "prompt_embeds": "text_embeddings=(states, mask)",
    "prompt_attention_mask": "text_embeddings=(states, mask)",
    "negative_prompt_embeds": "negative_prompts, or null",
    "negative_prompt_attention_mask": "negative_prompts, or null",
    "output_type": "output: image, pixels or latent",
    "return_dict": "not needed: the images themselves are returned",
    "use_resolution_binning": "sizes, exact or official",
    "callback_on_step_end": "callback",
    "callback_steps": "callback, called after every step",
    "clean_caption": "the model's card, text.clean",
    "max_sequence_length": "the model's card, text.length",
    "torch_dtype": "dtype",
    "device_map": "device",
    "subfolder": "part of the source: owner/name/subfolder",
}


def checked(call: Callable[P, T]) -> Callable[P, T]:
    """A decorator that refuses arguments that do not fit their parameter's annotation, with a one-line error.

    Choices (`Literal`) and tensor shapes are left to the function, which can give better errors.

    Raises:
        InputError: when the decorated function is called, before its body runs.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        for word in kwargs.keys() - signature.parameters.keys():
            if word in DIFFUSERS_WORDS:
                raise InputError(f"{word} is diffusers' name; here it is {DIFFUSERS_WORDS[word]}")
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # too many or too few arguments: Python's own error says so
            return call(*args, **kwargs)
        for name, hint in _hints(call).items():
            if name in given and not _fits(given[name], hint):
                raise InputError(f"{name}: got {say(given[name])}, expected {_words(hint)}")
            if name in given and Path in typing.get_args(hint):
                check_path(given[name], name)
        return call(*args, **kwargs)

    return wrapped


def check_types(config: Any, section: str = "", *, paths: bool = False) -> None:
    """Refuse fields of a dataclass that do not fit their annotations; `section` is the dotted path to it in a
    configuration. With `paths`, a path is accepted where a text is expected.

    Raises:
        InputError: a field does not fit; the message names it.
    """
    prefix = f"{section}." if section else ""
    cls: Any = type(config)
    for name, hint in _field_hints(cls).items():
        value = getattr(config, name)
        text = str(value) if paths and isinstance(value, PurePath) else value
        if not _fits(value, hint) and not _fits(text, hint):
            raise InputError(f"{prefix}{name}: got {say(value)}, expected {_words(hint)}")


def check_path(value: Any, name: str) -> None:
    """Refuse a text or path that no file system can hold; `name` is what it is.

    Raises:
        InputError: it holds a NUL or half a character, or a part of it is too long.
    """
    if not isinstance(value, (str, PurePath)):
        return
    try:
        data = os.fsencode(value)
    except UnicodeEncodeError:
        raise InputError(f"{name}: got {say(str(value))}, expected a path; it holds half a character") from None
    if b"\0" in data:
        raise InputError(f"{name}: got {say(str(value))}, expected a path; it holds a NUL character")
    longest = max(map(len, data.split(os.fsencode(os.sep))))
    if longest > LONGEST_NAME or len(data) > LONGEST_PATH:
        raise InputError(f"{name}: got {say(str(value))}, a name of {longest} bytes, expected at most {LONGEST_NAME}")


def say(value: Any) -> str:
    """A short description of a value, on one line and printable."""
    short = value is None or isinstance(value, (str, numbers.Number, list, tuple, dict))
    return " ".join(_SHORT.repr(value).split()) if short else f"a {type(value).__name__}"


@functools.cache
def _field_hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters, resolved at the first call, since they may name what is defined later."""
    hints = typing.get_type_hints(call)
    kinds = {name: parameter.kind for name, parameter in inspect.signature(call).parameters.items()}
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: hint for name, hint in hints.items() if name in kinds and kinds[name] not in many}


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if hint in (None, type(None)):
        return value is None
    if hint is int or hint is float:
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if origin in (Sequence, Iterable):
        items = value if isinstance(value, Sequence) else ()  # other iterables may be consumed by reading
        return isinstance(value, origin) and not isinstance(value, str) and all(_fits(v, inside[0]) for v in items)
    if origin is tuple and inside[-1] is Ellipsis:
        return isinstance(value, (tuple, list)) and all(_fits(item, inside[0]) for item in value)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(inside) and all(map(_fits, value, inside))
    if origin in (Mapping, dict):
        pairs = value.items() if isinstance(value, origin) else ()
        return isinstance(value, origin) and all(_fits(k, inside[0]) and _fits(v, inside[1]) for k, v in pairs)
    if origin is Literal:  # which of the choices it is, the function checks
        return isinstance(value, tuple({type(choice) for choice in inside}))
    if origin is Callable:
        return callable(value)
    known = isinstance(hint, type) and hint is not Any and not getattr(hint, "_is_protocol", False)
    return isinstance(value, hint) if known else True


def _words(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        *first, last = dict.fromkeys(map(_words, inside))
        return f"{', '.join(first)} or {last}" if first else last
    if hint in (None, type(None)):
        return "None"
    if hint is float:
        return "a number"
    if origin in (Sequence, Iterable):
        return f"a sequence of {_words(inside[0])}"
    if origin is tuple and inside[-1] is Ellipsis:
        return f"a list of {_words(inside[0])}"
    if origin is tuple:
        return f"a pair of {' and '.join(map(_words, inside))}"
    if origin in (Mapping, dict):
        return f"names with {_words(inside[1])}"
    if origin is Callable:
        return "a function"
    if origin is Literal:
        return ", ".join(map(str, inside))
    name = getattr(hint, "__name__", str(hint))
    return f"torch.{name}" if getattr(hint, "__module__", "") == "torch" and name in ("dtype", "device") else name
