"""A new idea is one new file and one line: every seam with an idea of a user's own, from training to export.

The ideas stand in `ideas.py`, which runs reach through `extensions:` as a user's file outside the checkout.
"""

import copy
import json
import math
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import ideas
import pixart
from chaos import chaos, tensors
from pixart.adapters.adapter import AdapterConfig, adapt
from pixart.benchmark.measure import count_flops
from pixart.checkpoint import load_model
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.checkpoint.save import save
from pixart.data.arrays import ARRAYS
from pixart.data.training_set import load_images
from pixart.diffusion.objective import Denoising, Example, ObjectiveConfig, TrainingModule
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.autoencoder import IdentityAutoencoder
from pixart.errors import InputError
from pixart.extensions import load_extensions
from pixart.features import Share, extract
from pixart.features.store import FeatureStore
from pixart.files import read_rows
from pixart.model import PixArt, PixArtConfig
from pixart.model.flops import forward_flops
from pixart.model.layers import Layout, rotate
from pixart.registry import Registry
from pixart.seeds import Draw
from pixart.study.plots import draw_curves, read_curves
from pixart.train.loop import train
from pixart.train.metrics import merge_declarations
from pixart.train.parts import Parts, make_objective
from pixart.train.setup import make_accelerator
from pixart.train.throughput import CallCounter
from runs import ROOT, build, change, make_pictures, make_text_encoder, run_command, settings, write
from toy import TINY, relative, tiny_inputs, tiny_model

VARIANTS = {
    "adaln": {"conditioning": "adaln"},
    "time token": {"conditioning": "clock_token"},
    "rope": {"positions": "rope"},
    "time token and rope": {"conditioning": "clock_token", "positions": "rope"},
    "rms norm": {"norm": "root_mean_square"},
    "swish_gated": {"mlp": "swish_gated"},
    "attention of one's own": {"attention": "sharper", "options": {"temperature": 0.5}},
    "tread": {"routing": "skipping", "depth": 4},
    "tread, rope and a time token": {
        "routing": "skipping",
        "depth": 4,
        "positions": "rope",
        "conditioning": "clock_token",
    },
}


# ------------------------------------------------------------------------------------- 1. variants of the network


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_every_weight_and_says_something_else_than_the_usual_network(variant):
    usual, model = tiny_model(), tiny_model(**VARIANTS[variant])
    inputs = tiny_inputs(model)
    route = {"route": torch.rand(2, 16)} if model.routing else {}
    output = model(**inputs, **route)
    assert output.shape == (2, 8, 8, 8)
    assert relative(output, usual(**inputs)) > 1e-3
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.device("meta"):  # no value is looked at
        blank = PixArt(model.config)
    given = {name: value.to("meta") for name, value in {**inputs, **route}.items()}
    assert blank(**given).shape == output.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_start_by_the_names_of_their_weights(variant):
    def start(**changes):
        torch.manual_seed(3)
        return PixArt(PixArtConfig(**{**TINY, "depth": 4, **changes})).state_dict()

    usual, first, second = start(), start(**VARIANTS[variant]), start(**VARIANTS[variant])
    assert all(torch.equal(first[name], second[name]) for name in first)
    shared = [n for n in usual if n in first and usual[n].shape == first[n].shape and "final_layer" not in n]
    assert len(shared) > 0.7 * len(usual)
    assert all(torch.equal(usual[name], first[name]) for name in shared)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "tread" not in v])
def test_flops_of_a_variant_are_those_of_a_real_forward(variant):
    model = tiny_model(**VARIANTS[variant])
    with torch.no_grad():
        found = count_flops(lambda: model(**tiny_inputs(model)))
    assert forward_flops(model.config, 8, 8, 5, batch=2) == found


def test_per_block_adaln_is_dits_block():
    model = tiny_model(conditioning="adaln")
    block, dim = model.blocks[1], model.config.hidden_size
    for parameter in block.cross_attn.proj.parameters():
        parameter.data.zero_()  # DiT has no captions
    x, time = torch.randn(2, 16, dim), torch.randn(2, dim)
    rows = block.adaLN_modulation[1](F.silu(time)).chunk(6, dim=1)

    def modulated(x, shift, scale):
        return F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    q, k, v = block.attn.qkv(modulated(x, rows[0], rows[1])).view(2, 16, 3, 4, dim // 4).permute(2, 0, 3, 1, 4)
    heads = ((q @ k.transpose(-1, -2)) * (dim // 4) ** -0.5).softmax(-1) @ v
    middle = x + rows[2][:, None] * block.attn.proj(heads.transpose(1, 2).flatten(2))
    hidden = F.gelu(block.mlp.fc1(modulated(middle, rows[3], rows[4])), approximate="tanh")
    expected = middle + rows[5][:, None] * block.mlp.fc2(hidden)
    assert relative(block(x, time, torch.randn(2, 5, dim), None, Layout((4, 4))), expected) <= 1e-6


def test_rotary_scores_depend_on_relative_positions_alone():
    rope = ideas.Rope(PixArtConfig(**TINY))
    table = rope.rotary(6, 6)
    q, k = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(first: tuple[int, int], second: tuple[int, int]) -> float:
        a, b = (table[:, row * 6 + column][:, None] for row, column in (first, second))
        return (rotate(q, a) * rotate(k, b)).sum().item()

    assert score((0, 1), (2, 3)) == pytest.approx(score((3, 2), (5, 4)), abs=1e-5)
    assert abs(score((0, 1), (2, 3)) - score((0, 1), (3, 2))) > 1e-3
    assert torch.allclose(rotate(q, table[:, 7][:, None]).norm(), q.norm())


def test_routed_tokens_leave_and_return_as_they_were():
    model = tiny_model(routing="skipping", depth=4, options={"share": 0.25})
    route = torch.rand(2, 16)
    _, hidden = model(**tiny_inputs(model), route=route, keep=(0, 1, 2, 3))
    skipped = route.argsort(dim=1)[:, 12:]

    def of(index: int, tokens: torch.Tensor) -> torch.Tensor:
        return hidden[index].gather(1, tokens[:, :, None].expand(-1, -1, hidden[index].shape[2]))

    for i in (1, 2):  # blocks 1 and 2 are left out
        assert torch.equal(of(i, skipped), of(0, skipped))
        assert not torch.equal(of(i, route.argsort(dim=1)[:, :12]), of(0, route.argsort(dim=1)[:, :12]))
    assert not torch.equal(of(3, skipped), of(0, skipped))


def test_the_tokens_that_stay_attend_among_themselves():
    # what a token that is left out holds changes nothing for the others until it is back
    model = tiny_model(routing="skipping", depth=4)
    inputs, route = tiny_inputs(model), torch.rand(2, 16)
    stay = route.argsort(dim=1)[:, :8]

    def stream(noise: float) -> torch.Tensor:
        left = torch.ones(2, 16, 1).scatter(1, stay[:, :, None], 0.0)

        def edit(index: int, x: torch.Tensor) -> torch.Tensor:
            return x + noise * left if index == 0 else x

        _, hidden = model(**inputs, route=route, edit=edit, keep=(2,))
        return hidden[2].gather(1, stay[:, :, None].expand(-1, -1, 48))

    assert torch.equal(stream(0.0), stream(5.0))


@pytest.mark.parametrize("off", [{"options": {"share": 0.0}}, {}])
def test_routing_switched_off_is_the_usual_network_bit_for_bit(off):
    model = tiny_model(routing="skipping", depth=4, **off)
    usual = tiny_model(depth=4)
    usual.load_state_dict(model.state_dict())
    inputs = tiny_inputs(model)
    route = {"route": torch.rand(2, 16)} if off else {}  # sampling brings no numbers
    assert torch.equal(model(**inputs, **route), usual(**inputs))


def test_flops_of_routed_tokens_are_fewer():
    model = tiny_model(routing="skipping", depth=4)
    usual = forward_flops(model.config, 8, 8, 5)
    routed = forward_flops(model.config, 8, 8, 5, conditions={"route": (16,)})
    blocks = usual - forward_flops(replace(model.config, depth=2), 8, 8, 5)  # two of the four
    assert usual - 0.62 * blocks < routed < usual - 0.35 * blocks


def test_a_condition_that_the_network_does_not_take_is_refused():
    with pytest.raises(InputError, match=r"route: this model takes no such condition; it takes \[\]"):
        tiny_model()(**tiny_inputs(tiny_model()), route=torch.rand(2, 16))


@pytest.mark.parametrize(
    ("setting", "name"),
    [("conditioning", "adaLN"), ("positions", "ropes"), ("attention", "sharp"), ("norm", "rmsnorm"),
     ("mlp", "swish_gate"), ("routing", "treads")],
)  # fmt: skip
def test_a_name_that_nothing_registers_is_refused_with_the_nearest(setting, name):
    with pytest.raises(
        InputError, match=rf"model.{setting}: there is no '{name}'; did you mean .*extensions: \[FILE\]"
    ):
        PixArt(PixArtConfig(**{**TINY, setting: name}))


def test_a_name_belongs_to_the_file_that_registered_it():
    registry = Registry("model.thing")
    registry.register("a")(1)
    registry.register("a")(2)  # the same file again, edited
    assert registry["a"] == 2
    with pytest.raises(InputError, match=r"model.thing: 'a' is taken by test_seams; choose"):
        exec("registry.register('a')(3)", {"registry": registry, "__name__": "other"})


# ---------------------------------------------------------------------- 2. into and out of the residual stream


def test_the_authors_controlnet_is_an_edit_of_the_stream():
    golden = load_file(ROOT / "tests" / "golden" / "model_alpha_controlnet.safetensors")
    config = PixArtConfig(hidden_size=144, depth=5, num_heads=4, caption_channels=64, caption_length=12, latent_size=32)
    model = PixArt(config)
    controls = torch.nn.ModuleList()
    for i in range(3):
        control = torch.nn.Module()
        control.copied_block = copy.deepcopy(model.blocks[i])
        control.after_proj = torch.nn.Linear(144, 144)
        if i == 0:
            control.before_proj = torch.nn.Linear(144, 144)
        controls.append(control)

    def fill(module: torch.nn.Module, prefix: str) -> None:
        for name, tensor in module.state_dict().items():
            z = torch.randn(
                tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"w:{prefix}{name}".encode()))
            )
            if name.endswith("scale_shift_table"):
                z = 0.3 * z
            elif not name.endswith("y_embedding"):
                z = z / math.prod(tensor.shape[1:]) ** 0.5 if tensor.ndim > 1 else 0.1 * z
            tensor.copy_(z)

    fill(model, "base_model.")
    fill(controls, "controlnet.")
    given = {name.removeprefix("in."): value for name, value in golden.items() if name.startswith("in.")}
    x, t, caption = given["x"], given["t"], given["y"].squeeze(1)
    mask = given["mask"].reshape(len(x), -1) if "mask" in given else None
    with torch.no_grad():
        # torch.exp rounds otherwise on another maker's processor, which times of up to 1,000 multiply
        tolerance = 5e-6
        assert relative(model(x, t, caption, mask)[:, :8], golden["out.noc"]) <= tolerance
        shared = model.t_block(model.embed_time(t, None, None))
        tokens = model.y_embedder(caption)
        kept = None if mask is None else mask.bool()[:, None, None, :]
        grid = (x.shape[2] // 2, x.shape[3] // 2)
        condition = model.x_embedder(given["c"]) + model.positions(*grid)
        state = [condition]

        def edit(index: int, stream: torch.Tensor) -> torch.Tensor:
            if index >= len(controls):
                return stream
            control = controls[index]
            into = stream + control.before_proj(state[0]) if index == 0 else state[0]
            state[0] = control.copied_block(into, shared, tokens, kept, Layout(grid))
            return stream + control.after_proj(state[0])

        assert relative(model(x, t, caption, mask, edit=edit), golden["out"]) <= tolerance


def test_no_edit_and_nothing_kept_is_the_same_bit_for_bit():
    model = tiny_model()
    inputs = tiny_inputs(model)
    output, hidden = model(**inputs, edit=lambda _, x: x, keep=(0, 1))
    assert torch.equal(output, model(**inputs))
    assert list(hidden) == [0, 1] and all(state.shape == (2, 16, 48) for state in hidden.values())
    last = model.final_layer(hidden[1], model.embed_time(inputs["t"], None, None))
    assert torch.equal(last.reshape(2, 4, 4, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 8, 8), output)


def test_hidden_states_are_the_images_tokens_alone():
    model = tiny_model(conditioning="clock_token", positions="rope")
    _, hidden = model(**tiny_inputs(model), keep=(0,))
    assert hidden[0].shape == (2, 16, 48)


# ------------------------------------------------------------------------------------------------- 3. objectives


def example(model: PixArt) -> Example:
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=g)
    inputs = tiny_inputs(model)
    given = {"caption": inputs["caption"], "caption_mask": inputs["caption_mask"]}
    return Example(
        x0,
        noise,
        torch.tensor([0.2, 0.7]),
        given,
        model.y_embedder.y_embedding,
        targets={"colours": torch.randn(2, 16, 3, generator=g)},
        draws={"second": torch.tensor([0.9, 0.4])},
    )


def flow_parts() -> Parts:
    model = tiny_model(learn_sigma=False)
    return Parts.of(model, ideas.Everything(DiffusionConfig("flow", "velocity"), model))


def test_an_objective_is_its_formula_and_gives_gradients_to_what_it_trains_alone():
    parts = flow_parts()
    given = example(parts.network)
    terms = parts.training(given)
    assert torch.allclose(terms["loss"], terms["mse"] + 0.5 * (terms["alignment"] + terms["consistency"]))
    assert (terms["consistency"] == 0).all()  # the target is the network still
    terms["loss"].mean().backward()
    assert parts.trained["projector"].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in parts.kept["target"].parameters())


def test_a_target_average_moves_after_the_step_and_only_if_it_was_applied():
    parts = flow_parts()
    name, weight = next(iter(parts.network.named_parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    target = dict(parts.kept["target"].named_parameters())[name]
    parts.objective.after_step(parts.network, torch.tensor(False))
    assert torch.equal(target, before)
    parts.objective.after_step(parts.network, torch.tensor(True))
    assert relative(target, before + 0.1) <= 1e-6


def test_the_averaged_objective_has_the_averages_of_what_is_trained_and_shares_the_rest():
    parts = flow_parts()
    with torch.no_grad():
        parts.trained["projector"].weight.zero_()
    averaged = parts.averaged_objective()
    assert averaged.trained["projector"].weight.abs().sum() > 0
    assert averaged.state["target"] is parts.kept["target"]
    assert parts.objective.trained["projector"].weight.abs().sum() == 0


def test_flops_of_an_objective_are_those_of_all_its_calls():
    parts = flow_parts()
    counter = CallCounter(parts.training)
    given = example(parts.network)
    with counter.counting():
        parts.training(given)
    parts.training(given)  # outside: not counted
    forward = forward_flops(parts.network.config, 8, 8, 5, batch=2)
    assert counter.take() == (3 + 1 + 3) * forward
    assert counter.take() == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [({"wieght": 1}, "objective 'everything' does not accept its options .*wieght"), ({"weight": 0.1}, None)],
)
def test_options_of_an_objective_are_its_keywords(options, match):

    def make():
        return make_objective(
            ObjectiveConfig("everything", options), DiffusionConfig("flow", "velocity"), tiny_model(), 0
        )

    if match is None:
        assert make().weight == 0.1
    else:
        with pytest.raises(InputError, match=match):
            make()


def test_a_module_wraps_network_and_objective_so_that_one_wrapper_goes_round_both():
    model = tiny_model(learn_sigma=False)
    training = TrainingModule(model, Denoising(DiffusionConfig("flow", "velocity"), model))
    given = example(model)
    t = 1000 * given.time
    x_t = (1 - given.time)[:, None, None, None] * given.x0 + given.time[:, None, None, None] * given.noise
    expected = (model(x_t, t, **given.inputs) - (given.noise - given.x0)).square().flatten(1).mean(1)
    assert relative(training(given)["loss"], expected) <= 1e-6


# --------------------------------------------------------------------------- 4, 5, 8. whole runs, from a user's file


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict:
    """A run of all ideas at once, from a feature store, its file outside the checkout."""
    folder = tmp_path_factory.mktemp("seams")
    (folder / "mine").mkdir()
    extension = Path(shutil.copy(ROOT / "tests" / "ideas.py", folder / "mine" / "my_ideas.py"))
    text = extension.read_text()
    for name in ("adaln", "clock_token", "rope", "root_mean_square", "swish_gated", "sharper", "skipping", "busy",
                 "patch_contrast", "patch_colours", "everything", "stripes", "one_step", "low_rank", "mae",
                 "cosine"):  # fmt: skip
        text = text.replace(f'"{name}"', f'"my_{name}"')
    extension.write_text(text)
    pictures = make_pictures(folder / "pictures", count=16)
    for path in pictures.glob("*.png"):  # nothing that looks the same in a mirror
        image = Image.open(path)
        image.paste("pink", (0, 0, 2, 8))
        image.save(path)
    (pictures / "names.tsv").write_text("".join(f"{i:02d}.png\ta square, number {i}\n" for i in range(16)))
    made = settings(folder / "run", pictures / "names.tsv", make_text_encoder(folder / "text"))
    return change(
        made, extensions=[str(extension)], data__format="my_stripes", data__flip=True, data__validation=0.2,
        data__conditions={"contrast": "my_patch_contrast"}, data__targets={"colours": "my_patch_colours"},
        data__features=str(folder / "store"), extract={"mirrored": True},
        model__conditioning="my_adaln", model__positions="my_rope", model__norm="my_root_mean_square",
        model__mlp="my_swish_gated", model__attention="my_sharper", model__options={"temperature": 0.5},
        model__routing="my_busy", model__depth=3,
        diffusion={"schedule": "flow", "prediction": "velocity"},
        objective={"name": "my_everything", "options": {"weight": 0.25}},
        sample={"sampler": "my_one_step"}, prompts=["a square, number 3"],
        train__steps=4, train__validate_every=4, train__sample_every=4, train__keep=9, train__caption_dropout=0.3,
        train__metrics=["loss", "denoising_error", "my_mae:0.5", "my_cosine:0.25"],
        optimizer__groups=[{"names": ["projector.*"], "lr_factor": 2.0, "weight_decay": 0.0}],
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(base) -> FeatureStore:
    load_extensions(base["extensions"])
    config = build(base)
    extract(
        config.data, config.data_spec.table, config.vae, config.text, config.extract, prompts=config.prompts,
        share=Share(), say=lambda _: None,
    )  # fmt: skip
    return FeatureStore(config.data.features)


@pytest.fixture(scope="module")
def run(base, store) -> Path:
    return train(build(base)).run


def test_a_store_holds_arrays_by_name_and_they_are_those_of_the_images(base, store):
    config = build(change(base, data__features=None))

    data = load_images(config.data_spec, make_accelerator(config), IdentityAutoencoder())
    assert store.arrays == ["my_patch_colours", "my_patch_contrast"]
    by_id = {store.get(i).id: i for i in range(len(store))}
    for i, record in enumerate(data.records):
        sample = data.train.dataset[0, i]
        mirrored = bool(config.data_spec.drawing(0, record.id, (3, 8, 8)).uniform("flip") < 0.5)
        for key, name in (("conditions", "my_patch_contrast"), ("targets", "my_patch_colours")):
            (found,) = sample[key].values()
            assert relative(store.array(name, by_id[record.id], mirrored=mirrored), found) <= 1e-3
    assert not torch.equal(store.array("my_patch_colours", 1), store.array("my_patch_colours", 1, mirrored=True))


def test_every_term_is_logged_in_training_and_validation(run):
    rows = list(read_rows(run / "metrics.jsonl"))
    logged = next(row for row in rows if "loss" in row)
    assert logged["loss"] == pytest.approx(
        logged["mse"] + 0.25 * (logged["alignment"] + logged["consistency"]), rel=1e-5
    )
    checked = next(row for row in rows if "validation_loss" in row)
    parts = checked["validation_alignment"] + checked["validation_consistency"]
    assert checked["validation_loss"] == pytest.approx(checked["validation_mse"] + 0.25 * parts, rel=1e-5)


def test_a_metric_of_ones_own_is_in_the_log_the_summary_the_table_and_the_plot(base, run, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")  # one that has two validations to choose from
    shutil.rmtree(checkpoints(again)[-1])
    train(build(base, output=str(again), train__validate_every=1))
    rows = [row for row in read_rows(again / "metrics.jsonl") if "mae_0.5" in row]
    assert [row["step"] for row in rows] == [3, 4]
    first = {name: value for name, value in rows[-1].items() if name != "step"}
    there = next(row for row in read_rows(run / "metrics.jsonl") if "likeness_red" in row)
    assert all(there[name] == value for name, value in first.items())
    summary = json.loads((again / "summary.json").read_text())
    for key, choose in (("mae_0.5", min), ("likeness", max)):
        best = choose(rows, key=lambda row: row[key])
        assert (summary[key], summary[f"best_{key}"], summary[f"best_{key}_step"]) == (
            rows[-1][key],
            best[key],
            best["step"],
        )
    assert "best_likeness_red" not in summary
    pytest.importorskip("matplotlib")
    result = run_command(
        "compare", again, run, "--output", tmp_path / "plot.png", "--extension", base["extensions"][0]
    )  # the file is for the network, whose parameters are counted; the metrics are known from the runs
    assert result.returncode == 0, result.stderr
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()[:4]]
    place = table[0].index("likeness")
    assert table[0][place : place + 4] == ["likeness", "its best, at step", "red", "blue"]
    best = max(rows, key=lambda row: row["likeness"])
    assert table[2][place : place + 2] == [f"{rows[-1]['likeness']:.4g}", f"{best['likeness']:.4g}, {best['step']}"]
    figure = draw_curves({"again": read_curves(again)}, merge_declarations([again]))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert "absolute error of clean images at time 0.5 (lower is better)" in titles
    assert titles[titles.index("likeness of clean images (higher is better)") + 1] == "the same in every channel"


def test_a_run_of_ones_own_ideas_goes_on_bit_for_bit(base, run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for later in checkpoints(again)[1:]:
        shutil.rmtree(later)
    assert checkpoints(again)[0].name == "step_00000002"
    train(build(base, output=str(again)))
    first, second = (tensors(newest_checkpoint(place, print)) for place in (run, again))
    assert {name.split(":")[0] for name in first} >= {
        "parts/projector.safetensors",
        "parts/projector.ema.safetensors",
        "parts/target.kept.safetensors",
    }
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_groups_have_their_own_rate_and_decay(base, run):
    record = torch.load(newest_checkpoint(run, print) / "training.pt", weights_only=True)["optimizer"]["groups"]
    projector, rest = record
    assert projector["params"] == ["projector.weight", "projector.bias"]
    assert projector["lr"] == 2 * rest["lr"] and (projector["weight_decay"], rest["weight_decay"]) == (0.0, 0.01)


def test_the_model_loads_samples_and_exports_where_the_file_is_passed(base, run, tmp_path):
    pipeline = pixart.Pipeline.from_pretrained(run, extensions=base["extensions"])
    images = pipeline(["a square", "a circle"], seeds=[1, 2])
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    contrast = torch.rand(2, 16)
    routed = pipeline(["a square", "a circle"], seeds=[1, 2], output="latent", conditions={"contrast": contrast})
    assert not torch.equal(routed, pipeline(["a square", "a circle"], seeds=[1, 2], output="latent"))
    model = load_model(run)
    save(model, pipeline.card, tmp_path / "ours", "ours")
    assert torch.equal(load_model(tmp_path / "ours").blocks[1].mlp.gate.weight, model.blocks[1].mlp.gate.weight)
    with pytest.raises(InputError, match=r"diffusers' PixArt has no .*conditioning my_adaln"):
        save(model, pipeline.card, tmp_path / "theirs", "diffusers")


def test_a_strangers_run_never_runs_its_copy(run, tmp_path):
    # in a process that has not been given the file
    result = run_command("sample", "--model", run, "a square", "--out", tmp_path / "samples")
    assert result.returncode == 2
    assert "there is no 'my_adaln'" in result.stderr and "--extension" in result.stderr


def test_an_extension_that_changed_is_refused_at_resume_unless_it_is_accepted(base, run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    changed = tmp_path / "my_ideas.py"
    changed.write_text(Path(base["extensions"][0]).read_text() + "\n# a remark\n")
    more = change(base, output=str(again), extensions=[str(changed)], train__steps=5)
    with pytest.raises(InputError, match=r"my_ideas.py differs from what .* has been trained with"):
        train(build(more))
    kept = (again / "extensions" / "my_ideas.py").read_text()
    assert kept == Path(base["extensions"][0]).read_text()
    train(build(more, accept_changed_extensions=True))
    assert (again / "extensions" / "my_ideas.py").read_text() == changed.read_text()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("x = (", r"broken.py:1: SyntaxError"),
        ("import math\nimport no_such_package", r"broken.py:2: ModuleNotFoundError: No module named 'no_such_package'"),
        ("from pixart.model.layers import MLPS\nMLPS.register('gelu')(int)", "'gelu' is taken by pixart.model.layers"),
    ],
)
def test_a_broken_extension_is_one_line(tmp_path, content, match):
    path = tmp_path / "broken.py"
    path.write_text(content)
    with pytest.raises(InputError, match=match):
        load_extensions([path])


def test_missing_extensions_and_arrays_are_one_line_before_any_work(base, store, tmp_path):
    with pytest.raises(InputError, match=r"extension .*gone.py: cannot be read \(No such file"):
        train(build(base, extensions=[str(tmp_path / "gone.py")]))
    ARRAYS.register("my_other")(ideas.patch_colours)
    new = change(base, output=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"has no arrays named my_other"):
        train(build(new, data__targets={"colours": "my_other"}))
    with pytest.raises(InputError, match=r"data.targets: there is no 'my_patch_colour'; did you mean"):
        train(build(new, data__targets={"colours": "my_patch_colour"}))


def test_draws_of_a_network_and_an_objective_reach_them_and_change_no_other(base, tmp_path):
    load_extensions(base["extensions"])
    plain = change(base, data__features=None, data__conditions={}, model__routing=None)
    routed = change(plain, model__routing="my_skipping", model__depth=3)

    samples = []
    for config in map(build, (plain, routed)):
        data = load_images(config.data_spec, make_accelerator(config), IdentityAutoencoder())
        samples.append(data.train.dataset[3, 5])
    first, second = samples
    assert set(second["conditions"]) == {"route"} and second["conditions"]["route"].shape == (16,)
    assert second["draws"]["second"].shape == () and torch.equal(first["draws"]["second"], second["draws"]["second"])
    assert all(torch.equal(first[name], second[name]) for name in ("noise", "posterior_noise", "pixels"))
    assert (first["time"], first["drop"]) == (second["time"], second["drop"])
    assert isinstance(ideas.Tread.conditions["route"], Draw)


# ------------------------------------------------------------------------------------------- an adapter on top of a run


@pytest.fixture(scope="module")
def adapted(base, store, run) -> dict:
    return change(
        base,
        output=f"{base['output']}_adapted",
        init_from=str(run),
        optimizer__groups=[],
        optimizer__lr=0.05,
        adapter={"kind": "my_low_rank", "options": {"rank": 3}},
    )


def test_an_adapter_trains_alone_on_a_base_that_stays_and_its_checkpoint_holds_it_alone(adapted, run, tmp_path):
    result = train(build(adapted))
    checkpoint = newest_checkpoint(result.run, print)
    held = load_file(checkpoint / "model" / "adapter.safetensors")
    assert {name.split(".", 2)[2] for name in held} == {"down.weight", "up.weight"}
    assert all(tensor.abs().sum() > 0 for tensor in held.values())
    assert not list(checkpoint.rglob("model.safetensors"))
    base_model, model = load_model(run, extensions=adapted["extensions"]), pixart.load_model(result.run, ema=False)
    assert all(torch.equal(a, b) for a, b in zip(base_model.parameters(), model.parameters(), strict=True))
    inputs = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([9.0, 500.0]), "caption": torch.randn(2, 5, 16)}
    with torch.no_grad():
        plain, found = base_model(**inputs), model(**inputs)
        for block, i in zip(base_model.blocks, range(3), strict=True):  # merged by hand
            up, down = held[f"layers.{i}.up.weight"], held[f"layers.{i}.down.weight"]
            block.attn.qkv.weight = torch.nn.Parameter(block.attn.qkv.weight + up @ down)
        merged = base_model(**inputs)
    assert relative(found, merged) <= 1e-5
    assert relative(found, plain) > 1e-4
    assert pixart.Pipeline.from_pretrained(result.run)("a square")[0].size == (8, 8)
    again = tmp_path / "again"
    shutil.copytree(result.run, again)
    shutil.rmtree(checkpoints(again)[-1])
    train(build(adapted, output=str(again)))
    first, second = (tensors(newest_checkpoint(place, print)) for place in (result.run, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_new_adapter_changes_nothing_and_options_and_bases_are_checked(adapted, run, tmp_path):
    model = load_model(run, extensions=adapted["extensions"])
    inputs = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([9.0, 500.0]), "caption": torch.randn(2, 5, 16)}
    before = model(**inputs)
    adapt(model, AdapterConfig("my_low_rank"))
    assert torch.equal(model(**inputs), before)
    fresh = change(adapted, output=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"adapter 'my_low_rank' refuses its options .*rang"):
        train(build(fresh, adapter={"kind": "my_low_rank", "options": {"rang": 3}}))
    with pytest.raises(
        InputError, match="adapter: it is trained on top of an existing network; name that network as init_from"
    ):
        build(fresh, init_from=None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_killed_and_not_end_alike_and_as_one(base, store, run, tmp_path, kind):
    steps = {"train__steps": 12, "train__save_every": 2, "train__sample_every": 0, "train__deterministic": True}
    config = write(tmp_path / "config.yaml", change(base, **steps))
    verdict = chaos(config, tmp_path / "chaos", processes=2, faults=["kill"], overrides=[f"train.parallel={kind}"])
    assert verdict.good, verdict
    one = train(build(base, **steps, output=str(tmp_path / "one"))).run
    two = tmp_path / "chaos" / "whole"
    keys = ("loss", "mse", "alignment", "consistency", "grad_norm", "mae_0.5", "likeness", "likeness_red")
    for mine, theirs in zip(*(list(read_rows(place / "metrics.jsonl")) for place in (one, two)), strict=True):
        for key in keys:
            if key in mine:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (key, mine["step"])
    assert json.loads((two / "summary.json").read_text())["finished"]
