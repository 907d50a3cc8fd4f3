"""What train_facts.py trains and evaluate.py asks, each said once: text, facts about people, associative recall,
choices between texts.

A task opens its data from a dict of settings. `measure` asks a model under one of its `protocols` and yields (line of
metrics, what it was counted from); `prepare` makes the batches to train on, and then `evaluate` and `last` are what a
trainer logs. `say`, `result` and `cost` read a line of any task.
"""
import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from data import facts, mqar, text
from data.tokenized import open_text
from nanolab.dialogs import converse
from nanolab.run import UserError, onto
from nanolab.score import LN2, evaluating, parse_protocol, score, target_bits


class Rows(text.Batches):
    """Endless batches out of rows of equal length, shuffled anew for every pass; a batch may span two passes.

    x (N, T) int64 and y (N, T) int64, -1 where no loss is taken. seed: of the generator, which draws nothing else.
    Batches' x are on the device; their y stay on the CPU, where a loop counts targets without waiting for it.
    """
    mode = "epochs"

    def __init__(self, x, y, batch_size, seed, device):
        self.x, self.y, self.batch_size, self.passes = x.to(device), y, batch_size, 0
        self.generator = torch.Generator().manual_seed(seed)
        self._start_pass()

    def _start_pass(self):
        self.position, self._length, self._before = 0, len(self.x), self.generator.get_state()
        self._order = torch.randperm(len(self.x), generator=self.generator)

    def next(self):
        """-> x (B, T), y (B, T)."""
        chosen = self._places()
        return self.x[onto(self.x.device, chosen)], self.y[chosen]

    def _kind(self):
        return {"rows": len(self.x)}

    def load_state_dict(self, state):
        """Goes on where state was taken. Raises UserError where there are other rows."""
        if state["rows"] != len(self.x):
            raise UserError(f"the checkpoint was trained on {state['rows']:,} rows, here are {len(self.x):,}")
        super().load_state_dict(state)


# --- Facts by real generation ---


@torch.no_grad()
def recall(model, people, vocabulary, database=None, unseen=False, form="short", prompts=None, batch_size=512,
           prefix=False):
    """Asks for facts and lets the model generate, greedily: a line of metrics, with shares of all `prompts`.

    database: a facts.Database that answers calls (protocol "tool"); None: calls are forbidden, and so is the token that
    opens one, if no value has it: the model has to say it by itself ("no_tool"). unseen: of people that were held out
    of training. prompts: so many facts, evenly spread over people and attributes; None: all. Right is an answer whose
    whole text is the value, followed by END; a right call is the only one and word for word the right one; endless is
    what came to no end. A row may be 8 tokens longer than the longest right one, and makes one call; with learned
    positions no longer than the table lets any row become. prefix: as the model was trained. Leaves the model in the
    mode it was in.
    """
    n, first, attributes = people.unseen if unseen else people.n, people.n if unseen else 0, people.attributes
    number = n * len(attributes) if prompts is None else min(prompts, n * len(attributes))
    asked = [(people[first + i * n // number], attributes[i % len(attributes)]) for i in range(number)]
    began, special = time.perf_counter(), vocabulary.specials
    rows = [[vocabulary.encode(segment.text) for segment in facts.in_tool(person, attribute, form, i)]
            for i, (person, attribute) in enumerate(asked)]
    longest = _longest_reply(model.config, asked, rows, vocabulary, database)
    never, call, tool = [special["PAD"], special["ANSWER"]], None, None
    if database is None:
        never += _opening(people, vocabulary, rows[0][1][0])
    else:
        def tool(ids):
            return vocabulary.encode(database.answer(vocabulary.decode(ids))) + [special["ANSWER"]]
        call = special["CALL"]
    counts, found, order = Counter(), Counter(), sorted(range(number), key=lambda i: len(rows[i][0]))
    with evaluating(model):
        for start in range(0, number, batch_size):
            batch = order[start:start + batch_size]
            replies = converse(model, [rows[i][0] for i in batch], longest, special["END"], tool=tool, call=call,
                               ban=never, prefix=prefix)
            for i, reply in zip(batch, replies):
                person, attribute = asked[i]
                right = reply.reason == "end" and _answer(reply, vocabulary) == person.values[attribute]
                found[attribute] += right
                counts.update(right=right, called=bool(reply.calls), endless=reply.reason != "end",
                              right_calls=len(reply.calls) == 1 and reply.calls[0][0] == rows[i][1])
    asked_of = Counter(attribute for _, attribute in asked)
    return dict(protocol="tool" if database else "no_tool", people="unseen" if unseen else "trained",
                accuracy=counts["right"] / number, prompts=number, endless=counts["endless"] / number,
                evaluation_seconds=time.perf_counter() - began,
                **{f"accuracy_{name}": found[name] / times for name, times in asked_of.items()},
                **({"calls": counts["called"] / number, "right_calls": counts["right_calls"] / number}
                   if database else {}))


def _longest_reply(config, asked, rows, vocabulary, database):
    """Ids that a reply may have: UserError where learned positions leave no room for any."""
    longest = max(len(row[3]) + (len(row[1]) if database else 0) for row in rows) + 2 + 8
    if not config.learned_positions:
        return longest
    told = max(len(vocabulary.encode(text)) for text in (
        facts.NO_RESULT, facts.NO_ATTRIBUTE, facts.NO_CALL, *(person.values[name] for person, name in asked)))
    longest = min(longest, config.block_size - max(len(row[0]) for row in rows) - (told + 1 if database else 0))
    if longest < 1:
        raise UserError(f"block_size {config.block_size} leaves no room for an answer with learned positions")
    return longest


def _opening(people, vocabulary, token):
    """The ids that are forbidden where calls are: CALL, and the first `token` of a call, if no value has it."""
    values = {text for name in people.attributes for text in people.values[name]}
    needed = any(token in vocabulary.encode(text) for text in values)
    return [vocabulary.specials["CALL"]] + [token] * (not needed)


def _answer(reply, vocabulary):
    """What the model said by itself, after its last call."""
    own = [token for token, given in zip(reply.tokens, reply.injected) if not given]
    said = own[len(reply.calls[-1][0]) + 1:] if reply.calls else own         # after the call and its end
    return vocabulary.decode(said[:-1] if said[-1:] == [vocabulary.specials["END"]] else said)


@torch.no_grad()
def bits_of(model, people, vocabulary, form="short", batch_size=512, prefix=False):
    """Bits about the people to train on that a model holds in its weights, a float: see facts.bits_stored.

    The nats are those of a value's own tokens, teacher-forced after the question; END, and a city of work, which
    follows from the employer, are left out.
    """
    attributes = [name for name in people.attributes if name != "work_city"]
    dialogs = [facts.in_weight(people[i], name, form, i) for i in range(people.n) for name in attributes]
    ids, mask = facts.rows(dialogs, vocabulary)
    asked = mask.byte().argmax(1)                                                        # (N,) tokens of the question
    mask &= ids < vocabulary.n_text                                                      # without END
    device, nats = next(model.parameters()).device, []
    with evaluating(model):
        for x, wanted, n in zip(ids.split(batch_size), mask.split(batch_size), asked.split(batch_size)):
            x, wanted = x.to(device), wanted[:, 1:].to(device)
            logits = model(x[:, :-1], prefix=n.to(device) if prefix else None)
            cost = target_bits(logits, x[:, 1:]) * LN2                                   # (B, T - 1)
            nats.append(cost.masked_fill(~wanted, 0).sum(1).cpu())
    return facts.bits_stored(torch.cat(nats).view(people.n, -1).sum(1), people.bits)


@torch.no_grad()
def answered(model, x, y, batch_size=512):
    """Accuracy and loss at the labelled places of rows x (N, T), labels y (N, T), -1 where there is none: a line of
    metrics. Leaves the model in the mode it was in."""
    right, nats = 0, 0.0
    with evaluating(model):
        for a, b in zip(x.split(batch_size), y.split(batch_size)):
            here = b >= 0
            h, _ = model.stream(a, model.place(a, None))                                 # (B, T, C)
            logits = model.predict(h[here][None])[0]                                     # (labels, V)
            right += int((logits.argmax(-1) == b[here]).sum())
            nats += F.cross_entropy(logits.float(), b[here], reduction="sum").item()
    prompts = int((y >= 0).sum())
    return dict(protocol="mqar", accuracy=right / prompts, loss=nats / prompts, prompts=prompts)


# --- Choices between texts ---

def read_choices(path):
    """[(context, [choice], answer)] of a .jsonl file: a line has `context`, `choices` and `answer`, or is HellaSwag's,
    with `ctx`, `endings`, `label`, whose texts are made as lm-evaluation-harness 0.4.13 makes them. UserError, naming
    the line: what is missing or of another kind, fewer than two choices, an empty one, an answer that is none."""
    try:
        lines, found = Path(path).read_text(encoding="utf-8").splitlines(), []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tasks {path}: {getattr(error, 'strerror', None) or 'it is no UTF-8'}") from None
    for number, line in enumerate(lines, 1):
        try:
            found += [_choices(json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as error:
            said = "it is no JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else error
            raise UserError(f"{path}, line {number}: {said}") from None
    if not found:
        raise UserError(f"--tasks {path}: it has no question")
    return found


def _choices(d):
    """(context, choices, answer) of a line's value. ValueError: what is wrong with it."""
    names = "context", "choices", "answer"
    if isinstance(d, dict) and "endings" in d:
        names = "ctx", "endings", "label"
    if not isinstance(d, dict) or any(name not in d for name in names):
        raise ValueError("it needs context, choices and answer, or HellaSwag's ctx, endings and label")
    context, choices, answer = (d[name] for name in names)
    if not isinstance(context, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"{names[0]} must be a text, {names[1]} a list of texts")
    if names[0] == "ctx":
        parts = [d.get(name) for name in ("activity_label", "ctx_a", "ctx_b")]
        if all(isinstance(part, str) for part in parts):
            context = f"{parts[0]}: {parts[1]} {parts[2].capitalize()}"
        context, *choices = map(_without_brackets, (context, *choices))
        answer = int(answer) if isinstance(answer, str) and answer.isdecimal() else answer
    if len(choices) < 2 or "" in choices:
        raise ValueError(f"{names[1]} must be two or more, none empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{names[2]} must be from 0 to {len(choices) - 1}, the number of a choice")
    return context, choices, answer


def _without_brackets(text):
    """A text of HellaSwag without what WikiHow left in it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def encode_choice(tokenizer, context, choice, config):
    """(ids, n): the last n of the ids are those of a choice behind its context, as lm-evaluation-harness has them.

    Between the two is a space. White space at the end of the context counts as the choice's. What both make together is
    encoded, and the choice has what is longer than the context's ids alone. In place of an empty context is the id that
    ends a document, or a newline. Of more than block_size + 1 ids the first are cut off. UserError: the choice alone
    has more than block_size, or none.
    """
    start, T = context.rstrip(), config.block_size
    before = tokenizer.encode(start or "\n")
    if start:
        ids = tokenizer.encode(f"{context} {choice}")
    else:
        before = [tokenizer.size] if config.vocab_size == tokenizer.size + 1 else before
        ids = before + tokenizer.encode(f" {choice}")
    n = len(ids) - len(before)
    if not 0 < n <= T:
        raise UserError(f"the choice {choice[:40]!r} has {n} ids, and the model's block_size is {T}")
    return ids[-(T + 1):], n


@torch.no_grad()
def loglikelihoods(model, rows, batch_size=32):
    """ln p, a list of float, of the last n of each row's ids after those before them; rows = [(ids, n)], of at most
    block_size + 1 ids. Leaves the model in the mode it was in."""
    found, order = [0.0] * len(rows), sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = order[start:start + batch_size]
            T = max(len(rows[i][0]) for i in batch)
            ids = torch.tensor([rows[i][0] + [0] * (T - len(rows[i][0])) for i in batch])  # nothing looks ahead
            end = torch.tensor([[len(rows[i][0]), rows[i][1]] for i in batch])
            place = torch.arange(1, T)
            here = (place < end[:, :1]) & (place >= end[:, :1] - end[:, 1:])             # (B, T - 1)
            x, here = ids.to(model.embed.device), here.to(model.embed.device)
            h, _ = model.stream(x[:, :-1], model.place(x[:, :-1], None))                 # (B, T - 1, C)
            nats = target_bits(model.predict(h[here][None])[0], x[:, 1:][here]).cpu() * LN2
            for i, cost in zip(batch, nats.split(end[:, 1].tolist())):
                found[i] = -cost.sum().item()
    return found


def wilson(right, n, z=1.959964):
    """(low, high): Wilson's interval (1927) of a share of which `right` of n were seen, 95 %."""
    p, spread = right / n, z * z / n
    middle, half = p + spread / 2, z * math.sqrt(p * (1 - p) / n + spread / n / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


# --- Tasks ---

class Task:
    """What all tasks have: settings (a dict), `where` their tensors are, and how a trainer evaluates.

    Of each: `protocols`; `source`, where its data came from; `unused`, the settings of evaluate.py that say nothing
    about it; `header`, over its table, and `row`, a line of it, with the bootstrap interval of so many resamples;
    `prepare`, which makes the batches to train on.
    """
    final = None                 # the setting that says how much the last evaluation asks; None: everything

    def __init__(self, settings, where):
        self.settings, self.where = settings, where

    def check(self, protocol, config):
        """UserError where a model of this config cannot be asked so."""
        if protocol not in self.protocols:
            raise UserError(f"protocol {protocol!r}: a model of task {self.settings['task']} can be asked by "
                            f"{' and '.join(self.protocols)}")

    def evaluate(self, model, last):
        """Yields a trainer's lines of metrics, those of what the task is about first."""
        few = self.settings.get(self.final if last else "eval_prompts")
        for protocol in self.protocols:
            for line, _ in self.measure(model, protocol, self.settings["eval_batch_size"], few):
                yield line

    def last(self, model):
        """What a summary says beyond the evaluation: nothing."""
        return {}


class Text(Task):
    """Next-token prediction: bytes, or where the settings name a tokenizer its ids, of one `split` of a text.

    tokenizer: in place of the settings'. UserError: as text.load and open_text, or there is no such split.
    """
    unused = ("database", "prompts")
    protocols = ("block",)
    header = (f"{'split':<6} {'protocol':<12} {'bits/byte':>10} {'95 % interval':>19} {'nats/target':>11} "
              f"{'bytes scored':>13} {'seconds':>8}")

    def __init__(self, settings, where, split="val", tokenizer=None):
        super().__init__(settings, where)
        self.split, self.sizes = split, None
        if tokenizer or "tokenizer" in settings:
            self.opened = open_text(settings, tokenizer)
            self.sizes = self.opened.sizes.to(where)
        else:
            self.opened = text.load(settings["dataset"], settings["max_bytes"], where, text.ending(settings))
        if getattr(self.opened, split) is None:
            raise UserError(f"{settings['dataset']} has no {split} split")
        self.data, self.source = getattr(self.opened, split).to(where), self.opened.source

    def check(self, protocol, config):
        parse_protocol(protocol, config, self.data.numel())

    def measure(self, model, protocol, batch_size, few=None):
        """Yields (line of metrics, Score). few: so many windows of the block protocol."""
        found = score(model, self.data, protocol, batch_size, few, self.sizes)
        yield dict(protocol=found.protocol, loss=found.loss, bpb=found.bpb, bytes=found.bytes), found

    def row(self, line, found, resamples, chunk):
        low, high = found.interval(resamples, chunk)
        interval = "too few bytes" if math.isnan(low) else f"{low:.4f} .. {high:.4f}"
        return (f"{self.split:<6} {found.protocol:<12} {found.bpb:>10.4f} {interval:>19} {found.loss:>11.4f} "
                f"{found.bytes:>13,} {found.seconds:>8.1f}")

    def prepare(self):
        s, opened = self.settings, self.opened
        self.block_size = s["block_size"] or 128
        self.batches = opened.batches(s["batch_size"], self.block_size, s["batching"], s["data_seed"], self.where)
        self.vocab_size, self.n_rows, self.shown = opened.vocab_size, opened.rows, self.source
        self.fingerprint = opened.tokenizer.fingerprint
        if s["eval_interval"]:
            text.check_split(self.data, self.block_size, "tokens")
        self.example = f"  {opened.tokenizer.decode(self.data[:40].tolist())!r}"


class Facts(Task):
    """Dialogs about people, asked by real generation. UserError: as facts.open_facts."""
    final = "final_prompts"
    unused = ("split", "dataset", "max_bytes")
    header = (f"{'people':<8} {'protocol':<9} {'accuracy':>9} {'called':>7} {'right calls':>12} {'no end':>7} "
              f"{'prompts':>8} {'seconds':>8}")

    def __init__(self, settings, where):
        super().__init__(settings, where)
        self.people, self.vocabulary, self.database = facts.open_facts(settings)
        self.protocols = ("no_tool",) if settings["task"] == "in_weight" else ("tool", "no_tool")
        self.source = self.people.describe()

    def measure(self, model, protocol, batch_size, few=None):
        """Yields (line of metrics, None) of people that were trained on, and of unseen ones. few: so many of each
        kind's questions."""
        for unseen in (False, True) if self.people.unseen else (False,):
            yield recall(model, self.people, self.vocabulary, self.database if protocol == "tool" else None, unseen,
                         self.settings["form"], few, batch_size, self.settings["prefix"]), None

    def row(self, line, *_):
        rates = [f"{line[key]:.4f}" if key in line else "" for key in ("calls", "right_calls")]
        return (f"{line['people']:<8} {line['protocol']:<9} {line['accuracy']:>9.4f} {rates[0]:>7} {rates[1]:>12} "
                f"{line['endless']:>7.4f} {line['prompts']:>8,} {line['evaluation_seconds']:>8.1f}")

    def prepare(self):
        s = self.settings
        dialogs = facts.dialogs(self.people, s["task"], s["form"], s["data_seed"], s["tool_share"])
        ids, mask = facts.rows(dialogs, self.vocabulary, everything=s["loss_on"] == "all")
        self.batches = Rows(ids[:, :-1], ids.masked_fill(~mask, -1)[:, 1:], s["batch_size"], s["data_seed"], self.where)
        self.n_rows, self.vocab_size, self.fingerprint = len(ids), self.vocabulary.size, self.vocabulary.fingerprint
        self.block_size = s["block_size"] or 16 * -(-2 * ids.size(1) // 16)              # wrong replies may be longer
        if ids.size(1) > self.block_size:
            raise UserError(f"block_size is {s['block_size']}, but the longest dialog has {ids.size(1)} tokens")
        self.shown = f"{self.source}; {self.vocab_size} tokens, {ids.size(1)} in a row at most"
        self.example = facts.show(dialogs[0])

    def last(self, model):
        """The bits about people that the weights hold."""
        s = self.settings
        if s["task"] != "in_weight":
            return {}
        stored = bits_of(model, self.people, self.vocabulary, s["form"], s["eval_batch_size"], s["prefix"])
        return {"bits": stored, "bits_per_parameter": stored / model.n_params(),
                "bits_of_all": self.people.n * self.people.bits}


class Recall(Task):
    """Rows of multi-query associative recall."""
    unused = ("split", "dataset", "max_bytes", "database")
    protocols = ("mqar",)
    header = f"{'protocol':<9} {'accuracy':>9} {'nats/query':>11} {'queries':>8}"

    def __init__(self, settings, where):
        super().__init__(settings, where)
        self.block_size = settings["block_size"] or 64
        self.x, self.y = (part.to(where) for part in self._split(1)[1])
        self.source = (f"mqar: {len(self.x):,} held-out rows of {self.block_size} tokens with {settings['pairs']} "
                       "pairs")

    def _split(self, n_rows):
        """((x, y) to train on, (x, y) held out), each (N, T) int64; the second does not depend on n_rows."""
        s = self.settings
        return mqar.split(n_rows, s["n_test_rows"], self.block_size, s["pairs"], s["mqar_vocab"], s["data_seed"],
                          s["random_non_queries"], s["mqar_alpha"])

    def measure(self, model, protocol, batch_size, few=None):
        """Yields (line of metrics, None). few: so many rows."""
        yield answered(model, self.x[:few], self.y[:few], batch_size), None

    def row(self, line, *_):
        return f"{line['protocol']:<9} {line['accuracy']:>9.4f} {line['loss']:>11.4f} {line['prompts']:>8,}"

    def prepare(self):
        s = self.settings
        self.n_rows, self.vocab_size, self.fingerprint = s["n_rows"], s["mqar_vocab"], None
        self.batches = Rows(*self._split(self.n_rows)[0], s["batch_size"], s["data_seed"], self.where)
        self.shown = (f"mqar: {self.n_rows:,} rows of {self.block_size} tokens with {s['pairs']} pairs, "
                      f"{s['n_test_rows']:,} held out, {self.vocab_size:,} tokens; values are within {s['window']} "
                      f"tokens of {self.last(None)['reachable']:.1%} of the queries")
        self.example = "  " + mqar.example(self.x[0].cpu(), self.y[0].cpu())

    def last(self, model):
        """The reachable share, beside which a window's accuracy means something."""
        return {"reachable": mqar.reachable(self.y.cpu(), self.x.cpu(), self.settings["window"])}


class Choices(Task):
    """Questions of files, each answered by the choice that the model finds likeliest.

    Measures: `acc` by the sum of its log-likelihoods; over its characters `acc_norm`, over its bytes `acc_bytes`, both
    as lm-evaluation-harness has them; over its ids `acc_tokens`. Of equal choices the first one counts.
    """
    unused = ("split", "dataset", "max_bytes", "database", "protocols", "resamples", "chunk", "samples")
    header = (f"{'task':<20} {'measure':<10} {'accuracy':>9} {'95 % interval':>17} {'questions':>10} {'seconds':>8}")

    def __init__(self, settings, where, paths, tokenizer):
        super().__init__(settings, where)
        self.tokenizer, self.questions = tokenizer, {path: read_choices(path) for path in paths}
        self.protocols = tuple(self.questions)
        self.source = ", ".join(f"{len(found):,} questions of {path}" for path, found in self.questions.items())

    def measure(self, model, protocol, batch_size, few=None):
        """Yields (line of metrics, None) of each measure. few: so many questions, evenly spread."""
        began, asked, right = time.perf_counter(), self.questions[protocol], Counter()
        n = min(few or len(asked), len(asked))
        asked = [asked[i * len(asked) // n] for i in range(n)]
        rows = [encode_choice(self.tokenizer, context, choice, model.config)
                for context, choices, _ in asked for choice in choices]
        scores = zip(loglikelihoods(model, rows, batch_size), (n for _, n in rows))
        for _, choices, answer in asked:
            likely = [(score, choice, ids) for choice, (score, ids) in zip(choices, scores)]
            for name, size in (("acc", lambda choice, ids: 1), ("acc_norm", lambda choice, ids: len(choice)),
                               ("acc_bytes", lambda choice, ids: len(choice.encode())),
                               ("acc_tokens", lambda choice, ids: ids)):
                shares = [score / size(choice, ids) for score, choice, ids in likely]
                right[name] += shares.index(max(shares)) == answer
        for name, count in right.items():
            yield dict(protocol=protocol, measure=name, accuracy=count / n, prompts=n,
                       evaluation_seconds=time.perf_counter() - began), None

    def row(self, line, *_):
        low, high = wilson(round(line["accuracy"] * line["prompts"]), line["prompts"])
        return (f"{Path(line['protocol']).name:<20} {line['measure']:<10} {line['accuracy']:>9.4f} "
                f"{low:>7.4f} .. {high:.4f} {line['prompts']:>10,} {line['evaluation_seconds']:>8.1f}")


def kind_of(settings):
    """The class of the task that a script's settings name; of a script that has no setting `task`, Text."""
    return {"text": Text, "mqar": Recall}.get(settings.get("task", "text"), Facts)


# --- What a line of metrics says ---

def cost(line):
    """What a better model has less of."""
    return line["bpb"] if "bpb" in line else 1 - line["accuracy"]


def result(line):
    """What was found, in words."""
    if "bpb" in line:
        return f"{line['bpb']:.4f} bits/byte"
    if "people" in line:
        return f"{line['people']} people {line['accuracy']:.4f} of {line['prompts']:,} answers right"
    return f"{line.get('measure', 'accuracy')} {line['accuracy']:.4f} of {line['prompts']:,} queries"


def say(line):
    """What was found and how, in words."""
    if "bpb" in line:
        return f"{result(line)} = {line['loss']:.4f} nats/token ({line['protocol']}, {line['bytes']:,} bytes)"
    if "people" in line:
        called = f", {line['calls']:.0%} called" if line["protocol"] == "tool" else ""
        return f"{result(line)} (protocol {line['protocol']}{called})"
    return f"{result(line)}, loss {line['loss']:.4f}"
