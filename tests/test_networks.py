"""Whole models: encoder, encoder-latent-decoder, spatial and spatio-temporal transformer, text. About 10 s."""
import pytest
import torch

from interpreter import formula
from kernels import attend_space, attend_time
from model import Transformer, TransformerConfig, parameter_rules
from models.encoder_decoder import Encoder, EncoderDecoder, LatentTransformer, PrefixDecoder, TextTransformer
from models.video import SpatialTransformer, SpatioTemporal

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=20, init="xavier")

pytestmark = pytest.mark.usefixtures("one_thread")


def build(kind, *more, **settings):
    torch.manual_seed(0)
    model = kind(TransformerConfig(**{**SMALL, **settings}), *more).eval()
    assert set(parameter_rules(model)) == {name for name, _ in model.named_parameters()}
    return model


def tokens(*shape, seed=1):
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("positions", ["learned", "rope", "alibi", "none", "learned_per_layer"])
@pytest.mark.parametrize("mixer", ["full", "window", "diff", "mla", "strided"])
def test_encoder(mixer, positions, left):
    model, x = build(Encoder, mixer=mixer, positions=positions), tokens(3, 12)
    lengths = torch.tensor([12, 7, 1])
    place = torch.arange(12)
    padding = place < 12 - lengths[:, None] if left else place >= lengths[:, None]
    with torch.no_grad():
        full, masked = model(x), model(x, padding)
        assert full.isfinite().all() and masked.isfinite().all()
        for row, hidden in enumerate(padding):
            close(masked[row, ~hidden], model(x[row:row + 1, ~hidden])[0])
        other = x.clone()
        other[:, -1] = (x[:, -1] + 1) % 20
        assert ((model(other) - full)[:, 0].abs().amax(1) > 0).all()  # the first sees the last
    with pytest.raises(ValueError, match="whole input at once"):
        model.new_cache(1, 12)


def test_what_only_decoders_have_is_refused():
    for settings in (dict(logit_softcap=30.0), dict(value_residual=True)):
        for kind, more in ((EncoderDecoder, ()), (LatentTransformer, ()), (SpatioTemporal, (4,))):
            with pytest.raises(ValueError, match="are for decoders"):
                build(kind, *more, **settings)
        build(PrefixDecoder, **settings)


@pytest.mark.parametrize("mixer", ["xl", "compressive", "mamba", "mingru"])
def test_what_cannot_see_ahead(mixer):
    for kind, more in ((Encoder, ()), (SpatialTransformer, (4,))):
        with pytest.raises(ValueError, match="left to right|earlier segments|past block_size"):
            build(kind, *more, mixer=mixer, positions="rope")


@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("positions", ["learned", "rope", "alibi", "none"])
def test_decoder_sees_the_source_through_the_latents_only(positions, kv):
    model = build(LatentTransformer, 3, positions=positions, n_kv_head=kv)
    source, x = tokens(2, 9), tokens(2, 14, seed=2)
    padding = torch.tensor([[False] * 9, [False] * 5 + [True] * 4])
    with torch.no_grad():
        latents = model.encode(source, padding)
        assert latents.shape == (2, 3, 32)
        close(latents[1:], model.encode(source[1:, :5]))
        full = model(source, x, padding=padding)
        close(model.decode(x, latents), full)
        assert (model.decode(x, latents + 0.1) - full).abs().max() > 1e-3
        other = x.clone()
        other[:, 8:] = (x[:, 8:] + 1) % 20
        assert torch.equal(model.decode(other, latents)[:, :8], full[:, :8])  # causal
        for sizes in ([14], [5, 1, 8], [1] * 14):
            cache = model.new_cache(2, 14)
            close(torch.cat([model.decode(part, latents, cache) for part in x.split(sizes, 1)], 1), full)
        cache.crop(6)
        twin = cache.fork(2)
        close(model.decode(x[:, 6:], None, cache), full[:, 6:])
        close(model.decode(x[:, 6:].repeat_interleave(2, 0), None, twin), full[:, 6:].repeat_interleave(2, 0))
        assert twin.bytes == 2 * cache.bytes
    state = model.encode(source).detach().requires_grad_()
    model.decode(x, state).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and state.grad.abs().sum() > 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("positions", ["learned", "rope", "alibi", "none"])
@pytest.mark.parametrize("kind", [EncoderDecoder, PrefixDecoder])
def test_decoder_sees_the_whole_source(kind, positions, padded):
    """Rows of unequal sources equal each alone; cached in pieces equals at once; causal over its own tokens."""
    model = build(kind, positions=positions, n_kv_head=2, block_size=32)
    source, x = tokens(2, 9), tokens(2, 14, seed=2)
    padding = torch.tensor([[False] * 9, [False] * 5 + [True] * 4]) if padded else None
    with torch.no_grad():
        context = model.encode(source, padding)
        full = model(source, x, padding=padding)
        assert full.shape == (2, 14, 20)
        if padded:
            close(full[1:], model(source[1:, :5], x[1:]))
        other = x.clone()
        other[:, 8:] = (x[:, 8:] + 1) % 20
        changed = (model(source, other, padding=padding) - full).abs().amax(-1)
        assert (changed[:, :8] < 1e-5).all() and (changed[:, 8:] > 0).all()
        for place in (0, 4):                                 # each token of the source is seen, also ahead of others
            other = source.clone()
            other[:, place] = (source[:, place] + 1) % 20
            assert ((model(other, x, padding=padding) - full).abs().amax((1, 2)) > 1e-4).all()
        for sizes in ([14], [5, 1, 8], [1] * 14):
            cache = model.new_cache(2, 14)
            pieces = [model.decode(part, context, cache, padding) for part in x.split(sizes, 1)]
            close(torch.cat(pieces, 1), full)
    loss, nats = model(source, x, x.masked_fill(x == 3, -1), padding)
    loss.backward()
    assert nats.shape == (1, 1) and nats.item() == loss.item()
    assert all(p.grad is not None for p in model.parameters())


def test_prefix_sees_ahead_in_the_source_only():
    """The first token of the source sees its last; with causal order alone it would not."""
    model, source, x = build(PrefixDecoder, positions="rope"), tokens(1, 6), tokens(1, 3, seed=2)
    plain = Transformer(model.config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        close(model(source, x), plain(torch.cat([source, x], 1), prefix=6)[:, 6:])
        assert (model(source, x) - plain(torch.cat([source, x], 1))[:, 6:]).abs().max() > 1e-3


def test_latents_learn_to_copy():
    model = build(LatentTransformer, 4, positions="learned", init="gpt2").train()
    source = tokens(8, 4)
    x = torch.cat((torch.zeros(8, 1, dtype=torch.long), source[:, :-1]), 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        loss, nats = model(source, x, source)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert nats.item() < 0.3 and all(p.grad is not None for p in model.parameters())


def test_spatial():
    model, x = build(SpatialTransformer, 9), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(x)
        assert full.shape == x.shape
        moved = model(x.flip(1))
        assert (moved.flip(1) - full).abs().max() > 1e-3  # places differ
        other = x.clone()
        other[:, 8] += 1
        assert ((model(other) - full)[:, 0].abs().amax(1) > 0).all()
    with pytest.raises(ValueError, match="9 tokens, not 8"):
        model(x[:, :8])


@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("positions", ["learned", "rope", "alibi", "none"])
def test_spatio_temporal(positions, kv):
    model = build(SpatioTemporal, 6, positions=positions, n_kv_head=kv)
    x = torch.randn(2, 10, 6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(x)
        other = x.clone()
        other[:, 7, 3] += 1
        changed = (model(other) - full).abs().amax(-1)  # (B, T, N)
        assert (changed[:, :7] == 0).all() and (changed[:, 7:] > 0).all()  # causal in time, all places of a frame
        for sizes in ([10], [3, 1, 6], [1] * 10):
            cache = model.new_cache(2, 10)
            close(torch.cat([model(part, cache) for part in x.split(sizes, 1)], 1), full)
        cache.crop(4)
        twin = cache.fork(1)
        close(model(x[:, 4:], cache), full[:, 4:])
        close(model(x[:, 4:], twin), full[:, 4:])
        if positions != "learned":
            banded, cache = model(x, window=3), model.new_cache(2, 1, window=3)
            close(torch.cat([model(part, cache) for part in x.split([1] * 4 + [6], 1)], 1), banded)
            assert (banded - full).abs().max() > 1e-3


def test_spatio_temporal_refuses():
    for settings, word in ((dict(mixer="mamba", positions="rope"), "mixer 'full'"),
                           (dict(positions="learned_per_layer"), "one table")):
        with pytest.raises(ValueError, match=word):
            build(SpatioTemporal, 6, **settings)
    model = build(SpatioTemporal, 6)
    with pytest.raises(ValueError, match="past block_size"):
        model(torch.zeros(1, 17, 6, 32))
    with pytest.raises(ValueError, match="frames are"):
        model(torch.zeros(1, 2, 5, 32))


@pytest.mark.parametrize("kind", [EncoderDecoder, LatentTransformer, SpatioTemporal])
@pytest.mark.parametrize("settings", [dict(short_conv=2), dict(ff="none,mlp")])
def test_settings_of_other_layers(kind, settings):
    more = (2,) if kind is LatentTransformer else (4,) if kind is SpatioTemporal else ()
    with pytest.raises(ValueError, match="are for decoders"):
        build(kind, *more, **settings)


@pytest.mark.parametrize("left", [False, True])
def test_text(left):
    model, x, y = build(TextTransformer, positions="rope"), tokens(3, 10), tokens(3, 10, seed=2)
    lengths, place = torch.tensor([10, 6, 2]), torch.arange(10)
    padding = place < 10 - lengths[:, None] if left else place >= lengths[:, None]
    plain = Transformer(model.config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits, (_, nats) = model(x, padding=padding), model(x, y, padding)
        total = 0.0
        for row, hidden in enumerate(padding):
            alone = plain(x[row:row + 1, ~hidden])
            close(logits[row, ~hidden], alone[0])
            total += torch.nn.functional.cross_entropy(alone[0], y[row, ~hidden], reduction="sum")
        close(nats[0, 0], total / lengths.sum())


@pytest.mark.parametrize("shape", [(2, 3, 0, 2, 8), (0, 3, 4, 2, 8), (2, 0, 4, 2, 8)])
@pytest.mark.parametrize("attend", [attend_time, formula(attend_time), attend_space])
def test_frames_without_places(attend, shape):
    """No places, no rows or no frames: nothing, of the shape that was asked for, with a gradient."""
    x = torch.zeros(shape, requires_grad=True)
    y = attend(x, x, x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
