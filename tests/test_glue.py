"""Gluing halves from configurations and from saved checkpoints; saving, loading, refusing."""

import subprocess
import sys

import pytest
import torch
from conftest import TINY_GPT2, TINY_VIT
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    BertTokenizer,
    GPT2LMHeadModel,
    OPTConfig,
    T5Tokenizer,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from captionlib import Captioner, glue, scenes
from captionlib.errors import InputError
from captionlib.tokenization import decode, encode

PICTURES = [scenes.draw(scenes.make_scene(number)) for number in range(3)]
IDS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")


def make_config(values):
    return AutoConfig.for_model(**values)


@pytest.fixture
def checkpoints(tmp_path, tokenizer):
    """A ViT classifier and a GPT-2, saved as they are on a hub: zero_nlp's two halves, tiny."""
    vit = ViTForImageClassification(make_config(TINY_VIT))
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vit")
    gpt2 = GPT2LMHeadModel(make_config(TINY_GPT2 | {"vocab_size": len(tokenizer)}))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path, vit, gpt2


def test_pretrained_weights_arrive_and_ids_are_equal_in_both_configs(checkpoints):
    folder, vit, gpt2 = checkpoints
    captioner = glue(str(folder / "vit"), str(folder / "gpt2"))
    ours = captioner.model.state_dict()
    for name, value in vit.vit.state_dict().items():
        assert torch.equal(ours[f"encoder.{name}"], value), name
    for name, value in gpt2.state_dict().items():
        assert torch.equal(ours[f"decoder.{name}"], value), name
    for name in IDS:
        value = getattr(captioner.model.config, name)
        assert value is not None
        assert getattr(captioner.model.generation_config, name) == value
    assert captioner.model.encoder.pooler is None


def test_zero_nlps_halves_vit_and_a_gpt2_with_berts_vocabulary(checkpoints):
    """The classes of google/vit-base-patch16-224 and yuanzhoulvpi/gpt2_chinese (zero_nlp.yaml)."""
    folder = checkpoints[0] / "gpt2_chinese"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一只黑猫在睡觉。"]
    chinese = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    GPT2LMHeadModel(make_config(TINY_GPT2 | {"vocab_size": len(words)})).save_pretrained(folder)
    chinese.save_pretrained(folder)
    captioner = glue(str(checkpoints[0] / "vit"), str(folder))
    assert captioner.start_ids(None) == [2]  # [CLS]
    assert captioner.model.generation_config.eos_token_id == 3  # [SEP]
    ids = encode(captioner.tokenizer, ["一只黑猫在睡觉。"])[0]
    assert decode(captioner.tokenizer, [2, *ids, 3]) == "一只黑猫在睡觉。"
    assert all(" " not in text for text in captioner.caption(PICTURES, max_new_tokens=6))


def test_the_japanese_halves_vit_and_a_gpt2_with_sentencepiece(checkpoints):
    """The classes of rinna/japanese-gpt2-medium (stair.yaml): <unk> is 0 and </s> is 2."""
    folder = checkpoints[0] / "rinna"
    pieces = ["<unk>", "<s>", "</s>", "[PAD]", "\u2581", "の", "靴", "nike", "犬"]
    t5 = T5Tokenizer(
        vocab=[(piece, -float(number)) for number, piece in enumerate(pieces)],
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="[PAD]", extra_ids=0,
        do_lower_case=True,
    )  # fmt: skip
    GPT2LMHeadModel(make_config(TINY_GPT2 | {"vocab_size": len(pieces)})).save_pretrained(folder)
    t5.save_pretrained(folder)
    assert 2 in encode(AutoTokenizer.from_pretrained(folder), ["龘の靴"])[0]  # stock: EOS
    captioner = glue(str(checkpoints[0] / "vit"), str(folder))
    captioner.save_pretrained(checkpoints[0] / "saved")
    for tokenizer in (captioner.tokenizer, AutoTokenizer.from_pretrained(checkpoints[0] / "saved")):
        assert encode(tokenizer, ["NIKEの靴"]) == [[4, 7, 5, 6]]
        assert encode(tokenizer, ["龘の靴"]) == [[4, 0, 5, 6]]
        assert tokenizer.eos_token_id == 2
    assert captioner.start_ids(None) == [1]


def test_bert_is_a_decoder_too(tokenizer, tmp_path):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    BertLMHeadModel(config).save_pretrained(tmp_path)
    captioner = glue(TINY_VIT, str(tmp_path), tokenizer)
    assert all(isinstance(text, str) for text in captioner.caption(PICTURES, max_new_tokens=4))


def test_halves_of_different_width_get_a_projection(tokenizer):
    captioner = glue(TINY_VIT | {"hidden_size": 48}, TINY_GPT2, tokenizer)
    assert captioner.model.enc_to_dec_proj.weight.shape == (32, 48)


def test_the_image_reaches_every_cross_attention_and_the_encoder(captioner):
    batch = torch.rand(2, 3, 64, 64)
    captioner.model(pixel_values=batch, labels=torch.tensor([[5, 6, 7], [8, 9, 5]])).loss.backward()
    for name, parameter in captioner.model.named_parameters():
        if "crossattention" in name or name.startswith("encoder."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or "key.bias" in name, name


def test_saved_and_loaded_gives_the_same_tokens(captioner, tmp_path):
    captioner.save_pretrained(tmp_path)
    again = Captioner.from_pretrained(tmp_path, "cpu")
    for options in ({}, {"num_beams": 3}):
        ours, theirs = (
            [c.token_ids for (c,) in each.caption_full(PICTURES, **options)]
            for each in (captioner, again)
        )
        assert ours == theirs
    for name, value in captioner.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_stock_transformers_loads_the_folder_without_captionlib(captioner, tmp_path):
    captioner.save_pretrained(tmp_path)
    code = f"""
import sys
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel
model = VisionEncoderDecoderModel.from_pretrained({str(tmp_path)!r})
processor = AutoImageProcessor.from_pretrained({str(tmp_path)!r}, backend="pil")
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
from PIL import Image
image = Image.new("RGB", (64, 64), "red")
pixels = processor(image, return_tensors="pt").pixel_values
print(model.generate(pixels, max_new_tokens=8)[0].tolist())
assert "captionlib" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    from PIL import Image

    (ours,) = captioner.caption_full([Image.new("RGB", (64, 64), "red")], max_new_tokens=8)[0]
    start = captioner.start_ids(None)
    assert run.stdout.strip() == str([*start, *ours.token_ids])


def test_attention_implementation_reaches_the_layers(captioner):
    captioner.model.set_attn_implementation("eager")
    output = captioner.model(
        pixel_values=torch.rand(1, 3, 64, 64),
        decoder_input_ids=torch.tensor([[1, 5]]),
        output_attentions=True,
    )
    assert len(output.encoder_attentions) == len(output.cross_attentions) == 2


def test_what_cannot_work_is_refused_in_one_line(tokenizer, tmp_path):
    opt = OPTConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, ffn_dim=64,
                    num_attention_heads=2, word_embed_proj_dim=32)  # fmt: skip
    bart = BartConfig(vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1)
    cases = [
        ((TINY_VIT, opt, tokenizer), "'opt' has no cross-attention"),
        ((bart, TINY_GPT2, tokenizer), "'bart' does not return a sequence"),
        ((TINY_VIT, {"model_type": "t5"}, tokenizer), "'t5' cannot be this half"),
        ((TINY_VIT, TINY_VIT, tokenizer), "'vit' cannot be this half"),
        (({"model_type": "vitt"}, TINY_GPT2, tokenizer), "names no known model"),
        ((TINY_VIT, TINY_GPT2), "only a configuration has no tokenizer"),
        ((str(tmp_path / "nowhere"), TINY_GPT2, tokenizer), "No model .*nowhere"),
        ((str(tmp_path), TINY_GPT2, tokenizer), "holds no model"),
    ]
    for halves, message in cases:
        with pytest.raises(InputError, match=message) as error:
            glue(*halves)
        assert "\n" not in str(error.value)


def test_a_tokenizer_whose_unknown_is_eos_is_refused(tokenizer):
    import copy

    broken = copy.deepcopy(tokenizer)
    broken.backend_tokenizer.model.unk_token = broken.eos_token
    with pytest.raises(InputError, match="gives unknown characters the id of EOS"):
        glue(TINY_VIT, TINY_GPT2, broken)


def test_a_decoder_blind_to_the_image_is_refused(captioner):
    from captionlib.glue import _prove

    for block in captioner.model.decoder.transformer.h:
        block.crossattention.c_proj.weight.data.zero_()
        block.crossattention.c_proj.bias.data.zero_()
    with pytest.raises(InputError, match="does not see the image"):
        _prove(captioner.model, captioner.image_processor)


def test_the_demo_encoder_loads_in_stock_classes_and_learns_places(tokenizer):
    from captionlib.recipe import load_recipe

    encoder = glue(load_recipe("scenes").encoder, TINY_GPT2, tokenizer).model.encoder
    assert isinstance(encoder, AutoModel._model_mapping[type(encoder.config)])
    places = encoder.embeddings.position_embeddings[0, 1:]
    distance = torch.cdist(places, places)
    assert distance[0, 1] < distance[0, 7]  # neighbours in a row are nearer than its two ends
