"""Bad rows that are skipped change nothing else; several datasets are mixed by weight; streamed runs go on exactly."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

import tuning
from tuning import sft_trainer
from tuning.config.parse import build_config
from tuning.data import encode, from_config
from tuning.errors import UserError
from tuning.training.trainer import SupervisedTrainer

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4}
PLAIN_STEPS = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "save_strategy": "no"}
SKIP = {"on_bad_row": "skip", "max_bad_fraction": 0.5}
BAD = {5: ("messages", "unknown role 'wizard'"), 11: ("images", "there is no image file")}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    far = [name for name in found if not torch.allclose(found[name], expected[name], rtol=0, atol=tolerance)]
    assert far == []


@pytest.fixture
def data(rows, tmp_path):
    """A copy of the sixteen good rows and their pictures that a test may change."""
    shutil.copytree(rows.parent, tmp_path / "data", ignore=shutil.ignore_patterns("*_*"))
    return tmp_path / "data"


@pytest.fixture
def spoilt(data):
    """Sixteen rows, of which row 5 has a wrong role and row 11 has no picture."""
    rows = read_rows(data / "rows.jsonl")
    rows[5]["messages"][1]["role"] = "wizard"
    rows[11]["images"] = ["none.png"]
    return write_rows(data / "spoilt.jsonl", rows)


@pytest.fixture
def batches(monkeypatch):
    """The rows of every batch that was trained, in order."""
    seen, take = [], SupervisedTrainer._take_info

    def remember(trainer, batch):
        info = take(trainer, batch)
        seen.append(info.rows)
        return info

    monkeypatch.setattr(SupervisedTrainer, "_take_info", remember)
    return seen


# --- on_bad_row skip ---


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_rows_are_written_down_once(workers, make_options, spoilt, capsys):
    options = make_options("llava15", training_data_path=str(spoilt), dataloader_num_workers=workers, **SKIP)
    result = tuning.train({**options, "num_train_epochs": 2})
    assert result.global_step == 8
    written = read_rows(result.model_dir / "skipped_rows.jsonl")
    assert sorted(entry["row"] for entry in written) == sorted(BAD)
    for entry in written:
        field, reason = BAD[entry["row"]]
        assert list(entry) == ["row", "field", "reason"]
        assert entry["field"] == field
        assert entry["reason"].startswith(f"{spoilt}, row {entry['row']}, field '{field}'")
        assert reason in entry["reason"]
    assert "2 rows were left out" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["llava15", "granite_vision", "mllama"])
def test_skipped_rows_change_no_weight(layout, make_options, spoilt, tmp_path):
    """A step on all sixteen rows, two of them bad, is a step on the fourteen good ones."""
    good = [row for number, row in enumerate(read_rows(spoilt)) if number not in BAD]
    write_rows(spoilt.parent / "good.jsonl", good)
    whole = make_options(layout, per_device_train_batch_size=16, max_steps=2, **PLAIN_STEPS, **SKIP)
    found, expected = (
        tuning.train({**whole, "training_data_path": str(spoilt.parent / name), "output_dir": str(tmp_path / name)})
        for name in ("spoilt.jsonl", "good.jsonl")
    )
    assert_equal(weights_of(found.model_dir), weights_of(expected.model_dir), 1e-6)
    losses = [[line["loss"] for line in read_rows(run.model_dir / "training_logs.jsonl")] for run in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    start = load_file(Path(whole["model_name_or_path"]) / "model.safetensors")
    assert any((tensor - start[name]).abs().max() > 1e-4 for name, tensor in weights_of(found.model_dir).items())


@pytest.mark.parametrize("layout", ["llava15", "granite_vision", "mllama"])
def test_a_batch_of_bad_rows_alone_does_nothing(layout, make_options, spoilt, tmp_path):
    rows = read_rows(spoilt)
    write_rows(spoilt.parent / "one.jsonl", rows[:1])
    write_rows(spoilt.parent / "bad_too.jsonl", [rows[0], rows[5], rows[11]])
    options = make_options(layout, per_device_train_batch_size=1, num_train_epochs=1, **PLAIN_STEPS, **SKIP)
    options["max_bad_fraction"] = 1.0
    found, expected = (
        tuning.train({**options, "training_data_path": str(spoilt.parent / name), "output_dir": str(tmp_path / name)})
        for name in ("bad_too.jsonl", "one.jsonl")
    )
    assert (found.global_step, expected.global_step) == (3, 1)
    assert_equal(weights_of(found.model_dir), weights_of(expected.model_dir), 1e-7)
    assert sorted(line["loss"] for line in read_rows(found.model_dir / "training_logs.jsonl"))[:2] == [0.0, 0.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_rows_stop_the_run(workers, make_options, spoilt, tmp_path, capsys):
    options = make_options("llava15", training_data_path=str(spoilt), dataloader_num_workers=workers, **SKIP)
    options["max_bad_fraction"] = 0.1  # 1.6 rows of 16
    assert sft_trainer.main([f"--{name}={value}" for name, value in options.items()]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    message = said.splitlines()[-1]
    assert "2 of 16 rows are bad, more than max_bad_fraction 0.1; the last one: " in message
    assert any(f"{spoilt}, row {number}, field" in message for number in BAD)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert sorted(entry["row"] for entry in read_rows(tmp_path / "out" / "skipped_rows.jsonl")) == sorted(BAD)
    assert (
        sft_trainer.main([f"--{name}={value}" for name, value in {**options, "max_bad_fraction": 0.125}.items()]) == 0
    )


def test_a_run_that_is_continued_or_begun_anew_names_a_skipped_row_once(make_options, spoilt, tmp_path):
    options = make_options("llava15", training_data_path=str(spoilt), max_steps=8, save_steps=4, **SKIP)
    whole = tuning.train(options).model_dir
    for name in (".complete", "checkpoint-8"):
        path = whole / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tuning.train(options)
    assert sorted(entry["row"] for entry in read_rows(whole / "skipped_rows.jsonl")) == sorted(BAD)
    good = {"training_data_path": str(spoilt.parent / "rows.jsonl"), "overwrite_output_dir": True}
    tuning.train({**options, **good})
    assert not (whole / "skipped_rows.jsonl").exists()


# --- several datasets ---


@pytest.fixture
def three(data):
    """Three files of 4, 6 and 2 rows of the sixteen."""
    rows = read_rows(data / "rows.jsonl")
    cuts = {"a": rows[:4], "b": rows[4:10], "c": rows[10:12]}
    return [str(write_rows(data / f"{name}.jsonl", part)) for name, part in cuts.items()]


def mixed(paths, weights) -> list[dict]:
    return [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)]


def rows_of_epoch(options: dict) -> list[tuple[str, int]]:
    return [(Path(row.file).stem, row.number) for row in from_config.open_rows(build_config(options)).train]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((1, 1, 1), {"a": 6, "b": 6, "c": 6}),
        ((2, 3, 1), {"a": 4, "b": 6, "c": 2}),
        ((0.5, 0.25, 0.25), {"a": 12, "b": 6, "c": 6}),
        ((1, 1, 4), {"a": 6, "b": 6, "c": 24}),
    ],
)
def test_an_epoch_has_every_row_and_the_proportions_asked_for(weights, shares, make_options, three):
    drawn = rows_of_epoch(make_options("llava15", training_data_path=mixed(three, weights)))
    assert Counter(name for name, _ in drawn) == shares
    times = Counter(drawn)
    for name, size in (("a", 4), ("b", 6), ("c", 2)):
        of_file = [times[name, number] for number in range(size)]
        assert min(of_file) >= 1
        assert max(of_file) - min(of_file) <= 1


def test_without_weights_every_row_is_seen_once(make_options, three):
    drawn = rows_of_epoch(make_options("llava15", training_data_path=[{"path": path} for path in three]))
    assert drawn == [(name, n) for name, size in (("a", 4), ("b", 6), ("c", 2)) for n in range(size)]


def test_a_mixture_is_trained_in_an_order_that_only_the_seed_decides(make_options, three, batches, tmp_path):
    options = make_options(
        "llava15", training_data_path=mixed(three, (1, 1, 1)), num_train_epochs=1, save_strategy="no"
    )
    orders = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        batches.clear()
        tuning.train({**options, "seed": seed, "output_dir": str(tmp_path / name)})
        orders[name] = list(batches)
    assert orders["one"] == orders["again"] != orders["other"]
    seen = [where for batch in orders["one"] for where in batch]
    assert Counter(where.partition(", row")[0] for where in seen) == dict.fromkeys(three, 6)
    assert_equal(weights_of(tmp_path / "one"), weights_of(tmp_path / "again"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_a_mixture_is_named_by_its_own_file(streaming, make_options, three, capsys):
    rows = read_rows(Path(three[1]))
    rows[2]["messages"][1]["role"] = "wizard"
    write_rows(Path(three[1]), rows)
    options = make_options("llava15", training_data_path=json.dumps(mixed(three, (1, 1, 1))), max_steps=20)
    options["streaming"] = streaming
    assert sft_trainer.main([f"--{name}={value}" for name, value in options.items()]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"Error: {three[1]}, row 2, field 'messages', message 1: unknown role")


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([], "give every dataset of the list a weight, or none"),
        ([{"path": "{}", "weight": 1}, {"path": "{}"}], "give every dataset of the list a weight, or none"),
        ([{"path": "{}", "weight": 0}], "dataset 0: weight must be a number above 0, got 0"),
        ([{"path": "{}", "weight": -1}], "dataset 0: weight must be a number above 0, got -1"),
        ([{"path": "{}", "weight": "2"}], "dataset 0: weight must be a number above 0, got '2'"),
        ([{"path": "{}", "weight": True}], "dataset 0: weight must be a number above 0, got True"),
        ([{"path": "{}", "weight": float("nan")}], "dataset 0: weight must be a number above 0, got nan"),
        ([{"path": "{}", "weight": float("inf")}], "dataset 0: weight must be a number above 0, got inf"),
        ([{"path": "{}"}, {"weight": 1}], "dataset 1: expected an object like"),
        ([{"path": "{}"}, 7], "dataset 1: expected an object like"),
        ([{"path": "{}", "wieght": 1}], "dataset 0: unknown wieght; use path, weight and split"),
        ([{"path": "{}"}, {"path": "none.jsonl"}], "none.jsonl does not exist"),
        ([{"path": "{}", "split": 3}], "dataset 0: split must be text, got 3"),
    ],
)
def test_a_wrong_list_of_datasets_is_refused_before_anything_is_read(entries, problem, make_options, rows):
    filled = [
        {**entry, "path": entry["path"].format(rows)} if isinstance(entry, dict) and "path" in entry else entry
        for entry in entries
    ]
    with pytest.raises(UserError) as caught:
        build_config(make_options("llava15", training_data_path=filled))
    assert problem in str(caught.value)


# --- streaming ---


def streamed(make_options, path, **changes) -> dict:
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **changes}
    return make_options("llava15", training_data_path=path, streaming=True, **changes)


@pytest.fixture(params=["jsonl", "parquet"])
def streamable(request, data):
    """The sixteen rows in a file that is read as it is."""
    path = data / "rows.jsonl"
    if request.param == "parquet":
        path = data / "rows.parquet"
        rows = read_rows(data / "rows.jsonl")
        for row in rows:  # one type a column
            answer = row["messages"][1]
            answer["content"] = [{"type": "text", "text": answer["content"]}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_every_epoch_of_a_stream_has_every_row_once_in_another_order(make_options, streamable, batches):
    tuning.train(streamed(make_options, streamable, max_steps=8))
    seen = [int(where.rpartition(" ")[2]) for batch in batches for where in batch]
    assert sorted(seen[:16]) == sorted(seen[16:]) == list(range(16))
    assert seen[:16] != seen[16:]
    assert seen[:16] != list(range(16))
    assert {where.rpartition(", row")[0] for batch in batches for where in batch} == {streamable}


def test_a_stream_has_one_order_for_any_number_of_workers(make_options, streamable, batches, tmp_path):
    orders, weights = {}, {}
    for workers in (0, 1, 2):
        batches.clear()
        options = streamed(make_options, streamable, max_steps=5, dataloader_num_workers=workers, save_strategy="no")
        folder = tuning.train({**options, "output_dir": str(tmp_path / str(workers))}).model_dir
        orders[workers], weights[workers] = list(batches), weights_of(folder)
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == 10
    assert_equal(weights[1], weights[0])
    assert_equal(weights[2], weights[0])


@pytest.mark.parametrize("method", ["full", "lora", "weighted"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [3, 5])
def test_an_interrupted_stream_ends_where_an_uninterrupted_one_does(
    step, workers, method, make_options, data, three, batches, monkeypatch, tmp_path
):
    """Four steps an epoch: the run goes on in the middle of the first and through the second, or within the second."""
    path = mixed(three, (1, 2, 1)) if method == "weighted" else str(data / "rows.jsonl")
    lora = {**LORA, "lora_dropout": 0.3} if method == "lora" else {}
    options = streamed(make_options, path, max_steps=7, save_steps=step, dataloader_num_workers=workers, **lora)
    whole = tuning.train(options).model_dir
    order = list(batches)
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    shutil.copy(whole / "training_logs.jsonl", tmp_path / "cut")

    opened, load = [], encode.load_image
    monkeypatch.setattr(encode, "load_image", lambda *given: opened.append(given) or load(*given))
    batches.clear()
    result = tuning.train({**options, "output_dir": str(tmp_path / "cut")})
    assert result.global_step == 7
    assert batches == order[2 * step :]
    assert_equal(weights_of(tmp_path / "cut"), weights_of(whole))
    logs = [[line["loss"] for line in read_rows(run / "training_logs.jsonl")] for run in (whole, tmp_path / "cut")]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 7
    if workers == 0:  # else they are opened in other processes
        left = {where for batch in batches for where in batch}
        assert len(opened) == from_config.ROWS_CHECKED_FIRST + sum(map(len, batches))
        assert left <= {place.partition(", field")[0] for _, _, place, _ in opened}


def test_a_weighted_stream_keeps_its_proportions_and_misses_no_row(make_options, three, batches):
    tuning.train(streamed(make_options, mixed(three, (1, 2, 1)), max_steps=60, save_strategy="no"))
    seen = [where for batch in batches for where in batch]
    counts = Counter(where.partition(", row")[0] for where in seen)
    assert len(seen) == 240
    assert counts[three[1]] == pytest.approx(120, abs=30)
    assert counts[three[0]] == pytest.approx(60, abs=30)
    assert len(set(seen)) == 12


def test_bad_rows_of_a_stream_are_skipped_and_written_down_once(make_options, spoilt, batches):
    folder = tuning.train(streamed(make_options, str(spoilt), max_steps=8, **SKIP)).model_dir
    assert sorted(entry["row"] for entry in read_rows(folder / "skipped_rows.jsonl")) == sorted(BAD)


def test_a_stream_needs_a_number_of_steps(make_options):
    with pytest.raises(UserError, match="streaming: needs max_steps, because the number of rows is not known"):
        build_config(make_options("llava15", streaming=True))


def test_bad_validation_rows_are_held_against_the_validation_rows(make_options, rows, capsys):
    good = json.loads(rows.read_text().splitlines()[0])
    validation = rows.parent / "validation_rows.jsonl"
    lines = [good] * 60
    lines[5] = lines[50] = {**good, "images": ["none.png"]}
    validation.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = make_options("llava15", validation_data_path=str(validation), on_bad_row="skip", num_train_epochs=1)
    result = tuning.train(options)  # two of 60 are few, two of the 16 training rows would be too many
    assert result.metrics["eval_loss"] > 0


def test_a_stream_that_breaks_off_is_named(make_options, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": [1,2')
    options = make_options("llava15", training_data_path=str(broken), streaming="true", max_steps=2)
    assert sft_trainer.main([f"--{name}={value}" for name, value in options.items()]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"Error: {broken}: the file cannot be read")


def test_a_run_whose_rows_are_all_left_out_saves_nothing(make_options, tmp_path):
    options = make_options("llava15", max_seq_length=10, overlong_rows="drop", num_train_epochs=1)
    with pytest.raises(UserError, match="every row was left out"):
        tuning.train(options)
    assert not (tmp_path / "out" / "model.safetensors").exists()
