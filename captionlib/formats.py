"""Parse one caption file of a known form, and tell the form from its first lines.

Gives pieces of a raw table whose index is the number of the line or record; the names of its
columns are the file's own. `sources` names and checks the columns. Used by processdata_01.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from captionlib.errors import InputError

# Names found in the wild, the first one being ours.
COLUMNS = {
    "filename": ("filename", "file_name", "image", "image_path", "image_name", "path", "file"),
    "caption": ("caption", "text", "title", "sentence", "captions", "sentences", "comment"),
    "url": ("url", "image_url", "link"),
    "split": ("split",),
    "lang": ("lang", "language"),
    "prompt": ("prompt",),
}
KNOWN = {name for names in COLUMNS.values() for name in names}
DELIMITERS = "\t,;|"  # a comma may be part of a caption
HEAD = 1 << 16  # characters that tell the form
PICTURE = r"\.(?:jpe?g|png|webp|gif|bmp|tiff?)"
FLICKR = re.compile(rf"(?P<filename>[^\t]+{PICTURE})#\d+\t(?P<caption>.*)", re.I)
# One line of Flickr8k-CN; #enc# marks the English sentences of the same list.
FLICKR_CN = re.compile(r"(?P<filename>\S+)#(?P<lang>zh|en)[a-z]?#\d+\s+(?P<caption>.*)")
COCO_2014 = r"^COCO_((?:train|val|test)\d{4})_"  # its pictures lie in train2014/ and val2014/


def recognise(path: Path, encoding: str) -> str:
    """The format of a file, from its first bytes and lines. Raises InputError, which shows them."""
    with open(path, "rb") as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    head = _head(path, encoding)
    first = _first_line(head).strip()
    if head[:1] in ("{", "["):
        found = _json_form(head, first)
    elif FLICKR_CN.fullmatch(first):
        found = "flickr8k-cn"
    else:
        found = "flickr" if FLICKR.fullmatch(first) else _delimited_form(first)
    if not found and "\0" in head:
        raise InputError(
            f"{path} is a binary file that begins {head[:20]!r}, no caption table. Unpack an "
            "archive first; name the encoding of a text (--encoding utf-16-le)."
        )
    if not found:
        shown = " | ".join(repr(line[:60]) for line in head.splitlines()[:3])
        raise InputError(
            f"{path} is no caption table of a known form. It begins: {shown}. Known forms (name "
            f"one with --format): {', '.join(READERS)}."
        )
    return found


def _json_form(head: str, first: str) -> str:
    """Lines of objects, or one document? COCO too may be written on a single line."""
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        row = None  # a document of many lines, or a line longer than the head
    if isinstance(row, dict) and not row.keys() & {"images", "annotations"}:
        return "jsonl"
    if head.startswith("["):
        return "ai-challenger" if '"image_id"' in head else ""
    if '"sentences"' in head or '"sentids"' in head:
        return "karpathy"
    return "coco" if '"annotations"' in head or '"file_name"' in head else ""


def _delimited_form(first: str) -> str:
    separator, known = _separator(first, DELIMITERS)
    return "" if first and not known else "tsv" if separator == "\t" else "csv"


def _separator(first: str, choices: str) -> tuple[str, int]:
    """The delimiter that makes most sense of the first line, and how many fields it knows then."""
    split = {each: _fields(first, each) for each in choices}
    known = {each: sum(map(_is_known, fields)) for each, fields in split.items()}
    best = max(choices, key=lambda each: (known[each], len(split[each])))
    return best, known[best]


def _fields(line: str, separator: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line], delimiter=separator), [])]


def _is_known(field: str) -> bool:
    return field.lower() in KNOWN or _kind(field) != "caption"


def _kind(field: str) -> str:
    """What a field of a row is."""
    if re.match(r"https?://", field, re.I):
        return "url"
    return "filename" if re.search(PICTURE + "$", field, re.I) else "caption"


def _head(path: Path, encoding: str) -> str:
    with open_text(path, encoding, "replace") as file:
        return file.read(HEAD).lstrip("\r\n")


def _first_line(head: str) -> str:
    return re.split("[\r\n]", head, maxsplit=1)[0]


def open_text(path: Path, encoding: str, errors: str = "strict") -> TextIO:
    """A text file, gz or not. A byte-order mark is believed more than `encoding`."""
    raw, encoding = _open_bytes(path, encoding)
    try:
        return io.TextIOWrapper(raw, encoding, errors, newline="")
    except LookupError:
        raise InputError(f"No encoding {encoding!r}: for example utf-8, gbk, shift_jis.") from None


def _open_bytes(path: Path, encoding: str) -> tuple[BinaryIO, str]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    raw = (gzip.open if packed else open)(path, "rb")
    marks = {b"\xef\xbb": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    return raw, marks.get(raw.peek(2)[:2], encoding)


def read_delimited(path: Path, encoding: str, rows: int, choices=DELIMITERS) -> Iterator:
    """CSV: the delimiter is found. A table without a header line (CC3M) has its columns guessed."""
    first = _first_line(_head(path, encoding))
    separator, _ = _separator(first, choices)
    kinds = [_kind(field) for field in _fields(first, separator)]
    headless = kinds.count("caption") == 1 and 1 < len(kinds) == len(set(kinds))
    options = {"header": None, "names": kinds} if headless else {}
    text = {"dtype": str, "keep_default_na": False}  # a caption may be the word "null"
    file, encoding = _open_bytes(path, encoding)
    options["encoding"] = encoding.removesuffix("-sig")  # pandas skips the mark; a text is slow
    with file, pd.read_csv(file, sep=separator, chunksize=rows, **text, **options) as parts:
        for part in parts:
            if not isinstance(part.index, pd.RangeIndex):  # pandas took the first field for it
                raise InputError(
                    f"{path} has rows with more fields than its header: put captions with a "
                    "comma in quotes."
                )
            yield part.fillna("")  # fields missing at the end of a row


def read_tsv(path: Path, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    """The same with a tab between fields, whatever else the lines hold."""
    return read_delimited(path, encoding, rows, "\t")


def read_jsonl(path: Path, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    """One object a line; a caption may be a list."""
    with open_text(path, encoding) as lines:
        yield from _tables(_objects(lines, path), rows, "line")


def _objects(lines: Iterable[str], path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}, is no JSON: {error}.") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}, is no JSON object: {line.strip()[:60]!r}.")
        yield number, row


def read_flickr(path: Path, encoding: str, rows: int, form=FLICKR) -> Iterator[pd.DataFrame]:
    """Flickr8k.token.txt, results_20130124.token: `name.jpg#0<tab>caption`."""

    def found(lines: Iterable[str]) -> Iterator[tuple[int, dict]]:
        for number, line in enumerate(lines, 1):
            if match := form.fullmatch(line.strip()):
                yield number, match.groupdict()
            elif line.strip():
                raise InputError(
                    f"{path}, line {number}, is not `name.jpg#0 caption`: {line[:60]!r}."
                )

    with open_text(path, encoding) as lines:
        yield from _tables(found(lines), rows, "line")


def read_flickr_cn(path: Path, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    """Flickr8k-CN: `name.jpg#zhc#0 caption`."""
    return read_flickr(path, encoding, rows, FLICKR_CN)


def read_coco(path: Path, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    """COCO and STAIR: images (id, file_name, coco_url) and annotations (image_id, caption)."""
    images, notes = _lists(path, encoding, "images", "annotations")
    of_id = {str(image.get("id")): image for image in images}
    pairs = ((of_id.get(str(note.get("image_id")), {}), note) for note in notes)
    found = (
        {
            "filename": image.get("file_name"),
            "caption": note.get("caption"),
            "url": image.get("coco_url", ""),
        }
        for image, note in pairs
    )
    for part in _tables(enumerate(found, 1), rows):
        part["filename"] = part.filename.str.replace(COCO_2014, r"\1/\g<0>", regex=True)
        yield part


def read_karpathy(path: Path, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    """dataset_coco.json, dataset_flickr8k.json: images (filename[, filepath], split, sentences).

    The split restval (pictures of COCO's val2014 that papers train on) becomes train.
    """
    (images,) = _lists(path, encoding, "images")
    found = (
        (
            number,
            {
                "filename": _karpathy_name(image.get("filepath"), image.get("filename")),
                "caption": image.get("sentences"),
                "split": "train" if image.get("split") == "restval" else image.get("split"),
            },
        )
        for number, image in enumerate(images, 1)
    )
    return _tables(found, rows)


def _karpathy_name(folder, name):
    return f"{folder}/{name}" if folder and name else name


def read_ai_challenger(path: Path, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    """AI Challenger 2017: a list of {"url", "image_id", "caption": [five texts]}, in Chinese."""
    (found,) = _lists(path, encoding)
    for part in _tables(enumerate(found, 1), rows):
        yield part.rename(columns={"image_id": "filename"}).assign(lang="zh")


def _lists(path: Path, encoding: str, *keys: str) -> list[list[dict]]:
    """The lists of objects that a JSON document holds under `keys`, or is. Read as a whole."""
    with open_text(path, encoding) as file:
        content = json.load(file)
    if keys and not (isinstance(content, dict) and content.keys() >= set(keys)):
        raise InputError(f"{path} has no {' and '.join(map(repr, keys))}: of another format?")
    lists = [content[key] for key in keys] or [content]
    for found in lists:
        if not (isinstance(found, list) and all(isinstance(row, dict) for row in found)):
            raise InputError(f"{path} is damaged: not lists of objects. {str(found)[:60]!r}")
    return lists


def read_parquet(path: Path, encoding: str, rows: int) -> Iterator[pd.DataFrame]:
    """Only the columns that sources knows: img2dataset's may hold pictures too."""
    with pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name.strip().lower() in KNOWN]
        if not names:
            yield pd.DataFrame(columns=file.schema_arrow.names)  # sources says what is missing
        start = 1
        for batch in file.iter_batches(rows, columns=names):
            batch.validate(full=True)  # else bytes that are no UTF-8 fail anywhere, later
            part = batch.to_pandas(ignore_metadata=True)
            for name, column in part.items():
                if not isinstance(column.dtype, pd.StringDtype):  # lists, categories, numbers
                    part[name] = column.astype(object).map(_plain)
            part.index = range(start, start := start + len(part))
            yield part.fillna("")


def _plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def texts(value) -> list[str] | None:
    """The captions of a field: a text, a list of them or of {"raw": text}; None: no such thing."""
    values = value if isinstance(value, list) else [value]
    found = [each.get("raw") if isinstance(each, dict) else each for each in values]
    return found if all(isinstance(each, str) for each in found) else None


def _tables(found: Iterable[tuple[int, dict]], rows: int, unit: str = "record") -> Iterator:
    """Tables of at most `rows` records; the index is each one's number in the file."""
    found = iter(found)
    while piece := list(islice(found, rows)):
        numbers, records = zip(*piece, strict=True)
        yield pd.DataFrame(records, index=pd.Index(numbers, name=unit), dtype=object)


READERS = {
    "csv": read_delimited,
    "tsv": read_tsv,
    "coco": read_coco,
    "karpathy": read_karpathy,
    "flickr": read_flickr,
    "flickr8k-cn": read_flickr_cn,
    "ai-challenger": read_ai_challenger,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}
