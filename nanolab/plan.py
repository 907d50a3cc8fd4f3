"""A lone row's next bytes on a CPU as a flat list of NumPy's matrices and operations, made once from a plain model:
a byte's own products are small, and modules, views and dispatch cost more than they do.

What is folded into the matrices beforehand: gains and biases of norms, into what reads them; the mean that LayerNorm
takes away, into all that writes the stream; scales of scores and branches; GELU's roots of 2. RoPE's pairs lie side by
side, so that a turn is one product of complex numbers.
"""
import math
from functools import partial

import numpy as np
import torch
from torch import nn

import kernels
from model import Attention, Block, FeedForward, Linear, Norm, Rope, Transformer, TransformerConfig, alibi_slopes

# Settings that a plan knows, that change nothing once a model is trained, or that are of other modules than MODULES:
# all others must be at their defaults.
KNOWN = """vocab_size n_layer n_head n_kv_head head_dim n_embd block_size dropout norm norm_gain norm_eps bias mixer
window ff ff_mult ff_width activation positions rope_base rope_scaling rope_factor rope_original rope_ramp rope_mscale
residual_scale init parametrisation mup_base_width mup_base_head_dim qk_norm tie_weights
n_targets target_heads layer_heads head_bias output logit_softcap intermediate_losses attention kernels
checkpoint_activations sparse_stride sparse_summary kv_rank q_rank rope_dim rope_mscale_all_dim memory_length
compressed_length compression_rate compression compression_weight state_dim conv_width expand ff_rank n_expert
expert_width n_shared_expert expert_top_k expert_balance balance_weight balance_rate""".split()
MODULES = {Transformer, Block, Attention, FeedForward, Norm, Linear, Rope, nn.ModuleList, nn.ModuleDict,
           nn.ParameterList}
LARGEST = 2 ** 25  # parameters: a plan holds them once more, and the products of larger models are worth all cores
SPARE = 32         # positions that `crop` may take back although a window has slid since


def plan_of(model):
    """The Plan of a model, or None where it is not of the kind: full or windowed attention with a plain softmax, dense
    feed-forwards, float32 on a CPU outside autocast, eval mode, no hooks, at most LARGEST parameters."""
    if type(model) is not Transformer or model.training or kernels.on() or torch.is_autocast_enabled("cpu"):
        return None
    parts = list(model.modules())
    if not {*map(type, parts)} <= MODULES or any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return None
    weights = [p.data for p in model.parameters()]  # a part of a divided one is of another type
    if any(type(p) is not torch.Tensor or p.dtype != torch.float32 or p.device.type != "cpu" for p in weights):
        return None
    if sum(p.numel() for p in weights) > LARGEST:
        return None
    c = model.config
    known = c == TransformerConfig(**{name: getattr(c, name) for name in KNOWN}) and c.qk_norm != "full"
    return Plan(model) if known else None


class Plan:
    """Reads ids of one row, remembers them as a cache does, and gives the model's logits. See plan_of."""
    costs = {1: 1.0, 4: 2.1, 8: 2.6, 16: 3.3}  # of a pass of so many columns: a matrix in cache is read as fast as used

    def __init__(self, model):
        c = self.config = model.config
        H, G, D = c.n_head, c.n_kv_head, c.head_dim
        self.centre, self.eps, self.logits = c.norm == "layer", model.norm.eps, model.logits
        self.slopes = alibi_slopes(H).numpy()[:, None, None] if c.positions == "alibi" else None  # (H, 1, 1)
        self.rope, self.turns = model.ropes[str(D)] if c.positions == "rope" else None, np.empty((0, 1, D // 2))
        self.order = torch.arange(D)  # of a head's features
        if self.rope is not None:
            self.order = self.order.view(2, -1).T.flatten()
        self.embed, self.position = self._writes(model.embed), self._writes(model.position)
        self.erfs = {}
        self.size = 2 * (c.block_size + SPARE)
        self.layers = [(self._attention(block, H, G, D), self._feed_forward(block)) for block in model.blocks]
        bias = model.head_biases[model.first_head] if len(model.head_biases) else None
        self.head = self._reads(model.norm, model.classifier(model.first_head), bias)
        self.reset()

    def _writes(self, table, scale=1.0):
        """table (..., C), which goes into the stream, times scale; where LayerNorms read that, without its mean."""
        if table is None:
            return None
        table = table.detach() * scale
        return (table - table.mean(-1, keepdim=True) if self.centre else table).contiguous().numpy()

    @staticmethod
    def _reads(norm, weight, bias, scale=1.0, rows=slice(None)):
        """(alpha of a dyt or None, (C, O), (O,) or None) of a norm and the linear layer after it; scale () or (O, 1) of
        what that says, rows: the order in which."""
        weight = weight.detach() * scale
        shift = 0.0 if bias is None else bias.detach()[:, None] * scale  # (O, 1)
        if norm.bias is not None:
            shift = shift + weight @ norm.bias.detach()[:, None]
        weight = weight if norm.gain is None else weight * norm.gain.detach()
        shift = shift[rows, 0].numpy() if torch.is_tensor(shift) else None
        return None if norm.alpha is None else norm.alpha.item(), weight[rows].T.contiguous().numpy(), shift

    def _attention(self, block, H, G, D):
        """What the first branch of a block needs."""
        c, mixer = self.config, block.mixer
        limit = mixer.limit(c.block_size if c.block_size > 1 and c.rolls else None)
        scale, unit = mixer.score_factor * D ** -0.5, None
        if c.qk_norm:
            unit, scale = np.array([scale] * H + [1.0] * G, self.embed.dtype)[:, None], 1.0  # (H + G, 1)
        scales = torch.ones((H + 2 * G) * D, 1, dtype=mixer.qkv.weight.dtype)
        scales[:H * D] = scale
        rows = torch.arange((H + 2 * G) * D).view(-1, D)
        rows[:H + G] = rows[:H + G, self.order]
        branch = block.scale1.detach() if "scale1" in block.roles else block.scale
        out = [self._writes(t, branch) for t in (mixer.out.weight.mT, mixer.out.bias)]
        into = self._reads(block.norm1, mixer.qkv.weight, mixer.qkv.bias, scales, rows.flatten())
        stores = [np.empty((G, self.size, D), self.embed.dtype) for _ in range(2)]
        return self._writes(block.position), into, unit, limit, *stores, *out

    def _feed_forward(self, block):
        """What the second branch of a block needs, or None where there is none."""
        ff = block.ff
        if ff is None:
            return None
        branch, root = block.scale2.detach() if "scale2" in block.roles else block.scale, 1.0
        activation = partial(kernels.activate, ff.activation)
        if ff.norm is not None:
            def activation(h, first=activation):
                return ff.norm(first(h))
        if ff.activation == "gelu":  # x Phi(x) is root u (1 + erf u), with u = root x
            root, activation = 0.5 ** 0.5, None
        return (self._reads(block.norm2, ff.up.weight, ff.up.bias, root), activation,
                self._writes(ff.down.weight.mT, branch * root), self._writes(ff.down.bias, branch))

    def reset(self):
        """Forgets everything."""
        self.start = self.filled = 0  # the position of the first key held, and the keys held

    @staticmethod
    def spare(n):
        """How many positions beside n more may be read and taken back."""
        return SPARE

    def crop(self, n):
        """Forgets the last n positions, at most SPARE."""
        self.filled -= n

    def _slide(self):
        """Moves what a window may still see to the front of the storage."""
        keep = min(self.filled, self.config.block_size + SPARE)
        for (*_, keys, values, _, _), _ in self.layers:
            for store in (keys, values):
                store[:, :keep] = store[:, self.filled - keep:self.filled].copy()
        self.start, self.filled = self.start + self.filled - keep, keep

    def read(self, ids):
        """A list of n ids, at most block_size, or SPARE after others -> logits (n, V) after each, float32, under
        "stablemax" float64."""
        n = len(ids)
        if self.filled + n > self.size:
            self._slide()
        at, masks = self.start + self.filled, {}
        turns = None if self.rope is None else self._turns(at + n)[at:at + n]  # (n, 1, D/2)
        x = self.embed[ids]  # (n, C)
        if self.position is not None:
            x += self.position[at:at + n]
        for (place, into, *attention, out, bias), ff in self.layers:
            if place is not None:
                x += place[at:at + n]
            x += self._attend(self._apply(into, x), turns, masks, *attention).dot(out)
            if bias is not None:
                x += bias
            if ff is not None:
                into, activation, out, bias = ff
                h = self._apply(into, x)
                x += (self._gelu(h) if activation is None else activation(torch.from_numpy(h)).numpy()).dot(out)
                if bias is not None:
                    x += bias
        self.filled += n
        scores = self._apply(self.head, x)
        plain = scores.dtype == np.float32 and self.config.logit_softcap is None and self.config.output == "softmax"
        return scores if plain else self.logits(torch.from_numpy(scores)).numpy()

    def _apply(self, into, x):
        """Norm and linear layer, x (n, C) to (n, O); the root mean square divides what the matrix makes of x."""
        alpha, weight, bias = into
        y = (x if alpha is None else np.tanh(alpha * x)).dot(weight)
        if alpha is None and len(x) == 1:
            y *= 1 / math.sqrt(x[0].dot(x[0]) / x.size + self.eps)
        elif alpha is None:
            y /= np.sqrt(np.einsum("nc,nc->n", x, x) / x.shape[1] + self.eps)[:, None]
        if bias is not None:
            y += bias
        return y

    def _gelu(self, u):
        """u (1 + erf u), u (n, W), in place; one memory is a tensor and an array, as each of torch's steps costs."""
        if u.shape not in self.erfs:
            erf = np.empty_like(u)
            self.erfs[u.shape] = erf, torch.from_numpy(erf)
        erf, tensor = self.erfs[u.shape]
        erf[:] = u
        tensor.erf_()
        erf += 1
        u *= erf
        return u

    def _attend(self, heads, turns, masks, unit, limit, keys, values):
        """Queries, keys and values of n new positions, (n, (H + 2 G) D), to what attention makes of them (n, H D)."""
        n, G, H, D = len(heads), len(keys), self.config.n_head, self.config.head_dim
        heads = heads.reshape(n, -1, D)
        qk, v = heads[:, :H + G], heads[:, H + G:]
        if unit is not None:
            qk *= unit / np.sqrt((qk * qk).mean(-1, keepdims=True) + (self.config.norm_eps or 1e-6))
        if turns is not None:
            pairs = qk.view(turns.dtype)
            pairs *= turns
        low, end = self.filled, self.filled + n
        keys[:, low:end], values[:, low:end] = qk[:, H:].transpose(1, 0, 2), v.transpose(1, 0, 2)
        low = max(0, end - limit - n + 1) if limit else 0
        q = qk[:, :H].reshape(n, G, -1, D).transpose(1, 2, 0, 3).reshape(G, -1, D)  # (G, H/G n, D)
        scores = q @ keys[:, low:end].transpose(0, 2, 1)  # (G, H/G n, S)
        if n > 1 or self.slopes is not None:
            scores = (scores.reshape(H, n, -1) + self._mask(n, end - low, limit, masks)).reshape(scores.shape)
        scores -= np.maximum.reduce(scores, -1, keepdims=True)
        np.exp(scores, out=scores)
        y = scores @ values[:, low:end]
        y /= np.add.reduce(scores, -1, keepdims=True)
        return y.reshape(G, -1, n, D).transpose(2, 0, 1, 3).reshape(n, H * D)

    def _mask(self, n, S, limit, masks):
        """(1 or H, n, S) to be added to scores of n queries over the S keys that end with their own; kept in masks."""
        if (S, limit) not in masks:
            distance = np.arange(S - n, S)[:, None] - np.arange(S)
            seen = (distance >= 0) & (distance < (limit or S))
            bias = 0 if self.slopes is None else -distance * self.slopes
            masks[S, limit] = np.where(seen, bias, -np.inf).astype(self.embed.dtype).reshape(-1, n, S)
        return masks[S, limit]

    def _turns(self, end):
        """RoPE's angles as complex numbers (>= end, 1, D/2)."""
        if end > len(self.turns):
            cos, sin = (t.cpu().numpy() for t in self.rope(max(end, 2 * len(self.turns))))
            half = cos.shape[1] // 2
            kind = np.result_type(self.embed.dtype, np.complex64)
            self.turns = (cos[:, :half] + 1j * sin[:, half:]).astype(kind)[:, None]
        return self.turns
