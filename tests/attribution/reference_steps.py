"""The steps of a decoder with relevance carried back through each explicitly: a second, slow derivation of the rules.

No autograd and no model code. A step maps activations ``x``, shape (tokens, width), to ``(y, back)``; ``back`` maps the
relevance of ``y`` to that of ``x`` and books the parameters' shares. Published rules, float64, one sample:

- sums and linear maps, 0-rule: ``R_i = contribution_i / (sum of contributions) * R``; a bias is a contribution as well;
- normalisers are constants, so RMSNorm is an element-wise linear map and LayerNorm a linear map (centring) plus a bias;
- element-wise functions and soft-caps: identity rule; factors and divisors that are constants pass relevance unchanged;
- products of two activations, uniform rule: half each; CP-LRP gives nothing to attention weights, gates and routers;
- softmax ``s = softmax(z)``, Taylor rule: ``R(z_i) = z_i (R(s_i) - s_i sum_j R(s_j))``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Back = Callable[[Tensor], Tensor]
Result = tuple[Tensor, Back]
Step = Callable[[Tensor], Result]

ACTIVATIONS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: torch.where(x > 0, x, 0.0),
}


def share(relevance: Tensor, value: Tensor) -> Tensor:
    """R / z, and 0 where nothing arrived."""
    return torch.where(relevance == 0, 0.0, relevance / torch.where(relevance == 0, 1.0, value))


def split(relevance: Tensor, terms: list[Tensor]) -> list[Tensor]:
    """What each term of a sum receives."""
    ratio = share(relevance, sum(terms))
    return [term * ratio for term in terms]


def chain(*steps: Step) -> Step:
    """One step after the other."""

    def step(x: Tensor) -> Result:
        backs = []
        for part in steps:
            x, back = part(x)
            backs.append(back)

        def all_back(relevance: Tensor) -> Tensor:
            for back in reversed(backs):
                relevance = back(relevance)
            return relevance

        return x, all_back

    return step


def residual(*branches: Step) -> Step:
    """``y = x + sum of branches(x)``."""

    def step(x: Tensor) -> Result:
        outputs, backs = zip(*(branch(x) for branch in branches), strict=True)
        terms = [x, *outputs]

        def back(relevance: Tensor) -> Tensor:
            to_x, *to_outputs = split(relevance, terms)
            return to_x + sum(b(r) for b, r in zip(backs, to_outputs, strict=True))

        return sum(terms), back

    return step


def soft_cap(cap: float) -> Step:
    """``cap * tanh(x / cap)``: the identity rule between two constant factors."""
    return lambda x: (cap * torch.tanh(x / cap), lambda relevance: relevance)


def softmax_relevance(logits: Tensor, weights: Tensor, relevance: Tensor) -> Tensor:
    """Taylor rule; what a mask hides has no weight and gets nothing."""
    share_of_rest = relevance - weights * relevance.sum(-1, keepdim=True)
    return torch.where(weights > 0, logits * share_of_rest, 0.0)


def rotary_maps(seq: int, width: int, turned: int, theta: float) -> Tensor:
    """Rotations of the first ``turned`` of ``width`` dimensions, one matrix (out, in) per position."""
    # transformers makes the frequencies in float32 when the model is built
    frequencies = (1.0 / theta ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned)).double()
    maps = torch.eye(width, dtype=torch.float64).repeat(seq, 1, 1)
    for t in range(seq):
        cos, sin = torch.cos(t * frequencies).diag(), torch.sin(t * frequencies).diag()
        maps[t, :turned, :turned] = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0)
    return maps


class Steps:
    """Steps that need parameters or the choice of rule.

    Args:
        parameters: Name -> value, float64.
        cplrp: CP-LRP instead of AttnLRP.
        transposed: Weights are stored as (in, out).
        lora_scale: Factor of ``B A`` where a linear map has an adapter.
    """

    def __init__(self, parameters, *, cplrp, transposed=False, lora_scale=1.0):
        self.p = parameters
        self.cplrp, self.transposed, self.lora_scale = cplrp, transposed, lora_scale
        self.relevance = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def has(self, name):
        return name in self.p

    def matrix(self, name, index=..., *, transposed=False) -> Step:
        """``y = W x``; ``index`` selects an expert."""
        stored = self.p[name][index]
        weight = stored.T if transposed else stored

        def step(x: Tensor) -> Result:
            contributions = torch.einsum("oi,ti->toi", weight, x)
            y = contributions.sum(-1)

            def back(relevance: Tensor) -> Tensor:
                passed = contributions * share(relevance, y)[:, :, None]
                to_weight = passed.sum(0)
                self.relevance[name][index] += to_weight.T if transposed else to_weight
                return passed.sum(1)

            return y, back

        return step

    def linear(self, name) -> Step:
        """``y = W x + b + s B (A x)``, as far as there are a bias and an adapter."""
        maps = [self.matrix(name + ".weight", transposed=self.transposed)]
        if self.has(name + ".lora_A.default.weight"):
            scaled: Step = lambda x: (self.lora_scale * x, lambda relevance: relevance)  # noqa: E731
            maps.append(chain(*(self.matrix(f"{name}.lora_{part}.default.weight") for part in "AB"), scaled))
        bias = self.p.get(name + ".bias")

        def step(x: Tensor) -> Result:
            outputs, backs = zip(*(part(x) for part in maps), strict=True)
            terms = [*outputs] if bias is None else [*outputs, bias.expand_as(outputs[0])]

            def back(relevance: Tensor) -> Tensor:
                shares = split(relevance, terms)
                if bias is not None:
                    self.relevance[name + ".bias"] += shares.pop().sum(0)
                return sum(b(r) for b, r in zip(backs, shares, strict=True))

            return sum(terms), back

        return step

    def rms_norm(self, name, eps, *, offset=0.0) -> Step:
        """``y = (offset + w) c x``: all of it goes to x; w has the share w / (offset + w)."""
        weight = self.p[name + ".weight"]

        def step(x: Tensor) -> Result:
            normalised = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
            terms = [weight * normalised, offset * normalised]

            def back(relevance: Tensor) -> Tensor:
                self.relevance[name + ".weight"] += split(relevance, terms)[0].flatten(0, -2).sum(0)
                return relevance

            return sum(terms), back

        return step

    def layer_norm(self, name, eps) -> Step:
        """``y = w c (x - mean(x)) + b``."""
        weight, bias = self.p[name + ".weight"], self.p[name + ".bias"]

        def step(x: Tensor) -> Result:
            width = x.shape[-1]
            centring = torch.eye(width, dtype=x.dtype) - 1 / width
            c = 1 / torch.sqrt((x @ centring).square().mean(-1) + eps)
            contributions = torch.einsum("o,t,oi,ti->toi", weight, c, centring, x)
            terms = [contributions.sum(-1), bias.expand_as(x)]

            def back(relevance: Tensor) -> Tensor:
                to_map, to_bias = split(relevance, terms)
                self.relevance[name + ".weight"] += to_map.sum(0)
                self.relevance[name + ".bias"] += to_bias.sum(0)
                return (contributions * share(to_map, terms[0])[:, :, None]).sum(1)

            return sum(terms), back

        return step

    def plain_mlp(self, first, second, activation) -> Step:
        bend: Step = lambda x: (ACTIVATIONS[activation](x), lambda relevance: relevance)  # noqa: E731
        return chain(self.linear(first), bend, self.linear(second))

    def gate(self, activation) -> Step:
        """``a(gate) * up`` of the two halves of x."""

        def step(x: Tensor) -> Result:
            gate, up = x.chunk(2, -1)

            def back(relevance: Tensor) -> Tensor:
                to_gate = 0 * relevance if self.cplrp else relevance / 2
                return torch.cat([to_gate, relevance - to_gate], -1)

            return ACTIVATIONS[activation](gate) * up, back

        return step

    def side_by_side(self, *maps: Step) -> Step:
        """The outputs of several maps of one x, concatenated."""

        def step(x: Tensor) -> Result:
            outputs, backs = zip(*(part(x) for part in maps), strict=True)
            widths = [output.shape[-1] for output in outputs]

            def back(relevance: Tensor) -> Tensor:
                return sum(b(r) for b, r in zip(backs, relevance.split(widths, -1), strict=True))

            return torch.cat(outputs, -1), back

        return step

    def rotate(self, maps: Tensor) -> Step:
        """A linear map of its own at each position; x has shape (heads, tokens, d)."""

        def step(x: Tensor) -> Result:
            contributions = torch.einsum("toi,hti->htoi", maps, x)
            y = contributions.sum(-1)
            return y, lambda relevance: (contributions * share(relevance, y)[..., None]).sum(2)

        return step

    def mixing(self, q, k, v, *, scale, window=None, cap=None):
        """``softmax(cap(q k scale)) v`` for all heads, shapes (heads, tokens, d); relevance goes back to (q, k, v)."""
        terms = torch.einsum("htd,hjd->htjd", q, k) * scale
        scores = terms.sum(-1)
        capped = scores if cap is None else soft_cap(cap)(scores)[0]
        place = torch.arange(q.shape[1])
        distance = place[:, None] - place
        visible = (distance >= 0) & (distance < (window or len(place)))
        weights = torch.where(visible, capped, -torch.inf).softmax(-1)
        contributions = torch.einsum("htj,hjd->htjd", weights, v)
        mixed = contributions.sum(2)

        def back(relevance):
            passed = contributions * share(relevance, mixed)[:, :, None]
            if self.cplrp:
                return torch.zeros_like(q), torch.zeros_like(k), passed.sum(1)
            to_scores = softmax_relevance(capped, weights, passed.sum(-1) / 2)
            to_terms = terms * share(to_scores, scores)[..., None]
            return to_terms.sum(2) / 2, to_terms.sum(1) / 2, passed.sum(1) / 2

        return mixed, back

    def mixture(self, router, expert, *, top, renormalised) -> Step:
        """``y = sum over the top experts e of s_e expert_e(x)``, s = softmax(router x), each token with its own set."""
        route = self.matrix(router)

        def step(x: Tensor) -> Result:
            logits, back_route = route(x)
            weights = logits.softmax(-1)
            chosen = torch.zeros_like(weights).scatter(-1, weights.topk(top, -1).indices, 1.0)
            scores = weights * chosen
            if renormalised:
                scores = scores / scores.sum(-1, keepdim=True)  # by a constant
            outputs, backs = zip(*(expert(e)(x) for e in range(weights.shape[-1])), strict=True)
            terms = [scores[:, e, None] * output for e, output in enumerate(outputs)]

            def back(relevance: Tensor) -> Tensor:
                shares = split(relevance, terms)
                to_scores = torch.stack([s.sum(-1) for s in shares], -1) / 2
                to_x = sum(b(s if self.cplrp else s / 2) for b, s in zip(backs, shares, strict=True))
                return to_x if self.cplrp else to_x + back_route(softmax_relevance(logits, weights, to_scores))

            return sum(terms), back

        return step
