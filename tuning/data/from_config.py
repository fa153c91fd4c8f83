"""The data options of a config → the rows of a run, and how they are encoded and joined."""

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tuning.config.box_formats import BOX_FORMATS
from tuning.config.families import find_family
from tuning.config.model_tokens import ModelTokens
from tuning.config.options import DataArguments, RowArguments, RunConfig, SourceArguments
from tuning.console import print0
from tuning.data.answer_ends import open_chat
from tuning.data.batch_sampler import data_seed
from tuning.data.chat_template import ChatFormat
from tuning.data.collator import Collator, probe_collator
from tuning.data.dataset import EncodedRows, StreamedRows, encode_row
from tuning.data.dummy_samples import dummy_image_sample
from tuning.data.encode import IGNORED, Encoder, Sample
from tuning.data.formats import describe_format
from tuning.data.held_out import hold_out
from tuning.data.images import ImageRules
from tuning.data.open_source import check_image_field, open_source
from tuning.data.resized_size import find_short_edge
from tuning.data.row_warnings import describe_rows, describe_unused_columns, spread_rows
from tuning.data.sources import DataFile, Mixture, Row, Source, Stream
from tuning.data.torchvision_import import describe_torchvision
from tuning.errors import UserError, try_optional

TYPICAL_IMAGE = (1024, 768)
ROWS_CHECKED_FIRST, ROWS_READ = 4, 64
TOKEN_TYPES = "mm_token_type_ids"
NO_TOKENS = ModelTokens()  # where nothing is known of them


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

    def encode(self, row: int) -> Sample | None:
        """The sample of a training row, None where it is left out. Raises `UserError` where it is bad."""
        sample = self.train[row]
        if isinstance(sample, UserError):
            raise sample
        return None if sample.skipped else sample


@dataclass(frozen=True)
class RunRows:
    """The rows of a run before they are encoded. `validation` is None without validation data."""

    train: Source | Mixture | Stream
    validation: Source | None


def source_of(rows: EncodedRows | StreamedRows) -> Source | Mixture | Stream:
    """The rows before they are encoded."""
    return rows.stream if isinstance(rows, StreamedRows) else rows.source


def open_data(
    config: RunConfig,
    rows: RunRows,
    processor: Any,
    model_config: PreTrainedConfig,
    *,
    date_string: str,
    tokens: ModelTokens,
    steps_done: int,
) -> TrainingData:
    """Prepare the rows of a run, and try the first of them.

    `date_string`: today's date in chat templates. `tokens`: what the checkpoint says of its tokens. `steps_done`: the
    optimizer steps of an earlier run: streamed rows start after them. Raises `UserError` for a bad row among the first.
    """
    check_batch_is_filled(rows.train, config)
    encoder = make_encoder(
        config.data,
        processor,
        model_config,
        date_string,
        template_kwargs=config.model.chat_template_kwargs,
        tokens=tokens,
    )
    skip = config.data.on_bad_row == "skip"
    collator = probe_collator(processor)
    if config.training.world_size > 1:  # every batch then has an image: see `dummy_image_sample`
        collator = replace(collator, dummy_image_sample=dummy_image_sample(encoder))
    check_first_rows(rows.train, encoder, skip)
    for warning in [*describe_unused_columns(rows.train.files), *describe_rows(_some_rows(rows.train), encoder)]:
        print0(f"Warning: {warning}")
    train = (
        _stream_rows(rows.train, config, steps_done)
        if isinstance(rows.train, Stream)
        else EncodedRows(rows.train, encoder, skip_bad_rows=skip)
    )
    validation = None
    if rows.validation is not None:
        validation = EncodedRows(rows.validation, encoder, skip_bad_rows=skip)
        check_first_rows(rows.validation, encoder, skip)
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


def _some_rows(rows: Source | Mixture | Stream) -> Iterable[Row | UserError]:
    """A few rows from all over the data, or the first ones of a stream."""
    return itertools.islice(rows, ROWS_CHECKED_FIRST) if isinstance(rows, Stream) else spread_rows(rows, ROWS_READ)


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


def open_rows(config: RunConfig) -> RunRows:
    """The rows of one data path, or of a list of them, mixed by weight, and those to evaluate on.

    With `streaming` the training rows are a `Stream`. With `validation_split` some of the rows are held out.
    """
    data = config.data
    path = data.training_data_path
    entries: list[dict[str, Any]] = path if isinstance(path, list) else [{"path": path}]
    check_config_name(data, [entry["path"] for entry in entries])
    sources = [
        open_path(
            *(data, entry["path"], entry.get("split") or data.dataset_split),
            streaming=data.streaming,
            needs_image_field=len(entries) == 1,
        )
        for entry in entries
    ]
    files = [file for source in sources for file in source.files]
    check_image_field(files, data.dataset_image_field)
    print_formats(files, data)
    weights = [entry["weight"] for entry in entries] if entries[0].get("weight") else None
    if data.streaming:  # the sizes of files are unknown: those of one dataset share its weight equally
        pairs = zip(sources, weights or [], strict=False)
        shared = [weight / len(source.files) for source, weight in pairs for _ in source.files]
        return RunRows(Stream(files, shared or None), open_validation_rows(config))
    validation = open_validation_rows(config)
    if data.validation_split is not None:
        held_out = hold_out(sources, data.validation_split, data_seed(config.training))
        sources, validation = held_out.train, held_out.validation
        trained = sum(len(source) for source in sources)
        print0(f"validation_split: {len(validation):,} rows are held out, {trained:,} rows are trained.")
    if weights:
        return RunRows(Mixture(sources, weights), validation)
    return RunRows(Source([file for source in sources for file in source.files]), validation)


def open_validation_rows(config: RunConfig) -> Source | None:
    """The rows of `validation_data_path`: the validation split of a folder or hub dataset."""
    if not config.data.validation_data_path:
        return None
    return open_path(config.data, config.data.validation_data_path, None, default_split="validation")


def open_path(data: SourceArguments, path: str, split: str | None, **options: Any) -> Source:
    """The rows of one path. `options`: see `open_source`."""
    return open_source(
        path,
        text_field=data.dataset_text_field,
        image_field=data.dataset_image_field,
        split=split,
        config_name=data.dataset_config_name,
        **options,
    )


def check_config_name(data: SourceArguments, paths: Sequence[str]) -> None:
    """Raise `UserError` where `dataset_config_name` has no effect: only datasets of the Hub have configurations."""
    if data.dataset_config_name and all(Path(path).expanduser().exists() for path in paths):
        raise UserError(
            where=f"dataset_config_name {data.dataset_config_name}",
            problem=f"has no effect on {paths[0]}: only datasets of the Hub have configurations.",
            fix="Leave it out.",
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
    template_kwargs: Mapping[str, Any] | None = None,
    tokens: ModelTokens = NO_TOKENS,
) -> Encoder:
    """Make the encoder of rows for this model. Prints what it adds to rows and how long they may be.

    `template_kwargs`: variables for the chat template. `tokens`: what the checkpoint says of its tokens. Raises
    `UserError` where the chat template cannot be used, or does not fit the processor.
    """
    chat = open_chat(
        processor,
        date_string=date_string,
        template_kwargs=template_kwargs,
        stop_tokens=tokens.stop,
        train_empty_thoughts=isinstance(data, DataArguments) and data.train_empty_thoughts,
    )
    for sentence in [describe_torchvision(), *describe_template(chat, template_kwargs or {})]:
        if sentence:
            print0(sentence)
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    family = find_family(model_config)
    bbox_format = data.bbox_format or family.bbox_format
    encoder = Encoder(
        processor,
        chat,
        max_seq_length=data.max_seq_length or context or processor.tokenizer.model_max_length,
        max_images=data.max_images_per_sample or family.max_images,
        max_messages=data.max_messages_per_row,
        image_rules=replace(image_rules(data), short_edge=find_short_edge(processor.image_processor)),
        box_format=BOX_FORMATS[bbox_format] if bbox_format else None,
        embeddings=tokens.embeddings,
        processor_options=find_processor_options(processor, model_config),
    )
    if isinstance(data, DataArguments):
        encoder = replace(
            encoder,
            assistant_only_loss=data.assistant_only_loss,
            overlong_rows=data.overlong_rows,
            train_on=data.train_on,
        )
    check_placeholders(encoder)
    cost = encoder.count_image_tokens(Image.new("RGB", TYPICAL_IMAGE))
    width, height = TYPICAL_IMAGE
    print0(f"A {width}×{height} image costs {cost} image tokens; a row may have {encoder.max_seq_length} tokens.")
    return encoder


def find_processor_options(processor: Any, model_config: PreTrainedConfig) -> dict[str, bool]:
    """What the processor must be asked for: token types, where model and processor know them (Cosmos 3 Edge)."""
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(model_config), None)
    takes = kind is not None and TOKEN_TYPES in inspect.signature(kind.forward).parameters
    return {f"return_{TOKEN_TYPES}": True} if takes and TOKEN_TYPES in processor.model_input_names else {}


def describe_template(chat: ChatFormat, template_kwargs: Mapping[str, Any]) -> list[str]:
    """What the chat template does to answers that you may not expect."""
    sentences = []
    if chat.added_end:
        saved = "" if chat.adds_end_token else " Training saves a chat template that writes it, too."
        sentences.append(
            f"The chat template writes nothing after an answer. {chat.added_end} is added, so that the model learns"
            f" to stop.{saved}"
        )
    if chat.empty_thought:
        treated = "trained" if chat.lead else "context and is not trained (see train_empty_thoughts)"
        sentences.append(
            f"The chat template writes {chat.empty_thought!r} before an answer without a thought. This is {treated}."
        )
    unknown = [name for name in template_kwargs if not chat.template.mentions(name)]
    if unknown:
        sentences.append(f"Warning: the chat template does not use {', '.join(unknown)} of chat_template_kwargs.")
    return sentences


def check_placeholders(encoder: Encoder) -> None:
    """Raise `UserError` where the template writes another image token than the processor reads."""
    chat = encoder.chat
    if chat.writes_placeholders or not chat.image_token:
        return
    blank = Image.new("RGB", (32, 32))
    counted = try_optional(lambda: encoder.count_image_tokens(blank), catch_user_errors=True)
    if counted.value:  # the processor places images itself
        return
    written = chat.find_image_text()
    what = f"writes {written!r} for an image" if written else "writes nothing for an image"
    raise UserError(
        where="chat_template",
        problem=f"the chat template {what}, and the processor reads {chat.image_token!r}.",
        fix="Correct the template, or set another chat_template.",
    )


def dummy_batch(encoder: Encoder, rows: int) -> dict[str, torch.Tensor]:
    """A batch of `rows` rows for the model, with one dummy image each and no supervised token."""
    return probe_collator(encoder.processor).join([dummy_image_sample(encoder)] * rows)
