"""Writes one row per image: to the screen, or as CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import io
import json
import os
import select
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from cit_scale.datasets.index import printable
from cit_scale.errors import ConfigError
from cit_scale.inference.outputs import is_replaceable

Row = Mapping[str, Any]
"""Values by column; every row has the same columns. Texts may hold undecodable bytes, as file names do."""


class Writer(Protocol):
    """Writes rows in one format."""

    def write(self, rows: Sequence[Row]) -> bool:
        """Returns False if nobody reads any more."""

    def close(self) -> None: ...


class Sheet:
    """Rows with the same columns, in a file or on the screen. The file is called OUT.partial until ``finish``.

    out: the file; None: the screen. kind: one of FORMATS; None: by the file's name, text on the screen. columns: in
    their order, each with the type of its values. Raises ConfigError and OSError.
    """

    def __init__(self, out: str | None, kind: str | None, columns: Mapping[str, type]) -> None:
        kind = kind_of(out, kind)
        self._path = None if out is None else Path(out)
        self._appears = self._path is None or is_replaceable(self._path)
        if self._path is None:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="surrogateescape")  # a name that is not UTF-8 is written as it is
            self._writer: Writer = _LINES[kind](sys.stdout, columns)
            return
        if kind == "parquet":
            self._writer = _Parquet(self._partial, columns)
        else:
            self._writer = _LINES[kind](_open_text(self._partial), columns)

    @property
    def _partial(self) -> Path:
        """The file that is written, until it gets its name. A device or a named pipe has its own."""
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.partial") if self._appears else self._path

    def write(self, rows: Sequence[Row]) -> bool:
        """Returns False if nobody reads any more."""
        return self._writer.write(rows)

    def finish(self) -> None:
        """Write what is left, and give the file its name."""
        self._writer.close()
        if self._path is not None and self._appears:
            self._partial.replace(self._path)

    def abandon(self) -> None:
        """Delete what was written: it ends with an error."""
        if self._path is not None and self._appears:
            self._partial.unlink(missing_ok=True)


def _open_text(path: Path) -> IO[str]:
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


def kind_of(out: str | None, kind: str | None) -> str:
    """The format of a file. Raises ConfigError for a name that does not say it, and for Parquet on a screen."""
    if out is None and kind == "parquet":
        raise ConfigError("--format parquet needs a file; say where with --out FILE.parquet")
    if kind is not None:
        return kind
    if out is None:
        return "text"
    suffix = os.path.splitext(out)[1].lower()
    by_suffix = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text"}
    if suffix not in by_suffix:
        raise ConfigError(f"--out {printable(out)} does not say which format; end it in {', '.join(by_suffix)}")
    return by_suffix[suffix]


class _Lines:
    """Writes text. A line is written whole or not at all."""

    def __init__(self, file: IO[str], columns: Mapping[str, type]) -> None:
        self._file = file
        self._columns = list(columns)

    def write(self, rows: Sequence[Row]) -> bool:
        self._file.write("".join(map(self.line, rows)))
        self._file.flush()
        return not _is_unread(self._file)

    def line(self, row: Row) -> str:
        raise NotImplementedError

    def close(self) -> None:
        self._file.flush()
        if self._file is not sys.stdout:
            self._file.close()


class _Text(_Lines):
    def line(self, row: Row) -> str:
        if row["reason"] is not None:
            return f"{printable(row['image'])}  cannot be used: {row['reason']}\n"
        ranked = (name for name in self._columns if name.startswith("class_"))
        found = [f"{printable(row[name])} {row[name.replace('class', 'prob')]:.3f}" for name in ranked]
        heads = [name.removeprefix("says_") for name in self._columns if name.startswith("says_")]
        others = [f"{head} says {printable(row[f'says_{head}'])} {row[f'prob_{head}']:.3f}" for head in heads]
        more = [f"disagreement {row['disagreement']:.3f}"] if "disagreement" in row else []
        return f"{printable(row['image'])}  {', '.join(found)}{'  ' if more else ''}{', '.join([*others, *more])}\n"


class _Csv(_Lines):
    def __init__(self, file: IO[str], columns: Mapping[str, type]) -> None:
        super().__init__(file, columns)
        file.write(self.line({name: name for name in columns}))

    def line(self, row: Row) -> str:
        values = [_number(row[name]) for name in self._columns]
        # Python's writer leaves a lone carriage return unquoted, which its reader takes for the end of a row.
        has_return = any("\r" in str(value) for value in values)
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL, lineterminator="\n").writerow(
            values
        )
        return text.getvalue()


class _JsonLines(_Lines):
    def line(self, row: Row) -> str:
        return json.dumps({name: _number(row[name]) for name in self._columns}, allow_nan=False) + "\n"


class _Parquet:
    """A row group for each call of ``write``."""

    def __init__(self, path: Path, columns: Mapping[str, type]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ConfigError("Parquet needs pyarrow; pip install 'cit-scale[parquet]'") from None
        types = {str: pyarrow.string(), float: pyarrow.float64()}
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self._table = pyarrow.Table
        self._file = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, rows: Sequence[Row]) -> bool:
        values = {name: [_valid(_number(row[name])) for row in rows] for name in self._schema.names}
        self._file.write_table(self._table.from_pydict(values, schema=self._schema))
        return True

    def close(self) -> None:
        self._file.close()


_LINES: dict[str, type[_Lines]] = {"text": _Text, "csv": _Csv, "jsonl": _JsonLines}


def _number(value: Any) -> Any:
    """Probabilities with six digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _valid(value: Any) -> Any:
    """Parquet's texts are UTF-8: bytes of a name that are not are written as escapes."""
    return os.fsencode(value).decode("utf-8", "backslashreplace") if isinstance(value, str) else value


def _is_unread(file: IO[str]) -> bool:
    """Whether a pipe has no reader any more: what is written is dropped then (``text.outlive_readers``)."""
    try:
        descriptor = file.fileno()
    except (OSError, ValueError):  # not backed by a descriptor, as under pytest
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))
