"""Did it help? A tuned model against its base, on the same prompts and the same noise.

    python eval.py RUN_OR_LORA ...           tables, win rates, pictures -> RUN/eval/, RUN/curve.png
    python eval.py runs/toy --best-of 16     ... beside picking the best of 16 pictures of the base
    python eval.py runs/a runs/b --rewards pickscore,aesthetic --prompts my.txt
    python eval.py runs/a --judge "http://host:8000/v1?model=NAME"
    python eval.py runs/toy --generate "a red circle" --generate "three blue squares"
    python eval.py --curve runs/toy          the curve alone, also while the run is going on

All intervals are 95% percentile intervals of a bootstrap over PROMPTS (2000 resamples, fixed seed).
    difference          mean of tuned minus base, picture by picture (same prompt, same noise)
    win rate            share of pictures that score above the base's of the same noise; a tie is half
    right               share of pictures that a checker (scene, geneval) finds right
    diversity           L2 distance of the latents of two pictures of a prompt, mean over pairs, then
                        over prompts
    diversity of right  the same among right pictures, on the SAME prompts, those where base and
                        tuned have two right ones each: hard prompts have another diversity
    distance to base    RMS difference of the latents of two pictures of the same noise
    best of N           N candidates of the BASE for each picture, the best by the ranked reward
The same command twice on a CPU writes the same report.json bit for bit; speeds go to timing.json.
"""
import argparse
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

import drpo
import rewards
from rewards import UserError, write_atomic

# ===== 1. Statistics, on arrays of P prompts and N pictures each.

def interval(total, count, resamples=2000, seed=0):
    """sum(total) / sum(count) over prompts, both (P,), and its 95% bootstrap interval.

    -> [value, low, high]; None: a value of no pictures, an interval of a single prompt."""
    total = np.asarray(total, np.float64)
    count = np.asarray(count, np.float64)
    total, count = total[count > 0], count[count > 0]
    n = len(total)
    if n < 2:
        return [mean_or_none(total / count), None, None]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)  # (resamples, P)
    low, high = np.percentile((draws @ total) / (draws @ count), [2.5, 97.5])
    return [float(total.sum() / count.sum()), float(low), float(high)]


def mean_interval(values):
    """Mean of (P, N), NaN left out, with its interval."""
    return interval(np.nansum(values, 1), (~np.isnan(values)).sum(1))


def compare(base, tuned):
    """Scores (P, N) of the same prompts and noise -> mean, paired difference, win rate of tuned."""
    base, tuned = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    return {"mean": mean_interval(tuned), "difference": mean_interval(tuned - base),
            "win_rate": mean_interval((np.sign(tuned - base) + 1) / 2)}


def pair_distances(x, keep=True):
    """Latents x (P, N, D), keep: boolean (P, N) -> mean L2 distance over the kept pairs of each prompt
    (P,), NaN where fewer than two are kept."""
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").double().numpy()  # (P, N, N)
    keep = np.broadcast_to(keep, d.shape[:2])
    pairs = keep[:, :, None] & keep[:, None, :] & ~np.eye(d.shape[1], dtype=bool)
    with np.errstate(invalid="ignore"):
        return (d * pairs).sum((1, 2)) / pairs.sum((1, 2))


def diversity(base, tuned, keep_base=True, keep_tuned=True):
    """Latents (P, N, D), boolean masks (P, N) -> mean diversity of tuned and of base where a prompt
    has both, the ratio with its interval, the number of these prompts; own: mean of tuned's."""
    a = pair_distances(base, keep_base)  # (P,)
    b = pair_distances(tuned, keep_tuned)
    both = ~np.isnan(a) & ~np.isnan(b)
    return {"mean": mean_or_none(b[both]), "base": mean_or_none(a[both]),
            "relative": interval(b[both], a[both]), "prompts": int(both.sum()),
            "own": mean_or_none(b[~np.isnan(b)])}


def mean_or_none(values):
    """Mean of an array, None of an empty one."""
    return float(values.mean()) if len(values) else None


# ===== 2. Pictures of a model, and what rewards say about them.

NOISE_SEED = 1_000_003  # added to --seed: a run's own noise comes from small seeds


def generate(G, prompts, n, seed, at_once):
    """n pictures of each prompt by the generator as it stands, `at_once` at a time: yields flat
    indices p n + i, latents (B, 4, h, w), pictures (B, 3, H, W) in [0, 1]. Noise i of prompt p
    depends on (seed, p, i) alone."""
    for first in range(0, len(prompts), at_once):
        condition = G.encode(prompts[first:first + at_once])
        flat = torch.arange(first * n, min(first + at_once, len(prompts)) * n)
        for chunk in flat.split(at_once):
            noise = []
            for f in chunk.tolist():
                position = f // n * 2 ** 20 + f % n
                noise.append(drpo.prompt_noise(seed + NOISE_SEED, position, G.noise_shape))
            owner = (chunk // n - first).to(G.device)
            with torch.no_grad():
                x = G.sample(torch.stack(noise).to(G.device), drpo.rows(condition, owner))
                yield chunk.tolist(), x, G.decode(x)


class Pictures:
    """Pictures of one model and what rewards say: x (P, N, D) latents, scores {reward: (P, N)}, right
    {checker: (P, N)} of 1, 0 and NaN, kept {(p, i): PIL picture}, seconds of sampling and decoding."""

    def __init__(self, G, prompts, n, args, reward):
        """n pictures of each prompt; kept are those that the report shows or a judge looks at."""
        latents, found = [], {}  # {("scores", name) or ("right", name): parts}
        self.kept, self.scores, self.right = {}, {}, {}
        self.seconds, began = 0.0, time.perf_counter()
        for flat, x, images in generate(G, prompts, n, args.seed, args.batch):
            pictures = rewards.to_pil(images)
            texts = [prompts[f // n] for f in flat]
            self.seconds += time.perf_counter() - began
            latents.append(x.flatten(1).float().cpu())
            for name, values in reward.score(images, texts).items():
                found.setdefault(("scores", name), []).append(values)
            for name, part in reward.parts.items():
                if hasattr(part, "correct"):
                    copies = [picture.copy() for picture in pictures]
                    verdicts = np.array(part.correct(copies, list(texts)), dtype=float)  # None: NaN
                    found.setdefault(("right", name), []).append(torch.from_numpy(verdicts).float())
            for f, picture in zip(flat, pictures):
                if f % n % args.samples == 0 and (args.judge or f // n in args.shown):
                    self.kept[f // n, f % n] = picture
            began = time.perf_counter()
        self.x = torch.cat(latents).reshape(len(prompts), n, -1)
        for (kind, name), parts in found.items():
            getattr(self, kind)[name] = torch.cat(parts).reshape(len(prompts), n)

    def take(self, index):
        """Keep of the candidates (P, N) those with numbers index (P, S)."""
        self.x = self.x[torch.arange(len(index))[:, None], index]
        for table in (self.scores, self.right):
            for name, values in table.items():
                table[name] = values.gather(1, index)
        self.kept = {(p, 0): self.kept[p, int(index[p, 0])] for p, _ in self.kept}


def best_index(reward, ranked, scores, samples):
    """Scores {part: (P, N S)} of S = samples slots, candidate c of slot s at c S + s -> (P, S)."""
    slots = {name: scores[name].unflatten(1, (-1, samples)).mT for name in ranked}  # (P, S, N)
    values = reward.combine(slots)
    return values.nan_to_num(nan=-torch.inf).argmax(-1) * samples + torch.arange(samples)


# ===== 3. Runs and LoRA files.

def open_run(path):
    """A run's folder or a LoRA file -> its settings; "model" is the base it was made for."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run or LoRA file")
    metadata = rewards.lora_metadata(path)
    saved = {}
    if (path / "config.json").is_file():
        saved = rewards.read_config(path)
    elif metadata.get("settings"):  # a file of ours carries them
        saved = json.loads(metadata["settings"])
    saved["file"] = rewards.lora_file(path)
    saved["made_for"] = metadata.get("base_model", "")
    saved["unet"] = saved.get("unet") or metadata.get("base_unet", "")
    saved["model"] = saved.get("model") or saved["made_for"]
    return saved


def load_tuned(G, saved, any_base):
    """Put a run's LoRA into the generator, whose reference stays the base."""
    made_for = saved["made_for"]
    if made_for and Path(made_for).name != Path(G.name).name and not any_base:
        raise UserError(f"{saved['file']} was made for the base {made_for}, not for {G.name} "
                        "(--any-base tries it all the same)")
    G.load_lora(saved["file"])


def file_name(label):
    """A label as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-")


def labels_of(paths):
    """Short names of runs: the last part of the path, all of it where two are alike."""
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = list(map(str, paths))
    return [re.sub("^base", "run base", name) for name in names]


def choose_rewards(args, runs):
    """-> one Reward of all that is scored, and the names that --best-of ranks by: the run's own
    reward, or the first of --rewards."""
    specs = []
    for run in runs:
        specs += filter(None, (run.get("reward"), run.get("watch")))
    if args.rewards:
        specs = [args.rewards]
    if not specs:
        raise UserError("no rewards to score by: name them, --rewards pickscore,aesthetic")
    weights = {}
    for spec in specs:
        for name, weight in rewards.parse(spec).items():
            weights.setdefault(name, weight)
    ranked = rewards.parse(specs[0])
    if args.rewards:
        ranked = dict(list(ranked.items())[:1])
    parts = {name: rewards.build(name, args.device) for name in weights}
    return rewards.Reward(",".join(weights), parts, ranked), list(ranked)


def evenly(items, n):
    """n of the items, or all, evenly picked."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def prepare(args):
    """All that an evaluation needs -> generator, settings of the runs, prompts. UserError for what
    is missing, cheap things first."""
    if not args.runs:
        raise UserError("name a run's folder or a LoRA file (python eval.py --help)")
    if min(args.samples, args.batch, args.best_of) < 1:
        raise UserError("--samples, --batch and --best-of are at least 1")
    runs = list(map(open_run, args.runs))
    bases = {(args.model or run["model"], run["unet"]) for run in runs}
    if len(bases) > 1:
        names = ", ".join(sorted(map(" ".join, bases)))
        raise UserError(f"runs of different bases ({names}): evaluate them one base at a time")
    (model, unet), = bases
    if not model:
        raise UserError(f"{args.runs[0]} does not say which base it was made for: give --model")
    if not args.prompts:
        args.prompts = "scenes-test" if drpo.layout(model) == "toy" else "pickapic-test"
    prompts = args.generate or list(dict.fromkeys(rewards.load_prompts(args.prompts)))
    prompts = evenly(prompts, args.limit or len(prompts))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    dtype = args.dtype.replace("auto", "bf16" if args.device.startswith("cuda") else "fp32")
    one_step = {name: runs[0][name] for name in ("timestep", "prediction") if name in runs[0]}
    G = drpo.load_generator(model, device=args.device, dtype=drpo.DTYPES[dtype], unet=unet, **one_step)
    return G, runs, prompts


# ===== 4. The report.

def figures(base, other, reward, prompts):
    """All figures of one column of the table, as plain data: see the top of the file."""
    found = {"rewards": {}, "accuracy": {}, "diversity": diversity(base.x, other.x),
             "right_diversity": {}, "distance": float((other.x - base.x).square().mean().sqrt()),
             "per_prompt": {}}
    for name in base.right:
        a, b = base.right[name].numpy(), other.right[name].numpy()  # (P, N)
        tags = np.array([str(reward.parts[name].tag(prompt)) for prompt in prompts])
        groups = {"all": tags != "None"}
        for tag in sorted(set(tags) - {"None"}):
            groups[tag] = tags == tag
        found["accuracy"][name] = {tag: {**compare(a[of], b[of]), "prompts": int(of.sum())}
                                   for tag, of in groups.items()}
        found["right_diversity"][name] = diversity(base.x, other.x, a == 1, b == 1)
    for name, scores in other.scores.items():
        found["rewards"][name] = compare(base.scores[name], scores)
        found["per_prompt"][name] = [mean_or_none(row[~np.isnan(row)]) for row in scores.numpy()]
    return found


def evaluate(args):
    """Base and every run on the same prompts and noise -> the report, written to args.out as well."""
    G, runs, prompts = prepare(args)
    reward, ranked = choose_rewards(args, runs)
    args.out.mkdir(parents=True, exist_ok=True)
    args.shown = evenly(range(len(prompts)), 8)
    speed, columns = {}, {}

    def pictures(label, best_of=1):
        found = Pictures(G, prompts, args.samples * best_of, args, reward)
        count = found.x.shape[0] * found.x.shape[1]
        speed[label] = {"pictures": count, "seconds": found.seconds}
        print(f"{label}: {count} pictures, {count / found.seconds:.1f} a second", flush=True)
        columns[label] = found

    with G.reference():
        pictures("base")
    for label, saved in zip(labels_of(args.runs), runs):
        load_tuned(G, saved, args.any_base)
        pictures(label)
    if args.best_of > 1:
        label = f"base best-of-{args.best_of}"
        with G.reference():
            pictures(label, args.best_of)
        columns[label].take(best_index(reward, ranked, columns[label].scores, args.samples))
    report = {"model": G.name, "prompts": args.prompts, "samples": args.samples, "seed": args.seed,
              "ranked": ranked, "rewards": list(reward.parts), "texts": prompts, "columns": {}}
    for label, column in columns.items():
        report["columns"][label] = figures(columns["base"], column, reward, prompts)
    if args.judge:
        for label in list(columns)[1:]:
            before = [columns["base"].kept[p, 0] for p in range(len(prompts))]
            after = [columns[label].kept[p, 0] for p in range(len(prompts))]
            report["columns"][label]["judge"] = judge(args.judge, prompts, before, after)
    write_report(args.out, report, speed, columns, args.shown)
    for path in args.runs:
        draw_curve(rewards.read_metrics(path), Path(path) / "curve.png")
    return report


def write_report(out, report, speed, columns, shown):
    """report.json, report.md, timing.json and grid.png, and the table on the terminal."""
    text = table(report)
    write_atomic(out / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    write_atomic(out / "timing.json", json.dumps(speed, indent=1).encode())
    write_atomic(out / "report.md", text.encode())
    rows = []
    for column in columns.values():
        row = [column.kept[p, 0].copy() for p in shown]
        for verdicts in list(column.right.values())[:1]:
            row = [marked(picture, float(verdicts[p, 0])) for picture, p in zip(row, shown)]
        rows.append(row)
    captions = [report["texts"][p] for p in shown]
    rewards.picture_grid(rows, captions, list(columns)).save(out / "grid.png")
    print(f"\n{text}\nwritten: {out}/report.json, report.md, grid.png")


def marked(picture, verdict):
    """A picture with a green corner where it is right, a red one where it is wrong."""
    if verdict != verdict:
        return picture
    scale = max(1, 160 // picture.width)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    right = picture.width - 1
    corner = picture.width // 10
    color = "#2a9d4e" if verdict else "#d43d3d"
    ImageDraw.Draw(picture).polygon([(right - corner, 0), (right, 0), (right, corner)], color)
    return picture


def number(v, style="{:.4g}"):
    """[value, low, high], a number, a dict of them or None as text."""
    if v is None:
        return ""
    if isinstance(v, dict):
        return style.format(**v)
    if not isinstance(v, list):
        return style.format(v)
    text = number(v[0], style)
    return text if v[1] is None else f"{text} [{number(v[1], style)}, {number(v[2], style)}]"


def at(value, path):
    """What stands at a path of keys in nested dicts and lists, or None."""
    for key in path:
        if value is None or isinstance(value, dict) and key not in value:
            return None
        value = value[key]
    return value


def table(report):
    """The figures of a report as one markdown table, aligned so that it reads in a terminal too."""
    columns = report["columns"]
    lines = [["", *columns]]

    def row(title, *path, style="{:.4g}", of_base=True):
        """A line of the figures at a path of keys in each column; not of_base: the base has none."""
        cells = [number(at(column, path), style) for column in columns.values()]
        if not of_base:
            cells[0] = ""
        if any(cells):  # of my/file.py:function the folder is left out
            lines.append([re.sub(r"\S*/(?=[^/]*\.py:)", "", title), *cells])

    percent = "{:.1%}"
    for name in report["rewards"]:
        row(f"{name}: mean", "rewards", name, "mean")
        row("  difference to base", "rewards", name, "difference", style="{:+.4g}", of_base=False)
        row("  win rate against base", "rewards", name, "win_rate", style=percent, of_base=False)
    for name, groups in columns["base"]["accuracy"].items():
        row(f"{name}: right", "accuracy", name, "all", "mean", style=percent)
        row("  difference to base", "accuracy", name, "all", "difference", style="{:+.1%}", of_base=False)
        for tag in list(groups)[1:]:
            title = f"  {tag} ({groups[tag]['prompts']} prompts)"
            row(title, "accuracy", name, tag, "mean", 0, style=percent)
    row("diversity", "diversity", "mean")
    row("  relative to base", "diversity", "relative", style=percent, of_base=False)
    for name in columns["base"]["right_diversity"]:
        row(f"diversity of right ({name})", "right_diversity", name, "own")
        row("  relative to base, same prompts", "right_diversity", name, "relative", style=percent, of_base=False)
    row("distance to base", "distance")
    row("judge: win rate against base", "judge", "win_rate", style=percent)
    row("  wins / ties / losses", "judge", style="{wins} / {ties} / {losses}")
    head = "{prompts}: {} prompts, {samples} pictures each, base {model}; in brackets 95% bootstrap intervals"
    return head.format(len(report["texts"]), **report) + " over prompts\n\n" + aligned(lines)


def aligned(lines):
    """Rows of cells, the first of them the head -> a markdown table with columns of equal width."""
    width = [max(map(len, cells)) for cells in zip(*lines)]
    out = []
    for line in lines:
        out.append("| " + " | ".join(map(str.ljust, line, width)) + " |")
    out.insert(1, "|" + "|".join("-" * (w + 2) for w in width) + "|")
    return "\n".join(out) + "\n"


# ===== 5. A judge: a vision-language model that sees two pictures and says which is better.

QUESTION = """Two pictures, A and B, were made for this text: {prompt}
Which of them shows the text better and looks better? Answer with one line of the form
Answer: A
or Answer: B, or Answer: tie"""


def judge(address, prompts, base, tuned):
    """Ask about each pair of PIL pictures in both orders -> counts, and the win rate of tuned.

    A pair scores the mean of its two answers: opposite ones are a tie; one without an answer drops
    the pair."""
    vlm = rewards.Vlm(address)

    def ask(prompt, a, b):  # -> 1 for A, 0 for B, 0.5 for a tie, NaN for no answer
        content = [{"type": "text", "text": QUESTION.format(prompt=prompt)}]
        for name, image in (("A", a), ("B", b)):
            content += [{"type": "text", "text": f"Picture {name}:"}, rewards.image_part(image)]
        reply = re.sub(r"[*_`]", "", vlm.ask(content) or "")
        found = re.findall(r"answer\W*(a|b|tie)\b", reply, re.I) or re.findall(r"^\W*(a|b|tie)\W*$", reply, re.I)
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[-1].lower()] if found else np.nan

    with ThreadPoolExecutor(8) as pool:
        first = np.array(list(pool.map(ask, prompts, base, tuned)))  # base shown first
        second = np.array(list(pool.map(ask, prompts, tuned, base)))
    score = (1 - first + second) / 2  # (P,): 1 tuned, 0 base
    found = {"win_rate": mean_interval(score[:, None])}
    for name, which in (("wins", score > 0.5), ("ties", score == 0.5), ("losses", score < 0.5),
                        ("no_answer", np.isnan(score)),
                        ("order_decided", np.abs(first + second - 1) == 1)):  # twice the same place
        found[name] = int(which.sum())
    return found


def side_by_side(args):
    """--generate: the same noise through base and every run -> generate.png, and single pictures."""
    G, runs, prompts = prepare(args)
    each = min(args.samples, 4 if len(prompts) > 1 else 8)
    (args.out / "generate").mkdir(parents=True, exist_ok=True)
    rows = []
    names = ["base", *labels_of(args.runs)]
    for label, saved in zip(names, [None, *runs]):
        if saved:
            load_tuned(G, saved, args.any_base)  # before it the generator is the base
        row = []
        for _, _, images in generate(G, prompts, each, args.seed, args.batch):
            row += rewards.to_pil(images)
        for n, picture in enumerate(row):
            picture.save(args.out / "generate" / f"{n // each:02d}-{n % each}-{file_name(label)}.png")
        rows.append(row)
    captions = [prompts[n // each] if n % each == 0 else "" for n in range(len(prompts) * each)]
    rewards.picture_grid(rows, captions, names).save(args.out / "generate.png")
    print(f"written: {args.out}/generate.png, and the pictures in {args.out}/generate/")


# ===== 6. The curve of a run.

INK, FAINT, GRID = "#22262e", "#707784", "#e4e6eb"
BLUE, PALE_BLUE, ORANGE, GREEN = "#2563c9", "#dbe6f8", "#c9622b", "#2f8f5b"
PANEL = 880, 620  # pixels of a panel at twice its size: halving smooths the lines


def series(metrics, key):
    """[(step, value)] of the finite numbers under a key."""
    return [(m["step"], m[key]) for m in metrics
            if isinstance(m.get(key), (int, float)) and np.isfinite(m[key])]


def draw_curve(metrics, path):
    """curve.png of a run: the reward's mean within best to worst, every watched reward, and
    diversity, over steps."""
    keys = {"reward_mean": ("reward (band: best to worst of a prompt)", BLUE)}
    for key in sorted(set().union(*metrics)):
        if key.startswith("watch/"):
            keys[key] = f"watched: {key[6:]}", ORANGE
    keys["diversity"] = "diversity within a prompt (base 1)", GREEN
    panels = []
    for key, (title, color) in keys.items():
        band = []
        if key == "reward_mean":
            worst = dict(series(metrics, "reward_worst"))
            band = [(step, worst.get(step, v), v) for step, v in series(metrics, "reward_best")]
        if series(metrics, key):
            panels.append((title, series(metrics, key), color, band))
    if not panels:
        return
    image = Image.new("RGB", (PANEL[0] * len(panels), PANEL[1]), "white")
    for n, panel in enumerate(panels):
        draw_panel(ImageDraw.Draw(image), n * PANEL[0], panel, metrics[-1]["step"])
    file = path.with_suffix(".tmp.png")
    image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(file)
    file.replace(path)


def ticks(low, high, most=5, least=1e-12):
    """Round numbers that cover low..high: a step of 1, 2 or 5 times a power of ten, at least `least`."""
    for step in np.outer(10.0 ** np.arange(-12, 13), (1, 2, 5)).flat:
        if (high - low) / step <= most and step >= least:
            break
    return np.arange(np.floor(low / step + 1e-6), np.ceil(high / step - 1e-6) + 1) * step


def draw_panel(draw, x0, panel, last):
    """One diagram over steps 0..last at x0: title, [(step, value)], colour, [(step, low, high)]."""
    title, points, color, band = panel
    small = ImageFont.load_default(24)
    left, right = x0 + 110, x0 + PANEL[0] - 36
    top, bottom = 80, PANEL[1] - 84
    values = np.append(np.array(points)[:, 1], np.array(band).reshape(-1, 3)[:, 1:])
    spare = 0.0 if values.max() > values.min() else abs(values.max()) * 0.05 + 1e-3
    ys = ticks(values.min() - spare, values.max() + spare)

    def place(step, v):
        height = (v - ys[0]) / (ys[-1] - ys[0])
        return left + step / last * (right - left), bottom - height * (bottom - top)

    if len(band) > 1:
        upper = [place(step, high) for step, _, high in band]
        lower = [place(step, low) for step, low, _ in band]
        draw.polygon(upper + lower[::-1], PALE_BLUE)
    for v in ys:
        draw.line((*place(0, v), *place(last, v)), GRID, 2)
        draw.text((left - 14, place(0, v)[1]), f"{v:.6g}", FAINT, small, anchor="rm")
    for step in ticks(0, last, 6, least=1):
        if step <= last:
            draw.text((place(step, ys[0])[0], bottom + 14), f"{step:.6g}", FAINT, small, anchor="mt")
    draw.text((left, 18), title, INK, ImageFont.load_default(30))
    draw.text(((left + right) / 2, PANEL[1] - 10), "step", FAINT, small, anchor="mb")
    half = len(points) // 30 if len(points) > 40 else 0  # prompts differ: a mean over pale dots
    pale = tuple((np.array(ImageColor.getrgb(color)) + 2 * 255) // 3) if half else color
    means = []
    for i, (step, v) in enumerate(points):
        x, y = place(step, v)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), pale)
        around = np.array(points[max(0, i - half):i + half + 1])
        means.append(place(step, around[:, 1].mean()))
    if len(means) > 1:
        draw.line(means, color, 5, joint="curve")


# ===== 7. The command line.

def parse(argv):
    """Command line -> settings, with device and the folder of the output filled in."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("runs", nargs="*", metavar="RUN_OR_LORA", help="folders of runs, or LoRA files, of one base")
    p.add_argument("--model", default="", help="the base; default: what the run or the file says")
    p.add_argument("--prompts", default="", help="built-in name or file; default: scenes-test, or pickapic-test")
    p.add_argument("--limit", type=int, default=0, help="evaluate so many of the prompts, evenly picked")
    p.add_argument("--rewards", default="", help="names, comma-separated; default: those of the run")
    p.add_argument("--samples", type=int, default=8, help="pictures a prompt [%(default)s]")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise [%(default)s]")
    p.add_argument("--out", default="", help="folder of the report; default: eval in the first run's folder")
    p.add_argument("--best-of", type=int, default=1, metavar="N", help="a column: the best of N of the base")
    p.add_argument("--judge", default="", metavar="URL", help="vision model, http://host:port/v1?model=NAME")
    p.add_argument("--generate", action="append", metavar="PROMPT", help="pictures side by side, no report")
    p.add_argument("--curve", default="", metavar="RUN", help="draw RUN/curve.png, also while it trains")
    p.add_argument("--batch", type=int, default=16, help="pictures at once [%(default)s]")
    p.add_argument("--device", default=device, help="[%(default)s]")
    p.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    p.add_argument("--any-base", action="store_true", help="accept a LoRA whose file names another base")

    def fail(message):
        raise UserError(f"{message} (python eval.py --help lists the options)")

    p.error = fail
    args = p.parse_args(argv)
    first = Path(args.runs[0] if args.runs else ".")
    args.out = Path(args.out or (first if first.is_dir() else first.parent) / "eval")
    return args


def main(argv=None):
    """python eval.py ...; what the user can mend ends with one line and exit code 2."""
    try:
        args = parse(argv)
        if args.curve:
            rewards.read_config(args.curve)
            draw_curve(rewards.read_metrics(args.curve), Path(args.curve) / "curve.png")
            print(f"written: {args.curve}/curve.png")
        elif args.generate:
            side_by_side(args)
        else:
            evaluate(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
