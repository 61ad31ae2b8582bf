"""Take pictures and captions from where others put them, in place of downloading.

From WebDataset tar shards, img2dataset's output (webdataset, files or parquet), a folder of
pictures with a text beside each, or a Hugging Face dataset. Sources are streamed; bytes are kept
as they are and not decoded. Used by processdata_01.
"""

import csv
import hashlib
import json
import os
import posixpath
import re
import tarfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob, has_magic
from itertools import chain, count, groupby, islice
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from pyarrow import ArrowException

from captionlib.errors import InputError
from captionlib.formats import COLUMNS, texts
from captionlib.shards import write_atomic
from captionlib.sources import safe_path

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl")
TEXTS = (".json", ".txt", ".caption")  # beside a picture; the first that holds a caption counts
TARS = (".tar", ".tar.gz", ".tgz")
SHARDS = (*TARS, ".parquet")
# Files that tell a folder of `datasets`: two of save_to_disk, two of an image folder.
DATASET = ("dataset_dict.json", "state.json", "metadata.csv", "metadata.jsonl")
MAX_BYTES = 100_000_000  # of one file in a tar
MAGIC = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"RI": ".webp", b"BM": ".bmp"}
PLAIN = re.compile(r"[\w./ -]{1,80}")  # keys that may be file names anywhere
TABLE = ["filename", "caption", "url", "split", "lang"]
DOWNLOADS = ["filename", "url", "status", "reason", "tries"]
DOWNLOADS += ["http_status", "bytes", "sha256", "time"]
BLOCK = 5000  # outcomes held as Python values
# What tarfile, pyarrow and the file system raise at a shard that is damaged.
DAMAGE = (tarfile.TarError, ArrowException, OSError, EOFError, ValueError, zlib.error)


@dataclass
class Sample:
    """A picture of the source: its name here, its bytes, or the reason why there are none."""

    filename: str
    data: bytes | None = None
    reason: str = ""
    captions: list[str] = field(default_factory=list)
    url: str = ""
    split: str = ""
    lang: str = ""


def take_in(source: str | Path, images_dir, table_path) -> pd.DataFrame:
    """Write the pictures of `source` to images_dir and its captions to the CSV table_path.

    source: a folder or file pattern of tar shards or of img2dataset's output; a folder of
    pictures, each with a .txt, .caption or .json beside it; a Hugging Face dataset (a folder of
    `save_to_disk`, of Parquet files, or what `datasets.load_dataset` takes). The table has the
    columns filename, caption, url, split, lang, a row a caption of the source. Returns one row a
    picture with the columns of `captionlib.download`; "failed" ones have a reason. A picture that
    is there already is not written again. Raises InputError.
    """
    parts = []

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(TABLE)
            taken = (_take(sample, Path(images_dir)) for sample in _samples(str(source)))
            while block := list(islice(taken, BLOCK)):
                table.writerows(chain.from_iterable(rows for rows, _ in block))
                parts.append(pd.DataFrame([outcome for _, outcome in block], columns=DOWNLOADS))
        if not any((part.status == "ok").any() for part in parts):
            why = f": {parts[0].filename[0]}: {parts[0].reason[0]}" if parts else ""
            raise InputError(f"No picture could be taken from {source}{why}.")

    write_atomic(table_path, write)
    return pd.concat(parts, ignore_index=True)


def _take(sample: Sample, images_dir: Path) -> tuple[list[tuple], tuple]:
    """The sample's rows of the table, and its outcome, after its picture is written."""
    name, url = sample.filename, _clean(sample.url)
    captions = map(_clean, sample.captions or [""])
    rows = [(name, each, url, _clean(sample.split), _clean(sample.lang)) for each in captions]
    reason = sample.reason or _write(sample.data, safe_path(images_dir, name))
    if reason:
        return rows, (name, url, "failed", reason, 1, None, None, None, time.time())
    digest = hashlib.sha256(sample.data).hexdigest()
    return rows, (name, url, "ok", "", 1, None, len(sample.data), digest, time.time())


def _write(data: bytes | None, path: Path | None) -> str:
    """Write a picture, if it is not there already; the reason where it cannot be."""
    if path is None:
        return "unsafe file name"
    if not data:
        return "no picture in the source"
    try:
        if not (path.is_file() and path.read_bytes() == data):
            write_atomic(path, lambda temporary: temporary.write_bytes(data))
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        return f"cannot be written: {error.strerror}"  # a picture has the name of a folder
    return ""


def _clean(text) -> str:
    """A text that a CSV can hold: JSON may bring half a surrogate pair."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def _samples(source: str) -> Iterator[Sample]:
    """Tell the kind of source; nothing of it is held but the names of its shards."""
    folder = Path(source)
    if not folder.is_dir():
        files = [folder] if folder.exists() else [Path(name) for name in sorted(glob(source))]
        hub = not files and not has_magic(source) and _suffix(source) not in SHARDS
        return _of_dataset(source) if hub else _of_shards(files, source)
    names = (name for _, _, names in os.walk(folder) for name in names)
    kinds = {name if name in DATASET else _suffix(name) for name in names}
    if kinds & set(DATASET):
        return _of_dataset(source)
    if not kinds & set(TARS) and kinds & set(PICTURES):
        return _of_folder(folder)
    shards = TARS if kinds & set(TARS) else SHARDS
    return _of_shards(sorted(p for p in folder.rglob("*") if _suffix(p.name) in shards), source)


def _suffix(name: str) -> str:
    return re.search(r"((\.tar)?\.[^./]*)?$", name.lower())[0]


def _stem(name: str) -> str:
    return name[: len(name) - len(_suffix(name))]


def _of_shards(files: list[Path], source: str) -> Iterator[Sample]:
    """Tar shards, or Parquet shards of img2dataset or datasets."""
    wrong = [path for path in files if _suffix(path.name) not in SHARDS]
    if wrong or not files:
        raise InputError(
            f"{wrong[0] if wrong else source} is no tar or Parquet shard, folder of pictures or "
            "Hugging Face dataset."
        )
    tars = [path for path in files if _suffix(path.name) in TARS]
    if not tars and not _is_img2dataset(files[0]):
        yield from _of_dataset(source)
        return
    top = os.path.commonpath([path.parent for path in files])
    folders: set[str] = set()
    for path in tars or files:
        folder = _stem(path.relative_to(top).as_posix())
        if folder in folders:  # 0.tar beside 0.tar.gz
            folder += _suffix(path.name).replace(".", "-")
        folders.add(folder)
        read = _of_tar if tars else _of_table
        yield from _unique(_whole(read(path, folder), path, folder))


def _whole(samples: Iterator[Sample], path: Path, folder: str) -> Iterator[Sample]:
    """The samples of a shard, and the failed ones that only its metadata knows.

    img2dataset writes X.parquet beside X.tar or the folder X: a row for every URL it tried.
    """
    keys = set()
    for sample in _guarded(samples, f"{folder}{_suffix(path.name)}"):
        keys.add(sample.filename.rpartition(".")[0])
        yield sample
    meta = path.parent / f"{_stem(path.name)}.parquet"
    if meta != path and meta.is_file() and _is_img2dataset(meta):
        for sample in _guarded(_of_table(meta, folder), f"{folder}.parquet"):
            if sample.filename.rpartition(".")[0] not in keys:
                yield sample


def _guarded(samples: Iterator[Sample], name: str) -> Iterator[Sample]:
    """What is wrong with a file becomes a failed sample of that name."""
    try:
        yield from samples
    except DAMAGE as error:
        reason = f"damaged, the rest of it is not read: {' '.join(str(error).split())}"
        yield Sample(name, reason=reason)


def _unique(samples: Iterator[Sample]) -> Iterator[Sample]:
    """A name that is there already, in small or capital letters, gets a number."""
    names = set()
    for sample in samples:
        stem, suffix = os.path.splitext(sample.filename)
        number = count(2)
        while sample.filename.lower() in names:
            sample.filename = f"{stem}-{next(number)}{suffix}"
        names.add(sample.filename.lower())
        yield sample


def _filename(folder: str, key: str, suffix: str) -> str:
    """The key in its shard's folder; one that is safe but odd is replaced by a hash of it."""
    if safe_path("", key + suffix) and not PLAIN.fullmatch(key):
        key = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:20]
    return posixpath.join(folder, key + suffix)


def _of_tar(path: Path, folder: str) -> Iterator[Sample]:
    """WebDataset: the files that are neighbours and equal up to the first dot are one sample."""
    with tarfile.open(path) as archive:
        for key, members in groupby(_members(archive), lambda member: member[0]):
            files = [(suffix, *_read(archive, member)) for _, suffix, member in members]
            pictures = [file for file in files if "." + file[0].rpartition(".")[2] in PICTURES]
            beside = {suffix: data for suffix, data, _ in files if suffix in TEXTS}
            first = min(pictures, key=lambda file: len(file[0]), default=(".jpg", None, ""))
            yield _sample(_filename(folder, key, first[0]), *first[1:], beside)
            for suffix, *_ in (file for file in pictures if file is not first):
                reason = "a further picture of its sample"
                yield Sample(_filename(folder, key, suffix), reason=reason)
        archive.fileobj.seek(archive.offset)  # tarfile takes a broken header for the end
        if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end")


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, suffix, member) of what is neither a folder nor hidden."""
    while member := archive.next():
        archive.members = []  # else a list of all of them grows
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, dot, suffix = name.partition(".")
        if stem and not member.isdir():
            yield folder + slash + stem, dot + suffix.lower(), member


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[bytes | None, str]:
    if not member.isfile():
        return None, "a link or device, not a file"
    if member.size > MAX_BYTES:
        return None, f"more than {MAX_BYTES / 1e6:.0f} MB"
    return archive.extractfile(member).read(), ""


def _sample(filename: str, data: bytes | None, reason: str, beside: dict[str, bytes]) -> Sample:
    """A picture with what the .json, .txt or .caption beside it say."""
    try:
        known = json.loads(beside.get(".json") or b"{}")
        known = known if isinstance(known, dict) else {}
        for suffix in TEXTS[1:]:
            if suffix in beside and not _column(known, "caption"):
                known["caption"] = (beside[suffix] or b"").decode("utf-8-sig").strip()
    except (ValueError, RecursionError) as error:
        return Sample(filename, reason=f"damaged text beside the picture: {error}")
    return Sample(filename, data, reason, **_known(known))


def _column(row: dict, ours: str):
    """The value of a column under any of the names that caption tables use."""
    names = {str(name).lower(): name for name in row}
    return next((row[names[name]] for name in COLUMNS[ours] if name in names), None)


def _known(row: dict) -> dict:
    captions = texts(_column(row, "caption")) or []
    return {"captions": captions} | {name: _column(row, name) or "" for name in TABLE[2:]}


def _is_img2dataset(path: Path) -> bool:
    try:
        return {"key", "url", "status", "error_message"} <= set(pq.read_schema(path).names)
    except DAMAGE:
        return False


def _of_table(path: Path, folder: str) -> Iterator[Sample]:
    """A Parquet file of img2dataset: the pictures themselves, or the outcome of each URL."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=100):
            for row in batch.to_pylist():
                data = _picture(row)
                bad = row["error_message"] or (row["status"] != "success" and row["status"])
                name = _filename(folder, str(row["key"]), _kind(data))
                yield Sample(name, data, bad or "", **_known(row))


def _picture(row: dict) -> bytes | None:
    """The bytes of a row; datasets has them in {"bytes", "path"}."""
    values = (value.get("bytes") if isinstance(value, dict) else value for value in row.values())
    return next((value for value in values if isinstance(value, bytes)), None)


def _kind(data: bytes | None) -> str:
    return MAGIC.get(data[:2], ".img") if data else ".jpg"


def _of_folder(top: Path) -> Iterator[Sample]:
    """Pictures with texts beside them; the folders of img2dataset's form `files` are such."""
    for parent, folders, names in os.walk(top):
        folders.sort()
        folder = Path(parent).relative_to(top).as_posix().removeprefix(".")
        yield from _whole(_of_files(Path(parent), folder, names), Path(parent), folder)


def _of_files(parent: Path, folder: str, names: list[str]) -> Iterator[Sample]:
    there = set(names)
    pictures = {name for name in names if os.path.splitext(name)[1].lower() in PICTURES}
    with_text = {os.path.splitext(name)[0] for name in pictures}
    for name in sorted(names):
        filename = posixpath.join(folder, name)
        stem, suffix = os.path.splitext(name)
        if name in pictures:
            try:
                beside = {e: (parent / (stem + e)).read_bytes() for e in TEXTS if stem + e in there}
                yield _sample(filename, (parent / name).read_bytes(), "", beside)
            except OSError as error:
                yield Sample(filename, reason=f"cannot be read: {error.strerror}")
        elif suffix in TEXTS[1:] and stem not in with_text:
            yield Sample(filename, reason="a text without a picture")


def _of_dataset(source: str) -> Iterator[Sample]:
    """A Hugging Face dataset, streamed; its pictures are not decoded."""
    from datasets.exceptions import DatasetsError  # only here: it is slow to import

    try:
        for split, number, row in _rows(source):
            if not set(map(str.lower, row)) & set(COLUMNS["caption"]):
                raise InputError(f"{source} has no column caption. Its columns: {', '.join(row)}.")
            data = _picture(row) or _picture_at(row, source)
            known = _known(row)
            known["split"] = split or known["split"]
            yield Sample(f"{split or 'all'}/{number:08d}{_kind(data)}", data, **known)
    except (DatasetsError, *DAMAGE) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source} is no folder or files of pictures here, and cannot be read as a Hugging "
            f"Face dataset: {reason}"
        ) from None


def _rows(source: str) -> Iterator[tuple[str, int, dict]]:
    """(split, number, row) with {"bytes", "path"} in place of a picture."""
    import datasets

    folder = Path(source)
    if any((folder / name).is_file() for name in DATASET[:2]):
        data = datasets.load_from_disk(source)
    elif _suffix(source) == ".parquet":
        options = {"data_files": source, "split": "train"}  # it has to be called something
        data = {"": datasets.load_dataset("parquet", **options, streaming=True)}
    else:
        data = datasets.load_dataset(source, streaming=True)
    for split, part in (data if isinstance(data, dict) else {"": data}).items():
        if isinstance(part, datasets.Dataset):
            part = part.to_iterable_dataset()
        part = part.decode(False) if part.features else part
        for number, row in enumerate(part):
            yield split, number, row


def _picture_at(row: dict, source: str) -> bytes | None:
    """A picture that the row only names: read where it is part of the source, nowhere else."""
    from datasets.utils.file_utils import xopen

    paths = [value.get("path") for value in row.values() if isinstance(value, dict)]
    for path in filter(None, paths):
        top, place = Path(source).resolve(), Path(path).resolve()
        if place.is_relative_to(top) or f"hf://datasets/{source}@" in path:
            with xopen(path, "rb") as file:
                return file.read()
    return None
