"""Drifting Preference Optimization (DrPO, arXiv 2606.02521) of one-step text-to-image generators.

    python drpo.py --model toy                                        a laptop, some minutes
    python drpo.py --model sd-turbo --reward pickscore --watch clip   one CUDA GPU
    python drpo.py --model sdxl-turbo --reward my_file.py:my_reward   any black box as the reward

A one-step generator G_theta maps noise e and a prompt c to a picture in one forward pass. For each
prompt K candidates are sampled, and a reward S RANKS them: neither its gradient nor its scale is
used. With frozen features phi and the frozen base G_ref,

    z_i = phi(G_theta(e_i, c)),  r_i = phi(G_ref(e_i, c)),  i = 1..K, the SAME noise e_i
    A+, A- = features of the m candidates that S likes best, worst          `best_and_worst`

    E(z)   = sum_j [ k(z, a_j+) - k(z, a_j-) ]        dipole reward, kernel k `dipole_energy`
    V_pref = grad_z E(z)                              preference field        `dipole_field`
    V_ref  = mu_R(z) - mu_Z(z)                        drift toward the base   `reference_drift`
    z*     = sg[ z + eta u (V_pref + lambda V_ref) ]  detached target         `dipole_target`
    L      = 1/(2 N D) sum_i || (z_i - z_i*) / u ||^2 regression              `regression_loss`

mu_B(z) = sum_b k(z, b) b / sum_b k(z, b): the mean of a set B as seen from z; sg: no gradient. The
unit u = s / sqrt(D), which the paper leaves out, lets maps of any scale weigh alike; with several
bandwidths each one's V is scaled to a root mean square of 1, and they are summed.

--field chooses between two fields. `dipole`, the lines above, is the default and the toy's.
`released` (`released_field`) is the arithmetic of the authors' code, by which their figures were
obtained: the presets sd-turbo and sdxl-turbo run it, with the authors' settings.

Symbols: P prompts of an update, K candidates of a prompt, m anchors of each sign; z, r features of
the candidates, of the base's; a anchors; T vectors a picture (a map may have one a patch), N = K T
of a prompt, M of its anchors, D features; k kernel, d distance, s mean distance (the unit of
length), tau = radius s bandwidth; V field, eta step of the target, lambda weight of the drift;
e noise, x latents, t timestep, abar the noise schedule.

1 the field (needs torch alone), 2 features, 3 the generator, 4 one update, 5 a run, 6 files of
models, 7 speed. Who stops after 4 knows the algorithm.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import random
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import rewards
from rewards import UserError, one_line, pick


def setting(default, help, least=None):
    """One setting: its default, its line in --help, and the least value it takes."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


@dataclasses.dataclass
class Config:
    """Every setting, with its default and unit. The command line is made from this class."""
    model: str = setting("toy", "toy, sd-turbo, sdxl-turbo, a diffusers folder, or a hub id")
    unet: str = setting("", "weights in place of the base's UNet: a file, or owner/repo/file")
    timestep: int = setting(-1, "t of the one step; -1 = the last training step")
    prediction: str = setting("", "what the UNet predicts: epsilon, v_prediction, sample")
    reward: str = setting("scene", "a name of `rewards.py list`, a=1,b=.5, file.py:function, a URL")
    watch: str = setting("", "rewards that are logged, never ranked on: they show reward hacking")
    watch_every: int = setting(10, "steps between two scorings by the watched rewards", 1)
    prompts: str = setting("scenes", "a file (lines, JSON, CSV), or a name of `rewards.py list`")
    pairs: str = setting("", "in place of --reward: a .jsonl with prompt, chosen, rejected")
    steps: int = setting(140, "updates", 1)
    batch: int = setting(8, "prompts an update on each GPU (P)", 1)
    candidates: int = setting(24, "pictures a prompt (K)", 1)
    anchors: int = setting(8, "best and worst taken as anchors (m), at most half of K", 1)
    features: str = setting("vae", "phi: latent-mae, vae, unet, file.py:name, several; name@path")
    field: str = setting("dipole", "dipole: the paper's equations; released: the authors' code")
    kernel: str = setting("laplacian", "kernel k(z, a): laplacian, rbf (the toy's), cosine")
    radii: tuple = setting((0.2, 0.5, 1.0), "bandwidths tau / s, comma-separated")
    lambda_ref: float = setting(0.2, "weight of the drift toward the frozen base (lambda)", 0)
    eta: float = setting(1.0, "step of the target, z* = z + eta u V", 0)
    lr: float = setting(2e-3, "learning rate of AdamW, constant", 0)
    weight_decay: float = setting(0.01, "of AdamW", 0)
    average: float = setting(0.0, "the LoRA kept is its average over 1 / (1 - average) steps", 0)
    clip: float = setting(1.0, "largest norm of the gradient", 1e-9)
    lora_rank: int = setting(16, "rank of the LoRA", 1)
    lora_alpha: float = setting(16.0, "alpha of the LoRA: W + alpha / rank up down", 0)
    micro_batch: int = setting(0, "pictures at once; 0: as many as the memory allows", 0)
    dtype: str = setting("auto", "bf16, fp16, fp32; auto = bf16 on CUDA, else fp32")
    device: str = setting("auto", "cuda, cuda:1, cpu, mps; auto = cuda where there is one")
    compile: bool = setting(False, "torch.compile the networks: faster, minutes to start")
    seed: int = setting(0, "of noise, order of prompts and LoRA", 0)
    out: str = setting("", "folder of the run, new or empty; default runs/MODEL-REWARD-DATE")
    resume: str = setting("", "folder of a run to go on with; settings given replace its own")
    save_every: int = setting(50, "steps between two checkpoints", 1)
    preview_every: int = setting(50, "steps between two preview grids; 0 = none", 0)
    log_every: int = setting(10, "steps between two lines of figures", 1)

    @classmethod
    def preset(cls, name, **changes):
        """The recipe that fits a model, with changes: Config.preset("sd-turbo", lr=5e-5).

        name: toy, sd-turbo, sdxl-turbo, a diffusers folder or a hub id. UserError: no such."""
        return cls(**{"model": str(name), **PRESETS[preset_of(name)], **changes})


# The authors' recipes on one GPU; theirs ran on 4 and on 4 to 8. Source: arXiv 2606.02521 and the
# scripts of github.com/UGVly/DrPO.
AUTHORS = dict(reward="pickscore", prompts="pickapic", field="released", radii=(0.02, 0.05, 0.2))
PRESETS = {
    "toy": dict(kernel="rbf", average=0.95),  # averaged, it tips less: lab/README.md
    "sd-turbo": dict(AUTHORS, steps=1000, features="latent-mae", lr=1e-4),  # P, K, m: defaults
    "sdxl-turbo": dict(AUTHORS, steps=5000, candidates=16, features="unet", lr=1e-5,
                       lambda_ref=0.25)}
MODELS = {"toy": str(Path(__file__).resolve().parent / "lab" / "toy"),
          "sd-turbo": "stabilityai/sd-turbo", "sdxl-turbo": "stabilityai/sdxl-turbo"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def preset_of(model):
    """The preset that fits a model: its own name, or sd-turbo / sdxl-turbo by its pipeline."""
    if model in PRESETS:
        return model
    return "sdxl-turbo" if is_xl(model_index(model)) else "sd-turbo"


# ===== 1. The field: pure mathematics in float32. This section, cut out, runs with torch alone.
# Every function sees one prompt: z (N, D) its vectors, a (M, D) anchors.

KERNELS = ("laplacian", "rbf", "cosine")


def distances(z, a):
    """d_ij = ||z_i - a_j||: (N, D), (M, D) -> (N, M). By differences: products lose digits at 0."""
    return torch.cdist(z, a, compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(d):
    """The scale s: mean of the distances (N, M), pairs at distance 0 left out -> scalar.

    Detached: s is a unit of length, not a variable."""
    apart = d > 0
    s = (d * apart).sum() / apart.sum().clamp(min=1)
    return torch.where(s > 0, s, 1.0).detach()


def log_kernel(z, a, d, radius, s, kernel):
    """log k(z_i, a_j) for d = distances(z, a) -> (N, M). ValueError: unknown kernel."""
    tau = radius * s
    if kernel == "laplacian":
        return -d / tau
    if kernel == "rbf":
        return -(d / tau) ** 2 / 2
    if kernel == "cosine":  # angles have no unit of length: no s
        return F.normalize(z, dim=1) @ F.normalize(a, dim=1).T / radius
    raise ValueError(f"unknown kernel {kernel!r}; expected one of {', '.join(KERNELS)}")


def unit_rms(V):
    """V (N, D) scaled to a root mean square of 1 (a zero field stays zero), and its own RMS."""
    rms = V.square().mean().sqrt()
    return V / torch.where(rms > 0, rms, 1.0), rms


def dipole_energy(z, positive, negative, *, radius, kernel):
    """E(z) = sum_j [k(z, a_j+) - k(z, a_j-)], the paper's dipole reward, at one bandwidth.

    z (N, D); positive, negative (M+, D), (M-, D); radius = tau / s -> (N,)."""
    z = z.float()
    a = torch.cat([positive, negative]).float()  # (M, D), M = M+ + M-
    d = distances(z, a)  # (N, M)
    k = log_kernel(z, a, d, radius, mean_distance(d), kernel).exp()  # (N, M)
    return k[:, :len(positive)].sum(1) - k[:, len(positive):].sum(1)


@torch.enable_grad()
def dipole_field(z, positive, negative, *, radii, kernel):
    """V_pref(z) = grad_z E(z): toward the best and away from the worst, most strongly near them.

    z (N, D); positive, negative (M, D), any dtype -> V (N, D), float32: the gradient for each
    radius scaled to unit RMS, and summed; and the RMS before that, (R,), which the loss cannot
    show. E is `dipole_energy` but for its scale: the largest kernel value is divided out before
    exp, which underflows at small radii, and unit RMS undoes that. An anchor at distance 0, the
    sample itself, exerts no force."""
    z = z.detach().float().requires_grad_()
    a = torch.cat([positive, negative]).float()  # (M, D), M = M+ + M-
    sign = torch.ones(len(a), device=z.device)  # (M,)
    sign[len(positive):] = -1
    d = distances(z, a)  # (N, M)
    s = mean_distance(d)
    total = torch.zeros_like(z)
    rms = z.new_zeros(len(radii))
    if len(a) == 0:
        return total, rms
    for n, radius in enumerate(radii):
        log_k = log_kernel(z, a, d, radius, s, kernel).masked_fill(d == 0, -torch.inf)  # (N, M)
        largest = log_k.max().clamp(min=-1e30).detach()
        E = (sign * (log_k - largest).exp()).sum()  # sum_i E(z_i) / exp(largest)
        V, = torch.autograd.grad(E, z, retain_graph=True)  # (N, D)
        V, size = unit_rms(V)
        total += V
        rms[n] = size * largest.exp()
    return total, rms


@torch.no_grad()
def reference_drift(z, reference, *, radii, kernel):
    """V_ref(z) = mu_R(z) - mu_Z(z), the mean-shift estimate of grad log p_ref - grad log p_theta.

    z (N, D), reference (M, D) -> V (N, D) and RMS (R,), as of `dipole_field`. In mu_Z a sample
    never counts itself."""
    z, r = z.float(), reference.float()
    d_z, d_r = distances(z, z), distances(z, r)  # (N, N), (N, M)
    s = mean_distance(torch.cat([d_z, d_r], 1))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    origin = z.mean(0)  # V does not depend on it, its rounding error does
    total = torch.zeros_like(z)
    rms = z.new_zeros(len(radii))
    for n, radius in enumerate(radii):
        w_r = log_kernel(z, r, d_r, radius, s, kernel).softmax(1)  # (N, M), rows sum to 1
        w_z = log_kernel(z, z, d_z, radius, s, kernel).masked_fill(itself, -torch.inf).softmax(1)
        w_z = w_z.nan_to_num(0)  # a lone sample has no others to be repelled by
        V, rms[n] = unit_rms(w_r @ (r - origin) - w_z @ (z - origin))  # mu_R - mu_Z: (N, D)
        total += V
    return total, rms


@torch.no_grad()
def released_field(z, positive, negative, *, radii, kernel, negative_is_self=False):
    """The force of the authors' released code, by which the published figures were obtained.

    z (N, D); positive, negative (M, D) -> force (N, D) in units of s / sqrt(D), and s. Preference:
    anchors are the best and the worst. Reference: positives are the base's features, negatives are
    z again (negative_is_self). Besides, the other vectors of z always repel, with weight 1 against
    an anchor's 3000. All constants are theirs."""
    z = z.float()
    y = torch.cat([z, negative.float(), positive.float()])  # (Y, D), Y = N + M- + M+
    N, D = z.shape
    Y = len(y)
    w = torch.full((Y,), 3000.0, device=z.device)
    w[:N] = 1.0
    d = distances(z, y).clamp(min=1e-4)  # (N, Y)
    s = ((d * w).mean() / w.mean()).clamp(min=1e-3)
    itself = torch.zeros(N, Y, device=z.device)
    itself[:, :N].fill_diagonal_(1)
    if negative_is_self:
        itself[:, N:2 * N].fill_diagonal_(1)
    origin = y.mean(0)  # V does not depend on it, its rounding error does
    total = torch.zeros_like(z)
    for radius in radii:
        logits = log_kernel(z, y, d, radius, s, kernel) - itself * (100 / radius)  # (N, Y)
        affinity = (logits.softmax(1) * logits.softmax(0)).clamp(min=1e-6).sqrt() * w  # (N, Y)
        repel, attract = affinity.split([Y - len(positive), len(positive)], 1)
        pull = torch.cat([-repel * attract.sum(1, keepdim=True),
                          attract * repel.sum(1, keepdim=True)], 1)  # (N, Y), rows sum to 0
        V = pull @ (y - origin) / (s / D ** 0.5)  # (N, D)
        total += V / V.square().mean().clamp(min=1e-8).sqrt()
    return total, s


def best_and_worst(scores, m):
    """The best m and the worst m of K candidates: scores (K,) -> two boolean masks (K,).

    Only the order matters. NaN = no opinion: never an anchor. A candidate is never positive while
    an equally scored one is negative: that score stays where it is the best of all (positive) or
    the worst of all (negative), else on neither side. All equal: no anchors. With fewer than 2 m
    opinions, at most half of them on each side."""
    scores = scores.double()
    positive = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    negative = positive.clone()
    known = torch.nonzero(~scores.isnan()).flatten()
    opinions = scores[known]
    m = min(m, len(known) // 2)
    if m == 0 or opinions.min() == opinions.max():
        return positive, negative
    positive[known[opinions.argsort(descending=True, stable=True)[:m]]] = True
    negative[known[opinions.argsort(stable=True)[:m]]] = True
    tie = scores[positive].min()
    if tie == scores[negative].max():
        positive &= (scores > tie) | (tie == opinions.max())
        negative &= (scores < tie) | (tie == opinions.min())
    return positive, negative


def dipole_target(z, z_ref, positive, negative, *, eta, lambda_ref, **kernel_and_radii):
    """z* = z + eta u (V_pref + lambda V_ref), for L = 1/(2 N D) sum ||(z - z*) / u||^2.

    z, z_ref (N, D); positive, negative (M, D); kernel, radii as of `dipole_field`. Returns z*
    (N, D), the weight w of L = w ||z - z*||^2, and {"rms_pref", "rms_ref"}: (R,)."""
    N, D = z.shape
    V_pref, rms_pref = dipole_field(z, positive, negative, **kernel_and_radii)  # (N, D)
    V_ref, rms_ref = reference_drift(z, z_ref, **kernel_and_radii)  # (N, D)
    u = mean_distance(distances(z, z)) / D ** 0.5
    z_star = z + eta * u * (V_pref + lambda_ref * V_ref)
    return z_star, 0.5 / (N * D * u ** 2), {"rms_pref": rms_pref, "rms_ref": rms_ref}


def released_target(z, z_ref, positive, negative, *, eta, lambda_ref, **kernel_and_radii):
    """The authors' two losses 1/(N D) sum ||(z - z_n*) / u_n||^2, each in the unit of its own
    force, the second with weight lambda. Arguments and results as of `dipole_target`.

    Two quadratics are one of the same gradient: w = w_1 + w_2, z* = (w_1 z_1* + w_2 z_2*) / w."""
    N, D = z.shape
    force, s = released_field(z, positive, negative, **kernel_and_radii)  # (N, D)
    drift, s_ref = released_field(z, z_ref, z, negative_is_self=True, **kernel_and_radii)
    u = s / D ** 0.5
    u_ref = s_ref / D ** 0.5
    w_pref = 1 / (N * D * u ** 2)
    w_ref = lambda_ref / (N * D * u_ref ** 2)
    step = eta * (w_pref * u * force + w_ref * u_ref * drift) / (w_pref + w_ref)  # (N, D)
    return z + step, w_pref + w_ref, {}


FIELDS = {"dipole": dipole_target, "released": released_target}  # a new one: add it here


def regression_loss(z, z_star, weight):
    """weight ||z - sg(z*)||^2: z, z* (N, D) -> scalar."""
    return weight * (z - z_star.detach()).square().sum()


# ===== 2. Features phi: frozen networks in which a direction means something. Each takes latents
# x (B, 4, h, w) and the condition of B prompts, and returns a list of maps (B, T, D) in float32.
# Pooled, translation-invariant statistics serve; raw latents do not.

def mean_std(h, patch=None):
    """Mean and std, sqrt(var + 1e-6), over patches of h (B, C, H, W) or all: 2 x (B, T, C)."""
    height, width = (patch, patch) if patch else h.shape[-2:]
    h = h.float().unfold(2, height, height).unfold(3, width, width)  # (B, C, rows, columns, patch)
    mean, var = h.mean((4, 5)), h.var((4, 5), correction=0)
    return mean.flatten(2).mT, (var + 1e-6).sqrt().flatten(2).mT


def vae_features(G, path=""):
    """`vae`: the generator's own VAE decoder after mid_block, up_blocks[0] and [1]; of each the
    mean, the std, and the averages of the four quarters as one vector: nine maps."""
    decoder = G.vae.decoder

    def phi(x, condition):
        h = x.to(G.vae.dtype) / G.vae.config.scaling_factor
        if G.vae.post_quant_conv is not None:
            h = G.vae.post_quant_conv(h)
        h = decoder.conv_in(h)
        maps = []
        for block in (decoder.mid_block, *decoder.up_blocks[:2]):
            h = block(h)
            quarters = F.adaptive_avg_pool2d(h.float(), 2).flatten(1)[:, None]  # (B, 1, 4 C)
            maps += [*mean_std(h), quarters]
        return maps

    return phi


def mae_encoder(w, x):
    """ResNet encoder of a masked autoencoder on latents (340 M parameters): weights w by
    their names in the authors' file, latents x (B, 4, h, w) -> last stage (B, C, h/8, w/8)."""
    def conv(name, h, stride=1):
        weight = w[f"{name}.weight"]
        return F.conv2d(h, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name, h):
        return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"])

    h = F.relu(norm("gn1", conv("conv1", x)))
    for stage in range(4):  # the file counts its stages from 0, its norms from 1
        block = 0
        while f"stages_{stage}.layers_{block}.conv1.weight" in w:
            name = f"stages_{stage}.layers_{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            y = F.relu(norm(f"{name}.gn1", conv(f"{name}.conv1", h, stride)))
            y = norm(f"{name}.gn2", conv(f"{name}.conv2", y))
            if f"{name}.proj_conv.weight" in w:
                h = norm(f"{name}.proj_gn", conv(f"{name}.proj_conv", h, stride))
            h = F.relu(h + y)
            block += 1
        h = norm(f"layer{stage + 1}_norm", h)
    return h


def latent_mae(G, path=""):
    """`latent-mae`: mean and std of the encoder's last stage over all, over 2 x 2 and over 4 x 4
    patches: six maps, the authors' choice for SD-Turbo.

    In float32 (TF32 on a GPU): after 16 blocks of ReLU the gradient of bf16 has a cosine of 0.935
    to that of float32, TF32 of 0.996 (random weights)."""
    w = {name: weight.to(G.device) for name, weight in read_latent_mae(path).items()}

    def phi(x, condition):
        encode = compiled(mae_encoder) if G.compiled else mae_encoder
        h = encode(w, x.float())  # (B, C, h/8, w/8)
        maps = [*mean_std(h)]
        for patch in (2, 4):
            if h.shape[-1] > patch:
                maps += mean_std(h, patch)
        return maps

    return phi


class Reached(Exception):
    """The last layer that is wanted has run."""


def unet_features(G, path=""):
    """`unet`: the frozen base UNet at t = 100 on latents with noise 0.1, given the prompt, the
    authors' choice for SDXL-Turbo: down_blocks[2], mid_block and up_blocks[0], 4 x 4 average-pooled
    and flattened: three maps. Their noise is drawn anew each time; here phi is a function."""
    if G.unet.mid_block is None:
        raise UserError("--features unet: this UNet has no mid_block; take vae or latent-mae")
    noise = prompt_noise(0, 0, G.noise_shape).to(G.device)
    t = torch.tensor(100, device=G.device)
    down = G.unet.down_blocks
    blocks = (down[min(2, len(down) - 1)], G.unet.mid_block, G.unet.up_blocks[0])

    def phi(x, condition):
        hidden = []

        def keep(module, args, out):
            hidden.append(out[0] if isinstance(out, tuple) else out)
            if len(hidden) == len(blocks):
                raise Reached

        hooks = [block.register_forward_hook(keep) for block in blocks]
        with G.reference(), contextlib.suppress(Reached):
            # forward, the method, is never compiled: the hooks are seen
            G.unet.forward((x + 0.1 * noise).to(G.dtype), t, **G.network_arguments(condition))
        for hook in hooks:
            hook.remove()
        return [F.avg_pool2d(h.float(), min(4, h.shape[-1])).flatten(1)[:, None] for h in hidden]

    return phi


# name: factory(G, path) -> phi. A new one: add it here, or give file.py:function
FEATURES = {"latent-mae": latent_mae, "vae": vae_features, "unet": unet_features}


def feature_factory(item):
    """`name`, `name@path` or `file.py:function` -> factory, path. UserError: no such."""
    name, _, path = item.strip().partition("@")
    if name.partition(":")[0].endswith(".py"):
        return rewards.imported("feature", name), path
    return pick("feature", name, FEATURES, "or file.py:function"), path


def load_features(spec, G):
    """'vae' or 'latent-mae@file,vae' -> phi(x (B, 4, h, w), condition) -> list of (B, T, D)."""
    parts = [factory(G, path) for factory, path in map(feature_factory, spec.split(","))]

    def phi(x, condition):
        return sum((part(x, condition) for part in parts), [])

    return phi


# ===== 3. The one-step generator x = G_theta(e, c). Its LoRA is all of theta that trains; the
# reference G_ref is the same network with the LoRA off.

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention, as in the authors' recipe


class LoRA(nn.Module):
    """y = W x + alpha / rank up down x: W frozen, down (rank, in) random, up (out, rank) zero."""

    def __init__(self, base, rank, alpha, switch):
        super().__init__()
        self.base, self.rank, self.alpha, self.switch = base, rank, alpha, switch
        like = dict(device=base.weight.device, dtype=torch.float32)  # float32 for the optimizer
        self.down = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x, *args):
        flat = x.flatten(0, -2)  # (tokens, in)
        y = self.base(flat)
        if self.switch["on"]:  # in place, on y itself: W x is kept by nobody
            low = F.linear(flat, self.down.to(x.dtype))  # (tokens, rank)
            y.addmm_(low, self.up.to(x.dtype).T, alpha=self.alpha / self.rank)
        return y.unflatten(0, x.shape[:-1])


class Generator:
    """A one-step generator in diffusers' SD or SDXL layout, frozen but for its LoRA.

        x = (k e - sqrt(1 - abar_t) eps_theta(k e, t, c)) / sqrt(abar_t)

    with k = `noise_scale` = 1, but for Euler schedulers, which begin at sigma instead of
    sqrt(sigma^2 + 1). encode(prompts) -> condition, sample(noise, condition) -> latents,
    decode(latents) -> pictures, reference(): context of the frozen base; add_lora, save_lora,
    load_lora."""

    def __init__(self, pipe, *, device="cpu", dtype=torch.float32, timestep=Config.timestep,
                 prediction=Config.prediction):
        self.pipe, self.unet, self.vae = pipe, pipe.unet, pipe.vae
        self.xl = hasattr(pipe, "text_encoder_2")
        self.device, self.dtype = torch.device(device), dtype
        self.name = ""
        self.lora = {}
        self.switch = {"on": True}  # one for all layers of the LoRA
        self.compiled = False
        self.decode_at_once = 8
        for net in pipe.components.values():
            if isinstance(net, nn.Module):
                net.to(self.device, dtype).eval().requires_grad_(False)
        # 1 / sqrt(abar) = 14.6 multiplies the rounding of the last layers: they stay in float32
        self.unet.conv_norm_out.float().register_forward_pre_hook(lambda module, x: (x[0].float(),))
        self.unet.conv_out.float()
        half = dtype == torch.float16
        if half and self.xl and self.vae.config.force_upcast:
            print("the SDXL VAE overflows in fp16: it runs in float32", file=sys.stderr)
            self.vae.float()
        if self.device.type == "cuda":
            channels_last(self.vae.decoder)
        self.scaler = torch.amp.GradScaler(self.device.type, 2.0 ** 14, enabled=half)
        self.schedule(pipe.scheduler, timestep, prediction)
        side = self.unet.config.sample_size
        self.noise_shape = (4, side, side)
        self.picture_side = side * pipe.vae_scale_factor

    def schedule(self, scheduler, timestep, prediction):
        """t, abar, k and what is predicted; the scheduler decides nothing else."""
        steps = len(scheduler.alphas_cumprod)
        if not -1 <= timestep < steps:
            raise UserError(f"--timestep is {timestep}; expected -1 (last), or 0 to {steps - 1}")
        t = timestep % steps
        self.t = torch.tensor(t, device=self.device)
        self.abar = float(scheduler.alphas_cumprod[t])
        spacing = scheduler.config.get("timestep_spacing")
        euler = "Euler" in type(scheduler).__name__ and spacing in ("trailing", "linspace")
        self.noise_scale = math.sqrt(1 - self.abar) if euler else 1.0
        self.prediction = pick("prediction", prediction or scheduler.config.get("prediction_type"),
                               ("epsilon", "v_prediction", "sample"))

    @torch.no_grad()
    def encode(self, prompts):
        """P prompts -> condition, a dict of tensors with P rows, as the pipeline encodes them."""
        if not self.xl:
            return {"text": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        side = self.picture_side  # time ids: original size, crop, target size
        ids = torch.tensor([[side, side, 0, 0, side, side]], device=self.device, dtype=self.dtype)
        return {"text": text, "pooled": pooled, "time_ids": ids.expand(len(prompts), -1)}

    def network_arguments(self, condition):
        """A condition of B rows -> what the UNet is called with besides x and t."""
        added = None
        if self.xl:
            added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
        return {"encoder_hidden_states": condition["text"], "added_cond_kwargs": added,
                "return_dict": False}

    def predict(self, x, t, condition):
        """The network's raw output: x (B, 4, h, w), condition of B rows -> (B, 4, h, w) float32."""
        return self.unet(x.to(self.dtype), t, **self.network_arguments(condition))[0].float()

    def sample(self, noise, condition):
        """x = G(e, c): noise e (B, 4, h, w) ~ N(0, 1) -> latents x (B, 4, h, w), float32."""
        e = self.noise_scale * noise.float()
        out = self.predict(e, self.t, condition)
        if self.prediction == "epsilon":
            return (e - math.sqrt(1 - self.abar) * out) / math.sqrt(self.abar)
        if self.prediction == "v_prediction":
            return math.sqrt(self.abar) * e - math.sqrt(1 - self.abar) * out
        return out  # "sample": the network predicts x itself

    def decode(self, latents):
        """Latents (B, 4, h, w) -> pictures (B, 3, H, W) in [0, 1], float32, in parts that fit.

        UserError: a picture that is not finite is no picture."""
        x = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        parts = [self.vae.decode(part).sample.float() for part in x.split(self.decode_at_once)]
        pictures = torch.cat(parts)
        if not pictures.isfinite().all():
            raise UserError(f"{self.name or 'the model'} draws pictures that are not finite (NaN) "
                            f"in {self.vae.dtype}; try --dtype bf16 or fp32")
        return (pictures / 2 + 0.5).clamp(0, 1)

    @contextlib.contextmanager
    def reference(self):
        """Inside it the generator is the frozen base G_ref."""
        before, self.switch["on"] = self.switch["on"], False
        try:
            yield
        finally:
            self.switch["on"] = before

    def add_lora(self, rank, alpha):
        """A fresh LoRA, which changes nothing; returns the parameters that train."""
        for name, layer in list(self.unet.named_modules()):
            if name.endswith(LORA_TARGETS):
                self.lora[name] = LoRA(getattr(layer, "base", layer), rank, alpha, self.switch)
                self.unet.set_submodule(name, self.lora[name])
        return self.parameters()

    def parameters(self):
        """What trains."""
        return [p for layer in self.lora.values() for p in (layer.down, layer.up)]

    def save_lora(self, folder, **metadata):
        """Write the LoRA for diffusers (pipe.load_lora_weights) and for A1111, ComfyUI, Forge."""
        write_lora(self, Path(folder), metadata)

    def load_lora(self, path):
        """Load what save_lora wrote, from a folder or the file, key for key -> its metadata.

        UserError: another program's file, or one of another base."""
        state, metadata = read_lora(path)
        rank = int(metadata["ss_network_dim"])
        parameters = self.add_lora(rank, float(rank))
        keys = [f"unet.{name}.lora_{side}.weight" for name in self.lora for side in "AB"]
        shapes = [p.shape for p in parameters]
        if {key: value.shape for key, value in state.items()} != dict(zip(keys, shapes)):
            raise UserError(f"{path}: made for {metadata['drpo_base']}, not for {self.name}")
        for key, p in zip(keys, parameters):
            p.data.copy_(state[key])
        return metadata


def load_generator(name_or_path, *, device="cpu", dtype=torch.float32, unet=Config.unet,
                   timestep=Config.timestep, prediction=Config.prediction):
    """toy, sd-turbo, sdxl-turbo, a diffusers folder or a hub id -> Generator without a LoRA.

    unet, timestep, prediction as in `Config`. UserError: what cannot be had or read whole."""
    pipe = load_pipeline(name_or_path, dtype, unet)
    G = Generator(pipe, device=device, dtype=dtype, timestep=timestep, prediction=prediction)
    G.name = str(name_or_path)
    return G


# ===== 4. One update: (A) candidates and scores, (B) anchors and targets, (C) the gradient back.
# A field needs the candidates of its prompt alone: as many whole prompts as fit go through at once,
# with a graph. A prompt that does not fit goes chunk by chunk without one, and (C) samples it once
# more. The gradient is the same.

def seeded(seed, index):
    """Random numbers that depend on (seed, index) alone, drawn on the CPU: for every device."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index) % 2 ** 63)


def prompt_noise(seed, position, shape):
    """Noise of one prompt: the same on every device, for any micro-batch."""
    return torch.randn(shape, generator=seeded(seed, position))


def rows(condition, index):
    """The rows `index` of a condition, a dict of tensors."""
    return {name: value[index] for name, value in condition.items()}


@dataclasses.dataclass
class Batch:
    """Some prompts, what the generator is given for them, and how their candidates are judged."""
    prompts: list  # P strings
    condition: dict  # tensors of P rows
    noise: torch.Tensor  # (P, K, 4, h, w)
    pairs: list = None  # offline: for each prompt the maps (m, T, D) of its chosen and rejected
    watch: bool = False  # the watched rewards score it too

    def part(self, i):
        """The prompts of a slice."""
        pairs = self.pairs[i] if self.pairs else None
        return Batch(self.prompts[i], rows(self.condition, i), self.noise[i], pairs, self.watch)


def generate(G, phi, batch, first, count):
    """Pictures first..first+count of a batch -> latents (B, 4, h, w), maps (B, T, D)."""
    e = batch.noise.flatten(0, 1)[first:first + count]  # (B, 4, h, w)
    prompt = torch.arange(first, first + len(e), device=G.device) // batch.noise.shape[1]
    condition = rows(batch.condition, prompt)
    x = G.sample(e, condition)
    return x, phi(x, condition)


def sample_candidates(G, phi, batch, at_once):
    """(A) Candidates and the base's pictures from the same noise -> latents x, x_ref (n, 4, h, w),
    lists of maps z, r (n, T, D), n = P K, prompt after prompt."""
    parts = []
    for first in range(0, batch.noise.shape[:2].numel(), at_once):
        x, z = generate(G, phi, batch, first, at_once)
        with torch.no_grad(), G.reference():
            x_ref, r = generate(G, phi, batch, first, at_once)
        parts.append((x.detach(), x_ref, z, r))
    x, x_ref, z, r = zip(*parts)
    z = [torch.cat(chunks) for chunks in zip(*z)]
    r = [torch.cat(chunks) for chunks in zip(*r)]
    return torch.cat(x), torch.cat(x_ref), z, r


@torch.no_grad()
def score_candidates(G, reward, batch, x):
    """(A) Latents x (P K, 4, h, w) -> scores (P, K), and {name: (P, K)} of the parts that they
    combine and of the watched rewards. All see whole prompts. None, {}: pairs need no scores."""
    P, K = batch.noise.shape[:2]
    if batch.pairs:
        return None, {}
    pictures = G.decode(x)  # (P K, 3, H, W)
    prompts = [prompt for prompt in batch.prompts for _ in range(K)]
    native = reward.score(pictures, prompts, watch=batch.watch)
    native = {name: values.view(P, K) for name, values in native.items()}
    scores = reward.combine(native)
    if len(reward.parts) == 1:  # a lone part is the score itself
        del native[next(iter(reward.parts))]
    return scores, native


@torch.no_grad()
def feature_gradients(z, r, best, worst, cfg):
    """(B) One prompt: for each map its field, its target and dL/dz, which needs no network.

    Lists of maps, z and r (K, T, D), anchors (m, T, D) -> list of (K, T, D), dict of figures."""
    gradients = []
    figures = {"loss": 0}
    for maps in zip(z, r, best, worst):
        vectors = [h.flatten(0, 1) for h in maps]  # (N, D), (N, D), (M, D), (M, D)
        z_star, weight, rms = FIELDS[cfg.field](*vectors, kernel=cfg.kernel, radii=cfg.radii,
                                                eta=cfg.eta, lambda_ref=cfg.lambda_ref)
        with torch.enable_grad():
            loss = regression_loss(vectors[0].requires_grad_(), z_star, weight)
            gradient, = torch.autograd.grad(loss, vectors[0])
        gradients.append(gradient.view_as(maps[0]))
        figures["loss"] += loss.detach()
        for name, value in rms.items():  # mean over the maps
            figures[name] = figures.get(name, 0) + value / len(z)
    return gradients, figures


def anchors_of(z, scores, m, native):
    """(B) Maps z (K, T, D) and scores (K,) of a prompt's candidates, {name: (K,)} of each reward ->
    A+ and A-, lists of (m, T, D), a map each, and figures of the scores."""
    positive, negative = best_and_worst(scores, m)
    best = [h[positive.to(h.device)] for h in z]
    worst = [h[negative.to(h.device)] for h in z]
    known = scores[~scores.isnan()].tolist() or [math.nan]
    figures = {"reward_mean": np.mean(known), "reward_std": np.std(known),
               "reward_best": max(known), "reward_worst": min(known),
               "gap": scores[positive].mean() - scores[negative].mean(),
               "skipped": 1 - float(positive.any() and negative.any())}
    for name, values in native.items():
        key = name if name.startswith("watch/") else f"part/{name}"
        figures[key] = values.nanmean()
    return best, worst, figures


def latent_figures(x, x_ref):
    """Latents of a prompt's candidates, of the base's (K, 4, h, w) -> how far apart they lie."""
    x, x_ref = x.flatten(1), x_ref.flatten(1)
    return {"within": mean_distance(distances(x, x)),
            "within_ref": mean_distance(distances(x_ref, x_ref)),
            "distance": (x - x_ref).square().mean().sqrt()}


def mean_figures(figures):
    """Dicts of numbers or (R,) tensors, one a prompt -> their means, NaN (no opinion) left out."""
    means = {}
    for name in figures[0]:
        values = [torch.as_tensor(of_prompt[name]).float().cpu() for of_prompt in figures]
        means[name] = torch.stack(values).nanmean(0).tolist()
    means["diversity"] = means.pop("within") / max(means.pop("within_ref"), 1e-12)
    return means


def carry_back(G, phi, batch, z, gradients, at_once):
    """(C) From the features through phi and G to the LoRA: adds to .grad, chunk by chunk."""
    if z[0].requires_grad:  # the graph of (A) is there
        torch.autograd.backward(z, gradients)
        return
    for first in range(0, len(gradients[0]), at_once):
        z = generate(G, phi, batch, first, at_once)[1]
        torch.autograd.backward(z, [gradient[first:first + at_once] for gradient in gradients])


def drpo_gradient(G, phi, reward, batch, cfg, micro):
    """One update's gradient, scaled by G.scaler, added to .grad of the LoRA -> dict of figures.

    reward: `rewards.Reward`, or None with batch.pairs; micro: pictures at once."""
    P, K = batch.noise.shape[:2]
    keep_graph = K <= micro
    at_once = micro if keep_graph else 4 * micro  # without a graph four times as many fit
    prompts_at_once = max(1, micro // K)
    figures = []
    for first in range(0, P, prompts_at_once):
        part = batch.part(slice(first, first + prompts_at_once))
        with torch.set_grad_enabled(keep_graph):
            x, x_ref, z, r = sample_candidates(G, phi, part, at_once)
        scores, native = score_candidates(G, reward, part, x)
        gradients = []
        for p in range(len(part.prompts)):
            i = slice(p * K, (p + 1) * K)
            z_p = [h[i].detach() for h in z]  # (K, T, D) each
            r_p = [h[i].detach() for h in r]
            if part.pairs:
                best, worst = part.pairs[p]
                of_scores = {}
            else:
                best, worst, of_scores = anchors_of(z_p, scores[p], cfg.anchors, rows(native, p))
            of_maps, of_fields = feature_gradients(z_p, r_p, best, worst, cfg)
            gradients.append(of_maps)
            figures.append({**latent_figures(x[i], x_ref[i]), **of_scores, **of_fields})
        gradients = [G.scaler.scale(torch.cat(maps) / P) for maps in zip(*gradients)]
        carry_back(G, phi, part, z, gradients, micro)
    return mean_figures(figures)


@torch.no_grad()
def pair_maps(G, phi, pair):
    """An offline pair -> the maps (m, T, D) of its chosen, and of its rejected pictures."""
    prompt, *sides = pair
    maps = []
    for files in sides:
        pictures = 2 * rewards.load_pictures(files, G.picture_side) - 1  # (m, 3, H, W)
        x = G.vae.encode(pictures.to(G.device, G.vae.dtype)).latent_dist.mode().float()
        x = x * G.vae.config.scaling_factor  # (m, 4, h, w)
        condition = {name: c.expand(len(x), *c.shape[1:]) for name, c in G.encode([prompt]).items()}
        maps.append(phi(x, condition))
    return maps


def gradient_that_fits(G, phi, reward, batch, cfg, micro):
    """`drpo_gradient`, its micro-batch halved whenever memory runs out -> figures, micro."""
    while True:
        try:
            return drpo_gradient(G, phi, reward, batch, cfg, micro), micro
        except torch.OutOfMemoryError:
            if micro == 1:
                raise UserError("out of GPU memory at --micro-batch 1: a smaller reward?") from None
        micro = -(-micro // 2)  # outside of except: the exception holds the memory
        G.decode_at_once = min(G.decode_at_once, micro)
        print(f"out of GPU memory: going on with --micro-batch {micro}", file=sys.stderr)
        for p in G.parameters():
            p.grad = None
        torch.cuda.empty_cache()


def fitting_micro_batch(G, phi, batch):
    """How many pictures at once the free memory should hold, by the graph of one of them."""
    P, K = batch.noise.shape[:2]
    if G.device.type != "cuda":
        return min(P * K, max(64, K))
    before = torch.cuda.memory_allocated()
    graph = generate(G, phi, batch, 0, 1)
    of_one = max(1, torch.cuda.memory_allocated() - before)
    del graph
    torch.cuda.empty_cache()
    micro = int(0.8 * torch.cuda.mem_get_info()[0] / of_one)
    return max(1, min(P * K, micro))


# ===== 5. A run: the loop, its settings, its folder, the command line.

def train(cfg, reward=None, stop=None):
    """Run DrPO -> path of the run's folder; None in torchrun's other processes.

    reward: a callable in place of cfg.reward; stop: the `Stop` that ends it early. UserError: what
    the user can mend. The first Ctrl-C ends it after the step, the second is KeyboardInterrupt."""
    cfg = resolved(cfg)
    device, dtype, process, world = start(cfg)
    reward, prompts, pairs, cfg = load_data(cfg, reward, device)
    G = load_generator(cfg.model, device=device, dtype=dtype, unet=cfg.unet,
                       timestep=cfg.timestep, prediction=cfg.prediction)
    phi = load_features(cfg.features, G)
    seed_all(cfg.seed)  # the LoRA's start depends on nothing that was drawn while loading
    optimizer = torch.optim.AdamW(G.add_lora(cfg.lora_rank, cfg.lora_alpha), cfg.lr,
                                  weight_decay=cfg.weight_decay, fused=G.device.type == "cuda")
    micro = cfg.micro_batch
    if not micro:
        micro = fitting_micro_batch(G, phi, next_batch(G, phi, cfg, 0, prompts, pairs))
    G.decode_at_once = min(G.decode_at_once, micro)
    if cfg.compile:
        compile_networks(G)
    run = Run(cfg, G, optimizer, prompts, writes=process == 0)
    failures = 0  # in a row

    with stop or Stop() as stop, run.opened(reward):
        while run.step < cfg.steps and not stop.signal:
            began = time.perf_counter()
            # a reward that draws goes on alike after --resume
            seed_all(seeded(cfg.seed, run.step).initial_seed())
            position = run.position + process * cfg.batch
            batch = next_batch(G, phi, cfg, position, prompts, pairs)
            batch.watch = run.step % cfg.watch_every == 0 or run.step == cfg.steps - 1
            metrics, micro = gradient_that_fits(G, phi, reward, batch, cfg, micro)
            norm = optimizer_step(G, optimizer, cfg, stop, world)
            run.step += 1
            run.position += cfg.batch * world
            finite = math.isfinite(norm)
            run.record({"step": run.step, "seconds": time.perf_counter() - began, **metrics,
                        "grad_norm": norm, "lr": cfg.lr, "applied": finite, "micro_batch": micro})
            failures = 0 if finite or G.scaler.get_scale() > 1 else failures + 1
            if failures == 3:
                raise UserError("the gradient was not finite three times in a row (none was "
                                "applied); try a lower --lr, or --dtype bf16")
    return run.path


def seed_all(seed):
    """Seeds every generator that a reward may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed % 2 ** 63)


def flag(name):
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def of_type(f, value):
    """A setting's value, of text, numpy, Path or JSON, in the type that `Config` names."""
    text = isinstance(value, str)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if f.type is tuple:
            return tuple(float(number) for number in (value.split(",") if text else value))
        typed = f.type(value)
        if f.type is str or typed == value or (text and f.type is not bool):
            return typed
    raise UserError(f"{flag(f.name)} is {value!r}; expected a value of type {f.type.__name__}")


def in_types(values):
    """{name: value} -> the settings among them, each of its type. UserError."""
    return {f.name: of_type(f, values[f.name]) for f in dataclasses.fields(Config)
            if f.name in values}


def resolved(cfg):
    """Settings in their types, paths absolute. UserError, before anything is loaded."""
    values = in_types(vars(cfg))
    for name in ("out", "resume", "pairs", "model", "unet", "prompts"):
        path = rewards.absolute(values[name])
        named = values[name] in ("", *MODELS, *rewards.PROMPTS)  # a name goes before a file
        if not named and (name == "out" or os.path.exists(path)):
            values[name] = path
    for name in ("reward", "watch", "features"):
        values[name] = rewards.absolute_spec(values[name])
    cfg = dataclasses.replace(cfg, **values)
    pick("kernel", cfg.kernel, KERNELS)
    pick("field", cfg.field, FIELDS)
    pick("dtype", cfg.dtype, ("auto", *DTYPES))
    for item in cfg.features.split(","):
        feature_factory(item)

    def expect(name, holds, expected):
        if not holds:
            raise UserError(f"{flag(name)} is {values[name]}; expected {expected}")

    for f in dataclasses.fields(cfg):
        least = f.metadata["least"]
        if least is not None:
            expect(f.name, least <= values[f.name] < 2 ** 63, f"a number, at least {least}")
    expect("anchors", cfg.pairs or 2 * cfg.anchors <= cfg.candidates,
           f"at most half of --candidates {cfg.candidates}: best and worst would overlap")
    expect("average", cfg.average < 1, "less than 1")
    expect("radii", cfg.radii and all(0 < radius < math.inf for radius in cfg.radii),
           "positive numbers, as 0.2,0.5,1")
    expect("out", not cfg.resume or cfg.out in ("", cfg.resume), "nothing beside --resume")
    expect("out", cfg.resume or not os.path.exists(cfg.out) or is_empty(cfg.out),
           f"a new or empty folder (to go on with a run: --resume {cfg.out})")
    return cfg


def is_empty(folder):
    """Whether it is a folder with nothing in it."""
    return os.path.isdir(folder) and not os.listdir(folder)


def start(cfg):
    """Device and torchrun's process group -> device, dtype, this process, processes."""
    torchrun = dist.is_available() and dist.is_torchelastic_launched()
    env = os.environ if torchrun else {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    process, world, local = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = cfg.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{local}"
    cuda = device.startswith("cuda")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device} is not usable here, cpu is ({one_line(e)})") from None
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    seed_all(cfg.seed)  # a reward may draw while it is loaded
    return device, DTYPES[cfg.dtype.replace("auto", "bf16" if cuda else "fp32")], process, world


def load_data(cfg, reward, device):
    """Reward or None, prompts, pairs or None, and the settings with the reward's name."""
    if cfg.pairs:
        pairs = rewards.load_pairs(cfg.pairs)
        return None, [pair[0] for pair in pairs], pairs, cfg
    toys = cfg.reward == "scene" and cfg.prompts == "scenes" and cfg.lr == Config.lr
    if reward is None and toys and preset_of(cfg.model) != "toy":
        raise UserError(f"these are the toy's settings; Config.preset({cfg.model!r}) has a recipe")
    prompts = rewards.load_prompts(cfg.prompts)
    reward = rewards.load(cfg.reward if reward is None else reward, device, cfg.watch)
    return reward, prompts, None, dataclasses.replace(cfg, reward=reward.name)


def next_batch(G, phi, cfg, position, prompts, pairs):
    """The P prompts from `position` on: their order, new in each epoch, and their noise depend on
    seed and position alone, whichever GPU asks."""
    index = []
    noise = []
    for n in range(position, position + cfg.batch):
        epoch, place = divmod(n, len(prompts))
        index.append(int(torch.randperm(len(prompts), generator=seeded(cfg.seed, epoch))[place]))
        noise.append(prompt_noise(cfg.seed, n, (cfg.candidates, *G.noise_shape)).to(G.device))
    chosen = [prompts[i] for i in index]
    maps = [pair_maps(G, phi, pairs[i]) for i in index] if pairs else None
    return Batch(chosen, G.encode(chosen), torch.stack(noise), maps)


def optimizer_step(G, optimizer, cfg, stop, world):
    """Average over torchrun's processes, clip, step -> norm of the gradient; one that is not finite
    is not applied. If one process is to stop, all stop together."""
    parameters = G.parameters()
    if world > 1:
        stopping = torch.tensor(float(stop.signal), device=G.device)
        try:
            for tensor in (*(p.grad for p in parameters), stopping):
                dist.all_reduce(tensor.div_(world))
        except RuntimeError as e:
            raise UserError(f"another process ended, so this one stops ({one_line(e)})") from e
        stop.signal = signal.SIGTERM if stopping else 0
    G.scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, cfg.clip))
    if math.isfinite(norm):
        optimizer.step()
    G.scaler.update()  # fp16: what was not finite halves the scale
    optimizer.zero_grad()
    return norm


class Stop:
    """Context in which the first SIGINT, SIGTERM or SIGHUP ends a run after the step in hand, the
    second at once. signal: the one that came, or 0, also after the context."""

    def __init__(self):
        self.signal, self.before, self.pid = 0, {}, os.getpid()

    def __enter__(self):
        with contextlib.suppress(ValueError):  # not the main thread: signals are another's
            names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
            for number in {getattr(signal, name, signal.SIGINT) for name in names}:
                if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it is
                    self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        """Remembers the first. The second acts as before the run, so any in a forked child."""
        self.__exit__()
        if os.getpid() != self.pid:
            os.kill(os.getpid(), number)
            return
        self.signal = number
        os.write(2, b"stopping after this step; once more ends it at once\n")


class Run:
    """A run's folder and how far it came. Nothing is removed or replaced that the run did not
    write, and nothing is written before the first update is made.

    path: the folder, None in torchrun's other processes; step, position: updates and prompts so
    far; first, saved: the steps where this process began and last saved."""

    def __init__(self, cfg, G, optimizer, prompts, writes):
        self.cfg, self.G, self.optimizer, self.prompts = cfg, G, optimizer, prompts
        self.writes = writes
        self.path = Path(cfg.resume) if cfg.resume else None
        self.made, self.lock = False, None
        self.step = self.position = self.first = self.saved = 0
        self.average = [p.detach().clone() for p in G.parameters()]
        self.metrics = []  # the figures of every step

    @contextlib.contextmanager
    def opened(self, reward):
        """The folder is this run's alone; however it ends, what it reached is kept and told."""
        try:
            self.begin(reward)
            yield
            self.save()
            self.end()
        except BaseException as e:
            if not isinstance(e, KeyboardInterrupt):  # that may come in the middle of a step
                self.save()
            if self.made and self.step == 0:
                with contextlib.suppress(OSError):  # a reward has put something there
                    self.path.rmdir()
            if isinstance(e, OSError) and e.filename:  # of the folder; others are faults of ours
                e = UserError(f"{e.filename}: {e.strerror}; is the disk full, --out not writable?")
            if isinstance(e, UserError) and self.step:
                e = UserError(f"step {self.step + 1}: {e} (go on with --resume {self.path})")
            raise e
        finally:
            if self.lock is not None:
                os.close(self.lock)

    def begin(self, reward):
        """Folder and checkpoint; says what is about to be done; tells the rewards that ask for it
        (`run_folder`) where they may keep things."""
        cfg, G = self.cfg, self.G
        if self.writes:
            self.claim()
        if cfg.resume:
            self.load()
        if not self.writes:
            self.path = None
            return
        for part in reward.parts.values() if reward else ():
            if hasattr(part, "run_folder"):
                part.run_folder = self.path
        settings = dataclasses.asdict(cfg).items()
        print("  ".join(f"{name}={value}" for name, value in settings if value != ""))
        weights = sum(p.numel() for p in G.parameters())
        print(f"{cfg.batch} of {len(self.prompts):,} prompts x {cfg.candidates} pictures a step; "
              f"{weights:,} trainable weights; {G.dtype} on {G.device}", flush=True)

    def claim(self):
        """Makes --out, or a default name that is free, and locks it while this process lives."""
        cfg = self.cfg
        what = "pairs" if cfg.pairs else Path(cfg.reward.partition(":")[0]).stem
        name = f"{Path(cfg.model).name}-{what}-{time.strftime('%Y%m%d-%H%M%S')}"
        default = rewards.absolute("runs/" + re.sub(r"[^\w.-]+", "-", name))
        given = cfg.resume or cfg.out
        self.path = Path(given or default)
        while not given and self.path.exists():
            self.path = self.path.with_name(self.path.name + "-too")
        self.made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ImportError):  # Windows, where nothing keeps two runs apart
            import fcntl
            self.lock = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path} is in use by another run: wait or stop it") from None
            except OSError:  # a file system without locks
                pass
        if not cfg.resume and not is_empty(self.path):  # since `resolved` looked
            raise UserError(f"--out {self.path} is not empty; expected a new or empty folder")

    def record(self, metrics):
        """After a step: its figures, and where it is due a checkpoint and a preview."""
        if not self.writes:
            return
        cfg, step = self.cfg, self.step
        for a, p in zip(self.average, self.G.parameters()):  # a plain mean at first
            a.lerp_(p.detach(), max(1 - cfg.average, 1 / step))
        if step == self.first + 1:
            versions = {name: sys.modules[name].__version__ for name in ("torch", "diffusers")}
            settings = json.dumps({**dataclasses.asdict(cfg), "versions": versions}, indent=1)
            rewards.write_atomic(self.path / "config.json", settings)
        if torch.cuda.is_initialized():
            metrics["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
        metrics = json.loads(json.dumps(metrics), parse_constant=lambda name: None)  # NaN: null
        self.metrics.append(metrics)
        with open(self.path / "metrics.jsonl", "a") as f:
            f.write(json.dumps(metrics) + "\n")
        if step % cfg.log_every == 0 or step in (self.first + 1, cfg.steps):
            print(figures_line(metrics, cfg.steps) + self.time_left(), flush=True)
        if step % cfg.save_every == 0:
            self.save()
        every = cfg.preview_every
        if every and (step % every == 0 or step in (1, cfg.steps)):
            self.preview()

    def time_left(self):
        """By the last ten steps; the first of a process warms up, or compiles: it tells nothing."""
        recent = [metrics["seconds"] for metrics in self.metrics[self.first + 1:][-10:]]
        if not recent:
            return ""
        left = int(sum(recent) / len(recent) * (self.cfg.steps - self.step))
        return f"  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"

    @contextlib.contextmanager
    def averaged(self):
        """Inside it the generator has the average of its LoRA over steps, which is what is kept."""
        parameters = self.G.parameters()
        now = [p.detach().clone() for p in parameters]
        for p, a in zip(parameters, self.average):
            p.data.copy_(a)
        try:
            yield
        finally:
            for p, weight in zip(parameters, now):
                p.data.copy_(weight)

    @torch.no_grad()
    def preview(self):
        """samples/step-N.png: fixed prompts and noise, the base above, the tuned model below."""
        from diffusers.utils import make_image_grid
        G, n = self.G, min(8, len(self.prompts))
        pictures = []
        for context in (G.reference(), self.averaged()):
            with context:
                for i in range(n):  # one at a time: it never needs more memory than the run
                    condition = G.encode([self.prompts[i * len(self.prompts) // n]])
                    e = prompt_noise(self.cfg.seed, i, (1, *G.noise_shape)).to(G.device)
                    pictures += rewards.to_pil(G.decode(G.sample(e, condition)))
        grid = make_image_grid(pictures, 2, n, resize=min(256, max(128, G.picture_side)))
        (self.path / "samples").mkdir(exist_ok=True)
        grid.save(self.path / "samples" / f"step-{self.step:06d}.png")

    def save(self):
        """Once a step: checkpoint.pt, all that --resume needs, and the LoRA as others read it."""
        if not self.writes or self.saved == self.step:
            return
        cfg = self.cfg
        state = {"at": {"step": self.step, "position": self.position}, "metrics": self.metrics,
                 "weights": [p.detach().cpu() for p in self.G.parameters()],
                 "average": [a.cpu() for a in self.average],
                 "optimizer": self.optimizer.state_dict(), "scaler": self.G.scaler.state_dict()}
        rewards.write_atomic(self.path / "checkpoint.pt", lambda f: torch.save(state, f))
        with self.averaged():
            self.G.save_lora(self.path, unet=cfg.unet, timestep=str(cfg.timestep),
                             prediction=cfg.prediction)
        self.saved = self.step

    def load(self):
        """Puts the checkpoint of --resume in place, and takes later steps off the log."""
        with rewards.reading(self.path / "checkpoint.pt", "there is nothing to go on from"):
            state = torch.load(self.path / "checkpoint.pt", map_location="cpu", weights_only=True)
            tensors = self.G.parameters() + self.average
            for own, saved in zip(tensors, state["weights"] + state["average"], strict=True):
                if own.shape != saved.shape:
                    raise ValueError("its LoRA is of another base or --lora-rank")
                own.data.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.G.scaler.load_state_dict(state["scaler"])
            self.step = self.first = self.saved = state["at"]["step"]
            self.position, self.metrics = state["at"]["position"], state["metrics"]
        self.optimizer.param_groups[0].update(lr=self.cfg.lr, weight_decay=self.cfg.weight_decay)
        if self.writes:
            lines = [json.dumps(metrics) + "\n" for metrics in self.metrics]
            rewards.write_atomic(self.path / "metrics.jsonl", "".join(lines))

    def end(self):
        """The last words."""
        if not self.writes:
            return
        if self.step < self.cfg.steps:
            print(f"stopped; go on with: python drpo.py --resume {self.path}", file=sys.stderr)
            return
        samples = f"look at {self.path}/samples; " if self.cfg.preview_every else ""
        print(f"done: {self.path}\n{samples}compare with the base: python eval.py {self.path}")


FIGURES = {"reward_mean": "reward {:.4g}", "reward_best": "best {:.4g}",
           "reward_worst": "worst {:.4g}", "diversity": "diversity {:.0%}",
           "distance": "distance {:.3g}", "grad_norm": "grad {:.3g}", "seconds": "{:.2f} s",
           "peak_gib": "{:.1f} GiB"}


def figures_line(metrics, steps):
    """One readable line of a step's figures."""
    watched = {name: name[6:] + " {:.4g}" for name in metrics if name.startswith("watch/")}
    parts = [f"step {metrics['step']}/{steps}"]
    for name, text in {**watched, **FIGURES}.items():
        if metrics.get(name) is not None:
            parts.append(text.format(metrics[name]))
    if metrics.get("skipped"):
        parts.append(f"no anchors for {metrics['skipped']:.0%} of the prompts")
    if not metrics["applied"]:
        parts.append("NOT FINITE, not applied")
    return "  ".join(parts)


def read_config(folder):
    """config.json of a run as a dict. UserError: no run's folder."""
    with rewards.reading(Path(folder) / "config.json", "expected the folder of a run"):
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def parse(argv):
    """Command line -> Config: what is given, else the preset of the model, else the default; with
    --resume the run's own settings in the place of both."""
    parser = argparse.ArgumentParser(prog="drpo.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise UserError(f"{message} (python drpo.py --help lists the settings)")

    parser.error = fail
    for f in dataclasses.fields(Config):
        text = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        action = "store_true" if f.type is bool else "store"
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, action=action)
    given = in_types(vars(parser.parse_args(argv)))
    if "resume" not in given:
        return Config.preset(given.pop("model", Config.model), **given)
    saved = read_config(rewards.absolute(given["resume"]))
    return Config(**{**in_types(saved), "out": "", **given})


def main(argv=None):
    """python drpo.py ...: what the user can mend ends with one line and exit code 2."""
    stop = Stop()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with rewards.one_line_errors():
        train(parse(argv), stop=stop)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # where a process ends early it might wait for the others
    if stop.signal:
        sys.exit(128 + stop.signal)


# ===== 6. Files of models: read whole, under the names that others gave them, or refused.

WAYS_ON = "ways on: --model toy, or the path of a diffusers folder in SD or SDXL layout"
NETWORKS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
            "text_encoder_2": "CLIPTextModelWithProjection"}
IMPLEMENTED = {  # what entries of the networks' configs may be: others would change the result
    "vae": {"latents_mean": (None,), "latents_std": (None,), "shift_factor": (None, 0),
            "latent_channels": (4,)},
    "unet": {"in_channels": (4,), "out_channels": (4,), "time_cond_proj_dim": (None,),
             "class_embed_type": (None,), "encoder_hid_dim_type": (None,),
             "addition_embed_type": (None, "text_time"), "sample_size": range(1, 1025)}}
LATENT_MAE = ("https://modelscope.cn/models/jiangzhou130v1/drpo-mae-latent-256/resolve/master/"
              "mae_latent_256_torch.pth",
              "4810249905d2882a41d5a0fe97ebac995af8918dbe121daa9871e5bc605445b1")
LORA_FILE = "pytorch_lora_weights.safetensors"


def model_index(name):
    """model_index.json of a name of `MODELS`, a folder or a hub id. UserError: none that works."""
    path = MODELS.get(name, str(name))
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        pick("model", path, MODELS, "or a local diffusers folder, or a hub id owner/name")
    with rewards.reading(path, WAYS_ON):
        folder = path if Path(path).is_dir() else rewards.hub_folder(path)
        index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
        if re.search("instaflow|rectified", f"{path} {index.get('_class_name')}", re.I):
            raise ValueError("a rectified flow, which is not implemented")
        for part, kind in NETWORKS.items():
            found = (index.get(part) or ["", ""])[1]
            if found != kind and (found or part != "text_encoder_2"):
                raise ValueError(f"its {part} is no {kind}; expected an SD or SDXL layout")
        return index


def is_xl(index):
    """Whether a model_index.json is of SDXL."""
    return str(index.get("_class_name", "")).startswith("StableDiffusionXL")


def load_pipeline(name, dtype, unet):
    """The pipeline of `load_generator` on the CPU. UserError: not read whole, not implemented."""
    path = MODELS.get(name, str(name))
    index = model_index(name)
    import diffusers
    import transformers
    rewards.quiet_libraries()
    kind = "StableDiffusionXLPipeline" if is_xl(index) else "StableDiffusionPipeline"
    networks = [part for part in NETWORKS if part in index]
    with rewards.reading(path, WAYS_ON):
        folder = path
        if not Path(path).is_dir():
            folders = ("", *networks, "tokenizer", "tokenizer_2", "scheduler")
            folder = rewards.hub_folder(path, folders, ["unet"] if unet else [])
        parts = {}
        for part in networks:
            library = transformers if part.startswith("text") else diffusers
            cls = getattr(library, NETWORKS[part])
            config = cls.load_config(folder, subfolder=part) if part in IMPLEMENTED else {}
            for entry, known in IMPLEMENTED.get(part, {}).items():
                if config.get(entry, known[0]) not in known:
                    raise ValueError(f"its {part} has {entry} = {config[entry]}: not implemented")
            if part == "unet" and unet:
                parts[part] = cls.from_config(config).to(dtype)
                other_unet(parts[part], unet)
            else:
                names = [file.name for file in (Path(folder) / part).glob("*model*")]
                half = names and all(".fp16" in name for name in names)
                parts[part] = rewards.frozen(cls, folder, exact=True, subfolder=part, dtype=dtype,
                                             variant="fp16" if half else None)
        unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        pipe = getattr(diffusers, kind).from_pretrained(folder, **parts, **unused)
        if not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise ValueError(f"a {type(pipe.scheduler).__name__}, which has no noise schedule abar")
        positions = parts["text_encoder"].config.max_position_embeddings
        pipe.tokenizer.model_max_length = min(pipe.tokenizer.model_max_length, positions)
        return pipe


def other_unet(unet, file):
    """--unet: the weights of a file, or of owner/repo/file on the hub, put into a UNet, whole."""
    hint = "expected the weights of this base's UNet, a file, or owner/repo/file of the hub"
    with rewards.reading(f"--unet {file}", hint):
        path = Path(file)
        if not path.is_file():
            owner, repo, name = file.split("/", 2)
            path = rewards.hub_file(f"{owner}/{repo}", name)
        unet.load_state_dict(rewards.read_weights(path))


def read_latent_mae(path):
    """DrPO's authors' file -> {name: weight} of its encoder: convolutions `.kernel` (HWIO) or
    `.weight` (OIHW), norms `.scale` or `.weight`; bare, or under "state_dict" or
    "model_state_dict" (src/drpo/features.py of UGVly/DrPO). UserError: torn, or not whole."""
    path = path or rewards.fetch(*LATENT_MAE)
    weights = {}
    with rewards.reading(path, f"expected the latent-MAE of {LATENT_MAE[0]}"):
        found = rewards.read_weights(path)
        found = found.get("state_dict", found.get("model_state_dict", found))
        for key, value in found.items():
            key = re.sub(r"^(module\.|_orig_mod\.)+", "", key)  # of DDP, of torch.compile
            if key.endswith(".kernel"):
                value = value.permute(3, 2, 0, 1)
            if key.startswith("encoder."):
                name = re.sub(r"\.(kernel|scale)$", ".weight", key.removeprefix("encoder."))
                weights[name] = value.float()
        mae_encoder(weights, torch.zeros(1, 4, 16, 16))  # KeyError: a weight is missing
    return weights


def kohya_name(name, xl):
    """A layer's name in kohya's sd-scripts, which count SDXL's blocks as its first release did: an
    input block for conv_in, then two with attention and a downsampler each, upward three each."""
    flat = name.replace(".", "_")
    match = re.match(r"(down|mid|up)_blocks?_(?:(\d)_)?attentions_(\d)", flat)
    if xl and match:  # SD keeps diffusers' names
        block, attention = int(match[2] or 0), int(match[3])
        place = {"down": f"input_blocks_{1 + 3 * block + attention}_1", "mid": "middle_block_1",
                 "up": f"output_blocks_{3 * block + attention}_1"}[match[1]]
        flat = place + flat[match.end():]
    return "lora_unet_" + flat


def write_lora(G, folder, metadata):
    """The LoRA as LORA_FILE for diffusers, and as kohya_lora.safetensors for the others, who look
    in its metadata for what it fits."""
    from safetensors.torch import save
    ours, kohya = {}, {}
    for name, layer in G.lora.items():
        down, up = layer.down.detach().cpu(), layer.up.detach().cpu()
        key = kohya_name(name, G.xl)
        ours[f"unet.{name}.lora_A.weight"] = kohya[f"{key}.lora_down.weight"] = down
        ours[f"unet.{name}.lora_B.weight"] = up * (layer.alpha / layer.rank)  # there alpha = rank
        kohya[f"{key}.lora_up.weight"] = up
        kohya[f"{key}.alpha"] = torch.tensor(float(layer.alpha))
    base = Path(G.name).name if os.path.isabs(G.name) else G.name  # nobody's home is published
    metadata.update(format="pt", drpo_base=base, ss_network_module="networks.lora",
                    ss_network_dim=str(layer.rank), ss_network_alpha=str(layer.alpha))
    if G.xl:
        metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    elif G.unet.config.cross_attention_dim == 1024:  # SD 2; for A1111
        metadata["ss_v2"] = "True"
    folder.mkdir(parents=True, exist_ok=True)
    rewards.write_atomic(folder / LORA_FILE, save(ours, metadata))
    rewards.write_atomic(folder / "kohya_lora.safetensors", save(kohya, metadata))


def read_lora(path):
    """LORA_FILE of ours, or the one in a folder -> its weights by name, and its metadata.

    UserError: another program's."""
    from safetensors import safe_open
    file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
    hint = ("not a readable LoRA file of drpo.py; another program's: fuse it into a folder by "
            "diffusers, and give that as --model")
    with rewards.reading(file, hint):
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            state = {key: f.get_tensor(key) for key in f.keys()}
        if "drpo_base" not in metadata or not min(state).startswith("unet."):
            raise ValueError(f"no {LORA_FILE} of drpo.py")
    return state, metadata


# ===== 7. Speed, which changes no result.

# without inductor's layout pass, which on a CPU lost 38% of a tiny UNet's gradient (torch 2.13)
COMPILE = dict(dynamic=False, options={"layout_optimization": False})
compiled = functools.cache(functools.partial(torch.compile, **COMPILE))  # a function, once


def compile_networks(G):
    """--compile: the UNet, the decoder, and from here on the features that ask for it."""
    print("compiling in the first steps, which takes minutes (four on an H100)", file=sys.stderr)
    torch._logging.set_logs(all=logging.ERROR)
    warnings.filterwarnings("ignore", module="torch._(dynamo|inductor)")
    torch._dynamo.config.suppress_errors = True  # what fails goes on eagerly
    G.compiled = True
    G.unet.compile(**COMPILE)
    G.vae.decoder.compile(**COMPILE)


class ChannelsLastGroupNorm(nn.GroupNorm):
    """nn.GroupNorm by statistics of each channel first: it reads channels-last memory in order,
    where torch's kernel copies to NCHW and back."""

    def forward(self, x):  # (B, C, H, W) or (B, C, H W)
        inner, n = tuple(range(2, x.ndim)), math.prod(x.shape[2:])
        groups = (self.num_groups, -1)  # (B, C) -> (B, G, C / G)
        mean = (x.sum(inner, dtype=torch.float32) / n).unflatten(-1, groups)
        norm = torch.linalg.vector_norm(x, dim=inner, dtype=torch.float32)  # no float32 copy of x
        mean = mean.mean(-1, keepdim=True)  # (B, G, 1)
        var = (norm ** 2 / n).unflatten(-1, groups).mean(-1, keepdim=True) - mean ** 2
        scale = (var + self.eps).rsqrt() * self.weight.float().unflatten(-1, groups)
        shift = self.bias.float().unflatten(-1, groups) - mean * scale
        dtype = torch.float32 if torch.compiler.is_compiling() else x.dtype  # eager would store it
        shape = (*x.shape[:2], *[1] * len(inner))
        scale = scale.to(dtype).reshape(shape)
        return torch.addcmul(shift.to(dtype).reshape(shape), x, scale).to(x.dtype)


def channels_last(decoder):
    """The VAE decoder in the layout in which tensor cores convolve."""
    decoder.to(memory_format=torch.channels_last)
    for name, norm in list(decoder.named_modules()):
        if type(norm) is nn.GroupNorm:
            other = ChannelsLastGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
            other.weight, other.bias = norm.weight, norm.bias
            decoder.set_submodule(name, other)


if __name__ == "__main__":
    main()
