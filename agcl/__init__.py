"""Attribution-guided continual learning for large language models (arXiv 2605.05285).

Names are imported on first use, so that the attribution, the gates and the metrics serve plain PyTorch code without
loading Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agcl.version import __version__

_HOMES = {
    "AgclError": "agcl.errors",
    "AtomicCheckpointIO": "agcl.checkpoint_io",
    "AttributionCallback": "agcl.callbacks",
    "ContinualDataModule": "agcl.data.datamodule",
    "ContinualLM": "agcl.module",
    "ContinualMonitor": "agcl.callbacks",
    "ContinualReport": "agcl.callbacks",
    "DirectionalGate": "agcl.gating",
    "Directions": "agcl.callbacks",
    "GeneralAbility": "agcl.callbacks",
    "GradientGate": "agcl.gating",
    "ImportanceConfig": "agcl.attribution",
    "Probe": "agcl.data.tasks",
    "RecoveryProbe": "agcl.callbacks",
    "Replay": "agcl.data.replay",
    "StopOnSignal": "agcl.callbacks",
    "Task": "agcl.data.tasks",
    "TaskProgressBar": "agcl.callbacks",
    "UnsupportedModelError": "agcl.errors",
    "UpdateGate": "agcl.gating",
    "WarmupDecay": "agcl.schedules",
    "compute_importance": "agcl.attribution",
    "compute_input_moments": "agcl.attribution",
    "gate": "agcl.integrations.pytorch",
    "lrp_rules": "agcl.attribution",
    "maps_for_adapter": "agcl.integrations.pytorch",
    "own_text_moments": "agcl.own_text",
    "parameter_relevance": "agcl.attribution",
}

__all__ = [
    "AgclError",
    "AtomicCheckpointIO",
    "AttributionCallback",
    "ContinualDataModule",
    "ContinualLM",
    "ContinualMonitor",
    "ContinualReport",
    "DirectionalGate",
    "Directions",
    "GeneralAbility",
    "GradientGate",
    "ImportanceConfig",
    "Probe",
    "RecoveryProbe",
    "Replay",
    "StopOnSignal",
    "Task",
    "TaskProgressBar",
    "UnsupportedModelError",
    "UpdateGate",
    "WarmupDecay",
    "__version__",
    "compute_importance",
    "compute_input_moments",
    "gate",
    "lrp_rules",
    "maps_for_adapter",
    "own_text_moments",
    "parameter_relevance",
]

if TYPE_CHECKING:
    from agcl.attribution import (
        ImportanceConfig,
        compute_importance,
        compute_input_moments,
        lrp_rules,
        parameter_relevance,
    )
    from agcl.callbacks import (
        AttributionCallback,
        ContinualMonitor,
        ContinualReport,
        Directions,
        GeneralAbility,
        RecoveryProbe,
        StopOnSignal,
        TaskProgressBar,
    )
    from agcl.checkpoint_io import AtomicCheckpointIO
    from agcl.data.datamodule import ContinualDataModule
    from agcl.data.replay import Replay
    from agcl.data.tasks import Probe, Task
    from agcl.errors import AgclError, UnsupportedModelError
    from agcl.gating import DirectionalGate, GradientGate, UpdateGate
    from agcl.integrations.pytorch import gate, maps_for_adapter
    from agcl.module import ContinualLM
    from agcl.own_text import own_text_moments
    from agcl.schedules import WarmupDecay


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agcl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
