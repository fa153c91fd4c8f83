"""The masks that a model asks for, of each packed row: those of the row alone."""

import itertools

import torch
from transformers import Gemma3TextConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask

from tuning.model.packed_attention import PACKED_MASKED, RowMasks
from tuning.model.row_by_row import PackedRows

ENDS = [0, 6, 11, 20]
CONFIG = Gemma3TextConfig(sliding_window=4)
CONFIG._attn_implementation = PACKED_MASKED


def make(create, **options) -> RowMasks:
    """The mask of packed rows, as a model makes it."""
    inputs = dict(config=CONFIG, inputs_embeds=torch.zeros(1, 20, 8), attention_mask=None, cache=None)
    positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(ENDS)])[None]
    with PackedRows().running(torch.tensor(ENDS)):
        return create(**inputs, position_ids=positions, **options)


def test_causal_rows_need_no_mask():
    assert make(create_causal_mask).rows == [None, None, None]


def test_a_window_is_within_each_row():
    for mask, length in zip(make(create_sliding_window_causal_mask).rows, (6, 5, 9), strict=True):
        assert torch.equal(mask[0, 0], torch.ones(length, length).tril().triu(-3).bool())


def test_an_image_is_seen_both_ways_within_its_row():
    blocks = torch.full((1, 20), -1)
    blocks[0, 7:10], blocks[0, 13:16] = 0, 1
    first, second, third = make(create_causal_mask, block_sequence_ids=blocks).rows
    assert first is None
    expected = torch.ones(5, 5).tril().bool()
    expected[1:4, 1:4] = True
    assert torch.equal(second[0, 0], expected)
    expected = torch.ones(9, 9).tril().bool()
    expected[2:5, 2:5] = True
    assert torch.equal(third[0, 0], expected)


def test_a_row_that_runs_alone_takes_its_own_mask():
    blocks = torch.full((1, 20), -1)
    blocks[0, 7:10] = 0
    masks = make(create_causal_mask, block_sequence_ids=blocks)
    assert torch.equal(masks.for_row(1).rows[0], masks.rows[1])
    assert masks.for_row(1).shape == (1, 1, 5, 5)


def test_padding_and_answers_get_the_stock_mask():
    padding = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    inputs = dict(config=CONFIG, inputs_embeds=torch.zeros(2, 4, 8), attention_mask=padding, cache=None)
    expected = sdpa_mask(batch_size=2, q_length=4, kv_length=4, attention_mask=padding.bool())
    assert torch.equal(create_causal_mask(**inputs), expected)
