"""`vlm-tuning predict --server_url`: a served chat gives what `predict` gives, whatever happens to the server."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from child_runs import FORK
from PIL import Image
from predictions import flags_of, make_predict, read_lines
from served_models import MODEL, says, scripted_server, transformers_server
from two_processes import run_two

from tuning import cli
from tuning.serving import server as client

LIMIT = 8


@pytest.fixture(scope="module")
def served(models):
    with transformers_server(models["llava15"]) as url:
        yield url


@pytest.fixture
def predict(rows, tmp_path, capsys):
    run = make_predict(capsys, data_path=rows, output=tmp_path / "predictions.jsonl", max_new_tokens=LIMIT)
    return lambda url=None, **changes: run(**{"server_url": url, **changes})


def number_of(body) -> str:
    """A row's own word: the size and colour of its image."""
    part = next(part for part in body["messages"][-1]["content"] if part["type"] == "image_url")
    image = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
    return f"{image.size} {image.getpixel((0, 0))}"


def test_answers_scores_and_page_are_those_of_the_model_here(predict, served, models, rows, tmp_path):
    folder = models["llava15"]
    metrics = ["token_f1", "anls"]
    code, here, _ = predict(model_name_or_path=folder, output=tmp_path / "here.jsonl", metrics=metrics)
    assert code == 0
    code, lines, printed = predict(served, metrics=metrics)
    assert code == 0, printed.err
    assert all(line.pop("prompt") for line in here)
    assert lines == here
    assert len({line["prediction"] for line in lines}) > 1
    scores = [json.loads((tmp_path / f"{name}.scores.json").read_text()) for name in ("here", "predictions")]
    assert scores[0]["scores"] == scores[1]["scores"]
    assert scores[1]["models"] == {"prediction": f"{served}/models/{folder}"}
    pages = [(tmp_path / f"{name}.html").read_text() for name in ("here", "predictions")]
    assert pages[0] == pages[1].replace(f"{served}/models/", "")
    assert "Done: " in printed.out
    assert not list(tmp_path.glob(".*partial"))


def test_a_server_and_a_model_here_stand_side_by_side(predict, served, models, rows, tmp_path):
    folder = models["llava15"]
    code, lines, printed = predict(served, compare=folder, max_rows=3, metrics="token_f1")
    assert code == 0, printed.err
    assert [line["compared"] for line in lines] == [line["prediction"] for line in lines]
    other = tmp_path / "other.jsonl"
    code, others, printed = predict(model_name_or_path=folder, compare=served, max_rows=3, output=other)
    assert code == 0, printed.err
    assert [line["compared"] for line in others] == [line["prediction"] for line in lines]
    code, _, printed = predict(
        served, compare=served, compare_model="none", max_rows=3, output=tmp_path / "third.jsonl"
    )
    assert code == 1
    assert "the server answers 400: Server is pinned to" in printed.err


def test_many_requests_at_once_keep_the_order_of_rows(predict):
    all_at_once = threading.Barrier(16, timeout=60)

    def answer(body):
        all_at_once.wait()
        word = number_of(body)
        time.sleep(0.2 * (len(word) % 4))  # the later ones may come first
        return says(word)

    with scripted_server(lambda body: says(number_of(body))) as url:
        _, one_by_one, _ = predict(url, requests_at_once=1)
    with scripted_server(answer) as url:
        code, lines, printed = predict(url, requests_at_once=16, overwrite="true")
    assert code == 0, printed.err
    assert lines == one_by_one
    assert [line["index"] for line in lines] == list(range(16))


@pytest.mark.parametrize("fault", [429, 500, 503, "hang"])
def test_a_server_that_recovers_is_asked_again(predict, fault):
    failed = set()

    def answer(body):
        word = number_of(body)
        if word in failed or len(failed) > 2:
            return says(word)
        failed.add(word)
        if fault == "hang":
            time.sleep(1.5)
            return says("late")
        return fault, {"error": {"message": "try again"}}

    with scripted_server(answer) as url:
        code, lines, printed = predict(url, request_timeout=1 if fault == "hang" else 600)
    assert code == 0, printed.err
    assert len(failed) > 2
    assert all(re.match(r"\(\d+, \d+\) ", line["prediction"]) for line in lines)


def test_a_server_that_hangs_is_left_after_some_tries(predict, monkeypatch):
    monkeypatch.setattr(client, "RETRIES", 1)
    asked = []

    def answer(body):
        asked.append(time.monotonic())
        time.sleep(3)
        return says("late")

    with scripted_server(answer) as url:
        code, _, printed = predict(url, max_rows=1, request_timeout=1)
    assert (code, len(asked)) == (1, 2)
    assert f"row 0: the server {url} cannot be reached: no answer in time. Raise request_timeout" in printed.err


def test_answers_are_kept_when_the_server_stays_away_and_only_the_others_are_asked_for(predict, monkeypatch, tmp_path):
    monkeypatch.setattr(client, "RETRIES", 1)
    asked, broken = [], [True]

    def answer(body):
        asked.append(number_of(body))
        return (500, {"error": "out of memory"}) if broken[0] and len(asked) > 6 else says(asked[-1])

    with scripted_server(answer) as url:
        code, lines, printed = predict(url, requests_at_once=2, on_bad_row="skip")
        assert (code, lines) == (1, [])
        assert re.search(r"Error: .*rows.jsonl, row \d+: the server answers 500: out of memory", printed.err)
        assert "Run the same command again" in printed.err
        (partial,) = tmp_path.glob(".*partial")
        kept = len(read_lines(partial))
        assert kept >= 5
        broken[0] = False
        asked.clear()
        code, lines, _ = predict(url, requests_at_once=2, on_bad_row="skip")
        assert code == 0
        assert len(asked) == 16 - kept
        assert [line["index"] for line in lines] == list(range(16))
        predict(url, on_bad_row="skip", metrics="token_f1")  # only scores
        assert len(asked) == 16 - kept
        code, _, printed = predict(url, on_bad_row="skip", request_options='{"seed": 1}')
        assert code == 1
        assert f"holds answers of {url}/models/{MODEL}: another model, other rows or other settings" in printed.err


def test_a_killed_command_goes_on(rows, tmp_path):
    asked, go_on = [], threading.Event()

    def answer(body):
        asked.append(number_of(body))
        if len(asked) > 5 and not go_on.is_set():
            go_on.wait(60)
        return says(asked[-1])

    def child(words):
        sys.stderr = open(tmp_path / "said.txt", "w", buffering=1)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(cli.main(words))

    with scripted_server(answer) as url:
        options = {"server_url": url, "data_path": rows, "output": tmp_path / "out.jsonl", "requests_at_once": 3}
        words = ["predict", *flags_of(options)]
        for stop, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
            already = len(asked)
            process = FORK.Process(target=child, args=(words,))
            process.start()
            while len(asked) < max(8, already + 3):
                assert process.is_alive()
                time.sleep(0.1)
            os.kill(process.pid, stop)
            process.join(60)
            said = (tmp_path / "said.txt").read_text()
            assert process.exitcode == code, said
            assert stop == signal.SIGKILL or "5 answers are kept. Run the same command again to continue." in said
        go_on.set()
        asked.clear()
        assert cli.main(words) == 0
    assert len(asked) == 11
    assert len(read_lines(tmp_path / "out.jsonl")) == 16


def test_a_row_that_the_server_refuses_ends_the_command_or_is_written_down(predict):
    def answer(body):
        word = number_of(body)
        if word.startswith("(90, 30) (220"):
            return 400, {"error": {"message": "the image is too large", "type": "BadRequestError"}}
        return says("" if word.startswith("(30") else f"\n {word} ")

    with scripted_server(answer) as url:
        code, _, printed = predict(url)
        assert code == 1
        assert "row 4: the server answers 400: the image is too large" in printed.err
        assert "Correct the row, or set on_bad_row skip." in printed.err
        code, lines, printed = predict(url, on_bad_row="skip")
    assert code == 0
    assert [line["row"] for line in lines if "error" in line] == [4]
    assert lines[4]["error"].endswith("the server answers 400: the image is too large.")
    assert "1 rows were left out" in printed.out
    assert {line["prediction"] for line in lines if "error" not in line} >= {"", "(40, 40) (220, 20, 20)"}


def test_a_bad_row_is_one_whoever_answers(predict, rows):
    lines = rows.read_text().splitlines()
    lines[4] = lines[4].replace("4.png", "none.png")
    path = rows.with_name("bad_for_server.jsonl")
    path.write_text("\n".join(lines) + "\n")
    with scripted_server(lambda body: says("yes")) as url:
        code, _, printed = predict(url, data_path=path)
        assert code == 1
        assert "row 4, field 'images', image 0" in printed.err
        code, lines, _ = predict(url, data_path=path, on_bad_row="skip")
    assert code == 0
    assert ["error" in line for line in lines] == [number == 4 for number in range(16)]


def test_what_is_wrong_with_the_server_is_said_before_anything_is_written(predict, tmp_path, monkeypatch):
    code, _, printed = predict("http://127.0.0.1:9/v1")
    assert code == 1
    assert "the server http://127.0.0.1:9/v1 cannot be reached: " in printed.err
    assert "Start the server, or correct the address." in printed.err
    with scripted_server(lambda body: says("yes"), models=("base", "tuned")) as url:
        code, _, printed = predict(url)
        assert code == 1
        assert "which model to ask? it has base, tuned. Name one with --model." in printed.err
        (tmp_path / "other").mkdir()
        code, lines, _ = predict(url, model="tuned", max_rows=1, output=tmp_path / "other" / "out.jsonl")
        assert (code, lines[0]["prediction"]) == (0, "yes")
    with scripted_server(lambda body: (404, {"detail": "no model tuned"})) as url:
        code, _, printed = predict(url, model="tuned")
        assert code == 1
        assert f"404: no model tuned. Is tuned the model's name there, and {url} the address?" in printed.err
    with scripted_server(lambda body: (200, {"choices": []})) as url:
        code, _, printed = predict(url)
        assert code == 1
        assert "does not answer in the form of OpenAI's API" in printed.err
    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: None)
    code, _, printed = predict(url)
    assert code == 1
    assert 'pip install "vlm-tuning[server]"' in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_options_without_effect_are_named(predict, models):
    folder = models["llava15"]
    for options, words in (
        ({}, "model_name_or_path: is required, or server_url"),
        ({"server_url": "http://x/v1", "model_name_or_path": folder}, "name two models"),
        ({"server_url": "localhost:8000"}, "server_url localhost:8000: is not an address"),
        ({"server_url": "http://x/v1", "dtype": "float32", "batch_size": 2}, "dtype, batch_size: has no effect"),
        ({"model_name_or_path": folder, "request_options": '{"seed": 1}'}, "request_options: has no effect"),
        ({"model_name_or_path": folder, "model": "x"}, "model: has no effect"),
        ({"server_url": "http://x/v1", "compare": folder, "compare_model": "x"}, "compare_model: has no effect"),
    ):
        code, _, printed = predict(**options)
        assert code == 1
        assert words in printed.err


def test_one_process_asks_the_server_before_several_answer_here(models, rows, tmp_path):
    asked = []

    def answer(body):
        asked.append(number_of(body))
        return says(f"{len(asked)}")

    options = {"model_name_or_path": models["llava15"], "data_path": rows, "output": tmp_path / "two.jsonl"}
    options |= {"max_rows": 2, "max_new_tokens": LIMIT}
    with scripted_server(answer) as url:
        words = ["predict", *flags_of(options | {"compare": url})]
        codes, said, _ = run_two(words, tmp_path, {}, lambda rank: None)
        assert codes == [1, 1]
        assert f"{url}/models/{MODEL}: 2 rows are left, and one process asks a server, not 2." in "".join(said)
        assert asked == []
        assert cli.main(words) == 0
        words += ["--accelerate_launch_args", json.dumps({"num_processes": 2}), "--overwrite", "true"]
        done = subprocess.run([sys.executable, "-m", "tuning.cli", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "two.jsonl")
    assert sorted(line["compared"] for line in lines) == ["3", "4"]
    assert all(line["prediction"] for line in lines)
    assert done.stdout.count("Done: ") == 1


def test_tools_variables_and_options_reach_the_server(predict, tmp_path):
    asked = []

    def answer(body):
        asked.append(body)
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
        return 200, {"choices": [{"message": {"content": None, "tool_calls": [call]}}]}

    call = {"function": {"name": "look", "arguments": {"at": "sea"}}}
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [{"type": "text", "text": "Now"}, {"type": "image"}]},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "I must look."},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "It is blue.", "weight": 0},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "It is grey."},
    ]
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    row = {"messages": messages, "images": ["clear.png"], "tools": [tool], "chat_template_kwargs": {"think": True}}
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps(row) + "\n")
    extra = {"request_options": '{"add_special_tokens": true, "max_tokens": null}', "date_string": "1 May 2026"}
    with scripted_server(answer, pages={"/version": {"version": "0.30"}}) as url:
        code, lines, printed = predict(url, data_path=path, **extra)
    assert code == 0, printed.err
    (body,) = asked
    image = body["messages"][1]["content"][1]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).getpixel((0, 0)) == (255, 255, 255)
    body["messages"][1]["content"][1] = "the image"
    written = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    assert body == {
        "model": MODEL,
        "temperature": 0,
        "add_special_tokens": True,
        "tools": [tool],
        "tool_choice": "none",
        "chat_template_kwargs": {"date_string": "1 May 2026", "think": True},
        "messages": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": [{"type": "text", "text": "Now"}, "the image"]},
            {"role": "assistant", "content": None, "tool_calls": [written], "reasoning_content": "I must look."},
            {"role": "tool", "content": "blue", "tool_call_id": "call00001"},
            {"role": "assistant", "content": "It is blue."},
            {"role": "user", "content": "And now?"},
        ],
    }
    assert lines[0]["prediction"] == json.dumps({"name": "look", "arguments": '{"at": "sky"}'})
    assert lines[0]["reference"] == "It is grey."


def test_an_image_is_sent_as_it_is_stored_unless_training_changes_it(tmp_path):
    from tuning.data.images import encode_image, load_image

    picture = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    turned = picture.getexif()
    turned[0x0112] = 6
    kept = {"plain.png": {}, "plain.jpg": {"quality": 80}, "plain.webp": {"lossless": True}}
    changed = {"turned.jpg": {"exif": turned}, "plain.bmp": {}, "plain.gif": {}}
    for name, options in (kept | changed).items():
        picture.save(tmp_path / name, **options)
    picture.convert("CMYK").save(tmp_path / "print.jpg")
    picture.convert("P").save(tmp_path / "few.png")
    for path in sorted(tmp_path.iterdir()):
        head, _, data = encode_image(path.name, tmp_path, "").partition(";base64,")
        content = base64.b64decode(data)
        assert (content == path.read_bytes()) == (path.name in kept)
        assert Image.open(io.BytesIO(content)).get_format_mimetype() == head.removeprefix("data:")
        assert list(Image.open(io.BytesIO(content)).convert("RGB").getdata()) == list(
            load_image(path.name, tmp_path, "").getdata()
        )
    assert encode_image(picture, None, "").startswith("data:image/png;base64,")
