"""Ablations on the toy: what matters, and what else one could do with the same candidates.

    python lab/ablate.py lambda --seeds 0,1,2 --jobs 2         one table, each variant a process
    python lab/ablate.py all --seeds 0,1,2 --jobs 16 --device cuda
    python lab/ablate.py --open runs/toy-0 runs/toy-1          what the caption leaves open

Trains every variant of a table with every seed and evaluates it on the held-out captions. Results
grow in OUT/results.json as they arrive, the table is OUT/results.md; the same command again goes
on. A cell is the mean over seeds, and the range of the seeds. New fields and features are
registered in the tables of drpo.py, new rewards are named by file, as anybody would do it."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import drpo  # noqa: E402
import eval as evaluation  # noqa: E402
import rewards  # noqa: E402
from paper import file_name  # noqa: E402
from scene import SCENE_COLORS, SCENE_SHAPES, look, parse, scene  # noqa: E402

# ===== rewards that differ from the checker


def within_prompt(scores, prompts):
    """Standard deviation of the scores among the pictures of the same prompt, for each picture."""
    texts = np.array(prompts)
    return np.array([scores[texts == prompt].std() for prompt in prompts])


def noisy(images, prompts, factor):
    """`scene` plus normal noise of `factor` times its spread within a prompt."""
    scores = np.array(scene(images, prompts), np.float64)
    return scores + factor * within_prompt(scores, prompts) * NOISE.standard_normal(len(scores))


NOISE = np.random.default_rng(0)


def scene_noise_half(images, prompts):
    """Noise of half the spread."""
    return noisy(images, prompts, 0.5)


def scene_noise_one(images, prompts):
    """Noise as large as the spread."""
    return noisy(images, prompts, 1.0)


def scene_binary(images, prompts):
    """1 where all is right, else 0."""
    return [float(score == 1) for score in scene(images, prompts)]


def scene_reversed(images, prompts):
    """The negative control: with it the share of right pictures must FALL."""
    return [-score for score in scene(images, prompts)]


def warm(images, prompts):
    """Mean of red minus mean of blue: a smooth reward that ignores the caption."""
    values = [np.asarray(image, np.float64) for image in images]
    return [value[..., 0].mean() - value[..., 2].mean() for value in values]


# ===== fields that differ from the dipole: arguments and results as of drpo.dipole_target


def toward(z, z_ref, V, *, radii, kernel, eta, lambda_ref):
    """The dipole's objective with another field V (N, D) in the place of the dipole's."""
    N, D = z.shape
    V, rms_pref = drpo.unit_rms(V)
    V_ref, rms_ref = drpo.reference_drift(z, z_ref, radii=radii, kernel=kernel)
    u = drpo.mean_distance(drpo.distances(z, z)) / D**0.5
    z_star = z + eta * u * (len(radii) * V + lambda_ref * V_ref)  # the dipole sums its radii
    return (
        z_star,
        0.5 / (N * D * u**2),
        {"rms_pref": rms_pref.expand(len(radii)), "rms_ref": rms_ref},
    )


def best_of_k_target(z, z_ref, positive, negative, **settings):
    """Best-of-K distillation: every candidate is regressed onto the best of its prompt (m = 1)."""
    V = torch.zeros_like(z)
    if len(positive):  # else all scores are equal: there is no best
        V = positive.repeat(len(z) // len(positive), 1) - z
    return toward(z, z_ref, V, **settings)


def pairwise_target(z, z_ref, positive, negative, **settings):
    """Pairwise (DPO-like) regression of maps with one vector a picture: an anchor a of the best and
    b of the worst make a pair. With -||z - a||^2 / 2 as log-likelihood the DPO loss is -log
    sigmoid(beta (z - z_ref)(a - b) / s^2), beta = 5: it pulls each candidate along a - b, the less
    the more its margin over the reference has grown."""
    m = min(len(positive), len(negative))
    pair = positive[:m] - negative[:m]  # (m, D)
    s = drpo.mean_distance(drpo.distances(z, z))
    margin = (z - z_ref) @ pair.T / s**2  # (K, m)
    return toward(z, z_ref, torch.sigmoid(-5 * margin) @ pair, **settings)


def latent_features(G, path=None):
    """The latent itself: kept because it fails (paper: PickScore 20.52 against 23.5)."""
    return lambda x, condition: [x.float().flatten(1)[:, None]]


def colour_features(G, path=None):
    """Mean and standard deviation of red, green and blue over the decoded picture: one map, D =
    6."""

    def phi(x, condition):
        pictures = G.decode(x).flatten(2)  # (B, 3, H W)
        return [torch.cat([pictures.mean(2), pictures.std(2)], 1)[:, None]]

    return phi


def drift_on_colours_target(z, z_ref, positive, negative, **settings):
    """The dipole's objective, but on `colours` the drift toward the base alone, with weight lambda;
    on every other map lambda is the default."""
    if z.shape[1] != 6:  # D of `colours`; no other map has so few
        settings["lambda_ref"] = drpo.Config.lambda_ref
        return drpo.dipole_target(z, z_ref, positive, negative, **settings)
    return drpo.dipole_target(z, z_ref, positive[:0], negative[:0], **settings)


drpo.FIELDS.update(
    {
        "best-of-k": best_of_k_target,
        "pairwise": pairwise_target,
        "drift-on-colours": drift_on_colours_target,
    }
)
drpo.FEATURES.update({"latent": latent_features, "colours": colour_features})

# ===== a remedy for a prompt that tips, as a patch of drpo's functions


def remember_anchors():
    """The best and worst m of a prompt's earlier visit are ranked together with today's candidates:
    where all candidates are equally wrong, there are anchors still. Nothing but ranks is used."""
    score_candidates, anchors_of = drpo.score_candidates, drpo.anchors_of
    memory, prompts = {}, []

    def scored(G, reward, batch, x):
        prompts[:] = batch.prompts  # anchors_of is called for each of them, in order
        return score_candidates(G, reward, batch, x)

    def anchors(z, scores, m, native):
        prompt = prompts.pop(0)
        figures = anchors_of(z, scores, m, native)[2]
        if prompt in memory:
            old_z, old_scores = memory[prompt]
            z = [torch.cat([now, then]) for now, then in zip(z, old_z)]
            scores = torch.cat([scores, old_scores])
        best, worst, _ = anchors_of(z, scores, m, native)
        order = scores.argsort(descending=True, stable=True)
        kept = torch.cat([order[:m], order[-m:]])
        memory[prompt] = [h[kept.to(h.device)].detach() for h in z], scores[kept]
        return best, worst, figures

    drpo.score_candidates, drpo.anchors_of = scored, anchors


PATCHES = {"remember": remember_anchors}

# ===== the tables: {label: settings that differ from the toy's}

MINE = f"{HERE / 'ablate.py'}:"
RELEASED = dict(field="released", kernel="laplacian", radii=drpo.AUTHORS["radii"])
FIELD_TABLE = {}
for reward in ("scene", MINE + "warm"):
    for name, field in (("dipole", dict(kernel="laplacian")), ("released", RELEASED)):
        for rate in (3e-4, 1e-3):
            label = f"{reward.split(':')[-1]}, {name}, lr {rate:g}"
            FIELD_TABLE[label] = {**field, "reward": reward, "lr": rate, "steps": 300}
TABLES = {
    "default": {"default": {}},
    "candidates": {
        "K 16, P 12": dict(candidates=16, batch=12),  # as many pictures a step
        "K 64, P 3": dict(candidates=64, batch=3),
    },
    "anchors": {"m 1": dict(anchors=1), "m 4": dict(anchors=4)},
    "kernel": {"laplacian": dict(kernel="laplacian"), "cosine": dict(kernel="cosine")},
    "radii": {"radii .02 .05 .2": dict(radii=(0.02, 0.05, 0.2))},
    "features": {
        "features unet": dict(features="unet"),
        "features latent": dict(features="latent"),
    },
    "lambda": {f"lambda {value}": dict(lambda_ref=value) for value in (0.0, 0.1, 0.4, 1.0)},
    "field": {
        "released field": dict(field="released", kernel="laplacian"),
        "released field and radii": RELEASED,
    },
    "noise": {
        "reward noise 0.5": dict(reward=MINE + "scene_noise_half"),
        "reward noise 1": dict(reward=MINE + "scene_noise_one"),
    },
    "binary": {"binary reward": dict(reward=MINE + "scene_binary")},
    "reversed": {"ranking reversed": dict(reward=MINE + "scene_reversed")},
    "fields": FIELD_TABLE,
    "alternatives": {
        "best-of-K distillation": dict(field="best-of-k", anchors=1),
        "pairwise regression": dict(field="pairwise"),
    },
    "open": {"drift alone on mean colours": dict(features="vae,colours", field="drift-on-colours")},
}
TABLES["tips"] = {  # what makes a kind tip, by ten seeds each
    "not averaged": dict(average=0.0),
    "not averaged, 12 x 16": dict(average=0.0, batch=12, candidates=16),
    "not averaged, 12 x 16, lr 1.5e-3, lambda .1": dict(
        average=0.0, batch=12, candidates=16, lr=1.5e-3, lambda_ref=0.1
    ),
    "not averaged, 24 x 8, m 4": dict(average=0.0, batch=24, candidates=8, anchors=4),
    "not averaged, anchors remembered": dict(average=0.0, patch="remember"),
}
TABLES["all"] = {}
for name in (
    "default",
    "candidates",
    "anchors",
    "kernel",
    "radii",
    "features",
    "lambda",
    "field",
    "noise",
    "binary",
    "reversed",
    "open",
):
    TABLES["all"].update(TABLES[name])


# ===== what the caption leaves open


def open_attributes(images, prompts):
    """Pictures of captions with one object and no colour -> entropy of the colours drawn, in bits
    (of log2 6 = 2.58), and of pictures with one circle -> its mean width over height or the
    inverse."""
    colors, ratios = [], []
    for image, prompt in zip(images, prompts):
        wanted = parse(prompt)
        if wanted is None or len(wanted[0]) != 1:
            continue
        ((shape, color),) = wanted[0]
        objects, _ = look(image)
        if len(objects) != 1:
            continue
        if color is None and objects[0][1]:
            colors.append(objects[0][1])
        if shape == "circle":
            ratios.append(flatness(image))
    counts = np.array([colors.count(color) for color in SCENE_COLORS])
    share = counts[counts > 0] / max(len(colors), 1)
    entropy = abs(float((share * np.log2(share)).sum()))
    flat = float(np.mean(ratios)) if ratios else None
    return {
        "color_entropy": entropy,
        "colors": len(colors),
        "circle_flatness": flat,
        "circles": len(ratios),
    }


def flatness(image):
    """Of the only object of a picture: shorter over longer side of its box; a round circle has
    1."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ink = np.linalg.norm(pixels - np.median(border, axis=0), axis=2) > 60
    height, width = np.ptp(np.flatnonzero(ink.any(1))) + 1, np.ptp(np.flatnonzero(ink.any(0))) + 1
    return min(height, width) / max(height, width)


def open_figures(G, samples=64, seed=0):
    """`open_attributes` of the generator as it stands, on single-object captions in three
    wordings."""
    nouns = [f"a {shape}" for shape in SCENE_SHAPES] + [
        f"a {color} circle" for color in SCENE_COLORS
    ]
    prompts = [
        f"{wording}{noun}" for noun in nouns for wording in ("", "a photo of ", "a picture of ")
    ]
    images, texts = [], []
    for index, _, pictures in evaluation.generate(G, prompts, samples, seed, 64):
        for p, row in zip(index, pictures):
            images += row
            texts += [prompts[p]] * samples
    return open_attributes(images, texts)


# ===== running them


def run_variant(folder):
    """Train and evaluate the variant in folder/job.json, in a process of its own; writes
    result.json."""
    folder = Path(folder)
    job = json.loads((folder / "job.json").read_text())
    settings = dict(job["settings"])
    patch = settings.pop("patch", None)
    if patch:
        PATCHES[patch]()
    if "radii" in settings:
        settings["radii"] = tuple(settings["radii"])  # JSON knows lists alone
    fixed = dict(
        seed=job["seed"],
        device=job["device"],
        dtype="fp32",
        preview_every=0,
        save_every=10**9,
        out=str(folder / time.strftime("run-%H%M%S")),
    )
    began = time.perf_counter()
    run = drpo.train(drpo.Config.preset("toy", **fixed, **settings))
    minutes = (time.perf_counter() - began) / 60

    scored = "scene"
    if "scene" not in settings.get(
        "reward", "scene"
    ):  # scene_noise and the like are scored by scene itself
        scored = f"{settings['reward']},scene"
    args = evaluation.parse(
        [
            str(run),
            "--rewards",
            scored,
            "--device",
            job["device"],
            "--dtype",
            "fp32",
            "--samples",
            str(job["samples"]),
            "--batch",
            "64",
        ]
    )
    columns = evaluation.evaluate(args)["columns"]
    base, tuned = columns["base"], columns[Path(run).name]
    name = scored.split(",")[0]
    kinds = {}
    for kind, values in tuned["accuracy"]["scene"].items():
        kinds[kind] = values["mean"][0]
    G = drpo.load_generator("toy", device=job["device"])
    G.load_lora(run)
    result = {
        "right": kinds["all"],
        "right_base": base["accuracy"]["scene"]["all"]["mean"][0],
        "diversity_right": tuned["right_diversity"]["scene"]["relative"][0],
        "diversity": tuned["diversity"]["relative"][0],
        "distance": tuned["distance"],
        "reward_base": base["rewards"][name]["mean"][0],
        "reward": tuned["rewards"][name]["mean"][0],
        "minutes": minutes,
        "kinds": kinds,
        **open_figures(G),
    }
    (folder / "result.json").write_text(json.dumps({**job, **result}))


def start(folder, job, jobs):
    """A process for a variant."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    env = dict(os.environ)
    if jobs > 1:
        env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "ablate.py"), "--variant", str(folder)]
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def finished(folder, job):
    """The result of the same job from an earlier call, or None."""
    file = folder / "result.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    same = all(result.get(name) == value for name, value in job.items())
    return result if same else None


def ablate(args):
    """Every variant of the tables with every seed, args.jobs at a time; what is done is not run
    again. Returns how many failed."""
    variants = {}
    for name in args.tables.split(","):
        variants |= rewards.pick("table", name, TABLES)
    waiting, running, done = [], {}, []
    failed = 0
    for seed in args.seeds.split(","):
        for label, settings in variants.items():
            settings = dict(settings)
            if args.steps:
                settings["steps"] = args.steps
            job = {
                "label": label,
                "seed": int(seed),
                "settings": settings,
                "device": args.device,
                "samples": args.samples,
            }
            job = json.loads(json.dumps(job))  # as it will be read again
            folder = args.out / f"{file_name(label)}-seed{seed}"
            known = finished(folder, job)
            if known:
                done.append(known)
            else:
                waiting.append((folder, job))
    while waiting or running:
        while waiting and len(running) < args.jobs:
            folder, job = waiting.pop(0)
            running[folder] = job, start(folder, job, args.jobs)
        for folder, (job, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[folder]
            name = f"{job['label']}, seed {job['seed']}"
            if process.returncode == 0:
                done.append(json.loads((folder / "result.json").read_text()))
                print(f"{name}: right {done[-1]['right']:.1%}", flush=True)
            else:
                failed += 1
                last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
                print(f"{name} failed: {''.join(last)}", file=sys.stderr)
            rewards.write_atomic(args.out / "results.json", json.dumps(done, indent=1).encode())
        time.sleep(0.2)
    rewards.write_atomic(args.out / "results.json", json.dumps(done, indent=1).encode())
    base = open_figures(drpo.load_generator("toy", device=args.device))
    text = results_table(done, variants, base)
    (args.out / "results.md").write_text(text)
    print(f"\n{text}\nwritten: {args.out}/results.json, results.md")
    return failed


COLUMNS = (  # of results.md: title, key of result.json, format
    ("right", "right", "{:.1%}"),
    ("diversity of right", "diversity_right", "{:.0%}"),
    ("diversity", "diversity", "{:.0%}"),
    ("distance", "distance", "{:.2f}"),
    ("reward of base", "reward_base", "{:.3g}"),
    ("reward", "reward", "{:.3g}"),
    ("colours, bits", "color_entropy", "{:.2f}"),
    ("circles", "circle_flatness", "{:.2f}"),
    ("minutes", "minutes", "{:.1f}"),
)


def results_table(done, variants, base):
    """Results of variants and seeds -> a markdown table: the mean, and the range over seeds; base:
    its `open_figures`."""
    if not done:
        return "no result yet\n"
    titles = [title for title, _, _ in COLUMNS]
    lines = [["variant", *titles, "seeds"]]
    for label in variants:
        rows = [row for row in done if row["label"] == label]
        if rows:
            cells = [cell(rows, key, style) for _, key, style in COLUMNS]
            lines.append([label, *cells, str(len(rows))])
    return (
        f"held-out captions, base {done[0]['right_base']:.1%} right, "
        f"{base['color_entropy']:.2f} bits, circles "
        f"{base['circle_flatness']:.2f}; in brackets the range over seeds\n\n"
        + evaluation.aligned(lines)
    )


def cell(rows, key, style):
    """Mean and range of a figure over seeds; those that have none are left out."""
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return ""
    mean, least, most = (
        style.format(value) for value in (np.mean(values), min(values), max(values))
    )
    return mean if least == most else f"{mean} ({least} to {most})"


def show_open(runs, device):
    """--open: what the caption leaves open, of the base and of runs."""
    G = drpo.load_generator("toy", device=device)
    print("base", json.dumps(open_figures(G)))
    for run in runs:
        G.load_lora(run)
        print(run, json.dumps(open_figures(G)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tables", nargs="?", default="", help=f"comma-separated: {', '.join(TABLES)}"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated [%(default)s]")
    parser.add_argument("--steps", type=int, default=0, help="updates; default: the variant's")
    parser.add_argument("--samples", type=int, default=8, help="pictures a caption [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once [%(default)s]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="", help="default: runs/ablation-TABLES")
    parser.add_argument(
        "--open", nargs="+", metavar="RUN", help="what the caption leaves open, of runs"
    )
    parser.add_argument(
        "--variant", default="", help=argparse.SUPPRESS
    )  # one process of an ablation
    arguments = parser.parse_args()
    arguments.out = Path(arguments.out or f"runs/ablation-{arguments.tables}")
    try:
        if arguments.variant:
            run_variant(arguments.variant)
        elif arguments.open:
            show_open(arguments.open, arguments.device)
        else:
            sys.exit(1 if ablate(arguments) else 0)
    except rewards.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
