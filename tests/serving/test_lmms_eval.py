"""lmms-eval gives a merged model the score that `predict` gives it, on the task of docs/lmms-eval.md."""

import contextlib
import json
import subprocess
from pathlib import Path

import pandas
import pytest
from docs_text import ROOT, blocks
from serving.conftest import environ, make_environment
from serving.merging import merge

from tuning import cli

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "lmms-eval.md"


def write_rows(rows: Path, answers: list[str], folder: Path) -> None:
    """The rows with other answers: for `predict`, and as the table that the page's task reads."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    table = []
    for line, answer in zip(lines, answers, strict=True):
        line["messages"][1]["content"] = answer
        picture = {"bytes": (rows.parent / line["images"][0]).read_bytes(), "path": None}
        table.append({"image": picture, "question": "Which colour is it?", "answer": answer})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pandas.DataFrame(table).to_parquet(folder / "my_tasks" / "questions.parquet")


def predict(folder: Path, model: Path, pictures: Path, name: str) -> tuple[list[str], float]:
    """What the model answers, and its score."""
    words = ["--model_name_or_path", str(model), "--data_path", str(folder / "rows.jsonl"), "--max_new_tokens", "8"]
    words += ["--output", str(folder / f"{name}.jsonl"), "--metrics", "exact_match", "--image_folder", str(pictures)]
    assert cli.main(["predict", *words]) == 0
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    scores = json.loads((folder / f"{name}.scores.json").read_text())["scores"]
    return [line["prediction"] for line in lines], scores["prediction"]["exact_match"]


def test_its_score_is_that_of_predict(published, rows, tmp_path):
    python = make_environment("lmms_eval")
    merged = merge(published / "llava15", tmp_path)
    (tmp_path / "my_tasks").mkdir()
    for language, name in (("yaml", "my_task.yaml"), ("python", "my_task.py")):
        (tmp_path / "my_tasks" / name).write_text(blocks(PAGE, language)[0])
    write_rows(rows, ["?"] * 16, tmp_path)
    answers, score = predict(tmp_path, merged, rows.parent, "first")
    assert score == 0
    write_rows(rows, answers[:6] + ["?"] * 10, tmp_path)
    again, score = predict(tmp_path, merged, rows.parent, "second")
    assert (again, score) == (answers, 6 / 16)
    command = next(line for line in blocks(PAGE, "bash")[1].splitlines() if "lmms_eval" in line)
    words = [str(python), *command.replace("device_map=cuda", "device_map=cpu,device=cpu,dtype=float32").split()[1:]]
    with contextlib.chdir(tmp_path):
        done = subprocess.run(words, env=environ(), capture_output=True, text=True, check=False)
    found = next(tmp_path.glob("scores/*/*_results.json"), None)  # the exit code is 0 after an error, too
    assert found, done.stderr[-4000:]
    assert json.loads(found.read_text())["results"]["my_task"]["exact_match,none"] == pytest.approx(score)
