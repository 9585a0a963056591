"""Published continual-learning methods on the same loop, to compare attribution-guided learning with."""

from agcl.methods.agem import AGEM
from agcl.methods.lwf import LwF
from agcl.methods.migu import MIGU
from agcl.methods.olora import OLoRA
from agcl.methods.osf import OSF

__all__ = ["AGEM", "MIGU", "OSF", "LwF", "OLoRA"]
