"""Read a recipe: one YAML file that says everything of an experiment.

Bundled ones are in captionlib/recipes; a path names any other. Used by every notebook and command.
"""

import copy
import difflib
import inspect
import os
import re
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import get_args, get_origin

import yaml

from captionlib.errors import InputError


@dataclass
class Recipe:
    """The sections of a recipe; each is passed to the function named in its comment."""

    name: str = "my_data"
    data_dir: str = "data/my_data"  # everything made from the data
    run_dir: str = "runs/my_data"  # checkpoints, curves and scores
    folder: str = ""  # where a source lies; "{folder}" and "{lang}" in paths are filled in
    table: str | list | dict | None = None  # read_captions; {split: path}; None: the drawn scenes
    format: str = "auto"
    encoding: str = "utf-8"
    lang: str = ""  # of a table without a column lang: en, zh or ja
    images: str | None = None  # a folder of pictures; None: downloaded to data_dir/images
    source: str = ""  # archives.take_in: tar shards, a folder, a dataset instead of a download
    scenes: dict = field(default_factory=dict)  # scene_server.scene_table
    prompt: str = ""  # before every caption; {lang} is filled in
    download: dict = field(default_factory=dict)  # download.Manners
    check: dict = field(default_factory=dict)  # images.check_image, images.write_checks
    dataset: dict = field(default_factory=dict)  # rows.Choices
    tokenizer: dict = field(default_factory=dict)  # tokenization.train_tokenizer; {}: the decoder's
    encoder: str | dict = ""  # glue.glue
    decoder: str | dict = ""
    train: dict = field(default_factory=dict)  # CaptionCollator, CaptionTrainingArguments
    generate: dict = field(default_factory=dict)  # transformers' generate
    evaluate: dict = field(default_factory=dict)  # split, images

    @property
    def images_dir(self) -> Path:
        return Path(self.images) if self.images else Path(self.data_dir) / "images"

    @property
    def dataset_dir(self) -> Path:
        return Path(self.data_dir) / "dataset"


def load_recipe(name=None, **changes) -> Recipe:
    """The recipe of that name or path, with `changes` to its top-level keys.

    name: by default the environment variable CAPTIONLIB_RECIPE, else "scenes". With
    CAPTIONLIB_SMOKE=1 the recipe's section `smoke` is laid over it. Relative paths are relative
    to the working directory, or to its parent when that is `notebooks`. Raises InputError.
    """
    name = str(name or os.environ.get("CAPTIONLIB_RECIPE") or "scenes")
    path = _find(name)
    content = _read(path)
    smoke = content.pop("smoke", None) or {}
    if os.environ.get("CAPTIONLIB_SMOKE") == "1":
        content = _merged(content, smoke)
    content = _merged(content, {key: value for key, value in changes.items() if value is not None})
    _check_keys(content, path)
    return _rooted(Recipe(**content))


def _read(path: Path) -> dict:
    """The file's keys, laid over those of the recipe it names as `base`."""
    try:
        content = read_yaml(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The recipe {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"The recipe {path} is not a mapping of keys to values.")
    base = content.pop("base", None)
    if base is None:
        return content
    if base not in bundled():
        raise InputError(f"The base of {path} must be one of {', '.join(bundled())}, not {base!r}.")
    return _merged(_read(_find(base)), content)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 5e-5 for text; people who write learning rates do not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str):
    """The value of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def bundled() -> list[str]:
    """The names of the recipes that come with the library."""
    files = resources.files("captionlib.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _find(name: str) -> Path:
    path = root() / name
    if not path.is_file() and name.removesuffix(".yaml") in bundled():
        return Path(
            str(resources.files("captionlib.recipes") / name.removesuffix(".yaml"))
        ).with_suffix(".yaml")
    if not path.is_file():
        raise InputError(
            f"No recipe {name!r}: give the path of a YAML file, or one of {', '.join(bundled())}."
        )
    return path


def root() -> Path:
    """Where relative paths begin: the working directory, from inside notebooks/ its parent."""
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def _merged(base: dict, over: dict) -> dict:
    """`over` laid on `base`, mapping by mapping; an empty mapping clears what was there."""
    merged = copy.deepcopy(base)
    for key, value in over.items():
        nested = value and isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def _check_keys(content: dict, path: Path) -> None:
    known = {f.name: f for f in fields(Recipe)}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise InputError(f"The recipe {path} has an unknown key {key!r}: {hint}")
        kinds = get_args(known[key].type) or (known[key].type,)
        kinds = tuple(get_origin(kind) or kind for kind in kinds)
        if not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise InputError(f"{key} in {path} must be {names}, not {value!r}.")


KINDS = {int: int, float: (int, float), bool: bool, str: str}


def check_section(section: dict, name: str, function) -> None:
    """InputError for a key that is no option of the function, or a value of another kind."""
    options = inspect.signature(function).parameters
    known = {key: each for key, each in options.items() if each.default is not each.empty}
    for key, value in section.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1) or list(known)
            raise InputError(f"Unknown key {key!r} in {name}: did you mean {', '.join(near)}?")
        default, kind = known[key].default, KINDS.get(known[key].annotation)
        if kind and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise InputError(f"{key} in {name} must be like {default!r}, not {value!r}.")
        kind = (int, float) if type(default) in (int, float) else type(default)
        plain = isinstance(default, int | float | str) and not isinstance(default, bool)
        if plain and (not isinstance(value, kind) or isinstance(value, bool) or value != value):
            raise InputError(f"{key} in {name} must be like {default!r}, not {value!r}.")


def _rooted(recipe: Recipe) -> Recipe:
    """Paths filled in ({folder}, {lang}) and made absolute."""

    def rooted(value):
        if isinstance(value, dict):
            return {key: rooted(each) for key, each in value.items()}
        if isinstance(value, list):
            return [rooted(each) for each in value]
        if "{folder}" in str(value) and not recipe.folder:
            raise InputError(f"The recipe {recipe.name} wants a folder: give it with --folder.")
        filled = str(value).replace("{folder}", recipe.folder).replace("{lang}", recipe.lang)
        return str(root() / filled)

    for name in ("data_dir", "run_dir", "table", "images"):
        if getattr(recipe, name):
            setattr(recipe, name, rooted(getattr(recipe, name)))
    return recipe


def as_text(recipe: Recipe) -> str:
    """The recipe as YAML, as it is written beside every run."""
    return yaml.safe_dump(asdict(recipe), allow_unicode=True, sort_keys=False)
