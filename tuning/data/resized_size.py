"""How large an image processor makes a picture, without processing each one."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tuning.errors import UserError

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

    def __call__(self, size: Size) -> Size:
        """Raises `UserError` where the processor refuses the size, or does not keep a picture in one piece."""
        if size not in self._known:
            find = self._formula or self._process
            try:
                self._known[size] = find(size)
            except ValueError as error:
                raise UserError(
                    problem=f"the image processor cannot resize {size[0]}×{size[1]} pixels: {error}.",
                    fix="Change the picture, or drop the row.",
                    kind="image cannot be resized",
                ) from error
        return self._known[size]

    @functools.cached_property
    def _formula(self) -> Callable[[Size], Size] | None:
        smart_resize = getattr(sys.modules[type(self.image_processor).__module__], "smart_resize", None)
        if smart_resize is None or not self.image_processor.do_resize:
            return None
        if list(inspect.signature(smart_resize).parameters) != SMART_RESIZE:
            return None
        processor, size = self.image_processor, dict(self.image_processor.size)
        factor = processor.patch_size * processor.merge_size

        def formula(picture: Size) -> Size:
            width, height = picture
            made = smart_resize(height, width, factor, size.get("shortest_edge"), size.get("longest_edge"))
            return made[1], made[0]

        return formula if all(formula(picture) == self._process(picture) for picture in COMPARED_SIZES) else None

    def _process(self, picture: Size) -> Size:
        processor = self.image_processor
        made = processor(Image.new("RGB", picture), return_tensors="np", do_rescale=False, do_normalize=False)
        if "image_grid_thw" in made:
            _, rows, columns = made["image_grid_thw"][0].tolist()
            return columns * processor.patch_size, rows * processor.patch_size
        shape = np.shape(made["pixel_values"])
        whole = not getattr(processor, "do_center_crop", None) and not getattr(processor, "do_pad", None)
        if len(shape) != 4 or shape[0] != 1 or not whole:
            raise UserError(
                problem=f"{type(processor).__name__} crops, pads or splits pictures, so that boxes cannot be written in"
                " pixels of the resized one.",
                fix="Set bbox_format to another format.",
                kind="no bbox_format",
            )
        return shape[3], shape[2]
