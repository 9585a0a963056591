"""The methods run in bfloat16, mixed and true, with clipping, and can be probed."""

import pytest
from helpers import build, trainer_for

from agcl.callbacks import RecoveryProbe
from agcl.methods import AGEM, MIGU, OSF, LwF, OLoRA

CASES = {
    "lwf": (LwF, None),
    "agem": (AGEM, None),
    "migu": (MIGU, None),
    "olora": (OLoRA, {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}),
    "osf": (OSF, {"peft_type": "OSF", "effective_rank": 1, "target_modules": "all-linear"}),
}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", CASES)
def test_methods_run_in_low_precision(name, precision, llama_folder, task_files, tmp_path):
    method, adapter = CASES[name]
    model, data = build(llama_folder, task_files[:2], adapter=adapter)
    probes = [RecoveryProbe(num_rows=2)] if name == "osf" else []  # whose hooks are on what the probe learns by as well
    options = {"precision": precision, "gradient_clip_val": 1.0}
    trainer_for(data, tmp_path, [method(), *probes], **options).fit(model, datamodule=data)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
