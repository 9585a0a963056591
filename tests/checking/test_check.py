"""`agcl check`: rows as the model sees them, forecast, plasticity, and every problem of a configuration."""

import re
import sys

import pytest
import torch
from conftest import character_tokenizer, write_rows
from helpers import write_config
from rich.console import Console
from transformers import AutoModelForCausalLM

from agcl import planning
from agcl.attribution.artefact import save_importance
from agcl.checking.checking import CheckOptions, check
from agcl.checking.configuration import LenientConfiguration
from agcl.checking.display import show
from agcl.cli import main


def checked(path, *words):
    return check(LenientConfiguration(["--config", str(path), *words], prog="", description="", options=CheckOptions))


def text_of(found, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console, found)
    return console.export_text()


def cut_task(tmp_path):
    rows = [{"prompt": "ab", "answer": "x"}, {"prompt": "abcdefgh", "answer": "x"}, {"prompt": "cd\n", "answer": "yz"}]
    return write_rows(tmp_path / "cut.jsonl", rows)


def test_rows_are_shown_as_the_model_sees_them(llama_folder, task_files, tmp_path):
    files = [cut_task(tmp_path), *task_files[1:]]
    options = {"data__max_length": 9, "data__truncation": "left", "data__tasks__0__max_answer_tokens": 3}
    found = checked(write_config(llama_folder, files, tmp_path, **options), "--rows", "1")
    assert found.problems == []
    train = found.tasks[0].splits[0]
    # " x" and the end of sequence are three tokens; " yz" loses its end of sequence, "abcdefgh" its "ab".
    assert [(row.prompt, row.answer, row.prompt_tokens, row.answer_tokens) for row in train.shown] == [
        ("ab", " x<eos>", 2, 3),
        ("cdefgh", " x<eos>", 6, 3),  # the first that was cut
    ]
    assert (train.prompts_cut, train.answers_cut, train.lengths) == ([2], [1], [5, 9, 6])
    assert [split.use for split in found.tasks[0].splits] == ["train", "test", "first"]
    assert "train: 1 answers lose up to 1 tokens at their end." in found.tasks[0].notes
    assert "train: 1 rows hold characters that the tokenizer does not know." in found.tasks[0].notes  # the line end
    assert "2 + 0" in text_of(found)


def test_chats_without_a_template_are_a_problem_and_looked_at_all_the_same(llama_folder, task_files, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    files = [write_rows(tmp_path / "chats.jsonl", [{"m": chat}]), *task_files[1:]]
    found = checked(write_config(llama_folder, files, tmp_path, data__tasks__0__messages="m"))
    assert any("set `chat_template: true`" in problem for problem in found.problems)
    assert any("tokenizer has none" in problem for problem in found.problems)
    assert found.tasks[0].splits[0].num_rows == 1


def test_labels_and_what_is_seldom_meant(llama_folder, task_files, tmp_path):
    changes = {
        "labels": ["a", "b", "c", "d", "e"],
        "metric": "label_accuracy",
        "max_new_tokens": 2,
        "answer": "{answer}",
    }
    options = {f"data__tasks__1__{option}": value for option, value in changes.items()}
    options["data__tasks__1__test_split"] = "train[:2]"
    found = checked(write_config(llama_folder, task_files, tmp_path, **options))
    assert found.problems == []
    assert found.tasks[1].splits[0].labels == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert found.tasks[1].notes == [
        "`answer` ('{answer}') follows the prompt without a space.",
        "No training row has the label e.",
        "test: 2 of 2 prompts are learned too.",
    ]
    assert "a (1), b (1), c (1), d (1), e (0)" in text_of(found)


def test_the_forecast_counts_the_rows_that_are_there(llama_folder, task_files, tmp_path):
    path = write_config(llama_folder, task_files, tmp_path, data__replay={"share": 0.5})
    found = checked(path, "--machine", "h100")
    # Four rows in batches of two, 30 epochs; of later tasks two replayed rows more.
    assert [each.steps for each in found.tasks] == [60, 90, 90]
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(llama_folder).parameters())
    assert found.size.weights == found.size.gated == weights
    assert found.tasks[0].forecast.kept["importance"] == weights
    assert found.machine is planning.MACHINES["h100"]
    assert "60 steps" in text_of(found)


@pytest.fixture
def importance_files(llama_folder, tmp_path):
    """In the folder of an earlier run: 0.2 everywhere after the first task, 0.6 in one layer after the second."""
    named = list(AutoModelForCausalLM.from_pretrained(llama_folder).named_parameters())
    folder = tmp_path / "run" / "version_3" / "importance"
    for task, name_part, level in (("task0", "", 51), ("task1", "layers.1.", 153)):
        importance = {name: torch.full(p.shape, level, dtype=torch.uint8) for name, p in named if name_part in name}
        save_importance(folder / f"{task}.safetensors", importance, {"task": task})
    (tmp_path / "run" / "version_4").mkdir()  # a run that left none
    return folder


def test_plasticity_is_what_the_importance_of_earlier_tasks_leaves(
    llama_folder, task_files, tmp_path, importance_files
):
    options = {"strength": 2.0, "parameters": "layers|norm", "directions": None}
    callback = {"class_path": "agcl.AttributionCallback", "init_args": options}
    path = write_config(llama_folder, task_files, tmp_path, trainer__callbacks=[callback])
    first, second, third = checked(path).tasks
    assert first.plasticity == {}
    assert {layer: mean for layer, (mean, _) in second.plasticity.items()} == pytest.approx(
        {"layer 00": 0.64, "layer 01": 0.64, "norm": 0.64}
    )
    assert {layer: mean for layer, (mean, _) in third.plasticity.items()} == pytest.approx(
        {"layer 00": 0.64, "layer 01": 0.16, "norm": 0.64}  # the maximum over tasks, (1 - 0.6) ** 2
    )
    output = " ".join(text_of(checked(path, "--data.order", "[task1, task2, task0]")).split())
    assert "left by task1" in output  # its order, not the files', decides what is earlier
    named = checked(path, f"--importance=[{importance_files}/task1.safetensors]")
    assert (named.tasks[1].plasticity, named.tasks[2].earlier) == ({}, ["task1"])
    assert "there is no importance of task0" in " ".join(text_of(named).split())


def test_plasticity_of_matrices_gated_by_direction_is_the_budget(llama_folder, task_files, tmp_path, importance_files):
    options = {"parameters": "up_proj|layernorm", "directions": {"plasticity": 0.7}}
    callback = {"class_path": "agcl.AttributionCallback", "init_args": options}
    path = write_config(llama_folder, task_files, tmp_path, trainer__callbacks=[callback])
    _, second, _ = checked(path).tasks
    matrix, norms = 16 * 32, 2 * 16  # of a layer; the importance files say 0.2 of all weights
    expected = (0.7 * matrix + 0.8 * norms) / (matrix + norms)
    assert {layer: mean for layer, (mean, _) in second.plasticity.items()} == pytest.approx(
        {"layer 00": expected, "layer 01": expected}
    )


def test_earlier_runs_are_found_without_a_logger(llama_folder, task_files, tmp_path, importance_files, monkeypatch):
    (tmp_path / "run").rename(tmp_path / "lightning_logs")
    monkeypatch.chdir(tmp_path)
    path = write_config(llama_folder, task_files, tmp_path, trainer__logger=None)
    found = checked(path)
    assert found.origin.endswith("lightning_logs/version_3")
    assert found.tasks[2].earlier == ["task0", "task1"]


def test_a_single_callback_and_extra_ones_are_looked_at(llama_folder, task_files, tmp_path):
    gate = {"class_path": "agcl.AttributionCallback", "init_args": {"parameters": "nowhere"}}
    path = write_config(llama_folder, task_files, tmp_path, trainer__callbacks=gate)
    assert any("`parameters` 'nowhere' matches no trainable" in problem for problem in checked(path).problems)
    path = write_config(llama_folder, task_files, tmp_path, trainer__callbacks=[], extra_callbacks=[gate])
    assert any("`parameters` 'nowhere' matches no trainable" in problem for problem in checked(path).problems)


def test_importance_of_another_model_is_a_problem(llama_folder, task_files, tmp_path):
    save_importance(tmp_path / "a.safetensors", {"nowhere": torch.zeros(2, dtype=torch.uint8)}, {"task": "task0"})
    path = write_config(llama_folder, task_files, tmp_path)
    save_importance(tmp_path / "merged.safetensors", {"b": torch.zeros(2, dtype=torch.uint8)}, {"tasks": '["task0"]'})
    (problem,) = checked(path, f"--importance=[{tmp_path}/merged.safetensors]").problems
    assert "merged.safetensors does not say of which task it is" in problem
    (problem,) = checked(path, f"--importance=[{tmp_path}/a.safetensors]").problems
    assert problem.startswith("Importance of `nowhere` (2,): the model has no such parameter")


def test_every_problem_is_listed(llama_folder, task_files, tmp_path):
    rows = [{"prompt": "a", "answer": answer} for answer in ("p", "q", "q", "")] + [{"prompt": "x" * 70, "answer": "p"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    callback = {"class_path": "agcl.AttributionCallback", "init_args": {"gate": "gradient", "parameters": "nowhere"}}
    path = write_config(
        llama_folder,
        [tmp_path / "rows.jsonl", *task_files[1:]],
        tmp_path,
        trainer__callbacks=[callback],
        trainer__val_check_interval=0.5,
        data__order=["task0", "task0", "task9"],
        data__tasks__0__labels=["p"],
        data__tasks__1__prompt="{question} {topic}",
        data__tasks__1__source={"train": str(task_files[1]), "test": str(tmp_path / "gone.jsonl")},
        data__tasks__2__epochs=0,
        data__tasks__2__metric="label_ranking",
    )
    found = checked(path)
    expected = [
        "Task `task2`: `epochs` is 0",
        "Task `task2`: metric `label_ranking` needs `labels`",
        "`order` names `task0` more than once",
        "`order` names `task9`, which is no task",
        "`order` leaves out task1, task2",
        "leave the Trainer's `val_check_interval` at 1.0",
        "Task `task0`: row 1 of `train` has the label 'q', which is not among `labels` (p). So it is in 1 more (2).",
        "Task `task0`: column `answer` is empty in row 3 of `train`",
        "Task `task0`: row 4 of `train` has 70 + 3 tokens",
        "Task `task0`: row 1 of `train[:1]`",  # never: the probe's only row is in order
        "gone.jsonl does not exist",
        "there is no column `question`",
        "there is no column `topic`",
        "`parameters` 'nowhere' matches no trainable parameter",
    ]
    missing = [text for text in expected if not any(text in problem for problem in found.problems)]
    assert missing == ["Task `task0`: row 1 of `train[:1]`"]
    assert len(found.problems) == len(expected) - 1
    assert any("gate: gradient protects nothing under AdamW" in note for note in found.notes)
    assert "13 problems; nothing was trained." in text_of(found)


def test_a_folder_that_cannot_be_written_and_an_unfit_adapter_are_problems(llama_folder, task_files, tmp_path):
    (tmp_path / "file").write_text("")
    adapter = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    path = write_config(
        llama_folder,
        task_files[:1],
        tmp_path,
        trainer__logger__init_args__save_dir=str(tmp_path / "file"),
        model__adapter=adapter,
    )
    folder, tokens = checked(path).problems
    assert re.search(r"file/run/version cannot be written \(Not a directory.*choose another folder", folder)
    assert "`adapter.peft_type: PROMPT_TUNING` puts tokens of its own" in tokens


def test_mistakes_in_the_file_hide_nothing_else(llama_folder, task_files, tmp_path):
    callbacks = [{"class_path": "agcl.Nope"}, {"class_path": "agcl.AttributionCallback", "init_args": {"nosuch": 1}}]
    path = write_config(
        llama_folder,
        task_files,
        tmp_path,
        trainer__callbacks=callbacks,
        trainer__nosuch=1,
        data__batch_size="many",
        data__tasks__0__epocs=3,
        data__tasks__1__metric="accuracy",
        data__tasks__2__prompt="{question}",
    )
    path.write_text(path.read_text().replace("seed_everything", "extra: 1\nseed_everything"))
    problems = checked(path).problems
    for start in (
        "extra: ",
        "trainer.callbacks: ",
        "trainer.nosuch: ",
        "data.batch_size: Expected a int",
        "Task `task0`, `epocs`: Option 'epocs' is not accepted",
        "Task `task1`, `metric`: Expected a Literal",
        "Task `task2`: there is no column `question`",
    ):
        assert any(problem.startswith(start) for problem in problems), start
    assert len(problems) == 8  # two of them of callbacks


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_listed_beside_those_in_the_file(llama_folder, task_files, tmp_path):
    path = write_config(llama_folder, task_files, tmp_path, data__tasks__0__epocs=3)
    found = checked(path, "--data.batch_size", "many")
    assert [problem.split(":")[0] for problem in found.problems] == [
        "Task `task0`, `epocs`",
        "Expected a int. Got value",
    ]
    assert "nothing else could be looked at" in found.notes[0]


def test_weights_are_not_needed(llama_folder, task_files, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in llama_folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    found = checked(write_config(folder, task_files, tmp_path))
    assert found.problems == [f"`{folder}` holds no weights (*.safetensors, *.bin)."]
    assert found.tasks[0].forecast is not None
    character_tokenizer().save_pretrained(tmp_path / "tokenizer alone")
    found = checked(write_config(tmp_path / "tokenizer alone", task_files, tmp_path, data__tasks__0__prompt="{q}"))
    assert [problem.split(" could be")[0] for problem in found.problems][:1] == ["No model"]
    assert "there is no column `q`" in found.problems[-1]


def test_the_command_reports_by_its_exit_status_and_leaves_nothing(
    llama_folder, task_files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["agcl"])
    monkeypatch.setenv("COLUMNS", "80")
    path = write_config(llama_folder, task_files, tmp_path)
    main(["check", "--config", str(path)])
    assert "No problem found; nothing was trained." in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main(["check", "--config", str(path), "--data.max_length", "5"])
    assert exit_info.value.code == 1
    output = capsys.readouterr().out
    assert "more than the 5 allowed" in " ".join(output.split())
    assert max(map(len, output.splitlines())) <= 80
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
