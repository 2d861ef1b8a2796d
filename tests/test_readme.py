"""The READMEs: their length, links, names and commands; every block of Python runs, and every idea trains."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import pixart
from pixart import PixArtConfig, SampleConfig, commands
from pixart.cli import read_settings
from pixart.config import build, load_config
from pixart.evaluate.metrics import METRICS
from pixart.evaluate.protocols import PROTOCOLS
from pixart.shipped import shipped_configs
from pixart.study.plan import plan_study
from pixart.train.config import TrainConfig
from runs import ROOT, environment, make_model, make_pictures, make_text_encoder, settings, write

MAIN = ROOT / "README.md"
PAGES = [MAIN, *sorted((ROOT / "pixart").rglob("README.md")), *sorted((ROOT / "tests").rglob("README.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


# ---------------------------------------------------------------------------------------------------- the page itself


def test_the_main_page_is_short_and_begins_with_an_image_and_two_commands():
    lines = MAIN.read_text().splitlines()
    assert len(lines) <= 200
    (image,) = re.findall(r"^!\[.+\]\((.+)\)$", MAIN.read_text(), re.MULTILINE)
    with Image.open(ROOT / image) as opened:
        opened.verify()
        assert min(opened.size) >= 64
    assert "Licence" in MAIN.read_text() and "CC BY-SA" in MAIN.read_text()
    first = blocks(MAIN, "bash")[0].splitlines()
    assert len(first) == 2 and first[1] == "pixart train openmoji"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_files_and_extras_that_a_page_names_exist(page):
    sections = {field.name: field for field in fields(TrainConfig)}
    for section, name in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", prose(page)):
        if section in sections and name not in ("py", "compile_blocks", "safetensors"):  # files and methods
            assert name in field_names(TrainConfig, section), f"{section}.{name}"
    for name in re.findall(r"`((?:[\w/]+/)?\w+\.py)`", prose(page)):
        assert any(ROOT.glob(f"pixart/**/{name}")) or (ROOT / "tests" / name).exists() or (ROOT / name).exists(), name
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for names in re.findall(r"pip install (?:-\w )*'[\w.]+\[([\w,]+)\]'", page.read_text()):
        assert set(names.split(",")) <= set(extras), names


def field_names(config: type, section: str) -> list[str]:
    (kind,) = (field.type for field in fields(config) if field.name == section)
    kind = kind if isinstance(kind, type) else type(getattr(_example(), section))
    return [field.name for field in fields(kind)]


@cache
def _example() -> TrainConfig:
    given = ["adapter.kind=x", "init_from=x", "dreambooth.instance_prompt=x"]
    return load_config(TrainConfig, "pixart:openmoji", given)


# --------------------------------------------------------------------------------------------------------- commands


def shell_lines(page: Path) -> Iterator[list[str]]:
    """Every single command of a page as words, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                at = words.index("&&")
                yield words[:at]
                words = words[at + 1 :]
            if words:
                yield words


def after_launcher(words: list[str]) -> list[str] | None:
    """The words after `pixart` of a command that starts it, through the launcher's own parser; None of any other."""
    if words[0] == "pixart":
        return words[1:]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
        assert options.module and options.training_script == "pixart", words
        return options.training_script_args
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        options = launch_command_parser().parse_args(words[2:])
        assert options.module and options.training_script == "pixart", words
        return options.training_script_args
    return None


COMMANDS = [(page, words) for page in PAGES for words in shell_lines(page)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p.parent.name}-{' '.join(w)[:50]}" for p, w in COMMANDS])
def test_commands_are_taken_by_the_real_parsers(page, words, shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(shelf)
    rest = after_launcher(words)
    if rest is None:
        check_other(words)
        return
    name, *rest = rest
    arguments = commands.make_parser(name).parse_intermixed_args(rest)
    if name in ("train", "extract"):
        check_overrides(arguments.config, arguments.overrides, tmp_path)
    if name == "sample":
        build(SampleConfig, read_settings(arguments.set))
    if name == "evaluate":
        assert all(metric.partition(":")[0] in METRICS for metric in arguments.metrics)
        assert arguments.protocol is None or arguments.protocol in PROTOCOLS


def check_overrides(config: str, overrides: list[str], folder: Path) -> None:
    """The settings load on top of the file, or of a tiny configuration where the page has a placeholder."""
    if config in ("CONFIG.yaml", "mine.yaml"):
        config = str(write(folder / "config.yaml", settings(folder / "run", folder / "images", folder / "text")))
    assert config in shipped_configs() or Path(config).is_file(), config
    load_config(TrainConfig, config, overrides)


def check_other(words: list[str]) -> None:
    """The few commands that are not pixart's."""
    if words[:2] == ["pip", "install"] or words[0] == ".":
        return  # extras have a test of their own
    if words[0] == "sbatch":
        assert (ROOT / words[1]).is_file()
    elif words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.endswith(".py"))
    elif words[:2] == ["python", "tests/chaos.py"]:
        tree = ast.parse((ROOT / words[1]).read_text())
        known = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert (ROOT / words[2]).is_file() and {word for word in words if word.startswith("--")} <= known
    else:
        assert words[1:3] == ["-m", "venv"], words


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=str)
def test_configs_of_a_page_load(page, tmp_path):
    for i, code in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{i}.yaml"
        given = yaml.safe_load(code)
        path.write_text(code.replace("base: configs/", f"base: {ROOT}/configs/"))
        if "base" not in given:
            path.write_text(f"base: pixart:openmoji\n{code}")
        if "study" in given:
            plan_study(path)
        else:
            load_config(TrainConfig, path)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder with a small stand-in for everything that the main page's commands name."""
    home = tmp_path_factory.mktemp("readme")
    make_model(home, SampleConfig(steps=2)).rename(home / "MODEL")
    make_pictures(home / "my_images")
    base = settings(home / "runs" / "mine", home / "my_images", make_text_encoder(home / "encoder"))
    write(home / "CONFIG.yaml", base, train__steps=2)
    Image.new("RGB", (8, 8), "red").save(home / "photo.jpg")
    for name, code in IDEAS.items():
        (home / name).write_text(code)
    for name in ("configs", "scripts", "tests"):
        (home / name).symlink_to(ROOT / name)
    return home


# what makes the page's commands small; nothing else of them is changed
SMALL = ("train.steps=2", "train.batch_size=8", "model.depth=1", "model.hidden_size=48", "model.num_heads=4")
NOT_RUN = ("_512", "style", "app", "--device", "--prompts", "accelerate", "sbatch", "pip", ".", "pytest", "venv")


@pytest.mark.slow
def test_the_commands_of_the_main_page_run_in_their_order(shelf):
    ran = []
    for words in shell_lines(MAIN):
        if any(part in word for word in words for part in NOT_RUN if part != ".") or words[0] == ".":
            continue
        name, *rest = after_launcher(words)
        if name == "train":
            rest += SMALL if "openmoji" in rest else ("train.steps=2",)
        start = [sys.executable, "-m", "pixart"]
        if words[0] == "torchrun":
            start = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "-m",
                "pixart",
            ]
            rest.append("output=runs/two")
        if name == "compare":
            rest = [word.replace("runs/a", "runs/mine").replace("runs/b", "runs/two") for word in rest]
        done = subprocess.run(
            [*start, name, *rest], cwd=shelf, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        ran.append(name)
    assert ran.count("train") == 4 and {"sample", "describe", "compare"} <= set(ran)
    assert (shelf / "runs" / "geglu" / "extensions" / "geglu.py").is_file() and (shelf / "plot.png").is_file()


# ------------------------------------------------------------------------------------------------------------- Python


def is_file(code: str) -> bool:
    """Whether a block is a file for `extensions`, whose name stands in its first line."""
    return re.match(r"# \w+\.py: ", code) is not None


def file_name(code: str) -> str:
    return code.split()[1].removesuffix(":")


EXAMPLES = [(page, i) for page in PAGES for i, code in enumerate(blocks(page, "python")) if not is_file(code)]
IDEAS = {file_name(code): code for page in PAGES for code in blocks(page, "python") if is_file(code)}


@pytest.fixture
def sources(shelf, tmp_path, monkeypatch) -> None:
    """A tiny stand-in for every source that the examples name, and a folder to run them in; XL/2 with a single block,
    whose shapes are XL/2's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(pixart.PRESETS, "alpha-512", replace(PixArtConfig.from_preset("alpha-512"), depth=1))
    where = importlib.import_module("pixart.checkpoint.locate")
    adapters = importlib.import_module("pixart.adapters.load")
    locate, load = where.locate, adapters.plain.locate
    assert locate is load

    def stand_in(source, **options):
        return locate(shelf / "MODEL" if str(source).startswith("PixArt-alpha/") else source, **options)

    monkeypatch.setattr(adapters.plain, "locate", stand_in)
    down = torch.ones(2, pixart.load_model(shelf / "MODEL").config.hidden_size)
    name = "lora_unet_blocks_0_attn_proj"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": down.T.contiguous()}, "style.safetensors")


@pytest.mark.parametrize(("page", "number"), EXAMPLES, ids=[f"{p.parent.name}-{i}" for p, i in EXAMPLES])
def test_examples_run_and_give_the_shapes_that_they_say(page, number, sources):
    code = blocks(page, "python")[number]
    names: dict = {"__name__": f"example_{number}"}
    exec(compile(code, f"{page}, example {number}", "exec"), names)
    for name, shape in re.findall(r"^(\w+) = .*# (\([\d, ]+\))", code, re.MULTILINE):
        value = names[name]
        assert str(tuple(getattr(value, "shape", value))) == shape


def test_there_are_examples_of_all_that_python_does():
    text = "\n".join(block for page in {page for page, _ in EXAMPLES} for block in blocks(page, "python"))
    names = ("Pipeline.from_pretrained", "PixArt.from_pretrained", "save_pretrained", "train(", "objective=", "on_step")
    for name in (*names, "should_stop", "load_config"):
        assert name in text, name


# trains two steps with each idea and prints its name; in one process for all, and not in this one, because a name is
# registered once per process
TRAIN_IDEAS = """
import json, sys
from pixart.config import load_config
from pixart.train.config import TrainConfig
from pixart.train.loop import train
for name, settings in json.loads(sys.argv[1]).items():
    train(load_config(TrainConfig, "ideas.yaml", [f"extensions=[{name}]", f"output=runs/{name}", *settings]))
    print(name)
"""
SAMPLED, VALIDATED, FROM_TABLE = "midpoint.py", "brightness.py", "table.py"


@pytest.fixture(scope="module")
def trained_ideas(shelf) -> str:
    """What the program above prints."""
    base = settings(shelf / "runs" / "x", shelf / "my_images", shelf / "encoder")
    write(shelf / "ideas.yaml", base, train__steps=2, train__save_every=0)
    images = sorted((shelf / "my_images").glob("*.png"))
    rows = [f"{path.name}\t{path.with_suffix('.txt').read_text()}" for path in images]
    (shelf / "my_images" / "table.tsv").write_text("\n".join(rows))
    more = {
        SAMPLED: ["train.sample_every=2", "prompts=[a red square]", "sample.steps=2"],
        VALIDATED: ["train.validate_every=2", "data.validation=0.25"],
        FROM_TABLE: ["data.folder=my_images/table.tsv"],
    }
    ideas = {}
    for name, code in IDEAS.items():
        line = code.splitlines()[0].partition(": ")[2].replace("MODEL", str(shelf / "MODEL"))
        ideas[name] = [*re.split(r" (?=[\w.]+=)", line), *more.get(name, [])]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_IDEAS, json.dumps(ideas)],
        cwd=shelf,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", IDEAS)
def test_an_idea_of_a_page_trains(name, trained_ideas, shelf):
    assert name in trained_ideas.splitlines()
    run = shelf / "runs" / name
    assert (run / "extensions" / name).read_text() == IDEAS[name]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert any("brightness" in row for row in rows) == (name == VALIDATED)
    assert (run / "samples").exists() == (name == SAMPLED)


def test_every_kind_of_idea_is_among_them():
    assert {SAMPLED, VALIDATED, FROM_TABLE, "geglu.py", "huber.py"} <= set(IDEAS) and len(IDEAS) >= 8
