"""Made-up people and questions about them: facts for the weights, or behind a tool that looks them up.

    python data/facts.py --stats                   # "notes": four attributes, 31.25 bits a person
    python data/facts.py --kind bios --stats       # six attributes and a city of work, 47.59 bits a person

in the weights    user: birth_date NAME ?   assistant: 4/11/1987 END
by the tool       user: birth_date NAME ?   assistant: FIND birth_date FOR NAME CALL
                  tool: 4/11/1987 ANSWER    assistant: 4/11/1987 END

Trained on is what the assistant says, never what the tool says. Nothing here draws from a random generator: people,
what is held out and which question is asked come from one hash, the same on every machine.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ is on the path
from nanolab.settings import answer_help, serve

answer_help(__name__, __file__)  # before the seconds that the next lines take

import contextlib
import functools
import itertools
import math
import re
import sqlite3
import time
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from data.draw import chance, pair_hash
from data.tokens import Bytes, open_or_train
from nanolab.run import command
from nanolab.settings import UserError, unknown

TYPES = 16  # hidden types that attributes depend on where alpha is below 1

# --- Words ---

WORDS = dict(paragraph.split("\n", 1) for paragraph in Path(__file__).with_name("facts_words.txt").read_text(
    encoding="utf-8").strip().split("\n\n"))


def _pieces(title):
    """Lists of the words of a title: what stands first, what stands second."""
    return [[word.replace("_", " ") for word in part.split()] for part in WORDS[title].split("|")]


def _products(title):
    """Every way to take one of each: "a b | c d" is ["ac", "ad", "bc", "bd"]."""
    return list(map("".join, itertools.product(*_pieces(title))))


def _listed(title):
    return WORDS[title].replace("\n", " ").split(", ")


SYLLABLES, FIRST, MIDDLE, LAST, CITIES, TRADES, EMPLOYERS = map(
    _products, "syllables first middle last cities trades employers".split())
EMPLOYERS = EMPLOYERS[:263]
WORK_CITIES = [(37 * i + 11) % 200 for i in range(263)]  # the employer's city, a place in CITIES: says nothing new
CONTINENTS, FIELDS = _listed("continents"), _listed("fields")
UNIVERSITIES = [form.format(word) for word in WORDS["universities"].split()
                for form in _listed("forms of universities")]
QUESTIONS = {title.removeprefix("questions "): text.split("\n") for title, text in WORDS.items()
             if title.startswith("questions ")}


# --- People ---

@functools.lru_cache
def tables(kind):
    """{attribute: all its values} of those that are drawn. Raises UserError: an unknown kind."""
    if kind == "notes":
        dates = [f"{day}/{month}/{year}" for year in range(1950, 2001) for month in range(1, 13)
                 for day in range(1, 29)]
        return {"birth_date": dates, "birth_place": CONTINENTS, "address": CITIES[:213], "occupation": TRADES}
    if kind == "bios":
        months = ("January February March April May June July August September October November December").split()
        days = [f"{day} {month} {year}" for year in range(1800, 2000) for month in months for day in range(1, 29)]
        return {"birthday": days, "birth_city": CITIES[:200], "university": UNIVERSITIES, "field": FIELDS,
                "employer": EMPLOYERS, "pronoun": ["he", "she"]}
    raise unknown("kind", kind, ("notes", "bios"))


def _hash(number, place, seed, salt):
    """uint64 hashes of arrays of whole numbers from 0, that broadcast; seed: any whole number."""
    return pair_hash(*np.broadcast_arrays(number, place), seed % 2 ** 64, salt)


def shuffled(index, size, seed):
    """A permutation of 0 .. size - 1 that the seed chooses, at the places index (N,): (N,) uint64; no table is kept.

    A Feistel network of four rounds on an even number of bits; what falls outside goes through it again (Black and
    Rogaway 2002, "cycle walking").
    """
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = np.asarray(index, np.uint64).copy()
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(right, turn, seed, 20) & mask)
        x[todo] = left << half | right
        todo = todo[x[todo] >= np.uint64(size)]
    return x


def entropy(sizes, alpha, types=TYPES):
    """Bits in one person's attributes, which have so many values (sizes) and depend on a hidden type (see people).

    p(x) = 1 / types * sum over types z of the product over attributes a of (alpha / sizes_a + (1 - alpha) [x_a is what
    z gives]); combinations x that differ only in values that no type gives are counted together: exact.
    """
    if alpha == 1:
        return float(sum(math.log2(size) for size in sizes))
    z, halves = np.arange(types)[:, None], []
    for part in (sizes[::2], sizes[1::2]):  # two halves, for the table of all combinations is their product
        joint, count = np.ones((types, 1)), np.ones(1)
        for size in part:
            value = np.arange(min(size, types + 1))  # the last one stands for all that no type gives
            each = alpha / size + (1 - alpha) * (z % size == value)  # (types, values)
            joint = (joint[:, :, None] * each[:, None]).reshape(types, -1)
            count = np.outer(count, np.where(value == types, size - types, 1)).ravel()
        halves.append((joint, count))
    (left, some), (right, others) = halves
    p = left.T @ right / types
    return float(-(some @ (p * np.log2(np.where(p > 0, p, 1))) @ others))


class Person(NamedTuple):
    """One of People."""
    name: str
    values: dict  # {attribute: value}


@dataclass
class People:
    """Made-up people (see `people`): n to train on, then `unseen` more that are held out. people[i] is a Person."""
    names: list  # n + unseen different texts
    values: dict  # {attribute: [text of each person]}
    kind: str
    n: int
    unseen: int
    bits: float  # of a person's values: the entropy of what they are drawn from, in bits
    n_names: int  # how many names there are to draw from
    alpha: float
    seed: int

    @property
    def attributes(self):
        """The names of the attributes, a tuple."""
        return tuple(self.values)

    def __len__(self):
        return self.n + self.unseen

    def __getitem__(self, i):
        return Person(self.names[i], {attribute: values[i] for attribute, values in self.values.items()})

    def describe(self):
        """One line."""
        return (f"{self.kind}: {self.n:,} people to train on and {self.unseen:,} held out, of {self.n_names:,} names; "
                f"{len(self.values)} attributes, alpha {self.alpha:g}, seed {self.seed}; {self.bits:.2f} bits a "
                f"person, {self.n * self.bits:,.0f} to be learned")


NAMES = {"syllables": ("", (SYLLABLES,) * 4), "plain": (" ", (FIRST, LAST)), "bios": (" ", (FIRST, MIDDLE, LAST))}


def people(n, seed, kind="notes", alpha=1.0, unseen=0, names="syllables"):
    """n people to train on and `unseen` more, held out: People.

    n: [>= 0, <= 100_000_000] people to train on; who they are does not depend on how many
    seed: of all that is drawn
    kind: notes (four attributes) or bios (six and a city of work)
    alpha: [>= 0, <= 1] 1: attributes are independent, 0: one type says all
    unseen: [>= 0, <= 100_000_000] people that are held out, in the database only
    names: of notes: syllables or plain

    Notes: birth_date (28 x 12 x 51), birth_place (7), address (213 cities), occupation (100): 31.25 bits. Names are
    four of 64 syllables, a closed vocabulary, or plain, first and last (400 x 1,000). Bios, after bioS of Allen-Zhu and
    Li 2024, arXiv 2404.05405: birthday (28 x 12 x 200), birth_city (200), university (300), field (100), employer
    (263), pronoun (2): 47.59 bits; also work_city, which follows from the employer. 400 x 400 x 1,000 names.
    All names differ.
    Every person has a hidden type, one of 16, evenly. Each attribute by itself is drawn evenly from all its values with
    probability alpha, else it is what the type gives: type z gives value z mod size of an order of the values that the
    seed chooses.
    Raises UserError: an unknown kind, a number out of range.
    """
    drawn = tables(kind)
    if names not in ("syllables", "plain"):
        raise unknown("names", names, ("syllables", "plain"))
    between, parts = NAMES["bios" if kind == "bios" else names]
    n_names = math.prod(map(len, parts))
    if n < 1 or unseen < 0 or n + unseen > n_names:
        raise UserError(f"n is {n} and unseen {unseen}: n must be at least 1, unseen at least 0, and together at most "
                        f"{n_names:,}, so many names there are")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}: it must be from 0 to 1")
    # A person's number is the place of the name; those that are held out are counted from the other end.
    number = np.concatenate([np.arange(n), n_names - 1 - np.arange(unseen)])
    code, columns = shuffled(number, n_names, seed), []
    for part in reversed(parts):
        code, letter = np.divmod(code, np.uint64(len(part)))
        columns.append(np.array(part, object)[letter.astype(np.int64)])
    given = [between.join(name) for name in zip(*reversed(columns))]
    hidden, values = _hash(number, 0, seed, 21) % np.uint64(TYPES), {}
    for place, (attribute, table) in enumerate(drawn.items()):
        value = (_hash(number, place, seed, 22) % np.uint64(len(table))).astype(np.int64)
        free = chance(_hash(number, place, seed, 23), alpha)
        code = np.where(free, value, _given(place, len(table), seed)[hidden])
        values[attribute] = np.array(table, object)[code].tolist()
    if kind == "bios":
        cities = {employer: CITIES[city] for employer, city in zip(EMPLOYERS, WORK_CITIES)}
        values["work_city"] = [cities[employer] for employer in values["employer"]]
    return People(given, values, kind, n, unseen, entropy([len(table) for table in drawn.values()], alpha), n_names,
                  float(alpha), seed)


def _given(place, size, seed):
    """(TYPES,) int64: the value that each hidden type gives for attribute number `place`, which has `size` values."""
    order = np.argsort(_hash(np.arange(size), place, seed, 24), kind="stable")
    return order[np.arange(TYPES) % size]


def law(people, attribute):
    """(values,) float64: how probable each value is by the law that people are drawn from (work_city: each city)."""
    if attribute == "work_city":
        return np.bincount(WORK_CITIES, law(people, "employer"))
    drawn = tables(people.kind)
    size = len(drawn[attribute])
    given = np.bincount(_given(list(drawn).index(attribute), size, people.seed), minlength=size)
    return people.alpha / size + (1 - people.alpha) * given / TYPES


# --- Dialogs ---

class Segment(NamedTuple):
    """One turn of a dialog. Its end is a special token, which `rows` adds: an assistant's turn ends with CALL where the
    tool speaks next, else with END, the tool's with ANSWER, a user's with nothing."""
    role: str  # user, assistant, tool
    text: str
    trained: bool  # is the loss taken here? Only ever where the assistant speaks


MODES, FORMS = ("in_weight", "in_tool", "both"), ("short", "natural")


def question(person, attribute, form="short", which=0):
    """What the user asks: "birth_date NAME ?", or, form "natural", one of the attribute's questions, number `which`."""
    if form == "short":
        return f"{attribute} {person.name} ?"
    return QUESTIONS[attribute][which % len(QUESTIONS[attribute])].format(name=person.name)


def call(attribute, name):
    """The assistant's call, as Database.answer reads it."""
    return f"FIND {attribute} FOR {name}"


def in_weight(person, attribute, form="short", which=0):
    """The dialog in which the assistant knows: a list of two Segments, the first and the last of `in_tool`."""
    return in_tool(person, attribute, form, which)[::3]


def in_tool(person, attribute, form="short", which=0):
    """The dialog in which the assistant looks it up: a list of four Segments."""
    return [Segment("user", question(person, attribute, form, which), False),
            Segment("assistant", call(attribute, person.name), True),
            Segment("tool", person.values[attribute], False),
            Segment("assistant", person.values[attribute], True)]


def dialogs(people, mode="in_weight", form="short", seed=0, share=0.5, unseen=False):
    """A dialog for each attribute of each person to train on, or, unseen, of each that is held out: a list.

    mode "both": each fact in_tool with probability `share`, else in_weight; that, and which natural question is asked,
    follows from seed, person and attribute. Raises UserError: an unknown mode or form, a share that is not from 0 to 1.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if not 0 <= share <= 1:
        raise UserError(f"share is {share}: it must be from 0 to 1")
    share = {"in_weight": 0, "in_tool": 1}.get(mode, share)
    numbers = np.arange(people.n, len(people)) if unseen else np.arange(people.n)
    places = np.arange(len(people.attributes))
    tool = chance(_hash(numbers[:, None], places, seed, 25), share).tolist()
    which = _hash(numbers[:, None], places, seed, 26).tolist()
    return [(in_tool if tool[row][place] else in_weight)(person, attribute, form, which[row][place])
            for row, person in enumerate(map(people.__getitem__, numbers.tolist()))
            for place, attribute in enumerate(people.attributes)]


# --- The tool ---

NO_RESULT, NO_ATTRIBUTE, NO_CALL = "No result found", "Unknown attribute", "Malformed call"


class Database:
    """What the tool looks up: an SQLite table of people, in memory; or a file that `save` wrote, opened to be read.

    source: People, the held-out ones too; or the path of a file. What is asked for chooses among SQL statements that
    name the attributes there, or is a parameter: no text of a model or a person is ever read as SQL. fingerprint: a
    check sum of the file; None in memory. Raises UserError: no such file, or another one; a question whose answer takes
    SQLite more than STEPS steps or SECONDS seconds, as of a view that never ends.
    """

    STEPS, SECONDS = 20_000_000, 10  # enough to read a table of millions of people from end to end

    def __init__(self, source):
        self.path, self.fingerprint = None if isinstance(source, People) else source, None
        if isinstance(source, People):
            self.connection, columns = sqlite3.connect(":memory:"), source.attributes
            self.connection.execute(f"CREATE TABLE people (name TEXT PRIMARY KEY, {' TEXT, '.join(columns)} TEXT) "
                                    "WITHOUT ROWID")
            with self.connection:
                self.connection.executemany(f"INSERT INTO people VALUES (?{', ?' * len(columns)})",
                                            zip(source.names, *source.values.values()))
        else:
            path = Path(source).expanduser()
            if not path.is_file():
                raise UserError(f"there is no database {path}")
            try:
                self.connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
                columns = [row[1] for row in self.connection.execute("PRAGMA table_info(people)")][1:]
                if not columns or not all(re.fullmatch("[a-z_]+", column) for column in columns):
                    raise sqlite3.DatabaseError
                self._ask(f"SELECT name, {', '.join(columns)} FROM people LIMIT 1")
                with open(path, "rb") as file:
                    self.fingerprint = 0
                    while piece := file.read(2 ** 20):
                        self.fingerprint = zlib.crc32(piece, self.fingerprint)
            except (OSError, sqlite3.Error) as error:
                raise UserError(f"{path} is not a database of people") from error
        self.connection.execute("PRAGMA query_only = 1")
        self.questions = {column: f"SELECT {column} FROM people WHERE name = ?" for column in columns}

    def save(self, path):
        """Writes it to a file, which must not be there yet. Raises UserError where it is or cannot be written."""
        path = Path(path).expanduser()
        if path.exists():
            raise UserError(f"{path} is already there: choose another path")
        try:
            with contextlib.closing(sqlite3.connect(path)) as file:
                self.connection.backup(file)
        except sqlite3.Error as error:
            raise UserError(f"cannot write {path}: {error}") from error

    def find(self, attribute, name):
        """What it says of a person, a text: the value, NO_RESULT (no such person) or NO_ATTRIBUTE."""
        if attribute not in self.questions:
            return NO_ATTRIBUTE
        try:
            found = self._ask(self.questions[attribute], (name,))
        except (UnicodeEncodeError, sqlite3.DataError):  # half a surrogate pair, or above a gigabyte: nobody's name
            found = None
        except sqlite3.Error as error:
            raise UserError(f"the database {self.path} does not say {attribute}: {error}") from error
        return str(found[0]) if found else NO_RESULT

    def _ask(self, question, words=()):
        """The first row of an answer, or None; it is broken off after STEPS steps or SECONDS seconds."""
        ticks, end = iter(range(self.STEPS // 10_000)), time.monotonic() + self.SECONDS
        self.connection.set_progress_handler(lambda: next(ticks, None) is None or time.monotonic() > end, 10_000)
        try:
            return self.connection.execute(question, words).fetchone()
        finally:
            self.connection.set_progress_handler(None, 0)

    def answer(self, text):
        """What the tool answers to an assistant's call, whatever that is: a text, NO_CALL where it is malformed."""
        parsed = parse_call(text)
        return self.find(*parsed) if parsed else NO_CALL


def parse_call(text):
    """The inverse of `call`: (attribute, name), or None where the text is not exactly one call on one line."""
    found = re.fullmatch(r"FIND (\S+) FOR (\S|\S.*\S)", text)
    return found.groups() if found else None


# --- Tokens ---

SPECIALS = ("PAD", "END", "CALL", "ANSWER")  # after the tokenizer's ids, in this order
KEYWORDS = [*(f"{attribute} " for attribute in tables("notes")), " ?", "FIND ", "FOR ",
            NO_RESULT, NO_ATTRIBUTE, NO_CALL]


class Closed:
    """210 tokens for "notes" with names of syllables, in the short form: 64 syllables, 10 keywords and 136 for the
    values, of 1 to 3 tokens each. The longest one is taken; text with anything else in it is a UserError."""
    name = fingerprint = "closed"

    def __init__(self):
        self.texts = [*SYLLABLES, *KEYWORDS, *(f"{day}/" for day in range(1, 29)), *map(str, range(1950, 2001)),
                      *CONTINENTS, *itertools.chain(*_pieces("cities"), *_pieces("trades"))]
        self.size = len(self.texts)
        self.ids = {text: i for i, text in enumerate(self.texts)}
        self.longest = re.compile("|".join(map(re.escape, sorted(self.texts, key=len, reverse=True))))

    def encode(self, text):
        found = self.longest.findall(text)
        if sum(map(len, found)) != len(text):
            place = 0
            while match := self.longest.match(text, place):
                place = match.end()
            raise UserError(f"the closed vocabulary has no token for {text[place:place + 20]!r}: it is made for notes "
                            "with names of syllables, in the short form; use bytes")
        return [self.ids[piece] for piece in found]

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids)


class Vocabulary:
    """A tokenizer's ids, and after them the special tokens PAD, END, CALL and ANSWER, as which no text is encoded.

    tokenizer: "closed" (214 tokens in all, see Closed), "bytes" (260), or one of data/tokens.py. n_text: its ids, size:
    all; specials: {name: id}. Raises UserError: an unknown name; a text that cannot be encoded, or would come back as
    another one: answers are compared as texts.
    """

    def __init__(self, tokenizer):
        if isinstance(tokenizer, str):
            if tokenizer not in ("closed", "bytes"):
                raise unknown("vocabulary", tokenizer, ("closed", "bytes"))
            tokenizer = Closed() if tokenizer == "closed" else Bytes()
        self.tokenizer, self.exact = tokenizer, isinstance(tokenizer, (Closed, Bytes))
        self.name, self.fingerprint, self.n_text = tokenizer.name, tokenizer.fingerprint, tokenizer.size
        self.specials = {name: self.n_text + i for i, name in enumerate(SPECIALS)}
        self.size = self.n_text + len(SPECIALS)

    def encode(self, text):
        """str -> list of int, all below the specials."""
        ids = list(self.tokenizer.encode(text))
        if not self.exact and (back := self.tokenizer.decode(ids)) != text:
            raise UserError(f"the tokenizer turns {text[:80]!r} into {back[:80]!r}: it must give every text back "
                            "unchanged")
        return ids

    def decode(self, ids):
        """The inverse of encode, of a list or a 1-D tensor; a special token becomes <END>, <PAD> ..."""
        ids, names = torch.as_tensor(ids).tolist(), {i: f"<{name}>" for name, i in self.specials.items()}
        parts = itertools.groupby(ids, lambda i: i < self.n_text)  # runs of text, runs of specials
        return "".join(self.tokenizer.decode(list(run)) if text else "".join(names[i] for i in run)
                       for text, run in parts)


def _ends(dialog, specials):
    """The special token after each segment of a dialog, as a list of none or one."""
    for segment, after in itertools.zip_longest(dialog, dialog[1:]):
        calls = after is not None and after.role == "tool"
        end = {"user": None, "assistant": "CALL" if calls else "END", "tool": "ANSWER"}[segment.role]
        yield [specials[end]] if end else []


def rows(dialogs, vocabulary, length=None, pad=None, everything=False):
    """Dialogs as tokens: (tokens (N, T) int64, mask (N, T) bool); the rest of a row is padding.

    mask: True where tokens[:, t], as a target, belongs to a trained segment of the assistant or is its END or CALL;
    everything: also where the user speaks, as in plain pretraining, but never where the tool does. length: T, None: of
    the longest; pad: the id of padding, None: PAD.
    Raises UserError where a dialog is longer than length or the vocabulary has no token for a text.
    """
    flat, said, counts, lengths = array("i"), [], [], []  # tokens; of segments: trained? how many; of dialogs: how many
    for number, dialog in enumerate(dialogs):
        start = len(flat)
        for segment, end in zip(dialog, _ends(dialog, vocabulary.specials)):
            ids = vocabulary.encode(segment.text) + end
            flat.extend(ids)
            counts.append(len(ids))
            said.append(segment.role == "assistant" and segment.trained or everything and segment.role == "user")
        lengths.append(len(flat) - start)
        if length is not None and lengths[-1] > length:
            raise UserError(f"dialog {number} has {lengths[-1]} tokens, but length is {length}")
    T = max(lengths, default=0) if length is None else length
    place = np.arange(T) < np.array(lengths, np.int64)[:, None]
    tokens = np.full(place.shape, vocabulary.specials["PAD"] if pad is None else pad, np.int64)
    mask = np.zeros(place.shape, bool)
    tokens[place], mask[place] = flat, np.repeat(np.array(said, bool), np.array(counts, np.int64))
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def open_facts(settings):
    """(People, Vocabulary, Database) that a dict of train_facts.py's settings names; a tokenizer "bpe:SIZE" or
    "sentencepiece:SIZE" is trained on the dialogs about the people to train on. Raises UserError: as these do; a
    database without the people's attributes."""
    made = people(settings["n_people"], settings["data_seed"], settings["kind"], settings["alpha"],
                  settings["n_unseen"], settings["names"])
    word = settings["tokenizer"]
    if word not in ("closed", "bytes"):
        mode = settings["task"] if settings["task"] in MODES else "in_weight"
        turns = dialogs(made, mode, settings["form"], settings["data_seed"], settings["tool_share"])
        word = open_or_train(word, lambda: "\n".join(segment.text for turn in turns for segment in turn))
    database = Database(settings["database"] or made)
    missing = set(made.attributes) - set(database.questions)
    if missing:
        raise UserError(f"{settings['database']} knows nothing of {', '.join(sorted(missing))}: it was made for other "
                        "people")
    return made, Vocabulary(word), database


# --- Accounting ---

def bits_stored(value_nats, bits):
    """How many bits about N people a model holds, a float: N bits - sum of value_nats / ln 2, as Allen-Zhu and Li 2024
    (arXiv 2404.05405), whose R is this over the number of parameters.

    value_nats (N,): of each person the loss in nats, summed over attributes (but work_city, which says nothing new) and
    over the tokens of each value; bits: of a person's values (people.bits). With alpha 1 the uniform predictor scores
    0, a perfect one N bits. Below 1 attributes depend on each other: where each is asked for by itself, this is a lower
    bound.
    """
    value_nats = torch.as_tensor(value_nats, dtype=torch.float64)
    return len(value_nats) * bits - float(value_nats.sum()) / math.log(2)


def floor(people):
    """Accuracies, averaged over attributes, of two guessers without memory of single people: (law, constant).

    law: who always names the most probable value of what people are drawn from; for notes with alpha 1 3.94 %.
    constant: who names the value that most of the n people to train on have, measured on these.
    """
    guess = [float(law(people, attribute).max()) for attribute in people.attributes]
    best = [Counter(values[:people.n]).most_common(1)[0][1] / people.n for values in people.values.values()]
    return sum(guess) / len(guess), sum(best) / len(best)


# --- The command line ---

def show(dialog):
    """A dialog for people: one line for each turn, with the special token at its end; * where the loss is taken."""
    ends = _ends(dialog, {name: f" <{name}>" for name in SPECIALS})
    return "\n".join(f"  {' *'[segment.trained]} {segment.role + ':':10} {segment.text}{''.join(end)}"
                     for segment, end in zip(dialog, ends))


def describe(made, stats=False):
    """Prints how many people there are; for --stats dialogs about one of them, and how many tokens dialogs have.

    stats: show dialogs, count bits and tokens
    """
    print(made.describe())
    if not stats:
        return
    print("accuracy without memory: {:.2%} by the law, {:.2%} by the best constant guess".format(*floor(made)))
    person, attribute = made[0], made.attributes[0]
    for title, dialog in (("in the weights", in_weight(person, attribute)), ("by the tool", in_tool(person, attribute)),
                          ("by the tool, natural", in_tool(person, attribute, "natural", made.seed))):
        print(f"{title} (* trained):\n{show(dialog)}")
    few = replace(made, n=min(made.n, 1000))
    for name in ("closed", "bytes"):
        vocabulary = Vocabulary(name)
        print(f"vocabulary {name}: {vocabulary.n_text} tokens and {len(SPECIALS)} special ones")
        for form, mode in itertools.product(FORMS, MODES):
            try:
                tokens, mask = rows(dialogs(few, mode, form), vocabulary)
            except UserError as error:
                print(f"  {form}: {error}")
                break
            length = (tokens != vocabulary.specials["PAD"]).sum(1)
            print(f"  {mode}, {form}: {length.min()} to {length.max()} tokens a dialog, {length.double().mean():.1f} "
                  f"on average, {mask.sum(1).double().mean():.1f} of them trained")


main = command(serve(people, describe, defaults=dict(n=1000, unseen=256, seed=0)))

if __name__ == "__main__":
    main()
