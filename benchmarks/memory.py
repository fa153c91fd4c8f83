"""Measure the peak memory of full tuning for several vocabulary sizes and row lengths.

    python benchmarks/memory.py [--vocabulary 1024 8192 32768 131072] [--tokens 512 2048 8192] [--peers stock]

The model is a small Granite-Vision layout; a batch has two rows of one small image and words. First the vocabulary
grows, with rows of 2048 tokens. Then the rows grow, with a vocabulary of 32768. Either an answer of 16 words trains
(`answers`) or every token does (`all`). `peak_memory_gb` is that of the process. `beyond_weights_gb` is this without
weights, gradients and the optimizer's two moments (16 bytes per parameter), which grow with the vocabulary in any case.
It must stay flat where the vocabulary grows. The stock `Trainer` runs with `answers` only. Prints a JSON line for each
point and contender.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from record import describe_environment, print0, print_line, run_child
from step import make_spec
from workloads import save_model, write_rows

ROWS, STEPS, STATE_COPIES = 2, 2, 4
FIXED_TOKENS, FIXED_VOCABULARY = 2048, 32768


def measure_point(contender: str, trained: str, vocabulary: int, tokens: int, folder: Path) -> dict:
    model = save_model(folder / "model", "granite_vision", "tiny", vocab_size=vocabulary)
    words = [tokens - 100]  # of one token each; the rest are image, template and answer
    rows = write_rows(folder / "rows" / "rows.jsonl", [(60, 60)] * ROWS, words=words, answer_words=[16])
    spec = make_spec(model, rows, "full", steps=STEPS, output=folder / "out", batch_size=ROWS)
    if trained == "all":
        spec["options"]["assistant_only_loss"] = False
    result = run_child("contender.py", {**spec, "contender": contender}, folder)
    peak, state = result["peak_rss_bytes"], STATE_COPIES * (model / "model.safetensors").stat().st_size
    return {
        "contender": contender,
        "trained": trained,
        "vocabulary": vocabulary,
        "tokens_per_row": round(result["tokens"] / ROWS),
        "rows": ROWS,
        "supervised_tokens": result["supervised_tokens"],
        "peak_memory_gb": round(peak / 1e9, 3),
        "beyond_weights_gb": round((peak - state) / 1e9, 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--trained", nargs="+", choices=["answers", "all"], default=["answers", "all"])
    parser.add_argument("--peers", nargs="*", choices=["stock"], default=["stock"])
    arguments = parser.parse_args(argv)
    environment = describe_environment()
    points = [(vocabulary, FIXED_TOKENS) for vocabulary in arguments.vocabulary]
    points += [(FIXED_VOCABULARY, tokens) for tokens in arguments.tokens]
    runs = [("ours", trained) for trained in arguments.trained] + [(peer, "answers") for peer in arguments.peers]
    for contender, trained in runs:
        for vocabulary, tokens in dict.fromkeys(points):
            print0(f"{contender}, {trained} trained: vocabulary {vocabulary}, {tokens} tokens …")
            with tempfile.TemporaryDirectory() as folder:
                line = measure_point(contender, trained, vocabulary, tokens, Path(folder))
            print_line("memory", environment, **line)


if __name__ == "__main__":
    main()
