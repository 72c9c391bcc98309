"""Features of a vision transformer on the decoded picture, 224 x 224: of hidden_states[12] the mean
and the std over the patches, and the class token: three maps.

    python drpo.py --model sd-turbo --features lab/vit.py:dino
    python drpo.py --model sd-turbo --features lab/vit.py:mae@/path/to/a/copy

`dino` is DINOv2 (Apache-2.0), `mae` ViT-MAE, whose weights are CC-BY-NC-4.0. And the pattern of
features of one's own: a factory(G, path) that returns phi(x, condition) -> list of (B, T, D), for
latents x (B, 4, h, w), float32.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import drpo  # noqa: E402
import rewards  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def mae(G, path=""):
    """ViT-MAE: it sees all patches, in an order that changes nothing here."""
    net = network("ViTMAEModel", path or "facebook/vit-mae-base")
    net.config.mask_ratio = 0.0
    return maps_of(net, G)


def dino(G, path=""):
    """DINOv2."""
    return maps_of(network("Dinov2Model", path or "facebook/dinov2-base"), G)


def network(class_name, source):
    """A frozen network of transformers from a folder or the hub, its weights whole. UserError."""
    import transformers
    rewards.quiet_libraries()
    with rewards.reading(f"features: {source}", "for a local copy give NAME@/path/to/folder"):
        folder = source if Path(source).is_dir() else rewards.hub_folder(source)
        return rewards.frozen(getattr(transformers, class_name), folder)


def maps_of(net, G):
    """A vision transformer -> phi."""
    net.to(G.device, G.dtype)
    mean, std = (torch.tensor(three, device=G.device)[:, None, None] for three in (MEAN, STD))

    def phi(x, condition):
        pictures = F.interpolate(G.decode(x), (224, 224), mode="bicubic", antialias=True)
        pictures = (pictures - mean) / std  # (B, 3, 224, 224)
        states = net(pictures.to(G.dtype), output_hidden_states=True).hidden_states
        h = states[min(12, len(states) - 1)].float()  # (B, 1 + patches, D), class token first
        return [*drpo.mean_std(h[:, 1:].mT[..., None]), h[:, :1]]

    return phi
