"""The data options of a config → the rows of a run, and how they are encoded and joined."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig

from tuning.config.families import find_family
from tuning.config.options import DataArguments, RowArguments, RunConfig, SourceArguments
from tuning.console import print0
from tuning.data.batch_sampler import data_seed
from tuning.data.chat_template import ChatFormat
from tuning.data.collator import Collator, probe_collator
from tuning.data.dataset import EncodedRows, StreamedRows, encode_row
from tuning.data.dummy_samples import dummy_image_sample
from tuning.data.encode import IGNORED, Encoder
from tuning.data.formats import describe_format
from tuning.data.images import ImageRules
from tuning.data.open_source import open_source
from tuning.data.resizing import find_short_edge
from tuning.data.sources import DataFile, Mixture, Source, Stream
from tuning.errors import UserError

TYPICAL_IMAGE = (1024, 768)
ROWS_CHECKED_FIRST = 4


@dataclass(frozen=True)
class TrainingData:
    """The rows of a run, and how they are encoded and joined. `validation` is None without validation data."""

    train: EncodedRows | StreamedRows
    validation: EncodedRows | None
    encoder: Encoder
    collator: Collator

    @property
    def files(self) -> list[DataFile]:
        """The files, or splits on the Hub, of the training rows."""
        return source_of(self.train).files


def source_of(rows: EncodedRows | StreamedRows) -> Source | Mixture | Stream:
    """The rows before they are encoded."""
    return rows.stream if isinstance(rows, StreamedRows) else rows.source


def open_data(
    config: RunConfig,
    rows: Source | Mixture | Stream,
    processor: Any,
    model_config: PreTrainedConfig,
    *,
    date_string: str,
    steps_done: int,
    embeddings: int | None = None,
) -> TrainingData:
    """Prepare the training rows and open the validation rows, and try the first rows of both.

    `date_string`: today's date in chat templates. `steps_done`: the optimizer steps of an earlier run: streamed rows
    start after them. `embeddings`: see `Encoder`. Raises `UserError` for a bad row among the first.
    """
    check_batch_is_filled(rows, config)
    encoder = make_encoder(config.data, processor, model_config, date_string, embeddings=embeddings)
    skip = config.data.on_bad_row == "skip"
    collator = probe_collator(processor)
    if config.training.world_size > 1:  # every batch then has an image: see `dummy_image_sample`
        collator = replace(collator, dummy_image_sample=dummy_image_sample(encoder))
    check_first_rows(rows, encoder, skip)
    train = (
        _stream_rows(rows, config, steps_done)
        if isinstance(rows, Stream)
        else EncodedRows(rows, encoder, skip_bad_rows=skip)
    )
    validation = None
    if config.data.validation_data_path:
        validation = EncodedRows(open_validation_rows(config), encoder, skip_bad_rows=skip)
        check_first_rows(validation.source, encoder, skip)
        check_any_row(validation)
    return TrainingData(train, validation, encoder, collator)


def _stream_rows(rows: Stream, config: RunConfig, steps_done: int) -> StreamedRows:
    training = config.training
    return StreamedRows(
        rows,
        batch_size=training.train_batch_size,
        seed=data_seed(training),
        rank=training.process_index,
        world=training.world_size,
        start=steps_done * training.gradient_accumulation_steps,
    )


def check_first_rows(source: Source | Mixture | Stream, encoder: Encoder, skip_bad_rows: bool) -> None:
    """Encode a few rows here and now: most mistakes in a dataset show in its first rows."""
    for row in itertools.islice(source, ROWS_CHECKED_FIRST):
        encoded = encode_row(row, encoder, skip_bad_rows)
        if isinstance(encoded, UserError):
            raise encoded


def check_any_row(rows: EncodedRows) -> None:
    """Raises `UserError` where every validation row is left out. One row that is not is enough: it ends the search."""
    for number in range(len(rows)):
        encoded = rows[number]
        if isinstance(encoded, UserError) or (encoded.sequence["labels"] != IGNORED).any():
            return
    raise UserError(
        where="validation_data_path",
        problem="no row is left to evaluate on: each is bad, or longer than max_seq_length.",
        fix="vlm-tuning check lists the reasons.",
    )


def check_batch_is_filled(rows: Source | Mixture | Stream, config: RunConfig) -> None:
    """Raises `UserError` where `dataloader_drop_last` would drop all rows, so that no step would be taken."""
    training = config.training
    size = training.train_batch_size * training.world_size
    if isinstance(rows, Stream) or config.data.max_tokens_per_batch:  # their batches are counted later
        return
    if training.dataloader_drop_last and len(rows) < size:
        raise UserError(
            where="dataloader_drop_last",
            problem=f"{len(rows)} rows do not fill a batch of {size}, so that no step would be taken.",
            fix="Set it to false, or lower per_device_train_batch_size.",
        )


def open_rows(config: RunConfig) -> Source | Mixture | Stream:
    """The training rows of one data path, or of a list of them, mixed by weight; a `Stream` with `streaming`."""
    data = config.data
    path = data.training_data_path
    entries: list[dict[str, Any]] = path if isinstance(path, list) else [{"path": path}]
    sources = [
        open_path(data, entry["path"], entry.get("split") or data.dataset_split, streaming=data.streaming)
        for entry in entries
    ]
    print_formats([file for source in sources for file in source.files], data)
    weights = [entry["weight"] for entry in entries] if entries[0].get("weight") else None
    if data.streaming:  # the sizes of files are unknown: those of one dataset share its weight equally
        pairs = zip(sources, weights or [], strict=False)
        shared = [weight / len(source.files) for source, weight in pairs for _ in source.files]
        return Stream([file for source in sources for file in source.files], shared or None)
    if weights:
        return Mixture(sources, weights)
    return Source([file for source in sources for file in source.files])


def open_validation_rows(config: RunConfig) -> Source:
    """The rows of `validation_data_path`: the validation split of a folder or hub dataset."""
    assert config.data.validation_data_path is not None
    return open_path(config.data, config.data.validation_data_path, "validation", streaming=False)


def open_path(
    data: SourceArguments, path: str, split: str | None, *, streaming: bool = False, more_fields: Sequence[str] = ()
) -> Source:
    """The rows of one path. `more_fields`: columns to keep in addition to those of the conversation."""
    return open_source(
        path,
        text_field=data.dataset_text_field,
        image_field=data.dataset_image_field,
        split=split,
        config_name=data.dataset_config_name,
        streaming=streaming,
        more_fields=more_fields,
    )


def print_formats(files: Iterable[DataFile], data: SourceArguments) -> None:
    """Print which formats were recognized, other than the documented one."""
    sentences = (describe_format(file.format, data.dataset_text_field, data.dataset_image_field) for file in files)
    for sentence in dict.fromkeys(filter(None, sentences)):
        print0(f"Rows: {sentence}")


def image_rules(data: SourceArguments) -> ImageRules:
    """How large images may be, and where they may come from."""
    return ImageRules(
        folder=data.image_folder,
        allow_outside=data.allow_outside_paths,
        allow_remote=data.allow_remote_images,
        max_pixels=data.max_image_pixels,
        max_bytes=round(data.max_image_megabytes * 1e6),
    )


def make_encoder(
    data: RowArguments,
    processor: Any,
    model_config: PreTrainedConfig,
    date_string: str | None,
    *,
    embeddings: int | None = None,
) -> Encoder:
    """Make the encoder of rows for this model. Prints what it adds to rows and how long they may be.

    `embeddings`: see `Encoder`.
    """
    chat = ChatFormat(processor, date_string=date_string)
    if chat.adds_end_token:
        print0(
            f"The chat template writes nothing after an answer. {chat.end_of_turn} is added, so that the model learns"
            " to stop."
        )
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    encoder = Encoder(
        processor,
        chat,
        max_seq_length=data.max_seq_length or context or processor.tokenizer.model_max_length,
        max_images=data.max_images_per_sample or find_family(model_config).max_images,
        max_messages=data.max_messages_per_row,
        image_rules=replace(image_rules(data), short_edge=find_short_edge(processor.image_processor)),
        embeddings=embeddings,
    )
    if isinstance(data, DataArguments):
        encoder = replace(encoder, assistant_only_loss=data.assistant_only_loss, overlong_rows=data.overlong_rows)
    tokens = encoder.count_image_tokens(Image.new("RGB", TYPICAL_IMAGE))
    width, height = TYPICAL_IMAGE
    print0(f"A {width}×{height} image costs {tokens} image tokens; a row may have {encoder.max_seq_length} tokens.")
    return encoder


def dummy_batch(encoder: Encoder, rows: int) -> dict[str, torch.Tensor]:
    """A batch of `rows` rows for the model, with one dummy image each and no supervised token."""
    return probe_collator(encoder.processor).join([dummy_image_sample(encoder)] * rows)
