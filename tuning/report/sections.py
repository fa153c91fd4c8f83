"""The sections of a run's page."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from tuning.config.arguments import default_options
from tuning.files import CONFIG_FILE, SKIPPED_FILE
from tuning.page.html import (
    escape,
    format_value,
    render_figures,
    render_settings,
    render_share,
    render_warnings,
    show_count,
)
from tuning.report.curves import render_curves, show_number
from tuning.report.record import RunRecord, Series

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
