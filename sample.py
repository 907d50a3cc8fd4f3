"""Text from any checkpoint of train_enwik8.py, or of train_facts.py's task text.

    python sample.py runs/train_enwik8/my_run
    python sample.py runs/train_enwik8/my_run/best.pt --prompt "The history of " --length 99 --temperature 1 --top_p 0.9
    python sample.py runs/train_enwik8/my_run --greedy
    python sample.py runs/train_enwik8/my_run --n_samples 16 --seed 7
    python sample.py runs/train_enwik8/my_run --greedy --draft lookup    # the same text in fewer passes
    python sample.py runs/train_enwik8/my_run --log_cache                # what each layer's cache held

One sample is written byte by byte as it comes; several are computed as one batch and written when they are done. Same
seed, same text. Past block_size a sliding cache rolls on; learned absolute positions
cannot, so there the model starts again from the last half of its window. More: docs/runs.md.
"""
from nanolab.settings import answer_help, shown

answer_help(__name__, __file__, "checkpoint")  # before the seconds that the next lines take

import codecs
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's: a lone byte's products are too small to be shared

import numpy as np
import torch

from data import tokens
from nanolab.generate import Draft, Ngrams, generate
from nanolab.hf import load_model, tokenizer_in
from nanolab.run import UserError, command, find_checkpoint, override, resolve_device

# --- What ---
checkpoint = None        # run directory, checkpoint file, or a folder of weights (may also be typed as a bare word)
weights = "raw"          # [raw, ema] which weights
prompt = "\n"            # what the text begins with
length = 500             # [>= 0, <= 1e9] bytes to generate, or ids of a tokenizer
n_samples = 1            # [>= 1, <= 100_000] samples, generated as one batch
seed = 1337              # [>= 0] same seed, same text
# --- How the next byte is drawn ---
temperature = 0.8        # [>= 0.0, <= 1e6] below 1 sharpens, above 1 flattens; 0 is greedy
top_k = None             # [none, >= 1] only the k most probable bytes
top_p = None             # [none, > 0.0, <= 1.0] only the most probable bytes that together reach this probability
typical_p = None         # [none, > 0.0, <= 1.0] only the bytes nearest to the expected surprise that reach this
min_p = None             # [none, >= 0.0, <= 1.0] only bytes at least this fraction as probable as the best
greedy = False           # always the most probable byte
# --- How it is computed ---
cache = True             # reuse what earlier bytes left; off: every byte reads the whole text again, for the same text
draft = "none"           # several bytes a pass, guessed: none, lookup (in the text so far), a file: by its n-grams too
log_cache = False        # at the end, on stderr: what each layer's cache holds, and how often it was used
device = "auto"          # auto, cpu, cuda, cuda:1, ...
dtype = "float32"        # [auto, float32, bfloat16, float16] autocast


@command
def main():
    settings = override(globals(), positional="checkpoint")
    if checkpoint is None:
        raise UserError("which run? python sample.py runs/train_enwik8/NAME")
    if greedy or temperature == 0:
        settings.refuse_idle(("temperature",) * greedy + ("top_k", "top_p", "typical_p", "min_p"),
                             "where the most probable byte is taken")
    if not prompt:
        raise UserError('--prompt "": must have at least one byte')
    if log_cache and not cache:
        raise UserError("--log_cache with --no-cache: there is no cache to log")
    if draft != "none" and (not cache or n_samples > 1):
        raise UserError(f"--draft {shown(draft)}: guesses are read into the cache of one sample: it goes without "
                        "--no-cache and --n_samples")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")                 # a terminal may not know every character
    where, precision = resolve_device(device, dtype)
    path = find_checkpoint(checkpoint)
    loaded, model = load_model(path, weights)
    model = model.for_inference().eval().to(where)
    typed = prompt.encode(errors="surrogateescape")              # bytes that the shell passed on as they were
    tokenizer = tokenizer_in(loaded)
    if tokenizer is None:
        raise UserError(f"{path} was trained on {loaded['settings']['task']}, not on text: ask it with evaluate.py")

    def encode(text):
        return tokens.encode_corpus(tokenizer, text).tolist()

    def written(ids):
        return b"".join(tokenizer.decode_bytes([i]) if i < tokenizer.size else b"\n\n" for i in ids)
    generator, guesses = torch.Generator().manual_seed(seed), None
    if draft != "none":
        guesses = Draft(None if draft == "lookup" else Ngrams(np.array(encode(read_draft(draft)))))
    how = dict(temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p, min_p=min_p,
               typical_p=typical_p)
    with torch.autocast(where.type, precision, enabled=precision != torch.float32):
        log = sys.stderr if log_cache else None
        stream = generate(model, [encode(typed)] * n_samples, length, generator, cache, log, guesses, **how)
        if n_samples == 1:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")                   # a character may take 4 bytes
            sys.stdout.write(decoder.decode(typed))
            for token in stream:
                sys.stdout.write(decoder.decode(written(token.tolist())))
                sys.stdout.flush()
            sys.stdout.write(decoder.decode(b"", final=True) + "\n")
        else:
            columns = torch.stack(list(stream), 1).tolist() if length else [[]] * n_samples
            for number, row in enumerate(columns, 1):
                print(f"--- sample {number} of {n_samples} ---\n{(typed + written(row)).decode(errors='replace')}")
    if guesses is not None and guesses.passes:
        print(f"{guesses.bytes} drawn in {guesses.passes} passes: {guesses.bytes / guesses.passes:.2f} a pass",
              file=sys.stderr)


def read_draft(name):
    """The first bytes of a text that --draft names, as many as Ngrams takes. UserError where it cannot be read."""
    try:
        with open(name, "rb") as file:
            return file.read(Ngrams.LONGEST)
    except OSError as error:
        raise UserError(f"--draft {shown(name)}: none, lookup, or a text for its n-grams: {error.strerror}") from None


if __name__ == "__main__":
    main()
