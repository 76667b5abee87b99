"""The rows of a user's data: of files, lists, tables and datasets, whatever is in them."""

import csv
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from modelhub.errors import DataError
from modelhub.training.missing import is_missing

LARGEST_CELL = 100_000_000  # characters of a CSV file's cell: beyond it a quote is missing, or worse
_CSV_ROWS = 1000  # read at a time

Broken = Callable[[str], None]  # is told of a row that cannot be read


def rows_of(data: Any, broken: Broken | None = None) -> Iterator[tuple[str, Any]]:
    """(where it is, row) of each row. broken: told of a file's rows that cannot be read; None: they raise DataError."""
    if isinstance(data, str | Path):
        yield from _read_file(Path(data), broken or _raise)
        return
    if isinstance(data, Mapping):
        raise DataError(
            f"the data is a dict with the keys {shown(data)}; give a list of rows, or of a DatasetDict one split: "
            f'data["train"]'
        )
    if is_table(data):  # iterating one would give its columns, or their names
        data = _rows_of_table(data)
    if not isinstance(data, Iterable):
        raise DataError(f"the data is a {type(data).__name__}; give a path, a list of str or dicts, or a Dataset")
    for number, row in enumerate(data, 1):
        yield f"row {number}", row


def is_table(data: Any) -> bool:
    """Whether it is a DataFrame of pandas or polars, or an Arrow table: none of them need be installed."""
    return any(hasattr(data, name) for name in ("iterrows", "iter_rows", "to_batches")) and not is_series(data)


def is_series(data: Any) -> bool:
    """Whether it is one column of a DataFrame."""
    return hasattr(data, "to_frame")


def _rows_of_table(table: Any) -> Iterable[Any]:
    if hasattr(table, "iterrows"):
        columns = list(getattr(table, "columns", ()))
        if repeated := sorted({str(name) for name in columns if columns.count(name) > 1}):
            raise DataError(f"the DataFrame has several columns of the name {', '.join(repeated)}; rename or drop one")
        return table.to_dict("records")
    if hasattr(table, "iter_rows"):
        return table.iter_rows(named=True)
    return (row for batch in table.to_batches(1024) for row in batch.to_pylist())


# --- files ------------------------------------------------------------------------------------------------------------


def _raise(problem: str) -> NoReturn:
    raise DataError(problem)


def _read_file(path: Path, broken: Broken) -> Iterator[tuple[str, Any]]:
    readers = {
        ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet, ".tsv": _read_csv,
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path!s:.200}: cannot tell the format from the extension {path.suffix!r}; known: {', '.join(readers)}. "
            f"Texts themselves go in a list"
        )
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        yield from readers[path.suffix.lower()](path, broken)
    except UnicodeDecodeError as error:  # of UTF-16, which says so at its start
        raise DataError(f"{path} is not the {error.encoding} that it says it is ({error}); save it as UTF-8") from None


def _opened(path: Path, newline: str | None = None) -> TextIO:
    """A text file, read as UTF-8, or as the byte order mark at its start says.

    Bytes that are no UTF-8 become half surrogates, so that the row they are in can be named; see `_not_utf8`.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return path.open(encoding="utf-32", newline=newline)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return path.open(encoding="utf-16", newline=newline)
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _not_utf8(text: str) -> str | None:
    """What is wrong with a text of such a file; None: nothing."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start])
        if 0xDC80 <= byte <= 0xDCFF:
            return f"is not UTF-8 (the byte 0x{byte - 0xDC00:02x} at character {error.start + 1}); save it as UTF-8"
    return None


def _read_jsonl(path: Path, broken: Broken) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        number = 0
        for line_number, line in enumerate(file, 1):
            if line.strip():
                number += 1
                if problem := _not_utf8(line):
                    broken(f"{path}, row {number} (line {line_number}) {problem}")
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    broken(f"{path} is not valid JSON on line {line_number}: {error}")
                    continue
                yield f"{path}, row {number} (line {line_number})", row


def _read_json(path: Path, broken: Broken) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        text = file.read()
    for line_number, line in enumerate(text.split("\n"), 1):
        if problem := _not_utf8(line):
            raise DataError(f"{path}, line {line_number} {problem}")
    try:
        rows = json.loads(text or "[]")
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataError(f"{path} is not valid JSON on line {error.lineno}: {error}") from None
        yield from _read_jsonl(path, broken)  # one object a line: .jsonl under another name
        return
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


_field_size = threading.Lock()  # the limit on a cell is the csv module's own, for the whole process


def _read_csv(path: Path, broken: Broken) -> Iterator[tuple[str, Any]]:
    """With commas, semicolons or tabs between the cells, whichever the header has."""
    with _opened(path, newline="") as file:
        reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
        names: list[str] | None = None
        number = 0
        for line, cells in _lines(reader, path):
            if names is None:
                names = [name.strip() for name in cells]
                if problem := _not_utf8(" ".join(names)):
                    raise DataError(f"{path}, the header (line {line}) {problem}")
                if repeated := sorted({name for name in names if name and names.count(name) > 1}):
                    raise DataError(f"{path} has several columns of the name {', '.join(repeated)}; rename one")
                continue
            number += 1
            where = f"{path}, row {number} (line {line})"
            if len(cells) > len(names):
                broken(
                    f"{where} has more cells than the header has names ({len(cells)} and {len(names)}); quote cells "
                    f"that hold the separator"
                )
                continue
            if problem := next(filter(None, map(_not_utf8, cells)), None):
                broken(f"{where} {problem}")
                continue
            yield where, dict(itertools.zip_longest(names, cells))


def _lines(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(its last line, cells) of each row that is not empty."""
    ended = False
    while not ended:
        rows, before = [], reader.line_num
        with _field_size:
            limit = csv.field_size_limit(LARGEST_CELL)
            try:
                for _ in range(_CSV_ROWS):
                    before = reader.line_num
                    rows.append((next(reader), reader.line_num))
            except StopIteration:
                ended = True
            except csv.Error as error:
                problem = f"{path} is not valid CSV near line {before}: {error}"
                if "field larger" in str(error):
                    problem = (
                        f"{path} is not valid CSV near line {before}: a cell has more than {LARGEST_CELL:,} "
                        f"characters; a quote may be missing. Larger texts go in a .jsonl or .parquet file"
                    )
                raise DataError(problem) from None
            finally:
                csv.field_size_limit(limit)
        yield from ((line, cells) for cells, line in rows if cells)


def _delimiter(path: Path) -> str:
    """The one that cuts the header into the most names."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with _opened(path, newline="") as file:
        header = file.readline(1_000_000)

    def names(delimiter: str) -> int:
        try:
            return len(next(csv.reader([header], delimiter=delimiter, strict=True), ()))
        except csv.Error:
            return 0

    return max((",", ";", "\t"), key=names)


def _read_parquet(path: Path, broken: Broken) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(1024)  # not the whole table beside its rows
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f"{path}, row {number}", row
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a Parquet file that pyarrow reads: {error}") from None


def shown(row: Any) -> str:
    """A row's keys, for errors; what is no dict as it is."""
    if not isinstance(row, Mapping):
        return f"{type(row).__name__}: {row!r:.80}"
    keys = list(row)[:20]
    without = [str(key) for key in keys if is_missing(row[key])]
    told = ", ".join(map(str, keys)) or "no keys"
    return told + (f" (without a value: {', '.join(without)})" if without else "")
