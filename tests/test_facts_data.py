"""data/facts.py: people and their law, dialogs, the database under attack, tokens, masks, bits. No network."""
import hashlib
import itertools
import math
import re
import sqlite3
import string
from collections import Counter

import numpy as np
import pytest
import torch
from choices import evenly, raises_one_line

from data import facts
from data.facts import (NO_ATTRIBUTE, NO_CALL, NO_RESULT, QUESTIONS, SYLLABLES, Database, Person, Segment,
                        Vocabulary, bits_stored, call, dialogs, entropy, floor, in_tool, in_weight, law, parse_call,
                        people, rows, show, shuffled, tables)

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
    assert many["notes"].attributes == NOTES and many["bios"].attributes == BIOS
    assert many["notes"].bits == pytest.approx(math.log2(28 * 12 * 51 * 7 * 213 * 100))
    assert round(many["notes"].bits, 2) == 31.25
    assert many["bios"].bits == pytest.approx(math.log2(2 * 12 * 28 * 200 * 200 * 300 * 100 * 263))
    assert round(many["bios"].bits, 2) == 47.59
    for kind, made in many.items():
        assert (made.kind, made.n, made.unseen, len(made), len(made.names)) == (kind, 20_000, 500, 20_500, 20_500)
        for attribute, values in made.values.items():
            assert len(values) == 20_500 and all(type(value) is str for value in values)
        for attribute, table in tables(kind).items():
            assert len(table) == len({*table}) == SIZES[attribute]
            assert {*made.values[attribute]} <= {*table}
            assert all(value == value.strip() and value.isascii() for value in table)
    dates = [tuple(map(int, value.split("/"))) for value in tables("notes")["birth_date"]]
    assert {*dates} == {*itertools.product(range(1, 29), range(1, 13), range(1950, 2001))}
    days = {tuple(value.split(" ")) for value in tables("bios")["birthday"]}
    assert tuple(map(len, map(set, zip(*days)))) == (28, 12, 200) and len(days) == 67_200


def test_values_are_drawn_evenly_and_by_themselves(many):
    for kind, made in many.items():
        for attribute, table in tables(kind).items():
            seen = Counter(made.values[attribute])
            assert evenly([seen[value] for value in table], 20_500 / len(table))
        small = [a for a in made.attributes if SIZES.get(a, 999) <= 300 and a != "birthday"]
        for one, other in itertools.combinations(small, 2):
            if SIZES[one] * SIZES[other] < 30_000:
                seen = Counter(zip(made.values[one], made.values[other]))
                counts = [seen[pair] for pair in itertools.product(tables(kind)[one], tables(kind)[other])]
                assert evenly(counts, 20_500 / len(counts))


def test_the_city_of_work_follows_from_the_employer(many):
    made, city = many["bios"], {}
    for employer, work in zip(made.values["employer"], made.values["work_city"]):
        assert city.setdefault(employer, work) == work
    assert len(city) == 263 and {*city.values()} <= {*tables("bios")["birth_city"]} and len({*city.values()}) == 200


def test_names():
    for settings, size, words, lists in (({}, 64 ** 4, 1, None), ({"names": "plain"}, 400_000, 2, (400, 1000)),
                                         ({"kind": "bios"}, 160_000_000, 3, (400, 400, 1000))):
        made = people(20_000, 3, unseen=2000, **settings)
        assert made.n_names == size and len({*made.names}) == 22_000
        split = [name.split(" ") for name in made.names]
        assert {*map(len, split)} == {words}
        if lists is None:
            assert all(len(name) == 8 for name in made.names)
            split = [[name[i:i + 2] for i in range(0, 8, 2)] for name in made.names]
            lists = (64,) * 4
            assert {*itertools.chain(*split)} == {*SYLLABLES} and len({*SYLLABLES}) == 64
        for column, n in zip(zip(*split), lists):
            seen = Counter(column)
            assert len(seen) == n and evenly([*seen.values()], 22_000 / n)
        for (a, n), (b, m) in itertools.combinations(zip(zip(*split), lists), 2):  # parts go together evenly
            if n * m < 10_000:
                assert evenly([*Counter(zip(a, b)).values()] + [0] * (n * m - len({*zip(a, b)})), 22_000 / n / m)
    assert people(5, 0, "bios", names="plain").names == people(5, 0, "bios").names


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 300, 4096])
def test_shuffling_is_a_permutation(size):
    for seed in range(3):
        assert sorted(shuffled(np.arange(size), size, seed).tolist()) == list(range(size))
    some = shuffled(np.arange(size), size, 0)
    assert shuffled(np.arange(size)[::-1], size, 0).tolist() == some[::-1].tolist()
    if size > 100:
        assert some.tolist() != shuffled(np.arange(size), size, 1).tolist()
        follows = (np.diff(some.astype(np.int64)) % size == 1).mean()
        assert follows < 0.02


def test_a_person_depends_on_nothing_else():
    for settings in ({}, {"kind": "bios"}, {"names": "plain"}, {"alpha": 0.3}):
        small, large = people(30, 5, unseen=7, **settings), people(500, 5, unseen=90, **settings)
        assert [small[i] for i in range(30)] == [large[i] for i in range(30)]
        assert [small[30 + i] for i in range(7)] == [large[500 + i] for i in range(7)]
        assert small == people(30, 5, unseen=7, **settings)
        other = people(30, 6, **settings)
        assert not {*other.names} & {*small.names}
        assert sum(a == b for a, b in zip(other.values[small.attributes[0]], small.values[small.attributes[0]])) < 9
        assert not {*large.names[:500]} & {*large.names[500:]}
    assert people(3, -1).names != people(3, 1).names


def test_known_people():
    """Who is drawn must never change: other figures were measured on them."""
    for kind, digest in (("notes", "838dee93aa5c263e"), ("bios", "9d20cfb85edfe484")):
        made = people(1000, 0, kind, alpha=0.5, unseen=50)
        told = "\n".join([*made.names, *itertools.chain(*made.values.values())])
        assert hashlib.sha256(told.encode()).hexdigest()[:16] == digest
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


@pytest.mark.parametrize("sizes, types", [((5, 3, 2), 4), ((7, 6), 4), ((4, 4, 4), 4), ((3,), 5), ((9, 2, 5, 2, 3), 3)])
@pytest.mark.parametrize("alpha", [0, 0.2, 0.5, 0.9, 1])
def test_entropy_as_counted_one_by_one(sizes, types, alpha):
    assert entropy(sizes, alpha, types) == pytest.approx(slow_entropy(sizes, alpha, types), abs=1e-9)


def test_entropy_of_people():
    for kind, all_of_them in (("notes", 31.25), ("bios", 47.59)):
        bits = [people(1, 0, kind, alpha=alpha).bits for alpha in (0, 0.25, 0.5, 0.75, 1 - 1e-9, 1)]
        assert bits[0] == pytest.approx(4) and bits == sorted(bits)  # 16 types
        assert bits[-1] == pytest.approx(all_of_them, abs=5e-3) and bits[-2] == pytest.approx(bits[-1], abs=1e-5)
    assert people(1, 0, alpha=0.5).bits == pytest.approx(22.7215, abs=1e-3)


def test_how_attributes_depend():
    """Each attribute by itself is the independent one or the one that the type gives, and alpha says how often."""
    for kind in ("notes", "bios"):
        free, told = people(8000, 2, kind), people(8000, 2, kind, alpha=0)
        whole = Counter(zip(*told.values.values()))
        assert len(whole) == 16 and evenly([*whole.values()], 500)
        for attribute, table in tables(kind).items():  # values are given to types as evenly as they can be
            given = Counter(person[told.attributes.index(attribute)] for person in whole)
            assert {*given.values()} <= {16 // len(table), -(-16 // len(table))} - {0}
        for alpha in (0.25, 0.6):
            made, independent = people(8000, 2, kind, alpha=alpha), []
            assert made.names == free.names
            for attribute in tables(kind):
                triples = [*zip(made.values[attribute], free.values[attribute], told.values[attribute])]
                assert all(value in (one, other) for value, one, other in triples)
                independent.append([value == one if one != other else None for value, one, other in triples])
                known = [which for which in independent[-1] if which is not None]
                assert np.mean(known) == pytest.approx(alpha, abs=5 / math.sqrt(len(known)) / 2)
            both = [(a, b) for a, b in zip(*independent[:2]) if a is not None and b is not None]
            assert np.mean([a and b for a, b in both]) == pytest.approx(alpha ** 2, abs=0.03)
    assert Counter(zip(*people(2000, 3, alpha=0).values.values())).keys() != \
        Counter(zip(*people(2000, 4, alpha=0).values.values())).keys()


@pytest.mark.parametrize("kind", ["notes", "bios"])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_the_law(kind, alpha):
    made = people(20_000, 0, kind, alpha=alpha)
    for attribute in made.attributes:
        chance = law(made, attribute)
        assert chance.sum() == pytest.approx(1)
        if len(chance) < 1000:
            table = facts.CITIES[:200] if attribute == "work_city" else tables(kind)[attribute]
            seen, some = Counter(made.values[attribute]), chance > 0
            counts = np.array([seen[value] for value in table])
            assert not counts[~some].any() and (some.sum() == 1 or evenly(counts[some], 20_000 * chance[some]))


# --- Dialogs ---

def test_the_two_kinds_of_dialog(few):
    person = Person("kalomite", {"birth_date": "4/11/1987", "address": "Port Amber"})
    assert in_weight(person, "address") == [("user", "address kalomite ?", False), ("assistant", "Port Amber", True)]
    assert in_tool(person, "birth_date") == [
        ("user", "birth_date kalomite ?", False), ("assistant", "FIND birth_date FOR kalomite", True),
        ("tool", "4/11/1987", False), ("assistant", "4/11/1987", True)]
    for which in range(13):
        text = QUESTIONS["birth_date"][which % 6].format(name="kalomite")
        assert in_weight(person, "birth_date", "natural", which)[0] == Segment("user", text, False)
        assert in_tool(person, "birth_date", "natural", which)[1:] == in_tool(person, "birth_date")[1:]
        assert in_tool(person, "birth_date", "natural", which)[0].text == text
    assert "user:      address kalomite ?\n" in show(in_tool(person, "address"))
    assert show(in_weight(person, "address")).endswith("* assistant: Port Amber <END>")
    assert [line.split("<")[-1] for line in show(in_tool(person, "address")).split("\n")][1:] == ["CALL>", "ANSWER>",
                                                                                                  "END>"]


def test_questions_name_the_person_and_end():
    assert {*QUESTIONS} == {*NOTES, *BIOS}
    for texts in QUESTIONS.values():
        assert len({*texts}) == len(texts) >= 5
        for text in texts:
            assert [field for _, field, _, _ in string.Formatter().parse(text) if field] == ["name"]
            assert text[-1] in "?." and not re.search("[?.].", text) and text[0].isupper()


def test_all_dialogs(few):
    for form in ("short", "natural"):
        weight, tool = dialogs(few, "in_weight", form), dialogs(few, "in_tool", form)
        assert len(weight) == len(tool) == 160
        for k, (one, other) in enumerate(zip(weight, tool)):
            person, attribute = few[k // 4], NOTES[k % 4]
            assert person.name in one[0].text and one[0] == other[0]
            assert one[1].text == other[2].text == other[3].text == person.values[attribute]
            assert other[1].text == call(attribute, person.name)
            assert (one[0].text == f"{attribute} {person.name} ?") == (form == "short")
    unseen = dialogs(few, unseen=True)
    assert [dialog[0].text for dialog in unseen] == [f"{a} {name} ?" for name in few.names[40:] for a in NOTES]


def test_natural_questions_and_mixtures_are_drawn():
    made = people(2000, 0)
    natural = dialogs(made, form="natural")
    asked = Counter(text.index(natural[k][0].text.replace(made.names[k // 4], "{name}"))
                    for k, text in enumerate(QUESTIONS[NOTES[k % 4]] for k in range(8000)))
    assert evenly([asked[i] for i in range(6)], 8000 / 6)
    for share in (0.5, 0.2):
        mixed = dialogs(made, "both", share=share)
        tool = np.array([len(dialog) == 4 for dialog in mixed]).reshape(2000, 4)
        assert tool.mean() == pytest.approx(share, abs=0.02)
        assert (tool[:, 0] & tool[:, 1]).mean() == pytest.approx(share ** 2, abs=0.03)  # each fact by itself
        assert mixed == dialogs(made, "both", share=share)
        other = np.array([len(dialog) == 4 for dialog in dialogs(made, "both", seed=1, share=share)]).reshape(2000, 4)
        assert (tool & other).mean() == pytest.approx(share ** 2, abs=0.02)
        both = [in_weight, in_tool]
        assert all(dialog == both[len(dialog) == 4](made[k // 4], NOTES[k % 4]) for k, dialog in enumerate(mixed))
    assert dialogs(made, "both", share=0) == dialogs(made)
    assert dialogs(made, "both", share=1) == dialogs(made, "in_tool")
    assert dialogs(made, form="natural", seed=1) != dialogs(made, form="natural") != natural[1:]
    assert dialogs(made, form="natural") == natural
    assert dialogs(people(10, 0), "both", "natural") == dialogs(people(300, 0), "both", "natural")[:40]


# --- The database ---

ATTACKS = ["'; DROP TABLE people; --", "x' OR '1'='1", "' OR 1=1 --", '" OR ""="',
           "x'; DELETE FROM people WHERE 'a'='a", "' UNION SELECT name FROM people --", "name",
           "birth_date, address", "*", "1", "(SELECT name FROM people)",
           "birth_date FROM people; DROP TABLE people; --", "birth_date\"", "birth_date'", "birth_date--",
           "BIRTH_DATE", "birth_date ", "rowid", "sqlite_version()", "", " ", "%", "_%", "?", "?1", ":name", "\0",
           "kalo\0mi", "n\u00e4me \u4eba \U0001f600", "\u202e", "\ud800", "a" * 1_000_000, "'" * 100_000,
           "; ATTACH DATABASE 'x' AS y", "\\", "\n", "\r\n'", "PRAGMA query_only = 0", "x') --", "/* */", "NULL",
           "0x41", "{}", "%s", "{0}"]


def contents(database):
    return database.connection.execute("SELECT * FROM people ORDER BY name").fetchall()


def test_everyone_is_found(few, many):
    for made in (few, people(50, 0, "bios", unseen=10), people(50, 0, names="plain", alpha=0.5)):
        database = Database(made)
        for i in range(len(made)):  # the held-out ones too
            for attribute in made.attributes:
                assert database.find(attribute, made.names[i]) == made.values[attribute][i]
                assert database.answer(call(attribute, made.names[i])) == made.values[attribute][i]
        for dialog in dialogs(made, "in_tool") + dialogs(made, "in_tool", unseen=True):
            assert database.answer(dialog[1].text) == dialog[2].text
    assert len({NO_RESULT, NO_ATTRIBUTE, NO_CALL}) == 3 and NO_RESULT == "No result found"
    stranger = people(1, 99).names[0]
    database = Database(few)
    assert stranger not in few.names and database.find("address", stranger) == NO_RESULT
    assert database.find("shoe_size", few.names[0]) == NO_ATTRIBUTE == database.find("shoe_size", stranger)
    assert database.find("name", few.names[0]) == NO_ATTRIBUTE
    assert database.find("address", few.names[0].upper()) == NO_RESULT
    assert database.find("address", few.names[0][:-1]) == NO_RESULT


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
    tables_ = database.connection.execute("SELECT name FROM sqlite_master").fetchall()
    assert tables_ == [("people",)]
    for statement in ("DELETE FROM people", "DROP TABLE people"):  # not even one's own hand
        with pytest.raises(Exception, match="readonly|read-only|attempt to write"):
            database.connection.execute(statement)
    assert len(contents(database)) == 60


def test_names_that_look_like_sql():
    made = people(len(ATTACKS), 0)
    made.names = [attack for attack in ATTACKS if attack != "\ud800"] + ["last"]
    database = Database(made)
    for i, name in enumerate(made.names):
        assert database.find("address", name) == made.values["address"][i]


@pytest.mark.parametrize("text, parsed", [
    ("FIND birth_date FOR kalomite", ("birth_date", "kalomite")),
    ("FIND address FOR Marga Northstone", ("address", "Marga Northstone")), ("FIND a FOR b FOR c", ("a", "b FOR c")),
    ("FIND FOR FOR FOR", ("FOR", "FOR")), ("FIND a FOR b", ("a", "b")), ("FIND a;b FOR c'd", ("a;b", "c'd")),
    ("", None), ("FIND", None), ("FIND  FOR x", None), ("FIND a FOR ", None), ("FIND a FOR", None),
    ("FIND a b FOR c", None),
    ("find a for b", None), (" FIND a FOR b", None), ("FIND a FOR b ", None), ("FIND a FOR b\n", None),
    ("FIND a FOR b\nFIND a FOR c", None), ("say FIND a FOR b", None), ("FIND a  FOR b", None), ("FIND a FOR  b", None),
    ("FINDa FOR b", None), ("FIND a FORb", None), ("4/11/1987", None), ("FIND a\tFOR b", None)])
def test_calls(text, parsed, few):
    assert parse_call(text) == parsed
    if parsed is None:
        assert Database(few).answer(text) == NO_CALL
    else:
        assert call(*parsed) == text and Database(few).answer(text) in (NO_RESULT, NO_ATTRIBUTE)


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
    for attack in ATTACKS:
        assert opened.find(attack, few.names[0]) == NO_ATTRIBUTE and opened.find("address", attack) == NO_RESULT
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
    with raises_one_line("there is no database", "nowhere.db"):
        Database(tmp_path / "nowhere.db")
    assert not (tmp_path / "nowhere.db").exists()
    with raises_one_line("there is no database"):
        Database(tmp_path)
    for i, (content, statement) in enumerate([(b"", None), (b"hello" * 1000, None), (None, "CREATE TABLE x (y)"),
                                              (None, "CREATE TABLE people (name)"),
                                              (None, 'CREATE TABLE people (name, "a; DROP")'),
                                              (None, "CREATE TABLE people (other, address)")]):
        path = tmp_path / f"wrong{i}.db"
        if statement:
            connection = sqlite3.connect(path)
            connection.execute(statement)
            connection.commit(), connection.close()
        else:
            path.write_bytes(content)
        with raises_one_line(f"wrong{i}.db", "not a database of people"):
            Database(path)


# --- Tokens ---

def test_the_closed_vocabulary(many):
    vocabulary, made = Vocabulary("closed"), many["notes"]
    assert vocabulary.n_text == 210 and vocabulary.size == 214
    assert vocabulary.specials == {"PAD": 210, "END": 211, "CALL": 212, "ANSWER": 213}
    assert 210 == 64 + 10 + 28 + 51 + 7 + 15 + 15 + 10 + 10
    assert [vocabulary.encode(vocabulary.decode([i])) for i in range(210)] == [[i] for i in range(210)]
    for name in made.names[:300]:
        ids = vocabulary.encode(name)
        assert len(ids) == 4 and max(ids) < 64 and vocabulary.decode(ids) == name
    for attribute, table in tables("notes").items():
        for value in table:
            ids = vocabulary.encode(value)
            assert 1 <= len(ids) <= 3 and vocabulary.decode(ids) == value
            assert len(ids) == {"birth_date": 3, "birth_place": 1, "address": 2, "occupation": 2}[attribute]
    for text in (NO_RESULT, NO_ATTRIBUTE, NO_CALL):
        assert len(vocabulary.encode(text)) == 1
    for dialog in dialogs(people(20, 0), "in_tool"):
        texts = [segment.text for segment in dialog]
        assert [vocabulary.decode(vocabulary.encode(text)) for text in texts] == texts
        assert list(map(len, map(vocabulary.encode, texts[:2]))) == [6, 7]
    assert vocabulary.encode("") == [] and vocabulary.decode([]) == ""


@pytest.mark.parametrize("text, place", [("Hello", "Hello"), ("birth_date kalomite?", "?"), ("<END>", "<END>"),
                                         ("kalomitex", "x"), ("4/11/1949", "1949"), ("When was kalomite born?", "When"),
                                         ("birth_date  kalomite ?", " kalomite ?"), ("29/1/1950", "29/1/1950")])
def test_text_outside_the_closed_vocabulary(text, place):
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


@pytest.mark.parametrize("name", ["closed", "bytes"])
def test_special_tokens_are_shown(name):
    vocabulary = Vocabulary(name)
    special = vocabulary.specials
    ids = [*vocabulary.encode("kalo"), special["CALL"], special["ANSWER"], *vocabulary.encode("mi"), special["END"],
           special["PAD"], special["PAD"]]
    assert vocabulary.decode(ids) == "kalo<CALL><ANSWER>mi<END><PAD><PAD>" == vocabulary.decode(torch.tensor(ids))


class Words:
    """A tokenizer of somebody else's: words and spaces, numbered as they come."""

    def __init__(self, **sizes):
        self.words = []
        vars(self).update(sizes)

    def encode(self, text):
        found = re.findall(r"\s|\S+", text)
        self.words += sorted({*found} - {*self.words})
        return tuple(self.words.index(word) for word in found)

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize("sizes", [{"size": 500}, {"n_vocab": 500}, {"vocab_size": lambda: 500}, {"vocab_size": 500}],
                         ids=["size", "n_vocab", "function", "number"])
def test_another_tokenizer(sizes, few):
    vocabulary = Vocabulary(Words(**sizes))
    assert vocabulary.size == 504 and vocabulary.specials == {"PAD": 500, "END": 501, "CALL": 502, "ANSWER": 503}
    tokens, mask = rows(dialogs(few, "in_tool", "natural"), vocabulary)
    name, value = few.names[0], few.values["birth_date"][0]
    assert f"<CALL>{value}<ANSWER>{value}<END>" in vocabulary.decode(tokens[0])
    assert vocabulary.decode(tokens[0][mask[0]]) == f"FIND birth_date FOR {name}<CALL>{value}<END>"
    lossy = Words(**sizes)
    lossy.decode = lambda ids: "something else"
    with raises_one_line("'kalo mi'", "'something else'", "unchanged"):
        Vocabulary(lossy).encode("kalo mi")


def test_an_unknown_vocabulary():
    with raises_one_line("vocabulary 'byte'", "did you mean bytes?", "closed"):
        Vocabulary("byte")


# --- Rows and masks ---

def by_hand(text, **ids):
    """"a b END|..." -> ids by their names, and where * stands before one, True."""
    words = text.split()
    return [ids[word.lstrip("*")] for word in words], [word[0] == "*" for word in words]


def test_masks_token_by_token():
    dialog = [[Segment("user", "hi?", False), Segment("assistant", "F", True), Segment("tool", "xy", False),
               Segment("assistant", "xy", True)],
              [Segment("user", "a", False), Segment("assistant", "b", True), Segment("user", "c", False),
               Segment("assistant", "dd", True)],
              [Segment("assistant", "e", True)],
              [Segment("user", "u", True), Segment("assistant", "no", False), Segment("tool", "t", True),
               Segment("assistant", "", True)], [Segment("user", "q", False)]]
    ids = {letter: ord(letter) for letter in "hi?Fxyabcdeunotq"} | {"PAD": 256, "END": 257, "CALL": 258, "ANSWER": 259}
    wanted = [by_hand(text, **ids) for text in (
        "h i ? *F *CALL x y ANSWER *x *y *END", "a *b *END c *d *d *END PAD PAD PAD PAD",
        "*e *END PAD PAD PAD PAD PAD PAD PAD PAD PAD", "u n o CALL t ANSWER *END PAD PAD PAD PAD",
        "q PAD PAD PAD PAD PAD PAD PAD PAD PAD PAD")]
    tokens, mask = rows(dialog, Vocabulary("bytes"))
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    assert tokens.tolist() == [row for row, _ in wanted] and mask.tolist() == [row for _, row in wanted]
    wider, its = rows(dialog, Vocabulary("bytes"), 14, pad=7)
    assert wider.shape == (5, 14) and wider[:, 11:].eq(7).all() and not its[:, 11:].any()
    assert its[:, :11].equal(mask) and wider[:, :11].equal(tokens.masked_fill(tokens == 256, 7))
    with raises_one_line("dialog 0 has 11 tokens", "length is 10"):
        rows(dialog, Vocabulary("bytes"), 10)
    assert rows(dialog[1:], Vocabulary("bytes"), 7)[0].shape == (4, 7)
    with raises_one_line("dialog 1 has 3 tokens", "length is 2"):
        rows([[Segment("user", "a", False)], [Segment("user", "abc", False)]], Vocabulary("bytes"), 2)
    assert rows([], Vocabulary("bytes"))[0].shape == (0, 0) and rows([], Vocabulary("bytes"), 6)[1].shape == (0, 6)
    with pytest.raises(ValueError, match="'robot'"):
        rows([[Segment("robot", "a", False)]], Vocabulary("bytes"))


def test_the_tool_is_never_trained_on(few):
    for name, form in (("closed", "short"), ("bytes", "short"), ("bytes", "natural")):
        vocabulary = Vocabulary(name)
        made = dialogs(few, "both", form)
        tokens, mask = rows(made, vocabulary)
        for dialog, row, said in zip(made, tokens, mask):
            mine = [turn.text for turn in dialog if turn.role == "assistant"]
            others = [turn.text for turn in dialog if turn.role != "assistant"]
            wanted = {2: "{}<END>", 4: "{}<CALL>{}<END>"}[len(dialog)].format(*mine)
            assert vocabulary.decode(row[said]) == wanted
            wanted = {2: "{}", 4: "{}{}<ANSWER>"}[len(dialog)].format(*others)
            assert vocabulary.decode(row[~said & (row != vocabulary.specials["PAD"])]) == wanted


# --- Accounting ---

def test_bits_of_a_uniform_and_of_a_perfect_predictor():
    for kind, per_person in (("notes", 31.25), ("bios", 47.59)):
        made = people(100, 0, kind)
        uniform = [sum(math.log(SIZES[attribute]) for attribute in tables(kind))] * 100
        assert bits_stored(uniform, made.bits) == pytest.approx(0, abs=1e-9)
        assert bits_stored([0] * 100, made.bits) == pytest.approx(100 * per_person, abs=1)
        assert bits_stored(torch.zeros(100), made.bits) == pytest.approx(100 * made.bits)
        half = np.array(uniform) * ([1, 0] * 50)
        assert bits_stored(half, made.bits) == pytest.approx(50 * made.bits)
        assert bits_stored(np.array(uniform) + math.log(2), made.bits) == pytest.approx(-100)
        # N lg(S0 / e^p2), as the paper writes it
        losses = np.linspace(0, 20, 100)
        wanted = 100 * math.log2(2 ** made.bits / math.exp(losses.mean()))
        assert bits_stored(losses, made.bits) == pytest.approx(wanted)
    assert type(bits_stored([1.0], 31.25)) is float
    with pytest.raises(ValueError):
        bits_stored(torch.zeros(2, 4), 31.25)


def test_floors(many):
    guess, constant = floor(people(512, 0))
    assert guess == pytest.approx((1 / 7 + 1 / 213 + 1 / 100 + 1 / 17136) / 4) == pytest.approx(0.0394, abs=5e-5)
    made = people(64, 3, unseen=3000)  # those held out do not count
    best = [max(values[:64].count(value) for value in values[:64]) / 64 for values in made.values.values()]
    assert floor(made)[1] == pytest.approx(sum(best) / 4) and floor(made)[1] > floor(people(2048, 3))[1] > 0.0394
    guess, _ = floor(people(10, 0, "bios"))
    assert guess == pytest.approx((1 / 67200 + 1 / 200 + 1 / 300 + 1 / 100 + 1 / 263 + 1 / 2 + 2 / 263) / 7)
    assert floor(people(10, 0, alpha=0))[0] == pytest.approx((3 / 16 + 3 * 1 / 16) / 4)
    half = [0.5 / 17136 + 0.5 / 16, 0.5 / 7 + 0.5 * 3 / 16, 0.5 / 213 + 0.5 / 16, 0.5 / 100 + 0.5 / 16]
    assert floor(people(10, 0, alpha=0.5))[0] == pytest.approx(sum(half) / 4)
    for alpha in (0, 0.5, 1):  # of many people, the best constant guess is what the law says
        expected, found = floor(people(20_000, 0, alpha=alpha))
        assert found == pytest.approx(expected, abs=0.01)


# --- Mistakes and the command line ---

@pytest.mark.parametrize("settings, words", [
    ({"kind": "note"}, ("kind 'note'", "did you mean notes?", "bios")), ({"kind": "xyz"}, ("choose notes, bios",)),
    ({"names": "plane"}, ("names 'plane'", "did you mean plain?")), ({"n": 0}, ("n is 0", "at least 1")),
    ({"n": 399_999, "unseen": 2, "names": "plain"}, ("at most 400,000",))], ids=str)
def test_people_that_cannot_be(settings, words):
    with raises_one_line(*words):
        people(**{"n": 5, "seed": 0, **settings})


def test_dialogs_that_cannot_be(few):
    for settings, words in (({"mode": "tool"}, ("mode 'tool'", "did you mean in_tool?")),
                            ({"form": "shrt"}, ("form 'shrt'", "did you mean short?")),
                            ({"mode": "both", "share": 1.5}, ("share is 1.5", "from 0 to 1"))):
        with raises_one_line(*words):
            dialogs(few, **settings)
