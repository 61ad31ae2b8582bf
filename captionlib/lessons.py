"""What the notebooks need of a classroom: quiet libraries, and a look at the answers."""

import datasets
import transformers

from captionlib.plots import use_fonts


def prepare() -> None:
    """No progress bars or warnings of `datasets` and `transformers`; a font for zh and ja."""
    use_fonts()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def check_answers(answers: dict[str, tuple]) -> None:
    """Print for each (given, right) whether it holds; ... is no answer yet, numbers to 1 %."""
    for question, (given, right) in answers.items():
        if given is ...:
            verdict = "not answered yet"
        elif isinstance(right, float) and isinstance(given, float | int):
            verdict = "right" if abs(given - right) <= 0.01 * abs(right) else "look again"
        else:
            verdict = "right" if given == right else "look again"
        print(f"{question}: {verdict}")
