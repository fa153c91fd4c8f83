"""Write the tables of docs/plan-a-large-run.md: estimates and simulations from benchmarks/results/, and arithmetic.

python docs/generate_plan.py            write each table between <!-- NAME --> and <!-- /NAME -->
python docs/generate_plan.py --check    exit with 1 if the page is not current
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import tables  # noqa: E402
from plan import GPUS, MODELS  # noqa: E402

from tuning.model.flops import PEAKS  # noqa: E402

PAGE, COMMAND = Path(__file__).with_name("plan-a-large-run.md"), "make docs"

# What the page assumes. Bytes and operations are per second.
MEMORY, SHARE, ERROR = 80e9, 0.9, 1.25  # of a GPU; what a step may take of it; how far the estimate may be off
OF_MACHINE = 8  # GPUs
MACHINES = 8  # of the run in the table of traffic
PEAK, MFU = PEAKS["H100"], 0.4
NVLINK = 450e9  # of an H100 in one direction: half of the 900 GB/s of the data sheet
NETWORKS = (400e9, 100e9, 12.5e9)  # all network cards of a machine together
DISK_OF_ONE, DISK_OF_ALL = 2e9, 20e9  # what one process writes, and what all processes write together
# Unexpected interruptions per GPU and day: 419 in 54 days on 16,384 GPUs (https://arxiv.org/abs/2407.21783, 3.3.4).
FAILURES = 419 / 54 / 16384
RESTART = 2700  # seconds from a failure to the next step: ddp_timeout, and 15 minutes to start

BYTES_OF_GRADIENT = {"full": 2, "lora": 4}  # as it is computed: adapters are float32

Lines = dict[int, dict[str, Any]]  # by number of GPUs


def read_plan() -> dict[tuple[str, str], Lines]:
    """The lines of benchmarks/plan.py, by model and method."""
    found: dict[tuple[str, str], Lines] = {}
    order = list(MODELS)
    for line in sorted(tables.read_newest("plan"), key=lambda line: order.index(line["model"])):
        found.setdefault((line["model"], line["method"]), {})[line["gpus"]] = line
    return found


def make_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def show(number: float) -> str:
    """Two digits, and those before the point."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def gigabytes(size: float) -> str:
    return show(size / 1e9)


def each_model(cells: Callable[[Lines], list[str]]) -> list[list[str]]:
    """A row for each model and method."""
    return [[MODELS[model][0], method, *cells(lines)] for (model, method), lines in read_plan().items()]


def ddp_memory(lines: Lines) -> int:
    """DDP exchanges a second copy of the gradients."""
    return lines[1]["peak"] + lines[1]["gradients"]


def memory() -> str:
    def cells(lines: Lines) -> list[str]:
        shown = [lines[1]["peak"], ddp_memory(lines), *(lines[gpus]["peak"] for gpus in GPUS[1:])]
        return [
            f"{lines[1]['parameters'] / 1e9:.1f}",
            *(f"**{gigabytes(size)}**" if size <= SHARE * MEMORY else gigabytes(size) for size in shown),
        ]

    heads = ["model", "method", "10⁹ parameters", "one GPU", "DDP", *(f"shard over {gpus:,}" for gpus in GPUS[1:])]
    return make_table(heads, each_model(cells))


def choose_strategy(lines: Lines, gpus: int) -> str:
    """What to set: a copy of the model for each GPU, for each machine, or for all GPUs.

    It is the first that fits even if the estimate is too low, else the first that fits. The first one sends least.
    """
    limit = SHARE * MEMORY
    candidates = [("one GPU", lines[1]["peak"])] if gpus == 1 else [("DDP", ddp_memory(lines))]
    if gpus > 1:
        candidates.append(("full shard", lines[gpus]["peak"]))
    if gpus > OF_MACHINE:
        candidates.insert(1 if lines[1]["method"] == "lora" else 2, ("hybrid", lines[OF_MACHINE]["peak"]))
    safe = [name for name, size in candidates if size <= limit / ERROR]
    tight = [f"{name}, tight" for name, size in candidates if size <= limit]
    return next(iter([*safe, *tight, "does not fit"]))


def strategy() -> str:
    heads = ["model", "method", *(f"{gpus:,} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS)]
    return make_table(heads, each_model(lambda lines: [choose_strategy(lines, gpus) for gpus in GPUS]))


def summed_bytes(line: dict[str, Any]) -> float:
    """The gradients as FSDP2 sums them: in float32, see `set_fsdp_param_dtype`."""
    return 4 * line["reduced_bytes"] / BYTES_OF_GRADIENT[line["method"]]


def shard_bytes(line: dict[str, Any]) -> float:
    """What FSDP2 sends to a GPU in a step: two all-gathers of the weights and a reduce-scatter of the gradients."""
    gpus = line["gpus"]
    return (2 * line["gathered_bytes"] + summed_bytes(line)) * (gpus - 1) / gpus


def ddp_bytes(lines: Lines, gpus: int) -> float:
    """What DDP sends to a GPU in a step: an all-reduce of the gradients."""
    return 2 * lines[1]["reduced_bytes"] * (gpus - 1) / gpus


def hybrid_seconds(lines: Lines, network: float) -> float:
    """Sharding within a machine, and then an all-reduce of the gradients, of which each GPU of a machine has a part."""
    line = lines[OF_MACHINE]
    return shard_bytes(line) / NVLINK + 2 * summed_bytes(line) * (MACHINES - 1) / MACHINES / network


def compute_seconds(line: dict[str, Any]) -> float:
    return line["flops"] / (MFU * PEAK)


def traffic() -> str:
    gpus, limit = MACHINES * OF_MACHINE, SHARE * MEMORY

    def each_network(seconds: Callable[[float], float], peak: float) -> str:
        return " / ".join(show(seconds(network)) for network in NETWORKS) if peak <= limit else ""

    def cells(lines: Lines) -> list[str]:
        shards = shard_bytes(lines[gpus])
        return [
            show(compute_seconds(lines[1])),
            gigabytes(shards),
            gigabytes(shard_bytes(lines[GPUS[-1]])),
            show(shard_bytes(lines[OF_MACHINE]) / NVLINK) if lines[OF_MACHINE]["peak"] <= limit else "",
            each_network(lambda network: shards / network, lines[gpus]["peak"]),
            each_network(lambda network: hybrid_seconds(lines, network), lines[OF_MACHINE]["peak"]),
            each_network(lambda network: ddp_bytes(lines, gpus) / network, ddp_memory(lines)),
        ]

    heads = ["model", "method", "computes, s", f"full shard, GB on {gpus} GPUs", f"GB on {GPUS[-1]:,}"]
    heads += [f"{OF_MACHINE} GPUs, s", "full shard, s", "hybrid, s", "DDP, s"]
    return make_table(heads, each_model(cells))


def tokens() -> str:
    """Tokens of a micro-batch on which a GPU computes as long as FSDP2 sends.

    A parameter takes 2 operations of a token in the forward, 2 in the backward, and 2 more if it trains. It is sent as
    2 bytes in the forward, 2 in the backward, and 4 if it trains.
    """
    rates = [("NVLink, 450 GB/s", NVLINK), *((f"network, {rate / 1e9:g} GB/s", rate) for rate in NETWORKS)]

    def cells(sent: int, operations: int) -> list[str]:
        return [f"{round(sent / operations * MFU * PEAK / rate, -2):,.0f}" for _, rate in rates]

    rows = [["full", *cells(8, 6)], ["lora", *cells(4, 4)]]
    return make_table(["method", *(name for name, _ in rates)], rows)


def checkpoint_bytes(line: dict[str, Any], *, sharded: bool) -> float:
    """The model and what `optimizer.pt` or `optimizer_0` has.

    Two float32 averages for each trained number. A float32 master of each 16-bit one: among them, or as the sharded
    model itself. An adapter is float32 itself, and is saved without the base.
    """
    trained, frozen = line["trained"], line["parameters"] - line["trained"]
    if line["method"] == "lora":
        return (4 + 8) * trained
    return (4 + 8) * trained + 2 * frozen if sharded else (2 + 4 + 8) * trained + 2 * frozen


def start_bytes(line: dict[str, Any]) -> float:
    """Main memory of the first process of each machine, which reads the model: trained weights become float32."""
    return 4 * line["trained"] + 2 * (line["parameters"] - line["trained"])


def checkpoints() -> str:
    def cells(lines: Lines) -> list[str]:
        line = lines[1]
        whole, shards = (checkpoint_bytes(line, sharded=sharded) for sharded in (False, True))
        sharded = [gigabytes(shards), show(shards / DISK_OF_ALL)] if line["method"] == "full" else ["", ""]
        written = [gigabytes(whole), show(whole / DISK_OF_ONE), gigabytes(12 * line["trained"])]
        return [*written, *sharded, gigabytes(start_bytes(line))]

    heads = ["model", "method", "whole, GB", "s at 2 GB/s", "GB in rank 0", "sharded, GB", "s at 20 GB/s"]
    return make_table([*heads, "GB at the start"], each_model(cells))


def failures() -> str:
    shards = checkpoint_bytes(read_plan()["qwen_72b", "full"][1], sharded=True)
    save = shards / DISK_OF_ALL

    def cells(gpus: int) -> list[str]:
        between = 86400 / FAILURES / gpus
        interval = (2 * save * between) ** 0.5
        lost = save / interval + (interval / 2 + RESTART) / between
        return [f"{gpus:,}", show(between / 3600), show(7 * 86400 / between), show(interval / 60), f"{lost:.1%}"]

    heads = ["GPUs", "hours between failures", "failures in a week", "minutes between checkpoints", "time lost"]
    return make_table(heads, map(cells, GPUS[1:]))


def balance() -> str:
    found: dict[tuple[str, str], dict[int, str]] = {}
    for line in tables.read_newest("balance"):
        found.setdefault((line["batches"], line["mixture"]), {})[line["ranks"]] = f"{line['ours']:.2f}"
    rows = [[*key, *(by_ranks.get(gpus, "") for gpus in GPUS[1:])] for key, by_ranks in sorted(found.items())]
    rows.sort(key=lambda row: ("tokens", "grouped", "rows").index(row[0]))
    return make_table(["batches", "rows of", *(f"{gpus:,} GPUs" for gpus in GPUS[1:])], rows)


TABLES = {maker.__name__: maker for maker in (strategy, memory, traffic, tokens, checkpoints, failures, balance)}


def render(page: str) -> str:
    """The page with every marked table filled in."""

    def fill(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(rf"(<!-- ({'|'.join(TABLES)}) -->).*?(<!-- /\2 -->)", fill, page, flags=re.DOTALL)


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        print(f"{PAGE.name} is current." if render(page) == page else f"{PAGE.name} is not current. Run: {COMMAND}")
        return 0 if render(page) == page else 1
    PAGE.write_text(render(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
