"""Open any picture as upright RGB, and give every file of a folder a verdict with its reason.

Knows nothing of captions or models. Used by processdata_02, by the captioner (which opens paths,
bytes, URLs and PIL images through `open_image`) and by the dataset builder.
"""

import hashlib
import io
import tempfile
import warnings
from pathlib import Path

import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

from captionlib.errors import InputError
from captionlib.shards import run_shards

MAX_PIXELS = 50_000_000  # 150 MB as RGB; Pillow itself only warns, at 89 million
MIN_SIDE = 16  # pixels; smaller ones are icons and tracking pixels
CHECK_COLUMNS = ["path", "ok", "reason", "width", "height", "format", "mode", "sha256"]


class ImageError(InputError):
    """A picture that cannot be used; `str(error)` is the reason, in a few words."""


def open_image(source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as RGB, 8 bit, upright (EXIF orientation applied), its first frame.

    source: a path, bytes, an http(s) URL, or a PIL image. Raises ImageError with the reason:
    "no such file", "empty file", "not an image", "truncated or broken", "too many pixels".
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    data = source if isinstance(source, bytes) else _read(source)
    if not data:
        raise ImageError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what the verdict says
        try:
            image = Image.open(io.BytesIO(data))
            _limit_pixels(image, max_pixels)
            rgb = _to_rgb(image)
        except UnidentifiedImageError:
            raise ImageError(f"not an image{_looks_like(data)}") from None
        except Image.DecompressionBombError as error:
            raise ImageError(f"too many pixels: {error}") from None
        except ImageError:
            raise
        except Exception as error:  # noqa: BLE001 - Pillow's readers raise anything on broken files
            raise ImageError(f"truncated or broken: {error}") from None
    rgb.info = {"format": image.format, "mode": image.mode}
    return rgb


def _read(source) -> bytes:
    if str(source).startswith(("http://", "https://")):
        from captionlib.download import fetch_bytes  # only here: a URL is the rare case

        return fetch_bytes(str(source))
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from None


def _limit_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise ImageError(f"too many pixels: {size}, more than {max_pixels / 1e6:.0f} million")


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Deep grey scaled to 0-255: by 16 bit where it fits, else by its own range."""
    image = image.convert("F")
    low, high = image.getextrema()
    if low >= 0 and 255 < high <= 65535:
        low, high = 0, 65535
    elif low >= 0 and high <= 255:
        low, high = 0, 255
    scale = 255 / (high - low) if high > low else 1
    return image.point(lambda value: value * scale - low * scale).convert("L")


def _looks_like(data: bytes) -> str:
    head = data[:200].lstrip().lower()
    return ": a web page" if head.startswith((b"<!doctype", b"<html", b"<?xml")) else ""


def check_image(path, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> dict:
    """The verdict on one file as a row of `check_images`."""
    row = dict.fromkeys(CHECK_COLUMNS) | {"path": str(path), "ok": False, "reason": ""}
    try:
        image = open_image(path, max_pixels)
    except ImageError as error:
        return row | {"reason": str(error)}
    row |= {"width": image.width, "height": image.height, **image.info}
    row["sha256"] = hashlib.sha256(image.tobytes()).hexdigest()  # of the pixels, not of the file
    if min(image.size) < min_side:
        return row | {"reason": f"too small: a side under {min_side} px"}
    return row | {"ok": True}


def check_images(paths, out_dir=None, workers: int | None = None, **limits) -> pd.DataFrame:
    """Decode every file; one row a file: path, ok, reason, width, height, format, mode, sha256.

    width and height are in pixels, upright; sha256 is of the decoded pixels, so equal pictures in
    different files have the same. `limits`: max_pixels, min_side. With `out_dir`, finished shards
    of 1,000 files are kept there, and a check that was stopped goes on where it was.
    """
    paths = [str(path) for path in paths]
    with tempfile.TemporaryDirectory() as scratch:
        shards = run_shards(
            _check_shard, paths, out_dir or scratch, key=_file_state, workers=workers, **limits
        )
        table = pd.concat([pd.DataFrame(columns=CHECK_COLUMNS), *map(pd.read_parquet, shards)])
    return table.reset_index(drop=True).astype({"ok": bool, "width": "Int64", "height": "Int64"})


def _file_state(path: str) -> str:
    """Changes when the file does: a shard checked before it is then checked again."""
    try:
        state = Path(path).stat()
    except OSError:
        return f"{path} missing"
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def _check_shard(paths: list[str], **limits) -> pd.DataFrame:
    return pd.DataFrame([check_image(path, **limits) for path in paths], columns=CHECK_COLUMNS)


def list_images(folder) -> list[str]:
    """The files of a folder that have an image's suffix, as names relative to it, sorted."""
    folder = Path(folder)
    Image.init()
    names = (p for p in folder.rglob("*") if p.suffix.lower() in Image.registered_extensions())
    return sorted(str(path.relative_to(folder)) for path in names if path.is_file())
