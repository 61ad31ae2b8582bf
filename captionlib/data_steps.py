"""The data steps of a recipe, as the notebooks processdata_01 to 03 and the command line run them.

Each takes a Recipe, does one step with the functions of the library and writes where the recipe
says. A step that was done before is not done again. Needs no torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captionlib import dataset, images
from captionlib.archives import take_in
from captionlib.dataset import accounting, load_dataset
from captionlib.download import Manners, failures
from captionlib.download import download as download_urls
from captionlib.errors import InputError
from captionlib.recipe import Recipe, check_section
from captionlib.rows import PIECE, Choices, distinct_filenames
from captionlib.scene_server import SceneServer, scene_table
from captionlib.shards import write_atomic
from captionlib.sources import iter_captions, read_captions, safe_path


def captions_table(recipe: Recipe) -> pd.DataFrame:
    """The recipe's table, whole."""
    return read_captions(_table(recipe), recipe.format, recipe.encoding)


def captions_pieces(recipe: Recipe) -> Iterator[pd.DataFrame]:
    """The recipe's table in pieces, as `iter_captions` gives them."""
    return iter_captions(_table(recipe), recipe.format, recipe.encoding)


def _table(recipe: Recipe):
    """Where it is; of drawn scenes and of what was taken in, the one that `download` wrote."""
    written = Path(recipe.data_dir) / "captions.csv"
    if recipe.table is None and not recipe.scenes and not written.exists():
        raise InputError(f"The recipe {recipe.name} names no table: give one with --table.")
    return recipe.table or written


def download(recipe: Recipe, retry: str | Sequence[str] = ()) -> pd.DataFrame:
    """Fetch the table's URLs; one row a file: status, reason, tries, bytes, sha256, ...

    Where the recipe names a `source`, its pictures and captions are taken in instead.
    """
    if recipe.images:
        raise InputError(
            f"The pictures of {recipe.name} are in {recipe.images}: nothing to download. To "
            "download the table's URLs instead, leave out images (--images)."
        )
    check_section(recipe.download, "download", Manners)
    folder = Path(recipe.data_dir)
    if recipe.source:
        downloads = take_in(recipe.source, recipe.images_dir, folder / "captions.csv")
    else:
        with SceneServer() if recipe.scenes else nullcontext() as server:
            if server:
                _write_scene_table(recipe, server.url)
            table = captions_table(recipe)
            downloads = download_urls(table, recipe.images_dir, retry, **recipe.download)
    write_atomic(folder / "downloads.parquet", downloads.to_parquet)
    return downloads


def _write_scene_table(recipe: Recipe, url: str) -> None:
    path = Path(recipe.data_dir) / "captions.csv"
    if path.exists():
        table = read_captions(path).drop_duplicates("filename")
        same_url = table.url.iloc[0].startswith(url)
        if same_url and table.split.value_counts().to_dict() == recipe.scenes:
            return
    table = scene_table(recipe.scenes, url)
    write_atomic(path, lambda temporary: table.to_csv(temporary, index=False))


def failed_downloads(recipe: Recipe) -> Iterable[tuple[str, str]]:
    """(filename, reason) of what `download` could not get; none where the pictures were there."""
    path = Path(recipe.data_dir) / "downloads.parquet"
    if recipe.images or not path.exists():
        return ()
    bad = (pc.field("status") != "ok") | pc.field("status").is_null()
    columns = ["filename", "status", "reason"]
    return failures(pq.read_table(path, columns=columns, filters=bad).to_pandas())


def check(recipe: Recipe, **options) -> pd.DataFrame:
    """Decode every picture that the table names; the verdicts, one row a file."""
    return images.as_frame(pq.read_table(write_checks(recipe, **options)))


def write_checks(recipe: Recipe, workers: int | None = None, engine: str = "processes") -> Path:
    """The same with little memory: the verdicts are in the file checks.parquet."""
    folder = recipe.images_dir
    limits = {key: value for key, value in recipe.check.items() if key != "timeout"}
    check_section(limits, "check", images.check_image)
    total, names = distinct_filenames(captions_pieces(recipe))
    paths = (path for path in (safe_path(folder, name) for name in names) if path)
    shards = images.write_checks(
        paths, Path(recipe.data_dir) / "checks", workers, engine=engine, total=total, **recipe.check
    )
    if not any(_any_file(shard) for shard in shards):
        raise InputError(
            f"No pictures of the table in the folder {folder}. Name the right one with --images, "
            "or run captionlib download first."
        )

    def join(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, images.CHECKS) as writer:
            for shard in shards:
                writer.write_table(pq.read_table(shard))

    path = Path(recipe.data_dir) / "checks.parquet"
    write_atomic(path, join)
    return path


def _any_file(shard: Path) -> bool:
    reasons = pq.read_table(shard, columns=["reason"])["reason"].unique().to_pylist()
    return reasons != ["no such file"]


def build(recipe: Recipe, **options):
    """Clean the captions, split by image, pack the dataset, a datasets.DatasetDict."""
    write_dataset(recipe, **options)
    return load_dataset(recipe.dataset_dir)


def write_dataset(recipe: Recipe, **options) -> dict[str, int]:
    """The same with little memory, without opening it; {split: images}."""
    check_section(recipe.dataset, "dataset", Choices)
    path = Path(recipe.data_dir) / "checks.parquet"
    if not path.exists():
        raise InputError(f"No {path}: it is written by processdata_02 (or: captionlib check).")
    sizes = dataset.write_dataset(
        captions_pieces(recipe),
        (batch.to_pandas() for batch in pq.ParquetFile(path).iter_batches(PIECE)),
        recipe.dataset_dir,
        recipe.images_dir,
        failed_downloads(recipe),
        **{"lang": recipe.lang, "prompt": recipe.prompt} | recipe.dataset,
        **options,
    )
    states = accounting(recipe.dataset_dir)
    write_atomic(recipe.dataset_dir / "accounting.csv", lambda t: states.to_csv(t, index=False))
    return sizes
