"""Pack checked images and cleaned captions into a dataset, every input row accounted for.

One row is one image. Images are shrunk once (short side `stored_size`, never enlarged) and stored
as JPEG bytes inside Parquet files, which `datasets` opens. Used by processdata_03 and the trainer.
"""

import hashlib
import io
import json
import re
from pathlib import Path

import datasets
import pandas as pd
from PIL import Image

from captionlib.captions import caption_problem, clean_caption
from captionlib.errors import InputError
from captionlib.images import ImageError, open_image
from captionlib.shards import run_shards, write_atomic
from captionlib.sources import safe_path

SPLITS = ("train", "val", "test")
WORD = re.compile(r"\w+").fullmatch  # a split's name is part of its files' names
FEATURES = datasets.Features(
    {
        "filename": datasets.Value("string"),
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "prompts": datasets.List(datasets.Value("string")),
        "langs": datasets.List(datasets.Value("string")),
    }
)


def build_dataset(
    table: pd.DataFrame,
    checks: pd.DataFrame,
    out_dir,
    images_dir,
    failed_downloads=(),
    lang: str = "",
    prompt: str = "",
    max_chars: int = 200,
    stored_size: int = 256,
    quality: int = 90,
    val: float = 0.05,
    test: float = 0.05,
    seed: int = 0,
    workers: int | None = None,
) -> datasets.DatasetDict:
    """Write `out_dir` and return it opened: one row an image, `captions: list[str]`.

    table: filename, caption[, split, lang, prompt]. checks: from `check_images`, for
    `images_dir / filename`. failed_downloads: (filename, reason) pairs. lang: of rows that name
    none. prompt: put before every caption, `{lang}` filled in. val, test: shares of the images
    where the table names no split; equal pictures always fall into one split.

    Also writes `rows.parquet`: the table with a column `state`, either the split a row went to or
    "dropped: reason"; `accounting` counts it.
    """
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise InputError(f"val {val} and test {test} must be shares, less than 1 together.")
    if stored_size < 16 or not 1 <= quality <= 95:
        raise InputError(f"stored_size {stored_size} is at least 16, quality {quality} 1 to 95.")
    out_dir = Path(out_dir)
    (out_dir / "rows.parquet").unlink(missing_ok=True)  # written last: without it nothing loads
    rows = _states(table, checks, Path(images_dir), dict(failed_downloads), max_chars)
    rows["lang"] = rows["lang"].replace("", lang) if "lang" in rows else lang
    if "prompt" not in rows:
        rows["prompt"] = [prompt.format(lang=each) for each in rows["lang"]]
    _drop_repeated(rows)
    _assign_splits(rows, val, test, seed)
    kept = rows[~rows.state.str.startswith("dropped")]
    if kept.empty:
        reasons = rows.state.value_counts().head(3).to_dict()
        raise InputError(f"No caption with a usable image is left of {len(rows)} rows: {reasons}.")
    options = {"images_dir": str(images_dir), "stored_size": stored_size, "quality": quality}
    for split, part in kept.groupby("state", sort=False):
        run_shards(
            _pack, _one_row_an_image(part), out_dir, _item_key, f"{split}-", workers, **options
        )
    for stale in set(out_dir.glob("*-*.parquet")):
        if stale.name.split("-")[0] not in set(kept.state):
            stale.unlink()
    write_atomic(out_dir / "rows.parquet", rows.drop(columns="sha256").to_parquet)
    return load_dataset(out_dir)


def load_dataset(path) -> datasets.DatasetDict:
    """The dataset that `build_dataset` wrote, memory-mapped. Raises InputError without one."""
    files: dict[str, list[str]] = {}
    for file in sorted(Path(path).glob("*-*.parquet")):
        files.setdefault(file.name.split("-")[0], []).append(str(file))
    if not files or not (Path(path) / "rows.parquet").exists():
        raise InputError(
            f"No finished dataset at {path}. It is written by notebooks/processdata_03.ipynb "
            "(or: captionlib build)."
        )
    datasets.disable_progress_bars()  # opening takes a moment
    order = dict.fromkeys([*SPLITS, *sorted(files)])  # ours first, each once
    in_order = {split: files[split] for split in order if split in files}
    cache = str(Path(path) / ".cache")
    return datasets.load_dataset("parquet", data_files=in_order, cache_dir=cache)


def accounting(path) -> pd.DataFrame:
    """Columns state, rows, share of a built dataset; the states add up to the table's rows."""
    states = pd.read_parquet(Path(path) / "rows.parquet", columns=["state"]).state
    counts = states.value_counts().rename_axis("state").reset_index(name="rows")
    return counts.assign(share=counts.rows / len(states))


def _states(
    table: pd.DataFrame, checks: pd.DataFrame, images_dir: Path, failed: dict, max_chars: int
) -> pd.DataFrame:
    """The table with cleaned captions, the picture's sha256, and a reason where one is dropped."""
    rows = table.reset_index(drop=True).copy()
    several_lines = rows.caption.fillna("").str.strip().str.contains(r"[\r\n]")
    rows["caption"] = rows.caption.fillna("").map(clean_caption)
    verdicts = checks.drop_duplicates("path").set_index("path")
    image_state: dict[str, tuple[str, str]] = {}
    for name in rows.filename.unique():
        path = safe_path(images_dir, name)
        if path is None:
            image_state[name] = "unsafe file name", ""
        elif name in failed:
            image_state[name] = f"download: {failed[name]}", ""
        elif str(path) not in verdicts.index:
            image_state[name] = "image not checked", ""
        else:
            verdict = verdicts.loc[str(path)]
            image_state[name] = "" if verdict.ok else f"image: {verdict.reason}", verdict.sha256
    rows["sha256"] = [image_state[name][1] for name in rows.filename]
    reasons = [
        image_state[name][0] or caption_problem(caption, max_chars)
        for name, caption in zip(rows.filename, rows.caption, strict=True)
    ]
    rows["state"] = [f"dropped: {reason}" if reason else "" for reason in reasons]
    several_lines &= rows.state == ""
    rows.loc[several_lines, "state"] = "dropped: caption of several lines (a stray quote?)"
    return rows


def _drop_repeated(rows: pd.DataFrame) -> None:
    repeated = rows[rows.state == ""].duplicated(["filename", "lang", "prompt", "caption"])
    rows.loc[repeated.index[repeated], "state"] = "dropped: repeated caption"


def _assign_splits(rows: pd.DataFrame, val: float, test: float, seed: int) -> None:
    """The official split where the table has one; else by a hash of the picture, never by row."""
    usable = rows.state == ""
    if "split" in rows:
        names = rows["split"].fillna("").str.strip().str.lower()
        rows["split"] = names.replace({"valid": "val", "validation": "val", "dev": "val"})
        _keep_official_splits(rows, usable)
        usable = rows.state == ""
    groups = sorted(
        rows.sha256[usable].unique(),
        key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest(),
    )
    n_test, n_val = (_share(len(groups), share) for share in (test, val))
    split_of = dict.fromkeys(groups, "train")
    split_of |= dict.fromkeys(groups[n_test : n_test + n_val], "val")
    split_of |= dict.fromkeys(groups[:n_test], "test")
    rows.loc[usable, "state"] = rows.sha256[usable].map(split_of)


def _share(groups: int, share: float) -> int:
    """So many of the groups: at least one where a share is asked for and three are there."""
    return max(round(groups * share), int(share > 0 and groups >= 3))


def _keep_official_splits(rows: pd.DataFrame, usable: pd.Series) -> None:
    """Give rows the split the table names; a picture named in two stays in its first one."""
    wrong = sorted(name for name in rows["split"][usable].unique() if name and not WORD(name))
    if wrong:
        raise InputError(f"The split {wrong[0]!r} of the table is no name: use train, val, test.")
    named = rows[usable & (rows["split"] != "")]
    first = named.drop_duplicates("sha256").set_index("sha256")["split"]
    split = rows.sha256.map(first)  # a picture's rows without a split follow the ones with
    other = usable & (rows["split"] != "") & (rows["split"] != split)
    rows.loc[usable & split.notna(), "state"] = split
    rows.loc[other, "state"] = "dropped: picture is in another split"


def _one_row_an_image(part: pd.DataFrame) -> list[dict]:
    names = {"caption": "captions", "prompt": "prompts", "lang": "langs"}
    lists = (
        part.groupby(["filename", "sha256"], sort=False)[list(names)]
        .agg(list)
        .rename(columns=names)
    )
    return lists.reset_index().to_dict("records")


def _item_key(item: dict) -> str:
    return json.dumps(item, ensure_ascii=False)


def _pack(items: list[dict], images_dir: str, stored_size: int, quality: int) -> datasets.Dataset:
    """One shard: decode, shrink, encode again."""
    datasets.disable_progress_bars()  # this shard's own; run_shards shows the whole
    for item in items:
        path = safe_path(images_dir, item["filename"])
        try:
            image = open_image(path)
        except ImageError as error:  # it was readable when it was checked
            raise InputError(f"{path}: {error}. Run captionlib check again.") from None
        data = encode_jpeg(shrink(image, stored_size), quality)
        item["image"] = {"bytes": data, "path": None}
    columns = {name: [item[name] for item in items] for name in FEATURES}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def shrink(image: Image.Image, stored_size: int) -> Image.Image:
    """Short side to `stored_size` pixels, in proportion; smaller pictures stay as they are."""
    short = min(image.size)
    if short <= stored_size:
        return image
    size = tuple(max(1, round(side * stored_size / short)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """The picture as JPEG (quality 1-95)."""
    out = io.BytesIO()
    # Colours at full resolution below 128 px: there, halving them blurs what is to be learnt.
    image.save(out, "JPEG", quality=quality, subsampling=0 if min(image.size) < 128 else 2)
    return out.getvalue()
