"""open_lm's model in plain torch, under its own names: what a released language model is."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"hidden_dim": 48, "n_layers": 2, "n_heads": 4, "seq_len": 64, "vocab_size": 56}
SETTINGS = {
    "post_embed_norm": False,
    "weight_tying": False,
    "qk_norm": False,
    "model_norm": "default_layer_norm",
    "positional_embedding_type": "rotary",
}


class Norm(nn.Module):
    """open_lm's norms in fp32, where low precision makes no difference."""

    def __init__(self, kind, width):
        super().__init__()
        self.is_rms = kind == "rms_norm"
        if kind != "no_wb_layer_norm":
            self.weight = nn.Parameter(1 + 0.3 * torch.randn(width))
        if kind in ("default_layer_norm", "lp_layer_norm"):
            self.bias = nn.Parameter(0.3 * torch.randn(width))

    def forward(self, x):
        gain, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        if self.is_rms:
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain
        return F.layer_norm(x, x.shape[-1:], gain, bias, 1e-5)


class Rotary(nn.Module):
    """Tables of cos and sin, half rotation; head_rotary swaps positions and heads before and after."""

    def __init__(self, head_dim, over_heads):
        super().__init__()
        self.over_heads = over_heads
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)))

    def forward(self, x):  # (B, S, H, head_dim)
        x = x.transpose(1, 2) if self.over_heads else x
        table = torch.outer(torch.arange(x.shape[1]).float(), self.inv_freq).repeat(1, 2)[None, :, None]
        first, second = x.chunk(2, dim=-1)
        x = x * table.cos() + torch.cat((-second, first), dim=-1) * table.sin()
        return x.transpose(1, 2) if self.over_heads else x


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.n_heads = p.n_heads
        self.in_proj = nn.Linear(p.hidden_dim, 3 * p.hidden_dim, bias=False)
        self.out_proj = nn.Linear(p.hidden_dim, p.hidden_dim, bias=False)
        if p.positional_embedding_type != "none":
            self.pos_embed = Rotary(p.hidden_dim // p.n_heads, p.positional_embedding_type == "head_rotary")
        if p.qk_norm:
            self.q_norm, self.k_norm = Norm(p.model_norm, p.hidden_dim), Norm(p.model_norm, p.hidden_dim)

    def forward(self, x):
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(*x.shape[:2], self.n_heads, -1) for part in (q, k, v))
        if hasattr(self, "pos_embed"):
            q, k = self.pos_embed(q), self.pos_embed(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = 256 * ((int(2 * 4 * width / 3) + 255) // 256)
        self.w12 = nn.Linear(width, 2 * hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.attention = Attention(p)
        self.feed_forward = SwiGLU(p.hidden_dim)
        self.attention_norm, self.ffn_norm = (
            Norm(p.model_norm, p.hidden_dim),
            Norm(p.model_norm, p.hidden_dim),
        )

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class OpenLM(nn.Module):
    """open_lm's Transformer: same names, same arithmetic, no cache."""

    def __init__(self, **changes):
        super().__init__()
        torch.manual_seed(0)
        p = SimpleNamespace(**(SETTINGS | SIZES | changes))
        if p.post_embed_norm:
            self.post_embed_norm = Norm(p.model_norm, p.hidden_dim)
        self.tok_embeddings = nn.Embedding(p.vocab_size, p.hidden_dim)
        self.layers = nn.ModuleList(Block(p) for _ in range(p.n_layers))
        self.norm = Norm(p.model_norm, p.hidden_dim)
        self.output = nn.Linear(p.hidden_dim, p.vocab_size, bias=False)
        self.output.weight.data *= 5  # logits of about 5, as trained models have
        if p.weight_tying:
            self.tok_embeddings.weight = self.output.weight

    def forward(self, ids):
        x = self.tok_embeddings(ids)
        x = self.post_embed_norm(x) if hasattr(self, "post_embed_norm") else x
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x)).float()
