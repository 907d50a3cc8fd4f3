"""models/discrete.py: every estimator is its formula and its bias is as enumerated; codebooks, k-means, VQ, FSQ."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import choices
from models.discrete import (FSQ, SAMPLED, VQ, Codebook, choose, fsq_levels, gradient_error, gumbel_like, kmeans,
                             reinmax, straight_through, unit)

pytestmark = pytest.mark.usefixtures("one_thread")
HARD = [name for name in SAMPLED if name != "gumbel_soft"]
CODEBOOKS = [("cosine", Codebook), ("dot", Codebook), ("cosine", VQ), ("dot", VQ)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def distances(a, b):
    """(len(a), len(b)), by differences: torch.cdist multiplies out, and loses digits."""
    return (a[:, None] - b).norm(dim=-1)


# --- Gumbel noise and straight-through ---

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_noise_has_the_moments_of_a_gumbel(dtype):
    """Mean Euler's constant, variance pi^2 / 6, P(g <= 0) = 1 / e, never infinite, of x's shape and dtype."""
    g = gumbel_like(torch.zeros(400, 1000, dtype=dtype), seeded())
    assert g.shape == (400, 1000) and g.dtype == dtype and g.isfinite().all()
    assert abs(g.mean().item() - 0.5772) < 0.008 and abs(g.var().item() - math.pi ** 2 / 6) < 0.02
    assert abs((g <= 0).double().mean().item() - math.exp(-1)) < 0.003


def test_gumbel_noise_is_finite_where_the_generator_gives_0(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert gumbel_like(torch.ones(3)).isfinite().all()


def test_straight_through_is_the_value_forward_and_the_surrogate_backward():
    """Bit for bit forward, whatever the two are; the value gets no gradient."""
    value, surrogate = (normal(1000, seed=s).mul(10.0 ** s).requires_grad_() for s in range(2))
    weights = normal(1000, seed=3)
    out = straight_through(value, surrogate.square())
    assert torch.equal(out, value)
    (out * weights).sum().backward()
    assert value.grad is None
    close(surrogate.grad, 2 * surrogate.detach() * weights)


# --- choose ---

def surrogate(estimator, logits, tau, gumbel):
    """What an estimator's gradient goes through: of Gumbel the softmax with the noise in it, else without."""
    return torch.softmax((logits + gumbel if estimator.startswith("gumbel") else logits) / tau, -1)


@pytest.mark.parametrize("scale, tau, noise, hardness", [
    (1, 1.5, 1.0, 1.0), (50, 1.5, 1.0, 2.0), (1, 1.7, 0.0, 1.0), (1, 1.4, 0.8, 0.3), (1, 1.4, 0.0, 0.5),
    (1, 1.2, 0.8, 0.0)])
@pytest.mark.parametrize("estimator", SAMPLED)
def test_an_estimator_is_its_formula(estimator, scale, tau, noise, hardness):
    """Value and gradient. Hard ones are one-hot bit for bit, however sharp the logits; hardness mixes hard and soft;
    rows of the gradient sum to 0; the generator alone decides, and is not asked where there is no noise."""
    logits, g, before = (scale * normal(40, 7)).requires_grad_(), normal(40, 7, seed=1), torch.get_rng_state()
    generator = seeded(3)
    y, codes = choose(logits, estimator, tau, noise, hardness, generator)
    assert torch.equal(torch.get_rng_state(), before)
    gumbel = noise * gumbel_like(logits.detach(), seeded(3))
    assert codes.dtype == torch.int64 and torch.equal(codes, (logits + gumbel).argmax(-1))
    assert torch.equal(generator.get_state(), seeded(3).get_state()) == (noise == 0)
    one_hot, soft = F.one_hot(codes, 7).float(), surrogate(estimator, logits, tau, gumbel)
    hard = algorithm_2(logits, one_hot, tau) if estimator == "reinmax" else one_hot + soft - soft.detach()
    part = 0.0 if estimator == "gumbel_soft" else min(1.0, hardness)
    expected = part * hard + (1 - part) * soft
    assert part < 1 or torch.equal(y, one_hot)
    close(y, expected)
    ours, wanted = (torch.autograd.grad((value * g).sum(), logits)[0] for value in (y, expected))
    close(ours, wanted, 1e-5)
    assert ours.sum(-1).abs().max() < 1e-5 and (scale > 1 or (ours.abs().sum(-1) > 1e-4).all())


@pytest.mark.parametrize("noise, power", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("estimator, tau", [(name, tau) for name in SAMPLED for tau in (1.0, 2.0)])
def test_codes_follow_the_softmax_of_the_logits(estimator, tau, noise, power):
    """tau never touches the distribution of the codes; less noise sharpens it: p^(1 / noise). Chi-square, 4 degrees."""
    logits = torch.tensor([1.5, 0.5, 0.0, -0.5, -1.0])
    _, codes = choose(logits.expand(20_000, 5), estimator, tau, noise, generator=seeded(1))
    expected = 20_000 * torch.softmax(power * logits, 0)
    assert ((codes.bincount(minlength=5) - expected).square() / expected).sum() < 18.5  # one in a thousand


def test_what_choose_refuses():
    """An estimator that draws nothing or does not exist; reinmax below tau 1."""
    for name in ("vq", "fsq", "gumbel", ""):
        with pytest.raises(ValueError, match="must be one of gumbel_soft, gumbel_hard, straight_through, reinmax"):
            choose(torch.zeros(3), name)
    with pytest.raises(ValueError, match="tau >= 1, not 0.9"):
        choose(torch.zeros(3), "reinmax", tau=0.9)
    with pytest.raises(ValueError, match="tau >= 1"):
        reinmax(torch.zeros(3), torch.eye(3)[0], 0.5)


# --- ReinMax ---

def jacobian_product(p, g):
    """(diag(p) - p p^T) g."""
    return p * (g - (p * g).sum(-1, keepdim=True))


def algorithm_2(logits, one_hot, tau):
    """Liu et al. 2023, algorithm 2, line by line: what `reinmax` is compared with."""
    p0 = torch.softmax(logits, -1)
    p1 = (one_hot + torch.softmax(logits / tau, -1)) / 2
    p1 = torch.softmax((torch.log(p1) - logits).detach() + logits, -1)
    p2 = 2 * p1 - p0 / 2
    return p2 - p2.detach() + one_hot


@pytest.mark.parametrize("tau", [1.0, 1.3, 4.0])
def test_reinmax_gradient_in_closed_form(tau):
    """2 J(p1) g - J(p0) g / 2; also what the published algorithm gives."""
    logits, g = normal(50, 6, dtype=torch.float64).requires_grad_(), normal(50, 6, seed=1, dtype=torch.float64)
    one_hot = F.one_hot(choose(logits, "reinmax", tau, generator=seeded(2))[1], 6).double()
    p0, p1 = torch.softmax(logits, -1), (one_hot + torch.softmax(logits / tau, -1)) / 2
    expected = (2 * jacobian_product(p1, g) - jacobian_product(p0, g) / 2).detach()
    for out in (reinmax(logits, one_hot, tau), algorithm_2(logits, one_hot, tau)):
        close(out, one_hot, 1e-15)
        close(torch.autograd.grad((out * g).sum(), logits)[0], expected, 1e-12)


def test_reinmax_of_certain_choices():
    """Where softmax(l) is 0 in float32 the gradient is 0, not NaN."""
    logits = torch.tensor([[50.0, -100.0, -200.0], [1e4, 0.0, -1e4]]).requires_grad_()
    (reinmax(logits, torch.eye(3)[[0, 0]]) * normal(2, 3)).sum().backward()
    close(logits.grad, torch.zeros(2, 3))


A, M = normal(6, seed=3, dtype=torch.float64), normal(6, 6, seed=4, dtype=torch.float64)
FUNCTIONS = {"linear": lambda y: y @ A, "quadratic": lambda y: ((y @ M) * y).sum(-1) + y @ A,
             "cubic": lambda y: (y @ A) ** 3 + y @ A}


def enumerated(estimate, function, logits):
    """Mean, spread and exact value of the gradient of E f: one backward pass for each of the K one-hot vectors."""
    p, eye = torch.softmax(logits.detach(), 0), torch.eye(len(logits), dtype=torch.float64)
    each = [torch.autograd.grad(function(estimate(logits, z)), logits)[0] for z in eye]
    mean = sum(w * g for w, g in zip(p, each))
    spread = sum(w * (g - mean).square().sum() for w, g in zip(p, each)).sqrt()
    exact = torch.autograd.grad(sum(w * function(z) for w, z in zip(torch.softmax(logits, 0), eye)), logits)[0]
    return mean, spread, exact


@pytest.mark.parametrize("tau", [1.0, 1.5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_error_agrees_with_enumeration(name, tau):
    """Bias and spread over the exact length of the two estimators that need no draws. At tau 1 ReinMax is exact in the
    mean up to quadratic functions, straight-through on the linear one only."""
    logits, bias = normal(6, seed=10, dtype=torch.float64).requires_grad_(), {}
    for kind, estimate in (("reinmax", lambda l, z: reinmax(l, z, tau)), ("straight_through", lambda l, z:
                           straight_through(z, torch.softmax(l / tau, -1)))):
        mean, spread, exact = enumerated(estimate, FUNCTIONS[name], logits)
        bias[kind], found = gradient_error(kind, FUNCTIONS[name], logits.detach(), tau)
        assert bias[kind] == pytest.approx(((mean - exact).norm() / exact.norm()).item(), abs=1e-12)
        assert found == pytest.approx((spread / exact.norm()).item(), abs=1e-12)
    if tau == 1:
        assert [bias["reinmax"] < 1e-12, bias["straight_through"] < 1e-12] == {
            "linear": [True, True], "quadratic": [True, False], "cubic": [False, False]}[name]
        assert max(bias.values()) < 1e-12 or max(bias.values()) > 0.01


@pytest.mark.parametrize("tau", [2.0, 0.125])
@pytest.mark.parametrize("kind", ["gumbel_soft", "gumbel_hard"])
def test_gradient_error_of_gumbel_agrees_with_its_own_draws(kind, tau):
    """On a linear function each draw's gradient is J(y) a / tau."""
    logits = normal(6, seed=10)
    rows = logits.double().expand(5000, 6)
    exact = jacobian_product(torch.softmax(logits.double(), 0), A)
    each = jacobian_product(torch.softmax((rows + gumbel_like(rows.clone(), seeded(1))) / tau, -1), A) / tau
    spread = (each - each.mean(0)).square().sum(1).mean().sqrt() / exact.norm()
    assert gradient_error(kind, FUNCTIONS["linear"], logits, tau, 5000, seeded(1)) == pytest.approx(
        (((each.mean(0) - exact).norm() / exact.norm()).item(), spread.item()), rel=1e-9)


# --- Codebooks ---

def codebook(kind=Codebook, size=16, width=8, **settings):
    torch.manual_seed(0)
    book = kind(size, width, **settings)
    if kind is Codebook:
        with torch.no_grad():
            book.init_weights()
    return book


def test_cosine_logits_are_a_bounded_cosine():
    """scale x cos, 20 at first, never past the cap, whatever the lengths of z and of the codes."""
    book = codebook()
    z = 30 * normal(5, 4, 8)
    expected = F.cosine_similarity(z[:, :, None], book.codes[None, None], dim=-1)
    close(book.logits(z), 20 * expected, 1e-5)
    assert book.logits(book.codes[None] * 7)[0].diagonal().tolist() == pytest.approx([20] * 16, rel=1e-5)
    for scale, bound in ((49.0, 49.0), (51.0, 50.0), (1e6, 50.0)):
        with torch.no_grad():
            book.log_scale.fill_(math.log(scale))
        close(book.logits(z), bound * expected, 1e-4)
    other = codebook(scale=3.0, cap=2.5)
    assert other.log_scale.exp().item() == pytest.approx(3)
    close(other.logits(z), 2.5 * expected, 1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_table_look_up_and_mode(similarity):
    """Codes of length 1 under cosine, under dot as they are, and logits z . e; without an estimator the likeliest code,
    and no generator is asked."""
    book, z, before = codebook(similarity=similarity), 3 * normal(3, 4, 8), torch.get_rng_state()
    with torch.no_grad():
        book.codes.mul_(torch.linspace(0.1, 5, 16)[:, None])
    close(book.table(), book.codes / (book.codes.norm(dim=1, keepdim=True) if similarity == "cosine" else 1))
    close(book.norms(), book.codes.norm(dim=1))
    assert similarity == "cosine" or torch.equal(book.logits(z), z @ book.codes.T)
    found = book(z)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(found.codes, book.logits(z).argmax(-1))
    close(found.e, F.one_hot(found.codes, 16).float() @ book.table())
    assert found.y is None and found.loss == 0 and torch.equal(found.z, z)
    close(found.logits, book.logits(z))


@pytest.mark.parametrize("estimator", SAMPLED)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_codebook_with_an_estimator(similarity, estimator):
    """y and codes are those of `choose` on its logits with all its settings, e is y @ table; z and codes learn."""
    book, z = codebook(similarity=similarity), normal(3, 4, 8).requires_grad_()
    how = dict(tau=1.5, noise=0.7, hardness=0.6)
    found = book(z, estimator, generator=seeded(1), **how)
    y, codes = choose(book.logits(z), estimator, generator=seeded(1), **how)
    assert torch.equal(found.codes, codes) and found.codes.shape == (3, 4) and found.loss == 0
    close(found.y, y)
    close(found.e, y @ book.table())
    close(found.logits, book.logits(z))
    (found.e * normal(3, 4, 8, seed=1)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in (z, *book.parameters()))


@pytest.mark.parametrize("kind", [Codebook, VQ, FSQ])
def test_codebooks_compute_in_float32_under_autocast(kind):
    """bfloat16 autocast and inputs change nothing: the choice among near codes needs the bits."""
    book = FSQ(240) if kind is FSQ else codebook(kind)
    z = normal(3, 4, 3 if kind is FSQ else 8).bfloat16()
    estimator = "reinmax" if kind is Codebook else "vq"
    for how in (dict(), dict(estimator=estimator, generator=seeded())):
        book.eval()
        expected = book(z.float(), **how | ({"generator": seeded()} if how else {}))
        with torch.autocast("cpu", torch.bfloat16):
            found = book(z, **how | ({"generator": seeded()} if how else {}))
        assert found.e.dtype == torch.float32 and torch.equal(found.e, expected.e)
        assert torch.equal(found.codes, expected.codes)
        if kind is Codebook:
            assert found.logits.dtype == torch.float32 and torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("init", ["normal", "uniform", "kmeans"])
@pytest.mark.parametrize("kind", [Codebook, VQ])
def test_codes_start_with_length_1(kind, init):
    """About 1 in the mean square for every init; a uniform one keeps within its bounds, and fills them."""
    book = codebook(kind, 400, 64, similarity="dot", init=init)
    assert abs(book.codes.square().sum(1).mean().item() - 1) < 0.02
    assert abs(book.codes.mean().item()) < 0.005 and abs(book.norms().mean().item() - 1) < 0.02
    largest = book.codes.abs().max().item() * 8
    assert 0.99 * math.sqrt(3) < largest < math.sqrt(3) + 1e-6 if init == "uniform" else largest > 3


def test_bound_holds_the_lengths_at_1():
    """(length - 1)^2, and its gradient shortens long codes and lengthens short ones."""
    book = codebook()
    for length, loss in ((1.0, 0.0), (2.0, 1.0), (0.5, 0.25)):
        with torch.no_grad():
            book.codes.copy_(unit(book.codes) * length)
        assert book.bound().item() == pytest.approx(loss, abs=1e-6)
        along = (torch.autograd.grad(book.bound(), book.codes)[0] * book.codes).sum(1).detach()
        close(along, torch.full((16,), 2 * (length - 1) * length / 16), 1e-5)


def test_revive_takes_what_is_far_from_the_living():
    """With `least` only outputs that are so far from every living code, no more codes than there are of these."""
    book, dead = codebook(similarity="dot"), torch.arange(16) < 6
    living = book.table()[~dead].detach()
    z = torch.cat([living.repeat(40, 1), living[:4] + 3 * torch.eye(4, 8)])      # 4 rare ones
    assert book.revive(dead, z, seeded(1), least=1.0) == 4
    assert distances(z[-4:], book.codes[:4].detach()).min(1).values.max() < 1e-6
    assert torch.equal(book.table()[~dead], living) and book.revive(dead, living, seeded(1), least=1.0) == 0
    assert book.revive(torch.ones(16, dtype=torch.bool), z, seeded(1), least=1.0) == 16


@pytest.mark.parametrize("similarity, kind", CODEBOOKS)
def test_put_and_revive_touch_only_the_dead(similarity, kind):
    """The dead become encoder outputs (unit vectors under cosine), drawn by the generator; the others stay the same."""
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[2, 5, 11]] = True
    points = 4 * normal(3, 8, seed=1)
    book = codebook(kind, similarity=similarity)
    before = book.codes.detach().clone()
    book.put(dead, points)
    close(book.codes[dead].detach(), unit(points) if similarity == "cosine" else points)
    assert torch.equal(book.codes[~dead], before[~dead])

    z, drawn = 4 * normal(200, 8, seed=2), []
    known = unit(z) if similarity == "cosine" else z
    for seed in (1, 1, 2):
        book = codebook(kind, similarity=similarity)
        book.revive(dead, z, seeded(seed))
        assert torch.equal(book.codes[~dead], before[~dead])
        assert distances(book.codes[dead].detach(), known).min(1).values.max() < 1e-6
        assert torch.pdist(book.codes[dead].detach()).min() > 1e-2
        drawn.append(book.codes.detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    book.revive(torch.zeros(16, dtype=torch.bool), z, seeded(1))
    assert torch.equal(book.codes, drawn[2])


@pytest.mark.parametrize("similarity, kind", CODEBOOKS)
def test_fit_puts_codes_on_cluster_centres(similarity, kind):
    """Three far clusters, three codes: one on each centre."""
    torch.manual_seed(0)
    centres = 5 * torch.eye(3, 8)
    z = centres.repeat_interleave(200, 0) + 0.1 * normal(600, 8)
    for seed in range(20):  # Lloyd's algorithm keeps a bad start where two of the first points share a cluster
        book = codebook(kind, 3, 8, similarity=similarity, init="kmeans")
        book.fit(z, seeded(seed))
        distance = distances(centres / (5 if similarity == "cosine" else 1), book.codes.detach())
        if distance.min(1).values.max() < 0.05:
            assert sorted(distance.argmin(1).tolist()) == [0, 1, 2]
            return
    assert False, "no start of 20 found the three clusters"


@pytest.mark.parametrize("kind", [Codebook, VQ])
def test_fit_compares_directions_under_cosine(kind):
    """A code is the mean of its unit vectors: a long one among short ones counts no more than they do."""
    z = normal(50, 8)
    lengths = torch.logspace(-2, 2, 50)[:, None]
    book = codebook(kind, 1, 8, init="kmeans")
    book.fit(lengths * z, seeded())
    close(book.table()[0].detach(), unit(unit(z).mean(0)), 1e-5)


# --- kmeans ---

def test_kmeans_is_lloyds_algorithm():
    """Every centre is the mean of the points nearest to it once nothing moves any more; the generator decides."""
    points = normal(300, 2)
    centres = kmeans(points, 5, seeded(1), steps=100)
    nearest = distances(points, centres).argmin(1)
    assert nearest.bincount(minlength=5).min() > 0
    close(centres, torch.stack([points[nearest == k].mean(0) for k in range(5)]), 1e-5)
    assert torch.equal(centres, kmeans(points, 5, seeded(1), steps=100))
    start = kmeans(points, 5, seeded(1), steps=0)
    assert distances(start, points).min(1).values.max() < 1e-6 and torch.pdist(start).min() > 0
    with pytest.raises(ValueError, match="at least one point"):
        kmeans(points[:0], 2)
    few, found = points[:3].bfloat16(), kmeans(points[:3].bfloat16(), 8, seeded())           # they repeat
    assert found.shape == (8, 2) and found.dtype == torch.float32
    assert max(distances(*pair).min(1).values.max() for pair in ((found, few.float()), (few.float(), found))) < 1e-6
    close(kmeans(points, 1, seeded()), points.mean(0, keepdim=True))
    assert torch.equal(kmeans(torch.ones(10, 4), 3, seeded()), torch.ones(3, 4))             # two are empty


# --- VQ ---

@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_vq_takes_the_nearest_code(similarity):
    """By brute force over all distances, of unit vectors under cosine; training and evaluation choose alike."""
    book = codebook(VQ, 32, 6, similarity=similarity)
    with torch.no_grad():
        book.codes.mul_(torch.linspace(0.3, 2, 32)[:, None])
    z, table = normal(5, 7, 6), book.table().clone()
    x = unit(z) if similarity == "cosine" else z
    away = (x[:, :, None] - table).square().sum(-1)
    found = book(z)
    choices.assert_best(found.codes, -away)
    nearest = found.codes
    assert torch.equal(found.e, table[nearest])
    assert found.logits is None and found.y is None and found.loss == 0 and torch.equal(found.z, z)
    assert torch.equal(book.look_up(nearest), found.e)
    trained = book(z, "vq", generator=seeded(), tau=0.5, noise=1.0, hardness=1.0)
    assert torch.equal(trained.codes, nearest) and torch.equal(trained.e, found.e)


def through_unit(z, g):
    """The gradient of (g * z / |z|).sum() in z."""
    length = z.norm(dim=-1, keepdim=True)
    return (g - z * (g * z).sum(-1, keepdim=True) / length ** 2) / length


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_vq_gradient_goes_straight_through_to_z(similarity):
    """As if e were x: g itself under dot, g through the normalisation under cosine."""
    book, z, g = codebook(VQ, similarity=similarity), (3 * normal(5, 7, 8)).requires_grad_(), normal(5, 7, 8, seed=1)
    (book(z, "vq").e * g).sum().backward()
    close(z.grad, g if similarity == "dot" else through_unit(z.detach(), g), 1e-5)


@pytest.mark.parametrize("commitment", [0.25, 2.0])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_commitment_pulls_z_and_only_z(similarity, commitment):
    """Its coefficient multiplies the pull of z to e; codes are no parameters and follow by running means instead."""
    book = codebook(VQ, similarity=similarity, commitment=commitment)
    z = (3 * normal(5, 7, 8)).requires_grad_()
    found = book(z, "vq")
    x, e = (unit(z) if similarity == "cosine" else z).detach(), found.e.detach()
    assert found.loss.item() == pytest.approx(commitment * (x - e).square().sum(-1).mean().item(), rel=1e-5)
    found.loss.backward()
    pull = 2 * commitment * (x - e) / 35
    close(z.grad, pull if similarity == "dot" else through_unit(z.detach(), pull))
    assert z.grad.abs().max() > 1e-3
    assert not book.codes.requires_grad and not list(book.parameters())
    assert set(book.state_dict()) == {"codes", "counts", "sums"}


def test_follow_is_the_formula():
    """N <- d N + (1 - d) n, m <- d m + (1 - d) sum of x, code = m / N; two updates, with the loops of the formula."""
    book, decay = codebook(VQ, 5, 3, similarity="dot", decay=0.9), 0.9
    counts, sums = [1.0] * 5, [row.clone() for row in book.codes]
    for seed in range(2):
        x, codes = normal(12, 3, seed=seed), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 4 * seed])
        book.follow(x, codes)
        for k in range(5):
            mine = [point for point, code in zip(x, codes) if code == k]
            counts[k] = decay * counts[k] + (1 - decay) * len(mine)
            sums[k] = decay * sums[k] + (1 - decay) * sum(mine, torch.zeros(3))
        close(book.counts, torch.tensor(counts))
        close(book.sums, torch.stack(sums))
        close(book.codes, torch.stack([m / n for m, n in zip(sums, counts)]))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_code_that_nothing_chooses_stays_where_it_is(similarity):
    """For ever: its mean of nothing must not shrink to the origin, which is nearest to much."""
    book, x = codebook(VQ, 4, 8, similarity=similarity), unit(normal(1000, 8))
    table = book.table().clone()
    for _ in range(2500):
        book.follow(x[:2], torch.zeros(2, dtype=torch.int64))
    close(book.table()[1:], table[1:], 1e-4)
    close(book.table()[0], unit(x[:2].mean(0)) if similarity == "cosine" else x[:2].mean(0), 1e-4)
    book.follow(x[2:4], torch.tensor([3, 3]))
    close(book.table()[3], unit(x[2:4].mean(0)) if similarity == "cosine" else x[2:4].mean(0), 1e-3)


def test_revived_vq_codes_begin_anew():
    """Counts 1 and sums the code, so that it stays alive for a while; the others' means go on."""
    book, z = codebook(VQ), normal(5, 7, 8)
    for _ in range(3):
        book.follow(z, book(z, "vq").codes)
    before, dead = {name: value.clone() for name, value in book.state_dict().items()}, torch.arange(16) < 3
    book.revive(dead, z.flatten(0, 1), seeded(1))
    assert (book.counts[dead] == 1).all() and torch.equal(book.sums[dead], book.codes[dead])
    assert all(torch.equal(value[~dead], before[name][~dead]) for name, value in book.state_dict().items())
    assert not torch.equal(book.codes[dead], before["codes"][dead])
    after = book.codes[dead].clone()
    book.follow(z.flatten(0, 1)[:1], torch.tensor([15]))
    close(book.codes[dead], after)
    fitted = codebook(VQ, 3, init="kmeans")
    fitted.follow(z, torch.zeros(5, 7, dtype=torch.int64))
    fitted.fit(z.flatten(0, 1), seeded())
    assert (fitted.counts == 1).all() and torch.equal(fitted.sums, fitted.codes)


# --- FSQ ---

def test_fsq_levels():
    """All of them from 2 to 8, the largest first; what is no product of small numbers is an error that names it."""
    for size in (2, 6, 9, 64, 128, 240, 256, 512, 1000, 1024, 4096):
        levels = fsq_levels(size)
        assert math.prod(levels) == size and all(2 <= level <= 8 for level in levels)
        assert levels == sorted(levels, reverse=True)
    assert (fsq_levels(512), fsq_levels(240), fsq_levels(1000)) == ([8, 8, 8], [8, 6, 5], [8, 5, 5, 5])
    for call, size in ((fsq_levels, 101), (fsq_levels, 22), (fsq_levels, 1), (fsq_levels, 0), (FSQ, 101)):
        with pytest.raises(ValueError, match=f"codebook_size {size} is no product"):
            call(size)


@pytest.mark.parametrize("size", [6, 64, 128, 240, 1000])
def test_fsq_codes_and_values_round_trip(size):
    """Every code has a value of its own, some z is encoded to each, and huge inputs give the outermost codes."""
    book = FSQ(size)
    width = len(book.levels)
    every = torch.arange(size)
    values = book.look_up(every)
    assert values.shape == (size, width) and len(values.unique(dim=0)) == size
    assert values.min() == -1 and values.max() <= 1
    half = torch.div(book.levels, 2, rounding_mode="floor")
    digits = (values * half).round().long() + half
    assert torch.equal(digits, torch.tensor(list(itertools.product(*map(range, fsq_levels(size))))))
    ladder = torch.linspace(-6, 6, 2001)
    steps = book(ladder[:, None].expand(-1, width)).e                            # (2001, width)
    z = ladder[(steps[:, None] - values).abs().argmin(0)][None]                  # (1, size, width)
    found = book(z)
    assert torch.equal(found.codes[0], every) and torch.equal(found.e[0], values)
    assert found.logits is None and found.y is None and found.loss == 0 and torch.equal(found.z, z)
    assert (book(torch.zeros(1, 1, width)).e == 0).all()
    for extreme in (1e4, 1e30, math.inf):
        found = book(torch.tensor([[[extreme] * width, [-extreme] * width]]))
        assert found.codes.tolist() == [[size - 1, 0]] and torch.equal(book.look_up(found.codes), found.e)


def test_fsq_gradient_is_that_of_the_bounded_function():
    """Rounding passes it by: d tanh-bounded / dz over half the levels, here written out for levels 8, 6 and 5."""
    book, z, g = FSQ(240), normal(5, 7, 3).requires_grad_(), normal(5, 7, 3, seed=1)
    (book(z).e * g).sum().backward()
    for channel, (level, offset) in enumerate(((8, 0.5), (6, 0.5), (5, 0.0))):
        half = (level - 1) * 1.001 / 2
        slope = half * (1 - torch.tanh(z[..., channel] + math.atanh(offset / half)) ** 2) / (level // 2)
        close(z.grad[..., channel], g[..., channel] * slope.detach(), 1e-5)
    again = book(z.detach(), "fsq", generator=seeded(), tau=0.1, noise=1.0, hardness=0.0)
    assert torch.equal(again.e, book(z).e) and not list(book.parameters()) and not book.state_dict()
