"""Which rows `dataset_split` and `validation_split` take, from every kind of source."""

import json

import datasets
import pytest

from tuning.data.held_out import hold_out, share_out
from tuning.data.open_source import open_source
from tuning.data.sources import DataFile, Mixture, Source
from tuning.errors import UserError


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def row(number):
    return {"prompt": "q", "completion": str(number)}


def write(file, numbers):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in numbers))
    return file


def open_rows(path, split=None, **options):
    return open_source(str(path), text_field="messages", image_field="images", split=split, **options)


def answers(source):
    return [int(row.columns["completion"]) for row in source]


def make(kind, folder):
    """Ten rows, of which the split `train` consists."""
    if kind == "file":
        return write(folder / "all.jsonl", range(10))
    if kind in ("folder", "folder of one split"):
        name = "train-{}.jsonl" if kind == "folder of one split" else "{}.jsonl"
        write(folder / "data" / name.format(0), range(4))
        write(folder / "data" / name.format(1), range(4, 10))
        return folder / "data"
    rows = datasets.Dataset.from_list([row(number) for number in range(10)])
    if kind == "saved splits":
        rows = datasets.DatasetDict({"train": rows, "validation": rows.select([0, 1])})
    if kind == "parquet":
        rows.to_parquet(folder / "all.parquet")
        return folder / "all.parquet"
    rows.save_to_disk(str(folder / "saved"))
    return folder / "saved"


KINDS = ("file", "parquet", "folder", "folder of one split", "saved", "saved splits")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:50%]", range(5)),
        ("train[3:5]", range(3, 5)),
        ("train[-10%:]", [9]),
        ("train[8:100]", [8, 9]),
        ("train[:2]+train[-2:]", [0, 1, 8, 9]),
    ],
)
def test_a_part_of_a_split_of_every_source(tmp_path, kind, split, expected):
    source = open_rows(make(kind, tmp_path), split)
    assert answers(source) == list(expected)
    if kind in ("file", "saved"):
        assert [one.number for one in source] == list(expected)  # as they are counted in the file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("split", "problem"),
    [
        ("held_out", "there is no split 'held_out', only: train"),
        ("train+test", "there is no split 'test', only: train"),
        ("train[10:20]", "has no row: there are 10"),
        ("train[5:2]", "has no row"),
        ("train[a:b]", "is not a part of a split"),
    ],
)
def test_a_split_that_is_not_there_is_refused(tmp_path, kind, split, problem):
    with pytest.raises(UserError, match=problem):
        open_rows(make(kind, tmp_path), split)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_cannot_be_streamed(tmp_path, kind):
    path = make(kind, tmp_path)
    with pytest.raises(UserError, match="needs the number of rows, which streaming does not know"):
        open_rows(path, "train[:50%]", streaming=True)
    assert open_rows(path, "train", streaming=True).files


def test_several_splits_are_read_one_after_another(tmp_path):
    write(tmp_path / "d" / "train.jsonl", [1, 2])
    write(tmp_path / "d" / "dev.jsonl", [3])
    assert answers(open_rows(tmp_path / "d", "train+validation")) == [1, 2, 3]
    assert answers(open_rows(tmp_path / "d", "dev+train[1:]")) == [3, 2]
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list([row(1)]), "val": datasets.Dataset.from_list([row(2)])}
    )
    splits.save_to_disk(str(tmp_path / "saved"))
    both = open_rows(tmp_path / "saved", "train+val")
    assert [one.where for one in both] == [f"{tmp_path}/saved (train), row 0", f"{tmp_path}/saved (val), row 0"]
    assert answers(open_rows(tmp_path / "saved", default_split="validation")) == [2]


def test_a_file_is_the_split_of_its_name_too(tmp_path):
    file = write(tmp_path / "my_dev-set.jsonl", [1, 2])
    for split in ("train", "validation", "dev"):
        assert answers(open_rows(file, split)) == [1, 2]
    with pytest.raises(UserError, match="there is no split 'test', only: train, validation"):
        open_rows(file, "test")


# --- which files of a folder are read ---


@pytest.mark.parametrize(
    ("names", "split", "read", "left_out"),
    [
        (["train.jsonl", "docvqa.jsonl"], None, ["train.jsonl"], ["docvqa.jsonl"]),
        (["dev-notes.jsonl", "docvqa.jsonl"], None, ["docvqa.jsonl"], ["dev-notes.jsonl"]),
        (["data.jsonl", "data_val.jsonl"], "validation", ["data_val.jsonl"], ["data.jsonl"]),
        (["training_manual.jsonl", "test-bench.jsonl"], None, ["training_manual.jsonl"], ["test-bench.jsonl"]),
        (["train/validation.jsonl", "train/a.jsonl"], None, ["train/a.jsonl"], ["train/validation.jsonl"]),
        (["a.jsonl", "b.jsonl"], None, ["a.jsonl", "b.jsonl"], []),
        (["a.jsonl", "notes.xlsx", "b.JSONL"], None, ["a.jsonl", "b.JSONL"], ["notes.xlsx"]),
        (["a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "x.png"], None, ["a.jsonl"], []),
    ],
)
def test_the_files_of_a_folder_that_are_read_are_printed(tmp_path, capsys, names, split, read, left_out):
    for name in names:
        write(tmp_path / "d" / name, [1])
    source = open_rows(tmp_path / "d", split)
    assert [file.name for file in source.files] == [str(tmp_path / "d" / name) for name in sorted(read)]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Files of"))
    rest = f" Left out: {', '.join(left_out)}." if left_out else ""
    assert line == f"Files of {tmp_path}/d that are read: {', '.join(sorted(read))}.{rest}"


def test_a_folder_of_one_split_gives_no_other_by_default(tmp_path):
    write(tmp_path / "d" / "train-0.jsonl", [1])
    with pytest.raises(UserError, match="there is no split 'validation', only: train"):
        open_rows(tmp_path / "d", default_split="validation")


# --- rows that are held out ---


def source(name, size, split="", numbers=None):
    rows = datasets.Dataset.from_dict({"completion": [f"{name} {number}" for number in range(size)]})
    return Source([DataFile(name, rows, None, numbers=numbers, split=split)])


def places(source):
    return {(row.file, row.number) for row in source}


@pytest.mark.parametrize("amount", [0.05, 0.5, 1, 7, 30])
def test_held_out_rows_are_not_trained_and_all_others_are(amount):
    sources = [source("a", 100), source("b", 20), source("c", 1)]
    held = hold_out(sources, amount, seed=3)
    trained = [places(part) for part in held.train]
    assert len(held.validation) == (amount if amount >= 1 else round(121 * amount))
    assert set().union(*trained) | places(held.validation) == set().union(*map(places, sources))
    assert not set().union(*trained) & places(held.validation)
    assert all(trained)
    for part in (*held.train, held.validation):  # a row is found under its number in the file
        assert all(row.columns["completion"] == f"{row.file} {row.number}" for row in part)


def test_the_seed_alone_decides_which_rows_are_held_out():
    drawn = [places(hold_out([source("a", 500), source("b", 90)], 0.1, seed).validation) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_dataset_of_a_mixture_gives_its_share():
    held = hold_out([source("a", 800), source("b", 150), source("c", 50)], 0.1, seed=0)
    assert [len(part) for part in held.train] == [720, 135, 45]
    mixture = Mixture(held.train, [1.0, 1.0, 8.0])
    assert not places(mixture) & places(held.validation)
    assert mixture.fingerprint() == [["a", 720], ["b", 135], ["c", 45]]


def test_a_row_that_two_datasets_read_leaves_both(tmp_path):
    file = write(tmp_path / "a.jsonl", range(10))
    again = str(tmp_path / "x" / ".." / "a.jsonl")
    (tmp_path / "x").mkdir()
    sources = [open_rows(file), open_rows(again, "train[5:]"), open_rows(file)]
    held = hold_out(sources, 4, seed=0)
    numbers = {row.number for row in held.validation}
    assert len(numbers) == 4
    for part in held.train:
        assert not numbers & {row.number for row in part}


def test_splits_of_one_name_are_different_rows():
    held = hold_out([source("hub", 10, "train"), source("hub", 10, "extra")], 10, seed=0)
    assert [len(part) for part in held.train] == [5, 5]
    assert len(held.validation) == 10


def test_a_held_out_row_of_a_part_of_a_file_is_counted_in_the_file():
    held = hold_out([source("a", 100, numbers=range(50, 100))], 0.5, seed=0)
    numbers = sorted(number for _, number in places(held.validation) | places(held.train[0]))
    assert numbers == list(range(50, 100))


@pytest.mark.parametrize(
    ("sizes", "amount"), [([10], 0.01), ([10], 10), ([10], 11), ([1, 1], 1), ([1], 0.5), ([5, 5], 0.95)]
)
def test_a_split_that_leaves_nothing_on_a_side_is_refused(sizes, amount):
    with pytest.raises(UserError, match="would be held out") as caught:
        share_out(sizes, amount)
    assert caught.value.where == f"validation_split {amount:g}"


@pytest.mark.parametrize(
    ("sizes", "amount", "shares"),
    [([10, 10], 3, [2, 1]), ([1, 100], 0.5, [0, 50]), ([3, 3, 3], 6, [2, 2, 2]), ([2, 0, 8], 0.5, [1, 0, 4])],
)
def test_shares_are_in_proportion(sizes, amount, shares):
    assert share_out(sizes, amount) == shares


def test_the_same_rows_under_two_expressions_of_splits_are_held_out_of_both(tmp_path):
    """A saved dataset and a hard link: neither the name nor the path tells that the rows are the same."""
    rows = {name: datasets.Dataset.from_list([row(number) for number in range(6)]) for name in ("train", "test")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "saved")
    both, one = open_rows(tmp_path / "saved", "train+test"), open_rows(tmp_path / "saved", "train")
    held = hold_out([both, one], 4, 0)
    places_of = lambda source: {(file.split, int(n)) for file in source.files for n in file.numbers}  # noqa: E731
    trained = set().union(*(places_of(source) for source in held.train))
    assert not trained & places_of(held.validation)
