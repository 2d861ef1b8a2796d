"""Imports go only down the layers, and importing has no side effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pixart

ROOT = Path(__file__).parent.parent
FLOORS = {
    room: floor
    for floor, rooms in enumerate([
        "errors seeds provenance invocation unicode console", "arguments files shipped",
        "extensions registry settings ranges prompt device cpu quantize",
        "config cli contact_sheet",
        "model diffusion", "encoders", "checkpoint data", "features adapters", "inference", "evaluate", "train",
        "study", "app", "benchmark", "commands", "__main__",
    ]) for room in rooms.split()
}  # fmt: skip
RUNTIME = {
    "torch", "transformers", "safetensors", "einops", "timm", "accelerate", "yaml", "numpy", "PIL", "tqdm",
    "huggingface_hub",
}  # fmt: skip


def imports_of(path: Path):
    """(module, whether it stands at the top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, node in top


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def test_imports_only_go_down():
    for path in sorted((ROOT / "pixart").rglob("*.py")):
        room = path.relative_to(ROOT / "pixart").with_suffix("").parts[0]
        if room == "__init__":
            continue
        for module, _ in imports_of(path):
            if module == "pixart" or not module.startswith("pixart"):
                continue
            target = room_of(module)
            assert target == room or FLOORS[target] < FLOORS[room], f"{path.name} ({room}) imports {module}"


def test_the_surface_is_used_by_commands_and_by_the_networks_own_two_methods_alone():
    names = set(pixart.__all__)
    for path in sorted((ROOT / "pixart").rglob("*.py")):
        found = [
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module == "pixart"
            for alias in node.names
            if alias.name in names
        ]
        allowed = {"pixart.py": ["load_model", "export_model"]}.get(path.name, [])
        assert path.parent.name == "commands" or found == allowed, path


def test_runtime_packages_alone_are_imported_at_the_top():
    for path in sorted((ROOT / "pixart").rglob("*.py")):
        for module, top in imports_of(path):
            package = module.split(".")[0]
            if top:
                assert package in RUNTIME | {"pixart"} | sys.stdlib_module_names, f"{path} imports {module} at the top"


def test_diffusion_never_imports_a_network():
    for path in (ROOT / "pixart" / "diffusion").glob("*.py"):
        assert not any(module.startswith("pixart.model") for module, _ in imports_of(path)), path


def test_importing_writes_nothing_and_leaves_global_state_alone(tmp_path):
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "pixart").rglob("*.py")
    ]
    code = (
        "import importlib, os, random, signal, torch\n"
        "before = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), random.getstate(),"
        " signal.getsignal(signal.SIGTERM), os.environ.get('OMP_WAIT_POLICY'))\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "after = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), random.getstate(),"
        " signal.getsignal(signal.SIGTERM), os.environ.get('OMP_WAIT_POLICY'))\n"
        "assert before == after\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_every_room_says_what_it_is_for_and_every_module_what_it_does():
    for path in (ROOT / "pixart").glob("*/__init__.py"):
        said = ast.get_docstring(ast.parse(path.read_text()))
        assert said and "may enter it" in " ".join(said.split()), f"{path}: say what the room is for and may not hold"
    for path in (ROOT / "pixart").rglob("*.py"):
        first = path.read_text().partition("\n")[0]
        assert first.startswith('"""') and len(first.split()) > 3, f"{path}: say in the first line what the module does"


def test_code_of_model_folders_is_refused_wherever_transformers_would_ask():
    """transformers asks on the terminal, and runs the code after a "y", unless it is told."""
    found = 0
    for path in (ROOT / "pixart").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.func if isinstance(node, ast.Call) else None
            owner = getattr(call, "value", None)
            name = getattr(owner, "id", getattr(owner, "attr", ""))
            if getattr(call, "attr", "") in ("from_pretrained", "from_config") and name.startswith("Auto"):
                found += 1
                told = {keyword.arg: keyword.value for keyword in node.keywords}
                assert isinstance(told.get("trust_remote_code"), ast.Constant), f"{path}:{node.lineno}"
                assert told["trust_remote_code"].value is False, f"{path}:{node.lineno}"
    assert found >= 8
