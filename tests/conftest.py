"""What many tests use: tiny captioners with odd ids, drawn scenes on disk, the shared folder."""

import copy
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test asks a hub

import pytest

from captionlib import glue, scenes, train_tokenizer
from captionlib.recipe import load_recipe
from captionlib.scene_server import png, scene_name

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("CAPTIONLIB_SHARED") or ROOT.parent / "shared")

TINY_VIT = {
    "model_type": "vit", "image_size": 64, "patch_size": 16, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TINY_GPT2 = {
    "model_type": "gpt2", "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def pytest_terminal_summary(terminalreporter):
    """In CI (CAPTIONLIB_CI=1) only tests marked gpu or shared may be skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    excused = {"gpu", "shared"}
    wrong = [report.nodeid for report in skipped if not excused & set(report.keywords)]
    if wrong and os.environ.get("CAPTIONLIB_CI") == "1":
        terminalreporter.write_line(f"Skipped without an excuse: {', '.join(wrong)}", red=True)
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items):
    for item in items:
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no folder {SHARED} (CAPTIONLIB_SHARED)"))


@pytest.fixture(scope="session")
def texts():
    """Captions of 40 scenes: {lang: list}."""
    found = {lang: [] for lang in scenes.LANGS}
    for number in range(40):
        for lang, captions in scenes.captions(scenes.make_scene(number), number).items():
            found[lang] += captions
    return found


@pytest.fixture(scope="session")
def tokenizer(texts):
    """Seven more special tokens first, so that no id has its usual value (EOS is 2 nowhere)."""
    every = [text for captions in texts.values() for text in captions]
    return train_tokenizer(every, "bpe", 250, special_tokens=["<en>", "<zh>", "<ja>"])


@pytest.fixture
def captioner(tokenizer):
    return glue(TINY_VIT, TINY_GPT2, copy.deepcopy(tokenizer), seed=3)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 24 drawn scenes and a CSV of their English captions in zero_nlp's columns."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "photos").mkdir()
    lines = ["text,url,filename"]
    for number in range(24):
        scene = scenes.make_scene(number)
        name = scene_name("train", number)
        (folder / "photos" / name).write_bytes(png(scene))
        for caption in scenes.captions(scene, number)["en"]:
            lines.append(f"{caption},http://example.invalid/{name},{name}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


TINY_RECIPE = f"""
name: tiny
data_dir: data
run_dir: run
table: captions.csv
images: photos
lang: en
dataset: {{stored_size: 64, val: 0.2, test: 0.2}}
tokenizer: {{kind: bpe, vocab_size: 150}}
encoder: {TINY_VIT}
decoder: {TINY_GPT2}
train: {{captions: packed, per_device_train_batch_size: 4, max_steps: 6, save_steps: 2,
  logging_steps: 1, learning_rate: 0.001}}
generate: {{max_new_tokens: 12}}
evaluate: {{split: test, images: 5}}
"""


@pytest.fixture
def workplace(pictures, tmp_path, monkeypatch):
    """A working directory with pictures, a table and a recipe tiny.yaml of one's own."""
    (tmp_path / "photos").symlink_to(pictures / "photos")
    (tmp_path / "captions.csv").write_bytes((pictures / "captions.csv").read_bytes())
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(workplace):
    return load_recipe("tiny.yaml")
