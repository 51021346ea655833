"""Parquet files: rows as records, looked up by number through the row groups that they lie in."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from axrepro.data.base import Split
from axrepro.data.records import BadRecord, Example
from axrepro.data.sources.record_files import FileRecords, RecordFiles
from axrepro.errors import UserError, nearest, require

_GROUPS = 2  # decoded row groups that a thread keeps: one to read from, one to find the next record of a mixture in


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet files need the package pyarrow: pip install axrepro[data]") from None
    return pyarrow


@dataclass(frozen=True)
class Parquet(RecordFiles):
    """Rows of Parquet files, a record each; see `RecordFiles` for the other fields.

    Numbers, strings, bytes and None are what they are in Python. A list of numbers is an array, [N], and so is a nest
    of lists of a fixed size inside; another list is a list, a struct a dict.

    Each thread keeps two decoded row groups, of the chosen columns, so rows are to be looked up group by group, as
    `blocks` has them. Checksums of pages are verified where the file has them.

    Attributes:
      columns: those to read; None: all. They must be the same in all files.
    """

    columns: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self, "columns", self.columns is None or len(self.columns) > 0, "names of columns, or None for all")

    def _open(self, files: dict[str, str], split: Split, holdout: int) -> FileRecords:
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(self._footer, files))
        paths = list(files)
        for path, (_, schema) in zip(paths, found, strict=True):
            if schema != found[0][1]:
                first = dict(found[0][1])
                differ = sorted({name for name, _ in set(schema) ^ set(found[0][1])}) or list(first)
                told = ", ".join(f"{name}: {first.get(name, 'absent')} and {dict(schema).get(name, 'absent')}"
                                 for name in differ[:5])  # fmt: skip
                raise UserError(
                    f"{paths[0]} and {path} differ in columns ({told}); write them alike, or choose other columns"
                )
        names = [name for name, _ in found[0][1]]
        return _Rows(files, [groups for groups, _ in found], split, holdout, names)

    def _footer(self, path: str) -> tuple[list[int], list[tuple[str, str]]]:
        """The rows of each row group, and the chosen columns with their types."""
        with _told(path, UserError), _pyarrow().parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        for name in self.columns or ():
            if name not in schema.names:
                raise UserError(f"{path} has no column {name!r}; {nearest(name, schema.names)}")
        names = sorted(schema.names) if self.columns is None else self.columns
        return groups, [(name, str(schema.field(name).type)) for name in names]


@contextmanager
def _told(what: str, kind: type[UserError]) -> Iterator[None]:
    pyarrow = _pyarrow()
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise kind(f"cannot read {what}: {' '.join(str(error).split())[:200]}; write or copy it anew") from None


class _Rows(FileRecords):
    def __init__(self, files: dict[str, str], groups: list[list[int]], split: Split, holdout: int, columns: list[str]):
        """
        Args:
          groups: the rows of each row group of each file.
        """
        super().__init__(files, [sum(rows) for rows in groups], split, holdout)
        self._columns = columns
        self._bounds = [np.cumsum([0, *rows]) for rows in groups]
        places = [start + bounds[:-1] for start, bounds in zip(self._starts[:-1], self._bounds, strict=True)]
        blocks = self.before(np.append(np.concatenate(places), self.total))
        self._blocks = blocks[np.append(np.flatnonzero(np.diff(blocks)), len(blocks) - 1)]  # without empty groups
        self._local = threading.local()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._local = threading.local()

    @property
    def blocks(self) -> np.ndarray:
        return self._blocks

    def _read(self, file: int, number: int) -> Example:
        group = int(self._bounds[file].searchsorted(number, "right")) - 1
        columns = self._group(file, group, number)
        row = number - int(self._bounds[file][group])
        try:
            return {name: _value(column[row]) for name, column in columns.items()}
        except ValueError as error:  # a string that is not UTF-8
            raise BadRecord(f"{self._name(file, number)}: {error}") from None

    def _group(self, file: int, group: int, number: int) -> dict[str, Any]:
        if not hasattr(self._local, "groups"):
            self._local.groups = OrderedDict()
        groups = self._local.groups
        if (file, group) not in groups:
            while len(groups) >= _GROUPS:
                groups.popitem(last=False)
            what = f"{self._name(file, number)} in its row group {group}"
            parquet = _pyarrow().parquet
            with _told(what, BadRecord), parquet.ParquetFile(
                self.paths[file], page_checksum_verification=True
            ) as opened:  # fmt: skip
                table = opened.read_row_group(group, columns=self._columns, use_threads=False)
                table.validate()
            groups[file, group] = {name: table.column(name) for name in self._columns}
        groups.move_to_end((file, group))
        return groups[file, group]


def _value(scalar) -> Any:
    """An arrow scalar as a value of a record."""
    types = _pyarrow().types
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if types.is_struct(kind):
        return {name: _value(scalar[name]) for name in (kind.field(i).name for i in range(kind.num_fields))}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        values, shape = scalar.values, [len(scalar.values)]
        while types.is_fixed_size_list(values.type) and not values.null_count:
            shape.append(values.type.list_size)
            values = values.flatten()
        if _is_number(values.type) and not values.null_count:
            return values.to_numpy(zero_copy_only=False).reshape(shape)
        return [_value(one) for one in scalar.values]
    return scalar.as_py()


def _is_number(kind) -> bool:
    types = _pyarrow().types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
