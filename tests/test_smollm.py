"""data/smollm.py: documents and positions, packing against the definition, resume, held-out texts, files, errors."""
import gzip
import io
import json
import sys
import urllib.error
import urllib.request

import pytest
import torch
from choices import raises_one_line

pytest.importorskip("pyarrow")
import pyarrow.parquet
import data.files
from data import smollm, tokens
from data.smollm import Batches, documents, find, is_held_out, validation

pytestmark = pytest.mark.usefixtures("one_thread")
BYTES = tokens.open_tokenizer("bytes")
END = 256
TEXTS = [f"document {i} " + ("né🙂\n\t " * (i % 5)) + "x" * (i * 7 % 40) for i in range(90)]
TEXTS[3] = TEXTS[40] = TEXTS[89] = ""
TEXTS[50], TEXTS[60] = TEXTS[10], None  # a copy; a missing one
PLAIN = [text or "" for text in TEXTS]


def write_parquet(path, rows, group=8):
    table = pyarrow.table({"prompt": ["p"] * len(rows), "text": pyarrow.array(rows, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def write_lines(path, rows):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        for row in rows:
            file.write(json.dumps({"id": 1, "text": row}).encode() + b"\n")
    return path


@pytest.fixture(params=[["parquet"] * 3, ["jsonl.gz", "parquet", "jsonl"]], ids=["parquet", "mixed"])
def files(request, tmp_path):
    """The texts in three files."""
    kinds, parts = request.param, [TEXTS[:40], TEXTS[40:41], TEXTS[41:]]
    return [write_parquet(tmp_path / f"{i}.parquet", part) if kind == "parquet" else
            write_lines(tmp_path / f"{i}.{kind}", part) for i, (kind, part) in enumerate(zip(kinds, parts))]


@pytest.fixture
def sized(monkeypatch):
    """Another BUFFER, another share of documents held out."""
    def sized(buffer=1024, one_in=200):
        monkeypatch.setattr(smollm, "BUFFER", buffer)
        monkeypatch.setattr(smollm, "HELD_OUT", one_in)
    return sized


@pytest.fixture
def shards(tmp_path):
    return [write_parquet(tmp_path / "a.parquet", TEXTS[:50]), write_parquet(tmp_path / "b.parquet", TEXTS[50:])]


# --- Documents ---

@pytest.mark.parametrize("rows", [3, 256])
def test_documents_in_order_and_from_every_position(files, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm, "ROWS", rows)
    found = list(documents(files))
    positions = [(0, i + 1) for i in range(40)] + [(1, 1)] + [(2, i + 1) for i in range(49)]
    assert found == [*zip(PLAIN, positions)]
    for i, position in enumerate(positions):
        assert list(documents(files, position)) == found[i + 1:]
    path = tmp_path / "a.jsonl"                                  # empty lines are no documents
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}')
    assert list(documents([path])) == [("a", (0, 1)), ("b", (0, 4))] and smollm.n_rows(path) == 4
    assert list(documents([path], (0, 1))) == [("b", (0, 4))]


def test_few_documents_are_read(tmp_path, monkeypatch):
    """Nothing is read ahead, nor row groups before the start."""
    path = write_parquet(tmp_path / "a.parquet", PLAIN, group=30)
    read, real = [], pyarrow.parquet.ParquetFile.iter_batches

    def watched(self, *args, row_groups, **kwargs):
        for batch in real(self, *args, row_groups=row_groups, **kwargs):
            read.append((*row_groups, len(batch)))
            yield batch
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    monkeypatch.setattr(smollm, "ROWS", 10)
    reader = documents([path], (0, 30))
    assert [next(reader)[0] for _ in range(15)] == PLAIN[30:45] and read == [(1, 10), (1, 10)]


# --- Batches against the definition ---

def training():
    return [text for text in PLAIN if text and not is_held_out(text)]


def stream(batches, n):
    """n batches' inputs, one after another, (n B T,), where targets are the tokens that follow."""
    xs, ys = zip(*(batches.next() for _ in range(n)))
    assert all(x.dtype == y.dtype == torch.int64 and y.shape == (*x.shape, 1) for x, y in zip(xs, ys))
    flat = torch.cat(xs).flatten()
    assert torch.equal(torch.cat(ys).flatten()[:-1], flat[1:])
    return flat.tolist()


def split(flat):
    """Whole documents of a stream of byte tokens, and what is begun at its end."""
    *whole, rest = bytes(i if i != END else 255 for i in flat).split(b"\xff")  # 255 is in no UTF-8
    return [text.decode() for text in whole], rest


N_BYTES = sum(len(text.encode()) + 1 for text in training())


@pytest.mark.parametrize("B, T, buffer", [(3, 16, 16), (1, 7, 1), (2, 400, 1000)])
def test_rows_are_the_stream(files, sized, B, T, buffer):
    """Of whole documents, shuffled within the buffer, another time each pass; epoch says where."""
    sized(buffer)
    batches, flat, expected = Batches(files, BYTES, B, T), [], training()
    n = len(expected)
    while len(flat) < 2 * N_BYTES:
        flat += stream(batches, 2)
        assert abs(batches.epoch - len(flat) / N_BYTES) < 0.2 + 2 * B * T / N_BYTES
    found, _ = split(flat)
    for first in (found[:n], found[n:2 * n]):
        blocks = [(expected[i:i + buffer], first[i:i + buffer]) for i in range(0, n, buffer)]
        assert all(sorted(one) == sorted(other) for one, other in blocks if len(one) == len(other))
        assert (first == expected[:len(first)]) == (buffer == 1)
    assert buffer == 1 or found[:n] != found[n:2 * n]


# --- Resume ---

@pytest.mark.parametrize("after", [7, 60])
def test_resume_in_every_kind_of_file(files, sized, after):
    sized(20)
    whole, other = (Batches(files, BYTES, 2, 11, seed=seed) for seed in (3, 99))
    for _ in range(after):
        whole.next()
    other.load_state_dict(state := whole.state_dict())
    assert stream(other, 60) == stream(whole, 60) and other.epoch == whole.epoch
    for key in ("end", "buffer", "one_in", "tokenizer", "documents", "fingerprint of the data"):
        with raises_one_line(key, "resume with the data"):
            other.load_state_dict({**state, key: 9})


# --- Held-out documents ---

def test_held_out_documents_are_never_trained_on(files, sized):
    share = [i for i in range(40_000) if is_held_out(f"text {i}")]
    assert 0.8 / 200 < len(share) / 40_000 < 1.2 / 200 and share[:3] == [199, 323, 607]
    sized(16, 4)
    held = [text for text in PLAIN if text and is_held_out(text)]
    assert 10 < len(held) < 40
    batches, trained = Batches(files, BYTES, 2, 64), set()
    while batches.epoch < 2.5:
        trained.update(split(stream(batches, 40))[0][1:])  # the first may be the end of one
    assert not trained & {*held} and trained == set(training())
    found, n_bytes = validation(files, BYTES, 10 ** 6)
    assert split(found.tolist()) == (held, b"") and found.dtype == torch.int64
    assert n_bytes == sum(len(text.encode()) for text in held)


def test_validation_ends_anywhere(shards, sized):
    sized(one_in=4)
    whole, every = validation(shards, BYTES, 10 ** 6)
    for n in range(1, 100, 7):
        found, n_bytes = validation(shards, BYTES, n)
        assert torch.equal(found, whole[:n]) and n_bytes == int((whole[:n] != END).sum())
    tokenizer = tokens.train("bpe", "\n".join(training()), 280)
    found, n_bytes = validation(shards, tokenizer, 10 ** 6)
    assert n_bytes == every and int(found[-1]) == 280
    flat = stream(Batches(shards, tokenizer, 1, 500), 1)         # so do batches
    ids = flat[:flat.index(280)]
    assert max(flat) == 280 and tokenizer.decode(ids) in training() and tokenizer.encode(tokenizer.decode(ids)) == ids


def test_nothing_held_out_or_nothing_left(tmp_path, sized):
    sized(one_in=10 ** 6)
    path = write_parquet(tmp_path / "a.parquet", ["a", "", "b"])
    with raises_one_line(str(path), "one in 1000000"):
        validation([path], BYTES, 10)
    for rows, words in ((["", None], ["all 2 documents"]), ([], ["no documents", str(path)])):
        with raises_one_line(*words):
            Batches([write_parquet(path, rows)], BYTES, 1, 8)
    with raises_one_line("no documents"):
        Batches([], BYTES, 1, 8)


# --- Files ---

WHOLE = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 99 + str(i) for i in range(200)]}), WHOLE, row_group_size=50)
WHOLE = WHOLE.getvalue()
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
BROKEN = [  # a file's ending, its content or columns, how many texts come before the error, what that says
    *((".parquet", content, 0, ["damaged"]) for content in (WHOLE[:-20], b"", b"PAR1" + b"x" * 50)),
    (".parquet", WHOLE[:200] + b"\xff" * 2000 + WHOLE[2200:], 0, []),
    (".parquet", {"text": pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())}, 0, ["row 0", "decode"]),
    (".parquet", {"blob_id": ["a"], "score": [4.1]}, 0, ["no column text", "blob_id, score", "python-edu"]),
    (".parquet", {"body": ["a"]}, 0, ["no column text", "only body"]),
    (".parquet", {"text": [1]}, 0, ["no column text", "strings"]), (".parquet", None, 0, ["none.parquet"]),
    (".jsonl.gz", gzip.compress(LINES, mtime=0)[:-30], None, ["cannot read"]), (".jsonl", None, 0, ["none.jsonl"]),
    *((".jsonl", b'{"text": "a"}\n' + line + b"\n", 1, ["line 2"]) for line in (
        b"{", b"[1]", b'{"texts": "a"}', b'{"text": 0}', b'"text"', b'{"text": "\\ud83d"}', b'{"text": "\xff"}', b"7"))]


@pytest.mark.parametrize("ending, content, n, words", BROKEN, ids=[f"{i}{row[0]}" for i, row in enumerate(BROKEN)])
def test_damaged_files_and_files_without_texts(tmp_path, ending, content, n, words):
    path, found = tmp_path / ("none" * (content is None) + ending), []
    if isinstance(content, dict):
        pyarrow.parquet.write_table(pyarrow.table(content), path)
    elif content is not None:
        path.write_bytes(content)
    with raises_one_line(str(path), *words):
        for text, _ in documents([path]):
            found.append(text)
    assert n is None or found == ["a"] * n
    if n is None:
        with raises_one_line(str(path), *words):
            Batches([path], BYTES, 1, 8)


NAMES = [f"train-{i:05}-of-00104.parquet" for i in range(3)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of NANOLAB_DATA; downloads go beside it, from a hub that is a folder and has two shards."""
    (tmp_path / "data" / "smollm" / "cosmopedia-v2").mkdir(parents=True)
    (tmp_path / "hub" / "cosmopedia-v2").mkdir(parents=True)
    monkeypatch.setenv("NANOLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(data.files, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(smollm, "URL", f"file://{tmp_path}/hub/{{}}/{{}}")
    for name in NAMES[:2]:
        write_parquet(tmp_path / "hub" / "cosmopedia-v2" / name, [name])
    return tmp_path / "data" / "smollm" / "cosmopedia-v2"


def test_find_here(place):
    for name in NAMES[1:]:
        write_parquet(place / name, ["a"])
    (place / "notes.txt").touch()
    assert find("cosmopedia-v2") == [place / name for name in NAMES[1:]]
    other = data.files.DOWNLOADS / "smollm" / "cosmopedia-v2"
    other.mkdir(parents=True)
    for name in NAMES[:2]:
        write_parquet(other / name, ["b"])
    assert find("cosmopedia-v2") == [other / NAMES[0], place / NAMES[1], place / NAMES[2]]
    assert find("cosmopedia-v2", 2) == [other / NAMES[0], place / NAMES[1]]


def test_find_paths(tmp_path):
    a, b = write_parquet(tmp_path / "b[1].parquet", ["a"]), write_lines(tmp_path / "a.jsonl.gz", ["b"])
    (tmp_path / "c.txt").touch()
    assert find(str(tmp_path)) == [b, a] == find(f"{tmp_path}/*")
    assert find(str(a)) == [a] and find(f"{tmp_path}/*.gz") == [b]
    for source in ("nowhere", str(tmp_path / "c.txt"), f"{tmp_path}/*.jsonl"):
        with raises_one_line(source, "cosmopedia-v2, fineweb-edu-dedup"):
            find(source)


def test_find_without_network(place, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for source, shards, words in (
            *(("cosmopedia-v2", n, ("no connection", f"cosmopedia-v2/{NAMES[0]}", "NANOLAB_DATA")) for n in (None, 1)),
            *(("cosmopedia-v2", n, (f"shards is {n}", "104")) for n in (0, 105)),
            ("python-edu", None, ("python-edu", "blobs"))):
        with raises_one_line(*words):
            find(source, shards)


def test_fetching(place, tmp_path):
    hub = tmp_path / "hub" / "cosmopedia-v2"
    found = find("cosmopedia-v2")
    assert found == [data.files.DOWNLOADS / "smollm" / "cosmopedia-v2" / NAMES[0]]
    assert [text for text, _ in documents(find("cosmopedia-v2", 2))] == NAMES[:2]
    (hub / NAMES[0]).unlink()  # is not fetched again
    assert find("cosmopedia-v2", 2)[0] == found[0] and not list(tmp_path.glob("downloads/**/*.part"))
    (hub / NAMES[2]).write_text("<html>")
    with raises_one_line(NAMES[2], "no parquet file", "NANOLAB_DATA"):
        find("cosmopedia-v2", 3)
    assert not list(tmp_path.glob(f"downloads/**/{NAMES[2]}")) + list(tmp_path.glob("downloads/**/*.part"))


def test_a_missing_package(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with raises_one_line("this needs pyarrow: pip install pyarrow"):
        list(documents(shards))
