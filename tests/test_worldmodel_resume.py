"""train_worldmodel.py as it is typed: stage by stage, evaluated, rolled out, played, on files of one's own. What it
shares with the other scripts is in test_resume.py."""
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from nanolab.run import load_checkpoint
from test_play import pixels, post, request
from forks import assert_done, assert_equal, assert_error, records, snapshot, summary, wait_for
from scripts import of

train, at, done = of("train_worldmodel")
STAGES = ("tokenizer", "actions", "dynamics", "text", "frame")


@pytest.fixture(scope="module")
def base(forks, tmp_path_factory):
    """A finished run of all stages."""
    folder = tmp_path_factory.mktemp("base")
    done(forks, folder, save_interval=100, play_presses=8)
    return at(folder)


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, at(tmp_path / "runs")))


@pytest.fixture(scope="module")
def played(forks, tmp_path_factory):
    """A finished run under true actions: of latent ones so short a run may have no code for some."""
    folder = tmp_path_factory.mktemp("played")
    done(forks, folder, save_interval=100, tokens="cells", action_source="true", max_steps=1, play_presses=8)
    return at(folder)


def test_what_a_run_leaves(base):
    found = records(base)
    assert [line["stage"] for line in found if line["split"] == "val"] == [
        name for name in STAGES for _ in range(3)]            # before, at step 3 and at the end
    steps = [line["step"] for line in found if line["split"] == "train"]
    assert steps == list(range(1, 21))
    assert list(load_checkpoint(base / "last.pt")["done"]) == list(STAGES)
    told = summary(base)
    assert told["status"] == "done" and told["step"] == 20 and told["stages"] == list(STAGES)
    assert {"tokenizer_psnr", "actions_information", "dynamics_agent", "text_perplexity", "frame_drawn",
            "rollout_psnr_4", "rollout_copy_4", "rollout_permuted_4", "rollout_random_4"} <= told.keys()
    assert (base / "curves.png").exists()


def test_stages_one_by_one_are_all_at_once(forks, tmp_path, base):
    """Stage after stage by --resume: the weights of one command. A stage that lacks another is refused."""
    for i, name in enumerate(STAGES):
        done(forks, tmp_path, *["--resume"] * (i > 0), stage=name, save_interval=100, play_presses=0)
    apart, together = (load_checkpoint(run / "last.pt")["done"] for run in (at(tmp_path), base))
    assert_equal(apart, together, "done")
    for more, lacked in ((dict(stage="dynamics"), "tokenizer"), (dict(stage="dynamics", tokens="cells"), "actions")):
        assert_error(forks.run(train(tmp_path / "new", **more), tmp_path),
                     f"stage dynamics reads what stage {lacked} learns")
    assert not (tmp_path / "new").exists()
    child = forks.run(train(tmp_path / "new", stage="tokenizer", max_steps=20), tmp_path, die_at=30)
    assert child.code == -signal.SIGKILL
    assert_error(forks.run(train(tmp_path / "new", "--resume", stage="actions"), tmp_path),
                 "in the middle of stage tokenizer")


def test_a_checkpoint_that_lacks_what_its_stages_ended_with(forks, copy):
    """Resumed it says the finished stages' figures, but for their seconds."""
    before, checkpoint = summary(copy), torch.load(copy / "last.pt", weights_only=True)
    del checkpoint["ended"]
    torch.save(checkpoint, copy / "last.pt")
    done(forks, copy.parents[1], "--resume")
    figures = {key for key in before if key.startswith(STAGES) and not key.endswith("seconds")}
    assert "tokenizer_psnr" in figures
    assert {key: summary(copy)[key] for key in figures} == {key: before[key] for key in figures}


def test_eval_only_changes_nothing(forks, copy):
    before, told = snapshot(copy), summary(copy)
    child = forks.run(["train_worldmodel.py", "--out_dir", copy.parents[1], "--run_name", "run", "--resume",
                       "--eval_only"], copy)
    assert_done(child)
    assert all(f"{name}: loss" in child.out for name in STAGES) and snapshot(copy) == before
    assert re.search("^rollouts[^:]*: psnr_1", child.out, re.M) and f"psnr_4 {told['rollout_psnr_4']:.4g}" in child.out
    assert f"agent {told['dynamics_agent']:.4g}" in child.out and f"played: agent {told['play_agent']:.4g}" in child.out


def test_rollout(forks, tmp_path, played):
    """PNG and GIF of as many frames as actions and the first; the same again is the same."""
    from PIL import Image
    strip, movie = (played / "samples" / f"rollout.{kind}" for kind in ("png", "gif"))

    def rollout(actions, *more):
        return forks.run(["train_worldmodel.py", "--rollout", played, "--actions", actions, *more], tmp_path)
    child = rollout("0,3,3,1", "--log_cache")
    assert_done(child)
    assert "layer" in child.out and "rollout.png" in child.out
    with Image.open(movie) as gif:                            # frames that are alike are one, shown as long as all
        shown = [gif.seek(i) or round(gif.info["duration"] / 250) for i in range(gif.n_frames)]
        assert sum(shown) == 5 and gif.size == (64, 64)
    before = strip.read_bytes(), movie.read_bytes()
    assert_done(rollout("0,3,3,1"))
    assert (strip.read_bytes(), movie.read_bytes()) == before
    assert_done(rollout("1", "--prompt", "agent at a1, ball at c2, walls b2."))
    assert_error(rollout("0,5"), "'5' is not one of")
    assert_error(rollout("0", "--prompt", "agent at a1, fish"), "--prompt: no caption")


def test_played(forks, tmp_path, played):
    """--play: the page, a new world, one from a sentence, steps; Ctrl-C ends it and nothing of the run has changed."""
    before = snapshot(played)
    child = forks.start(["train_worldmodel.py", "--play", played], tmp_path)
    try:
        wait_for(lambda: "play at http" in child.files[0].read_text())
        address = re.search(r"http://127.0.0.1:\d+/", child.files[0].read_text()).group()
        assert b"<!doctype html>" in request(address)[2]
        told = [post(address + way, body)[1] for way, body in (
            ("reset", {}), ("step", {"action": 1}), ("step", {"action": 3}),
            ("reset", {"prompt": "agent at a1, ball at c2, walls b2."}), ("reset", {"prompt": "write"}))]
        assert [pixels(view["frame"]).shape for view in told] == [(16, 16, 3)] * 5
        assert [view["cache"].split()[0] for view in told[:4]] == ["2", "3", "4", "1"]
        assert "in the true world: " in told[1]["note"] and pixels(told[1]["truth"]).shape == (16, 16, 3)
        assert "agent at a1" in told[3]["note"]
        status, answer = post(address + "reset", {"prompt": "caf\u00e9"})
        assert status == 400 and "ASCII" in answer["error"]
    finally:
        child.kill(signal.SIGINT)
    assert child.wait().code in (0, 130) and snapshot(played) == before


def test_files_of_ones_own(forks, tmp_path):
    """Frames of an .npz, with their actions or without any, train every stage but words; broken files are one line."""
    rng = np.random.default_rng(0)
    frames, actions = rng.integers(0, 256, (60, 8, 12, 3), dtype=np.uint8), rng.integers(0, 3, 60)
    np.savez(tmp_path / "true.npz", frames=frames, actions=actions)
    np.savez(tmp_path / "latent.npz", frames=frames)
    (tmp_path / "broken.npz").write_bytes((tmp_path / "true.npz").read_bytes()[:3000])
    more = dict(length=2, max_steps=1, save_interval=100)
    for source, stages in (("latent", STAGES[:3]), ("true", ("tokenizer", "dynamics"))):
        done(forks, tmp_path / source, **more, action_source=source, dataset=tmp_path / f"{source}.npz")
        assert summary(at(tmp_path / source))["stages"] == list(stages)
    assert_done(forks.run(["train_worldmodel.py", "--rollout", at(tmp_path / "latent"), "--actions", "0,1"], tmp_path))
    for name, how, said in (("true", dict(stage="text"), "captions of grid worlds"), ("broken", {}, "broken.npz"),
                            ("latent", dict(action_source="true"), "has no actions")):
        assert_error(forks.run(train(tmp_path / "w", **more, **how, dataset=tmp_path / f"{name}.npz"), tmp_path), said)
