"""Make a batch: uint8 pictures, and rows of tokens with the labels that go with them.

The rows differ by mode: "packed" puts all captions of an image into one row (the encoder runs once
an image), "sampled" takes one caption a visit, "separate" makes one row a caption. Used by
train_encoder_decoder and the trainer.
"""

import io
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerBase

from captionlib.errors import InputError
from captionlib.images import open_image
from captionlib.tokenization import encode

try:  # the extra `fast`: the same pixels as Pillow's, sooner
    import simplejpeg
except ImportError:
    simplejpeg = None

IGNORE = -100  # positions with this label are not part of the loss
MODES = ("packed", "sampled", "separate")
AUGMENTS = ("none", "crop", "crop+flip")
SMALLEST_CROP = 0.6  # of the picture's area: more would cut away what captions tell of
# A JPEG without EXIF, profile or comment, as we store them: bytes 0-10 and 20-21.
PLAIN_JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0\xff\xdb"


class PixelTransform:
    """The image processor in two steps: geometry in a worker (uint8), arithmetic on the device.

    `transform(image)` is uint8 [3, H, W], what the processor makes before rescaling;
    `transform.normalise(batch)` is float [B, 3, H, W], what the processor returns.
    """

    def __init__(self, image_processor):
        self.processor = image_processor
        config = image_processor.to_dict()
        scale = config["rescale_factor"] if config.get("do_rescale", True) else 1.0
        plain = not config.get("do_normalize", True)
        mean, std = ([0.0] * 3, [1.0] * 3) if plain else (config["image_mean"], config["image_std"])
        self.mean = torch.tensor(mean).view(3, 1, 1) / scale  # in steps of 0-255
        self.std = torch.tensor(std).view(3, 1, 1) / scale
        size = dict(config.get("size") or {})
        fixed = "width" in size and not config.get("do_center_crop")
        self.exact = (size["width"], size["height"]) if fixed else None  # (needs no geometry)

    def __call__(self, image) -> torch.Tensor:
        if image.size == self.exact:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a view of [H, W, 3]
        batch = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        return batch.pixel_values[0].clamp(0, 255).round().to(torch.uint8)

    def normalise(self, pixels: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
        """uint8 [B, 3, H, W] to about -1..1, on the device where the pixels are."""
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return ((pixels.float() - mean) / std).to(dtype)


@dataclass
class CaptionCollator:
    """Dataset rows (image, captions[, prompts]) to a batch for VisionEncoderDecoderModel.

    With start 1, prompt 4, EOS 2 and the caption tokens a b, a row of one caption is

        decoder_input_ids   1     4    a    b
        labels           -100     a    b    2

    The prompt follows the start token and has label -100; EOS is added after truncation to
    `max_length` tokens of caption; padding (as long as the longest row) is -100 by its length. A
    packed row is such pieces one after the other, with `decoder_position_ids` restarting at 0 and
    a `decoder_attention_mask` [B, 1, L, L] (0 or the least float) that keeps each to itself.

    captions_per_image: how many of an image's captions a packed or separate visit takes, drawn at
    random; None takes all. augment: "crop" (a random part of at least 0.6 of the area), "crop+flip"
    (and mirrored half the time: not where captions say left or right). Without
    loader workers, what is drawn depends on `seed` and the number of the batch alone, so that a
    resumed training draws the same.

    Returns pixel_values uint8 [B, 3, H, W], decoder_input_ids and labels int64 [B, L], and for the
    modes that are not packed decoder_attention_mask int64 [B, L].
    """

    tokenizer: PreTrainedTokenizerBase
    transform: PixelTransform
    start_id: int
    captions: str = "packed"
    captions_per_image: int | None = None
    max_length: int = 64
    augment: str = "none"
    seed: int = 0
    visit: int = 0  # batches made before; the trainer sets it when it resumes
    rng: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self):
        if self.captions not in MODES:
            raise InputError(f"No caption mode {self.captions!r}: choose {', '.join(MODES)}.")
        if self.augment not in AUGMENTS:
            raise InputError(f"No augment {self.augment!r}: choose {', '.join(AUGMENTS)}.")
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(self.tokenizer, name) is None:
                raise InputError(f"The tokenizer has no {name}: glue() sets one.")

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        process = worker.seed % 2**32 if worker else 0  # a worker's differs in every epoch
        self.rng = np.random.default_rng([self.seed, self.visit, process])
        self.visit += 1
        chosen = [self._choose(row) for row in rows]
        pieces = self._encode(chosen)
        images = self._images([row["image"] for row in rows])
        if self.captions == "packed":
            return {"pixel_values": images, **self._packed(pieces)}
        repeats = torch.tensor([len(row) for row in pieces])
        flat = [[piece] for row in pieces for piece in row]
        return {"pixel_values": images.repeat_interleave(repeats, 0), **self._plain(flat)}

    def _images(self, images: list) -> torch.Tensor:
        """uint8 [B, 3, H, W]; where the size is known, a view of [B, H, W, 3] as decoded."""
        size = self.transform.exact
        if not size:
            return torch.stack([self.transform(self._open(image)) for image in images])
        batch = np.empty((len(images), size[1], size[0], 3), np.uint8)
        for place, image in zip(batch, images, strict=True):
            if self.augment != "none" or not _decode_stored(image, place):
                place[:] = self.transform(self._open(image)).permute(1, 2, 0).numpy()
        return torch.from_numpy(batch).permute(0, 3, 1, 2)

    def _open(self, image) -> Image.Image:
        """Undecoded rows of `datasets` hold {"bytes": ..., "path": None}."""
        image = open_image(image["bytes"] if isinstance(image, dict) else image)
        if self.augment == "none":
            return image
        area, ratio = self.rng.uniform(SMALLEST_CROP, 1), self.rng.uniform(0.8, 1.25)
        width = min(image.width, round(image.width * (area * ratio) ** 0.5))
        height = min(image.height, round(image.height * (area / ratio) ** 0.5))
        left = self.rng.integers(image.width - width + 1)
        top = self.rng.integers(image.height - height + 1)
        image = image.crop((left, top, left + width, top + height))
        if self.augment == "crop+flip" and self.rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return image

    def _choose(self, row: dict) -> list[tuple[str, str]]:
        """(prompt, caption) pairs of this visit."""
        prompts = row.get("prompts") or [""] * len(row["captions"])
        pairs = list(zip(prompts, row["captions"], strict=True))
        wanted = 1 if self.captions == "sampled" else self.captions_per_image or len(pairs)
        if wanted >= len(pairs):
            return pairs
        return [pairs[i] for i in self.rng.choice(len(pairs), wanted, replace=False)]

    def _encode(self, chosen: list[list[tuple[str, str]]]) -> list[list[tuple[list, int]]]:
        """decoder_input_ids of every caption, as a list, and how many of them are its prompt."""
        flat = [pair for pairs in chosen for pair in pairs]
        distinct = list(dict(flat))  # prompts
        prompts = dict(zip(distinct, encode(self.tokenizer, distinct), strict=True))
        captions = iter(encode(self.tokenizer, [caption for _, caption in flat]))
        start, end = self.start_id, self.max_length
        return [
            [([start, *prompts[p], *next(captions)[:end]], len(prompts[p])) for p, _ in pairs]
            for pairs in chosen
        ]

    def _rows(self, pieces: list[list[tuple[list, int]]]) -> tuple[np.ndarray, ...]:
        """Ids, labels, positions and piece numbers, int64 [B, L]; piece -1 is padding."""
        flat = [piece for row in pieces for piece in row]
        lengths = np.array([len(ids) for ids, _ in flat])
        ends = lengths.cumsum()
        ids = np.fromiter(chain.from_iterable(ids for ids, _ in flat), np.int64, ends[-1])
        positions = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
        labels = np.roll(ids, -1)  # each position learns the next id
        labels[ends - 1] = self.tokenizer.eos_token_id
        labels[positions < np.repeat([prompt for _, prompt in flat], lengths)] = IGNORE
        numbers = np.repeat([number for row in pieces for number in range(len(row))], lengths)
        totals = np.array([sum(len(ids) for ids, _ in row) for row in pieces])
        filled = np.arange(totals.max()) < totals[:, None]  # [B, L]

        def padded(values, padding):
            array = np.full(filled.shape, padding)
            array[filled] = values
            return array

        pad = self.tokenizer.pad_token_id
        paddings = ((ids, pad), (labels, IGNORE), (positions, 0), (numbers, -1))
        return tuple(padded(values, padding) for values, padding in paddings)

    def _packed(self, pieces) -> dict[str, torch.Tensor]:
        ids, labels, positions, piece_of = map(torch.from_numpy, self._rows(pieces))
        seen = piece_of[:, :, None] == piece_of[:, None, :]  # [B, L, L]
        seen &= torch.ones(seen.shape[1:], dtype=torch.bool).tril()
        mask = torch.full(seen.shape, torch.finfo(torch.float32).min).masked_fill_(seen, 0)
        return {
            "decoder_input_ids": ids,
            "labels": labels,
            "decoder_position_ids": positions,
            "decoder_attention_mask": mask[:, None],
        }

    def _plain(self, pieces) -> dict[str, torch.Tensor]:
        ids, labels, _, piece_of = map(torch.from_numpy, self._rows(pieces))
        return {
            "decoder_input_ids": ids,
            "labels": labels,
            "decoder_attention_mask": (piece_of >= 0).long(),
        }


def _decode_stored(image, place: np.ndarray) -> bool:
    """Write a plain RGB JPEG of the size of `place` [H, W, 3] there, as we store them; else False.

    The same pixels as `open_image`, without its care for pictures of every other kind.
    """
    data = image.get("bytes") if isinstance(image, dict) else None
    if not data or data[:11] + data[20:22] != PLAIN_JPEG:
        return False
    with suppress(OSError, ValueError, Image.DecompressionBombError):  # open_image says how
        if simplejpeg:
            fits = simplejpeg.decode_jpeg_header(data)[:2] == place.shape[:2]
            return fits and simplejpeg.decode_jpeg(data, buffer=place) is not None
        picture = Image.open(io.BytesIO(data))
        if picture.mode == "RGB" and picture.size == place.shape[1::-1]:
            place[:] = picture
            return True
    return False
