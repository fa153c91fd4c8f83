"""How large an image processor makes a picture, which may be far larger than the picture is stored."""

import math
from typing import Any

from PIL import Image

from tuning.errors import try_optional

PROBES = (8, 64), (4, 128)  # of equal area: if the second becomes larger, the reason is that it is thinner
GROWTH = 3  # the second is 4 times as thin as the first


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
