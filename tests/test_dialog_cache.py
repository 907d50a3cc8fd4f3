"""What a tree of dialogs holds beyond a dialog's logits (test_variants.py): a sliding window, other types, inference
mode, pages that went and came back bit for bit; what a tree refuses."""
import pytest
import torch

from model import Transformer, TransformerConfig, build_model
from models.encoder_decoder import Encoder, EncoderDecoder, PrefixDecoder
from models.video import SpatioTemporal
from nanolab.cache import Cache
from nanolab.dialog_tree import DialogTree
from test_dialog_tree import check, nodes_of


SMALL = dict(n_layer=3, n_head=4, n_embd=32, block_size=8, init="xavier", positions="rope", window=6, sparse_stride=4,
             sparse_summary=1, memory_length=8, compressed_length=4, compression_rate=2)

pytestmark = pytest.mark.usefixtures("one_thread")


def build(mixer="full", seed=0, **settings):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**{**SMALL, "mixer": mixer, **settings})).eval()


def text(n, seed=1):
    return torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed))


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def whole(model, tokens, **settings):
    """Logits (n, V) of a dialog without any cache."""
    return model(tokens[None], **settings)[0]


@torch.no_grad()
def turn(model, tree, tokens, max_length=96):
    """Reads a dialog through the tree: logits (new, V) of what was not held, and how much was."""
    with tree.lock(tokens) as prefix:
        cache = tree.take(prefix, max_length)
        assert cache.length == prefix.length and all(layer.length == prefix.length for layer in cache.layers)
        logits = model(tokens[None, prefix.length:], cache=cache)[0] if prefix.length < len(tokens) else None
        assert tree.put(tokens, cache) == len(tokens)
    return logits, prefix.length


# --- Logits equal those without a cache ---

@pytest.mark.parametrize("mixer", ["full", "mla,full", "strided", "mamba,full"])
def test_sliding_caches(mixer):
    """Full attention limited to the last 6 positions, as for generation without end."""
    model = build(mixer)
    tree, base = DialogTree(model, budget=None, window=6), text(9)
    assert_close(turn(model, tree, base, 8)[0], whole(model, base, window=6))
    dialog = torch.cat((base, text(40, seed=2)))
    logits, n = turn(model, tree, dialog, 8)
    assert n == 9
    assert_close(logits, whole(model, dialog, window=6)[9:])
    early = torch.cat((base[:7], text(9, seed=3)))  # 7 positions: the last 5 are held, all that a window of 6 shows
    logits, n = turn(model, tree, early, 8)
    assert n == (0 if "mamba" in mixer else 7)
    assert_close(logits, whole(model, early, window=6)[n:])
    assert turn(model, tree, dialog)[1] == 49
    with pytest.raises(ValueError, match="not of this tree's model"):
        cache = model.new_cache(1, 8)
        model(base[None, :8], cache=cache)
        tree.put(base[:8], cache)


def test_what_was_put_in_inference_mode_serves_outside():
    model, dialog = build("mamba,window,full"), text(20)
    tree = DialogTree(model, budget=None)
    with torch.inference_mode():
        for n in (8, 20):
            with tree.lock(dialog[:n]) as prefix:
                cache = tree.take(prefix, 40)
                model(dialog[None, prefix.length:n], cache=cache)
                tree.put(dialog[:n], cache)
        locks = [tree.lock(dialog), tree.lock(dialog[:8])]
        ragged = tree.take(locks, 40)
    check(tree, locks)
    logits = model(torch.stack((dialog[:2], dialog[8:10])), cache=ragged)  # with gradients on
    assert logits.requires_grad and torch.allclose(logits[1], whole(model, dialog)[8:10], atol=1e-5)


@pytest.mark.parametrize("kind", ["autocast", "dtype"])
@pytest.mark.parametrize("mixer", ["full", "compressive", "mamba,full"])
def test_bfloat16(mixer, kind):
    """The type that the tree was made with holds, whatever autocast says later."""
    model, dialog = build(mixer), text(20)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        tree = DialogTree(model, budget=None, dtype=torch.bfloat16 if kind == "dtype" else None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        turn(model, tree, dialog[:9])
    tree_dtypes = {t.dtype for node in nodes_of(tree).values() for _, tensors in node.parts for t in tensors}
    assert torch.bfloat16 in tree_dtypes
    logits, n = turn(model, tree, dialog)
    assert n == 9
    torch.testing.assert_close(logits, whole(model, dialog)[9:], atol=0.1, rtol=0.1)


# --- Paging ---

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mixer", ["mla", "window,full", "mingru,full", "compressive"])
def test_page_out_and_in_is_bit_identical(mixer, device):
    model = build(mixer).to(device)
    dialogs = [torch.cat((text(12), text(8, seed=s))).to(device) for s in (2, 3, 4)]
    tree = DialogTree(model, budget=None)
    turn(model, tree, dialogs[0][:12])
    for dialog in dialogs:
        turn(model, tree, dialog)
    one = max(sum(node.bytes for node in child.path) for child in nodes_of(tree).values())

    def read():
        found = []
        for i, dialog in enumerate(dialogs):
            with tree.lock(dialog) as prefix, torch.no_grad():
                assert prefix.length == 20
                check(tree, [prefix])
                found.append(model(text(3, seed=i)[None].to(device), cache=tree.take(prefix, 40)))
        return torch.stack(found)
    before, nodes = read(), nodes_of(tree)
    bits = {end: [t.cpu() for _, tensors in node.parts for t in tensors] for end, node in nodes.items()}
    assert tree.host_bytes == 0
    tree._limits["device"] = one  # as if the budget had been so from the start
    tree._make_room("device", 0)
    assert torch.equal(read(), before) and torch.equal(read(), before)
    stats = tree.stats()
    assert stats["page_ins"] >= 4 and stats["evictions"] >= 6 and stats["drops"] == 0
    assert tree.host_bytes > 0 and tree.device_bytes <= one
    for end, node in check(tree).items():
        tensors = [t for _, tensors in node.parts for t in tensors]
        assert all(t.device.type == ("cpu" if node.place == "host" else device) for t in tensors)
        assert all(torch.equal(t.cpu(), old) for t, old in zip(tensors, bits[end], strict=True))


def test_a_page_is_a_copy():
    """Nothing of a page that left is still in use, neither by the tree nor through a cache that was taken from it."""
    model, dialog = build("mamba,full"), text(20)
    tree = DialogTree(model, budget=None)
    turn(model, tree, dialog)
    with tree.lock(dialog) as prefix:
        cache, other = tree.take(prefix, 40), tree.take([prefix, prefix], 40)
    (node,) = nodes_of(tree).values()
    for place in ("host", "device"):
        old = [t for _, tensors in node.parts for t in tensors]
        tree._move(node, place)
        new = [t for _, tensors in node.parts for t in tensors]
        assert not {t.data_ptr() for t in old} & {t.data_ptr() for t in new}
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
        for t in old:
            t.fill_(torch.nan)
    for held, rows in ((cache, 1), (other, 2)):
        with torch.no_grad():
            logits = model(text(2)[None].repeat(rows, 1), cache=held)[0]
        assert_close(logits, whole(model, torch.cat((dialog, text(2))))[-2:])
    tree._move(node, "host")
    assert turn(model, tree, dialog) == (None, 20) and tree.stats()["page_ins"] == 2


# --- What cannot be ---

def test_models_that_a_tree_refuses():
    config = TransformerConfig(**{**SMALL, "block_size": 32})

    class Other:
        def new_cache(self, *a, **how):
            return Cache([object()])
    for model, word in ((build_model(TransformerConfig(**{**SMALL, "shorten": 2})), "Pyramid.* a PyramidCache"),
                        (EncoderDecoder(config), "EncoderDecoder.* a ContextCache"), (Encoder(config), "whole input"),
                        (SpatioTemporal(config, 4), "layer 0 of SpatioTemporal with its KVCache has not"),
                        (Other(), "layer 0 of Other with its object has not")):
        with pytest.raises(ValueError, match=word) as error:
            DialogTree(model, 1000)
        assert "\n" not in str(error.value)
    for budgets, word in (((-1,), "^budget is -1"), ((5, -2), "host_budget is -2")):
        with pytest.raises(ValueError, match=word):
            DialogTree(build(), *budgets)


def test_a_prefix_that_saw_itself_is_refused():
    model, tokens = build("full"), text(8)
    tree, cache = DialogTree(model, None), model.new_cache(1, 16)
    with torch.no_grad():
        model(tokens[None], cache=cache, prefix=4)
    with pytest.raises(ValueError, match="first 4 positions saw one another"):
        tree.put(tokens, cache)
    torch.manual_seed(0)
    model = PrefixDecoder(TransformerConfig(**{**SMALL, "block_size": 32})).eval()
    tree, cache = DialogTree(model, None), model.new_cache(1, 8)
    with torch.no_grad():
        model.decode(tokens[None, 5:], tokens[None, :5], cache)
    with pytest.raises(ValueError, match="first 5 positions saw one another"):
        tree.put(tokens, cache)
    assert tree.match(tokens) == 0


@torch.no_grad()
def test_calls_that_cannot_be():
    model, tokens = build("full"), text(8)
    tree, cache = DialogTree(model, None), model.new_cache(2, 16)
    model(tokens.expand(2, 8), cache=cache)
    lock = tree.lock(tokens)
    lock.unlock()
    far, gaps = model.new_cache(1, 16), model.new_cache(1, 16)
    model(tokens[None], positions=torch.arange(2, 10)[None], cache=far)
    model(tokens[None], positions=torch.tensor([[0, 1, 2, 3, 5, 6, 7, 8]]), cache=gaps)
    double = model.new_cache(1, 16, dtype=torch.float64)
    wide = build("full", n_kv_head=2).new_cache(1, 16)
    cases = [(lambda: tree.put(tokens[:7], cache), "has read 8 positions, but there are 7 tokens"),
             (lambda: tree.put([*tokens, 1], cache), "has read 8 positions, but there are 9 tokens"),
             (lambda: tree.put(tokens, cache, 2), "no row 2 in a cache of 2"),
             (lambda: tree.put(tokens, cache, -1), "no row -1"),
             (lambda: tree.put([*tokens, 1, 1], far), "positions 2 ... 9 in layer 0"),
             (lambda: tree.put([*tokens, 1], gaps), "consecutive positions"),
             *((lambda other=other: tree.put([], other), "not of this tree's model") for other in (
                 double, wide, model.new_cache(1, 16, window=8), build("mla").new_cache(1, 16),
                 build("full", n_layer=2).new_cache(1, 16), build("mamba").new_cache(1, 16), [])),
             (lambda: tree.put(tokens[None], cache), r"not \(1, 8\)"), (lambda: tree.take([], 8), "must be a prefix"),
             (lambda: tree.take(lock, 8), "not locked"), (lock.unlock, "not locked"),
             (lambda: DialogTree(model, None).take(tree.lock(tokens), 8), "not in this tree")]
    for call, word in cases:
        with pytest.raises(ValueError, match=word):
            call()
    for wrong in ("text", [1.5]):
        with pytest.raises(TypeError):
            tree.match(wrong)
    assert not nodes_of(tree)
    assert tree.put(tokens, cache, 1) == 8
    with tree.lock(tokens) as prefix, pytest.raises(ValueError, match="8 positions, which exceed max_length 7"):
        tree.take(prefix, 7)
    with pytest.raises(RuntimeError), tree.lock(tokens) as prefix:
        raise RuntimeError
    assert not prefix.locked and check(tree)
