"""Measure seconds, tokens per second and peak memory of a step: ours, TRL's `SFTTrainer` and the stock `Trainer`.

    python benchmarks/step.py [--layout granite_vision] [--size 20m] [--method full lora] [--peers trl stock]

All use the same model, rows and supervised tokens. Their losses in the first step must be equal (relative 1e-5), or
nothing is reported. With the larger models, ours must be padding-free, and also runs with padded batches and with
`gradient_checkpointing`. The contenders run one after the other, each in its own process. Seconds are the median of the
steps after the first. Memory is the most that the process held resident. Prints a JSON line for each contender.

The stock forward of Granite Vision leaves out `logits_scaling`. Its loss is compared with that of one extra step of
ours, on the same weights with `logits_scaling` 1.

The smallest run: python benchmarks/step.py --layout llava15 --size tests --method lora --steps 2 --peers
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import TRL_VERSION, install_trl
from record import describe_environment, median, print0, print_line, run_child
from workloads import LAYOUTS, is_large, save_model, write_benchmark_rows

LORA = {
    "peft_method": "lora",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SAME_LOSS, BATCH = 1e-5, 4
OWN_VARIANTS = {
    "ours, padded": {"padding_free": False},
    "ours, gradient_checkpointing": {"gradient_checkpointing": True},
}


def measure_layout(arguments: argparse.Namespace, layout: str, method: str, folder: Path, environment: dict) -> None:
    size = arguments.size or ("20m" if is_large(layout) else "tests")
    large = size == "20m"
    steps = arguments.steps or (3 if large else 12)
    model = save_model(folder / "model", layout, size)
    rows = write_benchmark_rows(folder / "rows" / "rows.jsonl", layout, size)
    count = len(rows.read_text().splitlines())
    spec = make_spec(model, rows, method, steps=steps, output=folder / "ours", batch_size=count)
    spec["threads"] = None if large else 1  # with models this small, more threads only wait for each other
    spec["options"] = {**spec["options"], **({"padding_free": True} if is_large(layout) else {})}
    print0(f"{layout} {size} {method}: ours …")
    results = {"ours": run_child("contender.py", {**spec, "contender": "ours"}, folder)}
    for name, changes in OWN_VARIANTS.items() if large else ():
        print0(f"{layout} {size} {method}: {name} …")
        variant = {**spec, "contender": "ours", "output": str(folder / name)}
        results[name] = run_child("contender.py", {**variant, "options": {**spec["options"], **changes}}, folder)
        check_equal(results["ours"], results[name], name)
    for peer in arguments.peers:
        peer_spec = {**spec, "contender": peer, "output": str(folder / peer), "options": {}}
        if method == "lora":
            peer_spec["adapter"] = spec["output"]
        expected = results["ours"]
        if peer == "stock" and layout == "granite_vision":
            plain = save_model(folder / "plain", layout, size, logits_scaling=1.0)
            once = make_spec(plain, rows, method, steps=1, output=folder / "plain_out")
            expected = run_child("contender.py", {**once, "contender": "ours"}, folder)
        print0(f"{layout} {size} {method}: {peer} …")
        paths = (install_trl(),) if peer == "trl" else ()
        results[peer] = run_child("contender.py", peer_spec, folder, paths=paths)
        check_equal(expected, results[peer], peer)
    for contender, result in results.items():
        print_line(
            "step",
            environment,
            layout=layout,
            size=size,
            method=method,
            contender=contender,
            **({"version": TRL_VERSION} if contender == "trl" else {}),
            **figures_of(result),
            rows=count,
        )


def make_spec(
    model: Path, rows: Path, method: str, *, steps: int, output: Path, batch_size: int = BATCH
) -> dict[str, Any]:
    """The spec for `contender.py`: `steps` optimizer steps of `batch_size` rows, in float32, without checkpointing."""
    training = {
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "num_train_epochs": steps,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
    }
    return {
        "model": str(model),
        "rows": str(rows),
        "output": str(output),
        "dtype": "float32",
        "training": training,
        "options": LORA if method == "lora" else {},
    }


def check_equal(ours: dict[str, Any], theirs: dict[str, Any], peer: str, tolerance: float = SAME_LOSS) -> None:
    """Raises `SystemExit` where the two differ in their tokens, supervised tokens or first loss."""
    check_counts(ours, theirs, peer)
    if not math.isclose(ours["losses"][0], theirs["losses"][0], rel_tol=tolerance):
        raise SystemExit(f"{peer}'s loss is {theirs['losses'][0]:.8f}, ours is {ours['losses'][0]:.8f}.")


def check_counts(ours: dict[str, Any], theirs: dict[str, Any], peer: str) -> None:
    for name in ("tokens", "supervised_tokens"):
        if ours[name] != theirs[name]:
            raise SystemExit(f"{peer} has {theirs[name]} {name}, ours has {ours[name]}: they cannot be compared.")


def figures_of(result: dict[str, Any]) -> dict[str, Any]:
    """The values of a contender's line; the first step is a warm-up and does not count."""
    seconds = median(result["step_seconds"][1:] or result["step_seconds"])
    return {
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": round(result["tokens"] / seconds, 1),
        "peak_memory_gb": round(result["peak_rss_bytes"] / 1e9, 3),
        "first_loss": round(result["losses"][0], 7),
        "tokens": result["tokens"],
        "supervised_tokens": result["supervised_tokens"],
        "steps_measured": max(1, len(result["step_seconds"]) - 1),
        "threads": result["threads"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--size", choices=["tests", "20m"], help="default: 20m for granite_vision and llava15, else tests"
    )
    parser.add_argument("--method", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--peers", nargs="*", choices=["trl", "stock"], default=["trl", "stock"])
    parser.add_argument("--steps", type=int, help="the first does not count; default: 3, or 12 for small models")
    arguments = parser.parse_args(argv)
    environment = describe_environment()
    for layout in arguments.layout:
        for method in arguments.method:
            with tempfile.TemporaryDirectory() as folder:
                measure_layout(arguments, layout, method, Path(folder), environment)


if __name__ == "__main__":
    main()
