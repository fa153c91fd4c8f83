"""On a CUDA GPU, FlashAttention over all samples equals plain attention of each, and packed runs equal padded ones."""

import json

import pytest
import torch

import tuning
from tuning.model.packed_attention import PACKED_FLASH, packed_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LENGTHS = (300, 1, 77, 640)


class Layer:
    is_causal = True


def plain(query, key, value, *, scaling=None, sliding_window=None):
    """Attention of each separate sample in float64, written out as its formula."""
    outputs = []
    for q, k, v in zip(*(states.double().split(LENGTHS, dim=2) for states in (query, key, value)), strict=True):
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        scores = q @ k.transpose(2, 3) * (scaling or q.shape[-1] ** -0.5)
        seen = torch.ones_like(scores, dtype=torch.bool).tril()
        seen = seen.triu(1 - sliding_window) if sliding_window else seen
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [8, 2])
@pytest.mark.parametrize("settings", [{}, {"scaling": 0.05}, {"sliding_window": 64}], ids=str)
def test_flash_attention_equals_plain_attention_of_each_sample(dtype, keys, settings):
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 64) for heads in (8, keys, keys)]
    states = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    exact = [state.detach().clone().requires_grad_() for state in states]
    bounds = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    got = packed_attention(
        Layer(), *states, None, cu_seq_lens_q=bounds, max_length_q=max(LENGTHS), flash=True, **settings
    )[0]
    expected = plain(*exact, **settings)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for one, other in zip(states, exact, strict=True):
        distance = (one.grad.double() - other.grad.double()).norm() / other.grad.double().norm()
        assert distance < tolerance


@pytest.mark.parametrize("layout", ["granite_vision", "llava15", "llava16_mistral"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"torch_compile": True}], ids=str)
def test_a_run_without_padding_equals_a_padded_one(layout, changes, make_options, tmp_path, capsys):
    runs = []
    for padding_free in ("auto", False):
        folder = tmp_path / str(padding_free)
        options = make_options(layout, max_steps=6, dtype="bfloat16", padding_free=padding_free, **changes)
        tuning.train(options | {"output_dir": str(folder), "train_sampling_strategy": "sequential"})
        printed = capsys.readouterr().out
        assert ("Batches are padding-free." in printed) == (padding_free == "auto")
        assert "FlashAttention in PyTorch" in printed
        lines = map(json.loads, (folder / "training_logs.jsonl").read_text().splitlines())
        runs.append([line["loss"] for line in lines if "loss" in line])
    assert runs[0] == pytest.approx(runs[1], rel=5e-3)


def test_the_decoder_runs_with_flash_attention(make_options, trainers):
    tuning.train(make_options("granite_vision", max_steps=1, dtype="bfloat16"))
    assert trainers[0].model.config.get_text_config()._attn_implementation == PACKED_FLASH
