"""Reads trees that were stored as JSON by `Tree.as_dict`."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.types import JsonView

HALF = "\ufffd"
"""A text that ends in it ends inside a character, whose rest is in the next node; that node's text is then whole."""


def path(tree: JsonView, number: int) -> list[int]:
    """Numbers of the nodes from the root to this one, both included."""
    found = [number]
    while (parent := tree["nodes"][found[-1]]["parent"]) is not None:
        found.append(parent)
    return found[::-1]


def texts(tree: JsonView) -> list[str]:
    """The assistant's text from its beginning to the end of each node."""
    out: list[str] = []
    for node in tree["nodes"]:
        before = "" if node["parent"] is None else out[node["parent"]]
        out.append(node["text"] if before.endswith(HALF) else before + node["text"])
    return out


def tokens(tree: JsonView, number: int) -> np.ndarray:
    """Token ids [k] of a completion up to a node's end."""
    nodes: list[Any] = [tree["nodes"][one] for one in path(tree, number)]
    return np.array([token for node in nodes for token in node["tokens"]], np.int32)
