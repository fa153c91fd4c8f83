"""Every config of examples/models trains the tiny checkpoint of its family, and the page beside them names each."""

import json
from pathlib import Path

import pytest
from architectures.case import Case

import tuning

FOLDER = Path(__file__).parents[2] / "examples" / "models"
EXAMPLES = {file.stem: file for file in sorted(FOLDER.glob("*.json"))}
ARCHITECTURES = {
    "internvl3_5": "internvl",
    "smolvlm2": "smolvlm",
    "granite_vision_3_2": "llava_next",
    "granite_vision_4": "granite4_vision",
    "llama3_2_vision": "mllama",
    "llava_1_5": "llava",
    "llava_1_6": "llava_next",
    "pixtral": "llava+pixtral",
    "paligemma2": "paligemma",
}
"""Example → its architecture, where that has another name."""
SMALLER = {"smolvlm2": {"processor_kwargs": {"size": {"longest_edge": 64}}}}  # its tiny checkpoint has tiles of 32


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    case = Case.make(ARCHITECTURES.get(name, name), tmp_path)
    options = json.loads(EXAMPLES[name].read_text())
    here = {name: case.options()[name] for name in ("model_name_or_path", "training_data_path", "output_dir")}
    quick = {"max_steps": 1, "validation_split": 1, "eval_strategy": "no", "use_cpu": True}
    result = tuning.train(
        {**options, **here, **quick, **SMALLER.get(name, {}), "dataloader_num_workers": 0, "report_samples": 0}
    )
    assert result.global_step == 1
    assert (result.model_dir / "adapter_model.safetensors").is_file()


def test_the_page_names_every_example():
    page = (FOLDER / "README.md").read_text()
    assert [name for name in EXAMPLES if f"({name}.json)" not in page] == []
