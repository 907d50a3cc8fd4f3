"""bench.py: what a row says, the order of turns, peers that are there, missing or wrong, and a table as JSON."""
import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from choices import refused
from test_scripts import fresh

PEER = '''
import torch, types

GPTConfig = types.SimpleNamespace

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters")  # as nanoGPT does: it must not get into the table
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, lr, betas, device):
        print("fused")
        return torch.optim.SGD(self.parameters(), lr)

    def forward(self, x, y):
        logits = self.table(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def generate(self, x, n, temperature, top_k):
        for _ in range(n):
            x = torch.cat((x, self.table(x[:, -1]).argmax(-1, keepdim=True)), 1)
'''


@pytest.fixture
def peer(tmp_path):
    (tmp_path / "model.py").write_text(PEER)
    return tmp_path


def test_a_ratio_above_1_says_that_ours_is_better(monkeypatch, capsys):
    monkeypatch.setattr(bench, "found", [])
    taken = {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 4.0, 4.0]}
    bench.row("rate", "tokens/s", 100, taken)
    bench.row("cost", "ms", 1e3, taken, lower=True)
    rate, cost = bench.found
    assert (rate["ours"], rate["beside"]["theirs"]["theirs"], rate["quartiles"]) == (50, 25, (25, 100))
    assert (cost["ours"], cost["beside"]["theirs"]["theirs"]) == (2000, 4000)
    for noted in bench.found:  # of the rounds' ratios 3, 2, 1: not of the medians
        assert noted["beside"]["theirs"]["ratio"] == 2 and noted["beside"]["theirs"]["quartiles"] == (1, 3)
    assert capsys.readouterr().out.count("2.00x   (1.00 .. 3.00)") == 2 and bench.spread([3.0]) == (3.0, 3.0, 3.0)


def test_sides_take_turns_and_the_first_run_does_not_count(monkeypatch):
    order = []
    sides = {name: lambda name=name: order.append(name) for name in "abc"}
    monkeypatch.setattr(bench, "rounds", 4)
    taken = bench.in_turns(sides)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in taken.items()} == dict.fromkeys("abc", 4)
    assert [len(values) for values in bench.in_turns(sides, 2).values()] == [2, 2, 2]


def test_peers(peer, monkeypatch):
    assert list(bench.load_peers(f"nanogpt={peer}")) == ["nanoGPT"] and bench.load_peers(None) == {}
    for words in ("nanogpt", "gpt=x", f"nanogpt={peer}/no", f"nanogpt={peer},other"):
        refused("--peer", bench.load_peers, words)
    refused("liger: its kernels need a GPU", bench.load_peers, "liger")
    monkeypatch.setattr(bench, "where", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    refused("pip install --no-deps liger-kernel", bench.load_peers, "liger")
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    refused("pip install x-transformers", bench.load_peers, "x-transformers")


def test_our_sides_train_and_generate():
    torch.manual_seed(0)
    g = fresh("bench.py")
    g.update(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=2, steps=3)
    model = g["our_model"]()
    before = [p.detach().clone() for p in model.parameters()]
    g["our_training"](model)()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))
    sampler = model.for_inference().train()
    g["our_sampling"](sampler, 2)()
    assert not sampler.training  # nothing is dropped
    g["where"] = torch.device("meta")
    assert {p.device.type for make in (g["our_model"], lambda: g["of_mixer"]("window", 8))
            for p in make().parameters()} == {"meta"}


def test_the_products_alone_are_all_of_the_models_work():
    g = fresh("bench.py")
    g.update(n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=3, steps=2)
    model = g["our_model"]()
    with FlopCounterMode(display=False) as counter:
        g["bare_products"](model)()
    assert counter.get_total_flops() == 2 * 3 * 8 * model.flops_per_token(8)


def test_a_peak_is_that_of_its_own_run():
    big = bench.peak_of(lambda: torch.ones(50_000_000).sum())
    if big is None:
        pytest.skip("the system cannot count a peak anew")
    small = bench.peak_of(lambda: torch.ones(1_000_000).sum())
    assert 150e6 < big - small < 250e6


def test_every_operation_of_a_case_is_its_twin():
    """What is timed beside one another computes the same."""
    torch.manual_seed(0)
    names = []
    for case in bench.kernel_cases():
        if case.name == "selective_scan":  # a second long; its own tests compare it
            continue
        names.append(case.name)
        with torch.no_grad(), bench.ops.using("triton"):
            ours = case.op(*case.inputs)
        with torch.no_grad(), bench.ops.using("torch"):
            theirs = (case.twin or case.op)(*case.inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert (case.flops > 0) != (case.bytes > 0)
    assert len(names) == len(set(names)) >= 18


def test_the_table_as_json(peer, tmp_path, forks):
    size = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 2 --steps 2 --eval_block_size 16".split()
    done = forks.run(["bench.py", "--peer", f"nanogpt={peer}", "--rounds", 2, "--threads", 1, "--draws", "1,2",
                      "--json", "table.json", *size], tmp_path)
    assert done.code == 0, done.err
    table = json.loads((tmp_path / "table.json").read_text())
    rows = {(row["kind"], row["name"]): row for row in table["rows"]}
    assert {kind for kind, _ in rows} == {"train", "memory", "generate", "evaluate", "optimiser"}
    assert rows["train", "training"]["beside"]["nanoGPT"]["ratio"] > 0
    assert rows["generate", "batch 2, cache"]["ours"] > 0 and "of peak" in rows["train", "training"]["note"]
    assert rows["evaluate", "cache"]["beside"]["stride:1"]["ratio"] > 0
    assert 50 < rows["memory", "training"]["ours"] < 5000  # megabytes
    assert rows["train", "training"]["beside"]["its products"]["ratio"] > 0
    assert "number of parameters" not in done.out and done.out.count("nanoGPT") == 4


def test_a_byte_by_context_has_rows_exponents_and_a_picture(tmp_path, forks):
    done = forks.run(["bench.py", "--what", "contexts", "--contexts", "8,8,16,32", "--mixers", "window mingru",
                      "--rounds", 1, "--threads", 1, "--json", "table.json"], tmp_path)
    assert done.code == 0 and done.out.count("exponents train") == 2, done.err
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert len(rows) == 24 and all(row["ours"] > 0 and row["unit"] == "us/byte" for row in rows)
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would begin")
def test_the_preset_for_a_gpu_wants_one(tmp_path, forks):
    done = forks.run(["bench.py", "--preset", "gpu"], tmp_path)
    assert done.code == 2 and "there is no GPU; --preset big" in done.err


def test_presets_are_timed_by_their_own_log(tmp_path, forks):
    """A mistake in the second is one line; what the kinds before it said is written by then."""
    small = "cpu/n_layer=1/n_embd=16/block_size=16"
    ask = ["bench.py", "--what", "optimiser,presets", "--n_embd", 16, "--rounds", 1, "--preset_steps", 20, "--device",
           "cpu", "--json", "table.json", "--preset_runs"]
    assert "optimiser" in forks.run([*ask, small], tmp_path).out
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert rows[-1]["name"] == small and rows[-1]["ours"] > 0 and rows[-1]["unit"] == "tokens/s"
    assert "% of peak" in rows[-1]["note"] and rows[-1]["note"].endswith(" MB")
    (tmp_path / "table.json").unlink()
    done = forks.run([*ask, small + "/n_embdd=8"], tmp_path)
    assert done.code == 2 and "did you mean --n_embd?" in done.err
    assert {row["kind"] for row in json.loads((tmp_path / "table.json").read_text())["rows"]} == {"optimiser"}
