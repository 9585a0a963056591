"""Exported models compute what the run's model computed, and their cards say what the run's results say."""

import json
import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import attribution, build, by_direction, trainer_for
from huggingface_hub import ModelCard
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.attribution import save_importance
from agcl.callbacks import ContinualReport
from agcl.cli import main
from agcl.errors import AgclError
from agcl.export import find_trained

IDS = torch.tensor([[5, 6, 7, 8]])
LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
ADAPTERS = {"full": None, "lora": LORA, "pairs": LORA}  # pairs: one for each task, as the gate by direction has them
EPOCHS = 2


class Logits(Callback):
    """The model's logits at the end of each epoch."""

    def __init__(self):
        self.after = []

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.model.eval()
        with torch.no_grad():
            self.after.append(pl_module.model(IDS).logits)
        pl_module.model.train()


@pytest.fixture(scope="module", params=ADAPTERS)
def run(request, llama_folder, task_files, tmp_path_factory):
    """A run of three tasks that keeps a checkpoint of every epoch, and the logits of its model then."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agcl.attribution.relevance.is_correct", lambda logits, targets: True)
        patch.setattr("agcl.callbacks.report.score_matrix_picture", lambda results: b"")
        options = {"task_options": {"epochs": EPOCHS}, "adapter": ADAPTERS[request.param]}
        model, data = build(llama_folder, task_files, **options)
        checkpoints = ModelCheckpoint(folder / "checkpoints", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        logits = Logits()
        gate = by_direction() if request.param == "pairs" else attribution()
        callbacks = [gate, ContinualReport(), logits, checkpoints]
        trainer_for(data, folder, callbacks, enable_checkpointing=True).fit(model, datamodule=data)
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    return SimpleNamespace(folder=folder, base=llama_folder, kind=request.param, logits=logits.after, scores=scores)


def exported_logits(run, output):
    model = AutoModelForCausalLM.from_pretrained(output if run.kind == "full" else run.base)
    if run.kind != "full":
        model = PeftModel.from_pretrained(model, output)
    assert AutoTokenizer.from_pretrained(output).decode([5, 6]) == AutoTokenizer.from_pretrained(run.base).decode(
        [5, 6]
    )
    return model.eval()(IDS).logits


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_tasks_model_computes_the_same_logits(run, tmp_path, index, capsys):
    output = tmp_path / "out"
    task = [] if index == 2 else ["--task", f"task{index}"]  # the last one is the default
    main(["export", str(run.folder), "--output", str(output), *task])
    assert str(output) in capsys.readouterr().out
    torch.testing.assert_close(exported_logits(run, output), run.logits[EPOCHS * (index + 1) - 1], rtol=0, atol=1e-6)
    files = sorted(path.name for path in (output / "importance").iterdir())
    assert files == [f"{i:02d}_task{i}.safetensors" for i in range(index + 1)]
    for name in files:
        assert (output / "importance" / name).read_bytes() == (run.folder / "importance" / name).read_bytes()


def test_a_checkpoint_gives_what_its_run_gives(run, tmp_path):
    main(["export", str(run.folder), "--output", str(tmp_path / "a" / "same"), "--task", "task1"])
    checkpoint = run.folder / "checkpoints" / f"epoch={2 * EPOCHS - 1}.ckpt"
    main(["export", str(checkpoint), "--output", str(tmp_path / "b" / "same"), "--task", "task1"])
    written = [sorted(p.relative_to(tmp_path / side) for p in (tmp_path / side).rglob("*")) for side in "ab"]
    assert written[0] == written[1]
    for path in written[0]:
        if (tmp_path / "a" / path).is_file():
            assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_the_card_says_what_was_measured(run, tmp_path):
    output = tmp_path / "out"
    main(["export", str(run.folder), "--output", str(output), "--task", "task1"])
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == ("transformers" if run.kind == "full" else "peft")
    measured = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert measured == [(f"task{i}", "exact_match", round(run.scores[2][i], 4)) for i in range(2)]
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in card.text.splitlines() if line.startswith("| ")}
    matrix = [[float(x) for x in re.findall(r"\d\.\d{3}", lines[f"after task{i}"])] for i in range(2)]
    assert matrix == [[round(x, 3) for x in row] for row in run.scores[1:3]]
    assert "after task2" not in lines
    transfer = run.scores[2][0] - run.scores[1][0]  # of two tasks learned, that of the first
    assert f"{transfer:.3f}" in lines["backward transfer"]
    assert "the first 2 of 3 tasks" in card.text
    assert f"torch {torch.__version__}" in lines["trained with"]
    assert "01_task1.safetensors" in card.text
    assert "02_task2" not in card.text
    assert ("agcl.gate(" in card.text) == (run.kind != "pairs")  # their files are of other tensors than the sum
    assert ("agcl.DirectionalGate" in card.text) == (run.kind != "pairs")  # the recipe is not the default's gate


def test_the_card_says_how_to_go_on(run, tmp_path, monkeypatch):
    if run.kind == "pairs":
        pytest.skip("the card has no recipe: test_the_card_says_what_was_measured")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"\. is the folder that you are in, which cannot be replaced; name one in it"):
        main(["export", str(run.folder), "--output", "."])
    main(["export", str(run.folder), "--output", "exported"])
    monkeypatch.chdir("exported")
    text = ModelCard.load("README.md").text
    (recipe,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "agcl.gate(" in block]
    model = AutoModelForCausalLM.from_pretrained("." if run.kind == "full" else run.base)
    if run.kind != "full":
        model = PeftModel.from_pretrained(model, ".", is_trainable=True)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    exec(recipe, {"model": model, "optimizer": optimizer})


def test_what_cannot_be_exported_is_named(run, tmp_path):
    def message(source, *options):
        with pytest.raises(SystemExit) as error:
            main(["export", str(source), "--output", str(tmp_path / "out"), *options])
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*partial"))
        return str(error.value)

    assert "no task `french`; its tasks are `task0`" in message(run.folder, "--task", "french")
    assert "in the middle of a task" in message(run.folder / "checkpoints" / "epoch=2.ckpt")
    last = run.folder / "checkpoints" / "epoch=5.ckpt"
    assert "end of task `task2`, not of `task0`" in message(last, "--task", "task0")
    assert "is not a checkpoint" in message(run.folder / "scores.json")
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(damaged)
    assert "damaged.ckpt is not a checkpoint, or not a whole one" in message(tmp_path / "damaged.ckpt")
    assert "does not exist" in message(run.folder / "nothing")
    assert "There is no scores.json in" in message(run.folder / "model")
    assert "`push_to_hub` is 'a/b/c', no repository's name" in message(run.folder, "--push_to_hub", "a/b/c")
    assert "`base_model` is 'a/b/c', no repository's name" in message(run.folder, "--base_model", "a/b/c")
    assert "add `push_to_hub`" in message(run.folder, "--private")


def hand_made_run(folder, **facts):
    """A finished run of two tasks, without checkpoints."""
    scores = [[0.0, 0.0], [1.0, None], [0.5, 0.75]]
    results = {
        "tasks": ["a", "b"],
        "scores": scores,
        "regime": "sequential",
        "model": "org/name",
        "metrics": {},
        **facts,
    }
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "scores.json").write_text(json.dumps(results))
    return folder


def test_without_a_checkpoint_of_the_task_the_remedy_is_named(tmp_path):
    folder = hand_made_run(tmp_path / "run")
    assert find_trained(folder).weights == folder / "model"
    with pytest.raises(AgclError, match=r"end of task `a` \(there are of: none\).*`save_top_k: -1`"):
        find_trained(folder, "a")
    with pytest.raises(AgclError, match="no model of `a` alone"):
        find_trained(hand_made_run(tmp_path / "joint", regime="joint"), "a")


def test_a_run_that_ended_early_has_no_model_of_what_it_did_not_learn(tmp_path):
    folder = hand_made_run(tmp_path / "run", scores=[[0.0, 0.0], [1.0, None], [None, None]])
    with pytest.raises(AgclError, match="has not learned `b` to its end"):
        find_trained(folder, "b")
    with pytest.raises(AgclError, match="end of task `a`"):  # not what is in model/
        find_trained(folder)
    with pytest.raises(AgclError, match="has not learned a task"):
        find_trained(hand_made_run(tmp_path / "none", scores=[[0.0, 0.0], [None, None], [None, None]]))


def test_importance_is_the_latest_of_each_task_learned(tmp_path):
    folder = hand_made_run(tmp_path / "run", tasks=["a", "b"])
    levels = {"weight": torch.zeros(4, 4, dtype=torch.uint8), "other": torch.ones(4, 4, dtype=torch.uint8)}
    own = folder / "importance"
    save_importance(own / "00_a.safetensors", levels, {"task": "a"})
    again = {"task": "a", "reestimated_after": "b"}
    save_importance(own / "00_a_after_01.safetensors", levels, again, max_shard_bytes=16)
    save_importance(own / "01_b.safetensors", levels, {"task": "b"}, max_shard_bytes=16)
    save_importance(own / "01_b_after_02.safetensors", levels, {"task": "b", "reestimated_after": "x"})
    save_importance(own / "00_x.safetensors", levels, {"task": "x"})
    # The gate of whoever goes on takes the maximum: with the first estimate of `a` it would not be the run's.
    names = ["00_a_after_01.safetensors", "01_b.safetensors"]
    assert [file.path.name for file in find_trained(folder).importance] == names
    main(["export", str(folder), "--output", str(tmp_path / "out")])
    copied = {path.name for path in (tmp_path / "out" / "importance").iterdir()}
    assert copied == {path.name for name in names for path in own.glob(f"{name.removesuffix('.safetensors')}[-.]*")}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "org/name"
    with pytest.raises(SystemExit, match="choose a folder that does not"):
        main(["export", str(folder), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("options", "name", "on_hub"), [([], "tiny", None), (["--base_model", "org/tiny"], "org/tiny", "org/tiny")]
)
def test_card_and_adapter_name_the_base_model_and_no_path(tmp_path, options, name, on_hub):
    path = str(tmp_path / "private" / "tiny")
    folder = hand_made_run(tmp_path / "run", model=path)
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=path).save_pretrained(folder / "model")
    main(["export", str(folder), "--output", str(tmp_path / "out"), *options])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"for `{name}`" in card
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == on_hub
    written, saved = (PeftConfig.from_pretrained(where) for where in (tmp_path / "out", folder / "model"))
    assert written.base_model_name_or_path == name
    assert {**written.to_dict(), "base_model_name_or_path": path} == saved.to_dict()
    assert "private" not in card + (tmp_path / "out" / "adapter_config.json").read_text()


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path):
    (run.folder / "cut.ckpt").write_bytes((run.folder / "checkpoints" / "epoch=1.ckpt").read_bytes()[:5000])
    assert find_trained(run.folder, "task0").weights.name == "epoch=1.ckpt"
    (run.folder / "cut.ckpt").unlink()


def test_the_hub_librarys_own_functions_upload(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **kw: calls.append((name, kw)) or f"url of {name}")
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **kw: calls.append(kw))
    folder, output = hand_made_run(tmp_path / "run"), tmp_path / "out"
    main(["export", str(folder), "--output", str(output), "--push_to_hub", "me/mine", "--private"])
    (created, options), uploaded = calls
    assert (created, options) == ("me/mine", {"private": True, "exist_ok": True})
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/mine", output)
    assert ModelCard.load(output / "README.md").data.model_name == "mine"
    assert "Uploaded: url of me/mine" in capsys.readouterr().out

    def refuse(*args, **kwargs):
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(SystemExit, match="is written, but `me/mine` could not be uploaded to: no token"):
        main(["export", str(folder), "--output", str(tmp_path / "other"), "--push_to_hub", "me/mine"])
    assert (tmp_path / "other" / "README.md").exists()
