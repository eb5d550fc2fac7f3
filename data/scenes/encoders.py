"""What turns pictures into latents and texts into embeddings: AutoencoderKL and CLIP's text encoder, whose tensors have
diffusers' names, so that a folder is read without a table of names; and the layers that the VAE shares with the UNet.

image (B, 3, H, W) -> VAE.encode -> latent (B, C, H / 8, W / 8) -> VAE.decode -> image
ids (B, L) -> CLIPText -> last hidden state (B, L, D) and the pooled one (B, D)

Rombach et al. 2022 (latent diffusion, arXiv 2112.10752). Radford et al. 2021 (CLIP, arXiv 2103.00020)."""
import torch
import torch.nn.functional as F
from torch import nn

from data.scenes.diffusers_folder import load_part

# B batch, C channels, H x W cells, T = H * W cells as tokens, L text tokens, D width

# -------------------------------------------------------------------------------------------------------------- layers
def attend(q, k, v, heads, mask=None, causal=False):
    """q (B, T, D), k and v (B, S, D); mask broadcasts to (B, heads, T, S), True: seen -> (B, T, D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(2)

class Resnet(nn.Module):
    def __init__(self, inputs, width, groups, eps, time=0):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps), nn.Conv2d(inputs, width, 3, padding=1)
        if time:
            self.time_emb_proj = nn.Linear(time, width)
        self.norm2, self.conv2 = nn.GroupNorm(groups, width, eps), nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class Down(nn.Module):
    def __init__(self, width, padding):
        super().__init__()
        self.padding, self.conv = padding, nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))      # a VAE pads right and below only

class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, size=None):
        size = size or [2 * n for n in x.shape[-2:]]
        return self.conv(F.interpolate(x, size=size, mode="nearest"))

class Level(nn.Module):
    """Resnets, an attention after each or after none of them, and what halves or doubles the resolution."""
    def __init__(self, resnets, attentions=(), down=(), up=()):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(down), nn.ModuleList(up)

    def step(self, i, x, time=None, *given):
        x = self.resnets[i](x, time)
        return self.attentions[i](x, *given) if i < len(self.attentions) else x

    def steps(self, x, time=None, *given):          # all in a row: the middle of a model, every level of a VAE
        for i in range(len(self.resnets)):
            x = self.step(i, x, time, *given)
        return x

# ----------------------------------------------------------------------------------------------------------------- VAE
class VAEAttention(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).view_as(x)

class Coder(nn.Module):
    """Encoder (widths rise, levels halve) or decoder (mirrored, one more resnet per level) of a VAE."""
    def __init__(self, shape, inputs, outputs, encoder):
        super().__init__()
        groups, eps, last = shape.groups, 1e-6, len(shape.widths) - 1
        widths, top = shape.widths if encoder else shape.widths[::-1], shape.widths[-1]
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        levels, width = nn.ModuleList(), widths[0]
        for i, new in enumerate(widths):
            resnets = [Resnet(width if j == 0 else new, new, groups, eps) for j in range(shape.layers + (not encoder))]
            down, up = [Down(new, 0)] * encoder, [Up(new)] * (not encoder)
            levels.append(Level(resnets, down=down * (i < last), up=up * (i < last)))
            width = new
        middle = Level([Resnet(top, top, groups, eps) for _ in range(2)], [VAEAttention(top, groups)])
        self.mid_block = middle
        self.add_module("down_blocks" if encoder else "up_blocks", levels)
        self.levels = [*levels, middle] if encoder else [middle, *levels]    # in a list: no second name
        self.conv_norm_out = nn.GroupNorm(groups, width, eps)
        self.conv_out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.levels:
            x = level.steps(x)
            for resize in (*level.downsamplers, *level.upsamplers):
                x = resize(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

class VAE(nn.Module):
    """AutoencoderKL. Latents of the UNet are its latents times shape.scaling_factor."""
    def __init__(self, shape, raw=None):
        super().__init__()
        self.shape, self.raw, z = shape, raw, shape.latent
        self.encoder = Coder(shape, shape.in_channels, 2 * z, True)
        self.decoder = Coder(shape, z, shape.out_channels, False)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if shape.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if shape.post_quant_conv else nn.Identity()

    def encode(self, image):
        """(B, 3, 8H, 8W) in -1..1 -> mean, logvar, each (B, C, H, W)"""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent):
        """(B, C, H, W), divided by the scaling factor -> (B, 3, 8H, 8W), about -1..1"""
        return self.decoder(self.post_quant_conv(latent))

# ---------------------------------------------------------------------------------------------------------------- text
class TextLayer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        D, self.heads, self.quick = shape.width, shape.heads, shape.activation == "quick_gelu"
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(D, shape.eps), nn.LayerNorm(D, shape.eps)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(D, D) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, shape.hidden), "fc2": nn.Linear(shape.hidden, D)})

    def forward(self, x):
        h, proj = self.layer_norm1(x), self.self_attn
        x = x + proj["out_proj"](attend(*(proj[f"{name}_proj"](h) for name in "qkv"), self.heads, causal=True))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))

class CLIPText(nn.Module):
    """CLIPTextModel: the text encoder of SD1 (quick_gelu) and SD2 (gelu)."""
    def __init__(self, shape, raw=None):
        super().__init__()
        self.shape, self.raw = shape, raw
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(shape.vocab_size, shape.width),
                                         "position_embedding": nn.Embedding(shape.positions, shape.width)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(TextLayer(shape) for _ in range(shape.layers))})
        self.final_layer_norm = nn.LayerNorm(shape.width, shape.eps)

    def forward(self, ids):
        """ids (B, L) with padding at the end -> last_hidden_state (B, L, D), pooled (B, D) at the end token"""
        L, shape = ids.shape[1], self.shape
        if L > shape.positions:
            raise ValueError(f"{L} text tokens in a row, but the text encoder has {shape.positions} positions: cut")
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"].weight[:L]
        for layer in self.encoder["layers"]:
            x = layer(x)
        x = self.final_layer_norm(x)
        end = ids if shape.eos == 2 else (ids == shape.eos).int()            # 2: the end token is the largest id
        return x, x[torch.arange(len(x), device=x.device), end.argmax(-1)]

# ------------------------------------------------------------------------------------------------------------- loading
def load_vae(folder, dtype=torch.float32):
    """folder: a diffusers model, or its vae folder -> VAE, frozen. ValueError, also for a float16 that overflows."""
    vae = load_part(VAE, "vae", folder, dtype)
    if dtype == torch.float16 and vae.shape.force_upcast:
        raise ValueError(f"{folder}: this VAE has force_upcast, as float16 overflows in it: use float32 or bfloat16")
    return vae

def load_text_encoder(folder, dtype=torch.float32):
    """folder: a diffusers model, or its text_encoder folder -> CLIPText, frozen. ValueError."""
    return load_part(CLIPText, "text_encoder", folder, dtype)
