"""Runs that methods cannot work in are refused: joint training, and weights that are split over processes."""

from types import SimpleNamespace

import pytest
from helpers import build, trainer_for
from lightning.pytorch.strategies import ModelParallelStrategy

from agcl.callbacks import AttributionCallback
from agcl.errors import AgclError
from agcl.methods import AGEM, EWC, HFT, MIGU, OSF, LayerFreezing, LwF, MoFO, OLoRA, SingleTask

BETWEEN_TASKS = [AGEM, lambda: EWC(1.0), HFT, MIGU, OSF, lambda: LayerFreezing(1), LwF, OLoRA, SingleTask]


@pytest.mark.parametrize("make", [*BETWEEN_TASKS, AttributionCallback])
def test_joint_training_is_refused(llama_folder, task_files, tmp_path, make):
    model, data = build(llama_folder, task_files, data_options={"regime": "joint"})
    with pytest.raises(AgclError, match="regime: joint"):
        trainer_for(data, tmp_path, [make()]).fit(model, datamodule=data)


@pytest.mark.parametrize("make", [*BETWEEN_TASKS, MoFO])
def test_split_weights_are_refused(make):
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(), datamodule=SimpleNamespace(seed=0), world_size=1)
    module = SimpleNamespace(tasks=SimpleNamespace(regime="sequential"))
    with pytest.raises(AgclError, match=r"looks at whole weights, which are split .*take `strategy: ddp`"):
        make().setup(trainer, module, "fit")
