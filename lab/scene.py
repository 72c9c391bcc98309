"""The toy's checker: how well pictures of coloured shapes follow their captions, by a program.

Loaded as any reward of one's own is: `--reward lab/scene.py:scene` (`scene` for short). Besides the
score it tells right from wrong (`scene.correct`) and the kind of a caption (`scene.tag`), which
eval.py reports.
"""
import itertools
import re

import numpy as np

SCENE_COLORS = {"red": (222, 62, 62), "yellow": (247, 192, 48), "green": (58, 166, 94),
                "blue": (50, 118, 216), "purple": (150, 82, 192), "black": (50, 54, 64)}
SCENE_SHAPES = ("circle", "square", "triangle")
_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
_SIDES = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_NOUN = rf"(?:({'|'.join(_COUNTS)}) )?(?:({'|'.join(SCENE_COLORS)}) )?({'|'.join(SCENE_SHAPES)})(?:s)?"
_CAPTION = re.compile(rf"(?:an? (?:photo|picture|drawing|image) of )?{_NOUN}(?: (and|{'|'.join(_SIDES)}) {_NOUN})?[.]?")


def parse(prompt):
    """A caption -> (objects, side): a list of (shape, colour or None) and None or the unit vector from object 2 to
    object 1. None for a caption that is not of this small language."""
    match = _CAPTION.fullmatch(" ".join(prompt.lower().split()))
    if not match:
        return None
    count, color, shape, joint, count2, color2, shape2 = match.groups()
    objects = [(shape, color)] * _COUNTS[count or "a"]
    if joint:
        objects += [(shape2, color2)] * _COUNTS[count2 or "a"]
    side = _SIDES.get(joint)
    return None if side and len(objects) != 2 else (objects, side)


def components(mask, least):
    """Connected regions (4 neighbours) of at least so many pixels of a boolean picture (H, W): a list of boolean
    pictures, largest first. Each row's and column's unbroken runs take their largest label until nothing changes."""
    def runs(m):
        edge = np.ones(m.shape, bool)
        edge[:, 1:] = m[:, 1:] != m[:, :-1]
        starts = np.flatnonzero(edge)
        return starts, np.diff(np.append(starts, m.size))

    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    along, down, before = runs(mask), runs(mask.T), None
    while before is None or not np.array_equal(before, labels):
        before = labels
        for starts, lengths in (along, down):  # transposed after each: columns are the rows of the transpose
            labels = np.repeat(np.maximum.reduceat(labels.ravel(), starts), lengths).reshape(labels.shape).T
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    order = np.argsort(-counts, kind="stable")
    return [labels == value for value in order[:np.count_nonzero(counts >= least)]]


def shape_of(mask):
    """The shape of a region (H, W) and how well it fits, in [0, 1]: its overlap (intersection over union) with a
    circle, a square and an upright triangle drawn into its own bounding box."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    region = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = region.shape
    if not 0.6 < width / height < 1.67:
        return None, 0.0
    y, x = (np.arange(height)[:, None] + 0.5) / height * 2 - 1, (np.arange(width)[None] + 0.5) / width * 2 - 1
    ideals = (x ** 2 + y ** 2 <= 1.02, np.ones_like(region), np.abs(x) <= (y + 1) / 2 + 1 / width)
    fits = [(region & ideal).sum() / (region | ideal).sum() for ideal in ideals]
    best = int(np.argmax(fits))
    return SCENE_SHAPES[best], float(fits[best])


def look(image):
    """A PIL picture -> (objects, readable). objects: a list of (shape, colour, x, y, size), x and y the centre and size
    the square root of the area, all as fractions of the picture. readable: every region on the plain background is one
    clean shape in one clean colour."""
    pixels = np.asarray(image.convert("RGB").resize((64, 64)) if image.size != (64, 64) else image.convert("RGB"))
    pixels = pixels.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = np.median(border, axis=0)
    palette = np.array(list(SCENE_COLORS.values()), np.float32)
    # How far each pixel has gone from the paper to each colour (0 to 1), and how far it lies beside that line.
    toward = palette - paper
    length = np.maximum((toward ** 2).sum(1), 1)
    along = (pixels - paper) @ toward.T / length
    far = np.linalg.norm(pixels - paper, axis=2)
    beside = np.sqrt(np.maximum(far[..., None] ** 2 - along ** 2 * length, 0))
    score = beside + 60 * np.abs(along - np.clip(along, 0, 1))
    name = score.argmin(2)
    cover = np.take_along_axis(along, name[..., None], 2)[..., 0]
    inked = (cover > 0.5) & (far > 40)
    objects, readable, stray = [], paper.min() > 190, int(inked.sum())
    for region in components(inked, least=25):
        area = int(region.sum())
        stray -= area
        tint = np.median(pixels[region], axis=0)
        distance = np.linalg.norm(palette - tint, axis=1)
        color = int(distance.argmin())
        inner = region & np.roll(region, 1, 0) & np.roll(region, -1, 0) & np.roll(region, 1, 1) & np.roll(region, -1, 1)
        off = np.linalg.norm(pixels[inner] - palette[color], axis=1)  # away from the edge, where paper mixes in
        shape, fit = shape_of(region)
        clean = distance[color] < 45 and (off > 60).mean() < 0.2 and fit > 0.8 if len(off) else False
        readable = readable and bool(clean)
        y, x = np.nonzero(region)
        objects.append((shape if fit > 0.8 else None, list(SCENE_COLORS)[color] if distance[color] < 60 else None,
                        float(x.mean() + 0.5) / 64, float(y.mean() + 0.5) / 64, area ** 0.5 / 64))
    near = np.pad(inked, 1)
    near = near[1:-1, 1:-1] | near[2:, 1:-1] | near[:-2, 1:-1] | near[1:-1, 2:] | near[1:-1, :-2]
    noisy = ((far > 40) & ~near).sum()  # ink that belongs to no region
    return objects, bool(readable and objects and len(objects) <= 6 and stray + noisy <= 20)


def score_of(image, prompt):
    """The graded score of one picture: see scene."""
    parsed = parse(prompt)
    if parsed is None:
        return float("nan")
    wanted, side = parsed
    objects, readable = look(image)
    objects = objects[:6]
    longer = max(len(wanted), len(objects), 1)
    best = 0.0
    for order in itertools.permutations(range(len(objects)), min(len(wanted), len(objects))):
        pairs = [(want, objects[i]) for want, i in zip(wanted, order)]
        # Fewer objects than wanted: try which of the wanted ones they are.
        for chosen in ([pairs] if len(objects) >= len(wanted) else
                       [[(w, objects[i]) for w, i in zip(some, order)]
                        for some in itertools.combinations(wanted, len(objects))]):
            value = sum(0.5 * (shape == o[0]) + 0.5 * (shape == o[0] if color is None else color == o[1])
                        for (shape, color), o in chosen)
            value /= longer
            if side and len(chosen) == 2:
                dx, dy = chosen[0][1][2] - chosen[1][1][2], chosen[0][1][3] - chosen[1][1][3]
                ahead, across = dx * side[0] + dy * side[1], abs(dx * side[1]) + abs(dy * side[0])
                value = value * 0.5 + 0.5 * (ahead > max(across, 0.05))
            elif side:
                value *= 0.5
            best = max(best, value)
    return best if readable else 0.5 * best


def scene(images, prompts):
    """How well pictures of coloured shapes follow their captions, 0 to 1, and exactly 1 only where all is right.

    model    none: a program
    licence  none
    size     0
    scale    0 to 1; the toy's captions alone, every other one gives NaN

    A list of PIL pictures and one of captions -> a list of floats. The picture is split into regions by colour, each
    region gets a shape and a colour, and the best assignment of regions to the caption's objects counts: half for the
    shape and half for the colour of each, over the larger number of the two; then half for the side, if one is named.
    An unreadable picture (smears, specks, unknown colours, nothing at all) gets half of that at most. A caption
    outside the toy's language ("a red circle", "three blue squares", "a circle above a square") gives NaN: no opinion.
    """
    if len(images) != len(prompts):
        raise ValueError(f"scene: {len(images)} images but {len(prompts)} prompts")
    return [score_of(image, prompt) for image, prompt in zip(images, prompts)]


def tag(prompt):
    """The kind of a caption, by GenEval's names; None where scene has no opinion."""
    parsed = parse(prompt)
    if parsed is None:
        return None
    objects, side = parsed
    colored = all(color for _, color in objects)
    if side:
        return "position"
    if len(objects) == 1:
        return "colors" if colored else "single_object"
    if len(set(objects)) == 1:
        return "counting"
    return "color_attr" if colored else "two_object"


def readable(image):
    """Whether every region of a picture is one clean shape in one clean colour."""
    return look(image)[1]


def correct(images, prompts):
    """Right or wrong, a bool a picture."""
    return [value == 1 for value in scene(images, prompts)]


scene.tag, scene.correct, scene.readable = tag, correct, readable
