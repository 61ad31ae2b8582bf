"""The training steps of a recipe, as the notebooks and the command line run them both.

Each takes a Recipe, does one step with the functions of the library, writes where the recipe says,
and returns plain values. A step that was done before is not done again. Its data: data_steps.
"""

import json
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import yaml

from captionlib import metrics, scenes
from captionlib.collator import CaptionCollator
from captionlib.dataset import load_dataset
from captionlib.errors import InputError
from captionlib.generation import Captioner, last_checkpoint, pick_device
from captionlib.glue import glue
from captionlib.recipe import Recipe, as_text, check_section
from captionlib.scene_server import scene_of
from captionlib.shards import write_atomic
from captionlib.tokenization import train_tokenizer

COLLATOR_KEYS = ("captions", "captions_per_image", "max_length", "augment")  # of section train
PACKING = ("gpt2", "bert")  # decoders that take positions restarting at 0
TRAINED_ON = "trained_on.yaml"  # in a run's folder
SIDES = re.compile(r"\b(left|right)\b|[左右]")
SIDES_ALLOWED = 0.02  # share of captions: "on the right", now and then, does little harm
CONSTANTS_TRIED = 200  # of the most frequent captions, for the best constant one


def new_captioner(recipe: Recipe, data: datasets.DatasetDict) -> Captioner:
    """Glue the recipe's halves; where the recipe says so, train a tokenizer on data["train"]."""
    tokenizer = None
    check_section(recipe.tokenizer, "tokenizer", train_tokenizer)
    if recipe.tokenizer:
        train = data["train"].select_columns(["captions", "prompts"])
        prompts = sorted({prompt for row in train["prompts"] for prompt in row} - {""})
        texts = (text for row in train["captions"] for text in row)
        tokenizer = train_tokenizer(texts, **recipe.tokenizer, special_tokens=prompts)
    return glue(recipe.encoder, recipe.decoder, tokenizer, seed=recipe.train.get("seed", 0))


def new_collator(recipe: Recipe, captioner: Captioner, **changes) -> CaptionCollator:
    """The collator of the recipe's section `train`."""
    options = {key: recipe.train[key] for key in COLLATOR_KEYS if key in recipe.train}
    check_section(options, "train", CaptionCollator)
    decoder = captioner.model.decoder.config.model_type
    if options.get("captions", "packed") == "packed" and decoder not in PACKING:
        options["captions"] = "separate"  # RoBERTa, say, counts positions in a way of its own
    return CaptionCollator(
        captioner.tokenizer, captioner.transform, captioner.start_ids(None)[0], **options | changes
    )


def started_captioner(recipe: Recipe, data: datasets.DatasetDict) -> Captioner:
    """The captioner where training is: finished, at its last checkpoint, or new."""
    if finished(recipe):
        return Captioner.from_pretrained(recipe.run_dir, "cpu")
    checkpoint = last_checkpoint(recipe.run_dir)  # with a tokenizer of its own
    return (
        Captioner.from_pretrained(checkpoint, "cpu") if checkpoint else new_captioner(recipe, data)
    )


def train(recipe: Recipe, device: str = "auto", callbacks=(), captioner=None) -> list[dict]:
    """Train, or go on from the last checkpoint; the log. A finished run is not trained again.

    captioner: from `started_captioner`, where the caller wants to watch it learn.
    """
    from captionlib import trainer  # Trainer is slow to import: only where it is used

    folder = Path(recipe.run_dir)
    log = finished(recipe)
    if log:
        return log
    data = load_dataset(recipe.dataset_dir)
    if "train" not in data:
        raise InputError(f"The dataset has no split train: it has {', '.join(data)}.")
    captioner = captioner or started_captioner(recipe, data)
    captioner.model.to(pick_device(device))
    if "flip" in str(recipe.train.get("augment")):
        _refuse_sides(data["train"])
    given = {key: value for key, value in recipe.train.items() if value is not False}  # YAML's no
    given = {key: value for key, value in given.items() if key not in COLLATOR_KEYS}
    check_section(given, "train", trainer.CaptionTrainingArguments)
    options = _training_options(recipe, "val" in data)
    collator = new_collator(recipe, captioner)
    still = new_collator(recipe, captioner, augment="none", captions_per_image=None)
    try:
        arguments = trainer.CaptionTrainingArguments(
            output_dir=str(folder),
            use_cpu=captioner.model.device.type == "cpu",
            **options,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"The recipe's section train: {error}") from None
    for name, text in (("recipe.yaml", as_text(recipe)), (TRAINED_ON, _trained_on(recipe))):
        write_atomic(folder / name, lambda path, text=text: path.write_text(text, "utf-8"))
    log = trainer.train(captioner, data, arguments, collator, callbacks, eval_collator=still)
    _save_generation(recipe, captioner)
    write_atomic(folder / "log.json", lambda path: path.write_text(json.dumps(log), "utf-8"))
    return log


def _training_options(recipe: Recipe, validate: bool) -> dict:
    """The section train without the collator's keys; no evaluation without a split val."""
    options = {key: value for key, value in recipe.train.items() if key not in COLLATOR_KEYS}
    options["logging_steps"] = min(options.get("logging_steps", 50), options.get("max_steps", 50))
    for key in ("eval_strategy", "save_strategy"):
        if options.get(key) is False:  # YAML's reading of "no"
            options[key] = "no"
    if not validate:
        options |= {"eval_strategy": "no", "load_best_model_at_end": False}
    return options


def _save_generation(recipe: Recipe, captioner: Captioner) -> None:
    generation = captioner.model.generation_config
    if "max_length" in recipe.generate:
        generation.max_new_tokens = None  # which would win over it
    generation.update(**recipe.generate)
    generation.save_pretrained(recipe.run_dir)


def _refuse_sides(train: datasets.Dataset) -> None:
    """A mirrored picture makes "left" and "right" false."""
    texts = [text for row in train["captions"] for text in row]
    share = sum(bool(SIDES.search(text)) for text in texts) / len(texts)
    if share > SIDES_ALLOWED:
        raise InputError(
            f"augment: crop+flip mirrors pictures, but {share:.0%} of the captions say left or "
            "right (左, 右): use augment: crop."
        )


def finished(recipe: Recipe) -> list[dict]:
    """The log of the recipe's finished run, or []. Raises InputError for another recipe's."""
    folder = Path(recipe.run_dir)
    before = folder / TRAINED_ON
    if before.exists() and before.read_text("utf-8") != _trained_on(recipe):
        raise InputError(
            f"{folder} holds a run of another recipe or dataset (compare {before}): remove it, or "
            "choose another folder with --run-dir."
        )
    log = folder / "log.json"
    return json.loads(log.read_text("utf-8")) if log.exists() else []


def _trained_on(recipe: Recipe) -> str:
    """What makes a run what it is, as YAML: the model, the training, the dataset's shards."""
    names = ("prompt", "tokenizer", "encoder", "decoder", "train")
    content = {name: getattr(recipe, name) for name in names} | {"dataset": _shards(recipe)}
    return yaml.safe_dump(content)


def _shards(recipe: Recipe) -> list[str]:
    """The dataset's files, whose names hold a hash of what they are made of."""
    return sorted(path.name for path in recipe.dataset_dir.glob("*-*.parquet"))


def evaluate(
    recipe: Recipe, captioner: Captioner, data: datasets.DatasetDict, split: str | None = None
) -> pd.DataFrame:
    """Caption a split and score it beside two baselines; one row a language and system.

    Systems: "model"; "wrong images", the same captions each given to the next image; "constant",
    one training caption for every image (the most frequent, or for drawn scenes the best of 200).
    Columns: lang, system, images, Bleu_4, CIDEr, distinct (share of different captions), true (of
    drawn scenes), and of CIDEr the 95 % interval of model minus system (low, high). Writes
    `scores-<split>.csv` and `captions-<split>.csv` to the run's folder.
    """
    split = split or recipe.evaluate.get("split", "test")
    before = Path(recipe.run_dir) / TRAINED_ON
    if before.exists() and yaml.safe_load(before.read_text("utf-8"))["dataset"] != _shards(recipe):
        raise InputError(
            f"The run {recipe.run_dir} was trained on another dataset than {recipe.dataset_dir}: "
            "its training images may be in this split. Build that one again, or train anew."
        )
    if split not in data:
        raise InputError(f"No split {split!r} in the dataset: it has {', '.join(data)}.")
    rows = data[split].select(range(min(len(data[split]), recipe.evaluate.get("images", 1000))))
    langs = sorted({lang for row in rows["langs"] for lang in row})
    if not langs or len(rows) < 2:
        raise InputError(f"The split {split} has {len(rows)} images: scores need two at least.")
    results = [_evaluate_lang(recipe, captioner, rows, data["train"], lang) for lang in langs]
    scores = pd.concat([score for score, _ in results], ignore_index=True)
    texts = pd.concat([text for _, text in results], ignore_index=True)
    for name, table in (("scores", scores), ("captions", texts)):
        path = Path(recipe.run_dir) / f"{name}-{split}.csv"
        write_atomic(path, lambda temporary, table=table: table.to_csv(temporary, index=False))
    return scores


def _evaluate_lang(recipe: Recipe, captioner: Captioner, rows, train, lang: str):
    rows = rows.select([i for i, langs in enumerate(rows["langs"]) if lang in langs])
    references = [_of_lang(row, lang) for row in rows.select_columns(["captions", "langs"])]
    prompt = recipe.prompt.format(lang=lang) or None
    try:
        predictions = captioner.caption(rows["image"], prompt=prompt, **recipe.generate)
    except (TypeError, ValueError) as error:
        raise InputError(f"The recipe's section generate: {error}") from None
    names = rows["filename"]
    constant = _best_constant(recipe, train, lang, names)
    systems = {
        "model": predictions,
        "wrong images": predictions[1:] + predictions[:1],
        "constant": [constant] * len(predictions),
    }
    ours = metrics.cider_per_image(predictions, references, lang)
    scores = []
    for system, texts in systems.items():
        values = metrics.score(texts, references, lang)
        row = {"lang": lang, "system": system, "images": len(texts)}
        row |= {name: values[name] for name in ("Bleu_4", "CIDEr")}
        row["distinct"] = len(set(texts)) / len(texts)
        if recipe.scenes:
            row["true"] = float(np.mean(truth(texts, names, lang)))
        theirs = metrics.cider_per_image(texts, references, lang)
        interval = metrics.paired_bootstrap(ours, theirs)
        scores.append(row | {name: interval[name] for name in ("low", "high")})
    texts = {"filename": names, "lang": lang, "caption": predictions, "CIDEr": ours}
    texts["references"] = [" | ".join(reference) for reference in references]
    if recipe.scenes:
        texts["true"] = truth(predictions, names, lang)
    return pd.DataFrame(scores), pd.DataFrame(texts)


def _of_lang(row: dict, lang: str) -> list[str]:
    return [c for c, each in zip(row["captions"], row["langs"], strict=True) if each == lang]


def _best_constant(recipe: Recipe, train, lang: str, names: list[str]) -> str:
    columns = train.select_columns(["captions", "langs"])
    counts = Counter(caption for row in columns for caption in _of_lang(row, lang))
    frequent = [caption for caption, _ in counts.most_common(CONSTANTS_TRIED)]
    if not recipe.scenes:
        return frequent[0]
    return max(frequent, key=lambda caption: sum(truth([caption] * len(names), names, lang)))


def truth(captions: list[str], filenames: list[str], lang: str) -> list[bool]:
    """Whether each caption is true of the drawn scene of that file name."""
    pairs = zip(captions, filenames, strict=True)
    return [scenes.is_true(caption, scene_of(name), lang) for caption, name in pairs]
