"""Tests: values against independent computations (float64 loops, autograd, diffusers, peft), bad
input, faults.

    pip install pytest pytest-xdist peft
    python -m pytest -q -n 2 test_drpo.py lab                  all, under 4 minutes on 2 cores
    python -m pytest -q -m "not slow" -n 2 test_drpo.py        what takes seconds
    python -m pytest -q -m cuda test_drpo.py                   what needs a GPU, else skipped

Contents
    read these first    the equations, the update, sampler, resume, LoRA elsewhere, the toy learns
    drpo.py             1 the field, 2 features, 3 the generator, 4 one update, 5 a run, bad input
    rewards.py          contract, files; its models, the server and the judge: lab/test_rewards.py
    eval.py             statistics, report, pictures
    cuda                bf16, fp16, memory, compiled, kernels: on a GPU
"""
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
import time
import types
import warnings
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are tiny: threads would only wait

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import drpo
import eval as E
import rewards
from rewards import UserError

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # slow, cuda
HERE = Path(drpo.__file__).resolve().parent
sys.path.append(str(HERE / "lab"))
import bench  # noqa: E402
KERNELS = ("laplacian", "rbf", "cosine")
RADII = ((0.02, 0.05, 0.2), (0.2, 0.5, 1.0), (0.7,))
PROMPTS = ["a red cat", "two dogs"]
TABLE = [[0.1, 0.9, 0.4, 0.7, 0.2, 0.5], [3.0, 1.0, 2.0, 6.0, 5.0, 4.0]]

# six points in three dimensions and what the authors' drift_loss gives for them
AUTHORS_Z = [[1.8, 0.5, -0.3], [-1, -0.1, -0.6], [0.1, -0.1, 2.6], [-0.4, -0.1, -2],
             [1.5, 0.5, 0.2], [1.7, 0.7, 0]]
AUTHORS_R = [[2.6, 0.4, -0.2], [-0.9, -0.7, -1], [0.6, 0.2, 2.3], [-0.6, 0.4, -1.6],
             [2.1, 1.2, 1], [1.5, 0.6, -1.3]]
AUTHORS = {  # (kernel, term): loss, d(loss)/dz
    ("laplacian", "pref"): (6.275776, [
        [-0.23649, 0.23741, 0.56226], [0.60097, 0.16178, 0.16167], [0.00078, 0.00025, 0.00036],
        [0.00257, 0.00073, 0.00082], [0.15314, 0.08912, 0.32408], [0.14219, 0.3062, 0.48193]]),
    ("laplacian", "ref"): (5.9859, [
        [-0.28869, 0.09027, 0.28443], [0.37087, 0.27541, -0.14986], [-0.0006, 0.00428, -0.31956],
        [0.03582, -0.12899, 0.49388], [-0.02325, -0.01606, -0.04343],
        [-0.09994, -0.05472, -0.00734]]),
    ("rbf", "pref"): (5.639456, [
        [-0.17105, 0.12712, 0.3781], [0.71901, 0.19359, 0.19373], [0.00066, 0.00022, 0.0003],
        [0.00072, 0.00024, 0.00033], [0.2186, 0.10937, 0.33353], [0.2373, 0.21356, 0.37011]]),
    ("rbf", "ref"): (5.373701, [
        [-0.12157, 0.05093, 0.20568], [0.36244, 0.24992, 0.07166], [0.003, 0.0065, -0.4616],
        [0.19514, -0.08507, 0.42991], [0.05889, 0.01884, -0.03564], [-0.00236, -0.01724, 0.00797]]),
    ("cosine", "pref"): (8.846354, [
        [-0.3519, 0.26793, 0.78928], [0.07088, 0.019, 0.01827], [0.00067, 0.00048, 0.00135],
        [0.01198, 0.00334, 0.00311], [-0.24517, 0.11824, 0.53014], [-0.3295, 0.2126, 0.73056]]),
    ("cosine", "ref"): (7.709543, [
        [-0.50777, 0.07783, 0.29755], [0.15043, 0.12083, -0.24456], [0.00923, 0.00357, -0.05934],
        [-0.09017, -0.06296, 0.25097], [-0.39565, -0.14643, -0.31394],
        [-0.4415, -0.11241, -0.05065]]),
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

def summed(radii, field_at):
    """Fields at each radius, scaled to unit RMS and summed; and their RMS before."""
    fields = [unit(field_at(radius)) for radius in radii]
    return sum(V for V, _ in fields), [rms for _, rms in fields]

def loop_dipole(z, positive, negative, radii, kernel):
    """-> field (N, D), and the RMS of each radius before normalisation."""
    s = mean_scale([(x, y) for x in z for y in [*positive, *negative]])

    def field_at(radius):
        V = np.zeros_like(z)
        for i in range(len(z)):
            for a in positive:
                V[i] += gradient_of_kernel(z[i], a, radius * s, radius, kernel)
            for a in negative:
                V[i] -= gradient_of_kernel(z[i], a, radius * s, radius, kernel)
        return V

    return summed(radii, field_at)

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

    def field_at(radius):
        V = np.zeros_like(z)
        for i in range(len(z)):
            V[i] = mean_shift(z[i], reference, radius * s, radius, kernel)
            others = [z[j] for j in range(len(z)) if j != i]
            V[i] -= mean_shift(z[i], others, radius * s, radius, kernel)
        return V

    return summed(radii, field_at)

def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)

def loop_released(z, positive, negative, radii, kernel, negative_is_self=False):
    """The authors' arithmetic in float64 -> force in units of s / sqrt(D), and s."""
    N, D = z.shape
    y = np.array([*z, *negative, *positive])
    w = np.array([1.0] * N + [3000.0] * (len(y) - N))
    d = np.array([[max(np.linalg.norm(a - b), 1e-4) for b in y] for a in z])
    s = max((d * w).mean() / w.mean(), 1e-3)
    attracts = np.arange(len(y)) >= N + len(negative)
    total = np.zeros_like(z)
    for radius in radii:
        logits = {"laplacian": -d / (s * radius), "rbf": -(d / (s * radius)) ** 2 / 2}.get(kernel)
        if kernel == "cosine":
            logits = np.array([[log_of_kernel(a, b, s, radius, kernel) for b in y] for a in z])
        for i in range(N):
            logits[i, i] -= 100 / radius
            if negative_is_self:
                logits[i, N + i] -= 100 / radius
        A = np.sqrt(np.maximum(softmax(logits, 1) * softmax(logits, 0), 1e-6)) * w
        force = np.zeros_like(z)
        for i in range(N):
            minus, plus = A[i, ~attracts].sum(), A[i, attracts].sum()
            for j in range(len(y)):
                pull = A[i, j] * minus if attracts[j] else -A[i, j] * plus
                force[i] += pull * (y[j] - z[i]) / (s / math.sqrt(D))
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

def pipeline_sample(pipe, e, output="latent", prompts=PROMPTS, **how):
    pipe.set_progress_bar_config(disable=True)
    how = how or dict(num_inference_steps=1)
    return pipe(prompt=list(prompts), latents=e.clone().to(pipe.dtype), guidance_scale=0.0,
                height=32, width=32, output_type=output,
                generator=torch.Generator().manual_seed(0), **how).images

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

def candidates_noise(G):
    """Noise of 2 prompts x 6 candidates."""
    return torch.stack([drpo.prompt_noise(3, i, (6, 4, 8, 8)) for i in range(2)]).to(G.device)

def update_gradient(G, params, features, micro, cfg=None, f=lambda x: x, table=TABLE, pairs=None):
    """Gradient of one step at 2 prompts x 6 candidates -> flat gradient, metrics, the score
    object."""
    cfg = cfg or small_config(anchors=2)
    for p in params:
        p.grad = None
    score = None if pairs else TableScore(table, f)
    batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), candidates_noise(G), pairs)
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

raises = fail
raises3 = third(fail)
short3 = third(lambda i, p: [1.0])
inf3 = third(lambda i, p: [float("inf")] * len(i))
text3 = third(lambda i, p: ["good"] * len(i))
exits3 = third(lambda i, p: sys.exit(7))
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
    """Runs in the child: drpo.main(argv) with its output in files. env may hold INTERRUPTS_IGNORED,
    as a background job of a shell has them, and SPOILT: updates whose gradient is not finite."""
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{stream}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    ignored = "INTERRUPTS_IGNORED" in env
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    plain, steps = drpo.drpo_gradient, itertools.count(1)

    def spoilt(G, *args):
        metrics, step = plain(G, *args), next(steps)
        if str(step) in env.get("SPOILT", "").split():
            G.parameters()[0].grad.view(-1)[0] = math.nan if step % 2 else math.inf
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
                ["drpo", "eval", "pytest", "torch._dynamo",
                 "transformers.models.clip.modeling_clip",
                 "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
                 "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"])
        self.stream = str(Path(cwd) / f"stream{random.randrange(10 ** 12)}")
        args = list(map(str, argv)), self.stream, str(cwd), dict(env)
        self.process = RunProcess.server.Process(target=child, args=args)
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
                    batch=2, candidates=4, anchors=2, features="vae", lora_rank=2, preview_every=0,
                    device="cpu", field="dipole", radii="0.2,0.5,1", lr=1e-3) | kw
    argv = []
    for name, value in settings.items():
        if value is not None:
            argv += [drpo.flag(name), str(value)]
    return argv

def metrics_of(run):
    """metrics.jsonl as strict JSON, without the times."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    for figures in metrics:
        assert figures.pop("seconds") > 0
    return metrics

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
    for caption in captions:
        noise = [drpo.prompt_noise(12345, 3 * len(scores) + j, G.noise_shape) for j in range(3)]
        with torch.no_grad():
            pictures = G.decode(G.sample(torch.stack(noise), G.encode([caption] * 3)))
        scores.append(float(scene(pictures, [caption] * 3).mean()))
    return sum(scores) / len(scores)


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
            loss, gradient = AUTHORS[kernel, term]
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
                # L = 1 / (2 N D) sum |(z - z*) / u|^2, z* = z + eta u V, mean over prompts
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
            if field == "dipole":
                assert m["rms_pref"] == pytest.approx(metrics["rms_pref"], rel=1e-3)
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
        reversed_reward = f"{HERE / 'lab' / 'ablate.py'}:scene_reversed"
        for name, reward, steps in (("tuned", "scene", 30), ("reversed", reversed_reward, 9)):
            drpo.train(drpo.Config.preset(
                "toy", reward=reward, steps=steps, batch=4, candidates=16, anchors=4, lr=3e-3,
                average=0.0, preview_every=0, device="cpu", out=tmp_path / name))
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
        z, reference, best, worst = point_sets(3)
        for sets, kw in (((z, best, worst), {}), ((z, reference, z), {"negative_is_self": True})):
            want, s_want = loop_released(*in_float64(*sets), radii, kernel, **kw)
            got, s = drpo.released_field(*sets, radii=radii, kernel=kernel, **kw)
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

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_fields_where_everything_is_equal_or_lonely(self, kernel):
        """No division by zero: equal samples, one sample, no anchors."""
        z = torch.ones(4, 5)
        kw = dict(radii=(0.2, 1.0), kernel=kernel)
        assert drpo.dipole_field(z, z[:1], z[1:2], **kw)[0].isfinite().all()
        assert drpo.reference_drift(z, z, **kw)[0].isfinite().all()
        assert drpo.released_field(z, z[:1], z[1:2], **kw)[0].isfinite().all()
        z = point_sets(4)[0]
        V, rms = drpo.dipole_field(z, z[:0], z[:0], **kw)
        assert torch.equal(V, torch.zeros_like(z))
        assert rms.tolist() == [0, 0]
        assert drpo.released_field(z, z[:0], z[:0], **kw)[0].abs().max() == 0
        if kernel == "laplacian":
            lone, target = torch.zeros(1, 3), torch.tensor([[3.0, 4.0, 0.0]])
            drift, _ = drpo.reference_drift(lone, target, radii=(0.5,), kernel=kernel)
            assert_close(drift, np.array([[0.6, 0.8, 0]]) * math.sqrt(3))

    @pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
    def test_any_dtype_comes_in_float32_goes_out(self, dtype):
        z, reference, positive, negative = (t.to(dtype) for t in point_sets(13))
        kw = dict(radii=(0.5,), kernel="laplacian")
        V, _ = drpo.dipole_field(z, positive.double(), negative, **kw)
        assert V.dtype == torch.float32
        assert_close(V, loop_dipole(*in_float64(z, positive, negative), **kw)[0])
        V, _ = drpo.reference_drift(z, reference, **kw)
        assert V.dtype == torch.float32
        assert_close(V, loop_drift(*in_float64(z, reference), **kw)[0], 1e-4)

    def test_unknown_kernel_is_refused_where_it_is_computed(self):
        z, reference, positive, negative = point_sets(14)
        for call in (lambda **kw: drpo.dipole_field(z, positive, negative, **kw),
                     lambda **kw: drpo.reference_drift(z, reference, **kw),
                     lambda **kw: drpo.released_field(z, positive, negative, **kw)):
            with pytest.raises(ValueError, match="laplace.*laplacian"):
                call(radii=(0.5,), kernel="laplace")

    def test_every_small_case_of_best_and_worst(self):
        """All patterns of 6 scores out of 3 values and NaN, m = 1..3."""
        for row in itertools.product((0.0, 1.0, 2.0, math.nan), repeat=6):
            for m in (1, 2, 3):
                positive, negative = drpo.best_and_worst(torch.tensor(row), m)
                assert positive.dtype == negative.dtype == torch.bool
                check_anchors(row, m, positive.tolist(), negative.tolist())

    @pytest.mark.parametrize("field", ("dipole", "released"))
    def test_loss_values(self, field):
        """Loss and gradient by the equations, where z is the features that gave the targets."""
        z, reference, positive, negative = point_sets(11)
        a, b, p, n = in_float64(z, reference, positive, negative)
        kw = dict(radii=(0.2, 0.5), kernel="laplacian")
        eta, lambda_ref = 0.7, 0.3
        x = z.clone().requires_grad_()
        z_star, weight, _ = drpo.FIELDS[field](z, reference, positive, negative, eta=eta,
                                               lambda_ref=lambda_ref, **kw)
        loss = drpo.regression_loss(x, z_star, weight)
        gradient, = torch.autograd.grad(loss, x)
        if field == "dipole":
            V = loop_dipole(a, p, n, **kw)[0] + lambda_ref * loop_drift(a, b, **kw)[0]
            u = mean_scale([(x, y) for x in a for y in a]) / math.sqrt(7)
            assert float(loss) == pytest.approx(0.5 * float(((eta * V) ** 2).mean()), rel=1e-5)
            assert_close(gradient, -eta * V / u / z.numel(), 1e-4)
            return
        force, s = loop_released(a, p, n, **kw)
        drift, s_ref = loop_released(a, b, a, negative_is_self=True, **kw)
        u, u_ref = s / math.sqrt(7), s_ref / math.sqrt(7)
        want = -2 * eta * (force / u + lambda_ref * drift / u_ref) / z.numel()  # of the two losses
        assert_close(gradient, want, 1e-4)
        assert float(weight) == pytest.approx((1 / u ** 2 + lambda_ref / u_ref ** 2) / 63, rel=1e-4)

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
        section, = re.findall(r"^# =+ 1\. .*?(?=^# =+ 2\. )", (HERE / "drpo.py").read_text(),
                              re.M | re.S)
        (tmp_path / "field.py").write_text(
            f"import torch\nimport torch.nn.functional as F\n{section}")
        (tmp_path / "use.py").write_text("""
import sys, torch, field
torch.manual_seed(0)
z = torch.randn(6, 4)
positive, negative = field.best_and_worst(torch.arange(6.), 2)
out = []
for target in field.FIELDS.values():
    z_star, weight, _ = target(z, z + .1, z[positive], z[negative], radii=(.2,), eta=1.,
                               lambda_ref=.2, kernel="laplacian")
    out.append(field.regression_loss(z + .2, z_star, weight))
assert not {"diffusers", "transformers", "drpo", "PIL"} & set(sys.modules), "torch only"
torch.save(out, "out.pt")
""")
        code = "import sys; sys.path.insert(0, '.'); import use"
        done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        torch.manual_seed(0)
        z = torch.randn(6, 4)
        kw = dict(radii=(0.2,), eta=1.0, lambda_ref=0.2, kernel="laplacian")
        targets = (drpo.dipole_target, drpo.released_target)
        for got, target in zip(torch.load(tmp_path / "out.pt"), targets, strict=True):
            z_star, weight, _ = target(z, z + 0.1, z[4:], z[:2], **kw)
            torch.testing.assert_close(got, drpo.regression_loss(z + 0.2, z_star, weight))


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

        def keep(module, args, out):
            seen.append(out[0] if isinstance(out, tuple) else out)

        for block in (pipe.unet.down_blocks[-1], pipe.unet.mid_block, pipe.unet.up_blocks[0]):
            block.register_forward_hook(keep)
        added = None
        text, *rest = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1,
                                         do_classifier_free_guidance=False)
        if kind == "sdxl":
            ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(2, -1)
            added = {"text_embeds": rest[1], "time_ids": ids}
        noise = drpo.prompt_noise(0, 0, (4, 8, 8))
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

UNET, INDEX = "unet/diffusion_pytorch_model.safetensors", "model_index.json"
BROKEN = (  # file of a model's folder, what is done to its entries, tensors or bytes, words
    ("vae/config.json", dict(latents_mean=[0.1]), "vae has latents_mean"),
    ("unet/config.json", dict(in_channels=9), "9"),
    ("unet/config.json", dict(time_cond_proj_dim=16), "time_cond_proj_dim"),
    ("unet/config.json", dict(sample_size=[8, 12]), "sample_size"),
    (INDEX, dict(text_encoder=[None, None]), "text_encoder"),  # SDXL's refiner
    (INDEX, dict(vae=["diffusers", "AutoencoderTiny"]), "AutoencoderKL"),  # SDXS
    (INDEX, dict(unet=["diffusers", "DiTTransformer2DModel"]), "UNet2DConditionModel"),
    (INDEX, dict(_class_name="InstaFlowPipeline"), "rectified flow"),
    ("text_encoder/model.safetensors",
     lambda state: state.update({f"x.{k}": state.pop(k) for k in list(state)}), "text_encoder"),
    ("text_encoder_2/model.safetensors", lambda state: state.pop(min(state)), "text_encoder_2"),
    (UNET, lambda state: state.pop("conv_in.bias"), "unet: 1 missing weights, conv_in.bias"),
    (UNET, lambda state: state.update(lora_A=torch.zeros(2, 2)), "unexpected"),
    (UNET, b"cut off in the middle", ""),
    (UNET, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ""))


class TestTheGenerator:
    """Sampling against diffusers, LoRA files against peft and by hand, bases read whole."""

    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
    def test_one_step_of_other_schedulers(self, name, prediction, models):
        """One formula for all: the timestep, abar and the kind of prediction; against the pipelines
        in one step."""
        import diffusers
        cls, settings, t = SCHEDULES[name]
        if "Ancestral" in cls and prediction == "sample":
            pytest.skip("diffusers' own scheduler has no sample prediction")
        pipe = diffusers.DiffusionPipeline.from_pretrained(models / "sd")
        kept = {k: v for k, v in pipe.scheduler.config.items() if k.startswith(("beta", "num_"))}
        pipe.scheduler = getattr(diffusers, cls)(**kept, prediction_type=prediction, **settings)
        e = some_noise()
        want = pipeline_sample(pipe, e, **{"timesteps": [t]} if cls == "LCMScheduler" else {})
        G = drpo.Generator(pipe, timestep=t)
        x = sample_of(G, e)
        # it ends at abar_0 instead of 1: sqrt(abar_0) x + sqrt(1 - abar_0) eps, by hand
        if name == "tcd":
            eps = (e - math.sqrt(G.abar) * x) / math.sqrt(1 - G.abar)
            last = float(pipe.scheduler.alphas_cumprod[0])
            x = math.sqrt(last) * x + math.sqrt(1 - last) * eps
        assert_close(x, want.double().numpy(), 5e-5)

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
        e = some_noise()
        want = pipeline_sample(base, e, timesteps=[399])
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

    @pytest.mark.parametrize("name,change,words", BROKEN)
    def test_a_base_is_read_whole_or_refused(self, name, change, words, models, tmp_path):
        from safetensors.torch import load_file, save_file
        folder = tmp_path / "model"
        shutil.copytree(models / "sdxl", folder)
        file = folder / name
        if isinstance(change, dict):
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        elif isinstance(change, bytes):
            file.write_bytes(change)
        else:
            state = load_file(file)
            change(state)
            save_file(state, file, {"format": "pt"})
        with pytest.raises(UserError) as caught:
            drpo.load_generator(str(folder))
        assert words in str(caught.value)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kind", ("sd", "sdxl"))
    def test_lora_off_is_the_base_and_fresh_changes_nothing(self, kind, models):
        G, e = open_model(models / kind), some_noise()
        linear = [name for name, _ in G.unet.named_modules()
                  if re.search(r"attn\d\.(to_[qkv]|to_out\.0)$", name)]
        base = sample_of(G, e)
        params = G.add_lora(4, 8.0)
        assert torch.equal(sample_of(G, e), base), "fresh LoRA"
        assert sorted(G.lora) == sorted(linear)
        assert all(p.dtype == torch.float32 for p in params)
        trainable = [p for p in G.unet.parameters() if p.requires_grad]
        assert {id(p) for p in trainable} == {id(p) for p in params}, "nothing else trains"
        for layer in G.lora.values():
            torch.nn.init.normal_(layer.up, std=0.3)
        tuned = sample_of(G, e)
        assert (tuned - base).abs().max() > 1e-2
        with contextlib.suppress(ZeroDivisionError), G.reference():
            with G.reference():
                pass
            assert torch.equal(sample_of(G, e), base), "off, also after a nested use"
            1 / 0
        assert torch.equal(sample_of(G, e), tuned), "on again, also after an error"

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
        state, metadata = load_file(tmp_path / drpo.LORA_FILE), drpo.read_lora(tmp_path)[1]
        more = {**state, "unet.extra.lora_A.weight": torch.zeros(1)}
        save_file(more, tmp_path / "more.safetensors", metadata)
        del state[min(state)]
        save_file(state, tmp_path / "less.safetensors", metadata)
        for file, words in (("theirs", "fuse it"), ("kohya_lora.safetensors", "fuse it"),
                            ("more.safetensors", "made for sd"),
                            ("less.safetensors", "made for sd")):
            with pytest.raises(UserError, match=words):
                G.load_lora(tmp_path / file)
        with pytest.raises(UserError, match="made for sd, not for .*sdxl"):
            open_model(models / "sdxl").load_lora(tmp_path)

    @pytest.mark.parametrize("parts", (["unet"], ["vae"], ["text_encoder"],
                                       ["unet", "vae", "text_encoder"]))
    def test_folders_with_fp16_files_load(self, parts, models, tmp_path):
        """Alone, and mixed with others."""
        shutil.copytree(models / "sd", tmp_path / "mixed")
        for part in parts:
            file, = (tmp_path / "mixed" / part).glob("*.safetensors")
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
        e = some_noise()
        assert torch.equal(sample_of(open_model(tmp_path / "mixed"), e),
                           sample_of(open_model(models / "sd"), e))

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
            metadata, state = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
        blocks = r"down_blocks_0_attentions_0|mid_block_attentions_0|up_blocks_1_attentions_\d"
        if kind == "sdxl":
            blocks = "input_blocks_4_1|input_blocks_5_1|middle_block_1|output_blocks_[0-2]_1"
        layers = {key.partition(".")[0] for key in state}
        assert len(layers) == len(G.lora) == len(state) / 3
        for layer in layers:
            assert re.fullmatch(rf"lora_unet_({blocks})_\w+_attn[12]_to_(q|k|v|out_0)", layer)
            assert float(state[f"{layer}.alpha"]) == 6
            assert state[f"{layer}.lora_down.weight"].shape[0] == 4
            assert state[f"{layer}.lora_up.weight"].shape[1] == 4
        wanted = {"ss_network_dim": "4", "ss_network_alpha": "6.0",
                  "ss_network_module": "networks.lora"}
        other = {"sd": {"ss_v2": "True"}, "sdxl": {"ss_base_model_version": "sdxl_base_v1-0"}}
        found = {key: value for key, value in metadata.items() if key.startswith("ss_")}
        assert found == {**wanted, **other[kind]}

    def test_sdxl_names_of_sd_scripts(self):
        """Every one of SDXL's 560 attention layers has one name and no other layer's; the blocks
        are those of the first release: conv_in, 2 ResNets and a downsampler, twice 2 with attention
        and a downsampler."""
        import diffusers
        with torch.device("meta"):
            arch = bench.ARCHITECTURES["sdxl-turbo"]["unet"]
            unet = diffusers.UNet2DConditionModel(**bench.UNET, **arch)
        names = [name for name, _ in unet.named_modules() if name.endswith(drpo.LORA_TARGETS)]
        kohya = {drpo.kohya_name(name, True) for name in names}
        assert len(names) == 560 == len(kohya)
        counts = {}
        for name in kohya:
            block = re.match(r"lora_unet_((input|output)_blocks_\d+|middle_block)_1_", name)
            counts[block[1]] = counts.get(block[1], 0) + 1
        assert counts == {
            "input_blocks_4": 16, "input_blocks_5": 16, "input_blocks_7": 80, "input_blocks_8": 80,
            "middle_block": 80, "output_blocks_0": 80, "output_blocks_1": 80, "output_blocks_2": 80,
            "output_blocks_3": 16, "output_blocks_4": 16, "output_blocks_5": 16}
        layer = "transformer_blocks.0.attn1.to_out.0"
        assert drpo.kohya_name(f"up_blocks.1.attentions.2.{layer}", True) == (
            f"lora_unet_output_blocks_5_1_{layer.replace('.', '_')}")

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
        layers, as it does in diffusers' pipeline."""
        from diffusers import DiffusionPipeline
        e, prompts = some_noise(8), PROMPTS * 4
        want = sample_of(open_model(models / kind), e, prompts)
        G = open_model(models / kind, dtype)
        said = capfd.readouterr().err
        got = sample_of(G, e, prompts)
        assert got.dtype == torch.float32
        error = (got - want).square().mean().sqrt()
        pipe = DiffusionPipeline.from_pretrained(models / kind, torch_dtype=dtype)
        theirs = pipeline_sample(pipe, e.to(dtype), prompts=prompts).float()
        assert error < (theirs - want).square().mean().sqrt()
        assert error < (0.15 if dtype == torch.bfloat16 else 0.02) * want.std()
        with torch.no_grad():
            images = G.decode(got)
        assert images.dtype == torch.float32
        assert images.isfinite().all()
        lifted = dtype == torch.float16 and kind == "sdxl"
        assert (G.vae.dtype == torch.float32) == lifted
        assert said.count("VAE") == said.count("\n") == int(lifted), "one line says so"
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
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        norm.bfloat16()
        x = (torch.randn(2, 32, 24, 24) + 8 * torch.randn(1, 32, 1, 1)).bfloat16()
        want = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double())
        plain = float((norm(x) - want).norm() / want.norm())
        norm.__class__ = drpo.ChannelsLastGroupNorm
        assert float((torch.compile(norm)(x) - want).norm() / want.norm()) < 1.05 * plain < 0.01
        assert float((norm(x) - want).norm() / want.norm()) < 2 * plain


# ===== drpo.py: 4. One update

def write_pictures(folder, n=6):
    """n pictures of 32 x 32 -> their names."""
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(n)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
    return names

def pairs_of(names):
    """Six pictures as two pairs, with different numbers on both sides."""
    return [{"prompt": PROMPTS[0], "chosen": names[:2], "rejected": names[2:3]},
            {"prompt": PROMPTS[1], "chosen": names[3:4], "rejected": names[4:]}]


class TestOneUpdate:
    """What is added to .grad, and the figures beside it."""

    def test_out_of_memory_halves_the_micro_batch(self, tuned, capsys, monkeypatch):
        """The step begins again and computes the same; what a failed attempt left behind does not
        count."""
        G, params = tuned
        cfg, phi = small_config(anchors=2), drpo.load_features("vae", G)
        batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), candidates_noise(G))
        want = update_gradient(G, params, "vae", 12, cfg)[0]
        gradient, seen = drpo.drpo_gradient, []

        def small_memory(G, phi, reward, batch, cfg, micro):
            seen.append(micro)
            reward.seen.clear()
            if micro > 4:
                gradient(G, phi, reward, batch, cfg, 1)
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
        assert re.findall("--micro-batch ([0-9]+)", capsys.readouterr().err) == ["6", "3"]

        def no_memory(*_):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(drpo, "drpo_gradient", no_memory)
        with pytest.raises(UserError, match="--micro-batch 1"):
            drpo.gradient_that_fits(G, phi, TableScore(TABLE), batch, cfg, 4)

    def test_a_vae_that_gives_nan_ends_with_a_line(self, tuned, monkeypatch):
        G, params = tuned
        monkeypatch.setattr(G.vae, "decode", lambda x: types.SimpleNamespace(
            sample=torch.full((len(x), 3, 32, 32), math.inf)))
        with pytest.raises(UserError, match="not finite.*--dtype"):
            update_gradient(G, params, "vae", 12)

    @pytest.mark.parametrize("field", ("dipole", "released"))
    def test_skipped_and_unsure_prompts(self, field, tuned):
        """All equal or all NaN: the reference drift alone, counted; a NaN is no anchor but is still
        moved."""
        G, params = tuned

        def of(*table, **kw):
            cfg = small_config(anchors=2, field=field, **kw)
            return update_gradient(G, params, "vae", 12, cfg, table=table)[:2]

        equal, m = of([1.0] * 6, [5.0] * 6)
        assert m["skipped"] == 1
        silent, m = of([math.nan] * 6, [math.nan] * 6)
        assert m["skipped"] == 1
        assert torch.equal(equal, silent)
        assert of([1.0] * 6, [1.0] * 6, lambda_ref=0.0)[0].abs().max() == 0
        one, m = of(TABLE[0], [5.0] * 6)
        assert m["skipped"] == 0.5
        assert not torch.equal(one, equal)
        # NaN in the middle of the order: the same anchors, the same update
        unsure = [[v if v in sorted(row)[:2] + sorted(row)[-2:] else math.nan for v in row]
                  for row in TABLE]
        got, m = of(*unsure)
        assert torch.equal(got, of(*TABLE)[0])
        assert m["skipped"] == 0
        assert m["reward_best"] == pytest.approx((0.9 + 6) / 2)
        assert m["reward_worst"] == pytest.approx((0.1 + 1) / 2)

    def test_parts_and_watched_rewards_are_logged(self, tuned):
        """Of several parts each one's mean; a lone part is the score itself, and has no line of its
        own."""
        G, _ = tuned

        def channel(n):
            return lambda images, prompts: [float(np.asarray(i)[..., n].mean()) for i in images]

        red, blue = channel(0), channel(2)
        x = some_noise(12)
        batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), torch.zeros(2, 6, 4, 8, 8), watch=True)
        both = rewards.Reward("both", {"red": red, "blue": blue}, {"red": 1.0, "blue": 1.0})
        alone = rewards.Reward("red", {"red": red}, {"red": 1.0}, {"blue": blue})
        assert set(drpo.score_candidates(G, both, batch, x)[1]) == {"red", "blue"}
        scores, logged = drpo.score_candidates(G, alone, batch, x)
        pictures = rewards.to_pil(G.decode(x))
        np.testing.assert_allclose(scores.flatten(), red(pictures, None))
        assert set(logged) == {"watch/blue"}
        np.testing.assert_allclose(logged["watch/blue"].flatten(), blue(pictures, None))

    def test_metrics_of_the_pictures(self, tuned):
        """distance and diversity in latents, by loops."""
        G, params = tuned
        _, m, _ = update_gradient(G, params, "vae", 5)
        apart, latents = {}, {}
        for name, context in (("tuned", contextlib.nullcontext()), ("base", G.reference())):
            with context:
                latents[name] = [sample_of(G, e, [prompt] * 6).flatten(1).double().numpy()
                                 for e, prompt in zip(candidates_noise(G), PROMPTS)]
            apart[name] = np.mean([[np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)]
                                   for x in latents[name]])
        pairs = zip(latents["tuned"], latents["base"])
        rms = np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in pairs])
        assert m["distance"] == pytest.approx(rms, rel=1e-4)
        assert m["diversity"] == pytest.approx(apart["tuned"] / apart["base"], rel=1e-4)
        assert m["diversity"] != pytest.approx(1, abs=1e-4), "nothing measured"

    def test_offline_pairs_are_anchors(self, tuned, tmp_path):
        """Anchors from files, of different numbers: features of the VAE-encoded pictures, by
        diffusers' image processor."""
        from diffusers.image_processor import VaeImageProcessor
        G, params = tuned
        lines = pairs_of(write_pictures(tmp_path))
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        pairs = rewards.load_pairs(tmp_path / "pairs.jsonl")
        assert [p[0] for p in pairs] == PROMPTS
        phi = drpo.load_features("vae", G)
        anchors = [drpo.pair_maps(G, phi, pair) for pair in pairs]
        processor = VaeImageProcessor(vae_scale_factor=4)
        for line, maps in zip(lines, anchors):
            for side, got in zip(("chosen", "rejected"), maps):
                pixels = processor.preprocess([Image.open(tmp_path / f) for f in line[side]])
                with torch.no_grad():
                    x = G.vae.encode(pixels).latent_dist.mean * G.vae.config.scaling_factor
                    for h, want in zip(got, phi(x, None), strict=True):
                        assert_close(h, want.double().numpy(), 1e-4)

        def of(pairs, micro, **kw):
            return update_gradient(G, params, "vae", micro, small_config(anchors=2, **kw),
                                   pairs=pairs)[:2]

        whole, m = of(anchors, 12)
        assert "reward_mean" not in m
        assert whole.norm() > 0
        assert (of(anchors, 5)[0] - whole).norm() < 2e-4 * whole.norm()
        plain, _ = of(anchors, 12, lambda_ref=0.0)
        swapped, _ = of([maps[::-1] for maps in anchors], 12, lambda_ref=0.0)
        assert (swapped + plain).norm() < 1e-4 * plain.norm(), "exchanged: the other way"

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


TINY = ("--prompts animals --reward jpeg --features vae --steps 1 --batch 1 --candidates 4 "
        "--anchors 2 --device cpu --preview-every 0").split()


class TestARun:
    """Each in a process of its own, forked from a server that has imported everything and run
    nothing."""

    def test_a_run_and_its_files(self, models, home):
        """What a run leaves behind; the LoRA in its folder is the one in its checkpoint; all of it
        moved from the start."""
        run = RunProcess(command(models, preview_every=2, watch="jpeg", lora_alpha=3), home)
        assert run.wait() == 0, run.err
        folder = home / "run"
        for words in ("2 of 5 prompts x 4 pictures a step", "step 4/4", "left"):
            assert words in run.out
        config = json.loads((folder / "config.json").read_text())
        assert config["lora_alpha"] == 3
        assert config["versions"]["torch"] == torch.__version__
        metrics = metrics_of(folder)
        assert [m["step"] for m in metrics] == [1, 2, 3, 4]
        for m in metrics:
            assert m["applied"]
            assert min(m["loss"], m["grad_norm"], m["reward_std"], m["gap"], *m["rms_pref"]) > 0
            assert m["skipped"] == 0
            assert m["reward_worst"] < m["reward_mean"] < m["reward_best"]
            assert len(m["rms_pref"]) == len(m["rms_ref"]) == 3
        assert ["watch/jpeg" in m for m in metrics] == [True, False, False, True]
        assert metrics[0]["distance"] == 0 < metrics[3]["distance"]
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["step-000001.png", "step-000002.png", "step-000004.png"]
        for name in names:
            assert Image.open(folder / "samples" / name).convert("L").getextrema()[1] > 0
        state = state_of(folder)
        assert (state["step"], state["position"]) == (4, 8)
        G = open_model(models / "sd")
        G.load_lora(folder)
        for p, w in zip(G.parameters(), state["weights"], strict=True):
            if p.shape[0] == 2:  # down; up carries alpha / rank in the file
                torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-8)
            assert w.abs().max() > 0
        assert drpo.read_lora(folder)[1]["drpo_base"] == "sd", "nobody's home is published"
        assert not list(folder.glob("*.tmp"))

    def test_the_average_of_the_lora_is_kept(self, models, home):
        """Against the weights of every step: a plain mean at first, then exponential; training
        itself does not see it, and --resume goes on with it."""
        for steps in (1, 2, 3, 4):
            run = RunProcess(command(models, f"to{steps}", steps=steps, average=0.5), home)
            assert run.wait() == 0, run.err
        mean = [w.double() for w in weights_of(home / "to1")]
        for n in (2, 3, 4):
            rate = max(0.5, 1 / n)
            now = weights_of(home / f"to{n}")
            mean = [(1 - rate) * m + rate * w.double() for m, w in zip(mean, now)]
        assert RunProcess(["--resume", "to2", "--steps", "4"], home).wait() == 0
        scale = drpo.Config.lora_alpha / 2  # alpha / rank
        for name in ("to4", "to2"):
            G = open_model(models / "sd")
            G.load_lora(home / name)
            for layer, down, up in zip(G.lora.values(), mean[::2], mean[1::2]):
                got = layer.up.detach() @ layer.down.detach() * layer.alpha / layer.rank
                assert_close(got, (scale * up @ down).numpy(), 1e-5)

    def test_resume_further_and_changed_settings(self, models, home):
        """A setting given beside --resume replaces the run's, and stays; files that changed since
        do not matter."""
        assert RunProcess(command(models, steps=2), home).wait() == 0
        for name in ("own.py", "prompts.txt"):
            with open(home / name, "a") as f:
                f.write("# changed\n")
        changed = "--resume run --lr 0.5 --weight-decay 40 --steps".split()
        for argv in ([*changed, "3"], ["--resume", "run", "--steps", "4"]):
            run = RunProcess(argv, home)
            assert run.wait() == 0, run.err
        metrics = metrics_of(home / "run")
        assert [m["step"] for m in metrics] == [1, 2, 3, 4]
        assert [m["lr"] for m in metrics] == [0.001, 0.001, 0.5, 0.5]
        group = state_of(home / "run")["optimizer"]["param_groups"][0]
        assert (group["lr"], group["weight_decay"]) == (0.5, 40)
        for setting, value in (("--lora-rank", "3"), ("--out", "other")):
            run = RunProcess(["--resume", "run", setting, value], home)
            assert run.wait() == 2
            assert_one_line(run.err, setting)
        assert not (home / "other").exists()

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

    @pytest.mark.parametrize("number,code", ((signal.SIGINT, 130), (signal.SIGTERM, 143),
                                             (signal.SIGHUP, 129)))
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

    @pytest.mark.parametrize("env", ({}, {"INTERRUPTS_IGNORED": ""}))
    def test_a_second_signal_ends_at_once(self, env, models, home):
        """While a reward works: the first says a line at once, the second does not wait; the
        checkpoint is intact."""
        argv = command(models, reward="own.py:hangs", steps=9, save_every=1)
        run = RunProcess(argv, home, env)
        run.until(home / "run" / "metrics.jsonl", 2)
        time.sleep(0.5)
        begun = time.monotonic()
        run.kill(signal.SIGINT)
        while "stopping after this step" not in run.err:
            assert time.monotonic() - begun < 60
            time.sleep(0.05)
        run.kill(signal.SIGINT)
        assert run.wait() == 130, run.err
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

    @pytest.mark.parametrize("kind,dtype", (("sd", "bf16"), ("sdxl", "bf16"), ("sdxl", "fp16")))
    def test_runs_in_every_dtype(self, kind, dtype, models, home):
        run = RunProcess(command(models, kind=kind, dtype=dtype, steps=2, features="vae,unet",
                                 preview_every=2), home)
        assert run.wait() == 0, run.err
        assert [m["applied"] for m in metrics_of(home / "run")] == [True, True]
        assert metrics_of(home / "run")[1]["distance"] > 0
        assert run.err.count("\n") == int(dtype == "fp16"), "a line where the VAE is lifted"
        assert all(w.dtype == torch.float32 for w in weights_of(home / "run"))

    def test_offline_pairs_run(self, models, home):
        """No reward is called; it resumes."""
        lines = pairs_of(write_pictures(home))
        (home / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        run = RunProcess(command(models, reward=None, prompts=None, pairs="pairs.jsonl"), home)
        assert run.wait() == 0, run.err
        for metrics in metrics_of(home / "run"):
            assert metrics["applied"]
            assert min(metrics["rms_pref"]) > 0
            assert "reward_mean" not in metrics
        assert metrics["distance"] > 0
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
        for data in (b"", good[:100], good[:-1], (home / "bomb.pt").read_bytes()):
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
        (home / "keeps.py").write_text("""
class Keeps:
    run_folder = None
    def __call__(self, images, prompts):
        (self.run_folder / 'answers').write_text('1')
        return [1.0]
""")
        run = RunProcess(command(models, reward="keeps.py:Keeps"), home)
        assert run.wait() == 2
        assert [path.name for path in (home / "run").iterdir()] == ["answers"]

    def test_settings_of_other_types(self, models, home):
        """numpy's numbers and paths, as notebooks have them; a callable is never taken for a
        built-in reward."""
        def jpeg(images, prompts):
            return [500.0 + np.asarray(image).mean() for image in images]

        small = dict(model=models / "sd", prompts=home / "prompts.txt", batch=1, candidates=4,
                     anchors=2, preview_every=0)
        drpo.train(drpo.Config(steps=np.int64(1), lr=np.float32(1e-3), out=home / "run", **small),
                   reward=jpeg)
        resumed = drpo.parse(["--resume", str(home / "run"), "--steps", "2"])
        with pytest.raises(UserError, match="the callable 'jpeg'"):
            drpo.train(resumed)
        drpo.train(resumed, reward=jpeg)
        assert all(m["reward_mean"] > 500 for m in metrics_of(home / "run"))
        with pytest.raises(UserError, match="--lr is 'fast'"):
            drpo.train(drpo.Config(lr="fast", out=home / "other", **small))
        assert not (home / "other").exists()

    def test_presets_of_folders(self, models):
        assert drpo.Config.preset(models / "sd").features == "latent-mae"
        assert drpo.Config.preset(str(models / "sdxl")).features == "unet"
        with pytest.raises(UserError, match="Config.preset"):
            drpo.train(drpo.Config(model=str(models / "sd")))

    def test_a_scheduler_s_variables_without_torchrun(self, models, home):
        variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
        run = RunProcess(command(models, steps=1), home, variables)
        assert run.wait() == 0, run.err
        assert (home / "run" / drpo.LORA_FILE).exists()

    def test_gradients_that_are_not_finite(self, models, home):
        """One is not applied, and the log stays JSON; three in a row end the run with a line."""
        one = RunProcess(command(models, "one"), home, {"SPOILT": "2"})
        three = RunProcess(command(models, "three", steps=9), home, {"SPOILT": "3 4 5"})
        assert one.wait() == 0, one.err
        assert [m["applied"] for m in metrics_of(home / "one")] == [True, False, True, True]
        assert metrics_of(home / "one")[1]["loss"] is None
        assert three.wait() == 2
        assert_one_line(three.err, "not finite three times", "--resume")

    def test_drpo_runs_beside_rewards_and_a_model_alone(self, models, tmp_path):
        """Two files and a diffusers folder in an empty folder, as somebody who copies them would
        run it; the list says which rewards stayed behind."""
        for name in ("drpo.py", "rewards.py"):
            shutil.copy(HERE / name, tmp_path)
        shutil.copytree(models / "sd", tmp_path / "model")
        argv = [*TINY, "--model", "model", "--out", "run"]
        alone = dict(cwd=tmp_path, capture_output=True, text=True,
                     env={**os.environ, "PYTHONPATH": ""})
        done = subprocess.run([sys.executable, "drpo.py", *argv], **alone)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / drpo.LORA_FILE).exists()
        done = subprocess.run([sys.executable, "rewards.py", "list"], **alone)
        assert done.returncode == 0, done.stderr
        assert re.search("^hpsv2 +not here: .*hps.py", done.stdout, re.M)

    def test_the_toy_loads_in_every_library(self):
        """transformers 4.57 knows the keys of its text encoder with this prefix alone, as in
        SD-Turbo's file; a pipeline draws what the generator draws."""
        from diffusers import DiffusionPipeline
        from safetensors.torch import load_file
        weights = load_file(drpo.MODELS["toy"] + "/text_encoder/model.safetensors")
        assert all(key.startswith("text_model.") for key in weights)
        G = drpo.load_generator("toy")
        norm, = (value for key, value in G.pipe.text_encoder.state_dict().items()
                 if key.endswith("final_layer_norm.weight"))
        assert torch.equal(norm, weights["text_model.final_layer_norm.weight"].float())
        pipe = DiffusionPipeline.from_pretrained(drpo.MODELS["toy"])
        pipe.set_progress_bar_config(disable=True)
        e = some_noise(1)
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
    "reward-weight": (dict(reward="jpeg=much"), ("much", "jpeg")),
    "watch": (dict(watch="jpge"), ("jpge", "jpeg")),
    "feature": (dict(features="vae,latent-mea"), ("latent-mea", "latent-mae")),
    "kernel": (dict(kernel="laplacan"), ("laplacan", "laplacian")),
    "field": (dict(field="dipol"), ("dipol", "dipole")),
    "prompts": (dict(prompts="animal"), ("animal", "animals")),
    "prompts-empty": (dict(prompts="empty.txt"), ("empty.txt", "empty")),
    "anchors": (dict(anchors=3, candidates=4), ("--anchors", "--candidates", "3", "4")),
    "steps": (dict(steps=0), ("--steps",)),
    "seed": (dict(seed=2 ** 64), ("--seed",)),
    "micro-batch": (dict(micro_batch="-1"), ("--micro-batch",)),
    "radii": (dict(radii="0.2,-1"), ("--radii",)),
    "lr-nan": (dict(lr="nan"), ("--lr",)),
    "device-mps": (dict(device="mps"), ("--device", "mps")),
    "reward-name-not-given": (dict(reward="own.py"), ("own.py:function",)),
    "features-file": (dict(features="latent-mae@none.pth"), ("none.pth",)),
    "features-not-mae": (dict(features="latent-mae@other.pth"), ("other.pth", "latent-MAE")),
    "features-own": (dict(features="own.py:nothing"), ("feature", "own.py:nothing")),
    "out-holds-a-run": (dict(out="old"), ("old", "--resume")),
    "out-is-a-file": (dict(out="prompts.txt"), ("prompts.txt",)),
    "model-folder-empty": (dict(model="old"), ("old", "model_index.json")),
    "reward-raises": (dict(reward="own.py:raises"), ("own.py:raises", "no camera")),
    "resume-nothing": (dict(resume="nowhere", out=None), ("nowhere",)),
    "resume-no-checkpoint": (dict(resume="old", out=None), ("old", "checkpoint")),
    "resume-config-torn": (dict(resume="tornrun", out=None), ("tornrun",)),
    "pairs-empty": (dict(pairs="empty.txt"), ("empty.txt", "empty")),
    "pairs-outside": (dict(pairs="inner/up.jsonl"), ("up.jsonl", "line 2", "outside")),
    "pairs-link": (dict(pairs="inner/link.jsonl"), ("link.jsonl", "line 1", "outside")),
    "pairs-one-side": (dict(pairs="inner/half.jsonl"), ("half.jsonl", "line 1", "rejected")),
}

@pytest.fixture
def traps(home, models):
    """Files that are missing something."""
    def write(name, text):
        (home / name).write_text(text)

    for folder in ("old", "tornrun", "inner"):
        (home / folder).mkdir()
    write("empty.txt", " \n\n")
    torch.save({"decoder.x": torch.zeros(1)}, home / "other.pth")
    old = drpo.Config(model=str(models / "sd"), reward="jpeg", prompts="animals")
    write("old/config.json", json.dumps(asdict(old)))
    write("tornrun/config.json", '{"model":')
    write_pictures(home, 1)
    write_pictures(home / "inner", 2)
    (home / "inner" / "link.png").symlink_to(home / "0.png")
    good = {"prompt": "a cat", "chosen": ["0.png"], "rejected": ["1.png"]}
    for name, rows in {"up": [good, good | {"chosen": ["../0.png"]}],
                       "link": [good | {"rejected": ["link.png"]}],
                       "half": [good | {"rejected": []}]}.items():
        write(f"inner/{name}.jsonl", "\n".join(map(json.dumps, rows)))
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

    def test_settings_and_presets(self):
        """The command line is Config: given before preset before default. The presets are the
        published recipes: arXiv 2606.02521 and the authors' scripts."""
        toy, sd, xl = (drpo.parse(["--model", m]) for m in ("toy", "sd-turbo", "sdxl-turbo"))
        assert toy == drpo.Config(kernel="rbf", average=0.95) == drpo.Config.preset("toy")
        recipe = dict(candidates=24, anchors=8, batch=8, lr=1e-4, steps=1000, lambda_ref=0.2,
                      lora_rank=16, lora_alpha=16.0, weight_decay=0.01, clip=1.0,
                      features="latent-mae", field="released", radii=(0.02, 0.05, 0.2),
                      reward="pickscore")
        assert {name: getattr(sd, name) for name in recipe} == recipe
        recipe |= dict(candidates=16, lr=1e-5, steps=5000, lambda_ref=0.25, features="unet")
        assert {name: getattr(xl, name) for name in recipe} == recipe
        mine = drpo.parse("--model sd-turbo --radii 0.1,0.3 --lr 0.5 --field dipole".split())
        assert mine == drpo.Config.preset("sd-turbo", radii=(0.1, 0.3), lr=0.5, field="dipole")

    def test_import_is_light_and_goes_one_way(self):
        """Heavy libraries are imported when a model is loaded, and drpo.py knows rewards.py
        alone."""
        code = ("import sys, drpo;"
                "heavy = {'diffusers', 'transformers', 'peft', 'accelerate', 'eval'};"
                "assert not heavy & set(sys.modules)")
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE)
        assert done.returncode == 0
        own = {"rewards": set(), "drpo": {"rewards"}, "eval": {"drpo", "rewards"}}
        names = "|".join([*own, *(path.stem for path in (HERE / "lab").glob("*.py"))])
        for name, known in own.items():
            text = (HERE / f"{name}.py").read_text()
            found = re.findall(rf"^\s*(?:import|from) ({names})\b", text, re.M)
            assert set(found) == known, name


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

def some_images(count, size=(64, 64), seed=0):
    """Smooth random pictures with some grain."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.array(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
        grain = rng.integers(-20, 21, (size[1], size[0], 3))
        pictures.append(Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)))
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
        ("jpge", "unknown reward 'jpge'; did you mean jpeg? (for all: python rewards.py list)"),
        ("pick@/some/where", "unknown reward 'pick'; did you mean pickscore"),
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

    def test_reward_user_file(self, tmp_path):
        """A function, a class, an object; by file or by module; what it imports may lie beside
        it."""
        (tmp_path / "neighbour.py").write_text("OFFSET = 10\n")
        file = tmp_path / "mine.py"
        file.write_text("""
import numpy as np
from neighbour import OFFSET
def mean(images, prompts):
    return np.array([np.asarray(i).mean() + OFFSET for i in images])
class Judge:
    def __call__(self, images, prompts):
        return [len(p) + 3 for p in prompts]
judge = Judge()
class Picky:
    def __init__(self, model):
        pass
def short(images):
    return []
def long(images, prompts, model):
    return []
""")
        images = [Image.new("RGB", (4, 4), (20, 20, 20)), Image.new("RGB", (4, 4), (50, 50, 50))]
        for spec, want in ((f"{file}:mean", [30, 60]), (f"{file}:Judge", [4, 6]),
                           (f"{file}:judge", [4, 6]), ("mine:mean", [30, 60])):
            assert rewards.load(spec)(images, ["a", "abc"]).tolist() == want
        (tmp_path / "broken.py").write_text("def f(:\n")
        for spec, words in ((f"{file}:short", "f(images, prompts)"),
                            (f"{file}:long", "f(images, prompts)"), (f"{file}:Picky", "TypeError"),
                            (f"{file}:missing", "AttributeError"),
                            (f"{tmp_path}/broken.py:f", "SyntaxError")):
            with pytest.raises(UserError) as caught:
                rewards.load(spec)
            assert spec in str(caught.value)
            assert words in str(caught.value)

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
        (tmp_path / "loud.py").write_text("""
import os, torch
def loud():
    os.chdir('/')
    torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)
    torch.set_autocast_enabled('cpu', True); torch.set_default_device('meta')
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision('medium')
loud()
class Loud:
    def __init__(self):
        loud()
    def __call__(self, images, prompts):
        loud()
        return [1.0] * len(images)
""")
        monkeypatch.chdir(tmp_path)
        before = [read() for read, _ in rewards.GLOBALS]
        reward = rewards.load("loud.py:Loud")
        assert [read() for read, _ in rewards.GLOBALS] == before
        assert reward(some_images(2), ["a", "b"]).tolist() == [1, 1]
        assert [read() for read, _ in rewards.GLOBALS] == before

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
        """Batches of at most batch_size; a tensor reaches a reward that wants PIL as the very same
        pictures, and untouched one that takes tensors."""
        seen = []

        def counts(images, prompts):
            seen.append(images)
            return mean_red(images, prompts)

        counts.batch_size = 3
        images, prompts = some_images(8), ["x" * i for i in range(8)]
        for given in (images, as_batch(images)):
            assert np.allclose(reward_of(counts)(given, prompts), mean_red(images, prompts))
        assert list(map(len, seen)) == [3, 3, 2, 3, 3, 2]
        grey, = rewards.to_pil(torch.full((1, 3, 2, 2), 0.499))
        assert grey.getpixel((0, 0)) == (127, 127, 127)
        seen.clear()

        def direct(images, prompts):
            seen.append(images)
            return images.mean((1, 2, 3))

        counts.score_tensor = direct
        batch = as_batch(images) * 0.9999
        got = reward_of(counts)(batch, prompts)
        assert torch.allclose(got.float(), batch.mean((1, 2, 3)))
        assert torch.equal(torch.cat(seen), batch)
        assert reward_of(counts)([], []).shape == (0,)
        for wrong in (batch[:, :1], (batch * 255).byte(), batch.flatten(1)):
            with pytest.raises(UserError, match=r"float \(B,3,H,W\) in \[0,1\]"):
                reward_of(counts)(wrong, prompts)

    @pytest.mark.parametrize("form", (list, as_batch))
    def test_rewards_cannot_spoil_each_others_input(self, form):
        """Each part, watched ones too, gets pictures, tensors and prompts of its own."""
        def vandal(images, prompts):
            for image in images:
                image.paste((0, 0, 0), (0, 0, 64, 64))
            prompts.clear()
            return [1.0] * len(images)

        def tensor_vandal(images, prompts):
            images.sub_(1)
            return [1.0] * len(images)

        if form is as_batch:
            vandal.score_tensor = tensor_vandal
        images, prompts = form(some_images(3)), ["a", "bb", "ccc"]
        want = mean_red(some_images(3), prompts)
        parts = {"v": vandal, "m": mean_red}
        reward = rewards.Reward("all", parts, {"v": 1, "m": 1}, parts)
        scores = reward.score(images, prompts, watch=True)
        assert scores["m"].tolist() == pytest.approx(want)
        assert scores["watch/m"].tolist() == pytest.approx(want)
        assert prompts == ["a", "bb", "ccc"]
        assert mean_red(list(images) if form is list else rewards.to_pil(images), prompts) == want

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
        """Against numpy, prompt by prompt: NaN stands for the mean, equal scores add nothing."""
        table = {"a": [1., 2., 4., 9., 5., 5.], "b": [0.3, math.nan, 0.1, 0.2, 7., math.nan]}
        prompts = ["p", "q", "p", "p", "q", "q"]
        parts = {name: (lambda images, prompts, values=values: values)
                 for name, values in table.items()}
        reward = rewards.Reward("both", parts, {"a": 2., "b": -.5})
        want = np.zeros(6)
        for prompt, (name, weight) in itertools.product("pq", reward.weights.items()):
            group = np.array([p == prompt for p in prompts])
            values = np.array(table[name])[group]
            known = values[~np.isnan(values)]
            if known.std() > 0:
                want[group] += weight * np.nan_to_num((values - known.mean()) / known.std())
        assert np.allclose(reward(some_images(6), prompts), want, atol=1e-6)
        # any leading shape, and a candidate on which nobody has an opinion stays NaN
        scores = {"a": torch.tensor([[1., 2., math.nan], [3., 3., 3.]]),
                  "b": torch.tensor([[5., 4., math.nan], [1., 2., 3.]])}
        got = reward.combine(scores)
        assert got[0].tolist() == pytest.approx([-2.5, 2.5, math.nan], nan_ok=True)
        assert got[1].tolist() == pytest.approx([.5 * 1.5 ** .5, 0, -.5 * 1.5 ** .5])
        # equal scores whose mean is not exact
        equal = {"a": torch.full((7,), .1), "b": torch.full((7,), .7)}
        assert reward.combine(equal).tolist() == [0] * 7

    def test_reward_single_is_native(self):
        scores = torch.tensor([.1, math.nan, -3e-8, 7e30], dtype=torch.float64)
        got = reward_of(lambda images, prompts: scores)(some_images(4), ["a", "b", "a", "b"])
        assert torch.equal(got.view(torch.int64), scores.view(torch.int64))
        images, prompts = some_images(3), list("abc")
        less = rewards.load("jpeg=-1")(images, prompts)
        assert torch.equal(less, rewards.load("incompressibility")(images, prompts))

    def test_reward_jpeg(self):
        images = some_images(3, (80, 48)) + [Image.new("RGBA", (80, 48), (9, 200, 30, 255))]
        sizes = []
        for image in images:
            file = io.BytesIO()
            image.convert("RGB").save(file, format="JPEG", quality=95)
            sizes.append(len(file.getvalue()) / 1000)
        assert rewards.load("jpeg")(images, ["p"] * 4).tolist() == [-size for size in sizes]
        tensor = rewards.load("incompressibility")(as_batch(images[:3]), ["p"] * 3)
        assert tensor.tolist() == sizes[:3]
        grey = Image.new("RGB", (512, 512), (128, 128, 128))
        assert float(rewards.load("incompressibility")([grey], ["p"])) == pytest.approx(4.7, abs=.1)


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

    def test_prompt_sets_are_pinned(self, tmp_path, monkeypatch):
        """What comes is checked; a cache that cannot be written is one line."""
        monkeypatch.setenv("DRPO_CACHE", str(tmp_path))
        monkeypatch.setattr(torch.hub, "download_url_to_file",
                            lambda url, path, sha256, progress: Path(path).write_text("a cat\n"))
        with pytest.raises(UserError, match="sha256 differs"):
            rewards.load_prompts("pickapic")
        mine = ("http://x/mine.txt", hashlib.sha256(b"a cat\n").hexdigest())
        monkeypatch.setitem(rewards.PROMPTS, "mine", mine)
        assert rewards.load_prompts("mine") == ["a cat"]
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DRPO_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(UserError, match="could not be fetched.*DRPO_CACHE"):
            rewards.load_prompts("parti")

    def test_pictures_are_seen_as_people_see_them(self, tmp_path):
        """One loader: EXIF orientation, 16-bit grey, alpha on white, the first frame, CMYK."""
        def seen(name):
            return np.asarray(rewards.read_picture(tmp_path / name)).astype(float)

        half = Image.new("RGB", (64, 32), (255, 0, 0))
        half.paste((0, 0, 255), (32, 0, 64, 32))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter
        half.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        assert np.abs(seen("turned.jpg") - np.asarray(half.rotate(-90, expand=True))).mean() < 8
        ramp = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
        Image.fromarray(ramp).save(tmp_path / "ramp.png")
        assert seen("ramp.png").mean() == pytest.approx(127.5, abs=1)
        Image.fromarray((ramp // 300).astype(np.uint16)).save(tmp_path / "dark.png")
        assert seen("dark.png").max() <= 1, "dark, and still 16 bits"
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
        assert seen("clear.png").min() == 255
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([255, 0, 0] * 256)
        palette.save(tmp_path / "palette.png", transparency=0)
        assert seen("palette.png").min() == 255
        frames = [Image.new("RGB", (8, 8), color) for color in ("lime", "blue")]
        frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
        assert seen("moving.gif")[0, 0].tolist() == [0, 255, 0]
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
        assert seen("red.jpg")[0, 0, 0] > 180 > 80 > seen("red.jpg")[0, 0, 1:].max()
        (tmp_path / "cut.png").write_bytes((tmp_path / "ramp.png").read_bytes()[:200])
        (tmp_path / "text.png").write_bytes(b"no picture")
        for name in ("cut.png", "text.png"):
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
        ("imagereward", ["ImageReward.pt", "huggingface.co/THUDM/ImageReward"]),
        ("aesthetic", ["sac+logos+ava1-l14-linearMSE.pth", "DRPO_CACHE"]),
        ("clip@/no/such/place", ["config.json", "/no/such/place", "no such file or folder"]),
        ("hpsv2@EMPTY", ["HPS_v2.1_compressed.pt", "FileNotFoundError"]),
        ("imagereward@JUNK", ["ImageReward.pt", "UnpicklingError"]),
        ("geneval@/no/such/place", ["/no/such/place", "evaluation_metadata.jsonl"])])
    def test_reward_missing_files(self, spec, says, tmp_path, monkeypatch):
        import huggingface_hub.constants

        def download(*args, **kw):
            raise OSError("no route")

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("DRPO_CACHE", str(tmp_path))
        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        (tmp_path / "junk").write_bytes(b"\x80\x02not weights")
        spec = spec.replace("EMPTY", str(tmp_path)).replace("JUNK", str(tmp_path / "junk"))
        with pytest.raises(UserError) as caught:
            rewards.load(spec)
        for word in says:
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)


class TestTheCommandLineOfRewards:
    """python rewards.py; what serves and asks over HTTP is tested in lab/test_rewards.py."""

    def test_reward_cli(self, tmp_path, capsys):
        images = some_images(2, (40, 30))
        paths = [str(tmp_path / f"{i}.png") for i in range(2)]
        for image, path in zip(images, paths):
            image.save(path)
        rewards.main(["score", "jpeg,incompressibility=2", "--prompt", "a cube", *paths])
        head, *lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert head == ["jpeg", "incompressibility", "combined", "file"]
        sizes = rewards.load("incompressibility")(images, ["p"] * 2).tolist()
        for (*numbers, file), path, size in zip(lines, paths, sizes, strict=True):
            combined = 1 if size == max(sizes) else -1
            assert list(map(float, numbers)) == pytest.approx([-size, size, combined])
            assert file == path
        rewards.main(["list"])
        table = capsys.readouterr().out
        assert all(name in table for name in rewards.REWARDS)
        assert "not here" not in table
        assert "yuvalkirstain/PickScore_v1" in table
        assert "3.9 GB" in table


# ===== eval.py

@pytest.fixture(scope="session")
def toy():
    return drpo.load_generator("toy")

@pytest.fixture(scope="session")
def toy_runs(toy, tmp_path_factory):
    """Two runs of the toy as training leaves them: one whose LoRA was never trained, one of random
    weights."""
    folders = []
    for name, scale in (("untrained", 0.0), ("moved", 0.2)):
        torch.manual_seed(0)
        for p in toy.add_lora(4, 4.0):
            p.data += scale * torch.randn(p.shape) * p.shape[-1] ** -0.5
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        config = dict(model="toy", reward="scene", watch="jpeg", seed=0)
        (folder / "config.json").write_text(json.dumps(config))
        toy.save_lora(folder)
        folders.append(folder)
    return folders

def eval_main(capsys, *argv):
    """eval.main -> (exit code, stdout, stderr)."""
    code = 0
    try:
        E.main([*map(str, argv), "--device", "cpu"])
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


class TestEvalPy:
    """Statistics, report, pictures."""

    def test_untrained_lora_changes_nothing_and_the_report_repeats(self, toy_runs, tmp_path,
                                                                   capsys):
        reports = []
        for n in "ab":
            folder = tmp_path / n
            code, out, _ = eval_main(capsys, toy_runs[0], "--limit", 6, "--samples", 4, "--out",
                                     folder)
            assert code == 0
            assert "win rate" in out
            assert (folder / "report.md").read_text() in out
            reports.append((folder / "report.json").read_bytes())
        assert reports[0] == reports[1]
        column = json.loads(reports[0])["columns"]["untrained"]
        assert set(column["rewards"]) == {"scene", "jpeg"}
        for figures in (*column["rewards"].values(), column["accuracy"]["scene"]["all"]):
            assert figures["difference"] == [0, 0, 0]
            assert figures["win_rate"] == [0.5, 0.5, 0.5]
        assert column["distance"] == 0
        assert column["diversity"]["relative"] == [1, 1, 1]
        assert Image.open(tmp_path / "a" / "grid.png").width > 6 * 64

    def test_a_column_for_each_run_and_for_best_of(self, toy_runs, tmp_path, capsys):
        code, out, _ = eval_main(capsys, *toy_runs, "--limit", 4, "--samples", 2, "--best-of", 3,
                                 "--out", tmp_path)
        assert code == 0
        columns = json.loads((tmp_path / "report.json").read_text())["columns"]
        assert list(columns) == ["base", "untrained", "moved", "base best-of-3"]
        # the base's own picture is one of the candidates
        assert columns["base best-of-3"]["rewards"]["scene"]["win_rate"][0] >= 0.5
        assert columns["moved"]["distance"] > 0.02
        assert columns["untrained"]["distance"] == 0
        assert set(columns["moved"]["accuracy"]["scene"]) > {"all"}

    def test_pictures_depend_on_no_batch(self, toy):
        prompts = ["a red circle", "two blue squares", "a triangle"]
        found = []
        for n, at_once in ((3, 2), (3, 5), (2, 16)):
            index, x, _ = zip(*E.generate(toy, prompts, n, 7, at_once))
            assert sum(index, []) == [0, 1, 2]
            found.append(torch.cat(x))
        assert torch.allclose(found[0], found[1], atol=1e-4)
        # noise i is the same for any n
        assert torch.allclose(found[0][:, :2], found[2], atol=1e-4)

    def test_bootstrap_interval_covers_the_truth(self):
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

    def test_intervals_of_little_or_nothing(self):
        assert E.interval([], []) == [None, None, None]
        assert E.interval([2.0], [4]) == [0.5, None, None]
        assert E.mean_interval(np.array([[np.nan, 1.0], [np.nan, np.nan], [3.0, 5.0]]))[0] == 3.0

    def test_win_rate_counts_ties_as_half(self):
        # tie, win; loss, no opinion
        found = E.compare([[1.0, 2.0], [3.0, np.nan]], [[1.0, 3.0], [2.0, 9.0]])
        assert found["win_rate"][0] == pytest.approx(0.5)
        assert found["difference"][0] == pytest.approx(0.0)
        assert E.compare([[1.0], [1.0]], [[2.0], [1.0]])["win_rate"][0] == pytest.approx(0.75)

    def test_diversity_against_a_double_loop(self):
        x, keep = torch.randn(5, 4, 7), np.random.default_rng(0).random((5, 4)) < 0.6
        keep[0], keep[1] = False, True
        for p, found in enumerate(E.pair_distances(x, keep)):
            pairs = [float((x[p, i] - x[p, j]).norm()) for i in range(4) for j in range(i)
                     if keep[p, i] and keep[p, j]]
            assert found == pytest.approx(np.mean(pairs), rel=1e-5) if pairs else np.isnan(found)

    def test_diversity_of_right_pictures_is_compared_on_the_same_prompts(self):
        # an easy prompt of little, a hard one of much diversity, with the very same pictures
        base = torch.tensor([[[0.0], [1.0]], [[0.0], [10.0]]])
        right_base, right_tuned = np.array([[True, True], [True, False]]), np.ones((2, 2), bool)
        found = E.diversity(base, base, right_base, right_tuned)
        assert found["relative"][0] == 1.0
        assert found["prompts"] == 1
        assert found["own"] == pytest.approx(5.5)
        assert E.diversity(base, base, ~right_tuned, right_tuned)["relative"] == [None, None, None]

    def test_best_of_against_a_loop(self):
        P, N, S = 5, 3, 4
        scores = {name: torch.randn(P, N * S) for name in "abc"}
        scores["a"][0, :] = torch.nan
        reward = rewards.Reward("a,b", {"a": None, "b": None}, {"a": 1.0, "b": 0.5})
        index = E.best_index(reward, ["a", "b"], scores, S)
        for p, s in itertools.product(range(P), range(S)):
            slots = [c * S + s for c in range(N)]
            values = reward.combine({name: scores[name][p, slots] for name in "ab"}).tolist()
            assert index[p, s] == slots[int(np.argmax(values))]

    def test_generate_writes_pictures_side_by_side(self, toy_runs, tmp_path, capsys):
        code, _, _ = eval_main(capsys, toy_runs[1], "--generate", "a red circle", "--generate",
                               "two blue squares", "--samples", 2, "--out", tmp_path)
        assert code == 0
        assert Image.open(tmp_path / "generate.png").height > 2 * 64

    @pytest.mark.parametrize("argv,words", (
        ("RUN --prompts empty.txt", "empty"), ("RUN --rewards scenne", "scene"),
        ("RUN --samples 0", "--samples"), ("RUN --smaples 4", "--smaples"),
        ("RUN --limit -1", "--limit"), ("RUN --out empty.txt", "empty.txt"),
        ("folder", "not a readable LoRA"), ("nothing", "no such run"), ("", "name a run"),
        ("torn.safetensors", "not a readable LoRA"),
        ("other.safetensors --model toy --rewards scene", "sdxl-turbo"),
        ("more.safetensors --model toy --rewards scene", "made for elsewhere/toy"),
        ("more.safetensors --model toy", "--rewards")))
    def test_bad_input_is_one_line(self, argv, words, toy_runs, tmp_path, capsys):
        from safetensors.torch import load_file, save_file
        (tmp_path / "empty.txt").write_text("\n\n")
        (tmp_path / "folder").mkdir()
        (tmp_path / "torn.safetensors").write_bytes(b"123")
        state = load_file(toy_runs[0] / drpo.LORA_FILE)
        metadata = {"drpo_base": "sdxl-turbo", "ss_network_dim": "16"}
        save_file(state, tmp_path / "other.safetensors", metadata)
        state["unet.conv_in.lora_A.weight"] = torch.zeros(2, 2)
        metadata["drpo_base"] = "elsewhere/toy"
        save_file(state, tmp_path / "more.safetensors", metadata)
        argv = argv.replace("RUN", str(toy_runs[0])).split()
        with contextlib.chdir(tmp_path):
            code, _, err = eval_main(capsys, "--limit", 1, "--out", "out", *argv)
        assert code == 2
        assert_one_line(err, words)


# ===== cuda

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    """On a GPU; skipped where there is none."""

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

    def test_compiled_equals_eager_on_the_gpu(self, models):
        torch.backends.cudnn.allow_tf32 = False
        gradients = []
        for compiled in (False, True):
            G = drpo.load_generator(str(models / "sd"), device="cuda")
            if compiled:
                drpo.compile_networks(G)
            gradients.append(update_gradient(G, random_lora(G, size=0.1), "vae", 12)[0])
        assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()

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
            def score(self, images, prompts, watch=False):  # a prompt at a time
                table = [TABLE[PROMPTS.index(prompt)][i % 6] for i, prompt in enumerate(prompts)]
                return {"table": torch.tensor(table, dtype=torch.float64)}

        batch = drpo.Batch(PROMPTS, G.encode(PROMPTS), candidates_noise(G))
        _, micro = drpo.gradient_that_fits(G, hungry, ByPlace(TABLE), batch,
                                           small_config(anchors=2), 12)
        assert micro == 6
        assert capsys.readouterr().err.count("out of GPU memory") == 1
        got = torch.cat([p.grad.flatten() for p in params])
        assert (got - want).norm() < 1e-3 * want.norm()

    @pytest.mark.parametrize("kind,dtype", (("sd", "bf16"), ("sd", "fp16"), ("sdxl", "bf16"),
                                            ("sdxl", "fp16")))
    def test_a_run_on_the_gpu(self, kind, dtype, models, home):
        """The micro-batch starts from the free memory; it resumes."""
        with contextlib.chdir(home):
            drpo.main(command(models, kind=kind, dtype=dtype, device="cuda", steps=2,
                              features="vae,unet", preview_every=2))
            drpo.main(["--resume", "run", "--steps", "3"])
        metrics = metrics_of(home / "run")
        applied = [m["applied"] for m in metrics]  # fp16 may find its scale by a failed try
        assert all(applied) if dtype == "bf16" else sum(applied) >= 2
        assert metrics[2]["distance"] > 0
        assert metrics[0]["micro_batch"] == 8
        assert metrics[0]["peak_gib"] > 0
