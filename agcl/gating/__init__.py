"""Gates that hold a parameter back by its importance, for any PyTorch training loop.

``plasticity = (1 - importance) ** strength``, entry by entry. `GradientGate` is the paper's gate (arXiv 2605.05285,
Eq. 13; the form is SPG's, arXiv 2306.14775): it multiplies the gradient. An adaptive optimizer divides that factor out
again, since its step does not depend on the gradient's size, and decoupled weight decay never sees the gradient.
`UpdateGate` therefore multiplies the optimizer's whole step. `choose_gate` picks the one that works.
`DirectionalGate` holds back directions of a matrix's inputs instead of its entries.
"""

from .choice import cancels_gradient_gate, choose_gate
from .controls import flattened, shuffled
from .directional import DirectionalGate
from .gradient import GradientGate
from .update import UpdateGate

__all__ = [
    "DirectionalGate",
    "GradientGate",
    "UpdateGate",
    "cancels_gradient_gate",
    "choose_gate",
    "flattened",
    "shuffled",
]
