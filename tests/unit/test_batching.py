"""Batches of rows of similar length."""

import json
import random

import pytest

from tuning.data.batching import LengthGroupedRows
from tuning.data.sources import open_source

LENGTHS = list(range(1, 33)) * 8


def padding(order: list[int], batch_size: int) -> int:
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)


def test_every_row_once_and_far_less_padding():
    order = list(LengthGroupedRows(LENGTHS, 4, seed=0))
    assert sorted(order) == list(range(len(LENGTHS)))
    shuffled = random.Random(0).sample(order, len(order))
    assert padding(order, 4) < 0.2 * padding(shuffled, 4)


def test_the_order_depends_on_seed_and_epoch_only():
    sampler, other = LengthGroupedRows(LENGTHS, 4, seed=0), LengthGroupedRows(LENGTHS, 4, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    other.set_epoch(1)
    assert list(sampler) == list(other) != first


def test_lengths_are_measured_without_opening_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * n}],
            "images": ["no.png"],
        }
        for n in (5, 50, 500)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path / "rows.jsonl"), text_field="messages", image_field="images")
    lengths = source.text_lengths()
    assert [later - lengths[0] for later in lengths] == pytest.approx([0, 45, 495])
