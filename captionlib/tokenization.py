"""Train a tokenizer on captions, encode captions with their prompts, decode without stray blanks.

Special ids are never guessed: pad, BOS, EOS and unknown are four tokens of a trained tokenizer.
Used by processdata_03 (lengths), the collator and the captioner.
"""

import json
import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from captionlib.captions import CJK, join_cjk
from captionlib.errors import InputError

PAD, BOS, EOS, UNK = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_ONE_CJK = Regex(f"[{CJK}]")


def train_tokenizer(
    captions: Iterable[str],
    kind: str = "bpe",
    vocab_size: int = 8000,
    special_tokens: Iterable[str] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens, trained on the captions.

    kind: "char" (every Chinese or Japanese character is a token, other scripts are words),
    "bpe" or "unigram" (pieces of words; Chinese and Japanese need no word breaks).
    special_tokens: more tokens that are never split, such as the prompts "<zh>", "<ja>".
    """
    special = [*SPECIAL, *dict.fromkeys(special_tokens)]
    if kind not in _KINDS:
        raise InputError(f"No tokenizer kind {kind!r}: choose {', '.join(_KINDS)}.")
    tokenizer, trainer = _KINDS[kind](vocab_size, special)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.train_from_iterator(captions, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )
    fast.add_special_tokens({"additional_special_tokens": special[len(SPECIAL) :]})
    return fast


def _char(vocab_size: int, special: list[str]):
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_ONE_CJK, "isolated"),
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
        ]
    )
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    return tokenizer, trainer


def _bpe(vocab_size: int, special: list[str]):
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    return tokenizer, trainer


def _unigram(vocab_size: int, special: list[str]):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token=UNK, show_progress=False
    )
    return tokenizer, trainer


_KINDS = {"char": _char, "bpe": _bpe, "unigram": _unigram}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """AutoTokenizer, with SentencePiece tokenizers of T5's class mended where they are wrong.

    transformers 5 gives unknown pieces the id 2 whatever the vocabulary says, which in the layout
    <unk> <s> </s> [PAD] of rinna/japanese-gpt2-medium is EOS; and it forgets `do_lower_case`.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"model": {"type": None}}
    unknown = tokenizer.unk_token_id
    if state["model"]["type"] != "Unigram" or unknown in (None, state["model"]["unk_id"]):
        return tokenizer
    state["model"]["unk_id"] = unknown
    if tokenizer.init_kwargs.get("do_lower_case"):
        steps = [step for step in (state["normalizer"], {"type": "Lowercase"}) if step]
        state["normalizer"] = {"type": "Sequence", "normalizers": steps}
    mended = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=mended, **tokenizer.special_tokens_map)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without any special token."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # an earlier call of the tokenizer may have left them on
    backend.no_truncation()
    return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


def decode(tokenizer: PreTrainedTokenizerBase, ids) -> str:
    """The text of the ids: special tokens left out, no blanks between CJK characters."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return re.sub(r"\s+", " ", join_cjk(text)).strip()
