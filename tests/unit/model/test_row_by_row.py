"""Layers that run row by row get what belongs to each row, and what they return is joined."""

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tuning.model.row_by_row import (
    RUNNING,
    PackedRows,
    PerRow,
    find_layers,
    join_outputs,
    layers_by_row,
    row_cutter,
)

ENDS = [0, 3, 7, 12]
TOKENS = torch.arange(12)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 12, 5), (1, 4, 5)),
        ((1, 12, 12), (1, 4, 12)),  # hidden states as wide as there are tokens
        ((12, 5), (4, 5)),
        ((1, 12), (1, 4)),
        ((12,), (4,)),
        ((3, 1, 12), (3, 1, 4)),
        ((3, 1, 12, 5), (3, 1, 4, 5)),
        ((1, 1, 12, 12), (1, 1, 4, 4)),
        ((12, 12), (4, 4)),
        ((1, 5), (1, 5)),  # of no token
        ((), ()),
    ],
)
def test_a_row_gets_its_own_part(shape, expected):
    value = torch.rand(shape)
    assert row_cutter(1, ENDS)(value).shape == expected


def test_integers_of_pairs_of_tokens_are_cut_in_both_dimensions():
    distance = (TOKENS[:, None] - TOKENS)[None]
    assert torch.equal(row_cutter(2, ENDS)(distance), distance[:, 7:, 7:])


def test_what_does_not_belong_to_tokens_is_passed_on():
    cache = object()
    assert row_cutter(1, ENDS)(cache) is cache
    assert row_cutter(1, ENDS)(PerRow(("a", "b", "c"))) == "b"


def test_outputs_are_joined_and_what_cannot_be_is_kept_by_row():
    rows = [(torch.full((1, t, 2), float(t)), None, torch.zeros(1, t, t, 3), torch.zeros(t, 4)) for t in (3, 4)]
    hidden, nothing, pairs, experts = join_outputs(rows)
    assert hidden[0, :, 0].tolist() == [3.0] * 3 + [4.0] * 4
    assert nothing is None
    assert [part.shape[1] for part in pairs.parts] == [3, 4]
    assert experts.shape == (7, 4)


class RunningMean(GradientCheckpointingLayer):
    """A layer with a state along the row."""

    def forward(self, hidden, scale=None, **bounds):
        count = torch.arange(1, hidden.shape[1] + 1)[None, :, None]
        return hidden.cumsum(1) / count * scale


def test_a_layer_with_a_state_gives_each_row_what_it_gives_it_alone():
    decoder = nn.Module()
    decoder.layers = nn.ModuleList([RunningMean(), RunningMean()])
    layer, rows = decoder.layers[1], PackedRows()
    hidden, scale = torch.rand(1, 12, 2), torch.rand(1, 12, 2)
    bounds = torch.tensor(ENDS)
    alone = [layer(hidden[:, start:end], scale=scale[:, start:end]) for start, end in [(0, 3), (3, 7), (7, 12)]]
    assert [*find_layers(decoder)] == ["layers.0", "layers.1"]
    with layers_by_row(decoder, ["layers.1"], rows):
        with rows.running(bounds):
            assert torch.equal(layer(hidden, scale=scale, cu_seq_lens_q=bounds), torch.cat(alone, dim=1))
            assert not torch.equal(decoder.layers[0](hidden, scale=scale), torch.cat(alone, dim=1))
        assert torch.equal(layer(hidden, scale=scale), torch.cat(alone, dim=1))  # again, for the backward
        with rows.running(None):  # a padded batch, or an answer
            assert torch.equal(layer(hidden, scale=scale), decoder.layers[0](hidden, scale=scale))
    assert "forward" not in vars(layer)


def test_only_the_model_that_runs_has_packed_rows():
    rows, others = PackedRows(), PackedRows()
    with rows.running(torch.tensor(ENDS)):
        assert RUNNING.get().tolist() == ENDS
        with others.running(None):
            assert RUNNING.get() is None
        assert RUNNING.get().tolist() == ENDS
    assert RUNNING.get() is None
    assert (rows.ends, others.ends) == (ENDS, None)
