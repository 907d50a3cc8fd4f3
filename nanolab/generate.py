"""A checkpoint's model, what a run that begins with it takes over, and its next byte or id: filters, drawing, and
`generate`, which goes on with a batch of prompts from a cache."""
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

import kernels
from data import tokens
from data.tokenized import tokenizer_of
from model import TransformerConfig, from_checkpoint, variant
from nanolab import hf
from nanolab.run import UserError, as_user_error, find_checkpoint, load_checkpoint


def load_model(path, weights):
    """(checkpoint, its Transformer on the CPU) of a script that trains one over text or tokens, or of a folder of
    weights (see nanolab/hf.py), which is told as a checkpoint of train_facts would be.

    UserError: another script's, weights that it has not, a model of another version.
    """
    if path.is_dir():
        return hf.as_checkpoint(path, weights)
    loaded = hf.complete(load_checkpoint(path))
    if loaded["script"] not in ("train_enwik8", "train_facts"):
        raise UserError(f"{path} is a checkpoint of {loaded['script']}.py: here one of train_enwik8.py or "
                        "train_facts.py is needed")
    with as_user_error(f"{path}: "):
        return loaded, from_checkpoint(loaded, weights)


@dataclass
class Beginning:
    """What a run begins with by --init_from: a state dict, the text of a tokenizer.json (None: bytes), the rows of the
    embedding, which may be more than a tokenizer has ids, and, where its checkpoints hold adapters alone, the digest of
    these weights. On resume no weights; without --init_from nothing."""
    weights: dict = None
    text: str = None
    rows: int = None
    base: str = None

    def tokenizer(self):
        """What a Text task is told: {} or its tokenizer."""
        return {"tokenizer": tokens.Published(self.text.encode())} if self.text else {}

    def kept(self):
        """What the run's checkpoints hold beside the rest: the tokenizer's text, the base's digest, where there are."""
        return {name: value for name, value in (("tokenizer_json", self.text), ("base", self.base)) if value}

    def kept_of(self, model):
        """What they hold of the model."""
        return variant("models.low_rank:Adapters")(model) if self.base else model

    def vocab_size(self, n):
        """The rows of the embedding for n ids. UserError: it has fewer."""
        if self.rows is not None and n > self.rows:
            raise UserError(f"--init_from: its embedding has {self.rows:,} rows, but this text needs {n:,}")
        return n if self.rows is None else self.rows


def begin_from(settings, checkpoint):
    """The Beginning of a run, whose settings are then those of the folder or run that init_from names, but block_size,
    which only learned positions bound. On resume that is read only where the checkpoint holds adapters alone.
    UserError: as `load_model` or `hf.complete`, a flag that says otherwise, adapters of nothing."""
    folder = settings["init_from"]
    if settings["lora_rank"] and settings["optimizer"] == "ivon":
        raise UserError("optimizer ivon has a posterior of all weights, lora_rank leaves most as they are: choose "
                        "another")
    if checkpoint:
        hf.complete(checkpoint)
        kernels.use(settings["kernels"])                         # not by those of the base
        return Beginning(None, checkpoint.get("tokenizer_json"), folder and checkpoint.get("vocab_size"),
                         checkpoint.get("base"))
    if folder is None:
        if settings["lora_rank"]:
            raise UserError(f"--lora_rank {settings['lora_rank']} adapts a model that is there: which? --init_from, a "
                            "folder of weights or a run")
        return Beginning()
    if settings.get("task", "text") != "text":
        raise UserError("--init_from is for text: --task text")
    loaded, model = load_model(find_checkpoint(folder), "raw")
    kernels.use(settings["kernels"])                             # not by those of the base
    c, state, block_size = model.config, model.state_dict(), settings["block_size"]
    sizes = {name: getattr(c, name) for name in TransformerConfig.shape()
             if name not in ("block_size", "vocab_size", "lora_rank", "lora_on", "lora_alpha")}
    tokenizer, text = its_tokenizer(loaded)
    if "tokenizer" in settings:
        sizes["tokenizer"] = tokenizer
    elif text or c.vocab_size != 256:
        raise UserError(f"--init_from {folder}: its tokenizer is not bytes: train_facts.py --task text takes it")
    for name in [name for name in sizes if name not in settings and sizes[name] != getattr(TransformerConfig, name)]:
        raise UserError(f"--init_from {folder}: its {name} is {sizes[name]}, which train_enwik8.py alone trains")
    typed = [name for name in settings.flags if name in sizes and settings[name] != sizes[name]]
    if typed:
        raise UserError(f"--{typed[0]} {settings[typed[0]]}: by --init_from it is {sizes[typed[0]]}: leave it out")
    if c.rope_scaling in ("yarn", "llama3") and c.rope_original is None:
        sizes["rope_original"] = max(1, round(c.block_size / c.rope_factor))
    if c.learned_positions:
        if "block_size" in settings.flags and block_size > c.block_size:
            raise UserError(f"--block_size {block_size}: by --init_from positions end at {c.block_size}")
        block_size = min(block_size or c.block_size, c.block_size)
        state = hf.cut(state, block_size)
    settings.put(**{name: value for name, value in sizes.items() if name in settings}, block_size=block_size)
    alone = settings["lora_rank"] and settings["lora_only"]
    if alone:
        settings.put(init_from=str(Path(folder).resolve()))      # from where it is resumed, too
    print(f"from {folder}: {model.n_params():,} parameters")
    return Beginning(state, text, c.vocab_size, hf.digest_of(model) if alone else None)


def its_tokenizer(loaded):
    """(what train_facts' setting `tokenizer` is for a checkpoint's model, the text of its tokenizer.json, None of
    bytes). UserError: it was not trained on text."""
    settings, text = loaded["settings"], loaded.get("tokenizer_json")
    if settings.get("task", "text") != "text":
        raise UserError(f"{loaded.path} was trained on {settings['task']}, not on text")
    name = settings.get("tokenizer", "bytes")
    if text is None and name != "bytes":                         # trained by that run
        found = tokenizer_of(settings)
        tokens.check(found, loaded["tokenizer"])
        text = tokens.as_json(found)
    return name, text


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None):
    """Logits (B, V) -> float32 logits (B, V) over temperature, with everything that may not be drawn at -inf.

    The filters look at the distribution after the temperature, in the order top_k, top_p, typical_p, min_p, each at
    what the one before it left. top_k keeps exactly k bytes and top_p the shortest prefix of the sorted bytes whose sum
    reaches p; of equal ones the smaller byte value comes first. typical_p (Meister et al. 2022) does the same with the
    bytes sorted by how far their surprisal, -ln p, is from its mean, the entropy. min_p (Nguyen et al. 2024) keeps what
    is at least min_p times as probable as the best. The first byte always stays: the best, or the most typical, which
    may be another. temperature must be above 0.
    """
    logits = logits.float() / max(temperature, 1e-30)            # a smaller one would overflow, and change nothing
    if top_k is not None and top_p is None:                      # what the sort below would say, without sorting
        k = min(top_k, logits.size(-1))
        kth = logits.topk(k, sorted=False).values.amin(-1, keepdim=True)                 # (B, 1)
        drop = logits < kth
        if drop.device.type != "cpu" or int(drop.sum()) != drop.numel() - k * len(drop):                # ties
            tie = logits == kth
            room = k - (logits > kth).sum(-1, keepdim=True)
            drop |= tie & (tie.cumsum(-1) > room)
        logits = logits.masked_fill(drop, -torch.inf)
    elif top_p is not None:
        values, order = logits.sort(dim=-1, descending=True, stable=True)                # (B, V)
        if top_k is not None:
            values[:, top_k:] = -torch.inf
        if top_p < 1:
            before = values.softmax(-1).cumsum(-1)[:, :-1]       # (B, V - 1), all that stands before a byte
            values[:, 1:].masked_fill_(before >= top_p, -torch.inf)
        logits = torch.empty_like(values).scatter_(1, order, values)
    if typical_p is not None and typical_p < 1:
        surprisal, p = -logits.log_softmax(-1), logits.softmax(-1)                       # (B, V)
        order = (surprisal - torch.special.entr(p).sum(-1, keepdim=True)).abs().argsort(dim=-1, stable=True)
        before = p.gather(1, order).cumsum(-1)[:, :-1]                                   # (B, V - 1)
        drop = torch.zeros_like(p, dtype=torch.bool).scatter_(1, order[:, 1:], before >= typical_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def draw(logits, generator, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None):
    """Logits (B, V) -> next bytes (B,) int64. Temperature 0 takes the most probable and draws no random number.

    Inverse of the cumulated distribution at one uniform number per row, drawn on the generator's own device (CPU), so
    that a seed gives the same text everywhere, without multinomial's checks and waits. generator None: the global one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    u = torch.rand(logits.size(0), 1, generator=generator, device=generator.device if generator else None)
    if logits.size(0) == 1 and logits.device.type == "cpu" and not (top_p or min_p or typical_p):
        token = draw_of_few(logits[0], u.item(), temperature, top_k)
        if token is not None:
            return torch.full((1,), token)
    p = filter_logits(logits, temperature, top_k, top_p, min_p, typical_p).softmax(-1)
    reached = p.cumsum(-1)
    level = u.to(p.device) * reached[:, -1:]
    if p.device.type != "cpu":
        return first_past(reached, level, p)
    return torch.searchsorted(reached, level, right=True)[:, 0].clamp_(max=p.size(1) - 1)


def draw_of_few(logits, u, temperature, top_k, few=256):
    """The byte that `draw` takes at the uniform number u, an int, from logits (V,) on the CPU; None where more than
    `few` may be drawn, or equal ones stand at the edge of top_k.

    Python's own numbers: a dozen operations on a tensor of 256 cost a lone row more than this loop.
    """
    V = logits.numel()
    k = V if top_k is None else min(top_k, V)
    if k > few:
        return None
    if k == V:
        kept = list(enumerate(logits.tolist()))                  # (byte, logit), in the order of bytes
        best = max(logit for _, logit in kept)
    else:
        values, order = (t.tolist() for t in logits.topk(k + 1))
        if values[k - 1] == values[k]:
            return None
        best, kept = values[0], sorted(zip(order[:k], values))
    scale = 1 / max(temperature, 1e-30)
    reached = list(accumulate(math.exp((logit - best) * scale) for _, logit in kept))
    return kept[min(bisect_right(reached, u * reached[-1]), k - 1)][0]


def first_past(reached, level, p):
    """The first byte (B,) int64 that can be drawn, of p (B, V) above 0, and whose sum (B, V) is past the level (B, 1).

    What searchsorted says on a CPU. A GPU's sums may move by a rounding error where nothing is added.
    """
    return ((reached > level) & (p > 0)).byte().argmax(-1)


@torch.inference_mode()
def generate(model, prompts, length, generator=None, use_cache=True, log=None, **how):
    """Yields `length` times the next bytes (B,) int64 of all rows, from a cache; the same ones without.

    prompts: list of B byte strings, none empty, of any lengths (shorter ones are padded on the left, masked). Longer
    than block_size: only the last block_size bytes are read. how: temperature, top_k, top_p, min_p, typical_p. The
    model should be in eval mode. Learned positions: all rows start again at once, when the longest has filled the
    window. Other positions roll on; without a cache the whole text is read again for each byte, full attention limited
    to the last block_size positions. log: an open file, to which goes at the end what each layer's cache held. Raises
    ValueError, when the first byte is asked for, if a prompt is empty.
    """
    T = model.config.block_size
    where = next(model.parameters()).device
    rolls = T > 1 and model.config.rolls
    rows = [list(prompt[-T:]) for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("there must be a prompt, and each must have at least one byte")
    n_bytes = torch.tensor([len(row) for row in rows])           # bytes of each row so far
    columns = int(n_bytes.max())
    x = torch.tensor([[0] * (columns - len(row)) + row for row in rows], device=where)   # (B, columns), padded left
    recent, held = [x], columns                                  # what a restart would read, and its bytes
    positions = _left_padded(n_bytes, columns, where)
    window = T if rolls else None
    cache = model.new_cache(len(rows), T, window=window) if use_cache else None
    for step in range(length):
        if not rolls and held > T:                               # the window is full: start again from its last half
            if cache is not None:
                cache.reset()
            x = torch.cat(recent, 1)[:, -max(1, T // 2):]
            recent, held = [x], x.size(1)
            positions = _left_padded(n_bytes + step, x.size(1), where)
        if use_cache:
            logits = model(x, positions=positions, cache=cache)[:, -1]                   # (B, V)
        else:
            logits = model(torch.cat(recent, 1), positions=positions, window=window)[:, -1]
        token = draw(logits, generator, **how)
        yield token
        x = token[:, None]                                                               # (B, 1)
        if positions is not None:
            ahead = positions[:, -1:] + 1
            positions = ahead if use_cache else torch.cat((positions, ahead), 1)
        if not (rolls and use_cache):
            recent.append(x)
            held += 1
    if log is not None and use_cache:
        print(*cache.log(), sep="\n", file=log)


def _left_padded(n_bytes, columns, device):
    """Positions (B, columns) of rows that end together, -1 where a row has no byte; None when every row is full."""
    if bool((n_bytes >= columns).all()):
        return None
    return (torch.arange(columns) - (columns - n_bytes.clamp(max=columns))[:, None]).clamp(min=-1).to(device)
