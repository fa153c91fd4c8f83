"""Whole runs without padding: same losses and weights as padded ones, whatever else is on."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tuning
from tuning.errors import UserError

PLAIN = ["granite_vision", "llava15", "llava16_mistral"]


def losses(folder) -> list[float]:
    lines = map(json.loads, (folder / "training_logs.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def weights(folder) -> dict:
    file = next(folder.glob("*model.safetensors"))
    return load_file(file)


@pytest.mark.parametrize(
    "changes",
    [{}, {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": True}],
    ids=["full", "lora"],
)
@pytest.mark.parametrize("layout", PLAIN)
def test_a_run_without_padding_equals_a_padded_one(layout, changes, make_options, tmp_path, capsys):
    runs = {}
    for padding_free in ("auto", False):
        options = make_options(layout, padding_free=padding_free, max_steps=4, logging_steps=1, optim="sgd", **changes)
        options |= {"output_dir": str(tmp_path / str(padding_free)), "train_sampling_strategy": "sequential"}
        options |= {"lora_dropout": 0.0} if changes else {}
        tuning.train(options)
        said = capsys.readouterr().out
        assert ("Batches are padding-free." in said) == (padding_free == "auto")
        runs[padding_free] = losses(tmp_path / str(padding_free)), weights(tmp_path / str(padding_free))
    (packed_losses, packed), (padded_losses, padded) = runs.values()
    assert packed_losses == pytest.approx(padded_losses, rel=1e-5)
    for name, value in padded.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_mllama_is_padded_and_the_reason_is_said(make_options, capsys):
    tuning.train(make_options("mllama", max_steps=1))
    assert "Batches are padded to their longest row: cross_attention_mask has a place for each token and image" in (
        capsys.readouterr().out
    )


def test_padding_free_true_is_refused_where_it_would_be_wrong(make_options):
    with pytest.raises(UserError, match=r"padding_free.*cannot be true for this model"):
        tuning.train(make_options("mllama", max_steps=1, padding_free=True))


def test_nothing_of_it_is_left_in_the_saved_model(make_options, tmp_path):
    tuning.train(make_options("granite_vision", max_steps=1, output_dir=str(tmp_path / "out")))
    assert "packed" not in (tmp_path / "out" / "config.json").read_text()


def test_padding_free_must_be_one_of_three(make_options):
    with pytest.raises(UserError, match="padding_free: 'sometimes' is unknown; use auto, true or false"):
        tuning.train(make_options("llava15", padding_free="sometimes"))
