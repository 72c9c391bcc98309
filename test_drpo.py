"""Tests: values against independent computations (float64 loops, autograd, diffusers, peft), bad input, faults.

    pip install pytest pytest-xdist peft
    python -m pytest -q -n 2 test_drpo.py                      all, under 4 minutes on 2 cores
    python -m pytest -q -m "not slow" -n 2 test_drpo.py        what takes seconds
    python -m pytest -q -m cuda test_drpo.py                   what needs a GPU (skipped where there is none)

Contents
    read these first    the equations, the update, sampler, resume, LoRA elsewhere, the toy learns
    drpo.py             1 the field, 2 features, 3 the generator, 4 one update, 5 a run, bad input, ranks
    rewards.py          contract, files, CLIP and its descendants, GenEval, served rewards, judge
    eval.py             statistics, report, pictures
    lab/                the toy's checker, ablations
    cuda                bf16, fp16, memory, compiled, kernels: on a GPU
"""
import argparse
import base64
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
import warnings
from contextlib import contextmanager
from dataclasses import asdict, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are tiny: threads only wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import drpo
import eval as E
import rewards
from rewards import Found, UserError

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # slow and cuda, told apart below
HERE = Path(drpo.__file__).resolve().parent
sys.path.append(str(HERE / "lab"))
import ablate  # noqa: E402
import bench  # noqa: E402
import make_toy  # noqa: E402
from scene import scene  # noqa: E402

KERNELS = ("laplacian", "rbf", "cosine")
RADII = ((0.02, 0.05, 0.2), (0.2, 0.5, 1.0), (0.7,))
PROMPTS = ["a red cat", "two dogs"]
TABLE = [[0.1, 0.9, 0.4, 0.7, 0.2, 0.5], [3.0, 1.0, 2.0, 6.0, 5.0, 4.0]]

# six points in three dimensions and what the authors' drift_loss gives for them
AUTHORS_Z = [[1.8, 0.5, -0.3], [-1, -0.1, -0.6], [0.1, -0.1, 2.6], [-0.4, -0.1, -2],
    [1.5, 0.5, 0.2], [1.7, 0.7, 0]]
AUTHORS_R = [[2.6, 0.4, -0.2], [-0.9, -0.7, -1], [0.6, 0.2, 2.3], [-0.6, 0.4, -1.6], [2.1, 1.2, 1],
    [1.5, 0.6, -1.3]]
AUTHORS = {  # (kernel, term): d(loss)/dz, loss
    ("laplacian", "pref"): (
     [[-0.2364851, 0.237405, 0.5622579], [0.6009656, 0.1617808, 0.1616687],
     [0.0007848872, 0.0002516849, 0.0003582365], [0.002565146, 0.0007282834, 0.0008164363],
     [0.1531368, 0.089122, 0.3240832], [0.142188, 0.3062018, 0.4819318]], 6.275776),
    ("laplacian", "ref"): (
     [[-0.2886879, 0.09026994, 0.2844333], [0.3708681, 0.275408, -0.1498573],
     [-0.0006017119, 0.004279419, -0.3195619], [0.03581617, -0.1289915, 0.4938796],
     [-0.02324724, -0.01606224, -0.04343285], [-0.09994164, -0.05472411, -0.007340208]], 5.9859),
    ("rbf", "pref"): (
     [[-0.171051, 0.1271224, 0.3781035], [0.7190138, 0.1935927, 0.1937252],
     [0.0006634585, 0.0002211314, 0.000304279], [0.0007208005, 0.0002415679, 0.0003344849],
     [0.2186018, 0.1093666, 0.3335286], [0.2373005, 0.2135553, 0.3701069]], 5.639456),
    ("rbf", "ref"): (
     [[-0.1215681, 0.05092919, 0.2056763], [0.362436, 0.2499151, 0.07165604],
     [0.003002658, 0.006504115, -0.4616033], [0.1951408, -0.08506735, 0.4299096],
     [0.0588942, 0.01883982, -0.03564183], [-0.002355731, -0.01724388, 0.007970056]], 5.373701),
    ("cosine", "pref"): (
     [[-0.351902, 0.2679338, 0.7892792], [0.07087548, 0.01899676, 0.0182708],
     [0.0006711601, 0.0004763266, 0.001354565], [0.01198457, 0.003335842, 0.003112031],
     [-0.2451745, 0.1182359, 0.5301414], [-0.3295048, 0.212605, 0.7305586]], 8.846354),
    ("cosine", "ref"): (
     [[-0.5077687, 0.07783122, 0.2975482], [0.1504271, 0.1208286, -0.2445644],
     [0.009228474, 0.00356656, -0.05934478], [-0.09017046, -0.06295634, 0.2509737],
     [-0.3956456, -0.1464306, -0.3139409], [-0.4415049, -0.1124132, -0.05065357]], 7.709543),
}


# ===== Read these first

def _dp_unit(V):
    """V / RMS, in float64, and the RMS."""
    rms = math.sqrt(float((V ** 2).mean()))
    return (V / rms if rms > 0 else V), rms

def _dp_scale(pairs):
    """Mean of the distances that are not 0."""
    d = [math.sqrt(sum((x - y) ** 2 for x, y in zip(p, q))) for p, q in pairs]
    d = [x for x in d if x > 0]
    return sum(d) / len(d) if d else 1.0

def _dp_grad_k(z, a, tau, radius, kernel):
    """grad_z k(z, a), one pair of float64 vectors."""
    diff, n = z - a, np.linalg.norm(z - a)
    if n == 0:
        return np.zeros_like(z)
    if kernel == "rbf":
        return -math.exp(-n ** 2 / (2 * tau ** 2)) * diff / tau ** 2
    if kernel == "cosine":
        z_hat, a_hat = z / np.linalg.norm(z), a / np.linalg.norm(a)
        cos = float(z_hat @ a_hat)
        return math.exp(cos / radius) * (a_hat - cos * z_hat) / (radius * np.linalg.norm(z))
    return -math.exp(-n / tau) * diff / (tau * n)

def _dp_dipole(z, positive, negative, radii, kernel):
    """-> field (N, D), and the RMS of each radius before normalisation."""
    s = _dp_scale([(x, y) for x in z for y in [*positive, *negative]])
    total, all_rms = 0, []
    for radius in radii:
        V = np.zeros_like(z)
        for i in range(len(z)):
            for a in positive:
                V[i] += _dp_grad_k(z[i], a, radius * s, radius, kernel)
            for a in negative:
                V[i] -= _dp_grad_k(z[i], a, radius * s, radius, kernel)
        V, rms = _dp_unit(V)
        total, all_rms = total + V, all_rms + [rms]
    return total, all_rms

def _dp_log_k(z, a, tau, radius, kernel):
    n = np.linalg.norm(z - a)
    if kernel == "cosine":
        return float(z @ a) / np.linalg.norm(z) / np.linalg.norm(a) / radius
    return -n ** 2 / (2 * tau ** 2) if kernel == "rbf" else -n / tau

def _dp_mean_shift(z, points, tau, radius, kernel):
    """sum_b k(z, b) b / sum_b k(z, b)."""
    logs = [_dp_log_k(z, b, tau, radius, kernel) for b in points]
    weights = [math.exp(x - max(logs)) for x in logs]
    return sum(w * b for w, b in zip(weights, points)) / sum(weights)

def _dp_drift(z, reference, radii, kernel):
    s = _dp_scale([(x, y) for x in z for y in [*z, *reference]])
    total, all_rms = 0, []
    for radius in radii:
        V = np.zeros_like(z)
        for i in range(len(z)):
            others = [z[j] for j in range(len(z)) if j != i]
            V[i] = (_dp_mean_shift(z[i], reference, radius * s, radius, kernel)
                    - _dp_mean_shift(z[i], others, radius * s, radius, kernel))
        V, rms = _dp_unit(V)
        total, all_rms = total + V, all_rms + [rms]
    return total, all_rms

def _dp_released(z, positive, negative, radii, kernel, w_pos=3000.0, w_neg=3000.0, negative_is_self=False):
    """The authors' arithmetic, entry by entry, in float64 -> force in units of s / sqrt(D), s."""
    N, D, M = len(z), z.shape[1], len(negative)
    y = [*z, *negative, *positive]
    w = [1.0] * N + [w_neg] * M + [w_pos] * len(positive)
    Y = len(y)
    d = [[max(math.sqrt(sum((p - q) ** 2 for p, q in zip(z[i], y[j]))), 1e-4) for j in range(Y)] for i in range(N)]
    s = max(sum(d[i][j] * w[j] for i in range(N) for j in range(Y)) / (N * Y) / (sum(w) / Y), 1e-3)
    total = np.zeros_like(z)
    for radius in radii:
        logits = np.zeros((N, Y))
        for i, j in itertools.product(range(N), range(Y)):
            if kernel == "cosine":
                logits[i, j] = float(z[i] @ y[j]) / np.linalg.norm(z[i]) / np.linalg.norm(y[j]) / radius
            else:
                t = d[i][j] / (s * radius)
                logits[i, j] = -t ** 2 / 2 if kernel == "rbf" else -t
            if i == j or (negative_is_self and j == N + i):
                logits[i, j] -= 100 / radius
        rows = [logits[i].max() + math.log(sum(math.exp(x - logits[i].max()) for x in logits[i])) for i in range(N)]
        columns = [
            logits[:, j].max() + math.log(sum(math.exp(x - logits[:, j].max()) for x in logits[:, j])) for j in range(Y)
        ]
        force = np.zeros_like(z)
        for i in range(N):
            A = [math.sqrt(max(math.exp(2 * logits[i, j] - rows[i] - columns[j]), 1e-6)) * w[j] for j in range(Y)]
            minus, plus = sum(A[:N + M]), sum(A[N + M:])
            coef = [-A[j] * plus if j < N + M else A[j] * minus for j in range(Y)]
            force[i] = (sum(c * v for c, v in zip(coef, y)) - sum(coef) * z[i]) / (s / math.sqrt(D))
        total += force / math.sqrt(max(float((force ** 2).mean()), 1e-8))
    return total, s

def _dp_close(got, want, tolerance=1e-5):
    """Largest error of a float32 tensor relative to the RMS of a float64 array."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want)
    assert np.isfinite(got).all()
    error = np.abs(got - want).max() / max(math.sqrt(float((want ** 2).mean())), 1e-30)
    assert error < tolerance, f"relative error {error:.2e}"

def _dp_sets(seed, N=9, D=7, M=3, offset=0.0):
    """z (N, D), reference (N, D) near it, and anchors that are rows of z."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(N, D, generator=g) + offset
    reference = z + 0.3 * torch.randn(N, D, generator=g)
    return z, reference, z[:M].clone(), z[-M:].clone()

def _dp_64(*tensors):
    return [t.double().numpy() for t in tensors]

def _dp_config(**kw):
    return drpo.Config(**{"radii": (0.2, 0.5), **kw})

def _dp_tokenizer(folder):
    """A CLIP tokenizer whose words are letters."""
    import transformers
    symbols = [chr(c) for c in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *(s + "</w>" for s in symbols)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)

def _dp_pipeline(kind, folder):
    """A whole StableDiffusion or StableDiffusionXL pipeline of few random weights, pictures of 32 x 32."""
    import diffusers
    import transformers
    torch.manual_seed(0)
    text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=200,
                bos_token_id=0, eos_token_id=1, pad_token_id=1)
    schedule = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing",
                    steps_offset=1)
    unet = dict(sample_size=8, block_out_channels=(32, 64), attention_head_dim=(2, 4), norm_num_groups=16,
                use_linear_projection=True)
    parts = dict(
        vae=diffusers.AutoencoderKL(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
                                    sample_size=32, down_block_types=("DownEncoderBlock2D",) * 3,
                                    up_block_types=("UpDecoderBlock2D",) * 3,
                                    scaling_factor=0.13025 if kind == "sdxl" else 0.18215),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)), tokenizer=_dp_tokenizer(folder))
    with torch.no_grad():
        for p in parts["vae"].decoder.conv_out.parameters():  # pictures with contrast, not all of one grey
            p.mul_(3)
    if kind == "sd":
        return diffusers.StableDiffusionPipeline(
            **parts, unet=diffusers.UNet2DConditionModel(**unet, layers_per_block=1, cross_attention_dim=32,
                                                         down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                                         up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
            scheduler=diffusers.EulerDiscreteScheduler(**schedule), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False)
    return diffusers.StableDiffusionXLPipeline(
        **parts, tokenizer_2=parts["tokenizer"], add_watermarker=False,
        text_encoder_2=transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text, projection_dim=32)),
        unet=diffusers.UNet2DConditionModel(**unet, layers_per_block=2, cross_attention_dim=64,
                                            transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
                                            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
                                            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**schedule))

@pytest.fixture(scope="session")
def _dp_models(tmp_path_factory):
    """Folders of a tiny SD and a tiny SDXL model in the diffusers layout."""
    home = tmp_path_factory.mktemp("models")
    for kind in ("sd", "sdxl"):
        _dp_pipeline(kind, home).save_pretrained(home / kind)
    return home

def _dp_open(folder, dtype=torch.float32):
    return drpo.load_generator(str(folder), dtype=dtype)

def _dp_random_lora(G, rank=4, alpha=8.0, size=0.3, seed=1):
    """A LoRA that does something."""
    torch.manual_seed(seed)
    params = G.add_lora(rank, alpha)
    for layer in G.lora.values():
        torch.nn.init.normal_(layer.up, std=size)
    return params

def _dp_noise(B=2, seed=0):
    return torch.randn(B, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

def _dp_sample(G, e, prompts=PROMPTS):
    with torch.no_grad():
        return G.sample(e, G.encode(prompts))

def _dp_pipe_sample(pipe, e, output="latent", prompts=PROMPTS):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt=list(prompts), latents=e.clone().to(pipe.dtype), num_inference_steps=1, guidance_scale=0.0,
                height=32, width=32, output_type=output).images

class _DpScore:
    """Scores by place, in the place of a reward: what it sees is kept, its order is far from rounding."""

    def __init__(self, table, f=lambda x: x):
        self.table, self.f, self.seen = torch.tensor(table, dtype=torch.float64).flatten(), f, []

    def score(self, images, prompts, watch=False):
        assert not images.requires_grad
        first = sum(len(p) for _, p in self.seen)
        self.seen.append((images.clone(), list(prompts)))
        return {"table": self.f(self.table[first:first + len(prompts)])}

    def combine(self, scores):
        return scores["table"]

def _dp_gradient(G, params, features, micro, cfg=None, f=lambda x: x, table=TABLE, pairs=None, seed=3):
    """Gradient of one step at 2 prompts x 6 candidates -> flat gradient, metrics, the score object."""
    cfg = cfg or _dp_config(anchors=2)
    for p in params:
        p.grad = None
    noise = torch.stack([drpo.prompt_noise(seed, i, (6, 4, 8, 8)) for i in range(2)]).to(G.device)
    score = None if pairs else _DpScore(table, f)
    batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), noise, pairs)
    phi = drpo.load_features(features, G) if isinstance(features, str) else features
    metrics = drpo.drpo_gradient(G, phi, score, batch, cfg, micro)
    scale = G.scaler.get_scale() if G.scaler.is_enabled() else 1
    return torch.cat([p.grad.flatten() for p in params]) / scale, metrics, score

@pytest.fixture(scope="module")
def _dp_tuned(_dp_models):
    """Tiny SD with a LoRA that does something, and its parameters."""
    G = _dp_open(_dp_models / "sd")
    return G, _dp_random_lora(G, size=0.1)

REWARD_FILE = '''
import multiprocessing, os, random, sys, time
import numpy as np
import torch

calls = 0

def good(images, prompts):
    assert not torch.is_grad_enabled()
    arrays = [np.asarray(image, dtype=float) for image in images]
    return [float(a[..., 0].mean() - a[..., 2].mean()) for a in arrays]

def drawing(images, prompts):
    """A reward with a random part, from every generator there is."""
    return [s + random.random() + float(torch.rand(())) + np.random.rand() for s in good(images, prompts)]

def third(answer):
    """Good twice, then something else."""
    def reward(images, prompts):
        global calls
        calls += 1
        return good(images, prompts) if calls < 3 else answer(images, prompts)
    return reward

def fail(images, prompts):
    raise ValueError("no camera\\nsecond line")

raises3 = third(fail)
raises = fail
short3 = third(lambda i, p: [1.0])
short = lambda i, p: [1.0]
inf3 = third(lambda i, p: [float("inf")] * len(i))
text3 = third(lambda i, p: ["good"] * len(i))
exits3 = third(lambda i, p: sys.exit(7))
nan3 = third(lambda i, p: [float("nan")] * len(i))
same = lambda i, p: [3.0] * len(i)
nan_some = lambda i, p: [s if n % 3 else float("nan") for n, s in enumerate(good(i, p))]
dies3 = third(lambda i, p: os._exit(9) if os.environ.get("RANK") == "1" else good(i, p))
raises3_on_1 = third(lambda i, p: fail(i, p) if os.environ.get("RANK") == "1" else good(i, p))

def slow(images, prompts):
    time.sleep(0.05)
    return good(images, prompts)

def hangs(images, prompts):
    time.sleep(0.05 if calls < 2 else 60)
    return third(good)(images, prompts)

def doubled(x):
    return 2 * x

def pooled(images, prompts):
    """A pool of forked workers, terminated at the end as `with` does."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(doubled, good(images, prompts))

def spawned(images, prompts):
    """Workers that import this file by its name."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(doubled, good(images, prompts))
'''

def _dp_child(argv, stream, cwd, env):
    """Runs in the child: drpo.main(argv) with its output in files."""
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{stream}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    action = env.get("DP_ACTION")
    if action == "tiny_file":  # files above this size cannot be written, as on a full disk
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(env["DP_LIMIT"]), resource.RLIM_INFINITY))
    if action == "nonfinite":  # the gradients of these updates are spoilt
        steps, plain, at = [int(s) for s in env["DP_STEPS"].split(",")], drpo.drpo_gradient, [int(env.get("DP_AT", 0))]

        def spoilt(G, *args):
            metrics = plain(G, *args)
            at[0] += 1
            if at[0] in steps:
                G.parameters()[0].grad.view(-1)[0] = math.nan if at[0] % 2 else math.inf
                metrics["loss"], metrics["rms_pref"] = math.nan, [math.nan] * 3
            return metrics

        drpo.drpo_gradient = spoilt
    drpo.main(argv)

class _DpRun:
    """A process that runs drpo.main(argv)."""

    server = None

    def __init__(self, argv, cwd, env=()):
        if not _DpRun.server:
            _DpRun.server = multiprocessing.get_context("forkserver")
            _DpRun.server.set_forkserver_preload(
                ["drpo", "pytest", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "eval",
                 "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
                 "transformers.models.clip.modeling_clip", "torch._dynamo"])
        self.stream = str(Path(cwd) / f"stream{random.randrange(10 ** 12)}")
        self.process = _DpRun.server.Process(target=_dp_child,
                                             args=([str(a) for a in argv], self.stream, str(cwd), dict(env)))
        self.process.start()

    def wait(self, seconds=120):
        """-> exit code; the streams are in .out and .err."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s: {self.read('.err')}")
        return self.process.exitcode

    out, err = property(lambda self: self.read(".out")), property(lambda self: self.read(".err"))

    def read(self, name):
        return Path(self.stream + name).read_text() if Path(self.stream + name).exists() else ""

    def kill(self, number):
        os.kill(self.process.pid, number)

    def until(self, log, lines, seconds=60):
        """Waits until metrics.jsonl has so many lines."""
        begun = time.monotonic()
        while not (log.exists() and log.read_bytes().count(b"\n") >= lines):
            assert self.process.exitcode is None and time.monotonic() - begun < seconds, self.read(".err")
            time.sleep(0.002)

@pytest.fixture
def _dp_home(tmp_path, _dp_models):
    """A folder with a prompts file and a reward file."""
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\na bird\na blue house\na green tree\n")
    (tmp_path / "own.py").write_text(REWARD_FILE)
    return tmp_path

def _dp_argv(models, out="run", reward="own.py:good", kind="sd", **kw):
    """Command line of a tiny run."""
    settings = dict(model=models / kind, reward=reward, prompts="prompts.txt", out=out, steps=4, batch=2, candidates=4,
                    anchors=2, features="vae", lora_rank=2, preview_every=0, save_every=50, device="cpu",
                    field="dipole", radii="0.2,0.5,1", lr=1e-3) | kw
    return [a for k, v in settings.items() if v is not None
            for a in ([f"--{k.replace('_', '-')}"] if v is True else [f"--{k.replace('_', '-')}", str(v)])]

def _dp_metrics(run):
    """metrics.jsonl as strict JSON, without the times."""
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    lines = [json.loads(line, parse_constant=refuse) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if not k.startswith("seconds") and k != "images_per_second"} for m in lines]

def _dp_state(run):
    """The newest checkpoint as plain data, with step and position on top."""
    state = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
    return {**state, **state["at"]}

def _dp_weights(run):
    return _dp_state(run)["weights"]

def _dp_same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))

def _dp_toy_score(G, captions, scene):
    """Mean `scene` score of 3 pictures of each caption, with noise that no training step sees."""
    scores = []
    with torch.no_grad():
        for i in range(0, len(captions), 16):
            part = [c for c in captions[i:i + 16] for _ in range(3)]
            noise = torch.stack([drpo.prompt_noise(12345, i * 3 + j, G.noise_shape) for j in range(len(part))])
            scores.append(scene(rewards.to_pil(G.decode(G.sample(noise, G.encode(part)))), part))
    return float(torch.cat(scores).mean())


class TestReadTheseFirst:
    """Ten tests that say what this project promises."""

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("radii", RADII)
    def test_dipole_field_equals_float64_loop(self, kernel, radii):
        """With anchors among the samples, as in training, and with anchors of their own."""
        for seed, offset in ((0, 0.0), (1, 2.0)):
            z, other, positive, negative = _dp_sets(seed, offset=offset)
            for p, n in ((positive, negative), (other[:4], other[4:6])):
                want, want_rms = _dp_dipole(*_dp_64(z, p, n), radii, kernel)
                got, rms = drpo.dipole_field(z, p, n, radii=radii, kernel=kernel, return_rms=True)
                small = kernel == "rbf" and min(radii) < 0.1  # exponents of some -1000: their float32 rounding is 1e-3
                _dp_close(got, want, 1e-2 if small else 1e-5)
                shown = np.array(want_rms) > 1e-30  # below, float32 has no number for it
                np.testing.assert_allclose(rms.double().numpy()[shown],
                                           np.array(want_rms)[shown], rtol=1e-2 if small else 1e-5)

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("radii", RADII)
    def test_reference_drift_equals_float64_loop(self, kernel, radii):
        for seed, offset in ((0, 0.0), (1, 2.0)):
            z, reference, _, _ = _dp_sets(seed, offset=offset)
            reference[0] = z[0]  # as before the first step: distance 0
            want, want_rms = _dp_drift(*_dp_64(z, reference), radii, kernel)
            got, rms = drpo.reference_drift(z, reference, radii=radii, kernel=kernel, return_rms=True)
            _dp_close(got, want)
            np.testing.assert_allclose(rms.double().numpy(), want_rms, rtol=1e-5)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_released_field_equals_the_authors_numbers(self, kernel):
        """Six points in three dimensions, and what the authors' own drift_loss gave for them (their commit
        dd473d8, radii .02 .05 .2): the gradient of the sum of the squared distances to the target."""
        z, reference = torch.tensor(AUTHORS_Z), torch.tensor(AUTHORS_R)
        kw = dict(radii=(0.02, 0.05, 0.2), kernel=kernel)
        for term, (force, s) in (("pref", drpo.released_field(z, z[:2], z[4:], **kw)),
                                 ("ref", drpo.released_field(z, reference, z, negative_is_self=True, **kw))):
            gradient, loss = AUTHORS[kernel, term]
            u = float(s) / math.sqrt(3)
            mine = -2 * force / u / z.numel()  # d/dz of mean ((z - z*) / u)^2 at z* = z + u force
            _dp_close(mine, np.array(gradient), 2e-4)
            assert float(force.square().mean()) == pytest.approx(loss, rel=2e-4)

    def test_gradient_is_the_equations(self, _dp_tuned):
        """drpo_gradient against float64 loops for the targets and autograd through the sampler, features `vae`, dipole."""
        G, params = _dp_tuned
        got, metrics, _ = _dp_gradient(G, params, "vae", 12, _dp_config(anchors=2, lambda_ref=0.3, eta=0.8))
        phi = drpo.load_features("vae", G)
        for p in params:
            p.grad = None
        total_loss = 0.0
        for i, prompt in enumerate(PROMPTS):
            e, c = drpo.prompt_noise(3, i, (6, 4, 8, 8)), G.encode([prompt] * 6)
            maps = phi(G.sample(e, c), c)
            with torch.no_grad(), G.reference():
                refs = phi(G.sample(e, c), c)
            order = sorted(range(6), key=lambda j: TABLE[i][j])
            best, worst = order[-2:], order[:2]
            for h, h_ref in zip(maps, refs):
                z, r = _dp_64(h.detach()[:, 0], h_ref[:, 0])
                V = _dp_dipole(z, z[best], z[worst], (0.2, 0.5), "laplacian")[0]
                V = V + 0.3 * _dp_drift(z, r, (0.2, 0.5), "laplacian")[0]
                # L = 1 / (2 N D) sum |(z - z*) / u|^2, z* = z + eta u V, u = s / sqrt(D), s the mean distance within z;
                # mean over prompts
                N, D = z.shape
                u = _dp_scale([(a, b) for a in z for b in z]) / math.sqrt(D)
                h[:, 0].backward(torch.from_numpy(-0.8 * V / (N * D * u) / 2).float(), retain_graph=True)
                total_loss += ((0.8 * V) ** 2).mean() / 2 / 2
        want = torch.cat([p.grad.flatten() for p in params])
        assert (got - want).norm() < 1e-3 * want.norm()
        assert metrics["loss"] == pytest.approx(total_loss, rel=1e-4)

    @pytest.mark.parametrize("field", ("dipole", "released"))
    def test_monotone_transform_gives_the_bit_identical_update(self, field, _dp_tuned):
        G, params = _dp_tuned
        cfg = _dp_config(anchors=2, field=field)
        want = _dp_gradient(G, params, "vae", 12, cfg)[0]
        for f in (torch.exp, lambda x: 1e6 * x - 3, lambda x: -1 / (x + 1), lambda x: torch.exp(90 * x)):
            assert torch.equal(_dp_gradient(G, params, "vae", 12, cfg, f)[0], want)
        assert not torch.equal(_dp_gradient(G, params, "vae", 12, cfg, torch.neg)[0], want)

    @pytest.mark.parametrize("features", ("vae", "unet", "vae,unet"))
    @pytest.mark.parametrize("field", ("dipole", "released"))
    def test_micro_batches_give_the_same_gradient(self, features, field, _dp_tuned):
        """1, 3, 5 (which does not divide 12, and cuts through prompts) and all: equal to float32 rounding."""
        G, params = _dp_tuned
        cfg = _dp_config(anchors=2, field=field)
        want, metrics, whole = _dp_gradient(G, params, features, 12, cfg)
        assert want.norm() > 0
        for micro in (1, 3, 5):
            got, m, score = _dp_gradient(G, params, features, micro, cfg)
            assert (got - want).norm() < 2e-4 * want.norm(), f"micro {micro}: {(got - want).norm() / want.norm():.1e}"
            assert m["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
            assert m.get("rms_pref") == (metrics["rms_pref"] and pytest.approx(metrics["rms_pref"], rel=1e-3)
                                         if field == "dipole" else None)
            # the reward sees each picture once, with its own prompt
            assert sum((p for _, p in score.seen), []) == [p for p in PROMPTS for _ in range(6)]
            torch.testing.assert_close(torch.cat([x for x, _ in score.seen]), whole.seen[0][0], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_one_step_equals_pipeline(self, kind, _dp_models):
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(_dp_models / kind)
        G, e = _dp_open(_dp_models / kind), _dp_noise()
        want = _dp_pipe_sample(pipe, e)
        got = _dp_sample(G, e)
        assert (want[0] - want[1]).abs().max() > 1
        _dp_close(got, want.double().numpy(), 2e-5)
        with torch.no_grad():
            images = G.decode(got)
        want = _dp_pipe_sample(pipe, e, "pt")
        assert want.std() > 0.02, "no picture"
        _dp_close(images, want.double().numpy(), 2e-5)
        swapped = _dp_sample(G, e, PROMPTS[::-1])
        assert (swapped - got).abs().max() > 1e-3, "the prompt counts"

    def test_resume_is_exact(self, _dp_models, _dp_home):
        """4 steps at once and 2 + 2 with a new process between, with a reward that draws from every generator; and what
        --resume finds in metrics.jsonl may know the future, be torn, blank or twice there."""
        whole = _DpRun(_dp_argv(_dp_models, "whole", "own.py:drawing"), _dp_home)
        half = _DpRun(_dp_argv(_dp_models, "half", "own.py:drawing", save_every=2), _dp_home)
        assert whole.wait() == 0 and half.wait() == 0, whole.err + half.err
        folder = _dp_home / "half"
        os.replace(folder / "checkpoint.previous.pt", folder / "checkpoint.pt")
        assert _dp_state(folder)["step"] == 2
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        (folder / "metrics.jsonl").write_text("\n".join([lines[0], "", lines[1], lines[1], "null", lines[2], lines[3][:40]]))
        rest = _DpRun(["--resume", "half"], _dp_home)
        assert rest.wait() == 0, rest.err
        assert [m["step"] for m in _dp_metrics(folder)] == [1, 2, 3, 4]
        assert _dp_metrics(folder) == _dp_metrics(_dp_home / "whole")
        a, b = _dp_state(folder), _dp_state(_dp_home / "whole")
        assert _dp_same(a["weights"], b["weights"]) and a["position"] == b["position"] == 8
        for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
            assert torch.equal(x["exp_avg"], y["exp_avg"]) and torch.equal(x["exp_avg_sq"], y["exp_avg_sq"])

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    @pytest.mark.parametrize("file", ("pytorch_lora_weights.safetensors", "kohya_lora.safetensors"))
    def test_exported_lora_in_diffusers_with_peft(self, kind, file, _dp_models, tmp_path):
        """The same picture, rank not equal to alpha; kohya's file through diffusers' own conversion."""
        from diffusers import DiffusionPipeline
        G, e = _dp_open(_dp_models / kind), _dp_noise()
        base = _dp_sample(G, e)
        _dp_random_lora(G, rank=4, alpha=6.0)
        tuned = _dp_sample(G, e)
        G.save_lora(tmp_path)
        pipe = DiffusionPipeline.from_pretrained(_dp_models / kind)
        pipe.load_lora_weights(tmp_path, weight_name=file)
        assert (tuned - base).square().mean().sqrt() > 0.05 * base.square().mean().sqrt(), "the LoRA does something"
        _dp_close(_dp_pipe_sample(pipe, e), tuned.double().numpy(), 3e-5)
        with torch.no_grad():
            want = G.decode(tuned)
        _dp_close(_dp_pipe_sample(pipe, e, "pt"), want.double().numpy(), 3e-5)

    @pytest.mark.slow
    def test_the_toy_improves_and_reversed_falls(self, tmp_path):
        """After a short run held-out captions are followed better than by the base; with the ranking reversed, worse."""
        captions, scene_reward = rewards.load_prompts("scenes-test")[::2], rewards.load("scene")
        G, found = drpo.load_generator("toy"), {}
        found["base"] = _dp_toy_score(G, captions, scene_reward)
        for name, reward, steps in (("tuned", "scene", 30), ("reversed", f"{HERE / 'lab' / 'ablate.py'}:scene_reversed", 14)):
            done = subprocess.run([sys.executable, str(HERE / "drpo.py"), "--model", "toy", "--steps", str(steps),
                                   "--batch", "4", "--candidates", "16", "--anchors", "4", "--lr", "3e-3",
                                   "--preview-every", "0", "--device", "cpu", "--reward", reward,
                                   "--out", str(tmp_path / name)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            G.load_lora(tmp_path / name)
            found[name] = _dp_toy_score(G, captions, scene_reward)
        assert found["tuned"] - found["base"] > 0.03 and found["base"] - found["reversed"] > 0.02, found
        assert _dp_metrics(tmp_path / "tuned")[-1]["diversity"] > 0.8


# ===== drpo.py: 1. The field

def _dp_check_rank(scores, m, positive, negative):
    """The rules of rank-only training, one by one, for one prompt."""
    valid = [i for i, s in enumerate(scores) if s == s]
    best, worst = [i for i in valid if positive[i]], [i for i in valid if negative[i]]
    assert sum(positive) == len(best) and sum(negative) == len(worst), "NaN is no anchor"
    assert all(scores[i] > scores[j] for i in best for j in worst), "never equally scored on both sides"
    assert len(best) <= m and len(worst) <= m
    distinct = sorted({scores[i] for i in valid})
    if len(distinct) < 2:
        assert not best and not worst
        return
    assert best and worst, "two opinions that differ give two anchors"
    # those taken are the extreme ones
    assert all(scores[i] <= min(scores[j] for j in best) for i in valid if i not in best)
    assert all(scores[i] >= max(scores[j] for j in worst) for i in valid if i not in worst)
    if len(distinct) == len(valid):  # no ties: full sets, at most half of the opinions each
        assert len(best) == len(worst) == min(m, len(valid) // 2)


class TestTheField:
    """Fields, ranking, targets and loss, against float64 loops written from the equations alone."""

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("radii", RADII)
    def test_released_field_equals_float64_loop(self, kernel, radii):
        z, reference, positive, negative = _dp_sets(3)
        want, s_want = _dp_released(*_dp_64(z, positive, negative), radii, kernel)
        got, s = drpo.released_field(z, positive, negative, radii=radii, kernel=kernel)
        _dp_close(got, want)
        assert float(s) == pytest.approx(s_want, rel=1e-5)
        want, s_want = _dp_released(*_dp_64(z, reference, z), radii, kernel, negative_is_self=True)
        got, s = drpo.released_field(z, reference, z, radii=radii, kernel=kernel, negative_is_self=True)
        _dp_close(got, want)
        assert float(s) == pytest.approx(s_want, rel=1e-5)

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("radius", (0.1, 0.4, 1.5))
    def test_dipole_field_is_gradient_of_energy(self, kernel, radius):
        z, other, _, _ = _dp_sets(5)
        for positive, negative in ((other[:3], other[3:5]), (z[:3].clone(), z[5:].clone())):
            x = z.clone().requires_grad_()
            energy = drpo.dipole_energy(x, positive, negative, radius=radius, kernel=kernel)
            assert energy.shape == (9,)
            gradient, = torch.autograd.grad(energy.sum(), x)
            V, rms = drpo.dipole_field(z, positive, negative, radii=(radius,), kernel=kernel, return_rms=True)
            # cosine: at z = a, where cos has its maximum, autograd's 0 is a difference of two numbers of size e^(1/radius)
            _dp_close(V * rms, gradient.double().numpy(), 2e-4 if kernel == "cosine" else 1e-5)

    def test_dipole_energy_value(self):
        z, other, _, _ = _dp_sets(6)
        positive, negative = other[:3], other[3:5]
        s = _dp_scale([(x, y) for x in _dp_64(z)[0] for y in _dp_64(other[:5])[0]])
        for kernel in KERNELS:
            signed = list(zip(_dp_64(other[:5])[0], (1, 1, 1, -1, -1)))
            want = [sum(math.exp(_dp_log_k(x, a, 0.3 * s, 0.3, kernel)) * sign for a, sign in signed) for x in _dp_64(z)[0]]
            _dp_close(drpo.dipole_energy(z, positive, negative, radius=0.3, kernel=kernel), np.array(want))

    def test_swapping_best_and_worst_flips_the_dipole(self):
        z, _, positive, negative = _dp_sets(7)
        for kernel in KERNELS:
            V = drpo.dipole_field(z, positive, negative, radii=(0.2, 1.0), kernel=kernel)
            assert V.abs().max() > 0.1
            _dp_close(-drpo.dipole_field(z, negative, positive, radii=(0.2, 1.0), kernel=kernel), V.double().numpy())

    def test_translation_and_scale(self):
        """The fields know only differences; a sample's own size is no length (cosine, which knows angles, excepted)."""
        z, reference, positive, negative = _dp_sets(8)
        for kernel in ("laplacian", "rbf"):
            kw = dict(radii=(0.2, 0.5), kernel=kernel)
            fields = (lambda f: drpo.dipole_field(f(z), f(positive), f(negative), **kw),
                      lambda f: drpo.reference_drift(f(z), f(reference), **kw),
                      lambda f: drpo.released_field(f(z), f(positive), f(negative), **kw)[0])
            for field in fields:
                V = field(lambda x: x).double().numpy()
                _dp_close(field(lambda x: x + torch.linspace(-3, 3, 7)), V, 1e-4)
                _dp_close(field(lambda x: 8 * x), V, 1e-4)
            V = drpo.dipole_field(z, positive, negative, **kw)
            turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))[0]
            turned = z @ turn
            _dp_close(drpo.dipole_field(turned, turned[:3], turned[-3:], **kw), (V @ turn).double().numpy(), 1e-4)

    def test_dipole_points_to_the_best(self):
        """A lone positive pulls every sample straight to itself, a lone negative straight away; the sample itself stays."""
        z, _, _, _ = _dp_sets(9)
        a = z[2:3].clone()
        nothing = z[:0]
        toward = drpo.dipole_field(z, a, nothing, radii=(0.5,), kernel="laplacian")
        away = drpo.dipole_field(z, nothing, a, radii=(0.5,), kernel="laplacian")
        others = [i for i in range(9) if i != 2]
        assert torch.cosine_similarity(toward[others], (a - z)[others]).min() > 0.99999
        assert torch.cosine_similarity(away[others], (z - a)[others]).min() > 0.99999
        assert toward[2].abs().max() == 0 and away[2].abs().max() == 0

    def test_fields_where_everything_is_equal_or_lonely(self):
        """No division by zero: one sample, equal samples, no anchors."""
        z = torch.ones(4, 5)
        for kernel in KERNELS:
            kw = dict(radii=(0.2,), kernel=kernel)
            assert drpo.dipole_field(z, z[:1], z[1:2], **kw).isfinite().all()
            assert drpo.reference_drift(z, z, **kw).isfinite().all()
            assert drpo.released_field(z, z[:1], z[1:2], **kw)[0].isfinite().all()
        lone, target = torch.zeros(1, 3), torch.tensor([[3.0, 4.0, 0.0]])
        _dp_close(drpo.reference_drift(lone, target, radii=(0.5,), kernel="laplacian"), np.array([[0.6, 0.8, 0]]) * math.sqrt(3))

    def test_no_anchors_no_force(self):
        z = _dp_sets(4)[0]
        V, rms = drpo.dipole_field(z, z[:0], z[:0], radii=(0.2, 1.0), kernel="laplacian", return_rms=True)
        assert V.shape == z.shape and V.abs().max() == 0 and rms.tolist() == [0, 0]
        assert drpo.released_field(z, z[:0], z[:0], radii=(0.2,), kernel="laplacian")[0].abs().max() == 0

    @pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
    def test_any_dtype_comes_in_float32_goes_out(self, dtype):
        z, reference, positive, negative = (t.to(dtype) for t in _dp_sets(13))
        want = _dp_dipole(*_dp_64(z, positive, negative), (0.5,), "laplacian")[0]
        got = drpo.dipole_field(z, positive.double(), negative, radii=(0.5,), kernel="laplacian")
        assert got.dtype == torch.float32
        _dp_close(got, want)
        for field in (drpo.reference_drift(z.to(dtype), reference, radii=(0.5,), kernel="laplacian"),
                      drpo.released_field(z.to(dtype), positive, negative.double(), radii=(0.5,), kernel="laplacian")[0]):
            assert field.dtype == torch.float32 and field.isfinite().all()

    def test_unknown_kernel_is_refused_where_it_is_computed(self):
        z, reference, positive, negative = _dp_sets(14)
        for field in (lambda: drpo.dipole_energy(z, positive, negative, radius=0.5, kernel="laplace"),
                      lambda: drpo.dipole_field(z, positive, negative, radii=(0.5,), kernel="laplace"),
                      lambda: drpo.reference_drift(z, reference, radii=(0.5,), kernel="laplace"),
                      lambda: drpo.released_field(z, positive, negative, radii=(0.5,), kernel="laplace")):
            with pytest.raises(ValueError, match="laplace.*laplacian"):
                field()

    def test_rank_every_small_case(self):
        """All patterns of 6 scores out of 3 values and NaN, m = 1..3."""
        for row in itertools.product((0.0, 1.0, 2.0, math.nan), repeat=6):
            for m in (1, 2, 3):
                positive, negative = drpo.rank(torch.tensor(row), m)
                assert positive.dtype == negative.dtype == torch.bool
                _dp_check_rank(row, m, positive.tolist(), negative.tolist())

    def test_rank_values(self):
        positive, negative = drpo.rank(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 0.0]), 2)
        assert positive.tolist() == [False, False, False, True, True, False]
        assert negative.tolist() == [False, True, False, False, False, True]
        positive, negative = drpo.rank(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]), 2)
        assert positive.tolist() == [True, True, False, False, False, False]
        assert negative.sum() == 2 and not negative[:2].any()

    def test_rank_knows_only_the_order(self):
        g = torch.Generator().manual_seed(0)
        for _ in range(60):
            scores = torch.randint(0, 8, (12,), generator=g).double()
            for f in (lambda x: 1000 * x - 7, torch.exp, lambda x: -torch.exp(-x), lambda x: x ** 3 / 1e20,
                      lambda x: 1e6 + 1e-3 * x, lambda x: torch.exp(90 * x)):  # beyond what float32 tells apart or holds
                for a, b in zip(drpo.rank(scores, 4), drpo.rank(f(scores), 4)):
                    assert torch.equal(a, b)

    def test_loss_values(self):
        """sum of weight ||z - z*||^2 by the equations, for both fields, where z is the features that gave the targets."""
        z, reference, positive, negative = _dp_sets(11)
        a = _dp_64(z, reference, positive, negative)
        kw = dict(radii=(0.2, 0.5), kernel="laplacian")
        eta, weight = 0.7, 0.3

        terms, _ = drpo.dipole_target(z, reference, positive, negative, _dp_config(lambda_ref=weight, eta=eta))
        V = _dp_dipole(a[0], a[2], a[3], **kw)[0] + weight * _dp_drift(a[0], a[1], **kw)[0]
        loss = drpo.regression_loss(z, terms)
        assert float(loss) == pytest.approx(0.5 * float(((eta * V) ** 2).mean()), rel=1e-5)
        x = z.clone().requires_grad_()
        gradient, = torch.autograd.grad(drpo.regression_loss(x, terms), x)
        _dp_close(gradient / gradient.square().mean().sqrt(), -V / math.sqrt((V ** 2).mean()), 1e-4)

        terms, _ = drpo.released_target(z, reference, positive, negative, _dp_config(lambda_ref=weight))
        force, s = _dp_released(a[0], a[2], a[3], **kw)
        drift, s_ref = _dp_released(a[0], a[1], a[0], negative_is_self=True, **kw)
        want = float((force ** 2).mean()) + weight * float((drift ** 2).mean())
        assert float(drpo.regression_loss(z, terms)) == pytest.approx(want, rel=1e-5)
        unit, unit_ref = s / math.sqrt(7), s_ref / math.sqrt(7)
        want = float(((0.1 - unit * force) ** 2).mean()) / unit ** 2
        want += weight * float(((0.1 - unit_ref * drift) ** 2).mean()) / unit_ref ** 2
        assert float(drpo.regression_loss(z + 0.1, terms)) == pytest.approx(want, rel=1e-4)

    def test_target_is_detached(self):
        z, reference, positive, negative = (t.clone().requires_grad_() for t in _dp_sets(12))
        for field in (drpo.dipole_target, drpo.released_target):
            x = z.detach().clone().requires_grad_()
            terms, _ = field(z, reference, positive, negative, _dp_config())
            drpo.regression_loss(x, terms).backward()
            assert x.grad.abs().max() > 0
            assert all(t.grad is None for t in (z, reference, positive, negative))

    def test_mathematics_runs_alone(self, tmp_path):
        """The first section, cut out of the file, needs torch and nothing else, and computes the same."""
        text = (HERE / "drpo.py").read_text()
        section, = re.findall(r"^# =+ 1\. .*?(?=^# =+ 2\. )", text, re.M | re.S)
        (tmp_path / "field.py").write_text("import torch\nimport torch.nn.functional as F\n" + section)
        (tmp_path / "use.py").write_text(
            "import sys, types, torch, field\n"
            "torch.manual_seed(0)\n"
            "z = torch.randn(6, 4); r = z + .1\n"
            "cfg = types.SimpleNamespace(radii=(.2, .5), kernel='laplacian', eta=1., lambda_ref=.2)\n"
            "positive, negative = field.rank(torch.arange(6.), 2)\n"
            "p, n = z[positive], z[negative]\n"
            "kw = dict(radii=(.2,), kernel='laplacian')\n"
            "out = [field.dipole_field(z, p, n, **kw), field.reference_drift(z, r, **kw),\n"
            "       field.released_field(z, p, n, **kw)[0], field.dipole_energy(z, p, n, radius=.2, kernel='laplacian'),\n"
            "       field.regression_loss(z, field.dipole_target(z, r, p, n, cfg)[0])]\n"
            "assert not {'diffusers', 'transformers', 'drpo', 'PIL'} & set(sys.modules), 'torch only'\n"
            "torch.save(out, 'out.pt')\n")
        done = subprocess.run([sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.'); import use"], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out = torch.load(tmp_path / "out.pt", weights_only=True)
        torch.manual_seed(0)
        z = torch.randn(6, 4)
        p, n = z[4:], z[:2]
        kw = dict(radii=(0.2,), kernel="laplacian")
        want = [drpo.dipole_field(z, p, n, **kw), drpo.reference_drift(z, z + 0.1, **kw),
                drpo.released_field(z, p, n, **kw)[0], drpo.dipole_energy(z, p, n, radius=0.2, kernel="laplacian")]
        for got, w in zip(out, want):
            torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-6)


# ===== drpo.py: 2. Features

def _dp_stats(h):
    """Global mean, population std and the means of the four quarters of (B, C, H, W), by numpy in float64."""
    h = h.double().numpy()
    a, b = h.shape[2] // 2, h.shape[3] // 2
    quarters = [h[:, :, y:y + a, x:x + b].mean((2, 3)) for y in (0, a) for x in (0, b)]
    return h.mean((2, 3)), np.sqrt(h.var((2, 3)) + 1e-6), np.stack(quarters, -1).reshape(len(h), -1)

def _dp_compare_maps(got, want, tolerance=2e-5):
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert g.dtype == torch.float32
        w = w if w.ndim == 3 else w[:, None]
        assert g.shape == w.shape
        _dp_close(g.detach(), w, tolerance)

def _dp_pil_224(images):
    """(B, 3, 32, 32) in [0, 1] -> ImageNet-normalised (B, 3, 224, 224), by PIL's bicubic, channel by channel."""
    out = [[np.asarray(Image.fromarray(c.numpy(), mode="F").resize((224, 224), Image.BICUBIC)) for c in image]
           for image in images]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.from_numpy(np.array(out)) - mean) / std

def _dp_vit_maps(h):
    h = h.double().numpy()
    return [h[:, 1:].mean(1), np.sqrt(h[:, 1:].var(1) + 1e-6), h[:, 0]]

MAE_BLOCKS = (2, 1, 2, 1)

def _dp_mae_state():
    """Random weights of a latent-MAE of width 32 under the authors' names, in JAX's layout: .kernel HWIO, .scale."""
    g, state = torch.Generator().manual_seed(0), {}

    def conv(name, size, c_in, c):
        state[f"encoder.{name}.kernel"] = torch.randn(size, size, c_in, c, generator=g) / math.sqrt(size * size * c_in)

    def norm(name, c):
        state[f"encoder.{name}.scale"] = 1 + 0.2 * torch.randn(c, generator=g)
        state[f"encoder.{name}.bias"] = 0.2 * torch.randn(c, generator=g)

    conv("conv1", 3, 4, 32), norm("gn1", 32)
    c_in = 32
    for s, n in enumerate(MAE_BLOCKS):
        c = 32 * 2 ** s
        for b in range(n):
            name = f"stages_{s}.layers_{b}"
            conv(f"{name}.conv1", 3, c_in, c), norm(f"{name}.gn1", c)
            conv(f"{name}.conv2", 3, c, c), norm(f"{name}.gn2", c)
            if b == 0 and c_in != c:
                conv(f"{name}.proj_conv", 1, c_in, c), norm(f"{name}.proj_gn", c)
            c_in = c
        norm(f"layer{s + 1}_norm", c)
    state["decoder.conv1.kernel"] = torch.randn(3, 3, 4, 4, generator=g)  # the file has a decoder too
    return state

def _dp_mae_forward(state, x):
    """The last stage, in float64, functionally."""
    state = {k: v.double() for k, v in state.items()}

    def conv(name, x, stride=1):
        kernel = state[f"encoder.{name}.kernel"].permute(3, 2, 0, 1)
        return torch.nn.functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(name, x):
        groups = x.reshape(len(x), 32, -1)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        scale, bias = (state[f"encoder.{name}.{part}"][:, None, None] for part in ("scale", "bias"))
        return groups.reshape(x.shape) * scale + bias

    h = norm("gn1", conv("conv1", x.double())).relu()
    for s, n in enumerate(MAE_BLOCKS):
        for b in range(n):
            name, stride = f"stages_{s}.layers_{b}", 2 if b == 0 and s > 0 else 1
            y = norm(f"{name}.gn2", conv(f"{name}.conv2", norm(f"{name}.gn1", conv(f"{name}.conv1", h, stride)).relu()))
            if f"encoder.{name}.proj_conv.kernel" in state:
                h = norm(f"{name}.proj_gn", conv(f"{name}.proj_conv", h, stride))
            h = (h + y).relu()
        h = norm(f"layer{s + 1}_norm", h)
    return h


class TestFeatures:
    """Against hooks, written-out forwards and float64."""

    def test_vae_features(self, _dp_models):
        """Against hooks on a whole decode of the pipeline's VAE."""
        from diffusers import AutoencoderKL
        G = _dp_open(_dp_models / "sd")
        phi, x = drpo.load_features("vae", G), 3 * _dp_noise(3)
        vae, seen = AutoencoderKL.from_pretrained(_dp_models / "sd", subfolder="vae"), []
        for block in (vae.decoder.mid_block, vae.decoder.up_blocks[0], vae.decoder.up_blocks[1]):
            block.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        with torch.no_grad():
            vae.decode(x / 0.18215)
        _dp_compare_maps(phi(x, None), [m for h in seen for m in _dp_stats(h)])

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_unet_features(self, kind, _dp_models):
        """Against hooks on the pipeline's own UNet; the LoRA does not reach them."""
        from diffusers import DiffusionPipeline
        G, x = _dp_open(_dp_models / kind), 3 * _dp_noise(2)
        c = G.encode(PROMPTS)
        pipe, seen = DiffusionPipeline.from_pretrained(_dp_models / kind), []
        blocks = (pipe.unet.down_blocks[-1], pipe.unet.mid_block, pipe.unet.up_blocks[0])
        for block in blocks:
            block.register_forward_hook(
                lambda module, args, out: seen.append((out[0] if isinstance(out, tuple) else out).detach()))
        noise = drpo.prompt_noise(0, 0, (4, 8, 8))
        added = None
        if kind == "sdxl":
            text, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(2, -1)}
        else:
            text = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        with torch.no_grad():
            pipe.unet(x + 0.1 * noise, 100, text, added_cond_kwargs=added)
        want = []
        for h in seen:
            h = h.double().numpy()
            size = min(4, h.shape[-1])
            n = h.shape[-1] // size
            want.append(h.reshape(*h.shape[:2], n, size, n, size).mean((3, 5)).reshape(len(h), -1))
        phi = drpo.load_features("unet", G)
        with torch.no_grad():
            _dp_compare_maps(phi(x, c), want)
            _dp_random_lora(G)
            _dp_compare_maps(phi(x, c), want)

    def test_mae_features_are_unmasked(self, _dp_models, tmp_path):
        """All patches, in their order, none masked: a forward written out here, from the patches to hidden_states[12]."""
        import transformers
        torch.manual_seed(0)
        net = transformers.ViTMAEModel(
            transformers.ViTMAEConfig(hidden_size=16, num_hidden_layers=14, num_attention_heads=2, intermediate_size=32,
                                      patch_size=32, image_size=224)).eval()
        net.save_pretrained(tmp_path)
        G, x = _dp_open(_dp_models / "sd"), 2 * _dp_noise(2)
        phi = drpo.load_features(f"mae@{tmp_path}", G)
        with torch.no_grad():
            pixels = _dp_pil_224(G.decode(x))
            emb = net.embeddings
            h = torch.nn.functional.conv2d(pixels, emb.patch_embeddings.projection.weight,
                                           emb.patch_embeddings.projection.bias, stride=32)
            h = h.flatten(2).mT + emb.position_embeddings[:, 1:]
            h = torch.cat([(emb.cls_token + emb.position_embeddings[:, :1]).expand(2, -1, -1), h], 1)
            for layer in net.encoder.layer[:12] if hasattr(net, "encoder") else net.layers[:12]:
                h = layer(h)
                h = h[0] if isinstance(h, tuple) else h
            got = phi(x, None)
            _dp_compare_maps(got, _dp_vit_maps(h), 1e-3)
            torch.manual_seed(99)
            for a, b in zip(got, phi(x, None)):
                assert torch.equal(a, b)

    def test_dino_features(self, _dp_models, tmp_path):
        import transformers
        torch.manual_seed(0)
        net = transformers.Dinov2Model(
            transformers.Dinov2Config(hidden_size=16, num_hidden_layers=13, num_attention_heads=2, mlp_ratio=2,
                                      patch_size=32, image_size=224)).eval()
        net.save_pretrained(tmp_path)
        G, x = _dp_open(_dp_models / "sd"), 2 * _dp_noise(2)
        with torch.no_grad():
            h = net.embeddings(_dp_pil_224(G.decode(x)))
            for layer in list(net.encoder.layer)[:12]:
                h = layer(h)
                h = h[0] if isinstance(h, tuple) else h
            _dp_compare_maps(drpo.load_features(f"dino@{tmp_path}", G)(x, None), _dp_vit_maps(h), 1e-3)

    @pytest.mark.parametrize("form", ("jax", "torch", "nested"))
    def test_latent_mae_features(self, form, _dp_models, tmp_path):
        """Both forms of the authors' keys and layouts against a functional float64 forward: global, 2x2 and 4x4 maps."""
        state = _dp_mae_state()
        stored = state
        if form != "jax":
            stored = {(k[:-7] + ".weight" if k.endswith(".kernel") else k[:-6] + ".weight" if k.endswith(".scale") else k):
                      (v.permute(3, 2, 0, 1).contiguous() if k.endswith(".kernel") else v) for k, v in state.items()}
        torch.save({"metadata": {"step": 3}, "state_dict": {f"module.{k}": v for k, v in stored.items()}} if form == "nested" else stored, tmp_path / "mae.pth")
        G = _dp_open(_dp_models / "sd")
        phi = drpo.load_features(f"latent-mae@{tmp_path / 'mae.pth'}", G)
        for side in (64, 8):
            x = 2 * torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))
            h = _dp_mae_forward(state, x).numpy()
            n = side // 8
            want = [h.mean((2, 3)), np.sqrt(h.var((2, 3)) + 1e-6)]
            for p in (2, 4):
                if n > p:
                    patches = h.reshape(2, -1, n // p, p, n // p, p).transpose(0, 2, 4, 1, 3, 5)
                    patches = patches.reshape(2, (n // p) ** 2, -1, p * p)
                    want += [patches.mean(-1), np.sqrt(patches.var(-1) + 1e-6)]
            assert len(want) == (6 if side == 64 else 2)
            with torch.no_grad():
                # a constant map's std is sqrt(1e-6): float32 rounding shows in it
                _dp_compare_maps(phi(x, None), want, 1e-4)

    def test_latent_mae_in_half_precision_keeps_small_gradients(self, _dp_models, tmp_path):
        """In fp16 the way back through the network is scaled: a loss of 1e-9 has the gradient of float32, not zero."""
        torch.save(_dp_mae_state(), tmp_path / "mae.pth")
        x, gradients = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), {}
        for dtype in (torch.float32, torch.float16):
            G = _dp_open(_dp_models / "sd", dtype)
            leaf = x.clone().requires_grad_()
            maps = drpo.load_features(f"latent-mae@{tmp_path / 'mae.pth'}", G)(leaf, None)
            (1e-9 * sum((i + 1) * z.square().sum() + z.sum() for i, z in enumerate(maps)) + 1e-9 * leaf.sum()).backward()
            gradients[dtype] = leaf.grad.double().flatten() * 1e9
        want, got = gradients[torch.float32], gradients[torch.float16]
        assert want.norm() > 1 and (got - want).norm() < 0.1 * want.norm()

    def test_latent_mae_never_unpickles(self, _dp_models, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (Path.write_text, (tmp_path / "exploded", "x"))
        torch.save({"encoder.conv1.kernel": Bomb()}, tmp_path / "mae.pth")
        with pytest.raises(Exception):
            drpo.load_features(f"latent-mae@{tmp_path / 'mae.pth'}", _dp_open(_dp_models / "sd"))
        assert not (tmp_path / "exploded").exists()

    def test_features_are_deterministic_frozen_and_joined(self, _dp_models):
        """The same vectors each time, for each image alone, whatever the RNG; gradient to x only; a comma joins lists."""
        G, x = _dp_open(_dp_models / "sd"), 3 * _dp_noise(3)
        c = G.encode([*PROMPTS, "a dog"])
        single = {name: drpo.load_features(name, G)(x, c) for name in ("vae", "unet")}
        phi = drpo.load_features("vae,unet", G)
        torch.manual_seed(5)
        joined = phi(x, c)
        for a, b in zip(joined, sum(single.values(), []), strict=True):
            assert torch.equal(a, b)
        for i in range(3):
            for a, b in zip(joined, phi(x[i:i + 1], drpo.rows(c, slice(i, i + 1)))):
                _dp_close(b[0], a[i].double().numpy(), 1e-4)
        leaf = x.clone().requires_grad_()
        sum(h.square().sum() for h in phi(leaf, c)).backward()
        assert leaf.grad.abs().max() > 0
        networks = (G.unet, G.vae, G.pipe.text_encoder)
        assert all(not p.requires_grad and p.grad is None for net in networks for p in net.parameters())
        assert not any(net.training for net in networks)

    def test_a_feature_of_ones_own_needs_one_entry(self, _dp_tuned, monkeypatch):
        """In the table, and nowhere else: it is known to the checks, trains, and is exact in chunks."""
        def factory(G, path=None):
            assert path == "7"
            return lambda x, condition: [x.flatten(1)[:, None] * float(path)]
        monkeypatch.setitem(drpo.FEATURES, "mine", factory)
        G, params = _dp_tuned
        drpo.check(drpo.Config(features="mine@7"))
        whole, part = (_dp_gradient(G, params, "mine@7", micro)[0] for micro in (12, 5))
        assert whole.norm() > 0 and (part - whole).norm() < 2e-4 * whole.norm()
        monkeypatch.setitem(drpo.FIELDS, "reversed", lambda z, r, a, b, cfg: drpo.dipole_target(z, r, b, a, cfg))
        cfg = dict(anchors=2, lambda_ref=0.0)
        drpo.check(drpo.Config(field="reversed"))
        plain = _dp_gradient(G, params, "mine@7", 12, _dp_config(**cfg))[0]
        assert (_dp_gradient(G, params, "mine@7", 12, _dp_config(field="reversed", **cfg))[0] + plain).norm() < 1e-4 * plain.norm()


# ===== drpo.py: 3. The generator

SCHEDULES = {  # what the pipeline of diffusers is asked for: scheduler, its settings, t of the one step
    "euler": ("EulerDiscreteScheduler", dict(timestep_spacing="trailing"), 999),
    "euler-linspace": ("EulerDiscreteScheduler", dict(timestep_spacing="linspace"), 0),
    "euler-leading": ("EulerDiscreteScheduler", dict(timestep_spacing="leading", steps_offset=1), 1),
    "ancestral": ("EulerAncestralDiscreteScheduler", dict(timestep_spacing="trailing"), 999),
    "ancestral-linspace": ("EulerAncestralDiscreteScheduler", dict(timestep_spacing="linspace"), 0),
    "lcm-399": ("LCMScheduler", dict(), 399),  # DMD2
    "lcm-800": ("LCMScheduler", dict(), 800),
    "tcd": ("TCDScheduler", dict(), 999),
    "ddim": ("DDIMScheduler", dict(timestep_spacing="trailing", clip_sample=False), 999),
    "ddpm": ("DDPMScheduler", dict(timestep_spacing="trailing", clip_sample=False), 999),
    "dpm": ("DPMSolverMultistepScheduler", dict(timestep_spacing="trailing"), 999),
}

BROKEN = {  # what is done to a folder of a model -> words of the line
    "text encoder renamed": ("text", "text_encoder"),
    "text encoder 2 cut": ("text2", "text_encoder_2"),
    "unet cut": ("unet", "unet: 1 missing weights, conv_in.bias"),
    "unet with a LoRA": ("lora", "unexpected"),
    "vae cut": ("vae", "vae"),
    "truncated": ("truncated", ""),
    "LFS pointer": ("pointer", ""),
    "latents_mean": ("latents_mean", "vae has latents_mean"),
    "in_channels": ("in_channels", "9"),
    "time_cond_proj_dim": ("time_cond", "time_cond_proj_dim"),
    "refiner": ("refiner", "text_encoder"),
    "sample_size": ("sample_size", "sample_size"),
}

def _dp_foreign(G, rank=3):
    """Random LoRA weights for the layers of a generator, {layer: (down, up)}, of different ranks."""
    g, found = torch.Generator().manual_seed(7), {}
    for n, (name, base) in enumerate(G.attention_layers().items()):
        r = rank + n % 2
        found[name] = (torch.randn(r, base.in_features, generator=g) * 0.1,
                       torch.randn(base.out_features, r, generator=g) * 0.1)
    return found

FORMS = {  # (prefix, end of down, end of up, whether alpha is a tensor beside them)
    "diffusers": ("unet.", ".lora_A.weight", ".lora_B.weight", False),
    "peft": ("base_model.model.", ".lora_A.weight", ".lora_B.weight", False),
    "plain": ("", ".lora.down.weight", ".lora.up.weight", False),
    "alpha": ("unet.", ".lora_down.weight", ".lora_up.weight", True),
}


class TestTheGenerator:
    """Sampling against diffusers, LoRA files against peft and by hand, bases read whole."""

    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
    def test_one_step_of_other_schedulers(self, name, prediction, _dp_models, capsys):
        """One formula for all: the timestep, abar and the kind of prediction; against the pipelines in one step."""
        import diffusers
        cls, settings, t = SCHEDULES[name]
        if "Ancestral" in cls and prediction == "sample":
            pytest.skip("diffusers' own scheduler has no sample prediction")
        pipe = diffusers.DiffusionPipeline.from_pretrained(_dp_models / "sd")
        kept = {k: v for k, v in pipe.scheduler.config.items() if k.startswith("beta") or k == "num_train_timesteps"}
        pipe.scheduler = getattr(diffusers, cls)(**kept, prediction_type=prediction, **settings)
        e, prompts = _dp_noise(), PROMPTS
        kw = dict(timesteps=[t]) if cls == "LCMScheduler" else dict(num_inference_steps=1)
        pipe.set_progress_bar_config(disable=True)
        want = pipe(prompt=prompts, latents=e.clone(), guidance_scale=0.0, height=32, width=32, output_type="latent",
                    generator=torch.Generator().manual_seed(0), **kw).images
        capsys.readouterr()
        G = drpo.Generator(pipe, timestep=t)
        x = _dp_sample(G, e)
        if name == "tcd":  # it ends at abar_0 instead of 1: sqrt(abar_0) x + sqrt(1 - abar_0) eps, by hand
            eps, last = (e - math.sqrt(G.abar) * x) / math.sqrt(1 - G.abar), float(pipe.scheduler.alphas_cumprod[0])
            x = math.sqrt(last) * x + math.sqrt(1 - last) * eps
        _dp_close(x, want.double().numpy(), 5e-5)
        # a schedule that would start elsewhere does not decide in silence
        capsys.readouterr()
        drpo.Generator(pipe)
        said = capsys.readouterr().err
        pipe.scheduler.set_timesteps(1)
        assert (cls in said and "t = 999" in said) == (int(pipe.scheduler.timesteps[0]) != 999), said

    def test_timestep_and_prediction_outside_are_refused(self, _dp_models):
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(_dp_models / "sd")
        with pytest.raises(UserError, match="--timestep is 1000.*0 to 999"):
            drpo.Generator(pipe, timestep=1000)
        with pytest.raises(UserError, match="epsilonn.*epsilon"):
            drpo.Generator(pipe, prediction="epsilonn")

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_unet_from_a_file(self, kind, _dp_models, tmp_path):
        """DMD2, Hyper-SD and SDXL-Lightning are UNets for a base: both formats, sampled as their cards say."""
        import diffusers
        from safetensors.torch import save_file
        torch.manual_seed(5)
        base = diffusers.DiffusionPipeline.from_pretrained(_dp_models / kind)
        for p in base.unet.parameters():
            p.data += 0.02 * torch.randn(p.shape)
        file = tmp_path / ("unet.safetensors" if kind == "sdxl" else "unet.bin")
        state = {k: v.contiguous() for k, v in base.unet.state_dict().items()}
        save_file(state, file) if kind == "sdxl" else torch.save(state, file)
        kept = {k: v for k, v in base.scheduler.config.items() if k.startswith("beta")}
        base.scheduler = diffusers.LCMScheduler(**kept)
        base.set_progress_bar_config(disable=True)
        e = _dp_noise()
        want = base(prompt=PROMPTS, latents=e.clone(), timesteps=[399], guidance_scale=0.0, height=32, width=32,
                    output_type="latent").images
        G = drpo.load_generator(str(_dp_models / kind), unet=str(file), timestep=399)
        # k = 1 is LCM's; the tiny base's own Euler scheduler, trailing, begins at sigma
        G.k = 1.0
        _dp_close(_dp_sample(G, e), want.double().numpy(), 5e-5)
        del state["conv_in.weight"]
        torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "other.bin")
        with pytest.raises(UserError, match="other.bin.*conv_in.weight"):
            drpo.load_generator(str(_dp_models / kind), unet=str(tmp_path / "other.bin"))
        with pytest.raises(UserError, match="owner/repo/file"):
            drpo.load_generator(str(_dp_models / kind), unet="nowhere.bin")

    def test_lightning_predicts_the_sample(self, _dp_models):
        """--prediction sample with a `leading` base is EulerDiscreteScheduler(trailing, prediction_type="sample") up to
        Euler's scale of the noise."""
        import diffusers
        pipe = diffusers.DiffusionPipeline.from_pretrained(_dp_models / "sdxl")
        e = _dp_noise()
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="sample",
                                                                      timestep_spacing="trailing")
        want = _dp_pipe_sample(pipe, e)
        G = drpo.Generator(pipe)
        _dp_close(_dp_sample(G, e), want.double().numpy(), 5e-5)
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon",
                                                                      timestep_spacing="leading")
        mine = _dp_sample(drpo.Generator(pipe, prediction="sample"), e)
        assert (mine - want).norm() < 0.02 * want.norm()

    @pytest.mark.parametrize("what", BROKEN)
    def test_a_base_is_read_whole_or_refused(self, what, _dp_models, tmp_path):
        from safetensors.torch import load_file, save_file
        kind, words = BROKEN[what]
        folder = tmp_path / "model"
        shutil.copytree(_dp_models / "sdxl", folder)

        def edit(part, name, change):
            file = folder / part / name
            state = load_file(file)
            change(state)
            save_file(state, file, {"format": "pt"})

        def config(part, **entries):
            file = folder / part / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

        unet = "diffusion_pytorch_model.safetensors"
        if kind == "text":
            edit("text_encoder", "model.safetensors", lambda s: s.update({f"x.{k}": s.pop(k) for k in list(s)}))
        elif kind == "text2":
            edit("text_encoder_2", "model.safetensors", lambda s: s.pop(min(s)))
        elif kind == "unet":
            edit("unet", unet, lambda s: s.pop("conv_in.bias"))
        elif kind == "lora":
            edit("unet", unet, lambda s: s.update({"mid_block.lora_A.weight": torch.zeros(2, 2)}))
        elif kind == "vae":
            edit("vae", unet, lambda s: s.pop(max(s)))
        elif kind == "truncated":
            (folder / "unet" / unet).write_bytes((folder / "unet" / unet).read_bytes()[:5000])
        elif kind == "pointer":
            (folder / "vae" / unet).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        elif kind == "latents_mean":
            config("vae", latents_mean=[0.1, 0.2, 0.3, 0.4])
        elif kind == "in_channels":
            config("unet", in_channels=9)
        elif kind == "time_cond":
            config("unet", time_cond_proj_dim=16)
        elif kind == "sample_size":
            config("unet", sample_size=[8, 12])
        else:
            index = json.loads((folder / "model_index.json").read_text())
            (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
        with pytest.raises(UserError) as caught:
            drpo.load_generator(str(folder))
        assert words in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)

    def test_a_folder_with_fp16_files_alone_loads(self, _dp_models, tmp_path):
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(_dp_models / "sd", torch_dtype=torch.float16)
        pipe.save_pretrained(tmp_path / "half", variant="fp16")
        assert not (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors").exists()
        e = _dp_noise()
        want = _dp_sample(_dp_open(_dp_models / "sd"), e)
        assert (_dp_sample(_dp_open(tmp_path / "half"), e) - want).norm() < 0.01 * want.norm()

    def test_gated_models_say_how_to_log_in(self):
        class Gated(Exception):
            pass
        for error in (OSError("401 Client Error. Cannot access gated repo"), Gated("403 Client Error: Forbidden"),
                      OSError("x")):
            line = rewards.hub_trouble("owner/model", error)
            assert ("hf auth login" in line) == ("x" != str(error)) and "owner/model" in line

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_lora_off_is_the_base_and_fresh_changes_nothing(self, kind, _dp_models):
        G, e = _dp_open(_dp_models / kind), _dp_noise()
        base = _dp_sample(G, e)
        params = G.add_lora(4, 8.0)
        assert torch.equal(_dp_sample(G, e), base), "fresh LoRA"
        wrapped = [n for n, m in G.unet.named_modules() if isinstance(m, drpo.LoRA)]
        linear = [n for n, m in G.pipe.unet.named_modules() if re.search(r"attn\d\.(to_[qkv]|to_out\.0)$", n)]
        assert sorted(wrapped) == sorted(linear) and len(params) == 2 * len(linear) > 0
        assert all(p.requires_grad and p.dtype == torch.float32 for p in params)
        trainable = [p for p in G.unet.parameters() if p.requires_grad]
        assert {id(p) for p in trainable} == {id(p) for p in params}, "nothing else trains"
        for module in G.lora.values():
            torch.nn.init.normal_(module.up, std=0.3)
        tuned = _dp_sample(G, e)
        assert (tuned - base).abs().max() > 1e-2
        with G.reference():
            assert torch.equal(_dp_sample(G, e), base), "LoRA off"
            with G.reference():
                pass
            assert torch.equal(_dp_sample(G, e), base), "still off after a nested use"
        assert torch.equal(_dp_sample(G, e), tuned), "on again"
        with contextlib.suppress(ZeroDivisionError), G.reference():
            1 / 0
        assert torch.equal(_dp_sample(G, e), tuned), "on again after an error"
        G.set_lora({})
        assert torch.equal(_dp_sample(G, e), base)

    def test_lora_is_the_formula(self, _dp_models):
        """y = W x + b + alpha / r B A x, by hand."""
        G = _dp_open(_dp_models / "sd")
        _dp_random_lora(G, rank=4, alpha=10.0)
        for module in G.lora.values():
            x = torch.randn(3, module.down.shape[1])
            bias = 0 if module.base.bias is None else module.base.bias.double()
            W, A, B, x_T = (t.double() for t in (module.base.weight, module.down, module.up, x.T))
            want = (W @ x_T).T + bias + 10 / 4 * (B @ (A @ x_T)).T
            with torch.no_grad():
                _dp_close(module(x), want.detach().numpy())

    def test_lora_folder_loads_by_its_name(self, _dp_models, tmp_path):
        """pipe.load_lora_weights(run) with nothing else, where both formats lie."""
        from diffusers import DiffusionPipeline
        G, e = _dp_open(_dp_models / "sd"), _dp_noise()
        _dp_random_lora(G)
        G.save_lora(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {rewards.LORA_FILE, rewards.KOHYA_FILE}
        pipe = DiffusionPipeline.from_pretrained(_dp_models / "sd")
        pipe.load_lora_weights(tmp_path)
        _dp_close(_dp_pipe_sample(pipe, e), _dp_sample(G, e).double().numpy(), 3e-5)

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_load_lora_both_formats_back(self, kind, _dp_models, tmp_path):
        G, e = _dp_open(_dp_models / kind), _dp_noise()
        _dp_random_lora(G, rank=4, alpha=6.0)
        tuned = _dp_sample(G, e)
        G.save_lora(tmp_path, settings="{}")
        for path in (tmp_path, tmp_path / rewards.LORA_FILE, tmp_path / rewards.KOHYA_FILE):
            other = _dp_open(_dp_models / kind)
            meta = other.load_lora(path)
            assert meta["base_model"] == str(_dp_models / kind) and meta["settings"] == "{}"
            _dp_close(_dp_sample(other, e), tuned.double().numpy())
            params = [p for p in other.unet.parameters() if p.requires_grad]
            assert len(params) == 2 * len(other.lora), "it can be trained on"

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_kohya_file_has_what_its_readers_want(self, kind, _dp_models, tmp_path):
        """lora_down, lora_up and alpha of every layer; names that sd-scripts knows; A1111's metadata."""
        from safetensors import safe_open
        G = _dp_open(_dp_models / kind)
        _dp_random_lora(G, rank=4, alpha=6.0)
        G.unet.register_to_config(cross_attention_dim=1024)
        G.save_lora(tmp_path)
        with safe_open(tmp_path / "kohya_lora.safetensors", "pt") as f:
            meta, state = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
        layers = {k.split(".")[0] for k in state}
        assert len(layers) == len(G.lora) and len(state) == 3 * len(layers)
        blocks = "input_blocks_4_1|input_blocks_5_1|middle_block_1|output_blocks_[0-2]_1" if kind == "sdxl" else \
            r"down_blocks_0_attentions_0|mid_block_attentions_0|up_blocks_1_attentions_\d"
        assert all(re.fullmatch(rf"lora_unet_({blocks})_\w+_attn[12]_to_(q|k|v|out_0)", m) for m in layers), layers
        for m in layers:
            assert float(state[m + ".alpha"]) == 6.0
            assert state[m + ".lora_down.weight"].shape[0] == 4 == state[m + ".lora_up.weight"].shape[1]
        assert meta["ss_network_dim"] == "4" and meta["ss_network_alpha"] == "6.0"
        assert meta["ss_network_module"] == "networks.lora"
        assert meta.get("ss_v2") == ("True" if kind == "sd" else None)
        assert meta.get("ss_base_model_version") == ("sdxl_base_v1-0" if kind == "sdxl" else None)

    def test_sdxl_names_of_sd_scripts(self):
        """Every one of SDXL's 560 attention layers has one name and no other layer's, both ways; three of them by hand."""
        import diffusers
        with torch.device("meta"):
            arch = bench.ARCHITECTURES["sdxl-turbo"]["unet"]
            unet = diffusers.UNet2DConditionModel(**bench.UNET, **arch)
        names = [name for name, _ in unet.named_modules() if name.endswith(drpo.LORA_TARGETS)]
        kohya = [rewards.kohya_name(name, True) for name in names]
        assert len(names) == 560 == len(set(kohya))
        # the blocks of the first release: conv_in, 2 ResNets and a downsampler, twice 2 with attention and a downsampler
        counts = {}
        for name in kohya:
            block = re.match(r"lora_unet_(input_blocks_\d+|middle_block|output_blocks_\d+)_1_transformer_blocks_\d+", name)[1]
            counts[block] = counts.get(block, 0) + 1
        assert counts == {**{f"input_blocks_{n}": 16 for n in (4, 5)}, **{f"input_blocks_{n}": 80 for n in (7, 8)},
                          "middle_block": 80, **{f"output_blocks_{n}": 80 for n in (0, 1, 2)},
                          **{f"output_blocks_{n}": 16 for n in (3, 4, 5)}}
        for name, want in (("down_blocks.1.attentions.0", "input_blocks_4_1"), ("mid_block.attentions.0", "middle_block_1"),
                           ("up_blocks.1.attentions.2", "output_blocks_5_1")):
            rest = "transformer_blocks.0.attn1.to_out.0"
            assert rewards.kohya_name(f"{name}.{rest}", True) == f"lora_unet_{want}_{rest.replace('.', '_')}"

    @pytest.mark.parametrize("form", FORMS)
    def test_loras_of_others(self, form, _dp_models, tmp_path):
        """Rank and alpha of each layer, whatever the names: W + alpha / r up down, by hand."""
        from safetensors.torch import save_file
        prefix, down_end, up_end, with_alpha = FORMS[form]
        G = _dp_open(_dp_models / "sd")
        weights, state = _dp_foreign(G), {}
        for n, (name, (down, up)) in enumerate(weights.items()):
            state[prefix + name + down_end], state[prefix + name + up_end] = down, up
            if with_alpha:
                state[f"{prefix}{name}.alpha"] = torch.tensor(2.0 + n)
        save_file(state, tmp_path / "lora.safetensors")
        G.load_lora(tmp_path / "lora.safetensors")
        for n, (name, (down, up)) in enumerate(weights.items()):
            layer = G.unet.get_submodule(name)
            x = torch.randn(2, down.shape[1])
            scale = (2.0 + n) / len(down) if with_alpha else 1
            with torch.no_grad():
                want = layer.base(x).double() + scale * (x.double() @ down.T.double() @ up.T.double())
                _dp_close(layer(x), want.numpy())

    def test_alpha_in_the_metadata_is_diffusers(self, _dp_models, tmp_path):
        """alpha 8, rank 4, told by lora_adapter_metadata alone: the same as diffusers makes of the file."""
        from diffusers import DiffusionPipeline
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict
        pipe = DiffusionPipeline.from_pretrained(_dp_models / "sd")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(drpo.LORA_TARGETS), init_lora_weights=False)
        pipe.unet.add_adapter(config)
        state = {k: v.contiguous() for k, v in get_peft_model_state_dict(pipe.unet).items()}
        type(pipe).save_lora_weights(tmp_path, unet_lora_layers=state,
                                     unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict())
        G, e = _dp_open(_dp_models / "sd"), _dp_noise()
        base = _dp_sample(G, e)
        G.load_lora(tmp_path)
        want = _dp_pipe_sample(pipe, e)
        assert (want - base).abs().max() > 1e-2
        _dp_close(_dp_sample(G, e), want.double().numpy(), 3e-5)

    def test_a_lora_is_loaded_whole_or_not_at_all(self, _dp_models, tmp_path):
        """Left-over keys name their number and the first; nothing has been changed when the line comes."""
        from safetensors.torch import save_file
        G, e = _dp_open(_dp_models / "sd"), _dp_noise()
        _dp_random_lora(G)
        before = _dp_sample(G, e)
        weights = {}
        for name, (down, up) in _dp_foreign(G).items():
            weights[f"unet.{name}.lora_A.weight"], weights[f"unet.{name}.lora_B.weight"] = down, up
        attn = next(iter(weights))
        extra = torch.zeros(2, 2)
        cases = {
            "ff": {**weights, "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.lora_A.weight": extra},
            "conv": {**weights, "unet.conv_in.lora_A.weight": extra, "unet.conv_in.lora_B.weight": extra + 1},
            "proj_in": {**weights, "unet.mid_block.attentions.0.proj_in.lora_A.weight": extra},
            "text": {**weights, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": extra},
            "dora": {**weights, attn.replace("lora_A.weight", "lora_magnitude_vector"): extra},
            "half": {k: v for k, v in weights.items() if k != attn}, "shape": {**weights, attn: extra}, "none": {"x": extra},
        }
        for name, state in cases.items():
            save_file(state, tmp_path / "lora.safetensors", {"base_model": "elsewhere"})
            with pytest.raises(UserError, match=r"lora.safetensors: \d entries do not fit.*elsewhere") as caught:
                G.load_lora(tmp_path / "lora.safetensors")
            new = [key for key in state if key not in weights]
            if name not in ("half", "shape"):
                assert f"{len(new)} entries" in str(caught.value) and new[0] in str(caught.value)
            assert torch.equal(_dp_sample(G, e), before), name
        (tmp_path / "lora.safetensors").write_bytes(b"nothing")
        with pytest.raises(UserError, match="lora.safetensors: not a readable LoRA file"):
            G.load_lora(tmp_path / "lora.safetensors")
        assert torch.equal(_dp_sample(G, e), before)

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_merging_recipe_of_the_readme(self, kind, _dp_models, _dp_home):
        """README's lines fold the LoRA into a pipeline whose UNet is one file and that draws what base and LoRA draw."""
        from diffusers import DiffusionPipeline
        run = _DpRun(_dp_argv(_dp_models, kind=kind, lr=0.05, lora_alpha=5, steps=2), _dp_home)
        assert run.wait() == 0, run.err
        recipe = re.search(r"```python\n(from diffusers import DiffusionPipeline\n.*?fuse_lora.*?)```",
                           (HERE / "README.md").read_text(), re.S)[1]
        recipe = re.sub(r'"stabilityai/sd-turbo"', repr(str(_dp_models / kind)), recipe)
        recipe = re.sub(r"runs/sd-merged", "merged", recipe).replace("runs/sd", "run")
        with contextlib.chdir(_dp_home):
            exec(recipe, {})
        assert [f.name for f in (_dp_home / "merged" / "unet").glob("*.safetensors")] == [
            "diffusion_pytorch_model.safetensors"]
        e, base = _dp_noise(), DiffusionPipeline.from_pretrained(_dp_models / kind)
        plain = _dp_pipe_sample(base, e)
        base.load_lora_weights(_dp_home / "run")
        want = _dp_pipe_sample(base, e)
        assert (want - plain).abs().max() > 1e-2
        _dp_close(_dp_sample(_dp_open(_dp_home / "merged"), e), want.double().numpy(), 3e-5)

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_half_precision(self, kind, dtype, _dp_models, capfd):
        """The same weights in half precision: sigma multiplies no rounding error of the last layers."""
        from diffusers import DiffusionPipeline
        e = _dp_noise(8)
        prompts = PROMPTS * 4
        want = _dp_sample(_dp_open(_dp_models / kind), e, prompts)
        G = _dp_open(_dp_models / kind, dtype)
        capfd_text = capfd.readouterr().err
        got = _dp_sample(G, e, prompts)
        assert got.dtype == torch.float32
        error = (got - want).square().mean().sqrt()
        pipe = DiffusionPipeline.from_pretrained(_dp_models / kind, torch_dtype=dtype)
        plain = (_dp_pipe_sample(pipe, e.to(dtype), prompts=prompts).float() - want).square().mean().sqrt()
        assert error < plain, "no better than the pipeline in half precision"
        assert error < (0.15 if dtype == torch.bfloat16 else 0.02) * want.std()
        with torch.no_grad():
            images = G.decode(got)
        assert images.dtype == torch.float32 and images.isfinite().all()
        lifted = dtype == torch.float16 and kind == "sdxl"
        if kind == "sdxl":
            assert (next(G.vae.parameters()).dtype == torch.float32) == lifted
            assert ("VAE" in capfd_text and len(capfd_text.strip().splitlines()) == 1) == lifted, "one line says so"
        _dp_random_lora(G)
        assert (_dp_sample(G, e, prompts) - got).abs().max() > 1e-2
        with G.reference():
            assert torch.equal(_dp_sample(G, e, prompts), got)

    @pytest.mark.slow
    def test_compiled_network_gives_the_same_gradient(self, _dp_models):
        """Of the generator and of the `unet` features behind it, which leave the UNet half way."""
        e, gradients = _dp_noise(), []
        for compiled in (False, True):
            G = _dp_open(_dp_models / "sd")
            if compiled:
                G.compile_all()
            params, c = _dp_random_lora(G, size=0.1), G.encode(PROMPTS)
            x = G.sample(e, c)
            maps = drpo.load_features("unet", G)(x, c)
            grads = torch.autograd.grad((x * e.flip(0)).sum() + sum(z.square().mean() for z in maps), params)
            gradients.append(torch.cat([g.flatten() for g in grads]))
        want, got = gradients
        assert want.norm() > 0 and (got - want).norm() < 1e-4 * want.norm()

    def test_channels_last_group_norm_in_half_precision(self):
        """As near to float64 as torch's own GroupNorm, also where the mean is far larger than the deviation."""
        torch.manual_seed(0)
        norm = torch.nn.GroupNorm(4, 32).requires_grad_(False)
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        x = (torch.randn(2, 32, 24, 24) + 8 * torch.randn(1, 32, 1, 1)).bfloat16()
        groups = x.double().reshape(2, 4, -1)
        exact = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        exact = exact.reshape(x.shape) * norm.bfloat16().weight.double()[:, None, None] + norm.bias.double()[:, None, None]
        plain = float((norm(x) - exact).norm() / exact.norm())
        norm.__class__ = drpo.ChannelsLastGroupNorm
        assert float((torch.compile(norm)(x) - exact).norm() / exact.norm()) < 1.05 * plain < 0.01
        assert float((norm(x) - exact).norm() / exact.norm()) < 2 * plain


# ===== drpo.py: 4. One update

def _dp_pictures(folder, n=6):
    """n pictures of 32 x 32 -> their names."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(n):
        names.append(f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / names[-1])
    return names


class TestOneUpdate:
    """What is added to .grad, and the figures beside it."""

    def test_out_of_memory_halves_the_micro_batch(self, _dp_tuned, capsys, monkeypatch):
        """The step begins again and computes the same."""
        G, params = _dp_tuned
        cfg, phi = _dp_config(anchors=2), drpo.load_features("vae", G)
        noise = torch.stack([drpo.prompt_noise(3, i, (6, 4, 8, 8)) for i in range(2)])
        batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), noise)
        want = _dp_gradient(G, params, "vae", 12, cfg)[0]
        gradient, seen = drpo.drpo_gradient, []

        def small_memory(G, phi, reward, batch, cfg, micro):
            seen.append(micro)
            reward.seen.clear()
            if micro > 4:
                gradient(G, phi, reward, batch, cfg, 1)  # what a failed attempt leaves behind must not count
                raise torch.OutOfMemoryError
            return gradient(G, phi, reward, batch, cfg, micro)

        monkeypatch.setattr(drpo, "drpo_gradient", small_memory)
        for p in params:
            p.grad = None
        _, micro = drpo.gradient_that_fits(G, phi, _DpScore(TABLE), batch, cfg, 12)
        assert seen == [12, 6, 3] and micro == 3
        got = torch.cat([p.grad.flatten() for p in params])
        assert (got - want).norm() < 2e-4 * want.norm()
        err = capsys.readouterr().err
        assert err.count("out of GPU memory") == 2 and "--micro-batch 6" in err and "--micro-batch 3" in err
        monkeypatch.setattr(drpo, "drpo_gradient", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(UserError, match="--micro-batch 1"):
            drpo.gradient_that_fits(G, phi, _DpScore(TABLE), batch, cfg, 4)

    def test_auto_never_asks_for_more_than_there_is(self, _dp_models):
        """On a CPU: all pictures of the update, or 64 of a large one, but whole prompts where they are larger."""
        G = _dp_open(_dp_models / "sd")
        for P, K, want in ((2, 6, 12), (8, 24, 64), (2, 100, 100)):
            batch = drpo.Batch(["a"] * P, G.encode(["a"] * P), torch.zeros(P, K, 4, 8, 8))
            assert drpo.fitting_micro_batch(G, None, batch) == want

    def test_a_vae_that_gives_nan_ends_with_a_line(self, _dp_tuned, monkeypatch):
        G, params = _dp_tuned
        monkeypatch.setattr(G, "decode", lambda x: torch.full((len(x), 3, 32, 32), math.nan))
        with pytest.raises(UserError, match="the VAE gives NaN"):
            _dp_gradient(G, params, "vae", 12)

    def test_skipped_and_unsure_prompts(self, _dp_tuned):
        """All equal or all NaN: the reference drift alone, counted; a NaN is no anchor but is still moved."""
        G, params = _dp_tuned
        for field in ("dipole", "released"):
            cfg = _dp_config(anchors=2, field=field)
            equal, m, _ = _dp_gradient(G, params, "vae", 12, cfg, table=[[1.0] * 6, [5.0] * 6])
            assert m["skipped"] == 1
            silent, m, _ = _dp_gradient(G, params, "vae", 12, cfg, table=[[math.nan] * 6] * 2)
            assert m["skipped"] == 1 and torch.equal(equal, silent)
            drift_only = _dp_config(anchors=2, field=field, lambda_ref=0.0)
            assert _dp_gradient(G, params, "vae", 12, drift_only, table=[[1.0] * 6] * 2)[0].abs().max() == 0
            one, m, _ = _dp_gradient(G, params, "vae", 12, cfg, table=[TABLE[0], [5.0] * 6])
            assert m["skipped"] == 0.5 and not torch.equal(one, equal)
        # NaN at the places in the middle of the order: the same anchors, the same update
        want = _dp_gradient(G, params, "vae", 12)[0]
        table = [[v if v in sorted(row)[:2] + sorted(row)[-2:] else math.nan for v in row] for row in TABLE]
        got, m, _ = _dp_gradient(G, params, "vae", 12, table=table)
        assert torch.equal(got, want) and m["skipped"] == 0
        assert m["reward_best"] == pytest.approx((0.9 + 6) / 2) and m["reward_worst"] == pytest.approx((0.1 + 1) / 2)

    def test_score_figures_values(self):
        nan = math.nan
        rows = {(1.0, 2.0, 3.0, nan): (2, 3, 1, np.std([1, 2, 3]), 2, 0), (4.0, 8.0, 0.0, 0.0): (3, 8, 0, np.std([4, 8, 0, 0]), 8, 0),
                (5.0,) * 4: (5, 5, 5, 0, nan, 1), (nan,) * 4: (nan, nan, nan, nan, nan, 1)}
        for scores, want in rows.items():
            scores = torch.tensor(scores).double()
            found = rewards.figures(scores, *drpo.rank(scores, 1), {"a": scores, "b": scores * 2, "watch/c": scores + 1})
            keys = ("reward_mean", "reward_best", "reward_worst", "reward_std", "gap", "skipped")
            assert [float(found[key]) for key in keys] == pytest.approx(list(want), nan_ok=True)
            assert float(found["watch/c"]) == pytest.approx(want[0] + 1, nan_ok=True)
            assert float(found["part/b"]) == pytest.approx(2 * want[0], nan_ok=True)

    def test_no_gradient_reaches_reference_reward_or_networks(self, _dp_tuned):
        G, params = _dp_tuned
        _, _, score = _dp_gradient(G, params, "vae,unet", 4)
        assert len(score.seen) == 2  # a prompt at a time: 6 images without gradient, then chunks with it
        trainable = {id(p) for p in params}
        for net in (G.unet, G.vae, G.pipe.text_encoder):
            for p in net.parameters():
                assert id(p) in trainable or (p.grad is None and not p.requires_grad)
        assert all(p.grad is not None for p in params)

    def test_metrics_of_the_pictures(self, _dp_tuned):
        """distance and diversity in latents, by loops."""
        G, params = _dp_tuned
        _, m, _ = _dp_gradient(G, params, "vae", 5)
        pairwise, xs = {}, {}
        for name, context in (("tuned", contextlib.nullcontext()), ("base", G.reference())):
            with context, torch.no_grad():
                xs[name] = [
                    G.sample(drpo.prompt_noise(3, i, (6, 4, 8, 8)), G.encode([p] * 6)).flatten(1).double().numpy()
                    for i, p in enumerate(PROMPTS)
                ]
            pairwise[name] = np.mean(
                [np.mean([np.linalg.norm(x[a] - x[b]) for a in range(6) for b in range(6) if a != b]) for x in xs[name]])
        rms = np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(xs["tuned"], xs["base"])])  # mean over prompts
        assert m["distance"] == pytest.approx(rms, rel=1e-4)
        assert m["diversity"] == pytest.approx(pairwise["tuned"] / pairwise["base"], rel=1e-4)
        assert m["diversity"] != pytest.approx(1, abs=1e-4), "nothing measured"

    def test_noise_of_a_prompt(self):
        """Gaussian, its own for each seed and position, the same whoever asks and whatever the RNG."""
        torch.manual_seed(3)
        a = drpo.prompt_noise(0, 5, (16, 4, 8, 8))
        torch.manual_seed(4)
        assert torch.equal(a, drpo.prompt_noise(0, 5, (16, 4, 8, 8)))
        others = [drpo.prompt_noise(s, p, (16, 4, 8, 8)) for s, p in ((0, 6), (1, 5), (0, -1), (1, 6))]
        for b in others:
            assert abs(float((a * b).mean())) < 0.08
        assert abs(float(a.mean())) < 0.08 and abs(float(a.std()) - 1) < 0.05

    def test_offline_pairs_are_anchors(self, _dp_tuned, tmp_path):
        """Anchors from files, of different numbers: features of the VAE-encoded pictures, by diffusers' image processor."""
        from diffusers.image_processor import VaeImageProcessor
        G, params = _dp_tuned
        n = _dp_pictures(tmp_path)
        lines = [{"prompt": PROMPTS[0], "chosen": n[:2], "rejected": n[2:3]},
                 {"prompt": PROMPTS[1], "chosen": n[3:4], "rejected": n[4:6]}]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        pairs = rewards.load_pairs(tmp_path / "pairs.jsonl")
        assert [p[0] for p in pairs] == PROMPTS
        phi = drpo.load_features("vae", G)
        anchors = [drpo.pair_maps(G, phi, pair) for pair in pairs]
        processor = VaeImageProcessor(vae_scale_factor=4)
        for line, maps in zip(lines, anchors):
            for s, side in enumerate(("chosen", "rejected")):
                pixels = processor.preprocess([Image.open(tmp_path / f) for f in line[side]])
                with torch.no_grad():
                    want = phi(G.vae.encode(pixels).latent_dist.mean * G.vae.config.scaling_factor, None)
                for k, w in enumerate(want):
                    _dp_close(maps[k][s], w.double().numpy(), 1e-4)
        whole, m, _ = _dp_gradient(G, params, "vae", 12, pairs=anchors)
        part, _, _ = _dp_gradient(G, params, "vae", 5, pairs=anchors)
        assert whole.norm() > 0 and (part - whole).norm() < 2e-4 * whole.norm() and "reward_mean" not in m
        plain, _, _ = _dp_gradient(G, params, "vae", 12, _dp_config(anchors=2, lambda_ref=0.0), pairs=anchors)
        exchanged = [[(b, a) for a, b in maps] for maps in anchors]
        swapped, _, _ = _dp_gradient(G, params, "vae", 12, _dp_config(anchors=2, lambda_ref=0.0), pairs=exchanged)
        assert (swapped + plain).norm() < 1e-4 * plain.norm(), "chosen and rejected exchanged: the other way"

    def test_half_precision_gradient(self, _dp_models):
        """bf16 and fp16 point where float32 points; LoRA and its gradient stay float32; fp16 is scaled."""
        gradients = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            G = _dp_open(_dp_models / "sd", dtype)
            params = _dp_random_lora(G, size=0.1)
            gradients[dtype], m, _ = _dp_gradient(G, params, "vae", 12)
            assert gradients[dtype].dtype == torch.float32 and gradients[dtype].isfinite().all()
            assert math.isfinite(m["loss"])
        want = gradients.pop(torch.float32)
        for dtype, got in gradients.items():
            cosine = float(torch.cosine_similarity(got, want, dim=0))
            assert cosine > (0.8 if dtype == torch.bfloat16 else 0.97), f"{dtype}: {cosine}"
            assert 0.7 < float(got.norm() / want.norm()) < 1.4


# ===== drpo.py: 5. A run

def _dp_one_line(err, *words):
    """Exactly one line on stderr, which starts with `error:` and has these words."""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error:"), err
    for word in words:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"

def _dp_disk_is_full(run, folder):
    """One clear line, and the checkpoint that was there can be gone on from."""
    assert run.wait() == 2, run.err
    line = run.err.strip().splitlines()[-1]
    assert line.startswith("error:") and "Traceback" not in run.err, run.err
    assert "space" in line.lower() or "too large" in line.lower() or "written" in line, line
    assert _dp_state(folder)["step"] >= 1
    assert not list(folder.glob("*.tmp")), "half files are left behind"


class TestARun:
    """Each in a process of its own, forked from a server that has imported everything and run nothing."""

    def test_a_run_and_its_files(self, _dp_models, _dp_home):
        """What a run leaves behind; the LoRA in its folder is the one in its checkpoint; all of it moved from the start."""
        from safetensors import safe_open
        run = _DpRun(_dp_argv(_dp_models, preview_every=2, watch="jpeg", lora_alpha=3), _dp_home)
        assert run.wait() == 0, run.err
        folder = _dp_home / "run"
        assert "8 pictures an update" in run.out and "step 4/4" in run.out and "left" in run.out
        config = json.loads((folder / "config.json").read_text())
        assert config["steps"] == 4 and config["lora_alpha"] == 3 and config["versions"]["torch"] == torch.__version__
        metrics = _dp_metrics(folder)
        assert [m["step"] for m in metrics] == [1, 2, 3, 4]
        for m in metrics:
            assert m["applied"] and m["loss"] > 0 and m["grad_norm"] > 0 and m["skipped"] == 0
            assert m["reward_worst"] < m["reward_mean"] < m["reward_best"] and m["reward_std"] > 0 and m["gap"] > 0
            assert len(m["rms_pref"]) == len(m["rms_ref"]) == 3 and min(m["rms_pref"]) > 0
        assert "watch/jpeg" in metrics[0] and "watch/jpeg" not in metrics[1]
        assert metrics[0]["distance"] == 0 < metrics[3]["distance"]
        full = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        for phase in ("sample", "decode", "reward", "features", "field", "backward", "optimizer"):
            assert full[f"seconds_{phase}"] > 0
        shots = sorted(p.name for p in (folder / "samples").iterdir())
        assert shots == ["step-000000.png", "step-000002.png", "step-000004.png"]
        for p in (folder / "samples").iterdir():
            with Image.open(p) as image:
                image.load()
        state = _dp_state(folder)
        assert state["step"] == 4 and state["position"] == 8
        G = _dp_open(_dp_models / "sd")
        G.load_lora(folder / rewards.KOHYA_FILE)
        for p, w in zip(G.parameters(), state["weights"], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-8)
            assert w.abs().max() > 0
        for file in (rewards.LORA_FILE, rewards.KOHYA_FILE):
            with safe_open(folder / file, "pt") as f:
                meta = f.metadata()
            assert meta["base_model"] == str(_dp_models / "sd") and json.loads(meta["settings"])["steps"] == 4
        assert not list(folder.glob("*.tmp"))

    def test_first_step_is_adamw_by_hand(self, _dp_models, _dp_home):
        """After one step every weight has moved by lr, against its clipped gradient: sign-like, as Adam's first step is."""
        run = _DpRun(_dp_argv(_dp_models, steps=1, lr=1e-3, weight_decay=0), _dp_home)
        assert run.wait() == 0, run.err
        G = _dp_open(_dp_models / "sd")
        torch.manual_seed(0)
        start = [p.detach().clone() for p in G.add_lora(2, 16.0)]
        moved = 0
        for before, after in zip(start, _dp_weights(_dp_home / "run"), strict=True):
            step = (after - before).abs()
            assert step.max() <= 1.001e-3
            moved += int((step > 0.9e-3).sum())
        assert moved > 100  # B; A has no gradient while B is 0

    def test_same_seed_same_run_and_other_settings_of_no_effect(self, _dp_models, _dp_home):
        """Bit for bit; another seed differs; the micro-batch changes nothing but rounding."""
        runs = {name: _DpRun(_dp_argv(_dp_models, name, steps=2, **kw), _dp_home) for name, kw in
                dict(a={}, b=dict(save_every=1, log_every=1), c=dict(seed=1), d=dict(micro_batch=3)).items()}
        assert [r.wait() for r in runs.values()] == [0] * 4, [r.err for r in runs.values()]
        weights = {name: _dp_weights(_dp_home / name) for name in runs}
        assert _dp_same(weights["a"], weights["b"]) and _dp_metrics(_dp_home / "a") == _dp_metrics(_dp_home / "b")
        assert not _dp_same(weights["a"], weights["c"])
        a, d = _dp_metrics(_dp_home / "a"), _dp_metrics(_dp_home / "d")
        assert [m["reward_mean"] for m in a] == pytest.approx([m["reward_mean"] for m in d], rel=1e-3, abs=1e-2)
        assert [m["loss"] for m in a] == pytest.approx([m["loss"] for m in d], rel=1e-3)

    def test_resume_further_and_changed_settings(self, _dp_models, _dp_home):
        """A setting given beside --resume replaces the run's, and a line says so; so it does of prompts and reward file."""
        assert _DpRun(_dp_argv(_dp_models, steps=2), _dp_home).wait() == 0
        with open(_dp_home / "own.py", "a") as f:
            f.write("# changed\n")
        with open(_dp_home / "prompts.txt", "a") as f:
            f.write("one more\n")
        run = _DpRun(["--resume", "run", "--lr", "0.5", "--steps", "3"], _dp_home)
        assert run.wait() == 0, run.err
        metrics = _dp_metrics(_dp_home / "run")
        assert [m["step"] for m in metrics] == [1, 2, 3] and [m["lr"] for m in metrics] == [0.001, 0.001, 0.5]
        lines = run.err.strip().splitlines()
        assert [line.split(" from here")[0] for line in lines[:2]] == ["--steps is 3", "--lr is 0.5"]
        assert "it was 0.001" in lines[1] and [line.split()[1] for line in lines[2:]] == ["prompts", "reward"], run.err
        run = _DpRun(["--resume", "run", "--steps", "4"], _dp_home)
        assert run.wait() == 0 and run.err.strip().splitlines() == ["--steps is 4 from here on; it was 3"]
        assert _dp_metrics(_dp_home / "run")[3]["lr"] == 0.5, "the change stays"
        run = _DpRun(["--resume", "run", "--lora-rank", "3"], _dp_home)
        assert run.wait() == 2
        _dp_one_line(run.err, "--lora-rank")
        run = _DpRun(["--resume", "run", "--out", "other"], _dp_home)
        assert run.wait() == 2 and not (_dp_home / "other").exists()
        _dp_one_line(run.err, "--out", "--resume")

    def test_torn_and_tampered_checkpoints(self, _dp_models, _dp_home):
        """A checkpoint that is cut or changed is found: the one before is used, both are named; two bad ones end it."""
        assert _DpRun(_dp_argv(_dp_models, steps=3, save_every=1), _dp_home).wait() == 0
        folder = _dp_home / "run"
        good = (folder / "checkpoint.pt").read_bytes()
        previous = (folder / "checkpoint.previous.pt").read_bytes()
        G = _dp_open(_dp_models / "sd")
        optimizer = torch.optim.AdamW(G.add_lora(2, 16.0))
        spoilt = [good[:n] for n in (0, 1, 100, len(good) // 2, len(good) - 1)]
        weight = good.index(_dp_state(folder)["weights"][0].numpy().tobytes())
        spoilt.append(good[:weight] + bytes([good[weight] ^ 4]) + good[weight + 1:])  # one bit of a weight
        for data in spoilt:
            (folder / "checkpoint.pt").write_bytes(data)
            assert drpo.load(drpo.Config(resume=folder), G, optimizer)["step"] == 2
            assert (folder / "checkpoint.torn").exists() and not (folder / "checkpoint.pt").exists()
        (folder / "checkpoint.pt").write_bytes(good[:99])
        run = _DpRun(["--resume", "run", "--steps", "4"], _dp_home)
        assert run.wait() == 0, run.err
        assert "checkpoint.previous.pt" in run.err and [m["step"] for m in _dp_metrics(folder)] == [1, 2, 3, 4]
        assert _dp_state(folder)["step"] == 4
        (folder / "checkpoint.pt").write_bytes(good[:99])
        (folder / "checkpoint.previous.pt").write_bytes(previous[:-5])
        run = _DpRun(["--resume", "run", "--steps", "5"], _dp_home)
        assert run.wait() == 2
        _dp_one_line(run.err, "checkpoint.pt", "checkpoint.previous.pt", "no checkpoint to go on from")

    def test_checkpoint_never_unpickles(self, _dp_models, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (Path.write_text, (tmp_path / "exploded", "x"))
        torch.save({"at": {"step": 1}, "bomb": Bomb()}, tmp_path / "checkpoint.pt")
        G = _dp_open(_dp_models / "sd")
        with pytest.raises(UserError, match="no checkpoint"):
            drpo.load(drpo.Config(resume=tmp_path), G, torch.optim.AdamW(G.add_lora(2, 16.0)))
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.slow
    def test_kill_9_at_random_moments(self, _dp_models, _dp_home):
        """12 kills, some during a save: always loadable, at most --save-every steps lost, no step twice or missing."""
        folder, rng, reached = _dp_home / "run", random.Random(1), 0
        argv = _dp_argv(_dp_models, steps=10_000, save_every=1, log_every=100_000, batch=1, lora_rank=8)
        run = _DpRun(argv, _dp_home)
        for rounds in range(12):
            run.until(folder / "metrics.jsonl", reached + rng.randrange(1, 3))
            time.sleep(rng.random() * 0.15)  # some fraction of a step more, or a save
            run.kill(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
            lines = (folder / "metrics.jsonl").read_bytes().count(b"\n")
            step = rewards.newest_checkpoint(folder)["at"]["step"]  # between two renames it is the one before
            assert lines - 1 <= step <= lines and step >= reached, f"{lines} steps done, {step} saved, {reached} before"
            reached = step
            run = _DpRun(["--resume", "run", *(["--steps", str(step + 1)] if rounds == 11 else [])], _dp_home)
        assert run.wait() == 0, run.err
        assert [m["step"] for m in _dp_metrics(folder)] == list(range(1, reached + 2)) and reached >= 12
        known = {"checkpoint.pt", "checkpoint.previous.pt", "config.json", "metrics.jsonl", "samples", rewards.LORA_FILE,
                 rewards.KOHYA_FILE}
        assert not {p.name for p in folder.iterdir() if not p.name.endswith(".tmp")} - known

    @pytest.mark.parametrize("number,code", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
    def test_signals_finish_the_step_and_save(self, number, code, _dp_models, _dp_home):
        run = _DpRun(_dp_argv(_dp_models, reward="own.py:slow", steps=10_000), _dp_home)
        run.until(_dp_home / "run" / "metrics.jsonl", 2)
        run.kill(number)
        assert run.wait() == code, run.err
        steps = [m["step"] for m in _dp_metrics(_dp_home / "run")]
        assert steps == list(range(1, len(steps) + 1)) and _dp_state(_dp_home / "run")["step"] == len(steps)
        first, last = run.err.strip().splitlines()
        assert first.startswith("stopping after this step") and "--resume run" in last
        rest = _DpRun(["--resume", "run", "--steps", len(steps) + 1], _dp_home)
        assert rest.wait() == 0, rest.err
        assert (_dp_home / "run" / rewards.LORA_FILE).exists()

    def test_a_second_signal_ends_at_once(self, _dp_models, _dp_home):
        """While a reward works: the first says a line at once, the second does not wait; the checkpoint is intact."""
        run = _DpRun(_dp_argv(_dp_models, reward="own.py:hangs", steps=9, save_every=1), _dp_home)
        run.until(_dp_home / "run" / "metrics.jsonl", 2)
        time.sleep(0.5)
        begun = time.monotonic()
        run.kill(signal.SIGINT)
        while "stopping after this step" not in run.err:
            assert time.monotonic() - begun < 20
            time.sleep(0.05)
        run.kill(signal.SIGINT)
        assert run.wait(20) == 130 and "Traceback" not in run.err, run.err
        assert _dp_state(_dp_home / "run")["step"] == 2

    def test_handlers_are_put_back_and_children_have_their_own(self, _dp_models, _dp_home):
        """After train() the caller's handlers are there again; a forked Pool ends when it is told to."""
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with contextlib.chdir(_dp_home):
            cfg = drpo.Config(model=str(_dp_models / "sd"), prompts="prompts.txt", steps=1, batch=1, candidates=4,
                              anchors=2, out="called", device="cpu", preview_every=0)
            path = drpo.train(cfg, reward=lambda images, prompts: [float(np.asarray(i).mean()) for i in images])
        assert path == Path("called") and (_dp_home / "called" / rewards.LORA_FILE).exists()
        assert json.loads((_dp_home / "called" / "config.json").read_text())["reward"] == "<lambda>"
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        for reward in ("pooled", "spawned"):
            run = _DpRun(_dp_argv(_dp_models, reward, f"own.py:{reward}", steps=2, batch=1), _dp_home)
            assert run.wait(90) == 0, run.err

    def test_signal_at_the_moment_of_a_fork_is_not_lost(self):
        """SIGTERM comes to a child after the fork and before it has the handlers of before: it ends the child; and the
        parent's handlers and mask are as they were."""
        code = (
            "import os, signal, sys; import rewards; from rewards import Stop\n"
            "plain = Stop.__exit__\n"
            "def late(self, *a):\n"
            "    if os.getpid() != parent: os.kill(os.getpid(), signal.SIGTERM); [0 for _ in range(10000)]\n"
            "    plain(self, *a)\n"
            "Stop.__exit__ = late; parent = os.getpid()\n"
            "with Stop() as stop:\n"
            "    child = os.fork()\n"
            "    if child == 0: os._exit(7)\n"
            "    status = os.waitpid(child, 0)[1]\n"
            "    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) and signal.getsignal(signal.SIGTERM) == stop.handle\n"
            "sys.exit(0 if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM else 1)\n")
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0 and "stopping" not in done.stderr, done.stderr

    @pytest.mark.slow
    def test_disk_full_on_a_tmpfs(self, _dp_models, _dp_home):
        """A file system of 1 MB that really fills up."""
        disk = _dp_home / "disk"
        disk.mkdir()
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
        if mount.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
        try:
            run = _DpRun(_dp_argv(_dp_models, "disk/run", steps=1, lora_rank=4), _dp_home)
            assert run.wait() == 0, run.err
            filler = disk / "filler"
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
                while True:
                    f.write(b"x" * 4096)
            run = _DpRun(["--resume", "disk/run", "--steps", "200", "--save-every", "1"], _dp_home)
            _dp_disk_is_full(run, disk / "run")
            filler.unlink()
            done = _dp_state(disk / "run")["step"]
            run = _DpRun(["--resume", "disk/run", "--steps", done + 1], _dp_home)
            assert run.wait() == 0, run.err
            assert [m["step"] for m in _dp_metrics(disk / "run")] == list(range(1, done + 2))
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    @pytest.mark.parametrize("reward,words", (("raises3", "no camera"), ("short3", "1 scores for 8 images"), ("inf3", "inf"),
                                              ("text3", "good"), ("exits3", "SystemExit: 7")))
    def test_rewards_that_fail_at_step_3(self, reward, words, _dp_models, _dp_home):
        """One line with the reward, the step and the way on; two steps are saved, and --resume goes on from there."""
        run = _DpRun(_dp_argv(_dp_models, reward=f"own.py:{reward}"), _dp_home)
        assert run.wait() == 2, run.err
        _dp_one_line(run.err, f"own.py:{reward}", "step 3", words, "--resume run")
        assert [m["step"] for m in _dp_metrics(_dp_home / "run")] == [1, 2]
        assert _dp_state(_dp_home / "run")["step"] == 2
        if reward != "raises3":
            return
        run = _DpRun(["--resume", "run"], _dp_home)  # a new process: its counter begins anew
        plain = _DpRun(_dp_argv(_dp_models, "plain"), _dp_home)
        assert run.wait() == 0 and plain.wait() == 0, run.err
        assert _dp_metrics(_dp_home / "run") == _dp_metrics(_dp_home / "plain"), "as if nothing had happened"

    def test_nan_scores_in_a_run(self, _dp_models, _dp_home):
        """No opinion on some: trained on the others. On all: reference drift, and after 3 steps a line; the same after 20
        steps of equal scores. The log stays JSON."""
        runs = {"nan3": 6, "nan_some": 4, "same": 22}
        runs = {r: _DpRun(_dp_argv(_dp_models, r, f"own.py:{r}", steps=n, batch=1), _dp_home) for r, n in runs.items()}
        assert all(r.wait() == 0 for r in runs.values()), [r.err for r in runs.values()]
        assert [m["skipped"] for m in _dp_metrics(_dp_home / "nan3")] == [0, 0, 1, 1, 1, 1]
        assert [m["skipped"] for m in _dp_metrics(_dp_home / "nan_some")] == [0, 0, 0, 0]
        assert all(torch.isfinite(w).all() for r in runs for w in _dp_weights(_dp_home / r))
        assert runs["nan3"].err.count("no opinion (NaN) on any picture for 3 steps") == 1, runs["nan3"].err
        assert runs["same"].err.count("the same for 20 steps") == 1 and not runs["nan_some"].err

    def test_nonfinite_gradients(self, _dp_models, _dp_home):
        """Skipped and counted; three in a row stop the run with a checkpoint and advice, and it can be gone on with."""
        plain = _DpRun(_dp_argv(_dp_models, "plain", steps=2), _dp_home)
        run = _DpRun(_dp_argv(_dp_models, "a", steps=5), _dp_home, {"DP_ACTION": "nonfinite", "DP_STEPS": "3,4"})
        stopped = _DpRun(_dp_argv(_dp_models, "b", steps=9), _dp_home,
                         {"DP_ACTION": "nonfinite", "DP_STEPS": "3,4,5,6,7,8,9"})
        assert plain.wait() == 0 and run.wait() == 0, run.err
        assert [m["applied"] for m in _dp_metrics(_dp_home / "a")] == [True, True, False, False, True]
        assert all(torch.isfinite(w).all() for w in _dp_weights(_dp_home / "a"))
        assert stopped.wait() == 2
        _dp_one_line(stopped.err, "three", "--lr", "--resume b")
        assert [m["applied"] for m in _dp_metrics(_dp_home / "b")] == [True, True, False, False, False]
        assert _dp_state(_dp_home / "b")["step"] == 5
        assert _dp_same(_dp_weights(_dp_home / "b"), _dp_weights(_dp_home / "plain")), "nothing of these steps was applied"
        healthy = _DpRun(["--resume", "b", "--steps", "7"], _dp_home)
        assert healthy.wait() == 0, healthy.err
        assert [m["applied"] for m in _dp_metrics(_dp_home / "b")] == [True, True, False, False, False, True, True]

    def test_two_runs_never_share_a_folder(self, _dp_models, _dp_home):
        """Started at once: without --out each has a folder of its own, with the same --out one is refused; a folder that
        was made beforehand is accepted."""
        (_dp_home / "same").mkdir()
        argv = _dp_argv(_dp_models, None, steps=2)
        runs = [_DpRun(argv, _dp_home) for _ in range(3)] + [_DpRun(_dp_argv(_dp_models, "same", steps=2), _dp_home)
                                                             for _ in range(2)]
        codes = [run.wait() for run in runs]
        assert codes[:3] == [0, 0, 0] and sorted(codes[3:]) == [0, 2], [run.err for run in runs]
        folders = list((_dp_home / "runs").iterdir())
        assert len(folders) == 3 and all(len(_dp_metrics(folder)) == 2 for folder in [*folders, _dp_home / "same"])
        _dp_one_line(runs[3 + codes[3:].index(2)].err, "same", "--resume same")

    def test_model_file_that_disappears(self, _dp_models, _dp_home):
        """Between a run and its --resume: one line that names the model; the run is as it was."""
        shutil.copytree(_dp_models / "sd", _dp_home / "sd")
        assert _DpRun(_dp_argv(_dp_home, steps=1), _dp_home).wait() == 0
        before = (_dp_home / "run" / "checkpoint.pt").read_bytes()
        for spoil in (lambda: next((_dp_home / "sd" / "unet").glob("*.safetensors")).write_bytes(b"torn"),
                      lambda: next((_dp_home / "sd" / "unet").glob("*.safetensors")).unlink(),
                      lambda: shutil.rmtree(_dp_home / "sd")):
            spoil()
            run = _DpRun(["--resume", "run", "--steps", "2"], _dp_home)
            assert run.wait() == 2
            _dp_one_line(run.err, str(_dp_home / "sd"))
            assert (_dp_home / "run" / "checkpoint.pt").read_bytes() == before

    @pytest.mark.parametrize("kind,dtype", (("sd", "bf16"), ("sdxl", "bf16"), ("sdxl", "fp16"), ("sdxl", "fp32")))
    def test_runs_in_every_dtype(self, kind, dtype, _dp_models, _dp_home):
        run = _DpRun(_dp_argv(_dp_models, kind=kind, dtype=dtype, steps=2, features="vae,unet", preview_every=2), _dp_home)
        assert run.wait() == 0, run.err
        metrics = _dp_metrics(_dp_home / "run")
        assert [m["applied"] for m in metrics] == [True, True] and metrics[1]["distance"] > 0
        lines = run.err.strip().splitlines()
        lifted = (kind, dtype) == ("sdxl", "fp16")
        assert len(lines) == int(lifted), "one line where the VAE is lifted, else silence"
        assert all(w.dtype == torch.float32 for w in _dp_weights(_dp_home / "run"))

    def test_offline_pairs_run(self, _dp_models, _dp_home):
        """No reward is called; the loss falls on a fixed set of two pairs."""
        n = _dp_pictures(_dp_home)
        rows = [{"prompt": "a red cat", "chosen": n[:2], "rejected": n[2:3]},
                {"prompt": "two dogs", "chosen": n[3:4], "rejected": n[4:]}]
        (_dp_home / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        run = _DpRun(_dp_argv(_dp_models, reward=None, prompts=None, pairs="pairs.jsonl"), _dp_home)
        assert run.wait() == 0, run.err
        metrics = _dp_metrics(_dp_home / "run")
        assert all(m["applied"] and min(m["rms_pref"]) > 0 and "reward_mean" not in m for m in metrics)
        assert metrics[-1]["distance"] > 0
        run = _DpRun(["--resume", "run", "--steps", "5"], _dp_home)
        assert run.wait() == 0, run.err

    def test_long_prompts_are_counted(self, _dp_models, _dp_home):
        (_dp_home / "long.txt").write_text("a cat\n" + "word " * 90 + "\n")
        run = _DpRun(_dp_argv(_dp_models, prompts="long.txt", steps=1, batch=1), _dp_home)
        assert run.wait() == 0 and run.err.strip() == "1 prompts are longer than 77 tokens: their end is not seen", run.err

    @pytest.mark.slow
    def test_run_outlives_the_server_of_its_reward(self, _dp_models, _dp_home):
        """The served reward is killed in the middle of a run and comes back: the run waits and ends as if nothing was."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, str(HERE / "rewards.py"), "serve", "jpeg", "--port", str(port), "--device", "cpu"]
        serve = lambda: subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        plain = _DpRun(_dp_argv(_dp_models, "plain", "jpeg", steps=30), _dp_home)
        process = serve()
        try:
            run = _DpRun(_dp_argv(_dp_models, "served", f"http://127.0.0.1:{port}", steps=30), _dp_home)
            run.until(_dp_home / "served" / "metrics.jsonl", 2)
            process.kill()
            process.wait()
            assert len(_dp_metrics(_dp_home / "served")) < 30, "the run was over before the server died"
            process = serve()
            assert plain.wait() == 0 and run.wait() == 0, run.err
        finally:
            process.kill()
            process.wait()
        assert f"127.0.0.1:{port}" in run.err, "it never had to wait"
        assert _dp_metrics(_dp_home / "served") == _dp_metrics(_dp_home / "plain")

    def test_drpo_runs_beside_rewards_and_a_model_alone(self, _dp_models, tmp_path):
        """Two files and a diffusers folder in an empty folder, as somebody who copies them would run it."""
        for name in ("drpo.py", "rewards.py"):
            shutil.copy(HERE / name, tmp_path)
        shutil.copytree(_dp_models / "sd", tmp_path / "model")
        done = subprocess.run(
            [sys.executable, "drpo.py", "--model", "model", "--reward", "jpeg", "--prompts", "animals", "--features", "vae",
             "--steps", "1", "--batch", "1", "--candidates", "4", "--anchors", "2", "--device", "cpu", "--out", "run"],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / rewards.LORA_FILE).exists()

    def test_the_toy_loads_in_every_library(self, _dp_home):
        """4.57 knows the keys of its text encoder with this prefix alone, as in SD-Turbo's file; a pipeline opens without
        being told a dtype, and draws what the generator draws."""
        from diffusers import DiffusionPipeline
        from safetensors.torch import load_file
        weights = load_file(HERE / "lab" / "toy" / "text_encoder" / "model.safetensors")
        assert weights and all(key.startswith("text_model.") for key in weights)
        G = drpo.load_generator("toy")
        loaded = G.pipe.text_encoder.state_dict()
        norm = next(value for key, value in loaded.items() if key.endswith("final_layer_norm.weight"))
        assert torch.equal(norm, weights["text_model.final_layer_norm.weight"].float()) and norm.std() > 0
        pipe = DiffusionPipeline.from_pretrained(str(HERE / "lab" / "toy"))
        pipe.set_progress_bar_config(disable=True)
        e = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        want = pipe(["a red circle"], latents=e.clone(), num_inference_steps=1, guidance_scale=0, output_type="latent").images
        _dp_close(_dp_sample(G, e, ["a red circle"]), want.double().numpy(), 2e-5)


# ===== drpo.py: bad input

def _dp_files(home):
    return sorted((str(p.relative_to(home)), p.stat().st_size) for p in home.rglob("*") if "__pycache__" not in p.parts)

def _dp_refused(argv, home, capfd, *words):
    """drpo.main(argv) in home: SystemExit 2, one line on stderr with these words, no file more or less than before."""
    before = _dp_files(home)
    capfd.readouterr()
    with contextlib.chdir(home), pytest.raises(SystemExit) as done:
        drpo.main([str(a) for a in argv])
    err = capfd.readouterr().err
    assert done.value.code == 2, err
    _dp_one_line(err, *words)
    assert _dp_files(home) == before, "something was written"

BAD = {  # what is given in place of a good setting -> words of the line
    "model": (dict(model="sd-turb"), ("sd-turb", "sd-turbo", "folder")),
    "unet": (dict(unet="none.bin"), ("--unet none.bin", "owner/repo/file")),
    "timestep": (dict(timestep=1000), ("--timestep", "999")),
    "prediction": (dict(prediction="eps"), ("eps", "epsilon")),
    "reward": (dict(reward="scen"), ("scen", "scene")),
    "reward-part": (dict(reward="jpeg=1,scen=2"), ("scen", "scene")),
    "reward-weight": (dict(reward="jpeg=much"), ("much", "jpeg")),
    "reward-weight-0": (dict(reward="jpeg=0"), ("'0'", "--watch")),
    "watch": (dict(watch="jpge"), ("jpge", "jpeg")),
    "feature": (dict(features="vae,latent-mea"), ("latent-mea", "latent-mae")),
    "kernel": (dict(kernel="laplacan"), ("laplacan", "laplacian")),
    "field": (dict(field="dipol"), ("dipol", "dipole")),
    "prompts": (dict(prompts="animal"), ("animal", "animals")),
    "prompts-missing": (dict(prompts="no/such/file.txt"), ("no/such/file.txt",)),
    "prompts-folder": (dict(prompts="."), (".",)),
    "prompts-empty": (dict(prompts="empty.txt"), ("empty.txt", "empty")),
    "prompts-latin": (dict(prompts="latin.txt"), ("latin.txt", "UTF-8", "0xe9")),
    "prompts-jsonl": (dict(prompts="wrong.jsonl"), ("wrong.jsonl", "entry 2", "prompt")),
    "prompts-kind": (dict(prompts="own.py"), ("own.py", ".jsonl")),
    "prompts-csv": (dict(prompts="wrong.csv"), ("wrong.csv", "entry 2", "caption")),
    "prompts-surrogate": (dict(prompts="half.json"), ("half.json", "surrogate")),
    "anchors": (dict(anchors=3, candidates=4), ("--anchors", "--candidates", "3", "4")),
    "anchors-none": (dict(anchors=0), ("--anchors",)),
    "steps": (dict(steps=0), ("--steps",)),
    "batch": (dict(batch=-1), ("--batch",)),
    "rank": (dict(lora_rank=0), ("--lora-rank",)),
    "save-every": (dict(save_every=0), ("--save-every",)),
    "clip": (dict(clip=0), ("--clip",)),
    "seed": (dict(seed=2 ** 64), ("--seed",)),
    "micro-batch": (dict(micro_batch="0"), ("--micro-batch",)),
    "micro-batch-word": (dict(micro_batch="some"), ("--micro-batch", "some")),
    "radii": (dict(radii="0.2,-1"), ("--radii",)),
    "radii-word": (dict(radii="a,b"), ("--radii", "a,b")),
    "radii-none": (dict(radii="nan"), ("--radii",)),
    "lr-word": (dict(lr="fast"), ("--lr", "fast")),
    "lr-negative": (dict(lr="-1"), ("--lr",)),
    "lr-nan": (dict(lr="nan"), ("--lr",)),
    "lambda-nan": (dict(lambda_ref="nan"), ("--lambda-ref",)),
    "device": (dict(device="gpu"), ("gpu",)),
    "device-mps": (dict(device="mps"), ("--device", "mps")),
    "reward-file-missing": (dict(reward="none.py:good"), ("none.py:good",)),
    "reward-name-missing": (dict(reward="own.py:goood"), ("own.py:goood",)),
    "reward-name-not-given": (dict(reward="own.py"), ("own.py:function",)),
    "reward-file-raises": (dict(reward="broken.py:f"), ("broken.py:f", "boom")),
    "reward-not-callable": (dict(reward="own.py:calls"), ("own.py:calls",)),
    "features-file": (dict(features="latent-mae@none.pth"), ("none.pth",)),
    "features-not-mae": (dict(features="latent-mae@other.pth"), ("other.pth", "latent-MAE")),
    "features-torn": (dict(features="latent-mae@prompts.txt"), ("prompts.txt",)),
    "features-folder": (dict(features="mae@nowhere/at/all"), ("nowhere/at/all",)),
    "out-holds-a-run": (dict(out="old"), ("old", "--resume")),
    "out-is-a-file": (dict(out="prompts.txt"), ("prompts.txt",)),
    "out-under-a-file": (dict(out="prompts.txt/run"), ("prompts.txt",)),
    "model-folder-empty": (dict(model="old"), ("old", "model_index.json")),
    "model-index-torn": (dict(model="torn"), ("torn",)),
    "reward-raises": (dict(reward="own.py:raises"), ("own.py:raises", "step 1", "no camera")),
    "reward-count": (dict(reward="own.py:short"), ("own.py:short", "step 1", "8 images")),
    "resume-nothing": (dict(resume="nowhere", out=None), ("nowhere",)),
    "resume-no-checkpoint": (dict(resume="old", out=None), ("old", "checkpoint")),
    "resume-config-torn": (dict(resume="tornrun", out=None), ("tornrun",)),
    "pairs-missing": (dict(pairs="none.jsonl"), ("none.jsonl",)),
    "pairs-empty": (dict(pairs="empty.txt"), ("empty.txt", "empty")),
    "pairs-latin": (dict(pairs="latin.txt"), ("latin.txt", "byte 5")),
    "pairs-no-json": (dict(pairs="prompts.txt"), ("prompts.txt", "line 1", "JSON")),
    "pairs-outside": (dict(pairs="inner/up.jsonl"), ("up.jsonl", "line 2", "outside")),
    "pairs-absolute": (dict(pairs="inner/absolute.jsonl"), ("absolute.jsonl", "line 1", "outside")),
    "pairs-link": (dict(pairs="inner/link.jsonl"), ("link.jsonl", "line 1", "outside")),
    "pairs-no-picture": (dict(pairs="inner/lost.jsonl"), ("lost.png",)),
    "pairs-one-side": (dict(pairs="inner/half.jsonl"), ("half.jsonl", "line 1", "rejected")),
    "pairs-number": (dict(pairs="inner/number.jsonl"), ("5",)),
    "pairs-not-a-picture": (dict(pairs="inner/text.jsonl"), ("text.png",)),
    "pairs-truncated": (dict(pairs="inner/cut.jsonl"), ("cut.png",)),
}

@pytest.fixture
def _dp_traps(_dp_home, _dp_models):
    """Files that are missing something."""
    def write(name, text):
        (_dp_home / name).write_text(text)

    for folder in ("old", "torn", "tornrun", "inner"):
        (_dp_home / folder).mkdir()
    write("empty.txt", " \n\n")
    (_dp_home / "latin.txt").write_bytes("a café\n".encode("latin-1"))
    write("wrong.jsonl", '{"prompt": "a cat"}\n{"title": "a dog"}\n')
    write("wrong.csv", "title,year\na cat,1\n")
    write("half.json", '["a \\ud800 cat"]')
    write("broken.py", "raise RuntimeError('boom')\n")
    torch.save({"decoder.x": torch.zeros(1)}, _dp_home / "other.pth")
    old = drpo.Config(model=str(_dp_models / "sd"), reward="jpeg", prompts="animals")
    write("old/config.json", json.dumps(asdict(old)))
    write("torn/model_index.json", '{"_class_')
    write("tornrun/config.json", '{"model":')
    _dp_pictures(_dp_home, 1)
    names = _dp_pictures(_dp_home / "inner", 2)
    write("inner/text.png", "no picture")
    (_dp_home / "inner" / "cut.png").write_bytes((_dp_home / "inner" / names[0]).read_bytes()[:900])
    (_dp_home / "inner" / "link.png").symlink_to(_dp_home / "0.png")
    good = {"prompt": "a cat", "chosen": ["0.png"], "rejected": ["1.png"]}
    for name, rows in {
            "up": [good, good | {"chosen": ["../0.png"]}], "absolute": [good | {"chosen": [str(_dp_home / "0.png")]}],
            "link": [good | {"rejected": ["link.png"]}], "lost": [good | {"chosen": ["lost.png"]}],
            "half": [good | {"rejected": []}], "number": [good | {"chosen": [5]}],
            "text": [good | {"chosen": ["text.png"]}], "cut": [good | {"rejected": ["cut.png"]}]}.items():
        write(f"inner/{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    return _dp_home


class TestDrpoPyBadInput:
    """One clear line, exit code 2, nothing written."""

    @pytest.mark.parametrize("case", BAD)
    def test_bad_input(self, case, _dp_models, _dp_traps, capfd):
        settings, words = BAD[case]
        if "pairs" in settings:
            settings = settings | dict(reward=None, prompts=None)
        if "resume" in settings:
            argv = ["--resume", settings["resume"]]
        else:
            argv = _dp_argv(_dp_models, **settings)
        _dp_refused(argv, _dp_traps, capfd, *words)

    def test_bad_flags(self, _dp_home, capfd):
        _dp_refused(["--modle", "toy"], _dp_home, capfd, "--modle")
        _dp_refused(["--steps", "many"], _dp_home, capfd, "--steps", "many")
        _dp_refused(["toy"], _dp_home, capfd, "toy")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
    def test_no_cuda_where_cuda_was_asked_for(self, _dp_models, _dp_home, capfd):
        for device in ("cuda", "cuda:1"):
            _dp_refused(_dp_argv(_dp_models, device=device), _dp_home, capfd, "--device", device, "cpu")

    def test_reward_that_is_bad_at_once_can_be_mended(self, _dp_models, _dp_home, capfd):
        """The same command works after the reward file is mended: the failure left no run behind."""
        argv = _dp_argv(_dp_models, reward="own.py:short", steps=1)
        _dp_refused(argv, _dp_home, capfd, "own.py:short")
        (_dp_home / "own.py").write_text(REWARD_FILE + "\nshort = good\n")
        with contextlib.chdir(_dp_home):
            drpo.main(argv)
        assert _dp_state(_dp_home / "run")["step"] == 1

    def test_hub_model_that_cannot_be_had(self, _dp_home, capfd, monkeypatch):
        """Neither cached nor reachable: says so, names the toy and a local folder as ways on."""
        import huggingface_hub.constants
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(_dp_home / "cache"))
        for model in ("nobody/has-this-model", "sd-turbo", "sdxl-turbo"):
            wanted = model if "/" in model else f"stabilityai/{model}"
            _dp_refused(
                ["--model", model, "--prompts", "animals", "--reward", "jpeg", "--device", "cpu", "--features", "vae"],
                _dp_home, capfd, wanted, "--model toy", "folder")

    def test_settings_and_presets(self):
        """The command line is Config: given before preset before default. The presets are the published recipes."""
        toy, sd, xl = (drpo.parse(["--model", m]) for m in ("toy", "sd-turbo", "sdxl-turbo"))
        assert toy == drpo.Config(kernel="rbf") == drpo.Config.preset("toy")
        # arXiv 2606.02521 and the authors' scripts: K, m, prompts a GPU, lr, updates, weight of the reference, features
        recipe = {"candidates": 24, "anchors": 8, "batch": 8, "lr": 1e-4, "steps": 1000, "lambda_ref": 0.2, "lora_rank": 16,
                  "lora_alpha": 16.0, "weight_decay": 0.01, "clip": 1.0, "features": "latent-mae", "field": "released",
                  "radii": (0.02, 0.05, 0.2), "reward": "pickscore"}
        assert {name: getattr(sd, name) for name in recipe} == recipe
        recipe |= {"candidates": 16, "lr": 1e-5, "steps": 5000, "lambda_ref": 0.25, "features": "unet"}
        assert {name: getattr(xl, name) for name in recipe} == recipe
        mine = drpo.parse("--model sd-turbo --radii 0.1,0.3 --lr 0.5 --field dipole".split())
        assert mine == drpo.Config.preset("sd-turbo", radii=(0.1, 0.3), lr=0.5, field="dipole") and mine.batch == 8

    def test_import_is_light_and_goes_one_way(self, tmp_path):
        """Heavy libraries are imported when a model is loaded, drpo.py knows rewards.py alone, and every module is one."""
        code = ("import sys, drpo; assert not {'diffusers', 'transformers', 'peft', 'accelerate', 'eval'} & set(sys.modules);"
                "import eval, rewards; assert eval.drpo is drpo and rewards is rewards")
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        own = {"rewards": set(), "drpo": {"rewards"}, "eval": {"drpo", "rewards"}}
        for name, known in own.items():
            found = set(re.findall(r"^\s*(?:import|from) (rewards|drpo|eval|scene|ablate|bench)\b",
                                   (HERE / f"{name}.py").read_text(), re.M))
            assert found == known, name

    def test_commands_of_the_readmes_parse(self, monkeypatch):
        """Every line of the READMEs' code blocks that starts one of the programs goes through that program's parser."""
        text = (HERE / "README.md").read_text() + (HERE / "lab" / "README.md").read_text()
        blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
        lines = [line.strip() for b in blocks for line in b.replace("\\\n", " ").splitlines()]
        starts = {}
        for line in lines:
            found = re.match(r"(?:\w+=\S+ )*(?:python|torchrun \S+(?: \S+)*?) ((?:lab/)?\w+\.py)\b(.*)", line)
            if found:
                starts.setdefault(found[1], []).append(shlex.split(found[2], comments=True))
        assert set(starts) >= {"drpo.py", "eval.py", "rewards.py", "lab/ablate.py", "lab/bench.py"}, f"only {set(starts)}"
        monkeypatch.setattr(drpo, "layout", lambda model: "sdxl-turbo" if "xl" in model else "sd-turbo")
        for argv in starts["drpo.py"]:
            if "--resume" in argv:  # the run that is named need not be there: only the flags are looked at
                argv = [a for i, a in enumerate(argv) if a != "--resume" and argv[i - 1:i] != ["--resume"]]
            if "--help" not in argv:
                drpo.check(drpo.parse(argv))

        class Parsed(Exception):
            pass

        plain = argparse.ArgumentParser.parse_args

        def stop(self, *a, **kw):
            plain(self, *a, **kw)
            raise Parsed

        for name, module in (("eval.py", E), ("rewards.py", rewards)):
            for argv in starts[name]:
                with monkeypatch.context() as m:
                    m.setattr(argparse.ArgumentParser, "parse_args", stop)
                    with pytest.raises(Parsed):
                        module.main(argv)
        for argv in starts["lab/ablate.py"]:
            tables = argv[0].split(",") if argv and not argv[0].startswith("-") else []
            assert all(name in ablate.TABLES for name in tables), argv
        for argv in starts["lab/bench.py"]:
            assert argv[0] in ("update", "growth", "numbers", "cost", "make"), argv


# ===== drpo.py: several ranks

def _dp_ranks(argv, home, n, env=()):
    """The processes that torchrun would start."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(env, WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    return [_DpRun(argv, home, dict(env, RANK=str(r), LOCAL_RANK=str(r))) for r in range(n)]


class TestDrpoPySeveralRanks:
    """As torchrun starts them, with gloo."""

    def test_two_ranks_are_one_of_twice_the_batch(self, _dp_models, _dp_home):
        """2 ranks x 2 prompts = 1 rank x 4 prompts: the first update's norm and weights; then with another number."""
        kw = dict(steps=2, clip=1e9, weight_decay=0)
        one = _DpRun(_dp_argv(_dp_models, "one", batch=4, **kw), _dp_home)
        two = _dp_ranks(_dp_argv(_dp_models, "two", batch=2, **kw), _dp_home, 2)
        assert one.wait() == 0 and [r.wait() for r in two] == [0, 0], [r.err for r in (one, *two)]
        a, b = _dp_metrics(_dp_home / "one"), _dp_metrics(_dp_home / "two")
        assert [m["step"] for m in b] == [1, 2], "rank 0 alone writes"
        for x, y in zip(a, b):
            assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-3)
        states = [_dp_state(_dp_home / n) for n in ("one", "two")]
        assert states[0]["position"] == states[1]["position"] == 8
        # Adam's second moments are means of squared gradients: the gradients were equal
        for x, y in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                assert (x[key] - y[key]).norm() <= 2e-3 * x[key].norm()
        run = _DpRun(["--resume", "two", "--steps", "3"], _dp_home)
        assert run.wait() == 0, run.err
        assert _dp_state(_dp_home / "two")["position"] == 10
        assert [m["step"] for m in _dp_metrics(_dp_home / "two")] == [1, 2, 3]
        more = _dp_ranks(["--resume", "two", "--steps", "4"], _dp_home, 2)
        assert [r.wait() for r in more] == [0, 0], [r.err for r in more]
        assert _dp_state(_dp_home / "two")["position"] == 14

    @pytest.mark.parametrize("reward", ("dies3", "raises3_on_1"))
    def test_a_rank_that_dies(self, reward, _dp_models, _dp_home):
        """A clear line, and a checkpoint of the last whole step."""
        ranks = _dp_ranks(_dp_argv(_dp_models, reward=f"own.py:{reward}", steps=6), _dp_home, 2)
        assert [r.wait() for r in ranks] == [2, 9 if reward == "dies3" else 2]
        _dp_one_line(ranks[0].err.strip().splitlines()[-1], "rank", "step 3", "--resume run")
        assert "Traceback" not in ranks[0].err
        assert _dp_state(_dp_home / "run")["step"] == 2 and [m["step"] for m in _dp_metrics(_dp_home / "run")] == [1, 2]
        run = _DpRun(["--resume", "run", "--steps", "3"], _dp_home)
        assert run.wait() == 0, run.err

    def test_signal_to_all_ranks(self, _dp_models, _dp_home):
        """SIGTERM, as torchrun passes it on: every rank ends after the same step."""
        ranks = _dp_ranks(_dp_argv(_dp_models, reward="own.py:slow", steps=10_000), _dp_home, 2)
        ranks[0].until(_dp_home / "run" / "metrics.jsonl", 2)
        for r in ranks:
            r.kill(signal.SIGTERM)
            time.sleep(0.03)
        assert [r.wait() for r in ranks] == [143, 143], [r.err for r in ranks]
        assert _dp_state(_dp_home / "run")["step"] == len(_dp_metrics(_dp_home / "run"))


# ===== rewards.py: contract

ROOT = Path(__file__).parent

def _rw_images(count, size=(64, 64), seed=0):
    """Smooth random pictures with some grain."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.integers(-20, 21, (size[1], size[0], 3))
        pictures.append(Image.fromarray((np.array(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8)))
    return pictures

def _rw_tensor(images):
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 255 for i in images])

def _rw_reward(function, name="mine"):
    return rewards.Reward(name, {name: function}, {name: 1.0})

def _rw_mean(images, prompts):
    """Mean level of a picture plus the length of its prompt."""
    return [float(np.array(image).mean()) + len(prompt) for image, prompt in zip(images, prompts)]


class TestRewardsPyContract:
    """Specs, what a reward may answer, combination, copies."""

    @pytest.mark.parametrize("spec, weights", [
        ("pickscore", {"pickscore": 1}),
        ("pickscore=1, aesthetic=0.5", {"pickscore": 1, "aesthetic": 0.5}),
        ("jpeg=-2e-1", {"jpeg": -0.2}),
        ("pickscore@/data/pick=2", {"pickscore@/data/pick": 2}),
        ("my_file.py:f=3,a.b:c", {"my_file.py:f": 3, "a.b:c": 1}),
        ("http://h:8000=0.5,https://g", {"http://h:8000": 0.5, "https://g": 1}),
        ("vlm@http://h:1/v1?model=q", {"vlm@http://h:1/v1?model=q": 1}),
        ("vlm@http://h:1/v1?a=b&model=q=0.25,clip=2", {"vlm@http://h:1/v1?a=b&model=q": 0.25, "clip": 2}),
    ])
    def test_reward_spec(self, spec, weights):
        assert rewards.parse(spec) == weights

    @pytest.mark.parametrize("spec, says", [
        ("jpge", "unknown reward 'jpge'; nearest: jpeg; for all names: python rewards.py list"),
        ("pick@/some/where", "unknown reward 'pick@/some/where'; nearest: pickscore"),
        ("jpeg=much", "the weight 'much' of 'jpeg' is not a number"), ("jpeg=nan", "the weight 'nan' of 'jpeg' says nothing"),
        ("jpeg=inf", "finite number"), ("jpeg=0", "--watch"), ("jpeg=", "the weight '' of 'jpeg' is not a number"),
        ("jpeg,,clip", "an item without a name"), ("", "an item without a name"), ("=2", "an item without a name"),
        ("jpeg,jpeg=2", "'jpeg' is named twice"), ("jpeg@/x", "reward 'jpeg': it takes no path"),
        ("judge.py", "name what it holds, judge.py:function"), ("no_such_package:f", "ModuleNotFoundError"),
        ("math:no_such", "AttributeError"), ("math:pi", "must be callable"),
        ("gone.py:f", "FileNotFoundError"), ("http://", "is not a URL"), ("http://h:port", "is not a URL"),
        ("vlm", "name the endpoint"), ("vlm@http://h/v1", "name the model"), ("vlm@h?model=x", "is not a URL"),
        ("vlm@http://h/v1?model=a&tokens=few", "tokens=1024"), ("hpsv3", "pip install hpsv3"),
    ])
    def test_reward_bad_spec(self, spec, says):
        with pytest.raises(UserError) as caught:
            rewards.load(spec)
        assert says in str(caught.value) and "\n" not in str(caught.value)

    def test_reward_user_file(self, tmp_path, monkeypatch):
        (tmp_path / "neighbour.py").write_text("OFFSET = 10\n")
        file = tmp_path / "mine.py"
        file.write_text("import numpy as np\nfrom neighbour import OFFSET\n"
                        "def mean(images, prompts):\n    return np.array([np.asarray(i).mean() + OFFSET for i in images])\n"
                        "class Judge:\n    def __init__(self):\n        self.bonus = 3\n"
                        "    def __call__(self, images, prompts):\n        return [len(p) + self.bonus for p in prompts]\n"
                        "judge = Judge()\nclass Picky:\n    def __init__(self, model):\n        pass\n"
                        "def short(images):\n    return []\n"
                        "def long(images, prompts, model):\n    return []\n")
        images = [Image.new("RGB", (4, 4), (20, 20, 20)), Image.new("RGB", (4, 4), (50, 50, 50))]
        assert rewards.load(f"{file}:mean")(images, ["a", "b"]).tolist() == [30, 60]
        assert rewards.load(f"{file}:Judge")(images, ["a", "abc"]).tolist() == [4, 6]
        assert rewards.load(f"{file}:judge")(images, ["a", "abc"]).tolist() == [4, 6]
        assert rewards.load("mine:mean")(images, ["a", "b"]).tolist() == [30, 60]
        for attribute, says in [("short", "f(images, prompts)"), ("long", "f(images, prompts)"), ("Picky", "TypeError"),
                                ("missing", "AttributeError")]:
            with pytest.raises(UserError, match=attribute) as caught:
                rewards.load(f"{file}:{attribute}")
            assert says in str(caught.value)
        (tmp_path / "broken.py").write_text("def f(:\n")
        with pytest.raises(UserError, match="SyntaxError"):
            rewards.load(f"{tmp_path}/broken.py:f")

    def test_reward_files_are_imported_as_python_would(self, tmp_path, monkeypatch):
        """A module on the current folder's path, relative imports in a package, and a neighbour called rewards.py."""
        package = tmp_path / "mypkg"
        (package / "inner").mkdir(parents=True)
        for folder in (package, package / "inner"):
            (folder / "__init__.py").write_text("")
        (package / "base.py").write_text("BONUS = 5\n")
        (package / "inner" / "score.py").write_text("from ..base import BONUS\n"
                                                    "def red(images, prompts):\n    return [BONUS] * len(images)\n")
        (tmp_path / "alone").mkdir()
        for name in ("rewards", "eval", "drpo"):
            (tmp_path / "alone" / f"{name}.py").write_text(f"NAME = '{name} of the neighbour'\n")
        (tmp_path / "alone" / "judge_x.py").write_text(
            "import eval, rewards, drpo\nassert all(m.NAME.endswith('neighbour') for m in (eval, rewards, drpo))\n"
            "def f(images, prompts):\n    return [len(rewards.NAME)] * len(images)\n")
        images = _rw_images(2)
        monkeypatch.chdir(tmp_path)
        assert rewards.load("mypkg.inner.score:red")(images, ["a", "b"]).tolist() == [5, 5]
        assert rewards.load("mypkg/inner/score.py:red")(images, ["a", "b"]).tolist() == [5, 5]
        reward = rewards.load("alone/judge_x.py:f")
        assert reward(images, ["a", "b"]).tolist() == [24, 24]
        assert sys.modules["rewards"] is rewards and sys.modules["drpo"] is drpo and sys.modules["eval"] is E
        module, = {part.__module__ for part in reward.parts.values()}
        assert module == "judge_x" and sys.modules[module].f is reward.parts["alone/judge_x.py:f"]  # a spawned process finds it

    @pytest.mark.parametrize("answer, scores", [
        ([1, 2.5], [1, 2.5]), ((np.float32(1), np.int64(2)), [1, 2]),
        (torch.tensor([1., 2.], dtype=torch.bfloat16), [1, 2]), (torch.tensor([1., 2.]).to(torch.float8_e4m3fn), [1, 2]), (torch.tensor([1, 2]), [1, 2]),
        (np.array([3, 4]), [3, 4]), ([torch.tensor(1.), np.array(2.)], [1, 2]), ([math.nan, 1], [math.nan, 1]),
        (torch.tensor([1., 2.], requires_grad=True), [1, 2]),
    ])
    def test_reward_accepts(self, answer, scores):
        got = _rw_reward(lambda images, prompts: answer)(_rw_images(2), ["a", "a"])
        assert got.dtype == torch.float64 and got.device.type == "cpu"
        assert np.array_equal(got.numpy(), np.array(scores, dtype=np.float64), equal_nan=True)

    @pytest.mark.parametrize("answer, says", [
        ([1.], "returned 1 scores for 2 images; a reward returns one float an image"),
        ([1, 2, 3], "returned 3 scores for 2 images"), (None, "returned NoneType; a reward returns one float an image"),
        (1.0, "returned float;"), ("ab", "returned str;"), ({"a": 1, "b": 2}, "returned dict;"),
        ([1, None], "returned None (NoneType) for image 1"), (["1", 2], "returned '1' (str) for image 0"),
        ([True, False], "returned True (bool) for image 0"), (torch.tensor([True, False]), "torch.bool"), (torch.ones(2, device="meta"), "meta tensor"),
        ([[1.], [2.]], "(list) for image 0"), ([torch.eye(3), 1], "(Tensor) for image 0"),
        (torch.eye(2), "an array of shape (2, 2) for 2 images"),
        (np.float64(3), "returned float64;"), ([1j, 2], "(complex)"), ([math.inf, 1], "returned inf for image 0"),
        ([1, -math.inf], "returned -inf for image 1"),
        (torch.tensor([1., math.inf]), "returned inf for image 1"), (iter([1, 2]), "returned list_iterator;"),
    ])
    def test_reward_refuses(self, answer, says):
        with pytest.raises(UserError) as caught:
            _rw_reward(lambda images, prompts: answer, "jpeg")(_rw_images(2), ["a", "a"])
        assert says in str(caught.value) and str(caught.value).startswith("reward 'jpeg': ")
        assert "\n" not in str(caught.value)

    def test_reward_that_raises(self):
        def fails(images, prompts):
            if "memory" in prompts:
                raise torch.OutOfMemoryError  # left to whoever can make the batch smaller
            raise KeyError("two\nlines")
        with pytest.raises(UserError, match=r"^reward 'mine': KeyError: 'two\\nlines'$") as caught:
            _rw_reward(fails)(_rw_images(1), ["a"])
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(torch.OutOfMemoryError):
            _rw_reward(fails)(_rw_images(1), ["memory"])
        with pytest.raises(UserError, match="2 images but 1 prompts"):
            _rw_reward(_rw_mean)(_rw_images(2), ["a"])

    def test_reward_batches_and_tensors(self):
        calls = []

        def counts(images, prompts):
            calls.append(len(images))
            return _rw_mean(images, prompts)
        counts.batch_size = 3
        images, prompts = _rw_images(8), [f"{'x' * i}" for i in range(8)]
        expected = _rw_mean(images, prompts)
        assert np.allclose(_rw_reward(counts)(images, prompts), expected) and calls == [3, 3, 2]
        # a tensor reaches a reward that wants PIL as the very same pictures
        assert np.allclose(_rw_reward(counts)(_rw_tensor(images), prompts), expected)
        assert np.array_equal(np.array(rewards.to_pil(torch.full((1, 3, 2, 2), 0.499))[0]), np.full((2, 2, 3), 127))
        # and untouched one that takes tensors
        seen = []

        def direct(images, prompts):
            seen.append(images)
            return images.mean((1, 2, 3))
        counts.score_tensor = direct
        batch = _rw_tensor(images) * 0.9999
        got = _rw_reward(counts)(batch, prompts)
        assert torch.allclose(got.float(), batch.mean((1, 2, 3))) and [len(s) for s in seen] == [3, 3, 2]
        assert torch.equal(torch.cat(seen), batch)
        assert _rw_reward(counts)([], []).shape == (0,)
        for wrong in (batch[:, :1], (batch * 255).byte(), batch.flatten(1)):
            with pytest.raises(UserError, match=r"float \(B,3,H,W\) in \[0,1\]"):
                _rw_reward(counts)(wrong, prompts)

    def test_rewards_cannot_spoil_each_others_input(self):
        """Each part, watched ones too, gets pictures, tensors and prompts of its own."""
        def vandal(images, prompts):
            for image in images:
                image.thumbnail((2, 2))
                image.paste((0, 0, 0), (0, 0, 2, 2))
            prompts.clear()
            return [1.0] * len(images)

        def tensor_vandal(images, prompts):
            images.sub_(1)
            return [1.0] * len(images)

        def mean(images, prompts):
            return [float(np.asarray(image).mean()) + len(prompt) for image, prompt in zip(images, prompts, strict=True)]
        tensor_vandal.score_tensor = tensor_vandal
        images, prompts = _rw_images(3), ["a", "bb", "ccc"]
        want, batch = mean(images, prompts), _rw_tensor(images)
        before = batch.clone()
        reward = rewards.Reward("all", {"v": vandal, "t": tensor_vandal, "m": mean}, {"v": 1, "t": 1, "m": 1},
                                {"v": vandal, "m": mean})
        for given in (images, batch):
            if given is images:
                reward.parts["t"] = vandal
            scores = reward.score(given, prompts, watch=True)
            assert scores["m"].tolist() == pytest.approx(want) and scores["watch/m"].tolist() == pytest.approx(want)
            reward.parts["t"] = tensor_vandal
        assert torch.equal(batch, before) and prompts == ["a", "bb", "ccc"] and images[0].size == (64, 64)

    def test_watched_rewards_are_scored_on_request_and_never_rank(self):
        reward = rewards.load("jpeg", watch="incompressibility,jpeg")
        images = _rw_images(3)
        assert set(reward.score(images, ["p"] * 3)) == {"jpeg"}
        scores = reward.score(images, ["p"] * 3, watch=True)
        assert set(scores) == {"jpeg", "watch/incompressibility", "watch/jpeg"}
        assert torch.equal(reward.combine(scores), scores["jpeg"])
        mine = rewards.load(lambda images, prompts: [1.0] * len(images), watch="jpeg")
        assert set(mine.score(images, ["p"] * 3, watch=True)) > {"watch/jpeg"} and mine(images, ["p"] * 3).tolist() == [1] * 3

    def test_reward_combination(self):
        table = {"a": [1., 2., 4., 9., 5., 5.], "b": [0.3, math.nan, 0.1, 0.2, 7., math.nan]}
        prompts = ["p", "q", "p", "p", "q", "q"]
        parts = {name: (lambda images, prompts, values=values: values) for name, values in table.items()}
        reward = rewards.Reward("both", parts, {"a": 2., "b": -.5})
        expected = np.zeros(6)
        for prompt in "pq":
            group = np.array([p == prompt for p in prompts])
            for name, weight in reward.weights.items():
                values = np.array(table[name])[group]
                known = values[~np.isnan(values)]
                std = known.std()
                expected[group] += weight * np.nan_to_num((values - known.mean()) / std) if std else 0
        images = _rw_images(6)
        assert np.allclose(reward(images, prompts), expected, atol=1e-6)
        assert {k: v.tolist()[0] for k, v in reward.score(images, prompts).items()} == {"a": 1., "b": pytest.approx(.3)}
        # any leading shape, and a candidate on which nobody has an opinion stays NaN
        scores = {"a": torch.tensor([[1., 2., math.nan], [3., 3., 3.]]),
                  "b": torch.tensor([[5., 4., math.nan], [1., 2., 3.]])}
        got = reward.combine(scores).float()
        assert got[0, 2].isnan() and torch.allclose(got[0, :2], torch.tensor([-2.5, 2.5]))
        assert torch.allclose(got[1], -.5 * torch.tensor([-1.5 ** .5, 0, 1.5 ** .5]))
        # equal scores whose mean is not exact add nothing
        assert reward.combine({"a": torch.full((7,), .1), "b": torch.full((7,), .7)}).tolist() == [0] * 7

    def test_reward_single_is_native(self):
        scores = torch.tensor([.1, math.nan, -3e-8, 7e30], dtype=torch.float64)
        got = _rw_reward(lambda images, prompts: scores)(_rw_images(4), ["a", "b", "a", "b"])
        assert torch.equal(got.view(torch.int64), scores.view(torch.int64))
        less = rewards.load("jpeg=-1")
        images = _rw_images(3)
        assert torch.equal(less(images, list("abc")), rewards.load("incompressibility")(images, list("abc")))

    def test_reward_jpeg(self):
        images = _rw_images(3, (80, 48)) + [Image.new("RGBA", (80, 48), (9, 200, 30, 255))]
        sizes = []
        for image in images:
            file = io.BytesIO()
            image.convert("RGB").save(file, format="JPEG", quality=95)
            sizes.append(len(file.getvalue()) / 1000)
        assert np.allclose(rewards.load("jpeg")(images, ["p"] * 4), -np.array(sizes))
        assert np.allclose(rewards.load("incompressibility")(_rw_tensor(images[:3]), ["p"] * 3), sizes[:3])
        grey = rewards.load("incompressibility")([Image.new("RGB", (512, 512), (128, 128, 128))], ["p"])
        assert grey.item() == pytest.approx(4.7, abs=0.1)


# ===== rewards.py: files


class TestRewardsPyFiles:
    """Prompts and pictures are read as what they are."""

    def test_prompt_sources(self, tmp_path):
        """Files are read as what they are; lines end at \\n, \\r\\n and \\r alone."""
        def read(name, data):
            (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
            return rewards.load_prompts(str(tmp_path / name))

        assert read("p.txt", "\ufeffa cat\n\n  une forêt \r\nx\ry") == ["a cat", "une forêt", "x", "y"]
        assert read("q.txt", "a\u2028b") == ["a\u2028b"] and len(read("r.txt", "a\x85b\nc\x0bd\x0ce")) == 2
        assert read("w.txt", "a cat\na dog\n".encode("utf-16")) == ["a cat", "a dog"]
        for name in ("p.jsonl", "p.ndjson", "P.JSONL"):
            assert read(name, '{"prompt": "a cat", "x": 1}\n\n{"caption": "a dog"}\n"plain"\n') == ["a cat", "a dog", "plain"]
        assert read("p.json", '[{"prompt": "a"}, {"prompt": "b"}]') == ["a", "b"]
        assert read("q.json", '["a", "b"]') == ["a", "b"]
        assert read("p.csv", 'id,Prompt,caption\n1,x,"a cat, two\nlines"\n') == ["a cat, two\nlines"]
        assert read("p.tsv", "prompt\tid\na cat\t1\na dog\t2\n") == ["a cat", "a dog"]
        for name, data in (("p.yaml", "- a"), ("s.json", '{"prompt": "a"}'), ("t.json", "[1]"), ("u.csv", "title\na\n")):
            with pytest.raises(UserError, match=name):
                read(name, data)
        animals = rewards.load_prompts("animals")
        assert len(animals) == len(set(animals)) == 135 and "a llama playing chess" in animals

    def test_prompt_list_that_cannot_be_fetched_or_is_another(self, tmp_path, capfd, monkeypatch):
        """The fetched list is checked against its checksum each time; a failure names address and place of the file."""
        def unreachable(url, path, sha256, **kw):
            raise OSError("no route")
        monkeypatch.setenv("DRPO_CACHE", str(tmp_path))
        monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
        with pytest.raises(UserError, match="train.txt.*no route"):
            rewards.load_prompts("pickapic")
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, sha, **kw: Path(path).write_text("a cat\n"))
        with pytest.raises(UserError, match="sha256"):
            rewards.load_prompts("pickapic")

    def test_pictures_are_seen_as_people_see_them(self, tmp_path):
        """One loader: EXIF orientation, 16-bit grey, alpha on white, the first frame, CMYK."""
        half = Image.new("RGB", (64, 32), (255, 0, 0))
        half.paste((0, 0, 255), (32, 0, 64, 32))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter
        half.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        seen = np.asarray(rewards.read_picture(tmp_path / "turned.jpg"), float)
        want = np.asarray(half.rotate(-90, expand=True), float)
        assert seen.shape == want.shape == (64, 32, 3) and np.abs(seen - want).mean() < 8
        ramp = np.linspace(0, 65535, 256 * 16).round().astype(np.uint16).reshape(64, 64)
        Image.fromarray(ramp).save(tmp_path / "ramp.png")
        assert np.asarray(rewards.read_picture(tmp_path / "ramp.png")).mean() == pytest.approx(127.5, abs=1)
        Image.fromarray((ramp // 300).astype(np.uint16)).save(tmp_path / "dark.png")  # dark, and still 16 bits
        assert np.asarray(rewards.read_picture(tmp_path / "dark.png")).max() <= 1
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
        assert np.asarray(rewards.read_picture(tmp_path / "clear.png")).min() == 255
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([255, 0, 0] * 256)
        palette.save(tmp_path / "palette.png", transparency=0)
        assert np.asarray(rewards.read_picture(tmp_path / "palette.png")).min() == 255
        frames = [Image.new("RGB", (8, 8), c) for c in ("lime", "blue")]
        frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
        assert np.asarray(rewards.read_picture(tmp_path / "moving.gif"))[0, 0].tolist() == [0, 255, 0]
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
        red = np.asarray(rewards.read_picture(tmp_path / "cmyk.jpg"))[0, 0]
        assert red[0] > 180 and max(red[1:]) < 80
        for name, data in (("cut.png", (tmp_path / "ramp.png").read_bytes()[:200]), ("text.png", b"no picture")):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(UserError, match=name):
                rewards.read_picture(tmp_path / name)
        wide = Image.new("RGB", (96, 32), "red")
        wide.paste("lime", (32, 0, 64, 32))
        wide.save(tmp_path / "wide.png")
        middle, = rewards.load_pictures([tmp_path / "wide.png"], 32)  # the centre, not squeezed
        assert middle[1].min() == 1 and middle[0].max() == 0

    @pytest.mark.parametrize("spec, says", [
        ("pickscore", ["model.safetensors", "huggingface.co/yuvalkirstain/PickScore_v1", "pickscore@/path/to/folder"]),
        ("hpsv2", ["HPS_v2.1_compressed.pt", "huggingface.co/xswu/HPSv2", "hpsv2@/path/to/folder"]),
        ("imagereward", ["ImageReward.pt", "huggingface.co/THUDM/ImageReward", "imagereward@/path/to/folder"]),
        ("aesthetic", ["sac+logos+ava1-l14-linearMSE.pth", "aesthetic@"]),
        ("clip@/no/such/place", ["config.json", "/no/such/place", "no such file or folder"]),
        ("hpsv2@EMPTY", ["HPS_v2.1_compressed.pt", "FileNotFoundError"]),
        ("imagereward@JUNK", ["ImageReward.pt", "UnpicklingError"]),
        ("geneval@/no/such/place", ["/no/such/place", "geneval@/path/to/evaluation_metadata.jsonl"]),
    ])
    def test_reward_missing_files(self, spec, says, tmp_path, monkeypatch):
        import huggingface_hub
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("DRPO_CACHE", str(tmp_path))
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **kw: (_ for _ in ()).throw(OSError("no route")))
        (tmp_path / "junk").write_bytes(b"\x80\x02not weights")
        spec = spec.replace("EMPTY", str(tmp_path)).replace("JUNK", str(tmp_path / "junk"))
        with pytest.raises(UserError) as caught:
            rewards.load(spec)
        assert all(word in str(caught.value) for word in says) and "\n" not in str(caught.value)


# ===== rewards.py: models

def _rw_clip_tokenizer(folder):
    """A CLIP tokenizer of single letters; the end token has the highest number, as in the real one."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {t: i for i, t in enumerate(letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}))
    return vocab

_RW_TINY = {  # the shape of `_rw_open_clip_weights`
    "projection_dim": 24,
    "text_config": dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                        hidden_act="gelu", projection_dim=24, vocab_size=54, bos_token_id=52, eos_token_id=53),
    "vision_config": dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
                          hidden_act="gelu", projection_dim=24, patch_size=56),
}

def _rw_waves(count, size):
    """Pictures by a formula: smooth, all different, the same under any version of Pillow."""
    x, y = np.meshgrid(np.arange(size[0]) / 40, np.arange(size[1]) / 40)
    pictures = []
    for n in range(1, count + 1):
        channels = [np.sin(n * x + c) * np.cos(y * (c + 1) - n) for c in range(3)]
        pictures.append(Image.fromarray((127.5 + 127.5 * np.stack(channels, -1)).round().astype(np.uint8)))
    return pictures

def _rw_open_clip_weights(projection=24):
    """Random weights with open_clip's and OpenAI's names: a ViT of width 64 in patches of 56, a text model of width 32."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (shape[-1] ** -.5 if len(shape) > 1 else .3)
    weights = {"logit_scale": torch.tensor(4.6), "positional_embedding": draw(77, 32),
               "text_projection": draw(32, projection), "token_embedding.weight": draw(54, 32),
               "visual.class_embedding": draw(64), "visual.proj": draw(64, projection),
               "visual.positional_embedding": draw(17, 64), "visual.conv1.weight": draw(64, 3, 56, 56) * .2}
    norms = {"visual.ln_pre": 64, "visual.ln_post": 64, "ln_final": 32}
    for prefix, width in (("visual.", 64), ("", 32)):
        for n in range(2):
            p = f"{prefix}transformer.resblocks.{n}."
            norms |= {p + "ln_1": width, p + "ln_2": width}
            for name, rows, columns in (("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
                                        ("mlp.c_fc.", 4 * width, width), ("mlp.c_proj.", width, 4 * width)):
                weights |= {p + name + "weight": draw(rows, columns), p + name + "bias": draw(rows)}
    for name, width in norms.items():
        weights |= {name + ".weight": 1 + draw(width), name + ".bias": draw(width)}
    return weights

def _rw_head_weights(width):
    """Random weights of the five linear layers of the LAION predictor and of ImageReward."""
    generator = torch.Generator().manual_seed(6)
    weights = {}
    for i, rows, columns in ((0, 1024, width), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        weights[f"layers.{i}.weight"] = torch.randn(rows, columns, generator=generator) * columns ** -.5
        weights[f"layers.{i}.bias"] = torch.randn(rows, generator=generator) * .3
    return weights

def _rw_clip_folder(folder, projection=24, activation="gelu"):
    """A folder of a small CLIPModel with these weights and its tokenizer, as of a hub."""
    from transformers import CLIPConfig, CLIPModel
    config = CLIPConfig(**{**_RW_TINY, "projection_dim": projection})
    config.text_config.hidden_act = config.vision_config.hidden_act = activation
    weights = rewards.from_open_clip(_rw_open_clip_weights(projection))
    CLIPModel.from_pretrained(None, config=config, state_dict=weights).save_pretrained(folder)
    _rw_clip_tokenizer(folder)

_RW_PROMPTS = ["a cat", "a red dog", "two birds", "a cat"]

def _rw_behaves(reward, tolerance=1e-5):
    """What every model reward must do: repeat itself, not care for order or batch size, tell pictures apart."""
    images, prompts = _rw_images(5, (90, 70)) + [Image.new("RGB", (90, 70))], ["a cat", "a dog"] * 3
    (name, part), = reward.parts.items()
    scores = reward(images, prompts)
    assert torch.equal(scores, reward(images, prompts))
    assert torch.allclose(scores.flip(0), reward(images[::-1], prompts[::-1]), atol=tolerance)
    part.batch_size = 2
    assert torch.allclose(scores, reward(images, prompts), atol=tolerance)
    shuffled = np.random.default_rng(0).permutation(np.array(images[0]).reshape(-1, 3)).reshape(70, 90, 3)
    others = reward([images[0], Image.fromarray(shuffled), images[5]], ["a cat"] * 3)
    assert others.isfinite().all() and len(set(others.tolist())) == 3

_RW_BLIP_TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=40,
                     layer_norm_eps=1e-12, encoder_hidden_size=48, max_position_embeddings=64)

_RW_BLIP_VISION = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, patch_size=56,
                       image_size=224, layer_norm_eps=1e-6)

def _rw_blip_weights():
    """Random weights with the names of ImageReward.pt."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (shape[-1] ** -.5 if len(shape) > 1 else .3)
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    weights = {v + "cls_token": draw(1, 1, 48), v + "pos_embed": draw(1, 17, 48),
               v + "patch_embed.proj.weight": draw(48, 3, 56, 56) * .2, v + "patch_embed.proj.bias": draw(48),
               t + "embeddings.word_embeddings.weight": draw(40, 32),
               t + "embeddings.position_ids": torch.arange(64)[None],
               t + "embeddings.position_embeddings.weight": draw(64, 32)}
    norms, linears = {v + "norm": 48, t + "embeddings.LayerNorm": 32}, {}
    for n in range(2):
        b, e = f"{v}blocks.{n}.", f"{t}encoder.layer.{n}."
        norms |= {b + "norm1": 48, b + "norm2": 48, e + "attention.output.LayerNorm": 32,
                  e + "crossattention.output.LayerNorm": 32, e + "output.LayerNorm": 32}
        linears |= {b + "attn.qkv": (144, 48), b + "attn.proj": (48, 48), b + "mlp.fc1": (96, 48),
                    b + "mlp.fc2": (48, 96), e + "intermediate.dense": (64, 32), e + "output.dense": (32, 64)}
        for kind, width in (("attention", 32), ("crossattention", 48)):
            linears |= {f"{e}{kind}.self.query": (32, 32), f"{e}{kind}.self.key": (32, width),
                        f"{e}{kind}.self.value": (32, width), f"{e}{kind}.output.dense": (32, 32)}
    for i, shape in zip((0, 2, 4, 6, 7), ((1024, 32), (128, 1024), (64, 128), (16, 64), (1, 16))):
        linears[f"mlp.layers.{i}"] = shape
    for name, shape in linears.items():
        weights |= {name + ".weight": draw(*shape), name + ".bias": draw(shape[0])}
    for name, width in norms.items():
        weights |= {name + ".weight": 1 + draw(width), name + ".bias": draw(width)}
    return weights

_RW_ORIGINAL = {  # what the originals' own code gives for the pictures of `_rw_waves`, these prompts and weights
    "pickscore": [28.709972, 29.506081, 28.312414, 43.962631],  # the model card's, transformers 4.57.1; 640 x 427
    "clip": [0.270572, 0.353885, 0.281806, 0.411300],  # OpenAI's, clip-anytorch 2.6.0; 280 x 280
    "aesthetic": [0.690763, 0.682535, 0.690826, 0.688289],  # its repository's, 6934dd81, on OpenAI's; 640 x 427
    "hpsv2": [0.238148, 0.424465, 0.398144, 0.230903],  # hpsv2 1.2.0; 640 x 427
    "hpsv2 tall": [0.109186, 0.202356, 0.257832, 0.119639],  # 85 x 320
    "imagereward": [-0.373085, -0.047387, 0.280459, 0.160174],  # image-reward 1.5; 640 x 427
}
_RW_GENEVAL = 0x2008040140a800a4280010000201912c80000080446448000010080000000000003800040801020000040200008000200000

class TestRewardsPyModels:
    """CLIP and its descendants: the originals' own numbers, for small seeded weights."""

    @pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 517), (640, 231), (64, 64), (225, 224), (100, 37)])
    def test_reward_clip_pixels(self, size):
        from transformers import CLIPImageProcessor
        images = _rw_images(2, size)
        judge = CLIPImageProcessor()(images, return_tensors="pt")["pixel_values"]
        mine = rewards.clip_pixels(images, "cpu")
        assert mine.shape == judge.shape and (mine - judge).abs().max() < 1e-6
        # the tensor path against PIL: at most one level of 255 (two where the picture is enlarged), seldom
        level, grows = 1 / 255 / torch.tensor(rewards.CLIP_STD).view(3, 1, 1), min(size) < 224
        difference = ((rewards.clip_pixels(_rw_tensor(images), "cpu") - mine) / level).abs()
        assert difference.max() < (2.01 if grows else 1.01)
        assert (difference > 0.5).float().mean() < (1e-2 if grows else 1e-3)

    def test_reward_centre_crop_of_torchvision(self):
        """int(round((long - 224) / 2)), by hand, for every long side; a pixel beside the floor of transformers for some."""
        differs = 0
        for long in (225, 227, 228, 229, 230, 231, 243, 327, 335):
            picture = np.zeros((224, long, 3), np.uint8)
            picture[..., 0] = np.arange(long) % 256
            crops = {fit: rewards.clip_pixels([Image.fromarray(picture)], "cpu", fit=fit) for fit in ("round", "floor")}
            values = {fit: ((x[0, 0, 0] * rewards.CLIP_STD[0] + rewards.CLIP_MEAN[0]) * 255).round() for fit, x in crops.items()}
            left = int(round((long - 224) / 2.0))
            assert values["round"].tolist() == [i % 256 for i in range(left, left + 224)], long
            assert values["floor"][0] == (long - 224) // 2
            differs += left != (long - 224) // 2
        assert differs > 2

    @pytest.mark.parametrize("size", [(300, 200), (85, 320), (224, 224), (96, 96)])
    def test_reward_hpsv2_pixels(self, size):
        """In float, resized once (both sides rounded from the product with 224 / longest), black beside: not clamped."""
        image, = _rw_images(1, size)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        height, width = (round(v * (224 / max(size))) for v in (size[1], size[0]))
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)[0]
        canvas = torch.zeros(3, 224, 224)
        top, left = (224 - height) // 2, (224 - width) // 2
        canvas[:, top:top + height, left:left + width] = x
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (rewards.CLIP_MEAN, rewards.CLIP_STD))
        for given in ([image], _rw_tensor([image])):
            assert torch.allclose(rewards.clip_pixels(given, "cpu", fit="pad")[0], (canvas - mean) / std, atol=1e-5)

    def test_reward_hpsv2_texts(self):
        """What open_clip's tokenizer does first: entities twice, quotes, wide letters, ligatures, composition."""
        for text, want in (("Tom &amp;amp; Jerry", "Tom & Jerry"), ("it\u2019s \u201cred\u201d", "it's \"red\""),
                           ("\uff21\uff22\u3000\ufb01sh", "AB fish"), ("cafe\u0301 ", "caf\u00e9"), ("x\u2154", "x\u2154")):
            assert rewards.repaired(text) == want

    def test_reward_pickscore_and_clip(self, tmp_path):
        large = _rw_images(4, (512, 512))
        for name, size, activation, tolerance in (("pickscore", (640, 427), "gelu", 1e-2), ("clip", (280, 280), "quick_gelu", 5e-4)):
            _rw_clip_folder(tmp_path / name, activation=activation)
            reward = rewards.load(f"{name}@{tmp_path / name}")
            assert reward(_rw_waves(4, size), _RW_PROMPTS).tolist() == pytest.approx(_RW_ORIGINAL[name], rel=2e-5)
            # a tensor scores as its saved picture
            assert torch.allclose(reward(_rw_tensor(large), _RW_PROMPTS), reward(large, _RW_PROMPTS), atol=tolerance)
            _rw_behaves(reward, 2e-5)

    def test_reward_texts_are_read_once(self, tmp_path):
        _rw_clip_folder(tmp_path)
        clip, read = rewards.clip_at("clip", rewards.CLIP_L, "cpu", str(tmp_path)), []
        tokenize = clip.tokenize
        clip.tokenize = lambda texts: read.extend(texts) or tokenize(texts)
        many = [f"{chr(97 + i % 26)} {chr(97 + i // 26 % 26)} {chr(97 + i // 676)}" for i in range(4096)]
        first = clip.text(["a cat", "a dog", "a cat"])
        clip.text(["a dog"])
        assert read == ["a cat", "a dog"] and torch.equal(first[0], first[2])
        clip.model.text_model, inner = torch.nn.Identity(), clip.model.text_model
        clip.model.text_model.forward = lambda input_ids: types.SimpleNamespace(
            pooler_output=input_ids[:, :32].float())
        clip.text(many)
        assert len(clip.known) == 4096  # the memory is bounded
        clip.model.text_model = inner
        assert torch.allclose(clip.text(["a cat"]), first[:1], atol=1e-6)

    def test_reward_aesthetic(self, tmp_path):
        _rw_clip_folder(tmp_path, 768, "quick_gelu")
        images = _rw_waves(4, (640, 427))
        for name in ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth"):
            torch.save(_rw_head_weights(768), tmp_path / name)
            reward = rewards.load(f"aesthetic@{tmp_path}")
            assert reward(images, _RW_PROMPTS).tolist() == pytest.approx(_RW_ORIGINAL["aesthetic"], abs=3e-6)
            (tmp_path / name).unlink()
        assert torch.equal(reward(images, _RW_PROMPTS), reward(images, ["another"] * 4))
        _rw_behaves(reward, 1e-6)

    def test_reward_hpsv2(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rewards, "VIT_H", _RW_TINY)
        weights = _rw_open_clip_weights()
        _rw_clip_tokenizer(tmp_path)
        torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
        reward = rewards.load(f"hpsv2@{tmp_path}")
        images = _rw_waves(4, (640, 427))
        tall = reward(_rw_waves(4, (85, 320)), _RW_PROMPTS)
        assert reward(images, _RW_PROMPTS).tolist() == pytest.approx(_RW_ORIGINAL["hpsv2"], abs=3e-6)
        assert tall.tolist() == pytest.approx(_RW_ORIGINAL["hpsv2 tall"], abs=3e-6)
        assert torch.allclose(reward(images, ["\uff41 cat", "a red dog", "two&#32;birds", "a cat"]), reward(images, _RW_PROMPTS))
        _rw_behaves(reward)
        torch.save({"state_dict": weights}, tmp_path / "HPS_v2_compressed.pt")  # version 2.0, the authors', by its file
        plain = rewards.tokenizer_at
        monkeypatch.setattr(rewards, "tokenizer_at", lambda repo, path, length: plain(repo, tmp_path, length))
        other = rewards.load(f"hpsv2@{tmp_path / 'HPS_v2_compressed.pt'}")
        assert torch.allclose(other(images, _RW_PROMPTS), reward(images, _RW_PROMPTS))
        del weights["ln_final.weight"]  # a file that lacks a weight must not be filled up with noise
        torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
        with pytest.raises(UserError, match="final_layer_norm.weight"):
            rewards.load(f"hpsv2@{tmp_path}")

    def test_reward_imagereward(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rewards, "BLIP_TEXT", _RW_BLIP_TEXT)
        monkeypatch.setattr(rewards, "BLIP_VISION", _RW_BLIP_VISION)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "dog", "two", "birds"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
        torch.save(_rw_blip_weights(), tmp_path / "ImageReward.pt")
        reward = rewards.load(f"imagereward@{tmp_path}")
        images = _rw_waves(4, (640, 427))
        assert reward(images, _RW_PROMPTS).tolist() == pytest.approx(_RW_ORIGINAL["imagereward"], abs=3e-6)
        _rw_behaves(reward)

    def test_reward_hpsv3(self, monkeypatch, tmp_path):
        grads = []

        class Inferencer:
            def __init__(self, device, checkpoint_path=None):
                if device == "meta":
                    raise OSError("no hub\nin reach")
                self.bonus = 4 if checkpoint_path else 0

            def reward(self, prompts, image_paths):
                grads.append(torch.is_grad_enabled())
                return torch.tensor([[np.array(Image.open(path)).mean() + len(prompt) + self.bonus, 99.]
                                     for prompt, path in zip(prompts, image_paths)])
        package = types.ModuleType("hpsv3")
        package.HPSv3RewardInferencer = Inferencer
        monkeypatch.setitem(sys.modules, "hpsv3", package)
        images, prompts = _rw_images(11), [f"{'x' * i}" for i in range(11)]
        assert np.allclose(rewards.load("hpsv3")(images, prompts), _rw_mean(images, prompts))
        (tmp_path / "four").write_text("weights")
        assert np.allclose(rewards.load(f"hpsv3@{tmp_path / 'four'}")(images, prompts), np.array(_rw_mean(images, prompts)) + 4)
        assert rewards.hpsv3()(images[:1], ["a"]) and not any(grads)  # called directly too
        with pytest.raises(UserError, match=r"special token <\|Reward\|>"):
            rewards.load("hpsv3")(images[:1], ["a <|Reward|> cat"])
        for spec, device in (("hpsv3", "meta"), (f"hpsv3@{tmp_path}", "cpu"), ("hpsv3@/no/file", "cpu")):
            with pytest.raises(UserError, match="pip install hpsv3 matplotlib tensorboard rich tyro") as caught:
                rewards.load(spec, device)
            assert "\n" not in str(caught.value)


# ===== rewards.py: GenEval

def _rw_found(*boxes, score=0.95):
    return [Found(box, score) for box in boxes]

_RW_LEFT, _RW_RIGHT, _RW_LOW = (0, 40, 20, 60), (80, 40, 100, 60), (0, 80, 20, 100)

_RW_TWO = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}

_RW_COUNT = {"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}

_RW_COLOUR = {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"},
                                               {"class": "cat", "count": 1, "color": "blue"}]}

_RW_PLACE = {"tag": "position", "include": [{"class": "cat", "count": 1},
                                            {"class": "dog", "count": 1, "position": ["left of", 0]}]}

class _RwColourClip:
    """Texts are one-hot by colour; a picture is embedded as the colour its mean over the non-grey pixels is nearest."""
    palette = {"red": (1, 0, 0), "blue": (0, 0, 1), "green": (0, 1, 0), "white": (1, 1, 1), "black": (0, 0, 0)}

    def text(self, texts):
        return torch.stack([F.one_hot(torch.tensor(next(i for i, c in enumerate(rewards.COLOURS)
                                                         if f" {c}" in text)), 10).float() for text in texts])

    def image(self, crop):
        assert crop.shape[0] == 1 and (crop[0] - .6).abs().amax(0).min() < .01  # the surroundings became grey
        pixels = crop[0][:, (crop[0] - .6).abs().amax(0) > .01].mean(1)
        distance = {name: (pixels - torch.tensor(rgb)).norm() for name, rgb in self.palette.items()}
        return F.one_hot(torch.tensor(rewards.COLOURS.index(min(distance, key=distance.get))), 10).float()[None]


def _rw_geneval_cases(count=400):
    """Prompts of all kinds and what a detector might find, near every threshold -> (metadata, {class: rows of box and
    score}); an object's colour is COLOURS[its left edge mod 3]."""
    rng = np.random.default_rng(5)
    clauses = ({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]},
               {"class": "cat", "count": 1, "position": ["above", 0]}, {"class": "cat", "count": 1, "color": "red"},
               {"class": "dog", "count": 2, "color": "orange"}, {"class": "dog", "count": 3})
    for _ in range(count):
        include = [clauses[rng.choice([0, 3, 4, 5])]] + [clauses[i] for i in rng.permutation([1, 2, 3])[:rng.integers(0, 3)]]
        wanted = {"tag": str(rng.choice(["counting", "position"])), "include": include}
        if rng.random() < .3:
            wanted["exclude"] = [{"class": "dog", "count": include[0]["count"] + 1}]
        found = {}
        for name in ("dog", "cat"):
            corner, size = rng.integers(0, 80, (rng.integers(0, 5), 2)), rng.integers(4, 30, 2)
            scores = rng.choice([.2, .3, .35, .9, .95], (len(corner), 1), p=[.1, .1, .1, .1, .6])
            found[name] = np.concatenate([corner, corner + size, scores], 1).astype(np.float32)
        yield wanted, found


class TestRewardsPyGeneval:
    """Its rules, its detector, its thresholds."""

    def test_reward_geneval_verdicts_of_the_original(self):
        """400 drawn cases; the bits of the number are what its evaluate_images.py, af4902f2, says of them."""
        verdicts = ""
        for wanted, rows in _rw_geneval_cases():
            objects = {name: [Found(tuple(row[:4]), round(float(row[4]), 6)) for row in found]
                       for name, found in rows.items()}
            got = rewards.judge(wanted, rewards.confident(objects, wanted["tag"]),
                                lambda found, name: [rewards.COLOURS[int(f.box[0]) % 3] for f in found])
            assert (got[1] == 1) == got[0]
            verdicts += "01"[got[0]]
        assert int(verdicts, 2) == _RW_GENEVAL

    @pytest.mark.parametrize("wanted, objects, correct, dense", [
        ({"tag": "single_object", "include": [{"class": "dog", "count": 1}]}, {"dog": _rw_found(_RW_LEFT)}, True, 1),
        ({"tag": "single_object", "include": [{"class": "dog", "count": 1}]}, {"cat": _rw_found(_RW_LEFT)}, False, 0),
        (_RW_TWO, {"dog": _rw_found(_RW_LEFT, _RW_LOW), "cat": _rw_found(_RW_RIGHT)}, True, 1),
        (_RW_TWO, {"dog": _rw_found(_RW_LEFT)}, False, .5),
        (_RW_COUNT, {"dog": _rw_found(*[_RW_LEFT] * 3)}, True, 1),
        (_RW_COUNT, {"dog": _rw_found(*[_RW_LEFT] * 2)}, False, (2 / 3 + 1) / 2),
        (_RW_COUNT, {"dog": _rw_found(*[_RW_LEFT] * 4)}, False, (1 + 2 / 3) / 2),
        (_RW_COUNT, {"dog": _rw_found(*[_RW_LEFT] * 9)}, False, .5),
        (_RW_COUNT, {}, False, .5),
        (_RW_COLOUR, {"dog": _rw_found("red"), "cat": _rw_found("blue")}, True, 1),
        (_RW_COLOUR, {"dog": _rw_found("blue"), "cat": _rw_found("blue")}, False, .75),
        (_RW_COLOUR, {"dog": _rw_found("blue"), "cat": _rw_found("red")}, False, .5),
        # only the best detection of the class is looked at
        (_RW_COLOUR, {"dog": _rw_found("blue", "red"), "cat": _rw_found("blue")}, False, .75),
        (_RW_PLACE, {"dog": _rw_found(_RW_LEFT), "cat": _rw_found(_RW_RIGHT)}, True, 1),
        (_RW_PLACE, {"dog": _rw_found(_RW_RIGHT), "cat": _rw_found(_RW_LEFT)}, False, 2 / 3),
        (_RW_PLACE, {"dog": _rw_found(_RW_LOW), "cat": _rw_found(_RW_LEFT)}, False, 2 / 3),
        (_RW_PLACE, {"dog": _rw_found(_RW_LEFT)}, False, 1 / 3),  # its target is missing
        (_RW_PLACE, {"cat": _rw_found(_RW_RIGHT)}, False, 1 / 3),
    ])
    def test_reward_geneval_rules(self, wanted, objects, correct, dense):
        got = rewards.judge(wanted, objects, lambda found, name: [f.box for f in found])  # here a box is its own colour
        assert got == (correct, pytest.approx(dense))

    def test_reward_geneval_every_pair_must_be_placed(self):
        wanted = {"include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
        middle = {"dog": _rw_found((40, 40, 60, 60)), "cat": _rw_found(_RW_LEFT, _RW_RIGHT)}
        assert rewards.judge(wanted, middle, None)[0] is False
        assert rewards.judge(wanted, middle | {"cat": middle["cat"][::-1]}, None)[0] is False
        assert rewards.judge(wanted, middle | {"dog": _rw_found((-90, 40, -70, 60))}, None)[0] is True
        # a target whose colour is wrong is no target
        wanted = {"include": [{"class": "cat", "count": 1, "color": "red"},
                              {"class": "dog", "count": 1, "position": ["left of", 0]}]}
        objects = {"dog": _rw_found(_RW_LEFT), "cat": _rw_found(_RW_RIGHT)}
        assert rewards.judge(wanted, objects, lambda found, name: ["blue"]) == (False, pytest.approx(.5))
        assert rewards.judge(wanted, objects, lambda found, name: ["red"]) == (True, 1)

    def test_reward_geneval_thresholds(self):
        objects = {"dog": [Found("a", .31), Found("b", .95), Found("c", .3), Found("d", .9)],
                   "cat": [Found(i, .5 + i / 100) for i in range(20)], "bird": [Found(i, .95) for i in range(3)]}
        kept = rewards.confident(objects, "colors")
        assert [f.box for f in kept["dog"]] == ["b", "d", "a"]
        assert [f.box for f in kept["cat"]] == list(range(19, 3, -1))
        # of equal scores the benchmark, which turns an ascending order round, takes the last first
        ordered = np.argsort([f.score for f in objects["bird"]], kind="stable")[::-1].tolist()
        assert [f.box for f in kept["bird"]] == ordered == [2, 1, 0]
        kept = rewards.confident(objects, "counting")
        assert [f.box for f in kept["dog"]] == ["b"] and kept["cat"] == []

    @pytest.mark.parametrize("a, b, relations", [
        ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}), ((50, 0, 60, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}), ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (50, 50, 60, 60), {"left of", "above"}), ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        # sizes 10 and 10: centres up to 2 apart are together; at 3.9 the rest is 1.9 of 3.9, at 4.1 it is 2.1 of 4.1
        ((0, 0, 10, 10), (2, 0, 12, 10), set()), ((0, 0, 10, 10), (3.9, 0, 13.9, 10), set()),
        ((0, 0, 10, 10), (4.1, 0, 14.1, 10), {"left of"}),
        ((0, 0, 10, 100), (20, 15, 30, 115), {"left of"}),  # the taller margin swallows the height
    ])
    def test_reward_geneval_position(self, a, b, relations):
        assert rewards.relative_position(a, b) == relations

    def test_reward_geneval_detections(self):
        assert len(rewards.COCO) == 80 and rewards.COCO[64:67] == ["computer mouse", "tv remote", "computer keyboard"]
        dog, cat = rewards.COCO.index("dog"), rewards.COCO.index("cat")
        assert (rewards.COCO[0], dog, cat, rewards.COCO[79]) == ("person", 16, 15, "toothbrush")
        classes = torch.full((4, 81), -20.)
        classes[0, dog] = 5.
        classes[1, [cat, 80]] = torch.tensor([3., 3.])  # half cat, half nothing
        classes[2, 80] = 9.
        classes[3, cat] = 9.  # sure, but its mask is empty
        masks = torch.full((4, 16, 16), -9.)
        masks[0, 4:8, 2:10] = 4.
        masks[1, :, 8:] = 30.
        found = rewards.detections(classes, masks, (64, 64), (64, 48), (64, 48))
        assert set(found) == {"dog", "cat"} and len(found["cat"]) == len(found["dog"]) == 1
        assert found["cat"][0].score == pytest.approx(.5, abs=1e-2)
        assert found["cat"][0].box[2:] == (48, 64)  # what lies beyond the picture was padding
        logits = F.interpolate(masks[None, :1], size=(64, 64), mode="bilinear")[0, 0, :, :48]
        inside = logits > 0
        assert torch.equal(found["dog"][0].mask, inside)
        assert found["dog"][0].score == pytest.approx(logits[inside].sigmoid().mean().item(), abs=1e-3)
        rows, columns = np.where(inside.numpy())
        assert found["dog"][0].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        # twice the picture, twice the box
        assert abs(np.array(rewards.detections(classes, masks, (64, 64), (64, 48), (128, 96))["dog"][0].box)
                   - 2 * np.array(found["dog"][0].box)).max() <= 1

    def test_reward_geneval_whole(self, tmp_path):
        lines = [{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
                 {"tag": "counting", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}],
                  "prompt": "one dog"}]
        file = tmp_path / "evaluation_metadata.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
        metadata = rewards.geneval_metadata(file)
        mask = torch.zeros(32, 32, dtype=torch.bool)
        mask[8:20, 4:28] = True
        mask[8, 4] = False

        def detect(images):  # a dog wherever the middle is not green; sure of it when it is blue
            return [{} if x[1, 10, 10] > .5 else
                    {"dog": [Found((4, 8, 28, 20), .95 if x[2, 10, 10] > .5 else .5, mask)]} for x in images]
        judge = rewards.GenEval(detect, _RwColourClip(), metadata, "cpu")
        reward = _rw_reward(judge)
        pictures = {}
        for name, rgb in {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}.items():
            picture = np.zeros((32, 32, 3), np.uint8)
            picture[8:20, 4:28] = rgb
            pictures[name] = Image.fromarray(picture)
        cases = [("red", "a red dog", 1, True), ("blue", "a red dog", .5, False), ("green", "a red dog", 0, False),
                 ("red", "one dog", .5, False), ("blue", "one dog", 1, True), ("red", "a poem", math.nan, None)] * 2
        images, prompts = [pictures[c[0]] for c in cases], [c[1] for c in cases]
        for batch in (images, _rw_tensor(images)):
            assert np.array_equal(reward(batch, prompts).numpy(), [c[2] for c in cases], equal_nan=True)
            assert judge.correct(batch, prompts) == [c[3] for c in cases]
        mixed = [images[0], images[1].resize((32, 32)).crop((0, 0, 32, 31)), images[2]]  # sizes may differ
        detect_sizes = []
        judge.detect = lambda x: detect_sizes.append(tuple(x.shape)) or [{}] * len(x)
        assert judge.correct(mixed, prompts[:3]) == [False] * 3 and len(detect_sizes) == 3
        assert [judge.tag(p) for p in ("a red dog", "one dog", "a poem")] == ["colors", "counting", None]
        assert judge.prompts == ["a red dog", "one dog"]
        file.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[0]).replace("dog", "unicorn"))
        with pytest.raises(UserError, match="line 2: .*unicorn"):
            rewards.load(f"geneval@{file}")
        file.write_text(json.dumps(lines[0]) + "\n{}")
        with pytest.raises(UserError, match="line 2: .*lacks"):
            rewards.load(f"geneval@{file}")

    def test_reward_geneval_detector(self, tmp_path, monkeypatch):
        """The detector against the whole segmentation model, whose training loss (which wants scipy) is left out."""
        from transformers import Mask2FormerConfig, SwinConfig
        from transformers.models.mask2former import modeling_mask2former as library
        monkeypatch.setattr(library, "Mask2FormerLoss", type("NoLoss", (torch.nn.Identity,), {}))
        monkeypatch.setattr(library.Mask2FormerPreTrainedModel, "_init_weights", lambda self, module: None)
        backbone = SwinConfig(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], window_size=4,
                              out_features=["stage1", "stage2", "stage3", "stage4"])
        config = Mask2FormerConfig(backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32,
                                   encoder_layers=1, decoder_layers=3, num_queries=7, dim_feedforward=32,
                                   encoder_feedforward_dim=32, num_attention_heads=4, num_labels=80)
        torch.manual_seed(0)
        whole = library.Mask2FormerForUniversalSegmentation(config).eval()
        for parameter in whole.parameters():  # some would be left as memory was found
            torch.nn.init.normal_(parameter, std=0.05)
        published = {k: v for k, v in whole.state_dict().items() if ".swin.layernorm." not in k}  # transformers 4.x has no such norm
        whole.save_pretrained(tmp_path, state_dict=published)
        detector = rewards.Detector(str(tmp_path), "cpu")
        pixels = torch.randn(2, 3, 96, 128)
        with torch.no_grad():
            classes, masks = detector.logits(pixels)
            expected = whole(pixels)
        assert torch.allclose(classes, expected.class_queries_logits, atol=1e-5)
        assert torch.allclose(masks, expected.masks_queries_logits, atol=1e-5)
        seen = []
        monkeypatch.setattr(detector, "logits", lambda x: seen.append(x) or (classes[:1], masks[:1]))
        assert len(detector(torch.full((1, 3, 50, 100), .5))) == 1
        assert seen[0].shape == (1, 3, 672, 1344)  # short side 800 would make the long one 1600: 1333 and padding to 32
        assert torch.allclose(seen[0][0, :, 100, 100], (.5 - torch.tensor([.485, .456, .406]))
                              / torch.tensor([.229, .224, .225]), atol=1e-5)
        assert seen[0][..., 667:, :].abs().max() == 0 and seen[0][..., 1333:].abs().max() == 0
        config.num_labels = 3
        library.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="knows 3 classes"):
            rewards.Detector(str(tmp_path), "cpu")


# ===== rewards.py: served

@contextmanager
def _rw_running(bound):
    """A bound server in a thread -> it and its URL."""
    thread = threading.Thread(target=bound.serve_forever, kwargs={"poll_interval": .01})
    thread.start()
    try:
        yield bound, f"http://127.0.0.1:{bound.server_port}"
    finally:
        bound.shutdown()
        bound.server_close()
        thread.join()

@contextmanager
def _rw_serving(reward, **options):
    """A server in a thread -> it and its URL."""
    bound = rewards.server(reward, **({"port": 0} | options))
    with _rw_running(bound) as served:
        yield served

@pytest.fixture(autouse=True)
def _rw_environment(monkeypatch):
    for name in ("REWARD_TOKEN", "REWARD_TIMEOUT", "VLM_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REWARD_PATIENCE", "20")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

def _rw_post(url, body, headers=None):
    """Raw POST -> status, JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers or {}), timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())

def _rw_png(image=None, kind="PNG"):
    file = io.BytesIO()
    (image or Image.new("RGB", (4, 4))).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()

@pytest.fixture(scope="module")
def rw_fragile():
    def fragile(images, prompts):
        if "raise" in prompts:
            raise ValueError("broken")
        return [math.inf if prompt == "inf" else len(prompt) for prompt in prompts]
    with _rw_serving(_rw_reward(fragile), max_body=200_000) as (_, url):
        yield url

class _RwScript(BaseHTTPRequestHandler):
    """Answers the requests of a test with what its list says: (status, body[, headers]) or seconds to stay silent."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), request))
            step = self.server.script.pop(0) if self.server.script else self.server.usual(request)
        if isinstance(step, float):
            time.sleep(step)
            return
        status, body, *headers = step
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or [{}])[0].items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

@contextmanager
def _rw_scripted(script, usual=None):
    bound = ThreadingHTTPServer(("127.0.0.1", 0), _RwScript)
    bound.script, bound.usual, bound.requests, bound.lock = script, usual, [], threading.Lock()
    with _rw_running(bound) as served:
        yield served

def _rw_reply(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}

def _rw_vlm(url):
    reward = rewards.load(f"vlm@{url}/v1?model=some/judge")
    return reward, next(iter(reward.parts.values()))


class TestRewardsPyServed:
    """Servers and clients on this machine."""

    def test_reward_served_to_eight_clients(self):
        busy, overlaps = threading.Semaphore(1), []

        def alone(images, prompts):
            if not busy.acquire(blocking=False):
                overlaps.append(1)
            time.sleep(.01)
            scores = [math.nan if len(prompt) == 7 else score for prompt, score in zip(prompts, _rw_mean(images, prompts))]
            busy.release()
            return scores
        images, prompts = _rw_images(1000, (12, 10)), ["x" * (i % 50) for i in range(1000)]
        expected = _rw_reward(alone).score(images, prompts)["mine"].numpy()
        got = [None] * 8
        with _rw_serving(_rw_reward(alone)) as (_, url):
            def client(k):
                got[k] = rewards.load(url).score(images[k::8], prompts[k::8])[url].numpy()
            threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            with urllib.request.urlopen(url + "/health") as answer:
                assert json.loads(answer.read()) == {"name": "mine"}
        assert all(np.array_equal(got[k], expected[k::8], equal_nan=True) for k in range(8)) and not overlaps
        assert np.isnan(expected).sum() == 20

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the server's death
    def test_reward_client_survives_a_restart(self, capfd):
        images, prompts, calls = _rw_images(200, (8, 8)), ["p"] * 200, []

        def dies_at_third(images, prompts):
            calls.append(len(images))
            if len(calls) == 3:
                raise SystemExit  # takes the thread down: the client's connection breaks without an answer
            return _rw_mean(images, prompts)
        result = []
        with _rw_serving(_rw_reward(dies_at_third)) as (bound, url):
            client = rewards.load(url)
            thread = threading.Thread(target=lambda: result.append(client(images, prompts)))
            thread.start()
            while len(calls) < 3:
                time.sleep(.01)
            port = bound.server_port
        time.sleep(.7)  # nobody listens: the client is refused at least once
        assert not result
        with _rw_serving(_rw_reward(_rw_mean), port=port):
            thread.join(15)
            assert np.allclose(result[0], _rw_mean(images, prompts))
            assert calls == [64, 64, 64]  # what was answered is not asked again
        err = capfd.readouterr().err
        assert err.count("trying again for up to 20 s") == 1 and url in err
        # a second time, between two calls
        thread = threading.Thread(target=lambda: result.append(client(images[:3], prompts[:3])))
        thread.start()
        time.sleep(.3)
        with _rw_serving(_rw_reward(_rw_mean), port=port):
            thread.join(15)
        assert np.allclose(result[1], _rw_mean(images[:3], prompts[:3]))

    def test_reward_client_gives_up(self, monkeypatch):
        with _rw_serving(_rw_reward(_rw_mean)) as (_, url):
            pass
        monkeypatch.setenv("REWARD_PATIENCE", "0.3")
        start = time.monotonic()
        with pytest.raises(UserError, match=r"refused.*gave up after 0.3 s"):
            rewards.load(url)(_rw_images(1), ["a"])
        assert .3 <= time.monotonic() - start < 5
        monkeypatch.setenv("REWARD_PATIENCE", "soon")
        with pytest.raises(UserError, match="REWARD_PATIENCE='soon' is not a number of seconds"):
            rewards.load(url)(_rw_images(1), ["a"])

    def test_reward_client_needs_no_proxy_to_this_machine(self, monkeypatch):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy")
        with _rw_serving(_rw_reward(_rw_mean)) as (_, url):
            images = _rw_images(2)
            assert np.allclose(rewards.load(url)(images, ["a", "b"]), _rw_mean(images, ["a", "b"]))

    @pytest.mark.parametrize("body, status, says", [
        (b"{not json", 400, "not JSON"), (b"\xff\xfe", 400, "not JSON"), ([1, 2], 400, "not JSON"),
        (b"[" * 100000, 400, "not JSON"), ({"prompts": ["a"]}, 400, "not JSON"),
        ({"prompts": "ab", "images": ["x", "y"]}, 400, "not JSON"), ({"prompts": [1], "images": ["x"]}, 400, "not JSON"),
        ({"prompts": ["a", "b"], "images": ["x"]}, 400, "2 prompts but 1 images"),
        ({"prompts": ["a"], "images": ["%%%"]}, 400, "image 0 is not base64"),
        ({"prompts": ["a"], "images": [None]}, 400, "image 0 is not base64"),
        ({"prompts": ["a"], "images": [_rw_png(kind="GIF")]}, 400, "image 0 is not a PNG, JPEG or WebP"),
        ({"prompts": ["a"], "images": [_rw_png()[:60]]}, 400, "image 0 is not"),
        (b"x" * 300_000, 413, "at most 200000"), ({"prompts": ["raise"], "images": [_rw_png()]}, 500, "ValueError: broken"),
        ({"prompts": ["inf"], "images": [_rw_png()]}, 500, "returned inf"), ({"prompts": [], "images": []}, 200, None),
    ])
    def test_reward_server_refuses_and_lives(self, body, status, says, rw_fragile):
        code, answer = _rw_post(rw_fragile + "/score", body)
        assert code == status
        assert answer == {"scores": []} if status == 200 else says in answer["error"] and "\n" not in answer["error"]
        assert _rw_post(rw_fragile + "/score", {"prompts": ["ok"], "images": [_rw_png()]}) == (200, {"scores": [2.0]})

    def test_reward_server_bombs_and_places(self, rw_fragile, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        bomb = {"prompts": ["a"], "images": [_rw_png(Image.new("RGB", (100, 100)))]}
        code, answer = _rw_post(rw_fragile + "/score", bomb)
        assert code == 400 and "DecompressionBombError" in answer["error"]
        assert _rw_post(rw_fragile + "/elsewhere", {})[0] == 404
        for length in ("many", "-5", "9" * 5000):
            assert _rw_post(rw_fragile + "/score", b"{}", {"Content-Length": length})[0] == 400
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(rw_fragile + "/elsewhere")
        with pytest.raises(UserError, match="combine where they are used"):
            rewards.server(rewards.load("jpeg,incompressibility"))
        with pytest.raises(UserError, match="cannot serve on 127.0.0.1"):
            rewards.server(_rw_reward(_rw_mean), port=int(rw_fragile.rpartition(":")[2]))

    def test_reward_server_token_and_big_bodies(self, monkeypatch):
        with _rw_serving(_rw_reward(_rw_mean), token="secret", max_body=10_000) as (_, url):
            client, images = rewards.load(url), _rw_images(2, (8, 8))
            body = {"prompts": ["ok"], "images": [_rw_png()]}
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                assert _rw_post(url + "/score", body, header)[0] == 401
            with pytest.raises(UserError, match="HTTP 401: .*wrong or missing bearer token"):
                client(images, ["a", "b"])
            monkeypatch.setenv("REWARD_TOKEN", "secret")
            assert np.allclose(client(images, ["a", "b"]), _rw_mean(images, ["a", "b"]))
            # far over the limit: the client must hear 413, and not a broken connection that it would try again
            with pytest.raises(UserError, match="HTTP 413: .*at most 10000"):
                client(_rw_images(12, (400, 400)), ["a"] * 12)
            assert np.allclose(client(images, ["a", "b"]), _rw_mean(images, ["a", "b"]))

    @pytest.mark.parametrize("answer, says", [
        (b"<html>", "its answer is not JSON"), ([1], "its answer is not"), ({"scores": 3}, "its answer is not"),
        ({"scores": [1]}, "returned 1 scores for 2 images"), ({"scores": [1, "x"]}, "returned 'x' (str) for image 1"),
        (b'{"scores": [1, Infinity]}', "returned inf for image 1"),
    ])
    def test_reward_client_checks_answers(self, answer, says):
        with _rw_scripted([(200, answer)]) as (_, url), pytest.raises(UserError) as caught:
            rewards.load(url)(_rw_images(2), ["a", "b"])
        assert says in str(caught.value)

    def test_reward_client_waits_as_told(self, capfd):
        script = [(429, b"busy", {"Retry-After": "1"}), (503, b"still"), (200, {"scores": [1, None]})]
        with _rw_scripted(script) as (bound, url):
            start = time.monotonic()
            got = rewards.load(url)(_rw_images(2), ["a", "b"])
            assert 2 <= time.monotonic() - start < 6 and got[0] == 1 and got[1].isnan()  # 1 as asked, 1 of its own
        err = capfd.readouterr().err
        assert err.count("HTTP 429: busy; trying again") == 1 and err.count("trying again") == 1

    def test_reward_vlm_asks(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "key")

        def usual(request):  # the judge reads the number of a prompt off its text, and knows the picture's size
            picture, text = request["messages"][0]["content"]
            data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"), validate=True)
            width = Image.open(io.BytesIO(data), formats=["JPEG"]).width
            return _rw_reply(f"I see 99 things. Score: {int(text['text'].split('number ')[1][0]) + width / 100}")
        with _rw_scripted([], usual) as (bound, url):
            reward, part = _rw_vlm(url)
            images = [Image.new("RGB", (10 + i, 8)) for i in range(9)]
            got = reward(images, [f"number {i}" for i in range(9)])
        assert np.allclose(got, [i + (10 + i) / 100 for i in range(9)]) and part.unparsed == 0
        path, headers, request = bound.requests[0]
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer key"
        assert request["model"] == "some/judge" and request["temperature"] == 0

    @pytest.mark.parametrize("reply, score", [
        ("Score: 7.5", 7.5), ("**Score:** 8", 8), ("score = 0", 0), ("Score: 3\nNo. Score: 4", 4), ("Score: 10/10", 10),
        ("Score (0-10): 8", 8), ("8/10", 8), ("Score: 7,5", 7.5), ("7,5", 7.5), ("**8**", 8), ("The score is 8.", 8), ("7", 7),
        ("Score: **9** out of 10", 9), ("I cannot rate this.", None), ("", None), (None, None), ("Score: 11", None),
        ("Score: -1", None), ("2 cats, 3 dogs", None),
    ])
    def test_reward_vlm_replies(self, reply, score, capfd):
        with _rw_scripted([_rw_reply(reply)]) as (_, url):
            reward, part = _rw_vlm(url)
            got = reward(_rw_images(1), ["a"]).item()
        assert (math.isnan(got) and part.unparsed == 1) if score is None else (got == score and part.unparsed == 0)
        assert ("no score from 0 to 10" in capfd.readouterr().err) == (score is None)

    def test_reward_vlm_speaks_to_newer_models(self):
        """A refusal of max_tokens or temperature: asked once more in other words, and remembered; other refusals are not."""
        refusal = {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}}
        thought = 200, {"choices": [{"message": {"content": "", "reasoning_content": "Hm. Score: 5"}}]}
        with _rw_scripted([(400, refusal), _rw_reply("8"), thought]) as (bound, url):
            reward = rewards.load(f"vlm@{url}/v1?model=m&tokens=77")
            assert reward(_rw_images(1), ["a"]).item() == 8 and reward(_rw_images(1), ["a"]).item() == 5
            asked = [{k: v for k, v in request.items() if k not in ("model", "messages")} for _, _, request in bound.requests]
            assert asked == [{"temperature": 0, "max_tokens": 77}] + [{"max_completion_tokens": 77}] * 2
            bound.script[:] = [(400, {"error": "bad picture"})]
            with pytest.raises(UserError, match="HTTP 400: .*bad picture"):
                reward(_rw_images(1), ["a"])

    def test_reward_vlm_trouble(self, monkeypatch):
        monkeypatch.setenv("REWARD_TIMEOUT", "0.3")
        script = [(429, b"", {"Retry-After": "0"}), (500, b"oops"), .6, _rw_reply("Score: 6")]
        with _rw_scripted(script) as (bound, url):
            reward, part = _rw_vlm(url)
            assert reward(_rw_images(1), ["a"]).item() == 6 and len(bound.requests) == 4
            for answer, says in (((200, {"error": "overloaded"}), "answered with an error: overloaded"),
                                 ((200, b"{malformed"), "its answer is not JSON"),
                                 ((404, b"no such model"), "HTTP 404: no such model")):
                bound.script[:] = [answer]
                with pytest.raises(UserError, match=says):
                    reward(_rw_images(1), ["a"])

    def test_reward_cli(self, tmp_path, capsys):
        images = _rw_images(2, (40, 30))
        paths = [str(tmp_path / f"{i}.png") for i in range(2)]
        [image.save(path) for image, path in zip(images, paths)]
        assert rewards.main(["score", "jpeg,incompressibility=2", "--prompt", "a cube", *paths]) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        assert head.split("\t") == ["jpeg", "incompressibility", "combined", "file"]
        sizes = rewards.load("incompressibility")(images, ["p"] * 2)
        for line, path, size in zip(lines, paths, sizes):
            jpeg, size_, combined, file = line.split("\t")
            assert (float(jpeg), float(size_), file) == (pytest.approx(-size.item()), pytest.approx(size.item()), path)
            assert float(combined) == pytest.approx(1 if size == sizes.max() else -1)
        assert rewards.main(["list"]) == 0
        table = capsys.readouterr().out
        assert all(name in table for name in rewards.REWARDS)
        assert "yuvalkirstain/PickScore_v1" in table and "3.9 GB" in table

    @pytest.mark.parametrize("arguments, says", [
        (["score", "jpge", "--prompt", "p", "GOOD"], "unknown reward 'jpge'; nearest: jpeg"),
        (["score", "jpeg=x", "--prompt", "p", "GOOD"], "the weight 'x' of 'jpeg' is not a number"),
        (["score", "jpeg", "--prompt", "p", "gone.png"], "gone.png"),
        (["score", "jpeg", "--prompt", "p", "BAD"], "bad.png"),
        (["serve", "nothing"], "unknown reward 'nothing'"), (["serve", "jpeg", "--port", "99999"], "cannot serve on"),
    ])
    def test_reward_cli_bad_input(self, arguments, says, tmp_path, capsys):
        Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
        (tmp_path / "bad.png").write_text("not a picture")
        names = {"GOOD": str(tmp_path / "good.png"), "BAD": str(tmp_path / "bad.png")}
        assert rewards.main([names.get(a, a) for a in arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and says in err and err.count("\n") == 1

    def test_reward_cli_process(self, tmp_path):
        """As a program: a wrong spec gives one line and 2; a server starts, answers, and stops at an interrupt."""
        command = [sys.executable, str(ROOT / "rewards.py")]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
        wrong = subprocess.run([*command, "serve", "pickscore"], capture_output=True, text=True, env=environment)
        assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("error: reward 'pickscore': cannot load")
        assert "Traceback" not in wrong.stderr
        process = subprocess.Popen([*command, "serve", "jpeg", "--port", "0"], stdout=subprocess.PIPE, text=True,
                                   env=environment)
        try:
            url = process.stdout.readline().split()[-1]
            images = _rw_images(3)
            assert torch.equal(rewards.load(url)(images, list("abc")), rewards.load("jpeg")(images, list("abc")))
        finally:
            process.send_signal(2)
        assert process.wait(10) == 0


# ===== eval.py

@pytest.fixture(scope="session")
def _ev_generator():
    return drpo.load_generator("toy")

@pytest.fixture(scope="session")
def _ev_runs(_ev_generator, tmp_path_factory):
    """Two runs of the toy as training leaves them: one whose LoRA was never trained, one of random weights."""
    G, folders = _ev_generator, []
    for name, scale in (("untrained", 0.0), ("moved", 0.2)):
        torch.manual_seed(0)
        params = G.add_lora(4, 4.0)
        for p in params:
            p.data += scale * torch.randn(p.shape) * p.shape[-1] ** -0.5
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(model="toy", reward="scene", watch="jpeg", seed=0)))
        (folder / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5, "diversity": 1.0}\n')
        G.save_lora(folder)
        folders.append(folder)
    G.set_lora({})
    return folders

def _ev_main(capsys, *argv):
    """eval.main -> (exit code, stdout, stderr)."""
    code = 0
    try:
        E.main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err

class _ev_Judge(BaseHTTPRequestHandler):
    """Prefers the picture of more bytes; prompts with tie, mute or first get: tie, no answer, always A."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        sizes = [len(c["image_url"]["url"]) for c in content if c["type"] == "image_url"]
        text = content[0]["text"]
        word = next((w for w in ("tie", "mute", "first") if f" {w}" in text.split("\n")[0]), "")
        reply = {"tie": "Answer: tie", "mute": "I cannot say.", "first": "**Answer: A**"}.get(
            word, f"A shows it.\nAnswer: {'A' if sizes[0] > sizes[1] else 'B'}")
        data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

@pytest.fixture
def _ev_judge():
    """Address of a judge that runs on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _ev_Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1?model=m"
    server.shutdown()
    server.server_close()


class TestEvalPy:
    """Statistics, report, pictures."""

    def test_eval_untrained_lora_changes_nothing_and_the_report_repeats(self, _ev_runs, tmp_path, capsys):
        reports = []
        for n in (1, 2):
            code, out, _ = _ev_main(capsys, _ev_runs[0], "--limit", 6, "--samples", 4, "--device", "cpu", "--out",
                                    tmp_path / str(n))
            assert code == 0 and "win rate" in out
            reports.append((tmp_path / str(n) / "report.json").read_bytes())
        assert reports[0] == reports[1]
        c = json.loads(reports[0])["columns"]["untrained"]
        for figures in (*c["rewards"].values(), c["accuracy"]["scene"]["all"]):
            assert figures["difference"] == [0, 0, 0] and figures["win_rate"] == [0.5, 0.5, 0.5]
        assert set(c["rewards"]) == {"scene", "jpeg"} and c["distance"] == 0 and c["diversity"]["relative"] == [1, 1, 1]
        assert Image.open(tmp_path / "1" / "grid.png").width > 6 * 64

    def test_eval_table_has_a_column_for_each_run_and_for_best_of(self, _ev_runs, _ev_judge, tmp_path, capsys):
        code, out, _ = _ev_main(capsys, *_ev_runs, "--limit", 4, "--samples", 2, "--best-of", 3, "--judge", _ev_judge,
                                "--device", "cpu", "--out", tmp_path)
        report = json.loads((tmp_path / "report.json").read_text())
        assert code == 0 and list(report["columns"]) == ["base", "untrained", "moved", "base best-of-3"]
        assert (tmp_path / "report.md").read_text() in out
        best, moved = report["columns"]["base best-of-3"], report["columns"]["moved"]
        assert best["rewards"]["scene"]["win_rate"][0] >= 0.5  # the base's own picture is one of the candidates
        assert moved["distance"] > 0.02 and report["columns"]["untrained"]["distance"] == 0
        assert set(best["accuracy"]["scene"]) > {"all"}
        # the stand-in finds neither of two equal pictures larger and says B: undecided, so a tie
        assert report["columns"]["untrained"]["judge"]["win_rate"] == [0.5, 0.5, 0.5]
        assert sum(moved["judge"][k] for k in ("wins", "ties", "losses")) == 4 and moved["judge"]["no_answer"] == 0

    def test_eval_pictures_depend_on_no_batch_and_match_the_generator(self, _ev_generator):
        G, prompts = _ev_generator, ["a red circle", "two blue squares", "a triangle"]
        found = []
        for batch in (2, 5):
            flat, x = zip(*[(f, x) for f, x, _ in E.generate(G, prompts, 3, 7, batch)])
            assert sum(flat, []) == list(range(9))
            found.append(torch.cat(x))
        assert torch.allclose(*found, atol=1e-4)
        fewer = torch.cat([x for _, x, _ in E.generate(G, prompts, 2, 7, 16)])  # noise i is the same for any n
        assert torch.allclose(fewer, found[0].reshape(3, 3, *fewer.shape[1:])[:, :2].flatten(0, 1), atol=1e-4)

    def test_eval_bootstrap_interval_covers_the_truth(self):
        rng, hits, trials = np.random.default_rng(1), 0, 400
        for _ in range(trials):
            effect = 0.3 + rng.normal(0, 1, (60, 1))  # prompts differ, and so do the pictures of a prompt
            value, low, high = E.mean_interval(effect + rng.normal(0, 2, (60, 4)))
            assert low <= value <= high
            hits += low <= 0.3 <= high
        assert 0.91 <= hits / trials <= 0.98  # 0.95 within three standard errors, less the bias of 60 clusters
        naive = E.mean_interval(np.repeat(rng.normal(0, 1, (60, 1)), 50, 1))  # 3000 pictures, but only 60 prompts
        assert naive[2] - naive[1] > 0.3

    def test_eval_interval_of_little_or_nothing(self):
        assert E.interval([], []) == [None, None, None] and E.interval([2.0], [4]) == [0.5, None, None]
        assert E.mean_interval(np.array([[np.nan, 1.0], [np.nan, np.nan], [3.0, 5.0]]))[0] == 3.0

    def test_eval_win_rate_counts_ties_as_half(self):
        found = E.compare([[1.0, 2.0], [3.0, np.nan]], [[1.0, 3.0], [2.0, 9.0]])  # tie, win; loss, no opinion
        assert found["win_rate"][0] == pytest.approx(0.5) and found["difference"][0] == pytest.approx(0.0)
        assert E.compare([[1.0], [1.0]], [[2.0], [1.0]])["win_rate"][0] == pytest.approx(0.75)

    def test_eval_diversity_against_a_double_loop(self):
        x, keep = torch.randn(5, 4, 7), np.random.default_rng(0).random((5, 4)) < 0.6
        keep[0], keep[1] = False, True
        for p, found in enumerate(E.pair_distances(x, keep)):
            pairs = [float((x[p, i] - x[p, j]).norm()) for i in range(4) for j in range(i) if keep[p, i] and keep[p, j]]
            assert found == pytest.approx(np.mean(pairs), rel=1e-5) if pairs else np.isnan(found)

    def test_eval_diversity_of_right_pictures_is_compared_on_the_same_prompts(self):
        base = torch.tensor([[[0.0], [1.0]], [[0.0], [10.0]]])  # an easy prompt of little, a hard one of much diversity
        right_base, right_tuned = np.array([[True, True], [True, False]]), np.ones((2, 2), bool)
        found = E.diversity(base, base, right_base, right_tuned)
        assert found["relative"][0] == 1.0 and found["prompts"] == 1  # the very same pictures: no more, no less diverse
        assert found["own"] == pytest.approx(5.5)
        assert E.diversity(base, base, ~right_tuned, right_tuned)["relative"] == [None, None, None]

    def test_eval_best_of_against_a_loop(self):
        P, N, S = 5, 3, 4
        scores = {"a": torch.randn(P, N * S), "b": torch.randn(P, N * S), "c": torch.randn(P, N * S)}
        scores["a"][0, :] = torch.nan
        reward = rewards.Reward("a,b", {"a": None, "b": None}, {"a": 1.0, "b": 0.5})
        index = E.best_index(reward, ["a", "b"], scores, S)
        for p in range(P):
            for s in range(S):
                slots = [c * S + s for c in range(N)]
                values = reward.combine({k: scores[k][p, slots] for k in "ab"}).tolist()
                assert index[p, s] == slots[int(np.argmax(values))]

    def test_eval_judge_asks_in_both_orders(self, _ev_judge):
        plain = Image.new("RGB", (64, 64))
        rich = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        prompts = ["x", "y", "a tie", "a mute one", "the first one"]
        found = E.judge(_ev_judge, prompts, [plain, rich, plain, plain, plain], [rich, plain, rich, rich, rich])
        assert {k: found[k] for k in ("wins", "ties", "losses", "no_answer", "order_decided")} == dict(
            wins=1, ties=2, losses=1, no_answer=1, order_decided=1)
        assert found["win_rate"][0] == 0.5

    def test_eval_generate_writes_pictures_side_by_side(self, _ev_runs, tmp_path, capsys):
        code, _, _ = _ev_main(capsys, _ev_runs[1], "--generate", "a red circle", "--generate", "two blue squares",
                              "--samples", 2, "--device", "cpu", "--out", tmp_path)
        assert code == 0 and (tmp_path / "generate.png").exists() and len(list((tmp_path / "generate").iterdir())) == 8

    def test_eval_bad_input_is_one_line(self, _ev_runs, tmp_path, capsys):
        from safetensors.torch import load_file, save_file
        (tmp_path / "empty.txt").write_text("\n\n")
        (tmp_path / "folder").mkdir()
        state = load_file(_ev_runs[0] / rewards.LORA_FILE)
        save_file(state, tmp_path / "other.safetensors", metadata={"base_model": "sdxl-turbo", "format": "pt"})
        save_file({**state, "unet.conv_in.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "more.safetensors",
                  metadata={"base_model": "elsewhere/toy"})
        (tmp_path / "torn.safetensors").write_bytes(b"123")
        for argv, words in [
                ([tmp_path / "folder"], ["folder", "not a readable LoRA"]),
                ([tmp_path / "nothing"], ["nothing", "no such run"]),
                ([], ["name a run"]),
                ([tmp_path / "torn.safetensors"], ["not a readable LoRA"]),
                ([tmp_path / "other.safetensors", "--model", "toy", "--rewards", "scene"], ["sdxl-turbo", "toy"]),
                ([tmp_path / "more.safetensors", "--model", "toy", "--rewards", "scene"], ["1 entries", "conv_in"]),
                ([tmp_path / "more.safetensors", "--model", "toy"], ["--rewards"]),
                ([_ev_runs[0], "--prompts", tmp_path / "empty.txt"], ["empty"]),
                ([_ev_runs[0], "--rewards", "scenne"], ["scenne", "scene"]),
                ([_ev_runs[0], "--samples", "0"], ["--samples"]),
                ([_ev_runs[0], "--smaples", "4"], ["--smaples"]),
                (["--curve", tmp_path / "nothing"], ["nothing", "config.json"])]:
            code, _, err = _ev_main(capsys, *argv, "--device", "cpu", "--limit", 1, "--out", tmp_path / "out")
            line = err.strip().splitlines()
            assert code == 2 and len(line) == 1 and line[0].startswith("error: "), (argv, err)
            assert all(word in line[0] for word in words), line

    def test_eval_pictures_of_a_run(self, tmp_path):
        small = [[Image.new("RGB", (64, 64), c) for c in ("red", "green")] for _ in (0, 1)]
        grid = rewards.picture_grid(small, ["a very long caption " * 9, "b"], ("base", "tuned"))
        red = (np.asarray(grid) == (255, 0, 0)).all(-1)  # enlarged by a whole factor: a crisp square with a thin frame
        assert 2 * 120**2 < red.sum() < 2 * 128**2
        for verdict, color in ((1.0, (42, 157, 78)), (0.0, (212, 61, 61)), (math.nan, (255, 0, 0))):
            assert E.marked(small[0][0], verdict).getpixel((-1 % E.marked(small[0][0], verdict).width, 0)) == color
        metrics = [{"step": s, "reward_mean": 0.1 * s, "reward_best": 0.1 * s + 1, "reward_worst": 0.0, "diversity": 1.0,
                    "watch/jpeg": None} for s in range(1, 60)]
        for n, name in ((59, "a.png"), (1, "b.png")):
            E.draw_curve(metrics[:n], tmp_path / name)
            assert Image.open(tmp_path / name).size == (880, 310)  # no panel for a reward that has no opinion
        E.draw_curve([], tmp_path / "c.png")
        assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.png", "b.png"]


# ===== lab: the checker

def to_images(x):
    """(B, 3, 64, 64) in [-1, 1] -> PIL pictures."""
    return [Image.fromarray(a) for a in ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]

@pytest.fixture(scope="module")
def rendered():
    """Captions, their rows and slots of right pictures: every held-out caption twice and every second training one."""
    train, heldout = make_toy.captions()
    rows = heldout * 2 + train[::2]
    noise = make_toy.careful(torch.randn(len(rows), 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    kind, spec = torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows])
    slots = make_toy.objects(kind, spec, make_toy.projections(noise))
    return [r[0] for r in rows], kind, spec, slots, torch.rand(len(rows), generator=torch.Generator().manual_seed(1))

def changed(slots, kind, spec, what):
    """Slots with one attribute changed, and which rows the change makes wrong."""
    slots, named = slots.clone(), spec[:, 2] >= 0
    if what == "color":
        slots[:, 0, 4] = (slots[:, 0, 4] + 1) % 6
        return slots, named
    if what == "shape":  # of the first object; where two shapes differ only in order, take the third one
        slots[:, 0, 3] = 3 - slots[:, 0, 3] - slots[:, 1, 3]
        single = (kind == 0) | (kind == 2) | (kind == 3)
        slots[single, 0, 3] = (spec[single, 1].float() + 1) % 3
        return slots, torch.ones_like(named)
    if what == "missing":  # the last object; a picture with one object would be blank
        last = spec[:, 0].long() - 1
        slots[torch.arange(len(slots)), last, 2] = -9
        return slots, torch.ones_like(named)
    if what == "extra":
        free = spec[:, 0] == 1
        slots[free, 0, :3] = torch.tensor([18.0, 32.0, 9.0])
        slots[free, 1] = slots[free, 0]
        slots[free, 1, 0] = 46.0
        return slots, free
    slots[:, :2, :2] = slots[:, :2, :2].flip(1)  # swap places
    return slots, kind == 4


class TestLabTheChecker:
    """Against the toy's renderer, which the checker does not know; and the ablations."""

    def test_scene_right_on_true_renderings(self, rendered):
        prompts, _, _, slots, shade = rendered
        images = to_images(make_toy.render(slots, shade))
        scores = scene(images, prompts)
        assert sum(s == 1 for s in scores) >= 0.99 * len(scores)
        assert scene.correct(images, prompts) == [s == 1 for s in scores]
        assert all(0 <= s <= 1 for s in scores)
        assert sum(scene.readable(image) for image in images) >= 0.99 * len(images)
        assert scores == scene(images, prompts)  # deterministic

    @pytest.mark.parametrize("what", ["color", "shape", "missing", "extra", "side"])
    def test_scene_sees_one_changed_attribute(self, rendered, what):
        prompts, kind, spec, slots, shade = rendered
        slots, wrong = changed(slots, kind, spec, what)
        picked = torch.nonzero(wrong).flatten().tolist()
        images = to_images(make_toy.render(slots, shade)[wrong])
        scores = scene(images, [prompts[i] for i in picked])
        assert len(scores) > 20
        assert sum(s < 1 for s in scores) >= 0.99 * len(scores)

    def test_scene_score_is_graded(self):
        def score(prompt, *slots, side=False):
            rows = list(slots) + [(0, 0, -9, 0, 0)] * (4 - len(slots))
            return scene(to_images(make_toy.render(torch.tensor([rows], dtype=torch.float32), torch.zeros(1))), [prompt])[0]
        red_circle, blue_square = (16.0, 32.0, 9.0, 0, 0), (48.0, 32.0, 9.0, 1, 3)
        assert score("a red circle", red_circle) == 1
        assert score("a blue circle", red_circle) == 0.5  # the shape is right
        assert score("a blue square", red_circle) == 0
        assert score("a red circle and a blue square", red_circle, blue_square) == 1
        assert score("a photo of a blue square and a red circle", red_circle, blue_square) == 1
        assert score("a red circle and a blue square", red_circle) == 0.5  # one of two
        assert score("a blue square and a red circle", red_circle) == 0.5
        assert score("a circle to the left of a square", red_circle, blue_square) == 1
        assert score("a circle to the right of a square", red_circle, blue_square) == 0.5
        assert score("a circle above a square", red_circle, blue_square) == 0.5
        assert score("two red circles", red_circle) == 0.5
        assert score("a circle", red_circle, blue_square) == 0.5

    def test_scene_unreadable_pictures(self):
        rng = np.random.default_rng(0)
        noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(20)]
        blank = [Image.new("RGB", (64, 64), color) for color in ("white", "black", (222, 62, 62), (240, 240, 240))]
        smooth = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((64, 64)) for _ in range(20)]
        images = noise + blank + smooth
        for prompt in ("a red circle", "four blue squares", "a circle above a square", "a black circle and a red square"):
            scores = scene(images, [prompt] * len(images))
            assert max(scores) <= 0.5 and sum(scores) / len(scores) < 0.15
        assert not any(scene.readable(image) for image in images)

    def test_scene_captions(self):
        assert scene.tag("a photo of a circle") == "single_object"
        assert scene.tag("a circle and a square") == "two_object"
        assert scene.tag("three squares") == scene.tag("A picture of four red  circles.") == "counting"
        assert scene.tag("a red circle") == "colors"
        assert scene.tag("a circle to the left of a square") == "position"
        assert scene.tag("a red circle and a blue circle") == "color_attr"
        image = Image.new("RGB", (64, 64), "white")
        assert scene.tag("a dog on a beach") is None
        assert all(math.isnan(s) for s in scene([image] * 3, ["a dog on a beach", "", "a red circle and"]))
        assert scene.correct([image], ["a dog"]) == [False]
        for caption, kind, _ in sum(make_toy.captions(), []):
            assert scene.tag(caption) == make_toy.KINDS[kind]
        with pytest.raises(ValueError, match="1 images but 2 prompts"):
            scene([image], ["a circle"] * 2)

    def test_scene_other_sizes_and_modes(self):
        slots = torch.tensor([[(20.0, 30.0, 9.0, 2, 4)] + [(0, 0, -9, 0, 0)] * 3])
        image = to_images(make_toy.render(slots, torch.zeros(1)))[0]
        assert scene([image.resize((128, 128)), image.convert("RGBA")], ["a purple triangle"] * 2) == [1, 1]

    @pytest.mark.parametrize("field", ("best-of-k", "pairwise"))
    def test_ablation_fields_pull_toward_the_better_pictures(self, field):
        """The alternatives of lab/ablate.py are entries of drpo's table, and nothing of drpo is replaced."""
        torch.manual_seed(0)
        target = drpo.FIELDS[field]
        m = 1 if field == "best-of-k" else 2
        cfg = drpo.Config(anchors=m, candidates=6, lambda_ref=0.0, field=field)
        drpo.check(cfg)
        z = torch.randn(6, 5)
        (z_star, weight), = target(z, z.clone(), z[:m], z[-m:], cfg)[0]
        gain = ((z_star - z) * (z[:m].mean(0) - z[-m:].mean(0))).sum(-1)
        assert float(weight) > 0 and gain.mean() > 0
        (z_star, _), = target(z, z.clone(), z[:0], z[:0], cfg)[0]
        assert torch.equal(z_star, z), "a prompt without anchors stays where it is"

    def test_drift_alone_on_colours(self):
        """No preference moves the mean colours; on every other map the objective is the dipole's."""
        torch.manual_seed(0)
        cfg = drpo.Config(lambda_ref=0.7, eta=1.5, radii=(0.5,))
        z, z_ref = torch.randn(5, 6), torch.randn(4, 6)
        (z_star, _), = ablate.drift_on_colours_target(z, z_ref, z[:1], z[-1:], cfg)[0]
        z64, ref64 = _dp_64(z, z_ref)
        V, _ = _dp_drift(z64, ref64, (0.5,), "laplacian")
        u = _dp_scale([(a, b) for a in z64 for b in z64]) / 6 ** 0.5
        _dp_close(z_star, z64 + 1.5 * u * 0.7 * V)
        z, z_ref = torch.randn(5, 7), torch.randn(4, 7)
        (other, _), = ablate.drift_on_colours_target(z, z_ref, z[:1], z[-1:], cfg)[0]
        (dipole, _), = drpo.dipole_target(z, z_ref, z[:1], z[-1:], drpo.Config(eta=1.5, radii=(0.5,)))[0]
        assert torch.equal(other, dipole)

    def test_colour_features_are_the_pictures(self):
        G = drpo.load_generator("toy")
        x = torch.randn(2, *G.noise_shape, generator=torch.Generator().manual_seed(0))
        h, = ablate.colour_features(G)(x, None)
        pictures = G.decode(x).numpy().astype(np.float64).reshape(2, 3, -1)
        expected = np.concatenate([pictures.mean(2), pictures.std(2, ddof=1)], 1)
        np.testing.assert_allclose(h[:, 0].numpy(), expected, atol=1e-5)

    def test_ablation_goes_on_with_what_is_there(self, tmp_path, capsys, monkeypatch):
        known = {f.name for f in fields(drpo.Config)}
        assert all(set(settings) <= known for table in ablate.TABLES.values() for settings in table.values())
        opened = {"color_entropy": 2.0, "circle_flatness": 0.9}
        for seed, right in ((0, 0.5), (1, 0.7)):
            for label, settings in ablate.TABLES["kernel"].items():
                folder = tmp_path / f"{label}-seed{seed}"
                folder.mkdir()
                job = dict(label=label, seed=seed, settings=settings | {"steps": 3}, device="cpu", samples=8)
                result = dict(right=right, right_base=0.4, diversity_right=None, diversity=1.0, distance=0.1, reward=0.6,
                              reward_base=0.5, minutes=1.0, **opened)
                (folder / "result.json").write_text(json.dumps(job | result))
        monkeypatch.setattr(ablate, "open_figures", lambda G: opened)  # of the base: the one thing that is computed
        ablate.ablate(argparse.Namespace(tables="kernel", seeds="0,1", steps=3, samples=8, jobs=1, device="cpu", out=tmp_path))
        out = capsys.readouterr().out
        assert len(json.loads((tmp_path / "results.json").read_text())) == 2 * len(ablate.TABLES["kernel"])
        assert "60.0% (50.0% to 70.0%)" in out and "base 40.0% right" in out

    @pytest.mark.parametrize("reward,scored", (("scene_binary", "scene"), ("warm", "warm")))
    def test_a_variant_is_trained_and_its_figures_are_the_reports(self, reward, scored, tmp_path, monkeypatch):
        """A variant's reward is loaded by file; a reward that grades differently from the checker is scored by both."""
        monkeypatch.setattr(ablate, "open_figures", lambda G: {"color_entropy": 2.0, "circle_flatness": 0.9})
        settings = dict(steps=1, batch=2, candidates=4, anchors=2, radii=[0.5, 1.0], reward=ablate.MINE + reward)
        job = dict(label="x", seed=3, settings=settings, device="cpu", samples=1)
        (tmp_path / "job.json").write_text(json.dumps(job))
        ablate.run_variant(tmp_path)
        result = json.loads((tmp_path / "result.json").read_text())
        run, = tmp_path.glob("run-*")
        config = json.loads((run / "config.json").read_text())
        assert config["seed"] == 3 and config["radii"] == [0.5, 1.0] and config["kernel"] == "rbf"
        columns = json.loads((run / "eval" / "report.json").read_text())["columns"]
        tuned = columns[run.name]
        name = scored if scored == "scene" else ablate.MINE + scored
        assert set(tuned["rewards"]) == {"scene", name}
        assert result["reward"] == tuned["rewards"][name]["mean"][0] != columns["base"]["rewards"][name]["mean"][0]
        assert result["right"] == tuned["accuracy"]["scene"]["all"]["mean"][0] == result["kinds"]["all"]
        assert result["right_base"] == columns["base"]["accuracy"]["scene"]["all"]["mean"][0] > 0.2
        assert result["color_entropy"] == 2.0 and {k: result[k] for k in job} == job

    def test_open_attributes_are_counted(self, rendered):
        """Entropy of colours and flatness of circles, on pictures drawn for the purpose."""
        def picture(x, y, r, shape, color):
            slots = torch.tensor([[(x, y, r, shape, color)] + [(0, 0, -9, 0, 0)] * 3])
            return to_images(make_toy.render(slots, torch.zeros(1)))[0]
        images = [picture(32.0, 32.0, 12.0, 0, color) for color in (0, 0, 1, 1, 2, 3)]
        found = ablate.open_attributes(images, ["a circle"] * 6)
        assert found["color_entropy"] == pytest.approx(-(2 * math.log2(1 / 3) / 3 + 2 * math.log2(1 / 6) / 6), abs=1e-6)
        assert found["circles"] == 6 and found["circle_flatness"] > 0.95
        flat = images[0].resize((64, 48)).crop((0, 0, 64, 48))
        canvas = Image.new("RGB", (64, 64), images[0].getpixel((0, 0)))
        canvas.paste(flat, (0, 8))
        assert ablate.flatness(canvas) == pytest.approx(0.75, abs=0.05)


class TestLabTheFigures:
    """What README says was measured stands in lab/README.md, to the digits that README gives."""

    def test_figures_of_the_readme_are_those_of_the_notebook(self):
        front, notebook = (HERE / "README.md").read_text(), (HERE / "lab" / "README.md").read_text()
        commits = set(re.findall(r"commit ([0-9a-f]{7})", front))
        assert commits and all(f"commit {commit}" in notebook for commit in commits)

        def agrees(text, value):  # 46 and 45.5, 4.4 and 4.44: half of the last digit
            digits = len(text.partition(".")[2])
            return abs(float(text) - float(value)) <= 0.5001 * 10 ** -digits

        measured = {}
        for line in notebook.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 4 and re.match(r"[\d.]+ \(", cells[1]):
                measured[cells[0]] = cells[1].split()[0], cells[2]
        rows = re.findall(r"^\| (\d+) \|(.*)\|(.*)\|$", front, re.M)
        assert len(rows) >= 5
        checked = 0
        for pictures, turbo, xl in rows:
            for text, name in ((turbo.split(";")[0], pictures), (turbo.partition("compiled ")[2], f"{pictures}, `--compile`"),
                               (xl, f"SDXL-Turbo 8 x 16, {pictures} at once")):
                if text.strip():
                    for said, known in zip(text.strip().split(", "), measured[name], strict=True):
                        assert agrees(said, known), (name, said, known)
                        checked += 1
        assert checked >= 12
        tuned = re.search(r"^\| right \|(.*)\|$", notebook, re.M)[1].replace("%", "").split("|")
        base, *seeds = [float(value) for value in tuned[:6]]
        said = re.search(r"rises from ([\d.]+)%\s+to\s+(\d+)\s+to\s+(\d+)%\s+\(mean\s+([\d.]+)%", front)
        assert said, "README names base, least, most and mean"
        for text, value in zip(said.groups(), (base, min(seeds), max(seeds), sum(seeds) / len(seeds)), strict=True):
            assert agrees(text, value), (text, value)
        diversity = re.search(r"^\| diversity of right, same prompts \|(.*)\|$", notebook, re.M)[1].split("|")
        diversity = [float(value) for value in diversity[1:6]]
        said = re.search(r"diversity of right pictures stays\s+at\s+(\d+)\s+to\s+(\d+)%", front)
        for text, value in zip(said.groups(), (min(diversity), max(diversity)), strict=True):
            assert agrees(text, value), (text, value)

        def figures(text):
            return re.findall(r"\d+(?:\.\d+)?", text)

        said = re.search(r"With ([\d, and]+) GiB free\s+`auto`\s+took(.*?)pictures of SD-Turbo:(.*?) s\. ", front, re.S)
        known = re.findall(r"^\| (\d+) GiB \| (\d+)[^|]*\| ([\d.]+) \|", notebook, re.M)
        assert len(known) == 4
        for row, of_notebook in zip(zip(*map(figures, said.groups()), strict=True), known, strict=True):
            assert all(map(agrees, row, of_notebook)), (row, of_notebook)
        climbed = []
        for row in notebook[notebook.index("| scene (0.71)"):notebook.index("| warm (-5.2)")].splitlines():
            climbed += [int(figure) for figure in figures(row.split("|")[4])]
        said = re.search(r"to (\d+)\s+to\s+(\d+)%\s+right\s+from", front)
        assert [int(text) for text in said.groups()] == [min(climbed), max(climbed)]


# ===== cuda

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class TestCuda:
    """On a GPU; skipped where there is none."""

    @cuda
    @pytest.mark.cuda
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_kernels_on_the_gpu_equal_the_cpu(self, kernel):
        """All fields, in float32, also where a patch makes many vectors."""
        for N, D in ((24, 64), (384, 256)):
            z, reference, positive, negative = _dp_sets(3, N=N, D=D, M=N // 3)
            kw = dict(radii=(0.05, 0.2, 1.0), kernel=kernel)
            gpu = [t.cuda() for t in (z, reference, positive, negative)]
            for want, got in (
                    (drpo.dipole_field(z, positive, negative, **kw), drpo.dipole_field(gpu[0], *gpu[2:], **kw)),
                    (drpo.reference_drift(z, reference, **kw), drpo.reference_drift(*gpu[:2], **kw)),
                    (drpo.released_field(z, positive, negative, **kw)[0], drpo.released_field(gpu[0], *gpu[2:], **kw)[0])):
                assert (got.cpu() - want).norm() < 1e-4 * want.norm()

    @cuda
    @pytest.mark.cuda
    @pytest.mark.parametrize("dtype,least", ((torch.float32, 0.9999), (torch.bfloat16, 0.8), (torch.float16, 0.97)))
    def test_half_precision_update_on_the_gpu(self, dtype, least, _dp_models):
        """The gradient of an update points where that of the CPU in float32 points, whole and in chunks."""
        torch.backends.cudnn.allow_tf32 = False
        G = _dp_open(_dp_models / "sd")
        want = _dp_gradient(G, _dp_random_lora(G, size=0.1), "vae", 12)[0]
        G = drpo.load_generator(str(_dp_models / "sd"), device="cuda", dtype=dtype)
        params = _dp_random_lora(G, size=0.1)
        with torch.no_grad():  # the CPU's weights: generators differ
            exact = _dp_open(_dp_models / "sd")
            _dp_random_lora(exact, size=0.1)
            for p, w in zip(params, exact.parameters()):
                p.copy_(w)
        for micro in (12, 5):
            got = _dp_gradient(G, params, "vae", micro)[0].cpu()
            assert got.isfinite().all() and float(torch.cosine_similarity(got, want, dim=0)) > least

    @cuda
    @pytest.mark.cuda
    def test_compiled_equals_eager_on_the_gpu(self, _dp_models):
        torch.backends.cudnn.allow_tf32 = False
        gradients = []
        for compiled in (False, True):
            G = drpo.load_generator(str(_dp_models / "sd"), device="cuda")
            if compiled:
                G.compile_all()
            gradients.append(_dp_gradient(G, _dp_random_lora(G, size=0.1), "vae", 12)[0])
        assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()

    @cuda
    @pytest.mark.cuda
    def test_memory_that_runs_out_on_the_gpu(self, _dp_models, capsys):
        """A real out-of-memory error: the micro-batch is halved, and the gradient is the same."""
        G = drpo.load_generator(str(_dp_models / "sd"), device="cuda")
        params, phi = _dp_random_lora(G, size=0.1), drpo.load_features("vae", G)
        want = _dp_gradient(G, params, phi, 12)[0]
        for p in params:
            p.grad = None

        def hungry(x, condition):
            if len(x) > 6:
                torch.empty(2 ** 40, dtype=torch.uint8, device="cuda")  # a terabyte
            return phi(x, condition)

        class ByPlace(_DpScore):
            def score(self, images, prompts, watch=False):  # a prompt at a time: the place within it
                table = [TABLE[PROMPTS.index(prompt)][i % 6] for i, prompt in enumerate(prompts)]
                return {"table": torch.tensor(table, dtype=torch.float64)}

        noise = torch.stack([drpo.prompt_noise(3, i, (6, 4, 8, 8)) for i in range(2)]).cuda()
        batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), noise)
        _, micro = drpo.gradient_that_fits(G, hungry, ByPlace(TABLE), batch, _dp_config(anchors=2), 12)
        assert micro == 6 and capsys.readouterr().err.count("out of GPU memory") == 1
        got = torch.cat([p.grad.flatten() for p in params])
        assert (got - want).norm() < 1e-3 * want.norm()

    @cuda
    @pytest.mark.cuda
    @pytest.mark.parametrize("kind,dtype", (("sd", "bf16"), ("sd", "fp16"), ("sdxl", "bf16"), ("sdxl", "fp16")))
    def test_a_run_on_the_gpu(self, kind, dtype, _dp_models, _dp_home):
        """--micro-batch auto starts from the free memory; it resumes."""
        with contextlib.chdir(_dp_home):
            argv = _dp_argv(_dp_models, kind=kind, dtype=dtype, device="cuda", steps=2, features="vae,unet", preview_every=2)
            drpo.main(argv)
            drpo.main(["--resume", "run", "--steps", "3"])
        metrics = _dp_metrics(_dp_home / "run")
        applied = [m["applied"] for m in metrics]  # in fp16 the scaler may find its scale by a failed try
        assert all(applied) if dtype == "bf16" else sum(applied) >= 2
        assert metrics[2]["distance"] > 0
        assert metrics[0]["micro_batch"] == 8 and metrics[0]["peak_gib"] > 0
