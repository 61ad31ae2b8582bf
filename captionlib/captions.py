"""Clean the text of captions, and say why one cannot be used. Used by processdata_03."""

import html
import re
import unicodedata

# Blanks between Chinese or Japanese characters are tokenisation left over, not spelling.
CJK = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
_BLANK_IN_CJK = re.compile(f"(?<=[{CJK}])[ \\t]+(?=[{CJK}])")


def clean_caption(text: str) -> str:
    """The text in Unicode NFC, HTML entities resolved, no control characters, blanks single.

    NFC only joins accents to their letters; NFKC would also turn Japanese full-width signs.
    """
    text = unicodedata.normalize("NFC", html.unescape(text))
    text = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text)
    return join_cjk(" ".join(text.split()))


def join_cjk(text: str) -> str:
    """Without the blanks between Chinese or Japanese characters."""
    return _BLANK_IN_CJK.sub("", text)


def caption_problem(text: str, max_chars: int) -> str:
    """Why a cleaned caption cannot be used, or "" when it can."""
    if not any(char.isalnum() for char in text):
        return "empty caption" if not text else "caption without a letter"
    if len(text) > max_chars:
        return f"caption longer than {max_chars} characters"
    return ""
