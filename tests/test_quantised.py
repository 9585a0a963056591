"""Adapters on weights that bitsandbytes has quantised (QLoRA); `make test` runs them by themselves, where it is."""

from functools import partial

import pytest
import torch
from conftest import save_tiny_model
from helpers import assert_resumes, attribution, build, by_direction, slow, trainer_for
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from agcl.attribution.directions import MomentSums, find_matrices, input_moments
from agcl.attribution.estimators import LRP, Evidence
from agcl.attribution.passes import Sample
from agcl.attribution.relevance import attribute_batch
from agcl.attribution.selfcheck import check_model
from agcl.callbacks import ContinualReport
from agcl.cli import main
from agcl.errors import AgclError
from agcl.models import load_model
from agcl.scoring import answer_logits
from agcl.task_pairs import pairs_of

pytest.importorskip("bitsandbytes")

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
EIGHT = {"load_in_8bit": True}
LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
SAMPLES = [
    Sample(torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([2, 4]), torch.tensor([1, 9])),
    Sample(torch.tensor([2, 7, 1, 8, 2, 8, 1]), torch.tensor([3]), torch.tensor([2])),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model wide enough for all that bitsandbytes does to weights while a CPU evaluates them."""
    wide = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 16}
    return save_tiny_model(tmp_path_factory.mktemp("wide"), "llama", **wide)


def with_pairs(model):
    """A LoRA adapter on a model, the same on each, whose second matrices are not zero."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def both(folder):
    """A model with quantised weights, and one with the same numbers in float32."""
    whole = load_model(str(folder), quantization_config=FOUR).dequantize()
    return with_pairs(load_model(str(folder), quantization_config=FOUR)), with_pairs(whole.float())


def learned_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("rule", ["attnlrp", "cplrp", "none"])
def test_gradients_are_those_of_the_dequantised_model(both, rule):
    found = []
    for model in both:
        each = {}
        attribute_batch(
            model,
            SAMPLES,
            consume=lambda name, _, gradient, each=each: each.setdefault(name, []).append(gradient),
            rule=rule,
            only_correct=False,
        )
        found.append(each)
    quantised, whole = found
    assert quantised.keys() == whole.keys() <= set(learned_names(both[0]))
    for name, gradients in whole.items():
        scale = float(torch.stack(gradients).abs().max())
        for ours, expected in zip(quantised[name], gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_pairs_tell_the_moments_of_the_weights_beside_them(both):
    found = []
    for model, by_pair in zip(both, (True, False), strict=True):
        names = learned_names(model)
        pairs = pairs_of(model, names)
        looked_at = names if by_pair else [*names, *pairs]
        matrices = find_matrices(model, looked_at, SAMPLES[0], "attnlrp", pairs if by_pair else {})
        assert matrices == dict.fromkeys(pairs, False)
        evidence = Evidence(model, looked_at, SAMPLES, 2, batch_size=2, only_correct=False)
        sums = MomentSums(matrices, pairs if by_pair else {})
        found.append(input_moments(evidence, LRP(), sums).normalised().sums)
    for name, moment in found[1].items():
        torch.testing.assert_close(found[0][name], moment, rtol=1e-3, atol=1e-4 * float(moment.max()), msg=name)


def test_the_check_of_a_model_sees_through_them(both):
    checks = [check_model(model, torch.tensor([[3, 1, 4, 1, 5, 9]])) for model in both]
    assert [check.verdict for check in checks] == ["supported"] * 2
    quantised, whole = checks
    assert quantised.firings == whole.firings
    assert len(quantised.layers) == len(whole.layers)


@pytest.mark.parametrize("config", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_old_answers_are_held(folder, task_files, tmp_path, knowing, config):
    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if pl_module.tasks.ends_at(trainer.current_epoch):
                changed.append(answer_logits(pl_module.model.eval(), batch)[0].detach().clone())
                pl_module.model.train()

    change = {}
    for kind, callback in (("held", by_direction(0.2, own_text=2)), ("free", attribution(directions=None))):
        model, data = build(folder, task_files[:2], adapter=LORA, quantization_config=config)
        data.setup("fit")
        batch, changed = next(iter(data.val_dataloader()[0])), []
        trainer_for(data, tmp_path / kind, [callback, Look()]).fit(model, datamodule=data)
        change[kind] = float((changed[1] - changed[0]).square().mean())
    assert change["held"] < 0.5 * change["free"]


@pytest.mark.parametrize(("config", "crash_at"), [(FOUR, 8), *slow((EIGHT, 3))])
def test_resumed_run_equals_the_straight_one(folder, task_files, tmp_path, knowing, config, crash_at):
    make = partial(by_direction, every=2)
    options = {"adapter": LORA, "quantization_config": config}
    assert_resumes(folder, task_files, tmp_path, make, crash_at, **options)


def test_checkpoints_hold_the_adapter_and_no_quantised_weight(folder, task_files, tmp_path, knowing):
    options = {"adapter": LORA, "quantization_config": FOUR}
    model, data = build(folder, task_files[:2], **options)
    saving = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
    trainer = trainer_for(data, tmp_path, [by_direction(), saving], enable_checkpointing=True)
    trainer.fit(model, datamodule=data)
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(weight.is_floating_point() for weight in weights.values())
    assert not any(".base_layer." in name for name in weights)
    wanted = trainer.callback_metrics["eval/task0/nll"]
    again, data = build(folder, task_files[:2], **options)
    trainer = trainer_for(data, tmp_path, [by_direction()])
    trainer.validate(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert trainer.callback_metrics["eval/task0/nll"] == wanted
    model.save_pretrained(tmp_path / "adapter")
    base = load_model(str(folder), quantization_config=FOUR)
    batch = next(iter(data.val_dataloader()[0]))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = answer_logits(model.model.eval(), batch)[0]
    torch.testing.assert_close(answer_logits(loaded, batch)[0], expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_quantised_cannot_be_trained_themselves(folder):
    with pytest.raises(AgclError, match="that `quantization_config` quantises cannot be trained: train an `adapter`"):
        load_model(str(folder), quantization_config=FOUR, is_trained_whole=True)


def test_a_missing_package_is_named(folder, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("needs something: `pip install something`")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(AgclError, match=r"install what it needs .*`pip install something`"):
        load_model(str(folder), quantization_config=FOUR)


def test_a_run_goes_on_from_another_one_whose_weights_cannot_be_compared(folder, task_files, tmp_path, knowing):
    options = {"adapter": LORA, "quantization_config": FOUR}
    model, data = build(folder, task_files[:1], **options)
    saving = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
    trainer_for(data, tmp_path, [by_direction(), saving], enable_checkpointing=True).fit(model, datamodule=data)
    model, data = build(folder, task_files[1:2], **options)
    callback = by_direction(earlier=str(tmp_path / "last.ckpt"))
    trainer_for(data, tmp_path / "next", [callback]).fit(model, datamodule=data)
    # The model's own text was not written; the first run's task counts as much as its own.
    assert all(moment.trace() == pytest.approx(2) for moment in callback._directions.moments.sums.values())


def test_an_exported_task_computes_what_its_run_did_on_the_weights_that_its_card_loads(
    folder, task_files, tmp_path, knowing
):
    """Out of the run's checkpoint, which has no quantised weights."""
    model, data = build(folder, task_files[:2], adapter=LORA, quantization_config=FOUR)
    saving = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    callbacks = [by_direction(), ContinualReport(), saving]
    trainer_for(data, tmp_path, callbacks, enable_checkpointing=True).fit(model, datamodule=data)
    main(["export", str(tmp_path), "--output", str(tmp_path / "first"), "--task", "task0"])
    main(["export", str(tmp_path), "--output", str(tmp_path / "last")])
    card = (tmp_path / "last" / "README.md").read_text()
    code = card.split("```python")[1].split("```")[0].replace(f'"{folder.name}"', repr(str(folder)))
    assert "quantization_config={'load_in_4bit': True" in code
    batch = next(iter(data.val_dataloader()[0]))
    expected, apart = answer_logits(model.model.eval(), batch)[0].detach(), {}
    for name in ("first", "last"):
        names: dict = {"FOLDER": str(tmp_path / name)}
        exec(code, names)
        apart[name] = float((answer_logits(names["model"].eval(), batch)[0].detach() - expected).abs().max())
    # On some CPUs transformers' model computes in bfloat16 while it is evaluated; the other task's is further away.
    assert apart["last"] < 5e-3
    assert apart["first"] > 10 * apart["last"]
