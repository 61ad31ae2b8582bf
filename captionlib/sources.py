"""Read a table of captions into the columns filename, caption[, url, split, lang, prompt].

Reads the CSV or TSV of zero_nlp (text, url, filename), a plain CSV of file names and captions, and
the JSON of COCO and STAIR Captions. Used by processdata_01 and processdata_03.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pandas as pd

from captionlib.errors import InputError

# Names found in the wild, the first one being ours.
COLUMNS = {
    "filename": ("filename", "file_name", "image", "image_path", "image_name", "path", "file"),
    "caption": ("caption", "text", "title", "sentence"),
    "url": ("url", "image_url", "link"),
    "split": ("split",),
    "lang": ("lang", "language"),
    "prompt": ("prompt",),
}
FORMATS = ("auto", "csv", "tsv", "coco")


def read_captions(path, format: str = "auto", encoding: str = "utf-8") -> pd.DataFrame:
    """One row a caption: filename, caption[, url, split, lang, prompt], all text.

    path: one table, several (a list), or one a split ({"train": path, ...}). format: "csv" or
    "tsv" with a header (zero_nlp's text,url,filename is one), "coco" (COCO and STAIR JSON), "auto"
    by the name's ending. A table with URLs and no file names gets names made from the URLs.
    Raises InputError.
    """
    if isinstance(path, dict):
        parts = [read_captions(p, format, encoding).assign(split=s) for s, p in path.items()]
        return pd.concat(parts, ignore_index=True)
    paths = [path] if isinstance(path, str | Path) else path
    table = pd.concat([part for each in paths for part in iter_captions(each, format, encoding)])
    return table.fillna("").reset_index(drop=True)


def iter_captions(
    path, format: str = "auto", encoding: str = "utf-8", rows: int = 100_000
) -> Iterator[pd.DataFrame]:
    """The same table in pieces of at most `rows` rows (a COCO file is one piece)."""
    path = Path(path)
    format = _format_of(path, format)
    if not path.is_file():
        raise InputError(
            f"No captions table at {path}. It is yours to give (--table), or written by "
            "notebooks/processdata_01.ipynb (or: captionlib demo)."
        )
    read = _read_coco if format == "coco" else _read_delimited
    empty = True
    try:
        for part in read(path, format, encoding, rows):
            empty = empty and part.empty
            yield _with_our_columns(part, path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not {encoding} (byte {error.start}): name its encoding, for example "
            "--encoding gbk (Chinese) or --encoding shift_jis (Japanese)."
        ) from None
    except (pd.errors.ParserError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as {format}: {error}".strip()) from None
    except pd.errors.EmptyDataError:
        pass
    if empty:
        raise InputError(f"The table {path} has no rows: it needs a header line and captions.")


def _format_of(path: Path, format: str) -> str:
    if format not in FORMATS:
        raise InputError(f"No format {format!r} of caption tables: choose {', '.join(FORMATS)}.")
    by_suffix = {".tsv": "tsv", ".json": "coco"}
    return by_suffix.get(path.suffix.lower(), "csv") if format == "auto" else format


def _read_delimited(path: Path, format: str, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    separator = "\t" if format == "tsv" else ","
    encoding = "utf-8-sig" if encoding.lower().replace("-", "") == "utf8" else encoding  # Excel's
    text = {"dtype": str, "keep_default_na": False}  # a caption may be the word "null"
    try:
        for part in pd.read_csv(path, sep=separator, encoding=encoding, chunksize=rows, **text):
            if not isinstance(part.index, pd.RangeIndex):  # pandas took the first field for it
                raise InputError(
                    f"{path} has rows with more fields than its header: put captions with a "
                    "comma in quotes."
                )
            yield part
    except LookupError:
        raise InputError(f"No encoding {encoding!r}: for example utf-8, gbk, shift_jis.") from None


def _read_coco(path: Path, format: str, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    """COCO: images (id, file_name, coco_url) and annotations (image_id, caption)."""
    content = json.loads(path.read_text(encoding))
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise InputError(f"{path} is not a COCO captions file: no 'images' and 'annotations'.")
    try:
        images = {image["id"]: image for image in content["images"]}
        found = [(images[a["image_id"]], a["caption"]) for a in content["annotations"]]
        columns = {
            "filename": [_coco_name(image["file_name"]) for image, _ in found],
            "caption": [caption for _, caption in found],
            "url": [image.get("coco_url", "") for image, _ in found],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is a damaged COCO captions file: {error!r}") from None
    yield pd.DataFrame(columns, dtype=str)


def _coco_name(name: str) -> str:
    """COCO 2014 keeps its pictures in train2014/ and val2014/; the name says which."""
    found = re.match(r"COCO_((?:train|val|test)\d{4})_", name)
    return f"{found[1]}/{name}" if found else name


def _with_our_columns(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    lower = {str(name).strip().lower(): name for name in table.columns}
    found = {
        ours: next((lower[name] for name in names if name in lower), None)
        for ours, names in COLUMNS.items()
    }
    if not found["caption"] or not (found["filename"] or found["url"]):
        missing = "caption (or text)" if not found["caption"] else "filename (or url)"
        columns = ", ".join(map(str, table.columns))
        raise InputError(f"{path} has no column {missing}. Its columns are: {columns}.")
    table = pd.DataFrame({ours: table[name] for ours, name in found.items() if name})
    if "filename" not in table:
        table.insert(0, "filename", table["url"].map(name_of_url))
    return table


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
