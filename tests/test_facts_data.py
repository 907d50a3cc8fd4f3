"""What train_facts.py learns. data/facts.py: people and their law, dialogs, the database under attack, tokens, masks,
bits. data/mqar.py: rows as defined, read slowly; their law; disjoint sides. No network."""
import contextlib
import hashlib
import itertools
import math
import sqlite3
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from choices import evenly, raises_one_line

from data import facts
from data.facts import (NO_ATTRIBUTE, NO_CALL, NO_RESULT, QUESTIONS, SYLLABLES, Database, Person, Segment,
                        Vocabulary, call, dialogs, entropy, floor, in_tool, in_weight, law, parse_call,
                        people, rows, show, shuffled, tables)
from data.mqar import distances, example, mqar, reachable, split

pytestmark = pytest.mark.usefixtures("one_thread")
NOTES = ("birth_date", "birth_place", "address", "occupation")
BIOS = ("birthday", "birth_city", "university", "field", "employer", "pronoun", "work_city")
SIZES = {"birth_date": 28 * 12 * 51, "birth_place": 7, "address": 213, "occupation": 100, "birthday": 12 * 28 * 200,
         "birth_city": 200, "university": 300, "field": 100, "employer": 263, "pronoun": 2}


@pytest.fixture(scope="module")
def many():
    return {kind: people(20_000, 0, kind, unseen=500) for kind in ("notes", "bios")}


@pytest.fixture(scope="module")
def few():
    return people(40, 1, unseen=20)


# --- People ---

def test_what_there_is_to_know(many):
    for kind, attributes, bits in (("notes", NOTES, 31.25), ("bios", BIOS, 47.59)):
        made = many[kind]
        assert made.attributes == attributes and (made.kind, made.n, made.unseen) == (kind, 20_000, 500)
        assert made.bits == pytest.approx(sum(math.log2(SIZES[name]) for name in tables(kind)))
        assert round(made.bits, 2) == bits and len(made) == len(made.names) == 20_500
        assert all(len(values) == 20_500 and {*map(type, values)} == {str} for values in made.values.values())
        for attribute, table in tables(kind).items():
            assert len(table) == len({*table}) == SIZES[attribute] and {*made.values[attribute]} <= {*table}
            assert all(value == value.strip() and value.isascii() for value in table)
    dates = [tuple(map(int, value.split("/"))) for value in tables("notes")["birth_date"]]
    assert {*dates} == {*itertools.product(range(1, 29), range(1, 13), range(1950, 2001))}
    days = {tuple(value.split(" ")) for value in tables("bios")["birthday"]}
    assert tuple(map(len, map(set, zip(*days)))) == (28, 12, 200) and len(days) == 67_200
    cities = {*zip(many["bios"].values["employer"], many["bios"].values["work_city"])}  # one follows from the other
    assert len(cities) == 263 and {city for _, city in cities} == {*tables("bios")["birth_city"]}


@pytest.mark.parametrize("settings, size, lists", [
    ({}, 64 ** 4, (64,) * 4), ({"names": "plain"}, 400_000, (400, 1000)),
    ({"kind": "bios"}, 160_000_000, (400, 400, 1000))], ids=str)
def test_names(settings, size, lists):
    """None twice, of parts that are drawn evenly, the first two together."""
    made = people(20_000, 3, unseen=2000, **settings)
    assert made.n_names == size and len({*made.names}) == 22_000
    split = [name.split(" ") if settings else [name[i:i + 2] for i in range(0, len(name), 2)] for name in made.names]
    assert {*map(len, split)} == {len(lists)} and (settings or {*itertools.chain(*split)} == {*SYLLABLES})
    for column, n in zip(zip(*split), lists):
        assert len({*column}) == n and evenly([*Counter(column).values()], 22_000 / n)
    if not settings:
        both = Counter(tuple(parts[:2]) for parts in split)
        assert evenly([*both.values()] + [0] * (64 ** 2 - len(both)), 22_000 / 64 ** 2)


@pytest.mark.parametrize("size", [1, 2, 17, 4096])
def test_shuffling_is_a_permutation(size):
    some, other = (shuffled(np.arange(size), size, seed).tolist() for seed in range(2))
    assert sorted(some) == sorted(other) == list(range(size))
    assert shuffled(np.arange(size)[::-1], size, 0).tolist() == some[::-1]
    assert size < 100 or some != other and (np.diff(some) % size == 1).mean() < 0.02


@pytest.mark.parametrize("settings", [{}, {"kind": "bios"}, {"names": "plain"}, {"alpha": 0.3}], ids=str)
def test_a_person_depends_on_nothing_else(settings):
    small, large = people(30, 5, unseen=7, **settings), people(500, 5, unseen=90, **settings)
    assert [small[i] for i in range(37)] == [large[i] for i in range(30)] + [large[500 + i] for i in range(7)]
    assert small == people(30, 5, unseen=7, **settings)
    other = people(30, 6, **settings)
    assert not {*other.names} & {*small.names} and people(3, -1).names != people(3, 1).names
    assert sum(a == b for a, b in zip(other.values[small.attributes[0]], small.values[small.attributes[0]])) < 9


def test_known_people():
    """Who is drawn must never change: other figures were measured on them."""
    for kind, digest, known in (("notes", "838dee93aa5c263e", 22.7215), ("bios", "9d20cfb85edfe484", None)):
        made = people(1000, 0, kind, alpha=0.5, unseen=50)
        told = "\n".join([*made.names, *itertools.chain(*made.values.values())])
        assert hashlib.sha256(told.encode()).hexdigest()[:16] == digest
        bits = [people(1, 0, kind, alpha=alpha).bits for alpha in (0, 0.25, 0.5, 0.75, 1 - 1e-9, 1)]
        assert bits == sorted(bits) and bits[0] == pytest.approx(4) and bits[4] == pytest.approx(bits[5])  # 16 types
        assert known is None or bits[2] == pytest.approx(known, abs=1e-3)
    first = people(1, 0)[0]
    assert first == Person("nopesomo", {"birth_date": "24/10/1997", "birth_place": "Africa",
                                        "address": "Saint Willow", "occupation": "book teacher"})


# --- Attributes that depend on each other ---

def slow_entropy(sizes, alpha, types):
    """The rule as it is told, over every person that there could be."""
    total = 0.0
    for x in itertools.product(*map(range, sizes)):
        p = 0.0
        for z in range(types):
            chance = 1 / types
            for value, size in zip(x, sizes):
                chance *= alpha / size + (1 - alpha) * (value == z % size)
            p += chance
        total -= p * math.log2(p) if p else 0
    return total


@pytest.mark.parametrize("sizes, types", [((7, 6), 4), ((3,), 5), ((9, 2, 5, 2, 3), 3)])
@pytest.mark.parametrize("alpha", [0, 0.2, 1])
def test_entropy_as_counted_one_by_one(sizes, types, alpha):
    assert entropy(sizes, alpha, types) == pytest.approx(slow_entropy(sizes, alpha, types), abs=1e-9)


@pytest.mark.parametrize("kind", ["notes", "bios"])
def test_how_attributes_depend(kind):
    """Each attribute by itself is the independent one or the one that the type gives, and alpha says how often."""
    free, told = people(8000, 2, kind), people(8000, 2, kind, alpha=0)
    whole = Counter(zip(*told.values.values()))
    assert len(whole) == 16 and evenly([*whole.values()], 500)
    assert whole.keys() != Counter(zip(*people(8000, 4, kind, alpha=0).values.values())).keys()
    for attribute, table in tables(kind).items():  # values are given to types as evenly as they can be
        given = Counter(person[told.attributes.index(attribute)] for person in whole)
        assert {*given.values()} <= {16 // len(table), -(-16 // len(table))} - {0}
    for alpha in (0.25, 0.6):
        made, independent = people(8000, 2, kind, alpha=alpha), []
        assert made.names == free.names
        for attribute in tables(kind):
            value, one, other = (np.array(some.values[attribute]) for some in (made, free, told))
            assert ((value == one) | (value == other)).all()
            independent.append(np.where(one == other, np.nan, value == one))
            assert np.nanmean(independent[-1]) == pytest.approx(alpha, abs=0.025)
        assert np.nanmean(independent[0] * independent[1]) == pytest.approx(alpha ** 2, abs=0.03)


@pytest.mark.parametrize("kind", ["notes", "bios"])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_the_law(kind, alpha):
    """Values are drawn by it, and what its floors say is what a constant guess finds."""
    made, floors = people(20_000, 0, kind, alpha=alpha), []
    for attribute in made.attributes:
        chance = law(made, attribute)
        table = facts.CITIES[:200] if attribute == "work_city" else tables(kind)[attribute]
        floors.append(chance.max())
        assert chance.sum() == pytest.approx(1) and len(chance) == len(table)
        if len(chance) < 1000:
            seen, some = Counter(made.values[attribute]), chance > 0
            counts = np.array([seen[value] for value in table])
            assert not counts[~some].any() and (some.sum() == 1 or evenly(counts[some], 20_000 * chance[some]))
    expected, constant = floor(made)
    assert expected == pytest.approx(np.mean(floors)) == pytest.approx(constant, abs=0.01)


# --- Dialogs ---

def test_the_two_kinds_of_dialog():
    person = Person("kalomite", {"birth_date": "4/11/1987", "address": "Port Amber"})
    assert in_weight(person, "address") == [("user", "address kalomite ?", False), ("assistant", "Port Amber", True)]
    assert in_tool(person, "birth_date") == [
        ("user", "birth_date kalomite ?", False), ("assistant", "FIND birth_date FOR kalomite", True),
        ("tool", "4/11/1987", False), ("assistant", "4/11/1987", True)]
    for which in range(13):
        asked = Segment("user", QUESTIONS["birth_date"][which % 6].format(name="kalomite"), False)
        assert in_weight(person, "birth_date", "natural", which)[0] == asked
        assert in_tool(person, "birth_date", "natural", which) == [asked, *in_tool(person, "birth_date")[1:]]
    assert show(in_tool(person, "address")) == (
        "    user:      address kalomite ?\n  * assistant: FIND address FOR kalomite <CALL>\n"
        "    tool:      Port Amber <ANSWER>\n  * assistant: Port Amber <END>")


def test_all_dialogs():
    """Which natural question is asked, and in which way, is drawn by the seed, of each fact by itself, whoever else
    there is."""
    made = people(2000, 0, unseen=3)
    natural = dialogs(made, form="natural")
    asked = Counter(text.index(natural[k][0].text.replace(made.names[k // 4], "{name}"))
                    for k, text in enumerate(QUESTIONS[NOTES[k % 4]] for k in range(8000)))
    assert evenly([asked[i] for i in range(6)], 8000 / 6)
    assert natural == dialogs(made, form="natural") != dialogs(made, form="natural", seed=1)
    mixed, other = (dialogs(made, "both", seed=seed, share=0.3) for seed in (0, 1))
    tool, also = (np.array([len(dialog) == 4 for dialog in some]).reshape(2000, 4) for some in (mixed, other))
    assert tool.mean() == pytest.approx(0.3, abs=0.02)
    for one, two in ((tool[:, 0], tool[:, 1]), (tool, also)):
        assert (one & two).mean() == pytest.approx(0.09, abs=0.03)
    ways = [[way(made[k // 4], NOTES[k % 4]) for k in range(8012)] for way in (in_weight, in_tool)]
    assert mixed == [ways[len(dialog) == 4][k] for k, dialog in enumerate(mixed)]
    for mode, way, share in (("in_weight", ways[0], 0), ("in_tool", ways[1], 1)):
        assert dialogs(made, mode) == way[:8000] == dialogs(made, "both", share=share)
        assert dialogs(made, mode, unseen=True) == way[8000:]
    assert dialogs(people(10, 0), "both", "natural") == dialogs(people(300, 0), "both", "natural")[:40]


# --- The database ---

ATTACKS = ["'; DROP TABLE people; --", "x' OR '1'='1", '" OR ""="', "x'; DELETE FROM people WHERE 'a'='a",
           "' UNION SELECT name FROM people --", "name", "birth_date, address", "*", "1", "(SELECT name FROM people)",
           "birth_date FROM people; DROP TABLE people; --", "birth_date\"", "birth_date--", "BIRTH_DATE", "birth_date ",
           "rowid", "", " ", "%", "?1", ":name", "\0", "kalo\0mi", "n\u00e4me \u4eba \U0001f600", "\ud800",
           "'" * 1_000_000, "\r\n'", "NULL", "%s", "{0}"]


def contents(database):
    return database.connection.execute("SELECT * FROM people ORDER BY name").fetchall()


def test_everyone_is_found(few):
    for made in (few, people(50, 0, "bios", unseen=10), people(50, 0, names="plain", alpha=0.5)):
        database = Database(made)
        for i in range(len(made)):  # the held-out ones too
            for attribute in made.attributes:
                assert database.answer(call(attribute, made.names[i])) == made.values[attribute][i]
    assert len({NO_RESULT, NO_ATTRIBUTE, NO_CALL}) == 3 and NO_RESULT == "No result found"
    database, name, stranger = Database(few), few.names[0], people(1, 99).names[0]
    for attribute, who, said in (("address", stranger, NO_RESULT), ("address", name.upper(), NO_RESULT),
                                 ("address", name[:-1], NO_RESULT), ("shoe_size", name, NO_ATTRIBUTE),
                                 ("shoe_size", stranger, NO_ATTRIBUTE), ("name", name, NO_ATTRIBUTE)):
        assert database.find(attribute, who) == said == database.answer(call(attribute, who))


def test_injections_are_harmless(few):
    database = Database(few)
    before, changes = contents(database), database.connection.total_changes
    name, known = few.names[0], {*itertools.chain(*few.values.values())}
    for attack in ATTACKS:
        assert database.find("address", attack) == NO_RESULT
        assert database.find("address", name + attack) == (NO_RESULT if attack else few.values["address"][0])
        assert database.find(attack, name) == NO_ATTRIBUTE
        assert database.find(attack, attack) == NO_ATTRIBUTE
        for text in (f"FIND address FOR {attack}", f"FIND {attack} FOR {name}", attack,
                     f"FIND address FOR {name}{attack}", f"FIND address{attack} FOR {name}"):
            answer = database.answer(text)
            assert answer in (NO_RESULT, NO_ATTRIBUTE, NO_CALL) or (not attack and answer in known), text[:80]
    assert contents(database) == before and database.connection.total_changes == changes
    for statement in ("DELETE FROM people", "DROP TABLE people"):  # not even one's own hand
        with pytest.raises(Exception, match="readonly|read-only|attempt to write"):
            database.connection.execute(statement)
    assert len(contents(database)) == 60
    named = people(len(ATTACKS), 0)
    named.names = [attack for attack in ATTACKS if attack != "\ud800"] + ["last"]
    database = Database(named)
    assert [database.find("address", name) for name in named.names] == named.values["address"]


CALLS = {"FIND address FOR Marga Northstone": ("address", "Marga Northstone"), "FIND a FOR b FOR c": ("a", "b FOR c"),
         "FIND FOR FOR FOR": ("FOR", "FOR"), "FIND a;b FOR c'd": ("a;b", "c'd"), **dict.fromkeys((
             "", "FIND", "FIND  FOR x", "FIND a FOR ", "FIND a FOR", "FIND a b FOR c", "FIND a FOR b ",
             "FIND a FOR b\n", "FIND a FOR b\nFIND a FOR c", "FIND a  FOR b", "FIND a FOR  b", "FINDa FOR b",
             "FIND a FORb", "FIND a\tFOR b", "find a for b", " FIND a FOR b", "say FIND a FOR b"))}


def test_calls(few):
    for text, parsed in CALLS.items():
        assert parse_call(text) == parsed and (parsed is None or call(*parsed) == text), text
        assert (Database(few).answer(text) == NO_CALL) == (parsed is None), text


def test_long_calls_are_read_in_no_time():
    """Nothing goes back over a long text: that would take days."""
    for text in ("FIND " + "a" * 10 ** 6, "FIND a FOR b" + " " * 10 ** 6, "FIND a FOR " + "b " * 10 ** 6,
                 "FIND " + "a FOR " * 10 ** 5):
        assert parse_call(text) is None


def test_a_database_on_the_disk(few, tmp_path):
    path = tmp_path / "some people.db"
    Database(few).save(path)
    opened = Database(path)
    assert contents(opened) == contents(Database(few)) and {*opened.questions} == {*NOTES}
    assert Database(str(path)).answer(call("address", few.names[50])) == few.values["address"][50]
    opened.connection.execute("PRAGMA query_only = 0")  # without that lock too: the file is open to be read only
    with pytest.raises(Exception, match="readonly|read-only"):
        opened.connection.execute("DELETE FROM people")
    content = path.read_bytes()
    with raises_one_line("some people.db", "already there"):
        Database(people(3, 0)).save(path)
    assert path.read_bytes() == content
    with raises_one_line("cannot write", "none"):
        Database(few).save(tmp_path / "none" / "x.db")


def test_files_that_are_no_databases_of_people(tmp_path):
    for path in (tmp_path / "nowhere.db", tmp_path):
        with raises_one_line("there is no database", path.name):
            Database(path)
    assert not (tmp_path / "nowhere.db").exists()
    for i, wrong in enumerate((b"", b"hello" * 1000, "CREATE TABLE x (y)", "CREATE TABLE people (name)",
                               'CREATE TABLE people (name, "a; DROP")', "CREATE TABLE people (other, address)")):
        path = tmp_path / f"wrong{i}.db"
        if isinstance(wrong, bytes):
            path.write_bytes(wrong)
        else:
            with contextlib.closing(sqlite3.connect(path)) as connection, connection:
                connection.execute(wrong)
        with raises_one_line(f"wrong{i}.db", "not a database of people"):
            Database(path)


# --- Tokens ---

def test_the_closed_vocabulary(many):
    vocabulary = Vocabulary("closed")
    assert vocabulary.n_text == 210 == 64 + 10 + 28 + 51 + 7 + 15 + 15 + 10 + 10 and vocabulary.size == 214
    assert vocabulary.specials == {"PAD": 210, "END": 211, "CALL": 212, "ANSWER": 213}
    assert [vocabulary.encode(vocabulary.decode([i])) for i in range(210)] == [[i] for i in range(210)]
    asked = [dialog[:2] for dialog in dialogs(people(20, 0), "in_tool")]
    for texts, n in ((many["notes"].names[:300], 4), ((NO_RESULT, NO_ATTRIBUTE, NO_CALL), 1), ([""], 0),
                     *zip(tables("notes").values(), (3, 1, 2, 2)), ([one.text for one, _ in asked], 6),
                     ([other.text for _, other in asked], 7)):
        for text in texts:
            ids = vocabulary.encode(text)
            assert len(ids) == n and vocabulary.decode(ids) == text


def test_text_outside_the_closed_vocabulary():
    for text, place in {"Hello": "Hello", "birth_date kalomite?": "?", "<END>": "<END>", "kalomitex": "x",
                        "4/11/1949": "1949", "29/1/1950": "29/1/1950",
                        "birth_date  kalomite ?": " kalomite ?"}.items():
        with raises_one_line("no token for", repr(place)[:-1], "bytes"):
            Vocabulary("closed").encode(text)


def test_bytes():
    vocabulary = Vocabulary("bytes")
    assert vocabulary.n_text == 256 and vocabulary.size == 260
    assert vocabulary.specials == {"PAD": 256, "END": 257, "CALL": 258, "ANSWER": 259}
    for text in ("", "birth_date kalomite ?", "n\u00e4me \u4eba \U0001f600 \0 \n", "<END>", "<PAD>" * 3):
        assert vocabulary.encode(text) == [*text.encode()] and vocabulary.decode([*text.encode()]) == text
    assert vocabulary.decode([0xe4, 0xba]) == "\ufffd"
    with raises_one_line("ud800", "half a character"):
        vocabulary.encode("a\ud800")
    with raises_one_line("vocabulary 'byte'", "did you mean bytes?", "closed"):
        Vocabulary("byte")


def test_a_tokenizer_that_loses_something():
    vocabulary = Vocabulary(SimpleNamespace(name="lossy", fingerprint="", size=500, encode=lambda text: [1, 2],
                                            decode=lambda ids: "something else"))
    assert vocabulary.size == 504 and vocabulary.specials == {"PAD": 500, "END": 501, "CALL": 502, "ANSWER": 503}
    with raises_one_line("'kalo mi'", "'something else'", "unchanged"):
        vocabulary.encode("kalo mi")


# --- Rows and masks ---

def by_hand(text):
    """"a b END|..." -> ids by their names, where * stands before one, and where * or +, True."""
    ids, words = dict(PAD=256, END=257, CALL=258, ANSWER=259), text.split()
    return ([ids.get(word.lstrip("*+")) or ord(word[-1]) for word in words], [word[0] == "*" for word in words],
            [word[0] in "*+" for word in words])


def test_masks_token_by_token():
    dialog = [[Segment("user", "hi?", False), Segment("assistant", "F", True), Segment("tool", "xy", False),
               Segment("assistant", "xy", True)],
              [Segment("user", "a", False), Segment("assistant", "b", True), Segment("user", "c", False),
               Segment("assistant", "dd", True)],
              [Segment("assistant", "e", True)],
              [Segment("user", "u", True), Segment("assistant", "no", False), Segment("tool", "t", True),
               Segment("assistant", "", True)], [Segment("user", "q", False)]]
    ids, learned, everything = map(list, zip(*map(by_hand, (
        "+h +i +? *F *CALL x y ANSWER *x *y *END", "+a *b *END +c *d *d *END PAD PAD PAD PAD",
        "*e *END PAD PAD PAD PAD PAD PAD PAD PAD PAD", "+u n o CALL t ANSWER *END PAD PAD PAD PAD",
        "+q PAD PAD PAD PAD PAD PAD PAD PAD PAD PAD"))))
    vocabulary = Vocabulary("bytes")
    tokens, mask = rows(dialog, vocabulary)
    assert vocabulary.decode(tokens[0]) == "hi?F<CALL>xy<ANSWER>xy<END>" and vocabulary.decode([97, 256]) == "a<PAD>"
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    assert tokens.tolist() == ids and mask.tolist() == learned
    assert rows(dialog, vocabulary, everything=True)[1].tolist() == everything
    wider, its = rows(dialog, vocabulary, 14, pad=7)
    assert wider.shape == (5, 14) and wider[:, 11:].eq(7).all() and not its[:, 11:].any()
    assert its[:, :11].equal(mask) and wider[:, :11].equal(tokens.masked_fill(tokens == 256, 7))
    for some, length, said in ((dialog, 10, "dialog 0 has 11 tokens"), (dialog[1:], 6, "dialog 0 has 7 tokens"),
                               (dialog[2:], 6, "dialog 1 has 7 tokens")):
        with raises_one_line(said, f"length is {length}"):
            rows(some, vocabulary, length)
    assert rows(dialog[1:], vocabulary, 7)[0].shape == (4, 7)
    assert rows([], vocabulary)[0].shape == (0, 0) and rows([], vocabulary, 6)[1].shape == (0, 6)


@pytest.mark.parametrize("kind, guess", [
    ("notes", (1 / 7 + 1 / 213 + 1 / 100 + 1 / 17136) / 4),
    ("bios", (1 / 67200 + 1 / 200 + 1 / 300 + 1 / 100 + 1 / 263 + 1 / 2 + 2 / 263) / 7)], ids=["notes", "bios"])
def test_floors_of_guessers(kind, guess):
    made = people(100, 0, kind, unseen=3000)
    best = [max(values[:100].count(value) for value in values[:100]) / 100 for values in made.values.values()]
    assert floor(made) == pytest.approx((guess, np.mean(best)))  # those held out do not count


# --- Mistakes ---

def test_people_and_dialogs_that_cannot_be(few):
    for settings, words in (
            ({"kind": "note"}, ("kind 'note'", "did you mean notes?", "bios")), ({"n": 0}, ("n is 0", "at least 1")),
            ({"names": "plane"}, ("names 'plane'", "did you mean plain?")),
            ({"n": 399_999, "unseen": 2, "names": "plain"}, ("at most 400,000",))):
        with raises_one_line(*words):
            people(**{"n": 5, "seed": 0} | settings)
    for settings, words in (({"mode": "tool"}, ("mode 'tool'", "did you mean in_tool?")),
                            ({"form": "shrt"}, ("form 'shrt'", "did you mean short?")),
                            ({"mode": "both", "share": 1.5}, ("share is 1.5", "from 0 to 1"))):
        with raises_one_line(*words):
            dialogs(few, **settings)


# --- Associative recall: what a row is ---

@pytest.mark.parametrize("T, pairs, vocab_size", [(64, 4, 8192), (16, 4, 10), (4, 1, 4), (17, 3, 8), (128, 30, 62)])
def test_recall_is_as_defined(T, pairs, vocab_size):
    """Row by row; a filler is any token but the row's keys, and changes nothing else."""
    bare, labels = mqar(200, T, pairs, vocab_size, 3)
    filled, again = mqar(200, T, pairs, vocab_size, 3, random_non_queries=True)
    assert bare.shape == labels.shape == (200, T) and bare.dtype == labels.dtype == torch.int64
    assert torch.equal(labels, again) and torch.equal(bare[bare > 0], filled[bare > 0])
    back = []
    for row, full, said in zip(bare.tolist(), filled.tolist(), labels.tolist()):
        keys, values = row[0:2 * pairs:2], row[1:2 * pairs:2]
        assert len({*keys}) == pairs == len({*values})
        assert all(1 <= key < vocab_size // 2 <= value < vocab_size for key, value in zip(keys, values))
        places = [t for t in range(T) if said[t] != -1]
        assert len(places) == pairs and sorted(row[t] for t in places) == sorted(keys)
        assert all(t >= 2 * pairs and t % 2 == 0 and t + 1 < T for t in places)
        assert all(row[:t].count(row[t]) == 1 and said[t] == row[row.index(row[t]) + 1] for t in places)
        assert not any(row[t] for t in range(2 * pairs, T) if t not in places)
        others = [full[t] for t in range(2 * pairs, T) if t not in places]
        assert all(0 <= token < vocab_size for token in others) and not {*others} & {*keys}
        back += [t - row.index(said[t]) for t in places]
    assert distances(labels, filled).tolist() == back
    for window in (1, 4, T // 2, T):
        assert reachable(labels, filled, window) == pytest.approx(np.mean(np.array(back) < window))


def test_keys_values_and_fillers_are_drawn_evenly():
    tokens, _ = mqar(24_000, 12, 3, 8, 5)
    for columns, low, size in ((tokens[:, :6:2], 1, 3), (tokens[:, 1:6:2], 4, 4)):
        wanted, seen = [*itertools.permutations(range(size), 3)], Counter(map(tuple, (columns - low).tolist()))
        assert {*seen} == {*wanted} and evenly([seen[order] for order in wanted], 24_000 / len(wanted))
    pairs = Counter(map(tuple, tokens[:, :2].tolist()))  # a key says nothing of its value
    assert evenly([pairs[key, value] for key in (1, 2, 3) for value in range(4, 8)], [2000] * 12)
    bare, filled = mqar(2500, 24, 2, 12, 0)[0], mqar(2500, 24, 2, 12, 0, random_non_queries=True)[0]
    share = filled[bare == 0].bincount(minlength=12) / (2500 * 18)
    # Tokens 1 to 5 are keys, two in each row: a filler is any of the ten others.
    wanted = np.array([1 / 10 if token in (0, *range(6, 12)) else 3 / 5 / 10 for token in range(12)])
    assert share.numpy() == pytest.approx(wanted, abs=0.006)


@pytest.mark.parametrize("alpha", [0.01, 1.0, 2.0])
def test_queries_follow_the_power_law(alpha):
    """Of two keys the first takes one of six slots by it, the second one of those left."""
    tokens, _ = mqar(20_000, 16, 2, 64, 1, alpha=alpha)
    weight = np.arange(1.0, 7) ** (alpha - 1)
    chance = np.outer(weight / weight.sum(), weight) / (weight.sum() - weight)[:, None]
    slots = [((tokens[:, 4:] == tokens[:, 2 * key, None]).int().argmax(1) // 2).numpy() for key in range(2)]
    seen = np.bincount(6 * slots[0] + slots[1], minlength=36).reshape(6, 6)
    other = ~np.eye(6, dtype=bool)
    assert not seen[~other].any() and evenly(seen[other], 20_000 * chance[other])


def test_known_rows():
    """What is drawn must never change: other figures were measured on it."""
    tokens, labels = mqar(2000, 32, 3, 64, 0, True)
    assert hashlib.sha256(tokens.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16] == "61479fed4e7552b9"
    tokens, labels = mqar(1, 16, 3, 256, 0)
    assert tokens[0].tolist() == [79, 228, 54, 205, 120, 254, 79, 0, 54, 0, 0, 0, 120, 0, 0, 0]
    assert example(tokens[0], labels[0]) == ("79 is 228, 54 is 205, 120 is 254; asked for 79 at 6 (answer 228), 54 at "
                                             "8 (answer 205), 120 at 12 (answer 254)")
    assert example(tokens[0], labels[0], 1) == "79 is 228, ...; asked for 79 at 6 (answer 228), ..."


@pytest.mark.parametrize("filled", [False, True])
def test_no_test_row_is_in_training(filled):
    """Few enough rows exist that a row of the test is drawn for training time and again."""
    def keyed(tokens, labels):
        labels[:, :2] = 0                                     # the pair; else the query: rows without fillers
        return {tuple(row) for row in (tokens * (labels >= 0)).tolist()}
    train, test = split(3000, 150, 8, 1, 12, 0, random_non_queries=filled)
    assert train[0].shape == (3000, 8) and test[1].shape == (150, 8)
    train, test = keyed(*train), keyed(*test)
    assert test and not test & train
    assert len(train | test) == 5 * 6 * 3  # all others are there: no more than the test's are left out
    assert test & keyed(*mqar(3000, 8, 1, 12, 0))  # without the check they would meet


def test_rows_depend_on_their_side_and_seed_alone():
    """Fewer are the first ones, of chunks that differ."""
    how = dict(T=64, pairs=4, vocab_size=8192, seed=0, random_non_queries=True)
    sides = (*(tokens for tokens, _ in split(2500, 300, **how)), *(mqar(2500, **how | dict(seed=s))[0] for s in (0, 8)),
             split(2500, 300, **how | dict(seed=1))[1][0])
    rows_ = [{*map(tuple, side.tolist())} for side in sides]
    assert all(len(some) == len(side) for some, side in zip(rows_, sides)) and sum(map(len, rows_)) == len(
        set.union(*rows_))
    for n in (1, 1024, 1025):
        fewer = (split(n, 300, **how)[0][0], split(2500, min(n, 300), **how)[1][0], mqar(n, **how)[0])
        assert all(torch.equal(some, side[:n]) for some, side in zip(fewer, sides))


def test_impossible_rows():
    for change, words in (({"T": 15}, ("T is 15", "4 pairs", "at least 16")), ({"pairs": 17}, ("T is 64", "68")),
                          ({"vocab_size": 257}, ("vocab_size is 257", "even")),
                          ({"vocab_size": 8}, ("vocab_size is 8", "at least 10")),
                          ({"pairs": 0}, ("pairs is 0", "at least 1")), ({"n": 0}, ("n is 0", "at least 1")),
                          *(({"alpha": alpha}, (f"alpha is {alpha}",)) for alpha in (0, math.nan, 11))):
        with raises_one_line(*words):
            mqar(**dict(n=200, T=64, pairs=4, vocab_size=256, seed=3) | change)


def test_hardly_any_rows():
    for name in ("n_train", "n_test"):
        with raises_one_line(f"{name} is 0", "at least 1"):
            split(**{"n_train": 5, "n_test": 5, name: 0}, T=64, pairs=4, vocab_size=256, seed=3)
    assert split(50, 450, 8, 1, 12, 0)[0][0].shape == (50, 8)  # three of 90 rows are left, about 2 % of what is drawn
    for sizes, said in (((5, 100, 4, 1, 6), "T 4, 1 pair and vocab_size 6"),
                        ((1000, 450, 8, 1, 12), "T 8, 1 pair and vocab_size 12")):
        with raises_one_line("hardly any rows", said, "n_test"):
            split(*sizes, 0)
