"""Whole models: encoder, encoder-latent-decoder, spatial and spatio-temporal transformer, text."""
import pytest
import torch

from interpreter import formula
from kernels import attend_space, attend_time
from model import Norm, Transformer, TransformerConfig, parameter_roles
from models.encoder_decoder import Encoder, EncoderDecoder, LatentTransformer, PrefixDecoder, TextTransformer
from models.video import SpatialTransformer, SpatioTemporal

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=20, init="xavier")
MORE = {LatentTransformer: (3,), SpatialTransformer: (9,), SpatioTemporal: (6,)}  # latents, tokens of a frame

pytestmark = pytest.mark.usefixtures("one_thread")


def build(kind, **settings):
    torch.manual_seed(0)
    model = kind(TransformerConfig(**{**SMALL, **settings}), *MORE.get(kind, ())).eval()
    assert set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}
    return model


def tokens(*shape, seed=1):
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def paddings(*lengths):
    """(B, T) bool, True where there is no token: behind them, then before them."""
    T, lengths = max(lengths), torch.tensor(lengths)[:, None]
    return torch.arange(T) >= lengths, torch.arange(T) < T - lengths


@pytest.mark.parametrize("mixer, positions", [
    *(("full", word) for word in ("learned", "rope", "alibi", "none", "learned_per_layer")), ("window", "rope"),
    ("diff", "alibi"), ("mla", "rope"), ("mla", "learned"), ("strided", "learned"), ("strided", "rope")])
def test_encoder(mixer, positions):
    """Padded rows are as alone, and the first token sees the last."""
    model, x = build(Encoder, mixer=mixer, positions=positions), tokens(3, 12)
    assert isinstance(model.blocks[0].mixer, type(Transformer(model.config).blocks[0].mixer))
    with torch.no_grad():
        full = model(x)
        for padding in paddings(12, 7, 1):
            masked = model(x, padding)
            assert full.isfinite().all() and masked.isfinite().all()
            for row, hidden in enumerate(padding):
                close(masked[row, ~hidden], model(x[row:row + 1, ~hidden])[0])
        other = x.clone()
        other[:, -1] = (x[:, -1] + 1) % 20
        assert ((model(other) - full)[:, 0].abs().amax(1) > 0).all()
    with pytest.raises(ValueError, match="whole input at once"):
        model.new_cache(1, 12)


DECODING = (dict(logit_softcap=30.0), dict(value_residual=True), dict(norm_after=True), dict(parallel_residual=True),
            dict(qk_norm="full"))


@pytest.mark.parametrize("kind, settings, word", [
    *((kind, how, "are for decoders") for kind in (EncoderDecoder, LatentTransformer, SpatioTemporal)
      for how in (*DECODING, dict(short_conv=2), dict(ff="none,mlp"))),
    *((kind, dict(mixer=mixer, positions="rope"), "left to right|earlier segments|past block_size")
      for kind in (Encoder, SpatialTransformer) for mixer in ("xl", "compressive", "mamba", "mingru")),
    (SpatioTemporal, dict(mixer="mamba", positions="rope"), "mixer 'full'"),
    (SpatioTemporal, dict(positions="learned_per_layer"), "one table")])
def test_what_a_model_has_not_is_refused(kind, settings, word):
    with pytest.raises(ValueError, match=word):
        build(kind, **settings)


@pytest.mark.parametrize("kind", [Transformer, Encoder, EncoderDecoder, LatentTransformer, PrefixDecoder,
                                  TextTransformer, SpatialTransformer, SpatioTemporal])
def test_every_norm_of_a_model_has_what_the_settings_say(kind, monkeypatch):
    """A learned gain without a bias, wherever a layer is normed."""
    made, init = [], Norm.__init__

    def spy(self, word, width, gain, bias, eps=None):
        init(self, word, width, gain, bias, eps)
        made.append((gain, bias))
    monkeypatch.setattr(Norm, "__init__", spy)
    build(kind, norm_gain=True, bias=False)
    assert made and set(made) == {(True, False)}


def test_inputs_that_do_not_fit():
    for model, x, word in ((build(Encoder, short_conv=2), tokens(1, 8), "left to right"),
                           (build(SpatialTransformer), noise(1, 8, 32), "9 tokens, not 8"),
                           (build(SpatioTemporal), noise(1, 17, 6, 32), "past block_size"),
                           (build(SpatioTemporal), noise(1, 2, 5, 32), "frames are")):
        with pytest.raises(ValueError, match=word):
            model(x)
    for settings in DECODING:
        build(PrefixDecoder, **settings)


def decoded_in_pieces(model, x, full, context, padding=None):
    """What is cached in pieces equals all at once; the last cache."""
    for sizes in ([14], [5, 1, 8], [1] * 14):
        cache = model.new_cache(2, 14)
        close(torch.cat([model.decode(part, context, cache, padding) for part in x.split(sizes, 1)], 1), full)
    return cache


def changed(x, *places):
    """Other tokens at these places."""
    other = x.clone()
    other[:, places] = (x[:, places] + 1) % 20
    return other


@pytest.mark.parametrize("positions, kv", [("learned", 4), ("rope", 2), ("alibi", 4), ("none", 2)])
def test_decoder_sees_the_source_through_the_latents_only(positions, kv):
    model = build(LatentTransformer, positions=positions, n_kv_head=kv)
    source, x, padding = tokens(2, 9), tokens(2, 14, seed=2), paddings(9, 5)[0]
    with torch.no_grad():
        latents = model.encode(source, padding)
        assert latents.shape == (2, 3, 32)
        close(latents[1:], model.encode(source[1:, :5]))
        full = model(source, x, padding=padding)
        close(model.decode(x, latents), full)
        assert (model.decode(x, latents + 0.1) - full).abs().max() > 1e-3
        assert torch.equal(model.decode(changed(x, *range(8, 14)), latents)[:, :8], full[:, :8])  # causal
        cache = decoded_in_pieces(model, x, full, latents)
        cache.crop(6)
        twin, twice = cache.fork(2), x[:, 6:].repeat_interleave(2, 0)
        close(model.decode(x[:, 6:], None, cache), full[:, 6:])
        close(model.decode(twice, None, twin), full[:, 6:].repeat_interleave(2, 0))
        assert twin.bytes == 2 * cache.bytes
    state = model.encode(source).detach().requires_grad_()
    model.decode(x, state).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and state.grad.abs().sum() > 0
    model(source, x, tokens(2, 14, seed=3))[0].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind, settings, padded", [
    *((kind, dict(positions=word), padded) for kind in (EncoderDecoder, PrefixDecoder)
      for word, padded in (("learned", False), ("rope", True), ("alibi", True), ("none", False))),
    (PrefixDecoder, dict(positions="learned"), True), (PrefixDecoder, dict(positions="rope", short_conv=3), True)])
def test_decoder_sees_the_whole_source(kind, settings, padded):
    """Rows of unequal sources equal each alone; cached in pieces equals at once; causal over its own tokens."""
    model = build(kind, n_kv_head=2, **{**settings, "block_size": 32})
    source, x, padding = tokens(2, 9), tokens(2, 14, seed=2), paddings(9, 5)[0] if padded else None
    with torch.no_grad():
        full = model(source, x, padding=padding)
        assert full.shape == (2, 14, 20)
        if padded:
            close(full[1:], model(source[1:, :5], x[1:]))
        moved = (model(source, changed(x, *range(8, 14)), padding=padding) - full).abs().amax(-1)
        assert (moved[:, :8] < 1e-5).all() and (moved[:, 8:] > 0).all()
        for place in (0, 4):                                 # each token of the source is seen, also ahead of others
            assert ((model(changed(source, place), x, padding=padding) - full).abs().amax((1, 2)) > 1e-4).all()
        decoded_in_pieces(model, x, full, model.encode(source, padding), padding)
    loss, nats = model(source, x, x.masked_fill(x == 3, -1), padding)
    loss.backward()
    assert nats.shape == (1, 1) and nats.item() == loss.item()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_prefix_sees_ahead_in_the_source_only():
    """The first token of the source sees its last; with causal order alone it would not."""
    model, source, x = build(PrefixDecoder, positions="rope"), tokens(1, 6), tokens(1, 3, seed=2)
    plain = Transformer(model.config).eval()
    plain.load_state_dict(model.state_dict())
    close(model(source, x), plain(torch.cat([source, x], 1), prefix=6)[:, 6:])
    assert (model(source, x) - plain(torch.cat([source, x], 1))[:, 6:]).abs().max() > 1e-3


@torch.no_grad()
def test_spatial():
    """Places differ, and the first sees the last."""
    model, x = build(SpatialTransformer), noise(2, 9, 32)
    full, other = model(x), x.clone()
    assert full.shape == x.shape and (model(x.flip(1)).flip(1) - full).abs().max() > 1e-3
    other[:, 8] += 1
    assert ((model(other) - full)[:, 0].abs().amax(1) > 0).all()


@pytest.mark.parametrize("positions, kv", [("learned", 4), ("rope", 2), ("alibi", 4), ("none", 2)])
@torch.no_grad()
def test_spatio_temporal(positions, kv):
    model, x = build(SpatioTemporal, positions=positions, n_kv_head=kv), noise(2, 10, 6, 32)
    full, other = model(x), x.clone()
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


@torch.no_grad()
def test_text():
    model, x, y = build(TextTransformer, positions="rope"), tokens(3, 10), tokens(3, 10, seed=2)
    plain = Transformer(model.config).eval()
    plain.load_state_dict(model.state_dict())
    for padding in paddings(10, 6, 2):
        logits, nats, total = model(x, padding=padding), model(x, y, padding)[1], 0.0
        for row, hidden in enumerate(padding):
            alone = plain(x[row:row + 1, ~hidden])
            close(logits[row, ~hidden], alone[0])
            total += torch.nn.functional.cross_entropy(alone[0], y[row, ~hidden], reduction="sum")
        close(nats[0, 0], total / 18)


@pytest.mark.parametrize("shape", [(2, 3, 0, 2, 8), (0, 3, 4, 2, 8), (2, 0, 4, 2, 8)])
def test_frames_without_places(shape):
    """No places, no rows or no frames: nothing, of the shape that was asked for, with a gradient."""
    for attend in (attend_time, formula(attend_time), attend_space):
        x = torch.zeros(shape, requires_grad=True)
        y = attend(x, x, x)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
