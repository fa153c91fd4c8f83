"""`torch_compile true`: the same losses, and nothing compiled again because lengths change."""

import json
import shutil

import pytest
import torch
from architectures.case import PICTURES, Case

import tuning


def losses(folder) -> list[float]:
    lines = map(json.loads, (folder / "training_logs.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs had been compiled after each step of a run."""
    from tuning.training.trainer import SupervisedTrainer

    made, step = [], SupervisedTrainer.training_step

    def counted(*args, **kwargs):
        loss = step(*args, **kwargs)
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return loss

    monkeypatch.setattr(SupervisedTrainer, "training_step", counted)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return made


@pytest.mark.parametrize(
    ("backend", "padding_free"),
    [("aot_eager", "auto"), ("aot_eager", False), pytest.param("inductor", "auto", marks=pytest.mark.slow)],
)
def test_compiled_runs_are_as_uncompiled_ones(backend, padding_free, graphs, make_options, tmp_path, capsys):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    runs = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        options = make_options("granite_vision", per_device_train_batch_size=2, max_steps=8, padding_free=padding_free)
        folder = tmp_path / str(len(runs))
        tuning.train(options | {"output_dir": str(folder), "train_sampling_strategy": "random"} | changes)
        runs.append(losses(folder))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert graphs[:8] == [0] * 8
    assert graphs[8] > 0
    assert graphs[15] == graphs[10], graphs  # new lengths at every step, no new graph after the third
    assert f"layers are compiled ({backend})" in capsys.readouterr().out


PADDING_FREE = ("qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm", "internvl", "llava_onevision")


@pytest.mark.slow
@pytest.mark.parametrize("name", PADDING_FREE)
def test_no_family_compiles_again_because_lengths_change(name, graphs, tmp_path):
    case = Case.make(name, tmp_path)
    lines = []
    for number in range(24):
        row = json.loads(json.dumps(case.rows[number % 2]))
        row["messages"][-1]["content"] += " Red." * number
        row["images"] = [list(PICTURES)[number % len(PICTURES)]]
        lines.append(json.dumps(row))
    (case.folder / "rows.jsonl").write_text("\n".join(lines))
    runs, backend = [], "inductor" if shutil.which("g++") else "aot_eager"
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        options = case.options(output_dir=str(tmp_path / str(len(runs))), per_device_train_batch_size=2, max_steps=8)
        tuning.train(options | {"train_sampling_strategy": "random"} | changes)
        runs.append(losses(tmp_path / str(len(runs))))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert graphs[8] > 0
    assert graphs[15] == graphs[11], graphs
