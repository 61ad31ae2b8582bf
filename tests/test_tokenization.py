"""Tokenizers trained on captions: round trips in three languages, special tokens apart."""

import pytest

from captionlib import train_tokenizer
from captionlib.errors import InputError
from captionlib.tokenization import decode, encode


@pytest.mark.parametrize("kind", ["char", "bpe", "unigram"])
@pytest.mark.parametrize("lang", ["en", "zh", "ja"])
def test_decoding_gives_the_caption_back(texts, kind, lang):
    tokenizer = train_tokenizer(texts[lang], kind, 400)
    for text, ids in zip(texts[lang], encode(tokenizer, texts[lang]), strict=True):
        assert decode(tokenizer, [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) == text
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("kind", ["char", "bpe", "unigram"])
def test_the_four_special_ids_differ_and_unknown_is_never_eos(texts, kind):
    tokenizer = train_tokenizer(texts["zh"], kind, 400, special_tokens=["<zh>"])
    ids = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "unk")]
    assert len(set(ids)) == 4
    assert encode(tokenizer, ["<zh>"]) == [[tokenizer.convert_tokens_to_ids("<zh>")]]
    odd = encode(tokenizer, ["龘🦖"])[0]
    assert tokenizer.eos_token_id not in odd
    assert tokenizer.unk_token_id in odd


def test_char_makes_a_token_of_every_chinese_character(texts):
    tokenizer = train_tokenizer(texts["zh"], "char", 400)
    text = texts["zh"][0]
    assert len(encode(tokenizer, [text])[0]) == len(text)


def test_a_saved_tokenizer_is_the_same(tokenizer, texts, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for lang in texts:
        assert encode(again, texts[lang]) == encode(tokenizer, texts[lang])
    assert again.eos_token_id == tokenizer.eos_token_id


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="No tokenizer kind 'word'"):
        train_tokenizer(["x"], "word")
