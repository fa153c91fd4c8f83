"""report_to with real trackers that write to files: scores, all options, and one run across restarts."""

import json
import os
import shutil
import sys
from types import ModuleType

import pytest
from transformers import TrainerCallback

import tuning
from tuning.config.parse import build_config
from tuning.errors import UserError
from tuning.training.trackers import environment

LORA = {"peft_method": "lora", "target_modules": ["q_proj"], "r": 4}
SCORED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    """MLflow's client, whose runs are files of this test; it is left as it was."""
    module = pytest.importorskip("mlflow", reason="pip install -e '.[dev]'")
    before = module.get_tracking_uri() if module.is_tracking_uri_set() else None
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    module.set_tracking_uri((tmp_path / "mlflow").as_uri())
    yield module
    module.end_run()
    module.set_tracking_uri(before)


def read_events(folder):
    """The scalars, as tag → [(step, value)], and texts that TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    return scalars, texts


def test_runs_are_recorded_with_scores_and_options_and_continue(mlflow, rows, make_options, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -e '.[dev]'")
    changes = {"report_to": ["tensorboard", "mlflow"], "validation_data_path": str(rows), **SCORED, **LORA}
    tuning.train(make_options("llava15", max_steps=3, **changes))
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")  # as if it had been stopped before: step 3 is trained again
    tuning.train(make_options("llava15", max_steps=4, **changes))

    assert [folder.name for folder in (tmp_path / "out" / "runs").iterdir()] == ["out"]  # not one a start
    scalars, texts = read_events(tmp_path / "out" / "runs" / "out")
    logged = [json.loads(line) for line in (tmp_path / "out" / "training_logs.jsonl").read_text().splitlines()]
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        expected = [(line["step"], pytest.approx(line[name])) for line in logged if name in line]
        assert [step for step, _ in expected] == [1, 2, 3, 4]
        assert scalars[tag] == expected
    options = json.loads(texts["args/text_summary"])
    assert (options["r"], options["training_data_path"], options["max_steps"]) == (4, str(rows), 4)

    (run,) = mlflow.MlflowClient().search_runs(["0"])  # not one a start
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    assert (run.data.params["r"], run.data.params["training_data_path"]) == ("4", str(rows))
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "eval_loss")
    assert {entry.step for entry in history} == {1, 2, 3, 4}
    assert history[-1].value == pytest.approx(logged[-1]["eval_loss"])
    assert "MLFLOW_RUN_ID" not in os.environ


def test_a_run_that_starts_anew_is_another_run(mlflow, make_options, tmp_path):
    changes = {"report_to": "mlflow", "run_name": "mine", "max_steps": 1, "overwrite_output_dir": True}
    for _ in range(2):
        tuning.train(make_options("llava15", **changes))
    assert [run.info.run_name for run in mlflow.MlflowClient().search_runs(["0"])] == ["mine", "mine"]


def test_what_a_tracker_refuses_ends_the_run_with_its_words(mlflow, make_options):
    mlflow.set_tracking_uri("nowhere://here")
    with pytest.raises(UserError, match=r"report_to: mlflow cannot be used: .*nowhere"):
        tuning.train(make_options("llava15", report_to="mlflow", max_steps=1))


def test_aim_records_all_options_and_every_start_is_a_run_of_its_own(make_options, monkeypatch):
    """Aim itself is not installed here: a callback with its signature stands in for it."""
    begun = []

    class AimCallback(TrainerCallback):
        def __init__(self, log_system_params=True):
            assert not log_system_params  # environment variables, that is: they may hold secrets

        def on_init_end(self, args, state, control, **kwargs):
            pytest.fail("a run would begin before training does, without the options of LoRA and of the data")

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            begun.append((state.global_step, args.to_sanitized_dict()["r"], model))

    module = ModuleType("aim.hugging_face")
    module.AimCallback = AimCallback
    monkeypatch.setitem(sys.modules, "aim.hugging_face", module)
    monkeypatch.setattr("tuning.config.rules.find_spec", lambda name: True)
    for steps in (1, 2):
        tuning.train(make_options("llava15", report_to="aim", max_steps=steps, **LORA))
    assert begun == [(0, 4, None), (1, 4, None)]


def test_tensorboard_writes_where_logging_dir_says(make_options, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -e '.[dev]'")
    tuning.train(make_options("llava15", report_to="tensorboard", max_steps=1, logging_dir=str(tmp_path / "boards")))
    assert [step for step, _ in read_events(tmp_path / "boards")[0]["train/loss"]] == [1]
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("report_to", "said"),
    [
        ("wandb", "report_to: wandb is not installed; run pip install wandb"),
        (["tensorboard", "comet_ml"], "report_to: comet_ml is not installed; run pip install comet-ml"),
        ("tensorbord", "report_to: 'tensorbord' is unknown; did you mean tensorboard?"),
    ],
)
def test_a_missing_or_unknown_tracker_is_said_at_once(report_to, said, make_options, monkeypatch):
    monkeypatch.setattr("tuning.config.rules.find_spec", lambda name: None if name != "tensorboard" else name)
    with pytest.raises(UserError, match="config") as error:
        build_config(make_options("llava15", report_to=report_to))
    assert said in str(error.value)


def test_a_run_is_called_like_its_output_folder_unless_it_has_a_name(make_options):
    pytest.importorskip("tensorboard", reason="pip install -e '.[dev]'")
    assert build_config(make_options("llava15", report_to="tensorboard")).training.run_name == "out"
    assert build_config(make_options("llava15", report_to="tensorboard", run_name="x")).training.run_name == "x"
    assert build_config(make_options("llava15")).training.run_name is None


def test_the_users_environment_comes_first_and_stays(monkeypatch):

    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    with environment({"WANDB_RUN_ID": "ours", "WANDB_RESUME": "allow"}):
        assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == ("mine", "allow")
    assert os.environ["WANDB_RUN_ID"] == "mine"
    assert "WANDB_RESUME" not in os.environ
