"""Cleaning captions: what goes, what stays, and why one cannot be used."""

import pytest

from captionlib.captions import caption_problem, clean_caption, is_garbled, mended


@pytest.mark.parametrize(
    ("lang", "text", "clean"),
    [
        ("en", "a&nbsp;dog &amp; a <b>cat</b><br/>", "a dog & a cat"),
        ("en", "1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("en", "see https://example.org/a?b=1 a dog", "see a dog"),
        ("zh", "一只狗http://example.org/狗在跑", "一只狗 狗在跑".replace(" ", "")),
        ("en", "ﬁne ½ Ｄｏｇ", "fine 1⁄2 Dog"),
        ("ja", "ｶﾞﾗｽの窓、３匹！～", "ガラスの窓、3匹！～"),  # punctuation is spelling
        ("zh", "两只狗，Ｔ恤！", "两只狗，T恤！"),
        ("ja", "か\u3099", "が"),  # NFC joins the mark to its letter
        ("zh", "一 只 猫 on a mat", "一只猫 on a mat"),
        ("en", "a\u200b dog\ufeff\x07 runs\t", "a dog runs"),
    ],
)
def test_what_is_no_caption_goes(lang, text, clean):
    assert clean_caption(text, lang) == clean
    assert clean_caption(clean, lang) == clean  # once is enough


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("新款女装连衣裙 600_600", "新款女装连衣裙"),
        ("T恤_800x800.jpg", "T恤"),
        ("耐克 AB-12345", "耐克"),
        ("a dog DSC_0123", "a dog"),
        ("a man in 2019", "a man in 2019"),
        ("room 101", "room 101"),
        ("MP3 player", "MP3 player"),
        ("a B747", "a B747"),
        ("iPhone15PRO256", "iPhone15PRO256"),
        ("裙子_800x800_20180512", "裙子"),
        ("1" * 80 + "a", "1" * 80 + "a"),  # and in no time
        ("AB-123_" * 30 + "a", "AB-123_" * 30 + "a"),
    ],
)
def test_product_codes_at_the_end_are_dropped_only_when_asked(text, clean):
    assert clean_caption(text, codes="drop") == clean
    assert clean_caption(text) == text


@pytest.mark.parametrize(
    "text", ["一只黑猫在睡觉", "猫が寝ています", "ein Hund läuft über die Straße"]
)
def test_mojibake_is_found_and_repaired(text):
    garbled = text.encode().decode("latin-1")
    assert is_garbled(garbled)
    assert mended(garbled) == text
    assert clean_caption(garbled, fix_mojibake=True) == text
    assert not is_garbled(text)
    assert mended(text) == text


@pytest.mark.parametrize("text", ["我国", "大小", "苹果", "香蕉", "手套", "犬", "café", "ñ"])
def test_short_words_are_no_mojibake(text):
    assert not is_garbled(text)


@pytest.mark.parametrize("lost", ["ignore", "replace"])
@pytest.mark.parametrize("text", ["两个孩子在公园里玩耍", "猫が寝ています", "一只猫"])
def test_mojibake_that_lost_bytes_is_found(text, lost):
    garbled = text.encode().decode("gb18030", lost)
    assert is_garbled(garbled)
    assert mended(garbled) in (text, garbled)  # no third text


@pytest.mark.parametrize("codec", ["gb18030", "cp932"])
def test_mojibake_of_east_asian_code_pages_is_repaired_where_no_byte_was_lost(codec):
    text = {"gb18030": "猫がいる", "cp932": "犬と猫"}[codec]
    garbled = text.encode().decode(codec)
    assert is_garbled(garbled)
    assert mended(garbled) == text


@pytest.mark.parametrize(
    ("lang", "text", "problem"),
    [
        ("en", "一只猫", "caption is not written in en"),
        ("zh", "a cat", "caption is not written in zh"),
        ("zh", "猫がいる", "caption is not written in zh"),
        ("ja", "一只黑色的猫在窗台上睡觉", "caption is not written in ja"),
        ("ja", "東京駅", ""),
        ("zh", "Nike Air Max 90 男鞋", ""),
        ("en", "a café in 東京", ""),
        ("", "anything", ""),
        ("en", "", "empty caption"),
        ("en", "?!", "caption without a letter"),
        ("en", "x" * 201, "caption longer than 200 characters"),
    ],
)
def test_why_a_caption_cannot_be_used(lang, text, problem):
    assert caption_problem(text, lang) == problem
