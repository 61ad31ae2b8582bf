"""Download the pictures of a caption table: many at once, politely, resumable, with a ledger.

Every URL has one row in a SQLite file beside the pictures: status, reason, tries, bytes, sha256.
Files are written under a temporary name and renamed. Stop it with Ctrl-C, or kill it, and start it
again. One fetch is fetch.py's. Used by processdata_01.
"""

import asyncio
import errno
import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pandas as pd

from captionlib.errors import InputError
from captionlib.fetch import PASSING, Fetcher, FetchError, Manners, run_coroutine
from captionlib.shards import progress_bar
from captionlib.sources import safe_path

LEDGER = "ledger.sqlite"  # in the pictures' folder
LEFTOVER = re.compile(r"\..+\.\d+\.part")  # what `_store` leaves when it is killed
# A disk that takes no other file either; any other error is of one name.
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
COMMIT_SECONDS = 0.5  # a killed process repeats at most this much
SETTLE_SECONDS = 60.0  # after a crash, the files of at most this time are read again
SLOW_DISK = 0.002  # seconds a file; quicker ones are written at once, which takes half the CPU
OPEN_URLS = 32  # for each connection: those that wait for a slow host hold up no other
# wanted: the table's file names and URLs, in its order
WANTED = "FROM wanted LEFT JOIN downloads USING (filename) ORDER BY wanted.rowid"
COLUMNS = {
    "filename": "str", "url": "str", "status": "str", "reason": "str", "tries": "Int64",
    "http_status": "Int64", "bytes": "Int64", "sha256": "str", "time": "float64",
}  # fmt: skip


def download(
    table: pd.DataFrame, out_dir, retry: str | Sequence[str] = (), **manners
) -> pd.DataFrame:
    """Fetch `table.url` to `out_dir / table.filename`; one row a file name of the table.

    Columns: filename, url, status ("ok" or "failed"), reason, tries, http_status, bytes, sha256,
    time (seconds since 1970). Rows that are "ok" and whose file is there are not fetched again;
    those that failed for a passing reason (`fetch.PASSING`) are, the others are not. With `retry`,
    only failures of its classes are: a reason, its beginning, an HTTP status, or "all". A file
    name with several URLs (or spellings: A.jpg and a.jpg) fails: which picture would it be?
    `manners`: the fields of Manners. The ledger is `out_dir / "ledger.sqlite"`. Raises InputError.
    """
    manners = Manners(**manners)
    wanted = _wanted(table)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with closing(_open_ledger(out_dir / LEDGER)) as ledger:
        _remove_leftovers(out_dir)
        ledger.execute("CREATE TEMP TABLE wanted (filename TEXT, url TEXT)")
        ledger.executemany(
            "INSERT INTO wanted VALUES (?, ?)", zip(wanted.filename, wanted.url, strict=True)
        )
        todo = _by_turns(wanted[_to_do(ledger, out_dir, _classes(ledger, retry))])
        try:
            run_coroutine(_download_all(todo, out_dir, ledger, manners, len(wanted)))
        finally:
            _settle(ledger, _sync_to_disk(_last_row(ledger)))
        parts = pd.read_sql(
            f"SELECT filename, {', '.join(f'downloads.{name}' for name in list(COLUMNS)[1:])} "
            + WANTED,
            ledger,
            dtype=COLUMNS,
            chunksize=100_000,
        )
        return pd.concat(parts, ignore_index=True)


def _wanted(table: pd.DataFrame) -> pd.DataFrame:
    """Columns filename, url, clash; one row a file name."""
    if "url" not in table:
        raise InputError(f"The table has no column url. Its columns are: {', '.join(table)}.")
    wanted = table[["filename", "url"]].assign(url=table.url.str.strip()).drop_duplicates()
    file = wanted.filename.str.replace("\\", "/").str.casefold()  # one file on some systems
    wanted = wanted.assign(clash=file.duplicated(keep=False))
    return wanted.drop_duplicates("filename")


def _by_turns(wanted: pd.DataFrame) -> pd.DataFrame:
    """One URL of each host after the other: many of a slow host in a row would fill all places."""
    host = wanted.url.str.extract("//([^/]*)", expand=False)
    return wanted.iloc[wanted.groupby(host, dropna=False).cumcount().argsort(kind="stable")]


def _open_ledger(path: Path) -> sqlite3.Connection:
    """The ledger, locked until it is closed or its process ends."""
    ledger = sqlite3.connect(path, timeout=0, check_same_thread=False)  # the loop has a thread
    try:
        ledger.execute("PRAGMA locking_mode=EXCLUSIVE")
        ledger.execute("PRAGMA journal_mode=WAL")
        ledger.execute("PRAGMA synchronous=FULL")
        with ledger:
            ledger.execute("BEGIN IMMEDIATE")
            ledger.execute(
                "CREATE TABLE IF NOT EXISTS downloads (filename TEXT PRIMARY KEY, url TEXT, "
                "status TEXT, reason TEXT, tries INTEGER, http_status INTEGER, bytes INTEGER, "
                "sha256 TEXT, time REAL, settled INTEGER)"
            )
    except sqlite3.OperationalError as error:
        ledger.close()
        if "locked" not in str(error):
            raise
        raise InputError(
            f"Another download is running in {path.parent}: wait until it ends, or stop it."
        ) from None
    return ledger


def _remove_leftovers(out_dir: Path) -> None:
    for folder, _, names in os.walk(out_dir):
        for name in filter(LEFTOVER.fullmatch, names):
            os.remove(os.path.join(folder, name))


def _classes(ledger: sqlite3.Connection, retry: str | Sequence[str]) -> tuple[str, ...]:
    """Beginnings of reasons that are asked again."""
    reasons = [r for (r,) in ledger.execute("SELECT DISTINCT reason FROM downloads") if r]
    given = retry.split(",") if isinstance(retry, str) else map(str, retry)
    names = filter(None, map(str.strip, given))
    classes = tuple(f"http {name}" if name.isdecimal() else name for name in names)
    for name in classes:
        if name != "all" and not any(r.startswith(name) for r in (*reasons, *PASSING)):
            known = ", ".join(sorted({_class(r) for r in reasons})) or "none"
            raise InputError(f"No download failed with {name!r}. To retry there are: {known}, all.")
    return ("",) if "all" in classes else classes or PASSING


def _to_do(ledger: sqlite3.Connection, out_dir: Path, again: tuple[str, ...]) -> list[bool]:
    rows = ledger.execute(
        "SELECT filename, status, reason, bytes, IIF(settled, NULL, sha256), "
        f"wanted.url = downloads.url {WANTED}"
    )
    return [
        not same_url
        or (reason.startswith(again) if status != "ok" else not _is_there(out_dir, name, *file))
        for name, status, reason, *file, same_url in rows
    ]


def _is_there(out_dir: Path, name: str, size: int, sha256: str | None) -> bool:
    """Whether the file has its size and, where it may not have reached the disk, its content."""
    path = os.path.join(out_dir, name.replace("\\", "/"))  # safe_path's, without its time
    try:
        if os.stat(path).st_size != size:
            return False
        return sha256 is None or hashlib.sha256(Path(path).read_bytes()).hexdigest() == sha256
    except OSError:
        return False


async def _download_all(
    todo: pd.DataFrame, out_dir: Path, ledger: sqlite3.Connection, manners: Manners, total: int
) -> None:
    waiting = todo.itertuples(index=False, name=None)
    finished: list[tuple] = []
    bar = progress_bar(total, "download", total - len(todo))

    seconds = 0.0  # of writing a file, on average

    async def store(path: Path, body: bytearray) -> tuple[int, str] | OSError:
        nonlocal seconds
        start, slow = time.perf_counter(), seconds > SLOW_DISK
        kept = await asyncio.to_thread(_store, path, body) if slow else _store(path, body)
        seconds += (time.perf_counter() - start - seconds) / 100
        return kept

    async def work() -> None:
        for wanted in waiting:
            finished.append(await _download_one(fetcher, *wanted, out_dir, store))
            bar.update()

    async def commit_now_and_then() -> None:
        while True:
            await asyncio.sleep(COMMIT_SECONDS)
            _commit(ledger, finished)

    async def settle_now_and_then() -> None:
        while True:
            await asyncio.sleep(SETTLE_SECONDS)
            _settle(ledger, await asyncio.to_thread(_sync_to_disk, _last_row(ledger)))

    async with Fetcher(manners) as fetcher:
        keepers = [asyncio.create_task(job()) for job in (commit_now_and_then, settle_now_and_then)]
        places = min(len(todo), OPEN_URLS * manners.connections)
        workers = [asyncio.create_task(work()) for _ in range(places)]
        jobs = [asyncio.gather(*workers), *keepers]
        try:
            ended, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            ended.pop().result()  # raises what went wrong: a full disk, say
        finally:
            for task in (*keepers, *workers):
                task.cancel()
            await asyncio.gather(*jobs, *workers, return_exceptions=True)
            _commit(ledger, finished)
            bar.close()


def _commit(ledger: sqlite3.Connection, finished: list[tuple]) -> None:
    rows = finished.copy()
    finished.clear()
    with ledger:
        ledger.executemany(
            "INSERT OR REPLACE INTO downloads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)", rows
        )


def _last_row(ledger: sqlite3.Connection) -> int:
    return ledger.execute("SELECT max(rowid) FROM downloads").fetchone()[0] or 0


def _sync_to_disk(last_row: int) -> int:
    """Files written until now survive a power failure after this (Windows has no such call)."""
    if hasattr(os, "sync"):
        os.sync()
    return last_row


def _settle(ledger: sqlite3.Connection, last_row: int) -> None:
    """Rows up to this one, whose files are on the disk: no need to read them again at a start."""
    with ledger:
        ledger.execute(
            "UPDATE downloads SET settled = 1 WHERE settled = 0 AND rowid <= ?", (last_row,)
        )


async def _download_one(
    fetcher: Fetcher, filename: str, url: str, clash: bool, out_dir: Path, store: Callable
) -> tuple:
    """A row of the ledger."""
    path = safe_path(out_dir, filename)
    try:
        if path is None or filename.casefold().startswith(LEDGER):
            raise FetchError("unsafe file name")
        if clash:
            raise FetchError("file name of several URLs")
        kept, tries = await fetcher.fetch(url, partial(store, path))
        if isinstance(kept, OSError):
            if kept.errno in NO_DISK:
                raise kept
            raise FetchError(f"cannot be written: {kept.strerror}", 200, tries=tries)
    except FetchError as failed:
        reason = str(failed)
        return filename, url, "failed", reason, failed.tries, failed.http, None, None, time.time()
    return filename, url, "ok", "", tries, 200, *kept, time.time()


def _store(path: Path, body: bytearray) -> tuple[int, str] | OSError:
    """Write, then rename: a file under its own name is whole. Its size and sha256."""
    temporary = f"{path.parent}/.{path.name}.{os.getpid()}.part"
    try:
        if not os.path.isdir(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", buffering=0) as file:
            file.write(body)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.remove(temporary)
        return error
    return len(body), hashlib.sha256(body).hexdigest()


def outcomes(downloads: pd.DataFrame) -> pd.DataFrame:
    """How many files ended how: columns outcome, files, share; the largest first."""
    reasons = downloads.reason.fillna("not tried").map(_class)
    label = reasons.where(downloads.status != "ok", "downloaded")
    files = label.value_counts().rename_axis("outcome").reset_index(name="files")
    return files.assign(share=files.files / max(1, files.files.sum()))


def _class(reason: str) -> str:
    return reason.partition(":")[0]


def failures(downloads: pd.DataFrame) -> Iterable[tuple[str, str]]:
    """(filename, reason) of what could not be downloaded."""
    failed = downloads[downloads.status != "ok"]
    return zip(failed.filename, failed.reason.fillna("not tried"), strict=True)
