"""The model card: what the model learned in which order, how well it does, and what it was made with."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from agcl.metrics import functional
from agcl.results import METRIC_MEANINGS, shown_name
from agcl.task_pairs import num_pairs
from agcl.version import __version__

from .finding import Trained


def model_card(trained: Trained, name: str, *, is_adapter: bool) -> ModelCard:
    """The card of an exported model.

    Args:
        trained: What is known of it.
        name: Its name.
        is_adapter: Whether the folder holds a PEFT adapter alone.

    Returns:
        The card, with its metadata: base model, library, and the present score on each task learned.
    """
    data = ModelCardData(
        base_model=trained.model_name if _is_on_hub(trained.model_name) else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["agcl", "continual-learning"],
        model_name=name,
        eval_results=_eval_results(trained),
    )
    sections = [
        f"# {name}",
        _summary(trained, is_adapter),
        f"## Use\n\n{_use(trained, is_adapter)}",
        f"## Tasks, in the order of learning\n\n{_tasks(trained)}",
        f"## Score matrix\n\n{_score_matrix(trained)}",
        f"## Continual-learning metrics\n\n{_metrics(trained)}",
        f"## Importance\n\n{_importance(trained)}",
        f"## Made with\n\n{_versions(trained)}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _summary(trained: Trained, is_adapter: bool) -> str:
    what = "An adapter for" if is_adapter else "A fine-tuned model, from"
    count, total = trained.num_learned, len(trained.tasks)
    if trained.regime == "joint":
        how = f"all {total} tasks learned at once"
    elif count == total:
        how = f"{total} tasks learned one after another"
    else:
        how = f"the first {count} of {total} tasks learned one after another"
    method = "`agcl` (attribution-guided continual learning, arXiv 2605.05285)"
    return f"{what} `{shown_name(trained.model_name)}`: {how} with {method}."


def _use(trained: Trained, is_adapter: bool) -> str:
    quantisation = trained.facts.get("quantization_config")
    options = f", quantization_config={quantisation}" if quantisation else ""
    if not is_adapter:
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
        lines = ["model = AutoModelForCausalLM.from_pretrained(FOLDER)"]
    elif trained.model_name.startswith("builtin:"):
        imports = ["from agcl.models import load_model", "from peft import PeftModel"]
        imports += ["from transformers import AutoTokenizer"]
        lines = [f'model = PeftModel.from_pretrained(load_model("{trained.model_name}"{options}), FOLDER)']
    else:
        imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
        lines = [f'base = AutoModelForCausalLM.from_pretrained("{shown_name(trained.model_name)}"{options})']
        lines += ["model = PeftModel.from_pretrained(base, FOLDER)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(FOLDER)"]
    return "\n".join(
        ["```python", *imports, "", *lines, "```", "", "`FOLDER` is this folder, or its repository's name."]
    )


def _tasks(trained: Trained) -> str:
    metrics = _task_metrics(trained)
    rows = []
    for index in range(trained.num_learned):
        # Joint training scores nothing between two tasks.
        at_first = trained.scores[index + 1, index].item()
        now = trained.scores[trained.num_learned, index].item()
        rows.append([str(index + 1), trained.tasks[index], metrics[index], _number(at_first), _number(now)])
    return _table(["", "task", "metric", "score when learned", "score now"], rows)


def _score_matrix(trained: Trained) -> str:
    labels = ["before training", *trained.tasks]
    if trained.regime == "joint":
        labels[-1] = "all tasks"
    rows = [
        [f"after {label}" if index else label, *map(_number, row.tolist())]
        for index, (label, row) in enumerate(zip(labels, trained.scores, strict=True))
        if row.isfinite().any()
    ]
    return "A row is a moment, a column a task.\n\n" + _table(["", *trained.tasks], rows)


def _metrics(trained: Trained) -> str:
    rows = []
    for name, meaning in METRIC_MEANINGS.items():
        value = getattr(functional, name)(trained.scores).item()
        rows.append([name.replace("_", " "), _number(value) or "undefined", meaning])
    return _table(["metric", "value", "meaning"], rows)


def _importance(trained: Trained) -> str:
    if not trained.importance:
        return "There are no importance files: the run computed none, or they lie elsewhere."
    rows = [
        [
            f"`importance/{file.path.name}`",
            *(file.metadata.get(key, "") for key in ("task", "estimator", "num_samples")),
        ]
        for file in trained.importance
    ]
    shown = [
        "How much each weight contributes to the right answers of a task, one file per task.",
        "",
        _table(["file", "task", "estimator", "rows"], rows),
        "",
    ]
    if any(num_pairs(file) for file in trained.importance):
        shown.append("It is of each task's own LoRA pair; this adapter is their sum. It is to look at, not to gate by.")
        return "\n".join(shown)
    files = ", ".join(f'"importance/{file.path.name}"' for file in trained.importance)
    return "\n".join(
        [
            *shown,
            "To learn another task and keep these, let the gate hold back what they need:",
            "",
            "```python",
            "import agcl",
            "",
            f"agcl.gate(optimizer, model, [{files}])  # then train as always",
            "```",
            "",
            "That holds back each weight by its own importance. Where the run gated weight matrices by the directions "
            "of their inputs, which is agcl's default and protects more, these files do not hold the directions: "
            "`agcl.compute_input_moments` finds them anew from rows of the tasks, for `agcl.DirectionalGate`, and "
            "`AttributionCallback(earlier=...)` reads them from the run itself.",
        ]
    )


def _versions(trained: Trained) -> str:
    facts = trained.facts
    versions = facts.get("versions") or {}
    rows = [["trained with", ", ".join(f"{name} {number}" for name, number in versions.items()) or "not known"]]
    rows.append(["exported with", ", ".join([f"agcl {__version__}", *_installed(("torch", "transformers", "peft"))])])
    settings = ("precision", "seed", "evaluate_on", "replay")
    rows += [[key.replace("_", " "), str(facts[key])] for key in settings if facts.get(key) is not None]
    return _table(["", ""], [["regime", trained.regime], *rows])


def _installed(names: Sequence[str]) -> list[str]:
    return [f"{name} {version(name)}" for name in names]


def _eval_results(trained: Trained) -> list[EvalResult]:
    metrics = _task_metrics(trained)
    present = trained.scores[trained.num_learned].tolist()
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metrics[index],
            metric_value=round(present[index], 4),
        )
        for index, task in enumerate(trained.tasks[: trained.num_learned])
    ]


def _task_metrics(trained: Trained) -> list[str]:
    return trained.facts.get("task_metrics") or ["score"] * len(trained.tasks)


def _is_on_hub(name: str) -> bool:
    """Whether the name can be a repository's: no local path, nothing built in."""
    if Path(name).exists() or name.startswith(("builtin:", ".", "/")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3f}"  # NaN: not measured
