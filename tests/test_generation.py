"""Captions from images: order, errors, prompts, scores, and maps of where the decoder looked."""

import numpy as np
import pytest
import torch

from captionlib import Captioner, ImageError, scenes
from captionlib.errors import InputError
from captionlib.generation import pick_device

PICTURES = [scenes.draw(scenes.make_scene(number)) for number in range(5)]


def test_batches_do_not_change_captions(captioner):
    assert captioner.caption(PICTURES, batch_size=2) == captioner.caption(PICTURES, batch_size=5)


def test_several_captions_an_image(captioner):
    several = captioner.caption(PICTURES[:2], num_beams=3, num_return_sequences=3)
    assert [len(texts) for texts in several] == [3, 3]
    scores = [
        c.score
        for c in captioner.caption_full(PICTURES[:1], num_beams=3, num_return_sequences=3)[0]
    ]
    assert len(scores) == 3


def test_an_unreadable_image_raises_or_becomes_none_and_the_others_are_captioned(
    captioner, tmp_path
):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    images = [PICTURES[0], bad, PICTURES[1], tmp_path / "missing.png"]
    with pytest.raises(ImageError, match=r"bad.png: not an image"):
        captioner.caption(images)
    texts = captioner.caption(images, on_error="none")
    assert texts[1] is None
    assert texts[3] is None
    assert [texts[0], texts[2]] == captioner.caption(PICTURES[:2])
    errors = [c.error for (c,) in captioner.caption_full(images, on_error="none")]
    assert errors == ["", "not an image", "", "no such file"]


def test_the_log_probability_is_that_of_the_model(captioner):
    (caption,) = captioner.caption_full(PICTURES[:1], max_new_tokens=6)[0]
    pixels = captioner.transform.normalise(captioner.transform(PICTURES[0])[None])
    ids = torch.tensor([[*captioner.start_ids(None), *caption.token_ids]])
    with torch.no_grad():
        logits = captioner.model(pixel_values=pixels, decoder_input_ids=ids).logits
    logprobs = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert caption.token_logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert caption.score == pytest.approx(sum(caption.token_logprobs))


def test_a_prompt_is_continued_and_not_repeated(captioner):
    (caption,) = captioner.caption_full(PICTURES[:1], prompt="<zh>", max_new_tokens=5)[0]
    zh = captioner.tokenizer.convert_tokens_to_ids("<zh>")
    assert captioner.start_ids("<zh>") == [*captioner.start_ids(None), zh]
    assert len(caption.token_ids) <= 5
    other = captioner.caption_full(PICTURES[:1], prompt="<en>", max_new_tokens=5)[0][0]
    assert caption.token_logprobs != other.token_logprobs


def test_max_length_is_obeyed_although_glue_sets_max_new_tokens(captioner):
    (caption,) = captioner.caption_full(PICTURES[:1], max_length=5)[0]
    assert len(caption.token_ids) == 4  # and the start token


def test_captioning_leaves_the_training_mode_as_it_was(captioner):
    captioner.model.train()
    captioner.caption(PICTURES[:1], max_new_tokens=2)
    assert captioner.model.training


def test_explain_gives_a_map_a_word_on_the_encoders_grid(captioner):
    before = captioner.model.decoder.config._attn_implementation
    explained = captioner.explain(PICTURES[0], max_new_tokens=6)
    assert explained.maps.shape == (len(explained.words), 4, 4)  # 64 px in patches of 16
    assert np.allclose(explained.maps.sum((1, 2)), 1, atol=1e-5)
    assert captioner.model.decoder.config._attn_implementation == before


def test_mistakes_are_named(captioner, tmp_path):
    with pytest.raises(InputError, match="takes a list of images"):
        captioner.caption("photo.jpg")
    with pytest.raises(InputError, match="No device 'banana'"):
        pick_device("banana")
    with pytest.raises(InputError, match="No on_error 'skip'"):
        captioner.caption(PICTURES, on_error="skip")
    with pytest.raises(InputError, match="holds no captioner"):
        Captioner.from_pretrained(tmp_path)
    captioner.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match="holds no captioner"):
        Captioner.from_pretrained(tmp_path)
