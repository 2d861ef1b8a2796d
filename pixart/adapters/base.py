"""Which base an adapter was trained on: a mark of the base's weights, which adapters' files keep and loading compares.

The mark is `network:` and a fingerprint of all weights but the null caption, which the text encoder gives anew in
training. Fingerprints round to bf16 and so are the same in fp32 and bf16. Through fp16 weights are rounded twice, which
gives others: the mark of such a base ends in `:float16`, and it is compared with marks of that end only.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pixart.checkpoint.keys import NULL_CAPTION
from pixart.encoders.fingerprint import digest_tensors, fingerprint, sample_values
from pixart.model.pixart import PixArt

KIND, ROUNDED = "network:", ":float16"
_MARK = re.compile(f"{KIND}[0-9a-f]{{32}}({ROUNDED})?")


def mark_base(network: PixArt, before: Mapping[str, Tensor] | None = None) -> str:
    """The mark of a network's weights; `before` holds those that adapters have changed, as they were."""
    state = {**network.state_dict(), **(before or {})}
    state.pop(NULL_CAPTION, None)
    return KIND + digest_tensors(state) + ROUNDED * (getattr(network, "from_half", False) or _is_half(state))


def is_mark(text: str) -> bool:
    """Whether it is a mark; adapters of earlier versions have the fingerprint of the base with its null caption."""
    return _MARK.fullmatch(text) is not None


def other_base(mark: str, network: PixArt, before: Mapping[str, Tensor] | None = None) -> str | None:
    """The mark of `network` if it is another base than that of `mark`; None if it is the same, or if the dtype in which
    one of the two was stored leaves that open."""
    found = mark_base(network, before)
    rounded = found.endswith(ROUNDED)
    if not is_mark(mark):
        found, mark_rounded = fingerprint(network), False
    else:
        mark_rounded = mark.endswith(ROUNDED)
    return found if found != mark and rounded == mark_rounded else None


def _is_half(state: Mapping[str, Tensor]) -> bool:
    """Whether weights are in fp16, or their values show that they were stored in it: fp16 holds all of them exactly,
    and bf16, which holds fewer digits, does not."""
    if any(tensor.dtype == torch.float16 for tensor in state.values()):
        return True
    samples = [sample_values(tensor) for tensor in state.values()]
    half, short = (
        all(torch.equal(values.to(dtype).float(), values) for values in samples)
        for dtype in (torch.float16, torch.bfloat16)
    )
    return half and not short
