"""Generation as a stream: lazy, in batches, in constant memory; each file is drawn once and never overwritten."""

import os
import resource
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixart import Request
from pixart.diffusion.sampling import SampleConfig
from pixart.errors import InputError
from pixart.inference.generate import save_samples
from pixart.inference.pipeline import Pipeline
from runs import command, environment, make_model
from toy import relative

FAST = SampleConfig(steps=2)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), FAST)


@pytest.fixture(scope="module")
def pipeline(model_folder) -> Pipeline:
    return Pipeline.from_pretrained(model_folder)


@pytest.fixture
def calls(pipeline):
    """The number of images in each call of the network."""
    sizes = []
    hook = pipeline.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    yield sizes
    hook.remove()


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------- the stream


def test_a_stream_yields_in_order_and_reads_no_further_than_its_look_ahead(pipeline):
    read = []

    def requests():
        for i in count():
            read.append(i)
            yield Request(f"number {i % 3}", seed=i)

    stream = pipeline.stream(requests(), FAST, batch_size=2, look_ahead=4, output="latent")
    assert read == []
    for i, expected in ((0, 4), (1, 4), (2, 4), (3, 4), (4, 8)):
        drawn = next(stream)
        assert (drawn.index, drawn.request.seed, len(read)) == (i, i, expected)
        assert (drawn.image, drawn.pixels) == (None, None)
        assert relative(drawn.latents, pipeline(f"number {i % 3}", i, FAST, output="latent")[0]) <= 1e-5


def test_a_stream_costs_the_network_what_a_batch_costs(pipeline, calls):
    pipeline([f"number {i}" for i in range(6)], 0, FAST, batch_size=6)
    batch, calls[:] = list(calls), []
    drawn = list(pipeline.stream((Request(f"number {i}") for i in range(6)), FAST, batch_size=6))
    assert calls == batch == [12, 12]  # with guidance, a step
    assert all(isinstance(one.image, Image.Image) for one in drawn)


def test_requests_that_follow_each_other_and_fit_together_are_one_batch(pipeline):
    image, seen = Image.new("RGB", (8, 8), "red"), []
    requests = [
        Request("a"), Request("b"), Request("d", negative="x"), Request("e", negative="y"), Request("c", height=10),
        Request("f", image=image), Request("g", image=image.copy(), strength=0.6),
        Request("h", image=image, strength=1), Request("i", image=image, mask=Image.new("L", (8, 8), 255)),
        Request("j"),
    ]  # fmt: skip
    states = pipeline.encode(["k"])[0][0]
    requests.append(Request(seed=0, text_embeddings=states))
    drawn = list(
        pipeline.stream(
            requests, FAST, output="latent", callback=lambda part, step, x, x0: seen.append((list(part), step))
        )
    )
    batches = [[0, 1], [2, 3], [4], [5, 6], [7], [8], [9, 10]]
    assert seen == [(part, step) for part in batches for step in range(1 if part == [5, 6] else 2)]
    for i, negative in ((2, "x"), (3, "y")):
        expected = pipeline(requests[i].prompt, 0, FAST, negative_prompts=negative, output="latent")
        assert relative(drawn[i].latents, expected[0]) <= 1e-5
    assert relative(drawn[10].latents, pipeline("k", 0, FAST, output="latent")[0]) <= 1e-5


def test_equal_prompts_are_encoded_once_as_long_as_they_are_kept(pipeline, monkeypatch):
    seen, encode = [], pipeline.text.encode
    monkeypatch.setattr(pipeline.text, "encode", lambda texts, **k: seen.append(list(texts)) or encode(texts, **k))
    prompts = ["a", "b", "a", "c", "b", "a"]
    list(pipeline.stream((Request(p, negative="n") for p in prompts), FAST, batch_size=2))
    assert seen == [["a", "b"], ["n"], ["c"]]


def test_what_is_skipped_keeps_its_place_and_changes_no_other_images_bits(pipeline, calls):
    requests = [Request(f"number {'one ' * (i % 3)}", seed=i) for i in range(7)]
    every = list(pipeline.stream(requests, FAST, batch_size=3, output="latent"))
    calls.clear()
    some = list(
        pipeline.stream(
            requests, FAST, batch_size=3, output="latent", skip=lambda i, request: request.seed in (0, 1, 2) or i == 6
        )
    )
    assert [drawn.index for drawn in some] == [3, 4, 5]
    assert calls == [6, 6]
    for drawn in some:
        assert torch.equal(drawn.latents, every[drawn.index].latents)


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (lambda: Request(), "give exactly one of them"),
        (lambda: Request("a", strength=0.5), "strength without an image"),
        (lambda: "a", "got str, expected pixart.Request records"),
        (lambda: Request("a", height=9), "multiples of 2"),
        (lambda: Request(text_embeddings=torch.zeros(1, 5, 16)), r"got \(1, 5, 16\), expected \(L, 16\)"),
        (lambda: Request("a", image="/nowhere.png"), "cannot be read as an image"),
    ],
)
def test_an_impossible_request_is_refused_before_its_look_ahead_is_encoded(pipeline, monkeypatch, request_, match):
    monkeypatch.setattr(pipeline.text, "encode", None)
    with pytest.raises(InputError, match=match):
        next(pipeline.stream((r() for r in (lambda: Request("b"), request_)), FAST))
    with pytest.raises(InputError, match="look_ahead: got 0"):  # without a first image being asked for
        pipeline.stream([], FAST, look_ahead=0)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def draw_nothing(monkeypatch) -> None:
    monkeypatch.setattr(
        "pixart.inference.stream.sample_latents",
        lambda model, card, captions, null, seeds, config, **size: torch.zeros(
            len(seeds), 3, size["height"], size["width"]
        ),
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_ten_thousand_requests_take_no_more_memory_than_a_thousand(pipeline, monkeypatch):
    # a model without work: what grows would be the stream's. Each image, state and request is 10 KB and more
    draw_nothing(monkeypatch)
    monkeypatch.setattr(pipeline, "_encode", lambda texts, *_: [torch.zeros(200, 16) for _ in texts])
    levels = []
    requests = (Request(f"number {i} {'word ' * 2000}", seed=i, height=64, width=64) for i in range(10_000))
    for drawn in pipeline.stream(requests, SampleConfig("lcm")):
        assert drawn.image.size == (64, 64)
        if drawn.index in (1000, 9999):
            levels.append(resident())
    assert drawn.index == 9999
    assert levels[1] - levels[0] < 20e6  # 9,000 of them are 200 MB
    requests = (Request("a", image=Image.new("RGB", (64, 64))) for i in range(2000))
    levels = [resident() for drawn in pipeline.stream(requests, SampleConfig("lcm")) if drawn.index in (100, 1999)]
    assert levels[1] - levels[0] < 20e6  # 1,900 images to start from are 90 MB


# ----------------------------------------------------------------------------------------------------------- the files


def test_the_same_call_again_draws_and_writes_nothing(pipeline, tmp_path, calls):
    said, arguments = [], (["a cat", "two --hw 10:6", "a cat"], tmp_path)
    paths = save_samples(pipeline, *arguments, count=2, say=said.append)
    assert len(set(paths)) == 6 and calls  # equal prompts and seeds are two images
    before, calls[:] = files(tmp_path), []
    assert save_samples(pipeline, *arguments, count=2, say=said.append, batch_size=1) == paths
    assert files(tmp_path) == before and not calls
    assert said[0] == f"6 images drawn, 0 already there, in {tmp_path}; contact_sheet.png shows them"
    assert said[1] == f"0 images drawn, 6 already there, in {tmp_path}; contact_sheet.png shows them"


def test_of_equal_images_the_one_that_is_missing_is_drawn(pipeline, tmp_path):
    prompts = ["a cat", "a cat", "two", "a cat"]
    before = save_samples(pipeline, prompts, tmp_path, FAST)
    for gone in ([0], [1, 2], [3]):
        kept = files(tmp_path)
        for i in gone:
            before[i].unlink()
            kept.pop(before[i].name)
        assert save_samples(pipeline, prompts, tmp_path, FAST) == before
        assert kept.items() <= files(tmp_path).items()


@pytest.mark.parametrize("other", [
    {"guidance": 7.0}, {"steps": 3}, {"sampler": "ddim"}, {"config": SampleConfig(steps=2, rescale=0.5)},
    {"height": 10}, {"negative_prompt": "x"}, {"null": "empty"}, {"model": "another"}, {"text": "another"},
    {"height": 8, "width": 8, "sizes": "official", "same": True}, {"batch_size": 1, "same": True},
    {"image": Image.new("RGB", (8, 8), "red")}, {"config": SampleConfig(steps=2, spacing="karras")},
    {"dtype": torch.bfloat16},
])  # fmt: skip
def test_another_setting_gets_a_name_of_its_own_and_writes_over_nothing(model_folder, tmp_path, other):
    pipeline, other = Pipeline.from_pretrained(model_folder), dict(other)
    same = other.pop("same", False)
    (first,) = save_samples(pipeline, ["a cat"], tmp_path)
    before = files(tmp_path)
    if other.pop("model", None):
        pipeline.model.final_layer.linear.weight.data[0] += 1
    if other.pop("text", None):
        next(pipeline.text.model.parameters()).data[:] += 1
    pipeline.model.to(other.pop("dtype", torch.float32))
    (second,) = save_samples(pipeline, ["a cat"], tmp_path, **other)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    if same:
        assert after == before and second == first
    else:
        assert (first.name, second.name) == ("000_a-cat_seed0.png", "000_a-cat_seed0_2.png")
        assert set(after) - set(before) == {second.name, "contact_sheet_2.png"}


def test_strength_and_image_are_part_of_a_record(pipeline, tmp_path):
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    mask = Image.new("L", (8, 8), 255)
    starts = [
        {"image": images[0]},
        {"image": images[1]},
        {"image": images[0], "strength": 0.9},
        {"image": images[0], "mask": mask},
    ]
    paths = [save_samples(pipeline, ["a"], tmp_path, steps=10, **start)[0] for start in starts]
    assert len(set(paths)) == 4
    assert [Image.open(p).text["strength"] for p in paths] == ["0.6", "0.6", "0.9", "1.0"]
    assert save_samples(pipeline, ["a"], tmp_path, steps=10, image=images[0].copy(), strength=0.6) == paths[:1]


def test_a_file_that_is_not_the_images_is_left_alone(pipeline, tmp_path):
    (tmp_path / "000_a_seed0.png").write_bytes(b"mine")
    (path,) = save_samples(pipeline, ["a"], tmp_path)
    assert path.name == "000_a_seed0_2.png" and (tmp_path / "000_a_seed0.png").read_bytes() == b"mine"
    (found,) = save_samples(pipeline, ["a"], tmp_path)
    assert found == path


def test_every_image_is_on_the_disk_as_soon_as_it_is_drawn(pipeline, tmp_path, calls):
    prompts = [f"number {i}" for i in range(6)]
    whole = save_samples(pipeline, prompts, tmp_path / "whole", FAST, batch_size=2)

    class Stop(Exception):
        pass

    def stop(*_):
        if len(list((tmp_path / "cut").glob("0*.png"))) == 4:
            raise Stop

    hook = pipeline.model.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        save_samples(pipeline, prompts, tmp_path / "cut", FAST, batch_size=2)
    hook.remove()
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [path.name for path in whole[:4]]
    calls.clear()
    resumed = save_samples(pipeline, prompts, tmp_path / "cut", FAST, batch_size=2)
    assert calls == [4, 4]
    assert [path.read_bytes() for path in resumed] == [path.read_bytes() for path in whole]
    assert (tmp_path / "cut" / "contact_sheet.png").read_bytes() == (whole[0].parent / "contact_sheet.png").read_bytes()


def test_processes_share_the_images_and_the_last_makes_the_contact_sheet(pipeline, tmp_path):
    prompts, said = [f"number {i}{' --hw 10:6' * (i % 2)}" for i in range(7)], []
    whole = save_samples(pipeline, prompts, tmp_path / "whole")
    shares = []
    for rank in (2, 0, 1):
        assert not list((tmp_path / "shared").glob("contact*"))
        shares.append(save_samples(pipeline, prompts, tmp_path / "shared", rank=rank, ranks=3, say=said.append))
    assert sorted(map(len, shares)) == [2, 2, 3]
    assert sorted(path.name for share in shares for path in share) == [path.name for path in whole]
    assert sorted(files(tmp_path / "shared")) == sorted(files(tmp_path / "whole"))
    assert said[0].startswith("process 2 of 3: 2 images drawn, 0 already there") and "shows" not in said[0]
    assert said[2].endswith("contact_sheet.png shows them")


def test_more_images_than_a_contact_sheet_holds_get_none(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("pixart.inference.generate.SHEET", 3)
    said = []
    save_samples(pipeline, ["a"], tmp_path, count=4, say=said.append)
    assert len(files(tmp_path)) == 4 and said[0].endswith("; no contact sheet for more than 3")


def test_a_large_contact_sheet_shows_its_images_smaller(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("pixart.inference.generate.SHEET_PIXELS", 4 * 100 * 100)
    draw_nothing(monkeypatch)
    save_samples(pipeline, ["a --hw 160:160"], tmp_path, count=4)
    assert Image.open(tmp_path / "contact_sheet.png").width == 2 * 104 + 4


# --------------------------------------------------------------------------------------------------------------- kills


def start(model: Path, prompts: Path, out: Path, rank: int, ranks: int = 2) -> subprocess.Popen:
    arguments = ("--model", model, "--prompt-file", prompts, "--out", out, "--count", "2", "--batch-size", "4",
                 "--device", "cpu", "--set", "steps=4")  # fmt: skip
    return subprocess.Popen(
        command("sample", *arguments),
        env={**environment(), "RANK": str(rank), "WORLD_SIZE": str(ranks)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills process groups")
def test_two_processes_killed_three_times_write_the_same_files_and_none_twice(model_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"number {i}{' --hw 10:6' * (i % 3 == 0)}" for i in range(100)))
    whole, cut, born = tmp_path / "whole", tmp_path / "cut", {}
    for rank in (0, 1):
        assert start(model_folder, prompts, whole, rank).wait(240) == 0

    def look() -> int:
        for path in cut.glob("[01]*.png"):
            written = path.stat().st_mtime_ns
            assert born.setdefault(path.name, written) == written, f"{path.name} was written twice"
        return len(born)

    for target in (30, 90, 150):
        running = [start(model_folder, prompts, cut, rank) for rank in (0, 1)]
        deadline = time.monotonic() + 200
        while look() < target and time.monotonic() < deadline and any(p.poll() is None for p in running):
            time.sleep(0.005)
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert target <= look() < 200
    ends = [start(model_folder, prompts, cut, rank) for rank in (0, 1)]
    said = [process.communicate(timeout=240)[0] for process in ends]
    assert [process.returncode for process in ends] == [0, 0] and look() == 200, said
    mine, theirs = (
        {path.name: Image.open(path) for path in folder.iterdir() if path.name != "contact_sheet.png"}
        for folder in (cut, whole)
    )
    assert mine.keys() == theirs.keys() and (cut / "contact_sheet.png").exists()
    for name, image in mine.items():
        assert image.text == theirs[name].text, name
        # a batch that a kill has cut is drawn smaller, which may round otherwise
        pairs = zip(image.tobytes(), theirs[name].tobytes(), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1, name


@pytest.mark.slow
def test_torchrun_starts_the_command_as_it_is(model_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "pixart", "sample", "--model", str(model_folder), "a", "b", "c", "--out", str(tmp_path / "o"),
         "--device", "cpu"], env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(files(tmp_path / "o")) == [f"00{i}_{w}_seed0.png" for i, w in enumerate("abc")] + [
        "contact_sheet.png"
    ]
    assert "process 0 of 2: 2 images drawn" in done.stdout and "process 1 of 2: 1 image drawn" in done.stdout
