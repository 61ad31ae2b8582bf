"""Download the pictures of a caption table: many at once, politely, resumable, with a ledger.

Every URL has one row in a SQLite file beside the pictures: status, reason, tries, bytes, sha256.
Files are written under a temporary name and renamed. Stop it with Ctrl-C and start it again.
Used by processdata_01.
"""

import asyncio
import email.utils
import errno
import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Coroutine, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pandas as pd

import captionlib
from captionlib.errors import InputError
from captionlib.images import ImageError
from captionlib.shards import progress_bar, write_atomic
from captionlib.sources import safe_path

USER_AGENT = f"captionlib/{captionlib.__version__} (dataset download; contact: {{contact}})"
RETRY_HTTP = {408, 429, 500, 502, 503, 504}
LEDGER = "ledger.sqlite"  # in the pictures' folder
BAD_NAME = (
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EINVAL,
)  # of one file
COMMIT_SECONDS = 0.5  # a killed process repeats at most this much


@dataclass(frozen=True)
class Manners:
    """How to fetch. timeout in seconds for a whole try, max_bytes for a body."""

    connections: int = 64
    per_host: int = 16
    timeout: float = 20.0
    tries: int = 3
    wait: float = 0.5  # seconds before the second try; doubled each time
    max_wait: float = 30.0  # a server that asks for more (Retry-After) is given up
    max_bytes: int = 20_000_000
    contact: str = "not given"

    def __post_init__(self):
        for name in ("connections", "per_host", "tries", "max_bytes", "timeout"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} of download must be above 0, not {getattr(self, name)}.")


class _Failed(Exception):
    """One try that failed; `again` is whether another may help, `wait` what the server asked."""

    def __init__(self, reason: str, http: int | None = None, again=False, wait: float = 0):
        super().__init__(reason)
        self.http, self.again, self.wait = http, again, wait


def download(table: pd.DataFrame, out_dir, **manners) -> pd.DataFrame:
    """Fetch `table.url` to `out_dir / table.filename`; one row a file name of the table.

    Columns: filename, url, status ("ok" or "failed"), reason, tries, http_status, bytes, sha256,
    time (seconds since 1970). Rows that are "ok" and whose file is there are not fetched again;
    failed ones are. `manners`: the fields of Manners. The ledger is `out_dir / "ledger.sqlite"`.
    """
    if "url" not in table:
        raise InputError(f"The table has no column url. Its columns are: {', '.join(table)}.")
    wanted = table[["filename", "url"]].drop_duplicates()
    twice = wanted.filename[wanted.filename.duplicated()]
    if len(twice):
        raise InputError(f"The file name {twice.iloc[0]!r} has more than one URL: one each.")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with closing(_open_ledger(out_dir / LEDGER)) as ledger:
        known = pd.read_sql("SELECT * FROM downloads", ledger).set_index("filename")
        done = _settled(known, out_dir)
        todo = [r for r in wanted.itertuples(index=False) if done.get(r.filename) != r.url]
        if todo:
            run_coroutine(_download_all(todo, out_dir, ledger, Manners(**manners), len(wanted)))
        ledger_now = pd.read_sql("SELECT * FROM downloads", ledger)
    return wanted[["filename"]].merge(ledger_now, on="filename", how="left")


def _open_ledger(path: Path) -> sqlite3.Connection:
    ledger = sqlite3.connect(path, check_same_thread=False)  # the loop has a thread of its own
    ledger.execute("PRAGMA journal_mode=WAL")
    ledger.execute(
        "CREATE TABLE IF NOT EXISTS downloads (filename TEXT PRIMARY KEY, url TEXT, status TEXT, "
        "reason TEXT, tries INTEGER, http_status INTEGER, bytes INTEGER, sha256 TEXT, time REAL)"
    )
    return ledger


def _settled(known: pd.DataFrame, out_dir: Path) -> dict[str, str]:
    """{filename: url} of what was fetched and is still there with the size it had."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(out_dir)}
    ok = known[known.status == "ok"]
    return {
        name: url
        for name, url, size in zip(ok.index, ok.url, ok.bytes, strict=True)
        if (sizes.get(name) if "/" not in name else _size(out_dir / name)) == size
    }


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


async def _download_all(
    todo: list, out_dir: Path, ledger: sqlite3.Connection, manners: Manners, total: int
) -> None:
    waiting = iter(todo)
    finished: list[tuple] = []
    bar = progress_bar(total, "download", total - len(todo))

    async def work() -> None:
        for row in waiting:
            finished.append(await _settle(session, row.filename, row.url, out_dir, manners))
            bar.update()

    async def commit_now_and_then() -> None:
        while True:
            await asyncio.sleep(COMMIT_SECONDS)
            _commit(ledger, finished)

    async with _session(manners) as session:
        committing = asyncio.create_task(commit_now_and_then())
        workers = [asyncio.create_task(work()) for _ in range(manners.connections)]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in (committing, *workers):
                task.cancel()
            await asyncio.gather(committing, *workers, return_exceptions=True)
            _commit(ledger, finished)
            bar.close()


def _session(manners: Manners) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=manners.connections, limit_per_host=manners.per_host),
        timeout=aiohttp.ClientTimeout(total=manners.timeout),
        headers={"User-Agent": USER_AGENT.format(contact=manners.contact)},
    )


def _commit(ledger: sqlite3.Connection, finished: list[tuple]) -> None:
    rows = finished.copy()
    finished.clear()
    with ledger:
        ledger.executemany(
            "INSERT OR REPLACE INTO downloads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
        )


async def _settle(session, filename: str, url: str, out_dir: Path, manners: Manners) -> tuple:
    """Try until it is there or given up; a row of the ledger."""
    path = safe_path(out_dir, filename)
    if path is None or filename.startswith(LEDGER):
        return filename, url, "failed", "unsafe file name", 0, None, None, None, time.time()
    for tries in range(1, manners.tries + 1):
        try:
            body = await _fetch(session, url, manners.max_bytes)
        except _Failed as failed:
            wait = failed.wait or manners.wait * 2 ** (tries - 1)
            if failed.again and tries < manners.tries and wait <= manners.max_wait:
                await asyncio.sleep(wait)
                continue
            reason = str(failed)
            return filename, url, "failed", reason, tries, failed.http, None, None, time.time()
        try:
            write_atomic(path, lambda temporary, body=body: temporary.write_bytes(body))
        except OSError as error:
            if error.errno not in BAD_NAME:
                raise
            reason = f"cannot be written: {error.strerror}"
            return filename, url, "failed", reason, tries, 200, None, None, time.time()
        digest = hashlib.sha256(body).hexdigest()
        return filename, url, "ok", "", tries, 200, len(body), digest, time.time()
    raise AssertionError("unreachable: the last try returns")


async def _fetch(session: aiohttp.ClientSession, url: str, max_bytes: int) -> bytes:
    """The body of an image URL, or _Failed with a reason."""
    if not url.startswith(("http://", "https://")):
        raise _Failed("not an http(s) url")
    try:
        async with session.get(url, max_redirects=5) as answer:
            if answer.status != 200:
                again = answer.status in RETRY_HTTP
                wait = _retry_after(answer.headers.get("Retry-After", ""))
                raise _Failed(f"http {answer.status}", answer.status, again, wait)
            if answer.content_type in ("text/html", "application/xhtml+xml"):
                raise _Failed("a web page, not an image", 200)
            return await _read_body(answer, max_bytes)
    except TimeoutError:
        raise _Failed("timeout", again=True) from None
    except aiohttp.TooManyRedirects:
        raise _Failed("too many redirects") from None
    except aiohttp.ClientPayloadError:
        raise _Failed("connection cut short", again=True) from None
    except (aiohttp.InvalidURL, ValueError):
        raise _Failed("invalid url") from None
    except (aiohttp.ClientError, OSError) as error:
        raise _Failed(f"no connection: {type(error).__name__}", again=True) from None


async def _read_body(answer: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    body = bytearray()
    async for piece in answer.content.iter_chunked(1 << 16):
        body += piece
        if len(body) > max_bytes:
            raise _Failed(f"more than {max_bytes / 1e6:.0f} MB", 200)
    if not body:
        raise _Failed("empty answer", 200)
    return bytes(body)


def _retry_after(value: str) -> float:
    """Seconds, from the header's number or date (RFC 9110, section 10.2.3)."""
    if value.isdigit():
        return float(value)
    date = email.utils.parsedate_tz(value)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


def fetch_bytes(url: str) -> bytes:
    """One URL's body, for `open_image`. Raises ImageError with the reason."""

    async def fetch() -> bytes:
        manners = Manners()
        async with _session(manners) as session:
            return await _fetch(session, url, manners.max_bytes)

    try:
        return run_coroutine(fetch())
    except _Failed as failed:
        raise ImageError(f"cannot be downloaded: {failed}") from None


def run_coroutine(coroutine: Coroutine):
    """asyncio.run in a thread of its own: inside Jupyter a loop runs already. Ctrl-C cancels it."""
    outcome: list = []
    ended = threading.Event()  # not join: interrupted, it takes the thread for ended (Python 3.11)
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)

    def run() -> None:
        try:
            outcome.append(loop.run_until_complete(task))
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread below
            outcome.append(error)
        finally:
            loop.close()
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        while not ended.wait(0.1):  # short waits: a plain one would not see Ctrl-C on Windows
            pass
    except KeyboardInterrupt:
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)
        ended.wait()
        raise
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def outcomes(downloads: pd.DataFrame) -> pd.DataFrame:
    """How many files ended how: columns outcome, files, share; the largest first."""
    label = downloads.reason.where(downloads.status != "ok", "downloaded").fillna("not tried")
    files = label.value_counts().rename_axis("outcome").reset_index(name="files")
    return files.assign(share=files.files / max(1, files.files.sum()))


def failures(downloads: pd.DataFrame) -> Iterable[tuple[str, str]]:
    """(filename, reason) of what could not be downloaded."""
    failed = downloads[downloads.status != "ok"]
    return zip(failed.filename, failed.reason.fillna("not tried"), strict=True)
