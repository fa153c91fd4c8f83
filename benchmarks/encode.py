"""Measure how many rows per second one process decodes, encodes and collates: ours, and TRL's collator for images.

    python benchmarks/encode.py [--layout granite_vision gemma3] [--rows 32] [--peers trl]

The rows are JPEG files of photo size with questions of a hundred words, processed with the published image settings
of each family. Ours is the time that training waits for its batches, from its log, without DataLoader workers and with
a very small model. TRL is a DataLoader over the same rows with the collator that `SFTTrainer` makes for them. Both must
give the same tokens and supervised tokens. The time is the median batch after the first one.
"""

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from families import BUILDERS
from peers import TRL_VERSION, install_trl
from record import describe_environment, median, print0, print_line, run_child
from step import BATCH, check_counts, make_spec
from workloads import SMALL_PICTURES, save_model, write_rows

PHOTOS = [(640, 480), (800, 600), (1024, 768), (700, 350)]


def measure_layout(arguments: argparse.Namespace, layout: str, folder: Path, environment: dict) -> None:
    tiny = "tests" if layout in BUILDERS else "tiny"
    model = save_model(folder / "model", layout, tiny if arguments.tiny else "pictures")
    sizes = itertools.islice(itertools.cycle(SMALL_PICTURES if arguments.tiny else PHOTOS), arguments.rows)
    rows = write_rows(folder / "rows" / "rows.jsonl", sizes, words=[100], answer_words=[20])
    spec = make_spec(model, rows, "full", steps=arguments.rows // BATCH, output=folder / "out")
    spec["threads"] = 1  # as many as a DataLoader worker has
    print0(f"{layout}: ours …")
    results = {"ours": run_child("contender.py", {**spec, "contender": "ours"}, folder)}
    if "trl" in arguments.peers:
        print0(f"{layout}: trl …")
        spec = {**spec, "contender": "trl_collator"}
        results["trl"] = run_child("contender.py", spec, folder, paths=(install_trl(),))
        check_counts(results["ours"], results["trl"], "trl")
    for contender, result in results.items():
        speed = BATCH / median(result["data_seconds"][1:] or result["data_seconds"])
        more = {"version": TRL_VERSION} if contender == "trl" else {}
        if len(results) > 1 and contender == "ours":
            more["against_trl"] = round(speed * median(results["trl"]["data_seconds"][1:]) / BATCH, 2)
        print_line(
            "encode",
            environment,
            layout=layout,
            contender=contender,
            rows_per_second=round(speed, 2),
            tokens_per_row=round(result["tokens"] / BATCH),
            rows=arguments.rows,
            threads=result["threads"],
            **more,
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts = ["granite_vision", "llava15", *BUILDERS]
    parser.add_argument("--layout", nargs="+", choices=layouts, default=layouts)
    parser.add_argument("--rows", type=int, default=32, help="a multiple of 4, the batch size")
    parser.add_argument("--peers", nargs="*", choices=["trl"], default=["trl"])
    parser.add_argument("--tiny", action="store_true", help="use small images and a tiny model, to test this script")
    arguments = parser.parse_args(argv)
    environment = describe_environment()
    for layout in arguments.layout:
        with tempfile.TemporaryDirectory() as folder:
            measure_layout(arguments, layout, Path(folder), environment)


if __name__ == "__main__":
    main()
