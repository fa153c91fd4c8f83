"""`vlm-tuning demo`: a tiny LLaVA learns to read scikit-learn's handwritten digits, then a second question by LoRA.

The demo does what a user does: it writes a dataset in our format and JSON configs, and runs `vlm-tuning train`,
`export` and `predict`. Where vLLM is installed, it serves the model and runs `verify-serving`, too.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning.config.options import option
from tuning.demo.serving import find_vllm, serve
from tuning.errors import RunEnded, UserError
from tuning.files import read_lines
from tuning.pages.demo_page import Answered, write_demo_page

HELD_OUT_SHARE = 0.2
SERVED = "served"  # folder of what the server answered


@dataclass(frozen=True)
class DemoArguments:
    output_dir: str = option("demo_output", "Folder for the data, the models and the page.")


OPTIONS = DemoArguments


@dataclass(frozen=True)
class Task:
    """A question about every image, and the right answer for a digit."""

    name: str
    question: str
    answer: Callable[[int], str]


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WHICH_DIGIT = Task("which_digit", "Which digit is written here?", lambda digit: f"This is a {WORDS[digit]}.")
ODD_OR_EVEN = Task("odd_or_even", "Is the number odd or even?", lambda digit: f"It is {('even', 'odd')[digit % 2]}.")


def run_demo(output_dir: Path) -> dict[str, float]:
    """Train, export and score. Returns the shares of right answers on held-out images."""
    train, held_out = load_digits(output_dir)
    base, full, merged = (output_dir / name for name in ("tiny-llava", "full", "lora-merged"))
    make_base_model(base)
    for task in (WHICH_DIGIT, ODD_OR_EVEN):
        write_dataset(output_dir / task.name / "train.parquet", task, train)
        write_dataset(output_dir / task.name / "held_out.parquet", task, held_out)

    run_command("train", write_config("full.json", output_dir), "--overwrite_output_dir")
    digits = predict(full, base, WHICH_DIGIT, output_dir)
    run_command("train", write_config("lora.json", output_dir), "--overwrite_output_dir")
    shutil.rmtree(merged, ignore_errors=True)
    run_command("export", "--adapter", output_dir / "lora", "--output", merged)
    parity = predict(merged, full, ODD_OR_EVEN, output_dir)
    served = serve_and_verify(merged, ODD_OR_EVEN, output_dir)

    sections = {
        f"{WHICH_DIGIT.question} Full fine-tuning: {digits.before:.1%} → {digits.after:.1%} right": digits,
        f"{ODD_OR_EVEN.question} LoRA, exported: {parity.before:.1%} → {parity.after:.1%} right": parity,
    }
    pictures = [image for image, _ in held_out]
    links = {
        "Report of full fine-tuning": "full/report.html",
        "Report of LoRA": "lora/report.html",
        "Answers of both models to the first question": f"{WHICH_DIGIT.name}/predictions.html",
        "Answers of both models to the second question": f"{ODD_OR_EVEN.name}/predictions.html",
    }
    if served is not None:
        links["Answers of the served model to the second question"] = f"{SERVED}/predictions.html"
    write_demo_page(output_dir / "index.html", {title: task.show(pictures) for title, task in sections.items()}, links)
    print(f"Held-out images with the model's answers: {output_dir / 'index.html'}")
    return {
        "before": digits.before,
        "after": digits.after,
        "lora_before": parity.before,
        "lora_after": parity.after,
        **({"served": served} if served is not None else {}),
    }


@dataclass(frozen=True)
class Predictions:
    """The shares of right answers before and after training, and the lines that `vlm-tuning predict` wrote."""

    before: float
    after: float
    lines: list[dict[str, str]]

    def show(self, pictures: Sequence[Any]) -> list[Answered]:
        return [
            Answered(picture, line["reference"], line["prediction"])
            for picture, line in zip(pictures, self.lines, strict=True)
        ]


def load_digits(output_dir: Path):
    """scikit-learn's 1,797 images (8×8 grey, https://archive.ics.uci.edu/dataset/80), as PNG; train and held-out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            problem="the demo needs scikit-learn.", fix='Install it: pip install "vlm-tuning[demo]"'
        ) from error
    import numpy as np
    from PIL import Image

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pictures = (digits.images * (255 / 16)).astype(np.uint8)
    rows = [(Image.fromarray(pictures[i]).convert("RGB"), int(digits.target[i])) for i in order]
    cut = round(len(rows) * (1 - HELD_OUT_SHARE))
    return rows[:cut], rows[cut:]


def make_base_model(folder: Path) -> None:
    from tuning.demo.tiny_llava import save_tiny_llava

    tasks = (WHICH_DIGIT, ODD_OR_EVEN)
    save_tiny_llava(
        folder, [f"user:\n{task.question}\nassistant:\n{task.answer(d)}" for task in tasks for d in range(10)]
    )


def write_dataset(path: Path, task: Task, rows: Sequence) -> None:
    """Write rows in the documented format: a column of messages and a column of images."""
    from datasets import Dataset, Features, List
    from datasets.features import Image, Value

    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())})
    messages = [
        [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": task.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": task.answer(digit)}]},
        ]
        for _, digit in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_dict({"messages": messages, "images": [[image] for image, _ in rows]}, features=features)
    dataset.to_parquet(path)


def write_config(name: str, output_dir: Path) -> Path:
    """Copy one of the configs in this folder to `output_dir`, with its paths changed to that folder."""
    text = Path(__file__).with_name(name).read_text().replace("demo_output/", f"{output_dir}/")
    (output_dir / name).write_text(text)
    return output_dir / name


def run_command(*words: str | Path) -> None:
    """Run `vlm-tuning` as a user would, but on one thread: with so small a model, several wait for each other."""
    print(f"\n$ vlm-tuning {' '.join(map(str, words))}", flush=True)
    command = [sys.executable, "-m", "tuning.cli", *map(str, words)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})


def predict(model: Path, before: Path, task: Task, output_dir: Path) -> Predictions:
    """Ask a model, and the one it was trained from, the task's question about every held-out image."""
    folder = output_dir / task.name
    run_command(
        *("predict", "--model_name_or_path", model, "--compare", before, "--data_path", folder / "held_out.parquet"),
        *("--output", folder / "predictions.jsonl", "--metrics", "exact_match", "--overwrite"),
        *("--batch_size", "64", "--max_new_tokens", "16"),
    )
    scores = json.loads((folder / "predictions.scores.json").read_text())["scores"]
    lines = list(read_lines(folder / "predictions.jsonl"))
    return Predictions(scores["compared"]["exact_match"], scores["prediction"]["exact_match"], lines)


def serve_and_verify(model: Path, task: Task, output_dir: Path) -> float | None:
    """Serve a model, compare the server with training, and score its answers; None where vLLM is not installed."""
    python = find_vllm()
    if python is None:
        print("\nvLLM is not installed here. To serve the model and verify it, too: make serving demo")
        return None
    rows, folder = output_dir / task.name / "held_out.parquet", output_dir / SERVED
    folder.mkdir(exist_ok=True)
    try:
        with serve(python, model, "digits", folder / "server.log") as url:
            where = ("--server_url", url, "--model", "digits", "--data_path", rows)
            run_command("verify-serving", *where, "--model_name_or_path", model)
            run_command(
                *("predict", *where, "--output", folder / "predictions.jsonl", "--metrics", "exact_match"),
                *("--overwrite", "--max_new_tokens", "16"),
            )
    except RunEnded as error:  # vLLM did not start
        print(error.message)
        return None
    scores = json.loads((folder / "predictions.scores.json").read_text())["scores"]
    return scores["prediction"]["exact_match"]


def run(options: DemoArguments) -> None:
    """Run the demo; the last line is JSON with the scores."""
    print(json.dumps(run_demo(Path(options.output_dir))))
