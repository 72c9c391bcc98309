"""Drifting Preference Optimization (DrPO, arXiv 2606.02521): preference finetuning of one-step text-to-image models.

    pip install -r requirements.txt
    python drpo.py --model toy                                  a laptop, 3.5 minutes
    python drpo.py --model sd-turbo --reward pickscore --watch clip,aesthetic      one CUDA GPU
    python drpo.py --model sdxl-turbo --reward my_file.py:my_reward                any black box that scores pictures

A one-step generator G_theta maps noise e and a prompt c to a picture in one forward pass. For each prompt, K candidates
are sampled and a reward S RANKS them; its gradient and its scale are never used. In the space of frozen features phi,

    z_i = phi(G_theta(e_i, c)),  r_i = phi(G_ref(e_i, c))  with the same noise;  A+, A-: features of the m best, worst
    E(z)     = sum_j [k(z, a_j+) - k(z, a_j-)]             dipole energy; exp(E) is the reward that is climbed
    V_pref   = grad_z E(z)                                 preference field                         `dipole_field`
    V_ref    = mu_R(z) - mu_Z(z)                           drift toward the base, by mean shift     `reference_drift`
    z*       = sg[z + eta (V_pref + lambda V_ref)]         detached target                          `drpo_target`
    L(theta) = 1/2 mean_i ||z_i - z_i*||^2                 regression                               `regression_loss`

Symbols: P prompts a step, K candidates, m anchors of each sign, T vectors an image (a map may have several, one a
patch), N = K T samples of one prompt and map, D features, k kernel, s mean distance, tau = radius s bandwidth, R radii,
eta step, lambda weight of the drift, sg stop gradient, mu_B mean of the set B weighted by the kernel. Arrays (P, N, D).

Where this differs from the paper
 1. tau is a radius times s, the mean distance to the set in use; each radius' field is scaled to unit RMS and summed,
    as in the released code. So the loss is nearly constant: watch rms_pref, the reward, the distance.
 2. z* moves in units u = s / sqrt(D), and the loss is the mean over N and D of ((z - z*) / u)^2 / 2: maps of any
    scale and size weigh alike (README has the figures).
 3. In mu_Z a sample does not count itself; an anchor that is the sample itself exerts no force.
 4. Ties and missing opinions (NaN) have rules: see `rank`. A strictly increasing change of the scores changes nothing.
 5. Micro-batches are exact, since the target is detached: see `drpo_gradient`.
Where this differs from the authors' released code (`--field released` is its arithmetic; presets sd-turbo, sdxl-turbo)
 6. ViT-MAE sees every patch, in order; there, 75% are masked at random even in evaluation.
 7. Anchors are gathered from the candidates; there, their pictures are decoded and encoded a second time.
 8. Distances are sums of squared differences in float32; there, of products, which loses digits near zero.
 9. bf16 with float32 last layers and LoRA and fp16 latent-MAE, not fp16 autocast; micro-batches, not checkpointing.
10. The noise of a prompt depends on the seed and its position alone: not on the micro-batch, the device, or the GPUs.
"""
import argparse, contextlib, hashlib, importlib.util, io, json, logging, math, os, random, re, shutil, signal
import subprocess, sys, threading, time, warnings
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import rewards
from eval import Timer, describe, figures_line, preview, profile
from rewards import Scorer, UserError, fetch, load_pairs, load_prompts, pick, write_atomic  # UserError: exit code 2

HERE = Path(__file__).resolve().parent
KERNELS = ("laplacian", "rbf", "cosine", "exponential")
FIELDS = ("dipole", "released")
FEATURES = ("latent-mae", "vae", "unet", "mae", "dino", "latent")

def opt(default, help, **kw):
    """One setting: its default, its line in --help."""
    return field(default=default, metadata=dict(help=help, **kw))

@dataclass
class Config:
    """Every setting, with its default and its unit. The command line is made from this class."""
    model: str = opt("toy", "toy, sd-turbo, sdxl-turbo, a diffusers folder, or a hub id with an SD or SDXL layout")
    reward: str = opt("scene", "a name of `python rewards.py list`, a weighted sum a=1,b=.5, file.py:function, a URL")
    watch: str = opt("", "comma-separated rewards, logged but never ranked on: they show reward hacking")
    watch_every: int = opt(10, "steps between two scorings by the watched rewards")
    prompts: str = opt("scenes", "a text file, a prompt a line; a .jsonl with \"prompt\"; scenes, animals, pickapic")
    pairs: str = opt("", "offline instead of --reward: a .jsonl with prompt, chosen: [files], rejected: [files]")
    pairs_anywhere: bool = opt(False, "files of --pairs may lie outside its folder")
    steps: int = opt(300, "optimizer steps")
    batch: int = opt(2, "prompts a step (P), on each GPU")
    candidates: int = opt(32, "images a prompt (K)")
    anchors: int = opt(8, "best and worst taken as anchors (m), at most half of the candidates")
    features: str = opt("vae", f"feature maps phi, comma-separated: {', '.join(FEATURES)}; name@file for a local copy")
    feature_reduction: str = opt("sum", "how the losses of several maps are joined", choices=("sum", "mean"))
    field: str = opt("dipole", "dipole: the paper's equations; released: the authors' code", choices=FIELDS)
    kernel: str = opt("laplacian", "kernel k(z, a)", choices=KERNELS)
    radii: tuple = opt((0.2, 0.5, 1.0), "kernel bandwidths tau / s, comma-separated")
    lambda_ref: float = opt(0.2, "weight of the drift toward the frozen base (lambda)")
    eta: float = opt(1.0, "step of the target: z* = z + eta V")
    lr: float = opt(3e-3, "AdamW learning rate")
    lr_schedule: str = opt("cosine", "cosine: to zero over --steps", choices=("cosine", "constant"))
    warmup: int = opt(80, "steps over which the learning rate rises from zero: a fast start can lose right pictures")
    weight_decay: float = opt(0.01, "AdamW weight decay")
    clip: float = opt(1.0, "largest gradient norm")
    lora_rank: int = opt(16, "rank r of the LoRA")
    lora_alpha: float = opt(16.0, "alpha of the LoRA: the update is alpha / r B A x")
    lora_format: str = opt("diffusers", "kohya: A1111, ComfyUI, Forge", choices=("diffusers", "kohya", "both"))
    full: bool = opt(False, "finetune the whole UNet instead of a LoRA (keeps a frozen copy)")
    micro_batch: str = opt("auto", "images at once through the networks; auto halves it whenever memory runs out")
    dtype: str = opt("auto", "frozen weights; auto = bf16 on a GPU or fp32", choices=("auto", "bf16", "fp16", "fp32"))
    device: str = opt("auto", "cuda, cuda:1, cpu; auto = cuda where there is one")
    compile: bool = opt(False, "torch.compile the networks: faster steps, minutes to start")
    decoder: str = opt("vae", "decodes what is ranked; taesd: an approximation", choices=("vae", "taesd"))
    deterministic: bool = opt(False, "the same run bit for bit on the same GPU (slower)")
    seed: int = opt(0, "seed of noise, prompt order and LoRA")
    out: str = opt("", "folder of the run; default runs/MODEL-REWARD-DATE")
    resume: str = opt("", "folder of a run to go on with, with its settings")
    change: bool = opt(False, "with --resume: settings given here replace the run's, on purpose")
    save_every: int = opt(50, "steps between checkpoints")
    preview_every: int = opt(50, "steps between preview grids; 0 = none")
    log_every: int = opt(10, "steps between two lines of figures")
    reward_timeout: float = opt(600.0, "seconds that one call of a reward may take")
    profile: bool = opt(False, "print seconds, TFLOP and share of the matmul peak of each phase of a step, and stop")
    tensorboard: bool = opt(False, "also write TensorBoard event files (needs the package tensorboard)")
    random_init: bool = opt(False, "random weights of the architecture, no download: to measure time and memory")

# The authors' recipes (arXiv 2606.02521 and its repository), for one GPU: theirs ran on 4 and on 4-8.
PRESETS = {
    "toy": {},
    "sd-turbo": dict(reward="pickscore", prompts="pickapic", steps=1000, batch=8, candidates=24, anchors=8,
                     features="latent-mae", field="released", radii=(0.02, 0.05, 0.2), lr=1e-4, lr_schedule="constant",
                     warmup=0),
    "sdxl-turbo": dict(reward="pickscore", prompts="pickapic", steps=5000, batch=8, candidates=16, anchors=8,
                       features="unet", feature_reduction="mean", field="released", radii=(0.02, 0.05, 0.2), lr=1e-5,
                       lr_schedule="constant", warmup=0),
}
MODELS = {"toy": str(HERE / "toy"), "sd-turbo": "stabilityai/sd-turbo", "sdxl-turbo": "stabilityai/sdxl-turbo"}
LICENCES = {"toy": "Apache-2.0", "sd-turbo": "Stability AI Community", "sdxl-turbo": "Stability AI, see its model card"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ===== 1. The field. Pure mathematics in float32, torch only: this section, cut out of the file, runs alone.
#    Shapes: z (..., N, D) samples, a (..., M, D) anchors; any leading dimensions, such as P prompts at once.

def distances(z, a):
    """||z_i - a_j||: (..., N, D), (..., M, D) -> (..., N, M). By differences: x^2 - 2xy + y^2 loses digits."""
    return torch.cdist(z, a, compute_mode="donot_use_mm_for_euclid_dist")

def mean_distance(d, mask=None):
    """The scale s: mean of the distances (..., N, M) -> (..., 1, 1). Pairs at distance 0 (a sample and its own copy)
    and anchors outside `mask` (..., M) are left out; detached, for s is a unit of length, not a variable."""
    used = d > 0 if mask is None else (d > 0) & mask[..., None, :]
    s = (d * used).sum((-2, -1), keepdim=True) / used.sum((-2, -1), keepdim=True).clamp(min=1)
    return torch.where(s > 0, s, 1.0).detach()

def bandwidths(radii, s, kernel="laplacian"):
    """tau, one a radius: s (..., 1, 1) -> (..., R, 1, 1). tau = radius s; the cosine kernel has no unit of length."""
    return torch.stack([r * (torch.ones_like(s) if kernel == "cosine" else s) for r in radii], -3)

def log_kernel(z, a, d, tau, kernel):
    """log k(z_i, a_j): (..., R, N, M). d = distances(z, a) (..., N, M), tau = bandwidths(radii, s) (..., R, 1, 1)."""
    if kernel == "cosine":
        return (F.normalize(z, dim=-1) @ F.normalize(a, dim=-1).mT).unsqueeze(-3) / tau
    x = d.unsqueeze(-3) / tau
    return -(x**2) / 2 if kernel == "rbf" else -x  # "laplacian", alias "exponential"

def pull(c, z, a):
    """sum_j c_ij (a_j - z_i): c (..., R, N, M) -> (..., R, N, D). It does not depend on the origin of z and a, but its
    rounding error does: the mean of a keeps it small."""
    origin = a.mean(-2, keepdim=True)  # (..., 1, D)
    return c @ (a - origin).unsqueeze(-3) - c.sum(-1, keepdim=True) * (z - origin).unsqueeze(-3)

def kernel_gradient(z, a, weight, d, tau, kernel):
    """sum_j w_j grad_z k(z_i, a_j) = exp(shift) V: -> V (..., R, N, D), shift (..., R, 1, 1); weight (..., M).
    An anchor that IS the sample gives no force. The largest kernel is taken out: small radii would underflow."""
    none = (d == 0) | (weight == 0)[..., None, :]  # (..., N, M)
    log_k = log_kernel(z, a, d, tau, kernel).masked_fill(none.unsqueeze(-3), -torch.inf)  # (..., R, N, M)
    shift = log_k.amax((-2, -1), keepdim=True).nan_to_num(neginf=0.0)
    k = weight[..., None, None, :] * (log_k - shift).exp()  # (..., R, N, M)
    if kernel == "cosine":  # grad k = k (a^ - cos z^) / (radius ||z||)
        z_hat, a_hat = F.normalize(z, dim=-1).unsqueeze(-3), F.normalize(a, dim=-1).unsqueeze(-3)
        V = k @ a_hat - (k * (z_hat @ a_hat.mT)).sum(-1, keepdim=True) * z_hat  # (..., R, N, D)
        return V / (tau * z.norm(dim=-1, keepdim=True).clamp(min=1e-12).unsqueeze(-3)), shift
    d = d.unsqueeze(-3)
    c = k / tau**2 if kernel == "rbf" else k / (tau * d).masked_fill(d == 0, 1)  # grad k = -c (z - a)
    return pull(c, z, a), shift

def unit_sum(V, shift=0.0, return_rms=False):
    """Each radius' field scaled to RMS 1 over its (N, D), and summed: V (..., R, N, D) -> (..., N, D); on request also
    the RMS of exp(shift) V, (..., R)."""
    rms = V.square().mean((-2, -1), keepdim=True).sqrt()  # (..., R, 1, 1)
    V = (V / torch.where(rms > 0, rms, 1.0)).sum(-3)
    return (V, (rms * torch.as_tensor(shift).exp())[..., 0, 0]) if return_rms else V

def _both(positive, negative, masks):
    """Anchors of both signs in one list: (..., M+ + M-, D), their signs +1/-1, and which are there at all."""
    shapes = positive.shape[:-1], negative.shape[:-1]
    masks = masks or [torch.ones(s, dtype=torch.bool, device=positive.device) for s in shapes]
    mask = torch.cat([m.expand(s) for m, s in zip(masks, shapes)], -1)
    sign = torch.cat([positive.new_ones(shapes[0]), -positive.new_ones(shapes[1])], -1)
    return torch.cat([positive, negative], -2).float(), sign * mask, mask

def dipole_energy(z, positive, negative, *, radius, kernel="laplacian"):
    """E(z) = sum_j [k(z, a_j+) - k(z, a_j-)] (the paper's dipole, gamma = 1): (..., N, D), (..., M, D) x2 -> (..., N).
    exp(E) is the dipole reward; `dipole_field` is the gradient of E, up to its normalisation."""
    z, (a, sign, _) = z.float(), _both(positive, negative, None)
    d = distances(z, a)
    k = log_kernel(z, a, d, bandwidths((radius,), mean_distance(d), kernel), kernel).exp()[..., 0, :, :]  # (..., N, M)
    return (sign[..., None, :] * k).sum(-1)

def dipole_field(z, positive, negative, *, radii, kernel="laplacian", masks=None, return_rms=False):
    """V_pref(z) = grad_z E(z): toward the best candidates and away from the worst, most strongly near them.

    z (..., N, D); positive, negative (..., M, D); radii: bandwidths in units of the mean distance s; masks: a pair of
    boolean (..., M), False where a row is padding. Returns (..., N, D): per radius scaled to unit RMS over (N, D), then
    summed; with return_rms also the RMS before that scaling, (..., R): the loss cannot show it."""
    z, (a, sign, mask) = z.float(), _both(positive, negative, masks)
    d = distances(z, a)  # (..., N, M)
    tau = bandwidths(radii, mean_distance(d, mask), kernel)  # (..., R, 1, 1)
    return unit_sum(*kernel_gradient(z, a, sign, d, tau, kernel), return_rms)

def reference_drift(z, reference, *, radii, kernel="laplacian", return_rms=False):
    """V_ref(z) = mu_R(z) - mu_Z(z), mu_B(z) = sum_b k(z, b) b / sum_b k(z, b): the mean-shift estimate of
    grad log p_ref - grad log p_theta (the paper's reference drift). A sample never counts itself in mu_Z.

    z (..., N, D), reference (..., M, D) -> (..., N, D), unit RMS per radius, summed; else as `dipole_field`."""
    z, r = z.float(), reference.float()
    d_z, d_r = distances(z, z), distances(z, r)  # (..., N, N), (..., N, M)
    tau = bandwidths(radii, mean_distance(torch.cat([d_z, d_r], -1)), kernel)  # (..., R, 1, 1)
    self_pair = torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)
    w_r = log_kernel(z, r, d_r, tau, kernel).softmax(-1)  # (..., R, N, M)
    w_z = log_kernel(z, z, d_z, tau, kernel).masked_fill(self_pair, -torch.inf).softmax(-1)  # (..., R, N, N)
    w_z = w_z.nan_to_num(0)  # a lone sample has no mu_Z: no repulsion
    return unit_sum(pull(w_r, z, r) - pull(w_z, z, z), return_rms=return_rms)  # (mu_R - z) - (mu_Z - z)

def released_field(z, positive, negative, *, radii, kernel="laplacian", positive_weight=3000.0, negative_weight=3000.0,
                   negative_is_self=False, masks=None, return_rms=False):
    """The force of the authors' released code, with which the published figures were obtained.

    z (..., N, D); positive, negative (..., M, D). Returns the force (..., N, D) in units of s / sqrt(D), and s (...,).
    As preference term the anchors are best and worst; as reference term positives are the reference's, negatives
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
    unit, radius = s / D**0.5, bandwidths(radii, torch.ones_like(s))  # (..., 1, 1), (..., R, 1, 1)
    logits = log_kernel(z, y, d, bandwidths(radii, s, kernel), kernel) - same * (100 / radius)  # (..., R, N, Y)
    logits = logits.masked_fill((w == 0).unsqueeze(-3), -1e9)  # padding
    A = (logits.softmax(-1) * logits.softmax(-2)).clamp(min=1e-6).sqrt() * w.unsqueeze(-3)  # (..., R, N, Y)
    minus, plus = A.split([N + M, y.shape[-2] - N - M], -1)  # [z ; negatives], positives
    coef = torch.cat([-minus * plus.sum(-1, keepdim=True), plus * minus.sum(-1, keepdim=True)], -1)
    V = pull(coef, z, y) / unit.unsqueeze(-3)  # (..., R, N, D)
    rms = V.square().mean((-2, -1), keepdim=True).clamp(min=1e-8).sqrt()
    force = (V / rms).sum(-3)  # (..., N, D)
    return (force, s[..., 0, 0], rms[..., 0, 0]) if return_rms else (force, s[..., 0, 0])

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
    terms = []
    for force, s, weight in ((F_pref, s_pref, 1.0), (F_ref, s_ref, cfg.lambda_ref)):
        u = s[:, None, None] / D**0.5  # (P, 1, 1)
        terms.append((z + cfg.eta * u * force, weight / (N * D * u**2)))
    return terms, rms_pref, rms_ref

def regression_loss(z, terms):
    """sum over terms of weight ||z - sg(z*)||^2: z (N, D), z* (N, D), weight (N, 1) -> scalar; a sum over samples."""
    return sum((weight.detach() * (z - z_star.detach()).square()).sum() for z_star, weight in terms)

# ===== 2. Features phi: frozen networks in which a direction means something. Each takes latents x (B, 4, h, w) in the
#    generator's scale and the prompts' condition, and returns a list of maps (B, T, D) in float32: T vectors an image.
#    Pooled, translation-invariant statistics serve; raw latents do not.

def mean_std(h, patch=None):
    """Mean and population std, sqrt(var + 1e-6), of h (B, C, H, W) over patch x patch squares or all: 2 x (B, T, C)."""
    h = h.float()
    p, q = (patch, patch) if patch else h.shape[-2:]
    h = h.unflatten(-1, (-1, q)).unflatten(-3, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(-2)  # B,T,C,p*q
    return h.mean(-1), (h.var(-1, correction=0) + 1e-6).sqrt()

def scaled_backward(net, x):
    """net(x) in float32; on the way back through net the gradient's largest entry is 1: fp16 would lose small ones."""
    x, scale = x.float().view_as(x), []  # a view: the hook sees this path alone
    h = net(x).float()
    if h.requires_grad:
        h.register_hook(lambda g: scale.append(g.abs().amax().clamp(min=1e-30)) or g / scale[0])
        x.register_hook(lambda g: g * scale.pop())
    return h

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

    ModelScope jiangzhou130v1/drpo-mae-latent-256, mae_latent_256_torch.pth (width 256, 340 M parameters); the same
    as JAX msgpack: HF hub Goodeat/drifting, models/mae/jax/mae_latent_256. Source: that file."""

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
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # torn files fail in many ways
            raise UserError(f"{path}: not a readable latent-MAE file ({type(e).__name__})") from e
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
    """Factory of the `latent-mae` features: see `LatentMAE`. In fp16 also where the rest is bf16: after 16 blocks of
    ReLU the gradient of bf16 has a cosine of 0.945 to that of float32, of fp16 0.993 (random weights)."""
    with torch.device(G.device):
        net = LatentMAE() if random_init else LatentMAE.load(path or fetch(LatentMAE.URL, LatentMAE.SHA256))
    dtype = G.dtype if G.dtype == torch.float32 else torch.float16
    net = net.to(G.device, dtype).eval().requires_grad_(False)
    G.compiled(net)

    def phi(x, condition):
        h = scaled_backward(lambda x: net(x.to(dtype)), x)  # (B, C, h/8, w/8)
        whole, patches = mean_std(h), [p for p in (2, 4) if h.shape[-1] > p]
        return [*whole, *(m for p in patches for m in mean_std(h, p))]

    return phi

def vae_features(G, path=None, random_init=False):
    """`vae`: the frozen VAE decoder of the generator itself, after mid_block, up_blocks[0], up_blocks[1]; of each the
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
    noise = prompt_noise(0, 0, G.noise_shape).to(G.device)  # one draw, shared by all: phi is a fixed function

    def phi(x, condition):
        unet, hidden = G.reference_unet, []

        def keep(module, args, out):
            hidden.append(out[0] if isinstance(out, tuple) else out)
            if len(hidden) == 3:
                raise StopIteration  # no later layer is needed

        with contextlib.ExitStack() as hooks, G.reference(), contextlib.suppress(StopIteration):
            for block in (unet.down_blocks[min(2, len(unet.down_blocks) - 1)], unet.mid_block, unet.up_blocks[0]):
                hooks.callback(block.register_forward_hook(keep).remove)
            G.call_unet(x + 0.1 * noise, torch.tensor(100, device=x.device), condition)
        return [F.avg_pool2d(h.float(), min(4, h.shape[-1])).flatten(1)[:, None] for h in hidden]  # (B, 1, D) each

    return phi

def vit_features(repo, cls_name, side):
    """`mae`, `dino`: a vision transformer on the decoded image, 224 x 224: of hidden_states[12] the mean and std over
    patches, and the class token: three maps. facebook/vit-mae-base (CC-BY-NC-4.0), facebook/dinov2-base (Apache-2.0).
    ViT-MAE masks and shuffles its patches at random even in eval mode: mask_ratio = 0 and sorted noise undo it."""

    def factory(G, path=None, random_init=False):
        import transformers
        cls = getattr(transformers, cls_name)
        net = cls(cls.config_class(image_size=side)) if random_init else from_hub(cls.from_pretrained, path or repo)
        net.config.mask_ratio, n = 0.0, (224 // net.config.patch_size) ** 2
        net = net.to(G.device, G.dtype).eval().requires_grad_(False)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=G.device)[..., None, None]

        def phi(x, condition):
            image = F.interpolate(G.decode(x), (224, 224), mode="bicubic", antialias=True)  # (B, 3, 224, 224)
            order = {"noise": torch.arange(n, device=x.device).expand(len(x), n)} if "MAE" in cls_name else {}
            h = net(((image - mean) / std).to(G.dtype), output_hidden_states=True, **order).hidden_states
            h = h[min(12, len(h) - 1)].float()  # (B, 1 + n, D), class token first
            return [*mean_std(h[:, 1:].mT[..., None]), h[:, :1]]

        return phi

    return factory

PHI = {"latent-mae": latent_mae, "vae": vae_features, "unet": unet_features,
       "mae": vit_features("facebook/vit-mae-base", "ViTMAEModel", 224),
       "dino": vit_features("facebook/dinov2-base", "Dinov2Model", 518),
       # the latent itself: kept because it fails (paper: PickScore 20.52 against 23.5)
       "latent": lambda G, path=None, random_init=False: lambda x, condition: [x.float().flatten(1)[:, None]]}

def load_features(spec, G, random_init=False):
    """'vae' or 'latent-mae@file,vae' -> phi(x (B, 4, h, w), condition) -> list of maps (B, T, D), float32."""
    parts = []
    for item in spec.split(","):
        name, _, path = item.strip().partition("@")
        parts.append(pick("feature", name, PHI)(G, path or None, random_init))
    return lambda x, condition: [z for phi in parts for z in phi(x, condition)]

# ===== 3. The one-step generator x = G_theta(e, c) and its LoRA; the reference G_ref is the same, the LoRA off.

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention, as in the authors' recipe
COMPILED = ("ResnetBlock2D", "Downsample2D", "Upsample2D")  # what diffusers' networks repeat beside transformer blocks
LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"

class LoRA(nn.Module):
    """y = W x + alpha / r B A x, W frozen; A (r, in) random, B (out, r) zero, both float32 for the optimizer."""
    def __init__(self, base, rank, alpha, switch):
        super().__init__()
        self.base, self.scale, self.switch = base, alpha / rank, switch
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x, *args):
        flat = x.flatten(0, -2)  # (tokens, in)
        y = self.base(flat)
        if self.switch["on"]:  # in place: W x is kept by nobody; on y itself, since autograd copies for a view of it
            y.addmm_(F.linear(flat, self.A.to(x.dtype)), self.B.to(x.dtype).mT, alpha=self.scale)
        return y.unflatten(0, x.shape[:-1])

class ChannelsLastGroupNorm(nn.GroupNorm):
    """nn.GroupNorm by statistics of each channel first: it reads channels-last memory in order, where torch's kernel
    copies to NCHW and back."""
    def forward(self, x):  # (B, C, H, W) or (B, C, H W)
        inner, n = tuple(range(2, x.ndim)), math.prod(x.shape[2:])
        groups = lambda t: t.unflatten(-1, (self.num_groups, -1))  # (..., C) -> (..., G, C / G)
        mean = groups(x.sum(inner, dtype=torch.float32) / n).mean(-1, keepdim=True)  # (B, G, 1)
        norm = torch.linalg.vector_norm(x, dim=inner, dtype=torch.float32)  # (B, C): x^2 without a float32 copy of x
        var = groups(norm**2 / n).mean(-1, keepdim=True) - mean**2  # (B, G, 1)
        scale = (var + self.eps).rsqrt() * groups(self.weight.float())  # (B, G, C / G)
        shift = groups(self.bias.float()) - mean * scale
        dtype = torch.float32 if torch.compiler.is_compiling() else x.dtype  # eager, float32 would be stored: slow
        scale, shift = (t.to(dtype).reshape(*x.shape[:2], *[1] * len(inner)) for t in (scale, shift))
        return torch.addcmul(shift, x, scale).to(x.dtype)

def channels_last(net):
    """Keep all activations of a network channels-last: the layout in which tensor cores convolve, others are copied."""
    net.to(memory_format=torch.channels_last)
    for module in net.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ChannelsLastGroupNorm
        elif type(module).__name__ == "Transformer2DModel":  # it ends with .contiguous(): NCHW for all that follows
            module.register_forward_hook(lambda m, x, out: (out[0].contiguous(memory_format=torch.channels_last),))

class Generator:
    """A one-step generator in diffusers' SD or SDXL layout: encode(prompts) -> condition, sample(noise, condition) ->
    latents, decode(latents) -> images, reference(): context of the frozen base, save_lora, load_lora."""
    def __init__(self, pipe, device="cpu", dtype=torch.float32, name="", compile=False, decoder="vae"):
        self.pipe, self.device, self.dtype, self.name, self.compile = pipe, torch.device(device), dtype, name, compile
        self.unet, self.vae, self.xl = pipe.unet, pipe.vae, hasattr(pipe, "text_encoder_2")
        for net in (pipe.unet, pipe.vae, pipe.text_encoder, *([pipe.text_encoder_2] if self.xl else [])):
            net.to(self.device, dtype).eval().requires_grad_(False)
        # sigma = 14.6 multiplies the rounding error of the last layers, so in half precision they stay in float32
        self.unet.conv_norm_out.float().register_forward_pre_hook(lambda module, x: (x[0].float(),))
        self.unet.conv_out.float()
        if dtype == torch.float16 and self.xl and self.vae.config.force_upcast:
            print("the SDXL VAE overflows in fp16: it runs in float32", file=sys.stderr)
            self.vae.float()
        if self.device.type == "cuda":
            channels_last(self.vae.decoder)
        self.ranker = self.vae  # decodes what is ranked; features and previews always use the VAE
        if decoder == "taesd":
            from diffusers import AutoencoderTiny
            repo = "madebyollin/taesdxl" if self.xl else "madebyollin/taesd"
            random = name.startswith("random")
            self.ranker = AutoencoderTiny() if random else from_hub(AutoencoderTiny.from_pretrained, repo)
            self.ranker.to(self.device, dtype).eval().requires_grad_(False)
        pipe.scheduler.set_timesteps(1)  # one step: x = x_T - sigma eps, all of it derived from the scheduler's config
        self.sigma, self.t = float(pipe.scheduler.sigmas[0]), pipe.scheduler.timesteps[0].to(self.device)
        self.init, self.prediction = float(pipe.scheduler.init_noise_sigma), pipe.scheduler.config.prediction_type
        side = self.unet.config.sample_size
        self.noise_shape, self.picture_side = (self.unet.config.in_channels, side, side), side * pipe.vae_scale_factor
        self.switch, self.lora, self.reference_unet, self.autocast = {"on": True}, {}, self.unet, False
        self.revision = "".join(re.findall("snapshots/(\\w+)", str(pipe.unet.config.get("_name_or_path")))) or "local"
        self.loss_scale = 2.0**14 if dtype == torch.float16 else 1.0  # small gradients vanish in fp16
        self.compiled(self.unet)
        self.compiled(self.ranker.decoder)

    def compiled(self, net):
        """Compile a network in place where --compile asks for it: block by block, since one graph for the whole of a
        channels-last UNet lost 15 to 19% of a gradient (torch 2.13, CPU). Where it fails it goes on without, and says
        so."""
        if not self.compile:
            return
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        limits = torch._dynamo.config  # of 8 graphs a function: all blocks share nn.Module's, and each shape needs one
        limits.cache_size_limit = limits.accumulated_cache_size_limit = 1024
        channels_last(net)
        block = "BasicTransformerBlock" if self.xl else "Transformer2DModel"  # SDXL's hold up to ten alike: one graph
        parts = [module for module in net.modules() if type(module).__name__ in (*COMPILED, block)] or [net]

        def guarded(part, fast):
            def call(*args, **kw):
                try:
                    return fast(*args, **kw)
                except torch._dynamo.exc.TorchDynamoException as e:
                    if "out of memory" in str(e):
                        raise torch.OutOfMemoryError(str(e)) from e
                    reason = " ".join(str(e).split())[:200] or type(e).__name__
                    print(f"--compile: {reason}; going on without", file=sys.stderr)
                    for other in parts:
                        other._compiled_call_impl = None  # nn.Module goes back to the uncompiled call
                    return part(*args, **kw)
            return call

        for part in parts:
            part.compile(dynamic=False, options={"layout_optimization": False})
            part._compiled_call_impl = guarded(part, part._compiled_call_impl)

    def eager(self):
        """Context in which nothing is compiled."""
        return torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext()

    @torch.no_grad()
    def encode(self, prompts):
        """P prompts -> condition, a dict of tensors with leading dimension P, as the pipeline encodes them."""
        if not self.xl:
            return {"text": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}  # (P, 77, D)
        text, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, num_images_per_prompt=1,
                                                     do_classifier_free_guidance=False)
        ids = torch.tensor([[self.picture_side, self.picture_side, 0, 0] + [self.picture_side] * 2], device=self.device)
        return {"text": text, "pooled": pooled, "time_ids": ids.to(self.dtype).expand(len(prompts), -1)}

    def call_unet(self, x, t, condition):
        """The network's raw prediction: x (B, 4, h, w), t scalar, condition of B rows -> (B, 4, h, w) float32."""
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]} if self.xl else None
        with torch.autocast(self.device.type, self.dtype, enabled=self.autocast):
            x = self.unet(x.to(self.dtype), t, condition["text"], added_cond_kwargs=added, return_dict=False)[0]
        return x.float()

    def sample(self, noise, condition):
        """x = G(e, c): noise e (B, 4, h, w) ~ N(0, 1), condition of B rows -> latents (B, 4, h, w), float32.

        x_T = sigma e, x = x_T - sigma eps(c_in x_T, t = 999, c), c_in = 1 / sqrt(sigma^2 + 1): the diffusers pipeline
        with num_inference_steps=1, guidance_scale=0."""
        x_T = self.init * noise.float()
        out = self.call_unet(x_T / math.sqrt(self.sigma**2 + 1), self.t, condition)
        if self.prediction == "epsilon":
            return x_T - self.sigma * out
        if self.prediction == "v_prediction":
            return x_T / (self.sigma**2 + 1) - out * self.sigma / math.sqrt(self.sigma**2 + 1)
        return out  # "sample": the network predicts x itself

    def decode(self, latents, net=None, micro=8):
        """Latents (B, 4, h, w) -> images (B, 3, H, W) in [0, 1], float32; by net (the VAE), at most 8 at once."""
        net = net or self.vae
        z = latents.to(next(net.parameters()).dtype) / net.config.scaling_factor
        x = torch.cat([net.decode(part, return_dict=False)[0] for part in z.split(min(8, micro))])
        return (x.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images):
        """Images (B, 3, H, W) in [0, 1] -> latents (B, 4, h, w), float32: the mode of the VAE's posterior."""
        x = self.vae.encode((2 * images - 1).to(self.device, self.vae.dtype)).latent_dist.mode()
        return x.float() * self.vae.config.scaling_factor

    @contextlib.contextmanager
    def reference(self):
        """Inside it the generator is the frozen base G_ref: the LoRA off, or with --full the kept copy."""
        before, self.unet, self.switch["on"] = (self.unet, self.switch["on"]), self.reference_unet, False
        try:
            yield
        finally:
            self.unet, self.switch["on"] = before

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
        """--full: every weight of the UNet trains, in float32 under autocast; a frozen copy is the reference."""
        self.reference_unet, self.autocast = deepcopy(self.unet), self.dtype != torch.float32
        return list(self.unet.float().requires_grad_(True).parameters())

    def save_lora(self, folder, format="diffusers", metadata=None):
        """Write the LoRA: diffusers format for pipe.load_lora_weights(folder), kohya format for A1111, ComfyUI, Forge.
        diffusers takes alpha = rank for granted, so there B carries alpha / r; kohya's file has alpha as a tensor."""
        from safetensors.torch import save
        meta = {"format": "pt", "base_model": self.name, "lora_alpha": str(self.alpha), "base_revision": self.revision,
                "base_licence": LICENCES.get(self.name, "see the base model"), **(metadata or {})}
        state = {"diffusers": {}, "kohya": {}}
        for name, m in self.lora.items():
            A, B, key = m.A.detach().cpu(), m.B.detach().cpu(), "lora_unet_" + name.replace(".", "_")
            state["diffusers"] |= {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B * m.scale}
            state["kohya"] |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B,
                               f"{key}.alpha": torch.tensor(float(self.alpha))}
        for kind, file in (("diffusers", LORA_FILE), ("kohya", KOHYA_FILE)):
            if format in (kind, "both"):
                write_atomic(Path(folder) / file, save(state[kind], metadata=meta))

    def load_lora(self, path):
        """Load what save_lora wrote, either format, from a folder or a file; returns the file's metadata."""
        from safetensors import safe_open
        path = Path(path)
        if path.is_dir():
            path = next((path / f for f in (LORA_FILE, KOHYA_FILE) if (path / f).exists()), path / LORA_FILE)
        try:
            with safe_open(path, "pt") as f:
                meta, state = f.metadata() or {}, {k: f.get_tensor(k).float() for k in f.keys()}
        except Exception as e:  # safetensors has an exception of its own
            raise UserError(f"{path}: not a readable LoRA file ({str(e).splitlines()[0]})") from e
        kohya = any(k.startswith("lora_unet_") for k in state)
        down, up = (".lora_down.weight", ".lora_up.weight") if kohya else (".lora_A.weight", ".lora_B.weight")
        rank = next((v.shape[0] for k, v in state.items() if k.endswith(down)), 0)
        if not rank:
            raise UserError(f"{path}: no LoRA weights in it (expected keys that end in {down})")
        alpha = next((v for k, v in state.items() if k.endswith(".alpha")), meta.get("lora_alpha", rank))
        self.add_lora(rank, float(alpha))
        for name, m in self.lora.items():
            key = "lora_unet_" + name.replace(".", "_") if kohya else f"unet.{name}"
            A, B = state.get(key + down), state.get(key + up)
            if A is None or B is None or A.shape != m.A.shape or B.shape != m.B.shape:
                raise UserError(f"{path}: made for the base {meta.get('base_model', '(not stated)')}; {self.name} is "
                                f"another: {key} is missing or of another shape")
            m.A.data.copy_(A)
            m.B.data.copy_(B if kohya else B / m.scale)
        return meta

load_lora = Generator.load_lora  # load_lora(generator, folder or file)

def from_hub(load, name, **kw):
    """load(name) from a local folder or the hub; a failure is the user's to mend, and the line says how."""
    try:
        return load(name, **kw)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise UserError(f"{name} could not be loaded: no usable local folder, not in the cache, or no hub in reach "
                        f"({reason}). Ways on: --model toy, or the path of a local diffusers folder") from e

def load_generator(name_or_path, *, device="cpu", dtype=torch.float32, random_init=False, compile=False, decoder="vae"):
    """toy, sd-turbo, sdxl-turbo, a diffusers folder or a hub id -> Generator with frozen weights and no LoRA."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said in one line, by us
        library.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message=".*torch_dtype.*")  # renamed on the way through the supported versions
    architecture = layout(name_or_path)
    if random_init:
        from eval import random_pipeline
        pipe, name_or_path = random_pipeline(architecture, device, dtype), f"random {name_or_path}"
    else:
        kw = dict(variant="fp16") if name_or_path in ("sd-turbo", "sdxl-turbo") else {}  # half the download
        path = MODELS.get(name_or_path, name_or_path)
        pipe = from_hub(diffusers.DiffusionPipeline.from_pretrained, path, torch_dtype=dtype, **kw)
    if not all(hasattr(pipe, part) for part in ("unet", "vae", "text_encoder")):
        raise UserError(f"{name_or_path} is a {type(pipe).__name__}; expected an SD or SDXL layout")
    return Generator(pipe, device, dtype, name_or_path, compile, decoder)

def layout(name_or_path):
    """The preset that fits a model: its own, or sd-turbo / sdxl-turbo by the class in its model_index.json."""
    if name_or_path in PRESETS:
        return name_or_path
    index = Path(name_or_path) / "model_index.json"
    if not Path(name_or_path).exists():
        if "/" not in name_or_path:
            pick("model", name_or_path, MODELS, "or a local diffusers folder, or a hub id owner/name")
        from huggingface_hub import hf_hub_download
        index = Path(from_hub(lambda name: hf_hub_download(name, "model_index.json"), name_or_path))
    if not index.exists():
        raise UserError(f"{name_or_path}: no model_index.json in it; expected a diffusers folder in SD or SDXL layout")
    return "sdxl-turbo" if '"StableDiffusionXL' in index.read_text() else "sd-turbo"

# ===== 4. One training step, with exact micro-batches.

def rows(condition, index):
    """The rows `index` of a condition, a dict of tensors (P, ...)."""
    return {k: v[index] for k, v in condition.items()}

def anchors_of(z, mask, m):
    """Features of the marked candidates: z (P, K, T, D), mask (P, K) -> (P, m T, D), padded, and what is no padding."""
    index = mask.float().argsort(dim=-1, descending=True, stable=True)[:, :m]  # (P, m)
    anchors = z[torch.arange(len(z), device=z.device)[:, None], index]  # (P, m, T, D): gathered, never computed again
    return anchors.flatten(1, 2), mask.gather(1, index).repeat_interleave(z.shape[2], 1)

def divisor(n, most):
    """The largest divisor of n up to `most` (at least 1): equal chunks, one shape to compile."""
    return max(d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0)

def drpo_gradient(G, phi, prompts, noise, cfg, micro, *, score=None, pairs=None, timer=None):
    """One update's gradient, times G.loss_scale, added to .grad of the trainable weights; returns a dict of figures.

    prompts: P strings; noise (P, K, 4, h, w); micro: images at once; score: a `Scorer`; pairs: see `pair_anchors`.
    Exact for any micro: the field of a prompt needs its own candidates alone, so as many whole prompts as micro
    allows go through the step together; a prompt that is larger goes through it in chunks, see `prompt_gradient`."""
    timer = timer or Timer(G.device)
    P, K = noise.shape[:2]
    with timer("sample"):
        condition, noise = G.encode(prompts), noise.to(G.device)  # once a prompt
    parts, size = [], divisor(P, micro // K)
    for i in (slice(a, a + size) for a in range(0, P, size)):
        pairs_i = pairs and [[(a[i], mask[i]) for a, mask in sides] for sides in pairs]
        c = rows(condition, i)
        parts.append(prompt_gradient(G, phi, prompts[i], noise[i], c, cfg, micro, P, score, pairs_i, timer))
    M = {k: torch.cat([part[k].float().cpu() for part in parts]) for k in parts[0]}  # (P, ...) each
    within = M.pop("within").mean(0).tolist()
    metrics = {"loss": float(M.pop("loss").sum())} | ({"skipped": int(M.pop("skipped").sum())} if score else {})
    metrics |= {k: v.nanmean(0).tolist() for k, v in M.items()}  # NaN: a prompt without an opinion
    return metrics | {"diversity": within[0] / max(within[1], 1e-12)} | (score.logged() if score else {})

def prompt_gradient(G, phi, prompts, noise, condition, cfg, micro, P, score, pairs, timer):
    """`drpo_gradient` for p of its P prompts: noise (p, K, 4, h, w), condition of p rows; returns figures per prompt.

    (A) sample, decode, score, features. (B) rank, field, targets. (C) the loss and its gradient. Where the p K images
    are more than micro, A runs without gradient and C samples once more, chunk by chunk: the targets z* are detached,
    so once they are known the loss is a sum over samples."""
    (p, K), n, e = noise.shape[:2], noise.shape[:2].numel(), noise.flatten(0, 1)  # e (n = p K, 4, h, w)
    owner, whole = torch.arange(p, device=G.device).repeat_interleave(K), n <= micro  # owner: the prompt of each image
    chunks = lambda size: [slice(a, a + size) for a in range(0, n, size)]

    def generate(i):  # with gradient or without, as the caller says
        c = rows(condition, owner[i])
        with timer("sample"):
            x = G.sample(e[i], c)
        with timer("features"):
            return x, phi(x, c)

    A = []
    for i in chunks(n if whole else divisor(n, 4 * micro)):  # (A); without a graph four times as many fit
        with torch.set_grad_enabled(whole):
            x, z = generate(i)
        with torch.no_grad(), G.reference():
            x_ref, z_ref = generate(i)
        if score:
            with torch.no_grad(), timer("decode"):
                images = G.decode(x, G.ranker, micro)
            with timer("reward"):
                score(images, [prompts[j // K] for j in range(n)[i]])
            del images
        A.append((x.detach(), x_ref, [h.detach() for h in z], z_ref))
    x, x_ref = (torch.cat(t).reshape(p, K, -1) for t in list(zip(*A))[:2])  # (p, K, 4 h w)
    z_all, z_ref_all = ([torch.cat(h).unflatten(0, (p, K)) for h in zip(*t)] for t in list(zip(*A))[2:])  # (p, K, T, D)

    terms, rms = [], []
    with torch.no_grad(), timer("field"):  # (B)
        scores = score.finish(p, K) if score else None  # (p, K)
        masks = [mask.to(G.device) for mask in rank(scores, cfg.anchors)] if score else None
        for j, (h, h_ref) in enumerate(zip(z_all, z_ref_all)):
            (a, a_mask), (b, b_mask) = pairs[j] if pairs else [anchors_of(h, mask, cfg.anchors) for mask in masks]
            result, *r = drpo_target(h.flatten(1, 2), h_ref.flatten(1, 2), a, b, (a_mask, b_mask), cfg)
            share = P * (len(z_all) if cfg.feature_reduction == "mean" else 1)
            terms.append([(t.reshape(n, *h.shape[2:]), w / share) for t, w in result])  # (p K, T, D), (p, 1, 1)
            rms.append(torch.stack(r))  # (2, p, R)

    loss = torch.zeros(1, device=G.device)
    for i in chunks(n if whole else divisor(n, micro)):  # (C)
        if not whole:  # values of (A), to which the targets belong, with a gradient: other chunks round otherwise
            z = [h_A.flatten(0, 1)[i] + (h - h.detach()) for h_A, h in zip(z_all, generate(i)[1])]
        with timer("backward"):
            part = sum(regression_loss(h, [(t[i], w[owner[i]]) for t, w in term]) for h, term in zip(z, terms))
            (part * G.loss_scale).backward()
            loss, z = loss + part.detach(), None  # the graph goes before the next one comes
    within = torch.stack([mean_distance(distances(t, t)).flatten() for t in (x, x_ref)], -1)  # (p, 2)
    figures = dict(zip(("rms_pref", "rms_ref"), torch.stack(rms).mean(0)))  # (p, R) each: mean over maps
    return figures | {"loss": loss, "within": within, "distance": (x - x_ref).square().mean((1, 2)).sqrt()} | (
        score_figures(scores, *(mask.cpu() for mask in masks)) if score else {})

def score_figures(s, positive, negative):
    """Of scores (p, K), per prompt: mean, best, worst, standard deviation, gap between the anchors, and whether there
    are none; NaN for a prompt without an opinion."""
    best, worst = (sign * (sign * s).nan_to_num(nan=-math.inf).amax(-1) for sign in (1, -1))
    mean = lambda mask: torch.where(mask, s, torch.nan).nanmean(-1)
    std = (s - s.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt()
    figures = {"reward_mean": s.nanmean(-1), "reward_best": best, "reward_worst": worst, "reward_std": std}
    return {k: v.masked_fill(s.isnan().all(-1), torch.nan) for k, v in figures.items()} | {
        "gap": mean(positive) - mean(negative), "skipped": ~(positive.any(-1) & negative.any(-1))}

def prompt_noise(seed, position, shape):
    """Noise of one prompt, drawn on the CPU: the same on every device, for any micro-batch and number of GPUs."""
    g = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + position) % 2**63)
    return torch.randn(shape, generator=g)

@torch.no_grad()
def pair_anchors(G, phi, pairs):
    """Features of the files of P offline pairs: per map, (positive (P, M, D), mask (P, M)), and for negative."""
    found = []
    for prompt, *sides in pairs:
        for files in sides:
            x = G.encode_images(rewards.load_pictures(files, G.picture_side).to(G.device))
            found.append(phi(x, rows(G.encode([prompt]), torch.zeros(len(x), dtype=torch.long, device=G.device))))
    out = []
    for maps in zip(*found):  # 2 P tensors (n, T, D): positive and negative in turn
        pad = nn.utils.rnn.pad_sequence([h.flatten(0, 1) for h in maps], batch_first=True)  # (2 P, M, D)
        count = torch.tensor([h.shape[0] * h.shape[1] for h in maps], device=pad.device)
        mask = torch.arange(pad.shape[1], device=pad.device) < count[:, None]  # (2 P, M)
        out.append([(pad[s::2], mask[s::2]) for s in (0, 1)])
    return out

# ===== 5. Checkpoints.

def save_checkpoint(folder, state):
    """checkpoint.pt, atomically, its sha256 behind it; the one before stays as checkpoint.previous.pt."""
    torch.save(state, buffer := io.BytesIO())
    data = buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
    write_atomic(Path(folder) / "checkpoint.pt", data, keep=Path(folder) / "checkpoint.previous.pt")

def load_checkpoint(folder):
    """The newest whole checkpoint of a run. Objects are never unpickled (weights_only)."""
    problems = []
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        try:
            data = (Path(folder) / name).read_bytes()
        except OSError as e:
            problems.append(f"{name}: {e.strerror}")
            continue
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            problems.append(f"{name}: torn or changed, its checksum differs; set aside as {name}.torn")
            os.replace(Path(folder) / name, Path(folder) / (name + ".torn"))  # never to be kept in place of a good one
            continue
        state = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        if problems:
            print(f"{folder}: {'; '.join(problems)}; going on from {name}, step {state['step']}", file=sys.stderr)
        return state
    raise UserError(f"{folder}: no checkpoint to go on from ({'; '.join(problems)})")

# ===== 6. A run.

# settings that --resume lets change without --change: they do not alter what an update computes
FREE = {"steps", "resume", "change", "out", "save_every", "preview_every", "log_every", "micro_batch", "device",
        "compile", "profile", "tensorboard", "reward_timeout", "watch", "watch_every", "lora_format"}

class Stop:
    """SIGINT and SIGTERM end the run after the step in hand; a second one ends it at once."""
    def __init__(self):
        self.signal = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

def check(cfg):
    """Settings that contradict each other or name nothing: one line, before anything is loaded or written."""
    for item in cfg.features.split(","):
        pick("feature", item.strip().partition("@")[0], FEATURES)
    pick("kernel", cfg.kernel, KERNELS)
    pick("field", cfg.field, FIELDS)
    least = dict.fromkeys("steps batch candidates anchors lora_rank save_every log_every watch_every".split(), 1)
    least |= dict.fromkeys("lr weight_decay lambda_ref eta clip lora_alpha warmup".split(), 0) | {"reward_timeout": 0.1}
    out, overlap = Path(cfg.out or HERE), not cfg.pairs and 2 * cfg.anchors > cfg.candidates
    for name, wrong, expected in (
            *((name, not low <= getattr(cfg, name) < math.inf, f"at least {low}") for name, low in least.items()),
            ("anchors", overlap, f"at most half of --candidates {cfg.candidates}: best and worst would overlap"),
            ("radii", not cfg.radii or not all(0 < r < math.inf for r in cfg.radii), "positive numbers, as 0.2,0.5,1"),
            ("micro_batch", not re.fullmatch("auto|0*[1-9][0-9]*", str(cfg.micro_batch)), "auto or a number of images"),
            ("device", not re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device), "auto, cpu, cuda or cuda:N"),
            ("device", "cuda" in cfg.device and not torch.cuda.is_available(), "cpu: torch sees no CUDA device here"),
            ("out", cfg.out and not cfg.resume and any((out / f).exists() for f in ("config.json", "metrics.jsonl")),
             f"a new folder: this one already holds a run (go on with it: --resume {out})"),
            ("tensorboard", cfg.tensorboard and not importlib.util.find_spec("tensorboard"), "pip install tensorboard"),
            ("out", out.is_file(), "a folder")):
        if wrong:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; expected {expected}")

def start(cfg):
    """Device, dtype, seeds, and under torchrun the process group: -> device, dtype, rank, number of ranks."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = cfg.device.startswith("cuda") or cfg.device == "auto" and torch.cuda.is_available()
    device = cfg.device if ":" in cfg.device else f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    random.seed(cfg.seed), np.random.seed(cfg.seed % 2**32), torch.manual_seed(cfg.seed)
    return device, DTYPES[cfg.dtype if cfg.dtype != "auto" else "bf16" if cuda else "fp32"], rank, world

def all_reduce_mean(tensors, world):
    """Average tensors over the ranks in place, by one all-reduce."""
    flat = nn.utils.parameters_to_vector(tensors)
    try:
        dist.all_reduce(flat)
    except RuntimeError as e:
        raise UserError(f"another rank of this run ended, so this one stops too ({str(e).splitlines()[0][:99]})") from e
    nn.utils.vector_to_parameters(flat / world, tensors)

def rng_state():
    """The generators that a reward of the user's may draw from, as plain data; drpo's noise has its own seeds."""
    name, words, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [name, words.tolist(), *rest]}

class Trainer:
    """All that a run holds: generator, features, reward, prompts, optimizer, and where it stands."""
    def __init__(self, cfg):
        check(cfg)
        self.cfg, (device, dtype, self.rank, self.world) = cfg, start(cfg)
        self.G = load_generator(cfg.model, device=device, dtype=dtype, random_init=cfg.random_init, compile=cfg.compile,
                                decoder=cfg.decoder)
        self.pairs = load_pairs(cfg.pairs, cfg.pairs_anywhere) if cfg.pairs else None
        self.prompts = [p[0] for p in self.pairs] if self.pairs else load_prompts(cfg.prompts)
        load, watch = (lambda spec: rewards.load(spec, device=device)), [w for w in cfg.watch.split(",") if w]
        self.scorer = None if self.pairs else Scorer(load(cfg.reward), [load(w) for w in watch], cfg.reward_timeout)
        self.phi = load_features(cfg.features, self.G, cfg.random_init)
        torch.manual_seed(cfg.seed)  # the LoRA's start depends on nothing that was drawn while loading
        self.params = self.G.train_all() if cfg.full else self.G.add_lora(cfg.lora_rank, cfg.lora_alpha)
        self.optimizer = torch.optim.AdamW(self.params, cfg.lr, weight_decay=cfg.weight_decay,
                                           fused=self.G.device.type == "cuda")
        most = max(cfg.candidates, 64) if cfg.micro_batch == "auto" else int(cfg.micro_batch)  # auto: memory will tell
        self.micro, self.trying = min(cfg.batch * cfg.candidates, most), cfg.micro_batch == "auto"
        self.step = self.position = self.bad = self.stopping = 0
        self.timer, self.metrics, self.stop, self.rng = Timer(self.G.device), [], Stop(), rng_state()

    def prompts_of_step(self):
        """(position, index) of this rank's next prompts: every epoch is a permutation of its own, positions count over
        all ranks, and both are functions of the seed alone."""
        n = len(self.prompts)
        for position in range(start := self.position + self.rank * self.cfg.batch, start + self.cfg.batch):
            g = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + position // n)
            yield position, int(torch.randperm(n, generator=g)[position % n])

    def gradient(self):
        """The gradient of the next step; where memory runs out the micro-batch is halved and the step begun again."""
        positions, index = zip(*self.prompts_of_step())
        size = self.cfg.candidates, *self.G.noise_shape
        noise = torch.stack([prompt_noise(self.cfg.seed, p, size).to(self.G.device) for p in positions])
        while True:
            self.optimizer.zero_grad()
            try:  # the first update is not compiled: for each size that does not fit that would take minutes
                with self.G.eager() if self.trying else contextlib.nullcontext():
                    pairs = pair_anchors(self.G, self.phi, [self.pairs[i] for i in index]) if self.pairs else None
                    return drpo_gradient(self.G, self.phi, [self.prompts[i] for i in index], noise, self.cfg,
                                         self.micro, score=self.scorer, pairs=pairs, timer=self.timer)
            except torch.OutOfMemoryError:
                if self.micro == 1:
                    raise UserError("out of GPU memory at --micro-batch 1; try a smaller reward") from None
            self.micro = -(-self.micro // 2)  # outside of except: the exception holds the memory
            print(f"out of GPU memory: going on with --micro-batch {self.micro}", file=sys.stderr)
            self.scorer and self.scorer.reset()
            self.timer.marks = []
            torch.cuda.empty_cache()

    def train_step(self):
        """One update; returns its line of metrics. A gradient that is not finite changes nothing and is counted."""
        cfg, began, cuda, self.rng = self.cfg, time.perf_counter(), self.G.device.type == "cuda", rng_state()
        if self.scorer:
            self.scorer.watching = self.step % cfg.watch_every == 0 or self.step == cfg.steps - 1
        metrics = self.gradient()
        with self.timer("optimizer"):
            grads = [p.grad for p in self.params if p.grad is not None]
            torch._foreach_div_(grads, self.G.loss_scale)
            if self.world > 1:
                stopping = grads[0].new_tensor([float(self.stop.signal)])  # all ranks stop after the same step
                all_reduce_mean([*grads, stopping], self.world)
            self.stopping = self.stop.signal if self.world == 1 else math.ceil(stopping.item()) and signal.SIGTERM
            norm = float(nn.utils.clip_grad_norm_(self.params, cfg.clip))
            for group in self.optimizer.param_groups:
                group["lr"] = cfg.lr * min(1, (self.step + 1) / max(1, cfg.warmup)) * (
                    0.5 + 0.5 * math.cos(math.pi * self.step / cfg.steps) if cfg.lr_schedule == "cosine" else 1)
            if math.isfinite(norm):
                self.optimizer.step()
        self.rng = rng_state()
        if not math.isfinite(norm) and self.G.loss_scale > 1:  # fp16: most likely the scale, not the step
            self.G.loss_scale /= 2
        else:
            self.bad = 0 if math.isfinite(norm) else self.bad + 1
        self.step, self.position, self.trying = self.step + 1, self.position + cfg.batch * self.world, False
        phases, seconds = self.timer.seconds(), time.perf_counter() - began
        return {"step": self.step, "seconds": seconds,
                "images_per_second": cfg.batch * cfg.candidates * self.world / seconds, **metrics, "grad_norm": norm,
                "lr": group["lr"], "applied": math.isfinite(norm), **{f"seconds_{k}": v for k, v in phases.items()},
                **({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})}

    def state(self):
        """All that a checkpoint holds: plain numbers, strings and tensors."""
        return {"step": self.step, "position": self.position, "loss_scale": self.G.loss_scale, "rng": self.rng,
                "config": settings(self.cfg), "weights": [p.detach().cpu() for p in self.params],
                "optimizer": self.optimizer.state_dict()}

    def restore(self, state):
        """Go on from a checkpoint's state; settings that differ from its own are refused by name."""
        old, new = state["config"], settings(self.cfg)
        changed = [k for k in new if k not in FREE and old.get(k) != new[k]]
        if changed and not self.cfg.change:
            raise UserError("; ".join(f"--{k.replace('_', '-')} was {old.get(k)} and is {new[k]} now" for k in changed)
                            + ": leave it as it was in this run, or add --change to go on with it on purpose")
        self.step, self.position, self.G.loss_scale = state["step"], state["position"], state["loss_scale"]
        for p, w in zip(self.params, state["weights"]):
            p.data.copy_(w)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"]["torch"])
        np.random.set_state(tuple(state["rng"]["numpy"]))
        random.setstate(tuple(tuple(v) if isinstance(v, list) else v for v in state["rng"]["python"]))

    def save(self, out):
        """The checkpoint for --resume, and the weights in the formats that others load."""
        save_checkpoint(out, self.state())
        if self.cfg.full:
            self.G.unet.save_pretrained(out / "unet")
        else:
            self.G.save_lora(out, self.cfg.lora_format, {"settings": json.dumps(settings(self.cfg))})

def read_run(folder):
    """config.json of a run as a dict."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: no run ({path.name} is missing or no JSON: {e})") from e

def settings(cfg):
    """Config as plain data, for JSON and checkpoints."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(cfg).items()}

def open_run(T):
    """The run's folder, and a function that appends a step's metrics to its metrics.jsonl. A new run gets config.json
    and a first checkpoint; a resumed one loses the lines that came after its checkpoint."""
    cfg = T.cfg
    name = f"{Path(cfg.model).name}-{'pairs' if cfg.pairs else Path(cfg.reward.partition(':')[0]).stem}"
    out = Path(cfg.resume or cfg.out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        T.fresh = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from e
    path = out / "metrics.jsonl"
    board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(out) if cfg.tensorboard else None
    if cfg.resume and path.exists():
        T.metrics = [json.loads(line) for line in path.read_text().splitlines()[:T.step]]
        write_atomic(path, "".join(json.dumps(m) + "\n" for m in T.metrics).encode())
    versions = {name: sys.modules[name].__version__ for name in ("torch", "diffusers", "transformers")}
    ask = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    git = shutil.which("git") and subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    config = {**settings(cfg), "versions": versions, "git": git or None, "command": sys.argv}
    write_atomic(out / "config.json", json.dumps(config, indent=1).encode())
    if not cfg.resume:
        T.save(out)

    def log(m):
        m = json.loads(json.dumps(m), parse_constant=lambda name: None)  # JSON has no NaN
        T.metrics.append(m)
        try:
            with open(path, "a") as f:
                f.write(json.dumps(m) + "\n")
        except OSError as e:
            raise UserError(f"{path} could not be written ({e.strerror}); the last checkpoint is intact") from e
        for key in m if board else ():
            if isinstance(m[key], (int, float)):
                board.add_scalar(key, m[key], m["step"])

    return out, log

def train(cfg):
    """Run DrPO with these settings -> path of the run's folder."""
    T = Trainer(cfg)
    if cfg.resume:
        T.restore(load_checkpoint(cfg.resume))
    if cfg.profile:
        return profile(T)
    lead, first, began = T.rank == 0, T.step, time.perf_counter()
    if lead:
        describe(T)
        out, log = open_run(T)
        if cfg.preview_every and not cfg.resume:
            preview(T, out)
    bar = tqdm(total=cfg.steps, initial=T.step, disable=not (lead and sys.stderr.isatty()), unit="step")
    while T.step < cfg.steps and not T.stopping and T.bad < 3:
        try:
            m = T.train_step()
        except UserError as e:
            if lead and T.step == 0 and T.fresh:
                shutil.rmtree(out)  # nothing came of it: leave nothing behind
            saved = lead and T.step > first and not T.save(out)
            raise UserError(f"step {T.step + 1}: {e}" + (f" (go on with --resume {out})" if saved else "")) from e
        if lead:
            log(m)
            if T.step % cfg.log_every == 0 or T.step in (first + 1, cfg.steps):
                left = (time.perf_counter() - began) / (T.step - first) * (cfg.steps - T.step)
                tqdm.write(figures_line(m, cfg, left))
            bar.update()
            last = T.step == cfg.steps or T.stopping or T.bad == 3
            if T.step % cfg.save_every == 0 or last:
                T.save(out)
            if cfg.preview_every and (T.step % cfg.preview_every == 0 or last):
                preview(T, out)
    bar.close()
    if T.bad == 3:
        raise UserError(f"step {T.step}: loss or gradient not finite three times in a row; none of them was applied. "
                        f"Try a lower --lr or --dtype bf16 with --resume and --change")
    if T.stopping:
        if lead:
            print(f"stopped after step {T.step}; go on with: python drpo.py --resume {out}", file=sys.stderr)
        sys.exit(128 + T.stopping)
    if lead:
        print(f"done: {out}\nlook at {out}/samples and {out}/curve.png; compare with the base: python eval.py {out}")
        return out

def save_pipeline(pipe, out):
    """pipe.save_pretrained, readable by transformers 4 too: 5 leaves out the tokenizer's vocab.json and merges.txt and
    a prefix of the text encoder's names, without which 4 draws random weights and says nothing."""
    from safetensors.torch import load_file, save_file
    pipe.save_pretrained(out)
    for name in ("tokenizer", "tokenizer_2"):
        if hasattr(pipe, name) and not (Path(out) / name / "vocab.json").exists():
            getattr(pipe, name).backend_tokenizer.model.save(str(Path(out) / name))
    file = Path(out) / "text_encoder" / "model.safetensors"
    if "embeddings.token_embedding.weight" in (weights := load_file(file)):
        save_file({f"text_model.{name}": weight for name, weight in weights.items()}, file, {"format": "pt"})

def merge(run, out):
    """Write the base of a run with its LoRA folded in as a whole diffusers pipeline."""
    saved = read_run(run)
    if Path(out).exists():
        raise UserError(f"{out} exists already; name another folder")
    G = load_generator(saved["model"], random_init=saved["random_init"])
    if saved["full"]:
        G.pipe.unet = type(G.unet).from_pretrained(Path(run) / "unet")
    else:
        G.load_lora(run)
        G.remove_lora(merge=True)
    save_pipeline(G.pipe, out)
    print(f"wrote {out}: DiffusionPipeline.from_pretrained('{out}') loads it")

# ===== 7. The command line, made from Config.

def parse(argv):
    """Command line -> Config: what is given, else the model's preset, else the default; with --resume the run's."""
    parser = argparse.ArgumentParser(prog="drpo.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text):
        return tuple(float(x) for x in text.split(","))

    def fail(message):
        raise UserError(f"{message} (python drpo.py --help lists the settings)")

    parser.error = fail

    for f in fields(Config):
        kw = dict(action="store_true") if f.type is bool else dict(type=numbers if f.type is tuple else f.type)
        kw |= dict(f.metadata, default=argparse.SUPPRESS, help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%"))
        parser.add_argument("--" + f.name.replace("_", "-"), **kw)
    parser.add_argument("--merge", nargs=2, metavar=("RUN", "OUT"), help="write a pipeline with the LoRA folded in")
    given = vars(parser.parse_args(argv))
    if run_and_out := given.pop("merge"):
        return run_and_out
    if "resume" not in given:
        no_download = dict(reward="pickscore@random", prompts="animals") if given.get("random_init") else {}
        return Config(**PRESETS[layout(given.get("model", Config.model))] | no_download | given)
    saved = read_run(given["resume"])
    saved = {f.name: f.type(saved[f.name]) for f in fields(Config) if f.name in saved}
    return Config(**saved | {"change": False} | given)

def main(argv=None):
    """python drpo.py ...: what the user can mend ends with one line and exit code 2."""
    try:
        todo = parse(sys.argv[1:] if argv is None else argv)
        train(todo) if isinstance(todo, Config) else merge(*todo)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
