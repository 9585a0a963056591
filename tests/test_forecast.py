"""The forecast's figures against counts on models of known size."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from agcl.errors import AgclError
from agcl.forecast import MACHINES, Machine, ModelSize, Settings, Work, forecast


def saved_bytes(config, tokens, precision):
    """Bytes that autograd keeps of one row's forward pass, parameters aside."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if precision == "bf16":
        model.to(torch.bfloat16)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that its address is not used again
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    return sum(size for size, _ in kept.values())


def activation_bytes(width, inner, precision):
    """Bytes for each token and layer."""

    def of(layers, tokens):
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        return saved_bytes(config, tokens, precision)

    return ((of(2, 48) - of(2, 16)) - (of(1, 48) - of(1, 16))) / 32


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16"])
def test_activations_are_as_autograd_keeps_them(precision):
    size = ModelSize(0, 0, 0, 0, layers=1, width=96, inner=160, vocabulary=0)
    passes = forecast(size, Settings(precision, gate=False), Work(1, 1, rows=1, tokens=1), MACHINES["cpu"]).training
    assert activation_bytes(96, 160, precision) == pytest.approx(passes["passes"], rel=0.01)


GIGA = 10**9
SIZE = ModelSize(GIGA, GIGA, GIGA, largest=GIGA // 4, layers=10, width=2000, inner=8000, vocabulary=50_000)
WORK = Work(num_tasks=3, steps=100, rows=8, tokens=50, answer_tokens=10, samples=16, attributed_rows=8)


def test_one_process_by_hand():
    found = forecast(SIZE, Settings("32", state_bytes=8), WORK, Machine("m", None, (GIGA * 60, 1), GIGA))
    passes = 8 * 50 * 10 * (40 * 2000 + 16 * 8000) + 8 * 10 * 50_000 * 16
    assert found.kept == {"weights": 4 * GIGA, "gradients": 4 * GIGA, "optimizer": 8 * GIGA, "importance": GIGA}
    assert found.training == {"passes": passes, "gate": GIGA}
    assert found.boundary == {"scores": 4 * GIGA, "passes": passes}
    assert found.peak_bytes == 21 * GIGA + passes
    # A token costs 6 operations a weight: 0.1 s; a pass costs 67 s whatever its tokens are, a step 28 s.
    assert found.seconds == pytest.approx(
        {
            "training": 100 * (67 + 28),
            "gate": 100 * 29,
            "attribution": 3 * 16 * 67 * 1.09,
            "normalising importance": 3 * 8.9,
        }
    )
    assert found.files == {"one checkpoint": 13 * GIGA, "importance of all tasks": 3 * GIGA}
    long = replace(WORK, tokens=1000)
    longer = forecast(SIZE, Settings("32"), long, Machine("m", None, (GIGA * 60, 1), GIGA)).seconds
    assert longer["training"] == pytest.approx(100 * (800 + 28))


def test_sharding_divides_what_is_kept_for_each_weight_and_ddp_does_not():
    cpu = MACHINES["cpu"]
    one, ddp, fsdp = (
        forecast(SIZE, Settings("32", strategy, devices), WORK, cpu)
        for strategy, devices in (("ddp", 1), ("ddp", 8), ("fsdp", 8))
    )
    assert ddp.kept == {**one.kept, "gradients": 2 * one.kept["gradients"]}
    gathered = 2 * 4 * GIGA // 10  # two of ten layers
    assert fsdp.kept == {name: size // 8 for name, size in one.kept.items()} | {"gathered layers": gathered}
    assert fsdp.boundary["scores"] * 8 == one.boundary["scores"]
    assert ddp.seconds["attribution"] == pytest.approx(one.seconds["attribution"] / 8)


def test_an_adapter_trains_and_keeps_little():
    size = replace(SIZE, trained=GIGA // 100, gated=GIGA // 100, largest=1000)
    found = forecast(size, Settings("32"), WORK, MACHINES["cpu"])
    assert found.kept["optimizer"] == 8 * GIGA // 100
    long = forecast(size, Settings("32"), replace(WORK, tokens=2000), MACHINES["cpu"])
    whole = forecast(SIZE, Settings("32"), replace(WORK, tokens=2000), MACHINES["cpu"])
    assert long.seconds["training"] / whole.seconds["training"] == pytest.approx(4.02 / 6, rel=0.01)


def test_checkpointing_gates_and_precision_change_what_they_should():
    cpu = MACHINES["cpu"]
    plain = forecast(SIZE, Settings("32", gate=False), WORK, cpu)
    assert plain.boundary == {}
    assert "importance" not in plain.kept
    checkpointed = forecast(SIZE, Settings("32", gate=False, gradient_checkpointing=True), WORK, cpu)
    layer = 8 * 50 * (40 * 2000 + 16 * 8000)
    assert plain.training["passes"] - checkpointed.training["passes"] == 9 * layer - 10 * 8 * 50 * 2000 * 4
    half = forecast(SIZE, Settings("bf16", state_bytes=4), WORK, cpu)
    assert half.kept["weights"] == 2 * GIGA
    on_host = forecast(SIZE, Settings("32", importance_on_host=True), WORK, cpu)
    assert on_host.host == {"importance": GIGA}
    assert "importance" not in on_host.kept
    finer = forecast(SIZE, Settings("32", importance_bytes=2, file_bytes=2), WORK, cpu)
    assert finer.files["importance of all tasks"] == 2 * on_host.files["importance of all tasks"]


def test_unknown_settings_are_refused():
    with pytest.raises(AgclError, match="`precision` is 'int4'"):
        Settings("int4")
    with pytest.raises(AgclError, match="`devices` is 0"):
        Settings(devices=0)
