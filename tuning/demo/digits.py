"""See it work: a tiny LLaVA learns to read scikit-learn's handwritten digits, then a second question by LoRA.

Everything goes the way a user's run goes: a dataset in the documented format, a JSON config, `vlm-tuning train`.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuning.demo.page import Answered, write_page
from tuning.errors import UserError, exit_code_of

HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Task:
    """One question about every image, and its answer by the digit shown."""

    name: str
    question: str
    answer: Callable[[int], str]


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WHICH_DIGIT = Task("which_digit", "Which digit is written here?", lambda digit: f"This is a {WORDS[digit]}.")
ODD_OR_EVEN = Task("odd_or_even", "Is the number odd or even?", lambda digit: f"It is {('even', 'odd')[digit % 2]}.")


def run_demo(output_dir: Path) -> dict[str, float]:
    """Train and score both tasks. Returns the shares of right answers on held-out images."""
    train, held_out = load_digits(output_dir)
    base, full, lora = output_dir / "tiny-llava", output_dir / "full", output_dir / "lora"
    make_base_model(base)
    for task in (WHICH_DIGIT, ODD_OR_EVEN):
        write_dataset(output_dir / task.name / "train.parquet", task, train)

    before = answer(base, WHICH_DIGIT, held_out, "before full fine-tuning")
    train_with("full.json", output_dir)
    after = answer(full, WHICH_DIGIT, held_out, "after full fine-tuning")
    lora_before = answer(full, ODD_OR_EVEN, held_out, "before LoRA")
    train_with("lora.json", output_dir)
    lora_after = answer(lora, ODD_OR_EVEN, held_out, "after LoRA", base=full)

    scores = {
        "before": share_right(before),
        "after": share_right(after),
        "lora_before": share_right(lora_before),
        "lora_after": share_right(lora_after),
    }
    sections = {
        f"{WHICH_DIGIT.question} Full fine-tuning: {scores['before']:.1%} → {scores['after']:.1%} right": after,
        f"{ODD_OR_EVEN.question} LoRA: {scores['lora_before']:.1%} → {scores['lora_after']:.1%} right": lora_after,
    }
    write_page(output_dir / "index.html", sections)
    print(f"Held-out images with the model's answers: {output_dir / 'index.html'}")
    return scores


def load_digits(output_dir: Path):
    """scikit-learn's 1,797 images (8×8 grey, https://archive.ics.uci.edu/dataset/80), as PNG; train and held-out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the demo needs scikit-learn.", fix='Install it: pip install "vlm-tuning[demo]"') from error
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


def train_with(config_name: str, output_dir: Path) -> None:
    """Run `vlm-tuning train` on one of the configs beside this file, with its paths moved to `output_dir`."""
    text = Path(__file__).with_name(config_name).read_text().replace("demo_output/", f"{output_dir}/")
    config = output_dir / config_name
    config.write_text(text)
    print(f"\n$ vlm-tuning train {config}", flush=True)
    command = [sys.executable, "-m", "tuning.cli", "train", str(config), "--overwrite_output_dir"]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def answer(model_dir: Path, task: Task, rows: Sequence, when: str, base: Path | None = None) -> list[Answered]:
    """Let a model answer the task's question about every image, by generation."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tuning.predict import generate_answers

    model = AutoModelForImageTextToText.from_pretrained(base or model_dir)
    if base:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            model = PeftModel.from_pretrained(model, model_dir)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.question}]}]
    processor = AutoProcessor.from_pretrained(model_dir)
    answers = generate_answers(
        model.eval(), processor, [(question, [image]) for image, _ in rows], description=f"answering {when}"
    )
    answered = [Answered(image, task.answer(digit), given) for (image, digit), given in zip(rows, answers, strict=True)]
    print(f"{task.question} Right {when}: {share_right(answered):.1%} of {len(rows)} held-out images.", flush=True)
    return answered


def share_right(answered: Sequence[Answered]) -> float:
    return sum(row.right == row.given for row in answered) / len(answered)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: the last line is JSON with the four scores."""
    parser = argparse.ArgumentParser(prog="vlm-tuning demo", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    output_dir = parser.parse_args(argv).output_dir
    return exit_code_of(lambda: print(json.dumps(run_demo(output_dir))))
