"""Run the five notebooks in order, and report what came out: `captionlib demo`, `make demo`.

The notebooks are run as copies, in the recipe's run folder; the committed ones stay as they are.
"""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

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
INTERRUPT_SECONDS = 60  # to save and stop
SHOWN = 8  # test images in the report


def run(recipe: Recipe) -> str:
    """Run the notebooks on the recipe; the report as text. Prints a line a notebook."""
    folder = root() / "notebooks"
    if not (folder / f"{NOTEBOOKS[0]}.ipynb").exists():
        raise InputError(f"No notebooks at {folder}: run the demo in a clone of the repository.")
    for what, path in (
        ("Data", Path(recipe.dataset_dir) / "rows.parquet"),
        ("Run", Path(recipe.run_dir) / "log.json"),
    ):
        print(f"{what} in {path.parent}: {'reused' if path.exists() else 'made now'}.", flush=True)
    for name in NOTEBOOKS:
        start = time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        target = Path(recipe.run_dir) / "notebooks" / f"{name}.ipynb"
        run_notebook(folder / f"{name}.ipynb", target, recipe.name)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    return report(recipe)


def run_notebook(source: Path, target: Path, recipe: str | None = None) -> None:
    """Execute `source` in its own folder and write the executed copy to `target`.

    Ctrl-C interrupts the running cell, which may still save, and raises KeyboardInterrupt.
    """
    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": str(source.parent)}},
        extra_arguments=["--log-level=ERROR"],  # of the kernel, which runs on loopback
    )
    env = os.environ | {"TQDM_DISABLE": "1"} | ({"CAPTIONLIB_RECIPE": recipe} if recipe else {})
    target.parent.mkdir(parents=True, exist_ok=True)
    # In a thread: in the main one nbclient would answer Ctrl-C by killing the kernel.
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(client.execute, env=env)
        try:
            running.result()
        except KeyboardInterrupt:
            os.kill(client.km.provisioner.pid, signal.SIGINT)
            running.exception(timeout=INTERRUPT_SECONDS)
            raise
        except (CellExecutionError, DeadKernelError, TimeoutError) as error:
            reason = f"{getattr(error, 'ename', type(error).__name__)}: "
            reason += getattr(error, "evalue", str(error))
            raise InputError(f"The notebook {source.name} stopped: {reason}") from None
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
