"""AttributionCallback by direction on a LoRA adapter: a pair for each task, which old inputs hardly reach."""

import pytest
import torch
from continual_cases import assert_saved, assert_validates, batch_of
from helpers import (
    EPOCHS,
    CrashError,
    assert_resumes,
    attribution,
    build,
    by_direction,
    check_budget,
    slow,
    trainer_for,
)
from lightning.pytorch import Callback

from agcl.callbacks import AttributionCallback, ContinualReport
from agcl.callbacks.directions import DirectionsSoFar
from agcl.cli import main
from agcl.errors import AgclError
from agcl.methods import OLoRA

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def pairs(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


class Look(Callback):
    """All pairs, what learns and what the model answers, at each task's first batch and at the end of each task."""

    def __init__(self, callback):
        self.callback, self.begun, self.learning, self.answers, self.budgets = callback, [], [], [], []

    def answer(self, pl_module, batch):
        with torch.no_grad():
            return pl_module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % (2 * EPOCHS) == 0:
            self.begun.append(pairs(pl_module.model))
            self.learning.append({n for n, p in pl_module.model.named_parameters() if p.requires_grad})
            self.answers.append(self.answer(pl_module, batch_of(trainer.datamodule)))
            self.budgets.append(self.callback.plasticity())

    def on_train_epoch_end(self, trainer, pl_module):  # before the callback passes the boundary: it is listed first
        if pl_module.tasks.ends_at(trainer.current_epoch):
            self.answers.append(self.answer(pl_module, batch_of(trainer.datamodule)))


def run(folder, files, run_dir, callback, **options):
    model, data = build(folder, files, **({"adapter": LORA} | options))
    look = Look(callback)
    trainer_for(data, run_dir, [look, callback]).fit(model, datamodule=data)
    look.begun.append(pairs(model.model))
    return model, look


def test_each_task_learns_a_fresh_pair_and_those_before_stay(llama_folder, task_files, tmp_path, knowing):
    callback = by_direction(0.7, own_text=3)
    _, look = run(llama_folder, task_files, tmp_path, callback)
    assert all(learning == {n for n in look.begun[0] if ".learning." in n} for learning in look.learning)
    for index in (1, 2):
        for name, begun in look.begun[index].items():
            after = look.begun[index + 1][name]
            if ".lora_B.learning." in name:
                assert not begun.any(), name  # a pair that begins answers nothing
            elif f".task{index - 1}." in name:
                assert begun.any(), name
                assert torch.equal(begun, after), name
            elif f".task{index}." in name and ".lora_B." in name:
                assert not begun.any(), name
                assert after.any(), name
    assert all(pair.any() for pair in look.begun[3].values())
    for end, begin in ((1, 2), (3, 4)):
        assert torch.equal(look.answers[end], look.answers[begin])  # setting aside changes no answer
    for plasticity in look.budgets:
        assert len(plasticity) == 14
        assert all(".lora_A.learning." in name for name in plasticity)


def test_old_inputs_hardly_reach_a_new_pair(llama_folder, task_files, tmp_path, knowing, monkeypatch):
    learn = DirectionsSoFar.learn

    def reach(control):
        """Of the second task's ``A``: mean square of what it gives for the first task's inputs, for its length."""
        callback, moments = by_direction(0.3, every=2, control=control), {}

        def keep(self, *given):
            learn(self, *given)
            if not moments:
                moments.update({name: tensor.clone() for name, tensor in self.moments.sums.items()})

        monkeypatch.setattr(DirectionsSoFar, "learn", keep)
        _, look = run(llama_folder, task_files[:2], tmp_path / control, callback)
        found = {}
        for name, moment in moments.items():
            down = look.begun[-1][name.replace("base_layer", "lora_A.learning")]
            found[name] = float(((down @ moment) * down).sum() / down.square().sum())
        return found

    held, shuffled = reach("none"), reach("shuffled")
    assert len(held) == 14
    for name in held:
        assert held[name] < 0.1 * shuffled[name], name


def test_old_answers_change_less_than_with_one_pair_for_all_tasks(llama_folder, task_files, tmp_path, knowing):
    def change(callback):
        _, look = run(llama_folder, task_files[:2], tmp_path / str(callback), callback)
        return float((look.answers[-1] - look.answers[1]).square().mean())

    by_pair = change(by_direction(0.3, every=1))
    assert by_pair < 0.5 * change(attribution(directions=None))


@pytest.mark.parametrize(
    ("every_n_steps", "crash_at", "own_text"), [(1, 8, 0), (1, 12, 3), *slow((1, 4, 3), (None, 9, 0))]
)
def test_resumed_run_equals_the_straight_one(
    llama_folder, task_files, tmp_path, knowing, every_n_steps, crash_at, own_text
):
    adapter = {**LORA, "lora_dropout": 0.2}
    assert_resumes(
        llama_folder,
        task_files,
        tmp_path,
        lambda: by_direction(0.7, every=4, own_text=own_text),
        crash_at,
        every_n_steps=every_n_steps,
        adapter=adapter,
    )


def test_validating_first_is_no_learning(llama_folder, task_files, tmp_path, knowing):
    model, data = build(llama_folder, task_files[:2], adapter=LORA)
    trainer = trainer_for(data, tmp_path, [by_direction()])
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.fit(model, datamodule=data)
    trainer = trainer_for(data, tmp_path / "again", [by_direction()])
    with pytest.raises(AgclError, match="has learned tasks before"):
        trainer.fit(model, datamodule=data)


def test_a_report_does_not_compare_the_importance_of_different_pairs(llama_folder, task_files, tmp_path, knowing):
    model, data = build(llama_folder, task_files[:2], adapter=LORA)
    trainer_for(data, tmp_path, [by_direction(), ContinualReport()]).fit(model, datamodule=data)
    main(["report", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "Each task had a LoRA pair of its own" in page
    assert "Overlap of the tasks&#39; importance: cosine" not in page
    assert "Mean importance of each task" in page


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_saved_adapter_is_loaded_by_plain_peft(llama_folder, task_files, tmp_path, knowing, options, num_tasks):
    model, data = build(llama_folder, task_files[:num_tasks], adapter=LORA | options)
    trainer_for(data, tmp_path, [by_direction(), ContinualReport()]).fit(model, datamodule=data)
    assert model.model.active_adapters == [*(f"task{index}" for index in range(num_tasks - 1)), "learning"]
    assert_saved(model, data, tmp_path / "model", llama_folder)


def test_a_model_that_has_learned_pairs_is_no_place_for_other_tasks(llama_folder, task_files, tmp_path, knowing):
    model, data = build(llama_folder, task_files[:2], adapter=LORA)
    trainer = trainer_for(data, tmp_path, [by_direction()])
    trainer.fit(model, datamodule=data)
    wanted = trainer.callback_metrics["eval/task0/nll"]
    trainer = trainer_for(data, tmp_path, [by_direction()])
    trainer.validate(model, datamodule=data, verbose=False)
    assert trainer.callback_metrics["eval/task0/nll"] == wanted
    with pytest.raises(AgclError, match="has learned tasks before, each with a pair of its own"):
        trainer_for(data, tmp_path, [by_direction()]).fit(model, datamodule=data)


def test_a_fit_that_failed_in_its_set_up_may_be_tried_again(llama_folder, task_files, tmp_path, knowing):
    class Fails(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise CrashError

    model, data = build(llama_folder, task_files[:2], adapter=LORA)
    with pytest.raises(CrashError):
        trainer_for(data, tmp_path, [by_direction(), Fails()]).fit(model, datamodule=data)
    model.model = None
    trainer_for(data, tmp_path, [by_direction()]).fit(model, datamodule=data)
    assert model.model.active_adapters == ["task0", "learning"]


def test_checkpoint_is_validated_with_the_pairs_of_the_tasks_learned(llama_folder, task_files, tmp_path, knowing):
    assert_validates(llama_folder, task_files, tmp_path, by_direction, adapter=LORA)


def test_a_task_of_which_nothing_is_answered_leaves_the_next_a_fresh_pair(llama_folder, task_files, tmp_path):
    with pytest.warns(UserWarning, match="no training row is answered correctly"):
        _, look = run(llama_folder, task_files[:2], tmp_path, by_direction(own_text=0))
    ups = [name for name in look.begun[1] if ".lora_B.learning." in name]
    assert ups
    assert not any(look.begun[1][name].any() for name in ups)


def test_bytes_are_counted(llama_folder, task_files, tmp_path, knowing):
    callback = by_direction()
    _, look = run(llama_folder, task_files, tmp_path, callback)
    kept = sum(pair.nbytes for name, pair in look.begun[-1].items() if ".learning." not in name)
    merged = sum(pair.numel() for name, pair in look.begun[-1].items() if ".learning." in name)
    squares = sum(moment.nbytes for moment in callback._directions.moments.sums.values())
    assert callback.extra_bytes() == kept + merged + squares  # the gate is gone


OTHERS = [
    ({"peft_type": "IA3", "target_modules": ["v_proj"], "feedforward_modules": []}, "is IA3, not LORA"),
    (LORA | {"use_dora": True}, "`adapter.use_dora` leaves magnitudes"),
    (LORA | {"modules_to_save": ["lm_head"]}, "`adapter.modules_to_save` leaves whole modules"),
    (LORA | {"init_lora_weights": "pissa"}, "`adapter.init_lora_weights: pissa` cannot be drawn anew"),
    (LORA | {"bias": "lora_only"}, "`adapter.bias: lora_only` leaves biases"),
    (LORA | {"lora_bias": True}, "`adapter.lora_bias` leaves biases"),
    (LORA | {"target_modules": ["embed_tokens", "q_proj"]}, "takes in an embedding"),
]


@pytest.mark.parametrize(("adapter", "message"), OTHERS)
def test_what_is_no_plain_pair_is_gated_by_entry_unless_asked_otherwise(
    llama_folder, task_files, tmp_path, knowing, adapter, message
):
    with pytest.raises(AgclError, match=message):
        run(llama_folder, task_files[:2], tmp_path, by_direction(), adapter=adapter)
    callback = AttributionCallback()
    run(llama_folder, task_files[:2], tmp_path, callback, adapter=adapter)
    assert callback._directions is None
    assert callback.importance


def test_without_a_first_matrix_among_the_parameters_pairs_are_none(llama_folder, task_files, tmp_path, knowing):
    with pytest.raises(AgclError, match=r"no pair's first matrix \(`lora_A`\) is among the selected"):
        run(llama_folder, task_files[:2], tmp_path, by_direction(parameters="lora_B"))
    callback = AttributionCallback(parameters="lora_B")
    model, _ = run(llama_folder, task_files[:2], tmp_path, callback)
    assert callback._directions is None
    assert model.model.active_adapters == ["default"]


def test_another_method_with_pairs_of_its_own_is_refused(llama_folder, task_files, tmp_path):
    for callbacks in ([OLoRA(), by_direction()], [by_direction(), OLoRA()]):
        model, data = build(llama_folder, task_files, adapter=LORA)
        with pytest.raises(AgclError, match="OLoRA and `directions` of AttributionCallback both"):
            trainer_for(data, tmp_path, callbacks).fit(model, datamodule=data)


def test_the_budget_is_the_same_for_each_task(llama_folder, task_files, tmp_path, knowing):
    callback = by_direction(0.6, own_text=3)
    model, data = build(llama_folder, task_files, adapter=LORA)
    seen = []

    class Check(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(check_budget(callback, 0.6, callback.plasticity()))

    trainer_for(data, tmp_path, [callback, Check()]).fit(model, datamodule=data)
    assert len(seen) == 6 * EPOCHS
