"""What the documentation shows works: its estimator, its method, its tasks."""

import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from agcl.attribution.estimators import Evidence
from agcl.attribution.passes import Sample
from agcl.data.tasks import Task

ROOT = Path(__file__).parent.parent
EXTENDING = (ROOT / "docs" / "extending.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", EXTENDING, re.DOTALL)


def defined(name):
    """What the one block that defines a class of this name defines."""
    (code,) = (block for block in blocks("python") if f"class {name}" in block)
    namespace = {}
    exec(code, namespace)
    return namespace[name]


def test_the_estimator_shown_scores_by_the_largest_logits_gradient(llama_folder):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float64).eval()
    input_ids = torch.tensor([5, 9, 12, 7])
    sample = Sample(input_ids, torch.tensor([1, 2]), torch.tensor([12, 7]))
    name = "model.layers.1.mlp.down_proj.weight"
    evidence = Evidence(model, [name], [sample], num_samples=1, only_correct=False)
    scores = defined("LargestLogit")().scores(evidence)
    model(input_ids[None]).logits[0, [1, 2]].amax(dim=-1).sum().backward()
    expected = model.get_parameter(name).grad.square()
    torch.testing.assert_close(scores[name].double(), expected, rtol=1e-5, atol=0)


def test_the_method_shown_freezes_the_embeddings_after_the_first_task(llama_folder):
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    method = defined("FrozenEmbeddings")()
    trainable = dict(model.named_parameters())
    assert [list(method.choose(model, trainable, task)) for task in (0, 1)] == [[], ["model.embed_tokens.weight"]]


@pytest.mark.parametrize("text", [block for block in blocks("yaml") if "tasks:" in block])
def test_the_tasks_shown_are_valid(text):
    assert [Task(**entry).name for entry in yaml.safe_load(text)["data"]["tasks"]] == ["tickets", "faq"]


def test_every_command_has_its_help_on_the_command_lines_page():
    pytest.importorskip("mkdocs")
    hook = runpy.run_path(str(ROOT / "scripts" / "docs_pages.py"))
    hook["command_line_page"].__globals__["_help"] = " ".join
    page = hook["command_line_page"]()
    headings = re.findall(r"## agcl (.+)", page)
    assert headings[:3] == ["fit", "check", "plan"]
    assert {"init", "importance show", "export", "report"} < set(headings)


def test_the_sites_page_of_results_links_to_the_pages_beside_it():
    pytest.importorskip("mkdocs")
    page = runpy.run_path(str(ROOT / "scripts" / "docs_pages.py"))["_results_page"]()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]*)\)", page)]
    assert links
    assert [link for link in links if link and not (ROOT / "docs" / link).exists()] == []
