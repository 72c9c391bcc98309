"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): does a picture hold the objects that its prompt
asks for, in number, colour and place?

Loaded as any reward of one's own is: `--reward geneval`, which rewards.py takes from here. A
detector finds the objects, CLIP names their colours, and the benchmark's own rules judge them."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent))
import rewards  # noqa: E402

COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", ")
COLOURS = "red orange yellow green blue purple pink brown black white".split()
COLOUR_TEXTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GENEVAL_PROMPTS = (
    "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/"
    "prompts/evaluation_metadata.jsonl",
    "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
)  # 85,209 bytes


class Found(NamedTuple):
    """One detected object: box (x0, y0, x1, y1) in pixels, its score, and its mask (H,W) or
    None."""

    box: tuple
    score: float
    mask: torch.Tensor = None


def confident(objects, tag):
    """{class: [Found]} -> the same, best first (of equal ones the last), without those at or below
    the threshold (0.9 when the prompt counts, else 0.3), and at most 16 of a class."""
    threshold = 0.9 if tag == "counting" else 0.3
    kept = {}
    for name, found in objects.items():
        ordered = sorted(found, key=lambda f: f.score)[::-1]
        kept[name] = [f for f in ordered if f.score > threshold][:16]
    return kept


def relative_position(a, b):
    """Boxes a, b -> where a lies as seen from b: a subset of {"left of", "right of", "above",
    "below"}.

    Centres nearer than a tenth of the summed sizes do not count as apart; a direction counts when
    it makes up more than half of the distance between the centres."""
    a = np.array(a, float).reshape(2, 2)
    b = np.array(b, float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    margin = 0.1 * ((a[1] - a[0]) + (b[1] - b[0]))
    apart = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    dx, dy = apart / np.linalg.norm(offset)
    relations = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in relations.items() if holds}


def judge(wanted, objects, colours):
    """One picture against the metadata of its prompt -> (correct: bool, dense score in [0,1], 1
    exactly when correct).

    wanted: {"include": [{"class", "count", "color"?, "position"?: [relation, index of an earlier
    clause]}], "exclude"?: [{"class", "count"}]}; objects: {class: [Found]}, confident and best
    first; colours(found, class) -> the colour of each. Every clause gives terms in [0,1] (share of
    the objects found, share of them in their colour, place 0 or 1, an excess over what is
    excluded); correct = all are 1, dense = their mean."""
    terms = []
    groups = []
    for clause in wanted.get("include", []):
        name = clause["class"]
        count = clause["count"]
        found = objects.get(name, [])[:count]
        first = len(terms)
        terms.append(len(found) / count)
        if "color" in clause:
            terms.append(
                min(colours(found, name).count(clause["color"]) / count, 1) if found else 0
            )
        if "position" in clause:
            relation, target = clause["position"]
            holds = min(terms[first:]) == 1 and groups[target] is not None
            terms.append(
                float(
                    holds
                    and all(
                        relation in relative_position(f.box, other.box)
                        for f in found
                        for other in groups[target]
                    )
                )
            )
        groups.append(found if min(terms[first:]) == 1 else None)
    for clause in wanted.get("exclude", []):
        allowed = clause["count"] - 1
        excess = max(len(objects.get(clause["class"], [])) - allowed, 0)
        terms.append(max(1 - excess / max(allowed, 1), 0))
    return all(term == 1 for term in terms), sum(terms) / max(len(terms), 1)


def detections(class_logits, mask_logits, padded, inside, size, floor=0.3):
    """What Mask2Former says of one picture -> {class: [Found]} of scores above `floor`.

    class_logits (Q, 81), the last column 'nothing'; mask_logits (Q, h, w) over the padded input of
    (H, W) = `padded`, whose upper left `inside` (H, W) is the picture, itself of (H, W) = `size`.
    Of the 100 most probable pairs of query and class, score = class probability x mean mask
    probability inside the mask."""
    probability, index = (
        class_logits.softmax(-1)[:, :-1].flatten().topk(min(100, class_logits[:, :-1].numel()))
    )
    index = index[probability > floor]
    probability = probability[probability > floor]  # the mask factor is at most 1
    objects = {}
    for p, i in zip(probability.tolist(), index.tolist()):
        query, name = divmod(i, len(COCO))
        logits = F.interpolate(mask_logits[None, None, query], size=padded, mode="bilinear")
        logits = F.interpolate(logits[..., : inside[0], : inside[1]], size=size, mode="bilinear")[
            0, 0
        ]
        mask = logits > 0
        if not mask.any():
            continue
        score = p * logits[mask].sigmoid().mean().item()
        y = mask.any(1).nonzero()
        x = mask.any(0).nonzero()
        box = (x[0].item(), y[0].item(), x[-1].item() + 1, y[-1].item() + 1)
        if score > floor:
            objects.setdefault(COCO[name], []).append(Found(box, score, mask))
    return objects


class Detector:
    """Mask2Former (Swin-S) for the 80 COCO classes, from a folder or the hub, without scipy: the
    class transformers offers wants it for its training loss, so this is its trunk with a class
    layer."""

    def __init__(self, source, device):
        from transformers.models.mask2former.modeling_mask2former import (
            Mask2FormerModel,
            Mask2FormerPreTrainedModel,
        )

        class Trunk(Mask2FormerPreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.model = Mask2FormerModel(config)
                self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
                self.post_init()

        self.trunk = rewards.frozen(Trunk, source).to(device)
        self.device = device
        if self.trunk.config.num_labels != len(COCO):
            raise ValueError(
                f"the detector knows {self.trunk.config.num_labels} classes, not the 80 of COCO"
            )

    def logits(self, pixels):
        """(B,3,H,W) normalised -> class logits (B,Q,81), mask logits (B,Q,H/4,W/4)."""
        out = self.trunk.model(pixels, output_hidden_states=True)
        queries = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.trunk.class_predictor(queries), out.masks_queries_logits[-1]

    @torch.no_grad()
    def __call__(self, images):
        """(B,3,H,W) in [0,1] -> B times {class: [Found]}."""
        size = images.shape[-2:]
        scale = min(800 / min(size), 1333 / max(size))
        inside = [round(scale * side) for side in size]
        x = F.interpolate(images, size=inside, mode="bilinear", antialias=True)
        mean = rewards.constants((0.485, 0.456, 0.406), self.device)
        std = rewards.constants((0.229, 0.224, 0.225), self.device)
        x = F.pad((x - mean) / std, (0, -inside[1] % 32, 0, -inside[0] % 32))
        classes, masks = self.logits(x)
        return [detections(c, m, x.shape[-2:], inside, size) for c, m in zip(classes, masks)]


class GenEval:
    """The GenEval judge: `__call__` and `score_tensor` give the dense score in [0,1], `correct` the
    strict verdict.

    detect: (B,3,H,W) -> B times {class: [Found]}. clip: the Clip that names colours. metadata:
    {prompt: its line of the benchmark}. A prompt that is not of the benchmark scores NaN; its tag
    and verdict are None."""

    batch_size = 8

    def __init__(self, detect, clip, metadata, device):
        self.detect = detect
        self.clip = clip
        self.metadata = metadata
        self.device = device
        self.prompts = list(metadata)

    def __call__(self, images, prompts):
        """list of B PIL images or (B,3,H,W) in [0,1], list of B prompts -> list of B dense
        scores."""
        return [
            math.nan if verdict is None else verdict[1]
            for verdict in self.verdicts(images, prompts)
        ]

    score_tensor = __call__

    def correct(self, images, prompts):
        """The same arguments -> list of True, False, or None for a prompt that is not of the
        benchmark."""
        verdicts = []
        for i in range(0, len(prompts), self.batch_size):
            part = slice(i, i + self.batch_size)
            verdicts += self.verdicts(images[part], prompts[part])
        return [None if verdict is None else verdict[0] for verdict in verdicts]

    def tag(self, prompt):
        """The task of a prompt (single_object, two_object, counting, colors, position, color_attr)
        or None."""
        return self.metadata[prompt]["tag"] if prompt in self.metadata else None

    def verdicts(self, images, prompts):
        """list of (correct, dense), or None for unknown prompts."""
        verdicts = [None] * len(prompts)
        known = [i for i, prompt in enumerate(prompts) if prompt in self.metadata]
        pictures = [rewards.as_tensor(images[i]).to(self.device) for i in known]
        if len({picture.shape for picture in pictures}) == 1:
            objects = self.detect(torch.stack(pictures))
        else:
            objects = [self.detect(picture[None])[0] for picture in pictures]
        for i, picture, found in zip(known, pictures, objects):
            wanted = self.metadata[prompts[i]]
            verdicts[i] = judge(
                wanted, confident(found, wanted["tag"]), partial(self.colours, picture)
            )
        return verdicts

    def colours(self, picture, found, name):
        """picture (3,H,W), [Found], their class -> the colour of each, by CLIP on the masked object
        over grey #999."""
        texts = self.clip.text(
            [text.format(colour, name) for colour in COLOURS for text in COLOUR_TEXTS]
        )
        classes = F.normalize(texts.view(len(COLOURS), len(COLOUR_TEXTS), -1).mean(1), dim=-1)
        names = []
        for box, _, mask in found:
            crop = torch.where(mask, picture, 0.6)[None, :, box[1] : box[3], box[0] : box[2]]
            names.append(COLOURS[(self.clip.image(crop) @ classes.T).argmax().item()])
        return names


def geneval_metadata(path=None):
    """The 553 prompts of the benchmark, from a file or its repository -> {prompt: {"tag",
    "include", "exclude"?}}."""
    metadata = {}
    for number, line in rewards.lines_of(
        rewards.read_text(path or rewards.fetch(*GENEVAL_PROMPTS))
    ):
        try:
            wanted = json.loads(line)
            missing = {"prompt", "tag", "include"} - set(wanted)
            if missing:
                raise ValueError(f"it lacks {sorted(missing)}")
            unknown = {c["class"] for c in wanted["include"] + wanted.get("exclude", [])} - set(
                COCO
            )
            if unknown:
                raise ValueError(f"classes that COCO lacks: {sorted(unknown)}")
            metadata[wanted["prompt"]] = wanted
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number}: {rewards.one_line(error)}") from error
    return metadata


def geneval(device="cpu", path=None):
    """Object-focused agreement with the 553 GenEval prompts; other prompts get no opinion.

    model    facebook/mask2former-swin-small-coco-instance and openai/clip-vit-large-patch14
    licence  MIT (benchmark)
    size     2.0 GB
    scale    dense 0 to 1; strict accuracy, mean of six tags: SD1.5 0.43, SD2.1 0.50, SDXL 0.55
    source   Ghosh et al. 2023, arXiv 2310.11513; prompts of github.com/djghosh13/geneval af4902f2
    compared its evaluation script: 0 disagreements in 11,060 detections over all 553 prompts; its
             detector is mmdet's, this one Facebook's of the same architecture
    path     evaluation_metadata.jsonl, or a folder with it and copies of the two repositories in
             mask2former/ and clip/
    """
    folder = Path(path) if path and Path(path).is_dir() else None

    def local(name):
        return str(folder / name) if folder and (folder / name).exists() else None

    try:
        metadata = geneval_metadata(local("evaluation_metadata.jsonl") if folder else path)
    except Exception as error:
        raise rewards.UserError(
            f"reward 'geneval': cannot read {path or GENEVAL_PROMPTS[0]} "
            f"({rewards.one_line(error)}); for a local "
            "copy give geneval@/path/to/evaluation_metadata.jsonl"
        ) from error
    repo = "facebook/mask2former-swin-small-coco-instance"
    with rewards.fetching("geneval", "the detector", repo, local("mask2former")):
        detect = Detector(local("mask2former") or repo, device)
    return GenEval(
        detect,
        rewards.clip_at("geneval", rewards.CLIP_L, device, local("clip"), "round"),
        metadata,
        device,
    )
