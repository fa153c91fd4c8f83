"""The base's files are kept byte for byte, and edited where training changed a setting."""

import json
from pathlib import Path

import pytest
from architectures.checkpoints import build
from tiny_models import build_processor
from transformers import AutoConfig, AutoProcessor

from tuning.config.options import ModelSource
from tuning.export.base_files import BaseFiles, read_base_files
from tuning.model.load import load_processor

CONFIG = {"model_type": "llava_next", "torch_dtype": "float16", "text_config": {"torch_dtype": "float16"}, "own": 1}
OTHER = "{{ 'another' }}"


@pytest.fixture
def base(tmp_path) -> Path:
    """A base with the files of transformers 4: a file for the image processor, a template in the tokenizer's."""
    folder = tmp_path / "base"
    processor = build_processor("granite_vision")
    processor.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    image = settings.pop("image_processor")
    write(folder / "preprocessor_config.json", image)
    write(folder / "processor_config.json", settings)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    write(folder / "tokenizer_config.json", tokenizer | {"chat_template": processor.chat_template})
    write(folder / "chat_template.json", {"chat_template": processor.chat_template})
    write(folder / "config.json", CONFIG)
    (folder / "README.md").write_text("the base")
    (folder / "report.html").write_text("of a run")
    return folder


def write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1))  # not as we would write it


def read(base: Path, **settings) -> tuple[BaseFiles, dict[str, bytes]]:
    """The files for a processor that is loaded with `settings`, and those of them that are not the base's."""
    source = ModelSource(str(base), **settings)
    files = read_base_files(str(base), load_processor(source, AutoConfig.for_model("llava_next")))
    own = {file.name: file.read_bytes() for file in base.iterdir()}
    changed = {name: text for name, text in files.files.items() if text != own.get(name)}
    return files, changed


def test_without_changes_all_is_the_bases_own(base, tmp_path):
    files, changed = read(base)
    assert changed == {}
    (tmp_path / "out").mkdir()
    files.write(tmp_path / "out", for_adapter=False)
    files.write_config(tmp_path / "out", AutoConfig.for_model("llava_next"), "float16")
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    own = {file.name: file.read_bytes() for file in base.iterdir()}
    assert written == {name: text for name, text in own.items() if name not in ("README.md", "report.html")}


def test_another_template_is_written_wherever_the_base_has_one(base):
    _, changed = read(base, chat_template=OTHER)
    assert changed.keys() == {"tokenizer_config.json", "chat_template.json"}
    for name, text in changed.items():
        expected = json.loads((base / name).read_text()) | {"chat_template": OTHER}
        assert json.loads(text) == expected


def test_an_adapter_has_another_template_in_a_file_of_its_own(base, tmp_path):
    """An engine serves the base with the base's template, unless it is given this file."""
    for name, settings in (("own", {"chat_template": OTHER}), ("plain", {})):
        (tmp_path / name).mkdir()
        read(base, **settings)[0].write(tmp_path / name, for_adapter=True)
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == OTHER
    assert not (tmp_path / "plain" / "chat_template.jinja").exists()


def test_of_named_templates_the_default_one_is_changed(base):
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": tokenizer["chat_template"]}, {"name": "tools", "template": "{{ 1 }}"}]
    write(base / "tokenizer_config.json", tokenizer | {"chat_template": named})
    _, changed = read(base, chat_template=OTHER)
    assert json.loads(changed["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": OTHER},
        {"name": "tools", "template": "{{ 1 }}"},
    ]


def test_a_processor_finds_the_template_that_only_the_tokenizer_has(base, tmp_path):
    (base / "chat_template.json").unlink()
    files, _ = read(base)
    (tmp_path / "out").mkdir()
    files.write(tmp_path / "out", for_adapter=False)
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    assert (
        AutoProcessor.from_pretrained(tmp_path / "out").chat_template == build_processor("granite_vision").chat_template
    )


def test_image_settings_are_changed_in_the_bases_file_and_in_config_json(base, tmp_path):
    pinpoints = [[32, 64], [64, 64]]
    files, changed = read(base, processor_kwargs={"image_grid_pinpoints": pinpoints})
    assert changed.keys() == {"preprocessor_config.json"}
    before = json.loads((base / "preprocessor_config.json").read_text())
    assert json.loads(changed["preprocessor_config.json"]) == before | {"image_grid_pinpoints": pinpoints}
    (tmp_path / "out").mkdir()
    files.write_config(tmp_path / "out", AutoConfig.for_model("llava_next"), "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "model_type": "llava_next",
        "torch_dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16"},
        "own": 1,
        "image_grid_pinpoints": pinpoints,
    }


@pytest.mark.parametrize("given", [{"max_pixels": 2048}, {"size": {"shortest_edge": 64, "longest_edge": 2048}}])
def test_a_limit_of_pixels_under_either_name_replaces_an_older_one(given, tmp_path):
    """Where Qwen's published file has `max_pixels`, transformers ignores a `size`."""
    family = build("qwen2_5_vl")
    family.processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    image = settings.pop("image_processor")
    size = image.pop("size")
    write(tmp_path / "preprocessor_config.json", image | {"min_pixels": 64, "max_pixels": size["longest_edge"]})
    write(tmp_path / "processor_config.json", settings)
    write(tmp_path / "config.json", {"model_type": "qwen2_5_vl"})
    processor = load_processor(ModelSource(str(tmp_path), processor_kwargs=given), family.config)
    assert processor.image_processor.size["longest_edge"] == 2048
    files = read_base_files(str(tmp_path), processor)
    assert files.processor is None
    written = json.loads(files.files["preprocessor_config.json"])
    assert (written["min_pixels"], written["max_pixels"]) == (64, 2048)
