"""Nothing is downloaded, and no dataset is kept. The tiny models and the rows most tests train on."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from PIL import Image
from tiny_models import LAYOUTS, save_layout

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "yellow": (230, 220, 20)}
SIZES = [(40, 40), (90, 30), (30, 80)]


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Datasets are converted in a folder of this test session; subprocesses are told, too."""
    folder = str(tmp_path_factory.mktemp("datasets_cache"))
    os.environ["HF_DATASETS_CACHE"] = folder
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models are so small that more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Layout → folder of its saved tiny model."""
    root = tmp_path_factory.mktemp("models")
    return {layout: save_layout(layout, root / layout) for layout in LAYOUTS}


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A .jsonl of sixteen questions about plain PNG pictures of three sizes, with answers of several lengths."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(16):
        name = list(COLOURS)[number % 4]
        Image.new("RGB", SIZES[number % 3], COLOURS[name]).save(folder / f"{number}.png")
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour is it?"}]}
        answer = {"role": "assistant", "content": f"It is {name}." + " Very much so." * (number % 5)}
        lines.append(json.dumps({"messages": [question, answer], "images": [f"{number}.png"]}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture
def make_options(models, rows, tmp_path):
    """Options of a short run in float32, in this process alone; `changes` are added."""

    def make(layout: str, **changes) -> dict:
        return {
            "model_name_or_path": str(models[layout]),
            "training_data_path": str(rows),
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "dataloader_num_workers": 0,
            "report_samples": 0,
            **changes,
        }

    return make


@pytest.fixture
def trainers(monkeypatch):
    """The trainers of this test's runs, as they were when the final model was saved."""
    from tuning import sft_trainer

    seen, save = [], sft_trainer.save

    def remember(trainer, *rest):
        seen.append(trainer)
        save(trainer, *rest)

    monkeypatch.setattr(sft_trainer, "save", remember)
    return seen
