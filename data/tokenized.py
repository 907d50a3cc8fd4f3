"""Text as a tokenizer's ids, from a file that fits into memory or from streamed shards, for next-token training.

    opened = open_text(dict(dataset="shakespeare", tokenizer="bpe:1024", max_bytes=None))
    batches = opened.batches(batch_size=16, block_size=128, batching="random", seed=0, device="cpu")
    x, y = batches.next()                        # (16, 128) and (16, 128, 1) int64
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import smollm, text, tokens
from nanolab.settings import UserError

TRAINED_ON = 10_000_000  # characters of shards that a tokenizer is trained on
VALIDATED = 200_000  # tokens of held-out documents that are scored


@dataclass
class Tokenized:
    """A text as ids: `train`, `val` and `test`, each (N,) int32 or None; of shards, `files` in place of `train`.

    sizes (vocab_size,) int64: the bytes of UTF-8 of each id, 0 of the `end` that follows a document of a shard.
    """
    tokenizer: object
    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor
    files: list
    sizes: torch.Tensor
    source: str

    @property
    def vocab_size(self):
        return len(self.sizes)

    @property
    def rows(self):
        """Tokens to train on, or documents, where these are streamed."""
        return sum(map(smollm.n_rows, self.files)) if self.files else len(self.train)

    def batches(self, batch_size, block_size, batching, seed, device):
        """text.Batches of the tokens, or smollm.Batches of the shards, which come in their own order."""
        if self.files:
            return smollm.Batches(self.files, self.tokenizer, batch_size, block_size, seed=seed, device=device)
        return text.Batches(self.train, batch_size, block_size, 1, batching, seed, device)


def of_shards(dataset):
    """Whether a setting `dataset` means shards, which are streamed."""
    folder = Path(dataset)
    return dataset.startswith("smollm:") or dataset.endswith(smollm.ENDINGS) or folder.is_dir() and any(
        path.name.endswith(smollm.ENDINGS) for path in folder.iterdir())


def tokenizer_of(settings, text_of_json=None):
    """The tokenizer alone that open_text would use; one that is trained reads the training text, or the beginning of
    the shards. text_of_json: the tokenizer.json that a checkpoint holds, in place of the file."""
    if text_of_json:
        return tokens.Published(text_of_json.encode())
    dataset = settings["dataset"]

    def sample():
        if not of_shards(dataset):
            return text.load(dataset, settings["max_bytes"]).train
        there, have = [], 0
        for document, _ in smollm.documents(smollm.find(dataset.removeprefix("smollm:"))):
            if have >= TRAINED_ON:
                break
            if not smollm.is_held_out(document):
                there.append(document)
                have += len(document)
        return "\n".join(there)

    return tokens.open_or_train(settings["tokenizer"], sample)


def open_text(settings, tokenizer=None):
    """The Tokenized that settings name: `dataset` (as text.load takes it, "smollm:SUBSET", or a path, folder or glob of
    .parquet, .jsonl, .jsonl.gz), `tokenizer` (as tokens.open_or_train takes it; the argument stands in place of it),
    `max_bytes` (not of shards). Raises UserError as these do, and for max_bytes with shards."""
    dataset, limit = settings["dataset"], settings["max_bytes"]
    streamed = of_shards(dataset)
    if streamed and limit is not None:
        raise UserError("--max_bytes is for texts that fit into memory: name fewer shards instead")
    found = smollm.find(dataset.removeprefix("smollm:")) if streamed else text.load(dataset, limit)
    tokenizer = tokenizer or tokenizer_of(settings)
    sizes, words = tokens.token_bytes(tokenizer), f"tokenizer {tokenizer.name}, {tokenizer.size:,} ids"
    if not streamed:
        ids = [None if part is None else tokens.encode_corpus(tokenizer, part)
               for part in (found.train, found.val, found.test)]
        return Tokenized(tokenizer, *ids, [], sizes, f"{found.source}; {words}")
    val, _ = smollm.validation(found, tokenizer, VALIDATED)
    named = ", ".join(file.name for file in found[:3]) + ", ..." * (len(found) > 3)
    return Tokenized(tokenizer, None, val.int(), None, found, F.pad(sizes, (0, 1)), f"{named}; {words}")
