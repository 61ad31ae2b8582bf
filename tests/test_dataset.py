"""The dataset: every row in one state, no image in two splits, shards found again, JPEGs true."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from captionlib import build_dataset, check_images, load_dataset, read_captions
from captionlib.dataset import accounting, encode_jpeg, shrink
from captionlib.errors import InputError
from captionlib.images import open_image


@pytest.fixture
def parts(workplace):
    table = read_captions(workplace / "captions.csv")
    checks = check_images([workplace / "photos" / name for name in table.filename.unique()])
    return table, checks, workplace / "out", workplace / "photos"


def build(parts, table=None, **options):
    own, checks, out, photos = parts
    return build_dataset(own if table is None else table, checks, out, photos, **options)


def test_every_row_is_in_exactly_one_state(parts):
    table = parts[0].copy()
    extra = [
        {"filename": table.filename[0], "caption": table.caption[0]},  # repeated
        {"filename": table.filename[0], "caption": "  \t "},
        {"filename": table.filename[0], "caption": "!?"},
        {"filename": table.filename[0], "caption": "a dog\nb.jpg,a cat"},
        {"filename": table.filename[0], "caption": "x" * 300},
        {"filename": "../../etc/passwd", "caption": "a file"},
        {"filename": "nowhere.png", "caption": "a ghost"},
        {"filename": "lost.png", "caption": "a lost picture"},
    ]
    table = pd.concat([table, pd.DataFrame(extra)], ignore_index=True).fillna("")
    data = build(parts, table, val=0.2, test=0.2, failed_downloads=[("lost.png", "http 404")])
    states = accounting(parts[2]).set_index("state").rows
    assert states.sum() == len(table)
    assert {state for state in states.index if state.startswith("dropped")} == {
        "dropped: repeated caption",
        "dropped: empty caption",
        "dropped: caption without a letter",
        "dropped: caption of several lines (a stray quote?)",
        "dropped: caption longer than 200 characters",
        "dropped: unsafe file name",
        "dropped: image not checked",
        "dropped: download: http 404",
    }
    assert sum(len(c) for split in data.values() for c in split["captions"]) == 120


def test_no_image_and_no_twin_is_in_two_splits(parts, workplace):
    table, _, out, photos = parts
    twins = table.assign(filename="twin-" + table.filename)
    (workplace / "more").mkdir()
    for name in table.filename.unique():
        Image.open(photos / name).save(workplace / "more" / f"twin-{name}")
        (workplace / "more" / name).symlink_to(photos / name)
    both = pd.concat([table, twins], ignore_index=True)
    checks = check_images([workplace / "more" / name for name in both.filename.unique()])
    data = build_dataset(both, checks, out, workplace / "more", val=0.25, test=0.25)
    split_of = {name: split for split, rows in data.items() for name in rows["filename"]}
    assert set(split_of) == set(both.filename)
    for name in table.filename.unique():
        assert split_of[name] == split_of[f"twin-{name}"]
    assert {split: len(rows) for split, rows in data.items()} == {
        "train": 24,
        "val": 12,
        "test": 12,
    }


def test_the_official_split_is_kept_and_prompts_are_filled(parts):
    table = parts[0].assign(lang="ja")
    names = list(table.filename.unique())
    table["split"] = ["validation" if name in names[:3] else "train" for name in table.filename]
    data = build(parts, table, prompt="<{lang}>")
    assert data["val"]["filename"] == names[:3]
    assert len(data["train"]) == len(names) - 3
    assert set(data["train"][0]["prompts"]) == {"<ja>"}


def test_a_picture_named_in_two_splits_stays_in_one(parts):
    table = parts[0].assign(split="train")
    first = table.filename[0]
    again = table[table.filename == first].assign(split="test", caption="a twin in the test")
    unnamed = table[table.filename == first].head(1).assign(split="", caption="of no split")
    data = build(parts, pd.concat([table, again, unnamed], ignore_index=True))
    assert set(data) == {"train"}
    row = next(row for row in data["train"] if row["filename"] == first)
    assert "of no split" in row["captions"]
    states = accounting(parts[2]).set_index("state").rows
    assert states["dropped: picture is in another split"] == 5 - 4  # its four equal captions repeat


@pytest.mark.parametrize("split", ["../../evil", "train-2014", "a b"])
def test_a_split_that_is_no_name_is_refused(parts, split):
    with pytest.raises(InputError, match="is no name: use train, val, test"):
        build(parts, parts[0].assign(split=split))


def test_split_names_are_read_as_people_write_them(parts):
    assert set(build(parts, parts[0].assign(split=" Train"))) == {"train"}


def test_a_changed_picture_is_packed_again(parts):
    table, _, out, photos = parts
    own = out.parent / "own"
    own.mkdir()
    for name in table.filename.unique():
        (own / name).write_bytes((photos / name).read_bytes())
    changed = own / table.filename[0]
    for colour in ("red", "white"):
        Image.new("RGB", (64, 64), colour).save(changed)
        checks = check_images([own / name for name in table.filename.unique()])
        data = build_dataset(table, checks, out, own, val=0, test=0)
        image = next(r for r in data["train"] if r["filename"] == changed.name)["image"]
        expected = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert np.abs(np.subtract(image.getpixel((30, 30)), expected)).max() <= 3


def test_a_half_built_dataset_does_not_load(parts):
    build(parts)
    (parts[2] / "rows.parquet").unlink()
    with pytest.raises(InputError, match="No finished dataset"):
        load_dataset(parts[2])


def test_splits_are_deterministic_and_depend_on_the_seed(parts):
    first = build(parts, val=0.3, seed=1)["val"]["filename"]
    assert build(parts, val=0.3, seed=1)["val"]["filename"] == first
    assert build(parts, val=0.3, seed=2)["val"]["filename"] != first


def test_building_again_reuses_shards_and_leaves_no_stale_one(parts):
    build(parts)
    before = {path: path.stat().st_mtime_ns for path in parts[2].glob("*-*.parquet")}
    build(parts)
    assert {path: path.stat().st_mtime_ns for path in parts[2].glob("*-*.parquet")} == before
    build(parts, test=0.0, val=0.0)
    assert set(load_dataset(parts[2])) == {"train"}


def test_images_are_shrunk_never_enlarged_and_stay_true():
    wide = Image.effect_noise((400, 200), 60).convert("RGB")
    assert shrink(wide, 100).size == (200, 100)
    assert shrink(wide, 300) is wide
    small = Image.new("RGB", (64, 64), (220, 40, 40))
    again = open_image(io.BytesIO(encode_jpeg(small, 90)).getvalue())
    assert np.abs(np.array(again).astype(int) - np.array(small)).max() <= 3


def test_a_table_without_a_usable_row_is_refused(parts):
    with pytest.raises(InputError, match="No caption with a usable image is left of 1 rows"):
        build(parts, pd.DataFrame({"filename": ["ghost.png"], "caption": ["x"]}))
    with pytest.raises(InputError, match=r"No finished dataset at .*processdata_03"):
        load_dataset(parts[2])
