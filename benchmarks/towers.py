"""Measure how long vision towers that keep pictures apart take: ours, and the stock tower of transformers.

    python benchmarks/towers.py [--family qwen2_5_vl qwen3_vl glm4v] [--rounds 3]

The towers have the published widths and four layers, random weights in float32, and two pictures. Both kinds take turns
in one process: forward without a graph, as a frozen tower runs, and forward and backward, as a tower that trains. Their
outputs must be equal (relative 1e-4), or nothing is reported. Seconds are medians of the rounds after the first.
`sdpa_calls` are the attention calls of one forward.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from record import describe_environment, median, print0, print_line

LAYERS = 4
SIZES = [(504, 672), (364, 364)]  # height and width, in pixels
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [LAYERS - 1],
    },
    "qwen3_vl": {
        "hidden_size": 1152,
        "num_heads": 16,
        "intermediate_size": 4304,
        "patch_size": 16,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [1],
    },
    "glm4v": {"hidden_size": 1536, "num_heads": 12, "intermediate_size": 13696, "out_hidden_size": 4096},
}
"""Family → the settings of its tower's configuration, as published but for the number of layers."""


def make_tower(family: str) -> Any:
    """A tower in evaluation mode, with SDPA."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(family)
    for name, value in {"depth": LAYERS, **FAMILIES[family]}.items():
        setattr(config.vision_config, name, value)
    with torch.device("meta"):
        kind = type(AutoModelForImageTextToText.from_config(config).model.visual)
    config.vision_config._attn_implementation = "sdpa"
    return kind(config.vision_config).eval()


def make_pictures(tower: Any) -> dict[str, Any]:
    """The patches of two pictures, and their grids."""
    import torch

    size = tower.config.patch_size
    grid = torch.tensor([[1, height // size // 2 * 2, width // size // 2 * 2] for height, width in SIZES])
    patches = torch.rand(int(grid.prod(dim=1).sum()), 3 * tower.config.temporal_patch_size * size**2)
    return {"hidden_states": patches, "grid_thw": grid}


def run(tower: Any, pictures: dict[str, Any], *, trains: bool) -> tuple[float, Any]:
    """Seconds of one pass, and its output."""
    import torch

    start = time.perf_counter()
    with torch.set_grad_enabled(trains):
        output = tower(**pictures).pooler_output
        if trains:
            output.sum().backward()
    return time.perf_counter() - start, output.detach()


def count_attention(tower: Any, pictures: dict[str, Any]) -> int:
    """How often a forward calls SDPA."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += "scaled_dot_product" in str(func)
            return func(*args, **(kwargs or {}))

    with Counter() as counter, torch.no_grad():
        tower(**pictures)
    return counter.calls


def measure_family(family: str, rounds: int, environment: dict[str, Any]) -> None:
    import copy

    import torch

    from tuning.model.patch_embedding import patch_patch_embeddings
    from tuning.model.tower_attention import TOWER, set_attention

    stock = make_tower(family)
    ours = copy.deepcopy(stock)
    patch_patch_embeddings(ours)
    set_attention([ours.config], TOWER)
    pictures, towers = make_pictures(stock), {"stock": stock, "ours": ours}
    calls = {name: count_attention(tower, pictures) for name, tower in towers.items()}
    for trains in (False, True):
        print0(f"{family}: {'forward and backward' if trains else 'forward'} …")
        seconds: dict[str, list[float]] = {"stock": [], "ours": []}
        outputs = {}
        for _ in range(rounds + 1):
            for name, tower in towers.items():
                taken, outputs[name] = run(tower, pictures, trains=trains)
                seconds[name].append(taken)
        apart = ((outputs["ours"] - outputs["stock"]).norm() / outputs["stock"].norm()).item()
        if not apart <= 1e-4:
            raise SystemExit(f"{family}: the outputs differ by {apart:.1g} of their norm.")
        times = {name: median(values[1:]) for name, values in seconds.items()}
        print_line(
            "towers",
            environment,
            family=family,
            tower="trains" if trains else "frozen",
            patches=len(pictures["hidden_states"]),
            stock_seconds=round(times["stock"], 3),
            seconds=round(times["ours"], 3),
            against_stock=round(times["stock"] / times["ours"], 2),
            stock_sdpa_calls=calls["stock"],
            sdpa_calls=calls["ours"],
            threads=torch.get_num_threads(),
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    environment = describe_environment()
    for family in arguments.family:
        measure_family(family, arguments.rounds, environment)


if __name__ == "__main__":
    main()
