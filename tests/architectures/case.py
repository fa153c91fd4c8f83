"""An architecture with its checkpoint, rows that fit it, and the steps of a run up to its training."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from architectures.checkpoints import Family, save
from architectures.names import ALONE, is_known
from PIL import Image, ImageDraw

from tuning.config.parse import resolve
from tuning.data.collator import Collator, probe_collator
from tuning.data.encode import IGNORED, Encoder, Sample
from tuning.data.from_config import dummy_batch, make_encoder, open_rows
from tuning.model import load
from tuning.model.build import build_model, plan_model

PICTURES = {"square.png": (64, 64), "wide.png": (96, 40), "tall.png": (40, 96), "small.png": (33, 37)}


def draw(folder: Path) -> None:
    """Save pictures of several sizes, each with edges and colours of its own."""
    for number, (name, size) in enumerate(PICTURES.items()):
        picture = Image.new("RGB", size, (60 * number, 200 - 40 * number, 90))
        pen = ImageDraw.Draw(picture)
        pen.ellipse((4, 4, size[0] // 2, size[1] // 2), fill=(250, 30 * number, 10))
        pen.line((0, size[1], size[0], 0), fill=(10, 250, 40), width=3)
        picture.save(folder / name)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}


def make_rows(family: Family) -> list[dict]:
    """Rows that the family takes: with one picture, two, and none, of one turn and several, with a system message."""
    one = [
        {"role": "user", "content": [IMAGE, text("What is in the picture?")]},
        {"role": "assistant", "content": "A red circle."},
    ]
    rows = [{"messages": one, "images": ["square.png"]}]
    other = [
        {"role": "user", "content": [IMAGE, text("Describe this.")]},
        {"role": "assistant", "content": "There are three: one, two, three. It is a cat."},
    ]
    rows.append({"messages": other, "images": ["wide.png"]})
    if not family.needs_image:
        words = [
            {"role": "user", "content": [text("How many?")]},
            {"role": "assistant", "content": "Two."},
        ]
        rows.append({"messages": words, "images": []})
    if family.multi:
        turns = [
            *([{"role": "system", "content": [text("You answer in few words.")]}] if family.system else []),
            {"role": "user", "content": [IMAGE, text("Is it dark?")]},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": [text("Is it a circle?")]},
            {"role": "assistant", "content": "Yes, a blue circle below it."},
        ]
        rows.append({"messages": turns, "images": ["tall.png"]})
    if not family.single:
        both = [
            {"role": "user", "content": [IMAGE, IMAGE, text("Compare the two pictures.")]},
            {"role": "assistant", "content": "The first is darker than the second."},
        ]
        rows.append({"messages": both, "images": ["small.png", "tall.png"]})
    return rows


@dataclass
class Case:
    """A saved checkpoint of an architecture and its rows. What takes time is made once."""

    name: str
    folder: Path
    family: Family

    @classmethod
    def make(cls, name: str, root: Path, *, weights: bool = True) -> "Case":
        if not is_known(name):  # only `test_oldest_transformers.py` runs with such a version
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        folder = root / name
        family = save(name, folder, weights=weights)
        draw(folder)
        lines = [json.dumps(row) for row in make_rows(family)]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
        return cls(name, folder, family)

    @property
    def rows(self) -> list[dict]:
        return make_rows(self.family)

    def options(self, **changes: Any) -> dict[str, Any]:
        """The options of a short run."""
        return {
            "model_name_or_path": str(self.folder),
            "training_data_path": str(self.folder / "rows.jsonl"),
            "output_dir": str(self.folder / "out"),
            "per_device_train_batch_size": 1 if self.name in ALONE else len(self.rows),
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "dataloader_num_workers": 0,
            "report_samples": 0,
            "use_cpu": True,
            **changes,
        }

    @functools.cached_property
    def config(self) -> Any:
        return resolve(self.options())

    @functools.cached_property
    def model_config(self) -> Any:
        return load.load_config(self.config.model)

    @functools.cached_property
    def processor(self) -> Any:
        return load.load_processor(self.config.model, self.model_config)

    @functools.cached_property
    def encoder(self) -> Encoder:
        tokens = load.read_tokens(self.config.model, self.processor, self.model_config)
        return make_encoder(self.config.data, self.processor, self.model_config, "today", tokens=tokens)

    @functools.cached_property
    def samples(self) -> list[Sample]:
        return [self.encoder.encode(row) for row in open_rows(self.config).train]

    @functools.cached_property
    def collator(self) -> Collator:
        return probe_collator(self.processor)

    def model(self) -> Any:
        """A new model, as training has it."""
        plan = plan_model(self.config, self.model_config, functools.partial(dummy_batch, self.encoder))
        return build_model(self.config, self.model_config, plan).model

    def expected_answers(self, row: dict) -> list[str]:
        """What is supervised in a row: each answer with its end."""
        return [
            message["content"] + self.family.style.end for message in row["messages"] if message["role"] == "assistant"
        ]

    def supervised_texts(self, sample: Sample) -> list[str]:
        """The decoded runs of supervised tokens."""
        labels, runs = sample.sequence["labels"].tolist(), list[list[int]]()
        for place, label in enumerate(labels):
            if label != IGNORED:
                if place == 0 or labels[place - 1] == IGNORED:
                    runs.append([])
                runs[-1].append(label)
        return [self.processor.tokenizer.decode(run) for run in runs]
