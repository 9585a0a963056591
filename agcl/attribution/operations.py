"""Which torch operation follows which rule: data for the mode in ``mode.py``, complete for what decoders use.

A *marked* tensor is one computed from the model's embeddings. Kinds:

===============  ==================================================================================================
``pass``         returns no activation (shapes, dtypes, switches)
``constant``     its result counts as a constant (``detach``, ``zeros_like``)
``embedding``    its result is a new input, marked
``structure``    moves, selects, casts its first argument: ordinary gradient; an activated value stays one
``assembly``     the same, from several arguments (``cat``, ``where``, ``copy_``)
``linear``       linear, or positively homogeneous (``abs``, ``norm``), whose gradient obeys the identity rule anyway
``product``      bilinear in its first two arguments: uniform rule if both are marked, else linear
``contraction``  product of any number of factors, also given as a list
``sum_product``  first argument plus the product of the next two (``addmm``)
``division``     the divisor is a constant
``power``        element-wise power: identity rule; a negative exponent is a normaliser
``normaliser``   ``1 / sqrt(x)`` and ``1 / x``: a constant
``layer_norm``   LayerNorm with a constant normaliser
``rms_norm``     RMSNorm with a constant normaliser
``activation``   identity rule
``relu``         an activation that is positively homogeneous, so that its gradient is ``y / x`` already
``softmax``      ordinary gradient (Taylor); cut in CP-LRP
``attention``    ``scaled_dot_product_attention``: products and softmax in one kernel
===============  ==================================================================================================
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

_OWNERS = (torch, torch.Tensor, functional, torch._C._nn, torch.special, torch.linalg)

_NAMES = {
    "pass": """
        size dim ndimension stride numel nelement element_size storage_offset is_contiguous is_floating_point is_complex
        get_device data_ptr item tolist __len__ __bool__ __int__ __float__ __index__ __format__ __repr__ __hash__
        eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isnan isinf isfinite argmax argmin argsort nonzero
        arange finfo is_tensor result_type is_nonzero equal allclose any all logical_and logical_or logical_not
    """,
    "constant": """
        detach zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full
        new_tensor sign heaviside floor ceil round bucketize histc bincount
    """,
    "embedding": "embedding",
    "structure": """
        view view_as reshape reshape_as flatten unflatten ravel transpose transpose_ swapaxes swapdims movedim moveaxis
        permute t squeeze squeeze_ unsqueeze unsqueeze_ expand expand_as broadcast_to contiguous clone to type type_as
        float half bfloat16 double cpu cuda chunk split split_with_sizes tensor_split unbind narrow select index_select
        gather take_along_dim masked_select take __getitem__ repeat repeat_interleave tile roll flip pad constant_pad_nd
        dropout dropout1d unfold diagonal tril triu requires_grad_ topk sort amax amin zero_ as_tensor nan_to_num
        view_as_complex view_as_real real imag conj
    """,
    "assembly": """
        cat concat concatenate stack hstack vstack dstack where max min maximum minimum broadcast_tensors complex
        masked_fill masked_fill_ __setitem__ copy_ index_copy index_copy_ index_put index_put_ scatter scatter_
        masked_scatter masked_scatter_ fill_ index_fill index_fill_
    """,
    "linear": """
        add add_ sub sub_ subtract rsub neg neg_ negative __rsub__ __radd__ sum mean cumsum diff index_add index_add_
        scatter_add scatter_add_ avg_pool1d abs absolute norm vector_norm std trace positive __pos__ segment_reduce
    """,
    "product": """
        mul mul_ multiply multiply_ __mul__ __rmul__ matmul __matmul__ __rmatmul__ mm bmm mv dot inner outer ger vdot
        tensordot kron linear conv1d conv2d grouped_mm _grouped_mm
    """,
    "contraction": "einsum bilinear",
    "sum_product": "addmm addmm_ baddbmm baddbmm_ addbmm addbmm_ addmv addmv_ addcmul addcmul_",
    "division": "div div_ divide divide_ true_divide true_divide_ __truediv__ __rtruediv__ __rdiv__",
    "power": "pow pow_ __pow__ __ipow__ float_power square square_ sqrt sqrt_ var",
    "normaliser": "rsqrt rsqrt_ reciprocal reciprocal_",
    "layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
    "activation": """
        silu gelu tanh sigmoid softplus mish hardswish hardsigmoid hardtanh relu6 elu celu selu logsigmoid softsign
        tanhshrink expit erf clamp clip clamp_min clamp_max
    """,
    "relu": "relu relu_ leaky_relu leaky_relu_ prelu",
    "softmax": "softmax",
    "attention": "scaled_dot_product_attention",
}

_PROPERTIES = {
    "pass": "shape dtype device ndim layout requires_grad grad_fn is_leaf grad is_cuda is_meta is_cpu is_nested",
    "constant": "data",
    "structure": "T mT H mH",
}


def _named(kind: str) -> Iterator[Callable[..., Any]]:
    for name in _NAMES.get(kind, "").split():
        yield from (getattr(owner, name) for owner in _OWNERS if callable(getattr(owner, name, None)))
    for name in _PROPERTIES.get(kind, "").split():
        if hasattr(torch.Tensor, name):
            yield getattr(torch.Tensor, name).__get__


OPERATIONS: dict[Callable[..., Any], str] = {
    operation: kind for kind in (*_NAMES, *_PROPERTIES) for operation in _named(kind)
}
"""Operation -> kind. Entries may be added for operations of other packages, e.g. ``OPERATIONS[my_op] = "linear"``."""
OPERATIONS[torch._C._set_grad_enabled] = "pass"
