"""The page of a run: its numbers against hand-made ones, that it stands alone, and that it says what is missing."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from markupsafe import escape
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from agcl.attribution import save_importance
from agcl.cli import main
from agcl.errors import AgclError
from agcl.metrics.functional import forgetting
from agcl.reporting import write_report, write_score_matrix
from agcl.reporting.figures import LINE_COLOURS
from agcl.reporting.importance import summarise
from agcl.reporting.losses import training_losses
from agcl.reporting.outcome import examples, task_outcomes
from agcl.reporting.record import read_run
from agcl.reporting.sections import plasticity

TASKS = ["first", "sec & <ond>", "third"]
SCORES = [[0.0, 0.1, 0.0], [0.8, 0.1, 0.0], [0.9, 0.7, 0.2], [0.25, 0.6, 1.0]]
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.mlp.{k}_proj.weight" for i in (0, 1) for k in ("up", "down")),
]
GATE = {"class_path": "agcl.AttributionCallback", "init_args": {"strength": 2.0, "merge": "maximum"}}


def importance(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, 256, (6, 5), dtype=torch.uint8, generator=generator) for name in NAMES}


def row(prompt, *scores):
    """One row, with an answer before training and after each task."""
    given = [{"after": after, "given": f"said {after}", "score": score} for after, score in enumerate(scores)]
    return {"prompt": prompt, "right": "right", "answers": given}


def write_run(folder):
    folder.mkdir()
    metrics = {"forgetting": 0.375, "backward_transfer": -0.325, "average_performance": 0.6166}
    results = {"tasks": TASKS, "regime": "sequential", "scores": SCORES, "nll": SCORES, "metrics": metrics}
    (folder / "scores.json").write_text(json.dumps({**results, "model": "a model", "environment": {"python": "3.x"}}))
    answers = {
        TASKS[0]: [row("kept", 0, 1, 1, 1), row("<script>alert(1)</script>", 0, 1, 1, 0), row("later", 0, 0, 0, 1)],
        TASKS[1]: [row("never", 0, 0, 0.4, 0)],
    }
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "config.yaml").write_text(json.dumps({"trainer": {"callbacks": [GATE]}, "data": {"tasks": []}}))
    for index, task in enumerate(TASKS[:2]):
        save_importance(folder / "importance" / f"{index:02d}_{task}.safetensors", importance(index), {"task": task})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/first/loss", "train/third/loss"])
        writer.writeheader()
        writer.writerows({"step": step, "train/first/loss": 2.0 - step} for step in range(2))
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of that run, made once."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "run")
    write_report(folder, folder / "report.html")
    return (folder / "report.html").read_text()


class Page(HTMLParser):
    """What a browser would fetch, run and look up."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.references, self.addresses = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "data", "srcset"):
                (self.references if value.startswith("#") else self.addresses).append(value)
            self.references += re.findall(r"url\((#[^)]+)\)", value or "")
            self.addresses += re.findall(r"url\(([^#][^)]*)\)", value or "")


def test_page_stands_alone(page):
    text, page = page, Page(page)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert page.references
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_figures_take_the_pages_colours(page):
    assert page.count("<svg") == 8  # two scores, training loss, importance, of two tasks, overlap, plasticity
    assert "currentColor" in page
    assert "#0a0b0c" not in page


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lines_are_seen_on_both_grounds(page):
    grounds = re.findall(r"--ground: (#\w{6})", page)
    assert len(grounds) == 2
    for colour in LINE_COLOURS:
        for ground in grounds:
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3


def test_texts_of_users_are_escaped(page):
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "sec &amp; &lt;ond&gt;" in page


def test_forgetting_of_each_task(run):
    outcomes = task_outcomes(read_run(run))
    assert [task.forgetting for task in outcomes] == [pytest.approx(0.65), pytest.approx(0.1), None]
    assert [task.learned for task in outcomes] == [0.8, 0.7, 1.0]
    mean = np.mean([task.forgetting for task in outcomes if task.forgetting is not None])
    assert forgetting(torch.tensor(SCORES, dtype=torch.float64)).item() == pytest.approx(mean)


def test_forgotten_answers_are_marked_and_come_first(run, page):
    first, second = examples(read_run(run)).values()
    assert [row.fate for row in first] == ["forgotten", "kept", "learned later"]
    assert [row.fate for row in second] == ["never learned"]
    answers = first[0].before, first[0].learned, first[0].last
    assert [answer["given"] for answer in answers] == ["said 0", "said 1", "said 3"]
    assert page.count('class="forgotten"') == 1
    assert "1 of 3 forgotten" in page


def test_importance_and_plasticity_are_those_of_the_files(run):
    summary = summarise(read_run(run).importance, "maximum", 2.0)
    values = {task: {n: v.double().numpy() / 255 for n, v in importance(i).items()} for i, task in enumerate(TASKS[:2])}
    for task in TASKS[:2]:
        layer = [values[task][name] for name in NAMES if ".1." in name]
        assert summary.by(task, 0)["layer 01"] == pytest.approx(np.mean(layer))
        kind = [values[task][name] for name in NAMES if "up_proj" in name]
        assert summary.by(task, 1)["up_proj"] == pytest.approx(np.mean(kind))
    merged = [np.maximum(values[TASKS[0]][name], values[TASKS[1]][name]) for name in NAMES if ".0." in name]
    assert summary.plasticity[TASKS[1]]["layer 00"] == pytest.approx(np.mean((1 - np.array(merged)) ** 2))
    alone = [values[TASKS[0]][name] for name in NAMES if ".0." in name]
    assert summary.plasticity[TASKS[0]]["layer 00"] == pytest.approx(np.mean((1 - np.array(alone)) ** 2))


def test_plasticity_that_the_run_noted_counts(run):
    results = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps({**results, "plasticity": {"first": {"layer 00": 0.123}}}))
    found = plasticity(read_run(run), None, with_importance=False)
    assert found["lowest"] == 0.123
    assert "<svg" in found["figure"]


def test_plasticity_by_direction_is_not_that_of_the_files(run):
    config = json.loads((run / "config.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"]["directions"] = "auto"
    (run / "config.yaml").write_text(json.dumps(config))
    record = read_run(run)
    assert plasticity(record, summarise(record.importance, "maximum", 2.0), with_importance=True)["figure"] is None
    assert any(sentence.startswith("Plasticity left") for sentence in record.missing)


def test_recovery_of_old_tasks_is_shown(run):
    assert "Forgotten, or only the form" not in page_of(run)
    results = json.loads((run / "scores.json").read_text())
    recovery = {"divergence": [1.5, 0.25, None], "score": [0.125, 0.5, None], "recovered_score": [0.875, None, None]}
    (run / "scores.json").write_text(json.dumps({**results, "recovery": recovery}))
    text = page_of(run).partition("Forgotten, or only the form")[2].partition("</table>")[0]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", text)
    assert cells[4:-1] == ["first", "1.500", "0.125", "0.875", "sec &amp; &lt;ond&gt;", "0.250", "0.500"]


def page_of(run):
    write_report(run, run / "report.html")
    return (run / "report.html").read_text()


def test_what_is_missing_is_said(run):
    for name in ("answers.json", "config.yaml", "metrics.csv"):
        (run / name).unlink()
    for path in run.glob("importance/*"):
        path.unlink()
    results = json.loads((run / "scores.json").read_text())
    del results["environment"]
    (run / "scores.json").write_text(json.dumps(results))
    missing = write_report(run, run / "report.html")
    text = (run / "report.html").read_text()
    assert [sentence.split(":")[0] for sentence in missing] == [
        "Answers",
        "Configuration",
        "Training loss",
        "Environment",
    ]
    assert all(escape(sentence) in text for sentence in missing)
    assert "There are no importance files." in text


def test_run_that_was_cut_off(run):
    results = json.loads((run / "scores.json").read_text())
    results["scores"] = results["nll"] = [*SCORES[:3], [None] * 3]
    (run / "scores.json").write_text(json.dumps(results))
    outcomes = task_outcomes(read_run(run))
    assert [task.forgetting for task in outcomes] == [
        pytest.approx(-0.1),
        None,
        None,
    ]  # better than when it was learned
    assert [task.last for task in outcomes] == [0.9, 0.7, 0.2]
    assert "2 of 3 tasks are learned" in read_run(run).missing[-1]


def test_joint_training_has_no_forgetting(run):
    results = json.loads((run / "scores.json").read_text())
    results |= {"regime": "joint", "scores": [SCORES[0], [None] * 3, [None] * 3, SCORES[3]]}
    (run / "scores.json").write_text(json.dumps(results))
    record = read_run(run)
    assert [task.forgetting for task in task_outcomes(record)] == [None] * 3
    assert [row.fate for row in examples(record)["first"]] == ["kept", "never learned", "kept"]


def test_losses_of_both_loggers_are_equal(run):
    from_csv = training_losses(run)
    assert from_csv == {"first": [(0.0, 2.0), (1.0, 1.0)]}
    (run / "metrics.csv").unlink()
    with SummaryWriter(str(run)) as writer:
        for step, loss in from_csv["first"]:
            writer.add_scalar("train/first/loss", loss, int(step))
    assert training_losses(run) == from_csv


def test_command(run, capsys, tmp_path):
    main(["report", str(run), "--no_importance", "--output", str(tmp_path / "page.html")])
    assert not (run / "score_matrix.png").exists()
    main(["report", str(run), "--no_importance"])
    assert imread(run / "score_matrix.png").ndim == 3
    assert f"The report is {run / 'report.html'}" in " ".join(capsys.readouterr().out.split("\n"))
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    with pytest.raises(SystemExit, match=r"config\.yaml exists; choose another name, or add --overwrite"):
        main(["report", str(run), "--output", str(run / "config.yaml")])


def test_the_picture_of_an_unfinished_run_has_room_for_the_tasks_to_come(run):
    finished = imread(write_score_matrix(run))
    results = json.loads((run / "scores.json").read_text())
    results["scores"][2:] = [[None] * 3] * 2
    (run / "scores.json").write_text(json.dumps(results))
    unfinished = imread(write_score_matrix(run))
    assert unfinished.shape == finished.shape
    is_white = [(picture == 1).all(axis=-1).mean() for picture in (finished, unfinished)]
    assert is_white[1] - is_white[0] > 0.1


def test_folders_without_a_run_are_refused(run, tmp_path):
    with pytest.raises(AgclError, match=r"no scores\.json in .*; did you mean .*run\?"):
        read_run(tmp_path)
    with pytest.raises(AgclError, match="is not a folder"):
        read_run(run / "scores.json")
    (run / "scores.json").write_text("{")
    with pytest.raises(AgclError, match=r"scores\.json is not valid JSON"):
        read_run(run)
