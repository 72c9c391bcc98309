"""Tests of lab/: the toy's checker, the ablations, the paper's table, a person as the reward.

    python -m pytest -q -n 2 lab/test_lab.py
"""
import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import ablate  # noqa: E402
import card  # noqa: E402
import curve  # noqa: E402
import drpo  # noqa: E402
import make_toy  # noqa: E402
import ocr  # noqa: E402
import paper  # noqa: E402
import rewards  # noqa: E402
from person import Person  # noqa: E402
from scene import scene  # noqa: E402

from test_drpo import (  # noqa: E402, F401
    assert_close, in_float64, loop_drift, mean_scale, models, pipeline_sample, sample_of,
    some_noise,
)


def to_images(x):
    """(B, 3, 64, 64) in [-1, 1] -> PIL pictures."""
    pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return list(map(Image.fromarray, pixels.numpy()))


@pytest.fixture(scope="module")
def rendered():
    """Captions, their rows and slots of right pictures: every held-out caption twice and every
    second training one."""
    train, heldout = make_toy.captions()
    rows = heldout * 2 + train[::2]
    g = torch.Generator().manual_seed(0)
    noise = make_toy.careful(torch.randn(len(rows), 4, 8, 8, generator=g))
    prompts, kind, spec = zip(*rows)
    kind = torch.tensor(kind)
    spec = torch.tensor(spec)
    slots = make_toy.objects(kind, spec, make_toy.projections(noise))
    shade = torch.rand(len(rows), generator=torch.Generator().manual_seed(1))
    return prompts, kind, spec, slots, shade


def changed(slots, kind, spec, what):
    """Slots with one attribute changed, and which rows the change makes wrong."""
    slots = slots.clone()
    named = spec[:, 2] >= 0
    if what == "color":
        slots[:, 0, 4] = (slots[:, 0, 4] + 1) % 6
        return slots, named
    if what == "shape":  # of the first object; where two differ only in order, the third one
        slots[:, 0, 3] = 3 - slots[:, 0, 3] - slots[:, 1, 3]
        single = (kind == 0) | (kind == 2) | (kind == 3)
        slots[single, 0, 3] = (spec[single, 1].float() + 1) % 3
        return slots, torch.ones_like(named)
    if what == "missing":  # the last object; a picture with one object would be blank
        last = spec[:, 0].long() - 1
        slots[torch.arange(len(slots)), last, 2] = -9
        return slots, torch.ones_like(named)
    if what == "extra":
        free = spec[:, 0] == 1
        slots[free, 0, :3] = torch.tensor([18.0, 32.0, 9.0])
        slots[free, 1] = slots[free, 0]
        slots[free, 1, 0] = 46.0
        return slots, free
    slots[:, :2, :2] = slots[:, :2, :2].flip(1)  # swap places
    return slots, kind == 4


class TestToy:
    """Against the toy's renderer, which the checker does not know; and the ablations."""

    def test_scene_right_on_true_renderings(self, rendered):
        prompts, _, _, slots, shade = rendered
        images = to_images(make_toy.render(slots, shade))
        scores = scene(images, prompts)
        assert sum(s == 1 for s in scores) >= 0.99 * len(scores)
        assert scene.correct(images, prompts) == [s == 1 for s in scores]
        assert all(0 <= s <= 1 for s in scores)
        assert sum(scene.readable(image) for image in images) >= 0.99 * len(images)
        assert scores == scene(images, prompts)  # deterministic

    @pytest.mark.parametrize("what", ["color", "shape", "missing", "extra", "side"])
    def test_scene_sees_one_changed_attribute(self, rendered, what):
        prompts, kind, spec, slots, shade = rendered
        slots, wrong = changed(slots, kind, spec, what)
        picked = torch.nonzero(wrong).flatten().tolist()
        images = to_images(make_toy.render(slots, shade)[wrong])
        scores = scene(images, [prompts[i] for i in picked])
        assert len(scores) > 20
        assert sum(s < 1 for s in scores) >= 0.99 * len(scores)

    def test_scene_score_is_graded(self):
        def score(prompt, *slots):
            rows = torch.tensor([[*slots, *[(0, 0, -9, 0, 0)] * (4 - len(slots))]]).float()
            return scene(to_images(make_toy.render(rows, torch.zeros(1))), [prompt])[0]

        red_circle = (16.0, 32.0, 9.0, 0, 0)
        blue_square = (48.0, 32.0, 9.0, 1, 3)
        assert score("a red circle", red_circle) == 1
        assert score("a blue circle", red_circle) == 0.5  # the shape is right
        assert score("a blue square", red_circle) == 0
        assert score("a red circle and a blue square", red_circle, blue_square) == 1
        assert score("a photo of a blue square and a red circle", red_circle, blue_square) == 1
        assert score("a red circle and a blue square", red_circle) == 0.5  # one of two
        assert score("a blue square and a red circle", red_circle) == 0.5
        assert score("a circle to the left of a square", red_circle, blue_square) == 1
        assert score("a circle to the right of a square", red_circle, blue_square) == 0.5
        assert score("a circle above a square", red_circle, blue_square) == 0.5
        assert score("two red circles", red_circle) == 0.5
        assert score("a circle", red_circle, blue_square) == 0.5

    def test_scene_unreadable_pictures(self):
        rng = np.random.default_rng(0)
        images = [Image.new("RGB", (64, 64), color)
                  for color in ("white", "black", (222, 62, 62), (240, 240, 240))]
        for side in (64, 5):  # noise, and smooth noise
            for _ in range(20):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                images.append(Image.fromarray(pixels).resize((64, 64)))
        for prompt in ("a red circle", "four blue squares", "a circle above a square",
                       "a black circle and a red square"):
            scores = scene(images, [prompt] * len(images))
            assert max(scores) <= 0.5
            assert sum(scores) / len(scores) < 0.15
        assert not any(scene.readable(image) for image in images)

    def test_scene_captions(self):
        assert scene.tag("a photo of a circle") == "single_object"
        assert scene.tag("a circle and a square") == "two_object"
        assert scene.tag("three squares") == "counting"
        assert scene.tag("A picture of four red  circles.") == "counting"
        assert scene.tag("a red circle") == "colors"
        assert scene.tag("a circle to the left of a square") == "position"
        assert scene.tag("a red circle and a blue circle") == "color_attr"
        image = Image.new("RGB", (64, 64), "white")
        assert scene.tag("a dog on a beach") is None
        scores = scene([image] * 3, ["a dog on a beach", "", "a red circle and"])
        assert all(map(math.isnan, scores))
        assert scene.correct([image], ["a dog"]) == [False]
        for caption, kind, _ in sum(make_toy.captions(), []):
            assert scene.tag(caption) == make_toy.KINDS[kind]
        with pytest.raises(ValueError, match="1 images but 2 prompts"):
            scene([image], ["a circle"] * 2)

    def test_scene_other_sizes_and_modes(self):
        slots = torch.tensor([[(20.0, 30.0, 9.0, 2, 4)] + [(0, 0, -9, 0, 0)] * 3])
        image = to_images(make_toy.render(slots, torch.zeros(1)))[0]
        others = [image.resize((128, 128)), image.convert("RGBA")]
        assert scene(others, ["a purple triangle"] * 2) == [1, 1]

    @pytest.mark.parametrize("field", ("best-of-k", "pairwise"))
    def test_ablation_fields_pull_toward_the_better_pictures(self, field):
        """The alternatives of lab/ablate.py are entries of drpo's table, and nothing of drpo is
        replaced."""
        torch.manual_seed(0)
        target = drpo.FIELDS[field]
        m = 1 if field == "best-of-k" else 2
        drpo.resolved(drpo.Config(anchors=m, candidates=6, field=field))
        kw = dict(radii=(0.2, 0.5), kernel="laplacian", eta=1.0, lambda_ref=0.0)
        z = torch.randn(6, 5)
        z_star, weight, _ = target(z, z.clone(), z[:m], z[-m:], **kw)
        gain = ((z_star - z) * (z[:m].mean(0) - z[-m:].mean(0))).sum(-1)
        assert float(weight) > 0
        assert gain.mean() > 0
        z_star, _, _ = target(z, z.clone(), z[:0], z[:0], **kw)
        assert torch.equal(z_star, z), "a prompt without anchors stays where it is"

    def test_drift_alone_on_colours(self):
        """No preference moves the mean colours; on every other map the objective is the
        dipole's."""
        torch.manual_seed(0)
        kw = dict(eta=1.5, radii=(0.5,), kernel="laplacian")
        z = torch.randn(5, 6)
        z_ref = torch.randn(4, 6)
        z_star = ablate.drift_on_colours_target(z, z_ref, z[:1], z[-1:], lambda_ref=0.7, **kw)[0]
        z64, ref64 = in_float64(z, z_ref)
        V, _ = loop_drift(z64, ref64, (0.5,), "laplacian")
        u = mean_scale([(a, b) for a in z64 for b in z64]) / 6 ** 0.5
        assert_close(z_star, z64 + 1.5 * u * 0.7 * V)
        z = torch.randn(5, 7)
        z_ref = torch.randn(4, 7)
        other = ablate.drift_on_colours_target(z, z_ref, z[:1], z[-1:], lambda_ref=0.7, **kw)[0]
        dipole = drpo.dipole_target(z, z_ref, z[:1], z[-1:], lambda_ref=0.2, **kw)[0]
        assert torch.equal(other, dipole)

    def test_colour_features_are_the_pictures(self):
        G = drpo.load_generator("toy")
        x = torch.randn(2, *G.noise_shape, generator=torch.Generator().manual_seed(0))
        h, = ablate.colour_features(G)(x, None)
        pictures = G.decode(x).numpy().astype(np.float64).reshape(2, 3, -1)
        expected = np.concatenate([pictures.mean(2), pictures.std(2, ddof=1)], 1)
        np.testing.assert_allclose(h[:, 0].numpy(), expected, atol=1e-5)

    def test_ablation_goes_on_with_what_is_there(self, tmp_path, capsys, monkeypatch):
        known = {f.name for f in dataclasses.fields(drpo.Config)} | {"patch"}
        for table in ablate.TABLES.values():
            assert all(set(settings) <= known for settings in table.values())
        opened = {"color_entropy": 2.0, "circle_flatness": 0.9}
        for seed, right in ((0, 0.5), (1, 0.7)):
            for label, settings in ablate.TABLES["kernel"].items():
                folder = tmp_path / f"{label}-seed{seed}"
                folder.mkdir()
                job = dict(label=label, seed=seed, settings=settings | {"steps": 3}, device="cpu",
                           samples=8)
                result = dict(right=right, right_base=0.4, diversity_right=None, diversity=1.0,
                              distance=0.1, reward=0.6, reward_base=0.5, minutes=1.0, **opened)
                (folder / "result.json").write_text(json.dumps(job | result))
        # of the base: the one thing that is computed
        monkeypatch.setattr(ablate, "open_figures", lambda G: opened)
        ablate.ablate(argparse.Namespace(tables="kernel", seeds="0,1", steps=3, samples=8, jobs=1,
                                         device="cpu", out=tmp_path))
        out = capsys.readouterr().out
        results = json.loads((tmp_path / "results.json").read_text())
        assert len(results) == 2 * len(ablate.TABLES["kernel"])
        assert "60.0% (50.0% to 70.0%)" in out
        assert "base 40.0% right" in out

    @pytest.mark.parametrize("reward,scored", (("scene_binary", "scene"), ("warm", "warm")))
    def test_a_variant_is_trained_and_its_figures_are_the_reports(self, reward, scored, tmp_path,
                                                                  monkeypatch):
        """A variant's reward is loaded by file; a reward that grades differently from the checker
        is scored by both."""
        opened = {"color_entropy": 2.0, "circle_flatness": 0.9}
        monkeypatch.setattr(ablate, "open_figures", lambda G: opened)
        settings = dict(steps=1, batch=2, candidates=4, anchors=2, radii=[0.5, 1.0],
                        reward=ablate.MINE + reward)
        job = dict(label="x", seed=3, settings=settings, device="cpu", samples=1)
        (tmp_path / "job.json").write_text(json.dumps(job))
        ablate.run_variant(tmp_path)
        result = json.loads((tmp_path / "result.json").read_text())
        run, = tmp_path.glob("run-*")
        config = json.loads((run / "config.json").read_text())
        assert config["seed"] == 3
        assert config["radii"] == [0.5, 1.0]
        assert config["kernel"] == "rbf"
        columns = json.loads((run / "eval" / "report.json").read_text())["columns"]
        tuned = columns[run.name]
        base = columns["base"]
        name = scored if scored == "scene" else ablate.MINE + scored
        assert set(tuned["rewards"]) == {"scene", name}
        assert result["reward"] == tuned["rewards"][name]["mean"][0]
        assert result["reward"] != base["rewards"][name]["mean"][0]
        assert result["right"] == tuned["accuracy"]["scene"]["all"]["mean"][0]
        assert result["right"] == result["kinds"]["all"]
        assert result["right_base"] == base["accuracy"]["scene"]["all"]["mean"][0] > 0.2
        assert result["color_entropy"] == 2.0
        assert {k: result[k] for k in job} == job

    def test_open_attributes_are_counted(self, rendered):
        """Entropy of colours and flatness of circles, on pictures drawn for the purpose."""
        def picture(x, y, r, shape, color):
            slots = torch.tensor([[(x, y, r, shape, color)] + [(0, 0, -9, 0, 0)] * 3])
            return to_images(make_toy.render(slots, torch.zeros(1)))[0]

        images = [picture(32.0, 32.0, 12.0, 0, color) for color in (0, 0, 1, 1, 2, 3)]
        found = ablate.open_attributes(images, ["a circle"] * 6)
        entropy = -(2 * math.log2(1 / 3) / 3 + 2 * math.log2(1 / 6) / 6)
        assert found["color_entropy"] == pytest.approx(entropy, abs=1e-6)
        assert found["circles"] == 6
        assert found["circle_flatness"] > 0.95
        flat = images[0].resize((64, 48)).crop((0, 0, 64, 48))
        canvas = Image.new("RGB", (64, 64), images[0].getpixel((0, 0)))
        canvas.paste(flat, (0, 8))
        assert ablate.flatness(canvas) == pytest.approx(0.75, abs=0.05)


# ===== a person, and readers of text, as the reward


class TestPerson:
    """Over HTTP, by a scripted person who likes green."""

    def get(self, address, path):
        url = address.replace("/?", path + ("&" if "?" in path else "?"))
        with urllib.request.urlopen(url) as answer:
            return answer.read()

    def judge(self, person, prompts):
        """Answers so many prompts: the greenest three are best, the least green worst."""
        for _ in range(prompts):
            task = {"number": None}
            while task["number"] is None:
                task = json.loads(self.get(person.address, "/task"))
                time.sleep(0.01)
            green = []
            for i in range(task["pictures"]):
                picture = self.get(person.address, f"/picture?number={task['number']}&i={i}")
                values = np.asarray(Image.open(io.BytesIO(picture)), float)
                green.append(values[..., 1].mean() - values[..., 0].mean())
            order = np.argsort(green)
            marks = [0] * len(green)
            for i in order[-3:]:
                marks[i] = 1
            for i in order[:3]:
                marks[i] = -1
            body = json.dumps({"number": task["number"], "marks": marks}).encode()
            url = person.address.replace("/?", "/answer?")
            urllib.request.urlopen(urllib.request.Request(url, body)).read()

    def test_a_run_follows_the_person(self, tmp_path):
        reward = Person()
        judge = threading.Thread(target=self.judge, args=(reward, 16), daemon=True)
        judge.start()
        small = dict(
            steps=8, batch=2, candidates=12, anchors=3, lr=4e-3, preview_every=1, device="cpu"
        )
        run = drpo.train(
            drpo.Config.preset("toy", out=str(tmp_path / "run"), **small), reward=reward
        )
        judge.join(60)
        answers = (run / "answers.jsonl").read_text().splitlines()
        assert len(answers) == 16
        assert len(self.get(reward.address, "/preview")) > 1000
        G = drpo.load_generator("toy")
        G.load_lora(run)
        prompts = ["a circle", "a square", "a triangle"] * 8
        e = torch.stack([drpo.prompt_noise(5, i, G.noise_shape) for i in range(24)])
        green = []
        for context in (G.reference(), contextlib.nullcontext()):
            with context, torch.no_grad():
                x = G.decode(G.sample(e, G.encode(prompts)))
            green.append(float(x[:, 1].mean() - x[:, 0].mean()))
        assert green[1] > green[0] + 0.01

    def test_answers_are_asked_once(self, tmp_path):
        images = [Image.new("RGB", (8, 8), (0, 40 * i, 0)) for i in range(6)]
        first = Person()
        first.run_folder = tmp_path
        threading.Thread(target=self.judge, args=(first, 1), daemon=True).start()
        want = first(images, ["a"] * 6)
        again = Person()  # of --resume
        again.run_folder = tmp_path
        assert again(images, ["a"] * 6) == want == [-1, -1, -1, 1, 1, 1]

    def test_skipped_and_foreign_answers(self):
        person = Person()
        found = []
        worker = threading.Thread(
            target=lambda: found.append(person([Image.new("RGB", (8, 8))], ["a"]))
        )
        worker.start()
        while person.task is None:
            time.sleep(0.01)
        number = person.task["number"]
        assert not person.take(number + 1, [1])
        assert not person.take(number, [1, 1])
        assert not person.take(number, [7])
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(person.address.split("?")[0] + "task")
        assert b"Which is best?" in self.get(person.address, "/")
        assert person.take(number, None)
        worker.join(60)
        assert math.isnan(found[0][0])


class TestOcr:
    """The edit distance and what is no opinion; the reader itself is a stand-in."""

    @pytest.mark.parametrize(
        "read,score",
        (("Hello World", 1), ("xx helloworld!", 1), ("hello", 0.5), ("", 0), ("q" * 99, 0)),
    )
    def test_text_in_picture(self, read, score):
        reward = ocr.TextInPicture(lambda image: read)
        assert reward([None], ['a sign that says "Hello World"']) == pytest.approx([score])

    def test_no_opinion(self):
        def fails(image):
            raise OSError("no tesseract")

        assert math.isnan(ocr.TextInPicture(fails)([None], ['"a"'])[0])
        assert math.isnan(ocr.TextInPicture(lambda image: "a")([None], ["a cat"])[0])


@pytest.fixture
def toy_lora(tmp_path):
    """A LoRA file of the toy with random weights."""
    G = drpo.load_generator("toy")
    G.add_lora(2, 2.0)
    for layer in G.lora.values():
        torch.nn.init.normal_(layer.up, std=0.05)
    (tmp_path / "lora").mkdir()
    G.save_lora(tmp_path / "lora", unet="", timestep="-1", prediction="")
    return tmp_path / "lora"


class TestPaper:
    """The paper's table on the toy, with small sets."""

    def test_means_are_those_of_the_pictures(self, toy_lora, tmp_path, capsys):
        """Seeds as the authors have them: the base's mean score from pictures drawn here."""
        argv = "--sets scenes-test --limit 3 --seeds 42,43 --batch 2 --rewards jpeg".split()
        paper.main([str(toy_lora), *argv, "--out", str(tmp_path / "out")])
        G = drpo.load_generator("toy")
        scores = []
        prompts = rewards.load_prompts("scenes-test")[:3]
        for seed in (42, 43):
            for n, prompt in enumerate(prompts):
                generator = torch.Generator().manual_seed(seed * 1_000_000 + n)
                e = torch.randn(G.noise_shape, generator=generator)[None]
                with torch.no_grad():
                    picture = rewards.to_pil(G.decode(G.sample(e, G.encode([prompt]))))
                scores += rewards.load("jpeg")(picture, [prompt]).tolist()
        lines = capsys.readouterr().out.splitlines()
        row = next(line for line in lines if line.startswith("| base"))
        assert float(row.split("|")[2].split()[0]) == pytest.approx(np.mean(scores), rel=1e-3)

    def test_goes_on_where_it_was_stopped(self, toy_lora, tmp_path):
        """A torn line is redone, whole ones are not."""
        argv = "--sets scenes-test --limit 3 --seeds 42 --rewards jpeg".split()
        argv = [str(toy_lora), *argv, "--out", str(tmp_path / "out")]
        paper.main(argv)
        file = tmp_path / "out" / "base-scenes-test-42.jsonl"
        lines = file.read_text().splitlines()
        file.write_text('{"jpeg": 77.0}\n' + lines[1] + '\n{"jpeg": -1')
        paper.main(argv)
        assert file.read_text().splitlines() == ['{"jpeg": 77.0}', *lines[1:]]

    def test_published_rows(self, tmp_path):
        """DrPO's own SD-Turbo row under its columns; what the page has not is empty."""
        parts = dict.fromkeys((*paper.SHOWN, "hpsv2"), len)
        judges = {name: rewards.Reward(name, parts, {}) for name in paper.REWARDS}
        args = argparse.Namespace(out=tmp_path, seeds=[42], limit=None, published="sd-turbo")
        text = paper.table(args, [], list(paper.REWARDS), judges)
        lines = [re.split(r"\s*\|\s*", line) for line in text.strip().splitlines()]
        head, _, *rows = lines
        drpo_row = next(row for row in rows if row[1] == "DrPO (published)")
        assert drpo_row[head.index("pickapic-test: pickscore")] == "23.49"
        assert drpo_row[head.index("parti: imagereward")] == "7.46"
        assert drpo_row[head.index("parti: hpsv2")] == ""


class TestOneStepBases:
    """What the notebook says of Hyper-SD's one-step LoRA and of Lightning."""

    def test_a_one_step_lora_fused_into_its_base(self, models, tmp_path):
        """Fused by diffusers into a folder, it samples as its own scheduler does at 800; then both
        LoRAs stack as adapters on the base."""
        from diffusers import DiffusionPipeline, LCMScheduler
        from peft import LoraConfig, get_peft_model_state_dict
        pipe = DiffusionPipeline.from_pretrained(models / "sd")
        pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=[*drpo.LORA_TARGETS]))
        torch.manual_seed(0)
        for name, p in pipe.unet.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.05)
        layers = get_peft_model_state_dict(pipe.unet)
        pipe.save_lora_weights(tmp_path / "hyper", unet_lora_layers=layers)
        base = DiffusionPipeline.from_pretrained(models / "sd")
        base.load_lora_weights(tmp_path / "hyper", adapter_name="hyper")
        base.fuse_lora()
        base.unload_lora_weights()
        base.save_pretrained(tmp_path / "fused")

        e = some_noise()
        G = drpo.load_generator(tmp_path / "fused", timestep=800)
        G.noise_scale = 1.0  # LCM's; the tiny base's own Euler scheduler, trailing, begins at sigma
        config = pipe.scheduler.config
        lcm = LCMScheduler(**{k: v for k, v in config.items() if k.startswith("beta")})
        pipe.scheduler = lcm
        want = pipeline_sample(pipe, e, timesteps=[800])
        assert_close(sample_of(G, e), want.double().numpy(), 5e-5)
        G.add_lora(2, 2.0)
        for layer in G.lora.values():
            torch.nn.init.normal_(layer.up, std=0.05)
        G.save_lora(tmp_path / "tuned")
        both = DiffusionPipeline.from_pretrained(models / "sd", scheduler=lcm)
        both.load_lora_weights(tmp_path / "hyper", adapter_name="hyper")
        both.load_lora_weights(tmp_path / "tuned", adapter_name="tuned")
        both.set_adapters(["hyper", "tuned"])
        want = pipeline_sample(both, e, timesteps=[800])
        assert_close(sample_of(G, e), want.double().numpy(), 5e-5)

    def test_lightning_predicts_the_sample(self, models):
        """--prediction sample on a `leading` base is EulerDiscreteScheduler(trailing, sample) up to
        Euler's scale of the noise."""
        from diffusers import DiffusionPipeline, EulerDiscreteScheduler
        pipe = DiffusionPipeline.from_pretrained(models / "sdxl")
        config, e = pipe.scheduler.config, some_noise()
        pipe.scheduler = EulerDiscreteScheduler.from_config(
            config, prediction_type="sample", timestep_spacing="trailing")
        want = pipeline_sample(pipe, e)
        pipe.scheduler = EulerDiscreteScheduler.from_config(
            config, prediction_type="epsilon", timestep_spacing="leading")
        mine = sample_of(drpo.Generator(pipe, prediction="sample"), e)
        assert (mine - want).norm() < 0.02 * want.norm()


class TestCurve:
    def test_a_torn_line_is_left_out(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "re\n{"step": 3}\n{"st')
        assert curve.read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]


class TestCard:
    def test_the_hub_reads_it(self, tmp_path):
        """huggingface_hub's own parser; nobody's folders are published, nothing is replaced."""
        from huggingface_hub import ModelCard
        out = tmp_path / "run"
        drpo.train(drpo.Config(
            model=str(drpo.MODELS["toy"]), reward="jpeg", steps=1, batch=1, candidates=4, anchors=2,
            timestep=998, out=str(out), device="cpu"))
        text = card.card(out)
        assert str(tmp_path) not in text
        read = ModelCard(text).data
        assert read.tags == ["lora", "text-to-image"]
        assert read.widget[0]["output"]["url"] == "samples/step-000001.png"
        assert "timesteps=[998]" in text
        settings = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**settings, "model": "sd-turbo"}))
        assert ModelCard(card.card(out)).data.base_model == "stabilityai/sd-turbo"
        (out / "README.md").write_text("mine")
        done = subprocess.run([sys.executable, card.__file__, str(out)], capture_output=True)
        assert done.returncode == 2
        assert (out / "README.md").read_text() == "mine"
