"""Measure tokens per second, MFU and peak memory of published model sizes on a GPU: ours and TRL's `SFTTrainer`.

    python benchmarks/gpu.py [--run granite_full granite_full_float32 granite_lora llava_lora] [--checkpointing on off]

The models have random bfloat16 weights in the shapes of Granite Vision 3.2 2B and LLaVA-1.5 7B. They are made here;
nothing but TRL is downloaded. A batch has four rows, with images of 2 to 4 thousand tokens for Granite and of 576 for
LLaVA. A run has twelve steps, of which the first three do not count. Both sides use bfloat16 weights and autocast
(`granite_full_float32`: float32 master weights), fused AdamW, four DataLoader workers, the same gradient checkpointing
and LoRA on the same layers. TRL runs as its documentation shows for images: `max_length=None`, only answers trained,
its fused head. It does not support packing and padding-free batches with images. Its first loss must equal ours within
2 %, as rounding differs in bfloat16.

MFU is model FLOPs ÷ (seconds · peak FLOP/s of the card in dense bfloat16). `tuning/model/flops.py` explains the count.
Peak memory is what PyTorch had allocated. A run that does not fit gives a line with `failed`. With `--tiny`,
everything runs with tiny models on a CPU. That also makes the folder `benchmarks/.peers/`, which a machine without a
network needs.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flops import RowShape, count_step
from peers import TRL_VERSION, install_trl
from record import ChildFailed, describe_environment, median, print0, print_line, run_child
from step import LORA, check_equal
from workloads import LARGE_PICTURES, SMALL_PICTURES, save_model, write_rows

from tuning.model.flops import peak_of, utilisation

# Run → layout, size, method, and whether 16-bit weights have float32 master weights.
RUNS = {
    "granite_full": ("granite_vision", "2b", "full", False),
    "granite_full_float32": ("granite_vision", "2b", "full", True),
    "granite_lora": ("granite_vision", "2b", "lora", False),
    "llava_lora": ("llava15", "7b", "lora", False),
}
BATCH, WARM_UP = 4, 3
SAME_LOSS = 0.02


def make_spec(arguments: argparse.Namespace, model: Path, rows: Path, name: str, checkpointing: bool, output: Path):
    """The spec for `contender.py`. Master weights are an option of ours; TRL has float32 weights under autocast."""
    _, _, method, master_weights = RUNS[name]
    training = {
        "per_device_train_batch_size": BATCH,
        "max_steps": arguments.steps,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": True,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": checkpointing,
        "dataloader_num_workers": 0 if arguments.tiny else 4,
        **({"use_cpu": True} if arguments.tiny else {}),
    }
    return {
        "model": str(model),
        "rows": str(rows),
        "output": str(output),
        "dtype": "float32" if master_weights else "bfloat16",
        "training": training,
        "options": {"dtype": "bfloat16", **(LORA if method == "lora" else {"keep_master_weights": master_weights})},
        "threads": 1 if arguments.tiny else None,
    }


def compare(arguments: argparse.Namespace, name: str, folder: Path, model: Path) -> Iterator[dict[str, Any]]:
    """The lines of one run. Ours comes first, because the other uses its adapter configuration."""
    layout, _, method, _ = RUNS[name]
    sizes = itertools.islice(itertools.cycle(_pictures(arguments)), BATCH * arguments.steps)
    rows = write_rows(folder / "rows" / "rows.jsonl", sizes, words=[150], answer_words=[40])
    for checkpointing in arguments.checkpointing:
        ours = None
        for contender in ("ours", *arguments.peers):
            print0(f"{name}, checkpointing {checkpointing}: {contender} …")
            output = folder / f"{contender}_{checkpointing}"
            spec = make_spec(arguments, model, rows, name, checkpointing == "on", output)
            paths: tuple[Path, ...] = ()
            if contender == "trl":
                paths, spec["options"] = (install_trl(),), {}
                if method == "lora":
                    spec["adapter"] = str(folder / f"ours_{checkpointing}")
            line = {"run": name, "layout": layout, "method": method, "checkpointing": checkpointing}
            line |= {"contender": contender} | ({"version": TRL_VERSION} if contender == "trl" else {})
            try:
                result = run_child("contender.py", {**spec, "contender": contender}, folder, paths=paths)
                if ours:
                    check_equal(ours, result, contender, SAME_LOSS)
            except (ChildFailed, SystemExit) as failure:
                yield {**line, "failed": str(failure).strip().splitlines()[-1][:200]}
                continue
            ours = ours or result
            yield {**line, **figures_of(arguments, result, model, method)}


def _pictures(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    return SMALL_PICTURES if arguments.tiny else LARGE_PICTURES


def figures_of(arguments: argparse.Namespace, result: dict[str, Any], model: Path, method: str) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig

    seconds = median(result["step_seconds"][min(WARM_UP, arguments.steps - 1) :])
    shapes = read_shapes(model, _pictures(arguments)[:BATCH], result["tokens"])
    adapter = {"rank": LORA["r"], "adapted": LORA["target_modules"]} if method == "lora" else {}
    operations = count_step(AutoConfig.from_pretrained(model), shapes, result["supervised_tokens"], **adapter)["total"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    share = utilisation(operations, seconds, arguments.peak_flops or peak_of(device))
    return {
        "device": device,
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": round(result["tokens"] / seconds, 1),
        "mfu": round(share, 4) if share else None,
        "model_flops": operations,
        "peak_memory_gb": round((result.get("peak_cuda_bytes") or result["peak_rss_bytes"]) / 1e9, 2),
        "first_loss": result["losses"][0],
        "last_loss": result["losses"][-1],
        "tokens": result["tokens"],
        "supervised_tokens": result["supervised_tokens"],
        "rows": BATCH,
        "steps": arguments.steps,
    }


def read_shapes(model: Path, sizes: list[tuple[int, int]], tokens: int) -> list[RowShape]:
    """The tokens and tiles of a batch's rows. The texts are equally long, so they share `tokens` minus image tokens."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    pairs = []
    for size in sizes:
        image = Image.new("RGB", size)
        batch = processor(text=processor.image_token, images=image, return_tensors="pt")
        pairs.append((batch["input_ids"].numel(), batch["pixel_values"].flatten(0, -4).shape[0]))
    text = (tokens - sum(pair[0] for pair in pairs)) / len(pairs)
    return [RowShape(round(image_tokens + text), tiles) for image_tokens, tiles in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--peers", nargs="*", choices=["trl"], default=["trl"])
    parser.add_argument("--checkpointing", nargs="+", choices=["on", "off"], default=["on"])
    parser.add_argument("--steps", type=int, default=12, help="default: 12")
    parser.add_argument("--peak-flops", type=float, help="dense bfloat16 peak of a card that we do not know")
    parser.add_argument("--tiny", action="store_true", help="use tiny models, on a CPU")
    arguments = parser.parse_args(argv)
    environment = describe_environment()
    made: tuple[str, str] | None = None
    with tempfile.TemporaryDirectory() as models:
        for name in arguments.run:
            layout, size, *_ = RUNS[name]
            model = Path(models, layout)
            if made != (layout, size):
                print0(f"making {layout} {size} …")
                save_model(
                    model,
                    layout,
                    "tiny" if arguments.tiny else size,
                    dtype="bfloat16",
                    device="cpu" if arguments.tiny else "cuda",
                )
                made = (layout, size)
            with tempfile.TemporaryDirectory() as folder:
                for line in compare(arguments, name, Path(folder), model):
                    print_line("gpu", environment, **line)


if __name__ == "__main__":
    main()
