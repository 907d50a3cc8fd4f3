"""models/discrete.py: every estimator is its formula and its bias is as enumerated; codebooks, k-means, VQ, FSQ; the KL
and its parts beside enumeration, the monitors of codes, the two tables of its command."""
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import choices
from models import discrete
from models.discrete import (FSQ, LFQ, SAMPLED, VQ, Books, Codebook, SimVQ, choose, code_statistics, decompose,
                             fsq_levels, gradient_error, gumbel_like, information_gaps, kl_uniform, kmeans,
                             mutual_information, nmi_matrix, reinmax, rotated, usage_kl)

pytestmark = pytest.mark.usefixtures("one_thread")
HARD = [name for name in SAMPLED if name != "gumbel_soft"]
SIMILARITIES = pytest.mark.parametrize("similarity", ["cosine", "dot"])
unit = functools.partial(F.normalize, dim=-1)
KNOWN = {"cosine": unit, "dot": torch.clone}  # vectors as a codebook compares them


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def distances(a, b):
    """(len(a), len(b)), by differences: torch.cdist multiplies out, and loses digits."""
    return (a[:, None] - b).norm(dim=-1)


# --- Gumbel noise ---

def test_gumbel_noise_has_the_moments_of_a_gumbel(monkeypatch):
    """Mean Euler's constant, variance pi^2 / 6, P(g <= 0) = 1 / e, never infinite, of x's shape and dtype."""
    g = gumbel_like(torch.zeros(400, 1000, dtype=torch.float64), seeded())
    assert g.shape == (400, 1000) and g.dtype == torch.float64 and g.isfinite().all()
    assert abs(g.mean().item() - 0.5772) < 0.008 and abs(g.var().item() - math.pi ** 2 / 6) < 0.02
    assert abs((g <= 0).double().mean().item() - math.exp(-1)) < 0.003
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert gumbel_like(torch.ones(3)).isfinite().all()


# --- choose ---

@pytest.mark.parametrize("scale, tau, noise, hardness", [
    (50, 1.5, 1.0, 2.0), (1, 1.7, 0.0, 1.0), (1, 1.4, 0.8, 0.3), (1, 1.2, 0.8, 0.0)])
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
    one_hot, noisy = F.one_hot(codes, 7).float(), estimator.startswith("gumbel")
    soft = torch.softmax((logits + gumbel if noisy else logits) / tau, -1)      # what the gradient goes through
    hard = algorithm_2(logits, one_hot, tau) if estimator == "reinmax" else one_hot + soft - soft.detach()
    part = 0.0 if estimator == "gumbel_soft" else min(1.0, hardness)
    expected = part * hard + (1 - part) * soft
    assert part < 1 or torch.equal(y, one_hot)
    close(y, expected)
    ours, wanted = (torch.autograd.grad((value * g).sum(), logits)[0] for value in (y, expected))
    close(ours, wanted, 1e-5)
    assert ours.sum(-1).abs().max() < 1e-5 and (scale > 1 or (ours.abs().sum(-1) > 1e-4).all())


@pytest.mark.parametrize("estimator, tau, said", [
    ("vq", 1.0, "must be one of gumbel_soft, gumbel_hard, straight_through, reinmax"), ("reinmax", 0.9, "not 0.9")])
def test_what_choose_refuses(estimator, tau, said):
    with pytest.raises(ValueError, match=said):
        choose(torch.zeros(3), estimator, tau)


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


@pytest.mark.parametrize("tau", [1.0, 1.3])
def test_reinmax_gradient_in_closed_form(tau):
    """2 J(p1) g - J(p0) g / 2; also what the published algorithm gives. Where softmax(l) is 0 in float32 it is 0."""
    logits, g = normal(50, 6, dtype=torch.float64).requires_grad_(), normal(50, 6, seed=1, dtype=torch.float64)
    one_hot = F.one_hot(choose(logits, "reinmax", tau, generator=seeded(2))[1], 6).double()
    p0, p1 = torch.softmax(logits, -1), (one_hot + torch.softmax(logits / tau, -1)) / 2
    expected = (2 * jacobian_product(p1, g) - jacobian_product(p0, g) / 2).detach()
    for out in (reinmax(logits, one_hot, tau), algorithm_2(logits, one_hot, tau)):
        close(out, one_hot, 1e-15)
        close(torch.autograd.grad((out * g).sum(), logits)[0], expected, 1e-12)
    logits = torch.tensor([[50.0 * tau, -100.0, -200.0], [1e4, 0.0, -1e4]]).requires_grad_()
    (reinmax(logits, torch.eye(3)[[0, 0]], tau) * normal(2, 3)).sum().backward()
    close(logits.grad, torch.zeros(2, 3))


A, M = normal(6, seed=3, dtype=torch.float64), normal(6, 6, seed=4, dtype=torch.float64)
FUNCTIONS = {"linear": lambda y: y @ A, "quadratic": lambda y: ((y @ M) * y).sum(-1) + y @ A,
             "cubic": lambda y: (y @ A) ** 3 + y @ A}


@pytest.mark.parametrize("name, exact", [("linear", ["reinmax", "straight_through"]), ("quadratic", ["reinmax"]),
                                         ("cubic", [])])
def test_reinmax_is_exact_up_to_the_second_degree(name, exact):
    """In the mean, at tau 1; straight-through on the linear function only."""
    for kind, tau in itertools.product(("reinmax", "straight_through"), (1.0, 1.5)):
        bias, _ = gradient_error(kind, FUNCTIONS[name], normal(6, seed=10), tau)
        assert bias < 1e-12 if tau == 1 and kind in exact else bias > 0.01


@pytest.mark.parametrize("kind, tau", [("gumbel_soft", 2.0), ("gumbel_hard", 0.125)])
def test_gradient_error_of_gumbel_agrees_with_its_own_draws(kind, tau):
    """On a linear function each draw's gradient is J(y) a / tau."""
    logits = normal(6, seed=10)
    rows = logits.double().expand(5000, 6)
    exact = jacobian_product(torch.softmax(logits.double(), 0), A)
    each = jacobian_product(torch.softmax((rows + gumbel_like(rows.clone(), seeded(1))) / tau, -1), A) / tau
    spread = (each - each.mean(0)).square().sum(1).mean().sqrt() / exact.norm()
    assert gradient_error(kind, FUNCTIONS["linear"], logits, tau, 5000, seeded(1)) == pytest.approx(
        (((each.mean(0) - exact).norm() / exact.norm()).item(), spread.item()), rel=1e-9)


# --- The rotation trick ---

def turned(g, x, value):
    """|value| / |x| R^T g of rows (M, D) one by one: R = exp(angle from x to value times the generator of their plane).
    """
    rows = []
    for one, a, b in zip(g.double(), x.double(), value.double()):
        u, v = a / a.norm(), b / b.norm()
        across = v - (u @ v) * u
        angle, across = torch.atan2(across.norm(), u @ v), across / across.norm()
        R = torch.matrix_exp(angle * (torch.outer(across, u) - torch.outer(u, across)))
        close(R @ a * b.norm() / a.norm(), b, 1e-9)
        rows.append(b.norm() / a.norm() * (R.T @ one))
    return torch.stack(rows).float()


def test_the_rotation_trick():
    """The value bit for bit, the gradient turned as the value is turned onto x; only scaled where they are parallel,
    reflected where they are opposite; nothing infinite at 0."""
    x, value, g = (2 * normal(20, 6)).requires_grad_(), normal(20, 6, seed=1), normal(20, 6, seed=2)
    out = rotated(value, x)
    assert torch.equal(out, value)
    close(torch.autograd.grad((out * g).sum(), x)[0], turned(g, x.detach(), value), 1e-5)
    for factor, wanted in ((3.0, 3 * g), (-3.0, 3 * (g - 2 * F.cosine_similarity(
            g, x)[:, None] * g.norm(dim=1, keepdim=True) * unit(x)))):
        close(torch.autograd.grad((rotated(factor * x, x) * g).sum(), x)[0], wanted.detach(), 1e-4)
    zero = torch.zeros(1, 6, requires_grad=True)
    assert torch.autograd.grad(rotated(value[:1], zero).sum(), zero)[0].isfinite().all()


# --- Codebooks ---

def codebook(kind=Codebook, size=16, width=8, **settings):
    torch.manual_seed(0)
    book = kind(size, width, **settings)
    with torch.no_grad():
        for part in book.modules():
            if isinstance(part, SimVQ):                      # which begins with the identity
                part.turn.copy_(normal(*part.turn.shape, seed=5) / part.turn.size(0) ** 0.5)
            elif type(part) is Codebook:
                part.init_weights()
    return book


def books(n=3, residual=True, size=16, width=6, kind=VQ, **settings):
    """Several, each with shorter codes than the one before, as of what is left."""
    found = codebook(functools.partial(Books, kind, n, residual), size, width, **settings)
    for i, book in enumerate(found.books):
        (book.frozen if kind is SimVQ else book.codes).mul_(0.5 ** i if residual else 1.0)
    return found


def test_cosine_logits_are_a_bounded_cosine():
    """scale x cos, 20 at first, never past 50, whatever the lengths of z and of the codes."""
    z, book = 30 * normal(5, 4, 8), codebook()
    cosine = F.cosine_similarity(z[:, :, None], book.codes[None, None], dim=-1)
    for scale, bound in ((None, 20), (49.0, 49.0), (51.0, 50.0)):
        if scale:
            book.log_scale.data.fill_(math.log(scale))
        close(book.logits(z), bound * cosine, 1e-4)


@SIMILARITIES
def test_codebook(similarity):
    """Codes of length 1 under cosine, under dot as they are, and logits z . e. Without an estimator the likeliest code,
    and no generator is asked; with one y and codes are those of `choose` on the logits with all its settings, and e is
    y @ table; z and codes learn."""
    book, z, before = codebook(similarity=similarity), (3 * normal(3, 4, 8)).requires_grad_(), torch.get_rng_state()
    with torch.no_grad():
        book.codes.mul_(torch.linspace(0.1, 5, 16)[:, None])
    close(book.table(), KNOWN[similarity](book.codes))
    close(book.norms(), book.codes.norm(dim=1))
    assert similarity == "cosine" or torch.equal(book.logits(z), z @ book.codes.T)
    found, how = book(z), dict(tau=1.5, noise=0.7, hardness=0.6)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(found.codes, book.logits(z).argmax(-1))
    close(found.e, book.table()[found.codes])
    assert found.y is None and found.loss == 0 and torch.equal(found.z, z)
    drawn = book(z, "gumbel_hard", generator=seeded(1), **how)
    y, codes = choose(book.logits(z), "gumbel_hard", generator=seeded(1), **how)
    assert torch.equal(drawn.codes, codes) and codes.shape == (3, 4) and drawn.loss == 0
    for one, other in ((drawn.y, y), (drawn.e, y @ book.table()), (found.logits, book.logits(z))):
        close(one, other)
    (drawn.e * normal(3, 4, 8, seed=1)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in (z, *book.parameters()))


@pytest.mark.parametrize("kind", ["Codebook", "VQ", "SimVQ", "Books", "LFQ", "FSQ"])
def test_codebooks_compute_in_float32_under_autocast(kind):
    """bfloat16 autocast and inputs change nothing: the choice among near codes needs the bits."""
    book = {"Codebook": codebook, "VQ": lambda: codebook(VQ), "SimVQ": lambda: codebook(SimVQ), "LFQ": lambda: LFQ(16),
            "Books": lambda: books(2, width=8, kind=SimVQ), "FSQ": lambda: FSQ(240)}[kind]().eval()
    z = normal(3, 4, {"FSQ": 3, "LFQ": 4}.get(kind, 8)).bfloat16()
    kind = type(book)
    for estimator in (None, "reinmax" if kind is Codebook else "vq"):
        expected = book(z.float(), estimator, generator=seeded())
        with torch.autocast("cpu", torch.bfloat16):
            found = book(z, estimator, generator=seeded())
            looked_up = book.look_up(found.codes)
        assert torch.equal(found.codes, expected.codes) and torch.equal(looked_up, book.look_up(found.codes))
        for name in ("e", "logits") if kind is Codebook else ("e",):
            assert getattr(found, name).dtype == torch.float32
            assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("init", ["normal", "uniform"])
@pytest.mark.parametrize("kind", [Codebook, VQ])
def test_codes_start_with_length_1(kind, init):
    """About 1 in the mean square for every init; a uniform one keeps within its bounds, and fills them."""
    book = codebook(kind, 400, 64, similarity="dot", init=init)
    assert abs(book.codes.square().sum(1).mean().item() - 1) < 0.02 and abs(book.codes.mean().item()) < 0.005
    largest = book.codes.abs().max().item() * 8
    assert 0.99 * math.sqrt(3) < largest < math.sqrt(3) + 1e-6 if init == "uniform" else largest > 3


def test_revive_takes_what_is_far_from_the_living():
    """With `least` only outputs that are so far from every living code, no more codes than there are of these."""
    book, dead = codebook(similarity="dot"), torch.arange(16) < 6
    living = book.table()[~dead].detach()
    z = torch.cat([living.repeat(40, 1), living[:4] + 3 * torch.eye(4, 8)])      # 4 rare ones
    assert book.revive(dead, z, seeded(1), least=1.0) == 4
    assert distances(z[-4:], book.codes[:4].detach()).min(1).values.max() < 1e-6
    assert torch.equal(book.table()[~dead], living) and book.revive(dead, living, seeded(1), least=1.0) == 0
    assert book.revive(torch.ones(16, dtype=torch.bool), z, seeded(1), least=1.0) == 16


@SIMILARITIES
@pytest.mark.parametrize("kind", [Codebook, VQ])
def test_put_and_revive_touch_only_the_dead(similarity, kind):
    """The dead become encoder outputs (unit vectors under cosine), drawn by the generator; the others stay the same."""
    dead, points, z, drawn = torch.zeros(16, dtype=torch.bool), 4 * normal(3, 8, seed=1), 4 * normal(200, 8, seed=2), []
    dead[[2, 5, 11]] = True
    before = codebook(kind, similarity=similarity).codes.detach().clone()
    for seed in (None, 1, 1, 2):
        book = codebook(kind, similarity=similarity)
        book.put(dead, points) if seed is None else book.revive(dead, z, seeded(seed))
        codes = book.codes.detach().clone()
        assert torch.equal(codes[~dead], before[~dead]) and torch.pdist(codes[dead]).min() > 1e-2
        assert distances(codes[dead], KNOWN[similarity](points if seed is None else z)).min(1).values.max() < 1e-6
        drawn.append(codes)
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[1], drawn[3])
    close(drawn[0][dead], KNOWN[similarity](points))
    assert book.revive(torch.zeros(16, dtype=torch.bool), z, seeded(1)) == 0 and torch.equal(book.codes, drawn[3])


@SIMILARITIES
@pytest.mark.parametrize("kind", [Codebook, VQ])
def test_fit_puts_codes_on_cluster_centres(similarity, kind):
    """Three far clusters, three codes: one on each centre, but where Lloyd's algorithm keeps a bad start. Under cosine
    a code is the mean of its unit vectors: a long one among short ones counts no more than they do."""
    centres, far = 5 * torch.eye(3, 8), []
    for seed in range(6):
        book = codebook(kind, 3, 8, similarity=similarity, init="kmeans")
        book.fit(centres.repeat_interleave(200, 0) + 0.1 * normal(600, 8), seeded(seed))
        far.append(distances(centres / (5 if similarity == "cosine" else 1), book.codes.detach()).amin(1).max().item())
    assert min(far) < 0.05
    if similarity == "cosine":
        z, book = normal(50, 8), codebook(kind, 1, 8, init="kmeans")
        book.fit(torch.logspace(-2, 2, 50)[:, None] * z, seeded())
        close(book.table()[0].detach(), unit(unit(z).mean(0)), 1e-5)


# --- kmeans ---

def test_kmeans_is_lloyds_algorithm():
    """Every centre is the mean of the points nearest to it once nothing moves any more; the generator decides."""
    points = normal(300, 2)
    centres = kmeans(points, 5, seeded(1), steps=100)
    nearest = distances(points, centres).argmin(1)
    close(centres, torch.stack([points[nearest == k].mean(0) for k in range(5)]), 1e-5)
    assert torch.equal(centres, kmeans(points, 5, seeded(1), steps=100))
    start = kmeans(points, 5, seeded(1), steps=0)
    assert distances(start, points).min(1).values.max() < 1e-6 and torch.pdist(start).min() > 0
    assert not torch.equal(start, kmeans(points, 5, seeded(2), steps=0))
    few, found = points[:3].bfloat16(), kmeans(points[:3].bfloat16(), 8, seeded())           # they repeat
    assert found.shape == (8, 2) and found.dtype == torch.float32
    assert max(distances(*pair).min(1).values.max() for pair in ((found, few.float()), (few.float(), found))) < 1e-6
    assert torch.equal(kmeans(torch.ones(10, 4), 3, seeded()), torch.ones(3, 4))             # two are empty


# --- VQ ---

@SIMILARITIES
def test_vq_takes_the_nearest_code(similarity):
    """By brute force over all distances, of unit vectors under cosine; training and evaluation choose alike."""
    book = codebook(VQ, 32, 6, similarity=similarity)
    book.codes.mul_(torch.linspace(0.3, 2, 32)[:, None])
    z, table = normal(5, 7, 6), book.table().clone()
    found, trained = book(z), book(z, "vq", generator=seeded(), tau=0.5, noise=1.0, hardness=1.0)
    choices.assert_best(found.codes, -(KNOWN[similarity](z)[:, :, None] - table).square().sum(-1))
    assert torch.equal(found.e, table[found.codes]) and torch.equal(book.look_up(found.codes), found.e)
    assert found.logits is None and found.y is None and found.loss == 0 and torch.equal(found.z, z)
    assert torch.equal(trained.codes, found.codes) and torch.equal(trained.e, found.e)


@pytest.mark.parametrize("similarity, commitment, rotation", [
    ("cosine", 0.25, False), ("dot", 2.0, False), ("cosine", 0.25, True), ("dot", 2.0, True)])
def test_vq_gradients(similarity, commitment, rotation):
    """Straight through to z, as if e were x, or turned. The commitment pulls z to e by its coefficient; codes are no
    parameters, and follow by running means instead."""
    book = codebook(VQ, similarity=similarity, commitment=commitment, rotation=rotation)
    z, g = (3 * normal(5, 7, 8, seed=2)).requires_grad_(), normal(5, 7, 8, seed=1)
    found, x = book(z, "vq"), KNOWN[similarity](z)
    pull = 2 * commitment * (x - found.e).detach() / 35
    assert found.loss.item() == pytest.approx(commitment * (x - found.e).square().sum(-1).mean().item(), rel=1e-5)
    past = turned(g.flatten(0, 1), *(part.detach().flatten(0, 1) for part in (x, found.e))).view(g.shape)
    for value, along in (((found.e * g).sum(), past if rotation else g), (found.loss, pull)):
        close(*(torch.autograd.grad(what, z, retain_graph=True)[0] for what in (value, (x * along).sum())), 1e-5)
    assert pull.abs().max() > 1e-3 and not book.codes.requires_grad and not list(book.parameters())
    assert set(book.state_dict()) == {"codes", "counts", "sums"}


@SIMILARITIES
def test_follow_is_the_formula(similarity):
    """N <- d N + (1 - d) n, m <- d m + (1 - d) sum of x, code = m / N; two updates, with the loops of the formula; x of
    length 1 under cosine."""
    book, decay = codebook(VQ, 5, 3, similarity=similarity, decay=0.9), 0.9
    counts, sums = [1.0] * 5, [row.clone() for row in book.codes]
    for seed in range(2):
        x, codes = normal(12, 3, seed=seed), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 4 * seed])
        book.follow(x, codes)
        for k in range(5):
            mine = [point for point, code in zip(KNOWN[similarity](x), codes) if code == k]
            counts[k] = decay * counts[k] + (1 - decay) * len(mine)
            sums[k] = decay * sums[k] + (1 - decay) * sum(mine, torch.zeros(3))
        close(book.counts, torch.tensor(counts))
        close(book.sums, torch.stack(sums))
        close(book.codes, torch.stack([m / n for m, n in zip(sums, counts)]))


@SIMILARITIES
def test_a_code_that_nothing_chooses_stays_where_it_is(similarity):
    """For ever: its mean of nothing must not shrink to the origin, which is nearest to much."""
    book, x = codebook(VQ, 4, 8, similarity=similarity), unit(normal(1000, 8))
    table = book.table().clone()
    for running in (book.counts, book.sums):                 # as after 1,500 steps
        running[1:] *= 0.95 ** 1500
    for _ in range(500):
        book.follow(x[:2], torch.zeros(2, dtype=torch.int64))
    close(book.table()[1:], table[1:], 1e-4)
    close(book.table()[0], KNOWN[similarity](x[:2].mean(0)), 1e-4)
    book.follow(x[2:4], torch.tensor([3, 3]))
    close(book.table()[3], KNOWN[similarity](x[2:4].mean(0)), 1e-3)


def test_revived_vq_codes_begin_anew():
    """Counts 1 and sums the code, so that it stays alive for a while; the others' means go on. So do fitted ones."""
    book, fitted, z = codebook(VQ), codebook(VQ, 3, init="kmeans"), normal(35, 8)
    book.follow(z, book(z, "vq").codes)
    fitted.follow(z, torch.zeros(35, dtype=torch.int64))
    before, dead = {name: value.clone() for name, value in book.state_dict().items()}, torch.arange(16) < 3
    book.revive(dead, z, seeded(1))
    fitted.fit(z, seeded())
    assert all(torch.equal(value[~dead], before[name][~dead]) for name, value in book.state_dict().items())
    for new, which in ((book, dead), (fitted, slice(None))):
        assert (new.counts[which] == 1).all() and torch.equal(new.sums[which], new.codes[which])


# --- SimVQ ---

@SIMILARITIES
def test_simvq(similarity):
    """The nearest of the frozen codes times the matrix; it begins as the identity. z has VQ's gradient; of the matrix
    that of the mean of (x - e)^2 alone, here of dot in closed form. What one code learns moves the others."""
    with torch.no_grad():
        book = SimVQ(16, 8, similarity)
        book.init_weights()
    close(book.codes, book.frozen)
    assert abs(SimVQ(400, 64).frozen.square().sum(1).mean().item() - 1) < 0.02
    book = codebook(SimVQ, similarity=similarity, commitment=0.5)
    z, g = (2 * normal(5, 7, 8, seed=2)).requires_grad_(), normal(5, 7, 8, seed=1)
    found, x, table = book(z, "simvq"), KNOWN[similarity](z).detach(), KNOWN[similarity](book.frozen @ book.turn)
    close(book.table(), table)
    close(book.norms(), (book.frozen @ book.turn).norm(dim=1))
    choices.assert_best(found.codes, -distances(x.flatten(0, 1), table.detach()).view(5, 7, 16))
    e = table.detach()[found.codes]
    close(found.e, e)
    assert torch.equal(book(z).codes, found.codes) and torch.equal(book(z).e, found.e) and found.logits is None
    assert found.loss.item() == pytest.approx(1.5 * (x - e).square().mean().item(), rel=1e-5)
    pull = torch.autograd.grad((KNOWN[similarity](z) * (x - e)).sum() / 280, z)[0]
    close(torch.autograd.grad(found.loss, z, retain_graph=True)[0], pull, 1e-5)  # 2 x 0.5
    copied, = torch.autograd.grad((found.e * g).sum(), z, retain_graph=True)
    close(copied, torch.autograd.grad((KNOWN[similarity](z) * g).sum(), z)[0], 1e-5)
    past = turned(g.flatten(0, 1), x.flatten(0, 1), e.flatten(0, 1)).view(g.shape)
    close(*(torch.autograd.grad((value * along).sum(), z)[0] for value, along in (
        (codebook(SimVQ, similarity=similarity, rotation=True)(z, "simvq").e, g), (KNOWN[similarity](z), past))), 1e-5)
    learned, = torch.autograd.grad((found.e * g).sum() + found.loss, book.turn)
    if similarity == "dot":
        close(learned, -2 / 280 * torch.einsum("bni,bnj->ij", book.frozen[found.codes], x - e), 1e-5)
    alone, before = book(z[:1, :1], "simvq"), book.codes.detach().clone()
    alone.loss.backward()
    with torch.no_grad():
        book.turn -= 0.1 * book.turn.grad
    assert (book.codes - before).norm(dim=1).min() > 1e-6
    assert set(book.state_dict()) == {"frozen", "turn"} and [*book.parameters()] == [book.turn]


# --- Several books ---

def test_residual_vq_by_hand():
    """Greedily, book after book, each the code nearest to what is left; e is the sum, and is looked up. Of the sum the
    gradient passes once; the commitment of each book is in the loss."""
    for similarity, rotation in itertools.product(("cosine", "dot"), (False, True)):
        several = books(similarity=similarity, commitment=0.5, rotation=rotation)
        z, g = normal(4, 5, 6, seed=2).requires_grad_(), normal(4, 5, 6, seed=1)
        found, x, loss = several(z, "vq"), KNOWN[similarity](z), 0.0
        rest, e = x.detach(), torch.zeros(4, 5, 6)
        for book, codes in zip(several.books, found.codes.view(4, 5, 3).unbind(-1)):
            table = book.codes if book is not several.books[0] else KNOWN[similarity](book.codes)
            choices.assert_best(codes, -distances(rest.flatten(0, 1), table).view(4, 5, 16))
            rest, e = rest - table[codes], e + table[codes]
            loss += 0.5 * rest.square().sum(-1).mean().item()
        close(found.e, e)
        assert found.codes.shape == (4, 15) and found.loss.item() == pytest.approx(loss, rel=1e-5)
        assert torch.equal(several(z).codes, found.codes) and several(z).loss == 0 and torch.equal(found.z, z)
        close(several.look_up(found.codes), e)
        close(several(z).e, e)
        past = turned(g.flatten(0, 1), x.detach().flatten(0, 1), e.flatten(0, 1)).view(g.shape) if rotation else g
        close(*(torch.autograd.grad(value.sum(), z, retain_graph=True)[0] for value in (found.e * g, x * past)), 1e-5)
        assert torch.autograd.grad(found.loss, z)[0].abs().max() > 1e-3
    several = books(kind=SimVQ)                              # what one book leaves teaches it nothing
    close(*(torch.autograd.grad(loss, several.books[0].turn)[0] for loss in (
        several(z, "simvq").loss, several.books[0](z, "simvq").loss)))


@pytest.mark.parametrize("kind, rotation", [(VQ, False), (VQ, True), (SimVQ, True)])
def test_multi_head_vq_is_one_for_each_part_of_the_width(kind, rotation):
    """Codes beside one another, vectors end to end, losses and gradients of each by itself."""
    several, z = books(2, False, kind=kind, rotation=rotation), normal(4, 5, 6, seed=2).requires_grad_()
    found, g = several(z, "vq"), normal(4, 5, 6, seed=1)
    alone = [book(part, "vq") for book, part in zip(several.books, z.split(3, -1))]
    assert torch.equal(found.codes, torch.stack([one.codes for one in alone], 2).flatten(1))
    assert torch.equal(found.e, torch.cat([one.e for one in alone], 2)) and found.loss == sum(one.loss for one in alone)
    assert torch.equal(several.look_up(found.codes), several(z).e) and several.norms().shape == (32,)
    learned = [z, *several.parameters()]
    for ours, wanted in zip(*(torch.autograd.grad(loss, learned) for loss in (
            (found.e * g).sum() + found.loss,
            sum((one.e * part).sum() + one.loss for one, part in zip(alone, g.split(3, -1)))))):
        close(ours, wanted)


@pytest.mark.parametrize("residual", [False, True])
def test_each_book_follows_and_revives_by_what_it_is_given(residual):
    """As a VQ of that alone: means of what chose its codes; the dead become some of it, after the books before; k-means
    centres. A step that changes the first book changes what the second is given from then on, not in this step."""
    z, n = normal(40, 6, seed=2), 2

    def given(several, i, codes=None):
        if not residual:
            return z.split(3, 1)[i]
        first = several.books[0]
        return unit(z) - i * first.look_up(first(z).codes if codes is None else codes[:, 0])
    before, several = books(n, residual), books(n, residual)
    found = several(z[None]).codes.view(40, n)
    several.follow(z, found.flatten())
    for i, (ours, alone) in enumerate(zip(several.books, before.books)):
        part = given(books(n, residual), i, found)
        alone.follow(part, found[:, i])
        for name in ("codes", "counts", "sums"):
            close(getattr(ours, name), getattr(alone, name))
    where, several, before = torch.arange(32) % 8 == 3, books(n, residual), books(n, residual)
    assert several.revive(where, z, seeded()) == 4
    for i, (ours, old, dead) in enumerate(zip(several.books, before.books, where.chunk(2))):
        assert torch.equal(ours.codes[~dead], old.codes[~dead]) and (ours.counts[dead] == 1).all()
        assert distances(ours.codes[dead], ours.scaled(given(several, i))).min(1).values.max() < 1e-6
    several = books(n, residual, size=3)
    several.fit(z, seeded())
    for i, book in enumerate(several.books):
        part = book.scaled(given(several, i))
        nearest = distances(part, kmeans(part, 3, seeded(), 200)).argmin(1)
        assert distances(book.codes, part).min(1).values.max() < 2 and len(nearest.unique()) == 3
    left = [(part - book(part).e).square().sum().item() for book, part in several.given(z)]
    assert not residual or left[1] < left[0]


# --- LFQ ---

def test_lfq_codes_are_signs():
    """A code's bits from the first channel on; every code has a value of its own and is found again; 0 is below."""
    book, every = LFQ(32), torch.arange(32)
    values = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)))
    assert torch.equal(book.look_up(every), values) and torch.equal(book.table, values) and not book.state_dict()
    found = book(0.3 * values[None])
    assert torch.equal(found.codes[0], every) and torch.equal(found.e[0], values) and found.loss == 0
    assert found.logits is None and book(torch.zeros(1, 1, 5)).codes.item() == 0 and not list(book.parameters())
    for size in (1, 0, 12, -4):
        with pytest.raises(ValueError, match=f"codebook_size {size} is no power of 2"):
            LFQ(size)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_lfq_entropies_by_hand(temperature):
    """q(k|z) is a product of signs, each with the odds exp(4 z / T): its entropy is the sum of theirs, and that of the
    mean is by all 16 codes. Straight through to z; commitment and certainty by their weights."""
    book = LFQ(16, commitment=0.5, certainty=0.3, temperature=temperature)
    z, g = (0.4 * normal(4, 5, 4)).requires_grad_(), normal(4, 5, 4, seed=1)
    found, odds = book(z, "lfq"), 4 * z.double() / temperature
    p = torch.sigmoid(odds)
    own = -(p * F.logsigmoid(odds) + (1 - p) * F.logsigmoid(-odds)).sum(-1)
    distance = (z - z.sign()).square().sum(-1).mean()
    wanted = 0.5 * distance + 0.3 * own.mean()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    close(*(torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (found.loss, wanted)), 1e-5)
    q = torch.stack([torch.where(signs > 0, p, 1 - p).prod(-1) for signs in book.table], -1).mean((0, 1))
    assert usage_kl(found.logits).item() == pytest.approx((math.log(16) + (q * q.log()).sum()).item(), rel=1e-4)
    assert torch.equal(found.e, book.look_up(found.codes)) and torch.equal(found.codes, book(z).codes)
    assert torch.equal(torch.autograd.grad((found.e * g).sum(), z)[0], g)


# --- FSQ ---

def test_fsq_levels():
    """All of them from 2 to 8, the largest first; what is no product of small numbers is an error that names it."""
    assert [fsq_levels(size) for size in (2, 6, 512, 240, 1000, 4096)] == [
        [2], [6], [8, 8, 8], [8, 6, 5], [8, 5, 5, 5], [8, 8, 8, 8]]
    assert fsq_levels(128) == [8, 4, 4] and fsq_levels(9) == [3, 3]  # two levels only where it must be, eight at most
    for size in (101, 22, 1, 0):
        with pytest.raises(ValueError, match=f"codebook_size {size} is no product"):
            fsq_levels(size)


@pytest.mark.parametrize("size", [6, 128, 240])
def test_fsq_codes_and_values_round_trip(size):
    """Every code has a value of its own, some z is encoded to each, and huge inputs give the outermost codes."""
    book, every = FSQ(size), torch.arange(size)
    width, values = len(book.levels), book.look_up(every)
    half = torch.div(book.levels, 2, rounding_mode="floor")
    digits = torch.tensor(list(itertools.product(*map(range, fsq_levels(size)))))
    assert torch.equal(values, (digits - half) / half) and values.min() == -1
    ladder = torch.linspace(-6, 6, 2001)
    steps = book(ladder[:, None].expand(-1, width)).e                            # (2001, width)
    z = ladder[(steps[:, None] - values).abs().argmin(0)][None]                  # (1, size, width)
    found = book(z)
    assert torch.equal(found.codes[0], every) and torch.equal(found.e[0], values)
    assert found.logits is None and found.y is None and found.loss == 0 and torch.equal(found.z, z)
    assert (book(torch.zeros(1, 1, width)).e == 0).all()
    found = book(torch.tensor([[[math.inf] * width, [-1e4] * width]]))
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


# --- KL ---

def test_kl_to_uniform_in_closed_form():
    """0 at uniform, ln K at one-hot, the enumerated sum elsewhere; a value per choice, whatever the batch."""
    assert kl_uniform(torch.full((3, 4, 7), 2.5)).abs().max() < 1e-6
    for sharp in (1e4, math.inf):
        close(kl_uniform(torch.where(torch.eye(7) > 0, 0.0, -sharp)), torch.full((7,), math.log(7)))
    logits = normal(5, 4, 7)
    p, found = torch.softmax(logits.double(), -1), kl_uniform(logits)
    close(found.double(), (p * (p / (1 / 7)).log()).sum(-1))
    assert kl_uniform(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("sharp", [1.0, 100.0, 1e4])
def test_gradients_of_the_parts_are_finite(sharp):
    """However sure the posterior is, also where whole columns of probabilities are 0 in float32."""
    logits = (sharp * normal(6, 3, 5)).requires_grad_()
    y = F.one_hot(logits.argmax(-1), 5)
    for value in (*decompose(logits, y).values(), kl_uniform(logits).sum(), usage_kl(logits)):
        grad = torch.autograd.grad(value, logits, retain_graph=True)[0]
        assert value.isfinite() and grad.isfinite().all()
        assert sharp > 1 or grad.abs().sum() > 1e-4


def draw(logits, seed=0):
    return F.one_hot(choose(logits, "straight_through", generator=seeded(seed))[1], logits.size(-1))


@pytest.mark.parametrize("B, N, K, sharp", [(1, 1, 2, 1), (4, 3, 5, 0.1), (16, 8, 32, 2)])
def test_the_parts_sum_to_the_kl(B, N, K, sharp):
    """KL = code_mi + DWKL = MI + TC + DWKL, and it is the mean of the codes' own KLs; MI is at most ln B."""
    logits = sharp * normal(B, N, K)
    parts, p = decompose(logits, draw(logits)), torch.softmax(logits.double(), -1)
    kl, q = parts["kl"].item(), p.mean(0)
    for same in (parts["code_mi"] + parts["dwkl"], parts["mi"] + parts["tc"] + parts["dwkl"],
                 (p * (p * K).log()).sum() / B, kl_uniform(logits).sum(1).mean()):
        assert kl == pytest.approx(same.item(), abs=1e-5, rel=1e-6)
    assert parts["dwkl"].item() == pytest.approx((q * (q * K).log()).sum().item(), abs=1e-5, rel=1e-5)
    assert parts["mi"] <= math.log(B) + 1e-5
    assert all(value.shape == () and value.dtype == torch.float32 for value in parts.values())


@pytest.mark.parametrize("seed, sharp", [(0, 1.0), (2, 4.0)])
def test_mi_and_tc_are_exact_in_expectation(seed, sharp):
    """All 9^4 draws of four inputs with two ternary codes, with their probabilities: the true MI and TC, by all 9
    values of z."""
    logits = sharp * normal(4, 2, 3, seed=seed)
    pairs = torch.eye(3)[torch.tensor(list(itertools.product(range(3), repeat=2)))]         # (9, 2, 3)
    which = torch.tensor(list(itertools.product(range(9), repeat=4)))                       # (9^4, 4)
    q = torch.softmax(logits.double(), -1)
    joint = (q[:, 0, :, None] * q[:, 1, None]).flatten(1)                                   # (4, 9)
    weights = joint[torch.arange(4), which].prod(1)
    parts = torch.vmap(decompose, in_dims=(None, 0))(logits, pairs[which])
    mixture, factors = joint.mean(0), torch.outer(*q.mean(0)).flatten()
    mi, tc = (joint * (joint / mixture).log()).sum(1).mean(), (mixture * (mixture / factors).log()).sum()
    assert tc > 0.01 and mi > 0.1
    for name, wanted in (("mi", mi), ("tc", tc)):
        assert (weights @ parts[name].double()).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_positive_clips_what_chance_made_negative():
    """MI below 0 by draws that other inputs would have made, TC below 0 by draws that are too good; else nothing."""
    logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()[:, None]
    for codes, negative in (([0, 1], "tc"), ([1, 0], "mi")):
        y = F.one_hot(torch.tensor(codes)[:, None], 2)
        parts, clipped = decompose(logits, y), decompose(logits, y, positive=True)
        assert parts[negative] < -0.1 and clipped[negative] == 0
        assert all(clipped[name] == parts[name] > 0 for name in parts if name not in (negative, "dwkl"))
    assert parts["mi"].item() == pytest.approx(math.log(0.1 / 0.5), abs=1e-5)


def test_usage_kl_asks_for_even_use_and_nothing_else():
    """0 where the mean is uniform, be the posteriors sure or vague; ln K where one code serves for everything; of all
    positions together, unlike DWKL."""
    for codes, nats in (([[0, 1], [2, 3]], 0), ([[3, 3], [3, 3]], math.log(4)), ([[0, 1], [0, 1]], math.log(2))):
        logits = 1e4 * F.one_hot(torch.tensor(codes), 4)
        assert usage_kl(logits).shape == () and usage_kl(logits).item() == pytest.approx(nats, abs=1e-6)
    logits = normal(4, 2, 8)
    p = torch.softmax(logits, -1).mean((0, 1))
    assert usage_kl(logits).item() == pytest.approx((p * (p * 8).log()).sum().item(), abs=1e-6)


# --- Monitors ---

def test_code_statistics_of_codes_made_by_hand():
    """Counts codes, not distinct values per bin: one code of eight is 1/8 in use, 7 dead, perplexity 1, no bits; bits
    are of each position, 1.5 and none in the third."""
    for codes, size, usage, dead, shares, bits in (
            (torch.full((5, 3), 6), 8, 1 / 8, 7, [1], 0),
            (torch.tensor([[0, 1]] * 4), 4, 0.5, 2, [0.5] * 2, 0),
            (torch.tensor([[0, 3], [1, 3], [2, 3], [2, 3]]), 4, 1, 0, [1 / 8, 1 / 8, 2 / 8, 4 / 8], 1.5),
            (torch.cartesian_prod(*[torch.arange(16)] * 3), 16, 1, 0, [1 / 16] * 16, 12)):
        found = code_statistics(codes, size)
        assert (found["usage"], found["dead_codes"]) == (usage, dead)
        assert found["perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
        assert found["code_bits"] == pytest.approx(bits, abs=1e-12)


def test_mutual_information_by_hand():
    """Equal: H. Independent: 0. A noisy channel: the sum written out. Sizes may differ and values be missing."""
    a, n4, n2 = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), math.log(4), math.log(2)
    noisy = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    for x, y, sizes, wanted in ((a, a, (4, 4), (n4, n4, n4)), (a, a // 2, (4, 9), (n2, n4, n2)),
                                (a, a % 1, (4, 1), (0, n4, 0)), (a, torch.arange(8) % 2, (5, 3), (0, n4, n2)),
                                (a // 2, torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]), (2, 2), (noisy, n2, n2))):
        assert mutual_information(x, y, *sizes) == pytest.approx(wanted, abs=1e-12)


def test_nmi_matrix_by_brute_force():
    """Every pair as `mutual_information` has it; symmetric; the floor is that of codes shuffled among the inputs."""
    codes = torch.randint(6, (49, 5), generator=seeded())
    codes[:, 1], codes[:, 2], codes[:, 3] = codes[:, 0], 3, (codes[:, 0] + 1) % 6   # the same; constant; renamed
    codes[:20, 4] = codes[:20, 0]                   # in part
    before, brute = torch.get_rng_state(), torch.zeros(5, 5, dtype=torch.float64)
    for i, j in itertools.product(range(5), repeat=2):
        information, h, k = mutual_information(codes[:, i], codes[:, j], 6, 6)
        brute[i, j] = information / math.sqrt(h * k) if h * k > 0 else 0
    found, floor = nmi_matrix(codes, seeded(1))
    close(found, brute)
    assert torch.equal(torch.get_rng_state(), before) and 0.2 < found[0, 4] < 0.9
    close(floor.diagonal(), torch.tensor([1, 1, 0, 1, 1], dtype=torch.float64))
    assert floor[2].abs().max() < 1e-6 and floor.min() >= 0 and floor[0, 1] < 0.4 and torch.equal(floor, floor.T)
    again, other = (nmi_matrix(codes, seeded(s))[1] for s in (1, 2))
    assert torch.equal(floor, again) and not torch.equal(floor, other)


def test_information_gap_in_numbers():
    """Best and gap are I / H(factor) of the first and the second position, by hand; one position has no second."""
    factor = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    codes, finer = torch.stack([factor // 2, torch.zeros(8, dtype=torch.int64), factor], 1), torch.arange(8)[:, None]
    for some, wanted in ((codes, (1, 0.5)), (codes[:, :1], (0.5, 0.5)), (codes[:, [2, 2]], (1, 0)), (finer, (1, 1))):
        assert information_gaps(some, 8, {"f": factor}, seeded())["f"][:2] == pytest.approx(wanted)
    assert 0 < information_gaps(codes, 4, {"f": factor}, seeded())["f"][2] < 1


def test_undefined_and_constant_factors():
    """Inputs with -1 do not count; a factor that does not vary, or is nowhere defined, is left out."""
    codes = torch.randint(4, (600, 2), generator=seeded())
    even = torch.arange(600) % 2 == 0
    partly = torch.where(even, codes[:, 0], -1)
    codes[~even] = torch.randint(4, (300, 2), generator=seeded(1))
    found = information_gaps(codes, 4, {"partly": partly, "constant": torch.where(even, 2, -1), "never": torch.full(
        (600,), -1), "once": torch.arange(600) - 599}, seeded(2))
    assert list(found) == ["partly"]
    assert found["partly"] == information_gaps(codes[even], 4, {"partly": partly[even]}, seeded(2))["partly"]
    assert found["partly"][0] == pytest.approx(1) and 0 < found["partly"][2] < 0.1


def test_tables(in_process, monkeypatch):
    """ReinMax is without bias on the first two functions; with the own input left out TC goes below 0."""
    monkeypatch.setattr(discrete, "gradient_error", lambda *given, **how: gradient_error(*given, draws=100, **how))
    monkeypatch.setattr(discrete, "range", lambda draws: range(3), raising=False)
    gradients, parts = ([[cell.strip() for cell in line.strip("|").split("|")] for line in in_process(
        discrete, which)[1].splitlines() if line.startswith("|")][2:] for which in ("gradients", "decomposition"))
    bias = {(row[0], row[1]): [float(cell.split(",")[0]) for cell in row[2:]] for row in gradients}
    assert len(bias) == 10 and bias["reinmax", "1"][:2] == [0, 0] and bias["reinmax", "1"][2] > 0.1
    for row in parts:
        code_mi, mi, tc, residual, left_out = (float(cell.split()[0]) for cell in row[1:])
        assert abs(residual) < 1e-4 * code_mi and left_out < tc and code_mi == pytest.approx(mi + tc, rel=2e-3)
    assert len(parts) == 3 and float(parts[0][5].split()[0]) < 0 and float(parts[2][5].split()[0]) < -10
    assert in_process(discrete, "gradient") == (2, "", "error: which table? gradients or decomposition\n")
