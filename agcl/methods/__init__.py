"""Published continual-learning methods on the same loop, to compare attribution-guided learning with."""

from agcl.methods.lwf import LwF

__all__ = ["LwF"]
