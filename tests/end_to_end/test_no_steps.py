"""A run that cannot take a step, or trains nothing, ends with a message and saves no model as finished."""

import json
from pathlib import Path

import pytest

import tuning
from tuning import cli
from tuning.errors import UserError


def ends(options: dict) -> str:
    with pytest.raises(UserError) as caught:
        tuning.train(options)
    folder = Path(options["output_dir"])
    assert not (folder / ".complete").exists()
    assert not list(folder.glob("*.safetensors"))
    return str(caught.value)


DROPPED = {"dataloader_drop_last": True, "per_device_train_batch_size": 17}


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 1}])
def test_rows_that_fill_no_batch_end_the_run_before_it_loads_the_model(length, make_options, capsys):
    options = make_options("llava15", **DROPPED, **length)
    assert "16 rows do not fill a batch of 17" in ends(options)
    assert "parameters" not in capsys.readouterr().out
    assert tuning.train(options | {"per_device_train_batch_size": 16}).global_step == length.get("max_steps", 1)


def test_check_says_so_too(make_options, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(make_options("llava15", **DROPPED)))
    assert cli.main(["check", str(tmp_path / "config.json")]) == 1
    assert "16 rows do not fill a batch of 17" in capsys.readouterr().err


@pytest.fixture
def two_rows(rows):
    file = rows.parent / "two.jsonl"
    file.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:2]))
    return {"training_data_path": str(file)}


def test_a_stream_that_fills_no_batch(make_options, two_rows, monkeypatch):
    from tuning.data.dataset import StreamedRows

    monkeypatch.setattr(StreamedRows, "__iter__", lambda self: iter(()))
    assert "no batch could be filled" in ends(make_options("llava15", streaming=True, max_steps=2, **two_rows))


@pytest.mark.parametrize("steps", [0, "0"])
def test_no_steps_are_refused_as_no_epochs_are(steps, make_options):
    assert "max_steps: 0 steps train nothing" in ends(make_options("llava15", max_steps=steps))


LEFT_OUT = {
    "too long": {"max_seq_length": 8, "overlong_rows": "drop"},
    "too long, in batches of tokens": {"max_seq_length": 8, "overlong_rows": "drop", "max_tokens_per_batch": 100},
    "bad": {"max_image_pixels": 9, "on_bad_row": "skip", "max_bad_fraction": 1},
}


@pytest.mark.parametrize("how", LEFT_OUT)
@pytest.mark.parametrize("length", [{"max_steps": 2}, {"num_train_epochs": 1}])
def test_rows_that_are_all_left_out_finish_no_run(how, length, make_options):
    options = make_options("llava15", **LEFT_OUT[how], **length, save_steps=1)
    if "max_tokens_per_batch" in options:
        del options["per_device_train_batch_size"]
    for _ in range(2):  # a checkpoint of the last step makes the second start only save the model
        assert "every row was left out, so nothing was trained" in ends(options)


def test_a_run_whose_last_rows_are_left_out_is_finished_after_a_resume(make_options, rows, tmp_path):
    lines = rows.read_text().splitlines()
    long = json.loads(lines[0])
    long["messages"][1]["content"] = "Red. " * 200
    data = rows.parent / "ends_long.jsonl"
    data.write_text("".join(line + "\n" for line in [*lines[:4], *[json.dumps(long)] * 4]))
    options = make_options(
        "llava15",
        training_data_path=str(data),
        train_sampling_strategy="sequential",
        max_seq_length=200,
        overlong_rows="drop",
        save_steps=1,
        num_train_epochs=1,
    )
    assert tuning.train(options | {"max_steps": 1, "output_dir": str(tmp_path / "first")}).global_step == 1
    assert tuning.train(options).global_step == 2
    (tmp_path / "out" / ".complete").unlink()
    for file in (tmp_path / "out" / "checkpoint-2").iterdir():
        file.unlink()
    (tmp_path / "out" / "checkpoint-2").rmdir()
    assert tuning.train(options).global_step == 2  # step 2, alone, has no row to train


@pytest.mark.parametrize(
    "how", [{"max_seq_length": 60, "overlong_rows": "drop"}, {"on_bad_row": "skip", "max_bad_fraction": 1}]
)
def test_validation_rows_that_are_all_left_out_are_named_before_the_model_is_loaded(how, make_options, rows, capsys):
    line = json.loads(rows.read_text().splitlines()[0])
    line["messages"][1]["content"] = "Red. " * 99 if "max_seq_length" in how else ""
    data = rows.parent / "no_validation.jsonl"
    data.write_text((json.dumps(line) + "\n") * 6)
    found = ends(make_options("llava15", validation_data_path=str(data), max_steps=1, **how))
    assert found.startswith("validation_data_path: no row is left to evaluate on")
    assert "parameters" not in capsys.readouterr().out
