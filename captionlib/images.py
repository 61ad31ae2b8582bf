"""Open any picture as upright RGB, and give every file of a folder a verdict with its reason.

Knows nothing of captions or models. Used by processdata_02, by the captioner (which opens paths,
bytes, URLs and PIL images through `open_image`) and by the dataset builder.
"""

import functools
import hashlib
import io
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from captionlib.errors import InputError
from captionlib.shards import Job, only_one, run_shards

MAX_PIXELS = 50_000_000  # 150 MB as RGB; Pillow itself only warns, at 89 million
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
CHECKS = pa.schema(
    {
        "path": pa.string(),
        "ok": pa.bool_(),
        "reason": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "format": pa.string(),
        "mode": pa.string(),
        "sha256": pa.string(),
        "phash": pa.string(),
    }
)


class ImageError(InputError):
    """A picture that cannot be used; `str(error)` is the reason, in a few words."""


def open_image(source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as RGB, 8 bit, upright (EXIF orientation applied), its first frame.

    source: a path, bytes, an http(s) URL, or a PIL image. Raises ImageError with the reason:
    "no such file", "empty file", "not an image", "truncated or broken", "too many pixels".
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source.copy())
    data = source if isinstance(source, bytes) else _read(source)
    if not data:
        raise ImageError("empty file")
    if data.startswith(POSTSCRIPT):
        raise ImageError("a PostScript program, which is not run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what the verdict says
        try:
            image = Image.open(io.BytesIO(data))
            kind = {"format": image.format, "mode": image.mode}
            _limit_pixels(image, max_pixels)
            rgb = _to_rgb(image)
        except UnidentifiedImageError:
            raise ImageError(f"not an image{_looks_like(data)}") from None
        except Image.DecompressionBombError as error:
            raise ImageError(f"too many pixels: {error}") from None
        except MemoryError:
            raise ImageError("needs too much memory") from None
        except ImageError:
            raise
        except Exception as error:  # noqa: BLE001 - Pillow's readers raise anything on broken files
            raise ImageError(f"truncated or broken: {error}") from None
    rgb.info = kind
    return rgb


def _read(source) -> bytes:
    if str(source).startswith(("http://", "https://")):
        from captionlib.fetch import fetch_bytes  # only here: a URL is the rare case

        return fetch_bytes(str(source))
    try:
        if Path(source).exists() and not Path(source).is_file():
            raise ImageError("not a file")  # to read a pipe or a device might never end
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
    image.load()
    profile = image.info.get("icc_profile")
    with suppress(Exception):  # EXIF that is garbage says nothing of the picture
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("RGBA", "P"):
        image = image.convert("RGB")
    to_srgb = _srgb_transform(profile, image.mode) if profile or image.mode == "LAB" else None
    if to_srgb:
        return to_srgb.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=32)
def _srgb_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a picture's ICC profile (LAB without one: D50) to sRGB; None where nothing is to do."""
    try:
        source = ImageCms.ImageCmsProfile(
            io.BytesIO(profile) if profile else ImageCms.createProfile("LAB")
        )
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):  # broken, or of another mode: viewers ignore it, too
        return None


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Deep grey scaled to 0-255: by 1, 8 or 16 bit where it fits, else (12 bit) its range."""
    values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 255:
        low, high = 0, 1 if image.mode == "F" and high <= 1 else 255
    elif low >= 0 and 4096 <= high <= 65535:
        low, high = 0, 65535
    return Image.fromarray(((values - low) * (255 / (high - low or 1))).astype(np.uint8))


def _looks_like(data: bytes) -> str:
    head = data[:200].lstrip().lower()
    return ": a web page" if head.startswith((b"<!doctype", b"<html", b"<?xml")) else ""


def check_image(
    path,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 16,
    max_aspect: float = 6.0,
    min_contrast: int = 8,
) -> dict:
    """The verdict on one file as a row of `check_images`.

    min_side: pixels; smaller pictures are icons and tracking pixels. max_aspect: long side over
    short side; more is a banner. min_contrast: levels (0-255) between the darkest and the lightest
    value of some channel; less is a picture of one colour.
    """
    row = dict.fromkeys(CHECKS.names) | {"path": str(path), "ok": False, "reason": ""}
    try:
        image = open_image(path, max_pixels)
    except ImageError as error:
        return row | {"reason": str(error)}
    row |= {"width": image.width, "height": image.height, **image.info}
    row["sha256"] = hashlib.sha256(image.tobytes()).hexdigest()  # of the pixels, not of the file
    contrast = max(high - low for low, high in image.getextrema())
    if min(image.size) < min_side:
        row["reason"] = f"too small: a side under {min_side} px"
    elif max(image.size) > max_aspect * min(image.size):
        row["reason"] = f"too long: over {max_aspect:g} times as long as wide"
    elif contrast < min_contrast:
        row["reason"] = "a single colour"
    else:
        small = image.resize((64, 64), Image.Resampling.BOX, reducing_gap=2)  # the hash sees 32
        row |= {"ok": True, "phash": str(imagehash.phash(small))}
    return row


def check_images(paths: Iterable, out_dir=None, **options):
    """Decode every file; one row a file, as a pandas.DataFrame.

    Columns: path, ok, reason, width, height (pixels, upright), format, mode, sha256 (of the
    decoded pixels, so equal pictures in different files have the same), phash (perceptual hash of
    64 bits as 16 hexadecimal digits, Zauner 2010; of usable pictures). options: those of
    `write_checks` and the limits of `check_image`. With `out_dir`, finished shards of 1,000 files
    are kept there, and a check that was stopped goes on where it was.
    """
    with tempfile.TemporaryDirectory() as scratch:
        shards = write_checks(paths, out_dir or scratch, **options)
        return as_frame(pa.concat_tables([CHECKS.empty_table(), *map(pq.read_table, shards)]))


def as_frame(checks: pa.Table):
    """Verdicts as a pandas.DataFrame; sizes stay whole numbers where some are missing."""
    return checks.to_pandas().astype({"width": "Int64", "height": "Int64"})


def write_checks(
    paths: Iterable,
    out_dir,
    workers: int | None = None,
    timeout: float = 30.0,
    engine: str = "processes",
    total: int | None = None,
    **limits,
) -> list[Path]:
    """The same for any number of files: Parquet files in `out_dir`, with little memory.

    Each picture is decoded in a process that may die: a crash of a decoder, more than `timeout`
    seconds or 4 GB of memory is a verdict on that picture alone. Another `timeout` looks again.
    """
    if timeout <= 0:
        raise InputError(f"timeout of check must be above 0 seconds, not {timeout}.")
    job = Job(check_image, limits, key=_file_state, lost=_lost, schema=CHECKS, timeout=timeout)
    with only_one(out_dir, "check"):
        return run_shards(job, {"": map(str, paths)}, out_dir, total, workers, engine)


def _lost(path: str, reason: str) -> dict:
    row = dict.fromkeys(CHECKS.names)
    return row | {"path": path, "ok": False, "reason": f"the decoder {reason}"}


def _file_state(path: str) -> str:
    """Changes when the file does: a shard checked before it is then checked again."""
    try:
        state = Path(path).stat()
    except OSError:
        return f"{path} missing"
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def list_images(folder) -> list[str]:
    """The files of a folder that have an image's suffix, as names relative to it, sorted."""
    folder = Path(folder)
    Image.init()
    names = (p for p in folder.rglob("*") if p.suffix.lower() in Image.registered_extensions())
    return sorted(str(path.relative_to(folder)) for path in names if path.is_file())
