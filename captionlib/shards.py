"""Run a function over many items in worker processes, a shard at a time, so that it can be stopped.

Each finished shard is a Parquet file, written under a temporary name and renamed; its name holds a
hash of its items, so the same command finds it again and a changed input does not. Items may be an
endless-looking iterator: only a few shards are held at a time. Used by the image check and the
dataset builder; the workers are pebble's, which outlive the death of one of them.
"""

import hashlib
import multiprocessing
import os
import re
import signal
import sqlite3
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from tqdm import tqdm

from captionlib.errors import InputError

SHARD_SIZE = 1000  # items; a stopped run repeats at most this many a worker
MEMORY_LIMIT = 4 << 30  # bytes a worker may allocate: a picture at its limit of pixels needs 1 GB
ENGINES = ("processes", "ray")
CHUNK = 20  # items handed to a worker at once: one at a time costs as much as a small picture
LOST = (TimeoutError, ProcessExpired)
SHARD_SECONDS = 3600.0  # for a whole shard: nothing may hang for ever
NAME = re.compile(r"(?P<prefix>.*?)\d{5,}-[0-9a-f]{16}\.parquet")


@dataclass(frozen=True)
class Job:
    """What is done with every shard.

    function(shard, **arguments) returns a pyarrow.Table. With `lost`, it is function(item,
    **arguments), returns a row of `schema`, and may take `timeout` seconds or kill its process:
    then lost(item, reason) is the row. key(item) is the text that identifies an item and its state.
    """

    function: Callable
    arguments: dict = field(default_factory=dict)
    key: Callable = str
    lost: Callable | None = None
    schema: pa.Schema | None = None
    timeout: float | None = None


def run_shards(
    job: Job,
    items: dict[str, Iterable],
    out_dir,
    total: int | None = None,
    workers: int | None = None,
    engine: str = "processes",
    shard_size: int = SHARD_SIZE,
) -> list[Path]:
    """The Parquet files of all shards, in the order of the items; existing ones are not made again.

    items: by the prefix of their files' names. total: their number, for the progress bar. engine:
    "processes" of this machine, or "ray" (one machine or a cluster that sees the same files).
    Shards of other items with these prefixes are removed at the end. Raises InputError.
    """
    if engine not in ENGINES:
        raise InputError(f"No engine {engine!r}: choose {' or '.join(ENGINES)}.")
    if workers is not None and workers < 1:
        raise InputError(f"workers must be 1 or more, not {workers}.")
    files: list[Path] = []
    with progress_bar(total, job.function.__name__.strip("_").replace("_", " ")) as bar:

        def todo() -> Iterator[tuple[Path, list]]:
            for prefix, part in items.items():
                for number, shard in enumerate(batches(part, shard_size)):
                    files.append(Path(out_dir) / _shard_name(prefix, number, shard, job))
                    if files[-1].exists():
                        bar.update(len(shard))
                    else:
                        yield files[-1], shard

        if engine == "ray":
            from captionlib.ray_engine import run_on_ray as run  # an extra: imported when wanted
        else:
            run = _run_in_processes
        if workers and total:  # more would only wait
            workers = min(workers, -(-total // (CHUNK if job.lost else shard_size)))
        for count in run(job, todo(), workers):
            bar.update(count)
    kept = set(files)
    for file in Path(out_dir).glob("*.parquet"):
        if file not in kept and prefix_of(file) in items:
            file.unlink()
    for killed in Path(out_dir).glob(".*.parquet.*.part"):  # what a killed run was writing
        killed.unlink()
    return files


def prefix_of(file: Path) -> str | None:
    """The prefix of a shard's name; None for a file that `run_shards` did not write."""
    found = NAME.fullmatch(file.name)
    return found and found["prefix"]


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _run_in_processes(job: Job, todo: Iterator[tuple[Path, list]], workers: int | None):
    workers = workers or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    running: deque = deque()
    with worker_pool(workers) as pool:
        for file, shard in todo:
            running.append((start_shard(pool, job, file, shard), len(shard)))
            if len(running) > workers + 1:
                finish, count = running.popleft()
                finish()
                yield count
        for finish, count in running:
            finish()
            yield count


@contextmanager
def worker_pool(workers: int):
    """Pebble's process pool; stopped at once when the block is left by an exception."""
    context = multiprocessing.get_context("spawn")  # as on Windows and macOS; safe in Jupyter
    pool = ProcessPool(workers, context=context, initializer=_prepare_worker)
    try:
        yield pool
        pool.close()
    except BaseException as error:
        pool.stop()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                "The worker processes cannot start. A script that uses them must be a file, and "
                "call captionlib below the line `if __name__ == '__main__':`."
            ) from None
        raise
    finally:
        pool.join()


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; only the parent decides
    if sys.platform == "linux":
        import resource  # not on Windows; on macOS this limit does nothing

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def start_shard(pool: ProcessPool, job: Job, file: Path, shard: list) -> Callable[[], None]:
    """Begin a shard in the pool; what is returned waits until its file is written."""
    if job.lost is None:
        running = pool.schedule(_write_shard, args=(job, file, shard), timeout=SHARD_SECONDS)
        return partial(_wait, running)
    chunks = [(chunk, _schedule(pool, job, chunk)) for chunk in batches(shard, CHUNK)]

    def finish() -> None:
        found = [row for chunk, running in chunks for row in _rows_of(pool, job, chunk, running)]
        _write_table(file, pa.Table.from_pylist(found, job.schema))

    return finish


def _schedule(pool: ProcessPool, job: Job, chunk: list) -> ProcessFuture:
    return pool.schedule(_rows, args=(job, chunk), timeout=job.timeout)


def _rows(job: Job, chunk: list) -> list[dict]:
    return [job.function(item, **job.arguments) for item in chunk]


def _rows_of(pool: ProcessPool, job: Job, chunk: list, running: ProcessFuture) -> list[dict]:
    """The rows of a chunk; where it was lost, of each item alone, to blame the right one."""
    try:
        return running.result()
    except LOST:
        alone = [_schedule(pool, job, [item]) for item in chunk]
        lost = [lambda reason, item=item: [job.lost(item, reason)] for item in chunk]
        return [_wait(each, why)[0] for each, why in zip(alone, lost, strict=True)]


def _wait(running: ProcessFuture, lost: Callable[[str], list] | None = None):
    """The result of a task, or lost(reason) when it took too long or its process died."""
    try:
        return running.result()
    except LOST as error:
        died = isinstance(error, ProcessExpired)
        end = f"killed its process ({_exit_name(error.exitcode)})" if died else "took too long"
    if lost is None:
        raise InputError(f"A worker process {end}. Run captionlib check again.")
    return lost(end)


def _exit_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _write_shard(job: Job, file: Path, shard: list) -> None:
    _write_table(file, job.function(shard, **job.arguments))


def _write_table(file: Path, table: pa.Table) -> None:
    write_atomic(file, partial(pq.write_table, table))


def _shard_name(prefix: str, i: int, shard: list, job: Job) -> str:
    text = "\n".join([*map(job.key, shard), repr(sorted(job.arguments.items())), repr(job.timeout)])
    return f"{prefix}{i:05d}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.parquet"


@contextmanager
def only_one(folder, what: str):
    """A lock on a folder, free again when its process ends; InputError when it is taken."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(Path(folder) / ".lock", timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
        yield
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        raise InputError(f"Another {what} is running in {folder}: wait until it ends.") from None
    finally:
        lock.close()


def progress_bar(total: int | None, description: str, done: int = 0) -> tqdm:
    """A bar on a terminal and in Jupyter, none in a log file; TQDM_DISABLE=1 hides it anywhere."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    hidden = not watched or os.environ.get("TQDM_DISABLE") == "1"
    return tqdm(total=total, initial=done, desc=description, disable=hidden)


def write_atomic(path, write: Callable) -> None:
    """write(temporary path), then rename: a file under its own name is always whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
