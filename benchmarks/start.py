"""Measure the seconds from the start of the process to the end of the first step, for several numbers of rows.

    python benchmarks/start.py [--rows 1000 10000 100000 1000000] [--repeats 3]

The model is tiny, and the rows are parquet files of questions about one image of 8 × 8 pixels. `datasets` converts a
file to Arrow once. That happens before, in its own process, and is reported as `conversion_seconds`. Importing Python
packages takes most of the time here, the same for any number of rows; `seconds_after_imports` is without it. Prints a
JSON line for each number of rows, with the medians and their ratios to the smallest number of rows.
"""

import argparse
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import describe_environment, median, print0, print_line, run_child
from workloads import save_model

WRITTEN_AT_ONCE = 10_000
REPEATS = 3


def write_parquet(path: Path, count: int) -> Path:
    """Write `count` rows of messages and one image, with the same bytes in every row."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(data, "PNG")
    question = [{"type": "image", "text": None}, {"type": "text", "text": "What colour is the small square?"}]
    writer = None
    for start in range(0, count, WRITTEN_AT_ONCE):
        numbers = range(start, min(start + WRITTEN_AT_ONCE, count))
        messages = [
            [
                {"role": "user", "content": question},
                {"role": "assistant", "content": [{"type": "text", "text": f"Red, as in row {number}."}]},
            ]
            for number in numbers
        ]
        table = pa.table(
            {"messages": messages, "images": [[{"bytes": data.getvalue(), "path": None}] for _ in numbers]}
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return path


def time_start(folder: Path, model: Path, rows: Path) -> dict[str, float]:
    """Time one start on rows that are already converted."""
    output = Path(tempfile.mkdtemp(dir=folder))
    training = {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    spec = {
        "contender": "ours",
        "model": str(model),
        "rows": str(rows),
        "output": str(output),
        "training": training,
        "options": {"train_sampling_strategy": "random"},
        "threads": 1,
    }
    result = run_child("contender.py", spec, folder, watched=output / "training_logs.jsonl")
    total = result["seconds_to_file"]
    return {"total": total, "after_imports": total - (result["imported"] - result["started"])}


def measure(folder: Path, counts: list[int], repeats: int) -> list[dict[str, Any]]:
    """Measure all numbers of rows in turn, `repeats` times, so that a slow minute of the machine affects all alike."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    model = save_model(folder / "model", "llava15", "tests")
    files, lines = {}, []
    for count in counts:
        files[count] = write_parquet(folder / f"{count}.parquet", count)
        print0(f"converting {count} rows …")
        spec = {"contender": "conversion", "rows": str(files[count]), "threads": 1}
        seconds = run_child("contender.py", spec, folder)["seconds"]
        lines.append({"rows": count, "conversion_seconds": round(seconds, 3), "starts": []})
    for _ in range(repeats):
        for line in lines:
            line["starts"].append(time_start(folder, model, files[line["rows"]]))
            print0(f"{line['rows']} rows: {line['starts'][-1]['total']:.2f} s")
    for line in lines:
        starts = line.pop("starts")
        for name, kind in (("seconds_to_first_step", "total"), ("seconds_after_imports", "after_imports")):
            line[name] = round(median([start[kind] for start in starts]), 3)
            line[f"{name}_against_smallest"] = round(line[name] / lines[0][name], 3)
        line["repeats"] = repeats
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args(argv)
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as folder:
        for line in measure(Path(folder), arguments.rows, arguments.repeats):
            print_line("start", environment, **line)


if __name__ == "__main__":
    main()
