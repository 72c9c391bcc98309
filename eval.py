"""Did it help? A tuned model against its base, on the same prompts and the same noise.

    python eval.py RUN_OR_LORA ...                tables, win rates, pictures -> RUN/eval/report.json, .md, grid.png
    python eval.py runs/toy --best-of 16          ... beside picking the best of 16 pictures of the base
    python eval.py runs/a runs/b --rewards pickscore,aesthetic --prompts my.txt --judge "http://host:8000/v1?model=NAME"
    python eval.py runs/toy --generate "a red circle" --generate "three blue squares"
    python eval.py --ablate lambda --seeds 0,1,2 --jobs 2      train and compare the variants of a table in this file

All intervals are 95% percentile intervals of a bootstrap over PROMPTS (2000 resamples, fixed seed), since the pictures
of one prompt are not independent of each other.
    difference          mean of tuned minus base, picture by picture (same prompt, same noise)
    win rate            share of pictures that score above the base's of the same noise; a tie counts as half
    right               share of pictures that a checker (scene, geneval) finds right, overall and by kind of prompt
    diversity           L2 distance of the VAE latents of two pictures of a prompt, mean over pairs, then over prompts
    diversity of right  the same among right pictures only; base and tuned are compared on the SAME prompts, those where
                        each has at least two right ones: hard prompts have another diversity than easy ones, and only
                        the better model has right pictures of them. How many right ones there are gives no advantage,
                        for a mean over pairs does not depend on their number.
    distance to base    RMS difference of the latents of two pictures of the same noise
    best of N           N candidates of the BASE for each picture, the best by the ranked reward: what computing more at
                        generation time gives without any finetuning
The same command twice on a CPU writes the same report.json bit for bit; speeds are printed and kept in timing.json.
"""
import argparse
import contextlib
import dataclasses
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.utils.checkpoint
from PIL import Image, ImageColor, ImageDraw, ImageFont

import rewards
from rewards import UserError

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------------------
# 1. What a run shows, for drpo.py: pictures, a curve, seconds of each phase, lines of figures.

INK, FAINT, GRID, BAND, RIGHT, WRONG = "#22262e", "#707784", "#e4e6eb", "#dbe6f8", "#2a9d4e", "#d43d3d"
LINES = ("#2563c9", "#c9622b", "#2f8f5b")


def wrap(text, font, width, most=4):
    """Lines of text that fit into `width` pixels, at most `most`; words that are too long are cut."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            word = word[:-2] + "…" if word.endswith("…") else word[:-1] + "…"
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width or not lines[-1] else [lines[-1], word]
    if len(lines) > most:
        last = lines[most - 1]
        while font.getlength(last + " …") > width and " " in last:
            last = last.rpartition(" ")[0]
        lines = lines[:most - 1] + [last + " …"]
    return lines


def shown_side(width, columns):
    """Side in pixels at which a picture is shown: small ones enlarged by a whole factor, large ones reduced to 256."""
    return width * max(1, (144 if columns > 5 else 200) // width) if width < 256 else 256


def picture_grid(rows_of_images, captions, labels, side=None, marks=None):
    """Rows of PIL pictures (one list a row) under captions (one a column), labels at the left -> one PIL picture.

    marks: per row None, or a list of True (green corner), False (red) and None for its pictures."""
    width = rows_of_images[0][0].width
    side = side or shown_side(width, len(captions))
    font, bold, gap = ImageFont.load_default(13), ImageFont.load_default(14), 5
    lines = [wrap(c, font, side) for c in captions]
    label_lines = [wrap(label, bold, 90) for label in labels]
    left = 18 + int(max(bold.getlength(line) for label in label_lines for line in label))
    top = 10 + 16 * max(map(len, lines)) + 4
    grid = Image.new("RGB", (left + len(captions) * (side + gap) + 3, top + len(labels) * (side + gap) + 3), "white")
    draw = ImageDraw.Draw(grid)
    for c, text in enumerate(lines):  # captions stand on the pictures
        draw.multiline_text((left + c * (side + gap) + 1, top - 6), "\n".join(text), INK, font, anchor="ld", spacing=3)
    for r, (images, label) in enumerate(zip(rows_of_images, label_lines)):
        y = top + r * (side + gap)
        draw.multiline_text((8, y + side // 2), "\n".join(label), INK, bold, anchor="lm", spacing=3)
        for c, image in enumerate(images):
            x = left + c * (side + gap)
            crisp = image.width <= side and side % image.width == 0
            grid.paste(image.resize((side, side), Image.NEAREST if crisp else Image.LANCZOS), (x, y))
            draw.rectangle((x, y, x + side - 1, y + side - 1), outline="#d5d8de")
            mark = marks[r][c] if marks and marks[r] else None
            if mark is not None:
                draw.polygon([(x + side - 15, y), (x + side - 1, y), (x + side - 1, y + 14)], RIGHT if mark else WRONG)
    return grid


def ticks(low, high, most=5, smallest=1e-12):
    """Round numbers that cover low..high: a step of 1, 2 or 5 times a power of ten, at least `smallest`."""
    steps = (m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5))
    step = next(s for s in steps if (high - low) / s <= most and s >= smallest)
    return np.arange(np.floor(low / step + 1e-6), np.ceil(high / step - 1e-6) + 1) * step


def panel(draw, x0, w, h, title, lines, band, level, last):
    """One diagram over steps 0..last, w x h pixels at x0 (twice the final size). lines: (name, [(step, value)], color);
    band: (name, [(step, low, high)]) or None; level: the value of a dashed line, or None."""
    font, small = ImageFont.load_default(30), ImageFont.load_default(24)
    left, right, top, bottom = x0 + 110, x0 + w - 36, 100, h - 84
    values = [v for _, points, _ in lines for _, v in points] + [v for p in (band[1] if band else []) for v in p[1:]]
    values += [] if level is None else [level]
    spare = 0.0 if max(values) > min(values) else abs(max(values)) * 0.05 + 1e-3  # a flat line gets some room
    ys = ticks(min(values) - spare, max(values) + spare)

    def place(step, v):
        return left + step / last * (right - left), bottom - (v - ys[0]) / (ys[-1] - ys[0]) * (bottom - top)

    if band and len(band[1]) > 1:
        draw.polygon([place(s, v) for s, _, v in band[1]] + [place(s, v) for s, v, _ in band[1][::-1]], BAND)
    for v in ys:
        draw.line((*place(0, v), *place(last, v)), GRID, 2)
        draw.text((left - 14, place(0, v)[1]), f"{v:.6g}", FAINT, small, anchor="rm")
    for s in ticks(0, last, 6, smallest=1):
        if s <= last:
            draw.line((place(s, ys[0])[0], bottom, place(s, ys[0])[0], bottom + 8), FAINT, 2)
            draw.text((place(s, ys[0])[0], bottom + 14), f"{s:.6g}", FAINT, small, anchor="mt")
    draw.line((left, bottom, right, bottom), FAINT, 2)
    draw.text((x0 + 24, 18), title, INK, font)
    draw.text(((left + right) / 2, h - 10), "step", FAINT, small, anchor="mb")
    if level is not None:
        for x in range(left, right, 20):
            draw.line((x, place(0, level)[1], min(x + 10, right), place(0, level)[1]), FAINT, 2)
    x = left
    for name, points, color in ([(*band, BAND)] if band else []) + lines:
        draw.rectangle((x, 71, x + 26, 85 if color == BAND else 76), color)
        draw.text((x + 36, 78), name, FAINT, small, anchor="lm")
        x += 72 + int(small.getlength(name))
        if color != BAND:
            plot(draw, points, place, color)


def plot(draw, points, place, color):
    """One series as a line; beyond 40 points as a running mean over pale dots, for prompts differ from step to step."""
    half = max(1, len(points) // 30) if len(points) > 40 else 0
    if half or len(points) == 1:
        pale = tuple((c + 2 * 255) // 3 for c in ImageColor.getrgb(color)) if half else color
        for x, y in (place(*p) for p in points):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), pale)
    mean = [(s, np.mean([v for _, v in points[max(0, i - half):i + half + 1]])) for i, (s, _) in enumerate(points)]
    if len(mean) > 1:
        draw.line([place(*p) for p in mean], color, 5, joint="curve")


def draw_curve(metrics, path):
    """curve.png of a run: the reward's mean within best to worst, every watched reward, and diversity, over steps."""
    def series(key):
        return [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), (int, float)) and np.isfinite(m[key])]

    worst, panels = dict(series("reward_worst")), []
    if series("reward_mean"):
        band = [(s, worst[s], v) for s, v in series("reward_best") if s in worst]
        line = ("mean", series("reward_mean"), LINES[0])
        panels.append(("reward", [line], ("best to worst of a prompt", band), None))
    for key in sorted({k for m in metrics for k in m if k.startswith("watch/") and series(k)}):
        panels.append((f"watched: {key[6:]}", [("mean", series(key), LINES[1])], None, None))
    if series("diversity"):
        line = ("within a prompt", series("diversity"), LINES[2])
        panels.append(("diversity, relative to the base", [line], None, 1.0))
    if not panels:
        return
    w, h = 880, 620  # pixels of a panel at twice its size: halving smooths the lines
    image = Image.new("RGB", (w * len(panels), h), "white")
    for n, (title, lines, band, level) in enumerate(panels):
        panel(ImageDraw.Draw(image), n * w, w, h, title, lines, band, level, max(m["step"] for m in metrics))
    beside = Path(path).with_suffix(".tmp.png")
    image.resize((w * len(panels) // 2, h // 2), Image.LANCZOS).save(beside)
    os.replace(beside, path)


class Timer:
    """Seconds of each phase of a step; on a GPU by events, so that the host waits for nothing."""

    def __init__(self, device):
        self.cuda, self.marks = torch.device(device).type == "cuda", []

    def now(self):
        if self.cuda:
            (event := torch.cuda.Event(enable_timing=True)).record()
        return event if self.cuda else time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase):
        start = self.now()
        yield
        self.marks.append((phase, start, self.now()))

    def seconds(self):
        """{phase: seconds} since the last call; waits for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()
        total = {}
        for phase, a, b in self.marks:
            total[phase] = total.get(phase, 0.0) + (a.elapsed_time(b) / 1e3 if self.cuda else b - a)
        self.marks = []
        return total


def describe(T):
    """What a run is about to do: its settings, and the arithmetic of its batch."""
    cfg, n = T.cfg, sum(p.numel() for p in T.params)
    print("  ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items() if v not in ("", False)))
    print(f"{cfg.batch} prompts x {cfg.candidates} candidates{f' x {T.world} ranks' if T.world > 1 else ''} = "
          f"{cfg.batch * cfg.candidates * T.world} images a step, {T.micro} at once; {n:,} trainable weights; "
          f"{len(T.prompts):,} prompts; {T.G.dtype} on {T.G.device}", flush=True)


def figures_line(m, cfg, left):
    """One readable line of a step's metrics; left: seconds to go."""
    show = {"reward_mean": "reward {:.4g}", "reward_best": "best {:.4g}", "reward_worst": "worst {:.4g}",
            **{k: k[6:] + " {:.4g}" for k in m if k.startswith("watch/")}, "diversity": "diversity {:.0%}",
            "distance": "distance {:.3g}", "grad_norm": "grad {:.3g}",
            "skipped": "skipped {}" if m.get("skipped") else "",
            "applied": "" if m["applied"] else "NOT FINITE, not applied",
            "seconds": "{:.2f} s", "peak_gib": "{:.1f} GiB"}
    parts = [f"step {m['step']}/{cfg.steps}"]
    parts += [text.format(m[k]) for k, text in show.items() if text and m.get(k) is not None]
    return "  ".join(parts) + f"  left {int(left) // 60}:{int(left) % 60:02d}"


def preview(T, out):
    """samples/step-N.png of a drpo.Trainer T: fixed prompts, fixed noise, the base above, the tuned model below; and
    curve.png."""
    import drpo
    G, n, pictures = T.G, min(8, len(T.prompts)), []
    prompts = [T.prompts[i * len(T.prompts) // n] for i in range(n)]
    noise = [drpo.prompt_noise(T.cfg.seed, -1 - i, (1, *G.noise_shape)).to(G.device) for i in range(n)]
    with torch.no_grad(), G.eager():
        condition = G.encode(prompts)
        for context in (G.reference(), contextlib.nullcontext()):
            with context:
                x = [G.sample(e, drpo.rows(condition, slice(i, i + 1))) for i, e in enumerate(noise)]
            pictures.append([rewards.to_pil(G.decode(h))[0] for h in x])
    (out / "samples").mkdir(exist_ok=True)
    picture_grid(pictures, prompts, ("base", "tuned")).save(out / "samples" / f"step-{T.step:06d}.png")
    if T.metrics:
        draw_curve(T.metrics, out / "curve.png")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Statistics, on arrays (P prompts, N pictures).

def interval(total, count, resamples=2000, seed=0):
    """sum(total) / sum(count) over prompts, both (P,), and its 95% bootstrap interval -> [value, low, high].

    None stands for what is not defined: a value of no pictures, an interval of a single prompt."""
    total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
    total, count = total[count > 0], count[count > 0]
    n = len(total)
    if n < 2:
        return [float(total[0] / count[0]) if n else None, None, None]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)  # (resamples, P)
    low, high = np.percentile((draws @ total) / (draws @ count), [2.5, 97.5])
    return [float(total.sum() / count.sum()), float(low), float(high)]


def mean_interval(values):
    """Mean of (P, N), NaN left out, with its interval."""
    return interval(np.nansum(values, 1), (~np.isnan(values)).sum(1))


def compare(base, tuned):
    """Scores (P, N) for the same prompts and noise -> mean, paired difference and win rate of tuned, with intervals."""
    base, tuned = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    return {"mean": mean_interval(tuned), "difference": mean_interval(tuned - base),
            "win_rate": mean_interval((np.sign(tuned - base) + 1) / 2)}


def pair_distances(x, keep=None):
    """Latents x (P, N, D), keep: None or boolean (P, N) -> mean L2 distance over the kept pairs of each prompt (P,) as
    float64, NaN where fewer than two are kept."""
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").double().numpy()  # (P, N, N)
    keep = np.ones(d.shape[:2], bool) if keep is None else np.asarray(keep)
    pairs = keep[:, :, None] & keep[:, None, :] & ~np.eye(d.shape[1], dtype=bool)
    with np.errstate(invalid="ignore"):
        return (d * pairs).sum((1, 2)) / pairs.sum((1, 2))


def diversity(base, tuned, keep_base=None, keep_tuned=None):
    """Latents (P, N, D), boolean masks (P, N) -> mean diversity of tuned and of base where a prompt has both, the ratio
    with its interval, the number of these prompts; own: mean of tuned's on all prompts where it has one."""
    a, b = pair_distances(base, keep_base), pair_distances(tuned, keep_tuned)  # (P,)
    both = ~np.isnan(a) & ~np.isnan(b)
    mean = lambda v: float(v.mean()) if len(v) else None
    return {"mean": mean(b[both]), "base": mean(a[both]), "relative": interval(b[both], a[both]),
            "prompts": int(both.sum()), "own": mean(b[~np.isnan(b)])}


# ----------------------------------------------------------------------------------------------------------------------
# 3. Pictures of a model, and what rewards say about them.

NOISE_SEED = 1_000_003  # added to --seed: a run's own noise comes from small seeds


def generate(G, prompts, n, seed, batch):
    """n pictures of each prompt by the generator as it stands, `batch` at once: yields flat indices p n + i, latents
    (B, 4, h, w), images (B, 3, H, W) in [0, 1]. Noise i of prompt p depends on (seed, p, i) alone."""
    from drpo import prompt_noise, rows
    for first in range(0, len(prompts), batch):
        block = prompts[first:first + batch]
        with torch.no_grad():
            condition = G.encode(block)
        flat = [(p, i) for p in range(len(block)) for i in range(n)]
        for k in range(0, len(flat), batch):
            chunk = flat[k:k + batch]
            noise = [prompt_noise(seed + NOISE_SEED, (first + p) * 2**20 + i, G.noise_shape) for p, i in chunk]
            owner = torch.tensor([p for p, _ in chunk], device=G.device)
            with torch.no_grad():
                x = G.sample(torch.stack(noise).to(G.device), rows(condition, owner))
                yield [(first + p) * n + i for p, i in chunk], x, G.decode(x)


class Pictures:
    """Pictures of one model and what rewards say: x (P, N, D) latents, scores {reward: (P, N)}, right {checker: (P, N)}
    of 1, 0 and NaN, kept {(p, i): PIL picture}; seconds that sampling and decoding took."""

    def __init__(self, G, prompts, samples, args, reward, keep, best_of=1, folder=None):
        """keep: prompts whose first picture is kept; best_of: candidates a picture; folder: where all are saved."""
        x, scores, right, self.kept, self.seconds, n = [], {}, {}, {}, 0.0, samples * best_of
        began = time.perf_counter()
        for flat, latents, images in generate(G, prompts, n, args.seed, args.batch):
            pictures, texts = rewards.to_pil(images), [prompts[f // n] for f in flat]
            self.seconds += time.perf_counter() - began
            x.append(latents.flatten(1).float().cpu())
            for name, values in reward.score(images, texts).items():
                scores.setdefault(name, []).append(values)
            for name, part in reward.parts.items():
                if hasattr(part, "correct"):
                    verdicts = [np.nan if v is None else float(v) for v in part.correct(pictures, texts)]
                    right.setdefault(name, []).append(torch.tensor(verdicts))
            for f, picture in zip(flat, pictures):
                if f // n in keep and f % n % samples == 0:
                    self.kept[f // n, f % n] = picture
                if folder:
                    picture.save(folder / f"{f // n:04d}-{f % n:03d}.png")
            began = time.perf_counter()
        self.x = torch.cat(x).reshape(len(prompts), n, -1)
        self.scores, self.right = ({k: torch.cat(v).reshape(-1, n) for k, v in d.items()} for d in (scores, right))

    def take(self, index):
        """Keep of the candidates (P, N) those with numbers index (P, S)."""
        self.x = self.x[torch.arange(len(index))[:, None], index]
        self.scores, self.right = ({k: v.gather(1, index) for k, v in d.items()} for d in (self.scores, self.right))
        self.kept = {(p, 0): self.kept[p, int(index[p, 0])] for p in {p for p, _ in self.kept}}


def best_index(reward, ranked, scores, samples):
    """Scores {part: (P, N S)} of S = samples slots, candidate c of slot s at c S + s -> best candidates (P, S)."""
    slots = {k: scores[k].unflatten(1, (-1, samples)).mT for k in ranked}  # (P, S, N)
    values = reward.combine(slots).nan_to_num(nan=-torch.inf)
    return values.argmax(-1) * samples + torch.arange(samples)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Runs and LoRA files.

def open_run(path):
    """A run's folder or a LoRA file -> its settings, {} for a file on its own; "model" is the base it was made for."""
    from drpo import KOHYA_FILE, LORA_FILE
    path, saved = Path(path), {}
    if path.is_dir() and (path / "config.json").is_file():
        try:
            saved = json.loads((path / "config.json").read_text())
        except ValueError as e:
            raise UserError(f"{path}/config.json is not JSON ({e})") from e
    if path.is_dir() and not any((path / f).exists() for f in (LORA_FILE, KOHYA_FILE, "unet")):
        what = "no weights in it yet" if saved else "no run"
        raise UserError(f"{path}: {what} (expected config.json and {LORA_FILE})")
    if not path.exists():
        raise UserError(f"{path}: no such run or LoRA file")
    file = next((f for f in (path, path / LORA_FILE, path / KOHYA_FILE) if f.is_file()), None)
    if file:
        from safetensors import safe_open
        try:
            with safe_open(file, "pt") as f:
                saved["made_for"] = (f.metadata() or {}).get("base_model", "").removeprefix("random ")
        except Exception as e:  # safetensors has its own error class
            raise UserError(f"{file}: not a readable LoRA file ({str(e).splitlines()[0]})") from e
    saved["model"] = saved.get("model") or saved.get("made_for", "")
    return saved


def load_tuned(G, path, saved, any_base=False):
    """Put a run's weights into the generator, whose reference stays the base."""
    G.unet, made_for = G.reference_unet, saved.get("made_for", "")
    if saved.get("full"):
        unet = type(G.unet).from_pretrained(Path(path) / "unet").to(G.device, G.dtype).eval().requires_grad_(False)
        unet.conv_norm_out.float().register_forward_pre_hook(lambda module, x: (x[0].float(),))  # as in drpo.Generator
        unet.conv_out.float()
        G.unet = unet
        return
    same = Path(made_for).name == Path(G.name.removeprefix("random ")).name
    if made_for and not same and not any_base:
        raise UserError(f"{path} was made for the base {made_for}, not for {G.name} (--any-base tries it all the same)")
    G.load_lora(path)


def file_name(label):
    """A label as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-")


def labels_of(paths):
    """Short names of runs: the last part of the path, more of it where two are alike."""
    for depth in range(1, 9):
        names = ["/".join(Path(p).resolve().parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            break
    return [f"run {name}" if name.startswith("base") else name for name in names]  # "base" is a column of its own


def choose_rewards(args, runs):
    """-> one Reward of everything that is scored, and the names that --best-of ranks by: the run's own reward, or the
    first of --rewards."""
    specs = [args.rewards] if args.rewards else [s for r in runs for s in (r.get("reward"), r.get("watch")) if s]
    weights = {}
    for spec in specs:
        weights = rewards.parse(spec) | weights
    weights = {k: weights[k] for spec in specs for k in rewards.parse(spec)}  # ranked first, then watched
    if not weights:
        raise UserError("no rewards to score by: name them, --rewards pickscore,aesthetic")
    reward = rewards.Reward(",".join(weights), {k: rewards.build(k, args.device) for k in weights}, weights)
    first = rewards.parse(specs[0])
    return reward, list(first)[:1] if args.rewards else list(first)


def prepare(args):
    """Everything an evaluation needs -> generator, settings of the runs, prompts, reward and what it ranks by (see
    `choose_rewards`). UserError for what is missing, cheap things first."""
    import drpo
    if not args.runs:
        raise UserError("name a run's folder or a LoRA file (python eval.py --help)")
    if min(args.samples, args.batch, args.best_of) < 1:
        raise UserError("--samples, --batch and --best-of are at least 1")
    runs = [open_run(p) for p in args.runs]
    models = {args.model} if args.model else {r["model"] for r in runs}
    if len(models) > 1:
        raise UserError(f"runs of different bases ({', '.join(sorted(models))}): evaluate them one base at a time")
    model = models.pop()
    if not model:
        raise UserError(f"{args.runs[0]} does not say which base it was made for: give --model")
    spec = args.prompts or ("scenes-test" if drpo.layout(model) == "toy" else "pickapic-test")
    prompts = args.generate or list(dict.fromkeys(drpo.load_prompts(spec)))
    if args.limit and args.limit < len(prompts):
        prompts = [prompts[i * len(prompts) // args.limit] for i in range(args.limit)]
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    reward, ranked = (None, []) if args.generate else choose_rewards(args, runs)
    dtype = drpo.DTYPES[args.dtype if args.dtype != "auto" else "bf16" if cuda else "fp32"]
    torch.manual_seed(runs[0].get("seed", 0))
    G = drpo.load_generator(model, device=args.device, dtype=dtype, random_init=bool(runs[0].get("random_init")))
    args.prompts = "" if args.generate else spec
    return G, runs, prompts, reward, ranked


# ----------------------------------------------------------------------------------------------------------------------
# 5. The report.

def figures(base, other, reward, prompts):
    """All figures of one column of the table, as plain data: see the top of the file."""
    right = {k: (base.right[k].numpy(), other.right[k].numpy()) for k in base.right}  # (P, N) each
    accuracy, right_diversity = {}, {}
    for k, (a, b) in right.items():
        tags = [reward.parts[k].tag(p) for p in prompts]
        groups = {"all": np.array([t is not None for t in tags])}
        groups |= {t: np.array([u == t for u in tags]) for t in sorted({t for t in tags if t})}
        accuracy[k] = {t: compare(a[rows], b[rows]) | {"prompts": int(rows.sum())} for t, rows in groups.items()}
        right_diversity[k] = diversity(base.x, other.x, a == 1, b == 1)
    return {"rewards": {k: compare(base.scores[k], other.scores[k]) for k in base.scores}, "accuracy": accuracy,
            "diversity": diversity(base.x, other.x), "right_diversity": right_diversity,
            "distance": float((other.x - base.x).square().mean().sqrt()),
            "per_prompt": {k: [float(v) if v == v else None for v in scores.double().nanmean(1)]
                           for k, scores in other.scores.items()}}


def evaluate(args):
    """Base and every run on the same prompts and noise -> the report, written to args.out as well."""
    G, runs, prompts, reward, ranked = prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    shown = [i * len(prompts) // min(8, len(prompts)) for i in range(min(8, len(prompts)))]
    keep = set(range(len(prompts))) if args.judge else set(shown)

    def pictures(label, best_of=1):
        folder = args.out / "pictures" / file_name(label) if args.save_pictures else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        found = Pictures(G, prompts, args.samples, args, reward, keep, best_of, folder)
        speed[label] = {"pictures": found.x.shape[0] * found.x.shape[1], "seconds": found.seconds}
        speed[label]["per_second"] = speed[label]["pictures"] / found.seconds
        print("{}: {pictures} pictures, {per_second:.1f} a second".format(label, **speed[label]), flush=True)
        return found

    speed, columns = {}, {}
    with G.reference():
        columns["base"] = base = pictures("base")
    for label, path, saved in zip(labels_of(args.runs), args.runs, runs):
        load_tuned(G, path, saved, args.any_base)
        columns[label] = pictures(label)
    if args.best_of > 1:
        with G.reference():
            best = columns[f"base best-of-{args.best_of}"] = pictures(f"base best-of-{args.best_of}", args.best_of)
        best.take(best_index(reward, ranked, best.scores, args.samples))
    report = {"model": G.name, "prompts": args.prompts, "samples": args.samples, "seed": args.seed, "ranked": ranked,
              "rewards": list(reward.parts), "texts": prompts,
              "columns": {label: figures(base, c, reward, prompts) for label, c in columns.items()}}
    if args.judge:
        for label in list(columns)[1:]:
            sides = [[c.kept[p, 0] for p in range(len(prompts))] for c in (base, columns[label])]
            report["columns"][label]["judge"] = judge(args.judge, prompts, *sides)
    write_report(args.out, report, speed, columns, shown, prompts)
    return report


def write_report(out, report, speed, columns, shown, prompts):
    """report.json, report.md, timing.json and grid.png, and the table on the terminal."""
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False))
    (out / "timing.json").write_text(json.dumps(speed, indent=1))
    text = table(report)
    (out / "report.md").write_text(text)
    checker = next(iter(columns["base"].right), None)
    verdicts = [[float(c.right[checker][p, 0]) for p in shown] for c in columns.values()] if checker else []
    marks = [[bool(v) if v == v else None for v in row] for row in verdicts]
    images = [[c.kept[p, 0] for p in shown] for c in columns.values()]
    tuned = [label for label in columns if not label.startswith("base")]
    names = ["tuned" if [label] == tuned else label for label in columns]
    picture_grid(images, [prompts[p] for p in shown], names, marks=marks).save(out / "grid.png")
    print(f"\n{text}\nwritten: {out}/report.json, report.md, grid.png")


def number(v, style="{:.4g}"):
    """[value, low, high], a number or None as text."""
    if not isinstance(v, list):
        return "" if v is None else style.format(v)
    text = number(v[0], style)
    return text if v[1] is None else f"{text} [{number(v[1], style)}, {number(v[2], style)}]"


def table(report):
    """The figures of a report as one markdown table, aligned so that it reads in a terminal too."""
    columns, lines = report["columns"], [["", *report["columns"]]]

    def row(title, pick, style="{:.4g}", base=True):
        cells = [number(pick(c), style) if base or n else "" for n, c in enumerate(columns.values())]
        if any(cells):  # of my/file.py:function the folder is left out
            lines.append([re.sub(r"\S*/(?=[^/]*\.py:)", "", title), *cells])

    def comparison(title, of, style, signed):
        row(title, lambda c: of(c)["mean"], style)
        row("  difference to base", lambda c: of(c)["difference"], signed, False)

    for k in report["rewards"]:
        comparison(f"{k}: mean", lambda c: c["rewards"][k], "{:.4g}", "{:+.4g}")
        row("  win rate against base", lambda c: c["rewards"][k]["win_rate"], "{:.1%}", False)
    for k, groups in columns["base"]["accuracy"].items():
        comparison(f"{k}: right", lambda c: c["accuracy"][k]["all"], "{:.1%}", "{:+.1%}")
        for tag in list(groups)[1:]:
            row(f"  {tag} ({groups[tag]['prompts']} prompts)", lambda c: c["accuracy"][k][tag]["mean"][0], "{:.1%}")
    row("diversity", lambda c: c["diversity"]["mean"])
    row("  relative to base", lambda c: c["diversity"]["relative"], "{:.1%}", False)
    for k in columns["base"]["right_diversity"]:
        row(f"diversity of right ({k})", lambda c: c["right_diversity"][k]["own"])
        row("  relative to base, same prompts", lambda c: c["right_diversity"][k]["relative"], "{:.1%}", False)
    row("distance to base", lambda c: c["distance"])
    if any("judge" in c for c in columns.values()):
        row("judge: win rate against base", lambda c: c.get("judge", {}).get("win_rate"), "{:.1%}")
        counts = "{wins} / {ties} / {losses}"
        row("  wins / ties / losses", lambda c: counts.format(**c["judge"]) if "judge" in c else None, "{}")
    head = "{prompts}: {} prompts, {samples} pictures each, base {model}".format(len(report["texts"]), **report)
    return head + "; in brackets 95% bootstrap intervals over prompts\n\n" + aligned(lines)


def aligned(lines):
    """Rows of cells, the first of them the head -> a markdown table with columns of equal width."""
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width)) + " |" for line in lines]
    return "\n".join([out[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *out[1:]]) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# 6. A judge: a vision-language model that sees two pictures and says which is better.

QUESTION = """Two pictures, A and B, were made for this text: {prompt}
Which of them shows the text better and looks better? Answer with one line of the form
Answer: A
or Answer: B, or Answer: tie"""


def judge(address, prompts, base, tuned):
    """Ask about each pair of PIL pictures in both orders -> counts, and the win rate of tuned with its interval. A pair
    scores the mean of its two answers: opposite ones are a tie; one without an answer drops the pair."""
    vlm = rewards.Vlm(address)
    token = os.environ.get("VLM_TOKEN") or os.environ.get("OPENAI_API_KEY")

    def ask(prompt, a, b):  # -> 1 for A, 0 for B, 0.5 for a tie, NaN for no answer
        content = [{"type": "text", "text": QUESTION.format(prompt=prompt)}]
        for name, image in (("A", a), ("B", b)):
            url = "data:image/jpeg;base64," + rewards.base64_image(image, "JPEG", quality=95)
            content += [{"type": "text", "text": f"Picture {name}:"}, {"type": "image_url", "image_url": {"url": url}}]
        answer = rewards.post_json(vlm.url, {"model": vlm.model, "messages": [{"role": "user", "content": content}],
                                             "temperature": 0, "max_tokens": 256}, token, f"judge at {vlm.url}")
        try:
            reply = answer["choices"][0]["message"]["content"]
            return {"a": 1.0, "b": 0.0, "tie": 0.5}[re.findall(r"answer\W*(a|b|tie)\b", reply, re.I)[-1].lower()]
        except (KeyError, IndexError, TypeError):
            return np.nan

    with ThreadPoolExecutor(8) as pool:
        first = np.array(list(pool.map(ask, prompts, base, tuned)))  # base shown first
        second = np.array(list(pool.map(ask, prompts, tuned, base)))
    score = (1 - first + second) / 2  # (P,): 1 tuned, 0 base
    counts = {"wins": score > 0.5, "ties": score == 0.5, "losses": score < 0.5, "no_answer": np.isnan(score),
              "order_decided": np.abs(first + second - 1) == 1}  # twice the one shown first, or twice the second
    return {"win_rate": mean_interval(score[:, None])} | {k: int(v.sum()) for k, v in counts.items()}


def side_by_side(args):
    """--generate: the same noise through base and every run, one step each -> generate.png, and single pictures."""
    G, runs, prompts, _, _ = prepare(args)
    each = min(args.samples, 4) if len(prompts) > 1 else min(args.samples, 8)
    (args.out / "generate").mkdir(parents=True, exist_ok=True)
    rows_of, names = [], ["base", *labels_of(args.runs)]
    for label, path, saved in zip(names, [None, *args.runs], [None, *runs]):
        if path:
            load_tuned(G, path, saved, args.any_base)
        with contextlib.nullcontext() if path else G.reference():
            found = generate(G, prompts, each, args.seed, args.batch)
            rows_of.append([picture for _, _, images in found for picture in rewards.to_pil(images)])
        for n, picture in enumerate(rows_of[-1]):
            picture.save(args.out / "generate" / f"{n // each:02d}-{n % each}-{file_name(label)}.png")
    captions = [p if i == 0 else "" for p in prompts for i in range(each)]
    names = ["base", "tuned"] if len(names) == 2 else names
    picture_grid(rows_of, captions, names).save(args.out / "generate.png")
    print(f"written: {args.out}/generate.png, and the pictures in {args.out}/generate/")


# ----------------------------------------------------------------------------------------------------------------------
# 7. Ablations on the toy: what matters, and what else one could do with the same candidates.

_NOISE = np.random.default_rng(0)


def noisy_scene(images, prompts, factor):
    """`scene` plus normal noise of `factor` times the standard deviation among the pictures of the same prompt."""
    scores, texts = np.array(rewards.load("scene")(images, prompts), np.float64), np.array(prompts)
    spread = np.array([scores[texts == p].std() for p in prompts])
    return list(scores + factor * spread * _NOISE.standard_normal(len(scores)))


def scene_noise_half(images, prompts):
    """`scene` plus noise of half its spread within a prompt."""
    return noisy_scene(images, prompts, 0.5)


def scene_noise_one(images, prompts):
    """`scene` plus noise as large as its spread within a prompt."""
    return noisy_scene(images, prompts, 1.0)


def scene_binary(images, prompts):
    """1 where all is right, else 0."""
    return (rewards.load("scene")(images, prompts) == 1).float()


def toward(z, z_ref, V_pref, cfg):
    """The dipole objective of drpo.drpo_target with another field V_pref (P, N, D) in the place of the dipole's."""
    import drpo
    V_pref, rms_pref = drpo.unit_sum(V_pref.unsqueeze(-3), return_rms=True)  # one radius
    V_ref, rms_ref = drpo.reference_drift(z, z_ref, radii=cfg.radii, kernel=cfg.kernel, return_rms=True)
    u = drpo.mean_distance(drpo.distances(z, z)) / z.shape[-1]**0.5  # (P, 1, 1)
    z_star = z + cfg.eta * u * (len(cfg.radii) * V_pref + cfg.lambda_ref * V_ref)  # the dipole sums its radii
    return [(z_star, 0.5 / (z.shape[1] * z.shape[2] * u**2))], rms_pref.expand(-1, len(cfg.radii)), rms_ref


def best_of_k_target(z, z_ref, positive, negative, masks, cfg):
    """Best-of-K distillation: every candidate is regressed onto the features of the best one of its prompt. To be run
    with anchors=1: positive (P, T, D) are the best one's T vectors; z (P, K T, D)."""
    K = z.shape[1] // positive.shape[1]
    found = masks[0].any(-1)[:, None, None]  # a prompt whose scores are all equal has no best
    return toward(z, z_ref, found * (positive.repeat(1, K, 1) - z), cfg)


def pairwise_target(z, z_ref, positive, negative, masks, cfg, beta=5.0):
    """Pairwise (DPO-like) regression: an anchor a of the best and b of the worst make a pair. With -||z - a||^2 / 2 as
    log-likelihood the DPO loss is -log sigmoid(beta (z - z_ref)(a - b) / s^2): it pulls each candidate along a - b, the
    less the more its margin over the reference has grown."""
    import drpo
    T = positive.shape[1] // cfg.anchors
    apart = lambda t: t.unflatten(1, (-1, T))  # (P, N, D) -> (P, images, T, D)
    pair = apart(positive) - apart(negative)  # (P, m, T, D)
    s = drpo.mean_distance(drpo.distances(z, z))  # (P, 1, 1)
    margin = torch.einsum("pktd,pjtd->pkjt", apart(z - z_ref), pair) / s[..., None]**2
    weight = torch.sigmoid(-beta * margin) * (apart(masks[0][..., None]) & apart(masks[1][..., None]))[:, None, ..., 0]
    return toward(z, z_ref, torch.einsum("pkjt,pjtd->pktd", weight, pair).flatten(1, 2), cfg)


METHODS = {"best-of-K": best_of_k_target, "pairwise": pairwise_target}  # what stands in for drpo.drpo_target
_FILE = str(HERE / "eval.py")
_AUTHORS = dict(field="released", radii=(0.02, 0.05, 0.2))
ABLATIONS = {  # name: {label: settings that differ from the preset of the toy}; "method" names one of METHODS
    "default": {"default": {}},
    "seeds": {f"seed {s}": dict(seed=s) for s in (1, 2)},
    "candidates": {"K 8, P 8": dict(candidates=8, anchors=2, batch=8),
                   "K 16, P 4": dict(candidates=16, anchors=4, batch=4),
                   "K 64, P 1": dict(candidates=64, anchors=16, batch=1)},  # the same number of pictures a step
    "anchors": {f"m {m}": dict(anchors=m) for m in (1, 4, 16)},
    "kernel": {k: dict(kernel=k) for k in ("rbf", "cosine")},
    "radii": {"radii .5 1 2": dict(radii=(0.5, 1.0, 2.0)), "radii .02 .05 .2": dict(radii=(0.02, 0.05, 0.2))},
    "features": {f"features {k}": dict(features=k) for k in ("unet", "latent")},
    "lambda": {f"lambda {v}": dict(lambda_ref=v) for v in (0.0, 0.05, 0.1, 0.4, 1.0)},
    "eta": {"eta 0.3": dict(eta=0.3)},
    "field": {"released field": dict(field="released"), "released field and radii": _AUTHORS,
              "the same, K 24, m 8, P 8, lr 1e-4": _AUTHORS | dict(candidates=24, anchors=8, batch=8, lr=1e-4, steps=50,
                                                                   warmup=0, lr_schedule="constant")},
    "noise": {"reward noise 0.5": dict(reward=f"{_FILE}:scene_noise_half"),
              "reward noise 1": dict(reward=f"{_FILE}:scene_noise_one")},
    "binary": {"binary reward": dict(reward=f"{_FILE}:scene_binary")},
    "rewards": {"reward jpeg": dict(reward="jpeg"), "reward incompressibility": dict(reward="incompressibility")},
    "alternatives": {"best-of-K distillation": dict(method="best-of-K", anchors=1),
                     "pairwise regression": dict(method="pairwise")},
}
ABLATIONS["all"] = {label: settings for table in list(ABLATIONS.values()) for label, settings in table.items()}


def ablate_one(folder):
    """Train and evaluate the variant in folder/job.json, in a process of its own; writes folder/result.json."""
    import drpo
    folder = Path(folder)
    job = json.loads((folder / "job.json").read_text())
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in job["settings"].items()}
    method = settings.pop("method", None)
    if method:
        drpo.drpo_target = METHODS[method]
    began = time.perf_counter()
    run = drpo.train(drpo.Config(**drpo.PRESETS["toy"] | dict(
        seed=job["seed"], device=job["device"], dtype="fp32", preview_every=0, save_every=10**9,
        out=str(folder / time.strftime("run-%Y%m%d-%H%M%S"))) | settings))
    minutes, spec = (time.perf_counter() - began) / 60, settings.get("reward", "scene")
    spec = "scene" if spec == "scene" or ":" in spec else f"{spec},scene"
    args = parse([str(run), "--rewards", spec, "--device", job["device"], "--samples", str(job["samples"])])
    columns = evaluate(args)["columns"]
    base, c, name = columns["base"], columns[Path(run).name], spec.split(",")[0]
    result = {"minutes": minutes, "right": c["accuracy"]["scene"]["all"]["mean"][0],
              "right_base": base["accuracy"]["scene"]["all"]["mean"][0],
              "diversity_right": c["right_diversity"]["scene"]["relative"][0], "distance": c["distance"],
              "diversity": c["diversity"]["relative"][0], "reward": c["rewards"][name]["mean"][0],
              "reward_base": base["rewards"][name]["mean"][0],
              "kinds": {t: v["mean"][0] for t, v in c["accuracy"]["scene"].items()}}
    (folder / "result.json").write_text(json.dumps(job | result))


def ablate(args):
    """Every variant of one table with every seed, args.jobs at a time, each in a process of its own; results.json grows
    as they arrive. The same command again goes on where it was stopped."""
    import drpo
    names, seeds = args.ablate.split(","), [int(s) for s in args.seeds.split(",")]
    variants = {label: kw for name in names for label, kw in drpo.pick("ablation", name, ABLATIONS).items()}
    waiting, running, done = [], {}, []
    for seed in seeds:
        for label, settings in variants.items():
            steps = {"steps": args.steps} if args.steps else {}
            job = {"label": label, "seed": seed, "settings": steps | settings, "device": args.device,
                   "samples": args.samples}
            folder = args.out / f"{file_name(label)}-seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            waiting.append((folder, json.loads(json.dumps(job))))
    while waiting or running:
        while waiting and len(running) < args.jobs:
            folder, job = waiting.pop(0)
            known = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
            if {k: known.get(k) for k in job} == job:
                done.append(known)
                continue
            (folder / "job.json").write_text(json.dumps(job))
            threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if args.jobs > 1 else {}
            running[folder] = job, subprocess.Popen([sys.executable, _FILE, "--variant", str(folder)],
                                                    stdout=open(folder / "log.txt", "w"), stderr=subprocess.STDOUT,
                                                    env=os.environ | threads)
        for folder, (job, process) in list(running.items()):
            if process.poll() is not None:
                del running[folder]
                if process.returncode == 0:
                    done.append(json.loads((folder / "result.json").read_text()))
                    print(f"{job['label']}, seed {job['seed']}: right {done[-1]['right']:.1%}", flush=True)
                else:
                    last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
                    print(f"{job['label']}, seed {job['seed']} failed: {''.join(last)}", file=sys.stderr)
        text = ablation_table(done, variants)
        (args.out / "results.json").write_text(json.dumps(done, indent=1))
        (args.out / "results.md").write_text(text)
        time.sleep(0.2 if running else 0)
    print(f"\n{text}\nwritten: {args.out}/results.json, results.md")


def ablation_table(done, variants):
    """Results of variants and seeds -> a markdown table: mean and, over seeds, the standard deviation."""
    lines = [["variant", "right", "diversity of right", "diversity", "distance", "reward", "minutes", "seeds"]]
    for label in variants:
        rows = [r for r in done if r["label"] == label]
        if not rows:
            continue

        def cell(key, style):
            values = [r[key] for r in rows if r[key] is not None]
            spread = f" ± {style.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
            return (style.format(np.mean(values)) + spread) if values else ""

        lines.append([label, cell("right", "{:.1%}"), cell("diversity_right", "{:.1%}"), cell("diversity", "{:.1%}"),
                      cell("distance", "{:.3f}"), f"{rows[0]['reward_base']:.3g} -> {cell('reward', '{:.3g}')}",
                      cell("minutes", "{:.1f}"), str(len(rows))])
    base = f"base: {done[0]['right_base']:.1%} right" if done else "no result yet"
    return f"held-out captions, {base}; ± is the standard deviation over seeds\n\n" + aligned(lines)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Random weights of the true architectures, for drpo.py --random-init, the benchmarks and the tests.

# public configurations of the two models
_UNET = dict(sample_size=64, use_linear_projection=True, layers_per_block=2)
_SCHEDULER = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing",
                  steps_offset=1)
ARCHITECTURES = {
    "sd-turbo": dict(
        unet=dict(block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20),
                  cross_attention_dim=1024),
        text=[dict(hidden_size=1024, num_hidden_layers=23, num_attention_heads=16, intermediate_size=4096,
                   hidden_act="gelu")],
        scaling_factor=0.18215),
    "sdxl-turbo": dict(
        unet=dict(block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
                  transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
                  projection_class_embeddings_input_dim=2816,
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")),
        text=[dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
                   projection_dim=768),
              dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, intermediate_size=5120,
                   hidden_act="gelu", projection_dim=1280)],
        scaling_factor=0.13025),
}


def random_pipeline(name, device="cpu", dtype=torch.float32, vae=None, **override):
    """A pipeline of the named architecture with random weights, made in place: no download. `override` replaces entries
    of ARCHITECTURES[name], `vae` those of the VAE: tests build tiny ones."""
    import diffusers
    import transformers
    arch = {**ARCHITECTURES[name], **override}
    vae = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
               down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
               scaling_factor=arch["scaling_factor"]) | (vae or {})
    tokenizer = _character_tokenizer(transformers)
    with torch.device(device), _default_dtype(dtype):
        unet = diffusers.UNet2DConditionModel(**_UNET | arch["unet"])
        vae = diffusers.AutoencoderKL(**vae)
        encoders = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
        texts = [cls(transformers.CLIPTextConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **kw))
                 for cls, kw in zip(encoders, arch["text"])]
    parts = dict(unet=unet, vae=vae, text_encoder=texts[0], tokenizer=tokenizer)
    if len(texts) == 2:
        return diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=texts[1], tokenizer_2=tokenizer, add_watermarker=False,
            scheduler=diffusers.EulerAncestralDiscreteScheduler(**_SCHEDULER))
    return diffusers.StableDiffusionPipeline(**parts, scheduler=diffusers.EulerDiscreteScheduler(**_SCHEDULER),
                                             safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _character_tokenizer(transformers):
    """A CLIP tokenizer whose words are characters: all that random weights need."""
    import tempfile
    symbols = [chr(c) for c in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *(s + "</w>" for s in symbols)]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer(str(vocab), str(merges), model_max_length=77)


# ----------------------------------------------------------------------------------------------------------------------
# 9. Benchmarks: python eval.py --bench NAME

# Each prints its rows as they come, then a table and one JSON object; what fails or lacks the time says so in its row.

VARIANTS = {  # of the update that is measured: settings beside those of the model's preset
    "eager": dict(model="sd-turbo"), "compile": dict(model="sd-turbo", compile=True),
    "taesd": dict(model="sd-turbo", compile=True, decoder="taesd"),
    "taesd-eager": dict(model="sd-turbo", decoder="taesd"),
    "sdxl": dict(model="sdxl-turbo"), "sdxl-compile": dict(model="sdxl-turbo", compile=True),
}
TINY = dict(batch=2, candidates=4, anchors=2, features="vae", reward="incompressibility")  # with a folder for a model
MICRO = {"sd-turbo": (48, 24, 8, 4, 2), "sdxl-turbo": (16, 4, 2, 1)}


class Bench:
    """What a benchmark is told, and how it reports: device, seconds it may take, a folder in place of true sizes."""

    def __init__(self, device="auto", budget=300.0, model=""):
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.cuda, self.model, self.rows = self.device.startswith("cuda"), model, []
        self.end = time.perf_counter() + budget

    def config(self, model="sd-turbo", **over):
        """The preset of the model with random weights and `pickscore@random`; or TINY settings with the folder."""
        import drpo
        base = {**drpo.PRESETS[model], "reward": "pickscore@random", "prompts": "animals", "steps": 10**6}
        base["random_init"] = True
        base |= {**TINY, "random_init": False} if self.model else {}
        return drpo.Config(**{**base, **over, "model": self.model or model, "device": self.device})

    def cell(self, label, work):
        """One row: label and the figures that work() returns, or why there are none; printed at once, memory freed."""
        try:
            row = work() if time.perf_counter() < self.end else {"error": "not run: time budget spent"}
        except torch.OutOfMemoryError:
            row = {"error": "out of memory"}
        except Exception as e:
            row = {"error": f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]}
        self.rows.append({**label, **row})
        print("  ".join(f"{k} {shown(v)}" for k, v in self.rows[-1].items()), flush=True)
        free(self.cuda)


def run_bench(spec, **kw):
    """`NAME` or `NAME:item,item` -> its rows, after a table and one line of JSON; kw as in `Bench`."""
    name, _, items = spec.partition(":")
    from drpo import pick
    work, bench = pick("benchmark", name, BENCHES), Bench(**kw)
    if bench.cuda:
        print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    work(bench, [item for item in items.split(",") if item])
    print(bench_table(bench.rows))
    device = torch.cuda.get_device_name() if bench.cuda else "cpu"
    print(json.dumps({"bench": spec, "device": device, "torch": torch.__version__, "rows": bench.rows}), flush=True)
    return bench.rows


def free(cuda):
    """Give back what the last cell held, and start the count of peak memory anew."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(cuda):
    """Peak GiB since `free`: of tensors, and with what the allocator holds beside them."""
    peaks = {"peak_gib": torch.cuda.max_memory_allocated, "reserved_gib": torch.cuda.max_memory_reserved}
    return {name: read() / 2**30 for name, read in peaks.items()} if cuda else {}


def shown(value):
    """A figure as short text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bench_table(rows):
    """Rows (dicts) as an aligned Markdown table; a figure that a row lacks stays empty."""
    names = list(dict.fromkeys(k for row in rows for k in row))
    cells = [names, *([shown(row.get(k, "")) for k in names] for row in rows)]
    width = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, width)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def clock(call, cuda, times):
    """Median seconds of call(), after one call to warm up."""
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def matmul_peak(device):
    """TFLOP/s of ten large matmuls in a row, bf16 on a GPU: what the shares refer to."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 20 * n**3 / 1e12 / clock(lambda: [a @ a for _ in range(10)], device.type == "cuda", 5)


class FlopTimer:
    """Takes the place of drpo.Timer: counts the TFLOP of each phase instead of its seconds."""

    def __init__(self):
        self.tflop = {}

    @contextlib.contextmanager
    def __call__(self, phase):
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            yield
        self.tflop[phase] = self.tflop.get(phase, 0.0) + counter.get_total_flops() / 1e12


def count_tflop(T, micro=None):
    """{phase: TFLOP} of an update, counted apart from the timing and not compiled (that would hide operations): with
    micro in the chunks of the run; without, the work alone: some candidates in one chunk, scaled up."""
    import drpo
    P, K, timer, in_time = T.cfg.batch, T.cfg.candidates, FlopTimer(), rewards.in_time
    p, k = (P, K) if micro else (1, min(K, 8))
    noise = torch.stack([drpo.prompt_noise(0, i, (k, *T.G.noise_shape)) for i in range(p)])
    cfg = dataclasses.replace(T.cfg, anchors=min(T.cfg.anchors, k // 2))
    rewards.in_time = lambda call, *_: call()  # the counter sees only its own thread
    try:
        with T.G.eager():
            drpo.drpo_gradient(T.G, T.phi, T.prompts[:p], noise, cfg, micro or p * k, score=T.scorer, timer=timer)
    finally:
        rewards.in_time = in_time
        T.optimizer.zero_grad()
    return {phase: n * P * K / (p * k) for phase, n in timer.tflop.items()}


def measure(step, cuda, updates=5, limit=60.0):
    """Medians of the figures that step() returns, and peak memory: at most `updates` of them, as many as fit in
    `limit` seconds, at least one; one more goes before, to warm up."""
    step()
    free(cuda)
    rows, began = [], time.perf_counter()
    while len(rows) < updates and (not rows or time.perf_counter() - began < limit):
        rows.append(step())
    figures = {k: statistics.median(row.get(k, 0.0) for row in rows) for k in rows[-1] if k.startswith("seconds")}
    return {"s": figures.pop("seconds"), "updates": len(rows), **memory(cuda), **figures}


def measure_trainer(T, updates=5, limit=60.0, phases=True):
    """`measure` for drpo's own update; a micro-batch that had to be halved is said."""
    asked = T.micro
    row = measure(T.train_step, T.G.device.type == "cuda", updates, limit)
    row = {k: v for k, v in row.items() if phases or not k.startswith("seconds_")} | {"micro": T.micro}
    return row | ({"halved from": asked} if T.micro < asked else {})


def process_seconds():
    """Seconds since this process began, interpreter and imports included (Linux)."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        began = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(uptime.read().split()[0]) - began


def bench_update(bench, variants):
    """The update of README's table. first_s: from the Trainer to its first update done, compiled where asked for;
    command_s: the same from the command on, for the variant that goes first. tflop: the work alone; share = tflop / s /
    the measured matmul peak."""
    import drpo
    peak = None

    def one(variant, micro):
        nonlocal peak
        began, over = time.perf_counter(), {"micro_batch": micro} if micro else {}
        T = drpo.Trainer(bench.config(**VARIANTS[variant], **over))
        for _ in range(1 + T.G.compile):  # the first update of --micro-batch auto is not compiled yet
            T.train_step()
        first = {"first_s": time.perf_counter() - began} | ({} if peak else {"command_s": process_seconds()})
        peak = peak or matmul_peak(T.G.device)
        row, tflop = measure_trainer(T, 5), sum(count_tflop(T).values())
        return {**row, **first, "tflop": tflop, "peak": peak, "share": tflop / row["s"] / peak}

    for name in variants or ("eager", "compile", "taesd", "sdxl"):  # eager@24: at --micro-batch 24
        bench.cell({"update": name}, lambda: one(*name.partition("@")[::2]))
        torch.compiler.reset()


def profile(T):
    """`drpo.py --profile`: seconds and TFLOP of each phase of an update, and the share of the measured matmul peak."""
    row, peak = measure_trainer(T), matmul_peak(T.G.device)
    tflop, s = count_tflop(T, T.micro), row["s"]
    phases = {k[8:]: v for k, v in row.items() if k.startswith("seconds_")}
    phases["other"] = s - sum(phases.values())
    tflop["update"] = sum(tflop.values())
    print(bench_table([{"phase": k, "s": v, "of update": f"{v / s:.0%}", "TFLOP": tflop.get(k, 0.0),
                        "of matmul peak": f"{tflop.get(k, 0) / v / peak:.0%}" if v > 0 else ""}
                       for k, v in {**phases, "update": s}.items()]))
    print(f"median of {row['updates']} updates at --micro-batch {T.micro}; matmul peak {peak:.4g} TFLOP/s; "
          f"peak memory {row.get('peak_gib', 0):.1f} GiB")


def bench_profile(bench, variants):
    """The table of `drpo.py --profile` for variants of the update."""
    import drpo
    for name in variants or ("eager",):
        bench.cell({"profile": name}, lambda: profile(drpo.Trainer(bench.config(**VARIANTS[name]))) or {})


def bench_memory(bench, models):
    """Peak memory and seconds of an update by micro-batch: `sd-turbo`, `sdxl-turbo`; `sd-turbo@4`: one micro-batch.
    The prompts of an update go through it in groups of micro / K, at least one: one group is measured, and s is its
    seconds times the number of groups."""
    import drpo
    for name in models or MICRO:
        model, _, only = name.partition("@")
        T = drpo.Trainer(bench.config(model))
        cfg = T.cfg

        def one(micro):
            group = max(1, min(micro // cfg.candidates, cfg.batch))
            T.cfg, T.micro = dataclasses.replace(cfg, batch=group), micro
            row = measure_trainer(T, 5, 8, phases=False)
            return {**row, "s": row["s"] * cfg.batch / group}

        for micro in [only] if only else MICRO[model]:
            bench.cell({"model": model, "--micro-batch": int(micro)}, lambda: one(int(micro)))
        T = None
        free(bench.cuda)


def bench_growth(bench, micro):
    """Seconds and memory of an update as candidates and prompts grow, at one micro-batch (default 48)."""
    import drpo
    T, most = drpo.Trainer(bench.config()), int(micro[0]) if micro else 48

    def one(P, K):
        T.cfg, T.micro = dataclasses.replace(T.cfg, batch=P, candidates=K, anchors=min(8, K // 2)), min(most, P * K)
        return measure_trainer(T, 5, 8, phases=False)

    for K in (4, 6) if bench.model else (8, 16, 24, 32, 64):
        for P in (1, 2) if bench.model else (1, 4, 8):
            bench.cell({"candidates": K, "prompts": P}, lambda: one(P, K))


def bench_pickscore(bench, _):
    """Scoring an update's 192 pictures from a tensor on the device: at once, with new prompts, in chunks of 24."""
    import rewards
    B = 4 if bench.model else 192
    reward = rewards.load(TINY["reward"] if bench.model else "pickscore@random", bench.device)
    x, turn = torch.rand(B, 3, 512, 512, device=bench.device), iter(range(99))
    prompts = [f"prompt {i // 24}" for i in range(B)]
    for name, call in {
            "at once": lambda: reward.score(x, prompts),
            "with new prompts": lambda: reward.score(x, [f"{p} {n}" for n in [next(turn)] for p in prompts]),
            "in chunks of 24": lambda: [reward.score(part, prompts[:24]) for part in x.split(24)],
            "preprocessing alone": lambda: rewards.clip_pixels(x, x.device)}.items():
        bench.cell({"pickscore": name, "images": B}, lambda: {"s": clock(call, bench.cuda, 5), **memory(bench.cuda)})


# --- numbers that stay right ---


class FixedScores:
    """Stands for a reward: each prompt of a step has scores of its own, whatever the pictures."""
    at = 0

    def __call__(self, images, prompts):
        pass

    def finish(self, P, K):
        self.at += P
        seeds = [torch.Generator().manual_seed(i) for i in range(self.at - P, self.at)]
        return torch.stack([torch.rand(K, generator=g) for g in seeds])

    def logged(self):
        self.at = 0
        return {}


def twin(bench, dtype, exact=None, **kw):
    """A generator with the weights of `exact`, a LoRA with B not zero (else A has no gradient), and features. The
    first, in float32, gets an output of RMS 1, as a trained one has. -> G, phi, trainable weights."""
    import drpo
    torch.manual_seed(0)
    kw |= dict(device=bench.device, dtype=dtype, random_init=not bench.model)
    G = drpo.load_generator(bench.model or "sd-turbo", **kw)
    prompts, e = ["a red cube", "a cat"], torch.randn(4, *G.noise_shape, generator=torch.Generator().manual_seed(0))
    if exact:
        for net in ("unet", "vae", "text_encoder"):
            getattr(G.pipe, net).load_state_dict(dict(exact.base_weights[net]))
    else:
        with torch.no_grad():
            rms = G.call_unet(e.to(G.device), G.t, drpo.rows(G.encode(prompts * 2), slice(None))).square().mean().sqrt()
            G.unet.conv_out.weight.div_(rms), G.unet.conv_out.bias.div_(rms)
        G.base_weights = {net: getattr(G.pipe, net).state_dict() for net in ("unet", "vae", "text_encoder")}
    torch.manual_seed(1)
    params = G.add_lora(16, 16.0)
    for module in G.lora.values():
        torch.nn.init.normal_(module.B, std=0.02)
    torch.manual_seed(2)
    return G, drpo.load_features("vae" if bench.model else "latent-mae", G, True), params


def vae_in_half(bench):
    """The SDXL VAE at true size, its first layer scaled so that activations pass 65504: fp16 must be lifted."""
    import drpo
    text = [dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=32)]
    unet = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=2,
                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    pipe = random_pipeline("sdxl-turbo", bench.device, torch.float32, text=text * 2, unet=unet)
    G = drpo.Generator(pipe, bench.device, torch.float16)
    G.vae.decoder.conv_in.weight.data.mul_(1e6)
    x = torch.randn(1, 4, 8, 8, device=bench.device)
    lifted, plain = G.decode(x).isnan().sum(), G.vae.half() and G.decode(x).isnan().sum()
    return {"dtype": "fp16", "NaN as it runs": int(lifted), "NaN in plain fp16": int(plain)}


def bench_numbers(bench, parts):
    """bf16 against float32, micro-batches against the whole, compiled against eager; parts: bf16, micro, vae, compile.
    Latents have RMS about 1 in a trained model, so the error that counts is the RMS of the difference."""
    import drpo
    torch.backends.cudnn.allow_tf32 = False
    P, K, prompts = 2, 8, ["a red cube", "a cat"]
    cos = lambda a, b: float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))

    def outputs(made, micro=P * K, fields=("dipole", "released")):
        G, phi, params = made
        e = torch.stack([drpo.prompt_noise(0, i, (K, *G.noise_shape)) for i in range(P)])
        c, first = drpo.rows(G.encode(prompts), torch.arange(P).repeat_interleave(K)), e.flatten(0, 1).to(G.device)
        out = {"latents": G.sample(first, c)}
        out["latents"].mul(first.flip(0)).mean().backward()  # a fixed direction: the network's own gradient
        for field in (None, *fields):
            if field:
                radii = (0.2, 0.5, 1.0) if field == "dipole" else (0.02, 0.05, 0.2)
                cfg = drpo.Config(field=field, anchors=4, radii=radii)
                drpo.drpo_gradient(G, phi, prompts, e, cfg, micro, score=FixedScores())
            out[field or "network"] = torch.cat([p.grad.flatten() for p in params]) / (G.loss_scale if field else 1)
            for p in params:
                p.grad = None
        return {k: v.detach().float() for k, v in out.items()}

    def against(a, b):
        d = a["latents"] - b["latents"]
        rms = lambda x: float(x.square().mean().sqrt())
        return {"rms_difference": rms(d), "rms_latents": rms(b["latents"]),
                **{f"cosine_{k}": cos(a[k], b[k]) for k in a if k != "latents"}}

    def rounded_end():
        G = made[0]
        G.unet.conv_norm_out._forward_pre_hooks.clear()
        G.unet.conv_norm_out.bfloat16(), G.unet.conv_out.bfloat16()
        return against(outputs(made), exact)

    parts = parts or ["bf16", "micro", "vae", "compile"]
    base = twin(bench, torch.float32)
    exact = outputs(base)
    if "micro" in parts:
        bench.cell({"numbers": "float32, micro-batch 3 against whole"}, lambda: against(outputs(base, 3), exact))
    made = twin(bench, torch.bfloat16, base[0])
    eager = outputs(made)
    if "bf16" in parts:
        bench.cell({"numbers": "bf16 against float32"}, lambda: against(eager, exact))
    if "micro" in parts:
        bench.cell({"numbers": "bf16, micro-batch 3 against whole"}, lambda: against(outputs(made, 3), eager))
    if "bf16" in parts:
        bench.cell({"numbers": "bf16, last layers too, against float32"}, rounded_end)
    if "vae" in parts:
        bench.cell({"numbers": "SDXL VAE"}, lambda: vae_in_half(bench))
    if "compile" in parts:
        made = twin(bench, torch.bfloat16, base[0], compile=True)
        bench.cell({"numbers": "bf16 compiled against float32"}, lambda: against(fast := outputs(made), exact) |
                   {f"{k} (eager)": v for k, v in against(fast, eager).items()})


# --- the cost of a large reward: ranking by it against differentiating it ---


class VisionLanguageReward:
    """Qwen2-VL-7B's shape with random weights: 256 image tokens, 32 of text; a fixed projection of the last state."""

    def __init__(self, device, small=False):
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration as Model
        text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                    num_key_value_heads=4, vocab_size=152064,
                    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]})
        vision = dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, patch_size=14)
        if small:
            text |= dict(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
                         num_key_value_heads=1)
            vision |= dict(depth=2, embed_dim=32, hidden_size=128, num_heads=2)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                net = Model(Qwen2VLConfig(text_config=text, vision_config=vision))
        finally:
            torch.set_default_dtype(default)
        self.net = net.eval().requires_grad_(False).model
        self.direction, self.batch_size = torch.randn(text["hidden_size"], device=device), 16

    def score_tensor(self, images, prompts):
        """(B, 3, H, W) in [0, 1] -> (B,), differentiable: cut into patches in the order of Qwen's processor."""
        B, dev = len(images), images.device
        x = torch.nn.functional.interpolate(images.float(), (448, 448), mode="bicubic", antialias=True) * 4 - 2
        x = x.reshape(B, 3, 16, 2, 14, 16, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, blocks, 2x2 patches, 3, 14, 14
        x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(B * 1024, 3 * 2 * 14 * 14).bfloat16()
        ids = [151652, *[151655] * 256, 151653, *range(1000, 1032)]
        at = torch.arange(256, device=dev)
        image = torch.stack([at * 0, at // 16, at % 16]) + 1  # rotary positions: time, row, column
        after = torch.arange(17, 17 + 33, device=dev).expand(3, -1)
        positions = torch.cat([image[:, :1] * 0, image, after], 1)[:, None].expand(-1, B, -1)
        grid = torch.tensor([[1, 32, 32]] * B, device=dev)
        h = self.net(input_ids=torch.tensor([ids] * B, device=dev), pixel_values=x, image_grid_thw=grid,
                     position_ids=positions, use_cache=False).last_hidden_state[:, -1]
        return h.float() @ self.direction


def reward_gradient_step(T, reward, chunk, checkpoint):
    """The same update by the gradient of the reward itself: sample, decode, score differentiated, chunk by chunk."""
    import drpo
    cfg, G, began = T.cfg, T.G, time.perf_counter()
    noise = torch.cat([drpo.prompt_noise(0, i, (cfg.candidates, *G.noise_shape)) for i in range(cfg.batch)])
    prompts = [T.prompts[i // cfg.candidates] for i in range(len(noise))]
    T.optimizer.zero_grad()
    condition, e = G.encode(T.prompts[:cfg.batch]), noise.to(G.device)
    wrap = lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False) if checkpoint else f(x)
    for i in torch.arange(len(e)).split(chunk):
        images = wrap(G.decode, G.sample(e[i], drpo.rows(condition, (i // cfg.candidates).to(G.device))))
        scores = wrap(lambda x: reward.score_tensor(x, [prompts[j] for j in i]), images)
        (-scores.sum() / len(e) * G.loss_scale).backward()
    norm = torch.nn.utils.clip_grad_norm_(T.params, cfg.clip)
    T.optimizer.step()
    return {"seconds": time.perf_counter() - began, "grad_norm": float(norm)}


def bench_reward_cost(bench, _):
    """Updates of 8 x 24 images with a 7B reward: ranked by it (DrPO) against differentiated through it. That takes the
    largest chunk of 8, 4, 2, 1 images that fits, checkpointing only where not even 1 does."""
    import drpo
    import rewards
    T = drpo.Trainer(bench.config(micro_batch="4" if bench.model else "24"))
    vlm = VisionLanguageReward(T.G.device, small=bool(bench.model))
    reward = rewards.Reward("vlm", {"vlm": vlm}, {"vlm": 1.0})
    T.scorer = drpo.Scorer(reward, [], 600)
    bench.cell({"reward": "7B", "update": "DrPO"}, lambda: measure_trainer(T, 5, 30))
    for chunk, checkpoint in ((8, False), (4, False), (2, False), (1, False), (2, True), (1, True)):
        bench.cell({"reward": "7B", "update": "reward gradient", "micro": chunk, "checkpointing": checkpoint},
                   lambda: measure(lambda: reward_gradient_step(T, vlm, chunk, checkpoint), bench.cuda, 3, 40))
        if "s" in bench.rows[-1]:
            break
    if all("s" in row for row in (bench.rows[0], bench.rows[-1])):
        bench.rows.append({"reward": "7B", "update": "ratio", "s": bench.rows[-1]["s"] / bench.rows[0]["s"]})


BENCHES = {"update": bench_update, "profile": bench_profile, "memory": bench_memory, "numbers": bench_numbers,
           "growth": bench_growth, "reward-cost": bench_reward_cost, "pickscore": bench_pickscore}


# ----------------------------------------------------------------------------------------------------------------------
# 10. The command line.

def parse(argv):
    """Command line -> settings, with device and the folder of the output filled in."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("runs", nargs="*", metavar="RUN_OR_LORA", help="folders of runs, or LoRA files, of one base")
    p.add_argument("--model", default="", help="the base; default: what the run or the file says")
    p.add_argument("--prompts", default="", help="built-in name or file; default: scenes-test, or pickapic-test")
    p.add_argument("--limit", type=int, default=0, help="evaluate so many of the prompts, evenly picked")
    p.add_argument("--rewards", default="", help="names, comma-separated; default: those of the run")
    p.add_argument("--samples", type=int, default=8, help="pictures a prompt [8]")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise [0]")
    p.add_argument("--out", default="", help="folder of the report; default: eval in the first run's folder")
    p.add_argument("--best-of", type=int, default=1, metavar="N", help="a column: the best of N pictures of the base")
    p.add_argument("--judge", default="", metavar="URL", help="vision model, http://host:port/v1?model=NAME")
    p.add_argument("--generate", action="append", metavar="PROMPT", help="pictures side by side, no report")
    p.add_argument("--save-pictures", action="store_true", help="write every picture to OUT/pictures")
    p.add_argument("--batch", type=int, default=16, help="pictures at once [16]")
    p.add_argument("--device", default=cuda, help=f"[{cuda}]")
    p.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    p.add_argument("--any-base", action="store_true", help="accept a LoRA whose file names another base")
    p.add_argument("--ablate", default="", metavar="NAME,...",
                   help=f"train and compare on the toy: {', '.join(ABLATIONS)}")
    p.add_argument("--seeds", default="0", help="seeds of an ablation, comma-separated [0]")
    p.add_argument("--steps", type=int, default=0, help="steps of an ablation; default: the toy's")
    p.add_argument("--jobs", type=int, default=1, help="processes of an ablation at once [1]")
    p.add_argument("--bench", default="", metavar="NAME[:ITEM,...]", help=f"a benchmark: {', '.join(BENCHES)}")
    p.add_argument("--budget", type=float, default=600, help="seconds that a benchmark may take [600]")
    p.add_argument("--variant", default="", help=argparse.SUPPRESS)  # one process of an ablation

    def fail(message):
        raise UserError(f"{message} (python eval.py --help lists the options)")
    p.error = fail
    args = p.parse_args(argv)
    first = Path(args.runs[0] if args.runs else ".")
    home = first if first.is_dir() else first.parent
    args.out = Path(args.out or (f"runs/ablation-{args.ablate}" if args.ablate else home / "eval"))
    return args


def main(argv=None):
    """python eval.py ...; what the user can mend ends with one line and exit code 2."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.variant:
            ablate_one(args.variant)
        elif args.bench:
            run_bench(args.bench, device=args.device, budget=args.budget, model=args.model)
        else:
            (ablate if args.ablate else side_by_side if args.generate else evaluate)(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
