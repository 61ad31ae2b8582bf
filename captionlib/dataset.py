"""Build a dataset of checked images and cleaned captions, every input row accounted for.

One row is one image, in Parquet files that `datasets` opens; `packing` makes them, `rows` says what
becomes of each row of the table. Used by processdata_03 and the trainer.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captionlib.errors import InputError
from captionlib.packing import pack
from captionlib.rows import (
    SPLITS,
    Choices,
    fill,
    images_of,
    judge,
    open_rows,
    splits,
    write_rows,
)  # fmt: skip
from captionlib.shards import Job, only_one, prefix_of, run_shards, write_atomic

SHARDS = "shards"  # the names of all shards, in the metadata of rows.parquet


def build_dataset(table, checks, out_dir, images_dir, failed_downloads=(), **options):
    """Write `out_dir` and return it opened, a datasets.DatasetDict. Arguments: `write_dataset`."""
    write_dataset(table, checks, out_dir, images_dir, failed_downloads, **options)
    return load_dataset(out_dir)


def write_dataset(
    table: pd.DataFrame | Iterable[pd.DataFrame],
    checks: pd.DataFrame | Iterable[pd.DataFrame],
    out_dir,
    images_dir,
    failed_downloads: Iterable[tuple[str, str]] = (),
    workers: int | None = None,
    engine: str = "processes",
    **choices,
) -> dict[str, int]:
    """Write the dataset: one row an image, `captions: list[str]`. {split: images}.

    table: filename, caption[, url, split, lang, prompt], whole or in pieces. checks: from
    `check_images`, for `images_dir / filename`. failed_downloads: (filename, reason) pairs.
    choices: the fields of `rows.Choices`. Memory does not grow with the table.

    Also writes `rows.parquet`: the table with a column `state`, either the split a row went to or
    "dropped: reason"; `accounting` counts it. And README.md, the dataset's card.
    """
    choices = Choices(**choices)
    out_dir, images_dir = Path(out_dir), Path(images_dir)
    with only_one(out_dir, "build"), open_rows(out_dir / ".rows.sqlite") as rows:
        columns = fill(rows, table, checks, images_dir, failed_downloads, choices)
        judge(rows, choices)
        sizes = splits(rows)
        if not sizes:
            raise InputError(_nothing_left(rows))
        (out_dir / "rows.parquet").unlink(missing_ok=True)  # written last: without it nothing loads
        stored = {name: getattr(choices, name) for name in ("stored_size", "squash", "quality")}
        job = Job(pack, stored, json.dumps)
        parts = dict.fromkeys((f"{_split_of(file)}-" for file in _shards(out_dir)), ())
        parts |= {f"{split}-": images_of(rows, split) for split in sizes}
        run_shards(job, parts, out_dir, sum(sizes.values()), workers, engine)
        _assert_all_packed(rows, _shards(out_dir))
        names = [file.name for file in _shards(out_dir)]
        write_rows(rows, columns, out_dir / "rows.parquet", {SHARDS: json.dumps(names)})
    write_atomic(
        out_dir / "README.md", lambda path: path.write_text(_card(out_dir, choices), "utf-8")
    )
    return sizes


def _assert_all_packed(rows, shards: list[Path]) -> None:
    """Every row that is not dropped is in a shard, once."""
    (wanted,) = rows.execute("SELECT count(*) FROM captions WHERE problem = ''").fetchone()
    packed = sum(_captions_in(shard) for shard in shards)
    if packed != wanted:
        raise RuntimeError(f"{wanted} captions should be packed, {packed} are: report this.")


def _captions_in(shard: Path) -> int:
    return pc.sum(pc.list_value_length(pq.read_table(shard, columns=["langs"])["langs"])).as_py()


def _nothing_left(rows) -> str:
    found = rows.execute("SELECT problem, count(*) n FROM captions GROUP BY 1 ORDER BY n DESC")
    reasons = dict(found.fetchall())
    first = dict(list(reasons.items())[:3])
    return f"No caption with a usable image is left of {sum(reasons.values())} rows: {first}."


def load_dataset(path, streaming: bool = False):
    """The dataset that `build_dataset` wrote, a datasets.DatasetDict, memory-mapped.

    streaming: an IterableDatasetDict that reads the Parquet files as it goes, without the unpacked
    copy in `.cache`. Raises InputError without a dataset.
    """
    files: dict[str, list[str]] = {}
    for file in _shards(Path(path)):
        files.setdefault(_split_of(file), []).append(str(file))
    if not files or not (Path(path) / "rows.parquet").exists():
        raise InputError(
            f"No finished dataset at {path}. It is written by notebooks/processdata_03.ipynb "
            "(or: captionlib build)."
        )
    written = pq.read_schema(Path(path) / "rows.parquet").metadata[SHARDS.encode()]
    if json.loads(written) != [file.name for file in _shards(Path(path))]:
        raise InputError(f"Shards of {path} are missing or strange: run captionlib build again.")
    import datasets  # takes a second: not in the workers that pack

    datasets.disable_progress_bars()  # opening takes a moment
    in_order = {split: files[split] for split in dict.fromkeys([*SPLITS, *files]) if split in files}
    cache = str(Path(path) / ".cache")
    return datasets.load_dataset(
        "parquet", data_files=in_order, cache_dir=cache, streaming=streaming
    )


def _shards(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*-*.parquet") if prefix_of(file))


def _split_of(file: Path) -> str:
    return prefix_of(file)[:-1]


def accounting(path) -> pd.DataFrame:
    """Columns state, rows, share of a built dataset; the states add up to the table's rows."""
    counts: Counter = Counter()
    with pq.ParquetFile(Path(path) / "rows.parquet") as file:
        for batch in file.iter_batches(columns=["state"]):
            for each in batch["state"].value_counts().to_pylist():
                counts[each["values"]] += each["counts"]
    table = pd.DataFrame(counts.most_common(), columns=["state", "rows"])
    return table.assign(share=table.rows / counts.total())


def garbled_share(path) -> float:
    """The share of the table's captions that look like mojibake (`captions.is_garbled`)."""
    garbled = pq.read_table(Path(path) / "rows.parquet", columns=["garbled"])["garbled"]
    return garbled.to_numpy().mean()


def _card(path: Path, choices: Choices) -> str:
    """The dataset's README.md: what `datasets` and a hub read, and the accounting for people."""
    names = sorted({_split_of(file) for file in _shards(path)})
    configs = "".join(f'  - split: "{name}"\n    path: "{name}-*.parquet"\n' for name in names)
    states = accounting(path)
    rows = "".join(f"| {r.state} | {r.rows} | {r.share:.2%} |\n" for r in states.itertuples())
    made = "".join(f"- {name}: {value}\n" for name, value in asdict(choices).items())
    return f"""---
task_categories: [image-to-text]
configs:
- config_name: default
  data_files:
{configs}---

# Pictures with captions

Built by captionlib: one row an image, `captions`, `prompts` and `langs` are lists of equal length,
`image` is a JPEG. Every picture and caption keeps the licence of its source.

| state of the table's rows | rows | share |
|---|---|---|
{rows}
{garbled_share(path):.2%} of the captions look like mojibake. The choices it was built with:

{made}"""
