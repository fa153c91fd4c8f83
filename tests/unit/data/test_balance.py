"""The costs of rows, and batches of processes that agree in theirs."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.data import batch_sampler
from tuning.data.balance import UNIT, Balance, RowCost, share_out
from tuning.data.batch_sampler import RowBatches, RowOrder, TokenBatches
from tuning.data.packing import fill_evenly, pack

COST = RowCost.of(1e10, 5e4, 4e9)  # of 10 billion parameters, at about 10,000 tokens half as much for attention
BUDGET, SIZE = 16384, 8
KINDS = ("tokens", "grouped", "rows")
SPLITS = [(1, 8), (2, 4), (4, 2), (8, 1)]  # processes, accumulated batches
any_data = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def draw_sizes(rows: int) -> np.ndarray:
    """Tokens and image tokens: half of the rows are short texts, others have images, and a tenth is long."""
    generator = np.random.default_rng(5)
    kind = generator.choice(4, rows, p=[0.5, 0.3, 0.1, 0.1])
    images = np.where(kind == 1, 600, np.where(kind == 2, 5000, 0)) * generator.uniform(0.5, 1.5, rows)
    text = generator.lognormal(np.where(kind == 3, np.log(7000), np.log(300)), 0.6)
    tokens = (images + text + 2).clip(max=BUDGET).astype(int)
    return np.stack([tokens, np.minimum(images.astype(int), tokens)], axis=1)


SIZES = draw_sizes(9001)


def make(kind: str, sizes=SIZES, *, world=1, accumulation=1, balanced=True, padded=False, size=SIZE, **share):
    balance = Balance(COST, lambda rows: sizes[list(rows)]) if balanced else None
    share |= {"world": world, "accumulation": accumulation, "balance": balance, "padded": padded}
    lengths = functools.partial(lambda rows: sizes[list(rows), 0])
    if kind == "tokens":
        return TokenBatches(len(sizes), lengths, share.pop("budget", BUDGET), seed=3, **share)
    order = RowOrder(len(sizes), 3, lengths, size * world * accumulation, kind == "grouped")
    return RowBatches(order, size, **share)


def read(kind: str, *, world: int, epoch=0, skipped=0, **options) -> list[list[list[int]]]:
    """The batches of each process."""
    ranks = []
    for rank in range(world):
        batches = make(kind, rank=rank, world=world, **options)
        batches.begin(epoch, skipped)
        ranks.append(list(batches))
    return ranks


def imbalance(ranks, accumulation=1, sizes=SIZES, padded=False) -> float:
    """The mean over the whole steps of the most costly share ÷ the mean share."""
    balance = Balance(COST, lambda rows: sizes[list(rows)])
    costs = np.array([[balance.of_batch(batch, padded=padded) for batch in rank] for rank in ranks], dtype=float)
    whole = (costs.shape[1] - 1) // accumulation  # the last step may be short
    shares = costs[:, : whole * accumulation].reshape(len(ranks), whole, accumulation).sum(axis=2)
    return float((shares.max(axis=0) / shares.mean(axis=0)).mean())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", ["tokens", "grouped"])
def test_eight_processes_wait_for_a_twentieth_at_most(kind, accumulation):
    ours = imbalance(read(kind, world=8, accumulation=accumulation), accumulation)
    by_chance = imbalance(read(kind if kind == "tokens" else "rows", world=8, balanced=False))
    assert ours <= 1.05 < by_chance


def test_rows_in_random_order_are_dealt_out_by_their_costs():
    assert imbalance(read("rows", world=8)) - 1 < 0.25 * (imbalance(read("rows", world=8, balanced=False)) - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batches_are_shared_out_over_a_step(kind):
    options = {"world": 4, "accumulation": 4, "padded": True}
    balanced, before = (
        imbalance(read(kind, balanced=balanced, **options), 4, padded=True) for balanced in (True, False)
    )
    assert balanced - 1 < 0.7 * (before - 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_epochs_are_whole_the_same_each_time_and_may_begin_in_the_middle(kind, padded):
    options = {"world": 4, "accumulation": 2, "padded": padded}
    first = read(kind, **options)
    assert sorted(row for rank in first for batch in rank for row in batch) == list(range(len(SIZES)))
    assert read(kind, **options) == first != read(kind, epoch=1, **options)
    for skipped in (2, 50):
        assert read(kind, skipped=skipped, **options) == [[[]] * skipped + rank[skipped:] for rank in first]


@pytest.mark.parametrize("kind", ["grouped", "rows"])
def test_a_balanced_step_has_the_rows_that_it_had_before(kind):
    steps = [
        [
            sorted(itertools.chain.from_iterable(block))
            for block in zip(*read(kind, world=8, balanced=balanced), strict=True)
        ]
        for balanced in (True, False)
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("padded", [False, True])
def test_an_epoch_has_as_many_batches_as_without_balance(padded):
    for budget in (BUDGET, 3000, 300):
        balanced, before = (make("tokens", balanced=on, padded=padded, budget=budget, world=8) for on in (True, False))
        assert balanced.count_batches() == before.count_batches()


@any_data
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=90),
    kind=st.sampled_from(KINDS),
    padded=st.booleans(),
    pads=st.booleans(),
    size=st.integers(1, 3),
    epoch=st.integers(0, 1),
)
def test_a_step_has_the_same_rows_however_it_is_split(lengths, kind, padded, pads, size, epoch):
    sizes = np.stack([lengths, np.array(lengths) // 2], axis=1)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_sampler, "PACKED_ROWS", 16)
        patch.setattr(batch_sampler, "SORTED_STEPS", 2)
        for world, accumulation in SPLITS:
            ranks = []
            for rank in range(world):
                options = {"budget": 100} if kind == "tokens" else {"size": size}
                options |= {"world": world, "accumulation": accumulation, "padded": padded, "rank": rank}
                batches = make(kind, sizes, **options)
                batches.pads = pads
                batches.begin(epoch)
                ranks.append(list(batches))
                assert len(ranks[-1]) == len(batches)
                assert kind == "tokens" or max(map(len, ranks[-1])) <= size
            blocks = list(zip(*ranks, strict=True))
            steps = (blocks[start : start + accumulation] for start in range(0, len(blocks), accumulation))
            found.append([sorted(row for block in step for batch in block for row in batch) for step in steps])
    assert all(steps == found[0] for steps in found)
    assert sorted(itertools.chain.from_iterable(found[0])) == list(range(len(lengths)))


@any_data
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80), budget=st.integers(60, 150))
def test_evenly_filled_batches_hold_no_more_than_they_may(lengths, budget):
    weights = np.array(lengths)
    packed = pack(weights, budget, padded=False)
    filled = fill_evenly(weights**2, weights, [budget] * len(packed))
    if filled is not None:
        assert sorted(itertools.chain.from_iterable(filled)) == list(range(len(lengths)))
        assert all(weights[batch].sum() <= budget for batch in filled)


def test_rows_that_do_not_fit_are_refused():
    assert fill_evenly(np.array([3, 2, 2]), np.array([3, 2, 2]), [4, 3]) is None
    assert [batch.tolist() for batch in fill_evenly(np.array([5, 1, 4]), np.array([1, 1, 1]), [1, 2])] == [[0], [2, 1]]


def test_the_process_that_had_least_gets_most():
    costs = [1, 9, 5, 8, 2, 6]
    shared = [costs[place] for place in share_out(costs, 2)]
    assert shared == [9, 8, 5, 6, 2, 1]
    assert sorted(share_out([4, 4, 4, 4, 4], 2)) == list(range(5))


def test_costs_are_whole_numbers():
    assert RowCost(UNIT, round(UNIT * 5e-6), round(UNIT * 0.4)) == COST
    costs = COST.of_rows(np.array([100, 200_000], dtype=np.int32), np.array([0, 100], dtype=np.int32))
    assert costs.dtype == np.int64
    assert costs[1] == UNIT * 200_000 + COST.per_token_squared * 200_000**2 + COST.per_image_token * 100
    sizes = np.array([[5, 0], [2, 1]])
    balance = Balance(RowCost(10, 1, 3), lambda rows: sizes[list(rows)])
    assert balance.of_rows([0, 1]).tolist() == [75, 27]
    assert balance.of_batch([0, 1], padded=False) == 102
    assert balance.of_batch([0, 1], padded=True) == 153
    assert balance.of_batch([], padded=True) == 0
