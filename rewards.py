"""Rewards: any black box that can score a picture, and what it is given: prompts and pictures.

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
    vlm@http://host:8000/v1?model=m  an OpenAI-compatible judge (see `vlm`)
The weight is what follows the last `=`; in the query of a URL the first `=` of a pair is the pair's
own: `vlm@http://host/v1?model=m=0.5` has weight 0.5. Names hold no comma.

All pictures of a prompt come in one call, so a reward may compare them. Optional attributes of a
reward: `batch_size` (at most so many pictures a call, if it cannot take more);
`score_tensor(images, prompts)`, which takes the pictures as a float tensor (B, 3, H, W) in [0, 1];
`run_folder`, set to the run's folder before the first call; and, where right and wrong can be
told, `correct(images, prompts)` -> list of bool (None: not judged) and `tag(prompt)` -> its task.
What a reward does to its input, to torch's global settings or to the working directory, no other
sees.

    python rewards.py score NAME --prompt "a red cube" image.png ...
    python rewards.py list
    python rewards.py serve NAME [--port 8000] [--host 127.0.0.1]

Environment: REWARD_TOKEN (bearer token of served rewards, both ends), REWARD_PATIENCE (seconds that
a client goes on trying, 600), REWARD_TIMEOUT (seconds for one answer, 300), VLM_TOKEN or
OPENAI_API_KEY (bearer token of the judge).
"""
import argparse
import base64
import contextlib
import csv
import difflib
import functools
import hashlib
import hmac
import html
import http.client
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import numbers
import os
import re
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""


def one_line(error):
    """An exception as `Type: text` on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def one_line_errors():
    """Around a program: a UserError ends it with one line and exit code 2, and a terminal that is
    gone or lacks a letter is no fault of ours."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was saved before is intact", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # python drpo.py ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def pick(kind, name, options, also=""):
    """options[name] (name itself where they are no dict), or one line with the nearest names."""
    if name in options:
        return options[name] if isinstance(options, dict) else name
    near = ", ".join(difflib.get_close_matches(str(name), options, 3, 0.4) or options)
    raise UserError(f"unknown {kind} {name!r}; did you mean {near}?{f' ({also})' if also else ''}")


# ===== loading, checking, combining

def load(spec, device="cpu", watch=""):
    """A spec (see the top of the file), or a callable -> Reward; watch: a spec of rewards that are
    scored on request and never ranked on. UserError: unknown name, bad weight, missing files."""
    if callable(spec):
        name = getattr(spec, "__name__", type(spec).__name__)
        weights, parts = {name: 1.0}, {name: spec}
        spec = CALLABLE + name
    else:
        weights = parse(spec)
        parts = {part: build(part, device) for part in weights}
    watched = {}
    for part in parse(watch) if watch else ():
        watched[part] = parts[part] if part in parts else build(part, device)
    return Reward(str(spec), parts, weights, watched)


CALLABLE = "callable:"  # how a run notes a reward that was given as an object


def parse(spec):
    """`name[=weight],...` -> {name: weight}: finite, not 0, and 1.0 where none is given."""
    weights = {}
    for item in str(spec).split(","):
        name, weight = split_weight(item.strip())
        if not name:
            raise UserError(f"reward {spec!r}: an item without a name; write name[=weight],...")
        if name in weights:
            raise UserError(f"reward {spec!r}: {name!r} is named twice")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = 0
        if not math.isfinite(weights[name]) or weights[name] == 0:
            raise UserError(f"reward {spec!r}: the weight {weight!r} of {name!r} says nothing; "
                            "expected a finite number, not 0 (to log a reward only: --watch)")
    return weights


def split_weight(item):
    """`name=weight` or `name` -> name, weight as text. A = inside a path or a query is the
    name's."""
    name, _, weight = (text.strip() for text in item.rpartition("="))
    last_pair = re.search(r"\?(?:.*&)?(.*)", item)
    in_query = last_pair is not None and last_pair[1].count("=") < 2
    in_path = "/" in weight or weight.partition(":")[0].endswith(".py")
    return (item, "1") if "=" not in item or in_query or in_path else (name, weight)


def absolute(path):
    """A path that does not depend on the working directory; ~ is the home folder."""
    return os.path.abspath(os.path.expanduser(path))


def absolute_spec(spec):
    """A spec whose files are named by absolute paths, where there are such."""
    items = []
    for item in spec.split(","):
        name, weight = split_weight(item.strip())
        tail = item.strip()[len(name):]
        known, at, path = name.partition("@")
        if at and "://" not in path and os.path.exists(absolute(path)):
            name = f"{known}@{absolute(path)}"
        file, colon, attribute = name.rpartition(":")
        if file.endswith(".py") and os.path.exists(absolute(file)):
            name = absolute(file) + colon + attribute
        items.append(name + tail)
    return ",".join(items)


def build(name, device="cpu"):
    """One name of a spec -> its callable. UserError with the nearest names if it is none."""
    if name.startswith(("http://", "https://")):
        return Http(name)
    if name.startswith(CALLABLE):
        raise UserError(f"this run's reward was the callable {name[len(CALLABLE):]!r}: give one, "
                        "--reward file.py:function, or drpo.train(cfg, reward=...)")
    known, _, path = name.partition("@")
    if known in REWARDS:
        with world_kept():
            return REWARDS[known](device, path or None)
    source, _, attribute = name.rpartition(":")
    if source and attribute.isidentifier():
        return user_reward(name)
    near = ", ".join(difflib.get_close_matches(known, REWARDS, n=3, cutoff=0.5))
    hint = "for all names: python rewards.py list"
    if name.endswith(".py"):
        hint = f"name what it holds, {name}:function"
    raise UserError(f"unknown reward {name!r}{f'; nearest: {near}' if near else ''}; {hint}")


def imported(kind, name):
    """`file.py:attribute` or `module:attribute` -> the attribute; a class is made. UserError."""
    source, _, attribute = name.rpartition(":")
    try:
        with world_kept():
            if source.endswith(".py"):
                module = import_file(source)
            else:
                if os.getcwd() not in sys.path:
                    sys.path.append(os.getcwd())
                module = importlib.import_module(source)
            found = getattr(module, attribute)
            return found() if inspect.isclass(found) else found
    except (Exception, SystemExit) as error:
        raise UserError(f"{kind} {name!r}: {one_line(error)}") from error


def user_reward(name):
    """`file.py:attribute` or `module:attribute` -> a callable of (images, prompts)."""
    reward = imported("reward", name)
    try:
        inspect.signature(reward).bind("images", "prompts")
    except TypeError as error:
        raise UserError(f"reward {name!r}: it must be callable as f(images, prompts); {error}"
                        ) from error
    except ValueError:  # a compiled function that tells no signature
        pass
    return reward


LOADED = {}  # path of a reward's file: (its digest, its module)


def import_file(path):
    """A .py file -> its module. What it imports may lie beside it. Its name is its own where that
    is free, so that spawned processes find it, else one that nobody has."""
    path = Path(absolute(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if LOADED.get(path, [""])[0] == digest:
        return LOADED[path][1]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    found = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    own = found is not None and found.origin == str(path)
    name = path.stem if own else f"reward_{digest[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise
    LOADED[path] = digest, sys.modules[name]
    return sys.modules[name]


def autocast(device):
    """Reads and sets torch's autocast of a device."""
    return (functools.partial(torch.is_autocast_enabled, device),
            functools.partial(torch.set_autocast_enabled, device))


GLOBALS = [  # (read, set) of what a reward could change for everybody
    (os.getcwd, os.chdir), (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled), autocast("cpu"), autocast("cuda"),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_num_threads, torch.set_num_threads)]


@contextlib.contextmanager
def world_kept():
    """Puts back what the code inside may change for everybody: the working directory, torch's
    default dtype and device, gradient mode, autocast, precision, threads."""
    before = [read() for read, _ in GLOBALS]
    device = torch.get_default_device()
    try:
        yield
    finally:
        for (read, put), value in zip(GLOBALS, before):
            if read() != value:
                put(value)
        if torch.get_default_device() != device:
            torch.set_default_device(device)  # None would break get_default_device of torch 2.6


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
        """images, prompts as in `score` -> float64 (B,): `combine` over those that share a
        prompt."""
        scores = self.score(images, prompts)
        combined = torch.empty(len(prompts), dtype=torch.float64)
        for prompt in dict.fromkeys(prompts):
            group = torch.tensor([i for i, other in enumerate(prompts) if other == prompt])
            combined[group] = self.combine({name: values[group] for name, values in scores.items()})
        return combined

    def score(self, images, prompts, watch=False):
        """images: list of B PIL images, or a float tensor (B, 3, H, W) in [0, 1] on any device;
        prompts: B strings -> {part: float64 CPU tensor (B,)}, native scales; with watch also
        {"watch/NAME": (B,)}. UserError: a part raised, or did not give B real numbers."""
        if len(images) != len(prompts):
            raise UserError(f"reward {self.name!r}: {len(images)} images, {len(prompts)} prompts")
        tensor = isinstance(images, torch.Tensor)
        if tensor and (images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point()):
            raise UserError(f"reward {self.name!r}: a tensor of pictures is float (B,3,H,W) in "
                            f"[0,1], not {images.dtype} {tuple(images.shape)}")
        parts = dict(self.parts)
        if watch:
            parts.update({f"watch/{name}": part for name, part in self.watched.items()})
        pictures = None if tensor else images
        scores = {}
        for name, part in parts.items():
            call = getattr(part, "score_tensor", None) if tensor else None
            if not call and pictures is None:
                pictures = to_pil(images)
            values = [torch.empty(0, dtype=torch.float64)]
            for i in whole_prompts(prompts, getattr(part, "batch_size", None)):
                # copies: what a part does to them no other sees
                own = images[i].clone() if call else [image.copy() for image in pictures[i]]
                values.append(checked(name, call or part, own, list(prompts[i])))
            scores[name] = torch.cat(values)
        return scores

    def combine(self, scores):
        """{part: (..., K)}, the K candidates of one prompt last -> (..., K).

        One part: weight * score. Several: sum of weight * (score - mean) / std over the K
        candidates (population std); a part that finds all equal adds 0. A NaN in a part stands for
        that part's mean; a candidate on which every part is NaN stays NaN. Watched parts are left
        out."""
        scores = {name: scores[name] for name in self.weights}
        if len(scores) == 1:
            (name, values), = scores.items()
            return values * self.weights[name]
        total = sum(self.weights[name] * z_score(values) for name, values in scores.items())
        silent = torch.stack([values.isnan() for values in scores.values()]).all(0)
        return total.masked_fill(silent, math.nan)


def whole_prompts(prompts, size=None):
    """Slices of at most `size` pictures that cut between prompts; a larger prompt is cut too."""
    slices = []
    first = 0
    size = size or max(len(prompts), 1)
    while first < len(prompts):
        last = min(first + size, len(prompts))
        ends = [i for i in range(first + 1, last + 1)
                if i == len(prompts) or prompts[i] != prompts[i - 1]]
        last = ends[-1] if ends else last
        slices.append(slice(first, last))
        first = last
    return slices


def z_score(values):
    """(..., K) -> (values - mean) / std over the last dimension, 0 at NaN and where all agree."""
    values, known = values.double(), ~values.isnan()
    count = known.sum(-1, keepdim=True).clamp(min=1)
    offset = torch.where(known, values - values.nansum(-1, keepdim=True) / count, 0)
    std = (offset.square().sum(-1, keepdim=True) / count).sqrt()
    # equality is asked of the values: the rounding of their mean would leave a std of 1e-17
    low = values.masked_fill(~known, math.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~known, -math.inf).amax(-1, keepdim=True)
    return torch.where(high > low, offset / std, 0)


def checked(name, call, images, prompts):
    """call(images, prompts), which must give len(images) real numbers or NaN -> float64 (B,)."""
    try:
        with torch.no_grad(), world_kept():
            values = call(images, prompts)
    except (UserError, torch.OutOfMemoryError):  # the caller may know a smaller batch
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name!r}: {one_line(error)}") from error
    try:
        if isinstance(values, (torch.Tensor, np.ndarray)):
            values = values.tolist()
        if not isinstance(values, (list, tuple)) or len(values) != len(images):
            count = f"{len(values)} scores" if isinstance(values, (list, tuple)) else ""
            raise ValueError(f"{count or type(values).__name__} for {len(images)} images")
        return torch.tensor([number_of(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"reward {name!r}: returned {' '.join(str(error).split())[:120]}; a reward "
                        "returns one finite float an image, NaN for no opinion") from error


def number_of(value):
    """A score as a float. ValueError: it is none, or not finite."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise ValueError(f"{value!r:.40} ({type(value).__name__})")
    if math.isinf(float(value)):
        raise ValueError(f"{value}")
    return float(value)


# ===== files from the web, from a hub, or from a local copy

@contextlib.contextmanager
def reading(source, hint):
    """Turns whatever goes wrong inside into one line that names the source and says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # torn and foreign files fail in many ways
        text = f"{type(e).__name__} {e} {e.__cause__}"
        if re.search(r"\b40[13]\b|Gated|RepositoryNotFound", text):
            raise UserError(f"{source} is gated or private, or does not exist (HTTP 401, 403 or "
                            "404): accept its terms at https://huggingface.co, then: hf auth login"
                            ) from e
        raise UserError(f"{source} could not be read ({one_line(e)}); {hint}") from e


def write_atomic(path, data):
    """Bytes beside `path`, then renamed: nobody reads half a file, a full disk spoils nothing.

    data: bytes, text, or a function that writes into the file it is given. UserError."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as f:
            data(f) if callable(data) else f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:  # torch.save makes the first the second
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"{path} could not be written ({one_line(e)}); what was there is intact"
                        ) from e


def fetch(url, sha256):
    """Path of a file of the web, fetched once into ~/.cache/drpo (or $DRPO_CACHE) and checked."""
    cache = Path(os.environ.get("DRPO_CACHE", Path.home() / ".cache" / "drpo"))
    path = cache / sha256[:12] / url.rsplit("/", 1)[-1]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"fetching {url}, once", file=sys.stderr)
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
            print(f"fetched {path}", file=sys.stderr)
        right = hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except (OSError, RuntimeError) as e:
        raise UserError(f"{url} could not be fetched ({one_line(e)}); put the file at {path} and "
                        "start again (DRPO_CACHE names another folder)") from e
    if not right:
        raise UserError(f"{path}: its sha256 differs from {sha256}; delete it, and start again")
    return path


def quiet_libraries():
    """diffusers and transformers say nothing of their own: what goes wrong is said by us, in one
    line. The bars of downloads, which they would switch off as well, stay."""
    import diffusers
    import huggingface_hub.constants
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        huggingface_hub.utils.enable_progress_bars()


WEIGHTS = re.compile(  # of a network: file, half precision, part of several, kind, index
    r"(?:diffusion_pytorch_model|model|pytorch_model)(\.fp16)?(?:-\d+-of-\d+)?(\.fp16)?"
    r"\.(safetensors|bin)(?:\.index(?:\.fp16)?\.json)?")


def wanted_files(names, folders, without_weights=()):
    """The files of a repository that its folders need: configs and tokenizers, and of the weights
    of each network one kind alone: .safetensors before .bin, half precision before full."""
    wanted = []
    for folder in folders:
        kinds = {}
        for name in names:
            parent, _, file = name.rpartition("/")
            match = WEIGHTS.fullmatch(file)
            if parent != folder:
                continue
            if match:
                kinds.setdefault((match[3] == "bin", ".fp16" not in file), []).append(name)
            elif file.endswith((".json", ".txt", ".model")) and ".index." not in file:
                wanted.append(name)
        if kinds and folder not in without_weights:
            wanted += kinds[min(kinds)]
    return wanted


def hub_folder(repo, folders=("",), without_weights=()):
    """A local folder with what `wanted_files` names of a repository of the hub, fetched once."""
    return from_hub(repo, lambda names: wanted_files(names, folders, without_weights))


def hub_file(repo, name):
    """A local path of one file of a repository of the hub, fetched once."""
    return Path(from_hub(repo, lambda names: [name])) / name


def from_hub(repo, choose):
    """Fetches the files of a repository that choose(names) picks, each with a bar on a terminal,
    and says how much is to come; offline, what an earlier start fetched -> folder."""
    import huggingface_hub as hub
    import huggingface_hub.errors  # noqa: F401
    try:
        info = hub.HfApi().model_info(repo, files_metadata=True)
    except (hub.errors.RepositoryNotFoundError, hub.errors.GatedRepoError):
        raise
    except Exception as e:  # no network, HF_HUB_OFFLINE=1, a hub that is down
        try:
            return hub.snapshot_download(repo, local_files_only=True)
        except Exception:
            raise e from None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    wanted = choose(list(sizes))
    missing = [name for name in wanted
               if not isinstance(hub.try_to_load_from_cache(repo, name, revision=info.sha), str)]
    size = sum(sizes.get(name, 0) for name in missing) / 1e9
    told = size > 1e-3 or any(WEIGHTS.fullmatch(name.rpartition("/")[2]) for name in missing)
    if told:
        print(f"fetching {repo}, {size:.2g} GB, once", file=sys.stderr, flush=True)
    folder = None
    for name in wanted:
        path = Path(hub.hf_hub_download(repo, name))
        folder = path.parents[name.count("/")]
    if told:
        print(f"fetched {repo}", file=sys.stderr, flush=True)
    return str(folder)


@contextlib.contextmanager
def fetching(name, files, repo, path):
    """`reading` of a reward's files: the line says where they come from."""
    source = path or f"https://huggingface.co/{repo}"
    hint = f"for a local copy give {name}@/path/to/folder"
    with reading(f"reward {name!r}: {files} of {source}", hint):
        if path and not Path(path).exists():
            raise FileNotFoundError("no such file or folder")
        try:
            yield
        except UserError as e:  # of `fetch`
            raise UserError(f"reward {name!r}: {e}; {hint}") from e


def repo_file(repo, filename, path):
    """A file of a hub repository: `path` itself, the file in that folder, or a download."""
    if path:
        return Path(path) / filename if Path(path).is_dir() else Path(path)
    return hub_file(repo, filename)


def read_weights(path):
    """A .safetensors file, or one of torch whose code is never run -> its content."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def tokenizer_at(repo, path, max_length, **options):
    """The tokenizer in folder `path` if one lies there, else of the hub's `repo`, as a function of
    a list of texts -> input_ids and attention_mask, (B, max_length)."""
    from transformers import AutoTokenizer
    names = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt")
    here = path and any((Path(path) / name).exists() for name in names)
    source = path if here else from_hub(repo, lambda files: [
        name for name in files if name in (*names, "merges.txt", "config.json",
                                           "special_tokens_map.json")])
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return lambda texts: tokenizer(texts, padding="max_length", truncation=True,
                                   max_length=max_length, return_tensors="pt")


# weights that may be missing or left over: buffers of old files, and a last norm that transformers
# 5.9 added to Swin and no feature uses
UNUSED = re.compile(r"(.*\.)?position_ids|.*\bswin\.layernorm\.(weight|bias)")


def frozen(cls, source, exact=False, **options):
    """cls.from_pretrained(source), frozen, in float32 on the CPU unless the options say otherwise.

    `source` is None when they bring config and state_dict. ValueError: a weight is missing, which
    would be random; exact: or left over (a larger model's decoder may be)."""
    options.setdefault("dtype", torch.float32)
    if cls.__module__.startswith("diffusers"):
        options["torch_dtype"] = options.pop("dtype")
    model, report = cls.from_pretrained(source, output_loading_info=True, **options)
    for trouble in ("missing", "unexpected") if exact else ("missing",):
        keys = sorted(key for key in report[f"{trouble}_keys"] if not UNUSED.fullmatch(key))
        if keys:
            part = options.get("subfolder", cls.__name__)
            raise ValueError(f"{part}: {len(keys)} {trouble} weights, {keys[0]} first")
    return model.eval().requires_grad_(False)


def half_on(device):
    """float16 on a GPU (CLIP models were trained and are served in it), float32 on the CPU."""
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def linear_head(weights, prefix, device):
    """The heads of the LAION predictor and of ImageReward: linear layers 0, 2, 4, 6, 7 with nothing
    between them (the numbers left out were dropouts) -> function (B, D) -> (B,) in float32."""
    layers = []
    for i in (0, 2, 4, 6, 7):
        layers.append([weights[f"{prefix}layers.{i}.{kind}"].to(device, torch.float32)
                       for kind in ("weight", "bias")])

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
    return user_reward(f"{HERE}/lab/scene.py:scene")


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
    """Compressibility, the negative of incompressibility: smooth, simple pictures.

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
    "text_config": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                        num_attention_heads=16, hidden_act="gelu", projection_dim=1024),
    "vision_config": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                          num_attention_heads=16, hidden_act="gelu", projection_dim=1024,
                          patch_size=14)}


@functools.lru_cache
def constants(channels, device):
    """Three numbers as (3,1,1) on the device; kept there, since sending them makes the GPU wait."""
    return torch.tensor(channels, device=device).view(3, 1, 1)


def clip_pixels(images, device, size=224, fit="floor"):
    """list of PIL images or float (B,3,H,W) in [0,1] -> float32 (B,3,size,size), normalised as CLIP
    does.

    fit "floor": the short side becomes `size` and the middle is cut out, an odd pixel left at the
    far side as in transformers; "round": cut as torchvision does (other by a pixel for some shapes,
    never for squares); "pad": the long side becomes `size`, the rest is black, in float and resized
    once, as HPSv2 does. A tensor goes through the same arithmetic as PIL's bicubic filter, rounding
    between its two passes included: a picture scores the same before and after it is saved."""
    batches = [images.to(device)] if isinstance(images, torch.Tensor) else images
    resize = pad_resize if fit == "pad" else crop_resize
    whole_number = round if fit == "round" else int
    squares = []
    for batch in batches:
        x = resize(batch, size)  # (b,3,h,w), 0..1
        left = whole_number((size - x.shape[-1]) / 2)
        top = whole_number((size - x.shape[-2]) / 2)  # negative: cuts
        x = F.pad(x, (left, size - x.shape[-1] - left, top, size - x.shape[-2] - top))
        squares.append(x.to(device))
    return (torch.cat(squares) - constants(CLIP_MEAN, device)) / constants(CLIP_STD, device)


def pad_resize(image, size):
    """PIL image or (B,3,H,W) in [0,1] -> (b,3,h,w), the long side `size`: float, bicubic,
    antialiased, not clamped."""
    x = as_tensor(image)[None] if isinstance(image, Image.Image) else image.float().clamp(0, 1)
    scale = size / max(x.shape[-2:])  # v * (size / longest) rounds otherwise for 85 x 320
    shape = [round(v * scale) for v in x.shape[-2:]]
    return F.interpolate(x, shape, mode="bicubic", antialias=True)


def crop_resize(image, size):
    """PIL image or (B,3,H,W) in [0,1] -> (b,3,h,w), the short side `size`: 8 bits and PIL's bicubic
    filter."""
    is_pil = isinstance(image, Image.Image)
    width, height = image.size if is_pil else (image.shape[-1], image.shape[-2])
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    if is_pil:
        small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return as_tensor(small)[None]
    x = (image.float().clamp(0, 1) * 255).round()
    for shape in ((x.shape[-2], width), (height, width)):  # columns, then rows
        x = F.interpolate(x, size=shape, mode="bicubic", antialias=True)
        x = x.add(0.5).floor().clamp(0, 255)
    return x / 255


class Clip:
    """A frozen CLIPModel and its tokenizer: unit embeddings of pictures and texts in float32.

    The embedding of each prompt is computed once and kept: all candidates of a prompt share it."""

    def __init__(self, model, tokenize, device, fit="floor"):
        self.tokenize = tokenize
        self.fit = fit
        self.known = {}
        self.size = model.config.vision_config.image_size
        self.scale = model.logit_scale.float().exp().item()  # in half precision it is 0.2% off
        self.model = model.to(device, half_on(device))

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
            # padding comes after the token that is pooled, and attention looks back only: no mask
            # is needed. One, or a copy that blocks, would make the host wait for the GPU
            tokens = self.tokenize(new[i:i + 256])["input_ids"]
            tokens = tokens.to(self.model.device, non_blocking=True)
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
    quiet_libraries()
    with fetching(name, "config.json, model.safetensors and the tokenizer", repo, path):
        model = frozen(CLIPModel, path or hub_folder(repo))
        return Clip(model, tokenizer_at(repo, path, 77), device, fit)


def pickscore(device="cpu", path=None):
    """Human preference between pictures of one prompt.

    model    yuvalkirstain/PickScore_v1 (CLIP ViT-H-14)
    licence  MIT (code)
    size     3.9 GB
    scale    exp(logit_scale) * cosine, 20 to 23: the scale is about 100, so these are papers'
             "PickScore x 100"
    source   Kirstain et al. 2023, arXiv 2305.01569
    compared the model card's code, transformers: 7e-6 of a spread of 1.9; fp16 (on a GPU; the
             original runs float32) costs 0.0074 of a spread of 0.27, order kept
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
    compared that repository's code with the real head, random CLIP: the same crops; fp16 costs
             0.002, order kept
    path     the head's file (CLIP from the hub), or a folder with it (also as aesthetic-model.pth)
             and a copy of CLIP
    """
    names = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")
    file, folder = path, None
    if path and Path(path).is_dir():
        there = [Path(path) / name for name in names if (Path(path) / name).exists()]
        file, folder = there[0] if there else Path(path) / names[0], path
    with fetching("aesthetic", names[0], "trl-lib/ddpo-aesthetic-predictor", path):
        head = linear_head(read_weights(file or fetch(*AESTHETIC)), "", device)
    model = clip_at("aesthetic", CLIP_L, device, folder, "round")
    return takes_tensors(lambda images, prompts: head(model.image(images)), 256)


def hpsv2(device="cpu", path=None):
    """Human preference, version 2.1; pictures that are not square are padded with black.

    model    HPS_v2.1_compressed.pt of xswu/HPSv2 (CLIP ViT-H-14), tokenizer of PickScore_v1
    licence  Apache-2.0
    size     2.0 GB
    scale    cosine, 0.25 to 0.31
    source   Wu et al. 2023, arXiv 2306.09341
    compared hpsv2 1.2.0 of PyPI: pictures 0.0 levels apart; texts, 3 of 25,432 Pick-a-Pic prompts
             get other tokens. Without antialiasing scores move by up to 0.021
    path     the .pt file of version 2.1 or 2.0 (HPS_v2_compressed.pt, which DrPO's authors use), or
             a folder with the 2.1 file and, to stay off the hub, the files of any CLIP tokenizer
    """
    from transformers import CLIPConfig, CLIPModel
    quiet_libraries()
    with fetching("hpsv2", "HPS_v2.1_compressed.pt", "xswu/HPSv2", path):
        file = repo_file("xswu/HPSv2", "HPS_v2.1_compressed.pt", path)
        state = from_open_clip(read_weights(file)["state_dict"])
        model = frozen(CLIPModel, None, config=CLIPConfig(**VIT_H), state_dict=state)
    with fetching("hpsv2", "the tokenizer", PICKSCORE, None):
        tokenize = tokenizer_at(PICKSCORE, path, 77)
    model = Clip(model, lambda texts: tokenize([repaired(text) for text in texts]), device, "pad")
    return takes_tensors(lambda images, prompts: model.cosine(images, prompts), 256)


def repaired(text):
    """What open_clip's tokenizer does to a text first, without ftfy: HTML entities, quotes, wide
    letters, ligatures."""
    text = html.unescape(html.unescape(text))
    text = re.sub("[\u02bc\u2018-\u201b]", "'", text)
    text = re.sub("[\u201c-\u201f]", '"', text)
    wide = "[\uff01-\uff5e\u3000\ufb00-\ufb06]"
    text = re.sub(wide, lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return unicodedata.normalize("NFC", text).strip()


OPEN_CLIP_NAMES = [  # (open_clip's, transformers')
    ("transformer.resblocks.", "encoder.layers."), ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"), ("class_embedding", "embeddings.class_embedding"),
    ("token_embedding", "embeddings.token_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1", "embeddings.patch_embedding"), ("ln_pre", "pre_layrnorm"),
    ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm")]


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

BLIP_TEXT = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                 intermediate_size=3072, vocab_size=30524, layer_norm_eps=1e-12,
                 encoder_hidden_size=1024)
BLIP_VISION = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                   intermediate_size=4096, patch_size=16, image_size=224, layer_norm_eps=1e-6)
BLIP_NAMES = [  # (ImageReward's, transformers')
    ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"), ("blocks.", "encoder.layers."),
    (".attn.", ".self_attn."), (".proj.", ".projection."), (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2.")]


def imagereward(device="cpu", path=None):
    """Human preference, trained on rankings with text-image agreement in mind.

    model    ImageReward.pt of THUDM/ImageReward (BLIP), tokenizer of bert-base-uncased
    licence  Apache-2.0
    size     1.8 GB
    scale    about -2 to 2, normalised to mean 0 and std 1 over its training pictures
    source   Xu et al. 2023, arXiv 2304.05977
    compared image-reward 1.5 of PyPI: 0 where the crop agrees, which it does now; fp16 (on a GPU;
             the original runs float32) costs 0.011 of a spread of 4.3, order kept
    path     ImageReward.pt, or a folder with it and, to stay off the hub, vocab.txt of
             bert-base-uncased
    """
    quiet_libraries()
    repo = "THUDM/ImageReward"
    with fetching("imagereward", "ImageReward.pt", repo, path):
        weights = read_weights(repo_file(repo, "ImageReward.pt", path))
        vision, text = from_blip(weights, device)
        head = linear_head(weights, "mlp.", device)
    with fetching("imagereward", "the tokenizer", "bert-base-uncased", None):
        tokenize = tokenizer_at("bert-base-uncased", path, 35, tokenizer_type="bert",
                                pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
                                unk_token="[UNK]", do_lower_case=True)

    @torch.no_grad()
    def score(images, prompts):
        pixels = clip_pixels(images, device, vision.config.image_size, "round").to(vision.dtype)
        patches = vision(pixel_values=pixels).last_hidden_state  # (B, 1 + patches, D)
        tokens = tokenize(list(prompts)).to(device)
        read = text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                    encoder_hidden_states=patches)
        return (head(read.last_hidden_state[:, 0]) - 0.16717362830052426) / 1.0333394966054072

    return takes_tensors(score, 64)


def from_blip(weights, device):
    """State dict of ImageReward -> transformers' BlipVisionModel and BlipTextModel."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    seen, read = {}, {}
    for key, value in weights.items():
        if key.startswith("blip.visual_encoder."):
            key = re.sub(r"^norm\.", "post_layernorm.", key.removeprefix("blip.visual_encoder."))
            seen[renamed(key, BLIP_NAMES)] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            read[key.removeprefix("blip.text_encoder.")] = value
    vision = frozen(BlipVisionModel, None, config=BlipVisionConfig(**BLIP_VISION), state_dict=seen)
    text = frozen(BlipTextModel, None, config=BlipTextConfig(**BLIP_TEXT), state_dict=read,
                  add_pooling_layer=False)
    return vision.to(device, half_on(device)), text.to(device, half_on(device))


HPSV3_TOKENS = ("<|Reward|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>",
                "<|im_end|>", "<|endoftext|>", "<|video_pad|>")  # a prompt must not hold them


def hpsv3(device="cpu", path=None):
    """Human preference, version 3, through its authors' package, which needs a CUDA GPU.

    model    MizzenAI/HPSv3 on Qwen/Qwen2-VL-7B-Instruct (another 16.6 GB, downloaded first)
    licence  MIT (package and weights), Apache-2.0 (Qwen2-VL)
    size     16.6 GB + 16.6 GB
    scale    mean of the predicted preference, in the package's own unit
    source   Ma et al. 2025, arXiv 2508.03789
    compared hpsv3's own call on a tiny random Qwen2-VL: the arguments and the first component
    path     the package's checkpoint file. The package pins old libraries: install it in an
             environment of its own, run `python rewards.py serve hpsv3` there, and use
             `--reward http://127.0.0.1:8000` here
    """
    try:
        if torch.device(device).type != "cuda":
            raise ValueError(f"it needs a CUDA GPU, not {device}")
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{path} is no checkpoint file")
        from hpsv3 import HPSv3RewardInferencer
        options = {"checkpoint_path": str(path)} if path else {}
        model = HPSv3RewardInferencer(device=str(device), **options)
    except Exception as error:
        raise UserError(f"reward 'hpsv3': its package cannot be used ({one_line(error)}); in an "
                        "environment of its own: pip install hpsv3 matplotlib tensorboard rich "
                        "tyro, python rewards.py serve hpsv3; then here http://HOST:8000"
                        ) from error

    @torch.no_grad()  # else each call would keep a graph of 7 billion parameters
    def score(images, prompts):
        for prompt, token in itertools.product(dict.fromkeys(prompts), HPSV3_TOKENS):
            if token in prompt:
                raise UserError(f"reward 'hpsv3': {prompt[:60]!r} holds its special token {token}")
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, f"{i}.png") for i in range(len(images))]
            for image, file in zip(images, paths):
                image.convert("RGB").save(file)
            found = model.reward(prompts=list(prompts), image_paths=paths)
            return [float(mean_and_sigma[0]) for mean_and_sigma in found]

    score.batch_size = 8
    return score


def geneval(device="cpu", path=None):
    """Object-focused agreement with the 553 GenEval prompts; other prompts get no opinion.

    model    facebook/mask2former-swin-small-coco-instance and openai/clip-vit-large-patch14
    licence  MIT (benchmark)
    size     2.0 GB
    scale    dense 0 to 1; strict accuracy, mean of six tags: SD1.5 0.43, SD2.1 0.50, SDXL 0.55
    source   Ghosh et al. 2023, arXiv 2310.11513; prompts of github.com/djghosh13/geneval af4902f2
    compared its evaluation script: 0 disagreements in 11,060 detections over all 553 prompts; its
             detector is mmdet's, this one Facebook's of the same architecture (lab/geneval.py)
    path     evaluation_metadata.jsonl, or a folder with it and copies of the two repositories in
             mask2former/ and clip/
    """
    return user_reward(f"{HERE}/lab/geneval.py:geneval")(device, path)


# ===== rewards behind a URL

WAITING = set()  # URLs whose trouble has been told


def seconds(variable, default):
    """A number of seconds, more than 0, from the environment."""
    try:
        value = float(os.environ.get(variable, default))
    except ValueError:
        value = 0
    if not 0 < value < 1e9:
        raise UserError(f"{variable}={os.environ[variable]!r}: expected seconds, above 0")
    return value


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would lose its body, and hand the token to another host."""

    def redirect_request(self, *_):
        """Not followed: the answer is the redirect itself."""


class Refused(UserError):
    """A permanent answer of a server. status, text: what it said."""

    def __init__(self, who, status, text):
        super().__init__(f"{who}: HTTP {status}: {' '.join(text.split())[:200]}")
        self.status, self.text = status, text


def post_json(url, payload, token, who):
    """POST a JSON value, return the JSON answer.

    Broken connections, 408, 409, 425, 429 and 5xx are tried again with growing pauses, or after
    what Retry-After asks, until REWARD_PATIENCE is used up; any other refusal is `Refused` at once.
    """
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    patience, timeout = seconds("REWARD_PATIENCE", 600), seconds("REWARD_TIMEOUT", 300)
    request = urllib.request.Request(url, json.dumps(payload).encode(), headers)
    opener = urllib.request.build_opener(NoRedirect)
    deadline = time.monotonic() + patience
    for pause in (min(0.5 * 2 ** n, 10) for n in itertools.count()):
        try:
            with opener.open(request, timeout=timeout) as answer:
                text = answer.read()
            WAITING.discard(url)
            return json_answer(text, who)
        except urllib.error.HTTPError as refusal:
            text = refusal.read().decode(errors="replace")
            if 300 <= refusal.code < 400:
                where = refusal.headers.get("Location")
                text = f"a redirect to {where}: give that address"
                raise Refused(who, refusal.code, text) from None
            again = refusal.code in (408, 409, 425, 429) or refusal.code >= 500
            if not again or re.search("insufficient_quota", text):
                raise Refused(who, refusal.code, text) from None
            trouble = f"HTTP {refusal.code}: {' '.join(text.split())[:200]}"
            asked = refusal.headers.get("Retry-After", "")
            pause = max(pause, int(asked) if asked.isdecimal() else 0)
        except (OSError, http.client.HTTPException) as error:  # time-outs, broken connections
            trouble = one_line(error)
        left = deadline - time.monotonic()
        if left <= 0:
            raise UserError(f"{who}: {trouble}; gave up after {patience:g} s (REWARD_PATIENCE)")
        if url not in WAITING:
            WAITING.add(url)
            print(f"{who}: {trouble}; trying again for up to {patience:g} s", file=sys.stderr)
        time.sleep(min(pause, left))


def json_answer(text, who):
    """JSON bytes -> value. UserError: no JSON, or an error in its place."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{who}: its answer is not JSON ({one_line(error)})") from None
    if isinstance(value, dict) and value.get("error"):  # some servers say so with status 200
        raise Refused(who, 200, str(value["error"]))
    return value


def base64_image(image, kind, **options):
    """PIL image -> base64 text of a PNG or JPEG file."""
    file = io.BytesIO()
    image.convert("RGB").save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def checked_url(name, url):
    """The URL split. UserError: no host, a senseless port, or credentials in it."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.username or parts.password:
            raise UserError(f"reward {name.rpartition('@')[2]!r}: credentials in a URL are not "
                            "used; set REWARD_TOKEN, or VLM_TOKEN for a judge")
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1):
            return parts
    except ValueError:
        pass
    raise UserError(f"reward {name!r}: {url!r} is not a URL of the form http://host:port")


class Http:
    """A reward served by `python rewards.py serve`: POST {url}/score, whole prompts of about 64
    pictures at a time. The bearer token, if the server wants one, is REWARD_TOKEN."""

    def __init__(self, url):
        checked_url(url, url)
        self.url = url.rstrip("/")

    def __call__(self, images, prompts):
        """list of PIL images, list of prompts -> list of floats, NaN where the answer was null."""
        scores = []
        size = max(64, *(prompts.count(prompt) for prompt in dict.fromkeys(prompts)))
        for i in whole_prompts(prompts, size):
            files = [base64_image(image, "PNG", compress_level=1) for image in images[i]]
            who = f"reward {self.url!r}"
            answer = post_json(self.url + "/score", {"prompts": list(prompts[i]), "images": files},
                               os.environ.get("REWARD_TOKEN"), who)
            found = answer.get("scores") if isinstance(answer, dict) else None
            if not isinstance(found, list) or len(found) != len(files):
                raise UserError(f'{who}: its answer is not {{"scores": [one an image]}}')
            scores += [math.nan if score is None else score for score in found]
        return scores


RATE = """How well does this picture show the following text, and how good does it look,
from {low} to {high} (perfect)?
Text: {prompt}
Answer with one line of the form
Score: <number>"""
ASK_YES = "Does this picture show the following text? Answer Yes or No.\nText: {prompt}"
FILTERED = re.compile(r"content.?(filter|policy|management)|moderation|safety|flagged|prohibited",
                      re.I)


class Vlm:
    """An OpenAI-compatible judge. silent: how many pictures got no opinion, because the reply held
    no score, or because a content filter refused the picture."""

    def __init__(self, address):
        parts = checked_url(f"vlm@{address}", address)
        query = dict(urllib.parse.parse_qsl(parts.query))
        known = {"model", "tokens", "yes", "question", "scale"}
        self.model = query.get("model")
        tokens = query.get("tokens", "1024")
        scale = re.fullmatch(r"(\d+)-(\d+)", query.get("scale", "0-10"))
        if not self.model or not tokens.isdecimal() or not scale or set(query) - known:
            raise UserError(f"reward 'vlm@{address}': name the model, vlm@http://host:port/v1?"
                            "model=NAME and, if you like, &tokens=1024, &yes=1, &question=FILE, "
                            "&scale=0-10")
        path = parts.path.rstrip("/") or "/v1"
        if not path.endswith("/chat/completions"):
            path += "/chat/completions"
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self.yes = query.get("yes") == "1"
        self.low, self.high = float(scale[1]), float(scale[2])
        self.question = ASK_YES if self.yes else RATE
        if "question" in query:
            self.question = read_text(query["question"])
            if "{prompt}" not in self.question:
                raise UserError(f"{query['question']}: a question has {{prompt}} in it")
        self.silent = 0
        self.lock = threading.Lock()
        self.options = {"temperature": 0, "max_tokens": int(tokens)}
        if self.yes:
            self.options.update(max_tokens=1, logprobs=True, top_logprobs=20)
        elif "question" not in query:
            number = {"type": "number"}
            schema = {"type": "object", "properties": {"score": number}, "required": ["score"],
                      "additionalProperties": False}
            self.options["response_format"] = {"type": "json_schema", "json_schema": {
                "name": "score", "strict": True, "schema": schema}}

    def __call__(self, images, prompts):
        """list of PIL images, list of prompts -> list of floats; eight questions at a time."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.score, images, prompts))

    def post(self, content, options):
        """A message -> the first choice of the answer, {} where there is none.

        What an endpoint does not know (response_format, max_tokens, a temperature) is left out or
        said in its own words from then on. None: a content filter refused."""
        token = os.environ.get("VLM_TOKEN") or os.environ.get("OPENAI_API_KEY")
        message = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        while True:
            try:
                who = f"reward 'vlm' at {self.url}"
                answer = post_json(self.url, {**message, **options}, token, who)
                choices = answer.get("choices") if isinstance(answer, dict) else None
                choice = choices[0] if choices and isinstance(choices[0], dict) else {}
                return None if choice.get("finish_reason") == "content_filter" else choice
            except Refused as refusal:
                if FILTERED.search(refusal.text):
                    return None
                if refusal.status not in (400, 422):
                    raise
                if "response_format" in options and re.search("format|schema", refusal.text):
                    del options["response_format"]
                elif "max_tokens" in options and re.search("max_tokens|temperature", refusal.text):
                    options["max_completion_tokens"] = options.pop("max_tokens")
                    options.pop("temperature", None)
                else:
                    raise

    def ask(self, content):
        """A message of one's own -> the text of the reply, "" where there is none."""
        options = {name: value for name, value in self.options.items() if "token" in name}
        return text_of(self.post(content, options))

    def score(self, image, prompt):
        """One picture -> its score, or NaN; the first reply without one is shown."""
        question = self.question
        values = {"low": f"{self.low:g}", "high": f"{self.high:g}", "prompt": prompt}
        for name, value in values.items():
            question = question.replace(f"{{{name}}}", value)
        choice = self.post([image_part(image), {"type": "text", "text": question}], self.options)
        if self.yes:
            score = math.nan if choice is None else self.probability_of_yes(choice)
        else:
            score = number_in(text_of(choice), self.low, self.high)
        if math.isnan(score):
            with self.lock:
                self.silent += 1
                first = self.silent == 1
            if first:
                shown = " ".join(text_of(choice).split())[:120]
                print(f"reward 'vlm': no score in the reply {shown!r}: no opinion", file=sys.stderr)
        return score

    def probability_of_yes(self, choice):
        """P(yes) / (P(yes) + P(no)) of the first token of a reply; NaN where neither is likely."""
        try:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            found = [(token["token"], math.exp(token["logprob"])) for token in tokens]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"reward 'vlm' at {self.url}: gives no top_logprobs, which yes=1 needs"
                            ) from None
        sums = {"yes": 0.0, "no": 0.0}
        for token, probability in found:
            word = re.sub(r"\W", "", token).lower()
            if word in sums:
                sums[word] += probability
        total = sums["yes"] + sums["no"]
        return sums["yes"] / total if total > 0 else math.nan


def text_of(choice):
    """The text of a choice; what a model thinks to itself (reasoning_content) is no answer."""
    message = choice.get("message") if choice else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def image_part(image):
    """PIL image -> the part of a message that shows it."""
    url = "data:image/jpeg;base64," + base64_image(image, "JPEG", quality=95)
    return {"type": "image_url", "image_url": {"url": url}}


def number_in(reply, low=0.0, high=10.0):
    """The score of a reply, or NaN where it is not beyond doubt: the number after `score` or
    `rating` (JSON or text), else the only one of a reply of at most five words. 7/10 is 7; a range,
    a percentage, two that differ, a number off the scale, unfinished thinking are none."""
    text = re.sub(r"<(think\w*|reason\w*)>.*?(</\1>|\Z)", " ", reply or "", flags=re.S | re.I)
    text = re.sub(r"\([^)]*\)|[*_`\"]", "", text)  # "Score (0-10): 8"
    text = re.sub(rf"\s*(/|out of)\s*{high:g}\b", "", re.sub(r"(?<=\d),(?=\d)", ".", text))
    number = r"([+-]?(?:\d+(?:\.\d+)?|\.\d+))(?!\s*[%/]|\s*(?:-|\u2013|to|or)\s*\d|\.?\d)"
    said = re.findall(rf"\b(?:score|rating)\b(?:\s+(?:is|of))?\W{{0,3}}?{number}", text, re.I)
    if not said and len(text.split()) <= 5 and len(re.findall(r"[\d.]*\d", text)) == 1:
        said = re.findall(rf"(?<![\w.,/-]){number}", text)
    value = float(said[0]) if len(set(map(float, said))) == 1 else math.nan
    return value if low <= value <= high else math.nan


def vlm(device="cpu", path=None):
    """A vision-language model asked for a number, at any OpenAI-compatible endpoint.

    model    the endpoint's
    licence  the endpoint's
    size     0
    scale    0 to 10, or &scale=1-5; with &yes=1 P(yes) of 0 to 1, almost without ties
    source   the questions are RATE and ASK_YES in this file, or &question=FILE with {prompt} in it
    compared nothing: the questions are ours
    path     the endpoint, as it is or without /chat/completions: vlm@http://host/v1?model=NAME,
             with &tokens=N the most tokens of a reply (1,024)
    """
    if not path:
        raise UserError("reward 'vlm': name the endpoint, vlm@http://host:port/v1?model=NAME")
    return Vlm(path)


# ===== serving

MAX_BODY = 256 * 2 ** 20  # bytes of a request


class Handler(BaseHTTPRequestHandler):
    """POST /score {"prompts": [...], "images": [base64 PNG, JPEG or WebP, ...]} -> {"scores":
    [number or null, ...]}; GET /health -> {"name": ...}; what is wrong -> {"error": one line}."""
    timeout = 60  # seconds of silence that a client may keep the server waiting

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
        if self.path == "/health":
            return self.answer(200, {"name": self.server.reward.name})
        self.answer(404, {"error": "not found"})

    def do_POST(self):
        """Score."""
        token = self.server.token
        given = self.headers.get("Authorization", "")
        length = self.headers.get("Content-Length", "")
        try:
            if not length.isdecimal() or len(length) > 15 or int(length) > MAX_BODY:
                text = f"a body of {length or 'unknown'} bytes, at most {MAX_BODY}"
                return self.answer(413, {"error": text})
            body = self.rfile.read(int(length))
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return self.answer(401, {"error": "wrong or missing bearer token"})
            if self.path != "/score":
                return self.answer(404, {"error": "not found: POST /score or GET /health"})
            self.answer(*self.scores(body))
        except OSError:  # the client left, or fell silent
            self.close_connection = True

    def scores(self, body):
        """JSON bytes -> HTTP status, answer; null stands for NaN."""
        try:
            request = json.loads(body)
            prompts, texts = request["prompts"], request["images"]
            if len(prompts) != len(texts) or not all(isinstance(text, str) for text in prompts):
                raise ValueError(f"{len(prompts)} prompts, {len(texts)} images")
            files = [io.BytesIO(base64.b64decode(text, validate=True)) for text in texts]
            images = [read_picture(file, ("PNG", "JPEG", "WEBP")) for file in files]
        except (ValueError, KeyError, TypeError, RecursionError, UserError) as error:
            expected = '{"prompts": [text, ...], "images": [base64 of a PNG, JPEG or WebP, ...]}'
            return 400, {"error": f"expected {expected} ({one_line(error)})"}
        try:
            scores = self.server.reward(images, prompts).tolist()
        except Exception as error:
            return 500, {"error": one_line(error)}
        return 200, {"scores": [None if math.isnan(score) else score for score in scores]}


def server(reward, host="127.0.0.1", port=8000, token=None):
    """A bound HTTP server for a Reward, which answers in the thread that calls serve_forever().

    UserError: several parts, which are z-scored over a prompt's candidates, at the client."""
    if len(reward.parts) > 1:
        raise UserError(f"serve one reward at a time, not {reward.name!r}: combine at the client")
    try:
        bound = HTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on {host}:{port}: {one_line(error)}") from None
    bound.reward = reward
    bound.token = token
    return bound


# ===== prompts, pairs and pictures: read as what they are, or refused by name

ANIMALS ="""
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox
    wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog
    chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo"""
DEEDS = ("riding a bike", "playing chess", "washing dishes")
GITHUB = "https://raw.githubusercontent.com/"
PICKAPIC = GITHUB + "UGVly/DrPO/dd473d8fc28ffe4fb8d0440ad249164e21a23cb0/data/pickscore/"
PICKAPIC_TOO = (GITHUB + "yifan123/flow_grpo/ac4c86e8cae021841f1fde853d340e0db67690dd/"
                "dataset/pickscore/")
PROMPTS = {  # Pick-a-Pic v2 prompts are written by users, partly explicit. (sha256, addresses)
    "pickapic": ("2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f",
                 PICKAPIC + "train.txt", PICKAPIC_TOO + "train.txt"),
    "pickapic-test": ("d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262",
                      PICKAPIC + "test.txt", PICKAPIC_TOO + "test.txt"),
    "parti": ("fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
              GITHUB + "google-research/parti/5a657978134374ce28973948331b319adef164bd/"
              "PartiPrompts.tsv"),
    "drawbench": ("3d4f4b2db7520208ee056d470202c07fd77766b96d133ea9f4ab00a323381e9a",
                  GITHUB + "openai/dalle3-eval-samples/d7c88c07b492ad7b9fd3003126d00719a2edabb1/"
                  "prompts/drawbench.txt"),
    "geneval": ("55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680",
                GITHUB + "djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/"
                "generation_prompts.txt"),
    "scenes": HERE / "lab" / "toy" / "captions_train.txt",
    "scenes-test": HERE / "lab" / "toy" / "captions_heldout.txt",
    "animals": [f"a {animal} {deed}" for animal in ANIMALS.split() for deed in DEEDS]}


def read_text(path):
    """A UTF-8 file, with or without a byte order mark. UserError names the first wrong byte."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start} is 0x{e.object[e.start]:02x}); "
                        "save it as UTF-8") from e


def lines_of(text):
    """Numbered lines that end at \\n, \\r\\n or \\r alone: U+2028, U+0085, \\v, \\f are text."""
    lines = enumerate(re.split("\r\n|\n|\r", text), 1)
    return [(n, line.strip()) for n, line in lines if line.strip()]


def load_prompts(spec):
    """A built-in name, or a file -> list of prompts. A .txt, .prompts, or one without an ending: a
    prompt a line; .jsonl, .ndjson: an object a line; .json: an array; .csv, .tsv: a table with a
    header. Objects and tables hold "prompt", "caption" or "text", in any case of letters."""
    source = PROMPTS.get(spec, spec)
    if isinstance(source, list):
        return source
    path = first_of(*source) if isinstance(source, tuple) else Path(source)
    if not path.exists() or path.is_dir():
        near = ", ".join(difflib.get_close_matches(str(spec), PROMPTS, 3, 0.5) or PROMPTS)
        raise UserError(f"prompts {str(spec)!r}: no such file, and no built-in name; did you mean "
                        f"{near}?")
    text = read_text(path)
    ending = path.suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        rows = [(n, json_value(path, n, line)) for n, line in lines_of(text)]
    elif ending == ".json":
        rows = json_value(path, 1, text)
        if not isinstance(rows, list):
            raise UserError(f"prompts {path}: expected a JSON array of texts, or of objects with "
                            '"prompt"')
        rows = list(enumerate(rows, 1))
    elif ending in (".csv", ".tsv"):
        rows = table_rows(path, text, "\t" if ending == ".tsv" else ",")
    elif ending in (".txt", ".prompts", ""):
        rows = lines_of(text)
    else:
        raise UserError(f"prompts {path}: {ending} is no list of prompts; expected .txt (a prompt "
                        "a line), .jsonl, .ndjson, .json, .csv or .tsv")
    prompts = [prompt_of(path, n, row) for n, row in rows]
    if not prompts:
        raise UserError(f"prompts {path}: empty; expected a prompt a line")
    return prompts


def first_of(sha256, *urls):
    """A file of the web that has several addresses."""
    for url in urls[:-1]:
        with contextlib.suppress(UserError):
            return fetch(url, sha256)
    return fetch(urls[-1], sha256)


def table_rows(path, text, delimiter):
    """A table with a header -> [(line, {column: cell})]. Nothing is cut or joined: UserError.

    In a .tsv quotes may be letters, as in PartiPrompts.tsv, where no line has an odd one."""
    odd = any(line.count('"') % 2 for _, line in lines_of(text))
    if delimiter == "\t" and not odd:
        with contextlib.suppress(UserError):
            return quoted_rows(path, text, delimiter, csv.QUOTE_MINIMAL)
        return quoted_rows(path, text, delimiter, csv.QUOTE_NONE)
    return quoted_rows(path, text, delimiter, csv.QUOTE_MINIMAL)


def quoted_rows(path, text, delimiter, quoting):
    """`table_rows` for one way of quoting."""
    file = io.StringIO(text, newline="")
    reader = csv.reader(file, delimiter=delimiter, strict=True, quoting=quoting)
    rows = []
    try:
        header = [name.strip() for name in next(reader, [])]
        for row in reader:
            if len(row) > len(header):
                raise csv.Error(f"{len(row)} cells under {len(header)} columns; quote a cell that "
                                "holds the separator")
            if row:
                rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: no table ({e})") from e
    return rows


def prompt_of(path, n, row):
    """A row of a prompt file, text or an object -> its prompt."""
    if isinstance(row, dict):
        row = {str(key).lower(): value for key, value in row.items()}
        row = next((row[key] for key in ("prompt", "caption", "text") if row.get(key)), None)
    if not isinstance(row, str) or not row.strip():
        raise UserError(f"{path}, entry {n}: expected text, or an object or column "
                        '"prompt", "caption" or "text"')
    try:
        row.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{path}, entry {n}: half of a surrogate pair ({row[e.start]!a})") from e
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
            raise UserError(f'{path}, line {n}: expected an object with "prompt": text, '
                            '"chosen": a list of files, "rejected": a list of files')
        prompt = prompt_of(path, n, {"prompt": row.get("prompt")})
        chosen, rejected = ([home / str(file) for file in side] for side in sides)
        for file in chosen + rejected:
            if not file.resolve().is_relative_to(home):
                raise UserError(f"{path}, line {n}: {file} lies outside {home}; put the pictures "
                                "beside the list")
            read_picture(file)
        pairs.append((prompt, chosen, rejected))
    if not pairs:
        raise UserError(f"pairs {path}: empty; expected a line a prompt")
    return pairs


def read_picture(source, formats=None):
    """A picture file, or one open in memory -> PIL RGB as people see it: turned as EXIF says,
    16-bit grey scaled, alpha on white, the first frame. UserError names the file."""
    try:
        image = Image.open(source, formats=formats)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, dtype=np.float64)
            top = 65535 if image.mode.startswith("I") else 1 if values.max() <= 1 else 255
            values = values.clip(0, top) * (255 / top)
            image = Image.fromarray(values.round().astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as e:  # truncated, too large for Pillow, no picture at all
        name = getattr(source, "name", source)
        raise UserError(f"{name}: not a readable picture ({one_line(e)})") from e


def load_pictures(files, side):
    """Files of n pictures -> (n, 3, side, side) in [0, 1]: the middle square, resized."""
    pictures = []
    for file in files:
        square = ImageOps.fit(read_picture(file), (side, side), Image.Resampling.BICUBIC)
        pictures.append(as_tensor(square))
    return torch.stack(pictures)


def as_tensor(image):
    """PIL image -> (3, H, W) in [0, 1]; a tensor stays as it is."""
    if isinstance(image, torch.Tensor):
        return image.float()
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_pil(images):
    """float (B, 3, H, W) in [0, 1] -> list of B PIL images, round(255 x)."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


# ===== the names, and the command line

REWARDS = {
    "pickscore": pickscore, "clip": clip, "aesthetic": aesthetic, "hpsv2": hpsv2,
    "imagereward": imagereward, "hpsv3": hpsv3, "geneval": geneval, "jpeg": no_files(jpeg),
    "incompressibility": no_files(incompressibility), "scene": scene, "vlm": vlm}


def table():
    """Names, sizes, licences, models and scales as aligned lines, off the factories' docstrings."""
    lines = []
    for name, factory in REWARDS.items():
        doc = inspect.getdoc(factory)
        facts = dict(re.findall(r"^(\w+) +(.*(?:\n {9}.*)*)$", doc, re.MULTILINE))
        facts = {key: " ".join(text.split()) for key, text in facts.items()}
        lines.append("{:16} {size}; {scale}; licence: {licence}".format(name, **facts))
        lines.append(f"{'':16} model: {facts['model']}; compared with {facts['compared']}")
    lines.append("Compared with random weights of the true size, but the real aesthetic head.")
    lines.append("also: file.py:name, package.module:name, http://host:port; NAME@path: a copy")
    lines.append(f"prompts: {', '.join(PROMPTS)}, or a file")
    return "\n".join(lines)


def score_files(args):
    """Print the scores of picture files, a line each."""
    images = [read_picture(path) for path in args.images]
    reward = load(args.name, args.device)
    scores = reward.score(images, [args.prompt] * len(images))
    columns = dict(scores)
    if len(scores) > 1:
        columns["combined"] = reward.combine(scores)
    print("\t".join([*columns, "file"]))
    for path, *row in zip(args.images, *columns.values()):
        print("\t".join([f"{value:.6g}" for value in row] + [path]))


def serve(args):
    """Serve a reward until interrupted."""
    reward = load(args.name, args.device)
    bound = server(reward, args.host, args.port, os.environ.get("REWARD_TOKEN"))
    print(f"serving {args.name} at http://{args.host}:{bound.server_port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        bound.serve_forever()
    bound.server_close()


def main(argv=None):
    """The command line: what the user can mend ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Score pictures, list the rewards, or serve one.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the rewards by name, with size, licence and scale")
    one = commands.add_parser("score", help="score picture files")
    one.add_argument("--prompt", required=True)
    one.add_argument("name")
    one.add_argument("images", nargs="+")
    other = commands.add_parser("serve", help="serve a reward over HTTP, guarded by REWARD_TOKEN")
    other.add_argument("name")
    other.add_argument("--port", type=int, default=8000)
    other.add_argument("--host", default="127.0.0.1")
    for command in (one, other):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.command == "list":
            print(table())
        elif args.command == "score":
            score_files(args)
        else:
            serve(args)


if __name__ == "__main__":
    sys.modules["rewards"] = sys.modules["__main__"]  # lab's rewards import this very module
    main()
