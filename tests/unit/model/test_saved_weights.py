"""Weights are read from an adapter, one file or an index, in the order of the file; damaged files are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tuning.errors import UserError
from tuning.model.saved_weights import SavedWeights, open_weights

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([True, False]), "c": torch.tensor(7)}


def save_with_index(folder):
    for number, (key, tensor) in enumerate(TENSORS.items()):
        save_file({key: tensor}, folder / f"model-{number}.safetensors")
    weight_map = {key: f"model-{number}.safetensors" for number, key in enumerate(TENSORS)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", "index"])
def test_every_layout_gives_the_same_mapping(name, tmp_path):
    if name == "index":
        save_with_index(tmp_path)
    else:
        save_file(TENSORS, tmp_path / name)
    weights = SavedWeights(tmp_path)
    assert weights.keys() == TENSORS.keys()
    assert len(weights) == 3
    assert all(torch.equal(weights[key], tensor) for key, tensor in TENSORS.items())
    assert bool(weights.index) == (name == "index")
    assert len(weights.shards) == (3 if name == "index" else 1)
    stored = weights.stored["b"]
    assert (stored.format, stored.shape, stored.nbytes) == ("F32", (2, 3), 24)


def test_an_adapter_comes_before_a_model(tmp_path):
    save_file({"model": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"adapter": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert list(SavedWeights(tmp_path)) == ["adapter"]


def test_tensors_keep_the_order_in_which_they_lie_in_the_file(tmp_path):
    save_file({"a": torch.zeros(1, dtype=torch.int8), "z": torch.zeros(1, dtype=torch.float64)}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    assert list(SavedWeights(tmp_path)) == ["z", "a"]  # safetensors stores wide numbers first


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_shard(folder):
    (folder / "model.safetensors").unlink()
    save_with_index(folder)
    (folder / "model-1.safetensors").unlink()


def spoil_the_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def remove_all(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [cut_short, lose_a_shard, spoil_the_index, remove_all])
def test_what_is_damaged_or_missing_is_refused(spoil, tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    spoil(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: the weights cannot be read: .*Give a folder or a hub id"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/nothing"])
def test_what_is_no_folder_and_cannot_be_downloaded_is_refused(name):
    with pytest.raises(UserError, match=f"{name}: the weights cannot be read"):
        open_weights(name)
