"""REPA: its loss by hand, patch features of any vision model, computed in training or kept in the feature store."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from pixart.data.arrays import ArrayContext, open_array
from pixart.diffusion.objective import Denoising, Example
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.autoencoder import IdentityAutoencoder
from pixart.encoders.vision import load_patch_features
from pixart.errors import InputError
from pixart.features import Share, extract
from pixart.features.store import FeatureStore
from pixart.files import read_rows
from pixart.model.initialize import initialize
from pixart.train.loop import train
from pixart.train.preflight import check_sources
from pixart.train.repa import Repa
from runs import build, change, make_pictures, settings
from toy import relative, tiny_inputs, tiny_model

CPU = torch.device("cpu")
FLOW = DiffusionConfig("flow", "velocity")


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    """timm's smallest vision transformer with random weights, as NAME=FILE."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vit") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    return f"test_vit={file}"


def example(model, **more) -> Example:
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    inputs = tiny_inputs(model)
    given = {"caption": inputs["caption"], "caption_mask": inputs["caption_mask"]}
    return Example(x0, noise, torch.tensor([0.2, 0.7]), given, model.y_embedder.y_embedding, **more)


def objective(model, **options) -> Repa:
    made = Repa(FLOW, model, **{"block": 0, "size": 6, "width": 8, **options})
    initialize(made.trained, 0)
    return made


def test_the_loss_is_its_formula():
    model = tiny_model(learn_sigma=False)
    features = torch.randn(2, 4, 4, 6)
    given = example(model, targets={"repa": features.to(torch.bfloat16)})
    made = objective(model, weight=0.7)
    terms, usual = made(model, given), Denoising(FLOW, model)(model, given)
    features = features.to(torch.bfloat16).float().view(2, 16, 6)
    t = given.time * 1000
    tau = given.time[:, None, None, None]
    _, hidden = model((1 - tau) * given.x0 + tau * given.noise, t, keep=(0,), **given.inputs)
    first, _, second, _, third = made.trained["projector"]
    for i in range(2):
        similarity = 0.0
        for n in range(16):
            h = nn.functional.silu(second(nn.functional.silu(first(hidden[0][i, n]))))
            y, p = features[i, n], third(h)
            similarity += (y @ p / (y.norm() * p.norm())).item() / 16
        assert terms["alignment"][i].item() == pytest.approx(-similarity, abs=1e-5)
        assert terms["loss"][i].item() == pytest.approx(usual["loss"][i].item() - 0.7 * similarity, rel=1e-5)
    terms["loss"].mean().backward()
    assert all(p.grad.any() for p in made.trained.parameters())


def test_with_weight_0_the_network_learns_as_without_bit_for_bit():
    model = tiny_model(learn_sigma=False)
    given = example(model, targets={"repa": torch.randn(2, 4, 4, 6)})
    gradients = []
    for made in (Denoising(FLOW, model), objective(model, weight=0.0)):
        model.zero_grad()
        made(model, given)["loss"].mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_features_of_another_grid_are_those_of_the_place():
    model = tiny_model(learn_sigma=False)
    fine = torch.randn(2, 8, 8, 6)
    found = objective(model)._find_features(example(model, targets={"repa": fine}))
    assert found.shape == (2, 16, 6)
    flat = objective(model)._find_features(example(model, targets={"repa": torch.ones(2, 3, 5, 6)}))
    assert torch.allclose(flat, torch.ones(2, 16, 6))
    native = objective(model)._find_features(example(model, targets={"repa": fine[:, :4, :4]}))
    assert torch.equal(native, fine[:, :4, :4].reshape(2, 16, 6))


def test_patch_features_of_timm_are_the_models_last_tokens(vit):
    features = load_patch_features(vit, CPU)
    pixels = torch.rand(2, 3, 160, 160) * 2 - 1
    found = features(pixels)
    assert found.shape == (2, 10, 10, 64) and features.size == 64
    network = timm.create_model("test_vit")
    network.load_state_dict(features.model.network.state_dict())
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        tokens = network.eval().forward_features((pixels / 2 + 0.5 - mean) / std)[:, 1:]
    assert relative(found.flatten(1, 2), tokens) <= 1e-5
    small = load_patch_features(f"{vit}@64", CPU)
    assert small(torch.zeros(1, 3, 24, 48)).shape == (1, 4, 4, 64)


def test_patch_features_of_a_convolutional_network_and_of_transformers(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet")
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    conv = load_patch_features(f"test_efficientnet={tmp_path / 'net.safetensors'}", CPU)
    assert conv(torch.zeros(2, 3, 64, 64)).shape == (2, 5, 5, 256)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    theirs = load_patch_features(str(tmp_path / "vit"), CPU)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():  # mean and standard deviation are 0.5: pixels are its input as they are
        tokens = theirs.model.network(pixel_values=pixels).last_hidden_state[:, 1:]
    assert relative(theirs(pixels).flatten(1, 2), tokens) <= 1e-5
    with pytest.raises(InputError, match=r"@48: the model takes no images of that size"):
        load_patch_features(f"{tmp_path / 'vit'}@48", CPU)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "expected one of the options encoder .* and size"),
        ({"size": 4, "encoder": "x"}, "expected one of the options encoder .* and size"),
        ({"size": 4, "block": 2}, "block 2: the model has blocks 0 to 1"),
        ({"encoder": "no_such_model"}, "objective repa: no_such_model: timm has no such model"),
    ],
)
def test_options_without_meaning_are_one_line(options, match):
    with pytest.raises(InputError, match=match):
        Repa(FLOW, tiny_model(learn_sigma=False), **{"block": 0, **options})


def test_features_that_are_not_there_are_one_line(vit):
    model = tiny_model(learn_sigma=False)
    with pytest.raises(InputError, match=r"its option size needs data.targets \{repa: vision:ENCODER\}"):
        objective(model)(model, example(model))
    with pytest.raises(InputError, match="a feature store has no images for the encoder"):
        objective(model, size=None, encoder=f"{vit}@32")(model, example(model))


@pytest.mark.parametrize(
    ("options", "data", "match"),
    [({"size": 8}, {}, "its option size needs data.targets"),
     ({"encoder": "nowhere"}, {"data__features": "store"}, "a feature store has no images")],
)  # fmt: skip
def test_features_that_are_not_there_are_told_before_anything_is_loaded(base, options, data, match):
    wanted = change(base, objective={"name": "repa", "options": {"block": 0, **options}}, **data)
    with pytest.raises(InputError, match=match):
        check_sources(build(wanted))


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_encoder, vit) -> dict:
    folder = tmp_path_factory.mktemp("repa")
    made = settings(folder / "run", make_pictures(folder / "images"), text_encoder)
    made["train"] |= {"steps": 2, "save_every": 0, "validate_every": 2, "metrics": ["loss"]}
    made["data"] |= {"validation": 0.25}
    return made


def test_a_run_with_the_encoder_in_training_and_one_with_its_features_in_the_store_agree(base, vit, tmp_path):
    online = change(base, objective={"name": "repa", "options": {"block": 0, "encoder": f"{vit}@32", "width": 8}})
    stored = change(
        base,
        output=str(tmp_path / "stored"),
        data__features=str(tmp_path / "store"),
        data__targets={"repa": f"vision:{vit}@32"},
        objective={"name": "repa", "options": {"block": 0, "size": 64, "width": 8}},
    )
    config = build(stored)
    extract(
        config.data,
        config.data_spec.table,
        config.vae,
        config.text,
        config.extract,
        share=Share(),
        say=lambda _: None,
    )
    store = FeatureStore(config.data.features)
    maker = open_array(f"vision:{vit}@32", ArrayContext(IdentityAutoencoder(), CPU))
    kept = store.array(f"vision:{vit}@32", 0)
    assert kept.shape == (2, 2, 64)
    assert torch.equal(kept, maker(store.get(0).mean[None], [], False)[0])
    rows = [list(read_rows(train(build(run)).run / "metrics.jsonl")) for run in (online, stored)]
    for first, second in zip(*rows, strict=True):
        for key in {"loss", "alignment", "mse", "validation_alignment"} & first.keys():
            assert first[key] == pytest.approx(second[key], abs=2e-2)
    assert any("alignment" in row for row in rows[0]) and any("validation_alignment" in row for row in rows[0])
