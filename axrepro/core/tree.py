"""Nested dicts addressed by slash-separated paths: `decoder/layers/ffn/gate`."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

Tree = dict[str, Any]


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by path, sorted by path as jax sorts dict keys. Empty dicts vanish."""
    flat = {}
    for name in sorted(tree):
        path = f"{prefix}/{name}" if prefix else str(name)
        value = tree[name]
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Inverse of `flatten`."""
    tree: Tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def map_tree(fn: Callable[[str, Any], Any], tree: Mapping, prefix: str = "") -> Tree:
    """`fn(path, leaf)` for every leaf of a nested dict; the structure stays, empty dicts included."""
    out = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        out[name] = map_tree(fn, value, path) if isinstance(value, Mapping) else fn(path, value)
    return out


def select(tree: Mapping, keep: Callable[[str], bool]) -> Tree:
    """The part of a nested dict whose leaf paths satisfy `keep`."""
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if keep(path)})


def fill(template: Mapping, *parts: Mapping) -> Tree:
    """A tree of the template's structure, empty dicts included, with the leaves of `parts`.

    Raises:
      ValueError: if a leaf of the template is in no part, in several, or a part has one that the template lacks.
    """
    flat: dict[str, Any] = {}
    for part in map(flatten, parts):
        if both := sorted(flat.keys() & part.keys()):
            raise ValueError(f"two trees hold {both[0]!r}")
        flat |= part
    if wrong := sorted(flat.keys() ^ flatten(template).keys()):
        raise ValueError(f"{wrong[0]!r} is in {'the parts but not in the template' if wrong[0] in flat else 'no part'}")
    return map_tree(lambda path, _: flat[path], template)


@cache
def _pattern(glob: str) -> re.Pattern:
    parts = re.split(r"(\*\*/|\*\*|\*)", glob)
    regex = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*"}
    return re.compile("".join(regex.get(part) or re.escape(part) for part in parts))


def matches(path: str, glob: str) -> bool:
    """Whether `path` matches `glob`: `*` is any one name, `**` any number of them (`**/ffn/*`, `generator/**`)."""
    return _pattern(glob).fullmatch(path) is not None
