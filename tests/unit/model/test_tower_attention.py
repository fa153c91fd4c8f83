"""Attention of towers within segments of given lengths, in few calls."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tuning.model import tower_attention
from tuning.model.tower_attention import _lengths, find_tower_configs

SEGMENTS = [[4, 4, 4, 2, 4, 4], [5], [3, 0, 0, 3], [1, 2, 3], [8] * 9 + [2] + [8] * 9]


def attend(states, bounds, **options):
    module = nn.Module()
    module.is_causal = False
    return tower_attention.tower_attention(module, *states, None, cu_seq_lens_q=bounds, **options)[0]


def bounds_of(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("lengths", SEGMENTS)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_each_segment_sees_itself_only(lengths, scaling):
    torch.manual_seed(0)
    states = [torch.randn(1, 2, sum(lengths), 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bounds = bounds_of(lengths)
    weights = torch.randn(1, sum(lengths), 2, 8, dtype=torch.float64)
    segments = [slice(*ends) for ends in pairwise(bounds.tolist())]
    alone = [F.scaled_dot_product_attention(*(s[:, :, part] for s in states), scale=scaling) for part in segments]
    expected = torch.cat(alone, dim=2).transpose(1, 2)
    found = attend(states, bounds, scaling=scaling, max_length_q=max(lengths))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((output * weights).sum(), states) for output in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("lengths", "calls"), zip(SEGMENTS, [3, 1, 1, 3, 3], strict=True))
def test_neighbours_of_equal_length_are_one_call(lengths, calls, monkeypatch):
    seen = []
    stock = tower_attention.sdpa_attention_forward
    monkeypatch.setattr(tower_attention, "sdpa_attention_forward", lambda *a, **k: seen.append(a) or stock(*a, **k))
    attend([torch.randn(1, 2, sum(lengths), 8)] * 3, bounds_of(lengths))
    assert len(seen) == calls


def test_lengths_are_read_once(monkeypatch):
    read, diff = [], torch.Tensor.diff
    monkeypatch.setattr(torch.Tensor, "diff", lambda self: read.append(self) or diff(self))
    bounds, others = bounds_of([2, 3]), bounds_of([4, 1])
    assert [_lengths(tensor) for tensor in (bounds, others, bounds)] == [[2, 3], [4, 1], [2, 3]]
    assert len(read) == 2


def test_causal_attention_is_refused():
    with pytest.raises(NotImplementedError, match="causal"):
        attend([torch.randn(1, 2, 4, 8)] * 3, bounds_of([2, 2]), is_causal=True)


def test_a_tower_without_lengths_stays_as_it_is():
    from tiny_models import build_model

    assert find_tower_configs(build_model("llava15")) == []
