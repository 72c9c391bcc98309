"""The curve of a run, also while it trains: python lab/curve.py RUN ... -> RUN/curve.png

Reward (band: best to worst of a prompt), every watched reward, and diversity, over steps. Needs
matplotlib, which is no requirement of the project.
"""
import argparse
import contextlib
import json
import operator
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import drpo  # noqa: E402
import rewards  # noqa: E402


def read_metrics(folder):
    """metrics.jsonl of a run -> a dict of figures a step; a line that is being written, or was torn
    by a full disk, is left out."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = []
    for line in lines:
        with contextlib.suppress(ValueError):
            metrics.append(json.loads(line))
    return metrics


def draw(folder):
    """Write curve.png of a run. UserError: no run, or one without a step."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise rewards.UserError("lab/curve.py needs matplotlib: pip install matplotlib") from None
    drpo.read_config(folder)
    metrics = read_metrics(folder)
    if not metrics:
        raise rewards.UserError(f"{folder}: no step is made yet, there is no curve")
    names = sorted({name for m in metrics for name in m if name.startswith("watch/")})
    names = ["reward_mean", *names, "diversity"]
    figure = Figure(figsize=(4.6 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names)), names):
        known = [m for m in metrics if m.get(name) is not None]  # null: no opinion
        if name == "reward_mean" and known:
            band = operator.itemgetter("step", "reward_worst", "reward_best")
            axis.fill_between(*zip(*map(band, known)), alpha=0.2)
        if known:
            points = map(operator.itemgetter("step", name), known)
            axis.plot(*zip(*points), marker="." if len(known) < 40 else "")
        axis.set_title(name.removeprefix("watch/"))
        axis.set_xlabel("step")
    figure.savefig(Path(folder) / "curve.png", dpi=110)
    print(f"written: {folder}/curve.png")


if __name__ == "__main__":
    with rewards.one_line_errors():
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("runs", nargs="+", metavar="RUN")
        for run in parser.parse_args().runs:
            draw(run)
