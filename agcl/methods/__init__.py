"""Published continual-learning methods on the same loop, to compare attribution-guided learning with."""

from agcl.methods.agem import AGEM
from agcl.methods.ewc import EWC
from agcl.methods.hft import HFT
from agcl.methods.layer_freezing import LayerFreezing
from agcl.methods.lwf import LwF
from agcl.methods.migu import MIGU
from agcl.methods.mofo import MoFO
from agcl.methods.olora import OLoRA
from agcl.methods.osf import OSF
from agcl.methods.single_task import SingleTask

__all__ = ["AGEM", "EWC", "HFT", "MIGU", "OSF", "LayerFreezing", "LwF", "MoFO", "OLoRA", "SingleTask"]
