"""Text from any checkpoint of train_enwik8.py, or of train_facts.py's task text.

    python sample.py runs/train_enwik8/my_run
    python sample.py runs/train_enwik8/my_run/best.pt --prompt "The history of " --length 99 --temperature 1 --top_p 0.9
    python sample.py runs/train_enwik8/my_run --greedy
    python sample.py runs/train_enwik8/my_run --n_samples 16 --seed 7
    python sample.py runs/train_enwik8/my_run --greedy --draft lookup    # the same text in fewer passes
    python sample.py runs/train_enwik8/my_run --n_beams 4 --stop "."     # the likeliest sentence that was found
    python sample.py runs/train_enwik8/my_run --log_cache                # what each layer's cache held

One sample is written byte by byte as it comes; several are computed as one batch and written when they are done. Same
seed, same text. Past block_size a sliding cache rolls on; learned absolute positions
cannot, so there the model starts again from the last half of its window. More: docs/runs.md.
"""
from nanolab.settings import answer_help, shown

answer_help(__name__, __file__, "checkpoint")  # before the seconds that the next lines take

import codecs
import contextlib
import json
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's: a lone byte's products are too small to be shared

import numpy as np
import torch

from data import tokens
from nanolab.generate import Draft, Ngrams, Stop, beam_search, generate
from nanolab.hf import load_model, tokenizer_in
from nanolab.run import UserError, command, find_checkpoint, override, resolve_device

# --- What ---
checkpoint = None        # run directory, checkpoint file, or a folder of weights (may also be typed as a bare word)
weights = "raw"          # [raw, ema] which weights
prompt = "\n"            # what the text begins with
length = 500             # [>= 0, <= 1e9] bytes to generate, or ids of a tokenizer
stop = None              # what ends a sample when it was written, and is not printed; several: '["\\n", "The end"]'
n_samples = 1            # [>= 1, <= 100_000] samples, generated as one batch; of beams the best ones
seed = 1337              # [>= 0] same seed, same text
# --- How the next byte is drawn ---
temperature = 0.8        # [>= 0.0, <= 1e6] below 1 sharpens, above 1 flattens; 0 is greedy
top_k = None             # [none, >= 1] only the k most probable bytes
top_p = None             # [none, > 0.0, <= 1.0] only the most probable bytes that together reach this probability
typical_p = None         # [none, > 0.0, <= 1.0] only the bytes nearest to the expected surprise that reach this
min_p = None             # [none, >= 0.0, <= 1.0] only bytes at least this fraction as probable as the best
repetition_penalty = 1.0 # [> 0.0, <= 1e6] above 1 bytes that were there become less probable, as in CTRL
repetition_window = None # [none, >= 1, with repetition_penalty] among the last so many; none: prompt and all since
greedy = False           # always the most probable byte
n_beams = 1              # [>= 1, <= 10_000] above 1 a beam search: the most probable texts, with their nats
length_penalty = 1.0     # [>= 0.0, <= 1e6, with n_beams] beams by nats / bytes^this: 0 likes short ones
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
    check(settings)
    ends = stops(stop)
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

    def decode(i):
        return tokenizer.decode_bytes([i]) if i < tokenizer.size else b"\n\n"
    guesses, log = None, sys.stderr if log_cache else None
    if draft != "none":
        guesses = Draft(None if draft == "lookup" else Ngrams(np.array(encode(read_draft(draft)))))
    rows = [Stop(ends, decode) for _ in range(n_samples)]
    with torch.autocast(where.type, precision, enabled=precision != torch.float32):
        if n_beams > 1:
            found = beam_search(model, encode(typed), length, n_beams, length_penalty, rows[0], log)
            for number, ((score, ids, nats), row) in enumerate(zip(found, rows), 1):
                show(f"beam {number} of {n_beams}: {nats:.4f} nats, score {score:.4f}", typed, map(row.add, ids), row)
            return
        how = dict(temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                   typical_p=typical_p, repetition_penalty=repetition_penalty, repetition_window=repetition_window)
        stream = generate(model, [encode(typed)] * n_samples, length, torch.Generator().manual_seed(seed), cache, log,
                          guesses, **how)
        if n_samples == 1:
            stream_out(typed, stream, rows[0])
        else:
            pieces = [[] for _ in rows]
            for ids in stream:
                for piece, row, i in zip(pieces, rows, ids.tolist()):
                    piece.append(row.add(i))
                if all(row.done for row in rows):
                    break
            for number, (piece, row) in enumerate(zip(pieces, rows), 1):
                show(f"sample {number} of {n_samples}", typed, piece, row)
        stream.close()                                           # which writes the log
    if guesses is not None and guesses.passes:
        print(f"{guesses.bytes} drawn in {guesses.passes} passes: {guesses.bytes / guesses.passes:.2f} a pass",
              file=sys.stderr)


def check(settings):
    """UserError for settings that do not go together."""
    filters = ("top_k", "top_p", "typical_p", "min_p")
    if greedy or temperature == 0:
        settings.refuse_idle(("temperature",) * greedy + filters, "where the most probable byte is taken")
    if n_beams > 1:
        settings.refuse_idle(("temperature", *filters, "greedy", "seed", "repetition_penalty"), "on beams")
        if n_samples > n_beams or not cache:
            raise UserError(f"--n_beams {n_beams}: beams go on from a cache, and {n_beams} samples are their most")
    else:
        settings.refuse_idle(("length_penalty",), "without --n_beams")
    if repetition_penalty == 1:
        settings.refuse_idle(("repetition_window",), "without --repetition_penalty")
    if not prompt:
        raise UserError('--prompt "": must have at least one byte')
    if log_cache and not cache:
        raise UserError("--log_cache with --no-cache: there is no cache to log")
    if draft != "none" and (not cache or n_samples > 1 or n_beams > 1):
        raise UserError(f"--draft {shown(draft)}: guesses are read into the cache of one sample: it goes without "
                        "--no-cache, --n_samples and --n_beams")


def stream_out(typed, stream, row):
    """Writes a lone text as it comes: the prompt's bytes, and those that its Stop makes of the stream's ids."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")   # a character may take 4 bytes
    sys.stdout.write(decoder.decode(typed))
    for ids in stream:
        sys.stdout.write(decoder.decode(row.add(ids.item())))
        sys.stdout.flush()
        if row.done:
            break
    sys.stdout.write(decoder.decode(row.held, final=True) + "\n")


def show(title, typed, pieces, row):
    """Prints one text of several: the prompt's bytes, the pieces that its Stop gave, and what that still held."""
    print(f"--- {title} ---\n{(typed + b''.join(pieces) + row.held).decode(errors='replace')}")


def stops(typed):
    """The strings of --stop, bytes: of a JSON list its texts, else what was typed itself. UserError: an empty one."""
    if typed is None:
        return []
    found = [typed]
    with contextlib.suppress(ValueError, RecursionError):
        listed = json.loads(typed)
        found = listed if isinstance(listed, list) else found
    if not found or not all(isinstance(text, str) and text for text in found):
        raise UserError(f"--stop {shown(typed)}: a text, or a JSON list of texts, none empty")
    return [text.encode(errors="surrogateescape") for text in found]


def read_draft(name):
    """The first bytes of a text that --draft names, as many as Ngrams takes. UserError where it cannot be read."""
    try:
        with open(name, "rb") as file:
            return file.read(Ngrams.LONGEST)
    except OSError as error:
        raise UserError(f"--draft {shown(name)}: none, lookup, or a text for its n-grams: {error.strerror}") from None


if __name__ == "__main__":
    main()
