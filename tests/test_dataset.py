"""The dataset: every row in one state, no image in two splits, shards found again, JPEGs true."""

import io
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, HfFileSystem
from PIL import Image

from captionlib import build_dataset, check_images, load_dataset, read_captions, train_tokenizer
from captionlib.dataset import accounting, garbled_share
from captionlib.duplicates import duplicate_groups
from captionlib.errors import InputError
from captionlib.images import open_image
from captionlib.packing import SCHEMA, encode_jpeg, shrink
from captionlib.shards import only_one


@pytest.fixture
def parts(workplace):
    table = read_captions(workplace / "captions.csv")
    checks = check_images([workplace / "photos" / name for name in table.filename.unique()])
    return table, checks, workplace / "out", workplace / "photos"


def build(parts, table=None, **options):
    own, checks, out, photos = parts
    options = {"workers": 1} | options
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
        "dropped: caption holds other rows (a stray quote?)",
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
    table = parts[0].assign(lang="ja", caption="猫の" + parts[0].caption)
    names = list(table.filename.unique())
    table["split"] = ["validation" if name in names[:3] else "train" for name in table.filename]
    data = build(parts, table, prompt="<{lang}>")
    assert data["val"]["filename"] == names[:3]
    assert len(data["train"]) == len(names) - 3
    assert set(data["train"][0]["prompts"]) == {"<ja>"}


def test_a_picture_named_in_two_splits_is_kept_for_the_test(parts):
    table = parts[0].assign(split="train")
    first = table.filename[0]
    again = table[table.filename == first].assign(split="test", caption="a twin in the test")
    unnamed = table[table.filename == first].head(1).assign(split="", caption="of no split")
    data = build(parts, pd.concat([table, again, unnamed], ignore_index=True))
    assert first not in data["train"]["filename"]
    assert data["test"]["filename"] == [first]
    assert data["test"][0]["captions"] == ["a twin in the test", "of no split"]
    states = accounting(parts[2]).set_index("state").rows
    assert states["dropped: picture, or nearly the same, is in another split"] == 5
    assert states["dropped: repeated caption"] == 4  # of the twin's five


@pytest.fixture
def nearly_twins(tmp_path):
    """Twelve pictures and, of each, a smaller one saved as a poor JPEG: (table, checks, folder)."""
    folder = tmp_path / "twins"
    folder.mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), np.uint8)
        image = Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
        image.resize((200, 150)).save(folder / f"{number}-small.jpg", quality=50)
    names = sorted(path.name for path in folder.iterdir())
    table = pd.DataFrame({"filename": names, "caption": [f"picture {name}" for name in names]})
    return table, check_images([folder / name for name in names], workers=1), folder


def names_of(data):
    return {name.split(".")[0]: split for split in data for name in data[split]["filename"]}


def test_near_duplicates_never_fall_into_two_splits(nearly_twins, tmp_path):
    table, checks, folder = nearly_twins
    for seed in range(3):
        options = {"val": 0.3, "test": 0.3, "seed": seed, "workers": 1}
        split = names_of(build_dataset(table, checks, tmp_path / "out", folder, **options))
        assert len(split) == 24
        assert all(split[str(n)] == split[f"{n}-small"] for n in range(12))
    apart = names_of(
        build_dataset(table, checks, tmp_path / "out", folder, near_duplicates=-1, **options)
    )
    assert any(apart[str(n)] != apart[f"{n}-small"] for n in range(12))


def test_a_training_picture_nearly_equal_to_an_official_test_picture_is_dropped(
    nearly_twins, tmp_path
):
    table, checks, folder = nearly_twins
    small = table.filename.str.contains("small")
    table = table.assign(split=np.where(small & (table.index < 10), "test", "train"))
    split = names_of(build_dataset(table, checks, tmp_path / "out", folder, workers=1))
    official = {name.split(".")[0] for name in table.filename[table.split == "test"]}
    assert {name for name in split if split[name] == "test"} == official  # kept whole
    trained_on = {name for name in split if split[name] == "train"}
    assert not {f"{name}-small" for name in trained_on} & official
    states = accounting(tmp_path / "out").set_index("state").rows
    dropped = states["dropped: picture, or nearly the same, is in another split"]
    assert dropped == len(official)


def test_pairs_of_hashes_are_found_as_by_comparing_all_with_all():
    rng = np.random.default_rng(0)
    hashes = rng.integers(2**64, size=300, dtype=np.uint64)
    flips = [np.uint64(1) << rng.integers(64, size=300, dtype=np.uint64) for _ in range(4)]
    hashes = np.concatenate([hashes, hashes ^ flips[0] ^ flips[1], hashes ^ flips[2] ^ flips[3]])
    for bits in (0, 1, 2, 4, 5):
        groups = duplicate_groups(np.arange(900).astype(np.uint64), hashes, bits)
        close = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= bits
        assert (groups[:, None] == groups[None])[close].all()
        alone = close.sum(1) == 1
        assert np.bincount(groups)[groups[alone]].max(initial=1) == 1


@pytest.mark.parametrize("split", ["../../evil", "train-2014", "a b", "all"])
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
        image = Image.new("RGB", (64, 64), colour)
        image.paste("black", (0, 0, 20, 20))
        image.save(changed)
        checks = check_images([own / name for name in table.filename.unique()], workers=1)
        data = build_dataset(table, checks, out, own, val=0, test=0, workers=1)
        image = next(r for r in data["train"] if r["filename"] == changed.name)["image"]
        expected = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert np.abs(np.subtract(image.getpixel((30, 30)), expected)).max() <= 3


def test_a_half_built_dataset_does_not_load(parts):
    build(parts)
    (parts[2] / "rows.parquet").unlink()
    with pytest.raises(InputError, match="No finished dataset"):
        load_dataset(parts[2])


def test_a_missing_shard_is_noticed(parts):
    build(parts, val=0.2)
    next(parts[2].glob("val-*.parquet")).unlink()
    with pytest.raises(InputError, match="missing or strange: run captionlib build again"):
        load_dataset(parts[2])


def test_a_second_build_at_once_is_refused_and_a_mistaken_one_changes_nothing(parts):
    sizes = {split: len(rows) for split, rows in build(parts).items()}
    with only_one(parts[2], "build"), pytest.raises(InputError, match="Another build is running"):
        build(parts)
    with pytest.raises(InputError, match="No caption with a usable image"):
        build(parts, min_chars=150)
    assert {split: len(rows) for split, rows in load_dataset(parts[2]).items()} == sizes


@pytest.mark.parametrize("codec", ["cp1252", "gb18030", "cp932"])
def test_no_mojibake_gets_through_the_repair(parts, codec):
    garbled = "一只狗在草地上奔跑".encode().decode(codec, "replace")
    table = pd.concat([parts[0], parts[0].head(1).assign(caption=garbled)], ignore_index=True)
    build(parts, table, fix_mojibake=True)
    last = pd.read_parquet(parts[2] / "rows.parquet").iloc[-1]
    assert last.garbled
    assert last.state == "dropped: mojibake that cannot be repaired"


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
    assert shrink(wide, 100, squash=True).size == (100, 100)
    small = Image.new("RGB", (64, 64), (220, 40, 40))
    again = open_image(io.BytesIO(encode_jpeg(small, 90)).getvalue())
    assert np.abs(np.array(again).astype(int) - np.array(small)).max() <= 3


def test_a_table_may_come_in_pieces(parts):
    table, checks, out, photos = parts
    whole = build(parts)
    rows = pd.read_parquet(out / "rows.parquet")
    pieces = (table.iloc[start : start + 7] for start in range(0, len(table), 7))
    verdicts = (checks.iloc[start : start + 5] for start in range(0, len(checks), 5))
    again = build_dataset(pieces, verdicts, out, photos, workers=1)
    assert rows.equals(pd.read_parquet(out / "rows.parquet"))
    assert {name: split["captions"][:] for name, split in whole.items()} == {
        name: split["captions"][:] for name, split in again.items()
    }


def test_the_limits_of_captions_are_choices(parts, texts, tmp_path):
    train_tokenizer(texts["en"], "bpe", 200).save_pretrained(tmp_path / "tokenizer")
    table = parts[0].head(1)
    mojibake = "一只猫".encode().decode("latin-1")
    broken = "一只猫".encode().decode("gb18030", "replace")  # bytes are lost
    extra = [
        "短い",
        "no",
        "一只猫",
        "red " * 30,
        "dress 600_600",
        mojibake,
        broken,
    ]
    table = pd.concat([table, table.assign(caption="x").loc[[0] * len(extra)]], ignore_index=True)
    table.loc[1:, "caption"] = extra
    build(
        parts, table, lang="en", min_chars=3, max_tokens=20, tokenizer=str(tmp_path / "tokenizer"),
        codes="drop", fix_mojibake=True, val=0, test=0,
    )  # fmt: skip
    rows = pd.read_parquet(parts[2] / "rows.parquet")
    assert list(rows.state[1:]) == [
        "dropped: caption shorter than 3 characters",
        "dropped: caption shorter than 3 characters",
        "dropped: caption is not written in en",
        "dropped: caption longer than 20 tokens",
        "train",
        "dropped: caption is not written in en",
        "dropped: mojibake that cannot be repaired",
    ]
    assert rows.caption[5:7].to_list() == ["dress", "一只猫"]
    assert garbled_share(parts[2]) == pytest.approx(2 / 8)
    with pytest.raises(InputError, match="max_tokens 5 needs a tokenizer"):
        build(parts, max_tokens=5)


def test_it_streams_and_the_card_names_its_splits(parts, tmp_path):
    data = build(parts, val=0.2, test=0.2)
    rows = list(load_dataset(parts[2], streaming=True)["val"])
    assert [row["captions"] for row in rows] == list(data["val"]["captions"])
    assert datasets.Features.from_arrow_schema(SCHEMA) == data["val"].features
    by_card = datasets.load_dataset(str(parts[2]), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in by_card.items()} == {
        name: len(split) for name, split in data.items()
    }


def test_push_to_hub_into_a_local_repository(parts, tmp_path, monkeypatch):
    hub = tmp_path / "hub"

    def store(self, repo_id, operations=(), additions=(), **_):  # large files come first
        for each in [*operations, *additions]:
            path = hub / each.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                with each.as_file() as file:
                    path.write_bytes(file.read())
        return SimpleNamespace(repo_url=SimpleNamespace(repo_id=repo_id))

    def missing(*_, **__):
        raise FileNotFoundError

    repository = SimpleNamespace(id="me/scenes", sha="0", siblings=[])
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: repository)
    monkeypatch.setattr(HfApi, "create_commit", store)
    monkeypatch.setattr(HfApi, "preupload_lfs_files", store)
    monkeypatch.setattr(HfFileSystem, "find", lambda *_, **__: {})  # an empty repository
    monkeypatch.setattr(HfFileSystem, "info", missing)
    data = build(parts, val=0.2, test=0.2)
    data.push_to_hub("me/scenes")
    again = datasets.load_dataset(str(hub), cache_dir=str(tmp_path / "cache"))
    for name, split in data.items():
        for ours, theirs in zip(split, again[name], strict=True):
            assert ours["image"].tobytes() == theirs["image"].tobytes()
            assert ours["captions"] == theirs["captions"]


@pytest.mark.slow
def test_ray_writes_what_processes_write(parts, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    table, _, _, photos = parts
    paths = [photos / name for name in table.filename.unique()] + [tmp_path / "missing.png"]
    tables = []
    for engine in ("processes", "ray"):
        checks = check_images(paths, tmp_path / engine, workers=2, engine=engine)
        out = tmp_path / engine / "out"
        build((table, checks, out, photos), workers=2, engine=engine)
        files = sorted(out.glob("*.parquet"))
        tables.append(
            (checks.astype(str).to_dict(), [(f.name, pq.read_table(f).to_pylist()) for f in files])
        )
    assert tables[0] == tables[1]


def test_a_table_without_a_usable_row_is_refused(parts):
    with pytest.raises(InputError, match="No caption with a usable image is left of 1 rows"):
        build(parts, pd.DataFrame({"filename": ["ghost.png"], "caption": ["x"]}))
    with pytest.raises(InputError, match=r"No finished dataset at .*processdata_03"):
        load_dataset(parts[2])
