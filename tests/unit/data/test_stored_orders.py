"""The order of rows is the one that earlier versions had: a run they began continues in the middle of an epoch."""

import hashlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from tuning.data import batch_sampler
from tuning.data.batch_sampler import begin_epoch, make_row_batches, make_token_batches

SETTINGS = {
    "rows": (1, 7, 61),
    "train_batch_size": (1, 3),
    "world_size": (1, 2, 3),
    "gradient_accumulation_steps": (1, 2, 3),
    "padded": (True, False),
    "epoch": (0, 2),
    "steps_done": (0, 2),
    "dataloader_drop_last": (False, True),
}
ROW_SETTINGS = {"grouped": (None, True, False), "train_sampling_strategy": ("random", "sequential")}
TOKEN_SETTINGS = {"budget": (40, 300), "max_steps": (-1, 50), "data_seed": (None, 9)}
STEP = 31  # every 31st combination: no number of values divides it, so each value meets each other one
STORED = {
    "rows": "32bcd58c5f6f7f61c48895f35c3347d3b882c8d19062d6bb2d02e5bc71b148d9",
    "tokens": "539b1e433d8cfba89bf4e78433c4f1de8a1a63bbfa08c8dcac42c324556c1220",
    "large rows": "e6fb02b0c175b8eda3c5f46546ab987d8a51b908191abcf13188d0afac1299ac",
    "large tokens": "80dd0bf3d33faabbd8af6ccd85f90a6646b628b1228f8c8ac414b7e6f2b77498",
}


def lengths_of(rows: int):
    numbers = np.arange(rows, dtype=np.int64)
    lengths = (numbers * 7919 + numbers * numbers * 31) % 97 + 2
    lengths[numbers % 13 == 5] = batch_sampler.NOT_TRAINED
    return lambda chosen: lengths[list(chosen)]


def batches_of_processes(settings: dict) -> list[list[list[int]]]:
    """The batches that each process still has to train in an epoch of which `steps_done` steps are done."""
    defaults = {"train_sampling_strategy": "random", "seed": 3, "data_seed": None, "max_steps": -1}
    training = SimpleNamespace(**{**defaults, "ignore_data_skip": False, **settings})
    lengths, found = lengths_of(training.rows), []
    for rank in range(training.world_size):
        training.process_index = rank
        if "budget" in settings:
            batches = make_token_batches(training, training.rows, lengths, training.budget, padded=training.padded)
        else:
            batches = make_row_batches(training, training.rows, lengths, training.grouped)
        endless = training.max_steps > 0
        steps = training.max_steps if endless else max(1, -(-len(batches) // training.gradient_accumulation_steps))
        epoch, done = 0 if endless else training.epoch, training.steps_done % steps
        state = SimpleNamespace(epoch=float(epoch), global_step=epoch * steps + done)
        begin_epoch(batches, training, state, padded=training.padded, order_padded=training.padded)
        skipped = done * training.gradient_accumulation_steps
        found.append([list(map(int, batch)) for batch in itertools.islice(batches, skipped, 100 if endless else None)])
    return found


def digest_of(values: dict, step: int = STEP) -> str:
    digest = hashlib.sha256()
    for combination in itertools.islice(itertools.product(*values.values()), 0, None, step):
        orders = batches_of_processes(dict(zip(values, combination, strict=True)))
        digest.update(json.dumps(orders).encode())
    return digest.hexdigest()


@pytest.mark.parametrize(("name", "values"), [("rows", ROW_SETTINGS), ("tokens", TOKEN_SETTINGS)])
def test_orders_of_small_data(name, values, monkeypatch):
    for constant, value in {"STEPS_OF_WINDOW": 2, "LEAST_ROWS": 1, "PACKED_ROWS": 16}.items():
        monkeypatch.setattr(batch_sampler, constant, value)
    assert digest_of({**SETTINGS, **values}) == STORED[name]


@pytest.mark.parametrize("kind", [{"grouped": (None,)}, {"budget": (2000,)}], ids=["rows", "tokens"])
def test_orders_of_several_windows(kind):
    single = {name: values[:1] for name, values in SETTINGS.items()}
    changes = {"rows": (9001,), "train_batch_size": (4,), "world_size": (2,), "steps_done": (0, 100)}
    name = "large rows" if "grouped" in kind else "large tokens"
    assert digest_of({**single, **changes, "padded": (True, False), **kind}, step=1) == STORED[name]
