"""Methods that act between tasks refuse joint training, where there is nothing between."""

import pytest
from helpers import build, trainer_for

from agcl.callbacks import AttributionCallback
from agcl.errors import AgclError
from agcl.methods import AGEM, EWC, HFT, MIGU, OSF, LayerFreezing, LwF, OLoRA, SingleTask


@pytest.mark.parametrize(
    "make",
    [AGEM, AttributionCallback, lambda: EWC(1.0), HFT, MIGU, OSF, lambda: LayerFreezing(1), LwF, OLoRA, SingleTask],
)
def test_joint_training_is_refused(llama_folder, task_files, tmp_path, make):
    model, data = build(llama_folder, task_files, data_options={"regime": "joint"})
    with pytest.raises(AgclError, match="regime: joint"):
        trainer_for(data, tmp_path, [make()]).fit(model, datamodule=data)
