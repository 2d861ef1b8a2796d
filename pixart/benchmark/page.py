"""A case of the page: what drawing through it costs, beside the same call of the pipeline."""

import tempfile
import threading
import time
from pathlib import Path

from pixart.app.adapters import Adapters
from pixart.app.form import to_list
from pixart.app.models import Loaded, Models, Shelf
from pixart.app.preview import Preview
from pixart.app.server import Address, bind, make_app
from pixart.app.settings import Limits
from pixart.benchmark.measure import Call, Case, Settings
from pixart.benchmark.sampling import WORDS, make_prompts, random_pipeline
from pixart.errors import missing_extra
from pixart.inference.pipeline import Pipeline

NAME = "random"


class InMemory(Models):
    """One model that is in no file."""

    def __init__(self):
        self.sources, self.names, self.adapters = [NAME], [NAME], Adapters()


class OnePipeline(Shelf):
    """A pipeline under any name."""

    def __init__(self, pipeline: Pipeline):
        self.loaded = Loaded(pipeline, Preview(pipeline.autoencoder, pipeline.device))

    def get(self, name: str) -> Loaded:
        return self.loaded


def page_case(settings: Settings) -> Case:
    """Twenty guided steps of one prompt, from text to PNGs or images: called, and asked of the page by its HTTP client,
    with previews and a PNG for each image."""
    return _case("page", settings, random_pipeline(settings))


def page_of_pixels_case(settings: Settings) -> Case:
    """The same with a model of pixels, which draws sooner."""
    return _case("page-pixels", settings, random_pipeline(settings, pixels=True))


def _case(name: str, settings: Settings, pipeline: Pipeline) -> Case:
    prompt, keep = make_prompts(settings)[0], []

    def direct() -> Call:
        size = {"height": settings.height, "width": settings.width}
        return lambda: pipeline(prompt, 0, images_per_prompt=settings.images, batch_size=4, **size)

    def through_the_page() -> Call:
        try:
            from gradio_client import Client
        except ImportError:
            raise missing_extra("gradio", "app", "the case page") from None
        home = tempfile.TemporaryDirectory()
        keep.append(home)
        port = _serve(pipeline, Path(home.name))
        # without certificates, which it would read for each request; the address has none
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=False, ssl_verify=False)
        size = f"{settings.height}x{settings.width}"
        form = to_list(NAME, prompt=prompt, count=settings.images, seed="0", size=size, truncate=True)

        def call() -> None:
            status = client.predict(*form, api_name="/draw")[0]
            assert "done" in status, status

        return call

    programs = {"ours": direct, "through the page": through_the_page}
    return Case(name, programs, images=settings.images, note=f"{WORDS} words a prompt", keep=keep)


def _serve(pipeline: Pipeline, home: Path) -> int:
    """Serve the page in a thread until the process ends → its port."""
    import uvicorn

    address = Address(port=0)
    listener = bind(address)
    app, _ = make_app(InMemory(), [OnePipeline(pipeline)], address, Limits(images=1024), home)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return listener.getsockname()[1]
