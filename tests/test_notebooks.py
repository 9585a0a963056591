"""Every notebook runs from top to bottom: on a finished run, on a tiny model, on the results in the repository."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PICTURES = {"inside_a_run": 3, "compare_methods": 3, "quick_start": 2}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_pictures(path, finished_run, llama_folder, monkeypatch):
    folder, _ = finished_run
    monkeypatch.setenv("AGCL_RUN", str(folder))
    monkeypatch.setenv("AGCL_MODEL", str(llama_folder))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES.get(path.stem, 1)
    if path.stem == "inside_a_run":
        assert any("<span" in output.get("data", {}).get("text/html", "") for output in outputs)
