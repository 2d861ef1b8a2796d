"""The page in a real browser: Debian's Chromium on a tiny model, at a desk's and a phone's width."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pages import make_adapter
from pixart import Pipeline, SampleConfig
from pixart.inference.records import read_record
from runs import command, environment, make_model

pytestmark = pytest.mark.slow
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
SHOTS = os.environ.get("PIXART_SCREENSHOTS")  # a folder, to look at the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), SampleConfig(sampler="ddim", steps=3, guidance=3.0))


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """A page of the command itself, with two models, a run that has no checkpoint, and two adapters, one of another
    width."""
    pytest.importorskip("gradio", reason="the page; extra: app")
    home = tmp_path_factory.mktemp("served")
    (home / "twin").symlink_to(folder)
    run = home / "run"
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text("output: run\n")
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {1 / i}}}\n' for i in range(1, 30)))
    Image.new("RGB", (200, 100), "teal").save(run / "samples" / "step_00000007.png")
    words = command("app", str(folder), str(home / "twin"), str(run), "--port", "0", "--max-images", "4")
    for name, width in (("style", 48), ("wide", 64)):
        words += ["--lora", f"{make_adapter(home / f'{name}.safetensors', width)}:0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(), cwd=home) as process:
        try:
            for line in process.stdout:
                if found := re.search(r"http://[\d.:]+", line):
                    yield found[0]
                    break
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser; extra: test")
    if BROWSER is None:
        pytest.skip("there is no chromium; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(params=[1280, 390])
def page(request, browser, url):
    """The page, loaded; fails at an error on the console, and at a request to another host or one that is refused."""
    page, wrong = browser.new_page(viewport={"width": request.param, "height": 900}), []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or wrong.append(r.url))
    page.on("response", lambda r: r.status >= 400 and wrong.append(f"{r.status} {r.url}"))
    page.set_default_timeout(30_000)
    page.goto(url)
    says(page, "is loaded")
    yield page
    wide = page.evaluate("document.documentElement.scrollWidth")
    page.close()
    assert not wrong, wrong
    assert wide <= request.param, f"{wide} px wide at {request.param}"


def says(page, text: str) -> None:
    page.wait_for_function("text => document.querySelector('#status')?.innerText.includes(text)", arg=text)


def shoot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}_{page.viewport_size['width']}.png", full_page=True)


def set_count(page, count: int) -> None:
    page.fill("#count input[type=number]", str(count))
    page.press("#count input[type=number]", "Enter")


def draw_slowly(page) -> None:
    """Settings with which drawing takes minutes, so that it is not finished before it is cancelled."""
    page.fill("#steps input, #steps textarea", "1000")
    page.fill("#size input", "64x64")
    page.press("#size input", "Enter")
    set_count(page, 4)


def choose(page, dropdown: str, name: str) -> None:
    page.click(f"#{dropdown} input")
    page.get_by_role("option", name=name, exact=True).click()


def download(page, folder: Path) -> Path:
    """The first image, as the gallery's button saves it."""
    page.locator("#gallery .thumbnail-item, #gallery button.thumbnail-lg, #gallery img").first.click()
    page.wait_for_function("document.querySelector('#settings textarea').value.includes('seed')")
    with page.expect_download() as waiting:
        page.locator("#gallery").get_by_role("button", name=re.compile("download", re.IGNORECASE)).first.click()
    waiting.value.save_as(folder / "image.png")
    return folder / "image.png"


def test_drawing_and_a_png_that_gives_its_settings_back(page, folder, tmp_path):
    page.fill("#prompt textarea", "a green square")
    page.fill("#seed input, #seed textarea", "11")
    set_count(page, 2)
    page.click("#draw")
    says(page, "done")
    assert page.locator("#gallery img").count() >= 2
    shoot(page, "drawn")
    saved = download(page, tmp_path)
    shoot(page, "chosen")
    expected = Pipeline.from_pretrained(folder)("a green square", 11)[0]
    assert np.array_equal(np.array(Image.open(saved)), np.array(expected))
    assert read_record(saved)["prompt"] == "a green square"

    page.fill("#prompt textarea", "something else")  # a setting changes
    page.fill("#seed input, #seed textarea", "")
    page.locator("#dropped input[type=file]").set_input_files(str(saved))
    says(page, "the settings are those of the image")
    assert page.input_value("#prompt textarea") == "a green square"
    assert page.input_value("#seed input, #seed textarea") == "11"
    assert page.input_value("#size input") == "8x8"


def test_cancelling_and_bad_input_in_one_line(page, tmp_path):
    page.click("#draw")
    says(page, "the prompt is empty")
    page.fill("#prompt textarea", "a red square")
    draw_slowly(page)
    page.click("#draw")
    says(page, "step ")
    page.wait_for_selector("#status img.preview")
    page.click("#draw")
    page.wait_for_selector("text=another request of this page is not finished yet")
    shoot(page, "drawing")
    page.click("#cancel")
    says(page, "cancelled")
    page.fill("#steps input, #steps textarea", "2")
    page.click("#draw")
    says(page, "done")
    page.fill("#prompt textarea", "a " * 50)
    page.click("#draw")
    says(page, "Cut a prompt that is too long")
    shoot(page, "too_long")
    (tmp_path / "text.png").write_text("no image")
    page.locator("#dropped input[type=file]").set_input_files(str(tmp_path / "text.png"))
    says(page, "is not an image that can be read")
    choose(page, "model", "run")
    says(page, "no good checkpoint yet")


def test_comparing_two_models(page):
    page.fill("#prompt textarea", "a blue square")
    choose(page, "other", "twin")
    set_count(page, 2)
    page.click("#draw")
    says(page, "done")
    captions = page.locator("#gallery").inner_text()
    assert captions.count("model · seed") == 2 and captions.count("twin · seed") == 2
    shoot(page, "compared")


def set_strength(page, number: int, strength: float) -> None:
    page.fill(f"#adapter{number} input[type=number]", str(strength))
    page.press(f"#adapter{number} input[type=number]", "Enter")


def test_adapters_are_chosen_compared_and_given_back(page, folder, tmp_path):
    page.fill("#prompt textarea", "a blue square")
    page.fill("#seed input, #seed textarea", "3")
    set_strength(page, 1, 1)
    page.wait_for_selector("#misfit >> text=network of another width")
    shoot(page, "misfit")
    set_strength(page, 1, 0)
    page.wait_for_function("document.querySelector('#misfit').innerText.trim() === ''")
    set_strength(page, 0, 0.8)
    choose(page, "other", "the same model without adapters")
    page.click("#draw")
    says(page, "done")
    captions = page.locator("#gallery").inner_text()
    assert "model · seed 3" in captions and "model + style:0.8 · seed 3" in captions
    shoot(page, "adapters")
    choose(page, "other", "—")
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('#gallery .thumbnail-item, #gallery .thumbnail-lg').length == 1")
    says(page, "done")
    saved = download(page, tmp_path)
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.load_lora(make_adapter(tmp_path / "style.safetensors"), strength=0.8)
    assert np.array_equal(np.array(Image.open(saved)), np.array(pipeline("a blue square", 3)[0]))
    set_strength(page, 0, 0)
    page.locator("#dropped input[type=file]").set_input_files(str(saved))
    says(page, "the settings are those of the image")
    assert page.input_value("#adapter0 input[type=number]") == "0.8"


def test_painting_what_is_drawn_again(page, tmp_path):
    image = tmp_path / "start.png"
    Image.new("RGB", (256, 256), "orange").save(image)
    page.click("#start > button, #start .label-wrap")
    page.wait_for_selector("#canvas canvas")
    time.sleep(2)  # the editor is set up
    page.locator("#canvas input[type=file]").first.set_input_files(str(image))
    time.sleep(2)  # the image is shown
    page.locator("#canvas").get_by_role("button", name=re.compile("brush|draw", re.IGNORECASE)).first.click()
    canvas = page.locator("#canvas canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 8, y)
    page.mouse.down()
    page.mouse.move(x + 8, y, steps=5)
    page.mouse.up()
    time.sleep(1)
    shoot(page, "painted")
    page.fill("#prompt textarea", "a hole")
    page.click("#draw")
    says(page, "done")
    saved = download(page, tmp_path)
    record = read_record(saved)
    assert "mask" in record and record["strength"] == "1.0"
    corners = np.array(Image.open(saved).convert("RGB"))[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == np.array((255, 165, 0))).all()


def test_watching_a_run(page):
    page.get_by_role("tab", name="Training").click()
    page.wait_for_selector("#runs img")
    assert page.locator("#runs img").count() == 2  # the curves and a sheet
    assert "step 7" in page.locator("#runs").inner_text()
    shoot(page, "training")


def test_the_browser_closed_in_the_middle_leaves_the_page_to_others(browser, url):
    first, second = browser.new_page(), browser.new_page()
    for page in (first, second):
        page.goto(url)
        says(page, "is loaded")
        page.fill("#prompt textarea", "a red square")
    draw_slowly(first)
    first.click("#draw")
    says(first, "step ")
    second.click("#draw")
    says(second, "waiting: 1 before this one")
    first.close()
    says(second, "done")
    second.close()


# in a network namespace of its own: the loopback device is brought up, and there is no other
WITHOUT_NETWORK = """
import errno, fcntl, socket, struct, sys
UP, SET_FLAGS = 0x1, 0x8914
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh", b"lo", UP))
with socket.socket() as outside:
    assert outside.connect_ex(("192.0.2.1", 80)) == errno.ENETUNREACH
import pytest
sys.exit(pytest.main(["-rsp", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_the_page_starts_and_draws_without_a_network(browser):
    """The test of drawing above once more, browser and all, where no other machine can be reached."""
    alone = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here: unshare is missing or not permitted")
    test = f"{__file__}::{test_drawing_and_a_png_that_gives_its_settings_back.__name__}"
    done = subprocess.run(
        [*alone, sys.executable, "-c", WITHOUT_NETWORK, f"{test}[1280]"],
        capture_output=True, text=True, timeout=200, env=environment(), cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
