"""Feed-forward layers of low rank: ff "low_rank"."""
from kernels import activate
from model import FeedForward, Linear


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
