"""The page: its layout, and what its inputs and buttons do. Gradio is imported here only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pixart.app.adapters import Adapters
from pixart.app.events import Events
from pixart.app.form import ALONE, WITHOUT, from_list, in_order
from pixart.app.models import Models
from pixart.app.settings import NATIVE, OWN, Limits
from pixart.app.training import Watch
from pixart.app.worker import Busy
from pixart.diffusion.sampling import SAMPLERS

REFRESH = 5  # seconds between looks at the files of runs, while their tab is open
CANVAS = 512  # side of the canvas for a start image, in pixels
# of events that are not called from outside the page
INNER: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
STYLE = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto; }
.gradio-container main.app { width: 100% !important; max-width: none !important; padding: 8px 12px !important; }
@media (max-width: 760px) { /* a phone: the images before the settings */
  .left { display: contents !important; }
  .ask { order: 1; width: 100%; } .results { order: 2; } .settings { order: 3; width: 100%; }
}
#gallery .grid-wrap { max-height: none !important; }
#gallery .caption-label { max-width: 100%; white-space: normal; }
.job { min-height: 3.2em; }
.job [role=progressbar] { height: 8px; margin: 0 0 8px; border-radius: 4px; background: var(--border-color-primary); }
.job [role=progressbar] div { height: 100%; border-radius: 4px; background: var(--color-accent); }
.job p { margin: 0 0 4px; }
.job img { max-width: 100%; image-rendering: pixelated; border-radius: 4px; }
.job .wrong, .note { color: var(--error-text-color); overflow-wrap: anywhere; }
.sheet { margin: 0 0 16px; } .sheet img { max-width: 100%; } .sheet figcaption { opacity: 0.7; }
"""


@dataclass(frozen=True)
class Form:
    """The components of the page that hold settings, by the names of their fields in `Settings`."""

    model: Any
    other: Any
    fields: dict[str, Any]
    adapters: dict[str, Any]  # sliders by the adapters' names
    misfit: Any  # says why an adapter does not fit the model, or that it is of another base
    canvas: Any
    draw: Any
    cancel: Any

    @property
    def inputs(self) -> list[Any]:
        return [self.model, self.other, self.canvas, *in_order(self.fields, list(self.adapters.values()))]


def build_page(models: Models, events: Events, limits: Limits, samplers: Sequence[str] | None = None):
    """The page as a `gradio.Blocks`, to be mounted by `pixart.app.server`."""
    import gradio as gr

    with gr.Blocks(title="pixart", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        with gr.Tab("Draw", id="draw"), gr.Row():
            with gr.Column(scale=2, min_width=320, elem_classes="left"):
                form = _form(gr, models, limits, list(SAMPLERS) if samplers is None else samplers)
            with gr.Column(scale=3, min_width=320, elem_classes="results"):
                _results(gr, form, events, page)
        with gr.Tab("Training", id="training") as tab:
            _training(gr, tab, Watch(models.runs))
    return page


def _form(gr, models: Models, limits: Limits, samplers: Sequence[str]) -> Form:
    names, f = list(models.paths()), {}

    def number(name: str, label: str, empty: str = "the model's own"):
        f[name] = gr.Textbox(label=label, placeholder=empty, max_lines=1, elem_id=name, min_width=120)

    with gr.Column(elem_classes="ask"):
        f["prompt"] = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="prompt")
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
            cancel = gr.Button("Cancel", elem_id="cancel", min_width=120)
    with gr.Column(elem_classes="settings"):
        model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
        other = gr.Dropdown(compared(models), value=ALONE, label="Compare with", elem_id="other")
        adapters, misfit = _adapters(gr, models.adapters)
        f["count"] = gr.Slider(1, limits.images, 1, step=1, label="Images", elem_id="count")
        with gr.Row():
            number("seed", "Seed", "drawn")
            f["size"] = gr.Dropdown(
                [NATIVE], value=NATIVE, label="Height x width", allow_custom_value=True, elem_id="size", min_width=120
            )
        with gr.Row():
            number("steps", "Steps")
            number("guidance", "Guidance")
        with gr.Accordion("More settings", open=False):
            f["negative"] = gr.Textbox(label="Negative prompt", max_lines=6, elem_id="negative")
            f["sampler"] = gr.Dropdown([OWN, *samplers], value=OWN, label="Sampler", elem_id="sampler")
            with gr.Row():
                number("guidance_low", "Guidance from time")
                number("guidance_high", "to time")
            number("rescale", "Guidance rescale, 0 to 1")
            f["more"] = gr.Textbox(label="Others", placeholder="spacing=karras order=3", max_lines=3, elem_id="more")
            f["truncate"] = gr.Checkbox(label="Cut a prompt that is too long", elem_id="truncate")
        with gr.Accordion("Start from an image", open=False, elem_id="start"):
            canvas = _canvas(gr)
            number("strength", "Strength, 0 to 1", "0.6, or 1 if something is painted")
    return Form(model, other, f, adapters, misfit, canvas, draw, cancel)


def compared(models: Models) -> list[str]:
    """What a model can be compared with, as they are now."""
    return [ALONE, *([WITHOUT] if models.adapters.names else []), *models.paths()]


def _adapters(gr, adapters: Adapters) -> tuple[dict[str, Any], Any]:
    """A slider for each adapter by its name, and a place for what speaks against one on the model."""
    if not adapters.names:
        return {}, gr.HTML(visible=False)
    sliders = {}
    with gr.Accordion("Adapters and their strengths; 0 is off", open=True, elem_id="adapters"):
        for i, name in enumerate(adapters.names):
            low, high = adapters.range(name)
            sliders[name] = gr.Slider(
                low, high, adapters.at_start[name], step=0.01, label=name, elem_id=f"adapter{i}"
            )  # fmt: skip
        return sliders, gr.HTML("", elem_id="misfit", padding=False)


def _canvas(gr):
    gr.Markdown("What is painted is drawn again; the rest stays as it is. Without paint, all changes.")
    return gr.ImageEditor(
        show_label=False,
        type="pil",
        image_mode="RGBA",
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=CANVAS // 10, colors=["#ff3b30"], color_mode="fixed"),
        canvas_size=(CANVAS, CANVAS),
        elem_id="canvas",
    )


@dataclass(frozen=True)
class Results:
    """The components of the page that show what was drawn."""

    status: Any
    gallery: Any
    records: Any  # state: the records of the gallery's images
    chosen: Any  # state: the record of the image that is selected
    shown: Any
    again: Any
    dropped: Any


def _results(gr, form: Form, events: Events, page) -> None:
    status = gr.HTML('<div class="job"></div>', elem_id="status")
    gallery = gr.Gallery(
        label="Images", columns=2, object_fit="contain", height="auto", interactive=False, elem_id="gallery",
        buttons=["download", "fullscreen"],
    )  # fmt: skip
    records, chosen = gr.State([]), gr.State(None)
    shown = gr.Textbox(label="Settings of the image that is selected", lines=3, max_lines=14, interactive=False,
                       elem_id="settings")  # fmt: skip
    again = gr.Button("Use these settings again", elem_id="again")
    dropped = gr.File(label="Settings of a PNG that pixart drew: drop it here", height=150, elem_id="dropped")
    results = Results(status, gallery, records, chosen, shown, again, dropped)
    _connect_drawing(gr, form, results, events, page)
    _connect_settings(gr, form, results, events)
    _connect_model(gr, form, results, events, page)


def _connect_drawing(gr, form: Form, results: Results, events: Events, page) -> None:
    adapters = list(form.adapters)

    async def on_draw(request: gr.Request, *sent):
        unchanged = gr.skip()
        try:
            async for html, found in events.draw(request.session_hash, *from_list(sent, adapters)):
                if found is None:
                    yield html, unchanged, gr.skip(), gr.skip()
                else:
                    # for a gallery that is skipped Gradio makes its schema anew, half the work of showing a state
                    unchanged = gr.skip() if found else []
                    images = [(str(result.path), result.caption) for result in found]
                    yield html, gr.Gallery(images, selected_index=None), [result.record for result in found], None
        except Busy as busy:
            gr.Warning(str(busy))
            yield [gr.skip()] * 4

    def on_cancel(request: gr.Request):
        return events.cancel(request.session_hash)

    def on_leave(request: gr.Request):
        events.leave(request.session_hash)

    form.draw.click(
        on_draw, form.inputs, [results.status, results.gallery, results.records, results.chosen], api_name="draw",
        concurrency_limit=None, show_progress="hidden", trigger_mode="multiple",
    )  # fmt: skip
    form.cancel.click(on_cancel, None, results.status, queue=False, **INNER)
    page.unload(on_leave)


def _connect_settings(gr, form: Form, results: Results, events: Events) -> None:
    filled = in_order(form.fields, list(form.adapters.values()))

    def on_select(kept, event: gr.SelectData):
        record = kept[event.index]
        return record, "\n".join(f"{key}: {value}" for key, value in record.items())

    def fill(html, values):
        if values is None:
            return [html, *(gr.skip() for _ in filled)]
        return [html, *in_order(values, list(values["adapters"].values()))]

    changed = [results.status, *filled]
    results.gallery.select(on_select, results.records, [results.chosen, results.shown], **INNER)
    results.again.click(lambda record: fill(*events.fill(record)), results.chosen, changed, **INNER)
    results.dropped.upload(lambda path: fill(*events.fill_from(path)), results.dropped, changed, **INNER)


def _connect_model(gr, form: Form, results: Results, events: Events, page) -> None:
    adapters = list(form.adapters)

    async def on_model(request: gr.Request, model, *strengths):
        pairs = dict(zip(adapters, strengths, strict=True))
        html, sizes, misfit = await events.choose(request.session_hash, model, pairs)
        return html, gr.skip() if sizes is None else gr.Dropdown(choices=sizes), misfit

    async def on_strength(request: gr.Request, model, *strengths):
        return (await on_model(request, model, *strengths))[-1]

    def on_load():
        return gr.Dropdown(choices=events.names()), gr.Dropdown(choices=compared(events.models))

    asked, said = [form.model, *form.adapters.values()], [results.status, form.fields["size"], form.misfit]
    form.model.change(on_model, asked, said, concurrency_limit=None, **INNER)
    page.load(on_load, None, [form.model, form.other], **INNER).then(
        on_model, asked, said, concurrency_limit=None, **INNER
    )
    for slider in form.adapters.values():
        slider.change(on_strength, asked, form.misfit, concurrency_limit=None, trigger_mode="always_last", **INNER)


def _training(gr, tab, watch: Watch) -> None:
    shown = gr.HTML(elem_id="runs")
    seen, timer = gr.State(""), gr.Timer(REFRESH, active=False)

    def look(before):
        now = watch.state()
        return (gr.skip(), gr.skip()) if now == before else (watch.show(), now)

    tab.select(lambda: gr.Timer(active=True), None, timer, **INNER)
    tab.select(look, seen, [shown, seen], **INNER)
    timer.tick(look, seen, [shown, seen], **INNER)
