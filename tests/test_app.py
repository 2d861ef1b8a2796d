"""The page without a browser: its form, its queue, what it draws, and what its server refuses."""

import asyncio
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pages import served
from pixart import ModelCard, Pipeline, SampleConfig
from pixart.app.drawing import Store
from pixart.app.events import Events, read_canvas
from pixart.app.form import to_list
from pixart.app.models import Models, Options, Shelf, check_size, identity
from pixart.app.preview import Preview
from pixart.app.server import Address, bind, read_password
from pixart.app.settings import Limits, Settings, read_form, read_record, size_choices
from pixart.app.training import Watch
from pixart.app.worker import Busy, Job, Pool
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.errors import InputError
from pixart.inference.records import read_record as read_png
from runs import ROOT, command, environment, make_model

CONFIG = SampleConfig(sampler="ddim", steps=3, guidance=3.0)
LIMITS = Limits(pixels=256, images=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def pipeline(folder) -> Pipeline:
    return Pipeline.from_pretrained(folder)


@pytest.fixture
def events(folder, tmp_path):
    twin = tmp_path / "twin"
    twin.symlink_to(folder)
    models = Models([str(folder), str(twin)])
    pool = Pool([Shelf(models, "cpu", Options())])
    yield Events(models, pool, Store(tmp_path), LIMITS)
    pool.close()


def draw(events, owner="me", model="model", other=None, canvas=None, **values):
    """All that the page shows, and the last results."""

    async def run():
        seen, results = [], None
        async for html, some in events.draw(owner, model, other, canvas, {"prompt": "a red square", **values}):
            seen.append(html)
            results = results if some is None else some
        return seen, results

    return asyncio.run(run())


# ------------------------------------------------------------------------------------------------------------ drawing


def test_the_page_draws_what_a_call_draws_and_its_png_gives_the_settings_back(events, pipeline):
    given = {"seed": "7", "count": 3, "size": "8x12", "steps": "4", "guidance": "2.5", "negative": "a blue square"}
    seen, results = draw(events, more="eta=0.5 spacing=trailing", **given)
    assert "done" in seen[-1]
    expected = pipeline(
        "a red square", [7, 8, 9], replace(CONFIG, steps=4, guidance=2.5, eta=0.5, spacing="trailing"),
        height=8, width=12, negative_prompts="a blue square", images_per_prompt=3,
    )  # fmt: skip
    for result, image in zip(results, expected, strict=True):
        assert np.array_equal(np.array(Image.open(result.path)), np.array(image))
    html, values = events.fill_from(str(results[1].path))
    assert "settings are those of the image" in html
    assert (values["seed"], values["steps"], values["guidance"], values["size"]) == (8, 4, "2.5", "8x12")
    _, again = draw(events, **{**values, "count": 1})
    assert again[0].record == read_png(results[1].path)
    assert again[0].path.read_bytes() == results[1].path.read_bytes()


def test_two_models_draw_the_same_prompts_and_seeds_side_by_side(events):
    _, results = draw(events, other="twin", count=2, seed=3)
    assert [(r.model, r.record["seed"]) for r in results] == [
        ("model", "3"),
        ("twin", "3"),
        ("model", "4"),
        ("twin", "4"),
    ]
    assert results[0].path.read_bytes() == results[1].path.read_bytes()  # the twin is the same model


def test_what_is_not_painted_stays_and_what_is_painted_changes(events):
    background = Image.new("RGBA", (8, 8), "orange")
    paint = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    paint.paste((255, 59, 48, 255), (0, 0, 4, 8))
    _, results = draw(events, canvas={"background": background, "layers": [paint]}, seed=1)
    found, before = np.array(Image.open(results[0].path)), np.array(background.convert("RGB"))
    assert np.array_equal(found[:, 4:], before[:, 4:]) and not np.array_equal(found[:, :4], before[:, :4])
    html, _ = events.fill(results[0].record)
    assert "must be given again" in html
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_canvas({"background": clear, "layers": [paint]}) == (None, None)


def test_a_preview_is_exact_for_a_linear_decoder_and_the_image_itself_for_pixels():
    matrix, shift = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) * 0.2, 0.1

    class Linear:
        latent_channels, downsample, scale = 4, 8, 1.0

        def decode(self, latents):
            return F.interpolate(torch.einsum("bchw,cd->bdhw", latents, matrix) + shift, scale_factor=8)

    x0 = torch.randn(2, 4, 6, 5) * 0.5
    found = Preview(Linear()).pixels(x0)
    expected = (torch.einsum("bchw,cd->bdhw", x0, matrix) + shift).clamp(-1, 1)
    assert torch.allclose(found, expected, atol=1e-5)
    from pixart.encoders.autoencoder import IdentityAutoencoder

    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(Preview(IdentityAutoencoder()).pixels(pixels), pixels)
    assert Preview(IdentityAutoencoder()).image(pixels).size == (192, 192)
    many = torch.rand(1, 3, 200, 256).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    small = np.array(Preview(IdentityAutoencoder()).image(many))  # 800 × 1024 are reduced by 4
    assert small.shape == (200, 256, 3)
    assert abs(small / 127.5 - 1 - many[0, :, ::4, ::4].permute(1, 2, 0).numpy()).max() < 1 / 127


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt: got 3, expected a text"),
        ({"count": 5}, "number of images: got 5, expected 1 to 4"),
        ({"size": "32x32"}, "1024 pixels, expected up to 256"),
        ({"size": "big"}, "size: got &#x27;big&#x27;, expected height x width"),
        ({"size": "9x8"}, "both sides must be multiples of 2"),
        ({"steps": "2.5"}, "steps: got &#x27;2.5&#x27;, expected a whole number"),
        ({"guidance": "nan"}, "guidance: got &#x27;nan&#x27;, expected a number"),
        ({"seed": []}, r"seed: got \[\], expected a whole number"),
        ({"sampler": "heun"}, "sampler &#x27;heun&#x27; does not fit"),
        ({"sampler": "huen"}, "huen"),
        ({"more": "etta=1"}, "etta"),
        ({"more": "eta"}, "expected key=value"),
        ({"more": "null=what"}, "null: got &#x27;what&#x27;"),
        ({"negative": "x", "guidance": "1"}, "have no effect with guidance 1"),
        ({"prompt": "a " * 40}, "tick “Cut a prompt that is too long”"),
        ({"model": "/etc/passwd"}, "there is no model &#x27;/etc/passwd&#x27;"),
        ({"other": "nothing"}, "there is no model &#x27;nothing&#x27;"),
    ],
)
def test_bad_input_is_one_line_in_the_page_which_goes_on(events, values, message):
    seen, results = draw(events, **values)
    assert re.search(message, seen[-1]) and 'role="alert"' in seen[-1] and "\n" not in seen[-1]
    assert not results
    if "tick" in message:
        assert "done" in draw(events, **values, truncate=True)[0][-1]


def test_a_size_that_the_memory_cannot_decode_is_refused_before_drawing(monkeypatch):
    import psutil

    latent = SimpleNamespace(device=torch.device("cpu"), card=ModelCard(vae=AutoencoderConfig("kl", "x")))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    with pytest.raises(InputError, match=r"2048 × 2048 px needs some 12\.9 GB to decode, and 1\.1 GB are free"):
        check_size(latent, (2048, 2048), Limits())
    check_size(latent, (512, 512), Limits())
    check_size(SimpleNamespace(device=torch.device("cpu"), card=ModelCard()), (2048, 2048), Limits())  # of pixels


def test_dropped_files_that_hold_no_settings_are_said_to(events, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert "is not an image that can be read" in events.fill_from(str(tmp_path / "text.png"))[0]
    assert "carries no settings" in events.fill_from(str(tmp_path / "plain.png"))[0]
    assert "select an image first" in events.fill(None)[0]
    record = {"prompt": "a", "seed": "1", "size": "8x8", "sampler": "ddim", "steps": "many"}
    assert "cannot be read" in events.fill(record)[0]
    assert "cannot be read" in events.fill({name: value for name, value in record.items() if name != "steps"})[0]


def test_records_of_every_kind_come_back_as_the_settings_that_drew_them():
    record = {"prompt": "a", "seed": "5", "size": "8x8", "sampler": "dpm_solver", "steps": "2", "guidance": "4.5",
              "times": "(900.0, 400.5)", "order": "1", "null": "empty", "guidance_low": "100.0"}  # fmt: skip
    values = read_record(record)
    config, null = read_form(values).config(ModelCard(sample=SampleConfig()))
    assert (config.times, config.order, config.guidance_low, null) == ((900.0, 400.5), 1, 100.0, "empty")
    own = SampleConfig(sampler="ddim", eta=0.5, guidance=3.0)
    assert Settings(prompt="a").config(ModelCard(sample=own))[0] == own
    changed = Settings(prompt="a", sampler="heun").config(ModelCard(sample=own))[0]
    assert changed == SampleConfig(sampler="heun", guidance=3.0)  # eta is ddim's own


def test_sizes_are_those_of_the_models_table_within_the_limit(events):
    html, sizes, _ = asyncio.run(events.choose("me", "model"))
    assert "loaded" in html and sizes[0] == "native" and {"8x8", "4x16"} <= set(sizes)
    assert size_choices(ModelCard(), Limits(pixels=1)) == ["native"]


# -------------------------------------------------------------------------------------------------------------- models


def test_models_are_those_named_at_the_start_and_a_run_may_still_be_empty(folder, tmp_path, events):
    with pytest.raises(InputError, match="no model: name at least one"):
        Models([])
    with pytest.raises(InputError, match="no model at"):
        Models([str(tmp_path / "nothing")])
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("output: run\n")
    models = Models([str(run), str(folder)])
    assert list(models.paths()) == ["run", "model"] and models.runs == [run]
    events.models = models
    events.pool = Pool([Shelf(models, "cpu", Options())])
    seen, _ = draw(events, model="run")
    assert 'role="alert"' in seen[-1] and "checkpoint" in seen[-1]
    assert "done" in draw(events, model="model")[0][-1]
    events.pool.close()


def test_a_run_shows_its_checkpoints_and_a_newer_one_is_another_model(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "fixtures" / "run", run)
    models = Models([str(run)])
    assert list(models.paths()) == ["run", "run, step 2"]
    before = identity(models.path("run"))
    assert identity(models.path("run")) == before
    shutil.copytree(run / "checkpoints" / "step_00000002", run / "checkpoints" / "step_00000010")
    assert list(models.paths()) == ["run", "run, step 10", "run, step 2"]
    assert identity(models.path("run")) != before


def test_the_last_two_models_stay_loaded_and_share_their_text_encoder(tmp_path, folder):
    for name in "bc":
        (tmp_path / name).symlink_to(folder)
    shelf = Shelf(Models([str(folder), str(tmp_path / "b"), str(tmp_path / "c")]), "cpu", Options())
    first, second = shelf.get("model"), shelf.get("b")
    assert shelf.get("model") is first and second.pipeline.text is first.pipeline.text
    third = shelf.get("c")  # in place of "b", which was used before "model"
    assert shelf.get("model") is first and shelf.get("b") is not second and third.pipeline.text is first.pipeline.text


def test_watched_runs_show_curves_and_sheets_and_links_that_leave_them_are_left_out(tmp_path):
    pytest.importorskip("matplotlib", reason="draws the curves; extra: plot")
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    assert "metrics.jsonl" in Watch([run]).show()  # a note, not an error
    rows = [{"step": step, "loss": 1 / step, "images_per_second": 3.0} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (30, 20)).save(run / "samples" / "step_00000002.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "secret.png")
    (run / "samples" / "step_00000009.png").symlink_to(tmp_path / "secret.png")
    (run / "samples" / "step_00000003.png").write_text("half written")
    watch = Watch([run])
    before, shown = watch.state(), watch.show()
    assert shown.count("<img") == 2 and "step 2" in shown and "step 9" not in shown
    assert watch.state() == before
    Image.new("RGB", (30, 20)).save(run / "samples" / "step_00000004.png")
    assert watch.state() != before
    assert "None of the models" in Watch([]).show()


# --------------------------------------------------------------------------------------------------------------- queue


def wait_for(job: Job) -> str:
    while not job.finished:
        job.look()
        time.sleep(0.005)
    return job.state


def test_jobs_are_done_in_order_and_more_than_may_wait_are_refused():
    gate, order = threading.Event(), []

    def work(name):
        def run(home, job):
            gate.wait(10)
            order.append((home, name))

        return run

    pool = Pool(["device"], waiting=20)
    first = pool.submit(Job(work(0), "0"))
    while first.state != "running":
        time.sleep(0.005)
    jobs = [first, *(pool.submit(Job(work(i), str(i))) for i in range(1, 21))]
    assert pool.before(jobs[20]) == 20
    with pytest.raises(InputError, match="20 requests wait already"):
        pool.submit(Job(work(21), "21"))
    with pytest.raises(Busy, match="another request of this page"):
        pool.submit(Job(work(22), "7"))
    assert pool.cancel("7") and not pool.cancel("nobody")
    gate.set()
    assert [wait_for(job) for job in jobs] == ["done"] * 7 + ["cancelled"] + ["done"] * 13
    assert order == [("device", i) for i in range(21) if i != 7]
    pool.close()


def test_a_job_ends_when_cancelled_or_abandoned_and_errors_end_no_worker(monkeypatch, capsys):
    def forever(home, job):
        while True:
            job.check()
            time.sleep(0.005)

    def fails(error):
        def run(home, job):
            raise error

        return run

    pool = Pool([None])
    job = pool.submit(Job(forever, "a"))
    pool.cancel("a")
    assert wait_for(job) == "cancelled"
    memory = "the memory does not suffice"
    for error, said in [
        (InputError("two\nlines"), "two lines"),
        (MemoryError(), memory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), memory),
        (ZeroDivisionError("what"), "ZeroDivisionError: what"),
    ]:
        job = pool.submit(Job(fails(error), "a"))
        assert wait_for(job) == "failed" and job.error.startswith(said)
    assert "Traceback" in capsys.readouterr().err  # of the unexpected one
    monkeypatch.setattr("pixart.app.worker.ABANDONED", 0.05)
    job = pool.submit(Job(forever, "a"))
    while not job.finished:  # nobody looks
        time.sleep(0.005)
    assert job.state == "cancelled"
    pool.close()


def test_cancelling_between_steps_stops_drawing_and_a_closed_page_cancels(events):
    async def run():
        stream = events.draw("me", "model", None, None, {"prompt": "a", "steps": "1000", "count": 4})
        seen = [await anext(stream)]
        async for html, _ in stream:
            seen.append((html, None))
            if "step " in html and "cancelled" not in html:
                events.cancel("me")
        again = events.draw("me", "model", None, None, {"prompt": "a", "steps": "1000"})
        await anext(again)
        await again.aclose()  # the browser is closed in the middle
        return seen

    assert "cancelled" in asyncio.run(run())[-1][0]
    assert "done" in draw(events, steps="2")[0][-1]


# -------------------------------------------------------------------------------------------------------------- server


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """A page with a password, at a port of its own."""
    pytest.importorskip("gradio", reason="the page; extra: app")
    home = tmp_path_factory.mktemp("served")
    with served(Models([str(folder)]), home, LIMITS, password="open sesame") as port:
        yield port


def ask(port: int, path: str, method: str = "GET", body: bytes | None = None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def log_in(port: int) -> str:
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    status, _, _ = ask(port, "/login", "POST", b"username=me&password=wrong", **form)
    assert status == 400
    status, headers, _ = ask(port, "/login", "POST", b"username=me&password=open+sesame", **form)
    assert status == 200
    return headers["set-cookie"].partition(";")[0]


def test_the_server_asks_for_the_password_and_refers_to_no_other_host(server):
    assert ask(server, "/config")[0] == 401
    status, headers, body = ask(server, "/", Cookie=log_in(server))
    assert status == 200 and b"<gradio-app" in body
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    text = body.decode()
    for tag in ("<script", "<link", "<meta"):
        assert not [part for part in text.split(tag)[1:] if "//" in part.partition(">")[0].replace("data:", "")]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/gradio_api/file=%252e%252e/etc/passwd",
        "/gradio_api/file=https://example.com/",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/proxy=https://example.com/",
        "/gradio_api/custom_component/x/client/component/../../../../etc/passwd",
        "/static/../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc/passwd",
        "/monitoring",
        "/gradio_api/vibe-code",
        "/docs",
    ],
)
def test_files_that_were_not_named_are_not_served(server, path):
    status, _, body = ask(server, path, Cookie=log_in(server))
    assert status in (401, 403, 404) and b"root:" not in body and b"[project]" not in body


def test_model_files_are_not_served_and_other_names_of_the_machine_are_refused(server, folder):
    cookie = log_in(server)
    assert ask(server, f"/gradio_api/file={folder}/model.safetensors", Cookie=cookie)[0] in (403, 404)
    assert ask(server, "/", Cookie=cookie, Host="evil.example")[0] == 403
    assert ask(server, "/", Cookie=cookie, Host="localhost")[0] == 200


def test_oversize_requests_are_refused(server):
    cookie = log_in(server)
    status, _, body = ask(server, "/gradio_api/upload", "POST", Cookie=cookie, Content_Length=str(1 << 40))
    assert status == 413 and b"bytes" in body
    assert ask(server, "/gradio_api/queue/join", "POST", Cookie=cookie, Content_Length="-5")[0] in (400, 413)


def test_more_bytes_than_were_announced_are_refused_and_not_kept(server):
    def body():
        for _ in range(66):
            yield bytes(1 << 20)

    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=20)
    headers = {"Cookie": log_in(server), "Content-Type": "application/octet-stream"}
    try:
        connection.request("POST", "/gradio_api/queue/join", body(), headers, encode_chunked=True)
        status = connection.getresponse().status
    except (BrokenPipeError, ConnectionResetError):  # refused while it was sent
        status = 413
    assert status == 413
    assert ask(server, "/", Cookie=headers["Cookie"])[0] == 200


def test_a_port_in_use_and_a_bad_password_file_are_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} of 127\.0\.0\.1: .*in use; take another with --port"):
            bind(Address(port=port))
    with pytest.raises(InputError, match="take another with --port"):
        bind(Address(port=99999))
    with pytest.raises(InputError, match="cannot be read"):
        read_password(tmp_path / "nothing")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="first line is empty"):
        read_password(tmp_path / "empty")
    (tmp_path / "word").write_text(" open sesame \nmore")
    assert read_password(tmp_path / "word") == "open sesame"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_page_that_is_told_to_end_leaves_no_files(folder, tmp_path, number):
    words = command("app", str(folder), "--port", "0")
    place = environment() | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=place) as process:
        try:
            next(line for line in process.stdout if "the page is at" in line)
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith("pixart-app-")]
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode in (128 + number, -number) and "Traceback" not in said
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("pixart-app-")]


@pytest.mark.slow
def test_twenty_requests_at_once_are_served_and_memory_stays_flat(server):
    """Each as a page of its own, by gradio's client; three rounds, of which the last must not need more memory."""
    from gradio_client import Client

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def one(number: int) -> None:
        client = Client(f"http://127.0.0.1:{server}", auth=("me", "open sesame"), verbose=False, download_files=False)
        form = to_list("model", prompt="a red square", seed=str(number))
        html, images, *_ = client.predict(*form, api_name="/draw")
        answers.append((html, len(images["value"])))
        client.close()

    used = []
    for _ in range(3):
        answers: list = []
        threads = [threading.Thread(target=one, args=(i,)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(answers) == 20 and all("done" in html and count == 1 for html, count in answers)
        used.append(memory())
    assert used[2] - used[1] < 48 << 20, used
