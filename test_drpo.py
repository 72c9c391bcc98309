"""Tests: values against independent computations (float64 loops, autograd, diffusers, peft), bad
input, faults.

    pip install pytest pytest-xdist peft
    python -m pytest -q -n 2 test_drpo.py                      all, under 4 minutes on 2 cores
    python -m pytest -q -m "not slow" -n 2 test_drpo.py        what takes seconds
    python -m pytest -q -m cuda test_drpo.py                   what needs a GPU, else skipped

Contents
    read these first    the equations, the update, sampler, resume, LoRA elsewhere, the toy learns
    drpo.py             1 the field, 2 features, 3 the generator, 4 one update, 5 a run, bad input
    rewards.py          contract, files, CLIP and its descendants, GenEval, served rewards, judge
    eval.py             statistics, report, pictures
    lab/                the toy's checker, ablations
    cuda                bf16, fp16, memory, compiled, kernels: on a GPU
"""
import base64
import contextlib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
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
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS",
                      "1")  # the networks are tiny: threads only wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import drpo
import eval as E
import rewards
from rewards import UserError

warnings.filterwarnings("ignore",
                        category=pytest.PytestUnknownMarkWarning)  # slow and cuda, told apart below
HERE = Path(drpo.__file__).resolve().parent
sys.path.append(str(HERE / "lab"))
import bench  # noqa: E402

VIT = HERE / "lab" / "vit.py"  # features of one's own, as a reader would write them
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

def unit(V):
    """V / RMS, in float64, and the RMS."""
    rms = math.sqrt(float((V ** 2).mean()))
    return (V / rms if rms > 0 else V), rms

def mean_scale(pairs):
    """Mean of the distances that are not 0."""
    d = [math.sqrt(sum((x - y) ** 2 for x, y in zip(p, q))) for p, q in pairs]
    d = [x for x in d if x > 0]
    return sum(d) / len(d) if d else 1.0

def gradient_of_kernel(z, a, tau, radius, kernel):
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

def loop_dipole(z, positive, negative, radii, kernel):
    """-> field (N, D), and the RMS of each radius before normalisation."""
    s = mean_scale([(x, y) for x in z for y in [*positive, *negative]])
    total, all_rms = 0, []
    for radius in radii:
        V = np.zeros_like(z)
        for i in range(len(z)):
            for a in positive:
                V[i] += gradient_of_kernel(z[i], a, radius * s, radius, kernel)
            for a in negative:
                V[i] -= gradient_of_kernel(z[i], a, radius * s, radius, kernel)
        V, rms = unit(V)
        total, all_rms = total + V, all_rms + [rms]
    return total, all_rms

def log_of_kernel(z, a, tau, radius, kernel):
    n = np.linalg.norm(z - a)
    if kernel == "cosine":
        return float(z @ a) / np.linalg.norm(z) / np.linalg.norm(a) / radius
    return -n ** 2 / (2 * tau ** 2) if kernel == "rbf" else -n / tau

def mean_shift(z, points, tau, radius, kernel):
    """sum_b k(z, b) b / sum_b k(z, b)."""
    logs = [log_of_kernel(z, b, tau, radius, kernel) for b in points]
    weights = [math.exp(x - max(logs)) for x in logs]
    return sum(w * b for w, b in zip(weights, points)) / sum(weights)

def loop_drift(z, reference, radii, kernel):
    s = mean_scale([(x, y) for x in z for y in [*z, *reference]])
    total, all_rms = 0, []
    for radius in radii:
        V = np.zeros_like(z)
        for i in range(len(z)):
            others = [z[j] for j in range(len(z)) if j != i]
            V[i] = (mean_shift(z[i], reference, radius * s, radius, kernel)
                    - mean_shift(z[i], others, radius * s, radius, kernel))
        V, rms = unit(V)
        total, all_rms = total + V, all_rms + [rms]
    return total, all_rms

def loop_released(z, positive, negative, radii, kernel, w_pos=3000.0, w_neg=3000.0,
                  negative_is_self=False):
    """The authors' arithmetic, entry by entry, in float64 -> force in units of s / sqrt(D), s."""
    N, D, M = len(z), z.shape[1], len(negative)
    y = [*z, *negative, *positive]
    w = [1.0] * N + [w_neg] * M + [w_pos] * len(positive)
    Y = len(y)
    d = [[max(math.sqrt(sum((p - q) ** 2 for p, q in zip(z[i], y[j]))), 1e-4) for j in range(Y)]
         for i in range(N)]
    s = max(sum(d[i][j] * w[j] for i in range(N) for j in range(Y)) / (N * Y) / (sum(w) / Y), 1e-3)
    total = np.zeros_like(z)
    for radius in radii:
        logits = np.zeros((N, Y))
        for i, j in itertools.product(range(N), range(Y)):
            if kernel == "cosine":
                norms = np.linalg.norm(z[i]) * np.linalg.norm(y[j])
                logits[i, j] = float(z[i] @ y[j]) / norms / radius
            else:
                t = d[i][j] / (s * radius)
                logits[i, j] = -t ** 2 / 2 if kernel == "rbf" else -t
            if i == j or (negative_is_self and j == N + i):
                logits[i, j] -= 100 / radius
        rows = [logits[i].max() + math.log(sum(math.exp(x - logits[i].max()) for x in logits[i]))
                for i in range(N)]
        columns = [
            logits[:, j].max() + math.log(sum(math.exp(x - logits[:, j].max())
                                              for x in logits[:, j])) for j in range(Y)
        ]
        force = np.zeros_like(z)
        for i in range(N):
            A = [math.sqrt(max(math.exp(2 * logits[i, j] - rows[i] - columns[j]), 1e-6)) * w[j]
                 for j in range(Y)]
            minus, plus = sum(A[:N + M]), sum(A[N + M:])
            coef = [-A[j] * plus if j < N + M else A[j] * minus for j in range(Y)]
            force[i] = (sum(c * v for c, v in zip(coef, y)) - sum(coef) * z[i]) / (s / math.sqrt(D))
        total += force / math.sqrt(max(float((force ** 2).mean()), 1e-8))
    return total, s

def assert_close(got, want, tolerance=1e-5):
    """Largest error of a float32 tensor relative to the RMS of a float64 array."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want)
    assert np.isfinite(got).all()
    error = np.abs(got - want).max() / max(math.sqrt(float((want ** 2).mean())), 1e-30)
    assert error < tolerance, f"relative error {error:.2e}"

def point_sets(seed, N=9, D=7, M=3, offset=0.0):
    """z (N, D), reference (N, D) near it, and anchors that are rows of z."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(N, D, generator=g) + offset
    reference = z + 0.3 * torch.randn(N, D, generator=g)
    return z, reference, z[:M].clone(), z[-M:].clone()

def in_float64(*tensors):
    return [t.double().numpy() for t in tensors]

def small_config(**kw):
    return drpo.Config(**{"radii": (0.2, 0.5), **kw})

def tokenizer(folder):
    """A CLIP tokenizer whose words are letters."""
    import transformers
    symbols = [chr(c) for c in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *(s + "</w>" for s in symbols)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                      model_max_length=77)

def pipeline(kind, folder):
    """A whole StableDiffusion or StableDiffusionXL pipeline of few random weights, pictures of 32 x
    32."""
    import diffusers
    import transformers
    torch.manual_seed(0)
    text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                vocab_size=200, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    schedule = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                    timestep_spacing="trailing", steps_offset=1)
    unet = dict(sample_size=8, block_out_channels=(32, 64), attention_head_dim=(2, 4),
                norm_num_groups=16, use_linear_projection=True)
    parts = dict(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            scaling_factor=0.13025 if kind == "sdxl" else 0.18215),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        tokenizer=tokenizer(folder))
    with torch.no_grad():
        # pictures with contrast, not all of one grey
        for p in parts["vae"].decoder.conv_out.parameters():
            p.mul_(3)
    if kind == "sd":
        parts["unet"] = diffusers.UNet2DConditionModel(
            **unet, layers_per_block=1, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        return diffusers.StableDiffusionPipeline(
            **parts, scheduler=diffusers.EulerDiscreteScheduler(**schedule), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False)
    parts["unet"] = diffusers.UNet2DConditionModel(
        **unet, layers_per_block=2, cross_attention_dim=64, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    second = transformers.CLIPTextConfig(**text, projection_dim=32)
    return diffusers.StableDiffusionXLPipeline(
        **parts, tokenizer_2=parts["tokenizer"], add_watermarker=False,
        text_encoder_2=transformers.CLIPTextModelWithProjection(second),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**schedule))

@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a tiny SD and a tiny SDXL model in the diffusers layout."""
    home = tmp_path_factory.mktemp("models")
    for kind in ("sd", "sdxl"):
        pipeline(kind, home).save_pretrained(home / kind)
    return home

def open_model(folder, dtype=torch.float32):
    return drpo.load_generator(str(folder), dtype=dtype)

def random_lora(G, rank=4, alpha=8.0, size=0.3, seed=1):
    """A LoRA that does something."""
    torch.manual_seed(seed)
    params = G.add_lora(rank, alpha)
    for layer in G.lora.values():
        torch.nn.init.normal_(layer.up, std=size)
    return params

def some_noise(B=2, seed=0):
    return torch.randn(B, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

def sample_of(G, e, prompts=PROMPTS):
    with torch.no_grad():
        return G.sample(e, G.encode(prompts))

def pipeline_sample(pipe, e, output="latent", prompts=PROMPTS):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt=list(prompts), latents=e.clone().to(pipe.dtype), num_inference_steps=1,
                guidance_scale=0.0, height=32, width=32, output_type=output).images

class TableScore:
    """Scores by place, in the place of a reward: what it sees is kept, its order is far from
    rounding."""

    def __init__(self, table, f=lambda x: x):
        self.table, self.f, self.seen = torch.tensor(table, dtype=torch.float64).flatten(), f, []
        self.parts = {"table": self}

    def score(self, images, prompts, watch=False):
        assert not images.requires_grad
        first = sum(len(p) for _, p in self.seen)
        self.seen.append((images.clone(), list(prompts)))
        return {"table": self.f(self.table[first:first + len(prompts)])}

    def combine(self, scores):
        return scores["table"]

def update_gradient(G, params, features, micro, cfg=None, f=lambda x: x, table=TABLE, pairs=None,
                    seed=3):
    """Gradient of one step at 2 prompts x 6 candidates -> flat gradient, metrics, the score
    object."""
    cfg = cfg or small_config(anchors=2)
    for p in params:
        p.grad = None
    noise = torch.stack([drpo.prompt_noise(seed, i, (6, 4, 8, 8)) for i in range(2)]).to(G.device)
    score = None if pairs else TableScore(table, f)
    batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), noise, pairs)
    phi = drpo.load_features(features, G) if isinstance(features, str) else features
    metrics = drpo.drpo_gradient(G, phi, score, batch, cfg, micro)
    scale = G.scaler.get_scale() if G.scaler.is_enabled() else 1
    return torch.cat([p.grad.flatten() for p in params]) / scale, metrics, score

@pytest.fixture(scope="module")
def tuned(models):
    """Tiny SD with a LoRA that does something, and its parameters."""
    G = open_model(models / "sd")
    return G, random_lora(G, size=0.1)

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
    return [s + random.random() + float(torch.rand(())) + np.random.rand()
            for s in good(images, prompts)]

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

def child(argv, stream, cwd, env):
    """Runs in the child: drpo.main(argv) with its output in files."""
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{stream}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    ignored = env.get("DP_ACTION") == "interrupts_ignored"  # as a background job of a shell has it
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    action = env.get("DP_ACTION")
    if action == "tiny_file":  # files above this size cannot be written, as on a full disk
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(env["DP_LIMIT"]), resource.RLIM_INFINITY))
    if action == "nonfinite":  # the gradients of these updates are spoilt
        steps = [int(step) for step in env["DP_STEPS"].split(",")]
        plain, at = drpo.drpo_gradient, [int(env.get("DP_AT", 0))]

        def spoilt(G, *args):
            metrics = plain(G, *args)
            at[0] += 1
            if at[0] in steps:
                G.parameters()[0].grad.view(-1)[0] = math.nan if at[0] % 2 else math.inf
                metrics["loss"], metrics["rms_pref"] = math.nan, [math.nan] * 3
            return metrics

        drpo.drpo_gradient = spoilt
    drpo.main(argv)

class RunProcess:
    """A process that runs drpo.main(argv)."""

    server = None

    def __init__(self, argv, cwd, env=()):
        if not RunProcess.server:
            RunProcess.server = multiprocessing.get_context("forkserver")
            RunProcess.server.set_forkserver_preload(
                ["drpo", "pytest", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
                 "eval",
                 "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
                 "transformers.models.clip.modeling_clip", "torch._dynamo"])
        self.stream = str(Path(cwd) / f"stream{random.randrange(10 ** 12)}")
        self.process = RunProcess.server.Process(target=child,
                                             args=([str(a) for a in argv], self.stream, str(cwd),
                                                   dict(env)))
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
            assert self.process.exitcode is None, self.read(".err")
            assert time.monotonic() - begun < seconds, self.read(".err")
            time.sleep(0.002)

@pytest.fixture
def home(tmp_path, models):
    """A folder with a prompts file and a reward file."""
    lines = ("a red cat", "two dogs", "a bird", "a blue house", "a green tree", "")
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    (tmp_path / "own.py").write_text(REWARD_FILE)
    return tmp_path

def command(models, out="run", reward="own.py:good", kind="sd", **kw):
    """Command line of a tiny run."""
    settings = dict(model=models / kind, reward=reward, prompts="prompts.txt", out=out, steps=4,
                    batch=2, candidates=4,
                    anchors=2, features="vae", lora_rank=2, preview_every=0, save_every=50,
                    device="cpu", field="dipole", radii="0.2,0.5,1", lr=1e-3) | kw
    return [a for k, v in settings.items() if v is not None
            for a in ([f"--{k.replace('_', '-')}"] if v is True
                      else [f"--{k.replace('_', '-')}", str(v)])]

def metrics_of(run):
    """metrics.jsonl as strict JSON, without the times."""
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    lines = [json.loads(line, parse_constant=refuse)
             for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if not k.startswith("seconds")
             and k != "images_per_second"} for m in lines]

def state_of(run):
    """The newest checkpoint as plain data, with step and position on top."""
    state = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
    return {**state, **state["at"]}

def weights_of(run):
    return state_of(run)["weights"]

def all_equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))

def toy_score(G, captions, scene):
    """Mean `scene` score of 3 pictures of each caption, with noise that no training step sees."""
    scores = []
    with torch.no_grad():
        for i in range(0, len(captions), 16):
            part = [c for c in captions[i:i + 16] for _ in range(3)]
            noise = torch.stack([drpo.prompt_noise(12345, i * 3 + j, G.noise_shape)
                                 for j in range(len(part))])
            scores.append(scene(rewards.to_pil(G.decode(G.sample(noise, G.encode(part)))), part))
    return float(torch.cat(scores).mean())


class TestReadTheseFirst:
    """Ten tests that say what this project promises."""

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("radii", RADII)
    def test_dipole_field_equals_float64_loop(self, kernel, radii):
        """With anchors among the samples, as in training, and with anchors of their own."""
        for seed, offset in ((0, 0.0), (1, 2.0)):
            z, other, positive, negative = point_sets(seed, offset=offset)
            for p, n in ((positive, negative), (other[:4], other[4:6])):
                want, want_rms = loop_dipole(*in_float64(z, p, n), radii, kernel)
                got, rms = drpo.dipole_field(z, p, n, radii=radii, kernel=kernel)
                # exponents of some -1000: their float32 rounding is 1e-3
                small = kernel == "rbf" and min(radii) < 0.1
                assert_close(got, want, 1e-2 if small else 1e-5)
                shown = np.array(want_rms) > 1e-30  # below, float32 has no number for it
                np.testing.assert_allclose(rms.double().numpy()[shown],
                                           np.array(want_rms)[shown], rtol=1e-2 if small else 1e-5)

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("radii", RADII)
    def test_reference_drift_equals_float64_loop(self, kernel, radii):
        for seed, offset in ((0, 0.0), (1, 2.0)):
            z, reference, _, _ = point_sets(seed, offset=offset)
            reference[0] = z[0]  # as before the first step: distance 0
            want, want_rms = loop_drift(*in_float64(z, reference), radii, kernel)
            got, rms = drpo.reference_drift(z, reference, radii=radii, kernel=kernel)
            assert_close(got, want)
            np.testing.assert_allclose(rms.double().numpy(), want_rms, rtol=1e-5)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_released_field_equals_the_authors_numbers(self, kernel):
        """Six points in three dimensions, and what the authors' own drift_loss gave for them (their
        commit dd473d8, radii .02 .05 .2): the gradient of the sum of the squared distances to the
        target."""
        z, reference = torch.tensor(AUTHORS_Z), torch.tensor(AUTHORS_R)
        kw = dict(radii=(0.02, 0.05, 0.2), kernel=kernel)
        for term, (force, s) in (("pref", drpo.released_field(z, z[:2], z[4:], **kw)),
                                 ("ref", drpo.released_field(z, reference, z, negative_is_self=True,
                                                             **kw))):
            gradient, loss = AUTHORS[kernel, term]
            u = float(s) / math.sqrt(3)
            mine = -2 * force / u / z.numel()  # d/dz of mean ((z - z*) / u)^2 at z* = z + u force
            assert_close(mine, np.array(gradient), 2e-4)
            assert float(force.square().mean()) == pytest.approx(loss, rel=2e-4)

    def test_gradient_is_the_equations(self, tuned):
        """drpo_gradient against float64 loops for the targets and autograd through the sampler,
        features `vae`, dipole."""
        G, params = tuned
        got, metrics, _ = update_gradient(G, params, "vae", 12,
                                          small_config(anchors=2, lambda_ref=0.3, eta=0.8))
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
                z, r = in_float64(h.detach()[:, 0], h_ref[:, 0])
                V = loop_dipole(z, z[best], z[worst], (0.2, 0.5), "laplacian")[0]
                V = V + 0.3 * loop_drift(z, r, (0.2, 0.5), "laplacian")[0]
                # L = 1 / (2 N D) sum |(z - z*) / u|^2, z* = z + eta u V, u = s / sqrt(D), s the
                # mean distance within z;
                # mean over prompts
                N, D = z.shape
                u = mean_scale([(a, b) for a in z for b in z]) / math.sqrt(D)
                h[:, 0].backward(torch.from_numpy(-0.8 * V / (N * D * u) / 2).float(),
                                 retain_graph=True)
                total_loss += ((0.8 * V) ** 2).mean() / 2 / 2
        want = torch.cat([p.grad.flatten() for p in params])
        assert (got - want).norm() < 1e-3 * want.norm()
        assert metrics["loss"] == pytest.approx(total_loss, rel=1e-4)

    @pytest.mark.parametrize("field", ("dipole", "released"))
    def test_monotone_transform_gives_the_bit_identical_update(self, field, tuned):
        G, params = tuned
        cfg = small_config(anchors=2, field=field)
        want = update_gradient(G, params, "vae", 12, cfg)[0]
        for f in (torch.exp, lambda x: 1e6 * x - 3, lambda x: -1 / (x + 1),
                  lambda x: torch.exp(90 * x)):
            assert torch.equal(update_gradient(G, params, "vae", 12, cfg, f)[0], want)
        assert not torch.equal(update_gradient(G, params, "vae", 12, cfg, torch.neg)[0], want)

    @pytest.mark.parametrize("features", ("vae", "unet", "vae,unet"))
    @pytest.mark.parametrize("field", ("dipole", "released"))
    def test_micro_batches_give_the_same_gradient(self, features, field, tuned):
        """1, 3, 5 (which does not divide 12, and cuts through prompts) and all: equal to float32
        rounding."""
        G, params = tuned
        cfg = small_config(anchors=2, field=field)
        want, metrics, whole = update_gradient(G, params, features, 12, cfg)
        assert want.norm() > 0
        for micro in (1, 3, 5):
            got, m, score = update_gradient(G, params, features, micro, cfg)
            assert (got - want).norm() < 2e-4 * want.norm(), f"micro {micro}"
            assert m["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
            assert m.get("rms_pref") == (metrics["rms_pref"]
                                         and pytest.approx(metrics["rms_pref"], rel=1e-3)
                                         if field == "dipole" else None)
            # the reward sees each picture once, with its own prompt
            assert sum((p for _, p in score.seen), []) == [p for p in PROMPTS for _ in range(6)]
            torch.testing.assert_close(torch.cat([x for x, _ in score.seen]), whole.seen[0][0],
                                       rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_one_step_equals_pipeline(self, kind, models):
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(models / kind)
        G, e = open_model(models / kind), some_noise()
        want = pipeline_sample(pipe, e)
        got = sample_of(G, e)
        assert (want[0] - want[1]).abs().max() > 1
        assert_close(got, want.double().numpy(), 2e-5)
        with torch.no_grad():
            images = G.decode(got)
        want = pipeline_sample(pipe, e, "pt")
        assert want.std() > 0.02, "no picture"
        assert_close(images, want.double().numpy(), 2e-5)
        swapped = sample_of(G, e, PROMPTS[::-1])
        assert (swapped - got).abs().max() > 1e-3, "the prompt counts"

    def test_resume_is_exact(self, models, home):
        """4 steps at once and 2 + 2 with a new process between, with a reward that draws from every
        generator; and what --resume finds in metrics.jsonl may know the future, be torn, blank or
        twice there."""
        whole = RunProcess(command(models, "whole", "own.py:drawing"), home)
        half = RunProcess(command(models, "half", "own.py:drawing", steps=2), home)
        assert whole.wait() == 0, whole.err
        assert half.wait() == 0, half.err
        folder = home / "half"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        future = lines[1].replace('"step": 2', '"step": 3')
        (folder / "metrics.jsonl").write_text("\n".join([lines[0], "", *lines[1:], lines[1], "null",
                                                         future, future[:40]]))
        rest = RunProcess(["--resume", "half", "--steps", "4"], home)
        assert rest.wait() == 0, rest.err
        assert [m["step"] for m in metrics_of(folder)] == [1, 2, 3, 4]
        assert metrics_of(folder) == metrics_of(home / "whole")
        a, b = state_of(folder), state_of(home / "whole")
        assert all_equal(a["weights"], b["weights"])
        assert a["position"] == b["position"] == 8
        for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(),
                        strict=True):
            assert torch.equal(x["exp_avg"], y["exp_avg"])
            assert torch.equal(x["exp_avg_sq"], y["exp_avg_sq"])

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    @pytest.mark.parametrize("file", ("pytorch_lora_weights.safetensors", "kohya_lora.safetensors"))
    def test_exported_lora_in_diffusers_with_peft(self, kind, file, models, tmp_path):
        """The same picture, rank not equal to alpha; kohya's file through diffusers' own
        conversion."""
        from diffusers import DiffusionPipeline
        G, e = open_model(models / kind), some_noise()
        base = sample_of(G, e)
        random_lora(G, rank=4, alpha=6.0)
        tuned = sample_of(G, e)
        G.save_lora(tmp_path)
        pipe = DiffusionPipeline.from_pretrained(models / kind)
        pipe.load_lora_weights(tmp_path, weight_name=file)
        assert (tuned - base).norm() > 0.05 * base.norm(), "the LoRA does something"
        assert_close(pipeline_sample(pipe, e), tuned.double().numpy(), 3e-5)
        with torch.no_grad():
            want = G.decode(tuned)
        assert_close(pipeline_sample(pipe, e, "pt"), want.double().numpy(), 3e-5)

    @pytest.mark.slow
    def test_the_toy_improves_and_reversed_falls(self, tmp_path):
        """After a short run held-out captions are followed better than by the base; with the
        ranking reversed, worse."""
        captions, scene_reward = rewards.load_prompts("scenes-test")[::2], rewards.load("scene")
        G, found = drpo.load_generator("toy"), {}
        found["base"] = toy_score(G, captions, scene_reward)
        worse = f"{HERE / 'lab' / 'ablate.py'}:scene_reversed"
        small = ("--model toy --batch 4 --candidates 16 --anchors 4 --lr 3e-3 --average 0 "
                 "--preview-every 0 --device cpu").split()
        for name, reward, steps in (("tuned", "scene", "30"), ("reversed", worse, "9")):
            done = subprocess.run([sys.executable, str(HERE / "drpo.py"), *small, "--steps", steps,
                                   "--reward", reward, "--out", str(tmp_path / name)],
                                  capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            G.load_lora(tmp_path / name)
            found[name] = toy_score(G, captions, scene_reward)
        assert found["tuned"] - found["base"] > 0.03, found
        assert found["base"] - found["reversed"] > 0.02, found
        assert metrics_of(tmp_path / "tuned")[-1]["diversity"] > 0.8


# ===== drpo.py: 1. The field

def check_anchors(scores, m, positive, negative):
    """The rules of rank-only training, one by one, for one prompt."""
    valid = [i for i, s in enumerate(scores) if s == s]
    best, worst = [i for i in valid if positive[i]], [i for i in valid if negative[i]]
    assert sum(positive) == len(best), "NaN is no anchor"
    assert sum(negative) == len(worst), "NaN is no anchor"
    assert all(scores[i] > scores[j] for i in best
               for j in worst), "never equally scored on both sides"
    assert len(best) <= m
    assert len(worst) <= m
    distinct = sorted({scores[i] for i in valid})
    if len(distinct) < 2:
        assert not best
        assert not worst
        return
    assert best, "two opinions that differ give two anchors"
    assert worst, "two opinions that differ give two anchors"
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
        z, reference, positive, negative = point_sets(3)
        want, s_want = loop_released(*in_float64(z, positive, negative), radii, kernel)
        got, s = drpo.released_field(z, positive, negative, radii=radii, kernel=kernel)
        assert_close(got, want)
        assert float(s) == pytest.approx(s_want, rel=1e-5)
        want, s_want = loop_released(*in_float64(z, reference, z), radii, kernel,
                                     negative_is_self=True)
        got, s = drpo.released_field(z, reference, z, radii=radii, kernel=kernel,
                                     negative_is_self=True)
        assert_close(got, want)
        assert float(s) == pytest.approx(s_want, rel=1e-5)

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("radius", (0.1, 0.4, 1.5))
    def test_dipole_field_is_gradient_of_energy(self, kernel, radius):
        z, other, _, _ = point_sets(5)
        for positive, negative in ((other[:3], other[3:5]), (z[:3].clone(), z[5:].clone())):
            x = z.clone().requires_grad_()
            energy = drpo.dipole_energy(x, positive, negative, radius=radius, kernel=kernel)
            assert energy.shape == (9,)
            gradient, = torch.autograd.grad(energy.sum(), x)
            V, rms = drpo.dipole_field(z, positive, negative, radii=(radius,), kernel=kernel)
            # cosine: at z = a, where cos has its maximum, autograd's 0 is a difference of two
            # numbers of size e^(1/radius)
            assert_close(V * rms, gradient.double().numpy(), 2e-4 if kernel == "cosine" else 1e-5)

    def test_dipole_energy_value(self):
        z, other, _, _ = point_sets(6)
        positive, negative = other[:3], other[3:5]
        s = mean_scale([(x, y) for x in in_float64(z)[0] for y in in_float64(other[:5])[0]])
        for kernel in KERNELS:
            signed = list(zip(in_float64(other[:5])[0], (1, 1, 1, -1, -1)))
            want = []
            for x in in_float64(z)[0]:
                terms = [sign * math.exp(log_of_kernel(x, a, 0.3 * s, 0.3, kernel))
                         for a, sign in signed]
                want.append(sum(terms))
            E = drpo.dipole_energy(z, positive, negative, radius=0.3, kernel=kernel)
            assert_close(E, np.array(want))

    def test_swapping_best_and_worst_flips_the_dipole(self):
        z, _, positive, negative = point_sets(7)
        for kernel in KERNELS:
            V, _ = drpo.dipole_field(z, positive, negative, radii=(0.2, 1.0), kernel=kernel)
            swapped, _ = drpo.dipole_field(z, negative, positive, radii=(0.2, 1.0), kernel=kernel)
            assert V.abs().max() > 0.1
            assert_close(-swapped, V.double().numpy())

    def test_translation_and_scale(self):
        """The fields know only differences; a sample's own size is no length (cosine, which knows
        angles, excepted)."""
        z, reference, positive, negative = point_sets(8)
        for kernel in ("laplacian", "rbf"):
            kw = dict(radii=(0.2, 0.5), kernel=kernel)
            fields = (lambda f: drpo.dipole_field(f(z), f(positive), f(negative), **kw)[0],
                      lambda f: drpo.reference_drift(f(z), f(reference), **kw)[0],
                      lambda f: drpo.released_field(f(z), f(positive), f(negative), **kw)[0])
            for field in fields:
                V = field(lambda x: x).double().numpy()
                assert_close(field(lambda x: x + torch.linspace(-3, 3, 7)), V, 1e-4)
                assert_close(field(lambda x: 8 * x), V, 1e-4)
            V, _ = drpo.dipole_field(z, positive, negative, **kw)
            turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))[0]
            turned = z @ turn
            got, _ = drpo.dipole_field(turned, turned[:3], turned[-3:], **kw)
            assert_close(got, (V @ turn).double().numpy(), 1e-4)

    def test_dipole_points_to_the_best(self):
        """A lone positive pulls every sample straight to itself, a lone negative straight away; the
        sample itself stays."""
        z, _, _, _ = point_sets(9)
        a = z[2:3].clone()
        nothing = z[:0]
        toward, _ = drpo.dipole_field(z, a, nothing, radii=(0.5,), kernel="laplacian")
        away, _ = drpo.dipole_field(z, nothing, a, radii=(0.5,), kernel="laplacian")
        others = [i for i in range(9) if i != 2]
        assert torch.cosine_similarity(toward[others], (a - z)[others]).min() > 0.99999
        assert torch.cosine_similarity(away[others], (z - a)[others]).min() > 0.99999
        assert toward[2].abs().max() == 0
        assert away[2].abs().max() == 0

    def test_fields_where_everything_is_equal_or_lonely(self):
        """No division by zero: one sample, equal samples, no anchors."""
        z = torch.ones(4, 5)
        for kernel in KERNELS:
            kw = dict(radii=(0.2,), kernel=kernel)
            assert drpo.dipole_field(z, z[:1], z[1:2], **kw)[0].isfinite().all()
            assert drpo.reference_drift(z, z, **kw)[0].isfinite().all()
            assert drpo.released_field(z, z[:1], z[1:2], **kw)[0].isfinite().all()
        lone, target = torch.zeros(1, 3), torch.tensor([[3.0, 4.0, 0.0]])
        assert_close(drpo.reference_drift(lone, target, radii=(0.5,), kernel="laplacian")[0],
                     np.array([[0.6, 0.8, 0]]) * math.sqrt(3))

    def test_no_anchors_no_force(self):
        z = point_sets(4)[0]
        V, rms = drpo.dipole_field(z, z[:0], z[:0], radii=(0.2, 1.0), kernel="laplacian")
        assert V.shape == z.shape
        assert V.abs().max() == 0
        assert rms.tolist() == [0, 0]
        assert drpo.released_field(z, z[:0], z[:0], radii=(0.2,),
                                   kernel="laplacian")[0].abs().max() == 0

    @pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
    def test_any_dtype_comes_in_float32_goes_out(self, dtype):
        z, reference, positive, negative = (t.to(dtype) for t in point_sets(13))
        want = loop_dipole(*in_float64(z, positive, negative), (0.5,), "laplacian")[0]
        got, _ = drpo.dipole_field(z, positive.double(), negative, radii=(0.5,), kernel="laplacian")
        assert got.dtype == torch.float32
        assert_close(got, want)
        for field in (drpo.reference_drift(z.to(dtype), reference, radii=(0.5,),
                                           kernel="laplacian")[0],
                      drpo.released_field(z.to(dtype), positive, negative.double(), radii=(0.5,),
                                          kernel="laplacian")[0]):
            assert field.dtype == torch.float32
            assert field.isfinite().all()

    def test_unknown_kernel_is_refused_where_it_is_computed(self):
        z, reference, positive, negative = point_sets(14)
        kw = dict(radii=(0.5,), kernel="laplace")
        anchors = (z, positive, negative)
        for field in (lambda: drpo.dipole_energy(*anchors, radius=0.5, kernel="laplace"),
                      lambda: drpo.dipole_field(z, positive, negative, **kw),
                      lambda: drpo.reference_drift(z, reference, **kw),
                      lambda: drpo.released_field(z, positive, negative, **kw)):
            with pytest.raises(ValueError, match="laplace.*laplacian"):
                field()

    def test_rank_every_small_case(self):
        """All patterns of 6 scores out of 3 values and NaN, m = 1..3."""
        for row in itertools.product((0.0, 1.0, 2.0, math.nan), repeat=6):
            for m in (1, 2, 3):
                positive, negative = drpo.best_and_worst(torch.tensor(row), m)
                assert positive.dtype == negative.dtype == torch.bool
                check_anchors(row, m, positive.tolist(), negative.tolist())

    def test_rank_values(self):
        positive, negative = drpo.best_and_worst(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 0.0]), 2)
        assert positive.tolist() == [False, False, False, True, True, False]
        assert negative.tolist() == [False, True, False, False, False, True]
        positive, negative = drpo.best_and_worst(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]), 2)
        assert positive.tolist() == [True, True, False, False, False, False]
        assert negative.sum() == 2
        assert not negative[:2].any()

    def test_rank_knows_only_the_order(self):
        g = torch.Generator().manual_seed(0)
        for _ in range(60):
            scores = torch.randint(0, 8, (12,), generator=g).double()
            for f in (lambda x: 1000 * x - 7, torch.exp, lambda x: -torch.exp(-x),
                      lambda x: x ** 3 / 1e20, lambda x: 1e6 + 1e-3 * x,
                      lambda x: torch.exp(90 * x)):  # beyond what float32 tells apart or holds
                for a, b in zip(drpo.best_and_worst(scores, 4), drpo.best_and_worst(f(scores), 4)):
                    assert torch.equal(a, b)

    def test_loss_values(self):
        """sum of weight ||z - z*||^2 by the equations, for both fields, where z is the features
        that gave the targets."""
        z, reference, positive, negative = point_sets(11)
        a = in_float64(z, reference, positive, negative)
        kw = dict(radii=(0.2, 0.5), kernel="laplacian")
        eta, weight = 0.7, 0.3

        found = drpo.dipole_target(z, reference, positive, negative, lambda_ref=weight, eta=eta,
                                   **kw)[:2]
        V = loop_dipole(a[0], a[2], a[3], **kw)[0] + weight * loop_drift(a[0], a[1], **kw)[0]
        loss = drpo.regression_loss(z, *found)
        assert float(loss) == pytest.approx(0.5 * float(((eta * V) ** 2).mean()), rel=1e-5)
        x = z.clone().requires_grad_()
        gradient, = torch.autograd.grad(drpo.regression_loss(x, *found), x)
        assert_close(gradient / gradient.square().mean().sqrt(), -V / math.sqrt((V ** 2).mean()),
                     1e-4)

        found = drpo.released_target(z, reference, positive, negative, lambda_ref=weight, eta=eta,
                                     **kw)[:2]
        force, s = loop_released(a[0], a[2], a[3], **kw)
        drift, s_ref = loop_released(a[0], a[1], a[0], negative_is_self=True, **kw)
        x = z.clone().requires_grad_()
        gradient, = torch.autograd.grad(drpo.regression_loss(x, *found), x)
        unit, unit_ref = s / math.sqrt(7), s_ref / math.sqrt(7)
        want = -2 * eta * (force / unit
                           + weight * drift / unit_ref) / z.numel()  # of the two losses
        assert_close(gradient, want, 1e-4)
        assert float(found[1]) == pytest.approx((1 / unit ** 2 + weight / unit_ref ** 2) / 63,
                                                rel=1e-4)

    def test_target_is_detached(self):
        z, reference, positive, negative = (t.clone().requires_grad_() for t in point_sets(12))
        kw = dict(radii=(0.2, 0.5), kernel="laplacian", eta=1.0, lambda_ref=0.2)
        for field in (drpo.dipole_target, drpo.released_target):
            x = z.detach().clone().requires_grad_()
            drpo.regression_loss(x, *field(z, reference, positive, negative, **kw)[:2]).backward()
            assert x.grad.abs().max() > 0
            assert all(t.grad is None for t in (z, reference, positive, negative))

    def test_mathematics_runs_alone(self, tmp_path):
        """The first section, cut out of the file, needs torch and nothing else, and computes the
        same."""
        text = (HERE / "drpo.py").read_text()
        section, = re.findall(r"^# =+ 1\. .*?(?=^# =+ 2\. )", text, re.M | re.S)
        (tmp_path / "field.py").write_text("import torch\nimport torch.nn.functional as F\n"
                                           + section)
        (tmp_path / "use.py").write_text(
            "import sys, torch, field\n"
            "torch.manual_seed(0)\n"
            "z = torch.randn(6, 4); r = z + .1\n"
            "positive, negative = field.best_and_worst(torch.arange(6.), 2)\n"
            "p, n = z[positive], z[negative]\n"
            "kw = dict(radii=(.2,), kernel='laplacian')\n"
            "out = [field.dipole_field(z, p, n, **kw)[0], field.reference_drift(z, r, **kw)[0],\n"
            "       field.released_field(z, p, n, **kw)[0],\n"
            "       field.dipole_energy(z, p, n, radius=.2, kernel='laplacian')]\n"
            "target = field.dipole_target(z, r, p, n, eta=1., lambda_ref=.2, **kw)\n"
            "out.append(field.regression_loss(z, *target[:2]))\n"
            "others = {'diffusers', 'transformers', 'drpo', 'PIL'} & set(sys.modules)\n"
            "assert not others, 'torch only'\n"
            "torch.save(out, 'out.pt')\n")
        done = subprocess.run([sys.executable, "-I", "-c",
                               "import sys; sys.path.insert(0, '.'); import use"], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out = torch.load(tmp_path / "out.pt", weights_only=True)
        torch.manual_seed(0)
        z = torch.randn(6, 4)
        p, n = z[4:], z[:2]
        kw = dict(radii=(0.2,), kernel="laplacian")
        want = [drpo.dipole_field(z, p, n, **kw)[0], drpo.reference_drift(z, z + 0.1, **kw)[0],
                drpo.released_field(z, p, n, **kw)[0],
                drpo.dipole_energy(z, p, n, radius=0.2, kernel="laplacian")]
        for got, w in zip(out, want):
            torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-6)


# ===== drpo.py: 2. Features

def statistics_of(h):
    """Global mean, population std and the means of the four quarters of (B, C, H, W), by numpy in
    float64."""
    h = h.double().numpy()
    a, b = h.shape[2] // 2, h.shape[3] // 2
    quarters = [h[:, :, y:y + a, x:x + b].mean((2, 3)) for y in (0, a) for x in (0, b)]
    return h.mean((2, 3)), np.sqrt(h.var((2, 3)) + 1e-6), np.stack(quarters, -1).reshape(len(h), -1)

def compare_maps(got, want, tolerance=2e-5):
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert g.dtype == torch.float32
        w = w if w.ndim == 3 else w[:, None]
        assert g.shape == w.shape
        assert_close(g.detach(), w, tolerance)

def pil_224(images):
    """(B, 3, 32, 32) in [0, 1] -> ImageNet-normalised (B, 3, 224, 224), by PIL's bicubic, channel
    by channel."""
    out = [[np.asarray(Image.fromarray(c.numpy(), mode="F").resize((224, 224), Image.BICUBIC))
            for c in image]
           for image in images]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406),
                                                          (0.229, 0.224, 0.225)))
    return (torch.from_numpy(np.array(out)) - mean) / std

def vit_maps(h):
    h = h.double().numpy()
    return [h[:, 1:].mean(1), np.sqrt(h[:, 1:].var(1) + 1e-6), h[:, 0]]

def published_mae():
    """A small latent-MAE under the names of the authors' file, and three latents, by a seed. What
    their extractor (src/drpo/features.py of UGVly/DrPO) makes of the two is MAE_MAPS."""
    g, state = torch.Generator().manual_seed(5), {}

    def conv(name, *shape):
        scale = math.sqrt(2 / math.prod(shape[:3]))
        state[f"encoder.{name}.kernel"] = scale * torch.randn(*shape, generator=g)

    def norm(name, c):
        state[f"encoder.{name}.scale"] = 1 + 0.1 * torch.randn(c, generator=g)
        state[f"encoder.{name}.bias"] = 0.1 * torch.randn(c, generator=g)

    conv("conv1", 3, 3, 4, 32)
    norm("gn1", 32)
    before = 32
    for stage, (blocks, c) in enumerate(((2, 32), (2, 64), (1, 128), (1, 256))):
        for block in range(blocks):
            name = f"stages_{stage}.layers_{block}"
            conv(f"{name}.conv1", 3, 3, before, c)
            norm(f"{name}.gn1", c)
            conv(f"{name}.conv2", 3, 3, c, c)
            norm(f"{name}.gn2", c)
            if before != c:
                conv(f"{name}.proj_conv", 1, 1, before, c)
                norm(f"{name}.proj_gn", c)
            before = c
        norm(f"layer{stage + 1}_norm", c)
    state["decoder.head.kernel"] = torch.randn(1, 1, 8, 4,
                                               generator=g)  # the file has a decoder too
    return state, torch.randn(3, 4, 64, 64, generator=g)


MAE_MAPS = (  # vectors a picture, first three numbers, last three, mean, RMS of each map
    (1, (-0.241385, 0.176253, -0.364935), (0.092399, 0.60033, -0.736766), 0.0035462, 0.445482),
    (1, (0.713875, 0.993696, 0.62685), (0.925026, 0.967708, 0.30646), 0.8493212, 0.9049785),
    (16, (-0.250501, -0.459241, 0.103566), (-0.344667, 0.772375, -0.344947), 0.0035462, 0.6413615),
    (16, (0.560229, 0.286291, 1.03367), (0.497598, 0.926518, 0.691279), 0.6157169, 0.7785215),
    (4, (-0.453963, 0.158092, -0.130456), (0.099331, 0.837872, -0.705548), 0.0035462, 0.4923556),
    (4, (0.427063, 1.205672, 0.806479), (0.891355, 0.864986, 0.403499), 0.7986684, 0.8803558))


def as_torch_stores(state):
    """JAX's .kernel (HWIO) and .scale -> .weight (OIHW) and .weight."""
    stored = {}
    for key, value in state.items():
        if key.endswith(".kernel"):
            value = value.permute(3, 2, 0, 1).contiguous()
        stored[re.sub(r"\.(kernel|scale)$", ".weight", key)] = value
    return stored


MAE_FILES = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"metadata": {"step": 3}, "state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": as_torch_stores(state)},
    "prefixes": lambda state: {f"module._orig_mod.{key}": value for key,
                               value in as_torch_stores(state).items()}}


class TestFeatures:
    """Against hooks, written-out forwards and float64."""

    def test_vae_features(self, models):
        """Against hooks on a whole decode of the pipeline's VAE."""
        from diffusers import AutoencoderKL
        G = open_model(models / "sd")
        phi, x = drpo.load_features("vae", G), 3 * some_noise(3)
        vae, seen = AutoencoderKL.from_pretrained(models / "sd", subfolder="vae"), []
        for block in (vae.decoder.mid_block, vae.decoder.up_blocks[0], vae.decoder.up_blocks[1]):
            block.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        with torch.no_grad():
            vae.decode(x / 0.18215)
        compare_maps(phi(x, None), [m for h in seen for m in statistics_of(h)])

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_unet_features(self, kind, models):
        """Against hooks on the pipeline's own UNet; the LoRA does not reach them."""
        from diffusers import DiffusionPipeline
        G, x = open_model(models / kind), 3 * some_noise(2)
        c = G.encode(PROMPTS)
        pipe, seen = DiffusionPipeline.from_pretrained(models / kind), []
        blocks = (pipe.unet.down_blocks[-1], pipe.unet.mid_block, pipe.unet.up_blocks[0])

        def keep(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            seen.append(out.detach())

        for block in blocks:
            block.register_forward_hook(keep)
        noise = drpo.prompt_noise(0, 0, (4, 8, 8))
        added = None
        if kind == "sdxl":
            text, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
            ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(2, -1)
            added = {"text_embeds": pooled, "time_ids": ids}
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
            compare_maps(phi(x, c), want)
            random_lora(G)
            compare_maps(phi(x, c), want)

    def test_mae_features_are_unmasked(self, models, tmp_path):
        """All patches, in their order, none masked: a forward written out here, from the patches to
        hidden_states[12]."""
        import transformers
        torch.manual_seed(0)
        net = transformers.ViTMAEModel(
            transformers.ViTMAEConfig(hidden_size=16, num_hidden_layers=14, num_attention_heads=2,
                                      intermediate_size=32, patch_size=32, image_size=224)).eval()
        net.save_pretrained(tmp_path)
        G, x = open_model(models / "sd"), 2 * some_noise(2)
        phi = drpo.load_features(f"{VIT}:mae@{tmp_path}", G)
        with torch.no_grad():
            pixels = pil_224(G.decode(x))
            emb = net.embeddings
            h = torch.nn.functional.conv2d(pixels, emb.patch_embeddings.projection.weight,
                                           emb.patch_embeddings.projection.bias, stride=32)
            h = h.flatten(2).mT + emb.position_embeddings[:, 1:]
            h = torch.cat([(emb.cls_token + emb.position_embeddings[:, :1]).expand(2, -1, -1), h],
                          1)
            for layer in net.encoder.layer[:12] if hasattr(net, "encoder") else net.layers[:12]:
                h = layer(h)
                h = h[0] if isinstance(h, tuple) else h
            got = phi(x, None)
            compare_maps(got, vit_maps(h), 1e-3)
            torch.manual_seed(99)  # another order of the patches
            for a, b in zip(got, phi(x, None)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_dino_features(self, models, tmp_path):
        import transformers
        torch.manual_seed(0)
        net = transformers.Dinov2Model(
            transformers.Dinov2Config(hidden_size=16, num_hidden_layers=13, num_attention_heads=2,
                                      mlp_ratio=2, patch_size=32, image_size=224)).eval()
        net.save_pretrained(tmp_path)
        G, x = open_model(models / "sd"), 2 * some_noise(2)
        with torch.no_grad():
            h = net.embeddings(pil_224(G.decode(x)))
            for layer in list(net.encoder.layer)[:12]:
                h = layer(h)
                h = h[0] if isinstance(h, tuple) else h
            phi = drpo.load_features(f"{VIT}:dino@{tmp_path}", G)
            compare_maps(phi(x, None), vit_maps(h), 1e-3)

    @pytest.mark.parametrize("form", MAE_FILES)
    def test_latent_mae_is_the_authors(self, form, models, tmp_path):
        """In every container and layout of their reader: the numbers that their extractor gives."""
        state, x = published_mae()
        torch.save(MAE_FILES[form](state), tmp_path / "mae.pth")
        phi = drpo.load_features(f"latent-mae@{tmp_path / 'mae.pth'}", open_model(models / "sd"))
        with torch.no_grad():
            maps = phi(x, None)
            assert len(phi(x[..., :8, :8], None)) == 2, "one patch: no parts of it"
        for h, (T, first, last, mean, rms) in zip(maps, MAE_MAPS, strict=True):
            assert h.shape == (3, T, 256)
            assert h[0, 0, :3].tolist() == pytest.approx(first, abs=1e-5)
            assert h[2, -1, -3:].tolist() == pytest.approx(last, abs=1e-5)
            assert float(h.double().mean()) == pytest.approx(mean, abs=1e-6)
            assert float(h.double().square().mean().sqrt()) == pytest.approx(rms, abs=1e-5)

    def test_latent_mae_never_unpickles(self, models, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (Path.write_text, (tmp_path / "exploded", "x"))
        torch.save({"encoder.conv1.kernel": Bomb()}, tmp_path / "mae.pth")
        with pytest.raises(Exception):
            drpo.load_features(f"latent-mae@{tmp_path / 'mae.pth'}", open_model(models / "sd"))
        assert not (tmp_path / "exploded").exists()

    def test_features_are_deterministic_frozen_and_joined(self, models):
        """The same vectors each time, for each image alone, whatever the RNG; gradient to x only; a
        comma joins lists."""
        G, x = open_model(models / "sd"), 3 * some_noise(3)
        c = G.encode([*PROMPTS, "a dog"])
        single = {name: drpo.load_features(name, G)(x, c) for name in ("vae", "unet")}
        phi = drpo.load_features("vae,unet", G)
        torch.manual_seed(5)
        joined = phi(x, c)
        for a, b in zip(joined, sum(single.values(), []), strict=True):
            assert torch.equal(a, b)
        for i in range(3):
            for a, b in zip(joined, phi(x[i:i + 1], drpo.rows(c, slice(i, i + 1)))):
                assert_close(b[0], a[i].double().numpy(), 1e-4)
        leaf = x.clone().requires_grad_()
        sum(h.square().sum() for h in phi(leaf, c)).backward()
        assert leaf.grad.abs().max() > 0
        networks = (G.unet, G.vae, G.pipe.text_encoder)
        assert all(not p.requires_grad and p.grad is None for net in networks
                   for p in net.parameters())
        assert not any(net.training for net in networks)

    def test_a_feature_of_ones_own_needs_one_entry(self, tuned, monkeypatch):
        """In the table, and nowhere else: it is known to the checks, trains, and is exact in
        chunks."""
        def factory(G, path=None):
            assert path == "7"
            return lambda x, condition: [x.flatten(1)[:, None] * float(path)]
        monkeypatch.setitem(drpo.FEATURES, "mine", factory)
        G, params = tuned
        drpo.resolved(drpo.Config(features="mine@7"))
        whole, part = (update_gradient(G, params, "mine@7", micro)[0] for micro in (12, 5))
        assert whole.norm() > 0
        assert (part - whole).norm() < 2e-4 * whole.norm()
        monkeypatch.setitem(drpo.FIELDS, "reversed", lambda z, r, a, b,
                            **kw: drpo.dipole_target(z, r, b, a, **kw))
        cfg = dict(anchors=2, lambda_ref=0.0)
        drpo.resolved(drpo.Config(field="reversed"))
        plain = update_gradient(G, params, "mine@7", 12, small_config(**cfg))[0]
        assert (update_gradient(G, params, "mine@7", 12, small_config(field="reversed", **cfg))[0]
                + plain).norm() < 1e-4 * plain.norm()


# ===== drpo.py: 3. The generator

# what the pipeline of diffusers is asked for: scheduler, its settings, t of the one step
SCHEDULES = {
    "euler": ("EulerDiscreteScheduler", dict(timestep_spacing="trailing"), 999),
    "euler-linspace": ("EulerDiscreteScheduler", dict(timestep_spacing="linspace"), 0),
    "euler-leading": ("EulerDiscreteScheduler", dict(timestep_spacing="leading", steps_offset=1),
                      1),
    "ancestral": ("EulerAncestralDiscreteScheduler", dict(timestep_spacing="trailing"), 999),
    "ancestral-linspace": ("EulerAncestralDiscreteScheduler", dict(timestep_spacing="linspace"), 0),
    "lcm-249": ("LCMScheduler", dict(), 249),  # NitroSD Realism
    "lcm-399": ("LCMScheduler", dict(), 399),  # DMD2, Diff-Instruct*
    "lcm-499": ("LCMScheduler", dict(), 499),  # NitroSD Vibrant
    "lcm-800": ("LCMScheduler", dict(), 800),  # Hyper-SD
    "lcm-999": ("LCMScheduler", dict(), 999),  # SwiftBrush
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


class TestTheGenerator:
    """Sampling against diffusers, LoRA files against peft and by hand, bases read whole."""

    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
    def test_one_step_of_other_schedulers(self, name, prediction, models, capsys):
        """One formula for all: the timestep, abar and the kind of prediction; against the pipelines
        in one step."""
        import diffusers
        cls, settings, t = SCHEDULES[name]
        if "Ancestral" in cls and prediction == "sample":
            pytest.skip("diffusers' own scheduler has no sample prediction")
        pipe = diffusers.DiffusionPipeline.from_pretrained(models / "sd")
        kept = {k: v for k, v in pipe.scheduler.config.items() if k.startswith("beta") or k
                == "num_train_timesteps"}
        pipe.scheduler = getattr(diffusers, cls)(**kept, prediction_type=prediction, **settings)
        e, prompts = some_noise(), PROMPTS
        kw = dict(timesteps=[t]) if cls == "LCMScheduler" else dict(num_inference_steps=1)
        pipe.set_progress_bar_config(disable=True)
        want = pipe(prompt=prompts, latents=e.clone(), guidance_scale=0.0, height=32, width=32,
                    output_type="latent", generator=torch.Generator().manual_seed(0), **kw).images
        capsys.readouterr()
        G = drpo.Generator(pipe, timestep=t)
        x = sample_of(G, e)
        # it ends at abar_0 instead of 1: sqrt(abar_0) x + sqrt(1 - abar_0) eps, by hand
        if name == "tcd":
            eps = (e - math.sqrt(G.abar) * x) / math.sqrt(1 - G.abar)
            last = float(pipe.scheduler.alphas_cumprod[0])
            x = math.sqrt(last) * x + math.sqrt(1 - last) * eps
        assert_close(x, want.double().numpy(), 5e-5)
        # a schedule that would start elsewhere does not decide in silence
        capsys.readouterr()
        drpo.Generator(pipe)
        said = capsys.readouterr().err
        pipe.scheduler.set_timesteps(1)
        assert (cls in said
                and "t = 999" in said) == (int(pipe.scheduler.timesteps[0]) != 999), said

    def test_timestep_and_prediction_outside_are_refused(self, models):
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(models / "sd")
        with pytest.raises(UserError, match="--timestep is 1000.*0 to 999"):
            drpo.Generator(pipe, timestep=1000)
        with pytest.raises(UserError, match="epsilonn.*epsilon"):
            drpo.Generator(pipe, prediction="epsilonn")

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_unet_from_a_file(self, kind, models, tmp_path):
        """DMD2, Hyper-SD and SDXL-Lightning are UNets for a base: both formats, sampled as their
        cards say."""
        import diffusers
        from safetensors.torch import save_file
        torch.manual_seed(5)
        base = diffusers.DiffusionPipeline.from_pretrained(models / kind)
        for p in base.unet.parameters():
            p.data += 0.02 * torch.randn(p.shape)
        file = tmp_path / ("unet.safetensors" if kind == "sdxl" else "unet.bin")
        state = {k: v.contiguous() for k, v in base.unet.state_dict().items()}
        save_file(state, file) if kind == "sdxl" else torch.save(state, file)
        kept = {k: v for k, v in base.scheduler.config.items() if k.startswith("beta")}
        base.scheduler = diffusers.LCMScheduler(**kept)
        base.set_progress_bar_config(disable=True)
        e = some_noise()
        want = base(prompt=PROMPTS, latents=e.clone(), timesteps=[399], guidance_scale=0.0,
                    height=32, width=32, output_type="latent").images
        G = drpo.load_generator(str(models / kind), unet=str(file), timestep=399)
        # k = 1 is LCM's; the tiny base's own Euler scheduler, trailing, begins at sigma
        G.noise_scale = 1.0
        assert_close(sample_of(G, e), want.double().numpy(), 5e-5)
        del state["conv_in.weight"]
        torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "other.bin")
        with pytest.raises(UserError, match="other.bin.*conv_in.weight"):
            drpo.load_generator(str(models / kind), unet=str(tmp_path / "other.bin"))
        with pytest.raises(UserError, match="owner/repo/file"):
            drpo.load_generator(str(models / kind), unet="nowhere.bin")

    def test_a_one_step_lora_fused_into_its_base(self, models, tmp_path):
        """As Hyper-SD's one-step LoRA is used: fused by diffusers into a folder, which samples as
        its own scheduler does at 800; then both LoRAs stack as adapters on the base."""
        import diffusers
        import peft
        pipe = diffusers.DiffusionPipeline.from_pretrained(models / "sd")
        pipe.set_progress_bar_config(disable=True)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        torch.manual_seed(0)
        for name, p in pipe.unet.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.05)
        layers = peft.get_peft_model_state_dict(pipe.unet)
        pipe.save_lora_weights(tmp_path / "hyper", unet_lora_layers=layers)

        base = diffusers.DiffusionPipeline.from_pretrained(models / "sd")
        base.load_lora_weights(tmp_path / "hyper", adapter_name="hyper")
        base.fuse_lora()
        base.unload_lora_weights()
        base.save_pretrained(tmp_path / "fused")
        e = some_noise()
        G = drpo.load_generator(str(tmp_path / "fused"), timestep=800)
        G.noise_scale = 1.0  # LCM's; the tiny base's own Euler scheduler, trailing, begins at sigma
        settings = {k: v for k, v in pipe.scheduler.config.items() if k.startswith("beta")}
        how = dict(prompt=PROMPTS, timesteps=[800], guidance_scale=0.0, height=32, width=32,
                   output_type="latent")
        pipe.scheduler = diffusers.LCMScheduler(**settings)
        assert_close(sample_of(G, e), pipe(latents=e.clone(), **how).images.double().numpy(), 5e-5)

        G.add_lora(2, 2.0)
        for layer in G.lora.values():
            torch.nn.init.normal_(layer.up, std=0.05)
        G.save_lora(tmp_path / "tuned")
        both = diffusers.DiffusionPipeline.from_pretrained(models / "sd")
        both.set_progress_bar_config(disable=True)
        both.scheduler = diffusers.LCMScheduler(**settings)
        both.load_lora_weights(tmp_path / "hyper", adapter_name="hyper")
        both.load_lora_weights(tmp_path / "tuned", adapter_name="tuned")
        both.set_adapters(["hyper", "tuned"])
        want = both(latents=e.clone(), **how).images.double().numpy()
        assert_close(sample_of(G, e), want, 5e-5)

    def test_lightning_predicts_the_sample(self, models):
        """--prediction sample with a `leading` base is EulerDiscreteScheduler(trailing,
        prediction_type="sample") up to Euler's scale of the noise."""
        import diffusers
        pipe = diffusers.DiffusionPipeline.from_pretrained(models / "sdxl")
        e = some_noise()
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config,
                                                                      prediction_type="sample",
                                                                      timestep_spacing="trailing")
        want = pipeline_sample(pipe, e)
        G = drpo.Generator(pipe)
        assert_close(sample_of(G, e), want.double().numpy(), 5e-5)
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config,
                                                                      prediction_type="epsilon",
                                                                      timestep_spacing="leading")
        mine = sample_of(drpo.Generator(pipe, prediction="sample"), e)
        assert (mine - want).norm() < 0.02 * want.norm()

    @pytest.mark.parametrize("what", BROKEN)
    def test_a_base_is_read_whole_or_refused(self, what, models, tmp_path):
        from safetensors.torch import load_file, save_file
        kind, words = BROKEN[what]
        folder = tmp_path / "model"
        shutil.copytree(models / "sdxl", folder)

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
            edit("text_encoder", "model.safetensors",
                 lambda s: s.update({f"x.{k}": s.pop(k) for k in list(s)}))
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
            pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
            (folder / "vae" / unet).write_text(pointer)
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
            (folder / "model_index.json").write_text(json.dumps({**index,
                                                                 "text_encoder": [None, None]}))
        with pytest.raises(UserError) as caught:
            drpo.load_generator(str(folder))
        assert words in str(caught.value)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_folder_with_fp16_files_alone_loads(self, models, tmp_path):
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(models / "sd", torch_dtype=torch.float16)
        pipe.save_pretrained(tmp_path / "half", variant="fp16")
        assert not (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors").exists()
        e = some_noise()
        want = sample_of(open_model(models / "sd"), e)
        assert (sample_of(open_model(tmp_path / "half"), e) - want).norm() < 0.01 * want.norm()

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_lora_off_is_the_base_and_fresh_changes_nothing(self, kind, models):
        G, e = open_model(models / kind), some_noise()
        base = sample_of(G, e)
        params = G.add_lora(4, 8.0)
        assert torch.equal(sample_of(G, e), base), "fresh LoRA"
        wrapped = [n for n, m in G.unet.named_modules() if isinstance(m, drpo.LoRA)]
        linear = [n for n, m in G.pipe.unet.named_modules()
                  if re.search(r"attn\d\.(to_[qkv]|to_out\.0)$", n)]
        assert sorted(wrapped) == sorted(linear)
        assert len(params) == 2 * len(linear) > 0
        assert all(p.requires_grad and p.dtype == torch.float32 for p in params)
        trainable = [p for p in G.unet.parameters() if p.requires_grad]
        assert {id(p) for p in trainable} == {id(p) for p in params}, "nothing else trains"
        for module in G.lora.values():
            torch.nn.init.normal_(module.up, std=0.3)
        tuned = sample_of(G, e)
        assert (tuned - base).abs().max() > 1e-2
        with G.reference():
            assert torch.equal(sample_of(G, e), base), "LoRA off"
            with G.reference():
                pass
            assert torch.equal(sample_of(G, e), base), "still off after a nested use"
        assert torch.equal(sample_of(G, e), tuned), "on again"
        with contextlib.suppress(ZeroDivisionError), G.reference():
            1 / 0
        assert torch.equal(sample_of(G, e), tuned), "on again after an error"

    def test_lora_is_the_formula(self, models):
        """y = W x + b + alpha / r B A x, by hand."""
        G = open_model(models / "sd")
        random_lora(G, rank=4, alpha=10.0)
        for module in G.lora.values():
            x = torch.randn(3, module.down.shape[1])
            bias = 0 if module.base.bias is None else module.base.bias.double()
            W, A, B, x_T = (t.double() for t in (module.base.weight, module.down, module.up, x.T))
            want = (W @ x_T).T + bias + 10 / 4 * (B @ (A @ x_T)).T
            with torch.no_grad():
                assert_close(module(x), want.detach().numpy())

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_load_lora_brings_back_what_save_lora_wrote(self, kind, models, tmp_path):
        G, e = open_model(models / kind), some_noise()
        random_lora(G, rank=4, alpha=6.0)
        tuned = sample_of(G, e)
        G.save_lora(tmp_path, timestep="399")
        other = open_model(models / kind)
        for path in (tmp_path, tmp_path / drpo.LORA_FILE):
            metadata = other.load_lora(path)
            assert metadata["timestep"] == "399"
            assert_close(sample_of(other, e), tuned.double().numpy())

    def test_loras_of_others_are_refused(self, models, tmp_path):
        """Written by diffusers with peft; kohya's layout; one key more, less, or of another
        base."""
        from diffusers import StableDiffusionPipeline
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import load_file, save_file
        G = open_model(models / "sd")
        random_lora(G)
        G.save_lora(tmp_path)
        unet = StableDiffusionPipeline.from_pretrained(models / "sd").unet
        unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(drpo.LORA_TARGETS)))
        StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs",
                                                  get_peft_model_state_dict(unet))
        with pytest.raises(UserError, match="fuse it"):
            G.load_lora(tmp_path / "theirs")
        with pytest.raises(UserError, match="fuse it"):
            G.load_lora(tmp_path / "kohya_lora.safetensors")
        with pytest.raises(UserError, match="made for sd, not for .*sdxl"):
            open_model(models / "sdxl").load_lora(tmp_path)
        state, metadata = load_file(tmp_path / drpo.LORA_FILE), drpo.read_lora(tmp_path)[1]
        save_file({**state, "unet.extra.lora_A.weight": torch.zeros(1)},
                  tmp_path / "more.safetensors", metadata)
        with pytest.raises(UserError, match="made for sd, not for"):
            G.load_lora(tmp_path / "more.safetensors")
        state.pop(min(state))
        save_file(state, tmp_path / "less.safetensors", metadata)
        with pytest.raises(UserError, match="made for sd, not for"):
            G.load_lora(tmp_path / "less.safetensors")

    @pytest.mark.parametrize("part", ("unet", "vae", "text_encoder"))
    def test_a_folder_of_mixed_variants_loads(self, part, models, tmp_path):
        shutil.copytree(models / "sd", tmp_path / "mixed")
        file, = (tmp_path / "mixed" / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
        e = some_noise()
        assert torch.equal(sample_of(open_model(tmp_path / "mixed"), e),
                           sample_of(open_model(models / "sd"), e))

    def test_a_replaced_unet_needs_no_weights_of_its_own(self, models, tmp_path):
        """The UNet's file of a base is not read where --unet replaces it: it need not be there."""
        shutil.copytree(models / "sd", tmp_path / "base")
        weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(tmp_path / "unet.safetensors")
        G = drpo.load_generator(str(tmp_path / "base"), unet=str(tmp_path / "unet.safetensors"))
        e = some_noise()
        assert torch.equal(sample_of(G, e), sample_of(open_model(models / "sd"), e))

    def test_a_tokenizer_without_a_maximum_takes_the_encoder_s(self, models, tmp_path):
        shutil.copytree(models / "sd", tmp_path / "base")
        file = tmp_path / "base" / "tokenizer" / "tokenizer_config.json"
        config = json.loads(file.read_text())
        del config["model_max_length"]
        file.write_text(json.dumps(config))
        long = ["word " * 100]
        assert torch.equal(open_model(tmp_path / "base").encode(long)["text"],
                           open_model(models / "sd").encode(long)["text"])

    def test_other_kinds_of_models_are_refused_by_name(self, models, tmp_path):
        for name, change, words in (
                ("sdxs", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderKL"),
                ("instaflow", {}, "rectified flow"),
                ("dit", {"unet": ["diffusers", "DiTTransformer2DModel"]}, "UNet2DConditionModel")):
            shutil.copytree(models / "sd", tmp_path / name)
            file = tmp_path / name / "model_index.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
            with pytest.raises(UserError, match=words):
                open_model(tmp_path / name)

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_kohya_file_has_what_its_readers_want(self, kind, models, tmp_path):
        """lora_down, lora_up and alpha of every layer; names that sd-scripts knows; A1111's
        metadata."""
        from safetensors import safe_open
        G = open_model(models / kind)
        random_lora(G, rank=4, alpha=6.0)
        G.unet.register_to_config(cross_attention_dim=1024)
        G.save_lora(tmp_path)
        with safe_open(tmp_path / "kohya_lora.safetensors", "pt") as f:
            meta, state = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
        layers = {k.split(".")[0] for k in state}
        assert len(layers) == len(G.lora)
        assert len(state) == 3 * len(layers)
        blocks = r"down_blocks_0_attentions_0|mid_block_attentions_0|up_blocks_1_attentions_\d"
        if kind == "sdxl":
            blocks = "input_blocks_4_1|input_blocks_5_1|middle_block_1|output_blocks_[0-2]_1"
        assert all(re.fullmatch(rf"lora_unet_({blocks})_\w+_attn[12]_to_(q|k|v|out_0)", m)
                   for m in layers), layers
        for m in layers:
            assert float(state[m + ".alpha"]) == 6.0
            assert state[m + ".lora_down.weight"].shape[0] == 4 == state[m
                + ".lora_up.weight"].shape[1]
        assert meta["ss_network_dim"] == "4"
        assert meta["ss_network_alpha"] == "6.0"
        assert meta["ss_network_module"] == "networks.lora"
        assert meta.get("ss_v2") == ("True" if kind == "sd" else None)
        assert meta.get("ss_base_model_version") == ("sdxl_base_v1-0" if kind == "sdxl" else None)

    def test_sdxl_names_of_sd_scripts(self):
        """Every one of SDXL's 560 attention layers has one name and no other layer's, both ways;
        three of them by hand."""
        import diffusers
        with torch.device("meta"):
            arch = bench.ARCHITECTURES["sdxl-turbo"]["unet"]
            unet = diffusers.UNet2DConditionModel(**bench.UNET, **arch)
        names = [name for name, _ in unet.named_modules() if name.endswith(drpo.LORA_TARGETS)]
        kohya = [drpo.kohya_name(name, True) for name in names]
        assert len(names) == 560 == len(set(kohya))
        # the blocks of the first release: conv_in, 2 ResNets and a downsampler, twice 2 with
        # attention and a downsampler
        counts = {}
        for name in kohya:
            place = r"(input_blocks_\d+|middle_block|output_blocks_\d+)"
            block = re.match(rf"lora_unet_{place}_1_transformer_blocks_\d+", name)[1]
            counts[block] = counts.get(block, 0) + 1
        assert counts == {**{f"input_blocks_{n}": 16 for n in (4, 5)},
                          **{f"input_blocks_{n}": 80 for n in (7, 8)},
                          "middle_block": 80, **{f"output_blocks_{n}": 80 for n in (0, 1, 2)},
                          **{f"output_blocks_{n}": 16 for n in (3, 4, 5)}}
        for name, want in (("down_blocks.1.attentions.0", "input_blocks_4_1"),
                           ("mid_block.attentions.0", "middle_block_1"),
                           ("up_blocks.1.attentions.2", "output_blocks_5_1")):
            rest = "transformer_blocks.0.attn1.to_out.0"
            assert drpo.kohya_name(f"{name}.{rest}",
                                   True) == f"lora_unet_{want}_{rest.replace('.', '_')}"

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_merging_recipe_of_the_readme(self, kind, models, home):
        """README's lines fold the LoRA into a pipeline whose UNet is one file and that draws what
        base and LoRA draw."""
        from diffusers import DiffusionPipeline
        run = RunProcess(command(models, kind=kind, lr=0.05, lora_alpha=5, steps=2), home)
        assert run.wait() == 0, run.err
        pattern = r"```python\n(from diffusers import DiffusionPipeline\n.*?fuse_lora.*?)```"
        recipe = re.search(pattern, (HERE / "README.md").read_text(), re.S)[1]
        recipe = re.sub(r'"stabilityai/sd-turbo"', repr(str(models / kind)), recipe)
        recipe = re.sub(r"runs/sd-merged", "merged", recipe).replace("runs/sd", "run")
        with contextlib.chdir(home):
            exec(recipe, {})
        assert [f.name for f in (home / "merged" / "unet").glob("*.safetensors")] == [
            "diffusion_pytorch_model.safetensors"]
        e, base = some_noise(), DiffusionPipeline.from_pretrained(models / kind)
        plain = pipeline_sample(base, e)
        base.load_lora_weights(home / "run")
        want = pipeline_sample(base, e)
        assert (want - plain).abs().max() > 1e-2
        assert_close(sample_of(open_model(home / "merged"), e), want.double().numpy(), 3e-5)

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_half_precision(self, kind, dtype, models, capfd):
        """The same weights in half precision: sigma multiplies no rounding error of the last
        layers."""
        from diffusers import DiffusionPipeline
        e = some_noise(8)
        prompts = PROMPTS * 4
        want = sample_of(open_model(models / kind), e, prompts)
        G = open_model(models / kind, dtype)
        capfd_text = capfd.readouterr().err
        got = sample_of(G, e, prompts)
        assert got.dtype == torch.float32
        error = (got - want).square().mean().sqrt()
        pipe = DiffusionPipeline.from_pretrained(models / kind, torch_dtype=dtype)
        plain = (pipeline_sample(pipe, e.to(dtype),
                                 prompts=prompts).float() - want).square().mean().sqrt()
        assert error < plain, "no better than the pipeline in half precision"
        assert error < (0.15 if dtype == torch.bfloat16 else 0.02) * want.std()
        with torch.no_grad():
            images = G.decode(got)
        assert images.dtype == torch.float32
        assert images.isfinite().all()
        lifted = dtype == torch.float16 and kind == "sdxl"
        if kind == "sdxl":
            assert (next(G.vae.parameters()).dtype == torch.float32) == lifted
            assert ("VAE" in capfd_text and len(capfd_text.strip().splitlines())
                    == 1) == lifted, "one line says so"
        random_lora(G)
        assert (sample_of(G, e, prompts) - got).abs().max() > 1e-2
        with G.reference():
            assert torch.equal(sample_of(G, e, prompts), got)

    @pytest.mark.slow
    def test_compiled_network_gives_the_same_gradient(self, models):
        """Of the generator and of the `unet` features behind it, which leave the UNet half way."""
        e, gradients = some_noise(), []
        for compiled in (False, True):
            G = open_model(models / "sd")
            if compiled:
                drpo.compile_networks(G)
            params, c = random_lora(G, size=0.1), G.encode(PROMPTS)
            x = G.sample(e, c)
            maps = drpo.load_features("unet", G)(x, c)
            grads = torch.autograd.grad((x * e.flip(0)).sum()
                                        + sum(z.square().mean() for z in maps), params)
            gradients.append(torch.cat([g.flatten() for g in grads]))
        want, got = gradients
        assert want.norm() > 0
        assert (got - want).norm() < 1e-4 * want.norm()

    def test_channels_last_group_norm_in_half_precision(self):
        """As near to float64 as torch's own GroupNorm, also where the mean is far larger than the
        deviation."""
        torch.manual_seed(0)
        norm = torch.nn.GroupNorm(4, 32).requires_grad_(False)
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        x = (torch.randn(2, 32, 24, 24) + 8 * torch.randn(1, 32, 1, 1)).bfloat16()
        groups = x.double().reshape(2, 4, -1)
        exact = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0,
            keepdim=True) + norm.eps).sqrt()
        exact = exact.reshape(x.shape) * norm.bfloat16().weight.double()[:, None,
            None] + norm.bias.double()[:, None, None]
        plain = float((norm(x) - exact).norm() / exact.norm())
        norm.__class__ = drpo.ChannelsLastGroupNorm
        assert float((torch.compile(norm)(x) - exact).norm() / exact.norm()) < 1.05 * plain < 0.01
        assert float((norm(x) - exact).norm() / exact.norm()) < 2 * plain


# ===== drpo.py: 4. One update

def write_pictures(folder, n=6):
    """n pictures of 32 x 32 -> their names."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(n):
        names.append(f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / names[-1])
    return names


class TestOneUpdate:
    """What is added to .grad, and the figures beside it."""

    def test_out_of_memory_halves_the_micro_batch(self, tuned, capsys, monkeypatch):
        """The step begins again and computes the same."""
        G, params = tuned
        cfg, phi = small_config(anchors=2), drpo.load_features("vae", G)
        noise = torch.stack([drpo.prompt_noise(3, i, (6, 4, 8, 8)) for i in range(2)])
        batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), noise)
        want = update_gradient(G, params, "vae", 12, cfg)[0]
        gradient, seen = drpo.drpo_gradient, []

        def small_memory(G, phi, reward, batch, cfg, micro):
            seen.append(micro)
            reward.seen.clear()
            if micro > 4:
                gradient(G, phi, reward, batch, cfg,
                         1)  # what a failed attempt leaves behind must not count
                raise torch.OutOfMemoryError
            return gradient(G, phi, reward, batch, cfg, micro)

        monkeypatch.setattr(drpo, "drpo_gradient", small_memory)
        for p in params:
            p.grad = None
        _, micro = drpo.gradient_that_fits(G, phi, TableScore(TABLE), batch, cfg, 12)
        assert seen == [12, 6, 3]
        assert micro == 3
        got = torch.cat([p.grad.flatten() for p in params])
        assert (got - want).norm() < 2e-4 * want.norm()
        err = capsys.readouterr().err
        assert err.count("out of GPU memory") == 2
        assert "--micro-batch 6" in err
        assert "--micro-batch 3" in err
        monkeypatch.setattr(drpo, "drpo_gradient", lambda *a: (_
            for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(UserError, match="--micro-batch 1"):
            drpo.gradient_that_fits(G, phi, TableScore(TABLE), batch, cfg, 4)

    def test_a_vae_that_gives_nan_ends_with_a_line(self, tuned, monkeypatch):
        G, params = tuned
        broken = lambda x: types.SimpleNamespace(sample=torch.full((len(x), 3, 32, 32), math.inf))
        monkeypatch.setattr(G.vae, "decode", broken)
        with pytest.raises(UserError, match="not finite.*--dtype"):
            update_gradient(G, params, "vae", 12)

    def test_skipped_and_unsure_prompts(self, tuned):
        """All equal or all NaN: the reference drift alone, counted; a NaN is no anchor but is still
        moved."""
        G, params = tuned
        for field in ("dipole", "released"):
            cfg = small_config(anchors=2, field=field)
            equal, m, _ = update_gradient(G, params, "vae", 12, cfg, table=[[1.0] * 6, [5.0] * 6])
            assert m["skipped"] == 1
            silent, m, _ = update_gradient(G, params, "vae", 12, cfg, table=[[math.nan] * 6] * 2)
            assert m["skipped"] == 1
            assert torch.equal(equal, silent)
            drift_only = small_config(anchors=2, field=field, lambda_ref=0.0)
            assert update_gradient(G, params, "vae", 12, drift_only,
                                   table=[[1.0] * 6] * 2)[0].abs().max() == 0
            one, m, _ = update_gradient(G, params, "vae", 12, cfg, table=[TABLE[0], [5.0] * 6])
            assert m["skipped"] == 0.5
            assert not torch.equal(one, equal)
        # NaN at the places in the middle of the order: the same anchors, the same update
        want = update_gradient(G, params, "vae", 12)[0]
        table = [[v if v in sorted(row)[:2] + sorted(row)[-2:] else math.nan for v in row]
                 for row in TABLE]
        got, m, _ = update_gradient(G, params, "vae", 12, table=table)
        assert torch.equal(got, want)
        assert m["skipped"] == 0
        assert m["reward_best"] == pytest.approx((0.9 + 6) / 2)
        assert m["reward_worst"] == pytest.approx((0.1 + 1) / 2)

    def test_parts_and_watched_rewards_are_logged(self, tuned):
        """Of several parts each one's mean; a lone part is the score itself, and has no line of its
        own."""
        G, _ = tuned

        def red(images, prompts):
            return [float(np.asarray(image)[..., 0].mean()) for image in images]

        def blue(images, prompts):
            return [float(np.asarray(image)[..., 2].mean()) for image in images]

        x = torch.cat([some_noise(6, seed) for seed in (0, 1)])
        noise = torch.zeros(2, 6, 4, 8, 8)
        batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), noise, watch=True)
        both = rewards.Reward("both", {"red": red, "blue": blue}, {"red": 1.0, "blue": 1.0})
        alone = rewards.Reward("red", {"red": red}, {"red": 1.0}, {"blue": blue})
        assert set(drpo.score_candidates(G, both, batch, x)[1]) == {"red", "blue"}
        scores, logged = drpo.score_candidates(G, alone, batch, x)
        assert set(logged) == {"watch/blue"}
        pictures = rewards.to_pil(G.decode(x))
        np.testing.assert_allclose(scores.flatten(), red(pictures, None))
        np.testing.assert_allclose(logged["watch/blue"].flatten(), blue(pictures, None))

    def test_no_gradient_reaches_reference_reward_or_networks(self, tuned):
        G, params = tuned
        _, _, score = update_gradient(G, params, "vae,unet", 4)
        # a prompt at a time: 6 images without gradient, then chunks with it
        assert len(score.seen) == 2
        trainable = {id(p) for p in params}
        for net in (G.unet, G.vae, G.pipe.text_encoder):
            for p in net.parameters():
                assert id(p) in trainable or (p.grad is None and not p.requires_grad)
        assert all(p.grad is not None for p in params)

    def test_metrics_of_the_pictures(self, tuned):
        """distance and diversity in latents, by loops."""
        G, params = tuned
        _, m, _ = update_gradient(G, params, "vae", 5)
        pairwise, xs = {}, {}
        for name, context in (("tuned", contextlib.nullcontext()), ("base", G.reference())):
            with context, torch.no_grad():
                xs[name] = [
                    G.sample(drpo.prompt_noise(3, i, (6, 4, 8, 8)),
                             G.encode([p] * 6)).flatten(1).double().numpy()
                    for i, p in enumerate(PROMPTS)
                ]
            pairwise[name] = np.mean(
                [np.mean([np.linalg.norm(x[a] - x[b]) for a in range(6) for b in range(6)
                          if a != b]) for x in xs[name]])
        rms = np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(xs["tuned"],
            xs["base"])])  # mean over prompts
        assert m["distance"] == pytest.approx(rms, rel=1e-4)
        assert m["diversity"] == pytest.approx(pairwise["tuned"] / pairwise["base"], rel=1e-4)
        assert m["diversity"] != pytest.approx(1, abs=1e-4), "nothing measured"

    def test_noise_of_a_prompt(self):
        """Gaussian, its own for each seed and position, the same whoever asks and whatever the
        RNG."""
        torch.manual_seed(3)
        a = drpo.prompt_noise(0, 5, (16, 4, 8, 8))
        torch.manual_seed(4)
        assert torch.equal(a, drpo.prompt_noise(0, 5, (16, 4, 8, 8)))
        others = [drpo.prompt_noise(s, p, (16, 4, 8, 8)) for s,
                  p in ((0, 6), (1, 5), (0, -1), (1, 6))]
        for b in others:
            assert abs(float((a * b).mean())) < 0.08
        assert abs(float(a.mean())) < 0.08
        assert abs(float(a.std()) - 1) < 0.05

    def test_offline_pairs_are_anchors(self, tuned, tmp_path):
        """Anchors from files, of different numbers: features of the VAE-encoded pictures, by
        diffusers' image processor."""
        from diffusers.image_processor import VaeImageProcessor
        G, params = tuned
        n = write_pictures(tmp_path)
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
                    want = phi(G.vae.encode(pixels).latent_dist.mean * G.vae.config.scaling_factor,
                               None)
                for k, w in enumerate(want):
                    assert_close(maps[s][k], w.double().numpy(), 1e-4)
        whole, m, _ = update_gradient(G, params, "vae", 12, pairs=anchors)
        part, _, _ = update_gradient(G, params, "vae", 5, pairs=anchors)
        assert whole.norm() > 0
        assert (part - whole).norm() < 2e-4 * whole.norm()
        assert "reward_mean" not in m
        plain, _, _ = update_gradient(G, params, "vae", 12, small_config(anchors=2, lambda_ref=0.0),
                                      pairs=anchors)
        exchanged = [maps[::-1] for maps in anchors]
        swapped, _, _ = update_gradient(G, params, "vae", 12,
                                        small_config(anchors=2, lambda_ref=0.0), pairs=exchanged)
        assert (swapped
                + plain).norm() < 1e-4 * plain.norm(), "exchanged: the other way"

    def test_half_precision_gradient(self, models):
        """bf16 and fp16 point where float32 points; LoRA and its gradient stay float32; fp16 is
        scaled."""
        gradients = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            G = open_model(models / "sd", dtype)
            params = random_lora(G, size=0.1)
            gradients[dtype], m, _ = update_gradient(G, params, "vae", 12)
            assert gradients[dtype].dtype == torch.float32
            assert gradients[dtype].isfinite().all()
            assert math.isfinite(m["loss"])
        want = gradients.pop(torch.float32)
        for dtype, got in gradients.items():
            cosine = float(torch.cosine_similarity(got, want, dim=0))
            assert cosine > (0.8 if dtype == torch.bfloat16 else 0.97), f"{dtype}: {cosine}"
            assert 0.7 < float(got.norm() / want.norm()) < 1.4


# ===== drpo.py: 5. A run

def assert_one_line(err, *words):
    """Exactly one line on stderr, which starts with `error:` and has these words."""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error:"), err
    for word in words:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"


class TestARun:
    """Each in a process of its own, forked from a server that has imported everything and run
    nothing."""

    def test_a_run_and_its_files(self, models, home):
        """What a run leaves behind; the LoRA in its folder is the one in its checkpoint; all of it
        moved from the start."""
        from safetensors import safe_open
        run = RunProcess(command(models, preview_every=2, watch="jpeg", lora_alpha=3), home)
        assert run.wait() == 0, run.err
        folder = home / "run"
        assert "2 of 5 prompts x 4 pictures a step" in run.out
        assert "step 4/4" in run.out
        assert "left" in run.out
        config = json.loads((folder / "config.json").read_text())
        assert config["steps"] == 4
        assert config["lora_alpha"] == 3
        assert config["versions"]["torch"] == torch.__version__
        metrics = metrics_of(folder)
        assert [m["step"] for m in metrics] == [1, 2, 3, 4]
        for m in metrics:
            assert m["applied"]
            assert m["loss"] > 0
            assert m["grad_norm"] > 0
            assert m["skipped"] == 0
            assert m["reward_worst"] < m["reward_mean"] < m["reward_best"]
            assert m["reward_std"] > 0
            assert m["gap"] > 0
            assert len(m["rms_pref"]) == len(m["rms_ref"]) == 3
            assert min(m["rms_pref"]) > 0
        assert "watch/jpeg" in metrics[0]
        assert "watch/jpeg" not in metrics[1]
        assert metrics[0]["distance"] == 0 < metrics[3]["distance"]
        full = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        assert full["seconds"] > 0
        shots = sorted(p.name for p in (folder / "samples").iterdir())
        assert shots == ["step-000001.png", "step-000002.png", "step-000004.png"]
        for p in (folder / "samples").iterdir():
            with Image.open(p) as image:
                image.load()
        state = state_of(folder)
        assert state["step"] == 4
        assert state["position"] == 8
        G = open_model(models / "sd")
        G.load_lora(folder)
        for p, w in zip(G.parameters(), state["weights"], strict=True):
            if p.shape[0] == 2:  # down; up carries alpha / rank in the file
                torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-8)
            assert w.abs().max() > 0
        for file in (drpo.LORA_FILE, "kohya_lora.safetensors"):
            with safe_open(folder / file, "pt") as f:
                meta = f.metadata()
            assert meta["drpo_base"] == "sd", "nobody's home folder is published"
        assert not list(folder.glob("*.tmp"))

    def test_first_step_is_adamw_by_hand(self, models, home):
        """After one step every weight has moved by lr, against its clipped gradient: sign-like, as
        Adam's first step is."""
        run = RunProcess(command(models, steps=1, lr=1e-3, weight_decay=0), home)
        assert run.wait() == 0, run.err
        G = open_model(models / "sd")
        torch.manual_seed(0)
        start = [p.detach().clone() for p in G.add_lora(2, 16.0)]
        moved = 0
        for before, after in zip(start, weights_of(home / "run"), strict=True):
            step = (after - before).abs()
            assert step.max() <= 1.001e-3
            moved += int((step > 0.9e-3).sum())
        assert moved > 100  # B; A has no gradient while B is 0

    def test_the_average_of_the_lora_is_kept(self, models, home):
        """Against the weights of every step: a plain mean at first, then exponential; training
        itself does not see it, and --resume goes on with it."""
        every = []
        for steps in (1, 2, 3, 4):
            assert RunProcess(command(models, f"to{steps}", steps=steps, average=0.5),
                              home).wait() == 0
            every.append(weights_of(home / f"to{steps}"))
        mean = [w.double() for w in every[0]]
        for n, weights in enumerate(every[1:], 2):
            rate = max(0.5, 1 / n)
            mean = [(1 - rate) * m + rate * w.double() for m, w in zip(mean, weights)]
        assert RunProcess(["--resume", "to2", "--steps", "4"], home).wait() == 0
        for name in ("to4", "to2"):
            G = open_model(models / "sd")
            G.load_lora(home / name)
            for layer, (down, up) in zip(G.lora.values(), zip(mean[::2], mean[1::2])):
                want = layer.up.detach() @ layer.down.detach() * layer.alpha / layer.rank
                scale = drpo.read_config(home / name)["lora_alpha"] / layer.rank
                assert_close(want, (scale * up @ down).numpy(), 1e-5)

    def test_resume_further_and_changed_settings(self, models, home):
        """A setting given beside --resume replaces the run's."""
        assert RunProcess(command(models, steps=2), home).wait() == 0
        with open(home / "own.py", "a") as f:
            f.write("# changed\n")
        with open(home / "prompts.txt", "a") as f:
            f.write("one more\n")
        run = RunProcess(["--resume", "run", "--lr", "0.5", "--steps", "3"], home)
        assert run.wait() == 0, run.err
        metrics = metrics_of(home / "run")
        assert [m["step"] for m in metrics] == [1, 2, 3]
        assert [m["lr"] for m in metrics] == [0.001, 0.001, 0.5]
        run = RunProcess(["--resume", "run", "--steps", "4"], home)
        assert run.wait() == 0
        assert metrics_of(home / "run")[3]["lr"] == 0.5, "the change stays"
        run = RunProcess(["--resume", "run", "--lora-rank", "3"], home)
        assert run.wait() == 2
        assert_one_line(run.err, "--lora-rank")
        run = RunProcess(["--resume", "run", "--out", "other"], home)
        assert run.wait() == 2
        assert not (home / "other").exists()
        assert_one_line(run.err, "--out", "--resume")

    @pytest.mark.slow
    def test_kill_9_at_random_moments(self, models, home):
        """8 kills, some during a save: always loadable, at most --save-every steps lost, no step
        twice or missing."""
        folder, rng, reached = home / "run", random.Random(1), 0
        argv = command(models, steps=10_000, save_every=1, log_every=100_000, batch=1, lora_rank=8)
        run = RunProcess(argv, home)
        for rounds in range(8):
            run.until(folder / "metrics.jsonl", reached + rng.randrange(1, 3))
            time.sleep(rng.random() * 0.15)  # some fraction of a step more, or a save
            run.kill(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
            lines = (folder / "metrics.jsonl").read_bytes().count(b"\n")
            step = state_of(folder)["step"]
            assert lines - 1 <= step <= lines, f"{lines} steps done, {step} saved, {reached} before"
            assert step >= reached, f"{lines} steps done, {step} saved, {reached} before"
            reached = step
            further = ["--steps", str(step + 1)] if rounds == 7 else []
            run = RunProcess(["--resume", "run", *further], home)
        assert run.wait() == 0, run.err
        assert [m["step"] for m in metrics_of(folder)] == list(range(1, reached + 2))
        assert reached >= 4
        known = {"checkpoint.pt", "config.json", "metrics.jsonl", drpo.LORA_FILE,
                 "kohya_lora.safetensors"}
        assert not {p.name for p in folder.iterdir() if not p.name.endswith(".tmp")} - known

    @pytest.mark.parametrize("number,code", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
    def test_signals_finish_the_step_and_save(self, number, code, models, home):
        run = RunProcess(command(models, reward="own.py:slow", steps=10_000), home)
        run.until(home / "run" / "metrics.jsonl", 2)
        run.kill(number)
        assert run.wait() == code, run.err
        steps = [m["step"] for m in metrics_of(home / "run")]
        assert steps == list(range(1, len(steps) + 1))
        assert state_of(home / "run")["step"] == len(steps)
        first, last = run.err.strip().splitlines()
        assert first.startswith("stopping after this step")
        assert f"--resume {home / 'run'}" in last
        rest = RunProcess(["--resume", "run", "--steps", len(steps) + 1], home)
        assert rest.wait() == 0, rest.err
        assert (home / "run" / drpo.LORA_FILE).exists()

    def test_a_signal_after_a_step_is_recorded(self, models, home, monkeypatch):
        """Between a step's last line and the next step: that step is saved."""
        stop, plain = drpo.Stop(), drpo.Run.record

        def record(run, metrics):
            plain(run, metrics)
            stop.signal = signal.SIGTERM

        monkeypatch.setattr(drpo.Run, "record", record)
        monkeypatch.chdir(home)
        drpo.train(drpo.parse(command(models, reward="jpeg")), stop=stop)
        assert state_of("run")["step"] == 1

    @pytest.mark.parametrize("action,code", (("", 130), ("interrupts_ignored", -signal.SIGINT)))
    def test_a_second_signal_ends_at_once(self, action, code, models, home):
        """While a reward works: the first says a line at once, the second does not wait; the
        checkpoint is intact."""
        argv = command(models, reward="own.py:hangs", steps=9, save_every=1)
        run = RunProcess(argv, home, {"DP_ACTION": action})
        run.until(home / "run" / "metrics.jsonl", 2)
        time.sleep(0.5)
        begun = time.monotonic()
        run.kill(signal.SIGINT)
        while "stopping after this step" not in run.err:
            assert time.monotonic() - begun < 60
            time.sleep(0.05)
        run.kill(signal.SIGINT)
        assert run.wait() == code, run.err
        assert "Traceback" not in run.err
        assert state_of(home / "run")["step"] == 2

    def test_handlers_are_put_back_and_children_have_their_own(self, models, home):
        """After train() the caller's handlers are there again; a forked Pool ends when it is told
        to."""
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with contextlib.chdir(home):
            cfg = drpo.Config(model=str(models / "sd"), prompts="prompts.txt", steps=1, batch=1,
                              candidates=4, anchors=2, out="called", device="cpu", preview_every=0)
            path = drpo.train(cfg, reward=lambda images, prompts: [float(np.asarray(i).mean())
                                                                   for i in images])
        assert path == home / "called"
        assert (home / "called" / drpo.LORA_FILE).exists()
        assert drpo.read_config(home / "called")["reward"] == "callable:<lambda>"
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        for reward in ("pooled", "spawned"):
            run = RunProcess(command(models, reward, f"own.py:{reward}", steps=2, batch=1), home)
            assert run.wait(90) == 0, run.err

    @pytest.mark.parametrize("reward,words", (("raises3", "no camera"),
                                              ("short3", "1 scores for 8 images"), ("inf3", "inf"),
                                              ("text3", "good"), ("exits3", "SystemExit: 7")))
    def test_rewards_that_fail_at_step_3(self, reward, words, models, home):
        """One line with the reward, the step and the way on; two steps are saved, and --resume goes
        on from there."""
        run = RunProcess(command(models, reward=f"own.py:{reward}"), home)
        assert run.wait() == 2, run.err
        assert_one_line(run.err, f"own.py:{reward}", "step 3", words, "--resume ")
        assert [m["step"] for m in metrics_of(home / "run")] == [1, 2]
        assert state_of(home / "run")["step"] == 2
        if reward != "raises3":
            return
        run = RunProcess(["--resume", "run"], home)  # a new process: its counter begins anew
        plain = RunProcess(command(models, "plain"), home)
        assert run.wait() == 0, run.err
        assert plain.wait() == 0, run.err
        assert metrics_of(home / "run") == metrics_of(home / "plain"), "as if nothing had happened"

    def test_nan_scores_in_a_run(self, models, home):
        """No opinion on some: trained on the others. On all, or equal scores: reference drift, and
        the line says so. The log stays JSON."""
        runs = {"nan3": 6, "nan_some": 4, "same": 2}
        runs = {r: RunProcess(command(models, r, f"own.py:{r}", steps=n, batch=1), home) for r,
                n in runs.items()}
        assert all(r.wait() == 0 for r in runs.values()), [r.err for r in runs.values()]
        assert [m["skipped"] for m in metrics_of(home / "nan3")] == [0, 0, 1, 1, 1, 1]
        assert [m["skipped"] for m in metrics_of(home / "nan_some")] == [0, 0, 0, 0]
        assert all(torch.isfinite(w).all() for r in runs for w in weights_of(home / r))
        assert "no anchors for 100% of the prompts" in runs["nan3"].out
        assert "no anchors for 100% of the prompts" in runs["same"].out
        assert "no anchors" not in runs["nan_some"].out

    @pytest.mark.parametrize("kind,dtype", (("sd", "bf16"), ("sdxl", "bf16"), ("sdxl", "fp16"),
                                            ("sdxl", "fp32")))
    def test_runs_in_every_dtype(self, kind, dtype, models, home):
        run = RunProcess(command(models, kind=kind, dtype=dtype, steps=2, features="vae,unet",
                                 preview_every=2), home)
        assert run.wait() == 0, run.err
        metrics = metrics_of(home / "run")
        assert [m["applied"] for m in metrics] == [True, True]
        assert metrics[1]["distance"] > 0
        lines = run.err.strip().splitlines()
        lifted = (kind, dtype) == ("sdxl", "fp16")
        assert len(lines) == int(lifted), "one line where the VAE is lifted, else silence"
        assert all(w.dtype == torch.float32 for w in weights_of(home / "run"))

    def test_offline_pairs_run(self, models, home):
        """No reward is called; the loss falls on a fixed set of two pairs."""
        n = write_pictures(home)
        rows = [{"prompt": "a red cat", "chosen": n[:2], "rejected": n[2:3]},
                {"prompt": "two dogs", "chosen": n[3:4], "rejected": n[4:]}]
        (home / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        run = RunProcess(command(models, reward=None, prompts=None, pairs="pairs.jsonl"), home)
        assert run.wait() == 0, run.err
        metrics = metrics_of(home / "run")
        assert all(m["applied"] and min(m["rms_pref"]) > 0 and "reward_mean" not in m
                   for m in metrics)
        assert metrics[-1]["distance"] > 0
        run = RunProcess(["--resume", "run", "--steps", "5"], home)
        assert run.wait() == 0, run.err

    def test_a_checkpoint_is_whole_or_refused(self, models, home):
        """Cut, or with code in it: one line, and nothing is unpickled."""
        class Bomb:
            def __reduce__(self):
                return (Path.write_text, (home / "exploded", "x"))

        assert RunProcess(command(models, steps=1), home).wait() == 0
        file = home / "run" / "checkpoint.pt"
        good = file.read_bytes()
        torch.save({"at": {"step": 1}, "bomb": Bomb()}, home / "bomb.pt")
        bad = [b"", good[:100], good[:-1], (home / "bomb.pt").read_bytes()]
        for data in bad:
            file.write_bytes(data)
            with pytest.raises(UserError, match="checkpoint.pt could not be read"):
                drpo.train(drpo.parse(["--resume", str(home / "run"), "--steps", "2"]))
        assert not (home / "exploded").exists()

    def test_a_folder_in_use_is_refused(self, models, home):
        first = RunProcess(command(models, reward="own.py:slow", steps=10_000, save_every=1), home)
        first.until(home / "run" / "metrics.jsonl", 2)
        second = RunProcess(["--resume", "run"], home)
        assert second.wait() == 2
        assert_one_line(second.err, "in use by another run")
        first.kill(signal.SIGTERM)
        assert first.wait() == 143
        steps = [m["step"] for m in metrics_of(home / "run")]
        assert steps == list(range(1, len(steps) + 1))

    def test_what_others_put_into_a_folder_stays(self, models, home, capfd):
        """A folder with a file is refused; what a reward writes into the run's folder survives a
        failed start."""
        (home / "theirs").mkdir()
        (home / "theirs" / drpo.LORA_FILE).write_text("a LoRA of another trainer")
        assert_refused(command(models, out="theirs"), home, capfd, "--out", "new or empty")
        (home / "keeps.py").write_text("class Keeps:\n"
                                       "    run_folder = None\n"
                                       "    def __call__(self, images, prompts):\n"
                                       "        (self.run_folder / 'answers').write_text('1')\n"
                                       "        return [1.0]\n")
        run = RunProcess(command(models, reward="keeps.py:Keeps"), home)
        assert run.wait() == 2
        assert [p.name for p in (home / "run").iterdir()] == ["answers"]

    def test_settings_given_with_resume_are_used(self, models, home):
        assert RunProcess(command(models, steps=1), home).wait() == 0
        run = RunProcess(["--resume", "run", "--steps", "2", "--weight-decay", "40", "--lr", "0.5"],
                         home)
        assert run.wait() == 0, run.err
        group = state_of(home / "run")["optimizer"]["param_groups"][0]
        assert group["weight_decay"] == 40
        assert group["lr"] == 0.5

    def test_settings_of_other_types(self, models, home):
        """numpy's numbers and paths, as notebooks have them; a callable is never taken for a
        built-in reward."""
        def jpeg(images, prompts):
            return [500.0 + np.asarray(image).mean() for image in images]

        small = dict(model=models / "sd", prompts=home / "prompts.txt", batch=1, candidates=4,
                     anchors=2, preview_every=0)
        cfg = drpo.Config(steps=np.int64(1), lr=np.float32(1e-3), out=home / "run", **small)
        drpo.train(cfg, reward=jpeg)
        assert metrics_of(home / "run")[0]["reward_mean"] > 500
        with pytest.raises(UserError, match="the callable 'jpeg'"):
            drpo.train(drpo.parse(["--resume", str(home / "run"), "--steps", "2"]))
        drpo.train(drpo.parse(["--resume", str(home / "run"), "--steps", "2"]), reward=jpeg)
        assert metrics_of(home / "run")[1]["reward_mean"] > 500
        with pytest.raises(UserError, match="--lr is 'fast'"):
            drpo.train(drpo.Config(lr="fast", out=home / "other", **small))
        assert not (home / "other").exists()

    def test_presets_of_folders(self, models):
        assert drpo.Config.preset(str(models / "sd")).features == "latent-mae"
        assert drpo.Config.preset(models / "sdxl").features == "unet"
        with pytest.raises(UserError, match="Config.preset"):
            drpo.train(drpo.Config(model=str(models / "sd")))

    def test_a_scheduler_s_variables_without_torchrun(self, models, home):
        variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
        run = RunProcess(command(models, steps=1), home, variables)
        assert run.wait() == 0, run.err
        assert (home / "run" / drpo.LORA_FILE).exists()

    def test_a_closed_terminal_keeps_the_steps(self, models, home):
        run = RunProcess(command(models, reward="own.py:slow", steps=10_000), home)
        run.until(home / "run" / "metrics.jsonl", 3)
        run.kill(signal.SIGHUP)
        assert run.wait() == 129
        assert state_of(home / "run")["step"] == len(metrics_of(home / "run"))

    def test_gradients_that_are_not_finite(self, models, home):
        """One is not applied, and the log stays JSON; three in a row end the run with a line."""
        one = RunProcess(command(models, "one"), home, {"DP_ACTION": "nonfinite", "DP_STEPS": "2"})
        three = RunProcess(command(models, "three", steps=9), home,
                           {"DP_ACTION": "nonfinite", "DP_STEPS": "3,4,5"})
        assert one.wait() == 0, one.err
        assert [m["applied"] for m in metrics_of(home / "one")] == [True, False, True, True]
        assert metrics_of(home / "one")[1]["loss"] is None
        assert three.wait() == 2
        assert_one_line(three.err, "not finite three times", "--resume")

    def test_the_same_seed_is_the_same_run(self, models, home):
        """Bit for bit; another seed differs; the micro-batch changes nothing but rounding."""
        settings = dict(a={}, b=dict(save_every=1, log_every=1), c=dict(seed=1),
                        d=dict(micro_batch=3))
        runs = {name: RunProcess(command(models, name, steps=2, **kw), home) for name,
                kw in settings.items()}
        for run in runs.values():
            assert run.wait() == 0, run.err
        assert all_equal(weights_of(home / "a"), weights_of(home / "b"))
        assert not all_equal(weights_of(home / "a"), weights_of(home / "c"))
        a, d = metrics_of(home / "a"), metrics_of(home / "d")
        assert [m["loss"] for m in a] == pytest.approx([m["loss"] for m in d], rel=1e-3)

    def test_drpo_runs_beside_rewards_and_a_model_alone(self, models, tmp_path):
        """Two files and a diffusers folder in an empty folder, as somebody who copies them would
        run it."""
        for name in ("drpo.py", "rewards.py"):
            shutil.copy(HERE / name, tmp_path)
        shutil.copytree(models / "sd", tmp_path / "model")
        done = subprocess.run(
            [sys.executable, "drpo.py", "--model", "model", "--reward", "jpeg", "--prompts",
             "animals", "--features", "vae",
             "--steps", "1", "--batch", "1", "--candidates", "4", "--anchors", "2", "--device",
             "cpu", "--out", "run"],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / drpo.LORA_FILE).exists()

    def test_the_toy_loads_in_every_library(self, home):
        """4.57 knows the keys of its text encoder with this prefix alone, as in SD-Turbo's file; a
        pipeline opens without being told a dtype, and draws what the generator draws."""
        from diffusers import DiffusionPipeline
        from safetensors.torch import load_file
        weights = load_file(HERE / "lab" / "toy" / "text_encoder" / "model.safetensors")
        assert weights
        assert all(key.startswith("text_model.") for key in weights)
        G = drpo.load_generator("toy")
        loaded = G.pipe.text_encoder.state_dict()
        norm = next(value for key, value in loaded.items()
                    if key.endswith("final_layer_norm.weight"))
        assert torch.equal(norm, weights["text_model.final_layer_norm.weight"].float())
        assert norm.std() > 0
        pipe = DiffusionPipeline.from_pretrained(str(HERE / "lab" / "toy"))
        pipe.set_progress_bar_config(disable=True)
        e = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        want = pipe(["a red circle"], latents=e.clone(), num_inference_steps=1, guidance_scale=0,
                    output_type="latent").images
        assert_close(sample_of(G, e, ["a red circle"]), want.double().numpy(), 2e-5)


# ===== drpo.py: bad input

def files_in(home):
    return sorted((str(p.relative_to(home)), p.stat().st_size) for p in home.rglob("*")
                  if "__pycache__" not in p.parts)

def assert_refused(argv, home, capfd, *words):
    """drpo.main(argv) in home: SystemExit 2, one line on stderr with these words, no file more or
    less than before."""
    before = files_in(home)
    capfd.readouterr()
    with contextlib.chdir(home), pytest.raises(SystemExit) as done:
        drpo.main([str(a) for a in argv])
    err = capfd.readouterr().err
    assert done.value.code == 2, err
    assert_one_line(err, *words)
    assert files_in(home) == before, "something was written"

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
    "prompts-folder": (dict(prompts="."), ("no such file",)),
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
    "micro-batch": (dict(micro_batch="-1"), ("--micro-batch",)),
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
    "features-folder": (dict(features=f"{VIT}:dino@nowhere/at/all"), ("nowhere/at/all",)),
    "features-own": (dict(features="own.py:nothing"), ("feature", "own.py:nothing")),
    "out-holds-a-run": (dict(out="old"), ("old", "--resume")),
    "out-is-a-file": (dict(out="prompts.txt"), ("prompts.txt",)),
    "out-under-a-file": (dict(out="prompts.txt/run"), ("prompts.txt",)),
    "model-folder-empty": (dict(model="old"), ("old", "model_index.json")),
    "model-index-torn": (dict(model="torn"), ("torn",)),
    "reward-raises": (dict(reward="own.py:raises"), ("own.py:raises", "no camera")),
    "reward-count": (dict(reward="own.py:short"), ("own.py:short", "8 images")),
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
def traps(home, models):
    """Files that are missing something."""
    def write(name, text):
        (home / name).write_text(text)

    for folder in ("old", "torn", "tornrun", "inner"):
        (home / folder).mkdir()
    write("empty.txt", " \n\n")
    (home / "latin.txt").write_bytes("a café\n".encode("latin-1"))
    write("wrong.jsonl", '{"prompt": "a cat"}\n{"title": "a dog"}\n')
    write("wrong.csv", "title,year\na cat,1\n")
    write("half.json", '["a \\ud800 cat"]')
    write("broken.py", "raise RuntimeError('boom')\n")
    torch.save({"decoder.x": torch.zeros(1)}, home / "other.pth")
    old = drpo.Config(model=str(models / "sd"), reward="jpeg", prompts="animals")
    write("old/config.json", json.dumps(asdict(old)))
    write("torn/model_index.json", '{"_class_')
    write("tornrun/config.json", '{"model":')
    write_pictures(home, 1)
    names = write_pictures(home / "inner", 2)
    write("inner/text.png", "no picture")
    (home / "inner" / "cut.png").write_bytes((home / "inner" / names[0]).read_bytes()[:900])
    (home / "inner" / "link.png").symlink_to(home / "0.png")
    good = {"prompt": "a cat", "chosen": ["0.png"], "rejected": ["1.png"]}
    for name, rows in {
            "up": [good, good | {"chosen": ["../0.png"]}], "absolute": [good
                | {"chosen": [str(home / "0.png")]}],
            "link": [good | {"rejected": ["link.png"]}], "lost": [good | {"chosen": ["lost.png"]}],
            "half": [good | {"rejected": []}], "number": [good | {"chosen": [5]}],
            "text": [good | {"chosen": ["text.png"]}], "cut": [good
                | {"rejected": ["cut.png"]}]}.items():
        write(f"inner/{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    return home


class TestDrpoPyBadInput:
    """One clear line, exit code 2, nothing written."""

    @pytest.mark.parametrize("case", BAD)
    def test_bad_input(self, case, models, traps, capfd):
        settings, words = BAD[case]
        if "pairs" in settings:
            settings = settings | dict(reward=None, prompts=None)
        if "resume" in settings:
            argv = ["--resume", settings["resume"]]
        else:
            argv = command(models, **settings)
        assert_refused(argv, traps, capfd, *words)

    def test_bad_flags(self, home, capfd):
        assert_refused(["--modle", "toy"], home, capfd, "--modle")
        assert_refused(["--steps", "many"], home, capfd, "--steps", "many")
        assert_refused(["toy"], home, capfd, "toy")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
    def test_no_cuda_where_cuda_was_asked_for(self, models, home, capfd):
        for device in ("cuda", "cuda:1"):
            assert_refused(command(models, device=device), home, capfd, "--device", device, "cpu")

    def test_reward_that_is_bad_at_once_can_be_mended(self, models, home, capfd):
        """The same command works after the reward file is mended: the failure left no run
        behind."""
        argv = command(models, reward="own.py:short", steps=1)
        assert_refused(argv, home, capfd, "own.py:short")
        (home / "own.py").write_text(REWARD_FILE + "\nshort = good\n")
        with contextlib.chdir(home):
            drpo.main(argv)
        assert state_of(home / "run")["step"] == 1

    def test_settings_and_presets(self):
        """The command line is Config: given before preset before default. The presets are the
        published recipes."""
        toy, sd, xl = (drpo.parse(["--model", m]) for m in ("toy", "sd-turbo", "sdxl-turbo"))
        assert toy == drpo.Config(kernel="rbf", average=0.95) == drpo.Config.preset("toy")
        # arXiv 2606.02521 and the authors' scripts: K, m, prompts a GPU, lr, updates, weight of the
        # reference, features
        recipe = {"candidates": 24, "anchors": 8, "batch": 8, "lr": 1e-4, "steps": 1000,
                  "lambda_ref": 0.2, "lora_rank": 16,
                  "lora_alpha": 16.0, "weight_decay": 0.01, "clip": 1.0, "features": "latent-mae",
                  "field": "released",
                  "radii": (0.02, 0.05, 0.2), "reward": "pickscore"}
        assert {name: getattr(sd, name) for name in recipe} == recipe
        recipe |= {"candidates": 16, "lr": 1e-5, "steps": 5000, "lambda_ref": 0.25,
                   "features": "unet"}
        assert {name: getattr(xl, name) for name in recipe} == recipe
        mine = drpo.parse("--model sd-turbo --radii 0.1,0.3 --lr 0.5 --field dipole".split())
        assert mine == drpo.Config.preset("sd-turbo", radii=(0.1, 0.3), lr=0.5, field="dipole")
        assert mine.batch == 8

    def test_import_is_light_and_goes_one_way(self, tmp_path):
        """Heavy libraries are imported when a model is loaded, drpo.py knows rewards.py alone, and
        every module is one."""
        code = ("import sys, drpo;"
                "heavy = {'diffusers', 'transformers', 'peft', 'accelerate', 'eval'};"
                "assert not heavy & set(sys.modules);"
                "import eval, rewards; assert eval.drpo is drpo and rewards is rewards")
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        own = {"rewards": set(), "drpo": {"rewards"}, "eval": {"drpo", "rewards"}}
        for name, known in own.items():
            found = set(re.findall(r"^\s*(?:import|from) (rewards|drpo|eval|scene|ablate|bench)\b",
                                   (HERE / f"{name}.py").read_text(), re.M))
            assert found == known, name


# ===== drpo.py: several ranks

def processes(argv, home, n, env=()):
    """The processes that torchrun would start."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(env, TORCHELASTIC_RUN_ID="test", WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
               MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    return [RunProcess(argv, home, dict(env, RANK=str(r), LOCAL_RANK=str(r))) for r in range(n)]


class TestDrpoPySeveralRanks:
    """As torchrun starts them, with gloo."""

    def test_two_ranks_are_one_of_twice_the_batch(self, models, home):
        """2 ranks x 2 prompts = 1 rank x 4 prompts: the first update's norm and weights; then with
        another number."""
        kw = dict(steps=2, clip=1e9, weight_decay=0)
        one = RunProcess(command(models, "one", batch=4, **kw), home)
        two = processes(command(models, "two", batch=2, **kw), home, 2)
        assert one.wait() == 0, [r.err for r in (one, *two)]
        assert [r.wait() for r in two] == [0, 0], [r.err for r in (one, *two)]
        a, b = metrics_of(home / "one"), metrics_of(home / "two")
        assert [m["step"] for m in b] == [1, 2], "rank 0 alone writes"
        for x, y in zip(a, b):
            assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-3)
        states = [state_of(home / n) for n in ("one", "two")]
        assert states[0]["position"] == states[1]["position"] == 8
        # Adam's second moments are means of squared gradients: the gradients were equal
        for x, y in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                assert (x[key] - y[key]).norm() <= 2e-3 * x[key].norm()
        run = RunProcess(["--resume", "two", "--steps", "3"], home)
        assert run.wait() == 0, run.err
        assert state_of(home / "two")["position"] == 10
        assert [m["step"] for m in metrics_of(home / "two")] == [1, 2, 3]
        more = processes(["--resume", "two", "--steps", "4"], home, 2)
        assert [r.wait() for r in more] == [0, 0], [r.err for r in more]
        assert state_of(home / "two")["position"] == 14

    @pytest.mark.parametrize("reward", ("dies3", "raises3_on_1"))
    def test_a_rank_that_dies(self, reward, models, home):
        """A clear line, and a checkpoint of the last whole step."""
        ranks = processes(command(models, reward=f"own.py:{reward}", steps=6), home, 2)
        assert [r.wait() for r in ranks] == [2, 9 if reward == "dies3" else 2]
        assert_one_line(ranks[0].err.strip().splitlines()[-1], "another process ended", "step 3",
                        "--resume ")
        assert "Traceback" not in ranks[0].err
        assert state_of(home / "run")["step"] == 2
        assert [m["step"] for m in metrics_of(home / "run")] == [1, 2]
        run = RunProcess(["--resume", "run", "--steps", "3"], home)
        assert run.wait() == 0, run.err

    def test_signal_to_all_ranks(self, models, home):
        """SIGTERM, as torchrun passes it on: every rank ends after the same step."""
        ranks = processes(command(models, reward="own.py:slow", steps=10_000), home, 2)
        ranks[0].until(home / "run" / "metrics.jsonl", 2)
        for r in ranks:
            r.kill(signal.SIGTERM)
            time.sleep(0.03)
        assert [r.wait() for r in ranks] == [143, 143], [r.err for r in ranks]
        assert state_of(home / "run")["step"] == len(metrics_of(home / "run"))


# ===== rewards.py: contract

ROOT = Path(__file__).parent

def some_images(count, size=(64, 64), seed=0):
    """Smooth random pictures with some grain."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size,
            Image.Resampling.BICUBIC)
        grain = rng.integers(-20, 21, (size[1], size[0], 3))
        pictures.append(Image.fromarray((np.array(coarse).astype(int) + grain).clip(0,
            255).astype(np.uint8)))
    return pictures

def as_batch(images):
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 255
                        for i in images])

def reward_of(function, name="mine"):
    return rewards.Reward(name, {name: function}, {name: 1.0})

def mean_red(images, prompts):
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
        ("vlm@http://h:1/v1?a=b&model=q=0.25,clip=2",
         {"vlm@http://h:1/v1?a=b&model=q": 0.25, "clip": 2}),
    ])
    def test_reward_spec(self, spec, weights):
        assert rewards.parse(spec) == weights

    @pytest.mark.parametrize("spec, says", [
        ("jpge", "unknown reward 'jpge'; nearest: jpeg; for all names: python rewards.py list"),
        ("pick@/some/where", "unknown reward 'pick@/some/where'; nearest: pickscore"),
        ("jpeg=much", "the weight 'much' of 'jpeg' says nothing"),
        ("jpeg=nan", "the weight 'nan' of 'jpeg' says nothing"),
        ("jpeg=inf", "finite number"), ("jpeg=0", "--watch"),
        ("jpeg=", "the weight '' of 'jpeg' says nothing"),
        ("jpeg,,clip", "an item without a name"), ("", "an item without a name"),
        ("=2", "an item without a name"),
        ("jpeg,jpeg=2", "'jpeg' is named twice"), ("jpeg@/x", "reward 'jpeg': it takes no path"),
        ("judge.py", "name what it holds, judge.py:function"),
        ("no_such_package:f", "ModuleNotFoundError"),
        ("math:no_such", "AttributeError"), ("math:pi", "must be callable"),
        ("gone.py:f", "FileNotFoundError"), ("http://", "is not a URL"),
        ("http://h:port", "is not a URL"),
        ("vlm", "name the endpoint"), ("vlm@http://h/v1", "name the model"),
        ("vlm@h?model=x", "is not a URL"),
        ("vlm@http://h/v1?model=a&tokens=few", "tokens=1024"), ("hpsv3", "pip install hpsv3"),
    ])
    def test_reward_bad_spec(self, spec, says):
        with pytest.raises(UserError) as caught:
            rewards.load(spec)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_reward_user_file(self, tmp_path, monkeypatch):
        (tmp_path / "neighbour.py").write_text("OFFSET = 10\n")
        file = tmp_path / "mine.py"
        file.write_text("import numpy as np\nfrom neighbour import OFFSET\n"
                        "def mean(images, prompts):\n"
                        "    return np.array([np.asarray(i).mean() + OFFSET for i in images])\n"
                        "class Judge:\n    def __init__(self):\n        self.bonus = 3\n"
                        "    def __call__(self, images, prompts):\n"
                        "        return [len(p) + self.bonus for p in prompts]\n"
                        "judge = Judge()\n"
                        "class Picky:\n    def __init__(self, model):\n        pass\n"
                        "def short(images):\n    return []\n"
                        "def long(images, prompts, model):\n    return []\n")
        images = [Image.new("RGB", (4, 4), (20, 20, 20)), Image.new("RGB", (4, 4), (50, 50, 50))]
        assert rewards.load(f"{file}:mean")(images, ["a", "b"]).tolist() == [30, 60]
        assert rewards.load(f"{file}:Judge")(images, ["a", "abc"]).tolist() == [4, 6]
        assert rewards.load(f"{file}:judge")(images, ["a", "abc"]).tolist() == [4, 6]
        assert rewards.load("mine:mean")(images, ["a", "b"]).tolist() == [30, 60]
        for attribute, says in [("short", "f(images, prompts)"), ("long", "f(images, prompts)"),
                                ("Picky", "TypeError"), ("missing", "AttributeError")]:
            with pytest.raises(UserError, match=attribute) as caught:
                rewards.load(f"{file}:{attribute}")
            assert says in str(caught.value)
        (tmp_path / "broken.py").write_text("def f(:\n")
        with pytest.raises(UserError, match="SyntaxError"):
            rewards.load(f"{tmp_path}/broken.py:f")

    @pytest.mark.parametrize("name", ("reward.v2.py", "two words/r.py", "my.rewards/r.py",
                                      "json.py", "a=b/r.py"))
    def test_reward_files_of_any_name(self, name, tmp_path):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("def f(images, prompts):\n    return [7.0] * len(images)\n")
        assert rewards.load(f"{file}:f")(some_images(1), ["a"]).tolist() == [7]
        assert rewards.load(f"{file}:f=2")(some_images(1), ["a"]).tolist() == [14]
        assert sys.modules["json"] is json

    def test_a_reward_changes_nothing_for_others(self, tmp_path, monkeypatch):
        """At import, when it is made, and in every call: directory, default dtype, gradients,
        autocast, threads."""
        (tmp_path / "loud.py").write_text(
            "import os, torch\n"
            "def loud():\n"
            "    os.chdir('/')\n"
            "    torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)\n"
            "    torch.set_autocast_enabled('cpu', True); torch.set_default_device('meta')\n"
            "    torch.use_deterministic_algorithms(True)\n"
            "    torch.set_float32_matmul_precision('medium')\n"
            "loud()\n"
            "class Loud:\n"
            "    def __init__(self): loud()\n"
            "    def __call__(self, images, prompts):\n"
            "        loud()\n"
            "        return [1.0] * len(images)\n")
        monkeypatch.chdir(tmp_path)

        def state():
            return [read() for read, _ in rewards.GLOBALS] + [torch.get_default_device()]

        before = state()
        reward = rewards.load("loud.py:Loud")
        assert state() == before
        assert reward(some_images(2), ["a", "b"]).tolist() == [1, 1]
        assert state() == before

    @pytest.mark.parametrize("size,want", ((None, [6]), (4, [4, 2]), (3, [3, 3]), (5, [4, 2]),
                                           (2, [2, 2, 2])))
    def test_calls_cut_between_prompts(self, size, want):
        """Prompts of 3, 1 and 2 pictures; only a prompt that is larger than the reward can take is
        cut."""
        calls = []

        def reward(images, prompts):
            calls.append(len(images))
            return [0.0] * len(images)

        reward.batch_size = size
        rewards.load(reward)(some_images(6), ["a", "a", "a", "b", "c", "c"])
        assert calls == want

    @pytest.mark.parametrize("answer", ([True, False], ["1", "2"], [1.0], [[1.0], [2.0]], None, 3.0,
                                        {1: 2}, [10 ** 400, 1],
                                        [math.inf, 0], torch.ones(2, 1), np.array([1j, 2]),
                                        [None, 1.0], torch.ones(2) > 0))
    def test_answers_that_are_no_scores(self, answer):
        with pytest.raises(UserError, match="'f': returned .* one finite float an image") as caught:
            rewards.Reward("f", {"f": lambda images, prompts: answer},
                           {"f": 1.0}).score(some_images(2), ["a", "b"])
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("answer", ([1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([1, 2]),
                                        np.float32([1, 2]), torch.tensor([1.0, 2.0]).bfloat16(),
                                        [np.float64(1), torch.tensor(2.0)]))
    def test_answers_that_are_scores(self, answer):
        assert rewards.load(lambda images, prompts: answer)(some_images(2),
                                                            ["a", "b"]).tolist() == [1, 2]

    def test_reward_that_raises(self):
        def fails(images, prompts):
            if "memory" in prompts:
                raise torch.OutOfMemoryError  # left to whoever can make the batch smaller
            raise KeyError("two\nlines")
        with pytest.raises(UserError, match=r"^reward 'mine': KeyError: 'two\\nlines'$") as caught:
            reward_of(fails)(some_images(1), ["a"])
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(torch.OutOfMemoryError):
            reward_of(fails)(some_images(1), ["memory"])
        with pytest.raises(UserError, match="2 images, 1 prompts"):
            reward_of(mean_red)(some_images(2), ["a"])

    def test_reward_batches_and_tensors(self):
        calls = []

        def counts(images, prompts):
            calls.append(len(images))
            return mean_red(images, prompts)
        counts.batch_size = 3
        images, prompts = some_images(8), [f"{'x' * i}" for i in range(8)]
        expected = mean_red(images, prompts)
        assert np.allclose(reward_of(counts)(images, prompts), expected)
        assert calls == [3, 3, 2]
        # a tensor reaches a reward that wants PIL as the very same pictures
        assert np.allclose(reward_of(counts)(as_batch(images), prompts), expected)
        assert np.array_equal(np.array(rewards.to_pil(torch.full((1, 3, 2, 2), 0.499))[0]),
                              np.full((2, 2, 3), 127))
        # and untouched one that takes tensors
        seen = []

        def direct(images, prompts):
            seen.append(images)
            return images.mean((1, 2, 3))
        counts.score_tensor = direct
        batch = as_batch(images) * 0.9999
        got = reward_of(counts)(batch, prompts)
        assert torch.allclose(got.float(), batch.mean((1, 2, 3)))
        assert [len(s) for s in seen] == [3, 3, 2]
        assert torch.equal(torch.cat(seen), batch)
        assert reward_of(counts)([], []).shape == (0,)
        for wrong in (batch[:, :1], (batch * 255).byte(), batch.flatten(1)):
            with pytest.raises(UserError, match=r"float \(B,3,H,W\) in \[0,1\]"):
                reward_of(counts)(wrong, prompts)

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
            return [float(np.asarray(image).mean()) + len(prompt) for image,
                    prompt in zip(images, prompts, strict=True)]
        tensor_vandal.score_tensor = tensor_vandal
        images, prompts = some_images(3), ["a", "bb", "ccc"]
        want, batch = mean(images, prompts), as_batch(images)
        before = batch.clone()
        reward = rewards.Reward("all", {"v": vandal, "t": tensor_vandal, "m": mean},
                                {"v": 1, "t": 1, "m": 1}, {"v": vandal, "m": mean})
        for given in (images, batch):
            if given is images:
                reward.parts["t"] = vandal
            scores = reward.score(given, prompts, watch=True)
            assert scores["m"].tolist() == pytest.approx(want)
            assert scores["watch/m"].tolist() == pytest.approx(want)
            reward.parts["t"] = tensor_vandal
        assert torch.equal(batch, before)
        assert prompts == ["a", "bb", "ccc"]
        assert images[0].size == (64, 64)

    def test_watched_rewards_are_scored_on_request_and_never_rank(self):
        reward = rewards.load("jpeg", watch="incompressibility,jpeg")
        images = some_images(3)
        assert set(reward.score(images, ["p"] * 3)) == {"jpeg"}
        scores = reward.score(images, ["p"] * 3, watch=True)
        assert set(scores) == {"jpeg", "watch/incompressibility", "watch/jpeg"}
        assert torch.equal(reward.combine(scores), scores["jpeg"])
        mine = rewards.load(lambda images, prompts: [1.0] * len(images), watch="jpeg")
        assert set(mine.score(images, ["p"] * 3, watch=True)) > {"watch/jpeg"}
        assert mine(images, ["p"] * 3).tolist() == [1] * 3

    def test_reward_combination(self):
        table = {"a": [1., 2., 4., 9., 5., 5.], "b": [0.3, math.nan, 0.1, 0.2, 7., math.nan]}
        prompts = ["p", "q", "p", "p", "q", "q"]
        parts = {name: (lambda images, prompts, values=values: values) for name,
                 values in table.items()}
        reward = rewards.Reward("both", parts, {"a": 2., "b": -.5})
        expected = np.zeros(6)
        for prompt in "pq":
            group = np.array([p == prompt for p in prompts])
            for name, weight in reward.weights.items():
                values = np.array(table[name])[group]
                known = values[~np.isnan(values)]
                std = known.std()
                z = np.nan_to_num((values - known.mean()) / std) if std else 0
                expected[group] += weight * z
        images = some_images(6)
        assert np.allclose(reward(images, prompts), expected, atol=1e-6)
        assert {k: v.tolist()[0] for k, v in reward.score(images, prompts).items()} == {"a": 1.,
            "b": pytest.approx(.3)}
        # any leading shape, and a candidate on which nobody has an opinion stays NaN
        scores = {"a": torch.tensor([[1., 2., math.nan], [3., 3., 3.]]),
                  "b": torch.tensor([[5., 4., math.nan], [1., 2., 3.]])}
        got = reward.combine(scores).float()
        assert got[0, 2].isnan()
        assert torch.allclose(got[0, :2], torch.tensor([-2.5, 2.5]))
        assert torch.allclose(got[1], -.5 * torch.tensor([-1.5 ** .5, 0, 1.5 ** .5]))
        # equal scores whose mean is not exact add nothing
        assert reward.combine({"a": torch.full((7,), .1), "b": torch.full((7,),
                                                                          .7)}).tolist() == [0] * 7

    def test_reward_single_is_native(self):
        scores = torch.tensor([.1, math.nan, -3e-8, 7e30], dtype=torch.float64)
        got = reward_of(lambda images, prompts: scores)(some_images(4), ["a", "b", "a", "b"])
        assert torch.equal(got.view(torch.int64), scores.view(torch.int64))
        less = rewards.load("jpeg=-1")
        images = some_images(3)
        assert torch.equal(less(images, list("abc")), rewards.load("incompressibility")(images,
            list("abc")))

    def test_reward_jpeg(self):
        images = some_images(3, (80, 48)) + [Image.new("RGBA", (80, 48), (9, 200, 30, 255))]
        sizes = []
        for image in images:
            file = io.BytesIO()
            image.convert("RGB").save(file, format="JPEG", quality=95)
            sizes.append(len(file.getvalue()) / 1000)
        assert np.allclose(rewards.load("jpeg")(images, ["p"] * 4), -np.array(sizes))
        assert np.allclose(rewards.load("incompressibility")(as_batch(images[:3]), ["p"] * 3),
                           sizes[:3])
        grey = rewards.load("incompressibility")([Image.new("RGB", (512, 512), (128, 128, 128))],
                                                 ["p"])
        assert grey.item() == pytest.approx(4.7, abs=0.1)


# ===== rewards.py: files


class TestRewardsPyFiles:
    """Prompts and pictures are read as what they are."""

    @pytest.mark.parametrize("name,text,want", (
        ("a.txt", "\ufeffa cat\r\n\r\n a dog \n", ["a cat", "a dog"]),
        ("a", "a\u2028b\n", ["a\u2028b"]),
        ("a.jsonl", '{"Prompt": "a"}\n"b"\n', ["a", "b"]),
        ("a.json", '["a", {"TEXT": "b"}]', ["a", "b"]),
        ("a.csv", 'id,Caption\n1,"a, ""b"""\n2,c\n', ['a, "b"', "c"]),
        ("a.tsv", "Prompt\tnote\na\tx\nb\n", ["a", "b"]),
        # as PartiPrompts.tsv has it (google-research/parti 5a65797): quotes are letters
        ("a.tsv", 'Prompt\tNote\n"G I" painted\tx\na sign "Go"\ty\n',
         ['"G I" painted', 'a sign "Go"'])))
    def test_prompt_files(self, name, text, want, tmp_path):
        (tmp_path / name).write_bytes(text.encode())
        assert rewards.load_prompts(str(tmp_path / name)) == want

    @pytest.mark.parametrize("name,text,words", (
        ("a.csv", "prompt\na,b\n", "2 cells under 1 columns"),
        ("a.csv", 'prompt\n"a\nb\n', "line 3"),
        ("a.csv", 'prompt\n"a"b\n', "line 2"), ("a.tsv", 'prompt\tx\n"a\tb\nc\td\n', "line 3"),
        ("a.csv", "prompt\n" + "x" * 200_000, "field larger"),
        ("a.csv", "title\na\n", '"caption"'), ("a.json", '{"prompt": "a"}', "array"),
        ("a.jsonl", "{", "line 1"),
        ("a.txt", " \n", "empty"), ("a.png", "a", ".png")))
    def test_prompt_files_that_are_none(self, name, text, words, tmp_path):
        (tmp_path / name).write_bytes(text.encode())
        with pytest.raises(UserError) as caught:
            rewards.load_prompts(str(tmp_path / name))
        assert words in str(caught.value)

    def test_prompts_from_a_pipe(self, tmp_path):
        """--prompts <(...)."""
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("a cat\n"))
        writer.start()
        assert rewards.load_prompts(str(tmp_path / "pipe")) == ["a cat"]
        writer.join()

    def test_prompt_sets_are_pinned(self, tmp_path, monkeypatch):
        """A second address is tried; what comes is checked; a cache that cannot be written is one
        line."""
        monkeypatch.setenv("DRPO_CACHE", str(tmp_path))
        asked = []

        def download(url, path, sha256, progress):
            asked.append(url)
            if len(asked) == 1:
                raise OSError("no route")
            Path(path).write_text("a cat\n")

        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        with pytest.raises(UserError, match="sha256 differs"):
            rewards.load_prompts("pickapic")
        assert [url.split("/")[3] for url in asked] == ["UGVly", "yifan123"]
        monkeypatch.setitem(rewards.PROMPTS, "mine",
                            (rewards.hashlib.sha256(b"a cat\n").hexdigest(), "http://x/mine.txt"))
        assert rewards.load_prompts("mine") == ["a cat"]
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DRPO_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(UserError, match="could not be fetched.*DRPO_CACHE"):
            rewards.load_prompts("parti")

    def test_pictures_are_seen_as_people_see_them(self, tmp_path):
        """One loader: EXIF orientation, 16-bit grey, alpha on white, the first frame, CMYK."""
        half = Image.new("RGB", (64, 32), (255, 0, 0))
        half.paste((0, 0, 255), (32, 0, 64, 32))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter
        half.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        seen = np.asarray(rewards.read_picture(tmp_path / "turned.jpg"), float)
        want = np.asarray(half.rotate(-90, expand=True), float)
        assert seen.shape == want.shape == (64, 32, 3)
        assert np.abs(seen - want).mean() < 8
        ramp = np.linspace(0, 65535, 256 * 16).round().astype(np.uint16).reshape(64, 64)
        Image.fromarray(ramp).save(tmp_path / "ramp.png")
        seen = np.asarray(rewards.read_picture(tmp_path / "ramp.png"))
        assert seen.mean() == pytest.approx(127.5, abs=1)
        # dark, and still 16 bits
        Image.fromarray((ramp // 300).astype(np.uint16)).save(tmp_path / "dark.png")
        assert np.asarray(rewards.read_picture(tmp_path / "dark.png")).max() <= 1
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
        assert np.asarray(rewards.read_picture(tmp_path / "clear.png")).min() == 255
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([255, 0, 0] * 256)
        palette.save(tmp_path / "palette.png", transparency=0)
        assert np.asarray(rewards.read_picture(tmp_path / "palette.png")).min() == 255
        frames = [Image.new("RGB", (8, 8), c) for c in ("lime", "blue")]
        frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
        first = np.asarray(rewards.read_picture(tmp_path / "moving.gif"))
        assert first[0, 0].tolist() == [0, 255, 0]
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
        red = np.asarray(rewards.read_picture(tmp_path / "cmyk.jpg"))[0, 0]
        assert red[0] > 180
        assert max(red[1:]) < 80
        for name, data in (("cut.png", (tmp_path / "ramp.png").read_bytes()[:200]),
                           ("text.png", b"no picture")):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(UserError, match=name):
                rewards.read_picture(tmp_path / name)
        wide = Image.new("RGB", (96, 32), "red")
        wide.paste("lime", (32, 0, 64, 32))
        wide.save(tmp_path / "wide.png")
        middle, = rewards.load_pictures([tmp_path / "wide.png"], 32)  # the centre, not squeezed
        assert middle[1].min() == 1
        assert middle[0].max() == 0

    @pytest.mark.parametrize("spec, says", [
        ("pickscore", ["model.safetensors", "huggingface.co/yuvalkirstain/PickScore_v1",
                       "pickscore@/path/to/folder"]),
        ("hpsv2", ["HPS_v2.1_compressed.pt", "huggingface.co/xswu/HPSv2", "hpsv2@/path/to/folder"]),
        ("imagereward", ["ImageReward.pt", "huggingface.co/THUDM/ImageReward",
                         "imagereward@/path/to/folder"]),
        ("aesthetic", ["sac+logos+ava1-l14-linearMSE.pth", "aesthetic@"]),
        ("clip@/no/such/place", ["config.json", "/no/such/place", "no such file or folder"]),
        ("hpsv2@EMPTY", ["HPS_v2.1_compressed.pt", "FileNotFoundError"]),
        ("imagereward@JUNK", ["ImageReward.pt", "UnpicklingError"]),
        ("geneval@/no/such/place", ["/no/such/place",
                                    "geneval@/path/to/evaluation_metadata.jsonl"]),
    ])
    def test_reward_missing_files(self, spec, says, tmp_path, monkeypatch):
        import huggingface_hub.constants
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("DRPO_CACHE", str(tmp_path))
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a,
                            **kw: (_ for _ in ()).throw(OSError("no route")))
        (tmp_path / "junk").write_bytes(b"\x80\x02not weights")
        spec = spec.replace("EMPTY", str(tmp_path)).replace("JUNK", str(tmp_path / "junk"))
        with pytest.raises(UserError) as caught:
            rewards.load(spec)
        assert all(word in str(caught.value) for word in says)
        assert "\n" not in str(caught.value)


# ===== rewards.py: models

def clip_tokenizer(folder):
    """A CLIP tokenizer of single letters; the end token has the highest number, as in the real
    one."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {t: i for i, t in enumerate(letters + [c + "</w>" for c in letters]
                                        + ["<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}))
    return vocab

SMALL_CLIP = {  # the shape of `open_clip_weights`
    "projection_dim": 24,
    "text_config": dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4,
                        hidden_act="gelu", projection_dim=24, vocab_size=54, bos_token_id=52,
                        eos_token_id=53),
    "vision_config": dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                          num_attention_heads=1,
                          hidden_act="gelu", projection_dim=24, patch_size=56),
}

def waves(count, size):
    """Pictures by a formula: smooth, all different, the same under any version of Pillow."""
    x, y = np.meshgrid(np.arange(size[0]) / 40, np.arange(size[1]) / 40)
    pictures = []
    for n in range(1, count + 1):
        channels = [np.sin(n * x + c) * np.cos(y * (c + 1) - n) for c in range(3)]
        pictures.append(Image.fromarray((127.5 + 127.5 * np.stack(channels,
                                                                  -1)).round().astype(np.uint8)))
    return pictures

def open_clip_weights(projection=24):
    """Random weights with open_clip's and OpenAI's names: a ViT of width 64 in patches of 56, a
    text model of width 32."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (shape[-1] ** -.5 if len(shape) > 1
                                                          else .3)
    weights = {"logit_scale": torch.tensor(4.6), "positional_embedding": draw(77, 32),
               "text_projection": draw(32, projection), "token_embedding.weight": draw(54, 32),
               "visual.class_embedding": draw(64), "visual.proj": draw(64, projection),
               "visual.positional_embedding": draw(17, 64),
               "visual.conv1.weight": draw(64, 3, 56, 56) * .2}
    norms = {"visual.ln_pre": 64, "visual.ln_post": 64, "ln_final": 32}
    for prefix, width in (("visual.", 64), ("", 32)):
        for n in range(2):
            p = f"{prefix}transformer.resblocks.{n}."
            norms |= {p + "ln_1": width, p + "ln_2": width}
            for name, rows, columns in (("attn.in_proj_", 3 * width, width),
                                        ("attn.out_proj.", width, width),
                                        ("mlp.c_fc.", 4 * width, width),
                                        ("mlp.c_proj.", width, 4 * width)):
                weights |= {p + name + "weight": draw(rows, columns), p + name + "bias": draw(rows)}
    for name, width in norms.items():
        weights |= {name + ".weight": 1 + draw(width), name + ".bias": draw(width)}
    return weights

def head_weights(width):
    """Random weights of the five linear layers of the LAION predictor and of ImageReward."""
    generator = torch.Generator().manual_seed(6)
    weights = {}
    for i, rows, columns in ((0, 1024, width), (2, 128, 1024), (4, 64, 128), (6, 16, 64),
                             (7, 1, 16)):
        weights[f"layers.{i}.weight"] = torch.randn(rows, columns,
                                                    generator=generator) * columns ** -.5
        weights[f"layers.{i}.bias"] = torch.randn(rows, generator=generator) * .3
    return weights

def clip_folder(folder, projection=24, activation="gelu"):
    """A folder of a small CLIPModel with these weights and its tokenizer, as of a hub."""
    from transformers import CLIPConfig, CLIPModel
    config = CLIPConfig(**{**SMALL_CLIP, "projection_dim": projection})
    config.text_config.hidden_act = config.vision_config.hidden_act = activation
    weights = rewards.from_open_clip(open_clip_weights(projection))
    CLIPModel.from_pretrained(None, config=config, state_dict=weights).save_pretrained(folder)
    clip_tokenizer(folder)

CLIP_PROMPTS = ["a cat", "a red dog", "two birds", "a cat"]

def behaves(reward, tolerance=1e-5):
    """What every model reward must do: repeat itself, not care for order or batch size, tell
    pictures apart."""
    images = some_images(5, (90, 70)) + [Image.new("RGB", (90, 70))]
    prompts = ["a cat", "a dog"] * 3
    (name, part), = reward.parts.items()
    scores = reward(images, prompts)
    assert torch.equal(scores, reward(images, prompts))
    assert torch.allclose(scores.flip(0), reward(images[::-1], prompts[::-1]), atol=tolerance)
    part.batch_size = 2
    assert torch.allclose(scores, reward(images, prompts), atol=tolerance)
    shuffled = np.random.default_rng(0).permutation(np.array(images[0]).reshape(-1, 3)).reshape(70,
        90, 3)
    others = reward([images[0], Image.fromarray(shuffled), images[5]], ["a cat"] * 3)
    assert others.isfinite().all()
    assert len(set(others.tolist())) == 3

SMALL_BLIP_TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=64, vocab_size=40,
                     layer_norm_eps=1e-12, encoder_hidden_size=48, max_position_embeddings=64)

SMALL_BLIP_VISION = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=96, patch_size=56,
                       image_size=224, layer_norm_eps=1e-6)

def blip_weights():
    """Random weights with the names of ImageReward.pt."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (shape[-1] ** -.5 if len(shape) > 1
                                                          else .3)
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    weights = {v + "cls_token": draw(1, 1, 48), v + "pos_embed": draw(1, 17, 48),
               v + "patch_embed.proj.weight": draw(48, 3, 56, 56) * .2, v
               + "patch_embed.proj.bias": draw(48),
               t + "embeddings.word_embeddings.weight": draw(40, 32),
               t + "embeddings.position_ids": torch.arange(64)[None],
               t + "embeddings.position_embeddings.weight": draw(64, 32)}
    norms, linears = {v + "norm": 48, t + "embeddings.LayerNorm": 32}, {}
    for n in range(2):
        b, e = f"{v}blocks.{n}.", f"{t}encoder.layer.{n}."
        norms |= {b + "norm1": 48, b + "norm2": 48, e + "attention.output.LayerNorm": 32,
                  e + "crossattention.output.LayerNorm": 32, e + "output.LayerNorm": 32}
        linears |= {b + "attn.qkv": (144, 48), b + "attn.proj": (48, 48), b + "mlp.fc1": (96, 48),
                    b + "mlp.fc2": (48, 96), e + "intermediate.dense": (64, 32), e
                    + "output.dense": (32, 64)}
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

# what the originals' own code gives for the pictures of `waves`, these prompts and weights
ORIGINAL_SCORES = {
    "pickscore": [28.709972, 29.506081, 28.312414, 43.962631],
    # the model card's, transformers 4.57.1; 640 x 427
    "clip": [0.270572, 0.353885, 0.281806, 0.411300],  # OpenAI's, clip-anytorch 2.6.0; 280 x 280
    "aesthetic": [0.690763, 0.682535, 0.690826, 0.688289],
    # its repository's, 6934dd81, on OpenAI's; 640 x 427
    "hpsv2": [0.238148, 0.424465, 0.398144, 0.230903],  # hpsv2 1.2.0; 640 x 427
    "hpsv2 tall": [0.109186, 0.202356, 0.257832, 0.119639],  # 85 x 320
    "imagereward": [-0.373085, -0.047387, 0.280459, 0.160174],  # image-reward 1.5; 640 x 427
}
class TestRewardsPyModels:
    """CLIP and its descendants: the originals' own numbers, for small seeded weights."""

    @pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 517), (640, 231), (64, 64),
                                      (225, 224), (100, 37)])
    def test_reward_clip_pixels(self, size):
        from transformers import CLIPImageProcessor
        images = some_images(2, size)
        judge = CLIPImageProcessor()(images, return_tensors="pt")["pixel_values"]
        mine = rewards.clip_pixels(images, "cpu")
        assert mine.shape == judge.shape
        assert (mine - judge).abs().max() < 1e-6
        # the tensor path against PIL: at most one level of 255 (two where the picture is enlarged),
        # seldom
        level, grows = 1 / 255 / torch.tensor(rewards.CLIP_STD).view(3, 1, 1), min(size) < 224
        difference = ((rewards.clip_pixels(as_batch(images), "cpu") - mine) / level).abs()
        assert difference.max() < (2.01 if grows else 1.01)
        assert (difference > 0.5).float().mean() < (1e-2 if grows else 1e-3)

    def test_reward_centre_crop_of_torchvision(self):
        """int(round((long - 224) / 2)), by hand, for every long side; a pixel beside the floor of
        transformers for some."""
        differs = 0
        for long in (225, 227, 228, 229, 230, 231, 243, 327, 335):
            picture = np.zeros((224, long, 3), np.uint8)
            picture[..., 0] = np.arange(long) % 256
            crops = {fit: rewards.clip_pixels([Image.fromarray(picture)], "cpu", fit=fit)
                     for fit in ("round", "floor")}
            values = {fit: ((x[0, 0, 0] * rewards.CLIP_STD[0]
                             + rewards.CLIP_MEAN[0]) * 255).round() for fit, x in crops.items()}
            left = int(round((long - 224) / 2.0))
            assert values["round"].tolist() == [i % 256 for i in range(left, left + 224)], long
            assert values["floor"][0] == (long - 224) // 2
            differs += left != (long - 224) // 2
        assert differs > 2

    @pytest.mark.parametrize("size", [(300, 200), (85, 320), (224, 224), (96, 96)])
    def test_reward_hpsv2_pixels(self, size):
        """In float, resized once (both sides rounded from the product with 224 / longest), black
        beside: not clamped."""
        image, = some_images(1, size)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        height, width = (round(v * (224 / max(size))) for v in (size[1], size[0]))
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)[0]
        canvas = torch.zeros(3, 224, 224)
        top, left = (224 - height) // 2, (224 - width) // 2
        canvas[:, top:top + height, left:left + width] = x
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (rewards.CLIP_MEAN, rewards.CLIP_STD))
        for given in ([image], as_batch([image])):
            assert torch.allclose(rewards.clip_pixels(given, "cpu", fit="pad")[0],
                                  (canvas - mean) / std, atol=1e-5)

    def test_reward_hpsv2_texts(self):
        """What open_clip's tokenizer does first: entities twice, quotes, wide letters, ligatures,
        composition."""
        for text, want in (("Tom &amp;amp; Jerry", "Tom & Jerry"),
                           ("it\u2019s \u201cred\u201d", "it's \"red\""),
                           ("\uff21\uff22\u3000\ufb01sh", "AB fish"), ("cafe\u0301 ", "caf\u00e9"),
                           ("x\u2154", "x\u2154")):
            assert rewards.repaired(text) == want

    def test_reward_pickscore_and_clip(self, tmp_path):
        large = some_images(4, (512, 512))
        for name, size, activation, tolerance in (("pickscore", (640, 427), "gelu", 1e-2),
                                                  ("clip", (280, 280), "quick_gelu", 5e-4)):
            clip_folder(tmp_path / name, activation=activation)
            reward = rewards.load(f"{name}@{tmp_path / name}")
            assert reward(waves(4, size),
                          CLIP_PROMPTS).tolist() == pytest.approx(ORIGINAL_SCORES[name], rel=2e-5)
            # a tensor scores as its saved picture
            assert torch.allclose(reward(as_batch(large), CLIP_PROMPTS),
                                  reward(large, CLIP_PROMPTS), atol=tolerance)
            behaves(reward, 2e-5)

    def test_reward_texts_are_read_once(self, tmp_path):
        clip_folder(tmp_path)
        clip, read = rewards.clip_at("clip", rewards.CLIP_L, "cpu", str(tmp_path)), []
        tokenize = clip.tokenize
        clip.tokenize = lambda texts: read.extend(texts) or tokenize(texts)
        many = [f"{chr(97 + i % 26)} {chr(97 + i // 26 % 26)} {chr(97 + i // 676)}"
                for i in range(4096)]
        first = clip.text(["a cat", "a dog", "a cat"])
        clip.text(["a dog"])
        assert read == ["a cat", "a dog"]
        assert torch.equal(first[0], first[2])
        clip.model.text_model, inner = torch.nn.Identity(), clip.model.text_model
        clip.model.text_model.forward = lambda input_ids: types.SimpleNamespace(
            pooler_output=input_ids[:, :32].float())
        clip.text(many)
        assert len(clip.known) == 4096  # the memory is bounded
        clip.model.text_model = inner
        assert torch.allclose(clip.text(["a cat"]), first[:1], atol=1e-6)

    def test_reward_aesthetic(self, tmp_path):
        clip_folder(tmp_path, 768, "quick_gelu")
        images = waves(4, (640, 427))
        for name in ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth"):
            torch.save(head_weights(768), tmp_path / name)
            reward = rewards.load(f"aesthetic@{tmp_path}")
            scores = reward(images, CLIP_PROMPTS).tolist()
            assert scores == pytest.approx(ORIGINAL_SCORES["aesthetic"], abs=3e-6)
            (tmp_path / name).unlink()
        assert torch.equal(reward(images, CLIP_PROMPTS), reward(images, ["another"] * 4))
        behaves(reward, 1e-6)

    def test_reward_hpsv2(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rewards, "VIT_H", SMALL_CLIP)
        weights = open_clip_weights()
        clip_tokenizer(tmp_path)
        torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
        reward = rewards.load(f"hpsv2@{tmp_path}")
        images = waves(4, (640, 427))
        tall = reward(waves(4, (85, 320)), CLIP_PROMPTS)
        scores = reward(images, CLIP_PROMPTS).tolist()
        assert scores == pytest.approx(ORIGINAL_SCORES["hpsv2"], abs=3e-6)
        assert tall.tolist() == pytest.approx(ORIGINAL_SCORES["hpsv2 tall"], abs=3e-6)
        assert torch.allclose(reward(images, ["\uff41 cat", "a red dog", "two&#32;birds", "a cat"]),
                              reward(images, CLIP_PROMPTS))
        behaves(reward)
        torch.save({"state_dict": weights},
                   tmp_path / "HPS_v2_compressed.pt")  # version 2.0, the authors', by its file
        plain = rewards.tokenizer_at
        monkeypatch.setattr(rewards, "tokenizer_at", lambda repo, path,
                            length: plain(repo, tmp_path, length))
        other = rewards.load(f"hpsv2@{tmp_path / 'HPS_v2_compressed.pt'}")
        assert torch.allclose(other(images, CLIP_PROMPTS), reward(images, CLIP_PROMPTS))
        # a file that lacks a weight must not be filled up with noise
        del weights["ln_final.weight"]
        torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
        with pytest.raises(UserError, match="final_layer_norm.weight"):
            rewards.load(f"hpsv2@{tmp_path}")

    def test_reward_imagereward(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rewards, "BLIP_TEXT", SMALL_BLIP_TEXT)
        monkeypatch.setattr(rewards, "BLIP_VISION", SMALL_BLIP_VISION)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "dog", "two",
                 "birds"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        torch.save(blip_weights(), tmp_path / "ImageReward.pt")
        reward = rewards.load(f"imagereward@{tmp_path}")
        images = waves(4, (640, 427))
        scores = reward(images, CLIP_PROMPTS).tolist()
        assert scores == pytest.approx(ORIGINAL_SCORES["imagereward"], abs=3e-6)
        behaves(reward)

    def test_reward_hpsv3(self, monkeypatch, tmp_path):
        grads = []

        class Inferencer:
            def __init__(self, device, checkpoint_path=None):
                if device == "meta":
                    raise OSError("no hub\nin reach")
                self.bonus = 4 if checkpoint_path else 0

            def reward(self, prompts, image_paths):
                grads.append(torch.is_grad_enabled())
                return torch.tensor([[np.array(Image.open(path)).mean() + len(prompt) + self.bonus,
                                      99.]
                                     for prompt, path in zip(prompts, image_paths)])
        package = types.ModuleType("hpsv3")
        package.HPSv3RewardInferencer = Inferencer
        monkeypatch.setitem(sys.modules, "hpsv3", package)
        images, prompts = some_images(11), [f"{'x' * i}" for i in range(11)]
        assert np.allclose(rewards.load("hpsv3", "cuda")(images, prompts),
                           mean_red(images, prompts))
        (tmp_path / "four").write_text("weights")
        assert np.allclose(rewards.load(f"hpsv3@{tmp_path / 'four'}", "cuda")(images, prompts),
                           np.array(mean_red(images, prompts)) + 4)
        assert rewards.hpsv3("cuda")(images[:1], ["a"])
        assert not any(grads)
        with pytest.raises(UserError, match=r"special token <\|Reward\|>"):
            rewards.load("hpsv3", "cuda")(images[:1], ["a <|Reward|> cat"])
        for spec, device in (("hpsv3", "cpu"), (f"hpsv3@{tmp_path}", "cuda"),
                             ("hpsv3@/no/file", "cuda")):
            with pytest.raises(UserError, match="hpsv3 matplotlib tensorboard rich tyro") as caught:
                rewards.load(spec, device)
            assert "\n" not in str(caught.value)




_RW_LEFT, _RW_RIGHT, _RW_LOW = (0, 40, 20, 60), (80, 40, 100, 60), (0, 80, 20, 100)

_RW_TWO = {"tag": "two_object", "include": [{"class": "dog", "count": 1},
                                            {"class": "cat", "count": 1}]}

_RW_COUNT = {"tag": "counting", "include": [{"class": "dog", "count": 3}],
             "exclude": [{"class": "dog", "count": 4}]}

_RW_COLOUR = {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"},
                                               {"class": "cat", "count": 1, "color": "blue"}]}

_RW_PLACE = {"tag": "position", "include": [{"class": "cat", "count": 1},
                                            {"class": "dog", "count": 1,
                                             "position": ["left of", 0]}]}


# ===== rewards.py: served

@contextmanager
def running(bound):
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
def serving(reward, **options):
    """A server in a thread -> it and its URL."""
    bound = rewards.server(reward, **({"port": 0} | options))
    with running(bound) as served:
        yield served

@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("REWARD_TOKEN", "REWARD_TIMEOUT", "VLM_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REWARD_PATIENCE", "20")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

def post(url, body, headers=None):
    """Raw POST -> status, JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers or {}),
                                    timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())

def png_text(image=None, kind="PNG"):
    file = io.BytesIO()
    (image or Image.new("RGB", (4, 4))).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()

@pytest.fixture(scope="module")
def rw_fragile():
    def fragile(images, prompts):
        if "raise" in prompts:
            raise ValueError("broken")
        return [math.inf if prompt == "inf" else len(prompt) for prompt in prompts]
    with serving(reward_of(fragile), max_body=200_000) as (_, url):
        yield url

class Script(BaseHTTPRequestHandler):
    """Answers the requests of a test with what its list says: (status, body[, headers]) or seconds
    to stay silent."""

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
def scripted(script, usual=None):
    bound = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    bound.script, bound.usual, bound.requests, bound.lock = script, usual, [], threading.Lock()
    with running(bound) as served:
        yield served

def reply(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}

def vlm_at(url):
    reward = rewards.load(f"vlm@{url}/v1?model=some/judge")
    return reward, next(iter(reward.parts.values()))


NAN = math.nan
REPLIES = [  # what judges say -> the score
    ("Score: 7", 7), ("Score: 7.5", 7.5), ("score: 8/10", 8), ("Score: 7.5/10 - good", 7.5),
    ("Score: 7/10 - good", 7),
    ("Rating: 8/10", 8), ('{"score": 8}', 8), ('```json\n{"score": 6.5}\n```', 6.5),
    ('{"Rating": "9"}', 9), ("**Score: 9**", 9),
    ("Score (0-10): 8", 8), ("The score is 7,5", 7.5), ("8", 8), ("8/10", 8), ("8 out of 10", 8),
    (".5", .5), ("I'd say 6.", 6),
    ("It shows 3 cats and 2 dogs.\nScore: 4", 4), ("<think>the score 2 at first</think> 8/10", 8),
    ("Score = 10", 10),
    ("<think>score: 2</think>Score: 9", 9), ("Score: 0", 0), ("score of 3", 3),
    ("Score: 5 and again: score: 5", 5),
    ("Score: 10/10", 10), ("My rating is 6/10.", 6),
    ("4.5/5", NAN), ("4 out of 5", NAN), ("8%", NAN), ("Score: 80%", NAN), ("Score: 11", NAN),
    ("Score: -3", NAN),
    ("Score: 7-8", NAN), ("Score: 7 or 8", NAN), ("Score: 6 to 8", NAN),
    ("score: 3 ... final score: 8", NAN), ("", NAN),
    ("no number", NAN), ("<think>it has a score of 7", NAN),
    ("There are 3 cats, 2 dogs and one bird in it", NAN),
    ("Score: 85/100", NAN), ('{"score": null}', NAN), ("1 2", NAN)]


def not_ignored():
    """In a child before it is executed: SIGINT as a terminal has it, also where pytest is a
    background job."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class TestRewardsPyServed:
    """Servers and clients on this machine."""

    def test_reward_served_to_eight_clients(self):
        busy, overlaps = threading.Semaphore(1), []

        def alone(images, prompts):
            if not busy.acquire(blocking=False):
                overlaps.append(1)
            time.sleep(.01)
            scores = [math.nan if len(prompt) == 7 else score for prompt,
                      score in zip(prompts, mean_red(images, prompts))]
            busy.release()
            return scores
        images, prompts = some_images(1000, (12, 10)), ["x" * (i % 50) for i in range(1000)]
        expected = reward_of(alone).score(images, prompts)["mine"].numpy()
        got = [None] * 8
        with serving(reward_of(alone)) as (_, url):
            def client(k):
                got[k] = rewards.load(url).score(images[k::8], prompts[k::8])[url].numpy()
            threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            with urllib.request.urlopen(url + "/health") as answer:
                assert json.loads(answer.read()) == {"name": "mine"}
        assert all(np.array_equal(got[k], expected[k::8], equal_nan=True) for k in range(8))
        assert not overlaps
        assert np.isnan(expected).sum() == 20

    def test_reward_client_gives_up(self, monkeypatch):
        with serving(reward_of(mean_red)) as (_, url):
            pass
        monkeypatch.setenv("REWARD_PATIENCE", "0.3")
        start = time.monotonic()
        with pytest.raises(UserError, match=r"refused.*gave up after 0.3 s"):
            rewards.load(url)(some_images(1), ["a"])
        assert .3 <= time.monotonic() - start < 5
        monkeypatch.setenv("REWARD_PATIENCE", "soon")
        with pytest.raises(UserError, match="REWARD_PATIENCE='soon'.*seconds"):
            rewards.load(url)(some_images(1), ["a"])

    def test_reward_client_waits_as_told(self, capfd):
        script = [(429, b"busy", {"Retry-After": "1"}), (503, b"still"),
                  (200, {"scores": [1, None]})]
        with scripted(script) as (bound, url):
            start = time.monotonic()
            got = rewards.load(url)(some_images(2), ["a", "b"])
            # 1 as asked, 1 of its own
            assert 2 <= time.monotonic() - start < 6
            assert got[0] == 1
            assert got[1].isnan()
        err = capfd.readouterr().err
        assert err.count("HTTP 429: busy; trying again") == 1
        assert err.count("trying again") == 1

    def test_reward_vlm_asks(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "key")

        # the judge reads the number of a prompt off its text, and knows the picture's size
        def usual(request):
            picture, text = request["messages"][0]["content"]
            url = picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
            data = base64.b64decode(url, validate=True)
            width = Image.open(io.BytesIO(data), formats=["JPEG"]).width
            number = int(text["text"].split("number ")[1][0])
            return reply(f"I see 99 things. Score: {number + width / 100}")
        with scripted([], usual) as (bound, url):
            reward, part = vlm_at(url)
            images = [Image.new("RGB", (10 + i, 8)) for i in range(9)]
            got = reward(images, [f"number {i}" for i in range(9)])
        assert np.allclose(got, [i + (10 + i) / 100 for i in range(9)])
        assert part.silent == 0
        path, headers, request = bound.requests[0]
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer key"
        assert request["model"] == "some/judge"
        assert request["temperature"] == 0

    def test_reward_server_refuses_and_lives(self):
        """Each with its status and one line of JSON."""
        good = {"prompts": ["a"], "images": [png_text(some_images(1)[0])]}
        with serving(reward_of(mean_red), token="key") as (_, url):
            key = {"Authorization": "Bearer key"}
            assert post(url + "/score", json.dumps(good).encode())[0] == 401
            for body, status in ((b"[1", 400), (b'{"prompts": ["a"]}', 400),
                                 (b'{"prompts": [1], "images": ["x"]}', 400),
                                 (json.dumps({**good, "images": ["!"]}).encode(), 400),
                                 (json.dumps({**good, "images": ["aGk="]}).encode(), 400),
                                 (json.dumps(good).encode(), 200)):
                got, answer = post(url + "/score", body, key)
                assert got == status, answer
                assert "\n" not in str(answer)
            assert post(url + "/other", json.dumps(good).encode(), key)[0] == 404

    @pytest.mark.parametrize("status,answer,words", (
        (301, {}, "redirect"), (307, {}, "redirect"), (400, {"error": "bad"}, "HTTP 400"),
        (401, {}, "HTTP 401"),
        (402, {"error": "quota"}, "quota"), (422, {}, "HTTP 422"),
        (429, {"error": {"code": "insufficient_quota"}}, "quota"),
        (200, b"<html>", "not JSON"), (200, {"scores": [1, 2]}, "scores"),
        (200, {"error": "no GPU"}, "no GPU")))
    def test_reward_client_stops_at_permanent_answers(self, status, answer, words):
        with scripted([(status, answer, {"Location": "http://elsewhere/"})]) as (bound, url):
            with pytest.raises(UserError, match=words):
                rewards.load(url)(some_images(1), ["a"])
        assert len(bound.requests) == 1, "asked once"

    def test_reward_urls_and_times_that_cannot_be(self, monkeypatch):
        with pytest.raises(UserError, match="credentials"):
            rewards.load("http://user:password@127.0.0.1:9")
        monkeypatch.setenv("REWARD_TIMEOUT", "0")
        with pytest.raises(UserError, match="REWARD_TIMEOUT"):
            rewards.load("http://127.0.0.1:9")(some_images(1), ["a"])

    def test_reward_served_sees_whole_prompts(self):
        calls = []

        def seen(images, prompts):
            calls.append(list(prompts))
            return [0.0] * len(images)

        prompts = ["a"] * 24 + ["b"] * 24 + ["c"] * 24 + ["d"] * 100
        with serving(reward_of(seen)) as (_, url):
            rewards.load(url)(some_images(172, (4, 4)), prompts)
        assert [sorted(set(call)) for call in calls] == [["a", "b", "c"], ["d"]]

    @pytest.mark.parametrize("text,value", REPLIES)
    def test_reward_vlm_replies(self, text, value):
        assert rewards.number_in(text) == pytest.approx(value, nan_ok=True)

    def test_reward_vlm_without_an_opinion(self, capfd):
        """A filter, a refusal without an answer and reasoning alone are no opinion; the first is
        shown, all are counted."""
        script = [(400, {"error": {"code": "content_filter", "message": "filtered"}}),
                  (200, {"choices": [{"finish_reason": "content_filter",
                                      "message": {"content": ""}}]}),
                  (200, {"choices": [{"message": {"content": None,
                                                  "reasoning_content": "Score: 3"}}]}),
                  reply("Score: 4")]
        with scripted(script) as (_, url):
            reward, part = vlm_at(url)
            scores = [float(reward(some_images(1), ["a"])) for _ in range(4)]
        assert scores == pytest.approx([math.nan] * 3 + [4], nan_ok=True)
        assert part.silent == 3
        assert capfd.readouterr().err.count("no opinion") == 1

    def test_reward_vlm_speaks_to_other_endpoints(self):
        """One that knows no schema, then one that knows neither max_tokens nor a temperature."""
        script = [(400, {"error": "response_format is not supported"}),
                  (400, {"error": "use max_completion_tokens, not max_tokens"})]
        with scripted(script, lambda request: reply("7")) as (bound, url):
            reward, _ = vlm_at(url)
            assert float(reward(some_images(1), ["a"])) == 7
            reward(some_images(1), ["a"])
        names = [set(request) - {"model", "messages"} for _, _, request in bound.requests]
        assert names == [{"temperature", "max_tokens", "response_format"},
                         {"temperature", "max_tokens"},
                         {"max_completion_tokens"}, {"max_completion_tokens"}]

    @pytest.mark.parametrize("given,asked", (("/v1", "/v1/chat/completions"),
                                             ("", "/v1/chat/completions"),
                                             ("/v1beta/openai", "/v1beta/openai/chat/completions"),
                                             ("/x/chat/completions", "/x/chat/completions")))
    def test_reward_vlm_addresses(self, given, asked):
        with scripted([], lambda request: reply("7")) as (bound, url):
            rewards.load(f"vlm@{url}{given}?model=m")(some_images(1), ["a"])
        assert bound.requests[0][0] == asked

    def test_reward_vlm_yes_or_no(self, tmp_path):
        """P(yes) / (P(yes) + P(no)) of the first token, with a question of one's own; an endpoint
        without logprobs."""
        def answer(tokens):
            top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
            return 200, {"choices": [{"message": {"content": "Yes"},
                                      "logprobs": {"content": [{"top_logprobs": top}]}}]}

        (tmp_path / "question.txt").write_text("Is {prompt} here?")
        script = [answer({"Yes": .5, " yes": .1, "No": .2, "Maybe": .2}), answer({"Hm": 1.0}),
                  reply("Yes")]
        with scripted(script) as (bound, url):
            question = tmp_path / "question.txt"
            reward = rewards.load(f"vlm@{url}/v1?model=m&yes=1&question={question}")
            assert float(reward(some_images(1), ["a cat"])) == pytest.approx(0.75)
            assert math.isnan(reward(some_images(1), ["a cat"]))
            with pytest.raises(UserError, match="top_logprobs"):
                reward(some_images(1), ["a cat"])
        assert bound.requests[0][2]["messages"][0]["content"][1]["text"] == "Is a cat here?"
        assert bound.requests[0][2]["logprobs"] is True

    def test_reward_vlm_of_another_scale(self):
        with scripted([], lambda request: reply("Score: 4/5")) as (bound, url):
            reward = rewards.load(f"vlm@{url}/v1?model=m&scale=1-5")
            assert float(reward(some_images(1), ["a"])) == 4
        assert "from 1 to 5" in bound.requests[0][2]["messages"][0]["content"][1]["text"]

    def test_reward_cli(self, tmp_path, capsys):
        images = some_images(2, (40, 30))
        paths = [str(tmp_path / f"{i}.png") for i in range(2)]
        [image.save(path) for image, path in zip(images, paths)]
        rewards.main(["score", "jpeg,incompressibility=2", "--prompt", "a cube", *paths])
        head, *lines = capsys.readouterr().out.splitlines()
        assert head.split("\t") == ["jpeg", "incompressibility", "combined", "file"]
        sizes = rewards.load("incompressibility")(images, ["p"] * 2)
        for line, path, size in zip(lines, paths, sizes):
            jpeg, size_, combined, file = line.split("\t")
            assert (float(jpeg), float(size_), file) == (pytest.approx(-size.item()),
                                                         pytest.approx(size.item()), path)
            assert float(combined) == pytest.approx(1 if size == sizes.max() else -1)
        rewards.main(["list"])
        table = capsys.readouterr().out
        assert all(name in table for name in rewards.REWARDS)
        assert "yuvalkirstain/PickScore_v1" in table
        assert "3.9 GB" in table

    def test_reward_cli_process(self, tmp_path):
        """As a program: a wrong spec gives one line and 2; a server starts, answers, and stops at
        an interrupt."""
        command = [sys.executable, str(ROOT / "rewards.py")]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path),
                                    "CUDA_VISIBLE_DEVICES": ""}
        wrong = subprocess.run([*command, "serve", "pickscore"], capture_output=True, text=True,
                               env=environment)
        assert wrong.returncode == 2
        assert wrong.stderr.splitlines()[-1].startswith("error: reward 'pickscore': config.json")
        assert "Traceback" not in wrong.stderr
        process = subprocess.Popen([*command, "serve", "jpeg", "--port", "0"],
                                   stdout=subprocess.PIPE, text=True,
                                   env=environment, preexec_fn=not_ignored)
        try:
            url = process.stdout.readline().split()[-1]
            images = some_images(3)
            assert torch.equal(rewards.load(url)(images, list("abc")),
                               rewards.load("jpeg")(images, list("abc")))
        finally:
            process.send_signal(2)
        assert process.wait(120) == 0


# ===== a hub in a box

class Hub(BaseHTTPRequestHandler):
    """Repositories in folders, as the hub serves them: HEAD and GET of files with ETag, commit and
    Range, and the list of a repository's files. server.broken: files whose connection breaks once
    in the middle."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Quiet."""

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((self.command, path))
        listed = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/\w+)?", path)
        file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path)
        repo = (listed or file or [None, ""])[1]
        if repo in hub.gated:
            return self.reply(401, b"{}", X_Error_Code="GatedRepo",
                              X_Error_Message="Access is restricted")
        folder = hub.folder / repo
        if not repo or not folder.is_dir():
            return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        if listed:
            files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
            siblings = [{"rfilename": str(f.relative_to(folder)), "size": f.stat().st_size}
                        for f in files]
            body = {"id": repo, "modelId": repo, "sha": "a" * 40, "siblings": siblings, "tags": [],
                    "private": False}
            return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
        if not (folder / file[2]).is_file():
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit="a" * 40)
        data = (folder / file[2]).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": "a" * 40,
                   "Accept_Ranges": "bytes"}
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if first:
            rest = data[int(first[1]):]
            headers["Content_Range"] = f"bytes {first[1]}-{len(data) - 1}/{len(data)}"
            hub.resumed.append(file[2])
            return self.reply(206, rest, **headers)
        if self.command == "GET" and file[2] in hub.broken:
            hub.broken.discard(file[2])
            self.send_response(200)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[:len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            return None
        return self.reply(200, data, **headers)

    do_HEAD = do_GET


@pytest.fixture
def hub(models, tmp_path):
    """A hub with SD-Turbo and SDXL-Turbo of tiny size, in both precisions, with what else lies
    beside them, and CLIP."""
    for kind, name in (("sd", "sd-turbo"), ("sdxl", "sdxl-turbo")):
        folder = tmp_path / "hub" / "stabilityai" / name
        shutil.copytree(models / kind, folder)
        for file in list(folder.rglob("*.safetensors")):
            shutil.copy(file, file.with_name(file.name.replace(".safetensors",
                                                               ".fp16.safetensors")))
            shutil.copy(file, file.with_suffix(".bin"))
        (folder / "sd_turbo.safetensors").write_bytes(b"the single-file checkpoint")
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "model.safetensors").write_bytes(b"not used")
        index = json.loads((folder / "model_index.json").read_text())
        index.update(safety_checker=[None, None], feature_extractor=[None, None])
        (folder / "model_index.json").write_text(json.dumps(index))
    clip = tmp_path / "hub" / "openai" / "clip-vit-large-patch14"
    clip.mkdir(parents=True)
    clip_folder(clip)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tmp_path / "hub"
    server.asked, server.resumed = [], []
    server.gated, server.broken = set(), set()
    with running(server) as (_, url):
        server.url = url
        yield server


def on_hub(hub, *argv, script="drpo.py", **env):
    """A program of ours in a process of its own, whose hub is this one."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(hub.folder.parent / "cache"),
           "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1", **env}
    return subprocess.run([sys.executable, str(HERE / script), *map(str, argv)],
                          cwd=hub.folder.parent, env=env, text=True, capture_output=True)


TINY = ("--prompts animals --reward jpeg --features vae --steps 1 --batch 1 --candidates 4 "
        "--anchors 2 --device cpu --preview-every 0").split()


XL = "stabilityai/stable-diffusion-xl-base-1.0"
ONE_STEP_UNETS = [
    ("tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin", ["--timestep", "399"]),
    ("ByteDance/Hyper-SD/Hyper-SDXL-1step-Unet.safetensors", ["--timestep", "800"]),
    ("ByteDance/SDXL-Lightning/sdxl_lightning_1step_unet_x0.safetensors",
     ["--prediction", "sample"]),
    ("ChenDY/NitroFusion/nitrosd-realism_unet.safetensors", ["--timestep", "249"])]


class TestAHubInABox:
    """README's commands as a stranger's first start, at a hub of tiny repositories."""

    def test_first_start_resume_eval_and_offline(self, hub):
        """What is used is fetched, once, with a line before and after; then nothing is asked of the
        hub's files."""
        done = on_hub(hub, "--model", "sd-turbo", "--watch", "clip", "--out", "sd", *TINY)
        assert done.returncode == 0, done.stderr
        for repo in ("stabilityai/sd-turbo", "openai/clip-vit-large-patch14"):
            assert f"fetching {repo}, " in done.stderr
            assert f"fetched {repo}" in done.stderr
        fetched = {path.split("/resolve/main/")[1] for command, path in hub.asked
                   if command == "GET" and "sd-turbo/resolve/" in path}
        weights = {name for name in fetched if name.endswith((".safetensors", ".bin"))}
        assert weights == {"unet/diffusion_pytorch_model.fp16.safetensors",
                           "vae/diffusion_pytorch_model.fp16.safetensors",
                           "text_encoder/model.fp16.safetensors"}
        hub.asked.clear()
        done = on_hub(hub, "--resume", "sd", "--steps", "2")
        assert done.returncode == 0, done.stderr
        assert "fetch" not in done.stderr
        done = on_hub(hub, "sd", "--limit", 1, "--samples", 1, "--prompts", "animals",
                      script="eval.py", HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        assert not [path for command, path in hub.asked if command == "GET" and "/resolve/" in path]

    def test_sdxl_turbo(self, hub):
        done = on_hub(hub, "--model", "sdxl-turbo", "--out", "xl", *TINY)
        assert done.returncode == 0, done.stderr
        assert (hub.folder.parent / "xl" / drpo.LORA_FILE).exists()

    @pytest.mark.parametrize("file,flags", ONE_STEP_UNETS)
    def test_one_step_unets_in_the_place_of_the_base_s(self, file, flags, hub, models):
        """README's lines: SDXL base has a leading schedule; its own UNet is not fetched; the LoRA
        says where it belongs."""
        base = hub.folder / XL
        shutil.copytree(models / "sdxl", base)
        scheduler = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
        scheduler.update(_class_name="EulerDiscreteScheduler", timestep_spacing="leading",
                         steps_offset=1)
        (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        (hub.folder / file).parent.mkdir(parents=True)
        weights = models / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors"
        if file.endswith(".bin"):
            torch.save(rewards.read_weights(weights), hub.folder / file)
        else:
            shutil.copy(weights, hub.folder / file)
        done = on_hub(hub, "--model", XL, "--unet", file, *flags, "--out", "xl", *TINY)
        assert done.returncode == 0, done.stderr
        assert not [path for command, path in hub.asked if command == "GET"
                    and "/unet/diffusion" in path]
        metadata = drpo.read_lora(hub.folder.parent / "xl")[1]
        assert (metadata["drpo_base"], metadata["unet"]) == (XL, file)
        assert ("--timestep" in flags) == (metadata["timestep"] != "-1")
        if "DMD2" in file:
            done = on_hub(hub, "xl", "--limit", 1, "--samples", 1, "--prompts", "animals",
                          script="eval.py", HF_HUB_OFFLINE="1")
            assert done.returncode == 0, done.stderr

    def test_a_connection_that_breaks_goes_on(self, hub):
        """In the middle of a weight: it is asked for again, now or at the next start, and the run
        is made."""
        weight = "unet/diffusion_pytorch_model.fp16.safetensors"
        hub.broken.add(weight)
        first = on_hub(hub, "--model", "sd-turbo", "--out", "a", *TINY)
        if first.returncode:  # the library itself may have gone on
            last = first.stderr.strip().splitlines()[-1]
            assert last.startswith("error: stabilityai/sd-turbo could not be read")
            assert "Traceback" not in first.stderr
            assert on_hub(hub, "--model", "sd-turbo", "--out", "a", *TINY).returncode == 0
        assert (hub.folder.parent / "a" / drpo.LORA_FILE).exists()
        asked = [path for command, path in hub.asked if command == "GET" and path.endswith(weight)]
        assert len(asked) > 1

    def test_what_goes_wrong_is_one_line(self, hub):
        hub.gated.add("stabilityai/sdxl-turbo")
        (hub.folder / "stabilityai" / "sd-turbo" / "vae" / "config.json").unlink()
        for argv, words in ((["--model", "sdxl-turbo"], "hf auth login"),
                            (["--model", "nobody/nothing"], "does not exist"),
                            (["--model", "sd-turbo"], "could not be read")):
            done = on_hub(hub, *argv, *TINY)
            assert done.returncode == 2, done.stderr
            assert words in done.stderr.strip().splitlines()[-1]
            assert "Traceback" not in done.stderr
        offline = on_hub(hub, "--model", "sd-turbo", *TINY, HF_HUB_OFFLINE="1",
                         HF_HOME=str(hub.folder / "empty"))
        assert offline.returncode == 2
        assert "--model toy" in offline.stderr


# ===== eval.py

@pytest.fixture(scope="session")
def eval_generator():
    return drpo.load_generator("toy")

@pytest.fixture(scope="session")
def eval_runs(eval_generator, tmp_path_factory):
    """Two runs of the toy as training leaves them: one whose LoRA was never trained, one of random
    weights."""
    G, folders = eval_generator, []
    for name, scale in (("untrained", 0.0), ("moved", 0.2)):
        torch.manual_seed(0)
        params = G.add_lora(4, 4.0)
        for p in params:
            p.data += scale * torch.randn(p.shape) * p.shape[-1] ** -0.5
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(model="toy", reward="scene",
                                                            watch="jpeg", seed=0)))
        (folder / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5, "diversity": 1.0}\n')
        G.save_lora(folder)
        folders.append(folder)
    return folders

def eval_main(capsys, *argv):
    """eval.main -> (exit code, stdout, stderr)."""
    code = 0
    try:
        E.main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err

class JudgeHandler(BaseHTTPRequestHandler):
    """Prefers the picture of more bytes; prompts with tie, mute or first get: tie, no answer,
    always A."""

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
def judge_at():
    """Address of a judge that runs on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), JudgeHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1?model=m"
    server.shutdown()
    server.server_close()


class TestEvalPy:
    """Statistics, report, pictures."""

    def test_eval_untrained_lora_changes_nothing_and_the_report_repeats(self, eval_runs, tmp_path,
                                                                        capsys):
        reports = []
        for n in (1, 2):
            folder = tmp_path / str(n)
            code, out, _ = eval_main(capsys, eval_runs[0], "--limit", 6, "--samples", 4,
                                     "--device", "cpu", "--out", folder)
            assert code == 0
            assert "win rate" in out
            assert (folder / "report.md").read_text() in out
            reports.append((tmp_path / str(n) / "report.json").read_bytes())
        assert reports[0] == reports[1]
        c = json.loads(reports[0])["columns"]["untrained"]
        for figures in (*c["rewards"].values(), c["accuracy"]["scene"]["all"]):
            assert figures["difference"] == [0, 0, 0]
            assert figures["win_rate"] == [0.5, 0.5, 0.5]
        assert set(c["rewards"]) == {"scene", "jpeg"}
        assert c["distance"] == 0
        assert c["diversity"]["relative"] == [1, 1, 1]
        assert Image.open(tmp_path / "1" / "grid.png").width > 6 * 64

    def test_eval_table_has_a_column_for_each_run_and_for_best_of(self, eval_runs, judge_at,
                                                                  tmp_path, capsys):
        code, out, _ = eval_main(capsys, *eval_runs, "--limit", 4, "--samples", 2, "--best-of", 3,
                                 "--judge", judge_at, "--device", "cpu", "--out", tmp_path)
        report = json.loads((tmp_path / "report.json").read_text())
        assert code == 0
        assert list(report["columns"]) == ["base", "untrained", "moved", "base best-of-3"]
        assert "judge, moved: win rate against base" in out
        assert "| judge: win rate against base |" in (tmp_path / "report.md").read_text()
        best, moved = report["columns"]["base best-of-3"], report["columns"]["moved"]
        # the base's own picture is one of the candidates
        assert best["rewards"]["scene"]["win_rate"][0] >= 0.5
        assert moved["distance"] > 0.02
        assert report["columns"]["untrained"]["distance"] == 0
        assert set(best["accuracy"]["scene"]) > {"all"}
        # the stand-in finds neither of two equal pictures larger and says B: undecided, so a tie
        assert report["columns"]["untrained"]["judge"]["win_rate"] == [0.5, 0.5, 0.5]
        assert sum(moved["judge"][k] for k in ("wins", "ties", "losses")) == 4
        assert moved["judge"]["no_answer"] == 0

    def test_eval_pictures_depend_on_no_batch_and_match_the_generator(self, eval_generator):
        G, prompts = eval_generator, ["a red circle", "two blue squares", "a triangle"]
        found = []
        for batch in (2, 5):
            index, x = zip(*[(p, x) for p, x, _ in E.generate(G, prompts, 3, 7, batch)])
            assert sum(index, []) == [0, 1, 2]
            found.append(torch.cat(x))
        assert torch.allclose(*found, atol=1e-4)
        fewer = torch.cat([x for _, x, _ in E.generate(G, prompts, 2, 7, 16)])
        # noise i is the same for any n
        assert torch.allclose(fewer, found[0][:, :2], atol=1e-4)

    def test_eval_bootstrap_interval_covers_the_truth(self):
        rng, hits, trials = np.random.default_rng(1), 0, 400
        for _ in range(trials):
            # prompts differ, and so do the pictures of a prompt
            effect = 0.3 + rng.normal(0, 1, (60, 1))
            value, low, high = E.mean_interval(effect + rng.normal(0, 2, (60, 4)))
            assert low <= value <= high
            hits += low <= 0.3 <= high
        # 0.95 within three standard errors, less the bias of 60 clusters
        assert 0.91 <= hits / trials <= 0.98
        # 3000 pictures, but only 60 prompts
        naive = E.mean_interval(np.repeat(rng.normal(0, 1, (60, 1)), 50, 1))
        assert naive[2] - naive[1] > 0.3

    def test_eval_interval_of_little_or_nothing(self):
        assert E.interval([], []) == [None, None, None]
        assert E.interval([2.0], [4]) == [0.5, None, None]
        assert E.mean_interval(np.array([[np.nan, 1.0], [np.nan, np.nan], [3.0, 5.0]]))[0] == 3.0

    def test_eval_win_rate_counts_ties_as_half(self):
        found = E.compare([[1.0, 2.0], [3.0, np.nan]], [[1.0, 3.0],
                                                        [2.0, 9.0]])  # tie, win; loss, no opinion
        assert found["win_rate"][0] == pytest.approx(0.5)
        assert found["difference"][0] == pytest.approx(0.0)
        assert E.compare([[1.0], [1.0]], [[2.0], [1.0]])["win_rate"][0] == pytest.approx(0.75)

    def test_eval_diversity_against_a_double_loop(self):
        x, keep = torch.randn(5, 4, 7), np.random.default_rng(0).random((5, 4)) < 0.6
        keep[0], keep[1] = False, True
        for p, found in enumerate(E.pair_distances(x, keep)):
            pairs = [float((x[p, i] - x[p, j]).norm()) for i in range(4) for j in range(i)
                     if keep[p, i] and keep[p, j]]
            assert found == pytest.approx(np.mean(pairs), rel=1e-5) if pairs else np.isnan(found)

    def test_eval_diversity_of_right_pictures_is_compared_on_the_same_prompts(self):
        # an easy prompt of little, a hard one of much diversity
        base = torch.tensor([[[0.0], [1.0]], [[0.0], [10.0]]])
        right_base, right_tuned = np.array([[True, True], [True, False]]), np.ones((2, 2), bool)
        found = E.diversity(base, base, right_base, right_tuned)
        # the very same pictures: no more, no less diverse
        assert found["relative"][0] == 1.0
        assert found["prompts"] == 1
        assert found["own"] == pytest.approx(5.5)
        assert E.diversity(base, base, ~right_tuned, right_tuned)["relative"] == [None, None, None]

    def test_eval_best_of_against_a_loop(self):
        P, N, S = 5, 3, 4
        scores = {"a": torch.randn(P, N * S), "b": torch.randn(P, N * S),
                  "c": torch.randn(P, N * S)}
        scores["a"][0, :] = torch.nan
        reward = rewards.Reward("a,b", {"a": None, "b": None}, {"a": 1.0, "b": 0.5})
        index = E.best_index(reward, ["a", "b"], scores, S)
        for p in range(P):
            for s in range(S):
                slots = [c * S + s for c in range(N)]
                values = reward.combine({k: scores[k][p, slots] for k in "ab"}).tolist()
                assert index[p, s] == slots[int(np.argmax(values))]

    def test_eval_judge_asks_in_both_orders(self, judge_at):
        plain = Image.new("RGB", (64, 64))
        rich = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        prompts = ["x", "y", "a tie", "a mute one", "the first one"]
        found = E.judge(judge_at, prompts, [plain, rich, plain, plain, plain],
                        [rich, plain, rich, rich, rich])
        assert {k: found[k] for k in ("wins", "ties", "losses", "no_answer",
                                      "order_decided")} == dict(
            wins=1, ties=2, losses=1, no_answer=1, order_decided=1)
        assert found["win_rate"][0] == 0.5

    def test_eval_generate_writes_pictures_side_by_side(self, eval_runs, tmp_path, capsys):
        code, _, _ = eval_main(capsys, eval_runs[1], "--generate", "a red circle", "--generate",
                               "two blue squares",
                              "--samples", 2, "--device", "cpu", "--out", tmp_path)
        assert code == 0
        assert (tmp_path / "generate.png").exists()
        assert len(list((tmp_path / "generate").iterdir())) == 8

    def test_eval_bad_input_is_one_line(self, eval_runs, tmp_path, capsys):
        from safetensors.torch import load_file, save_file
        (tmp_path / "empty.txt").write_text("\n\n")
        (tmp_path / "folder").mkdir()
        state = load_file(eval_runs[0] / drpo.LORA_FILE)
        save_file(state, tmp_path / "other.safetensors", metadata={"drpo_base": "sdxl-turbo",
                                                                   "ss_network_dim": "16"})
        save_file({**state, "unet.conv_in.lora_A.weight": torch.zeros(2, 2)},
                  tmp_path / "more.safetensors",
                  metadata={"drpo_base": "elsewhere/toy", "ss_network_dim": "16"})
        (tmp_path / "torn.safetensors").write_bytes(b"123")
        for argv, words in [
                ([tmp_path / "folder"], ["folder", "not a readable LoRA"]),
                ([tmp_path / "nothing"], ["nothing", "no such run"]),
                ([], ["name a run"]),
                ([tmp_path / "torn.safetensors"], ["not a readable LoRA"]),
                ([tmp_path / "other.safetensors", "--model", "toy", "--rewards", "scene"],
                 ["sdxl-turbo", "toy"]),
                ([tmp_path / "more.safetensors", "--model", "toy", "--rewards", "scene"],
                 ["made for elsewhere/toy"]),
                ([tmp_path / "more.safetensors", "--model", "toy"], ["--rewards"]),
                ([eval_runs[0], "--prompts", tmp_path / "empty.txt"], ["empty"]),
                ([eval_runs[0], "--rewards", "scenne"], ["scenne", "scene"]),
                ([eval_runs[0], "--samples", "0"], ["--samples"]),
                ([eval_runs[0], "--smaples", "4"], ["--smaples"]),
                ([eval_runs[0], "--limit", "-1"], ["--limit"]),
                ([eval_runs[0], "--out", tmp_path / "empty.txt"], ["empty.txt"])]:
            code, _, err = eval_main(capsys, "--limit", 1, "--out", tmp_path / "out", *argv,
                                     "--device", "cpu")
            line = err.strip().splitlines()
            assert code == 2, (argv, err)
            assert len(line) == 1, (argv, err)
            assert line[0].startswith("error: "), (argv, err)
            assert all(word in line[0] for word in words), line


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
            z, reference, positive, negative = point_sets(3, N=N, D=D, M=N // 3)
            kw = dict(radii=(0.05, 0.2, 1.0), kernel=kernel)
            gpu = [t.cuda() for t in (z, reference, positive, negative)]
            for want, got in (
                    (drpo.dipole_field(z, positive, negative, **kw)[0],
                     drpo.dipole_field(gpu[0], *gpu[2:], **kw)[0]),
                    (drpo.reference_drift(z, reference, **kw)[0],
                     drpo.reference_drift(*gpu[:2], **kw)[0]),
                    (drpo.released_field(z, positive, negative, **kw)[0],
                     drpo.released_field(gpu[0], *gpu[2:], **kw)[0])):
                assert (got.cpu() - want).norm() < 1e-4 * want.norm()

    @cuda
    @pytest.mark.cuda
    @pytest.mark.parametrize("dtype,least", ((torch.float32, 0.9999), (torch.bfloat16, 0.8),
                                             (torch.float16, 0.97)))
    def test_half_precision_update_on_the_gpu(self, dtype, least, models):
        """The gradient of an update points where that of the CPU in float32 points, whole and in
        chunks."""
        torch.backends.cudnn.allow_tf32 = False
        G = open_model(models / "sd")
        want = update_gradient(G, random_lora(G, size=0.1), "vae", 12)[0]
        G = drpo.load_generator(str(models / "sd"), device="cuda", dtype=dtype)
        params = random_lora(G, size=0.1)
        with torch.no_grad():  # the CPU's weights: generators differ
            exact = open_model(models / "sd")
            random_lora(exact, size=0.1)
            for p, w in zip(params, exact.parameters()):
                p.copy_(w)
        for micro in (12, 5):
            got = update_gradient(G, params, "vae", micro)[0].cpu()
            assert got.isfinite().all()
            assert float(torch.cosine_similarity(got, want, dim=0)) > least

    @cuda
    @pytest.mark.cuda
    def test_compiled_equals_eager_on_the_gpu(self, models):
        torch.backends.cudnn.allow_tf32 = False
        gradients = []
        for compiled in (False, True):
            G = drpo.load_generator(str(models / "sd"), device="cuda")
            if compiled:
                drpo.compile_networks(G)
            gradients.append(update_gradient(G, random_lora(G, size=0.1), "vae", 12)[0])
        assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()

    @cuda
    @pytest.mark.cuda
    def test_memory_that_runs_out_on_the_gpu(self, models, capsys):
        """A real out-of-memory error: the micro-batch is halved, and the gradient is the same."""
        G = drpo.load_generator(str(models / "sd"), device="cuda")
        params, phi = random_lora(G, size=0.1), drpo.load_features("vae", G)
        want = update_gradient(G, params, phi, 12)[0]
        for p in params:
            p.grad = None

        def hungry(x, condition):
            if len(x) > 6:
                torch.empty(2 ** 40, dtype=torch.uint8, device="cuda")  # a terabyte
            return phi(x, condition)

        class ByPlace(TableScore):
            def score(self, images, prompts,
                      watch=False):  # a prompt at a time: the place within it
                table = [TABLE[PROMPTS.index(prompt)][i % 6] for i, prompt in enumerate(prompts)]
                return {"table": torch.tensor(table, dtype=torch.float64)}

        noise = torch.stack([drpo.prompt_noise(3, i, (6, 4, 8, 8)) for i in range(2)]).cuda()
        batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), noise)
        _, micro = drpo.gradient_that_fits(G, hungry, ByPlace(TABLE), batch,
                                           small_config(anchors=2), 12)
        assert micro == 6
        assert capsys.readouterr().err.count("out of GPU memory") == 1
        got = torch.cat([p.grad.flatten() for p in params])
        assert (got - want).norm() < 1e-3 * want.norm()

    @cuda
    @pytest.mark.cuda
    @pytest.mark.parametrize("kind,dtype", (("sd", "bf16"), ("sd", "fp16"), ("sdxl", "bf16"),
                                            ("sdxl", "fp16")))
    def test_a_run_on_the_gpu(self, kind, dtype, models, home):
        """--micro-batch auto starts from the free memory; it resumes."""
        with contextlib.chdir(home):
            argv = command(models, kind=kind, dtype=dtype, device="cuda", steps=2,
                           features="vae,unet", preview_every=2)
            drpo.main(argv)
            drpo.main(["--resume", "run", "--steps", "3"])
        metrics = metrics_of(home / "run")
        applied = [m["applied"]
                   for m in metrics]  # in fp16 the scaler may find its scale by a failed try
        assert all(applied) if dtype == "bf16" else sum(applied) >= 2
        assert metrics[2]["distance"] > 0
        assert metrics[0]["micro_batch"] == 8
        assert metrics[0]["peak_gib"] > 0
