"""Downloading from a loopback server that behaves like the web: every URL ends in a named state."""

import asyncio
import email.utils
import errno
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pandas as pd
import pytest
from bad_server import PAGES, ROBOTS, BadServer, answer, gzip_bomb, jpeg

from captionlib import download, fetch
from captionlib.download import _by_turns, _open_ledger, outcomes
from captionlib.errors import InputError
from captionlib.images import ImageError, open_image
from captionlib.scene_server import TROUBLE, SceneServer, scene_name, scene_table

FAST = {"timeout": 0.5, "tries": 2, "wait": 0.05, "allow_private": True}


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
        "forbidden": "refused by robots.txt",
        "slow": "timeout",
        "web page": "a web page, not an image",
        "cut": "",
        "blank": "",
        "bomb": "too many pixels: 12000 x 12000",
        "moved": "",
        "busy": "",
    }
    assert got.tries[scene_name("train", 183)] == 2  # asked again after Retry-After
    assert (got.status == "ok").sum() == len(got) - 5
    assert server.requests[scene_name("train", 18)] == 0  # forbidden: not asked for
    for row in got[got.status == "ok"].itertuples():
        assert (tmp_path / row.Index).stat().st_size == row.bytes
    shares = outcomes(got.reset_index())
    assert shares.files.sum() == len(got) == table.filename.nunique()
    with pytest.raises(ImageError, match="truncated"):
        open_image(tmp_path / scene_name("train", 93))


def test_a_second_run_asks_only_for_what_may_have_passed(table, server, tmp_path):
    download(table, tmp_path, **FAST)
    server.requests.clear()
    again = download(table, tmp_path, **FAST)
    assert set(server.requests) == {scene_name("train", 33)}  # the timeout; not 404 nor the page
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


def fetch_pages(server, names, out_dir, **manners):
    """The reasons of the named pages of a BadServer, by name."""
    urls = [name if ":" in name else f"{server.url}/{name}" for name in names]
    files = [f"{i}.jpg" for i in range(len(names))]
    table = pd.DataFrame({"filename": files, "url": urls})
    got = download(table, out_dir, **FAST | {"tries": 1} | manners)
    return dict(zip(names, got.reason, strict=True))


def robots(text):
    return {"/robots.txt": answer(text.encode(), Content_Type="text/plain")}


REASONS = {
    "good": "",
    "zipped": "",
    "to-good": "",
    "noise": "",  # no picture, but that is for the check to say
    "loop": "too many redirects",
    "to-file": "not an http(s) url",
    "to-data": "not an http(s) url",
    "too-long": "connection cut short",
    "html": "a web page, not an image",
    "html-lies": "a web page, not an image",
    "empty": "empty answer",
    "204": "http 204",
    "206": "http 206",
    "none": "http 404",
    "too-short": "broken answer",  # or, where the rest comes later, a truncated picture
    "bad-chunks": "broken answer",
    "bad-header": "broken answer",
    "no-http": "broken answer",
    "bad-gzip": "connection cut short",
    "noai": "refused by X-Robots-Tag",
    "big": "more than 1 MB",
    "endless": "more than 1 MB",
    "drip": "timeout",
    "silence": "timeout",
    "http://me:secret@127.0.0.1/": "credentials in the url",
}


def test_whatever_a_server_does_has_a_name_and_an_end(tmp_path):
    start = time.monotonic()
    with BadServer() as server:
        got = fetch_pages(server, REASONS, tmp_path, max_bytes=1_000_000)
        assert got == REASONS
        assert server.requests["/loop"] == 1 + fetch.MAX_REDIRECTS
        assert all("captionlib/" in agent and "contact" in agent for agent in server.agents)
    assert time.monotonic() - start < 5
    assert not list(tmp_path.glob(".*.part"))


def test_a_gzip_bomb_fills_no_memory(tmp_path):
    code = """
import resource, sys, pandas as pd
from captionlib import download
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def get(name):
    table = pd.DataFrame({"filename": [name], "url": [f"{sys.argv[1]}/{name}"]})
    return download(table, sys.argv[2], allow_private=True, max_bytes=2_000_000).reason[0]
get("good")
before = peak()
print(get("bomb"), peak() - before, sep=";")
"""
    pytest.importorskip("resource")
    bomb = answer(gzip_bomb(), Content_Encoding="gzip")
    with BadServer(PAGES | {"/bomb": bomb}) as server:
        command = [sys.executable, "-c", code, server.url, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    reason, grown = done.stdout.strip().split(";")
    assert reason == "more than 2 MB"
    assert int(grown) < 30 * (1024 if sys.platform == "darwin" else 1)  # MB, of 1,000 packed


def test_a_picture_with_too_many_pixels_is_left_after_its_header(tmp_path):
    async def endless_jpeg(writer):
        writer.write(answer(jpeg(1000), Content_Length=None, Connection="close"))
        while True:
            writer.write(bytes(1 << 12))
            await writer.drain()
            await asyncio.sleep(0.01)

    with BadServer(PAGES | {"/large": endless_jpeg}) as server:
        got = fetch_pages(server, ["large", "good"], tmp_path, max_pixels=999_999)
    assert got == {"large": "too many pixels: 1000 x 1000", "good": ""}


def test_robots_txt_is_asked_once_and_obeyed(tmp_path):
    rules = robots("User-agent: *\nDisallow: /\n\nUser-agent: CaptionLib\nDisallow: /*.gif$\n")
    pages = {f"/{n}.jpg": answer(jpeg()) for n in range(64)}
    moved = {"/moved": answer(status="302 Found", Location="/a.gif")}
    with BadServer(rules | pages | moved, delay=0.05) as server:
        names = [name[1:] for name in pages]
        got = fetch_pages(server, [*names, "a.gif", "moved"], tmp_path, per_host=64, timeout=5)
        assert server.requests["/robots.txt"] == 1
        assert server.requests["/a.gif"] == 0
        assert {got.pop(name) for name in ("a.gif", "moved")} == {"refused by robots.txt"}
        assert set(got.values()) == {""}
        off = fetch_pages(server, ["a.gif"], tmp_path / "off", robots=False)
        assert off == {"a.gif": "http 404"}


def test_without_a_robots_txt_all_is_allowed_with_a_broken_one_nothing(tmp_path):
    gone = {"/robots.txt": answer(status="403 Forbidden"), "/a": answer(jpeg())}
    broken = gone | {"/robots.txt": answer(status="503 Busy")}
    page = gone | {"/robots.txt": answer(b"<html>Disallow: /</html>", Content_Type="text/html")}
    huge = gone | robots("#" * 600_000 + "\nUser-agent: *\nDisallow: /\n")
    odd = gone | robots("\0\xff\nDisallow: [\nCrawl-delay: nan\nCrawl-delay: -1\nAllow:\n")
    expected = ["", "robots.txt unavailable: http 503", "", "", ""]
    for number, (pages, reason) in enumerate(
        zip([gone, broken, page, huge, odd], expected, strict=True)
    ):
        with BadServer(pages) as server:
            assert fetch_pages(server, ["a"], tmp_path / str(number)) == {"a": reason}
    assert "robots.txt unavailable: http 503".startswith(fetch.PASSING)


def test_outcomes_show_the_share_refused_by_robots_txt(tmp_path):
    with BadServer(PAGES | robots("User-agent: *\nDisallow: /private")) as server:
        urls = [f"{server.url}/{path}" for path in ("private/1", "private/2", "good", "204")]
        table = pd.DataFrame({"filename": list("abcd"), "url": urls})
        shares = outcomes(download(table, tmp_path, **FAST)).set_index("outcome").share
    assert shares["refused by robots.txt"] == 0.5
    assert shares["downloaded"] == 0.25


def test_a_crawl_delay_spaces_the_requests(tmp_path):
    pages = {f"/{n}": answer(jpeg()) for n in range(4)}
    rules = robots("User-agent: *\nCrawl-delay: 0.1\n")
    start = time.monotonic()
    with BadServer(pages | rules) as server:
        assert set(fetch_pages(server, list("0123"), tmp_path).values()) == {""}
        assert server.most_open == 1
    assert time.monotonic() - start > 0.4


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        (["noai"], True),
        (["noindex", "NoImageAI"], True),
        (["noindex, noai , nofollow"], True),
        (["captionlib: noai"], True),
        (["otherbot: noindex, noai"], False),
        (["otherbot: noindex", "noimageai"], True),
        (["otherbot: noai, captionlib: noimageai"], True),
        (["max-snippet: 5, noai"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True),
        (["noaimage, all"], False),
        ([], False),
    ],
)
def test_x_robots_tags(headers, refused):
    assert fetch._no_ai(headers) is refused


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "0", "localhost"),
        *("10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1"),
        *("255.255.255.255", "240.0.0.1", "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[ff02::1]"),
        *("[fec0::1]", "[::ffff:127.0.0.1]", "[2002:7f00:1::]", "[64:ff9b::7f00:1]", "[::7f00:1]"),
    ],
)
def test_private_addresses_are_refused_however_they_are_spelt(host, tmp_path):
    table = pd.DataFrame({"filename": ["a"], "url": [f"http://{host}:9/a.png"]})
    assert download(table, tmp_path).reason[0] == "private address"


def test_public_addresses_are_public():
    for address in ("8.8.8.8", "2606:4700::1", "64:ff9b::808:808", "::ffff:8.8.8.8"):
        assert not fetch.is_private(address)


def test_a_public_name_of_a_private_address_is_refused(tmp_path, monkeypatch):
    with BadServer() as server:
        info = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [info])
        url = f"http://pictures.example:{server.port}/good"
        table = pd.DataFrame({"filename": ["a"], "url": [url]})
        assert download(table, tmp_path).reason[0] == "private address"
        assert not server.requests
        assert download(table, tmp_path, retry=["all"], **FAST).status[0] == "ok"


def test_a_redirect_to_a_private_address_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "is_private", lambda address: address != "127.0.0.1")
    with BadServer() as server:
        inner = f"http://127.0.0.2:{server.port}/good"
        server.pages["/inward"] = answer(status="302 Found", Location=inner)
        got = fetch_pages(server, ["good", "inward"], tmp_path, allow_private=False)
    assert got == {"good": "", "inward": "private address"}


def test_retry_after_is_a_number_or_a_date_and_nonsense_is_neither():
    soon = email.utils.formatdate(time.time() + 50, usegmt=True)
    assert fetch._retry_after("7") == 7
    assert 48 < fetch._retry_after(soon) <= 50
    for odd in ("", "soon", "-1", "Fri, 31 Dec 99999 23:59:59 GMT", "1 Dec 20 1:1 +9999999999"):
        assert fetch._retry_after(odd) == 0


def test_waiting_for_one_url_holds_up_no_other(tmp_path):
    busy = answer(status="503 Busy", Retry_After="1")
    pages = {f"/{n}": answer(jpeg()) for n in range(30)}
    with BadServer(pages | {"/busy": busy, "/robots.txt": ROBOTS}) as server:
        names = ["busy", *(name[1:] for name in pages)]
        table = pd.DataFrame({"filename": names, "url": [f"{server.url}/{n}" for n in names]})
        got = download(table, tmp_path, connections=1, **FAST).set_index("filename")
    assert got.reason["busy"] == "http 503"
    assert got.tries["busy"] == 2
    assert got.time.drop("busy").max() < got.time["busy"] - 0.8


def test_a_host_gets_no_more_than_its_share_of_connections(tmp_path):
    pages = {f"/{n}": answer(jpeg()) for n in range(40)}
    with BadServer(pages, delay=0.02) as server:
        got = fetch_pages(server, [name[1:] for name in pages], tmp_path, per_host=3)
        assert set(got.values()) == {""}
        assert server.most_open == 3


def test_retry_asks_again_for_its_classes_only(tmp_path):
    names = ["good", "none", "silence", "html", "busy"]
    pages = PAGES | {"/busy": answer(status="429 Busy", Retry_After="99")}
    with BadServer(pages) as server:

        def asked(**options):
            server.requests.clear()
            fetch_pages(server, names, tmp_path, timeout=0.2, **options)
            return {path[1:] for path in server.requests} - {"robots.txt"}

        assert asked() == set(names)
        assert asked() == {"silence", "busy"}
        assert asked(retry=["429"]) == {"busy"}
        assert asked(retry=["timeout", "a web page"]) == {"silence", "html"}
        assert asked(retry=["http 4"]) == {"none", "busy"}
        assert asked(retry=["all"]) == set(names) - {"good"}
        assert asked(retry=["connection cut short"]) == set()  # known, none here
        with pytest.raises(InputError, match=r"'sunshine'.*: .*http 404, http 429, timeout, all"):
            asked(retry=["sunshine"])


def test_a_second_download_into_the_same_folder_is_refused(tmp_path):
    table = pd.DataFrame({"filename": ["a"], "url": ["http://127.0.0.1:9/a"]})
    download(table, tmp_path, **FAST)
    with (
        closing(_open_ledger(tmp_path / "ledger.sqlite")),
        pytest.raises(InputError, match="Another download is running in"),
    ):
        download(table, tmp_path, **FAST)
    download(table, tmp_path, **FAST)


def test_what_may_not_have_reached_the_disk_is_read_again(tmp_path):
    table = pd.DataFrame({"filename": ["a", "b"]})
    with BadServer(PAGES | {"/b": answer(jpeg())}) as server:
        table["url"] = [f"{server.url}/good", f"{server.url}/b"]
        download(table, tmp_path, **FAST)
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as ledger, ledger:
            assert ledger.execute("SELECT settled FROM downloads").fetchall() == [(1,), (1,)]
            ledger.execute("UPDATE downloads SET settled = 0 WHERE filename = 'a'")
        for name in ("a", "b"):  # the right size, the wrong content
            (tmp_path / name).write_bytes(bytes(len(jpeg())))
        (tmp_path / ".c.jpg.123.part").write_bytes(b"half")
        server.requests.clear()
        download(table, tmp_path, **FAST)
        assert set(server.requests) == {"/robots.txt", "/good"}
    assert (tmp_path / "a").read_bytes() == jpeg()
    assert not list(tmp_path.glob(".*.part"))


def test_a_full_disk_ends_the_run_and_keeps_the_ledger(tmp_path, monkeypatch):
    real = os.replace

    def full(source, target):
        if str(target).endswith("1.jpg"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with BadServer() as server:
        with pytest.raises(OSError, match="No space left"):
            fetch_pages(server, ["good", "zipped", "silence"], tmp_path, timeout=20, connections=1)
        assert {name: row[1] for name, row in ledger_of(tmp_path).items()} == {"0.jpg": "ok"}
        assert not list(tmp_path.glob(".*.part"))

        def no_commit(*_):
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(sys.modules["captionlib.download"], "_commit", no_commit)
        with pytest.raises(sqlite3.OperationalError):
            fetch_pages(server, ["silence"], tmp_path / "other", timeout=20)


def test_no_proxy_of_the_environment_is_used(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with BadServer() as server:
        assert fetch_pages(server, ["good"], tmp_path) == {"good": ""}


RUN = """
import sys, pandas as pd
from captionlib import download
table = pd.read_csv(sys.argv[1])
try:
    download(table, sys.argv[2], allow_private=True, tries=1, timeout=20, per_host=8)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_download(table, out_dir, until):
    """A process that downloads, when until() is true or it has ended."""
    table.to_csv(out_dir.with_suffix(".csv"), index=False)
    command = [sys.executable, "-c", RUN, str(out_dir.with_suffix(".csv")), str(out_dir)]
    process = subprocess.Popen(command)
    while not until() and process.poll() is None:
        time.sleep(0.005)
    return process


def ledger_of(folder):
    """{filename: (url, status, reason, http_status, bytes, sha256)}; empty before the first row."""
    if not (folder / "ledger.sqlite").exists():
        return {}
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as ledger:
        names = "filename, url, status, reason, http_status, bytes, sha256"
        try:
            return {row[0]: row[1:] for row in ledger.execute(f"SELECT {names} FROM downloads")}
        except sqlite3.OperationalError:  # killed before there was a table
            return {}


def pictures_in(folder):
    files = (path for path in folder.iterdir() if not path.name.startswith("ledger"))
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_like_a_run_that_was_not(tmp_path):
    bad = [answer(status="404 Not Found"), PAGES["/html-lies"], PAGES["/empty"], PAGES["/too-long"]]
    pages = {f"/{n}": bad[n // 10 % 4] if n % 10 == 3 else answer(jpeg(64, n)) for n in range(400)}
    chance, killed = random.Random(5), tmp_path / "killed"
    with BadServer(pages, delay=0.03) as server:
        names = [f"{n}.jpg" for n in range(400)]
        table = pd.DataFrame({"filename": names, "url": [f"{server.url}/{n}" for n in range(400)]})
        done = 0
        for _ in range(10):
            before = ledger_of(killed)
            server.requests.clear()
            moment = chance.randrange(1, 80)
            process = start_download(table, killed, lambda m=moment: server.requests.total() > m)
            time.sleep(chance.random() / 2)
            process.kill()
            process.wait()
            finished = {f"/{name[:-4]}" for name, row in before.items() if row[1] == "ok"}
            assert not finished & set(server.requests)
            for name, content in pictures_in(killed).items():
                if not name.endswith(".part"):
                    assert pages[f"/{name[:-4]}"].endswith(content)
                    assert content == jpeg(64, int(name[:-4]))
            done = max(done, len(finished))
        assert done > 50  # there was something to lose
        server.requests.clear()
        start_download(table, killed, lambda: False)
        whole = download(table, tmp_path / "whole", tries=1, allow_private=True, per_host=8)
    assert (whole.status == "ok").sum() == 360
    assert ledger_of(killed) == ledger_of(tmp_path / "whole")
    assert pictures_in(killed) == pictures_in(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a child")
def test_interrupted_it_keeps_what_it_has(tmp_path):
    with BadServer() as server:
        urls = [f"{server.url}/good", f"{server.url}/silence"]
        table = pd.DataFrame({"filename": ["a.jpg", "b.jpg"], "url": urls})
        here = tmp_path / "images"
        process = start_download(table, here, (here / "a.jpg").exists)
        time.sleep(0.2)  # from the file's name to the end of its row
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(10) == 130
    with closing(sqlite3.connect(here / "ledger.sqlite")) as ledger:
        rows = ledger.execute("SELECT filename, status, settled FROM downloads").fetchall()
    assert rows == [("a.jpg", "ok", 1)]


def test_a_file_name_of_several_urls_is_given_to_none_of_them(server, tmp_path):
    names = ["a.png", "a.png", "B.png", "b.png", "d/x.png", "d\\x.png", "c.png"]
    urls = [f"{server.url}/{scene_name('test', n)}" for n in range(7)]
    table = pd.DataFrame({"filename": names, "url": urls})
    got = download(table, tmp_path, **FAST).set_index("filename")
    assert set(got.index) == set(names)
    assert set(got.reason.drop("c.png")) == {"file name of several URLs"}
    assert got.status["c.png"] == "ok"
    assert [path.name for path in tmp_path.rglob("*.png")] == ["c.png"]
    mended = download(table[2:3], tmp_path, **FAST)  # asked again when the table is better
    assert mended.status[0] == "ok"


def test_a_windows_path_is_found_again(server, tmp_path):
    table = pd.DataFrame({"filename": ["d\\x.png"], "url": [f"{server.url}/test-000000.png"]})
    download(table, tmp_path, **FAST)
    server.requests.clear()
    assert download(table, tmp_path, **FAST).status[0] == "ok"
    assert not server.requests


def test_many_urls_of_one_host_do_not_come_first():
    urls = [f"http://slow/{n}" for n in range(3)] + ["http://a/1", "http://b/1", "broken"]
    turns = _by_turns(pd.DataFrame({"url": urls})).url.to_list()
    assert set(turns[:4]) == {"http://slow/0", "http://a/1", "http://b/1", "broken"}
    assert turns[4:] == ["http://slow/1", "http://slow/2"]


def test_a_hostile_header_does_not_hold_up_the_others():
    body = bytearray(b"GIF89a" + bytes(7) + b"!\xfe\0" * 700_000)  # Pillow joins comments
    start = time.perf_counter()
    fetch._refuse_by_header(body, 10**6)
    assert time.perf_counter() - start < 0.5
