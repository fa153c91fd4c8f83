"""The page of a check, opened in a real browser. What a reader sees is read from the parsed page, not from the HTML."""

import html
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tuning.checking.report import IMAGE, SUPERVISED, TEXT, Problem, Report, SampleRow, Token
from tuning.pages.check_page import render_page

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="
LONG = "a_name_without_any_blank_" * 12

# Runs in the page: presses keys, and reports to the window around it what it saw.
PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
addEventListener("load", () => {
  const box = document.querySelector(".tokens");
  const status = () => document.getElementById(box.getAttribute("aria-describedby")).textContent;
  const seen = [status()];
  const keys = ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home"];
  for (const key of keys) {
    box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    seen.push(status());
  }
  const marked = document.querySelectorAll(".current").length;
  const supervised = box.querySelector("u");
  supervised.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  const hovered = status();
  box.dispatchEvent(new MouseEvent("mouseleave"));
  const left = status();
  supervised.click();
  const wide = [...document.querySelectorAll("body *")].filter((element) => {
    const scrolls = element.closest(".tokens, .lines");
    return (!scrolls || scrolls === element) && element.getBoundingClientRect().right > innerWidth + 1;
  }).map((element) => element.outerHTML.slice(0, 80));
  const width = document.documentElement.scrollWidth;
  const underlined = getComputedStyle(supervised).textDecorationLine;
  const stops = document.querySelectorAll("article [tabindex], article a, article button").length;
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  const headings = [...document.querySelectorAll("h1, h2, h3, h4")].map((element) => +element.tagName[1]);
  const images = [...document.images].map((image) => image.alt && image.naturalWidth);
  parent.postMessage({ seen, marked, hovered, left, clicked: status(), width, inner: innerWidth, wide, underlined,
    stops, ids, headings, images, text: box.textContent, errors }, "*");
});
</script>"""
FRAME = """<!doctype html><body><script>
addEventListener("message", (event) => { document.body.dataset.seen = JSON.stringify(event.data); });
</script><iframe src="page.html" width="360" height="800" style="border: 0"></iframe></body>"""


def make_sample(row: int, *, num_image_tokens: int = 729) -> SampleRow:
    tokens = [Token(1, "<s>", TEXT), Token(90, "User:\n", TEXT)]
    tokens += [Token(32000, "<image>", IMAGE)] * num_image_tokens
    tokens += [
        Token(7, "  What\tis", TEXT),
        Token(8, NASTY, TEXT),
        Token(13, "\n\n", TEXT),
        Token(9, "\ud800\x00", TEXT),
    ]
    tokens += [Token(345, "It is", SUPERVISED), Token(346, " red.\n", SUPERVISED), Token(2, "", SUPERVISED)]
    return SampleRow(row, f"{LONG}{NASTY}.jsonl", "", ["It is red.\n"], tokens, [PIXEL, PIXEL])


def make_problems() -> list[Problem]:
    missing = [Problem("missing_image", row, "images[0]", f"{NASTY} {row}", "a.jsonl") for row in range(14)]
    return [Problem("no_answer", 3, f"messages[{NASTY}]", LONG, "a.jsonl"), *missing]


@pytest.fixture
def report():
    random = np.random.default_rng(0)
    image, supervised = random.integers(0, 3, 1000) * 729, random.geometric(0.02, 1000)
    text = random.geometric(0.01, 1000) + supervised
    return Report(
        model=f"org/{NASTY}",
        data=f"{LONG}{NASTY}.jsonl",
        totals={"rows": 1234, "image_tokens": 1234567},
        problems=make_problems(),
        lengths={"total": text + image, "text": text, "image": image, "supervised": supervised},
        image_sizes=Counter({(640, 480): 900, (4032, 3024): 99, (1, 1): 1} | {(n, 500): 2 for n in range(200, 230)}),
        padding={"as_given": 0.4251, NASTY: 1.0},
        estimates={"tokens_per_epoch": (2345678.0, NASTY), "peak_memory_gb_per_device": (41.2345, "of parameters")},
        settings={"trains": f"language model {NASTY}", "targets": f"q_proj\n  {LONG}\nv_proj"},
        warnings=[NASTY, LONG],
        samples=[make_sample(3), make_sample(17, num_image_tokens=1), make_sample(17, num_image_tokens=0)],
    )


@pytest.fixture
def empty():
    return Report("m", "d", {"rows": 0}, [], {"total": np.array([], int)}, Counter(), {}, {}, {}, [], [])


def write_framed(report: Report, folder):
    """A page 360 pixels wide, as a window cannot be that narrow, with the probe first."""
    page = render_page(report).replace("<title>", PROBE + "<title>", 1)
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME, encoding="utf-8")
    return folder / "frame.html"


@pytest.fixture
def look(open_page, report, tmp_path):
    """What the probe sees of the report's page."""
    dom, console = open_page(write_framed(report, tmp_path))
    assert console == []
    return json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom)[1]))


def text_of(dom: str) -> str:
    body = re.sub(r"<(script|style)>.*?</\1>", "", dom, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


def test_page_shows_everything_and_injects_nothing(open_page, report, tmp_path):
    path = tmp_path / "check.html"
    path.write_text(render_page(report), encoding="utf-8")
    dom, console = open_page(path)
    assert console == []
    assert dom.count("<script") == 1
    assert "<img src=" in dom
    assert re.findall(r"<[^>]*\son[a-z]+=[^>]*>", re.sub(r'"[^"]*"', '""', dom)) == []
    text = re.sub(r"\s+", " ", text_of(dom))
    header, problems, cost, summary, samples = 1 + 2, 1 + 10, 2, 2, 3 * 2
    assert text.count(NASTY) == header + problems + cost + summary + samples
    for shown in (
        "15 problems in 14 of 1,234 rows",
        "image tokens 1,234,567",
        "missing image 14",
        "and 4 more in check.json",
        "tokens per epoch 2,345,678",
        "peak memory GB per device 41.2",
        "as given 42.5%",
        "640 × 480 0.31 900 85%",
        "and 25 more sizes",
        "729 image tokens",
        " 1 image token ",
    ):
        assert shown in text, shown
    assert dom.count('role="img"') == 5
    assert "1,234 rows" in re.search(r"<title>(.*?)</title>", dom)[1]


def test_fits_a_phone_and_answers_to_keys_and_mouse(look):
    assert look["errors"] == []
    assert look["wide"] == []
    assert look["width"] <= look["inner"] == 360
    total = 729 + 9
    assert look["seen"][0].startswith("Point at a token")
    assert look["seen"][1:] == [
        f'token 1 of {total}: id 1, "<s>", text',
        f'token 2 of {total}: id 90, "User:\\n", text',
        f"tokens 3 to 731 of {total}: 729 image tokens, id 32000",
        f'token 732 of {total}: id 7, "  What\\tis", text',
        f"tokens 3 to 731 of {total}: 729 image tokens, id 32000",
        f'token {total} of {total}: id 2, "", supervised',
        f'token {total} of {total}: id 2, "", supervised',
        f'token 1 of {total}: id 1, "<s>", text',
    ]
    assert look["marked"] == 1
    assert look["hovered"] == look["clicked"] == f'token 736 of {total}: id 345, "It is", supervised'
    assert look["left"] == look["seen"][-1]
    assert look["text"] == f"<s>User:\n729 image tokens  What\tis{NASTY}\n\n\\ud800␀It is red.\n"


def test_page_is_accessible(look):
    assert look["underlined"] == "underline"
    assert look["stops"] == 3, "one stop of the tab key for each conversation"
    assert len(look["ids"]) == len(set(look["ids"]))
    assert look["headings"][0] == 1
    assert look["headings"].count(1) == 1
    assert all(after <= before + 1 for before, after in zip(look["headings"], look["headings"][1:], strict=False))
    assert look["images"] == [1] * 6


def test_page_of_an_empty_check(open_page, empty, tmp_path):
    (tmp_path / "check.html").write_text(render_page(empty), encoding="utf-8")
    dom, console = open_page(tmp_path / "check.html")
    assert console == []
    text = text_of(dom)
    for shown in ("No rows", "None were found", "no good rows to measure", "no images", "no good row to show"):
        assert shown in text, shown


@pytest.mark.parametrize(
    ("rows", "problems", "verdict"),
    [
        (1, 0, "No problems in 1 row"),
        (1234, 0, "No problems in 1,234 rows"),
        (1, 1, "1 problem in 1 of 1 row"),
        (1234, 2, "2 problems in 2 of 1,234 rows"),
    ],
)
def test_verdict_is_the_heading(empty, rows, problems, verdict):
    page = render_page(replace(empty, totals={"rows": rows}, problems=make_problems()[:problems]))
    assert f"<h1>{verdict}</h1>" in page


@pytest.mark.parametrize("values", [[0], [0, 0], [5], [7] * 9, [1, 2], [0, 10**9], [31, 64, 95], list(range(33))])
def test_histogram_counts_every_value_once(empty, values):
    page = render_page(replace(empty, lengths={"total": np.array(values)}))
    bars = re.findall(r"<g><title>(.*?): ([\d,]+) rows?</title>", page)
    assert sum(int(count.replace(",", "")) for _, count in bars) == (len(values) if any(values) else 0)
    assert "nan" not in page
    assert [float(place) for place in re.findall(r' x="([-\d.]+)"', page) if not 0 <= float(place) <= 360] == []


def test_many_tokens_stay_small(empty):
    tokens = [Token(12345, " word", SUPERVISED)] * 5000
    assert len(render_page(replace(empty, samples=[SampleRow(0, "f", "", [], tokens)]))) < 200_000
