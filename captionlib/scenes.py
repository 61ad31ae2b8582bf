"""Drawn scenes whose right captions are known: the embedded data of the notebooks and tests.

A scene is 2-4 coloured shapes on a plain background. Five different true captions are written
in English, Chinese and Japanese from one small grammar, and `is_true` reads a caption back and
says whether it holds: an exact "correct" rate beside the n-gram scores. `scene_server.py` serves
the scenes over HTTP. Used by processdata_01, train_encoder_decoder and infer_encoder_decoder.
"""

import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from captionlib.errors import InputError

SIZE = 64  # pixels a side
RADIUS = {"small": 7, "large": 12}  # pixels; a picture of 64 px holds four large ones
MARGIN = 8  # pixels between centres from which a relation holds
NUMBERS = (1, 2, 3, 4)
LANGS = ("en", "zh", "ja")
SPLITS = ("train", "val", "test", "novel")

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (50, 90, 230),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 135, 35),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (150, 150, 150),
    "black": (15, 15, 15),
    "pink": (250, 190, 205),
}
SHAPES = ("circle", "square", "triangle", "star")
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
# Shape-colour pairs kept out of train, val and test; every scene of split "novel" has one.
NOVEL_PAIRS = {("red", "star"), ("blue", "triangle"), ("green", "circle"), ("yellow", "square")}
PAIRS = set(itertools.product(COLOURS, SHAPES))

# One entry a language: the words, and the three caption forms. `one` is the noun phrase of a
# relation, `many` a counted one; both are filled from the words, so parsing is their reverse.
GRAMMAR = {
    "en": {
        "colour": {c: c for c in COLOURS},
        "background": {b: b for b in BACKGROUNDS},
        "shape": {s: s for s in SHAPES},
        "size": {None: "", "small": "small ", "large": "large "},
        "relation": {"left": "left of", "right": "right of", "above": "above", "below": "below"},
        "number": {1: "one", 2: "two", 3: "three", 4: "four"},
        "one": "a {size}{colour} {shape}",
        "many": "{number} {colour} {shape}",
        "relation form": "{0} is {relation} {1}",
        "count form": "{0} and {1}",
        "background form": "{0} on a {background} background",
    },
    "zh": {
        "colour": dict(zip(COLOURS, ["红色", "绿色", "蓝色", "黄色", "紫色", "橙色"], strict=True)),
        "background": dict(zip(BACKGROUNDS, ["白色", "灰色", "黑色", "粉色"], strict=True)),
        "shape": dict(zip(SHAPES, ["圆形", "正方形", "三角形", "五角星"], strict=True)),
        "size": {None: "", "small": "小的", "large": "大的"},
        "relation": dict(zip(RELATIONS, ["左边", "右边", "上方", "下方"], strict=True)),
        "number": dict(zip(NUMBERS, ["一个", "两个", "三个", "四个"], strict=True)),
        "one": "{size}{colour}{shape}",
        "many": "{number}{colour}{shape}",
        "relation form": "{0}在{1}的{relation}",
        "count form": "{0}和{1}",
        "background form": "{background}背景上有{0}",
    },
    "ja": {
        "colour": dict(
            zip(COLOURS, ["赤い", "緑の", "青い", "黄色い", "紫の", "オレンジの"], strict=True)
        ),
        "background": dict(zip(BACKGROUNDS, ["白い", "灰色の", "黒い", "ピンクの"], strict=True)),
        "shape": dict(zip(SHAPES, ["円", "四角", "三角", "星"], strict=True)),
        "size": {None: "", "small": "小さい", "large": "大きい"},
        "relation": dict(zip(RELATIONS, ["左", "右", "上", "下"], strict=True)),
        "number": dict(zip(NUMBERS, ["一つ", "二つ", "三つ", "四つ"], strict=True)),
        "one": "{size}{colour}{shape}",
        "many": "{colour}{shape}が{number}",
        "relation form": "{0}が{1}の{relation}にある",
        "count form": "{0}と{1}ある",
        "background form": "{background}背景に{0}ある",
    },
}


@dataclass(frozen=True)
class Thing:
    """One shape: its kind, and its centre in pixels from the upper left corner."""

    colour: str
    shape: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows; everything a caption may claim can be checked against it."""

    background: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: `number` None claims that one exists, 1-4 claims exactly so many."""

    colour: str
    shape: str
    size: str | None = None
    number: int | None = None


@dataclass(frozen=True)
class Claim:
    """What a caption says, in no language: one or two phrases and what joins them."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None


def make_scene(seed: int, split: str = "train") -> Scene:
    """The scene number `seed` of a split ("train", "val", "test" or "novel"), always the same."""
    rng = random.Random(f"{split}:{seed}")
    if split not in SPLITS:
        raise InputError(f"No split {split!r} of the scenes: choose from {', '.join(SPLITS)}.")
    pairs = sorted(PAIRS - NOVEL_PAIRS)
    kinds = rng.sample(pairs, rng.randint(2, 4))
    if split == "novel":
        kinds[0] = rng.choice(sorted(NOVEL_PAIRS))
    if len(kinds) > 2 and rng.random() < 0.6:  # so that there is something to count
        kinds[1] = kinds[0]
    things = _place(rng, kinds)
    return Scene(rng.choice(list(BACKGROUNDS)), things)


def _place(rng: random.Random, kinds: list[tuple[str, str]]) -> tuple[Thing, ...]:
    """Put the kinds where none overlaps: drawn again from the first one when there is no room."""
    while True:
        things: list[Thing] = []
        for colour, shape in kinds:
            for _ in range(20):
                size = rng.choice(list(RADIUS))
                radius = RADIUS[size]
                x, y = (rng.randint(radius + 1, SIZE - radius - 2) for _ in "xy")
                if all(_apart(x, y, radius, other) for other in things):
                    things.append(Thing(colour, shape, size, x, y))
                    break
        if len(things) == len(kinds):
            return tuple(things)


def _apart(x: int, y: int, radius: int, other: Thing) -> bool:
    distance = radius + RADIUS[other.size] + 2
    return (x - other.x) ** 2 + (y - other.y) ** 2 >= distance**2


# Corners on the unit circle, (x, y) with y downwards; the star's inner corners lie at 0.45.
_CORNERS = {
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0, -1), (0.95, 0.8), (-0.95, 0.8)),
    "star": (
        (0.0, -1.0), (0.26, -0.36), (0.95, -0.31), (0.43, 0.14), (0.59, 0.81),
        (0.0, 0.45), (-0.59, 0.81), (-0.43, 0.14), (-0.95, -0.31), (-0.26, -0.36),
    ),
}  # fmt: skip


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of 64 x 64 pixels (drawn at twice the size, then halved)."""
    image = Image.new("RGB", (2 * SIZE, 2 * SIZE), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y, radius = 2 * thing.x, 2 * thing.y, 2 * RADIUS[thing.size]
        fill = COLOURS[thing.colour]
        if thing.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
        else:
            corners = _CORNERS[thing.shape]
            pen.polygon([(x + radius * u, y + radius * v) for u, v in corners], fill)
    return image.reduce(2)


def captions(scene: Scene, seed: int = 0, number: int = 5) -> dict[str, list[str]]:
    """`number` different true captions a language; the same claims in each, in the same order."""
    rng = random.Random(seed)
    claims: list[Claim] = []
    while len(claims) < number:
        claim = rng.choice((_relation_claim, _relation_claim, _count_claim))(scene, rng)
        if claim and claim not in claims:
            claims.append(claim)
    return {lang: [render(claim, lang) for claim in claims] for lang in LANGS}


def _relation_claim(scene: Scene, rng: random.Random) -> Claim:
    """Two things of different kinds, joined by the relation that is plainest to see."""
    first = rng.choice(scene.things)
    others = [t for t in scene.things if (t.colour, t.shape) != (first.colour, first.shape)]
    second = rng.choice(others)
    phrases = tuple(
        Phrase(thing.colour, thing.shape, rng.choice((None, None, thing.size)))
        for thing in (first, second)
    )
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return Claim(phrases, relation="left" if dx < 0 else "right")
    return Claim(phrases, relation="above" if dy < 0 else "below")


def _count_claim(scene: Scene, rng: random.Random) -> Claim | None:
    """A kind that occurs several times: on its background, or beside the number of another."""
    numbers = Counter((thing.colour, thing.shape) for thing in scene.things)
    several = [kind for kind, number in numbers.items() if number > 1]
    if not several:
        return None
    kinds = [rng.choice(several)]
    if rng.random() < 0.5:
        kinds.append(rng.choice([kind for kind in numbers if kind not in kinds]))
        rng.shuffle(kinds)
    phrases = tuple(Phrase(*kind, number=numbers[kind]) for kind in kinds)
    return Claim(phrases, background=scene.background if len(kinds) == 1 else None)


def render(claim: Claim, lang: str) -> str:
    """The claim as a sentence of `lang` ("en", "zh" or "ja")."""
    grammar = GRAMMAR[lang]
    phrases = [_render_phrase(phrase, lang) for phrase in claim.phrases]
    if claim.relation:
        relation = grammar["relation"][claim.relation]
        return grammar["relation form"].format(*phrases, relation=relation)
    if claim.background:
        background = grammar["background"][claim.background]
        return grammar["background form"].format(*phrases, background=background)
    return grammar["count form"].format(*phrases)


def _render_phrase(phrase: Phrase, lang: str) -> str:
    grammar = GRAMMAR[lang]
    words = {"colour": grammar["colour"][phrase.colour], "shape": grammar["shape"][phrase.shape]}
    if phrase.number is None:
        text = grammar["one"].format(size=grammar["size"][phrase.size], **words)
        return text.replace("a orange", "an orange")
    plural = "s" if lang == "en" and phrase.number > 1 else ""
    return grammar["many"].format(number=grammar["number"][phrase.number], **words) + plural


def _all_phrases(lang: str) -> dict[str, Phrase]:
    """Every noun phrase of the language with what it means: the grammar is small enough."""
    kinds = [Phrase(colour, shape) for colour, shape in PAIRS]
    sized = [replace(kind, size=size) for kind in kinds for size in (None, *RADIUS)]
    counted = [replace(kind, number=number) for kind in kinds for number in NUMBERS]
    return {_render_phrase(phrase, lang): phrase for phrase in sized + counted}


_PHRASES = {lang: _all_phrases(lang) for lang in LANGS}


def _form_pattern(lang: str, form: str) -> re.Pattern:
    grammar = GRAMMAR[lang]
    fields = {
        name: f"(?P<{name}>{'|'.join(grammar[name].values())})"
        for name in ("relation", "background")
    }
    return re.compile(grammar[form].format("(?P<first>.+?)", "(?P<second>.+)", **fields))


_FORMS = [
    (lang, _form_pattern(lang, form))
    for lang in LANGS
    for form in ("relation form", "count form", "background form")
]


def parse(caption: str, lang: str) -> Claim | None:
    """What the caption says, or None when it is no sentence of the grammar."""
    for pattern in (pattern for form_lang, pattern in _FORMS if form_lang == lang):
        found = pattern.fullmatch(caption.strip())
        parts = found.groupdict() if found else {}
        phrases = [
            _PHRASES[lang].get(parts.get(name)) for name in ("first", "second") if name in parts
        ]
        if phrases and all(phrases):
            names = {
                name: _reverse(lang, name, parts.get(name)) for name in ("relation", "background")
            }
            return Claim(tuple(phrases), **names)
    return None


def _reverse(lang: str, name: str, word: str | None) -> str | None:
    return next((key for key, value in GRAMMAR[lang][name].items() if value == word), None)


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether attributes, numbers, relation and background all agree with the scene.

    A relation holds when the centres lie at least 8 px apart on its axis; "a" claims that there
    is one, a number claims exactly so many of that colour and shape.
    """
    matches = [[t for t in scene.things if _matches(p, t)] for p in claim.phrases]
    for phrase, things in zip(claim.phrases, matches, strict=True):
        if not things or (phrase.number is not None and len(things) != phrase.number):
            return False
    if claim.background and claim.background != scene.background:
        return False
    if claim.relation:
        return any(_related(a, b, claim.relation) for a in matches[0] for b in matches[1])
    return True


def _matches(phrase: Phrase, thing: Thing) -> bool:
    same_kind = (phrase.colour, phrase.shape) == (thing.colour, thing.shape)
    return same_kind and phrase.size in (None, thing.size)


def _related(a: Thing, b: Thing, relation: str) -> bool:
    dx, dy = RELATIONS[relation]
    return (a.x - b.x) * dx + (a.y - b.y) * dy >= MARGIN


def is_true(caption: str, scene: Scene, lang: str) -> bool:
    """Whether the caption is a sentence of the grammar and true of the scene."""
    claim = parse(caption, lang)
    return claim is not None and holds(claim, scene)
