"""Opening any picture as upright RGB, and a verdict with a reason for every file."""

import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from captionlib import ImageError, check_images, open_image
from captionlib.images import list_images
from captionlib.shards import MEMORY_LIMIT, Job, run_shards


def as_bytes(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


RED = Image.new("RGB", (40, 30), (200, 20, 20))
NOISE = Image.effect_noise((40, 30), 60).convert("RGB")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"]
)
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = (
        RED.convert("L").convert(mode) if mode in ("I;16", "I", "F", "LA") else RED.convert(mode)
    )
    path = tmp_path / "x.tif"
    image.save(path) if mode not in ("YCbCr",) else image.save(path := tmp_path / "x.jpg")
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (40, 30))
    red = opened.getpixel((5, 5))[0]
    if mode in ("RGB", "RGBA", "CMYK", "P", "YCbCr"):
        assert abs(red - 200) < 20
    elif mode in ("L", "LA", "I", "F", "I;16"):
        assert abs(red - RED.convert("L").getpixel((5, 5))) < 3


def test_transparent_is_laid_on_white_and_16_bit_keeps_its_brightness():
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert open_image(as_bytes(clear)).getpixel((5, 5)) == (255, 255, 255)
    deep = Image.fromarray(np.full((20, 20), 32768, np.uint16))
    assert abs(open_image(as_bytes(deep)).getpixel((5, 5))[0] - 127) <= 1


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert open_image(as_bytes(RED, "JPEG", exif=exif)).size == (30, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>gone</html>", "not an image: a web page"),
        (b"not a picture at all", "not an image"),
        (as_bytes(Image.effect_noise((64, 64), 50))[:-200], "truncated or broken"),
    ],
)
def test_bad_bytes_have_a_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        open_image(data)


@pytest.mark.parametrize("error", [NotImplementedError, KeyError, OverflowError])
def test_whatever_a_reader_raises_is_a_verdict(error, tmp_path, monkeypatch):
    RED.save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "open", lambda _: (_ for _ in ()).throw(error("odd")))
    with pytest.raises(ImageError, match="truncated or broken"):
        open_image(tmp_path / "x.png")


def test_a_bomb_is_refused_before_it_is_decoded():
    data = as_bytes(Image.new("1", (20_000, 10_000)))
    start = time.perf_counter()
    with pytest.raises(ImageError, match="too many pixels"):
        open_image(data)
    assert time.perf_counter() - start < 0.5


def test_check_images_gives_each_file_one_row_with_its_reason(tmp_path):
    NOISE.save(tmp_path / "good.png")
    NOISE.save(tmp_path / "same.bmp")
    NOISE.crop((0, 0, 40, 8)).save(tmp_path / "thin.png")
    NOISE.resize((400, 20)).save(tmp_path / "banner.png")
    RED.save(tmp_path / "red.png")
    (tmp_path / "page.jpg").write_text("<html></html>")
    (tmp_path / "print.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    (tmp_path / "folder.png").mkdir()
    expected = {
        "good.png": "",
        "same.bmp": "",
        "thin.png": "too small: a side under 16 px",
        "banner.png": "too long: over 6 times as long as wide",
        "red.png": "a single colour",
        "page.jpg": "not an image: a web page",
        "print.eps": "a PostScript program, which is not run",
        "folder.png": "not a file",
        "missing.png": "no such file",
    }
    table = check_images([tmp_path / name for name in expected])
    assert dict(zip(expected, table.reason, strict=True)) == expected
    assert list(table.ok) == [reason == "" for reason in expected.values()]
    table = table.set_index("path")
    good, same = (table.loc[str(tmp_path / name)] for name in ("good.png", "same.bmp"))
    assert good.sha256 == same.sha256  # of the pixels
    assert good.phash == same.phash


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes there")
def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a file"):
        open_image(tmp_path / "pipe.png")


@pytest.mark.skipif(sys.platform != "linux", reason="no memory limit there")
def test_a_file_that_kills_its_decoder_is_a_verdict_on_that_file_alone(tmp_path):
    items = ["a", "crash", "b", "hang", "memory", "c"]
    job = Job(
        misbehave, lost=lost, schema=pa.schema({"item": "string", "reason": "string"}), timeout=2
    )
    (file,) = run_shards(job, {"": items}, tmp_path, workers=2)
    found = {row["item"]: row["reason"] for row in pq.read_table(file).to_pylist()}
    assert list(found) == items
    assert found == dict.fromkeys("abc", "") | {
        "crash": "killed its process (SIGSEGV)",
        "hang": "took too long",
        "memory": "MemoryError",
    }


def misbehave(item):
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "hang":
        time.sleep(60)
    if item == "memory":
        try:
            bytearray(MEMORY_LIMIT + 1)
        except MemoryError:
            return {"item": item, "reason": "MemoryError"}
    return {"item": item, "reason": ""}


def lost(item, reason):
    return {"item": item, "reason": reason}


def test_colours_come_out_as_a_screen_would_show_them(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert open_image(as_bytes(RED, "PNG", icc_profile=profile)).getpixel((5, 5)) == (200, 20, 20)
    assert open_image(as_bytes(RED, "PNG", icc_profile=b"broken")).getpixel((5, 5)) == (200, 20, 20)
    swapped = swapped_profile()
    assert open_image(as_bytes(RED, "PNG", icc_profile=swapped)).getpixel((5, 5))[2] > 150
    lab = Image.merge("LAB", [Image.new("L", (8, 8), value) for value in (136, 208, 195)])
    lab.save(tmp_path / "lab.tif")
    red, green, blue = open_image(tmp_path / "lab.tif").getpixel((3, 3))
    assert red > 230 and green < 40 and blue < 40  # sRGB red is L 53, a 80, b 67
    cmyk = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    assert open_image(as_bytes(cmyk, "JPEG")).getpixel((5, 5))[0] > 200


def swapped_profile():
    """sRGB with the tags of red and blue exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    description = data.find("sRGB built-in".encode("utf-16-be"))
    data[description : description + 8] = "test".encode("utf-16-be")
    red, blue = data.find(b"rXYZ"), data.find(b"bXYZ")
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


def test_deep_grey_keeps_what_can_be_seen():
    twelve_bit = np.linspace(100, 600, 400, dtype=np.uint16).reshape(20, 20)
    low, high = open_image(as_bytes(Image.fromarray(twelve_bit))).convert("L").getextrema()
    assert (low, high) == (0, 255)


def test_floats_of_0_to_1_and_holes_in_them_are_seen(tmp_path):
    values = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    values[3, 3] = np.nan
    values[4, 4] = np.inf
    Image.fromarray(values).save(tmp_path / "float.tif")
    low, high = open_image(tmp_path / "float.tif").convert("L").getextrema()
    assert (low, high) == (0, 255)


def test_garbage_in_exif_says_nothing_of_the_picture():
    assert open_image(as_bytes(RED, exif=b"garbagegarbage")).getpixel((5, 5)) == (200, 20, 20)


def test_only_our_own_stale_shards_are_removed(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "mine.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "train-00000-of-00001.parquet")
    check_images([tmp_path / "a.png"], tmp_path, workers=1)
    check_images([tmp_path / "b.png"], tmp_path, workers=1)
    names = {path.name for path in tmp_path.glob("*.parquet")}
    assert names > {"mine.parquet", "train-00000-of-00001.parquet"}
    assert len(names) == 3


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((5, 5)) == (255, 0, 0)


def test_a_check_goes_on_where_it_was_and_sees_changes(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        NOISE.save(path)
    first = check_images(paths, tmp_path / "checks")
    (shard,) = (tmp_path / "checks").glob("*.parquet")
    made = shard.stat().st_mtime_ns
    assert check_images(paths, tmp_path / "checks").equals(first)
    assert shard.stat().st_mtime_ns == made
    paths[1].write_bytes(b"broken now")
    assert list(check_images(paths, tmp_path / "checks").ok) == [True, False, True]
    assert len(list((tmp_path / "checks").glob("*.parquet"))) == 1  # the stale shard is gone


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import captionlib\ncaptionlib.check_images(['a.png'], workers=1)")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert "InputError: The worker processes cannot start. A script" in run.stderr.splitlines()[-1]


def test_list_images_knows_images_by_their_suffix(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.JPG", "in/a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["b.JPG", "in/a.png"]
