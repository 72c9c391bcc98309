"""The paper's table in one command: the published rows beside runs of one's own.

    python lab/paper.py runs/sd                          everything, hours on one GPU
    python lab/paper.py runs/sd --limit 64 --seeds 42    a trial
    python lab/paper.py runs/sd --sets geneval           GenEval: share of right pictures

As the authors evaluate: 2,048 Pick-a-Pic test prompts and PartiPrompts, one picture a prompt and
seed, seeds 42 to 46, the latent of prompt n from the seed 10^6 seed + n, drawn on the device in the
network's type. Scores grow in OUT/*.jsonl; the same command again goes on. In brackets 95%
intervals of a bootstrap over prompts; the published rows have none. The published GenEval run was
trained on the 553 prompts that it is tested on."""

import argparse
import itertools
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import drpo  # noqa: E402
import eval as evaluation  # noqa: E402
import rewards  # noqa: E402
from rewards import UserError  # noqa: E402

# PickScore, aesthetic, ImageReward x 10 on Pick-a-Pic's test prompts, then on PartiPrompts.
# Source: website/index.html of github.com/UGVly/DrPO dd473d8.
PUBLISHED = {
    "sd-turbo": {
        "SD-Turbo": (21.88, 6.054, 5.75, 22.29, 5.758, 5.37),
        "DRaFT": (24.69, 6.820, 9.63, 23.07, 6.516, 7.72),
        "VGGFlow": (23.73, 6.378, 7.74, 22.99, 6.027, 6.50),
        "DPO": (22.02, 6.080, 5.95, 22.39, 5.793, 5.21),
        "PSO": (21.88, 6.059, 5.80, 22.29, 5.763, 5.42),
        "GRPO": (21.98, 6.077, 6.08, 22.35, 5.779, 5.65),
        "DrPO": (23.49, 6.485, 9.54, 22.99, 6.284, 7.46)},
    "sdxl-turbo": {
        "SDXL-Turbo": (22.45, 6.059, 9.36, 22.77, 5.693, 9.13),
        "DRaFT": (24.45, 6.712, 12.70, 24.34, 6.485, 12.66),
        "VGGFlow": (24.27, 6.490, 12.19, 23.98, 6.200, 11.40),
        "DPO": (22.77, 6.227, 10.44, 22.85, 6.019, 11.25),
        "PSO": (22.56, 6.092, 8.97, 22.87, 5.744, 9.17),
        "GRPO": (22.50, 6.077, 9.57, 22.80, 5.710, 9.27),
        "DrPO": (23.66, 6.717, 12.46, 23.71, 6.665, 12.60)}}
REWARDS = {"pickapic-test": "pickscore,aesthetic,imagereward,hpsv2",
           "parti": "pickscore,aesthetic,imagereward,hpsv2"}  # any other set: GenEval's judge
UNITS = {"imagereward": 10}  # as the page prints it
SHOWN = ("pickscore", "aesthetic", "imagereward")  # what the page prints, in its order


def file_name(label):
    """A label as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-")


def noise(G, seed, number):
    """The latent of a prompt, as the authors' evaluation draws it: (4, h, w)."""
    generator = torch.Generator(G.device).manual_seed(seed * 1_000_000 + number)
    return torch.randn(G.noise_shape, generator=generator, device=G.device, dtype=G.dtype)


def judged(reward, images, prompts):
    """{column: one float a picture}: the scores of every part, and where a part tells right from
    wrong, `right`."""
    columns = {name: values.tolist() for name, values in reward.score(images, prompts).items()}
    for name in evaluation.checkers(reward):
        verdicts = evaluation.verdicts_of(name, reward.parts[name], images, prompts)
        columns[f"{name}: right"] = verdicts.tolist()
    return columns


@torch.no_grad()
def score_set(G, reward, prompts, seed, file, batch):
    """One picture of each prompt -> its scores as lines of `file`; what is there is not redone."""
    done = len(read_lines(file))
    began = time.perf_counter()
    for first in range(done, len(prompts), batch):
        texts = prompts[first:first + batch]
        e = torch.stack([noise(G, seed, first + i) for i in range(len(texts))])
        images = rewards.to_pil(G.decode(G.sample(e, G.encode(texts))))
        columns = judged(reward, images, texts)
        with open(file, "a") as f:
            for row in zip(*columns.values()):
                f.write(json.dumps(dict(zip(columns, row))).replace("NaN", "null") + "\n")
        made = first + len(texts)
        left = (time.perf_counter() - began) / (made - done) * (len(prompts) - made)
        print(f"\r{file.stem}: {made}/{len(prompts)}, left {left:.0f} s ", end="", file=sys.stderr)
    print(file=sys.stderr)


def read_lines(file):
    """A .jsonl -> list; a torn last line, of a run that was killed, is taken off the file."""
    if not file.exists():
        return []
    text = file.read_text()
    if not text.endswith("\n"):
        text = text[:text.rfind("\n") + 1]
        rewards.write_atomic(file, text)
    return list(map(json.loads, text.splitlines()))


def column(args, label, name, reward):
    """The mean of a reward over prompts and seeds with its interval -> text; "" if unknown."""
    scores = []
    for seed in args.seeds:
        rows = read_lines(args.out / f"{file_name(label)}-{name}-{seed}.jsonl")
        scores.append([row.get(reward) for row in rows[:args.limit]])
    values = UNITS.get(reward, 1) * np.array(scores, np.float64).T  # (prompts, seeds)
    if values.size == 0 or np.isnan(values).all():
        return ""
    return evaluation.number(evaluation.mean_interval(values))


def table(args, labels, sets, judges):
    """All rows as one markdown table."""
    columns = []
    for name in sets:
        parts = list(judges[name].parts)
        parts += [f"{part}: right" for part in evaluation.checkers(judges[name])]
        shown = [part for part in SHOWN if part in parts]
        columns += itertools.product([name], shown + sorted(set(parts) - set(shown)))
    lines = [["", *map(": ".join, columns)]]
    known = list(itertools.product(("pickapic-test", "parti"), SHOWN))
    for title, figures in PUBLISHED.get(args.published, {}).items():
        row = dict(zip(known, figures))
        lines.append([f"{title} (published)", *[str(row.get(key, "")) for key in columns]])
    for label in labels:
        cells = [column(args, label, name, part) for name, part in columns]
        lines.append([label, *cells])
    return evaluation.aligned(lines)


def paper(args):
    """Scores base and runs on every set, and prints the table."""
    runs = list(map(evaluation.open_run, args.runs))
    bases = {run["model"] for run in runs}
    if len(bases) > 1:
        raise UserError(f"runs of different bases, {' and '.join(sorted(bases))}: one at a time")
    first = runs[0]
    args.published = "toy" if first["model"] == "toy" else drpo.preset_of(first["model"])
    prompts = {}
    judges = {}
    for name in args.sets:
        prompts[name] = rewards.load_prompts(name)[:args.limit]
        default = "scene" if name.startswith("scenes") else "geneval"
        judges[name] = rewards.load(args.rewards or REWARDS.get(name, default), args.device)
    dtype = drpo.DTYPES["bf16" if args.device.startswith("cuda") else "fp32"]
    G = drpo.load_generator(first["model"], device=args.device, dtype=dtype, unet=first["unet"],
                            timestep=first["timestep"], prediction=first["prediction"])
    args.out.mkdir(parents=True, exist_ok=True)
    labels = ["base", *evaluation.labels_of(args.runs)]
    for label, run in zip(labels, [None, *runs]):
        if run:
            evaluation.load_tuned(G, run)  # before it the generator is the base
        for name in args.sets:
            for seed in args.seeds:
                file = args.out / f"{file_name(label)}-{name}-{seed}.jsonl"
                score_set(G, judges[name], prompts[name], seed, file, args.batch)
    text = table(args, labels, args.sets, judges)
    rewards.write_atomic(args.out / "table.md", text)
    print(f"{text}\nwritten: {args.out}/table.md")


def main(argv=None):
    """python lab/paper.py ...; what the user can mend ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_LORA", help="of one base")
    parser.add_argument("--sets", default="pickapic-test,parti", help="prompts by name")
    parser.add_argument("--rewards", default="", help="in the place of a set's own")
    parser.add_argument("--seeds", default="42,43,44,45,46")
    parser.add_argument("--limit", type=int, help="so many prompts of each set, the first ones")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once [%(default)s]")
    parser.add_argument("--out", type=Path, help="default: paper in the first run's folder")
    parser.add_argument("--device", default=device)
    with rewards.one_line_errors():
        args = parser.parse_args(argv)
        args.seeds = list(map(int, args.seeds.split(",")))
        args.sets = args.sets.split(",")
        run = Path(rewards.absolute(args.runs[0]))
        args.out = args.out or (run if run.is_dir() else run.parent) / "paper"
        paper(args)


if __name__ == "__main__":
    main()
