"""Scoring models and images: known answers, any number of processes, kills, bad input, records and protocols."""

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixart import commands
from pixart.data.compositional import build_compositional
from pixart.diffusion.sampling import SampleConfig
from pixart.errors import InputError
from pixart.evaluate.compositional import CHANCE, read_cells
from pixart.evaluate.record import read_scores, why_incomparable
from pixart.evaluate.resize import resize
from pixart.evaluate.run import Evaluation
from pixart.evaluate.score import Options, evaluate
from pixart.files import digest_file
from pixart.inference.stream import Studio
from pixart.seeds import derive_seed
from pixart.study.scores import compare_scores
from runs import build, command, environment, make_model, make_pictures, settings, write


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), SampleConfig(steps=2))


@pytest.fixture(scope="module")
def cells_folder(tmp_path_factory) -> Path:
    return build_compositional(tmp_path_factory.mktemp("data") / "compositional", side=32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("real") / "pictures", 30, side=8)


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> str:
    """A tiny random vision model of transformers."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("vision") / "vit"
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A tiny random CLIP with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "square", ",", "number", "red", "green", "blue"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**size, "vocab_size": 11, "max_position_embeddings": 10, "eos_token_id": 2, "bos_token_id": 1}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**size, "image_size": 8, "patch_size": 4}, projection_dim=8)
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a red square, number {i}" for i in range(10)))
    return path


def lines_of(run, *args, **kwargs) -> tuple[dict, list[str]]:
    said: list[str] = []
    return run(*args, say=said.append, **kwargs), said


def same(record: dict) -> dict:
    """A record but for time and memory."""
    return {key: value for key, value in record.items() if key != "run"}


# ----------------------------------------------------------------------------------------------------- known answers


def draw_cells(cells_folder: Path, folder: Path, order) -> Options:
    """Real images in the order of `order`, each said to be drawn for the caption of its place."""
    cells = read_cells(cells_folder)
    folder.mkdir()
    for place, number in enumerate(order):
        (folder / f"{place:04d}.png").symlink_to(cells[number].file)
    (folder.parent / "captions.txt").write_text("\n".join(cell.caption for cell in cells[: len(order)]))
    return Options(
        images=str(folder),
        prompts=str(folder.parent / "captions.txt"),
        reference=str(cells_folder),
        metrics=("compositional",),
        out=str(folder.parent / "scores"),
        batch_size=256,
    )


def test_the_real_images_of_the_compositional_set_score_at_the_ceiling(cells_folder, tmp_path):
    record, said = lines_of(evaluate, draw_cells(cells_folder, tmp_path / "drawn", range(1440)))
    assert {key: score["value"] for key, score in record["scores"].items()} == dict.fromkeys(record["scores"], 1.0)
    assert record["metrics"]["compositional"]["held_out"] == 248
    assert record["metrics"]["compositional"]["seen"] == 1132
    assert "1297 classes" in record["metrics"]["compositional"]["set"]
    assert any("never seen in training: 100.0 %" in line and "of 248" in line for line in said)


def test_images_of_other_captions_score_at_chance(cells_folder, tmp_path):
    """What a model draws that learnt the images perfectly, but from shuffled captions."""
    order = np.random.default_rng(0).permutation(1440)
    record, _ = lines_of(evaluate, draw_cells(cells_folder, tmp_path / "drawn", order))
    scores = record["scores"]
    assert scores["compositional"]["value"] < 0.02
    assert scores["compositional_seen"]["value"] < 0.01
    assert scores["compositional_activity"]["value"] < 0.05
    assert 0.2 < scores["compositional_gender"]["value"] < 0.6


def test_the_right_activity_alone_is_the_chance_that_is_stated(cells_folder, tmp_path):
    cells, random = read_cells(cells_folder), np.random.default_rng(0)
    families = {cell.attributes[0]: [] for cell in cells}
    for number, cell in enumerate(cells):
        families[cell.attributes[0]].append(number)
    order = [random.choice(families[cell.attributes[0]]) for cell in cells]
    record, _ = lines_of(evaluate, draw_cells(cells_folder, tmp_path / "drawn", order))
    assert record["scores"]["compositional_activity"]["value"] == 1
    found = record["scores"]["compositional"]
    assert found["low"] < CHANCE * 1.3 and found["high"] > CHANCE


def test_a_random_model_scores_at_chance(model_folder, cells_folder, tmp_path):
    options = Options(
        str(model_folder),
        metrics=("compositional",),
        reference=str(cells_folder),
        out=str(tmp_path / "scores"),
        limit=400,
        batch_size=100,
        truncate=True,
    )
    record, _ = lines_of(evaluate, options)
    assert record["scores"]["compositional"]["value"] < 0.05
    assert record["seeds"] == {**record["seeds"], "first": 0, "last": 399}


def test_a_clip_score_is_that_of_transformers_by_hand(clip, pictures, tmp_path):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    captions = [(pictures / f"{i:02d}.txt").read_text() for i in range(30)]
    options = Options(
        images=str(pictures), data=str(pictures), metrics=(f"clip_score:{clip}",), out=str(tmp_path / "s"), batch_size=7
    )
    record, _ = lines_of(evaluate, options)
    model, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    process, values = CLIPImageProcessor.from_pretrained(clip), []
    for i, caption in enumerate(captions):
        with torch.no_grad():
            out = model(
                **tokenizer(caption, return_tensors="pt"),
                **process(Image.open(pictures / f"{i:02d}.png"), return_tensors="pt"),
            )
        values.append(max(torch.cosine_similarity(out.image_embeds, out.text_embeds).item(), 0) * 100)
    assert record["scores"]["clip_score"]["value"] == pytest.approx(np.mean(values), rel=1e-4)
    assert record["metrics"][f"clip_score:{clip}"]["clip"] == "tiny-clip"


def test_filters_are_antialiased_bicubic_on_floats_or_bytes_or_none():
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    clean, pil = resize(image, 16, "clean"), resize(image, 16, "pil")
    assert 0 < (clean - pil).abs().max() < 1.5 and torch.equal(pil, pil.round())
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(0, 3, 1, 2).double(), size=(16, 16), mode="bicubic", antialias=True
    )
    assert (clean - exact).abs().max() < 1e-3
    assert resize(image, 16, "none").shape == (1, 3, 64, 64)


def test_the_same_images_are_at_distance_zero_and_others_are_not(pictures, vision, tmp_path):
    options = Options(
        images=str(pictures),
        reference=str(pictures),
        metrics=(f"frechet:{vision}", f"kid:{vision}", f"prdc:{vision}"),
        out=str(tmp_path / "same"),
        cache=str(tmp_path / "cache"),
    )
    record, _ = lines_of(evaluate, options)
    scores = {key: score["value"] for key, score in record["scores"].items()}
    assert scores["frechet_vit"] == pytest.approx(0, abs=1e-6)
    assert [scores[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert "fid" not in scores
    text = record["sentences"]["frechet_vit"]
    assert record["seeds"] is None and "drawn elsewhere" in text and "seeds" not in text
    assert all(part in text for part in ("30 images", "95 % interval", "reference images 30", "filter clean"))
    assert len(list((tmp_path / "cache").iterdir())) == 1  # for three metrics


def test_the_denoising_error_of_a_model_is_that_of_its_denoiser(model_folder, pictures, tmp_path):
    from pixart import Pipeline
    from pixart.diffusion import make_schedule
    from pixart.diffusion.denoising_error import RATIOS

    options = Options(
        str(model_folder), metrics=("denoising_error",), data=str(pictures), out=str(tmp_path / "s"), batch_size=7
    )
    record, _ = lines_of(evaluate, options)
    pipeline = Pipeline.from_pretrained(model_folder)
    card, schedule = pipeline.card, make_schedule(pipeline.card.diffusion)
    alpha, sigma = schedule.alpha_sigma(schedule.time_of(1.0))
    total = 0.0
    for i in range(30):
        image = np.asarray(Image.open(pictures / f"{i:02d}.png"))
        x0 = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        noise = torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(derive_seed(i, "denoising_error")))
        (states,), _ = pipeline.encode([(pictures / f"{i:02d}.txt").read_text()])
        x, t = alpha * x0 + sigma * noise, torch.tensor([float(schedule.time_of(1.0))])
        with torch.no_grad():
            eps = pipeline.model(x, t, states[None])
        assert card.diffusion.prediction == "epsilon"
        total += 2 * ((((x - sigma * eps) / alpha) - x0) ** 2).mean().item()
    assert record["scores"]["validation_error_1"]["value"] == pytest.approx(total / 30, rel=1e-3)
    assert len(record["scores"]) == 1 + len(RATIOS)
    with pytest.raises(InputError, match="give it alone"):
        evaluate(Options(str(model_folder), metrics=("denoising_error", "fid"), data=str(pictures)))


@pytest.mark.slow
def test_fid_goes_through_torch_fidelitys_inception(pictures, tmp_path, monkeypatch):
    """With random weights in a file as torch-fidelity's are."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network, weights = inception.FeatureExtractorInceptionV3, tmp_path / "weights.pth"
    with monkeypatch.context() as patched:
        patched.setattr(network, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "none.pth")
        torch.manual_seed(0)
        made = network("inception-v3-compat", ["2048"], feature_extractor_weights_path=tmp_path / "none.pth")
    torch.save(made.state_dict(), weights)
    few = make_pictures(tmp_path / "few", 6)
    options = Options(
        images=str(few),
        reference=str(few),
        metrics=("fid", "kid"),
        inception=str(weights),
        out=str(tmp_path / "s"),
        cache=str(tmp_path / "cache"),
    )
    record, said = lines_of(evaluate, options)
    assert record["scores"]["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert record["metrics"]["fid"]["extractor_weights"] == digest_file(weights)
    assert said[0].startswith("warning: FID of 6 images with 2048 features")
    (features,) = (np.load(file) for file in (tmp_path / "cache").iterdir())
    whole = torch.from_numpy(np.stack([np.asarray(Image.open(p)) for p in sorted(few.glob("*.png"))]))
    with torch.no_grad():
        theirs = made.eval()(resize(whole.numpy(), 299, "clean").round().to(torch.uint8))[0]
    assert np.abs(features - theirs.numpy()).max() <= 1e-4 * theirs.abs().max()
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="is no file of weights"):
        evaluate(replace(options, inception=str(tmp_path / "bad.pth"), out=str(tmp_path / "t")))


# ------------------------------------------------------------------------------------------------- processes and kills


def scored(model_folder, vision, pictures, prompts, folder, **changes) -> Options:
    return Options(
        str(model_folder), prompts=str(prompts), reference=str(pictures), metrics=(f"frechet:{vision}",),
        out=str(folder), cache=str(folder.parent / "cache"), batch_size=4, count=2, truncate=True, keep_images=True,
        **changes,
    )  # fmt: skip


def test_one_process_and_two_killed_or_not_make_the_same_record(
    model_folder, vision, pictures, prompts, tmp_path, monkeypatch
):
    one, _ = lines_of(evaluate, scored(model_folder, vision, pictures, prompts, tmp_path / "one"))
    options = scored(model_folder, vision, pictures, prompts, tmp_path / "two")
    draws, draw = [], Studio._draw_batch

    def counted(self, jobs, *rest):
        if len(draws) == 2:
            draws.append("killed")
            raise KeyboardInterrupt
        draws.append([job.request.seed for job in jobs])
        return draw(self, jobs, *rest)

    monkeypatch.setattr(Studio, "_draw_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, 0, 2, say=lambda _: None)
    assert evaluate(options, 1, 2, say=lambda _: None) is None
    two, _ = lines_of(evaluate, options, 0, 2)
    assert same(two) == same(one)
    seeds = [seed for batch in draws if batch != "killed" for seed in batch]
    assert sorted(seeds) == list(range(20))  # none twice
    images = [sorted((tmp_path / name / "images").iterdir()) for name in ("one", "two")]
    assert [a.read_bytes() for a in images[0]] == [b.read_bytes() for b in images[1]] and len(images[0]) == 20
    again, _ = lines_of(evaluate, options, 0, 1)
    assert len([batch for batch in draws if batch != "killed"]) == 5 and same(again) == same(one)


@pytest.mark.slow
def test_a_killed_command_goes_on(model_folder, vision, pictures, prompts, tmp_path):
    words = [
        "evaluate", str(model_folder), "--prompts", prompts, "--reference", pictures, "--metrics", f"frechet:{vision}",
        "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--batch-size", 1, "--count", 20, "--truncate",
    ]  # fmt: skip
    parts = tmp_path / "out" / "parts"
    first = subprocess.Popen(command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (parts.exists() and len(list(parts.iterdir())) > 5):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    there = {path.name: path.stat().st_mtime_ns for path in parts.glob("??????.npz")}
    assert 5 < len(there) < 200
    end = subprocess.run(command(*words), env=environment(), capture_output=True, text=True, timeout=100)
    assert end.returncode == 0, end.stderr
    assert all((parts / name).stat().st_mtime_ns == when for name, when in there.items())
    assert "Fréchet distance of" in end.stdout and read_scores(tmp_path / "out")["images"] == 200


def test_a_folder_that_was_begun_with_other_settings_is_refused(model_folder, vision, pictures, prompts, tmp_path):
    options = scored(model_folder, vision, pictures, prompts, tmp_path / "out", limit=4)
    evaluate(options, say=lambda _: None)
    other = scored(model_folder, vision, pictures, prompts, tmp_path / "out", limit=4, settings=("steps=3",))
    with pytest.raises(InputError, match=r"begun with other drawn with.*--out"):
        evaluate(other, say=lambda _: None)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("changes", "message"), [
    ({"metrics": ("frechet:no_such_network",)}, "timm has no such model"),
    ({"metrics": ("fid",)}, "inception: there are no weights at .*download https://.*--inception"),
    ({"metrics": ("clip_score:nobody/clip",)}, "not a CLIP that is here.*hf download nobody/clip"),
    ({"metrics": ("loss",)}, "loss measures no images"),
    ({"metrics": ()}, "--metrics: got none"),
    ({"protocol": "geneva", "data": "x"}, "did you mean 'geneval'"),
    ({"protocol": "coco30k", "data": "nowhere"}, "there is no nowhere/annotations/captions_val2014.json.*cocodataset"),
    ({"prompts": None}, "prompts: got none"),
    ({"reference": None}, "compares with real images: give --reference"),
    ({"reference": "nowhere"}, "there is no such folder"),
    ({"model": None}, "got no MODEL and no --images"),
    ({"filter": "lanczos"}, "--filter: got lanczos, expected clean, pil, none"),
])  # fmt: skip
def test_wrong_input_is_one_line_before_any_drawing(
    model_folder, vision, pictures, prompts, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(Studio, "_draw_batch", lambda *_: pytest.fail("it drew"))
    usual = {
        "model": str(model_folder),
        "prompts": str(prompts),
        "reference": str(pictures),
        "out": str(tmp_path / "out"),
        "metrics": (f"frechet:{vision}",),
        "cache": str(tmp_path / "cache"),
        "truncate": True,
    }
    with pytest.raises(InputError, match=message) as caught:
        evaluate(Options(**usual | changes))
    assert "\n" not in str(caught.value)


def test_images_that_cannot_be_scored_are_refused(vision, pictures, tmp_path):
    usual = {"reference": str(pictures), "metrics": (f"frechet:{vision}",), "cache": str(tmp_path / "cache")}

    def refused(message: str, **changes):
        with pytest.raises(InputError, match=message):
            evaluate(Options(**usual | changes, out=str(tmp_path / "out")), say=lambda _: None)

    (tmp_path / "none").mkdir()
    refused("no images in it", images=str(tmp_path / "none"))
    one = make_pictures(tmp_path / "one", 1)
    refused("got 1 image, expected at least 2", images=str(one))
    refused("one image has no spread", images=str(pictures), reference=str(one))
    several = make_pictures(tmp_path / "several", 3)
    Image.new("RGB", (9, 8)).save(several / "zz.png")
    refused("zz.png has 9×8 px .*one size", images=str(several))
    large = make_pictures(tmp_path / "large", 6, side=16)
    refused("16×16 px .*expected 8×8.*--reference-fit", images=str(pictures), reference=str(large))
    np.savez(tmp_path / "made.npz", mu=np.zeros(8), sigma=np.eye(8), filter="pil")
    refused("made with filter pil, not clean", images=str(pictures), reference=str(tmp_path / "made.npz"))


def test_few_images_for_a_frechet_distance_are_warned_of_with_the_size_of_the_bias(vision, pictures, tmp_path):
    options = Options(
        images=str(pictures),
        reference=str(pictures),
        metrics=(f"frechet:{vision}",),
        limit=6,
        out=str(tmp_path / "s"),
        cache=str(tmp_path / "cache"),
    )
    _, said = lines_of(evaluate, options)
    assert any(line.startswith("warning:") and "6 images with 8 features: so few score about" in line for line in said)


def test_a_clip_that_would_cut_prompts_is_refused_unless_it_may(clip, pictures, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(["a red square"] * 29 + ["a red square , a red square , a red square"]))
    usual = {"images": str(pictures), "prompts": str(tmp_path / "p.txt"), "metrics": (f"clip_score:{clip}",)}
    with pytest.raises(InputError, match="reads 10 tokens, 1 of 30 prompts have up to 13; --truncate"):
        evaluate(Options(**usual, out=str(tmp_path / "a")))
    record, _ = lines_of(evaluate, Options(**usual, out=str(tmp_path / "b"), truncate=True))
    assert record["metrics"][f"clip_score:{clip}"]["prompts_cut"] == 1


# --------------------------------------------------------------------------------------------- records and protocols


def test_records_that_were_computed_differently_cannot_be_compared(vision, pictures, tmp_path, capsys):
    def take(name: str, **changes) -> dict:
        usual = {"images": str(pictures), "reference": str(pictures), "metrics": (f"frechet:{vision}",)}
        options = Options(**usual | changes, out=str(tmp_path / name), cache=str(tmp_path / "cache"))
        evaluate(options, say=lambda _: None)
        return read_scores(tmp_path / name)

    a, metric = take("a"), f"frechet:{vision}"
    assert why_incomparable(a, take("b"), metric) is None
    assert why_incomparable(a, take("c", filter="pil"), metric) == "filter differ: clean and pil"
    assert why_incomparable(a, take("d", limit=20), metric) == "images differ: 30 and 20"
    table = compare_scores([tmp_path / "a", tmp_path / "b" / "scores.json"])
    assert table.startswith("| record | frechet_vit |") and "is better" not in table
    with pytest.raises(InputError, match=r"/a and of .*/c cannot be compared: filter differ: clean and pil"):
        compare_scores([tmp_path / "a", tmp_path / "c"])
    for other, code in (("b", None), ("c", 2)):  # the command does the same, and draws no curves
        with pytest.raises(SystemExit) as ended:
            commands.main(["compare", str(tmp_path / "a"), str(tmp_path / other)])
        assert ended.value.code == code
    printed = capsys.readouterr()
    assert "| record | frechet_vit |" in printed.out and "cannot be compared: filter differ" in printed.err
    few = make_pictures(tmp_path / "few", 9)
    assert why_incomparable(a, take("e", reference=str(few)), metric).startswith("reference differ")


def test_geneval_gets_the_folder_that_its_detector_reads(model_folder, tmp_path):
    rows = [
        {"tag": "single_object", "prompt": f"a photo of {i}", "include": [{"class": "cat", "count": 1}]}
        for i in range(3)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(str(model_folder), protocol="geneval", data=str(tmp_path / "m.jsonl"), out=str(tmp_path / "g"))
    _, said = lines_of(evaluate, options)
    for i, row in enumerate(rows):
        assert json.loads((tmp_path / "g" / f"{i:05d}" / "metadata.jsonl").read_text()) == row
        files = sorted(path.name for path in (tmp_path / "g" / f"{i:05d}" / "samples").iterdir())
        assert files == [f"{n:04d}.png" for n in range(4)]
    assert any("GenEval" in line for line in said)


def test_dpg_gets_a_grid_for_each_prompt_under_its_name(model_folder, tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("0", "partiprompts12"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a square {name}\n")
    lines_of(evaluate, Options(str(model_folder), protocol="dpg", data=str(tmp_path), out=str(tmp_path / "d")))
    grid = np.asarray(Image.open(tmp_path / "d" / "grids" / "partiprompts12.png"))
    four = [np.asarray(Image.open(tmp_path / "d" / "images" / f"{n:06d}.png")) for n in range(4, 8)]
    side = four[0].shape[0]
    assert grid.shape == (2 * side, 2 * side, 3)
    assert np.array_equal(grid[:side, side:], four[1]) and np.array_equal(grid[side:, :side], four[2])


def test_adm_gets_its_npz(model_folder, tmp_path, monkeypatch):
    from pixart.evaluate import protocols

    monkeypatch.setattr(protocols, "ADM_IMAGES", 10)
    (tmp_path / "classes.txt").write_text("tench\ngoldfish\n")
    data = str(tmp_path / "classes.txt")
    lines_of(evaluate, Options(str(model_folder), protocol="adm-npz", data=data, out=str(tmp_path / "n")))
    with np.load(tmp_path / "n" / "samples.npz") as arrays:
        images = arrays["arr_0"]
    assert images.dtype == np.uint8 and images.shape[0] == 10 and images.shape[3] == 3
    assert np.array_equal(images[3], np.asarray(Image.open(tmp_path / "n" / "images" / "000003.png")))


def test_an_evaluation_of_nothing_is_refused(tmp_path):
    class Nothing:
        items = ()

    with pytest.raises(InputError, match="nothing to score"):
        Evaluation(tmp_path, Nothing(), {}, None).run()


# ------------------------------------------------------------------------------------------------------ during training


def test_a_run_scores_images_of_its_averaged_weights(pictures, vision, text_encoder, tmp_path):
    from pixart.train import train
    from pixart.train.metrics import merge_declarations, read_metrics

    changes = {
        "train__evaluate_every": 2,
        "evaluate": {"metrics": [f"frechet:{vision}"], "reference": str(pictures)},
        "data__validation": 0.4,
        "train__steps": 4,
    }
    config = build(settings(tmp_path / "run", pictures, text_encoder), **changes)
    train(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "frechet_vit" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["frechet_vit"] != rows[1]["frechet_vit"] > 0
    assert rows[1]["frechet_vit_low"] < rows[1]["frechet_vit"] < rows[1]["frechet_vit_high"]
    assert "best_frechet_vit" in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert any(
        score.key == "frechet_vit" for of in merge_declarations([tmp_path / "run"]).values() for score in of.scores
    )
    with pytest.raises(InputError, match=r"evaluate.metrics is empty"):
        build(settings(tmp_path / "other", pictures, text_encoder), train__evaluate_every=2)


@pytest.mark.slow
def test_two_processes_score_what_one_does(pictures, vision, text_encoder, tmp_path):
    from pixart.train.metrics import read_metrics

    found = []
    for count in (1, 2):
        config = write(
            tmp_path / f"{count}.yaml",
            settings(tmp_path / f"run{count}", pictures, text_encoder),
            train__evaluate_every=2,
            evaluate={"metrics": [f"frechet:{vision}"], "reference": str(pictures)},
            data__validation=0.4,
            train__steps=2,
        )
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        script = command("train", config)
        end = subprocess.run(
            [script[0], *words, *script[1:]],
            env=environment() | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert end.returncode == 0, end.stderr
        found.append(next(row["frechet_vit"] for row in read_metrics(tmp_path / f"run{count}") if "frechet_vit" in row))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
