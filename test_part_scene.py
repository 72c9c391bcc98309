"""Tests of the toy's caption checker against the toy's renderer (which the checker does not know)."""
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "toy"), str(HERE / ".scratch")]
import make_toy  # noqa: E402
try:
    from rewards import scene
except ImportError:
    from scene_part import scene


def to_images(x):
    """(B, 3, 64, 64) in [-1, 1] -> PIL pictures."""
    return [Image.fromarray(a) for a in ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]


@pytest.fixture(scope="module")
def rendered():
    """Captions, their rows and slots of right pictures: every held-out caption twice and every second training one."""
    train, heldout = make_toy.captions()
    rows = heldout * 2 + train[::2]
    noise = make_toy.careful(torch.randn(len(rows), 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    kind, spec = torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows])
    slots = make_toy.objects(kind, spec, make_toy.projections(noise))
    return [r[0] for r in rows], kind, spec, slots, torch.rand(len(rows), generator=torch.Generator().manual_seed(1))


def test_scene_right_on_true_renderings(rendered):
    prompts, _, _, slots, shade = rendered
    images = to_images(make_toy.render(slots, shade))
    scores = scene(images, prompts)
    assert sum(s == 1 for s in scores) >= 0.99 * len(scores)
    assert scene.correct(images, prompts) == [s == 1 for s in scores]
    assert all(0 <= s <= 1 for s in scores)
    assert sum(scene.readable(image) for image in images) >= 0.99 * len(images)
    assert scores == scene(images, prompts)  # deterministic


def changed(slots, kind, spec, what):
    """Slots with one attribute changed, and which rows the change makes wrong."""
    slots, named = slots.clone(), spec[:, 2] >= 0
    if what == "color":
        slots[:, 0, 4] = (slots[:, 0, 4] + 1) % 6
        return slots, named
    if what == "shape":  # of the first object; where two shapes differ only in order, take the third one
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


@pytest.mark.parametrize("what", ["color", "shape", "missing", "extra", "side"])
def test_scene_sees_one_changed_attribute(rendered, what):
    prompts, kind, spec, slots, shade = rendered
    slots, wrong = changed(slots, kind, spec, what)
    picked = torch.nonzero(wrong).flatten().tolist()
    images = to_images(make_toy.render(slots, shade)[wrong])
    scores = scene(images, [prompts[i] for i in picked])
    assert len(scores) > 20
    assert sum(s < 1 for s in scores) >= 0.99 * len(scores)


def test_scene_score_is_graded():
    def score(prompt, *slots, side=False):
        rows = list(slots) + [(0, 0, -9, 0, 0)] * (4 - len(slots))
        return scene(to_images(make_toy.render(torch.tensor([rows], dtype=torch.float32), torch.zeros(1))), [prompt])[0]
    red_circle, blue_square = (16.0, 32.0, 9.0, 0, 0), (48.0, 32.0, 9.0, 1, 3)
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


def test_scene_unreadable_pictures():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(20)]
    blank = [Image.new("RGB", (64, 64), color) for color in ("white", "black", (222, 62, 62), (240, 240, 240))]
    smooth = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((64, 64)) for _ in range(20)]
    images = noise + blank + smooth
    for prompt in ("a red circle", "four blue squares", "a circle above a square", "a black circle and a red square"):
        scores = scene(images, [prompt] * len(images))
        assert max(scores) <= 0.5 and sum(scores) / len(scores) < 0.15
    assert not any(scene.readable(image) for image in images)


def test_scene_captions():
    assert scene.tag("a photo of a circle") == "single_object"
    assert scene.tag("a circle and a square") == "two_object"
    assert scene.tag("three squares") == scene.tag("A picture of four red  circles.") == "counting"
    assert scene.tag("a red circle") == "colors"
    assert scene.tag("a circle to the left of a square") == "position"
    assert scene.tag("a red circle and a blue circle") == "color_attr"
    image = Image.new("RGB", (64, 64), "white")
    assert scene.tag("a dog on a beach") is None
    assert all(math.isnan(s) for s in scene([image] * 3, ["a dog on a beach", "", "a red circle and"]))
    assert scene.correct([image], ["a dog"]) == [False]
    for caption, kind, _ in sum(make_toy.captions(), []):
        assert scene.tag(caption) == make_toy.KINDS[kind]
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        scene([image], ["a circle"] * 2)


def test_scene_other_sizes_and_modes():
    slots = torch.tensor([[(20.0, 30.0, 9.0, 2, 4)] + [(0, 0, -9, 0, 0)] * 3])
    image = to_images(make_toy.render(slots, torch.zeros(1)))[0]
    assert scene([image.resize((128, 128)), image.convert("RGBA")], ["a purple triangle"] * 2) == [1, 1]
