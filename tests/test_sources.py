"""Reading caption tables: the known columns, and one clear line for each mistake."""

import json

import pytest

from captionlib import read_captions
from captionlib.captions import caption_problem, clean_caption
from captionlib.errors import InputError
from captionlib.sources import iter_captions, safe_path


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding)
    return path


def test_zero_nlp_columns_and_other_names(tmp_path):
    s0 = read_captions(
        write(tmp_path / "a.csv", "text,url,filename\n一只猫,http://x/1.jpg,1.jpg\n")
    )
    assert s0.to_dict("records") == [
        {"filename": "1.jpg", "caption": "一只猫", "url": "http://x/1.jpg"}
    ]
    other = read_captions(write(tmp_path / "b.tsv", "Image\tCaption\n1.jpg\tnull\n"))
    assert other.to_dict("records") == [{"filename": "1.jpg", "caption": "null"}]


def test_several_tables_and_one_a_split(tmp_path):
    a = write(tmp_path / "a.csv", "filename,caption\n1.jpg,x\n")
    b = write(tmp_path / "b.csv", "filename,caption\n2.jpg,y\n")
    assert list(read_captions([a, b]).filename) == ["1.jpg", "2.jpg"]
    assert list(read_captions({"train": a, "val": b}).split) == ["train", "val"]


def test_a_table_of_urls_alone_gets_file_names(tmp_path):
    table = read_captions(
        write(tmp_path / "a.csv", "text,url\nx,http://h/a.jpg?s=1\ny,http://h/b\n")
    )
    assert table.filename[0].endswith(".jpg")
    assert table.filename[1].endswith(".img")
    assert table.filename.is_unique


def test_coco_and_stair_json(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "7.jpg", "coco_url": "http://h/7.jpg"}],
        "annotations": [{"image_id": 7, "id": 1, "caption": "猫がいる"}],
    }
    path = write(tmp_path / "stair.json", json.dumps(content))
    assert read_captions(path).to_dict("records") == [
        {"filename": "7.jpg", "caption": "猫がいる", "url": "http://h/7.jpg"}
    ]
    content["images"][0]["file_name"] = "COCO_val2014_000000000007.jpg"
    write(path, json.dumps(content))
    assert read_captions(path).filename[0] == "val2014/COCO_val2014_000000000007.jpg"


def test_gbk_is_named_and_read(tmp_path):
    path = write(tmp_path / "a.csv", "text,filename\n一只猫在睡觉,1.jpg\n", "gbk")
    with pytest.raises(InputError, match=r"is not utf-8 .*--encoding gbk"):
        read_captions(path)
    assert read_captions(path, encoding="gbk").caption[0] == "一只猫在睡觉"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No captions table at .*nowhere"),
        ("", "has no rows"),
        ("text,filename\n", "has no rows"),
        (
            "title_of_it,filename\nx,1.jpg\n",
            r"no column caption \(or text\).*title_of_it, filename",
        ),
        ("text,name_of_it\nx,1.jpg\n", r"no column filename \(or url\)"),
    ],
)
def test_mistakes_are_named_in_one_line(content, message, tmp_path):
    path = tmp_path / "nowhere.csv"
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_captions(path)
    assert "\n" not in str(error.value)


def test_unknown_format_encoding_and_json(tmp_path):
    path = write(tmp_path / "a.csv", "text,filename\nx,1.jpg\n")
    with pytest.raises(InputError, match="No format 'xlsx'"):
        read_captions(path, format="xlsx")
    with pytest.raises(InputError, match="No encoding 'klingon'"):
        read_captions(path, encoding="klingon")
    with pytest.raises(InputError, match="cannot be read as coco"):
        read_captions(path, format="coco")


def test_iter_captions_gives_all_rows_in_pieces(tmp_path):
    lines = "".join(f"caption {i},{i}.jpg\n" for i in range(25))
    path = write(tmp_path / "a.csv", "text,filename\n" + lines)
    parts = list(iter_captions(path, rows=10))
    assert [len(part) for part in parts] == [10, 10, 5]
    assert [name for part in parts for name in part.filename] == [f"{i}.jpg" for i in range(25)]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:/x", "\\x", "a\0b", "\\\\host\\x"])
def test_names_that_leave_the_folder_are_unsafe(name, tmp_path):
    assert safe_path(tmp_path, name) is None


def test_names_inside_the_folder_are_safe(tmp_path):
    assert safe_path(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a  cat\t&amp; a dog \n", "a cat & a dog"),
        ("一只 黑 猫", "一只黑猫"),
        ("黑猫 cat 白猫", "黑猫 cat 白猫"),
        ("猫\u0000が いる", "猫がいる"),
        ("cafe\u0301", "café"),
        ("Ｔシャツ", "Ｔシャツ"),  # full-width stays: it is Japanese spelling
    ],
)
def test_cleaning_changes_only_what_is_not_language(text, clean):
    assert clean_caption(text) == clean
    assert clean_caption(clean) == clean


def test_problems_of_captions():
    assert caption_problem(clean_caption("   "), 10) == "empty caption"
    assert caption_problem("...", 10) == "caption without a letter"
    assert caption_problem("x" * 11, 10) == "caption longer than 10 characters"
    assert caption_problem("一只猫", 10) == ""
