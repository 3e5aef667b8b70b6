"""Claims about tutorial.ipynb: it runs from top to bottom, and is kept with its pictures."""

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT

NOTEBOOK = ROOT / "tutorial.ipynb"


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(monkeypatch, tmp_path):
    """With few steps. A cell that fails would raise."""
    monkeypatch.setenv("TUTORIAL_SHORT", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning:__main__")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = set(ROOT.iterdir())
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert sum("image/png" in str(cell.get("outputs")) for cell in notebook.cells) > 8
    assert set(ROOT.iterdir()) <= before | {ROOT / "__pycache__"}


def test_the_tutorial_is_kept_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in str(cell.outputs) for cell in cells) > 8
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 2_000_000
    assert str(ROOT) not in NOTEBOOK.read_text()
