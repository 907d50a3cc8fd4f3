"""train_dvae.py and models/dvae.py: schedules, codes of the shape, places, padding and masks change nothing, nats and
losses by hand, figures by hand, grids learned by heart, pictures."""
import functools
import json
import math
import random
import struct
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.arc import OUTSIDE, PALETTE, Arc, Canvas, Grids, load
from model import parameter_roles
from models.discrete import SAMPLED, Quantised, decompose, kl_uniform, usage_kl
from models.dvae import DVAE, Attention, relations, tiles
from nanolab import settings as flags
from nanolab.codes import grids_of, picture, print_codes, print_grids, read_file
from nanolab.run import UserError, override
from forks import summary
from scripts import curve
from test_scripts import fresh

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = "--max_side 5 --n_codes 6 --codebook_size 16 --code_dim 8 --n_head 2 --n_embd 16 --cell_dim 8".split()
LAYOUTS = ["grid", "canvas"]
LAID = pytest.mark.parametrize("layout, patch", [("grid", (2, 1)), ("grid", (3, 2)), ("canvas", (1, 1)),
                                                 ("canvas", (2, 2))])
read_settings = functools.cache(flags._read_settings)  # a pure function, and most of what `configured` takes


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    monkeypatch.setattr(flags, "_read_settings", lambda path: dict(read_settings(str(path))))


def typed(**settings):
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def configured(*words, **settings):
    """The script's globals and the model's configuration, small but for `words` and settings."""
    g = fresh("train_dvae.py")
    return g, g["check"](override(g, [*TINY, *map(str, [*words, *typed(**settings)])]))


def built(*words, **settings):
    """The same with a model, untrained."""
    g, config = configured(*words, **settings)
    torch.manual_seed(0)
    return g, config, DVAE(config)


def laid(layout, patch):
    return built(layout=layout, patch_height=patch[0], patch_width=patch[1])[1:]


def of_shapes(shapes, side, n_colours=10, seed=0):
    """A Grids of random cells."""
    shapes = torch.as_tensor(shapes)
    cells = torch.randint(n_colours, (len(shapes), side, side), generator=torch.Generator().manual_seed(seed))
    cells[~within(shapes, side)] = OUTSIDE
    return Grids(cells.to(torch.uint8), shapes, ["some"] * len(shapes), torch.empty(0, 2, dtype=torch.int64), {}, [])


def within(shapes, side):
    place = torch.arange(side)
    return (place[:, None] < shapes[:, 0, None, None]) & (place < shapes[:, 1, None, None])


def all_shapes(side):
    return torch.cartesian_prod(*[torch.arange(1, side + 1)] * 2)


def some_codes(config, n, seed=0):
    """Learned codes (n, n_latents) at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.codebook_size, (n, config.n_latents), generator=generator)


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
    """Shares are of schedule_steps, whatever max_steps is; a flag wins; without chance there is no tau."""
    words = dict(kl_weight="0,2", usage_weight="1,0.5", weight_fraction=0.5, mask_rate="0.4,0.2", mask_fraction=1.0,
                 tau_start=3.5, tau_end=0.5, tau_fraction=0.5, noise_fraction=0.0, noise_last=0.3, hard_at=0.25,
                 schedule_steps=100, estimator="gumbel_hard")
    g, _ = configured(**words, max_steps=70)
    other, _ = configured(**words, max_steps="none", schedule="constant")
    forward = [g["scheduled"](step) for step in range(0, 120, 5)]
    assert forward == [other["scheduled"](step) for step in range(115, -1, -5)][::-1]
    now = g["scheduled"](25)
    assert now == pytest.approx(dict(kl_weight=1.0, mi_weight=0.0, tc_weight=0.0, dwkl_weight=0.0, usage_weight=0.75,
                                     mask_rate=0.4 - 0.2 * (1 - math.sqrt(0.5)) / 2, tau=2.0, noise=0.3, hardness=1.0))
    assert g["scheduled"](24)["hardness"] == 0 and g["scheduled"](50)["kl_weight"] == 2
    # by default Gumbel's tau falls to 1/16 and the others' stays; noise grows; codes are hard from hard_at on
    for estimator, taus, hardness in (("gumbel_soft", (1, 0.53125, 1 / 16, 1 / 16), (1, 1, 1, 1)),
                                      ("gumbel_hard", (1, 0.53125, 1 / 16, 1 / 16), (0, 0, 1, 1)),
                                      ("reinmax", (1, 1, 1, 1), (0, 0, 1, 1))):
        g, _ = configured(estimator=estimator, max_steps=1000)
        now = [g["scheduled"](step) for step in (0, 200, 400, 2000)]
        assert [row["tau"] for row in now] == pytest.approx(taus)
        assert [row["noise"] for row in now] == pytest.approx([0, 0.8, 1, 1])
        assert [row["hardness"] for row in now] == list(hardness)
        assert hardness[0] or [g["scheduled"](step)["hardness"] for step in (299, 300)] == [0, 1]
    g, _ = configured(estimator="vq")
    assert not {"tau", "noise", "hardness"} & g["scheduled"](5).keys()


@pytest.mark.parametrize("settings, said", [
    (dict(ff_mult=0.001), "no feed-forward width"), (dict(code_dim=1, estimator="vq"), "code_dim 1: .* no gradient"),
    (dict(estimator="reinmax", tau_end=0.5), "reinmax needs at least 1"),
    (dict(estimator="reinmax", tau_start=0.9), "reinmax needs at least 1"),
    (dict(estimator="vq", kl_weight="0,0.1"), "vq has no posterior"),
    (dict(estimator="fsq", dwkl_weight="0.1,0"), "fsq has no posterior"),
    (dict(estimator="vq", kl_target=9.0), "kl_target"), (dict(estimator="fsq", codebook_bound=0.1), "by gradients"),
    (dict(max_steps="none", schedule="constant"), "give schedule_steps"),
    (dict(n_codes=2), "none is left for the cells")])
def test_settings_that_cannot_go_together(settings, said):
    with pytest.raises(UserError, match=said):
        configured(**settings)


def test_settings_that_can():
    assert configured(estimator="fsq", codebook_size=240)[1].code_dim == 3
    assert configured(n_codes=1, layout="canvas")[1].n_latents == 1


# --- Ids and shapes ---

@pytest.mark.parametrize("max_side, size, n", [(30, 2, 10), (1, 2, 0), (3, 9, 1), (3, 8, 2)])
def test_codes_of_the_shape(max_side, size, n):
    """As many as all shapes need; read finds what with_shape writes; a number too large is the last shape."""
    _, config, model = built(max_side=max_side, codebook_size=size, n_codes=n + 3)
    shapes = all_shapes(max_side)
    codes = model.with_shape(some_codes(config, len(shapes)), shapes)
    assert config.n_shape_codes == n and codes.shape == (len(shapes), n + 3) and 0 <= codes.min() <= codes.max() < size
    e, found = model.read(codes)
    assert torch.equal(found, shapes) and torch.equal(e, model.codebook.look_up(codes[:, n:]))
    assert len(set(map(tuple, codes[:, :n].tolist()))) == len(shapes)
    last = torch.full((1, n + 3), size - 1)
    assert model.read(last)[1].tolist() == [[max_side, max_side]]


def test_the_canvas_needs_no_codes_of_the_shape():
    _, config, model = built(layout="canvas")
    codes = some_codes(config, 25)
    assert config.n_shape_codes == 0 and torch.equal(model.with_shape(codes, all_shapes(5)), codes)


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
    _, config, model = built(max_side=9, n_codes=n + 2)
    shapes, more = all_shapes(9), 0
    assert tiles(5, 4) == [(3, 3), (3, 2), (2, 2), (2, 1), (1, 1)] and tiles(5, 25) == tiles(1, 1) == [(1, 1)]
    places, tile, features = model.latent_places(shapes)
    assert features.shape == (81, n, 64) and len(features.flatten(1).unique(dim=0)) == 81
    for (height, width), here, size in zip(shapes.tolist(), places.tolist(), tile[:, 0].tolist()):
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
    first, none = ([layer.distance for layer in built(*words, n_head=4)[2].modules() if isinstance(layer, Attention)]
                   for words in ([], ["--no-distance_bias"]))
    assert all(bias[0].tolist() == [-0.5, -0.25, -0.125, 0] and not bias[1:].any() for bias in first)
    assert len(none) == len(first) == 6 and not any(bias.any() for bias in none)


# --- Padding and masks ---

@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_embedding_of_pad_is_never_read(layout):
    """Bit for bit, forward and in every gradient, be it NaN; its own is zero."""
    (config, model), grids, found = laid(layout, (2, 2)), of_shapes(all_shapes(5), 5), []
    for value in (0.5, math.nan):
        model.cell.data[config.canvas.pad] = value
        model.zero_grad()
        z = model.encode(config.canvas.tokens(grids.cells), grids.shapes)
        z.square().sum().backward()
        found.append((z, model.cell.grad, model.into.weight.grad))
    assert all(map(torch.equal, *found)) and not found[0][1][config.canvas.pad].any() and found[0][1].any()


@pytest.fixture
def in_float64(monkeypatch):
    """All of the model in float64, also its softmax."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


@LAID
def test_extra_padding_and_the_rest_of_the_batch_change_nothing(layout, patch, in_float64):
    """A grid alone, and with larger ones: 1e-12 in float64 (in float32 matrices of another length round otherwise).
    All shapes, so more latents than cells, than patches, and fewer."""
    config, model = laid(layout, patch)
    grids = of_shapes(all_shapes(5), 5)
    tokens, shapes, e = config.canvas.tokens(grids.cells), grids.shapes, model.codebook.look_up(some_codes(config, 25))
    e = e.double()
    z, (nats, _), written = model.encode(tokens, shapes), model.nats(e, tokens, shapes), model.write(e, shapes)
    for i in range(0, 25, 3):
        one = slice(i, i + 1)
        torch.testing.assert_close(model.encode(tokens[one], shapes[one]), z[one], atol=1e-12, rtol=1e-12)
        alone, _ = model.nats(e[one], tokens[one], shapes[one])
        torch.testing.assert_close(alone, nats[one], atol=1e-12, rtol=1e-12)
        assert torch.equal(model.write(e[one], shapes[one]), written[one])


@LAID
def test_only_patches_of_the_grid_and_its_row_ends_are_read(layout, patch):
    """Colours that stand elsewhere on the canvas change no bit; each cell and each row end changes the latents."""
    config, model = laid(layout, patch)
    grids = of_shapes([[1, 1], [2, 3], [3, 2], [4, 4], [1, 5], [5, 1], [3, 3]], 5)
    tokens, shapes = config.canvas.tokens(grids.cells), grids.shapes
    row, column = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    first = [place // size * size for place, size in zip((row, column), patch)]  # of the patch that a place is in
    height, width = shapes[:, 0, None, None], shapes[:, 1, None, None]
    read = (first[0] < height) & (first[1] < width + 1)
    z = model.encode(tokens, shapes)
    assert (~read).any() and torch.equal(model.encode(tokens.masked_fill(~read, 3), shapes), z)
    for i, j in zip(*((row < height) & (column < width + 1)).any(0).nonzero().T.tolist()):
        changed = tokens.clone()
        changed[:, i, j] = (changed[:, i, j] + 1) % 10
        differs = (model.encode(changed, shapes) != z).flatten(1).any(1)
        assert torch.equal(differs, read[:, i, j])


def test_masked_tokens_are_a_share_and_carry_no_information():
    """About `rate` of cells and row ends, never PAD. Grids that differ only there have equal latents, bit for bit, and
    what was there has no gradient."""
    g, config, model = built(mask_rate="0.5,0.5")
    canvas, grids = config.canvas, of_shapes(all_shapes(5).repeat(8, 1), 5, n_colours=8)
    tokens = canvas.tokens(grids.cells)
    before = tokens.clone()
    for rate in (0.0, 0.8, 0.5):
        seen, share = g["masked"](tokens, canvas, rate, torch.Generator().manual_seed(1))
        hidden = seen == canvas.mask
        assert torch.equal(tokens, before) and torch.equal(seen[~hidden], tokens[~hidden])
        assert not (hidden & (tokens == canvas.pad)).any() and (rate == 0 or (tokens[hidden] == canvas.eos).any())
        assert share.item() == pytest.approx(hidden.sum().item() / (tokens != canvas.pad).sum().item())
        assert share.item() == pytest.approx(rate, abs=0.03)
    others = torch.where(hidden & (tokens < 10), 9, tokens)
    again, _ = g["masked"](others, canvas, 0.5, torch.Generator().manual_seed(1))
    z = model.encode(again, grids.shapes)
    assert not torch.equal(tokens, others) and torch.equal(z, model.encode(seen, grids.shapes))
    z.square().sum().backward()
    assert not model.cell.grad[9].any() and all(model.cell.grad[i].any() for i in (0, 7, canvas.eos, canvas.mask))


# --- Reading and writing ---

def by_hand(model, e, shapes):
    """Log-probabilities (B, S, S, outputs) float64 and the patches that they are of; NaN where nothing is said."""
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
def test_nats_are_a_cross_entropy_by_hand_and_agree_with_what_is_written(layout, patch):
    """All shapes, on a side that patches do not divide: only cells count, or with layout canvas each place of it;
    `right` where `write` gives the very canvas, also with one cell changed."""
    config, model = laid(layout, patch)
    grids = of_shapes(all_shapes(5), 5)
    shapes, e = grids.shapes, model.codebook.look_up(some_codes(config, 25, seed=3))
    written, said = model.write(e, shapes), by_hand(model, e, shapes)
    counted = within(shapes, 5) if layout == "grid" else torch.ones(25, 5, 5, dtype=torch.bool)
    assert torch.equal(written[counted], said[counted].argmax(-1))
    assert layout == "canvas" or torch.equal(config.canvas.shapes(written), shapes)  # the rest follows from the shape
    changed = written.clone()
    for b, (i, j) in enumerate((shapes - 1).tolist()):
        changed[b, i, j] = (changed[b, i, j] + 1) % 10
    for tokens in (written, changed, config.canvas.tokens(grids.cells)):
        nats, right = model.nats(e, tokens, shapes)
        assert torch.equal(right, (written == tokens).flatten(1).all(1))
        logs = said.nan_to_num().gather(3, tokens.clamp(max=said.size(3) - 1)[..., None])[..., 0]
        torch.testing.assert_close(nats.double(), -(logs * counted).sum((1, 2)), atol=1e-4, rtol=1e-5)


# --- Losses ---

EVERYTHING = dict(kl_weight="0.1,0.1", mi_weight="0.1,0.1", tc_weight="0.1,0.1", dwkl_weight="0.1,0.1")


def one_batch(g, config, model):
    """(found, tokens, shapes, now, cells per grid) of a batch with all shapes, as the loop has them."""
    now, grids = g["scheduled"](10_000), of_shapes(all_shapes(5), 5)
    tokens = config.canvas.tokens(grids.cells)
    how = {name: now[name] for name in ("tau", "noise", "hardness") if name in now}
    found = model.codebook(model.encode(tokens, grids.shapes), g["estimator"],
                           generator=torch.Generator().manual_seed(0), **how)
    return found, tokens, grids.shapes, now, grids.shapes.prod(1).float().mean()


ESTIMATORS = (*SAMPLED, "vq", "fsq")
VARIANTS = ["--no-resample", "--output_positions --no-distance_bias", "--no-bias", "--similarity dot", "--norm rms "
            "--no-norm_gain", "", "--patch_height 1", "--code_dim 1 --similarity dot", "--codebook_size 2 "
            "--n_codes 8", "--encoder_layers 2 --latent_layers 2 --n_head 16", "--decoder_layers 2 --mask_rate 0.5,0.5",
            "--activation swiglu", "--init zero"]


@pytest.mark.parametrize("layout, estimator, words", [
    (LAYOUTS[i // 6 % 2], ESTIMATORS[i % 6], words) for i, words in enumerate(VARIANTS)])
def test_every_parameter_has_a_role_and_a_gradient(layout, estimator, words):
    """One that is not rounding: 1e-7 of the longest at least, where the least that was found is 4e-6 and rounding is
    1e-9. From weights that are not 0, as `init zero` has them."""
    drawn = EVERYTHING | dict(codebook_bound=0.1) if estimator in SAMPLED else {}
    g, config, model = built(*words.split(), layout=layout, estimator=estimator, **drawn)
    assert parameter_roles(model).keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    loss, _ = g["objective"](model, *one_batch(g, config, model))
    loss.backward()
    lengths = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert {name for name, length in lengths.items() if not length > 1e-7 * max(lengths.values())} == set()


def test_the_loss_is_a_sum_of_weights_times_parts():
    """Nats per grid; usage once for each learned code; divided by the mean of cells, or each grid by its own."""
    g, config, model = built(**EVERYTHING, loss_scale="grid", usage_weight="0,0")
    found, tokens, shapes, now, mean_cells = one_batch(g, config, model)
    none = now | {name: 0.0 for name in now if name.endswith("weight")}

    def objective(now):
        return g["objective"](model, found, tokens, shapes, now, mean_cells)
    loss, parts = objective(none)
    nats = model.nats(found.e, tokens, shapes)[0].mean()
    assert torch.equal(loss, nats) and parts.keys() == {"nats", "exact", "loss", "kl"} and parts["nats"] == nats
    assert parts["loss"].item() == pytest.approx(nats.item() / 9)
    assert parts["kl"].item() == pytest.approx(kl_uniform(found.logits).sum(1).mean().item())
    truth = decompose(found.logits, found.y) | {"usage": config.n_latents * usage_kl(found.logits)}
    for name in ("kl", "mi", "tc", "dwkl", "usage"):
        for weight in (0.5, 2.0):
            weighted, _ = objective(none | {f"{name}_weight": weight})
            assert (weighted - loss).item() == pytest.approx(weight * truth[name].item(), abs=2e-4)
            ours, wanted = (torch.autograd.grad(term, model.to_code.weight, retain_graph=True)[0] for term in (
                weighted - loss, weight * truth[name]))
            torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-3)
    more, cells = now | {"kl_weight": 0.3}, shapes.prod(1)
    terms = 0.3 * truth["kl"] + sum(0.1 * truth[name] for name in ("mi", "tc", "dwkl"))
    for scale, wanted in (("grid", nats + terms), ("token", (nats + terms) / 9), ("even", terms / 9 + (
            model.nats(found.e, tokens, shapes)[0] / cells).mean())):
        g["loss_scale"] = scale
        torch.testing.assert_close(objective(more)[0], wanted)


def test_commitment_and_bound_and_positive_parts_are_in_the_loss():
    """The bound: the codes' squared distances from length 1, here 1 and 9."""
    g, config, model = built(estimator="vq", loss_scale="grid")
    found, *batch = one_batch(g, config, model)
    loss, parts = g["objective"](model, found, *batch)
    assert parts.keys() == {"nats", "exact", "loss", "commitment"} and parts["commitment"] == found.loss > 0
    assert (loss - parts["nats"]).item() == pytest.approx(4 * found.loss.item(), rel=1e-3)
    g, config, model = built(loss_scale="grid", codebook_bound=3.0, usage_weight="0,0")
    model.codebook.codes.data = F.normalize(model.codebook.codes.data) * torch.tensor([2.0, 4.0] * 8)[:, None]
    found, *batch, now, mean_cells = one_batch(g, config, model)
    loss, parts = g["objective"](model, found, *batch, now, mean_cells)
    assert (loss - parts["nats"]).item() == pytest.approx(3 * (1 + 9) / 2, rel=1e-3)
    likely = F.one_hot(torch.arange(25)[:, None].expand(25, 4) % 2, 16)
    swapped = Quantised(found.e, found.codes, 3.0 * likely, likely.roll(1, 0))   # draws of what is not likely
    for g["positive_parts"] in (False, True):
        _, parts = g["objective"](model, swapped, *batch, now | {"mi_weight": 1.0}, mean_cells)
        assert (min(parts["mi"], parts["tc"]) >= 0) == g["positive_parts"]


def test_the_loss_is_float32_under_autocast():
    """bfloat16 inside, float32 for the codes and the reconstruction; near the loss without autocast."""
    (g, config, model), found = built(), {}
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            batch = one_batch(g, config, model)
            loss, parts = g["objective"](model, *batch)
            assert model.decode(batch[0].e, batch[2])[0].dtype == torch.float32
            assert model.into(torch.zeros(1, 16)).dtype == (torch.bfloat16 if half else torch.float32)
        assert loss.dtype == parts["nats"].dtype == torch.float32 and loss.isfinite()
        loss.backward()
        found[half] = loss.item()
    assert found[True] == pytest.approx(found[False], rel=0.05) and found[True] != found[False]


# --- Evaluation ---

def evaluated(g, config, model, grids, count=None):
    return g["evaluate"](model, config.canvas, grids, nullcontext(), g["scheduled"](10_000), count)


@pytest.mark.parametrize("estimator, layout", [("reinmax", "grid"), ("vq", "canvas")])
def test_figures_do_not_depend_on_the_batch(estimator, layout):
    """Nor on more grids than the mixture of MI and TC takes; and nothing random outside is touched."""
    g, config, model = built(max_side=3, estimator=estimator, layout=layout)
    grids = of_shapes(all_shapes(3).repeat(112, 1), 3)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = {}
    for size, count in ((3, 30), (7, 30), (600, None), (2000, None)):
        g["eval_batch_size"] = size
        found[size], _ = evaluated(g, config, model, grids, count)
    assert torch.equal(states[0], torch.get_rng_state()) and model.training
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert found[3] == pytest.approx(found[7], rel=1e-5) and found[600] == pytest.approx(found[2000], rel=1e-5)
    assert found[3]["grids"] == 30 and found[600]["grids"] == 1008
    drawn = {"soft_hard_gap", "kl"} if estimator == "reinmax" else set()
    assert found[3].keys() & {"soft_hard_gap", "kl", "mi"} == drawn and "floor" not in found[3]
    assert found[600].keys() & {"soft_hard_gap", "kl", "mi"} == drawn | ({"mi"} if drawn else set())
    assert "mi" not in found[600] or found[600]["mi_ceiling"] == pytest.approx(math.log(1000))


def with_answers(model, *answers):
    """The model writes these, one after the other."""
    answers = iter(answers)
    model.write = lambda *_: next(answers)
    return model


def test_figures_of_answers_made_by_hand():
    """Each wrong cell counts as one; a wrong shape as one wrong grid; PAD and row ends are not in the accuracy."""
    g, config, model = built()
    grids = of_shapes([[2, 2], [1, 3], [3, 1], [2, 5]], 5)   # 20 cells
    tokens = config.canvas.tokens(grids.cells)
    wrong, shorter = tokens.clone(), tokens.clone()
    wrong[0, 1, 1] = (wrong[0, 1, 1] + 1) % 10
    shorter[3, 1] = config.canvas.pad
    rows = [([tokens, wrong], (1, 1, 1, -0.05)), ([wrong, tokens], (0.95, 0.75, 1, 0.05)),
            ([shorter, shorter], (0.75, 0.75, 0.75, 0))]
    for answers, wanted in rows:
        numbers, _ = evaluated(g, config, with_answers(model, *answers), grids, 4)
        assert [numbers[name] for name in ("accuracy", "exact", "shape_accuracy", "soft_hard_gap")] == pytest.approx(
            wanted, abs=1e-12)
        assert numbers["larger_grids"] == 1                  # 33 bits of cells, 24 of codes: the last grid
        assert numbers["larger_exact"] == float((answers[0][3] == tokens[3]).all())
        assert numbers["raw_bits"] == pytest.approx(5 * math.log2(10))
    with torch.no_grad():
        hard = model.codebook(model.encode(tokens, grids.shapes))
        nats, _ = model.nats(hard.e, tokens, grids.shapes)
    assert numbers["nats"] == pytest.approx(nats.mean().item()) and numbers["grids"] == 4
    assert numbers["loss"] == pytest.approx(nats.sum().item() / 20) and numbers["bits"] == 24
    assert numbers["kl"] == pytest.approx(kl_uniform(hard.logits).sum(1).mean().item())
    alive = len(hard.codes.unique())
    assert numbers["usage"] == alive / 16 and numbers["dead_codes"] == 16 - alive
    norms = model.codebook.codes.norm(dim=1)
    assert numbers["codebook_norm_min"] == pytest.approx(norms.min().item())
    assert numbers["codebook_norm_max"] == pytest.approx(norms.max().item())


def test_code_statistics_are_of_learned_codes_and_the_rate_is_of_all():
    """The four shapes here have four numbers, 2 bits of the first two codes together."""
    g, config, model = built(estimator="vq")
    grids = of_shapes([[1, 1], [2, 2], [1, 1], [2, 2]], 5)
    learned = torch.tensor([[3, 3, 3, 3], [3, 3, 3, 3], [3, 3, 3, 3], [3, 3, 3, 5]])
    model.codebook.forward = lambda z, *_, **__: Quantised(z, learned)
    numbers, found = evaluated(g, config, model, grids)
    assert found["codes"].tolist() == [[0, 0, 3, 3, 3, 3], [0, 6, 3, 3, 3, 3], [0, 0, 3, 3, 3, 3], [0, 6, 3, 3, 3, 5]]
    quarter = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    assert numbers["code_bits"] == pytest.approx(1 + quarter) and numbers["usage"] == 2 / 16
    pooled = -(15 / 16 * math.log(15 / 16) + math.log(1 / 16) / 16)
    assert numbers["perplexity"] == pytest.approx(math.exp(pooled)) and numbers["dead_codes"] == 14


def test_thorough_figures_by_hand(capsys):
    """The best constant colours; what differs in a pair, and between strangers; a factor that a position spells."""
    g, code = configured()[0], torch.tensor
    cells = torch.full((4, 5, 5), OUTSIDE, dtype=torch.uint8)
    for i, rows in enumerate(([[1, 1], [1, 2]], [[0]], [[5, 6, 7]], [[4, 4], [4, 4]])):
        cells[i, :len(rows), :len(rows[0])] = code(rows)
    codes = code([[0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 5], [0, 1, 7, 2, 3, 4], [0, 1, 7, 2, 9, 9]])
    grids = Grids(cells, code([[2, 2], [1, 1], [1, 3], [2, 2]]), [], code([[0, 1], [2, 3]]),
                  {"which": code([8, 8, 3, 3]), "same": code([1, 1, 1, -1])}, [])
    numbers = g["thoroughly"]({"codes": codes}, grids, 2)
    assert numbers["floor"] == pytest.approx(9 / 12) and numbers["pairs"] == 2
    assert numbers["pair_difference"] == 3 / 8 and numbers["random_pair_difference"] == 5 / 8
    assert numbers["information_which"] == pytest.approx(1) and numbers["gap_which"] == pytest.approx(0)
    assert "gap_same" not in numbers and "mi" not in numbers
    assert numbers["nmi_max"] >= numbers["nmi"] > 0
    g["report"](dict.fromkeys("exact accuracy shape_accuracy usage perplexity grids bits code_bits nats raw_bits "
                              "larger_grids".split(), 1) | numbers)
    said = capsys.readouterr().out
    assert "0.375 between input and output of 2 pairs, 0.625 between strangers" in said and "\n  which: one" in said
    grids.pairs = grids.pairs[:1]                            # of one alone no stranger is known
    numbers = g["thoroughly"]({"codes": codes, "logits": torch.zeros(4, 4, 16)}, grids, 2)
    assert "pairs" not in numbers
    assert numbers["mi_ceiling"] == pytest.approx(math.log(4))
    assert [numbers[name] for name in ("mi", "tc", "dwkl", "code_mi")] == pytest.approx([0] * 4, abs=1e-5)


# --- Learning ---

@pytest.fixture
def learned(monkeypatch, tmp_path, undrawn):
    """learned(words, settings) -> the summary and the exact shares of a run of the whole script in this process, that
    trains on what it is scored on. What main() sets for the whole process is put back."""
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory

    def learn(*words, **settings):
        g = fresh("train_dvae.py")
        g["draw_all"] = lambda *_: None
        g["load"] = lambda *how: Arc((arc := load(*how)).train, arc.train, arc.source, arc.hash)
        common = dict(n_head=2, n_embd=32, warmup_steps=10, log_interval=10, device="cpu", dtype="float32",
                      out_dir=tmp_path, run_name="run", save_interval=100_000, eval_interval=100_000)
        monkeypatch.setattr(sys, "argv", ["train_dvae.py", *map(str, typed(**common, **settings)), *words])
        g["main"]()
        return summary(run := tmp_path / "train_dvae" / "run"), curve(run, "exact")
    yield learn
    torch.set_deterministic_debug_mode(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("estimator, steps", [("vq", 75), ("fsq", 100)])
def test_grids_are_learned_by_heart(estimator, steps, learned):
    """Exactly, by hard codes."""
    told, exact = learned("--no-symmetry", estimator=estimator, max_side=3, n_codes=8, codebook_size=64,
                          code_dim=8, n_train=8, n_val=10, batch_size=8, max_steps=steps, colours="none", group=1)
    assert told["val_exact"] == told["val_accuracy"] == 1.0 and told["val_nats"] < 1
    assert exact[-1] > 0.9 and exact[0] < 0.2


# --- Pictures ---

@pytest.mark.parametrize("settings, columns", [(dict(mask_rate="0,0.5", layout="canvas"), 5),
                                               (dict(codebook_size=2, n_codes=6), 3)])
def test_three_pictures(settings, columns, tmp_path):
    """With masks two panels more; also of few grids, two codes, one latent."""
    g, config, model = built(**settings)
    grids = of_shapes([[1, 1], [5, 5], [2, 3]], 5)
    _, found = evaluated(g, config, model, grids)
    g["draw_all"](model, config.canvas, grids, found, tmp_path, 7, nullcontext())
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step_00000007.png", "traversal_00000007.png", "usage_00000007.png"] and model.training
    sizes = [struct.unpack(">II", (tmp_path / "samples" / name).read_bytes()[16:24]) for name in names]
    assert sizes == [(120 * columns, 3 * 120 + 32), (1200, 3 * 120 + 32), (480, 240)]


def test_a_picture_has_the_colours_of_arc():
    canvas = Canvas(4, 10, masked=True)
    shown = picture(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, canvas.pad, canvas.eos],
                                  [canvas.mask, 0, 0, 0]]), canvas)
    assert shown.dtype == np.uint8 and shown.shape == (4, 4, 3)
    assert [tuple(colour) for colour in shown.reshape(-1, 3)[:13].tolist()] == [
        *PALETTE, (255, 255, 255), (255, 255, 255), (200, 200, 200)]
    few = Canvas(2, 3)
    assert picture(torch.tensor([[2, few.pad], [few.eos, 0]]), few).reshape(-1, 3).tolist() == [
        list(PALETTE[2]), [255] * 3, [255] * 3, [0] * 3]


# --- Grids and codes of files ---

def test_grids_of_a_file(tmp_path):
    """A grid, a list of grids, a task, tasks by name; each grid with where it stands."""
    one, two = [[1, 2]], [[0], [3]]
    assert grids_of(one, "f") == [("f", one)]
    assert grids_of([one, two], "f") == [("f 0", one), ("f 1", two)]
    task = {"train": [{"input": one, "output": two}], "test": [{"input": two, "output": one}]}
    assert grids_of(task, "t") == [("t train 0 input", one), ("t train 0 output", two), ("t test 0 input", two),
                                   ("t test 0 output", one)]
    assert [name for name, _ in grids_of({"a": task, "b": one}, "t")][3:] == ["t a test 0 output", "t b"]
    for value in (5, "grid", None, [[1, "2"]], [[1.5]], [[True]], [one, 3], {"a": None}):
        with pytest.raises(UserError, match="is no grid"):
            grids_of(value)
    for depth in (50, 3000):                                 # the last is too deep for json itself
        (tmp_path / "deep.json").write_text("[" * depth + "]" * depth)
        with pytest.raises(UserError, match="nested too deeply"):
            grids_of(read_file(tmp_path / "deep.json"))
    with pytest.raises(UserError, match="is a device"):
        read_file("/dev/zero")


def test_wrong_grids_and_codes(tmp_path, capsys):
    """One line that says which file and grid it is, and what this model wants; what is right is answered."""
    model, path = built()[2].eval(), tmp_path / "file.json"
    for content, said in (("[[0, 1, 2, 3, 4, 5]]", "file: its rows .* to 5"), (json.dumps([[0]] * 6), "5 rows"),
                          ("[[[1]], [[1, 2], [3]]]", "file 1: its rows must have one length"),
                          ("[[1, 10]]", "value 10, and colours are 0 to 9"), ("[[-1]]", "value -1"), ("{}", "no grid"),
                          ("grid", "not JSON"), (None, "cannot read")):
        path.write_text(content) if content else path.unlink()
        with pytest.raises(UserError, match=said):
            print_codes(model, path, nullcontext())
    for content in ("[1, 2]", json.dumps([0.5] * 6), json.dumps([True] * 6), "{}", "[[1"):
        path.write_text(content)
        with pytest.raises(UserError, match="6 codes from 0 to 15" if content != "[[1" else "not JSON"):
            print_grids(model, str(path), nullcontext())
    for words in ("1,1,1,1,1,1,1", "16,1,1,1,1,1", "-1,1,1,1,1,1", "²,1,1,1,1,1", "nowhere.json"):
        with pytest.raises(UserError, match="6 codes from 0 to 15"):
            print_grids(model, words, nullcontext())
    path.write_text(json.dumps([0, 6, 1, 2, 3, 15]))         # the seventh of 5 x 5 shapes
    for words in (str(path), "0, 6,1,2,3,15"):
        print_grids(model, words, nullcontext())
    first, again = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == again and [len(row) for row in first] == [2, 2]
