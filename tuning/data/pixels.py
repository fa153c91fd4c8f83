"""transformers' image processors with the same results, bit by bit, in less time."""

import functools
from typing import Any

import numpy as np

BACKENDS = "transformers.image_processing_backends"  # whose steps are known; a processor with its own keeps them


def patch_image_processor(image_processor: Any) -> Any:
    """A copy of an image processor whose slow steps on NumPy arrays are done otherwise.

    Steps on tensors (with torchvision installed) are quick as they are.
    """
    kind: Any = type(image_processor)
    return image_processor if hasattr(kind, "stock_kind") else _as_kind(image_processor, _quick_kind(kind))


@functools.cache
def _quick_kind(kind: Any) -> type:
    steps = {"resize": _resize, "rescale": _rescale, "normalize": _normalize}
    known = {
        name: step for name, step in steps.items() if getattr(getattr(kind, name, None), "__module__", "") == BACKENDS
    }
    return type(kind.__name__, (kind,), {**known, "stock_kind": kind, "__reduce__": _reduce})


def _as_kind(image_processor: Any, kind: type) -> Any:
    made: Any = object.__new__(kind)
    made.__dict__.update(image_processor.__dict__)
    return made


def _reduce(self: Any) -> tuple:
    """Workers that are not forked get the stock one and make this of it: a class made here has no address."""
    return patch_image_processor, (_as_kind(self, self.stock_kind),)


def _resize(self: Any, image: Any, size: Any, *args: Any, **options: Any) -> Any:
    """Pillow copies an image that has its size already (tiles do), after two conversions: it may as well stay."""
    wanted = getattr(size, "height", None), getattr(size, "width", None)
    if _is_bytes(image) and wanted == image.shape[1:]:
        return image
    return self.stock_kind.resize(self, image, size, *args, **options)


def _rescale(self: Any, image: Any, scale: float, *args: Any, **options: Any) -> Any:
    """A byte has 256 values: each is rescaled once, by the stock step, and looked up."""
    rescale = functools.partial(self.stock_kind.rescale, self)
    if not _is_bytes(image):
        return rescale(image, scale, *args, **options)
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    return rescale(every, scale, *args, **options).ravel().take(image)


def _normalize(self: Any, image: Any, mean: Any, std: Any, *args: Any, **options: Any) -> Any:
    """(image − mean) / std along rows of memory; the stock step walks across them."""
    is_float = isinstance(image, np.ndarray) and image.dtype == np.float32 and image.ndim == 3
    if not (is_float and image.shape[:1] == np.shape(mean) == np.shape(std) == (3,)):
        return self.stock_kind.normalize(self, image, mean, std, *args, **options)
    centred = image - np.array(mean, image.dtype)[:, None, None]
    centred /= np.array(std, image.dtype)[:, None, None]
    return centred


def _is_bytes(image: Any) -> bool:
    return isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] == 3
