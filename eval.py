"""Did it help? A tuned model against its base, on the same prompts and the same noise.

    python eval.py RUN_OR_LORA ...           tables, win rates, pictures -> RUN/eval/
    python eval.py runs/toy --best-of 16     ... beside picking the best of 16 pictures of the base
    python eval.py runs/a --judge "http://host:8000/v1?model=NAME"
    python eval.py runs/toy --generate "a red circle" --generate "three blue squares"

All intervals are 95% percentile intervals of a bootstrap over PROMPTS (2000 resamples, fixed seed).
    difference          mean of tuned minus base, picture by picture (same prompt, same noise)
    win rate            share of pictures that score above the base's of the same noise; a tie: half
    right               share of pictures that a checker (scene, geneval) finds right
    diversity           L2 distance of the latents of two pictures of a prompt, mean over pairs,
                        then over prompts
    diversity of right  the same among right pictures, on the SAME prompts, those where base and
                        tuned have two right ones each: hard prompts have another diversity
    distance to base    RMS difference of the latents of two pictures of the same noise
    best of N           N candidates of the BASE for each picture, the best by the ranked reward
The same command twice on a CPU writes the same report.json bit for bit.
"""
import argparse
import itertools
import json
import re
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import drpo
import rewards
from rewards import UserError, write_atomic

# ===== 1. Statistics, on arrays of P prompts and N pictures each.

def interval(total, count, resamples=2000, seed=0):
    """sum(total) / sum(count) over prompts, both (P,), and its 95% bootstrap interval.

    -> [value, low, high]; None: a value of no pictures, an interval of a single prompt."""
    some = np.asarray(count) > 0
    total = np.asarray(total, np.float64)[some]
    count = np.asarray(count, np.float64)[some]
    n = len(total)
    if n < 2:
        return [mean_or_none(total / count), None, None]
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(n, np.full(n, 1 / n), resamples)  # (resamples, P)
    low, high = np.percentile((draws @ total) / (draws @ count), [2.5, 97.5])
    return [float(total.sum() / count.sum()), float(low), float(high)]


def mean_interval(values):
    """Mean of (P, N), NaN left out, with its interval."""
    return interval(np.nansum(values, 1), (~np.isnan(values)).sum(1))


def compare(base, tuned):
    """Scores (P, N) of the same prompts and noise -> mean, paired difference, win rate of tuned."""
    base = np.asarray(base, np.float64)
    tuned = np.asarray(tuned, np.float64)
    return {"mean": mean_interval(tuned), "difference": mean_interval(tuned - base),
            "win_rate": mean_interval((np.sign(tuned - base) + 1) / 2)}


def pair_distances(x, keep=True):
    """Latents x (P, N, D), keep: boolean (P, N) -> mean L2 distance over the kept pairs of each
    prompt (P,), NaN where fewer than two are kept."""
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
    """n pictures of each prompt by the generator as it stands, about `at_once` at a time.

    Yields for some whole prompts their indices, latents (P, n, D) and lists of n PIL pictures.
    Noise i of prompt p depends on (seed, p, i) alone."""
    together = max(1, at_once // n)
    for first in range(0, len(prompts), together):
        index = range(first, min(first + together, len(prompts)))
        condition = G.encode(prompts[first:first + together])
        latents = []
        pictures = []
        for chunk in torch.arange(len(index) * n).split(at_once):
            noise = []
            for f in chunk.tolist():
                position = index[f // n] * 2 ** 20 + f % n
                noise.append(drpo.prompt_noise(seed + NOISE_SEED, position, G.noise_shape))
            with torch.no_grad():
                rows = drpo.rows(condition, (chunk // n).to(G.device))
                x = G.sample(torch.stack(noise).to(G.device), rows)
                pictures += rewards.to_pil(G.decode(x))
            latents.append(x.flatten(1).float().cpu())
        x = torch.cat(latents).unflatten(0, (len(index), n))
        yield list(index), x, [pictures[p * n:(p + 1) * n] for p in range(len(index))]


class Pictures:
    """Pictures of one model and what rewards say: x (P, N, D) latents, scores {reward: (P, N)},
    right {checker: (P, N)} of 1, 0 and NaN, kept {(p, i): PIL picture}, seconds of sampling and
    decoding."""

    def __init__(self, G, prompts, n, args, reward):
        """n pictures of each prompt; kept are those that the report shows or a judge looks at."""
        latents = []
        scores = {}
        right = {}
        self.kept = {}
        self.seconds = 0.0
        began = time.perf_counter()
        for index, x, pictures in generate(G, prompts, n, args.seed, args.batch):
            self.seconds += time.perf_counter() - began
            latents.append(x)
            images = list(itertools.chain(*pictures))
            texts = [prompts[p] for p in index for _ in range(n)]
            for name, values in reward.score(images, texts).items():
                scores.setdefault(name, []).append(values.view(-1, n))
            for name in checkers(reward):
                verdicts = verdicts_of(name, reward.parts[name], images, texts)
                right.setdefault(name, []).append(verdicts.view(-1, n))
            for p, row in zip(index, pictures):
                if args.judge or p in args.shown:
                    self.kept.update({(p, i): row[i] for i in range(0, n, args.samples)})
            began = time.perf_counter()
        self.x = torch.cat(latents)
        self.scores = {name: torch.cat(parts) for name, parts in scores.items()}
        self.right = {name: torch.cat(parts) for name, parts in right.items()}

    def take(self, index):
        """Keep of the candidates (P, N) those with numbers index (P, S)."""
        self.x = self.x[torch.arange(len(index))[:, None], index]
        for table in (self.scores, self.right):
            for name, values in table.items():
                table[name] = values.gather(1, index)
        self.kept = {(p, 0): self.kept[p, int(index[p, 0])] for p, _ in self.kept}


def checkers(reward):
    """The names of the parts of a reward that tell right from wrong."""
    return [name for name, part in reward.parts.items() if callable(getattr(part, "correct", None))]


def verdicts_of(name, part, images, prompts):
    """part.correct on copies of the pictures -> (B,) of 1, 0 and NaN (not judged)."""
    hint = "correct(images, prompts) gives True, False or None for each image"
    with rewards.reading(f"reward {name!r}", hint), rewards.world_kept():
        found = list(part.correct([image.copy() for image in images], list(prompts)))
        if len(found) != len(images):
            raise ValueError(f"{len(found)} verdicts for {len(images)} images")
        return torch.tensor([np.nan if one is None else float(bool(one)) for one in found])


def tag_of(part, prompt):
    """The task of a prompt as text; without a tag function all are of one."""
    return str(part.tag(prompt)) if callable(getattr(part, "tag", None)) else "all"


def best_index(reward, ranked, scores, samples):
    """Scores {part: (P, N S)} of S = samples slots, candidate c of slot s at c S + s -> (P, S)."""
    slots = {name: scores[name].unflatten(1, (-1, samples)).mT for name in ranked}  # (P, S, N)
    values = reward.combine(slots)
    return values.nan_to_num(nan=-torch.inf).argmax(-1) * samples + torch.arange(samples)


# ===== 3. Runs and LoRA files.

def open_run(path):
    """A run's folder or a LoRA file -> its settings; "model" is the base it was made for."""
    path = Path(rewards.absolute(path))
    if not path.exists():
        raise UserError(f"{path}: no such run or LoRA file")
    metadata = drpo.read_lora(path)[1]
    saved = {"model": metadata["drpo_base"], "unet": metadata.get("unet", ""),
             "timestep": int(metadata.get("timestep", -1)),
             "prediction": metadata.get("prediction", "")}
    if (path / "config.json").is_file():
        saved.update(drpo.read_config(path))
    return {**saved, "file": path, "made_for": metadata["drpo_base"]}


def load_tuned(G, saved):
    """Put a run's LoRA into the generator, whose reference stays the base."""
    if Path(saved["made_for"]).name != Path(G.name).name:
        raise UserError(f"{saved['file']} was made for the base {saved['made_for']}, not for "
                        f"{G.name}")
    G.load_lora(saved["file"])


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
        specs += [run[name] for name in ("reward", "watch") if run.get(name)]
    if args.rewards:
        specs = [rewards.absolute_spec(args.rewards)]
    if not specs:
        raise UserError("no rewards to score by: name them, --rewards pickscore,aesthetic")
    weights = {}
    for spec in specs:
        weights = {**rewards.parse(spec), **weights}
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
    for name in ("samples", "batch", "best_of", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{drpo.flag(name)} is {value}; expected at least 1")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ".writable").touch()
        (args.out / ".writable").unlink()
    except OSError as e:
        raise UserError(f"--out {args.out}: {e.strerror}; name another folder") from e
    runs = list(map(open_run, args.runs))
    for name in ("model", "unet", "timestep", "prediction"):
        values = {run[name] for run in runs}
        if len(values) > 1 and not (name == "model" and args.model):
            raise UserError(f"runs of different bases, --{name} is {' and '.join(map(str, values))}"
                            ": evaluate them one base at a time")
    model = args.model or runs[0]["model"]
    if not args.prompts:
        args.prompts = "scenes-test" if drpo.preset_of(model) == "toy" else "pickapic-test"
    prompts = args.generate or list(dict.fromkeys(rewards.load_prompts(args.prompts)))
    prompts = evenly(prompts, args.limit or len(prompts))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    dtype = args.dtype.replace("auto", "bf16" if args.device.startswith("cuda") else "fp32")
    how = {name: runs[0][name] for name in ("unet", "timestep", "prediction")}
    G = drpo.load_generator(model, device=args.device, dtype=drpo.DTYPES[dtype], **how)
    return G, runs, prompts


# ===== 4. The report.

def figures(base, other, reward, prompts):
    """All figures of one column of the table, as plain data: see the top of the file."""
    found = {"rewards": {}, "accuracy": {}, "diversity": diversity(base.x, other.x),
             "right_diversity": {}, "distance": float((other.x - base.x).square().mean().sqrt()),
             "per_prompt": {}}
    for name in base.right:
        a = base.right[name].numpy()  # (P, N)
        b = other.right[name].numpy()
        tags = np.array([tag_of(reward.parts[name], prompt) for prompt in prompts])
        groups = {"all": tags != "None"}
        for tag in sorted(set(tags) - {"None", "all"}):
            groups[tag] = tags == tag
        found["accuracy"][name] = {tag: {**compare(a[of], b[of]), "prompts": int(of.sum())}
                                   for tag, of in groups.items()}
        found["right_diversity"][name] = diversity(base.x, other.x, a == 1, b == 1)
    for name, scores in other.scores.items():
        found["rewards"][name] = compare(base.scores[name], scores)
        found["per_prompt"][name] = [mean_or_none(row[~np.isnan(row)]) for row in scores.numpy()]
    return found


def evaluate(args):
    """Base and every run on the same prompts and noise -> the report, also written to args.out."""
    G, runs, prompts = prepare(args)
    reward, ranked = choose_rewards(args, runs)
    args.shown = evenly(range(len(prompts)), 8)
    columns = {}

    def pictures(label, best_of=1):
        found = Pictures(G, prompts, args.samples * best_of, args, reward)
        count = found.x.shape[0] * found.x.shape[1]
        print(f"{label}: {count} pictures, {count / found.seconds:.1f} a second", flush=True)
        columns[label] = found

    with G.reference():
        pictures("base")
    for label, saved in zip(labels_of(args.runs), runs):
        load_tuned(G, saved)
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
    write_report(args.out, report, columns, args.shown)
    print(f"\n{table(report)}\nwritten: {args.out}/report.json, report.md, grid.png", flush=True)
    if args.judge:  # which may fail, and costs: what is known is on the disk before
        before = [columns["base"].kept[p, 0] for p in range(len(prompts))]
        for label in list(columns)[1:]:
            after = [columns[label].kept[p, 0] for p in range(len(prompts))]
            said = judge(args.judge, prompts, before, after)
            report["columns"][label]["judge"] = said
            print(f"judge, {label}: win rate against base {number(said['win_rate'], '{:.1%}')}")
        write_report(args.out, report, columns, args.shown)
    return report


def write_report(out, report, columns, shown):
    """report.json, report.md and grid.png."""
    write_atomic(out / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    write_atomic(out / "report.md", table(report).encode())
    rows = []
    for column in columns.values():
        row = [column.kept[p, 0].copy() for p in shown]
        for verdicts in list(column.right.values())[:1]:
            row = [marked(picture, float(verdicts[p, 0])) for picture, p in zip(row, shown)]
        rows.append(row)
    captions = [report["texts"][p] for p in shown]
    picture_grid(rows, captions, list(columns)).save(out / "grid.png")


def picture_grid(rows, captions, labels):
    """Rows of PIL pictures under captions (one a column), labels at the left -> one PIL picture."""
    width = rows[0][0].width
    side = min(256, width * max(1, 160 // width))  # small ones by a whole factor
    font = ImageFont.load_default(13)
    texts = ["\n".join(textwrap.wrap(caption, side // 7)[:4]) for caption in captions]
    labels = ["\n".join(textwrap.wrap(label, 14)) for label in labels]
    top = 14 + 17 * max(text.count("\n") + 1 for text in texts)
    left = 18 + max(int(font.getlength(line)) for label in labels for line in label.split("\n"))
    size = left + len(captions) * (side + 5), top + len(rows) * (side + 5)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, text in enumerate(texts):  # captions stand on the pictures
        draw.multiline_text((left + column * (side + 5), top - 6), text, "#22262e", font, "ld", 3)
    for y, pictures, label in zip(range(top, size[1], side + 5), rows, labels):
        draw.multiline_text((8, y + side // 2), label, "#22262e", font, "lm", 3)
        for column, picture in enumerate(pictures):
            method = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            grid.paste(picture.resize((side, side), method), (left + column * (side + 5), y))
    return grid


def marked(picture, verdict):
    """A picture with a green corner where it is right, a red one where it is wrong."""
    if verdict != verdict:
        return picture
    right = picture.width - 1
    corner = picture.width // 8
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
        if isinstance(value, dict):
            value = value.get(key)
        elif value is not None:
            value = value[key]
    return value


def table(report):
    """The figures of a report as one markdown table, aligned so that it reads in a terminal too."""
    columns = report["columns"]
    lines = [["", *columns]]

    def row(title, *path, style="{:.4g}", of_base=True):
        """A line of the figures at a path of keys in each column; of_base: the base has one."""
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
        path = ("accuracy", name, "all", "difference")
        row("  difference to base", *path, style="{:+.1%}", of_base=False)
        for tag in list(groups)[1:]:
            title = f"  {tag} ({groups[tag]['prompts']} prompts)"
            row(title, "accuracy", name, tag, "mean", 0, style=percent)
    row("diversity", "diversity", "mean")
    row("  relative to base", "diversity", "relative", style=percent, of_base=False)
    for name in columns["base"]["right_diversity"]:
        row(f"diversity of right ({name})", "right_diversity", name, "own")
        path = ("right_diversity", name, "relative")
        row("  relative to base, same prompts", *path, style=percent, of_base=False)
    row("distance to base", "distance")
    row("judge: win rate against base", "judge", "win_rate", style=percent)
    row("  wins / ties / losses", "judge", style="{wins} / {ties} / {losses}")
    head = ("{prompts}: {} prompts, {samples} pictures each, base {model}; in brackets 95% "
            "bootstrap intervals over prompts\n\n")
    return head.format(len(report["texts"]), **report) + aligned(lines)


def aligned(lines):
    """Rows of cells, the first of them the head -> a markdown table with columns of equal width."""
    width = [max(map(len, cells)) for cells in zip(*lines)]
    out = ["| " + " | ".join(map(str.ljust, line, width)) + " |" for line in lines]
    out.insert(1, re.sub("[^|]", "-", out[0]))
    return "\n".join(out) + "\n"


# ===== 5. A judge: a vision-language model that sees two pictures and says which is better.

def judge(address, prompts, base, tuned):
    """Ask about each pair of PIL pictures in both orders -> counts, and the win rate of tuned.

    A pair scores the mean of its two answers: opposite ones are a tie; one without an answer, or
    with an error in its place, drops the pair, and a line says how many."""
    vlm = rewards.build(f"vlm@{address}")
    troubles = []

    def ask(*question):  # -> 1 for the first, 0 for the second, 0.5 for a tie, NaN for no answer
        try:
            return vlm.first_is_better(*question)
        except UserError as e:
            troubles.append(e)
            return np.nan

    with ThreadPoolExecutor(8) as pool:
        first = np.array(list(pool.map(ask, prompts, base, tuned)))  # base shown first
        second = np.array(list(pool.map(ask, prompts, tuned, base)))
    score = (1 - first + second) / 2  # (P,): 1 tuned, 0 base
    found = {"win_rate": mean_interval(score[:, None])}
    for name, which in (("wins", score > 0.5), ("ties", score == 0.5), ("losses", score < 0.5),
                        ("no_answer", np.isnan(score)),
                        ("order_decided", np.abs(first + second - 1) == 1)):  # twice the same place
        found[name] = int(which.sum())
    if troubles:
        print(f"{len(troubles)} questions got no answer: {troubles[0]}", file=sys.stderr)
    return found


def side_by_side(args):
    """--generate: the same noise through base and every run -> generate.png."""
    G, runs, prompts = prepare(args)
    each = min(args.samples, 4 if len(prompts) > 1 else 8)
    rows = []
    for saved in (None, *runs):
        if saved:
            load_tuned(G, saved)  # before it the generator is the base
        row = []
        for _, _, pictures in generate(G, prompts, each, args.seed, args.batch):
            row += itertools.chain(*pictures)
        rows.append(row)
    captions = []
    for prompt in prompts:
        captions += [prompt] + [""] * (each - 1)
    grid = picture_grid(rows, captions, ["base", *labels_of(args.runs)])
    grid.save(args.out / "generate.png")
    print(f"written: {args.out}/generate.png")


# ===== 6. The command line.

def parse(argv):
    """Command line -> settings, with device and the folder of the output filled in."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("runs", nargs="*", metavar="RUN_OR_LORA", help="runs or LoRA files of one base")
    add("--model", default="", help="the base; default: what the run or the file says")
    add("--prompts", default="", help="built-in name or file; default: scenes-test, pickapic-test")
    add("--limit", type=int, help="evaluate so many of the prompts, evenly picked")
    add("--rewards", default="", help="names, comma-separated; default: those of the run")
    add("--samples", type=int, default=8, help="pictures a prompt [%(default)s]")
    add("--seed", type=int, default=0, help="seed of the noise [%(default)s]")
    add("--out", default="", help="folder of the report; default: eval in the first run's folder")
    add("--best-of", type=int, default=1, metavar="N", help="a column: the best of N of the base")
    add("--judge", default="", metavar="URL", help="vision model, http://host:port/v1?model=NAME")
    add("--generate", action="append", metavar="PROMPT", help="pictures side by side, no report")
    add("--batch", type=int, default=16, help="pictures at once [%(default)s]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))

    def fail(message):
        raise UserError(f"{message} (python eval.py --help lists the options)")

    p.error = fail
    args = p.parse_args(argv)
    first = Path(rewards.absolute(args.runs[0] if args.runs else "."))
    folder = first if first.is_dir() else first.parent
    args.out = Path(rewards.absolute(args.out or folder / "eval"))
    if args.prompts not in rewards.PROMPTS and args.prompts:
        args.prompts = rewards.absolute(args.prompts)
    return args


def main(argv=None):
    """python eval.py ...; what the user can mend ends with one line and exit code 2."""
    with rewards.one_line_errors():
        args = parse(argv)
        if args.generate:
            side_by_side(args)
        else:
            evaluate(args)


if __name__ == "__main__":
    main()
