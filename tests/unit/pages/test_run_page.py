"""The page of a training run, made from its files and opened in a real browser."""

import html
import json
import math
import re
import time

import numpy as np
import pytest

from tuning.config.options import default_options
from tuning.pages.charts import BUCKETS, average, draw_curves, round_up, thin_out
from tuning.pages.render import shorten
from tuning.pages.run_page import format_duration, write_report
from tuning.pages.run_record import Series, read_record

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="
PARTS = [
    {"part": "vision_tower", "parameters": 3_000_000, "trained": 0},
    {"part": "language_model", "parameters": 8_000_000, "trained": 2_000_000},
]
# Runs in the page: reports to the window around it what does not fit, and what the scripts did.
PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter((element) => {
    const scrolls = element.closest(".scroll, .lines");
    return (!scrolls || scrolls === element) && element.getBoundingClientRect().right > innerWidth + 1;
  }).map((element) => element.outerHTML.slice(0, 80));
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  const headings = [...document.querySelectorAll("h1, h2, h3, h4")].map((element) => +element.tagName[1]);
  const drawn = [...document.querySelectorAll("svg")].filter((svg) => svg.checkVisibility()).length;
  parent.postMessage({ wide, ids, headings, drawn, errors, width: document.documentElement.scrollWidth,
    reload: document.querySelector("#reload")?.checked }, "*");
});
</script>"""
# Runs in the page: scrolls and opens a fold. After the reload it reports where the page is.
READER = """<script>
addEventListener("load", () => setTimeout(() => {
  if (!sessionStorage.getItem("loaded")) {
    sessionStorage.setItem("loaded", "yes");
    document.querySelector("#curves details").open = true;
    document.querySelector("#reload").focus();
    scrollTo({ top: 700, behavior: "instant" });
  } else {
    const open = [...document.querySelectorAll("details")].filter((fold) => fold.open);
    parent.postMessage({ top: scrollY, open: open.map((fold) => fold.querySelector("summary").textContent),
      focus: document.activeElement.id }, "*");
  }
}, 100));
</script>"""
FRAME = """<!doctype html><body><script>
addEventListener("message", (event) => { document.body.dataset.seen = JSON.stringify(event.data); });
</script><iframe src="framed.html" width="360" height="800" style="border: 0"></iframe></body>"""


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_logs(steps, every=1):
    for step in range(every, steps + 1, every):
        figures = {
            "loss": 3 * math.exp(-step / steps * 4) + 0.02 * math.sin(step),
            "learning_rate": 1e-4 * step / steps,
        }
        figures |= {"grad_norm": 1.5, "epoch": step / 100, "tokens_per_second": 900 + step % 7, "peak_memory_gb": 1.25}
        yield {"step": step, **figures, "step_seconds": 0.2, "supervised_tokens": 40, "data_wait_share": 0.01}


def make_answers(rows):
    for row in range(rows):
        asked = {"file": f"{NASTY}.jsonl", "row": row, "question": f"Which? {NASTY}", "reference": "Größe 3\n→ ok"}
        yield {"step": 0, **asked, "prediction": NASTY, "images": [PIXEL, "https://example.org/x.png"]}
        yield {"step": 50, **asked, "prediction": "in between"}
        yield {"step": 100, **asked, "prediction": "Größe 3\n→ ok" if row else "\x00"}


@pytest.fixture
def out(tmp_path):
    """A folder with all files of a run of 100 steps that has not ended yet."""
    evaluations = [
        {"step": step, "eval_loss": 2 / step + step / 1e3, "eval_tokens": 9, "eval_exact_match": step / 100}
        for step in (20, 40, 60, 80, 100)
    ]
    write_lines(
        tmp_path / "training_logs.jsonl", sorted([*make_logs(100), *evaluations], key=lambda line: line["step"])
    )
    write_lines(tmp_path / "sample_predictions.jsonl", make_answers(3))
    write_lines(tmp_path / "skipped_rows.jsonl", [{"row": 7, "field": "images", "reason": NASTY}])
    options = json.loads(json.dumps(default_options(), default=str)) | {"learning_rate": 0.123, "output_dir": NASTY}
    (tmp_path / "resolved_config.json").write_text(json.dumps(options))
    info = {"model": f"org/{NASTY}", "training_data": NASTY, "parts": PARTS, "adapter": {"r": 8}, "dtype": "float32"}
    info |= {"begun": "2026-01-02T03:04:05+01:00", "data": {"form": NASTY, "training_rows": 400}, "machine": {}}
    (tmp_path / "run_facts.json").write_text(json.dumps(info))
    progress = {"state": "running", "step": 100, "max_steps": 900, "seconds_left": 720, "batches": "padding-free"}
    (tmp_path / "run_progress.json").write_text(json.dumps(progress | {"updated": "2026-01-02T03:09:05+01:00"}))
    return tmp_path


def text_of(dom: str) -> str:
    body = re.sub(r"<(script|style|noscript)>.*?</\1>", "", dom, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


def read_page(folder) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_page_of_a_running_run_shows_everything_and_injects_nothing(open_page, out):
    write_report(out)
    dom, console = open_page(out / "report.html")
    assert console == []
    assert dom.count("<script") == 1
    assert "https://example.org" not in dom
    assert re.findall(r"<[^>]*\son[a-z]+=[^>]*>", re.sub(r'"[^"]*"', '""', dom)) == []
    text = text_of(dom)
    for shown in (
        "Running: step 100 of 900, about 12 min left",
        "minutes ago: the run may have been killed",
        "Load this page again every 30 seconds",
        "validation loss 0.12",
        "best exact match 1",
        "1 row left out: skipped_rows.jsonl",
        "The validation loss was lowest at step 40",
        "● validation loss",
        "2 of 3 latest answers exactly equal the reference.",
        "Before training " + NASTY,
        "1 answer in between",
        "Step 100 ␀",
        "2,000,000 of 8,000,000",
        "none of 3,000,000",
        "batches padding-free",
        f"Different from the defaults output_dir {NASTY} learning_rate 0.123 The other",
    ):
        assert shown in text, shown
    assert "per_device_train_batch_size" in text[text.index("other") :]
    assert "from the defaults per_device" not in text.lower()


def test_it_fits_a_phone_and_a_screen_reader(open_page, out):
    page = read_page(out)
    (out / "framed.html").write_text(page.replace("<title>", PROBE + "<title>", 1), encoding="utf-8")
    (out / "frame.html").write_text(FRAME)
    dom, _ = open_page(out / "frame.html")
    seen = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom)[1]))
    assert seen["errors"] == []
    assert seen["wide"] == []
    assert seen["width"] <= 360
    assert seen["reload"] is True
    assert seen["drawn"] == 6  # one drawing a chart: of the loss there are two
    assert len(seen["ids"]) == len(set(seen["ids"]))
    assert seen["headings"][:2] == [1, 2]
    assert all(after - before <= 1 for before, after in zip(seen["headings"], seen["headings"][1:], strict=False))
    assert all('aria-label="' in svg for svg in re.findall(r"<svg[^>]*>", page))
    assert all("alt=" in image for image in re.findall(r"<img[^>]*>", page))


def test_reload_keeps_the_place_of_the_reader(open_page, out):
    page = read_page(out).replace('data-reload="30"', 'data-reload="1"')
    (out / "framed.html").write_text(page.replace("<title>", READER + "<title>", 1), encoding="utf-8")
    (out / "frame.html").write_text(FRAME)
    dom, _ = open_page(out / "frame.html")
    seen = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom)[1]))
    assert seen == {"top": 700, "open": ["The same values as a table"], "focus": "reload"}


def test_only_the_page_of_a_running_run_reloads(out):
    assert '<meta http-equiv="refresh"' in read_page(out)
    endings = {"finished": "Finished after 100 of 900 steps", "ended": "Ended early: step 100 of 900"}
    for state, verdict in endings.items():
        progress = {"state": state, "step": 100, "max_steps": 900, "reason": f"a fire {NASTY}"}
        (out / "run_progress.json").write_text(json.dumps(progress))
        page = read_page(out)
        assert verdict in text_of(page)
        assert f"a fire {NASTY}" in text_of(page)
        assert 'http-equiv="refresh"' not in page
        assert "data-reload" not in page


def test_every_file_may_be_missing_or_broken(out, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert "No training yet" in read_page(empty)
    assert "No step has been logged yet." in read_page(empty)
    (empty / ".complete").write_text(json.dumps({"global_step": 7}))
    assert "Finished after 7 steps" in read_page(empty)
    for file in sorted(out.glob("*.json*")):
        whole = file.read_bytes()
        for broken in (
            b"",
            whole[: len(whole) // 2],
            b"[1, 2]\n3\n",
            b"\xff\xfe{",
            b'{"step": "x", "state": 3}\n{"step": 3}\n',
        ):
            file.write_bytes(broken)
            assert "</html>" in read_page(out), file
        file.write_bytes(whole)
    assert "Running: step 100 of 900" in read_page(out)


def test_values_that_are_not_finite_are_marked_and_left_out(out):
    lines = list(make_logs(9))
    for line, value in zip(lines, (math.inf, math.nan, -math.inf), strict=False):
        line["grad_norm"] = value
    write_lines(out / "training_logs.jsonl", lines)
    page = read_page(out)
    assert "3 NaN or infinite values, marked ×." in page
    assert page.count('class="not-finite"') == 3
    assert "step 1: inf" in page
    assert not re.search(r'="[^"]*\bnan\b', page)
    write_lines(out / "training_logs.jsonl", [{"step": 1, "loss": math.nan, "grad_norm": math.inf}])
    assert "Running" in read_page(out)


def test_one_logged_step_is_a_point(out):
    write_lines(out / "training_logs.jsonl", make_logs(1))
    page = read_page(out)
    assert page.count('class="point"') == 2 + 4  # the loss is drawn twice
    assert 'class="curve"' not in page


def test_thinning_keeps_peaks_and_means():
    values = np.sin(np.arange(100_000) / 500)
    values[41_234], values[77_777] = 9.0, -9.0
    thinned = thin_out(series := Series(np.arange(100_000), values))
    assert len(thinned) <= 2 * BUCKETS + 2
    assert {(41_234, 9.0), (77_777, -9.0)} <= set(thinned.by_step().items())
    assert (np.diff(thinned.steps) > 0).all()
    assert average(series).values.mean() == pytest.approx(values.mean(), abs=1e-3)


def test_a_page_of_many_lines_is_small_and_quick(out):
    write_lines(out / "training_logs.jsonl", make_logs(4000))
    write_report(out)
    started = time.perf_counter()
    write_report(out)
    assert time.perf_counter() - started < 1  # 0.05 s on a machine that does nothing else
    write_lines(out / "training_logs.jsonl", make_logs(100_000))
    page = read_page(out)
    assert "Running: step 100,000 of 900" in page
    assert len(page) < 250_000


def test_a_curve_over_decades_has_a_logarithmic_axis():
    series = Series(np.arange(1, 5), np.array([3.0, 0.3, 0.02, 0.004]))
    flat = Series(np.arange(1, 5), np.array([3.0, 2.0, 1.0, 0.5]))
    chart = draw_curves("loss", {"loss": series}, allow_log=True)
    assert chart.is_log
    assert [mark for mark in ("5", "1", "0.1", "0.01") if f">{mark}</text>" in chart.svg] == ["1", "0.1", "0.01"]
    for other in (draw_curves("loss", {"loss": series}), draw_curves("loss", {"loss": flat}, allow_log=True)):
        assert not other.is_log
        assert ">0</text>" in other.svg
    assert draw_curves("loss", {"loss": Series(np.array([1]), np.array([math.nan]))}) is None


@pytest.mark.parametrize(
    "values", [(0.0, 0.0), (-3.0, -3.0), (1e-12, 1e12), (5e-324, 1e-300), (1e300, -1e300), (0.1, 0.3)]
)
def test_no_curve_breaks_an_axis(values):
    for allow_log in (False, True):
        chart = draw_curves("x", {"x": Series(np.arange(len(values)), np.array(values))}, allow_log=allow_log)
        assert 2 <= chart.svg.count('class="grid"') <= 9
        assert "nan" not in chart.svg


def test_axis_numbers_are_round_and_short():
    assert [round_up(number) for number in (0.00012, 0.3, 1, 1.1, 5.5, 99)] == [0.0002, 0.5, 1, 2, 10, 100]
    assert [shorten(number) for number in (0, 2e-5, 1.5e-4, 0.25, 1200, 20_000, 3e6)] == [
        *("0", "2e-5", "1.5e-4", "0.25", "1,200", "20k", "3M")
    ]
    assert [format_duration(seconds) for seconds in (45, 700, 3600, 12_000, 200_000)] == [
        *("45 s", "12 min", "1 h", "3 h 20 min", "2 d 7 h")
    ]


def test_scores_logged_apart_from_the_loss_join_its_evaluation(out):
    lines = [{"step": 5, "eval_loss": 1.0}, {"step": 5, "eval_word_error": 0.5}, {"step": 9, "eval_word_error": 0.25}]
    write_lines(out / "training_logs.jsonl", lines)
    record = read_record(out)
    assert set(record.validation) == {"loss", "word_error"}
    assert set(record.scores) == {"word_error"}
    text = text_of(read_page(out))
    assert "best word error 0.25" in text
    assert re.search(r"step loss word error 5 1 best 0.5 9 0.25 best", text)
