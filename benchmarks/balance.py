"""How long processes wait for the slowest one: the most costly share of a step ÷ the mean share, ours and by chance.

Simulates an epoch on 8 to 1,024 processes with our samplers and lengths of rows only. A cost is what the shapes of
Qwen2.5-VL 7B say in full fine-tuning (tuning/model/flops.py, tuning/training/row_cost.py), of padding-free batches. A
step has one batch of each process. `ours` and `random` are means over the steps of an epoch, without its short last
one. `worst` is our worst step. `least` is the mean of what no way of dealing out the rows of a step can beat: a process
has the most costly row.

tokens    max_tokens_per_batch 32768; by chance: the batches that first-fit decreasing packs, in random order
grouped   8 rows for each process, train_sampling_strategy group_by_length; by chance: rows in random order
rows      8 rows for each process, rows in random order, dealt out by their costs; by chance: dealt out in turn

The targets are at most 1.05 with 8 processes and 1.10 with 64, for `tokens` and `grouped`.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from record import describe_environment, print0, print_line

from tuning.data.balance import Balance, RowCost
from tuning.data.batch_sampler import RowBatches, RowOrder, SharedBatches, TokenBatches
from tuning.data.dummy_samples import PictureSize
from tuning.model.flops import count_flops
from tuning.model.parts import find_parts
from tuning.training.row_cost import find_row_cost

BUDGET, LONGEST, SIZE = 32768, 32768, 8  # tokens of a batch, and of a row; rows of a batch
TARGETS = {8: 1.05, 64: 1.10}


@dataclass(frozen=True)
class Kind:
    """Rows of a kind: median and spread (of a lognormal distribution) of their text tokens and of each image's."""

    text: tuple[float, float]
    images: int = 0
    tokens_of_image: tuple[float, float] = (900, 0.5)  # about 850 × 850 pixels

    def draw(self, generator: np.random.Generator, rows: int) -> np.ndarray:
        """`[rows, 2]`: tokens, and how many of them stand for images."""

        def lognormal(median: float, spread: float, *shape: int) -> np.ndarray:
            return generator.lognormal(np.log(median), spread, shape)

        images = lognormal(*self.tokens_of_image, rows, self.images).clip(64, 2500).sum(axis=1)
        tokens = (lognormal(*self.text, rows).clip(16) + images).astype(np.int64).clip(max=LONGEST)
        return np.stack([tokens, np.minimum(images.astype(np.int64), tokens - 8)], axis=1)


KINDS = {
    "text": Kind((300, 0.9)),
    "one image": Kind((200, 0.8), images=1),
    "ten images": Kind((500, 0.8), images=10),
    "long document": Kind((9000, 0.6)),
}
# The share of each kind in the rows.
MIXTURES = {
    "all": {"text": 0.35, "one image": 0.40, "ten images": 0.15, "long document": 0.10},
    "pictures": {"text": 0.10, "one image": 0.80, "ten images": 0.08, "long document": 0.02},
    "documents": {"text": 0.20, "one image": 0.20, "ten images": 0.30, "long document": 0.30},
}


def draw_rows(mixture: str, rows: int) -> np.ndarray:
    """`[rows, 2]`: tokens and image tokens of the rows of a mixture, shuffled."""
    generator = np.random.default_rng(0)
    kinds = generator.choice(len(KINDS), rows, p=[MIXTURES[mixture][kind] for kind in KINDS])
    drawn = np.stack([kind.draw(generator, rows) for kind in KINDS.values()])
    return drawn[kinds, np.arange(rows)]


def cost_of_qwen() -> RowCost:
    """What a row costs with the published shapes of Qwen2.5-VL 7B, of which a picture of 640×480 has 391 tokens."""
    import torch
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "use_sliding_window": False}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    flops, patches = count_flops(model, find_parts(model)), 46 * 34
    cost = find_row_cost(flops, PictureSize(patches // 4, (patches, 2 * 3 * 14 * 14)))
    assert cost is not None
    return cost


def make_batches(kind: str, sizes: np.ndarray, world: int, balance: Balance | None) -> SharedBatches:
    """Our batches, or without `balance` those by chance."""
    share, rows = {"world": world, "balance": balance, "padded": False, "drop_last": True}, len(sizes)

    def lengths(numbers: Sequence[int]) -> np.ndarray:
        return sizes[list(numbers), 0]

    if kind == "tokens":
        return TokenBatches(rows, lengths, BUDGET, seed=0, **share)
    grouped = kind == "grouped" and balance is not None
    return RowBatches(RowOrder(rows, 0, lengths, SIZE * world, grouped), SIZE, **share)


def costs_of_steps(batches: SharedBatches, balance: Balance, world: int) -> Iterator[np.ndarray]:
    """What each process has to do in each whole step, and the most costly row of the step at the end."""
    read = batches.read_batches(0)
    while len(step := list(itertools.islice(read, world))) == world:
        most = max(int(balance.of_rows(rows).max()) for rows in step)
        yield np.array([*(balance.of_batch(rows, padded=False) for rows in step), most], dtype=float)


def simulate(kind: str, sizes: np.ndarray, cost: RowCost, world: int) -> dict[str, float]:
    balance = Balance(cost, lambda numbers: sizes[list(numbers)])
    ours, random = (
        np.stack(list(costs_of_steps(make_batches(kind, sizes, world, chosen), balance, world)))
        for chosen in (balance, None)
    )
    ratios, by_chance = (steps[:, :-1].max(axis=1) / steps[:, :-1].mean(axis=1) for steps in (ours, random))
    least = np.maximum(1, ours[:, -1] / ours[:, :-1].mean(axis=1))
    figures = {"ours": ratios.mean(), "random": by_chance.mean(), "worst": ratios.max(), "least": least.mean()}
    return {"steps": len(ours), **{name: round(float(value), 3) for name, value in figures.items()}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 1024])
    parser.add_argument("--mixture", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    arguments = parser.parse_args(argv)
    environment, cost, missed = describe_environment(), cost_of_qwen(), 0
    for mixture in arguments.mixture:
        sizes = draw_rows(mixture, arguments.rows)
        for kind in ("tokens", "grouped", "rows"):
            for ranks in arguments.ranks:
                figures = simulate(kind, sizes, cost, ranks)
                print_line("balance", environment, mixture=mixture, batches=kind, ranks=ranks, **figures)
                missed += kind != "rows" and figures["ours"] > TARGETS.get(ranks, np.inf)
    print0(f"{missed} targets missed." if missed else "All targets reached.")


if __name__ == "__main__":
    main()
