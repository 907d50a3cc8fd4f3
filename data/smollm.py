"""The SmolLM corpus (HuggingFaceTB/smollm-corpus), streamed from shards: batches, held-out documents, exact resume.

    python data/smollm.py cosmopedia-v2 --shards 2      # fetch the first two of 104 shards, and count
    python data/smollm.py my.jsonl.gz                   # any .parquet, .jsonl or .jsonl.gz with a text; also globs

Subsets: cosmopedia-v2 (104 shards; 39 million textbooks and stories by a language model), fineweb-edu-dedup (234; web
pages for education) and python-edu (2), which has no text: only ids of blobs that lie in Software Heritage's bucket.
Shards are looked for in smollm/SUBSET/ of the folders of NANOLAB_DATA and of data/downloads/, and fetched into the
latter. The subsets, their folders, the names of the shards (train-00000-of-00104.parquet) and the column `text` of
cosmopedia-v2 were checked against copies of the hub's pages; that fineweb-edu-dedup has 234 shards with `text`, and
python-edu `blob_id`, is remembered. No shard has been downloaded and read by these lines: the machine that they
were written on has no way to the hub.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ is on the path
from nanolab.settings import answer_help, serve

answer_help(__name__, __file__)  # before the seconds that the next lines take

import glob
import gzip
import hashlib
import itertools
import json
import os
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from data.files import fetched, folders
from data.text import inputs_and_targets
from data.tokens import needed, token_bytes
from nanolab.run import command
from nanolab.settings import UserError

SUBSETS = {"cosmopedia-v2": 104, "fineweb-edu-dedup": 234, "python-edu": 2}  # shards
URL = "https://huggingface.co/datasets/HuggingFaceTB/smollm-corpus/resolve/main/{}/{}"
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
ROWS = 256  # documents of a parquet file that are in memory together
BUFFER = 1024  # documents that are read, and shuffled, together
HELD_OUT = 200  # one document in so many is never trained on
LINE = 2 ** 26  # bytes that a line of .jsonl may have, packed or not


# --- Files ---

def find(source, shards=None):
    """The files that a word means, a sorted list of paths.

    source: cosmopedia-v2, fineweb-edu-dedup, a file, or a folder or glob of .parquet, .jsonl and .jsonl.gz
    shards: [>= 1, <= 1000] of a subset, exactly its first so many, fetched where they are not here; none: those that
        are here, and where there are none the first one, fetched

    Raises UserError: nothing there, python-edu, no connection, more shards than there are.
    """
    if source not in SUBSETS:
        if shards is not None:
            raise UserError(f"shards has no effect on {source!r}: it says how many of a subset's are fetched")
        path = Path(source).expanduser()
        found = sorted(path.iterdir()) if path.is_dir() else [Path(name) for name in sorted(glob.glob(str(path)))]
        if path.is_file():  # whatever its name, also one with [ ] in it
            found = [path]
        if files := [file for file in found if file.name.endswith(ENDINGS) and file.is_file()]:
            return files
        raise UserError(f"{source!r} is no {', '.join(ENDINGS)} file, no folder or glob of such files and no subset of "
                        f"the SmolLM corpus: those are {', '.join(SUBSETS)}")
    if source == "python-edu":
        raise UserError("python-edu has ids of blobs instead of texts: fetch these from Software Heritage's bucket, "
                        "write them as the text of a .jsonl, and name that file")
    if shards is None:
        here = {file.name: file for folder in reversed(folders())
                for file in (folder / "smollm" / source).glob("*.parquet")}
        if here:
            return [here[name] for name in sorted(here)]
        shards = 1
    if not 1 <= shards <= SUBSETS[source]:
        raise UserError(f"shards is {shards}: {source} has from 1 to {SUBSETS[source]}")
    return [_shard(source, f"train-{i:05}-of-{SUBSETS[source]:05}.parquet") for i in range(shards)]


def _shard(subset, name):
    """The path of one shard of a subset; fetches it where it lies nowhere."""
    places = [folder / "smollm" / subset / name for folder in folders()]
    if found := next((path for path in places if path.is_file()), None):
        return found

    def checked(part):
        if not _is_parquet(part):
            raise ValueError("it is no parquet file")
        os.replace(part, places[-1])
    try:
        return fetched(URL.format(subset, name), places[-1], checked)  # in data/downloads/
    except UserError as error:
        raise UserError(f"{error}; a copy of {name} can be put into smollm/{subset}/ of a folder of "
                        "NANOLAB_DATA") from error


def _is_parquet(path):
    """Does a file begin and end as parquet files do?"""
    with open(path, "rb") as file:
        begin = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        return begin == file.read(4) == b"PAR1"


def _parquet(path):
    """pyarrow's ParquetFile; it reads pieces of a column, not whole row groups. Raises UserError: it is none."""
    needed("pyarrow")
    module = needed("pyarrow.parquet")
    try:
        file = module.ParquetFile(path, buffer_size=2 ** 20, pre_buffer=False)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"{path} is damaged or no parquet file ({_line(error)})") from error
    names = file.schema_arrow.names
    if "text" not in names or "string" not in str(file.schema_arrow.field("text").type):
        hint = ": it has blob_id, so its texts lie elsewhere, as those of python-edu do" if "blob_id" in names else ""
        raise UserError(f"{path} has no column text with strings, only {', '.join(names)}{hint}")
    return file


def _line(error):
    return " ".join(str(error).split())[:120]


def _lines(path):
    """Yields the lines of a .jsonl or .jsonl.gz. Raises UserError: one above LINE bytes, unreadable."""
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            for row in itertools.count(1):
                line = file.readline(LINE + 1)
                if len(line) > LINE:
                    raise UserError(f"line {row:,} of {path} has more than {LINE:,} bytes, which is refused")
                if not line:
                    return
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {_line(error)}") from error


def fingerprint(files):
    """A check sum of files, by their sizes and 64 pieces of 4,096 bytes of each, as text.Batches has of a text."""
    found = 0
    for path in files:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                found = zlib.crc32(str(size).encode(), found)
                for place in sorted({i * max(0, size - 4096) // 63 for i in range(64)}):
                    file.seek(place)
                    found = zlib.crc32(file.read(4096), found)
        except OSError as error:
            raise UserError(f"cannot read {path}: {_line(error)}") from error
    return found


def n_rows(path):
    """Documents of a file: of .parquet from its footer, of .jsonl the lines, all of which are read once."""
    if path.name.endswith(".parquet"):
        with _parquet(path) as file:
            return file.metadata.num_rows
    return sum(1 for _ in _lines(path))


# --- Documents ---

def documents(files, start=(0, 0)):
    """Yields (text, position), in the order of the files: a document and where the next one is, (file, row); goes on
    from the position `start`. At most ROWS documents are in memory. A missing text (null) is an empty one. Raises
    UserError, naming file and row: damaged, no texts, not UTF-8."""
    first, row = start
    for number in range(first, len(files)):
        path = Path(files[number])
        read = _parquet_rows if path.name.endswith(".parquet") else _json_rows
        for text, row in read(path, row):
            yield text, (number, row)
        row = 0


def _parquet_rows(path, start):
    """Yields (text, the next row) from row `start` on."""
    with _parquet(path) as file:
        row, metadata = 0, file.metadata
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if row + rows <= start:
                row += rows
                continue
            try:
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=["text"], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        if row > start:
                            yield text or "", row
            except (OSError, ValueError) as error:  # also bytes that are no UTF-8
                raise UserError(f"{path} cannot be read from row {row:,} on ({_line(error)})") from error


def _json_rows(path, start):
    """Yields (text, the next line) from line `start` on, counted from 0; empty lines are none."""
    for row, line in enumerate(_lines(path)):
        if row < start or not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text = "" if text is None else text
            text.encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"line {row + 1:,} of {path} is no JSON object with a text in UTF-8 "
                            f"({type(error).__name__}: {_line(error)})") from error
        yield text, row + 1


def is_held_out(text):
    """Is a document kept for validation? By a hash of its text, so that copies of it are all on one side."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % HELD_OUT == 0


# --- Batches ---

class Batches:
    """Endless batches of packed documents for next-token training.

    batch_size: rows (B). block_size: tokens of input (T). seed: of the generator, which draws nothing else. The id
    after each document is tokenizer.size. In memory are the tokens of BUFFER documents. What these blocks give is one
    stream of tokens, of which every row is the next T (and the one after). Several processes: give each its own files.
    Raises UserError: unreadable files, nothing to train on.
    """

    def __init__(self, files, tokenizer, batch_size, block_size, seed=0, device="cpu"):
        self.files, self.tokenizer, self.device = [Path(file) for file in files], tokenizer, torch.device(device)
        self.batch_size, self.block_size = batch_size, block_size
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = [n_rows(file) for file in self.files]
        if not sum(self.rows):
            raise UserError(f"{', '.join(map(str, files)) or 'a list of no files'}: there are no documents")
        self._fingerprint = fingerprint(self.files)
        self.passes, self._rest = 0, np.empty(0, np.int32)  # whole passes; tokens that were made and not yet given
        self._seek((0, 0))
        self._read_block()

    def _seek(self, position):
        """Goes on reading at a position."""
        self._position, self._documents = position, documents(self.files, position)

    def _read_block(self):
        """Reads and shuffles the next documents, over the end of the files where that comes in between."""
        self._start, self._before = self._position, self.generator.get_state()  # to read this block again
        block, ends = [], 0
        while len(block) < BUFFER:
            text, position = next(self._documents, (None, None))
            if text is None:
                ends += 1
                if block:
                    break
                if ends == 2:
                    raise UserError(f"all {sum(self.rows):,} documents are empty or held out: none is for training")
                self._seek((0, 0))
                self._start, self.passes = (0, 0), self.passes + 1
                continue
            self._position = position
            if text and not is_held_out(text):
                block.append(np.array([*self.tokenizer.encode(text), self.tokenizer.size], np.int32))
        self._block = [block[i] for i in torch.randperm(len(block), generator=self.generator).tolist()]
        self._given = 0

    @property
    def epoch(self):
        """float: passes over the documents so far, counted as they are given out of the blocks."""
        begin, end = (sum(self.rows[:file]) + row for file, row in (self._start, self._position))
        return self.passes + (begin + (end - begin) * self._given / len(self._block)) / sum(self.rows)

    def next(self):
        """-> x (B, T), y (B, T, 1) as of inputs_and_targets."""
        B, T = self.batch_size, self.block_size
        parts, have = [self._rest], len(self._rest)
        while have <= B * T:
            if self._given == len(self._block):
                self._read_block()
            parts.append(self._block[self._given])
            have += len(parts[-1])
            self._given += 1
        stream = np.concatenate(parts)
        self._rest = stream[B * T:].copy()
        return inputs_and_targets(torch.from_numpy(stream[:B * T + 1]).unfold(0, T + 1, T), 1, self.device)

    def _kind(self):
        """What a saved state must share with these batches for its position to mean the same."""
        return {"files": " ".join(file.name for file in self.files), "documents": sum(self.rows),
                "tokenizer": self.tokenizer.fingerprint, "end": self.tokenizer.size, "buffer": BUFFER,
                "one_in": HELD_OUT, "fingerprint of the data": self._fingerprint}

    def state_dict(self):
        """Plain strings, ints and two tensors, from which load_state_dict goes on exactly, also within a file."""
        return {**self._kind(), "passes": self.passes, "file": self._start[0], "row": self._start[1],
                "given": self._given, "generator": self._before.clone(), "rest": torch.from_numpy(self._rest.copy())}

    def load_state_dict(self, state):
        """Goes on where state was taken; reads one block again. Raises UserError where files or settings differ."""
        for key, here in self._kind().items():
            if state.get(key) != here and (key in state or "fingerprint" not in key):    # which older ones have not
                raise UserError(f"the saved batches have {key} {state.get(key)}, these have {here}: resume with the "
                                "data, tokenizer and batch settings of the saved run")
        self.generator.set_state(state["generator"].cpu())
        self.passes, self._rest = state["passes"], state["rest"].cpu().numpy().copy()
        self._seek((state["file"], state["row"]))
        self._read_block()
        self._given = state["given"]


def validation(files, tokenizer, n_tokens):
    """The first held-out documents: (tokens (N,) int64, n_bytes of UTF-8 that they stand for), N at most n_tokens, each
    document with tokenizer.size, which counts no bytes, after it. Raises UserError where no document is held out."""
    found = []
    for text in (text for text, _ in documents(files) if text and is_held_out(text)):
        found += [*tokenizer.encode(text), tokenizer.size]
        if len(found) >= n_tokens:
            break
    if not found:
        raise UserError(f"of the documents in {', '.join(map(str, files))} none is held out: one in {HELD_OUT} is; "
                        "take more files")
    ids = torch.tensor(found[:n_tokens])
    return ids, int(F.pad(token_bytes(tokenizer), (0, 1))[ids].sum())


# --- The command line ---

def _measured(files, n):
    """[(bytes, is it held out?)] of the first n documents."""
    return [(len(text.encode()), is_held_out(text)) for text, _ in itertools.islice(documents(files), n)]


def describe(files, documents=10_000):
    """Prints what there is.

    documents: [>= 1] how many to read for the figures
    """
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes, {n_rows(file):,} documents")
    read = _measured(files, documents)
    lengths, held_out = zip(*read) if read else ((0,), (False,))
    print(f"of the first {len(read):,} documents: {sum(lengths) / len(lengths):,.0f} bytes on average, "
          f"{max(lengths):,} at most, {sum(n == 0 for n in lengths):,} empty, {sum(held_out):,} held out")


main = command(serve(find, describe))

if __name__ == "__main__":
    main()
