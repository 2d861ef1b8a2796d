"""Arguments of the public functions: checked by their annotations; diffusers' words for them are answered with ours."""

import functools
import inspect
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, Union

from pixart.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")
# keyword of diffusers' PixArt pipelines and their `from_pretrained` → what stands in its place here
DIFFUSERS_WORDS = {
    "prompt": "prompts",
    "negative_prompt": "negative_prompts",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "generator": "seeds, a number for each image",
    "latents": "seeds, of which each image's noise is drawn",
    "scheduler": "sampler, a name",
    "num_images_per_prompt": "images_per_prompt",
    "prompt_embeds": "text_embeddings=(states, mask)",
    "prompt_attention_mask": "text_embeddings=(states, mask)",
    "negative_prompt_embeds": "negative_prompts, or null",
    "negative_prompt_attention_mask": "negative_prompts, or null",
    "output_type": "output: image, pixels or latent",
    "return_dict": "left out: the images themselves are returned",
    "use_resolution_binning": "sizes, which is exact or official",
    "callback_on_step_end": "callback",
    "callback_steps": "callback, called after every step",
    "clean_caption": "the model's card, text.clean",
    "max_sequence_length": "the model's card, text.length",
    "torch_dtype": "dtype",
    "device_map": "device",
    "subfolder": "the source's end: owner/name/subfolder",
}


def checked(call: Callable[P, T]) -> Callable[P, T]:
    """A decorator: what does not fit the annotation of its parameter is refused in one line.

    Words that are a choice (`Literal`) and tensors' shapes are left to the function, which knows more.

    Raises:
        InputError: from the decorated function, before anything of it runs.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        for word in kwargs.keys() - signature.parameters.keys():
            if word in DIFFUSERS_WORDS:
                raise InputError(f"{word} is diffusers' word; here it is {DIFFUSERS_WORDS[word]}")
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # too many or too few: Python's own words say it
            return call(*args, **kwargs)
        for name, hint in _hints(call).items():
            if name in given and not _fits(given[name], hint):
                raise InputError(f"{name}: got {say(given[name])}, expected {_words(hint)}")
        return call(*args, **kwargs)

    return wrapped


def say(value: Any) -> str:
    """A value in a few words, on one line."""
    short = value is None or isinstance(value, (str, numbers.Number, list, tuple, dict))
    return " ".join(reprlib.repr(value).split()) if short else f"a {type(value).__name__}"


@functools.cache
def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters, looked up at the first call: they may name what is defined later."""
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
        items = value if isinstance(value, Sequence) else ()  # others may be read only once
        return isinstance(value, origin) and not isinstance(value, str) and all(_fits(v, inside[0]) for v in items)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(inside) and all(map(_fits, value, inside))
    if origin in (Mapping, dict):
        return isinstance(value, origin) and all(_fits(item, inside[1]) for item in value.values())
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
