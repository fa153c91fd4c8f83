"""Files that we read ourselves: JSON lines, tables and tar archives, converted or streamed."""

import csv
import gzip
import io
import itertools
import json
import os
import tarfile

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from tuning.config.rules import DATA_SUFFIXES
from tuning.data.dataset import StreamedRows
from tuning.data.images import list_images, load_image
from tuning.data.open_source import SUFFIXES, open_source
from tuning.data.sources import Stream, read_file
from tuning.errors import UserError

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
MIXED = [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def open_rows(path, **options):
    return open_source(str(path), **{"text_field": "messages", "image_field": "images", **options})


def read_all(path, **options):
    """The columns of all rows, converted and streamed, which must agree."""
    converted = [row.columns for row in open_rows(path, **options)]
    streamed = read_streamed(path, **options)
    added = (
        {} if {"images", "image"} & converted[0].keys() else {"images": None}
    )  # a stream does not know which columns come
    assert [row.columns for row in streamed] == [{**columns, **added} for columns in converted]
    return converted


def read_streamed(path, **options):
    rows = [row for file in open_rows(path, streaming=True, **options).files for row in read_file(file)]
    if isinstance(rows[-1], UserError):
        raise rows[-1]
    return rows


def conversations(path, **options):
    """Messages and images of all rows."""
    read = [row.format.read(row.columns, row.where) for row in open_rows(path, **options)]
    return [(one.messages, one.images) for one in read]


def png(color="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(stream, "PNG")
    return stream.getvalue()


def write_lines(file, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


def write_table(file, rows, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def write_tar(file, members):
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def test_the_options_and_the_readers_know_the_same_files():
    assert set(DATA_SUFFIXES) == set(SUFFIXES)


# --- JSON ---


@pytest.mark.parametrize("messages", [MESSAGES, MIXED])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n\n\n",
        lambda text: "\n \n" + text,
        lambda text: text.replace("\n", "\n\n"),
        lambda text: text.replace("\n", "\r\n") + "\r\n",
        lambda text: "\ufeff" + text,
        lambda text: "\ufeff\n" + text,
    ],
)
def test_empty_lines_and_a_byte_order_mark_are_passed_over(tmp_path, change, messages):
    file = write_lines(tmp_path / "rows.jsonl", [{"messages": messages, "images": None}] * 2)
    file.write_bytes(change(file.read_text()).encode())
    assert read_all(file) == [{"messages": messages, "images": None}] * 2


@pytest.mark.parametrize(
    "answer", ["42", "3.10", "true", "null", "[1, 2]", '{"a": 1}', '"quoted"', "2024-01-02", "1e5"]
)
def test_an_answer_that_looks_like_another_value_stays_text(tmp_path, answer):
    """`datasets` would make it a number, where other contents are lists."""
    rows = [{"messages": [MIXED[0], {"role": "assistant", "content": answer}]}, {"prompt": "q", "completion": answer}]
    assert read_all(write_lines(tmp_path / "mixed.jsonl", rows[:1]))[0]["messages"] == rows[0]["messages"]
    assert read_all(write_lines(tmp_path / "pairs.jsonl", rows[1:]))[0]["completion"] == answer


def test_values_whose_types_change_late_are_kept(tmp_path):
    rows = [{"messages": MESSAGES, "note": None, "score": 1}] * 1500
    rows += [{"messages": MIXED, "note": "n", "score": 0.5, "images": ["a.png"]}]
    rows += [{"messages": MIXED, "note": ["n"], "score": 2**70, "images": "b.png"}]
    columns = read_all(write_lines(tmp_path / "rows.jsonl", rows))
    assert columns[0] == {"messages": MESSAGES, "images": None}
    assert [row["images"] for row in columns[-2:]] == [["a.png"], "b.png"]


def test_an_image_column_of_the_other_usual_name_may_come_late_in_a_stream(tmp_path):
    talk = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": [{**talk[0], "value": "q"}, talk[1]]}] * 1500 + [
        {"conversations": talk, "image": "a.png"}
    ]
    (file,) = open_rows(write_lines(tmp_path / "rows.jsonl", rows), streaming=True).files
    assert [row.format.read(row.columns, row.where).images for row in read_file(file)][-1] == ["a.png"]


@pytest.mark.parametrize("content", ["[%s,\n%s]", "%s\n%s\n", "[\n%s,%s\n]\n"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson", "rows.json.gz", "ROWS.JSONL"])
def test_a_list_and_lines_are_known_by_their_content(tmp_path, name, content):
    text = content % ((json.dumps({"messages": MESSAGES}),) * 2)
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    assert len(read_all(file)) == 2


def test_one_row_over_several_lines_is_a_json_file(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"messages": MESSAGES}, indent=2))
    assert read_all(tmp_path / "rows.json") == [{"messages": MESSAGES}]


def bad_line(line: bytes) -> bytes:
    return b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n\n' + line


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"7\n", "expected a JSON object, found int 7"),
        (b'["a"]\n', "expected a JSON object, found list"),
        (b'{"messages": "caf\xe9"}\n', "the text is not UTF-8: byte 0xe9 at position 17"),
        (b'{"messages": "a \\ud83d b"}\n', r"half a character: \\ud83d"),
        (b'{"messages": "a \\uDE00 b"}\n', r"half a character: \\ude00"),
        (b'{"messages": \n', "not valid JSON"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_that_cannot_be_read_is_named_by_its_row(tmp_path, line, problem, streaming):
    (tmp_path / "rows.jsonl").write_bytes(bad_line(line))
    with pytest.raises(UserError, match=problem) as caught:
        read_streamed(tmp_path / "rows.jsonl") if streaming else open_rows(tmp_path / "rows.jsonl")
    assert caught.value.where == f"{tmp_path}/rows.jsonl, row 1"


def test_a_row_of_texts_with_half_a_character_is_one_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "\\ud83d"}\n')
    with pytest.raises(UserError, match=r"row 0: a text has half a character"):
        open_rows(tmp_path / "rows.jsonl")


def test_whole_characters_written_as_two_halves_are_read(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "\U0001f600"}])
    assert b"\\ud83d\\ude00" in file.read_bytes()
    assert read_all(file)[0]["completion"] == "\U0001f600"


def test_a_file_that_changes_is_converted_again(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [{"messages": MESSAGES}])
    assert len(open_rows(file)) == 1
    write_lines(file, [{"messages": MESSAGES}] * 3)
    assert len(open_rows(file)) == 3


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv.gz"])
def test_a_damaged_compressed_file_is_named(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    data = gzip.compress(b'{"messages": []}\n' * 1000)
    for broken in (data[: len(data) // 2], b"no gzip"):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="cannot be read"):
            open_rows(file)


# --- tables ---


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".tsv.gz"])
def test_cells_of_a_table_stay_text(tmp_path, suffix):
    answers = ["7", "007", "NA", "None", "null", "1.0", "True", "nan", "a, b\tc", 'say "x"', "two\nlines"]
    rows = [{"prompt": "q", "completion": answer, "image": ""} for answer in answers]
    file = write_table(tmp_path / f"rows{suffix}", rows, "\t" if ".tsv" in suffix else ",")
    assert [row["completion"] for row in read_all(file)] == answers
    assert {row["image"] for row in read_all(file)} == {None}


def test_a_table_of_a_spreadsheet_with_semicolons_and_a_byte_order_mark(tmp_path):
    file = write_table(tmp_path / "rows.csv", [{"prompt": "a, b", "completion": "x"}], ";")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_all(file) == [{"prompt": "a, b", "completion": "x"}]


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_and_images_in_a_table_are_read_from_their_text(tmp_path, write):
    talk = [{"role": "user", "content": "<image><image>q"}, {"role": "assistant", "content": "[1, 2]"}]
    file = write_table(tmp_path / "rows.csv", [{"messages": write(talk), "images": write(["a.png", "b.png"])}])
    ((messages, images),) = conversations(file)
    assert images == ["a.png", "b.png"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]
    assert messages[1]["content"] == [{"type": "text", "text": "[1, 2]"}]


def test_messages_as_text_in_parquet_are_read_too(tmp_path):
    datasets.Dataset.from_dict({"messages": [json.dumps(MESSAGES)], "images": [None]}).to_parquet(
        tmp_path / "r.parquet"
    )
    assert [part["text"] for message in conversations(tmp_path / "r.parquet")[0][0] for part in message["content"]] == [
        *("q", "a")
    ]


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        (b"prompt,completion\nq,a\nq,a,b\n", "row 1", "there are 3 cells, but 2 columns"),
        (b"prompt,completion\nq,a\nq\n", "row 1", "there are 1 cells, but 2 columns"),
        (b'prompt,completion\nq,"a" b\n', "row 0", "cannot be read"),
        (b'prompt,completion\nq,"a\n', "row 0", "cannot be read"),
        (b"prompt,completion\nq,caf\xe9\n", "line 2", "not UTF-8: byte 0xe9"),
        (b"prompt,prompt\nq,a\n", "", "several columns are called 'prompt'"),
    ],
)
def test_a_row_of_a_table_that_cannot_be_read_is_named(tmp_path, text, where, problem):
    (tmp_path / "rows.csv").write_bytes(text)
    with pytest.raises(UserError, match=problem) as caught:
        open_rows(tmp_path / "rows.csv")
    assert caught.value.where == ", ".join(filter(None, [f"{tmp_path}/rows.csv", where]))


def test_a_metadata_file_names_its_images_by_file_name(tmp_path):
    for kind in ("jsonl", "csv"):
        folder = tmp_path / kind
        (folder / "pictures").mkdir(parents=True)
        (folder / "pictures" / "a.png").write_bytes(png("blue"))
        row = {"file_name": "pictures/a.png", "prompt": "q", "completion": "a"}
        write = write_table if kind == "csv" else write_lines
        write(folder / f"metadata.{kind}", [row])
        (row,) = open_rows(folder)
        (image,) = row.format.read(row.columns, row.where).images
        assert load_image(image, row.folder, row.where).getpixel((0, 0)) == (0, 0, 255)
    other = write_lines(tmp_path / "other.jsonl", [{"file_name": "page.txt", "prompt": "q", "completion": "a"}])
    assert conversations(other)[0][1] == []


# --- tar ---


def colors(source):
    found = []
    for row in source:
        images = row.format.read(row.columns, row.where).images
        found.append([load_image(one, row.folder, row.where).getpixel((0, 0)) for one in images])
    return found


RED, BLUE = (255, 0, 0), (0, 0, 255)
ASKED = {"prompt": "q", "completion": "a"}


def test_the_files_of_one_name_are_a_row(tmp_path):
    members = {
        "./a.jpg": png("red"),
        "a.json": ASKED,
        "sub/a.1.png": png("blue"),
        "sub/a.0.png": png("red"),
        "sub/a.json": ASKED,
        "c.json": {**ASKED, "images": ["sub/a.1.png"]},
        "._a.jpg": b"of macOS",
    }
    file = write_tar(tmp_path / "shard-0.tar", members)
    assert colors(open_rows(file)) == [[RED], [BLUE, RED], [BLUE]]
    read_all(file)


def test_texts_may_stand_after_all_images(tmp_path):
    members = {"a.png": png("red"), "b.png": png("blue"), "a.json": ASKED, "b.json": ASKED, "t.json": ASKED}
    assert colors(open_rows(write_tar(tmp_path / "x.tar", members))) == [[RED], [BLUE], []]


def test_shards_of_a_folder_are_read_in_order(tmp_path):
    for number, color in enumerate(("red", "blue")):
        write_tar(tmp_path / f"train-{number:04}.tar", {"0.png": png(color), "0.json": ASKED})
    assert colors(open_rows(tmp_path)) == [[RED], [BLUE]]


def test_a_path_of_a_text_that_is_not_in_the_archive_gives_way_to_the_image_of_its_name(tmp_path):
    talk = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    members = {"7.jpg": png("blue"), "7.json": {"conversations": talk, "image": "coco/7.jpg"}}
    assert colors(open_rows(write_tar(tmp_path / "x.tar", members))) == [[BLUE]]


@pytest.mark.parametrize(
    ("members", "where", "problem"),
    [
        ({"a.png": png(), "b.json": ASKED}, "", "the image a.png belongs to no row"),
        ({"a.json": [1]}, ", row 0", "expected a JSON object"),
        ({"a.json": b"{"}, ", row 0", "not valid JSON"),
        (
            {"b.png": png(), "a.json": {**ASKED, "images": ["b.png", "c.png"]}},
            ", row 0, field 'images'",
            "no file c.png",
        ),
        ({"a.json": {**ASKED, "images": 7}}, ", row 0, field 'images'", "expected names of files"),
        ({"a.cls": b"1"}, "", "there are no rows"),
    ],
)
def test_a_bad_archive_is_named(tmp_path, members, where, problem):
    file = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=problem) as caught:
        open_rows(file)
    assert caught.value.where == f"{file}{where}"


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match="cannot be read as tar"):
        open_rows(tmp_path / "x.tar")


# --- parquet ---


def test_columns_without_a_type_of_datasets_are_left_out_by_name(tmp_path, capsys):
    table = pyarrow.table(
        {
            "prompt": ["q"],
            "completion": ["a"],
            "images": pyarrow.array([None], pyarrow.string()),
            "meta": pyarrow.array([[("k", "v")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    for streaming in (False, True):
        source = open_rows(tmp_path / "rows.parquet", streaming=streaming)
        assert next(read_file(source.files[0])).columns["completion"] == "a"
        assert "'meta' (map<string, string" in capsys.readouterr().out


def test_arrays_in_the_image_column_are_refused(tmp_path):
    features = datasets.Features(
        {**dict.fromkeys(ASKED, datasets.Value("string")), "image": datasets.Array3D((2, 2, 3), "uint8")}
    )
    rows = datasets.Dataset.from_dict({**{k: [v] for k, v in ASKED.items()}, "image": [[[[0] * 3] * 2] * 2]}, features)
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="the column 'image' has arrays of numbers"):
        open_rows(tmp_path / "rows.parquet")


# --- paths ---


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("name", ["a[1]", "b*", "c?", "{d,e}", "f [x] (1)", "g%20h", "#i", "[!j]"])
def test_a_path_is_no_pattern(tmp_path, name, suffix):
    for other in ("a1", "b2", "c3", "d", "f x (1)"):  # what the patterns would match
        folder = tmp_path / other
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"prompt": ["wrong"], "completion": ["wrong"]}).to_parquet(folder / f"a1{suffix}")
    folder = tmp_path / name
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"prompt": [name], "completion": ["a"], "image": ["x[1]*.png"]})
    file = folder / f"{name}{suffix}"
    {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](file)
    (folder / "x[1]*.png").write_bytes(png("blue"))
    (folder / "x1.png").write_bytes(png("red"))
    for path in (file, folder):
        (row,) = open_rows(path)
        assert row.columns["prompt"] == name
        assert load_image(*list_images(row.columns["image"]), row.folder, "row").getpixel((0, 0)) == BLUE


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_rows_are_the_same_with_any_number_of_workers(tmp_path, name, workers):
    """`datasets` gives each data worker other rows of a stream, and most workers none."""
    rows = [{"prompt": f"q{number}", "completion": "a"} for number in range(10)]
    lines = ["prompt,completion", *(f"{row['prompt']},{row['completion']}" for row in rows)]
    written = lines if name.endswith(".csv") else map(json.dumps, rows)
    (tmp_path / name).write_text("".join(f"{line}\n" for line in written))
    source = open_source(str(tmp_path / name), text_field="messages", image_field="images", streaming=True)
    streamed = StreamedRows(Stream(source.files), batch_size=2, seed=1)

    def first_batches(number_of_workers: int) -> list[list[int]]:
        loader = DataLoader(streamed, batch_size=2, num_workers=number_of_workers, collate_fn=list)
        return [[row.number for row in batch] for batch in itertools.islice(loader, 7)]

    alone = first_batches(0)
    assert sorted(itertools.chain(*alone[:5])) == list(range(10))
    assert first_batches(workers) == alone


def test_a_stream_without_rows_ends(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    source = open_source(str(tmp_path / "rows.jsonl"), text_field="messages", image_field="images", streaming=True)
    (tmp_path / "rows.jsonl").write_text("\n")
    (only,) = StreamedRows(Stream(source.files), batch_size=1, seed=1)
    assert "there are no rows" in str(only)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["000.json", "v1.001.json"], r"v1\.001\.json has a dot in its name"),
        (["000.json", "000.json"], r"000\.json is in the archive twice"),
    ],
)
def test_rows_of_an_archive_are_not_lost(tmp_path, names, problem):
    content = json.dumps({"prompt": "q", "completion": "a"}).encode()
    with tarfile.open(tmp_path / "rows.tar", "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=problem):
        open_rows(tmp_path / "rows.tar")


def test_a_file_that_is_written_again_with_the_same_time_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    for answer in ("aaa", "bbb"):
        path.write_text(json.dumps({"prompt": "q", "completion": answer}) + "\n")
        os.utime(path, ns=(1, 1))
        assert open_rows(path)[0].columns["completion"] == answer


def test_a_table_of_other_contents_beside_the_data_is_left_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    (tmp_path / "labels.csv").write_text("x,y\n1,2\n")
    assert [file.name for file in open_rows(tmp_path).files] == [str(tmp_path / "a.jsonl")]
    assert f"Left out, because it has no messages: {tmp_path / 'labels.csv'}." in capsys.readouterr().out


@pytest.mark.parametrize("empty", ["[]", [], None])
def test_no_image_can_be_written_in_many_ways(empty):
    assert list_images(empty) == []
