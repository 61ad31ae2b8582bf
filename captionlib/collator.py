"""Make a batch: uint8 pictures, and rows of tokens with the labels that go with them.

The rows differ by mode: "packed" puts all captions of an image into one row (the encoder runs once
an image), "sampled" takes one caption a visit, "separate" makes one row a caption. Used by
train_encoder_decoder and the trainer.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerBase

from captionlib.errors import InputError
from captionlib.images import open_image
from captionlib.tokenization import encode

IGNORE = -100  # positions with this label are not part of the loss
MODES = ("packed", "sampled", "separate")
AUGMENTS = ("none", "crop", "crop+flip")
SMALLEST_CROP = 0.6  # of the picture's area: more would cut away what captions tell of


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
        self.exact = (size.get("width"), size.get("height"))  # pictures that need no geometry
        self.exact = None if config.get("do_center_crop") else self.exact

    def __call__(self, image) -> torch.Tensor:
        if image.size == self.exact:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
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
        images = torch.stack([self.transform(self._open(row["image"])) for row in rows])
        if self.captions == "packed":
            return {"pixel_values": images, **self._packed(pieces)}
        repeats = torch.tensor([len(row) for row in pieces])
        flat = [[piece] for row in pieces for piece in row]
        return {"pixel_values": images.repeat_interleave(repeats, 0), **self._plain(flat)}

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

    def _encode(self, chosen: list[list[tuple[str, str]]]) -> list[list[tuple[list, list]]]:
        """(decoder_input_ids, labels) of every caption, as lists."""
        flat = [pair for pairs in chosen for pair in pairs]
        prompts = encode(self.tokenizer, [prompt for prompt, _ in flat])
        captions = encode(self.tokenizer, [caption for _, caption in flat])
        eos = self.tokenizer.eos_token_id
        pieces = iter(
            (
                [self.start_id, *prompt, *caption[: self.max_length]],
                [IGNORE] * len(prompt) + [*caption[: self.max_length], eos],
            )
            for prompt, caption in zip(prompts, captions, strict=True)
        )
        return [[next(pieces) for _ in pairs] for pairs in chosen]

    def _rows(self, pieces: list[list[tuple[list, list]]]) -> tuple[np.ndarray, ...]:
        """Ids, labels, positions and piece numbers, int64 [B, L]; piece -1 is padding."""
        length = max(sum(len(ids) for ids, _ in row) for row in pieces)
        shape = (len(pieces), length)
        ids, labels = np.full(shape, self.tokenizer.pad_token_id), np.full(shape, IGNORE)
        positions, piece_of = np.zeros(shape, np.int64), np.full(shape, -1)
        for b, row in enumerate(pieces):
            start = 0
            for number, (row_ids, row_labels) in enumerate(row):
                here = slice(start, start + len(row_ids))
                ids[b, here], labels[b, here] = row_ids, row_labels
                positions[b, here], piece_of[b, here] = range(len(row_ids)), number
                start = here.stop
        return ids, labels, positions, piece_of

    def _packed(self, pieces) -> dict[str, torch.Tensor]:
        ids, labels, positions, piece_of = map(torch.from_numpy, self._rows(pieces))
        same = piece_of[:, :, None] == piece_of[:, None, :]  # [B, L, L]
        seen = same & torch.ones(same.shape[1:], dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
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
