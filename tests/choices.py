"""Choices among rounded numbers: two paths that compute the same may choose differently where two are nearly equal.

What comes out of a choice is compared only where the runner-up is further away than the rounding of both. And what
tests ask of counts and of errors; a model whose choices are far apart; scripts in this process.
"""
import io
import math
import re
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from model import Transformer, TransformerConfig
from nanolab import generate as generation
from nanolab.run import UserError

BOUND = 1e-5  # of scores of about 1 in float32


def assert_best(choices, scores, bound=BOUND):
    """Asserts that choices (...) are the places of the largest of scores (..., K), or of one that is as large but for
    `bound`."""
    lost = scores.amax(-1) - scores.gather(-1, choices[..., None])[..., 0]
    assert (lost <= bound).all(), f"{(lost > bound).sum()} of {lost.numel()} are not the best, by up to {lost.max()}"


def margin(scores):
    """(..., K) -> (...): how far the largest is from the second."""
    if scores.size(-1) == 1:
        return torch.full_like(scores[..., 0], torch.inf)
    first, second = scores.topk(2).values.unbind(-1)
    return first - second


@contextmanager
def clear(bound=BOUND):
    """Within it argmax, argmin and round fail where another rounding might choose another: what follows them may then
    be compared with what another path gives."""
    real = {name: getattr(torch.Tensor, name) for name in ("argmax", "argmin", "round")}

    def watched(name):
        def choose(x, *given, **how):
            if x.is_floating_point():
                if name == "round":
                    away = 0.5 - (x - real["round"](x)).abs()
                else:
                    dim = given[0] if given else how["dim"]
                    away = margin((x if name == "argmax" else -x).movedim(dim, -1))
                assert (away > bound).all(), f"{name}: a runner-up is only {away.min()} away; take another seed"
            return real[name](x, *given, **how)
        return choose
    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(torch.Tensor, name, watched(name))
        yield


def followed(tokens, model, prompts, **how):
    """The logits (n, B, V) from which `generate` would draw, one step after another, if what it drew were
    tokens (n, B)."""
    seen, left = [], iter(tokens)

    def draw(logits, *_, **__):
        seen.append(logits)
        return next(left)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(generation, "draw", draw)
        for _ in generation.generate(model, prompts, len(tokens), **how):
            pass
    return torch.stack(seen)


def raises_one_line(*words):
    """A UserError of one line that has all the words."""
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(UserError, match=rf"\A{pattern}[^\n]+\Z")


def refused(said, do, *given, **more):
    """do(...) is a UserError of one line with the pattern `said`."""
    with pytest.raises(UserError, match=said) as caught:
        do(*given, **more)
    assert "\n" not in str(caught.value)


def evenly(counts, expected):
    """Do counts fit the expected ones? Chi-square within five standard deviations of its mean (df, at least 2 df)."""
    counts, expected = np.asarray(counts, float), np.broadcast_to(expected, np.shape(counts)).astype(float)
    chi, df = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return abs(chi - df) < 5 * math.sqrt(2 * df + (1 / expected).sum())


# --- A small loud model, and scripts ---

T = 8  # block_size of a model so small and so loud that every byte which attention sees changes its next byte


def loud_model(positions="rope", **settings):
    """Of block_size T, float32: weights so large that logits depend strongly on all that attention sees."""
    torch.manual_seed(0)
    config = dict(n_layer=2, n_head=2, n_embd=16, block_size=T, init="xavier", positions=positions, dropout=0.2)
    model = Transformer(TransformerConfig(**{**config, **settings})).eval()
    with torch.no_grad():
        model.heads[0].mul_(60)
        for block in model.blocks:
            block.mixer.qkv.weight.mul_(3)
            block.mixer.out.weight.mul_(3)
    return model


def banded(self, q, k, v, positions, key_positions, pattern):
    """Attention.attend to the last T positions, written out: what a sliding cache amounts to."""
    distance = torch.arange(q.size(2))[:, None] - torch.arange(k.size(2))
    scores = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5).masked_fill((distance < 0) | (distance >= T), -torch.inf)
    return scores.softmax(-1) @ v


def save_model(folder, model, **more):
    """The model as train_enwik8.py leaves it: last.pt at step 7."""
    torch.save({"format": "nanolab-1", "script": "train_enwik8", "step": 7, "settings": dict(model.config.__dict__),
                "model": model.state_dict(), "ema": None, **more}, folder / "last.pt")
    return folder


def run_main(script, *words, stdout=None):
    """(exit status, stdout, stderr) of `python SCRIPT WORDS --device cpu`, a module's main in this process."""
    before, status, err = dict(vars(script)), 0, io.StringIO()
    out = stdout or io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words), "--device", "cpu"])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            script.main()
        except SystemExit as end:
            status = end.code
        finally:
            vars(script).update(before)
    out.flush()
    return status, out.buffer.getvalue().decode() if hasattr(out, "buffer") else "", err.getvalue()
