"""Chats of several turns and pictures: a server of transformers answers them as `predict` does."""

import json

import pytest
from architectures.checkpoints import save
from PIL import Image
from served_models import transformers_server

from tuning import cli


def say(role, *parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Rows with a system message, two turns, two pictures of other sizes and formats, and none; None is a picture."""
    folder = tmp_path_factory.mktemp("chats")
    for name, size in (("0.png", (60, 40)), ("1.jpg", (40, 90)), ("2.webp", (64, 64))):
        picture = Image.linear_gradient("L").resize(size).convert("RGB")
        picture.paste("red", (0, 0, 20, 20))
        picture.save(folder / name)
    asked = [say("system", "Be short."), say("user", None, "What is it?"), say("assistant", "A cat.")]
    rows = [
        ([*asked, say("user", "And here?", None, "Really?"), say("assistant", "Yes.")], ["0.png", "1.jpg"]),
        ([say("user", "Compare: ", None, None), say("assistant", "No.")], ["1.jpg", "2.webp"]),
        ([say("user", "No picture."), say("assistant", "No.")], []),
    ]
    lines = [json.dumps({"messages": messages, "images": images}) + "\n" for messages, images in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


def test_a_served_chat_gives_what_predict_gives(chats, tmp_path, capsys):
    model = tmp_path / "model"
    save("qwen2_5_vl", model)
    rows = ["--data_path", str(chats), "--max_new_tokens", "12"]
    assert (
        cli.main(["predict", "--model_name_or_path", str(model), "--output", str(tmp_path / "here.jsonl"), *rows]) == 0
    )
    with transformers_server(model) as url:
        assert cli.main(["predict", "--server_url", url, "--output", str(tmp_path / "there.jsonl"), *rows]) == 0
        assert cli.main(["verify-serving", "--server_url", url, "--model_name_or_path", str(model), *rows]) == 0
    here, there = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("here", "there")
    )
    assert [line | {"prompt": ""} for line in there] == [line | {"prompt": ""} for line in here]
    assert len({line["prediction"] for line in there}) == 3
    assert capsys.readouterr().out.count("the same  ") == 3
