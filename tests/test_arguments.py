"""Arguments are checked by their annotations; names of other libraries are refused with ours."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from pixart.arguments import checked
from pixart.errors import InputError


class Thing:
    @checked
    def call(
        self, prompts: str | Sequence[str] | None, seeds: int | Sequence[int] = 0, *, steps: int | None = None,
        guidance: float = 1.0, output: Literal["image", "latent"] = "image",
        callback: Callable[[int], None] | None = None,
        pair: tuple[torch.Tensor, torch.Tensor] | None = None, named: Mapping[str, torch.Tensor] | None = None,
        flag: bool = False, files: Iterable[str | Path] = (), dtype: torch.dtype = torch.float32, plain=None,
        options: dict[str, Any] | None = None,
    ) -> tuple:  # fmt: skip
        """What it does."""
        return prompts, seeds, steps, guidance

    @classmethod
    @checked
    def make(cls, source: str | Path, *, device: torch.device | str = "cpu") -> "Thing":
        return cls()


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"seeds": [1, 2]}, {"seeds": range(3)}, {"seeds": np.int64(3)}, {"steps": 3}, {"guidance": 3},
        {"guidance": np.float32(3)}, {"callback": print}, {"pair": (torch.zeros(1), torch.zeros(1))},
        {"named": {"a": torch.zeros(1)}}, {"files": ["a", Path("b")]}, {"files": iter(["a"])}, {"plain": object()},
        {"options": {"a": [1]}},
        {"prompts": ["a", "b"]}, {"prompts": None}, {"output": "wrong, but said better where it is known"},
    ],
)  # fmt: skip
def test_arguments_that_fit_the_annotations_are_accepted(arguments):
    Thing().call(**{"prompts": "a", **arguments})
    assert isinstance(Thing.make("x", device=torch.device("cpu")), Thing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": None}, "seeds: got None, expected int or a sequence of int"),
        ({"seeds": 1.5}, "seeds: got 1.5, expected int or a sequence of int"),
        ({"seeds": True}, "seeds: got True, expected int or a sequence of int"),
        ({"seeds": [0, "1"]}, "seeds: got [0, '1'], expected int or a sequence of int"),
        ({"prompts": 3}, "prompts: got 3, expected str, a sequence of str or None"),
        ({"steps": "20"}, "steps: got '20', expected int or None"),
        ({"guidance": None}, "guidance: got None, expected a number"),
        ({"callback": 3}, "callback: got 3, expected a function or None"),
        ({"files": "a.py"}, "files: got 'a.py', expected a sequence of str or Path"),
        ({"flag": 1}, "flag: got 1, expected bool"),
        ({"dtype": "bfloat16"}, "dtype: got 'bfloat16', expected torch.dtype"),
        ({"seeds": torch.zeros(2)}, "seeds: got a Tensor, expected int or a sequence of int"),
        ({"pair": torch.zeros(2)}, "pair: got a Tensor, expected a pair of Tensor and Tensor or None"),
        ({"named": {"a": 3}}, "named: got {'a': 3}, expected names with Tensor or None"),
    ],
)
def test_other_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(InputError) as caught:
        Thing().call(**{"prompts": "a", **arguments})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("word", "ours"),
    [("num_inference_steps", "steps"), ("guidance_scale", "guidance"), ("generator", "seeds"),
     ("negative_prompt", "negative_prompts"), ("num_images_per_prompt", "images_per_prompt"),
     ("output_type", "output"), ("prompt_embeds", "text_embeddings"), ("torch_dtype", "dtype")],
)  # fmt: skip
def test_a_name_of_diffusers_is_refused_with_ours(word, ours):
    with pytest.raises(InputError, match=rf"^{word} is diffusers' name; here it is {ours}\b"):
        Thing().call("a", **{word: None})


def test_an_unknown_name_is_pythons_own_error_and_signature_and_docstring_stay():
    with pytest.raises(TypeError, match="stepz"):
        Thing().call("a", stepz=3)
    with pytest.raises(TypeError, match="prompts"):
        Thing().call()
    assert Thing.call.__doc__ == "What it does."
