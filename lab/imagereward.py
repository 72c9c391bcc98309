"""ImageReward: `--reward imagereward`, which rewards.py takes from here."""
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
import rewards  # noqa: E402
from aesthetic import linear_head  # noqa: E402

BLIP_TEXT = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                 intermediate_size=3072, vocab_size=30524, layer_norm_eps=1e-12,
                 encoder_hidden_size=1024)
BLIP_VISION = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                   intermediate_size=4096, patch_size=16, image_size=224, layer_norm_eps=1e-6)
BLIP_NAMES = [  # (ImageReward's, transformers')
    ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"), ("blocks.", "encoder.layers."),
    (".attn.", ".self_attn."), (".proj.", ".projection."), (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2.")]


def imagereward(device="cpu", path=None):
    """Human preference, trained on rankings with text-image agreement in mind.

    model    ImageReward.pt of THUDM/ImageReward (BLIP), tokenizer of bert-base-uncased
    licence  Apache-2.0
    size     1.8 GB
    scale    about -2 to 2, normalised to mean 0 and std 1 over its training pictures
    source   Xu et al. 2023, arXiv 2304.05977
    compared image-reward 1.5 of PyPI: 0 where the crop agrees, which it does now; fp16 (on a GPU;
             the original runs float32) costs 0.011 of a spread of 4.3, order kept
    path     ImageReward.pt, or a folder with it and, to stay off the hub, vocab.txt of
             bert-base-uncased
    """
    rewards.quiet_libraries()
    repo = "THUDM/ImageReward"
    with rewards.fetching("imagereward", "ImageReward.pt", repo, path):
        weights = rewards.read_weights(rewards.repo_file(repo, "ImageReward.pt", path))
        vision, text = from_blip(weights, device)
        head = linear_head(weights, "mlp.", device)
    with rewards.fetching("imagereward", "the tokenizer", "bert-base-uncased", None):
        tokenize = rewards.tokenizer_at(
            "bert-base-uncased", path, 35, tokenizer_type="bert", do_lower_case=True,
            pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")

    @torch.no_grad()
    def score(images, prompts):
        pixels = rewards.clip_pixels(images, device, vision.config.image_size, "round")
        seen = vision(pixel_values=pixels.to(vision.dtype))
        patches = seen.last_hidden_state  # (B, 1 + patches, D)
        tokens = tokenize(list(prompts)).to(device)
        read = text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                    encoder_hidden_states=patches)
        return (head(read.last_hidden_state[:, 0]) - 0.16717362830052426) / 1.0333394966054072

    return rewards.takes_tensors(score, 64)


def from_blip(weights, device):
    """State dict of ImageReward -> transformers' BlipVisionModel and BlipTextModel."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    seen = {}
    read = {}
    for key, value in weights.items():
        if key.startswith("blip.visual_encoder."):
            key = re.sub(r"^norm\.", "post_layernorm.", key.removeprefix("blip.visual_encoder."))
            for theirs, name in BLIP_NAMES:
                key = key.replace(theirs, name)
            seen[key] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            read[key.removeprefix("blip.text_encoder.")] = value
    vision = rewards.frozen(BlipVisionModel, None, config=BlipVisionConfig(**BLIP_VISION),
                            state_dict=seen)
    text = rewards.frozen(BlipTextModel, None, config=BlipTextConfig(**BLIP_TEXT), state_dict=read,
                          add_pooling_layer=False)
    dtype = rewards.half_on(device)
    return vision.to(device, dtype), text.to(device, dtype)
