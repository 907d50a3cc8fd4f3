"""Sampling: filters, draws, and generation with the cache against recomputation. About 8 s on one core."""
import io
import math
import sys

import pytest
import torch

import choices
import sample
from model import Attention, Transformer, TransformerConfig
from nanolab.generate import draw, draw_of_few, filter_logits, first_past, generate

T = 8
SCHEMES = ("learned", "learned_per_layer", "rope", "none")

pytestmark = pytest.mark.usefixtures("one_thread")


def build(positions="rope", **settings):
    """A small model whose next byte depends strongly on every byte that attention sees; in float64, as it magnifies
    rounding."""
    torch.manual_seed(0)
    config = dict(n_layer=2, n_head=2, n_embd=16, block_size=T, init="xavier", positions=positions)
    model = Transformer(TransformerConfig(**{**config, **settings})).eval()
    with torch.no_grad():
        model.heads[0].mul_(60)
        for block in model.blocks:
            block.mixer.qkv.weight.mul_(3)
            block.mixer.out.weight.mul_(3)
    return model.double()


# ---- filters ----

P = [0.125, 0.25, 0.0625, 0.25, 0.0625, 0.25]                    # ties at every level; best bytes 1, 3, 5


def kept(p=P, temperature=1.0, **how):
    """Which bytes of the distribution p may still be drawn."""
    logits = torch.tensor([p]).log()
    filtered = filter_logits(logits, temperature, **how)
    allowed = filtered[0].isfinite()
    torch.testing.assert_close(filtered[0, allowed], logits[0, allowed] / temperature)
    assert filtered.dtype == torch.float32 and bool((filtered[0, ~allowed] == -math.inf).all())
    return allowed.nonzero().flatten().tolist()


def test_no_filter_keeps_all():
    assert kept() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("k, bytes_", [(1, [1]), (2, [1, 3]), (3, [1, 3, 5]), (4, [0, 1, 3, 5]), (5, [0, 1, 2, 3, 5]),
                                       (6, [0, 1, 2, 3, 4, 5]), (99, [0, 1, 2, 3, 4, 5])])
def test_top_k_is_exact_with_ties(k, bytes_):
    assert kept(top_k=k) == bytes_


@pytest.mark.parametrize("top_p, bytes_", [
    (1e-9, [1]), (0.2, [1]), (0.25, [1]), (0.26, [1, 3]), (0.5, [1, 3]), (0.51, [1, 3, 5]), (0.75, [1, 3, 5]),
    (0.76, [0, 1, 3, 5]), (0.875, [0, 1, 3, 5]), (0.88, [0, 1, 2, 3, 5]), (0.95, [0, 1, 2, 3, 4, 5]),
    (1.0, [0, 1, 2, 3, 4, 5])])
def test_top_p_is_the_shortest_prefix(top_p, bytes_):
    assert kept(top_p=top_p) == bytes_


def test_top_p_of_one_drops_nothing_however_small():
    assert kept([0.9999999, 1e-12, 1e-9, 1e-12], top_p=1.0) == [0, 1, 2, 3]


@pytest.mark.parametrize("min_p, bytes_", [(0.0, [0, 1, 2, 3, 4, 5]), (0.24, [0, 1, 2, 3, 4, 5]), (0.26, [0, 1, 3, 5]),
                                           (0.49, [0, 1, 3, 5]), (0.51, [1, 3, 5]), (1.0, [1, 3, 5])])
def test_min_p_is_relative_to_the_best(min_p, bytes_):
    assert kept(min_p=min_p) == bytes_


def test_filters_look_at_the_distribution_after_the_temperature():
    p = [0.5, 0.25, 0.125, 0.125]                                # squared: 0.727, 0.182, 0.045, 0.045
    assert kept(p, top_p=0.7) == [0, 1] and kept(p, 0.5, top_p=0.7) == [0]
    assert kept(p, min_p=0.3) == [0, 1] and kept(p, 0.5, min_p=0.3) == [0]
    assert kept(p, min_p=0.6) == [0] and kept(p, 2.0, min_p=0.6) == [0, 1]


def test_top_p_counts_what_top_k_left_and_min_p_comes_last():
    p = [0.4, 0.3, 0.2, 0.1]
    assert kept(p, top_p=0.55) == [0, 1]                         # 0.4 is short of it
    assert kept(p, top_k=2, top_p=0.55) == [0]                   # 0.4 of the 0.7 left is not
    assert kept(p, top_k=3, top_p=0.99, min_p=0.6) == [0, 1]
    assert kept(p, top_k=1, top_p=1e-9, min_p=1.0) == [0]


def typical(p, mass):
    """Which bytes of the distribution p locally typical sampling keeps, written out in float64."""
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    order = sorted((i for i, x in enumerate(p) if x > 0), key=lambda i: (abs(-math.log(p[i]) - entropy), i))
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += p[i]
        if total >= mass:
            break
    return sorted(kept)


@pytest.mark.parametrize("mass", [1e-9, 0.2, 0.5, 0.9, 0.99])
def test_typical_p_is_its_definition(mass):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 3.0):
        rows = torch.randn(40, 30, generator=generator) * scale
        rows[:, ::7] = -math.inf
        found = filter_logits(rows, 0.7, typical_p=mass).isfinite()
        wanted = [typical(row, mass) for row in (rows.double() / 0.7).softmax(-1).tolist()]
        assert [row.nonzero().flatten().tolist() for row in found] == wanted


def test_typical_p():
    # Surprisals 2.30, 0.36, 1.61 and an entropy of 0.80: nearest is the best, then 0.2, then 0.1.
    assert kept([0.1, 0.7, 0.2], typical_p=0.7 - 1e-6) == [1] and kept([0.1, 0.7, 0.2], typical_p=0.71) == [1, 2]
    assert kept([0.1, 0.7, 0.2], typical_p=0.91) == [0, 1, 2] == kept([0.1, 0.7, 0.2], typical_p=1.0)
    flat = [0.4] + [0.06] * 10                                   # the best one is too little of a surprise
    assert kept(flat, typical_p=1e-9) == [1] and kept(flat, typical_p=0.29) == [1, 2, 3, 4, 5]
    assert kept(flat, typical_p=0.7) == list(range(11))
    assert kept([0.25] * 4, typical_p=0.5) == [0, 1]             # of equal ones the lower first


def test_typical_p_comes_after_top_p_and_before_min_p():
    flat = [0.4] + [0.06] * 10
    assert kept(flat, top_k=2, typical_p=1e-9) == [0]            # of what top_k left, the best is the most typical
    assert kept(flat, top_p=0.5, typical_p=0.5) == [0]           # of 0.4, 0.06 and 0.06
    assert kept(flat, typical_p=0.29, min_p=1.0) == [1, 2, 3, 4, 5]                      # the best was gone before


def test_rows_are_filtered_apart():
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]).log()
    assert filter_logits(rows, top_p=0.8).isfinite().tolist() == [[True, True, False], [False, True, True]]
    assert filter_logits(rows, top_k=1).isfinite().tolist() == [[True, False, False], [False, False, True]]
    assert filter_logits(rows, min_p=0.5).isfinite().tolist() == [[True, False, False], [False, False, True]]
    assert filter_logits(rows, typical_p=0.5).isfinite().tolist() == [[True, False, False], [False, False, True]]


def test_filters_leave_their_input_alone():
    logits = torch.tensor([P]).log()
    before = logits.clone()
    for how in (dict(top_k=2), dict(top_p=0.5), dict(min_p=0.5), dict(typical_p=0.5)):
        filter_logits(logits, **how)
    assert torch.equal(logits, before)


# ---- draws ----

@pytest.mark.parametrize("how", [{}, dict(temperature=0.5), dict(temperature=2.0, top_k=4), dict(top_p=0.8),
                                 dict(top_k=5, top_p=0.9, min_p=0.3), dict(temperature=1.5, typical_p=0.4)])
def test_frequencies_are_the_filtered_softmax(how):
    p, n = [0.3, 0.05, 0.0, 0.25, 0.15, 0.05, 0.2], 40_000
    logits = torch.tensor([p]).log()
    expected = n * filter_logits(logits, **how).softmax(-1)[0].double()
    token = draw(logits.expand(n, -1), torch.Generator().manual_seed(1), **how)
    assert token.shape == (n,) and token.dtype == torch.int64
    counts = token.bincount(minlength=len(p))
    assert bool((counts[expected == 0] == 0).all())
    real = expected > 0
    chi_square = ((counts[real] - expected[real]) ** 2 / expected[real]).sum().item()
    freedom = int(real.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_extreme_uniform_numbers_draw_bytes_that_may_be_drawn(monkeypatch):
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    for u, byte in ((0.0, 1), (1 - 2 ** -24, 2)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: torch.tensor([[u]]))
        assert draw(logits, None).item() == byte


def test_a_sum_that_moves_by_rounding_draws_no_filtered_byte():
    """Cumulated sums on a GPU need not stay where nothing is added."""
    level, p = torch.tensor([[0.505]]), torch.tensor([[0.5, 0.0, 0.5]])
    assert first_past(torch.tensor([[0.5, 0.51, 1.0]]), level, p).item() == 2


def test_a_cpu_finds_the_same_byte_as_a_gpu_would(monkeypatch):
    logits, u = torch.randn(4000, 50, generator=torch.Generator().manual_seed(1)) * 4, torch.rand(4000, 1)
    u[:3] = torch.tensor([[0.0], [1 - 2.0 ** -24], [0.5]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: u)
    p = filter_logits(logits, top_k=7).softmax(-1)
    sums = p.cumsum(-1)
    assert torch.equal(draw(logits, None, top_k=7), first_past(sums, u * sums[:, -1:], p))


def test_a_sum_short_of_one_still_draws_the_last_byte(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: torch.tensor([[0.4, 0.6, 0.99]] * 2))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([[0.995]] * 2))
    assert draw(torch.zeros(2, 3), None).tolist() == [2, 2]


@pytest.mark.parametrize("how", [{}, dict(temperature=0.7), dict(top_k=1), dict(top_k=7, temperature=1.5),
                                 dict(top_k=49), dict(top_k=50), dict(top_k=51)])
@pytest.mark.parametrize("ties", [False, True])
def test_a_lone_row_draws_what_it_draws_among_others(how, ties, monkeypatch):
    logits = torch.randn(600, 50, generator=torch.Generator().manual_seed(1)) * 4
    logits[:, ::9] = -math.inf
    if ties:
        logits = logits.round()
    u = torch.rand(600, 1, generator=torch.Generator().manual_seed(2))
    u[0] = 0
    monkeypatch.setattr(torch, "rand", lambda *_, **__: u)
    together = draw(logits, None, **how).tolist()
    alone = []
    for row, number in zip(logits, u):
        monkeypatch.setattr(torch, "rand", lambda *_, number=number, **__: number[None])
        alone.append(draw(row[None], None, **how).item())
    assert alone == together


def test_a_lone_row_of_many_or_with_ties_at_the_edge_is_left_to_tensors():
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert draw_of_few(logits, 0.99, 1.0, 2) is None and draw_of_few(logits, 0.99, 1.0, 3) == 3
    assert draw_of_few(logits, 0.0, 1.0, None, few=3) is None and draw_of_few(logits, 0.0, 1.0, 3, few=3) == 0
    assert draw_of_few(logits, 1.0, 1.0, None) == 3  # past the sum by rounding


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-320])
def test_tiny_temperatures_take_the_best(temperature):
    logits = torch.tensor([[-5.0, 80.0, 79.0], [3.0, -90.0, 1.0]])
    assert draw(logits, torch.Generator().manual_seed(0), temperature).tolist() == [1, 0]


def test_greedy_draws_no_random_number():
    generator, logits = torch.Generator().manual_seed(0), torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0]])
    before, world = generator.get_state(), torch.get_rng_state()
    assert draw(logits, generator, temperature=0).tolist() == [1, 0]
    assert torch.equal(before, generator.get_state())
    draw(logits, generator)
    assert not torch.equal(before, generator.get_state()) and torch.equal(world, torch.get_rng_state())


# ---- generation ----

def tokens(model, prompts, n, **how):
    """The n bytes that each row generates, as lists; greedy unless told."""
    how = how or dict(temperature=0)
    return torch.stack(list(generate(model, prompts, n, torch.Generator().manual_seed(5), **how)), 1).tolist()


def banded(self, q, k, v, positions, key_positions, pattern):
    """Attention to the last T positions, written out."""
    distance = torch.arange(q.size(2))[:, None] - torch.arange(k.size(2))
    scores = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5).masked_fill((distance < 0) | (distance >= T), -torch.inf)
    return scores.softmax(-1) @ v


@torch.no_grad()
def recomputed(model, prompts, written):
    """Logits without a cache: after each of the bytes written, (B, n) lists, a whole new pass over what the rules say
    may be seen."""
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


def generated(model, prompts, n):
    """(n greedy bytes of each row, as lists; the logits (n, B, V) after which they stand, from the cache)."""
    written = tokens(model, prompts, n)
    logits = choices.followed(torch.tensor(written).T, model, prompts)
    assert logits.argmax(-1).T.tolist() == written
    return written, logits


def near(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)  # of logits up to about 60


@pytest.mark.parametrize("prompt", [b"a", b"abc", b"abcdefgh"])
@pytest.mark.parametrize("n_kv_head", [2, 1])
@pytest.mark.parametrize("positions", SCHEMES)
def test_cache_equals_recomputing_the_whole_prefix(positions, n_kv_head, prompt):
    model = build(positions, n_kv_head=n_kv_head)
    written, logits = generated(model, [prompt], T - len(prompt) + 1)
    near(logits, recomputed(model, [prompt], written))


@pytest.mark.parametrize("prompts", [[b"a"], [b"abcdefgh"], [b"a prompt that is longer than T"],
                                     [b"ab", b"abcdefgh", b"q"]])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_past_block_size_a_window_slides(positions, prompts, monkeypatch):
    model = build(positions)
    written, logits = generated(model, prompts, 40)
    monkeypatch.setattr(Attention, "attend", banded)
    near(logits, recomputed(model, prompts, written))


@pytest.mark.parametrize("prompts", [[b"a"], [b"abcdefgh"], [b"a prompt that is longer than T"],
                                     [b"ab", b"abcdefgh", b"q"], [b"ab", b"abcdef", b"q"]])
@pytest.mark.parametrize("positions", ["learned", "learned_per_layer"])
def test_past_block_size_learned_positions_start_again(positions, prompts):
    model = build(positions)
    written, logits = generated(model, prompts, 40)
    near(logits, recomputed(model, prompts, written))


@pytest.mark.parametrize("positions", SCHEMES)
def test_ragged_rows_equal_single_prompts(positions):
    prompts, n = [b"abcd", b"z", b"hello"], 4 if positions.startswith("learned") else 30
    model = build(positions)
    written, logits = generated(model, prompts, n)
    for i, prompt in enumerate(prompts):
        near(logits[:, i:i + 1], choices.followed(torch.tensor(written[i])[:, None], model, [prompt]))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_block_size_one(positions):
    model = build(positions, block_size=1)
    written, logits = generated(model, [bytes([3, 7])], 5)
    near(logits[:, 0], model(torch.tensor([7, *written[0][:-1]])[:, None])[:, 0])


@pytest.mark.parametrize("positions", SCHEMES)
def test_long_prompt_is_cut_to_its_end(positions):
    model = build(positions)
    assert tokens(model, [b"nobody reads this 12345678"], 6) == tokens(model, [b"12345678"], 6)
    assert tokens(model, [b"12345678"], 6) != tokens(model, [b"02345678"], 6)


def test_length_is_exact():
    model = build()
    assert list(generate(model, [b"a", b"b"], 0)) == []
    assert [len(row) for row in tokens(model, [b"a", b"b"], 13)] == [13, 13]


@pytest.mark.parametrize("prompts", [[], [b""], [b"a", b""]])
def test_empty_prompts(prompts):
    with pytest.raises(ValueError, match="at least one byte"):
        next(generate(build(), prompts, 3))


def test_same_seed_same_bytes():
    model, how = build(), dict(temperature=3.0, top_k=20)
    world = torch.get_rng_state()
    first = tokens(model, [b"ab"] * 3, 20, **how)
    assert first == tokens(model, [b"ab"] * 3, 20, **how)
    assert torch.equal(world, torch.get_rng_state())
    other = torch.stack(list(generate(model, [b"ab"] * 3, 20, torch.Generator().manual_seed(6), **how)), 1).tolist()
    assert first != other and first[0] != first[1] != first[2]


# ---- the command ----

@pytest.fixture
def run_directory(tmp_path):
    model = build()
    torch.save({"format": "nanolab-1", "script": "train_enwik8", "step": 7, "settings": dict(model.config.__dict__),
                "model": model.state_dict(), "ema": None}, tmp_path / "last.pt")
    return tmp_path


@pytest.fixture
def run_main(monkeypatch, capfd):
    """A function: (exit status, stdout, stderr) of `python sample.py WORDS`, in this process."""
    def run(*words, stdout=None):
        stdout = stdout or io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["sample.py", *map(str, words), "--device", "cpu"])
            patch.setattr(sys, "stdout", stdout)
            before, status = dict(vars(sample)), 0
            try:
                sample.main()
            except SystemExit as error:
                status = error.code
            finally:
                vars(sample).update(before)
            stdout.flush()
        written = stdout.buffer.getvalue() if hasattr(stdout, "buffer") else b""
        return status, written.decode(), capfd.readouterr().err
    return run


def test_main_writes_prompt_and_sample(run_directory, run_main):
    expected = (b"The " + bytes(tokens(build(), [b"The "], 30)[0])).decode(errors="replace") + "\n"
    assert run_main(run_directory, "--prompt", "The ", "--length", 30, "--greedy") == (0, expected, "")
    assert run_main(run_directory, "--prompt", "The ", "--length", 30, "--temperature", 0) == (0, expected, "")
    assert run_main(run_directory / "last.pt", "--prompt", "é", "--length", 0) == (0, "é\n", "")


def test_main_seeds(run_directory, run_main):
    texts = [run_main(run_directory, "--length", 40, "--seed", seed, "--temperature", 3)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_main_writes_each_row_of_a_batch(run_directory, run_main):
    rows = tokens(build(), [b"ab"] * 3, 20, temperature=2.0, top_k=10, top_p=0.6, min_p=0.3)
    expected = "".join(f"--- sample {i} of 3 ---\n{(b'ab' + bytes(row)).decode(errors='replace')}\n"
                       for i, row in enumerate(rows, 1))
    assert len(set(map(tuple, rows))) == 3
    status, out, err = run_main(run_directory, "--prompt", "ab", "--n_samples", 3, "--length", 20, "--seed", 5,
                                "--temperature", 2, "--top_k", 10, "--top_p", 0.6, "--min_p", 0.3)
    assert (status, out, err) == (0, expected, "")
    row, = tokens(build(), [b"ab"], 20, temperature=2.0, typical_p=0.2)
    _, out, _ = run_main(run_directory, "--prompt", "ab", "--length", 20, "--seed", 5, "--temperature", 2,
                         "--typical_p", 0.2)
    assert out == (b"ab" + bytes(row)).decode(errors="replace") + "\n" and row != tokens(
        build(), [b"ab"], 20, temperature=2.0)[0]
    status, out, _ = run_main(run_directory, "--prompt", "ab", "--n_samples", 2, "--length", 0)
    assert (status, out) == (0, "--- sample 1 of 2 ---\nab\n--- sample 2 of 2 ---\nab\n")


class Screen:
    """A standard output that remembers what each flush showed."""
    def __init__(self):
        self.shown, self.waiting = [], ""

    def write(self, text):
        self.waiting += text

    def flush(self):
        self.shown.append(self.waiting)
        self.waiting = ""


def speak(monkeypatch, spoken):
    """generate() yields the bytes of `spoken`, whatever the model says."""
    monkeypatch.setattr(sample, "generate", lambda *_, **__: iter([torch.tensor([byte]) for byte in spoken]))


@pytest.mark.parametrize("spoken, shown", [
    ("aé€😀b".encode(), ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]),
    (b"a\xffb", ["a", "\ufffd", "b"]),
    (b"\xe2\x82a", ["", "", "\ufffda"]),                         # a character broken off by another
    (b"a\xf0\x9f\x98", ["a", "", "", ""]),                       # and by the end
])
def test_bytes_stream_as_whole_characters(spoken, shown, run_directory, run_main, monkeypatch):
    speak(monkeypatch, spoken)
    screen = Screen()
    assert run_main(run_directory, "--prompt", ">", "--length", len(spoken), stdout=screen)[0] == 0
    assert screen.shown[0] == ">" + shown[0] and screen.shown[1:len(shown)] == shown[1:]
    assert "".join(screen.shown) == (b">" + spoken).decode(errors="replace") + "\n"


def test_a_prompt_may_end_inside_a_character(run_directory, run_main, monkeypatch):
    """Bytes that are no UTF-8 reach Python's arguments as surrogates."""
    speak(monkeypatch, b"\x82\xac")
    assert run_main(run_directory, "--prompt", b"x\xe2".decode(errors="surrogateescape"))[:2] == (0, "x€\n")


def test_a_terminal_that_does_not_know_every_character(run_directory, run_main, monkeypatch):
    speak(monkeypatch, "a€b".encode())
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert run_main(run_directory, "--prompt", ">", stdout=screen)[:2] == (0, ">a?b\n")


@pytest.mark.parametrize("words, said", [
    ([], "which run"),
    (["{run}/other.pt"], "other.pt"),
    (["{run}/empty"], "has no last.pt"),
    (["{run}", "--prompt", ""], "at least one byte"),
    (["{run}", "--top_p", "1.5"], "--top_p 1.5"),
    (["{run}", "--top_p", "0"], "--top_p 0"),
    (["{run}", "--top_k", "0"], "--top_k 0"),
    (["{run}", "--typical_p", "0"], "--typical_p 0"),
    (["{run}", "--min_p", "-0.1"], "--min_p -0.1"),
    (["{run}", "--temperature", "-1"], "--temperature -1"),
    (["{run}", "--n_samples", "0"], "--n_samples 0"),
    (["{run}", "--weights", "ema"], "no averaged weights"),
])
def test_main_errors_are_one_line(words, said, run_directory, run_main):
    (run_directory / "empty").mkdir()
    status, out, err = run_main(*(word.format(run=run_directory) for word in words))
    assert status == 2 and out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
