"""The captioner: model, image processor and tokenizer as one whole, and captions from images.

Loads and saves folders that stock transformers classes load too. Does not build models (glue.py)
nor train them (trainer.py). Used by train_encoder_decoder and infer_encoder_decoder.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers import VisionEncoderDecoderModel as VED
from transformers.utils import logging

from captionlib.collator import PixelTransform
from captionlib.errors import InputError
from captionlib.images import ImageError, open_image
from captionlib.shards import progress_bar
from captionlib.tokenization import decode, encode

# What transformers raises for a folder or name that is not there, not whole, or something else.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
)


@dataclass
class Caption:
    """One caption: `score` is the sum of the log-probabilities (natural log) of its tokens."""

    text: str
    score: float
    token_ids: list[int]
    token_logprobs: list[float]
    error: str = ""


@dataclass
class Explanation:
    """Where the decoder looked: `maps` float [words, H, W], each summing to 1."""

    words: list[str]
    maps: np.ndarray


def pick_device(name: str = "auto") -> str:
    """What there is for "auto", else the name itself. Raises InputError for a device not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if not there.get(name.split(":")[0]):
        raise InputError(f"No device {name!r} here: choose auto or one of {', '.join(there)}.")
    return name


@dataclass
class Captioner:
    """A trained (or new) whole. `captioner.caption(["photo.jpg"])` is what it is for."""

    model: VED
    image_processor: object
    tokenizer: PreTrainedTokenizerBase
    transform: PixelTransform = field(init=False, repr=False)

    def __post_init__(self):
        self.transform = PixelTransform(self.image_processor)

    @classmethod
    def from_pretrained(cls, path, device: str = "auto") -> "Captioner":
        """A saved folder or a hub name. Raises InputError when there is none."""
        path = str(path)
        refuse_missing_folder("captioner", path)
        try:
            model = load_model(path)
            processor = AutoImageProcessor.from_pretrained(path, backend="pil")
            tokenizer = AutoTokenizer.from_pretrained(path)
        except LOAD_ERRORS as error:
            raise InputError(not_loaded("captioner", path, error)) from None
        return cls(model.to(pick_device(device)).eval(), processor, tokenizer)

    def save_pretrained(self, path) -> None:
        """Model (safetensors), image processor, tokenizer and generation_config in one folder."""
        for part in (self.model, self.image_processor, self.tokenizer):
            part.save_pretrained(path)

    def push_to_hub(self, name: str, **arguments) -> None:
        """The same three to a repository of the Hugging Face hub."""
        for part in (self.model, self.image_processor, self.tokenizer):
            part.push_to_hub(name, **arguments)

    def caption(
        self,
        images,
        on_error: str = "raise",
        prompt: str | None = None,
        batch_size: int = 32,
        **arguments,
    ) -> list:
        """One text an image, or a list of texts when num_return_sequences is above 1.

        images: paths, bytes, URLs or PIL images. on_error: "raise" an ImageError for an unreadable
        one, or put None in its place ("none"). prompt: text the caption continues and does not
        repeat. arguments: of transformers' `generate` (num_beams, do_sample, max_new_tokens, ...).
        """
        found = self.caption_full(images, on_error, prompt, batch_size, **arguments)
        texts = [[None if c.error else c.text for c in captions] for captions in found]
        several = arguments.get("num_return_sequences", 1) > 1
        return texts if several else [first for first, *_ in texts]

    def caption_full(
        self,
        images,
        on_error: str = "raise",
        prompt: str | None = None,
        batch_size: int = 32,
        **arguments,
    ) -> list[list[Caption]]:
        """The same with token ids, log-probabilities and errors: a list of captions an image."""
        if on_error not in ("raise", "none"):
            raise InputError(f"No on_error {on_error!r}: choose raise or none.")
        if isinstance(images, str | bytes | Path | Image.Image):
            raise InputError("caption takes a list of images: put the one in brackets.")
        images = list(images)
        found: list[list[Caption]] = []
        bar = progress_bar(len(images), "caption")
        for start in range(0, len(images), batch_size):
            batch = [self._open(image, on_error) for image in images[start : start + batch_size]]
            good = [pixels for pixels in batch if not isinstance(pixels, ImageError)]
            captions = iter(self._generate(torch.stack(good), prompt, arguments) if good else [])
            found += [
                [Caption("", 0.0, [], [], str(pixels))]
                if isinstance(pixels, ImageError)
                else next(captions)
                for pixels in batch
            ]
            bar.update(len(batch))
        bar.close()
        return found

    def _open(self, image, on_error: str):
        try:
            return self.transform(open_image(image))
        except ImageError as error:
            if on_error == "none":
                return error
            name = image if isinstance(image, str | Path) else "An image"
            raise ImageError(f"{name}: {error}") from None

    def start_ids(self, prompt: str | None) -> list[int]:
        """The decoder's start token and the prompt's tokens."""
        start = self.model.generation_config.decoder_start_token_id
        return [start, *(encode(self.tokenizer, [prompt])[0] if prompt else [])]

    @torch.inference_mode()
    def _generate(self, pixels: torch.Tensor, prompt, arguments: dict) -> list[list[Caption]]:
        if "max_length" in arguments:  # which glue's default for new tokens would win over
            arguments = {"max_new_tokens": None} | arguments
        device, dtype, training = self.model.device, self.model.dtype, self.model.training
        self.model.eval()  # called in the middle of training, too
        start = torch.tensor([self.start_ids(prompt)] * len(pixels), device=device)
        output = self.model.generate(
            self.transform.normalise(pixels.to(device), dtype),
            decoder_input_ids=start,
            decoder_attention_mask=torch.ones_like(start),
            return_dict_in_generate=True,
            output_scores=True,
            **arguments,
        )
        self.model.train(training)
        logprobs = self.model.compute_transition_scores(
            output.sequences, output.scores, getattr(output, "beam_indices", None), True
        )
        each = arguments.get("num_return_sequences", 1)
        flat = [
            self._caption_of(ids, steps)
            for ids, steps in zip(output.sequences[:, start.shape[1] :], logprobs, strict=True)
        ]
        return [flat[i : i + each] for i in range(0, len(flat), each)]

    def _caption_of(self, ids: torch.Tensor, logprobs: torch.Tensor) -> Caption:
        ids, logprobs = ids.tolist(), logprobs.tolist()
        eos = self.model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        end = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        text = decode(self.tokenizer, ids[:end])
        return Caption(text, sum(logprobs[:end]), ids[:end], logprobs[:end])

    @torch.inference_mode()
    def explain(self, image, prompt: str | None = None, **arguments) -> Explanation:
        """Generate a caption and show where each token's cross-attention lay, averaged over heads.

        The map is of the last decoder layer, over the encoder's grid of positions; it shows where
        the decoder looked, which is not proof of why it chose the word.
        """
        pixels = self.transform(open_image(image))[None]
        caption = self._generate(pixels, prompt, arguments)[0][0]
        ids = torch.tensor(
            [[*self.start_ids(prompt), *caption.token_ids]], device=self.model.device
        )
        was = self.model.decoder.config._attn_implementation
        self.model.decoder.set_attn_implementation("eager")  # sdpa returns no attentions
        try:
            output = self.model(
                self.transform.normalise(pixels.to(self.model.device), self.model.dtype),
                decoder_input_ids=ids,
                output_attentions=True,
            )
        finally:
            self.model.decoder.set_attn_implementation(was)
        attention = output.cross_attentions[-1][0].mean(0)  # [L, P]
        first = ids.shape[1] - len(caption.token_ids) - 1  # the position that predicts token 0
        maps = _on_grid(attention[first:-1].float().cpu().numpy())
        words = [decode(self.tokenizer, [token]) for token in caption.token_ids]
        keep = [i for i, word in enumerate(words) if word]
        return Explanation([words[i] for i in keep], maps[keep])


def _on_grid(attention: np.ndarray) -> np.ndarray:
    """[words, P] to [words, H, W]: leading positions that are no place ([CLS]) are left out."""
    side = int(attention.shape[1] ** 0.5)
    places = attention[:, attention.shape[1] - side * side :].reshape(-1, side, side)
    return places / places.sum((1, 2), keepdims=True)


def load_model(path) -> VED:
    """VED.from_pretrained without its noise, but with a check: no tensor may be left random.

    The pooler is left out: captions do not use it, and without a gradient it upsets DDP.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = VED.from_pretrained(path, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    missing = [key for key in report["missing_keys"] if ".pooler." not in key]
    if missing:
        raise ValueError(f"it has no weights for {len(missing)} tensors ({missing[0]}, ...)")
    if getattr(model.encoder, "pooler", None) is not None:
        model.encoder.pooler = None
    return model


def last_checkpoint(run_dir) -> str | None:
    """The newest whole checkpoint: its trainer_state.json is the last file that Trainer writes."""
    whole = [path.parent for path in Path(run_dir).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def refuse_missing_folder(what: str, name: str) -> None:
    """InputError for a name that can only be a folder, and is none: no hub is asked for it."""
    path = Path(name)
    beside = path.parent != Path() and path.parent.is_dir()
    no_hub_name = path.is_absolute() or name[:1] in ".~" or len(path.parts) > 2 or "\\" in name
    if (beside or no_hub_name) and not path.exists():
        raise InputError(f"No {what} {name!r}: there is no such folder.")


def not_loaded(what: str, path: str, error: Exception) -> str:
    """One line for a model that does not load: what was asked, what to do, why."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(path).exists():
        return f"The folder {path} holds no {what} that can be loaded: {reason}"
    return (
        f"No {what} {path!r}: there is no such folder, and no model of that name could be had from "
        f"the Hugging Face hub ({reason})"
    )
