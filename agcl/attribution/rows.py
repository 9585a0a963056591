"""Rows and batches as models are trained on them, as samples for attribution."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import AgclError
from .passes import Sample

IGNORED_LABEL = -100  # what torch's cross entropy leaves out
_OF_PACKED_ROWS = ("seq_lengths", "cu_seq_lens_q")  # TRL's and transformers' collators add them


def samples_of(rows: Iterable[Any], device: torch.device | str = "cpu") -> Iterator[Sample]:
    """One sample per row that has an answer.

    Padding (where ``attention_mask`` is 0) is taken off, so that positions count from the first token.

    Args:
        rows: Rows or batches, each a mapping with ``input_ids`` and ``labels``, lists or tensors of one length per row:
            -100 but on the answer, each label at its own token's place (transformers and TRL shift them in the loss);
            ``attention_mask`` is optional. Or samples, which are passed on. Rows without any label are left out.
        device: Where the tensors are made.

    Yields:
        Samples, in the order of the rows.

    Raises:
        AgclError: If a row lacks labels, or holds several documents packed into one.
    """
    for row in rows:
        if isinstance(row, Sample):
            yield row
            continue
        _check(row)
        columns = [_tensor(row[key]) for key in ("input_ids", "labels")]
        mask = row.get("attention_mask")
        columns.append(torch.ones_like(columns[0]) if mask is None else _tensor(mask))
        if columns[0].dim() == 1:
            columns = [column[None] for column in columns]
        for ids, labels, kept in zip(*columns, strict=True):
            is_token = kept.bool()
            sample = _sample(ids[is_token].to(device), labels[is_token].to(device))
            if sample is not None:
                yield sample


def _sample(input_ids: Tensor, labels: Tensor) -> Sample | None:
    # The logits at one position predict the next token, so that the first token is predicted by none.
    positions = (labels[1:] != IGNORED_LABEL).nonzero().flatten()
    return Sample(input_ids, positions, labels[positions + 1]) if len(positions) else None


def _tensor(values: Any) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.as_tensor(values)


def _check(row: Any) -> None:
    if not isinstance(row, Mapping) or not {"input_ids", "labels"} <= row.keys():
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise AgclError(
            f"A row for attribution needs `input_ids` and `labels` (-100 but on the answer), but one has {has}; give "
            "the rows or batches that the model is trained on."
        )
    if any(key in row for key in _OF_PACKED_ROWS) or _restarts(row.get("position_ids")):
        raise AgclError("A row for attribution holds several documents packed into one; give the rows before packing.")


def _restarts(position_ids: Any) -> bool:
    """Whether positions fall to 0 inside a row (padding on either side has equal ones, or goes on counting)."""
    if position_ids is None:
        return False
    positions = _tensor(position_ids)
    return bool(((positions[..., 1:] == 0) & (positions[..., :-1] > 0)).any())
