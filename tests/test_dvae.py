"""train_dvae.py and models/dvae.py: schedules, codes of the shape, places, padding and masks change nothing, nats and
losses by hand, figures by hand, pictures, grids and codes of files."""
import functools
import json
import math
import random
import struct
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.arc import OUTSIDE, PALETTE, Canvas, Grids
from model import parameter_roles
from models import dvae
from models.discrete import FIXED, SAMPLED, Quantised, decompose, kl_uniform, rotated, usage_kl
from models.dvae import DVAE, Attention, relations, tiles
from nanolab import settings as flags
from nanolab.codes import grids_of, picture, print_codes, print_grids, read_file
from nanolab.optim import factor
from nanolab.run import UserError, override
from test_scripts import fresh

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(max_side=5, n_codes=6, codebook_size=16, code_dim=8, n_head=2, n_embd=16, cell_dim=8)
LAYOUTS = ["grid", "canvas"]
LAID = pytest.mark.parametrize("layout, height, width", [("grid", 2, 1), ("grid", 3, 2), ("canvas", 1, 1),
                                                         ("canvas", 2, 2)])
read_settings = functools.cache(flags._read_settings)  # a pure function, and most of what `configured` takes


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    monkeypatch.setattr(flags, "_read_settings", lambda path: dict(read_settings(str(path))))


def configured(*words, **settings):
    """(the script's globals, the model's configuration), small but for `words` and settings."""
    g, (tiny, more) = fresh("train_dvae.py"), ([f"--{name}={value}" for name, value in some.items()]
                                               for some in (TINY, settings))
    return g, g["check"](override(g, [*tiny, *words, *more]))


def built(*words, **settings):
    """(the script's globals, a model, untrained, grids of all shapes), small but for `words` and settings."""
    g, config = configured(*words, **settings)
    torch.manual_seed(0)
    return g, DVAE(config), of_shapes(all_shapes(config.canvas.max_side), config.canvas.max_side)


def of_shapes(shapes, side):
    """A Grids of random cells; its tokens beside."""
    shapes = torch.as_tensor(shapes)
    cells = torch.randint(10, (len(shapes), side, side), generator=torch.Generator().manual_seed(0))
    cells[~within(shapes, side)] = OUTSIDE
    grids = Grids(cells.to(torch.uint8), shapes, ["some"] * len(shapes), torch.empty(0, 2, dtype=torch.int64), {}, [])
    grids.tokens = Canvas(side).tokens(grids.cells)
    return grids


def within(shapes, side):
    place = torch.arange(side)
    return (place[:, None] < shapes[:, 0, None, None]) & (place < shapes[:, 1, None, None])


def all_shapes(side):
    return torch.cartesian_prod(*[torch.arange(1, side + 1)] * 2)


def some_codes(model, n, seed=0):
    """Learned codes (n, n_latents) at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.codebook_size, (n, model.config.n_latents), generator=generator)


# --- Schedules and settings ---

def test_ramp_is_half_a_cosine():
    """The tables of DALL-E's KL weight and rate at each quarter, constant after; or a line."""
    ramp = fresh("train_dvae.py")["ramp"]
    for first, last, at_quarters in (
            (0.0, 6.6, (0, 0.966548, 3.3, 5.633452, 6.6, 6.6)),
            (1e-4, 1.25e-6, (1e-4, 8.553835e-5, 5.0625e-5, 1.571160e-5, 1.25e-6, 1.25e-6))):
        assert [ramp(10 * i, 40, first, last) for i in (0, 1, 2, 3, 4, 9)] == pytest.approx(at_quarters, rel=2e-6)
    assert [ramp(i, 8, 1.0, 5.0, "linear") for i in (0, 2, 6, 9)] == [1, 2, 4, 5] and ramp(0, 0, 1.0, 5.0) == 5


def test_schedules_are_functions_of_the_step_alone():
    """Shares are of schedule_steps, whatever max_steps is; a flag wins."""
    words = dict(kl_weight="0,2", usage_weight="1,0.5", weight_fraction=0.5, mask_rate="0.4,0.2", mask_fraction=1.0,
                 tau_start=3.5, tau_end=0.5, tau_fraction=0.5, noise_fraction=0.0, noise_last=0.3, hard_at=0.25,
                 schedule_steps=100, estimator="gumbel_hard")
    g, _ = configured(**words, max_steps=70)
    other, _ = configured(**words, max_steps="none", schedule="constant")
    assert [g["scheduled"](step) for step in range(0, 120, 5)] == [
        other["scheduled"](step) for step in range(115, -1, -5)][::-1]
    assert g["scheduled"](25) == pytest.approx(dict(
        kl_weight=1.0, mi_weight=0.0, tc_weight=0.0, dwkl_weight=0.0, usage_weight=0.75,
        mask_rate=0.4 - 0.2 * (1 - math.sqrt(0.5)) / 2, tau=2.0, noise=0.3, hardness=1.0))
    assert g["scheduled"](24)["hardness"] == 0 and g["scheduled"](50)["kl_weight"] == 2
    assert "tau" not in configured(estimator="vq")[0]["scheduled"](25)      # without chance


@pytest.mark.parametrize("estimator, taus, hardness", [
    ("gumbel_soft", (1, 0.53125, 1 / 16, 1 / 16), (1, 1, 1, 1)), ("reinmax", (1, 1, 1, 1), (0, 0, 1, 1)),
    ("gumbel_hard", (1, 0.53125, 1 / 16, 1 / 16), (0, 0, 1, 1))])
def test_an_estimators_own_schedules(estimator, taus, hardness):
    """Gumbel's tau falls to 1/16 and the others' stays; noise grows; codes are hard from 0.3 on, but soft ones."""
    g, _ = configured(estimator=estimator, max_steps=1000)
    now = [g["scheduled"](step) for step in (0, 200, 400, 2000)]
    assert [row["tau"] for row in now] == pytest.approx(taus) and [row["hardness"] for row in now] == list(hardness)
    assert [row["noise"] for row in now] == pytest.approx([0, 0.8, 1, 1])
    assert hardness[0] or [g["scheduled"](step)["hardness"] for step in (299, 300)] == [0, 1]


def test_dalles_own_schedules():
    """Appendix A.2: shares of 3,000,000 updates, the rate's over all of them; from the first one on all the noise."""
    g, _ = configured("--preset=dalle")
    for updates, tau, weight in ((0, 1, 0), (2500, 0.99936, 3.3), (5000, 0.99743, 6.6), (75_000, 0.53125, 6.6),
                                 (150_000, 1 / 16, 6.6), (3_000_000, 1 / 16, 6.6)):
        assert g["scheduled"](updates / 3000) == pytest.approx(dict(
            kl_weight=weight, mi_weight=0, tc_weight=0, dwkl_weight=0, usage_weight=0, mask_rate=0, tau=tau, noise=1,
            hardness=1), abs=1e-5)
    assert [g["lr"] * factor(g, step) for step in (0, 1000)] == pytest.approx([1e-4, 1.25e-6], rel=1e-3)


@pytest.mark.parametrize("settings, said", [
    (dict(ff_mult=0.001), "no feed-forward width"), (dict(code_dim=1, estimator="vq"), "code_dim 1: .* no gradient"),
    (dict(estimator="reinmax", tau_end=0.5), "reinmax needs at least 1"),
    (dict(estimator="reinmax", tau_start=0.9), "reinmax needs at least 1"),
    (dict(estimator="vq", kl_weight="0,0.1"), "vq has no posterior"),
    (dict(estimator="fsq", dwkl_weight="0.1,0"), "fsq has no posterior"),
    (dict(estimator="vq", kl_target=9.0), "kl_target"), (dict(estimator="fsq", codebook_bound=0.1), "by gradients"),
    (dict(max_steps="none", schedule="constant"), "give schedule_steps"),
    (dict(n_codes=2), "none is left for the cells"), (dict(estimator="lfq", codebook_size=12), "no power of 2"),
    (dict(estimator="lfq", kl_weight="0.1,0"), "lfq has no posterior"),
    (dict(estimator="vq", vq_levels=3), "the other 4 are no multiple of 3 .* take 5"),
    (dict(estimator="vq", vq_levels=2, vq_heads=2), "one of the two must be 1"),
    (dict(estimator="simvq", vq_heads=3, code_dim=8), "vq_heads 3 does not divide code_dim 8"),
    (dict(estimator="vq", vq_heads=4, code_dim=4), "code_dim 4: on a line .* take code_dim 8")])
def test_settings_that_cannot_go_together(settings, said):
    with pytest.raises(UserError, match=said):
        configured(**settings)


# --- Ids and shapes ---

@pytest.mark.parametrize("max_side, size, n, layout", [
    (30, 2, 10, "grid"), (1, 2, 0, "grid"), (3, 9, 1, "grid"), (3, 8, 2, "grid"), (3, 8, 0, "canvas")])
def test_codes_of_the_shape(max_side, size, n, layout):
    """As many as all shapes need; read finds what with_shape writes; a number too large is the last shape."""
    _, model, grids = built(max_side=max_side, codebook_size=size, n_codes=n + 1, layout=layout)
    learned = some_codes(model, len(grids))
    codes = model.with_shape(learned, grids.shapes)
    assert model.config.n_shape_codes == n and codes.shape == (len(grids), n + 1) and torch.equal(codes[:, n:], learned)
    assert 0 <= codes.min() <= codes.max() < size
    if layout == "grid":
        e, found = model.read(codes)
        assert torch.equal(found, grids.shapes) and torch.equal(e, model.codebook.look_up(learned))
        assert model.read(torch.full((1, n + 1), size - 1))[1].tolist() == [[max_side, max_side]]


def test_codes_of_several_books():
    """A place of two codes is one latent; read finds the vectors of encode's codes; numbers of the second book follow
    on those of the first."""
    for settings, width in ((dict(vq_levels=2), 8), (dict(vq_heads=2), 4)):
        _, model, grids = built(estimator="vq", **settings)
        found = model.codebook(model.encode(grids.tokens, grids.shapes))
        assert model.config.n_latents == 2 and found.codes.shape == (25, 4) and found.e.shape == (25, 2, 8)
        assert [book.codes.shape for book in model.codebook.books] == [(16, width)] * 2
        torch.testing.assert_close(model.read(model.with_shape(found.codes, grids.shapes))[0], found.e)
        assert torch.equal(model.numbered(found.codes), found.codes + torch.tensor([0, 16, 0, 16]))
    codes = some_codes(built()[1], 3)
    assert built()[1].numbered(codes) is codes
    for estimator in ("vq", "simvq"):
        assert built("--rotation_trick", estimator=estimator)[1].codebook.past is rotated


@pytest.mark.parametrize("estimator, words", [("vq", []), ("vq", ["--vq_levels=2"]), *((name, []) for name in FIXED)])
def test_dead_codes_are_those_of_their_book(estimator, words):
    """Counted until the interval is over; then those that nothing chose move and no others; none of books that are
    fixed."""
    g, model, grids = built(*words, estimator=estimator, reset_interval=2, reset_fraction=1.0)
    found, n = model.codebook(model.encode(grids.tokens, grids.shapes)), model.config.n_books
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loop = dict(step=1, seconds=0.0, chosen=torch.zeros(16 * n, dtype=torch.int64))
    numbers = (found.codes.view(-1, n) + 16 * torch.arange(n)).flatten()
    for loop["step"] in (1, 2):
        g["revive"](model, loop, found.z.flatten(0, 1), found.codes.flatten(), torch.Generator().manual_seed(0))
        assert loop["step"] == 2 or torch.equal(loop["chosen"], numbers.bincount(minlength=16 * n))
    assert loop["chosen"].any() == ("revived" not in loop) == (estimator != "vq")
    if estimator != "vq":
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    names = ["codebook.codes"] if n == 1 else [f"codebook.books.{i}.codes" for i in range(n)]
    moved = torch.cat([(model.state_dict()[name] != before[name]).any(1) for name in names])
    dead = torch.ones(16 * n, dtype=torch.bool).index_fill(0, numbers, False)
    assert torch.equal(moved, dead) and loop["revived"] == dead.sum() > 0


def test_map_of_codes():
    """Learned codes in the order of reading, about a square; what is left of the last row is -1."""
    model = SimpleNamespace(config=SimpleNamespace(n_shape_codes=2))
    for n, rows, columns in ((1, 1, 1), (2, 1, 2), (7, 3, 3), (12, 3, 4)):
        found = DVAE.code_map(model, torch.arange(2 * n + 4).view(2, -1))
        assert found.shape == (2, rows, columns)
        for first, codes in zip((2, n + 4), found.flatten(1).tolist()):
            assert codes == [*range(first, first + n), *[-1] * (rows * columns - n)]


# --- Places ---

@pytest.mark.parametrize("n", [1, 20, 90])
def test_latents_stand_on_tiles(n):
    """Of the smallest size of which there are at most 1.05 n; evenly, in the order of reading, inside the grid."""
    _, model, grids = built(max_side=9, n_codes=n + 2)
    places, tile, features = model.latent_places(grids.shapes)
    assert tiles(5, 4) == [(3, 3), (3, 2), (2, 2), (2, 1), (1, 1)] and tiles(5, 25) == tiles(1, 1) == [(1, 1)]
    assert features.shape == (81, n, 64) and len(features.flatten(1).unique(dim=0)) == 81
    more = 0
    for (height, width), here, size in zip(grids.shapes.tolist(), places.tolist(), tile[:, 0].tolist()):
        counts = {size: -(-height // size[0]) * -(-width // size[1]) for size in tiles(9, n)}
        rows, columns = min((size for size in counts if counts[size] <= 1.05 * n), key=math.prod)
        count, across, wanted = counts[rows, columns], -(-width // columns), []
        for i in range(n):
            at = (i + 0.5) / n * count
            part = at % 1 if count <= n else 0.5
            wanted.append([min((int(at) // across + part) * rows, height - 0.5),
                           min((int(at) % across + 0.5) * columns, width - 0.5)])
        assert size == [rows, columns] and here == [pytest.approx(place, abs=1e-4) for place in wanted]
        more += count > n
    assert (more > 0) == (n == 20)


def test_what_attention_is_told_of_places():
    """Squared distance, in units of the scale, and its parts; a head's first bias is -d^2 times its slope."""
    queries, keys = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 2.0], [4.0, 0.0], [0.0, 2.8]]])
    told = relations(queries, keys, torch.tensor([[[1.0, 2.0]]]))[0, 0]
    torch.testing.assert_close(told, torch.tensor([
        [0, 0, 0, 0, 0, 0, 1, 1], [10, 4, 3, 1, -2, 1, 0, 0], [1.16, 1.16, 1, 0.4, 1, -0.4, 0, 1]]))
    first, none = ([layer.distance for layer in built(*words, n_head=4)[1].modules() if isinstance(layer, Attention)]
                   for words in ([], ["--no-distance_bias"]))
    assert all(bias[0].tolist() == [-0.5, -0.25, -0.125, 0] and not bias[1:].any() for bias in first)
    assert len(none) == len(first) == 6 and not any(bias.any() for bias in none)


# --- Padding and masks ---

@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_embedding_of_pad_is_never_read(layout):
    """Bit for bit, forward and in every gradient, be it NaN; its own is zero."""
    (_, model, grids), found = built(layout=layout, patch_width=2), []
    for value in (0.5, math.nan):
        model.cell.data[model.config.canvas.pad] = value
        model.zero_grad()
        z = model.encode(grids.tokens, grids.shapes)
        z.square().sum().backward()
        found.append((z, model.cell.grad, model.into.weight.grad))
    assert all(map(torch.equal, *found)) and found[0][1].any() and not found[0][1][model.config.canvas.pad].any()


@pytest.fixture
def in_float64(monkeypatch):
    """All of the model in float64, also its softmax."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


@LAID
def test_extra_padding_and_the_rest_of_the_batch_change_nothing(layout, height, width, in_float64, monkeypatch):
    """A grid alone, and with larger ones: 1e-12 in float64 (in float32 matrices of another length round otherwise).
    All shapes, so more latents than cells, than patches, and fewer."""
    _, model, grids = built(layout=layout, patch_height=height, patch_width=width)
    e = model.codebook.look_up(some_codes(model, 25)).double()

    def found(some):
        tokens, shapes = grids.tokens[some], grids.shapes[some]
        return model.encode(tokens, shapes), model.nats(e[some], tokens, shapes)[0], model.write(e[some], shapes)
    together = found(slice(None))
    for i in range(0, 25, 3):
        monkeypatch.setattr(dvae, "readable", lambda x: i % 2 == 1)          # else all patches of the canvas
        for alone, among in zip(found(slice(i, i + 1)), together):
            torch.testing.assert_close(alone, among[i:i + 1], atol=1e-12, rtol=1e-12)


@LAID
def test_only_patches_of_the_grid_and_its_row_ends_are_read(layout, height, width):
    """Colours that stand elsewhere on the canvas change no bit; each cell and each row end changes the latents."""
    _, model, _ = built(layout=layout, patch_height=height, patch_width=width)
    grids = of_shapes([[1, 1], [2, 3], [3, 2], [4, 4], [1, 5], [5, 1], [3, 3]], 5)
    row, column = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    rows, columns = grids.shapes[:, 0, None, None], grids.shapes[:, 1, None, None]
    read = (row // height * height < rows) & (column // width * width < columns + 1)  # where a place's patch begins
    z = model.encode(grids.tokens, grids.shapes)
    assert (~read).any() and torch.equal(model.encode(grids.tokens.masked_fill(~read, 3), grids.shapes), z)
    for i, j in zip(*((row < rows) & (column < columns + 1)).any(0).nonzero().T.tolist()):
        changed = grids.tokens.clone()
        changed[:, i, j] = (changed[:, i, j] + 1) % 10
        assert torch.equal((model.encode(changed, grids.shapes) != z).flatten(1).any(1), read[:, i, j])


def test_masked_tokens_are_a_share_and_carry_no_information():
    """About `rate` of cells and row ends, never PAD. Grids that differ only there have equal latents, bit for bit, and
    what was there has no gradient."""
    g, model, _ = built(mask_rate="0.5,0.5")
    canvas, grids = model.config.canvas, of_shapes(all_shapes(5).repeat(8, 1), 5)
    tokens, counted = grids.tokens.where(grids.tokens != 9, 8), grids.tokens != model.config.canvas.pad
    for rate in (0.0, 0.8, 0.5):
        seen, share = g["masked"](tokens, canvas, rate, torch.Generator().manual_seed(1))
        hidden = seen == canvas.mask
        assert torch.equal(seen, tokens.masked_fill(hidden, canvas.mask)) and not (hidden & ~counted).any()
        assert share.item() == pytest.approx(hidden.sum().item() / counted.sum().item())
        assert share.item() == pytest.approx(rate, abs=0.03) and (tokens[hidden] == canvas.eos).any() == (rate > 0)
    others = torch.where(hidden & (tokens < 10), 9, tokens)
    again, _ = g["masked"](others, canvas, 0.5, torch.Generator().manual_seed(1))
    z = model.encode(again, grids.shapes)
    assert not torch.equal(tokens, others) and torch.equal(z, model.encode(seen, grids.shapes))
    z.square().sum().backward()
    assert not model.cell.grad[9].any() and all(model.cell.grad[i].any() for i in (0, 7, canvas.eos, canvas.mask))


# --- Reading and writing ---

def by_hand(model, e, shapes):
    """Log-probabilities (B, S, S, outputs) float64; NaN where nothing is said."""
    c, S = model.config, model.config.canvas.max_side
    logits, index, padding = model.decode(e, shapes)
    found = torch.full((len(e), S, S, logits.size(-1)), math.nan, dtype=torch.float64)
    for b, p in (~padding).nonzero().tolist():
        patch = index[b, p].item()
        for k in range(c.patch_height * c.patch_width):
            i = patch // model.columns * c.patch_height + k // c.patch_width
            j = patch % model.columns * c.patch_width + k % c.patch_width
            if i < S and j < S:
                assert found[b, i, j].isnan().all()          # said once
                found[b, i, j] = F.log_softmax(logits[b, p, k].double(), -1)
    return found


@LAID
def test_nats_are_a_cross_entropy_by_hand_and_agree_with_what_is_written(layout, height, width):
    """All shapes, on a side that patches do not divide: only cells count, or with layout canvas each place of it;
    `right` where `write` gives the very canvas, also with one cell changed."""
    _, model, grids = built(layout=layout, patch_height=height, patch_width=width)
    shapes, e = grids.shapes, model.codebook.look_up(some_codes(model, 25, seed=3))
    written, said = model.write(e, shapes), by_hand(model, e, shapes)
    counted = within(shapes, 5) if layout == "grid" else torch.ones(25, 5, 5, dtype=torch.bool)
    assert torch.equal(written[counted], said[counted].argmax(-1))
    assert layout == "canvas" or torch.equal(Canvas(5).shapes(written), shapes)  # the rest follows from the shape
    changed = written.clone()
    for b, (i, j) in enumerate((shapes - 1).tolist()):
        changed[b, i, j] = (changed[b, i, j] + 1) % 10
    for tokens in (written, changed, grids.tokens):
        nats, right = model.nats(e, tokens, shapes)
        assert torch.equal(right, (written == tokens).flatten(1).all(1))
        logs = said.nan_to_num().gather(3, tokens.clamp(max=said.size(3) - 1)[..., None])[..., 0]
        torch.testing.assert_close(nats.double(), -(logs * counted).sum((1, 2)), atol=1e-4, rtol=1e-5)


# --- Losses ---

EVERYTHING = dict(kl_weight="0.1,0.1", mi_weight="0.1,0.1", tc_weight="0.1,0.1", dwkl_weight="0.1,0.1")


def one_batch(g, model, grids):
    """[found, tokens, shapes, now, cells per grid] of a batch, as the loop has them."""
    now = g["scheduled"](10_000)
    how = {name: now[name] for name in ("tau", "noise", "hardness") if name in now}
    found = model.codebook(model.encode(grids.tokens, grids.shapes), g["estimator"],
                           generator=torch.Generator().manual_seed(0), **how)
    return [found, grids.tokens, grids.shapes, now, grids.shapes.prod(1).float().mean()]


VARIANTS = ["--no-resample", "--output_positions --no-distance_bias", "--no-bias", "--similarity dot", "--norm rms "
            "--no-norm_gain", "", "--patch_height 1", "--code_dim 1 --similarity dot", "--codebook_size 2 --n_codes 8",
            "--encoder_layers 2 --latent_layers 2 --n_head 16", "--decoder_layers 2 --mask_rate 0.5,0.5",
            "--activation swiglu", "--init zero", "--estimator simvq --rotation_trick", "--estimator lfq",
            "--estimator vq --vq_levels 2", "--estimator simvq --vq_heads 2"]


@pytest.mark.parametrize("layout, estimator, words", [
    (LAYOUTS[i // 6 % 2], words.split()[1] if "--estimator" in words else (*SAMPLED, "vq", "fsq")[i % 6], words)
    for i, words in enumerate(VARIANTS)])
def test_every_parameter_has_a_role_and_a_gradient(layout, estimator, words):
    """One that is not rounding: 1e-7 of the longest at least, where the least that was found is 4e-6 and rounding is
    1e-9. From weights that are not 0, as `init zero` has them."""
    drawn = EVERYTHING | dict(codebook_bound=0.1) if estimator in SAMPLED else {}
    g, model, grids = built(*words.split(), layout=layout, estimator=estimator, **drawn)
    assert parameter_roles(model).keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    g["objective"](model, *one_batch(g, model, grids))[0].backward()
    lengths = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert {name for name, length in lengths.items() if not length > 1e-7 * max(lengths.values())} == set()


def test_the_loss_is_a_sum_of_weights_times_parts():
    """Nats per grid; usage once for each learned code; divided by the mean of cells, or each grid by its own."""
    g, model, grids = built(**EVERYTHING, loss_scale="grid", usage_weight="0,0")
    found, tokens, shapes, now, mean_cells = one_batch(g, model, grids)
    none = now | {name: 0.0 for name in now if name.endswith("weight")}

    def objective(now):
        return g["objective"](model, found, tokens, shapes, now, mean_cells)
    (loss, parts), each = objective(none), model.nats(found.e, tokens, shapes)[0]
    nats = each.mean()
    assert torch.equal(loss, nats) and parts.keys() == {"nats", "exact", "loss", "kl"} and parts["nats"] == nats
    assert parts["loss"].item() == pytest.approx(nats.item() / 9)
    assert parts["kl"].item() == pytest.approx(kl_uniform(found.logits).sum(1).mean().item())
    truth = decompose(found.logits, found.y) | {"usage": model.config.n_latents * usage_kl(found.logits)}
    for name in ("kl", "mi", "tc", "dwkl", "usage"):
        more = objective(none | {f"{name}_weight": 2.0})[0] - loss
        assert more.item() == pytest.approx(2 * truth[name].item(), abs=2e-4)
        ours, wanted = (torch.autograd.grad(term, model.to_code.weight, retain_graph=True)[0] for term in (
            more, 2 * truth[name]))
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-3)
    terms = 0.3 * truth["kl"] + sum(0.1 * truth[name] for name in ("mi", "tc", "dwkl"))
    for g["loss_scale"], wanted in (("grid", nats + terms), ("token", (nats + terms) / 9),
                                    ("even", terms / 9 + (each / shapes.prod(1)).mean())):
        torch.testing.assert_close(objective(now | {"kl_weight": 0.3})[0], wanted)


def test_commitment_and_bound_and_positive_parts_are_in_the_loss():
    """The bound: the codes' squared distances from length 1, here 1 and 9."""
    g, model, grids = built(estimator="vq", loss_scale="grid")
    found, *batch = one_batch(g, model, grids)
    loss, parts = g["objective"](model, found, *batch)
    assert parts.keys() == {"nats", "exact", "loss", "commitment"} and parts["commitment"] == found.loss > 0
    assert (loss - parts["nats"]).item() == pytest.approx(4 * found.loss.item(), rel=1e-3)
    g, model, grids = built(loss_scale="grid", codebook_bound=3.0, usage_weight="0,0")
    model.codebook.codes.data = F.normalize(model.codebook.codes.data) * torch.tensor([2.0, 4.0] * 8)[:, None]
    found, *batch, now, mean_cells = one_batch(g, model, grids)
    loss, parts = g["objective"](model, found, *batch, now, mean_cells)
    assert (loss - parts["nats"]).item() == pytest.approx(3 * (1 + 9) / 2, rel=1e-3)
    likely = F.one_hot(torch.arange(25)[:, None].expand(25, 4) % 2, 16)
    swapped = Quantised(found.e, found.codes, 3.0 * likely, likely.roll(1, 0))   # draws of what is not likely
    for g["positive_parts"] in (False, True):
        _, parts = g["objective"](model, swapped, *batch, now | {"mi_weight": 1.0}, mean_cells)
        assert (min(parts["mi"], parts["tc"]) >= 0) == g["positive_parts"]


def test_the_loss_is_float32_under_autocast():
    """bfloat16 inside, float32 for the codes and the reconstruction; near the loss without autocast."""
    (g, model, grids), found = built(), []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            batch = one_batch(g, model, grids)
            loss, parts = g["objective"](model, *batch)
            assert model.decode(batch[0].e, grids.shapes)[0].dtype == torch.float32
            assert model.into(torch.zeros(1, 16)).dtype == (torch.bfloat16 if half else torch.float32)
        assert loss.dtype == parts["nats"].dtype == torch.float32
        found.append(loss.item())
    assert found[1] == pytest.approx(found[0], rel=0.05) and found[1] != found[0]


# --- Evaluation ---

def evaluated(g, model, grids, count=None):
    return g["evaluate"](model, model.config.canvas, grids, nullcontext(), g["scheduled"](10_000), count)


@pytest.mark.parametrize("estimator, layout, words", [
    ("reinmax", "grid", []), ("vq", "canvas", ["--vq_levels=2"]), ("lfq", "grid", [])])
def test_figures_do_not_depend_on_the_batch(estimator, layout, words):
    """Nor on more grids than the mixture of MI and TC takes; and nothing random outside is touched."""
    g, model, _ = built(*words, max_side=3, estimator=estimator, layout=layout)
    grids = of_shapes(all_shapes(3).repeat(112, 1), 3)
    states = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    found = {}
    for g["eval_batch_size"], count in ((3, 30), (7, 30), (600, None), (1001, None)):
        found[g["eval_batch_size"]], _ = evaluated(g, model, grids, count)
    assert states == (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    assert found[3] == pytest.approx(found[7], rel=1e-5) and found[600] == pytest.approx(found[1001], rel=1e-5)
    assert found[3]["grids"] == 30 and found[600]["grids"] == 1008 and model.training
    drawn = {"soft_hard_gap", "kl"} if estimator == "reinmax" else set()
    assert found[3].keys() & {"soft_hard_gap", "kl", "mi", "floor"} == drawn
    assert found[600].keys() & {"soft_hard_gap", "kl", "mi"} == drawn | ({"mi"} if drawn else set())
    assert not drawn or found[600]["mi_ceiling"] == pytest.approx(math.log(1000))


def test_figures_of_answers_made_by_hand():
    """Each wrong cell counts as one; a wrong shape as one wrong grid; PAD and row ends are not in the accuracy."""
    (g, model, _), grids = built(), of_shapes([[2, 2], [1, 3], [3, 1], [2, 5]], 5)      # 20 cells
    tokens = grids.tokens
    wrong, shorter = tokens.clone(), tokens.clone()
    wrong[0, 1, 1] = (wrong[0, 1, 1] + 1) % 10
    shorter[3, 1] = model.config.canvas.pad
    for answers, wanted in (([tokens, wrong], (1, 1, 1, -0.05)), ([wrong, tokens], (0.95, 0.75, 1, 0.05)),
                            ([shorter, shorter], (0.75, 0.75, 0.75, 0))):  # from codes; from codes as they are drawn
        model.write = lambda *_, left=iter(answers): next(left)
        numbers, _ = evaluated(g, model, grids, 4)
        assert [numbers[name] for name in ("accuracy", "exact", "shape_accuracy", "soft_hard_gap")] == pytest.approx(
            wanted, abs=1e-12)
        assert numbers["larger_grids"] == 1                  # 33 bits of cells, 24 of codes: the last grid
        assert numbers["larger_exact"] == float((answers[0][3] == tokens[3]).all())
        assert numbers["raw_bits"] == pytest.approx(5 * math.log2(10))
    with torch.no_grad():
        hard = model.codebook(model.encode(tokens, grids.shapes))
        nats, _ = model.nats(hard.e, tokens, grids.shapes)
    norms = model.codebook.codes.norm(dim=1)
    assert {name: numbers[name] for name in ("nats", "loss", "kl", "codebook_norm_min", "codebook_norm_max", "usage",
                                             "dead_codes", "bits", "grids")} == pytest.approx(dict(
        nats=nats.mean().item(), loss=nats.sum().item() / 20, kl=kl_uniform(hard.logits).sum(1).mean().item(),
        codebook_norm_min=norms.min().item(), codebook_norm_max=norms.max().item(), grids=4, bits=24,
        usage=len(hard.codes.unique()) / 16, dead_codes=16 - len(hard.codes.unique())))


def test_code_statistics_are_of_learned_codes_and_the_rate_is_of_all():
    """The four shapes here have four numbers, 2 bits of the first two codes together."""
    (g, model, _), grids = built(estimator="vq"), of_shapes([[1, 1], [2, 2], [1, 1], [2, 2]], 5)
    learned = torch.tensor([[3, 3, 3, 3], [3, 3, 3, 3], [3, 3, 3, 3], [3, 3, 3, 5]])
    model.codebook.forward = lambda z, *_, **__: Quantised(z, learned)
    numbers, found = evaluated(g, model, grids)
    assert found["codes"].tolist() == [[0, 0, 3, 3, 3, 3], [0, 6, 3, 3, 3, 3], [0, 0, 3, 3, 3, 3], [0, 6, 3, 3, 3, 5]]
    quarter = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    assert numbers["code_bits"] == pytest.approx(1 + quarter) and numbers["usage"] == 2 / 16
    pooled = -(15 / 16 * math.log(15 / 16) + math.log(1 / 16) / 16)
    assert numbers["perplexity"] == pytest.approx(math.exp(pooled)) and numbers["dead_codes"] == 14
    g, model, _ = built(estimator="vq", vq_heads=2)          # of two books: 3 of each, 5 of the second
    model.codebook.forward = lambda z, *_, **__: Quantised(z, learned)
    numbers, _ = evaluated(g, model, grids)
    assert numbers["usage"] == 3 / 32 and numbers["code_bits"] == pytest.approx(1 + quarter)


def test_thorough_figures_by_hand(capsys):
    """The best constant colours; what differs in a pair, and between strangers; a factor that a position spells."""
    g, code = configured()[0], torch.tensor
    cells = torch.full((4, 5, 5), OUTSIDE, dtype=torch.uint8)
    for canvas, rows in zip(cells, ([[1, 1], [1, 2]], [[0]], [[5, 6, 7]], [[4, 4], [4, 4]])):
        canvas[:len(rows), :len(rows[0])] = code(rows)
    codes = code([[0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 5], [0, 1, 7, 2, 3, 4], [0, 1, 7, 2, 9, 9]])
    grids = Grids(cells, code([[2, 2], [1, 1], [1, 3], [2, 2]]), [""] * 4, code([[0, 1], [2, 3]]),
                  {"which": code([8, 8, 3, 3]), "same": code([1, 1, 1, -1])}, [])
    numbers = g["thoroughly"]({"codes": codes}, grids, 2)
    assert numbers["floor"] == pytest.approx(9 / 12) and numbers["pairs"] == 2
    assert numbers["pair_difference"] == 3 / 8 and numbers["random_pair_difference"] == 5 / 8
    assert numbers["information_which"] == pytest.approx(1) and numbers["gap_which"] == pytest.approx(0)
    assert "gap_same" not in numbers and "mi" not in numbers and numbers["nmi_max"] >= numbers["nmi"] > 0
    g["report"](dict.fromkeys("exact accuracy shape_accuracy usage perplexity grids bits code_bits nats raw_bits "
                              "larger_grids".split(), 1) | numbers)
    said = capsys.readouterr().out
    assert "0.375 between input and output of 2 pairs, 0.625 between strangers" in said and "\n  which: one" in said
    grids.pairs = grids.pairs[:1]                            # of one alone no stranger is known
    numbers = g["thoroughly"]({"codes": codes, "logits": torch.zeros(4, 4, 16)}, grids, 2)
    assert "pairs" not in numbers and numbers["mi_ceiling"] == pytest.approx(math.log(4))
    assert [numbers[name] for name in ("mi", "tc", "dwkl", "code_mi")] == pytest.approx([0] * 4, abs=1e-5)


# --- Pictures ---

@pytest.mark.parametrize("settings, columns", [(dict(mask_rate="0,0.5", layout="canvas"), 5),
                                               (dict(codebook_size=2, n_codes=6), 3)])
def test_three_pictures(settings, columns, tmp_path):
    """With masks two panels more; also of few grids, two codes, one latent."""
    (g, model, _), grids = built(**settings), of_shapes([[1, 1], [5, 5], [2, 3]], 5)
    _, found = evaluated(g, model, grids)
    g["draw_all"](model, model.config.canvas, grids, found, tmp_path, 7, nullcontext())
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step_00000007.png", "traversal_00000007.png", "usage_00000007.png"] and model.training
    sizes = [struct.unpack(">II", (tmp_path / "samples" / name).read_bytes()[16:24]) for name in names]
    assert sizes == [(120 * columns, 3 * 120 + 32), (1200, 3 * 120 + 32), (480, 240)]


def test_a_picture_has_the_colours_of_arc():
    for canvas in (Canvas(4, 10, masked=True), Canvas(4, 3)):
        n = canvas.n_colours
        tokens = [*range(n), canvas.pad, canvas.eos, canvas.mask or 0] + [0] * (13 - n)
        shown = picture(torch.tensor(tokens).view(4, 4), canvas)
        assert shown.dtype == np.uint8 and shown.shape == (4, 4, 3)
        assert shown.reshape(-1, 3)[:n + 3].tolist() == [
            *map(list, PALETTE[:n]), [255] * 3, [255] * 3, [200 if canvas.mask else 0] * 3]


# --- Grids and codes of files ---

def test_grids_of_a_file(tmp_path):
    """A grid, a list of grids, a task, tasks by name; each grid with where it stands."""
    one, two = [[1, 2]], [[0], [3]]
    assert grids_of(one, "f") == [("f", one)] and grids_of([one, two], "f") == [("f 0", one), ("f 1", two)]
    task = {"train": [{"input": one, "output": two}], "test": [{"input": two, "output": one}]}
    assert grids_of({"a": task, "b": one}, "t") == [
        ("t a train 0 input", one), ("t a train 0 output", two), ("t a test 0 input", two), ("t a test 0 output", one),
        ("t b", one)]
    for value in (5, "grid", None, [[1, "2"]], [[1.5]], [[True]], [one, 3], {"a": None}):
        with pytest.raises(UserError, match="is no grid"):
            grids_of(value)
    for depth in (50, 3000):                                 # the last is too deep for json itself
        (tmp_path / "deep.json").write_text("[" * depth + "]" * depth)
        with pytest.raises(UserError, match="nested too deeply"):
            grids_of(read_file(tmp_path / "deep.json"))
    for path, said in (("/dev/zero", "is a device"), (tmp_path / "none.json", "cannot read")):
        with pytest.raises(UserError, match=said):
            read_file(path)


SIX = "6 codes from 0 to 15"


@pytest.mark.parametrize("answer, content, said", [
    (print_codes, [[0] * 6], "file: its rows .* to 5"), (print_codes, [[0]] * 6, "list of 1 to 5 rows"),
    (print_codes, [[[1]], [[1, 2], [3]]], "file 1: its rows must have one length"),
    (print_codes, [[1, 10]], "value 10, and colours are 0 to 9"), (print_codes, {}, "holds no grid"),
    (print_grids, [1, 2], SIX), (print_grids, [0.5] * 6, SIX), (print_grids, [True] * 6, SIX), (print_grids, {}, SIX)])
def test_wrong_grids_and_codes_of_a_file(answer, content, said, tmp_path):
    path = tmp_path / "file.json"
    for text, said in ((json.dumps(content), said), (json.dumps(content)[:-1], "not JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            answer(built()[1], str(path), nullcontext())


def test_codes_that_are_typed(capsys, tmp_path):
    (_, model, _), path = built(), tmp_path / "codes.json"
    for words in ("1,1,1,1,1,1,1", "16,1,1,1,1,1", "-1,1,1,1,1,1", "²,1,1,1,1,1", "nowhere.json"):
        with pytest.raises(UserError, match=SIX):
            print_grids(model, words, nullcontext())
    path.write_text("[0, 6, 1, 2, 3, 15]")                   # the seventh of 5 x 5 shapes
    for words in ("0, 6,1,2,3,15", str(path)):
        print_grids(model, words, nullcontext())
    first, again = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == again and [len(row) for row in first] == [2, 2]
