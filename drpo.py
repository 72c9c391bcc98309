"""Drifting Preference Optimization (DrPO, arXiv 2606.02521) of one-step text-to-image generators.

    python drpo.py --model toy                                        a laptop, some minutes
    python drpo.py --model sd-turbo --reward pickscore --watch clip   one CUDA GPU
    python drpo.py --model sdxl-turbo --reward my_file.py:my_reward   any black box as the reward

A one-step generator G_theta maps noise e and a prompt c to a picture in one forward pass. For each
prompt K candidates are sampled, and a reward S RANKS them: neither its gradient nor its scale is
used. With frozen features phi and the frozen base G_ref,

    z_i = phi(G_theta(e_i, c)),  r_i = phi(G_ref(e_i, c)),  i = 1..K, the SAME noise e_i
    A+, A- = features of the m candidates that S likes best, worst

    E(z)     = sum_j [ k(z, a_j+) - k(z, a_j-) ]      dipole reward, kernel k     `dipole_energy`
    V_pref   = grad_z E(z)                            preference field            `dipole_field`
    V_ref    = mu_R(z) - mu_Z(z)                      drift toward the base       `reference_drift`
    z*       = sg[ z + eta (V_pref + lambda V_ref) ]  detached target             `dipole_target`
    L(theta) = 1/(2K) sum_i || z_i - z_i* ||^2        regression                  `regression_loss`

mu_B(z) = sum_b k(z, b) b / sum_b k(z, b): the mean of a set B as seen from z; sg: no gradient.

Symbols: P prompts of an update, K candidates of a prompt, m anchors of each sign; z, r features of
the candidates, of the base's; a anchors; T vectors a picture (a map may have one a patch), N = K T
of a prompt, M of its anchors, D features; k kernel, d distance, s mean distance (the unit of
length), tau = radius s bandwidth; V field, u = s / sqrt(D) its unit, eta step of the target, lambda
weight of the drift; e noise, x latents, t timestep, abar the noise schedule.

1 the field (needs torch alone), 2 features, 3 the generator, 4 one update, 5 a run.
"""
import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import rewards
from rewards import UserError, one_line, pick


def setting(default, help, least=None, choices=None):
    """One setting: its default, its line in --help, and the least or the only values it takes."""
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


@dataclass
class Config:
    """Every setting, with its default and unit. The command line is made from this class."""
    model: str = setting("toy", "toy, sd-turbo, sdxl-turbo, a diffusers folder, or a hub id")
    unet: str = setting("", "weights in place of the base's UNet: a file, or owner/repo/file")
    timestep: int = setting(-1, "t of the one step; -1 = the last training step")
    prediction: str = setting("", "what the UNet predicts: epsilon, v_prediction, sample")
    reward: str = setting("scene", "a name of `rewards.py list`, a=1,b=.5, file.py:function, a URL")
    watch: str = setting("", "rewards that are logged, never ranked on: they show reward hacking")
    watch_every: int = setting(10, "steps between two scorings by the watched rewards", 1)
    prompts: str = setting("scenes", "a file (lines, JSON, CSV); scenes, animals, pickapic")
    pairs: str = setting("", "in place of --reward: a .jsonl with prompt, chosen, rejected")
    steps: int = setting(140, "updates", 1)
    batch: int = setting(8, "prompts an update on each GPU (P)", 1)
    candidates: int = setting(24, "pictures a prompt (K)", 1)
    anchors: int = setting(8, "best and worst taken as anchors (m), at most half of K", 1)
    features: str = setting("vae", "phi: latent-mae, vae, unet, mae, dino, or several; name@path")
    field: str = setting("dipole", "dipole: the paper's equations; released: the authors' code")
    kernel: str = setting("laplacian", "kernel k(z, a): laplacian, rbf (the toy's), cosine")
    radii: tuple = setting((0.2, 0.5, 1.0), "bandwidths tau / s, comma-separated")
    lambda_ref: float = setting(0.2, "weight of the drift toward the frozen base (lambda)", 0)
    eta: float = setting(1.0, "step of the target, z* = z + eta V", 0)
    lr: float = setting(2e-3, "learning rate of AdamW, constant", 0)
    weight_decay: float = setting(0.01, "of AdamW", 0)
    clip: float = setting(1.0, "largest norm of the gradient", 1e-9)
    lora_rank: int = setting(16, "rank of the LoRA", 1)
    lora_alpha: float = setting(16.0, "alpha of the LoRA: W + alpha / rank up down", 0)
    micro_batch: str = setting("auto", "pictures at once; auto: as many as the memory allows")
    dtype: str = setting("auto", "auto = bf16 on CUDA", None, ("auto", "bf16", "fp16", "fp32"))
    device: str = setting("auto", "cuda, cuda:1, cpu, mps; auto = cuda where there is one")
    compile: bool = setting(False, "torch.compile the networks: faster, minutes to start")
    seed: int = setting(0, "of noise, order of prompts and LoRA", 0)
    out: str = setting("", "folder of the run; default runs/MODEL-REWARD-DATE")
    resume: str = setting("", "folder of a run to go on with; settings given replace its own")
    save_every: int = setting(50, "steps between two checkpoints", 1)
    preview_every: int = setting(50, "steps between two preview grids; 0 = none", 0)
    log_every: int = setting(10, "steps between two lines of figures", 1)

    @classmethod
    def preset(cls, name, **changes):
        """The recipe of a model with changes, `Config.preset("sd-turbo", lr=5e-5)`."""
        return cls(**{"model": name, **PRESETS[name], **changes})


# The authors' recipes on one GPU; theirs ran on 4 and on 4 to 8. Source: arXiv 2606.02521 and the
# scripts of github.com/UGVly/DrPO.
AUTHORS = dict(reward="pickscore", prompts="pickapic", field="released", radii=(0.02, 0.05, 0.2))
PRESETS = {
    "toy": dict(kernel="rbf"),  # right as often as with laplacian, and more diverse
    "sd-turbo": dict(AUTHORS, steps=1000, features="latent-mae", lr=1e-4),  # P, K, m: defaults
    "sdxl-turbo": dict(AUTHORS, steps=5000, candidates=16, features="unet", lr=1e-5,
                       lambda_ref=0.25)}
MODELS = {"toy": str(Path(__file__).resolve().parent / "lab" / "toy"),
          "sd-turbo": "stabilityai/sd-turbo", "sdxl-turbo": "stabilityai/sdxl-turbo"}
# without inductor's layout pass, which on a CPU lost 38% of a tiny UNet's gradient (torch 2.13)
COMPILE = dict(dynamic=False, options={"layout_optimization": False})
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    """E(z) = sum_j [k(z, a_j+) - k(z, a_j-)], the paper's dipole reward.

    z (N, D); positive, negative (M+, D), (M-, D); radius = tau / s -> (N,)."""
    z, a = z.float(), torch.cat([positive, negative]).float()  # (N, D), (M, D), M = M+ + M-
    d = distances(z, a)  # (N, M)
    k = log_kernel(z, a, d, radius, mean_distance(d), kernel).exp()  # (N, M)
    return k[:, :len(positive)].sum(1) - k[:, len(positive):].sum(1)


@torch.enable_grad()
def dipole_field(z, positive, negative, *, radii, kernel, return_rms=False):
    """V_pref(z) = grad_z E(z): toward the best and away from the worst, most strongly near them.

    z (N, D); positive, negative (M, D), any dtype -> (N, D), float32: the gradient for each radius
    scaled to unit RMS, and summed. return_rms: also the RMS before that, (R,), which the loss
    cannot show. An anchor at distance 0, the sample itself, exerts no force."""
    z = z.detach().float().requires_grad_()
    a = torch.cat([positive, negative]).float()  # (M, D), M = M+ + M-
    sign = torch.ones(len(a), device=z.device)  # (M,)
    sign[len(positive):] = -1
    d = distances(z, a)  # (N, M)
    s = mean_distance(d)
    total = torch.zeros_like(z)
    sizes = z.new_zeros(len(radii))
    for n, radius in enumerate(radii):
        if len(a) == 0:
            break
        log_k = log_kernel(z, a, d, radius, s, kernel).masked_fill(d == 0, -torch.inf)  # (N, M)
        largest = log_k.max().clamp(min=-1e30).detach()  # taken out of E: small radii underflow
        E = (sign * (log_k - largest).exp()).sum()  # sum_i E(z_i) / exp(largest)
        V, = torch.autograd.grad(E, z, retain_graph=True)  # (N, D)
        V, rms = unit_rms(V)
        total += V
        sizes[n] = rms * largest.exp()
    return (total, sizes) if return_rms else total


@torch.no_grad()
def reference_drift(z, reference, *, radii, kernel, return_rms=False):
    """V_ref(z) = mu_R(z) - mu_Z(z), the mean-shift estimate of grad log p_ref - grad log p_theta.

    z (N, D), reference (M, D) -> (N, D), as in `dipole_field` unit RMS for each radius, summed.
    In mu_Z a sample never counts itself."""
    z, r = z.float(), reference.float()
    d_z, d_r = distances(z, z), distances(z, r)  # (N, N), (N, M)
    s = mean_distance(torch.cat([d_z, d_r], 1))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    origin = z.mean(0)  # V does not depend on it, its rounding error does
    total = torch.zeros_like(z)
    sizes = z.new_zeros(len(radii))
    for n, radius in enumerate(radii):
        w_r = log_kernel(z, r, d_r, radius, s, kernel).softmax(1)  # (N, M), rows sum to 1
        w_z = log_kernel(z, z, d_z, radius, s, kernel).masked_fill(itself, -torch.inf).softmax(1)
        w_z = w_z.nan_to_num(0)  # a lone sample has no others to be repelled by
        V, sizes[n] = unit_rms(w_r @ (r - origin) - w_z @ (z - origin))  # mu_R - mu_Z: (N, D)
        total += V
    return (total, sizes) if return_rms else total


@torch.no_grad()
def released_field(z, positive, negative, *, radii, kernel, negative_is_self=False):
    """The force of the authors' released code, by which the published figures were obtained.

    z (N, D); positive, negative (M, D). Preference: anchors are the best and the worst. Reference:
    positives are the base's, negatives are z itself (negative_is_self). Returns the force (N, D) in
    units of s / sqrt(D), and s. The constants are theirs."""
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


def rank(scores, m):
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
    lowest_positive = scores[positive].min()
    highest_negative = scores[negative].max()
    if lowest_positive == highest_negative:
        tied = scores == lowest_positive
        if lowest_positive < opinions.max():
            positive &= ~tied
        if highest_negative > opinions.min():
            negative &= ~tied
    return positive, negative


def dipole_target(z, z_ref, positive, negative, cfg):
    """z* = z + eta u (V_pref + lambda V_ref), and L = 1/(2 N D) sum ||(z - z*) / u||^2.

    z, z_ref (N, D); positive, negative (M, D). Returns a list of terms (z* (N, D), weight), where
    the loss is the sum of weight ||z - z*||^2, and {"rms_pref", "rms_ref"}: (R,). In the unit
    u = s / sqrt(D) feature maps of any scale and size weigh alike."""
    N, D = z.shape
    kw = dict(radii=cfg.radii, kernel=cfg.kernel, return_rms=True)
    V_pref, rms_pref = dipole_field(z, positive, negative, **kw)  # (N, D)
    V_ref, rms_ref = reference_drift(z, z_ref, **kw)  # (N, D)
    u = mean_distance(distances(z, z)) / D ** 0.5
    z_star = z + cfg.eta * u * (V_pref + cfg.lambda_ref * V_ref)
    return [(z_star, 0.5 / (N * D * u ** 2))], {"rms_pref": rms_pref, "rms_ref": rms_ref}


def released_target(z, z_ref, positive, negative, cfg):
    """The authors' two terms, each L = 1/(N D) sum ||(z - z*) / u||^2 in the unit of its own force.

    Arguments and results as in `dipole_target`; the second term has weight lambda."""
    N, D = z.shape
    kw = dict(radii=cfg.radii, kernel=cfg.kernel)
    preference = released_field(z, positive, negative, **kw)
    reference = released_field(z, z_ref, z, negative_is_self=True, **kw)
    terms = []
    for weight, (force, s) in ((1.0, preference), (cfg.lambda_ref, reference)):
        u = s / D ** 0.5
        terms.append((z + cfg.eta * u * force, weight / (N * D * u ** 2)))
    return terms, {}


FIELDS = {"dipole": dipole_target, "released": released_target}  # a new one: add it here


def regression_loss(z, terms):
    """sum over the terms of weight ||z - sg(z*)||^2: z (N, D) -> scalar."""
    return sum(weight * (z - z_star.detach()).square().sum() for z_star, weight in terms)


# ===== 2. Features phi: frozen networks in which a direction means something. Each takes latents
# x (B, 4, h, w) and the condition of B prompts, and returns a list of maps (B, T, D) in float32.
# Pooled, translation-invariant statistics serve; raw latents do not.

def mean_std(h, patch=None):
    """Mean and std, sqrt(var + 1e-6), over patches of h (B, C, H, W) or all: 2 x (B, T, C)."""
    height, width = (patch, patch) if patch else h.shape[-2:]
    h = F.unfold(h.float(), (height, width), stride=(height, width))  # (B, C height width, T)
    h = h.unflatten(1, (-1, height * width)).permute(0, 3, 1, 2)  # (B, T, C, height width)
    return h.mean(-1), (h.var(-1, correction=0) + 1e-6).sqrt()


def vae_features(G, path=None):
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
        for block in range(99):
            name = f"stages_{stage}.layers_{block}"
            if f"{name}.conv1.weight" not in w:
                break
            stride = 2 if stage > 0 and block == 0 else 1
            y = F.relu(norm(f"{name}.gn1", conv(f"{name}.conv1", h, stride)))
            y = norm(f"{name}.gn2", conv(f"{name}.conv2", y))
            if f"{name}.proj_conv.weight" in w:
                h = norm(f"{name}.proj_gn", conv(f"{name}.proj_conv", h, stride))
            h = F.relu(h + y)
        h = norm(f"layer{stage + 1}_norm", h)
    return h


def latent_mae(G, path=None):
    """`latent-mae`: mean and std of the encoder's last stage over all, over 2 x 2 and over 4 x 4
    patches: six maps, the authors' choice for SD-Turbo.

    fp16 also where the rest is bf16: after 16 blocks of ReLU the gradient of bf16 has a cosine of
    0.945 to that of float32, of fp16 0.993 (random weights)."""
    dtype = torch.float32 if G.dtype == torch.float32 else torch.float16
    w = rewards.read_latent_mae(path, mae_encoder)
    w = {name: weight.to(G.device, dtype) for name, weight in w.items()}
    encode = torch.compile(mae_encoder, **COMPILE) if G.compile else mae_encoder

    def phi(x, condition):
        h = scaled_backward(lambda x: encode(w, x.to(dtype)), x)  # (B, C, h/8, w/8)
        maps = [*mean_std(h)]
        for patch in (2, 4):
            if h.shape[-1] > patch:
                maps += mean_std(h, patch)
        return maps

    return phi


def scaled_backward(net, x):
    """net(x) in float32; on the way back the largest entry is 1: fp16 loses small ones."""
    x = x.float().view_as(x)  # a view: the hook sees this path alone
    h = net(x).float()
    scale = []

    def to_one(gradient):
        scale.append(gradient.abs().amax().clamp(min=1e-30))
        return gradient / scale[0]

    if h.requires_grad:
        h.register_hook(to_one)
        x.register_hook(lambda gradient: gradient * scale.pop())
    return h


def unet_features(G, path=None):
    """`unet`: the frozen base UNet at t = 100 on latents with noise 0.1, given the prompt, the
    authors' choice for SDXL-Turbo: down_blocks[2], mid_block and up_blocks[0], 4 x 4 average-pooled
    and flattened: three maps. Their noise is drawn anew each time; here phi is a function."""
    noise = prompt_noise(0, 0, G.noise_shape).to(G.device)
    down = G.unet.down_blocks
    blocks = (down[min(2, len(down) - 1)], G.unet.mid_block, G.unet.up_blocks[0])

    def phi(x, condition):
        hidden = []

        def keep(module, args, out):
            hidden.append(out[0] if isinstance(out, tuple) else out)
            if len(hidden) == len(blocks):
                raise StopIteration  # no later layer is needed

        with contextlib.ExitStack() as hooks, G.reference(), contextlib.suppress(StopIteration):
            for block in blocks:
                hooks.callback(block.register_forward_hook(keep).remove)
            t = torch.tensor(100, device=x.device)
            G.predict(x + 0.1 * noise, t, condition, G.unet.forward)  # the method: never compiled
        return [F.avg_pool2d(h.float(), min(4, h.shape[-1])).flatten(1)[:, None] for h in hidden]

    return phi


def vit_features(repo, class_name, G, path=None):
    """`mae`, `dino`: a vision transformer on the decoded picture, 224 x 224: of hidden_states[12]
    the mean and the std over the patches, and the class token: three maps."""
    net = rewards.load_transformer(class_name, path or repo).to(G.device, G.dtype)
    net.config.mask_ratio = 0.0
    patches = (224 // net.config.patch_size) ** 2
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=G.device)

    def phi(x, condition):
        pictures = F.interpolate(G.decode(x), (224, 224), mode="bicubic", antialias=True)
        pictures = (pictures - mean[:, None, None]) / std[:, None, None]  # (B, 3, 224, 224)
        order = {}
        if class_name == "ViTMAEModel":  # shuffles its patches even in eval mode: sorted noise
            order["noise"] = torch.arange(patches, device=x.device).expand(len(x), -1)
        states = net(pictures.to(G.dtype), output_hidden_states=True, **order).hidden_states
        h = states[min(12, len(states) - 1)].float()  # (B, 1 + patches, D), class token first
        return [*mean_std(h[:, 1:].mT[..., None]), h[:, :1]]

    return phi


FEATURES = {  # name: factory(G, path or None) -> phi. A new one: add it here
    "latent-mae": latent_mae, "vae": vae_features, "unet": unet_features,
    "mae": partial(vit_features, "facebook/vit-mae-base", "ViTMAEModel"),  # CC-BY-NC-4.0
    "dino": partial(vit_features, "facebook/dinov2-base", "Dinov2Model")}  # Apache-2.0


def load_features(spec, G):
    """'vae' or 'latent-mae@file,vae' -> phi(x (B, 4, h, w), condition) -> list of (B, T, D)."""
    parts = []
    for item in spec.split(","):
        name, _, path = item.strip().partition("@")
        parts.append(pick("feature", name, FEATURES)(G, path or None))

    def phi(x, condition):
        maps = []
        for part in parts:
            maps += part(x, condition)
        return maps

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


class Generator:
    """A one-step generator in diffusers' SD or SDXL layout, frozen but for its LoRA.

        x = (k e - sqrt(1 - abar_t) eps_theta(k e, t, c)) / sqrt(abar_t)

    with k = 1, but for Euler schedulers, which begin at sigma instead of sqrt(sigma^2 + 1).
    encode(prompts) -> condition, sample(noise, condition) -> latents, decode(latents) -> pictures,
    reference(): context of the frozen base; add_lora, save_lora, load_lora."""

    def __init__(self, pipe, *, device="cpu", dtype=torch.float32, timestep=Config.timestep,
                 prediction=Config.prediction):
        self.pipe, self.unet, self.vae = pipe, pipe.unet, pipe.vae
        self.xl = hasattr(pipe, "text_encoder_2")
        self.device, self.dtype = torch.device(device), dtype
        self.name, self.compile, self.switch, self.lora = "", False, {"on": True}, {}
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
        if self.device.type == "cuda":  # the layout in which tensor cores convolve
            self.vae.decoder.to(memory_format=torch.channels_last)
            for module in self.vae.decoder.modules():
                if type(module) is nn.GroupNorm:
                    module.__class__ = ChannelsLastGroupNorm
        self.scaler = torch.amp.GradScaler(self.device.type, 2.0 ** 14, enabled=half)
        self.schedule(pipe.scheduler, timestep, prediction)
        side = self.unet.config.sample_size
        self.noise_shape = (4, side, side)
        self.picture_side = side * pipe.vae_scale_factor

    def schedule(self, scheduler, timestep, prediction):
        """t, abar, k and what is predicted; the scheduler decides nothing else in silence."""
        steps = len(scheduler.alphas_cumprod)
        if not -1 <= timestep < steps:
            raise UserError(f"--timestep is {timestep}; expected -1 (last), or 0 to {steps - 1}")
        t = timestep % steps
        self.t, self.abar = torch.tensor(t, device=self.device), float(scheduler.alphas_cumprod[t])
        spacing = scheduler.config.get("timestep_spacing")
        euler = "Euler" in type(scheduler).__name__ and spacing in ("trailing", "linspace")
        self.k = math.sqrt(1 - self.abar) if euler else 1.0
        self.prediction = pick("prediction", prediction or scheduler.config.get("prediction_type"),
                               ("epsilon", "v_prediction", "sample"))
        rewards.say_other_start(scheduler, t)

    def compile_all(self):
        """--compile: the UNet, the decoder, and from here on the features that ask for it."""
        self.compile = True
        torch._dynamo.config.suppress_errors = True  # what fails goes on eagerly
        self.unet.compile(**COMPILE)
        self.vae.decoder.compile(**COMPILE)

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

    def predict(self, x, t, condition, unet=None):
        """The network's raw output: x (B, 4, h, w), condition of B rows -> (B, 4, h, w) float32."""
        added = None
        if self.xl:
            added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
        return (unet or self.unet)(x.to(self.dtype), t, condition["text"], added_cond_kwargs=added,
                                   return_dict=False)[0].float()

    def sample(self, noise, condition):
        """x = G(e, c): noise e (B, 4, h, w) ~ N(0, 1) -> latents x (B, 4, h, w), float32."""
        e = self.k * noise.float()
        out = self.predict(e, self.t, condition)
        if self.prediction == "epsilon":
            return (e - math.sqrt(1 - self.abar) * out) / math.sqrt(self.abar)
        if self.prediction == "v_prediction":
            return math.sqrt(self.abar) * e - math.sqrt(1 - self.abar) * out
        return out  # "sample": the network predicts x itself

    def decode(self, latents):
        """Latents (B, 4, h, w) -> pictures (B, 3, H, W) in [0, 1], float32; at most 8 at once."""
        x = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        pictures = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in x.split(8)])
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    @contextlib.contextmanager
    def reference(self):
        """Inside it the generator is the frozen base G_ref."""
        before, self.switch["on"] = self.switch["on"], False
        try:
            yield
        finally:
            self.switch["on"] = before

    def attention_layers(self):
        """{name: nn.Linear} of the layers that the LoRA is added to."""
        return {name: getattr(module, "base", module)
                for name, module in self.unet.named_modules() if name.endswith(LORA_TARGETS)}

    def add_lora(self, rank, alpha):
        """A fresh LoRA, which changes nothing; returns the parameters that train."""
        self.set_lora({name: LoRA(base, rank, alpha, self.switch)
                       for name, base in self.attention_layers().items()})
        return self.parameters()

    def set_lora(self, layers):
        """Put {name: LoRA} in the place of those that are there; {} takes the LoRA out."""
        for name, base in self.attention_layers().items():
            self.unet.set_submodule(name, layers.get(name, base))
        self.lora = layers

    def parameters(self):
        """What trains."""
        return [p for layer in self.lora.values() for p in (layer.down, layer.up)]

    def save_lora(self, folder, **metadata):
        """Write the LoRA for diffusers (pipe.load_lora_weights) and for A1111, ComfyUI, Forge."""
        layers = {name: (layer.down.detach().cpu(), layer.up.detach().cpu(), float(layer.alpha))
                  for name, layer in self.lora.items()}
        metadata["base_model"] = self.name
        if not self.xl and self.unet.config.cross_attention_dim == 1024:  # SD 2; for A1111
            metadata["ss_v2"] = "True"
        rewards.write_lora(folder, layers, self.xl, metadata)

    def load_lora(self, path):
        """Load a LoRA, ours or another's, from a folder or a file, whole -> the file's metadata."""
        known, layers = self.attention_layers(), {}
        metadata, found = rewards.read_lora(path, known, self.xl, self.name)
        for name in filter(found.get, known):  # in the order of the network, not of the file
            down, up, alpha = found[name]
            layers[name] = LoRA(known[name], len(down), alpha, self.switch)
            layers[name].down.data.copy_(down)
            layers[name].up.data.copy_(up)
        self.set_lora(layers)
        return metadata


def layout(name_or_path):
    """The preset that fits a model: its own name, or sd-turbo / sdxl-turbo by its pipeline."""
    if name_or_path in PRESETS:
        return name_or_path
    return "sdxl-turbo" if rewards.is_xl(rewards.model_index(name_or_path, MODELS)) else "sd-turbo"


def load_generator(name_or_path, *, device="cpu", dtype=torch.float32, unet=Config.unet,
                   timestep=Config.timestep, prediction=Config.prediction):
    """toy, sd-turbo, sdxl-turbo, a diffusers folder or a hub id -> Generator without a LoRA.

    unet, timestep, prediction as in `Config`. UserError: what cannot be had or read whole."""
    path = MODELS.get(name_or_path, name_or_path)
    pipe = rewards.load_pipeline(str(path), rewards.model_index(path, MODELS), dtype)
    if unet:
        rewards.replace_unet(pipe.unet, unet)
    G = Generator(pipe, device=device, dtype=dtype, timestep=timestep, prediction=prediction)
    G.name = str(name_or_path)
    return G


# ===== 4. One update: (A) candidates, (B) targets, (C) the gradient carried back to the LoRA.
# A field needs the candidates of its prompt alone: as many whole prompts as fit go through at once.
# A larger prompt goes chunk by chunk, and (C) samples it once more. The gradient is the same.

PHASES = {}  # seconds of each phase of the update in hand


@contextlib.contextmanager
def phase(name):
    """Times what happens inside; waits for the GPU, else the next phase would be billed for it."""
    began = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    key = f"seconds_{name}"
    PHASES[key] = PHASES.get(key, 0.0) + time.perf_counter() - began


def prompt_noise(seed, position, shape):
    """Noise of one prompt, drawn on the CPU: the same on every device, for any micro-batch."""
    g = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + position) % 2 ** 63)
    return torch.randn(shape, generator=g)


def rows(condition, index):
    """The rows `index` of a condition, a dict of tensors."""
    return {name: value[index] for name, value in condition.items()}


@dataclass
class Batch:
    """The P prompts of an update, what the generator is given for them, and how they are judged."""
    prompts: list  # P strings
    condition: dict  # tensors of P rows
    noise: torch.Tensor  # (P, K, 4, h, w)
    pairs: list = None  # offline: for each prompt and map its chosen and rejected (M, T, D)
    watch: bool = False  # the watched rewards score it too


@dataclass
class Candidates:
    """What (A) finds of n = P K pictures, prompt after prompt."""
    x: torch.Tensor  # (n, 4, h, w) latents
    x_ref: torch.Tensor  # (n, 4, h, w) of the base, from the same noise
    z: list  # maps (n, T, D), with a graph where they went through at once
    r: list  # maps (n, T, D) of the base
    scores: dict  # {part of the reward: (n,)}


def generate(G, phi, batch, first, count):
    """Pictures first..first+count of a batch -> latents (B, 4, h, w), maps (B, T, D)."""
    e = batch.noise.flatten(0, 1)[first:first + count]  # (B, 4, h, w)
    prompt = torch.arange(first, first + len(e), device=G.device) // batch.noise.shape[1]
    condition = rows(batch.condition, prompt)
    with phase("sample"):
        x = G.sample(e, condition)
    with phase("features"):
        return x, phi(x, condition)


def candidates(G, phi, reward, batch, at_once):
    """(A) Sample, decode, score; and the features of the candidates and of the base's pictures."""
    parts = []
    for first in range(0, batch.noise.shape[:2].numel(), at_once):
        x, z = generate(G, phi, batch, first, at_once)
        with torch.no_grad():
            with G.reference():
                x_ref, r = generate(G, phi, batch, first, at_once)
            scores = score(G, reward, batch, x, first) if reward else {}
        parts.append((x.detach(), x_ref, z, r, scores))
    x, x_ref, z, r, scores = zip(*parts)
    z = [torch.cat(chunks) for chunks in zip(*z)]
    r = [torch.cat(chunks) for chunks in zip(*r)]
    joined = {}
    for name in scores[0]:
        joined[name] = torch.cat([part[name] for part in scores])
    return Candidates(torch.cat(x), torch.cat(x_ref), z, r, joined)


def score(G, reward, batch, x, first):
    """Latents x of the pictures from number `first` on -> {part of the reward: (B,)}."""
    with phase("decode"):
        pictures = G.decode(x)
    if not pictures.isfinite().all():
        raise UserError("the VAE gives NaN; try --dtype bf16 or fp32")
    with phase("reward"):
        K = batch.noise.shape[1]
        prompts = [batch.prompts[i // K] for i in range(first, first + len(x))]
        return reward.score(pictures, prompts, watch=batch.watch)


@torch.no_grad()
def targets(found, batch, reward, cfg):
    """(B) Prompt by prompt: rank, field, target, and dL/dz, which needs no network.

    -> for each map the gradient (n, T, D), and for each prompt a dict of figures."""
    K = batch.noise.shape[1]
    gradients = [torch.empty_like(z) for z in found.z]
    figures = []
    for p in range(len(batch.prompts)):
        i = slice(p * K, (p + 1) * K)
        x, x_ref = found.x[i].flatten(1), found.x_ref[i].flatten(1)  # (K, 4 h w)
        of_prompt = {"within": mean_distance(distances(x, x)), "loss": 0,
                     "within_ref": mean_distance(distances(x_ref, x_ref)),
                     "distance": (x - x_ref).square().mean().sqrt()}
        if reward:
            native = {name: scores[i] for name, scores in found.scores.items()}
            scores = reward.combine(native)  # (K,)
            positive, negative = rank(scores, cfg.anchors)  # (K,)
            of_prompt |= rewards.figures(scores, positive, negative, native)
        for j in range(len(found.z)):
            z = found.z[j][i].detach()  # (K, T, D)
            if batch.pairs:
                best, worst = batch.pairs[p][j]  # (m, T, D)
            else:
                best, worst = z[positive.to(z.device)], z[negative.to(z.device)]
            vectors = [h.flatten(0, 1) for h in (z, found.r[j][i], best, worst)]  # (N, D), (M, D)
            terms, rms = FIELDS[cfg.field](*vectors, cfg)
            with torch.enable_grad():
                loss = regression_loss(vectors[0].requires_grad_(), terms)
                gradient, = torch.autograd.grad(loss, vectors[0])
            gradients[j][i] = gradient.view_as(z)
            of_prompt["loss"] += loss.detach()
            for name, value in rms.items():  # mean over the maps
                of_prompt[name] = of_prompt.get(name, 0) + value / len(found.z)
        figures.append(of_prompt)
    return gradients, figures


def carry_back(G, phi, batch, found, gradients, at_once):
    """(C) From the features through phi and G to the LoRA: adds to .grad, chunk by chunk."""
    if found.z[0].requires_grad:  # the graph of (A) is there
        with phase("backward"):
            torch.autograd.backward(found.z, gradients)
        return
    for first in range(0, len(gradients[0]), at_once):
        z = generate(G, phi, batch, first, at_once)[1]
        with phase("backward"):
            torch.autograd.backward(z, [gradient[first:first + at_once] for gradient in gradients])


def drpo_gradient(G, phi, reward, batch, cfg, micro):
    """One update's gradient, scaled by G.scaler, added to .grad of the LoRA -> dict of figures.

    reward: `rewards.Reward`, or None with batch.pairs; micro: pictures at once."""
    P, K = batch.noise.shape[:2]
    together = max(1, micro // K)  # whole prompts at once
    figures = []
    for first in range(0, P, together):
        i = slice(first, first + together)
        part = replace(batch, prompts=batch.prompts[i], condition=rows(batch.condition, i),
                       noise=batch.noise[i], pairs=batch.pairs and batch.pairs[i])
        whole = len(part.prompts) * K <= micro
        with torch.set_grad_enabled(whole):  # without a graph four times as many fit
            found = candidates(G, phi, reward, part, micro if whole else 4 * micro)
        with phase("field"):
            gradients, of_prompts = targets(found, part, reward, cfg)
        gradients = [G.scaler.scale(gradient / P) for gradient in gradients]
        carry_back(G, phi, part, found, gradients, micro)
        figures += of_prompts
    means = rewards.mean_figures(figures)
    means["diversity"] = means.pop("within") / max(means.pop("within_ref"), 1e-12)
    return means


@torch.no_grad()
def pair_maps(G, phi, pair):
    """An offline pair -> for each feature map, its chosen and rejected vectors (M, T, D)."""
    prompt, *sides = pair
    maps = []
    for files in sides:
        pictures = 2 * rewards.load_pictures(files, G.picture_side) - 1  # (M, 3, H, W)
        x = G.vae.encode(pictures.to(G.device, G.vae.dtype)).latent_dist.mode().float()
        x = x * G.vae.config.scaling_factor  # (M, 4, h, w)
        condition = {name: c.expand(len(x), *c.shape[1:]) for name, c in G.encode([prompt]).items()}
        maps.append(phi(x, condition))
    return list(zip(*maps))


def gradient_that_fits(G, phi, reward, batch, cfg, micro):
    """`drpo_gradient`, its micro-batch halved whenever memory runs out -> figures, micro."""
    while True:
        try:
            return drpo_gradient(G, phi, reward, batch, cfg, micro), micro
        except torch.OutOfMemoryError:
            if micro == 1:
                raise UserError("out of GPU memory at --micro-batch 1: a smaller reward?") from None
        micro = -(-micro // 2)  # outside of except: the exception holds the memory
        print(f"out of GPU memory: going on with --micro-batch {micro}", file=sys.stderr)
        for p in G.parameters():
            p.grad = None
        PHASES.clear()
        torch.cuda.empty_cache()


def fitting_micro_batch(G, phi, batch):
    """How many pictures at once the free memory should hold, by the graph of one of them."""
    most = batch.noise.shape[:2].numel()
    if G.device.type != "cuda":
        return min(most, max(64, batch.noise.shape[1]))
    before = torch.cuda.memory_allocated()
    graph = generate(G, phi, batch, 0, 1)
    of_one = torch.cuda.memory_allocated() - before + 1
    del graph
    torch.cuda.empty_cache()
    return max(1, min(most, int(0.8 * torch.cuda.mem_get_info()[0] / of_one)))


# ===== 5. A run.

def check(cfg):
    """Settings that contradict each other or name nothing: one line, before anything is loaded."""
    for item in cfg.features.split(","):
        pick("feature", item.strip().partition("@")[0], FEATURES)
    pick("kernel", cfg.kernel, KERNELS)
    pick("field", cfg.field, FIELDS)
    rules = [
        ("anchors", cfg.pairs or 2 * cfg.anchors <= cfg.candidates,
         f"at most half of --candidates {cfg.candidates}: best and worst would overlap"),
        ("radii", cfg.radii and all(0 < radius < math.inf for radius in cfg.radii),
         "positive numbers, as 0.2,0.5,1"),
        ("micro_batch", cfg.micro_batch == "auto" or str(cfg.micro_batch).lstrip("0").isdecimal(),
         "auto or a number of pictures"),
        ("out", not cfg.resume or cfg.out in ("", cfg.resume), "nothing beside --resume")]
    for f in fields(Config):
        least = f.metadata["least"]
        fits = least is None or least <= getattr(cfg, f.name) < 2 ** 63
        rules.append((f.name, fits, f"a number, at least {least}"))
    for name, holds, expected in rules:
        if not holds:
            name, value = name.replace("_", "-"), getattr(cfg, name)
            raise UserError(f"--{name} is {value}; expected {expected}")


def start(cfg):
    """Device, seeds, torchrun's process group -> device, dtype, this process, processes."""
    process, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = cfg.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device} is not usable here, cpu is ({one_line(e)})") from None
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    rewards.seed_everything(cfg.seed)
    return device, DTYPES[cfg.dtype.replace("auto", "bf16" if cuda else "fp32")], process, world


def average_over_ranks(gradients, stopping):
    """Average the gradients over torchrun's ranks in place, by one all-reduce; if one is to stop,
    all stop together -> the signal, or 0."""
    tensors = [*gradients, gradients[0].new_tensor([float(stopping)])]
    flat = nn.utils.parameters_to_vector(tensors)
    try:
        dist.all_reduce(flat)
    except RuntimeError as e:
        raise UserError(f"another rank of this run ended, so this one stops ({one_line(e)})") from e
    nn.utils.vector_to_parameters(flat / dist.get_world_size(), tensors)
    return signal.SIGTERM if tensors[-1].item() else 0


def next_batch(G, phi, cfg, position, prompts, pairs):
    """The P prompts from `position` on: their order, new in each epoch, and their noise depend on
    seed and position alone, whichever GPU asks."""
    index, noise = [], []
    for n in range(position, position + cfg.batch):
        g = torch.Generator().manual_seed((cfg.seed * 1_000_003 + n // len(prompts)) % 2 ** 63)
        index.append(int(torch.randperm(len(prompts), generator=g)[n % len(prompts)]))
        noise.append(prompt_noise(cfg.seed, n, (cfg.candidates, *G.noise_shape)).to(G.device))
    chosen = [prompts[i] for i in index]
    maps = [pair_maps(G, phi, pairs[i]) for i in index] if pairs else None
    return Batch(chosen, G.encode(chosen), torch.stack(noise), maps)


def save(cfg, G, optimizer, at, folder):
    """All that --resume needs, and the LoRA in the formats of others. at: {"step", "position"}."""
    state = {"at": at, "random": rewards.random_states(), "optimizer": optimizer.state_dict(),
             "weights": [p.detach().cpu() for p in G.parameters()], "scaler": G.scaler.state_dict()}
    rewards.save_checkpoint(folder, state)
    G.save_lora(folder, base_unet=cfg.unet, settings=json.dumps(asdict(cfg)))


def load(cfg, G, optimizer):
    """Put the newest whole checkpoint of --resume in place -> {"step", "position"}."""
    state = rewards.newest_checkpoint(cfg.resume)
    if [p.shape for p in G.parameters()] != [w.shape for w in state["weights"]]:
        raise UserError(f"{cfg.resume}: its LoRA is of another base or --lora-rank")
    for p, w in zip(G.parameters(), state["weights"]):
        p.data.copy_(w)
    optimizer.load_state_dict(state["optimizer"])
    optimizer.param_groups[0]["lr"] = cfg.lr
    G.scaler.load_state_dict(state["scaler"])
    rewards.random_states(state["random"])
    return state["at"]


def train(cfg, reward=None):
    """Run DrPO -> path of the run's folder. reward: a callable in place of cfg.reward."""
    check(cfg)
    device, dtype, process, world = start(cfg)
    G = load_generator(cfg.model, device=device, dtype=dtype, unet=cfg.unet,
                       timestep=cfg.timestep, prediction=cfg.prediction)
    if cfg.compile:
        G.compile_all()
    phi = load_features(cfg.features, G)
    pairs = rewards.load_pairs(cfg.pairs) if cfg.pairs else None
    if pairs:
        reward, prompts = None, [pair[0] for pair in pairs]
    else:
        prompts = rewards.load_prompts(cfg.prompts)
        reward = rewards.load(reward or cfg.reward, device, cfg.watch)
        cfg = replace(cfg, reward=reward.name)  # --resume must not take another for a callable
    torch.manual_seed(cfg.seed)  # the LoRA's start depends on nothing that was drawn while loading
    parameters = G.add_lora(cfg.lora_rank, cfg.lora_alpha)
    optimizer = torch.optim.AdamW(parameters, cfg.lr, weight_decay=cfg.weight_decay,
                                  fused=G.device.type == "cuda")
    at = load(cfg, G, optimizer) if cfg.resume else {"step": 0, "position": 0}
    save_in = partial(save, cfg, G, optimizer, at)
    bad = stopping = 0
    micro = 0 if cfg.micro_batch == "auto" else int(cfg.micro_batch)

    with rewards.Stop() as stop, rewards.open_run(cfg, G, prompts, at, save_in) as folder:
        while at["step"] < cfg.steps and not stopping and bad < 3:
            began = time.perf_counter()
            position = at["position"] + process * cfg.batch
            batch = next_batch(G, phi, cfg, position, prompts, pairs)
            batch.watch = at["step"] % cfg.watch_every == 0 or at["step"] == cfg.steps - 1
            micro = micro or fitting_micro_batch(G, phi, batch)
            metrics, micro = gradient_that_fits(G, phi, reward, batch, cfg, micro)

            with phase("optimizer"):
                stopping = stop.signal
                if world > 1:
                    stopping = average_over_ranks([p.grad for p in parameters], stopping)
                G.scaler.unscale_(optimizer)
                norm = float(nn.utils.clip_grad_norm_(parameters, cfg.clip))
                if math.isfinite(norm):
                    optimizer.step()
                G.scaler.update()  # fp16: what was not finite halves the scale
                optimizer.zero_grad()

            bad = 0 if math.isfinite(norm) or G.scaler.get_scale() > 1 else bad + 1
            at["step"] += 1
            at["position"] += cfg.batch * world
            if folder:
                last = at["step"] == cfg.steps or stopping
                folder.log({"step": at["step"], "seconds": time.perf_counter() - began, **metrics,
                            "grad_norm": norm, "lr": cfg.lr, "applied": math.isfinite(norm),
                            "micro_batch": micro, **PHASES}, show=last)
                PHASES.clear()
                if at["step"] % cfg.save_every == 0 or last:
                    save_in(folder.path)
                if last or cfg.preview_every and at["step"] % cfg.preview_every == 0:
                    folder.preview(G, prompts, at["step"])
        if bad == 3:
            raise UserError("the gradient was not finite three times in a row (none was applied); "
                            "try a lower --lr, or --dtype bf16")
    if stopping:
        sys.exit(128 + stopping)
    return folder and folder.path


def parse(argv):
    """Command line -> Config: what is given, else the preset of the model, else the default; with
    --resume the run's own settings in the place of both."""
    parser = argparse.ArgumentParser(prog="drpo.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise UserError(f"{message} (python drpo.py --help lists the settings)")

    parser.error = fail
    for f in fields(Config):
        text = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        kw = dict(default=argparse.SUPPRESS, help=text)
        if f.type is bool:
            kw["action"] = "store_true"
        else:
            kw.update(type=numbers if f.type is tuple else f.type, choices=f.metadata["choices"])
        parser.add_argument("--" + f.name.replace("_", "-"), **kw)
    given = vars(parser.parse_args(argv))
    if "resume" not in given:
        model = given.setdefault("model", Config.model)
        return Config.preset(layout(model), **given)
    saved = rewards.read_config(given["resume"])
    own = {f.name: f.type(saved[f.name]) for f in fields(Config) if f.name in saved}
    return Config(**{**own, "out": "", **given})


def numbers(text):
    """'0.2,0.5,1' -> a tuple of floats."""
    return tuple(float(number) for number in text.split(","))


def main(argv=None):
    """python drpo.py ...: what the user can mend ends with one line and exit code 2."""
    try:
        train(parse(argv))
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # where a rank ends early this might wait for the others
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is intact", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
