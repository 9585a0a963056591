"""Old tasks' divergence and recovery: against plain transformers, and on tasks that lose their form or their facts."""

import json

import pytest
import torch
from helpers import CrashAt, CrashError, WeightsAtBoundaries, build, trainer_for, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from agcl.callbacks import ContinualReport, RecoveryProbe
from agcl.errors import AgclError
from agcl.recovery import recovery_means

WORDS = ["sun", "map", "ink", "oak", "jar", "fig"]
FACTS = ["bd", "cf", "ag", "he", "dc", "fb"]


def write_rows(path, answers):
    rows = [{"prompt": f"{word}?", "answer": answer} for word, answer in zip(WORDS, answers, strict=True)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def run(folder, files, run_dir, probe, **options):
    model, data = build(folder, files, task_options=options)
    boundaries = WeightsAtBoundaries()
    callbacks = [boundaries, *([probe] if probe else []), ContinualReport(save_model=False)]
    trainer_for(data, run_dir, callbacks).fit(model, datamodule=data)
    return model, data, boundaries.weights, json.loads((run_dir / "scores.json").read_text())


def answer_log_probabilities(model, row):
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, :-1]
    return logits[torch.tensor(row["labels"][1:]) != -100].double().log_softmax(-1)


def test_divergence_is_that_of_plain_transformers(llama_folder, task_files, tmp_path):
    _, data, boundaries, results = run(llama_folder, task_files, tmp_path, RecoveryProbe())
    then, now = (AutoModelForCausalLM.from_pretrained(llama_folder) for _ in range(2))
    now.load_state_dict(boundaries[-1], strict=False)
    expected = []
    for index in range(2):
        then.load_state_dict(boundaries[index], strict=False)
        pairs = [tuple(answer_log_probabilities(m, row) for m in (then, now)) for row in data.scored_rows(index)]
        before, after = (torch.cat(part) for part in zip(*pairs, strict=True))
        expected.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert results["recovery"]["divergence"] == [*(pytest.approx(value, rel=0.01) for value in expected), None]
    assert min(expected) > 0.1


@pytest.mark.parametrize(("answers", "is_form"), [(["yes"] * 6, True), (FACTS, False)])
def test_a_lost_form_comes_back_and_lost_facts_do_not(roomy_model, tmp_path, answers, is_form):
    files = [
        write_rows(tmp_path / "first.jsonl", answers),
        write_rows(tmp_path / "second.jsonl", ["no"] * 6),
    ]
    probe = RecoveryProbe(num_rows=2, num_steps=30, learning_rate=0.01)
    *_, results = run(roomy_model, files, tmp_path / "run", probe, epochs=40)
    assert results["scores"][1][0] == 1.0
    assert results["recovery"]["score"] == [0.0, None]
    recovered, nothing = results["recovery"]["recovered_score"]
    assert (recovered > 0.9) if is_form else (recovered < 0.3)
    assert nothing is None


def test_training_does_not_notice(llama_folder, task_files, tmp_path):
    plain, *_ = run(llama_folder, task_files, tmp_path / "plain", None)
    probed, *_ = run(llama_folder, task_files, tmp_path / "probed", RecoveryProbe(num_rows=2))
    for name, parameter in weights(plain.model).items():
        assert torch.equal(parameter, weights(probed.model)[name]), name


@pytest.mark.parametrize("crash_at", [6, 8])
def test_resumed_run_finds_the_same(llama_folder, task_files, tmp_path, crash_at):
    *_, straight = run(llama_folder, task_files, tmp_path / "straight", RecoveryProbe(num_rows=1))
    model, data = build(llama_folder, task_files)
    saving = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(CrashError):
        trainer_for(
            data, tmp_path, [RecoveryProbe(num_rows=1), CrashAt(crash_at), saving], enable_checkpointing=True
        ).fit(model, datamodule=data)
    model, data = build(llama_folder, task_files)
    trainer = trainer_for(data, tmp_path / "resumed", [RecoveryProbe(num_rows=1), ContinualReport(save_model=False)])
    trainer.fit(model, datamodule=data, ckpt_path=tmp_path / "kept" / f"step={crash_at}.ckpt")
    resumed = json.loads((tmp_path / "resumed" / "scores.json").read_text())
    assert resumed["recovery"] == straight["recovery"]


def test_rows_that_are_all_used_have_no_score(llama_folder, task_files, tmp_path):
    *_, results = run(llama_folder, task_files[:2], tmp_path, RecoveryProbe(num_rows=1000))
    assert results["recovery"]["score"] == results["recovery"]["recovered_score"] == [None, None]
    assert set(recovery_means(results)) == {"divergence"}
    assert recovery_means({}) == {}


def test_joint_training_has_no_old_tasks(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files, data_options={"regime": "joint"})
    probe = RecoveryProbe()
    trainer_for(data, tmp_path, [probe]).fit(model, datamodule=data)
    assert probe.results() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "`num_rows` is 0"),
        ({"num_steps": 0}, "`num_steps` is 0"),
        ({"divergence_rows": 0}, "`divergence_rows` is 0"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(AgclError, match=message):
        RecoveryProbe(**options)
