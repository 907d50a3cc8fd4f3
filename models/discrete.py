"""Discrete codes: gradients through a categorical choice, codebooks, the parts of their KL, and what tells on collapse.

    python -m models.discrete gradients        # bias and spread of every estimator on sums that one can enumerate
    python -m models.discrete decomposition    # MI, TC and DWKL beside the estimators of TC that come out negative

Shapes: B batch, N codes of one input, K size of the codebook, D width of a code. q(z|x) is a product of N categorical
distributions softmax(logits); the prior is uniform over all K^N; nats everywhere unless a name says bits.
"""
import nanolab.settings  # noqa: F401  it minds Ctrl-C while the next lines take their seconds

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from nanolab.run import UserError, command

SAMPLED = ("gumbel_soft", "gumbel_hard", "straight_through", "reinmax")  # a posterior, of which codes are drawn
FIXED = ("simvq", "lfq", "fsq")                              # books of which no code is put anywhere


# --- Gradients through a choice ---

def gumbel_like(x, generator=None):
    """Standard Gumbel noise -log(-log u) of x's shape, dtype and device."""
    e = torch.empty_like(x).exponential_(generator=generator)
    return e.clamp_(min=torch.finfo(x.dtype).tiny).log_().neg_()


def straight_through(value, surrogate):
    """`value` going forward, bit for bit; the gradient of `surrogate` going backward."""
    return value.detach() + (surrogate - surrogate.detach())


def rotated(value, x):
    """`value` (..., D) going forward, bit for bit; backward the rotation trick (Fifty et al. 2024, arXiv 2410.06424,
    section 4): the gradient of |value| / |x| R x, with the rotation R of x onto value, in their plane, held fixed. So a
    gradient keeps its angle to the code, where `straight_through` keeps its direction. x (..., D), not 0.
    """
    with torch.no_grad():
        a, b = F.normalize(x, dim=-1), F.normalize(value, dim=-1)
        r = F.normalize(a + b, dim=-1, eps=1e-4)             # of opposite ones rounding has no direction: then 0
        scale = value.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    along_r, along_a = ((x * u).sum(-1, keepdim=True) for u in (r, a))
    return straight_through(value, scale * (x - 2 * along_r * r + 2 * along_a * b))   # R = 1 - 2 r r^T + 2 b a^T


def reinmax(logits, one_hot, tau=1.0):
    """ReinMax (Liu et al. 2023, arXiv 2304.08612, algorithm 2) of a sample one_hot ~ softmax(logits), both (..., K).

    Going forward one_hot; going backward g -> 2 J(p1) g - J(p0) g / 2 with J(p) = diag(p) - p p^T, p0 = softmax(l) and
    p1 = (one_hot + softmax(l / tau)) / 2: Heun's method, exact in the mean for functions up to the second degree where
    tau is 1. ValueError for tau < 1, of which the paper warns.
    """
    if tau < 1:
        raise ValueError(f"reinmax needs tau >= 1, not {tau}")
    p0 = torch.softmax(logits, -1)
    p1 = (one_hot + torch.softmax(logits / tau, -1)) / 2
    # a function of the logits with the value p1 and the Jacobian of a softmax there
    p1 = torch.softmax((p1.clamp(min=torch.finfo(p1.dtype).tiny).log() - logits).detach() + logits, -1)
    return straight_through(one_hot, 2 * p1 - p0 / 2)


def choose(logits, estimator, tau=1.0, noise=1.0, hardness=1.0, generator=None):
    """logits (..., K) float -> y (..., K), what stands for the one-hot code, and the codes drawn (...) int64: the
    argmax of l + noise g, g Gumbel; with noise 1 a sample of softmax(l), with noise 0 its mode.

    gumbel_soft       y = softmax((l + noise g) / tau) (Jang et al. 2017, Maddison et al. 2017)
    gumbel_hard       one-hot going forward, that softmax going backward
    straight_through  one-hot going forward, softmax(l / tau) going backward (Bengio et al. 2013)
    reinmax           see `reinmax`
    hardness < 1: y is mixed with the soft vector that has no chance in it (of gumbel_hard: with its own soft one).
    ValueError: no such estimator; reinmax with tau < 1.
    """
    if estimator not in SAMPLED:
        raise ValueError(f"estimator {estimator!r}: it must be one of {', '.join(SAMPLED)}")
    gumbel = noise * gumbel_like(logits, generator) if noise else None
    if estimator == "gumbel_soft" or estimator == "gumbel_hard" and not 0 < hardness < 1:
        return kernels.gumbel_softmax(logits, gumbel, tau, estimator == "gumbel_hard" and hardness >= 1)
    if estimator == "reinmax" and hardness >= 1 and kernels.on():
        return kernels.reinmax(logits, gumbel, tau)
    noisy = logits if gumbel is None else logits + gumbel
    codes = noisy.argmax(-1)
    soft = torch.softmax(noisy / tau, -1) if estimator == "gumbel_hard" else torch.softmax(logits / tau, -1)
    if hardness <= 0:
        return soft, codes
    one_hot = F.one_hot(codes, logits.size(-1)).to(logits.dtype)
    y = reinmax(logits, one_hot, tau) if estimator == "reinmax" else straight_through(one_hot, soft)
    return (y if hardness >= 1 else hardness * y + (1 - hardness) * soft), codes


# --- Codebooks ---

@dataclass
class Quantised:
    """What a codebook makes of z (B, N, D): e (B, N, D) for the decoder, codes (B, N) int64, logits (B, N, K) float32
    (None where nothing is drawn), y (B, N, K) or None, z as it came, loss: a scalar of its own, or 0."""
    e: torch.Tensor
    codes: torch.Tensor
    logits: torch.Tensor | None = None
    y: torch.Tensor | None = None
    z: torch.Tensor | None = None
    loss: torch.Tensor | float = 0.0


@torch.no_grad()
def kmeans(points, k, generator=None, steps=20):
    """points (M, D) -> k centres (k, D) by Lloyd's algorithm from k of the points; an empty cluster takes a new point,
    and fewer points than k are repeated."""
    points = points.float()

    def some(n):
        order = torch.randperm(len(points), generator=generator)
        return points[order.repeat(-(-n // len(points)))[:n]]
    centres = some(k)
    for _ in range(steps):
        nearest = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = nearest.bincount(minlength=k)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], some(k))
    return centres


class Codebook(nn.Module):
    """K codes of width D, and logits that choose among them: s cos(z, e_k) ("cosine") or z . e_k ("dot").

    Cosine: s = exp(log_scale), at first 20, at most 50; what the decoder reads are codes of length 1. init:
    "normal", "uniform" (within +-sqrt(3): the same variance), "kmeans" (normal until `fit` has seen encoder outputs).
    """

    def __init__(self, size, width, similarity="cosine", init="normal"):
        super().__init__()
        self.similarity, self.init = similarity, init
        self.codes = nn.Parameter(torch.empty(size, width))
        self.roles = {"codes": "embedding"}
        if similarity == "cosine":
            self.log_scale = nn.Parameter(torch.empty(()))
            self.roles["log_scale"] = "gain"

    def init_weights(self):
        """Codes of length about 1."""
        if self.init == "uniform":
            self.codes.uniform_(-math.sqrt(3), math.sqrt(3))
        else:
            self.codes.normal_()
        self.codes.mul_(self.codes.size(1) ** -0.5)
        if self.similarity == "cosine":
            self.log_scale.fill_(math.log(20))

    def scaled(self, x):
        """x (..., D) as it is compared, in float32: with cosine of length 1."""
        return F.normalize(x.float(), dim=-1) if self.similarity == "cosine" else x.float()

    def table(self):
        """(K, D) float32: the codes as the decoder reads them."""
        return self.scaled(self.codes)

    def logits(self, z):
        """z (B, N, D) -> (B, N, K) float32."""
        if self.similarity == "cosine":
            with torch.no_grad():                            # the parameter itself: past the cap it had no gradient
                self.log_scale.clamp_(max=math.log(50))
        scores = self.scaled(z) @ self.table().T
        return self.log_scale.exp() * scores if self.similarity == "cosine" else scores

    def forward(self, z, estimator=None, tau=1.0, noise=1.0, hardness=1.0, generator=None):
        """z (B, N, D) -> Quantised. estimator None: the mode, without chance."""
        with torch.autocast(z.device.type, enabled=False):
            logits = self.logits(z)
            if estimator is None:
                codes = logits.argmax(-1)
                return Quantised(self.look_up(codes), codes, logits, None, z)
            y, codes = choose(logits, estimator, tau, noise, hardness, generator)
            return Quantised(y @ self.table(), codes, logits, y, z)

    def look_up(self, codes):
        """codes (...) int64 -> (..., D)."""
        return F.embedding(codes, self.table())

    def norms(self):
        """Lengths (K,) of the codes as parameters."""
        return torch.linalg.vector_norm(self.codes.float(), dim=1)

    @torch.no_grad()
    def put(self, where, points):
        """Codes `where` (K,) bool, or a slice of them, become points (as many, D) float."""
        self.codes[where] = self.scaled(points)

    @torch.no_grad()
    def revive(self, where, z, generator=None, least=None):
        """Codes `where` (K,) bool become encoder outputs, drawn from z (M, D) by `generator`: evenly, or, with `least`,
        with chances as their squared distances from the nearest living code (k-means++, Arthur & Vassilvitskii 2007),
        and only those at least so far away: where most outputs are alike an even draw hardly ever meets a rare one.
        Returns how many there were."""
        n = int(where.sum())
        if least is None or n == len(where):
            rows = torch.randint(len(z), (n,), generator=generator)
        else:
            gaps = torch.cdist(self.scaled(z), self.table()[~where]).amin(1).square().cpu()
            gaps = gaps * (gaps >= max(least, 1e-12))
            n = min(n, int((gaps > 0).sum()))
            if not n:
                return 0
            rows = torch.multinomial(gaps, n, generator=generator)
            where = where & (where.cumsum(0) <= n)
        self.put(where, z[rows.to(z.device)])
        return n

    @torch.no_grad()
    def fit(self, z, generator=None):
        """All codes become the k-means centres of encoder outputs z (M, D)."""
        self.put(slice(None), kmeans(self.scaled(z).cpu(), len(self.codes), generator).to(z.device))


class VQ(Codebook):
    """Vector quantisation (van den Oord et al. 2017): the nearest code, gradient copied past it, codes as running means
    of what chose them (their appendix A.1), commitment loss; "cosine" compares and keeps unit vectors. A pass changes
    nothing here: a training step calls `follow` once, with what all its passes chose. rotation: the gradient is not
    copied but `rotated`.
    """

    def __init__(self, size, width, similarity="cosine", init="normal", decay=0.95, commitment=0.25, rotation=False):
        nn.Module.__init__(self)
        self.similarity, self.init, self.decay, self.commitment = similarity, init, decay, commitment
        self.past = rotated if rotation else straight_through
        self.register_buffer("codes", torch.randn(size, width) * width ** -0.5)
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", self.codes.clone())
        if init == "uniform":
            self.put(slice(None), (torch.rand(size, width) - 0.5) * (12 / width) ** 0.5)

    def forward(self, z, estimator=None, generator=None, **schedules):
        """z (B, N, D) -> Quantised. estimator None: as it is; else there is a loss, and a gradient past the choice."""
        with torch.autocast(z.device.type, enabled=False):
            x = self.scaled(z)
            codes = kernels.nearest_code(x.flatten(0, -2), self.table())
            e = self.look_up(codes).view(x.shape)
            if estimator is None:
                return Quantised(e, codes.view(x.shape[:-1]), z=z)
            return Quantised(self.past(e, x), codes.view(x.shape[:-1]), z=z, loss=self.loss(x, e))

    def loss(self, x, e):
        """Of x (..., D) as it was compared and its codes e (..., D): a scalar that pulls x to e."""
        return self.commitment * (x - e.detach()).square().sum(-1).mean()

    @torch.no_grad()
    def follow(self, z, codes):
        """One update of the running means, once a step: z (..., D) of all its passes as `forward` took it, and what
        they chose (...). A code long unused stays where it is."""
        x, codes = self.scaled(z.flatten(0, -2)), codes.flatten()
        counts = torch.zeros_like(self.counts).index_add_(0, codes, x.new_ones(len(codes)))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, x)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codes.copy_(torch.where(self.counts[:, None] > 1e-5, self.sums / self.counts[:, None], self.codes))

    @torch.no_grad()
    def put(self, where, points):
        """Codes `where` (K,) bool become points, and their running means begin anew."""
        super().put(where, points)
        self.counts[where] = 1.0
        self.sums[where] = self.codes[where]


class SimVQ(VQ):
    """VQ whose codes are frozen Gaussian vectors times one learned matrix (Zhu et al. 2024, arXiv 2411.02038): what one
    code learns moves all of them, so none is left behind. No means, no resets. The loss |sg(x) - e|^2 + c |x - sg(e)|^2
    is a mean over the width too: as VQ's sum it draws all x onto one code before there is anything to tell apart."""

    def __init__(self, size, width, similarity="cosine", commitment=0.25, rotation=False):
        nn.Module.__init__(self)
        self.similarity, self.commitment = similarity, commitment
        self.past = rotated if rotation else straight_through
        self.register_buffer("frozen", torch.randn(size, width) * width ** -0.5)
        self.turn = nn.Parameter(torch.empty(width, width))
        self.roles = {"turn": "matrix"}

    def init_weights(self):
        """The frozen codes themselves: any rotation of a Gaussian is as good."""
        nn.init.eye_(self.turn)

    @property
    def codes(self):
        """(K, D) float32, with a gradient."""
        with torch.autocast(self.turn.device.type, enabled=False):
            return self.frozen @ self.turn

    def loss(self, x, e):
        """As `VQ.loss`, and one that pulls the codes e to x."""
        return self.commitment * (x - e.detach()).square().mean() + (x.detach() - e).square().mean()


class Books(nn.Module):
    """Several codes of one vector, each out of a book of its own, a VQ or SimVQ. residual: residual VQ (Zeghidour et
    al. 2021, arXiv 2107.03312, algorithm 1), a book for what the ones before it have left, by Euclidean distance from
    the second on, and e is their sum; else multi-head VQ, a product quantiser (Jegou et al. 2011), a book for its share
    of the width. z (B, N, D) -> codes (B, N n), the n of a vector beside one another.
    """

    def __init__(self, kind, n, residual, size, width, similarity="cosine", **how):
        super().__init__()
        self.residual = residual
        self.books = nn.ModuleList(kind(size, width if residual else width // n,
                                        "dot" if residual and i else similarity, **how) for i in range(n))

    def given(self, z):
        """Pairs of a book and what it is given of z (..., D), in their order, as the books before it choose by then."""
        if not self.residual:
            yield from zip(self.books, z.chunk(len(self.books), -1))
            return
        rest = self.books[0].scaled(z)
        for book in self.books[:-1]:
            yield book, rest
            rest = rest - book(rest).e
        yield self.books[-1], rest

    def forward(self, z, estimator=None, generator=None, **schedules):
        """z (B, N, D) -> Quantised; as `VQ`. The gradient passes the sum of a residual VQ once; the loss is of all."""
        if self.residual:
            x = rest = self.books[0].scaled(z)
            found = []
            for book in self.books:
                found.append(book(rest, estimator))
                rest = rest - found[-1].e.detach()
            e = sum(one.e for one in found)
            e = e if estimator is None else self.books[0].past(e, x)
        else:
            found = [book(part, estimator) for book, part in self.given(z)]
            e = torch.cat([one.e for one in found], -1)
        codes = torch.stack([one.codes for one in found], -1).flatten(1)
        return Quantised(e, codes, z=z, loss=sum(one.loss for one in found))

    def look_up(self, codes):
        """codes (B, N n) int64 -> (B, N, D)."""
        codes = codes.unflatten(-1, (-1, len(self.books))).unbind(-1)
        found = [book.look_up(some) for book, some in zip(self.books, codes)]
        return sum(found) if self.residual else torch.cat(found, -1)

    def norms(self):
        """Lengths (n K,) of the codes of all books."""
        return torch.cat([book.norms() for book in self.books])

    @torch.no_grad()
    def follow(self, z, codes):
        """As `VQ.follow`: z (M, D), codes (M n,)."""
        for (book, part), some in zip(list(self.given(z)), codes.view(len(z), -1).unbind(1)):   # before any moves
            book.follow(part, some)

    @torch.no_grad()
    def revive(self, where, z, generator=None):
        """As `Codebook.revive`: where (n K,) bool, book after book, each with what the ones before leave by then."""
        return sum(book.revive(some, part, generator)
                   for (book, part), some in zip(self.given(z), where.chunk(len(self.books))))

    @torch.no_grad()
    def fit(self, z, generator=None):
        """As `Codebook.fit`, book after book."""
        for book, part in self.given(z):
            book.fit(part, generator)


def fsq_levels(size):
    """Levels per channel, from 8 down, whose product is `size`, largest first: 512 -> [8, 8, 8], 128 -> [8, 4, 4].

    Two levels only where it must be: their threshold lies far out, where tanh has hardly a gradient.
    ValueError: there are none.
    """
    def split(rest, most, least):
        if rest == 1:
            return []
        for level in range(min(most, rest), least - 1, -1):
            if rest % level == 0 and (tail := split(rest // level, level, least)) is not None:
                return [level, *tail]
        return None
    found = split(size, 8, 3) or split(size, 8, 2)
    if not found:
        raise ValueError(f"codebook_size {size} is no product of levels from 2 to 8, as fsq needs: try a power of two")
    return found


class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2024): each channel rounded to one of a few levels; nothing to learn.

    z (B, N, D) with D = len(levels); code = the levels as digits, the last channel moving fastest.
    """

    def __init__(self, size):
        super().__init__()
        levels = torch.tensor(fsq_levels(size))
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", size // levels.cumprod(0), persistent=False)

    def forward(self, z, estimator=None, generator=None, **schedules):
        """z (B, N, D) -> Quantised."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bounded(z.float())
            digits = bounded.round()
            codes = ((digits + self.levels // 2).long() * self.basis).sum(-1)
            return Quantised(straight_through(digits, bounded) / (self.levels // 2), codes, z=z)

    def bounded(self, z):
        """z (..., D) -> the numbers (..., D) that are rounded, in levels around the middle one."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = 0.5 * (self.levels % 2 == 0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def look_up(self, codes):
        """codes (...) int64 -> (..., D)."""
        digits = codes[..., None] // self.basis % self.levels
        return (digits - self.levels // 2) / (self.levels // 2)


class LFQ(nn.Module):
    """Lookup-free quantisation (Yu et al. 2024, MAGVIT-v2, arXiv 2310.05737, section 3.1): each channel's sign.

    z (B, N, D) with 2^D = K; code = the signs as bits, the last channel moving fastest. In training there are logits of
    q(k|z) = softmax(-|z - e_k|^2 / temperature), for the entropy terms E H(q(z)) - H(E q(z)): `certainty` times the
    first, in nats, is in the loss, beside a commitment to the code; `usage_kl` of the logits is the second.
    ValueError: no such D.
    """

    def __init__(self, size, commitment=0.25, certainty=0.1, temperature=1.0):
        super().__init__()
        self.commitment, self.certainty, self.temperature = commitment, certainty, temperature
        self.register_buffer("basis", 2 ** torch.arange(lfq_bits(size) - 1, -1, -1), persistent=False)
        self.register_buffer("table", self.look_up(torch.arange(size)), persistent=False)

    def forward(self, z, estimator=None, generator=None, **schedules):
        """z (B, N, D) -> Quantised; as `VQ`."""
        with torch.autocast(z.device.type, enabled=False):
            x = z.float()
            codes = ((x > 0) * self.basis).sum(-1)
            e = self.look_up(codes)
            if estimator is None:
                return Quantised(e, codes, z=z)
            logits = 2 / self.temperature * x @ self.table.T                     # |z|^2 and |e_k|^2 = D are the same
            loss = self.commitment * (x - e).square().sum(-1).mean()
            loss = loss + self.certainty * entropy(torch.softmax(logits, -1)).mean()
            return Quantised(straight_through(e, x), codes, logits, z=z, loss=loss)

    def look_up(self, codes):
        """codes (...) int64 -> (..., D) float32, -1 and 1."""
        return (codes[..., None] & self.basis).sign() * 2.0 - 1


def lfq_bits(size):
    """Channels of an LFQ of that many codes. ValueError: no power of 2."""
    if size < 2 or size & size - 1:
        raise ValueError(f"codebook_size {size} is no power of 2, as lfq needs: a code is a sign of each channel")
    return size.bit_length() - 1


# --- KL and its parts ---

def kl_uniform(logits):
    """KL(softmax(l) || uniform) in nats, (..., K) -> (...): ln K + sum p ln p; 0 where uniform, ln K where one-hot."""
    return math.log(logits.size(-1)) - entropy(torch.softmax(logits.float(), -1))


def entropy(p):
    """-sum p ln p over the last dimension, nats; 0 ln 0 = 0, and the gradient is finite there too."""
    return (p * -p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def decompose(logits, y, positive=False):
    """KL to the uniform prior and its parts, scalars with gradient, nats per input:

        KL = mean_x sum_n KL(q(z_n|x) || u) = MI + TC + DWKL
        MI = I(x; z)                        TC = KL(q(z) || prod_n q(z_n)) = sum_n I(x; z_n) - I(x; z) >= 0
        DWKL = sum_n KL(q(z_n) || u)        code_mi = sum_n I(x; z_n) = MI + TC

    after Chen et al. 2018 (arXiv 1802.04942), with q(z) the mixture over this batch. KL, code_mi and DWKL are
    exact sums over K; MI is the mean over one draw y (B, N, K) per input of ln q(z|x) - ln mean_j q(z|x_j): at most
    ln B, since a draw's own input is in the mixture. positive: negative values of MI and TC, which only the draws'
    chance can make, become 0. All but KL compare the inputs of a batch: the mean over passes is not that of one pass
    over all of their inputs.

    What is often written instead is not TC: docs/dvae.md, and minibatch-weighted sampling without its -ln(N M), for
    every factor of the product too, which is shifted by -(D - 1) ln(N M).
    """
    log_q = torch.log_softmax(logits.float(), -1)                                # (B, N, K)
    q, B, K = log_q.exp(), len(logits), logits.size(-1)
    marginals = q.mean(0)                                                        # (N, K)
    entropies, own = entropy(marginals), entropy(q)                              # (N,), (B, N)
    kl = (math.log(K) - own).sum(1).mean()
    dwkl, code_mi = (math.log(K) - entropies).sum(), (entropies - own.mean(0)).sum()
    joint = y.float().flatten(1) @ log_q.flatten(1).T                            # (B, B): ln q(z_i | x_j)
    mi = (joint.diagonal() - torch.logsumexp(joint, 1) + math.log(B)).mean()
    tc = code_mi - mi
    if positive:
        mi, tc = mi.relu(), tc.relu()
    return dict(kl=kl, mi=mi, tc=tc, dwkl=dwkl, code_mi=code_mi)


def usage_kl(logits):
    """KL of the mean posterior over batch and positions to uniform, nats: 0 where all codes serve alike, whatever a
    single posterior is. Not linear in the batch: the mean over passes is at least that of one pass over all of their
    inputs."""
    return math.log(logits.size(-1)) - entropy(torch.softmax(logits.float(), -1).flatten(0, -2).mean(0))


# --- Monitors, over the whole evaluation set ---

def code_statistics(codes, size):
    """codes (M, N) int64 of a whole set -> dict: usage (share of the codebook that was ever chosen), dead_codes (how
    many never), perplexity (exp of the pooled entropy), code_bits (sum over the positions of their entropies, bits)."""
    M, N = codes.shape
    counts = (codes + torch.arange(N, device=codes.device) * size).flatten().bincount(minlength=N * size).view(N, size)
    pooled = counts.sum(0).double()
    alive = (pooled > 0).sum().item()
    return dict(usage=alive / size, dead_codes=size - alive, perplexity=entropy(pooled / pooled.sum()).exp().item(),
                code_bits=(entropy(counts.double() / M).sum() / math.log(2)).item())


def mutual_information(a, b, n_a, n_b):
    """a (M,), b (M,) int64 with n_a and n_b values -> (I(a; b), H(a), H(b)) from counts, nats."""
    joint = (a * n_b + b).bincount(minlength=n_a * n_b).view(n_a, n_b)
    h_a, h_b, h = (entropy(counts.double() / len(a)).item() for counts in (joint.sum(1), joint.sum(0), joint.flatten()))
    return h_a + h_b - h, h_a, h_b


def nmi_matrix(codes, generator=None):
    """Normalised mutual information I / sqrt(H H) of every pair of positions of codes (M, N) -> (N, N) float64, 0 for a
    position with one code only; and a floor (N, N): the same after each position's codes were shuffled among the
    inputs."""
    M, N = codes.shape
    order = torch.rand(N, M, generator=generator).argsort(1).to(codes.device)
    matrices = []
    for columns in (codes.T, codes.T.gather(1, order)):                          # (N, M)
        matrix = torch.zeros(N, N, dtype=torch.float64)
        # Numbered by those that a position uses: of 4,096 codes the tables of all would take longer than the training.
        columns = [column.unique(return_inverse=True)[1] for column in columns]
        sizes = [int(column.max()) + 1 for column in columns]
        for i in range(N):
            for j in range(i + 1):
                shared, h_i, h_j = mutual_information(columns[i], columns[j], sizes[i], sizes[j])
                matrix[i, j] = matrix[j, i] = max(0.0, shared) / math.sqrt(h_i * h_j) if min(h_i, h_j) > 0 else 0.0
        matrices.append(matrix)
    return tuple(matrices)


def information_gaps(codes, size, factors, generator=None):
    """Which factor one position knows: {name: (best, gap, floor)}, after MIG (Chen et al. 2018), of codes (M, N) and
    factors {name: (M,) int64, -1 where undefined} that vary.

    best: largest I(z_n; v) / H(v) over the positions; gap: how far the second is behind; floor: the best after the
    factor was shuffled.
    """
    found = {}
    for name, values in factors.items():
        there = values >= 0
        known, v = values[there].unique(return_inverse=True)
        if len(known) < 2:
            continue

        def shares(v):
            found = (mutual_information(position, v, size, len(known)) for position in codes[there].T)
            return sorted((information / entropy for information, _, entropy in found), reverse=True)
        best, second = (*shares(v), 0.0)[:2]
        floor = shares(v[torch.randperm(len(v), generator=generator).to(v.device)])[0]
        found[name] = best, best - second, floor
    return found


# --- What a person may look at: python -m models.discrete gradients, decomposition ---

def gradient_error(estimator, function, logits, tau=1.0, draws=20_000, generator=None):
    """(bias, spread) of an estimator's gradient of E f(z), z ~ softmax(logits (K,)), float64, both over the length of
    the exact one, a sum over all K codes.

    straight_through and reinmax are averaged over the K codes with their probabilities, so without chance; of
    gumbel_soft and gumbel_hard `draws` are taken. bias: |mean - exact|; spread: root of the mean squared distance to
    the mean.
    """
    logits = logits.double().requires_grad_()
    K, eye, p = len(logits), torch.eye(len(logits), dtype=torch.float64), torch.softmax(logits, 0)
    exact = torch.autograd.grad((p * function(eye)).sum(), logits)[0]
    if estimator.startswith("gumbel"):
        rows = logits.detach().expand(draws, K).clone().requires_grad_()
        y, _ = choose(rows, estimator, tau, generator=generator)
        weights = torch.full((draws,), 1 / draws, dtype=torch.float64)
    else:
        rows = logits.detach().expand(K, K).clone().requires_grad_()
        y = reinmax(rows, eye, tau) if estimator == "reinmax" else straight_through(eye, torch.softmax(rows / tau, 1))
        weights = p.detach()
    grads = torch.autograd.grad(function(y).sum(), rows)[0]                      # (draws, K)
    mean = weights @ grads
    spread = (weights @ (grads - mean).square().sum(1)).sqrt()
    return ((mean - exact).norm() / exact.norm()).item(), (spread / exact.norm()).item()


def _gradients():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64)
    a, m = torch.randn(6, generator=generator, dtype=torch.float64), torch.randn(
        6, 6, generator=generator, dtype=torch.float64)
    functions = {"linear": lambda y: y @ a, "quadratic": lambda y: ((y @ m) * y).sum(-1),
                 "cubic": lambda y: (y @ a) ** 3 + y @ m[0]}
    print("Gradient of E f(z), K = 6: bias and spread over the exact gradient's length\n")
    print("| estimator | tau | " + " | ".join(functions) + " |\n" + "| --- " * (2 + len(functions)) + "|")
    for name, tau in (("gumbel_soft", 1.0), ("gumbel_soft", 0.5), ("gumbel_soft", 1 / 16), ("gumbel_hard", 1.0),
                      ("gumbel_hard", 0.5), ("gumbel_hard", 1 / 16), ("straight_through", 1.0), ("reinmax", 1.0),
                      ("reinmax", 1.3), ("reinmax", 2.0)):
        found = [gradient_error(name, f, logits, tau, generator=generator) for f in functions.values()]
        print(f"| {name} | {tau:g} | " + " | ".join(f"{bias:.3f}, {spread:.2f}" for bias, spread in found) + " |")


def _decomposition():
    generator = torch.Generator().manual_seed(0)
    print("The mixture of 64 posteriors, nats: mean over 50 draws of a code each (least .. largest)\n")
    print("| codes | code_mi | MI | TC | KL - MI' - DWKL in float32 | own input left out |\n" + "| --- " * 6 + "|")
    for name, N, K, copies in (("4 independent x 8", 4, 8, 1), ("4 in two equal pairs x 8", 2, 8, 2),
                               ("64 x 512", 64, 512, 1)):
        logits = 3.0 * torch.randn(64, N, K, generator=generator).repeat_interleave(copies, 1)
        log_q = torch.log_softmax(logits, -1)
        mean = log_q.exp().mean(0)
        one = (log_q.exp() * (log_q - mean.log())).sum((1, 2)).mean()            # MI': the sum of the codes' own
        two = (mean * (mean.log() + math.log(K))).sum()
        residual, rows = (kl_uniform(logits).sum(1).mean() - one - two).item(), []
        for _ in range(50):
            y = F.one_hot(choose(logits, "straight_through", generator=generator)[1], K)
            parts = {name: value.item() for name, value in decompose(logits, y).items()}
            joint = y.float().flatten(1) @ log_q.flatten(1).T
            others = joint.masked_fill(torch.eye(64, dtype=torch.bool), -math.inf)
            wrong = joint.diagonal() - torch.logsumexp(others, 1) + math.log(63)
            rows.append((parts["mi"], parts["tc"], residual, parts["code_mi"] - wrong.mean().item()))
        shown = (f"{sum(values) / len(values):.4g} ({min(values):.2g} .. {max(values):.2g})" for values in zip(*rows))
        print(f"| {name} | {parts['code_mi']:.4g} | {' | '.join(shown)} |")


@command
def main():
    """The command line."""
    tables = {"gradients": _gradients, "decomposition": _decomposition}
    if len(sys.argv) != 2 or sys.argv[1] not in tables:
        raise UserError(f"which table? {' or '.join(tables)}")
    tables[sys.argv[1]]()


if __name__ == "__main__":
    main()
