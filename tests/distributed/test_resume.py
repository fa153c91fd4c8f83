"""A checkpoint can be continued by any number of processes, sharded or not, with the same losses and weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from launches import run_jobs
from safetensors.torch import load_file

import tuning
from tuning.files import SHARDED_MODEL, SHARDED_OPTIMIZER

LORA = {
    "peft_method": "lora",
    "target_modules": ["q_proj", "v_proj"],
    "r": 4,
    "lora_dropout": 0.0,
    "modules_to_save": ["multi_modal_projector"],
}
CASES = {"granite_vision": {}, "llava15": LORA}
# A large epsilon: else Adam takes a full step wherever a gradient is mere rounding.
COMMON = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
# Weights in bfloat16, trained by float32 masters. Batches of other shapes are rounded differently in the forward.
HALF = {"dtype": "bfloat16", "learning_rate": 3e-3}
HALF_NAMES = ["one to full", "one to ddp", "full to ddp", "full to one", "sharded to one"]
SHARDED = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
FULL = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


def make_job(models, rows, folder: Path, layout: str, size: int, **changes) -> dict:
    return {
        "model_name_or_path": str(models[layout]),
        "training_data_path": str(rows),
        "output_dir": str(folder),
        "per_device_train_batch_size": size,
        "dataloader_num_workers": 0,
        "report_samples": 0,
        **COMMON,
        **CASES[layout],
        **changes,
    }


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, models, mixed_rows):
    """Folder of whole runs and of continued ones: `layout/first` and `layout/first to second`."""
    root = tmp_path_factory.mktemp("resumed")
    runs_slow_ones = any(
        item.path == Path(__file__) and item.get_closest_marker("slow") for item in request.session.items
    )

    def is_run(layout: str, name: str) -> bool:
        return runs_slow_ones or not is_slow(layout, name)

    def job(layout: str, name: str, size: int, **changes) -> dict:
        if " to " in name:
            first = root / layout / name.partition(" to ")[0]
            changes["resume_from_checkpoint"] = str(first / "checkpoint-3")
        return make_job(models, mixed_rows, root / layout / name, layout, size, **changes)

    def half(name: str, size: int, layout: str = "granite_vision", **changes) -> dict:
        return job(layout, f"half {name}", size, **HALF, **changes)

    for layout in CASES:
        tuning.train(job(layout, "one", 8))
    tuning.train(half("one", 8))
    fsdp = [half(name, 4, environ=FULL) for name in ("full", "one to full", "full to full")]
    fsdp += [half(name, 4, environ=SHARDED) for name in ("full to sharded", "sharded")]
    fsdp += [half("full", 4, "llava15", environ=FULL)]
    for layout in CASES:
        fsdp += [job(layout, name, 4, environ=FULL) for name in ("full", "one to full", "full to full")]
        sharded = [name for name in ("full to sharded", "sharded", "sharded to sharded") if is_run(layout, name)]
        fsdp += [job(layout, name, 4, environ=SHARDED) for name in sharded]
    mixed = {"bf16": True, "dtype": "bfloat16", "environ": FULL}
    fsdp += [job("granite_vision", name, 4, **mixed) for name in ("bf16", "bf16 to bf16")]
    (root / "fsdp said").write_text(run_jobs("fsdp", fsdp, root))
    ddp = [half(name, 4) for name in ("one to ddp", "full to ddp")]
    ddp += [half(name, 4, "llava15") for name in ("ddp", "full to ddp")]
    for layout in CASES:
        names = [name for name in ("ddp", "one to ddp", "full to ddp", "sharded to ddp") if is_run(layout, name)]
        ddp += [job(layout, name, 4) for name in names]
    (root / "ddp said").write_text(run_jobs("ddp", ddp, root))
    for layout in CASES:
        for name in ("full to one", "sharded to one", "ddp to one"):
            if is_run(layout, name):
                tuning.train(job(layout, name, 8))
    for first in ("full", "sharded"):
        tuning.train(half(f"{first} to one", 8))
    return root


def is_slow(layout: str, name: str) -> bool:
    """Adapters are not sharded: their checkpoints are those of "full"."""
    return layout == "llava15" and "sharded" in name


def each(names: list[str]):
    """Run a test for each layout and each of these ways: the slow ones in `make test-slow`."""
    pairs = [
        pytest.param(layout, name, marks=pytest.mark.slow if is_slow(layout, name) else ())
        for layout in CASES
        for name in names
    ]
    return pytest.mark.parametrize(("layout", "name"), pairs)


NAMES = [
    *("full", "sharded", "ddp"),
    *("one to full", "one to ddp", "full to full", "full to sharded", "full to ddp", "full to one"),
    *("sharded to sharded", "sharded to ddp", "sharded to one", "ddp to one"),
]


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "adapter_model.safetensors"
    return load_file(file if file.exists() else folder / "model.safetensors")


def read_losses(folder: Path) -> list[float]:
    lines = (folder / "training_logs.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@each(NAMES)
def test_every_way_ends_where_one_process_ends(layout, name, runs):
    expected, found = runs / layout / "one", runs / layout / name
    losses = read_losses(expected)[3 if " to " in name else 0 :]
    torch.testing.assert_close(read_losses(found), losses, rtol=1e-5, atol=0)
    weights, reference = read_model(found), read_model(expected)
    torch.testing.assert_close(weights, reference, rtol=0, atol=1e-4)
    start = read_model(runs / layout / "one" / "checkpoint-3")
    assert max((reference[key] - start[key]).abs().max() for key in reference) > 3e-3  # the last steps did move


def read_masters(folder: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(folder / "checkpoint-6" / "optimizer.pt")
    states = {saved["names"][number]: state for number, state in saved["state"].items()}
    return {name: state["master"] for name, state in states.items() if "master" in state}


@pytest.mark.parametrize("name", HALF_NAMES)
def test_master_weights_go_on_under_another_number_of_processes(name, runs):
    folder = runs / "granite_vision"
    first, found = folder / f"half {name.partition(' to ')[0]}", folder / f"half {name}"
    torch.testing.assert_close(read_losses(found), read_losses(first)[3:], rtol=1e-5, atol=0)
    assert {tensor.dtype for tensor in read_model(found).values()} == {torch.bfloat16}
    assert json.loads((found / "config.json").read_text())["dtype"] == "bfloat16"
    expected, masters = read_masters(folder / "half one"), read_masters(found)
    off = sum((masters[key] - expected[key]).abs().sum() for key in expected)
    rounded_off = sum((expected[key] - expected[key].bfloat16()).abs().sum() for key in expected)
    assert off < 0.1 * rounded_off  # they did not start anew from rounded weights


def test_a_projector_in_bfloat16_beside_adapters_in_float32_has_masters_under_fsdp(runs):
    """FSDP casts the adapters for its forward, which DDP does not: the same within bfloat16."""
    full, ddp, continued = (runs / "llava15" / f"half {name}" for name in ("full", "ddp", "full to ddp"))
    torch.testing.assert_close(read_losses(full), read_losses(ddp), rtol=1e-3, atol=0)
    torch.testing.assert_close(read_losses(continued), read_losses(full)[3:], rtol=1e-3, atol=0)
    masters = {folder: read_masters(folder) for folder in (full, ddp, continued)}
    assert masters[full].keys() == masters[ddp].keys() == masters[continued].keys()
    assert all("multi_modal_projector" in name for name in masters[full])
    types = [{name: tensor.dtype for name, tensor in read_model(folder).items()} for folder in (full, ddp, continued)]
    assert types[0] == types[1] == types[2]
    assert set(types[0].values()) == {torch.bfloat16, torch.float32}


SAME_ARITHMETIC = [("half full", "half full to full"), ("half full", "half full to sharded"), ("bf16", "bf16 to bf16")]


@pytest.mark.parametrize(("whole", "continued"), SAME_ARITHMETIC)
def test_weights_that_fsdp_keeps_in_float32_are_not_rounded_by_a_resume(whole, continued, runs):
    whole, continued = (runs / "granite_vision" / name for name in (whole, continued))
    assert read_losses(continued) == read_losses(whole)[3:]
    torch.testing.assert_close(read_model(continued), read_model(whole), rtol=0, atol=0)
    assert {tensor.dtype for tensor in read_model(whole).values()} == {torch.bfloat16}
    if (continued / "checkpoint-6" / "optimizer.pt").exists():
        assert {master.dtype for master in read_masters(whole).values()} == {torch.float32}
        torch.testing.assert_close(read_masters(continued), read_masters(whole), rtol=0, atol=0)


@each(["full", "sharded", "ddp"])
def test_a_checkpoint_of_many_processes_has_what_one_of_one_process_has(layout, name, runs):
    expected, found = (
        {file.name for file in (runs / layout / kind / "checkpoint-3").iterdir()} for kind in ("one", name)
    )
    if name == "sharded" and layout == "granite_vision":  # adapters are not saved in shards
        expected = expected - {"model.safetensors", "optimizer.pt"} | {SHARDED_MODEL, SHARDED_OPTIMIZER}
    assert found == expected
    final = {file.name for file in (runs / layout / name).iterdir()}
    assert final == {file.name for file in (runs / layout / "one").iterdir()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_was_saved_is_read_back(strategy, runs):
    said = (runs / f"{strategy} said").read_text()
    read = re.findall(r"Read (.*) back: its weights and logits are those that were trained\.\n", said)
    assert len(read) == said.count("Done: ") == len(set(read))
    assert {folder.split("/")[-2] for folder in read} == set(CASES)


def test_a_model_put_together_from_shards_is_compared_with_them(runs, models, mixed_rows, capsys):
    folder = runs / "granite_vision" / "sharded"
    expected = read_model(folder)
    (folder / ".complete").unlink()
    tuning.train(make_job(models, mixed_rows, folder, "granite_vision", 8))
    assert f"Read {folder} back: its weights are those of {folder / 'checkpoint-6'}." in capsys.readouterr().out
    torch.testing.assert_close(read_model(folder), expected, rtol=0, atol=0)


def test_large_checkpoints_are_sharded_where_the_user_has_not_chosen(models, mixed_rows, tmp_path):
    ours, all_are_large = {"VLM_TUNING_CHOOSES_STRATEGY": "1", **FULL}, {"tuning.distributed.fsdp.LARGE_STATE": 0}
    all_are_large["tuning.training.trained_weights.LARGE_WEIGHTS"] = 0  # gathered into files
    settings = {"ours": (ours, all_are_large), "small": (ours, {}), "theirs": (FULL, all_are_large)}
    jobs = [
        make_job(models, mixed_rows, tmp_path / name, "granite_vision", 4, max_steps=3)
        | {"environ": {"VLM_TUNING_CHOOSES_STRATEGY": "0", **environ}, "constants": constants}
        for name, (environ, constants) in settings.items()
    ]
    printed = run_jobs("fsdp", jobs, tmp_path)
    sharded = {name: (tmp_path / name / "checkpoint-3" / SHARDED_MODEL).is_dir() for name in settings}
    assert sharded == {"ours": True, "small": False, "theirs": False}
    assert printed.count("Checkpoints are sharded: a whole one would have") == 1
    weights = [load_file(tmp_path / name / "model.safetensors") for name in settings]
    assert all(weight.keys() == weights[0].keys() for weight in weights)
    assert all(torch.equal(weight[name], weights[0][name]) for weight in weights for name in weight)
