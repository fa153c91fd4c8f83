"""The data paths of a config → rows."""

from collections.abc import Iterable
from typing import Any

from tuning.config.arguments import DataArguments, RunConfig
from tuning.console import say
from tuning.data.formats import describe_format
from tuning.data.sources import Mixture, Part, Source, Stream, open_source


def open_rows(config: RunConfig) -> Source | Mixture | Stream:
    """The training rows: of one data path, or of a list of them, mixed by weight; streamed where that is asked for."""
    data = config.data
    path = data.training_data_path
    entries: list[dict[str, Any]] = path if isinstance(path, list) else [{"path": path}]
    sources = [_open(config, entry["path"], entry.get("split") or data.dataset_split) for entry in entries]
    say_forms([part for source in sources for part in source.parts], data)
    weights = [entry["weight"] for entry in entries] if entries[0].get("weight") else None
    if data.streaming:  # the files of one dataset share its weight: how large each is, is not known
        pairs = zip(sources, weights or [], strict=False)
        shared = [weight / len(source.parts) for source, weight in pairs for _ in source.parts]
        return Stream([part for source in sources for part in source.parts], shared or None)
    if weights:
        return Mixture(sources, weights)
    return Source([part for source in sources for part in source.parts])


def open_validation_rows(config: RunConfig) -> Source:
    """The rows of `validation_data_path`; of a folder or hub dataset, its validation split."""
    assert config.data.validation_data_path is not None
    return _open(config, config.data.validation_data_path, "validation", streaming=False)


def _open(config: RunConfig, path: str, split: str | None, streaming: bool | None = None) -> Source:
    data = config.data
    return open_source(
        path,
        text_field=data.dataset_text_field,
        image_field=data.dataset_image_field,
        split=split,
        config_name=data.dataset_config_name,
        streaming=data.streaming if streaming is None else streaming,
    )


def say_forms(parts: Iterable[Part], data: DataArguments) -> None:
    """Say which forms were recognised, where they are not the documented one."""
    sentences = (describe_format(part.form, data.dataset_text_field, data.dataset_image_field) for part in parts)
    for sentence in dict.fromkeys(filter(None, sentences)):
        say(f"Rows: {sentence}")
