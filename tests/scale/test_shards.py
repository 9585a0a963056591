"""What weights that are split over processes allow, in one process (a mesh of one)."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, OSFConfig, get_peft_config, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from agcl.callbacks import AttributionCallback
from agcl.data.datamodule import filled_up
from agcl.errors import AgclError, UnsupportedModelError
from agcl.gating import UpdateGate
from agcl.models import save_model, shard_model
from agcl.module import ContinualLM
from agcl.ranks import Ranks
from agcl.shards import check_layout, layouts


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_importance_that_is_split_already_gates_as_the_whole_does(mesh):
    from torch.distributed.fsdp import fully_shard

    importance = torch.tensor([[0, 51, 255], [255, 204, 0]], dtype=torch.uint8)
    found = []
    for is_split in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 2, bias=False)
        fully_shard(model, mesh=mesh)
        levels = layouts(model)["weight"].of_part(importance) if is_split else importance
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        gate = UpdateGate(model.named_parameters(), {"weight": levels})
        with gate.attach(optimizer):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        assert gate.plasticity()["weight"] == pytest.approx(1 - (51 + 255 + 255 + 204) / 255 / 6)
        found.append(model.weight.detach().full_tensor())
    assert torch.equal(*found)


def test_whole_parameters_beside_split_ones_are_refused(mesh):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    fully_shard(model[0], mesh=mesh)
    with pytest.raises(UnsupportedModelError, match=r"'1\.weight' is not split by rows over all 1 processes"):
        check_layout(model)


def test_tensor_parallelism_is_refused_with_the_remedy():
    sizes = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(AgclError, match=r"set `tensor_parallel_size: 1` and `data_parallel_size`"):
        shard_model(nn.Linear(2, 2), sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"control": "shuffled"}, "`control: shuffled` looks at whole tensors"), ({"gate": "gradient"}, "`gate: update`")],
)
def test_what_needs_whole_tensors_is_refused(options, message):
    with pytest.raises(AgclError, match=message):
        AttributionCallback(directions=None, **options)._check_gate_on_shards()


def test_rows_are_cut_as_torch_cuts_them():
    for num_rows in (1, 2, 5, 6, 7):
        whole = torch.arange(2.0 * num_rows).view(num_rows, 2)
        pieces = [*whole.chunk(3), *[whole[:0]] * 3]
        for rank in range(3):
            assert torch.equal(Ranks(rank, 3).part(whole), pieces[rank])


def test_rows_that_fill_up_do_not_count():
    from datasets import Dataset

    filled = filled_up(Dataset.from_dict({"place": [0, 1]}), 5)
    assert filled["place"][:] == [0, 1, 0, 1, 0]
    assert filled["counts"][:] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        (OSFConfig(target_modules=["down_proj"], effective_rank=1), [], "OSF's factors are merged"),
        (LoraConfig(target_modules=["down_proj"]), ["second"], "Several adapters are merged"),
    ],
)
def test_adapters_that_are_merged_on_saving_are_refused(llama_folder, config, names, message):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), config)
    for name in names:
        model.add_adapter(name, config)
    model.base_model.set_adapter(["default", *names])
    with pytest.raises(AgclError, match=rf"{message} .*take `strategy: ddp`"):
        shard_model(model, None)


@pytest.mark.parametrize("adapter", [None, {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}])
def test_a_split_model_is_saved_as_a_whole_one(llama_folder, tmp_path, mesh, adapter):
    found = []
    for is_split in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(llama_folder)
        if adapter:
            model = get_peft_model(model, get_peft_config({"task_type": "CAUSAL_LM", **adapter}))
        if is_split:
            shard_model(model, {"tensor_parallel": mesh, "data_parallel": mesh})
        save_model(model, tmp_path / str(is_split))
        save_model(model, tmp_path / "nothing", is_writer=False)
        (file,) = (tmp_path / str(is_split)).glob("*.safetensors")
        found.append(load_file(file))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not (tmp_path / "nothing").exists()


def test_a_compiled_split_model_is_refused(llama_folder):
    module = ContinualLM(str(llama_folder), compiled=True)
    module._device_mesh = {}
    with pytest.raises(AgclError, match="`compiled` is not tried with weights that are split"):
        module.configure_model()
