"""The sections of a run's page."""

import json
import math
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tuning.config.options import default_options
from tuning.files import CONFIG_FILE, REPORT_FILE, SKIPPED_FILE, write_text
from tuning.pages.answers_page import render_predictions
from tuning.pages.charts import render_curves, show_number
from tuning.pages.render import (
    escape,
    format_value,
    read_asset,
    render_document,
    render_figures,
    render_settings,
    render_share,
    render_warnings,
    show_count,
)
from tuning.pages.run_record import ENDED, FINISHED, RUNNING, RunRecord, Series, read_record

WAITING = 0.2  # share of a step spent waiting for data from which on it deserves a look
RISEN = 1.05  # times its lowest: a validation loss from which on it deserves a look
LESS_IS_BETTER = ("loss", "error", "distance", "cer", "wer")
MAX_ROWS = 50
LOSS = "loss"
FIGURES = {"grad_norm": "gradient norm", "learning_rate": "learning rate", "tokens_per_second": "tokens per second"}
FIGURES |= {"peak_memory_gb": "peak memory, GB"}
MAY_BE_LOG = ("grad_norm",)


def render_summary(record: RunRecord) -> str:
    """Big figures, and what deserves a look."""
    training, validation, figures = record.training, record.validation, dict[str, str]()
    for name, series in (("latest loss", training.get(LOSS)), ("validation loss", validation.get(LOSS))):
        if series is not None:
            figures[name] = format_value(float(series.values[-1]))
    for name, series in record.scores.items():
        best = find_best(name, series)
        if best is not None:
            figures[f"best {name}"] = format_value(float(series.values[best]))
    for name in ("tokens_per_second", "peak_memory_gb"):
        if name in training and len(finite := training[name].finite()):
            value = finite.values.max() if name == "peak_memory_gb" else finite.values.mean()
            figures[name] = format_value(float(value))
    note = "" if figures else "<p>No step has been logged yet.</p>"
    return render_figures(figures) + note + render_warnings(find_warnings(record))


def find_best(name: str, series: Series) -> int | None:
    """Where the best value of a score is, the first of equal ones; None where none is a number."""
    sign = 1 if is_less_better(name) else -1
    values = [sign * value if math.isfinite(value) else math.inf for value in series.values.tolist()]
    best = min(range(len(values)), key=values.__getitem__, default=None)
    return None if best is None or math.isinf(values[best]) else best


def is_less_better(name: str) -> bool:
    return name.split("_")[-1] in LESS_IS_BETTER


def find_warnings(record: RunRecord) -> list[str]:
    """What is no error but deserves a look, in words."""
    warnings = []
    if record.left_out:
        warnings.append(f"{show_count(record.left_out, 'row')} left out: {SKIPPED_FILE} names them, and why.")
    validation = record.validation.get(LOSS, Series.empty()).finite()
    if len(validation):
        lowest = validation.values.argmin()
        if validation.values[-1] > RISEN * validation.values[lowest] > 0:
            warnings.append(
                f"The validation loss was lowest at step {validation.steps[lowest]:,}, and has risen by"
                f" {validation.values[-1] / validation.values[lowest] - 1:.0%} since: from there on the model learns"
                " its rows by heart. Train fewer steps, with a lower learning_rate, or on more rows."
            )
    waiting = record.training.get("data_wait_share", Series.empty()).finite()
    if len(waiting) and waiting.values.mean() >= WAITING:
        share = f"{waiting.values.mean():.0%} of the time is spent waiting for rows"
        warnings.append(f"{share}: a higher dataloader_num_workers may help.")
    return warnings


def render_training_curves(record: RunRecord) -> str:
    """The loss across the page, and the other figures beside one another."""
    training, charts = record.training, []
    losses = {"loss": training.get(LOSS), "validation loss": record.validation.get(LOSS)}
    drawn = {name: series for name, series in losses.items() if series is not None}
    charts.append(render_curves("loss", drawn, wide=True, may_be_log=True))
    for name, title in FIGURES.items():
        if name in training:
            charts.append(_render_figure(name, title, training[name]))
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    hint = '<p class="small">Point at a curve to see its values.</p>'
    return f'<div class="charts">{"".join(charts)}</div>{hint}{_render_values(training)}'


def _render_figure(name: str, title: str, series: Series) -> str:
    may_be_log = name in MAY_BE_LOG
    return render_curves(title, {title: series}, may_be_log=may_be_log, from_zero=True, tells_highest=True)


def _render_values(training: Mapping[str, Series]) -> str:
    """Some of the figures as a table, for those who cannot point at a curve."""
    shown = {FIGURES.get(name, name): training[name] for name in (LOSS, *FIGURES) if name in training}
    steps = sorted({step for series in shown.values() for step in series.steps.tolist()})
    if not steps:
        return ""
    chosen = [*steps[: -1 : -(-len(steps) // MAX_ROWS)], steps[-1]]
    return f"<details><summary>The same as a table</summary>{_render_table(shown, chosen)}</details>"


def render_validation(record: RunRecord) -> str:
    """Loss and scores of the validation rows over time."""
    scores = record.scores
    shown = {name: record.validation[name] for name in (LOSS, *scores) if name in record.validation}
    if not shown:
        return ""
    charts = "".join(
        render_curves(_words(name), {_words(name): series}, tells_highest=not is_less_better(name))
        for name, series in scores.items()
    )
    charts = f'<div class="charts few">{charts}</div>' if charts else ""
    steps = sorted({step for series in shown.values() for step in series.steps.tolist()})
    older = max(len(steps) - MAX_ROWS, 0)
    more = f'<p class="small">and {show_count(older, "earlier evaluation")}</p>' if older else ""
    found = {name: find_best(name, series) for name, series in shown.items()}
    best = {(name, int(shown[name].steps[at])) for name, at in found.items() if at is not None}
    return f"{charts}{_render_table(shown, steps[older:], best)}{more}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _render_table(columns: Mapping[str, Series], steps: list[int], best: Collection[tuple[str, int]] = ()) -> str:
    """Values by step; `best` are the names and steps of those to point out."""
    values = {name: series.by_step() for name, series in columns.items()}

    def cell(name: str, step: int) -> str:
        shown = show_number(values[name][step]) if step in values[name] else ""
        return f"<b>{shown}</b> <span class=small>best</span>" if (name, step) in best else shown

    head = "".join(f"<th scope=col>{escape(_words(name))}</th>" for name in ("step", *columns))
    body = "".join(
        f"<tr><th scope=row>{step:,}</th>{''.join(f'<td>{cell(name, step)}</td>' for name in columns)}</tr>"
        for step in steps
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="group" aria-label="values by step">{table}</div>'


def render_model(facts: Mapping[str, Any]) -> str:
    """Parameters of each part and how many are trained, and the adapter."""
    parts = facts.get("parts") or []
    bars = "".join(
        render_share(part["part"], part["trained"] / max(part["parameters"], 1), _show_share(part)) for part in parts
    )
    listed = f'<ul class="shares parts">{bars}</ul>' if bars else ""
    known = {name: facts.get(name) for name in ("architecture", "dtype", "attention", "adapter")}
    settings = {name: _show_option(value) for name, value in known.items() if value}
    return listed + (render_settings(settings) if settings else "")


def _show_share(part: Mapping[str, Any]) -> str:
    trained, parameters = part["trained"], part["parameters"]
    return f"{trained:,} of {parameters:,}" if trained else f"none of {parameters:,}"


def render_facts(record: RunRecord) -> str:
    """The data, how it is batched, and what it is trained with."""
    known = dict(record.facts.get("data") or {})
    known["batches"] = record.progress.get("batches")
    known |= record.facts.get("machine") or {}
    settings = {
        name: f"{value:,}" if isinstance(value, int) else _show_option(value)
        for name, value in known.items()
        if not _is_unset(value)
    }
    return render_settings(settings) if settings else ""


def render_options(options: Mapping[str, Any]) -> str:
    """What differs from the defaults, and all else folded."""
    if not options:
        return ""
    defaults = default_options()
    changed = {name: value for name, value in options.items() if not _is_same(value, defaults.get(name))}
    rest = {name: _show_option(value) for name, value in options.items() if name not in changed}
    return (
        f"<h3>Not the defaults</h3>{_render_options({name: _show_option(value) for name, value in changed.items()})}"
        f"<details><summary>The other {len(rest)} options</summary>{_render_options(rest)}</details>"
        f'<p class="small"><code>{CONFIG_FILE}</code> has them all: a run can be repeated from it.</p>'
    )


def _render_options(options: Mapping[str, str]) -> str:
    """As they are written in a config."""
    entries = "".join(
        f"<dt><code>{escape(name)}</code></dt><dd>{escape(value)}</dd>" for name, value in options.items()
    )
    return f'<dl class="settings">{entries}</dl>'


def _is_same(value: Any, default: Any) -> bool:
    """Whether an option is as good as its default; it has been to disk, where tuples become lists."""
    return value in (default, getattr(default, "value", default)) or (_is_unset(value) and _is_unset(default))


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", "none", [], {})


def _show_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


RELOAD_SECONDS = 30


def write_report(output_dir: str | Path) -> Path:
    """Write `report.html` from the files in `output_dir`, and return its path. Raises `OSError`."""
    path = Path(output_dir, REPORT_FILE)
    write_text(path, render_report(read_record(Path(output_dir))))
    return path


def render_report(record: RunRecord) -> str:
    """The page as HTML; it needs no network, and can be read without JavaScript. It reloads itself during training."""
    sections = [
        ("summary", "Summary", render_summary(record)),
        ("curves", "Curves", render_training_curves(record)),
        ("validation", "Validation", render_validation(record)),
        ("answers", "Sample answers", render_predictions(record.predictions)),
        ("model", "What is trained", render_model(record.facts)),
        ("data", "Data and machine", render_facts(record)),
        ("options", "Options", render_options(record.options)),
    ]
    verdict, reload = state_verdict(record), f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">'
    return render_document(
        title=f"{verdict} – {escape(Path(record.output_dir).name)}",
        header=_render_header(record, verdict),
        sections=[section for section in sections if section[2]],
        style=read_asset("tuning.pages", "run.css"),
        script=read_asset("tuning.pages", "run.js"),
        head=f"<noscript>{reload}</noscript>\n" if record.state == RUNNING else "",
    )


def state_verdict(record: RunRecord) -> str:
    """How the run is, in a few words."""
    of_all = f"{record.step:,} of {record.max_steps:,}" if record.max_steps else f"{record.step:,}"
    if record.state == FINISHED:
        stopped = 0 < record.step < record.max_steps  # by early stopping
        return f"Finished after {of_all} steps" if stopped else f"Finished after {show_count(record.step, 'step')}"
    if record.state == ENDED:
        return f"Ended early: step {of_all}"
    if record.state != RUNNING:
        return f"Step {of_all}" if record.step else "Nothing was trained yet"
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


def _render_header(record: RunRecord, verdict: str) -> str:
    entries = {
        "Model": record.facts.get("model") or record.options.get("model_name_or_path"),
        "Data": record.facts.get("training_data") or record.options.get("training_data_path"),
        "Folder": record.output_dir,
    }
    shown = {key: escape(str(value)) for key, value in entries.items() if value}
    times = {"Begun": record.facts.get("begun"), "As of": record.progress.get("updated")}
    shown |= {key: _render_time(value) for key, value in times.items() if isinstance(value, str)}
    listed = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in shown.items())
    reason = record.progress.get("reason")
    told = f'<p class="reason">{escape(str(reason))}</p>' if reason else ""
    bar = ""
    if record.state in (RUNNING, ENDED) and record.max_steps:
        bar = f'<progress max="{record.max_steps}" value="{record.step}" aria-label="steps trained"></progress>\n'
    style = {FINISHED: "clean", ENDED: "unclean"}.get(record.state, "running")
    reload = f' data-reload="{RELOAD_SECONDS}"' if record.state == RUNNING else ""
    return (
        f'<header class="{style}"{reload}>\n<h1>{verdict}</h1>\n{bar}{told}<dl class="names">{listed}</dl>\n</header>'
    )


def _render_time(when: str) -> str:
    """A time in ISO 8601, for people and for the page's script."""
    try:
        shown = datetime.fromisoformat(when).strftime("%d %b %Y, %H:%M")
    except ValueError:
        shown = when
    return f'<time datetime="{escape(when)}">{escape(shown)}</time>'
