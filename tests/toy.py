"""A model so small and so loud that every byte which attention sees changes its next byte; scripts in this process."""
import io
import sys

import pytest
import torch

from model import Transformer, TransformerConfig

T = 8


def build(positions="rope", **settings):
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


def save(folder, model, **more):
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
