"""Multi-token prediction: mtp_depth above 0."""
import torch
import torch.nn as nn

from model import Block, Linear, Norm


class MultiTokenPrediction(nn.Module):
    """One module of DeepSeek-V3's multi-token prediction (DeepSeek-AI 2024, section 2.2): the stream of the module
    before and the embedding of the byte one further ahead, each normalised, are joined by a matrix and pass a layer
    of the last one's kind. Embedding and classifier are the model's. depth: 1 for the first module."""

    def __init__(self, config, depth):
        super().__init__()
        c = config
        self.norm1 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias, c.norm_eps)
        self.norm2 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias, c.norm_eps)
        self.join = Linear(2 * c.n_embd, c.n_embd, bias=False)
        self.block = Block(c, c.n_layer - 1)
        if hasattr(self.block.ff, "balance"):
            self.block.ff.layer += depth  # its experts' loads are not those of the last layer

    def forward(self, h, embedded, positions):
        """h and embedded (B, T, C) to (B, T, C)."""
        return self.block(self.join(torch.cat((self.norm1(h), self.norm2(embedded)), -1)), positions)
