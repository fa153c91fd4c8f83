"""A frozen vision tower: no graph, few images at a time, features from disk; training gives the same results."""

import errno
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from tiny_models import LAYOUTS, build_model

import tuning
from tuning import sft_trainer
from tuning.errors import UserError
from tuning.model import build, feature_cache, vision_tower
from tuning.training.data_loading import DataLoading

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4}
FROZEN = {"freeze_vision_tower": True}
LAVAS = [layout for layout in LAYOUTS if layout != "mllama"]
QUICK = {"max_steps": 4, "save_strategy": "no"}
QUICK |= {"verify_save": False}  # it would run the tower


class Runs(list):
    """`in_trial`: the images that the tower saw before the first step."""

    in_trial = 0


@pytest.fixture
def tower_runs(monkeypatch):
    """Of every run of the tower in a step: images, runs of its first layer, and whether the output has a graph."""
    monkeypatch.setattr(DataLoading, "check_logits", lambda *args: None)
    runs, build_model, decide_batching = Runs(), sft_trainer.build_model, DataLoading.decide_batching

    def watched(*args):
        built = build_model(*args)
        tower = vision_tower.find_tower(built.model)
        active = tower.modules_to_save["default"] if isinstance(tower, ModulesToSaveWrapper) else tower
        layers = next(module for module in active.modules() if isinstance(module, torch.nn.ModuleList))
        norm = next(module for module in layers[0].modules() if isinstance(module, torch.nn.LayerNorm))
        current = Counter()
        # In the layer, at its beginning: a recomputation does not call the layer itself, and stops before its end.
        norm.register_forward_pre_hook(lambda norm, args: current.update(layers=1, images=len(args[0])))

        def end(tower, args, output):
            tensors = [value for value in vision_tower.tree_leaves(output) if isinstance(value, torch.Tensor)]
            runs.append(Counter(current, graphs=sum(tensor.requires_grad for tensor in tensors)))
            current.clear()

        tower.register_forward_hook(end)
        return built

    def decide(*args):
        batching = decide_batching(*args)
        runs.in_trial = sum(run["images"] for run in runs)
        runs.clear()
        return batching

    monkeypatch.setattr(sft_trainer, "build_model", watched)
    monkeypatch.setattr(DataLoading, "decide_batching", decide)
    return runs


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


@pytest.fixture
def train(make_options, tmp_path):
    """Train in a folder of its own; returns it."""
    numbers = iter(range(100))

    def run(layout: str, **changes) -> Path:
        folder = str(tmp_path / f"run-{next(numbers)}")
        return tuning.train(make_options(layout, **{"output_dir": folder, **QUICK, **changes})).model_dir

    return run


def assert_equal_runs(found: Path, expected: Path, **tolerances) -> None:
    tolerances = tolerances or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(losses_of(found), losses_of(expected), **tolerances)
    torch.testing.assert_close(weights_of(found), weights_of(expected), **tolerances)


# --- no graph ---


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [LORA, FROZEN], ids=["lora", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_frozen_tower_has_no_graph_and_runs_once(layout, method, checkpointing, train, tower_runs, monkeypatch):
    changes = {**method, "gradient_checkpointing": checkpointing}
    patched = train(layout, **changes)
    assert len(tower_runs) == 4
    assert all(run["layers"] == 1 and run["graphs"] == 0 for run in tower_runs)
    monkeypatch.setattr(build, "patch_frozen_tower", lambda *args, **kwargs: None)
    assert_equal_runs(patched, train(layout, **changes))


def test_without_it_a_tower_under_checkpointing_would_run_twice(train, tower_runs, monkeypatch):
    monkeypatch.setattr(build, "patch_frozen_tower", lambda *args, **kwargs: None)
    train("granite_vision", **LORA, gradient_checkpointing=True)
    assert all(run["graphs"] for run in tower_runs)
    assert tower_runs[1]["layers"] == 2  # of which one belongs to the backward before


TRAINING_TOWERS = {
    "full": {},
    "adapters": LORA | {"freeze_vision_tower": False},
    "expression": LORA | {"target_modules": r".*vision_tower.*layers\.0\..*q_proj"},
    "saved in full": LORA | {"modules_to_save": ["vision_tower"]},
}


@pytest.mark.parametrize("case", TRAINING_TOWERS)
def test_a_tower_that_trains_is_left_alone(case, train, tower_runs, monkeypatch):
    monkeypatch.setattr(vision_tower, "CHUNK_PIXELS", 1)
    found = train("llava15", **TRAINING_TOWERS[case])
    assert all(run["graphs"] and run["layers"] == 1 for run in tower_runs)
    monkeypatch.setattr(build, "patch_frozen_tower", lambda *args, **kwargs: None)
    assert_equal_runs(found, train("llava15", **TRAINING_TOWERS[case]))


def test_every_call_finds_out_whether_the_tower_trains():
    model = build_model("llava15")
    vision_tower.patch_frozen_tower(model, sharded=False)
    tower, pixels = vision_tower.find_tower(model), torch.rand(2, 3, 32, 32)
    assert tower(pixels).last_hidden_state.requires_grad
    tower.requires_grad_(False)
    assert not tower(pixels).last_hidden_state.requires_grad
    assert tower(pixels.requires_grad_()).last_hidden_state.requires_grad  # something before it trains


# --- few images at a time ---


@pytest.mark.parametrize("layout", LAVAS)
def test_chunks_train_what_all_images_at_once_do(layout, train, tower_runs, monkeypatch):
    whole = train(layout, **LORA)
    assert {run["layers"] for run in tower_runs} == {1}
    tower_runs.clear()
    monkeypatch.setattr(vision_tower, "CHUNK_PIXELS", 3 * 32 * 32)
    chunked = train(layout, **LORA)
    assert [run["layers"] for run in tower_runs] == [-(-run["images"] // 3) for run in tower_runs]
    assert max(run["layers"] for run in tower_runs) > 1
    assert_equal_runs(chunked, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAVAS)
def test_every_output_of_the_tower_is_put_together(layout, monkeypatch):
    tower = vision_tower.find_tower(build_model(layout)).requires_grad_(False)
    pixels = torch.rand(7, 3, 32, 32)
    expected = tower(pixels, output_hidden_states=True)
    model = build_model(layout).requires_grad_(False)
    vision_tower.patch_frozen_tower(model, sharded=False)
    monkeypatch.setattr(vision_tower, "CHUNK_PIXELS", 2 * 32 * 32)
    found = vision_tower.find_tower(model)(pixel_values=pixels, output_hidden_states=True)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    assert len(found.hidden_states) == 5
    torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), rtol=0, atol=1e-6)


class Odd(torch.nn.Module):
    """A tower that joins all images in one row."""

    def forward(self, pixels, grid=None):
        return pixels.flatten(1)[None]


@pytest.mark.parametrize("call", [{}, {"grid": torch.ones(5)}], ids=["joined", "more tensors"])
def test_images_that_cannot_be_divided_go_through_at_once(call, monkeypatch):
    model, tower = build_model("llava15"), Odd()
    monkeypatch.setattr(vision_tower, "find_tower", lambda model: tower)
    vision_tower.patch_frozen_tower(model, sharded=False)
    monkeypatch.setattr(vision_tower, "CHUNK_PIXELS", 1)
    pixels = torch.rand(5, 3, 4, 4)
    assert torch.equal(tower(pixels, **call), pixels.flatten(1)[None])


def test_with_dropout_or_sharding_all_images_go_through_at_once(monkeypatch):
    monkeypatch.setattr(vision_tower, "CHUNK_PIXELS", 1)
    for dropout, sharded, together in [(0.0, False, False), (0.1, False, True), (0.0, True, True)]:
        model = build_model("llava15").requires_grad_(False)
        tower = vision_tower.find_tower(model)
        tower.config.attention_dropout = dropout
        vision_tower.patch_frozen_tower(model, sharded=sharded)
        sizes = []
        tower.encoder.layers[0].register_forward_hook(
            lambda layer, args, output, sizes=sizes: sizes.append(len(output))
        )
        tower(torch.rand(6, 3, 32, 32))
        assert sizes == ([6] if together else [2, 2, 2])


# --- features from disk ---


@pytest.mark.parametrize("method", [LORA, FROZEN], ids=["lora", "full"])
@pytest.mark.parametrize("layout", LAVAS)
def test_features_from_disk_train_the_same_and_the_tower_runs_once_a_tile(layout, method, train, tower_runs, tmp_path):
    changes = {**method, "max_steps": -1, "num_train_epochs": 2}
    expected = train(layout, **changes)
    tiles = sum(run["images"] for run in tower_runs)
    tower_runs.clear()
    folder = str(tmp_path / "features" / "below")
    found = train(layout, **changes, cache_vision_features=folder)
    ran, files = sum(run["images"] for run in tower_runs), list(Path(folder).rglob("*.*"))
    assert ran + tower_runs.in_trial == len(files)
    assert ran < tiles / 2  # fewer than once: the sixteen pictures have four colours and three sizes
    assert all(run["images"] == 0 for run in tower_runs[4:])
    assert_equal_runs(found, expected, rtol=1e-5, atol=1e-6)
    tower_runs.clear()
    again = train(layout, **changes, cache_vision_features=folder)
    assert not sum(run["layers"] for run in tower_runs)
    assert_equal_runs(again, found)


def test_equal_shapes_give_equal_bits(train, rows, tmp_path):
    """One picture a step, so that the tower is given the same whether or not it was met before."""
    first = [line for line in rows.read_text().splitlines() if '"0.png"' in line or '"1.png"' in line]
    data = rows.parent / "two_rows.jsonl"
    data.write_text("\n".join(first))
    options = {**LORA, "training_data_path": str(data), "per_device_train_batch_size": 1}
    cached = train("llava15", **options, cache_vision_features=str(tmp_path / "features"))
    assert_equal_runs(cached, train("llava15", **options))


@pytest.mark.parametrize(("layout", "layers"), [("granite_vision", 3), ("llava15", 1)])
def test_only_features_that_the_model_uses_are_kept(layout, layers, train, tmp_path):
    train(layout, **LORA, cache_vision_features=str(tmp_path / "features"))
    for file in (tmp_path / "features").rglob("*.safetensors"):
        assert [tensor.dim() for tensor in load_file(file).values()] == [2] * layers


def kept(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}


def test_other_weights_pixels_or_precision_have_other_keys(train, models, tmp_path):
    folder = tmp_path / "features"
    options = {**LORA, "cache_vision_features": str(folder)}
    train("llava15", **options)
    before = kept(folder)
    assert before
    changed = tmp_path / "changed"
    shutil.copytree(models["llava15"], changed)
    weights = load_file(changed / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("layers.3.mlp.fc2.bias"))  # of no layer that is read
    weights[name][0] += 0.001
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    darker = {"processor_kwargs": {"image_mean": [0.6, 0.5, 0.5]}}
    for change in ({"model_name_or_path": str(changed)}, darker, {"dtype": "bfloat16"}, {"bf16": True}):
        count = len(kept(folder))
        train("llava15", **options, **change)
        assert len(kept(folder)) == count + len(before), change
    assert before.items() <= kept(folder).items()
    train("llava15", **options)
    assert len(kept(folder)) == 5 * len(before)


def test_a_resumed_run_finds_the_features_of_the_first(train, tower_runs, tmp_path):
    folder = str(tmp_path / "features")
    options = {**FROZEN, "cache_vision_features": folder, "save_strategy": "steps", "save_steps": 2}
    whole = train("granite_vision", **options)
    tower_runs.clear()
    cut = tmp_path / "cut"
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    found = train("granite_vision", **options, output_dir=str(cut))
    assert len(tower_runs) == 2
    assert not sum(run["layers"] for run in tower_runs)
    torch.testing.assert_close(weights_of(found), weights_of(whole), rtol=0, atol=0)


def test_broken_files_are_replaced(train, tower_runs, tmp_path):
    folder = tmp_path / "features"
    options = {**LORA, "cache_vision_features": str(folder)}
    expected = train("llava15", **options)
    whole = kept(folder)
    files = sorted(whole)
    spoilt = {files[0]: b"", files[1]: whole[files[1]][:-7], files[2]: b"no features" * 10}
    for name, content in spoilt.items():
        (folder / name).write_bytes(content)
    tower_runs.clear()
    assert_equal_runs(train("llava15", **options), expected, rtol=1e-5, atol=1e-6)
    assert sum(run["images"] for run in tower_runs) + tower_runs.in_trial == 3
    assert kept(folder).keys() == whole.keys()
    store = feature_cache.FeatureCache(folder)
    assert all(store.load(name.replace("/", "").partition(".")[0]) for name in files)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    store = feature_cache.FeatureCache.open(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save("abcd", {"0": torch.ones(3)})
    assert not kept(tmp_path)
    assert store.load("abcd") is None
    store.save("abcd", {"0": torch.ones(3)})
    assert torch.equal(store.load("abcd")["0"], torch.ones(3))
    assert len(kept(tmp_path)) == 1


def test_a_full_disk_is_reported_once_and_the_run_continues(train, tmp_path, monkeypatch, capsys):
    attempts = []

    def full(*args):
        attempts.append(args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = train("llava15", **LORA)
    monkeypatch.setattr(feature_cache, "Path", type("FullDisk", (type(tmp_path),), {"write_bytes": full}))
    found = train("llava15", **LORA, cache_vision_features=str(tmp_path / "features"))
    assert_equal_runs(found, expected, rtol=1e-5, atol=1e-6)
    assert len(attempts) == 1
    assert capsys.readouterr().out.count("failed (No space left on device)") == 1
    assert not kept(tmp_path / "features")


def test_a_folder_that_cannot_be_made_is_an_error(train, rows):
    below_a_file = str(rows / "features")
    with pytest.raises(UserError, match=r"cache_vision_features: .* is a file, not a folder"):
        train("llava15", **LORA, cache_vision_features=below_a_file)
    with pytest.raises(UserError, match=r"cache_vision_features .*: cannot be written: "):
        feature_cache.FeatureCache.open(below_a_file)


def with_dropout(model_folder: Path, folder: Path) -> str:
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_features_that_would_change_are_not_kept(train, models, tmp_path, monkeypatch):
    monkeypatch.setattr(build.load, "load_model", lambda *args, **kwargs: pytest.fail("too late"))
    cached = {"cache_vision_features": str(tmp_path / "features")}
    for case in ("expression", "saved in full"):
        with pytest.raises(UserError, match="cache_vision_features: the vision tower trains"):
            train("llava15", **TRAINING_TOWERS[case], **cached)
    changes = {"model_name_or_path": with_dropout(models["llava15"], tmp_path / "model")}
    with pytest.raises(UserError, match=r"cache_vision_features: .* not always the same: attention_dropout 0\.1"):
        train("llava15", **LORA, **cached, **changes)
    with pytest.raises(UserError, match="cache_vision_features: this model's vision tower takes more than images"):
        train("mllama", **LORA, **cached)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="cache_vision_features: FSDP and DeepSpeed need every process"):
        train("llava15", **LORA, **cached)
    assert not (tmp_path / "features").exists()
