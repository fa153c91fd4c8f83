"""The page of real runs: while they train, when they end, when they resume, and when it cannot be written."""

import json
import re
from types import SimpleNamespace

import pytest

from tuning.errors import UserError
from tuning.model.padding_free import Packing
from tuning.pages.render import format_number
from tuning.pages.run_record import read_record
from tuning.sft_trainer import train
from tuning.training.callbacks import RunReport
from tuning.training.data_loading import Batching

ANSWERS = {"report_samples": 2, "eval_generate_rows": 4, "eval_max_new_tokens": 4, "eval_metrics": "anls"}


@pytest.fixture
def pages(monkeypatch):
    """The first line of every page that runs of this test write."""
    seen, refresh = [], RunReport.refresh

    def note(self):
        refresh(self)
        seen.append(re.search(r"<h1>(.*?)</h1>", (self.output_dir / "report.html").read_text())[1])

    monkeypatch.setattr(RunReport, "refresh", note)
    monkeypatch.setattr("tuning.training.callbacks.REST", 0)
    return seen


def test_the_page_of_a_real_run_grows_and_opens_in_a_browser(make_options, rows, pages, open_page, tmp_path):
    options = make_options("granite_vision", validation_data_path=str(rows), eval_strategy="steps", eval_steps=2)
    train(
        {**options, "peft_method": "lora", "target_modules": "q_proj", **ANSWERS, "max_steps": 4, "weight_decay": 0.01}
    )
    assert pages[0] == "Running: step 0 of 4"
    assert pages[1].startswith("Running: step 1 of 4, about ")
    assert pages[-1] == "Finished after 4 steps"
    dom, console = open_page(tmp_path / "out" / "report.html")
    assert console == []
    assert "//" not in re.sub(r'base64,[^"]*', "", dom.split("<script>")[0])
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", dom.split("<main>")[1]))
    logged = [json.loads(line) for line in (tmp_path / "out" / "training_logs.jsonl").read_text().splitlines()]
    validation = [line["eval_loss"] for line in logged if "eval_loss" in line]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert (len(validation), len(losses)) == (2, 4)
    for shown in (
        f"; validation loss first {format_number(validation[0])}, latest {format_number(validation[1])}",
        f"loss first {format_number(losses[0])}, latest {format_number(losses[3])}",
        "weight_decay 0.01",
        "training rows 16",
        "validation rows 16",
        "rows per step 4",
        "LlavaNextForConditionalGeneration",
        '"r": 8',
        "best anls 0",
        "0 of 2 latest answers exactly equal the reference.",
        "Before training",
        "Question Which colour is it?",
        "Reference It is green. Very much so.",
        "batches padding-free",
    ):
        assert shown in text, shown
    assert dom.count('<img src="data:image/') == 2
    info = read_record(tmp_path / "out").info
    assert sum(part["trained"] for part in info["parts"]) < sum(part["parameters"] for part in info["parts"])
    assert info["machine"]["processes"] == 1
    changed = re.search(r"Different from the defaults(.*?)The other \d+ options", text)[1]
    assert "max_steps 4" in changed
    for untouched in ("lora_alpha", "accelerator_config", "seed", "gradient_checkpointing", "bias"):
        assert untouched not in changed


def test_a_resumed_run_continues_its_page(make_options, pages, tmp_path):
    options = make_options("llava15", save_strategy="steps", save_steps=1)
    train({**options, "max_steps": 2})
    begun = read_record(tmp_path / "out").info["begun"]
    del pages[:]
    train({**options, "max_steps": 4})
    assert pages[0] == "Running: step 2 of 4"
    assert pages[-1] == "Finished after 4 steps"
    record = read_record(tmp_path / "out")
    assert record.training["loss"].steps.tolist() == [1, 2, 3, 4]
    assert record.info["begun"] == begun


def test_the_page_of_a_failed_run_shows_the_error(make_options, rows, pages, monkeypatch, tmp_path):
    fail = UserError(where="row 3", problem="the loss became nan.", fix="Look at it.")

    def meet_error(self, *rest):
        if self.state.global_step == 2:
            raise fail
        return step(self, *rest)

    from tuning.training.trainer import SupervisedTrainer

    step = SupervisedTrainer.training_step
    monkeypatch.setattr(SupervisedTrainer, "training_step", meet_error)
    with pytest.raises(UserError):
        train(make_options("llava15", max_steps=4))
    assert pages[-1] == "Ended early: step 2 of 4"
    assert "row 3: the loss became nan. Look at it." in (tmp_path / "out" / "report.html").read_text()


def test_a_page_that_cannot_be_written_ends_no_training(make_options, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tuning.training.callbacks.REST", 0)
    (tmp_path / "out" / "report.html" / "in_the_way").mkdir(parents=True)
    assert train(make_options("llava15", max_steps=3)).global_step == 3
    assert capsys.readouterr().out.count("report.html cannot be written") == 1


def test_a_page_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("tuning.training.callbacks.time.monotonic", lambda: clock[0])
    written = []

    def write(folder):
        clock[0] += 0.1
        written.append(clock[0])

    monkeypatch.setattr("tuning.training.callbacks.write_report", write)
    loading = SimpleNamespace(batching=Batching(padded=False, order_padded=False, packing=Packing()))
    report = RunReport(tmp_path, loading, is_main_process=True)
    state = type("State", (), {"global_step": 0, "max_steps": 1000})
    report.on_train_begin(None, state, None)
    for state.global_step in range(1, 1001):
        clock[0] += 0.05
        report.on_log(None, state, None)
    assert 5 < len(written) < 14
