"""`vlm-tuning check`: read every row as training would, estimate the run, and report problems. Trains nothing."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from tuning.checking.estimates import Lengths, count_processes, estimate_run, rows_of_a_step
from tuning.checking.findings import Findings, measure_all, row_finder
from tuning.checking.memory import MemoryEstimate
from tuning.checking.memory_plan import count_rows, find_limit, left_to_memory, plan_memory
from tuning.checking.report import Report, SampleRow, show_row
from tuning.checking.step_memory import LongestRows, StepMemory
from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.data.batch_sampler import NOT_TRAINED, make_token_batches
from tuning.data.collator import probe_collator
from tuning.data.encode import Encoder, Sample
from tuning.data.from_config import check_batch_is_filled, dummy_batch, make_encoder, open_rows
from tuning.data.row_lengths import RowLengths, RowMeter
from tuning.data.row_warnings import describe_ignored_keys, describe_unused_columns, find_prompt_gap
from tuning.data.sources import Row, Stream
from tuning.errors import UserError, writing
from tuning.files import write_json, write_text
from tuning.model import load
from tuning.model.build import ModelPlan, plan_model
from tuning.model.parts import parameter_table
from tuning.model.precision import decide_dtype
from tuning.pages.check_page import render_page
from tuning.training.data_loading import choose_collator
from tuning.training.optimizer import check_optimizer, patch_master_weights

OPTIONS = RunConfig  # those of train
SHOWN_PER_KIND = 3
ROWS_READ = 64  # to compare their prompts with those of a server


def check(config: RunConfig) -> Report:
    """Read all rows as training would, estimate the run, and write `check.json` and `check.html`."""
    for note in config.notes:
        print0(note)
    check_optimizer(config.training)
    model_config = load.load_config(config.model)
    config = decide_dtype(config, model_config)
    encoder = open_encoder(config, model_config)

    rows = open_rows(config)
    source = rows.train
    check_batch_is_filled(source, config)
    meter = RowMeter(encoder, decode_images=config.check.decode_images)
    findings = measure_all(source, meter, config.check.max_rows)
    validation = None
    if rows.validation is not None:
        validation = measure_all(rows.validation, meter, config.check.max_rows)
    lengths = findings.lengths()
    find_row = row_finder(source, lengths)
    gaps = find_prompt_gaps(findings, encoder, map(find_row, lengths.spread(ROWS_READ)))
    shown = map(find_row, lengths.spread(config.check.sample_rows))
    samples = findings.map_good(lambda row: show_row(row, encoder), shown)

    plan = plan_model(config, model_config, partial(dummy_batch, encoder))
    collator = choose_collator(config, encoder, probe_collator(encoder.processor))
    by_weight = (lengths.tokens, lengths.image_tokens)
    heaviest = [LongestRows(tokens, lambda row: encode_good(findings, encoder, find_row(row))) for tokens in by_weight]
    patch_optimizer = patch_master_weights if config.model.keep_master_weights else None
    step_memory = StepMemory(config, model_config, plan, collator, heaviest, patch_optimizer)
    settings = describe_settings(config, encoder, plan, step_memory.build_skeleton())
    all_rows = None if isinstance(source, Stream) else len(source)
    config, memory, decided = estimate_step(step_memory, len(lengths.tokens), all_rows)
    settings |= decided
    batches = count_batches(config, source, lengths, encoder, padded=not collator.padding_free)

    report = Report(
        model=config.model.model_name_or_path,
        data=", ".join(dict.fromkeys(file.name for file in findings.files)),
        totals=count_totals(findings, lengths, validation),
        problems=[*findings.problems, *(validation.problems if validation else [])],
        lengths=lengths.by_role(),
        image_sizes=findings.image_sizes,
        padding=lengths.padding_shares(
            config.training.per_device_train_batch_size, config.training.seed, rows_of_a_step(config)
        ),
        estimates=estimate_run(config, source, lengths, memory, batches),
        settings=settings,
        warnings=[*find_warnings(findings, encoder), *gaps, *compare_counts(samples, lengths, encoder)],
        samples=samples,
        left_out=findings.left_out,
    )
    write_report(report, Path(config.training.output_dir))
    return report


def open_encoder(config: RunConfig, model_config: PreTrainedConfig) -> Encoder:
    """What encodes rows for the model of `config`, with its processor."""
    processor = load.load_processor(config.model, model_config)
    return make_encoder(
        config.data,
        processor,
        model_config,
        config.data.run_date,
        template_kwargs=config.model.chat_template_kwargs,
        tokens=load.read_tokens(config.model, processor, model_config),
    )


def encode_good(findings: Findings, encoder: Encoder, row: Row) -> Sample | None:
    """The sample of a row. A bad one becomes a problem and has none."""
    return next(iter(findings.map_good(encoder.encode, [row])), None)


def estimate_step(
    memory: StepMemory, rows: int, all_rows: int | None
) -> tuple[RunConfig, MemoryEstimate | None, dict[str, str]]:
    """The config with numbers where it says auto, the memory of a step, and what was decided, by name.

    `rows`: those that were measured. `all_rows`: those of an epoch; None where they are streamed.
    """
    config = memory.config
    if not left_to_memory(config):
        batch = count_rows(config, memory.longest)
        if all_rows is not None:  # a batch has no more than a process has in an epoch
            batch = min(batch, max(1, -(-all_rows // count_processes(config))))
        return config, memory.estimate(batch), {}
    limit = find_limit(config)
    plan = plan_memory(memory, limit, most_rows=max(1, rows // count_processes(config)))
    return plan.apply(config), plan.estimate, {"memory": plan.describe(config, limit)}


def find_prompt_gaps(findings: Findings, encoder: Encoder, rows: Iterable[Row]) -> list[str]:
    """The differences between the prompts that some rows train and those of a server, each once."""
    found = findings.map_good(partial(find_prompt_gap, encoder), rows)
    return list(dict.fromkeys(filter(None, found)))


def count_batches(config: RunConfig, source: Any, lengths: Lengths, encoder: Encoder, *, padded: bool) -> int | None:
    """Batches of an epoch with `max_tokens_per_batch`, of all processes; None where not all rows were measured."""
    budget = config.data.max_tokens_per_batch
    if budget is None or config.check.max_rows:
        return None
    measured = RowLengths(source, encoder, exact=True)
    measured.known[:] = NOT_TRAINED
    for number, file in enumerate(measured.source.files):
        of_file = lengths.file == number
        places = lengths.number[of_file]
        if file.numbers is not None:
            places = np.searchsorted(np.asarray(file.numbers), places)
        measured.known[measured.ends[number] + places, 0] = lengths.tokens[of_file]
    return make_token_batches(config.training, len(source), measured, budget, padded=padded).count_batches()


def describe_settings(config: RunConfig, encoder: Encoder, plan: ModelPlan, model: Any) -> dict[str, str]:
    """What trains and how, as texts by name."""
    return {
        "parts": parameter_table(model, plan.parts),
        "attention": plan.attention.reason.removeprefix("Attention: "),
        "FSDP would wrap": ", ".join(plan.wrap_classes) or "nothing, because no class of layers was found",
        "end of an answer": " or ".join(map(repr, encoder.chat.ends)),
        "overlong rows": f"max_seq_length {encoder.max_seq_length}, overlong_rows {config.data.overlong_rows}",
    }


def count_totals(findings: Findings, lengths: Lengths, validation: Findings | None) -> dict[str, int]:
    """The counts of the report, by name."""
    totals = {
        name: findings.counts[name]
        for name in ("rows", "bad_rows", "rows_left_out", "rows_cut", "images", "dropped_images")
    }
    for name in ("tokens", "image_tokens", "supervised_tokens"):
        totals[name] = int(getattr(lengths, name).sum(dtype=np.int64))
    if validation:
        totals |= {f"validation_{name}": validation.counts[name] for name in ("rows", "bad_rows")}
    return totals


def find_warnings(findings: Findings, encoder: Encoder) -> list[str]:
    """What is not an error, but worth a look."""
    counts, warnings = findings.counts, describe_unused_columns(findings.files)
    warnings += describe_ignored_keys(findings.ignored_keys)
    if number := counts["rows_with_control_tokens"]:
        warnings.append(
            f"The text of {number} rows contains control tokens such as {encoder.processor.tokenizer.eos_token}."
            " They are treated as text."
        )
    if number := counts["dropped_images"]:
        warnings.append(f"{number} images are not used, because a row may have {encoder.max_images}.")
    if rows := findings.left_out:
        some = ", ".join(f"{row['file']} row {row['row']} ({row['tokens']} tokens)" for row in rows[:SHOWN_PER_KIND])
        more = ", …" if len(rows) > SHOWN_PER_KIND else ""
        warnings.append(f"{len(rows)} rows are longer than max_seq_length and would be left out: {some}{more}.")
    if counts["rows_cut"]:
        warnings.append(f"The answers of {counts['rows_cut']} rows would be cut to fit max_seq_length.")
    if encoder.chat.added_end:
        warnings.append(
            f"The chat template writes no end token after an answer, so training adds {encoder.chat.added_end}."
        )
    return warnings


def compare_counts(samples: list[SampleRow], lengths: Lengths, encoder: Encoder) -> list[str]:
    """Warnings where the measured length of a sample row is not the number of tokens it was encoded to."""
    warnings = []
    for sample in samples:
        measured = lengths.tokens[(lengths.number == sample.row)].tolist()
        is_cut = encoder.overlong_rows == "truncate_text" and encoder.max_seq_length in measured
        if len(sample.tokens) not in measured and not is_cut:  # a cut may take a token more, to end with a character
            warnings.append(
                f"{sample.file}, row {sample.row} has {len(sample.tokens)} tokens, but {measured} were measured: the"
                " lengths in this report are approximate."
            )
    return warnings


def write_report(report: Report, output_dir: Path) -> None:
    """Write both files. The page comes last, so that it never shows other values than `check.json`."""
    with writing(f"output_dir {output_dir}"):
        write_json(output_dir / "check.json", report.to_dict())
        write_text(output_dir / "check.html", render_page(report))


def describe(report: Report, output_dir: str) -> str:
    """The text that is printed at the end."""
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


def run(config: RunConfig) -> None:
    """The whole command. Raises `UserError` where there is a problem, after everything is written and printed."""
    report = check(config)
    print0(describe(report, config.training.output_dir))
    if not report.is_clean:
        bad_rows = report.totals["bad_rows"] + report.totals.get("validation_bad_rows", 0)
        raise UserError(
            where=str(Path(config.training.output_dir, "check.json")),
            problem=f"{bad_rows:,} row{'s' if bad_rows > 1 else ''} cannot be trained.",
            fix="Fix the rows that this file names.",
        )
    if not report.lengths["total"].size:
        raise UserError(
            where=str(Path(config.training.output_dir, "check.json")),
            problem="no row is left to train on.",
            fix="Look there for the rows that are left out, and raise max_seq_length.",
        )
    print0("No problems.")
