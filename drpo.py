"""Drifting Preference Optimization (DrPO, arXiv 2606.02521): preference finetuning of one-step text-to-image generators.

TODO docstring
"""
import argparse
import contextlib
import difflib
import hashlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import rewards
from rewards import UserError  # what the user can mend: one line on stderr, exit code 2

HERE = Path(__file__).resolve().parent
KERNELS = ("laplacian", "rbf", "cosine", "exponential")
FEATURES = ("latent-mae", "vae", "unet", "mae", "dino", "latent")


def opt(default, help, **kw):
    """One setting: its default, its line in --help."""
    return field(default=default, metadata=dict(help=help, **kw))


@dataclass
class Config:
    """Every setting, with its default and its unit. The command line is made from this class."""

    model: str = opt("toy", "toy, sd-turbo, sdxl-turbo, a local diffusers folder, or a hub id with an SD or SDXL layout")
    reward: str = opt("", "what ranks: a name of `python rewards.py list`, a weighted sum a=1,b=.5, file.py:function, a URL")
    watch: str = opt("", "comma-separated rewards that are scored and logged but never ranked on: they show reward hacking")
    watch_every: int = opt(10, "steps between two scorings by the watched rewards")
    prompts: str = opt("", "a text file (a prompt a line), a .jsonl with \"prompt\", or scenes, animals, pickapic")
    pairs: str = opt("", "offline instead of --reward: a .jsonl with prompt, chosen: [files], rejected: [files]")
    steps: int = opt(120, "optimizer steps")
    batch: int = opt(4, "prompts a step (P), on each GPU")
    candidates: int = opt(16, "images a prompt (K)")
    anchors: int = opt(8, "best and worst taken as anchors (m), at most half of the candidates")
    features: str = opt("vae", f"feature maps phi, comma-separated: {', '.join(FEATURES)}; name@file for a local copy")
    feature_reduction: str = opt("sum", "how the losses of several maps are joined", choices=("sum", "mean"))
    field: str = opt("dipole", "dipole: the paper's equations; released: the authors' code", choices=("dipole", "released"))
    kernel: str = opt("laplacian", "kernel k(z, a)", choices=KERNELS)
    radii: tuple = opt((0.2, 0.5, 1.0), "kernel bandwidths tau / s, comma-separated")
    lambda_ref: float = opt(0.2, "weight of the drift toward the frozen base (lambda)")
    eta: float = opt(1.0, "step of the target: z* = z + eta V")
    lr: float = opt(1e-3, "AdamW learning rate")
    lr_decay: bool = opt(False, "cosine decay of the learning rate to zero over --steps")
    weight_decay: float = opt(0.01, "AdamW weight decay")
    clip: float = opt(1.0, "largest gradient norm")
    lora_rank: int = opt(16, "rank r of the LoRA")
    lora_alpha: float = opt(16.0, "alpha of the LoRA: the update is alpha / r B A x")
    lora_format: str = opt("diffusers", "file format; kohya is what A1111, ComfyUI, Forge read",
                           choices=("diffusers", "kohya", "both"))
    full: bool = opt(False, "finetune the whole UNet instead of a LoRA (keeps a frozen copy)")
    micro_batch: str = opt("auto", "images at once through the networks; auto halves it whenever memory runs out")
    dtype: str = opt("auto", "weights of the frozen networks; auto = bf16 on a GPU, fp32 on a CPU",
                     choices=("auto", "bf16", "fp16", "fp32"))
    device: str = opt("auto", "cuda, cuda:1, cpu; auto = cuda where there is one")
    compile: bool = opt(False, "torch.compile the networks: faster steps, minutes to start")
    decoder: str = opt("vae", "what decodes the pictures that are ranked; taesd = madebyollin/taesd, an approximation",
                       choices=("vae", "taesd"))
    deterministic: bool = opt(False, "the same run bit for bit on the same GPU (slower)")
    seed: int = opt(0, "seed of noise, prompt order and LoRA")
    out: str = opt("", "folder of the run; default runs/MODEL-REWARD-DATE")
    resume: str = opt("", "folder of a run to go on with")
    save_every: int = opt(50, "steps between checkpoints")
    preview_every: int = opt(50, "steps between preview grids; 0 = none")
    log_every: int = opt(10, "steps between two lines of figures")
    reward_timeout: float = opt(600.0, "seconds that one call of a reward may take")
    profile: bool = opt(False, "print seconds, TFLOP and share of the matmul peak of each phase of a step, and stop")
    tensorboard: bool = opt(False, "also write TensorBoard event files (needs the package tensorboard)")
    random_init: bool = opt(False, "random weights of the model's architecture, no download: to measure time and memory")


# The authors' recipes (paper section 5 and their scripts), for one GPU: theirs ran on 4 and on 4-8.
PRESETS = {
    "toy": dict(reward="scene", prompts="scenes"),
    "sd-turbo": dict(reward="pickscore", prompts="pickapic", steps=1000, batch=8, candidates=24, anchors=8,
                     features="latent-mae", field="released", radii=(0.02, 0.05, 0.2), lr=1e-4),
    "sdxl-turbo": dict(reward="pickscore", prompts="pickapic", steps=5000, batch=8, candidates=16, anchors=8,
                       features="unet", feature_reduction="mean", field="released", radii=(0.02, 0.05, 0.2), lr=1e-5),
}
MODELS = {"toy": str(HERE / "toy"), "sd-turbo": "stabilityai/sd-turbo", "sdxl-turbo": "stabilityai/sdxl-turbo"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ======================================================================================================================
# 1. The field. Pure mathematics in float32, torch only: this section, cut out of the file, runs alone.
#    Shapes: z (..., N, D) samples, a (..., M, D) anchors; any leading dimensions, such as P prompts at once.
# ======================================================================================================================


def distances(z, a):
    """||z_i - a_j||: (..., N, D), (..., M, D) -> (..., N, M). By differences: the quick x^2 - 2xy + y^2 loses digits."""
    return torch.cdist(z, a, compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(d, mask=None):
    """The scale s: mean of the distances (..., N, M) -> (..., 1, 1). Pairs at distance 0 (a sample and its own copy among
    the anchors) and anchors outside `mask` (..., M) are left out; detached, for s is a unit of length, not a variable."""
    used = d > 0 if mask is None else (d > 0) & mask[..., None, :]
    s = (d * used).sum((-2, -1), keepdim=True) / used.sum((-2, -1), keepdim=True).clamp(min=1)
    return torch.where(s > 0, s, 1.0).detach()


def log_kernel(z, a, d, tau, radius, kernel):
    """log k(z_i, a_j): (..., N, M). d = distances(z, a), tau = radius * s (paper section 3; cosine has no s)."""
    if kernel == "cosine":
        return F.normalize(z, dim=-1) @ F.normalize(a, dim=-1).mT / radius
    return -((d / tau) ** 2) / 2 if kernel == "rbf" else -d / tau  # "laplacian", alias "exponential"


def kernel_gradient(z, a, weight, tau, radius, kernel):
    """sum_j w_j grad_z k(z_i, a_j) -> (..., N, D), weight (..., M). An anchor that IS the sample gives no force."""
    d = distances(z, a)  # (..., N, M)
    k = weight[..., None, :] * log_kernel(z, a, d, tau, radius, kernel).exp().masked_fill(d == 0, 0)  # (..., N, M)
    if kernel == "cosine":  # grad k = k (a^ - cos z^) / (radius ||z||)
        z_hat, a_hat = F.normalize(z, dim=-1), F.normalize(a, dim=-1)
        pull = k @ a_hat - (k * (z_hat @ a_hat.mT)).sum(-1, keepdim=True) * z_hat  # (..., N, D)
        return pull / (radius * z.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    c = k / tau**2 if kernel == "rbf" else k / (tau * d).masked_fill(d == 0, 1)  # grad k = -c (z - a)
    origin = a.mean(-2, keepdim=True)  # sum_j c_j (a_j - z) does not depend on it, but its rounding error does
    return c @ (a - origin) - c.sum(-1, keepdim=True) * (z - origin)


def unit_rms(V):
    """V / RMS over its (N, D), and that RMS (...,). Divided by the largest first: the squares of e^50 overflow."""
    largest = V.abs().amax((-2, -1), keepdim=True)
    V = V / torch.where(largest > 0, largest, 1.0)
    rms = V.square().mean((-2, -1), keepdim=True).sqrt()
    return V / torch.where(rms > 0, rms, 1.0), (rms * largest)[..., 0, 0]


def _both(positive, negative, masks):
    """Anchors of both signs in one list: (..., M+ + M-, D), their signs +1/-1, and which are there at all."""
    shapes = positive.shape[:-1], negative.shape[:-1]
    masks = masks or [torch.ones(s, dtype=torch.bool, device=positive.device) for s in shapes]
    mask = torch.cat([m.expand(s) for m, s in zip(masks, shapes)], -1)
    sign = torch.cat([positive.new_ones(shapes[0]), -positive.new_ones(shapes[1])], -1)
    return torch.cat([positive, negative], -2).float(), sign * mask, mask


def dipole_energy(z, positive, negative, *, radius, kernel="laplacian"):
    """E(z) = sum_j [k(z, a_j+) - k(z, a_j-)] (paper section 3, gamma = 1): (..., N, D), (..., M, D) x2 -> (..., N).
    exp(E) is the dipole reward; `dipole_field` is the gradient of E, up to its normalisation."""
    z, (a, sign, _) = z.float(), _both(positive, negative, None)
    d = distances(z, a)
    k = log_kernel(z, a, d, radius * mean_distance(d), radius, kernel).exp()  # (..., N, M)
    return (sign[..., None, :] * k).sum(-1)


def dipole_field(z, positive, negative, *, radii, kernel="laplacian", masks=None, return_rms=False):
    """V_pref(z) = grad_z E(z): toward the best candidates and away from the worst, most strongly near them.

    z (..., N, D); positive, negative (..., M, D); radii: bandwidths in units of the mean distance s; masks: optional pair
    of boolean (..., M), False where a row is padding. Returns (..., N, D): for each radius scaled to unit RMS over (N, D),
    then summed over radii; with return_rms also the RMS before that scaling, (..., R): the loss cannot show it."""
    z, (a, sign, mask) = z.float(), _both(positive, negative, masks)
    s = mean_distance(distances(z, a), mask)
    fields = [unit_rms(kernel_gradient(z, a, sign, r * s, r, kernel)) for r in radii]
    V = sum(V for V, _ in fields)
    return (V, torch.stack([rms for _, rms in fields], -1)) if return_rms else V


def reference_drift(z, reference, *, radii, kernel="laplacian", return_rms=False):
    """V_ref(z) = mu_R(z) - mu_Z(z), mu_B(z) = sum_b k(z, b) b / sum_b k(z, b): the mean-shift estimate of
    grad log p_ref - grad log p_theta (paper section 3). A sample never counts itself in mu_Z.

    z (..., N, D), reference (..., M, D) -> (..., N, D), unit RMS per radius, summed; return_rms as in `dipole_field`."""
    z, r = z.float(), reference.float()
    d_z, d_r = distances(z, z), distances(z, r)  # (..., N, N), (..., N, M)
    s = mean_distance(torch.cat([d_z, d_r], -1))
    self_pair = torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)
    fields = []
    for radius in radii:
        log_r = log_kernel(z, r, d_r, radius * s, radius, kernel)
        log_z = log_kernel(z, z, d_z, radius * s, radius, kernel).masked_fill(self_pair, -torch.inf)
        w_r, w_z = log_r.softmax(-1), log_z.softmax(-1).nan_to_num(0)  # a lone sample has no mu_Z: no repulsion
        origin = r.mean(-2, keepdim=True)
        to_r = w_r @ (r - origin) - (z - origin)  # mu_R - z
        to_z = w_z @ (z - origin) - w_z.sum(-1, keepdim=True) * (z - origin)  # mu_Z - z
        fields.append(unit_rms(to_r - to_z))
    V = sum(V for V, _ in fields)
    return (V, torch.stack([rms for _, rms in fields], -1)) if return_rms else V


def released_field(z, positive, negative, *, radii, kernel="laplacian", positive_weight=3000.0, negative_weight=3000.0,
                   negative_is_self=False, masks=None, return_rms=False):
    """The force of the authors' released code, with which the published figures were obtained.

    z (..., N, D); positive, negative (..., M, D). Returns the force (..., N, D) in units of s / sqrt(D), and s (...,).
    As preference term the anchors are best and worst; as reference term positives are the reference's features, negatives
    z itself (negative_is_self). masks and return_rms as in `dipole_field`."""
    z, p, n = z.float(), positive.float(), negative.float()
    N, D, M = z.shape[-2], z.shape[-1], n.shape[-2]
    _, sign, mask = _both(n, p, masks and masks[::-1])
    y = torch.cat([z, n, p], -2)  # (..., Y, D), Y = N + M- + M+
    w = torch.where(sign > 0, negative_weight, positive_weight) * mask  # sign +1: the negatives, first in y
    w = torch.cat([z.new_ones(z.shape[:-1]), w], -1)[..., None, :]  # (..., 1, Y)
    d = distances(z, y).clamp(min=1e-4)  # (..., N, Y)
    s = ((d * w).mean((-2, -1), keepdim=True) / w.mean((-2, -1), keepdim=True)).clamp(min=1e-3)
    same = torch.zeros(N, y.shape[-2], dtype=torch.bool, device=z.device)
    same[:, :N] = torch.eye(N, dtype=torch.bool, device=z.device)
    if negative_is_self:
        same[:, N:2 * N] = same[:, :N]
    unit, force, all_rms = s / D**0.5, 0, []
    for radius in radii:
        logits = log_kernel(z, y, d, radius * s, radius, kernel) - same * (100 / radius)
        logits = logits.masked_fill(w == 0, -1e9)  # padding
        A = (logits.softmax(-1) * logits.softmax(-2)).clamp(min=1e-6).sqrt() * w  # (..., N, Y)
        minus, plus = A.split([N + M, y.shape[-2] - N - M], -1)  # [z ; negatives], positives
        coef = torch.cat([-minus * plus.sum(-1, keepdim=True), plus * minus.sum(-1, keepdim=True)], -1)
        origin = y.mean(-2, keepdim=True)
        V = (coef @ (y - origin) - coef.sum(-1, keepdim=True) * (z - origin)) / unit
        rms = V.square().mean((-2, -1), keepdim=True).clamp(min=1e-8).sqrt()
        force = force + V / rms
        all_rms.append(rms[..., 0, 0])
    s = s[..., 0, 0]
    return (force, s, torch.stack(all_rms, -1)) if return_rms else (force, s)


def rank(scores, m):
    """Best m and worst m of K candidates: scores (..., K) -> two boolean masks (..., K). Only the order matters.

    NaN = no opinion: never an anchor. A candidate is never positive while an equally scored one is negative: a score on
    both sides stays only where it is the best (then positive) or the worst (then negative) there is; the sets shrink.
    All equal: both empty. Fewer than 2 m opinions: at most half of them on each side."""
    valid = ~scores.isnan()
    m = torch.clamp(valid.sum(-1, keepdim=True) // 2, max=m)  # (..., 1)
    up, down = scores.nan_to_num(nan=torch.inf), (-scores).nan_to_num(nan=torch.inf)  # NaN sorts last in both
    low = up.argsort(dim=-1, stable=True).argsort(-1) < m
    high = down.argsort(dim=-1, stable=True).argsort(-1) < m
    best, worst = -down.amin(-1, keepdim=True), up.amin(-1, keepdim=True)  # (..., 1)
    edge = up.masked_fill(~high, torch.inf).amin(-1, keepdim=True)  # the lowest positive score
    tied = edge <= up.masked_fill(~low, -torch.inf).amax(-1, keepdim=True)  # ... is it the highest negative one too?
    drop = tied & (scores == edge)
    return high & ~(drop & (edge < best)) & (best > worst), low & ~(drop & (edge > worst)) & (best > worst)


def drpo_target(z, z_ref, positive, negative, masks, cfg):
    """The detached targets z* of one feature map, and the weights of their squares in the loss.

    z, z_ref (P, N, D); positive, negative (P, M, D); masks: pair of boolean (P, M). Returns a list of (z* (P, N, D),
    weight (P, 1, 1)), where loss = sum_p weight ||z - z*||^2, and the RMS before normalisation of V_pref, V_ref (P, R).
    dipole:   z* = z + eta u (V_pref + lambda V_ref),  L = 1/(2 N D) sum ||(z - z*) / u||^2
    released: one such term for each field, every one in the unit u of its own, L = 1/(N D) sum ||(z - z*) / u||^2"""
    kw = dict(radii=cfg.radii, kernel=cfg.kernel, return_rms=True)
    P, N, D = z.shape
    if cfg.field == "dipole":
        V_pref, rms_pref = dipole_field(z, positive, negative, masks=masks, **kw)  # (P, N, D)
        V_ref, rms_ref = reference_drift(z, z_ref, **kw)  # (P, N, D)
        u = mean_distance(distances(z, z)) / D**0.5  # (P, 1, 1)
        return [(z + cfg.eta * u * (V_pref + cfg.lambda_ref * V_ref), 0.5 / (N * D * u**2))], rms_pref, rms_ref
    F_pref, s_pref, rms_pref = released_field(z, positive, negative, masks=masks, **kw)
    F_ref, s_ref, rms_ref = released_field(z, z_ref, z, negative_is_self=True, **kw)
    F_pref = F_pref * (masks[0].any(-1) & masks[1].any(-1))[:, None, None]  # a skipped prompt: only the reference drift
    terms = []
    for force, s, weight in ((F_pref, s_pref, 1.0), (F_ref, s_ref, cfg.lambda_ref)):
        u = s[:, None, None] / D**0.5  # (P, 1, 1)
        terms.append((z + cfg.eta * u * force, weight / (N * D * u**2)))
    return terms, rms_pref, rms_ref


def regression_loss(z, terms):
    """sum over terms of weight ||z - sg(z*)||^2: z (N, D), z* (N, D), weight (N, 1) -> scalar; a sum over samples."""
    return sum((weight.detach() * (z - z_star.detach()).square()).sum() for z_star, weight in terms)


# ======================================================================================================================
# 2. Features phi: frozen networks in which a direction means something. Each takes latents x (B, 4, h, w) in the scale
#    of the generator and the prompts' condition, and returns a list of maps (B, T, D) in float32: T vectors an image.
#    Pooled, translation-invariant statistics serve; raw latents do not.
# ======================================================================================================================


def mean_std(h, patch=None):
    """Mean and population std, sqrt(var + 1e-6), of h (B, C, H, W) over patch x patch squares or all: 2 x (B, T, C)."""
    h = h.float()
    p, q = (patch, patch) if patch else h.shape[-2:]
    h = h.unflatten(-1, (-1, q)).unflatten(-3, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(-2)  # B,T,C,p*q
    return h.mean(-1), (h.var(-1, correction=0) + 1e-6).sqrt()


class _Block(nn.Module):
    """conv-gn-relu-conv-gn + shortcut, relu."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.conv1, self.gn1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False), nn.GroupNorm(32, c)
        self.conv2, self.gn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.GroupNorm(32, c)
        if stride > 1 or c_in != c:
            self.proj_conv, self.proj_gn = nn.Conv2d(c_in, c, 1, stride, bias=False), nn.GroupNorm(32, c)

    def forward(self, x):
        h = self.gn2(self.conv2(F.relu(self.gn1(self.conv1(x)))))
        return F.relu(h + (self.proj_gn(self.proj_conv(x)) if hasattr(self, "proj_conv") else x))


class LatentMAE(nn.Module):
    """ResNet encoder of a masked autoencoder on latents, the authors' features for SD-Turbo: global mean and std, mean
    and std over 2x2 and over 4x4 patches of its last stage: six maps.

    ModelScope jiangzhou130v1/drpo-mae-latent-256, mae_latent_256_torch.pth (width 256, 340 M parameters); the same network
    as JAX msgpack: HF hub Goodeat/drifting, models/mae/jax/mae_latent_256. Source: the paper's appendix, and that file."""

    URL = "https://modelscope.cn/models/jiangzhou130v1/drpo-mae-latent-256/resolve/master/mae_latent_256_torch.pth"
    SHA256 = "4810249905d2882a41d5a0fe97ebac995af8918dbe121daa9871e5bc605445b1"

    def __init__(self, widths=(256, 512, 1024, 2048), blocks=(3, 4, 6, 3), channels=4):
        super().__init__()
        c = widths[0]
        self.conv1, self.gn1 = nn.Conv2d(channels, c, 3, 1, 1, bias=False), nn.GroupNorm(32, c)
        for s, n in enumerate(blocks, 1):
            stage, c_in, c = nn.Module(), c, widths[s - 1]
            for b in range(n):
                stage.add_module(f"layers_{b}", _Block(c_in if b == 0 else c, c, 2 if b == 0 and s > 1 else 1))
            self.add_module(f"stages_{s}", stage)
            self.add_module(f"layer{s}_norm", nn.GroupNorm(32, c))

    def forward(self, x):
        """Latents (B, 4, h, w) -> last stage (B, C, h/8, w/8)."""
        h = F.relu(self.gn1(self.conv1(x)))
        for s in (1, 2, 3, 4):
            for block in getattr(self, f"stages_{s}").children():
                h = block(h)
            h = getattr(self, f"layer{s}_norm")(h)
        return h

    @classmethod
    def load(cls, path):
        """Reads the authors' file: convolutions `.kernel` HWIO or `.weight` OIHW, norms `.scale` or `.weight`."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        while not any(k.startswith("encoder.") for k in state) and any(isinstance(v, dict) for v in state.values()):
            state = next(v for v in state.values() if isinstance(v, dict))
        state = {k.removeprefix("encoder."): v.float() for k, v in state.items() if k.startswith("encoder.")}
        state = {(k[:-7] + ".weight" if k.endswith(".kernel") else k[:-6] + ".weight" if k.endswith(".scale") else k):
                 (v.permute(3, 2, 0, 1) if k.endswith(".kernel") else v) for k, v in state.items()}
        if "conv1.weight" not in state:
            raise UserError(f"{path}: no latent-MAE (no key encoder.conv1); expected the file of {cls.URL}")
        blocks = [len({k.split(".")[1] for k in state if k.startswith(f"stages_{s}.")}) for s in (1, 2, 3, 4)]
        widths = [state[f"stages_{s}.layers_0.conv1.weight"].shape[0] for s in (1, 2, 3, 4)]
        net = cls(widths, blocks, state["conv1.weight"].shape[1])
        net.load_state_dict(state)
        return net


def latent_mae(G, path=None, random_init=False):
    """Factory of the `latent-mae` features: see `LatentMAE`."""
    with torch.device(G.device):
        net = LatentMAE() if random_init else LatentMAE.load(path or fetch(LatentMAE.URL, LatentMAE.SHA256))
    net = frozen(net.to(G.device, G.dtype))
    G.compiled(net)

    def phi(x, condition):
        h = net(x.to(G.dtype))  # (B, C, h/8, w/8)
        whole, patches = mean_std(h), [p for p in (2, 4) if h.shape[-1] > p]
        return [*whole, *(m for p in patches for m in mean_std(h, p))]

    return phi


def vae_features(G, path=None, random_init=False):
    """`vae`: the frozen VAE decoder of the generator itself, after mid_block, up_blocks[0] and up_blocks[1]; of each the
    global mean, the global std, and the averages of its four quarters as one vector: nine maps. No download."""
    decoder = G.vae.decoder

    def phi(x, condition):
        h = x.to(G.vae.dtype) / G.vae.config.scaling_factor
        h = decoder.conv_in(G.vae.post_quant_conv(h) if G.vae.post_quant_conv is not None else h)
        maps = []
        for block in (decoder.mid_block, *decoder.up_blocks[:2]):
            h = block(h)
            quarters = F.adaptive_avg_pool2d(h.float(), 2).flatten(1)[:, None]  # (B, 1, 4 C)
            maps += [*mean_std(h), quarters]
        return maps

    return phi


def unet_features(G, path=None, random_init=False):
    """`unet`: the frozen base UNet at t = 100 on latents with noise 0.1, conditioned on the prompt: down_blocks[2],
    mid_block and up_blocks[0], 4x4 average-pooled and flattened: three maps. The authors' choice for SDXL-Turbo."""
    hidden = []

    def keep(module, args, output):
        hidden.append(output[0] if isinstance(output, tuple) else output)

    def phi(x, condition):
        noise = prompt_noise(0, 0, x.shape[1:]).to(x.device)  # one draw, shared by all: phi is a fixed function
        unet = G.reference_unet
        blocks = (unet.down_blocks[min(2, len(unet.down_blocks) - 1)], unet.mid_block, unet.up_blocks[0])
        hooks = [b.register_forward_hook(keep) for b in blocks]
        try:
            with G.reference():
                G.call_unet(x + 0.1 * noise, torch.tensor(100, device=x.device), condition)
            pooled = [F.avg_pool2d(h.float(), min(4, h.shape[-1])).flatten(1)[:, None] for h in hidden]  # (B, 1, D)
        finally:
            hidden.clear()
            for hook in hooks:
                hook.remove()
        return pooled

    return phi


def vit_features(repo, cls_name, random_size, **call):
    """`mae`, `dino`: a vision transformer on the decoded image, 224 x 224: of hidden_states[12] the mean and std over
    patches, and the class token: three maps. facebook/vit-mae-base (CC-BY-NC-4.0), facebook/dinov2-base (Apache-2.0).
    ViT-MAE masks and shuffles its patches at random even in eval mode: mask_ratio = 0 and sorted noise undo it."""

    def factory(G, path=None, random_init=False):
        import transformers
        cls = getattr(transformers, cls_name)
        if random_init:
            with torch.device(G.device):
                net = cls(cls.config_class(image_size=random_size))
        else:
            net = from_hub(cls.from_pretrained, path or repo)
        if hasattr(net.config, "mask_ratio"):
            net.config.mask_ratio = 0.0
        net = frozen(net.to(G.device, G.dtype))
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=G.device)[..., None, None]

        def phi(x, condition):
            image = F.interpolate(G.decode(x), (224, 224), mode="bicubic", antialias=True)  # (B, 3, 224, 224)
            kw = {}
            if cls_name == "ViTMAEModel":
                n = (224 // net.config.patch_size) ** 2
                kw["noise"] = torch.arange(n, device=x.device).expand(len(x), n)
            h = net(((image - mean) / std).to(G.dtype), output_hidden_states=True, **kw).hidden_states
            h = h[min(12, len(h) - 1)].float()  # (B, 1 + patches, D), class token first
            patches = h[:, 1:].mT[..., None]  # (B, D, patches, 1)
            return [*mean_std(patches), h[:, :1]]

        return phi

    return factory


def latent_features(G, path=None, random_init=False):
    """`latent`: the latent itself, flattened: one map. Kept because it fails (paper: 20.52 against 23.5 PickScore)."""
    return lambda x, condition: [x.float().flatten(1)[:, None]]


PHI = {"latent-mae": latent_mae, "vae": vae_features, "unet": unet_features,
       "mae": vit_features("facebook/vit-mae-base", "ViTMAEModel", 224),
       "dino": vit_features("facebook/dinov2-base", "Dinov2Model", 518), "latent": latent_features}


def load_features(spec, G, random_init=False):
    """'vae' or 'latent-mae@file,vae' -> phi(x (B, 4, h, w), condition) -> list of maps (B, T, D), float32."""
    parts = []
    for item in spec.split(","):
        name, _, path = item.strip().partition("@")
        parts.append(pick("feature", name, PHI)(G, path or None, random_init))
    return lambda x, condition: [z for phi in parts for z in phi(x, condition)]


def frozen(net):
    """eval mode, no gradient to its weights."""
    return net.eval().requires_grad_(False)


# ======================================================================================================================
# 3. The one-step generator x = G_theta(e, c) and its LoRA; the reference is the same network with the LoRA off.
# ======================================================================================================================

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention, as in the authors' recipe
LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"


class LoRA(nn.Module):
    """y = W x + alpha / r B A x, W frozen; A (r, in) random, B (out, r) zero, both float32 for the optimizer."""

    def __init__(self, base, rank, alpha, switch):
        super().__init__()
        self.base, self.scale, self.switch = base, alpha / rank, switch
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x, *args):
        y = self.base(x)
        if not self.switch["on"]:
            return y
        return y + F.linear(F.linear(x, self.A.to(x.dtype)), (self.scale * self.B).to(x.dtype))


class Generator:
    """A one-step generator in diffusers' SD or SDXL layout. encode(prompts) -> condition; sample(noise, condition) ->
    latents; decode(latents) -> images; reference(): context with the LoRA off; save_lora, load_lora."""

    def __init__(self, pipe, device, dtype, name="", compile=False, decoder="vae"):
        self.pipe, self.device, self.dtype, self.name, self.compile = pipe, torch.device(device), dtype, name, compile
        self.unet, self.vae, self.xl = pipe.unet, pipe.vae, hasattr(pipe, "text_encoder_2")
        for net in (pipe.unet, pipe.vae, pipe.text_encoder, *([pipe.text_encoder_2] if self.xl else [])):
            frozen(net.to(self.device, dtype))
        # sigma = 14.6 multiplies the rounding error of the last layers, so under bf16 they run in float32
        self.unet.conv_norm_out.float().register_forward_pre_hook(lambda module, x: (x[0].float(),))
        self.unet.conv_out.float()
        if dtype == torch.float16 and self.vae.config.force_upcast:
            print("the VAE overflows in fp16: it runs in float32", file=sys.stderr)
            self.vae.float()
        self.decoder = self.vae
        if decoder == "taesd":
            from diffusers import AutoencoderTiny
            repo = "madebyollin/taesdxl" if self.xl else "madebyollin/taesd"
            self.decoder = AutoencoderTiny() if name.startswith("random") else from_hub(AutoencoderTiny.from_pretrained, repo)
            frozen(self.decoder.to(self.device, dtype))
        scheduler = pipe.scheduler  # one step of it: x = (x_T - sigma eps), everything derived from its own config
        scheduler.set_timesteps(1)
        self.sigma, self.t = float(scheduler.sigmas[0]), scheduler.timesteps[0].to(self.device)
        self.init, self.prediction = float(scheduler.init_noise_sigma), scheduler.config.prediction_type
        size = self.unet.config.sample_size
        self.noise_shape = (self.unet.config.in_channels, size, size)
        self.switch, self.lora, self.reference_unet = {"on": True}, {}, self.unet
        self.loss_scale = 2.0**14 if dtype == torch.float16 else 1.0  # small gradients vanish in fp16
        self.compiled(self.unet)
        self.compiled(self.decoder.decoder)

    def compiled(self, net):
        """Compile a network in place where --compile asks for it."""
        if self.compile:
            net.compile()

    def encode(self, prompts):
        """List of P prompts -> condition, a dict of tensors with leading dimension P, as the pipeline encodes them."""
        with torch.no_grad():
            if not self.xl:
                return {"text": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}  # (P, 77, D)
            text, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, num_images_per_prompt=1,
                                                         do_classifier_free_guidance=False)
            side = self.noise_shape[-1] * self.pipe.vae_scale_factor
            ids = torch.tensor([[side, side, 0, 0, side, side]], device=self.device, dtype=self.dtype)
            return {"text": text, "pooled": pooled, "time_ids": ids.expand(len(prompts), -1)}

    def call_unet(self, x, t, condition):
        """The network's raw prediction: x (B, 4, h, w), t scalar, condition of B rows -> (B, 4, h, w) float32."""
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]} if self.xl else None
        return self.unet(x.to(self.dtype), t, condition["text"], added_cond_kwargs=added, return_dict=False)[0].float()

    def sample(self, noise, condition):
        """x = G(e, c): noise e (B, 4, h, w) ~ N(0, 1), condition of B rows -> latents (B, 4, h, w), float32.

        x_T = sigma e, x = x_T - sigma eps(c_in x_T, t = 999, c), c_in = 1 / sqrt(sigma^2 + 1): what the diffusers pipeline
        does with num_inference_steps=1, guidance_scale=0."""
        x_T = self.init * noise.float()
        out = self.call_unet(x_T / math.sqrt(self.sigma**2 + 1), self.t, condition)
        if self.prediction == "epsilon":
            return x_T - self.sigma * out
        if self.prediction == "v_prediction":
            return x_T / (self.sigma**2 + 1) - out * self.sigma / math.sqrt(self.sigma**2 + 1)
        return out  # "sample"

    def decode(self, latents):
        """Latents (B, 4, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        z = latents.to(next(self.decoder.parameters()).dtype) / self.decoder.config.scaling_factor
        return (self.decoder.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images):
        """Images (B, 3, H, W) in [0, 1] -> latents (B, 4, h, w), float32: the mode of the VAE's posterior."""
        with torch.no_grad():
            x = self.vae.encode((2 * images - 1).to(self.device, self.vae.dtype)).latent_dist.mode()
            return x.float() * self.vae.config.scaling_factor

    @contextlib.contextmanager
    def reference(self):
        """Inside it the generator is the frozen base G_ref: LoRA off, or with --full the kept copy."""
        unet, self.unet, self.switch["on"] = self.unet, self.reference_unet, False
        try:
            yield
        finally:
            self.unet, self.switch["on"] = unet, True

    def add_lora(self, rank, alpha):
        """Wrap the attention projections; returns the trainable parameters. Fresh, it changes nothing: B = 0."""
        self.remove_lora()
        for name, base in list(self.unet.named_modules()):
            if name.endswith(LORA_TARGETS) and isinstance(base, nn.Linear):
                self.lora[name] = LoRA(base, rank, alpha, self.switch)
                self.unet.set_submodule(name, self.lora[name])
        self.rank, self.alpha = rank, alpha
        return [p for module in self.lora.values() for p in (module.A, module.B)]

    def remove_lora(self, merge=False):
        """Take the LoRA out, or with merge fold it into the weights: W + alpha / r B A."""
        for name, module in self.lora.items():
            if merge:
                weight = module.base.weight
                weight.data.copy_(weight.float() + module.scale * module.B.data @ module.A.data)
            self.unet.set_submodule(name, module.base)
        self.lora = {}

    def train_all(self):
        """--full: every weight of the UNet trains, in float32 under autocast; the frozen copy is the reference."""
        self.reference_unet = deepcopy(self.unet)
        self.unet.float().requires_grad_(True)
        return list(self.unet.parameters())

    def kohya_name(self, name):
        """Module path -> kohya's key: diffusers' names for SD, the original SGM names for SDXL."""
        part = name.split(".")
        if self.xl and part[0] in ("down_blocks", "up_blocks", "mid_block"):
            n, k = self.unet.config.layers_per_block + 1, 2 if part[0] == "mid_block" else 3  # modules a level
            level = 0 if k == 2 else int(part[1])
            where = {"down_blocks": f"input_blocks_{1 + n * level + int(part[3])}_1" if k == 3 else "",
                     "up_blocks": f"output_blocks_{n * level + int(part[3])}_1" if k == 3 else "",
                     "mid_block": "middle_block_1"}[part[0]]
            part = [where, *part[4 if k == 3 else 3:]]
        return "lora_unet_" + "_".join(part)

    def save_lora(self, folder, format="diffusers", metadata=None):
        """Write the LoRA: diffusers format for pipe.load_lora_weights(folder), kohya format for A1111, ComfyUI, Forge.
        diffusers takes alpha = rank for granted, so there B carries alpha / r; kohya's file has alpha as a tensor."""
        from safetensors.torch import save_file
        folder = Path(folder)
        meta = {"format": "pt", "base_model": self.name, "lora_alpha": str(self.alpha), "lora_rank": str(self.rank),
                **(metadata or {})}
        diffusers, kohya = {}, {}
        for name, m in self.lora.items():
            A, B = m.A.detach().cpu().contiguous(), m.B.detach().cpu().contiguous()
            diffusers |= {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B * m.scale}
            key = self.kohya_name(name)
            kohya |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B, f"{key}.alpha": torch.tensor(self.alpha)}
        for file, state, formats in ((LORA_FILE, diffusers, ("diffusers", "both")), (KOHYA_FILE, kohya, ("kohya", "both"))):
            if format in formats:
                save_file(state, folder / (file + ".tmp"), metadata=meta)
                os.replace(folder / (file + ".tmp"), folder / file)

    def load_lora(self, path):
        """Load what save_lora wrote, either format, from a folder or a file; returns the file's metadata."""
        from safetensors import safe_open
        path = Path(path)
        if path.is_dir():
            path = next((path / f for f in (LORA_FILE, KOHYA_FILE) if (path / f).exists()), path / LORA_FILE)
        try:
            with safe_open(path, "pt") as f:
                meta, state = f.metadata() or {}, {k: f.get_tensor(k).float() for k in f.keys()}
        except Exception as e:
            raise UserError(f"{path}: not a readable LoRA file ({str(e).splitlines()[0]})") from e
        kohya = any(k.startswith("lora_unet_") for k in state)
        down, up = (".lora_down.weight", ".lora_up.weight") if kohya else (".lora_A.weight", ".lora_B.weight")
        rank = next((v.shape[0] for k, v in state.items() if k.endswith(down)), 0)
        alpha = float(next((v for k, v in state.items() if k.endswith(".alpha")), meta.get("lora_alpha", rank)))
        if not rank:
            raise UserError(f"{path}: no LoRA weights in it (expected keys *{down})")
        self.add_lora(rank, alpha)
        for name, m in self.lora.items():
            key = self.kohya_name(name) if kohya else f"unet.{name}"
            if key + down not in state or state[key + up].shape != m.B.shape or state[key + down].shape != m.A.shape:
                raise UserError(f"{path}: made for another base than {self.name} (base in the file: "
                                f"{meta.get('base_model', 'not stated')}; {key} is missing or of another shape)")
            m.A.data.copy_(state[key + down])
            m.B.data.copy_(state[key + up] / (1 if kohya else m.scale))
        return meta


def load_lora(generator, path):
    """Load a LoRA (diffusers or kohya format, a run's folder or a file) into a Generator; returns its metadata."""
    return generator.load_lora(path)


def from_hub(load, name, **kw):
    """load(name): from a local folder or the hub; a failure is the user's to mend, and says how."""
    try:
        return load(name, **kw)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{name} could not be loaded: neither a usable local folder nor in the cache or reachable on the "
                        f"hub ({reason[:200]}). Ways on: --model toy, or the path of a local diffusers folder") from e


def load_generator(name_or_path, *, device="cpu", dtype=torch.float32, random_init=False, compile=False, decoder="vae"):
    """toy, sd-turbo, sdxl-turbo, a diffusers folder or a hub id -> Generator with frozen weights and no LoRA."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if random_init:
        return Generator(random_pipeline(layout(name_or_path), device, dtype), device, dtype, f"random {name_or_path}",
                         compile, decoder)
    path = MODELS.get(name_or_path, name_or_path)
    if name_or_path not in MODELS and not Path(path).exists() and "/" not in path:
        pick("model", name_or_path, MODELS, "or a local diffusers folder, or a hub id owner/name")
    kw = dict(variant="fp16") if name_or_path in ("sd-turbo", "sdxl-turbo") else {}  # half the download
    pipe = from_hub(DiffusionPipeline.from_pretrained, path, torch_dtype=dtype, **kw)
    if not (hasattr(pipe, "unet") and hasattr(pipe, "vae") and hasattr(pipe, "text_encoder")):
        raise UserError(f"{path} is a {type(pipe).__name__}; expected an SD or SDXL layout (unet, vae, text_encoder)")
    return Generator(pipe, device, dtype, name_or_path, compile, decoder)


def layout(name_or_path):
    """The preset that fits a model: its own, or sdxl-turbo / sd-turbo by its model_index.json."""
    if name_or_path in PRESETS:
        return name_or_path
    path = Path(name_or_path)
    if not path.exists() and "/" not in name_or_path:
        pick("model", name_or_path, MODELS, "or a local diffusers folder, or a hub id owner/name")
    if path.exists():
        index = path / "model_index.json"
    else:
        from huggingface_hub import hf_hub_download
        index = Path(from_hub(lambda name: hf_hub_download(name, "model_index.json"), name_or_path))
    if not index.exists():
        raise UserError(f"{path}: no model_index.json in it; expected a diffusers folder in SD or SDXL layout")
    return "sdxl-turbo" if "XL" in json.loads(index.read_text()).get("_class_name", "") else "sd-turbo"


# Public configurations of the two architectures, for --random-init.
_UNET = dict(sample_size=64, use_linear_projection=True, layers_per_block=2)
_SCHEDULER = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing", steps_offset=1)
ARCHITECTURES = {
    "sd-turbo": dict(
        unet=dict(block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024),
        text=[dict(hidden_size=1024, num_hidden_layers=23, num_attention_heads=16, intermediate_size=4096,
                   hidden_act="gelu")],
        scaling_factor=0.18215),
    "sdxl-turbo": dict(
        unet=dict(block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
                  transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
                  projection_class_embeddings_input_dim=2816,
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")),
        text=[dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
                   projection_dim=768),
              dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, intermediate_size=5120,
                   hidden_act="gelu", projection_dim=1280)],
        scaling_factor=0.13025),
}


def random_pipeline(name, device="cpu", dtype=torch.float32, vae=None, **override):
    """A pipeline of the named architecture with random weights, made in place: no download. `override` replaces entries
    of ARCHITECTURES[name], `vae` those of the VAE: tests build tiny ones."""
    import diffusers
    import transformers
    arch = {**ARCHITECTURES[name], **override}
    vae = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
               up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512, scaling_factor=arch["scaling_factor"]) | (vae or {})
    tokenizer = _character_tokenizer(transformers)
    with torch.device(device), _default_dtype(dtype):
        unet = diffusers.UNet2DConditionModel(**_UNET | arch["unet"])
        vae = diffusers.AutoencoderKL(**vae)
        encoders = [transformers.CLIPTextModelWithProjection if i else transformers.CLIPTextModel for i in range(len(arch["text"]))]
        texts = [cls(transformers.CLIPTextConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **kw))
                 for cls, kw in zip(encoders, arch["text"])]
    parts = dict(unet=unet, vae=vae, text_encoder=texts[0], tokenizer=tokenizer)
    if len(texts) == 2:
        return diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=texts[1], tokenizer_2=tokenizer, add_watermarker=False,
            scheduler=diffusers.EulerAncestralDiscreteScheduler(**_SCHEDULER))
    return diffusers.StableDiffusionPipeline(**parts, scheduler=diffusers.EulerDiscreteScheduler(**_SCHEDULER),
                                             safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _character_tokenizer(transformers):
    """A CLIP tokenizer whose words are characters: all that random weights need."""
    import tempfile
    symbols = [chr(c) for c in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *(s + "</w>" for s in symbols)]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer(str(vocab), str(merges), model_max_length=77)


# ======================================================================================================================
# 4. One training step, with exact micro-batches.
# ======================================================================================================================


class Timer:
    """Seconds of each phase of a step; on a GPU by events, so that the host waits for nothing."""

    def __init__(self, device):
        self.cuda, self.marks = torch.device(device).type == "cuda", []

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def __call__(self, phase):
        start = self.now()
        yield
        self.marks.append((phase, start, self.now()))

    def seconds(self):
        """{phase: seconds} since the last call; waits for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()
        total = {}
        for phase, a, b in self.marks:
            total[phase] = total.get(phase, 0.0) + (a.elapsed_time(b) / 1e3 if self.cuda else b - a)
        self.marks = []
        return total


def rows(condition, index):
    """The rows `index` of a condition, a dict of tensors (P, ...)."""
    return {k: v[index] for k, v in condition.items()}


def anchors_of(z, mask, m):
    """Features of the marked candidates: z (P, K, T, D), mask (P, K) -> (P, m T, D), padded, and what is no padding."""
    index = mask.float().argsort(dim=-1, descending=True, stable=True)[:, :m]  # (P, m)
    anchors = z[torch.arange(len(z), device=z.device)[:, None], index]  # (P, m, T, D): gathered, never computed again
    return anchors.flatten(1, 2), mask.gather(1, index).repeat_interleave(z.shape[2], 1)


def drpo_gradient(G, phi, prompts, noise, cfg, micro, *, score=None, pairs=None, timer=None):
    """One update's gradient, times G.loss_scale, added to .grad of the trainable weights; returns a dict of what happened.

    prompts: P strings; noise (P, K, 4, h, w); micro: images at once; score(images (B, 3, H, W), prompts, finish=None) see
    `Scorer`; pairs: offline anchors, see `load_pairs`.
    Exact for any micro: the targets are detached, so once they are known the loss is a sum over samples.
    (A) all chunks without gradient: sample, decode, score, features. (B) rank, field, targets. (C) chunk by chunk: sample
    again, now with gradient, its share of the loss, backward. Where one chunk holds all, A keeps its graph for C."""
    timer = timer or Timer(G.device)
    P, K = noise.shape[:2]
    with timer("sample"):
        condition, e = G.encode(prompts), noise.flatten(0, 1).to(G.device)  # (P K, 4, h, w)
    owner = torch.arange(P, device=G.device).repeat_interleave(K)  # (P K,): the prompt of each image
    chunks = torch.arange(P * K, device=G.device).split(micro)
    whole = len(chunks) == 1

    def generate(i):  # with or without gradient, as the caller says
        c = rows(condition, owner[i])
        with timer("sample"):
            x = G.sample(e[i], c)
        with timer("features"):
            return x, phi(x, c)

    A = []
    for i in chunks:  # (A)
        with torch.set_grad_enabled(whole):
            x, z = generate(i)
        with torch.no_grad():
            with G.reference():
                x_ref, z_ref = generate(i)
            if score:
                with timer("decode"):
                    images = G.decode(x)
                with timer("reward"):
                    score(images, [prompts[j // K] for j in i.tolist()])
            A.append((x.detach(), x_ref, [h.detach() for h in z], z_ref))
    x, x_ref = (torch.cat(t) for t in list(zip(*A))[:2])  # (P K, 4, h, w)
    z_all, z_refs = ([torch.cat(h) for h in zip(*t)] for t in list(zip(*A))[2:])  # per map (P K, T, D)

    with torch.no_grad(), timer("field"):  # (B)
        scores = score.finish(P, K).to(G.device) if score else None  # (P, K)
        if score:
            masks = rank(scores, cfg.anchors)
            anchored = masks[0].any(-1) & masks[1].any(-1)
        terms, rms = [], []
        for n, (h, h_ref) in enumerate(zip(z_all, z_refs)):
            h, h_ref = (t.unflatten(0, (P, K)) for t in (h, h_ref))  # (P, K, T, D)
            (a, a_mask), (b, b_mask) = pairs[n] if pairs else [anchors_of(h, mask, cfg.anchors) for mask in masks]
            result, *r = drpo_target(h.flatten(1, 2), h_ref.flatten(1, 2), a, b, (a_mask, b_mask), cfg)
            share = P * (len(z_all) if cfg.feature_reduction == "mean" else 1)
            terms.append([(t.reshape(P * K, *h.shape[2:]), w / share) for t, w in result])  # (P K, T, D), (P, 1, 1)
            rms.append(torch.stack(r))  # (2, P, R)

    loss = 0.0
    for i in chunks:  # (C)
        if not whole:
            _, z = generate(i)
        with timer("backward"):
            part = sum(regression_loss(h, [(t[i], w[owner[i]]) for t, w in term]) for h, term in zip(z, terms))
            (part * G.loss_scale).backward()
            loss = loss + part.detach()
    rms = torch.stack(rms).mean((0, 2)).tolist()  # (2, R): mean over maps and prompts
    metrics = dict(loss=float(loss), rms_pref=rms[0], rms_ref=rms[1], **spread(x, x_ref, P, K))
    if score:
        metrics |= score_metrics(scores, *masks) | {"skipped": int((~anchored).sum())}
    return metrics | (score.logged() if score else {})


def spread(x, x_ref, P, K):
    """How far the pictures went, in latents (P K, 4, h, w): RMS distance to the reference's picture of the same noise, and
    the mean distance within a prompt relative to the reference's."""
    within = [mean_distance(distances(h := t.reshape(P, K, -1), h)).mean() for t in (x, x_ref)]
    return {"distance": float((x - x_ref).square().mean().sqrt()), "diversity": float(within[0] / within[1])}


def score_metrics(scores, positive, negative):
    """Figures of the scores (P, K), means over prompts: mean, best, worst, std within a prompt, gap between anchors."""
    known = scores[~scores.isnan().all(-1)].double()  # a prompt without an opinion has no figures
    if not len(known):
        return {}
    low, high = known.nan_to_num(nan=math.inf).amin(-1), known.nan_to_num(nan=-math.inf).amax(-1)
    mean = known.nanmean(-1, keepdim=True)
    gap = [scores[mask].double().mean() if mask.any() else torch.tensor(math.nan) for mask in (positive, negative)]
    return {"reward_mean": float(mean.mean()), "reward_best": float(high.mean()), "reward_worst": float(low.mean()),
            "reward_std": float((known - mean).square().nanmean(-1).sqrt().mean()), "gap": float(gap[0] - gap[1])}


class Scorer:
    """Collects the scores of a step's chunks: the reward that ranks, and the watched ones that never do."""

    def __init__(self, reward, watched, cfg):
        self.reward, self.watched, self.timeout, self.watching = reward, watched, cfg.reward_timeout, False
        self.reset()

    def reset(self):
        self.parts, self.watch = {}, {}

    def __call__(self, images, prompts):
        """Score images (B, 3, H, W) in [0, 1] of B prompts."""
        for reward, kept in [(self.reward, self.parts)] + [(w, self.watch) for w in self.watched if self.watching]:
            for name, scores in in_time(lambda: reward.score(images, prompts), self.timeout, reward.name).items():
                kept.setdefault(name, []).append(scores)

    def finish(self, P, K):
        """The scores that rank, (P, K): of one reward as they are, of several the weighted sum of z-scores per prompt."""
        self.parts = {name: torch.cat(s).reshape(P, K) for name, s in self.parts.items()}
        return self.reward.combine(self.parts)

    def logged(self):
        """Mean of every part of a combined reward and of every watched reward; empties the collection."""
        out = {f"part/{k}": float(v.double().nanmean()) for k, v in self.parts.items() if len(self.parts) > 1}
        out |= {f"watch/{k}": float(torch.cat(v).double().nanmean()) for k, v in self.watch.items()}
        self.reset()
        return out


def in_time(call, seconds, name):
    """call(), in a thread of its own so that a reward that hangs can be given up."""
    result = {}

    def work():
        try:
            with torch.no_grad():
                result["value"] = call()
        except BaseException as e:
            result["error"] = e

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise UserError(f"reward {name!r}: no answer within {seconds:g} s (--reward-timeout)")
    if "error" in result:
        raise result["error"]
    return result["value"]


def prompt_noise(seed, position, shape):
    """Noise of one prompt, drawn on the CPU: the same on every device, for any micro-batch and number of GPUs."""
    g = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + position) % 2**63)
    return torch.randn(shape, generator=g)


# ======================================================================================================================
# 5. Prompts, files, pictures.
# ======================================================================================================================

ANIMALS = [f"a {a} {b}" for a in
           ("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion",
            "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale",
            "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig",
            "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo")
           for b in ("riding a bike", "playing chess", "washing the dishes")]
PICKAPIC = "https://raw.githubusercontent.com/UGVly/DrPO/dd473d8fc28ffe4fb8d0440ad249164e21a23cb0/data/pickscore/"
PROMPTS = {  # user-written Pick-a-Pic v2 prompts, partly explicit
    "pickapic": (PICKAPIC + "train.txt", "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f"),
    "pickapic-test": (PICKAPIC + "test.txt", "d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262"),
    "scenes": HERE / "toy" / "captions_train.txt", "scenes-test": HERE / "toy" / "captions_heldout.txt", "animals": ANIMALS}


def pick(kind, name, options, also=""):
    """options[name], or one clear line with the nearest names."""
    if name in options:
        return options[name] if isinstance(options, dict) else name
    near = difflib.get_close_matches(name, options, 3, 0.4) or list(options)
    raise UserError(f"unknown {kind} {name!r}; did you mean {', '.join(near)}?{f' ({also})' if also else ''}")


def fetch(url, sha256):
    """Path of a file of the web, fetched once into ~/.cache/drpo (or $DRPO_CACHE) and checked against its checksum."""
    path = Path(os.environ.get("DRPO_CACHE", Path.home() / ".cache" / "drpo")) / sha256[:12] / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {url}", file=sys.stderr)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as e:
            raise UserError(f"{url} could not be fetched ({e}); put the file at {path} and start again") from e
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path}: its sha256 differs from {sha256}; delete it, and it will be fetched again")
    return path


def load_prompts(spec):
    """A built-in name, a text file (a prompt a line) or a .jsonl with "prompt" -> list of prompts."""
    source = PROMPTS.get(spec, spec)
    if isinstance(source, list):
        return source
    path = fetch(*source) if isinstance(source, tuple) else Path(source)
    if not path.is_file():
        near = f"; did you mean {', '.join(n)}?" if (n := difflib.get_close_matches(str(spec), PROMPTS, 3, 0.5)) else ""
        raise UserError(f"prompts {str(spec)!r}: neither a file nor one of {', '.join(PROMPTS)}{near}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise UserError(f"prompts {path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from e
    if path.suffix == ".jsonl":
        lines = [json_line(path, n, line, "prompt")["prompt"] for n, line in enumerate(lines, 1)]
    if not lines:
        raise UserError(f"prompts {path}: empty; expected a prompt a line")
    return lines


def json_line(path, n, line, *keys):
    """One line of a .jsonl as a dict that has the keys; the first is a string."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or any(k not in row for k in keys) or not isinstance(row[keys[0]], str):
        raise UserError(f"{path}, line {n}: expected a JSON object with {', '.join(keys)}")
    return row


def load_pairs(path, allow_outside=False):
    """Offline pairs -> list of (prompt, [chosen files], [rejected files]); files lie in the folder of the .jsonl."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"pairs {path}: no such file; expected a .jsonl with prompt, chosen, rejected")
    out, home = [], path.resolve().parent
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            row = json_line(path, n, line, "prompt", "chosen", "rejected")
            sides = [[home / f for f in row[side]] if isinstance(row[side], list) else [] for side in ("chosen", "rejected")]
            for file in sides[0] + sides[1]:
                if not file.resolve().is_relative_to(home) and not allow_outside:
                    raise UserError(f"{path}, line {n}: {file} lies outside {home} (--pairs-anywhere allows it)")
                if not file.is_file():
                    raise UserError(f"{path}, line {n}: {file} is missing")
            if not all(sides):
                raise UserError(f"{path}, line {n}: chosen and rejected must each be a list of at least one file")
            out.append((row["prompt"], *sides))
    if not out:
        raise UserError(f"pairs {path}: empty; expected a line a prompt")
    return out


def pair_anchors(G, phi, pairs):
    """Features of the files of P offline pairs: per map, (positive (P, M, D), mask (P, M)) and the same for negative."""
    from PIL import Image
    side = G.noise_shape[-1] * G.pipe.vae_scale_factor
    found = []  # per prompt and sign: list of maps (n, T, D)
    for prompt, *sides in pairs:
        for files in sides:
            images = [to_tensor(Image.open(f).convert("RGB").resize((side, side), Image.BICUBIC)) for f in files]
            x = G.encode_images(torch.stack(images).to(G.device))
            with torch.no_grad():
                found.append(phi(x, rows(G.encode([prompt]), torch.zeros(len(x), dtype=torch.long, device=G.device))))
    out = []
    for maps in zip(*found):  # 2 P tensors (n, T, D): positive and negative in turn
        pad = nn.utils.rnn.pad_sequence([h.flatten(0, 1) for h in maps], batch_first=True)  # (2 P, M, D)
        count = torch.tensor([h.shape[0] * h.shape[1] for h in maps], device=pad.device)
        mask = torch.arange(pad.shape[1], device=pad.device) < count[:, None]  # (2 P, M)
        out.append([(pad[s::2], mask[s::2]) for s in (0, 1)])
    return out


def to_tensor(image):
    """PIL picture -> (3, H, W) in [0, 1], float32."""
    import numpy as np
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255


def to_pil(images):
    """Images (B, 3, H, W) in [0, 1] -> list of PIL pictures."""
    from PIL import Image
    array = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def picture_grid(rows_of_images, captions, labels, side=None):
    """Rows of PIL pictures (one list a row) under captions (one a column), labels at the left -> one PIL picture."""
    from PIL import Image, ImageDraw, ImageFont
    side = side or max(128, min(256, rows_of_images[0][0].width))
    font, left, gap = ImageFont.load_default(13), 54, 6
    lines = [wrap(c, font, side) for c in captions]
    top = 8 + 16 * max(map(len, lines))
    size = (left + len(captions) * (side + gap), top + len(rows_of_images) * (side + gap))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for c, text in enumerate(lines):
        draw.multiline_text((left + c * (side + gap), 4), "\n".join(text), "black", font, spacing=2)
    for r, (images, label) in enumerate(zip(rows_of_images, labels)):
        draw.text((6, top + r * (side + gap) + side // 2), label, "black", font, anchor="lm")
        for c, image in enumerate(images):
            enlarge = Image.NEAREST if image.width <= side and side % image.width == 0 else Image.LANCZOS
            grid.paste(image.resize((side, side), enlarge), (left + c * (side + gap), top + r * (side + gap)))
    return grid


def wrap(text, font, width, most=4):
    """Lines of text that fit into width pixels; at most `most`."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:most - 1] + [lines[most - 1] + " ..."] if len(lines) > most else lines


def draw_curve(metrics, path):
    """curve.png: reward mean, best and worst (left), and every watched reward (a panel each), over steps."""
    from PIL import Image, ImageDraw, ImageFont
    names = [["reward_mean", "reward_best", "reward_worst"]]
    names += [[k] for k in sorted({k for row in metrics for k in row if k.startswith("watch/")})]
    names += [["diversity"]]
    w, h, font = 480, 320, ImageFont.load_default(14)
    image = Image.new("RGB", (w * len(names), h), "white")
    draw = ImageDraw.Draw(image)
    for n, keys in enumerate(names):
        series = {k: [(row["step"], row[k]) for row in metrics if isinstance(row.get(k), float) and row[k] == row[k]] for k in keys}
        points = [p for s in series.values() for p in s]
        if not points:
            continue
        x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
        y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
        y0, y1 = (y0, y1) if y1 > y0 else (y0 - 0.5, y1 + 0.5)
        left, right, top, bottom = n * w + 64, n * w + w - 16, 34, h - 34
        place = lambda p: (left + (p[0] - x0) / max(x1 - x0, 1) * (right - left), bottom - (p[1] - y0) / (y1 - y0) * (bottom - top))
        for i in range(5):
            y = bottom - i * (bottom - top) / 4
            draw.line((left, y, right, y), "#dddddd")
            draw.text((left - 6, y), f"{y0 + i * (y1 - y0) / 4:.3g}", "#555555", font, anchor="rm")
        draw.text((left, h - 12), f"step {x0}", "#555555", font, anchor="lm")
        draw.text((right, h - 12), str(x1), "#555555", font, anchor="rm")
        for i, (key, color) in enumerate(zip(keys, ("#1f5fbf", "#3a9a4a", "#c0392b"))):
            draw.text((left + 130 * i, 16), key, color, font, anchor="lm")
            if len(series[key]) > 1:
                draw.line([place(p) for p in series[key]], color, 2, joint="curve")
    write_atomic(path, lambda f: image.save(f, "PNG"))


def write_atomic(path, write, keep=None):
    """write(file) beside `path`, then rename: a reader never sees half a file, and a full disk spoils nothing. The file
    that was there is kept as `keep`."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def digest(state):
    """sha256 of a checkpoint's content: nested dicts, lists, numbers and tensors."""
    sha = hashlib.sha256()

    def add(value):
        if torch.is_tensor(value):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                add(str(key)), add(value[key])
        elif isinstance(value, (list, tuple)):
            [add(v) for v in value]
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


def save_checkpoint(folder, state):
    """checkpoint.pt, atomically, with the digest of its content; the one before stays as checkpoint.previous.pt."""
    write_atomic(Path(folder) / "checkpoint.pt", lambda f: torch.save({**state, "sha256": digest(state)}, f),
                 keep=Path(folder) / "checkpoint.previous.pt")


def load_checkpoint(folder):
    """The newest whole checkpoint of a run. Objects are never unpickled (weights_only)."""
    problems = []
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = Path(folder) / name
        if not path.exists():
            problems.append(f"{name} is missing")
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state.pop("sha256") == digest(state):
                if problems:
                    print(f"{folder}: {'; '.join(problems)}; going on from {name}, step {state['step']}", file=sys.stderr)
                return state
            problems.append(f"{name}: its checksum differs from its content")
        except Exception as e:  # torn files fail in many ways
            problems.append(f"{name} cannot be read ({type(e).__name__})")
    raise UserError(f"{folder}: no checkpoint to go on from ({'; '.join(problems)})")


# ======================================================================================================================
# 6. A run.
# ======================================================================================================================

# settings that may differ after --resume: they do not change what is computed
FREE = {"steps", "resume", "out", "save_every", "preview_every", "log_every", "micro_batch", "device", "compile", "profile",
        "tensorboard", "reward_timeout", "watch", "watch_every", "lora_format"}


class Stop:
    """SIGINT and SIGTERM end the run after the step in hand; a second one ends it at once."""

    def __init__(self):
        self.signal = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number


def check(cfg):
    """Settings that contradict each other or name nothing: one line, before anything is loaded or written."""
    for name in (item.strip().partition("@")[0] for item in cfg.features.split(",")):
        pick("feature", name, FEATURES)
    pick("kernel", cfg.kernel, KERNELS)
    pick("field", cfg.field, ("dipole", "released"))
    for name in ("steps", "batch", "candidates", "anchors", "lora_rank", "save_every", "log_every", "watch_every"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; expected at least 1")
    if not cfg.pairs and 2 * cfg.anchors > cfg.candidates:
        raise UserError(f"--anchors {cfg.anchors} is above half of --candidates {cfg.candidates}: best and worst would overlap")
    if not cfg.radii or min(cfg.radii) <= 0:
        raise UserError(f"--radii {cfg.radii}: expected positive numbers, such as 0.2,0.5,1")
    if cfg.micro_batch != "auto" and not (str(cfg.micro_batch).isdigit() and int(cfg.micro_batch) > 0):
        raise UserError(f"--micro-batch {cfg.micro_batch!r}: expected auto or a number of images, at least 1")
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {cfg.device}: torch sees no CUDA device here; use --device cpu, or install a CUDA build")
    out = Path(cfg.out)
    if cfg.out and not cfg.resume and (out.is_file() or any((out / f).exists() for f in ("config.json", "metrics.jsonl"))):
        raise UserError(f"--out {out} already holds a run; go on with --resume {out}, or name another folder")


def start(cfg):
    """Device, dtype, seeds, and with torchrun the process group: -> device, dtype, rank, number of ranks."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not cfg.deterministic
    random.seed(cfg.seed), torch.manual_seed(cfg.seed)
    dtype = DTYPES[cfg.dtype if cfg.dtype != "auto" else "bf16" if device.startswith("cuda") else "fp32"]
    return device, dtype, rank, world


def all_reduce_mean(tensors, world):
    """Average tensors over the ranks in place, by one all-reduce."""
    if world > 1 and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        try:
            dist.all_reduce(flat)
        except RuntimeError as e:
            raise UserError(f"another rank of this run ended, so this one stops too ({str(e).splitlines()[0][:120]})") from e
        for t, part in zip(tensors, (flat / world).split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


def rng_state():
    """States of the generators that a reward of the user's may draw from; drpo's own noise needs none."""
    return {"torch": torch.get_rng_state(), "python": random.getstate(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class Trainer:
    """Everything that a run holds: generator, features, reward, prompts, optimizer, and where it stands."""

    def __init__(self, cfg):
        check(cfg)
        self.cfg, (device, dtype, self.rank, self.world) = cfg, start(cfg)
        self.pairs = load_pairs(cfg.pairs) if cfg.pairs else None
        self.prompts = [p[0] for p in self.pairs] if self.pairs else load_prompts(cfg.prompts or "scenes")
        load = lambda spec: rewards.load(spec, device=device)
        self.scorer = None if self.pairs else Scorer(load(cfg.reward or "scene"), [load(w) for w in cfg.watch.split(",") if w], cfg)
        self.G = load_generator(cfg.model, device=device, dtype=dtype, random_init=cfg.random_init, compile=cfg.compile,
                                decoder=cfg.decoder)
        self.phi = load_features(cfg.features, self.G, cfg.random_init)
        torch.manual_seed(cfg.seed)  # the LoRA's start depends on nothing that was drawn while loading
        self.params = self.G.train_all() if cfg.full else self.G.add_lora(cfg.lora_rank, cfg.lora_alpha)
        self.optimizer = torch.optim.AdamW(self.params, cfg.lr, weight_decay=cfg.weight_decay,
                                           fused=self.G.device.type == "cuda")
        most = cfg.batch * cfg.candidates
        self.micro = most if cfg.micro_batch == "auto" else min(int(cfg.micro_batch), most)
        self.step = self.position = self.bad = 0
        self.timer, self.metrics = Timer(self.G.device), []

    def prompt_indices(self):
        """The prompts of this rank's next step: every epoch is a permutation of its own; position counts over all ranks."""
        n = len(self.prompts)
        for i in range(self.cfg.batch):
            position = self.position + self.rank * self.cfg.batch + i
            g = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + position // n)
            yield position, int(torch.randperm(n, generator=g)[position % n])

    def gradient(self):
        """The gradient of the next step; where memory runs out the micro-batch is halved and the step begun again."""
        positions, index = zip(*self.prompt_indices())
        noise = torch.stack([prompt_noise(self.cfg.seed, p, (self.cfg.candidates, *self.G.noise_shape)) for p in positions])
        while True:
            try:
                self.optimizer.zero_grad()
                pairs = pair_anchors(self.G, self.phi, [self.pairs[i] for i in index]) if self.pairs else None
                return drpo_gradient(self.G, self.phi, [self.prompts[i] for i in index], noise, self.cfg, self.micro,
                                     score=self.scorer, pairs=pairs, timer=self.timer)
            except torch.OutOfMemoryError:
                if self.micro == 1:
                    raise UserError("out of GPU memory at --micro-batch 1; try fewer --candidates, or --decoder taesd")
                self.micro //= 2
            print(f"out of GPU memory: going on with --micro-batch {self.micro}", file=sys.stderr)  # outside except: frees
            self.scorer and self.scorer.reset()
            self.timer.marks = []
            torch.cuda.empty_cache()

    def train_step(self):
        """One update; returns its line of metrics. A gradient that is not finite changes nothing and is counted."""
        cfg, began = self.cfg, time.perf_counter()
        if self.scorer:
            self.scorer.watching = self.step % cfg.watch_every == 0 or self.step == cfg.steps - 1
        metrics = self.gradient()
        grads = [p.grad for p in self.params if p.grad is not None]
        torch._foreach_div_(grads, self.G.loss_scale)
        all_reduce_mean(grads, self.world)
        with self.timer("optimizer"):
            norm = float(nn.utils.clip_grad_norm_(self.params, cfg.clip))
            rate = cfg.lr * (0.5 + 0.5 * math.cos(math.pi * self.step / cfg.steps) if cfg.lr_decay else 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            finite = math.isfinite(norm) and math.isfinite(metrics["loss"])
            if finite:
                self.optimizer.step()
        self.bad = 0 if finite else self.bad + 1
        self.step, self.position = self.step + 1, self.position + cfg.batch * self.world
        phases, seconds = self.timer.seconds(), time.perf_counter() - began
        metrics = {"step": self.step, "seconds": seconds,
                   "images_per_second": cfg.batch * cfg.candidates * self.world / seconds, **metrics, "grad_norm": norm,
                   "lr": rate, "applied": finite, **{f"seconds_{k}": v for k, v in phases.items()}}
        if self.G.device.type == "cuda":
            metrics["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def state(self):
        """All that a checkpoint holds: plain numbers, strings and tensors."""
        return {"step": self.step, "position": self.position, "bad": self.bad, "rng": rng_state(),
                "weights": [p.detach().cpu() for p in self.params], "optimizer": self.optimizer.state_dict(),
                "config": settings(self.cfg)}

    def restore(self, state):
        self.step, self.position, self.bad = state["step"], state["position"], state["bad"]
        for p, w in zip(self.params, state["weights"]):
            p.data.copy_(w)
        self.optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])

    def save(self, out):
        """Checkpoint for --resume, and the weights in the formats that others load."""
        save_checkpoint(out, self.state())
        if self.cfg.full:
            self.G.unet.save_pretrained(out / "unet")
        else:
            self.G.save_lora(out, self.cfg.lora_format, {"settings": json.dumps(settings(self.cfg))})

    def preview(self, path):
        """Fixed prompts, fixed noise: the base above, the tuned model below."""
        n = min(8, len(self.prompts))
        prompts = [self.prompts[i * len(self.prompts) // n] for i in range(n)]
        noise = torch.stack([prompt_noise(self.cfg.seed, -1 - i, self.G.noise_shape) for i in range(n)]).to(self.G.device)
        pictures = []
        with torch.no_grad():
            condition = self.G.encode(prompts)
            for context in (self.G.reference(), contextlib.nullcontext()):
                with context:
                    x = [self.G.sample(noise[i:i + 1], rows(condition, slice(i, i + 1))) for i in range(n)]
                pictures.append(sum((to_pil(self.G.decode(h)) for h in x), []))
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, lambda f: picture_grid(pictures, prompts, ("base", "tuned")).save(f, "PNG"))


def settings(cfg):
    """Config as plain data, for JSON and checkpoints."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(cfg).items()}


def describe(cfg, T):
    """What a run is about to do, in a few lines."""
    P, K, n = cfg.batch, cfg.candidates, sum(p.numel() for p in T.params)
    given = {k: v for k, v in settings(cfg).items() if v not in ("", False)}
    print("  ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in given.items()))
    print(f"{P} prompts x {K} candidates{f' x {T.world} ranks' if T.world > 1 else ''} = {P * K * T.world} images a step, "
          f"{T.micro} at once; {n:,} trainable weights; {len(T.prompts):,} prompts; {T.G.device} {cfg.dtype}", flush=True)


def figures(m, cfg, seconds_left):
    """One readable line of a step's metrics."""
    parts = [f"step {m['step']}/{cfg.steps}"]
    parts += [f"reward {m['reward_mean']:.4g} (best {m['reward_best']:.4g}, worst {m['reward_worst']:.4g})"] if "reward_mean" in m else []
    parts += [f"{k[6:]} {v:.4g}" for k, v in m.items() if k.startswith("watch/")]
    parts += [f"diversity {m['diversity']:.0%}", f"distance {m['distance']:.3g}", f"grad {m['grad_norm']:.3g}"]
    parts += [f"skipped {m['skipped']}"] if m.get("skipped") else []
    parts += [f"{m['seconds']:.2f} s", f"{m['peak_gib']:.1f} GiB"] if "peak_gib" in m else [f"{m['seconds']:.2f} s"]
    return "  ".join(parts) + f"  left {int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"


def open_run(cfg, T):
    """The run's folder, with config.json; after --resume the metrics beyond the checkpoint are cut off."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out = Path(cfg.resume or cfg.out or f"runs/{Path(cfg.model).name}-{'pairs' if cfg.pairs else Path(cfg.reward).stem}-{stamp}")
    out.mkdir(parents=True, exist_ok=True)
    log = out / "metrics.jsonl"
    if cfg.resume and log.exists():
        for line in log.read_text().splitlines()[:T.step]:
            T.metrics.append(json.loads(line))
        write_atomic(log, lambda f: f.write("".join(json.dumps(m) + "\n" for m in T.metrics).encode()))
    else:
        import diffusers
        import transformers
        versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)} | {"python": sys.version.split()[0]}
        config = {**settings(cfg), "versions": versions, "git": git_revision(), "command": sys.argv}
        write_atomic(out / "config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))
    return out, log


def git_revision():
    """Revision of this file's checkout, or None."""
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def train(cfg):
    """Run DrPO with these settings -> path of the run's folder."""
    T = Trainer(cfg)
    if cfg.resume:
        T.restore(load_checkpoint(cfg.resume))
    if cfg.profile:
        return profile(T)
    first, lead, stop, began = T.step, T.rank == 0, Stop(), time.perf_counter()
    if lead:
        describe(cfg, T)
        out, log = open_run(cfg, T)
        if cfg.preview_every and not cfg.resume:
            T.preview(out / "samples" / "step-000000.png")
    bar = tqdm(total=cfg.steps, initial=T.step, disable=not (lead and sys.stderr.isatty()), unit="step")
    while T.step < cfg.steps and not stop.signal:
        try:
            m = T.train_step()
        except UserError as e:
            if lead and T.step > first:
                T.save(out)
            raise UserError(f"step {T.step + 1}: {e}" + (f" (saved; go on with --resume {out})" if lead and T.step > first else "")) from e
        if lead:
            T.metrics.append(m)
            with open(log, "a") as f:
                f.write(json.dumps(m) + "\n")
            left = (time.perf_counter() - began) / (T.step - first) * (cfg.steps - T.step)
            if T.step % cfg.log_every == 0 or T.step in (1, cfg.steps):
                tqdm.write(figures(m, cfg, left))
            bar.update()
            last = T.step == cfg.steps or stop.signal or T.bad == 3
            if T.step % cfg.save_every == 0 or last:
                T.save(out)
            if cfg.preview_every and (T.step % cfg.preview_every == 0 or T.step == cfg.steps):
                T.preview(out / "samples" / f"step-{T.step:06d}.png")
                draw_curve(T.metrics, out / "curve.png")
        if T.bad == 3:
            raise UserError(f"step {T.step}: loss or gradient not finite three times in a row; nothing of these steps was "
                            f"applied. Try a lower --lr or --dtype bf16, then --resume")
    bar.close()
    if stop.signal:
        if lead:
            print(f"stopped after step {T.step}; go on with: python drpo.py --resume {out}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    if lead:
        print(f"done: {out}")
        return out


# ======================================================================================================================
# 7. The command line, made from Config.
# ======================================================================================================================


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python drpo.py --help lists the settings)")


def numbers(text):
    return tuple(float(x) for x in text.split(","))


def parse(argv):
    """Command line -> Config: what is given, else the model's preset, else Config's default; or with --resume the run's."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        flag, kw = "--" + f.name.replace("_", "-"), dict(f.metadata, default=argparse.SUPPRESS)
        kw["help"] = kw["help"].replace("%", "%%") + f" [{f.default}]"
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=numbers if f.type is tuple else f.type)
        parser.add_argument(flag, **kind, **kw)
    parser.add_argument("--change", action="store_true", help="with --resume: settings given here replace the run's, on purpose")
    parser.add_argument("--merge", nargs=2, metavar=("RUN", "OUT"), help="write a diffusers pipeline with the LoRA folded in")
    given = vars(parser.parse_args(argv))
    change, merge_args = given.pop("change"), given.pop("merge")
    if merge_args:
        return merge(*merge_args)
    if "resume" not in given:
        return Config(**{**PRESETS[layout(given.get("model", Config.model))], **given})
    saved = load_checkpoint(given["resume"])["config"]
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    changed = [k for k, v in given.items() if v != saved.get(k) and k not in FREE]
    if changed and not change:
        raise UserError("; ".join(f"--{k.replace('_', '-')} was {saved.get(k)} in {given['resume']}, now {given[k]}" for k in changed)
                        + ": leave it out, or add --change to go on with it on purpose")
    return Config(**{**saved, **given})


def merge(run, out):
    """Write the base of a run with its LoRA folded in as a whole diffusers pipeline."""
    config = Path(run) / "config.json"
    if not config.is_file():
        raise UserError(f"{run}: no run (no config.json in it)")
    if Path(out).exists():
        raise UserError(f"{out} exists already; name another folder")
    saved = json.loads(config.read_text())
    G = load_generator(saved["model"], random_init=saved["random_init"])
    if saved["full"]:
        G.pipe.unet = type(G.unet).from_pretrained(Path(run) / "unet")
    else:
        G.load_lora(run)
        G.remove_lora(merge=True)
    G.pipe.save_pretrained(out)
    print(f"wrote {out}")


def main(argv=None):
    """python drpo.py ...; what the user can mend ends with one line and exit code 2."""
    try:
        cfg = parse(sys.argv[1:] if argv is None else argv)
        if cfg:
            train(cfg)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
