"""Text as bytes: finds, fetches, checks and splits a data set, and cuts it into batches.

    python data/text.py enwik8 --stats        # bytes, distinct bytes (205), article lengths, byte_distribution.png
    python data/text.py enwik8 --stats --document_end "</page>\\n"       # documents as --documents mask finds them

Named sets: `enwik8` (the first 10^8 bytes of a dump of the English Wikipedia of 2006), `shakespeare` (tinyshakespeare)
and `stdlib` (the source of this machine's Python standard library: no download). Any other name is a file, raw or .gz
.xz .bz2 .zip, or a folder or glob ("my/**/*.txt") of such files, each a document. They are looked for in the folders of
NANOLAB_DATA, then in data/downloads/, then downloaded. An archive that unpacks to more than 4 GiB, or to more than 256
MiB and 300 times its size, is refused (--max_bytes reads its beginning).
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ is on the path
from nanolab.settings import answer_help, serve

answer_help(__name__, __file__)  # before the seconds that the next lines take

import contextlib
import hashlib
import os
import re
import sysconfig
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from data import files
from nanolab.run import command, onto
from nanolab.settings import UserError, as_bytes, unknown


@dataclass
class Corpus:
    """A text in three parts, each a 1-D uint8 tensor: train, val and test (None where the set has only two)."""
    name: str
    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor | None
    source: str  # one line: what, how many bytes, where from
    documents: list = None  # of a folder or glob: the bytes of each file


SETS = {  # name: file, bytes, what `git hash-object` prints of it, where it can be had
    "enwik8": ("enwik8", 100_000_000, "73b1bbbdbe2623eb9f8561314ba9e4af9412b7ae",
               "http://mattmahoney.net/dc/enwik8.zip"),
    "shakespeare": ("tinyshakespeare.txt", 1_115_394, "7dcb3a2d4cc3b48b6283dd46870bfeb78f88aac9",
                    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
}
PIECE = ("enwik8-first-4150000.txt", 4_150_000, "a3c217a85591b141d0960991ef2a9628692aed13")
NAMES = [*SETS, "stdlib"]


# --- Finding and reading ---

def load(dataset, max_bytes=None, device="cpu", document_end=None):
    """Finds (or downloads) a data set and splits it: a Corpus whose parts lie on `device`.

    dataset: enwik8, shakespeare, stdlib, a file (raw, or .gz .xz .bz2 .zip with one member), a folder or glob of them
    max_bytes: [>= 1] only the first so many bytes, taken before splitting; none: all
    document_end: [none] what stands between two files, escapes as in Python; none: a newline

    On the CPU a raw file is memory-mapped. Splits, in bytes: 90/5/5 (enwik8: 90, 5 and 5 million); shakespeare 90/10
    without a test part, as nanoGPT has it; documents of a folder about 95/5, without one, see `_of_documents`.
    Raises UserError: unknown name, missing, empty or damaged file, wrong checksum, no network, max_bytes out of range,
    among documents one that is no text.
    """
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max_bytes is {max_bytes}: it must be at least 1, or none for all")
    name, between = dataset, b"\n" if document_end is None else as_bytes(document_end)
    if dataset == "stdlib":
        data, source = _stdlib(between)
    elif dataset not in SETS and (paths := files.listed(dataset)):
        return _of_documents(dataset, paths, max_bytes, torch.device(device), between)
    else:
        path = _acquire(dataset, max_bytes) if dataset in SETS else _existing(dataset)
        data, source = files.read(path, max_bytes), str(path)
        name = dataset if dataset in SETS else path.name
    _check_max_bytes(max_bytes, data.numel(), dataset)
    data = data[:max_bytes].to(torch.device(device))
    n, n_train, in_two = data.numel(), data.numel() * 9 // 10, dataset == "shakespeare"
    n_val = (n - n_train) // (1 if in_two else 2)
    train, val, test = data.split([n_train, n_val, n - n_train - n_val])
    return Corpus(name, train, val, None if in_two else test,
                  f"{name}: {'the first ' if max_bytes else ''}{n:,} bytes of {source}")


def check_split(data, block_size, unit="bytes"):
    """Before the first step: UserError where a validation split (N,) has nothing to score; where it is no whole window,
    one line says how little its figures mean."""
    n = data.numel()
    if n < 2:
        raise UserError(f"the validation split has {n} {unit}: too few to be scored; take more data, or "
                        "--eval_interval none")
    if n <= block_size:
        print(f"the validation split has {n} {unit}, less than one window of {block_size}: its figures mean little")


def ending(settings):
    """What ends a document, where settings ask for documents; else None."""
    asked = settings.get("documents", "none") != "none" or settings.get("batching") == "documents"
    return settings["document_end"] if asked else None


def beginnings(data, document_end):
    """(D,) int64 on the CPU: where documents begin in data (N,), its first byte and after every end, overlapping or
    not, as a model with `documents` finds them. UserError: an end of no byte."""
    end, data = as_bytes(document_end), data.cpu()
    if not end:
        raise UserError(f"document_end is {document_end!r}, but must be at least one byte, as Python writes it")
    found = torch.ones(max(0, data.numel() - len(end) + 1), dtype=torch.bool)
    for place, byte in enumerate(end):
        found &= data[place:place + found.numel()] == byte
    return torch.cat([torch.zeros(1, dtype=torch.int64), found.nonzero()[:, 0] + len(end)])


def document_beginnings(data, document_end, dataset):
    """`beginnings` of a training split, before the first step: UserError where it has no document's end, since each
    window would be one."""
    begins = beginnings(data, document_end)
    if len(begins) == 1:
        raise UserError(f"document_end {document_end} stands nowhere in the training part of {dataset}: name what ends "
                        "a document there, or leave documents out")
    return begins


def _check_max_bytes(max_bytes, size, dataset):
    if max_bytes is not None and max_bytes > size:
        raise UserError(f"max_bytes is {max_bytes:,}, but {dataset} has only {size:,} bytes")


def _acquire(dataset, max_bytes):
    """The path of a named set's checked file; downloads it where it lies nowhere."""
    file, size, blob_id, url = SETS[dataset]
    _check_max_bytes(max_bytes, size, dataset)
    path, piece = files.find(file), files.find(PIECE[0]) if dataset == "enwik8" else None
    if path:
        return files.verified(path, file, size, blob_id)
    if piece and (max_bytes or size) <= PIECE[1]:
        return files.verified(piece, *PIECE)
    try:
        return files.download(url, files.DOWNLOADS / file, size, blob_id)
    except UserError as error:
        way = (f"put {file} ({size:,} bytes; raw or {' '.join(files.OPENERS)}) into {files.DOWNLOADS} or a folder of "
               "NANOLAB_DATA, ")
        if dataset == "enwik8":
            way += f"or use --max_bytes {PIECE[1]}{'' if piece else f' with {PIECE[0]}.xz there'}, "
        raise UserError(f"{error}; {way}or use --dataset stdlib") from error


def _existing(dataset):
    """The path of a file that a person named."""
    found = files.existing(dataset)
    if found is None:
        raise unknown("dataset", dataset, [*NAMES, "a file, folder or glob"])
    if not found.is_file():
        raise UserError(f"dataset {dataset!r} is not a file: name a file, or one of {', '.join(NAMES)}")
    return found


def _of_documents(dataset, paths, max_bytes, device, between):
    """A Corpus of files, each a document, in the order of their paths, bytes `between` them; empty ones are left out.

    For validation are, in the order of a check sum of their content, documents of at most a twentieth of all bytes
    until they make up a twentieth (where all are larger, the smallest), so that copies of a document are on one side.
    """
    texts, left = [], max_bytes
    for path in paths:
        texts.append(files.content(path, left))
        if texts[-1].find(0, 0, 8192) >= 0:
            raise UserError(f"{path} is no text, it has a zero byte: take it away, or name the others by a glob")
        if left is not None and not (left := left - len(texts[-1])):
            break
    texts = [text for text in texts if text]
    total = sum(map(len, texts))
    _check_max_bytes(max_bytes, total, dataset)
    keys, sizes = list(map(zlib.crc32, texts)), Counter()
    for key, text in zip(keys, texts):
        sizes[key] += len(text)
    if len(sizes) < 2:
        raise UserError(f"dataset {dataset!r} has {len(sizes)} different documents, and takes two to be split: name a "
                        "file, which is cut anywhere")
    held, have = set(), 0
    for key in sorted(sizes):
        if have < total / 20 and sizes[key] <= total / 20:
            held.add(key)
            have += sizes[key]
    held = held or {min(sizes, key=sizes.get)}
    sides = [[text for key, text in zip(keys, texts) if (key in held) == side] for side in (False, True)]
    train, val = (torch.frombuffer(bytearray(between).join(side), dtype=torch.uint8).to(device) for side in sides)
    source = (f"{dataset}: {'the first ' if max_bytes else ''}{total:,} bytes in {len(texts):,} documents, "
              f"{len(sides[1]):,} of them for validation")
    return Corpus(Path(dataset).name, train, val, None, source, list(map(len, texts)))


def _stdlib(between=b"\n"):
    """(data, source): the standard library's .py files, those that are UTF-8, joined by bytes `between` them.

    In the order of a hash of their relative paths, so that the parts of a split look alike; splits cut at plain byte
    positions. Left out: tests, installed packages, IDLE, turtle demos, pip's bundle, what Python's build generated.
    """
    root, texts, paths = sysconfig.get_path("stdlib"), [], []
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "ensurepip", "__pycache__"}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith("config-")]
        paths += [Path(folder, name) for name in names if re.fullmatch(r"(?!_sysconfigdata).*\.py", name)]
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()):
        with contextlib.suppress(UnicodeDecodeError):
            texts.append(path.read_bytes().decode().encode())
    whole = bytearray(between.join(texts))
    if not whole:
        raise UserError(f"no source files of the Python standard library in {root}: use --dataset with a text file")
    return torch.frombuffer(whole, dtype=torch.uint8), (
        f"the standard library of Python {sys.version.split()[0]} ({len(texts)} files, {len(whole):,} bytes in {root}, "
        f"sha256 {hashlib.sha256(whole).hexdigest()[:12]})")


# --- Batches ---

def inputs_and_targets(windows, K, device):
    """windows (B, T + K) of ids -> x (B, T), y (B, T, K), int64 on device: y[b, t, k] is k + 1 places after x[b, t]."""
    windows = onto(device, windows)
    ahead = windows[:, 1:].unfold(1, K, 1)  # (B, T, K)
    return windows[:, :-K].long(), ahead.to(torch.long, memory_format=torch.contiguous_format)


class Batches:
    """Endless batches of windows out of one part of a corpus: data, 1-D uint8, int32 or int64.

    batch_size: windows (B). block_size: bytes of input (T). n_targets: bytes predicted ahead of each position (K).
    device: where the batches go. seed: of the generator; torch's global generators are never touched.

    mode: `random`: places drawn uniformly, with replacement.
          `epochs`: without replacement: an epoch cuts the data, from a phase drawn in [0, T), into windows T apart and
          shuffles them, so that no byte is a first target twice; a batch may span two epochs.
          `streams`: B places that divide the data evenly, each going on by T with every batch and, at the end of its
          share, back to its start; `fresh` says when.
          `documents`: each window begins with a document, `begins` (D,) of them, shuffled in every epoch; what is
          further in than T is never read, and what follows a shorter one fills its window.
    Raises UserError: data too short for one window, a size below 1, an unknown mode.
    """

    def __init__(self, data, batch_size, block_size, n_targets=1, mode="random", seed=0, device="cpu", begins=None):
        if mode not in ("random", "epochs", "streams", "documents"):
            raise UserError(f"batches come as random, epochs, streams or documents, not {mode!r}")
        sizes = f"batch_size {batch_size}, block_size {block_size}, n_targets {n_targets}"
        if min(batch_size, block_size, n_targets) < 1:
            raise UserError(f"{sizes}: each must be at least 1")
        if data.dim() != 1 or data.dtype not in (torch.uint8, torch.int32, torch.int64):
            raise ValueError(f"data must be 1-D, of uint8, int32 or int64, not {data.dim()}-D {data.dtype}")
        needed = block_size * (batch_size if mode == "streams" else 1) + n_targets
        if data.numel() < needed:
            raise UserError(f"this part of the data has {data.numel():,} bytes; {mode} batches with {sizes} need "
                            f"{needed:,}: take a smaller block_size or more data")
        self.data, self.batch_size, self.block_size, self.n_targets = data, batch_size, block_size, n_targets
        self.mode, self.device = mode, torch.device(device)
        self.begins = None if begins is None else begins[begins + block_size + n_targets <= data.numel()]
        self.generator = torch.Generator().manual_seed(seed)
        pieces = torch.linspace(0, max(0, data.numel() - 4096), 64).long().tolist()
        self._fingerprint = zlib.crc32(torch.cat([data[i:i + 4096] for i in pieces]).cpu().numpy())
        self.passes = 0  # whole passes over the data before this one
        self._start_pass()

    def _start_pass(self):
        """Lays out where a pass's windows start, in order; position counts those that were given."""
        n, T, K = self.data.numel(), self.block_size, self.n_targets
        self.position, self._before = 0, self.generator.get_state()  # from which a resumed run draws the pass again
        if self.mode == "random":
            self._length = n / T
            return
        if self.mode == "epochs":
            phase = int(torch.randint(min(T, n - T - K + 1), (), generator=self.generator))
            self._order = torch.randperm((n - K - phase) // T, generator=self.generator).mul_(T).add_(phase)
        elif self.mode == "documents":
            self._order = self.begins[torch.randperm(len(self.begins), generator=self.generator)]
        else:
            steps = (n - K) // (self.batch_size * T)
            self._order = torch.arange(self.batch_size * steps).view(-1, steps).T.flatten().mul_(T)  # (steps * B,)
        self._length = self._order.numel()

    @property
    def epoch(self):
        """float: passes over the data so far. In mode random: bytes drawn as inputs over bytes of the data."""
        return self.passes + self.position / self._length

    @property
    def fresh(self):
        """bool: the latest batch continues no earlier one (its streams have just (re)started): forget the memory."""
        return self.mode != "streams" or self.position <= self.batch_size

    def next(self):
        """-> x (B, T), y (B, T, K) as of inputs_and_targets."""
        T, K = self.block_size, self.n_targets
        places = onto(self.data.device, self._places())
        return inputs_and_targets(self.data.unfold(0, T + K, 1).index_select(0, places), K, self.device)

    def _places(self):
        """Where the next batch's windows start: (B,) int64 on the CPU."""
        if self.mode == "random":
            self.position += self.batch_size
            last = self.data.numel() - self.block_size - self.n_targets
            return torch.randint(last + 1, (self.batch_size,), generator=self.generator)
        parts, missing = [], self.batch_size
        while missing:
            if self.position == self._length:
                self.passes += 1
                self._start_pass()
            parts.append(self._order[self.position:self.position + missing])
            self.position += parts[-1].numel()
            missing -= parts[-1].numel()
        return torch.cat(parts)

    def _kind(self):
        """What a saved state must share with these batches for its position to mean the same."""
        more = {"streams": lambda: {"batch_size": self.batch_size},
                "documents": lambda: {"fingerprint of the documents": zlib.crc32(self.begins.numpy())}}
        return {"mode": self.mode, "bytes": self.data.numel(), "fingerprint of the data": self._fingerprint,
                "block_size": self.block_size, "n_targets": self.n_targets, **more.get(self.mode, dict)()}

    def state_dict(self):
        """Plain strings, ints and one uint8 tensor, from which load_state_dict goes on exactly, also within a pass."""
        state = self._before if self.mode in ("epochs", "documents") else self.generator.get_state()
        return {**self._kind(), "passes": self.passes, "position": self.position, "generator": state.clone()}

    def load_state_dict(self, state):
        """Goes on where state was taken. Raises UserError where the mode, the data's size or the windows differ."""
        for key, here in self._kind().items():
            if state.get(key) != here:
                raise UserError(f"the saved batches have {key} {state.get(key)}, these have {here}: resume with the "
                                "data and the batch settings of the saved run")
        self.generator.set_state(state["generator"].cpu())
        self._start_pass()
        self.passes, self.position = state["passes"], state["position"]


# --- Statistics ---

def statistics(corpus, document_end=None):
    """Figures of a whole corpus: bytes, distinct, counts (256,) int64; pieces (what was measured), n_pieces, and mean,
    median and longest of their bytes. Pieces are what `document_end` ends, in each part by itself; without it
    documents, where each is a file; else wiki articles, <page> to </page>, else paragraphs (empty lines between), else
    lines."""
    parts = [part.cpu() for part in (corpus.train, corpus.val, corpus.test) if part is not None]
    text = torch.cat(parts).numpy().tobytes()
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    lengths, pieces, end = [], "complete articles (<page> to </page>)", 0
    while (start := text.find(b"<page>", end)) >= 0 and (stop := text.find(b"</page>", start)) >= 0:
        end = stop + len(b"</page>")
        lengths.append(end - start)
    for name, border in (("paragraphs", rb"(?:\r?\n){2,}"), ("lines", rb"[\r\n]+")) if not lengths else ():
        if len(lengths) < 2:
            pieces, lengths = f"{name} (there are no articles)", [len(p) for p in re.split(border, text) if p] or [0]
    if document_end is not None:
        pieces = f"documents (to {document_end})"
        lengths = [n for part in parts
                   for n in np.diff([*beginnings(part, document_end).tolist(), part.numel()]).tolist() if n]
    elif corpus.documents:
        pieces, lengths = "documents (a file each)", corpus.documents
    return {"bytes": len(text), "distinct": int((counts > 0).sum()), "counts": counts, "pieces": pieces,
            "n_pieces": len(lengths), "mean": float(np.mean(lengths)), "median": float(np.median(lengths)),
            "longest": max(lengths)}


def draw_bytes(figures, name, path):
    """Writes a picture of statistics(...): how frequent each byte value is, on a logarithmic scale."""
    from matplotlib.figure import Figure
    share, figure = figures["counts"] / figures["bytes"], Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots()
    for first, stop, kind in ((0, 33, "control, space"), (33, 128, "ASCII"), (128, 192, "UTF-8 continuation"),
                              (192, 256, "UTF-8 lead")):
        axes.bar(range(first, stop), share[first:stop], width=0.9, label=kind)
    axes.set(yscale="log", xlim=(-1, 256), ylim=(share[share > 0].min() / 3, 1), ylabel="share of all bytes",
             xlabel="byte value", title=f"{name}: {figures['bytes']:,} bytes, {figures['distinct']} distinct")
    ticks = {0: "", 10: "newline", 32: "space", 48: "0", 65: "A", 97: "a", 128: "", 160: "", 192: "", 224: "", 255: ""}
    axes.set_xticks(list(ticks), [f"{value}\n{text}" for value, text in ticks.items()])
    axes.legend(loc="upper right", ncols=4)
    figure.savefig(path, dpi=110)


def describe(corpus, stats=False, out=".", document_end=None):
    """Prints what there is; for --stats counts of it, and draws how frequent each byte is.

    stats: count, and write byte_distribution.png
    out: the folder of byte_distribution.png
    document_end: [none] what ends a document
    """
    parts = {part: getattr(corpus, part) for part in ("train", "val", "test") if getattr(corpus, part) is not None}
    print(corpus.source)
    print("split: " + ", ".join(f"{part} {data.numel():,}" for part, data in parts.items()) + " bytes")
    if not stats:
        return
    figures, path = statistics(corpus, document_end), Path(out) / "byte_distribution.png"
    print(f"distinct bytes: {figures['distinct']}")
    print(f"{figures['pieces']}: {figures['n_pieces']:,}, of {figures['mean']:,.1f} bytes in the mean, "
          f"{figures['median']:,.1f} in the median, {figures['longest']:,} at most")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_bytes(figures, corpus.name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"wrote {path}")


main = command(serve(load, describe))

if __name__ == "__main__":
    main()
