"""Speed, memory and numbers at true size, with random weights: nothing is downloaded.

    python lab/bench.py update sd-turbo@48 sd-turbo+compile@48 sdxl-turbo@16    seconds, peak GiB
    python lab/bench.py update sd-turbo@4 sd-turbo@auto/12    micro-batch 4; auto, 12 GiB free
    python lab/bench.py growth 8x24 8x64 1x8                  prompts x candidates, SD-Turbo at 48
    python lab/bench.py numbers                   bf16, compiled, chunks, against float32
    python lab/bench.py cost                      a reward of 7 billion parameters
    python lab/bench.py judge                     ties of a judge, asked for a number or yes or no
    python lab/bench.py make sd-turbo FOLDER      a diffusers folder of random weights

Every update is one of `drpo.train` itself, read off its metrics.jsonl; the first is left out. A
model is written once to --folder, then loaded from there as any diffusers folder is. Each row is
printed as it comes, and what fails says so in its row."""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import statistics
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent))
import curve  # noqa: E402
import drpo  # noqa: E402
import rewards  # noqa: E402

# ===== random weights of the public architectures

UNET = dict(sample_size=64, use_linear_projection=True, layers_per_block=2)
SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    timestep_spacing="trailing",
    steps_offset=1,
)
ARCHITECTURES = {
    "sd-turbo": dict(
        unet=dict(
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
        ),
        text=[
            dict(
                hidden_size=1024,
                num_hidden_layers=23,
                num_attention_heads=16,
                intermediate_size=4096,
                hidden_act="gelu",
            )
        ],
        scaling_factor=0.18215,
    ),
    "sdxl-turbo": dict(
        unet=dict(
            block_out_channels=(320, 640, 1280),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        text=[
            dict(
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                intermediate_size=3072,
                projection_dim=768,
            ),
            dict(
                hidden_size=1280,
                num_hidden_layers=32,
                num_attention_heads=20,
                intermediate_size=5120,
                hidden_act="gelu",
                projection_dim=1280,
            ),
        ],
        scaling_factor=0.13025,
    ),
}
VIT_H = dict(
    projection_dim=1024,  # CLIP ViT-H-14, PickScore's
    text_config=dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
        projection_dim=1024,
    ),
    vision_config=dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        hidden_act="gelu",
        projection_dim=1024,
        patch_size=14,
    ),
)


@contextlib.contextmanager
def made_as(dtype, device):
    """Context in which networks are made in a dtype on a device: no copy of gigabytes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_pipeline(name, device, dtype):
    """A pipeline of the named architecture with random weights."""
    import diffusers
    import transformers

    arch = ARCHITECTURES[name]
    classes = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    tokenizer = character_tokenizer(transformers)
    torch.manual_seed(0)
    with made_as(dtype, device):
        texts = []
        for cls, config in zip(classes, arch["text"]):
            texts.append(
                cls(
                    transformers.CLIPTextConfig(
                        bos_token_id=0, eos_token_id=1, pad_token_id=1, **config
                    )
                )
            )
        parts = dict(
            unet=diffusers.UNet2DConditionModel(**UNET, **arch["unet"]),
            text_encoder=texts[0],
            vae=diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                sample_size=512,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                scaling_factor=arch["scaling_factor"],
            ),
        )
    if name == "sd-turbo":
        return diffusers.StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer,
            scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return diffusers.StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        text_encoder_2=texts[1],
        tokenizer_2=tokenizer,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**SCHEDULER),
        add_watermarker=False,
    )


def character_tokenizer(transformers):
    """A CLIP tokenizer whose words are characters: all that random weights need."""
    import tempfile

    symbols = [chr(c) for c in range(33, 127)]
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *symbols,
        *[symbol + "</w>" for symbol in symbols],
    ]
    folder = Path(tempfile.mkdtemp())
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def make(name, folder, device):
    """Write a diffusers folder of random weights, whose UNet answers with an RMS of 1 as a trained
    one."""
    if (folder / "model_index.json").exists():
        return folder
    pipe = random_pipeline(name, device, torch.bfloat16)
    with torch.no_grad():
        G = drpo.Generator(pipe, device=device, dtype=torch.bfloat16)
        e = torch.randn(4, *G.noise_shape, device=device)
        condition = drpo.rows(G.encode(["a red cube"]), torch.zeros(4, dtype=int, device=device))
        rms = G.predict(e, G.t, condition).square().mean().sqrt()
        G.unet.conv_out.weight.div_(rms)
        G.unet.conv_out.bias.div_(rms)
    pipe.to("cpu", torch.bfloat16).save_pretrained(folder)
    return folder


def make_mae(file, device):
    """Write random weights of the latent-MAE under the names of the authors' file."""
    if file.exists():
        return file
    torch.manual_seed(0)
    w = {}

    def conv(name, side, c_in, c):
        size = side * side * c_in
        w[f"encoder.{name}.kernel"] = (
            (torch.randn(side, side, c_in, c, device=device) * (2 / size) ** 0.5).half().cpu()
        )

    def norm(name, c):
        w[f"encoder.{name}.scale"], w[f"encoder.{name}.bias"] = (
            torch.ones(c).half(),
            torch.zeros(c).half(),
        )

    c_in = 256
    conv("conv1", 3, 4, c_in), norm("gn1", c_in)
    for stage, (c, blocks) in enumerate(zip((256, 512, 1024, 2048), (3, 4, 6, 3))):
        for block in range(blocks):
            name = f"stages_{stage}.layers_{block}"
            conv(f"{name}.conv1", 3, c_in, c), norm(f"{name}.gn1", c)
            conv(f"{name}.conv2", 3, c, c), norm(f"{name}.gn2", c)
            if block == 0 and stage > 0:
                conv(f"{name}.proj_conv", 1, c_in, c), norm(f"{name}.proj_gn", c)
            c_in = c
        norm(f"layer{stage + 1}_norm", c)
    torch.save(w, file)
    return file


def random_pickscore(device):
    """PickScore's network with random weights and a hash for a tokenizer: the true cost."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(**VIT_H)
    begin, end = config.text_config.bos_token_id, config.text_config.eos_token_id

    def tokenize(texts):
        rows = [
            [begin, *[zlib.crc32(word.encode()) % begin for word in text.split()[:75]]]
            for text in texts
        ]
        return {"input_ids": torch.tensor([row + [end] * (77 - len(row)) for row in rows])}

    torch.manual_seed(0)
    with made_as(rewards.half_on(device), device):
        model = rewards.Clip(CLIPModel(config).eval().requires_grad_(False), tokenize, device)
    return rewards.takes_tensors(
        lambda images, prompts: model.scale * model.cosine(images, prompts), 256
    )


# ===== updates


def config(args, name, **changes):
    """The preset of a model on random weights."""
    features = drpo.PRESETS[name]["features"]
    if features == "latent-mae":
        features = f"latent-mae@{make_mae(args.folder / 'mae.pth', args.device)}"
    return drpo.Config.preset(
        name,
        **{
            "model": str(make(name, args.folder / name, args.device)),
            "prompts": "animals",
            "features": features,
            "device": args.device,
            "preview_every": 0,
            "save_every": 10**9,
            "log_every": 10**9,
            **changes,
        },
    )


def measured(args, cfg, reward):
    """Medians of the figures of cfg.steps updates but the first, and the peak memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    out = args.folder / f"run-{time.time():.0f}"
    with contextlib.redirect_stdout(sys.stderr):
        drpo.train(dataclasses.replace(cfg, out=str(out)), reward=reward)
    metrics = curve.read_metrics(out)
    seconds = [m["seconds"] for m in metrics[1:]]
    row = {"s": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {
        **row,
        "GiB": torch.cuda.max_memory_allocated() / 2**30,
        "micro": metrics[-1]["micro_batch"],
        "first": metrics[0]["seconds"],
        "all": time.perf_counter() - began,
    }


def cell(label, work):
    """One row: label and the figures that work() returns, or why there are none."""
    try:
        row = work()
    except torch.OutOfMemoryError:
        row = {"error": "out of memory"}
    except Exception as error:
        row = {"error": rewards.one_line(error)}
    gc.collect()
    torch.cuda.empty_cache()
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    ]
    print(f"{label}:", ", ".join(shown), flush=True)
    return row


def update(args):
    """MODEL[+compile]@MICRO[/GIB] of an update of the preset; with /GIB as on a card with so much
    memory free: a tensor holds the rest."""
    for item in args.items:
        name, _, limits = item.partition("@")
        micro, _, gib = limits.partition("/")
        model, _, option = name.partition("+")

        def work():
            torch.compiler.reset()
            config(args, model)  # writes the weights, which takes memory of its own
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            spare = max(0, free - int(float(gib) * 2**30)) if gib else 0
            held = torch.empty(spare, dtype=torch.uint8, device="cuda")
            small = micro not in ("", "auto") and int(micro) < 8
            cfg = config(
                args,
                model,
                micro_batch=0 if micro in ("", "auto") else int(micro),
                compile=option == "compile",
                steps=3 if small else args.updates + 1,
            )
            row = measured(args, cfg, random_pickscore(args.device))
            row["GiB"] -= len(held) / 2**30
            return row

        cell(item, work)


def growth(args):
    """PxK updates of SD-Turbo, 48 pictures at once."""
    for item in args.items:
        P, K = (int(number) for number in item.split("x"))
        cfg = config(
            args,
            "sd-turbo",
            batch=P,
            candidates=K,
            anchors=min(8, K // 2),
            micro_batch=48,
            steps=args.updates + 1,
        )
        cell(item, lambda: measured(args, cfg, random_pickscore(args.device)))


# ===== numbers that stay right


class FixedScores:
    """Stands for a reward: each candidate of a prompt has a score of its own, whatever the
    picture."""

    parts = {"fixed": None}

    def score(self, images, prompts, watch=False):
        return {"fixed": torch.zeros(len(images), dtype=torch.float64)}

    def combine(self, scores):
        P, K = scores["fixed"].shape
        return torch.rand(K, generator=torch.Generator().manual_seed(0)).expand(P, K)


def gradients(G, features, micro):
    """Latents, the network's own LoRA gradient for one direction, and an update's for both
    fields."""
    prompts, K = ["a red cube", "a cat"], 8
    torch.manual_seed(1)
    parameters = G.add_lora(16, 16.0)
    for layer in G.lora.values():
        torch.nn.init.normal_(layer.up, std=0.02)  # else `down` has no gradient
    phi = drpo.load_features(features, G)
    noise = torch.stack([drpo.prompt_noise(0, i, (K, *G.noise_shape)) for i in range(2)]).to(
        G.device
    )
    batch = drpo.Batch(prompts, G.encode(prompts), noise)
    found = {}
    x = G.sample(
        noise.flatten(0, 1), drpo.rows(batch.condition, torch.arange(16, device=G.device) // K)
    )
    (x * noise.flatten(0, 1).flip(0)).mean().backward()
    found["latents"], found["network"] = x.detach(), flat_gradient(parameters)
    for field in ("dipole", "released"):
        radii = drpo.Config.radii if field == "dipole" else drpo.AUTHORS["radii"]
        cfg = drpo.Config(field=field, anchors=4, radii=radii)
        drpo.drpo_gradient(G, phi, FixedScores(), batch, cfg, micro)
        found[field] = flat_gradient(parameters)
    return found


def flat_gradient(parameters):
    """All gradients in one vector; they are cleared."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return flat


def numbers(args):
    """bf16, compiled and chunked against float32 on SD-Turbo: RMS of the latents' difference,
    cosines."""
    torch.backends.cudnn.allow_tf32 = False
    folder, mae = make("sd-turbo", args.folder / "sd-turbo", args.device), make_mae(
        args.folder / "mae.pth", args.device
    )
    exact = None
    for label, dtype, micro, compiled in (
        ("float32", torch.float32, 16, False),
        ("float32, chunks of 3", torch.float32, 3, False),
        ("bf16", torch.bfloat16, 16, False),
        ("bf16 compiled", torch.bfloat16, 16, True),
    ):

        def work():
            nonlocal exact
            G = drpo.load_generator(folder, device=args.device, dtype=dtype)
            if compiled:
                drpo.compile_networks(G)
            found = gradients(G, f"latent-mae@{mae}", micro)
            exact = exact or found
            row = {
                "latents": float(exact["latents"].square().mean().sqrt()),
                "difference": float((found["latents"] - exact["latents"]).square().mean().sqrt()),
            }
            for name in ("network", "dipole", "released"):
                row[name] = float(
                    F.cosine_similarity(found[name].double(), exact[name].double(), dim=0)
                )
            return row

        cell(label, work)


# ===== the cost of a large reward: ranking by it against differentiating it


class VisionLanguageReward:
    """Qwen2-VL-7B's shape with random weights: 256 image tokens, 32 of text; a fixed projection."""

    def __init__(self, device):
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        text = dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        )
        vision = dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, patch_size=14)
        with made_as(torch.bfloat16, device):
            net = Qwen2VLForConditionalGeneration(
                Qwen2VLConfig(text_config=text, vision_config=vision)
            )
            self.direction = torch.randn(3584)
        self.net, self.batch_size = net.eval().requires_grad_(False).model, 16

    def __call__(self, images, prompts):
        raise NotImplementedError("tensors only")

    def score_tensor(self, images, prompts):
        """(B, 3, H, W) in [0, 1] -> (B,), differentiable: cut into patches in the order of Qwen's
        processor."""
        B, device = len(images), images.device
        x = F.interpolate(images.float(), (448, 448), mode="bicubic", antialias=True) * 4 - 2
        x = x.reshape(B, 3, 16, 2, 14, 16, 2, 14).permute(
            0, 2, 5, 3, 6, 1, 4, 7
        )  # B, blocks, 2x2 patches, 3, 14, 14
        x = (
            x.unsqueeze(6)
            .expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
            .reshape(B * 1024, 3 * 2 * 14 * 14)
            .bfloat16()
        )
        ids = [151652, *[151655] * 256, 151653, *range(1000, 1032)]
        at = torch.arange(256, device=device)
        image = torch.stack([at * 0, at // 16, at % 16]) + 1  # rotary positions: time, row, column
        after = torch.arange(17, 17 + 33, device=device).expand(3, -1)
        positions = torch.cat([image[:, :1] * 0, image, after], 1)[:, None].expand(-1, B, -1)
        h = self.net(
            input_ids=torch.tensor([ids] * B, device=device),
            pixel_values=x,
            use_cache=False,
            image_grid_thw=torch.tensor([[1, 32, 32]] * B, device=device),
            position_ids=positions,
        )
        return h.last_hidden_state[:, -1].float() @ self.direction.float()


def cost(args):
    """Updates of 8 x 24 pictures with a 7B reward: DrPO, which ranks by it, against its
    gradient."""
    reward = VisionLanguageReward(args.device)
    cell("DrPO", lambda: measured(args, config(args, "sd-turbo", micro_batch=24, steps=4), reward))
    G = drpo.load_generator(
        make("sd-turbo", args.folder / "sd-turbo", args.device),
        device=args.device,
        dtype=torch.bfloat16,
    )
    parameters = G.add_lora(16, 16.0)
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    for chunk in (8, 4, 2, 1):
        row = cell(
            f"gradient of the reward, {chunk} at once",
            lambda: reward_gradient(G, parameters, optimizer, reward, chunk),
        )
        if "error" not in row:
            break


def reward_gradient(G, parameters, optimizer, reward, chunk):
    """The same update by the gradient of the reward itself."""
    prompts = [f"prompt {i // 24}" for i in range(192)]
    condition = drpo.rows(G.encode(prompts[::24]), torch.arange(192, device=G.device) // 24)
    noise = torch.stack([drpo.prompt_noise(0, i, G.noise_shape) for i in range(192)]).to(G.device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        for i in torch.arange(192, device=G.device).split(chunk):
            images = G.decode(G.sample(noise[i], drpo.rows(condition, i)))
            (-reward.score_tensor(images, None).sum() / 192).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"s": statistics.median(seconds[1:]), "GiB": torch.cuda.max_memory_allocated() / 2**30}


# ===== ties of a judge


def judge(args):
    """A fake judge at both ways of asking: what it thinks of a picture is normal within a prompt,
    around a mean that is normal over prompts; asked for a number it says a whole one, asked yes or
    no its first token has the logistic probability. Counts over 200 prompts of 24 pictures."""
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    pictures = [Image.new("RGB", (8, 8))] * 24
    ways = {"a number, 0 to 10": "", "a number, 1 to 5": "&scale=1-5", "P(yes)": "&yes=1"}
    for label, query in ways.items():
        reward = rewards.load(f"vlm@http://127.0.0.1:9/v1?model=fake{query}")
        part = next(iter(reward.parts.values()))
        ties, skipped, anchors = [], [], []
        for _ in range(200):
            thoughts = torch.randn((), generator=rng) + torch.randn(24, generator=rng)
            waiting = thoughts.tolist()

            def post(url, payload, token, who):
                """One answer as an endpoint gives it; the questions come in any order."""
                thought = waiting.pop()
                if part.yes:
                    p = 1 / (1 + math.exp(-2 * thought))
                    tokens = [{"token": "Yes", "logprob": math.log(p)}]
                    tokens.append({"token": "No", "logprob": math.log1p(-p)})
                    return {"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}
                middle, step = (part.low + part.high) / 2, (part.high - part.low) / 6
                number = round(min(max(middle + step * thought, part.low), part.high))
                return {"choices": [{"message": {"content": json.dumps({"score": number})}}]}

            rewards.post_json = post
            scores = reward(pictures, ["a cat"] * 24)
            ties.append(float((scores[:, None] == scores).double().mean() * 24 - 1) / 23)
            positive, negative = drpo.best_and_worst(scores, 8)
            skipped.append(float(not positive.any() or not negative.any()))
            anchors.append(int(positive.sum() + negative.sum()))
        row = {"pairs that tie": statistics.mean(ties), "prompts skipped": statistics.mean(skipped)}
        print(f"{label}: {row}, anchors of 16: {statistics.mean(anchors):.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("update", "growth", "numbers", "cost", "judge", "make"))
    parser.add_argument("items", nargs="*")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/drpo-bench"), help="where the models are kept"
    )
    parser.add_argument("--updates", type=int, default=5, help="measured updates [%(default)s]")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(
        torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "torch",
        torch.__version__,
        flush=True,
    )
    if arguments.what == "make":
        make(arguments.items[0], Path(arguments.items[1]), arguments.device)
    else:
        works = (update, growth, numbers, cost, judge)
        {work.__name__: work for work in works}[arguments.what](arguments)
