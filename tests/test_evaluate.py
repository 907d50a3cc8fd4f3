"""What a split costs: every byte scored once under each protocol against a pass of its own, intervals, uniform and
broken models, modes and generators left alone; choices between texts; evaluate.py as a person sees it, and --watch
beside a trainer that writes, prunes, dies, goes back and resumes."""
import json
import math
import shutil
import signal

import pytest
import torch

import evaluate
import choices
from data.tokens import BytePairs, Bytes
from model import Attention
from nanolab import tasks
from nanolab.run import UserError, load_checkpoint, run_metrics
from nanolab.score import Ensemble, Score, parse_protocol, score
from choices import T, raises_one_line, run_main
from choices import loud_model as build
from forks import assert_done, assert_error, summary, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")


def text(N, seed=0):
    return torch.randint(256, (N,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def bits_of(logits, target):
    """-log2 p(target) from logits (V,), in float64 and in steps of its own."""
    p = (logits.double() - logits.double().max()).exp()
    return -math.log2(p[target] / p.sum())


def context_start(i, protocol):
    """Where the context of byte i begins, as the protocol promises it."""
    if protocol == "block":
        return (i - 1) // T * T
    S = int(protocol.removeprefix("stride:"))
    return max(0, math.ceil((i - T) / S) * S)


def one_by_one(model, data, protocol):
    """Bits of every byte, each from a forward pass over nothing but its context."""
    bits = [8.0]
    for i in range(1, len(data)):
        start = context_start(i, protocol)
        with torch.no_grad():
            bits.append(bits_of(model(data[None, start:i].long())[0, -1], data[i].item()))
    return torch.tensor(bits, dtype=torch.float64)


def in_one_pass(model, data, monkeypatch):
    """Bits of every byte after all before it, attention limited to T."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Attention, "attend", choices.banded)
        logits = model(data[None, :-1].long())[0]
    return torch.tensor([8.0] + [bits_of(row, target) for row, target in zip(logits, data[1:].tolist())],
                        dtype=torch.float64)


@pytest.mark.parametrize("protocol", ["block", "stride:1", "stride:3"])
def test_every_byte_is_scored_once_with_the_promised_context(protocol):
    model = build("learned")
    for N in (2, T, T + 1, T + 2, 2 * T + 1, 27, 41):
        data = text(N)
        found = score(model, data, protocol, batch_size=3)
        assert found.bytes == N and found.protocol == protocol and found.seconds > 0
        assert found.bits.dtype == torch.float64 and found.bits[0] == 8
        torch.testing.assert_close(found.bits, one_by_one(model, data, protocol), atol=1e-4, rtol=1e-5)
        assert found.bpb == pytest.approx(found.bits.mean().item(), rel=1e-12)
        assert found.loss == pytest.approx(found.bpb * math.log(2), rel=1e-12)


def test_protocols_differ():
    """No test above passes by scoring all alike."""
    model, data = build(), text(200)
    found = [score(model, data, protocol).bpb for protocol in ("block", "stride:1", "stride:3", "cache")]
    assert min(abs(a - b) for i, a in enumerate(found) for b in found[:i]) > 1e-3
    assert score(model, data, f"stride:{T}").bpb == score(model, data, "block").bpb
    one = build(block_size=1)                                    # a cache of one key
    assert torch.equal(score(one, data, "cache").bits, score(one, data, "block").bits)


@pytest.mark.parametrize("settings", [{}, dict(positions="none", qk_norm=True, n_kv_head=1)], ids=str)
def test_cache_equals_one_banded_pass(settings, monkeypatch):
    """N passes the segments' length of 4 n_layer T = 64 several times: the cut changes nothing."""
    model = build(**settings)
    for N in (2, T + 2, 65, 66, 300):
        data = text(N)
        found = score(model, data, "cache", batch_size=2)
        assert found.bytes == N and found.protocol == "cache"
        torch.testing.assert_close(found.bits, in_one_pass(model, data, monkeypatch), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("settings", [dict(n_layer=1), dict(mixer="window,full", window=5, short_conv=3)], ids=str)
def test_documents_are_scored_as_one_pass_reads_them(settings):
    """Wherever they end: across the place where a segment of `cache` would begin, but for the bytes of an end, too."""
    data, found = text(200) % 2, []
    data[23:27] = torch.tensor([1, 0, 1, 1])
    for how, end in (("mask", "\\1\\0"), ("reset", "\\1\\0\\1\\1")):
        model = build(documents=how, document_end=end, **settings)
        with torch.no_grad():
            logits = model(data[None, :-1].long(), window=T)[0]
        found.append(torch.tensor([8.0] + [bits_of(*pair) for pair in zip(logits, data[1:].tolist())]).double())
        torch.testing.assert_close(score(model, data, "cache", 2).bits, found[-1], atol=1e-4, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("protocol", ["block", "stride:3", "cache"])
def test_batch_size_changes_nothing_and_a_uniform_model_costs_exactly_eight_bits(protocol):
    model, data = build("none").double(), text(300)
    bpb = [score(model, data, protocol, batch_size).bpb for batch_size in (1, 3, 1000)]
    assert max(bpb) - min(bpb) <= 1e-9 * min(bpb)
    model = build(head_bias=True)
    for shift in (0.0, 3.7, -1e4):
        with torch.no_grad():
            model.heads[0].zero_()
            model.head_biases[0].fill_(shift)
        found = score(model, text(200), protocol)
        assert found.bpb == 8.0 and bool((found.bits == 8).all())
    assert found.interval(resamples=50, chunk=32) == (8.0, 8.0)


def test_cache_past_learned_positions_is_refused():
    model = build("learned")
    assert score(model, text(T + 1), "cache").bpb == pytest.approx(score(model, text(T + 1), "block").bpb, rel=1e-6)
    with pytest.raises(UserError, match="cache is impossible past block_size 8 with positions learned.*use block"):
        score(model, text(T + 2), "cache")


def test_unknown_protocols():
    config = build().config
    assert [parse_protocol(p, config, 100) for p in ("block", "stride:5", "cache")] == [
        ("block", T), ("stride", 5), ("cache", None)]
    for protocol in ("", "blok", "block:4", "cache:", "stride", "stride:0", "stride:9", "stride:²", "stride:1 "):
        with pytest.raises(UserError, match=r"block, cache, memory, or stride:S with S from 1 to block_size \(8\)"):
            parse_protocol(protocol, config, 100)


@pytest.mark.parametrize("windows, starts", [(1, [0]), (4, [0, 1, 3, 4]), (50, range(6))])
def test_windows_are_those_of_the_full_pass(windows, starts):
    """Of a short split: the one there is, of less than block_size."""
    model, data = build(), text(6 * T + 5)                       # 6 whole windows, 4 targets over
    full, short = score(model, data, "block").bits, score(model, data[:5], "block", windows=windows)
    for batch_size in (1, 4):
        part = score(model, data, "block", batch_size, windows)
        assert part.bytes == len(starts) * T and part.protocol == f"block, {len(starts)} windows"
        expected = torch.cat([full[1 + i * T:1 + (i + 1) * T] for i in starts])
        torch.testing.assert_close(part.bits, expected, atol=1e-4, rtol=1e-5)
    assert short.protocol == "block, 1 windows"
    torch.testing.assert_close(short.bits, score(model, data[:5], "block").bits[1:])


def test_what_cannot_be_scored():
    """And a broken model's nan, not an empty or a smaller mean: a trainer must see it."""
    model = build()
    with torch.no_grad():
        model.heads[0][3] = math.nan
    for protocol, windows in [("block", 3), ("stride:3", None), ("cache", None)]:
        assert math.isnan(score(model, text(100), protocol, windows=windows).bpb)
    for protocol, windows in [("stride:2", 3), ("cache", 3), ("block", 0)]:
        with pytest.raises(ValueError, match="needs block"):
            score(build(), text(50), protocol, windows=windows)
    with pytest.raises(UserError, match="1 bytes cannot be scored"):
        score(build(), text(1))


@pytest.mark.parametrize("protocol", ["block", "cache"])
def test_leaves_mode_and_generators_alone(protocol, monkeypatch):
    for training in (True, False):
        model, data, before = build().train(training), text(100), torch.get_rng_state()
        found = score(model, data, protocol)
        assert torch.equal(found.bits, score(model, data, protocol).bits)            # dropout was off
        found.interval(resamples=5, chunk=10)
        assert torch.equal(before, torch.get_rng_state()) and not found.bits.requires_grad
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(type(model.norm), "forward", lambda *_: 1 / 0)
            score(model, data, protocol)
        assert all(module.training is training for module in model.modules())


def noisy(N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Score(2 + torch.randn(N, generator=generator, dtype=torch.float64), "block", 1.0)


def test_interval():
    """3.92 standard errors of chunks' means wide, the same for one seed; of 95 in 100 the truth lies within."""
    found = noisy(64 * 100)
    low, high = found.interval(chunk=100)
    assert low < found.bpb < high and (low, high) == found.interval(chunk=100) != found.interval(chunk=100, seed=1)
    sigma = found.bits.view(64, 100).mean(1).std().item() / 8
    assert high - low == pytest.approx(2 * 1.96 * sigma, rel=0.15)
    hits = sum(low < 2 < high for low, high in (noisy(50 * 20, seed).interval(200, 20) for seed in range(100)))
    assert 87 <= hits <= 99
    runs = Score(noisy(200).bits.repeat_interleave(50), "block", 1.0)                # neighbours count as one
    byte, run = (high - low for low, high in (runs.interval(300, chunk) for chunk in (1, 50)))
    assert run / byte == pytest.approx(50 ** 0.5, rel=0.25)


def test_interval_of_a_short_last_chunk_of_too_few_bytes_and_of_ids():
    bits = torch.cat((torch.full((20,), 1.0), torch.full((9,), 5.0))).double()
    low, high = Score(bits, "block", 1.0).interval(chunk=10)
    assert low == 1.0 < Score(bits, "block", 1.0).bpb < high == pytest.approx(5.0)
    half = Score(bits, "block", 1.0, n_bytes=58)
    assert half.interval(chunk=10) == pytest.approx((low / 2, high / 2)) and half.bytes == 58
    assert all(map(math.isnan, noisy(19).interval(chunk=10)))
    assert not any(map(math.isnan, noisy(20).interval(chunk=10)))


# ---- choices between texts ----

QUESTIONS = """\
{"context": "The cat sat on the", "choices": ["mat", "moon and the stars", "é€"], "answer": 2}
{"context": "ends in a space ", "choices": ["the", "then the", "t"], "answer": 1}
{"context": "", "choices": ["The the", "he", "ü"], "answer": 1}
{"context": " \\n", "choices": ["x", "yy"], "answer": 1}

{"context": "more than twenty-four bytes, whose beginning is lost", "choices": ["the", "and a long one"], "answer": 1}
{"ctx": " He [x] goes on [title] Then", "endings": ["[step] the end", "stops  [title] the"], "label": 1, "more": 0}
{"ctx": "", "ctx_a": "A MAN sits.", "ctx_b": "he THEN", "activity_label": "Sit", "endings": ["é€ü", "bb"], "label": "0"}
{"context": "2 + 2 =", "choices": ["4", "four", "the 5th"], "answer": 2}
"""
BPE = BytePairs([*(bytes([i]) for i in range(256)), b"he", b" t", b" the"])
MEASURES = {"acc": lambda choice, nats: 1, "acc_norm": lambda choice, nats: len(choice),
            "acc_bytes": lambda choice, nats: len(choice.encode()), "acc_tokens": lambda choice, nats: len(nats)}


def nats_of(model, tokenizer, context, choice):
    """-ln p of a choice and its ids, each from a pass of its own over what block_size has left before it."""
    before = tokenizer.encode(context.rstrip()) or [259 if tokenizer is BPE else 10]
    ids = before + tokenizer.encode((context[len(context.rstrip()):] if context.strip() else "") + " " + choice)
    start = max(0, len(ids) - model.config.block_size - 1)
    with torch.no_grad():
        return [bits_of(model(torch.tensor([ids[start:k]]))[0, -1], ids[k]) * math.log(2)
                for k in range(len(before), len(ids))]


@pytest.mark.parametrize("tokenizer", [Bytes(), BPE], ids=["bytes", "pairs"])
def test_choices_are_the_likeliest_of_a_slow_sum(tokenizer, tmp_path):
    """By sum, and over characters, bytes and ids, which choose otherwise; in any batch."""
    (tmp_path / "q").write_text(QUESTIONS)
    model = build("learned", block_size=24, vocab_size=260 if tokenizer is BPE else 256)
    with torch.no_grad():
        model.heads[0].mul_(0.05)                                # or one byte of many decides
    task = tasks.Choices({}, None, [tmp_path / "q"], tokenizer)
    [asked] = task.questions.values()
    pairs = [(context, choice) for context, choices, _ in asked for choice in choices]
    nats = {pair: nats_of(model, tokenizer, *pair) for pair in pairs}
    for batch_size in (1, 5, 99):
        rows = [tasks.encode_choice(tokenizer, *pair, model.config) for pair in pairs]
        found = tasks.loglikelihoods(model, rows, batch_size)
        assert found == pytest.approx([-sum(nats[pair]) for pair in pairs], rel=1e-5)

    def right(size, context, choices, answer):
        best, second, *_ = sorted((sum(nats[context, choice]) / size(choice, nats[context, choice]), i)
                                  for i, choice in enumerate(choices))
        assert second[0] - best[0] > 1e-3
        return best[1] == answer
    for few, questions in ((None, asked), (2, [asked[0], asked[4]])):
        lines = [line for line, _ in task.measure(model, tmp_path / "q", 3, few)]
        counts = {name: sum(right(size, *question) for question in questions) for name, size in MEASURES.items()}
        assert {line["measure"]: line["accuracy"] * line["prompts"] for line in lines} == counts
        assert {line["prompts"] for line in lines} == {len(questions)}
        assert few or len({*counts.values()}) > 2


def test_how_a_line_is_read(tmp_path):
    (tmp_path / "q").write_text(QUESTIONS)
    read = tasks.read_choices(tmp_path / "q")
    assert read[1] == ("ends in a space ", ["the", "then the", "t"], 1) and len(read) == 8
    assert read[5:7] == [("He goes on. Then", [" the end", "stops . the"], 1),
                         ("Sit: A MAN sits. He then", ["é€ü", "bb"], 0)]


@pytest.mark.parametrize("right, n", [(0, 3), (3, 3), (1, 2), (17, 90), (9_000, 10_042)])
def test_wilson_is_where_the_score_test_rejects(right, n):
    """The shares p at which |right / n - p| is 1.96 of their own standard errors, by bisection."""
    def edge(low, high):                                         # of which the first is not rejected
        for _ in range(60):
            p = (low + high) / 2
            low, high = (p, high) if abs(right / n - p) < 1.959964 * math.sqrt(p * (1 - p) / n) else (low, p)
        return low
    share = min(max(right / n, 1e-9), 1 - 1e-9)
    assert tasks.wilson(right, n) == pytest.approx((edge(share, 0.0), edge(share, 1.0)), abs=1e-6)


@pytest.mark.parametrize("line, said", [
    ("", "it has no question"), ("\n\n", "no question"), ("{", "line 1: it is no JSON"), ("[1]", "it needs context"),
    ('{"context": "a", "choices": ["a", "b"]}', "context, choices and answer"), ("[" * 99_999, "no JSON"),
    ('{"context": "a", "choices": ["a", "b"], "answer": 2}', "answer must be from 0 to 1"),
    ('{"context": "a", "choices": ["a", "b"], "answer": -1}', "from 0 to 1"),
    ('{"context": "a", "choices": ["a", "b"], "answer": true}', "answer must be"),
    ('{"context": "a", "choices": ["a", "b"], "answer": "0"}', "answer must be"),
    ('{"ctx": "a", "endings": ["a", "b"], "label": ""}', "label must be"),
    ('{"ctx": "a", "endings": ["a", "[x]"], "label": 0}', "endings must be two or more, none empty"),
    ('{"context": "a", "choices": [], "answer": 0}', "choices must be two or more"),
    ('{"context": "a", "choices": ["a"], "answer": 0}', "two or more"),
    ('{"context": "a", "choices": ["a", 2], "answer": 0}', "a list of texts"),
    ('{"context": 1, "choices": ["a", "b"], "answer": 0}', "context must be a text"),
    ('{"context": "a", "choices": ["a", "ten bytes"], "answer": 0}', "'ten bytes' has 10 ids, and the model's"),
    ('{"context": "a", "choices": ["a", "\\ud800"], "answer": 0}', "half a character")], ids=str)
def test_questions_that_cannot_be_asked_cost_one_line(line, said, tmp_path):
    (tmp_path / "q").write_text(line)
    with raises_one_line(said):
        next(tasks.Choices({}, None, [tmp_path / "q"], Bytes()).measure(build(), tmp_path / "q", 4))


# ---- the command ----

@pytest.fixture
def run(tmp_path):
    """A run with raw and averaged weights, over 4,000 bytes of text."""
    (tmp_path / "text.txt").write_bytes(bytes(text(4000).tolist()))
    model = build()
    settings = {**model.config.__dict__, "dataset": str(tmp_path / "text.txt"), "max_bytes": None}
    ema = {"weights": {name: value / 2 for name, value in model.state_dict().items()}}
    return choices.save_model(tmp_path, model, settings=settings, ema=ema)


def table(out):
    """{protocol: (split, bits per byte, bytes scored)} as printed."""
    rows = [line.split() for line in out.splitlines()[2:]]
    return {row[1]: (row[0], float(row[2]), int(row[-2].replace(",", ""))) for row in rows}


def test_main_prints_the_table(run):
    status, out, err = run_main(evaluate, run, "--protocols", "block, stride:3,cache", "--chunk", 50)
    assert status == 0 and err == "" and "step 7, raw weights" in out and "bits/byte" in out and " .. " in out
    data = text(4000)[3600:3800]
    assert table(out) == {protocol: ("val", pytest.approx(score(build(), data, protocol).bpb, abs=2e-4), 200)
                          for protocol in ("block", "stride:3", "cache")}
    halved = build()
    halved.load_state_dict({name: value / 2 for name, value in halved.state_dict().items()})
    _, out, _ = run_main(evaluate, run / "last.pt", "--weights", "ema", "--split", "test")
    assert "ema weights" in out and "too few bytes" in out
    assert table(out) == {"block": ("test", pytest.approx(score(halved, text(4000)[3800:]).bpb, abs=2e-4), 200)}


def test_main_asks_tasks(tmp_path):
    """A model that knows nothing chooses the first of the shortest, or of all."""
    model = build(block_size=24)
    with torch.no_grad():
        model.heads[0].zero_()
    for name in "pq":
        (tmp_path / name).write_text(QUESTIONS)
    words = [choices.save_model(tmp_path, model), "--tasks", f"{tmp_path / 'q'}, {tmp_path / 'p'}"]
    status, out, err = run_main(evaluate, *words)
    rows = [line.split() for line in out.splitlines()[2:]]
    assert (status, err) == (0, "") and f"8 questions of {tmp_path / 'q'}" in out
    assert [row[:2] for row in rows] == [[name, measure] for name in "qp" for measure in MEASURES]
    low, high = tasks.wilson(1, 8)
    assert rows[0][2:7] == ["0.1250", f"{low:.4f}", "..", f"{high:.4f}", "8"]
    assert [row.split()[6] for row in run_main(evaluate, *words, "--prompts", 3)[1].splitlines()[2:]] == ["3"] * 8


@pytest.mark.parametrize("words, said, change", [
    ([], "which run", {}), (["{run}/other.pt"], "other.pt", {}),
    (["{run}", "--protocols", "block,strid:3"], "unknown protocol 'strid:3'", {}),
    (["{run}", "--protocols", "block,stride:99"], "block_size (8)", {}),
    (["{run}", "--split", "valid"], "--split valid", {}),
    (["{run}", "--weights", "ema"], "no averaged weights", dict(ema=None)),
    (["{run}", "--samples", "2"], "no posterior", {}), (["{run}", "--tasks", "{run}/q"], "No such file", {}),
    (["{run}", "--tasks", "{run}/last.pt"], "no UTF-8", {}),
    (["{run}", "--tasks", "q", "--split", "test"], "--split has no effect beside --tasks", {}),
    (["{run}", "--tasks", "q"], "not on text", dict(script="train_facts", task="in_weight")),
    (["{run}", "--samples", "2", "--protocols", "block,cache"], "block and stride:S", {}),
    (["{run}", "--protocols", "block,cache"], "positions learned", dict(positions="learned")),  # before the first pass
], ids=str)
def test_main_errors_are_one_line(words, said, change, run, monkeypatch):
    loaded = torch.load(run / "last.pt", weights_only=True)
    if "positions" in change:
        change = dict(model=build("learned").state_dict(), settings={**loaded["settings"], **change})
    if "task" in change:
        change["settings"] = {**loaded["settings"], "task": change.pop("task")}
    torch.save({**loaded, **change}, run / "last.pt")
    monkeypatch.setattr(tasks, "score", lambda *_: pytest.fail("a pass was begun"))
    status, out, err = run_main(evaluate, *(word.format(run=run) for word in words))
    assert status == 2 and out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


# --- --watch ---

RUN = "runs/train_enwik8/w"
TRAIN = ("train_enwik8.py --debug --device cpu --eval_interval none --save_interval 10 --sample_length 0 "
         "--run_name w").split()


def lines(folder):
    path = folder / RUN / "evaluation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def watch(forks, folder, *words):
    return forks.start(["evaluate.py", "--watch", RUN, *words], folder)


def evaluated(*words):
    """What evaluate.py prints, in this process."""
    status, out, err = run_main(evaluate, *words)
    assert (status, err) == (0, "")
    return out


def refused(said, *words):
    """One line of evaluate.py, in this process."""
    status, _, err = run_main(evaluate, *words)
    assert status == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1, err


def test_every_checkpoint_is_scored_as_it_would_be_alone_and_the_best_is_kept(forks, tmp_path):
    """The watcher starts first. Its figures are evaluate.py's; metrics.jsonl and the trainer's files stay its own."""
    run, words = tmp_path / RUN, ("--protocols", "block,stride:16")
    watcher = watch(forks, tmp_path, *words, "--patience", "60")
    assert_done(forks.run([*TRAIN, "--max_steps", "30", "--keep_last", "9"], tmp_path))
    assert_done(watcher.wait())
    found = {(line["step"], line["protocol"]): line["bpb"] for line in lines(tmp_path)}
    assert {step for step, _ in found} >= {10, 20, 30} and len(found) == len(lines(tmp_path))
    best = min(found[step, "block"] for step, protocol in found if protocol == "block")
    assert found[load_checkpoint(run / "best.pt")["step"], "block"] == best
    out = evaluated(run, *words)
    assert f"{found[30, 'block']:.4f}" in out and f"{found[30, 'stride:16']:.4f}" in out
    assert {line["split"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())} == {"train"}
    assert [line["step"] for line in run_metrics(run)] == sorted(line["step"] for line in run_metrics(run))
    with open(run / "evaluation.jsonl", "a") as file:
        file.write('{"step": 30, "bp')                       # as a kill or a full disk may leave it
    evaluated(*words, "--watch", run)
    assert len(lines(tmp_path)) == len(found), "a second watcher evaluated something again"
    assert not list(run.glob(".watch-*"))


def test_the_trainers_best_is_left_alone_and_mistakes_are_one_line(forks, tmp_path):
    run = tmp_path / RUN
    assert_done(forks.run([*(word if word != "none" else "10" for word in TRAIN), "--max_steps", "20"], tmp_path))
    before = (run / "best.pt").stat()
    evaluated("--watch", run)
    after = (run / "best.pt").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [line["step"] for line in lines(tmp_path)] == [20]
    (tmp_path / "q").write_text(QUESTIONS)
    for _ in range(2):
        evaluated("--watch", run, "--tasks", tmp_path / "q")
        assert [line.get("measure") for line in lines(tmp_path)] == [None, *MEASURES]
    refused("no run is there", "--watch", tmp_path / "none", "--patience", 0)
    refused("which run?", "a", "--watch", "b")
    (run / "evaluation.jsonl").unlink()
    (run / "summary.json").write_text('{"status": "running"}')
    first = watch(forks, tmp_path, "--patience", "300")
    wait_for(lambda: len(lines(tmp_path)) == 1)
    refused("another process is watching", "--watch", run)
    first.kill(signal.SIGINT)
    assert first.wait().code == 130
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    refused("w/last.pt is truncated", "--watch", run)


def test_a_trainer_that_dies_prunes_and_goes_back(forks, tmp_path):
    """Killed without a word: the watcher ends after its patience. Resumed from further back: what the trainer took
    back is taken back here too. Pruned files never stop it."""
    run = tmp_path / RUN
    trainer = forks.start([*TRAIN, "--max_steps", "100000", "--keep_last", "1", "--save_interval", "5"], tmp_path)
    wait_for((run / "lock").exists)
    watcher = watch(forks, tmp_path, "--patience", "1")
    wait_for(lambda: len({line["step"] for line in lines(tmp_path)}) >= 3)
    trainer.kill(signal.SIGKILL)
    trainer.wait()
    watcher.wait()
    assert_done(watcher)
    assert "no trainer for 1 seconds" in watcher.out
    seen = sorted({line["step"] for line in lines(tmp_path)})
    assert load_checkpoint(run / "last.pt")["step"] in seen
    words = [*TRAIN, "--max_steps", str(seen[1] + 5), "--data_seed", "7"]
    words[words.index("w")] = "other"
    assert_done(forks.run(words, tmp_path))                        # a checkpoint of fewer steps, put in its place
    shutil.copy(tmp_path / "runs/train_enwik8/other/last.pt", run / "last.pt")
    for old in run.glob("step_*.pt"):
        old.unlink()
    evaluated("--watch", run, "--patience", "0")
    assert max(line["step"] for line in lines(tmp_path)) == seen[1] + 5


def test_a_folder_of_documents(forks, tmp_path):
    """evaluate.py puts between the files what the training did; what ends a document must be there."""
    for i in range(40):
        (tmp_path / f"{i}.txt").write_bytes(bytes(text(99 + i, i).tolist()).replace(b"\0", b""))
    words = [*TRAIN, "--max_bytes", "none", "--documents", "reset", "--max_steps", "2", "--eval_interval", "2"]
    assert_error(forks.run([*words, "--dataset", "0.txt"], tmp_path), "stands nowhere in the training part of 0.txt")
    assert_done(forks.run([*words, "--dataset", f"{tmp_path}/*.txt", "--document_end", "\\0"], tmp_path))
    found = summary(tmp_path / RUN)["val_bpb_raw"]
    assert f" {found:.4f} " in evaluated(tmp_path / RUN)
    evaluated(tmp_path / RUN, "--protocols", "stride:8", "--dataset", "stdlib", "--max_bytes", 30_000)


def test_draws_of_the_posterior(forks, tmp_path, monkeypatch):
    """ivon: one draw differs from the mean, other seeds differ, a mixture is better than its draws are on average (the
    logarithm is concave)."""
    assert_done(forks.run([*TRAIN, "--optimizer", "ivon", "--betas", "0.9,0.9999", "--ess", "1000", "--lr", "0.1",
                           "--schedule", "constant", "--max_steps", "20"], tmp_path))
    run = tmp_path / RUN

    def bpb(*more):
        return float(evaluated(run, *more).splitlines()[-1].split()[2])
    mean, one, other = bpb(), bpb("--samples", 1), bpb("--samples", 1, "--seed", 3)
    assert len({mean, one, other}) == 3 and one == bpb("--samples", 1)
    where, data = torch.device("cpu"), torch.randint(97, 123, (3000,), dtype=torch.uint8)
    monkeypatch.setattr(evaluate, "samples", 4)
    _, mixture = evaluate.open_model(run / "last.pt", where)
    draws = [score(Ensemble(mixture.model, [draw]), data).bpb for draw in mixture.weights]
    assert len(set(draws)) == 4 and score(mixture, data).bpb < sum(draws) / 4 - 0.01
