"""How the image tensors of several rows become those of a batch: learned from what the processor does itself."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from tuning.errors import UserError, try_optional

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ImageJoin:
    """Concatenate along `dim`, and pad the other dimensions at their end with 0.

    `points_into`: the numbers are places among the first `places` dimensions of this other tensor. Each row counts from
    0, and the batch from its first row. Negative numbers stand for no place. `as_one`: the pictures of all rows,
    `[images, tiles, …]`, become one picture with all their tiles.
    """

    dim: int = 0
    points_into: str = ""
    places: int = 0
    as_one: bool = False

    def __call__(self, rows: Sequence[Tensors], name: str) -> torch.Tensor:
        rows = [row for row in rows if name in row]  # some have tiles only for large pictures
        tensors = [row[name].flatten(0, 1)[None] if self.as_one else row[name] for row in rows]
        if self.points_into:
            counts = [math.prod(row[self.points_into].shape[: self.places]) for row in rows]
            starts = itertools.accumulate(counts, initial=0)
            tensors = [torch.where(t < 0, t, t + start) for t, start in zip(tensors, starts, strict=False)]
        return torch.cat(pad_to_largest(tensors, 0, keep=self.dim), dim=self.dim)


@dataclass(frozen=True)
class ImageLayout:
    """How a processor lays out the image tensors of a batch.

    `nested`: the first dimension is the rows (`[rows, images, …]`: Mllama, Idefics). Otherwise it is the images, tiles
    or patches of all rows (`[images, …]`: LLaVA). `blank` has a nested processor's tensors for a row without images.
    `joins`: by name, where tensors are not concatenated along the first dimension. `unknown`: names of the tensors that
    the processor joins in another way than we know.
    """

    nested: bool = False
    blank: Tensors = field(default_factory=dict)
    joins: Mapping[str, ImageJoin] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def join(self, rows: Sequence[Tensors], *, end_to_end: bool = False) -> dict[str, torch.Tensor]:
        """The tensors of a batch. Rows without images are empty. `end_to_end`: of a padding-free batch, of one row."""
        with_images = [row for row in rows if row]
        if end_to_end and self.nested:
            return {name: ImageJoin(1)(with_images, name) for row in with_images for name in row}
        if with_images and self.nested:
            with_images = [row or self.blank for row in rows]
        names = dict.fromkeys(name for row in with_images for name in row)
        if len(with_images) > 1 and (strange := [name for name in names if name in self.unknown]):
            raise UserError(
                where="collator",
                problem=f"the processor joins {', '.join(strange)} of several rows in a way that is not known here.",
                fix="Use batches of one row.",
            )
        return {name: self.joins.get(name, ImageJoin())(with_images, name) for name in names}


def pad_to_largest(tensors: Sequence[torch.Tensor], value: float, *, keep: int | None = None) -> list[torch.Tensor]:
    """Pad every dimension at its end to the largest among `tensors`. `keep` leaves out one dimension."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [most - size for most, size in zip(largest, tensor.shape, strict=True)]
        if keep is not None:
            missing[keep] = 0
        # F.pad counts dimensions from the last: (before, after) of each.
        widths = [width for amount in reversed(missing) for width in (0, amount)]
        padded.append(F.pad(tensor, widths, value=value) if any(missing) else tensor)
    return padded


def learn_image_layout(image_processor: Any) -> ImageLayout:
    """Process rows of one and of two pictures, alone and together, and find out how their tensors are joined."""

    def process(*rows: list[Image.Image]) -> dict[str, torch.Tensor] | None:
        made = try_optional(lambda: image_processor(list(rows), return_tensors="pt")).value
        if not isinstance(made, Mapping):  # it refuses them, or returns a bare tensor (Idefics)
            return None
        return {name: value for name, value in made.items() if torch.is_tensor(value)} or None

    one, wide, tall, _ = small_pictures()
    rows = [[one], [wide, tall]]
    made, together = [process(row) for row in rows], process(*rows)
    alone = [row for row in made if row is not None]
    if len(alone) < len(rows) or together is None:
        return _guess_layout(process([one]), process([wide]))
    main = max(together, key=lambda name: together[name].numel())  # the pictures
    if alone[1][main].shape[0] == 1 and together[main].shape[0] == len(rows):
        return ImageLayout(nested=True, blank=_find_blank(alone[0], process([one], []) or {}, main))
    joins, unknown = {}, []
    for name in (name for name in together if any(name in row for row in alone)):
        fitting = (join for join in _candidates(alone, name) if _gives(join, alone, name, together))
        join = next(fitting, None)
        if join is not None and join != ImageJoin():  # the other order leaves no room for chance
            again = process(*reversed(rows))
            join = join if again and _gives(join, alone[::-1], name, again) else None
        if join is None:
            unknown.append(name)
        elif join != ImageJoin():
            joins[name] = join
    return ImageLayout(joins=joins, unknown=tuple(unknown))


def small_pictures() -> list[Image.Image]:
    """Four pictures of other sizes, each with other contents."""
    steps, rings = Image.linear_gradient("L"), Image.radial_gradient("L")
    images = [(steps, (64, 64)), (rings, (96, 40)), (steps.rotate(90), (40, 96)), (ImageOps.invert(rings), (72, 64))]
    return [image.resize(size).convert("RGB") for image, size in images]


def _candidates(alone: Sequence[Tensors], name: str) -> Iterator[ImageJoin]:
    """Ways to join a tensor, the likeliest first."""
    row = next(row for row in alone if name in row)
    yield from (ImageJoin(dim) for dim in range(row[name].dim()))
    if not row[name].is_floating_point():
        for other, value in row.items():
            yield from (ImageJoin(0, other, places) for places in range(1, value.dim() + 1) if other != name)


def _gives(join: ImageJoin, alone: Sequence[Tensors], name: str, together: Tensors) -> bool:
    """Whether `join` makes the processor's own batch of its rows."""
    joined = try_optional(lambda: join(alone, name)).value  # dimensions may not fit
    expected = together[name]
    if joined is None or joined.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(joined, expected)
    return torch.allclose(
        joined.float(), expected.float(), rtol=1e-3, atol=1e-3
    )  # it resizes pictures of a size at once


def _find_blank(alone: Tensors, beside_none: Tensors, main: str) -> Tensors:
    """Tensors for a row without images. `beside_none`: the processor's own for a row with an image, and one without."""
    made = beside_none.values()
    if made and not any(len(value) < 2 or value[1].any() for value in made):  # the join makes them as large as others
        return {name: value.new_zeros([1] * value.dim()) for name, value in beside_none.items()}
    return {name: torch.zeros_like(value) if name == main else value for name, value in alone.items()}


def _guess_layout(one: Tensors | None, other: Tensors | None) -> ImageLayout:
    """Where the processor does not take these rows together, join what differs, as a row of its own."""
    if one is None or other is None:
        return ImageLayout()
    joins = {}
    for name, value in one.items():
        sizes = zip(value.shape, other[name].shape, strict=True)
        differing = [dim for dim, (size, another) in enumerate(sizes) if size != another]
        if len(differing) == 1 and differing != [0]:
            joins[name] = ImageJoin(differing[0], as_one=differing == [1])
    return ImageLayout(joins=joins)
