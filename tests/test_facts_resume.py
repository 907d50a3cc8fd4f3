"""train_facts.py as it is typed: its first step against arithmetic, exposures, watched and evaluated, and what it
refuses. What it shares with the other scripts is in test_resume.py."""
import functools
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import evaluate
import sample
import train_facts
from data import facts, mqar, tokens
from data.facts import Database, Vocabulary, people
from model import from_checkpoint
from nanolab import probe, settings
from nanolab.generate import generate
from nanolab.run import load_checkpoint
from nanolab.score import score
from forks import assert_done, assert_error, records, snapshot, summary
from scripts import curve, of
from test_scripts import noting

train, at, done = of("train_facts")
TOOLS = {"train_facts.py": train_facts, "evaluate.py": evaluate, "sample.py": sample, "probe.py": probe}


# ---------------------------------------------------------------------------------------------------- the first step

STEPS = {"all": dict(task="both", loss_on="all", grad_accum=3, data_seed=2),
         "prefix": dict(task="in_weight", prefix=True),
         "bytes": dict(task="in_tool", tokenizer="bytes", kind="bios", form="natural", tie_weights=True),
         "mqar": dict(task="mqar", block_size=32, grad_accum=2, random_non_queries=True)}


@pytest.mark.parametrize("case", STEPS)
def test_one_step_is_what_arithmetic_says(forks, tmp_path, case):
    """Of plain SGD: the logged loss is the mean over all targets of the step's passes together, and the weights move by
    the rate, half of its peak in the first of two steps of warm-up, times its gradient. Rows, masks and order are made
    here again."""
    done(forks, tmp_path, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0, schedule="constant", warmup_steps=2,
         max_steps=1, keep_last=2, eval_interval="none", init="gpt2", **STEPS[case])
    old, new = (load_checkpoint(at(tmp_path) / f"step_0000000{i}.pt") for i in (0, 1))
    s = old["settings"]
    if s["task"] == "mqar":
        (x, y), _ = mqar.split(90, 20, 32, 4, 32, s["data_seed"], True, s["mqar_alpha"])
    else:
        made = people(6, s["data_seed"], s["kind"], 1.0, 4)
        ids, mask = facts.rows(facts.dialogs(made, s["task"], s["form"], s["data_seed"]), Vocabulary(s["tokenizer"]),
                               everything=s["loss_on"] == "all")
        x, y = ids[:, :-1], ids.masked_fill(~mask, -1)[:, 1:]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(s["data_seed"]))
    n = 8 * s["grad_accum"]
    x, y = x[order[:n]], y[order[:n]]
    parts = (y >= 0).view(s["grad_accum"], -1).sum(1)
    assert s["grad_accum"] == 1 or s["task"] == "mqar" or len(set(parts.tolist())) > 1, "the passes should differ"
    model = from_checkpoint(old)
    logits = model(x, prefix=(y >= 0).byte().argmax(1) + 1 if s["prefix"] else None)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    loss.backward()
    assert curve(at(tmp_path), "loss") == [pytest.approx(loss.item(), rel=1e-6)] and loss > 1
    for name, p in model.named_parameters():
        torch.testing.assert_close(new["model"][name], (p - 0.5 * p.grad).detach(), rtol=1e-5, atol=1e-6)
    assert max(p.grad.abs().max() for p in model.parameters()) > 1e-2


def test_exposures(forks, tmp_path):
    """Each of the 24 facts so often: 24 E / (8 x 2), rounded up; of a resumed run they have made max_steps what it is,
    unless that is typed."""
    settings = dict(grad_accum=2, exposures=5)
    done(forks, tmp_path, **settings)
    last, params = load_checkpoint(at(tmp_path) / "last.pt"), json.loads((at(tmp_path) / "params.json").read_text())
    assert last["step"] == 8 == math.ceil(24 * 5 / 16) and last["settings"]["max_steps"] == 8
    assert {name: params["settings"][name] for name in ("max_steps", "exposures", "block_size")} == dict(
        max_steps=8, exposures=5, block_size=last["settings"]["block_size"])
    more = done(forks, tmp_path, "--resume", **settings | dict(exposures=9, max_steps=10))
    assert "exposures 5.0 comes from the checkpoint: --exposures 9.0 is overruled" in more.out
    assert load_checkpoint(at(tmp_path) / "last.pt")["step"] == 10


# ---------------------------------------------------------------------------------------------------------- evaluate.py

@pytest.fixture(scope="module")
def runs(forks, text, tmp_path_factory):
    """A folder with runs of every kind; in_tool and in_weight have learned their eight people by heart."""
    folder = tmp_path_factory.mktemp("runs")
    learn = dict(n_people=8, n_unseen=24, n_embd=32, batch_size=32, warmup_steps=10, eval_interval=30,
                 save_interval=100, max_steps=80, log_interval=10, final_prompts=4096, eval_prompts=8)
    commands = [train(folder, run_name="tool", **learn, task="in_tool"),
                train(folder, run_name="weight", **learn | dict(max_steps=50), task="in_weight"),
                train(folder, run_name="mqar", task="mqar", block_size=32, n_test_rows=50, ema_decay=0.5,
                      final_prompts=50),
                train(folder, run_name="text", task="text", dataset=text, tokenizer="bpe:270", block_size=16),
                train(folder, run_name="uniform", task="text", dataset=text, tokenizer="bpe:270", block_size=16,
                      max_steps=0)]
    with ThreadPoolExecutor(2) as pool:
        for child in pool.map(lambda words: forks.run(words, folder), commands):
            assert_done(child)
    return folder


def table(child):
    """The rows under the header, as lists of words."""
    assert_done(child)
    return [line.split() for line in child.out.splitlines()[2:]]


def test_what_was_learned(runs):
    """32 facts each way, all right; of others almost nothing; the summary says so, with the bits of the weights."""
    tool, weight = (summary(at(runs, name)) for name in ("tool", "weight"))
    assert tool["accuracy_trained_tool_raw"] == tool["accuracy_trained"] == 1 == tool["calls_trained_tool_raw"]
    assert tool["accuracy_trained_no_tool_raw"] < 0.3 and tool["accuracy_unseen"] < 0.3
    assert weight["accuracy_trained_no_tool_raw"] == weight["accuracy_trained"] == 1 and weight["accuracy_unseen"] < 0.2
    assert 240 < weight["bits"] <= 250.1 and weight["bits_per_parameter"] == weight["bits"] / weight["parameters"]
    assert weight["bits_of_all"] == pytest.approx(8 * 31.25, abs=0.1)
    assert (tool["best"], weight["best"]) == (0, 0) and tool["rows"] == 80 * 32 and tool["status"] == "done"
    last = [line for line in records(at(runs, "tool")) if line.get("final")]
    assert [(line["people"], line["protocol"]) for line in last] == [
        ("trained", "tool"), ("unseen", "tool"), ("trained", "no_tool"), ("unseen", "no_tool")]


def test_evaluate_people(forks, runs, tmp_path):
    """The table's figures are the trainer's; --prompts asks fewer; another database is believed where it is read."""
    made, run = people(8, 1337, unseen=24), at(runs, "tool")
    Database(replace(made, values={name: values[1:] + values[:1] for name, values in made.values.items()})).save(
        tmp_path / "altered.db")
    tool, some, altered = (table(forks.run(["evaluate.py", run, *words], runs)) for words in (
        [], ["--prompts", 6, "--protocols", "no_tool,tool", "--batch_size", 3],
        ["--protocols", "tool", "--database", tmp_path / "altered.db"]))
    said = summary(run)
    assert [row[:2] for row in tool] == [["trained", "tool"], ["unseen", "tool"], ["trained", "no_tool"],
                                         ["unseen", "no_tool"]]
    for row in tool:
        assert row[2] == f"{said[f'accuracy_{row[0]}_{row[1]}_raw']:.4f}"
        assert row[-2] == ("32" if row[0] == "trained" else "96")
    assert tool[0][3:6] == ["1.0000", "1.0000", "0.0000"]                 # called, with the right call, and to an end
    assert [(row[1], row[-2]) for row in some] == [("no_tool", "6")] * 2 + [("tool", "6")] * 2
    assert float(altered[0][2]) < 0.9 and altered[0][3:5] == ["1.0000", "1.0000"]


def test_evaluate_recall(forks, runs):
    said = summary(at(runs, "mqar"))
    row, some = (table(forks.run(["evaluate.py", at(runs, "mqar"), *words], runs)) for words in (
        ["--weights", "ema", "--batch_size", 7], ["--prompts", 5]))
    assert row == [["mqar", f"{said['accuracy_ema']:.4f}", f"{said['loss_ema']:.4f}", "200"]] and some[0][-1] == "20"
    assert said["accuracy"] == said["accuracy_raw"] and 0 < said["reachable"] <= 1


def tokenizer_of(text):
    return tokens.train("bpe", text.read_bytes()[:int(0.9 * text.stat().st_size)], 270)


def test_evaluate_text(forks, runs, text, tmp_path):
    """Bits per byte of a tokenizer's ids; a model that was never trained has a zero classifier's: lg V a token. That
    tokenizer is not trained anew on another text."""
    (tmp_path / "other.txt").write_text("the forest has a tserof, line 3 of the lake has none\n" * 200)
    found = {}
    for name in ("text", "uniform"):
        child = forks.run(["evaluate.py", at(runs, name), "--protocols", "block,cache,stride:4", "--batch_size", 9],
                          runs)
        for split, protocol, bpb, *_, nats, n_bytes, _ in table(child):
            found[name, protocol] = float(bpb), float(nats), int(n_bytes.replace(",", ""))
            assert split == "val"
    (n_bytes,), said = {n for *_, n in found.values()}, summary(at(runs, "text"))
    assert len(found) == 6 and 0.04 < n_bytes / text.stat().st_size < 0.11
    assert found["text", "block"][0] == pytest.approx(said["bpb_raw"], abs=1e-4)
    assert found["text", "block"][0] < found["uniform", "block"][0] - 0.3
    ratios = [bpb / nats for bpb, nats, _ in found.values()]              # of all: tokens over bytes, in bits
    assert ratios == pytest.approx([ratios[0]] * 6, rel=1e-3) and 0.2 < ratios[0] * math.log(2) < 0.9
    row, = table(forks.run(["evaluate.py", at(runs, "text"), "--dataset", tmp_path / "other.txt", "--split", "train"],
                           runs))
    n, tokenizer = int(row[-2].replace(",", "")), tokenizer_of(text)
    assert row[:2] == ["train", "block"] and n == int(0.9 * (tmp_path / "other.txt").stat().st_size)
    ids = tokens.encode_corpus(tokenizer, (tmp_path / "other.txt").read_bytes()[:n])
    model = from_checkpoint(load_checkpoint(at(runs, "text") / "last.pt")).eval()
    assert float(row[2]) == pytest.approx(score(model, ids, sizes=tokens.token_bytes(tokenizer)).bpb, abs=1e-4)


def test_text_from_the_tokenizers_ids(forks, runs, text):
    """sample.py writes what the ids stand for, with the prompt as it was typed."""
    run = at(runs, "uniform")
    child = forks.run(["sample.py", run, "--prompt", "é \n", "--length", 60, "--temperature", 1], runs)
    assert_done(child)
    tokenizer, model = tokenizer_of(text), from_checkpoint(load_checkpoint(run / "last.pt")).for_inference().eval()
    ids = [int(token) for token in generate(model, [tokenizer.encode("é \n")], 60,
                                            torch.Generator().manual_seed(1337), temperature=1)]
    assert max(ids) >= 256 and child.out == f"é \n{tokenizer.decode(ids)}\n"


def test_which_layer_knows(forks, runs):
    """Of a run, by attribute; what there is to find: test_probe.py."""
    child = forks.run(["nanolab/probe.py", at(runs, "weight"), "--attribute", "birth_place"], runs)
    assert_done(child)
    lines = child.out.splitlines()
    assert re.match(r"trained people: [2-8], \d values of birth_place", lines[0])
    assert [line.split()[0] for line in lines[-4:]] == ["place", "embed", "blocks.0", "blocks.1"]


def test_watched_beside_the_training(forks, tmp_path):
    """The trainer evaluates nothing: the watcher asks of every checkpoint both kinds of people, and keeps the best."""
    quiet = dict(eval_interval="none", n_people=8, n_embd=32, batch_size=32, max_steps=40, save_interval=20,
                 keep_last=9, log_interval=10, warmup_steps=10)
    watcher = forks.start(["evaluate.py", "--watch", at(tmp_path), "--patience", 60], tmp_path)
    done(forks, tmp_path, **quiet)
    assert_done(watcher.wait())
    lines = [json.loads(line) for line in (at(tmp_path) / "evaluation.jsonl").read_text().splitlines()]
    steps = sorted({line["step"] for line in lines})
    assert {*steps} >= {0, 20, 40}
    for step in steps:
        assert sorted((line["protocol"], line["people"]) for line in lines if line["step"] == step) == [
            (protocol, kind) for protocol in ("no_tool", "tool") for kind in ("trained", "unseen")]
    found = {line["step"]: line["accuracy"] for line in lines
             if (line["protocol"], line["people"]) == ("tool", "trained")}
    best = load_checkpoint(at(tmp_path) / "best.pt")["step"]
    assert found[best] == max(found.values()) > found[0] and best == min(s for s in found if found[s] == found[best])
    assert {line["split"] for line in records(at(tmp_path))} == {"train"}


# ------------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {  # those of any script: test_resume.py, test_settings.py; of tokenizers and data: test_tokens.py, ...
    "train_facts.py --task text": ["closed", "text"], "train_facts.py --kind bios": ["closed", "bios"],
    "train_facts.py --form natural": ["closed", "natural"], "train_facts.py --names plain": ["closed", "plain"],
    "train_facts.py --task mqar --tokenizer bytes --exposures 3": ["exposures", "mqar"],
    "train_facts.py --task text --tokenizer bytes --database x": ["database", "text"],
    "train_facts.py --prefix --loss_on all": ["prefix"], "train_facts.py --prefix --task mqar": ["prefix"],
    "train_facts.py --prefix --mixer mamba --max_steps 1": ["prefix", "mamba"],
    "train_facts.py --block_size 21": ["block_size is 21", "22 tokens"],
    "train_facts.py --database OTHERS": ["OTHERS", "other people"],
    "evaluate.py TOOL --protocols block": ["block", "tool and no_tool"],
    "evaluate.py WEIGHT --protocols tool": ["tool", "in_weight", "no_tool"],
    "evaluate.py MQAR --protocols tool": ["tool", "mqar"],
    "evaluate.py TEXT --protocols no_tool": ["no_tool", "block, cache"], "evaluate.py TOOL --weights ema": ["ema"],
    "evaluate.py TOOL --database FOREIGN": ["FOREIGN", "not a database of people"],
    "evaluate.py TOOL --prompts 0": ["prompts"], "sample.py TOOL": ["was trained on in_tool, not on text"],
    "probe.py WEIGHT --asked ocupation": ["no attribute 'ocupation'"], "probe.py TEXT": ["no model of people"]}


def test_mistakes(in_process, runs, tmp_path, monkeypatch):
    """One line that says what is wrong, status 2, nothing written."""
    names = {name.upper(): at(runs, name) for name in ("tool", "weight", "mqar", "text")} | {
        name: tmp_path / name for name in ("FOREIGN", "OTHERS")}
    names["FOREIGN"].write_bytes(b"SQLite format 3\0 but not really" * 50)
    Database(people(5, 1, "bios")).save(names["OTHERS"])
    before, folder, read = snapshot(runs), tmp_path / "folder", functools.cache(settings._read_settings)
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(settings, "_read_settings", lambda path: dict(read(path)))   # of three scripts, not of 21 lines
    for line, said in MISTAKES.items():
        tool, *words = [names.get(word, word) for word in line.split()]
        words += ["--device", "cpu", "--n_people", "8"] if tool == "train_facts.py" else []
        status, _, error = in_process(TOOLS[tool], *words)
        with noting(line):
            assert status == 2 and re.fullmatch("error: [^\n]+\n", error) and all(word in error for word in said), error
    assert not [*folder.iterdir()] and snapshot(runs) == before


@pytest.mark.parametrize("task, vocab_sizes", [("in_tool", [270]), ("text", [275, None])])
def test_another_tokenizer_in_its_place(forks, text, tmp_path, task, vocab_sizes):
    """A file that was replaced, by one as large or larger, or taken away between training and resume or evaluation: not
    quietly other ids."""
    file, content, run = tmp_path / "words.tok", text.read_bytes(), at(tmp_path / "runs")
    settings = dict(task=task, dataset=text, block_size=96, max_steps=1, tokenizer=file)
    tokens.train("bpe", content, 270).save(file)
    done(forks, tmp_path / "runs", **settings)
    commands = (train(tmp_path / "runs", "--resume", **settings | dict(max_steps=2)),
                ["evaluate.py", run, *["--prompts", 2] * (task == "in_tool")])
    before = snapshot(tmp_path / "runs")
    for vocab_size in vocab_sizes:
        file.unlink()
        if vocab_size:
            tokens.train("bpe", content[::-1] if vocab_size == 270 else content, vocab_size).save(file)
        for command in commands:
            assert_error(forks.run(command, tmp_path), "does not match the checkpoint" if vocab_size else file)
    assert snapshot(tmp_path / "runs") == before
