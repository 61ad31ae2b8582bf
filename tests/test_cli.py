"""The command line on a user's own table, and a user's mistakes: one line, exit status 2."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import TINY_GPT2, TINY_VIT

from captionlib import cli, glue, load_dataset, read_captions, steps
from captionlib.dataset import accounting
from captionlib.recipe import bundled, load_recipe
from captionlib.scene_server import SceneServer, scene_table


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def prepared(workplace):
    assert run("check", "--recipe", "tiny.yaml") == 0
    assert run("build", "--recipe", "tiny.yaml") == 0


def start(workplace, *arguments, **options):
    """The command in a process group of its own, as a shell starts it."""
    command = [sys.executable, "-m", "captionlib", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=workplace, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_a_users_own_photographs_from_csv_to_caption(workplace, capsys):
    """The README's five lines."""
    prepared(workplace)
    assert run("train", "--recipe", "tiny.yaml") == 0
    assert run("evaluate", "--recipe", "tiny.yaml") == 0
    photos = sorted((workplace / "photos").iterdir())[:2]
    capsys.readouterr()
    assert run("caption", *photos, "--model", "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(photo) for photo in photos]
    scores = pd.read_csv("run/scores-test.csv")
    assert set(scores.system) == {"model", "wrong images", "constant"}
    # the same command again: the finished run is reused, another recipe's is not overwritten
    before = (workplace / "run/model.safetensors").stat().st_mtime_ns
    assert run("train", "--recipe", "tiny.yaml") == 0
    assert (workplace / "run/model.safetensors").stat().st_mtime_ns == before
    assert run("train", "--recipe", "tiny.yaml", "--set", "train.max_steps=9") == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_downloading_never_touches_a_folder_of_ones_own(workplace):
    before = {path: path.read_bytes() for path in (workplace / "photos").iterdir()}
    assert run("download", "--table", "captions.csv", "--images", "photos") == 2
    assert {path: path.read_bytes() for path in (workplace / "photos").iterdir()} == before


def test_a_handful_of_photographs_and_no_validation_split(workplace):
    """Three images: no val of 5 %, were it rounded; then a table that names train alone."""
    text = (workplace / "captions.csv").read_text("utf-8").splitlines()
    (workplace / "few.csv").write_text("\n".join(text[:16]) + "\n", "utf-8")
    names = {line.rsplit(",", 1)[1] for line in text[1:16]}
    split = "\n".join(f"{name},a red circle,train" for name in names)
    (workplace / "train.csv").write_text(f"filename,caption,split\n{split}\n", "utf-8")
    for table, splits in (("few.csv", {"train", "val", "test"}), ("train.csv", {"train"})):
        options = ["--recipe", "tiny.yaml", "--table", table, "--data-dir", table[:3]]
        options += ["--run-dir", f"run-{table[:3]}", "--set", "train.eval_strategy=steps"]
        assert run("check", *options) == 0
        assert run("build", *options) == 0
        assert set(load_dataset(f"{table[:3]}/dataset")) == splits
        assert run("train", *options) == 0


@pytest.mark.parametrize(
    "wrong",
    ["dataset.val=2.0", "dataset.val=-1", "dataset.val=.nan", "dataset.quality=900"],
)
def test_shares_and_sizes_out_of_range_are_refused(workplace, wrong, capsys):
    assert run("check", "--recipe", "tiny.yaml") == 0
    assert run("build", "--recipe", "tiny.yaml", "--set", wrong) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_is_not_scored_on_another_split_of_the_pictures(workplace, capsys):
    prepared(workplace)
    assert run("train", "--recipe", "tiny.yaml") == 0
    assert run("build", "--recipe", "tiny.yaml", "--set", "dataset.seed=5") == 0
    assert run("evaluate", "--recipe", "tiny.yaml") == 2
    assert "trained on another dataset" in capsys.readouterr().err


def test_the_recipe_for_pretrained_halves_has_the_decoders_tokenizer(workplace):
    """The example in my_data.yaml's comment, read as YAML."""
    lines = cli.load_recipe.__globals__["_find"]("my_data").read_text("utf-8").splitlines()
    example = [line[4:] for line in lines if line.startswith("#   ") and ":" in line]
    start_line = next(i for i, line in enumerate(example) if line.startswith("base:"))
    (workplace / "own.yaml").write_text("\n".join(example[start_line:]), "utf-8")
    recipe = load_recipe("own.yaml")
    assert recipe.tokenizer == {}
    assert recipe.encoder.startswith("google/")
    assert recipe.train["learning_rate"] == 5e-5
    assert recipe.train["muon_learning_rate"] == 0


def test_a_mistake_does_not_lock_the_run(workplace, capsys):
    prepared(workplace)
    assert run("train", "--recipe", "tiny.yaml", "--set", "train.lerning_rate=0.1") == 2
    assert "lerning_rate" in capsys.readouterr().err
    assert run("train", "--recipe", "tiny.yaml", "--set", "train.learning_rate=5e-5") == 0


def test_table_and_images_without_a_recipe(workplace, capsys):
    assert run("check", "--table", "captions.csv", "--images", "photos") == 0
    assert run("build", "--table", "captions.csv", "--images", "photos", "--lang", "en") == 0
    assert set(load_dataset("data/my_data/dataset")["train"][0]["langs"]) == {"en"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--table", "nowhere.csv", "--images", "photos"], "No captions table at"),
        (["check", "--table", "nocolumn.csv", "--images", "photos"], "It begins: 'a,b'"),
        (["check", "--table", "empty.csv", "--images", "photos"], "has no rows"),
        (["check", "--table", "gbk.csv", "--images", "photos"], "--encoding gbk"),
        (["check", "--table", "captions.csv", "--images", "void"], "No pictures of the table in"),
        (["check", "--table", "captions.csv", "--images", "nodir"], "No pictures of the table in"),
        (["build", "--table", "captions.csv", "--images", "photos"], "captionlib check"),
        (["train", "--table", "captions.csv", "--images", "photos"], "captionlib build"),
        (["check", "--recipe", "nowhere"], "No recipe 'nowhere'"),
        (["check", "--recipe", "typo.yaml"], "unknown key 'tabel': did you mean 'table'?"),
        (["check", "--recipe", "broken.yaml"], "is no YAML"),
        (["check", "--recipe", "flickr8k"], "wants a folder: give it with --folder"),
        (["check", "--recipe", "tiny.yaml", "--set", "train"], "write KEY=VALUE"),
        (["caption", "a.png", "--model", "no-such/model"], "No captioner 'no-such/model'"),
        (["caption", "a.png", "--model", "./nowhere"], "there is no such folder"),
        (["caption", "void", "--model", "run"], "No pictures in the folder void"),
        (["check", "--recipe", "tiny.yaml", "--data-dir", "captions.csv/x"], "Cannot write"),
        (["check", "--recipe", "tiny.yaml", "--set", "check.min_sied=4"], "mean min_side?"),
        (["check", "--recipe", "tiny.yaml", "--set", "check=[1"], "is no YAML value"),
        (["check", "--recipe", "tiny.yaml", "--set", "table.train=x.csv"], "No captions table"),
        (["download", "--recipe", "tiny.yaml"], "nothing to download"),
        (["check", "--recipe", "tiny.yaml", "--set", "check.min_side=x"], "must be like 16"),
        (["check", "--recipe", "tiny.yaml", "--set", "lang=[en]"], "lang in "),
        (["check", "--recipe", "tiny.yaml", "--set", "images=5"], "images in "),
        (["check", "--table", "commas.csv", "--images", "photos"], "with a comma in quotes"),
        (["check", "--table", "bad.json", "--images", "photos"], "bad.json is damaged"),
        (["download", "--table", "urls.csv", "--set", "download.tries=1.5"], "tries in download"),
        (["download", "--table", "urls.csv", "--set", "download.robots=maybe"], "robots in"),
        (["download", "--table", "urls.csv", "--from", "photos"], "leave out --table"),
        (["build", "--recipe", "tiny.yaml", "--set", "dataset.seed=1.5"], "seed in dataset"),
        (["check", "--recipe", "tiny.yaml", "--workers", "0"], "workers must be 1 or more"),
        (["caption", "a.png", "--model", "photos"], "holds no captioner"),
        (["caption", "a.png", "--model", "run", "--device", "banana"], "No captioner"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_a_remedy(workplace, arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (workplace / "nocolumn.csv").write_text("a,b\n1,2\n")
    (workplace / "empty.csv").write_text("text,filename\n")
    (workplace / "gbk.csv").write_bytes("text,filename\n一只猫在睡觉,1.jpg\n".encode("gbk"))
    (workplace / "commas.csv").write_text("text,filename\na dog, a park,1.jpg\n")
    (workplace / "bad.json").write_text('{"images": [1], "annotations": [{}]}')
    (workplace / "void").mkdir()
    (workplace / "typo.yaml").write_text("tabel: x.csv\n")
    (workplace / "broken.yaml").write_text("a: [1\n")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("captionlib: ")]) == 1


def test_a_gbk_table_is_read_when_its_encoding_is_named(workplace):
    name = next((workplace / "photos").iterdir()).name
    (workplace / "gbk.csv").write_bytes(f"text,filename\n一只猫,{name}\n".encode("gbk"))
    options = ["--table", "gbk.csv", "--images", "photos", "--encoding", "gbk", "--lang", "zh"]
    assert run("check", *options) == 0
    assert run("build", *options) == 0
    assert load_dataset("data/my_data/dataset")["train"]["captions"][0] == ["一只猫"]


def test_bad_rows_are_dropped_counted_and_write_nothing_outside(workplace):
    table = workplace / "captions.csv"
    text = table.read_text("utf-8")
    text += text.splitlines()[1] + "\n"
    text += 'a thief,,../../thief.png\n"  ",,train-000001.png\nabsolute,,/etc/hostname\n'
    table.write_text(text, "utf-8")
    assert run("check", "--recipe", "tiny.yaml") == 0
    assert run("build", "--recipe", "tiny.yaml") == 0
    states = accounting("data/dataset").set_index("state").rows
    assert states["dropped: unsafe file name"] == 2
    assert states["dropped: empty caption"] == 1
    assert states["dropped: repeated caption"] == 1
    assert states.sum() == len(read_captions("captions.csv"))


def test_pictures_without_a_suffix_are_found(workplace):
    (workplace / "plain").mkdir()
    photo = next((workplace / "photos").iterdir())
    (workplace / "plain" / "one").write_bytes(photo.read_bytes())
    (workplace / "plain.csv").write_text("filename,caption\none,a scene\n")
    assert run("check", "--table", "plain.csv", "--images", "plain") == 0


def test_an_unreadable_image_is_listed_and_the_others_are_captioned(workplace, tokenizer, capsys):
    glue(TINY_VIT, TINY_GPT2, tokenizer).save_pretrained("model")
    (workplace / "bad.png").write_bytes(b"no picture")
    good = sorted((workplace / "photos").iterdir())[0]
    capsys.readouterr()
    assert run("caption", "bad.png", good, "missing.png", "--model", "model") == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{good}\t")
    assert "bad.png: not an image" in printed.err
    assert "missing.png: no such file" in printed.err


def test_a_captioner_of_several_languages_takes_lang(workplace, tokenizer, capsys):
    glue(TINY_VIT, TINY_GPT2, tokenizer).save_pretrained("model")
    photo = sorted((workplace / "photos").iterdir())[0]
    assert run("caption", photo, "--model", "model", "--lang", "zh") == 2
    (workplace / "model/recipe.yaml").write_text('prompt: "<{lang}>"\n')
    assert run("caption", photo, "--model", "model", "--lang", "zh") == 0


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is of Unix")
@pytest.mark.parametrize(
    ("command", "limit"), [("check", 1000), ("build", 20_000), ("train", 60_000)]
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(workplace, command, limit):
    """RLIMIT_FSIZE stands in for the full disk: a write beyond it fails with EFBIG."""
    import resource

    if command != "check":
        assert run("check", "--recipe", "tiny.yaml") == 0
    if command == "train":
        assert run("build", "--recipe", "tiny.yaml") == 0

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(workplace, command, "--recipe", "tiny.yaml", preexec_fn=full)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert "Free some space" in error
    assert "Traceback" not in error
    assert not list(workplace.rglob("*.part"))
    assert run(command, "--recipe", "tiny.yaml") == 0


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are of Unix")
@pytest.mark.parametrize("command", ["check", "build"])
@pytest.mark.parametrize("seconds", [0.5, 1.5])
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_stopped_in_preparation_then_the_same_command_again(workplace, command, seconds, name):
    if command == "build":
        assert run("check", "--recipe", "tiny.yaml") == 0
    process = start(workplace, command, "--recipe", "tiny.yaml")
    time.sleep(seconds)
    number = signal.Signals[name]
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (130, 0, -number), error  # -2: before Python could listen
    assert number == signal.SIGKILL or not list(workplace.rglob("*.part"))
    assert run(command, "--recipe", "tiny.yaml") == 0
    assert not list(workplace.rglob("*.part"))
    if command == "build":
        assert accounting("data/dataset").rows.sum() == len(read_captions("captions.csv"))
    else:
        assert len(pd.read_parquet("data/checks.parquet")) == 24


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are of Unix")
def test_ctrl_c_while_downloading_then_only_the_rest_is_fetched(workplace):
    with SceneServer(port=0) as server:
        scene_table({"test": 1500}, server.url).to_csv("urls.csv", index=False)
        command = ["download", "--table", "urls.csv", "--set", "download.connections=4"]
        command.append("--allow-private")
        process = start(workplace, *command)
        while sum(server.requests.values()) < 100:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert not list(workplace.rglob("*.part"))
        asked = sum(server.requests.values())
        assert asked < 1500
        assert run(*command) == 0
        again = sum(server.requests.values()) - 1500
    assert again <= 8  # at most what was under way
    assert len(list((workplace / "data/my_data/images").glob("*.png"))) == 1500


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are of Unix")
def test_ctrl_c_while_training_then_the_same_command_goes_on_as_if_never_stopped(workplace):
    prepared(workplace)
    changes = {"max_steps": 60, "save_steps": 100}
    options = ["--recipe", "tiny.yaml"]
    for key, value in changes.items():
        options += ["--set", f"train.{key}={value}"]
    assert run("train", *options, "--run-dir", "never") == 0
    process = start(workplace, "train", *options)
    while not (workplace / "run/recipe.yaml").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(2.0)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    if process.returncode == 130:  # a fast machine may have finished
        assert "goes on from here" in error
    assert run("train", *options) == 0
    logs = [
        steps.finished(load_recipe("tiny.yaml", run_dir=folder, train=changes))
        for folder in ("never", "run")
    ]
    never, stopped = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert stopped == never


def test_every_bundled_recipe_loads_and_says_where_it_comes_from():
    for name in bundled():
        recipe = load_recipe(name, folder="somewhere")
        assert recipe.name == name
        path = cli.load_recipe.__globals__["_find"](name)
        assert path.read_text("utf-8").startswith("#")
        for word in ("Command", "Hardware"):
            assert word in path.read_text("utf-8"), f"{name}.yaml does not say its {word}"


def test_import_is_quick_and_brings_no_torch():
    code = """
import sys, time
start = time.perf_counter()
import captionlib
assert time.perf_counter() - start < 1
captionlib.download, captionlib.read_captions, captionlib.load_recipe
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_win_over_modules_of_the_same_name():
    import captionlib
    import captionlib.download
    import captionlib.glue

    assert callable(captionlib.download)
    assert callable(captionlib.glue)
