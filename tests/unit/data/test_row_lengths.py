"""Lengths of rows: what they count, and what they leave untouched."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny_models import build_processor

from tuning.data.chat_template import ChatFormat
from tuning.data.encode import Encoder
from tuning.data.open_source import open_source
from tuning.data.row_lengths import RowLengths
from tuning.data.sources import Mixture, Source

SIZES = [(40, 40), (300, 90), (30, 180), (500, 400), (64, 64)]


@pytest.fixture
def source(tmp_path, monkeypatch) -> Source:
    """Two files of 70 and 10 rows with no, one or two images, of which only the headers are there; row 5 is bad."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 50).save(tmp_path / f"{number}.png")
    sources = []
    for name, numbers in (("a", range(70)), ("b", range(70, 80))):
        lines = []
        for number in numbers:
            images = [f"{(number + i) % len(SIZES)}.png" for i in range(number % 3)]
            question = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is it?"}]
            answer = {"role": "assistant", "content": [{"type": "text", "text": "No. " * (1 + number * 13 % 37)}]}
            images = ["none.png"] * len(images) if number == 5 else images
            lines.append(json.dumps({"messages": [{"role": "user", "content": question}, answer], "images": images}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        sources.append(open_source(str(tmp_path / f"{name}.jsonl"), text_field="messages", image_field="images"))
    return Source([file for source in sources for file in source.files])


def encoder_of(layout: str, **options) -> Encoder:
    processor = build_processor(layout)
    return Encoder(processor, ChatFormat(processor), **{"max_seq_length": 100_000, **options})


def cut_off_pixels(folder) -> None:
    for file in folder.glob("*.png"):
        file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize("layout", ["granite_vision", "llava15", "mllama"])
@pytest.mark.parametrize("workers", [0, 2])
def test_exact_lengths_are_those_of_encoded_rows(layout, workers, source, tmp_path, monkeypatch):
    monkeypatch.setattr("tuning.data.row_lengths.FEW_CHUNKS", 0)
    encoder = encoder_of(layout)
    rows = [79, 3, 4, 70, 0, 3, 41]
    expected = [len(encoder.encode(source[row]).sequence["input_ids"]) for row in rows]
    cut_off_pixels(tmp_path)
    lengths = RowLengths(source, encoder, exact=True, workers=workers)
    assert lengths(rows).tolist() == expected
    assert lengths([5]).tolist() == [1]
    whole = RowLengths(source, encoder, exact=True, workers=workers)
    shares = [RowLengths(source, encoder, exact=True) for _ in range(2)]
    for rank, share in enumerate(shares):
        share.measure_all(lambda numbers: numbers, rank=rank, world=2, show=False)
        assert 0 in share.known[:, 0]
    whole.measure_all(lambda numbers: numbers, show=False)
    assert (shares[0].known + shares[1].known).tolist() == whole.known.tolist()
    assert whole(rows).tolist() == expected


@pytest.mark.parametrize("layout", ["granite_vision", "llava15", "mllama"])
def test_estimates_put_rows_in_nearly_the_same_order(layout, source, tmp_path):
    cut_off_pixels(tmp_path)
    every = range(len(source))
    exact, estimated = (RowLengths(source, encoder_of(layout), exact=exact)(every) for exact in (True, False))
    assert estimated[5] == 1
    ranks = [np.argsort(np.argsort(lengths)) for lengths in (exact, estimated)]
    assert np.corrcoef(ranks)[0, 1] > 0.8


def test_a_row_is_measured_once(source, monkeypatch):
    lengths = RowLengths(source, encoder_of("llava15"))
    first = lengths([3, 70])
    monkeypatch.setattr("tuning.data.row_lengths.read_chunks", None)
    assert lengths([70, 3, 3]).tolist() == [first[1], first[0], first[0]]


@pytest.mark.parametrize("exact", [False, True])
def test_rows_that_are_left_out_count_one(source, exact):
    encoder = encoder_of("granite_vision", max_seq_length=150, overlong_rows="drop")
    whole = RowLengths(source, encoder_of("granite_vision"), exact=exact)(range(80))
    found = RowLengths(source, encoder, exact=exact)(range(80))
    assert (whole > 150).any()
    assert found.tolist() == np.where(whole > 150, 1, whole).tolist()


def test_rows_of_a_mixture_are_found_in_their_file(source):
    sources = [Source([file]) for file in source.files]
    mixture = Mixture(sources, [1.0, 1.0])
    assert len(mixture) == 140
    for index in (0, 69, 70, 79, 80, 139):
        file, number = mixture.locate(index)
        row = mixture[index]
        assert (mixture.files[file].name, number) == (row.file, row.number)
    alone = RowLengths(sources[1], encoder_of("llava15"))(range(10)).tolist()
    assert RowLengths(mixture, encoder_of("llava15"))(range(70, 140)).tolist() == alone * 7
