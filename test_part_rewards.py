"""Tests of rewards.py."""
import base64
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import rewards
from rewards import Found, UserError

ROOT = Path(__file__).parent


# --- helpers

def _rw_images(count, size=(64, 64), seed=0):
    """Smooth random pictures with some grain."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.integers(-20, 21, (size[1], size[0], 3))
        pictures.append(Image.fromarray((np.array(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8)))
    return pictures


def _rw_tensor(images):
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 255 for i in images])


def _rw_reward(function, name="mine"):
    return rewards.Reward(name, {name: function}, {name: 1.0})


def _rw_mean(images, prompts):
    """Mean level of a picture plus the length of its prompt."""
    return [float(np.array(image).mean()) + len(prompt) for image, prompt in zip(images, prompts)]


def _rw_clip_tokenizer(folder):
    """A CLIP tokenizer of single letters; the end token has the highest number, as in the real one."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {t: i for i, t in enumerate(letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}))
    return vocab


_RW_TINY = {
    "projection_dim": 24,
    "text_config": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                        hidden_act="gelu", projection_dim=24, vocab_size=54, bos_token_id=52, eos_token_id=53),
    "vision_config": dict(hidden_size=40, intermediate_size=80, num_hidden_layers=2, num_attention_heads=5,
                          hidden_act="gelu", projection_dim=24, patch_size=56),
}


def _rw_clip_folder(folder, projection=24):
    """A tiny random CLIPModel saved with its tokenizer -> the model."""
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(1)
    config = CLIPConfig(**{**_RW_TINY, "projection_dim": projection})
    model = CLIPModel(config).eval()
    with torch.no_grad():  # the library's initial weights hardly tell pictures apart
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    _rw_clip_tokenizer(folder)
    return model


def _rw_clip_judge(model, folder, images, prompts):
    """CLIPModel's own forward and processor -> cosines (B,) and image embeddings (B,D)."""
    from transformers import AutoTokenizer, CLIPImageProcessor
    pixels = CLIPImageProcessor()(images, return_tensors="pt")["pixel_values"]
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding="max_length", truncation=True, max_length=77,
                                                   return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return out.logits_per_image.diagonal() / model.logit_scale.exp(), out.image_embeds


_RW_PROMPTS = ["a cat", "a red dog", "two birds", "a cat"]


def _rw_behaves(reward, tolerance=1e-5):
    """What every model reward must do: repeat itself, not care for order or batch size, tell pictures apart."""
    images, prompts = _rw_images(5, (90, 70)) + [Image.new("RGB", (90, 70))], ["a cat", "a dog"] * 3
    (name, part), = reward.parts.items()
    scores = reward(images, prompts)
    assert torch.equal(scores, reward(images, prompts))
    assert torch.allclose(scores.flip(0), reward(images[::-1], prompts[::-1]), atol=tolerance)
    part.batch_size = 2
    assert torch.allclose(scores, reward(images, prompts), atol=tolerance)
    shuffled = np.random.default_rng(0).permutation(np.array(images[0]).reshape(-1, 3)).reshape(70, 90, 3)
    others = reward([images[0], Image.fromarray(shuffled), images[5]], ["a cat"] * 3)
    assert others.isfinite().all() and len(set(others.tolist())) == 3


# --- specs, contract, combination

@pytest.mark.parametrize("spec, weights", [
    ("pickscore", {"pickscore": 1}),
    ("pickscore=1, aesthetic=0.5", {"pickscore": 1, "aesthetic": 0.5}),
    ("jpeg=-2e-1", {"jpeg": -0.2}),
    ("pickscore@/data/pick=2", {"pickscore@/data/pick": 2}),
    ("my_file.py:f=3,a.b:c", {"my_file.py:f": 3, "a.b:c": 1}),
    ("http://h:8000=0.5,https://g", {"http://h:8000": 0.5, "https://g": 1}),
    ("vlm@http://h:1/v1?model=q", {"vlm@http://h:1/v1?model=q": 1}),
    ("vlm@http://h:1/v1?a=b&model=q=0.25,clip=2", {"vlm@http://h:1/v1?a=b&model=q": 0.25, "clip": 2}),
])
def test_reward_spec(spec, weights):
    assert rewards.parse(spec) == weights


@pytest.mark.parametrize("spec, says", [
    ("jpge", "unknown reward 'jpge'; nearest: jpeg; for all names: python rewards.py list"),
    ("pick@/some/where", "unknown reward 'pick@/some/where'; nearest: pickscore"),
    ("jpeg=much", "the weight 'much' of 'jpeg' is not a number"),
    ("jpeg=nan", "the weight 'nan' of 'jpeg' is not finite"),
    ("jpeg=inf", "not finite"), ("jpeg=", "the weight '' of 'jpeg' is not a number"),
    ("jpeg,,clip", "an item without a name"), ("", "an item without a name"), ("=2", "an item without a name"),
    ("jpeg,jpeg=2", "'jpeg' is named twice"), ("jpeg@/x", "reward 'jpeg': it takes no path"),
    ("judge.py", "name what it holds, judge.py:function"), ("no_such_package:f", "ModuleNotFoundError"),
    ("math:no_such", "AttributeError"), ("math:pi", "must be callable"),
    ("gone.py:f", "FileNotFoundError"), ("http://", "is not a URL"), ("http://h:port", "is not a URL"),
    ("vlm", "name the endpoint"), ("vlm@http://h/v1", "name the model"), ("vlm@h?model=x", "is not a URL"),
    ("hpsv3", "pip install hpsv3"),
])
def test_reward_bad_spec(spec, says):
    with pytest.raises(UserError) as caught:
        rewards.load(spec)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_reward_user_file(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("OFFSET = 10\n")
    file = tmp_path / "mine.py"
    file.write_text("import numpy as np\nfrom neighbour import OFFSET\n"
                    "def mean(images, prompts):\n    return np.array([np.asarray(i).mean() + OFFSET for i in images])\n"
                    "class Judge:\n    def __init__(self):\n        self.bonus = 3\n"
                    "    def __call__(self, images, prompts):\n        return [len(p) + self.bonus for p in prompts]\n"
                    "judge = Judge()\nclass Picky:\n    def __init__(self, model):\n        pass\n"
                    "def short(images):\n    return []\n"
                    "def long(images, prompts, model):\n    return []\n")
    images = [Image.new("RGB", (4, 4), (20, 20, 20)), Image.new("RGB", (4, 4), (50, 50, 50))]
    assert rewards.load(f"{file}:mean")(images, ["a", "b"]).tolist() == [30, 60]
    assert rewards.load(f"{file}:Judge")(images, ["a", "abc"]).tolist() == [4, 6]
    assert rewards.load(f"{file}:judge")(images, ["a", "abc"]).tolist() == [4, 6]
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards.load("mine:mean")(images, ["a", "b"]).tolist() == [30, 60]
    for attribute, says in [("short", "f(images, prompts)"), ("long", "f(images, prompts)"), ("Picky", "TypeError"),
                            ("missing", "AttributeError")]:
        with pytest.raises(UserError, match=attribute) as caught:
            rewards.load(f"{file}:{attribute}")
        assert says in str(caught.value)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(UserError, match="SyntaxError"):
        rewards.load(f"{tmp_path}/broken.py:f")


@pytest.mark.parametrize("answer, scores", [
    ([1, 2.5], [1, 2.5]), ((np.float32(1), np.int64(2)), [1, 2]),
    (torch.tensor([1., 2.], dtype=torch.bfloat16), [1, 2]), (torch.tensor([1, 2]), [1, 2]),
    (np.array([3, 4]), [3, 4]), ([torch.tensor(1.), np.array(2.)], [1, 2]), ([math.nan, 1], [math.nan, 1]),
    (torch.tensor([1., 2.], requires_grad=True), [1, 2]),
])
def test_reward_accepts(answer, scores):
    got = _rw_reward(lambda images, prompts: answer)(_rw_images(2), ["a", "a"])
    assert got.dtype == torch.float32 and got.device.type == "cpu"
    assert np.array_equal(got.numpy(), np.array(scores, dtype=np.float32), equal_nan=True)


@pytest.mark.parametrize("answer, says", [
    ([1.], "returned 1 scores for 2 images; a reward returns one float an image"),
    ([1, 2, 3], "returned 3 scores for 2 images"), (None, "returned NoneType; a reward returns one float an image"),
    (1.0, "returned float;"), ("ab", "returned str;"), ({"a": 1, "b": 2}, "returned dict;"),
    ([1, None], "returned None (NoneType) for image 1"), (["1", 2], "returned '1' (str) for image 0"),
    ([True, False], "returned True (bool) for image 0"), (torch.tensor([True, False]), "(bool)"),
    ([[1.], [2.]], "(list) for image 0"), ([torch.eye(3), 1], "(Tensor) for image 0"),
    (torch.eye(2), "an array of shape (2, 2) for 2 images"),
    (np.float64(3), "returned float64;"), ([1j, 2], "(complex)"), ([math.inf, 1], "returned inf for image 0"),
    ([1, -math.inf], "returned -inf for image 1"), ([1, 1e300], "returned 1e+300 for image 1"),
    (torch.tensor([1., math.inf]), "returned inf for image 1"), (iter([1, 2]), "returned list_iterator;"),
])
def test_reward_refuses(answer, says):
    with pytest.raises(UserError) as caught:
        _rw_reward(lambda images, prompts: answer, "jpeg")(_rw_images(2), ["a", "a"])
    assert says in str(caught.value) and str(caught.value).startswith("reward 'jpeg': ")
    assert "\n" not in str(caught.value)


def test_reward_that_raises():
    def fails(images, prompts):
        if "memory" in prompts:
            raise torch.OutOfMemoryError  # left to whoever can make the batch smaller
        raise KeyError("two\nlines")
    with pytest.raises(UserError, match=r"^reward 'mine': KeyError: 'two\\nlines'$") as caught:
        _rw_reward(fails)(_rw_images(1), ["a"])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(torch.OutOfMemoryError):
        _rw_reward(fails)(_rw_images(1), ["memory"])
    with pytest.raises(UserError, match="2 images but 1 prompts"):
        _rw_reward(_rw_mean)(_rw_images(2), ["a"])


def test_reward_batches_and_tensors():
    calls = []

    def counts(images, prompts):
        calls.append(len(images))
        return _rw_mean(images, prompts)
    counts.batch_size = 3
    images, prompts = _rw_images(8), [f"{'x' * i}" for i in range(8)]
    expected = _rw_mean(images, prompts)
    assert np.allclose(_rw_reward(counts)(images, prompts), expected) and calls == [3, 3, 2]
    # a tensor reaches a reward that wants PIL as the very same pictures, once for all parts
    assert np.allclose(_rw_reward(counts)(_rw_tensor(images), prompts), expected)
    assert np.array_equal(np.array(rewards.to_pil(torch.full((1, 3, 2, 2), 0.499))[0]), np.full((2, 2, 3), 127))
    # and untouched to one that takes tensors
    seen = []

    def direct(images, prompts):
        seen.append(images)
        return images.mean((1, 2, 3))
    counts.score_tensor = direct
    batch = _rw_tensor(images) * 0.9999
    got = _rw_reward(counts)(batch, prompts)
    assert torch.allclose(got, batch.mean((1, 2, 3))) and [len(s) for s in seen] == [3, 3, 2]
    assert torch.equal(torch.cat(seen), batch)
    assert _rw_reward(counts)([], []).shape == (0,)
    for wrong in (batch[:, :1], (batch * 255).byte(), batch.flatten(1)):
        with pytest.raises(UserError, match=r"float \(B,3,H,W\) in \[0,1\]"):
            _rw_reward(counts)(wrong, prompts)


def test_reward_combination():
    table = {"a": [1., 2., 4., 9., 5., 5.], "b": [0.3, math.nan, 0.1, 0.2, 7., math.nan]}
    prompts = ["p", "q", "p", "p", "q", "q"]
    parts = {name: (lambda images, prompts, values=values: values) for name, values in table.items()}
    reward = rewards.Reward("both", parts, {"a": 2., "b": -.5})
    expected = np.zeros(6)
    for prompt in "pq":
        group = np.array([p == prompt for p in prompts])
        for name, weight in reward.weights.items():
            values = np.array(table[name])[group]
            known = values[~np.isnan(values)]
            std = known.std()
            expected[group] += weight * np.nan_to_num((values - known.mean()) / std) if std else 0
    images = _rw_images(6)
    assert np.allclose(reward(images, prompts), expected, atol=1e-6)
    assert {k: v.tolist()[0] for k, v in reward.score(images, prompts).items()} == {"a": 1., "b": pytest.approx(.3)}
    # any leading shape, and a candidate on which nobody has an opinion stays NaN
    scores = {"a": torch.tensor([[1., 2., math.nan], [3., 3., 3.]]),
              "b": torch.tensor([[5., 4., math.nan], [1., 2., 3.]])}
    got = reward.combine(scores)
    assert got[0, 2].isnan() and torch.allclose(got[0, :2], torch.tensor([-2.5, 2.5]))
    assert torch.allclose(got[1], -.5 * torch.tensor([-1.5 ** .5, 0, 1.5 ** .5]))
    # equal scores whose mean is not exact add nothing
    assert reward.combine({"a": torch.full((7,), .1), "b": torch.full((7,), .7)}).tolist() == [0] * 7


def test_reward_single_is_native():
    scores = torch.tensor([.1, math.nan, -3e-8, 7e30])
    assert _rw_reward(lambda images, prompts: scores)(_rw_images(4), ["a", "b", "a", "b"]).equal(scores) is False  # NaN
    got = _rw_reward(lambda images, prompts: scores).combine({"mine": scores})
    assert torch.equal(got.view(torch.int32), scores.view(torch.int32))
    less = rewards.load("jpeg=-1")
    images = _rw_images(3)
    assert torch.equal(less(images, list("abc")), rewards.load("incompressibility")(images, list("abc")))


def test_reward_jpeg():
    images = _rw_images(3, (80, 48)) + [Image.new("RGBA", (80, 48), (9, 200, 30, 255))]
    sizes = []
    for image in images:
        file = io.BytesIO()
        image.convert("RGB").save(file, format="JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert np.allclose(rewards.load("jpeg")(images, ["p"] * 4), -np.array(sizes))
    assert np.allclose(rewards.load("incompressibility")(_rw_tensor(images[:3]), ["p"] * 3), sizes[:3])
    grey = rewards.load("incompressibility")([Image.new("RGB", (512, 512), (128, 128, 128))], ["p"])
    assert grey.item() == pytest.approx(4.7, abs=0.1)


# --- CLIP and its descendants

@pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 517), (640, 231), (64, 64), (225, 224), (100, 37)])
def test_reward_clip_pixels(size):
    from transformers import CLIPImageProcessor
    images = _rw_images(2, size)
    judge = CLIPImageProcessor()(images, return_tensors="pt")["pixel_values"]
    mine = rewards.clip_pixels(images, "cpu")
    assert mine.shape == judge.shape and (mine - judge).abs().max() < 1e-6
    # the tensor path against PIL: at most one level of 255 (two where the picture is enlarged), seldom
    level, grows = 1 / 255 / torch.tensor(rewards.CLIP_STD).view(3, 1, 1), min(size) < 224
    difference = ((rewards.clip_pixels(_rw_tensor(images), "cpu") - mine) / level).abs()
    assert difference.max() < (2.01 if grows else 1.01)
    assert (difference > 0.5).float().mean() < (1e-2 if grows else 1e-3)


@pytest.mark.parametrize("size", [(300, 200), (100, 200), (224, 224), (96, 96)])
def test_reward_clip_pixels_padded(size):
    image, = _rw_images(1, size)
    scale = 224 / max(size)
    small = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (224, 224))
    canvas.paste(small, ((224 - small.width) // 2, (224 - small.height) // 2))
    expected = (np.array(canvas) / 255 - rewards.CLIP_MEAN) / rewards.CLIP_STD
    assert np.allclose(rewards.clip_pixels([image], "cpu", whole=True)[0].permute(1, 2, 0), expected, atol=1e-5)
    difference = rewards.clip_pixels(_rw_tensor([image]), "cpu", whole=True)[0].permute(1, 2, 0).numpy() - expected
    assert np.abs(difference).max() < 1.01 / 255 / min(rewards.CLIP_STD)


def test_reward_pickscore_and_clip(tmp_path):
    model = _rw_clip_folder(tmp_path)
    images = _rw_images(4, (100, 80))
    cosine, _ = _rw_clip_judge(model, tmp_path, images, _RW_PROMPTS)
    assert cosine.std() > 1e-3
    pick, plain = rewards.load(f"pickscore@{tmp_path}"), rewards.load(f"clip@{tmp_path}")
    assert torch.allclose(pick(images, _RW_PROMPTS), cosine * model.logit_scale.exp(), atol=1e-5)
    assert torch.allclose(plain(images, _RW_PROMPTS), cosine, atol=1e-6)
    # a tensor scores as its saved picture: here 5e-4 where the scores themselves spread over 0.1
    large = _rw_images(4, (512, 512))
    assert torch.allclose(plain(_rw_tensor(large), _RW_PROMPTS), plain(large, _RW_PROMPTS), atol=5e-4)
    assert torch.allclose(pick(_rw_tensor(large), _RW_PROMPTS), pick(large, _RW_PROMPTS), atol=1e-2)
    _rw_behaves(pick)
    _rw_behaves(plain)


def test_reward_texts_are_read_once(tmp_path):
    _rw_clip_folder(tmp_path)
    clip, read = rewards.clip_at("clip", rewards.CLIP_L, "cpu", str(tmp_path)), []
    tokenize = clip.tokenize
    clip.tokenize = lambda texts: read.extend(texts) or tokenize(texts)
    many = [f"{chr(97 + i % 26)} {chr(97 + i // 26 % 26)} {chr(97 + i // 676)}" for i in range(4096)]
    first = clip.text(["a cat", "a dog", "a cat"])
    clip.text(["a dog"])
    assert read == ["a cat", "a dog"] and torch.equal(first[0], first[2])
    clip.model.text_model, inner = torch.nn.Identity(), clip.model.text_model
    clip.model.text_model.forward = lambda input_ids, attention_mask: types.SimpleNamespace(
        pooler_output=input_ids[:, :32].float())
    clip.text(many)
    assert len(clip.known) == 4096  # the memory is bounded
    clip.model.text_model = inner
    assert torch.allclose(clip.text(["a cat"]), first[:1], atol=1e-6)


def test_reward_aesthetic(tmp_path):
    projection = 768
    model = _rw_clip_folder(tmp_path, projection)
    torch.manual_seed(2)
    linear, drop = torch.nn.Linear, torch.nn.Dropout
    head = torch.nn.Module()  # the LAION predictor as it is published, dropouts and all
    head.layers = torch.nn.Sequential(linear(projection, 1024), drop(.2), linear(1024, 128), drop(.2), linear(128, 64),
                                      drop(.1), linear(64, 16), linear(16, 1)).eval()
    torch.save(head.state_dict(), tmp_path / "aesthetic-model.pth")
    images = _rw_images(4, (100, 80))
    _, embeds = _rw_clip_judge(model, tmp_path, images, _RW_PROMPTS)
    with torch.no_grad():
        expected = head.layers(embeds)[:, 0]
    reward = rewards.load(f"aesthetic@{tmp_path}")
    assert torch.allclose(reward(images, _RW_PROMPTS), expected, atol=1e-6)
    assert torch.equal(reward(images, _RW_PROMPTS), reward(images, ["another"] * 4))
    _rw_behaves(reward, 1e-6)


def test_reward_random_clip(monkeypatch):
    monkeypatch.setattr(rewards, "VIT_H", _RW_TINY)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = rewards.load("pickscore@random")
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == torch.float32
    torch.manual_seed(6)
    two = rewards.load("pickscore@random")
    images = _rw_images(3)
    scores = one(images, ["a cat"] * 3)
    assert torch.equal(scores, two(images, ["a cat"] * 3)) and len(set(scores.tolist())) == 3
    assert not torch.equal(scores, one(images, ["a dog"] * 3)) and scores.isfinite().all()


def _rw_open_clip(weights, pixels, ids):
    """open_clip's two towers from its own state dict -> cosines (B,)."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])

    def blocks(x, prefix, heads, mask=None):
        for n in range(2):
            p = f"{prefix}transformer.resblocks.{n}."
            h = norm(x, p + "ln_1").transpose(0, 1)
            h = F.multi_head_attention_forward(
                h, h, h, h.shape[-1], heads, weights[p + "attn.in_proj_weight"], weights[p + "attn.in_proj_bias"], None,
                None, False, 0., weights[p + "attn.out_proj.weight"], weights[p + "attn.out_proj.bias"],
                need_weights=False, attn_mask=mask)[0]
            x = x + h.transpose(0, 1)
            h = F.gelu(F.linear(norm(x, p + "ln_2"), weights[p + "mlp.c_fc.weight"], weights[p + "mlp.c_fc.bias"]))
            x = x + F.linear(h, weights[p + "mlp.c_proj.weight"], weights[p + "mlp.c_proj.bias"])
        return x
    x = F.conv2d(pixels, weights["visual.conv1.weight"], stride=56).flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(x + weights["visual.positional_embedding"], "visual.ln_pre")
    image = norm(blocks(x, "visual.", 5)[:, 0], "visual.ln_post") @ weights["visual.proj"]
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    x = norm(blocks(x, "", 4, torch.full((77, 77), -math.inf).triu(1)), "ln_final")
    text = x[torch.arange(len(ids)), ids.argmax(-1)] @ weights["text_projection"]
    return F.cosine_similarity(image, text)


def _rw_open_clip_weights():
    """Random weights with open_clip's names."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (shape[-1] ** -.5 if len(shape) > 1 else .3)
    weights = {"logit_scale": torch.tensor(4.6), "positional_embedding": draw(77, 32), "text_projection": draw(32, 24),
               "token_embedding.weight": draw(54, 32), "visual.class_embedding": draw(40), "visual.proj": draw(40, 24),
               "visual.positional_embedding": draw(17, 40), "visual.conv1.weight": draw(40, 3, 56, 56) * .2}
    norms = {"visual.ln_pre": 40, "visual.ln_post": 40, "ln_final": 32}
    for prefix, width, inner in (("visual.", 40, 80), ("", 32, 64)):
        for n in range(2):
            p = f"{prefix}transformer.resblocks.{n}."
            norms |= {p + "ln_1": width, p + "ln_2": width}
            for name, rows, columns in (("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
                                        ("mlp.c_fc.", inner, width), ("mlp.c_proj.", width, inner)):
                weights |= {p + name + "weight": draw(rows, columns), p + name + "bias": draw(rows)}
    for name, width in norms.items():
        weights |= {name + ".weight": 1 + draw(width), name + ".bias": draw(width)}
    return weights


def test_reward_hpsv2(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "VIT_H", _RW_TINY)
    weights, vocab = _rw_open_clip_weights(), _rw_clip_tokenizer(tmp_path)
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    reward = rewards.load(f"hpsv2@{tmp_path}")
    images = _rw_images(4, (120, 80))
    ids = []
    for prompt in _RW_PROMPTS:
        letters = [letter for word in prompt.split() for letter in [*word[:-1], word[-1] + "</w>"]]
        ids.append([52, *(vocab[letter] for letter in letters), *[53] * (76 - len(letters))])
    ids = torch.tensor(ids)
    squares = []
    for image in images:  # long side to 224, the rest black
        square = Image.new("RGB", (224, 224))
        square.paste(image.resize((224, 149), Image.Resampling.BICUBIC), (0, 37))
        squares.append(square)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (rewards.CLIP_MEAN, rewards.CLIP_STD))
    expected = _rw_open_clip(weights, (_rw_tensor(squares) - mean) / std, ids)
    assert expected.std() > 1e-2
    assert torch.allclose(reward(images, _RW_PROMPTS), expected, atol=1e-5)
    _rw_behaves(reward)
    del weights["ln_final.weight"]  # a file that lacks a weight must not be filled up with noise
    torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match="final_layer_norm.weight"):
        rewards.load(f"hpsv2@{tmp_path}")


_RW_BLIP_TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=40,
                     layer_norm_eps=1e-12, encoder_hidden_size=48, max_position_embeddings=64)
_RW_BLIP_VISION = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, patch_size=56,
                       image_size=224, layer_norm_eps=1e-6)


def _rw_blip_weights():
    """Random weights with the names of ImageReward.pt."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (shape[-1] ** -.5 if len(shape) > 1 else .3)
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    weights = {v + "cls_token": draw(1, 1, 48), v + "pos_embed": draw(1, 17, 48),
               v + "patch_embed.proj.weight": draw(48, 3, 56, 56) * .2, v + "patch_embed.proj.bias": draw(48),
               t + "embeddings.word_embeddings.weight": draw(40, 32),
               t + "embeddings.position_ids": torch.arange(64)[None],
               t + "embeddings.position_embeddings.weight": draw(64, 32)}
    norms, linears = {v + "norm": 48, t + "embeddings.LayerNorm": 32}, {}
    for n in range(2):
        b, e = f"{v}blocks.{n}.", f"{t}encoder.layer.{n}."
        norms |= {b + "norm1": 48, b + "norm2": 48, e + "attention.output.LayerNorm": 32,
                  e + "crossattention.output.LayerNorm": 32, e + "output.LayerNorm": 32}
        linears |= {b + "attn.qkv": (144, 48), b + "attn.proj": (48, 48), b + "mlp.fc1": (96, 48),
                    b + "mlp.fc2": (48, 96), e + "intermediate.dense": (64, 32), e + "output.dense": (32, 64)}
        for kind, width in (("attention", 32), ("crossattention", 48)):
            linears |= {f"{e}{kind}.self.query": (32, 32), f"{e}{kind}.self.key": (32, width),
                        f"{e}{kind}.self.value": (32, width), f"{e}{kind}.output.dense": (32, 32)}
    for i, shape in zip((0, 2, 4, 6, 7), ((1024, 32), (128, 1024), (64, 128), (16, 64), (1, 16))):
        linears[f"mlp.layers.{i}"] = shape
    for name, shape in linears.items():
        weights |= {name + ".weight": draw(*shape), name + ".bias": draw(shape[0])}
    for name, width in norms.items():
        weights |= {name + ".weight": 1 + draw(width), name + ".bias": draw(width)}
    return weights


def _rw_blip(weights, pixels, ids, mask):
    """ImageReward's formula from its own state dict: ViT, BERT with cross attention, five linear layers -> (B,)."""
    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps)

    def linear(x, name):
        return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    def attend(q, k, v, allowed=None):
        q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** .5
        if allowed is not None:
            logits = logits.masked_fill(allowed[:, None, None] == 0, -math.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(pixels, weights[v + "patch_embed.proj.weight"], weights[v + "patch_embed.proj.bias"], stride=56)
    x = torch.cat([weights[v + "cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + weights[v + "pos_embed"]
    for n in range(2):
        b = f"{v}blocks.{n}."
        x = x + linear(attend(*linear(norm(x, b + "norm1", 1e-6), b + "attn.qkv").chunk(3, -1)), b + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, b + "norm2", 1e-6), b + "mlp.fc1")), b + "mlp.fc2")
    seen = norm(x, v + "norm", 1e-6)
    x = weights[t + "embeddings.word_embeddings.weight"][ids]
    x = norm(x + weights[t + "embeddings.position_embeddings.weight"][:ids.shape[1]], t + "embeddings.LayerNorm", 1e-12)
    for n in range(2):
        e = f"{t}encoder.layer.{n}."
        for kind, source, allowed in (("attention", None, mask), ("crossattention", seen, None)):
            source = x if source is None else source
            q, k, v = (linear(x if name == "query" else source, f"{e}{kind}.self.{name}")
                       for name in ("query", "key", "value"))
            y = linear(attend(q, k, v, allowed), f"{e}{kind}.output.dense")
            x = norm(x + y, f"{e}{kind}.output.LayerNorm", 1e-12)
        y = linear(F.gelu(linear(x, e + "intermediate.dense")), e + "output.dense")
        x = norm(x + y, e + "output.LayerNorm", 1e-12)
    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = linear(x, f"mlp.layers.{i}")
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_reward_imagereward(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "BLIP_TEXT", _RW_BLIP_TEXT)
    monkeypatch.setattr(rewards, "BLIP_VISION", _RW_BLIP_VISION)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "dog", "two", "birds"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    weights = _rw_blip_weights()
    torch.save(weights, tmp_path / "ImageReward.pt")
    reward = rewards.load(f"imagereward@{tmp_path}")
    ids = [[2, *(words.index(word) for word in prompt.split()), 3] for prompt in _RW_PROMPTS]
    mask = torch.tensor([[1] * len(row) + [0] * (35 - len(row)) for row in ids])
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in ids])
    images = _rw_images(4, (100, 80))
    expected = _rw_blip(weights, rewards.clip_pixels(images, "cpu"), ids, mask)
    assert expected.std() > 1e-2
    assert torch.allclose(reward(images, _RW_PROMPTS), expected, atol=1e-5)
    _rw_behaves(reward)


def test_reward_hpsv3(monkeypatch):
    class Inferencer:
        def __init__(self, device, checkpoint_path=None):
            self.bonus = len(checkpoint_path or "")

        def reward(self, prompts, image_paths):
            return torch.tensor([[np.array(Image.open(path)).mean() + len(prompt) + self.bonus, 99.]
                                 for prompt, path in zip(prompts, image_paths)])
    package = types.ModuleType("hpsv3")
    package.HPSv3RewardInferencer = Inferencer
    monkeypatch.setitem(sys.modules, "hpsv3", package)
    images, prompts = _rw_images(11), [f"{'x' * i}" for i in range(11)]
    assert np.allclose(rewards.load("hpsv3")(images, prompts), _rw_mean(images, prompts))
    assert np.allclose(rewards.load("hpsv3@four")(images, prompts), np.array(_rw_mean(images, prompts)) + 4)


@pytest.mark.parametrize("spec, says", [
    ("pickscore", ["model.safetensors", "huggingface.co/yuvalkirstain/PickScore_v1", "pickscore@/path/to/folder"]),
    ("hpsv2", ["HPS_v2.1_compressed.pt", "huggingface.co/xswu/HPSv2", "hpsv2@/path/to/folder"]),
    ("imagereward", ["ImageReward.pt", "huggingface.co/THUDM/ImageReward", "imagereward@/path/to/folder"]),
    ("aesthetic", ["aesthetic-model.pth", "huggingface.co/trl-lib/ddpo-aesthetic-predictor", "aesthetic@"]),
    ("clip@/no/such/place", ["config.json", "/no/such/place", "no such file or folder"]),
    ("hpsv2@EMPTY", ["HPS_v2.1_compressed.pt", "FileNotFoundError"]),
    ("imagereward@JUNK", ["ImageReward.pt", "UnpicklingError"]),
    ("geneval@/no/such/place", ["/no/such/place", "geneval@/path/to/evaluation_metadata.jsonl"]),
])
def test_reward_missing_files(spec, says, tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "junk").write_bytes(b"\x80\x02not weights")
    spec = spec.replace("EMPTY", str(tmp_path)).replace("JUNK", str(tmp_path / "junk"))
    with pytest.raises(UserError) as caught:
        rewards.load(spec)
    assert all(word in str(caught.value) for word in says) and "\n" not in str(caught.value)


# --- GenEval

def _rw_found(*boxes, score=0.95):
    return [Found(box, score) for box in boxes]


_RW_LEFT, _RW_RIGHT, _RW_LOW = (0, 40, 20, 60), (80, 40, 100, 60), (0, 80, 20, 100)
_RW_TWO = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
_RW_COUNT = {"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}
_RW_COLOUR = {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"},
                                               {"class": "cat", "count": 1, "color": "blue"}]}
_RW_PLACE = {"tag": "position", "include": [{"class": "cat", "count": 1},
                                            {"class": "dog", "count": 1, "position": ["left of", 0]}]}


@pytest.mark.parametrize("wanted, objects, correct, dense", [
    ({"tag": "single_object", "include": [{"class": "dog", "count": 1}]}, {"dog": _rw_found(_RW_LEFT)}, True, 1),
    ({"tag": "single_object", "include": [{"class": "dog", "count": 1}]}, {"cat": _rw_found(_RW_LEFT)}, False, 0),
    (_RW_TWO, {"dog": _rw_found(_RW_LEFT, _RW_LOW), "cat": _rw_found(_RW_RIGHT)}, True, 1),
    (_RW_TWO, {"dog": _rw_found(_RW_LEFT)}, False, .5),
    (_RW_COUNT, {"dog": _rw_found(*[_RW_LEFT] * 3)}, True, 1),
    (_RW_COUNT, {"dog": _rw_found(*[_RW_LEFT] * 2)}, False, (2 / 3 + 1) / 2),
    (_RW_COUNT, {"dog": _rw_found(*[_RW_LEFT] * 4)}, False, (1 + 2 / 3) / 2),
    (_RW_COUNT, {"dog": _rw_found(*[_RW_LEFT] * 9)}, False, .5),
    (_RW_COUNT, {}, False, .5),
    (_RW_COLOUR, {"dog": _rw_found("red"), "cat": _rw_found("blue")}, True, 1),
    (_RW_COLOUR, {"dog": _rw_found("blue"), "cat": _rw_found("blue")}, False, .75),
    (_RW_COLOUR, {"dog": _rw_found("blue"), "cat": _rw_found("red")}, False, .5),
    # only the best detection of the class is looked at
    (_RW_COLOUR, {"dog": _rw_found("blue", "red"), "cat": _rw_found("blue")}, False, .75),
    (_RW_PLACE, {"dog": _rw_found(_RW_LEFT), "cat": _rw_found(_RW_RIGHT)}, True, 1),
    (_RW_PLACE, {"dog": _rw_found(_RW_RIGHT), "cat": _rw_found(_RW_LEFT)}, False, 2 / 3),
    (_RW_PLACE, {"dog": _rw_found(_RW_LOW), "cat": _rw_found(_RW_LEFT)}, False, 2 / 3),
    (_RW_PLACE, {"dog": _rw_found(_RW_LEFT)}, False, 1 / 3),  # its target is missing
    (_RW_PLACE, {"cat": _rw_found(_RW_RIGHT)}, False, 1 / 3),
])
def test_reward_geneval_rules(wanted, objects, correct, dense):
    got = rewards.judge(wanted, objects, lambda found, name: [f.box for f in found])  # here a box is its own colour
    assert got == (correct, pytest.approx(dense))


def test_reward_geneval_every_pair_must_be_placed():
    wanted = {"include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    middle = {"dog": _rw_found((40, 40, 60, 60)), "cat": _rw_found(_RW_LEFT, _RW_RIGHT)}
    assert rewards.judge(wanted, middle, None)[0] is False
    assert rewards.judge(wanted, middle | {"cat": middle["cat"][::-1]}, None)[0] is False
    assert rewards.judge(wanted, middle | {"dog": _rw_found((-90, 40, -70, 60))}, None)[0] is True
    # a target whose colour is wrong is no target
    wanted = {"include": [{"class": "cat", "count": 1, "color": "red"},
                          {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    objects = {"dog": _rw_found(_RW_LEFT), "cat": _rw_found(_RW_RIGHT)}
    assert rewards.judge(wanted, objects, lambda found, name: ["blue"]) == (False, pytest.approx(.5))
    assert rewards.judge(wanted, objects, lambda found, name: ["red"]) == (True, 1)


def test_reward_geneval_thresholds():
    objects = {"dog": [Found("a", .31), Found("b", .95), Found("c", .3), Found("d", .9)],
               "cat": [Found(i, .5 + i / 100) for i in range(20)]}
    kept = rewards.confident(objects, "colors")
    assert [f.box for f in kept["dog"]] == ["b", "d", "a"]
    assert [f.box for f in kept["cat"]] == list(range(19, 3, -1))
    kept = rewards.confident(objects, "counting")
    assert [f.box for f in kept["dog"]] == ["b"] and kept["cat"] == []


@pytest.mark.parametrize("a, b, relations", [
    ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}), ((50, 0, 60, 10), (0, 0, 10, 10), {"right of"}),
    ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}), ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
    ((0, 0, 10, 10), (50, 50, 60, 60), {"left of", "above"}), ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    # sizes 10 and 10: centres up to 2 apart are together; at 3.9 the rest is 1.9 of 3.9, at 4.1 it is 2.1 of 4.1
    ((0, 0, 10, 10), (2, 0, 12, 10), set()), ((0, 0, 10, 10), (3.9, 0, 13.9, 10), set()),
    ((0, 0, 10, 10), (4.1, 0, 14.1, 10), {"left of"}),
    ((0, 0, 10, 100), (20, 15, 30, 115), {"left of"}),  # the taller margin swallows the height
])
def test_reward_geneval_position(a, b, relations):
    assert rewards.relative_position(a, b) == relations


def test_reward_geneval_detections():
    assert len(rewards.COCO) == 80 and rewards.COCO[64:67] == ["computer mouse", "tv remote", "computer keyboard"]
    dog, cat = rewards.COCO.index("dog"), rewards.COCO.index("cat")
    assert (rewards.COCO[0], dog, cat, rewards.COCO[79]) == ("person", 16, 15, "toothbrush")
    classes = torch.full((4, 81), -20.)
    classes[0, dog] = 5.
    classes[1, [cat, 80]] = torch.tensor([3., 3.])  # half cat, half nothing
    classes[2, 80] = 9.
    classes[3, cat] = 9.  # sure, but its mask is empty
    masks = torch.full((4, 16, 16), -9.)
    masks[0, 4:8, 2:10] = 4.
    masks[1, :, 8:] = 30.
    found = rewards.detections(classes, masks, (64, 64), (64, 48), (64, 48))
    assert set(found) == {"dog", "cat"} and len(found["cat"]) == len(found["dog"]) == 1
    assert found["cat"][0].score == pytest.approx(.5, abs=1e-2)
    assert found["cat"][0].box[2:] == (48, 64)  # what lies beyond the picture was padding
    logits = F.interpolate(masks[None, :1], size=(64, 64), mode="bilinear")[0, 0, :, :48]
    inside = logits > 0
    assert torch.equal(found["dog"][0].mask, inside)
    assert found["dog"][0].score == pytest.approx(logits[inside].sigmoid().mean().item(), abs=1e-3)
    rows, columns = np.where(inside.numpy())
    assert found["dog"][0].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    # twice the picture, twice the box
    assert abs(np.array(rewards.detections(classes, masks, (64, 64), (64, 48), (128, 96))["dog"][0].box)
               - 2 * np.array(found["dog"][0].box)).max() <= 1


class _RwColourClip:
    """Texts are one-hot by colour; a picture is embedded as the colour its mean over the non-grey pixels is nearest."""
    palette = {"red": (1, 0, 0), "blue": (0, 0, 1), "green": (0, 1, 0), "white": (1, 1, 1), "black": (0, 0, 0)}

    def text(self, texts):
        return torch.stack([F.one_hot(torch.tensor(next(i for i, c in enumerate(rewards.COLOURS)
                                                         if f" {c}" in text)), 10).float() for text in texts])

    def image(self, crop):
        assert crop.shape[0] == 1 and (crop[0] - .6).abs().amax(0).min() < .01  # the surroundings became grey
        pixels = crop[0][:, (crop[0] - .6).abs().amax(0) > .01].mean(1)
        distance = {name: (pixels - torch.tensor(rgb)).norm() for name, rgb in self.palette.items()}
        return F.one_hot(torch.tensor(rewards.COLOURS.index(min(distance, key=distance.get))), 10).float()[None]


def test_reward_geneval_whole(tmp_path):
    lines = [{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
             {"tag": "counting", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}],
              "prompt": "one dog"}]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    metadata = rewards.geneval_metadata(file)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[8:20, 4:28] = True
    mask[8, 4] = False

    def detect(images):  # a dog wherever the middle is not green; sure of it when it is blue
        return [{} if x[1, 10, 10] > .5 else
                {"dog": [Found((4, 8, 28, 20), .95 if x[2, 10, 10] > .5 else .5, mask)]} for x in images]
    judge = rewards.GenEval(detect, _RwColourClip(), metadata, "cpu")
    reward = _rw_reward(judge)
    pictures = {}
    for name, rgb in {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}.items():
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[8:20, 4:28] = rgb
        pictures[name] = Image.fromarray(picture)
    cases = [("red", "a red dog", 1, True), ("blue", "a red dog", .5, False), ("green", "a red dog", 0, False),
             ("red", "one dog", .5, False), ("blue", "one dog", 1, True), ("red", "a poem", math.nan, None)] * 2
    images, prompts = [pictures[c[0]] for c in cases], [c[1] for c in cases]
    for batch in (images, _rw_tensor(images)):
        assert np.array_equal(reward(batch, prompts).numpy(), [c[2] for c in cases], equal_nan=True)
        assert judge.correct(batch, prompts) == [c[3] for c in cases]
    mixed = [images[0], images[1].resize((32, 32)).crop((0, 0, 32, 31)), images[2]]  # sizes may differ
    detect_sizes = []
    judge.detect = lambda x: detect_sizes.append(tuple(x.shape)) or [{}] * len(x)
    assert judge.correct(mixed, prompts[:3]) == [False] * 3 and len(detect_sizes) == 3
    assert [judge.tag(p) for p in ("a red dog", "one dog", "a poem")] == ["colors", "counting", None]
    assert judge.prompts == ["a red dog", "one dog"]
    file.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[0]).replace("dog", "unicorn"))
    with pytest.raises(UserError, match="line 2: .*unicorn"):
        rewards.load(f"geneval@{file}")
    file.write_text(json.dumps(lines[0]) + "\n{}")
    with pytest.raises(UserError, match="line 2: .*lacks"):
        rewards.load(f"geneval@{file}")


def test_reward_geneval_detector(tmp_path, monkeypatch):
    """The detector against the whole segmentation model, whose training loss (which wants scipy) is left out."""
    from transformers import Mask2FormerConfig, SwinConfig
    from transformers.models.mask2former import modeling_mask2former as library
    monkeypatch.setattr(library, "Mask2FormerLoss", type("NoLoss", (torch.nn.Identity,), {}))
    monkeypatch.setattr(library.Mask2FormerPreTrainedModel, "_init_weights", lambda self, module: None)
    backbone = SwinConfig(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32,
                               encoder_layers=1, decoder_layers=3, num_queries=7, dim_feedforward=32,
                               encoder_feedforward_dim=32, num_attention_heads=4, num_labels=80)
    torch.manual_seed(0)
    whole = library.Mask2FormerForUniversalSegmentation(config).eval()
    whole.save_pretrained(tmp_path)
    detector = rewards.Detector(str(tmp_path), "cpu")
    pixels = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        classes, masks = detector.logits(pixels)
        expected = whole(pixels)
    assert torch.allclose(classes, expected.class_queries_logits, atol=1e-5)
    assert torch.allclose(masks, expected.masks_queries_logits, atol=1e-5)
    seen = []
    monkeypatch.setattr(detector, "logits", lambda x: seen.append(x) or (classes[:1], masks[:1]))
    assert len(detector(torch.full((1, 3, 50, 100), .5))) == 1
    assert seen[0].shape == (1, 3, 672, 1344)  # short side 800 would make the long one 1600: 1333 and padding to 32
    assert torch.allclose(seen[0][0, :, 100, 100], (.5 - torch.tensor([.485, .456, .406]))
                          / torch.tensor([.229, .224, .225]), atol=1e-5)
    assert seen[0][..., 667:, :].abs().max() == 0 and seen[0][..., 1333:].abs().max() == 0
    config.num_labels = 3
    library.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows 3 classes"):
        rewards.Detector(str(tmp_path), "cpu")


# --- served rewards

@contextmanager
def _rw_serving(reward, **options):
    """A server in a thread -> it and its URL."""
    bound = rewards.server(reward, **({"port": 0} | options))
    thread = threading.Thread(target=bound.serve_forever, kwargs={"poll_interval": .01})
    thread.start()
    try:
        yield bound, f"http://127.0.0.1:{bound.server_port}"
    finally:
        bound.shutdown()
        bound.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _rw_environment(monkeypatch):
    for name in ("REWARD_TOKEN", "REWARD_TIMEOUT", "VLM_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REWARD_PATIENCE", "20")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def _rw_post(url, body, headers=None):
    """Raw POST -> status, JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers or {}), timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def _rw_png(image=None, kind="PNG"):
    file = io.BytesIO()
    (image or Image.new("RGB", (4, 4))).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def test_reward_served_to_eight_clients():
    busy, overlaps = threading.Semaphore(1), []

    def alone(images, prompts):
        if not busy.acquire(blocking=False):
            overlaps.append(1)
        time.sleep(.01)
        scores = [math.nan if len(prompt) == 7 else score for prompt, score in zip(prompts, _rw_mean(images, prompts))]
        busy.release()
        return scores
    images, prompts = _rw_images(1000, (12, 10)), ["x" * (i % 50) for i in range(1000)]
    expected = _rw_reward(alone).score(images, prompts)["mine"].numpy()
    got = [None] * 8
    with _rw_serving(_rw_reward(alone)) as (_, url):
        def client(k):
            got[k] = rewards.load(url).score(images[k::8], prompts[k::8])[url].numpy()
        threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        with urllib.request.urlopen(url + "/health") as answer:
            assert json.loads(answer.read()) == {"name": "mine"}
    assert all(np.array_equal(got[k], expected[k::8], equal_nan=True) for k in range(8)) and not overlaps
    assert np.isnan(expected).sum() == 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the server's death
def test_reward_client_survives_a_restart(capfd):
    images, prompts, calls = _rw_images(200, (8, 8)), ["p"] * 200, []

    def dies_at_third(images, prompts):
        calls.append(len(images))
        if len(calls) == 3:
            raise SystemExit  # takes the thread down: the client's connection breaks without an answer
        return _rw_mean(images, prompts)
    result = []
    with _rw_serving(_rw_reward(dies_at_third)) as (bound, url):
        client = rewards.load(url)
        thread = threading.Thread(target=lambda: result.append(client(images, prompts)))
        thread.start()
        while len(calls) < 3:
            time.sleep(.01)
        port = bound.server_port
    time.sleep(.7)  # nobody listens: the client is refused at least once
    assert not result
    with _rw_serving(_rw_reward(_rw_mean), port=port):
        thread.join(15)
        assert np.allclose(result[0], _rw_mean(images, prompts))
        assert calls == [64, 64, 64]  # what was answered is not asked again
    err = capfd.readouterr().err
    assert err.count("trying again for up to 20 s") == 1 and url in err
    # a second time, between two calls
    thread = threading.Thread(target=lambda: result.append(client(images[:3], prompts[:3])))
    thread.start()
    time.sleep(.3)
    with _rw_serving(_rw_reward(_rw_mean), port=port):
        thread.join(15)
    assert np.allclose(result[1], _rw_mean(images[:3], prompts[:3]))


def test_reward_client_gives_up(monkeypatch):
    with _rw_serving(_rw_reward(_rw_mean)) as (_, url):
        pass
    monkeypatch.setenv("REWARD_PATIENCE", "0.3")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"refused.*gave up after 0.3 s"):
        rewards.load(url)(_rw_images(1), ["a"])
    assert .3 <= time.monotonic() - start < 5
    monkeypatch.setenv("REWARD_PATIENCE", "soon")
    with pytest.raises(UserError, match="REWARD_PATIENCE='soon' is not a number of seconds"):
        rewards.load(url)(_rw_images(1), ["a"])


@pytest.mark.parametrize("body, status, says", [
    (b"{not json", 400, "not JSON"), (b"\xff\xfe", 400, "not JSON"), ([1, 2], 400, "not JSON"),
    (b"[" * 100000, 400, "not JSON"), ({"prompts": ["a"]}, 400, "not JSON"),
    ({"prompts": "ab", "images": ["x", "y"]}, 400, "not JSON"), ({"prompts": [1], "images": ["x"]}, 400, "not JSON"),
    ({"prompts": ["a", "b"], "images": ["x"]}, 400, "2 prompts but 1 images"),
    ({"prompts": ["a"], "images": ["%%%"]}, 400, "image 0 is not base64"),
    ({"prompts": ["a"], "images": [None]}, 400, "image 0 is not base64"),
    ({"prompts": ["a"], "images": [_rw_png(kind="GIF")]}, 400, "image 0 is not a PNG, JPEG or WebP"),
    ({"prompts": ["a"], "images": [_rw_png()[:60]]}, 400, "image 0 is not"),
    (b"x" * 300_000, 413, "at most 200000"), ({"prompts": ["raise"], "images": [_rw_png()]}, 500, "ValueError: broken"),
    ({"prompts": ["inf"], "images": [_rw_png()]}, 500, "returned inf"), ({"prompts": [], "images": []}, 200, None),
])
def test_reward_server_refuses_and_lives(body, status, says, rw_fragile):
    code, answer = _rw_post(rw_fragile + "/score", body)
    assert code == status
    assert answer == {"scores": []} if status == 200 else says in answer["error"] and "\n" not in answer["error"]
    assert _rw_post(rw_fragile + "/score", {"prompts": ["ok"], "images": [_rw_png()]}) == (200, {"scores": [2.0]})


@pytest.fixture(scope="module")
def rw_fragile():
    def fragile(images, prompts):
        if "raise" in prompts:
            raise ValueError("broken")
        return [math.inf if prompt == "inf" else len(prompt) for prompt in prompts]
    with _rw_serving(_rw_reward(fragile), max_body=200_000) as (_, url):
        yield url


def test_reward_server_bombs_and_places(rw_fragile, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    bomb = {"prompts": ["a"], "images": [_rw_png(Image.new("RGB", (100, 100)))]}
    code, answer = _rw_post(rw_fragile + "/score", bomb)
    assert code == 400 and "DecompressionBombError" in answer["error"]
    assert _rw_post(rw_fragile + "/elsewhere", {})[0] == 404
    for length in ("many", "-5", "9" * 5000):
        assert _rw_post(rw_fragile + "/score", b"{}", {"Content-Length": length})[0] == 400
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(rw_fragile + "/elsewhere")
    with pytest.raises(UserError, match="combine where they are used"):
        rewards.server(rewards.load("jpeg,incompressibility"))
    with pytest.raises(UserError, match="cannot serve on 127.0.0.1"):
        rewards.server(_rw_reward(_rw_mean), port=int(rw_fragile.rpartition(":")[2]))


def test_reward_server_token_and_big_bodies(monkeypatch):
    with _rw_serving(_rw_reward(_rw_mean), token="secret", max_body=10_000) as (_, url):
        client, images = rewards.load(url), _rw_images(2, (8, 8))
        body = {"prompts": ["ok"], "images": [_rw_png()]}
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert _rw_post(url + "/score", body, header)[0] == 401
        with pytest.raises(UserError, match="HTTP 401: .*wrong or missing bearer token"):
            client(images, ["a", "b"])
        monkeypatch.setenv("REWARD_TOKEN", "secret")
        assert np.allclose(client(images, ["a", "b"]), _rw_mean(images, ["a", "b"]))
        # far over the limit: the client must hear 413, and not a broken connection that it would try again
        with pytest.raises(UserError, match="HTTP 413: .*at most 10000"):
            client(_rw_images(12, (400, 400)), ["a"] * 12)
        assert np.allclose(client(images, ["a", "b"]), _rw_mean(images, ["a", "b"]))


class _RwScript(BaseHTTPRequestHandler):
    """Answers the requests of a test with what its list says: (status, body[, headers]) or seconds to stay silent."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), request))
            step = self.server.script.pop(0) if self.server.script else self.server.usual(request)
        if isinstance(step, float):
            time.sleep(step)
            return
        status, body, *headers = step
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or [{}])[0].items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def _rw_scripted(script, usual=None):
    bound = ThreadingHTTPServer(("127.0.0.1", 0), _RwScript)
    bound.script, bound.usual, bound.requests, bound.lock = script, usual, [], threading.Lock()
    thread = threading.Thread(target=bound.serve_forever, kwargs={"poll_interval": .01})
    thread.start()
    try:
        yield bound, f"http://127.0.0.1:{bound.server_port}"
    finally:
        bound.shutdown()
        bound.server_close()
        thread.join()


@pytest.mark.parametrize("answer, says", [
    (b"<html>", "its answer is not JSON"), ([1], "its answer is not"), ({"scores": 3}, "its answer is not"),
    ({"scores": [1]}, "returned 1 scores for 2 images"), ({"scores": [1, "x"]}, "returned 'x' (str) for image 1"),
    (b'{"scores": [1, Infinity]}', "returned inf for image 1"),
])
def test_reward_client_checks_answers(answer, says):
    with _rw_scripted([(200, answer)]) as (_, url), pytest.raises(UserError) as caught:
        rewards.load(url)(_rw_images(2), ["a", "b"])
    assert says in str(caught.value)


def test_reward_client_waits_as_told(capfd):
    script = [(429, b"busy", {"Retry-After": "1"}), (503, b"still"), (200, {"scores": [1, None]})]
    with _rw_scripted(script) as (bound, url):
        start = time.monotonic()
        got = rewards.load(url)(_rw_images(2), ["a", "b"])
        assert 2 <= time.monotonic() - start < 6 and got[0] == 1 and got[1].isnan()  # 1 as asked, 1 of its own
    err = capfd.readouterr().err
    assert err.count("HTTP 429: busy; trying again") == 1 and err.count("trying again") == 1


# --- the judge

def _rw_reply(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def _rw_vlm(url):
    reward = rewards.load(f"vlm@{url}/v1?model=some/judge")
    return reward, next(iter(reward.parts.values()))


def test_reward_vlm_asks(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")

    def usual(request):  # the judge reads the number of a prompt off its text, and knows the picture's size
        picture, text = request["messages"][0]["content"]
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"), validate=True)
        width = Image.open(io.BytesIO(data), formats=["JPEG"]).width
        return _rw_reply(f"I see 99 things. Score: {int(text['text'].split('number ')[1][0]) + width / 100}")
    with _rw_scripted([], usual) as (bound, url):
        reward, part = _rw_vlm(url)
        images = [Image.new("RGB", (10 + i, 8)) for i in range(9)]
        got = reward(images, [f"number {i}" for i in range(9)])
    assert np.allclose(got, [i + (10 + i) / 100 for i in range(9)]) and part.unparsed == 0
    path, headers, request = bound.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer key"
    assert request["model"] == "some/judge" and request["temperature"] == 0


@pytest.mark.parametrize("reply, score", [
    ("Score: 7.5", 7.5), ("**Score:** 8", 8), ("score = 0", 0), ("Score: 3\nNo. Score: 4", 4), ("Score: 10/10", 10),
    ("I cannot rate this.", None), ("", None), (None, None), ("Score: 11", None), ("Score: -1", None), ("7", None),
])
def test_reward_vlm_replies(reply, score):
    with _rw_scripted([_rw_reply(reply)]) as (_, url):
        reward, part = _rw_vlm(url)
        got = reward(_rw_images(1), ["a"]).item()
    assert (math.isnan(got) and part.unparsed == 1) if score is None else (got == score and part.unparsed == 0)


def test_reward_vlm_trouble(monkeypatch):
    monkeypatch.setenv("REWARD_TIMEOUT", "0.3")
    script = [(429, b"", {"Retry-After": "0"}), (500, b"oops"), .6, _rw_reply("Score: 6")]
    with _rw_scripted(script) as (bound, url):
        reward, part = _rw_vlm(url)
        assert reward(_rw_images(1), ["a"]).item() == 6 and len(bound.requests) == 4
        bound.script[:] = [(200, {"error": "overloaded"})]
        assert reward(_rw_images(1), ["a"]).isnan().all() and part.unparsed == 1
        bound.script[:] = [(200, b"{malformed")]
        with pytest.raises(UserError, match="its answer is not JSON"):
            reward(_rw_images(1), ["a"])
        bound.script[:] = [(404, b"no such model")]
        with pytest.raises(UserError, match="HTTP 404: no such model"):
            reward(_rw_images(1), ["a"])


# --- the command line

def test_reward_cli(tmp_path, capsys):
    images = _rw_images(2, (40, 30))
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    [image.save(path) for image, path in zip(images, paths)]
    assert rewards.main(["score", "jpeg,incompressibility=2", "--prompt", "a cube", *paths]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("\t") == ["jpeg", "incompressibility", "combined", "file"]
    sizes = rewards.load("incompressibility")(images, ["p"] * 2)
    for line, path, size in zip(lines, paths, sizes):
        jpeg, size_, combined, file = line.split("\t")
        assert (float(jpeg), float(size_), file) == (pytest.approx(-size.item()), pytest.approx(size.item()), path)
        assert float(combined) == pytest.approx(1 if size == sizes.max() else -1)
    assert rewards.main(["list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in rewards.REWARDS)
    assert "yuvalkirstain/PickScore_v1" in table and "3.9 GB" in table


@pytest.mark.parametrize("arguments, says", [
    (["score", "jpge", "--prompt", "p", "GOOD"], "unknown reward 'jpge'; nearest: jpeg"),
    (["score", "jpeg=x", "--prompt", "p", "GOOD"], "the weight 'x' of 'jpeg' is not a number"),
    (["score", "jpeg", "--prompt", "p", "gone.png"], "FileNotFoundError"),
    (["score", "jpeg", "--prompt", "p", "BAD"], "UnidentifiedImageError"),
    (["serve", "nothing"], "unknown reward 'nothing'"), (["serve", "jpeg", "--port", "99999"], "cannot serve on"),
])
def test_reward_cli_bad_input(arguments, says, tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not a picture")
    names = {"GOOD": str(tmp_path / "good.png"), "BAD": str(tmp_path / "bad.png")}
    assert rewards.main([names.get(a, a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


def test_reward_cli_process(tmp_path):
    """As a program: a wrong spec gives one line and 2; a server starts, answers, and stops at an interrupt."""
    command = [sys.executable, str(ROOT / "rewards.py")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    wrong = subprocess.run([*command, "serve", "pickscore"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("error: reward 'pickscore': cannot load")
    assert "Traceback" not in wrong.stderr
    process = subprocess.Popen([*command, "serve", "jpeg", "--port", "0"], stdout=subprocess.PIPE, text=True,
                               env=environment)
    try:
        url = process.stdout.readline().split()[-1]
        images = _rw_images(3)
        assert torch.equal(rewards.load(url)(images, list("abc")), rewards.load("jpeg")(images, list("abc")))
    finally:
        process.send_signal(2)
    assert process.wait(10) == 0
