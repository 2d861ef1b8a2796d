"""One caption for all images, images that keep the class, and DreamBooth on top of both."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixart.checkpoint.files import checkpoints
from pixart.data.batches import BucketBatches
from pixart.data.config import DataConfig
from pixart.data.sources import make_table, scan
from pixart.errors import InputError
from pixart.inference.pipeline import Pipeline
from pixart.train.config import TrainConfig
from pixart.train.loop import train
from runs import build, change, make_pictures, settings

BOOTH = {"instance_prompt": "a sks square", "class_prompt": "a square", "num_class_images": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_encoder) -> dict:
    """Settings that start from a model, on three images without captions."""
    home = tmp_path_factory.mktemp("dreambooth")
    pictures = make_pictures(home / "pictures")
    start = train(build(settings(home / "start", pictures, text_encoder), train__steps=2)).run
    subject = make_pictures(home / "subject", count=3)
    for path in subject.glob("*.txt"):
        path.unlink()
    found = settings(home / "run", subject, text_encoder)
    return change(found, init_from=str(start), sample={"steps": 2, "guidance": 1.5}, train__batch_size=2)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "model" / "model.safetensors")


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# ----------------------------------------------------------------------------------------------- one caption for all


def test_one_caption_stands_for_those_that_are_there_and_those_that_are_not(tmp_path):
    make_pictures(tmp_path / "x")
    (tmp_path / "x" / "00.txt").unlink()
    (tmp_path / "x" / "01.txt").write_text("")
    (tmp_path / "x" / "02.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "x" / "03.txt").rename(tmp_path / "x" / "03.TXT")
    config = DataConfig(folder=str(tmp_path / "x"), caption="a toy", resolution=8)
    found = scan(config, make_table(config, 1))
    assert [record.captions for record in found.records] == [("a toy",)] * 8 and not found.problems
    assert found.describe().startswith("read as folder; captions: of all images 'a toy'")


def test_a_list_without_a_column_of_captions_may_have_one_caption(tmp_path):
    make_pictures(tmp_path / "x", count=2)
    (tmp_path / "x" / "metadata.jsonl").write_text('{"file_name": "00.png", "author": "me"}\n')
    config = DataConfig(folder=str(tmp_path / "x"), caption="a toy", resolution=8)
    assert [record.captions for record in scan(config, make_table(config, 1)).records] == [("a toy",)]


# ------------------------------------------------------------------------------------------------------- the class


def test_class_images_are_those_of_the_model_before_training_and_are_reused(base, tmp_path):
    run = train(build(base, output=str(tmp_path / "run"), dreambooth=BOOTH)).run
    images = drawn(run / "class_images")
    assert len(images) == 3
    pipeline = Pipeline.from_pretrained(base["init_from"])
    expected = pipeline(["a square"] * 3, [0, 1, 2], steps=2, guidance=1.5)
    for path, image in zip(sorted((run / "class_images").iterdir()), expected, strict=True):
        found = np.asarray(Image.open(path)).astype(int)
        assert abs(found - np.asarray(image)).max() <= 1

    # another run that names the folder draws the one that is missing, and only that
    folder = tmp_path / "mine"
    shutil.copytree(run / "class_images", folder)
    min(folder.iterdir()).unlink()
    other = train(build(base, output=str(tmp_path / "b"), dreambooth=BOOTH, data__regularization=str(folder))).run
    assert drawn(folder) == images and not (other / "class_images").exists()
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(other).items())

    # what drew them is compared: a moved base is the same one, other weights and sizes are not
    moved = tmp_path / "moved"
    shutil.copytree(base["init_from"], moved)
    mine = {"dreambooth": BOOTH, "data__regularization": str(folder)}
    assert train(build(base, output=str(tmp_path / "e"), init_from=str(moved), **mine)).finished
    with pytest.raises(
        InputError, match=r"class-.*png: this class image was drawn by .*start with other settings \(weights"
    ):
        train(build(base, output=str(tmp_path / "f"), init_from=str(run), **mine))
    shutil.rmtree(moved)
    shutil.copytree(run, moved)  # another network where the one was that drew them
    with pytest.raises(InputError, match=r"class-.*png: this class image was drawn by .*with other settings \(weights"):
        train(build(base, output=str(tmp_path / "h"), init_from=str(moved), **mine))
    with pytest.raises(InputError, match=r"other settings \(sample \{.*'steps': 2.*→ \{.*'steps': 3"):
        train(build(base, output=str(tmp_path / "g"), sample={"steps": 3, "guidance": 1.5}, **mine))

    # one's own images count
    make_pictures(tmp_path / "own", count=2)
    train(build(base, output=str(tmp_path / "c"), dreambooth=BOOTH, data__regularization=str(tmp_path / "own")))
    assert len(drawn(tmp_path / "own")) == 3


def test_a_resumed_run_ends_as_one_that_was_not_stopped(base, tmp_path):
    straight = train(build(base, output=str(tmp_path / "a"), dreambooth=BOOTH)).run
    train(build(base, output=str(tmp_path / "b"), dreambooth=BOOTH, train__steps=3))
    resumed = train(build(base, output=str(tmp_path / "b"), dreambooth=BOOTH)).run
    found, expected = weights(resumed), weights(straight)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_resumed_run_does_not_need_the_model_that_it_began_from(base, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(base["init_from"], start)
    settings = {"output": str(tmp_path / "run"), "init_from": str(start), "dreambooth": BOOTH}
    train(build(base, **settings, train__steps=1))
    shutil.rmtree(start)
    assert train(build(base, **settings, train__steps=2)).finished


def test_an_epoch_shows_as_many_class_images_as_images_of_the_subject(base, tmp_path):
    data = train(build(base, output=str(tmp_path / "a"), dreambooth={**BOOTH, "num_class_images": 9})).data
    ids, marks = [record.id for record in data.records], [record.loss_weight for record in data.records]
    assert sum(id.startswith("regularization/class-") for id in ids) == 9 and set(marks) == {1.0}
    batches = BucketBatches(data.train.buckets, 2, seed=0, sets=data.train.sets, rank=0, ranks=1)
    shown = [index for _, batch in zip(range(batches.per_epoch), batches, strict=False) for _, index in batch]
    assert sum(index >= 3 for index in shown) == sum(index < 3 for index in shown) == 9


def test_without_a_class_prompt_nothing_is_drawn(base, tmp_path):
    result = train(build(base, output=str(tmp_path / "a"), dreambooth={"instance_prompt": "a sks square"}))
    assert not (result.run / "class_images").exists() and len(result.data.records) == 3


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dreambooth": {**BOOTH, "class_prompt": "a sks square"}}, "instance_prompt and class_prompt are both 'a sks"),
        ({"dreambooth": {**BOOTH, "num_class_images": 0}}, "dreambooth.num_class_images: got 0, expected at least 1"),
        ({"dreambooth": {"instance_prompt": " "}}, "dreambooth.instance_prompt: got an empty text"),
        ({"dreambooth": BOOTH, "init_from": None}, "name that model as init_from"),
        ({"dreambooth": BOOTH, "data__caption": "x"}, "the caption is dreambooth.instance_prompt"),
        ({"dreambooth": BOOTH, "data__features": "x"}, "dreambooth reads the images of data.folder"),
        ({"data__caption": "x", "data__captions": {"text": 1}}, "data.caption is the caption of all images"),
        ({"data__caption": " "}, "data.caption: got an empty text"),
        ({"data__features": "x", "data__regularization": "y"}, "data.features reads none"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(base, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        build(base, **changes)
    assert "\n" not in str(caught.value)


def test_no_image_and_images_of_another_prompt_are_refused(base, tmp_path):
    (tmp_path / "empty").mkdir()
    config = build(base, output=str(tmp_path / "a"), data__folder=str(tmp_path / "empty"), dreambooth=BOOTH)
    with pytest.raises(InputError, match="no images in it"):
        train(config)
    folder = make_pictures(tmp_path / "class", count=1)
    (folder / "00.png").rename(folder / "class-01234567-00000.png")
    config: TrainConfig = build(base, output=str(tmp_path / "b"), dreambooth=BOOTH, data__regularization=str(folder))
    with pytest.raises(InputError, match=r"was drawn of another prompt than dreambooth.class_prompt 'a square'"):
        train(config)
    with pytest.raises(InputError, match=r"data.regularization: .*no such folder"):
        train(build(base, output=str(tmp_path / "c"), data__caption="x", data__regularization=str(tmp_path / "none")))
