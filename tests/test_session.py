"""A run before its first step: how settings determine samples, their order and the null caption."""

import pytest
import torch
from PIL import Image

from pixart.encoders.text import TextEncoder
from pixart.train.setup import start
from runs import build, change, make_pictures, settings


@pytest.fixture
def base(tmp_path, text_encoder) -> dict:
    return settings(tmp_path / "run", make_pictures(tmp_path / "images"), text_encoder)


def test_settings_of_data_and_seed_reach_the_samples_and_their_order(base, tmp_path):
    folder = make_pictures(tmp_path / "uneven")
    for path in folder.glob("*.png"):
        Image.linear_gradient("L").rotate(90).resize((8, 8)).save(path)
    base = change(base, data__folder=str(folder), data__every=3)
    plain = start(build(base, train__batch_size=1))
    changed = start(
        build(base, train__batch_size=1, output=f"{base['output']}2", seed=1, data__flip=True, data__posterior="mean")
    )
    for session in (plain, changed):
        assert [record.id for record in session.data.train.dataset.records] == ["00.png", "03.png", "06.png"]
    samples = [[session.data.train.dataset[epoch, 0] for epoch in range(20)] for session in (plain, changed)]
    still, moved = ({sample["pixels"].numpy().tobytes() for sample in part} for part in samples)
    mirrored = samples[0][0]["pixels"].flip(-1).contiguous().numpy().tobytes()
    assert (still < moved, moved - still) == (True, {mirrored})
    assert [part[0]["posterior_noise"].any().item() for part in samples] == [True, False]
    orders = [[session.loader.batch_sampler.epoch(epoch) for epoch in range(4)] for session in (plain, changed)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("null", ["buffer", "empty", "empty_own_mask"])
def test_the_encoded_empty_text_is_the_null_caption_that_a_run_trains_with(base, null):
    session = start(build(base, text__null=null))
    encoder = TextEncoder.load(build(base).text)
    states, mask = encoder.encode([""], padding="max_length", keep_padding=True)
    length = {"buffer": 0, "empty": 12, "empty_own_mask": int(mask.sum())}[null]
    for model in (session.state.parts.network, session.state.parts.average):
        own = model.y_embedder.y_embedding
        assert torch.allclose(own[:length], states[0, :length], atol=1e-5)
        assert not torch.isclose(own[length:], states[0, length:], atol=1e-2).all(1).any()
