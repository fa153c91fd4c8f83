"""Which rows stand together, and which of them a process takes."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.data import batch_sampler
from tuning.data.batch_sampler import RowBatches, RowOrder, TokenBatches
from tuning.data.packing import pack

any_data = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LENGTHS = np.random.default_rng(0).lognormal(6, 1, 5000).astype(int) + 2
SPLITS = [(1, 8), (2, 4), (4, 2), (8, 1)]  # processes, accumulated batches


class Measured:
    """Lengths, and which of them were asked for."""

    def __init__(self, lengths):
        self.lengths, self.asked = np.asarray(lengths), list[int]()

    def __call__(self, rows):
        self.asked += rows
        return self.lengths[list(rows)]


def shares(make, world: int) -> list[list[list[int]]]:
    """The batches of each of `world` processes."""
    return [list(make(rank=rank, world=world)) for rank in range(world)]


def steps_of(ranks: list[list[list[int]]], accumulated: int) -> list[list[int]]:
    """The rows of each optimizer step, sorted."""
    batches = list(zip(*ranks, strict=True))  # all processes have the same number
    steps = (batches[start : start + accumulated] for start in range(0, len(batches), accumulated))
    return [sorted(row for block in step for batch in block for row in batch) for step in steps]


def padding(batches: list[list[int]], lengths) -> float:
    positions = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths[row] for batch in batches for row in batch) / positions


def test_grouping_leaves_a_tenth_of_the_padding():
    orders = [
        RowOrder(len(LENGTHS), 0, Measured(LENGTHS), group, grouped) for grouped in (True, False) for group in (8,)
    ]
    grouped, random = (padding(list(RowBatches(order, 8)), LENGTHS) for order in orders)
    assert grouped < 0.1 * random


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_depends_on_seed_and_epoch_only(grouped):
    sampler, other = (RowOrder(len(LENGTHS), 0, Measured(LENGTHS), 8, grouped) for _ in range(2))
    first = list(sampler)
    assert sorted(first) == list(range(len(LENGTHS)))
    sampler.epoch = other.epoch = 1
    assert list(sampler) == list(other) != first


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grouped", [None, False, True])
def test_rows_are_grouped_where_batches_are_padded_unless_the_user_says(grouped, padded):
    batches = RowBatches(RowOrder(len(LENGTHS), 0, Measured(LENGTHS), 8, grouped), 8)
    batches.padded = padded
    wanted = padded if grouped is None else grouped
    assert (padding(list(batches), LENGTHS) < 0.2) == wanted


@any_data
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    size=st.integers(1, 3),
    grouped=st.booleans(),
    drop_last=st.booleans(),
)
def test_a_step_has_the_same_rows_however_it_is_split(lengths, size, grouped, drop_last):
    rows, per_step = len(lengths), 8 * size
    drop_last = drop_last and rows % per_step == 0  # what else is left out are incomplete batches, not steps
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_sampler, "STEPS_OF_WINDOW", 2)
        patch.setattr(batch_sampler, "LEAST_ROWS", 1)
        for world, accumulated in SPLITS:
            order = RowOrder(rows, 3, Measured(lengths), per_step, grouped)
            ranks = shares(functools.partial(RowBatches, order, size, drop_last=drop_last), world)
            assert all(len(batch) <= size for rank in ranks for batch in rank)
            found.append(steps_of(ranks, accumulated))
    assert all(steps == found[0] for steps in found)
    assert sorted(itertools.chain.from_iterable(found[0])) == list(range(rows))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("rows", [24, 25, 29, 35])
def test_rows_are_dealt_out_evenly(rows, world):
    ranks = shares(functools.partial(RowBatches, RowOrder(rows, 0), 12 // world), world)
    for dealt in zip(*ranks, strict=True):
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    dropped = RowBatches(RowOrder(rows, 0), 12 // world, world=world, drop_last=True)
    assert len(list(dropped)) == len(dropped) == rows // 12


def test_accumulated_batches_wait_less_for_the_slowest_process(monkeypatch):
    def cost_of_slowest() -> int:
        ranks = shares(functools.partial(RowBatches, RowOrder(4992, 0, Measured(LENGTHS), 64), 8), 2)
        costs = [[max(LENGTHS[batch]) * len(batch) for batch in rank] for rank in ranks]
        return np.array(costs).reshape(2, -1, 4).sum(axis=2).max(axis=0).sum()

    turned = cost_of_slowest()
    monkeypatch.setattr(batch_sampler, "place_in_turn", lambda rank, world, number: rank)
    assert turned < 0.99 * cost_of_slowest()


@pytest.mark.parametrize("skipped", [0, 1, 150, 300, 511, 512, 620])
def test_batches_that_are_passed_over_are_not_measured(skipped):
    measured = Measured(LENGTHS)
    whole = list(RowBatches(RowOrder(len(LENGTHS), 0, Measured(LENGTHS), 8), 4, rank=1, world=2))
    batches = RowBatches(RowOrder(len(LENGTHS), 0, measured, 8), 4, rank=1, world=2)
    batches.begin(0, skipped)
    assert list(batches) == [[]] * skipped + whole[skipped:]
    assert len(measured.asked) == len(LENGTHS) - (skipped * 8 // batches.order.window) * batches.order.window
    batches.begin(1, 0)
    assert len(next(iter(batches))) == 4


def test_a_window_is_measured_when_it_is_reached():
    measured = Measured(LENGTHS)
    order = RowOrder(len(LENGTHS), 0, measured, 8)
    rows = iter(order)
    assert measured.asked == []
    list(itertools.islice(rows, order.window))
    assert len(measured.asked) == order.window
    next(rows)
    assert len(measured.asked) == 2 * order.window


def test_rows_that_are_not_trained_do_not_come_together():
    lengths = np.where(np.random.default_rng(1).random(4096) < 0.1, 1, LENGTHS[:4096])
    batches = RowBatches(RowOrder(4096, 0, Measured(lengths), 8), 8)
    assert max(sum(lengths[batch] == 1) for batch in batches) < 6


@any_data
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80), budget=st.integers(1, 100), padded=st.booleans())
def test_packed_batches_hold_every_row_once_and_no_more_than_the_budget(lengths, budget, padded):
    batches = pack(np.array(lengths), budget, padded=padded)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))
    for batch in batches:
        inside = [lengths[position] for position in batch]
        cost = len(inside) * max(inside) if padded else sum(inside)
        assert cost <= budget or len(inside) == 1
    if not padded and max(lengths) <= budget:  # Johnson 1973: at most 11/9 of the best, and 6/9
        assert len(batches) <= 11 / 9 * -(-sum(lengths) // budget) * 2 + 1


@any_data
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    budget=st.integers(20, 100),
    padded=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_a_step_has_the_same_batches_however_it_is_split(lengths, budget, padded, epoch):
    found, measured = [], Measured(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_sampler, "PACKED_ROWS", 16)
        for world, accumulated in SPLITS:

            def make(accumulated=accumulated, **share):
                batches = TokenBatches(
                    len(lengths),
                    measured,
                    budget,
                    seed=5,
                    padded=padded,
                    accumulation=accumulated,
                    **share,
                )
                batches.begin(epoch)
                assert len(list(batches)) == len(batches)
                return batches

            ranks = shares(make, world)
            found.append(steps_of(ranks, accumulated))
            assert sum(not batch for rank in ranks for batch in rank) < world
    assert all(steps == found[0] for steps in found)
    assert sorted(itertools.chain.from_iterable(found[0])) == list(range(len(lengths)))


def test_epochs_with_a_token_budget_have_the_same_number_of_steps_in_another_order():
    batches = TokenBatches(len(LENGTHS), Measured(LENGTHS), 4096, seed=0, padded=False)
    first = list(batches)
    batches.begin(1)
    second = list(batches)
    assert first != second
    assert len(first) == len(second) == len(batches)
    filled = sum(LENGTHS) / (4096 * len(first))
    assert filled > 0.98


def test_processes_that_wait_for_each_other_have_rows_of_similar_length():
    make = functools.partial(TokenBatches, 4096, Measured(LENGTHS), 4096, seed=0, padded=True, accumulation=8)
    first, second = (np.array([len(batch) for batch in rank]) for rank in shares(make, 2))
    apart_by_chance = np.abs(first - np.random.default_rng(0).permutation(second)).mean()
    assert np.abs(first - second).mean() < 0.3 * apart_by_chance


def test_endless_batches_go_on_without_a_short_step():
    lengths = LENGTHS[:500]
    batches = TokenBatches(500, Measured(lengths), 8192, seed=0, padded=True, accumulation=3, world=2, endless=True)
    with pytest.raises(TypeError):
        len(batches)
    shares = []
    for batches.rank in range(2):
        shares += itertools.islice(batches, 3 * batches.count_batches())
    assert all(shares)
    assert np.bincount(list(itertools.chain.from_iterable(shares))).tolist() == [6] * 500


def test_a_longer_row_than_the_budget_is_reported_once(capsys):
    batches = TokenBatches(3, Measured([5, 900, 800]), 700, seed=0, padded=True)
    assert [len(batch) for batch in batches] == [1, 1, 1]
    list(batches)
    assert capsys.readouterr().out.count("more tokens than max_tokens_per_batch 700") == 1
