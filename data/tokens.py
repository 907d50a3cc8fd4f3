"""Tokenizers: bytes, tiktoken's encodings, and byte pairs or sentencepiece models trained here. All give texts back.

    python data/tokens.py train --kind bpe --dataset shakespeare --vocab_size 1024 --out tok.bpe
    python data/tokens.py train --kind sentencepiece --vocab_size 1024 --out tok.model     # --model_type bpe, unigram
    python data/tokens.py show --tokenizer tok.bpe --text "To be, or not to be"            # ids and pieces
    python data/tokens.py show --tokenizer tiktoken:gpt2 --dataset shakespeare             # bytes a token

A tokenizer has `.name`, `.size` (ids), `.encode(text)`, `.decode(ids)`, `.pieces` (the bytes of each id), `.save(path)`
and `.fingerprint`, a digest of all that it does, so that a checkpoint can tell whether a file is the one it knows.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ is on the path
from nanolab.settings import answer_help, serve

answer_help(__name__, __file__)  # before the seconds that the next lines take

import base64
import binascii
import contextlib
import hashlib
import heapq
import importlib
import io
import json
import re
import time
from collections import Counter, defaultdict

import numpy as np
import torch

from data import text as texts
from nanolab.run import command, replacing
from nanolab.settings import UserError, unknown

KINDS = ("bpe", "sentencepiece")
MODEL_TYPES = ("unigram", "bpe")
ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")

# What byte pairs are never merged across, after GPT-2: contractions, words, numbers and the rest, each with the space
# before it; newlines; other white space, but for a last one before something. Every character fits an alternative, so
# nothing is lost; none of them has to go back, so long runs cost no stack.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
           r"|\n++|(?:[^\S\n](?!\S))++|[^\S\n]")
# Where a text can be cut without changing a token, ours or tiktoken's: their patterns end a piece after a single
# newline with a letter behind it, and no sentencepiece piece has a newline in it.
CUT = re.compile(r"(?<=\S\n)(?=[A-Za-z])")
CHUNK = 2 ** 20  # characters that are encoded together, at least
SPACE = "\u2581"  # sentencepiece's own sign for a space; the character itself is encoded as its three bytes
RUN = 500_000  # white space in a row, above which the search of tiktoken gives up; it is then cut into so much
MARK = b"\xc2\x0c\x20"  # of a protobuf field, number 200 of 32 bytes, that sentencepiece passes over: a digest


class Tokenizer:
    """What all have in common. pieces: list of bytes, one for each id; b"" for an id that stands for no text."""

    def __init__(self, name, pieces, definition):
        self.name, self.pieces, self.size = name, pieces, len(pieces)
        self.fingerprint = hashlib.sha256(definition).hexdigest()

    def encode(self, text):
        """str -> list of int. Raises UserError where the text has half a surrogate pair, which no UTF-8 can hold."""
        _utf8(text)
        return self._encode(text)

    def decode_bytes(self, ids):
        """ids, a sequence of int or a 1-D tensor -> bytes. Raises ValueError for an id that there is not."""
        ids = torch.as_tensor(ids).tolist()
        if ids and not 0 <= min(ids) <= max(ids) < self.size:
            raise ValueError(f"ids are from {min(ids)} to {max(ids)}: {self.name} has those from 0 to {self.size - 1}")
        return b"".join([self.pieces[i] for i in ids])

    def decode(self, ids):
        """The inverse of encode. Bytes that are no UTF-8, of ids that were not encoded so, become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, path):
        """Writes a file that open_tokenizer opens. Raises UserError where it cannot be written."""
        with replacing(Path(path).expanduser()) as file:
            file.write(self._content())

    def _content(self):
        return f"{self.name}\n".encode()


class Bytes(Tokenizer):
    """256 ids: UTF-8."""

    def __init__(self):
        super().__init__("bytes", [bytes([i]) for i in range(256)], b"bytes")

    def _encode(self, text):
        return list(text.encode())


class Ranks(Tokenizer):
    """What goes through a tiktoken.Encoding, `encoding`."""

    def _encode(self, text):
        if len(text) <= RUN:
            return self.encoding.encode_ordinary(text)
        return [i for part in re.split(rf"(\s{{{RUN}}})", text) for i in self.encoding.encode_ordinary(part)]


class Tiktoken(Ranks):
    """One of tiktoken's named encodings. Special tokens such as <|endoftext|> have ids, but no text becomes one. Its
    fingerprint is that of its name, which stands for the pattern, and pieces."""

    def __init__(self, name):
        if name not in ENCODINGS:
            raise unknown("encoding of tiktoken", name, ENCODINGS)
        tiktoken = needed("tiktoken")
        try:
            self.encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise UserError(f"the encoding {name} of tiktoken could not be fetched ({type(error).__name__}): a folder "
                            "named by TIKTOKEN_CACHE_DIR can hold it; or train one here, of kind bpe") from error
        pieces = [b""] * self.encoding.n_vocab
        for i in range(self.encoding.n_vocab):
            with contextlib.suppress(KeyError):  # cl100k_base has gaps between its special tokens
                pieces[i] = self.encoding.decode_single_token_bytes(i)
        super().__init__(f"tiktoken:{name}", pieces, b"\n".join([name.encode(), *map(base64.b64encode, pieces)]))


class BytePairs(Ranks):
    """Byte-pair ranks (Sennrich et al. 2016, arXiv 1508.07909, on bytes as in GPT-2), through tiktoken.Encoding: id i
    is the pair that is merged i-th, the first 256 are the bytes. A file has tiktoken's lines, base64 of the piece and
    its rank, and an empty line at its end, without which it is truncated."""

    def __init__(self, pieces):
        self.encoding = needed("tiktoken").Encoding(
            "bpe", pat_str=PATTERN, mergeable_ranks={piece: i for i, piece in enumerate(pieces)}, special_tokens={})
        super().__init__("bpe", pieces, b"\n".join([PATTERN.encode(), *map(base64.b64encode, pieces)]))

    def _content(self):
        return b"".join(b"%s %d\n" % (base64.b64encode(piece), i) for i, piece in enumerate(self.pieces)) + b"\n"


class SentencePiece(Tokenizer):
    """A sentencepiece model (Kudo and Richardson 2018, arXiv 1808.06226) of those that `train` makes, of its bytes.
    Lines are encoded one by one, characters without a piece, and U+2581, as their bytes. A file is the model and, as a
    field that sentencepiece passes over, its sha256."""

    def __init__(self, model):
        self.model = model
        self.processor = needed("sentencepiece").SentencePieceProcessor(model_proto=model)
        pieces = []
        for i in range(self.processor.vocab_size()):
            piece = self.processor.id_to_piece(i)
            if self.processor.is_byte(i):
                pieces.append(bytes([int(piece[3:5], 16)]))  # <0x0A>
            else:
                pieces.append(b"" if self.processor.is_unknown(i) else piece.replace(SPACE, " ").encode())
        self.space = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        super().__init__("sentencepiece", pieces, b"sentencepiece\n" + model)

    def _encode(self, text):
        lines = re.findall(f"{SPACE}|[^\n{SPACE}]*\n|[^\n{SPACE}]+", text)
        encoded = self.processor.encode(lines, num_threads=1)
        return [i for line, ids in zip(lines, encoded) for i in (self.space if line == SPACE else ids)]

    def _content(self):
        return self.model + MARK + hashlib.sha256(self.model).digest()


class Published(Tokenizer):
    """A tokenizer.json, of Hugging Face's format, through the package tokenizers. `.content`: the file, bytes.

    A piece is the bytes that its id stands for in a text: of a byte-level one letter by letter, else with U+2581 as a
    space and <0x0A> as that byte. A text whose pieces are not its bytes, as after a normalisation, is refused.
    """

    def __init__(self, content):
        tokenizers, self.content = needed("tokenizers"), content
        try:
            self.encoding, said = tokenizers.Tokenizer.from_str(content.decode()), json.loads(content)
            self.encoding.no_padding()
            self.encoding.no_truncation()
            added = {token["id"]: token["content"] for token in said["added_tokens"]}
            byte_level = "ByteLevel" in json.dumps(said.get("decoder"))
            unknown = {said["model"].get("unk_token")}
            if said["model"].get("unk_id") is not None:
                unknown.add(said["model"]["vocab"][said["model"]["unk_id"]][0])
            found = {i: "" if piece in unknown else piece
                     for piece, i in self.encoding.get_vocab(with_added_tokens=True).items()}
        except Exception as error:  # the package has no class of its own for what is wrong with a file
            raise UserError(f"a tokenizer.json that is not read: {' '.join(str(error).split())[:200]}") from error
        of_letter = {letter: byte for byte, letter in enumerate(byte_letters())}

        def piece(i):
            text = found.get(i, "")
            if i in added:
                return added[i].encode()
            if byte_level:
                return bytes(of_letter[letter] for letter in text) if {*text} <= {*of_letter} else text.encode()
            return bytes([int(text[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", text) else (
                text.replace(SPACE, " ").encode())
        super().__init__("tokenizer.json", [piece(i) for i in range(max(found, default=-1) + 1)], content)

    def _encode(self, text):
        ids = self.encoding.encode(text, add_special_tokens=False).ids
        if b"".join([self.pieces[i] for i in ids]) != text.encode():
            raise UserError("this tokenizer.json changes a text, whose bytes could then not be counted: it normalises "
                            "or adds a space")
        return ids

    def _content(self):
        return self.content


def byte_letters():
    """The 256 letters that stand for bytes in a byte-level tokenizer.json (GPT-2's): printable ones for themselves, the
    others for those from U+0100 on."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]


def as_json(tokenizer, end=None):
    """A tokenizer as the text of a tokenizer.json that gives the same ids. Of sentencepiece two exceptions: U+2581
    becomes a space, and what looks like <unk> or <0x0A> that piece. end: the text of one more, special id."""
    if end is not None:
        found = json.loads(as_json(tokenizer))
        found["added_tokens"] += _json(None, None, None, {end: tokenizer.size})["added_tokens"]
        return json.dumps(found, ensure_ascii=False)
    if isinstance(tokenizer, Published):
        return tokenizer.content.decode()
    if isinstance(tokenizer, SentencePiece):
        return json.dumps(_json_of_sentencepiece(tokenizer), ensure_ascii=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    letters = byte_letters()

    def word(piece):
        return "".join(letters[byte] for byte in piece)
    pieces, special, split, merges = tokenizer.pieces, {}, level, []
    if isinstance(tokenizer, Ranks):
        special, pattern = tokenizer.encoding._special_tokens, tokenizer.encoding._pat_str
        split = dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False), level])
        ranks = {piece: i for i, piece in enumerate(pieces) if piece and i not in special.values()}
        merges = [[word(part) for part in _merged_from(piece, ranks)] for piece in ranks if len(piece) > 1]
    vocab = {word(piece): i for i, piece in enumerate(pieces) if piece and i not in special.values()}
    return json.dumps(_json(dict(
        type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
        fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab=vocab, merges=merges), split, level, special),
        ensure_ascii=False)


def _json(model, pre_tokenizer, decoder, added, special=True, normalizer=None):
    """The dict of a tokenizer.json. added: {text: id} of its added tokens."""
    tokens = [dict(id=i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=special)
              for text, i in sorted(added.items(), key=lambda item: item[1])]
    return dict(version="1.0", truncation=None, padding=None, added_tokens=tokens, normalizer=normalizer,
                pre_tokenizer=pre_tokenizer, post_processor=None, decoder=decoder, model=model)


def _merged_from(piece, ranks):
    """The two pieces that byte pairs of smaller ranks leave of a piece: those that it was merged from."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        at = pairs.index(min(pairs))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _json_of_sentencepiece(tokenizer):
    processor = tokenizer.processor
    words = [processor.id_to_piece(i) for i in range(tokenizer.size)]
    scores = [processor.get_score(i) for i in range(tokenizer.size)]
    unknown = next(i for i in range(tokenizer.size) if processor.is_unknown(i))
    ids = {word: i for i, word in enumerate(words)}
    if all(score == int(score) for score in scores):  # of kind bpe: the order of merges
        merges = []
        for word in words:
            if len(word) > 1 and not processor.is_byte(ids[word]) and ids[word] != unknown:
                ends = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in ids and word[i:] in ids]
                merges += [(-scores[ids[word]], ids[a], ids[b], [a, b]) for a, b in ends]
        model = dict(type="BPE", dropout=None, unk_token=words[unknown], continuing_subword_prefix=None,
                     end_of_word_suffix=None, fuse_unk=True, byte_fallback=True, ignore_merges=False, vocab=ids,
                     merges=[pair for *_, pair in sorted(merges, key=lambda merge: merge[:3])])
    else:
        model = dict(type="Unigram", unk_id=unknown, vocab=[list(pair) for pair in zip(words, scores)],
                     byte_fallback=True)
    return _json(model, None, dict(type="Sequence", decoders=[
        dict(type="Replace", pattern=dict(String=SPACE), content=" "), dict(type="ByteFallback"), dict(type="Fuse")]),
        {text: ids[text] for text in "\n\t" if text in ids}, special=False,
        normalizer=dict(type="Replace", pattern=dict(String=" "), content=SPACE))


def needed(package):
    """The module of a package that only some need. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"this needs {package}: pip install {package.partition('.')[0]}") from error


def _utf8(text):
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text[error.start]!r} at character {error.start:,} is half a character and has no UTF-8"
                        ) from error


def _as_bytes(data):
    """The bytes of a str, of a bytes-like object or of a uint8 tensor."""
    if isinstance(data, str):
        return _utf8(data)
    if isinstance(data, torch.Tensor):
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise ValueError(f"data must be text, bytes or a 1-D uint8 tensor, not {data.dim()}-D {data.dtype}")
        return data.cpu().numpy().tobytes()
    return bytes(data)


# --- Training ---

def train(kind, text, vocab_size, model_type="unigram"):
    """A tokenizer with exactly vocab_size ids: BytePairs or SentencePiece. Nothing in it is drawn at random.

    kind: bpe or sentencepiece. text: str, bytes or 1-D uint8 tensor; what is no UTF-8 in it is passed over.
    vocab_size: for bpe at least 256. model_type: of sentencepiece, unigram or bpe.
    Raises UserError: unknown kind, vocab_size too small, or more than the text gives.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if model_type not in MODEL_TYPES:
        raise unknown("model_type", model_type, MODEL_TYPES)
    text = _as_bytes(text).decode(errors="ignore")
    if kind == "bpe":
        return BytePairs(_byte_pairs(text, vocab_size))
    return SentencePiece(_sentencepiece(text, vocab_size, model_type))


def _byte_pairs(text, vocab_size):
    """List of vocab_size pieces (bytes): single bytes, then merged pairs, at each step the most frequent one.

    Of equally frequent pairs it is that with the smallest ids. Pairs that occur only once are not merged.
    """
    if vocab_size < 256:
        raise UserError(f"vocab_size is {vocab_size}: bpe needs at least 256, one for each byte")
    words = Counter(needed("regex").findall(PATTERN, text))
    counts = list(words.values())
    words = [list(word.encode()) for word in words]
    pieces = [bytes([i]) for i in range(256)]
    pairs, where = Counter(), defaultdict(set)  # how often; in which words, or in which it once was
    for number, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[number]
            where[pair].add(number)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(pieces) < vocab_size:
        count, pair = heapq.heappop(heap) if heap else (0, None)
        if pair and pairs[pair] != -count:  # it has become rarer since it was written down
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if count > -2:
            raise UserError(f"vocab_size is {vocab_size:,}, but this text gives bpe only {len(pieces):,}: in more, no "
                            "pair occurs twice; take fewer or more text")
        first, second = pair
        new, grown = len(pieces), set()
        pieces.append(pieces[first] + pieces[second])
        for number in where.pop(pair):
            word, n, out, i = words[number], counts[number], [], 0
            while i < len(word):
                if word[i] != first or i + 1 == len(word) or word[i + 1] != second:
                    out.append(word[i])
                    i += 1
                    continue
                if out:
                    pairs[out[-1], first] -= n
                    pairs[out[-1], new] += n
                    grown.add((out[-1], new))
                    where[out[-1], new].add(number)
                if i + 2 < len(word):
                    pairs[second, word[i + 2]] -= n
                    pairs[new, word[i + 2]] += n
                    grown.add((new, word[i + 2]))
                    where[new, word[i + 2]].add(number)
                out.append(new)
                i += 2
            words[number] = out
        del pairs[pair]
        for pair in grown:  # only pairs with the new piece can have become more frequent
            heapq.heappush(heap, (-pairs[pair], pair))
    return pieces


def _sentencepiece(text, vocab_size, model_type):
    """The bytes of a model that keeps every character: no normalization, no dummy prefix, bytes for what is rare."""
    sentencepiece, out = needed("sentencepiece"), io.BytesIO()
    lines = [line for line in re.split(f"[\n\t\0{SPACE}]", text) if line]
    if not lines:
        raise UserError("there is no text to train sentencepiece on")
    least = 259 + 1  # unknown, newline, tab, 256 bytes, and at least one character
    if vocab_size < least:
        raise UserError(f"vocab_size is {vocab_size}: sentencepiece needs at least {least}, 256 of them for bytes")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, model_type=model_type, vocab_size=vocab_size,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            byte_fallback=True, user_defined_symbols=["\n", "\t"], bos_id=-1, eos_id=-1, pad_id=-1,
            max_sentence_length=2 ** 30, num_threads=1, minloglevel=3)
    except (RuntimeError, OSError) as error:
        if most := re.search(r"<= (\d+)", str(error)):
            raise UserError(f"vocab_size is {vocab_size:,}, but this text gives sentencepiece at most "
                            f"{int(most[1]):,}: take fewer or more text") from error
        if least := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", str(error)):
            raise UserError(f"vocab_size is {vocab_size:,}, but sentencepiece needs at least {int(least[1]):,} for the "
                            "characters of this text: take more") from error
        raise UserError(f"sentencepiece cannot be trained on this text: {' '.join(str(error).split())}") from error
    return out.getvalue()


# --- Opening and checking ---

def open_or_train(source, text):
    """A tokenizer by open_tokenizer's words and files, or trained on text (or what the function `text` gives) where
    source is bpe:SIZE or sentencepiece:SIZE. Raises UserError as both of them do."""
    kind, colon, size = str(source).partition(":")
    if kind not in KINDS or not colon:
        return open_tokenizer(source)
    if not re.fullmatch(r"[0-9]{1,9}", size):
        raise UserError(f"tokenizer {source!r}: after {kind}: comes the number of ids, as in {kind}:1024")
    return train(kind, text() if callable(text) else text, int(size))


def open_tokenizer(source):
    """A tokenizer by its word, `bytes` or `tiktoken:NAME`, or from a file that `save` wrote, or a tokenizer.json.

    Raises UserError, naming the file: missing, truncated, foreign. Also where tiktoken's encoding cannot be had.
    """
    if source == "bytes":
        return Bytes()
    if str(source).startswith("tiktoken:"):
        return Tiktoken(str(source).removeprefix("tiktoken:"))
    path = Path(source).expanduser()
    try:
        if path.is_char_device():
            raise UserError(f"{path} is a device, no tokenizer")     # it may have no end
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"tokenizer {str(source)!r} is neither bytes, tiktoken:NAME nor a file") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    model, mark = content[:-32 - len(MARK)], content[-32 - len(MARK):]
    if mark == MARK + hashlib.sha256(model).digest():
        return SentencePiece(model)
    if content.startswith(base64.b64encode(b"\0") + b" 0\n") and content.endswith(b"\n\n"):
        lines = content[:-2].split(b"\n")
        with contextlib.suppress(ValueError, binascii.Error):
            pieces = [base64.b64decode(line.partition(b" ")[0], validate=True) for line in lines]
            if (lines == [b"%s %d" % (base64.b64encode(piece), i) for i, piece in enumerate(pieces)]
                    and pieces[:256] == [bytes([i]) for i in range(256)] and len({*pieces}) == len(pieces)):
                return BytePairs(pieces)
    if content.lstrip().startswith(b"{"):
        opened = Published(content)
        same = isinstance(opened.encoding.model, needed("tokenizers").models.BPE) and opened.pieces == Bytes().pieces
        return Bytes() if same and not json.loads(content)["model"]["merges"] else opened
    if content in [b"bytes\n", *(f"tiktoken:{name}\n".encode() for name in ENCODINGS)]:
        return open_tokenizer(content.decode().strip())
    raise UserError(f"{path} is truncated, or no tokenizer that was saved here")


def check(tokenizer, fingerprint):
    """Raises UserError where a tokenizer is not the one with this fingerprint."""
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"the tokenizer {tokenizer.name} with {tokenizer.size:,} ids does not match the checkpoint: "
                        f"its fingerprint is {tokenizer.fingerprint[:12]}, the checkpoint's {fingerprint[:12]}")


# --- Whole corpora ---

def token_bytes(tokenizer):
    """(size,) int64: the bytes of UTF-8 that each id stands for, so that nats a token become bits a byte."""
    return torch.tensor([len(piece) for piece in tokenizer.pieces])


def encode_corpus(tokenizer, data):
    """A whole text, str, bytes or 1-D uint8 tensor, as the tokens of tokenizer.encode: (N,) int32; decode_bytes gives
    it back, whatever it is. Bytes that are no UTF-8 are encoded one by one. Raises UserError where a str has half a
    surrogate pair."""
    data = _as_bytes(data)
    if isinstance(tokenizer, Bytes):
        return torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int32))
    parts, ids = [np.empty(0, np.int32)], None
    for run in re.findall("[\udc80-\udcff]+|[^\udc80-\udcff]+", data.decode(errors="surrogateescape")):
        if "\udc80" <= run[0] <= "\udcff":
            ids = ids or {piece: i for i, piece in enumerate(tokenizer.pieces)}
            parts.append(np.array([ids[bytes([ord(byte) - 0xDC00])] for byte in run], np.int32))
            continue
        start = 0
        while start < len(run):
            cut = CUT.search(run, start + CHUNK)
            end = cut.start() if cut else len(run)
            parts.append(np.array(tokenizer.encode(run[start:end]), np.int32))
            start = end
    return torch.from_numpy(np.concatenate(parts))


# --- The command line ---

def train_on(*, out, kind="bpe", model_type="unigram", dataset="shakespeare", max_bytes=None, vocab_size=1024):
    """Trains one on the training part of a data set.

    out: the file to write
    kind: bpe or sentencepiece
    model_type: of sentencepiece: unigram or bpe
    dataset: as in data/text.py: a name or a file
    max_bytes: [>= 1] only the first so many bytes of it
    vocab_size: [>= 1, <= 10_000_000] ids
    """
    corpus, began = texts.load(dataset, max_bytes), time.monotonic()
    tokenizer = train(kind, corpus.train, vocab_size, model_type)
    tokenizer.save(out)
    print(f"trained on {len(corpus.train):,} bytes in {time.monotonic() - began:.1f} s, written to {out}")
    return tokenizer, corpus, None


def look_at(*, tokenizer, text=None, dataset=None):
    """Shows the ids and pieces of a text, and bytes a token.

    tokenizer: bytes, tiktoken:NAME, or a file that train wrote
    text: the text to encode
    dataset: measure bytes a token on its parts
    """
    return open_tokenizer(tokenizer), dataset and texts.load(dataset), text


def describe(found):
    """Prints what a tokenizer is and does: (tokenizer, corpus or None, text or None)."""
    tokenizer, corpus, text = found
    print(f"{tokenizer.name}: {tokenizer.size:,} ids, fingerprint {tokenizer.fingerprint[:12]}")
    if text is not None:
        ids = tokenizer.encode(text)
        print("ids:", *ids)
        print("pieces:", *(repr(tokenizer.pieces[i])[1:] for i in ids))
    for name in ("train", "val", "test"):
        if corpus and (data := getattr(corpus, name)) is not None:
            print(f"bytes a token, {name}: {len(data) / max(1, len(encode_corpus(tokenizer, data))):.3f}")


main = command(serve(train=(train_on, describe), show=(look_at, describe)))

if __name__ == "__main__":
    main()
