"""Measure how long an image processor takes for a photo: on tensors, with torchvision, and on arrays, with Pillow.

    python benchmarks/pictures.py [--rounds 15]

The photo is a JPEG of 1024×768 pixels. Its decoding is part of the time. The settings are the published ones of each
family. Both kinds take turns in one process, on one thread, as many as a DataLoader worker has. The time is the median.
Both must make tensors of the same shape, so that a row has the same image tokens.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence

import numpy as np
from record import describe_environment, median, print_line

import tuning  # makes torchvision importable  # noqa: F401

TILES = [[384, 384 * n] for n in range(1, 5)] + [[384 * n, 384] for n in range(2, 5)] + [[768, 768]]
FAMILIES = {
    "granite_vision": ("LlavaNextImageProcessor", {"size": 384, "crop_size": 384, "image_grid_pinpoints": TILES}),
    "llava15": ("CLIPImageProcessor", {"size": {"shortest_edge": 336}, "crop_size": 336}),
    "mllama": ("MllamaImageProcessor", {"size": 560, "max_image_tiles": 4}),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", {}),
    "gemma3": ("Gemma3ImageProcessor", {"size": 896}),
    "smolvlm": (
        "Idefics3ImageProcessor",
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    ),
    "internvl": ("GotOcr2ImageProcessor", {"size": 448, "crop_to_patches": True, "max_patches": 12}),
}
"""Family → its image processor and the settings of its published checkpoint. A number is a square."""


def make_photo(size: tuple[int, int]) -> bytes:
    """A JPEG with soft shapes, as a photo has."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_processor(name: str, settings: dict, *, tensors: bool) -> Callable:
    import transformers

    square = {"size", "crop_size"}
    values = {
        key: {"height": value, "width": value} if key in square and isinstance(value, int) else value
        for key, value in settings.items()
    }
    return getattr(transformers, name if tensors else f"{name}Pil")(**values)


def measure_family(family: str, photo: bytes, rounds: int) -> dict[str, float]:
    """Milliseconds a photo takes, by kind."""
    from PIL import Image

    name, settings = FAMILIES[family]
    kinds = {
        "tensors": make_processor(name, settings, tensors=True),
        "Pillow": make_processor(name, settings, tensors=False),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    shapes = set()
    for _ in range(rounds + 1):
        for kind, process in kinds.items():
            start = time.perf_counter()
            made = process([Image.open(io.BytesIO(photo)).convert("RGB")], return_tensors="pt")
            seconds[kind].append(time.perf_counter() - start)
            shapes.add(tuple(made["pixel_values"].shape))
    assert len(shapes) == 1, f"{family}: the processors disagree: {shapes}"
    return {kind: 1e3 * median(values[1:]) for kind, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    arguments = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    environment, photo = describe_environment(), make_photo((1024, 768))
    for family in arguments.family:
        times = measure_family(family, photo, arguments.rounds)
        print_line(
            "pictures",
            environment,
            family=family,
            tensors_ms=round(times["tensors"], 1),
            pillow_ms=round(times["Pillow"], 1),
            against_pillow=round(times["Pillow"] / times["tensors"], 2),
        )


if __name__ == "__main__":
    main()
