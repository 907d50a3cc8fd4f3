"""data/tokenized.py: a text and shards as ids, their bytes, what is held out. No network."""
import json
from collections import Counter

import pytest
import torch
from checks import raises_one_line

from data import smollm, text, tokens
from data.tokenized import open_text

WORDS = "river mountain valley forest lake thou art hither café".split()


def settings(dataset, tokenizer="bpe:280", max_bytes=None):
    return dict(dataset=str(dataset), tokenizer=str(tokenizer), max_bytes=max_bytes)


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    path = tmp_path_factory.mktemp("play") / "play.txt"
    path.write_text("\n\n".join(f"{word.upper()}:\n{i} times the {word}, {word[::-1]}!" for i in range(120)
                                for word in WORDS))
    return path


def document(i):
    return f"Document {i}: the {WORDS[i % 9]} and the {WORDS[i // 9 % 9]} of year {i}."


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of three shards with 1,200 documents, of which about six are held out."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        lines = [json.dumps({"text": document(i)}) for i in range(400 * shard, 400 * shard + 400)]
        (folder / f"part-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("tokenizer, size", [("bytes", 256), ("bpe:280", 280), ("sentencepiece:320", 320)])
def test_a_text(play, tokenizer, size):
    """Every part comes back byte for byte, and the sizes of its ids add up to its bytes."""
    opened, corpus = open_text(settings(play, tokenizer)), text.load(str(play))
    assert opened.vocab_size == len(opened.sizes) == opened.tokenizer.size == size and opened.files == []
    assert opened.test is None or corpus.test is not None
    for name in ("train", "val", "test"):
        ids, data = getattr(opened, name), getattr(corpus, name)
        assert (ids is None) == (data is None)
        if ids is not None:
            assert ids.dtype == torch.int32 and int(ids.max()) < size
            assert opened.tokenizer.decode_bytes(ids.tolist()) == bytes(data.tolist())
            assert int(opened.sizes[ids.long()].sum()) == len(data)
    assert opened.rows == len(opened.train) and (tokenizer == "bytes" or len(opened.train) < len(corpus.train))
    assert f"{size:,} ids" in opened.source and opened.tokenizer.name in opened.source
    again = open_text(settings(play, tokenizer))
    assert again.tokenizer.fingerprint == opened.tokenizer.fingerprint and torch.equal(again.val, opened.val)
    x, y = opened.batches(4, 16, "random", 3, "cpu").next()
    assert x.shape == (4, 16) and y.shape == (4, 16, 1) and torch.equal(x[:, 1:], y[:, :-1, 0])
    lines = opened.train.unfold(0, 16, 1).long()
    assert all((lines == row).all(1).any() for row in x)


def test_a_tokenizer_sees_the_training_part_only(play, tmp_path):
    """Another end of the text changes nothing in the pairs; another beginning does."""
    content = play.read_bytes()
    n = len(text.load(str(play)).train)
    for name, other in (("end", content[:n] + b"z" * (len(content) - n)), ("start", b"zzz " * 500 + content[2000:])):
        (tmp_path / f"{name}.txt").write_bytes(other)
    paths = play, tmp_path / "end.txt", tmp_path / "start.txt"
    prints = [open_text(settings(path)).tokenizer.fingerprint for path in paths]
    assert prints[0] == prints[1] != prints[2]


def test_max_bytes_cuts_before_it_splits(play):
    opened = open_text(settings(play, "bytes", 2000))
    parts = [part for part in (opened.train, opened.val, opened.test) if part is not None]
    assert sum(map(len, parts)) == 2000 and bytes(torch.cat(parts).tolist()) == play.read_bytes()[:2000]


def test_a_saved_tokenizer(play, tmp_path):
    trained = tokens.train("bpe", play.read_bytes(), 300)
    trained.save(tmp_path / "pairs")
    opened = open_text(settings(play, tmp_path / "pairs"))
    assert opened.tokenizer.fingerprint == trained.fingerprint and opened.vocab_size == 300


def documents_of(ids, opened):
    """The texts between the ends, and what comes after the last one."""
    runs = [[]]
    for i in ids:
        if i == opened.tokenizer.size:
            runs.append([])
        else:
            runs[-1].append(i)
    return list(map(opened.tokenizer.decode, runs))


@pytest.mark.parametrize("tokenizer, size", [("bytes", 256), ("bpe:280", 280)])
@pytest.mark.parametrize("how", ["folder", "glob", "file"])
def test_shards(shards, tokenizer, size, how):
    """Held-out documents are scored and never trained on; each is followed by the end, which has no bytes."""
    word, files = {"folder": (shards, 3), "glob": (shards / "part-[02].jsonl", 2),
                   "file": (shards / "part-1.jsonl", 1)}[how]
    opened = open_text(settings(word, tokenizer))
    here = [400 * shard + i for shard in {"folder": (0, 1, 2), "glob": (0, 2), "file": (1,)}[how] for i in range(400)]
    held = [document(i) for i in here if smollm.is_held_out(document(i))]
    kept = Counter(document(i) for i in here if not smollm.is_held_out(document(i)))
    end = size
    assert opened.vocab_size == size + 1 and opened.sizes[end] == 0 and opened.tokenizer.size == size
    assert opened.train is None and opened.test is None and len(opened.files) == files and opened.rows == len(here)
    assert opened.val.dtype == torch.int32 and held
    assert documents_of(opened.val.tolist(), opened) == [*held, ""]
    assert int(opened.sizes[opened.val.long()].sum()) == sum(len(text.encode()) for text in held)
    assert "part-" in opened.source and f"{size:,} ids" in opened.source
    batches, stream = opened.batches(4, 32, "random", 1, "cpu"), []
    while batches.epoch < 1 or len(stream) < 10:
        x, y = batches.next()
        assert x.shape == (4, 32) and y.shape == (4, 32, 1) and torch.equal(x[:, 1:], y[:, :-1, 0])
        stream += x.flatten().tolist()
    documents = documents_of(stream, opened)[:-1]  # the last one may be cut
    assert not set(documents) & set(held) and set(documents) <= set(kept) and len(set(documents)) > 0.8 * len(kept)


def test_the_tokenizer_of_shards_has_not_seen_what_is_held_out(shards):
    """It is trained on the other documents, one a line."""
    sample = "\n".join(document(i) for i in range(1200) if not smollm.is_held_out(document(i)))
    assert open_text(settings(shards)).tokenizer.fingerprint == tokens.train("bpe", sample, 280).fingerprint
    assert tokens.train("bpe", "\n".join(map(document, range(1200))), 280).fingerprint != tokens.train(
        "bpe", sample, 280).fingerprint


def test_a_limit_on_what_is_scored_and_read(shards, monkeypatch):
    from data import tokenized
    monkeypatch.setattr(tokenized, "VALIDATED", 50)
    monkeypatch.setattr(tokenized, "TRAINED_ON", 3000)
    opened = open_text(settings(shards))
    assert len(opened.val) == 50
    lines, have = [], 0
    for i in range(1200):
        if have >= 3000:
            break
        if not smollm.is_held_out(document(i)):
            lines.append(document(i))
            have += len(document(i))
    assert opened.tokenizer.fingerprint == tokens.train("bpe", "\n".join(lines), 280).fingerprint


def test_mistakes(play, shards, tmp_path):
    limit = dict(max_bytes=1000)
    for words, dataset, given in (
            (["--max_bytes", "shards"], shards, limit), (["--max_bytes", "shards"], "smollm:cosmopedia-v2", limit),
            (["smolm"], "smollm:smolm", {}), (["none.jsonl"], tmp_path / "none.jsonl", {}),
            (["none.txt"], tmp_path / "none.txt", {}), ([str(tmp_path)], tmp_path, {}),  # a folder without shards
            (["none.tok"], play, dict(tokenizer=tmp_path / "none.tok")),
            (["bpe", "256"], play, dict(tokenizer="bpe:99"))):
        with raises_one_line(*words):
            open_text(settings(dataset, **given))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with raises_one_line("broken.jsonl", "line 2"):
        open_text(settings(tmp_path / "broken.jsonl", "bytes"))
