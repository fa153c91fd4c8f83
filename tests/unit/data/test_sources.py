import io
import json

import datasets
import pytest
from PIL import Image

from tuning.data.images import list_images, load_image
from tuning.data.open_source import open_source
from tuning.errors import UserError

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def open_rows(path, **options):
    return open_source(str(path), **{"text_field": "messages", "image_field": "images", **options})


def picture(color="red", size=(6, 4)) -> Image.Image:
    return Image.new("RGB", size, color)


def as_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_json(file, rows, **extra):
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = [{"messages": MESSAGES, "images": None, **extra, **row} for row in rows]
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in columns), encoding="utf-8")
    else:
        file.write_text(json.dumps(columns), encoding="utf-8")
    return file


def dataset_of_pictures(colors, *, many: bool) -> datasets.Dataset:
    stored = [{"bytes": as_png(picture(color)), "path": None} for color in colors]
    feature = datasets.List(datasets.Image()) if many else datasets.Image()
    text = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    return datasets.Dataset.from_dict(
        {"messages": [MESSAGES] * len(colors), "images": [[one] for one in stored] if many else stored},
        features=datasets.Features({"messages": text, "images": feature}),
    )


def colors_of(source, field="images"):
    found = []
    for index in range(len(source)):
        row = source[index]
        found.append(
            [load_image(one, row.folder, row.where).getpixel((0, 0)) for one in list_images(row.columns[field])]
        )
    return found


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_rows_are_read_with_paths_relative_to_the_file(tmp_path, suffix):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    picture("red").save(tmp_path / "data" / "pictures" / "a.png")
    picture("blue").save(tmp_path / "data" / "b.png")
    rows = [{"images": ["pictures/a.png", "b.png"]}, {"images": [str(tmp_path / "data" / "b.png")]}, {"images": []}]
    source = open_rows(write_json(tmp_path / "data" / f"rows{suffix}", rows))
    assert len(source) == 3
    assert source[0].columns["messages"] == MESSAGES
    assert source[1].folder == tmp_path / "data"
    assert colors_of(source) == [[RED, BLUE], [BLUE], []]


def test_json_row_may_hold_one_image_path_alone(tmp_path):
    picture("blue").save(tmp_path / "b.png")
    source = open_rows(write_json(tmp_path / "rows.json", [{"images": "b.png"}, {"images": None}]))
    assert colors_of(source) == [[BLUE], []]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_image_features_are_read_as_stored_bytes(tmp_path, kind, many):
    rows = dataset_of_pictures(["red", "blue"], many=many)
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        rows.to_parquet(str(path))
    elif kind == "arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(path), features=rows.features) as writer:
            for row in rows.with_format(None).cast_column("images", rows.features["images"]):
                writer.write(row)
            writer.finalize()
    else:
        rows.save_to_disk(str(path))
    source = open_rows(path)
    stored = source[0].columns["images"]
    stored = stored[0] if many else stored
    assert stored["bytes"] == as_png(picture("red"))
    assert colors_of(source) == [[RED], [BLUE]]


def test_images_are_not_decoded_when_a_row_is_read(tmp_path):
    rows = dataset_of_pictures(["red"], many=True)
    broken = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    broken = broken.map(lambda row: {"images": [{"bytes": b"not an image", "path": None}]})
    broken.cast_column("images", datasets.List(datasets.Image())).to_parquet(str(tmp_path / "rows.parquet"))
    row = open_rows(tmp_path / "rows.parquet")[0]
    assert row.columns["images"][0]["bytes"] == b"not an image"


def test_where_names_file_and_row(tmp_path):
    file = write_json(tmp_path / "rows.jsonl", [{}, {}])
    assert [open_rows(file)[index].where for index in range(2)] == [f"{file}, row 0", f"{file}, row 1"]


def test_where_counts_rows_of_each_file_from_0(tmp_path):
    one = write_json(tmp_path / "a.json", [{}, {}])
    two = write_json(tmp_path / "b.jsonl", [{}])
    source = open_rows(tmp_path)
    assert [source[index].where for index in range(3)] == [f"{one}, row 0", f"{one}, row 1", f"{two}, row 0"]
    with pytest.raises(IndexError):
        source[3]


def test_row_folder_is_that_of_its_own_file(tmp_path):
    for name, color in (("a", "red"), ("b", "blue")):
        write_json(tmp_path / name / "rows.json", [{"images": ["picture.png"]}])
        picture(color).save(tmp_path / name / "picture.png")
    assert colors_of(open_rows(tmp_path)) == [[RED], [BLUE]]


@pytest.mark.parametrize(
    ("split", "names"),
    [(None, ["train.json"]), ("train", ["train.json"]), ("validation", ["dev.json"]), ("test", ["my-eval-set.jsonl"])],
)
def test_folder_gives_the_files_of_a_split(tmp_path, split, names):
    for name in ("train.json", "dev.json", "my-eval-set.jsonl"):
        write_json(tmp_path / "rows" / name, [{}])
    source = open_rows(tmp_path / "rows", split=split)
    assert [file.name for file in source.files] == [str(tmp_path / "rows" / name) for name in names]


def test_folder_whose_names_speak_of_no_split_is_read_whole(tmp_path):
    for name in ("trained_cats.json", "b.jsonl", ".hidden.json"):
        write_json(tmp_path / "rows" / name, [{}])
    assert len(open_rows(tmp_path / "rows")) == len(open_rows(tmp_path / "rows", default_split="validation")) == 2


def test_folder_without_the_split_lists_those_it_has(tmp_path):
    for name in ("train.json", "test.json"):
        write_json(tmp_path / "rows" / name, [{}])
    with pytest.raises(UserError, match="there is no split 'validation', only: test, train"):
        open_rows(tmp_path / "rows", split="validation")


def test_folder_without_data_files_is_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match=r"the folder has no \.jsonl, .*, \.parquet, \.arrow file"):
        open_rows(tmp_path / "rows")


def test_saved_dataset_dict_gives_its_split(tmp_path):
    saved = datasets.DatasetDict(
        train=dataset_of_pictures(["red"], many=True), held_out=dataset_of_pictures(["blue"], many=True)
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    assert colors_of(open_rows(tmp_path / "saved")) == [[RED]]
    assert colors_of(open_rows(tmp_path / "saved", split="held_out")) == [[BLUE]]
    with pytest.raises(UserError, match="there is no split 'validation', only: train, held_out"):
        open_rows(tmp_path / "saved", split="validation")


def test_saved_dataset_with_chosen_rows_keeps_their_order(tmp_path):
    chosen = dataset_of_pictures(["red", "blue", "lime"], many=False).select([2, 0])
    chosen.save_to_disk(str(tmp_path / "saved"))
    assert colors_of(open_rows(tmp_path / "saved")) == [[(0, 255, 0)], [RED]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_field": "conversation"}, "there is no column 'conversation', only: messages, images, extra."),
        ({"image_field": "image"}, "there is no column 'image', only: messages, images, extra."),
    ],
)
def test_missing_column_lists_those_there_are(tmp_path, options, message):
    file = write_json(tmp_path / "rows.json", [{}], extra=1)
    with pytest.raises(UserError, match=message) as caught:
        open_rows(file, **options)
    assert caught.value.where == str(file)
    assert caught.value.fix in ("Set dataset_text_field messages.", "Set dataset_image_field.")


def test_columns_may_have_other_names(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"chat": MESSAGES, "photo": None, "id": 7}]), encoding="utf-8")
    assert set(open_rows(file, text_field="chat", image_field="photo")[0].columns) == {"chat", "photo"}


def test_broken_jsonl_line_is_named_by_file_and_row(tmp_path):
    file = write_json(tmp_path / "rows.jsonl", [{}, {}])
    with open(file, "a", encoding="utf-8") as lines:
        lines.write('{"messages": [\n')
    with pytest.raises(UserError, match="not valid JSON") as caught:
        open_rows(file)
    assert caught.value.where == f"{file}, row 2"


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".arrow"])
def test_broken_file_is_named(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(b"{ nothing of the kind")
    with pytest.raises(UserError, match=f"cannot be read as {suffix[1:]}") as caught:
        open_rows(file)
    assert caught.value.where == str(file)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow"])
def test_empty_file_is_refused(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    file.touch()
    with pytest.raises(UserError, match="the file is empty"):
        open_rows(file)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".json"])
def test_file_without_rows_is_refused(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    rows = dataset_of_pictures(["red"], many=True).select([])
    if suffix == ".parquet":
        rows.to_parquet(str(file))
    elif suffix == ".arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(file), features=rows.features) as writer:
            writer.finalize()
    else:
        file.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        open_rows(file)
    assert caught.value.where == str(file)


@pytest.mark.parametrize("name", ["rows.xlsx", "rows"])
def test_unknown_kind_of_file_lists_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("a,b", encoding="utf-8")
    with pytest.raises(UserError, match=r".* files cannot be read\. Use one of \.jsonl, .*, \.parquet, \.arrow"):
        open_rows(tmp_path / name)


def test_name_that_is_nowhere_is_named():
    with pytest.raises(
        UserError, match="there is no such file or folder, and the hub dataset could not be loaded"
    ) as caught:
        open_rows("no_such_rows")
    assert caught.value.where == "no_such_rows"


def test_identity_tells_changed_data_apart(tmp_path):
    file = write_json(tmp_path / "rows.json", [{}, {}])
    assert open_rows(file).fingerprint() == [[str(file), 2]]


def test_a_saved_dataset_without_rows_or_damaged_is_named(tmp_path):
    datasets.Dataset.from_dict({"messages": [], "images": []}).save_to_disk(tmp_path / "empty")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{}")
    for name in ("empty", "damaged"):
        with pytest.raises(UserError, match=name):
            open_source(str(tmp_path / name), text_field="messages", image_field="images")
