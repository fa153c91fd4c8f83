"""Train a few steps with one contender, in its own process, and write the losses, the seconds and the peak memory.

    contender.py SPEC RESULT

SPEC is a JSON file with `contender` (see `CONTENDERS`), `model`, `rows`, `output`, `training` (TrainingArguments for
every contender), `options` (for ours only) and `dtype`. Optional are `adapter` (for the others: a folder with the LoRA
configuration that ours has used), `loading` (for the others: arguments of `from_pretrained`) and `threads`. RESULT gets
the loss and the seconds of every step, the tokens and supervised tokens of the first step, and the peak memory.

For every contender, a step begins when it asks for its batches and ends after the optimizer's step.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import peak_rss_bytes

IGNORED = -100


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Run `tuning.train` and read its log."""
    import tuning
    import tuning.sft_trainer

    imported, output = time.time(), Path(spec["output"])
    tuning.train(
        {
            "model_name_or_path": spec["model"],
            "training_data_path": spec["rows"],
            "output_dir": str(output),
            "train_sampling_strategy": "sequential",
            **{"report_samples": 0, "verify_save": False},  # the peers do neither
            **spec["training"],
            **spec["options"],
        }
    )
    steps = [json.loads(line) for line in (output / "training_logs.jsonl").read_text().splitlines()]
    return {
        "losses": [step["loss"] for step in steps],
        "step_seconds": [step["step_seconds"] for step in steps],
        "data_seconds": [step["step_seconds"] * step["data_wait_share"] for step in steps],
        "tokens": round(steps[0]["tokens_per_second"] * steps[0]["step_seconds"]),
        "supervised_tokens": steps[0]["supervised_tokens"],
        "imported": imported,
    }


def train_trl(spec: dict[str, Any]) -> dict[str, Any]:
    """Run TRL's `SFTTrainer` as its documentation shows it for conversations with images."""
    from trl import SFTConfig, SFTTrainer
    from workloads import read_rows

    rows = read_rows(Path(spec["rows"]))
    arguments = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, **_peer_arguments(spec)}
    if can_mark_answers():
        arguments["assistant_only_loss"] = True
    else:  # older than TRL needs for that: it trains the answer only where question and answer are separate columns
        rows = rows.map(lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]})
        rows = rows.remove_columns("messages")
    model, processor, adapter = _load(spec)
    trainer = _timed(SFTTrainer)(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=rows,
        processing_class=processor,
        peft_config=adapter,
    )
    return _measure(trainer)


def encode_with_trl(spec: dict[str, Any]) -> dict[str, Any]:
    """Run TRL's collator for images, as `SFTTrainer` makes it, in a plain DataLoader, without training."""
    from torch.utils.data import DataLoader
    from transformers import AutoProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
    from workloads import read_rows

    processor = AutoProcessor.from_pretrained(spec["model"])
    processor.chat_template = Path(spec["model"], "marked.jinja").read_text()
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    batch_size = spec["training"]["per_device_train_batch_size"]
    batches = iter(DataLoader(read_rows(Path(spec["rows"])), batch_size, collate_fn=collator))
    seconds, counts = [], []
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        seconds.append(time.perf_counter() - started)
        counts.append(_count(batch))
    return {"data_seconds": seconds, "tokens": counts[0][0], "supervised_tokens": counts[0][1]}


def convert(spec: dict[str, Any]) -> dict[str, Any]:
    """Convert a parquet file to Arrow, as `datasets` does once for `tuning`."""
    import datasets

    started = time.perf_counter()
    datasets.load_dataset("parquet", data_files=[spec["rows"]], split="train")
    return {"seconds": time.perf_counter() - started}


def can_mark_answers() -> bool:
    """Whether this transformers is new enough for TRL's `assistant_only_loss` with images."""
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) >= Version("5.18.0.dev0")


def train_stock(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the stock `Trainer` on the model's own forward with labels."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments
    from workloads import read_rows

    model, processor, adapter = _load(spec)
    if adapter:
        model = get_peft_model(model, adapter)
    trainer = _timed(Trainer)(
        model=model,
        args=TrainingArguments(**_peer_arguments(spec)),
        train_dataset=read_rows(Path(spec["rows"])),
        data_collator=StockCollator(processor),
    )
    return _measure(trainer)


class StockCollator:
    """Renders, tokenizes and pads with the processor's own methods; the labels are the answers the template marks."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        conversations = []
        for row in rows:
            pictures = iter(row["images"])
            conversations.append(
                [{**message, "content": _fill(message["content"], pictures)} for message in row["messages"]]
            )
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
        )
        labels = batch["input_ids"].clone()
        labels[batch.pop("assistant_masks") == 0] = IGNORED
        batch["labels"] = labels
        return batch


def _fill(content: list[dict[str, Any]], pictures: Any) -> list[dict[str, Any]]:
    """Message parts with their images, and without the empty fields that `datasets` adds."""
    return [
        {"type": "image", "image": next(pictures)}
        if part["type"] == "image"
        else {"type": "text", "text": part["text"]}
        for part in content
    ]


def _peer_arguments(spec: dict[str, Any]) -> dict[str, Any]:
    arguments = {"output_dir": spec["output"], "report_to": "none", "remove_unused_columns": False, **spec["training"]}
    return {"train_sampling_strategy": "sequential", "disable_tqdm": True, **arguments}


def _load(spec: dict[str, Any]) -> tuple[Any, Any, Any]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(
        spec["model"], dtype=getattr(torch, spec["dtype"]), **spec.get("loading", {})
    )
    processor = AutoProcessor.from_pretrained(spec["model"])
    processor.chat_template = Path(spec["model"], "marked.jinja").read_text()
    adapter = LoraConfig.from_pretrained(spec["adapter"]) if spec.get("adapter") else None
    if adapter:
        adapter.inference_mode = False  # saved as true, which would freeze it
    return model, processor, adapter


def _timed(trainer_class: type) -> type:
    """The trainer with a clock that starts, as in ours, when a step asks for its batches."""

    class Timed(trainer_class):  # type: ignore[misc]
        counts: list[tuple[int, int]]

        def get_batch_samples(self, *args, **kwargs):
            self.started = time.perf_counter()
            batches, items = super().get_batch_samples(*args, **kwargs)
            self.arrived = time.perf_counter()
            self.counts.append(tuple(map(sum, zip(*map(_count, batches), strict=True))))
            return batches, items

    Timed.counts = []
    return Timed


def _count(batch: Any) -> tuple[int, int]:
    """The tokens without padding, and the supervised tokens."""
    return int(batch["attention_mask"].sum()), int((batch["labels"][:, 1:] != IGNORED).sum())


def _measure(trainer: Any) -> dict[str, Any]:
    from transformers import TrainerCallback

    losses, seconds, waited = [], [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - trainer.started)
            waited.append(trainer.arrived - trainer.started)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    trainer.add_callback(Clock())
    trainer.train()
    tokens, supervised = trainer.counts[0]
    return {
        "losses": losses,
        "step_seconds": seconds,
        "data_seconds": waited,
        "tokens": tokens,
        "supervised_tokens": supervised,
    }


CONTENDERS = {
    "ours": train_ours,
    "trl": train_trl,
    "stock": train_stock,
    "trl_collator": encode_with_trl,
    "conversion": convert,
}


def main(argv: Sequence[str]) -> None:
    spec_file, result_file = map(Path, argv)
    spec = json.loads(spec_file.read_text())
    measure = CONTENDERS[spec["contender"]]
    import torch

    import tuning  # makes torchvision importable for the peers too  # noqa: F401

    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    figures = measure(spec)
    if torch.cuda.is_available():
        figures["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    figures |= {"peak_rss_bytes": peak_rss_bytes(), "threads": torch.get_num_threads()}
    result_file.write_text(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
