"""Claims about tutorial.ipynb: it runs from top to bottom, its solutions too, and it is kept with its pictures."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT

NOTEBOOK = ROOT / "tutorial.ipynb"


def pictures(cells: list) -> int:
    return sum("image/png" in str(cell.get("outputs")) for cell in cells)


@pytest.mark.slow
def test_the_tutorial_and_its_solutions_run_from_top_to_bottom(monkeypatch):
    """With a short training. A cell that fails, such as by one of its assertions, would raise."""
    monkeypatch.setenv("TUTORIAL_SHORT", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning:__main__")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    solutions = re.findall(r"<details>.*?```python\n(.*?)```.*?</details>", text, re.DOTALL)
    assert len(solutions) == text.count("<details>") == 5
    notebook.cells += [nbformat.v4.new_code_cell(solution) for solution in solutions]
    before = set(ROOT.iterdir())
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    in_widgets = str(notebook.metadata).count("image/png")  # where ipywidgets is installed
    assert pictures(notebook.cells) + in_widgets > 7
    assert set(ROOT.iterdir()) <= before | {ROOT / "__pycache__"}


def test_the_tutorial_is_kept_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(cells) > 6
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 2_000_000
    assert str(ROOT) not in NOTEBOOK.read_text()
    assert "make_figures" not in NOTEBOOK.read_text()
