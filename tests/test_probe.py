"""nanolab/probe.py: same bits with and without, what is recorded and until when; what linear probes find."""
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data import facts, tokens
from model import TransformerConfig, build_model
from nanolab import probe as command
from nanolab import settings as flags
from nanolab.probe import (Accuracies, Opened, Probe, attending, draw_training, last_states, layers_that_know,
                           linear_probe, open_run, record, value_classes)
from nanolab.run import UserError

PLACES = ["embed", "blocks.0", "blocks.0.mixer", "blocks.1.ff", "blocks.1", "norm"]

ROOT = Path(command.__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return build_model(TransformerConfig(**{**dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50,
                                                   positions="rope"), **settings}))


def ids(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def train_pass(model, autocast=False, seed=3):
    """(loss, {name: gradient}) of one pass with dropout from `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        objective, nats = model(ids(3, 12), targets=ids(3, 12, seed=2)[..., None])
    objective.backward()
    return objective.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, torch.get_rng_state()


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- The same bits ---

@pytest.mark.parametrize("settings, autocast", [({}, True), ({"dropout": 0.2, "checkpoint_activations": True}, False)])
def test_same_bits(settings, autocast):
    """Loss, every gradient and the generator are as without, and each place was passed once."""
    model = build(**settings)
    loss, gradients, state = train_pass(model, autocast)
    with record(model, PLACES, gradients=True) as probes:
        other, others, after = train_pass(model, autocast)
    assert torch.equal(loss, other) and torch.equal(state, after)
    assert gradients.keys() == others.keys() and len(gradients) > 5
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    for place in PLACES:
        shape = (1, 3, 12, 32) if place == "norm" else (3, 12, 32)       # one layer whose loss counts
        (forward,), (backward,) = probes[place].forward, probes[place].backward
        assert forward.shape == backward.shape == shape and not forward.requires_grad and not backward.requires_grad
    assert hooks(model) == 0


@pytest.mark.parametrize("again", [False, True])
def test_what_is_recorded(again):
    """Streams, branches and their gradients, as computed by hand."""
    model = build(checkpoint_activations=again)
    x, y = ids(2, 9), ids(2, 9, seed=2)[..., None]
    with record(model, PLACES, gradients=True) as probes:
        model(x, targets=y)[0].backward()
    places = model.place(x, None)
    stream = F.embedding(x, model.embed)
    by_hand, stream = {"embed": stream}, stream
    for layer, block in enumerate(model.blocks):
        by_hand[f"blocks.{layer}.mixer"] = mixed = block.mixer(block.norm1(stream), places)
        stream = stream + mixed
        by_hand[f"blocks.{layer}.ff"] = out = block.ff(block.norm2(stream), places)
        by_hand[f"blocks.{layer}"] = stream = stream + out
    by_hand["norm"] = normed = model.norm(stream[None])
    loss = F.cross_entropy(F.linear(normed, model.heads[0]).flatten(0, 2), y.flatten())
    gradients = torch.autograd.grad(loss, [by_hand[place] for place in PLACES])
    for place, gradient in zip(PLACES, gradients):
        torch.testing.assert_close(probes[place].forward[0], by_hand[place].detach())
        torch.testing.assert_close(probes[place].backward[0], gradient)
        assert gradient.abs().max() > 1e-6


def test_pairs_of_passes():
    """A gradient stands beside its own pass, also when passes come back in another order, or not at all."""
    model = build()

    def loss(seed):
        return model(ids(1, 5, seed=seed), targets=ids(1, 5, seed=9)[..., None])[0]
    with record(model, ["blocks.0"], gradients=True) as probes:
        losses, probe = [loss(1), loss(2)], probes["blocks.0"]
        with torch.no_grad():
            model(ids(1, 5))
        losses[1].backward()
        assert [g is None for g in probe.backward] == [True, False, True]
        losses[0].backward()
    assert [g is None for g in probe.backward] == [False, False, True] and len(probe.forward) == 3
    torch.testing.assert_close(probe.forward[0], probe.forward[2])
    assert not torch.allclose(probe.forward[0], probe.forward[1])
    with record(model, ["blocks.0"], gradients=True) as alone:
        loss(2).backward()
    assert torch.equal(alone["blocks.0"].backward[0], probe.backward[1])


def test_copies():
    """What is written into a tensor later does not reach the copy."""
    probe = Probe(gradients=True)
    for factor in (2, 3):
        y = probe(torch.ones(3, requires_grad=True) * factor)
        y.mul_(5).sum().backward()
    assert [kept.tolist() for kept in probe.forward] == [[2] * 3, [3] * 3]
    assert [kept.tolist() for kept in probe.backward] == [[5] * 3] * 2
    z = torch.ones(2)
    assert probe(z) is z and probe.forward[2] is not z
    probe.close()
    assert probe(y) is y and len(probe.forward) == 3


def test_it_ends():
    """Nothing is recorded after the block, gradients only on request, and nothing stays in the model, also after an
    exception; blocks may be nested."""
    model = build()
    with record(model, ["blocks.0", "embed"]) as outer:
        with record(model, ["blocks.0", "blocks.0"]) as inner:           # named twice, recorded once
            train_pass(model)
        train_pass(model)
    assert [len(p.forward) for p in (outer["blocks.0"], outer["embed"], inner["blocks.0"])] == [2, 2, 1]
    assert outer["blocks.0"].backward == [None] * 2 and hooks(model) == 0
    with record(model, PLACES, gradients=True) as probes:
        loss = model(ids(1, 5), targets=ids(1, 5)[..., None])[0]
    loss.backward()
    model(ids(1, 5))
    assert all(len(probe.forward) == 1 and probe.backward == [None] for probe in probes.values())
    with pytest.raises(ZeroDivisionError):
        with record(model, PLACES):
            1 / 0
    assert hooks(model) == 0


def test_places():
    """Of a Transformer and of any model, where a module of the name "embed" is that module."""
    model, plain = build(), torch.nn.Sequential(torch.nn.Linear(3, 2))
    for owner, wrong, said in ((model, "block.1.mixer", "no place 'block.1.mixer'; the nearest is 'blocks.1.mixer'"),
                               (model, "embd", "the nearest is 'embed'"), (model, "", "'' gives no tensor, but tuple"),
                               (plain, "embed", "no place 'embed'")):
        with pytest.raises(ValueError, match=said):
            with record(owner, [wrong]):
                owner(ids(1, 5), targets=ids(1, 5)[..., None])
        assert hooks(owner) == 0
    with record(plain, ["0"]) as probes:
        assert torch.equal(plain(torch.ones(1, 3)), probes["0"].forward[0])
    named = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 2), "blocks": torch.nn.ModuleList([torch.nn.ReLU()])})
    with record(named, ["embed"]) as probes:
        named["blocks"][0](named["embed"](torch.tensor([1])) - 9)
    assert torch.equal(probes["embed"].forward[0], named["embed"].weight[1:2].detach())


# --- By hand ---

def opened(**settings):
    return Opened(build(**settings).eval(), {"task": "mqar"}, None)


def test_a_patched_place_is_what_the_rest_computes_from():
    """A stream after a layer says all that follows; a number, a function, a part of it; the outer block comes first."""
    run, x, y = opened(dropout=0.5), ids(2, 9), ids(2, 9, seed=5)
    clean, other = run.record(x), run.record(y)
    assert run.places == list(clean) and len(clean) == 8 and all(t.shape == (2, 9, 32) for t in clean.values())
    for place in ("embed", "blocks.0", "blocks.1", "norm"):
        assert torch.equal(run.record(y, patch={place: clean[place]}).logits, clean.logits)
        assert not torch.equal(run.record(y, patch={place: other[place]}).logits, clean.logits)
    found = run.record(x, patch={"blocks.0.mixer": 0.0, "blocks.1.ff": lambda own: 2 * own})
    stream, places = clean["embed"], run.model.place(x, None)
    for block, mixing, adding in zip(run.model.blocks, (0, 1), (1, 2)):
        stream = stream + mixing * block.mixer(block.norm1(stream), places)
        stream = stream + adding * block.ff(block.norm2(stream), places)
    torch.testing.assert_close(found["blocks.1"], stream.detach())
    assert not found["blocks.0.mixer"].any()                             # what is recorded is what was put there
    with run.patch({"embed": torch.ones(32)}), run.patch({"embed": lambda own: 3 * own}):
        assert torch.equal(run.record(x)["embed"], torch.full((2, 9, 32), 3.0))
    assert torch.equal(run.record(x).logits, clean.logits) and hooks(run.model) == 0


def test_a_record_by_hand():
    """Logits, the loss of what is asked, its gradients; the weights keep none."""
    run, x = opened(), ids(2, 9)
    y = torch.where(torch.arange(9) % 3 == 0, ids(2, 9, seed=2), -1)
    for targets in (None, y):
        found, want = run.record(x, gradients=True, targets=targets), F.pad(x[:, 1:], (0, 1), value=-1)
        loss, _ = run.model(x, targets=(want if targets is None else y)[..., None])
        torch.testing.assert_close(found.loss, loss.detach())
        torch.testing.assert_close(found.logits, run.model(x).detach())
        with record(run.model, ["embed", "norm"], gradients=True) as probes:
            run.model(x, targets=(want if targets is None else y)[..., None])[0].backward()
        torch.testing.assert_close(found.gradients["embed"], probes["embed"].backward[0])
        torch.testing.assert_close(found.gradients["norm"], probes["norm"].backward[0][0])
        run.model.zero_grad()
    assert list(found.gradients) == run.places and not found.loss.requires_grad and not found.logits.requires_grad
    found = run.record(x[0].tolist(), ["blocks.1"])
    assert list(found) == ["blocks.1"] and found["blocks.1"].shape == (1, 9, 32) and found.gradients == {}
    run.record(x, gradients=True)
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("settings", [{}, {"n_head": 4, "n_kv_head": 2, "qk_norm": True}, {"positions": "alibi"},
                                      {"mixer": "window,full", "window": 2}], ids=str)
def test_attention_weights_mix_the_values(settings):
    """They sum to 1, see no later place, and times the values are what the mixer gives."""
    run, x = opened(**{"init": "xavier", **settings}), ids(2, 9)
    acts, c = run.record(x), run.model.config
    for layer, block in enumerate(run.model.blocks):
        weights, stream = acts.attention[f"blocks.{layer}.mixer"], acts["embed" if layer == 0 else "blocks.0"]
        assert weights.shape == (2, c.n_head, 9, 9) and not weights.triu(1).any() and weights.std() > 0.01
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, c.n_head, 9))
        if "window" in settings and layer == 0:
            assert not weights.tril(-2).any()
        v = block.mixer.qkv(block.norm1(stream))[..., -c.n_kv_head * c.head_dim:].view(2, 9, c.n_kv_head, c.head_dim)
        v = v.transpose(1, 2).repeat_interleave(c.n_head // c.n_kv_head, 1)              # (B, H, S, D)
        mixed = block.mixer.out((weights @ v).transpose(1, 2).reshape(2, 9, -1))
        torch.testing.assert_close(mixed.detach(), acts[f"blocks.{layer}.mixer"], atol=1e-5, rtol=1e-4)
        assert "attend" not in vars(block.mixer)
    with attending(build(mixer="mamba")) as found:
        assert found == {}


def test_runs_are_opened_and_asked(tmp_path):
    """Text by its own tokenizer, rows of ids; a linear probe in a line, with its picture; mistakes."""
    small = dict(n_layer=1, n_head=1, n_embd=8, block_size=64, dropout=0.0)
    for script, vocabulary, more in (("train_enwik8", 256, dict(n_targets=1, intermediate_losses=False)),
                                     ("train_facts", None, dict(n_people=6, n_unseen=3)),
                                     ("train_facts", 32, dict(task="mqar", mqar_vocab=32))):
        settings = {name: spec.default for name, spec in flags._read_settings(ROOT / f"{script}.py").items()}
        settings |= small | more
        said = {}
        if vocabulary is None:
            people, words, _ = facts.open_facts(settings)
            asked = facts.question(people[0], "birth_date", "short")
            vocabulary, said = words.size, {"tokenizer": words.fingerprint}
        torch.manual_seed(0)
        model = build_model(TransformerConfig.from_settings({**settings, "vocab_size": vocabulary}))
        path = tmp_path / f"{script}_{vocabulary}.pt"
        torch.save({"format": "nanolab-1", "script": script, "step": 1, "settings": settings, "ema": None,
                    "model": model.state_dict(), "vocab_size": vocabulary, **said}, path)
        run = open_run(path)
        if script == "train_enwik8":
            assert run.ids("a\u00e9").tolist() == [[97, 195, 169]] and torch.equal(
                run.record("abc").logits, model.for_inference().eval()(torch.tensor([[97, 98, 99]])).detach())
            text = run
        elif settings["task"] != "mqar":
            assert run.ids(asked).tolist() == [words.encode(asked)]
    with pytest.raises(ValueError, match="a model of task mqar reads ids, not a text"):
        run.record("abc")
    found = text.fit(["ab" + "xyz"[i % 3] for i in range(30)], [i % 3 for i in range(30)], str(tmp_path / "a.png"))
    assert found["embed"].held_out == 1.0 and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    for given, said in (([], r"ids are \(1, 0\), but must be \(B, T\) with T from 1 to block_size 64"),
                        ([1] * 65, r"\(1, 65\)"), (torch.zeros(1, 1, 1), r"\(1, 1, 1\)")):
        with pytest.raises(ValueError, match=said):
            text.record(given)
    for values, said in (({"blocks.0": torch.zeros(3, 9)}, r"'blocks.0' is \(1, 2, 8\), the value for it \(3, 9\)"),
                         ({"block.0": 0.0}, "no place 'block.0'; the nearest is 'blocks.0'")):
        with pytest.raises(ValueError, match=said):
            text.record([1, 2], patch=values)
        assert hooks(text.model) == 0
    with pytest.raises(UserError, match="there are no averaged weights"):
        open_run(path, "ema")


# --- Linear probes ---

def planted(n=300, C=20, n_classes=3, signal=3.0, seed=0):
    """Features whose direction tells the class, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % n_classes
    directions = torch.linalg.qr(torch.randn(C, C, generator=generator)).Q[:n_classes]
    return torch.randn(n, C, generator=generator) + signal * directions[labels], labels


def test_a_planted_feature_is_found_and_a_random_label_is_not():
    features, labels = planted()
    found = linear_probe(features, labels, 3)
    assert found.held_out > 0.85 and found.training > 0.95 and found.majority == pytest.approx(1 / 3)
    # Any scale and shift of a feature, any type, and columns that say nothing change little.
    moved = features * torch.logspace(-6, 6, 20) + 7 * torch.logspace(-6, 6, 20)
    assert linear_probe(moved.double(), labels, 3).held_out == pytest.approx(found.held_out, abs=0.02)
    more = torch.cat((features.bfloat16(), torch.ones(300, 2)), 1)
    assert linear_probe(more, labels.to(torch.int32), 3).held_out == pytest.approx(found.held_out, abs=0.05)
    features, _ = planted(1000, 100)
    labels = torch.randint(2, (1000,), generator=torch.Generator().manual_seed(5))
    found = linear_probe(features, labels, 2)                # held-out rows stay at chance, training rows are learned
    assert abs(found.held_out - 0.5) < 0.1 and abs(found.majority - 0.5) < 0.02 and found.training > 0.58


def test_figures_of_problems_solved_by_hand():
    """The most frequent class is that of the training rows; a penalty keeps weights small; few steps are not enough."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 0])       # of all rows, 1 is the most frequent
    for x, y, wanted in ((torch.zeros(9, 2), labels, (0.2, 0.75, 0.2)),                      # nothing to see: it says 0
                         (F.one_hot(labels, 2), labels, (1.0, 1.0, 0.2)),
                         (torch.tensor([-3.0, -1.0, 1.0, 3.0, 0.2, -0.2])[:, None], torch.tensor([0, 1, 0, 1, 1, 0]),
                          (1.0, 0.5, 0.5))):                 # a slope above zero: the outer two weigh more
        assert linear_probe(x, y, 2, torch.arange(4), l2=1e-6) == wanted
    few = planted(60, 40, signal=1.0)
    assert linear_probe(*few, 3, l2=1e-6).training == 1.0 > linear_probe(*few, 3, l2=100.0).training
    assert linear_probe(*few, 3, l2=1e-6, steps=1) != linear_probe(*few, 3, l2=1e-6)


def test_scale_comes_from_training_rows():
    """What a held-out row is, does not change the fit; a feature that only rounding moves counts as constant."""
    features, labels = planted(200)
    rows = torch.arange(150)
    before = linear_probe(features, labels, 3, rows)
    features[150:] += 1000 * torch.randn(50, 1)
    after = linear_probe(features, labels, 3, rows)
    assert after.training == before.training and after.majority == before.majority
    noise = 1000 + 1e-5 * F.one_hot(labels, 3).double()
    assert linear_probe(noise, labels, 3, rows).training < 0.4
    assert linear_probe(noise - 1000, labels, 3, rows).training == 1.0


def test_drawn_rows():
    """Of each class four in five, at least one in and, where there are several, at least one out; the same for one
    seed, whatever the mode and the global generator, which stays as it is."""
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] + [3] * 5)
    rows = draw_training(labels, 0)
    assert labels[rows].bincount().tolist() == [8, 1, 1, 4] and rows.unique().numel() == 14
    assert rows.tolist() == draw_training(labels, 0).tolist() != draw_training(labels, 1).tolist()
    features, labels = planted(200, signal=1.0)
    state, wanted = torch.get_rng_state(), linear_probe(features, labels, 3, draw_training(labels, 0))
    with torch.inference_mode():
        assert linear_probe(features.clone(), labels, 3) == wanted
    assert torch.equal(torch.get_rng_state(), state)


# --- Which layers know ---

def people_and_prompts(n=120, n_classes=3):
    """Prompts of many lengths whose first id tells the label and whose last id is always the same."""
    generator = torch.Generator().manual_seed(0)
    labels = [i % n_classes for i in range(n)]
    middle = [ids(1 + i % 7, seed=100 + i).tolist() for i in range(n)]
    pick = torch.randint(5, (n,), generator=generator).tolist()
    return [[5 * label + k, *rest, 49] for label, k, rest in zip(labels, pick, middle)], labels


@pytest.mark.parametrize("settings", [{}, {"mixer": "mamba"}, {"positions": "learned"}])
def test_last_states_are_those_of_each_prompt_alone(settings):
    model = build(**settings, dropout=0.5).train()
    prompts = people_and_prompts(10)[0]
    found = last_states(model, prompts, ["embed", "blocks.1", "norm"], batch_size=4)
    assert model.training and hooks(model) == 0 and {tuple(states.shape) for states in found.values()} == {(10, 32)}
    model.eval()
    for i, prompt in enumerate(prompts):
        with record(model, found) as probes:
            model(torch.tensor([prompt]))
        for place, states in found.items():
            torch.testing.assert_close(states[i], probes[place].forward[0][0, -1], atol=1e-5, rtol=1e-5)


def test_layers_that_know():
    """The first id reaches the last position by attention only: the embedding cannot know it, the layers can."""
    model = build(init="xavier")
    prompts, labels = people_and_prompts(300)
    found = layers_that_know(model, prompts, labels)
    assert list(found) == ["embed", "blocks.0", "blocks.1"]
    assert found["embed"].held_out == found["embed"].majority == pytest.approx(1 / 3)
    assert found["blocks.0"].held_out > 0.6 and found["blocks.1"].held_out > 0.5
    assert found == layers_that_know(model, prompts, torch.tensor(labels))
    assert found != layers_that_know(model, prompts, labels, seed=1)


ROWS = dict(features=torch.eye(6)[:, :2], labels=torch.tensor([0, 0, 0, 1, 1, 1]), n_classes=2)
PROMPTS = dict(prompts=[[1], [2, 3], [3], [4]], labels=[0, 1, 0, 1])
MISTAKES = [
    (ROWS, dict(features=torch.zeros(6)), r"features are \(6,\) and labels \(6,\), but must be \(N, C\)"),
    (ROWS, dict(labels=torch.zeros(6)), "labels are torch.float32, but must be whole"),
    (ROWS, dict(labels=torch.tensor([0, 0, 1, 1, 0, 2])), "labels reach from 0 to 2, but must be from 0 to 1"),
    (ROWS, dict(labels=torch.tensor([0, 0, 1, 1, 0, -1])), "labels reach from -1 to 1"),
    (ROWS, dict(n_classes=3), "class 2 has no row to learn from"),
    (ROWS, dict(rows=torch.arange(6)), "no row is held out"),
    (ROWS, dict(features=torch.full((6, 2), torch.nan)), "not finite"),
    (ROWS, dict(features=torch.zeros(0, 2), labels=torch.zeros(0, dtype=torch.int64)), r"labels \(0,\), but must be"),
    (PROMPTS, dict(prompts=[[1], [2], [3], []]), "prompt 3 has 0 ids, but there must be from 1 to block_size 16"),
    (PROMPTS, dict(prompts=[[1], [2] * 17, [3], [4]]), "prompt 1 has 17 ids"),
    (PROMPTS, dict(labels=[0, 1, 0]), "4 prompts and 3 labels"),
    (PROMPTS, dict(prompts=[], labels=[]), "0 prompts and 0 labels"),
    (PROMPTS, dict(labels=[0, 2, 0, 2]), "class 1 has no row to learn from"),
    (PROMPTS, dict(places=["blocks.9"]), "no place 'blocks.9'"),
    (PROMPTS, dict(places=["heads"]), "place 'heads' gives nothing, not")]


def test_mistakes():
    model = build()
    for given, change, words in MISTAKES:
        with pytest.raises(ValueError, match=words):
            linear_probe(**{**given, **change}) if given is ROWS else layers_that_know(model, **{**given, **change})
        assert model.training and hooks(model) == 0
    model = build(n_layer=4, shorten=2)                      # a pyramid's middle layer has fewer positions
    with pytest.raises(ValueError, match=r"place 'blocks.1' gives \(3, 3, 32\), not \(B, T, C\) with B 3 and T 6"):
        last_states(model, [[1] * 6, [2], [3]], ["blocks.0", "blocks.1"])
    assert last_states(model, [[1] * 6, [2], [3]], ["blocks.0", "blocks.3"])["blocks.3"].shape == (3, 32)


# --- The command ---

def test_classes_of_values():
    made = SimpleNamespace(values={"birth_place": ["Asia", "Europe", "Asia"], "birthday": ["3/1/1900", "1/3/1901",
                                                                                          "1/1/1900"]})
    for attribute, part, classes in (("birth_place", "day", [0, 1, 0]), ("birthday", "day", [1, 0, 0]),
                                     ("birthday", "month", [0, 1, 0]), ("birthday", "year", [0, 1, 0])):
        assert value_classes(made, attribute, part).tolist() == classes


def test_the_command_asks_about_people_whose_value_occurs_twice(monkeypatch, capsys):
    """Each by the question about the person whose class stands beside it, trained people and unseen ones apart."""
    made, vocabulary, asked = facts.people(60, 1, unseen=25), facts.Vocabulary("closed"), []
    before, loaded = dict(vars(command)), dict(tokenizer=None, settings=dict(task="in_weight", form="short"))
    for owner, name, stub in (
            (command, "find_checkpoint", Path),
            (command, "load_checkpoint", lambda *_: loaded),
            (command, "from_checkpoint", lambda *_: SimpleNamespace(for_inference=build)),
            (command, "layers_that_know", lambda model, prompts, labels, **_: asked.append(
                (prompts, labels.tolist())) or {"embed": Accuracies(0.25, 0.5, 0.125)}),
            (facts, "open_facts", lambda settings: (made, vocabulary, None)), (tokens, "check", lambda *_: None)):
        monkeypatch.setattr(owner, name, stub)
    monkeypatch.setattr(sys, "argv", ["probe.py", "run", "--attribute", "occupation", "--device", "cpu"])
    command.main()
    monkeypatch.undo()
    vars(command).update(before)
    left_out = 0
    for (prompts, labels), numbers in zip(asked, (range(60), range(60, 85)), strict=True):
        values, counts = made.values["occupation"], Counter(made.values["occupation"][i] for i in numbers)
        some = [i for i in numbers if counts[values[i]] > 1]
        assert [vocabulary.decode(prompt).split()[:2] for prompt in prompts] == [
            ["occupation", made.names[i]] for i in some]
        assert len(set(zip(labels, (values[i] for i in some)))) == len(set(labels)) == max(labels) + 1
        left_out += len(numbers) - len(some)
    assert left_out and "embed" in (out := capsys.readouterr().out) and out.count("0.250") == 2
