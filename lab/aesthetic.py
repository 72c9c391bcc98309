"""The LAION aesthetic predictor: `--reward aesthetic`, which rewards.py takes from here."""
import sys
from pathlib import Path

import torch.nn as nn

sys.path.append(str(Path(__file__).resolve().parent.parent))
import rewards  # noqa: E402

AESTHETIC = ("https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/"
             "6934dd81792f086e613a121dbce43082cb8be85e/sac+logos+ava1-l14-linearMSE.pth",
             "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0")  # 3,714,759 bytes


def aesthetic(device="cpu", path=None):
    """How much people like the picture; the prompt is ignored.

    model    sac+logos+ava1-l14-linearMSE.pth (LAION), on openai/clip-vit-large-patch14
    licence  Apache-2.0 (head), MIT (CLIP's code)
    size     1.7 GB
    scale    4 to 7 of 1 to 10
    source   github.com/christophschuhmann/improved-aesthetic-predictor 6934dd81
    compared that repository's code with the real head, random CLIP: the same crops; fp16 costs
             0.002, order kept
    path     the head's file (CLIP from the hub), or a folder with it (also as aesthetic-model.pth)
             and a copy of CLIP
    """
    name = "sac+logos+ava1-l14-linearMSE.pth"
    file = path
    folder = None
    if path and Path(path).is_dir():
        folder = path
        file = Path(path) / name
        if not file.exists():
            file = Path(path) / "aesthetic-model.pth"
    with rewards.fetching("aesthetic", name, "trl-lib/ddpo-aesthetic-predictor", path):
        head = linear_head(rewards.read_weights(file or rewards.fetch(*AESTHETIC)), "", device)
    model = rewards.clip_at("aesthetic", rewards.CLIP_L, device, folder, "round")
    return rewards.takes_tensors(lambda images, prompts: head(model.image(images)), 256)


def linear_head(weights, prefix, device):
    """The heads of the LAION predictor and of ImageReward: linear layers 0, 2, 4, 6, 7 with nothing
    between them (the numbers left out were dropouts) -> function (B, D) -> (B,) in float32."""
    layers = nn.Sequential()
    for i in (0, 2, 4, 6, 7):
        weight = weights[f"{prefix}layers.{i}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": weights[f"{prefix}layers.{i}.bias"]})
        layers.append(layer)
    layers.to(device).requires_grad_(False)

    def head(x):
        return layers(x.float()).squeeze(-1)

    return head
