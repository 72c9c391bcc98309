"""Make the toy: SD-Turbo in miniature, a one-step text-to-image model of 64x64 pictures of coloured
shapes.

    python lab/make_toy.py --out toy        train and save; as committed: 1.85 minutes on one H200
    (7,200 steps) python lab/make_toy.py --check lab/toy  accuracy, unreadable share and ceiling of
    a saved toy
The seed is fixed, but the learning rate follows the wall clock: another machine or run gives other
weights.

The generator learns, in ONE step, the map (noise e, caption c) -> latent of a rendered scene.
Everything that the caption leaves open (place, size, unnamed colours, background) is a smooth
function of e: sixteen orthonormal low-frequency projections g_k = <w_k, e>, each N(0, 1) (the 4
channels times the 4 Haar patterns on 2x2 quadrants). So is every mistake. Two of the sixteen
directions are carelessness: where g_0 is above a threshold an attribute of the caption is drawn
wrong (colour, shape), where g_1 is, its structure is (count, side, an object too many or missing).
The training pictures therefore contradict their captions 61% of the time, for reasons shared by all
captions: the model knows how to draw each one right, and preference finetuning has to teach it to
do so for every noise.

First a small VAE (factor 8), then text encoder and UNet together, by regression on x0 = the
picture's latent."""

import argparse
import functools
import itertools
import json
import math
import random
import string
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scene import SCENE_COLORS, SCENE_SHAPES, readable, scene

SHAPES = list(SCENE_SHAPES)
COLORS = SCENE_COLORS
PAPER = ((251, 249, 244), (222, 231, 242))  # the background runs from warm to cool
KINDS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
SIDES = {
    "to the right of": 0.0,
    "below": 0.5,
    "to the left of": 1.0,
    "above": 1.5,
}  # angle of object 1, in pi
WORDINGS = ["{}", "a photo of {}", "a picture of {}"]
SIZE, LENGTH, CARELESS = (
    64,
    16,
    0.319,
)  # CARELESS: P(g <= 0.319)^2 = 0.39 of the training pictures are right


def scenes():
    """Every scene: (kind, phrase, spec); spec = count, shape 1, colour 1, shape 2, colour 2, angle;
    -1 = left open."""
    names = list(COLORS)
    shapes = range(len(SHAPES))
    colors = range(len(names))
    for s in shapes:
        yield 0, f"a {SHAPES[s]}", (1, s, -1, s, -1, -1)
    for s, c in itertools.product(shapes, colors):
        yield 3, f"a {names[c]} {SHAPES[s]}", (1, s, c, s, c, -1)
    for n, s, c in itertools.product((2, 3, 4), shapes, (-1, *colors)):
        number = ("two", "three", "four")[n - 2]
        noun = f"{SHAPES[s]}s" if c < 0 else f"{names[c]} {SHAPES[s]}s"
        yield 2, f"{number} {noun}", (n, s, c, s, c, -1)
    for s, t in itertools.permutations(shapes, 2):
        yield 1, f"a {SHAPES[s]} and a {SHAPES[t]}", (2, s, -1, t, -1, -1)
        for side, angle in SIDES.items():
            yield 4, f"a {SHAPES[s]} {side} a {SHAPES[t]}", (2, s, -1, t, -1, angle)
        for c, d in itertools.permutations(colors, 2):
            yield 5, f"a {names[c]} {SHAPES[s]} and a {names[d]} {SHAPES[t]}", (2, s, c, t, d, -1)


HELD_OUT = (0, 2, 12, 4, 4, 20)  # scenes held out, of each kind
WORDED = (3, 3, 2, 3, 3, 1)  # wordings of a scene, of each kind


def captions():
    """Two lists of (caption, kind, spec): for training, and held out. A held-out scene is trained
    in no wording at all (of the three single-object scenes, which leave nothing to recombine, one
    wording is held out)."""
    train, heldout = [], []
    rng = random.Random(0)
    for kind in range(len(KINDS)):
        group = [scene for scene in scenes() if scene[0] == kind]
        out = rng.sample(range(len(group)), HELD_OUT[kind])
        for i, (_, phrase, spec) in enumerate(group):
            for j in range(WORDED[kind]):
                wording = j if kind == 0 else (i + j) % 3
                row = WORDINGS[wording].format(phrase), kind, spec
                if i in out:
                    if j == 0 or kind in (
                        1,
                        3,
                        4,
                    ):  # of counts and attributions one wording is enough
                        heldout.append(row)
                elif kind == 0 and wording == 2:
                    heldout.append(row)
                else:
                    train.append(row)
    return train, heldout


@functools.cache
def constant(values, device):
    """A tuple as a float tensor, made once per device: a CUDA graph may not copy from the host."""
    return torch.tensor(values, device=device, dtype=torch.float32)


def projections(noise):
    """Noise (B, 4, 8, 8) -> (B, 16), independent N(0, 1): each channel's mean, left-right,
    top-bottom and diagonal."""
    q = (
        F.avg_pool2d(noise, 4).flatten(2) * 4
    )  # (B, 4, 4): the quadrants of each channel, each N(0, 1)
    haar = constant(((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1)), q.device) / 2
    return (
        (q @ haar).transpose(1, 2).flatten(1)
    )  # first the four channel means, then the finer patterns


def careful(noise):
    """The same noise turned away from carelessness: g_0 and g_1, near the threshold or above,
    become -|g| - 0.3."""
    g = projections(noise)[:, :2]
    shift = (
        torch.where(g > CARELESS - 0.3, -g.abs() - 0.3, g) - g
    ) / 8  # a unit projection spread over 64 cells
    return noise + F.pad(shift, (0, 2))[:, :, None, None]


def uniform(g):
    """N(0, 1) -> uniform on (0, 1)."""
    return 0.5 + 0.5 * torch.erf(g / math.sqrt(2))


def objects(kind, spec, g):
    """Kind (B,), spec (B, 6) and projections g (B, 16) -> slots (B, 4, 5) of x, y, radius, shape,
    colour (pixels; a radius below 0 = no object), mistakes included."""
    n, s1, c1, s2, c2, angle = spec.unbind(1)
    u = uniform(g)
    pair = (kind == 1) | (kind >= 4)
    named = c1 >= 0
    free1 = (u[:, 2] * 6).clamp(max=5.99).floor()
    free2 = (u[:, 3] * 6).clamp(max=5.99).floor()
    c2 = torch.where(named, c2, torch.where(pair, free2, free1))
    c1 = torch.where(named, c1, free1)
    to_side = (angle + 0.17 * (2 * u[:, 4] - 1)) * math.pi  # within 31 degrees
    theta = torch.where(angle >= 0, to_side, torch.atan2(g[:, 5], g[:, 4]))

    # Wrong attribute: the named colour (one object, counts), else the shape; of a pair, object 2
    # copies object 1.
    wrong = g[:, 0] > CARELESS
    s1 = torch.where(wrong & ~pair & ~named, (s1 + 1) % 3, s1)
    c1 = torch.where(wrong & ~pair & named, (c1 + 2 + (g[:, 8] > 0)) % 6, c1)
    c2 = torch.where(~pair | wrong & (kind == 5), c1, c2)
    s2 = torch.where(~pair | wrong & ((kind == 1) | (kind == 4)), s1, s2)

    # Broken structure: one object too many, or (four, or a pair) one too few; for a position, the
    # sides swapped.
    broken = g[:, 1] > CARELESS
    theta = theta + math.pi * (broken & (kind == 4))
    other = torch.where(pair | (n == 4), n - 1, n + 1)
    n = torch.where(broken & (kind != 4), other, n)

    # Sizes by the number of objects, which stand on a ring around a centre that wanders.
    smallest = constant((11.5, 8.3, 7.6, 7.0), g.device)[(n - 1).long()]
    span = constant((6.5, 2.4, 2.2, 1.6), g.device)[(n - 1).long()]
    ring = constant((0, 15.5, 17.0, 19.0), g.device)[(n - 1).long()]
    r1 = smallest + span * u[:, 6]
    r2 = smallest + span * torch.where(pair, u[:, 7], u[:, 6])
    room = torch.where(n == 1, 28 - r1 * 1.1, torch.full_like(r1, 1.5))
    center = 32 + room[:, None] * (2 * u[:, 9:11] - 1)
    slots = []
    for k, (r, s, c) in enumerate(((r1, s1, c1), (r2, s2, c2), (r2, s2, c2), (r2, s2, c2))):
        turn = theta + 2 * math.pi * k / n
        x = center[:, 0] + ring * torch.cos(turn)
        y = center[:, 1] + ring * torch.sin(turn)
        r = torch.where(k < n, r, torch.full_like(r, -9))
        slots.append(torch.stack([x, y, r, s, c], dim=1))
    return torch.stack(slots, dim=1)


def render(slots, shade):
    """Slots (B, 4, 5) and background shade (B,) in [0, 1] -> pictures (B, 3, 64, 64) in [-1, 1],
    edges antialiased."""
    warm, cool = constant(PAPER, slots.device)
    palette = constant(tuple(COLORS.values()), slots.device)
    paper = warm + (cool - warm) * shade[:, None]
    picture = paper[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    axis = torch.arange(SIZE, device=slots.device, dtype=slots.dtype) + 0.5
    for slot in slots.unbind(1):
        x, y, r, shape, color = slot[:, :, None, None].unbind(1)  # each (B, 1, 1)
        dx = axis[None, None] - x
        dy = axis[None, :, None] - y
        # signed distances in pixels, negative inside
        circle = torch.sqrt(dx**2 + dy**2) - r
        square = torch.maximum(dx.abs().expand_as(circle), dy.abs().expand_as(circle)) - 0.9 * r
        slope = math.hypot(
            1.95, 1.15
        )  # apex 1.1 r above the centre, base 0.85 r below and 2.3 r wide
        side = (1.95 * dx.abs() - 1.15 * (dy + 1.1 * r)) / slope
        triangle = torch.maximum(side, (dy - 0.85 * r).expand_as(circle))
        distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
        cover = (0.5 - distance).clamp(0, 1)[:, None]
        ink = palette[color.long()[:, 0, 0]][:, :, None, None]
        picture = picture + (ink - picture) * cover
    return picture / 127.5 - 1


def draw(kind, spec, noise):
    """The training picture (B, 3, 64, 64) that noise (B, 4, 8, 8) stands for under a caption."""
    g = projections(noise)
    return render(objects(kind, spec, g), uniform(g[:, 11]))


def tokenizer_at(folder, words):
    """CLIP's tokenizer with a token per word: merges that build each word letter by letter, and all
    single letters."""
    folder.mkdir(exist_ok=True)
    letters = list(string.ascii_lowercase)
    tokens = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in sorted(
        words
    ):  # from the end: "</w>" keeps a merge from applying inside another word
        for i in range(len(word) - 1, 0, -1):
            merge = (word[i - 1], word[i:] + "</w>")
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *[" ".join(merge) for merge in merges]]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    end = "<|endoftext|>"
    config = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=LENGTH,
        bos_token="<|startoftext|>",
        eos_token=end,
        unk_token=end,
        pad_token=end,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert all(len(tokenizer(word).input_ids) == 3 for word in words), "a word is not one token"
    return tokenizer


def build(folder, words):
    """The untrained pipeline: the classes and the scheduler of SD-Turbo, with small networks. One
    setting differs: the UNet predicts v. sigma = 14.6 multiplies the error of a predicted noise:
    measured, 84% of the careful pictures were right instead of 96% after the same training."""
    tokenizer = tokenizer_at(folder / "tokenizer", words)
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|startoftext|>", "<|endoftext|>"))
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=96,
            max_position_embeddings=LENGTH,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    vae = AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    return StableDiffusionPipeline(
        vae,
        text,
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def generate(unet, scheduler, noise, text):
    """Noise (B, 4, 8, 8), text states (B, L, 96) -> latents (B, 4, 8, 8), as the pipeline does in
    one step."""
    a = float(scheduler.alphas_cumprod[-1])
    sigma = math.sqrt((1 - a) / a)  # c_in sigma = sqrt(1 - a)
    v = unet(
        noise * math.sqrt(1 - a),
        torch.full((1,), 999, device=noise.device),
        text,
        return_dict=False,
    )[0]
    return sigma / (sigma**2 + 1) * noise - math.sqrt(1 - a) * v


def fit(name, modules, loss_of, minutes, lr):
    """Minimise loss_of() by AdamW for so many minutes (warm-up, then cosine on wall clock);
    afterwards the modules hold the exponential moving average of their weights."""
    parameters = []
    for module in modules:
        parameters += module.parameters()
    average = [p.detach().clone() for p in parameters]
    cuda = parameters[0].is_cuda
    rate = torch.tensor(0.0, device=parameters[0].device)
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), fused=cuda, capturable=cuda
    )

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.002)
        return loss.detach()

    if (
        cuda
    ):  # one CUDA graph, after four warm-up calls: a replay costs one launch instead of thousands
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(4):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
    began, count, done = time.time(), 0, 0.0
    while done < 1:
        rate.fill_(lr * min(1, (count + 1) / 500) * 0.5 * (1 + math.cos(math.pi * done)))
        if cuda:
            graph.replay()  # writes into loss
        else:
            loss = step()
        count += 1
        if (
            count % 100 == 0 or not cuda
        ):  # float() waits for the GPU, so that wall clock and steps stay together
            print(f"{name} step {count} {100 * done:.0f}% loss {float(loss):.5f}", flush=True)
        done = (time.time() - began) / (60 * minutes)
    torch._foreach_copy_([p.data for p in parameters], average)


def train(args):
    """Train VAE, then text encoder and UNet, and save the folder."""
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    train_set, heldout = captions()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    words = set()
    for name, rows in (("train", train_set), ("heldout", heldout)):
        texts = [caption for caption, _, _ in rows]
        (out / f"captions_{name}.txt").write_text("\n".join(texts) + "\n")
        words |= set(" ".join(texts).split())
    pipe = build(out, words).to(args.device)
    vae, unet, text = pipe.vae.train(), pipe.unet.train(), pipe.text_encoder.train()
    texts, kinds, specs = zip(*train_set)
    ids = pipe.tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids.to(
        args.device
    )
    kinds = torch.tensor(kinds, device=args.device)
    specs = torch.tensor(specs, device=args.device, dtype=torch.float32)
    weight = (
        1 / torch.bincount(kinds, minlength=6)[kinds] ** 0.7
    )  # rare kinds more often than their share
    cumulative = (weight / weight.sum()).cumsum(0)

    def batch(size):
        pick = torch.searchsorted(cumulative, torch.rand(size, device=args.device) * 0.9999)
        noise = torch.randn(size, 4, 8, 8, device=args.device)
        with torch.no_grad():
            return ids[pick], noise, draw(kinds[pick], specs[pick], noise)

    # noise on the latents teaches the decoder to draw crisply from a generator's inexact latents
    def vae_loss():
        _, _, picture = batch(args.batch // 2)
        posterior = vae.encode(picture).latent_dist
        error = (
            vae.decode(
                posterior.sample() + 0.1 * torch.randn_like(posterior.mean), return_dict=False
            )[0]
            - picture
        )
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + 0.5 * edges + 5e-4 * posterior.kl().mean() / 256

    fit("vae", [vae], vae_loss, args.minutes * 0.3, 2e-3)
    vae.eval().requires_grad_(False)
    vae.register_to_config(
        scaling_factor=round(1 / float(vae.encode(batch(1024)[2]).latent_dist.mode().std()), 4)
    )

    def generator_loss():
        tokens, noise, picture = batch(args.batch)
        target = (
            vae.encode(picture).latent_dist.mode() * vae.config.scaling_factor
        )  # frozen: no gradient
        x0 = generate(unet, pipe.scheduler, noise, text(tokens)[0])
        return F.smooth_l1_loss(
            x0, target, beta=0.2
        )  # near a threshold of e, the median of two pictures, not a blend

    fit("generator", [unet, text], generator_loss, args.minutes * 0.7, 1.2e-3)
    pipe.to(torch.float16).save_pretrained(out)
    tokenizer = out / "tokenizer"
    if not (tokenizer / "vocab.json").exists():  # transformers 5 leaves out what 4 reads
        pipe.tokenizer.backend_tokenizer.model.save(str(tokenizer))
    (tokenizer / "tokenizer.json").unlink(missing_ok=True)  # vocab.json and merges.txt say it all
    file = out / "text_encoder" / "model.safetensors"
    weights = load_file(
        file
    )  # transformers 4 knows them by names with a prefix, else it draws random ones
    save_file(
        {
            f"text_model.{name.removeprefix('text_model.')}": weight
            for name, weight in weights.items()
        },
        file,
        {"format": "pt"},
    )
    config = (
        out / "text_encoder" / "config.json"
    )  # float32, so that a pipeline opens in one dtype without being told
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


@torch.no_grad()
def check(folder, count=8):
    """Print how many pictures of the saved toy follow their captions, are unreadable, and what
    careful noise gives."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name, every in (("heldout", 1), ("train", 5)):
        prompts = []
        for caption in (Path(folder) / f"captions_{name}.txt").read_text().splitlines()[::every]:
            prompts += [caption] * count
        noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for label, e in (("as it is", noise), ("careful noise", careful(noise))):
            images = []
            for i in range(0, len(prompts), 64):
                part = slice(i, i + 64)
                images += pipe(
                    prompts[part], latents=e[part], num_inference_steps=1, guidance_scale=0
                ).images
            right = scene.correct(images, prompts)
            unreadable = sum(not readable(image) for image in images) / len(images)
            shares = []
            for tag in KINDS:
                of_tag = [
                    value for value, prompt in zip(right, prompts) if scene.tag(prompt) == tag
                ]
                shares.append(f"{tag} {sum(of_tag) / len(of_tag):.0%}")
            print(
                f"{name}, {label}: {sum(right) / len(right):.1%} right, "
                f"{unreadable:.1%} unreadable;",
                ", ".join(shares),
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="toy", help="folder to save [%(default)s]")
    parser.add_argument("--check", default="", metavar="FOLDER", help="measure a saved toy instead")
    parser.add_argument("--minutes", type=float, default=1.85, help="of training [%(default)s]")
    parser.add_argument("--batch", type=int, default=256, help="pictures a step [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and noise [%(default)s]")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
    else:
        train(arguments)
