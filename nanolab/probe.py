"""What a layer knows: activations and gradients of any place in a model, and linear probes on them.

    python -m nanolab.probe runs/train_facts/NAME --attribute birth_date    # which layer knows the birthday?
    python -m nanolab.probe runs/train_facts/NAME --attribute birth_place --asked occupation
    python -m nanolab.probe FOLDER --n_people 256            # published weights: people whom the prompt tells of

The command reads the stream at the last token of a question. A linear map learns the attribute's value from four in
five people, and is asked about the rest; beside it the same on people that the model was never trained on, and the
share of the most frequent value. A folder of weights knows no people: there each prompt tells of a person before it
asks, and beside it stands the same without the telling.

    with record(model, ["embed", "blocks.1", "blocks.1.mixer"], gradients=True) as probes:
        objective, nats = model(x, targets=y)
        objective.backward()
    probes["blocks.1"].forward[-1], probes["blocks.1"].backward[-1]      # (B, T, C) each, copies

    linear_probe(features, labels, n_classes)                # can a linear map read the labels off the features?
    layers_that_know(model, prompts, labels)                 # so at the end of each prompt, layer by layer

By hand, of a run or a folder of weights (docs/language-model.md finds an induction head so):

    run = open_run("runs/train_enwik8/NAME")
    acts = run.record("To be, or not to be", gradients=True)
    acts["blocks.1.mixer"], acts.gradients["embed"]          # (1, T, C) each
    acts.attention["blocks.1.mixer"], acts.logits, acts.loss # (1, H, T, T), (1, T, V), ()
    with run.patch({"blocks.0.ff": 0.0}):                    # or a tensor, or a function of what would be there
        run.record("To be, or not to be").loss
    run.fit(prompts, labels, picture="layers.png")

A model gives the same bits with a probe and without, losses and gradients alike. Figures: docs/facts.md.
"""
from nanolab.settings import answer_help

answer_help(__name__, __file__, "checkpoint")  # before the seconds that the next lines take

import contextlib
import difflib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernels
from data import facts, tokens
from model import Attention, from_checkpoint
from nanolab import hf
from nanolab.run import (UserError, as_user_error, command, find_checkpoint, load_checkpoint, override, replacing,
                         resolve_device)

# --- What ---
checkpoint = None        # run directory or checkpoint file of train_facts.py, or a folder (may be typed as a bare word)
weights = "raw"          # [raw, ema] which weights
attribute = "birth_place"  # what the linear map has to say
part = "day"             # [day, month, year] which part of a date
asked = None             # the attribute that the question names; none: the same
n_people = 256           # [>= 4, <= 100_000] of a folder: how many people, whom the prompts tell of
# --- How ---
l2 = 1e-2                # [>= 0.0, <= 1e6] penalty on the linear map's weights
steps = 100              # [>= 1, <= 100_000] steps of L-BFGS at most
seed = 0                 # [>= 0] which people are held out from the linear map
device = "auto"          # auto, cpu, cuda, cuda:1, ...


DATES = ("birth_date", "birthday")


class Probe:
    """The identity, which remembers what passed it: `x = probe(x)` anywhere in a model.

    `.forward`: a list of copies of x, one for each time that something passed, the oldest first. `.backward`: a list as
    long, of the gradients that came back to each, None where none did (or gradients is off). All are detached. What a
    layer computes again in its backward pass (checkpoint_activations) does not count. `close()` ends it; what was
    recorded stays.
    """

    def __init__(self, gradients=False):
        self.gradients, self.open = gradients, True
        self._passes = []                                    # [copy of x, gradient or None]

    def __call__(self, x):
        """x, any tensor, as it is."""
        # Past the public interface, as torch.utils.checkpoint itself: inside a backward pass, so x is computed again.
        if self.open and torch._C._current_graph_task_id() < 0:
            self._passes.append([x.detach().clone(), None])  # a later operation may write into x
            if self.gradients and x.requires_grad:
                x.register_hook(partial(self._came_back, self._passes[-1]))
        return x

    def _came_back(self, kept, gradient):
        if self.open:
            kept[1] = gradient.detach().clone()

    def close(self):
        """Records no more, neither what passes nor what comes back to what has passed."""
        self.open = False

    @property
    def forward(self):
        """What passed, the oldest first."""
        return [x for x, _ in self._passes]

    @property
    def backward(self):
        """The gradients of what passed, in the same order."""
        return [gradient for _, gradient in self._passes]


@contextlib.contextmanager
def record(model, places, gradients=False):
    """{place: Probe} of the passes of `model`, the uncompiled one, inside the `with` block; nothing stays in it after
    that.

    places: "embed", the stream (B, T, C) before the first layer; or names of `model.named_modules()`, whose outputs are
    recorded: "blocks.3" the stream after layer 3, "blocks.3.mixer" and "blocks.3.ff" what its branches give before
    dropout and scale, "norm" the stream after the last norm, (A, B, T, C) in a pass with losses of A layers. gradients:
    as Probe says. Raises ValueError for a place that is not there, and in the pass for one that gives no tensor.
    """
    probes = {place: Probe(gradients) for place in places}
    with passing(model, probes), contextlib.ExitStack() as stack:
        for probe in probes.values():
            stack.callback(probe.close)
        yield probes


@contextlib.contextmanager
def passing(model, functions):
    """Within the block, what passes each place of {place: function} is what the function makes of it, a tensor; of two
    blocks, one in the other, first the outer one's. Places and errors as of `record`."""
    modules = dict(model.named_modules())
    first = {} if "embed" in modules or "blocks.0" not in modules else {"embed": modules["blocks.0"]}
    for place in functions:
        if place not in modules and place not in first:
            near = difflib.get_close_matches(place, [*first, *modules], 1, 0)
            raise ValueError(f"the model has no place {place!r}; the nearest is {near[0]!r}")

    def passed(place, output):
        if not torch.is_tensor(output):
            raise ValueError(f"place {place!r} gives no tensor, but {type(output).__name__}")
        return functions[place](output)
    with contextlib.ExitStack() as stack:
        for place in functions:
            if place in first:
                handle = first[place].register_forward_pre_hook(
                    lambda _, args, place=place: (passed(place, args[0]), *args[1:]))
            else:
                handle = modules[place].register_forward_hook(lambda _, args, out, place=place: passed(place, out))
            stack.callback(handle.remove)
        yield


def patched(model, values):
    """Within the block {place: value} stands where the model's own would: a number, a tensor that (B, T, C) is a shape
    of, or a function of the model's own. ValueError as `record`, and in the pass for a shape that does not fit."""
    def put(place, value, own):
        new = value(own) if callable(value) else torch.as_tensor(value).to(own)
        try:
            return new.expand_as(own)
        except RuntimeError:
            raise ValueError(f"place {place!r} is {tuple(own.shape)}, the value for it {tuple(new.shape)}") from None
    return passing(model, {place: partial(put, place, value) for place, value in values.items()})


@contextlib.contextmanager
def attending(model):
    """{name of a mixer: (B, H, T, S), the weights of its last pass over several tokens} inside the block, of those that
    are softmax attention over keys and values. It is linear in its values: unit vectors are answered by the weights."""
    found, mixers = {}, {name: module for name, module in model.named_modules()
                         if getattr(type(module), "attend", None) is Attention.attend}

    def attend(name, q, k, v, *given, **how):
        units = torch.eye(k.size(2)).to(v).expand(*k.shape[:3], -1)                      # (B, G, S, S)
        with kernels.using("torch"):                         # a kernel wants values as wide as keys
            found[name] = Attention.attend(mixers[name], q, k, units, *given, **how).detach()
        return Attention.attend(mixers[name], q, k, v, *given, **how)
    try:
        for name, mixer in mixers.items():
            mixer.attend = partial(attend, name)
        yield found
    finally:
        for mixer in mixers.values():
            del mixer.attend


class Accuracies(NamedTuple):
    """Shares of rows that are right: of a probe on rows that it did not see and on those that it learned from, and, on
    the former, of always saying the class that is most frequent among the latter."""

    held_out: float
    training: float
    majority: float


def draw_training(labels, seed):
    """Rows to learn from, (M,) int64: of each class in labels (N,) int64 a random four in five, rounded, but at least
    one, and one less than all where there are several. The same seed, the same rows."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([rows[:max(1, min(len(rows) - 1, round(0.8 * len(rows))))] for rows in by_class])


def linear_probe(features, labels, n_classes, rows=None, l2=1e-2, steps=100):
    """How well a linear map reads the labels off the features: Accuracies of a multinomial logistic regression.

    features: (N, C), of any type and device. labels: (N,) whole numbers from 0 to n_classes - 1. rows: those to learn
    from, (M,) int64, None: as draw_training of seed 0; the others are held out. Features are shifted and scaled to mean
    0 and deviation 1 over the training rows; one that is constant there counts as 0. Minimises the mean cross-entropy
    in nats plus l2 / 2 times the squared weights (without biases), from zero by L-BFGS (Liu & Nocedal 1989), at most
    `steps` iterations, in float64 on the CPU. Raises ValueError for shapes that do not fit, numbers that are not
    finite, labels out of range, a class without a training row, and where no row is held out.
    """
    features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    if features.dim() != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(f"features are {tuple(features.shape)} and labels {tuple(labels.shape)}, but must be (N, C) "
                         "and (N,)")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}, but must be whole numbers")
    with torch.inference_mode(False), torch.enable_grad():
        x = features.detach().to("cpu", torch.float64, copy=True)                        # (N, C)
        y = labels.to("cpu", torch.int64, copy=True)                                     # (N,)
        if not x.isfinite().all():
            raise ValueError("features hold numbers that are not finite")
        if not 0 <= int(y.min()) <= int(y.max()) < n_classes:
            raise ValueError(f"labels reach from {int(y.min())} to {int(y.max())}, but must be from 0 to "
                             f"{n_classes - 1}")
        learned = draw_training(y, 0) if rows is None else rows
        missing = (y[learned].bincount(minlength=n_classes) == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"class {missing[0]} has no row to learn from")
        held = torch.ones(len(y), dtype=torch.bool).index_fill(0, learned, False)
        if not held.any():
            raise ValueError("no row is held out: every class needs more rows")
        mean, deviation = x[learned].mean(0), x[learned].std(0, correction=0)
        varies = deviation > 1e-6 * mean.abs()               # else only by rounding, which a float32 model may do
        x = torch.where(varies, (x - mean) / deviation.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
        weight = torch.zeros(n_classes, x.size(1), dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(n_classes, dtype=x.dtype, requires_grad=True)
        fit = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")
        seen, truth = x[learned], y[learned]

        def objective():
            fit.zero_grad()
            loss = F.cross_entropy(F.linear(seen, weight, bias), truth) + l2 / 2 * weight.square().sum()
            loss.backward()
            return loss
        fit.step(objective)
        right = F.linear(x, weight, bias).argmax(1) == y                                 # (N,)
        guess = truth.bincount(minlength=n_classes).argmax()
    return Accuracies(*(rows.double().mean().item() for rows in (right[held], right[learned], y[held] == guess)))


def layers_that_know(model, prompts, labels, places=None, l2=1e-2, steps=100, seed=0):
    """At which places a label can be read off the state at the end of a prompt: {place: Accuracies}, in their order.

    model: a Transformer or what has its face: `model(x)` for x (B, T) int64, causal; run in eval mode, in the caller's
    autocast. prompts: N lists of ids, of any lengths. labels: N whole numbers from 0 without a gap; four in five
    prompts of each are learned from. places: as `record` names them, (B, T, C) (None: "embed" and the stream after each
    layer). The rest as in linear_probe. Raises ValueError as record and linear_probe do, and for empty or too long
    prompts, counts that do not fit, and places of another shape.
    """
    if places is None:
        places = ["embed", *(f"blocks.{layer}" for layer in range(len(model.blocks)))]
    if not len(prompts) == len(labels) > 0:
        raise ValueError(f"there are {len(prompts)} prompts and {len(labels)} labels: there must be as many of each, "
                         "and one at least")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= model.config.block_size:
            raise ValueError(f"prompt {i} has {len(prompt)} ids, but there must be from 1 to block_size "
                             f"{model.config.block_size}")
    labels = torch.as_tensor(labels)
    rows, n_classes = draw_training(labels, seed).sort().values, int(labels.max()) + 1
    return {place: linear_probe(found, labels, n_classes, rows, l2, steps)
            for place, found in last_states(model, prompts, places).items()}


class Recorded(dict):
    """{place: (B, T, C)} of one pass, detached. `.logits` (B, T, V), `.loss` () in nats a token, `.attention` as of
    `attending`, `.gradients` {place: (B, T, C)} of the loss, {} where they were not asked for."""


class Opened:
    """A model to look into by hand: `.model`, in eval mode, and the `.settings` of its run. See `open_run`."""

    def __init__(self, model, settings, encode):
        self.model, self.settings, self._encode = model, settings, encode
        branches = [f"blocks.{layer}{branch}" for layer in range(len(model.blocks)) for branch in (".mixer", ".ff", "")]
        self.places = ["embed", *(place for place in branches if place in dict(model.named_modules())), "norm"]

    def ids(self, text):
        """(B, T) int64 of a text, of ids, or of rows of ids. ValueError: a text for a model that reads none, none at
        all, or more than block_size."""
        if isinstance(text, str):
            if self._encode is None:
                raise ValueError(f"a model of task {self.settings['task']} reads ids, not a text")
            text = self._encode(text)
        x = torch.atleast_2d(torch.as_tensor(text, dtype=torch.int64)).to(next(self.model.parameters()).device)
        if x.dim() != 2 or not 1 <= x.size(1) <= self.model.config.block_size:
            raise ValueError(f"ids are {tuple(x.shape)}, but must be (B, T) with T from 1 to block_size "
                             f"{self.model.config.block_size}")
        return x

    def record(self, text, places=None, gradients=False, targets=None, patch=None):
        """The Recorded of a pass over `ids(text)`. places: None: all of `.places`. targets: (B, T) int64, -1 where
        nothing counts; None: the id that comes next. patch: as `patched`. ValueError as of these."""
        x = self.ids(text)
        y = F.pad(x[:, 1:], (0, 1), value=-1) if targets is None else torch.as_tensor(targets).to(x.device)
        with torch.set_grad_enabled(gradients), self.patch(patch or {}), attending(self.model) as weights, record(
                self.model, self.places if places is None else places, gradients) as probes:
            logits = self.model(x)                                                       # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), y.reshape(-1), ignore_index=-1)
            if gradients:
                loss.backward()
                self.model.zero_grad()
        found = Recorded({place: probe.forward[-1] for place, probe in probes.items() if probe.forward})
        found.gradients = {place: probe.backward[-1] for place, probe in probes.items() if gradients and probe.backward}
        found.logits, found.loss, found.attention = logits.detach(), loss.detach(), weights
        return found

    def patch(self, values):
        """`patched` of the model."""
        return patched(self.model, values)

    def fit(self, prompts, labels, picture=None, **how):
        """`layers_that_know` of texts or lists of ids; picture: a file for its curves, .png, .pdf or .svg."""
        found = layers_that_know(self.model, [self.ids(prompt)[0].tolist() for prompt in prompts], labels, **how)
        if picture is not None:
            draw(found, Path(picture))
        return found


def open_run(path, weights="raw", device="cpu"):
    """The Opened of a run of train_enwik8.py or train_facts.py, a checkpoint, or a folder of weights. UserError: none
    of these, no such `weights` (raw, ema), another database than the run's."""
    path = find_checkpoint(path)
    loaded, model = hf.load_model(path, weights)
    settings, tokenizer = loaded["settings"], hf.tokenizer_in(loaded)
    encode = tokenizer and (lambda text: tokens.encode_corpus(tokenizer, text.encode()).tolist())
    if settings.get("task") in facts.MODES:
        encode = facts.open_facts(settings)[1].encode
    return Opened(model.for_inference().eval().to(resolve_device(device, "float32")[0]), settings, encode)


def draw(found, path):
    """The Accuracies of `layers_that_know` as a picture, over the places."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=100)
    axes = figure.subplots()
    for name, style in zip(Accuracies._fields, ("o-", "o--", "k:")):
        axes.plot(list(found), [getattr(one, name) for one in found.values()], style, label=name.replace("_", " "))
    axes.set(ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png")


@torch.no_grad()
def last_states(model, prompts, places, batch_size=64):
    """{place: (N, C) on the CPU}: what each place gives at the last id of each of N prompts; see layers_that_know."""
    found, where, training = {place: [] for place in places}, next(model.parameters()).device, model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start:start + batch_size]
            last = torch.tensor([len(prompt) - 1 for prompt in batch], device=where)     # (B,)
            T = int(last.max()) + 1
            x = torch.tensor([[*prompt] + [0] * (T - len(prompt)) for prompt in batch], device=where)    # (B, T)
            with record(model, places) as probes:
                model(x)
            for place, probe in probes.items():
                state = probe.forward[-1] if probe.forward else None
                if state is None or state.dim() != 3 or state.shape[:2] != x.shape:
                    raise ValueError(f"place {place!r} gives {'nothing' if state is None else tuple(state.shape)}, not "
                                     f"(B, T, C) with B {len(batch)} and T {T}")
                found[place].append(state[torch.arange(len(batch), device=where), last].cpu())               # (B, C)
    finally:
        model.train(training)
    return {place: torch.cat(states) for place, states in found.items()}


def value_classes(people, attribute, part="day"):
    """(N,) int64, a class for each person's value, without gaps: a part of a date, else the whole value."""
    texts = people.values[attribute]
    if attribute in DATES:
        texts = [text.replace("/", " ").split()[("day", "month", "year").index(part)] for text in texts]
    return torch.tensor([sorted(set(texts)).index(text) for text in texts])


def trained_people(path):
    """(model, People, their text to ids, {kind: (their numbers, what asks one of them for an attribute)}) of a run."""
    loaded = load_checkpoint(path, "train_facts")
    if loaded["settings"]["task"] not in facts.MODES:
        raise UserError(f"{path} is no model of people: train_facts.py trains them")
    with as_user_error(f"{path}: "):
        model = from_checkpoint(loaded, weights)
    people, vocabulary, _ = facts.open_facts(loaded["settings"])
    tokens.check(vocabulary, loaded["tokenizer"])
    asks = partial(facts.question, form=loaded["settings"]["form"])
    return model, people, vocabulary.encode, {"trained": (range(people.n), asks),
                                              "unseen": (range(people.n, len(people)), asks)}


def told_people(path):
    """The same of a folder: n_people of notes with plain names, whom the prompt tells of or not."""
    loaded, model = hf.load_model(path, weights)
    people, asks = facts.people(n_people, seed, names="plain"), partial(facts.question, form="natural")

    def tells(person, attribute):
        lines = [f"{asks(person, name)} {person.values[name]}" for name in people.attributes]
        return "\n".join([*lines, asks(person, attribute)])
    return model, people, hf.tokenizer_in(loaded).encode, {"told": (range(n_people), tells),
                                                           "not told": (range(n_people), asks)}


@command
def main():
    """Asks every layer of a model of people for one attribute."""
    settings = override(globals(), positional="checkpoint")
    if checkpoint is None:
        raise UserError("which run? python -m nanolab.probe runs/train_facts/NAME")
    if attribute not in DATES:
        settings.refuse_idle(("part",), f"with --attribute {attribute}, which is no date")
    where, _ = resolve_device(device, "float32")
    path = find_checkpoint(checkpoint)
    if path.is_dir():
        model, people, encode, groups = told_people(path)
    else:
        settings.refuse_idle(("n_people",), "of a run, which has people of its own")
        model, people, encode, groups = trained_people(path)
    model = model.for_inference().to(where)
    for name in (attribute, asked):
        if name is not None and name not in people.attributes:
            raise UserError(f"there is no attribute {name!r}: these people have {', '.join(people.attributes)}")
    classes, found = value_classes(people, attribute, part), {}
    for kind, (numbers, asks) in groups.items():
        labels = classes[list(numbers)]
        known = labels.bincount() >= 2                           # a value of one person alone cannot be held out
        numbers = [i for i, label in zip(numbers, labels.tolist()) if known[label]]
        if sum(known.tolist()) < 2:
            print(f"{kind} people left out: among {len(labels):,} fewer than 2 values of {attribute} occur twice")
            continue
        labels = classes[numbers].unique(return_inverse=True)[1]
        prompts = [encode(asks(people[i], asked or attribute)) for i in numbers]
        if (longest := max(map(len, prompts))) > model.config.block_size:
            raise UserError(f"a question about {asked or attribute} has {longest} tokens, more than block_size "
                            f"{model.config.block_size}")
        found[kind] = layers_that_know(model, prompts, labels, l2=l2, steps=steps, seed=seed)
        print(f"{kind} people: {len(numbers):,}, {len(labels.unique())} values of {attribute}")
    if not found:
        raise UserError(f"nothing to learn from: a value of {attribute} must occur twice, and two values must")
    print(f"{'place':<10}" + "".join(f"{f'{kind}: held out':>20}{'learned from':>14}{'majority':>10}"
                                     for kind in found))
    for place in next(iter(found.values())):
        print(f"{place:<10}" + "".join(f"{one[place].held_out:>20.3f}{one[place].training:>14.3f}"
                                       f"{one[place].majority:>10.3f}" for one in found.values()))


if __name__ == "__main__":
    main()
