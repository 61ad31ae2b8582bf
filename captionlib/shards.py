"""Run a function over many items in worker processes, a shard at a time, so that it can be stopped.

Each finished shard is a Parquet file, written under a temporary name and renamed; its name holds a
hash of its items, so the same command finds it again and a changed input does not. Used by the
image check and the dataset builder.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

SHARD_SIZE = 1000  # items; a stopped run repeats at most this many a worker


def run_shards(
    function: Callable,
    items: Sequence,
    out_dir,
    key: Callable = str,
    prefix: str = "",
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
    **arguments,
) -> list[Path]:
    """The Parquet files of `function(items of one shard, **arguments)`, in the order of the items.

    function: at the top level of a module; its result has `to_parquet(path)`. key(item): the text
    that identifies an item and its state. Files that exist already are not made again; files of
    the same prefix that belong to other items are removed.
    """
    shards = [items[start : start + shard_size] for start in range(0, len(items), shard_size)]
    names = [_shard_name(prefix, i, shard, key, arguments) for i, shard in enumerate(shards)]
    files = [Path(out_dir) / name for name in names]
    todo = {file: shard for file, shard in zip(files, shards, strict=True) if not file.exists()}
    done = len(items) - sum(map(len, todo.values()))
    with progress_bar(len(items), function.__name__.strip("_").replace("_", " "), done) as bar:
        for file in _run(function, todo, workers, arguments):
            bar.update(len(todo[file]))
    for stale in set(Path(out_dir).glob(f"{prefix}*.parquet")) - set(files):
        stale.unlink()
    return files


def _run(function, todo: dict[Path, Sequence], workers: int | None, arguments: dict):
    workers = min(workers or os.cpu_count() or 1, len(todo))
    if workers <= 1:
        for file, shard in todo.items():
            _write_shard(function, file, shard, arguments)
            yield file
        return
    context = multiprocessing.get_context("spawn")  # as on Windows and macOS; safe in Jupyter
    pool = ProcessPoolExecutor(workers, context, initializer=_ignore_interrupt)
    try:
        jobs = {pool.submit(_write_shard, function, f, s, arguments): f for f, s in todo.items()}
        for job in as_completed(jobs):
            job.result()
            yield jobs[job]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_shard(function, file: Path, shard: Sequence, arguments: dict) -> None:
    write_atomic(file, function(shard, **arguments).to_parquet)


def _ignore_interrupt() -> None:
    """Ctrl-C reaches the whole process group; only the parent decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _shard_name(prefix: str, i: int, shard: Sequence, key: Callable, arguments: dict) -> str:
    text = "\n".join([*map(key, shard), repr(sorted(arguments.items()))])
    return f"{prefix}{i:05d}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.parquet"


def progress_bar(total: int, description: str, done: int = 0) -> tqdm:
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
