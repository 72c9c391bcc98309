"""Tests of lab/: the GenEval reward, the toy's checker, the ablations, a person as the reward.

    python -m pytest -q -n 2 test_drpo.py lab/test_lab.py
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
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import ablate  # noqa: E402
import card  # noqa: E402
import curve  # noqa: E402
import drpo  # noqa: E402
import geneval  # noqa: E402
import make_toy  # noqa: E402
import ocr  # noqa: E402
import paper  # noqa: E402
import rewards  # noqa: E402
from geneval import Found  # noqa: E402
from rewards import UserError  # noqa: E402
from person import Person  # noqa: E402
from scene import scene  # noqa: E402

from test_drpo import (
    assert_close, as_batch, in_float64, loop_drift, mean_scale, reward_of,
)  # noqa: E402

def found_box(*boxes, score=0.95):
    return [Found(box, score) for box in boxes]

LEFT = (0, 40, 20, 60)
RIGHT = (80, 40, 100, 60)
LOW = (0, 80, 20, 100)
ONE = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
TWO = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
COUNT = {"tag": "counting", "include": [{"class": "dog", "count": 3}],
         "exclude": [{"class": "dog", "count": 4}]}
COLOUR = {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"},
                                           {"class": "cat", "count": 1, "color": "blue"}]}
PLACE = {"tag": "position", "include": [
    {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}


class ColourClip:
    """Texts are one-hot by colour; a picture is embedded as the colour its mean over the non-grey
    pixels is nearest."""
    palette = {"red": (1, 0, 0), "blue": (0, 0, 1), "green": (0, 1, 0), "white": (1, 1, 1),
               "black": (0, 0, 0)}

    def text(self, texts):
        rows = [[f" {colour}" in text for colour in geneval.COLOURS] for text in texts]
        return torch.tensor(rows).float()

    def image(self, crop):
        assert crop.shape[0] == 1
        assert (crop[0] - 0.6).abs().amax(0).min() < 0.01
        pixels = crop[0][:, (crop[0] - .6).abs().amax(0) > .01].mean(1)
        distance = {name: (pixels - torch.tensor(rgb)).norm() for name, rgb in self.palette.items()}
        nearest = geneval.COLOURS.index(min(distance, key=distance.get))
        return F.one_hot(torch.tensor([nearest]), 10).float()


GENEVAL_VERDICTS = int(
    "2008040140A800A4280010000201912C800000804464480000"
    "10080000000000003800040801020000040200008000200000", 16,
)


def geneval_cases(count=400):
    """Prompts of all kinds and what a detector might find, near every threshold -> (metadata,
    {class: rows of box and score}); an object's colour is COLOURS[its left edge mod 3]."""
    rng = np.random.default_rng(5)
    clauses = (
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
        {"class": "cat", "count": 1, "position": ["above", 0]},
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 2, "color": "orange"},
        {"class": "dog", "count": 3},
    )
    for _ in range(count):
        include = [clauses[rng.choice([0, 3, 4, 5])]] + [
            clauses[i] for i in rng.permutation([1, 2, 3])[: rng.integers(0, 3)]
        ]
        wanted = {"tag": str(rng.choice(["counting", "position"])), "include": include}
        if rng.random() < .3:
            wanted["exclude"] = [{"class": "dog", "count": include[0]["count"] + 1}]
        found = {}
        for name in ("dog", "cat"):
            corner = rng.integers(0, 80, (rng.integers(0, 5), 2))
            size = rng.integers(4, 30, 2)
            scores = rng.choice([.2, .3, .35, .9, .95], (len(corner), 1), p=[.1, .1, .1, .1, .6])
            found[name] = np.concatenate([corner, corner + size, scores], 1).astype(np.float32)
        yield wanted, found


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


class TestGenEval:
    """Its rules, its detector, its thresholds."""

    def test_reward_geneval_verdicts_of_the_original(self):
        """400 drawn cases; the bits of the number are what its evaluate_images.py, af4902f2, says
        of them."""
        verdicts = ""
        for wanted, rows in geneval_cases():
            objects = {name: [Found(tuple(row[:4]), round(float(row[4]), 6)) for row in found]
                       for name, found in rows.items()}
            got = geneval.judge(
                wanted, geneval.confident(objects, wanted["tag"]),
                lambda found, name: [geneval.COLOURS[int(f.box[0]) % 3] for f in found],
            )
            assert (got[1] == 1) == got[0]
            verdicts += "01"[got[0]]
        assert int(verdicts, 2) == GENEVAL_VERDICTS

    @pytest.mark.parametrize(
        "wanted, objects, correct, dense", [
            (ONE, {"dog": found_box(LEFT)}, True, 1),
            (ONE, {"cat": found_box(LEFT)}, False, 0),
            (TWO, {"dog": found_box(LEFT, LOW), "cat": found_box(RIGHT)}, True, 1),
            (TWO, {"dog": found_box(LEFT)}, False, 0.5),
            (COUNT, {"dog": found_box(*[LEFT] * 3)}, True, 1),
            (COUNT, {"dog": found_box(*[LEFT] * 2)}, False, (2 / 3 + 1) / 2),
            (COUNT, {"dog": found_box(*[LEFT] * 4)}, False, (1 + 2 / 3) / 2),
            (COUNT, {"dog": found_box(*[LEFT] * 9)}, False, 0.5),
            (COUNT, {}, False, 0.5),
            (COLOUR, {"dog": found_box("red"), "cat": found_box("blue")}, True, 1),
            (COLOUR, {"dog": found_box("blue"), "cat": found_box("blue")}, False, 0.75),
            (COLOUR, {"dog": found_box("blue"), "cat": found_box("red")}, False, 0.5),
            # only the best detection of the class is looked at
            (COLOUR, {"dog": found_box("blue", "red"), "cat": found_box("blue")}, False, 0.75),
            (PLACE, {"dog": found_box(LEFT), "cat": found_box(RIGHT)}, True, 1),
            (PLACE, {"dog": found_box(RIGHT), "cat": found_box(LEFT)}, False, 2 / 3),
            (PLACE, {"dog": found_box(LOW), "cat": found_box(LEFT)}, False, 2 / 3),
            (PLACE, {"dog": found_box(LEFT)}, False, 1 / 3),  # its target is missing
            (PLACE, {"cat": found_box(RIGHT)}, False, 1 / 3),
        ],
    )
    def test_reward_geneval_rules(self, wanted, objects, correct, dense):
        # here a box is its own colour
        got = geneval.judge(wanted, objects, lambda found, name: [f.box for f in found])
        assert got == (correct, pytest.approx(dense))

    def test_reward_geneval_every_pair_must_be_placed(self):
        wanted = {"include": [{"class": "cat", "count": 2},
                              {"class": "dog", "count": 1, "position": ["left of", 0]}]}
        middle = {"dog": found_box((40, 40, 60, 60)), "cat": found_box(LEFT, RIGHT)}
        assert geneval.judge(wanted, middle, None)[0] is False
        assert geneval.judge(wanted, middle | {"cat": middle["cat"][::-1]}, None)[0] is False
        left = middle | {"dog": found_box((-90, 40, -70, 60))}
        assert geneval.judge(wanted, left, None)[0] is True
        # a target whose colour is wrong is no target
        wanted = {"include": [{"class": "cat", "count": 1, "color": "red"},
                              {"class": "dog", "count": 1, "position": ["left of", 0]}]}
        objects = {"dog": found_box(LEFT), "cat": found_box(RIGHT)}
        blue = geneval.judge(wanted, objects, lambda found, name: ["blue"])
        assert blue == (False, pytest.approx(0.5))
        assert geneval.judge(wanted, objects, lambda found, name: ["red"]) == (True, 1)

    def test_reward_geneval_thresholds(self):
        objects = {
            "dog": [Found("a", 0.31), Found("b", 0.95), Found("c", 0.3), Found("d", 0.9)],
            "cat": [Found(i, 0.5 + i / 100) for i in range(20)],
            "bird": [Found(i, 0.95) for i in range(3)],
        }
        kept = geneval.confident(objects, "colors")
        assert [f.box for f in kept["dog"]] == ["b", "d", "a"]
        assert [f.box for f in kept["cat"]] == list(range(19, 3, -1))
        # of equal scores the benchmark, which turns an ascending order round, takes the last first
        ordered = np.argsort([f.score for f in objects["bird"]], kind="stable")[::-1].tolist()
        assert [f.box for f in kept["bird"]] == ordered == [2, 1, 0]
        kept = geneval.confident(objects, "counting")
        assert [f.box for f in kept["dog"]] == ["b"]
        assert kept["cat"] == []

    @pytest.mark.parametrize(
        "a, b, relations", [
            ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}),
            ((50, 0, 60, 10), (0, 0, 10, 10), {"right of"}),
            ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}),
            ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
            ((0, 0, 10, 10), (50, 50, 60, 60), {"left of", "above"}),
            ((0, 0, 10, 10), (0, 0, 10, 10), set()),
            # sizes 10 and 10: centres up to 2 apart are together; at 3.9 the rest is 1.9 of 3.9, at
            # 4.1 it is 2.1 of 4.1
            ((0, 0, 10, 10), (2, 0, 12, 10), set()),
            ((0, 0, 10, 10), (3.9, 0, 13.9, 10), set()),
            ((0, 0, 10, 10), (4.1, 0, 14.1, 10), {"left of"}),
            # the taller margin swallows the height
            ((0, 0, 10, 100), (20, 15, 30, 115), {"left of"}),
        ],
    )
    def test_reward_geneval_position(self, a, b, relations):
        assert geneval.relative_position(a, b) == relations

    def test_reward_geneval_detections(self):
        assert len(geneval.COCO) == 80
        odd = ["computer mouse", "tv remote", "computer keyboard"]
        assert geneval.COCO[64:67] == odd
        cat, dog = 15, 16
        assert geneval.COCO[15:17] == ["cat", "dog"]
        assert geneval.COCO[0] == "person"
        assert geneval.COCO[79] == "toothbrush"
        classes = torch.full((4, 81), -20.)
        classes[0, dog] = 5.
        classes[1, [cat, 80]] = torch.tensor([3., 3.])  # half cat, half nothing
        classes[2, 80] = 9.
        classes[3, cat] = 9.  # sure, but its mask is empty
        masks = torch.full((4, 16, 16), -9.)
        masks[0, 4:8, 2:10] = 4.
        masks[1, :, 8:] = 30.
        found = geneval.detections(classes, masks, (64, 64), (64, 48), (64, 48))
        assert set(found) == {"dog", "cat"}
        assert len(found["cat"]) == len(found["dog"]) == 1
        assert found["cat"][0].score == pytest.approx(.5, abs=1e-2)
        assert found["cat"][0].box[2:] == (48, 64)  # what lies beyond the picture was padding
        logits = F.interpolate(masks[None, :1], size=(64, 64), mode="bilinear")[0, 0, :, :48]
        inside = logits > 0
        assert torch.equal(found["dog"][0].mask, inside)
        mean = logits[inside].sigmoid().mean().item()
        assert found["dog"][0].score == pytest.approx(mean, abs=1e-3)
        rows, columns = np.where(inside.numpy())
        assert found["dog"][0].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        # twice the picture, twice the box
        larger = geneval.detections(classes, masks, (64, 64), (64, 48), (128, 96))
        difference = np.array(larger["dog"][0].box) - 2 * np.array(found["dog"][0].box)
        assert abs(difference).max() <= 1

    def test_reward_geneval_whole(self, tmp_path):
        dog = {"class": "dog", "count": 1}
        lines = [{"tag": "colors", "include": [{**dog, "color": "red"}], "prompt": "a red dog"},
                 {"tag": "counting", "include": [dog], "exclude": [{**dog, "count": 2}],
                  "prompt": "one dog"}]
        file = tmp_path / "evaluation_metadata.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
        metadata = geneval.geneval_metadata(file)
        mask = torch.zeros(32, 32, dtype=torch.bool)
        mask[8:20, 4:28] = True
        mask[8, 4] = False

        def detect(images):  # a dog wherever the middle is not green; sure of it when it is blue
            found = []
            for x in images:
                dog = Found((4, 8, 28, 20), 0.95 if x[2, 10, 10] > 0.5 else 0.5, mask)
                found.append({} if x[1, 10, 10] > 0.5 else {"dog": [dog]})
            return found

        judge = geneval.GenEval(detect, ColourClip(), metadata, "cpu")
        reward = reward_of(judge)
        pictures = {}
        for name, rgb in {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}.items():
            picture = np.zeros((32, 32, 3), np.uint8)
            picture[8:20, 4:28] = rgb
            pictures[name] = Image.fromarray(picture)
        cases = [
            ("red", "a red dog", 1, True),
            ("blue", "a red dog", 0.5, False),
            ("green", "a red dog", 0, False),
            ("red", "one dog", 0.5, False),
            ("blue", "one dog", 1, True),
            ("red", "a poem", math.nan, None),
        ] * 2
        names, prompts, wanted, right = map(list, zip(*cases))
        images = [pictures[name] for name in names]
        for batch in (images, as_batch(images)):
            scores = reward(batch, prompts).numpy()
            assert np.array_equal(scores, wanted, equal_nan=True)
            assert judge.correct(batch, prompts) == right
        mixed = [images[0], images[1].crop((0, 0, 32, 31)), images[2]]  # sizes may differ
        calls = []

        def nothing(x):
            calls.append(x)
            return [{}] * len(x)

        judge.detect = nothing
        assert judge.correct(mixed, prompts[:3]) == [False] * 3
        assert len(calls) == 3
        tags = [judge.tag(p) for p in ("a red dog", "one dog", "a poem")]
        assert tags == ["colors", "counting", None]
        assert judge.prompts == ["a red dog", "one dog"]
        text = json.dumps(lines[0])
        file.write_text(text + "\n" + text.replace("dog", "unicorn"))
        with pytest.raises(UserError, match="line 2: .*unicorn"):
            rewards.load(f"geneval@{file}")
        file.write_text(text + "\n{}")
        with pytest.raises(UserError, match="line 2: .*lacks"):
            rewards.load(f"geneval@{file}")

    def test_reward_geneval_detector(self, tmp_path, monkeypatch):
        """The detector against the whole segmentation model, whose training loss (which wants
        scipy) is left out."""
        from transformers import Mask2FormerConfig, SwinConfig
        from transformers.models.mask2former import modeling_mask2former as library
        monkeypatch.setattr(library, "Mask2FormerLoss", type("NoLoss", (torch.nn.Identity,), {}))
        monkeypatch.setattr(library.Mask2FormerPreTrainedModel, "_init_weights",
                            lambda self, module: None)
        stages = ["stage1", "stage2", "stage3", "stage4"]
        backbone = SwinConfig(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4],
                              window_size=4, out_features=stages)
        config = Mask2FormerConfig(backbone_config=backbone, hidden_dim=32, feature_size=32,
                                   mask_feature_size=32, encoder_layers=1, decoder_layers=3,
                                   num_queries=7, dim_feedforward=32, encoder_feedforward_dim=32,
                                   num_attention_heads=4, num_labels=80)
        torch.manual_seed(0)
        whole = library.Mask2FormerForUniversalSegmentation(config).eval()
        for parameter in whole.parameters():  # some would be left as memory was found
            torch.nn.init.normal_(parameter, std=0.05)
        published = {key: value for key, value in whole.state_dict().items()
                     if ".swin.layernorm." not in key}  # transformers 4.x has no such norm
        whole.save_pretrained(tmp_path, state_dict=published)
        detector = geneval.Detector(str(tmp_path), "cpu")
        pixels = torch.randn(2, 3, 96, 128)
        with torch.no_grad():
            classes, masks = detector.logits(pixels)
            expected = whole(pixels)
        assert torch.allclose(classes, expected.class_queries_logits, atol=1e-5)
        assert torch.allclose(masks, expected.masks_queries_logits, atol=1e-5)
        seen = []
        monkeypatch.setattr(detector, "logits",
                            lambda x: seen.append(x) or (classes[:1], masks[:1]))
        assert len(detector(torch.full((1, 3, 50, 100), .5))) == 1
        # short side 800 would make the long one 1600: 1333 and padding to 32
        assert seen[0].shape == (1, 3, 672, 1344)
        assert torch.allclose(seen[0][0, :, 100, 100], (.5 - torch.tensor([.485, .456, .406]))
                              / torch.tensor([.229, .224, .225]), atol=1e-5)
        assert seen[0][..., 667:, :].abs().max() == 0
        assert seen[0][..., 1333:].abs().max() == 0
        config.num_labels = 3
        library.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="knows 3 classes"):
            geneval.Detector(str(tmp_path), "cpu")


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
