"""What becomes of every row of a caption table: cleaned, judged with its picture, split, counted.

The rows are kept in a SQLite file while the dataset is built, so that memory does not grow with
the table. Knows nothing of pixels. Used by the dataset builder.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ftfy.badness import is_bad

from captionlib.captions import CODES, caption_problem, clean_caption, is_garbled, mended
from captionlib.duplicates import duplicate_groups
from captionlib.errors import InputError
from captionlib.formats import PICTURE
from captionlib.shards import write_atomic
from captionlib.sources import safe_path

SPLITS = ("train", "val", "test")
OTHER_NAMES = {"valid": "val", "validation": "val", "dev": "val", "restval": "train"}
WORD = re.compile(r"\w+").fullmatch  # a split's name is part of its files' names
SWALLOWED = re.compile(rf"[\r\n].*({PICTURE}|https?://)", re.I | re.S).search
COLUMNS = ("filename", "caption", "url", "split", "lang", "prompt")
PIECE = 20_000  # rows handled at a time
SCHEMA = """
CREATE TABLE pictures (path TEXT PRIMARY KEY, reason TEXT, pixels TEXT, phash TEXT, split TEXT);
CREATE TABLE failed (filename TEXT PRIMARY KEY, reason TEXT);
CREATE TABLE captions (id INTEGER PRIMARY KEY, path TEXT, filename TEXT, caption TEXT, url TEXT,
    split TEXT, lang TEXT, prompt TEXT, garbled INTEGER, problem TEXT);
"""


@dataclass(frozen=True)
class Choices:
    """How a dataset is made of a table; the recipe's section `dataset`.

    lang: of rows that name none. prompt: put before every caption, `{lang}` filled in. min_chars,
    max_chars: of a caption; max_tokens: of a caption in the tokenizer of that name or folder.
    codes: "keep" or "drop" product codes at a caption's end. check_lang: drop captions in another
    script than their language's. near_duplicates: pictures whose perceptual hashes differ in at
    most so many of 64 bits fall into one split (-1: equal pictures only). val, test: shares of
    the pictures where the table names no split. stored_size: pixels of the short side, or with
    `squash` of both (no geometry is left to do in training; proportions are lost). quality: JPEG.
    """

    lang: str = ""
    prompt: str = ""
    min_chars: int = 1
    max_chars: int = 200
    max_tokens: int = 0
    tokenizer: str = ""
    codes: str = "keep"
    fix_mojibake: bool = False
    check_lang: bool = True
    near_duplicates: int = 4
    val: float = 0.05
    test: float = 0.05
    seed: int = 0
    stored_size: int = 256
    squash: bool = False
    quality: int = 90

    def __post_init__(self):
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test < 1):
            text = f"val {self.val} and test {self.test}"
            raise InputError(f"{text} must be shares, less than 1 together.")
        if self.stored_size < 16 or not 1 <= self.quality <= 95:
            text = f"stored_size {self.stored_size} is at least 16, quality {self.quality}"
            raise InputError(f"{text} 1 to 95.")
        if self.codes not in CODES:
            raise InputError(f"codes must be {' or '.join(CODES)}, not {self.codes!r}.")
        if not -1 <= self.near_duplicates <= 16:
            raise InputError(f"near_duplicates must be -1 to 16 bits, not {self.near_duplicates}.")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, not {self.seed}.")
        if self.max_tokens and not self.tokenizer:
            raise InputError(f"max_tokens {self.max_tokens} needs a tokenizer: its name or folder.")


@contextmanager
def open_rows(path: Path) -> Iterator[sqlite3.Connection]:
    """An empty store at `path`, removed when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    rows = sqlite3.connect(path)
    try:
        rows.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;" + SCHEMA)
        yield rows
    finally:
        rows.close()
        path.unlink()


def pieces(table) -> Iterator[pd.DataFrame]:
    """A DataFrame, or an iterable of them, in pieces of at most PIECE rows."""
    for part in [table] if isinstance(table, pd.DataFrame) else table:
        for start in range(0, len(part), PIECE):
            yield part.iloc[start : start + PIECE]


def distinct_filenames(table) -> tuple[int, Iterator[str]]:
    """How many file names a table names, and each once, in its order; held on disk."""
    names = sqlite3.connect("")  # a temporary file that SQLite removes
    names.execute("CREATE TABLE names (filename TEXT PRIMARY KEY)")
    for part in pieces(table):
        found = ((name,) for name in part.filename.unique())
        names.executemany("INSERT OR IGNORE INTO names VALUES (?)", found)
    (total,) = names.execute("SELECT count(*) FROM names").fetchone()
    found = names.execute("SELECT filename FROM names ORDER BY rowid")
    return total, (name for (name,) in found)


def fill(rows, table, checks, images_dir: Path, failed: Iterable, choices: Choices) -> list[str]:
    """Read everything in: captions cleaned, with their problems. The table's columns."""
    for part in pieces(checks):
        columns = part[["path", "reason", "sha256", "phash"]]
        values = columns.astype(object).where(columns.notna(), None)
        rows.executemany(
            "INSERT OR IGNORE INTO pictures (path, reason, pixels, phash) VALUES (?, ?, ?, ?)",
            values.itertuples(index=False),
        )
    rows.executemany("INSERT OR REPLACE INTO failed VALUES (?, ?)", failed)
    named: set[str] = set()
    too_long = _token_limit(choices)
    for part in pieces(table):
        named |= set(part.columns)
        part = part.reindex(columns=COLUMNS).fillna("").astype(object)
        rows.executemany(
            f"INSERT INTO captions VALUES (NULL{', ?' * 9})",
            _cleaned(part, images_dir, choices, too_long),
        )
    return [name for name in COLUMNS if name in named]


def _cleaned(part: pd.DataFrame, images_dir: Path, choices: Choices, too_long) -> Iterator[tuple]:
    for filename, text, url, split, lang, prompt in part.itertuples(index=False):
        lang = lang or choices.lang
        garbled = is_garbled(text)
        fixed = mended(text) if garbled and choices.fix_mojibake else text
        caption = clean_caption(fixed, lang, choices.codes)
        problem = "caption holds other rows (a stray quote?)" if SWALLOWED(text) else ""
        problem = problem or caption_problem(
            caption, lang if choices.check_lang else "", choices.min_chars, choices.max_chars
        )
        lost = "\ufffd" in fixed or is_garbled(fixed) or is_bad(fixed)
        if garbled and choices.fix_mojibake and lost:
            problem = "mojibake that cannot be repaired"
        problem = problem or too_long(caption)
        prompt = prompt or choices.prompt.replace("{lang}", lang)
        path = str(safe_path(images_dir, filename) or "")
        split = split.strip().lower()
        split = OTHER_NAMES.get(split, split)
        yield path, filename, caption, url, split, lang, prompt, garbled, problem


def _token_limit(choices: Choices):
    """A function caption -> its problem or ""."""
    if not choices.max_tokens:
        return lambda caption: ""
    from captionlib.tokenization import encode, load_tokenizer  # imports transformers

    try:
        tokenizer = load_tokenizer(choices.tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"No tokenizer {choices.tokenizer!r}: {reason}") from None
    problem = f"caption longer than {choices.max_tokens} tokens"
    return lambda text: problem if len(encode(tokenizer, [text])[0]) > choices.max_tokens else ""


def judge(rows: sqlite3.Connection, choices: Choices) -> None:
    """Give every row its first problem, if it has one, and every usable picture its split."""
    rows.execute(
        """UPDATE captions SET problem = coalesce(
            CASE WHEN path = '' THEN 'unsafe file name' END,
            (SELECT 'download: ' || reason FROM failed f WHERE f.filename = captions.filename
                AND captions.path NOT IN (SELECT path FROM pictures WHERE reason = '')),
            CASE WHEN path NOT IN (SELECT path FROM pictures) THEN 'image not checked' END,
            (SELECT 'image: ' || reason FROM pictures p WHERE p.path = captions.path
                AND reason != ''),
            problem)"""
    )
    rows.execute(
        """UPDATE captions SET problem = 'repeated caption' WHERE problem = '' AND id NOT IN (
            SELECT min(id) FROM captions WHERE problem = '' GROUP BY path, lang, prompt, caption)"""
    )
    named = rows.execute("SELECT DISTINCT split FROM captions WHERE problem = '' AND split != ''")
    names = sorted(name for (name,) in named)
    wrong = [name for name in names if not WORD(name) or name == "all"]  # datasets' own name
    if wrong:
        raise InputError(f"The split {wrong[0]!r} of the table is no name: use train, val, test.")
    _assign_splits(rows, names, choices)
    rows.execute(
        """UPDATE captions SET problem = 'picture, or nearly the same, is in another split'
            WHERE problem = '' AND split != ''
            AND split != (SELECT split FROM pictures p WHERE p.path = captions.path)"""
    )


def _assign_splits(rows: sqlite3.Connection, named: list[str], choices: Choices) -> None:
    """The official split where the table has one; else by a hash of the picture, never by row.

    A group of duplicates is never divided: of several official splits it gets the first of test,
    val, ..., train, so that what is measured is not what was trained on.
    """
    found = rows.execute(
        """SELECT rowid, pixels, coalesce(phash, substr(pixels, 1, 16)) FROM pictures
            WHERE path IN (SELECT path FROM captions WHERE problem = '') ORDER BY rowid"""
    )
    kinds = [("id", np.int64), ("pixels", np.uint64), ("phash", np.uint64)]
    pictures = np.fromiter(((i, int(px[:16], 16), int(ph, 16)) for i, px, ph in found), kinds)
    if not len(pictures):
        return
    group = duplicate_groups(pictures["pixels"], pictures["phash"], choices.near_duplicates)
    order = list(dict.fromkeys(["test", "val", *named, "train"]))
    order.append(order.pop(order.index("train")))
    split = np.full(group.max() + 1, len(order))
    official = rows.execute(
        """SELECT DISTINCT p.rowid, c.split FROM captions c JOIN pictures p USING (path)
            WHERE c.problem = '' AND c.split != ''"""
    )
    for row, name in official:
        at = group[np.searchsorted(pictures["id"], row)]
        split[at] = min(split[at], order.index(name))
    least = np.full(len(split), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, group, pictures["pixels"])  # of a group: independent of the rows' order
    free = np.flatnonzero(split == len(order))
    free = free[np.argsort(_shuffled(least[free], choices.seed), kind="stable")]
    n_test, n_val = _share(len(free), choices.test), _share(len(free), choices.val)
    split[free] = order.index("train")
    split[free[: n_test + n_val]] = order.index("val")
    split[free[:n_test]] = order.index("test")
    rows.executemany(
        "UPDATE pictures SET split = ? WHERE rowid = ?",
        ((order[split[g]], int(i)) for g, i in zip(group, pictures["id"], strict=True)),
    )


def _shuffled(digests: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [N] in another order for every seed (multiplicative hashing, Knuth 6.4)."""
    factor = np.random.default_rng(seed).integers(2**64, dtype=np.uint64) | np.uint64(1)
    return digests * factor


def _share(groups: int, share: float) -> int:
    """So many of the groups: at least one where a share is asked for and three are there."""
    return max(round(groups * share), int(share > 0 and groups >= 3))


def splits(rows: sqlite3.Connection) -> dict[str, int]:
    """{split: pictures} of what is in the dataset, train first."""
    counts = dict(
        rows.execute(
            """SELECT p.split, count(DISTINCT path) FROM captions c JOIN pictures p USING (path)
                WHERE c.problem = '' GROUP BY p.split"""
        )
    )
    return {name: counts[name] for name in dict.fromkeys([*SPLITS, *counts]) if name in counts}


def images_of(rows: sqlite3.Connection, split: str) -> Iterator[dict]:
    """One dict a picture: path, filename, sha256 and the lists captions, prompts, langs."""
    found = rows.execute(
        """SELECT c.path, c.filename, p.pixels, c.caption, c.prompt, c.lang
            FROM captions c JOIN pictures p USING (path)
            WHERE c.problem = '' AND p.split = ? ORDER BY p.rowid, c.id""",
        [split],
    )
    for (path, filename, pixels), group in groupby(found, itemgetter(0, 1, 2)):
        *_, captions, prompts, langs = map(list, zip(*group, strict=True))
        lists = {"captions": captions, "prompts": prompts, "langs": langs}
        yield {"path": path, "filename": filename, "sha256": pixels, **lists}


def write_rows(rows: sqlite3.Connection, columns: list[str], path: Path, metadata: dict) -> None:
    """The whole table as Parquet, with `garbled` and `state`: a split or "dropped: reason"."""
    columns = [*dict.fromkeys([*columns, "lang", "prompt"]), "garbled"]
    schema = pa.schema({name: pa.string() for name in columns} | {"garbled": pa.bool_()})
    schema = schema.append(pa.field("state", pa.string())).with_metadata(metadata)
    found = rows.execute(
        f"""SELECT {", ".join("c." + name for name in columns)},
            CASE WHEN problem = '' THEN p.split ELSE 'dropped: ' || problem END
            FROM captions c LEFT JOIN pictures p USING (path) ORDER BY c.id"""
    )

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema) as writer:
            while batch := found.fetchmany(PIECE):
                values = dict(zip(schema.names, zip(*batch, strict=True), strict=True))
                values["garbled"] = map(bool, values["garbled"])
                lists = {name: list(value) for name, value in values.items()}
                writer.write_table(pa.table(lists, schema=schema))

    write_atomic(path, write)
