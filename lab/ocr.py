"""A reward of one's own in 25 lines: is the text that the prompt puts in quotes in the picture?

    apt install tesseract-ocr
    python drpo.py --model sd-turbo --reward lab/ocr.py:TextInPicture --prompts my_prompts.txt

As in flow_grpo (github.com/yifan123/flow_grpo, ac4c86e8): 1 - edit distance / length of the text;
letters alone count, not case or spaces. Where the reader fails, or nothing is quoted: NaN.
"""
import math
import re
import subprocess
import tempfile


def distance(a, b):
    """Levenshtein's edit distance of two texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def tesseract(image):
    """PIL image -> the text that tesseract reads in it."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        image.resize((image.width * 2, image.height * 2)).save(file.name)
        command = ["tesseract", file.name, "-", "--psm", "11"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class TextInPicture:
    """reward(images, prompts) -> 0 to 1, NaN = no opinion."""

    def __init__(self, read=tesseract):
        self.read = read

    def __call__(self, images, prompts):
        return [self.score(image, prompt) for image, prompt in zip(images, prompts)]

    def score(self, image, prompt):
        """One picture."""
        wanted = "".join(re.findall(r'"([^"]+)"', prompt)).lower().replace(" ", "")
        try:
            found = re.sub(r"\s", "", self.read(image)).lower()
        except (OSError, subprocess.CalledProcessError):
            return math.nan
        if not wanted:
            return math.nan
        if wanted in found:
            return 1.0
        return 1 - min(distance(found, wanted), len(wanted)) / len(wanted)
