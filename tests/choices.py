"""Choices among rounded numbers: two paths that compute the same may choose differently where two are nearly equal.

What comes out of a choice is compared only where the runner-up is further away than the rounding of both. And what
tests ask of counts and of errors.
"""
import math
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch

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
