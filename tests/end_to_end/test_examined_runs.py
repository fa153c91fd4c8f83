"""Validation rows that are answered during training: scores, the best model by them, early stopping, samples."""

import json
from pathlib import Path

import pytest
import torch
from predictions import read_lines
from safetensors.torch import load_file
from tiny_models import LAYOUTS

from tuning import cli, train
from tuning.errors import UserError


@pytest.fixture(scope="module")
def colours(rows):
    """The rows with the name of their colour as the whole answer."""
    path, text = rows.with_name("colours.jsonl"), rows.read_text()
    path.write_text(text.replace(" Very much so.", ""))
    return path


@pytest.fixture
def learn(make_options, colours):
    """Learn the rows, examined by the same."""

    def run(layout="llava15", **changes):
        options = make_options(
            layout,
            training_data_path=str(colours),
            validation_data_path=str(colours),
            eval_generate_rows=8,
            per_device_eval_batch_size=4,
            eval_max_new_tokens=24,
            **changes,
        )
        return options, train(options)

    return run


def test_scores_of_answers_are_logged_and_are_those_of_predict(learn, colours, tmp_path):
    options, result = learn(
        report_samples=3,
        eval_metrics=["exact_match", "token_f1"],
        eval_strategy="steps",
        eval_steps=10,
        max_steps=40,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
    )
    logged = [line for line in read_lines(f"{options['output_dir']}/training_logs.jsonl") if "eval_loss" in line]
    assert len(logged) == 4
    assert logged[0]["eval_exact_match"] < logged[-1]["eval_exact_match"] == 1.0
    assert result.metrics["eval_token_f1"] == logged[-1]["eval_token_f1"]
    words = ["--model_name_or_path", options["output_dir"], "--data_path", str(colours), "--max_rows", "8"]
    words += ["--metrics", "exact_match", "token_f1", "--max_new_tokens", "24", "--output", str(tmp_path / "p.jsonl")]
    assert cli.main(["predict", *words]) == 0
    scores = json.loads((tmp_path / "p.scores.json").read_text())["scores"]["prediction"]
    assert scores == pytest.approx({name: logged[-1][f"eval_{name}"] for name in scores})

    samples = read_lines(f"{options['output_dir']}/sample_predictions.jsonl")
    by_step = {}
    for line in samples:
        by_step.setdefault(line["step"], []).append(line)
    assert sorted(by_step) == [0, 10, 20, 30, 40]
    assert all([line["row"] for line in lines] == [0, 1, 2] for lines in by_step.values())
    assert [line["images"][0][:23] for line in by_step[0]] == ["data:image/jpeg;base64,"] * 3
    assert not any("images" in line for line in samples if line["step"])
    predicted = {line["row"]: line["prediction"] for line in read_lines(tmp_path / "p.jsonl")}
    assert [line["prediction"] for line in by_step[40]] == [predicted[row] for row in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answering_changes_nothing_that_is_trained(make_options, rows, tmp_path, layout):
    weights = []
    for name, changes in {
        "without": {},
        "with": {"report_samples": 2, "eval_generate_rows": 2, "eval_max_new_tokens": 4},
    }.items():
        options = make_options(
            layout,
            validation_data_path=str(rows),
            peft_method="lora",
            target_modules="all-linear",
            lora_dropout=0.2,
            output_dir=str(tmp_path / name),
            eval_strategy="steps",
            eval_steps=1,
            max_steps=3,
            **changes,
        )
        train(options)
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


SCORES = [0.2, 0.9, 0.5, 0.4, 0.3, 0.95, 0.1, 0.1]


@pytest.fixture
def give_scores(monkeypatch):
    """Let evaluations have these scores, one after the other; an exception among them is raised."""

    def give(scores):
        left = iter(scores)

        def score(by_metric):
            value = next(left)
            if isinstance(value, Exception):
                raise value
            return {"exact_match": value}

        monkeypatch.setattr("tuning.training.evaluation.mean_scores", score)

    return give


EARLY = {"num_train_epochs": 8, "early_stopping_patience": 3, "metric_for_best_model": "exact_match"}


def test_a_run_stops_early_and_keeps_the_best_also_after_an_interruption(learn, give_scores, tmp_path, capsys):
    give_scores(SCORES)
    _, result = learn(**EARLY, output_dir=str(tmp_path / "whole"))
    assert result.global_step == 5 * 4  # three evaluations after the best one, of every fourth step
    assert "load_best_model_at_end True" in capsys.readouterr().out
    give_scores([*SCORES[:3], RuntimeError("interrupted")])
    with pytest.raises(RuntimeError, match="interrupted"):
        learn(**EARLY, output_dir=str(tmp_path / "twice"))
    give_scores(SCORES[3:])
    assert learn(**EARLY, output_dir=str(tmp_path / "twice"))[1].global_step == 5 * 4
    whole, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "twice"))
    best, last = (load_file(tmp_path / f"whole/checkpoint-{step}/model.safetensors") for step in (8, 20))
    assert all(torch.equal(whole[name], twice[name]) and torch.equal(whole[name], best[name]) for name in whole)
    assert not all(torch.equal(whole[name], last[name]) for name in whole)


def test_scores_that_are_not_computed_cannot_choose_the_best_model(make_options, colours):
    options = make_options("llava15", validation_data_path=str(colours), metric_for_best_model="anls")
    with pytest.raises(UserError, match="anls is not among loss; scores such as exact_match need eval_generate_rows"):
        train(options)
    options = make_options("llava15", validation_data_path=str(colours), eval_generate_rows=4, eval_metrics="anl")
    with pytest.raises(UserError, match=r"eval_metrics: there is no score anl\. Did you mean anls\?"):
        train(options)
    options = make_options("llava15", eval_generate_rows=4)
    with pytest.raises(UserError, match="eval_generate_rows: needs evaluations"):
        train(options)


def test_the_best_model_is_kept_where_evaluations_follow_the_log(learn, give_scores, tmp_path):
    """Without `eval_steps`, Hugging Face evaluates at every `logging_steps`."""
    give_scores([0.9, 0.5, 0.4])
    changes = {"early_stopping_patience": 2, "metric_for_best_model": "exact_match", "eval_strategy": "steps"}
    options, result = learn(**changes, logging_steps=4, num_train_epochs=8)
    folder = Path(options["output_dir"])
    assert result.global_step == 12
    best, final = (load_file(folder / name / "model.safetensors") for name in ("checkpoint-4", "."))
    assert all(torch.equal(final[name], best[name]) for name in final)
    assert "0.9" in (folder / "README.md").read_text()


def test_a_best_model_that_was_not_saved_is_told(learn, give_scores, capsys):
    give_scores([0.9, 0.5, 0.4])
    changes = {"load_best_model_at_end": True, "metric_for_best_model": "exact_match", "eval_strategy": "steps"}
    options, _ = learn(**changes, eval_steps=4, save_strategy="steps", save_steps=8, max_steps=12)
    assert "Warning: the model of the best step, 4, was not saved" in capsys.readouterr().out
    assert "| `eval_exact_match` | 0.9" not in Path(options["output_dir"], "README.md").read_text()


def test_a_run_killed_after_it_stopped_early_only_saves(learn, give_scores, tmp_path, monkeypatch):
    give_scores(SCORES)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tuning.training.checkpointing.ResumableTrainer.save_final", die)
        with pytest.raises(KeyboardInterrupt):
            learn(**EARLY)
    assert learn(**EARLY)[1].global_step == 5 * 4


def test_rows_that_are_dropped_or_ask_without_an_answer_are_not_examined(make_options, rows):
    lines = read_lines(rows)
    lines[0]["messages"][0]["content"][1]["text"] = "Which colour is it? " * 300
    lines[1]["messages"].append({"role": "user", "content": "And why?"})
    path = rows.with_name("odd_first.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"overlong_rows": "drop", "max_seq_length": 150, "report_samples": 4, "eval_generate_rows": 4}
    options = make_options("llava15", training_data_path=str(path), validation_data_path=str(path), max_steps=4)
    train({**options, **changes, "eval_max_new_tokens": 3, "save_strategy": "no"})
    samples = read_lines(f"{options['output_dir']}/sample_predictions.jsonl")
    assert {line["row"] for line in samples} == {2, 3}


def test_a_model_that_cannot_write_answers_is_trained_all_the_same(make_options, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no cache for this model")

    monkeypatch.setattr("tuning.training.evaluation.answer", fail)
    options = make_options("llava15", report_samples=2, max_steps=2, save_strategy="no")
    train(options)
    assert "The report shows no samples. This model cannot answer by generation here" in capsys.readouterr().out
    changes = {"validation_data_path": options["training_data_path"], "eval_generate_rows": 2}
    with pytest.raises(UserError, match="cannot answer by generation here"):
        train({**options, **changes, "overwrite_output_dir": True})
