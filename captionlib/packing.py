"""Shrink pictures once and pack them into a shard of the dataset.

Short side to `stored_size`, never enlarged, as JPEG bytes. Runs in the worker processes of the
dataset builder, which start sooner without what the rest of it imports.
"""

import io
import json

import pyarrow as pa
from PIL import Image

from captionlib.errors import InputError
from captionlib.images import ImageError, open_image

TEXT = {"dtype": "string", "_type": "Value"}
TEXTS = {"feature": TEXT, "_type": "List"}
FEATURES = {  # as `datasets` writes them into a Parquet file, which needs not be imported here
    "filename": TEXT,
    "image": {"_type": "Image"},
    "captions": TEXTS,
    "prompts": TEXTS,
    "langs": TEXTS,
}
SCHEMA = pa.schema(
    {
        "filename": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "captions": pa.list_(pa.string()),
        "prompts": pa.list_(pa.string()),
        "langs": pa.list_(pa.string()),
    },
    {"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def pack(items: list[dict], stored_size: int, squash: bool, quality: int):
    """One shard of the dataset, a pyarrow.Table: decode, shrink, encode again.

    items: dicts with path, filename, captions, prompts, langs. Raises InputError for a picture
    that is gone or broken since it was checked.
    """
    for item in items:
        try:
            image = open_image(item["path"])
        except ImageError as error:  # it was readable when it was checked
            raise InputError(f"{item['path']}: {error}. Run captionlib check again.") from None
        data = encode_jpeg(shrink(image, stored_size, squash), quality)
        item["image"] = {"bytes": data, "path": None}
    return pa.Table.from_pylist(items, SCHEMA)


def shrink(image: Image.Image, stored_size: int, squash: bool = False) -> Image.Image:
    """Short side to `stored_size` pixels, in proportion; smaller pictures stay as they are.

    squash: both sides to `stored_size`, as ViT's image processor does before training.
    """
    short = min(image.size)
    if squash:
        size = (stored_size, stored_size)
    elif short <= stored_size:
        size = image.size
    else:
        size = tuple(max(1, round(side * stored_size / short)) for side in image.size)
    same = size == image.size
    return image if same else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """The picture as JPEG (quality 1-95)."""
    out = io.BytesIO()
    # Colours at full resolution below 128 px: there, halving them blurs what is to be learnt.
    image.save(out, "JPEG", quality=quality, subsampling=0 if min(image.size) < 128 else 2)
    return out.getvalue()
