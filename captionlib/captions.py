"""Clean the text of captions, and say why one cannot be used. Used by processdata_03.

Knows nothing of pictures. What it does to a caption is listed in `clean_caption`.
"""

import html
import re
import unicodedata
from contextlib import suppress

import ftfy

CJK = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
_CJK = re.compile(f"[{CJK}]")
KANA = re.compile("[\u3041-\u30ff\uff66-\uff9f]")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
# Blanks between Chinese or Japanese characters are tokenisation left over, not spelling.
_BLANK_IN_CJK = re.compile(f"(?<=[{CJK}])[ \\t]+(?=[{CJK}])")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->")
_URL = re.compile(r"(?:https?://|www\.)[!-~]+")  # ASCII only: Chinese may follow without a blank
# Full-width letters and digits, half-width kana: typing habits. Punctuation is spelling.
_WIDTH = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff66-\uff9f]+")
# "600_600", "800x800", "DSC_0123.jpg", "AB-12345", "20180512" at the end; but not "in 2019", nor
# the end of a word.
_CODE = re.compile(
    r"(?:[\s_,;-]+|(?<![A-Za-z0-9]))"
    r"(?:\d{2,5}[_xX×*]\d{2,5}|\d{6,}|(?=[\w-]*\d{3})(?=[\w-]*[A-Z_])[A-Z0-9_-]{5,})"
    r"(?:\.(?:jpe?g|png|gif|webp))?$",
    re.ASCII,
)
CODE_PLACE = 64  # characters at the end in which codes are looked for
CODES = ("keep", "drop")
EAST_ASIAN = ("gb18030", "cp932")
MIN_KANA_TEXT = 10  # characters: a longer Japanese caption without kana is Chinese


def clean_caption(text: str, lang: str = "", codes: str = "keep", fix_mojibake=False) -> str:
    """The text without what is no caption, in this order.

    With fix_mojibake, UTF-8 that was read as another code page is repaired; HTML entities are
    resolved, tags and URLs removed; control and invisible characters go. Unicode: NFKC for
    English; for Chinese and Japanese (and unknown lang) NFC, and NFKC only for full-width letters
    and digits and half-width kana, because it would also turn "，！～" into ",!~". codes="drop"
    removes sizes and product codes at the end ("600_600"), as web shops write them. Blanks are
    single, and none are left between Chinese or Japanese characters.
    """
    if fix_mojibake:
        text = mended(text)
    text = _URL.sub(" ", _TAG.sub(" ", html.unescape(text)))
    if lang == "en":
        text = unicodedata.normalize("NFKC", text)
    else:
        text = unicodedata.normalize("NFC", text)
        text = _WIDTH.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = "".join(map(_visible, text))
    text = join_cjk(" ".join(text.split()))
    return _without_codes(text) if codes == "drop" else text


def _without_codes(text: str) -> str:
    for _ in range(3):  # "T恤_800x800_20180512"
        text = text[:-CODE_PLACE] + _CODE.sub("", text[-CODE_PLACE:]).rstrip()
    return text


def _visible(char: str) -> str:
    category = unicodedata.category(char)
    return " " if category == "Cc" else "" if category == "Cf" else char


def mended(text: str) -> str:
    """The text with mojibake repaired; the same text where none is seen or it lost bytes."""
    if text.isascii():
        return text
    fixed = ftfy.fix_encoding(text)  # Western code pages (Speer 2019)
    for codec in EAST_ASIAN:
        if fixed == text and _read_back(text, codec):
            with suppress(UnicodeError):
                fixed = text.encode(codec).decode()
    return fixed


def is_garbled(text: str) -> bool:
    """Whether the text is UTF-8 that was read as another code page, repairable or not."""
    return mended(text) != text or any(_read_back(text, codec) for codec in EAST_ASIAN)


def _read_back(text: str, codec: str) -> bool:
    """Whether it was UTF-8 read as this code page: read back, it is CJK nearly throughout.

    Three bytes a character were read as two: so two thirds of the length, less what was lost. Of
    real Chinese or Japanese two characters in a row next to never read back as CJK; one may.
    """
    back = text.encode(codec, "ignore").decode("utf-8", "ignore")
    return 2 * len(_CJK.findall(back)) >= max(4, len(text))


def join_cjk(text: str) -> str:
    """Without the blanks between Chinese or Japanese characters."""
    return _BLANK_IN_CJK.sub("", text)


def caption_problem(text: str, lang: str = "", min_chars: int = 1, max_chars: int = 200) -> str:
    """Why a cleaned caption cannot be used, or "" when it can."""
    if not any(char.isalnum() for char in text):
        return "empty caption" if not text else "caption without a letter"
    if len(text) < min_chars:
        return f"caption shorter than {min_chars} characters"
    if len(text) > max_chars:
        return f"caption longer than {max_chars} characters"
    return f"caption is not written in {lang}" if _other_script(text, lang) else ""


def _other_script(text: str, lang: str) -> bool:
    han, kana = len(HAN.findall(text)), len(KANA.findall(text))
    latin = len(LATIN.findall(text))
    if lang == "zh":
        return not han or 2 * kana > han
    if lang == "ja":
        return not (kana or han) or (not kana and han >= MIN_KANA_TEXT)
    return lang == "en" and (not latin or han + kana > latin)
