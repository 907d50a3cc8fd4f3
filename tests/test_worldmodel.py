"""The world model's networks: patches, positions, codes of actions, tokens and characters; what sees what; MaskGIT and
causal frames with a cache equal to frames recomputed."""
import math

import pytest
import torch
import torch.nn.functional as F

import choices
from model import parameter_roles
from models.discrete import FSQ
from models.video import axial_tables
from models.world_actions import ActionModel, Signs
from models.world_dynamics import CausalDynamics, Dynamics, PackedDynamics, fill_in
from models.world_layers import from_patches, move, to_patches
from models.world_tokenizer import ConvTokenizer, Tokenizer
from models.world_words import Writer, as_characters, as_text
from world_clips import some, whole

pytestmark = pytest.mark.usefixtures("one_thread")


def dynamics(**settings):
    """Dynamics whose weights are large enough to matter, in float64: no near ties between a cache and none."""
    torch.manual_seed(0)
    kind = settings.get("action_input")
    if kind in ("packed", "drafted"):                         # 2 x 2 tokens a place, of 5 x 2 levels
        model = PackedDynamics((2, 6), 10, 5, 2, 2, 16, pack=2, codebook=FSQ(10), draft=kind == "drafted")
        model.sources = drafter()
    else:
        model = (CausalDynamics((2, 3), 7, 4, n_embd=16, n_head=2) if kind == "causal" else
                 Dynamics((3, 4), 10, 5, n_layer=2, n_head=2, n_embd=16, **settings))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4)
    return model.double().eval()


def drafter():
    """A tokenizer and an action model of 4 x 12 pixels, 12 tokens."""
    models = dict(tokenizer=ConvTokenizer(4, 12, 2, None, 10, n_embd=8),
                  actions=ActionModel(4, 12, 2, None, 1, 8, 8, 1, decoder="warp"))
    with torch.no_grad():
        for model in models.values():
            for p in model.double().eval().parameters():
                p.normal_(0, 0.4)
    return models


def test_patches():
    x = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    patches = to_patches(x, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4].view(2, 2, 3), x[1, 2:4, 2:4])
    assert torch.equal(from_patches(patches, 2, 4, 6), x)


def test_axial_positions_are_relative_by_row_and_by_column():
    """Scores of a query and a key depend on how far apart they stand, and differ for rows and columns."""
    cos, sin = (t[0, :, 0] for t in axial_tables(4, 5, 8))
    q, k = some(2, 8, seed=1).double()

    def turned(x, place):
        a, b = x.chunk(2)
        return x * cos[place] + torch.cat((b, a)) * sin[place]

    def score(p, r):
        return float(turned(q, p) @ turned(k, r))
    for p in (1, 2, 5, 7):
        assert score(p, p + 5 + 2) == pytest.approx(score(0, 7), abs=1e-5)
    assert abs(score(0, 1) - score(0, 5)) > 1e-3
    extra = axial_tables(2, 2, 8, extra=1)
    assert torch.equal(extra[0][0, 0, 0], torch.ones(8)) and not extra[1][0, 0].any()
    with pytest.raises(ValueError, match="multiple of 4"):
        axial_tables(2, 2, 6)


# --- Latent actions ---

def test_signs():
    codes = Signs(8)
    u = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 5 + 3
    found = codes(u)
    assert set(found.e.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(codes.look_up(found.codes), found.e)
    assert len(found.codes.unique()) == 8                     # normalised: an offset of 3 does not make all of them 1
    assert (codes(u, soft=True).e.abs() < 1).all()
    x = u.clone().requires_grad_()
    codes(x).e[:, 0].sum().backward()
    assert x.grad[:, 0].abs().sum() > 0 and not x.grad[:, 1:].any()
    codes.eval()
    with choices.clear():
        alone, among = codes(u[:1]).codes, codes(u).codes[:1]
    assert torch.equal(alone, among)
    for n in (0, 1, 3, 6):
        with pytest.raises(ValueError, match="power of two"):
            Signs(n)


@pytest.mark.parametrize("kind, colours, quantiser", [
    ("conv", 6, "signs"), ("conv", None, "vq"), ("transformer", 6, "vq"), ("transformer", None, "signs"),
    ("warp", None, "vq")])
def test_action_model_sees_the_last_frame_through_the_code_only(kind, colours, quantiser):
    torch.manual_seed(0)
    how = dict(decoder="warp") if kind == "warp" else dict(kind=kind)
    model = ActionModel(16, 24, 8, colours, n_codes=4, n_embd=16, n_layer=2, quantiser=quantiser, **how).eval()
    parameter_roles(model)
    frames = some(3, 3, 16, 24, 3)

    def other(place):
        """The frames, but for one."""
        return torch.cat((frames[:, :place], some(3, 1, 16, 24, 3, seed=place + 1), frames[:, place + 1:]), 1)

    def apart(a, b):
        return (a - b).abs().max() > 1e-4
    with torch.no_grad():
        (written, found), u = model(frames), model.encode(frames)
        assert written.shape == (3, 16, 24, colours or 3) and found.codes.shape == (3,)
        torch.testing.assert_close(model.quantiser.look_up(found.codes), found.e)
        assert apart(model.encode(other(2)), u)
        assert torch.equal(model.predict(other(2)[:, :-1], found.e), written)
        assert apart(model.predict(frames[:, :-1], -found.e), written)
        for place in range(2):                                # history is seen by both, but a flow moves the last alone
            assert apart(model.encode(other(place)), u)
            assert apart(model.predict(other(place)[:, :-1], found.e), written) == (kind != "warp" or place == 1)
        if kind == "conv":                                    # or the encoder sees what changed, and nothing else
            blind = ActionModel(16, 24, 8, colours, n_codes=4, n_embd=16, quantiser=quantiser, past=False).eval()
            torch.testing.assert_close(blind.encode(frames + some(3, 1, 16, 24, 3, seed=3)), blind.encode(frames))
            assert apart(blind.encode(frames.flip(1)), blind.encode(frames))
            assert torch.equal(blind.encode(other(0)), blind.encode(frames))
    if kind == "warp":                                        # the other kinds: test_steps.py
        model(frames)[0].square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    channels = model._channels(frames)                        # frame by frame, as they lie in a checkpoint's weights
    assert torch.equal(channels[:, 3 * 1 + 2], frames[:, 1, ..., 2]) and channels.size(1) == 9


def test_a_flow_moves_pixels():
    """Whole pixels to the right or down of where they are read; control points bilinear between; the edge goes on."""
    frames, flow = some(2, 6, 9, 3), torch.zeros(2, 2, 4, 4)
    torch.testing.assert_close(move(frames, flow), frames)
    flow[0, 0], flow[1, 1] = 2, -1
    moved = move(frames, flow)
    torch.testing.assert_close(moved[0], frames[0][:, [2, 3, 4, 5, 6, 7, 8, 8, 8]])
    torch.testing.assert_close(moved[1], frames[1][[0, 0, 1, 2, 3, 4]])
    slope = torch.linspace(0, 4, 9)[None, None, :].expand(1, 6, 9)[..., None].expand(1, 6, 9, 3)
    flow = torch.zeros(1, 2, 4, 4)
    flow[0, 0, :, :] = torch.linspace(0, 1, 4)                # 0 at the left, 1 at the right edge
    wanted = (slope + torch.linspace(0, 1, 9)[None, None, :, None] * 0.5).clamp(max=4)
    torch.testing.assert_close(move(slope, flow), wanted)


# --- Tokenizer ---

@pytest.mark.parametrize("kind, window, quantiser", [
    ("spatial", None, "vq"), ("conv", None, "fsq"), ("spatiotemporal", None, "fsq"), ("spatiotemporal", 2, "vq")])
def test_tokenizer(kind, window, quantiser):
    torch.manual_seed(0)
    model = (ConvTokenizer(16, 24, 8, 6, 16, n_embd=16, quantiser=quantiser) if kind == "conv" else
             Tokenizer(16, 24, 8, 6, 16, n_layer=1, n_head=2, n_embd=16, kind=kind, quantiser=quantiser,
                       window=window)).eval()
    parameter_roles(model)
    frames = some(2, 5, 16, 24, 3)

    def change(first, last):
        """(5,) how far each frame's codes move where frames first to last are others."""
        other = torch.cat((frames[:, :first], some(2, last - first, 16, 24, 3, seed=1), frames[:, last:]), 1)
        return (model.encode(other) - model.encode(frames)).abs().unflatten(1, (5, 6)).amax((0, 2, 3))
    with torch.no_grad():
        tokens = model.tokens(frames)
        assert tokens.shape == (2, 5, 6) and tokens.max() < 16
        written, found = model(frames, None)
        assert written.shape == (2, 5, 16, 24, 6) and torch.equal(found.codes.view(2, 5, 6), tokens)
        torch.testing.assert_close(model.pixels(tokens), written)
        assert not change(3, 5)[:3].any()                     # the past does not depend on what comes
        assert (change(0, 1)[1:].max() > 1e-4) == (kind == "spatiotemporal")
        assert (change(0, 1)[2:].max() > 1e-4) == (kind == "spatiotemporal" and window is None)  # one layer sees two
        cache = model.new_cache(2, 5)
        if kind == "spatiotemporal":                          # frame by frame as at once
            parts = torch.cat([model.pixels(tokens[:, t:t + 1], cache) for t in range(5)], 1)
            torch.testing.assert_close(parts, written, atol=1e-4, rtol=1e-4)
        else:
            assert cache is None
        if kind == "conv":                                    # frames centred: of mid-grey the first layer sees nothing
            grey = torch.full_like(frames, 0.5)
            before = model.encode(grey), model.encode(frames)
            model.look.weight.mul_(2)
            assert torch.equal(model.encode(grey), before[0]) and not torch.equal(model.encode(frames), before[1])


# --- Dynamics ---

@pytest.mark.parametrize("action_input", ["add", "prepend", "packed"])
def test_dynamics_sees_the_past_the_frame_and_the_action(action_input):
    model = dynamics(action_input=action_input)
    parameter_roles(model)
    tokens, actions = whole(10, 2, 4, 12), whole(5, 2, 4, seed=1)
    one, act = tokens.clone(), actions.clone()
    one[:, 3, 5] = (one[:, 3, 5] + 1) % 10                    # all places of a frame see one another
    act[:, 3] = (act[:, 3] + 1) % 5
    with torch.no_grad():
        logits = model(tokens, actions)
        assert logits.shape == (2, 4, 12, 10)
        for out in (model(one, actions), model(tokens, act)):
            changed = (out - logits).abs().amax(-1)
            assert not changed[:, :3].any() and (changed[:, 3] > 0).all()


@pytest.mark.parametrize("action_input, window", [("add", 2), ("prepend", None), ("packed", 3), ("drafted", 2),
                                                  ("drafted", None)])
def test_two_streams_are_what_the_cache_sees(action_input, window):
    """Every corrupted frame sees itself and the true frames before it: one pass equals T passes after true frames."""
    model = dynamics(action_input=action_input)
    tokens, actions = whole(10, 2, 5, 12), whole(5, 2, 5, seed=1)
    corrupted = torch.where(some(2, 5, 12) < 0.6, model.mask, tokens)
    with torch.no_grad():
        both = model(torch.cat((tokens, corrupted), 1), torch.cat((actions, actions), 1), window=window, streams=(5, 0))
        torch.testing.assert_close(both[:, :5], model(tokens, actions, window=window))
        some_ = model(torch.cat((tokens[:, :4], corrupted[:, 2:]), 1), torch.cat((actions[:, :4], actions[:, 2:]), 1),
                      window=window, streams=(4, 2))
        torch.testing.assert_close(some_, torch.cat((both[:, :4], both[:, 7:]), 1))
        cache = model.new_cache(2, 5, window)
        for t in range(5):
            alone = model(torch.cat((tokens[:, :t], corrupted[:, t:t + 1]), 1), actions[:, :t + 1],
                          window=window)[:, -1]
            torch.testing.assert_close(both[:, 5 + t], alone)
            torch.testing.assert_close(model(corrupted[:, t:t + 1], actions[:, t:t + 1], cache)[:, 0], alone)
            cache.crop(t)
            model(tokens[:, t:t + 1], actions[:, t:t + 1], cache)
        assert (both[:, 5:] - both[:, :5]).abs().max() > 0.1


@pytest.mark.parametrize("kind, temperature, window", [
    ("add", 0.0, 3), ("add", 1.0, None), ("prepend", 0.0, None), ("prepend", 1.0, 3), ("drafted", 0.0, 3),
    ("drafted", 1.0, None), ("causal", 0.0, None), ("causal", 1.0, 3)])
def test_cached_generation_is_recomputed_generation(kind, temperature, window):
    """Identical tokens over six frames; after the window slides, those of banded attention over the whole history;
    rows that begin alike but for their actions part, and a row alone writes what it writes among others."""
    model = dynamics(action_input=kind)
    N, K = model.n_tokens, model.codebook_size
    first, actions = whole(K, 3, 1, N), whole(4, 3, 6, seed=1)
    first[2] = first[1]
    how = dict(window=window, temperature=temperature, **({} if kind == "causal" else dict(steps=3)))
    runs = [model.generate(first, actions[:, :1], actions[:, 1:], cached=cached, **how,
                           generator=torch.Generator().manual_seed(3)) for cached in (True, False)]
    assert torch.equal(*runs) and runs[0].shape == (3, 5, N)
    assert (runs[0] < K).all()                                # no place stays hidden
    assert len({tuple(row.flatten().tolist()) for row in runs[0]}) == 3
    if not temperature:
        assert torch.equal(model.generate(first[1:2], actions[1:2, :1], actions[1:2, 1:], **how), runs[0][1:2])


@pytest.mark.parametrize("temperature, choice, by_chance", [(0, 1e6, False), (1, 0, False), (1, 1e6, True)])
def test_the_surest_places_settle_first(temperature, choice, by_chance):
    """A cosine's share stays hidden; with much choice others settle in each row; one place at least in every round."""
    best = F.one_hot(torch.arange(12) % 5, 5).double()        # of place n by 20 + n / 2: chance changes none of them
    logits = (best * (20 + torch.arange(12)[:, None] / 2)).expand(40, 12, 5)

    def rounds(n):
        hidden = []
        tokens = fill_in(lambda tokens: hidden.append(tokens == 5) or logits, 40, 12, 5, None, n, temperature, choice,
                         torch.Generator().manual_seed(0))
        assert torch.equal(tokens, (torch.arange(12) % 5).expand(40, 12))
        assert all(torch.equal(a & b, b) for a, b in zip(hidden, hidden[1:]))
        return hidden, [places.sum(1).unique().tolist() for places in hidden]
    hidden, counts = rounds(4)
    assert counts == [[12], [11], [8], [4]] and rounds(99)[1] == [[n] for n in range(12, 0, -1)]
    in_order = all((places == (torch.arange(12) < places.sum(1, keepdim=True))).all() for places in hidden)
    assert in_order != by_chance and (not by_chance or hidden[1].all(0).sum() == 0)


def test_temperature_makes_draws_more_even():
    """Entropy of what is drawn rises with the temperature; 0 draws nothing."""
    model, actions = dynamics(), torch.zeros(400, dtype=torch.int64)
    past, entropies = (whole(10, 1, 1, 12).expand(400, -1, -1), actions[:, None]), []
    for temperature in (0.0, 0.5, 3.0):
        frame = model.next_frame(actions, steps=1, temperature=temperature, past=past,
                                 generator=torch.Generator().manual_seed(0))
        entropies.append(torch.special.entr(F.one_hot(frame, 10).double().mean(0)).sum(1).mean().item())
    assert 0 == entropies[0] < entropies[1] < entropies[2] < math.log(10)


def test_causal_dynamics_sees_what_is_before():
    model = dynamics(action_input="causal")
    parameter_roles(model)
    tokens, actions = whole(7, 2, 3, 6), whole(4, 2, 3, seed=1)
    with torch.no_grad():
        logits = model(tokens, actions)
        assert logits.shape == (2, 3, 6, 7)
        act = actions.clone()
        act[:, 1] = (act[:, 1] + 1) % 4
        cases = [(tokens, act, 6)]                            # the first place of all that differs
        for t, place in ((1, 0), (1, 3), (2, 5)):
            other = tokens.clone()
            other[:, t, place] = (other[:, t, place] + 1) % 7
            cases.append((other, actions, t * 6 + place + 1))
        for *given, first in cases:
            changed = ((model(*given) - logits).abs().amax(-1) > 1e-6).flatten(1)
            assert not changed[:, :first].any() and changed[:, first:].all()


def test_digits_and_drafts():
    """The logit of a code is the sum of its levels', a code goes in by its numbers; hidden tokens alone are told what
    the action model makes of the frame before, and only of that."""
    model = dynamics(action_input="drafted")
    parameter_roles(model)
    tokens, actions = whole(10, 2, 3, 12), whole(5, 2, 3, seed=1)
    tokens[:, 2, :6] = model.mask
    told = model(tokens, actions)
    logits = told[:, -1].view(2, 12, 5, 2).diff(dim=2)        # of code 2 i + j: levels i and j
    torch.testing.assert_close(logits, logits[..., :1].expand(-1, -1, -1, 2))
    book, tokenizer, acting = FSQ(10), model.sources["tokenizer"], model.sources["actions"]
    assert torch.equal(model.numbers[:, :2], book.look_up(torch.arange(10)).double())
    frames, true = tokenizer.pixels(tokens[:, 1:2]), some(2, 1, 4, 12, 3).double()
    moved = acting.predict(frames.clamp(0, 1), acting.quantiser.look_up(actions[:, 2]).double())
    wanted = book.bounded(tokenizer.encode(moved[:, None].clamp(0, 1))) / (book.levels // 2)
    torch.testing.assert_close(model.drafts(frames, actions[:, 2:])[:, 0], wanted)
    torch.testing.assert_close(model(tokens, actions, before=frames), told)     # the frame before, as its tokens say
    given, drafts, asked = model(tokens, actions, before=true), model.drafts(true, actions[:, 2:]), []
    assert (given[:, 2] - told[:, 2]).abs().amax(-1).min() > 1e-4
    model.drafts = lambda *how: asked.append(how) or drafts
    drafts[:, :, 6:] += 1                                     # of tokens that are seen, nobody asks
    assert torch.equal(model(tokens, actions, before=true), given)
    with torch.no_grad():
        model.hints.zero_()                                   # logits of hidden places around the draft, and no others
    near = model(tokens, actions, before=true)
    model.draft = False
    near = near - model(tokens, actions)
    model.draft = True
    precision, apart = model.log_precision.exp(), drafts[..., None, :] - model.numbers[:, :-1]      # (2, 1, 12, 10, 2)
    wanted = (drafts.square() @ precision)[..., None] - apart.square() @ precision
    torch.testing.assert_close(near[:, 2, :6], wanted[:, 0, :6].float(), atol=1e-4, rtol=1e-4)
    assert not near[:, 2, 6:].any() and not near[:, :2].any()
    asked.clear()
    cache = model.new_cache(2, 4)
    model(whole(10, 2, 3, 12), actions, cache)
    assert not asked                                          # nothing to name, nothing drafted
    model.next_frame(actions[:, 0], cache, steps=1, temperature=0.0, watch=lambda logits: true)
    assert cache.shown is true                                # what is shown is what the next draft is of


# --- Words ---

def test_texts_are_characters_up_to_the_first_0():
    texts = ["agent at a1.", "", "walls"]
    rows = as_characters(texts, 14)
    assert rows.shape == (3, 14) and as_text(rows) == texts and rows[2, 4:6].tolist() == [ord("s"), 0]
    assert as_text(torch.tensor([[97, 0, 98, 0]])) == ["a"]
    for wrong in (["caf\u00e9"], ["a\0b"], ["x" * 15]):
        with pytest.raises(ValueError, match="at most 14 plain ASCII"):
            as_characters(wrong, 14)


def test_a_writer_ends_each_text_by_itself():
    """It draws what its own loss knows, row by row, and a text without an end has block_size characters."""
    torch.manual_seed(0)
    model = Writer(6, 1, 2, 16).eval()
    with torch.no_grad():
        model.heads[0].mul_(30)
        model.heads[0][0] += model.heads[0][1:].mean(0)
    found = model.write(20, generator=torch.Generator().manual_seed(0))
    assert found == model.write(20, generator=torch.Generator().manual_seed(0)) and len(set(found)) > 5
    assert {len(text) for text in found} <= set(range(7)) and max(map(len, found)) == 6
