"""Text from a checkpoint: what each filter leaves, what is drawn, generation against a new pass for every byte (sliding
windows, restarts, ragged prompts), beams against all texts there are, one seed one text, and sample.py as a person sees
it."""
import contextlib
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

import choices
import nanolab.generate
import nanolab.plan
import sample
import variants
from choices import T, run_main
from kernels import GATES, PLAIN
from model import MIXERS, Attention, TransformerConfig
from nanolab import settings as flags
from nanolab.generate import (Draft, Ngrams, Stop, beam_search, draw, draw_alone, filter_logits, first_past,
                              generate)
from nanolab.plan import SPARE, Plan, plan_of

pytestmark = pytest.mark.usefixtures("one_thread")


def build(*given, **settings):
    """In float64, as the model magnifies rounding."""
    return choices.loud_model(*given, **settings).double()


# ---- filters ----

P = [0.125, 0.25, 0.0625, 0.25, 0.0625, 0.25]                    # ties at every level; best bytes 1, 3, 5
Q = [0.5, 0.25, 0.125, 0.125]                                    # at temperature 0.5: 0.727, 0.182, 0.045, 0.045
FLAT = [0.4] + [0.06] * 10                                       # the best one is too little of a surprise
FOUR = [0.4, 0.3, 0.2, 0.1]
ALL = list(range(6))
KEPT = [
    (P, {}, ALL), (P, dict(top_k=1), [1]), (P, dict(top_k=2), [1, 3]), (P, dict(top_k=5), [0, 1, 2, 3, 5]),
    (P, dict(top_k=99), ALL), (P, dict(top_p=1e-9), [1]), (P, dict(top_p=0.25), [1]), (P, dict(top_p=0.26), [1, 3]),
    (P, dict(top_p=0.88), [0, 1, 2, 3, 5]), ([0.9999999, 1e-12, 1e-9, 1e-12], dict(top_p=1.0), [0, 1, 2, 3]),
    (P, dict(min_p=0.0), ALL), (P, dict(min_p=0.26), [0, 1, 3, 5]), (P, dict(min_p=1.0), [1, 3, 5]),
    (Q, dict(top_p=0.7), [0, 1]), (Q, dict(temperature=0.5, top_p=0.7), [0]),
    (Q, dict(min_p=0.6), [0]), (Q, dict(temperature=2.0, min_p=0.6), [0, 1]),
    (FOUR, dict(top_p=0.55), [0, 1]), (FOUR, dict(top_k=2, top_p=0.55), [0]),  # 0.4 is short of it; of 0.7 left not
    (FOUR, dict(top_k=3, top_p=0.99, min_p=0.6), [0, 1]), ([1.0, 1e-12, 1e-9, 1e-12], dict(typical_p=1.0), ALL[:4]),
    ([0.25] * 4, dict(typical_p=0.5), [0, 1]),                   # of equal ones the lower first
    (FLAT, dict(top_k=2, typical_p=1e-9), [0]),                  # after top_k, after top_p, and before min_p
    (FLAT, dict(top_p=0.5, typical_p=0.5), [0]), (FLAT, dict(typical_p=0.29, min_p=1.0), [1, 2, 3, 4, 5])]


def test_what_filters_keep():
    """Of one row and of the second of two, whose first is another; logits that stay are over the temperature."""
    for p, how, wanted in KEPT:
        logits = torch.tensor([p[::-1], p]).log()
        before = logits.clone()
        for rows in (logits[1:], logits):
            found = filter_logits(rows, **how)
            assert found[-1].isfinite().nonzero().flatten().tolist() == wanted, how
            assert found.dtype == torch.float32 and (found[found.isinf()] == -math.inf).all()
            torch.testing.assert_close(found[-1, wanted], rows[-1, wanted] / how.get("temperature", 1.0))
        assert torch.equal(logits, before)


@pytest.mark.parametrize("mass", [1e-9, 0.5, 0.99])
def test_typical_p_is_its_definition(mass):
    """Bytes by how far their surprisal is from the entropy, in float64, until their sum is the mass."""
    scale = torch.tensor([0.1, 1, 3]).repeat(40)[:, None]
    rows = torch.randn(120, 30, generator=torch.Generator().manual_seed(0)) * scale
    rows[:, ::7] = -math.inf
    found = filter_logits(rows, 0.7, typical_p=mass).isfinite()
    for row, p in zip(found, (rows.double() / 0.7).softmax(-1).tolist()):
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        order = sorted((i for i, x in enumerate(p) if x > 0), key=lambda i: (abs(-math.log(p[i]) - entropy), i))
        wanted = [i for n, i in enumerate(order) if sum(p[j] for j in order[:n]) < mass]
        assert row.nonzero().flatten().tolist() == sorted(wanted)


# ---- draws ----

@pytest.mark.parametrize("how", [dict(temperature=2.0, top_k=4), dict(temperature=0.5),
                                 dict(top_k=5, top_p=0.9, min_p=0.3)], ids=str)
def test_frequencies_are_the_filtered_softmax(how):
    n, logits = 40_000, torch.tensor([[0.3, 0.05, 0.0, 0.25, 0.15, 0.05, 0.2]]).log()
    expected = n * filter_logits(logits, **how).softmax(-1)[0].double()
    token = draw(logits.expand(n, -1), torch.Generator().manual_seed(1), **how)
    assert token.shape == (n,) and token.dtype == torch.int64
    counts, real = token.bincount(minlength=7), expected > 0
    assert not counts[~real].any()
    chi_square = ((counts[real] - expected[real]) ** 2 / expected[real]).sum().item()
    freedom = int(real.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_uniform_numbers_at_the_ends_and_sums_that_round(monkeypatch):
    """No byte is drawn that may not be: at 0, just below 1, where the sum falls short of 1, where a GPU's moves."""
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    for u, byte in ((0.0, 1), (1 - 2 ** -24, 2)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: torch.tensor([[u]]))
        assert draw(logits, None).item() == byte
    level, p = torch.tensor([[0.505]]), torch.tensor([[0.5, 0.0, 0.5]])
    assert first_past(torch.tensor([[0.5, 0.51, 1.0]]), level, p).item() == 2
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: torch.tensor([[0.4, 0.6, 0.99]] * 2))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([[1.0]] * 2))
    assert draw(torch.zeros(2, 3), None).tolist() == [2, 2]


@pytest.mark.parametrize("how, ties", [(dict(temperature=0.7), True), (dict(top_k=7, temperature=1.5), False),
                                       (dict(top_k=49), True), (dict(top_k=50), False)])
def test_a_row_draws_the_same_alone_among_others_and_on_a_gpu(how, ties, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(600, 50, generator=generator) * 4
    logits[:, ::9] = -math.inf
    logits = logits.round() if ties else logits
    u = torch.rand(600, 1, generator=generator)
    u[:3] = torch.tensor([[0.0], [1 - 2.0 ** -24], [0.5]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: u)
    together = draw(logits, None, **how)
    p = filter_logits(logits, **how).softmax(-1)
    sums = p.cumsum(-1)
    level = u * sums[:, -1:]
    assert torch.equal(together, first_past(sums, level, p))
    clear = (sums - level).abs().amin(-1) > choices.BOUND        # a lone row adds up Python's numbers
    assert clear.double().mean() > 0.9
    for row, number, token in zip(logits[clear], u[clear], together[clear]):
        monkeypatch.setattr(torch, "rand", lambda *_, number=number, **__: number[None])
        assert draw(row[None], None, **how).item() == token


def test_a_lone_row_with_ties_at_the_edge_is_left_to_tensors():
    scores = np.array([3.0, 1.0, 2.0, 2.0, -np.inf], np.float32)
    assert draw_alone(scores, 0.99, top_k=2) is None and draw_alone(scores, 0.99, top_k=3) == 3
    assert draw_alone(scores, 0.0, top_k=3) == draw_alone(scores, 0.9, temperature=0) == 0
    assert draw_alone(scores, 1.0) == draw_alone(scores, 1.0, top_k=3) == 3  # past the sum by rounding


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-20])
def test_cold_draws_take_the_best_and_none_but_the_generator_moves(temperature):
    generator, world = torch.Generator().manual_seed(0), torch.get_rng_state()
    before, logits = generator.get_state(), torch.tensor([[-5.0, 80.0, 79.0], [3.0, -90.0, 1.0], [3.0, 3.0, 1.0]])
    assert draw(logits[:2 + (temperature == 0)], generator, temperature).tolist() == [1, 0, 0][:2 + (temperature == 0)]
    assert torch.equal(before, generator.get_state()) == (temperature == 0)
    assert torch.equal(world, torch.get_rng_state())


# ---- generation ----

def tokens(model, prompts, n, seed=5, **how):
    """The n bytes that each row generates, as lists; greedy unless told."""
    how = how or dict(temperature=0)
    return torch.stack(list(generate(model, prompts, n, torch.Generator().manual_seed(seed), **how)), 1).tolist()


@torch.no_grad()
def recomputed(model, prompts, written):
    """Logits without a cache: after each of the bytes written, (B, n) lists, a whole new pass, of each row by itself,
    over what the rules say may be seen."""
    contexts, found = [list(prompt[-T:]) for prompt in prompts], []
    columns = max(map(len, contexts))
    for step in range(len(written[0])):
        if model.config.positions.startswith("learned") and columns > T:
            contexts, columns = [context[-(T // 2):] for context in contexts], T // 2
        found.append(torch.stack([model(torch.tensor([context]))[0, -1] for context in contexts]))
        for context, row in zip(contexts, written):
            context.append(row[step])
        columns += 1
    return torch.stack(found)


@pytest.mark.parametrize("positions, prompts", [
    *((positions, prompts) for positions in ("learned", "rope") for prompts in (
        [b"a prompt that is longer than T"], [b"ab", b"abcdefgh", b"q"], [b"ab", b"abcdef", b"q"])),
    ("learned_per_layer", [b"ab", b"abcdef", b"q"]), ("none", [b"abcdefgh"])], ids=str)
def test_generation_equals_a_new_pass_for_every_byte(positions, prompts, monkeypatch):
    """Far past block_size: a window slides, learned positions start again from its last half."""
    model = build(positions)
    written = tokens(model, prompts, 24)
    found = [choices.followed(torch.tensor(written).T, model, prompts, use_cache=use) for use in (True, False)]
    monkeypatch.setattr(Attention, "attend", Attention.attend if positions.startswith("learned") else choices.banded)
    wanted = recomputed(model, prompts, written)
    for logits in found:
        assert logits.argmax(-1).T.tolist() == written
        torch.testing.assert_close(logits, wanted, atol=1e-9, rtol=1e-9)  # of logits up to about 60


def test_prompts_and_lengths():
    """A long prompt is cut to its end; so many bytes as asked; none may be empty; block_size may be 1."""
    model = build()
    assert tokens(model, [b"nobody reads this 12345678"], 6) == tokens(model, [b"12345678"], 6)
    assert tokens(model, [b"12345678"], 6) != tokens(model, [b"02345678"], 6)
    assert list(generate(model, [b"a", b"b"], 0)) == []
    assert [len(row) for row in tokens(model, [b"a", b"b"], 13)] == [13, 13]
    for prompts in ([], [b""], [b"a", b""]):
        with pytest.raises(ValueError, match="at least one byte"):
            next(generate(model, prompts, 3))
    for positions in ("rope", "learned"):
        model = build(positions, block_size=1)
        written = tokens(model, [bytes([3, 7])], 5)[0]
        logits = choices.followed(torch.tensor([written]).T, model, [bytes([3, 7])])[:, 0]
        torch.testing.assert_close(logits, model(torch.tensor([7, *written[:-1]])[:, None])[:, 0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("penalty, window", [(3.0, None), (0.5, 4), (1.7, 1)])
def test_what_was_there_is_penalised(penalty, window):
    """Each id of a row's own text, also of what no pass reads any more, once, whatever its sign, and no other."""
    model, prompts = build(), [b"ab", b"a prompt that is longer than T", b"q"]
    written = tokens(model, prompts, 20, temperature=0, repetition_penalty=penalty, repetition_window=window)
    raw, found = (choices.followed(torch.tensor(written).T, model, prompts, **how) for how in (
        {}, dict(repetition_penalty=penalty, repetition_window=window)))
    for step, b in itertools.product(range(20), range(3)):
        there = [*prompts[b], *written[b][:step]]
        there = {*there} if window is None else {*there[-window:]}
        wanted = torch.tensor([x if i not in there else x / penalty if x > 0 else x * penalty
                               for i, x in enumerate(raw[step, b].tolist())])
        torch.testing.assert_close(found[step, b], wanted)
        assert wanted.argmax() == written[b][step]


# ---- where a text ends ----

@pytest.mark.parametrize("strings", [["ab"], ["aab", "b"], ["abab", "ba"], ["abaab", "bb", "aaa"], ["x"], []], ids=str)
def test_a_text_ends_where_its_bytes_have_a_stop_string(strings):
    """Shown is all that cannot be the beginning of one; ids of one to three bytes."""
    pieces, strings, ended = [b"a", b"b", b"ab", b"baa"], [string.encode() for string in strings], 0
    for ids in itertools.product(range(4), repeat=5):
        stop, text, shown = Stop(strings, pieces.__getitem__), b"", b""
        for i in ids:
            found = [at for at in (text.find(string) for string in strings) if at >= 0]
            text, shown = text + (b"" if found else pieces[i]), shown + stop.add(i)
            found = [at for at in (text.find(string) for string in strings) if at >= 0]
            assert stop.done == bool(found)
            waits = [n for n in range(len(text)) if any(len(text) - n < len(string) and string.startswith(text[n:])
                                                        for string in strings)]
            assert shown == text[:min(found or waits or [len(text)])] and stop.held == text[len(shown):] * (not found)
        ended += stop.done
    assert (ended > 0) == (strings not in ([], [b"x"]))


# ---- beams ----

def letter(i):
    return bytes([97 + i])


def best_of_all(model, prompt, length, penalty, stop):
    """All texts that end with `stop`, or with `length` ids, as beam_search says them: each by a pass of its own."""
    V, found = model.config.vocab_size, {}
    for ids in itertools.product(range(V), repeat=length):
        text = b"".join(map(letter, ids))
        n = text.find(stop) + len(stop) if stop in text else length
        found[ids[:n]] = None
    x = torch.tensor([[*prompt, *ids, *[0] * (length - len(ids))] for ids in found])
    with torch.no_grad():
        p = model(x[:, :-1]).double().log_softmax(-1).gather(2, x[:, 1:, None])[:, len(prompt) - 1:, 0]
    nats = [-row[:len(ids)].sum().item() for ids, row in zip(found, p)]
    return sorted((cost / len(ids) ** penalty, [*ids], cost) for ids, cost in zip(found, nats))


def assert_same_beams(found, wanted):
    assert [ids for _, ids, _ in found] == [ids for _, ids, _ in wanted]
    for column in (0, 2):
        assert [beam[column] for beam in found] == pytest.approx([beam[column] for beam in wanted], rel=1e-9)


@pytest.mark.parametrize("settings", [*(dict(mixer=mixer, short_conv=2) for mixer in MIXERS), dict(
    shorten=2, n_layer=4, mixer="full,window"), dict(positions="learned")], ids=variants.name_of)
def test_beams_without_end_find_the_best_of_all_texts(settings):
    model = variants.build(vocab_size=3, **{**settings, "block_size": 16}).double()
    for penalty, stop in ((1.0, b"ba"), (0.0, b"c")):
        found = beam_search(model, [1, 0, 2], 4, 99, penalty, Stop([stop], letter))
        assert_same_beams(found, best_of_all(model, [1, 0, 2], 4, penalty, stop))
        assert len({len(ids) for _, ids, _ in found}) > 2 and len(found) < 99


def searched(model, prompt, length, n_beams, penalty, stops):
    """beam_search as it is defined: no cache, nothing left early; stops: ids that end a text."""
    beams, ended = [(0.0, [])], []
    for n in range(1, length + 1):
        costs = sorted((nats - logp, [*ids, token]) for nats, ids in beams for token, logp in enumerate(
            recomputed(model, [prompt], [[*ids, 0]])[-1, 0].double().log_softmax(-1).tolist()))
        assert costs[n_beams][0] - costs[n_beams - 1][0] > 1e-9
        ended += [(nats / n ** penalty, ids, nats) for nats, ids in costs[:n_beams] if ids[-1] in stops]
        beams = [beam for beam in costs if beam[1][-1] not in stops][:n_beams]
    return sorted(ended + [(nats / length ** penalty, ids, nats) for nats, ids in beams])[:n_beams]


@pytest.mark.parametrize("positions, penalty, stops", [
    ("learned", 1.0, []), ("rope", 1.0, range(0, 256, 3)), ("rope", 0.0, range(0, 256, 2))], ids=str)
def test_few_beams_are_those_of_the_definition(positions, penalty, stops, monkeypatch):
    """Past block_size; what has ended stops the others neither too early nor too late."""
    model, passes = build(positions), []
    with torch.no_grad():
        model.heads[0].mul_(0.1)                                 # or the first beam would win by far
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "attend", Attention.attend if positions == "learned" else choices.banded)
        wanted = searched(model, b"ab", 10, 3, penalty, stops)
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    stop = Stop([bytes([i]) for i in stops], lambda i: bytes([i]))
    assert_same_beams(beam_search(model, b"ab", 10, 3, penalty, stop), wanted)
    assert len(passes) == 10 if penalty else len(passes) < 10


# ---- a lone row by a plan ----

def noisy(**settings):
    """The model of a variant with gains, biases and scales that are not 1 and 0."""
    model = variants.build(**settings).for_inference()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape))
    return model


def every_word():
    """Each word of each setting of a model, alone or with what it needs, where they go together."""
    for name, spec in flags._fields_of(TransformerConfig).items():
        for word in {*spec.words} - {getattr(TransformerConfig, name)} if name not in ("kernels", "lora_on") else ():
            with contextlib.suppress(ValueError):
                settings = dict({"rope_scaling": dict(positions="rope")}.get(name, {}), **{name: word})
                TransformerConfig(**{**variants.SMALL, **settings})
                yield settings


@pytest.mark.parametrize("settings", [
    *variants.VARIANTS.values(), *sorted(every_word(), key=str), *(dict(activation=word) for word in (*PLAIN, *GATES)),
    *(dict(norm=word, bias=bias, n_kv_head=2) for word in ("layer", "rms", "dyt") for bias in (True, "qkv")),
    dict(positions="alibi", mixer="window,full", n_kv_head=2), dict(positions="none", norm_gain=False, bias=False),
    dict(mixer="full,window", qk_norm=True, n_kv_head=2, norm_eps=1e-3), dict(residual_scale="depth", norm_eps=1e-2),
    dict(residual_scale="rezero"), dict(tie_weights=True, head_bias=True), dict(rope_scaling="yarn", rope_factor=2.0),
    dict(qk_norm=True, residual_scale="layerscale", ff="none,mlp", bias=False)], ids=variants.name_of)
@torch.inference_mode()
def test_a_plan_is_the_model_or_is_none(settings):
    """Of every kind of pass, past the window and what it slides over, cropped and begun again."""
    model = noisy(**settings)
    c, plan = model.config, plan_of(model)
    assert (plan is not None) == ({*c.mixers} <= {"full", "window"} and {*c.ffs} <= {"mlp", "none"}
                                  and c.plain_scores and not c.short_conv and c.shorten == 1
                                  and not c.qk_gain and not c.qk_scale and not c.value_residual
                                  and not c.norm_after and not c.parallel_residual and c.qk_norm != "full"
                                  and c.documents == "none"
                                  and not c.nope_interval and c.partial_rotary == 1 and c.expert_groups == 1)
    if plan is None:
        return
    T, n = (c.block_size, 30) if c.learned_positions else (c.block_size, 2 * (c.block_size + SPARE) + 40)
    x, cache, at = variants.text(1, n), model.new_cache(1, n, window=T if c.rolls else None), 0
    plan.read([1, 2, 3])
    plan.reset()
    for size in [T, 1, 3, 1, 1, SPARE] * 5:
        found = plan.read(x[0, at:at + size].tolist())
        wanted = model(x[:, at:at + size], cache=cache)[0].numpy()
        assert np.abs(found - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())
        if size == SPARE and at + size <= n:  # as if none of the guesses stood
            plan.crop(size - 1)
            again = plan.read(x[0, at + 1:at + size].tolist())
            assert np.abs(again - wanted[1:]).max() < 1e-5 * max(1, np.abs(wanted).max())
        at += size
        if at + SPARE > n:
            break


def test_what_no_plan_is_made_of():
    class Other(Attention):
        """What somebody else computes."""
    model = choices.loud_model()
    assert plan_of(model) is not None and plan_of(choices.loud_model().double()) is None
    assert plan_of(choices.loud_model().train()) is None and plan_of(choices.loud_model(softmax_plus_one=True)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert plan_of(model) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanolab.plan, "LARGEST", 100)
        assert plan_of(model) is None
    hook = model.blocks[0].register_forward_hook(lambda *_: None)
    assert plan_of(model) is None
    hook.remove()
    model.blocks[0].mixer.__class__ = Other
    assert plan_of(model) is None


DRAWN = [dict(temperature=0), dict(temperature=0.5), dict(temperature=0.7, top_k=9), dict(temperature=0.5, top_p=0.9),
         dict(temperature=0.5, repetition_penalty=1.5, repetition_window=9),
         dict(temperature=0, repetition_penalty=2.0)]


def spoken(model, how, draft=None, n=40):
    """(n bytes of a lone row, where they leave the generator)."""
    generator = torch.Generator().manual_seed(3)
    found = [int(token) for token in generate(model, [b"abab"], n, generator, draft=draft, **how)]
    return found, generator.get_state().tolist()


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("how", DRAWN, ids=str)
def test_a_plan_writes_the_text_of_the_model(positions, how, monkeypatch):
    """With drafts too; in float64, whose rounding moves no choice."""
    model = build(positions)
    wanted = spoken(model, how)
    monkeypatch.setattr(nanolab.generate, "plan_of", Plan)
    draft = Draft(Ngrams(np.array([*b"abab", *wanted[0]] * 2)))
    assert spoken(model, how) == spoken(model, how, draft) == wanted
    assert draft.passes < draft.bytes == 40


# ---- drafts ----

@pytest.mark.parametrize("mixer", MIXERS)
def test_drafts_leave_the_text_as_it_is(mixer):
    """Good guesses and bad ones, past the window, in every mixer that can go back; one line from the others."""
    model, how = variants.build(mixer, short_conv=2, n_layer=2).double(), DRAWN[len(mixer) % 2 * 4]
    if mixer in ("mamba", "mingru", "compressive"):
        with choices.raises_one_line("mixer", mixer, "cannot go back"):
            spoken(model, how, Draft())
        return
    with choices.raises_one_line("a model with documents 'mask' has states that cannot go back"):
        spoken(variants.build(documents="mask").double(), how, Draft())
    with torch.no_grad():
        model.heads[0].mul_(60)
    wanted = spoken(model, how)
    good, bad = (Draft(Ngrams(np.array([*b"abab", *text] * 2))) for text in (wanted[0], [b ^ 1 for b in wanted[0]]))
    assert spoken(model, how, good) == spoken(model, how, bad) == spoken(model, how, Draft()) == wanted
    assert good.passes < good.bytes == 40 >= bad.passes


def test_what_is_guessed():
    """The bytes behind the longest known context, and as many as their odds are worth."""
    table = Ngrams(np.frombuffer(b"abcdefgh" * 3 + b"xbcdefy" * 9 + b"xbz", np.uint8))
    assert table.after(list(b"abcdef")) == [((6, 8), ord("g"))] and table.after(list(b"?bcdef"))[0][1] == ord("y")
    assert table.after(list(b"q")) == [] == Ngrams(np.zeros(0)).after(list(b"ab"))
    cheap, dear = {1: 1.0, 16: 1.01}, {1: 1.0, 16: 15.0}
    draft = Draft()
    for token in b"one two three. one two t":
        draft.add(token)
    assert bytes(draft.guess(15, cheap)) == b"hree" and draft.guess(15, dear) == [] == draft.guess(0, cheap)
    assert bytes(draft.guess(2, cheap)) == b"hr" and bytes(draft.text).endswith(b"two t")
    for token in b"hree. one two t" + b"hree. one two three. one two t" * 4 + b"hree. one":
        draft.add(token)
    assert bytes(draft.guess(15, cheap)) == b" two three. one"  # it has been right long enough
    assert draft.right[0][0] < draft.right[0][1]


# ---- the command ----

@pytest.fixture
def run(tmp_path):
    return choices.save_model(tmp_path, build())


def test_main_writes_prompt_and_sample(run):
    expected = (b"The " + bytes(tokens(build(), [b"The "], 30)[0])).decode(errors="replace") + "\n"
    for greedy in (["--greedy"], ["--temperature", 0], ["--greedy", "--no-cache"]):
        assert run_main(sample, run, "--prompt", "The ", "--length", 30, *greedy) == (0, expected, "")
    assert run_main(sample, run / "last.pt", "--prompt", "é", "--length", 0) == (0, "é\n", "")
    (run / "text").write_text(expected)
    for draft in ("lookup", run / "text"):
        status, out, err = run_main(sample, run, "--prompt", "The ", "--length", 30, "--greedy", "--draft", draft)
        assert (status, out) == (0, expected) and err.startswith("30 drawn in ") and err.endswith(" a pass\n")
    texts = [run_main(sample, run, "--length", 40, "--seed", seed, "--temperature", 3)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    status, out, log = run_main(sample, run, "--prompt", "The ", "--length", 30, "--greedy", "--log_cache")
    assert (status, out) == (0, expected) and log.count("ring") == 2


@pytest.mark.parametrize("n, how", [(3, dict(temperature=2.0, top_k=10, top_p=0.6, min_p=0.3)),
                                    (1, dict(temperature=2.0, typical_p=0.2))])
def test_main_hands_every_setting_on_and_writes_each_row(n, how, run):
    model = build()
    rows = tokens(model, [b"ab"] * n, 20, **how)
    for name in how:
        assert rows != tokens(model, [b"ab"] * n, 20, **{**how, name: 1.0 if name == "temperature" else None})
    texts = [(b"ab" + bytes(row)).decode(errors="replace") + "\n" for row in rows]
    expected = texts[0] if n == 1 else "".join(f"--- sample {i} of {n} ---\n{text}" for i, text in enumerate(texts, 1))
    words = [word for name, value in how.items() for word in (f"--{name}", value)]
    assert run_main(sample, run, "--prompt", "ab", "--n_samples", n, "--length", 20, "--seed", 5, *words) == (
        0, expected, "")
    assert run_main(sample, run, "--prompt", "ab", "--n_samples", 2, "--length", 0)[1] == (
        "--- sample 1 of 2 ---\nab\n--- sample 2 of 2 ---\nab\n")


def test_main_ends_each_row_at_its_own_stop_string(run):
    """A long one across guesses and passes; of several the one that comes first; bytes that are no UTF-8; where only a
    beginning of one was written, all is shown."""
    text = bytes(tokens(build(), [b"The "], 30)[0])
    n, stop = text.find(text[9:12]), text[9:12].decode(errors="surrogateescape")
    (run / "text").write_bytes(text)
    for said, more in (("", []), ("", ["--no-cache"]), ("ring", ["--log_cache"]),
                       (f"{n + 3} drawn in ", ["--draft", run / "text"])):
        status, out, err = run_main(sample, run, "--prompt", "The ", "--length", 30, "--greedy", "--stop", stop, *more)
        assert (status, out) == (0, (b"The " + text[:n]).decode(errors="replace") + "\n")
        assert said in err if said else not err
    stop = (text[-2:] + b"no").decode(errors="surrogateescape")
    _, out, _ = run_main(sample, run, "--prompt", "The ", "--length", 30, "--greedy", "--stop", stop)
    assert out == (b"The " + text).decode(errors="replace") + "\n"
    rows = [bytes(row) for row in tokens(build(), [b"ab"] * 3, 20, temperature=2.0)]
    ends = [rows[0][4:5], rows[1][11:13], rows[1][17:18], rows[2][-2:] + b"no"]
    rows = [row[:min([at for at in map(row.find, ends) if at >= 0], default=None)] for row in rows]
    assert len(rows[0]) <= 4 < len(rows[1]) <= 11
    words = json.dumps([end.decode(errors="surrogateescape") for end in ends])
    _, out, _ = run_main(sample, run, "--prompt", "ab", "--n_samples", 3, "--length", 20, "--seed", 5, "--temperature",
                         2, "--stop", words)
    assert out == "".join(f"--- sample {i} of 3 ---\n{(b'ab' + row).decode(errors='replace')}\n"
                          for i, row in enumerate(rows, 1))


def test_main_prints_the_best_beams_and_their_nats(run):
    stop = bytes(beam_search(build(), b"The ", 9, 4, 0.5)[1][1][3:5])
    found = beam_search(build(), b"The ", 9, 4, 0.5, Stop([stop], lambda i: bytes([i])))[:3]
    status, out, err = run_main(
        sample, run, "--prompt", "The ", "--length", 9, "--n_beams", 4, "--length_penalty", 0.5, "--n_samples", 3,
        "--stop", stop.decode(errors="surrogateescape"), "--log_cache")
    texts = [(b"The " + bytes(ids).partition(stop)[0]).decode(errors="replace") for _, ids, _ in found]
    parts = re.split(r"--- beam (.) of 4: (.*) nats, score (.*) ---\n", out)
    assert (status, parts[1::4], parts[4::4]) == (0, ["1", "2", "3"], [text + "\n" for text in texts])
    for place, column in ((2, 2), (3, 0)):
        assert [*map(float, parts[place::4])] == pytest.approx([beam[column] for beam in found], abs=1e-3)
    assert err.count("ring") == 2 and len({len(ids) for _, ids, _ in found}) > 1


class Screen(io.StringIO):
    """A standard output that remembers what each flush showed."""
    def flush(self):
        self.shown = [*getattr(self, "shown", ()), self.getvalue()]
        self.seek(0), self.truncate()


def speak(monkeypatch, spoken):
    """generate() yields the bytes of `spoken`, whatever the model says."""
    monkeypatch.setattr(sample, "generate", lambda *_, **__: (torch.tensor([byte]) for byte in spoken))


@pytest.mark.parametrize("spoken, shown", [
    ("aé€😀b".encode(), ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]),
    (b"a\xffb", ["a", "\ufffd", "b"]),
    (b"\xe2\x82a", ["", "", "\ufffda"]),                         # a character broken off by another
    (b"a\xf0\x9f\x98", ["a", "", "", ""]),                       # and by the end
])
def test_bytes_stream_as_whole_characters(spoken, shown, run, monkeypatch):
    speak(monkeypatch, spoken)
    screen = Screen()
    assert run_main(sample, run, "--prompt", ">", "--length", len(spoken), stdout=screen)[0] == 0
    assert screen.shown[0] == ">" + shown[0] and screen.shown[1:len(shown)] == shown[1:]
    assert "".join(screen.shown) == (b">" + spoken).decode(errors="replace") + "\n"


def test_half_a_character_in_the_prompt_and_a_terminal_of_few(run, monkeypatch):
    """Bytes that are no UTF-8 reach Python's arguments as surrogates."""
    speak(monkeypatch, b"\x82\xac")
    assert run_main(sample, run, "--prompt", b"x\xe2".decode(errors="surrogateescape"))[:2] == (0, "x€\n")
    speak(monkeypatch, "a€b".encode())
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert run_main(sample, run, "--prompt", ">", stdout=ascii_only)[:2] == (0, ">a?b\n")


@pytest.mark.parametrize("words, said", [
    ([], "which run"), (["{run}/other.pt"], "other.pt"), (["{run}/empty"], "has no last.pt"),
    (["{run}", "--prompt", ""], "at least one byte"), (["{run}", "--top_p", "1.5"], "--top_p 1.5"),
    (["{run}", "--weights", "ema"], "no averaged weights"), (["{run}", "--log_cache", "--no-cache"], "no cache to log"),
    (["{run}", "--draft", "lookup", "--n_samples", "2"], "--draft lookup"), (["{run}", "--draft", "."], "directory"),
    (["{run}", "--draft", "look"], "No such file"), (["{run}", "--draft", "lookup", "--no-cache"], "of one sample"),
    (["{run}", "--greedy", "--top_k", "3"], "top_k"), (["{run}", "--stop", ""], "none empty"),
    (["{run}", "--stop", "[]"], "a JSON list"), (["{run}", "--stop", '["a", 3]'], '--stop ["a", 3]'),
    (["{run}", "--repetition_window", "3"], "without --repetition_penalty"),
    (["{run}", "--length_penalty", "3"], "without --n_beams"), (["{run}", "--n_beams", "2", "--no-cache"], "a cache"),
    (["{run}", "--n_beams", "2", "--n_samples", "3"], "their most"),
    (["{run}", "--n_beams", "2", "--top_k", "3"], "on beams"),
    (["{run}", "--n_beams", "2", "--draft", "lookup"], "--draft lookup")], ids=str)
def test_main_errors_are_one_line(words, said, run):
    (run / "empty").mkdir()
    status, out, err = run_main(sample, *(word.format(run=run) for word in words))
    assert status == 2 and out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
