"""captionlib: encoder-decoder image captioning in Chinese, Japanese and English.

Letters used in every docstring: B images of a batch, K captions an image, L tokens of a row,
P patches (encoder positions), D width, V vocabulary, H x W pixels.

The public names are loaded on first use, so that `import captionlib` needs no torch.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

_HOME = {
    "read_captions": "sources",
    "iter_captions": "sources",
    "download": "download",
    "check_images": "images",
    "open_image": "images",
    "ImageError": "images",
    "build_dataset": "dataset",
    "load_dataset": "dataset",
    "CaptionCollator": "collator",
    "train_tokenizer": "tokenization",
    "glue": "glue",
    "Captioner": "generation",
    "Caption": "generation",
    "Explanation": "generation",
    "CaptionTrainer": "trainer",
    "CaptionTrainingArguments": "trainer",
    "score": "metrics",
    "load_recipe": "recipe",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'captionlib' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"captionlib.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Package(ModuleType):
    """`captionlib.download` and `captionlib.glue` are the functions, not the modules they are in.

    Importing a module of that name would else put itself in the function's place.
    """

    def __setattr__(self, name: str, value) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
