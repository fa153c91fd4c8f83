"""Which rows stand together, and which of them a process takes."""

import json
import random

import pytest

from tuning.data.batching import RowOrder, SharedBatches
from tuning.data.sources import open_source

LENGTHS = list(range(1, 33)) * 8


def padding(order: list[int], batch_size: int) -> int:
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)


def test_every_row_once_and_far_less_padding():
    order = list(RowOrder(len(LENGTHS), 0, LENGTHS, group=4))
    assert sorted(order) == list(range(len(LENGTHS)))
    shuffled = random.Random(0).sample(order, len(order))
    assert padding(order, 4) < 0.2 * padding(shuffled, 4)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["shuffled", "grouped"])
def test_the_order_depends_on_seed_and_epoch_only(lengths):
    sampler, other = (RowOrder(len(LENGTHS), 0, lengths, group=4) for _ in range(2))
    first = list(sampler)
    sampler.set_epoch(1)
    other.set_epoch(1)
    assert list(sampler) == list(other) != first


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [24, 25, 29, 35])
def test_a_step_has_the_same_rows_on_any_number_of_processes(rows, world, drop_last):
    order = RowOrder(rows, seed=0)
    alone = list(SharedBatches(order, 12, drop_last=drop_last))
    shares = [
        list(SharedBatches(order, 12 // world, rank=rank, world=world, drop_last=drop_last)) for rank in range(world)
    ]
    assert {len(share) for share in shares} == {len(alone)} == {len(SharedBatches(order, 12, drop_last=drop_last))}
    for number, batch in enumerate(alone):
        dealt = [share[number] for share in shares]
        assert [row for rows_of_rank in dealt for row in rows_of_rank] == batch
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert len({row for batch in alone for row in batch}) == (rows - rows % 12 if drop_last else rows)


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
