"""Which gate scales the step of which optimizer."""

from typing import Literal

from torch.optim import ASGD, SGD, Optimizer

GateKind = Literal["auto", "gradient", "update"]


def choose_gate(optimizer: Optimizer) -> Literal["gradient", "update"]:
    """The gate that scales this optimizer's step.

    ``"gradient"``, the paper's and the cheaper one, only for ``torch.optim.SGD`` itself (momentum and Nesterov are
    linear in the gradient) without weight decay, which a scaled gradient does not scale; ``"update"`` for everything
    else.
    """
    has_decay = any(group.get("weight_decay", 0) != 0 for group in optimizer.param_groups)
    return "gradient" if type(optimizer) is SGD and not has_decay else "update"


def cancels_gradient_gate(optimizer: Optimizer) -> bool:
    """Whether a constant factor on the gradient (nearly) leaves the optimizer's step as it was.

    True for all of ``torch.optim`` but SGD and ASGD. An optimizer from elsewhere counts as cancelling too, unless
    derived from those: nearly all are adaptive or sign-based, and a needless warning costs less than a gate without
    effect.
    """
    return not isinstance(optimizer, (SGD, ASGD))
