"""data/tokens.py: exact round trips, byte pairs against the slow definition, cuts, files, errors."""
import base64
import json
import random
import sys
from collections import Counter

import pytest
import regex
import requests
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks, load_tiktoken_bpe
from choices import raises_one_line

from data import smollm, tokenized, tokens
from data import text as corpora
from data.facts import Vocabulary
from data.tokenized import open_text

WORDS = [a + b for a in "ho ri moun ca na lan fo ber 字 spri".split()
         for b in "use ver tain fé ïve dern rest ry".split()]
TEXT = "\n".join(f"The {i % 7} old men of the {word}s, they'd said: \t{word} and {word[::-1]}!  Don't\n\n   go {i}."
                 for i, word in enumerate(WORDS * 3))
AWKWARD = ["", " ", "  two  spaces  ", "\n", "\n\n\t x\r\n\r\n", "\t\t", "a\u2581b", "\u2581", "\u2581\u2581 \u2581\n",
           "🙂👩\u200d👩\u200d👧", "\0", "\x00a\x7f\x1b\x85\x1c", "e\u0301", "\ufeff\u2028\u00a0\u3000x",
           "\ufffd\U0010ffff\ue000", "<0x41><unk>", "<|endoftext|>", "日本語のテキスト", "don't DON'T 's", "x" * 3000,
           " " * 3000 + "x", "1234567 ½²", "end \n"]


@pytest.fixture(scope="module")
def named():
    """Two of tiktoken's encodings with its patterns; ranks of our own stand in for those that would be fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PATTERN", "(?s:.{1,9})")  # so that some go over newlines, where a wrong cut would show
        pieces = tokens.train("bpe", TEXT + "x\n \n  y.\n\n a\n\nb!\n\n" * 50, 370).pieces
        patch.undo()
        ranks = {piece: i for i, piece in enumerate(pieces)}
        for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(tiktoken_ext.openai_public, name, lambda *args, **kwargs: dict(ranks))
        patch.setattr(tiktoken.registry, "ENCODINGS", {})
        yield tokens.open_tokenizer("tiktoken:cl100k_base"), tokens.open_tokenizer("tiktoken:o200k_base")


@pytest.fixture(scope="module")
def trained():
    return {"bpe": tokens.train("bpe", TEXT, 370), "unigram": tokens.train("sentencepiece", TEXT, 340),
            "sentencepiece-bpe": tokens.train("sentencepiece", TEXT, 400, "bpe"),
            "bytes": tokens.open_tokenizer("bytes")}


@pytest.fixture(params=["bytes", "bpe", "unigram", "sentencepiece-bpe", "cl100k", "o200k"])
def tokenizer(request, trained, named):
    return {**trained, "cl100k": named[0], "o200k": named[1]}[request.param]


# --- Round trips and bytes ---

def test_every_text_comes_back(tokenizer):
    rng, alphabet = random.Random(0), list("ab the'  \n\t\u2581é字🙂\0.-1") + [chr(i) for i in range(0x20, 0x3000, 97)]
    random_ones = ("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60))) for _ in range(60))
    sizes = tokens.token_bytes(tokenizer)
    for text in (*AWKWARD, *random_ones):
        ids = tokenizer.encode(text)
        assert all(type(i) is int and 0 <= i < tokenizer.size for i in ids)
        assert tokenizer.decode(ids) == text == tokenizer.decode(torch.tensor(ids, dtype=torch.int64)), repr(text)
        assert sum(sizes[i].item() for i in ids) == len(text.encode())
        assert tokens.encode_corpus(tokenizer, text).tolist() == ids == Vocabulary(tokenizer).encode(text)
    ids = tokenizer.encode("\U0001f642")
    assert len(ids) > 1 and "\ufffd" in tokenizer.decode(ids[:-1])  # cut within a character
    for call in (tokenizer.encode, lambda text: tokens.encode_corpus(tokenizer, text)):
        with raises_one_line(r"\ud83d", "at character 2", "no UTF-8"):
            call("ab\ud83dc")
    for ids in ([0, tokenizer.size], [-1]):
        with pytest.raises(ValueError, match=str(tokenizer.size - 1)):
            tokenizer.decode(ids)


def test_pieces_and_sizes(trained, named):
    assert {name: tokenizer.size for name, tokenizer in trained.items()} == {
        "bytes": 256, "bpe": 370, "unigram": 340, "sentencepiece-bpe": 400}
    lengths = tokens.token_bytes(trained["bpe"])
    assert lengths.dtype == torch.int64 and lengths.shape == (370,) and lengths[:256].eq(1).all() and lengths.max() > 3
    gaps = [i for i, piece in enumerate(named[0].pieces) if not piece]  # cl100k_base's specials are above 100,256
    assert named[0].size == 100277 and 100256 in gaps and named[0].pieces[100257] == b"<|endoftext|>"
    assert named[0].encode("<|endoftext|>")[0] < 370 and named[0].decode([100256]) == ""
    for name in ("unigram", "sentencepiece-bpe"):
        assert [len(trained[name].encode(text)) for text in ("\n", "\t", "\n\n", "\u2581")] == [1, 1, 2, 3]
        assert trained[name].encode("the old men")[0] != trained[name].encode(" the old men")[0]
    for tokenizer, text in ((trained["bpe"], "\t " * 600_000 + "x"), (named[0], "\r" * 1_100_000 + "\nthe")):
        assert tokenizer.decode(tokenizer.encode(text)) == text  # white space beyond what tiktoken searches


# --- Byte pairs against the definition ---

def slow_byte_pairs(text, vocab_size):
    """(pieces, words as ids): all pairs counted anew at every step."""
    words = [(list(word.encode()), n) for word, n in Counter(regex.findall(tokens.PATTERN, text)).items()]
    pieces = [bytes([i]) for i in range(256)]
    while len(pieces) < vocab_size:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair), default=(None, None))
        if pairs[first, second] < 2:
            return pieces, words
        pieces.append(pieces[first] + pieces[second])
        for word, _ in words:
            for i in range(len(word)):
                if word[i:i + 2] == [first, second]:
                    word[i:i + 2] = [len(pieces) - 1]
    return pieces, words


def test_byte_pairs_are_as_defined():
    rng, given = random.Random(1), 0
    for _ in range(100):
        alphabet = rng.choice(["ab", "abc", "aab ", "ab \n", "aé", "a-1'"])
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 300)))
        size = 256 + rng.randint(0, 50)
        pieces, words = slow_byte_pairs(text, size)
        if len(pieces) < size:
            with raises_one_line(f"vocab_size is {size}", f"only {len(pieces)}"):
                tokens.train("bpe", text, size)
            continue
        given += 1
        tokenizer = tokens.train("bpe", text, size)
        assert tokenizer.pieces == pieces
        for word, _ in words:  # tiktoken merges as training did
            assert tokenizer.encode(b"".join(pieces[i] for i in word).decode()) == word
    assert 20 < given < 80


def test_pattern_splits_as_gpt2_does_and_loses_nothing():
    words = regex.findall(tokens.PATTERN, "They'd say:  don't go\t1234\n\n   now--never ")
    assert words == ["They", "'d", " say", ":", " ", " don", "'t", " go", "\t", "1234", "\n\n", "  ", " now", "--",
                     "never", " "]
    for text in AWKWARD:
        assert "".join(regex.findall(tokens.PATTERN, text)) == text


def test_training_is_repeatable_takes_bytes_and_prints_nothing(capfd):
    for kind, size in (("bpe", 300), ("sentencepiece", 330)):
        first = tokens.train(kind, TEXT, size)
        data = TEXT.encode() + b"\xff\xfe"
        for same in (data, torch.frombuffer(bytearray(data), dtype=torch.uint8)):
            assert tokens.train(kind, same, size).fingerprint == first.fingerprint
        assert tokens.train(kind, TEXT, size + 1).fingerprint != first.fingerprint
        assert tokens.open_or_train(f"{kind}:{size}", lambda: TEXT).pieces == first.pieces
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind, text, size, words", [
    ("bpe", TEXT, 255, ["255", "at least 256"]), ("bpe", TEXT, -1, ["-1"]), ("bpe", "", 257, ["257", "only 256"]),
    ("bpe", TEXT, 10 ** 6, ["1,000,000", "take fewer"]), ("sentencepiece", TEXT, 259, ["259", "at least 260"]),
    ("sentencepiece", TEXT, 270, ["270", "at least 3", "characters"]), ("sentencepiece", TEXT, 10 ** 5, ["at most"]),
    ("sentencepiece", "", 300, ["no text"]), ("sentencepiece", "\n\t\n", 300, ["no text"]),
    ("bpee", TEXT, 300, ["bpee", "did you mean bpe?"]), ("bytes", TEXT, 256, ["bytes", "bpe, sentencepiece"])])
def test_what_cannot_be_trained(kind, text, size, words):
    with raises_one_line(*words):
        tokens.train(kind, text, size)


def test_training_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with raises_one_line("sentencepiece", "pip install sentencepiece"):
        tokens.train("sentencepiece", TEXT, 330)


# --- Whole corpora ---

EDGES = (TEXT + "\n".join(AWKWARD) + "x\n\nY\nz!\nA \nB\n\tC\nd\r\nE. \n  F\nx\n \n  y.\n\n a\n\nb!\n\n" + TEXT)


def test_cuts_change_no_token(tokenizer, monkeypatch):
    whole = tokenizer.encode(EDGES)
    monkeypatch.setattr(tokens, "CHUNK", 1)
    encoded = []
    real = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda part: encoded.append(part) or real(part))
    found = tokens.encode_corpus(tokenizer, EDGES)
    assert found.dtype == torch.int32 and found.tolist() == whole
    assert len(encoded) > 200 or tokenizer.name == "bytes"
    assert tokenizer.decode_bytes(found) == EDGES.encode()


def test_bytes_that_are_no_utf8_come_back(tokenizer):
    sizes = tokens.token_bytes(tokenizer)
    for data in (b"", b"\xff", b"caf\xe9 \xe9t\xe9\nna\xefve\n" * 9, "日本".encode()[1:-1], bytes(range(256)),
                 b"\xed\xa0\xbd\xed\xb8\x80", b"\xf0\x9f\x99\x82\xf0\x9f"):
        found = tokens.encode_corpus(tokenizer, data)
        assert tokenizer.decode_bytes(found) == data and int(sizes[found.long()].sum()) == len(data)
        assert torch.equal(tokens.encode_corpus(tokenizer, torch.tensor([*data], dtype=torch.uint8)), found)
    for data in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="1-D uint8"):
            tokens.encode_corpus(tokenizer, data)


# --- Files ---

def test_saved_files_open_again(tokenizer, tmp_path):
    path = tmp_path / "a tokenizer"
    tokenizer.save(path)
    again = tokens.open_tokenizer(str(path))
    assert (again.name, again.pieces, again.fingerprint) == (tokenizer.name, tokenizer.pieces, tokenizer.fingerprint)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    tokens.check(again, tokenizer.fingerprint)
    assert tokens.open_or_train(path, None).pieces == again.pieces
    with raises_one_line("does not match the checkpoint", "0123456789ab"):
        tokens.check(again, "0123456789abcdef")


def test_files_are_what_other_programs_read_and_fingerprints_differ(trained, named, tmp_path, monkeypatch):
    trained["bpe"].save(tmp_path / "tok.bpe")
    assert load_tiktoken_bpe(str(tmp_path / "tok.bpe")) == {piece: i for i, piece in enumerate(trained["bpe"].pieces)}
    trained["unigram"].save(tmp_path / "tok.model")
    other = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tok.model"))
    assert other.encode("The old house") == trained["unigram"].encode("The old house")
    monkeypatch.setattr(tokens, "PATTERN", tokens.PATTERN + "|x")
    changed = tokens.BytePairs(trained["bpe"].pieces)
    assert len({tokenizer.fingerprint for tokenizer in [*trained.values(), *named, changed]}) == 7


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_damaged_files_are_refused(trained, name, tmp_path):
    path = tmp_path / "tok"
    trained[name].save(path)
    content = path.read_bytes()
    line = content.rfind(b"\n", 0, len(content) // 2) + 1  # of ranks: an end between two lines is the hardest
    broken = [content[:-1], content[:line], content[:100], b"", content + b"x", content[:300] + b"#" + content[301:]]
    if name == "bpe":
        lines = content.split(b"\n")
        broken += [b"\n".join(lines[:300] + lines[301:]), b"\n".join(lines[:300] + lines[299:]),
                   b"\n".join([*lines[:300], base64.b64encode(b"a") + b" 300", *lines[301:]]),
                   b"\n".join(lines[:200]) + b"\n\n", b"\n".join(lines[1:])]
    for part in broken:
        path.write_bytes(part)
        with raises_one_line(str(path), "truncated"):
            tokens.open_tokenizer(path)


def test_files_that_are_none(tmp_path):
    for content in (b"tiktoken:gpt3\n", b"PK\x03\x04", b"hello\n", b"\xff" * 200):
        (tmp_path / "tok").write_bytes(content)
        with raises_one_line(str(tmp_path / "tok"), "no tokenizer"):
            tokens.open_tokenizer(tmp_path / "tok")
    for word, said in (("nowhere", ("nowhere", "neither bytes, tiktoken:NAME nor a file")),
                       (tmp_path, (f"cannot read {tmp_path}", "directory")),
                       ("tiktoken:cl100k", ("cl100k", "did you mean cl100k_base?", "o200k_base")),
                       *((word, (word, "bpe:1024")) for word in ("bpe:", "bpe:many", "bpe:-5"))):
        with raises_one_line(*said):
            tokens.open_or_train(word, TEXT)
    for path, said in ((tmp_path / "missing" / "tok", "missing"), ("/", "folder")):
        with raises_one_line("cannot write", said):
            tokens.open_tokenizer("bytes").save(path)


# --- tiktoken's own ---

def test_encodings_that_cannot_be_fetched(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no\nnetwork")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", data_gym_to_mergeable_bpe_ranks)
    with raises_one_line("gpt2", "could not be fetched", "TIKTOKEN_CACHE_DIR", "bpe"):
        tokens.open_tokenizer("tiktoken:gpt2")


# --- A text and shards as ids, their bytes, what is held out ---

RIVERS = "river mountain valley forest lake thou art hither café".split()


def settings(dataset, tokenizer="bpe:280", max_bytes=None):
    return dict(dataset=str(dataset), tokenizer=str(tokenizer), max_bytes=max_bytes)


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    path = tmp_path_factory.mktemp("play") / "play.txt"
    path.write_text("\n\n".join(f"{word.upper()}:\n{i} times the {word}, {word[::-1]}!" for i in range(120)
                                for word in RIVERS))
    return path


def document(i):
    return f"Document {i}: the {RIVERS[i % 9]} and the {RIVERS[i // 9 % 9]} of year {i}."


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
    opened, corpus = open_text(settings(play, tokenizer)), corpora.load(str(play))
    assert opened.vocab_size == len(opened.sizes) == opened.tokenizer.size == size and opened.files == []
    for name in ("train", "val", "test"):
        ids, data = getattr(opened, name), getattr(corpus, name)
        assert ids.dtype == torch.int32 and int(ids.max()) < size
        assert opened.tokenizer.decode_bytes(ids.tolist()) == bytes(data.tolist())
        assert int(opened.sizes[ids.long()].sum()) == len(data)
    assert opened.rows == len(opened.train) and (tokenizer == "bytes" or len(opened.train) < len(corpus.train))
    assert f"{size:,} ids" in opened.source and opened.tokenizer.name in opened.source
    lines = opened.train.unfold(0, 16, 1).long()
    assert all((lines == row).all(1).any() for row in opened.batches(4, 16, "random", 3, "cpu").next()[0])
    short = open_text(settings(play, tokenizer, 2000))  # cut before it is split, and before pairs are counted
    wanted = tokens.open_or_train(tokenizer, play.read_bytes()[:1800])
    assert short.tokenizer.fingerprint == wanted.fingerprint
    assert short.tokenizer.decode_bytes(torch.cat([short.train, short.val, short.test])) == play.read_bytes()[:2000]


def documents_of(ids, opened):
    """The texts between the ends, and what comes after the last one."""
    cuts = [-1, *(i for i, token in enumerate(ids) if token == opened.tokenizer.size), len(ids)]
    return [opened.tokenizer.decode(ids[a + 1:b]) for a, b in zip(cuts, cuts[1:])]


@pytest.mark.parametrize("tokenizer, size", [("bytes", 256), ("bpe:280", 280)])
@pytest.mark.parametrize("word, parts", [("", (0, 1, 2)), ("part-[02].jsonl", (0, 2)), ("part-1.jsonl", (1,))],
                         ids=["folder", "glob", "file"])
def test_shards(shards, tokenizer, size, word, parts):
    """Held-out documents are scored and never trained on; each is followed by the end, which has no bytes."""
    opened = open_text(settings(shards / word, tokenizer))
    texts = [document(i) for part in parts for i in range(400 * part, 400 * part + 400)]
    held = [text for text in texts if smollm.is_held_out(text)]
    assert opened.vocab_size == size + 1 and opened.sizes[size] == 0 and opened.tokenizer.size == size
    assert opened.train is None and opened.test is None and len(opened.files) == len(parts)
    assert opened.rows == len(texts) and opened.val.dtype == torch.int32 and held
    assert documents_of(opened.val.tolist(), opened) == [*held, ""]
    assert int(opened.sizes[opened.val.long()].sum()) == sum(len(text.encode()) for text in held)
    assert "part-" in opened.source and f"{size:,} ids" in opened.source
    batches, stream = opened.batches(4, 32, "random", 1, "cpu"), []
    while batches.epoch < 1:
        x, y = batches.next()
        assert x.shape == (4, 32) and y.shape == (4, 32, 1) and torch.equal(x[:, 1:], y[:, :-1, 0])
        stream += x.flatten().tolist()
    documents = {*documents_of(stream, opened)[:-1]}  # the last one may be cut
    assert documents <= {*texts} - {*held} and len(documents) > 0.8 * len(texts)


def test_a_limit_on_what_is_scored_and_read(shards, monkeypatch):
    """A tokenizer is trained on the beginning of the documents that are not held out, one a line."""
    texts = [document(i) for i in range(1200) if not smollm.is_held_out(document(i))]
    for n, scored in ((len(texts), None), (next(n for n in range(999) if len("".join(texts[:n])) >= 3000), 50)):
        if scored:
            monkeypatch.setattr(tokenized, "VALIDATED", scored)
            monkeypatch.setattr(tokenized, "TRAINED_ON", 3000)
        opened = open_text(settings(shards))
        assert opened.tokenizer.fingerprint == tokens.train("bpe", "\n".join(texts[:n]), 280).fingerprint
        assert scored is None or len(opened.val) == scored
    every = tokens.train("bpe", "\n".join(map(document, range(1200))), 280)
    assert every.fingerprint != tokens.train("bpe", "\n".join(texts), 280).fingerprint


def test_mistakes(play, shards, tmp_path):
    limit = dict(max_bytes=1000)
    for words, dataset, given in (
            (["--max_bytes", "shards"], shards, limit), (["--max_bytes", "shards"], "smollm:cosmopedia-v2", limit),
            (["smolm"], "smollm:smolm", {}), (["none.jsonl"], tmp_path / "none.jsonl", {}),
            (["none.txt"], tmp_path / "none.txt", {}), ([str(tmp_path)], tmp_path, {}),  # a folder without shards
            (["none.tok"], play, dict(tokenizer=tmp_path / "none.tok"))):
        with raises_one_line(*words):
            open_text(settings(dataset, **given))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with raises_one_line("broken.jsonl", "line 2"):
        open_text(settings(tmp_path / "broken.jsonl", "bytes"))
