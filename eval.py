"""Did it help? A tuned model against its base, on the same prompts and the same noise.

    python eval.py RUN_OR_LORA ...           tables, win rates, pictures -> RUN/eval/, RUN/curve.png
    python eval.py runs/toy --best-of 16     ... beside picking the best of 16 pictures of the base
    python eval.py runs/a runs/b --rewards pickscore,aesthetic --prompts my.txt
    python eval.py runs/a --judge "http://host:8000/v1?model=NAME"
    python eval.py runs/toy --generate "a red circle" --generate "three blue squares"
    python eval.py --curve runs/toy          the curve alone, also while the run is going on

All intervals are 95% percentile intervals of a bootstrap over PROMPTS (2000 resamples, fixed seed),
since the pictures of one prompt are not independent of each other.
    difference          mean of tuned minus base, picture by picture (same prompt, same noise)
    win rate            share of pictures that score above the base's of the same noise; a tie is half
    right               share of pictures that a checker (scene, geneval) finds right
    diversity           L2 distance of the latents of two pictures of a prompt, mean over pairs, then
                        over prompts
    diversity of right  the same among right pictures, on the SAME prompts, those where base and
                        tuned have two right ones each: hard prompts have another diversity than
                        easy ones, and only the better model has right pictures of them
    distance to base    RMS difference of the latents of two pictures of the same noise
    best of N           N candidates of the BASE for each picture, the best by the ranked reward: what
                        more computing at generation time gives without any finetuning
The same command twice on a CPU writes the same report.json bit for bit; speeds go to timing.json.
"""
import argparse
import contextlib
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
    """Scores (P, N) of the same prompts and noise -> mean, paired difference, win rate of tuned."""
    base, tuned = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    return {"mean": mean_interval(tuned), "difference": mean_interval(tuned - base),
            "win_rate": mean_interval((np.sign(tuned - base) + 1) / 2)}


def pair_distances(x, keep=None):
    """Latents x (P, N, D), keep: boolean (P, N) -> mean L2 distance over the kept pairs of each prompt
    (P,), NaN where fewer than two are kept."""
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").double().numpy()  # (P, N, N)
    keep = np.ones(d.shape[:2], bool) if keep is None else np.asarray(keep)
    pairs = keep[:, :, None] & keep[:, None, :] & ~np.eye(d.shape[1], dtype=bool)
    with np.errstate(invalid="ignore"):
        return (d * pairs).sum((1, 2)) / pairs.sum((1, 2))


def diversity(base, tuned, keep_base=None, keep_tuned=None):
    """Latents (P, N, D), boolean masks (P, N) -> mean diversity of tuned and of base where a prompt
    has both, the ratio with its interval, the number of these prompts; own: mean of tuned's."""
    a, b = pair_distances(base, keep_base), pair_distances(tuned, keep_tuned)  # (P,)
    both, own = ~np.isnan(a) & ~np.isnan(b), b[~np.isnan(b)]
    return {"mean": float(b[both].mean()) if both.any() else None,
            "base": float(a[both].mean()) if both.any() else None,
            "relative": interval(b[both], a[both]), "prompts": int(both.sum()),
            "own": float(own.mean()) if len(own) else None}


# ===== 2. Pictures of a model, and what rewards say about them.

NOISE_SEED = 1_000_003  # added to --seed: a run's own noise comes from small seeds


def generate(G, prompts, n, seed, at_once):
    """n pictures of each prompt by the generator as it stands, `at_once` at a time: yields flat
    indices p n + i, latents (B, 4, h, w), pictures (B, 3, H, W) in [0, 1]. Noise i of prompt p
    depends on (seed, p, i) alone."""
    for first in range(0, len(prompts), at_once):
        block = prompts[first:first + at_once]
        condition = G.encode(block)
        flat = [(p, i) for p in range(len(block)) for i in range(n)]
        for k in range(0, len(flat), at_once):
            chunk = flat[k:k + at_once]
            noise = [drpo.prompt_noise(seed + NOISE_SEED, (first + p) * 2 ** 20 + i, G.noise_shape)
                     for p, i in chunk]
            owner = torch.tensor([p for p, _ in chunk], device=G.device)
            with torch.no_grad():
                x = G.sample(torch.stack(noise).to(G.device), drpo.rows(condition, owner))
                yield [(first + p) * n + i for p, i in chunk], x, G.decode(x)


class Pictures:
    """Pictures of one model and what rewards say: x (P, N, D) latents, scores {reward: (P, N)}, right
    {checker: (P, N)} of 1, 0 and NaN, kept {(p, i): PIL picture}, seconds of sampling and decoding."""

    def __init__(self, G, prompts, n, args, reward, keep):
        """n pictures of each prompt; keep(p, i): whether this one is kept."""
        latents, scores, right = [], {}, {}
        self.kept, self.seconds, began = {}, 0.0, time.perf_counter()
        for flat, x, images in generate(G, prompts, n, args.seed, args.batch):
            pictures, texts = rewards.to_pil(images), [prompts[f // n] for f in flat]
            self.seconds += time.perf_counter() - began
            latents.append(x.flatten(1).float().cpu())
            for name, values in reward.score(images, texts).items():
                scores.setdefault(name, []).append(values)
            for name, part in reward.parts.items():
                if hasattr(part, "correct"):
                    said = part.correct([picture.copy() for picture in pictures], list(texts))
                    verdicts = [np.nan if verdict is None else float(verdict) for verdict in said]
                    right.setdefault(name, []).append(torch.tensor(verdicts))
            for f, picture in zip(flat, pictures):
                if keep(f // n, f % n):
                    self.kept[f // n, f % n] = picture
            began = time.perf_counter()
        shape = len(prompts), n
        self.x = torch.cat(latents).reshape(*shape, -1)
        self.scores = {name: torch.cat(parts).reshape(shape) for name, parts in scores.items()}
        self.right = {name: torch.cat(parts).reshape(shape) for name, parts in right.items()}

    def take(self, index):
        """Keep of the candidates (P, N) those with numbers index (P, S)."""
        self.x = self.x[torch.arange(len(index))[:, None], index]
        self.scores = {name: values.gather(1, index) for name, values in self.scores.items()}
        self.right = {name: values.gather(1, index) for name, values in self.right.items()}
        kept = {p for p, _ in self.kept}
        self.kept = {(p, 0): self.kept[p, int(index[p, 0])] for p in kept}


def best_index(reward, ranked, scores, samples):
    """Scores {part: (P, N S)} of S = samples slots, candidate c of slot s at c S + s -> (P, S)."""
    slots = {name: scores[name].unflatten(1, (-1, samples)).mT for name in ranked}  # (P, S, N)
    values = reward.combine(slots)
    return values.nan_to_num(nan=-torch.inf).argmax(-1) * samples + torch.arange(samples)


# ===== 3. Runs and LoRA files.

def open_run(path):
    """A run's folder or a LoRA file -> its settings; "model" is the base it was made for."""
    path, saved = Path(path), {}
    if not path.exists():
        raise UserError(f"{path}: no such run or LoRA file")
    metadata = rewards.lora_metadata(path)
    if (path / "config.json").is_file():
        saved = rewards.read_config(path)
    elif metadata.get("settings"):  # a file of ours carries them
        saved = json.loads(metadata["settings"])
    saved["file"], saved["made_for"] = rewards.lora_file(path), metadata.get("base_model", "")
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
    """Short names of runs: the last part of the path, more of it where two are alike."""
    for depth in range(1, 9):
        names = ["/".join(Path(path).resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [f"run {name}" if name.startswith("base") else name for name in names]


def choose_rewards(args, runs):
    """-> one Reward of all that is scored, and the names that --best-of ranks by: the run's own
    reward, or the first of --rewards."""
    specs = [args.rewards]
    if not args.rewards:
        specs = [spec for run in runs for spec in (run.get("reward"), run.get("watch")) if spec]
    if not specs:
        raise UserError("no rewards to score by: name them, --rewards pickscore,aesthetic")
    weights = {}
    for spec in specs:
        for name, weight in rewards.parse(spec).items():
            weights.setdefault(name, weight)
    parts = {name: rewards.build(name, args.device) for name in weights}
    ranked = list(rewards.parse(specs[0]))
    if args.rewards:
        ranked = ranked[:1]
    of_ranked = {name: weights[name] for name in ranked}
    return rewards.Reward(",".join(weights), parts, of_ranked), ranked


def prepare(args):
    """All that an evaluation needs -> generator, settings of the runs, prompts. UserError for what
    is missing, cheap things first."""
    if not args.runs:
        raise UserError("name a run's folder or a LoRA file (python eval.py --help)")
    if min(args.samples, args.batch, args.best_of) < 1:
        raise UserError("--samples, --batch and --best-of are at least 1")
    runs = [open_run(path) for path in args.runs]
    bases = {(args.model or run["model"], run["unet"]) for run in runs}
    if len(bases) > 1:
        names = ", ".join(sorted(" ".join(base).strip() for base in bases))
        raise UserError(f"runs of different bases ({names}): evaluate them one base at a time")
    (model, unet), = bases
    if not model:
        raise UserError(f"{args.runs[0]} does not say which base it was made for: give --model")
    if not args.prompts:
        args.prompts = "scenes-test" if drpo.layout(model) == "toy" else "pickapic-test"
    prompts = args.generate or list(dict.fromkeys(rewards.load_prompts(args.prompts)))
    if args.limit and args.limit < len(prompts):
        prompts = [prompts[i * len(prompts) // args.limit] for i in range(args.limit)]
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bf16" if args.device.startswith("cuda") else "fp32"
    one_step = {name: runs[0][name] for name in ("timestep", "prediction") if name in runs[0]}
    G = drpo.load_generator(model, device=args.device, dtype=drpo.DTYPES[dtype], unet=unet, **one_step)
    return G, runs, prompts


# ===== 4. The report.

def figures(base, other, reward, prompts):
    """All figures of one column of the table, as plain data: see the top of the file."""
    accuracy, right_diversity = {}, {}
    for name in base.right:
        a, b = base.right[name].numpy(), other.right[name].numpy()  # (P, N)
        tags = [reward.parts[name].tag(prompt) for prompt in prompts]
        groups = {"all": np.array([tag is not None for tag in tags])}
        for tag in sorted({tag for tag in tags if tag}):
            groups[tag] = np.array([other_tag == tag for other_tag in tags])
        accuracy[name] = {tag: {**compare(a[of], b[of]), "prompts": int(of.sum())}
                          for tag, of in groups.items()}
        right_diversity[name] = diversity(base.x, other.x, a == 1, b == 1)
    per_prompt = {}
    for name, scores in other.scores.items():
        means = scores.double().nanmean(1)
        per_prompt[name] = [float(mean) if mean == mean else None for mean in means]
    return {"rewards": {name: compare(base.scores[name], other.scores[name]) for name in base.scores},
            "accuracy": accuracy, "diversity": diversity(base.x, other.x),
            "right_diversity": right_diversity,
            "distance": float((other.x - base.x).square().mean().sqrt()), "per_prompt": per_prompt}


def evaluate(args):
    """Base and every run on the same prompts and noise -> the report, written to args.out as well."""
    G, runs, prompts = prepare(args)
    reward, ranked = choose_rewards(args, runs)
    args.out.mkdir(parents=True, exist_ok=True)
    shown = [i * len(prompts) // min(8, len(prompts)) for i in range(min(8, len(prompts)))]
    speed, columns = {}, {}

    def pictures(label, best_of=1):
        def keep(p, i):
            return args.save_pictures or i % args.samples == 0 and (p in shown or args.judge)

        found = Pictures(G, prompts, args.samples * best_of, args, reward, keep)
        count = found.x.shape[0] * found.x.shape[1]
        speed[label] = {"pictures": count, "seconds": found.seconds}
        print(f"{label}: {count} pictures, {count / found.seconds:.1f} a second", flush=True)
        if args.save_pictures:
            folder = args.out / "pictures" / file_name(label)
            folder.mkdir(parents=True, exist_ok=True)
            for (p, i), picture in found.kept.items():
                picture.save(folder / f"{p:04d}-{i:03d}.png")
        return found

    with G.reference():
        columns["base"] = base = pictures("base")
    for label, saved in zip(labels_of(args.runs), runs):
        load_tuned(G, saved, args.any_base)
        columns[label] = pictures(label)
    if args.best_of > 1:
        label = f"base best-of-{args.best_of}"
        with G.reference():
            columns[label] = pictures(label, args.best_of)
        columns[label].take(best_index(reward, ranked, columns[label].scores, args.samples))
    report = {"model": G.name, "prompts": args.prompts, "samples": args.samples, "seed": args.seed,
              "ranked": ranked, "rewards": list(reward.parts), "texts": prompts,
              "columns": {label: figures(base, column, reward, prompts)
                          for label, column in columns.items()}}
    if args.judge:
        for label in list(columns)[1:]:
            sides = [[column.kept[p, 0] for p in range(len(prompts))]
                     for column in (base, columns[label])]
            report["columns"][label]["judge"] = judge(args.judge, prompts, *sides)
    write_report(args.out, report, speed, columns, shown)
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
    tuned = [label for label in columns if not label.startswith("base")]
    names = ["tuned" if [label] == tuned else label for label in columns]
    captions = [report["texts"][p] for p in shown]
    rewards.picture_grid(rows, captions, names).save(out / "grid.png")
    print(f"\n{text}\nwritten: {out}/report.json, report.md, grid.png")


def marked(picture, verdict):
    """A picture with a green corner where it is right, a red one where it is wrong."""
    if verdict != verdict:
        return picture
    scale = max(1, 160 // picture.width)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    right, corner = picture.width - 1, picture.width // 10
    color = "#2a9d4e" if verdict else "#d43d3d"
    ImageDraw.Draw(picture).polygon([(right - corner, 0), (right, 0), (right, corner)], color)
    return picture


def number(v, style="{:.4g}"):
    """[value, low, high], a number or None as text."""
    if not isinstance(v, list):
        return "" if v is None else style.format(v)
    text = number(v[0], style)
    return text if v[1] is None else f"{text} [{number(v[1], style)}, {number(v[2], style)}]"


def table(report):
    """The figures of a report as one markdown table, aligned so that it reads in a terminal too."""
    columns = report["columns"]
    lines = [["", *columns]]

    def row(title, values, style="{:.4g}"):
        cells = [number(value, style) for value in values]
        if any(cells):  # of my/file.py:function the folder is left out
            lines.append([re.sub(r"\S*/(?=[^/]*\.py:)", "", title), *cells])

    def comparison(title, found, style, signed):
        row(title, [of["mean"] for of in found], style)
        row("  difference to base", [None] + [of["difference"] for of in found[1:]], signed)

    for name in report["rewards"]:
        found = [column["rewards"][name] for column in columns.values()]
        comparison(f"{name}: mean", found, "{:.4g}", "{:+.4g}")
        row("  win rate against base", [None] + [of["win_rate"] for of in found[1:]], "{:.1%}")
    for name, groups in columns["base"]["accuracy"].items():
        found = [column["accuracy"][name] for column in columns.values()]
        comparison(f"{name}: right", [of["all"] for of in found], "{:.1%}", "{:+.1%}")
        for tag in list(groups)[1:]:
            row(f"  {tag} ({groups[tag]['prompts']} prompts)", [of[tag]["mean"][0] for of in found], "{:.1%}")
    found = [column["diversity"] for column in columns.values()]
    row("diversity", [of["mean"] for of in found])
    row("  relative to base", [None] + [of["relative"] for of in found[1:]], "{:.1%}")
    for name in columns["base"]["right_diversity"]:
        found = [column["right_diversity"][name] for column in columns.values()]
        row(f"diversity of right ({name})", [of["own"] for of in found])
        row("  relative to base, same prompts", [None] + [of["relative"] for of in found[1:]], "{:.1%}")
    row("distance to base", [column["distance"] for column in columns.values()])
    judged = [column.get("judge", {}) for column in columns.values()]
    row("judge: win rate against base", [of.get("win_rate") for of in judged], "{:.1%}")
    counts = ["{wins} / {ties} / {losses}".format(**of) if of else None for of in judged]
    row("  wins / ties / losses", counts, "{}")
    head = "{prompts}: {} prompts, {samples} pictures each, base {model}; in brackets 95% bootstrap intervals"
    return head.format(len(report["texts"]), **report) + " over prompts\n\n" + aligned(lines)


def aligned(lines):
    """Rows of cells, the first of them the head -> a markdown table with columns of equal width."""
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width)) + " |" for line in lines]
    return "\n".join([out[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *out[1:]]) + "\n"


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
    counts = {"wins": score > 0.5, "ties": score == 0.5, "losses": score < 0.5,
              "no_answer": np.isnan(score),
              "order_decided": np.abs(first + second - 1) == 1}  # twice the one shown first, or second
    counts = {name: int(values.sum()) for name, values in counts.items()}
    return {"win_rate": mean_interval(score[:, None]), **counts}


def side_by_side(args):
    """--generate: the same noise through base and every run -> generate.png, and single pictures."""
    G, runs, prompts = prepare(args)
    each = min(args.samples, 4 if len(prompts) > 1 else 8)
    (args.out / "generate").mkdir(parents=True, exist_ok=True)
    rows, names = [], ["base", *labels_of(args.runs)]
    for label, saved in zip(names, [None, *runs]):
        if saved:
            load_tuned(G, saved, args.any_base)
        row = []
        with contextlib.nullcontext() if saved else G.reference():
            for _, _, images in generate(G, prompts, each, args.seed, args.batch):
                row += rewards.to_pil(images)
        for n, picture in enumerate(row):
            picture.save(args.out / "generate" / f"{n // each:02d}-{n % each}-{file_name(label)}.png")
        rows.append(row)
    captions = [prompt if i == 0 else "" for prompt in prompts for i in range(each)]
    names = ["base", "tuned"] if len(names) == 2 else names
    rewards.picture_grid(rows, captions, names).save(args.out / "generate.png")
    print(f"written: {args.out}/generate.png, and the pictures in {args.out}/generate/")


# ===== 6. The curve of a run.

INK, FAINT, GRID, BAND = "#22262e", "#707784", "#e4e6eb", "#dbe6f8"
BLUE, ORANGE, GREEN = "#2563c9", "#c9622b", "#2f8f5b"
PANEL = 880, 620  # pixels of a panel at twice its size: halving smooths the lines


def series(metrics, key):
    """[(step, value)] of the finite numbers under a key."""
    return [(m["step"], m[key]) for m in metrics
            if isinstance(m.get(key), (int, float)) and np.isfinite(m[key])]


def draw_curve(metrics, path):
    """curve.png of a run: the reward's mean within best to worst, every watched reward, and
    diversity, over steps."""
    panels = []
    if series(metrics, "reward_mean"):
        worst = dict(series(metrics, "reward_worst"))
        band = [(step, worst[step], best) for step, best in series(metrics, "reward_best") if step in worst]
        panels.append(("reward (band: best to worst of a prompt)", series(metrics, "reward_mean"), BLUE, band))
    for key in sorted({key for m in metrics for key in m if key.startswith("watch/")}):
        if series(metrics, key):
            panels.append((f"watched: {key[6:]}", series(metrics, key), ORANGE, []))
    if series(metrics, "diversity"):
        panels.append(("diversity within a prompt (base 1)", series(metrics, "diversity"), GREEN, []))
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
    for step in (m * 10.0 ** e for e in range(-12, 13) for m in (1, 2, 5)):
        if (high - low) / step <= most and step >= least:
            break
    return np.arange(np.floor(low / step + 1e-6), np.ceil(high / step - 1e-6) + 1) * step


def draw_panel(draw, x0, panel, last):
    """One diagram over steps 0..last at x0: title, [(step, value)], colour, [(step, low, high)]."""
    title, points, color, band = panel
    font, small = ImageFont.load_default(30), ImageFont.load_default(24)
    left, right, top, bottom = x0 + 110, x0 + PANEL[0] - 36, 80, PANEL[1] - 84
    values = [v for _, v in points] + [v for _, *both in band for v in both]
    spare = 0.0 if max(values) > min(values) else abs(max(values)) * 0.05 + 1e-3
    ys = ticks(min(values) - spare, max(values) + spare)

    def place(step, v):
        height = (v - ys[0]) / (ys[-1] - ys[0])
        return left + step / last * (right - left), bottom - height * (bottom - top)

    if len(band) > 1:
        upper, lower = [place(s, v) for s, _, v in band], [place(s, v) for s, v, _ in band]
        draw.polygon(upper + lower[::-1], BAND)
    for v in ys:
        draw.line((*place(0, v), *place(last, v)), GRID, 2)
        draw.text((left - 14, place(0, v)[1]), f"{v:.6g}", FAINT, small, anchor="rm")
    for step in ticks(0, last, 6, least=1):
        if step <= last:
            draw.text((place(step, ys[0])[0], bottom + 14), f"{step:.6g}", FAINT, small, anchor="mt")
    draw.text((left, 18), title, INK, font)
    draw.text(((left + right) / 2, PANEL[1] - 10), "step", FAINT, small, anchor="mb")
    half = len(points) // 30 if len(points) > 40 else 0  # prompts differ: a mean over pale dots
    pale = tuple((c + 2 * 255) // 3 for c in ImageColor.getrgb(color)) if half else color
    for x, y in [place(*point) for point in points]:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), pale)
    means = []
    for i, (step, _) in enumerate(points):
        around = points[max(0, i - half):i + half + 1]
        means.append(place(step, np.mean([v for _, v in around])))
    if len(means) > 1:
        draw.line(means, color, 5, joint="curve")


# ===== 7. The command line.

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
    p.add_argument("--best-of", type=int, default=1, metavar="N", help="a column: the best of N of the base")
    p.add_argument("--judge", default="", metavar="URL", help="vision model, http://host:port/v1?model=NAME")
    p.add_argument("--generate", action="append", metavar="PROMPT", help="pictures side by side, no report")
    p.add_argument("--curve", default="", metavar="RUN", help="draw RUN/curve.png, also while it trains")
    p.add_argument("--save-pictures", action="store_true", help="write every picture to OUT/pictures")
    p.add_argument("--batch", type=int, default=16, help="pictures at once [16]")
    p.add_argument("--device", default=cuda, help=f"[{cuda}]")
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
