"""One command: help without torch, shipped configurations by name, messages that work where they are read, a wheel."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

import pixart
from pixart import cli, commands, shipped
from pixart.config import load_config
from pixart.errors import InputError
from pixart.invocation import command
from pixart.train.config import TrainConfig
from runs import ROOT, environment, make_pictures, make_text_encoder, settings, write

MODULES = {path.stem for path in (ROOT / "pixart" / "commands").glob("*.py")} - {"__init__"}


def run_python(code: str, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, done.stderr
    return done


# --------------------------------------------------------------------------------------------------------------- help


def test_every_file_is_a_command_and_has_a_script_of_three_lines():
    assert set(commands.COMMANDS) == MODULES
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} == MODULES
    for name in MODULES:
        lines = [line for line in (ROOT / "scripts" / f"{name}.py").read_text().splitlines() if line]
        assert lines == ["from pixart.commands import run", 'if __name__ == "__main__":', f'    run("{name}")']


def test_help_of_every_command_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from pixart.commands import COMMANDS, make_parser, overview\n"
        "overview()\n"
        "for name in COMMANDS: make_parser(name).format_help()\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))\n"
    )
    assert set(run_python(code).stdout.split()) - {"__main__", "sitecustomize"} <= {"pixart"} | site_packages_of_start()


def site_packages_of_start() -> set[str]:
    """What an interpreter has imported before it runs anything, as an editable install's finder."""
    code = "import sys; print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    return set(run_python(code).stdout.split())


def test_the_overview_has_a_line_for_every_command(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        with pytest.raises(SystemExit) as ended:
            commands.main(words)
        assert ended.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        listed = [line.split()[0] for line in lines if line.startswith("  ")]
        assert listed == list(commands.COMMANDS)
        assert all(len(line) <= 120 for line in lines)


def test_an_unknown_command_is_one_line_with_the_nearest_name(capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["trian", "x.yaml"])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: there is no command 'trian'; did you mean 'train'?") and error.count("\n") == 1


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_opens_with_a_sentence_and_its_examples_are_accepted(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pixart"])
    parser = commands.make_parser(name)
    assert parser.prog == f"pixart {name}"
    first, blank = commands.load(name).__doc__.splitlines()[:2]
    assert first.endswith(".") and not blank
    examples = parser.description.partition("examples:\n")[2].splitlines()
    assert examples, "no example"
    for line in examples:
        _, found, words = line.partition(f" pixart {name}")
        assert found, line
        parser.parse_intermixed_args(shlex.split(words))


def test_examples_are_shown_as_they_are_typed_here(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "scripts/train.py"])
    assert "\n    python3 scripts/train.py openmoji\n" in commands.make_parser("train").description


def test_choices_and_defaults_in_help_are_those_of_the_code():
    from pixart.adapters.lora_files import FORMATS as LORA_FORMATS
    from pixart.benchmark.cases import CASES
    from pixart.benchmark.measure import Settings
    from pixart.checkpoint.save import FORMATS
    from pixart.data.captioner import CaptionConfig
    from pixart.data.sources import SOURCES
    from pixart.evaluate.metrics import METRICS
    from pixart.evaluate.protocols import PROTOCOLS
    from pixart.evaluate.reference import Fit
    from pixart.evaluate.resize import FILTERS
    from pixart.evaluate.score import Options
    from pixart.inference.pipeline import Pipeline
    from pixart.study.plots import AXES

    def own(registry):  # other tests register ideas of theirs
        return [name for name in registry if registry._origins[name].startswith("pixart.")]

    choices = {
        (name, action.dest): tuple(action.choices)
        for name in commands.COMMANDS
        for action in commands.make_parser(name)._actions
        if action.choices
    }
    assert choices["caption", "format"] == ("auto", *own(SOURCES))
    assert choices["convert", "to"] == (*FORMATS, *LORA_FORMATS)
    assert choices["compare", "x"] == tuple(AXES)
    assert choices["evaluate", "filter"] == tuple(FILTERS)
    assert choices["evaluate", "reference_fit"] == get_args(Fit)
    drawing, loading = get_type_hints(Pipeline.__call__), get_type_hints(Pipeline.from_pretrained)
    assert choices["sample", "sizes"] == get_args(drawing["sizes"])
    assert choices["sample", "null"] == get_args(get_args(drawing["null"])[0])
    assert choices["sample", "quantize_text"] == get_args(get_args(loading["quantize_text"])[0])
    text = {name: " ".join(commands.make_parser(name).format_help().split()) for name in commands.COMMANDS}
    assert f"Cases: {', '.join(CASES)}." in text["benchmark"]
    assert all(name in text["evaluate"] for name in [*own(METRICS), *PROTOCOLS] if name != "loss")
    default = Settings()
    for name in ("preset", "tokens", "dtype", "device", "rounds", "config"):
        assert f"(default: {getattr(default, name)})" in text["benchmark"], name
    assert f"(default: {default.text_width}; XXL" in text["benchmark"]
    assert f"(default: {default.text_layers}; XXL" in text["benchmark"]
    assert f"(default: {CaptionConfig.field})" in text["caption"]
    assert f"(default: {CaptionConfig.max_new_tokens})" in text["caption"]
    parsed = vars(commands.make_parser("evaluate").parse_args(["MODEL"]))
    same = set(parsed) & set(Options.__dataclass_fields__) - {"model", "device", "metrics", "extension"}
    assert len(same) > 15
    assert {name: parsed[name] for name in same} == {name: getattr(Options, name) for name in same}


def test_settings_may_be_given_in_several_places():
    parsed = commands.make_parser("sample").parse_intermixed_args(
        ["a cat", "--set", "steps=5", "--model", "m", "a dog", "--set", "guidance=2", "sampler=ddim"]
    )
    assert parsed.prompts == ["a cat", "a dog"]
    assert parsed.set == ["steps=5", "guidance=2", "sampler=ddim"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_their_choices(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["completion", "bash"])
    assert not ended.value.code
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def complete(*words: str) -> set[str]:
        code = f'. "{tmp_path}/script"; COMP_WORDS=(pixart "$@"); COMP_CWORD=$#; _pixart; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", code, "bash", *words], capture_output=True, text=True)
        assert not done.stderr
        return set(done.stdout.split())

    assert complete("") == {*commands.COMMANDS, "--help", "--version"}
    assert complete("be") == {"benchmark", "benchmark_data"}
    assert complete("sample", "--stre") == {"--strength", "--strengths"}
    assert complete("app", "runs/a", "--port", "1", "--max-") == {"--max-pixels", "--max-images"}
    assert complete("sample", "--dtype", "b") == {"bfloat16"}
    assert complete("sample", "runs") == set()  # a file, which bash itself completes


def test_memory_is_kept_by_the_commands_that_compute_and_by_no_others():
    keeping = {name for name in MODULES if getattr(commands.load(name), "KEEPS_MEMORY", False)}
    assert keeping == {"train", "sample", "app", "evaluate", "extract", "caption", "benchmark_data"}


# --------------------------------------------------------------------------------------------- commands in messages


@pytest.mark.parametrize(
    ("typed", "module", "expected"),
    [
        (["pixart", "train"], None, "pixart sample"),
        ([".venv/bin/pixart", "train"], None, ".venv/bin/pixart sample"),
        (["python3", "-m", "pixart", "train"], "pixart.__main__", "python3 -m pixart sample"),
        ([".venv/bin/python", "-m", "pixart"], "pixart.__main__", ".venv/bin/python -m pixart sample"),
        (["python", "scripts/train.py"], None, "python scripts/sample.py"),
        (["python", "../clone/scripts/train.py"], None, "python ../clone/scripts/sample.py"),
        (["python", "my_program.py"], None, "pixart sample"),
        (["python", "-m", "pytest"], "pytest.__main__", "pixart sample"),
    ],
)
def test_a_command_in_a_message_is_typed_as_this_process_was(monkeypatch, typed, module, expected):
    started = typed if typed[0].endswith("pixart") else typed[1:]
    if module is not None:
        started = [f"/somewhere/{module.replace('.', '/')}.py", *started[2:]]
    monkeypatch.setattr(sys, "argv", started)
    monkeypatch.setattr(sys, "orig_argv", typed)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module and type("Spec", (), {"name": module}))
    assert command("sample") == expected


def test_a_program_on_the_path_goes_by_its_name(monkeypatch, tmp_path):
    for folder in ("here", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pixart").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "here"))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    for folder, expected in (("here", "pixart"), ("elsewhere", f"{tmp_path}/elsewhere/pixart")):
        monkeypatch.setattr(sys, "argv", [f"{tmp_path}/{folder}/pixart", "train"])
        assert command("sample") == f"{expected} sample"


def test_the_three_ways_to_start_a_command_are_one(tmp_path):
    for start in (
        ["-m", "pixart", "configs"],
        [str(ROOT / "scripts" / "configs.py")],
        ["-c", "from pixart.commands import main; main()", "configs"],
    ):
        done = subprocess.run(
            [sys.executable, *start, "openmoji"], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert done.stdout == (ROOT / "configs" / "openmoji.yaml").read_text(), done.stderr


def test_no_message_names_what_an_installed_package_lacks():
    """No text in the package names a file of the repository's other folders; `command` does, where there is one."""
    for path in sorted({*(ROOT / "pixart").rglob("*.py")} - {ROOT / "pixart" / "invocation.py"}):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"\b(scripts|configs|tests)/", node.value), f"{path}:{node.lineno}: {node.value!r}"


# ------------------------------------------------------------------------------------------------ shipped configs


def test_a_configuration_is_found_by_path_by_name_and_as_a_base(tmp_path, monkeypatch):
    expected = load_config(TrainConfig, ROOT / "configs" / "openmoji.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config(TrainConfig, "pixart:openmoji") == load_config(TrainConfig, "openmoji") == expected
    Path("mine.yaml").write_text("base: pixart:openmoji\nseed: 5\n")
    assert load_config(TrainConfig, "mine.yaml").seed == 5
    stage = load_config(TrainConfig, "pixart:paper/2_sam")
    assert stage.output == "runs/paper/2_sam"
    Path("openmoji").write_text("base: pixart:openmoji\nseed: 6\n")
    assert load_config(TrainConfig, "openmoji").seed == 6  # a file comes before a name
    assert load_config(TrainConfig, "pixart:openmoji") == expected


def test_a_name_that_is_no_configuration_is_refused_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("opnemoji", "pixart:opnemoji"):
        with pytest.raises(InputError, match=r"config opnemoji: there is no such file.*did you mean 'openmoji'\?"):
            load_config(TrainConfig, name)
    Path("mine.yaml").write_text("seed: 5\nbase: pixart:opnemoji\n")
    with pytest.raises(InputError, match=r"mine\.yaml:2: base: config opnemoji.*did you mean 'openmoji'\?"):
        load_config(TrainConfig, "mine.yaml")
    with pytest.raises(InputError, match=r"config openmoji\.yaml: cannot be read"):
        load_config(TrainConfig, "openmoji.yaml")  # a path


def test_configs_lists_every_shipped_file_with_its_first_comment(capsys):
    commands.load("configs").main(commands.make_parser("configs").parse_args([]))
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    files = {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"{name}.yaml" for name in lines} == files
    for name, path in shipped.shipped_configs().items():
        assert path.read_text().startswith(f"# {lines[name]}\n")


# --------------------------------------------------------------------------------------------------------- the wheel


def test_every_room_is_listed_in_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml; Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("pixart/**/__init__.py")}
    assert listed == sorted(listed) and set(listed) == rooms | {"pixart.configs"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools writes beside what it builds."""
    pytest.importorskip("setuptools", "77", reason="builds the wheel; extra: test")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pixart", "configs"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    run_pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "tree")
    (path,) = folder.glob("*.whl")
    return path


def run_pip(*arguments) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "-q", "--no-cache-dir", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_configuration_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pixart").rglob("*.py")}
    configs = {f"pixart/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert held == modules | configs | {"pixart/py.typed"}
    assert wheel.name.startswith(f"pixart-{pixart.__version__}-")


@pytest.mark.slow
def test_an_installed_wheel_trains_by_name_samples_compares_and_converts_without_a_checkout(wheel, tmp_path):
    pytest.importorskip("matplotlib", reason="draws the curves; extra: plot")
    home = tmp_path / "empty"
    home.mkdir()
    run_pip("install", "--no-deps", "--target", tmp_path / "installed", wheel)
    changes = {
        "base": "pixart:openmoji",
        "output": "run",
        "data": {"folder": str(make_pictures(tmp_path / "data", side=32)), "prepare": None, "resolution": 32},
        "text": {"model": str(make_text_encoder(tmp_path / "text"))},
        "model": {"hidden_size": 48, "depth": 1, "num_heads": 4, "caption_channels": 16, "latent_size": 32},
        "train": {"steps": 2, "batch_size": 4, "sample_every": 0, "evaluate_every": 0, "log_every": 1, "trackers": []},
        "sample": {"steps": 2},
        "evaluate": {"retrieval": False},
    }
    (home / "mine.yaml").write_text(yaml.safe_dump(changes))
    program = str(tmp_path / "installed" / "bin" / "pixart")

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, program, *words],
            cwd=home,
            capture_output=True,
            text=True,
            timeout=240,
            env=environment() | {"PYTHONPATH": str(tmp_path / "installed")},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert f"{tmp_path}/installed" in subprocess.run(
        [sys.executable, "-c", "import pixart; print(pixart.__file__)"], cwd=home, capture_output=True, text=True,
        env=environment() | {"PYTHONPATH": str(tmp_path / "installed")},
    ).stdout  # fmt: skip
    assert "openmoji " in run("configs")
    trained = run("train", "mine.yaml")
    (advice,) = re.findall(r"sample more: (.+)", trained)
    words = shlex.split(advice)
    assert words[:2] == [program, "sample"]
    run(*words[1:], "--out", "drawn")
    assert [path.suffix for path in (home / "drawn").iterdir()] == [".png"] * 2
    assert "| run | parameters |" in run("compare", "run")
    assert (home / "compare.png").stat().st_size > 5000
    run("convert", "run", "model", "--to", "ours")
    assert json.loads((home / "model" / "config.json").read_text())


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_of_a_launcher_train_one_run(launcher, tmp_path, text_encoder):
    config = write(tmp_path / "c.yaml", settings(tmp_path / "run", make_pictures(tmp_path / "data"), text_encoder))
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                       "--mixed_precision", "no", "--dynamo_backend", "no"],  # on a CPU, too: it starts the processes
    }[launcher]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *start, "-m", "pixart", "train", str(config)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "history.jsonl").read_text())["processes"] == 2  # one line: one run
    assert "-m pixart sample --model" in done.stdout


def test_an_unknown_metric_is_named_by_the_option_that_it_was_given_to(tmp_path, capsys):
    make_pictures(tmp_path / "images", count=2)
    for words in (["--images", str(tmp_path / "images")], [str(tmp_path), "--reference", "photos"]):  # and no prompts
        with pytest.raises(SystemExit) as ended:
            commands.main(["evaluate", *words, "--metrics", "fidd"])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("error: --metrics: there is no 'fidd'; did you mean 'fid'?")


def test_a_lost_process_says_what_to_do(monkeypatch, capsys):
    from pixart.errors import LostProcess

    def main():
        raise LostProcess("process 1 is gone")

    monkeypatch.setattr(cli.os, "_exit", lambda code: sys.exit(code))
    monkeypatch.delenv("PIXART_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.run(main, keep_memory=False)
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "error: process 1 is gone. The checkpoints are unchanged; the same command resumes the run\n"
    )


@pytest.mark.parametrize("words", ["--help", "configs", "train --help", "describe tests/fixtures/run"])
def test_a_reader_that_has_enough_ends_a_command_without_a_message(words):
    """As `| head -1`, but sure to be gone before the command writes."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "pixart", *words.split()],
        cwd=ROOT,
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # argparse itself ignores that its help is not read
