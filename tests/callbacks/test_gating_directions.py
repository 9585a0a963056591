"""AttributionCallback with `directions`, in whole runs on a tiny model."""

from pathlib import Path

import pytest
import torch
from helpers import (
    EPOCHS,
    CrashAt,
    CrashError,
    WeightsAtBoundaries,
    assert_resumes,
    attribution,
    build,
    by_direction,
    check_budget,
    slow,
    trainer_for,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from agcl.attribution.directions import MomentSums
from agcl.attribution.estimators import LRP, Wanda
from agcl.attribution.uses import Use
from agcl.callbacks import AttributionCallback, Directions
from agcl.callbacks.directions import DirectionsSoFar
from agcl.errors import AgclError


def fit(folder, files, run_dir, callback, **options):
    model, data = build(folder, files)
    boundaries = WeightsAtBoundaries()
    trainer = trainer_for(data, run_dir, [callback, boundaries], **options)
    trainer.fit(model, datamodule=data)
    return model, boundaries.weights


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_matrices_hardly_move_in_the_directions_that_the_first_task_needs(
    llama_folder, task_files, tmp_path, knowing, monkeypatch, precision
):
    callback = by_direction(0.2, every=2)
    moments = {}
    learn = DirectionsSoFar.learn

    def keep(self, evidence, *observed):
        learn(self, evidence, *observed)
        moments.update({} if moments else {name: tensor.clone() for name, tensor in self.moments.sums.items()})

    monkeypatch.setattr(DirectionsSoFar, "learn", keep)
    control = by_direction(0.2, every=2, control="shuffled")
    _, (first, second, _) = fit(llama_folder, task_files, tmp_path / "own", callback, precision=precision)
    _, (_, shuffled, _) = fit(llama_folder, task_files, tmp_path / "shuffled", control, precision=precision)

    def effect(after, name):
        moved = after[name] - first[name]
        return float((moved @ moments[name] * moved).sum() / moved.square().sum())

    assert len(moments) == 14
    for name in moments:
        assert effect(second, name) < 0.1 * effect(shuffled, name), name


def test_a_task_is_passed_once_for_importance_and_directions(llama_folder, task_files, tmp_path, knowing, monkeypatch):
    found, learn = {}, DirectionsSoFar.learn
    for per_sample in (True, False):  # a sum of rows says nothing of each
        callback = by_direction(num_samples=3, batch_size=2, per_sample=per_sample)
        model, data = build(llama_folder, task_files[:2])
        passes = []

        def counted(self, evidence, observed, passes=passes):
            handle = evidence.model.register_forward_pre_hook(lambda *_: passes.append(1))
            learn(self, evidence, observed)
            handle.remove()

        monkeypatch.setattr(DirectionsSoFar, "learn", counted)
        trainer_for(data, tmp_path / str(per_sample), [callback]).fit(model, datamodule=data)
        assert len(passes) == (0 if per_sample else 2 * 2)  # two tasks, three rows by two
        found[per_sample] = callback._directions.moments.sums
    assert found[True].keys() == found[False].keys()


def test_matrices_hardly_move_in_the_directions_of_what_the_model_wrote_itself(
    llama_folder, task_files, tmp_path, knowing, monkeypatch
):
    callback = by_direction(0.2, every=2, own_text=8)
    learn, moments = DirectionsSoFar.learn, {}

    def keep(self, evidence, *observed):
        learn(self, evidence, *observed)
        if not moments:
            assert evidence.num_used == 8  # though drawn tokens are not the likeliest
            moments.update(self.moments.sums)

    monkeypatch.setattr(DirectionsSoFar, "learn", keep)
    start = AutoModelForCausalLM.from_pretrained(llama_folder).state_dict()
    _, (held, *_) = fit(llama_folder, task_files, tmp_path / "held", callback)
    _, (free, *_) = fit(llama_folder, task_files, tmp_path / "free", by_direction())

    def effect(after, name):
        moved = after[name] - start[name]
        return float((moved @ moments[name] * moved).sum() / moved.square().sum())

    assert len(moments) == 14
    for name in moments:
        # A random model's inputs point almost everywhere, so that the gate has little to choose between.
        assert effect(held, name) < 0.7 * effect(free, name), name


def test_each_task_counts_as_much_as_what_the_model_wrote_itself(llama_folder, task_files, tmp_path, knowing):
    callback = by_direction(own_text=3)
    fit(llama_folder, task_files, tmp_path, callback)
    assert all(
        moment.trace() == pytest.approx(1 + len(task_files)) for moment in callback._directions.moments.sums.values()
    )


@pytest.mark.parametrize("own_text", [0, 4])
def test_the_budget_is_the_same_for_each_task(llama_folder, task_files, tmp_path, knowing, own_text):
    means = []

    class Mean(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            plasticity = callback.plasticity()
            means.append({n: p for n, p in plasticity.items() if n.endswith("proj.weight")})
            assert trainer.current_epoch < EPOCHS or set(plasticity) == set(callback.importance)
            if means[-1]:
                check_budget(callback, 0.7, plasticity)

    callback = by_direction(0.7, own_text=own_text)
    model, data = build(llama_folder, task_files)
    trainer_for(data, tmp_path, [callback, Mean()]).fit(model, datamodule=data)
    if not own_text:
        assert means[0] == {}  # nothing is to be kept yet
    for gated in (means[0 if own_text else -1], means[2 * EPOCHS], means[-1]):
        assert len(gated) == 14
        assert sum(mean == pytest.approx(0.7, abs=1 / 255) for mean in gated.values()) > 7
    assert callback.plasticity() == {}  # no gate is left behind


def test_uniform_control_is_the_budget_in_every_direction(llama_folder, task_files, tmp_path, knowing):
    model, data = build(llama_folder, task_files)
    seen = []

    class Maps(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == EPOCHS:
                plasticity = callback.plasticity()
                check_budget(callback, 0.6, plasticity)
                # What has no directions is gated to its own mean.
                entries = [levels for name, levels in callback.importance.items() if not name.endswith("proj.weight")]
                mean = torch.cat([levels.flatten() for levels in entries]).double().mean() / 255
                flat = [value for name, value in plasticity.items() if not name.endswith("proj.weight")]
                assert flat == [pytest.approx(1 - float(mean), abs=1e-5)] * len(entries)
                seen.extend(held for held, _ in callback._directions._gate._maps.values())

    callback = by_direction(0.6, control="flattened")
    trainer_for(data, tmp_path, [callback, Maps()]).fit(model, datamodule=data)
    assert seen
    for held in seen:
        product = held @ held.T
        assert torch.allclose(product, product[0, 0] * torch.eye(len(held)), atol=1e-3)


@pytest.mark.parametrize(
    ("crash_at", "own_text"),
    [(7, 0), (11, 0), (1, 3), (7, 3), *slow((8, 0), (2, 3), (3, 3), (4, 3), (5, 3), (6, 3), (8, 3))],
)
def test_resumed_run_equals_the_straight_one(llama_folder, task_files, tmp_path, knowing, crash_at, own_text):
    def callback():  # more steps from product to product than an epoch has
        return by_direction(every=4, own_text=own_text)

    assert_resumes(llama_folder, task_files, tmp_path, callback, crash_at)


def test_own_text_is_held_on_after_resuming_though_no_row_is_answered(llama_folder, task_files, tmp_path, monkeypatch):
    monkeypatch.setattr("agcl.attribution.relevance.is_correct", lambda logits, targets: False)
    assert_resumes(llama_folder, task_files, tmp_path, lambda: by_direction(every=4, own_text=3), crash_at=6)


def test_moments_stay_in_host_memory_if_they_are_to():
    state = {"sums": {"weight": torch.eye(3)}, "transposed": {"weight": False}, "gate": {}}
    for on_host, where in ((True, "cpu"), (False, "meta")):
        directions = DirectionsSoFar(Directions(), LRP(), "none", on_host=on_host)
        directions.load_state_dict(state)
        directions.to(torch.device("meta"))  # stands for any other device
        assert directions.moments.sums["weight"].device.type == where


def test_moments_are_added_up_where_they_are_held():
    use = Use("linear", lambda: torch.eye(3), 1)
    sums = MomentSums({"weight": False}, home=torch.device("meta"))  # stands for any other place than the inputs'
    for _ in range(2):
        sums.observe("weight", use, torch.ones(3, 2))
    assert sums._sums["weight"].device.type == "meta"
    directions = DirectionsSoFar(Directions(), LRP(), "none", on_host=True)
    assert directions._sums()._home == torch.device("cpu")


@pytest.mark.parametrize("make", [attribution, by_direction])
def test_a_callback_forgets_an_earlier_run(llama_folder, task_files, tmp_path, knowing, make):
    used = make()
    fit(llama_folder, task_files[:2], tmp_path / "earlier", used)
    again, _ = fit(llama_folder, task_files[1:], tmp_path / "again", used)
    fresh, _ = fit(llama_folder, task_files[1:], tmp_path / "fresh", make())
    assert sorted(used.files) == ["task0", "task1"]
    assert all(tmp_path / "again" in Path(file).parents for file in used.files.values())
    for name, parameter in weights(fresh.model).items():
        assert torch.equal(parameter, weights(again.model)[name]), name


def killed_by_entry(folder, files, run_dir):
    """The checkpoint of a run that gates by entry, killed while it learns the second task."""
    model, data = build(folder, files)
    saving = ModelCheckpoint(run_dir / "kept", filename="last", every_n_epochs=1)
    with pytest.raises(CrashError):
        trainer_for(data, run_dir, [attribution(), CrashAt(8), saving], enable_checkpointing=True).fit(
            model, datamodule=data
        )
    return run_dir / "kept" / "last.ckpt"


def test_a_run_goes_on_as_it_began(llama_folder, task_files, tmp_path, knowing):
    checkpoint = killed_by_entry(llama_folder, task_files, tmp_path)
    model, data = build(llama_folder, task_files)
    with pytest.raises(AgclError, match="computed without `directions`; keep to it"):
        trainer_for(data, tmp_path, [by_direction()]).fit(model, datamodule=data, ckpt_path=checkpoint)


def test_bytes_are_counted(llama_folder, task_files, tmp_path, knowing):
    callback, found, held = by_direction(0.9), [], {}

    class Count(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.append(callback.extra_bytes())
            if gate := callback._directions._gate:
                held.update({name: tensor.numel() for name, (tensor, _) in gate._maps.items()})

    model, data = build(llama_folder, task_files[:2])
    trainer_for(data, tmp_path, [callback, Count()]).fit(model, datamodule=data)
    entries = sum(parameter.numel() for parameter in model.model.parameters())
    matrices = [p for name, p in model.model.named_parameters() if name.endswith("proj.weight")]
    assert found[-1] == entries + 4 * (sum(held.values()) + sum(p.numel() + p.shape[1] ** 2 for p in matrices))
    assert sum(held.values()) < sum(p.shape[1] ** 2 for p in matrices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Directions(plasticity=1.0), "`directions.plasticity` is 1.0"),
        (lambda: Directions(every=0), "`directions.every` is 0"),
        (lambda: Directions(sharpness=0), "`directions.sharpness` is 0"),
        (lambda: Directions(own_text=-1), "`directions.own_text` is -1"),
        (lambda: Directions(own_tokens=1), "`directions.own_tokens` is 1"),
        (lambda: by_direction(estimator=Wanda()), "the estimator Wanda does not take"),
        (lambda: by_direction(source="single_task"), "`directions` and `source: single_task` do not work together"),
        (lambda: by_direction(strength=0), "`strength: 0` is no gate"),
        (lambda: by_direction(reestimate=2), "`directions` and `reestimate` do not work together"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(AgclError, match=message):
        make()


def test_without_a_matrix_it_is_refused_before_training(llama_folder, task_files, tmp_path):
    with pytest.raises(AgclError, match="none of the selected parameters is one"):
        fit(llama_folder, task_files, tmp_path, by_direction(parameters="norm"))


def gated_by_direction(callback, folder, files, run_dir):
    """The parameters gated by direction while the second task is learned."""
    seen, gated = {}, set()

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.update(callback.plasticity())
            if callback._directions and seen:
                check_budget(callback, 0.8, seen)
                gated.update(callback._directions.names())

    model, data = build(folder, files[:2])
    trainer_for(data, run_dir, [callback, Look()]).fit(model, datamodule=data)
    assert seen
    return gated


def test_left_to_itself_it_gates_matrices_by_direction(llama_folder, task_files, tmp_path, knowing):
    gated = gated_by_direction(AttributionCallback(), llama_folder, task_files, tmp_path)
    assert len(gated) == 14
    assert all(name.endswith("proj.weight") for name in gated)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": Wanda()},
        {"source": "single_task"},
        {"reestimate": 2},
        {"parameters": "norm"},
        {"directions": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_left_to_itself_it_gates_by_entry_where_there_are_no_directions(
    llama_folder, task_files, tmp_path, knowing, options
):
    callback = AttributionCallback(num_samples=2, **options)
    assert not gated_by_direction(callback, llama_folder, task_files, tmp_path)


def test_a_run_begun_by_entry_goes_on_so_where_the_choice_is_left(llama_folder, task_files, tmp_path, knowing):
    checkpoint = killed_by_entry(llama_folder, task_files, tmp_path)
    straight, _ = fit(llama_folder, task_files, tmp_path / "straight", attribution())
    model, data = build(llama_folder, task_files)
    callback = attribution(directions="auto")
    trainer_for(data, tmp_path / "resumed", [callback]).fit(model, datamodule=data, ckpt_path=checkpoint)
    for name, parameter in weights(straight.model).items():
        assert torch.equal(parameter, weights(model.model)[name]), name
