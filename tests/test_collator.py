"""Batches: the labels, the packed row equal to its captions apart, padding without effect."""

import io

import numpy as np
import pytest
import torch
from conftest import TINY_GPT2, TINY_VIT
from PIL import Image
from transformers import RobertaConfig, ViTImageProcessorPil

from captionlib import CaptionCollator, collator, glue, scenes
from captionlib.collator import IGNORE, PixelTransform
from captionlib.errors import InputError
from captionlib.images import ImageError, open_image
from captionlib.packing import encode_jpeg
from captionlib.recipe import Recipe
from captionlib.steps import PACKING, new_collator
from captionlib.tokenization import encode

SCENES = [scenes.make_scene(number) for number in range(3)]
ROWS = [
    {
        "image": scenes.draw(scene),
        "captions": scenes.captions(scene, n)["en"][: n + 2],  # 2, 3 and 4 captions
        "prompts": ["<zh>"] * (n + 2),
    }
    for n, scene in enumerate(SCENES)
]


def collate(captioner, mode, rows=ROWS, **options):
    start = captioner.start_ids(None)[0]
    return CaptionCollator(captioner.tokenizer, captioner.transform, start, mode, **options)(rows)


def loss_of(captioner, batch):
    pixels = captioner.transform.normalise(batch["pixel_values"])
    with torch.no_grad():
        return captioner.model(**{**batch, "pixel_values": pixels}, use_cache=False).loss.item()


def test_a_row_is_start_prompt_caption_and_its_labels_are_shifted_by_one(captioner):
    batch = collate(captioner, "separate", ROWS[:1])
    tokenizer = captioner.tokenizer
    caption = tokenizer(ROWS[0]["captions"][0])["input_ids"]
    start, prompt = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<zh>")
    n = len(caption) + 2
    assert batch["decoder_input_ids"][0, :n].tolist() == [start, prompt, *caption]
    assert batch["labels"][0, :n].tolist() == [IGNORE, *caption, tokenizer.eos_token_id]
    assert (batch["labels"][0, n:] == IGNORE).all()


def test_packed_equals_separate(captioner):
    """One row of an image's captions has the loss of its captions in rows of their own."""
    packed, separate = collate(captioner, "packed"), collate(captioner, "separate")
    assert len(packed["labels"]) == 3
    assert len(separate["labels"]) == 9
    assert (packed["labels"] != IGNORE).sum() == (separate["labels"] != IGNORE).sum()
    assert loss_of(captioner, packed) == pytest.approx(loss_of(captioner, separate), abs=1e-5)


def test_a_decoder_that_counts_positions_its_own_way_is_not_packed(tokenizer):
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    roberta = glue(TINY_VIT, config, tokenizer)
    assert new_collator(Recipe(train={"captions": "packed"}), roberta).captions == "separate"


@pytest.mark.parametrize("decoder", PACKING)
def test_every_decoder_that_is_packed_has_the_loss_of_separate_rows(tokenizer, decoder):
    config = {"model_type": decoder, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "intermediate_size": 64}
    captioner = glue(TINY_VIT, TINY_GPT2 if decoder == "gpt2" else config, tokenizer)
    packed, separate = collate(captioner, "packed"), collate(captioner, "separate")
    assert loss_of(captioner, packed) == pytest.approx(loss_of(captioner, separate), abs=1e-5)


def test_a_packed_caption_does_not_see_its_neighbour(captioner):
    changed = [{**ROWS[0], "captions": [ROWS[0]["captions"][0], ROWS[2]["captions"][3]]}]
    both = [collate(captioner, "packed", rows) for rows in (ROWS[:1], changed)]
    n = len(captioner.tokenizer(ROWS[0]["captions"][0])["input_ids"]) + 2
    logits = []
    for batch in both:
        pixels = captioner.transform.normalise(batch["pixel_values"])
        inputs = {**batch, "pixel_values": pixels}
        logits.append(captioner.model(**inputs, use_cache=False).logits[0, :n])
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("mode", ["packed", "separate"])
def test_padding_does_not_change_the_loss(captioner, mode):
    batch = collate(captioner, mode)
    wider = dict(batch)
    for name, value in (("decoder_input_ids", 0), ("labels", IGNORE), ("decoder_position_ids", 0)):
        if name in batch:
            wider[name] = torch.nn.functional.pad(batch[name], (0, 6), value=value)
    mask = batch["decoder_attention_mask"]
    least = torch.finfo(torch.float32).min
    pad = ((0, 6, 0, 6), least) if mask.ndim == 4 else ((0, 6), 0)
    wider["decoder_attention_mask"] = torch.nn.functional.pad(mask, pad[0], value=pad[1])
    assert loss_of(captioner, wider) == pytest.approx(loss_of(captioner, batch), abs=1e-5)


def test_eos_stays_after_truncation_and_is_learnt_even_as_padding(captioner):
    captioner.tokenizer.pad_token = captioner.tokenizer.eos_token  # as for GPT-2
    batch = collate(captioner, "separate", max_length=3)
    for labels in batch["labels"]:
        learnt = labels[labels != IGNORE]
        assert len(learnt) == 4
        assert learnt[-1] == captioner.tokenizer.eos_token_id


def test_sampled_takes_one_caption_of_the_image_and_not_always_the_same(captioner):
    seen = set()
    start = captioner.start_ids(None)[0]
    collator = CaptionCollator(captioner.tokenizer, captioner.transform, start, "sampled")
    for _ in range(12):
        batch = collator(ROWS[2:])
        assert len(batch["labels"]) == 1
        ids = batch["labels"][0]
        seen.add(captioner.tokenizer.decode(ids[ids != IGNORE], skip_special_tokens=True))
    assert 1 < len(seen) <= 4
    assert seen <= set(ROWS[2]["captions"])


def test_captions_per_image_limits_a_packed_row(captioner):
    batch = collate(captioner, "packed", captions_per_image=2)
    ends = (batch["labels"] == captioner.tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"size": {"height": 32, "width": 48}},
    ],
)
def test_the_transform_is_the_processors_own(options):
    processor = ViTImageProcessorPil(**({"size": {"height": 64, "width": 64}} | options))
    transform = PixelTransform(processor)
    image = scenes.draw(SCENES[0]).resize((80, 70))
    theirs = processor(image, return_tensors="pt").pixel_values
    pixels = transform(image)[None]
    assert pixels.dtype == torch.uint8
    scale = 255 if options.get("do_rescale", True) else 1
    assert (transform.normalise(pixels) - theirs).abs().max() <= 2 * scale / 255 + 1e-5


def test_pictures_of_the_right_size_take_the_short_way_to_the_same_pixels():
    processor = ViTImageProcessorPil(size={"height": 64, "width": 64})
    image = scenes.draw(SCENES[0])
    theirs = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    assert np.array_equal(PixelTransform(processor)(image).numpy(), theirs.pixel_values[0])


def saved(image, format="JPEG", **options) -> dict:
    """As an undecoded row of `datasets` holds it."""
    out = io.BytesIO()
    image.save(out, format, **options)
    return {"bytes": out.getvalue(), "path": None}


def odd_pictures() -> dict[str, dict]:
    """64 x 64, but for one: what the short way must leave to open_image."""
    drawn = scenes.draw(SCENES[0])
    turned = Image.Exif()
    turned[0x0112] = 3  # orientation: upside down
    return {
        "exif": saved(drawn, exif=turned),
        "grey": saved(drawn.convert("L")),
        "cmyk": saved(drawn.convert("CMYK")),
        "png": saved(drawn, "PNG"),
        "palette": saved(drawn.convert("P"), "PNG", transparency=0),
        "wide": saved(drawn.resize((80, 64))),
        "progressive": saved(drawn, progressive=True, quality=50),
    }


@pytest.fixture(params=["pillow", "simplejpeg"])
def decoder(request, monkeypatch):
    module = pytest.importorskip("simplejpeg") if request.param == "simplejpeg" else None
    monkeypatch.setattr(collator, "simplejpeg", module)


def careful(captioner, image) -> torch.Tensor:
    return captioner.transform(open_image(image["bytes"]))


@pytest.mark.usefixtures("decoder")
def test_stored_pictures_take_the_short_way_to_the_same_pixels(captioner, monkeypatch):
    jpegs = [encode_jpeg(scenes.draw(scene), 90) for scene in SCENES]
    rows = [{**ROWS[0], "image": {"bytes": data, "path": None}} for data in jpegs]
    theirs = torch.stack([careful(captioner, row["image"]) for row in rows])
    monkeypatch.delattr(collator, "open_image")  # not asked
    assert torch.equal(collate(captioner, "packed", rows)["pixel_values"], theirs)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", odd_pictures())
def test_any_other_picture_is_opened_with_care(captioner, kind):
    image = odd_pictures()[kind]
    batch = collate(captioner, "packed", [{**ROWS[0], "image": image}, ROWS[1]])
    assert torch.equal(batch["pixel_values"][0], careful(captioner, image))


@pytest.mark.usefixtures("decoder")
def test_a_broken_stored_picture_is_named(captioner):
    broken = {"bytes": encode_jpeg(scenes.draw(SCENES[0]), 90)[:700], "path": None}
    with pytest.raises(ImageError, match="truncated or broken"):
        collate(captioner, "packed", [{**ROWS[0], "image": broken}])


def test_pixels_are_the_same_from_a_worker_and_however_they_lie_in_memory(captioner):
    start = captioner.start_ids(None)[0]
    collator = CaptionCollator(captioner.tokenizer, captioner.transform, start)
    batch = next(iter(torch.utils.data.DataLoader(ROWS, 3, collate_fn=collator, num_workers=1)))
    here = collator(ROWS)["pixel_values"]
    assert not here.is_contiguous()
    assert torch.equal(batch["pixel_values"], here)
    as_processor = {**batch, "pixel_values": here.contiguous()}
    assert loss_of(captioner, batch) == pytest.approx(loss_of(captioner, as_processor), abs=1e-6)


def test_encode_is_the_tokenizers_own_whatever_it_was_asked_before(tokenizer, texts):
    some = [*texts["en"][:9], *texts["zh"][:9], "", "<zh>"]
    theirs = tokenizer(some, add_special_tokens=False)["input_ids"]
    tokenizer(some, padding="max_length", max_length=4, truncation=True)
    assert encode(tokenizer, some) == theirs
    assert encode(tokenizer, []) == []


def test_each_caption_of_a_row_has_its_own_prompt(captioner):
    tokenizer, captions = captioner.tokenizer, ROWS[0]["captions"]
    row = {**ROWS[0], "prompts": ["<zh><ja>", ""]}
    batch = collate(captioner, "packed", [row, ROWS[2]])
    ids = [tokenizer(caption)["input_ids"] for caption in captions]
    prompt, start = tokenizer("<zh><ja>")["input_ids"], tokenizer.bos_token_id
    eos = [tokenizer.eos_token_id]
    n = len(ids[0]) + len(ids[1]) + 4
    inputs = [start, *prompt, *ids[0], start, *ids[1]]
    labels = [*[IGNORE] * 2, *ids[0], *eos, *ids[1], *eos]
    positions = [*range(len(ids[0]) + 3), *range(len(ids[1]) + 1)]
    assert batch["decoder_input_ids"][0, :n].tolist() == inputs
    assert batch["labels"][0, :n].tolist() == labels
    assert batch["decoder_position_ids"][0, :n].tolist() == positions


def test_augment_keeps_the_size_and_changes_the_picture(captioner):
    still = collate(captioner, "packed")["pixel_values"]
    moved = collate(captioner, "packed", augment="crop+flip")["pixel_values"]
    assert moved.shape == still.shape
    assert not torch.equal(moved, still)


def test_mistakes_are_named(captioner):
    with pytest.raises(InputError, match="No caption mode 'pack'"):
        collate(captioner, "pack")
    with pytest.raises(InputError, match="No augment 'spin'"):
        collate(captioner, "packed", augment="spin")
    captioner.tokenizer.eos_token = None
    with pytest.raises(InputError, match="no eos_token_id"):
        collate(captioner, "packed")
