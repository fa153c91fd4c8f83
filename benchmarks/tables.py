"""Write the tables of docs/performance.md from the newest lines of benchmarks/results/.

python benchmarks/tables.py            writes each table between <!-- NAME --> and <!-- /NAME -->
python benchmarks/tables.py --check    fails where a table differs from the results
"""

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from typing import Any

from record import ROOT

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"

# By benchmark: the fields that identify a kind of line. Below, its columns: heading → field.
KEYS = {
    "step": ("layout", "size", "method", "contender"),
    "start": ("rows",),
    "encode": ("layout", "contender"),
    "memory": ("contender", "trained", "vocabulary", "tokens_per_row"),
    "gpu": ("run", "checkpointing", "contender", "device"),
    "check_speed": ("rows",),
    "pictures": ("family",),
    "balance": ("mixture", "batches", "ranks"),
    "towers": ("family", "tower"),
    "plan": ("model", "method", "gpus"),
}
COLUMNS = {
    "step": {
        "layout": "layout",
        "size": "size",
        "method": "method",
        "": "contender",
        "s/step": "seconds_per_step",
        "tokens/s": "tokens_per_second",
        "peak GB": "peak_memory_gb",
        "first loss": "first_loss",
        "threads": "threads",
    },
    "start": {
        "rows": "rows",
        "s to first step": "seconds_to_first_step",
        "× smallest": "seconds_to_first_step_against_smallest",
        "without imports, s": "seconds_after_imports",
        "× smallest, without imports": "seconds_after_imports_against_smallest",
        "conversion once, s": "conversion_seconds",
    },
    "encode": {
        "layout": "layout",
        "": "contender",
        "rows/s": "rows_per_second",
        "× TRL": "against_trl",
        "tokens a row": "tokens_per_row",
    },
    "memory": {
        "": "contender",
        "trained": "trained",
        "vocabulary": "vocabulary",
        "tokens a row": "tokens_per_row",
        "peak GB": "peak_memory_gb",
        "beyond weights, GB": "beyond_weights_gb",
    },
    "gpu": {
        "run": "run",
        "checkpointing": "checkpointing",
        "": "contender",
        "device": "device",
        "s/step": "seconds_per_step",
        "tokens/s": "tokens_per_second",
        "MFU": "mfu",
        "peak GB": "peak_memory_gb",
        "failed": "failed",
    },
    "check_speed": {"rows": "rows", "rows/s": "rows_per_second"},
    "pictures": {
        "family": "family",
        "on tensors, ms": "tensors_ms",
        "on arrays, ms": "pillow_ms",
        "× faster": "against_pillow",
    },
    "balance": {
        "mixture": "mixture",
        "batches": "batches",
        "processes": "ranks",
        "ours": "ours",
        "by chance": "random",
        "our worst step": "worst",
        "at least": "least",
    },
    "towers": {
        "family": "family",
        "tower": "tower",
        "patches": "patches",
        "stock, s": "stock_seconds",
        "ours, s": "seconds",
        "× faster": "against_stock",
        "stock calls of SDPA": "stock_sdpa_calls",
        "our calls": "sdpa_calls",
        "threads": "threads",
    },
}
AGAINST = {"trl": "TRL", "stock": "stock", "ours, padded": "padded"}  # contender → its name in the table of ratios
ORIGIN = ("commit", "cores", "load", "torch", "transformers")


def read_newest(benchmark: str) -> list[dict[str, Any]]:
    """The last line of each kind, ordered by the first line of each kind."""
    file = RESULTS / f"{benchmark}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return list({tuple(line.get(key) for key in KEYS[benchmark]): line for line in lines}.values())


def make_table(benchmark: str) -> str:
    if benchmark == "step_ratios":
        return make_ratios(read_newest("step"))
    lines, columns = read_newest(benchmark), COLUMNS[benchmark]
    if not lines:
        return "Not measured yet."
    shown = {heading: field for heading, field in columns.items() if any(line.get(field) is not None for line in lines)}
    rows = [list(shown), ["---"] * len(shown)]
    rows += [[_show(line.get(field)) for field in shown.values()] for line in lines]
    origins = dict.fromkeys(", ".join(f"{name} {line.get(name, '?')}" for name in ORIGIN) for line in lines)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\nMeasured at: " + "; ".join(origins) + "."


def make_ratios(lines: Sequence[dict[str, Any]]) -> str:
    """By layout and method, ours against the others: how many times as fast, and what share of the memory."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line["size"] == "20m":
            found.setdefault((line["method"], line["layout"]), {})[line["contender"]] = line
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        ratios = {layout: _ratios(found[of, layout]) for of, layout in found if of == method}
        rows += [[layout, method, *map(_show, values)] for layout, values in ratios.items()]
        columns = [[value for value in column if value is not None] for column in zip(*ratios.values(), strict=True)]
        means = [round(statistics.geometric_mean(column), 2) if column else None for column in columns]
        rows.append([f"**geometric mean of {len(ratios)}**", method, *map(_show, means)])
    heads = [head for name in AGAINST.values() for head in (f"× speed of {name}", f"memory ÷ {name}'s")]
    table = [["layout", "method", *heads], ["---"] * (2 + len(heads)), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def _ratios(contenders: dict[str, dict[str, Any]]) -> list[float | None]:
    ours, ratios = contenders["ours"], list[float | None]()
    for name in AGAINST:
        other = contenders.get(name)
        ratios.append(round(other["seconds_per_step"] / ours["seconds_per_step"], 2) if other else None)
        ratios.append(round(ours["peak_memory_gb"] / other["peak_memory_gb"], 2) if other else None)
    return ratios


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) < 100 else f"{value:.1f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def fill(page: str) -> str:
    """The page with every marked table filled in from the results."""

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{make_table(match[2])}\n{match[4]}"

    return re.sub(r"(<!-- (\w+) -->)(.*?)(<!-- /\2 -->)", table, page, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    filled = fill(page)
    if parser.parse_args(argv).check:
        if filled != page:
            raise SystemExit("The tables of docs/performance.md differ from the results: run benchmarks/tables.py.")
    else:
        PAGE.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
