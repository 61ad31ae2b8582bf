"""Read a table of captions into the columns filename, caption[, url, split, lang, prompt].

Takes any form that `formats` can parse, tells it from the content, and checks that all is text.
Used by processdata_01 and processdata_03.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pandas as pd
from pandas.api.types import infer_dtype
from pyarrow import ArrowException

from captionlib.errors import InputError
from captionlib.formats import COLUMNS, READERS, recognise, texts

FORMATS = ("auto", *READERS)
# What readers raise at broken files: JSON, CSV, Parquet and gz.
DAMAGE = (ValueError, RecursionError, OSError, ArrowException, EOFError, zlib.error)


def read_captions(path, format: str = "auto", encoding: str = "utf-8") -> pd.DataFrame:
    """One row a caption: filename, caption[, url, split, lang, prompt], all text.

    path: one table, several (a list), or one or several a split ({"train": path, ...}). format:
    "auto" tells it from the content; or "csv" (any delimiter; zero_nlp's text,url,filename is
    one), "tsv", "coco" (and STAIR), "karpathy", "flickr", "flickr8k-cn", "ai-challenger", "jsonl",
    "parquet". A gz file is read as what it holds. A table with URLs and no file names gets names
    made from the URLs. Raises InputError.
    """
    table = pd.concat(iter_captions(path, format, encoding), ignore_index=True)
    return table.fillna("")  # columns that only some of the tables have


def iter_captions(
    path, format: str = "auto", encoding: str = "utf-8", rows: int = 100_000
) -> Iterator[pd.DataFrame]:
    """The same table in pieces of at most `rows` lines or records of the file.

    Streams, but for JSON documents (coco, karpathy, ai-challenger), which are parsed whole: COCO
    2014's training captions (71 MB, 414,113 of them) take 0.5 GB and 3 s.
    """
    if format not in FORMATS:
        raise InputError(f"No format {format!r} of caption tables: choose {', '.join(FORMATS)}.")
    paths = list(_each(path))
    if not paths:
        raise InputError(f"No caption table is named by {path!r}: give at least one (--table).")
    for split, each in paths:
        for part in _read_one(each, format, encoding, rows):
            yield part if split is None else part.assign(split=split)


def _each(path, split: str | None = None) -> Iterator[tuple[str | None, Path]]:
    if isinstance(path, str | os.PathLike):
        yield split, Path(path)
    elif isinstance(path, dict):
        for name, paths in path.items():
            yield from _each(paths, name)
    else:
        for one in path:
            yield from _each(one, split)


def _read_one(path: Path, format: str, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    if path.is_dir():
        raise InputError(f"{path} is a folder, no caption table: name the files in it.")
    if not path.is_file():
        raise InputError(
            f"No captions table at {path}. It is yours to give (--table), or written by "
            "notebooks/processdata_01.ipynb (or: captionlib demo)."
        )
    empty = True
    try:
        format = recognise(path, encoding) if format == "auto" else format
        for part in READERS[format](path, encoding, rows):
            empty = empty and part.empty
            yield _as_text(_with_our_columns(part, path), path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not {encoding} (byte {error.start}): name its encoding, for example "
            "--encoding gbk (Chinese) or --encoding shift_jis (Japanese)."
        ) from None
    except pd.errors.EmptyDataError:
        pass
    except DAMAGE as error:
        if isinstance(error, InputError) or getattr(error, "errno", None):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read{'' if format == 'auto' else f' as {format}'}, it may be cut "
            f"short or damaged: {reason}"
        ) from None
    if empty:
        raise InputError(f"The table {path} has no rows: it needs a header line and captions.")


def _with_our_columns(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    lower = {str(name).strip().lower(): name for name in table.columns}
    found = {
        ours: next((lower[name] for name in names if name in lower), None)
        for ours, names in COLUMNS.items()
    }
    if not found["caption"] or not (found["filename"] or found["url"]):
        missing = "caption (or text)" if not found["caption"] else "filename (or url)"
        columns = " ".join(", ".join(map(str, table.columns)).split())[:300]
        raise InputError(f"{path} has no column {missing}. Its columns are: {columns}.")
    return pd.DataFrame({ours: table[name] for ours, name in found.items() if name})


def _as_text(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """All of it text; a list of captions becomes as many rows.

    What is not text (a null, a number) becomes "", for the accounting of `build` to count: one bad
    row of a million is no reason to stop. InputError where a whole piece has no text there.
    """
    for name in table:
        if infer_dtype(table[name], skipna=False) == "string":
            continue
        column = table[name].astype(object).map(_caption if name == "caption" else _text)
        if name in ("filename", "caption") and column.isna().all():
            where = f"{path}, {table.index.name or 'record'} {table.index[0]}"
            raise InputError(f"{where}: {name} is {table[name].iloc[0]!s:.60}, not text.")
        table = table.assign(**{name: column}).explode(name)
    table = table.fillna("").reset_index(drop=True)
    try:
        table = table.astype(str)
    except UnicodeEncodeError:
        table = table.map(_text).astype(str)
    if "filename" not in table:
        table.insert(0, "filename", table["url"].map(name_of_url))
    return table


def _caption(value) -> str | list[str] | None:
    return _text(value) if isinstance(value, str) else texts(value)


def _text(value) -> str | None:
    """JSON may bring half a surrogate pair, which no file can hold."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def name_of_url(url: str) -> str:
    """A file name of its own for a URL: a hash of it, with the suffix the URL has."""
    try:
        suffix = PurePosixPath(urlsplit(url).path).suffix.lower()
    except ValueError:  # a malformed URL; the download will say so
        suffix = ""
    suffix = suffix if suffix[1:].isalnum() and len(suffix) <= 5 else ".img"
    return hashlib.sha256(url.encode()).hexdigest()[:20] + suffix


def safe_path(folder, filename: str) -> Path | None:
    """folder / filename, or None when that is no file inside it (absolute, "..", a drive, "")."""
    parts = filename.replace("\\", "/").split("/")
    outside = {"..", ".", ""} & set(parts) or ":" in parts[0] or "\0" in filename
    return None if outside else Path(folder, *parts)
