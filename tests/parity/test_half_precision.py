"""Runs whose weights are bfloat16: they learn, go on bit by bit, and end in the rounding of their master weights."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

import tuning

HALF = {"dtype": "bfloat16", "max_steps": 4, "save_steps": 2}
PROJECTOR = {"peft_method": "lora", "target_modules": ["q_proj"], "r": 4, "modules_to_save": ["multi_modal_projector"]}
BOTH = {torch.bfloat16, torch.float32}


def states_of(folder: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    saved = torch.load(folder / f"checkpoint-{step}" / "optimizer.pt")
    return {saved["names"][number]: state for number, state in saved["state"].items()}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def cut_back(whole: Path, target: Path) -> Path:
    """`target` as `whole` was when its run was killed after the checkpoint of step 2."""
    shutil.copytree(whole / "checkpoint-2", target / "checkpoint-2")
    shutil.copy(whole / "training_logs.jsonl", target)
    return target


def falls(folder: Path) -> float:
    """How far the loss fell, from the first epoch to the last."""
    lines = [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return sum(losses[:4]) / 4 - sum(losses[-4:]) / 4


@pytest.mark.parametrize(("optim", "rate"), [("adamw_torch_fused", 2e-5), ("sgd", 5e-3), ("adafactor", 2e-5)])
def test_small_updates_are_learned_and_vanish_without_master_weights(optim, rate, make_options, tmp_path):
    """Most updates are below half a rounding step of their weights."""
    changes = {"max_steps": 60, "optim": optim, "learning_rate": rate, "lr_scheduler_type": "constant"}
    options = make_options("llava15", **changes, save_strategy="no")
    model = AutoModelForImageTextToText.from_pretrained(options["model_name_or_path"], dtype=torch.bfloat16)
    start = tmp_path / "start"  # all of them start with the same weights
    shutil.copytree(options["model_name_or_path"], start)
    model.save_pretrained(start)
    kinds = {
        "full": {"dtype": "float32"},
        "kept": {"dtype": "bfloat16"},
        "plain": {"dtype": "bfloat16", "keep_master_weights": False},
    }
    fall = {}
    for kind, dtype in kinds.items():
        changes = {**dtype, "model_name_or_path": str(start), "output_dir": str(tmp_path / kind)}
        fall[kind] = falls(tuning.train({**options, **changes}).model_dir)
    print(optim, fall)
    assert fall["kept"] == pytest.approx(fall["full"], rel=0.05)
    assert fall["plain"] < 0.5 * fall["full"]


def test_gradients_added_in_bfloat16_are_off_by_about_a_percent():
    """Of 64 micro-batches; less than half of it with a float32 sum. It is noise, new in every step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
    network, exact = network.bfloat16(), copy.deepcopy(network).bfloat16().double()
    summed = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in network.parameters()]
    for _ in range(64):
        inputs, wanted = torch.randn(16, 64).bfloat16(), torch.randn(16, 64)
        before = [0 if parameter.grad is None else parameter.grad for parameter in network.parameters()]
        network.zero_grad()
        for model in (network, exact):
            ((model(inputs.to(next(model.parameters()).dtype)) - wanted) ** 2).mean().backward()
        for sum_, parameter, rest in zip(summed, network.parameters(), before, strict=True):
            sum_ += parameter.grad
            parameter.grad += rest

    def off(gradients) -> float:
        pairs = zip(gradients, exact.parameters(), strict=True)
        ours, theirs = zip(*((ours.double().flatten(), other.grad.flatten()) for ours, other in pairs), strict=True)
        return ((torch.cat(ours) - torch.cat(theirs)).norm() / torch.cat(theirs).norm()).item()

    print(added := off([parameter.grad for parameter in network.parameters()]), off(summed))
    assert 2 * off(summed) < added < 0.02


@pytest.mark.parametrize("method", ["full", "projector"])
def test_the_final_weights_are_the_rounding_of_their_masters(method, make_options, trainers):
    lora = {} if method == "full" else PROJECTOR
    folder = tuning.train(make_options("granite_vision", **HALF, **lora, vision_tower_learning_rate=1e-4)).model_dir
    states, weights = states_of(folder, 4), weights_of(folder)
    masters = {name: state["master"] for name, state in states.items() if "master" in state}
    trained = {name: p for name, p in trainers[0].model.named_parameters() if p.requires_grad}
    assert masters.keys() == {name for name, parameter in trained.items() if parameter.dtype == torch.bfloat16}
    if method == "full":
        assert masters.keys() == trained.keys()
    else:  # adapters are float32
        assert {"multi_modal_projector" in name for name in masters} == {True}
        assert trained.keys() - masters.keys()
    for name, master in masters.items():
        assert torch.equal(trained[name], master.bfloat16())
        assert not torch.equal(trained[name].float(), master)
    assert {tensor.dtype for tensor in weights.values()} == ({torch.bfloat16} if method == "full" else BOTH)


@pytest.mark.parametrize("method", ["full", "projector"])
@pytest.mark.parametrize("keep", [True, False])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does_in_bfloat16(method, keep, make_options, tmp_path):
    lora = {} if method == "full" else PROJECTOR
    options = make_options("llava15", **HALF, **lora, keep_master_weights=keep)
    whole = tuning.train(options).model_dir
    cut = cut_back(whole, tmp_path / "cut")
    tuning.train({**options, "output_dir": str(cut)})
    torch.testing.assert_close(weights_of(cut), weights_of(whole), rtol=0, atol=0)
    torch.testing.assert_close(states_of(cut, 4), states_of(whole, 4), rtol=0, atol=0)


def test_master_weights_may_be_taken_up_and_given_up_between_runs(make_options, tmp_path, trainers):
    options = make_options("llava15", **HALF)
    for before in (True, False):
        folder = tmp_path / f"kept {before}"
        whole = tuning.train({**options, "keep_master_weights": before, "output_dir": str(folder)}).model_dir
        cut = cut_back(whole, tmp_path / f"cut {before}")
        tuning.train({**options, "keep_master_weights": not before, "output_dir": str(cut)})
        states = states_of(cut, 4)
        assert all(("master" in state) == (not before) for state in states.values())
        assert {state["exp_avg"].dtype for state in states.values()} == {torch.bfloat16 if before else torch.float32}
        assert {int(state["step"]) for state in states.values()} == {4}
        weights = dict(trainers[-1].model.named_parameters())
        assert all(
            torch.equal(weights[name], state.get("master", weights[name]).bfloat16()) for name, state in states.items()
        )


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"dtype": "bfloat16", **PROJECTOR, "modules_to_save": None}])
def test_runs_that_train_float32_weights_have_the_optimizer_they_had(changes, make_options, trainers, capsys):
    tuning.train(make_options("llava15", max_steps=1, **changes))
    assert type(trainers[0].optimizer.optimizer) is torch.optim.AdamW
    assert "trained numbers are" not in capsys.readouterr().out


def test_what_happens_to_small_updates_is_said_at_the_start(make_options, tmp_path, capsys):
    options = make_options("llava15", dtype="bfloat16", max_steps=1, save_strategy="no")
    tuning.train(options)
    assert "the optimizer steps float32 copies" in capsys.readouterr().out
    tuning.train({**options, "keep_master_weights": False, "output_dir": str(tmp_path / "plain")})
    assert "Warning: " in capsys.readouterr().out
