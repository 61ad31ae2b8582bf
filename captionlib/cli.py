"""The command line: `captionlib {demo,download,check,build,train,caption,evaluate}`.

Runs the same steps as the notebooks. Exit status: 0 all done; 1 done, but some items failed
(listed); 2 the user's mistake, in one line; 130 interrupted.
"""

import argparse
import errno
import sqlite3
import sys
from pathlib import Path

import yaml

from captionlib.errors import InputError
from captionlib.recipe import Recipe, bundled, load_recipe, read_yaml
from captionlib.shards import ENGINES

PRINTED = 32  # captions at a time
SHOWN = 10  # failed items listed; the table in the data folder has all


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        again = (
            "starts again" if arguments.command in ("caption", "evaluate") else "goes on from here"
        )
        print(f"Interrupted. The same command {again}.", file=sys.stderr)
        return 130
    except InputError as error:
        return _say(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        where = f" {error.filename}" if error.filename else ""
        return _say(f"Cannot write or read{where}: {error.strerror}. {_remedy(error.errno)}")
    except sqlite3.DatabaseError as error:
        number = errno.ENOSPC if "full" in str(error) or "I/O" in str(error) else errno.EINVAL
        return _say(f"Cannot use the ledger or row store (*.sqlite): {error}. {_remedy(number)}")


def _say(text: str) -> int:
    print(f"captionlib: {text}", file=sys.stderr)
    return 2


def _remedy(number: int) -> str:
    if number in (errno.EACCES, errno.EPERM):
        return "Its permissions forbid it: change them, or choose another file or folder."
    if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return "Free some space and run the same command again, or choose another --data-dir."
    return "Choose a folder you may write to, with --data-dir and --run-dir."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="captionlib", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="command", required=True)
    recipe = _recipe_options()
    for name, run, text in (
        ("download", _download, "fetch the pictures of a table of URLs"),
        ("check", _check, "decode every picture; list the unusable ones"),
        ("build", _build, "clean the captions, split by image, pack the dataset"),
        ("train", _train, "train, or go on from the last checkpoint"),
        ("evaluate", _evaluate, "caption a split and score it beside two baselines"),
    ):
        command = commands.add_parser(name, parents=[recipe], help=text, description=text)
        command.set_defaults(run=run)
        if name == "download":
            _download_options(command)
        if name in ("check", "build"):
            command.add_argument("--workers", type=int, help="processes; by default one a core")
            command.add_argument("--engine", default="processes", choices=ENGINES)
        if name == "build":
            text = "repair UTF-8 that was read as another code page"
            command.add_argument("--fix-mojibake", "--fix_mojibake", action="store_true", help=text)
        if name in ("train", "evaluate"):
            command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
        if name == "evaluate":
            command.add_argument("--split", help="by default the recipe's, or test")
    demo = commands.add_parser("demo", help="run the five notebooks on drawn scenes")
    demo.set_defaults(run=_demo)
    caption = commands.add_parser("caption", help="caption pictures with a trained model")
    caption.add_argument("images", nargs="+", help="files, folders or URLs")
    caption.add_argument("--model", required=True, help="a run's folder, or a hub name")
    caption.add_argument("--lang", help="of a captioner of several languages: en, zh or ja")
    caption.add_argument("--prompt", help="text the caption continues")
    caption.add_argument("--num-beams", type=int, choices=range(1, 33), metavar="1..32")
    caption.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    caption.set_defaults(run=_caption)
    return parser


def _download_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--from", dest="source", help="instead of URLs: tar shards, img2dataset's output, a folder "
        "of pictures and texts, or a Hugging Face dataset (name or path)")  # fmt: skip
    add("--retry", help="of what failed, try only these reasons again: timeout,429 or all")
    add("--contact", help="your address, in the User-Agent that servers see")
    add("--no-robots", action="store_true", help="do not ask robots.txt")
    add("--allow-private", action="store_true", help="also private and loopback addresses")


def _recipe_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--recipe", help=f"a YAML file, or one of {', '.join(bundled())}")
    options.add_argument("--table", nargs="+", help="your own table(s): CSV, COCO, JSON lines, ...")
    options.add_argument("--folder", help="where a recipe's source lies, if it asks for one")
    options.add_argument("--images", help="the folder of your pictures; else they are downloaded")
    options.add_argument("--lang", help="of the captions: en, zh or ja")
    options.add_argument("--format", help="of the table: csv, coco, ...; auto looks into it")
    options.add_argument("--encoding", help="of the table, for example gbk")
    options.add_argument("--data-dir", help="where the data goes")
    options.add_argument("--run-dir", help="where the training run goes")
    options.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.max_steps=200"
    )
    return options


def _recipe(arguments: argparse.Namespace) -> Recipe:
    names = ("table", "folder", "images", "lang", "format", "encoding", "data_dir", "run_dir")
    changes = {name: getattr(arguments, name) for name in names}
    for each in arguments.set:
        key, equals, value = each.partition("=")
        if not equals:
            raise InputError(f"--set {each}: write KEY=VALUE, for example train.max_steps=200.")
        *sections, last = key.split(".")
        place = changes
        for section in sections:
            place[section] = place.get(section) or {}
            place = place[section]
            if not isinstance(place, dict):
                raise InputError(f"--set {each}: {section} is given already, as {place!r}.")
        try:
            place[last] = read_yaml(value)
        except yaml.YAMLError:
            raise InputError(f"--set {each}: {value} is no YAML value.") from None
    own = arguments.table or getattr(arguments, "source", None)
    default = "my_data" if own else None  # a table of one's own is not the scenes
    return load_recipe(arguments.recipe or default, **changes)


def _download(arguments: argparse.Namespace) -> int:
    from captionlib import data_steps
    from captionlib.download import failures, outcomes

    recipe = _recipe(arguments)
    recipe.source = arguments.source or recipe.source
    if recipe.source and recipe.table:
        raise InputError(f"--from {recipe.source} brings its own table: leave out --table.")
    given = {
        "contact": arguments.contact,
        "robots": False if arguments.no_robots else None,
        "allow_private": arguments.allow_private or None,
    }
    recipe.download |= {key: value for key, value in given.items() if value is not None}
    downloads = data_steps.download(recipe, arguments.retry or "")
    print(outcomes(downloads).to_string(index=False))
    print(f"Pictures: {recipe.images_dir}")
    return _list_failed(failures(downloads))


def _check(arguments: argparse.Namespace) -> int:
    import pyarrow.parquet as pq

    from captionlib import data_steps

    path = data_steps.write_checks(_recipe(arguments), arguments.workers, arguments.engine)
    total = pq.read_metadata(path).num_rows
    bad = pq.read_table(path, columns=["path", "reason"], filters=[("ok", "==", False)])
    print(f"{total - len(bad)} of {total} pictures can be used.")
    return _list_failed(zip(*bad.to_pydict().values(), strict=True))


def _list_failed(failed) -> int:
    failed = list(failed)
    for name, reason in failed[:SHOWN]:
        print(f"  {name}: {reason}", file=sys.stderr)
    if len(failed) > SHOWN:
        print(f"  ... and {len(failed) - SHOWN} more", file=sys.stderr)
    return 1 if failed else 0


def _build(arguments: argparse.Namespace) -> int:
    from captionlib import data_steps
    from captionlib.dataset import accounting, garbled_share

    recipe = _recipe(arguments)
    if arguments.fix_mojibake:
        recipe.dataset["fix_mojibake"] = True
    sizes = data_steps.write_dataset(recipe, workers=arguments.workers, engine=arguments.engine)
    print(accounting(recipe.dataset_dir).to_string(index=False))
    garbled = garbled_share(recipe.dataset_dir)
    if garbled and not recipe.dataset.get("fix_mojibake"):
        print(f"{garbled:.2%} of the captions look like mojibake (--fix-mojibake repairs it).")
    images = ", ".join(f"{split} {count}" for split, count in sizes.items())
    print(f"Images: {images}. Dataset: {recipe.dataset_dir}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from captionlib import steps

    recipe = _recipe(arguments)
    log = steps.train(recipe, arguments.device)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    print(f"Loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token. Captioner: {recipe.run_dir}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from captionlib import steps
    from captionlib.dataset import load_dataset
    from captionlib.generation import Captioner

    recipe = _recipe(arguments)
    data = load_dataset(recipe.dataset_dir)
    captioner = Captioner.from_pretrained(recipe.run_dir, arguments.device)
    scores = steps.evaluate(recipe, captioner, data, arguments.split)
    print(scores.round(4).to_string(index=False))
    return 0


def _caption(arguments: argparse.Namespace) -> int:
    from captionlib.generation import Captioner
    from captionlib.images import list_images

    images: list[str] = []
    for name in arguments.images:
        found = (
            [str(Path(name, each)) for each in list_images(name)] if Path(name).is_dir() else [name]
        )
        if not found:
            raise InputError(f"No pictures in the folder {name}.")
        images += found
    captioner = Captioner.from_pretrained(arguments.model, arguments.device)
    prompt = arguments.prompt or _prompt_of(arguments.model, arguments.lang)
    options = {"num_beams": arguments.num_beams} if arguments.num_beams else {}
    failed = []
    for start in range(0, len(images), PRINTED):
        batch = images[start : start + PRINTED]
        found = captioner.caption_full(batch, on_error="none", prompt=prompt, **options)
        for image, (caption, *_) in zip(batch, found, strict=True):
            if caption.error:
                failed.append((image, caption.error))
            else:
                print(f"{image}\t{caption.text}", flush=True)
    return _list_failed(failed)


def _prompt_of(model: str, lang: str | None) -> str | None:
    """The prompt a captioner of several languages was trained with, from its run's recipe."""
    path = Path(model, "recipe.yaml")
    template = load_recipe(path.resolve()).prompt if path.exists() else ""
    if lang and not template:
        raise InputError(
            f"The captioner {model} was not trained with a language: leave out --lang."
        )
    return template.format(lang=lang or "en") if template else None


def _demo(arguments: argparse.Namespace) -> int:
    from captionlib import demo

    print(demo.run(load_recipe("scenes")))
    return 0
