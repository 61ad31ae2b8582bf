"""Downloading from a loopback server that behaves like the web: every URL ends in a named state."""

import asyncio

import pandas as pd
import pytest

from captionlib import download
from captionlib.download import outcomes
from captionlib.errors import InputError
from captionlib.images import ImageError, open_image
from captionlib.scene_server import TROUBLE, SceneServer, scene_name, scene_table

FAST = {"timeout": 0.5, "tries": 2, "wait": 0.05}


@pytest.fixture(scope="module")
def server():
    with SceneServer(port=0) as running:
        yield running


@pytest.fixture
def table(server):
    return scene_table({"train": 200, "test": 2}, server.url).rename(columns={"text": "caption"})


def test_each_trouble_has_its_reason_and_the_rest_arrives(table, server, tmp_path):
    got = download(table, tmp_path, **FAST).set_index("filename")
    reasons = {
        trouble: got.reason[scene_name("train", number)] for number, trouble in TROUBLE.items()
    }
    assert reasons == {
        "missing": "http 404",
        "slow": "timeout",
        "web page": "a web page, not an image",
        "cut": "",
        "bomb": "",
        "moved": "",
        "busy": "",
    }
    assert got.tries[scene_name("train", 183)] == 2  # asked again after Retry-After
    assert (got.status == "ok").sum() == len(got) - 3
    for row in got[got.status == "ok"].itertuples():
        assert (tmp_path / row.Index).stat().st_size == row.bytes
    shares = outcomes(got.reset_index())
    assert shares.files.sum() == len(got) == table.filename.nunique()
    with pytest.raises(ImageError, match="truncated"):
        open_image(tmp_path / scene_name("train", 93))
    with pytest.raises(ImageError, match="too many pixels: 12000 x 12000"):
        open_image(tmp_path / scene_name("train", 123))


def test_a_second_run_asks_only_for_what_failed(table, server, tmp_path):
    download(table, tmp_path, **FAST)
    server.requests.clear()
    again = download(table, tmp_path, **FAST)
    assert set(server.requests) == {scene_name("train", n) for n in (3, 33, 63)}
    (tmp_path / scene_name("test", 0)).write_bytes(b"half")  # changed behind its back
    server.requests.clear()
    download(table, tmp_path, **FAST)
    assert scene_name("test", 0) in server.requests
    assert len(again) == table.filename.nunique()


def test_nothing_is_written_outside_the_folder(server, tmp_path):
    names = [
        "../out.png",
        "/tmp/captionlib-out.png",
        "a/../../out.png",
        "C:\\out.png",
        "in/side.png",
    ]
    url = f"{server.url}/{scene_name('test', 0)}"
    folder = tmp_path / "images"
    got = download(pd.DataFrame({"filename": names, "url": url}), folder, **FAST)
    assert list(got.reason[:4]) == ["unsafe file name"] * 4
    assert got.status.iloc[4] == "ok"
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert written == {"images/in/side.png"}


def test_a_name_that_cannot_be_a_file_fails_alone(server, tmp_path):
    names = ["x" * 300 + ".png", ".", "", "a/", "ledger.sqlite", "good.png", "good.png/b.png"]
    url = f"{server.url}/{scene_name('test', 0)}"
    got = download(pd.DataFrame({"filename": names, "url": url}), tmp_path / "images", **FAST)
    by_name = dict(zip(got.filename, got.reason, strict=True))
    assert by_name.pop("good.png") == "" or by_name.pop("good.png/b.png") == ""
    assert by_name["x" * 300 + ".png"].startswith("cannot be written")
    for name in (".", "", "a/", "ledger.sqlite"):
        assert by_name[name] == "unsafe file name"
    assert {path.name for path in tmp_path.iterdir()} == {"images"}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "not an http(s) url"),
        ("data:image/png;base64,AA==", "not an http(s) url"),
        ("", "not an http(s) url"),
        ("http://", "invalid url"),
        ("http://127.0.0.1:9/x.png", "no connection"),
    ],
)
def test_odd_urls_have_a_reason(url, reason, tmp_path):
    got = download(pd.DataFrame({"filename": ["x.png"], "url": [url]}), tmp_path, **FAST)
    assert got.reason[0].startswith(reason)
    assert not (tmp_path / "x.png").exists()


def test_it_works_where_a_loop_runs_already_as_in_jupyter(server, tmp_path):
    table = pd.DataFrame({"filename": ["a.png"], "url": [f"{server.url}/{scene_name('test', 1)}"]})

    async def cell():
        return download(table, tmp_path, **FAST)

    assert asyncio.run(cell()).status[0] == "ok"


def test_a_body_over_the_limit_is_cut_off(server, tmp_path):
    table = pd.DataFrame({"filename": ["a.png"], "url": [f"{server.url}/{scene_name('test', 1)}"]})
    got = download(table, tmp_path, max_bytes=100, **FAST)
    assert got.reason[0].startswith("more than")
    assert not list(tmp_path.glob("a.png*"))


def test_a_table_without_urls_is_refused(tmp_path):
    with pytest.raises(InputError, match="no column url"):
        download(pd.DataFrame({"filename": ["a.png"], "caption": ["x"]}), tmp_path)


def test_open_image_takes_a_url(server):
    assert open_image(f"{server.url}/{scene_name('test', 0)}").size == (64, 64)
    with pytest.raises(ImageError, match="http 404"):
        open_image(f"{server.url}/{scene_name('train', 3)}")
