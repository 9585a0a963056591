"""Single values of a stack of configurations, as one more configuration on top of it."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from agcl.errors import AgclError


def overlay(layers: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that, laid over others, sets some values and leaves everything else as it is.

    In LightningCLI a later configuration is merged into an earlier one, but replaces its lists. So a value inside a
    list is set by giving the whole list, as the layers have it, with that value changed.

    Args:
        layers: The configurations below, the first one lowest.
        settings: Dotted key -> value. A step into a list is an item's number, or the name of its class.

    Returns:
        Nested mappings and lists, sharing nothing with ``layers``.

    Raises:
        AgclError: If a key steps into a list at an item that is not there.

    Example:
        >>> layers = [{"trainer": {"callbacks": [{"class_path": "a.Gate"}, {"class_path": "a.Bar"}]}}]
        >>> overlay(layers, {"trainer.callbacks.Gate.init_args.strength": 2, "model.lr": 0.1})
        {'trainer': {'callbacks': [{'class_path': 'a.Gate', 'init_args': {'strength': 2}}, {'class_path': 'a.Bar'}]}, \
'model': {'lr': 0.1}}
    """
    result: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        node: Any = result
        for depth, step in enumerate(parents):
            if isinstance(node, list):
                node = node[_position(node, step, key)]
                continue
            if not isinstance(node, dict):
                raise AgclError(f"`{key}`: `{'.'.join(parents[:depth])}` is {node!r}, which has no `{step}`.")
            if step not in node:
                below = _given_list(layers, parents[: depth + 1])
                node[step] = {} if below is None else deepcopy(below)
            node = node[step]
        if not isinstance(node, (dict, list)):
            raise AgclError(f"`{key}`: `{'.'.join(parents)}` is {node!r}, which has no `{last}`.")
        place: Any = _position(node, last, key) if isinstance(node, list) else last
        node[place] = deepcopy(value)
    return result


def _given_list(layers: Sequence[Mapping[str, Any]], path: Sequence[str]) -> list[Any] | None:
    """The list that the layers give at a path, ``None`` if they give none there (``name+`` appends to a list)."""
    found: Any = None
    for layer in layers:
        parent: Any = layer
        for step in path[:-1]:
            parent = parent.get(step) if isinstance(parent, Mapping) else None
        if isinstance(parent, Mapping):
            found = parent.get(path[-1], found)
            more = parent.get(f"{path[-1]}+", [])
            if more:
                found = [*(found or []), *(more if isinstance(more, list) else [more])]
    return found if isinstance(found, list) else None


def _position(items: Sequence[Any], step: str, key: str) -> int:
    """Index of the item that one step of a key means."""
    if step.isdigit():
        matches = [int(step)] if int(step) < len(items) else []
    else:
        matches = [i for i, item in enumerate(items) if _class_name(item) == step]
    if len(matches) != 1:
        there = ", ".join(_class_name(item) or str(item) for item in items) or "empty"
        raise AgclError(f"`{key}`: `{step}` is not one item of the list that the configurations give ({there}).")
    return matches[0]


def _class_name(item: Any) -> str | None:
    return str(item["class_path"]).rpartition(".")[2] if isinstance(item, Mapping) and "class_path" in item else None
