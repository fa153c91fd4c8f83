"""Nothing is downloaded, and no dataset is kept. The tiny models and the rows most tests train on."""

import gc
import json
import os
import shutil
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that more threads only wait for each other

import pytest
import torch
from PIL import Image
from thinned import mark_the_rest_slow
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
    """Whatever the environment says."""
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

    seen, save = [], sft_trainer.save_final_model

    def remember(trainer, *rest):
        seen.append(trainer)
        save(trainer, *rest)

    monkeypatch.setattr(sft_trainer, "save_final_model", remember)
    return seen


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and "CI" in os.environ:
        pytest.fail("These tests look at the page in Chromium: install chromium or google-chrome.")
    return found or pytest.skip("Neither chromium nor google-chrome is installed.")


@pytest.fixture(scope="session")
def open_page(browser, tmp_path_factory):
    """Open a file; return its DOM after its scripts ran, and what was written to the console."""
    profile = tmp_path_factory.mktemp("browser")

    def open_page(path) -> tuple[str, list[str]]:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom"]
        done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked slow
def pytest_collection_modifyitems(items):
    mark_the_rest_slow(items)


def pytest_collection_finish():
    """Every run collects garbage a few times: what was imported by now need not be looked through again."""
    gc.collect()
    gc.freeze()
