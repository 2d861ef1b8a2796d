"""Text encoders: any encoder of transformers, e.g. T5 v1.1-XXL for the released models, a small one for demonstrations.

Letters in shape comments: B batch, L caption tokens, C width of the encoder's states.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pixart.arguments import say
from pixart.config import setting
from pixart.cpu import give_memory_back
from pixart.encoders.caption_cleaning import clean_caption
from pixart.encoders.text_files import read_encoder_config, variant_of
from pixart.errors import InputError, missing_extra
from pixart.files import read_json
from pixart.quantize import load_bitsandbytes
from pixart.ranges import check_numbers
from pixart.unicode import mend


@dataclass(frozen=True)
class TextConfig:
    """The text encoder of a model; stored with every model."""

    # a folder with an encoder and its tokenizer, a diffusers pipeline folder, a Hub id, or pip:PACKAGE for weights in
    # an installed package
    model: str = setting("DeepFloyd/t5-v1_1-xxl", path=True)
    # longest caption in tokens; longer ones are truncated in training and refused in sampling
    length: int = setting(120, least=1)
    clean: bool = True  # PixArt-α's cleaning; PixArt-Σ has none
    # the unconditional branch: "buffer" is the model's own null caption with the prompt's mask (as in PixArt-α),
    # "empty" the encoded empty text with the prompt's mask (as in PixArt-Σ), "empty_own_mask" the encoded empty text
    # with its own mask (as in diffusers)
    null: Literal["buffer", "empty", "empty_own_mask"] = "buffer"

    def __post_init__(self):
        check_numbers(self, "text")


class TextEncoder:
    """A frozen tokenizer and encoder. Load with `TextEncoder.load`; free the memory with `close`."""

    def __init__(self, tokenizer, model: torch.nn.Module, config: TextConfig):
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.config = config

    @classmethod
    def load(
        cls,
        config: TextConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device="cpu",
        quantize: Literal["8bit", "4bit"] | None = None,
    ) -> "TextEncoder":
        """Load encoder and tokenizer of `config.model`.

        In fp16 the layers in which T5 would overflow ("wo") stay in fp32; bf16 does not need this.

        Args:
            quantize: hold the linear layers' weights in 8 bits (arXiv 2208.07339) or 4 bits (NF4, arXiv 2305.14314),
                by bitsandbytes on CUDA; states are computed in `dtype`. Such an encoder cannot be moved to another
                device. transformers does not quantize T5's "wo", a fifth of XXL, so XXL takes 5.9 GB (8 bits) or 4.1 GB
                (4 bits) in bf16, and 8.2 or 6.4 GB in fp32.

        Raises:
            InputError: the model is missing or incomplete, its tokenizer needs a package that is not installed, or
                `config.length` is more than the model supports.
        """
        import transformers

        source, _ = find_text_parts(config.model)
        options = {} if quantize is None else _quantization(quantize, dtype, torch.device(device))
        tokenizer = load_tokenizer(config)
        with _explained(config):
            model, report = transformers.AutoModelForTextEncoding.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                variant=variant_of(source),
                **options,
            )
        # transformers fills missing weights with random numbers; only those of the pooler are harmless, as it is unused
        if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise InputError(f"text encoder '{config.model}': its weights lack {some}; the files are incomplete")
        for name in report["missing_keys"]:  # so that the fingerprint is the same at every load
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
        """Number of tokens of each caption before truncation, including special ones."""
        return [len(ids) for ids in self._tokenize(captions, truncation=False)["input_ids"]]

    def check_lengths(self, captions: Sequence[str]) -> None:
        """Refuse captions of more than `config.length` tokens."""
        for caption, count in zip(captions, self.count_tokens(captions), strict=True):
            if count > self.config.length:
                raise InputError(
                    f"the prompt '{caption[:60]}…' has {count} tokens, but the model takes {self.config.length}; "
                    "shorten it, or pass truncate to truncate it"
                )

    def emptied(self, captions: Iterable[str]) -> list[str]:
        """The captions of which cleaning leaves nothing, so that they would be encoded as the empty text."""
        return [text for text in captions if self.config.clean and text.strip() and not clean_caption(text)]

    def check_prompts(self, prompts: Sequence[str], *, truncate: bool = False) -> None:
        """Refuse prompts that the encoder cannot take as they are.

        Raises:
            InputError: cleaning leaves nothing of one; or one has more than `config.length` tokens, unless `truncate`.
        """
        if emptied := self.emptied(prompts):
            raise InputError(
                f"the prompt {say(emptied[0])} is empty after PixArt-α's caption cleaning, which removes Chinese "
                "characters, @names, links and file names; write it in English words"
            )
        if not truncate:
            self.check_lengths(prompts)

    def check_movable(self) -> None:
        """Raises InputError if the encoder cannot be moved to another device."""
        if getattr(self.model, "is_quantized", False):
            raise InputError(
                "a text encoder in 8 or 4 bits cannot be moved off its device; free it after encoding instead"
            )

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the encoder, in place."""
        self.check_movable()
        self.model.to(device)
        if torch.cuda.is_available():  # make the freed memory available to the network and the VAE
            torch.cuda.empty_cache()
        return self

    @torch.no_grad()
    def encode(
        self,
        captions: Sequence[str],
        *,
        truncate: bool = False,
        padding: Literal["longest", "max_length"] = "longest",
        keep_padding: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Captions → states (B, L, C) in the encoder's dtype and mask (B, L), int64, 1 = a token.

        L is the length of the longest caption, or `config.length` with padding "max_length". States of padding are 0,
        or with `keep_padding` the encoder's own output.

        Raises:
            InputError: a caption is longer than `config.length` tokens and `truncate` is off.
        """
        length = self.config.length
        if not truncate:
            self.check_lengths(captions)
        batch = self._tokenize(captions, truncation=True, max_length=length, padding=padding, return_tensors="pt").to(
            self.device
        )
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
        captions = [mend(caption) for caption in captions]  # tokenizers refuse lone surrogates
        captions = [clean_caption(c) for c in captions] if self.config.clean else captions
        return self.tokenizer(captions, return_attention_mask=True, add_special_tokens=True, **options)


def load_tokenizer(config: TextConfig):
    """The tokenizer of `config.model`. It reads no weights, so it is also a quick check that the encoder is there.

    Raises:
        InputError: as in `TextEncoder.load`, except for the weights.
    """
    import transformers

    (source, pieces), name = find_text_parts(config.model), f"text encoder '{config.model}'"
    with _explained(config):
        shape = read_encoder_config(source).get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(pieces, padding_side="right", trust_remote_code=False)
    # if files are missing, transformers makes a tokenizer that has only special tokens
    if not shape.vocab_size / 2 <= len(tokenizer) <= shape.vocab_size:
        raise InputError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens, but the encoder {shape.vocab_size}; expected "
            "the encoder's own tokenizer.json or spiece.model beside it"
        )
    longest = getattr(shape, "max_position_embeddings", None)  # T5 has none: its positions are relative
    if longest is not None and config.length > longest:
        raise InputError(f"text.length: got {config.length}, but '{config.model}' takes at most {longest}")
    return tokenizer


@contextmanager
def _explained(config: TextConfig):
    """A context that turns whatever transformers raises for missing or damaged files into one InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except InputError:
        raise
    except Exception as error:  # transformers raises any kind on damaged files
        reason = str(error).strip().split("\n")[0].rstrip(".")[:300] or type(error).__name__
        if "tiktoken" in reason:  # transformers' message when it cannot read a spiece.model
            for module, package in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
                if not _is_installed(module):
                    raise missing_extra(package, "text", f"the tokenizer of '{config.model}'") from None
            reason = "its spiece.model is damaged"
        raise InputError(
            f"text encoder '{config.model}' cannot be loaded: {reason}. Expected a folder with an encoder and its "
            "tokenizer, a Hub id that is cached or reachable, or pip:PACKAGE"
        ) from None


def find_text_model(name: str) -> str:
    """Resolve `pip:PACKAGE` to the folder with a `config.json` in an installed package; other names are unchanged."""
    if not name.startswith("pip:"):
        return name
    package = name.removeprefix("pip:").replace("-", "_")
    if not package.isidentifier():
        raise InputError(f"text encoder '{name}': expected pip: and the name of a package")
    try:
        spec = importlib.util.find_spec(package)  # locates the package without importing it
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise InputError(
            f"text encoder '{name}': the package is not installed: pip install {package.replace('_', '-')}"
        )
    places = [Path(place) for place in spec.submodule_search_locations or ()]  # empty for a single-file module
    found = sorted(path.parent for place in places for path in place.rglob("config.json") if _is_encoder(path.parent))
    if not found:
        raise InputError(
            f"text encoder '{name}': the package has no encoder (a folder with config.json, tokenizer.json and weights)"
        )
    return str(found[0])


def _is_encoder(folder: Path) -> bool:
    """Whether a folder in a package holds an encoder of transformers."""
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    if not (folder / "tokenizer.json").is_file() or not any((folder / name).is_file() for name in weights):
        return False
    try:
        return "model_type" in read_json(folder / "config.json")
    except InputError:
        return False


def find_text_parts(name: str) -> tuple[str, str]:
    """The folders or ids of encoder and tokenizer of a `TextConfig.model`; they differ only in a diffusers pipeline."""
    source = find_text_model(name)
    folder = Path(source)
    if (folder.is_absolute() or source.startswith(("./", "../"))) and not folder.exists():
        raise InputError(f"text encoder '{name}': there is no such folder")
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"text encoder '{name}': expected a folder with an encoder and its tokenizer, but it is a file"
        )
    if (folder / "text_encoder" / "config.json").is_file():
        folder = folder / "text_encoder"
    alone = folder.is_dir() and not any((folder / file).is_file() for file in ("tokenizer.json", "spiece.model"))
    if alone and folder.name == "text_encoder" and (folder.parent / "tokenizer").is_dir():
        return str(folder), str(folder.parent / "tokenizer")
    return (str(folder), str(folder)) if folder.is_dir() else (source, source)


def _quantization(quantize: str, dtype: torch.dtype, device: torch.device) -> dict:
    """transformers' options for loading in 8 or 4 bits onto a device."""
    if quantize not in ("8bit", "4bit"):
        raise InputError(f"quantize: got {say(quantize)}, expected 8bit or 4bit")
    load_bitsandbytes(f"a text encoder in {quantize[0]} bits")
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
    """The null caption of a model (L, C); `mode` is by default its card's `text.null`.

    "buffer": None, since it is the model's own; "empty": the empty text padded to the model's length, with the
    encoder's output for padding, to be used with the prompt's mask; "empty_own_mask": the empty text's real tokens.
    """
    mode = mode or text.config.null
    if mode == "buffer":
        return None
    states, mask = text.encode([""], padding="max_length", keep_padding=True)
    return states[0] if mode == "empty" else states[0][mask[0].bool()]


def encoder_dtype(device: torch.device) -> torch.dtype:
    """The precision of text encoders on a device: bf16 where it is fast, fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
