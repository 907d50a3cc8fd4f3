"""evaluate.py --watch beside a trainer that writes, prunes, dies, goes back and resumes."""
import json
import shutil
import signal

import torch

import evaluate
from nanolab.run import load_checkpoint, run_metrics
from nanolab.score import Ensemble, score
from forks import assert_done, wait_for
from toy import run_main

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
    assert_done(forks.run([*TRAIN, "--max_steps", "40", "--keep_last", "9"], tmp_path))
    assert_done(watcher.wait())
    found = {(line["step"], line["protocol"]): line["bpb"] for line in lines(tmp_path)}
    assert {step for step, _ in found} >= {10, 20, 30, 40} and len(found) == len(lines(tmp_path))
    best = min(found[step, "block"] for step, protocol in found if protocol == "block")
    assert found[load_checkpoint(run / "best.pt")["step"], "block"] == best
    out = evaluated(run, *words)
    assert f"{found[40, 'block']:.4f}" in out and f"{found[40, 'stride:16']:.4f}" in out
    assert {line["split"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())} == {"train"}
    assert [line["step"] for line in run_metrics(run)] == sorted(line["step"] for line in run_metrics(run))
    with open(run / "evaluation.jsonl", "a") as file:
        file.write('{"step": 40, "bp')                       # as a kill or a full disk may leave it
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
    refused("no run is there", "--watch", tmp_path / "none", "--patience", 0.2)
    refused("which run?", "a", "--watch", "b")
    refused("has no posterior", run, "--samples", 2)
    (run / "evaluation.jsonl").unlink()
    (run / "summary.json").write_text('{"status": "running"}')
    first = watch(forks, tmp_path, "--patience", "300")
    wait_for(lambda: len(lines(tmp_path)) == 1)
    refused("another process is watching", "--watch", run)
    first.kill(signal.SIGINT)
    assert first.wait().code == 130
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    refused("w/last.pt is truncated", "--watch", run)
    refused("block and stride", run, "--samples", 2, "--protocols", "cache")


def test_a_trainer_that_dies_prunes_and_goes_back(forks, tmp_path):
    """Killed without a word: the watcher ends after its patience. Resumed from further back: what the trainer took
    back is taken back here too. Pruned files never stop it."""
    run, watcher = tmp_path / RUN, watch(forks, tmp_path, "--patience", "2")
    trainer = forks.start([*TRAIN, "--max_steps", "100000", "--keep_last", "1", "--save_interval", "5"], tmp_path)
    wait_for(lambda: len({line["step"] for line in lines(tmp_path)}) >= 4)
    trainer.kill(signal.SIGKILL)
    trainer.wait()
    watcher.wait()
    assert_done(watcher)
    assert "no trainer for 2 seconds" in watcher.out
    seen = sorted({line["step"] for line in lines(tmp_path)})
    assert load_checkpoint(run / "last.pt")["step"] in seen
    words = [*TRAIN, "--max_steps", str(seen[1] + 5), "--data_seed", "7"]
    words[words.index("w")] = "other"
    assert_done(forks.run(words, tmp_path))                        # a checkpoint of fewer steps, put in its place
    shutil.copy(tmp_path / "runs/train_enwik8/other/last.pt", run / "last.pt")
    for old in run.glob("step_*.pt"):
        old.unlink()
    evaluated("--watch", run, "--patience", "1")
    assert max(line["step"] for line in lines(tmp_path)) == seen[1] + 5


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
