"""MoVQGAN and LlamaGen's VQ model in plain torch, under their own names: what a released image tokenizer is."""

import torch
import torch.nn.functional as F
from torch import nn


class SpatialNorm(nn.Module):
    """MoVQGAN: a group norm scaled and shifted by convolutions of the code, spread to the picture's size."""

    def __init__(self, channels, code_width):
        super().__init__()
        self.norm_layer = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_y, self.conv_b = nn.Conv2d(code_width, channels, 1), nn.Conv2d(code_width, channels, 1)

    def forward(self, x, code):
        code = F.interpolate(code, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(code) + self.conv_b(code)


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels, _):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x, code):
        return super().forward(x)


class Residual(nn.Module):
    def __init__(self, into, out, norm, width):
        super().__init__()
        self.norm1, self.conv1 = norm(into, width), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out, width), nn.Conv2d(out, out, 3, padding=1)
        if into != out:
            self.nin_shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x, code):
        h = self.conv1(F.silu(self.norm1(x, code)))
        h = self.conv2(F.silu(self.norm2(h, code)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels, norm, width):
        super().__init__()
        self.norm = norm(channels, width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x, code):
        normed = self.norm(x, code)
        q, k, v = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks and attentions under the names of one release, then a change of resolution."""

    def __init__(self, into, out, *, count, attends, change, names, norm, width):
        super().__init__()
        self.names = names
        blocks = [Residual(into if index == 0 else out, out, norm, width) for index in range(count)]
        setattr(self, names["residual"], nn.ModuleList(blocks))
        self.attn = nn.ModuleList(Attention(out, norm, width) for _ in range(count if attends else 0))
        if change is not None:
            setattr(self, change, {"downsample": Down, "upsample": Up}[change](out))

    def forward(self, x, code=None):
        for index, block in enumerate(getattr(self, self.names["residual"])):
            x = block(x, code)
            x = self.attn[index](x, code) if len(self.attn) else x
        for change in ("downsample", "upsample"):
            x = getattr(self, change)(x) if hasattr(self, change) else x
        return x


class Half(nn.Module):
    """An encoder (finest level first in time) or a decoder (coarsest first)."""

    def __init__(self, side, *, channels, ends, names, norm, width, count):
        super().__init__()
        self.names, is_encoder, last = names, side == "encoder", len(channels) - 1
        order = range(last + 1) if is_encoder else range(last, -1, -1)
        coarse, into = channels[-1], channels[0] if is_encoder else channels[-1]
        self.conv_in = nn.Conv2d(ends[0], into, 3, padding=1)
        levels = []
        for level in order:
            is_last = level == (last if is_encoder else 0)
            change = None if is_last else "downsample" if is_encoder else "upsample"
            levels.append(
                Level(into, channels[level], count=count, attends=level == last, change=change, names=names,
                      norm=norm, width=width)
            )  # fmt: skip
            into = channels[level]
        self.reverse = not is_encoder and names["finest_first"]
        setattr(self, names[side], nn.ModuleList(levels[::-1] if self.reverse else levels))
        middle = (
            Residual(coarse, coarse, norm, width),
            Attention(coarse, norm, width),
            Residual(coarse, coarse, norm, width),
        )
        self.mid = nn.ModuleDict(dict(zip(names["middle"], middle, strict=True)))
        self.norm_out = norm(into, width)
        self.conv_out = nn.Conv2d(into, ends[1], 3, padding=1)
        self.side = side

    def forward(self, x, code=None):
        x = self.conv_in(x)
        levels = list(getattr(self, self.names[self.side]))
        levels = levels[::-1] if self.reverse else levels
        middle = [self.mid[name] for name in self.names["middle"]]
        for part in [*levels, *middle] if self.side == "encoder" else [*middle, *levels]:
            x = part(x, code)
        return self.conv_out(F.silu(self.norm_out(x, code)))


NAMES = {
    "movqgan": {"encoder": "down", "decoder": "up", "finest_first": True, "residual": "block",
                "middle": ("block_1", "attn_1", "block_2"), "decoder_norm": SpatialNorm},
    "llamagen": {"encoder": "conv_blocks", "decoder": "conv_blocks", "finest_first": False, "residual": "res",
                 "middle": ("0", "1", "2"), "decoder_norm": GroupNorm},
}  # fmt: skip


class Released(nn.Module):
    """A tokenizer as released: encode to latents and nearest codes, decode codes."""

    def __init__(self, kind, *, channels, latents, width, num_codes, num_layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.kind, names = kind, NAMES[kind]
        shared = {"channels": channels, "names": names, "width": width}
        self.encoder = Half("encoder", ends=(3, latents), norm=GroupNorm, count=num_layers, **shared)
        self.decoder = Half(
            "decoder", ends=(latents, 3), norm=names["decoder_norm"], count=num_layers + 1, **shared
        )
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latents, width, 1), nn.Conv2d(width, latents, 1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(num_codes, width)
        if kind == "llamagen":
            self.quantize.register_buffer("codebook_used", torch.zeros(65_536))
        for parameter in self.parameters():  # norms that do nothing would hide a mix-up
            parameter.data += 0.05 * torch.randn(parameter.shape)
        # Spread the latents over the codebook, so that many codes are chosen.
        self.quant_conv.weight.data *= 8

    def codebook(self):
        weight = self.quantize.embedding.weight
        return F.normalize(weight, dim=-1) if self.kind == "llamagen" else weight

    def codes(self, latents):
        vectors = latents.permute(0, 2, 3, 1)
        vectors = F.normalize(vectors, dim=-1) if self.kind == "llamagen" else vectors
        return (vectors[..., None, :] - self.codebook()).square().sum(-1).argmin(-1)

    def decode(self, codes):
        code = self.codebook()[codes].permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(code), code)


SMALL = {
    "movqgan": {"channels": (32, 64, 64, 96), "latents": 4, "width": 4, "num_codes": 256},
    "llamagen": {"channels": (32, 32, 64), "latents": 16, "width": 8, "num_codes": 256},
}


def in_released_form(model):
    state = model.state_dict()
    return {"model": state} if model.kind == "llamagen" else state
