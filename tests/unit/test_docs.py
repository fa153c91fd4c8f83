"""The documentation: it speaks to its reader, its links lead somewhere, and what it names exists."""

import ast
import importlib.util
import re

import pytest
from docs_text import NOT_RUN, PAGES, PROSE, ROOT, anchors, blocks, commands, links, name_of, sentences, why_not_run

from tuning.config.parse import build_config
from tuning.errors import UserError

MOST_SEMICOLONS, LEAST_ADDRESSED = 0.08, 0.12  # shares of all sentences
READER = re.compile(r"\b(you|your|yours|yourself|we)\b", flags=re.IGNORECASE)
CODE = {str(file.relative_to(ROOT)): file for file in sorted((ROOT / "tuning").rglob("*.py"))}

# Phrases that a reader stumbles over → what to write instead.
BANNED = {
    "is no number": "is NaN or infinite",
    "are no numbers": "are NaN or infinite",
    "anew": "again",
    "is said": "is printed",
    "are said": "are printed",
    "is told": "is printed, or: knows",
    "are told": "see",
    "settle": "decide",
    "beside its place": "in a temporary folder",
    "heed": "use",
}
# A card that an earlier version wrote is known by this line.
KEPT = "<!-- Written by vlm-tuning, and anew by every run"


def page_id(page) -> str:
    return name_of(page)


def test_few_sentences_have_a_semicolon_and_many_speak_to_the_reader():
    found = [sentence for page in PROSE for sentence in sentences(page)]
    assert sum(";" in sentence for sentence in found) <= MOST_SEMICOLONS * len(found)
    assert sum(bool(READER.search(sentence)) for sentence in found) >= LEAST_ADDRESSED * len(found)


def find_banned(text: str, phrase: str) -> list[str]:
    return re.findall(rf".*\b{phrase}(?:s|ed|d|ing)?\b.*", text, flags=re.IGNORECASE)


@pytest.mark.parametrize("phrase", BANNED)
def test_docs_are_in_plain_words(phrase):
    found = [f"{name_of(page)}: {line}" for page in PAGES for line in find_banned(page.read_text("utf-8"), phrase)]
    assert not found, f"write: {BANNED[phrase]}"


@pytest.mark.parametrize("phrase", BANNED)
def test_docstrings_and_messages_are_in_plain_words(phrase):
    texts = [
        (name, node.value)
        for name, file in CODE.items()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.startswith(KEPT)
    ]
    found = [f"{name}: {line.strip()}" for name, text in texts for line in find_banned(text, phrase)]
    assert not found, f"write: {BANNED[phrase]}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_are_named_exist(page):
    named = re.findall(
        r"`(?:pytest -s |python )?((?:tests|tuning|benchmarks|docs|fixtures)/[\w/.]+)", page.read_text("utf-8")
    )
    assert not [path for path in named if not path.endswith("/.peers/") and not (ROOT / path).exists()]


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        new |= {target for target in targets if target.suffix == ".md"} - reached
    assert set(PAGES) <= reached


def test_the_picture_of_the_rooms_names_files_that_exist():
    (picture,) = blocks(ROOT / "docs" / "architecture.md", "mermaid")
    rooms = re.findall(r'"<b>(\w+)</b><br>(.*)"', picture)
    assert {"config", "data", "model", "training"} <= {room for room, _ in rooms}
    for room, files in rooms:
        folder = ROOT / "tuning" / room
        assert folder.is_dir() or folder.with_suffix(".py").is_file()
        for name in re.findall(r"\w+", files.replace("<br>", " ")) if folder.is_dir() else ():
            assert (folder / f"{name}.py").is_file(), f"{room}/{name}"


def test_the_table_of_patches_names_functions_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?) \(`(.*?)`.*?\) \|", text, flags=re.MULTILINE)
    patches = {name for file in CODE.values() for name in re.findall(r"def (patch_\w+)", file.read_text("utf-8"))}
    assert patches <= {name for names, _ in rows for name in re.findall(r"\w+", names)}
    for names, file in rows:
        assert (ROOT / "tuning" / file).is_file(), file
        for name in re.findall(r"\w+", names):
            assert re.search(rf"(def|class) {name}\b", "".join(path.read_text("utf-8") for path in CODE.values())), name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_is_run_by_a_test_or_listed(page):
    started = ("vlm-tuning ", "accelerate launch ")  # what tests/end_to_end/test_docs_commands.py runs
    assert not [command for command in commands(page) if not why_not_run(command) and not command.startswith(started)]


def test_the_list_of_commands_that_are_not_run_is_current():
    every = [command for page in PAGES for command in commands(page)]
    assert not [beginning for beginning in NOT_RUN if not any(command.startswith(beginning) for command in every)]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_options", ROOT / "docs" / "generate_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_current(generator):
    assert generator.PAGE.read_text("utf-8") == generator.render(), f"run: {generator.COMMAND}"


def test_options_that_the_page_calls_refused_are_refused(generator):
    for name, (value, _) in generator.REFUSED.items():
        with pytest.raises(UserError, match=f"{name}: "):
            build_config({name: value})
