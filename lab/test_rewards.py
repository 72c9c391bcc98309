"""Tests of the rewards in lab/: HPS, ImageReward, aesthetic, GenEval, the judge; of the server and
its client; and of lab/vit.py, features of a reader's own.

    python -m pytest -q -n 2 lab/test_rewards.py
"""
import base64
import io
import json
import math
import os
import signal
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

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import drpo  # noqa: E402
import eval as E  # noqa: E402
import geneval  # noqa: E402
import rewards  # noqa: E402
from geneval import Found  # noqa: E402
from rewards import UserError  # noqa: E402
import serve  # noqa: E402

from test_drpo import (  # noqa: E402, F401
    as_batch, compare_maps, eval_main, mean_red, models, open_model, reward_of, some_images,
    some_noise, toy, toy_runs,
)

hps = rewards.import_file(HERE / "hps.py")
judge = rewards.import_file(HERE / "judge.py")  # the module that rewards.load takes
imagereward = rewards.import_file(HERE / "imagereward.py")


# ===== models, against the originals' own numbers

CLIP_PROMPTS = ["a cat", "a red dog", "two birds", "a cat"]

SMALL_CLIP = {  # the shape of `open_clip_weights`
    "projection_dim": 24,
    "text_config": dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4,
                        hidden_act="gelu", projection_dim=24, vocab_size=54, bos_token_id=52,
                        eos_token_id=53),
    "vision_config": dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                          num_attention_heads=1,
                          hidden_act="gelu", projection_dim=24, patch_size=56),
}

# what the originals' own code gives for the pictures of `waves`, these prompts and weights
ORIGINAL_SCORES = {
    # the model card's, transformers 4.57.1; 640 x 427
    "pickscore": [28.709972, 29.506081, 28.312414, 43.962631],
    # OpenAI's, clip-anytorch 2.6.0; 280 x 280
    "clip": [0.270572, 0.353885, 0.281806, 0.411300],
    # its repository's, 6934dd81, on OpenAI's; 640 x 427
    "aesthetic": [0.690763, 0.682535, 0.690826, 0.688289],
    # hpsv2 1.2.0; 640 x 427, and 85 x 320
    "hpsv2": [0.238148, 0.424465, 0.398144, 0.230903],
    "hpsv2 tall": [0.109186, 0.202356, 0.257832, 0.119639],
    # image-reward 1.5; 640 x 427
    "imagereward": [-0.373085, -0.047387, 0.280459, 0.160174],
}


def clip_tokenizer(folder):
    """A CLIP tokenizer of single letters; the end token has the highest number, as in the real
    one."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {t: i for i, t in enumerate(letters + [c + "</w>" for c in letters]
                                        + ["<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}))
    return vocab


def waves(count, size):
    """Pictures by a formula: smooth, all different, the same under any version of Pillow."""
    x, y = np.meshgrid(np.arange(size[0]) / 40, np.arange(size[1]) / 40)
    pictures = []
    for n in range(1, count + 1):
        channels = [np.sin(n * x + c) * np.cos(y * (c + 1) - n) for c in range(3)]
        pictures.append(Image.fromarray((127.5 + 127.5 * np.stack(channels,
                                                                  -1)).round().astype(np.uint8)))
    return pictures


def open_clip_weights(projection=24):
    """Random weights with open_clip's and OpenAI's names: a ViT of width 64 in patches of 56, a
    text model of width 32."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (shape[-1] ** -.5 if len(shape) > 1
                                                          else .3)
    weights = {"logit_scale": torch.tensor(4.6), "positional_embedding": draw(77, 32),
               "text_projection": draw(32, projection), "token_embedding.weight": draw(54, 32),
               "visual.class_embedding": draw(64), "visual.proj": draw(64, projection),
               "visual.positional_embedding": draw(17, 64),
               "visual.conv1.weight": draw(64, 3, 56, 56) * .2}
    norms = {"visual.ln_pre": 64, "visual.ln_post": 64, "ln_final": 32}
    for prefix, width in (("visual.", 64), ("", 32)):
        for n in range(2):
            p = f"{prefix}transformer.resblocks.{n}."
            norms |= {p + "ln_1": width, p + "ln_2": width}
            for name, rows, columns in (("attn.in_proj_", 3 * width, width),
                                        ("attn.out_proj.", width, width),
                                        ("mlp.c_fc.", 4 * width, width),
                                        ("mlp.c_proj.", width, 4 * width)):
                weights |= {p + name + "weight": draw(rows, columns), p + name + "bias": draw(rows)}
    for name, width in norms.items():
        weights |= {name + ".weight": 1 + draw(width), name + ".bias": draw(width)}
    return weights


def clip_folder(folder, projection=24, activation="gelu"):
    """A folder of a small CLIPModel with these weights and its tokenizer, as of a hub."""
    from transformers import CLIPConfig, CLIPModel
    config = CLIPConfig(**{**SMALL_CLIP, "projection_dim": projection})
    config.text_config.hidden_act = config.vision_config.hidden_act = activation
    weights = hps.from_open_clip(open_clip_weights(projection))
    CLIPModel.from_pretrained(None, config=config, state_dict=weights).save_pretrained(folder)
    clip_tokenizer(folder)


def behaves(reward, tolerance=1e-5):
    """What every model reward must do: repeat itself, not care for order or batch size, tell
    pictures apart."""
    images = some_images(5, (90, 70)) + [Image.new("RGB", (90, 70))]
    prompts = ["a cat", "a dog"] * 3
    (name, part), = reward.parts.items()
    scores = reward(images, prompts)
    assert torch.equal(scores, reward(images, prompts))
    assert torch.allclose(scores.flip(0), reward(images[::-1], prompts[::-1]), atol=tolerance)
    part.batch_size = 2
    assert torch.allclose(scores, reward(images, prompts), atol=tolerance)
    shuffled = np.random.default_rng(0).permutation(np.array(images[0]).reshape(-1, 3)).reshape(70,
        90, 3)
    others = reward([images[0], Image.fromarray(shuffled), images[5]], ["a cat"] * 3)
    assert others.isfinite().all()
    assert len(set(others.tolist())) == 3


def head_weights(width):
    """Random weights of the five linear layers of the LAION predictor and of ImageReward."""
    generator = torch.Generator().manual_seed(6)
    weights = {}
    for i, rows, columns in ((0, 1024, width), (2, 128, 1024), (4, 64, 128), (6, 16, 64),
                             (7, 1, 16)):
        weights[f"layers.{i}.weight"] = torch.randn(rows, columns,
                                                    generator=generator) * columns ** -.5
        weights[f"layers.{i}.bias"] = torch.randn(rows, generator=generator) * .3
    return weights


SMALL_BLIP_TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=64, vocab_size=40, layer_norm_eps=1e-12,
                       encoder_hidden_size=48, max_position_embeddings=64)
SMALL_BLIP_VISION = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=96, patch_size=56, image_size=224,
                         layer_norm_eps=1e-6)


def blip_weights():
    """Random weights with the names of ImageReward.pt."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (shape[-1] ** -.5 if len(shape) > 1
                                                          else .3)
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    weights = {v + "cls_token": draw(1, 1, 48), v + "pos_embed": draw(1, 17, 48),
               v + "patch_embed.proj.weight": draw(48, 3, 56, 56) * .2, v
               + "patch_embed.proj.bias": draw(48),
               t + "embeddings.word_embeddings.weight": draw(40, 32),
               t + "embeddings.position_ids": torch.arange(64)[None],
               t + "embeddings.position_embeddings.weight": draw(64, 32)}
    norms, linears = {v + "norm": 48, t + "embeddings.LayerNorm": 32}, {}
    for n in range(2):
        b, e = f"{v}blocks.{n}.", f"{t}encoder.layer.{n}."
        norms |= {b + "norm1": 48, b + "norm2": 48, e + "attention.output.LayerNorm": 32,
                  e + "crossattention.output.LayerNorm": 32, e + "output.LayerNorm": 32}
        linears |= {b + "attn.qkv": (144, 48), b + "attn.proj": (48, 48), b + "mlp.fc1": (96, 48),
                    b + "mlp.fc2": (48, 96), e + "intermediate.dense": (64, 32), e
                    + "output.dense": (32, 64)}
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


class TestModels:
    """CLIP and its descendants, HPS, ImageReward and the aesthetic predictor, for small seeded
    weights."""

    @pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 517), (640, 231), (64, 64),
                                      (225, 224), (100, 37)])
    def test_clip_pixels(self, size):
        from transformers import CLIPImageProcessor
        images = some_images(2, size)
        judge = CLIPImageProcessor()(images, return_tensors="pt")["pixel_values"]
        mine = rewards.clip_pixels(images, "cpu")
        assert mine.shape == judge.shape
        assert (mine - judge).abs().max() < 1e-6
        # the tensor path against PIL: at most one level of 255 (two where the picture is enlarged),
        # seldom
        level, grows = 1 / 255 / torch.tensor(rewards.CLIP_STD).view(3, 1, 1), min(size) < 224
        difference = ((rewards.clip_pixels(as_batch(images), "cpu") - mine) / level).abs()
        assert difference.max() < (2.01 if grows else 1.01)
        assert (difference > 0.5).float().mean() < (1e-2 if grows else 1e-3)

    def test_centre_crop_of_torchvision(self):
        """int(round((long - 224) / 2)), by hand, for every long side; a pixel beside the floor of
        transformers for some."""
        differs = 0
        for long in (225, 227, 228, 229, 230, 231, 243, 327, 335):
            picture = np.zeros((224, long, 3), np.uint8)
            picture[..., 0] = np.arange(long) % 256
            first = {}
            for fit in ("round", "floor"):
                x = rewards.clip_pixels([Image.fromarray(picture)], "cpu", fit=fit)[0, 0, 0, 0]
                first[fit] = round(float(x * rewards.CLIP_STD[0] + rewards.CLIP_MEAN[0]) * 255)
            assert first["round"] == int(round((long - 224) / 2.0))
            assert first["floor"] == (long - 224) // 2
            differs += first["round"] != first["floor"]
        assert differs > 2

    def test_pickscore_and_clip(self, tmp_path):
        large = some_images(4, (512, 512))
        for name, size, activation, tolerance in (("pickscore", (640, 427), "gelu", 1e-2),
                                                  ("clip", (280, 280), "quick_gelu", 5e-4)):
            clip_folder(tmp_path / name, activation=activation)
            reward = rewards.load(f"{name}@{tmp_path / name}")
            assert reward(waves(4, size),
                          CLIP_PROMPTS).tolist() == pytest.approx(ORIGINAL_SCORES[name], rel=2e-5)
            # a tensor scores as its saved picture
            assert torch.allclose(reward(as_batch(large), CLIP_PROMPTS),
                                  reward(large, CLIP_PROMPTS), atol=tolerance)
            behaves(reward, 2e-5)

    def test_texts_are_read_once(self, tmp_path):
        clip_folder(tmp_path)
        clip, read = rewards.clip_at("clip", rewards.CLIP_L, "cpu", str(tmp_path)), []
        tokenize = clip.tokenize
        clip.tokenize = lambda texts: read.extend(texts) or tokenize(texts)
        first = clip.text(["a cat", "a dog", "a cat"])
        clip.text(["a dog"])
        assert read == ["a cat", "a dog"]
        assert torch.equal(first[0], first[2])
        clip.known.update(dict.fromkeys(range(4096)))
        assert torch.allclose(clip.text(["a cat"]), first[:1], atol=1e-6)
        assert len(clip.known) == 1, "the memory is bounded"

    @pytest.mark.parametrize("size", [(300, 200), (85, 320), (224, 224), (96, 96)])
    def test_hpsv2_pixels(self, size):
        """In float, resized once (both sides rounded from the product with 224 / longest), black
        beside: not clamped."""
        image, = some_images(1, size)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        height, width = (round(v * (224 / max(size))) for v in (size[1], size[0]))
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)[0]
        canvas = torch.zeros(3, 224, 224)
        top, left = (224 - height) // 2, (224 - width) // 2
        canvas[:, top:top + height, left:left + width] = x
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (rewards.CLIP_MEAN, rewards.CLIP_STD))
        for given in ([image], as_batch([image])):
            assert torch.allclose(rewards.clip_pixels(given, "cpu", fit="pad")[0],
                                  (canvas - mean) / std, atol=1e-5)

    def test_hpsv2_texts(self):
        """What open_clip's tokenizer does first: entities twice, quotes, wide letters, ligatures,
        composition."""
        for text, want in (("Tom &amp;amp; Jerry", "Tom & Jerry"),
                           ("it\u2019s \u201cred\u201d", "it's \"red\""),
                           ("\uff21\uff22\u3000\ufb01sh", "AB fish"), ("cafe\u0301 ", "caf\u00e9"),
                           ("x\u2154", "x\u2154")):
            assert hps.repaired(text) == want

    def test_aesthetic(self, tmp_path):
        clip_folder(tmp_path, 768, "quick_gelu")
        images = waves(4, (640, 427))
        for name in ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth"):
            torch.save(head_weights(768), tmp_path / name)
            reward = rewards.load(f"aesthetic@{tmp_path}")
            scores = reward(images, CLIP_PROMPTS).tolist()
            assert scores == pytest.approx(ORIGINAL_SCORES["aesthetic"], abs=3e-6)
            (tmp_path / name).unlink()
        assert torch.equal(reward(images, CLIP_PROMPTS), reward(images, ["another"] * 4))
        behaves(reward, 1e-6)

    def test_hpsv2(self, tmp_path, monkeypatch):
        monkeypatch.setattr(hps, "VIT_H", SMALL_CLIP)
        weights = open_clip_weights()
        clip_tokenizer(tmp_path)
        torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
        reward = rewards.load(f"hpsv2@{tmp_path}")
        images = waves(4, (640, 427))
        tall = reward(waves(4, (85, 320)), CLIP_PROMPTS)
        scores = reward(images, CLIP_PROMPTS).tolist()
        assert scores == pytest.approx(ORIGINAL_SCORES["hpsv2"], abs=3e-6)
        assert tall.tolist() == pytest.approx(ORIGINAL_SCORES["hpsv2 tall"], abs=3e-6)
        assert torch.allclose(reward(images, ["\uff41 cat", "a red dog", "two&#32;birds", "a cat"]),
                              reward(images, CLIP_PROMPTS))
        behaves(reward)
        # version 2.0, the authors', by its file
        torch.save({"state_dict": weights}, tmp_path / "HPS_v2_compressed.pt")
        plain = rewards.tokenizer_at
        monkeypatch.setattr(rewards, "tokenizer_at", lambda repo, path,
                            length: plain(repo, tmp_path, length))
        other = rewards.load(f"hpsv2@{tmp_path / 'HPS_v2_compressed.pt'}")
        assert torch.allclose(other(images, CLIP_PROMPTS), reward(images, CLIP_PROMPTS))
        # a file that lacks a weight must not be filled up with noise
        del weights["ln_final.weight"]
        torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
        with pytest.raises(UserError, match="final_layer_norm.weight"):
            rewards.load(f"hpsv2@{tmp_path}")

    def test_imagereward(self, tmp_path, monkeypatch):
        monkeypatch.setattr(imagereward, "BLIP_TEXT", SMALL_BLIP_TEXT)
        monkeypatch.setattr(imagereward, "BLIP_VISION", SMALL_BLIP_VISION)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "dog", "two",
                 "birds"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        torch.save(blip_weights(), tmp_path / "ImageReward.pt")
        reward = rewards.load(f"imagereward@{tmp_path}")
        images = waves(4, (640, 427))
        scores = reward(images, CLIP_PROMPTS).tolist()
        assert scores == pytest.approx(ORIGINAL_SCORES["imagereward"], abs=3e-6)
        behaves(reward)

    def test_hpsv3(self, monkeypatch, tmp_path):
        grads = []

        class Inferencer:
            def __init__(self, device, checkpoint_path=None):
                if device == "meta":
                    raise OSError("no hub\nin reach")
                self.bonus = 4 if checkpoint_path else 0

            def reward(self, prompts, image_paths):
                grads.append(torch.is_grad_enabled())
                return torch.tensor([[np.array(Image.open(path)).mean() + len(prompt) + self.bonus,
                                      99.]
                                     for prompt, path in zip(prompts, image_paths)])
        package = types.ModuleType("hpsv3")
        package.HPSv3RewardInferencer = Inferencer
        monkeypatch.setitem(sys.modules, "hpsv3", package)
        images, prompts = some_images(11), [f"{'x' * i}" for i in range(11)]
        assert np.allclose(rewards.load("hpsv3", "cuda")(images, prompts),
                           mean_red(images, prompts))
        (tmp_path / "four").write_text("weights")
        assert np.allclose(rewards.load(f"hpsv3@{tmp_path / 'four'}", "cuda")(images, prompts),
                           np.array(mean_red(images, prompts)) + 4)
        assert hps.hpsv3("cuda")(images[:1], ["a"])
        assert not any(grads)
        with pytest.raises(UserError, match=r"special token <\|Reward\|>"):
            rewards.load("hpsv3", "cuda")(images[:1], ["a <|Reward|> cat"])
        for spec, device in (("hpsv3", "cpu"), (f"hpsv3@{tmp_path}", "cuda"),
                             ("hpsv3@/no/file", "cuda")):
            with pytest.raises(UserError, match="hpsv3 matplotlib tensorboard rich tyro") as caught:
                rewards.load(spec, device)
            assert "\n" not in str(caught.value)


class TestFiles:
    """What is written and read."""

    def test_a_full_disk_spoils_nothing(self, tmp_path):
        """No file may grow above 1,000 bytes: one line, the old file is there, nothing beside
        it."""
        import resource
        (tmp_path / "checkpoint.pt").write_bytes(b"before")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(UserError, match="what was there is intact"):
                rewards.write_atomic(tmp_path / "checkpoint.pt",
                                     lambda file: torch.save(torch.zeros(9999), file))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "checkpoint.pt").read_bytes() == b"before"
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


# ===== over HTTP


@contextmanager
def running(bound):
    """A bound server in a thread -> it and its URL."""
    thread = threading.Thread(target=bound.serve_forever, kwargs={"poll_interval": .01})
    thread.start()
    try:
        yield bound, f"http://127.0.0.1:{bound.server_port}"
    finally:
        bound.shutdown()
        bound.server_close()
        thread.join()


@contextmanager
def serving(reward, **options):
    """A server in a thread -> it and its URL."""
    bound = serve.server(reward, "127.0.0.1", 0, **options)
    with running(bound) as served:
        yield served


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("REWARD_TOKEN", "REWARD_TIMEOUT", "VLM_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REWARD_PATIENCE", "20")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Script(BaseHTTPRequestHandler):
    """Answers the requests of a test with what its list says: (status, body[, headers]) or seconds
    to stay silent."""

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
def scripted(script, usual=None):
    bound = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    bound.script, bound.usual, bound.requests, bound.lock = script, usual, [], threading.Lock()
    with running(bound) as served:
        yield served


def post(url, body, headers=None):
    """Raw POST -> status, JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers or {}),
                                    timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def png_text(image=None, kind="PNG"):
    file = io.BytesIO()
    (image or Image.new("RGB", (4, 4))).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def not_ignored():
    """In a child before it is executed: SIGINT as a terminal has it, also where pytest is a
    background job."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class TestServe:
    """The server and its client, on this machine."""

    def test_served_to_eight_clients(self):
        busy, overlaps = threading.Semaphore(1), []

        def alone(images, prompts):
            if not busy.acquire(blocking=False):
                overlaps.append(1)
            time.sleep(.01)
            scores = [math.nan if len(prompt) == 7 else score for prompt,
                      score in zip(prompts, mean_red(images, prompts))]
            busy.release()
            return scores
        images, prompts = some_images(1000, (12, 10)), ["x" * (i % 50) for i in range(1000)]
        expected = reward_of(alone).score(images, prompts)["mine"].numpy()
        got = [None] * 8
        with serving(reward_of(alone)) as (_, url):
            def client(k):
                got[k] = rewards.load(url).score(images[k::8], prompts[k::8])[url].numpy()
            threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            with urllib.request.urlopen(url + "/health") as answer:
                assert json.loads(answer.read()) == {"name": "mine"}
        assert all(np.array_equal(got[k], expected[k::8], equal_nan=True) for k in range(8))
        assert not overlaps
        assert np.isnan(expected).sum() == 20

    def test_served_sees_whole_prompts(self):
        calls = []

        def seen(images, prompts):
            calls.append(list(prompts))
            return [0.0] * len(images)

        prompts = ["a"] * 24 + ["b"] * 24 + ["c"] * 24 + ["d"] * 100
        with serving(reward_of(seen)) as (_, url):
            rewards.load(url)(some_images(172, (4, 4)), prompts)
        assert [sorted(set(call)) for call in calls] == [["a", "b", "c"], ["d"]]

    def test_server_refuses_and_lives(self):
        """Each with its status and one line of JSON."""
        good = {"prompts": ["a"], "images": [png_text(some_images(1)[0])]}
        with serving(reward_of(mean_red), token="key") as (_, url):
            key = {"Authorization": "Bearer key"}
            assert post(url + "/score", json.dumps(good).encode())[0] == 401
            for body, status in ((b"[1", 400), (b'{"prompts": ["a"]}', 400),
                                 (b'{"prompts": [1], "images": ["x"]}', 400),
                                 (json.dumps({**good, "images": ["!"]}).encode(), 400),
                                 (json.dumps({**good, "images": ["aGk="]}).encode(), 400),
                                 (json.dumps(good).encode(), 200)):
                got, answer = post(url + "/score", body, key)
                assert got == status, answer
                assert "\n" not in str(answer)
            assert post(url + "/other", json.dumps(good).encode(), key)[0] == 404

    def test_client_gives_up(self, monkeypatch):
        with serving(reward_of(mean_red)) as (_, url):
            pass
        monkeypatch.setenv("REWARD_PATIENCE", "0.3")
        start = time.monotonic()
        with pytest.raises(UserError, match=r"refused.*gave up after 0.3 s"):
            rewards.load(url)(some_images(1), ["a"])
        assert .3 <= time.monotonic() - start < 5
        monkeypatch.setenv("REWARD_PATIENCE", "soon")
        with pytest.raises(UserError, match="REWARD_PATIENCE='soon'.*seconds"):
            rewards.load(url)(some_images(1), ["a"])

    def test_client_waits_as_told(self, capfd):
        script = [(429, b"busy", {"Retry-After": "1"}), (503, b"still"),
                  (200, {"scores": [1, None]})]
        with scripted(script) as (bound, url):
            start = time.monotonic()
            got = rewards.load(url)(some_images(2), ["a", "b"])
            # 1 as asked, 1 of its own
            assert 2 <= time.monotonic() - start < 6
            assert got[0] == 1
            assert got[1].isnan()
        err = capfd.readouterr().err
        assert err.count("HTTP 429: busy; trying again") == 1
        assert err.count("trying again") == 1

    @pytest.mark.parametrize("status,answer,words", (
        (301, {}, "redirect"), (307, {}, "redirect"), (400, {"error": "bad"}, "HTTP 400"),
        (401, {}, "HTTP 401"),
        (402, {"error": "quota"}, "quota"), (422, {}, "HTTP 422"),
        (429, {"error": {"code": "insufficient_quota"}}, "quota"),
        (200, b"<html>", "not JSON"), (200, {"scores": [1, 2]}, "scores"),
        (200, {"error": "no GPU"}, "no GPU")))
    def test_client_stops_at_permanent_answers(self, status, answer, words):
        with scripted([(status, answer, {"Location": "http://elsewhere/"})]) as (bound, url):
            with pytest.raises(UserError, match=words):
                rewards.load(url)(some_images(1), ["a"])
        assert len(bound.requests) == 1, "asked once"

    def test_urls_and_times_that_cannot_be(self, monkeypatch):
        with pytest.raises(UserError, match="credentials"):
            rewards.load("http://user:password@127.0.0.1:9")
        monkeypatch.setenv("REWARD_TIMEOUT", "0")
        with pytest.raises(UserError, match="REWARD_TIMEOUT"):
            rewards.load("http://127.0.0.1:9")(some_images(1), ["a"])

    def test_cli_process(self, tmp_path):
        """As a program: a wrong spec gives one line and 2; a server starts, answers, and stops at
        an interrupt."""
        command = [sys.executable, str(HERE.parent / "rewards.py")]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path),
                                    "CUDA_VISIBLE_DEVICES": ""}
        wrong = subprocess.run([*command, "serve", "pickscore"], capture_output=True, text=True,
                               env=environment)
        assert wrong.returncode == 2
        assert wrong.stderr.splitlines()[-1].startswith("error: reward 'pickscore': config.json")
        assert "Traceback" not in wrong.stderr
        process = subprocess.Popen([*command, "serve", "jpeg", "--port", "0"],
                                   stdout=subprocess.PIPE, text=True,
                                   env=environment, preexec_fn=not_ignored)
        try:
            url = process.stdout.readline().split()[-1]
            images = some_images(3)
            assert torch.equal(rewards.load(url)(images, list("abc")),
                               rewards.load("jpeg")(images, list("abc")))
        finally:
            process.send_signal(2)
        assert process.wait(120) == 0


# ===== the judge


NAN = math.nan
REPLIES = [  # what judges say -> the score
    ("Score: 7", 7), ("Score: 7.5", 7.5), ("score: 8/10", 8), ("Score: 7.5/10 - good", 7.5),
    ("Score: 7/10 - good", 7),
    ("Rating: 8/10", 8), ('{"score": 8}', 8), ('```json\n{"score": 6.5}\n```', 6.5),
    ('{"Rating": "9"}', 9), ("**Score: 9**", 9),
    ("Score (0-10): 8", 8), ("The score is 7,5", 7.5), ("8", 8), ("8/10", 8), ("8 out of 10", 8),
    (".5", .5), ("I'd say 6.", 6),
    ("It shows 3 cats and 2 dogs.\nScore: 4", 4), ("<think>the score 2 at first</think> 8/10", 8),
    ("Score = 10", 10),
    ("<think>score: 2</think>Score: 9", 9), ("Score: 0", 0), ("score of 3", 3),
    ("Score: 5 and again: score: 5", 5),
    ("Score: 10/10", 10), ("My rating is 6/10.", 6),
    ("4.5/5", NAN), ("4 out of 5", NAN), ("8%", NAN), ("Score: 80%", NAN), ("Score: 11", NAN),
    ("Score: -3", NAN),
    ("Score: 7-8", NAN), ("Score: 7 or 8", NAN), ("Score: 6 to 8", NAN),
    ("score: 3 ... final score: 8", NAN), ("", NAN),
    ("no number", NAN), ("<think>it has a score of 7", NAN),
    ("There are 3 cats, 2 dogs and one bird in it", NAN),
    ("Score: 85/100", NAN), ('{"score": null}', NAN), ("1 2", NAN)]


def reply(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def vlm_at(url):
    reward = rewards.load(f"vlm@{url}/v1?model=some/judge")
    return reward, next(iter(reward.parts.values()))


def prefers_more_bytes(request):
    """A judge of two pictures; prompts with tie, mute or first get: tie, no answer, always A."""
    question, *parts = request["messages"][0]["content"]
    a, b = (len(part["image_url"]["url"]) for part in parts if part["type"] == "image_url")
    said = {"tie": "Answer: tie", "mute": "I cannot say.", "first": "**Answer: A**"}
    for word, text in said.items():
        if f" {word}" in question["text"].split("\n")[0]:
            return reply(text)
    return reply(f"A shows it.\nAnswer: {'A' if a > b else 'B'}")


class TestJudge:
    """At a scripted endpoint."""

    def test_asks(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "key")

        # the judge reads the number of a prompt off its text, and knows the picture's size
        def usual(request):
            picture, text = request["messages"][0]["content"]
            url = picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
            data = base64.b64decode(url, validate=True)
            width = Image.open(io.BytesIO(data), formats=["JPEG"]).width
            number = int(text["text"].split("number ")[1][0])
            return reply(f"I see 99 things. Score: {number + width / 100}")
        with scripted([], usual) as (bound, url):
            reward, part = vlm_at(url)
            images = [Image.new("RGB", (10 + i, 8)) for i in range(9)]
            got = reward(images, [f"number {i}" for i in range(9)])
        assert np.allclose(got, [i + (10 + i) / 100 for i in range(9)])
        assert part.silent == 0
        path, headers, request = bound.requests[0]
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer key"
        assert request["model"] == "some/judge"
        assert request["temperature"] == 0

    @pytest.mark.parametrize("text,value", REPLIES)
    def test_replies(self, text, value):
        assert judge.number_in(text) == pytest.approx(value, nan_ok=True)

    def test_without_an_opinion(self, capfd):
        """A filter, a refusal without an answer and reasoning alone are no opinion; the first is
        shown, all are counted."""
        script = [(400, {"error": {"code": "content_filter", "message": "filtered"}}),
                  (200, {"choices": [{"finish_reason": "content_filter",
                                      "message": {"content": ""}}]}),
                  (200, {"choices": [{"message": {"content": None,
                                                  "reasoning_content": "Score: 3"}}]}),
                  reply("Score: 4")]
        with scripted(script) as (_, url):
            reward, part = vlm_at(url)
            scores = [float(reward(some_images(1), ["a"])) for _ in range(4)]
        assert scores == pytest.approx([math.nan] * 3 + [4], nan_ok=True)
        assert part.silent == 3
        assert capfd.readouterr().err.count("no opinion") == 1

    def test_speaks_to_other_endpoints(self):
        """One that knows no schema, then one that knows neither max_tokens nor a temperature."""
        script = [(400, {"error": "response_format is not supported"}),
                  (400, {"error": "use max_completion_tokens, not max_tokens"})]
        with scripted(script, lambda request: reply("7")) as (bound, url):
            reward, _ = vlm_at(url)
            assert float(reward(some_images(1), ["a"])) == 7
            reward(some_images(1), ["a"])
        names = [set(request) - {"model", "messages"} for _, _, request in bound.requests]
        assert names == [{"temperature", "max_tokens", "response_format"},
                         {"temperature", "max_tokens"},
                         {"max_completion_tokens"}, {"max_completion_tokens"}]

    @pytest.mark.parametrize("given,asked", (("/v1", "/v1/chat/completions"),
                                             ("", "/v1/chat/completions"),
                                             ("/v1beta/openai", "/v1beta/openai/chat/completions"),
                                             ("/x/chat/completions", "/x/chat/completions")))
    def test_addresses(self, given, asked):
        with scripted([], lambda request: reply("7")) as (bound, url):
            rewards.load(f"vlm@{url}{given}?model=m")(some_images(1), ["a"])
        assert bound.requests[0][0] == asked

    def test_yes_or_no(self, tmp_path):
        """P(yes) / (P(yes) + P(no)) of the first token, with a question of one's own; an endpoint
        without logprobs."""
        def answer(tokens):
            top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
            return 200, {"choices": [{"message": {"content": "Yes"},
                                      "logprobs": {"content": [{"top_logprobs": top}]}}]}

        (tmp_path / "question.txt").write_text("Is {prompt} here?")
        script = [answer({"Yes": .5, " yes": .1, "No": .2, "Maybe": .2}), answer({"Hm": 1.0}),
                  reply("Yes")]
        with scripted(script) as (bound, url):
            question = tmp_path / "question.txt"
            reward = rewards.load(f"vlm@{url}/v1?model=m&yes=1&question={question}")
            assert float(reward(some_images(1), ["a cat"])) == pytest.approx(0.75)
            assert math.isnan(reward(some_images(1), ["a cat"]))
            with pytest.raises(UserError, match="top_logprobs"):
                reward(some_images(1), ["a cat"])
        assert bound.requests[0][2]["messages"][0]["content"][1]["text"] == "Is a cat here?"
        assert bound.requests[0][2]["logprobs"] is True

    def test_of_another_scale(self):
        with scripted([], lambda request: reply("Score: 4/5")) as (bound, url):
            reward = rewards.load(f"vlm@{url}/v1?model=m&scale=1-5")
            assert float(reward(some_images(1), ["a"])) == 4
        assert "from 1 to 5" in bound.requests[0][2]["messages"][0]["content"][1]["text"]

    def test_two_pictures_in_both_orders(self):
        plain = Image.new("RGB", (64, 64))
        rich = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        prompts = ["x", "y", "a tie", "a mute one", "the first one"]
        with scripted([], prefers_more_bytes) as (_, url):
            found = E.judge(f"{url}/v1?model=m", prompts, [plain, rich, plain, plain, plain],
                            [rich, plain, rich, rich, rich])
        assert found.pop("win_rate")[0] == 0.5
        assert found == dict(wins=1, ties=2, losses=1, no_answer=1, order_decided=1)

    def test_eval_with_a_judge(self, toy_runs, tmp_path, capsys):
        """Two equal pictures: the same answer twice is a tie; the report has a row of it."""
        with scripted([], prefers_more_bytes) as (_, url):
            code, out, _ = eval_main(capsys, *toy_runs, "--limit", 4, "--samples", 1, "--judge",
                                     f"{url}/v1?model=m", "--out", tmp_path)
        assert code == 0
        assert "judge, moved: win rate against base" in out
        assert "| judge: win rate against base |" in (tmp_path / "report.md").read_text()
        columns = json.loads((tmp_path / "report.json").read_text())["columns"]
        assert columns["untrained"]["judge"]["win_rate"] == [0.5, 0.5, 0.5]
        said = columns["moved"]["judge"]
        assert said["wins"] + said["ties"] + said["losses"] == 4


# ===== GenEval


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
GENEVAL_VERDICTS = int(
    "2008040140A800A4280010000201912C800000804464480000"
    "10080000000000003800040801020000040200008000200000", 16,
)


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


class TestGenEval:
    """Its rules, its detector, its thresholds."""

    def test_verdicts_of_the_original(self):
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
    def test_rules(self, wanted, objects, correct, dense):
        # here a box is its own colour
        got = geneval.judge(wanted, objects, lambda found, name: [f.box for f in found])
        assert got == (correct, pytest.approx(dense))

    def test_every_pair_must_be_placed(self):
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

    def test_thresholds(self):
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
    def test_position(self, a, b, relations):
        assert geneval.relative_position(a, b) == relations

    def test_detections(self):
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

    def test_whole(self, tmp_path):
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

    def test_detector(self, tmp_path, monkeypatch):
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


# ===== features of one's own


VIT = HERE / "vit.py"  # features of one's own, as a reader would write them


def pil_224(images):
    """(B, 3, 32, 32) in [0, 1] -> ImageNet-normalised (B, 3, 224, 224), by PIL's bicubic, channel
    by channel."""
    out = [[np.asarray(Image.fromarray(c.numpy(), mode="F").resize((224, 224), Image.BICUBIC))
            for c in image]
           for image in images]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406),
                                                          (0.229, 0.224, 0.225)))
    return (torch.from_numpy(np.array(out)) - mean) / std


def vit_maps(layers, h):
    """The maps of embeddings h after twelve of the layers, in float64."""
    for layer in layers[:12]:
        h = layer(h)
        h = h[0] if isinstance(h, tuple) else h
    h = h.double().numpy()
    return [h[:, 1:].mean(1), np.sqrt(h[:, 1:].var(1) + 1e-6), h[:, 0]]


class TestVit:
    """Against forwards written out here."""

    def test_mae_features_are_unmasked(self, models, tmp_path):
        """All patches, in their order, none masked: a forward written out here, from the patches to
        hidden_states[12]."""
        import transformers
        torch.manual_seed(0)
        net = transformers.ViTMAEModel(
            transformers.ViTMAEConfig(hidden_size=16, num_hidden_layers=14, num_attention_heads=2,
                                      intermediate_size=32, patch_size=32, image_size=224)).eval()
        net.save_pretrained(tmp_path)
        G, x = open_model(models / "sd"), 2 * some_noise(2)
        phi = drpo.load_features(f"{VIT}:mae@{tmp_path}", G)
        with torch.no_grad():
            pixels = pil_224(G.decode(x))
            emb = net.embeddings
            h = torch.nn.functional.conv2d(pixels, emb.patch_embeddings.projection.weight,
                                           emb.patch_embeddings.projection.bias, stride=32)
            h = h.flatten(2).mT + emb.position_embeddings[:, 1:]
            h = torch.cat([(emb.cls_token + emb.position_embeddings[:, :1]).expand(2, -1, -1), h],
                          1)
            layers = net.encoder.layer if hasattr(net, "encoder") else net.layers
            got = phi(x, None)
            compare_maps(got, vit_maps(layers, h), 1e-3)
            torch.manual_seed(99)  # another order of the patches
            for a, b in zip(got, phi(x, None)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_dino_features(self, models, tmp_path):
        import transformers
        torch.manual_seed(0)
        net = transformers.Dinov2Model(
            transformers.Dinov2Config(hidden_size=16, num_hidden_layers=13, num_attention_heads=2,
                                      mlp_ratio=2, patch_size=32, image_size=224)).eval()
        net.save_pretrained(tmp_path)
        G, x = open_model(models / "sd"), 2 * some_noise(2)
        with torch.no_grad():
            h = net.embeddings(pil_224(G.decode(x)))
            phi = drpo.load_features(f"{VIT}:dino@{tmp_path}", G)
            compare_maps(phi(x, None), vit_maps(net.encoder.layer, h), 1e-3)
