"""BLEU, ROUGE-L and CIDEr of captions, without Java, for English, Chinese and Japanese.

The formulas are those of the COCO caption code (tylin/coco-caption), which published scores use;
what differs between papers, the tokenizer, is named in the "signature". Used by
infer_encoder_decoder.
"""

import re
import unicodedata
import warnings
from collections import Counter

import numpy as np

from captionlib.errors import InputError

N = 4  # n-grams of 1 to 4 tokens
SIGMA = 6.0  # tokens: width of CIDEr-D's length penalty (Vedantam et al. 2015, section 7)
BETA = 1.2  # ROUGE-L: weight of recall (coco-caption's rouge.py)
DEFAULT_TOKENIZER = {"en": "ptb", "zh": "char", "ja": "char"}
# Penn Treebank style: clitics apart (do n't, dog 's), hyphenated words whole.
_PTB = re.compile(r"\w+(?=n't\b)|n't\b|'\w+|\w+(?:[-.]\w+)*")


def tokenize(text: str, tokenizer: str) -> list[str]:
    """Tokens of one caption, without punctuation.

    "ptb": lower-cased English words; "char": every character but blanks (Latin words and numbers
    whole); "whitespace": split at blanks, nothing else changed.
    """
    if tokenizer == "whitespace":
        return text.split()
    if tokenizer == "ptb":
        return _PTB.findall(text.lower())
    if tokenizer == "char":
        text = unicodedata.normalize("NFKC", text).lower()  # full-width digits and letters
        return re.findall(r"[a-z0-9]+|\w", text)
    raise InputError(f"No tokenizer {tokenizer!r} for scores: choose ptb, char or whitespace.")


def score(
    predictions: list[str],
    references: list[list[str]],
    lang: str = "en",
    tokenizer: str | None = None,
) -> dict:
    """Bleu_1..4, ROUGE_L (0-1), CIDEr and CIDEr_plain (x1: 0-10), images, signature.

    predictions: one caption an image; references: the captions people gave it. tokenizer: "ptb",
    "char" or "whitespace"; by default the language's. CIDEr is what the COCO code prints (clipped,
    with a length penalty: CIDEr-D); CIDEr_plain is the paper's unclipped form.
    """
    hypotheses, targets, signature = _tokens(predictions, references, lang, tokenizer)
    values: dict = dict(
        zip((f"Bleu_{n}" for n in range(1, N + 1)), _bleu(hypotheses, targets), strict=True)
    )
    values["ROUGE_L"] = float(
        np.mean([_rouge_l(h, t) for h, t in zip(hypotheses, targets, strict=True)])
    )
    values["CIDEr"] = float(_cider(hypotheses, targets).mean())
    values["CIDEr_plain"] = float(_cider(hypotheses, targets, plain=True).mean())
    return values | {"images": len(predictions), "signature": signature}


def cider_per_image(
    predictions: list[str],
    references: list[list[str]],
    lang: str = "en",
    tokenizer: str | None = None,
) -> np.ndarray:
    """CIDEr of each image, float64 [images]; their mean is `score`'s CIDEr."""
    hypotheses, targets, _ = _tokens(predictions, references, lang, tokenizer)
    return _cider(hypotheses, targets)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, samples: int = 10_000, seed: int = 0) -> dict:
    """The mean of a - b over images, and its 95 % interval: "difference", "low", "high".

    a, b: a score for each image, of two systems on the same images (Koehn 2004). The images are
    drawn again with replacement `samples` times.
    """
    difference = np.asarray(a) - np.asarray(b)
    drawn = np.random.default_rng(seed).integers(len(difference), size=(samples, len(difference)))
    low, high = np.percentile(difference[drawn].mean(1), [2.5, 97.5])
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high)}


def _tokens(predictions, references, lang: str, tokenizer: str | None):
    if len(predictions) != len(references):
        raise InputError(
            f"{len(predictions)} predictions for {len(references)} images: one each, in order."
        )
    if not predictions or not all(references):
        raise InputError("Scores need at least one image, and a reference caption for each.")
    if len(predictions) == 1:
        warnings.warn(
            "CIDEr of one image alone is 0: every n-gram has idf log(1) = 0.", stacklevel=3
        )
    tokenizer = tokenizer or DEFAULT_TOKENIZER.get(lang, "whitespace")
    hypotheses = [tokenize(text, tokenizer) for text in predictions]
    targets = [[tokenize(text, tokenizer) for text in texts] for texts in references]
    return hypotheses, targets, f"lang:{lang}|tok:{tokenizer}|cider:D,sigma6|captionlib:1"


def _ngrams(tokens: list[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _bleu(hypotheses: list[list[str]], targets: list[list[list[str]]]) -> list[float]:
    """Corpus BLEU-1..4 with the closest reference length (coco-caption's bleu_scorer.py)."""
    guessed, correct = np.zeros(N), np.zeros(N)
    length = target_length = 0
    for hypothesis, references in zip(hypotheses, targets, strict=True):
        length += len(hypothesis)
        target_length += min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
        for n in range(1, N + 1):
            counts = _ngrams(hypothesis, n)
            best: Counter = Counter()
            for reference in references:
                best |= _ngrams(reference, n)
            guessed[n - 1] += max(0, len(hypothesis) - n + 1)
            correct[n - 1] += sum((counts & best).values())
    tiny, small = 1e-15, 1e-9  # the values of the COCO code
    ratio = (length + tiny) / (target_length + small)
    brevity = np.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    products = np.cumprod((correct + tiny) / (guessed + small))
    return [float(brevity * products[n - 1] ** (1 / n)) for n in range(1, N + 1)]


def _rouge_l(hypothesis: list[str], references: list[list[str]]) -> float:
    common = [_longest_common(hypothesis, reference) for reference in references]
    precision = max(c / max(1, len(hypothesis)) for c in common)
    recall = max(c / max(1, len(r)) for c, r in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for token in a:
        before = 0
        for j, other in enumerate(b):
            before, row[j + 1] = (
                row[j + 1],
                before + 1 if token == other else max(row[j + 1], row[j]),
            )
    return row[-1]


def _cider(
    hypotheses: list[list[str]], targets: list[list[list[str]]], plain: bool = False
) -> np.ndarray:
    """CIDEr-D of each image (coco-caption's cider_scorer.py); plain: no clipping, no penalty."""
    documents: Counter = Counter()
    for references in targets:
        documents.update(
            {gram for r in references for n in range(1, N + 1) for gram in _ngrams(r, n)}
        )
    log_images = np.log(float(len(targets)))

    def vectors(tokens: list[str]) -> list[dict]:
        return [
            {
                gram: count * (log_images - np.log(max(1.0, documents[gram])))
                for gram, count in _ngrams(tokens, n).items()
            }
            for n in range(1, N + 1)
        ]

    scores = []
    for hypothesis, references in zip(hypotheses, targets, strict=True):
        ours = vectors(hypothesis)
        similar = [
            _similarity(ours, vectors(r), len(hypothesis) - len(r), plain) for r in references
        ]
        scores.append(10 * np.mean(similar))
    return np.array(scores)


def _similarity(ours: list[dict], theirs: list[dict], longer_by: int, plain: bool) -> float:
    """The mean over n of the cosine between tf-idf vectors."""
    values = []
    for a, b in zip(ours, theirs, strict=True):
        norms = np.sqrt(sum(v * v for v in a.values())) * np.sqrt(sum(v * v for v in b.values()))
        clip = (lambda x, y: x) if plain else min
        dot = sum(clip(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b)
        values.append(dot / norms if norms else 0.0)
    penalty = 1.0 if plain else np.exp(-(longer_by**2) / (2 * SIGMA**2))
    return float(np.mean(values) * penalty)
