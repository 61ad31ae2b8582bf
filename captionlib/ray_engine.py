"""Run shards on Ray Data: several machines that see the same files, or this one. The extra [ray].

`--engine ray` starts Ray here without its dashboard, or joins the cluster of RAY_ADDRESS.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from captionlib.errors import InputError
from captionlib.shards import Job, batches, start_shard, worker_pool


def run_on_ray(job: Job, todo: Iterator[tuple[Path, list]], workers: int | None) -> Iterator[int]:
    """Write the file of every shard; yields the number of items of each as it is done.

    workers: CPUs of a Ray started here; a joined cluster uses its own. Raises InputError.
    """
    try:
        import ray
    except ImportError:
        raise InputError("engine ray needs Ray: pip install -e '.[ray]' in the clone.") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"Ray cannot join RAY_ADDRESS {address!r} or start: {reason}"
            ) from None
    ray.data.DataContext.get_current().enable_progress_bars = False  # run_shards shows one
    some = 8 * int(ray.cluster_resources()["CPU"])  # shards at a time: the table may be larger
    for part in batches(todo, some):
        shards = [{"file": str(f.absolute()), "items": json.dumps(items)} for f, items in part]
        data = ray.data.from_items(shards, override_num_blocks=len(shards))
        for row in data.map(partial(_write, job=job)).iter_rows():
            yield row["count"]


def _write(row: dict, job: Job) -> dict:
    shard = json.loads(row["items"])
    with worker_pool(1) as pool:  # a decoder may kill its process, and not Ray's
        start_shard(pool, job, Path(row["file"]), shard)()
    return {"count": len(shard)}
