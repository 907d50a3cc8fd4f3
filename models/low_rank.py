"""Matrices of low rank: feed-forward layers, ff "low_rank", and adapters beside frozen weights, lora_rank."""
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import activate, expect
from model import OTHERS, PLAIN, FeedForward, Linear


class LowRank(FeedForward):
    """The same with each matrix as a product through `ff_rank` dimensions: C r + r W and W r + r C parameters."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        c, rank = config, config.ff_rank
        self.into = Linear(c.n_embd, rank, bias=False)
        self.up = Linear(rank, self.up.out_features, bias=c.bias is True)
        self.join = Linear(self.down.in_features, rank, bias=False)
        self.down = Linear(rank, c.n_embd, bias=c.bias is True)

    def forward(self, x, positions=None):
        """x (B, T, C) to (B, T, C)."""
        x = activate(self.activation, self.up(self.into(x)))
        return self.down(self.join(x if self.norm is None else self.norm(x)))


# --- Adapters (Hu et al. 2021, "LoRA", arXiv 2106.09685) ---

def check(config):
    """Raises ValueError for settings that do not go with lora_rank."""
    c = config
    if not c.lora_rank:
        return
    expect(c.lora_rank <= c.n_embd, f"lora_rank {c.lora_rank} is more than n_embd {c.n_embd}: no matrix of that width "
                                    "has a higher rank")
    expect({*c.mixers} <= PLAIN, f"lora_rank {OTHERS}".format(c=c))
    expect(c.lora_on == "attention" or {*c.ffs} <= {"mlp", "low_rank", "none"},
           f"lora_on 'all' adapts feed-forwards mlp and low_rank: with ff {c.ff!r} choose attention")
    expect("moe" not in c.ffs or c.expert_balance != "bias",
           "expert_balance 'bias' moves experts' biases after every step, but lora_rank leaves the base as it is: "
           "choose loss or none")
    expect(c.parametrisation == "standard", "parametrisation 'mup' has no rates for adapters: lora_rank needs standard")


class Adapted(Linear):
    """W x + (alpha / r) B A x (equation 3), W and its bias frozen and under their own names, A and B learned.

    rows: of the parts of a fused W, each with an A (r, in) and a B (rows, r) of its own, one below the other in lora_a
    (parts r, in) and lora_b (out, r), as if they were matrices apart. A is N(0, 1 / in) at first, B zero.
    """

    def __init__(self, linear, rank, alpha, rows):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._parameters.update(linear._parameters)  # the same tensors, which limits.weigh has counted
        self.rank, self.rows, self.factor = rank, rows, alpha / rank
        self.lora_a = nn.Parameter(torch.empty(len(rows) * rank, self.in_features))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank))
        self.roles = {"lora_a": "matrix", "lora_b": "matrix"}
        self.fused = {"lora_a": (rank,) * len(rows), "lora_b": rows} if len(rows) > 1 else {}
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The model is the base's at first."""
        self.lora_a.normal_(0, self.in_features ** -0.5)
        self.lora_b.zero_()

    def forward(self, x):
        """x (..., in) to (..., out)."""
        low = F.linear(x, self.lora_a) * self.factor  # (..., parts r)
        parts = [F.linear(*pair) for pair in zip(low.split(self.rank, -1), self.lora_b.split(self.rows))]
        return super().forward(x) + (parts[0] if len(parts) == 1 else torch.cat(parts, -1))

    def flops(self, T):
        """Forward operations per position beside those of W."""
        return 2 * (self.rank * self.in_features * len(self.rows) + self.lora_b.numel())

    def merged(self):
        """The weight (out, in) that alone computes the same."""
        pairs = zip(self.lora_a.split(self.rank), self.lora_b.split(self.rows))
        return self.weight + self.factor * torch.cat([b @ a for a, b in pairs])


def adapt(model):
    """Freezes a Transformer and gives its layers adapters as its config says; in place, returned."""
    c = model.config
    model.requires_grad_(False)
    for part in [part for block in model.blocks for part in (block.mixer, block.ff)[:1 + (c.lora_on == "all")]]:
        for name, linear in list(part.named_children()) if part is not None else ():
            if isinstance(linear, Linear):
                rows = getattr(part, "fused", {}).get(name, (linear.out_features,))
                setattr(part, name, Adapted(linear, c.lora_rank, c.lora_alpha, rows))
    return model


@torch.no_grad()
def merge(model):
    """The reverse: weights that compute the same without adapters; in place, returned."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, Adapted):
                with torch.device("meta"):
                    plain = Linear(child.in_features, child.out_features, child.bias is not None)
                plain.weight, plain.bias = nn.Parameter(child.merged()), child.bias
                setattr(part, name, plain)
    model.config = replace(model.config, lora_rank=0, lora_alpha=None)
    return model.requires_grad_()


class Adapters:
    """What a checkpoint holds of a model where the adapters alone are kept; it is put back whole."""

    def __init__(self, model):
        self.model, self.load_state_dict = model, model.load_state_dict

    def state_dict(self):
        """{name: tensor} of what is learned."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
