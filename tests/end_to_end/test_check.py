"""`vlm-tuning check` counts what training encodes, and reports every bad row."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
from tiny_models import LAYOUTS

import tuning
from tuning import cli
from tuning.commands.check import check
from tuning.config.parse import build_config
from tuning.data.encode import IGNORED
from tuning.data.from_config import make_encoder, open_rows
from tuning.data.row_lengths import RowMeter
from tuning.model import load


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def text(words) -> dict:
    return {"type": "text", "text": words}


def answer(words) -> dict:
    return {"role": "assistant", "content": words}


IMAGE = {"type": "image"}
GOOD = {"messages": [user(IMAGE, text("Which colour?")), answer("Red.")], "images": ["0.png"]}


@pytest.fixture
def write_rows(rows, tmp_path):
    """A .jsonl of the given rows beside the pictures of `rows`."""

    def write(*lines) -> str:
        path = rows.parent / f"{tmp_path.name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def run_check(options: dict, capsys) -> tuple[int, dict, str]:
    """Exit code, check.json, and everything printed."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    code = cli.main(["check", *words])
    printed = capsys.readouterr()
    with open(os.path.join(options["output_dir"], "check.json"), encoding="utf-8") as file:
        return code, json.load(file), printed.out + printed.err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_counted_as_training_encodes_them(layout, make_options, write_rows):
    """Also rows with text only, several images, several answers, and control tokens in the text."""
    several = 1 if layout in ("llava15", "granite_vision") else 2
    path = write_rows(
        GOOD,
        {"messages": [user(text("Hi <image>")), answer("Hello. </s>")], "images": []},
        {"messages": [user(*[IMAGE] * several, text("Both?")), answer("Yes.")], "images": ["1.png", "2.png"][:several]},
        {"messages": [user(IMAGE, text("A?")), answer("B."), user(text("C?")), answer("D!")], "images": ["2.png"]},
    )
    config = build_config(make_options(layout, training_data_path=path))
    model_config = load.load_config(config.model)
    encoder = make_encoder(config.data, load.load_processor(config.model, model_config), model_config, "01 Jan 2026")
    source = open_rows(config).train
    for measured in RowMeter(encoder).measure(list(source)):
        sample = encoder.encode(source[measured.number])
        ids, labels = sample.sequence["input_ids"], sample.sequence["labels"]
        assert measured.error is None
        assert measured.tokens == len(ids)
        assert measured.supervised_tokens == (labels != IGNORED).sum()
        assert measured.image_tokens == (ids == encoder.image_token_id).sum() or layout == "mllama"


@pytest.mark.parametrize(("layout", "padding_free"), [("llava15", "auto"), ("llava15", False), ("mllama", "auto")])
def test_the_steps_of_a_token_budget_are_those_that_training_takes(layout, padding_free, make_options, capsys):
    options = make_options(layout, max_tokens_per_batch=300, padding_free=padding_free, gradient_accumulation_steps=2)
    del options["per_device_train_batch_size"]
    _, report, _ = run_check({**options, "num_train_epochs": 2}, capsys)
    steps = report["estimates"]["steps"]["value"]
    assert steps == 2 * report["estimates"]["steps_per_epoch"]["value"] > 2
    assert tuning.train({**options, "num_train_epochs": 2}).global_step == steps
    _, part, _ = run_check({**options, "max_rows": 8}, capsys)
    assert "at least" in part["estimates"]["steps_per_epoch"]["how"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clean_data_gives_0_and_shows_the_rows(layout, make_options, capsys):
    options = make_options(layout)
    code, report, printed = run_check(options, capsys)
    assert (code, report["clean"], report["problems"]) == (0, True, [])
    assert report["totals"]["rows"] == report["totals"]["images"] == 16
    first = report["samples"][0]
    end = {"granite_vision": "<|end_of_text|>", "mllama": "<|eot_id|>"}.get(layout, "</s>")
    assert [words.strip() for words in first["supervised_text"]] == [f"It is red.{end}"]
    assert "Which colour is it?" in first["rendered_text"]
    assert 0 < first["num_supervised_tokens"] < first["num_tokens"]
    assert first["num_image_tokens"] >= 1
    assert report["estimates"]["steps_per_epoch"]["value"] == 4
    assert report["estimates"]["tokens_per_epoch"]["value"] == report["totals"]["tokens"]
    assert report["estimates"]["peak_memory_gb_per_device"]["value"] > 0
    assert re.search(r"FSDP would wrap: \w+Layer, \w+Layer", printed)
    assert "language_model" in printed
    assert "Attention" in printed or "attention:" in printed
    assert not os.path.exists(os.path.join(options["output_dir"], "model.safetensors"))


def test_every_bad_row_is_reported_and_grouped(make_options, write_rows, capsys):
    empty = {"messages": [user(text("q")), answer(" ")], "images": []}
    missing = {**GOOD, "images": ["none.png"]}
    path = write_rows(GOOD, empty, GOOD, missing, missing, {**GOOD, "images": []})
    code, report, printed = run_check(make_options("llava15", training_data_path=path), capsys)
    assert code == 1
    assert [(p["row"], p["field"], p["kind"]) for p in sorted(report["problems"], key=lambda p: p["row"])] == [
        (1, "messages", "empty answer"),
        (3, "images", "missing image file"),
        (4, "images", "missing image file"),
        (5, "images", "wrong number of images"),
    ]
    assert all(f"{path}, row {p['row']}" in p["message"] for p in report["problems"])
    assert "2 × missing image file:" in printed
    assert "4 rows cannot be trained." in printed
    assert "Traceback" not in printed
    assert report["totals"]["bad_rows"] == 4


def test_a_truncated_image_is_found_by_decoding_it(make_options, rows, write_rows, capsys):
    whole = (rows.parent / "0.png").read_bytes()
    (rows.parent / "cut.png").write_bytes(whole[: len(whole) - 30])
    path = write_rows(GOOD, GOOD, {**GOOD, "images": ["cut.png"]})
    options = make_options("llava15", training_data_path=path, sample_rows=1, per_device_train_batch_size=1)
    for decode, found in (("false", []), ("true", [(2, "unreadable image")])):
        code, report, _ = run_check({**options, "decode_images": decode}, capsys)
        assert code == bool(found)
        assert [(p["row"], p["kind"]) for p in report["problems"]] == found
    code, report, _ = run_check({**options, "sample_rows": 3}, capsys)  # shown in full, so decoded
    assert [(p["row"], p["kind"]) for p in report["problems"]] == [(2, "unreadable image")]


def test_overlong_rows_are_problems_or_counted_as_they_are_handled(make_options, capsys):
    counts = {}
    for handling in ("error", "drop", "truncate_text"):
        options = make_options("llava15", max_seq_length=60, overlong_rows=handling)
        code, report, _ = run_check(options, capsys)
        counts[handling] = (code, len(report["problems"]), report["totals"])
        assert len(report["left_out"]) == report["totals"]["rows_left_out"]
    code, bad, _ = counts["error"]
    assert code == 1
    assert 0 < bad < 16
    assert counts["drop"][:2] == (0, 0)
    assert counts["drop"][2]["rows_left_out"] == bad
    assert counts["truncate_text"][:2] == (0, 0)
    assert counts["truncate_text"][2]["rows_cut"] == bad


def test_only_max_rows_are_read(make_options, capsys):
    _, report, _ = run_check(make_options("llava15", max_rows=5), capsys)
    assert report["totals"]["rows"] == 5


def test_many_rows_are_read_by_several_processes_in_order(make_options, write_rows, capsys):
    lines = [GOOD] * 400
    for bad in (7, 130, 399):
        lines[bad] = {**GOOD, "images": ["none.png"]}
    options = make_options("llava15", training_data_path=write_rows(*lines))
    code, report, _ = run_check(options, capsys)
    assert code == 1
    assert [p["row"] for p in report["problems"]] == [7, 130, 399]
    assert report["totals"]["rows"] == 400


def test_a_killed_process_is_named(make_options, write_rows, monkeypatch, capsys):
    measure, main = RowMeter.measure, os.getpid()

    def killed(*args):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(*args)

    monkeypatch.setattr(RowMeter, "measure", killed)
    options = make_options("llava15", training_data_path=write_rows(*[GOOD] * 400))
    assert cli.main(["check", *(f"--{name}={value}" for name, value in options.items())]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert re.fullmatch(r"Error: a process that reads data .* run it where more is free\.", printed.splitlines()[-1])


def test_streamed_and_mixed_data_are_read_once(make_options, write_rows, rows, capsys):
    mixture = json.dumps([{"path": str(rows), "weight": 1}, {"path": write_rows(GOOD, GOOD), "weight": 1}])
    code, report, _ = run_check(make_options("llava15", training_data_path=mixture), capsys)
    assert (code, report["totals"]["rows"]) == (0, 18)
    assert report["estimates"]["steps_per_epoch"]["value"] == 8  # 16 rows of each: the two are passed eight times
    code, report, _ = run_check(make_options("llava15", streaming="true", max_steps=3), capsys)
    assert (code, report["totals"]["rows"]) == (0, 16)


def test_validation_rows_are_checked_too(make_options, write_rows, capsys):
    path = write_rows(GOOD, {**GOOD, "images": ["none.png"]})
    code, report, printed = run_check(make_options("llava15", validation_data_path=path), capsys)
    assert code == 1
    assert [p["file"] for p in report["problems"]] == [path]
    assert "validation bad rows: 1" in printed


def test_processes_to_launch_share_the_memory(make_options):
    alone = check(build_config(make_options("granite_vision")))
    launch = {"accelerate_launch_args": {"num_processes": 4}}
    shared = check(build_config({**make_options("granite_vision"), **launch}))
    assert shared.estimates["peak_memory_gb_per_device"][0] < alone.estimates["peak_memory_gb_per_device"][0]
    assert shared.estimates["steps_per_epoch"][0] == 1


def test_a_batch_has_no_more_rows_than_the_data(make_options, capsys):
    """However large its size: the estimate would encode and join that many."""
    peaks = []
    for size in (16, 2**63 - 1):  # there are 16 rows
        options = make_options("granite_vision", per_device_train_batch_size=size, overwrite_output_dir=True)
        code, report, printed = run_check(options, capsys)
        assert code == 0, printed
        peaks.append(report["estimates"]["peak_memory_gb_per_device"]["value"])
    assert peaks[0] == peaks[1]
    options = make_options("granite_vision", per_device_train_batch_size=16, max_rows=2, overwrite_output_dir=True)
    assert run_check(options, capsys)[1]["estimates"]["peak_memory_gb_per_device"]["value"] > peaks[0] / 4  # not of 2


def test_a_prompt_that_ends_in_a_blank_is_warned_about(make_options, capsys):
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|end_of_text|>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    _, report, _ = run_check(make_options("granite_vision", chat_template=template), capsys)
    assert any("generation prompt ends in ' '" in warning for warning in report["warnings"])


def test_the_page_of_a_real_check_opens_in_a_browser(make_options, capsys):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        assert not os.environ.get("CI"), "Chromium is missing: apt-get install chromium"
        pytest.skip("Chromium is not installed")
    options = make_options("granite_vision")
    run_check(options, capsys)
    page = os.path.join(options["output_dir"], "check.html")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    assert "No problems in 16 rows" in shown
    assert re.search(r"\d+ image tokens", shown)
    assert 'src="data:image/jpeg;base64,' in shown
    assert "//" not in re.sub(r"file://|http://www.w3.org", "", re.sub(r'base64,[^"]*', "", shown))


def test_wrong_options_and_a_missing_model_write_nothing(make_options, tmp_path, capsys):
    options = make_options("llava15", output_dir=str(tmp_path / "none"))
    for change in ({"max_sq_length": 3}, {"model_name_or_path": str(tmp_path / "no_model")}):
        words = [word for name, value in {**options, **change}.items() for word in (f"--{name}", str(value))]
        assert cli.main(["check", *words]) == 1
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
