"""The corpus: what is read, how it is split, and the yardsticks by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actuary import BadInput
from models.corpus import Corpus, Ids, _bigram_nats, _unigram_nats, padded_tokenizer


def written(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_the_default_corpus_is_the_standard_library(tmp_path):
    corpus = Corpus.read(cache=tmp_path)
    assert corpus.train_bytes > 5e6
    assert 0.02 < corpus.held_out_bytes / (corpus.train_bytes + corpus.held_out_bytes) < 0.2
    assert any("class JSONDecoder" in text for text in (*corpus.train, *corpus.held_out))
    assert corpus.sha256 == Corpus.read(cache=tmp_path).sha256


def test_a_document_stays_on_its_side_when_another_comes(tmp_path):
    files = {f"{i}.txt": f"document {i} " * 50 for i in range(200)}
    before = Corpus.read([written(tmp_path / "a", files)])
    after = Corpus.read([written(tmp_path / "a", {"more.txt": "one more " * 50})])
    assert set(before.held_out) <= set(after.held_out)
    assert set(before.train) <= set(after.train)
    assert before.sha256 != after.sha256


def test_few_documents_are_split_within(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    corpus = Corpus.read([written(tmp_path, {"one.txt": text}) / "one.txt"])
    assert corpus.train[0] + corpus.held_out[0] == text
    assert len(corpus.held_out[0]) == len(text) // 20


def test_two_folders_of_one_name_are_both_read(tmp_path):
    a, b = (written(tmp_path / side / "src", {"x.txt": f"{side} side\n" * 200}) for side in ("left", "right"))
    text = "".join((corpus := Corpus.read([a, b, a])).train) + "".join(corpus.held_out)
    assert (text.count("left side"), text.count("right side")) == (200, 200)


def test_files_that_are_not_text_are_left_out_of_folders_and_refused_by_name(tmp_path, caplog):
    folder = written(tmp_path, {"a.txt": "hello " * 100, "b.bin": b"\xff\xfe\x00", ".git/x": "hidden", "empty.txt": ""})
    corpus = Corpus.read([folder])
    assert "left out 1 files" in caplog.text
    assert "hidden" not in "".join(corpus.train)
    with pytest.raises(BadInput, match="is not UTF-8 text"):
        Corpus.read([folder / "b.bin"])


@pytest.mark.parametrize("content", [None, {}, {"empty.txt": "  \n"}])
def test_nothing_to_read_is_said(tmp_path, content):
    path = tmp_path / "there"
    if content is not None:
        path.mkdir()
        written(path, content)
    with pytest.raises(BadInput, match="does not exist" if content is None else "no text in"):
        Corpus.read([path])


def test_a_vocabulary_below_the_bytes_is_refused(corpus):
    with pytest.raises(BadInput, match="vocab 100 is too small: a byte-level vocabulary has at least 257"):
        corpus.tokenizer(100)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_its_ids(corpus, text):
    tokenizer = corpus.tokenizer(300)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_ids_stand_for_the_whole_corpus_and_are_cached(corpus):
    ids, tokenizer = corpus.ids(300), corpus.tokenizer(300)
    assert tokenizer.decode(ids.held_out.tolist()) == "".join(corpus.held_out)
    assert ids.train_bytes == corpus.train_bytes
    assert ids.held_out[0] == tokenizer.token_to_id("<|endoftext|>")
    assert ids.frequency(300).sum() == pytest.approx(1)
    assert ids.frequency(300).min() > 0
    cached = list(corpus.cache.rglob("train.npy"))
    before = [path.stat().st_mtime_ns for path in cached]
    corpus.ids(300)
    assert [path.stat().st_mtime_ns for path in cached] == before


def test_a_small_corpus_fills_a_large_vocabulary_with_entries_no_text_has(corpus):
    tokenizer = padded_tokenizer(corpus.tokenizer(300), 5000)
    assert tokenizer.get_vocab_size() == 5000
    assert max(tokenizer.encode("".join(corpus.train)).ids) < 300


def test_yardsticks_by_hand():
    ids = Ids(np.array([0, 1, 1, 2], np.int32), np.array([0, 1, 1], np.int32), train_bytes=4, held_out_bytes=3)
    p = (2 + 0.5) / (4 + 1.5)
    assert _unigram_nats(ids, 3) == pytest.approx(-2 * math.log(p))
    # After 0 came 1 once of one; after 1 came 1 once of two; the unigram counts as one more.
    expected = -math.log((1 + p) / (1 + 1)) - math.log((1 + p) / (2 + 1))
    assert _bigram_nats(ids, 3, weight=1.0) == pytest.approx(expected)


def test_yardsticks_come_in_the_order_that_they_know(corpus):
    figures = corpus.yardsticks(300)
    assert figures["bigram"] < figures["unigram"] < 8
    assert 0 < figures["zlib"] < 8
