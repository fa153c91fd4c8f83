"""`vlm-tuning check`: what will the model see, and is anything wrong? Reads every row, trains nothing."""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedConfig

from tuning.checking.estimates import Lengths, count_processes, estimate_run, rows_of_a_step
from tuning.checking.memory import MemoryEstimate, estimate_memory
from tuning.checking.report import Problem, Report, SampleRow, show_row
from tuning.config.options import RunConfig
from tuning.config.parse import build_config, describe_options, read_options
from tuning.console import print0
from tuning.data.batch_sampler import NOT_TRAINED, make_token_batches
from tuning.data.collator import probe_collator
from tuning.data.encode import Encoder, Sample
from tuning.data.from_config import dummy_batch, make_encoder, open_rows, open_validation_rows
from tuning.data.row_lengths import CHUNK, Measured, RowLengths, RowMeter, measure_rows
from tuning.data.sources import DataFile, Row, Stream, read_file
from tuning.errors import UserError
from tuning.exit_codes import exit_code_of
from tuning.files import write_json, write_text
from tuning.model import load
from tuning.model.attention import set_decoder_attention
from tuning.model.build import pick_attention, plan_model, prepare_model
from tuning.model.packed_attention import PACKED
from tuning.model.padding_free import why_padding_is_needed_by_structure
from tuning.model.parts import find_parts, freeze_parameters, parameter_table
from tuning.model.quantize import quantise_skeleton
from tuning.pages.check_page import render_page
from tuning.training.optimizer import patch_master_weights
from tuning.training.resume import run_date

USAGE = "vlm-tuning check config.json | --name value …    (the options are those of train)"
SHOWN_PER_KIND = 3


@dataclass
class Findings:
    """What was measured, growing by a chunk of rows at a time; figures of good rows are plain numbers to stay small."""

    files: list[DataFile]
    problems: list[Problem] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    tried: set[tuple[str, int]] = field(default_factory=set)
    figures: list[np.ndarray] = field(default_factory=list)
    image_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, chunk: Iterable[Measured]) -> None:
        good = []
        for row in chunk:
            self.counts["rows"] += 1
            if row.error is not None:
                self.note(row.error, self.files[row.file].name, row.number)
                continue
            self.image_sizes.update(row.image_sizes)
            self.counts.update(
                images=len(row.image_sizes),
                dropped_images=row.dropped_images,
                rows_left_out=row.left_out,
                rows_cut=row.cut,
                rows_with_control_tokens=row.has_special_tokens,
            )
            if row.left_out:
                self.left_out.append({"row": row.number, "file": self.files[row.file].name, "tokens": row.tokens})
            else:
                good.append((row.file, row.number, row.tokens, row.image_tokens, row.supervised_tokens))
        self.figures.append(np.array(good, dtype=np.int32).reshape(-1, 5))

    def note(self, error: UserError, file: str, number: int) -> None:
        self.counts["bad_rows"] += 1
        self.problems.append(Problem(error.kind or "other", number, error.field, str(error), file))

    def attempt(self, action: Callable[[Row], Any], rows: Iterable[Row]) -> list[Any]:
        """What `action` makes of each row; a row that only now turns out to be bad is noted."""
        made = []
        for row in rows:
            try:
                made.append(action(row))
            except UserError as error:
                if (row.file, row.number) not in self.tried:
                    self.note(error, row.file, row.number)
                self.tried.add((row.file, row.number))
        return made

    def lengths(self) -> Lengths:
        return Lengths(*np.concatenate([np.empty((0, 5), np.int32), *self.figures]).T)


def check(config: RunConfig) -> Report:
    """Look at all rows as training would, estimate the run, and write `check.json` and `check.html`."""
    for note in config.notes:
        print0(note)
    model_config = load.load_config(config.model)
    processor = load.load_processor(config.model, model_config)
    encoder = make_encoder(config.data, processor, model_config, run_date(config))
    source = open_rows(config)
    meter = RowMeter(encoder, decode_images=config.check.decode_images)
    findings = measure_all(config, source, meter)
    validation = None
    if config.data.validation_data_path:
        validation = measure_all(config, open_validation_rows(config), meter)
    lengths = findings.lengths()
    rows = find_rows(source, lengths)
    chosen = lengths.spread(config.check.sample_rows)
    samples = findings.attempt(lambda row: show_row(row, encoder), map(rows, chosen))
    batch = findings.attempt(encoder.encode, map(rows, heaviest(config, lengths)))
    padded = pads_batches(config, model_config, encoder)
    memory, settings = describe_model(config, model_config, encoder, batch, padded=padded)
    totals = {**count_totals(findings, lengths), **{f"validation_{k}": v for k, v in _few(validation).items()}}
    report = Report(
        model=config.model.model_name_or_path,
        data=", ".join(dict.fromkeys(file.name for file in findings.files)),
        totals=totals,
        problems=[*findings.problems, *(validation.problems if validation else [])],
        lengths=lengths.by_role(),
        image_sizes=findings.image_sizes,
        padding=lengths.padding_shares(
            config.training.per_device_train_batch_size, config.training.seed, rows_of_a_step(config)
        ),
        estimates=estimate_run(
            config, source, lengths, memory, count_batches(config, source, lengths, encoder, padded=padded)
        ),
        settings=settings,
        warnings=[*find_warnings(findings, encoder), *compare_counts(samples, lengths, encoder)],
        samples=samples,
        left_out=findings.left_out,
    )
    write_report(report, Path(config.training.output_dir))
    return report


def measure_all(config: RunConfig, source: Any, meter: RowMeter) -> Findings:
    """Measure every row, or the first `max_rows`, with a progress bar."""
    findings, limit = Findings(source.files), config.check.max_rows
    known = sum(file.size for file in source.files)
    total = min(known, limit or known) if known else limit
    if isinstance(source, Stream):
        chunks = _measure_stream(source, meter, limit)
    else:
        workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
        few = total is not None and total <= 4 * CHUNK  # starting processes would take longer
        chunks = measure_rows(source.files, meter, limit=limit, workers=0 if few else workers)
    with tqdm(total=total, desc="checking rows", unit="row") as progress:
        for chunk in chunks:
            findings.add(chunk)
            progress.update(len(chunk))
    return findings


def _measure_stream(source: Stream, meter: RowMeter, limit: int | None) -> Iterable[list[Measured]]:
    numbered = ((number, row) for number, file in enumerate(source.files) for row in read_file(file))
    for number, row in itertools.islice(numbered, limit):
        if isinstance(row, UserError):
            raise row
        yield meter.measure([row], number)


def find_rows(source: Any, lengths: Lengths):
    """A function from a position in `lengths` to its row."""

    def find(index: int) -> Row:
        file, number = source.files[lengths.file[index]], int(lengths.number[index])
        if isinstance(source, Stream):
            return file.row(number, next(iter(file.rows.skip(number))))
        return file.row(number, file.rows[number])

    return find


def heaviest(config: RunConfig, lengths: Lengths) -> list[int]:
    """The rows of the batch that needs the most memory."""
    order, size = np.argsort(-lengths.tokens, kind="stable"), config.training.per_device_train_batch_size
    if not len(order):
        return []
    if config.data.max_tokens_per_batch:
        size = max(1, config.data.max_tokens_per_batch // int(lengths.tokens[order[0]]))
    return [int(order[i % len(order)]) for i in range(size)]


def pads_batches(config: RunConfig, model_config: PreTrainedConfig, encoder: Encoder) -> bool:
    """Whether batches of this model are padded, as far as can be told without running it."""
    attention, collator = pick_attention(config, model_config), probe_collator(encoder.processor)
    obstacle = why_padding_is_needed_by_structure(attention, model_config, nested_images=collator.nested_images)
    return config.data.padding_free is False or obstacle != ""


def count_batches(config: RunConfig, source: Any, lengths: Lengths, encoder: Encoder, *, padded: bool) -> int | None:
    """Batches of an epoch with `max_tokens_per_batch`, all processes together; None where rows were not measured."""
    budget = config.data.max_tokens_per_batch
    if budget is None or config.check.max_rows:
        return None
    measured = RowLengths(source, encoder, exact=True)
    measured.known[:] = NOT_TRAINED
    measured.known[np.take(measured.ends, lengths.file) + lengths.number] = lengths.tokens
    return make_token_batches(config.training, len(source), measured, budget, padded=padded).count_items()


def describe_model(
    config: RunConfig, model_config: PreTrainedConfig, encoder: Encoder, samples: list[Sample], *, padded: bool
) -> tuple[MemoryEstimate | None, dict[str, str]]:
    """What trains and how, read from a model without weights, and the memory that a step on `samples` needs."""
    plan = plan_model(config, model_config, partial(dummy_batch, encoder))
    attention = pick_attention(config, model_config)
    model_config._attn_implementation = attention.loaded if attention.loaded in ("sdpa", "eager") else "sdpa"
    skeleton = load.build_skeleton(model_config).to(load.choose_dtype(config.model, model_config))
    parts, classes = find_parts(skeleton), plan.wrap_classes
    if plan.quantization:
        quantise_skeleton(skeleton, plan.quantization)
    model = prepare_model(skeleton, config, plan.lora_targets)
    freeze_parameters(model, plan.idle or set())
    settings = {
        "parts": parameter_table(model, parts),
        "attention": attention.reason.removeprefix("Attention: "),
        "FSDP would wrap": ", ".join(classes) or "nothing: no class of layers was found",
        "end of an answer": repr(encoder.chat.end_of_turn),
        "overlong rows": f"max_seq_length {encoder.max_seq_length}, overlong_rows {config.data.overlong_rows}",
    }
    if not samples:
        return None, settings
    collator = probe_collator(encoder.processor)
    collator.padding_free = not padded
    batch = collator.join(samples)
    if collator.padding_free:
        set_decoder_attention(model, PACKED)
    elif "flash" in attention.loaded:
        del batch["attention_mask"]
    hold = patch_master_weights if config.model.keep_master_weights else None
    processes = count_processes(config)
    return estimate_memory(model, batch, config.training, processes=processes, hold_masters=hold), settings


def count_totals(findings: Findings, lengths: Lengths) -> dict[str, int]:
    counts = findings.counts
    return {
        "rows": counts["rows"],
        "bad_rows": counts["bad_rows"],
        "rows_left_out": counts["rows_left_out"],
        "rows_cut": counts["rows_cut"],
        "images": counts["images"],
        "dropped_images": counts["dropped_images"],
        "tokens": int(lengths.tokens.sum(dtype=np.int64)),
        "image_tokens": int(lengths.image_tokens.sum(dtype=np.int64)),
        "supervised_tokens": int(lengths.supervised_tokens.sum(dtype=np.int64)),
    }


def _few(validation: Findings | None) -> dict[str, int]:
    return {name: validation.counts[name] for name in ("rows", "bad_rows")} if validation else {}


def find_warnings(findings: Findings, encoder: Encoder) -> list[str]:
    """What is no error, but deserves a look."""
    counts, warnings = findings.counts, []
    if split := encoder.chat.find_split_prompt():
        warnings.append(
            f"The chat template's generation prompt ends in {split!r}, which training joins with the answer's first"
            " word into one token: the model would be asked in another way than it was trained."
        )
    if counts["rows_with_control_tokens"]:
        warnings.append(
            f"{counts['rows_with_control_tokens']} rows hold control tokens ({encoder.processor.tokenizer.eos_token},"
            " …) in their text; they are read as the text they are."
        )
    if counts["dropped_images"]:
        warnings.append(f"{counts['dropped_images']} images are beyond the first {encoder.max_images} of their row.")
    if rows := findings.left_out:
        some = ", ".join(f"{row['file']} row {row['row']} ({row['tokens']} tokens)" for row in rows[:SHOWN_PER_KIND])
        more = ", …" if len(rows) > SHOWN_PER_KIND else ""
        warnings.append(f"{len(rows)} rows are longer than max_seq_length and would be left out: {some}{more}.")
    if counts["rows_cut"]:
        warnings.append(f"The answers of {counts['rows_cut']} rows would be cut to fit max_seq_length.")
    if encoder.chat.adds_end_token:
        warnings.append(f"The chat template ends no answer; {encoder.chat.end_of_turn} is added to each.")
    return warnings


def compare_counts(samples: list[SampleRow], lengths: Lengths, encoder: Encoder) -> list[str]:
    """Hold what was counted against rows that were encoded in full."""
    warnings = []
    for sample in samples:
        counted = lengths.tokens[(lengths.number == sample.row)].tolist()
        is_cut = encoder.overlong_rows == "truncate_text" and encoder.max_seq_length in counted
        if len(sample.tokens) not in counted and not is_cut:  # a cut may take a token more, to end with a character
            warnings.append(
                f"{sample.file}, row {sample.row} has {len(sample.tokens)} tokens, but {counted} were counted: the"
                " lengths here are approximate."
            )
    return warnings


def write_report(report: Report, output_dir: Path) -> None:
    """Write both files; the page is written last, so that it never belongs to other figures."""
    try:
        write_json(output_dir / "check.json", report.to_dict())
        write_text(output_dir / "check.html", render_page(report))
    except OSError as error:
        raise UserError(where=f"output_dir {output_dir}", problem=f"cannot be written: {error.strerror}.") from error


def describe(report: Report, output_dir: str) -> str:
    """What is printed at the end."""
    lines = [f"{name}: {value}" if "\n" not in value else value for name, value in report.settings.items()]
    lines += [f"{name.replace('_', ' ')}: {value:,.6g} ({how})" for name, (value, how) in report.estimates.items()]
    lines += [f"{name.replace('_', ' ')}: {value:,}" for name, value in report.totals.items() if value]
    lines += [f"Warning: {warning}" for warning in report.warnings]
    for kind, problems in report.by_kind().items():
        lines.append(f"{len(problems):,} × {kind}:")
        lines += [f"  {problem.message}" for problem in problems[:SHOWN_PER_KIND]]
        if len(problems) > SHOWN_PER_KIND:
            lines.append(f"  … and {len(problems) - SHOWN_PER_KIND:,} more in check.json")
    return "\n".join([*lines, f"Look at {Path(output_dir, 'check.html')}."])


def run(argv: Sequence[str]) -> None:
    """The whole command. Raises `UserError` where there is a problem, after everything is written and printed."""
    config = build_config(read_options(argv))
    report = check(config)
    print0(describe(report, config.training.output_dir))
    if not report.is_clean:
        bad_rows = report.totals["bad_rows"] + report.totals.get("validation_bad_rows", 0)
        raise UserError(
            where=str(Path(config.training.output_dir, "check.json")),
            problem=f"{bad_rows:,} rows cannot be trained.",
            fix="It names every one of them.",
        )
    print0("No problems.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(describe_options(USAGE))
        return 0
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
