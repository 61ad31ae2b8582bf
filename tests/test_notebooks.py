"""The notebooks: they run in order in smoke mode, and are committed whole, clean and small."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from captionlib.demo import NOTEBOOKS, report, run_notebook
from captionlib.recipe import load_recipe

FILES = [ROOT / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS]


def run_all(folder, tmp_path):
    (folder / "notebooks").mkdir()
    for path in FILES:
        shutil.copy(path, folder / "notebooks")
        run_notebook(folder / "notebooks" / path.name, tmp_path / "out" / path.name)


def test_all_five_run_in_order_on_the_drawn_scenes(tmp_path, monkeypatch):
    """Also with a second run, which downloads and trains nothing again."""
    monkeypatch.setenv("CAPTIONLIB_SMOKE", "1")
    monkeypatch.delenv("CAPTIONLIB_RECIPE", raising=False)
    folder = tmp_path / "clone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    run_all(folder, tmp_path)
    recipe = load_recipe("scenes")
    text = report(recipe)
    for words in ("Loss: ", "Scores on the test split", "reference:", "Try next:"):
        assert words in text
    scores = pd.read_csv(folder / "runs/scenes/scores-test.csv")
    assert set(scores.lang) == {"en", "zh", "ja"}
    weights = folder / "runs/scenes/model.safetensors"
    before = weights.stat().st_mtime_ns
    run_notebook(folder / "notebooks/train_encoder_decoder.ipynb", tmp_path / "out/again.ipynb")
    assert weights.stat().st_mtime_ns == before


@pytest.mark.slow
def test_all_but_the_download_run_on_a_table_of_ones_own(workplace, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPTIONLIB_RECIPE", "tiny.yaml")
    (workplace / "notebooks").mkdir()
    for path in FILES[1:]:
        shutil.copy(path, workplace / "notebooks")
        run_notebook(workplace / "notebooks" / path.name, tmp_path / "out" / path.name)
    assert (workplace / "run/scores-test.csv").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="process groups are of Unix")
def test_ctrl_c_in_the_demo_stops_it_and_the_same_command_goes_on(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    command = [sys.executable, "-m", "captionlib", "demo"]
    env = os.environ | {"CAPTIONLIB_SMOKE": "1"}
    options = {"cwd": tmp_path, "env": env, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **options)
    for line in process.stdout:
        if line.startswith("processdata_01"):
            break
    while not (tmp_path / "data/scenes/images/ledger.sqlite").exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode == 130
    done = subprocess.run(command, check=True, **options)
    assert "Try next:" in done.stdout


@pytest.mark.parametrize("path", FILES, ids=NOTEBOOKS)
def test_a_notebook_is_a_lesson_of_small_cells_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lengths = [len(cell.source.splitlines()) for cell in code]
    assert max(lengths) <= 20
    assert sorted(lengths)[len(lengths) // 2] <= 8
    assert len(notebook.cells) <= 45
    assert path.stat().st_size < 500_000
    assert re.match(r"# \d\d · .*\?", notebook.cells[0].source), "the title is a question"
    assert sum("## Exercises" in cell.source for cell in notebook.cells) == 1
    assert any(output for cell in code for output in cell.outputs), "outputs are committed"
    pictures = json.dumps(notebook).count('"image/')
    assert pictures >= 2
    assert "Traceback" not in json.dumps(notebook)
    assert os.path.expanduser("~") + "/" not in path.read_text("utf-8")


def test_the_notebooks_are_free_of_noise():
    command = [sys.executable, "-m", "nbstripout", "--keep-output", "--verify", *map(str, FILES)]
    assert subprocess.run(command, check=False).returncode == 0
