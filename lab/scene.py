"""The toy's checker: how well pictures of coloured shapes follow their captions, by a program.

Loaded as any reward of one's own is: `--reward lab/scene.py:scene` (`scene` for short). Besides the
score it tells right from wrong (`scene.correct`) and the kind of a caption (`scene.tag`), which
eval.py reports.
"""

import itertools
import re

import numpy as np

SCENE_COLORS = {
    "red": (222, 62, 62),
    "yellow": (247, 192, 48),
    "green": (58, 166, 94),
    "blue": (50, 118, 216),
    "purple": (150, 82, 192),
    "black": (50, 54, 64),
}
SCENE_SHAPES = ("circle", "square", "triangle")
_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
_SIDES = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_COUNT = "|".join(_COUNTS)
_COLOR = "|".join(SCENE_COLORS)
_SHAPE = "|".join(SCENE_SHAPES)
_SIDE = "|".join(_SIDES)
_NOUN = rf"(?:({_COUNT}) )?(?:({_COLOR}) )?({_SHAPE})(?:s)?"
_WORDING = "(?:an? (?:photo|picture|drawing|image) of )?"
_CAPTION = re.compile(rf"{_WORDING}{_NOUN}(?: (and|{_SIDE}) {_NOUN})?[.]?")


def parse(prompt):
    """A caption -> (objects, side): a list of (shape, colour or None), and None or the unit vector
    from object 2 to object 1. None for a caption that is not of this small language."""
    match = _CAPTION.fullmatch(" ".join(prompt.lower().split()))
    if not match:
        return None
    count, color, shape, joint, count2, color2, shape2 = match.groups()
    objects = [(shape, color)] * _COUNTS[count or "a"]
    if joint:
        objects += [(shape2, color2)] * _COUNTS[count2 or "a"]
    side = _SIDES.get(joint)
    if side and len(objects) != 2:
        return None
    return objects, side


def runs(mask):
    """The unbroken runs of a boolean picture's rows: where each begins in the flat picture, its
    length."""
    edge = np.ones(mask.shape, bool)
    edge[:, 1:] = mask[:, 1:] != mask[:, :-1]
    starts = np.flatnonzero(edge)
    return starts, np.diff(np.append(starts, mask.size))


def components(mask, least):
    """Connected regions (4 neighbours) of at least so many pixels of a boolean picture (H, W): a
    list of boolean pictures, largest first. Each row's and column's unbroken runs take their
    largest label until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    directions = runs(mask), runs(mask.T)
    changed = True
    while changed:
        before = labels
        for starts, lengths in directions:  # transposed after each: then columns are rows
            largest = np.maximum.reduceat(labels.ravel(), starts)
            labels = np.repeat(largest, lengths).reshape(labels.shape).T
        changed = not np.array_equal(before, labels)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    order = np.argsort(-counts, kind="stable")
    return [labels == value for value in order[: np.count_nonzero(counts >= least)]]


def shape_of(mask):
    """The shape of a region (H, W) and how well it fits, in [0, 1]: its overlap (intersection over
    union) with a circle, a square and an upright triangle drawn into its own bounding box."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    region = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = region.shape
    if not 0.6 < width / height < 1.67:
        return None, 0.0
    y = (np.arange(height)[:, None] + 0.5) / height * 2 - 1
    x = (np.arange(width)[None] + 0.5) / width * 2 - 1
    circle = x**2 + y**2 <= 1.02
    square = np.ones_like(region)
    triangle = np.abs(x) <= (y + 1) / 2 + 1 / width
    fits = []
    for ideal in (circle, square, triangle):
        fits.append((region & ideal).sum() / (region | ideal).sum())
    best = int(np.argmax(fits))
    return SCENE_SHAPES[best], float(fits[best])


def neighbours(mask):
    """The four shifts by a pixel of a boolean picture (H, W), beyond whose edge all is False."""
    padded = np.pad(mask, 1)
    return padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:], padded[1:-1, :-2]


def look(image):
    """A PIL picture -> (objects, readable). objects: a list of (shape, colour, x, y, size), x and y
    the centre and size the square root of the area, all as fractions of the picture. readable:
    every region on the plain background is one clean shape in one clean colour."""
    image = image.convert("RGB")
    if image.size != (64, 64):
        image = image.resize((64, 64))
    pixels = np.asarray(image).astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = np.median(border, axis=0)
    palette = np.array(list(SCENE_COLORS.values()), np.float32)
    off_paper = pixels - paper
    far = np.linalg.norm(off_paper, axis=2)
    ink = far > 40
    # how far each inky pixel has gone from the paper to each colour (0 to 1), and how far beside
    # that line
    toward = palette - paper
    length = np.maximum((toward**2).sum(1), 1)
    along = off_paper[ink] @ toward.T / length
    beside = np.sqrt(np.maximum(far[ink][:, None] ** 2 - along**2 * length, 0))
    score = beside + 60 * np.abs(along - np.clip(along, 0, 1))
    cover = along[np.arange(len(along)), score.argmin(1)]
    inked = ink.copy()
    inked[ink] = cover > 0.5
    objects = []
    readable = paper.min() > 190
    stray = int(inked.sum())  # ink that belongs to no region
    for region in components(inked, least=25):
        area = int(region.sum())
        stray -= area
        distance = np.linalg.norm(palette - np.median(pixels[region], axis=0), axis=1)
        color = int(distance.argmin())
        inner = region.copy()  # away from the edge, where paper mixes in
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            inner &= np.roll(region, step, axis)
        off = np.linalg.norm(pixels[inner] - palette[color], axis=1)
        shape, fit = shape_of(region)
        if len(off) == 0 or distance[color] >= 45 or (off > 60).mean() >= 0.2 or fit <= 0.8:
            readable = False
        y, x = np.nonzero(region)
        objects.append(
            (
                shape if fit > 0.8 else None,
                list(SCENE_COLORS)[color] if distance[color] < 60 else None,
                float(x.mean() + 0.5) / 64,
                float(y.mean() + 0.5) / 64,
                area**0.5 / 64,
            )
        )
    near = inked.copy()
    for shifted in neighbours(inked):
        near |= shifted
    specks = (ink & ~near).sum()
    readable = readable and 1 <= len(objects) <= 6 and stray + specks <= 20
    return objects, bool(readable)


def score_of(image, prompt):
    """The graded score of one picture: see scene."""
    parsed = parse(prompt)
    if parsed is None:
        return float("nan")
    wanted, side = parsed
    objects, readable = look(image)
    objects = objects[:6]
    n = min(len(wanted), len(objects))
    best = 0.0
    for some in itertools.combinations(wanted, n):  # where objects are missing: which are there?
        for order in itertools.permutations(objects, n):
            value = 0.0
            for (shape, color), found in zip(some, order):
                right_shape = shape == found[0]
                right_color = color == found[1] if color else right_shape
                value += 0.5 * right_shape + 0.5 * right_color
            value /= max(len(wanted), len(objects), 1)
            if side:
                value = 0.5 * value + 0.5 * (n == 2 and placed(order, side))
            best = max(best, value)
    return best if readable else 0.5 * best


def placed(order, side):
    """Whether the first of two objects lies on that side of the second, clearly and mostly."""
    dx = order[0][2] - order[1][2]
    dy = order[0][3] - order[1][3]
    ahead = dx * side[0] + dy * side[1]
    across = abs(dx * side[1]) + abs(dy * side[0])
    return ahead > max(across, 0.05)


def scene(images, prompts):
    """How well pictures of coloured shapes follow their captions, 0 to 1; 1 only where all is
    right.

    model    none: a program
    licence  none
    size     0
    scale    0 to 1; the toy's captions alone, every other one gives NaN

    A list of PIL pictures and one of captions -> a list of floats. The picture is split into
    regions by colour, each region gets a shape and a colour, and the best assignment of regions to
    the caption's objects counts: half for the shape and half for the colour of each, over the
    larger number of the two; then half for the side, if one is named. An unreadable picture
    (smears, specks, unknown colours, nothing at all) gets half of that at most. A caption outside
    the toy's language ("a red circle", "three blue squares", "a circle above a square") gives NaN:
    no opinion."""
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


scene.tag = tag
scene.correct = correct
scene.readable = readable


def checker(device="cpu", path=None):
    """Pictures of coloured shapes against their captions, by a program.

    model    none: a program
    licence  none
    size     0
    scale    0 to 1; the toy's captions alone, every other one gives NaN
    source   lab/scene.py
    compared nothing: it is the original
    """
    return scene
