"""nanolab/tasks.py: rows once a pass, every way to answer is counted, attacks on the tool, bits by heart and uniform; a
rule learned for real."""
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import choices
from data import facts, mqar
from data.facts import NO_ATTRIBUTE, NO_CALL, NO_RESULT, Database, Vocabulary, people
from model import TransformerConfig, build_model, fused_rows, parameter_roles
from nanolab import optim, tasks
from nanolab.dialogs import Reply
from nanolab.run import UserError, override
from nanolab.score import score
from nanolab.tasks import Rows, answered, bits_of, recall
from test_scripts import fresh

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSED = Vocabulary("closed")
PAD, END, CALL, ANSWER = (CLOSED.specials[name] for name in ("PAD", "END", "CALL", "ANSWER"))


def build(seed=0, **settings):
    """A small model of the closed vocabulary."""
    torch.manual_seed(seed)
    return build_model(TransformerConfig(**{**dict(
        vocab_size=CLOSED.size, n_layer=2, n_head=2, n_embd=32, block_size=32, norm="rms", bias=False, positions="rope",
        activation="swiglu", ff_mult=6.0, init="zero"), **settings}))


# ------------------------------------------------------------------------------------------------- what is counted

@pytest.mark.parametrize("words", ["--task in_weight", "--task both --tokenizer bytes --kind bios --form natural"])
def test_room_for_more_than_the_longest_dialog(words):
    """Which tokens are learned: test_facts_data.py, by a step of training test_facts_resume.py, where less is refused.
    """
    def opened(*more):
        settings = override(fresh("train_facts.py"), ["--n_people", "6", "--n_unseen", "3", *words.split(), *more])
        task = tasks.kind_of(settings)(settings, torch.device("cpu"))
        task.prepare()
        return task
    longest = opened().batches.x.size(1) + 1
    assert opened().block_size == 16 * math.ceil(2 * longest / 16) > longest
    assert opened("--block_size", str(longest)).block_size == longest


@pytest.mark.parametrize("settings", [
    {}, dict(tie_weights=True, n_layer=4), dict(output="stablemax", ff="moe", intermediate_losses=True),
    dict(head_bias=True, intermediate_losses=True, layer_heads="own", n_targets=2),
    dict(short_conv=2, qk_norm=True, qk_scale=True, ff="none")], ids=" ".join)
def test_counted_is_the_whole_computation(settings):
    """Logits only where a target is: the same objective, nats and gradients."""
    model = build(**{"init": "gpt2", **settings})
    K = model.config.n_labels
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(CLOSED.size, (2, 5, 12), generator=generator)
    y = y[..., None].repeat(1, 1, K)
    y[torch.rand(5, 12, generator=generator) < 0.7] = -1
    found = []
    for counted in (None, (y[..., 0].flatten() >= 0).nonzero()[:, 0]):
        model.zero_grad()
        objective, nats = model(x, targets=y, counted=counted)
        objective.backward()
        found.append((objective.detach(), nats, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert found[0][0] > 1 and max(g.abs().max() for g in found[0][2].values() if g is not None) > 1e-3


# --------------------------------------------------------------------------------------------------------------- rows

def rows_of(n, batch_size, seed=1):
    x = torch.arange(n * 3).view(n, 3)
    return Rows(x, x + 1000, batch_size, seed, "cpu")


def test_rows_come_once_a_pass():
    """In the order of the seed, whatever the batches."""
    batches = rows_of(10, 4)
    x, y = map(torch.cat, zip(*(batches.next() for _ in range(10))))                 # four passes of ten, in fours
    assert torch.equal(y, x + 1000) and x.dtype == torch.int64
    passes = (x[:, 0] // 3).view(4, 10)
    assert torch.equal(passes.sort(1).values, torch.arange(10).expand(4, 10))
    assert len({tuple(order) for order in passes.tolist()}) == 4                     # shuffled anew
    assert batches.epoch == 4.0 and batches.next()[0].shape == (4, 3) and batches.epoch == pytest.approx(4.4)
    assert torch.equal(rows_of(10, 25).next()[0], x[:25])                            # of more than two passes


def test_other_rows_are_refused():                                                   # going on: test_data.py
    with pytest.raises(UserError, match="trained on 10 rows, here are 11"):
        rows_of(11, 4).load_state_dict(rows_of(10, 4).state_dict())


# ----------------------------------------------------------------------------------- a model that says what is scripted


@pytest.fixture(scope="module")
def few():
    return people(10, 3, unseen=4)


@pytest.fixture
def model():
    model = torch.nn.Linear(1, 1)
    model.config = TransformerConfig(positions="rope")
    return model


@pytest.fixture
def replies(monkeypatch):
    """replies(turn, ...): stands in for `converse` (test_converse.py), which says the first turn(attribute, name,
    None) to each question, and after an answer of the tool the next one of (..., answer). Returns what it is given."""
    def replies(*turns, vocabulary=CLOSED):
        given, ends = [], {vocabulary.specials["END"]: "end", vocabulary.specials["CALL"]: "call"}

        def converse(model, prompts, n, end, tool=None, **more):
            assert not model.training
            given.append(dict(n=n, tool=tool, asked=[*map(vocabulary.decode, prompts)], **more))
            return [reply(*asked.split()[:2], tool) for asked in given[-1]["asked"]]

        def reply(attribute, name, tool):
            tokens, injected, calls, told = [], [], [], None
            for turn in turns:
                ids = turn(attribute, name, told)
                tokens, injected = tokens + ids, injected + [False] * len(ids)
                if calls or tool is None or ids[-1] != vocabulary.specials["CALL"]:
                    break
                calls.append((ids[:-1], tool(ids[:-1])))
                tokens, injected = tokens + calls[0][1], injected + [True] * len(calls[0][1])
                told = vocabulary.decode(calls[0][1][:-1])
            return Reply(tokens, injected, ends.get(tokens[-1], "length"), calls, [0.0] * len(tokens), None)
        monkeypatch.setattr(tasks, "converse", converse)
        return given
    return replies


def counted(line):
    """(right, called, right calls, endless) of what recall found: how many."""
    return tuple(round(line.get(key, 0) * line["prompts"]) for key in ("accuracy", "calls", "right_calls", "endless"))


def test_every_way_to_answer_is_counted(few, model, replies):
    """Each question is answered in one of eleven ways; what is found is what these ways are, for any batch size."""
    truth = {(name, attribute): few.values[attribute][i] for i, name in enumerate(few.names) for attribute in
             few.attributes}
    number = {pair: i for i, pair in enumerate(truth)}

    def wrong(attribute, name):
        return next(value for value in facts.tables("notes")[attribute] if value != truth[name, attribute])

    def ask(attribute, name, told=None):
        return CLOSED.encode(facts.call(attribute, name)) + [CALL]

    def say(text):
        return CLOSED.encode(text) + [END]

    ways = [   # (the first turn, the turn after the answer), then right, called, right_calls, endless
        (ask, lambda a, n, told: say(told), 1, 1, 1, 0),
        (ask, lambda a, n, told: say(wrong(a, n)), 0, 1, 1, 0),
        (lambda a, n, _: ask(a, few.names[0] if n != few.names[0] else few.names[1]),
         lambda a, n, told: say(truth[n, a]), 1, 1, 0, 0),                           # the wrong call, the right answer
        (lambda a, n, _: say(truth[n, a]), None, 1, 0, 0, 0),
        (lambda a, n, _: say(wrong(a, n)), None, 0, 0, 0, 0),
        (lambda a, n, _: CLOSED.encode(truth[n, a]), None, 0, 0, 0, 1),              # never ends
        (lambda a, n, _: CLOSED.encode("FIND "), None, 0, 0, 0, 1),                  # a call that never ends
        (ask, ask, 0, 1, 1, 1),                                                      # a second call
        (lambda a, n, _: CLOSED.encode("FOR FIND ") + [CALL], lambda a, n, told: say(told), 0, 1, 0, 0),     # malformed
        (ask, lambda a, n, told: CLOSED.encode(told) + say("Asia"), 0, 1, 1, 0),     # and something more
        (lambda a, n, _: [END], None, 0, 0, 0, 0)]
    given = replies(*(lambda a, n, told, turn=turn: ways[number[n, a] % len(ways)][turn](a, n, told)
                      for turn in range(2)))
    for unseen, start, size in ((False, 0, 40), (True, 40, 16)):
        used = [ways[i % len(ways)] for i in range(start, start + size)]
        for batch_size in (1, 7, 512):
            given.clear()
            found = recall(model.train(batch_size == 7), few, CLOSED, Database(few), unseen, batch_size=batch_size)
            assert counted(found) == tuple(sum(way[2 + k] for way in used) for k in range(4))
            assert (found["protocol"], found["people"], found["prompts"]) == (
                "tool", "unseen" if unseen else "trained", size)
            assert model.training is (batch_size == 7) and len(given) == math.ceil(size / batch_size)
            for k, attribute in enumerate(few.attributes):
                mine = [way[2] for way in used[k::4]]
                assert found[f"accuracy_{attribute}"] == pytest.approx(sum(mine) / len(mine))
    replies(lambda *_: 1 / 0)
    for training in (True, False):
        with pytest.raises(ZeroDivisionError):
            recall(model.train(training), few, CLOSED)
        assert model.training is training


@pytest.mark.parametrize("text, told", [  # what the parser and the table make of more: test_facts_data.py
    (b"FIND address FOR \xff\xc3", NO_RESULT), (b"", NO_CALL), (b"FIND x FOR x'; DROP TABLE people; --", NO_ATTRIBUTE)],
    ids=["bytes", "nothing", "sql"])
def test_calls_that_attack(text, told, few, model, replies):
    """What a model may write between the user's turn and CALL, bytes that are no text too: the tool answers, the table
    stays, nothing raises."""
    bytes_, said = Vocabulary("bytes"), []
    replies(lambda *_: [*text, bytes_.specials["CALL"]],
            lambda a, n, answer: said.append(answer) or [bytes_.specials["END"]], vocabulary=bytes_)
    named = replace(few, names=["n" * 80 + str(i) for i in range(14)])               # so long may a call be
    database = Database(named)
    assert counted(recall(model, named, bytes_, database, prompts=2)) == (0, 2, 0, 0) and said == [told] * 2
    assert database.connection.execute("SELECT count(*) FROM people").fetchone() == (14,)


def test_what_is_banned(few, model, replies):
    """The token that opens a call is one that a value may need: with bytes an F, where somebody lives in a Fort."""
    bytes_, opens = Vocabulary("bytes"), CLOSED.tokenizer.ids["FIND "]
    specials = {bytes_.specials[name] for name in ("PAD", "ANSWER")}
    forts, ports = (replace(few, values={**few.values, "address": [f"{word} Amber"] * 14}) for word in ("Fort", "Port"))
    for made, vocabulary, database, ban in (
            (forts, bytes_, None, specials | {bytes_.specials["CALL"]}),
            (ports, bytes_, None, specials | {bytes_.specials["CALL"], ord("F")}),
            (ports, bytes_, Database(ports), specials),
            (few, CLOSED, None, {PAD, ANSWER, CALL, opens}),
            (few, CLOSED, Database(few), {PAD, ANSWER})):
        given = replies(lambda *_: [vocabulary.specials["END"]], vocabulary=vocabulary)
        found = recall(model, made, vocabulary, database, prefix=True)
        assert {*given[-1]["ban"]} == ban and given[-1]["prefix"] is True
        call = vocabulary.specials["CALL"] if database else None
        assert (given[-1]["tool"] is None, given[-1]["call"]) == (database is None, call)
        assert found["protocol"] == ("tool" if database else "no_tool") and ("calls" in found) == bool(database)
    longest = max(len(CLOSED.encode(value)) for values in few.values.values() for value in values)
    assert given[-1]["n"] >= longest + len(CLOSED.encode(facts.call("address", few.names[0]))) + 2 + 8
    recall(model, few, CLOSED)
    assert given[-1]["n"] == longest + 2 + 8                      # a value of `longest`, END, and 8 to spare at least
    asked, told = 6, max(longest, 1)                              # tokens of a question, of the longest thing told
    for database, rest in ((None, 0), (Database(few), told + 1)):  # no row passes the table of learned positions
        for block_size in (asked + rest + 1, asked + rest + 4):
            model.config = TransformerConfig(positions="learned", block_size=block_size)
            recall(model, few, CLOSED, database)
            assert given[-1]["n"] + asked + rest == block_size
        model.config = TransformerConfig(positions="learned", block_size=asked + rest)
        with pytest.raises(UserError, match="leaves no room for an answer"):
            recall(model, few, CLOSED, database)


def test_which_prompts(few, model, replies):
    """So many, evenly over people and attributes, each once; unseen ones are the held-out people."""
    given = replies(lambda *_: [END])
    for unseen, mine in ((False, few.names[:10]), (True, few.names[10:])):
        every = {f"{attribute} {name} ?" for name in mine for attribute in few.attributes}
        for prompts, number in ((None, len(every)), (99, len(every)), (1, 1), (5, 5), (8, 8)):
            given.clear()
            found = recall(model, few, CLOSED, None, unseen, prompts=prompts, batch_size=3)
            asked = [question for batch in given for question in batch["asked"]]
            assert len(asked) == len({*asked}) == found["prompts"] == number and {*asked} <= every
            attributes, names, _ = zip(*map(str.split, asked))
            assert sorted(map(mine.index, names)) == [i * len(mine) // number for i in range(number)]
            counts = Counter(attributes)
            assert number < 4 or len(counts) == 4 and max(counts.values()) - min(counts.values()) <= 1
            assert {key: found[key] for key in found if key.startswith("accuracy_")} == {
                f"accuracy_{attribute}": 0.0 for attribute in counts}


# --------------------------------------------------------------------------------------------------------------- bits

class Table(torch.nn.Module):
    """Sure of every token of the right dialogs, but for what doubt(attribute, ids of the dialog, place) divides."""

    def __init__(self, made, vocabulary, doubt):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.V, self.known = vocabulary.size, {}
        for i in range(made.n):
            for attribute in made.attributes:
                question, value = (vocabulary.encode(turn.text) for turn in facts.in_weight(made[i], attribute))
                ids = question + value + [vocabulary.specials["END"]]
                self.known[tuple(question)] = ids, [doubt(attribute, ids, at) for at in range(len(ids))]

    def forward(self, x, prefix=None):
        assert not self.training
        logits = torch.zeros(*x.shape, self.V)
        for b, row in enumerate(x.tolist()):
            question = next(key for key in (tuple(row[:n]) for n in range(len(row), 0, -1)) if key in self.known)
            for at, (token, n) in enumerate(zip(*self.known[question])):
                if at and at <= x.size(1):
                    logits[b, at - 1] = -1e4                      # evenly among this one and n - 1 others
                    logits[b, at - 1, [(token + k) % self.V for k in range(n)]] = 0.0
        return logits


@pytest.mark.parametrize("kind, tokenizer, bits", [("notes", "closed", 31.25), ("bios", "bytes", 47.59)])
def test_bits_of_what_is_known_by_heart(kind, tokenizer, bits):
    made, vocabulary = people(12, 1, kind), Vocabulary(tokenizer)
    assert 12 * made.bits == pytest.approx(12 * bits, abs=0.06)
    for doubt, lost in (
            (lambda attribute, ids, at: 1, 0),
            (lambda attribute, ids, at: 4 if at == len(ids) - 1 else 1, 0),          # END is no part of a value
            (lambda attribute, ids, at: 4 if attribute == "work_city" else 1, 0),    # follows from the employer
            (lambda attribute, ids, at: 4 if at == len(ids) - 2 and attribute == made.attributes[1] else 1, 12 * 2),
            (lambda attribute, ids, at: 8 if at == len(ids) - 2 and attribute != "work_city" else 1,
             12 * 3 * (4 if kind == "notes" else 6))):
        for batch_size in (5, 512):
            model = Table(made, vocabulary, doubt).train(batch_size == 5)
            found = bits_of(model, made, vocabulary, batch_size=batch_size)
            assert found == pytest.approx(12 * made.bits - lost, abs=1e-5) and model.training is (batch_size == 5)


def test_bits_of_a_uniform_model():
    made = people(9, 2)
    model = build()
    with torch.no_grad():
        model.heads[0].zero_()
    tokens = sum(len(CLOSED.encode(value)) for values in made.values.values() for value in values)
    assert bits_of(model, made, CLOSED) == pytest.approx(9 * made.bits - tokens * math.log2(CLOSED.size), rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- mqar

def test_answers_at_the_queries():
    _, (x, y) = mqar.split(10, 60, 32, 4, 64, 0, True, 0.5)
    model = build(vocab_size=64, init="gpt2").eval()
    with torch.no_grad():
        model.heads[0].mul_(20)
        logits = model(x)
    y[choices.margin(logits) < 1e-4] = -1  # where batches of another size may choose another
    found = answered(model.train(), x, y, 7)
    assert model.training and found == pytest.approx(answered(model.eval(), x, y, 512)) and not model.training
    wanted, best = y[y >= 0], logits.argmax(-1)
    assert found["prompts"] == len(wanted) > 230 and found["protocol"] == "mqar"
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[y >= 0], wanted).item(), rel=1e-5)
    assert found["accuracy"] == int((best[y >= 0] == wanted).sum()) / len(wanted)
    assert answered(model, x, best.masked_fill(choices.margin(logits) < 1e-4, -1), 13)["accuracy"] == 1


# --------------------------------------------------------------------------------------------------------------- text

@pytest.mark.parametrize("protocol", ["block", "stride:3", "cache"])
def test_a_uniform_model_costs_lg_v_a_token(protocol):
    """Whatever the tokens: bits per byte are bits per token, times tokens over bytes."""
    model = build(vocab_size=300, block_size=8)
    with torch.no_grad():
        model.heads[0].zero_()
    data = torch.randint(300, (203,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    sizes = torch.randint(1, 7, (300,), generator=torch.Generator().manual_seed(1))
    found, n_bytes = score(model, data, protocol, sizes=sizes), int(sizes[data.long()].sum())
    assert found.bytes == n_bytes and found.loss == pytest.approx(math.log(300))
    assert found.bpb == pytest.approx(203 * math.log2(300) / n_bytes)
    assert found.interval(50, 20) == pytest.approx((found.bpb, found.bpb)) and score(model, data, protocol).bytes == 203
    some = score(model, data, "block", windows=5, sizes=torch.full((300,), 3))
    assert torch.equal(some.bits, torch.full((40,), math.log2(300), dtype=torch.float64)) and some.bytes == 120
    assert some.bpb == pytest.approx(math.log2(300) / 3)


# ------------------------------------------------------------------------------------------- eight people, for real

def test_it_says_what_the_tool_says(tmp_path):
    """Trained with sixteen sets of values for the same names, it can only read them: it says those of a file that it
    was never trained with, most of the time, and another file's when it is given that. By heart: test_facts_resume.py.
    """
    eight, steps = people(8, 1, unseen=40), 100
    sets = [replace(eight, values={name: values[:48] for name, values in people(48, seed).values.items()})
            for seed in range(100, 118)]
    ids, mask = facts.rows([dialog for made in sets[:16] for dialog in facts.dialogs(made, "in_tool")], CLOSED)
    batches, model = Rows(ids[:, :-1], ids.masked_fill(~mask, -1)[:, 1:], 64, 1, "cpu"), build()
    how = dict(optimizer="muon", lr=2e-2, weight_decay=0.1, betas=(0.9, 0.98), muon_lr=0.02, muon_momentum=0.95)
    opt = optim.build(how, model.named_parameters(), parameter_roles(model), fused_rows(model))
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * optim.schedule("wsd", step, 10, steps, 0.02, 0.5)
        x, y = batches.next()
        objective, _ = model(x, targets=y[..., None], counted=(y.flatten() >= 0).nonzero()[:, 0])
        objective.backward()
        opt.step()
        opt.zero_grad()
    model.eval()
    found = [recall(model, sets[16], CLOSED, Database(sets[16]), batch_size=size) for size in (16, 512)]
    assert found[0] == found[1] | {"evaluation_seconds": found[0]["evaluation_seconds"]}
    assert recall(model, sets[16], CLOSED)["accuracy"] < 0.3                          # forbidden to call
    for number, made in enumerate(sets[16:]):
        path = tmp_path / f"{number}.db"
        Database(made).save(path)
        found = recall(model, made, CLOSED, Database(path))
        assert found["right_calls"] == 1 and found["accuracy"] > 0.3
        assert found["accuracy_birth_place"] > 0.7                                    # 1 in 7 by chance
        assert recall(model, sets[17 - number], CLOSED, Database(path))["accuracy"] < 0.2
