"""Measure how many rows per second `vlm-tuning check` reads, and whether its memory stays flat. Prints a JSON line.

    python benchmarks/check_speed.py [--rows 100000] >> benchmarks/results/check_speed.jsonl

Makes a parquet file of chats with small PNG images and a random two-layer model; downloads nothing. Memory is the peak
of the anonymous memory (`RssAnon`) of the main process and its workers, without the files that Arrow maps into memory.
"""

import argparse
import io
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from record import describe_environment, print_line

WRITTEN_AT_ONCE = 5000


def write_rows(path: Path, count: int) -> None:
    """Write a parquet file of `count` rows with images of 24 to 64 pixels per side."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(200):
        data, size = io.BytesIO(), random.integers(24, 64, 2)
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(data, "PNG")
        pictures.append(data.getvalue())
    writer = None
    for start in range(0, count, WRITTEN_AT_ONCE):
        numbers = range(start, min(start + WRITTEN_AT_ONCE, count))
        messages = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": f"What is picture {n}?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": f"It is {n}" + ", as you see" * (n % 6)}]},
            ]
            for n in numbers
        ]
        images = [[{"bytes": pictures[n % len(pictures)], "path": None}] for n in numbers]
        table = pa.table({"messages": messages, "images": images})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def watch_memory(stop: threading.Event, peak: list[int]) -> None:
    while not stop.wait(0.05):
        peak[0] = max(peak[0], sum(map(held_by, [os.getpid(), *(child.pid for child in active_children())])))


def held_by(process: int) -> int:
    """Anonymous resident memory of a process in bytes; 0 for a worker that has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(folder: Path, rows: int) -> dict[str, float]:
    """Rows per second, without start-up and report, and the growth of memory in bytes."""
    import datasets
    from tiny_models import save_layout

    from tuning.checking.findings import measure_all
    from tuning.config.parse import build_config
    from tuning.data.from_config import make_encoder, open_rows
    from tuning.data.row_lengths import RowMeter
    from tuning.model import load

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    write_rows(folder / "rows.parquet", rows)
    model = save_layout("granite_vision", folder / "model")
    options = {"model_name_or_path": str(model), "training_data_path": str(folder / "rows.parquet")}
    config = build_config({**options, "output_dir": str(folder / "out")})
    model_config = load.load_config(config.model)
    encoder = make_encoder(config.data, load.load_processor(config.model, model_config), model_config, "01 Jan 2026")
    source, meter = open_rows(config).train, RowMeter(encoder)
    stop, peak = threading.Event(), [0]
    threading.Thread(target=watch_memory, args=(stop, peak), daemon=True).start()
    time.sleep(0.2)
    before, started = peak[0], time.perf_counter()
    findings = measure_all(source, meter)
    seconds = time.perf_counter() - started
    stop.set()
    assert findings.counts["rows"] == rows
    assert not findings.problems
    return {"rows": rows, "rows_per_second": rows / seconds, "memory_growth_bytes": peak[0] - before}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args(argv).rows
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), rows)
    print_line("check_speed", describe_environment(), **figures)


if __name__ == "__main__":
    main()
