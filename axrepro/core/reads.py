"""Which fields of a config tree some code reads: a field that nothing reads is a setting without effect."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from axrepro.core.config import walk

# what looks at all fields without using any: comparing, hashing and printing
_GENERIC = frozenset({"__eq__", "__hash__", "__repr__"})


@contextmanager
def recording_reads(tree) -> Iterator[set[tuple[str, str]]]:
    """Fills the set that it yields with (dotted path of a dataclass in `tree`, name of a field of it that was read).

    Nodes that are equal count as one, since jax may trace a function once for both. Not for use in several threads.
    """
    paths: dict = {}
    for path, node in walk(tree):
        paths.setdefault(node, []).append(path)
    names = {type(node): {f.name for f in fields(node)} for node in paths}
    seen: set[tuple] = set()
    read: set[tuple[str, str]] = set()
    originals = {cls: cls.__dict__.get("__getattribute__") for cls in names}

    def recorder(cls):
        inherited, own = cls.__getattribute__, names[cls]

        def __getattribute__(self, name):
            if name in own and type(self) is cls and sys._getframe(1).f_code.co_name not in _GENERIC:
                seen.add((id(self), name))
            return inherited(self, name)

        return __getattribute__

    by_id = {id(node): node for _, node in walk(tree)}
    for cls in names:
        cls.__getattribute__ = recorder(cls)  # pyrefly: ignore[bad-assignment]  # it becomes a method
    try:
        yield read
    finally:
        for cls, original in originals.items():
            if original is None:
                del cls.__getattribute__
            else:
                cls.__getattribute__ = original
        read |= {(path, name) for key, name in seen if key in by_id for path in paths[by_id[key]]}
