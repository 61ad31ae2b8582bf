"""Glue a vision encoder to a text decoder: load or make the two halves, join them, prove the joint.

Takes hub names, folders, or configurations (random weights). Handles encoders that return a
sequence [B, P, D] (ViT, DeiT, BEiT, Swin, DINOv2, DPT with a convolutional stem) and decoders with
cross-attention of their own (GPT-2, BERT, RoBERTa); anything else is refused in one line. Used by
train_encoder_decoder.
"""

import copy
import math
from functools import partial

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTImageProcessorPil,
)
from transformers import VisionEncoderDecoderModel as VED

from captionlib.errors import InputError
from captionlib.generation import LOAD_ERRORS, Captioner, not_loaded, refuse_missing_folder
from captionlib.tokenization import load_tokenizer

ODD = "\U0001f996\u9f98"  # a dinosaur and a rare character: unknown to nearly every vocabulary
Half = str | dict | PreTrainedConfig  # a hub name or folder, or a configuration: random weights


def glue(
    encoder: Half,
    decoder: Half,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor=None,
    seed: int = 0,
) -> Captioner:
    """A captioner from two halves, ready to train; its cross-attention is new unless loaded.

    encoder, decoder: names or folders of checkpoints, or configurations ({"model_type": "vit",
    ...}). A decoder from a configuration needs the tokenizer, an encoder from one gets a ViT image
    processor of its image_size. Start, pad and EOS ids are set in config and generation_config.
    Raises InputError for a half that cannot be loaded or cannot work.
    """
    torch.manual_seed(seed)
    if tokenizer is None:
        tokenizer = _load(load_tokenizer, "tokenizer", decoder)
    ids = special_ids(tokenizer)
    encoder_half = _load_encoder(encoder)
    decoder_half = _load_decoder(decoder, tokenizer, ids)
    if image_processor is None:
        image_processor = _image_processor(encoder, encoder_half.config)
    model = _join(encoder_half, decoder_half)
    for config in (model.config, model.generation_config):
        for name, value in ids.items():
            setattr(config, name, value)
    model.config.vocab_size = model.decoder.config.vocab_size
    model.generation_config.max_new_tokens = 32
    _prove(model, image_processor)
    return Captioner(model.eval(), image_processor, tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """decoder_start, bos, eos and pad ids; BERT-like tokenizers start with [CLS], end with [SEP].

    A tokenizer without a pad token (GPT-2) pads with EOS: harmless here, where the labels of
    padding are ignored by length.
    """
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    if eos is None:
        raise InputError("The tokenizer has neither an EOS nor a SEP token: captions never end.")
    if eos in tokenizer(ODD, add_special_tokens=False)["input_ids"] and eos != start:
        raise InputError(
            f"The tokenizer gives unknown characters the id of EOS ({eos}): each would end a "
            "caption. Rebuild it with an unknown token of its own."
        )
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    start = eos if start is None else start
    return {
        "decoder_start_token_id": start,
        "bos_token_id": start,
        "eos_token_id": eos,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _load(load, what: str, name, **arguments):
    if not isinstance(name, str):
        raise InputError(f"A half that is only a configuration has no {what}: give one.")
    refuse_missing_folder(what, name)
    try:
        return load(name, **arguments)
    except LOAD_ERRORS as error:
        raise InputError(not_loaded(what, name, error)) from None


def _config(half: Half) -> PreTrainedConfig:
    """A configuration of our own to change, whatever the half was named by."""
    if isinstance(half, PreTrainedConfig):
        return copy.deepcopy(half)
    if isinstance(half, str):
        return _load(AutoConfig.from_pretrained, "model", half)
    try:
        return AutoConfig.for_model(**half)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"The configuration {half} names no known model: {error}") from None


def _made(make, config: PreTrainedConfig) -> PreTrainedModel:
    """A half with random weights, or one line for a configuration that cannot be one."""
    try:
        return make(config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{config.model_type!r} cannot be this half: {reason}") from None


def _load_encoder(half: Half) -> PreTrainedModel:
    config = _config(half)
    if not isinstance(getattr(config, "hidden_size", None), int) or config.is_encoder_decoder:
        raise InputError(
            f"The encoder {config.model_type!r} does not return a sequence [B, P, D]; "
            "ViT, DeiT, BEiT, Swin, DINOv2, CLIP's vision model and DPT (hybrid) do."
        )
    if isinstance(half, str):
        return _load(partial(_without_pooler, AutoModel.from_pretrained), "encoder", half)
    encoder = _made(partial(_without_pooler, AutoModel.from_config), config)
    _place_positions(encoder)
    return encoder


def _without_pooler(load, source) -> PreTrainedModel:
    """The pooler would get no gradient: an unused parameter, which DDP refuses."""
    try:
        return load(source, add_pooling_layer=False)
    except TypeError:  # the class has no such argument, and no pooler
        return load(source)


@torch.no_grad()
def _place_positions(encoder: PreTrainedModel) -> None:
    """Start learnt positions from 2D sines and cosines: from noise, places are learnt late.

    As in Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k". Encoders without a
    square grid of position embeddings [1, 1 + side * side, D] stay as they are.
    """
    positions = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if positions is None:
        return
    side, width = math.isqrt(positions.shape[1] - 1), positions.shape[2]
    if side * side + 1 != positions.shape[1] or width % 4:
        return
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4)
    y, x = (place.flatten() for place in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    angles = [place[:, None] * frequencies for place in (x, y)]  # [side * side, D / 4]
    waves = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
    positions[0, 1:] = waves


def _load_decoder(
    half: Half, tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]
) -> PreTrainedModel:
    config = _config(half)
    # As attributes: transformers 5 drops them as arguments for GPT-2 and others.
    config.is_decoder = config.add_cross_attention = True
    if isinstance(half, str):
        decoder = _load(AutoModelForCausalLM.from_pretrained, "decoder", half, config=config)
    else:
        config.update({"vocab_size": len(tokenizer)} | ids)
        decoder = _made(AutoModelForCausalLM.from_config, config)
    if not any("crossattention" in n.lower() for n, _ in decoder.named_parameters()):
        raise InputError(
            f"The decoder {config.model_type!r} has no cross-attention: it would never see the "
            "image. GPT-2, BERT and RoBERTa have."
        )
    if len(tokenizer) > decoder.config.vocab_size:
        decoder.resize_token_embeddings(len(tokenizer))
    return decoder


def _image_processor(encoder: Half, config: PreTrainedConfig):
    if isinstance(encoder, str):
        return _load(AutoImageProcessor.from_pretrained, "image processor", encoder, backend="pil")
    side = config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return ViTImageProcessorPil(size={"height": height, "width": width})


def _join(encoder: PreTrainedModel, decoder: PreTrainedModel) -> VED:
    """VED copies the halves' configs while their layers keep the old ones: point them to the copy.

    Without that, `set_attn_implementation` does not reach the layers.
    """
    before = encoder.config, decoder.config
    model = VED(encoder=encoder, decoder=decoder)
    for half, old in zip((model.encoder, model.decoder), before, strict=True):
        for module in half.modules():
            if getattr(module, "config", None) is old:
                module.config = half.config
    return model


@torch.no_grad()
def _prove(model: VED, image_processor) -> None:
    """Two pictures must give different logits; a later token must not change an earlier logit."""
    was_training = model.training
    model.eval()
    size = image_processor.size
    height = size.get("height") or size["shortest_edge"]
    crop = getattr(image_processor, "crop_size", None) or {}
    height, width = crop.get("height", height), crop.get("width", size.get("width") or height)
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    start = model.config.decoder_start_token_id
    ids = torch.tensor([[start, start], [start, start]])
    other = ids.clone()
    other[:, 1] = (start + 1) % model.config.vocab_size
    logits = model(pixel_values=pixels, decoder_input_ids=ids).logits
    if torch.equal(logits[0], logits[1]):
        raise InputError("The decoder does not see the image: two pictures give equal logits.")
    after = model(pixel_values=pixels, decoder_input_ids=other).logits
    if not torch.allclose(logits[:, 0], after[:, 0], atol=1e-4):
        raise InputError("The decoder sees later tokens: its causal mask is missing.")
    model.train(was_training)
