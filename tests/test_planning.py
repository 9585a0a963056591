"""`agcl plan` on a configuration of the user's own."""

import dataclasses

import pytest
import torch
from conftest import tiny_config
from helpers import write_config
from transformers import AutoModelForCausalLM

from agcl import planning
from agcl.cli import main
from agcl.forecast import MACHINES, Work, forecast
from agcl.lightning_cli import FitConfiguration

LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}


def configuration(path, *options):
    return FitConfiguration(
        ["--config", str(path), *options], prog="agcl plan", description="", options=planning.Assumptions
    ).config


@pytest.mark.parametrize("adapter", [None, LORA])
def test_weights_are_counted_without_the_checkpoint(llama_folder, task_files, tmp_path, adapter):
    folder = tmp_path / "configuration_alone"
    folder.mkdir()
    (folder / "config.json").write_text((llama_folder / "config.json").read_text())
    config = configuration(write_config(folder, task_files, tmp_path, model__adapter=adapter))
    size = planning.model_size(config)
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny_config("llama")).parameters())
    if adapter is None:
        assert (size.weights, size.trained, size.gated) == (weights, weights, weights)
        assert size.largest == size.vocabulary * size.width  # the embedding, tied to the head
    else:
        # r * (inputs + outputs) of q, k, v, o and the three maps of the MLP, in two layers
        added = 4 * 2 * (32 + 24 + 24 + 32 + 3 * 48)
        # Gated by direction, each of the three tasks gets a pair.
        assert (size.weights, size.trained, size.gated) == (weights + 3 * added, added, added)
        by_entry = {"class_path": "agcl.AttributionCallback", "init_args": {"directions": None}}
        options = {"model__adapter": adapter, "trainer__callbacks": [by_entry]}
        size = planning.model_size(configuration(write_config(folder, task_files, tmp_path, **options)))
        assert (size.weights, size.trained, size.gated) == (weights + added, added, added)
    assert (size.layers, size.width, size.inner) == (2, 16, 32)


@pytest.mark.parametrize(("bits", "each"), [(4, 4.5 / 8), (8, 1)])
def test_quantised_weights_take_fewer_bytes(llama_folder, task_files, tmp_path, bits, each):
    def plan(**options):
        gate = {"class_path": "agcl.AttributionCallback", "init_args": options.pop("gate", {})}
        given = {"model__adapter": LORA, "trainer__callbacks": [gate], **options}
        config = configuration(write_config(llama_folder, task_files, tmp_path, **given))
        size = planning.model_size(config)
        return size, forecast(size, planning.read_settings(config, MACHINES["cpu"]), Work(2, 100), MACHINES["cpu"])

    plain, whole = plan()
    quantised, small = plan(model__quantization_config={f"load_in_{bits}bit": True})
    linear = sum(
        w.numel() for n, w in AutoModelForCausalLM.from_config(tiny_config("llama")).named_parameters() if "proj" in n
    )
    assert (quantised.weights, quantised.quantised, plain.quantised) == (plain.weights, linear, 0)
    assert whole.kept["weights"] - small.kept["weights"] == linear * 4 - int(linear * each)
    assert whole.files["one checkpoint"] - small.files["one checkpoint"] == linear * 4
    _, on_host = plan(gate={"importance_on": "host"})
    moments = 4 * plain.squares
    assert whole.kept["directions"] - on_host.kept["directions"] == whole.boundary["new moments"] == moments
    assert on_host.host["moments"] == 2 * moments


def test_only_named_parameters_count_as_gated(llama_folder, task_files, tmp_path):
    callbacks = [{"class_path": "agcl.AttributionCallback", "init_args": {"parameters": "up_proj"}}]
    config = configuration(write_config(llama_folder, task_files, tmp_path, trainer__callbacks=callbacks))
    assert planning.model_size(config).gated == 2 * 16 * 32
    without = configuration(write_config(llama_folder, task_files, tmp_path, trainer__callbacks=[]))
    assert planning.model_size(without).gated == 0
    assert not planning.read_settings(without, MACHINES["cpu"]).gate


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_directions_are_forecast_from_the_shapes_of_the_matrices(request, task_files, tmp_path, family):
    options = {"directions": {"plasticity": 0.5, "every": 4, "own_text": 500, "own_tokens": 32}}
    callbacks = [{"class_path": "agcl.AttributionCallback", "init_args": options}]
    folder = request.getfixturevalue(f"{family}_folder")
    config = configuration(write_config(folder, task_files, tmp_path, trainer__callbacks=callbacks))
    size = planning.model_size(config)
    # (inputs, outputs) of the maps of a block; the output's weights are the embedding's
    llama = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 32), (16, 32), (32, 16)]
    block = llama if family == "llama" else [(16, 48), (16, 16), (16, 64), (64, 16)]
    assert size.matrices == 2 * sum(i * o for i, o in block)
    assert size.squares == 2 * sum(i * i for i, _ in block)
    found = forecast(size, planning.read_settings(config, MACHINES["cpu"]), Work(2, 100), MACHINES["cpu"])
    assert found.kept["directions"] == 8 * size.squares + 4 * size.matrices
    products = 2 * sum(i * i * o for i, o in block)
    flops = MACHINES["cpu"].flops[0]
    assert found.seconds["directions"] == pytest.approx(100 / 4 * 2 * products / flops)
    # Each token is computed once to be written, and once, with its gradients, to be attributed.
    assert found.seconds["own text"] == pytest.approx(500 * 32 * (2 + 6) * size.weights / flops)


@pytest.mark.parametrize(
    ("options", "strategy", "by_direction"),
    [
        ({}, "auto", True),
        ({"directions": "auto", "estimator": {"class_path": "agcl.attribution.estimators.Fisher"}}, "auto", True),
        ({"estimator": {"class_path": "agcl.attribution.estimators.Wanda"}}, "auto", False),
        ({"source": "single_task"}, "auto", False),
        ({"reestimate": 4}, "auto", False),
        ({"strength": 0.0}, "auto", False),
        ({"directions": None}, "auto", False),
        ({}, "lightning.pytorch.strategies.ModelParallelStrategy", False),
    ],
)
def test_the_kind_of_gate_is_chosen_as_in_training(llama_folder, task_files, tmp_path, options, strategy, by_direction):
    callbacks = [{"class_path": "agcl.AttributionCallback", "init_args": options}]
    given = {"trainer__callbacks": callbacks, "trainer__strategy": strategy}
    size = planning.model_size(configuration(write_config(llama_folder, task_files, tmp_path, **given)))
    assert (size.squares > 0) == by_direction


def test_a_callback_may_stand_alone_or_among_the_extra_ones(llama_folder, task_files, tmp_path):
    gate = {"class_path": "agcl.AttributionCallback", "init_args": {"num_samples": 7}}
    alone = write_config(llama_folder, task_files, tmp_path, trainer__callbacks=gate)
    assert planning.attribution_options(configuration(alone)).num_samples == 7
    extra = write_config(llama_folder, task_files, tmp_path, trainer__callbacks=[], extra_callbacks=[gate])
    assert planning.attribution_options(configuration(extra)).num_samples == 7


def test_a_wrong_option_is_one_line(llama_folder, task_files, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--config", str(write_config(llama_folder, task_files, tmp_path)), "--rows", "many"])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("agcl: error: ")
    assert line.endswith("See `agcl plan --help`.")


def test_settings_are_read_from_the_configuration(llama_folder, task_files, tmp_path):
    options = {"importance_bits": 16, "merge": "mean", "control": "shuffled", "importance": {"top_k": 8}}
    path = write_config(
        llama_folder,
        task_files,
        tmp_path,
        trainer__callbacks=[{"class_path": "agcl.AttributionCallback", "init_args": options}],
        trainer__precision="bf16-true",
        trainer__strategy={"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"},
        trainer__devices=2,
        trainer__num_nodes=4,
        trainer__accumulate_grad_batches=2,
    )
    config = configuration(path, "--rows", "100")
    settings = planning.read_settings(config, MACHINES["h100"])
    assert (settings.precision, settings.strategy, settings.devices, settings.shards) == ("bf16", "fsdp", 8, 8)
    assert settings.state_bytes == 4  # two bfloat16 moments
    assert settings.importance_bytes == 8  # merge 4, gate 2, its shuffled copy 2
    assert (settings.aggregation, settings.top_k) == ("blocks", 8)
    work = planning.read_work(config, settings.devices)
    # 100 rows on 8 devices are 13 each: 7 batches of 2, 4 steps; three tasks of 30 epochs.
    assert (work.num_tasks, work.steps, work.micro_batches, work.rows, work.samples) == (3, 4 * 90, 2, 2, 32)


@pytest.mark.parametrize(
    ("name", "options", "state_bytes"),
    [("SGD", {"lr": 0.1}, 0), ("SGD", {"lr": 0.1, "momentum": 0.9}, 4), ("Adam", {"amsgrad": True}, 12)],
)
def test_the_optimizers_state_is_counted(name, options, state_bytes):
    named = {"class_path": f"torch.optim.{name}", "init_args": options}
    assert planning._state_bytes(named, torch.float32) == state_bytes


def test_the_command_prints_the_plan_and_loads_nothing(llama_folder, task_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    path = write_config(llama_folder, task_files, tmp_path)
    state = torch.get_rng_state()
    main(["plan", "--config", str(path)])
    assert torch.equal(torch.get_rng_state(), state)
    output = capsys.readouterr().out
    assert "nothing was measured on a GPU" not in output  # the Trainer's accelerator is the CPU
    assert "assumed (--rows" in output
    main(["plan", "--config", str(path), "--read_data", "true", "--machine", "h100"])
    output = capsys.readouterr().out
    assert "nothing was measured on a GPU" in output
    assert "180 steps of 1 x 2 rows" in output  # three tasks of four rows, 30 epochs
    assert "; 9 tokens a row, as read" in output  # "cat 0?", " a" and the end


@pytest.mark.parametrize("adapter", [None, LORA])
@pytest.mark.parametrize("directions", ["auto", None])
def test_what_is_said_to_help_is_not_there_already(
    llama_folder, task_files, tmp_path, capsys, monkeypatch, adapter, directions
):
    monkeypatch.setitem(MACHINES, "h100", dataclasses.replace(MACHINES["h100"], memory=1))
    gate = {"class_path": "agcl.AttributionCallback", "init_args": {"directions": directions}}
    path = write_config(llama_folder, task_files, tmp_path, model__adapter=adapter, trainer__callbacks=[gate])
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--config", str(path), "--machine", "h100"])
    assert exit_info.value.code == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("It does not fit.")]
    assert ("an adapter" in line) == (adapter is None)
    assert ("`directions: null`" in line) == (directions is not None)
    assert ("target_modules" in line) == (adapter is not None and directions is not None)
    assert line.endswith("under ModelParallelStrategy, with it.") == (directions is not None)  # which is refused else
    split = planning.Settings(strategy="fsdp", gradient_checkpointing=True)
    by_entry = planning.size_of(AutoModelForCausalLM.from_config(tiny_config("llama")), {})
    assert planning.remedies(by_entry, split, has_adapter=True) == [
        "fewer rows in a batch (`data.batch_size`)",
        "more devices",
    ]
