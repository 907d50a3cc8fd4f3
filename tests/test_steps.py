"""A step is a step: N passes over B rows are one pass over N B rows, for every task of train_facts.py and every kind of
train_enwik8.py; what is saved first, and what of the last step; and the preset that says it is nanoGPT's is. About 15 s
on one core."""
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
from data import text as texts
from model import from_checkpoint
from nanolab.run import Run, load_checkpoint


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(f"line {i % 17} of the {word} has a {word[::-1]}" for i in range(60) for word in
                              "river mountain valley forest lake".split()))
    return path


@pytest.fixture
def trained(monkeypatch, tmp_path, one_thread):
    """trained(script, name, **settings) -> its directory: the script in this process."""
    def run(script, name, **settings):
        words = [f"--{key}" if value is True else f"--no-{key}" if value is False else f"--{key}={value}"
                 for key, value in settings.items()]
        monkeypatch.setattr(sys, "argv", [script, f"--out_dir={tmp_path}", f"--run_name={name}", *words])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return tmp_path / Path(script).stem / name
    return run


def lines(run):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if line["split"] == "train"]


TINY = dict(n_layer=2, n_head=2, n_embd=16, optimizer="sgd", momentum=0.0, lr=0.1, schedule="constant", warmup_steps=0,
            max_steps=1, eval_interval="none", log_interval=1, device="cpu", dtype="float32", init="normal",
            dropout=0.0)
BYTES = TINY | dict(block_size=16, n_targets=1, intermediate_losses=False, positions="rope", sample_length=0)
MOE = dict(ff="moe", n_expert=4, expert_balance="bias", activation="swiglu")
KINDS = {
    "enwik8: layers": dict(n_targets=2, intermediate_losses=True, positions="learned_per_layer", batching="epochs"),
    "enwik8: experts": MOE | dict(mtp_depth=1, n_shared_expert=1, mixer="mla"),
    "enwik8: one expert": MOE | dict(expert_top_k=1, expert_balance="none"),
    "enwik8: memory": dict(mixer="compressive,mamba"),
    "enwik8: pyramid": dict(shorten=2, n_layer=3, output="stablemax"),
    "facts: in_tool": dict(tokenizer="bytes", kind="bios", form="natural"),
    "facts: in_weight": dict(prefix=True),
    "facts: both": dict(loss_on="all", mixer="compressive"),
    "facts: mqar": dict(block_size=32, random_non_queries=True, n_rows=90, n_test_rows=20, mqar_vocab=32),
    "facts: text": MOE | dict(block_size=16, tokenizer="bpe:270", mixer="window,mingru"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_one_pass_over_all_their_rows(trained, text, kind):
    script, task = kind.split(": ")
    settings = BYTES if script == "enwik8" else TINY | dict(task=task, n_people=20, n_unseen=0)
    settings = settings | KINDS[kind] | (dict(dataset=text) if "enwik8" in script or task == "text" else {})
    runs = [trained(f"train_{script}.py", f"{n}", **settings, batch_size=12 // n, grad_accum=n) for n in (3, 1)]
    (some,), (whole,) = map(lines, runs)
    assert some.keys() == whole.keys() and whole["grad_norm"] > 1e-3
    for name in whole.keys() - {"split", "time", "tokens_per_s", "mfu", "seconds"}:
        assert some[name] == pytest.approx(whole[name], rel=1e-5), name
    assert script == "facts" or "moe" not in kind or {"experts_0", "imbalance_1"} <= whole.keys()
    some, whole = (load_checkpoint(run / "last.pt")["model"] for run in runs)
    for name in whole:
        torch.testing.assert_close(some[name], whole[name], rtol=1e-5, atol=1e-6, msg=name)
    assert "moe" != settings.get("ff") or settings["expert_balance"] != "bias" or whole["blocks.0.ff.correction"].any()


def test_what_is_not_linear_in_the_batch_is_said(trained, text, capsys):
    trained("train_enwik8.py", "run", **BYTES | MOE | dict(dataset=text, batch_size=2, grad_accum=2, max_steps=0,
                                                           expert_balance="loss"))
    assert "grad_accum 2: expert_balance loss is not linear in the batch" in capsys.readouterr().out


def test_last_pt_is_first_and_the_last_step_may_be_the_best(trained, text, monkeypatch):
    """A run that is killed once best.pt is there has a last.pt to go on from. The last step counts where eval_interval
    does not divide it, too; last.pt knows of it what best.pt knows, but no line, from which a longer run goes on."""
    saves, save = [], Run.save
    monkeypatch.setattr(Run, "save", lambda self, name, step, **more: (saves.append((name, step)),
                                                                       save(self, name, step, **more)))
    better = dict(lr=0.3, eval_interval=2, max_steps=3, batch_size=4)
    run = trained("train_enwik8.py", "run", **BYTES | better | dict(dataset=text, eval_windows=2))
    assert saves == [("last.pt", 0), ("best.pt", 2), *[(name, 3) for name in ("last.pt", "best.pt", "last.pt")]]
    summary = json.loads((run / "summary.json").read_text())
    lines = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
             if line["split"] == "val"]
    assert [(line["step"], line.get("final", False)) for line in lines] == [(2, False), (3, False), (3, True)]
    assert summary["best_step"] == 3 and summary["best_bpb"] == lines[1]["bpb"] < lines[0]["bpb"]
    last, best = (load_checkpoint(run / name) for name in ("last.pt", "best.pt"))
    assert last["loop"] == best["loop"] and last["loop"]["best"] == lines[1]["bpb"] and last["loop"]["evaluated"] == 2
    assert last["metrics_lines"] == best["metrics_lines"] == 4
    saves.clear()
    trained("train_facts.py", "run", **TINY | better | dict(task="mqar", block_size=32, n_rows=90, n_test_rows=20,
                                                            mqar_vocab=32))
    assert saves[:2] == [("last.pt", 0), ("best.pt", 0)]


# ------------------------------------------------------------------------------------------------------- nanogpt_cpu

def gpt2(w, x, y, n_layer, n_head):
    """GPT-2's loss, nats: pre-LN, no biases, a tied head. w: weights by the name of nanolab's; x, y (B, T) int64."""
    B, T = x.shape
    C = w["embed"].size(1)

    def layer_norm(h, gain):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    h = w["embed"][x] + w["position"][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(n_layer):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = (layer_norm(h, block["norm1.gain"]) @ block["mixer.qkv.weight"].T).view(B, T, 3, n_head, -1).permute(
            2, 0, 3, 1, 4)                                               # each (B, H, T, D)
        scores = (q @ k.transpose(2, 3) / math.sqrt(C // n_head)).masked_fill(future, -math.inf)
        h = h + (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C) @ block["mixer.out.weight"].T
        wide = layer_norm(h, block["norm2.gain"]) @ block["ff.up.weight"].T
        h = h + 0.5 * wide * (1 + torch.erf(wide / math.sqrt(2))) @ block["ff.down.weight"].T
    logits = layer_norm(h, w["norm.gain"]) @ w["embed"].T
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def test_nanogpt_cpu_is_nanogpts_formula(trained, text):
    """The first 20 losses of the preset, in float32, from the same weights and batches: decoupled decay of everything
    with two dimensions, a warm-up by (i + 1) / 101, then a cosine; the norm clipped to 1."""
    few = dict(preset="nanogpt_cpu", dataset=text, dtype="float32", device="cpu", max_steps=20, save_interval=100,
               eval_interval="none", log_interval=1, sample_length=0)
    zero = load_checkpoint(trained("train_enwik8.py", "zero", **few | dict(max_steps=0)) / "last.pt")
    run = trained("train_enwik8.py", "run", **few)
    s = zero["settings"]
    assert (s["n_layer"], s["n_head"], s["n_embd"], s["block_size"], s["batch_size"]) == (4, 4, 128, 64, 12)
    w = {name: p.detach().clone().requires_grad_() for name, p in from_checkpoint(zero).named_parameters()}
    batches = texts.Batches(texts.load(str(text), None, "cpu").train, 12, 64, 1, "random", s["data_seed"])
    mean, square = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    found = []
    for i in range(20):
        x, y = batches.next()
        loss = gpt2(w, x, y[..., 0], 4, 4)
        loss.backward()
        found.append(loss.item())
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in w.values()))
        rate = 1e-3 * (i + 1) / (100 + 1)
        with torch.no_grad():
            for name, p in w.items():
                grad = p.grad * min(1.0, 1.0 / (norm + 1e-6))
                mean[name] = 0.9 * mean[name] + 0.1 * grad
                square[name] = 0.99 * square[name] + 0.01 * grad * grad
                if p.dim() >= 2:
                    p.mul_(1 - rate * 0.1)
                root = (square[name] / (1 - 0.99 ** (i + 1))).sqrt() + 1e-8
                p.sub_(rate * mean[name] / (1 - 0.9 ** (i + 1)) / root)
                p.grad = None
    assert [line["loss"] for line in lines(run)] == pytest.approx(found, rel=1e-6)
