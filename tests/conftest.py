"""Nothing is downloaded, and no dataset is kept."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from PIL import Image
from tiny_models import LAYOUTS, save_layout


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Datasets are converted in a folder of this test session; subprocesses are told, too."""
    folder = str(tmp_path_factory.mktemp("datasets_cache"))
    os.environ["HF_DATASETS_CACHE"] = folder
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {layout: save_layout(layout, root / layout) for layout in LAYOUTS}


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Sixteen rows: coloured pictures of several sizes, and every fourth row without one."""
    folder = tmp_path_factory.mktemp("rows")
    colours = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}
    lines = []
    for number in range(16):
        name = list(colours)[number % 3]
        size = [(40, 40), (90, 30), (30, 80)][number // 3 % 3]
        Image.new("RGB", size, colours[name]).save(folder / f"{number}.png")
        parts = [{"type": "image"}] if number % 4 else []
        question = {"role": "user", "content": [*parts, {"type": "text", "text": "What is in the picture?"}]}
        answer = {"role": "assistant", "content": f"It is {name}."}
        lines.append(json.dumps({"messages": [question, answer], "images": [f"{number}.png"] if parts else []}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"
