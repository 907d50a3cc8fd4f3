"""The table of fused operations: each with its formula, tensors for it, and how near the two must be.

test_kernels.py walks CASES, test_kernels_compiled.py COMPILED.
"""
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kernels
from interpreter import alone, by_kernel, formula, kernels_of, results
from kernels import (attend, attend_differential, attend_latent, attend_one, attend_space, attend_time, grouped_linear,
                     gumbel_softmax, min_gru, nearest_code, reinmax, selective_scan)
from model import Rope

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


# --- How near: from a case's type, what the kernel gives and what is wanted to rtol and atol ---
# One unit in the last place of a result is 2^-10 or 2^-7 of it at most.

def near_rows(dtype, mine, want):
    """Of bfloat16 two units are allowed, as the interpreter truncates, and a residual sum one unit off moves what is
    made of it."""
    near = {FLOAT: 1e-5, HALF: 2e-3, BRAIN: 1.6e-2}[dtype]
    return dict(rtol=near, atol=near)


def near_attention(dtype, mine, want):
    """To the largest number. Weights and their gradients are rounded to the inputs' type before the second products,
    the formula's are not: a few units of the last place, 2^-11 and 2^-8, more on a GPU."""
    near = {FLOAT: 1e-5, HALF: 4e-3 if mine.is_cuda else 2e-3, BRAIN: 3e-2 if mine.is_cuda else 2e-2}[dtype]
    return to_the_largest(near)(dtype, mine, want)


def near_cache(dtype, mine, want):
    """Attention without gradients, whose outputs are about 1."""
    return dict(rtol=0, atol={FLOAT: 1e-5, HALF: 2e-3, BRAIN: 1.6e-2}[dtype])


def near_codes(dtype, mine, want):
    """One unit in the last place: the interpreter cuts bfloat16 off, and half rounds what float32 gives."""
    if dtype == FLOAT:
        return dict(rtol=1e-4, atol=1e-5) if mine.is_cuda else dict(rtol=2e-6, atol=2e-6)
    return dict(rtol={HALF: 2 ** -10, BRAIN: 2 ** -7}[dtype], atol=1e-6)


def near_scan(dtype, mine, want):
    """One rounding of its type for each number, and 1e-5 of the greatest, as sums cancel."""
    near = {FLOAT: 1e-5, HALF: 2 ** -10, BRAIN: 2 ** -7}[mine.dtype]
    return dict(rtol=near, atol=1e-5 * max(1e-3, want.abs().max().item() if want.numel() else 1))


def within(near):
    """The same for every number."""
    return lambda dtype, mine, want: dict(rtol=near, atol=near)


def near_layer(dtype, mine, want):
    """Two float32 sums of hundreds."""
    return dict(rtol=1e-4, atol=1e-4 * want.abs().max().item())


def to_the_largest(near):
    """The same for every number, and more where the largest is above 1."""
    return lambda dtype, mine, want: dict(rtol=0, atol=near * max(1.0, want.abs().max().item()))


# --- A case ---

def of(*shape, scale=1.0, dtype=None, then=None):
    """Normal numbers, of a type of their own if they have one, through `then`, which may make a view."""
    def make(asked, device):
        t = (scale * torch.randn(shape)).to(device, dtype or asked)
        return then(t) if then else t
    return make


def below(V, *shape, ignored=()):
    """int64 labels below V, some places -1."""
    def make(asked, device):
        labels = torch.randint(0, V, shape)
        for place in ignored:
            labels[place] = -1
        return labels.to(device)
    return make


def put(*places):
    """For `then`: writes numbers, each (index, value)."""
    def then(t):
        for index, value in places:
            t[index] = value
        return t
    return then


def made(*inputs, dtype=FLOAT, device="cpu"):
    """Tensors of makers, the same in every process and on every device; tensors and None as they are."""
    torch.manual_seed(0)
    return [t(dtype, device) if callable(t) else t if t is None else t.to(device) for t in inputs]


@dataclass
class Case:
    """op: of the tensors, a kernel's or none's by the switch. twin: the same by the formula; None: op by "torch".

    inputs: made by `of` and the like, tensors, or None. constant: so many of them, the last, have no gradient.
    wide: the type in which the twin gets them. gradcheck: whether the gradient is that of the values.
    patch: (module of fused/, name, value) within it.
    """
    op: object
    twin: object
    inputs: list
    near: object = near_rows
    dtypes: tuple = (FLOAT,)
    constant: int = 0
    wide: torch.dtype = None
    gradcheck: bool = True
    patch: tuple = None

    def __post_init__(self):
        self.twin = self.twin or formula(self.op)

    def make(self, dtype=FLOAT, device="cpu"):
        """The tensors."""
        return made(*self.inputs, dtype=dtype, device=device)

    def assert_agree(self, tensors, dtype=FLOAT, device="cpu", upstream=None, used=None, guarded=True, twin=None):
        """Asserts that op by kernel alone and its formula give the same outputs and gradients, of the same types;
        returns the kernel's. upstream, used: as in `results`. Not guarded: a formula may run too."""
        with pytest.MonkeyPatch.context() as patch, alone(device) if guarded else by_kernel(device):
            if self.patch:
                patch.setattr(kernels_of(self.patch[0]), *self.patch[1:])
            out, found, upstream = results(self.op, tensors, upstream, self.constant, used)
        twin = twin or self.twin
        typed = [y.dtype for y in results(twin, tensors, upstream, self.constant, used)[0]]
        assert [y.dtype for y in out] == typed
        wide = [t.to(self.wide) if self.wide and t is not None and t.is_floating_point() else t for t in tensors]
        want, gradients, _ = results(twin, wide, upstream, self.constant, used)
        asking = [t for t in tensors[:len(tensors) - self.constant] if t is not None and t.is_floating_point()]
        for mine, t in zip(found, asking):
            assert mine is None or (mine.dtype, mine.shape) == (t.dtype, t.shape)
        for mine, other in zip([*out, *found], [*want, *gradients], strict=True):
            if mine is None or other is None:  # no gradient is one of zeros, if not all outputs are used
                assert used is not None and all(t is None or not t.any() for t in (mine, other))
            elif mine.is_floating_point():
                torch.testing.assert_close(mine.to(other.dtype), other, equal_nan=True,
                                           **self.near(dtype, mine, other))
            else:
                assert torch.equal(mine, other)
        return out, found


# --- Norms, rotary positions, activations, cross-entropy ---

def norm(kind, n, C, have="", near=near_rows, patch=None, eps=None, then=None, dtypes=(FLOAT,), **types):
    """A norm over C of n rows, with those of gain, bias and residual that it is to have. types: of x and these."""
    shapes, names = dict(gain=(C,), bias=(C,), residual=(*n, C)), have.split()
    centred = kind == "layer_norm"
    eps = eps or (1e-5 if centred else 1e-6)

    def op(x, *rest):
        return getattr(kernels, kind)(x, **dict(zip(names, rest)), eps=eps)

    def twin(x, *rest):
        return kernels.norm_reference(x, **{name: None for name in shapes} | dict(zip(names, rest)), eps=eps,
                                      centred=centred)
    inputs = [of(*n, C, dtype=types.get("x"), then=then), *(of(*shapes[name], dtype=types.get(name)) for name in names)]
    return Case(op, twin, inputs, near, dtypes, patch=patch)


def tables(B, T, D, device="cpu"):
    """cos and sin (B, T, 1, D) of places further and further on in each row, as Positions has them."""
    rope = Rope(D, 100.0, 4 * B + T)
    places = torch.arange(T) + 4 * torch.arange(B)[:, None]
    return tuple(t[places].unsqueeze(2).to(device) for t in rope(4 * B + T))


def rotary(B, T, H, D, n_tables, **more):
    """With a table for every row or one for all."""
    return Case(kernels.rotary, None, [of(B, T, H, D), *tables(n_tables, T, D)], constant=2, **more)


def act(kind, *shape, **more):
    """gated of one kind, or a plain activation."""
    gate = kind in kernels.GLU
    return Case(partial(kernels.gated, kind) if gate else getattr(kernels, kind),
                partial(kernels.gated_reference, kind) if gate else None, [of(*shape, scale=2)], **more)


def entropy(N, V, ignored=(), ignore_index=-1, **more):
    return Case(partial(kernels.cross_entropy, ignore_index=ignore_index),
                partial(kernels.cross_entropy_reference, ignore_index=ignore_index),
                [of(N, V, scale=3), below(V, N, ignored=ignored)], **more)


def linear_cross_entropy(h, weight, targets, bias=None, **how):
    """batched_linear_cross_entropy of one classifier weight (V, C) with bias (V,): h (..., C), targets (...) alike."""
    losses = kernels.batched_linear_cross_entropy(
        h.reshape(1, -1, h.size(-1)), weight[None, None], targets.reshape(1, -1, 1),
        None if bias is None else bias[None, None], **how)
    return losses.view(targets.shape)


def linear_cross_entropy_reference(h, weight, targets, bias=None, ignore_index=-1):
    """The same with all logits."""
    logits = F.linear(h, weight, bias).flatten(0, -2)
    return kernels.cross_entropy_reference(logits, targets.flatten(), ignore_index).view(targets.shape)


def linear(N, C, V, chunk=None, ignored=(), dtypes=(FLOAT,), **how):
    return Case(partial(linear_cross_entropy, chunk=chunk, **how), partial(linear_cross_entropy_reference, **how),
                [of(N, C), of(V, C, scale=0.5), below(V, N, ignored=ignored), of(V)], dtypes=dtypes)


def batched_linear_cross_entropy_reference(h, weights, targets, biases):
    """batched_linear_cross_entropy with all logits."""
    logits = torch.einsum("gnc,gkvc->gnkv", h, weights.expand(len(h), -1, -1, -1)) + biases.unsqueeze(1)
    targets = targets.expand(logits.shape[:3])
    return kernels.cross_entropy_reference(logits.flatten(0, 2), targets.flatten()).view(targets.shape)


def batched(G, groups, N, C, K, V, chunk, **more):
    """G groups of rows with `groups` of classifiers."""
    return Case(partial(kernels.batched_linear_cross_entropy, chunk=chunk), batched_linear_cross_entropy_reference,
                [of(G, N, C), of(groups, K, V, C, scale=0.5), below(V, G, N, K, ignored=[(0, 1)]), of(groups, K, V)],
                **more)


# --- Attention ---

def left_padded(S, *padding):
    """Places (B, S) of rows with so many padded keys before them."""
    return (torch.arange(S) - torch.tensor(padding)[:, None]).clamp(min=-1)


def heads(B, H, G, T, S, D, Dv, **how):
    """q, k and v as attention has them: places before heads in memory, k and v parts of a wider tensor."""
    return [of(B, T, H, D, then=lambda t: t.transpose(1, 2), **how),
            of(B, S, G, D + Dv, then=lambda t: t[..., :D].transpose(1, 2), **how),
            of(B, S, G, D + Dv, then=lambda t: t[..., D:].transpose(1, 2), **how)]


def frames(B, T, S, N, H, G, D, Dv):
    """q, k, v of frames, parts of wider tensors: (B, T, N, H, D), (B, S, N, G, D), (B, S, N, G, Dv)."""
    return [of(B, T, N, H, D + 3, then=lambda t: t[..., :D]), of(B, S, N, G, D + Dv, then=lambda t: t[..., :D]),
            of(B, S, N, G, D + Dv, then=lambda t: t[..., D:])]


def asked(op, near=near_attention):
    """A maker of cases of one operation of attention: inputs, masks and other options, tensors among them."""
    def case(inputs, dtypes=(FLOAT,), **masks):
        def by(op):
            def call(*given):
                where = given[0].device
                return op(*given, **{name: t.to(where) if torch.is_tensor(t) else t for name, t in masks.items()})
            return call
        if op in (attend_one, attend_latent):
            return Case(by(op), None, inputs, near_cache, dtypes, constant=len(inputs))
        return Case(by(op), None, inputs, near, dtypes)
    return case


# --- Recurrences, experts, codes ---

def gates(B, T, I, h=FLOAT, **more):
    return Case(min_gru, None, [of(B, T, I), of(B, T, I), of(B, I, dtype=h)], near_scan, wide=torch.float64, **more)


def selective(B, T, I, N, chunk=None, own=FLOAT, **more):
    """own: the type of A, D and the state; None: that of the others. chunk: steps between kept states."""
    side = of(B, T, N)
    inputs = [of(B, T, I), of(B, T, I, then=F.softplus), of(I, N, dtype=own, then=lambda t: -t.exp()), side, side,
              of(I, dtype=own), of(B, I, N, dtype=own)]
    return Case(selective_scan, None, inputs, near_scan, wide=torch.float64,
                patch=chunk and ("recurrence", "CHUNK", chunk), **more)


def grouped(sizes, C, W, **more):
    """Experts with so many rows each."""
    return Case(grouped_linear, None, [of(sum(sizes), C), of(len(sizes), W, C), torch.tensor([0, *sizes]).cumsum(0)],
                near_scan, wide=torch.float64, **more)


def gumbel(*shape):
    """Gumbel noise, float32."""
    return lambda asked, device: -torch.rand(shape).clamp(1e-6, 1 - 1e-6).log().neg().log().to(device)


CHOICES = {"soft": lambda x, noise=None: gumbel_softmax(x, noise, 0.7, False),
           "hard": lambda x, noise=None: gumbel_softmax(x, noise, 0.7, True),
           "reinmax": lambda x, noise=None: reinmax(x, noise, 1.3)}


def choice(name, *shape, noisy=True, then=None, **more):
    return Case(CHOICES[name], None, [of(*shape, scale=3, then=then), *([gumbel(*shape)] if noisy else [])], near_codes,
                constant=int(noisy), wide=FLOAT, gradcheck=name == "soft", **more)


def nearest(N, K, C, **more):
    """Small integers, whose sums are exact and of which many are equally near."""
    return Case(nearest_code, None, [of(N, C, scale=2, then=torch.round), of(K, C, scale=2, then=torch.round)],
                near_codes, constant=2, **more)


# --- The table: {an operation, or an operation and what is special: Case} ---

ALL, INF, NAN = "gain bias residual", torch.inf, torch.nan
TYPES = dict(dtypes=(FLOAT, HALF, BRAIN))  # of one of those whose kernels have the same products
plain, one, latent, pairs = asked(attend), asked(attend_one), asked(attend_latent), asked(attend_differential)
space, time = asked(attend_space), asked(attend_time)
HUGE = torch.tensor([[1e4, -1e4, 90.0, -90.0, 0.0, -0.0, 1e-30, NAN, 2.0, -3.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0]])
FLAT_ROWS = torch.tensor([[0.5] * 20, [4.0] * 20, [0.25] * 20])
# classes that cannot be, a whole block; all but one; a row where nothing can; a target that cannot; nan; infinity
LOGITS = put(((0, slice(4096)), -INF), ((1, slice(1, None)), -INF), (2, -INF), ((3, 5), -INF), (4, NAN), (5, INF),
             ((6, 7), NAN))
LATER = torch.cat((torch.ones(2, 4096), torch.tensor([[4.0] * 4, [1.0] * 4])), 1)  # then the sum so far is made smaller
PADDING = slice(None), slice(3, None)  # of rows and places
# 1e4; -inf in a whole first tile, in the last places, in some places, alone; equal ones
EXTREME = put((0, 1e4 * torch.randn(1500, generator=torch.Generator().manual_seed(0))), ((1, slice(1400)), -INF),
              ((2, slice(5, None)), -INF), (3, 2.0), ((4, slice(None, None, 2)), -INF), (5, -INF))


def with_inputs(case, *inputs, **more):
    """The case of other tensors: makers, or None for one that stays."""
    inputs += (None,) * (len(case.inputs) - len(inputs))
    return replace(case, inputs=[old if new is None else new for new, old in zip(inputs, case.inputs)], **more)


CASES = {
    "rms_norm": norm("rms_norm", (5, 3), 37, "gain residual", **TYPES),
    "rms_norm, plain": norm("rms_norm", (5, 3), 37),
    "rms_norm, one row": norm("rms_norm", (1,), 128, "gain"),
    "rms_norm, one feature": norm("rms_norm", (5,), 1, "gain residual"),
    "rms_norm, 1e4 overflows when squared": norm("rms_norm", (3,), 20, "gain", eps=1e-3, then=put(
        (0, 0.0), ((1, 3), 1e4), (2, -1e4))),
    "rms_norm, float16 by float32": norm("rms_norm", (3,), 10, "gain", within(2e-3), x=HALF),
    "layer_norm": norm("layer_norm", (2, 4), 37, ALL, **TYPES),
    "layer_norm, plain": norm("layer_norm", (9,), 64),
    "layer_norm, gain": norm("layer_norm", (9,), 64, "gain residual"),
    "layer_norm, bias": norm("layer_norm", (9,), 64, "bias"),
    "layer_norm, wide": norm("layer_norm", (3,), 2049, ALL),
    "layer_norm, equal values": with_inputs(norm("layer_norm", (3,), 20, "gain bias", eps=1e-2, gain=FLOAT), FLAT_ROWS),
    "layer_norm, nearly equal values": norm("layer_norm", (3,), 20, "gain bias", within(1e-3), eps=1e-4, gain=FLOAT,
                                            then=lambda t: t * 1e-2 + FLAT_ROWS.to(t)),  # gradients of a hundred
    "layer_norm, float16 into float32": norm("layer_norm", (3,), 10, ALL, within(1.6e-2), x=HALF),
    "layer_norm, float32 into bfloat16": norm("layer_norm", (3,), 10, ALL, within(1.6e-2), residual=BRAIN),
    **{f"layer_norm, more tiles than programs, {C} wide": norm("layer_norm", (n,), C, ALL,
                                                               patch=("rows", "PROGRAMS", 2))
       for n, C in ((11, 1025), (131, 60))},
    "rotary": rotary(2, 5, 3, 16, n_tables=2, **TYPES),
    "rotary, one table": rotary(3, 7, 5, 10, n_tables=1),
    "rotary, one pair": rotary(1, 1, 1, 2, n_tables=1),
    "rotary, several tiles": rotary(2, 9, 3, 64, n_tables=2),
    **{kind: act(kind, 3, 5, 78, **TYPES) for kind in kernels.GLU},
    "swiglu, two blocks": act("swiglu", 3, 2 * 1030),
    "gelu": act("gelu", 3, 411, **TYPES),
    "relu2": act("relu2", 3, 411, **TYPES),
    "relu2, a scalar": act("relu2"),
    **{f"{kind}, large numbers": with_inputs(act(kind), HUGE, near=within(1e-6))
       for kind in (*kernels.GLU, "gelu", "relu2")},
    "cross_entropy": entropy(9, 77, ignored=[3, 8], **TYPES),
    "cross_entropy, two blocks": entropy(5, 4099, ignored=[0]),
    "cross_entropy, one class": entropy(2, 1),
    "cross_entropy, one row": entropy(1, 130),
    "cross_entropy, infinite logits": with_inputs(entropy(8, 4100), of(8, 4100, scale=1e4, then=LOGITS), torch.tensor(
        [4098, 0, 3, 5, 1, 1, 1, 4099])),
    "cross_entropy, the maximum in a later block": with_inputs(entropy(2, 4100), LATER, torch.tensor(
        [0, 4099])),
    "cross_entropy, a real class is ignored": with_inputs(entropy(4, 9, ignore_index=1), None, torch.tensor(
        [0, 1, 1, 2])),
    "linear": linear(11, 6, 77, ignored=[3], **TYPES),
    "linear, a real class is ignored": with_inputs(linear(4, 5, 9, ignore_index=1), None, None, torch.tensor(
        [0, 1, 1, 2])),
    "linear, row by row": linear(5, 6, 9, 1),
    "linear, chunks of 4": linear(11, 6, 77, 4, ignored=[3, 10]),
    "batched": batched(2, 2, 7, 6, 3, 20, 3, **TYPES),
    "batched, one group": batched(2, 1, 7, 6, 3, 20, None),
    # blocks of attention are 64 and 32 wide here
    "attend": plain(heads(1, 2, 1, 35, 40, 16, 16), **TYPES),
    "attend, several blocks": plain(heads(1, 2, 1, 70, 70, 16, 16)),
    "attend, scores of 6e4": with_inputs(  # have a last place of 2^-8, and so have weights of keys that nearly tie
        plain(heads(1, 1, 1, 20, 40, 16, 16)), of(1, 20, 1, 16, scale=1e4, then=lambda t: t.transpose(1, 2)),
        near=to_the_largest(1e-2)),
    "attend, grouped chunk, odd sizes": plain(heads(1, 4, 2, 37, 71, 20, 9), scale=0.3),
    "attend, all": plain(heads(1, 1, 1, 67, 35, 16, 33), causal=False),
    "attend, all, padded keys": plain(heads(3, 1, 1, 3, 40, 8, 8), causal=False, lengths=torch.tensor([40, 33, 0])),
    "attend, window": plain(heads(1, 1, 1, 67, 150, 16, 16), window=20),
    "attend, window of one": plain(heads(1, 1, 1, 5, 5, 3, 3), window=1),
    "attend, prefix": plain(heads(1, 1, 1, 70, 70, 16, 16), prefix=68),
    "attend, prefixes, window": plain(heads(2, 1, 1, 66, 70, 8, 8), prefix=torch.tensor([45, -3]), window=9),
    "attend, prefix, lengths": plain(heads(2, 1, 1, 9, 40, 8, 8), prefix=36, lengths=torch.tensor([34, 1])),
    "attend, positions": plain(heads(2, 1, 1, 66, 70, 8, 8), positions=left_padded(70, 0, 6), prefix=33, window=30),
    "attend, positions, all, lengths": plain(heads(2, 1, 1, 9, 40, 8, 8), positions=left_padded(40, 35, 2),
                                             causal=False, lengths=torch.tensor([39, 40])),
    "attend, one query": plain(heads(2, 2, 1, 1, 35, 16, 16)),
    "attend, more queries than keys": plain(heads(1, 1, 1, 9, 4, 8, 8)),
    **{f"attend_differential, {name}": pairs([*heads(1, 4, 2, 11, 35, 8, 8)[:2], heads(1, 4, 1, 11, 35, 8, 16)[2],
                                              of(*shape, scale=0.4)], window=20)
       for name, shape in (("one weight", ()), ("one of each pair", (2,)))},
    "attend_space": space(frames(1, 2, 2, 3, 2, 1, 8, 5), **TYPES),
    "attend_time": time(frames(1, 4, 6, 2, 2, 1, 8, 5)),
    "attend_time, window": time(frames(2, 4, 6, 2, 2, 1, 8, 5), window=3),
    "attend_one": one(heads(1, 2, 2, 1, 70, 16, 16), splits=1),
    "attend_one, odd sizes, grouped, split": one(heads(1, 6, 2, 3, 71, 20, 9), splits=3, **TYPES),
    "attend_one, ragged": one(heads(3, 2, 1, 2, 70, 8, 8), lengths=torch.tensor([70, 0, 1]), splits=2,
                              **TYPES),
    "attend_one, more splits than keys": one(heads(1, 2, 1, 1, 5, 8, 8), lengths=torch.tensor([3]), splits=4),
    "attend_one, many rows": one(heads(1, 40, 1, 2, 40, 8, 130), splits=2),
    "attend_one, splits by itself": one(heads(1, 2, 1, 8, 600, 8, 8)),
    **{f"attend_latent, {rank} of {rank + R}": latent(
        [of(2, 3, 2, rank + R, scale=0.3), of(2, 1, 40, rank + R)], rank=rank, scale=0.25, splits=2, lengths=lengths)
       for rank, R, lengths in ((32, 8, None), (20, 0, torch.tensor([40, 3])), (150, 5, torch.tensor([0, 38])))},
    "min_gru": gates(2, 9, 67, dtypes=(FLOAT, BRAIN)),
    "min_gru, one": gates(1, 1, 1),
    "min_gru, two steps": gates(3, 2, 13),
    "min_gru, one type": gates(2, 7, 9, h=None, dtypes=(HALF,)),
    "min_gru, large numbers": with_inputs(
        gates(2, 9, 5), of(2, 9, 5, then=put(((0, 0), 1e4), ((0, 1), -1e4), ((1, 2), 80.0))),
        of(2, 9, 5, then=put(((0, 3), 1e4), ((1, 4), -1e4), ((0, 5), 0.0))), of(2, 5, then=put(((1, 2), 1e4)))),
    "min_gru, padding": with_inputs(gates(2, 6, 5), of(2, 6, 5, then=put((PADDING, -INF)))),
    "selective_scan": selective(2, 9, 19, 3, 4, dtypes=(FLOAT, BRAIN)),
    "selective_scan, whole chunks": selective(1, 8, 5, 16, 4),
    "selective_scan, one": selective(1, 1, 1, 1),
    "selective_scan, a part of a chunk": selective(2, 10, 16, 5),
    "selective_scan, one type": selective(1, 4, 3, 2, own=None, dtypes=(HALF,)),
    "selective_scan, large numbers, padding": with_inputs(
        selective(2, 9, 5, 3), of(2, 9, 5, then=put(((0, 2), 1e4))),
        of(2, 9, 5, then=lambda t: put(((0, 1), 1e4), ((1, 2), 0.0), (PADDING, 0.0))(F.softplus(t))),
        of(5, 3, then=lambda t: put((2, 0.0))(-t.exp())), None, None, None, of(2, 5, 3, then=put(((1, 0), 1e4)))),
    "grouped_linear": grouped([5, 0, 70, 0, 15], 37, 67, **TYPES),
    "grouped_linear, one": grouped([1], 1, 1),
    "grouped_linear, the last expert alone": grouped([0, 0, 17], 16, 33),
    "grouped_linear, whole tiles": grouped([16, 32, 0], 70, 5),
    "grouped_linear, many experts": grouped([0, 1, 0, 0, 33, 0, 16, 0, 0, 2, 0], 2, 3),  # the bound on tiles holds
    "nearest_code": nearest(70, 130, 37, **TYPES),
    "nearest_code, one": nearest(1, 1, 1),
    **{f"{name}{special}": choice(name, *shape) for name in CHOICES for special, shape in (
        ("", (2, 3, 130)), (", one class", (1, 1)), (", several tiles", (3, 2500))) if name != "hard" or not special},
    **{f"{name}, no noise": choice(name, 17, 33, noisy=False, then=lambda t: t.t(), dtypes=(HALF, BRAIN))
       for name in CHOICES},
    **{f"{name}, extreme logits": choice(name, 6, 1500, noisy=False, then=EXTREME) for name in CHOICES},
}
FIRST = {}  # {operation: the first of its cases}
for name in CASES:
    FIRST.setdefault(name.partition(",")[0], name)

NOTHING = {  # {name: (case, shapes of its outputs)}: no rows, or rows of nothing
    "rms_norm": (norm("rms_norm", (0,), 7), [(0, 7)]),
    "rms_norm, residual": (norm("rms_norm", (0,), 7, "gain residual"), [(0, 7), (0, 7)]),
    "layer_norm": (norm("layer_norm", (3, 0), 7), [(3, 0, 7)]),
    "gelu": (act("gelu", 0), [(0,)]), "relu2": (act("relu2", 2, 0), [(2, 0)]),
    "glu": (act("glu", 0, 8), [(0, 4)]), "glu, no width": (act("glu", 3, 0), [(3, 0)]),
    "rotary": (with_inputs(rotary(2, 0, 3, 4, 1), None, torch.empty(1, 0, 1, 4), torch.empty(1, 0, 1, 4)),
               [(2, 0, 3, 4)]),
    "cross_entropy": (entropy(0, 9), [(0,)]), "linear": (linear(0, 4, 9), [(0,)]),
    "batched": (with_inputs(batched(2, 2, 0, 4, 3, 9, None), None, None, torch.empty(2, 0, 3, dtype=torch.int64)),
                [(2, 0, 3)]),
    **{f"{op.__name__}, {what}": (asked(op)(heads(*shape), **how), [(shape[0], shape[1], shape[3], shape[6])])
       for op, how in ((attend, dict(causal=False)), (attend_one, {}))
       for what, shape in (("no rows", (0, 2, 1, 3, 3, 8, 8)), ("no queries", (1, 2, 1, 0, 3, 8, 8)),
                           ("no keys", (2, 2, 1, 3, 0, 8, 8)))},
    **{f"{make.__name__}, {what}": (make(*sizes, *n), [sizes, *([(sizes[0], sizes[2], 3)] if n else [])])
       for make, n in ((gates, ()), (selective, (3,)))
       for what, sizes in (("no rows", (0, 3, 4)), ("no time", (2, 0, 4)), ("no width", (2, 3, 0)))},
    "grouped_linear": (grouped([0, 0], 3, 4), [(0, 4)]),
    "grouped_linear, no inputs": (grouped([1, 1, 1, 1], 0, 3), [(4, 3)]),
    "grouped_linear, no outputs": (grouped([2, 1], 3, 0), [(3, 0)]),
    "nearest_code": (nearest(0, 9, 37), [(0,)]), "nearest_code, no width": (nearest(3, 5, 0), [(3,)]),
    **{name: (choice(name, 0, 5), [(0, 5), (0,)]) for name in CHOICES},
}

MODELS = {  # of a model's size: more tiles than programs, more blocks than one
    "rms_norm": norm("rms_norm", (4099,), 8192, "gain residual", within(1e-3)),  # sums of gains differ by more
    "layer_norm": norm("layer_norm", (4099,), 513, ALL, within(1e-3)),
    "rotary": replace(rotary(4, 512, 12, 64, n_tables=1), near=within(1e-3)),
    "swiglu": act("swiglu", 4099, 2 * 2730, near=within(1e-3)),
    "cross_entropy": entropy(2049, 50257, near=within(1e-3)),
    "linear": replace(linear(2048, 64, 50257), near=within(1e-3)),
    **{f"attend, {D} and {Dv}": plain(heads(2, 4, 2, 500, 700, D, Dv), (BRAIN,), window=300)
       for D, Dv in ((64, 64), (128, 128), (128, 256), (256, 256), (80, 96))},
    "attend_differential": replace(pairs([*heads(2, 4, 2, 50, 70, 16, 16)[:2], heads(2, 4, 1, 50, 70, 16, 32)[2],
                                          of(2, scale=0.4)]), near=to_the_largest(2e-5)),
    "attend_space": replace(space(frames(2, 5, 5, 7, 4, 2, 16, 8)), near=to_the_largest(2e-5)),
    "attend_time": replace(time(frames(2, 5, 5, 7, 4, 2, 16, 8), window=3), near=to_the_largest(2e-5)),
    "attend_one": replace(one(heads(2, 8, 2, 2, 5000, 64, 64), lengths=torch.tensor([5000, 77])),
                          near=to_the_largest(2e-5)),
    "attend_latent": replace(latent([of(2, 16, 1, 576, scale=0.1), of(2, 1, 5000, 576)], rank=512, scale=0.1,
                                    lengths=torch.tensor([5000, 77])), near=to_the_largest(2e-5)),
    "min_gru": replace(gates(4, 200, 500), near=near_layer, wide=None),
    "selective_scan": replace(selective(4, 200, 500, 16), near=near_layer, wide=None),
    "grouped_linear": replace(grouped([700, 0, 33, 1300, 64], 300, 500), near=near_layer, wide=None),
    "nearest_code": nearest(1000, 700, 200),
    **{name: choice(name, 500, 3000) for name in CHOICES},
}

MODELS |= {name: replace(case, **TYPES) for name, case in MODELS.items() if not name.startswith("attend")}


def stepping(**how):
    """adamw_step of one large tensor: only for its launches, as it works in place."""
    return Case(lambda *four: kernels.adamw_step(*([t] for t in four), 1, 1e-2, (0.9, 0.99), 1e-8, 0.1, **how), None,
                [of(2 ** 22)] * 4, constant=4)


EVERY_MASK = dict(window=30, prefix=5, lengths=torch.tensor([130, 200]), positions=left_padded(200, 0, 3))
SAME_KERNELS = "linear", "attend, 128 and 256", "attend, 80 and 96", "attend_differential", "attend_space", "hard"
COMPILED = {name: case for name, case in MODELS.items() if name not in SAME_KERNELS} | {
    # what is compiled ahead of time, each in its first type: other sizes and types beside
    "rms_norm, 1024 wide": norm("rms_norm", (40,), 1024, "gain residual", dtypes=(BRAIN,)),
    "layer_norm, plain": norm("layer_norm", (40,), 64, dtypes=(BRAIN,)),
    "layer_norm, the widest": norm("layer_norm", (40,), kernels.WIDEST_ROW, ALL),
    "rotary, bfloat16": replace(rotary(2, 40, 12, 64, n_tables=1), dtypes=(BRAIN,)),
    **{f"{kind}, bfloat16": act(kind, 40, 2 * 1368, dtypes=(BRAIN,)) for kind in (*kernels.GLU, "gelu", "relu2")},
    "cross_entropy, bfloat16": entropy(40, 50257, dtypes=(BRAIN,)),
    "attend, float32": plain(heads(2, 4, 2, 100, 200, 64, 64), window=30),
    "attend, every mask": plain(heads(2, 4, 2, 100, 200, 128, 128), (BRAIN,), **EVERY_MASK),
    "attend_one, bfloat16": one(heads(2, 8, 2, 1, 5000, 128, 128), (BRAIN,), lengths=torch.tensor([5000, 77])),
    "attend_latent, bfloat16": latent([of(2, 16, 1, 576), of(2, 1, 5000, 576)], (BRAIN,), rank=512, scale=0.1),
    "min_gru, bfloat16": gates(2, 9, 1024, dtypes=(BRAIN,)),
    "min_gru, one": gates(1, 1, 1, dtypes=(BRAIN,)),  # sizes of 1 are constants to Triton
    "selective_scan, bfloat16": selective(2, 9, 1024, 16, dtypes=(BRAIN,)),
    "selective_scan, one": selective(1, 1, 1, 1, dtypes=(BRAIN,)),
    **{f"grouped_linear, {dtype}": grouped([2048] * 8, 512, 1536, dtypes=(dtype,)) for dtype in (BRAIN, FLOAT)},
    **{f"nearest_code, {dtype}": replace(nearest(100, 1024, 256), dtypes=(dtype,)) for dtype in (BRAIN, FLOAT)},
    **{f"{name}, bfloat16": choice(name, 40, 1024, dtypes=(BRAIN,)) for name in CHOICES},
    "adamw_step": stepping(clip=1.0, orthograd=True),
    "adamw_step, clipped": stepping(clip=1.0),
}
