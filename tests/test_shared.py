"""On real photographs, where the folder CAPTIONLIB_SHARED has them."""

import json
import subprocess
import sys

import pytest
from conftest import SHARED

from captionlib import check_images, read_captions, score, train_tokenizer
from captionlib.captions import clean_caption
from captionlib.data_steps import build, check
from captionlib.dataset import accounting
from captionlib.recipe import load_recipe
from captionlib.tokenization import decode, encode

pytestmark = pytest.mark.shared
FLICKR = SHARED / "flickr8k"


@pytest.mark.slow
@pytest.mark.parametrize("lang", ["en", "zh", "ja"])
def test_flickr8k_goes_through_check_and_build_with_every_row_accounted_for(lang, tmp_path):
    recipe = load_recipe(
        "flickr8k",
        folder=str(FLICKR),
        lang=lang,
        data_dir=str(tmp_path),
        dataset={"stored_size": 32},
    )
    assert check(recipe).ok.all()
    data = build(recipe)
    tables = [read_captions(FLICKR / f"captions_{lang}_{split}.csv") for split in ("train", "val")]
    assert accounting(recipe.dataset_dir).rows.sum() == sum(map(len, tables))
    for split, table in zip(("train", "val"), tables, strict=True):
        assert set(data[split]["filename"]) == set(table.filename)


@pytest.mark.parametrize(("lang", "kind"), [("en", "bpe"), ("zh", "char"), ("ja", "unigram")])
def test_captions_by_people_come_back_from_their_tokens(lang, kind):
    captions = read_captions(FLICKR / f"captions_{lang}_train.csv").caption.map(clean_caption)
    texts = list(captions.unique())
    tokenizer = train_tokenizer(texts, kind, 8000)
    kept = [
        text == decode(tokenizer, ids)
        for text, ids in zip(texts, encode(tokenizer, texts), strict=True)
    ]
    assert sum(kept) / len(kept) > 0.99


def test_odd_images_each_have_a_verdict_and_none_is_accused_falsely():
    files = [path for path in sorted((SHARED / "odd_images").iterdir()) if path.suffix != ".csv"]
    checks = check_images(files, workers=2)
    assert list(checks.path) == [str(path) for path in files]
    assert (checks.ok | (checks.reason != "")).all()
    thresholds = ("too small", "too long", "a single colour", "too many pixels", "a PostScript")
    accused = checks[~checks.ok & ~checks.reason.str.startswith(thresholds)]
    assert len(accused) > 100
    script = "import sys; from PIL import Image; Image.open(sys.argv[1]).load()"
    for row in accused.itertuples():
        command = [sys.executable, "-c", script, row.path]
        own = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert own.returncode != 0, f"Pillow decodes {row.path}, we say {row.reason}"


def test_published_scores_are_reproduced():
    folder = SHARED / "metrics"
    published = json.loads((folder / "published_scores.json").read_text())
    references = json.loads((folder / "clipscore_example/refs.json").read_text())
    for name in ("good", "bad"):
        captions = json.loads((folder / f"clipscore_example/{name}_captions.json").read_text())
        ours = score([captions[key] for key in references], list(references.values()))
        theirs = published[f"clipscore_{name}"]["scores"]
        shared = {key: theirs[key] for key in theirs if key in ours}
        assert {key: ours[key] for key in shared} == pytest.approx(shared, abs=1e-4)
