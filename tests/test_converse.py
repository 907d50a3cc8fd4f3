"""Dialogs with a tool in mid-sequence: each row equals one that reads its whole text again for every token, for every
mixer, with a tree and without; how a row ends, what is drawn, in which passes it is computed, what is refused."""
import random
from contextlib import contextmanager

import pytest
import torch

from model import MIXERS, Transformer, TransformerConfig, build_model
from nanolab import dialogs
from nanolab.dialog_tree import DialogTree
from nanolab.dialogs import Reply, converse
from nanolab.generate import draw

V, END, CALL = 8, 3, 6
SMALL = dict(vocab_size=V, n_layer=2, n_head=2, n_embd=16, block_size=8, init="xavier", positions="rope", window=5,
             sparse_stride=4, sparse_summary=1, memory_length=8, compressed_length=4, compression_rate=2)
CASES = [*(dict(mixer=mixer) for mixer in (*MIXERS, "window,full", "compressive,window")),
         dict(positions="none"), dict(positions="alibi"), dict(n_kv_head=1, qk_norm=True), dict(output="stablemax"),
         dict(ff="moe"), dict(positions="learned", block_size=96), dict(mixer="xl", positions="relative"),
         dict(mixer="window", positions="learned_per_layer", block_size=96),
         *(dict(mixer=mixer, short_conv=3) for mixer in ("mamba,full", "window"))]

pytestmark = pytest.mark.usefixtures("one_thread")


def build(mixer="full", seed=0, **settings):
    """A small model whose next token depends strongly on all that it sees, and which falls into no loop: in float64,
    as it magnifies the rounding by which paths and batches differ."""
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(**{**SMALL, "mixer": mixer, **settings})).eval()
    with torch.no_grad():
        model.heads[0].mul_(60)
        for block in model.blocks:
            for name, p in block.mixer.named_parameters():
                if p.dim() == 2 and name.endswith("weight"):
                    p.mul_(2)
    predict = model.predict
    model.predict = lambda h: 4 * torch.sin(8 * predict(h))
    return model.double()


def texts(n, longest=14, seed=1):
    """n prompts of many lengths, from 1 on."""
    draws = random.Random(seed)
    return [[draws.randrange(V) for _ in range(length)] for length in
            [1, longest, *(draws.randint(1, longest) for _ in range(n - 2))]]


def tool(ids):
    """A scripted answer, of no to four ids."""
    return [(sum(ids) + i) % V for i in range(len(ids) % 3)] + [5, 4][:1 + sum(ids) % 2] if sum(ids) % 5 else []


def decode(ids):
    return "".join("abcdefgh"[i] for i in ids)


@torch.no_grad()
def naive(model, prompt, n, end, tool=None, call=None, stop=(), decode=None, max_calls=1, prefix=False, ban=(),
          generator=None, temperature=0.0, **how):
    """`converse` of one row, without a cache: the whole text is read again for each token."""
    tokens, injected, calls, nats, turn, reason = [], [], [], [], [], None
    for left in range(n, 0, -1):
        x = torch.tensor([list(prompt) + tokens])
        logits = model(x, prefix=len(prompt) if prefix else None)[0, -1]
        allowed = logits.clone()
        for token in ban:
            allowed[token] = -torch.inf
        token = draw(allowed[None], generator, temperature, **how).item()
        tokens.append(token), injected.append(False), nats.append(-logits.log_softmax(-1)[token].item())
        if token == end:
            reason = "end"
        elif token == call and (tool is None or len(calls) == max_calls):
            reason = "call"
        elif token != call:
            turn.append(token)
            if any(s in decode(turn) for s in stop):
                reason = "stop"
        if reason is None and left == 1:
            reason = "length"
        if reason:
            break
        if token == call:
            answer = tool(turn)
            calls.append((turn, answer))
            tokens, injected, turn = tokens + answer, injected + [True] * len(answer), []
            nats = nats + [0.0] * len(answer)
    text = None if decode is None else decode(turn)
    if reason == "stop":
        text = text[:min(text.index(s) for s in stop if s in text)]
    return Reply(tokens, injected, reason, calls, nats, text)


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert a._replace(nats=None) == b._replace(nats=None)
        assert a.nats == pytest.approx(b.nats, abs=2e-3)


def assert_naive(model, prompts, n=14, tree=None, **how):
    """converse of all prompts at once equals each one by itself, read naively. Returns the replies."""
    found = converse(model, prompts, n, END, tree=tree, **how)
    assert_same(found, [naive(model, prompt, n, END, **how) for prompt in prompts])
    return found


@contextmanager
def passes(monkeypatch):
    """The passes of the model: [(columns, cells of padding, rows)]."""
    seen, read = [], dialogs._read

    def watched(model, cache, chunks, *rest):
        T = max(map(len, chunks))
        seen.append((T, sum(T - len(chunk) for chunk in chunks), len(chunks)))
        return read(model, cache, chunks, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(dialogs, "_read", watched)
        yield seen


USE = dict(tool=tool, call=CALL, max_calls=3)
LONG = dict(tool=lambda ids: [(sum(ids) + i) % V for i in range(9 + len(ids))], call=CALL, max_calls=9)


# ---- Against the naive one ----

@pytest.mark.parametrize("settings", CASES, ids=str)
def test_every_row_equals_the_naive_one(settings):
    model, prompts = build(**settings), texts(20)
    replies = assert_naive(model, prompts, **USE)
    assert_same(converse(model, prompts, 14, END, tree=DialogTree(model, None), **USE), replies)
    assert max(len(reply.calls) for reply in replies) > 1 and not all(reply.calls for reply in replies)
    at = {reply.injected.index(True) for reply in replies if any(reply.injected)}
    assert len(at) > 2 or len(settings) > 1                      # answers come at different steps
    if settings.get("mixer") in ("full", "strided", "fixed", "diff", "mla", "window,full"):  # a prompt that sees itself
        assert assert_naive(model, prompts[:4], prefix=True, **USE) != replies[:4]
        assert_naive(model, [prompts[1], prompts[1][::-1]], prefix=True, **USE)              # of one length


# ---- How a row ends ----

def scripted(model, script):
    """The model writes the id that script has for the number of ids read so far, {number: id}; else 0."""
    stream = model.stream

    def reading(x, places, cache=None, active=()):
        h, states = stream(x, places, cache, active)
        where = places.index if places.index is not None else (places.start + torch.arange(places.T)).expand(x.shape)
        h = h * 0 + (where + 1).unsqueeze(2)
        return h, states
    model.stream = reading
    model.predict = lambda h: torch.stack([torch.eye(V)[script.get(int(n), 0)] for n in h[..., 0].flatten()]).view(
        *h.shape[:2], V) * 9
    return model


def test_reasons():
    model = scripted(build(), {4: 1, 5: CALL, 6: 2, 7: 2, 8: 5, 9: CALL, 10: END})

    def says(n, max_new_tokens=9, **how):
        return converse(model, [[0] * n], max_new_tokens, END, decode=decode, **how)[0]
    answer, none = dict(call=CALL, tool=lambda ids: [4]), dict(call=CALL, tool=lambda ids: [])
    for n, how, tokens, reason, calls, told in (
            (10, {}, [END], "end", [], ""),
            (10, dict(max_new_tokens=1), [END], "end", [], ""),
            (6, {}, [2, 2, 5, CALL, END], "end", [], "ccfg"),    # with no call id, it is an id as others
            (4, answer, [1, CALL, 4, 2, 5, CALL], "call", [([1], [4])], "cf"),
            (4, answer | dict(max_calls=2), [1, CALL, 4, 2, 5, CALL, 4, *[0] * 4], "length",
             [([1], [4]), ([2, 5], [4])], "aaaa"),
            (4, dict(call=CALL), [1, CALL], "call", [], "b"),    # the tool is off
            (4, answer | dict(max_calls=0), [1, CALL], "call", [], "b"),
            (4, answer | dict(max_new_tokens=1), [1], "length", [], "b"),
            (4, answer | dict(max_new_tokens=2), [1, CALL], "length", [], "b"),              # no answer
            (9, answer | dict(max_new_tokens=1), [CALL], "length", [], ""),
            (9, dict(call=CALL, max_new_tokens=1), [CALL], "call", [], ""),
            (4, none, [1, CALL, 2, 2, 5, CALL], "call", [([1], [])], "ccf"),
            (4, answer | dict(stop=["f"]), [1, CALL, 4, 2, 5], "stop", [([1], [4])], "c"),
            (4, answer | dict(stop=["ec", "be"]), [1, CALL, 4, 2, 5, CALL], "call", [([1], [4])], "cf"),
            (6, dict(stop=["cf", "ccf"]), [2, 2, 5], "stop", [], "")):                       # the earliest one cuts
        found = says(n, **how)
        assert found[:2] == (tokens, [at == 2 and bool(calls and calls[0][1]) or at == 6 and len(calls) > 1
                                      for at in range(len(tokens))])
        assert (found.reason, found.calls, found.text) == (reason, calls, told), (n, how)


def test_stop_strings_and_banned_ids():
    model, prompts = build("window,full"), texts(12)
    plain = converse(model, prompts, 14, END, decode=decode, **USE)
    said = [reply.text for reply in plain if len(reply.text) > 3]
    stop = [said[0][1:4], said[1][-2:], "never"]                 # over several tokens
    replies = assert_naive(model, prompts, stop=stop, decode=decode, **USE)
    stopped = [reply for reply in replies if reply.reason == "stop"]
    assert 1 < len(stopped) < len(replies) and not any(s in reply.text for reply in stopped for s in stop)
    assert any(CALL in reply.tokens for reply in plain)
    replies = assert_naive(build(), prompts, ban=[CALL, 0], call=CALL)
    assert not any({CALL, 0} & set(reply.tokens) for reply in replies)
    assert {reply.reason for reply in replies} == {"end", "length"}


# ---- Drawing ----

def test_a_seed_draws_what_the_naive_one_draws():
    model, replies, world = build(), [], torch.get_rng_state()
    for seed, prompt in enumerate(texts(8)):
        how = dict(temperature=2.0, typical_p=0.6) if seed % 2 else dict(temperature=1.0, top_k=4)
        found, wanted, other = (talk(generator=torch.Generator().manual_seed(seed + more), **USE, **how)
                                for talk, more in ((lambda **how: converse(model, [prompt], 14, END, **how)[0], 0),
                                                   (lambda **how: naive(model, prompt, 14, END, **how), 0),
                                                   (lambda **how: converse(model, [prompt], 14, END, **how)[0], 99)))
        assert_same([found], [wanted])
        replies.append((found, other))
    assert any(found.calls for found, _ in replies) and any(found != other for found, other in replies)
    assert torch.equal(world, torch.get_rng_state())


# ---- How it is computed ----

def test_answers_go_in_one_pass_where_most_rows_call(monkeypatch):
    model = scripted(build(), {5: CALL})
    for prompts, first in (
            ([[0] * 5] * 4, [(5, 0, 4), (8, 0, 4), *[(1, 0, 4)] * 4]),                       # the last id is not read
            ([[0] * 5] * 3 + [[0] * 3], [(5, 2, 4), (8, 7, 4), (1, 0, 4), (3, 6, 4)]),
            ([[0] * 5] + [[0] * 9] * 3, [(9, 4, 4), (3, 6, 4), (3, 6, 4), (2, 3, 4)])):      # one: the others go on
        with passes(monkeypatch) as seen:
            converse(model, prompts, 6, END, tool=lambda ids: [1] * 7, call=CALL)
        assert seen[:len(first)] == first and (first[0][1] or len(seen) == len(first))


@pytest.mark.parametrize("mixer", ["window", "mamba"])
def test_layers_that_forget_by_age_get_no_padding(mixer, monkeypatch):
    model = build(mixer)
    for tree in (None, DialogTree(model, None)):
        with passes(monkeypatch) as seen:
            assert_naive(model, texts(6), tree=tree, **USE)
        assert (seen[0][1] > 0) == (tree is None) and not any(padding for _, padding, _ in seen[1:])


def test_finished_rows_leave_and_the_columns_never_run_out():
    """Rows that end at 1, 2, ... 16: the batch halves each time that half of it has ended. Long answers at different
    steps need far more columns than were planned."""
    model = scripted(build(), {32: END})
    sizes, new_cache = [], model.new_cache
    model.new_cache = lambda n, room, **how: sizes.append(n) or new_cache(n, room, **how)
    replies = converse(model, [[0] * n for n in range(16, 32)], 40, END)
    assert [len(reply.tokens) for reply in replies] == list(range(17, 1, -1)) and sizes == [16, 8, 4, 2, 1]
    model = build("window,full")
    for tree in (None, DialogTree(model, None)):
        assert max(len(reply.calls) for reply in assert_naive(model, texts(10), tree=tree, **LONG)) > 2


def test_learned_positions_end():
    model = build(positions="learned", block_size=12)
    how = dict(ban=[END])
    assert [len(reply.tokens) for reply in assert_naive(model, [[1] * 8, [2] * 3], 5, **how)] == [5, 5]  # 12 are read
    with pytest.raises(ValueError, match="past block_size 12"):
        converse(model, [[1] * 8], 6, END, **how)
    model = scripted(build(positions="learned", block_size=12), {10: END})
    replies = converse(model, [[0] * 9, [0] * 10, [0] * 4, [0] * 4, [0] * 3], 9, END)  # finished rows meet the end
    assert [len(reply.tokens) for reply in replies] == [2, 1, 7, 7, 8]


# ---- The tree ----

def read_in(monkeypatch, model, prompts, n, tree, **how):
    """(replies, which are the naive one's, and how many ids were read for them)."""
    with passes(monkeypatch) as seen:
        found = assert_naive(model, prompts, n, tree=tree, **how)
    return found, sum(columns * rows - padding for columns, padding, rows in seen)


def test_what_prompts_have_in_common_is_read_once(monkeypatch):
    """By a tree given, whose next turn reads what is new; without one a call makes its own where that pays: a long
    beginning of many prompts is read once; with tree=False by each; a short one, or of few, or a chain by each."""
    model = build()
    prompts = [[1] * 20 + branch + [leaf] * 3 + [0] for branch in ([2] * 5, [4] * 5, [5] * 6) for leaf in (1, 2, 4)]
    tree = DialogTree(model, None)
    found, read = read_in(monkeypatch, model, prompts, 4, tree, ban=[END])
    assert read == 20 + 5 + 5 + 6 + 9 * 3 + 9 * 4
    again = [prompt + reply.tokens + [1, 2] for prompt, reply in zip(prompts, found)]
    assert all(tree.match(text) == len(text) - 3 for text in again)
    assert read_in(monkeypatch, model, again, 1, tree)[1] == 9 * 3
    long, short = ([[1] * n + [leaf, 5, leaf] for leaf in range(V)] for n in (40, 4))
    chain = [[1] * n for n in range(40, 48)]
    for prompts, tree, read in ((long, None, 40 + V * 2 + V * 4), (long, False, V * 43 + V * 3),
                                (short, None, V * 7 + V * 3), (long[:2], None, 2 * 43 + 2 * 3),
                                (chain, None, sum(map(len, chain)) + 8 * 3)):
        assert read_in(monkeypatch, model, prompts, 4, tree, ban=[END])[1] == read


@pytest.mark.parametrize("mixer, budget", [("window,full", None), ("compressive", None), ("full", 0), ("full", 2000),
                                           ("mamba,full", 2000)])
def test_a_tree_serves_the_next_turn(mixer, budget):
    """However small: what it cannot hold is read again."""
    model, prompts = build(mixer), texts(8)
    prompts += [prompts[1], prompts[1] + [1, 2], prompts[1][:9] + [5], prompts[1][:9]]
    tree = DialogTree(model, budget)
    for _ in range(3 if budget is None else 2):
        replies = assert_naive(model, prompts, 6, tree=tree, **USE)
        read = [prompt + reply.tokens for prompt, reply in zip(prompts, replies)]
        if budget is None:
            assert all(tree.match(text) >= len(text) - 1 for text in read)
        else:
            assert tree.peak_bytes <= budget
        prompts = [text + [1, 2, 4] for text in read]
    tree.reset()  # nothing is locked


# ---- What cannot be ----

@pytest.mark.parametrize("settings, how, said", [
    ({}, dict(prompts=[]), "there must be a prompt"), ({}, dict(prompts=[[1], []]), "at least one token"),
    ({}, dict(max_new_tokens=0), "max_new_tokens is 0"), ({}, dict(tool=tool), "needs the id"),
    ({}, dict(stop=["a"]), "needs decode"), ({}, dict(stop="ab", decode=decode), "list of strings"),
    ({}, dict(stop=["a", ""], decode=decode), "none empty"), (dict(n_layer=3, shorten=2), {}, "shorten 2"),
    (dict(mixer="mamba"), dict(prefix=True), "reads from left to right")])
def test_arguments_that_cannot_be(settings, how, said):
    model = build_model(TransformerConfig(**{**SMALL, **settings})).eval()
    with pytest.raises(ValueError, match=said):
        converse(model, **{**dict(prompts=[[1, 2]], max_new_tokens=4, end=END), **how})


def test_what_fails_leaves_nothing_locked():
    model = scripted(build(), {1: CALL})
    slides, tree = DialogTree(model, None, window=4), DialogTree(model, None)
    for its, error, said, how in (
            (tree, ValueError, "does not go with prefix", dict(prefix=True)),
            (slides, ValueError, "without window", {}),
            (tree, KeyError, "lost", dict(call=CALL, tool=lambda ids: {}["lost"]))):
        with pytest.raises(error, match=said):
            converse(model, [[0, 2], [0]][error is KeyError:], 4, END, tree=its, **how)
        its.reset()
