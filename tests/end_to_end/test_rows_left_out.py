"""What a run leaves out of the data is counted, said and written down."""

import json

import pytest

import tuning


@pytest.mark.parametrize("layout", ["llava15", "granite_vision"])
def test_further_images_are_counted_and_said(layout, make_options, rows, tmp_path, capsys):
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which colour?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]}
    data = rows.parent / f"two_images_{layout}.jsonl"
    data.write_text(json.dumps({**row, "images": ["0.png", "1.png"]}) + "\n")
    tuning.train(make_options(layout, training_data_path=str(data), num_train_epochs=1))
    assert "Images left out because only the first image is used: 1." in capsys.readouterr().out


def test_overlong_rows_are_counted_said_and_named(make_options, rows, tmp_path, capsys):
    limit = {"max_seq_length": 60, "overlong_rows": "drop", "num_train_epochs": 2}
    result = tuning.train(make_options("llava15", **limit))
    skipped = [json.loads(line) for line in (result.model_dir / "skipped_rows.jsonl").read_text().splitlines()]
    assert f"{len(skipped)} rows were left out" in capsys.readouterr().out
    assert 0 < len(skipped) < 16
    assert len({entry["row"] for entry in skipped}) == len(skipped)  # once, not once an epoch
    for entry in skipped:
        assert (list(entry), entry["field"]) == (["row", "field", "reason"], "messages")
        assert entry["reason"].startswith(f"{rows}, row {entry['row']}, field 'messages': ")
        assert "tokens are more than max_seq_length 60." in entry["reason"]
