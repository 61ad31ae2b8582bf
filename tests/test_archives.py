"""Stand-ins for downloading: each form's layout, nothing lost, nothing written outside."""

import io
import json
import tarfile
import tracemalloc

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from captionlib import read_captions
from captionlib.archives import DOWNLOADS, take_in
from captionlib.download import failures, outcomes
from captionlib.errors import InputError


def picture(number, form="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 9 % 256, 7, number)).save(file, form)
    return file.getvalue()


def write_tar(path, members):
    """members: (name or TarInfo, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def sample(key, number, caption):
    return [(f"{key}.jpg", picture(number)), (f"{key}.txt", caption.encode())]


@pytest.fixture
def take(tmp_path):
    """take(source) -> the table's rows as tuples, and the downloads by file name."""

    def run(source):
        out = tmp_path / "out"
        downloads = take_in(source, out / "images", out / "captions.csv")
        assert list(downloads.columns) == DOWNLOADS
        assert downloads.filename.is_unique
        table = read_captions(out / "captions.csv")
        assert set(table.filename) == set(downloads.filename), "a row of the source is lost"
        ok = downloads[downloads.status == "ok"]
        found = (path for path in (out / "images").rglob("*") if path.is_file())
        files = {path.relative_to(out / "images").as_posix() for path in found}
        assert files == set(ok.filename)
        sizes = [(out / "images" / name).stat().st_size for name in ok.filename]
        assert sizes == ok.bytes.to_list()
        assert set(tmp_path.glob("*.jpg")) == set(), "written outside"
        return table, downloads.set_index("filename")

    return run


# As img2dataset 1.47.0 writes it: 00000.tar of key.jpg, .txt, .json, or the folder 00000 of the
# same, or the column jpg; 00000.parquet has every URL it tried; 00000_stats.json.
TRIED = [
    ("000000", "http://x/0.jpg", "一只猫", "success", None),
    ("000001", "http://x/1.jpg", "", "success", None),
    ("000002", "http://x/2.jpg", "gone", "failed_to_download", "HTTP Error 404: Not Found"),
    ("000003", "http://x/3.jpg", "bad", "failed_to_resize", "Image decoding error"),
]


def img2dataset(top, form, lost=()):
    names = ("key", "url", "caption", "status", "error_message")
    for shard in ("00000", "00001"):
        rows = [dict(zip(names, row, strict=True)) | {"lang": "zh"} for row in TRIED]
        for row in rows:
            row["key"] = shard[-2:] + row["key"][2:]
        ok = [row for row in rows if row["status"] == "success" and row["key"] not in lost]
        files = []
        for number, row in enumerate(ok):
            text = row["caption"].encode()
            files += [(f"{row['key']}.jpg", picture(number)), (f"{row['key']}.txt", text)]
            files += [(f"{row['key']}.json", json.dumps(row | {"width": 8}).encode())]
        table = pa.Table.from_pylist(rows)
        if form == "webdataset":
            write_tar(top / f"{shard}.tar", files)
        elif form == "files":
            (top / shard).mkdir(parents=True)
            for name, data in files:
                (top / shard / name).write_bytes(data)
        else:
            top.mkdir(exist_ok=True)
            pictures = [picture(i) if row in ok else None for i, row in enumerate(rows)]
            table = table.append_column("jpg", pa.array(pictures, pa.binary()))
        pq.write_table(table, top / f"{shard}.parquet")
        (top / f"{shard}_stats.json").write_text('{"count": 4}')
    return top


@pytest.mark.parametrize("form", ["webdataset", "files", "parquet"])
def test_img2dataset_in_its_three_forms(form, take, tmp_path):
    table, downloads = take(img2dataset(tmp_path / "in", form))
    assert dict(zip(table.filename, table.caption, strict=True)) == {
        f"{shard}/{shard[-2:]}{key[2:]}.jpg": caption
        for shard in ("00000", "00001")
        for key, _, caption, _, _ in TRIED
    }
    assert set(table.lang) == {"zh"}
    assert set(table.url) == {url for _, url, _, _, _ in TRIED}
    assert downloads.status["00000/000000.jpg"] == "ok"
    assert downloads.reason["00001/010002.jpg"] == "HTTP Error 404: Not Found"
    assert downloads.url["00001/010003.jpg"] == "http://x/3.jpg"
    assert outcomes(downloads).files.to_list() == [4, 2, 2]
    assert len(dict(failures(downloads.reset_index()))) == 4


@pytest.mark.parametrize("form", ["webdataset", "files", "parquet"])
def test_what_the_metadata_promises_and_is_not_there_has_failed(form, take, tmp_path):
    _, downloads = take(img2dataset(tmp_path / "in", form, lost=["000001"]))
    assert downloads.reason["00000/000001.jpg"] == "no picture in the source"


def test_webdataset_shards_with_equal_keys_and_other_names(take, tmp_path):
    known = {"caption": ["a", "b"], "url": "http://x/1", "lang": "en", "split": "val"}
    write_tar(
        tmp_path / "in/train/a-0.1.tar",
        [
            ("./k.seg.png", picture(1, "PNG")),
            ("./k.JPG", picture(2)),
            ("./k.json", json.dumps(known).encode()),
            ("./sub/k.webp", picture(3, "WEBP")),
            ("./sub/k.caption", "\ufeff一只猫\n".encode()),
            ("./k.png", picture(4, "PNG")),
            ("./only.cls", b"7"),
            ("./odd*:?" + "x" * 90 + ".jpg", picture(5)),
            ("._k.jpg", b"of macOS"),
        ],
    )
    write_tar(tmp_path / "in/train/a-0.2.tar.gz", sample("k", 6, "c"))
    table, downloads = take(tmp_path / "in")
    rows = set(table[["filename", "caption", "lang", "split"]].itertuples(index=False, name=None))
    assert {("a-0.1/k.jpg", "a", "en", "val"), ("a-0.1/k.jpg", "b", "en", "val")} < rows
    assert {("a-0.1/sub/k.webp", "一只猫", "", ""), ("a-0.2/k.jpg", "c", "", "")} < rows
    failed = downloads[downloads.status == "failed"].reason.to_dict()
    assert failed == {
        "a-0.1/k.seg.png": "a further picture of its sample",
        "a-0.1/only.jpg": "no picture in the source",
    }
    assert downloads.status["a-0.1/k.png"] == "ok"
    assert (tmp_path / "out/images/a-0.1/k.jpg").read_bytes() == picture(2)
    assert len(downloads) == 7


def test_names_that_differ_in_case_or_come_twice_are_all_kept(take, tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        sample("k", 1, "x") + sample("K", 2, "y") + sample("l", 3, "z") + sample("k", 4, "v"),
    )
    table, downloads = take(path)
    assert list(downloads.index) == ["a/k.jpg", "a/K-2.jpg", "a/l.jpg", "a/k-3.jpg"]
    assert list(table.caption) == ["x", "y", "z", "v"]


def link(name, kind, target="/etc/passwd"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def test_nothing_of_a_hostile_tar_is_written_outside(take, tmp_path):
    path = write_tar(
        tmp_path / "in/a.tar",
        [
            *sample("../../up", 1, "x"),
            *sample("/tmp/absolute", 2, "x"),
            *sample("a/../../b", 3, "x"),
            link("sym.jpg", tarfile.SYMTYPE),
            link("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
            link("device.jpg", tarfile.CHRTYPE),
            link("fifo.jpg", tarfile.FIFOTYPE),
            link("text.txt", tarfile.SYMTYPE),
            *sample("good", 4, "x"),
            ("json.jpg", picture(5)),
            ("json.json", b'{"caption": "cut'),
            ("text2.jpg", picture(5)),
            ("text2.txt", b"\xff\xfa"),
            ("list.jpg", picture(6)),
            ("list.json", b"[1]"),
            ("half.jpg", picture(7)),
            ("half.json", b'{"caption": "x\\ud83d", "url": 7}'),
        ],
    )
    table, downloads = take(path)
    reasons = downloads.reason
    for name in ("a/../../up.jpg", "/tmp/absolute.jpg", "a/a/../../b.jpg"):
        assert reasons[name] == "unsafe file name"
    for name in ("sym", "hard", "device", "fifo"):
        assert reasons[f"a/{name}.jpg"] == "a link or device, not a file"
    assert reasons["a/json.jpg"].startswith("damaged text beside the picture")
    assert reasons["a/text2.jpg"].startswith("damaged text beside the picture")
    ok = {"a/good.jpg", "a/list.jpg", "a/half.jpg"}
    assert set(downloads.index[downloads.status == "ok"]) == ok
    assert table.set_index("filename").caption["a/half.jpg"] == "x?"


@pytest.mark.parametrize("at", [0.2, 0.5, 0.62, 0.9, "header", "end"])
def test_a_damaged_shard_is_one_failed_row_and_the_rest_is_kept(at, take, tmp_path):
    good = write_tar(tmp_path / "in/b.tar", sample("k", 1, "x"))
    bad = good.with_name("a.tar")
    members = [row for i in range(20) for row in sample(f"{i:03d}", i, "x")]
    data = write_tar(bad, members).read_bytes()
    if at == "header":  # of the tenth picture
        place = data.index(b"010.jpg")
        bad.write_bytes(data[:place] + b"\xff" * 512 + data[place + 512 :])
    elif at == "end":
        bad.write_bytes(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512))
    else:
        bad.write_bytes(data[: int(at * 1024 * 40)])
    _, downloads = take(good.parent)
    assert downloads.reason["a.tar"].startswith("damaged, the rest of it is not read")
    assert downloads.status["b/k.jpg"] == "ok"
    kept = sum(name.startswith("a/") for name in downloads.index)
    assert kept == 20 if at == "end" else 0 < kept < 20


def test_damaged_metadata_is_a_failed_row_too(take, tmp_path):
    top = img2dataset(tmp_path / "in", "webdataset")
    data = bytearray((top / "00000.parquet").read_bytes())
    data[4:60] = bytes(56)  # the first page; the schema at the end is whole
    (top / "00000.parquet").write_bytes(data)
    _, downloads = take(top)
    assert downloads.reason["00000.parquet"].startswith("damaged")
    assert (downloads.status == "ok").sum() == 4


def test_of_a_truncated_shard_the_metadata_knows_the_rest(take, tmp_path):
    top = img2dataset(tmp_path / "in", "webdataset")
    data = (top / "00000.tar").read_bytes()
    (top / "00000.tar").write_bytes(data[: data.index(b"000001.jpg") + 100])
    table, downloads = take(top)
    assert {f"00000/00000{i}.jpg" for i in range(4)} < set(table.filename)
    assert downloads.status["00000/000000.jpg"] == "ok"
    assert downloads.status["00000/000001.jpg"] == "failed"
    assert downloads.reason["00000.tar"].startswith("damaged")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", b"no tar at all" * 99, "No picture could be taken .*a.tar: damaged"),
        ("a.tar", b"", "No picture could be taken .*a.tar: damaged"),
        ("a.tgz", b"\x1f\x8bcut", "No picture could be taken .*a.tgz: damaged"),
        ("a.parquet", b"PAR1", "cannot be read as a Hugging Face dataset"),
        ("a.zip", b"PK", "no tar or Parquet shard"),
        ("missing.tar", None, "no tar or Parquet shard"),
        ("*.tar", None, "no tar or Parquet shard"),
    ],
)
def test_what_is_no_source_is_one_line_and_leaves_nothing(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        take_in(tmp_path / name, tmp_path / "images", tmp_path / "captions.csv")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "captions.csv").exists()


def test_a_plain_folder_of_pictures_and_texts(take, tmp_path):
    top = tmp_path / "in"
    (top / "deep").mkdir(parents=True)
    (top / "a.jpg").write_bytes(picture(1))
    (top / "a.txt").write_text("一只猫\n", "utf-8")
    (top / "deep/b.v2.PNG").write_bytes(picture(2, "PNG"))
    (top / "deep/b.v2.json").write_text('{"text": ["x", "y"], "lang": "en"}')
    (top / "c.webp").write_bytes(b"")
    (top / "orphan.txt").write_text("lost")
    (top / "d.gif").write_bytes(b"GIF89a")
    table, downloads = take(top)
    columns = table[["filename", "caption", "lang"]]
    assert list(columns.itertuples(index=False, name=None)) == [
        ("a.jpg", "一只猫", ""),
        ("c.webp", "", ""),
        ("d.gif", "", ""),
        ("orphan.txt", "", ""),
        ("deep/b.v2.PNG", "x", "en"),
        ("deep/b.v2.PNG", "y", "en"),
    ]
    failed = downloads[downloads.status == "failed"].reason.to_dict()
    assert failed == {
        "c.webp": "no picture in the source",
        "orphan.txt": "a text without a picture",
    }


@pytest.fixture
def hub():
    """A DatasetDict; of each split a picture is missing."""
    pictures = [{"bytes": picture(i, "PNG"), "path": f"{i}.png"} for i in range(2)] + [None]
    captions = [["a", "b"], [], ["c"]]
    features = {"image": datasets.Image(), "Caption": datasets.List(datasets.Value("string"))}
    data = datasets.Dataset.from_dict(
        {"image": pictures, "Caption": captions}, datasets.Features(features)
    )
    return datasets.DatasetDict({"train": data, "validation": data})


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_hugging_face_datasets_keep_splits_and_bytes(form, hub, take, tmp_path):
    top = tmp_path / "in"
    if form == "saved":
        hub.save_to_disk(top)
    else:
        for split, part in hub.items():
            part.to_parquet(top / f"{split}-00000-of-00001.parquet")
    table, downloads = take(top)
    rows = list(table[["filename", "caption", "split"]].itertuples(index=False, name=None))
    assert rows[:4] == [
        ("train/00000000.png", "a", "train"),
        ("train/00000000.png", "b", "train"),
        ("train/00000001.png", "", "train"),
        ("train/00000002.jpg", "c", "train"),
    ]
    assert set(table.split) == {"train", "validation"}
    assert downloads.reason["train/00000002.jpg"] == "no picture in the source"
    assert (tmp_path / "out/images/validation/00000001.png").read_bytes() == picture(1, "PNG")


def test_sentences_of_a_parquet_pattern(take, tmp_path):
    sentences = pa.array([[{"raw": "a", "id": 1}, {"raw": "b", "id": 2}]])
    table = pa.table({"image": [picture(1)], "sentences": sentences})
    pq.write_table(table, tmp_path / "x.parquet")
    table, _ = take(f"{tmp_path}/*.parquet")
    assert list(table.caption) == ["a", "b"]
    assert set(table.split) == {""}


def test_an_image_folder_and_a_path_that_leads_out_of_it(take, tmp_path):
    top = tmp_path / "in"
    (top / "train").mkdir(parents=True)
    (top / "train/0.png").write_bytes(picture(1, "PNG"))
    (top / "train/metadata.csv").write_text("file_name,text\n0.png,x\n")
    table, _ = take(top)
    assert table.to_dict("records")[0] | {"url": "", "lang": ""} == {
        "filename": "train/00000000.png", "caption": "x", "split": "train", "url": "", "lang": "",
    }  # fmt: skip
    secret = tmp_path / "secret.bin"
    secret.write_bytes(picture(2))
    image = pa.array([{"bytes": None, "path": str(secret)}, {"bytes": picture(3), "path": None}])
    (tmp_path / "leak").mkdir()
    pq.write_table(pa.table({"image": image, "text": ["x", "y"]}), tmp_path / "leak/train.parquet")
    (tmp_path / "out/images/train/00000000.png").unlink()
    _, downloads = take(tmp_path / "leak")
    assert downloads.reason["train/00000000.jpg"] == "no picture in the source"


def test_a_dataset_without_captions_or_that_cannot_be_had(tmp_path):
    out = (tmp_path / "images", tmp_path / "captions.csv")
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="has no column caption. Its columns: image, label"):
        take_in(tmp_path / "x.parquet", *out)
    with pytest.raises(InputError, match="cannot be read as a Hugging Face dataset") as error:
        take_in(tmp_path / "nowhere", *out)
    assert "\n" not in str(error.value)


def test_a_second_run_writes_only_what_is_not_there(take, tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("0", 1, "x") + sample("1", 2, "y"))
    first = take(path)
    kept, cut = (tmp_path / "out/images/a" / name for name in ("0.jpg", "1.jpg"))
    before = kept.stat().st_mtime_ns, kept.stat().st_ino
    cut.write_bytes(b"cut")
    second = take(path)
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    assert cut.read_bytes() == picture(2)
    pd.testing.assert_frame_equal(first[0], second[0])
    pd.testing.assert_frame_equal(first[1].drop(columns="time"), second[1].drop(columns="time"))


def test_memory_does_not_grow_with_the_source(tmp_path):
    """80 MB of pictures go through; a few of them are held at a time."""
    top = tmp_path / "in"
    for shard in range(2):
        write_tar(
            top / f"{shard}.tar",
            ((f"{i:05d}.jpg", bytes([1 + i % 9]) * 1_000_000) for i in range(40)),
        )
    tracemalloc.start()
    take_in(top, tmp_path / "images", tmp_path / "captions.csv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
