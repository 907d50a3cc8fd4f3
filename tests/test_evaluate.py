"""What a split costs: every byte scored once under each protocol against a pass of its own, intervals, uniform and
broken models, modes and generators left alone; evaluate.py as a person sees it."""
import math

import pytest
import torch

import evaluate
import toy
from model import Attention
from nanolab import tasks
from nanolab.run import UserError
from nanolab.score import Score, parse_protocol, score
from toy import T, build, run_main

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
        patch.setattr(Attention, "attend", toy.banded)
        logits = model(data[None, :-1].long())[0]
    return torch.tensor([8.0] + [bits_of(row, target) for row, target in zip(logits, data[1:].tolist())],
                        dtype=torch.float64)


@pytest.mark.parametrize("protocol", ["block", "stride:1", "stride:3", "stride:5", "stride:8"])
def test_every_byte_is_scored_once_with_the_promised_context(protocol):
    model = build("learned")
    for N in (2, T - 1, T, T + 1, T + 2, 2 * T, 2 * T + 1, 27, 41):
        data = text(N)
        found = score(model, data, protocol, batch_size=3)
        assert found.bytes == N and found.protocol == protocol and found.seconds > 0
        assert found.bits.dtype == torch.float64 and found.bits[0] == 8
        torch.testing.assert_close(found.bits, one_by_one(model, data, protocol), atol=1e-4, rtol=1e-5)
        assert found.bpb == pytest.approx(found.bits.mean().item(), rel=1e-12)
        assert found.loss == pytest.approx(found.bpb * math.log(2), rel=1e-12)


def test_protocols_differ_and_promise_what_they_say():
    """At least T - S bytes for all but the first T, never more than T; no test above passes by scoring all alike."""
    for S in (1, 3, 8):
        assert all(T - S + 1 <= i - context_start(i, f"stride:{S}") <= T for i in range(T, 100))
    assert [i - context_start(i, "block") for i in range(1, 18)] == [*range(1, 9), *range(1, 9), 1]
    model, data = build(), text(200)
    found = [score(model, data, protocol).bpb for protocol in ("block", "stride:1", "stride:3", "cache")]
    assert min(abs(a - b) for i, a in enumerate(found) for b in found[:i]) > 1e-3
    assert score(model, data, f"stride:{T}").bpb == score(model, data, "block").bpb
    one = build(block_size=1)                                    # a cache of one key
    assert torch.equal(score(one, data, "cache").bits, score(one, data, "block").bits)


@pytest.mark.parametrize("settings", [{}, dict(positions="none"), dict(qk_norm=True, n_kv_head=1)], ids=str)
def test_cache_equals_one_banded_pass(settings, monkeypatch):
    """N passes the segments' length of 4 n_layer T = 64 several times: the cut changes nothing."""
    model = build(**settings)
    for N in (2, T + 1, T + 2, 64, 65, 66, 129, 300):
        data = text(N)
        found = score(model, data, "cache", batch_size=2)
        assert found.bytes == N and found.protocol == "cache"
        torch.testing.assert_close(found.bits, in_one_pass(model, data, monkeypatch), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("protocol", ["block", "stride:3", "cache"])
def test_batch_size_changes_nothing(protocol):
    model, data = build("none").double(), text(300)
    bpb = [score(model, data, protocol, batch_size).bpb for batch_size in (1, 3, 32, 1000)]
    assert max(bpb) - min(bpb) <= 1e-9 * min(bpb)


@pytest.mark.parametrize("protocol", ["block", "stride:1", "stride:3", "cache"])
def test_uniform_model_costs_exactly_eight_bits(protocol):
    model = build(head_bias=True)
    for shift in (0.0, 3.7, -1e4):
        with torch.no_grad():
            model.heads[0].zero_()
            model.head_biases[0].fill_(shift)
        found = score(model, text(200), protocol)
        assert found.bpb == 8.0 and bool((found.bits == 8).all())
    assert found.interval(resamples=50, chunk=32) == (8.0, 8.0)


@pytest.mark.parametrize("positions", ["learned", "learned_per_layer"])
def test_cache_past_learned_positions_is_refused(positions):
    model = build(positions)
    assert score(model, text(T + 1), "cache").bpb == pytest.approx(score(model, text(T + 1), "block").bpb, rel=1e-6)
    with pytest.raises(UserError, match=f"cache is impossible past block_size 8 with positions {positions}.*use block"):
        score(model, text(T + 2), "cache")


@pytest.mark.parametrize("protocol", [
    "", "blok", "block:4", "cache:", "stride", "stride:0", "stride:9", "stride:-1", "stride:2.0", "stride:²", "Block",
    "stride:1 "])
def test_unknown_protocols(protocol):
    assert [parse_protocol(p, build().config, 100) for p in ("block", "stride:5", "cache")] == [
        ("block", T), ("stride", 5), ("cache", None)]
    with pytest.raises(UserError, match=r"block, cache, memory, or stride:S with S from 1 to block_size \(8\)"):
        parse_protocol(protocol, build().config, 100)


@pytest.mark.parametrize("windows, starts", [(1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (50, range(6))])
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
    for protocol, windows in [("stride:2", 3), ("cache", 3), ("block", 0)]:
        with pytest.raises(ValueError, match="needs block"):
            score(build(), text(50), protocol, windows=windows)
    with pytest.raises(UserError, match="1 bytes cannot be scored"):
        score(build(), text(1))


@pytest.mark.parametrize("protocol", ["block", "stride:2", "cache"])
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


def test_a_broken_model_scores_nan():
    """Not an empty or a smaller mean: a trainer must see it."""
    model = build()
    with torch.no_grad():
        model.heads[0][3] = math.nan
    for protocol, windows in [("block", None), ("block", 3), ("stride:3", None), ("cache", None)]:
        assert math.isnan(score(model, text(100), protocol, windows=windows).bpb)


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


# ---- the command ----

@pytest.fixture
def run(tmp_path):
    """A run with raw and averaged weights, over 4,000 bytes of text."""
    (tmp_path / "text.txt").write_bytes(bytes(text(4000).tolist()))
    model = build()
    settings = {**model.config.__dict__, "dataset": str(tmp_path / "text.txt"), "max_bytes": None}
    ema = {"weights": {name: value / 2 for name, value in model.state_dict().items()}}
    return toy.save(tmp_path, model, settings=settings, ema=ema)


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


@pytest.mark.parametrize("words, said, change", [
    ([], "which run", {}), (["{run}/other.pt"], "other.pt", {}),
    (["{run}", "--protocols", "block,strid:3"], "unknown protocol 'strid:3'", {}),
    (["{run}", "--protocols", "block,stride:99"], "block_size (8)", {}),
    (["{run}", "--split", "valid"], "--split valid", {}),
    (["{run}", "--weights", "ema"], "no averaged weights", dict(ema=None)),
    (["{run}", "--samples", "2"], "no posterior", {}),
    (["{run}", "--samples", "2", "--protocols", "block,cache"], "block and stride:S", {}),
    (["{run}", "--protocols", "block,cache"], "positions learned", dict(positions="learned")),  # before the first pass
], ids=str)
def test_main_errors_are_one_line(words, said, change, run, monkeypatch):
    loaded = torch.load(run / "last.pt", weights_only=True)
    if "positions" in change:
        change = dict(model=build("learned").state_dict(), settings={**loaded["settings"], **change})
    torch.save({**loaded, **change}, run / "last.pt")
    monkeypatch.setattr(tasks, "score", lambda *_: pytest.fail("a pass was begun"))
    status, out, err = run_main(evaluate, *(word.format(run=run) for word in words))
    assert status == 2 and out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
