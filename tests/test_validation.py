"""Validation: an error by which differently trained runs can be compared."""

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml

import pixart.train.loop as loop_module
import pixart.train.validate as validate_module
from features import make_store
from pixart.data.samples import Drawing, collate
from pixart.data.training_set import choose_held_out
from pixart.diffusion import DiffusionConfig, make_schedule
from pixart.diffusion.denoising_error import RATIOS, denoising_errors, mean_error
from pixart.diffusion.losses import prediction_target
from pixart.diffusion.objective import OBJECTIVES, Denoising
from pixart.errors import InputError
from pixart.files import read_rows
from pixart.seeds import derive_seed
from pixart.train.loop import train
from pixart.train.metrics import merge_declarations, read_metrics
from pixart.train.setup import start
from pixart.train.validate import draw_samples, validate
from runs import build, make_pictures, settings

PAIRS = [("linear", "epsilon"), ("linear", "v"), ("cosine", "x0"), ("cosine", "epsilon"), ("flow", "velocity")]


@pytest.fixture
def base(tmp_path, text_encoder) -> dict:
    return settings(tmp_path / "run", make_pictures(tmp_path / "pictures"), text_encoder)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_the_share_that_is_held_out_is_the_one_that_was_asked_for(base, share):
    hashes, count = np.array([derive_seed(f"{i}.png") for i in range(50_000)]), 50_000
    (held,) = choose_held_out([hashes], build(base, data__validation=share).data_spec)
    assert abs(held.mean() - share) <= 5 * (share * (1 - share) / count) ** 0.5


def test_what_is_held_out_stays_so_when_images_come_or_more_is_held_out_and_differs_by_split_seed(base):
    hashes = np.array([derive_seed(f"{i}.png") for i in range(10_000)])

    def choose(hashes, share, **changes) -> np.ndarray:
        (held,) = choose_held_out([hashes], build(base, data__validation=share, **changes).data_spec)
        return held

    held = choose(hashes, 0.3)
    assert (choose(hashes[::-1][:4000], 0.3) == held[::-1][:4000]).all()
    assert not (held & ~choose(hashes, 0.4)).any()
    other = choose(hashes, 0.3, data__split_seed=1)
    assert abs((held & other).mean() - 0.09) < 5 * (0.09 * 0.91 / 10_000) ** 0.5, "independent of the other seed's"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_time_of_returns_the_time_of_a_noise_to_signal_ratio(schedule):
    schedule = make_schedule(DiffusionConfig(schedule, "x0"))
    for ratio in (*RATIOS, 0.1, 60.0):
        alpha, sigma = schedule.alpha_sigma(schedule.time_of(ratio))
        assert sigma / alpha == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_the_best_linear_denoiser_of_white_noise_has_error_1_for_every_prediction(name, prediction):
    config = DiffusionConfig(name, prediction)
    schedule = make_schedule(config)

    def network(x, t):  # for x0 of variance 1: E[x0 | x] = α x / (α² + σ²), E[ε | x] = σ x / (α² + σ²)
        alpha, sigma = schedule.alpha_sigma(t[0].item())
        scaled = x / (alpha**2 + sigma**2)
        return prediction_target(prediction, alpha * scaled, sigma * scaled, alpha, sigma)

    x0, noise = torch.randn(2, 64, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    errors = denoising_errors(network, schedule, config, x0, noise)
    assert errors.shape == (len(RATIOS), 64)
    assert torch.allclose(errors.mean(1), torch.ones(len(RATIOS)), atol=0.02)


def test_the_one_number_is_the_geometric_mean_which_no_ratio_dominates():
    assert mean_error([1.0, 4.0]) == pytest.approx(2)
    assert mean_error([0.01, 1.0, 1.0, 1.0]) / mean_error([1.0, 1.0, 1.0, 100.0]) == pytest.approx(0.1)
    assert mean_error([0.0, 1.0]) == 0
    assert math.isnan(mean_error([math.nan, 1.0, 0.0]))
    assert mean_error([math.inf, 1.0]) == math.inf


def test_a_mean_of_an_earlier_version_is_read_as_the_geometric_one(tmp_path):
    errors = {"validation_error_0.25": 8.0, "validation_error_1": 2.0}
    rows = [
        {"step": 1, "validation_error": 5.0, **errors},
        {"step": 2, "validation_error": 4.0, **errors},
        {"step": 3, "validation_error": None, **errors, "validation_error_1": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["validation_error"] for row in read_metrics(tmp_path)] == [pytest.approx(4), pytest.approx(4), None]
    assert read_metrics(tmp_path / "none") == []


def test_a_term_of_an_objective_never_takes_the_name_of_another_number(base, tmp_path):
    class Named(Denoising):
        def forward(self, network, example):
            return {**super().forward(network, example), self.named: example.time}

    OBJECTIVES.register("named")(Named)
    changes = {"objective__name": "named", "data__validation": 0.3, "train__validate_every": 3}
    Named.named = "error"
    with pytest.raises(InputError, match=r"'loss' and 'denoising_error' both report 'validation_error'.*_TERM"):
        train(build(base, **changes))
    Named.named = "error_of_hands"
    run = train(build(base, **changes, output=str(tmp_path / "other"))).run
    rows = [row for row in read_metrics(run) if "validation_error_of_hands" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["validation_error"] == mean_error(row[f"validation_error_{ratio:g}"] for ratio in RATIOS)
    shown = [score.key for declaration in merge_declarations([run]).values() for score in declaration.scores]
    assert shown == ["validation_loss", "validation_error", *(f"validation_error_{ratio:g}" for ratio in RATIOS)]


def test_runs_with_any_prediction_are_validated_in_the_same_way(base):
    # a new network says 0: the same clean picture, if it is asked for that, whatever noise it was to be drawn from
    found = {}
    for i, diffusion in enumerate(
        [
            {"schedule": "flow", "prediction": "x0"},
            {"schedule": "flow", "prediction": "x0", "times": "logit_normal"},
            {"schedule": "cosine", "prediction": "x0", "weighting": "min_snr"},
        ]
    ):
        config = build(base, output=f"{base['output']}{i}", diffusion=diffusion, data__validation=0.4)
        session = start(config)
        found[i] = validate(session, config)
        held_out = session.data.held_out
        batch = collate([held_out.dataset[-1, j] for j in range(len(held_out))], length=config.text.length)
        for ratio in RATIOS:
            expected = (1 + ratio**-2) * batch.pixels.square().mean().item()
            assert found[i][f"validation_error_{ratio:g}"] == pytest.approx(expected, rel=1e-5)
        product = math.prod(found[i][f"validation_error_{ratio:g}"] for ratio in RATIOS)
        assert found[i]["validation_error"] == pytest.approx(product ** (1 / len(RATIOS)), rel=1e-6)
    assert found[0]["validation_error"] == pytest.approx(found[1]["validation_error"], rel=1e-6)
    assert found[0]["validation_error"] == pytest.approx(found[2]["validation_error"], rel=1e-6)
    assert found[0]["validation_loss"] != found[2]["validation_loss"]


def test_a_network_that_says_zero_for_the_velocity_is_validated_by_hand(base):
    config = build(base, diffusion={"schedule": "flow", "prediction": "velocity"}, data__validation=0.4)
    session = start(config)
    found, held_out = validate(session, config), session.data.held_out
    batch = collate([held_out.dataset[-1, j] for j in range(len(held_out))], length=config.text.length)
    for ratio in RATIOS:  # the clean picture is then taken to be x itself
        sigma = ratio / (1 + ratio)
        error = (sigma * (batch.noise - batch.pixels)).square().mean().item()
        assert found[f"validation_error_{ratio:g}"] == pytest.approx((1 + ratio**-2) * error, rel=1e-5)


def held_out(session) -> dict:
    """Everything that validation takes of the held-out images."""
    part = session.data.held_out
    samples = [part.dataset[-1, i] for i in range(len(part))]
    return {sample["id"]: (sample["time"], sample["noise"].tolist()) for sample in samples}


def test_runs_of_any_seed_are_validated_on_the_same_images_under_the_same_noise(base):
    first, second = (
        start(build(base, output=f"{base['output']}{seed}", seed=seed, data__validation=0.4)) for seed in (1, 2)
    )
    assert held_out(first) == held_out(second)
    assert first.data.fingerprint == second.data.fingerprint
    assert first.data.train.dataset[0, 0]["time"] != second.data.train.dataset[0, 0]["time"]
    other = start(build(base, output=f"{base['output']}3", data__validation=0.4, data__split_seed=1))
    assert held_out(other) != held_out(first)


def test_a_run_begun_before_the_split_had_a_seed_keeps_the_split_of_its_seed(base, capsys):
    changes = {"seed": 3, "data__validation": 0.4}
    expected = held_out(start(build(base, output=f"{base['output']}3", **changes, data__split_seed=3)))
    assert expected != held_out(start(build(base, output=f"{base['output']}0", **changes)))
    run = train(build(base, **changes, data__split_seed=3)).run
    stored = yaml.safe_load((run / "config.yaml").read_text())
    del stored["data"]["split_seed"]  # as an earlier version wrote it
    (run / "config.yaml").write_text(yaml.safe_dump(stored))

    more = {**changes, "train__steps": 8}
    capsys.readouterr()
    again = start(build(base, **more))
    assert held_out(again) == expected
    said = capsys.readouterr().out
    assert said.count("data.split_seed 3") == 1
    assert "warning" not in said
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["split_seed"] == 3
    assert held_out(start(build(base, **more))) == expected  # now by its own configuration
    with pytest.raises(InputError, match=r"another configuration .*data.split_seed: 3 → 0"):
        start(build(base, **more, data__split_seed=0))


def test_a_share_that_would_hold_out_nothing_holds_out_one_image(base, tmp_path):
    session = start(build(base, data__validation=1e-9))
    assert (len(session.data.held_out), len(session.data.train)) == (1, 7)
    store = tmp_path / "store"
    make_store(base, store)
    stored = start(build(base, output=f"{base['output']}2", data__features=str(store), data__validation=1e-9))
    assert held_out(stored).keys() == held_out(session).keys()
    with pytest.raises(InputError, match=r"data.validation: got 1.5, expected a number from 0 to below 1"):
        build(base, data__validation=1.5)


@pytest.mark.parametrize("kind", ["images", "features"])
def test_a_folder_of_its_own_is_validated_on_and_all_others_are_trained_on(base, tmp_path, kind):
    mine = make_pictures(tmp_path / "held", count=3)
    changes = {"data__validation_folder": str(mine)}
    if kind == "features":
        for name, folder in (("store", base["data"]["folder"]), ("held_store", str(mine))):
            make_store(base, tmp_path / name, data__folder=folder)
        changes |= {
            "data__features": str(tmp_path / "store"),
            "data__validation_features": str(tmp_path / "held_store"),
        }
    session = start(build(base, **changes))
    assert (len(session.data.held_out), len(session.data.train)) == (3, 8)
    config = session.config
    row = validate(session, config)
    assert math.isfinite(row["validation_loss"]) and math.isfinite(row["validation_error"])


def test_a_change_of_the_held_out_images_is_reported(base, tmp_path, capsys):
    mine = make_pictures(tmp_path / "held", count=3)
    changes = {"data__validation_folder": str(mine), "train__validate_every": 3}
    train(build(base, **changes))
    (mine / "02.png").unlink()
    train(build(base, **changes, train__steps=8))
    assert "warning: the held-out images are not those of the steps so far" in capsys.readouterr().out


def test_settings_of_held_out_images_that_contradict_each_other_are_refused(base, tmp_path):
    mine = str(make_pictures(tmp_path / "held", count=3))
    with pytest.raises(InputError, match=r"data.validation holds out a share .* leave one of the two out"):
        build(base, data__validation=0.1, data__validation_folder=mine)
    with pytest.raises(InputError, match=r"data.validation_features .* only with data.features"):
        build(base, data__validation_features="store")
    with pytest.raises(InputError, match=r"data.validation_folder: .*these are the images to train on"):
        start(build(base, data__validation_folder=base["data"]["folder"]))
    with pytest.raises(InputError, match=r"data.validation_folder: .*nowhere: no such folder"):
        start(build(base, data__validation_folder=str(tmp_path / "nowhere")))
    make_store(base, tmp_path / "store")
    with pytest.raises(InputError, match=r"data.validation_folder: .* data.validation_features"):
        start(build(base, data__features=str(tmp_path / "store"), data__validation_folder=mine))


def test_a_non_finite_number_is_null_in_every_file_and_is_reported(base, monkeypatch, capsys):
    def start_and_lose_images(config, **options):
        session = start(config, **options)
        for record in session.data.held_out.dataset.records:
            record.picture.unlink()  # none of them can be read any more
        return session

    monkeypatch.setattr(loop_module, "start", start_and_lose_images)
    run = train(build(base, data__validation=0.3, train__validate_every=3)).run
    texts = {path.name: path.read_text() for path in (*run.glob("*.json"), *run.glob("*.jsonl"))}
    assert {"metrics.jsonl", "summary.json", "heartbeat.json", "history.jsonl"} <= texts.keys()

    def refuse(name):
        raise AssertionError(name)

    for text in texts.values():
        for part in [text] if text.startswith("{\n") else text.splitlines():
            json.loads(part, parse_constant=refuse)
    assert [row["validation_loss"] for row in read_rows(run / "metrics.jsonl") if "validation_loss" in row] == [
        None
    ] * 2
    summary = json.loads(texts["summary.json"])
    assert summary["validation_error"] is summary["best_validation_error"] is None
    said = "".join(capsys.readouterr())
    assert re.search(r"step 3: validation_loss nan, .*validation_error nan.*; null in metrics.jsonl", said)


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_validation_is_the_loss_of_the_averaged_weights_on_all_captions_under_noise_that_stays(base):
    config = build(base, data__validation=0.4, train__caption_dropout=0.9, data__split_seed=3)
    session = start(config)
    state, dataset = session.state, session.data.held_out.dataset
    randomise(state.parts.average, 1)
    randomise(state.parts.network, 2)
    losses = []
    for i, record in enumerate(dataset.records):
        pixels, draws = dataset[0, i]["pixels"], Drawing(3)(-1, record.id, (3, 8, 8))
        time, noise = draws.uniform("time"), draws.normal("noise", 3, 8, 8)
        x = (1 - time) * pixels + time * noise
        states = session.data.captions[record.captions[0]]
        with torch.no_grad():
            found = state.parts.average(x[None], 1000 * time[None], states[None])
        losses.append((found - pixels).square().mean().item())
    assert len(set(losses)) == len(losses) > 1
    for step in (0, 7):
        state.progress.step = step
        assert validate(session, config)["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_sample_grid_is_of_the_averaged_weights_with_a_seed_for_each_prompt(base, monkeypatch):
    config = build(base, prompts=["a fox", "two", "a fox"], sample__steps=5)
    session, asked = start(config), []

    def spy(model, card, captions, null, seeds, sample, **size):
        asked.append((model, card, list(seeds), sample, size))
        for caption, prompt in zip(captions, config.prompts, strict=True):
            assert torch.equal(caption, session.data.captions[prompt])
        return torch.zeros(3, 3, 8, 8)

    monkeypatch.setattr(validate_module, "sample_latents", spy)
    draw_samples(session, config)
    assert asked == [(session.state.parts.average, config.card, [0, 1, 2], config.sample, {"height": 8, "width": 8})]
