"""Rewards: any black box that can score a picture, and what is read from outside.

Drifting Preference Optimization only RANKS the candidates of a prompt, so a reward may be a model,
a program, a server, a judge or a person. The whole contract is one call:

    reward(images: list[PIL.Image], prompts: list[str])
        -> one float an image, higher is better, NaN = no opinion

    reward = load("pickscore=1,aesthetic=0.5", device="cuda")
    reward(images, prompts)          float64 (B,), what the candidates are ranked by
    reward.score(images, prompts)    {"pickscore": (B,), "aesthetic": (B,)}, native scales

A spec is `name[=weight],name[=weight],...` where a name is one of
    pickscore                        a name from REWARDS (`python rewards.py list`)
    pickscore@/path/to/copy          the same with its files from a folder (see its docstring)
    my_file.py:function              a function(images, prompts), or a class, made without arguments
    package.module:name              the same from a module on the path or in this folder
    http://127.0.0.1:8000            a reward served by `python rewards.py serve NAME`
    vlm@http://host:8000/v1?model=m  an OpenAI-compatible judge
The weight is what follows the last `=`; in the query of a URL the first `=` of a pair is the pair's
own: `vlm@http://host/v1?model=m=0.5` has weight 0.5. Names hold no comma.

Optional attributes of a reward callable: `batch_size` (at most so many pictures a call);
`score_tensor(images, prompts)`, which takes the pictures as a float tensor (B,3,H,W) in [0,1];
and, where right and wrong can be told, `correct(images, prompts)` -> list of bool (None: not
judged) and `tag(prompt)` -> its task. Each reward gets copies of its own: what it does to them, no
other sees.

    python rewards.py score NAME --prompt "a red cube" image.png ...
    python rewards.py list
    python rewards.py serve NAME [--port 8000] [--host 127.0.0.1]

Environment: REWARD_TOKEN (bearer token of served rewards, both ends), REWARD_PATIENCE (seconds that
a client goes on trying, 600), REWARD_TIMEOUT (seconds for one answer, 300), VLM_TOKEN or
OPENAI_API_KEY (bearer token of the judge).
"""
import argparse
import base64
import binascii
import csv
import difflib
import hashlib
import hmac
import html
import http.client
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import numbers
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""


def one_line(error):
    """An exception as `Type: text` on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# ===== loading, checking, combining

def load(spec, device="cpu", watch=""):
    """A spec (see the top of the file), or a callable -> Reward; watch: a spec of rewards that are
    scored on request and never ranked on. UserError: unknown name, bad weight, missing files."""
    if callable(spec):
        name = spec.__name__ if hasattr(spec, "__name__") else type(spec).__name__
        weights = {name: 1.0}
        parts = {name: spec}
    else:
        name = str(spec)
        weights = parse(spec)
        parts = {part: build(part, device) for part in weights}
    watched = {}
    for part in parse(watch) if watch else ():
        watched[part] = parts[part] if part in parts else build(part, device)
    return Reward(name, parts, weights, watched)


def parse(spec):
    """`name[=weight],...` -> {name: weight}: finite, not 0, and 1.0 where none is given."""
    weights = {}
    for item in str(spec).split(","):
        name = item.strip()
        weight = "1"
        last_pair = re.search(r"\?(?:.*&)?(.*)", name)
        if name.count("=") and (last_pair is None or last_pair[1].count("=") > 1):
            name, _, weight = (text.strip() for text in name.rpartition("="))
        if not name:
            raise UserError(f"reward {spec!r}: an item without a name; write name[=weight],...")
        if name in weights:
            raise UserError(f"reward {spec!r}: {name!r} is named twice")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise UserError(f"reward {spec!r}: the weight {weight!r} of {name!r} is not a number") from None
        if not math.isfinite(weights[name]) or weights[name] == 0:
            raise UserError(f"reward {spec!r}: the weight {weight!r} of {name!r} says nothing; expected a "
                            "finite number that is not 0 (to log a reward only: --watch)")
    return weights


def build(name, device="cpu"):
    """One name of a spec -> its callable. UserError with the nearest names if it is none."""
    if name.startswith(("http://", "https://")):
        return Http(name)
    known, _, path = name.partition("@")
    if known in REWARDS:
        return REWARDS[known](device, path or None)
    source, _, attribute = name.rpartition(":")
    if source and attribute.isidentifier():
        return user_reward(name, source, attribute)
    near = difflib.get_close_matches(known, REWARDS, n=3, cutoff=0.5)
    hint = (f"name what it holds, {name}:function" if name.endswith(".py")
            else "for all names: python rewards.py list")
    raise UserError(f"unknown reward {name!r}{'; nearest: ' + ', '.join(near) if near else ''}; {hint}")


def user_reward(name, source, attribute):
    """`file.py:attribute` or `module:attribute` -> a callable of (images, prompts)."""
    try:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        module = import_file(source) if source.endswith(".py") else importlib.import_module(source)
        reward = getattr(module, attribute)
        reward = reward() if inspect.isclass(reward) else reward
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name!r}: {one_line(error)}") from error
    try:
        inspect.signature(reward).bind("images", "prompts")
    except TypeError as error:
        raise UserError(f"reward {name!r}: it must be callable as f(images, prompts); {error}") from error
    except ValueError:  # a compiled function that tells no signature
        pass
    return reward


def import_file(path):
    """A .py file -> its module, as Python would import it: by its own name, inside its package. So a
    spawned process finds it again, and a neighbour called rewards.py is the neighbour's."""
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    root = path.parent
    name = path.stem
    while (root / "__init__.py").exists():
        root, name = root.parent, f"{root.name}.{name}"
    aside = {}
    for other, module in list(sys.modules.items()):
        neighbour = root / f"{other}.py"
        if other != "__main__" and neighbour.is_file():
            origin = getattr(module, "__file__", None)
            if not origin or not os.path.samefile(origin, neighbour):
                aside[other] = sys.modules.pop(other)
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(root))
        sys.path.append(str(root))
        sys.modules.update(aside)


class Reward:
    """One or several rewards behind one call, every answer checked.

    name: the spec. parts: {name: callable} that rank, weights: {name: float}, watched: {name:
    callable} that are only looked at."""

    def __init__(self, name, parts, weights, watched=None):
        self.name = name
        self.parts = parts
        self.weights = weights
        self.watched = watched or {}

    def __call__(self, images, prompts):
        """images, prompts as in `score` -> float64 (B,): `combine` over those that share a prompt."""
        scores = self.score(images, prompts)
        combined = torch.empty(len(prompts), dtype=torch.float64)
        for prompt in dict.fromkeys(prompts):
            group = torch.tensor([i for i, other in enumerate(prompts) if other == prompt])
            combined[group] = self.combine({name: values[group] for name, values in scores.items()})
        return combined

    def score(self, images, prompts, watch=False):
        """images: list of B PIL images, or a float tensor (B,3,H,W) in [0,1] on any device; prompts:
        list of B strings -> {part: float64 CPU tensor (B,)}, native scales; with watch also
        {"watch/NAME": (B,)}. UserError: a part raised, or did not give B real numbers."""
        if len(images) != len(prompts):
            raise UserError(f"reward {self.name!r}: {len(images)} images but {len(prompts)} prompts")
        tensor = isinstance(images, torch.Tensor)
        if tensor and (images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point()):
            raise UserError(f"reward {self.name!r}: a tensor of pictures is float (B,3,H,W) in [0,1], "
                            f"not {images.dtype} {tuple(images.shape)}")
        parts = dict(self.parts)
        if watch:
            parts |= {f"watch/{name}": part for name, part in self.watched.items()}
        pictures = None if tensor else images
        scores = {}
        for name, part in parts.items():
            call = getattr(part, "score_tensor", None) if tensor else None
            if not call and pictures is None:
                pictures = to_pil(images)
            size = getattr(part, "batch_size", None) or max(len(prompts), 1)
            chunks = [torch.empty(0, dtype=torch.float64)]
            for i in range(0, len(prompts), size):
                chunk = slice(i, i + size)  # copies: what a part does to them no other sees
                own = images[chunk].clone() if call else [image.copy() for image in pictures[chunk]]
                chunks.append(checked(name, call or part, own, list(prompts[chunk])))
            scores[name] = torch.cat(chunks)
        return scores

    def combine(self, scores):
        """{part: (..., K)}, the K candidates of one prompt last -> (..., K).

        One part: weight * score. Several: sum of weight * (score - mean) / std over the K candidates
        (population std); a part that finds all equal adds 0. A NaN in a part stands for that part's
        mean; a candidate on which every part is NaN stays NaN. Watched parts are left out."""
        scores = {name: scores[name] for name in self.weights}
        if len(scores) == 1:
            (name, values), = scores.items()
            return values * self.weights[name]
        total = sum(self.weights[name] * z_score(values) for name, values in scores.items())
        silent = torch.stack([values.isnan() for values in scores.values()]).all(0)
        return total.masked_fill(silent, math.nan)


def z_score(values):
    """(..., K) -> (values - mean) / std over the last dimension, 0 at NaN and where all are equal."""
    values, known = values.double(), ~values.isnan()
    count = known.sum(-1, keepdim=True).clamp(min=1)
    offset = torch.where(known, values - values.nansum(-1, keepdim=True) / count, 0)
    std = (offset.square().sum(-1, keepdim=True) / count).sqrt()
    # equality is asked of the values: the rounding of their mean would leave a std of 1e-17
    low = values.masked_fill(~known, math.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~known, -math.inf).amax(-1, keepdim=True)
    return torch.where(high > low, offset / std, 0)


@torch.no_grad()
def checked(name, call, images, prompts):
    """call(images, prompts), which must give len(images) real numbers or NaN -> float64 (B,)."""
    try:
        values = call(images, prompts)
    except (UserError, torch.OutOfMemoryError):  # the caller may know a smaller batch
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name!r}: {one_line(error)}") from error
    says = f"reward {name!r}: returned"
    rule = "a reward returns one float an image"
    if isinstance(values, torch.Tensor) and values.ndim == 1:
        if values.dtype == torch.bool or values.is_complex() or values.layout != torch.strided:
            raise UserError(f"{says} a tensor of {values.dtype}, {values.layout}; {rule}")
        if values.device.type == "meta":
            raise UserError(f"{says} a meta tensor, which holds no values; {rule}")
        values = values.detach().cpu().to(torch.float64).tolist()
    if isinstance(values, (torch.Tensor, np.ndarray)):
        if values.ndim != 1:
            raise UserError(f"{says} an array of shape {tuple(values.shape)} for {len(images)} images; {rule}")
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{says} {type(values).__name__}; {rule}")
    if len(values) != len(images):
        raise UserError(f"{says} {len(values)} scores for {len(images)} images; {rule}")
    scores = torch.empty(len(values), dtype=torch.float64)
    for i, value in enumerate(values):
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            shown = " ".join(repr(value).split())[:40]
            raise UserError(f"{says} {shown} ({type(value).__name__}) for image {i}; {rule}, NaN = no opinion")
        if math.isinf(value):
            raise UserError(f"{says} {value} for image {i}; a score is finite, or NaN for no opinion")
        scores[i] = float(value)
    return scores


def figures(scores, positive, negative, native):
    """What a run logs of one prompt's scores: combined (K,), the anchors' masks, {part: (K,)}."""
    known = scores[~scores.isnan()]
    of_prompt = {"reward_mean": known.mean(), "reward_std": (known - known.mean()).square().mean().sqrt(),
                 "reward_best": known.max() if len(known) else math.nan,
                 "reward_worst": known.min() if len(known) else math.nan,
                 "gap": scores[positive].mean() - scores[negative].mean(),
                 "skipped": 1 - float(positive.any() and negative.any())}
    for name, values in native.items():
        if name.startswith("watch/"):
            of_prompt[name] = values.nanmean()
        elif len(native) - sum(key.startswith("watch/") for key in native) > 1:
            of_prompt[f"part/{name}"] = values.nanmean()
    return of_prompt


def mean_figures(figures):
    """Dicts of numbers or (R,) tensors, one a prompt -> their means; NaN: a prompt without an opinion."""
    means = {}
    for name in figures[0]:
        values = [torch.as_tensor(of_prompt[name]).float().cpu() for of_prompt in figures]
        means[name] = torch.stack(values).nanmean(0).tolist()
    return means


# ===== files from the web or from a local copy

def pick(kind, name, options, also=""):
    """options[name] (name itself where the options are a tuple), or one line with the nearest names."""
    if name in options:
        return options[name] if isinstance(options, dict) else name
    near = difflib.get_close_matches(str(name), options, 3, 0.4) or list(options)
    raise UserError(f"unknown {kind} {name!r}; did you mean {', '.join(near)}?{f' ({also})' if also else ''}")


def fetch(url, sha256):
    """Path of a file of the web, fetched once into ~/.cache/drpo (or $DRPO_CACHE) and checked."""
    cache = Path(os.environ.get("DRPO_CACHE", Path.home() / ".cache" / "drpo"))
    path = cache / sha256[:12] / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {url}", file=sys.stderr)
        try:
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as e:
            raise UserError(f"{url} could not be fetched ({e}); put the file at {path} and start again") from e
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path}: its sha256 differs from {sha256}; delete it, and it will be fetched again")
    return path


def write_atomic(path, data, keep=None):
    """Bytes beside `path`, then renamed: a reader never sees half a file, a full disk spoils
    nothing. What was there before stays as `keep`."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(beside, path)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({e.strerror}); what was saved before is intact") from e


@contextmanager
def fetching(name, files, repo, path):
    """Turns whatever goes wrong while `files` are loaded into one line that says where they come from."""
    source = path or f"https://huggingface.co/{repo}"
    try:
        if path and not Path(path).exists():
            raise FileNotFoundError("no such file or folder")
        yield
    except Exception as error:
        raise UserError(f"reward {name!r}: cannot load {files} from {source} ({one_line(error)}); "
                        f"for a local copy give {name}@/path/to/folder") from error


def hub_trouble(name, error):
    """What went wrong with a model of the hub, or with a local one, in one line."""
    text = f"{type(error).__name__} {error} {error.__cause__}"
    if re.search(r"\b40[13]\b|Gated", text):
        return (f"{name} is gated or private, or does not exist (HTTP 401 or 403): accept its terms at "
                f"https://huggingface.co/{name}, then: hf auth login")
    return f"{name} could not be loaded ({one_line(error)})"


def repo_file(repo, filename, path):
    """A file of a hub repository: `path` itself if it is a file, the file in it if it is a folder, else a download."""
    if path:
        return Path(path) / filename if Path(path).is_dir() else Path(path)
    from huggingface_hub import hf_hub_download
    return hf_hub_download(repo, filename)


def tokenizer_at(repo, path, max_length):
    """The tokenizer in folder `path` if one lies there, else of the hub's `repo`, as a function of a list of texts ->
    input_ids and attention_mask, (B, max_length)."""
    from transformers import AutoTokenizer
    here = path and any((Path(path) / f).exists() for f in ("tokenizer_config.json", "tokenizer.json", "vocab.json"))
    tokenizer = AutoTokenizer.from_pretrained(path if here else repo)
    return lambda texts: tokenizer(texts, padding="max_length", truncation=True, max_length=max_length,
                                   return_tensors="pt")


UNUSED = re.compile(r"\bswin\.layernorm\.(weight|bias)$")  # a last norm that transformers 5.9 added: no feature uses it


def frozen(cls, source, **options):
    """cls.from_pretrained(source) in float32 on the CPU, in eval mode. `source` is None when the options bring config
    and state_dict. A weight that the source lacks is an error, never random."""
    model, report = cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    missing = sorted(key for key in report["missing_keys"] if not UNUSED.search(key))
    if missing:
        raise ValueError(f"{len(missing)} weights missing, {missing[0]} first")
    return model.eval().requires_grad_(False)


def half_on(device):
    """float16 on a GPU (CLIP models were trained and are served in it), float32 on the CPU."""
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def linear_head(weights, prefix, device):
    """The heads of the LAION predictor and of ImageReward: linear layers 0, 2, 4, 6, 7 with nothing between them (the
    numbers left out were dropouts) -> function (B, D) -> (B,) in float32."""
    layers = [[weights[f"{prefix}layers.{i}.{kind}"].to(device, torch.float32) for kind in ("weight", "bias")]
              for i in (0, 2, 4, 6, 7)]

    def head(x):
        for weight, bias in layers:
            x = F.linear(x.float(), weight, bias)
        return x.squeeze(-1)
    return head


def takes_tensors(score, batch_size):
    """Marks a function that takes PIL images and tensors alike."""
    score.score_tensor = score
    score.batch_size = batch_size
    return score


# ===== rewards that need no model

def no_files(reward):
    """The factory of a reward that needs neither device nor files."""
    def factory(device="cpu", path=None):
        if path:
            raise UserError(f"reward {reward.__name__!r}: it takes no path")
        return reward
    factory.__doc__ = reward.__doc__
    return factory


def scene(device="cpu", path=None):
    """Pictures of coloured shapes against their captions, by a program: lab/scene.py:scene.

    model    none: a program
    licence  none
    size     0
    scale    0 to 1; the toy's captions alone, every other one gives NaN
    source   lab/scene.py
    compared nothing: it is the original
    """
    return user_reward("scene", str(HERE / "lab" / "scene.py"), "scene")


def incompressibility(images, prompts):
    """Size of the picture as JPEG: detail, clutter, noise. The prompt is ignored.

    model    none
    licence  none
    size     0
    scale    bytes / 1000 at quality 95; 512x512: flat grey 4.7, uniform noise 308
    source   Black et al. 2023 (DDPO), arXiv 2305.13301
    compared DDPO's definition: the same bytes
    """
    def kilobytes(image):
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=95)
        return file.tell() / 1000
    with ThreadPoolExecutor(8) as pool:  # the encoder releases the interpreter lock
        return list(pool.map(kilobytes, images))


def jpeg(images, prompts):
    """Compressibility, the negative of incompressibility: smooth, simple pictures. The prompt is ignored.

    model    none
    licence  none
    size     0
    scale    -bytes / 1000 at quality 95; 512x512: flat grey -4.7, uniform noise -308
    source   Black et al. 2023 (DDPO), arXiv 2305.13301
    compared DDPO's definition: the same bytes
    """
    return [-size for size in incompressibility(images, prompts)]


# ===== CLIP and its descendants

CLIP_L = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VIT_H = {  # open_clip's ViT-H-14, which PickScore and HPSv2 are tuned from
    "projection_dim": 1024,
    "text_config": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                        hidden_act="gelu", projection_dim=1024),
    "vision_config": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                          hidden_act="gelu", projection_dim=1024, patch_size=14),
}


@lru_cache
def constants(channels, device):
    """Three numbers as (3,1,1) on the device; kept there, since sending them makes the GPU wait."""
    return torch.tensor(channels, device=device).view(3, 1, 1)


def clip_pixels(images, device, size=224, fit="floor"):
    """list of PIL images or float (B,3,H,W) in [0,1] -> float32 (B,3,size,size), normalised as CLIP does.

    fit "floor": the short side becomes `size` and the middle is cut out, an odd pixel left at the far side as in
    transformers; "round": cut as torchvision does (other by a pixel for some shapes, never for squares); "pad": the
    long side becomes `size`, the rest is black, in float and resized once, as HPSv2 does. A tensor goes through the
    same arithmetic as PIL's bicubic filter, rounding between its two passes included, so that a picture scores the
    same before and after it is saved. Pillow 13 itself resizes some shapes unlike Pillow 11 (300x801: 13% of the
    values, by up to 8 levels); against Pillow 13 a smooth 768x768 differs in 0.42% of the values, a checkerboard in
    4.5%, by one level."""
    if isinstance(images, torch.Tensor):
        batches = [images.to(device)]
    else:
        batches = images
    resize = pad_resize if fit == "pad" else crop_resize
    squares = []
    for batch in batches:
        x = resize(batch, size)  # (b,3,h,w), 0..1
        left = (size - x.shape[-1]) / 2
        top = (size - x.shape[-2]) / 2  # negative: cuts
        left, top = (int(round(left)), int(round(top))) if fit == "round" else (int(left), int(top))
        squares.append(F.pad(x, (left, size - x.shape[-1] - left, top, size - x.shape[-2] - top)))
    mean = constants(CLIP_MEAN, device)
    std = constants(CLIP_STD, device)
    return (torch.cat([x.to(device) for x in squares]) - mean) / std


def pad_resize(image, size):
    """PIL image or (B,3,H,W) in [0,1] -> (b,3,h,w), the long side `size`: float, bicubic, antialiased, not clamped."""
    x = as_tensor(image)[None] if isinstance(image, Image.Image) else image.float().clamp(0, 1)
    scale = size / max(x.shape[-2:])  # the product v * (size / longest), which rounds otherwise for 85 x 320
    return F.interpolate(x, [round(v * scale) for v in x.shape[-2:]], mode="bicubic", antialias=True)


def crop_resize(image, size):
    """PIL image or (B,3,H,W) in [0,1] -> (b,3,h,w), the short side `size`: 8 bits and PIL's bicubic filter."""
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
    short = min(width, height)
    width = int(size * width / short)
    height = int(size * height / short)
    if isinstance(image, Image.Image):
        small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return as_tensor(small)[None]
    x = (image.float().clamp(0, 1) * 255).round()
    for shape in ((x.shape[-2], width), (height, width)):  # columns, then rows
        x = F.interpolate(x, size=shape, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    return x / 255


class Clip:
    """A frozen CLIPModel and its tokenizer: unit embeddings of pictures and texts in float32.

    The embedding of each prompt is computed once and kept: all candidates of a prompt share it.
    """

    def __init__(self, model, tokenize, device, fit="floor"):
        self.tokenize = tokenize
        self.fit = fit
        self.known = {}
        self.size = model.config.vision_config.image_size
        self.scale = model.logit_scale.float().exp().item()
        self.model = model.to(device, half_on(device))  # after the scale: in half precision it would be 0.2% off

    @torch.no_grad()
    def image(self, images):
        """list of PIL images or (B,3,H,W) in [0,1] -> (B,D)."""
        pixels = clip_pixels(images, self.model.device, self.size, self.fit).to(self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def text(self, texts):
        """list of B strings -> (B,D)."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if len(self.known) + len(new) > 4096:
            self.known = {}
            new = list(dict.fromkeys(texts))
        for i in range(0, len(new), 256):
            # padding comes after the token that is pooled, and attention looks back only: no mask is needed. One, or a
            # copy that blocks, would make the host wait for the GPU
            tokens = self.tokenize(new[i:i + 256])["input_ids"].to(self.model.device, non_blocking=True)
            pooled = self.model.text_model(input_ids=tokens).pooler_output
            embeds = F.normalize(self.model.text_projection(pooled).float(), dim=-1)
            self.known.update(zip(new[i:i + 256], embeds))
        return torch.stack([self.known[text] for text in texts])

    def cosine(self, images, texts):
        """B pictures and B texts -> (B,) cosines."""
        return (self.image(images) * self.text(texts)).sum(-1)


def clip_at(name, repo, device, path, fit="floor"):
    """CLIP from a folder or the hub -> Clip."""
    from transformers import CLIPModel
    with fetching(name, "config.json, model.safetensors and the tokenizer", repo, path):
        return Clip(frozen(CLIPModel, path or repo), tokenizer_at(repo, path, 77), device, fit)


def pickscore(device="cpu", path=None):
    """Human preference between pictures of one prompt.

    model    yuvalkirstain/PickScore_v1 (CLIP ViT-H-14)
    licence  MIT (code)
    size     3.9 GB
    scale    exp(logit_scale) * cosine, 20 to 23: the scale is about 100, so these are papers' "PickScore x 100"
    source   Kirstain et al. 2023, arXiv 2305.01569
    compared the model card's code, transformers: 7e-6 of a spread of 1.9; fp16 (on a GPU; the original runs float32)
             costs 0.0074 of a spread of 0.27, order kept
    path     a copy of the repository
    """
    model = clip_at("pickscore", PICKSCORE, device, path)
    return takes_tensors(lambda images, prompts: model.scale * model.cosine(images, prompts), 256)


def clip(device="cpu", path=None):
    """Agreement of picture and prompt.

    model    openai/clip-vit-large-patch14
    licence  MIT (code)
    size     1.7 GB
    scale    cosine, 0.2 to 0.3
    source   Radford et al. 2021, arXiv 2103.00020
    compared CLIPModel with its own processor, transformers: 6e-8; fp16 costs 1.4e-4, order kept
    path     a copy of the repository
    """
    model = clip_at("clip", CLIP_L, device, path)
    return takes_tensors(lambda images, prompts: model.cosine(images, prompts), 256)


AESTHETIC = ("https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/"
             "6934dd81792f086e613a121dbce43082cb8be85e/sac+logos+ava1-l14-linearMSE.pth",
             "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0")  # 3,714,759 bytes


def aesthetic(device="cpu", path=None):
    """How much people like the picture; the prompt is ignored.

    model    sac+logos+ava1-l14-linearMSE.pth (LAION), on openai/clip-vit-large-patch14
    licence  Apache-2.0 (head), MIT (CLIP's code)
    size     1.7 GB
    scale    4 to 7 of 1 to 10
    source   github.com/christophschuhmann/improved-aesthetic-predictor 6934dd81
    compared that repository's code with the real head, random CLIP: the same crops; fp16 costs 0.002, order kept
    path     the head's file (CLIP from the hub), or a folder with it (also as aesthetic-model.pth) and a copy of CLIP
    """
    file = Path(path) if path else None
    if file and file.is_dir():
        names = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")
        file = next((file / name for name in names if (file / name).exists()), file / names[0])
    with fetching("aesthetic", "the head", "trl-lib/ddpo-aesthetic-predictor", path):
        weights = torch.load(file or fetch(*AESTHETIC), map_location="cpu", weights_only=True)
        head = linear_head(weights, "", device)
    model = clip_at("aesthetic", CLIP_L, device, path if path and Path(path).is_dir() else None, "round")
    return takes_tensors(torch.no_grad()(lambda images, prompts: head(model.image(images))), 256)


def hpsv2(device="cpu", path=None):
    """Human preference, version 2.1; pictures that are not square are padded with black.

    model    HPS_v2.1_compressed.pt of xswu/HPSv2 (CLIP ViT-H-14), tokenizer of yuvalkirstain/PickScore_v1
    licence  Apache-2.0
    size     2.0 GB
    scale    cosine, 0.25 to 0.31
    source   Wu et al. 2023, arXiv 2306.09341
    compared hpsv2 1.2.0 of PyPI: pictures 0.0 levels apart; texts, 3 of 25,432 Pick-a-Pic prompts get other tokens.
             Figures of HPSv2 depend on antialiasing: without it scores move by up to 0.021
    path     the .pt file of version 2.1 or 2.0 (HPS_v2_compressed.pt, which DrPO's authors use), or a folder with the
             2.1 file and, to stay off the hub, the files of any CLIP tokenizer
    """
    from transformers import CLIPConfig, CLIPModel
    repo = "xswu/HPSv2"
    file = "HPS_v2.1_compressed.pt"
    with fetching("hpsv2", file, repo, path):
        weights = torch.load(repo_file(repo, file, path), map_location="cpu", weights_only=True)["state_dict"]
        model = frozen(CLIPModel, None, config=CLIPConfig(**VIT_H), state_dict=from_open_clip(weights))
    with fetching("hpsv2", "the tokenizer", PICKSCORE, None):
        tokenize = tokenizer_at(PICKSCORE, path, 77)
        model = Clip(model, lambda texts: tokenize([repaired(text) for text in texts]), device, "pad")
    return takes_tensors(lambda images, prompts: model.cosine(images, prompts), 256)


def repaired(text):
    """What open_clip's tokenizer does to a text first, without ftfy: HTML entities, quotes, wide letters, ligatures."""
    text = html.unescape(html.unescape(text))
    text = re.sub("[\u02bc\u2018-\u201b]", "'", text)
    text = re.sub("[\u201c-\u201f]", '"', text)
    text = re.sub("[\uff01-\uff5e\u3000\ufb00-\ufb06]", lambda m: unicodedata.normalize("NFKC", m[0]), text)
    return unicodedata.normalize("NFC", text).strip()


OPEN_CLIP_NAMES = [  # (open_clip's, transformers')
    ("transformer.resblocks.", "encoder.layers."), ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
    ("class_embedding", "embeddings.class_embedding"), ("token_embedding", "embeddings.token_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"), ("conv1", "embeddings.patch_embedding"),
    ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm"),
]


def renamed(key, pairs):
    """The key with every (old, new) replaced, in order."""
    for old, new in pairs:
        key = key.replace(old, new)
    return key


def from_open_clip(weights):
    """State dict of open_clip's CLIP -> state dict of transformers' CLIPModel."""
    converted = {"visual_projection.weight": weights["visual.proj"].T.contiguous(),
                 "text_projection.weight": weights["text_projection"].T.contiguous(),
                 "logit_scale": weights["logit_scale"]}
    for key, value in weights.items():
        if key in ("visual.proj", "text_projection", "logit_scale"):
            continue
        tower = "vision_model." if key.startswith("visual.") else "text_model."
        key = tower + renamed(key.removeprefix("visual."), OPEN_CLIP_NAMES)
        if "attn.in_proj_" in key:  # queries, keys and values in one matrix
            for letter, third in zip("qkv", value.chunk(3)):
                converted[key.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = third
        else:
            converted[key] = value
    return converted


# ===== ImageReward

BLIP_TEXT = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
                 vocab_size=30524, layer_norm_eps=1e-12, encoder_hidden_size=1024)
BLIP_VISION = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                   patch_size=16, image_size=224, layer_norm_eps=1e-6)
BLIP_NAMES = [  # (ImageReward's, transformers')
    ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"), ("blocks.", "encoder.layers."), (".attn.", ".self_attn."),
    (".proj.", ".projection."), (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
]


def imagereward(device="cpu", path=None):
    """Human preference, trained on rankings with text-image agreement in mind.

    model    ImageReward.pt of THUDM/ImageReward (BLIP), tokenizer of bert-base-uncased
    licence  Apache-2.0
    size     1.8 GB
    scale    about -2 to 2, normalised to mean 0 and std 1 over its training pictures
    source   Xu et al. 2023, arXiv 2304.05977
    compared image-reward 1.5 of PyPI: 0 where the crop agrees, which it does now; fp16 (on a GPU; the original runs
             float32) costs 0.011 of a spread of 4.3, order kept
    path     ImageReward.pt, or a folder with it and, to stay off the hub, the files of bert-base-uncased's tokenizer
    """
    with fetching("imagereward", "ImageReward.pt", "THUDM/ImageReward", path):
        weights = torch.load(repo_file("THUDM/ImageReward", "ImageReward.pt", path), map_location="cpu",
                             weights_only=True)
        vision, text = from_blip(weights, device)
        head = linear_head(weights, "mlp.", device)
    with fetching("imagereward", "the tokenizer", "bert-base-uncased", None):
        tokenize = tokenizer_at("bert-base-uncased", path, 35)

    @torch.no_grad()
    def score(images, prompts):
        pixels = clip_pixels(images, device, vision.config.image_size, "round").to(vision.dtype)
        patches = vision(pixel_values=pixels).last_hidden_state  # (B, 1 + patches, D)
        tokens = tokenize(list(prompts)).to(device)
        read = text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=patches)
        return (head(read.last_hidden_state[:, 0]) - 0.16717362830052426) / 1.0333394966054072
    return takes_tensors(score, 64)


def from_blip(weights, device):
    """State dict of ImageReward -> transformers' BlipVisionModel and BlipTextModel."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    seen = {}
    read = {}
    for key, value in weights.items():
        if key.startswith("blip.visual_encoder."):
            key = re.sub(r"^norm\.", "post_layernorm.", key.removeprefix("blip.visual_encoder."))
            seen[renamed(key, BLIP_NAMES)] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            read[key.removeprefix("blip.text_encoder.")] = value
    vision = frozen(BlipVisionModel, None, config=BlipVisionConfig(**BLIP_VISION), state_dict=seen)
    text = frozen(BlipTextModel, None, config=BlipTextConfig(**BLIP_TEXT), state_dict=read, add_pooling_layer=False)
    return vision.to(device, half_on(device)), text.to(device, half_on(device))


HPSV3_TOKENS = ("<|Reward|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>",
                "<|endoftext|>", "<|video_pad|>")  # in a prompt they would be read as the model's own


def hpsv3(device="cpu", path=None):
    """Human preference, version 3, through its authors' package.

    model    MizzenAI/HPSv3 on Qwen/Qwen2-VL-7B-Instruct (another 16.6 GB, downloaded first), by the package hpsv3
    licence  MIT (package and weights), Apache-2.0 (Qwen2-VL)
    size     16.6 GB + 16.6 GB
    scale    mean of the predicted preference, in the package's own unit
    source   Ma et al. 2025, arXiv 2508.03789
    compared hpsv3's own call on a tiny random Qwen2-VL: the arguments and the first component
    path     the package's checkpoint file. The package pins old libraries: install it in an environment of its own, run
             `python rewards.py serve hpsv3` there and use `--reward http://127.0.0.1:8000` here
    """
    install = "in an environment of its own: pip install hpsv3 matplotlib tensorboard rich tyro, then: python rewards.py " \
              "serve hpsv3; then here http://HOST:8000"
    try:
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{path} is no checkpoint file")
        from hpsv3 import HPSv3RewardInferencer
        model = HPSv3RewardInferencer(device=str(device), **({"checkpoint_path": str(path)} if path else {}))
    except Exception as error:
        raise UserError(f"reward 'hpsv3': its package cannot be used ({one_line(error)}); {install}") from error

    @torch.no_grad()  # else each call would keep a graph of 7 billion parameters
    def score(images, prompts):
        for prompt, token in itertools.product(dict.fromkeys(prompts), HPSV3_TOKENS):
            if token in prompt:
                raise UserError(f"reward 'hpsv3': the prompt {prompt[:60]!r} holds its special token {token}")
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, f"{i}.png") for i in range(len(images))]
            for image, file in zip(images, paths):
                image.convert("RGB").save(file)
            return [float(mu_and_sigma[0]) for mu_and_sigma in model.reward(prompts=list(prompts), image_paths=paths)]
    score.batch_size = 8
    return score


# ===== GenEval: does the picture hold the objects that the prompt asks for, in number, colour and place?

COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", ")
COLOURS = "red orange yellow green blue purple pink brown black white".split()
COLOUR_TEXTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GENEVAL_PROMPTS = ("https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/"
                   "prompts/evaluation_metadata.jsonl",
                   "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13")  # 85,209 bytes


class Found(NamedTuple):
    """One detected object: box (x0, y0, x1, y1) in pixels, its score, and its mask (H,W) or None."""
    box: tuple
    score: float
    mask: torch.Tensor = None


def confident(objects, tag):
    """{class: [Found]} -> the same, best first (of equal ones the last), without those at or below the threshold (0.9
    when the prompt counts, else 0.3), and at most 16 of a class."""
    threshold = 0.9 if tag == "counting" else 0.3
    kept = {}
    for name, found in objects.items():
        ordered = sorted(found, key=lambda f: f.score)[::-1]
        kept[name] = [f for f in ordered if f.score > threshold][:16]
    return kept


def relative_position(a, b):
    """Boxes a, b -> where a lies as seen from b: a subset of {"left of", "right of", "above", "below"}.

    Centres nearer than a tenth of the summed sizes do not count as apart; a direction counts when it makes up more than
    half of the distance between the centres.
    """
    a = np.array(a, float).reshape(2, 2)
    b = np.array(b, float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    margin = 0.1 * ((a[1] - a[0]) + (b[1] - b[0]))
    apart = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    dx, dy = apart / np.linalg.norm(offset)
    relations = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in relations.items() if holds}


def judge(wanted, objects, colours):
    """One picture against the metadata of its prompt -> (correct: bool, dense score in [0,1], 1 exactly when correct).

    wanted: {"include": [{"class", "count", "color"?, "position"?: [relation, index of an earlier clause]}],
    "exclude"?: [{"class", "count"}]}; objects: {class: [Found]}, confident and best first; colours(found, class) ->
    the colour of each. Every clause gives terms in [0,1] (share of the objects found, share of them in their colour,
    place 0 or 1, an excess over what is excluded); correct = all are 1, dense = their mean.
    """
    terms = []
    groups = []
    for clause in wanted.get("include", []):
        name = clause["class"]
        count = clause["count"]
        found = objects.get(name, [])[:count]
        first = len(terms)
        terms.append(len(found) / count)
        if "color" in clause:
            terms.append(min(colours(found, name).count(clause["color"]) / count, 1) if found else 0)
        if "position" in clause:
            relation, target = clause["position"]
            holds = min(terms[first:]) == 1 and groups[target] is not None
            terms.append(float(holds and all(relation in relative_position(f.box, other.box)
                                             for f in found for other in groups[target])))
        groups.append(found if min(terms[first:]) == 1 else None)
    for clause in wanted.get("exclude", []):
        allowed = clause["count"] - 1
        excess = max(len(objects.get(clause["class"], [])) - allowed, 0)
        terms.append(max(1 - excess / max(allowed, 1), 0))
    return all(term == 1 for term in terms), sum(terms) / max(len(terms), 1)


def detections(class_logits, mask_logits, padded, inside, size, floor=0.3):
    """What Mask2Former says of one picture -> {class: [Found]} of scores above `floor`.

    class_logits (Q, 81), the last column 'nothing'; mask_logits (Q, h, w) over the padded input of (H, W) = `padded`,
    whose upper left `inside` (H, W) is the picture, itself of (H, W) = `size`. Of the 100 most probable pairs of query
    and class, score = class probability x mean mask probability inside the mask.
    """
    probability, index = class_logits.softmax(-1)[:, :-1].flatten().topk(min(100, class_logits[:, :-1].numel()))
    index = index[probability > floor]
    probability = probability[probability > floor]  # the mask factor is at most 1
    objects = {}
    for p, i in zip(probability.tolist(), index.tolist()):
        query, name = divmod(i, len(COCO))
        logits = F.interpolate(mask_logits[None, None, query], size=padded, mode="bilinear")
        logits = F.interpolate(logits[..., :inside[0], :inside[1]], size=size, mode="bilinear")[0, 0]
        mask = logits > 0
        if not mask.any():
            continue
        score = p * logits[mask].sigmoid().mean().item()
        y = mask.any(1).nonzero()
        x = mask.any(0).nonzero()
        box = (x[0].item(), y[0].item(), x[-1].item() + 1, y[-1].item() + 1)
        if score > floor:
            objects.setdefault(COCO[name], []).append(Found(box, score, mask))
    return objects


class Detector:
    """Mask2Former (Swin-S) for the 80 COCO classes, from a folder or the hub, without scipy: the class transformers
    offers wants it for its training loss, so this is its trunk with a class layer."""

    def __init__(self, source, device):
        from transformers.models.mask2former.modeling_mask2former import Mask2FormerModel, Mask2FormerPreTrainedModel

        class Trunk(Mask2FormerPreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.model = Mask2FormerModel(config)
                self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
                self.post_init()
        self.trunk = frozen(Trunk, source).to(device)
        self.device = device
        if self.trunk.config.num_labels != len(COCO):
            raise ValueError(f"the detector knows {self.trunk.config.num_labels} classes, not the 80 of COCO")

    def logits(self, pixels):
        """(B,3,H,W) normalised -> class logits (B,Q,81), mask logits (B,Q,H/4,W/4)."""
        out = self.trunk.model(pixels, output_hidden_states=True)
        queries = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.trunk.class_predictor(queries), out.masks_queries_logits[-1]

    @torch.no_grad()
    def __call__(self, images):
        """(B,3,H,W) in [0,1] -> B times {class: [Found]}."""
        size = images.shape[-2:]
        scale = min(800 / min(size), 1333 / max(size))
        inside = [round(scale * side) for side in size]
        x = F.interpolate(images, size=inside, mode="bilinear", antialias=True)
        mean, std = (constants(c, self.device) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = F.pad((x - mean) / std, (0, -inside[1] % 32, 0, -inside[0] % 32))
        classes, masks = self.logits(x)
        return [detections(c, m, x.shape[-2:], inside, size) for c, m in zip(classes, masks)]


class GenEval:
    """The GenEval judge: `__call__` and `score_tensor` give the dense score in [0,1], `correct` the strict verdict.

    detect: (B,3,H,W) -> B times {class: [Found]}. clip: the Clip that names colours. metadata: {prompt: its line of the
    benchmark}. A prompt that is not of the benchmark scores NaN; its tag and verdict are None.
    """
    batch_size = 8

    def __init__(self, detect, clip, metadata, device):
        self.detect = detect
        self.clip = clip
        self.metadata = metadata
        self.device = device
        self.prompts = list(metadata)

    def __call__(self, images, prompts):
        """list of B PIL images or (B,3,H,W) in [0,1], list of B prompts -> list of B dense scores."""
        return [math.nan if verdict is None else verdict[1] for verdict in self.verdicts(images, prompts)]

    score_tensor = __call__

    def correct(self, images, prompts):
        """The same arguments -> list of True, False, or None for a prompt that is not of the benchmark."""
        verdicts = []
        for i in range(0, len(prompts), self.batch_size):
            part = slice(i, i + self.batch_size)
            verdicts += self.verdicts(images[part], prompts[part])
        return [None if verdict is None else verdict[0] for verdict in verdicts]

    def tag(self, prompt):
        """The task of a prompt (single_object, two_object, counting, colors, position, color_attr) or None."""
        return self.metadata[prompt]["tag"] if prompt in self.metadata else None

    def verdicts(self, images, prompts):
        """list of (correct, dense), or None for unknown prompts."""
        verdicts = [None] * len(prompts)
        known = [i for i, prompt in enumerate(prompts) if prompt in self.metadata]
        pictures = [as_tensor(images[i]).to(self.device) for i in known]
        if len({picture.shape for picture in pictures}) == 1:
            objects = self.detect(torch.stack(pictures))
        else:
            objects = [self.detect(picture[None])[0] for picture in pictures]
        for i, picture, found in zip(known, pictures, objects):
            wanted = self.metadata[prompts[i]]
            verdicts[i] = judge(wanted, confident(found, wanted["tag"]), partial(self.colours, picture))
        return verdicts

    def colours(self, picture, found, name):
        """picture (3,H,W), [Found], their class -> the colour of each, by CLIP on the masked object over grey #999."""
        texts = self.clip.text([text.format(colour, name) for colour in COLOURS for text in COLOUR_TEXTS])
        classes = F.normalize(texts.view(len(COLOURS), len(COLOUR_TEXTS), -1).mean(1), dim=-1)
        names = []
        for box, _, mask in found:
            crop = torch.where(mask, picture, 0.6)[None, :, box[1]:box[3], box[0]:box[2]]
            names.append(COLOURS[(self.clip.image(crop) @ classes.T).argmax().item()])
        return names


def geneval_metadata(path=None):
    """The 553 prompts of the benchmark, from a file or its repository -> {prompt: {"tag", "include", "exclude"?}}."""
    metadata = {}
    for number, line in lines_of(read_text(path or fetch(*GENEVAL_PROMPTS))):
        try:
            wanted = json.loads(line)
            missing = {"prompt", "tag", "include"} - set(wanted)
            if missing:
                raise ValueError(f"it lacks {sorted(missing)}")
            unknown = {c["class"] for c in wanted["include"] + wanted.get("exclude", [])} - set(COCO)
            if unknown:
                raise ValueError(f"classes that COCO lacks: {sorted(unknown)}")
            metadata[wanted["prompt"]] = wanted
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number}: {one_line(error)}") from error
    return metadata


def geneval(device="cpu", path=None):
    """Object-focused agreement with the 553 GenEval prompts; other prompts get no opinion.

    model    facebook/mask2former-swin-small-coco-instance and openai/clip-vit-large-patch14
    licence  MIT (benchmark)
    size     2.0 GB
    scale    dense 0 to 1; strict accuracy, mean of six tags: SD1.5 0.43, SD2.1 0.50, SDXL 0.55
    source   Ghosh et al. 2023, arXiv 2310.11513; prompts of github.com/djghosh13/geneval af4902f2
    compared its evaluation script: 0 disagreements in 11,060 detections over all 553 prompts. The official detector is
             mmdet's checkpoint, this one Facebook's of the same architecture: quoted figures are not strictly comparable
    path     evaluation_metadata.jsonl, or a folder with it and copies of the two repositories in mask2former/ and clip/
    """
    folder = Path(path) if path and Path(path).is_dir() else None

    def local(name):
        return str(folder / name) if folder and (folder / name).exists() else None
    try:
        metadata = geneval_metadata(local("evaluation_metadata.jsonl") if folder else path)
    except Exception as error:
        raise UserError(f"reward 'geneval': cannot read {path or GENEVAL_PROMPTS[0]} ({one_line(error)}); for a local "
                        "copy give geneval@/path/to/evaluation_metadata.jsonl") from error
    repo = "facebook/mask2former-swin-small-coco-instance"
    with fetching("geneval", "the detector", repo, local("mask2former")):
        detect = Detector(local("mask2former") or repo, device)
    return GenEval(detect, clip_at("geneval", CLIP_L, device, local("clip"), "round"), metadata, device)


# ===== rewards behind a URL

WAITING = set()  # URLs whose trouble has been told


def seconds(variable, default):
    """A number of seconds from the environment."""
    try:
        return float(os.environ.get(variable, default))
    except ValueError:
        raise UserError(f"{variable}={os.environ[variable]!r} is not a number of seconds") from None


def post_json(url, payload, token, who):
    """POST a JSON value, return the JSON answer. Connection errors, 429 and 5xx are tried again with growing pauses, or
    after what Retry-After asks, until REWARD_PATIENCE is used up; any other refusal is a UserError at once."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    body = json.dumps(payload).encode()
    patience = seconds("REWARD_PATIENCE", 600)
    timeout = seconds("REWARD_TIMEOUT", 300)
    deadline = time.monotonic() + patience
    pause = 0.5
    here = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * here)  # no proxy to this machine
    while True:
        asked = 0
        try:
            try:
                answer = opener.open(urllib.request.Request(url, body, headers), timeout=timeout)
            except urllib.error.HTTPError as refusal:
                answer = refusal
            with answer:
                status = answer.status
                text = answer.read()
                given = answer.headers.get("Retry-After", "")
        except (OSError, http.client.HTTPException) as error:  # URLError, time-outs and broken connections among them
            trouble = one_line(error)
        else:
            trouble = f"HTTP {status}: {' '.join(text.decode(errors='replace').split())[:200]}"
            asked = int(given) if given.isdecimal() else 0
            if status < 400:
                WAITING.discard(url)
                value = parsed(text, who)
                if isinstance(value, dict) and value.get("error"):  # some servers say so with status 200
                    raise UserError(f"{who}: it answered with an error: {' '.join(str(value['error']).split())[:200]}")
                return value
            if status != 429 and status < 500:
                raise UserError(f"{who}: {trouble}")
        left = deadline - time.monotonic()
        if left <= 0:
            raise UserError(f"{who}: {trouble}; gave up after {patience:g} s (REWARD_PATIENCE)")
        if url not in WAITING:
            WAITING.add(url)
            print(f"{who}: {trouble}; trying again for up to {patience:g} s", file=sys.stderr, flush=True)
        time.sleep(min(max(pause, asked), left))
        pause = min(2 * pause, 10)


def parsed(text, who):
    """JSON text -> value."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{who}: its answer is not JSON ({one_line(error)})") from None


def base64_image(image, kind, **options):
    """PIL image -> base64 text of a PNG or JPEG file."""
    file = io.BytesIO()
    image.convert("RGB").save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def checked_url(name, url):
    """The URL split, if it has a host and a sensible port."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1):
            return parts
    except ValueError:
        pass
    raise UserError(f"reward {name!r}: {url!r} is not a URL of the form http://host:port")


class Http:
    """A reward served by `python rewards.py serve`: POST {url}/score, 64 pictures at a time, retried by `post_json`.

    The bearer token, if the server wants one, is REWARD_TOKEN of the environment.
    """
    batch_size = 64

    def __init__(self, url):
        checked_url(url, url)
        self.url = url.rstrip("/")

    def __call__(self, images, prompts):
        """list of PIL images, list of prompts -> list of floats, NaN where the server answered null."""
        who = f"reward {self.url!r}"
        payload = {"prompts": list(prompts), "images": [base64_image(i, "PNG", compress_level=1) for i in images]}
        answer = post_json(self.url + "/score", payload, os.environ.get("REWARD_TOKEN"), who)
        if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
            raise UserError(f'{who}: its answer is not {{"scores": [...]}}')
        return [math.nan if score is None else score for score in answer["scores"]]


VLM_QUESTION = """How well does this picture show the following text, and how good does it look, from 0 to 10 (perfect)?
Text: {prompt}
Answer with one line of the form
Score: <number>"""


class Vlm:
    """An OpenAI-compatible judge. unparsed: how many replies held no number from 0 to 10; those pictures score NaN."""

    def __init__(self, address):
        parts = checked_url(f"vlm@{address}", address)
        query = urllib.parse.parse_qs(parts.query)
        self.model = query.get("model", [None])[0]
        tokens = query.get("tokens", ["1024"])[0]
        if not self.model or not tokens.isdecimal():
            raise UserError(f"reward 'vlm@{address}': name the model, vlm@http://host:port/v1?model=NAME&tokens=1024")
        base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self.url = base + "/v1/chat/completions"
        self.unparsed = 0
        self.lock = threading.Lock()
        self.options = {"temperature": 0, "max_tokens": int(tokens)}

    def __call__(self, images, prompts):
        """list of PIL images, list of prompts -> list of floats; eight questions at a time."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.score, images, prompts))

    def ask(self, content):
        """A message -> the text of the reply, or None. Newer models of OpenAI refuse max_tokens and a temperature: then
        they are asked once more, and from then on, in their own words."""
        token = os.environ.get("VLM_TOKEN") or os.environ.get("OPENAI_API_KEY")
        message = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        who = f"reward 'vlm' at {self.url}"
        options = self.options
        try:
            answer = post_json(self.url, {**message, **options}, token, who)
        except UserError as error:
            if "HTTP 400" not in str(error) or "max_tokens" not in options or not re.search(
                    "max_tokens|temperature", str(error)):
                raise
            self.options = {"max_completion_tokens": options["max_tokens"]}
            answer = post_json(self.url, {**message, **self.options}, token, who)
        try:
            reply = answer["choices"][0]["message"]
            return reply.get("content") or reply.get("reasoning_content")
        except (KeyError, IndexError, TypeError, AttributeError):
            return None

    def score(self, image, prompt):
        """One picture -> its score, 0 to 10, or NaN; the first reply without one is shown."""
        reply = self.ask([image_part(image), {"type": "text", "text": VLM_QUESTION.format(prompt=prompt)}])
        score = number_in(reply)
        if score is None:
            with self.lock:
                self.unparsed += 1
            if self.unparsed == 1:
                shown = " ".join(str(reply).split())[:120]
                print(f"reward 'vlm': no score from 0 to 10 in the reply {shown!r}: no opinion", file=sys.stderr)
            return math.nan
        return score


def image_part(image):
    """PIL image -> the part of a message that shows it."""
    url = "data:image/jpeg;base64," + base64_image(image, "JPEG", quality=95)
    return {"type": "image_url", "image_url": {"url": url}}


def number_in(reply):
    """The score of a reply, or None: the last number after the word score ("Score (0-10): 8", "the score is **7,5**",
    "score: 8/10"), else a reply that is one number alone, also as "8/10"."""
    text = re.sub(r"[*_`]|\(0\s*(?:-|to|\u2013)\s*10\)", "", str(reply or ""))
    number = r"(-?\d+(?:[.,]\d+)?)(?:\s*/\s*10\b|\s+out of 10\b)?"
    found = re.findall(r"\bscore\b\s*(?:is|of|=|:)?\s*:?\s*" + number + r"(?!\s*(?:-|to\b|/|\d))", text, re.I)
    alone = re.fullmatch(r"\W*?" + number + r"\W*", text)
    value = found[-1] if found else alone[1] if alone else None
    value = float(value.replace(",", ".")) if value else None
    return value if value is not None and 0 <= value <= 10 else None


def vlm(device="cpu", path=None):
    """A vision-language model asked for a number, at any OpenAI-compatible endpoint.

    model    the endpoint's
    licence  the endpoint's
    size     0
    scale    0 to 10; a reply without such a number is NaN
    source   the question is VLM_QUESTION in this file
    compared nothing: the question is ours
    path     the endpoint: vlm@http://host:port/v1?model=NAME, with &tokens=N the most tokens of a reply (1,024)
    """
    if not path:
        raise UserError("reward 'vlm': name the endpoint, vlm@http://host:port/v1?model=NAME")
    return Vlm(path)


# ===== serving

class Handler(BaseHTTPRequestHandler):
    """POST /score {"prompts": [...], "images": [base64 PNG, JPEG or WebP, ...]} -> {"scores": [number or null, ...]};
    GET /health -> {"name": ...}. Whatever is wrong with a request gets {"error": one line}, and the server lives."""
    timeout = 60  # seconds of silence that a client may keep a thread waiting

    def log_message(self, *_):
        """Quiet."""

    def answer(self, code, value):
        """Send a JSON value."""
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        """Health."""
        known = self.path == "/health"
        self.answer(200 if known else 404, {"name": self.server.reward.name} if known else {"error": "not found"})

    def do_POST(self):
        """Score."""
        self.unread = 0
        try:
            try:
                self.answer(200, {"scores": self.scores(self.body())})
            except Refused as refusal:
                self.answer(refusal.args[0], {"error": refusal.args[1]})
                self.drain()
        except OSError:  # the client left, or fell silent
            self.close_connection = True

    def body(self):
        """The request's body, if its sender, place and size are right."""
        length = self.headers.get("Content-Length", "")
        self.unread = int(length) if length.isdecimal() and len(length) < 20 else 0
        token = self.server.token
        given = self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refused(401, "wrong or missing bearer token")
        if self.path != "/score":
            raise Refused(404, "not found: POST /score or GET /health")
        if self.unread > self.server.max_body:
            raise Refused(413, f"body of {self.unread} bytes, at most {self.server.max_body} are taken")
        body = self.rfile.read(self.unread)
        self.unread = 0
        return body

    def drain(self):
        """Reads on, without keeping it, what a refused client still sends: a connection closed under its hands would
        look to it like a broken server, and it would try again."""
        self.connection.settimeout(2)
        self.unread = min(self.unread, 1 << 31)
        while self.unread > 0 and (chunk := self.rfile.read1(min(self.unread, 1 << 20))):
            self.unread -= len(chunk)

    def scores(self, body):
        """JSON bytes -> list of numbers, None for NaN."""
        try:
            request = json.loads(body)
            prompts = request["prompts"]
            texts = request["images"]
            if not isinstance(prompts, list) or not isinstance(texts, list) or {type(p) for p in prompts} - {str}:
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused(400, 'the body is not JSON {"prompts": [text, ...], "images": [base64, ...]}') from None
        if len(prompts) != len(texts):
            raise Refused(400, f"{len(prompts)} prompts but {len(texts)} images")
        images = [decoded(i, text) for i, text in enumerate(texts)]
        try:
            with self.server.lock:
                scores = self.server.reward(images, prompts).tolist()
        except Exception as error:
            raise Refused(500, str(error) if isinstance(error, UserError) else one_line(error)) from error
        return [None if math.isnan(score) else score for score in scores]


class Refused(Exception):
    """A request that gets (HTTP status, one line) instead of scores."""


def decoded(i, text):
    """Base64 text of image number i -> PIL image. PIL's own limit on the number of pixels holds."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise Refused(400, f"image {i} is not base64") from None
    try:
        return read_picture(io.BytesIO(data), ("PNG", "JPEG", "WEBP"))
    except UserError as error:
        raise Refused(400, f"image {i} is not a PNG, JPEG or WebP file: {error}") from None


def server(reward, host="127.0.0.1", port=8000, token=None, max_body=256 * 2**20):
    """A bound HTTP server for a Reward; call its serve_forever(). One lock around the model; bodies of at most
    `max_body` bytes. UserError: several parts (they are z-scored over a prompt's candidates: combine at the client)."""
    if len(reward.parts) > 1:
        raise UserError(f"serve one reward at a time, not {reward.name!r}: combine where they are used")
    try:
        bound = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on {host}:{port}: {one_line(error)}") from None
    bound.reward = reward
    bound.token = token
    bound.max_body = max_body
    bound.lock = threading.Lock()
    return bound


# ===== prompts, pairs and pictures: read as what they are, or refused by name

ANIMALS = """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
    beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig
    turkey fly llama camel bat gorilla hedgehog kangaroo"""
DEEDS = ("riding a bike", "playing chess", "washing dishes")
PICKAPIC = "https://raw.githubusercontent.com/UGVly/DrPO/dd473d8fc28ffe4fb8d0440ad249164e21a23cb0/data/pickscore/"
PROMPTS = {  # Pick-a-Pic v2 prompts are written by users, partly explicit
    "pickapic": (PICKAPIC + "train.txt", "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f"),
    "pickapic-test": (PICKAPIC + "test.txt", "d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262"),
    "scenes": HERE / "lab" / "toy" / "captions_train.txt",
    "scenes-test": HERE / "lab" / "toy" / "captions_heldout.txt",
    "animals": [f"a {animal} {deed}" for animal in ANIMALS.split() for deed in DEEDS],
}


def read_text(path):
    """A text file: UTF-8, or what its byte order mark says. UserError names the first wrong byte."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start} is 0x{data[e.start]:02x}); save it as UTF-8") from e


def lines_of(text):
    """Lines that end at \\n, \\r\\n or \\r alone: U+2028, U+0085, \\v and \\f are text. With their numbers."""
    return [(n, line.strip()) for n, line in enumerate(re.split("\r\n|\n|\r", text), 1) if line.strip()]


def load_prompts(spec):
    """A built-in name, or a file -> list of prompts. A .txt, .prompts, or one without an ending: a prompt
    a line; .jsonl, .ndjson: an object a line; .json: an array; .csv, .tsv: a table with a header. Objects
    and tables hold "prompt", "caption" or "text"."""
    source = PROMPTS.get(spec, spec)
    if isinstance(source, list):
        return source
    path = fetch(*source) if isinstance(source, tuple) else Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(str(spec), PROMPTS, 3, 0.5) or PROMPTS
        raise UserError(f"prompts {str(spec)!r}: no such file, and no built-in name; did you mean {', '.join(near)}?")
    text = read_text(path)
    ending = path.suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        rows = [(n, json_value(path, n, line)) for n, line in lines_of(text)]
    elif ending == ".json":
        rows = json_value(path, 1, text)
        if not isinstance(rows, list):
            raise UserError(f"prompts {path}: expected a JSON array of strings or of objects with \"prompt\"")
        rows = list(enumerate(rows, 1))
    elif ending in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if ending == ".tsv" else ",")
        rows = list(enumerate(table, 2))
    elif ending in (".txt", ".prompts", ""):
        rows = lines_of(text)
    else:
        raise UserError(f"prompts {path}: {ending} is no list of prompts; expected .txt (a prompt a line), .jsonl, "
                        ".ndjson, .json, .csv or .tsv")
    prompts = [prompt_of(path, n, row) for n, row in rows]
    if not prompts:
        raise UserError(f"prompts {path}: empty; expected a prompt a line")
    return prompts


def prompt_of(path, n, row):
    """A row of a prompt file, text or an object -> its prompt."""
    if isinstance(row, dict):
        row = next((row[key] for key in ("prompt", "caption", "text") if row.get(key)), None)
    if not isinstance(row, str) or not row.strip():
        raise UserError(f'{path}, entry {n}: expected text, or an object or column "prompt", "caption" or "text"')
    try:
        row.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{path}, entry {n}: half of a surrogate pair ({row[e.start]!a}) is no text") from e
    return row.strip()


def json_value(path, n, text):
    """JSON text -> its value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}, line {n}: not JSON ({one_line(e)})") from e


def load_pairs(path):
    """Offline pairs -> list of (prompt, [chosen files], [rejected files]), all in the folder of the
    .jsonl; every picture is opened now, so that a bad one is named before the run begins."""
    path = Path(path)
    pairs = []
    home = path.resolve().parent
    for n, line in lines_of(read_text(path)):
        row = json_value(path, n, line)
        sides = [row.get(side) for side in ("chosen", "rejected")] if isinstance(row, dict) else []
        if not sides or not all(isinstance(side, list) and side for side in sides):
            raise UserError(f'{path}, line {n}: expected an object with "prompt": text, "chosen": a list of files, '
                            '"rejected": a list of files')
        prompt = prompt_of(path, n, {"prompt": row.get("prompt")})
        chosen, rejected = ([home / str(file) for file in side] for side in sides)
        for file in chosen + rejected:
            if not file.resolve().is_relative_to(home):
                raise UserError(f"{path}, line {n}: {file} lies outside {home}; put the pictures beside the list")
            read_picture(file)
        pairs.append((prompt, chosen, rejected))
    if not pairs:
        raise UserError(f"pairs {path}: empty; expected a line a prompt")
    return pairs


def read_picture(source, formats=None):
    """A picture file, or one open in memory -> PIL RGB as people see it: turned as EXIF says, 16-bit
    grey scaled, alpha on white, the first frame. UserError names the file."""
    try:
        image = Image.open(source, formats=formats)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, dtype=np.float64)
            top = 65535 if image.mode.startswith("I") else 1 if values.max() <= 1 else 255
            image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as e:  # truncated, too large for Pillow, no picture at all
        raise UserError(f"{getattr(source, 'name', source)}: not a readable picture ({one_line(e)})") from e


def load_pictures(files, side):
    """Files of n pictures -> (n,3,side,side) in [0,1]: the middle square, resized."""
    pictures = []
    for file in files:
        square = ImageOps.fit(read_picture(file), (side, side), Image.Resampling.BICUBIC)
        pictures.append(as_tensor(square))
    return torch.stack(pictures)


def as_tensor(image):
    """PIL image -> (3,H,W) in [0,1]; a tensor stays as it is."""
    if isinstance(image, torch.Tensor):
        return image.float()
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_pil(images):
    """float (B,3,H,W) in [0,1] -> list of B PIL images, round(255 x)."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def picture_grid(rows, captions, labels):
    """Rows of PIL pictures under captions (one a column), labels at the left -> one PIL picture."""
    width = rows[0][0].width
    side = 256 if width >= 256 else width * max(1, 160 // width)  # small ones by a whole factor
    font = ImageFont.load_default(13)
    bold = ImageFont.load_default(14)
    texts = ["\n".join(textwrap.wrap(caption, side // 7)[:4]) for caption in captions]
    labels = ["\n".join(textwrap.wrap(label, 14)) for label in labels]
    top = 14 + 17 * max(text.count("\n") + 1 for text in texts)
    left = 18 + max(int(bold.getlength(line)) for label in labels for line in label.split("\n"))
    size = left + len(captions) * (side + 5), top + len(rows) * (side + 5)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, text in enumerate(texts):  # captions stand on the pictures
        draw.multiline_text((left + column * (side + 5), top - 6), text, "#22262e", font, "ld", 3)
    for y, pictures, label in zip(range(top, size[1], side + 5), rows, labels):
        draw.multiline_text((8, y + side // 2), label, "#22262e", bold, "lm", 3)
        for column, picture in enumerate(pictures):
            method = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            x = left + column * (side + 5)
            grid.paste(picture.resize((side, side), method), (x, y))
            draw.rectangle((x, y, x + side - 1, y + side - 1), outline="#d5d8de")
    return grid


# ===== the folder of a run

class RunFolder:
    """A run's own folder: config.json, metrics.jsonl, checkpoints, the LoRA, samples/.

    path: where; metrics: the figures of every step so far, a dict each."""

    def __init__(self, cfg, prompts, step):
        """Goes on in the folder of --resume, or claims a new one: config.json opens exclusively."""
        self.cfg = cfg
        self.metrics = []
        self.began = time.perf_counter()
        self.path = Path(cfg.resume)
        self.made = False
        self.first = step
        if not cfg.resume:
            self.claim()
        config = asdict(cfg)
        config["versions"] = {name: sys.modules[name].__version__ for name in ("torch", "diffusers", "transformers")}
        config["sha256"] = {"prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}
        source = Path(cfg.reward.rpartition(":")[0])
        if source.suffix == ".py" and source.is_file():
            config["sha256"]["reward"] = hashlib.sha256(source.read_bytes()).hexdigest()
        if cfg.resume:
            self.say_changes(config)
            self.metrics = read_metrics(self.path, step)
            kept = "".join(json.dumps(metrics) + "\n" for metrics in self.metrics)
            write_atomic(self.path / "metrics.jsonl", kept.encode())
        write_atomic(self.path / "config.json", json.dumps(config, indent=1).encode())

    def claim(self):
        """A folder for this run alone; a default name moves on to the next free one."""
        cfg = self.cfg
        what = "pairs" if cfg.pairs else re.sub(r"\W+", "-", Path(cfg.reward.partition(":")[0]).stem)
        name = f"runs/{Path(cfg.model).name}-{what}-{time.strftime('%Y%m%d-%H%M%S')}"
        for n in itertools.count(1):
            self.path = Path(cfg.out or (name if n == 1 else f"{name}-{n}"))
            self.made = not self.path.exists()
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if not (self.path / "metrics.jsonl").exists():
                    open(self.path / "config.json", "x").close()
                    return
            except FileExistsError:
                pass
            except OSError as e:
                raise UserError(f"--out {self.path}: {e.strerror}") from e
            if cfg.out:
                raise UserError(f"--out {self.path} holds a run already, or is a file; expected a new or empty "
                                f"folder (to go on with that run: --resume {self.path})")

    def say_changes(self, config):
        """With --resume: a line for each setting, and for prompts and reward file, that is another now."""
        saved = read_config(self.path)
        for f in fields(self.cfg):
            before = saved.get(f.name, f.default)
            before = tuple(before) if isinstance(before, list) else before
            if f.name not in ("resume", "out") and getattr(self.cfg, f.name) != before:
                name = f.name.replace("_", "-")
                print(f"--{name} is {getattr(self.cfg, f.name)} from here on; it was {before}", file=sys.stderr)
        for name, digest in saved.get("sha256", {}).items():
            if config["sha256"].get(name) != digest:
                print(f"the {name} changed since this run began", file=sys.stderr)

    def describe(self, G, prompts):
        """What a run is about to do: its settings, and the arithmetic of its batch."""
        cfg = self.cfg
        print("  ".join(f"{name}={value}" for name, value in asdict(cfg).items() if value != ""))
        gpus = int(os.environ.get("WORLD_SIZE", 1))
        print(f"{cfg.batch} prompts x {cfg.candidates} candidates{f' x {gpus} ranks' * (gpus > 1)} = "
              f"{cfg.batch * cfg.candidates * gpus} pictures an update; {len(prompts):,} prompts; "
              f"{sum(p.numel() for p in G.parameters()):,} trainable weights; {G.dtype} on {G.device}")
        most = G.pipe.tokenizer.model_max_length
        ids = G.pipe.tokenizer(prompts).input_ids
        long = sum(len(tokens) > most for tokens in ids)
        if long:
            print(f"{long} prompts are longer than {most} tokens: their end is not seen", file=sys.stderr)

    def log(self, metrics, show=False):
        """Append a step's figures to metrics.jsonl (what is not finite is null), and print some lines."""
        if torch.cuda.is_initialized():
            metrics["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
        metrics = json.loads(json.dumps(metrics), parse_constant=lambda name: None)
        self.metrics.append(metrics)
        try:
            with open(self.path / "metrics.jsonl", "a") as f:
                f.write(json.dumps(metrics) + "\n")
        except OSError as e:
            raise UserError(f"{self.path}/metrics.jsonl could not be written ({e.strerror}); the last checkpoint "
                            "is intact") from e
        step = metrics["step"]
        if show or step % self.cfg.log_every == 0 or step == self.first + 1:
            print(figures_line(metrics, self.cfg.steps, self.began, self.first), flush=True)
        for steps, name, silent, text in ((3, "reward_mean", None, "had no opinion (NaN) on any picture"),
                                          (20, "reward_std", 0, "scored all candidates of each prompt the same")):
            last = [m.get(name, "none") for m in self.metrics[-steps - 1:]]
            if last[-steps:] == [silent] * steps and last != [silent] * (steps + 1):
                print(f"the reward {text} for {steps} steps: there is nothing to rank by", file=sys.stderr)

    @torch.no_grad()
    def preview(self, G, prompts, step):
        """samples/step-N.png: fixed prompts and noise, the base above, the tuned model below."""
        if not self.cfg.preview_every:
            return
        n = min(8, len(prompts))
        shown = [prompts[i * len(prompts) // n] for i in range(n)]
        rows = []
        for context in (G.reference(), nullcontext()):
            with context:
                row = []
                for i, prompt in enumerate(shown):  # one at a time: it never needs more memory than the run
                    g = torch.Generator().manual_seed((self.cfg.seed + i) % 2 ** 63)
                    e = torch.randn((1, *G.noise_shape), generator=g).to(G.device)
                    row += to_pil(G.decode(G.sample(e, G.encode([prompt]))))
            rows.append(row)
        (self.path / "samples").mkdir(exist_ok=True)
        picture_grid(rows, shown, ["base", "tuned"]).save(self.path / "samples" / f"step-{step:06d}.png")

    def discard(self):
        """A run that made no step leaves nothing that would block the mended command."""
        if self.made:
            shutil.rmtree(self.path, ignore_errors=True)
        for pattern in ("config.json", "metrics.jsonl", "*checkpoint*", "*_lora*.safetensors", "samples/step-*.png"):
            for file in self.path.glob(pattern):
                file.unlink()
        with suppress(OSError):
            (self.path / "samples").rmdir()


@contextmanager
def open_run(cfg, G, prompts, at, save):
    """The run's RunFolder (None but for rank 0). However the run ends, save(folder) keeps what it reached, and a run
    that made no step leaves nothing. at: {"step"} as it stands."""
    if int(os.environ.get("RANK", 0)) > 0:
        yield None
        return
    first = at["step"]
    folder = RunFolder(cfg, prompts, first)
    try:
        if not cfg.resume:
            save(folder.path)
            folder.preview(G, prompts, 0)
        folder.describe(G, prompts)
        yield folder
        path = folder.path
        if at["step"] < cfg.steps:
            print(f"stopped; go on with: python drpo.py --resume {path}", file=sys.stderr)
        else:
            print(f"done: {path}\nlook at {path}/samples; compare with the base: python eval.py {path}")
    except BaseException as e:
        if at["step"] == 0 and not cfg.resume:
            folder.discard()
        elif at["step"] > first and not isinstance(e, KeyboardInterrupt):  # that may be mid-step
            save(folder.path)
        if isinstance(e, UserError):
            go_on = f" (go on with --resume {folder.path})" if at["step"] else ""
            raise UserError(f"step {at['step'] + 1}: {e}{go_on}") from e
        raise


def newest_checkpoint(folder):
    """The newest whole checkpoint of a run. Objects are never unpickled; a torn or changed file (its archive has a CRC)
    is set aside, and the one before is taken."""
    problems = []
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = Path(folder) / name
        try:
            if zipfile.ZipFile(path).testzip():  # torch itself does not look at it
                raise ValueError("its CRC differs")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            problems.append(f"{name}: {one_line(e)}")
            if path.exists():
                path.rename(path.with_suffix(".torn"))  # never to be kept in place of a good one
            continue
        if problems:
            print(f"{folder}: {problems[0]}; going on from {name}", file=sys.stderr)
        return state
    raise UserError(f"{folder}: no checkpoint to go on from ({'; '.join(problems)})")


def save_checkpoint(folder, state):
    """Write checkpoint.pt; the one before stays as checkpoint.previous.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(folder / "checkpoint.pt", buffer.getvalue(), keep=folder / "checkpoint.previous.pt")


class Stop:
    """Context in which SIGINT and SIGTERM end the run after the step in hand; a second one ends it at once. signal: the
    one that came, or 0. Forked children of a reward, and whoever comes after, have the handlers of before."""
    active = None
    forking = threading.local()

    def __enter__(self):
        self.signal = 0
        self.before = {}
        Stop.active = self
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        Stop.active = None
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        """The first is remembered, the second does what it did before this run."""
        if not self.signal:
            self.signal = number
            print("stopping after this step; once more ends it at once", file=sys.stderr, flush=True)
            return
        self.__exit__()
        os.kill(os.getpid(), number)

    @staticmethod
    def before_fork():
        """A signal that reaches the child before it has the handlers of before waits until it has them."""
        Stop.forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))

    @staticmethod
    def in_parent():
        """After a fork: what came meanwhile comes now."""
        signal.pthread_sigmask(signal.SIG_SETMASK, Stop.forking.mask)

    @staticmethod
    def in_child():
        """At a fork, before any code runs: a child that waits in a lock could not run a handler of ours."""
        if Stop.active:
            Stop.active.__exit__()
        signal.pthread_sigmask(signal.SIG_SETMASK, Stop.forking.mask)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=Stop.before_fork, after_in_parent=Stop.in_parent, after_in_child=Stop.in_child)


FIGURES = {"reward_mean": "reward {:.4g}", "reward_best": "best {:.4g}", "reward_worst": "worst {:.4g}",
           "diversity": "diversity {:.0%}", "distance": "distance {:.3g}", "grad_norm": "grad {:.3g}",
           "seconds": "{:.2f} s", "peak_gib": "{:.1f} GiB"}


def figures_line(metrics, steps, began, first):
    """One readable line of a step's figures, with the time that is left."""
    parts = [f"step {metrics['step']}/{steps}"]
    for name, text in FIGURES.items():
        if metrics.get(name) is not None:
            parts.append(text.format(metrics[name]))
    parts[2:2] = [f"{name[6:]} {value:.4g}" for name, value in metrics.items()
                  if name.startswith("watch/") and value is not None]
    if metrics.get("skipped"):
        parts.append(f"no anchors for {metrics['skipped']:.0%} of the prompts")
    if not metrics["applied"]:
        parts.append("NOT FINITE, not applied")
    left = int((time.perf_counter() - began) / (metrics["step"] - first) * (steps - metrics["step"]))
    return "  ".join(parts) + f"  left {left // 60}:{left % 60:02d}"


def read_config(folder):
    """config.json of a run as a dict."""
    try:
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: no run (config.json is missing or no JSON: {one_line(e)})") from e


def read_metrics(folder, last=math.inf):
    """metrics.jsonl up to step `last`; a torn or blank line is left out, of two of a step the later stays."""
    path = Path(folder) / "metrics.jsonl"
    found = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError, TypeError, KeyError):
            metrics = json.loads(line)
            if 0 < metrics["step"] <= last:
                found[metrics["step"]] = metrics
    return [found[step] for step in sorted(found)]


def seed_everything(seed):
    """Seed the generators that a reward may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def random_states(states=None):
    """The generators that a reward may draw from, as plain data; given states are put in place first."""
    if states:
        torch.set_rng_state(states["torch"])
        np.random.set_state(tuple(states["numpy"]))
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
    name, words, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [name, words.tolist(), *rest]}


# ===== models and LoRAs of others: read whole, or refused by name

LATENT_MAE = ("https://modelscope.cn/models/jiangzhou130v1/drpo-mae-latent-256/resolve/master/"
              "mae_latent_256_torch.pth", "4810249905d2882a41d5a0fe97ebac995af8918dbe121daa9871e5bc605445b1")


def read_latent_mae(path, encoder):
    """DrPO's authors' file -> {name: weight} of its encoder: convolutions `.kernel` (HWIO) or `.weight` (OIHW), norms
    `.scale` or `.weight`. UserError: torn, or not all that encoder(weights, latents) asks for."""
    path = path or fetch(*LATENT_MAE)
    weights = {}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found.get("model_state_dict", found))
        for key, value in found.items():
            key = re.sub(r"^(module\.|_orig_mod\.)+", "", key)  # of DistributedDataParallel, torch.compile
            if key.endswith(".kernel"):
                value = value.permute(3, 2, 0, 1)
            if key.startswith("encoder."):
                weights[re.sub(r"\.(kernel|scale)$", ".weight", key[8:])] = value.float()
        encoder(weights, torch.zeros(1, 4, 16, 16))
    except Exception as e:  # torn and foreign files fail in many ways
        raise UserError(f"{path}: no latent-MAE, the file of {LATENT_MAE[0]} ({one_line(e)})") from e
    return weights


LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"


def kohya_name(name, xl):
    """A layer's name in kohya's sd-scripts, which count SDXL's blocks as its first release did: an
    input block for conv_in, then two with attention and a downsampler each, upward three each."""
    flat = name.replace(".", "_")
    match = re.match(r"(down|mid|up)_blocks?_(?:(\d)_)?attentions_(\d)", flat)
    if not xl or not match:  # SD keeps diffusers' names
        return "lora_unet_" + flat
    block = int(match[2] or 0)
    attention = int(match[3])
    place = {"down": f"input_blocks_{1 + 3 * block + attention}_1", "mid": "middle_block_1",
             "up": f"output_blocks_{3 * block + attention}_1"}[match[1]]
    return "lora_unet_" + place + flat[match.end():]


LORA_KEY = re.compile(  # of diffusers, peft, kohya and older files: layer, and A, B, down, up or alpha
    r"(?:base_model\.model\.)?(?:unet\.)?(.+?)\.(?:lora[._])?(A|B|down|up|alpha)(?:\.default)?(?:\.weight)?")


def lora_file(path):
    """The LoRA of a folder, or the file itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    return path / (LORA_FILE if (path / LORA_FILE).exists() else KOHYA_FILE)


def lora_metadata(path):
    """What a LoRA file, or the one in a folder, says of itself."""
    from safetensors import safe_open
    try:
        with safe_open(lora_file(path), "pt") as f:
            return f.metadata() or {}
    except Exception as e:  # safetensors has an exception of its own
        raise UserError(f"{lora_file(path)}: not a readable LoRA file ({one_line(e)})") from e


def read_lora(path, layers, xl, base):
    """A LoRA file, or the one in a folder, for {name: nn.Linear} of a base -> its metadata, {name: (down, up, alpha)}.
    UserError: an entry fits no layer, is missing or of another shape."""
    from safetensors.torch import load_file
    metadata = lora_metadata(path)
    layer_of = {}
    for name in layers:
        layer_of |= {name: name, kohya_name(name, xl): name, kohya_name(name, False): name}
    parts_of = {}
    left = []
    try:
        for key, value in load_file(lora_file(path)).items():
            match = LORA_KEY.fullmatch(key)
            if match and match[1] in layer_of:
                part = {"A": "down", "B": "up"}.get(match[2], match[2])
                parts_of.setdefault(layer_of[match[1]], {})[part] = value.float()
            else:
                left.append(key)
        adapter = json.loads(metadata.get("lora_adapter_metadata", "{}"))  # of diffusers and peft
    except Exception as e:
        raise UserError(f"{lora_file(path)}: not a readable LoRA file ({one_line(e)})") from e
    adapter = {key.removeprefix("unet."): value for key, value in adapter.items()}
    found = {}
    for name, parts in parts_of.items():
        alpha = adapter.get("lora_alpha")
        for pattern, value in (adapter.get("alpha_pattern") or {}).items():
            if name.endswith(pattern):
                alpha = value
        rank = len(parts.get("down", ()))
        if alpha is None:
            alpha = rank  # without one the scale is 1
        shapes = {part: tuple(parts[part].shape) for part in ("down", "up") if part in parts}
        if shapes == {"down": (rank, layers[name].in_features), "up": (layers[name].out_features, rank)}:
            found[name] = parts["down"], parts["up"], float(parts.get("alpha", alpha))
        else:
            left.append(name)
    if left or not found:
        raise UserError(f"{path}: {len(left)} entries do not fit the attention layers of {base or 'this base'}, "
                        f"{', '.join(left[:1]) or 'nothing in it'} first (made for the base "
                        f"{metadata.get('base_model', 'not stated')})")
    return metadata, found


def write_lora(folder, layers, xl, metadata):
    """{layer: (down, up, alpha)} -> LORA_FILE for diffusers, KOHYA_FILE for the others, who look in its metadata for
    what it fits."""
    from safetensors.torch import save
    diffusers = {}
    kohya = {}
    for name, (down, up, alpha) in layers.items():
        key = kohya_name(name, xl)
        rank = len(down)
        diffusers[f"unet.{name}.lora_A.weight"] = kohya[f"{key}.lora_down.weight"] = down
        diffusers[f"unet.{name}.lora_B.weight"] = up * (alpha / rank)  # alpha = rank there
        kohya[f"{key}.lora_up.weight"] = up
        kohya[f"{key}.alpha"] = torch.tensor(alpha)
    metadata = {**metadata, "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(rank),
                "ss_network_alpha": str(alpha)}
    if xl:
        metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    write_atomic(Path(folder) / LORA_FILE, save(diffusers, metadata))
    write_atomic(Path(folder) / KOHYA_FILE, save(kohya, metadata))


def load_transformer(class_name, source):
    """A frozen network of transformers from a folder or the hub."""
    import transformers
    try:
        net = getattr(transformers, class_name).from_pretrained(source)
    except Exception as e:
        raise UserError(f"features: {hub_trouble(source, e)}") from e
    return net.eval().requires_grad_(False)


def say_other_start(scheduler, t):
    """Say so where a folder's own scheduler would not start at t in one step."""
    try:
        scheduler.set_timesteps(1)
        own = int(scheduler.timesteps[0])
        does = f"would start at t = {own} in one step"
    except (ValueError, IndexError, RuntimeError):
        own, does = None, "cannot take one step"
    if own != t:
        spacing = scheduler.config.get("timestep_spacing")
        print(f"{type(scheduler).__name__} ({spacing} spacing) {does}; here t = {t} (--timestep)", file=sys.stderr)


def is_xl(index):
    """Whether a model_index.json, or a pipeline's config, is of SDXL."""
    return str(index.get("_class_name", "")).startswith("StableDiffusionXL")


def model_index(path, known):
    """model_index.json of a diffusers folder or a hub id. UserError: no such model, gated; known: names of ours."""
    path = str(path)
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        pick("model", path, known, "or a local diffusers folder, or a hub id owner/name")
    try:
        index = Path(path) / "model_index.json"
        if not Path(path).is_dir():
            from huggingface_hub import hf_hub_download
            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its five retries: we say it in one line
            index = hf_hub_download(path, "model_index.json")
        return json.loads(Path(index).read_text(encoding="utf-8"))
    except Exception as e:
        raise UserError(f"{hub_trouble(path, e)}{WAYS_ON}") from e


WAYS_ON = ". Ways on: --model toy, or the path of a diffusers folder in SD or SDXL layout"
IMPLEMENTED = {  # what entries of the networks' configs may be: others would change the result
    "vae": {"latents_mean": (None,), "latents_std": (None,), "shift_factor": (None, 0), "latent_channels": (4,)},
    "unet": {"in_channels": (4,), "out_channels": (4,), "time_cond_proj_dim": (None,), "class_embed_type": (None,),
             "encoder_hid_dim_type": (None,), "addition_embed_type": (None, "text_time"),
             "sample_size": range(1, 1025)},
    "text_encoder": {}, "text_encoder_2": {}}


def load_pipeline(path, index, dtype):
    """The pipeline of a diffusers folder or a hub id, on the CPU. UserError: what cannot be had, is not read whole, or
    is not implemented."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):  # what goes wrong is said in one line, by us
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        folder = path
        if not Path(path).is_dir():
            try:  # half the download
                folder = diffusers.DiffusionPipeline.download(path, variant="fp16")
            except (OSError, ValueError):
                folder = diffusers.DiffusionPipeline.download(path)
        return assemble(folder, index, dtype, diffusers, transformers)
    except Exception as e:  # truncated files, pointers to files, a hub out of reach, ...
        raise UserError(f"{hub_trouble(path, e)}{WAYS_ON}") from e


def assemble(folder, index, dtype, diffusers, transformers):
    """The pipeline of a diffusers folder, network by network. ValueError: not whole, not implemented."""
    parts = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
             "text_encoder": transformers.CLIPTextModel}
    kind, rest = diffusers.StableDiffusionPipeline, dict(safety_checker=None,
                                                         requires_safety_checker=False)
    if is_xl(index):
        parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection
        kind = diffusers.StableDiffusionXLPipeline
        rest = {}
    unet_files = [file.name for file in (Path(folder) / "unet").glob("*model*")]
    half = unet_files and all(".fp16." in name for name in unet_files)
    for part, cls in parts.items():
        if (index.get(part) or ["", ""])[1] != cls.__name__:
            raise ValueError(f"its {part} is no {cls.__name__}; expected an SD or SDXL layout")
        config = cls.load_config(folder, subfolder=part) if part in ("unet", "vae") else {}
        for name, known in IMPLEMENTED[part].items():
            if config.get(name, known[0]) not in known:
                raise ValueError(f"its {part} has {name} = {config[name]}, which is not implemented")
        net, report = cls.from_pretrained(
            folder, subfolder=part, output_loading_info=True, variant="fp16" if half else None,
            **{"dtype" if "text" in part else "torch_dtype": dtype})
        for trouble in ("missing", "unexpected"):
            keys = [key for key in report[f"{trouble}_keys"] if not key.endswith("position_ids")]
            if keys:
                raise ValueError(f"{part}: {len(keys)} {trouble} weights, {min(keys)} first")
        parts[part] = net
    return kind.from_pretrained(folder, **parts, **rest, feature_extractor=None, image_encoder=None)


def replace_unet(unet, file):
    """Put the weights of a file, or of owner/repo/file on the hub, into a UNet, whole."""
    try:
        path = Path(file)
        if not path.is_file():
            from huggingface_hub import hf_hub_download
            owner, repo, name = file.split("/", 2)
            path = Path(hf_hub_download(f"{owner}/{repo}", name))
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        unet.load_state_dict(state)
    except Exception as e:
        raise UserError(f"--unet {file}: {one_line(e)}; expected the weights of this base's UNet, a "
                        "file, or owner/repo/file of the hub") from e


# ===== the names, and the command line

REWARDS = {
    "pickscore": pickscore, "clip": clip, "aesthetic": aesthetic, "hpsv2": hpsv2, "imagereward": imagereward,
    "hpsv3": hpsv3, "geneval": geneval, "jpeg": no_files(jpeg), "incompressibility": no_files(incompressibility),
    "scene": scene, "vlm": vlm,
}


def table():
    """Names, sizes, licences, models and scales as aligned lines, read off the factories' docstrings."""
    lines = []
    for name, factory in REWARDS.items():
        facts = dict(re.findall(r"^(\w+) +(.*(?:\n {9}.*)*)$", inspect.getdoc(factory), re.MULTILINE))
        facts = {key: " ".join(text.split()) for key, text in facts.items()}
        lines.append("{:16} {size}; {scale}; licence: {licence}".format(name, **facts))
        lines.append(f"{'':16} model: {facts['model']}; compared with {facts['compared']}")
    note = "Compared with random weights of the true size, except for the real aesthetic head; no hub was in reach."
    return "\n".join(lines + [note, "also: file.py:name, package.module:name, http://host:port; NAME@path for a local copy"])


def score_files(args):
    """Print the scores of picture files, a line each."""
    images = [read_picture(path) for path in args.images]
    reward = load(args.name, args.device)
    scores = reward.score(images, [args.prompt] * len(images))
    columns = [*scores.values(), reward.combine(scores)] if len(scores) > 1 else [*scores.values()]
    print("\t".join([*scores, "combined"][:len(columns)]) + "\tfile")
    for path, *row in zip(args.images, *columns):
        print("\t".join(f"{value:.6g}" for value in row) + f"\t{path}")


def serve(args):
    """Serve a reward until interrupted."""
    bound = server(load(args.name, args.device), args.host, args.port, os.environ.get("REWARD_TOKEN"),
                   int(args.max_body * 2**20))
    print(f"serving {args.name} at http://{args.host}:{bound.server_port}", flush=True)
    try:
        bound.serve_forever()
    except KeyboardInterrupt:
        bound.server_close()


def main(argv=None):
    """The command line -> exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(description="Score pictures, list the rewards, or serve one.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the rewards by name, with size, licence and scale")
    one = commands.add_parser("score", help="score picture files")
    one.add_argument("--prompt", required=True)
    one.add_argument("name")
    one.add_argument("images", nargs="+")
    other = commands.add_parser("serve", help="serve a reward over HTTP; REWARD_TOKEN in the environment guards it")
    other.add_argument("name")
    other.add_argument("--port", type=int, default=8000)
    other.add_argument("--host", default="127.0.0.1")
    other.add_argument("--max-body", type=float, default=256, help="MB that a request may have")
    for command in (one, other):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        {"list": lambda args: print(table()), "score": score_files, "serve": serve}[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
