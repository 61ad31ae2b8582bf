"""Opening any picture as upright RGB, and a verdict with a reason for every file."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from captionlib import ImageError, check_images, open_image
from captionlib.images import list_images


def as_bytes(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


RED = Image.new("RGB", (40, 30), (200, 20, 20))


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


@pytest.mark.parametrize("error", [NotImplementedError, KeyError, OverflowError, MemoryError])
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
    RED.save(tmp_path / "good.png")
    RED.save(tmp_path / "same.bmp")
    Image.new("RGB", (40, 8)).save(tmp_path / "thin.png")
    (tmp_path / "page.jpg").write_text("<html></html>")
    names = ["good.png", "same.bmp", "thin.png", "page.jpg", "missing.png"]
    table = check_images([tmp_path / name for name in names]).set_index("path")
    by_name = {name: table.loc[str(tmp_path / name)] for name in names}
    assert [bool(by_name[name].ok) for name in names] == [True, True, False, False, False]
    assert by_name["thin.png"].reason.startswith("too small")
    assert by_name["page.jpg"].reason == "not an image: a web page"
    assert by_name["missing.png"].reason == "no such file"
    assert by_name["good.png"].sha256 == by_name["same.bmp"].sha256  # of the pixels


def test_a_check_goes_on_where_it_was_and_sees_changes(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        RED.save(path)
    first = check_images(paths, tmp_path / "checks")
    monkeypatch.setattr("captionlib.images.check_image", lambda *a, **k: pytest.fail("again"))
    assert check_images(paths, tmp_path / "checks").equals(first)
    monkeypatch.undo()
    paths[1].write_bytes(b"broken now")
    assert list(check_images(paths, tmp_path / "checks").ok) == [True, False, True]
    assert len(list((tmp_path / "checks").glob("*.parquet"))) == 1  # the stale shard is gone


def test_list_images_knows_images_by_their_suffix(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.JPG", "in/a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["b.JPG", "in/a.png"]
