"""Attention over packed samples equals plain attention of each separate sample, in float64 and in 16 bits."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from tuning.model import packed_attention as module
from tuning.model.packed_attention import PACKED, packed_attention

LENGTHS = (5, 1, 12, 7)
BOUNDS = torch.tensor([0, 5, 6, 18, 25], dtype=torch.int32)
MODULE = SimpleNamespace(is_causal=True)
SETTINGS = {
    "plain": {},
    "a scale of its own": {"scaling": 0.37},
    "a sliding window": {"sliding_window": 4},
    "a window as long as a sample": {"sliding_window": 7},
    "softcapping": {"softcap": 1.5},
    "all": {"scaling": 0.8, "sliding_window": 3, "softcap": 0.7},
}


def states(heads: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(1, number, sum(LENGTHS), 8, dtype=torch.float64) for number in (heads, keys, keys)]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def plain_attention(query, key, value, *, scaling=None, sliding_window=None, softcap=None) -> torch.Tensor:
    """Scaled dot-product attention of one sample, written out as its formula."""
    heads, length, size = query.shape[1:]
    rows = []
    for head in range(heads):
        kv = head * key.shape[1] // heads
        for i in range(length):
            first = max(0, i - sliding_window + 1) if sliding_window else 0
            scores = key[0, kv, first : i + 1] @ query[0, head, i] * (scaling or 1 / math.sqrt(size))
            scores = torch.tanh(scores / softcap) * softcap if softcap else scores
            rows.append(torch.softmax(scores, 0) @ value[0, kv, first : i + 1])
    return torch.stack(rows).view(1, heads, length, size).transpose(1, 2)


def separately(query, key, value, **settings) -> torch.Tensor:
    cut = [tensor.split(LENGTHS, dim=2) for tensor in (query, key, value)]
    return torch.cat([plain_attention(*sample, **settings) for sample in zip(*cut, strict=True)], dim=1)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_output_and_gradients_equal_plain_attention_of_each_sample(heads, name):
    packed, plain = states(*heads, torch.float64), states(*heads, torch.float64)
    got = packed_attention(MODULE, *packed, None, cu_seq_lens_q=BOUNDS, **SETTINGS[name])[0]
    expected = separately(*plain, **SETTINGS[name])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_as_exact_as_they_can_be(dtype):
    packed = states(4, 2, dtype)
    got = packed_attention(MODULE, *packed, None, cu_seq_lens_q=BOUNDS)[0]
    expected = separately(*(tensor.detach().double() for tensor in packed))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_row_without_bounds_is_one_sample_and_rows_may_be_several():
    query, key, value = (torch.cat([tensor, tensor.flip(2)]) for tensor in states(4, 2, torch.float64))
    got = packed_attention(MODULE, query, key, value, None)[0]
    for row in range(2):
        expected = plain_attention(*(tensor[row : row + 1] for tensor in (query, key, value)))
        torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-12, atol=1e-12)


def test_a_mask_or_a_cache_goes_to_sdpa():
    query, key, value = states(4, 4, torch.float64)
    stock = AttentionInterface()["sdpa"]
    mask = torch.rand(1, 1, 25, 25) > 0.3
    mask |= torch.eye(25, dtype=torch.bool)
    for arguments in ((query, key, value, mask), (query[:, :, -1:], key, value, None)):
        got, expected = (attend(MODULE, *arguments)[0] for attend in (AttentionInterface()[PACKED], stock))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_dropout_drops_within_samples_and_keeps_the_mean():
    query, key, value = states(4, 2, torch.float64)
    torch.manual_seed(1)
    plain = packed_attention(MODULE, query, key, value, None, cu_seq_lens_q=BOUNDS)[0]
    dropped = [
        packed_attention(MODULE, query, key, value, None, cu_seq_lens_q=BOUNDS, dropout=0.2)[0] for _ in range(500)
    ]
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(torch.stack(dropped).mean(0), plain, rtol=0, atol=0.15)


@pytest.mark.parametrize("extra", [{"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_unsupported_attention_raises(extra):
    with pytest.raises(NotImplementedError):
        packed_attention(MODULE, *states(4, 4, torch.float64), None, cu_seq_lens_q=BOUNDS, **extra)


def varlen_like(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch.nn.attention.varlen computes (torch 2.13), by the plain formula, so that it runs on a CPU."""
    assert (cu_seq_q is cu_seq_k, max_q, max_k) == (True, max(LENGTHS), max(LENGTHS))
    assert cu_seq_q.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size[1] == 0  # causal
    window = window_size[0] + 1 if window_size[0] >= 0 else None
    query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
    return separately(query, key, value, scaling=scale, sliding_window=window)[0]


def varlen_of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return varlen_like(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0))


@pytest.mark.parametrize("kernel", [varlen_like, varlen_of_torch_2_10])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("name", ["plain", "a scale of its own", "a sliding window"])
def test_the_flash_kernel_gets_the_same_attention(kernel, heads, name, monkeypatch):
    takes = set(inspect.signature(kernel).parameters)
    monkeypatch.setattr(module, "varlen_attn", kernel)
    monkeypatch.setattr(module, "_VARLEN_OPTIONS", takes)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    half = [tensor.detach().to(torch.bfloat16) for tensor in states(*heads, torch.float64)]
    asked = {"cu_seq_lens_q": BOUNDS, "max_length_q": max(LENGTHS), **SETTINGS[name]}
    suits = module._can_use_flash(half[0], 0.0, None, SETTINGS[name].get("sliding_window"))
    assert suits == ("window_size" in takes or name != "a sliding window")
    got = AttentionInterface()[module.PACKED_FLASH](MODULE, *half, None, **asked)[0]
    expected = separately(*(tensor.double() for tensor in half), **SETTINGS[name])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0.05)
    monkeypatch.setattr(module, "_sample_by_sample", None)
    if suits:  # rotary embeddings leave queries and keys in float32 under autocast
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = AttentionInterface()[module.PACKED_FLASH](
                MODULE, half[0].float(), half[1].float(), half[2], None, **asked
            )
        assert torch.equal(cast[0], got)
