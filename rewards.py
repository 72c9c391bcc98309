"""Rewards: any black box that can score a picture.

Drifting Preference Optimization only RANKS the candidates of a prompt, so a reward may be a model, a program, a
server, a judge or a person. The whole contract is one call:

    reward(images: list[PIL.Image], prompts: list[str]) -> one float an image, higher is better, NaN = no opinion

    reward = load("pickscore=1,aesthetic=0.5", device="cuda")
    reward(images, prompts)          float32 (B,), what the candidates are ranked by
    reward.score(images, prompts)    {"pickscore": float32 (B,), "aesthetic": float32 (B,)}, native scales

A spec is `name[=weight],name[=weight],...` where a name is one of
    pickscore                        a name from REWARDS (`python rewards.py list`)
    pickscore@/path/to/copy          the same with its files read from a folder (its docstring says which files)
    my_file.py:function              a function(images, prompts), or a class that is instantiated without arguments
    package.module:name              the same from an importable module
    http://127.0.0.1:8000            a reward served by `python rewards.py serve NAME`, here or on another machine
    vlm@http://host:8000/v1?model=m  an OpenAI-compatible judge
The weight is what follows the last `=`; in the query of a URL the first `=` of a pair is the pair's own, so
`vlm@http://host/v1?model=m=0.5` has weight 0.5. Names hold no comma.

Optional attributes of a reward callable: `batch_size` (at most so many pictures a call);
`score_tensor(images, prompts)`, which takes the pictures as a float tensor (B,3,H,W) in [0,1] and saves the round trip
through PIL; and, where right and wrong can be told, `correct(images, prompts)` -> list of bool (None: not judged) and
`tag(prompt)` -> its task.

    python rewards.py score NAME --prompt "a red cube" image.png ...
    python rewards.py list
    python rewards.py serve NAME [--port 8000] [--host 127.0.0.1]

Environment: REWARD_TOKEN (bearer token of served rewards, both ends), REWARD_PATIENCE (seconds that a client goes on
trying, 600), REWARD_TIMEOUT (seconds for one answer, 300), VLM_TOKEN or OPENAI_API_KEY (bearer token of the judge).
"""

import argparse, base64, binascii, difflib, hashlib, hmac, http.client, importlib.util, inspect, io, itertools, json
import math, numbers, os, queue, re, sys, tempfile, threading, time, urllib.error, urllib.parse, urllib.request, zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""


def one_line(error):
    """An exception as `Type: text` on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# ---------------------------------------------------------------------------------------------------------------------
# loading, checking, combining

def load(spec, device="cpu"):
    """A spec (see the top of the file) -> Reward. UserError: unknown name, bad weight, files that cannot be had."""
    weights = parse(spec)
    return Reward(spec, {name: build(name, device) for name in weights}, weights)


def parse(spec):
    """`name[=weight],...` -> {name: weight}, weights finite floats, 1.0 where none is given."""
    weights = {}
    for item in str(spec).split(","):
        name, weight = item.strip(), "1"
        last_pair = re.search(r"\?(?:.*&)?(.*)", name)
        if name.count("=") and (last_pair is None or last_pair[1].count("=") > 1):
            name, _, weight = (text.strip() for text in name.rpartition("="))
        if not name:
            raise UserError(f"reward {spec!r}: an item without a name; write name[=weight],name[=weight]")
        if name in weights:
            raise UserError(f"reward {spec!r}: {name!r} is named twice")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise UserError(f"reward {spec!r}: the weight {weight!r} of {name!r} is not a number") from None
        if not math.isfinite(weights[name]):
            raise UserError(f"reward {spec!r}: the weight {weight!r} of {name!r} is not finite")
    return weights


def build(name, device="cpu"):
    """One name of a spec -> its callable. UserError with the nearest names if it is none of the known forms."""
    if name.startswith(("http://", "https://")):
        return Http(name)
    known, _, path = name.partition("@")
    if known in REWARDS:
        return REWARDS[known](device, path or None)
    source, _, attribute = name.rpartition(":")
    if source and attribute.isidentifier():
        return user_reward(name, source, attribute)
    near = difflib.get_close_matches(known, REWARDS, n=3, cutoff=0.5)
    hint = f"name what it holds, {name}:function" if name.endswith(".py") else "for all names: python rewards.py list"
    raise UserError(f"unknown reward {name!r}{'; nearest: ' + ', '.join(near) if near else ''}; {hint}")


def user_reward(name, source, attribute):
    """`file.py:attribute` or `module:attribute` -> a callable of (images, prompts); a class is instantiated."""
    try:
        if source.endswith(".py"):
            path = Path(source).resolve()
            sys.path.append(str(path.parent))  # so that the file may import its neighbours
            spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        reward = getattr(module, attribute)
        reward = reward() if inspect.isclass(reward) else reward
    except Exception as error:
        raise UserError(f"reward {name!r}: {one_line(error)}") from error
    try:
        inspect.signature(reward).bind("images", "prompts")
    except TypeError as error:
        raise UserError(f"reward {name!r}: it must be callable as f(images, prompts); {error}") from error
    except ValueError:  # a compiled function that tells no signature
        pass
    return reward


class Reward:
    """One or several rewards behind one call, every answer checked.

    name: the spec. parts: {name: callable}. weights: {name: float}.
    """

    def __init__(self, name, parts, weights):
        self.name, self.parts, self.weights = name, parts, weights

    def __call__(self, images, prompts):
        """images, prompts as in `score` -> float32 (B,): `combine` over the candidates that share a prompt."""
        scores, combined = self.score(images, prompts), torch.empty(len(prompts))
        for prompt in dict.fromkeys(prompts):
            group = torch.tensor([i for i, other in enumerate(prompts) if other == prompt])
            combined[group] = self.combine({name: values[group] for name, values in scores.items()})
        return combined

    def score(self, images, prompts):
        """images: list of B PIL images, or a float tensor (B,3,H,W) in [0,1] on any device; prompts: list of B strings
        -> {part: float32 CPU tensor (B,)}, native scales. UserError: a part raised, or did not give B real numbers."""
        if len(images) != len(prompts):
            raise UserError(f"reward {self.name!r}: {len(images)} images but {len(prompts)} prompts")
        pictures, scores = images, {}
        if isinstance(images, torch.Tensor):
            if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
                raise UserError(f"reward {self.name!r}: a tensor of pictures is float (B,3,H,W) in [0,1], "
                                f"not {images.dtype} {tuple(images.shape)}")
            if not all(hasattr(part, "score_tensor") for part in self.parts.values()):
                pictures = to_pil(images)
        for name, part in self.parts.items():
            call = getattr(part, "score_tensor", None) if isinstance(images, torch.Tensor) else None
            batch, call = (images, call) if call else (pictures, part)
            size = getattr(part, "batch_size", None) or max(len(prompts), 1)
            chunks = [checked(name, call, batch[i:i + size], prompts[i:i + size])
                      for i in range(0, len(prompts), size)]
            scores[name] = torch.cat(chunks) if chunks else torch.empty(0)
        return scores

    def combine(self, scores):
        """{part: (..., K)}, the K candidates of one prompt last -> (..., K).

        One part: weight * score. Several: sum of weight * (score - mean) / std over the K candidates (population std);
        a part that finds all candidates equal adds 0. A NaN in a part stands for that part's mean, so it adds 0 to its
        candidate; a candidate on which every part is NaN stays NaN.
        """
        if len(scores) == 1:
            (name, values), = scores.items()
            return values * self.weights[name]
        total = sum(self.weights[name] * z_score(values) for name, values in scores.items())
        silent = torch.stack([values.isnan() for values in scores.values()]).all(0)
        return total.masked_fill(silent, math.nan).float()


def z_score(values):
    """(..., K) -> float64 (..., K): (values - mean) / std over the last dimension, 0 at NaN and where all are equal."""
    values, known = values.double(), ~values.isnan()
    count = known.sum(-1, keepdim=True).clamp(min=1)
    offset = torch.where(known, values - values.nansum(-1, keepdim=True) / count, 0)
    std = (offset.square().sum(-1, keepdim=True) / count).sqrt()
    # equality is asked of the values: the rounding of their mean would leave a std of 1e-17, and z-scores of 1
    low = values.masked_fill(~known, math.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~known, -math.inf).amax(-1, keepdim=True)
    return torch.where(high > low, offset / std, 0)


def checked(name, call, images, prompts):
    """call(images, prompts), which must give len(images) real numbers or NaN -> float32 CPU tensor (B,)."""
    try:
        values = call(images, prompts)
    except (UserError, torch.OutOfMemoryError):  # the caller may know a smaller batch
        raise
    except Exception as error:
        raise UserError(f"reward {name!r}: {one_line(error)}") from error
    says = f"reward {name!r}: returned"
    rule = "a reward returns one float an image"
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.numpy() if values.dtype != torch.bfloat16 else values.float().numpy()
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise UserError(f"{says} an array of shape {tuple(values.shape)} for {len(images)} images; {rule}")
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{says} {type(values).__name__}; {rule}")
    if len(values) != len(images):
        raise UserError(f"{says} {len(values)} scores for {len(images)} images; {rule}")
    values = [v.item() if isinstance(v, (torch.Tensor, np.ndarray)) and v.ndim == 0 else v for v in values]
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            shown = " ".join(repr(value).split())[:40]
            raise UserError(f"{says} {shown} ({type(value).__name__}) for image {i}; {rule}, NaN = no opinion")
    scores = torch.tensor([float(value) for value in values], dtype=torch.float64).float()
    if scores.isinf().any():
        i = scores.isinf().nonzero()[0].item()
        raise UserError(f"{says} {values[i]} for image {i}; a score is finite, or NaN for no opinion")
    return scores


def to_pil(images):
    """float (B,3,H,W) in [0,1] -> list of B PIL images, round(255 x)."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


# ---------------------------------------------------------------------------------------------------------------------
# in training: chunk by chunk, in time

class Scorer:
    """Collects the scores of a step, chunk by chunk: of the reward that ranks and of the watched ones."""

    def __init__(self, reward, watched, timeout):
        self.reward, self.watched, self.timeout, self.watching = reward, watched, timeout, False
        self.reset()

    def reset(self):
        """Forget the step in hand."""
        self.chunks, self.parts, self.watch = {}, {}, {}

    def __call__(self, images, prompts):
        """Score images (B,3,H,W) in [0,1] of B prompts."""
        for reward, kept in [(self.reward, self.chunks)] + [(w, self.watch) for w in self.watched if self.watching]:
            for name, scores in in_time(lambda: reward.score(images, prompts), self.timeout, reward.name).items():
                kept.setdefault(name, []).append(scores)

    def finish(self, P, K):
        """The scores that rank, (P, K), of the chunks since the last call: P prompts of K candidates each."""
        scores = {name: torch.cat(chunks).reshape(P, K) for name, chunks in self.chunks.items()}
        for name, values in scores.items():
            self.parts.setdefault(name, []).append(values.flatten())
        self.chunks = {}
        return self.reward.combine(scores)

    def logged(self):
        """Means of the parts of a combined reward and of the watched rewards, {name: float}; ends the step."""
        parts = self.parts if len(self.parts) > 1 else {}
        kept = {f"part/{k}": v for k, v in parts.items()} | {f"watch/{k}": v for k, v in self.watch.items()}
        means = {k: float(torch.cat(v).double().nanmean()) for k, v in kept.items()}
        self.reset()
        return means


class Worker(threading.Thread):
    """A thread that runs one call after the other. It is kept between them: the attention plans of cuDNN belong to a
    thread, and making them anew costs some 50 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.tasks = queue.SimpleQueue()
        self.start()

    def run(self):
        while True:
            self.answer(*self.tasks.get())  # a method of its own: nothing of a call stays in memory after it

    def answer(self, call, device, answers):
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a thread begins on GPU 0
            with torch.no_grad():
                answers.put((call(), None))
        except BaseException as e:
            answers.put((None, e))


worker = None


def in_time(call, seconds, name):
    """call(), in a thread beside, so that a reward that hangs can be given up."""
    global worker
    if worker is None or not worker.is_alive():  # a process that was forked has no threads
        worker = Worker()
    answers = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    worker.tasks.put((call, device, answers))
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        worker = None  # it hangs: the next call gets another
        raise UserError(f"reward {name!r}: no answer within {seconds:g} s (--reward-timeout)") from None
    if error:
        raise error
    return value


# ---------------------------------------------------------------------------------------------------------------------
# files: from the hub, or from a local copy

def pick(kind, name, options, also=""):
    """options[name] (name itself where the options are a tuple), or one clear line with the nearest names."""
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


def write_atomic(path, data, keep=None):
    """Bytes beside `path`, then renamed: a reader never sees half a file, a full disk spoils nothing. What was there
    before stays as `keep`."""
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
    """Turns whatever goes wrong while `files` are loaded into one UserError that says where they come from."""
    source = path or f"https://huggingface.co/{repo}"
    try:
        if path and not Path(path).exists():
            raise FileNotFoundError("no such file or folder")
        yield
    except Exception as error:
        raise UserError(f"reward {name!r}: cannot load {files} from {source} ({one_line(error)}); "
                        f"for a local copy give {name}@/path/to/folder") from error


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


def frozen(cls, source, **options):
    """cls.from_pretrained(source) in float32 on the CPU, in eval mode. `source` is None when the options bring config
    and state_dict. A weight that the source lacks is an error, never random."""
    model, report = cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    if report["missing_keys"]:
        raise ValueError(f"{len(report['missing_keys'])} weights missing, {sorted(report['missing_keys'])[0]} first")
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
    score.score_tensor, score.batch_size = score, batch_size
    return score


# ---------------------------------------------------------------------------------------------------------------------
# prompts, and pairs that somebody judged beforehand

ANIMALS = """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle
    ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey
    fly llama camel bat gorilla hedgehog kangaroo"""
TOY = Path(__file__).resolve().parent / "toy"
PICKAPIC = "https://raw.githubusercontent.com/UGVly/DrPO/dd473d8fc28ffe4fb8d0440ad249164e21a23cb0/data/pickscore/"
PROMPTS = {  # Pick-a-Pic v2 prompts are written by users, partly explicit
    "pickapic": (PICKAPIC + "train.txt", "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f"),
    "pickapic-test": (PICKAPIC + "test.txt", "d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262"),
    "scenes": TOY / "captions_train.txt", "scenes-test": TOY / "captions_heldout.txt",
    "animals": [f"a {a} {b}" for a in ANIMALS.split() for b in ("riding a bike", "playing chess", "washing dishes")],
}


def load_prompts(spec):
    """A built-in name, a text file (a prompt a line) or a .jsonl with "prompt" -> list of prompts."""
    source = PROMPTS.get(spec, spec)
    if isinstance(source, list):
        return source
    path = fetch(*source) if isinstance(source, tuple) else Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(str(spec), PROMPTS, 3, 0.5) or PROMPTS
        raise UserError(f"prompts {str(spec)!r}: no such file, and no built-in name; did you mean {', '.join(near)}?")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        raise UserError(f"prompts {path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from e
    if path.suffix == ".jsonl":
        lines = [json_line(path, n, line, prompt=str)["prompt"] for n, line in enumerate(lines, 1) if line]
    if not any(lines):
        raise UserError(f"prompts {path}: empty; expected a prompt a line")
    return [line for line in lines if line]


def json_line(path, n, line, **kinds):
    """One line of a .jsonl -> dict that has these keys, of these types, none empty."""
    try:
        row = json.loads(line)
        assert all(isinstance(row[k], kind) and row[k] for k, kind in kinds.items())
        return row
    except (ValueError, KeyError, TypeError, AssertionError):
        want = ", ".join(f'"{k}": {"a list of files" if kind is list else "text"}' for k, kind in kinds.items())
        raise UserError(f"{path}, line {n}: expected a JSON object with {want}") from None


def load_pairs(path, anywhere=False):
    """Offline pairs -> list of (prompt, [chosen files], [rejected files]), all in the folder of the .jsonl."""
    path, out = Path(path), []
    if not path.is_file():
        raise UserError(f"pairs {path}: no such file; expected a .jsonl with prompt, chosen, rejected")
    home = path.resolve().parent
    for n, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            row = json_line(path, n, line, prompt=str, chosen=list, rejected=list)
            chosen, rejected = ([home / str(f) for f in row[side]] for side in ("chosen", "rejected"))
            for file in chosen + rejected:
                if not anywhere and not file.resolve().is_relative_to(home):
                    raise UserError(f"{path}, line {n}: {file} lies outside {home} (--pairs-anywhere allows it)")
                if not file.is_file():
                    raise UserError(f"{path}, line {n}: {file} is missing")
            out.append((row["prompt"], chosen, rejected))
    if not out:
        raise UserError(f"pairs {path}: empty; expected a line a prompt")
    return out


def load_pictures(files, side):
    """Files of n pictures, resized to side x side -> (n,3,side,side) in [0,1]."""
    try:
        return torch.stack([as_tensor(Image.open(f).convert("RGB").resize((side, side), Image.BICUBIC)) for f in files])
    except OSError as e:
        raise UserError(f"pairs: {e}") from e


# ---------------------------------------------------------------------------------------------------------------------
# rewards that need no model

def no_files(reward):
    """The factory of a reward that needs neither device nor files."""
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
    """
    return [-size for size in incompressibility(images, prompts)]


SCENE_COLORS = {"red": (222, 62, 62), "yellow": (247, 192, 48), "green": (58, 166, 94),
                "blue": (50, 118, 216), "purple": (150, 82, 192), "black": (50, 54, 64)}
SCENE_SHAPES = ("circle", "square", "triangle")
_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
_SIDES = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_NOUN = rf"(?:({'|'.join(_COUNTS)}) )?(?:({'|'.join(SCENE_COLORS)}) )?({'|'.join(SCENE_SHAPES)})(?:s)?"
_CAPTION = re.compile(rf"(?:an? (?:photo|picture|drawing|image) of )?{_NOUN}(?: (and|{'|'.join(_SIDES)}) {_NOUN})?[.]?")


def _parse(prompt):
    """A caption -> (objects, side): a list of (shape, colour or None) and None or the unit vector from object 2 to
    object 1. None for a caption that is not of this small language."""
    match = _CAPTION.fullmatch(" ".join(prompt.lower().split()))
    if not match:
        return None
    count, color, shape, joint, count2, color2, shape2 = match.groups()
    objects = [(shape, color)] * _COUNTS[count or "a"]
    if joint:
        objects += [(shape2, color2)] * _COUNTS[count2 or "a"]
    side = _SIDES.get(joint)
    return None if side and len(objects) != 2 else (objects, side)


def _components(mask, least):
    """Connected regions (4 neighbours) of at least so many pixels of a boolean picture (H, W): a list of boolean
    pictures, largest first. Each row's and column's unbroken runs take their largest label until nothing changes."""
    def runs(m):
        edge = np.ones(m.shape, bool)
        edge[:, 1:] = m[:, 1:] != m[:, :-1]
        starts = np.flatnonzero(edge)
        return starts, np.diff(np.append(starts, m.size))

    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    along, down, before = runs(mask), runs(mask.T), None
    while before is None or not np.array_equal(before, labels):
        before = labels
        for starts, lengths in (along, down):  # transposed after each: columns are the rows of the transpose
            labels = np.repeat(np.maximum.reduceat(labels.ravel(), starts), lengths).reshape(labels.shape).T
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    order = np.argsort(-counts, kind="stable")
    return [labels == value for value in order[:np.count_nonzero(counts >= least)]]


def _shape(mask):
    """The shape of a region (H, W) and how well it fits, in [0, 1]: its overlap (intersection over union) with a
    circle, a square and an upright triangle drawn into its own bounding box."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    region = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = region.shape
    if not 0.6 < width / height < 1.67:
        return None, 0.0
    y, x = (np.arange(height)[:, None] + 0.5) / height * 2 - 1, (np.arange(width)[None] + 0.5) / width * 2 - 1
    ideals = (x ** 2 + y ** 2 <= 1.02, np.ones_like(region), np.abs(x) <= (y + 1) / 2 + 1 / width)
    fits = [(region & ideal).sum() / (region | ideal).sum() for ideal in ideals]
    best = int(np.argmax(fits))
    return SCENE_SHAPES[best], float(fits[best])


def _look(image):
    """A PIL picture -> (objects, readable). objects: a list of (shape, colour, x, y, size), x and y the centre and size
    the square root of the area, all as fractions of the picture. readable: every region on the plain background is one
    clean shape in one clean colour."""
    pixels = np.asarray(image.convert("RGB").resize((64, 64)) if image.size != (64, 64) else image.convert("RGB"))
    pixels = pixels.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = np.median(border, axis=0)
    palette = np.array(list(SCENE_COLORS.values()), np.float32)
    # How far each pixel has gone from the paper to each colour (0 to 1), and how far it lies beside that line.
    toward = palette - paper
    length = np.maximum((toward ** 2).sum(1), 1)
    along = (pixels - paper) @ toward.T / length
    far = np.linalg.norm(pixels - paper, axis=2)
    beside = np.sqrt(np.maximum(far[..., None] ** 2 - along ** 2 * length, 0))
    score = beside + 60 * np.abs(along - np.clip(along, 0, 1))
    name = score.argmin(2)
    cover = np.take_along_axis(along, name[..., None], 2)[..., 0]
    inked = (cover > 0.5) & (far > 40)
    objects, readable, stray = [], paper.min() > 190, int(inked.sum())
    for region in _components(inked, least=25):
        area = int(region.sum())
        stray -= area
        tint = np.median(pixels[region], axis=0)
        distance = np.linalg.norm(palette - tint, axis=1)
        color = int(distance.argmin())
        inner = region & np.roll(region, 1, 0) & np.roll(region, -1, 0) & np.roll(region, 1, 1) & np.roll(region, -1, 1)
        off = np.linalg.norm(pixels[inner] - palette[color], axis=1)  # away from the edge, where paper mixes in
        shape, fit = _shape(region)
        clean = distance[color] < 45 and (off > 60).mean() < 0.2 and fit > 0.8 if len(off) else False
        readable = readable and bool(clean)
        y, x = np.nonzero(region)
        objects.append((shape if fit > 0.8 else None, list(SCENE_COLORS)[color] if distance[color] < 60 else None,
                        float(x.mean() + 0.5) / 64, float(y.mean() + 0.5) / 64, area ** 0.5 / 64))
    near = np.pad(inked, 1)
    near = near[1:-1, 1:-1] | near[2:, 1:-1] | near[:-2, 1:-1] | near[1:-1, 2:] | near[1:-1, :-2]
    noisy = ((far > 40) & ~near).sum()  # ink that belongs to no region
    return objects, bool(readable and objects and len(objects) <= 6 and stray + noisy <= 20)


def _score(image, prompt):
    """The graded score of one picture: see scene."""
    parsed = _parse(prompt)
    if parsed is None:
        return float("nan")
    wanted, side = parsed
    objects, readable = _look(image)
    objects = objects[:6]
    longer = max(len(wanted), len(objects), 1)
    best = 0.0
    for order in itertools.permutations(range(len(objects)), min(len(wanted), len(objects))):
        pairs = [(want, objects[i]) for want, i in zip(wanted, order)]
        # Fewer objects than wanted: try which of the wanted ones they are.
        for chosen in ([pairs] if len(objects) >= len(wanted) else
                       [[(w, objects[i]) for w, i in zip(some, order)]
                        for some in itertools.combinations(wanted, len(objects))]):
            value = sum(0.5 * (shape == o[0]) + 0.5 * (shape == o[0] if color is None else color == o[1])
                        for (shape, color), o in chosen)
            value /= longer
            if side and len(chosen) == 2:
                dx, dy = chosen[0][1][2] - chosen[1][1][2], chosen[0][1][3] - chosen[1][1][3]
                ahead, across = dx * side[0] + dy * side[1], abs(dx * side[1]) + abs(dy * side[0])
                value = value * 0.5 + 0.5 * (ahead > max(across, 0.05))
            elif side:
                value *= 0.5
            best = max(best, value)
    return best if readable else 0.5 * best


def scene(images, prompts):
    """How well pictures of coloured shapes follow their captions, 0 to 1, and exactly 1 only where all is right.

    model    none: a program
    licence  none
    size     0
    scale    0 to 1; the toy's captions alone, every other one gives NaN

    A list of PIL pictures and one of captions -> a list of floats. The picture is split into regions by colour, each
    region gets a shape and a colour, and the best assignment of regions to the caption's objects counts: half for the
    shape and half for the colour of each, over the larger number of the two; then half for the side, if one is named.
    An unreadable picture (smears, specks, unknown colours, nothing at all) gets half of that at most. A caption
    outside the toy's language ("a red circle", "three blue squares", "a circle above a square") gives NaN: no opinion.
    """
    if len(images) != len(prompts):
        raise ValueError(f"scene: {len(images)} images but {len(prompts)} prompts")
    return [_score(image, prompt) for image, prompt in zip(images, prompts)]


def _tag(prompt):
    """The kind of a caption, by GenEval's names; None where scene has no opinion."""
    parsed = _parse(prompt)
    if parsed is None:
        return None
    objects, side = parsed
    colored = all(color for _, color in objects)
    if side:
        return "position"
    if len(objects) == 1:
        return "colors" if colored else "single_object"
    if len(set(objects)) == 1:
        return "counting"
    return "color_attr" if colored else "two_object"


scene.tag = _tag
scene.readable = lambda image: _look(image)[1]
scene.correct = lambda images, prompts: [score == 1 for score in scene(images, prompts)]


# ---------------------------------------------------------------------------------------------------------------------
# CLIP and its descendants

CLIP_L, PICKSCORE = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
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


def clip_pixels(images, device, size=224, whole=False):
    """list of PIL images or float (B,3,H,W) in [0,1] -> float32 (B,3,size,size), normalised as CLIP wants it.

    The short side is resized to `size` and the middle cut out; `whole` resizes the long side instead and pads with
    black. A tensor goes through the same arithmetic as PIL's bicubic filter, rounding between its two passes included,
    so that a picture scores the same before and after it is saved: where it shrinks, less than one value in a thousand
    differs, by one level of 255; where it is enlarged, less than one in a hundred, by at most two.
    """
    if isinstance(images, torch.Tensor):
        batches = [tensor_resize(images.to(device), size, whole)]
    else:
        batches = [pil_resize(image, size, whole) for image in images]
    squares = []
    for x in batches:
        left, top = int((size - x.shape[-1]) / 2), int((size - x.shape[-2]) / 2)  # negative: cuts
        squares.append(F.pad(x, (left, size - x.shape[-1] - left, top, size - x.shape[-2] - top)))
    mean, std = constants(CLIP_MEAN, device), constants(CLIP_STD, device)
    return (torch.cat(squares).to(device) / 255 - mean) / std


def resized(width, height, size, whole):
    """(width, height) after the short (whole: the long) side became `size`."""
    if whole:
        return round(width * size / max(width, height)), round(height * size / max(width, height))
    short = min(width, height)
    return int(size * width / short), int(size * height / short)


def pil_resize(image, size, whole):
    """PIL image -> float (1,3,h,w) with values 0..255."""
    small = image.convert("RGB").resize(resized(*image.size, size, whole), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float()


def tensor_resize(x, size, whole):
    """float (B,3,H,W) in [0,1] -> float (B,3,h,w) with values 0..255: PIL's bicubic filter, columns and then rows."""
    width, height = resized(x.shape[-1], x.shape[-2], size, whole)
    x = (x.float().clamp(0, 1) * 255).round()
    for shape in ((x.shape[-2], width), (height, width)):
        x = F.interpolate(x, size=shape, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    return x


class Clip:
    """A frozen CLIPModel and its tokenizer: unit embeddings of pictures and texts in float32.

    The embedding of each prompt is computed once and kept: all candidates of a prompt share it.
    """

    def __init__(self, model, tokenize, device, whole=False):
        self.tokenize, self.whole, self.known = tokenize, whole, {}
        self.size, self.scale = model.config.vision_config.image_size, model.logit_scale.float().exp().item()
        self.model = model.to(device, half_on(device))  # after the scale: in half precision it would be 0.2% off

    @torch.no_grad()
    def image(self, images):
        """list of PIL images or (B,3,H,W) in [0,1] -> (B,D)."""
        pixels = clip_pixels(images, self.model.device, self.size, self.whole).to(self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def text(self, texts):
        """list of B strings -> (B,D)."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if len(self.known) + len(new) > 4096:
            self.known, new = {}, list(dict.fromkeys(texts))
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


def clip_at(name, repo, device, path):
    """CLIP from a folder or the hub -> Clip."""
    from transformers import CLIPModel
    with fetching(name, "config.json, model.safetensors and the tokenizer", repo, path):
        return Clip(frozen(CLIPModel, path or repo), tokenizer_at(repo, path, 77), device)


def random_clip(device):
    """ViT-H-14 with random weights and a hash for a tokenizer: no download, the true cost, meaningless scores."""
    from transformers import CLIPConfig, CLIPModel
    config, default = CLIPConfig(**VIT_H), torch.get_default_dtype()
    begin, end, length = config.text_config.bos_token_id, config.text_config.eos_token_id, 77

    def tokenize(texts):
        rows = [[begin, *(zlib.crc32(word.encode()) % begin for word in text.split()[:length - 2])] for text in texts]
        return {"input_ids": torch.tensor([row + [end] * (length - len(row)) for row in rows])}
    gpus = [torch.device(device)] if torch.device(device).type == "cuda" else []
    try:
        torch.set_default_dtype(half_on(device))
        with torch.random.fork_rng(gpus), torch.device(device):  # made on the device: no copy of 2 GB
            torch.manual_seed(0)
            model = CLIPModel(config)
    finally:
        torch.set_default_dtype(default)
    return Clip(model.eval().requires_grad_(False), tokenize, device)


def pickscore(device="cpu", path=None):
    """Human preference between pictures of one prompt.

    model    yuvalkirstain/PickScore_v1 (CLIP ViT-H-14)
    licence  MIT (code)
    size     3.9 GB
    scale    exp(logit_scale) * cosine, 20 to 23: the scale is about 100, so these are papers' "PickScore x 100"
    source   Kirstain et al. 2023, arXiv 2305.01569
    path     a copy of the repository; `pickscore@random`: random weights of the true size, to measure time
    """
    model = random_clip(device) if path == "random" else clip_at("pickscore", PICKSCORE, device, path)
    return takes_tensors(lambda images, prompts: model.scale * model.cosine(images, prompts), 256)


def clip(device="cpu", path=None):
    """Agreement of picture and prompt.

    model    openai/clip-vit-large-patch14
    licence  MIT (code)
    size     1.7 GB
    scale    cosine, 0.2 to 0.3
    source   Radford et al. 2021, arXiv 2103.00020
    path     a copy of the repository
    """
    model = clip_at("clip", CLIP_L, device, path)
    return takes_tensors(lambda images, prompts: model.cosine(images, prompts), 256)


def aesthetic(device="cpu", path=None):
    """How much people like the picture; the prompt is ignored.

    model    aesthetic-model.pth of trl-lib/ddpo-aesthetic-predictor, on openai/clip-vit-large-patch14
    licence  Apache-2.0 (head), MIT (CLIP's code)
    size     1.7 GB
    scale    4 to 7 of 1 to 10
    source   LAION, github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth)
    path     the head's file (CLIP from the hub), or a folder with aesthetic-model.pth and a copy of the CLIP repository
    """
    repo, file = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
    with fetching("aesthetic", file, repo, path):
        weights = torch.load(repo_file(repo, file, path), map_location="cpu", weights_only=True)
        head = linear_head(weights, "", device)
    model = clip_at("aesthetic", CLIP_L, device, path if path and Path(path).is_dir() else None)
    return takes_tensors(torch.no_grad()(lambda images, prompts: head(model.image(images))), 256)


def hpsv2(device="cpu", path=None):
    """Human preference, version 2.1; pictures that are not square are padded with black.

    model    HPS_v2.1_compressed.pt of xswu/HPSv2 (CLIP ViT-H-14), tokenizer of yuvalkirstain/PickScore_v1
    licence  Apache-2.0
    size     2.0 GB
    scale    cosine, 0.25 to 0.31
    source   Wu et al. 2023, arXiv 2306.09341
    path     the .pt file, or a folder with it and, to stay off the hub, the files of any CLIP tokenizer
    """
    from transformers import CLIPConfig, CLIPModel
    repo, file = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
    with fetching("hpsv2", file, repo, path):
        weights = torch.load(repo_file(repo, file, path), map_location="cpu", weights_only=True)["state_dict"]
        model = frozen(CLIPModel, None, config=CLIPConfig(**VIT_H), state_dict=from_open_clip(weights))
    with fetching("hpsv2", "the tokenizer", PICKSCORE, None):
        model = Clip(model, tokenizer_at(PICKSCORE, path, 77), device, whole=True)
    return takes_tensors(lambda images, prompts: model.cosine(images, prompts), 256)


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


# ---------------------------------------------------------------------------------------------------------------------
# ImageReward

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
        pixels = clip_pixels(images, device, vision.config.image_size).to(vision.dtype)
        patches = vision(pixel_values=pixels).last_hidden_state  # (B, 1 + patches, D)
        tokens = tokenize(list(prompts)).to(device)
        read = text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=patches)
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
    text = frozen(BlipTextModel, None, config=BlipTextConfig(**BLIP_TEXT), state_dict=read, add_pooling_layer=False)
    return vision.to(device, half_on(device)), text.to(device, half_on(device))


def hpsv3(device="cpu", path=None):
    """Human preference, version 3, through its authors' package.

    model    MizzenAI/HPSv3 (Qwen2-VL-7B), loaded by the package hpsv3 of PyPI
    licence  see the package
    size     16.6 GB
    scale    mean of the predicted preference, in the package's own unit
    source   Ma et al. 2025, arXiv 2508.03789
    path     the package's checkpoint file. The package pins old libraries: install it in an environment of its own, run
             `python rewards.py serve hpsv3` there and use `--reward http://127.0.0.1:8000` here
    """
    try:
        from hpsv3 import HPSv3RewardInferencer
    except ImportError as error:
        raise UserError(f"reward 'hpsv3': its package cannot be imported ({one_line(error)}); in an environment of its "
                        "own: pip install hpsv3, python rewards.py serve hpsv3; then here http://HOST:8000") from None
    model = HPSv3RewardInferencer(device=str(device), **({"checkpoint_path": path} if path else {}))

    def score(images, prompts):
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, f"{i}.png") for i in range(len(images))]
            for image, file in zip(images, paths):
                image.convert("RGB").save(file)
            return [float(mu_and_sigma[0]) for mu_and_sigma in model.reward(prompts=list(prompts), image_paths=paths)]
    score.batch_size = 8
    return score


# ---------------------------------------------------------------------------------------------------------------------
# GenEval: does the picture hold the objects that the prompt asks for, in number, colour and place?

COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", ")
COLOURS = "red orange yellow green blue purple pink brown black white".split()
COLOUR_TEXTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GENEVAL_PROMPTS = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"


class Found(NamedTuple):
    """One detected object: box (x0, y0, x1, y1) in pixels, its score, and its mask (H,W) or None."""
    box: tuple
    score: float
    mask: torch.Tensor = None


def confident(objects, tag):
    """{class: [Found]} -> the same, best first, without those at or below the threshold (0.9 when the prompt counts,
    else 0.3), and at most 16 of a class."""
    threshold = 0.9 if tag == "counting" else 0.3
    return {name: sorted((f for f in found if f.score > threshold), key=lambda f: -f.score)[:16]
            for name, found in objects.items()}


def relative_position(a, b):
    """Boxes a, b -> where a lies as seen from b: a subset of {"left of", "right of", "above", "below"}.

    Centres nearer than a tenth of the summed sizes do not count as apart; a direction counts when it makes up more than
    half of the distance between the centres.
    """
    a, b = np.array(a, float).reshape(2, 2), np.array(b, float).reshape(2, 2)
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
    terms, groups = [], []
    for clause in wanted.get("include", []):
        name, count = clause["class"], clause["count"]
        found, first = objects.get(name, [])[:count], len(terms)
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
    index, probability = index[probability > floor], probability[probability > floor]  # the mask factor is at most 1
    objects = {}
    for p, i in zip(probability.tolist(), index.tolist()):
        query, name = divmod(i, len(COCO))
        logits = F.interpolate(mask_logits[None, None, query], size=padded, mode="bilinear")
        logits = F.interpolate(logits[..., :inside[0], :inside[1]], size=size, mode="bilinear")[0, 0]
        mask = logits > 0
        if not mask.any():
            continue
        score = p * logits[mask].sigmoid().mean().item()
        y, x = mask.any(1).nonzero(), mask.any(0).nonzero()
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
        self.trunk, self.device = frozen(Trunk, source).to(device), device
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
        self.detect, self.clip, self.metadata, self.device = detect, clip, metadata, device
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


def as_tensor(image):
    """PIL image -> (3,H,W) in [0,1]; a tensor stays as it is."""
    if isinstance(image, torch.Tensor):
        return image.float()
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def geneval_metadata(path=None):
    """The 553 prompts of the benchmark, from a file or its repository -> {prompt: {"tag", "include", "exclude"?}}."""
    if path is None:
        path = Path(torch.hub.get_dir()) / "geneval_evaluation_metadata.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(GENEVAL_PROMPTS, str(path), progress=False)
    metadata = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            if line.strip():
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
    source   Ghosh et al. 2023, arXiv 2310.11513; prompts from main of github.com/djghosh13/geneval
    path     evaluation_metadata.jsonl, or a folder with it and copies of the two repositories in mask2former/ and clip/
    """
    folder = Path(path) if path and Path(path).is_dir() else None

    def local(name):
        return str(folder / name) if folder and (folder / name).exists() else None
    try:
        metadata = geneval_metadata(local("evaluation_metadata.jsonl") if folder else path)
    except Exception as error:
        raise UserError(f"reward 'geneval': cannot read {path or GENEVAL_PROMPTS} ({one_line(error)}); for a local "
                        "copy give geneval@/path/to/evaluation_metadata.jsonl") from error
    repo = "facebook/mask2former-swin-small-coco-instance"
    with fetching("geneval", "the detector", repo, local("mask2former")):
        detect = Detector(local("mask2former") or repo, device)
    return GenEval(detect, clip_at("geneval", CLIP_L, device, local("clip")), metadata, device)


# ---------------------------------------------------------------------------------------------------------------------
# rewards behind a URL

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
    patience, timeout = seconds("REWARD_PATIENCE", 600), seconds("REWARD_TIMEOUT", 300)
    deadline, pause = time.monotonic() + patience, 0.5
    while True:
        asked = 0
        try:
            try:
                answer = urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=timeout)
            except urllib.error.HTTPError as refusal:
                answer = refusal
            with answer:
                status, text, given = answer.status, answer.read(), answer.headers.get("Retry-After", "")
        except (OSError, http.client.HTTPException) as error:  # URLError, time-outs and broken connections among them
            trouble = one_line(error)
        else:
            trouble = f"HTTP {status}: {' '.join(text.decode(errors='replace').split())[:200]}"
            asked = int(given) if given.isdecimal() else 0
            if status < 400:
                WAITING.discard(url)
                return parsed(text, who)
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
        self.model = urllib.parse.parse_qs(parts.query).get("model", [None])[0]
        if not self.model:
            raise UserError(f"reward 'vlm@{address}': name the model, vlm@http://host:port/v1?model=NAME")
        base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self.url, self.unparsed, self.lock = base + "/v1/chat/completions", 0, threading.Lock()

    def __call__(self, images, prompts):
        """list of PIL images, list of prompts -> list of floats; eight questions at a time."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.ask, images, prompts))

    def ask(self, image, prompt):
        """One picture -> its score, 0 to 10, or NaN."""
        picture = {"url": "data:image/jpeg;base64," + base64_image(image, "JPEG", quality=95)}
        content = [{"type": "image_url", "image_url": picture},
                   {"type": "text", "text": VLM_QUESTION.format(prompt=prompt)}]
        token = os.environ.get("VLM_TOKEN") or os.environ.get("OPENAI_API_KEY")
        answer = post_json(self.url, {"model": self.model, "messages": [{"role": "user", "content": content}],
                                      "temperature": 0, "max_tokens": 256}, token, f"reward 'vlm' at {self.url}")
        try:
            reply = answer["choices"][0]["message"]["content"]
            score = float(re.findall(r"score\W*?(-?\d+(?:\.\d+)?)", reply, re.IGNORECASE)[-1])
        except (KeyError, IndexError, TypeError):
            score = math.nan
        if not 0 <= score <= 10:
            with self.lock:
                self.unparsed += 1
            return math.nan
        return score


def vlm(device="cpu", path=None):
    """A vision-language model asked for a number, at any OpenAI-compatible endpoint.

    model    the endpoint's
    licence  the endpoint's
    size     0
    scale    0 to 10; a reply without such a number is NaN
    source   the question is VLM_QUESTION in this file
    path     the endpoint: vlm@http://host:port/v1?model=NAME
    """
    if not path:
        raise UserError("reward 'vlm': name the endpoint, vlm@http://host:port/v1?model=NAME")
    return Vlm(path)


# ---------------------------------------------------------------------------------------------------------------------
# serving

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
        token, given = self.server.token, self.headers.get("Authorization", "")
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
            prompts, texts = request["prompts"], request["images"]
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
        return Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")).convert("RGB")
    except Exception as error:
        raise Refused(400, f"image {i} is not a PNG, JPEG or WebP file: {one_line(error)}") from None


def server(reward, host="127.0.0.1", port=8000, token=None, max_body=256 * 2**20):
    """A bound HTTP server for a Reward; call its serve_forever(). One lock around the model; bodies of at most
    `max_body` bytes. UserError: several parts (they are z-scored over a prompt's candidates: combine at the client)."""
    if len(reward.parts) > 1:
        raise UserError(f"serve one reward at a time, not {reward.name!r}: combine where they are used")
    try:
        bound = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on {host}:{port}: {one_line(error)}") from None
    bound.reward, bound.token, bound.max_body, bound.lock = reward, token, max_body, threading.Lock()
    return bound


# ---------------------------------------------------------------------------------------------------------------------
# the names, and the command line

REWARDS = {
    "pickscore": pickscore, "clip": clip, "aesthetic": aesthetic, "hpsv2": hpsv2, "imagereward": imagereward,
    "hpsv3": hpsv3, "geneval": geneval, "jpeg": no_files(jpeg), "incompressibility": no_files(incompressibility),
    "scene": no_files(scene), "vlm": vlm,
}


def table():
    """Names, sizes, licences, models and scales as aligned lines, read off the factories' docstrings."""
    rows = [("name", "size", "licence", "scale", "model")]
    for name, factory in REWARDS.items():
        facts = dict(re.findall(r"^(model|licence|size|scale) +(.*)$", inspect.getdoc(factory) or "", re.MULTILINE))
        rows.append((name, *(facts.get(key, "") for key in rows[0][1:])))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[4] for row in rows]
    return "\n".join(lines + ["also: file.py:name, package.module:name, http://host:port; NAME@path for a local copy"])


def score_files(args):
    """Print the scores of picture files, a line each."""
    try:
        images = [Image.open(path).convert("RGB") for path in args.images]
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(one_line(error)) from None
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
