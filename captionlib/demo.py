"""Run the five notebooks in order, and report what came out: `captionlib demo`, `make demo`.

The notebooks are run as copies, in the recipe's run folder; the committed ones stay as they are.
"""

import json
import os
import time
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from captionlib.errors import InputError
from captionlib.recipe import Recipe, root
from captionlib.scenes import LANGS

NOTEBOOKS = (
    "processdata_01",
    "processdata_02",
    "processdata_03",
    "train_encoder_decoder",
    "infer_encoder_decoder",
)
CELL_SECONDS = 1800  # a cell that takes longer is stuck
SHOWN = 8  # test images in the report


def run(recipe: Recipe) -> str:
    """Run the notebooks on the recipe; the report as text. Prints a line a notebook."""
    folder = root() / "notebooks"
    if not (folder / f"{NOTEBOOKS[0]}.ipynb").exists():
        raise InputError(f"No notebooks at {folder}: run the demo in a clone of the repository.")
    had = "captions.csv" in {path.name for path in Path(recipe.data_dir).glob("*")}
    print(f"Data in {recipe.data_dir}: {'reused' if had else 'made now'}.")
    print(
        f"Run in {recipe.run_dir}: {'reused' if finished(recipe) else 'trained now'}.", flush=True
    )
    for name in NOTEBOOKS:
        start = time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        run_notebook(folder / f"{name}.ipynb", Path(recipe.run_dir) / "notebooks" / f"{name}.ipynb")
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    return report(recipe)


def finished(recipe: Recipe) -> bool:
    return (Path(recipe.run_dir) / "log.json").exists()


def run_notebook(source: Path, target: Path) -> None:
    """Execute `source` in its own folder and write the executed copy to `target`."""
    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": str(source.parent)}},
        extra_arguments=["--log-level=ERROR"],  # of the kernel, which runs on loopback
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        client.execute(env=os.environ | {"TQDM_DISABLE": "1"})
    except CellExecutionError as error:
        raise InputError(
            f"The notebook {source.name} stopped: {error.ename}: {error.evalue}"
        ) from None
    finally:
        nbformat.write(notebook, target)


def report(recipe: Recipe) -> str:
    """What the demo prints at its end, from the files the notebooks wrote."""
    folder = Path(recipe.run_dir)
    losses = [
        entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry
    ]
    scores = pd.read_csv(folder / "scores-test.csv")
    novel = pd.read_csv(folder / "scores-novel.csv").query("system == 'model'")
    pictures = sorted((folder / "figures").glob("*.png"))
    lines = [
        "",
        f"Loss: {losses[0]:.3f} before, {losses[-1]:.3f} after (nats a token).",
        "",
        "Scores on the test split (true: share of captions that hold of their picture):",
        scores.round(3).to_string(index=False),
        "",
        "The same of scenes with a shape and a colour that never met in training:",
        novel[["lang", "images", "true"]].round(3).to_string(index=False),
        "",
        f"{SHOWN} test images, generated and reference captions:",
        *_examples(pd.read_csv(folder / "captions-test.csv", keep_default_na=False)),
        "",
        "Pictures:",
        *(f"  {path}" for path in pictures),
        "",
        "Try next:",
        "  make lab                       # step through the notebooks in JupyterLab",
        f"  {_command()} caption {recipe.images_dir}/test-000001.png --model {folder} --lang zh",
        f"  {_command()} check --table captions.csv --images photos   # your own: README",
    ]
    return "\n".join(lines)


def _examples(captions: pd.DataFrame) -> list[str]:
    lines = []
    for number, name in enumerate(captions.filename.unique()[:SHOWN]):
        rows = captions[captions.filename == name].set_index("lang")
        lang = LANGS[number % len(LANGS)]
        row = rows.loc[lang if lang in rows.index else rows.index[0]]
        lines.append(f"  {name}  {row.caption}{'' if row.get('true', True) else '   (not true)'}")
        lines.append(f"      reference: {row.references.split(' | ')[0]}")
    return lines


def _command() -> str:
    return ".venv/bin/captionlib" if Path(".venv/bin/captionlib").exists() else "captionlib"
