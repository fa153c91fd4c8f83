"""Whole runs of every architecture: what trains, how batches are joined, what is saved, answered and counted."""

import functools
import json
import re
from dataclasses import dataclass

import pytest
from architectures.case import Case
from architectures.names import ALONE, EITHER_WAY, OLDER_PADDED, PADDED, each_architecture
from architectures.page import LORA, describe_batches, read_page

import tuning
from tuning import cli
from tuning.data.encode import IGNORED
from tuning.data.from_config import open_rows
from tuning.data.row_lengths import RowMeter
from tuning.errors import UserError

HALF = {"dtype": "bfloat16", "gradient_checkpointing": True}


@dataclass(frozen=True)
class Run:
    losses: list[float]
    printed: str


@pytest.fixture
def make_case(tmp_path):
    return functools.cache(lambda name: Case.make(name, tmp_path))


@pytest.fixture
def run(make_case, tmp_path, capsys, monkeypatch):
    """Train two steps on all rows of an architecture. The run reads its saved model back, and checks itself."""
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def train(name: str, **changes) -> Run:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        tuning.train(make_case(name).options(output_dir=str(output), **changes))
        lines = [json.loads(line) for line in (output / "training_logs.jsonl").read_text().splitlines()]
        return Run([line["loss"] for line in lines if "loss" in line], capsys.readouterr().out)

    return train


@each_architecture
def test_it_trains_in_full_and_padding_changes_nothing(run, name):
    in_order = {"train_sampling_strategy": "sequential"}  # padded batches of one row would be grouped by length
    full = run(name, **in_order)
    assert len(full.losses) == 2
    found, page = describe_batches(full.printed), read_page()[name].batches
    if name in EITHER_WAY:
        found, page = found.partition(",")[0], page.partition(",")[0]
    if name not in OLDER_PADDED:
        assert page == found, "run: python docs/generate_models.py"
    assert describe_batches(full.printed).startswith("padded") == (name in PADDED)
    if name not in PADDED:
        padded = run(name, padding_free=False, **in_order)
        assert padded.losses == pytest.approx(full.losses, rel=1e-4)


@each_architecture
def test_it_trains_in_16_bits_with_checkpointing(run, name):
    assert len(run(name, **HALF).losses) == 2
    assert len(run(name, **LORA, **HALF).losses) == 2


@each_architecture
def test_a_frozen_tower_stays_as_it_is(run, name):
    frozen = run(name, freeze_vision_tower=True)
    assert len(frozen.losses) == 2
    trained = re.search(r"^vision_tower +[\d,]+ +([\d,]+)", frozen.printed, re.M)
    assert trained is None or trained[1] == "0"


@each_architecture
def test_check_counts_rows_as_they_are_encoded(make_case, name, tmp_path, capsys):
    case = make_case(name)
    options = {"model_name_or_path": case.folder, "training_data_path": case.folder / "rows.jsonl"}
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    code = cli.main(["check", *words, "--output_dir", str(tmp_path / "checked")])
    assert code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "checked" / "check.json").read_text())
    assert report["problems"] == []
    for sample in report["samples"]:
        encoded, row = case.samples[sample["row"]], case.rows[sample["row"]]
        assert sample["num_tokens"] == len(encoded.sequence["input_ids"])
        assert sample["num_supervised_tokens"] == int((encoded.sequence["labels"] != IGNORED).sum())
        assert [words.strip() for words in sample["supervised_text"]] == case.expected_answers(row)
    counted = RowMeter(case.encoder).measure(list(open_rows(case.config).train))
    assert [row.tokens for row in counted] == [len(sample.sequence["labels"]) for sample in case.samples]
    supervised = [int((sample.sequence["labels"] != IGNORED).sum()) for sample in case.samples]
    assert [row.supervised_tokens for row in counted] == supervised


@each_architecture
def test_a_row_is_answered_in_a_batch_as_alone(make_case, name, tmp_path, capsys):
    case = make_case(name)
    answers = []
    for size in (1, len(case.rows)):
        output = tmp_path / f"{size}.jsonl"
        options = ["--model_name_or_path", case.folder, "--data_path", case.folder / "rows.jsonl", "--output", output]
        code = cli.main(["predict", *map(str, options), "--batch_size", str(size), "--max_new_tokens", "6"])
        assert code == 0, capsys.readouterr().err
        answers.append([json.loads(line)["prediction"] for line in output.read_text().splitlines()])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ALONE)
def test_what_changes_in_a_batch_is_trained_row_by_row(run, name):
    with pytest.raises(UserError, match="gives a row in a batch other results than alone") as refused:
        run(name, per_device_train_batch_size=2, padding_free=False)
    assert refused.value.where == "per_device_train_batch_size"
