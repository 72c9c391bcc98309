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
    vlm@http://host:8000/v1?model=m  an OpenAI-compatible judge (see lab/judge.py)
The weight is what follows the last `=`; in the query of a URL the first `=` of a pair is the pair's
own: `vlm@http://host/v1?model=m=0.5` has weight 0.5. Names hold no comma.

All pictures of a prompt come in one call, so a reward may compare them. Optional attributes of a
reward: `batch_size` (at most so many pictures a call, if it cannot take more);
`score_tensor(images, prompts)`, which takes the pictures as a float tensor (B, 3, H, W) in [0, 1];
`run_folder`, set to the run's folder before the first call; and, where right and wrong can be
told, `correct(images, prompts)` -> list of bool (None: not judged) and `tag(prompt)` -> its task.
What a reward does to its input, to torch's global settings or to the working directory, no other
sees.

    python rewards.py list
    python rewards.py score NAME --prompt "a red cube" image.png ...
    python rewards.py serve NAME [--port 8000] [--host 127.0.0.1]

Environment: REWARD_TOKEN (of served rewards, both ends), VLM_TOKEN or OPENAI_API_KEY (the judge's),
REWARD_PATIENCE (seconds that a client goes on trying, 600), REWARD_TIMEOUT (for an answer, 300).
"""
import argparse
import base64
import contextlib
import csv
import difflib
import functools
import hashlib
import http.client
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
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
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
            return factory_of(known)(device, path or None)
    source, _, attribute = name.rpartition(":")
    if source and attribute.isidentifier():
        return user_reward(name)
    if name.endswith(".py"):
        raise UserError(f"reward {name!r}: name what it holds, {name}:function")
    pick("reward", known, REWARDS, "for all: python rewards.py list")  # it is none: UserError


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


GLOBALS = [  # (read, set) of what a reward could change for everybody
    (os.getcwd, os.chdir), (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_device, torch.set_default_device)]
GLOBALS += [(functools.partial(torch.is_autocast_enabled, kind),
             functools.partial(torch.set_autocast_enabled, kind)) for kind in ("cpu", "cuda")]


@contextlib.contextmanager
def world_kept():
    """Puts back those of `GLOBALS` that the code inside changes."""
    before = [read() for read, _ in GLOBALS]
    try:
        yield
    finally:
        for (read, put), value in zip(GLOBALS, before):
            if read() != value:
                put(value)


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
        if not isinstance(values, (list, tuple)):
            raise ValueError(type(values).__name__)
        if len(values) != len(images):
            raise ValueError(f"{len(values)} scores for {len(images)} images")
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
    """What choose(names) picks of a repository -> folder; offline, what an earlier start did."""
    import huggingface_hub as hub
    import huggingface_hub.errors  # noqa: F401
    try:
        info = hub.HfApi().model_info(repo, files_metadata=True)
    except (hub.errors.RepositoryNotFoundError, hub.errors.GatedRepoError):
        raise
    except Exception:  # no network, HF_HUB_OFFLINE=1, a hub that is down
        with contextlib.suppress(Exception):
            return hub.snapshot_download(repo, local_files_only=True)
        raise
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    wanted = choose(list(sizes))
    if not wanted:
        raise FileNotFoundError("it holds none of the files that are needed")
    missing = [name for name in wanted
               if not isinstance(hub.try_to_load_from_cache(repo, name, revision=info.sha), str)]
    weights = [name for name in missing if name.endswith((".safetensors", ".bin", ".pt"))]
    if weights:
        size = sum(sizes.get(name, 0) for name in weights) / 1e9
        print(f"fetching {repo}, {size:.2g} GB, once", file=sys.stderr, flush=True)
    for name in wanted:
        path = Path(hub.hf_hub_download(repo, name))
    if weights:
        print(f"fetched {repo}", file=sys.stderr, flush=True)
    return str(path.parents[name.count("/")])


@contextlib.contextmanager
def fetching(name, files, repo, path):
    """`reading` of a reward's files: the line says where they come from."""
    source = path or f"https://huggingface.co/{repo}"
    with reading(f"reward {name!r}: {files} of {source}",
                 f"for a local copy give {name}@/path/to/folder"):
        if path and not Path(path).exists():
            raise FileNotFoundError("no such file or folder")
        yield


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
    wanted = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt",
              "config.json", "special_tokens_map.json")
    here = path and any((Path(path) / name).exists() for name in wanted[:4])
    source = path if here else from_hub(repo, lambda names: [n for n in names if n in wanted])
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return lambda texts: tokenizer(texts, padding="max_length", truncation=True,
                                   max_length=max_length, return_tensors="pt")


# may be missing or left over: buffers of old files, a last norm that transformers 5.9 gave Swin
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


def takes_tensors(score, batch_size):
    """Marks a function that takes PIL images and tensors alike."""
    score.score_tensor = score
    score.batch_size = batch_size
    return score


# ===== rewards that need no model

def no_files(reward):
    """A reward that needs neither device nor files -> its factory."""
    def factory(device="cpu", path=None):
        if path:
            raise UserError(f"reward {reward.__name__!r}: it takes no path")
        return reward

    factory.__doc__ = reward.__doc__
    return factory


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


@functools.lru_cache
def constants(channels, device):
    """Three numbers as (3,1,1) on the device; kept there, since sending them makes the GPU wait."""
    return torch.tensor(channels, device=device).view(3, 1, 1)


def clip_pixels(images, device, size=224, fit="floor"):
    """PIL images or float (B,3,H,W) in [0,1] -> float32 (B,3,size,size), normalised as CLIP does.

    fit "floor": the short side becomes `size` and the middle is cut out as in transformers;
    "round": as in torchvision (other by a pixel for some shapes, never for squares); "pad": the
    long side becomes `size`, the rest is black, as in HPSv2. A tensor goes through the arithmetic
    of PIL's bicubic filter: a picture scores the same before and after it is saved."""
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
    """PIL image or (B,3,H,W) in [0,1] -> (b,3,h,w), the long side `size`: float, not clamped."""
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
        if len(self.known) > 4096:
            self.known = {}
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        for i in range(0, len(new), 256):
            # what is pooled comes before the padding and looks back only: no mask is needed, which
            # would make the host wait for the GPU, as a copy that blocks does
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
        return None


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
    patience = seconds("REWARD_PATIENCE", 600)
    timeout = seconds("REWARD_TIMEOUT", 300)
    request = urllib.request.Request(url, json.dumps(payload).encode(), headers)
    opener = urllib.request.build_opener(NoRedirect)
    deadline = time.monotonic() + patience
    for attempt in itertools.count():
        pause = min(0.5 * 2 ** attempt, 10)
        try:
            with opener.open(request, timeout=timeout) as answer:
                text = answer.read()
            WAITING.discard(url)
            return json_answer(text, who)
        except urllib.error.HTTPError as refusal:
            text = refusal.read().decode(errors="replace")
            if 300 <= refusal.code < 400:
                text = f"a redirect to {refusal.headers.get('Location')}: give that address"
            again = refusal.code in (408, 409, 425, 429) or refusal.code >= 500
            if not again or "insufficient_quota" in text:
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


# ===== prompts, pairs and pictures: read as what they are, or refused by name

ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear
    raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake
    turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo"""
DEEDS = ("riding a bike", "playing chess", "washing dishes")
GITHUB = "https://raw.githubusercontent.com/"
PICKAPIC = GITHUB + "UGVly/DrPO/dd473d8fc28ffe4fb8d0440ad249164e21a23cb0/data/pickscore/"
PROMPTS = {  # Pick-a-Pic v2 prompts are written by users, partly explicit. (address, sha256)
    "pickapic": (PICKAPIC + "train.txt",
                 "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f"),
    "pickapic-test": (PICKAPIC + "test.txt",
                      "d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262"),
    "parti": (GITHUB + "google-research/parti/5a657978134374ce28973948331b319adef164bd/"
              "PartiPrompts.tsv",
              "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb"),
    "drawbench": (GITHUB + "openai/dalle3-eval-samples/d7c88c07b492ad7b9fd3003126d00719a2edabb1/"
                  "prompts/drawbench.txt",
                  "3d4f4b2db7520208ee056d470202c07fd77766b96d133ea9f4ab00a323381e9a"),
    "geneval": (GITHUB + "djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/"
                "generation_prompts.txt",
                "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"),
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
    path = fetch(*source) if isinstance(source, tuple) else Path(source)
    if not path.exists() or path.is_dir():
        pick("prompts", str(spec), PROMPTS, "no such file either")  # a UserError
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

# name: factory(device, path) -> reward, or where lab/ has it
REWARDS = {
    "pickscore": pickscore, "clip": clip, "aesthetic": "aesthetic.py:aesthetic",
    "hpsv2": "hps.py:hpsv2", "imagereward": "imagereward.py:imagereward", "hpsv3": "hps.py:hpsv3",
    "geneval": "geneval.py:geneval", "jpeg": no_files(jpeg),
    "incompressibility": no_files(incompressibility), "scene": "scene.py:checker",
    "vlm": "judge.py:vlm"}


def factory_of(name):
    """A name of REWARDS -> its factory; a file of lab/ is imported when it is asked for."""
    factory = REWARDS[name]
    return factory if callable(factory) else imported("reward", f"{HERE}/lab/{factory}")


def table():
    """Names, sizes, licences, models and scales as aligned lines, off the factories' docstrings."""
    lines = []
    for name in REWARDS:
        try:
            doc = inspect.getdoc(factory_of(name))
        except UserError as error:  # rewards.py without lab/
            lines.append(f"{name:16} not here: {error}")
            continue
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
            imported("program", f"{HERE}/lab/serve.py:serve")(load(args.name, args.device), args)


if __name__ == "__main__":
    sys.modules["rewards"] = sys.modules["__main__"]  # lab's rewards import this very module
    main()
