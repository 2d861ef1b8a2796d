"""The notebook: outputs are stripped, its code is valid, and its half for machines without a GPU runs."""

import ast
import json
from pathlib import Path

import pytest

from runs import ROOT, environment

NOTEBOOK = json.loads((ROOT / "scripts" / "pixart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_has_no_outputs_and_its_python_is_valid():
    for cell in CODE:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        source = "".join(line for line in cell["source"] if not line.startswith(("%", "!")))
        ast.parse(source)
    assert sum("small" in cell["metadata"].get("tags", ()) for cell in CODE) == 7


CHECK = """
assert not pipeline.loras.loaded  # the adapter was taken off again
before = {name: weight.clone() for name, weight in pipeline.model.named_parameters()}
pipeline.load_lora(lora.run)
assert any((weight != before[name]).any() for name, weight in pipeline.model.named_parameters())  # and it acts
"""


@pytest.mark.slow
def test_the_half_of_the_notebook_without_a_gpu_runs(tmp_path: Path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="runs notebooks; extra: test")
    pytest.importorskip("ipykernel", reason="runs notebooks; extra: test")
    import nbformat

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.reads(json.dumps(NOTEBOOK), as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "small" in cell.metadata.get("tags", ())]
    first = notebook.cells[0]
    assert "parameters" in first.metadata.tags
    fewer = ["train.batch_size=2", "train.evaluate_every=0", "evaluate.metrics=[]", "model.depth=2"]
    first.source = f"STEPS = 2\nSETTINGS = {fewer}"
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    nbclient.NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    images = [out for cell in notebook.cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(images) == 4  # two drawn, a sheet of two models, and one of strengths
    assert (tmp_path / "runs" / "notebook_tuned" / "metrics.jsonl").is_file()
