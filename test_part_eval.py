"""Tests of eval.py."""
import json
import threading
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drpo
import eval as E
import rewards

TOY = Path(drpo.__file__).parent / "toy"


@pytest.fixture(scope="session")
def _ev_generator():
    return drpo.load_generator("toy")


@pytest.fixture(scope="session")
def _ev_runs(_ev_generator, tmp_path_factory):
    """Two runs of the toy as training leaves them: one whose LoRA was never trained, one of random weights."""
    G, folders = _ev_generator, []
    for name, scale in (("untrained", 0.0), ("moved", 0.2)):
        torch.manual_seed(0)
        params = G.add_lora(4, 4.0)
        for p in params:
            p.data += scale * torch.randn(p.shape) * p.shape[-1] ** -0.5
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        settings = dict(model="toy", reward="scene", watch="jpeg", seed=0, full=False)
        (folder / "config.json").write_text(json.dumps(settings))
        G.save_lora(folder)
        folders.append(folder)
    G.remove_lora()
    return folders


def _ev_main(capsys, *argv):
    """eval.main -> (exit code, stdout, stderr)."""
    code = 0
    try:
        E.main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


class _ev_Judge(BaseHTTPRequestHandler):
    """Prefers the picture of more bytes; prompts with tie, mute or first get: tie, no answer, always A."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        sizes = [len(c["image_url"]["url"]) for c in content if c["type"] == "image_url"]
        text = content[0]["text"]
        word = next((w for w in ("tie", "mute", "first") if f" {w}" in text.split("\n")[0]), "")
        reply = {"tie": "Answer: tie", "mute": "I cannot say.", "first": "**Answer: A**"}.get(
            word, f"A shows it.\nAnswer: {'A' if sizes[0] > sizes[1] else 'B'}")
        data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def _ev_judge():
    """Address of a judge that runs on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _ev_Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1?model=m"
    server.shutdown()
    server.server_close()


def test_eval_untrained_lora_changes_nothing_and_the_report_repeats(_ev_runs, tmp_path, capsys):
    reports = []
    for n in (1, 2):
        code, out, _ = _ev_main(capsys, _ev_runs[0], "--limit", 6, "--samples", 4, "--save-pictures", "--device", "cpu",
                                "--out", tmp_path / str(n))
        assert code == 0 and "win rate" in out
        reports.append((tmp_path / str(n) / "report.json").read_bytes())
    assert reports[0] == reports[1]
    c = json.loads(reports[0])["columns"]["untrained"]
    for figures in (*c["rewards"].values(), c["accuracy"]["scene"]["all"]):
        assert figures["difference"] == [0, 0, 0] and figures["win_rate"] == [0.5, 0.5, 0.5]
    assert set(c["rewards"]) == {"scene", "jpeg"} and c["distance"] == 0 and c["diversity"]["relative"] == [1, 1, 1]
    assert len(list((tmp_path / "1" / "pictures" / "untrained").iterdir())) == 24
    assert Image.open(tmp_path / "1" / "grid.png").width > 6 * 64


def test_eval_table_has_a_column_for_each_run_and_for_best_of(_ev_runs, _ev_judge, tmp_path, capsys):
    code, out, _ = _ev_main(capsys, *_ev_runs, "--limit", 4, "--samples", 2, "--best-of", 3, "--judge", _ev_judge,
                            "--device", "cpu", "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and list(report["columns"]) == ["base", "untrained", "moved", "base best-of-3"]
    assert (tmp_path / "report.md").read_text() in out
    best, moved = report["columns"]["base best-of-3"], report["columns"]["moved"]
    assert best["rewards"]["scene"]["win_rate"][0] >= 0.5  # the base's own picture is one of the candidates
    assert moved["distance"] > 0.02 and report["columns"]["untrained"]["distance"] == 0
    assert set(best["accuracy"]["scene"]) > {"all"}
    # the stand-in finds neither of two equal pictures larger and says B: undecided, so a tie
    assert report["columns"]["untrained"]["judge"]["win_rate"] == [0.5, 0.5, 0.5]
    assert sum(moved["judge"][k] for k in ("wins", "ties", "losses")) == 4 and moved["judge"]["no_answer"] == 0


def test_eval_pictures_depend_on_no_batch_and_match_the_generator(_ev_generator):
    G, prompts = _ev_generator, ["a red circle", "two blue squares", "a triangle"]
    found = []
    for batch in (2, 5):
        flat, x = zip(*[(f, x) for f, x, _ in E.generate(G, prompts, 3, 7, batch)])
        assert sum(flat, []) == list(range(9))
        found.append(torch.cat(x))
    assert torch.allclose(*found, atol=1e-4)
    fewer = torch.cat([x for _, x, _ in E.generate(G, prompts, 2, 7, 16)])  # noise i is the same for any n
    assert torch.allclose(fewer, found[0].reshape(3, 3, *fewer.shape[1:])[:, :2].flatten(0, 1), atol=1e-4)


def test_eval_bootstrap_interval_covers_the_truth():
    rng, hits, trials = np.random.default_rng(1), 0, 400
    for _ in range(trials):
        effect = 0.3 + rng.normal(0, 1, (60, 1))  # prompts differ, and so do the pictures of a prompt
        value, low, high = E.mean_interval(effect + rng.normal(0, 2, (60, 4)))
        assert low <= value <= high
        hits += low <= 0.3 <= high
    assert 0.91 <= hits / trials <= 0.98  # 0.95 within three standard errors, less the bias of 60 clusters
    naive = E.mean_interval(np.repeat(rng.normal(0, 1, (60, 1)), 50, 1))  # 3000 pictures, but only 60 prompts
    assert naive[2] - naive[1] > 0.3


def test_eval_interval_of_little_or_nothing():
    assert E.interval([], []) == [None, None, None] and E.interval([2.0], [4]) == [0.5, None, None]
    assert E.mean_interval(np.array([[np.nan, 1.0], [np.nan, np.nan], [3.0, 5.0]]))[0] == 3.0


def test_eval_win_rate_counts_ties_as_half():
    found = E.compare([[1.0, 2.0], [3.0, np.nan]], [[1.0, 3.0], [2.0, 9.0]])  # tie, win; loss, no opinion
    assert found["win_rate"][0] == pytest.approx(0.5) and found["difference"][0] == pytest.approx(0.0)
    assert E.compare([[1.0], [1.0]], [[2.0], [1.0]])["win_rate"][0] == pytest.approx(0.75)


def test_eval_diversity_against_a_double_loop():
    x, keep = torch.randn(5, 4, 7), np.random.default_rng(0).random((5, 4)) < 0.6
    keep[0], keep[1] = False, True
    for p, found in enumerate(E.pair_distances(x, keep)):
        pairs = [float((x[p, i] - x[p, j]).norm()) for i in range(4) for j in range(i) if keep[p, i] and keep[p, j]]
        assert found == pytest.approx(np.mean(pairs), rel=1e-5) if pairs else np.isnan(found)


def test_eval_diversity_of_right_pictures_is_compared_on_the_same_prompts():
    base = torch.tensor([[[0.0], [1.0]], [[0.0], [10.0]]])  # an easy prompt of little, a hard one of much diversity
    right_base, right_tuned = np.array([[True, True], [True, False]]), np.ones((2, 2), bool)
    found = E.diversity(base, base, right_base, right_tuned)
    assert found["relative"][0] == 1.0 and found["prompts"] == 1  # the very same pictures: no more, no less diverse
    assert found["own"] == pytest.approx(5.5)
    assert E.diversity(base, base, ~right_tuned, right_tuned)["relative"] == [None, None, None]


def test_eval_best_of_against_a_loop():
    P, N, S = 5, 3, 4
    scores = {"a": torch.randn(P, N * S), "b": torch.randn(P, N * S), "c": torch.randn(P, N * S)}
    scores["a"][0, :] = torch.nan
    reward = rewards.Reward("a,b", {"a": None, "b": None}, {"a": 1.0, "b": 0.5})
    index = E.best_index(reward, ["a", "b"], scores, S)
    for p in range(P):
        for s in range(S):
            slots = [c * S + s for c in range(N)]
            values = reward.combine({k: scores[k][p, slots] for k in "ab"}).tolist()
            assert index[p, s] == slots[int(np.argmax(values))]


def test_eval_judge_asks_in_both_orders(_ev_judge):
    plain = Image.new("RGB", (64, 64))
    rich = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    prompts = ["x", "y", "a tie", "a mute one", "the first one"]
    found = E.judge(_ev_judge, prompts, [plain, rich, plain, plain, plain], [rich, plain, rich, rich, rich])
    assert {k: found[k] for k in ("wins", "ties", "losses", "no_answer", "order_decided")} == dict(
        wins=1, ties=2, losses=1, no_answer=1, order_decided=1)
    assert found["win_rate"][0] == 0.5


def test_eval_generate_writes_pictures_side_by_side(_ev_runs, tmp_path, capsys):
    code, _, _ = _ev_main(capsys, _ev_runs[1], "--generate", "a red circle", "--generate", "two blue squares",
                          "--samples", 2, "--device", "cpu", "--out", tmp_path)
    assert code == 0 and (tmp_path / "generate.png").exists() and len(list((tmp_path / "generate").iterdir())) == 8


def test_eval_bad_input_is_one_line(_ev_runs, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    state = load_file(_ev_runs[0] / drpo.LORA_FILE)
    save_file(state, tmp_path / "other.safetensors", metadata={"base_model": "sdxl-turbo", "format": "pt"})
    save_file({k: v for k, v in state.items() if "mid_block" not in k}, tmp_path / "part.safetensors",
              metadata={"base_model": "elsewhere/toy"})
    (tmp_path / "torn.safetensors").write_bytes(b"123")
    for argv, words in [
            ([tmp_path / "folder"], ["folder", "no run"]),
            ([tmp_path / "nothing"], ["nothing", "no such run"]),
            ([], ["name a run"]),
            ([tmp_path / "torn.safetensors"], ["not a readable LoRA"]),
            ([tmp_path / "other.safetensors", "--model", "toy", "--rewards", "scene"], ["sdxl-turbo", "toy"]),
            ([tmp_path / "part.safetensors", "--model", "toy", "--rewards", "scene"], ["elsewhere/toy, and toy"]),
            ([tmp_path / "part.safetensors", "--model", "toy"], ["--rewards"]),
            ([_ev_runs[0], "--prompts", tmp_path / "empty.txt"], ["empty"]),
            ([_ev_runs[0], "--rewards", "scenne"], ["scenne", "scene"]),
            ([_ev_runs[0], "--samples", "0"], ["--samples"]),
            ([_ev_runs[0], "--smaples", "4"], ["--smaples"]),
            (["--ablate", "kernl"], ["kernl", "kernel"]),
            (["--bench", "nothing"], ["nothing"])]:
        code, _, err = _ev_main(capsys, *argv, "--device", "cpu", "--limit", 1, "--out", tmp_path / "out")
        line = err.strip().splitlines()
        assert code == 2 and len(line) == 1 and line[0].startswith("error: "), (argv, err)
        assert all(word in line[0] for word in words), line


def test_eval_pictures_of_a_run(tmp_path):
    small = [[Image.new("RGB", (64, 64), c) for c in ("red", "green")] for _ in (0, 1)]
    grid = E.picture_grid(small, ["a very long caption " * 9, "b"], ("base", "tuned"), marks=[None, [True, None]])
    red = (np.asarray(grid) == (255, 0, 0)).all(-1)  # enlarged by a whole factor: a crisp square with a thin frame
    assert 2 * 180**2 < red.sum() < 2 * 192**2
    metrics = [{"step": s, "reward_mean": 0.1 * s, "reward_best": 0.1 * s + 1, "reward_worst": 0.0, "diversity": 1.0,
                "watch/jpeg": float("nan")} for s in range(1, 60)]
    for n, name in ((59, "a.png"), (1, "b.png")):
        E.draw_curve(metrics[:n], tmp_path / name)
        assert Image.open(tmp_path / name).size == (880, 310)  # no panel for a reward that has no opinion
    E.draw_curve([], tmp_path / "c.png")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.png", "b.png"]


@pytest.mark.parametrize("target", E.METHODS.values())
def test_eval_alternatives_pull_toward_the_better_pictures(target):
    torch.manual_seed(0)
    cfg = drpo.Config(anchors=1 if target is E.best_of_k_target else 2, lambda_ref=0.0)
    z = torch.randn(2, 6, 5)  # (P, K, D)
    better, worse = z[:, :cfg.anchors], z[:, -cfg.anchors:]
    masks = [torch.ones(2, cfg.anchors, dtype=torch.bool) for _ in (0, 1)]
    (z_star, weight), = target(z, z.clone(), better, worse, masks, cfg)[0]
    gain = ((z_star - z) * (better.mean(1, keepdim=True) - worse.mean(1, keepdim=True))).sum(-1)
    assert weight.shape == (2, 1, 1) and gain.mean() > 0
    masks[0][1] = masks[1][1] = False  # a skipped prompt stays where it is
    (z_star, _), = target(z, z.clone(), better, worse, masks, cfg)[0]
    assert torch.equal(z_star[1], z[1]) and not torch.equal(z_star[0], z[0])


def test_eval_alternatives_stand_in_for_the_target_of_drpo():
    import inspect
    for target in E.METHODS.values():
        names = list(inspect.signature(target).parameters)
        assert names[:6] == list(inspect.signature(drpo.drpo_target).parameters)
    known = {f.name for f in fields(drpo.Config)} | {"method"}
    assert all(set(settings) <= known for variants in E.ABLATIONS.values() for settings in variants.values())


def test_eval_ablation_goes_on_with_what_is_there(tmp_path, capsys):
    for seed, right in ((0, 0.5), (1, 0.7)):
        for label, settings in E.ABLATIONS["kernel"].items():
            folder = tmp_path / f"{label}-seed{seed}"
            folder.mkdir()
            job = dict(label=label, seed=seed, settings=settings | {"steps": 3}, device="cpu", samples=8)
            result = dict(right=right, right_base=0.4, diversity_right=None, diversity=1.0, distance=0.1, reward=0.6,
                          reward_base=0.5, minutes=1.0)
            (folder / "result.json").write_text(json.dumps(job | result))
    code, out, _ = _ev_main(capsys, "--ablate", "kernel", "--seeds", "0,1", "--steps", 3, "--device", "cpu",
                            "--out", tmp_path)
    assert code == 0 and len(json.loads((tmp_path / "results.json").read_text())) == 6
    assert "60.0% ± 14.1%" in out and "base: 40.0% right" in out
