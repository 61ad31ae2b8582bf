"""The house rules: the README's tree, the size of the core, imports in one direction."""

import ast
import io
import re
import subprocess
import tokenize

import pytest
from conftest import ROOT

# A module may import only from the lines above its own (DESIGN: data flows one way).
LAYERS = [
    {"errors"},
    {"shards", "captions", "scenes", "plots", "optimizer", "duplicates", "formats"},
    {"images", "tokenization", "metrics", "scene_server", "recipe", "lessons", "ray_engine"},
    {"sources", "collator"},
    {"fetch", "rows", "archives", "packing", "generation"},
    {"download", "dataset"},
    {"glue", "trainer"},
    {"data_steps"},
    {"steps", "demo"},
    {"cli"},
]
LAZY = {  # imported inside a function
    ("images", "fetch"),  # open_image fetches a URL
    ("shards", "ray_engine"),  # an extra
}
# Code lines a room may have (LOG.md, 2026-11-21): each can be read in one sitting.
CLASSROOM = {"scenes", "scene_server", "demo", "lessons"}  # the drawn world of the demo
DATA = {
    "archives", "captions", "data_steps", "dataset", "download", "duplicates", "fetch", "formats",
    "images", "packing", "ray_engine", "rows", "shards", "sources",
}  # fmt: skip
ROOMS = {"classroom": 500, "data": 2200, "captioner": 2200}
FILES = sorted((ROOT / "captionlib").glob("*.py"))


def code_lines(path):
    """Lines with code on them: no blank lines, comments or docstrings."""
    source = path.read_text("utf-8")
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs |= set(range(node.lineno, node.end_lineno + 1))
    lines = set()
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in quiet and token.string.strip():
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def room(name):
    return "classroom" if name in CLASSROOM else "data" if name in DATA else "captioner"


def test_every_room_is_small():
    lines = {path.stem: code_lines(path) for path in FILES}
    assert max(lines.values()) <= 300, lines
    assert set(lines) >= CLASSROOM | DATA
    for name, limit in ROOMS.items():
        sizes = {stem: count for stem, count in lines.items() if room(stem) == name}
        assert sum(sizes.values()) <= limit, (name, sizes)


def test_imports_run_one_way():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in FILES:
        if path.stem.startswith("__"):
            continue
        assert path.stem in level, f"{path.name} has no place in LAYERS"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("captionlib"):
                parts = node.module.split(".")
                names = parts[1:2] or [alias.name for alias in node.names]
                for name in names:
                    if name in level and (path.stem, name) not in LAZY:
                        assert level[name] < level[path.stem], f"{path.stem} imports {name}"


def test_modules_and_public_functions_say_what_they_do():
    for path in FILES:
        tree = ast.parse(path.read_text("utf-8"))
        assert ast.get_docstring(tree), path.name
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                documented = ast.get_docstring(node) or len(node.body) == 1
                assert documented, f"{path.name}: {node.name}"


CACHES = {"__pycache__", ".pytest_cache", ".ruff_cache"}
MADE = CACHES | {".venv", ".git", "runs", "captionlib.egg-info"}


def tracked():
    """The files git knows or would take; without git, all that nothing here makes."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    names = run.stdout.splitlines() if run.returncode == 0 else _files(ROOT)
    return {name for name in names if (ROOT / name).exists()}


def _files(folder):
    for path in folder.iterdir():
        if path.name not in MADE:
            yield from _files(path) if path.is_dir() else [path.relative_to(ROOT).as_posix()]


def readme():
    return (ROOT / "README.md").read_text("utf-8")


def test_the_readme_ends_with_the_tree_of_the_files_present():
    tree = readme().rstrip().rsplit("```", 2)[1]
    listed, folders = {}, []
    for line in tree.strip().splitlines()[1:]:  # the first one is the folder of them all
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name, _, role = line.strip().partition("  ")
        folders[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            listed["/".join(folders)] = role.strip()
    assert set(listed) == tracked()
    assert all(listed.values()), "each file has its role beside it"


def test_the_readme_begins_with_what_it_is_one_picture_and_two_commands():
    screen = "\n".join(readme().splitlines()[:40])
    assert "make demo" in screen
    assert "make test" in screen
    assert len(re.findall(r"!\[[^]]*\]\(images/", screen)) == 1


def test_every_figure_is_used_and_every_shown_one_exists():
    shown = set(re.findall(r"\((?:\.\./)?images/([\w.-]+)\)", readme()))
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shown |= set(re.findall(r"\.\./images/([\w.-]+)", notebook.read_text("utf-8")))
    assert shown == {path.name for path in (ROOT / "images").iterdir()}


def test_commands_of_the_readme_exist():
    from captionlib.cli import _parser

    known = _parser()._subparsers._group_actions[0].choices
    used = set(re.findall(r"^\s*(?:\.venv/bin/)?captionlib (\w+)", readme(), re.M))
    assert used <= set(known)
    targets = set(re.findall(r"\bmake ([a-z-]+)", readme()))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.M))


@pytest.mark.parametrize("word", ["trust_remote_code", "pickle", "utils.py"])
def test_what_is_never_used(word):
    for path in FILES:
        assert word not in path.read_text("utf-8"), path.name
        assert path.name != word
