"""Reading caption tables: the known columns, and one clear line for each mistake."""

import gzip
import json
import os
import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captionlib import read_captions
from captionlib.errors import InputError
from captionlib.formats import recognise
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


CAT = {"filename": "1.jpg", "caption": "一只猫"}


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


COCO = {
    "info": {},
    "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "license": 3}],
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "猫がいる", "tokenized_caption": "猫 が いる"},
        {"image_id": 7, "id": 2, "caption": "黒い猫"},
    ],
}
KARPATHY = {
    "images": [
        {
            "filepath": "val2014", "filename": "COCO_val2014_7.jpg", "sentids": [1], "imgid": 0,
            "split": "restval", "sentences": [{"tokens": ["a", "cat"], "raw": "A cat."}],
        },
        {
            "filename": "8.jpg", "sentids": [2, 3], "imgid": 1, "split": "test",
            "sentences": [{"tokens": [], "raw": "A dog."}, {"tokens": [], "raw": "One dog."}],
        },
    ],
    "dataset": "coco",
}  # fmt: skip
AI_CHALLENGER = [{"url": "http://x/1.jpg", "image_id": "1.jpg", "caption": ["一只猫", "猫"]}]
JSONL = as_json({"text": "一只猫", "image": "1.jpg"}) + "\n"
KNOWN = {
    "coco": as_json(COCO),
    "karpathy": as_json(KARPATHY),
    "ai-challenger": as_json(AI_CHALLENGER),
    "flickr": '1.jpg#0\tA cat , "black"\n1.jpg#1\tCats\n',
    "flickr8k-cn": "1.jpg#zhc#0 一只 猫\n1.jpg#zhc#1 猫\n2.jpg#enc#0 a cat\n",
    "jsonl": JSONL + as_json({"image": "2.jpg", "text": ["a", "b"], "url": None}) + "\n",
    "csv": "text,url,filename\n一只猫,http://x/1.jpg,1.jpg\n",
    "tsv": 'filename\tcaption\n1.jpg\ta cat, a "dog"\n',
}
ROWS = {
    "coco": [
        ("train2014/COCO_train2014_000000000007.jpg", "猫がいる"),
        ("train2014/COCO_train2014_000000000007.jpg", "黒い猫"),
    ],
    "karpathy": [
        ("val2014/COCO_val2014_7.jpg", "A cat."),
        ("8.jpg", "A dog."),
        ("8.jpg", "One dog."),
    ],
    "ai-challenger": [("1.jpg", "一只猫"), ("1.jpg", "猫")],
    "flickr": [("1.jpg", 'A cat , "black"'), ("1.jpg", "Cats")],
    "flickr8k-cn": [("1.jpg", "一只 猫"), ("1.jpg", "猫"), ("2.jpg", "a cat")],
    "jsonl": [("1.jpg", "一只猫"), ("2.jpg", "a"), ("2.jpg", "b")],
    "csv": [("1.jpg", "一只猫")],
    "tsv": [("1.jpg", 'a cat, a "dog"')],
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("form", KNOWN)
def test_every_form_is_told_by_its_content_and_named_by_format(form, packed, tmp_path):
    data = KNOWN[form].encode()
    path = tmp_path / "table.dat"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert recognise(path, "utf-8") == form
    for table in (read_captions(path), read_captions(path, form)):
        assert list(table[["filename", "caption"]].itertuples(index=False, name=None)) == ROWS[form]
        assert set(table) <= {"filename", "caption", "url", "split", "lang", "prompt"}


@pytest.mark.parametrize("form", ["coco", "karpathy", "ai-challenger"])
def test_documents_written_over_many_lines_are_told_too(form, tmp_path):
    path = write(tmp_path / "a.json", json.dumps(json.loads(KNOWN[form]), indent=2))
    assert recognise(path, "utf-8") == form
    assert list(read_captions(path).caption) == [caption for _, caption in ROWS[form]]


def test_splits_and_languages_of_the_forms(tmp_path):
    karpathy = read_captions(write(tmp_path / "a", KNOWN["karpathy"]))
    assert list(karpathy.split) == ["train", "test", "test"]
    chinese = read_captions(write(tmp_path / "b", KNOWN["flickr8k-cn"]))
    assert list(chinese.lang) == ["zh", "zh", "en"]
    assert set(read_captions(write(tmp_path / "c", KNOWN["ai-challenger"])).lang) == {"zh"}


def test_parquet_columns_lists_and_categories(tmp_path):
    path = parquet(
        tmp_path / "a.csv",  # the suffix says nothing
        {
            "Image": ["1.jpg", "2.jpg", "3.jpg"],
            "captions": [["a", "b"], [], None],
            "jpg": [b"1", b"2", b"3"],
            "lang": pa.array(["en", None, "zh"]).dictionary_encode(),
        },
    )
    assert read_captions(path).to_dict("list") == {
        "filename": ["1.jpg", "1.jpg", "2.jpg", "3.jpg"],
        "caption": ["a", "b", "", ""],
        "lang": ["en", "en", "", "zh"],
    }
    urls = parquet(tmp_path / "b", {"URL": ["http://x/1.png"], "TEXT": ["x"], "key": ["0"]})
    assert read_captions(urls).filename[0].endswith(".png")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "coco"])
def test_all_forms_come_in_pieces(form, tmp_path):
    names = [f"{i}.jpg" for i in range(25)]
    texts = [f"caption, {i}" for i in range(25)]
    path = tmp_path / "a"
    table = pd.DataFrame({"filename": names, "caption": texts})
    if form == "coco":
        images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        notes = [{"image_id": i, "caption": text} for i, text in enumerate(texts)]
        write(path, as_json({"images": images, "annotations": notes}))
    elif form == "csv":
        table.to_csv(path, index=False)
    elif form == "jsonl":
        write(path, "\n\n".join(map(as_json, table.to_dict("records"))))
    else:
        table.to_parquet(path)
    parts = list(iter_captions(path, rows=10))
    assert [len(part) for part in parts] == [10, 10, 5]
    assert [name for part in parts for name in part.filename] == names
    assert read_captions(path).caption.to_list() == texts


def test_both_take_a_list_and_several_a_split(tmp_path):
    paths = [write(tmp_path / f"{i}.csv", f"filename,caption\n{i}.jpg,x\n") for i in range(3)]
    for tables in (paths, {"train": paths[:2], "val": str(paths[2])}):
        parts = list(iter_captions(tables))
        assert [part.filename[0] for part in parts] == ["0.jpg", "1.jpg", "2.jpg"]
        pd.testing.assert_frame_equal(
            pd.concat(parts, ignore_index=True), read_captions(tables), check_dtype=False
        )
    assert list(read_captions(tables).split) == ["train", "train", "val"]
    with pytest.raises(InputError, match="No caption table is named"):
        read_captions([])


@pytest.mark.parametrize(
    "text",
    [
        "filename;caption\n1.jpg;一只猫\n",
        "filename\tcaption\n1.jpg\t一只猫\n",
        "image_name| comment_number| comment\n1.jpg| 0|一只猫\n",
        "\ufefffilename,caption\n1.jpg,一只猫\n",
        '\ufeff"caption","filename"\n"一只猫","1.jpg"\n',
        "\n\nfilename,caption\r\n1.jpg,一只猫\r\n",
        "一只猫,1.jpg\n",  # no header
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_delimiters_marks_and_no_header(text, encoding, tmp_path):
    path = write(
        tmp_path / "a.csv", text.removeprefix("\ufeff") if encoding != "utf-8" else text, encoding
    )
    assert read_captions(path)[["filename", "caption"]].to_dict("records") == [CAT]


def test_a_table_without_header_has_its_columns_guessed(tmp_path):
    path = write(tmp_path / "cc3m.tsv", "a dog, and a cat\thttp://x/1.jpg\nb\thttp://x/2.jpg\n")
    assert list(read_captions(path).caption) == ["a dog, and a cat", "b"]
    path = write(tmp_path / "s0.csv", "一只猫,http://x/1.jpg,1.jpg\n狗,http://x/2.jpg,2.jpg\n")
    assert list(read_captions(path).filename) == ["1.jpg", "2.jpg"]


def test_quotes_and_newlines_in_quotes(tmp_path):
    path = write(tmp_path / "a.csv", 'filename,caption\n1.jpg,"a ""big"",\nred cat"\n2.jpg,x\n')
    assert list(read_captions(path).caption) == ['a "big",\nred cat', "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"hello, world\nsecond \x1b[31m line", r"begins: 'hello, world' \| 'second \\x1b.*jsonl"),
        (b"[1, 2]", r"begins: '\[1, 2\]'.*Known forms"),
        (b'{"a": 1}', "no column caption .*Its columns are: a"),
        (b'filename,"wrong\nname"\n1.jpg,x\n', "Its columns are: filename, wrong name"),
        (b"PK\x03\x04\0\0\0\0", "binary file that begins 'PK"),
        (b"PAR1 cut", "cannot be read as parquet"),
        (KNOWN["coco"][:-30], "cannot be read as coco.*damaged"),
        (as_json(COCO | {"annotations": {}}), "not lists of objects"),
        (as_json({"images": COCO["images"]}), "has no 'images' and 'annotations'"),
        (
            as_json(COCO | {"annotations": [{"image_id": 7, "caption": 5}]}),
            "record 1: caption is 5",
        ),
        (as_json(COCO | {"annotations": [{"image_id": 9, "caption": "x"}]}), "record 1: filename"),
        (as_json(COCO | {"annotations": [{"image_id": 7}]}), "record 1: caption is None"),
        (as_json(COCO | {"images": [{"id": [7], "file_name": {}}]}), "record 1: filename is "),
        (as_json({"images": [{"sentids": [], "filename": "x"}]}), "record 1: caption is None"),
        (as_json([{"image_id": 391895, "caption": "x"}]), "record 1: filename is 391895"),
        (JSONL + '{"image": "1.jpg", "te', "line 2, is no JSON: Unterminated"),
        (JSONL + "[" * 100_000, "line 2, is no JSON"),
        (JSONL + "[]", r"line 2, is no JSON object: '\[\]'"),
        (KNOWN["flickr"] + "2.jpg#0 no tab\n", "line 3, is not `name.jpg#0 caption`"),
        ("filename,caption\n1.jpg,x\n2.jpg,y,z,z\n", "line 3, saw 4"),
        ('filename,caption\n1.jpg,"x\n2.jpg,y\n', "EOF inside string starting at row 1"),
        (gzip.compress(b"filename,caption\n" + os.urandom(9999))[:-99], "cannot be read"),
        (gzip.compress(KNOWN["coco"].encode())[:-9], "cannot be read.*end-of-stream"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(content, message, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_captions(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("row", "filename", "caption"),
    [
        ('{"image": "1.jpg", "text": null}', "1.jpg", ""),
        ('{"image": "1.jpg"}', "1.jpg", ""),
        ('{"image": 7, "text": "x"}', "", "x"),
        ('{"image": "1.jpg", "text": "half \\ud83d"}', "1.jpg", "half ?"),
    ],
)
def test_one_bad_row_is_kept_for_the_accounting(row, filename, caption, tmp_path):
    path = write(tmp_path / "a.jsonl", JSONL + row)
    table = read_captions(path)
    assert table.iloc[-1][["filename", "caption"]].to_list() == [filename, caption]
    assert table.caption[0] == "一只猫"


def test_a_folder_and_numbers_in_parquet_are_no_captions(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_captions(tmp_path)
    path = parquet(tmp_path / "a", {"filename": ["1.jpg"], "caption": [5]})
    with pytest.raises(InputError, match="record 1: caption is 5, not text"):
        read_captions(path)
    with pytest.raises(InputError, match="no column caption .* columns are: key, n"):
        read_captions(parquet(tmp_path / "b", {"key": ["1"], "n": [5]}))


# The scale of the issue: 5 million rows, Chinese captions of about 80 bytes, a URL and a name each.
MILLIONS = 5
CAPTION = "一只黑色的猫坐在红色的木头椅子上看着窗外的雪, 图 @-"


def write_millions(path, form):
    """In pieces of 10,000 rows; each row is a different one."""
    rows = [
        {
            "text": f"{CAPTION}{i}",
            "url": f"http://pictures.example/@/{i}.jpg",
            "filename": f"@/{i}.jpg",
        }
        for i in range(10_000)
    ]
    if form == "parquet":
        columns = {name: "\n".join(row[name] for row in rows) for name in rows[0]}
        schema = pa.schema({name: pa.string() for name in columns})
        with pq.ParquetWriter(path, schema) as file:
            for i in range(MILLIONS * 100):
                texts = (text.replace("@", str(i)).split("\n") for text in columns.values())
                file.write_table(pa.table(dict(zip(columns, texts, strict=True))))
        return
    separator = "\t" if form == "tsv" else ","
    head = "" if form == "jsonl" else separator.join(rows[0]) + "\n"
    lines = (
        as_json(r) if form == "jsonl" else separator.join(f'"{v}"' for v in r.values())
        for r in rows
    )
    piece = "\n".join(lines) + "\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(head)
        for i in range(MILLIONS * 100):
            file.write(piece.replace("@", str(i)))


MEASURE = """
import sys, resource
from captionlib.sources import iter_captions, read_captions
function, path = sys.argv[1:]
rows = len(read_captions(path)) if function == "read" else sum(map(len, iter_captions(path)))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource.getrusage")
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_five_million_rows_are_streamed_in_1_gb_and_held_in_3(form, tmp_path):
    path = tmp_path / "table"
    write_millions(path, form)
    try:
        for function, gigabytes in {"iter": 1, "read": 3}.items():
            if function == "iter" or form == "csv":
                command = [sys.executable, "-c", MEASURE, function, str(path)]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                rows, peak = map(int, result.stdout.split())
                assert rows == MILLIONS * 1_000_000
                assert peak * (1 if sys.platform == "darwin" else 1024) < gigabytes * 1e9
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:/x", "\\x", "a\0b", "\\\\host\\x"])
def test_names_that_leave_the_folder_are_unsafe(name, tmp_path):
    assert safe_path(tmp_path, name) is None


def test_names_inside_the_folder_are_safe(tmp_path):
    assert safe_path(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"
