"""Mixture of experts: ff "moe"."""
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from kernels import GLU, activate, expect, readable
from model import Linear


EVEN = 64  # rows


def check(config):
    """Raises ValueError for settings that do not go with experts."""
    c, routed = config, config.n_expert - config.n_shared_expert
    expect(routed > 0, f"n_shared_expert is {c.n_shared_expert}, but must be from 0 to n_expert - 1, {c.n_expert - 1}")
    expect(c.expert_top_k <= routed, f"expert_top_k {c.expert_top_k} is more than the {routed} experts to choose from")
    size = routed // c.expert_groups  # experts of a group
    expect(c.expert_groups == 1 or not routed % c.expert_groups and size > 1, f"expert_groups {c.expert_groups} must "
           f"divide the {routed} experts to choose from, and leave two or more in each")
    expect(c.expert_top_groups <= c.expert_groups, f"expert_top_groups {c.expert_top_groups} is more than the "
           f"{c.expert_groups} of expert_groups")
    expect(c.expert_top_k <= size * c.expert_top_groups, f"expert_top_k {c.expert_top_k} is more than the experts of "
           f"expert_top_groups {c.expert_top_groups}, {size} in each")
    expect(c.activation != "solu", "activation 'solu' normalises its whole width, which experts divide: choose another")


class MixtureOfExperts(nn.Module):
    """`n_expert` experts share the feed-forward's width; a position uses its expert_top_k best and the shared.

    The shared ones are one dense feed-forward. The others are chosen by a router without bias, whose scores are
    float32: softmax, or under expert_balance "bias" a sigmoid of each; the chosen ones' scores, from two on made to
    sum to 1, weigh their outputs (of a single one a sum of 1 would leave the router without a gradient: Switch, Fedus
    et al. 2021). No expert has a limit, so no position is dropped, and none depends on the rest of its batch.
    With expert_groups G of E / G neighbours they are of the expert_top_groups groups alone whose two best scores (with
    the biases of below) sum to most (DeepSeek-V3's code; its report, section 2.1.2, sums more).
    Balance: "loss" adds balance_weight * E sum_e f_e p_e, with f the shares of choices and p the mean scores (Fedus et
    al. 2021, equation 4; 1 where even): a product of means over a pass, so a step of several passes, which takes the
    mean of theirs, is not that of one pass over all rows. "bias" adds a number per expert to the scores for the choice
    only, which moves by balance_rate against the last step's load (Wang et al. 2024; DeepSeek-V3). "none": neither.
    Experts lie one below the other in two matrices: up (E W, C), with gates (E 2 W, C), and down (E C, W).
    """

    def __init__(self, config, layer=0):
        super().__init__()
        c = self.config = config
        self.layer = layer
        self.n_routed = c.n_expert - c.n_shared_expert
        self.width = c.expert_width or max(1, c.ff_width // c.n_expert)
        self.rows = 2 * self.width if c.activation in GLU else self.width
        self.router = Linear(c.n_embd, self.n_routed, bias=False)
        self.up = Linear(c.n_embd, self.n_routed * self.rows, bias=False)
        self.down = Linear(self.width, self.n_routed * c.n_embd, bias=False)
        halves = (self.width,) * (self.rows // self.width)
        self.fused = {"up": halves * self.n_routed, "down": (c.n_embd,) * self.n_routed}
        self.shared = None
        if c.n_shared_expert:
            self.shared = nn.ModuleDict({"up": Linear(c.n_embd, c.n_shared_expert * self.rows, bias=False),
                                         "down": Linear(c.n_shared_expert * self.width, c.n_embd, bias=False)})
            if len(halves) == 2:
                self.fused["shared.up"] = (c.n_shared_expert * self.width,) * 2
        self.register_buffer("correction", torch.zeros(self.n_routed) if c.expert_balance == "bias" else None)

    @property
    def idle(self):
        """Parameters of the experts that one position does not use."""
        return (self.n_routed - self.config.expert_top_k) * (self.rows + self.width) * self.config.n_embd

    def flops(self, T):
        """Forward operations per position to be taken off 2 per weight: those of idle experts."""
        return -2 * self.idle

    def route(self, x):
        """x (N, C) -> chosen experts (N, k) int64, their weights (N, k) float32, all scores (N, E) float32."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router.weight.float())  # (N, E)
        scores = torch.sigmoid(logits) if self.correction is not None else torch.softmax(logits, -1)
        ranked = scores if self.correction is None else scores + self.correction
        if self.config.expert_top_groups < self.config.expert_groups:
            groups = ranked.unflatten(1, (self.config.expert_groups, -1))  # (N, G, E / G)
            best = groups.topk(2, -1).values.sum(-1).topk(self.config.expert_top_groups, -1).indices  # (N, top groups)
            out = torch.ones(groups.shape[:2], dtype=torch.bool, device=x.device).scatter(1, best, False)
            ranked = groups.masked_fill(out.unsqueeze(2), -torch.inf).flatten(1)
        chosen = ranked.topk(self.config.expert_top_k, -1).indices
        weights = scores.gather(1, chosen)
        if self.config.expert_top_k > 1:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-20)
        return chosen, weights, scores

    def forward(self, x, positions=None):
        """x (B, T, C) to (B, T, C)."""
        c, shape = self.config, x.shape
        x = x.reshape(-1, c.n_embd)  # (N, C)
        chosen, weights, scores = self.route(x)
        k, E = c.expert_top_k, self.n_routed
        order = chosen.flatten().argsort(stable=True)  # choices, expert by expert
        rows = order // k
        up, down = self.up.weight.view(E, self.rows, c.n_embd), self.down.weight.view(E, c.n_embd, self.width)
        given = x.index_select(0, rows)  # (N k, C)
        if not kernels.on() and readable(x):
            loads = torch.bincount(chosen.flatten(), minlength=E)
            half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
            out = torch.cat([self.expert(part, up[e], down[e], half)
                             for e, part in enumerate(given.split(loads.tolist())) if len(part)])
        else:  # nothing here waits for the device, as bincount would
            expert = chosen.flatten()[order]  # (N k,) of each row
            offsets = torch.searchsorted(expert, torch.arange(E + 1, device=x.device))  # (E + 1,)
            loads = offsets.diff()
            if kernels.on():
                out = activate(c.activation, kernels.grouped_linear(given, up, offsets))
                out = kernels.grouped_linear(out, down, offsets)
            else:
                out = self.by_tiles(given, up, down, expert, offsets)
        out = out * weights.flatten()[order].unsqueeze(1).to(out.dtype)  # (N k, C)
        y = torch.zeros(x.shape, dtype=out.dtype, device=x.device).index_add(0, rows, out)
        if self.shared is not None:
            y = y + self.shared["down"](activate(c.activation, self.shared["up"](x)))
        if self.training and positions is not None:
            self.report(positions, chosen, scores, loads)
        return y.view(shape)

    def expert(self, x, up, down, rounded):
        """One expert's x (n, C) to (n, C). rounded: zeros are added up to the next multiple of EVEN rows: loads differ
        from step to step, and for every new number of rows oneDNN compiles its bfloat16 products anew."""
        n = len(x)
        if rounded and n > EVEN:
            x = F.pad(x, (0, 0, 0, -n % EVEN))
        return F.linear(activate(self.config.activation, F.linear(x, up)), down)[:n]

    def by_tiles(self, x, up, down, expert, offsets):
        """Rows x (n, C), sorted by expert (n,) int64, expert e's from offsets[e] on, to (n, C): by products of tiles,
        each of rows of one expert and filled up with zeros. A tile has ceil(n / E) rows, so that at most 2 E are enough
        for any loads: no row is dropped, less than twice the rows are computed, and shapes do not depend on loads."""
        n, E = len(x), len(up)
        size, some = -(-n // E), min(n, E)  # rows of a tile; experts that may have any
        tiles = some + (n - some) // size
        ends = (-(-offsets.diff() // size)).cumsum(0)  # (E,) where an expert's tiles end
        first = F.pad(ends, (1, 0))  # where they begin
        of = torch.searchsorted(ends, torch.arange(tiles, device=x.device), right=True).clamp(max=E - 1)  # (tiles,)
        place = first[expert] * size + torch.arange(n, device=x.device) - offsets[expert]  # (n,)
        h = x.new_zeros(tiles * size, x.size(1)).index_copy(0, place, x).view(tiles, size, -1)
        h = activate(self.config.activation, h @ up[of].mT)  # (tiles, size, W)
        return (h @ down[of].mT).flatten(0, 1).index_select(0, place)

    def report(self, positions, chosen, scores, loads):
        """Loads and the balance loss into the pass's Positions; padding does not count."""
        c, E = self.config, self.n_routed
        if positions.index is not None:
            real = positions.index.flatten() >= 0  # (N,)
            each = real.repeat_interleave(c.expert_top_k).long()
            loads = torch.zeros_like(loads).index_add_(0, chosen.flatten(), each)
            scores = scores * real.unsqueeze(1) * (len(real) / real.sum().clamp(min=1))  # of the mean of the real ones
        positions.usage.append((self.layer, loads))
        if c.expert_balance == "loss":
            loss = E * ((loads / loads.sum().clamp(min=1)) * scores.mean(0)).sum()
            positions.losses.setdefault("balance", []).append(c.balance_weight * loss)

    @torch.no_grad()
    def balance(self, usage):
        """After an optimiser step. usage: {layer: loads (E,)}. Experts with more than the mean load are asked less."""
        if self.correction is not None and self.layer in usage:
            loads = usage[self.layer].float()
            self.correction += self.config.balance_rate * torch.sign(loads.mean() - loads)
