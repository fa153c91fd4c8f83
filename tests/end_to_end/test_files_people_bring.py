"""Files as people have them, through the commands: what is trained is what the files say."""

import csv
import io
import json
import re
import shlex
import tarfile

import datasets
import pytest
from PIL import Image

import tuning
from tuning import cli
from tuning.files import SAMPLES_FILE, read_lines

ANSWERS = ["Red.", "42", '"Blue", they say.']


def png(color="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(stream, "PNG")
    return stream.getvalue()


def run(command, options, capsys, *words) -> tuple[int, str]:
    """Exit code, and everything printed."""
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    code = cli.main([command, *words, *flags])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.fixture
def check(make_options, tmp_path, capsys):
    """Check data: the exit code, what was printed, and check.json."""

    def check(path, **changes):
        options = make_options("granite_vision", training_data_path=str(path), **changes)
        code, printed = run("check", options, capsys)
        report = tmp_path / "out" / "check.json"
        return code, printed, json.loads(report.read_text()) if report.exists() else {}

    return check


def trained_texts(report) -> list[str]:
    """The words that are trained, without end tokens."""
    texts = ["".join(sample["supervised_text"]) for sample in sorted(report["samples"], key=lambda one: one["row"])]
    return [text.replace("<|end_of_text|>", "") for text in texts]


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def talk(answer, *, image=True):
    content = [{"type": "image"}, {"type": "text", "text": "Which colour?"}] if image else "Which colour?"
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def make_csv(folder):
    (folder / "a.png").write_bytes(png())
    rows = [{"messages": json.dumps(talk(answer)), "images": "a.png"} for answer in ANSWERS]
    return write_table(folder / "rows.csv", rows)


def make_image_folder(folder):
    (folder / "pictures").mkdir()
    for number in range(len(ANSWERS)):
        (folder / "pictures" / f"{number}.png").write_bytes(png())
    rows = [
        {"file_name": f"{number}.png", "prompt": "Which colour?", "completion": answer}
        for number, answer in enumerate(ANSWERS)
    ]
    write_table(folder / "pictures" / "metadata.csv", rows)
    return folder / "pictures"


def make_tar(folder):
    with tarfile.open(folder / "shard-000.tar", "w") as archive:
        for number, answer in enumerate(ANSWERS):
            text = json.dumps({"messages": talk(answer)}).encode()
            for name, data in ((f"{number}.png", png()), (f"{number}.json", text)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder / "shard-000.tar"


def make_lines(folder):
    (folder / "a.png").write_bytes(png())
    lines = [json.dumps({"messages": talk(answer), "images": ["a.png"]}) for answer in ANSWERS]
    (folder / "rows.jsonl").write_text("\n\n".join(lines) + "\n\n")
    return folder / "rows.jsonl"


def make_text_only(folder):
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"messages": talk(answer, image=False)}) + "\n" for answer in ANSWERS)
    )
    return folder / "rows.jsonl"


def make_text_only_parquet(folder):
    rows = [{"prompt": "Which colour?", "completion": answer} for answer in ANSWERS]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


MADE = {
    "lines": make_lines,
    "table": make_csv,
    "image folder": make_image_folder,
    "tar": make_tar,
    "text only": make_text_only,
    "text only in parquet": make_text_only_parquet,
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_answers_of_a_file_are_trained_as_they_are(kind, streaming, tmp_path, check):
    changes = {"streaming": True, "max_steps": 2} if streaming else {}
    code, printed, report = check(MADE[kind](tmp_path), decode_images=True, **changes)
    assert code == 0, printed
    assert trained_texts(report) == ANSWERS
    assert report["totals"]["images"] == (0 if "text only" in kind else 3)


def test_text_only_rows_train_with_images_in_a_folder_and_a_list(tmp_path, check, make_options):
    folder = tmp_path / "data"
    folder.mkdir()
    make_lines(folder).rename(folder / "images.jsonl")
    make_text_only(folder)
    code, printed, report = check(folder)
    assert code == 0, printed
    assert trained_texts(report) == sorted(2 * ANSWERS, key=ANSWERS.index)
    assert "Files of" in printed
    entries = [{"path": str(folder / name), "weight": 1} for name in ("images.jsonl", "rows.jsonl")]
    code, printed, report = check(json.dumps(entries))
    assert code == 0, printed
    tuning.train(make_options("granite_vision", training_data_path=entries, max_steps=2, per_device_train_batch_size=2))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "metadata.jsonl"])
def test_the_command_that_the_error_names_makes_the_file_trainable(name, tmp_path, check, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.png").write_bytes(png())
    column = "file_name" if name.startswith("metadata") else "images"
    rows = [{column: "a b.png", "user": "Which colour?", "assistant": answer} for answer in ANSWERS]
    if name.endswith(".csv"):
        write_table(tmp_path / name, rows)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, printed, _ = check(name)
    assert code == 1
    command = re.search(r"vlm-tuning (convert .*)", printed)
    assert command, printed
    assert cli.main(shlex.split(command[1])) == 0, capsys.readouterr()
    code, printed, report = check(shlex.split(command[1])[2])
    assert code == 0, printed
    assert trained_texts(report) == ANSWERS
    assert report["totals"]["images"] == 3


def test_captions_are_converted_with_one_question(tmp_path, check, capsys):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for number, answer in enumerate(ANSWERS):
            for name, data in ((f"{number}.jpg", png()), (f"{number}.txt", answer.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    flags = {"answer_column": "txt", "question": "Which colour?"}
    code, printed = run("convert", flags, capsys, str(tmp_path / "shard.tar"), str(tmp_path / "rows.jsonl"))
    assert code == 0, printed
    code, printed, report = check(tmp_path / "rows.jsonl")
    assert code == 0, printed
    assert trained_texts(report) == ANSWERS
    assert "Which colour?" in report["samples"][0]["rendered_text"]
    assert report["totals"]["images"] == 3


@pytest.mark.parametrize(
    "flags",
    [
        {"question_column": "q"},
        {"answer_column": "a"},
        {"image_column": "i"},
        {"question_column": "q", "question": "q", "answer_column": "a"},
    ],
)
def test_convert_needs_a_question_and_an_answer(flags, tmp_path, capsys):
    path = make_text_only(tmp_path)
    code, printed = run("convert", flags, capsys, str(path), str(tmp_path / "out.jsonl"))
    assert code == 1
    assert "a row needs one question and one answer" in printed
    assert "Traceback" not in printed


def test_a_configuration_of_a_file_is_refused(tmp_path, check, make_options, capsys):
    path = make_text_only(tmp_path)
    code, printed, _ = check(path, dataset_config_name="en")
    assert code == 1
    assert "dataset_config_name en: has no effect on" in printed
    flags = {"dataset_config_name": "en"}
    code, printed = run("convert", flags, capsys, str(path), str(tmp_path / "out.jsonl"))
    assert code == 1
    assert "dataset_config_name en: has no effect on" in printed


def test_predict_reads_the_images_of_an_archive(tmp_path, models, capsys):
    options = {
        "model_name_or_path": models["granite_vision"],
        "data_path": make_tar(tmp_path),
        "output": tmp_path / "answers.jsonl",
        "max_new_tokens": 2,
    }
    code, printed = run("predict", options, capsys)
    assert code == 0, printed
    assert [line["reference"] for line in read_lines(tmp_path / "answers.jsonl")] == ANSWERS


# --- validation_split ---


def test_rows_that_are_held_out_are_checked_but_not_trained(rows, check):
    code, printed, report = check(rows, validation_split=0.25, sample_rows=16)
    assert code == 0, printed
    assert "validation_split: 4 rows are held out, 12 rows are trained." in printed
    assert report["totals"]["rows"] == len(report["samples"]) == 12
    assert report["totals"]["validation_rows"] == 4
    trained = {sample["row"] for sample in report["samples"]}
    assert len(trained) == 12
    assert max(trained) > 11  # as they are counted in the file
    again = check(rows, validation_split=4, sample_rows=16)[2]
    assert {sample["row"] for sample in again["samples"]} == trained
    budget = check(rows, validation_split=4, max_tokens_per_batch=2000)[2]
    assert budget["totals"]["rows"] == 12


def test_a_run_evaluates_on_held_out_rows_and_a_resumed_one_on_the_same(rows, make_options, trainers, capsys):
    changes = {"validation_split": 5, "eval_generate_rows": 2, "eval_max_new_tokens": 2, "save_strategy": "epoch"}
    options = make_options("granite_vision", **changes, num_train_epochs=1, per_device_train_batch_size=2)
    result = tuning.train(options)
    assert "eval_loss" in result.metrics
    tuning.train({**options, "num_train_epochs": 2})
    held = [{row.number for row in trainer.loading.data.validation.source} for trainer in trainers]
    trained = [{row.number for row in trainer.loading.data.train.source} for trainer in trainers]
    assert held[0] == held[1]
    assert trained[0] == trained[1] == set(range(16)) - held[0]
    assert trainers[1].state.global_step == 12  # of 11 rows, 6 steps an epoch
    assert {line["row"] for line in read_lines(rows.parent / SAMPLES_FILE)} <= held[0]

    code, printed = run("train", {**options, "num_train_epochs": 3, "validation_split": 6}, capsys)
    assert code == 1
    assert "validation_split was 5.0, is 6.0" in printed
    code, printed = run("train", {**options, "num_train_epochs": 3, "seed": 7}, capsys)
    assert code == 1
    assert "seed of validation_split was 42, is 7" in printed


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"validation_split": 1.5}, "must be a share below 1 or a whole number of rows, got 1.5"),
        ({"validation_split": 0}, "validation_split: must be above 0"),
        ({"validation_split": "inf"}, "validation_split: must be"),
        ({"validation_split": 16}, "16 of 16 rows would be held out"),
        ({"validation_split": 0.001}, "none of 16 rows would be held out"),
        ({"validation_split": 0.1, "streaming": True, "max_steps": 1}, "does not go with streaming"),
        ({"validation_split": 0.1, "validation_data_path": "rows"}, "both give the rows to evaluate on"),
    ],
)
def test_a_split_that_cannot_work_is_refused_early(rows, check, changes, problem):
    changes = {name: rows if value == "rows" else value for name, value in changes.items()}
    code, printed, _ = check(rows, **changes)
    assert code == 1
    assert problem in printed
    assert "Traceback" not in printed
