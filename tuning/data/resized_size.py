"""How large an image processor makes a picture: at the end, and at most on the way."""

import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tuning.errors import UserError, try_optional

PROBES = (8, 64), (4, 128)  # of equal area: if the second becomes larger, the reason is that it is thinner
GROWTH = 3  # the second is 4 times as thin as the first
COMPARED_SIZES = ((640, 480), (333, 1000), (50, 40))
SMART_RESIZE = ["height", "width", "factor", "min_pixels", "max_pixels"]
Size = tuple[int, int]
"""Width and height."""


class ResizedSize:
    """The size that an image processor gives a picture of (width, height).

    It comes from the processor's own `smart_resize` where that agrees with what the processor does, or from processing
    a blank picture of that size, once for each size.
    """

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor
        self._known: dict[Size, Size] = {}

    def __call__(self, size: Size, where: str = "") -> Size:
        """Raises `UserError`, naming `where`, if the processor refuses the size or does not keep a picture whole."""
        if size not in self._known:
            try:
                made = self._formula(size) if self._has_formula else self._process(size)
            except ValueError as error:
                raise UserError(
                    where=where,
                    problem=f"the image processor cannot resize {size[0]}×{size[1]} pixels: {error}.",
                    fix="Change the picture, or drop the row.",
                    kind="image cannot be resized",
                ) from error
            if made is None:
                raise UserError(
                    where=where,
                    problem=f"{type(self.image_processor).__name__} crops, pads or splits pictures. Boxes cannot be"
                    " written in pixels of the resized one.",
                    fix="Set bbox_format to another format.",
                    kind="no bbox_format",
                )
            self._known[size] = made
        return self._known[size]

    @functools.cached_property
    def _has_formula(self) -> bool:
        if self._smart_resize is None or not self.image_processor.do_resize:
            return False
        if list(inspect.signature(self._smart_resize).parameters) != SMART_RESIZE:
            return False
        return all(self._formula(picture) == self._process(picture) for picture in COMPARED_SIZES)

    @property
    def _smart_resize(self) -> Callable | None:
        return getattr(sys.modules[type(self.image_processor).__module__], "smart_resize", None)

    def _formula(self, picture: Size) -> Size:
        processor, (width, height) = self.image_processor, picture
        limits = [processor.size.get(name) for name in ("shortest_edge", "longest_edge")]
        assert self._smart_resize is not None
        made = self._smart_resize(height, width, processor.patch_size * processor.merge_size, *limits)
        return made[1], made[0]

    def _process(self, picture: Size) -> Size | None:
        """The size of a processed picture. None where the processor makes several pictures of it, or crops or pads."""
        processor = self.image_processor
        made = processor(Image.new("RGB", picture), return_tensors="np", do_rescale=False, do_normalize=False)
        if "image_grid_thw" in made:
            _, rows, columns = made["image_grid_thw"][0].tolist()
            return columns * processor.patch_size, rows * processor.patch_size
        shape = np.shape(made["pixel_values"])
        is_cut = getattr(processor, "do_center_crop", None) or getattr(processor, "do_pad", None)
        return None if len(shape) != 4 or shape[0] != 1 or is_cut else (shape[3], shape[2])


def find_short_edge(image_processor: Any) -> int | None:
    """The length to which a processor resizes the short side of a picture, however long the other side becomes.

    CLIP's does so with `size` {"shortest_edge": 336}: 1×4000 pixels become 336×1,344,000 before it crops them. None
    where the resized picture has a limit. We find out by trying: processors read `size` in many ways.
    """
    tried = try_optional(lambda: [_largest_resized(image_processor, size) for size in PROBES])
    if not tried.value:
        return None
    first, thinner = tried.value
    width, height = PROBES[0]
    return round(math.sqrt(first * width / height)) if first and thinner > GROWTH * first else None


def _largest_resized(image_processor: Any, size: tuple[int, int]) -> int:
    """The most pixels that `image_processor` resizes a blank picture to."""
    found = [0]

    class Recording(type(image_processor)):  # type: ignore[misc]
        def resize(self, *args: Any, **options: Any) -> Any:
            resized = super().resize(*args, **options)
            found.append(math.prod(resized.shape[-2:]))
            return resized

    recording: Any = object.__new__(Recording)
    recording.__dict__.update(vars(image_processor))
    recording(Image.new("RGB", size), return_tensors="pt")
    return max(found)
