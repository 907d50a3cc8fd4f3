"""Speed beside nanoGPT: the same architecture and batch, in turns, in one process; and the mixers beside one another.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python bench.py --peer ../nanoGPT                            # training and sampling, both cores
    python bench.py --peer ../nanoGPT --threads 1 --what sample
    python bench.py                                              # ours alone
    python bench.py --what mixers --threads 1                    # generation with and without cache, cost by context
    python bench.py --what worlds --threads 1                    # frames of a world with and without cache
    python bench.py --what dialogs --threads 1                   # forked dialogs with a DialogTree and without

Single timings on a shared machine mean little: each round times both sides right after one another; the table gives
each side's median over the rounds, and the median and quartiles of the rounds' ratios. nanoGPT's model.py is imported
as it is, its loop is what its train.py does on a CPU (float32, fused attention, AdamW, clipping at 1). Ours is the loop
of train_enwik8.py with the preset nanogpt_cpu (bfloat16 autocast). Random bytes: speed does not depend on the text.
"""
import importlib.util
import statistics
import time
from pathlib import Path

import torch

import optim
from cache import DialogTree
from experiment import UserError, command, override
from model import Transformer, TransformerConfig, build_model, parameter_roles
from sample import converse, generate
from worldmodel import CausalDynamics, Dynamics

# --- What ---
peer = None              # nanoGPT's folder; none: ours alone
what = "train,sample"    # train, sample, mixers, worlds, dialogs; several with commas
threads = 0              # [>= 0] CPU threads; 0: as many as PyTorch takes
rounds = 15              # [>= 1] each side is timed once a round
steps = 20               # [>= 1] training steps a round
seed = 0                 # weights and bytes
dtype = "bfloat16"       # [float32, bfloat16] autocast of our training side
# --- Size: nanoGPT's own CPU command ---
n_layer = 4              # [>= 1] transformer blocks
n_head = 4               # [>= 1] attention heads
n_embd = 128             # [>= 1] width
block_size = 64          # [>= 1] context
batch_size = 12          # [>= 1] windows per step
vocab_size = 65          # [>= 2] nanoGPT's distinct characters; ours has always 256 bytes
# --- Mixers: the shape of train_enwik8.py's preset variants_cpu, in float32 ---
mixers = ("full full/n_kv_head=1 full/shorten=2 window strided fixed diff mla xl compressive mamba mingru "
          "mamba,mamba,full")  # with spaces; /n_kv_head=N and /shorten=N change that one
contexts = (512, 2048, 8192)  # bytes before and with the one whose cost is measured
# --- Worlds: frames of 8 x 8 tokens by train_worldmodel.py's dynamics, 2 layers, 4 heads, 64 wide ---
frames = 16              # [>= 2] of a world, the first of them given
decode_steps = 25        # [>= 1] rounds of MaskGIT for a frame
# --- Dialogs: one beginning, 8 branches, 8 leaves each; 2 layers, 4 heads, 128 wide ---
dialog_tokens = (200, 20, 10)  # of the beginning, of a branch, of a leaf
reply_tokens = (1, 8, 32)  # drawn in each dialog; 1 comes out of the prompt's own pass
tree_budgets = (8_000_000, 2_000_000)  # bytes; all that the 64 dialogs hold is 2 to 6 million


def load_peer(folder):
    """nanoGPT's model.py as a module, from its checkout. UserError when it is not there."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise UserError(f"--peer {folder}: no model.py there; git clone https://github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_model():
    """Our side of nanoGPT's architecture: learned positions, LayerNorm with gain, GELU, tied classifier, no biases."""
    return Transformer(TransformerConfig(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, dropout=0.0, positions="learned",
        norm="layer", norm_gain=True, bias=False, activation="gelu", tie_weights=True, n_targets=1,
        intermediate_losses=False))


def their_model(module):
    """nanoGPT's GPT of the same size."""
    return module.GPT(module.GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                                       n_embd=n_embd, dropout=0.0, bias=False))


def our_training(model):
    """A function that does `steps` optimiser steps the way train_enwik8.py does."""
    opt = optim.build("adamw", model.named_parameters(), parameter_roles(model), lr=1e-3, weight_decay=0.1,
                      betas=(0.9, 0.99))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    data = torch.randint(256, (200_000,), dtype=torch.uint8)

    def run():
        for _ in range(steps):
            starts = torch.randint(len(data) - block_size - 1, (batch_size,))
            window = data[starts[:, None] + torch.arange(block_size + 1)].long()         # (B, T + 1)
            with autocast:
                objective, _ = model(window[:, :-1], targets=window[:, 1:, None])
            objective.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
    return run


def their_training(model):
    """A function that does `steps` optimiser steps the way nanoGPT's train.py does on a CPU."""
    opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    data = torch.randint(vocab_size, (200_000,))

    def run():
        for _ in range(steps):
            starts = torch.randint(len(data) - block_size, (batch_size,))
            x = torch.stack([data[i:i + block_size] for i in starts])
            y = torch.stack([data[i + 1:i + 1 + block_size] for i in starts])
            _, loss = model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
    return run


def our_sampling(model, n):
    """A function that draws n rows from one byte up to block_size bytes, with the KV cache."""
    model.eval()

    def run():
        generator = torch.Generator().manual_seed(seed)
        for _ in generate(model, [b"\n"] * n, block_size - 1, generator, temperature=0.8, top_k=50):
            pass
    return run


def their_sampling(model, n):
    """The same by nanoGPT's generate()."""
    model.eval()

    def run():
        model.generate(torch.zeros((n, 1), dtype=torch.long), block_size - 1, temperature=0.8, top_k=50)
    return run


def compare(name, tokens, ours, theirs):
    """Times both in turns and prints tokens per second (medians) and the median ratio with its quartiles."""
    for run in filter(None, (ours, theirs)):
        run()                                                    # warm-up: allocation, thread pools
    times = []
    for i in range(rounds):
        order = (ours, theirs) if i % 2 == 0 else (theirs, ours)
        taken = {}
        for run in filter(None, order):
            began = time.perf_counter()
            run()
            taken[run] = time.perf_counter() - began
        times.append((taken[ours], taken.get(theirs)))
    mine = tokens / statistics.median(a for a, _ in times)
    if theirs is None:
        print(f"{name:<22} {mine:>12,.0f} {'':>12} {'':>8}")
        return
    ratios = sorted(b / a for a, b in times)
    quartiles = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    print(f"{name:<22} {mine:>12,.0f} {tokens / statistics.median(b for _, b in times):>12,.0f} "
          f"{statistics.median(ratios):>7.2f}x   ({quartiles[0]:.2f} .. {quartiles[2]:.2f})")


def best_of(run, n):
    """Seconds of the fastest of n runs: a neighbour on the machine only ever adds."""
    taken = []
    for _ in range(n):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


@torch.inference_mode()
def compare_mixers():
    """Prints for each mixer: cache bytes, generation with and without cache, and what a byte costs by its context."""
    T = 256
    heads = [f"read {n}" for n in contexts] + [f"write {n}" for n in contexts]
    print(f"6 layers, 4 heads, 256 wide, block {T}, window 128, memories {T}; float32, batch 1, random weights\n"
          f"read N: microseconds a byte, N bytes in one pass; write N: microseconds for one byte more, N in the cache\n"
          f"{'mixer':<20} {'cache B/byte':>12} {'kB at 8192':>10} {'gen B/s':>8} {'no cache':>8} {'ratio':>6} "
          + " ".join(f"{head:>10}" for head in heads))
    for words in mixers.split():
        mixer, _, other = words.partition("/")
        name, _, number = other.partition("=")
        if other and (name not in ("n_kv_head", "shorten") or not number.isdecimal()):
            raise UserError(f"--mixers {words}: a mixer, or one with /n_kv_head=N or /shorten=N")
        torch.manual_seed(seed)
        try:
            model = build_model(TransformerConfig(
                n_layer=6, n_head=4, n_embd=256, block_size=T, positions="rope", norm="rms", norm_gain=False,
                bias=False, activation="relu2", mixer=mixer, **({name: int(number)} if other else {}))).eval()
        except ValueError as error:
            raise UserError(f"--mixers {words}: {error}") from None
        prompt = bytes(range(128))
        rate = {use: 64 / best_of(lambda: list(generate(model, [prompt], 64, use_cache=use, temperature=0)), 3)
                for use in (True, False)}
        short, long = (model.new_cache(1, n).bytes for n in (1024, 8192))
        costs = []
        for n in contexts:
            x = torch.randint(256, (1, n))
            costs.append(best_of(lambda: model(x), 2) / n * 1e6)
        for n in contexts:
            cache = model.new_cache(1, n + 64)
            model(torch.randint(256, (1, n)), cache=cache)
            byte = torch.randint(256, (1, 1))
            costs.append(statistics.median(best_of(lambda: model(byte, cache=cache), 1) for _ in range(40)) * 1e6)
        print(f"{words:<20} {(long - short) / (8192 - 1024):>12,.0f} {long / 1000:>10,.0f} {rate[True]:>8,.0f} "
              f"{rate[False]:>8,.0f} {rate[True] / rate[False]:>6.1f} " + " ".join(f"{cost:>10,.0f}" for cost in costs),
              flush=True)


@torch.inference_mode()
def compare_worlds():
    """Prints for each dynamics and batch: frames per second with and without cache, their ratio, whether all tokens
    are the same, and the cache's bytes."""
    print(f"8 x 8 tokens of 8 codes a frame, 2 layers, 4 heads, 64 wide; {frames - 1} frames after one, MaskGIT in "
          f"{decode_steps} rounds at temperature 1; float32, random weights, best of 3\n"
          f"{'dynamics':<12} {'batch':>5} {'cached f/s':>10} {'without':>8} {'ratio':>6} {'tokens':>9} {'cache kB':>9}")
    for name, kind in (("maskgit", Dynamics), ("prepend", Dynamics), ("causal", CausalDynamics)):
        torch.manual_seed(seed)
        how = dict(action_input="prepend") if name == "prepend" else {}
        model = kind((8, 8), 8, 5, block_size=frames, **how).eval()
        for batch in (1, 16) if kind is Dynamics else (1,):
            first, plan = torch.randint(8, (batch, 1, 64)), torch.randint(5, (batch, frames - 1))
            made, rate = {}, {}
            for cached in (True, False):
                def run():
                    made[cached] = model.generate(first, torch.full((batch, 1), 5), plan, cached, steps=decode_steps,
                                                  generator=torch.Generator().manual_seed(seed))
                rate[cached] = batch * (frames - 1) / best_of(run, 3)
            same = "identical" if torch.equal(made[True], made[False]) else "DIFFER"
            print(f"{name:<12} {batch:>5} {rate[True]:>10,.1f} {rate[False]:>8,.1f} {rate[True] / rate[False]:>6.1f} "
                  f"{same:>9} {model.new_cache(batch, frames).bytes / 1000:>9,.0f}", flush=True)


class WatchedTree(DialogTree):
    """A DialogTree that looks at its bytes after every operation: `most`, the largest number."""
    most = 0

    def _look(self, result):
        self.most = max(self.most, self.device_bytes)
        return result

    def lock(self, tokens):
        """As DialogTree.lock."""
        return self._look(super().lock(tokens))

    def unlock(self, prefix):
        """As DialogTree.unlock."""
        return self._look(super().unlock(prefix))

    def take(self, prefixes, max_length):
        """As DialogTree.take."""
        return self._look(super().take(prefixes, max_length))

    def put(self, tokens, cache, row=0):
        """As DialogTree.put."""
        return self._look(super().put(tokens, cache, row))


def compare_dialogs():
    """Prints for each budget and length of reply: tokens per second of `converse` with a tree that is empty at first,
    and without, the median ratio of the rounds and its quartiles, the tree's largest number of bytes, and whether all
    replies are the same. Raises RuntimeError where a tree exceeded its budget.

    Tokens are the same on both sides: all that the 64 prompts have, whether read or found, and all that is drawn. Both
    sides are one batch of 64 rows; beginnings and branches, which only the tree's side has, are batches of 1 and 8.
    """
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(
        n_layer=2, n_head=4, n_embd=128, block_size=sum(dialog_tokens), positions="rope", norm="rms", norm_gain=False,
        bias=False, activation="relu2", init="xavier")).eval()
    base, branches, leaves = (torch.randint(256, (*shape, n)) for shape, n in zip(((), (8,), (8, 8)), dialog_tokens))
    prompts = [[*base.tolist(), *branches[i].tolist(), *leaves[i, j].tolist()] for i in range(8) for j in range(8)]
    print(f"64 dialogs, {' + '.join(map(str, dialog_tokens))} tokens, in 1, 8 and 64 kinds; 2 layers, 4 heads, 128 "
          f"wide, greedy, float32, random weights; {rounds} rounds\n"
          f"{'budget':>10} {'reply':>6} {'tree tok/s':>11} {'without':>9} {'ratio':>8}   {'(quartiles)':<18} "
          f"{'most bytes':>11} {'replies':>9}")
    for budget in tree_budgets:
        for n in reply_tokens:
            replies, most, times = {}, 0, {"tree": [], "without": []}
            for i in range(-1, rounds):                          # one to warm up
                for side in ("tree", "without") if i % 2 == 0 else ("without", "tree"):
                    began = time.perf_counter()
                    tree = WatchedTree(model, budget, host_budget=0) if side == "tree" else None
                    replies[side] = converse(model, prompts, n, None, tree=tree)
                    taken = time.perf_counter() - began
                    if tree is not None:
                        most = max(most, tree.most)
                    if i >= 0:
                        times[side].append(taken)
            if most > budget:
                raise RuntimeError(f"the tree held {most} bytes with a budget of {budget}")
            tokens = 64 * (sum(dialog_tokens) + n)
            rate = {side: tokens / statistics.median(taken) for side, taken in times.items()}
            ratios = [b / a for a, b in zip(times["tree"], times["without"])]
            quartiles = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
            same = [reply.tokens for reply in replies["tree"]] == [reply.tokens for reply in replies["without"]]
            print(f"{budget:>10,} {n:>6} {rate['tree']:>11,.0f} {rate['without']:>9,.0f} "
                  f"{statistics.median(ratios):>7.2f}x   {f'({quartiles[0]:.2f} .. {quartiles[2]:.2f})':<18} "
                  f"{most:>11,} {'identical' if same else 'DIFFER':>9}", flush=True)


@command
def main():
    override(globals())
    kinds = what.split(",")
    if not set(kinds) <= {"train", "sample", "mixers", "worlds", "dialogs"}:
        raise UserError(f"--what {what}: train, sample, mixers, worlds, dialogs, or several with commas")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if "mixers" in kinds:
        compare_mixers()
    if "worlds" in kinds:
        compare_worlds()
    if "dialogs" in kinds:
        compare_dialogs()
    if not set(kinds) & {"train", "sample"}:
        return
    module = load_peer(peer) if peer else None
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {n_layer} layers, {n_head} heads, "
          f"{n_embd} wide, block {block_size}; {rounds} rounds")
    print(f"{'':<22} {'ours tok/s':>12} {'nanoGPT':>12} {'ratio':>8}   (quartiles)")
    if "train" in kinds:
        compare(f"train, batch {batch_size}", steps * batch_size * block_size, our_training(our_model()),
                their_training(their_model(module)) if module else None)
    if "sample" in kinds:
        for n in (1, 16):
            compare(f"sample, batch {n}", n * (block_size - 1), our_sampling(our_model().for_inference(), n),
                    their_sampling(their_model(module), n) if module else None)


if __name__ == "__main__":
    main()
