"""Full tuning keeps the tensors that transformers does not load, byte for byte, also after a resume."""

import json
from pathlib import Path

import pytest
import torch
from architectures.case import Case
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import tuning
from tuning.model.packed_attention import PACKED_FLASH
from tuning.model.saved_weights import SavedWeights
from tuning.training.model_writer import ModelWriter

BASES = {
    "qwen3_5": ("mtp.layers.0.{}.weight", 1),
    "qwen3_5_moe": ("mtp.layers.0.mlp.experts.{}.gate_proj.weight", 2),
    "glm4v_moe": ("model.language_model.layers.46.mlp.experts.{}.gate_proj.weight", 3),
}
"""Architecture → the name of an ignored tensor, and in how many files its base is stored."""


def add_ignored(folder: Path, name: str, shards: int) -> dict[str, torch.Tensor]:
    """Add tensors of several formats to a checkpoint, and divide it into files."""
    torch.manual_seed(3)
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    added = {name.format(number): torch.randn(3, 5).to(dtype) for number, dtype in enumerate(dtypes)}
    weights = load_file(folder / "model.safetensors") | added
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return added
    files = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        keys = sorted(weights)[shard::shards]
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return added


def check_kept(folder: Path, added: dict[str, torch.Tensor]) -> None:
    saved = SavedWeights(folder)
    for key, tensor in added.items():
        assert saved[key].dtype == tensor.dtype
        assert torch.equal(saved[key].view(torch.uint8), tensor.view(torch.uint8))
    if saved.index:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved.stored.values())
        assert {file.name for file in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize("name", BASES)
def test_what_transformers_ignores_is_saved_with_the_final_model(name, tmp_path, capsys):
    case = Case.make(name, tmp_path)
    added = add_ignored(case.folder, *BASES[name])
    options = case.options(save_strategy="steps", save_steps=1, max_steps=1)
    tuning.train(options)
    out = Path(options["output_dir"])
    check_kept(out, added)
    text = capsys.readouterr().out
    assert "3 tensors (0.0 MB) that transformers does not load stay as in the base." in text
    assert "its weights and logits are those that were trained" in text
    base = SavedWeights(case.folder)
    for folder in (out, out / "checkpoint-1"):
        assert {file: list(stored) for file, stored in SavedWeights(folder).shards.items()} == {
            file: list(stored) for file, stored in base.shards.items()
        }
    tuning.train(options | {"max_steps": 2})
    assert "Continuing from" in capsys.readouterr().out
    check_kept(out, added)


def test_without_its_base_transformers_saves_the_model(tmp_path, capsys):
    case = Case.make("qwen3_5", tmp_path)
    writer = ModelWriter(case.config.model, case.model_config, case.encoder.processor, {})
    model = AutoModelForImageTextToText.from_pretrained(case.folder)
    case.folder.rename(tmp_path / "moved")
    (tmp_path / "saved").mkdir()
    writer.write(model, tmp_path / "saved", None)
    assert "but as transformers writes it (" in capsys.readouterr().out
    assert SavedWeights(tmp_path / "saved").keys() == SavedWeights(tmp_path / "moved").keys()
    AutoProcessor.from_pretrained(tmp_path / "saved")


def test_the_config_of_a_model_that_was_trained_padding_free_on_a_gpu_will_do(tmp_path):
    """transformers looks for a package where the name of an attention has "flash" in it."""
    case = Case.make("qwen3_5", tmp_path)
    case.model_config._attn_implementation = PACKED_FLASH
    writer = ModelWriter(case.config.model, case.model_config, case.encoder.processor, {})
    assert writer.base_weights
    assert case.model_config._attn_implementation == PACKED_FLASH
