"""Every notebook runs from top to bottom: on a finished run, on a tiny model, on the results in the repository."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PICTURES = {"inside_a_run": 3, "compare_methods": 3, "quick_start": 2}


@pytest.fixture(scope="module")
def client(finished_run, llama_folder):
    """One kernel for all notebooks: each would import everything anew, which takes longer than most of them."""
    folder, _ = finished_run
    resources = {"metadata": {"path": str(NOTEBOOKS[0].parent)}}
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=300, resources=resources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGCL_RUN", str(folder))
        patch.setenv("AGCL_MODEL", str(llama_folder))
        patch.setenv("AGCL_COMPARISON", str(RESULTS / "compare_quickstart_lora"))  # which has fewer methods to draw
        client.execute(cleanup_kc=False)
    yield client
    client.nb = nbformat.v4.new_notebook()
    client.execute(cleanup_kc=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_pictures(path, client):
    client.nb = notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # of another notebook's names
    client.execute(cleanup_kc=False)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES.get(path.stem, 1)
    if path.stem == "inside_a_run":
        assert any("<span" in output.get("data", {}).get("text/html", "") for output in outputs)
