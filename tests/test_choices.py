"""Options with a few possible values: any other one is refused where the object is made."""

import pytest
import torch
from helpers import tasks

import agcl
from agcl.attribution import ImportanceConfig
from agcl.callbacks import AttributionCallback
from agcl.data.datamodule import ContinualDataModule
from agcl.data.tasks import Task
from agcl.errors import AgclError
from agcl.gating import flattened
from agcl.integrations.transformers import ImportanceGate
from agcl.methods import EWC, LayerFreezing
from agcl.schedules import WarmupDecay

MODEL = torch.nn.Linear(1, 1)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AttributionCallback(gate="gradients"),
            "`gate` is 'gradients'; choose one of 'auto', 'gradient'",
        ),
        (lambda: AttributionCallback(control="shuffle"), "`control` is 'shuffle'; choose one of 'none', 'shuffled'"),
        (lambda: ImportanceConfig(scope="layers"), "`scope` is 'layers'; choose one of 'row', 'tensor', 'layer'"),
        (lambda: flattened({}, scope="row"), "`scope` is 'row'; choose one of 'tensor', 'model'"),
        (lambda: agcl.gate(OPTIMIZER, MODEL, {}, kind="both"), "`kind` is 'both'; choose one of 'auto', 'gradient'"),
        (lambda: ImportanceGate({}, kind="both"), "`kind` is 'both'; choose one of 'auto', 'gradient'"),
        (lambda: EWC(1.0, mode="on-line"), "`mode` is 'on-line'; choose one of 'separate', 'online'"),
        (lambda: LayerFreezing(1, side="left"), "`side` is 'left'; choose one of 'bottom', 'top'"),
        (lambda: WarmupDecay(OPTIMIZER, decay="cosin"), "`decay` is 'cosin'; choose one of 'linear', 'cosine', 'none'"),
        (lambda: ContinualDataModule(tasks(["f"]), "m", regime="jiont"), "`regime` is 'jiont'; choose one of"),
        (lambda: ContinualDataModule(tasks(["f"]), "m", truncation="right"), "`truncation` is 'right'; choose one of"),
        (lambda: ContinualDataModule(tasks(["f"]), "m", evaluate_on="val"), "`evaluate_on` is 'val'; choose one of"),
        (lambda: Task("t", "f", metric="rouge"), "`metric` is 'rouge'; choose one of 'exact_match', 'label_accuracy'"),
    ],
)
def test_an_unknown_choice_is_refused(make, message):
    with pytest.raises(AgclError, match=message):
        make()
