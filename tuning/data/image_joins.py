"""How an image processor joins the tensors of several rows, learned from what it makes of rows together."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tuning.errors import UserError, try_optional

SIZES = ((48, 32), (24, 72), (64, 64), (96, 24))  # of several shapes: tiles depend on it
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Join:
    """How tensors of one name are joined: along `dim`, and padded with zeros in all others.

    `counts`: the tensor, and how many of its first dimensions, whose sizes multiplied are added to the indices of later
    rows. Molmo 2's `image_token_pooling` holds indices into the patches of all pictures of a batch. -1 stays. `tiles`:
    the first two dimensions are pictures and tiles, and the tiles of all pictures are laid out as those of one.
    """

    dim: int = 0
    counts: tuple[str, int] | None = None
    tiles: bool = False

    def __call__(self, name: str, rows: Sequence[Tensors]) -> torch.Tensor:
        """Join the tensors `name` of these rows."""
        tensors = [row[name].flatten(0, 1)[None] if self.tiles else row[name] for row in rows]
        if self.counts:
            other, dimensions = self.counts
            counts = (math.prod(row[other].shape[:dimensions]) for row in rows)
            starts = itertools.accumulate(counts, initial=0)
            shifted = zip(tensors, starts, strict=False)
            tensors = [torch.where(tensor < 0, tensor, tensor + start) for tensor, start in shifted]
        return torch.cat(pad_to_largest(tensors, 0, but=self.dim), self.dim)


@dataclass(frozen=True)
class Joins:
    """How each image tensor of a processor is joined, by name.

    `by_row`: the first dimension is the rows (`[rows, images, …]`: Mllama, Idefics). Otherwise it is the images of all
    rows (`[images, …]`: LLaVA). `blank`: the tensors of a row without images, where there is one `by_row`.
    """

    rules: dict[str, Join] = field(default_factory=dict)
    by_row: bool = False
    blank: Tensors = field(default_factory=dict)

    def __call__(self, rows: Sequence[Tensors]) -> Tensors:
        """The tensors of a batch. A row without images has none."""
        if not any(rows):
            return {}
        rows = [row or self.blank for row in rows if row or self.by_row]
        return {name: self.rules.get(name, Join())(name, rows) for name in rows[0]}


def learn_joins(image_processor: Any) -> Joins:
    """Process made-up rows alone and together. Raises `UserError` for a tensor whose rule is not found."""
    first, second, third, fourth = (_draw(size) for size in SIZES)

    def process(*rows: list[Image.Image]) -> Tensors:
        made = image_processor(list(rows), return_tensors="pt")
        if torch.is_tensor(made):  # Idefics' returns nothing else
            made = {image_processor.model_input_names[0]: made}
        return {name: value for name, value in made.items() if torch.is_tensor(value) and value.dim()}

    trials = [([first], [second, third]), ([fourth, first], [third])]
    tried = try_optional(lambda: [process(*rows) for rows in trials])
    if tried.value is None:  # it does not join pictures of different numbers of tiles: training begins with a trial
        return Joins({name: Join(1, tiles=True) for name, value in process([first]).items() if value.dim() > 4})
    alone = [[process(row) for row in rows] for rows in trials]
    main, kind = image_processor.model_input_names[0], type(image_processor).__name__
    names = [name for name in image_processor.model_input_names if name in tried.value[0]]
    rules = {name: _find_rule(name, alone, tried.value, kind) for name in names}
    by_row = main in rules and rules[main].dim == 0 and len(tried.value[0][main]) == len(trials[0])
    return Joins(rules, by_row, _make_blank(process, main) if by_row else {})


def _draw(size: tuple[int, int]) -> Image.Image:
    """A picture without two equal pixels side by side."""
    return Image.fromarray(np.random.default_rng(size[0]).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8))


def _find_rule(name: str, alone: list[list[Tensors]], together: list[Tensors], processor: str) -> Join:
    """The first rule that gives what the processor gives, or at least tensors of that shape: padding may have values.

    The start of training tries what the model makes of them.
    """
    made = [
        (rule, [try_optional(lambda: rule(name, rows)).value for rows in alone])  # noqa: B023
        for rule in _possible_rules(name, alone[0][0])
    ]
    expected = [joined[name] for joined in together]
    for is_same in (_equal, _same_shape):
        for rule, found in made:
            if all(map(is_same, found, expected)):
                return rule
    raise UserError(
        where=processor,
        problem=f"we found no rule by which it joins `{name}` of several rows.",
        fix="Choose another model.",
    )


def _possible_rules(name: str, row: Tensors) -> Iterator[Join]:
    yield from (Join(dim) for dim in range(row[name].dim()))
    if not row[name].is_floating_point():
        yield from (Join(0, (other, n)) for other in row for n in range(1, row[other].dim()))


def _same_shape(made: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return made is not None and made.shape == expected.shape


def _equal(made: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return _same_shape(made, expected) and torch.equal(cast(torch.Tensor, made), expected)


def _make_blank(process: Callable[..., Tensors], main: str) -> Tensors:
    """The tensors of a row without images beside one that has some."""
    picture = Image.new("RGB", (32, 32))
    tried = try_optional(lambda: process([picture], []))
    if tried.value is not None and all(len(value) == 2 for value in tried.value.values()):
        return {name: value[1:] for name, value in tried.value.items()}
    made = process([picture])
    return made | {main: torch.zeros_like(made[main])}


def pad_to_largest(tensors: Sequence[torch.Tensor], value: float, *, but: int | None = None) -> list[torch.Tensor]:
    """Pad every dimension, `but` one, at its end to the largest among `tensors`."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [most - size for most, size in zip(largest, tensor.shape, strict=True)]
        if but is not None:
            missing[but] = 0
        # F.pad counts dimensions from the last: (before, after) of each.
        widths = [width for amount in reversed(missing) for width in (0, amount)]
        padded.append(F.pad(tensor, widths, value=value) if any(missing) else tensor)
    return padded
