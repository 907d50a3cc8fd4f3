"""Text from any checkpoint of train_enwik8.py.

    python sample.py runs/train_enwik8/my_run
    python sample.py runs/train_enwik8/my_run/best.pt --prompt "The history of " --length 99 --temperature 1 --top_p 0.9
    python sample.py runs/train_enwik8/my_run --greedy
    python sample.py runs/train_enwik8/my_run --n_samples 16 --seed 7
    python sample.py runs/train_enwik8/my_run --log_cache                # what each layer's cache held

One sample is written byte by byte as it comes; several are computed as one batch and written when they are done. Same
seed, same text. Positions rope and none roll on past block_size with a sliding cache; learned absolute positions
cannot, so there the model starts again from the last half of its window.
"""
import codecs
import math
import sys

import torch

from experiment import UserError, command, find_checkpoint, load_checkpoint, override, resolve_device
from model import from_checkpoint

# --- What ---
checkpoint = None        # run directory or checkpoint file (may also be typed as a bare word)
weights = "raw"          # [raw, ema] which weights
prompt = "\n"            # what the text begins with
length = 500             # [>= 0] bytes to generate
n_samples = 1            # [>= 1] samples, generated as one batch
seed = 1337              # same seed, same text
# --- How the next byte is drawn ---
temperature = 0.8        # [>= 0.0] below 1 sharpens, above 1 flattens; 0 is greedy
top_k = None             # [none, >= 1] only the k most probable bytes
top_p = None             # [none, > 0.0, <= 1.0] only the most probable bytes that together reach this probability
min_p = None             # [none, >= 0.0, <= 1.0] only bytes at least this fraction as probable as the best
greedy = False           # always the most probable byte
# --- How it is computed ---
cache = True             # reuse what earlier bytes left; off: every byte reads the whole text again, for the same text
log_cache = False        # at the end, on stderr: what each layer's cache holds, and how often it was used
device = "auto"          # auto, cpu, cuda, cuda:1, ...
dtype = "float32"        # [auto, float32, bfloat16, float16] autocast


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Logits (B, V) -> float32 logits (B, V) over temperature, with everything that may not be drawn at -inf.

    The filters look at the distribution after the temperature, in the order top_k, top_p, min_p. top_k keeps exactly k
    bytes and top_p the shortest prefix of the sorted bytes whose sum reaches p; of equal ones the smaller byte value
    comes first. min_p (Nguyen et al. 2024) keeps what is at least min_p times as probable as the best. The best byte
    always stays. temperature must be above 0.
    """
    logits = logits.float() / max(temperature, 1e-30)            # a smaller one would overflow, and change nothing
    if top_k is not None and top_p is None:                      # what the sort below would say, without sorting
        kth = logits.topk(min(top_k, logits.size(-1)), sorted=False).values.amin(-1, keepdim=True)             # (B, 1)
        above, tie = logits > kth, logits == kth
        room = top_k - above.sum(-1, keepdim=True)
        logits = logits.masked_fill(~(above | (tie & (tie.cumsum(-1) <= room))), -torch.inf)
    elif top_p is not None:
        values, order = logits.sort(dim=-1, descending=True, stable=True)                # (B, V)
        if top_k is not None:
            values[:, top_k:] = -torch.inf
        if top_p < 1:
            before = values.softmax(-1).cumsum(-1)[:, :-1]       # (B, V - 1), all that stands before a byte
            values[:, 1:].masked_fill_(before >= top_p, -torch.inf)
        logits = torch.empty_like(values).scatter_(1, order, values)
    if min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def draw(logits, generator, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Logits (B, V) -> next bytes (B,) int64. Temperature 0 takes the most probable and draws no random number.

    Inverse of the cumulated distribution at one uniform number per row, drawn on the generator's own device (CPU), so
    that a seed gives the same text everywhere, without multinomial's checks and waits. generator None: the global one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    u = torch.rand(p.size(0), 1, generator=generator, device=generator.device if generator else None).to(p.device)
    reached = p.cumsum(-1)
    # p > 0: a GPU's cumulated sums may fall by a rounding error where nothing is added.
    return ((reached > u * reached[:, -1:]) & (p > 0)).byte().argmax(-1)                 # the first one


@torch.inference_mode()
def generate(model, prompts, length, generator=None, use_cache=True, report=None, **how):
    """Yields `length` times the next bytes (B,) int64 of all rows, from a cache; the same ones without.

    prompts: list of B byte strings, none empty, of any lengths (shorter ones are padded on the left, masked). Longer
    than block_size: only the last block_size bytes are read. how: temperature, top_k, top_p, min_p. The model should be
    in eval mode. Learned positions: all rows start again at once, when the longest has filled the window. Other
    positions roll on; without a cache the whole text is read again for each byte, full attention limited to the last
    block_size positions. report: called with the cache at the end. Raises ValueError, when the first byte is asked for,
    if a prompt is empty.
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
    if report and use_cache:
        report(cache)


def _left_padded(n_bytes, columns, device):
    """Positions (B, columns) of rows that end together, -1 where a row has no byte; None when every row is full."""
    if bool((n_bytes >= columns).all()):
        return None
    return (torch.arange(columns) - (columns - n_bytes.clamp(max=columns))[:, None]).clamp(min=-1).to(device)


@command
def main():
    override(globals(), positional="checkpoint")
    if checkpoint is None:
        raise UserError("which run? python sample.py runs/train_enwik8/NAME")
    if not prompt:
        raise UserError('--prompt "": must have at least one byte')
    if log_cache and not cache:
        raise UserError("--log_cache with --no-cache: there is no cache to log")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")                 # a terminal may not know every character
    where, precision = resolve_device(device, dtype)
    path = find_checkpoint(checkpoint)
    try:
        model = from_checkpoint(load_checkpoint(path), weights).for_inference().eval().to(where)
    except ValueError as error:
        raise UserError(f"{path}: {error}")
    start = prompt.encode(errors="surrogateescape")              # bytes that the shell passed on as they were
    generator = torch.Generator().manual_seed(seed)
    how = dict(temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with torch.autocast(where.type, precision, enabled=precision != torch.float32):
        report = (lambda held: print(*held.log(), sep="\n", file=sys.stderr)) if log_cache else None
        stream = generate(model, [start] * n_samples, length, generator, cache, report, **how)
        if n_samples == 1:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")                   # a character may take 4 bytes
            sys.stdout.write(decoder.decode(start))
            for token in stream:
                sys.stdout.write(decoder.decode(bytes(token.tolist())))
                sys.stdout.flush()
            sys.stdout.write(decoder.decode(b"", final=True) + "\n")
        else:
            columns = torch.stack(list(stream), 1).tolist() if length else [[]] * n_samples
            for number, row in enumerate(columns, 1):
                print(f"--- sample {number} of {n_samples} ---\n{(start + bytes(row)).decode(errors='replace')}")


if __name__ == "__main__":
    main()
