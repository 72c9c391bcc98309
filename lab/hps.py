"""Human preference scores: `--reward hpsv2`, `--reward hpsv3`; rewards.py takes them from here."""
import html
import itertools
import os
import re
import sys
import tempfile
import unicodedata
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import rewards  # noqa: E402
from rewards import UserError  # noqa: E402

VIT_H = {  # open_clip's ViT-H-14, which PickScore and HPSv2 are tuned from
    "projection_dim": 1024,
    "text_config": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                        num_attention_heads=16, hidden_act="gelu", projection_dim=1024),
    "vision_config": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                          num_attention_heads=16, hidden_act="gelu", projection_dim=1024,
                          patch_size=14)}


def hpsv2(device="cpu", path=None):
    """Human preference, version 2.1; pictures that are not square are padded with black.

    model    HPS_v2.1_compressed.pt of xswu/HPSv2 (CLIP ViT-H-14), tokenizer of PickScore_v1
    licence  Apache-2.0
    size     2.0 GB
    scale    cosine, 0.25 to 0.31
    source   Wu et al. 2023, arXiv 2306.09341
    compared hpsv2 1.2.0 of PyPI: pictures 0.0 levels apart; texts, 3 of 25,432 Pick-a-Pic prompts
             get other tokens. Without antialiasing scores move by up to 0.021
    path     the .pt file of version 2.1 or 2.0 (HPS_v2_compressed.pt, which DrPO's authors use), or
             a folder with the 2.1 file and, to stay off the hub, the files of any CLIP tokenizer
    """
    from transformers import CLIPConfig, CLIPModel
    rewards.quiet_libraries()
    with rewards.fetching("hpsv2", "HPS_v2.1_compressed.pt", "xswu/HPSv2", path):
        file = rewards.repo_file("xswu/HPSv2", "HPS_v2.1_compressed.pt", path)
        state = from_open_clip(rewards.read_weights(file)["state_dict"])
        model = rewards.frozen(CLIPModel, None, config=CLIPConfig(**VIT_H), state_dict=state)
    with rewards.fetching("hpsv2", "the tokenizer", rewards.PICKSCORE, None):
        tokenize = rewards.tokenizer_at(rewards.PICKSCORE, path, 77)
    model = rewards.Clip(model, lambda texts: tokenize(list(map(repaired, texts))), device, "pad")
    return rewards.takes_tensors(lambda images, prompts: model.cosine(images, prompts), 256)


def repaired(text):
    """What open_clip's tokenizer does to a text first, without ftfy: HTML entities, quotes, wide
    letters, ligatures."""
    text = html.unescape(html.unescape(text))
    text = re.sub("[\u02bc\u2018-\u201b]", "'", text)
    text = re.sub("[\u201c-\u201f]", '"', text)
    wide = "[\uff01-\uff5e\u3000\ufb00-\ufb06]"
    text = re.sub(wide, lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return unicodedata.normalize("NFC", text).strip()


OPEN_CLIP_NAMES = [  # (open_clip's, transformers')
    ("transformer.resblocks.", "encoder.layers."), ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"), ("class_embedding", "embeddings.class_embedding"),
    ("token_embedding", "embeddings.token_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1", "embeddings.patch_embedding"), ("ln_pre", "pre_layrnorm"),
    ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm")]


def from_open_clip(weights):
    """State dict of open_clip's CLIP -> state dict of transformers' CLIPModel."""
    converted = {"visual_projection.weight": weights["visual.proj"].T.contiguous(),
                 "text_projection.weight": weights["text_projection"].T.contiguous(),
                 "logit_scale": weights["logit_scale"]}
    for key, value in weights.items():
        if key in ("visual.proj", "text_projection", "logit_scale"):
            continue
        tower = "vision_model." if key.startswith("visual.") else "text_model."
        key = tower + key.removeprefix("visual.")
        for theirs, name in OPEN_CLIP_NAMES:
            key = key.replace(theirs, name)
        if "attn.in_proj_" in key:  # queries, keys and values in one matrix
            for letter, third in zip("qkv", value.chunk(3)):
                converted[key.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = third
        else:
            converted[key] = value
    return converted


HPSV3_TOKENS = ("<|Reward|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>",
                "<|im_end|>", "<|endoftext|>", "<|video_pad|>")  # a prompt must not hold them


def hpsv3(device="cpu", path=None):
    """Human preference, version 3, through its authors' package, which needs a CUDA GPU.

    model    MizzenAI/HPSv3 on Qwen/Qwen2-VL-7B-Instruct (another 16.6 GB, downloaded first)
    licence  MIT (package and weights), Apache-2.0 (Qwen2-VL)
    size     16.6 GB + 16.6 GB
    scale    mean of the predicted preference, in the package's own unit
    source   Ma et al. 2025, arXiv 2508.03789
    compared hpsv3's own call on a tiny random Qwen2-VL: the arguments and the first component
    path     the package's checkpoint file. The package pins old libraries: install it in an
             environment of its own, run `python rewards.py serve hpsv3` there, and use
             `--reward http://127.0.0.1:8000` here
    """
    try:
        if torch.device(device).type != "cuda":
            raise ValueError(f"it needs a CUDA GPU, not {device}")
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{path} is no checkpoint file")
        from hpsv3 import HPSv3RewardInferencer
        options = {"checkpoint_path": str(path)} if path else {}
        model = HPSv3RewardInferencer(device=str(device), **options)
    except Exception as error:
        raise UserError(f"reward 'hpsv3': its package cannot be used ({rewards.one_line(error)}); "
                        "in an environment of its own: pip install hpsv3 matplotlib tensorboard "
                        "rich tyro, python rewards.py serve hpsv3; then here http://HOST:8000"
                        ) from error

    @torch.no_grad()  # else each call would keep a graph of 7 billion parameters
    def score(images, prompts):
        for prompt, token in itertools.product(dict.fromkeys(prompts), HPSV3_TOKENS):
            if token in prompt:
                raise UserError(f"reward 'hpsv3': {prompt[:60]!r} holds its special token {token}")
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, f"{i}.png") for i in range(len(images))]
            for image, file in zip(images, paths):
                image.convert("RGB").save(file)
            found = model.reward(prompts=list(prompts), image_paths=paths)
            return [float(mean_and_sigma[0]) for mean_and_sigma in found]

    score.batch_size = 8
    return score
