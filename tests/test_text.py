"""data/text.py: finding, checking, downloading, splitting, batches, statistics. No network: a server on 127.0.0.1."""
import bz2
import gzip
import hashlib
import http.server
import io
import lzma
import os
import socket
import struct
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from choices import raises_one_line

from data import files, text
from data.files import download
from data.text import Batches, load, statistics

CONTENT = bytes(range(256)) * 1200  # 307,200 bytes: several chunks of a download


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty NANOLAB_DATA; downloads would go into another empty folder, from a port where nobody listens."""
    given = tmp_path / "given"
    given.mkdir()
    monkeypatch.setenv("NANOLAB_DATA", str(given))
    monkeypatch.setattr(files, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    dead = {name: (*row[:3], url + row[3].rpartition("/")[2]) for name, row in text.SETS.items()}
    monkeypatch.setattr(text, "SETS", dead)
    return given


@pytest.fixture
def server(monkeypatch):
    """A web server of one file: set .content, .ranges (does it know Range?), .cut (bytes after which it hangs up) and
    .reset (rudely)."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            here, start = self.server, 0
            asked = self.headers.get("Range")
            here.asked.append(asked)
            if self.path.startswith("/missing"):
                return self.send_error(404)
            if asked and here.ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(here.content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(here.content)}")
                    return self.end_headers()
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(here.content) - 1}/{len(here.content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(here.content) - start))
            self.end_headers()
            self.wfile.write(here.content[start:][:here.cut])
            if here.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def log_message(self, *args):
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    httpd.content, httpd.ranges, httpd.cut, httpd.reset, httpd.asked = CONTENT, True, None, False, []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


# --- Downloads ---

def get(server, tmp_path, name="file"):
    return download(f"{server.url}/{name}", tmp_path / "file", len(CONTENT), blob_id(CONTENT))


@pytest.mark.parametrize("packed", [False, True])
def test_fresh_download_is_complete_and_leaves_no_scraps(server, tmp_path, packed):
    """What is there is not fetched again; of runs that need it at once, one fetches it."""
    folder = tmp_path / "new"
    server.content = zipped(file=CONTENT) if packed else CONTENT
    with ThreadPoolExecutor(4) as pool:
        [*pool.map(lambda _: get(server, folder, f"file{'.zip' if packed else ''}"), range(4))]
    assert get(server, folder) == folder / "file" and server.asked == [None]
    assert (folder / "file").read_bytes() == CONTENT
    assert sorted(entry.name for entry in folder.iterdir()) == ["file", "file.lock"]


@pytest.mark.parametrize("reset", [False, True])
def test_broken_download_is_kept_and_resumed_by_range(server, tmp_path, reset):
    server.cut, server.reset = 100_001, reset  # hung up, or rudely
    with raises_one_line("broke off after" + " 100,001 bytes" * (not reset), "same command"):
        get(server, tmp_path)
    kept = (tmp_path / "file.part").read_bytes()
    assert not (tmp_path / "file").exists() and kept == CONTENT[:len(kept)] and (reset or len(kept) == 100_001)
    server.cut, server.reset = None, False
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={len(kept)}-" if kept else None]


@pytest.mark.parametrize("part, ranges, requests", [
    (b"x" * 1000, False, 1), (CONTENT, True, 1), (CONTENT + b"more", True, 2)], ids=["no ranges", "whole", "longer"])
def test_what_an_earlier_attempt_left_behind(server, tmp_path, part, ranges, requests):
    """A server without ranges sends everything again; a part that is longer is another file's."""
    server.ranges = ranges
    (tmp_path / "file.part").write_bytes(part)
    assert get(server, tmp_path).read_bytes() == CONTENT and len(server.asked) == requests
    assert server.asked[0] == f"bytes={len(part)}-"


@pytest.mark.parametrize("name, content, words", [
    ("file", CONTENT[:-1] + b"?", "its git blob id is"),
    ("file", CONTENT + b"?", "it has 307,201 bytes, not 307,200"),
    ("file.zip", b"<html>Please log in to this network</html>", "damaged")], ids=["changed", "longer", "page"])
def test_other_content_is_refused_and_removed(server, tmp_path, name, content, words):
    server.content = content
    with raises_one_line("is not file and was removed", words):
        get(server, tmp_path, name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.lock"]


def test_refused_and_unwritable(server, tmp_path):
    with raises_one_line("answers 404 Not Found"):
        get(server, tmp_path, "missing")
    (tmp_path / "plain").write_text("no folder")
    with raises_one_line("cannot write"):
        get(server, tmp_path / "plain")


def test_no_network_says_which_file_goes_where(folder):
    for name, words in (("enwik8", ["put enwik8 (100,000,000 bytes", "--max_bytes 4150000 with "
                                    "enwik8-first-4150000.txt.xz there"]),
                        ("shakespeare", ["put tinyshakespeare.txt (1,115,394 bytes"])):
        with raises_one_line("no connection to", str(files.DOWNLOADS), "NANOLAB_DATA", "--dataset stdlib", *words):
            load(name)


# --- Named sets ---

def whole(corpus):
    """The bytes of all parts, one after the other."""
    return b"".join(part.numpy().tobytes() for part in (corpus.train, corpus.val, corpus.test) if part is not None)


def place_set(monkeypatch, name, content, url="http://127.0.0.1:1/"):
    """Makes content pass for a named set."""
    file = text.SETS[name][0]
    monkeypatch.setitem(text.SETS, name, (file, len(content), blob_id(content), url))


def test_folders_come_in_order_and_before_downloads(folder, tmp_path, monkeypatch):
    place_set(monkeypatch, "shakespeare", CONTENT)
    second = tmp_path / "second"
    second.mkdir()
    monkeypatch.setenv("NANOLAB_DATA", f"{folder}{os.pathsep}{second}")
    files.DOWNLOADS.mkdir()
    for place in (files.DOWNLOADS, second, folder):
        (place / "tinyshakespeare.txt.xz").write_bytes(lzma.compress(CONTENT))
        corpus = load("shakespeare")
        assert str(place) in corpus.source
    assert (len(corpus.train), len(corpus.val), corpus.test) == (276_480, 30_720, None)
    (folder / "mine.txt").write_bytes(CONTENT)  # a bare name is looked for there too
    assert load("mine.txt").train.numel() == len(CONTENT) * 9 // 10
    monkeypatch.setenv("NANOLAB_DATA", str(tmp_path / "absent"))
    with raises_one_line("NANOLAB_DATA names", "absent", "not a folder"):
        load("shakespeare")


def test_a_set_is_downloaded_where_it_lies_nowhere(folder, server, monkeypatch):
    server.content = zipped(enwik8=CONTENT)
    place_set(monkeypatch, "enwik8", CONTENT, f"{server.url}/enwik8.zip")
    for _ in range(2):
        assert whole(load("enwik8")) == CONTENT == (files.DOWNLOADS / "enwik8").read_bytes()
    assert len(server.asked) == 1
    for content, said in ((CONTENT[:-1] + b"?", "git blob id"), (CONTENT[:99], "it has 99 bytes, not 307,200")):
        (folder / "enwik8").write_bytes(content)
        with raises_one_line(str(folder / "enwik8"), "is not enwik8", said, "replace or remove"):
            load("enwik8")


def test_a_large_file_is_hashed_once_until_it_changes(folder, monkeypatch):
    content = bytes(2 ** 24 + 1)
    place_set(monkeypatch, "enwik8", content)
    path, hashed = folder / "enwik8", []
    path.write_bytes(content)
    check = files.difference
    monkeypatch.setattr(files, "difference", lambda *args: hashed.append(1) or check(*args))
    load("enwik8"), load("enwik8")
    assert len(hashed) == 1
    with open(path, "r+b") as file:
        file.write(b"?")
    os.utime(path, ns=(1, 1))
    with raises_one_line("is not enwik8"):
        load("enwik8")


def test_the_piece_serves_what_fits_in_it(folder, monkeypatch):
    monkeypatch.setattr(text, "PIECE", ("piece.txt", 1000, blob_id(CONTENT[:1000])))
    (folder / "piece.txt").write_bytes(CONTENT[:1000])
    corpus = load("enwik8", max_bytes=999)
    assert [corpus.train.numel(), corpus.val.numel(), corpus.test.numel()] == [899, 50, 50]
    for more in (None, 1001):
        with raises_one_line("no connection", "or use --max_bytes 1000, or use --dataset stdlib"):
            load("enwik8", max_bytes=more)
    place_set(monkeypatch, "enwik8", CONTENT)
    (folder / "enwik8").write_bytes(CONTENT)
    assert load("enwik8", max_bytes=999).source.endswith(str(folder / "enwik8"))  # the whole file goes first
    (folder / "enwik8").unlink()
    (folder / "piece.txt").write_bytes(CONTENT[1:1001])
    with raises_one_line("is not piece.txt"):
        load("enwik8", max_bytes=999)


def test_stdlib_is_source_text_in_a_fixed_order(folder, tmp_path, monkeypatch):
    """Without what is not its source."""
    first, second = load("stdlib"), load("stdlib", max_bytes=500_000)
    content = whole(first)
    assert len(content) > 5_000_000 and first.train.numel() == len(content) * 9 // 10
    assert whole(second) == content[:500_000]
    assert hashlib.sha256(content).hexdigest()[:12] in first.source and f"{len(content):,} bytes" in first.source
    assert b"def dataclass(" in content and content.decode()
    root = tmp_path / "lib"
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(root))
    with raises_one_line("no source files", "lib"):
        load("stdlib")
    for name, content in {"a.py": b"aa", "sub/b.py": b"bb", "c.py": b"\xff", "d.txt": b"dd", "test/e.py": b"ee",
                          "site-packages/g.py": b"gg", "_sysconfigdata_x.py": b"hh", "config-3/i.py": b"ii"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for between, end in ((b"\n", None), (b"END", "END")):
        assert sorted(whole(load("stdlib", document_end=end)).split(between)) == [b"aa", b"bb"]


# --- Any file ---

PACKERS = {".txt": bytes, "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
           ".zip": lambda content: zipped(member=content)}


@pytest.mark.parametrize("suffix", PACKERS)
def test_any_file_gives_its_bytes(folder, tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(PACKERS[suffix](CONTENT))
    for max_bytes, n in ((None, len(CONTENT)), (1000, 1000)):
        corpus = load(str(path), max_bytes)
        assert [part.numel() for part in (corpus.train, corpus.val, corpus.test)] == [n * 9 // 10, n // 20, n // 20]
        assert corpus.train.dtype == torch.uint8 and whole(corpus) == CONTENT[:n]
        assert corpus.name == path.name and str(path) in corpus.source and f"{n:,} bytes" in corpus.source


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", ["is empty"]), ("empty.xz", lzma.compress(b""), ["is empty"]),
    ("cut.xz", lzma.compress(CONTENT)[:-20], ["cut.xz is damaged"]),
    ("cut.gz", gzip.compress(CONTENT, mtime=0)[:50], ["cut.gz is damaged"]),  # mtime: part of the test's name
    ("bad.bz2", b"no archive", ["bad.bz2 is damaged"]), ("bad.gz", b"no archive", ["bad.gz is damaged"]),
    ("bad.zip", b"no archive", ["bad.zip is damaged"]), ("two.zip", zipped(a=b"1", b=b"2"), ["2 members (a, b)"])])
def test_files_that_cannot_serve(folder, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with raises_one_line(name, *words):
        load(str(tmp_path / name))


@pytest.mark.parametrize("dataset, max_bytes, words", [
    ("enwiki8", None, ["'enwiki8'", "did you mean enwik8?"]), ("shakespear", None, ["did you mean shakespeare?"]),
    ("no/such/file.txt", None, ["no/such/file.txt", "enwik8, shakespeare, stdlib"]),
    ("/dev/null", None, ["is not a file"]), ("", None, ["''", "a file, folder or glob"]), ("stdlib", 0, ["at least 1"]),
    ("stdlib", -5, ["at least 1"]), ("enwik8", 100_000_001, ["has only 100,000,000 bytes"]),
    ("stdlib", 10 ** 9, ["stdlib has only"])])
def test_requests_that_cannot_be_served(folder, dataset, max_bytes, words):
    with raises_one_line(*words):
        load(dataset, max_bytes)


# --- Many files ---

@pytest.fixture
def library(folder):
    """A folder of 60 documents, some packed, some empty, hidden or copies: (its path, what each document is)."""
    root, found = folder / "library", {}
    for i in range(60):
        suffix = list(PACKERS)[i % 3]
        path = root / ("sub" if i % 2 else "") / f"{i:02}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        found[path] = b"" if i % 20 == 7 else f"copy {i % 2}".encode() * 3 if i % 9 == 1 else f"text {i} ".encode() * (
            1 + i % 5)
        path.write_bytes(PACKERS[suffix](found[path]))
    for name in (".hidden", "sub/.git/config"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\0hidden")
    return root, [found[path] for path in sorted(found, key=str) if found[path]]


def test_a_folder_is_split_by_document(library, monkeypatch):
    root, documents = library
    corpus = load(str(root))
    train, val = (part.numpy().tobytes().split(b"\n") for part in (corpus.train, corpus.val))
    assert sorted(train + val) == sorted(documents) and not {*train} & {*val} and corpus.test is None
    assert [text for text in documents if text in {*val}] == val and len({*documents}) < len(documents)
    total, most = sum(map(len, documents)), max(map(len, val))
    assert total / 20 <= sum(map(len, val)) <= total / 20 + 9 * most and corpus.documents == list(map(len, documents))
    assert f"{total:,} bytes in {len(documents)} documents, {len(val)} of them" in corpus.source
    monkeypatch.chdir(root.parent.parent)
    for name in ("library", f"{root}/**/[0-9]*", f"{root}/**/*"):        # of NANOLAB_DATA too, and by a glob
        again = load(name)
        assert torch.equal(again.train, corpus.train) and torch.equal(again.val, corpus.val)
    figures, apart = statistics(corpus), load(str(root), document_end="\\0")
    assert (figures["pieces"], figures["n_pieces"]) == ("documents (a file each)", len(documents))
    for part, same in ((apart.train, train), (apart.val, val)):
        assert part.numpy().tobytes().split(b"\0") == same
    figures = statistics(apart, "\\0")
    assert figures["n_pieces"] == len(documents) and figures["longest"] in range(*(max(map(len, documents)) + i
                                                                                 for i in (0, 2)))
    cut = load(str(root), 100)
    assert sum(cut.documents) == 100 and b"".join(documents).startswith(b"".join(documents[:len(cut.documents) - 1]))
    state = Batches(corpus.train, 2, 8).state_dict()
    path = next(path for path in sorted(root.glob("*.txt")) if path.read_bytes() in train)
    path.write_bytes(path.read_bytes().replace(b"t", b"T"))
    with raises_one_line("fingerprint of the data"):
        Batches(load(str(root)).train, 2, 8).load_state_dict(state)


def test_a_split_of_few_documents(folder):
    """Where all are larger than a twentieth the smallest is held out; a small one that comes late is, too."""
    for name, size in (("a", 400), ("b", 300), ("c", 350)):
        (folder / f"{name}.txt").write_bytes(name.encode() * size)
    assert load(f"{folder}/*.txt").val.unique().tolist() == [ord("b")]
    (folder / "d.txt").write_bytes(b"d" * 20)
    assert load(f"{folder}/*.txt").val.unique().tolist() == [ord("d")]


@pytest.mark.parametrize("content, words", [
    ({}, ["there is no file"]), ({"a": b"one"}, ["has 1 different documents"]),
    ({"a": b"one", "b": b"one"}, ["has 1 different documents", "name a file"]), ({"a": b""}, ["has 0 different"]),
    ({"a": b"one", "b.png": b"\x89PNG\0\0"}, ["b.png is no text"]), ({"a": b"1", "b.gz": b"2"}, ["b.gz is damaged"]),
    ({"a": b"one", "b": None}, ["cannot read", "b: No such file"]), ({"a": b"one", "b": "pipe"}, ["b is no file"])])
def test_folders_that_cannot_serve(folder, content, words):
    for name, told in content.items():
        path = folder / name
        path.symlink_to("nowhere") if told is None else os.mkfifo(path) if told == "pipe" else path.write_bytes(told)
    with raises_one_line(*words):
        load(str(folder))
    with raises_one_line("there is no file"):
        load(f"{folder}/*.none")


# --- Batches ---

DATA = torch.randint(256, (1009,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
MODES = ["random", "epochs", "streams"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_targets", [1, 3])
def test_batches_hold_the_bytes_of_the_data(mode, n_targets):
    """Also of ids above 255, which come out as they are."""
    batches, large = (Batches(data, 4, 16, n_targets, mode, seed=1) for data in (DATA, DATA.int() + 1000))
    for _ in range(40):
        (x, y), wide = batches.next(), large.next()
        assert x.shape == (4, 16) and y.shape == (4, 16, n_targets) and x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous()
        for b, start in enumerate(map(start_of, x)):
            for k in range(n_targets):
                assert torch.equal(y[b, :, k], DATA[start + k + 1:start + k + 17].long())
        assert torch.equal(wide[0], x + 1000) and torch.equal(wide[1], y + 1000)


def start_of(row):
    """Where a row stands in DATA: random bytes, of which sixteen stand at one place."""
    start, = (DATA.unfold(0, len(row), 1) == row).all(1).nonzero()[:, 0].tolist()
    return start


def places(batches, count):
    """Where the windows of the next `count` batches start in DATA."""
    return [start_of(row) for _ in range(count) for row in batches.next()[0]]


@pytest.mark.parametrize("n_targets", [1, 5])
def test_an_epoch_takes_no_byte_twice_and_nearly_all(n_targets):
    """In whatever batches, which may span two epochs and be others after a resume."""
    batches, phases, every = Batches(DATA, 1, 16, n_targets, "epochs", seed=3), set(), []
    for epoch in range(8):
        starts = places(batches, 1)
        starts += places(batches, round(1 / (batches.epoch - epoch)) - 1)
        assert batches.epoch == epoch + 1 and starts != sorted(starts)
        phase = min(starts)
        assert phase < 16 and max(starts) > 1009 - n_targets - 2 * 16  # not a window more would fit
        assert sorted(starts) == list(range(phase, max(starts) + 1, 16))
        phases.add(phase)
        every += starts
    assert len(phases) > 3
    seven = Batches(DATA, 7, 16, n_targets, "epochs", seed=3)
    assert places(seven, 20) == every[:140]
    eight = Batches(DATA, 8, 16, n_targets, "epochs", seed=1)
    eight.load_state_dict(seven.state_dict())
    assert places(eight, 10) == every[140:220]


def test_places_reach_both_ends():
    batches = Batches(DATA[:40], 64, 16, 2, "random")
    starts = [start_of(row) for _ in range(20) for row in batches.next()[0]]
    assert min(starts) == 0 and max(starts) == 40 - 18 and len(set(starts)) == 23
    batches = Batches(DATA[:18], 2, 16, 1, "epochs")  # an epoch of barely one window
    assert set(places(batches, 10)) == {0, 1} and batches.epoch == 20


def test_streams_follow_on_and_start_again():
    batches = Batches(DATA, 3, 20, 2, "streams")
    steps = (1009 - 2) // 60
    for lap in range(3):
        for step in range(steps):
            assert places(batches, 1) == [b * steps * 20 + step * 20 for b in range(3)]
            assert batches.fresh == (step == 0)
            assert batches.epoch == pytest.approx(lap + (step + 1) / steps)
    single = Batches(DATA, 3, 20)
    single.next(), single.next()
    assert single.fresh  # windows of the other modes never follow on


@pytest.mark.parametrize("n_targets", [1, 5])
def test_windows_of_documents_begin_with_them(n_targets):
    """Each once an epoch, in an order of its own, but those too near the end for a window."""
    begins = torch.tensor([0, 3, 40, 41, 500, 1009 - 16 - n_targets, 1009 - 15 - n_targets, 1008, 1009])
    batches = Batches(DATA, 2, 16, n_targets, "documents", seed=1, begins=begins)
    orders = [tuple(places(batches, 3)) for _ in range(5)]
    assert all(sorted(order) == begins[:6].tolist() for order in orders) and len({*orders}) == 5
    assert batches.epoch == 5 and batches.fresh


def test_impossible_batches():
    with raises_one_line("random, epochs, streams or documents, not 'rondom'"):
        Batches(DATA, 4, 16, mode="rondom")
    with pytest.raises(ValueError, match="must be 1-D"):
        Batches(DATA.float(), 4, 16)
    for mode, needed in (("random", 18), ("epochs", 18), ("streams", 66)):
        Batches(DATA[:needed], 4, 16, 2, mode).next()
        with raises_one_line(f"has {needed - 1} bytes", f"need {needed}:"):
            Batches(DATA[:needed - 1], 4, 16, 2, mode)


# --- Statistics ---

@pytest.mark.parametrize("content, pieces, count, mean", [
    (b"one\ntwo\n\nthree\n\n\nfour", "paragraphs", 3, 16 / 3), (b"one\r\ntwo\r\nthree\n", "lines", 3, 11 / 3),
    (b"word", "lines", 1, 4)])
def test_other_text_is_measured_in_paragraphs_or_lines(folder, tmp_path, content, pieces, count, mean):
    (tmp_path / "plain").write_bytes(content)
    figures = statistics(load(str(tmp_path / "plain")))
    assert figures["pieces"].startswith(pieces) and figures["n_pieces"] == count
    assert figures["mean"] == pytest.approx(mean)
    assert figures["bytes"] == len(content) == figures["counts"].sum() and figures["distinct"] == len(set(content))


def test_documents_are_counted_as_a_model_finds_them():
    """Where their last bytes overlap, too; of each part by itself."""
    parts = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (b"a..b...c", b"d..")]
    corpus = text.Corpus("name", *parts, None, "source")
    figures = statistics(corpus, "..")
    assert (figures["n_pieces"], figures["mean"], figures["median"], figures["longest"]) == (5, 11 / 5, 3, 3)
    assert statistics(corpus, "\\x2e.")["pieces"] == "documents (to \\x2e.)"
    for batching, documents in ("documents", "none"), ("random", "mask"):
        assert text.ending(dict(batching=batching, documents=documents, document_end="e")) == "e"
    assert text.ending(dict(batching="random", document_end="e")) is None
    assert text.document_beginnings(parts[0], ".\\x2e", "name").tolist() == [0, 3, 6, 7]
    with raises_one_line("document_end a.b stands nowhere in the training part of name"):
        text.document_beginnings(parts[0], "a.b", "name")
    with raises_one_line("document_end is '', but must be at least one byte"):
        statistics(corpus, "")


@pytest.mark.skipif(not Path(os.environ.get("NANOLAB_DATA") or "/nowhere").is_dir(), reason="NANOLAB_DATA is no folder")
@pytest.mark.parametrize("name, file, max_bytes, parts, digest, distinct", [
    ("enwik8", text.PIECE[0], 4_150_000, [3_735_000, 207_500, 207_500], "204482105f330f13", 200),
    ("shakespeare", "tinyshakespeare.txt", None, [1_003_854, 111_540], "86c4e6aa9db7c042", 65)])
def test_real_files(name, file, max_bytes, parts, digest, distinct):
    if not files.find(file) or name == "enwik8" and files.find("enwik8"):
        pytest.skip("not there, or the whole")
    corpus = load(name, max_bytes)
    assert [part.numel() for part in (corpus.train, corpus.val, corpus.test) if part is not None] == parts
    assert hashlib.sha256(whole(corpus)).hexdigest().startswith(digest)
    assert statistics(corpus)["distinct"] == distinct and (max_bytes is None or statistics(corpus)["n_pieces"] == 489)

