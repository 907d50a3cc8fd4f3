"""data/smollm.py: documents and positions, packing against the definition, resume, held-out texts, files, errors."""
import gzip
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


@pytest.fixture(params=["parquet", "jsonl", "jsonl.gz", "mixed"])
def files(request, tmp_path):
    """The texts in three files."""
    kinds = [request.param] * 3 if request.param != "mixed" else ["jsonl.gz", "parquet", "jsonl"]
    parts = [TEXTS[:40], TEXTS[40:41], TEXTS[41:]]
    return [write_parquet(tmp_path / f"{i}.parquet", part) if kind == "parquet" else
            write_lines(tmp_path / f"{i}.{kind}", part) for i, (kind, part) in enumerate(zip(kinds, parts))]


@pytest.fixture
def shards(tmp_path):
    return [write_parquet(tmp_path / "a.parquet", TEXTS[:50]), write_parquet(tmp_path / "b.parquet", TEXTS[50:])]


# --- Documents ---

@pytest.mark.parametrize("rows", [1, 3, 8, 256])
def test_documents_in_order_and_from_every_position(files, rows, monkeypatch):
    monkeypatch.setattr(smollm, "ROWS", rows)
    found = list(documents(files))
    assert [text for text, _ in found] == PLAIN
    positions = [position for _, position in found]
    assert positions == [(0, i + 1) for i in range(40)] + [(1, 1)] + [(2, i + 1) for i in range(49)]
    for i, position in enumerate(positions):
        assert list(documents(files, position)) == found[i + 1:]


def test_few_documents_are_in_memory(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", ["text"] * 1000, group=1000)
    sizes, real = [], smollm._parquet

    def watched(path):
        file = real(path)
        inner = file.iter_batches
        file.iter_batches = lambda *args, **kwargs: map(lambda batch: sizes.append(len(batch)) or batch,
                                                        inner(*args, **kwargs))
        return file
    monkeypatch.setattr(smollm, "_parquet", watched)
    monkeypatch.setattr(smollm, "ROWS", 100)
    reader = documents([path])
    for _ in range(150):
        next(reader)
    assert sizes == [100, 100]  # nothing is read ahead


def test_row_groups_before_the_start_are_not_read(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", PLAIN, group=10)
    read, real = [], pyarrow.parquet.ParquetFile.iter_batches

    def watched(self, *args, row_groups, **kwargs):
        read.extend(row_groups)
        return real(self, *args, row_groups=row_groups, **kwargs)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    assert [text for text, _ in documents([path], (0, 50))] == PLAIN[50:] and read == [5, 6, 7, 8]


def test_empty_lines_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}')
    assert list(documents([path])) == [("a", (0, 1)), ("b", (0, 4))] and smollm.n_rows(path) == 4
    assert list(documents([path], (0, 1))) == [("b", (0, 4))]


# --- Batches against the definition ---

def training(one_in=smollm.HELD_OUT):
    return [text for text in PLAIN if text and not is_held_out(text, one_in)]


def stream(batches, n):
    """n batches' inputs, one after another, (n B T,), where targets are the tokens that follow."""
    xs, ys = zip(*(batches.next() for _ in range(n)))
    B, T, K = ys[0].shape
    assert all(x.shape == (B, T) and x.dtype == y.dtype == torch.int64 for x, y in zip(xs, ys))
    flat = torch.cat(xs).flatten()
    ahead = torch.cat(ys).view(-1, K)
    for k in range(K):
        assert torch.equal(ahead[:len(flat) - k - 1, k], flat[k + 1:])
    return flat.tolist()


def split(flat):
    """Whole documents of a stream of byte tokens, and what is begun at its end."""
    *whole, rest = bytes(i if i != END else 255 for i in flat).split(b"\xff")  # 255 is in no UTF-8
    return [text.decode() for text in whole], rest


@pytest.mark.parametrize("B, T, K", [(3, 16, 1), (1, 7, 4), (5, 1, 3), (2, 400, 2)])
def test_rows_are_the_stream(files, B, T, K):
    batches = Batches(files, BYTES, B, T, K, buffer=16)
    total = sum(len(text.encode()) + 1 for text in training())
    found, _ = split(stream(batches, 2 * total // (B * T) + 1))
    n = len(training())
    assert sorted(found[:n]) == sorted(training()) and sorted(found[n:2 * n]) <= sorted(training())
    assert found[:n] != training() and found[:n] != found[n:2 * n]  # shuffled, and another time each pass


def test_buffer_bounds_the_shuffle(shards):
    total = sum(len(text.encode()) + 1 for text in training())
    first = split(stream(Batches(shards, BYTES, 1, total, buffer=10), 1))[0]
    expected = training()
    for i in range(0, len(expected), 10):
        assert sorted(first[i:i + 10]) == sorted(expected[i:i + 10])
    assert first[:10] != expected[:10]
    assert split(stream(Batches(shards, BYTES, 1, total, buffer=1), 1))[0] == expected
    large = split(stream(Batches(shards, BYTES, 1, total, buffer=1000), 1))[0]
    assert sorted(large) == sorted(expected) and set(large[:10]) != set(expected[:10])


def test_end_and_tokenizer(shards):
    tokenizer = tokens.train("bpe", "\n".join(training()), 280)
    flat = stream(Batches(shards, tokenizer, 1, 500), 1)
    assert 280 in flat and max(flat) == 280
    ids = flat[:flat.index(280)]
    assert tokenizer.decode(ids) in training() and tokenizer.encode(tokenizer.decode(ids)) == ids
    flat = stream(Batches(shards, tokenizer, 1, 500, end=0), 1)
    assert 0 in flat and 280 not in flat


# --- Resume ---

@pytest.mark.parametrize("after", [7, 60])
def test_resume_in_every_kind_of_file(files, after):
    whole, other = (Batches(files, BYTES, 2, 11, seed=seed, buffer=20) for seed in (3, 99))
    for _ in range(after):
        whole.next()
    other.load_state_dict(whole.state_dict())
    assert stream(other, 60) == stream(whole, 60) and other.epoch == whole.epoch


def test_epoch_counts_passes(shards):
    batches = Batches(shards, BYTES, 1, 20, buffer=16)
    assert batches.epoch == 0
    total, seen, given = sum(len(text.encode()) + 1 for text in training()), [], 0
    while given < 3 * total:
        batches.next()
        given += 20
        seen.append(batches.epoch)
        assert abs(seen[-1] - given / total) < 0.2
    assert seen == sorted(seen) and len(set(seen)) > 100 and 2.95 < seen[-1] < 3.1


# --- Held-out documents ---

def test_held_out_documents_are_never_trained_on(files):
    held = {text for text in PLAIN if text and is_held_out(text, 4)}
    assert 10 < len(held) < 40
    batches = Batches(files, BYTES, 2, 64, one_in=4, buffer=16)
    trained = set()
    while batches.epoch < 2.5:
        trained.update(split(stream(batches, 40))[0][1:])  # the first may be the end of one
    assert not trained & held and trained == set(training(4))
    found, n_bytes = validation(files, BYTES, 10 ** 6, one_in=4)
    texts_found, rest = split(found.tolist())
    assert texts_found == [text for text in PLAIN if text and is_held_out(text, 4)] and rest == b""
    assert n_bytes == sum(len(text.encode()) for text in texts_found) and found.dtype == torch.int64


def test_held_out_share_and_stability():
    share = sum(is_held_out(f"text {i}") for i in range(40_000)) / 40_000
    assert 0.8 / 200 < share < 1.2 / 200
    assert [i for i in range(900) if is_held_out(f"text {i}")] == HELD


HELD = [199, 323, 607]


def test_validation_ends_anywhere(shards):
    whole, _ = validation(shards, BYTES, 10 ** 6, one_in=4)
    for n in range(1, 100):
        found, n_bytes = validation(shards, BYTES, n, one_in=4)
        assert torch.equal(found, whole[:n]) and n_bytes == int((whole[:n] != END).sum())
    tokenizer = tokens.train("bpe", "\n".join(training()), 280)
    found, n_bytes = validation(shards, tokenizer, 10 ** 6, end=5, one_in=4)  # an end that is an id of its own
    assert n_bytes == validation(shards, BYTES, 10 ** 6, one_in=4)[1] and int(found[-1]) == 5


def test_nothing_held_out_or_nothing_left(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a", "", "b"])
    with raises_one_line(str(path), "one in 1000000"):
        validation([path], BYTES, 10, one_in=10 ** 6)
    with raises_one_line("n_tokens is 0"):
        validation([path], BYTES, 0)
    for rows, words in ((["", None], ["all 2 documents"]), ([], ["no documents", str(path)])):
        with raises_one_line(*words):
            Batches([write_parquet(path, rows)], BYTES, 1, 8)
    with raises_one_line("no documents"):
        Batches([], BYTES, 1, 8)


# --- Files ---

def test_damaged_files(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x" * 99 + str(i) for i in range(200)], group=50)
    content = path.read_bytes()
    for broken in (content[:-20], b"", b"PAR1" + b"x" * 50):
        path.write_bytes(broken)
        with raises_one_line(str(path)):
            list(documents([path]))
    path.write_bytes(content[:200] + b"\xff" * 2000 + content[2200:])
    with raises_one_line(str(path)):
        list(documents([path]))
    table = pyarrow.table({"text": pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, path)
    with raises_one_line(str(path), "row 0", "decode"):
        list(documents([path]))
    with raises_one_line(str(tmp_path / "none.parquet")):
        list(documents([tmp_path / "none.parquet"]))


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"texts": "a"}', b'{"text": 0}', b'"text"', b'{"text": "\\ud83d"}',
                                  b'{"text": "\xff"}', b"7"])
def test_damaged_lines(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    reader = documents([path])
    assert next(reader)[0] == "a"
    with raises_one_line("line 2", str(path)):
        next(reader)


def test_damaged_archives(tmp_path):
    path = write_lines(tmp_path / "a.jsonl.gz", TEXTS)
    path.write_bytes(path.read_bytes()[:-30])
    for read in (lambda: list(documents([path])), lambda: Batches([path], BYTES, 1, 8)):
        with raises_one_line("cannot read", str(path)):
            read()


def test_files_without_texts(tmp_path):
    for columns, words in (({"blob_id": ["a"], "score": [4.1]}, ["blob_id, score", "python-edu"]),
                           ({"body": ["a"]}, ["only body"]), ({"text": [1]}, ["strings"])):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        with raises_one_line(str(tmp_path / "a.parquet"), "no column text", *words):
            list(documents([tmp_path / "a.parquet"]))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of NANOLAB_DATA; downloads go beside it, and there is no network."""
    (tmp_path / "data" / "smollm" / "cosmopedia-v2").mkdir(parents=True)
    monkeypatch.setenv("NANOLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(data.files, "DOWNLOADS", tmp_path / "downloads")

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    return tmp_path / "data" / "smollm" / "cosmopedia-v2"


NAMES = [f"train-{i:05}-of-00104.parquet" for i in range(3)]


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


def test_find_without_network(place):
    for shards in (None, 1):
        with raises_one_line("huggingface.co", f"cosmopedia-v2/{NAMES[0]}", "no connection", "NANOLAB_DATA"):
            find("cosmopedia-v2", shards)
    for shards in (0, 105):
        with raises_one_line(f"shards is {shards}", "104"):
            find("cosmopedia-v2", shards)
    with raises_one_line("python-edu", "blobs"):
        find("python-edu")


def test_fetching(place, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setenv("NANOLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(data.files, "DOWNLOADS", tmp_path / "downloads")
    hub = tmp_path / "hub" / "cosmopedia-v2"
    hub.mkdir(parents=True)
    monkeypatch.setattr(smollm, "URL", f"file://{tmp_path}/hub/{{}}/{{}}")
    for name in NAMES[:2]:
        write_parquet(hub / name, [name])
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
