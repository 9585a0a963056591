"""Rival methods of continual learning, each a callback on the same loop."""

from agcl.methods.ewc import EWC
from agcl.methods.hft import HFT
from agcl.methods.layer_freezing import LayerFreezing
from agcl.methods.mofo import MoFO
from agcl.methods.single_task import SingleTask

__all__ = ["EWC", "HFT", "LayerFreezing", "MoFO", "SingleTask"]
