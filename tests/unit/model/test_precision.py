"""The dtype of a run's weights, where auto would give one in which they cannot train."""

from types import SimpleNamespace

import pytest
import torch

from tuning.config.parse import build_config
from tuning.errors import UserError
from tuning.model import precision
from tuning.model.precision import decide_dtype

LORA = {"peft_method": "lora"}


def decide(make_options, stored: str, **options) -> str:
    config = build_config(make_options("llava15", use_cpu=True) | {"use_cpu": None} | options)
    return decide_dtype(config, SimpleNamespace(dtype=getattr(torch, stored))).model.dtype


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"fp16": True}, "float32"),
        ({"fp16": True} | LORA | {"modules_to_save": ["multi_modal_projector"]}, "float32"),
        ({"fp16": True} | LORA, "auto"),
    ],
    ids=str,
)
def test_weights_that_train_under_fp16_are_float32(stored, options, dtype, make_options, monkeypatch):
    assert decide(make_options, stored, **options) == dtype


@pytest.mark.parametrize("options", [{}, {"bf16": True}, LORA], ids=str)
def test_a_checkpoint_in_float16_trains_as_bfloat16(options, make_options, capsys):
    assert decide(make_options, "float16", **options) == "bfloat16"
    assert "The weights are loaded in bfloat16: the checkpoint is float16" in capsys.readouterr().out
    assert decide(make_options, "bfloat16", **options) == "auto"
    assert decide(make_options, "float32", **options) == "auto"


def test_on_a_gpu_without_bfloat16_a_checkpoint_in_float16_needs_loss_scaling(make_options, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    with pytest.raises(UserError, match=r"small gradients would become zero\. Set fp16 true"):
        decide(make_options, "float16")
    assert decide(make_options, "float16", fp16=True) == "float32"
