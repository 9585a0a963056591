"""Lightning callbacks that join attribution, gating and metrics to training."""

from agcl.callbacks.attribution import AttributionCallback
from agcl.callbacks.directions import Directions
from agcl.callbacks.general_ability import GeneralAbility
from agcl.callbacks.monitor import ContinualMonitor
from agcl.callbacks.progress import TaskProgressBar
from agcl.callbacks.recovery import RecoveryProbe
from agcl.callbacks.report import ContinualReport
from agcl.callbacks.stopping import StopOnSignal

__all__ = [
    "AttributionCallback",
    "ContinualMonitor",
    "ContinualReport",
    "Directions",
    "GeneralAbility",
    "RecoveryProbe",
    "StopOnSignal",
    "TaskProgressBar",
]
