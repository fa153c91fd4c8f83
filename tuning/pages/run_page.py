"""The page of a run, `report.html`: how far it is, curves, scores, sample answers, and how it was made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuning.config.options import default_options
from tuning.files import CONFIG_FILE, REPORT_FILE, SKIPPED_FILE, write_text
from tuning.pages.answers_page import MAX_CARDS, describe_right, make_cards
from tuning.pages.charts import Chart, draw_curves
from tuning.pages.render import format_value, plural, render, to_words
from tuning.pages.run_record import ENDED, FINISHED, RUNNING, RunRecord, Series, read_record

RELOAD_SECONDS = 30
WAITING = 0.2  # share of a step spent waiting for data from which on the page warns
RISEN = 1.05  # validation loss ÷ its lowest from which on the page warns
LOWER_IS_BETTER = ("loss", "error", "distance", "cer", "wer")  # last words of names
MAX_ROWS = 50  # of a table
LOSS = "loss"
FIGURES = {
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
    "peak_memory_gb": "peak memory, GB",
}


@dataclass(frozen=True)
class Table:
    """Values by name and step. `best` has the step of the best value of each name. `left_out` counts earlier steps."""

    columns: Mapping[str, Mapping[int, float]]
    steps: Sequence[int]
    best: Mapping[str, int] = field(default_factory=dict)
    left_out: int = 0


def write_report(output_dir: str | Path) -> Path:
    """Write `report.html` from the files in `output_dir`, and return its path. Raises `OSError`."""
    path = Path(output_dir, REPORT_FILE)
    write_text(path, render_report(read_record(Path(output_dir))))
    return path


def render_report(record: RunRecord) -> str:
    """The page as HTML. It reloads itself while the run trains."""
    info, options = record.info, {name: _show(value) for name, value in record.options.items()}
    changed = find_changed(record.options)
    names = {
        "Model": info.get("model") or record.options.get("model_name_or_path"),
        "Data": info.get("training_data") or record.options.get("training_data_path"),
        "Folder": record.output_dir,
    }
    times = {"Started": info.get("begun"), "Updated": record.progress.get("updated")}
    model = {name: info.get(name) for name in ("architecture", "dtype", "attention", "adapter")}
    setup = {**(info.get("data") or {}), "batches": record.progress.get("batches"), **(info.get("machine") or {})}
    return render(
        "run.html.j2",
        record=record,
        verdict=state_verdict(record),
        folder=Path(record.output_dir).name,
        reason=record.progress.get("reason"),
        style={FINISHED: "clean", ENDED: "unclean"}.get(record.state, "running"),
        reload_seconds=RELOAD_SECONDS if record.state == RUNNING else 0,
        names={name: value for name, value in names.items() if value},
        times={name: time for name, time in times.items() if isinstance(time, str)},
        figures=find_figures(record),
        warnings=find_warnings(record),
        charts=draw_training(record),
        training=tabulate_training(record.training),
        score_charts=draw_scores(record.scores),
        validation=tabulate_validation(record),
        right=describe_right(record.answered_rows),
        cards=make_cards(record.answered_rows),
        max_cards=MAX_CARDS,
        parts=info.get("parts") or [],
        model={name: _show(value) for name, value in model.items() if value},
        setup={name: _show_number(value) for name, value in setup.items() if not _is_unset(value)},
        changed_options={name: options[name] for name in changed},
        other_options={name: shown for name, shown in options.items() if name not in changed},
        config_file=CONFIG_FILE,
    )


def state_verdict(record: RunRecord) -> str:
    """The state of the run in a few words."""
    of_all = f"{record.step:,} of {record.max_steps:,}" if record.max_steps else f"{record.step:,}"
    if record.state == FINISHED:
        stopped_early = 0 < record.step < record.max_steps
        return f"Finished after {of_all} steps" if stopped_early else f"Finished after {plural(record.step, 'step')}"
    if record.state == ENDED:
        return f"Ended early: step {of_all}"
    if record.state != RUNNING:
        return f"Step {of_all}" if record.step else "No training yet"
    left = record.seconds_left
    return f"Running: step {of_all}" + (f", about {format_duration(left)} left" if left else "")


def format_duration(seconds: float) -> str:
    """Two units at most: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if round(seconds) < 100:
        return f"{max(round(seconds), 1)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def find_figures(record: RunRecord) -> dict[str, str]:
    """The big figures of the summary."""
    figures = {}
    for name, series in (("latest loss", record.training.get(LOSS)), ("validation loss", record.validation.get(LOSS))):
        if series is not None:
            figures[name] = float(series.values[-1])
    for name, series in record.scores.items():
        best = find_best(name, series)
        if best is not None:
            figures[f"best {name}"] = series.by_step()[best]
    for name, summarize in (("tokens_per_second", np.mean), ("peak_memory_gb", np.max)):
        finite = record.training.get(name, Series.empty()).finite()
        if len(finite):
            figures[name] = float(summarize(finite.values))
    return {name: format_value(value) for name, value in figures.items()}


def find_best(name: str, series: Series) -> int | None:
    """The step of the best value, the first of equal ones. None if no value is finite."""
    finite = series.finite()
    if not len(finite):
        return None
    return int(finite.steps[finite.values.argmin() if is_lower_better(name) else finite.values.argmax()])


def is_lower_better(name: str) -> bool:
    return name.split("_")[-1] in LOWER_IS_BETTER


def find_warnings(record: RunRecord) -> list[str]:
    """Sentences about what is not an error, but may need a change."""
    warnings = []
    if record.rows_left_out:
        warnings.append(f"{plural(record.rows_left_out, 'row')} left out: {SKIPPED_FILE} lists the reasons.")
    validation = record.validation.get(LOSS, Series.empty()).finite()
    if len(validation):
        lowest, latest = validation.values.min(), validation.values[-1]
        if latest > RISEN * lowest > 0:
            step = validation.steps[validation.values.argmin()]
            warnings.append(
                f"The validation loss was lowest at step {step:,} and has risen by {latest / lowest - 1:.0%} since:"
                " the model begins to memorize its training rows. Train fewer steps, lower the learning_rate, or add"
                " rows."
            )
    waiting = record.training.get("data_wait_share", Series.empty()).finite()
    if len(waiting) and waiting.values.mean() >= WAITING:
        warnings.append(
            f"Training waits for data {waiting.values.mean():.0%} of the time. Try a higher dataloader_num_workers."
        )
    return warnings


def draw_training(record: RunRecord) -> list[Chart]:
    """The losses in one chart across the page, then a chart of each other figure."""
    losses = {"loss": record.training.get(LOSS), "validation loss": record.validation.get(LOSS)}
    drawn = {name: series for name, series in losses.items() if series is not None}
    charts = [draw_curves("loss", drawn, is_wide=True, allow_log=True)]
    for name, title in FIGURES.items():
        if name in record.training:
            line, allow_log = {title: record.training[name]}, name == "grad_norm"
            charts.append(draw_curves(title, line, allow_log=allow_log, from_zero=True, extreme="highest"))
    return [chart for chart in charts if chart]


def draw_scores(scores: Mapping[str, Series]) -> list[Chart]:
    charts = [
        draw_curves(to_words(name), {to_words(name): series}, extreme="lowest" if is_lower_better(name) else "highest")
        for name, series in scores.items()
    ]
    return [chart for chart in charts if chart]


def tabulate_training(training: Mapping[str, Series]) -> Table | None:
    """Some of the figures, for readers who cannot point at a curve."""
    table = _tabulate({FIGURES.get(name, name): training[name] for name in (LOSS, *FIGURES) if name in training})
    if table is None:
        return None
    every = -(-len(table.steps) // MAX_ROWS)
    return Table(table.columns, [*table.steps[:-1:every], table.steps[-1]])


def tabulate_validation(record: RunRecord) -> Table | None:
    """Loss and scores of the latest evaluations."""
    shown = {name: record.validation[name] for name in (LOSS, *record.scores) if name in record.validation}
    table = _tabulate(shown)
    if table is None:
        return None
    best = {name: step for name, series in shown.items() if (step := find_best(name, series)) is not None}
    return Table(table.columns, table.steps[-MAX_ROWS:], best, left_out=max(len(table.steps) - MAX_ROWS, 0))


def _tabulate(columns: Mapping[str, Series]) -> Table | None:
    values = {name: series.by_step() for name, series in columns.items()}
    steps = sorted({step for by_step in values.values() for step in by_step})
    return Table(values, steps) if steps else None


def find_changed(options: Mapping[str, Any]) -> list[str]:
    """The names of the options that differ from their defaults. They come from a file, where tuples became lists."""
    defaults = default_options()

    def is_default(value: Any, default: Any) -> bool:
        return value in (default, getattr(default, "value", default)) or (_is_unset(value) and _is_unset(default))

    return [name for name, value in options.items() if not is_default(value, defaults.get(name))]


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", "none", [], {})


def _show_number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _show(value)


def _show(value: Any) -> str:
    """A value as it is written in a config."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
