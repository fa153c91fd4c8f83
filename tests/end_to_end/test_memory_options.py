"""`gradient_checkpointing auto` and `per_device_train_batch_size auto` fit a step into the memory it may take."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from launches import outcomes, run_jobs
from safetensors.torch import load_file

import tuning
from tuning.checking.memory_plan import find_fewest, find_most
from tuning.commands.check import check
from tuning.config.legacy_names import CHECKPOINTING
from tuning.config.parse import build_config
from tuning.errors import UserError
from tuning.files import COMPLETE_FILE
from tuning.model.recompute import recomputable_layers

BATCH_SIZE = "per_device_train_batch_size"


@pytest.fixture
def long_rows(rows, tmp_path) -> str:
    """24 rows of up to 400 words with a picture each."""
    lines = []
    for number in range(24):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        answer = {"role": "assistant", "content": "red " * (40 + 15 * number)}
        lines.append(json.dumps({"messages": [question, answer], "images": ["0.png"]}))
    path = rows.parent / f"{tmp_path.name}-long.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def decided(printed: str) -> tuple[int | None, int | None, float, float]:
    """Rows, recomputed layers, and the estimated and allowed gigabytes, as a run prints them."""
    rows = re.search(rf"{BATCH_SIZE} auto: (\d+)", printed)
    layers = re.search(r"gradient_checkpointing auto: (\d+) of \d+ layers", printed)
    needs, may = re.search(r"need ([\d.e-]+) GB, and a step may take ([\d.e-]+) GB", printed).groups()
    return rows and int(rows[1]), layers and int(layers[1]), float(needs), float(may)


def test_searches_find_the_border():
    for border in range(1, 40):
        assert find_most(lambda number, border=border: number <= border, 30) == min(border, 30)
        assert find_fewest(lambda number, border=border: number >= border, 30) == min(border, 30)
    assert find_fewest(lambda number: True, 0) == 0


@pytest.mark.parametrize("layout", ["granite_vision", "mllama"])
@pytest.mark.parametrize("method", [None, "lora"])
def test_as_few_layers_are_recomputed_as_fit(layout, method, make_options, long_rows, capsys, trainers):
    options = make_options(
        layout, training_data_path=long_rows, max_steps=1, gradient_checkpointing="auto", **{BATCH_SIZE: 4}
    )
    options |= {"peft_method": method, "target_modules": ["q_proj", "v_proj"]} if method else {}
    tuning.train(options | {"output_dir": options["output_dir"] + "-free"})
    _, layers, most, _ = decided(capsys.readouterr().out)
    assert layers == 0
    assert not getattr(trainers[-1].args, CHECKPOINTING)
    tuning.train(options | {"output_dir": options["output_dir"] + "-tight", "max_memory_gb": 1e-9})
    printed = capsys.readouterr().out
    _, all_layers, least, _ = decided(printed)
    assert "It may not fit" in printed
    limit = 0.9 * most + 0.1 * least
    tuning.train(options | {"max_memory_gb": limit})
    _, layers, needs, may = decided(capsys.readouterr().out)
    assert 0 < layers < all_layers
    assert least <= needs <= may == pytest.approx(limit, rel=0.01)
    trainer = trainers[-1]
    recomputed = [layer.gradient_checkpointing for layer in recomputable_layers(trainer.model, trainer.trainable.parts)]
    assert recomputed == [True] * layers + [False] * (all_layers - layers)
    losses = [trainer.state.log_history[0]["loss"] for trainer in trainers]
    assert losses == [losses[0]] * 3


def test_a_batch_has_as_many_rows_as_fit(make_options, long_rows, capsys, trainers):
    options = make_options("llava15", training_data_path=long_rows, max_steps=1, **{BATCH_SIZE: "auto"})
    tuning.train(options | {"output_dir": options["output_dir"] + "-all"})
    rows, _, most, _ = decided(capsys.readouterr().out)
    assert rows == 24  # one batch has all rows
    tuning.train(options | {"output_dir": options["output_dir"] + "-one", "max_memory_gb": 1e-9})
    rows, _, least, _ = decided(capsys.readouterr().out)
    assert rows == 1
    limit = (most + least) / 2
    tuning.train(options | {"max_memory_gb": limit})
    rows, _, needs, _ = decided(capsys.readouterr().out)
    assert 1 < rows < 24
    assert 0.9 * limit < needs <= limit
    assert trainers[-1].args.per_device_train_batch_size == rows


def test_both_take_the_largest_batch_that_recomputes_nothing(make_options, long_rows, capsys):
    options = make_options("llava15", training_data_path=long_rows, max_steps=1, gradient_checkpointing="auto")
    options |= {BATCH_SIZE: "auto"}
    tuning.train(options | {"output_dir": options["output_dir"] + "-one", "max_memory_gb": 1e-9})
    rows, all_layers, least, _ = decided(capsys.readouterr().out)
    assert (rows, all_layers > 0) == (1, True)
    tuning.train(options | {"max_memory_gb": 3 * least})
    rows, layers, *_ = decided(capsys.readouterr().out)
    assert rows > 1
    assert layers == 0


def test_a_resumed_run_keeps_its_rows(make_options, long_rows, capsys, trainers):
    """Even where it may take more memory now; and it ends with the weights of a run that was not interrupted."""
    options = make_options(
        "llava15", training_data_path=long_rows, max_memory_gb=0.02, save_strategy="steps", save_steps=1
    )
    options |= {BATCH_SIZE: "auto", "seed": 3, "num_train_epochs": 1}
    whole = tuning.train(options | {"output_dir": options["output_dir"] + "-whole"})
    rows, *_ = decided(capsys.readouterr().out)
    assert 1 < rows < 12
    assert whole.global_step == -(-24 // rows)
    tuning.train(options)
    for folder in sorted(Path(options["output_dir"]).glob("checkpoint-*"))[1:]:
        shutil.rmtree(folder)
    (Path(options["output_dir"]) / COMPLETE_FILE).unlink()
    capsys.readouterr()
    tuning.train(options | {"max_memory_gb": 5.0})
    printed = capsys.readouterr().out
    assert f"{BATCH_SIZE} auto: {rows}, as before." in printed
    assert "Continuing from" in printed
    ours, theirs = (load_file(Path(folder, "model.safetensors")) for folder in (options["output_dir"], whole.model_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_shares_its_rows_between_accumulated_batches(make_options, long_rows, capsys):
    options = make_options(
        "llava15", training_data_path=long_rows, max_steps=1, max_memory_gb=0.02, save_strategy="steps", save_steps=1
    )
    options |= {BATCH_SIZE: "auto"}
    tuning.train(options)
    rows, *_ = decided(capsys.readouterr().out)
    longer = options | {"max_steps": 2}
    with pytest.raises(UserError, match=f"{rows} rows. 1 processes × {rows + 1} accumulated batches cannot share"):
        tuning.train(longer | {"gradient_accumulation_steps": rows + 1})
    tuning.train(longer | {"gradient_accumulation_steps": rows})
    assert f"{BATCH_SIZE} auto: 1, as before." in capsys.readouterr().out


def test_check_decides_as_training_does(make_options, long_rows, capsys):
    options = make_options("llava15", training_data_path=long_rows, max_steps=1, max_memory_gb=0.02)
    options |= {BATCH_SIZE: "auto", "gradient_checkpointing": "auto"}
    report = check(build_config(options))
    tuning.train(options)
    assert report.settings["memory"] in capsys.readouterr().out
    rows, _, needs, _ = decided(report.settings["memory"])
    assert f"{report.estimates['peak_memory_gb_per_device'][0]:.3g}" == f"{needs:.3g}"
    assert f"in batches of {rows} ×" in report.estimates["steps_per_epoch"][1]


def test_a_bad_row_among_the_longest_ends_the_run_before_its_weights_are_read(make_options, long_rows, tmp_path):
    lines = Path(long_rows).read_text().splitlines()
    last = json.loads(lines[-1]) | {"images": ["broken.png"]}
    (Path(long_rows).parent / "broken.png").write_bytes((Path(long_rows).parent / "0.png").read_bytes()[:60])
    Path(long_rows).write_text("\n".join([*lines[:-1], json.dumps(last)]))
    options = make_options("llava15", training_data_path=long_rows, **{BATCH_SIZE: "auto"})
    with pytest.raises(UserError, match="row 23"):
        tuning.train(options)
    assert not Path(options["output_dir"]).exists()
    tuning.train(options | {"on_bad_row": "skip", "max_bad_fraction": 0.5, "max_steps": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"streaming": True}, "does not go with streaming"),
        ({"allow_remote_images": True}, "does not go with allow_remote_images"),
        ({"max_tokens_per_batch": 500}, "both set the size of a batch"),
        ({"max_memory_gb": 0}, "max_memory_gb: must be above 0"),
    ],
)
def test_what_auto_does_not_go_with_is_refused(make_options, change, words):
    with pytest.raises(UserError, match=words):
        build_config(make_options("llava15", max_steps=1, **{BATCH_SIZE: "auto"}, **change))


def test_two_processes_decide_alike_and_one_goes_on(make_options, long_rows, tmp_path, capsys):
    options = make_options("llava15", training_data_path=long_rows, max_steps=1, save_strategy="steps", save_steps=1)
    options |= {BATCH_SIZE: "auto", "gradient_checkpointing": "auto", "max_memory_gb": 0.02}
    printed = run_jobs("fsdp", [options], tmp_path)
    assert outcomes(Path(options["output_dir"])) == ["done", "done"]
    (rows,) = re.findall(rf"{BATCH_SIZE} auto: (\d+)\.", printed)
    assert 1 < int(rows) <= 12
    tuning.train(options | {"max_steps": 2, "max_memory_gb": 1.0})
    rows_alone, *_ = decided(capsys.readouterr().out)
    assert rows_alone == 2 * int(rows)


@pytest.mark.parametrize("gigabytes", [8, 1e-6])
def test_lora_on_several_processes_keeps_whole_copies_where_they_fit(gigabytes, models, rows, tmp_path):
    """DDP where a step fits, FSDP2 where not; only where the launcher leaves it to us."""
    lora = {"peft_method": "lora", "target_modules": ["q_proj"], "max_memory_gb": gigabytes, "max_steps": 1}
    options = {"model_name_or_path": str(models["llava15"]), "training_data_path": str(rows), "report_samples": 0}
    options |= {"dataloader_num_workers": 0, "optim": "sgd", "learning_rate": 0.1} | lora
    ours = {"VLM_TUNING_CHOOSES_STRATEGY": "1", "ACCELERATE_USE_FSDP": "true"}
    jobs = [
        options | {"output_dir": str(tmp_path / "ours"), "environ": ours},
        options | {"output_dir": str(tmp_path / "theirs"), "environ": {**ours, "VLM_TUNING_CHOOSES_STRATEGY": "0"}},
    ]
    printed = run_jobs("fsdp", jobs, tmp_path)
    assert [outcomes(tmp_path / name) for name in ("ours", "theirs")] == [["done", "done"]] * 2
    first, second = printed.split("Done: ")[:2]
    assert ("LoRA, DDP: by the estimate a step with a whole copy" in first) == (gigabytes == 8)
    assert ("LoRA, FSDP2: by the estimate" in first) == (gigabytes != 8)
    assert "LoRA, " not in second
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
