"""What rows cost, and how batches are shared out so that processes do not wait for one another.

Costs are whole numbers. Sums of floats may differ by a bit between machines, and processes that then arranged rows
differently would leave some out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

UNIT = 1 << 24  # the cost of a token without its attention: large enough that rounding the others does not matter

Sizes = Callable[[Sequence[int]], np.ndarray]
"""`[rows, 2]`: the tokens of some rows, and how many of them stand for images."""


@dataclass(frozen=True)
class RowCost:
    """What a row costs in training: per token, per squared token (attention), and per image token (vision tower)."""

    per_token: int
    per_token_squared: int
    per_image_token: int

    @classmethod
    def of(cls, per_token: float, per_token_squared: float, per_image_token: float) -> "RowCost":
        """The same cost in whole numbers, in which a token costs `UNIT`."""
        return cls(UNIT, round(UNIT * per_token_squared / per_token), round(UNIT * per_image_token / per_token))

    def of_rows(self, tokens: np.ndarray, image_tokens: np.ndarray) -> np.ndarray:
        """The cost of each row."""
        tokens, image_tokens = tokens.astype(np.int64), image_tokens.astype(np.int64)
        return self.per_token * tokens + self.per_token_squared * tokens**2 + self.per_image_token * image_tokens


@dataclass(frozen=True)
class Balance:
    """The costs of rows and of batches, by the numbers of their rows."""

    cost: RowCost
    sizes: Sizes

    def of_rows(self, rows: Sequence[int]) -> np.ndarray:
        """The cost of each row where it is not padded."""
        return self.cost.of_rows(*self.sizes(rows).T)

    def of_batch(self, rows: Sequence[int], *, padded: bool) -> int:
        """The cost of a batch. `padded`: each row is as long as the longest."""
        if not rows:
            return 0
        tokens, image_tokens = self.sizes(rows).T
        return int(self.cost.of_rows(np.full_like(tokens, tokens.max()) if padded else tokens, image_tokens).sum())


def share_out(costs: Sequence[int], world: int) -> list[int]:
    """Positions in `costs`, those of the batches of a step, such that number `n` falls to process `n % world`.

    Batches of similar cost come at the same time. Of these, the process that has had least gets the most costly one.
    """
    order, totals, places = np.argsort(-np.asarray(costs), kind="stable"), np.zeros(world, dtype=np.int64), list[int]()
    for start in range(0, len(order), world):
        block = order[start : start + world]
        shared = np.empty_like(block)
        shared[np.argsort(totals[: len(block)], kind="stable")] = block
        totals[: len(block)] += np.asarray(costs)[shared]
        places += shared.tolist()
    return places
