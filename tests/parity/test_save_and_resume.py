"""What is on disk is what was trained; a run goes on from there, or says why it cannot."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_models import LAYOUTS
from transformers import AutoModelForImageTextToText, AutoProcessor

import tuning
from tuning.data.balance import UNIT, RowCost
from tuning.data.encode import Encoder
from tuning.data.from_config import ROWS_CHECKED_FIRST
from tuning.errors import UserError
from tuning.files import FINGERPRINT_FILE
from tuning.model.padding_free import Packing
from tuning.training.resume import COST

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4}
METHODS = {"full": {}, "lora": LORA}


def read_steps(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "training_logs.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def assert_identical(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def contents(folder: Path) -> dict[str, tuple]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def cut_back(whole: Path, target: Path, step: int) -> Path:
    """`target` as `whole` was when its run was killed after the checkpoint of `step`."""
    shutil.copytree(whole / f"checkpoint-{step}", target / f"checkpoint-{step}")
    shutil.copy(whole / "training_logs.jsonl", target)
    return target


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_transformers_loads_the_very_model_that_was_trained(layout, method, make_options, trainers, rows, capsys):
    options = make_options(layout, **METHODS[method], max_steps=2, learning_rate=1e-2)
    folder = tuning.train(options).model_dir
    assert f"Read {folder} back: its weights and logits are those that were trained." in capsys.readouterr().out
    if method == "full":
        loaded, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    else:
        base = AutoModelForImageTextToText.from_pretrained(options["model_name_or_path"])
        loaded = PeftModel.from_pretrained(base, folder)
    start = AutoModelForImageTextToText.from_pretrained(options["model_name_or_path"])
    processor = AutoProcessor.from_pretrained(folder)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour is it?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(rows.parent / "1.png")], return_tensors="pt")
    with torch.no_grad():
        trained, reloaded, untrained = (m.eval()(**inputs).logits for m in (trainers[0].model, loaded, start))
    assert torch.equal(reloaded, trained)
    assert not torch.equal(reloaded, untrained)


RESUMED = [("granite_vision", "full"), ("llava_next_vicuna", "full"), ("llava16_mistral", "lora"), ("mllama", "lora")]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("layout", "method"), RESUMED)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(layout, method, workers, make_options, tmp_path):
    # Four steps an epoch: the run goes on in the middle of the first and through the second.
    changes = {**METHODS[method], "max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2}
    changes |= {"per_device_train_batch_size": 2, "dataloader_num_workers": workers}
    whole = tuning.train(make_options(layout, **changes)).model_dir
    cut = cut_back(whole, tmp_path / "cut", 3)
    tuning.train(make_options(layout, **changes, output_dir=str(cut)))
    assert_identical(weights_of(cut), weights_of(whole))
    assert read_steps(cut) == read_steps(whole)
    assert [step for step, _ in read_steps(cut)] == [1, 2, 3, 4, 5, 6]


BATCHES = {
    "grouped": {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 1},
    "grouped, padded": {"padding_free": False, "per_device_train_batch_size": 1},
    "budget": {"max_tokens_per_batch": 300},
    "budget, padded": {"max_tokens_per_batch": 300, "padding_free": False},
    "budget, epochs": {"max_tokens_per_batch": 300, "max_steps": -1, "num_train_epochs": 3},
}


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("stop", [1, 6])
def test_a_run_goes_on_with_the_rows_it_would_have_had(batches, stop, make_options, tmp_path, monkeypatch):
    monkeypatch.setattr("tuning.data.batch_sampler.STEPS_OF_WINDOW", 2)
    monkeypatch.setattr("tuning.data.batch_sampler.LEAST_ROWS", 1)
    monkeypatch.setattr("tuning.data.batch_sampler.PACKED_ROWS", 6)
    changes = {"max_steps": 12, "gradient_accumulation_steps": 2, "save_steps": 1, **BATCHES[batches]}

    def options(folder: str) -> dict:
        made = make_options("llava15", **changes, output_dir=str(tmp_path / folder))
        return made if "per_device_train_batch_size" in changes else _without(made, "per_device_train_batch_size")

    whole = tuning.train(options("whole")).model_dir
    cut = cut_back(whole, tmp_path / "cut", stop)
    seen, encode = list[int](), Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda encoder, row: seen.append(row.number) or encode(encoder, row))
    tuning.train(options("cut"))
    assert_identical(weights_of(cut), weights_of(whole))
    assert read_steps(cut) == read_steps(whole)
    steps = len(read_steps(whole))
    assert steps > 8
    if "per_device_train_batch_size" in changes:
        assert len(seen) == ROWS_CHECKED_FIRST + 2 * (steps - stop)  # no row of a step that was done


@pytest.mark.parametrize("changes", [{"per_device_train_batch_size": 2}, {"max_tokens_per_batch": 300}], ids=str)
def test_a_run_that_must_pad_from_now_on_keeps_its_order(changes, make_options, tmp_path, monkeypatch):
    """What decides about padding (the start-up check, the attention) may come out otherwise the next time."""
    monkeypatch.setattr("tuning.data.batch_sampler.LEAST_ROWS", 1)
    changes = {"max_steps": 6, "save_steps": 3, **changes}
    seen, encode = list[int](), Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda encoder, row: seen.append(row.number) or encode(encoder, row))

    def run(folder: Path, **more) -> list[int]:
        seen.clear()
        options = make_options("llava15", **changes, **more, output_dir=str(folder))
        tuning.train(
            options if "per_device_train_batch_size" in changes else _without(options, "per_device_train_batch_size")
        )
        return seen[ROWS_CHECKED_FIRST:]

    whole = run(tmp_path / "whole")
    cut = cut_back(tmp_path / "whole", tmp_path / "cut", 3)
    padded = Packing(reason="on this GPU")
    monkeypatch.setattr("tuning.training.data_loading.find_packing", lambda *args, **options: padded)
    if "max_tokens_per_batch" in changes:
        with pytest.raises(UserError, match="must be padded, but they were filled as if they were not"):
            run(cut)
    else:
        rest = run(cut)
        assert rest == whole[-len(rest) :]
        assert len(rest) == 6


@pytest.mark.parametrize("before", [RowCost(UNIT, 10, 3), None], ids=["of another version", "of an earlier version"])
def test_a_run_keeps_the_costs_that_balanced_it(before, make_options, tmp_path, monkeypatch):
    changes = {"max_tokens_per_batch": 300, "max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2}
    seen, encode = list[int](), Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda encoder, row: seen.append(row.number) or encode(encoder, row))

    def run(folder: Path, cost: RowCost | None) -> list[int]:
        monkeypatch.setattr("tuning.training.data_loading.find_row_cost", lambda flops, picture: cost)
        seen.clear()
        options = make_options("llava15", **changes, output_dir=str(folder))
        tuning.train(_without(options, "per_device_train_batch_size"))
        return seen[ROWS_CHECKED_FIRST:]

    whole = run(tmp_path / "whole", before)
    cut = cut_back(tmp_path / "whole", tmp_path / "cut", 3)
    identity = cut / "checkpoint-3" / FINGERPRINT_FILE
    kept = json.loads(identity.read_text())
    assert kept.pop(COST) == (before and [UNIT, 10, 3])
    if before is None:  # earlier versions did not write it
        identity.write_text(json.dumps(kept))
    counted_now = RowCost(UNIT, 0, 99 * UNIT)
    rest = run(cut, counted_now)
    assert rest == whole[-len(rest) :]
    assert run(tmp_path / "other", counted_now)[-len(rest) :] != rest


def _without(options: dict, name: str) -> dict:
    return {key: value for key, value in options.items() if key != name}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"train_sampling_strategy": "random"}, 'train_sampling_strategy was "by padding", is "random"'),
        ({}, {"padding_free": False}, 'padding_free was "auto", is false'),
        ({"max_tokens_per_batch": 300}, {"max_tokens_per_batch": 200}, "max_tokens_per_batch was 300, is 200"),
        ({"max_tokens_per_batch": 300}, {"per_device_train_batch_size": 4}, "max_tokens_per_batch was 300, is null"),
        ({"max_tokens_per_batch": 300}, {"max_tokens_per_batch": 300, "max_steps": -1}, "what ends the run was"),
        (
            {"max_tokens_per_batch": 300},
            {"max_tokens_per_batch": 300, "gradient_accumulation_steps": 2},
            "processes × gradient_accumulation_steps was 1, is 2",
        ),
    ],
)
def test_what_decides_the_rows_of_a_step_cannot_change(before, after, told, make_options):
    first, then = (
        _without(make_options("llava15", max_steps=1), "per_device_train_batch_size") | changes
        for changes in (before, after)
    )
    folder = tuning.train(first).model_dir
    (folder / ".complete").unlink()
    with pytest.raises(UserError, match=re.escape(told)):
        tuning.train(then)


def test_a_finished_run_is_not_repeated(make_options, capsys):
    options = make_options("llava15", max_steps=2)
    first = tuning.train(options)
    before = contents(first.model_dir)
    capsys.readouterr()
    again = tuning.train(options)
    assert "already finished after 2 steps" in capsys.readouterr().out
    assert (again.global_step, again.model_dir) == (2, first.model_dir)
    assert contents(first.model_dir) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_half_written_final_save_is_finished_without_training(method, make_options, capsys):
    options = make_options("llava15", **METHODS[method], max_steps=2)
    folder = tuning.train(options).model_dir
    expected, log = weights_of(folder), (folder / "training_logs.jsonl").read_text()
    for name in (".complete", "model.safetensors", "adapter_model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    capsys.readouterr()
    assert tuning.train(options).global_step == 2
    assert "only the final model remains to be saved" in capsys.readouterr().out
    assert_identical(weights_of(folder), expected)
    assert (folder / "training_logs.jsonl").read_text() == log
    assert (folder / ".complete").exists()


def test_more_epochs_go_on_from_the_finished_run(make_options, capsys):
    folder = tuning.train(make_options("llava15", num_train_epochs=1)).model_dir
    assert tuning.train(make_options("llava15", num_train_epochs=2)).global_step == 8
    lines = [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["step"] > 4]
    torch.testing.assert_close(rates, [1e-3 * (8 - step) / 8 for step in range(4, 8)])  # none of the old schedule's end
    assert f"Continuing from {folder / 'checkpoint-4'}" in capsys.readouterr().out
    assert [step for step, _ in read_steps(folder)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("shorter", "told"),
    [({"num_train_epochs": 1}, "num_train_epochs 1.0 sets, step 4"), ({"max_steps": 6}, "max_steps 6 sets, step 6")],
)
def test_a_run_that_would_end_before_its_checkpoint_is_refused(shorter, told, make_options):
    folder = tuning.train(make_options("llava15", num_train_epochs=2)).model_dir
    before = contents(folder)
    with pytest.raises(UserError, match=f"checkpoint-8: is past the end that {told}"):
        tuning.train(make_options("llava15", **{"num_train_epochs": 2, **shorter}))
    assert contents(folder) == before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, models, rows):
    """A LoRA run of four steps, killed after its checkpoint of step 2. Copied before use."""
    root = tmp_path_factory.mktemp("stopped")
    options = {
        "model_name_or_path": str(models["llava15"]),
        "training_data_path": str(rows),
        "output_dir": str(root / "whole"),
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 0,
        "report_samples": 0,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        **LORA,
    }
    tuning.train(options)
    cut_back(root / "whole", root / "cut", 2)
    return root / "cut", options


@pytest.fixture
def resumable(stopped, tmp_path):
    """The options that continue a copy of `stopped`."""
    folder, options = stopped
    shutil.copytree(folder, tmp_path / "cut")
    return {**options, "output_dir": str(tmp_path / "cut")}


CHANGES = {
    "r": 8,
    "target_modules": ["q_proj"],
    "freeze_vision_tower": False,
    "assistant_only_loss": False,
    "max_seq_length": 900,
    "peft_method": "none",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_option_is_named_on_resume(name, resumable):
    changed = {**resumable, name: CHANGES[name]}
    before = contents(Path(resumable["output_dir"]))
    with pytest.raises(UserError, match=f"cannot be resumed, because .*{name} was"):
        tuning.train(changed)
    assert contents(Path(resumable["output_dir"])) == before


def test_another_data_file_is_named_on_resume(resumable, rows, tmp_path):
    shutil.copytree(rows.parent, tmp_path / "other")
    with pytest.raises(UserError, match="training_data_path was"):
        tuning.train({**resumable, "training_data_path": str(tmp_path / "other" / "rows.jsonl")})


def test_a_data_file_that_grew_is_named_on_resume(make_options, rows, tmp_path):
    shutil.copytree(rows.parent, tmp_path / "data")
    data = tmp_path / "data" / "rows.jsonl"
    options = make_options("llava15", training_data_path=str(data), max_steps=2, save_steps=1)
    folder = tuning.train(options).model_dir
    (folder / ".complete").unlink()
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"rows was .*16.* is .*17"):
        tuning.train(options)


def test_another_model_is_named_on_resume(resumable, models):
    with pytest.raises(UserError, match="model_name_or_path was"):
        tuning.train({**resumable, "model_name_or_path": str(models["llava16_mistral"])})


def test_resuming_can_be_forbidden(resumable):
    with pytest.raises(UserError, match="holds an earlier run, and resume_from_checkpoint is false"):
        tuning.train({**resumable, "resume_from_checkpoint": False})


def test_resuming_can_be_demanded(make_options):
    with pytest.raises(UserError, match="there is no complete checkpoint"):
        tuning.train(make_options("llava15", resume_from_checkpoint=True))


def test_overwriting_starts_over(resumable):
    folder = Path(resumable["output_dir"])
    (folder / "checkpoint-99").mkdir()
    tuning.train({**resumable, "overwrite_output_dir": True, "r": 2, "save_steps": 4})
    assert [step for step, _ in read_steps(folder)] == [1, 2, 3, 4]
    assert [found.name for found in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_half_written_checkpoint_is_named_and_ignored(resumable, capsys):
    folder = Path(resumable["output_dir"])
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-3")
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    assert tuning.train(resumable).global_step == 4
    said = capsys.readouterr().out
    assert f"{folder / 'checkpoint-3'} was not written completely and is ignored" in said
    assert f"Continuing from {folder / 'checkpoint-2'}" in said


def test_an_incomplete_checkpoint_is_refused_where_it_is_asked_for(resumable):
    folder = Path(resumable["output_dir"]) / "checkpoint-2"
    (folder / "trainer_state.json").write_text('{"global_')
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        tuning.train({**resumable, "resume_from_checkpoint": str(folder)})


@pytest.mark.parametrize("killed", [False, True], ids=["saved", "killed before the final save"])
@pytest.mark.parametrize("method", METHODS)
def test_the_best_weights_are_the_final_ones(method, killed, make_options, rows):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    changes |= {"max_steps": 3, "learning_rate": 5.0, "lr_scheduler_type": "constant"}  # every step is a bad one
    options = make_options("llava15", **METHODS[method], **changes, validation_data_path=str(rows))
    folder = tuning.train(options).model_dir
    best = Path(json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.name != "checkpoint-3"
    if killed:
        for name in (".complete", "model.safetensors", "adapter_model.safetensors"):
            (folder / name).unlink(missing_ok=True)
        tuning.train(options)
    assert_identical(weights_of(folder), weights_of(best))
    last = weights_of(folder / "checkpoint-3")
    assert any(not torch.equal(tensor, last[name]) for name, tensor in weights_of(folder).items())
