"""A vision-language model as the reward: `--reward vlm@URL?model=NAME`, which rewards.py takes from
here, and eval.py's --judge, which shows it two pictures."""
import math
import os
import re
import sys
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import rewards  # noqa: E402
from rewards import Refused, UserError  # noqa: E402

RATE = """How well does this picture show the following text, and how good does it look,
from {low} to {high} (perfect)?
Text: {prompt}
Answer with one line of the form
Score: <number>"""
WHICH = """Two pictures, A and B, were made for this text: {prompt}
Which of them shows the text better and looks better? Answer with one line of the form
Answer: A
or Answer: B, or Answer: tie"""
ASK_YES = "Does this picture show the following text? Answer Yes or No.\nText: {prompt}"
FILTERED = re.compile(r"content.?(filter|policy|management)|moderation|safety|flagged|prohibited",
                      re.I)


class Vlm:
    """An OpenAI-compatible judge. silent: how many pictures got no opinion, because the reply held
    no score, or because a content filter refused the picture."""

    def __init__(self, address):
        parts = rewards.checked_url(f"vlm@{address}", address)
        query = dict(urllib.parse.parse_qsl(parts.query))
        known = {"model", "tokens", "yes", "question", "scale"}
        self.model = query.get("model")
        tokens = query.get("tokens", "1024")
        scale = re.fullmatch(r"(\d+)-(\d+)", query.get("scale", "0-10"))
        if not self.model or not tokens.isdecimal() or not scale or set(query) - known:
            raise UserError(f"reward 'vlm@{address}': name the model, vlm@http://host:port/v1?"
                            "model=NAME and, if you like, &tokens=1024, &yes=1, &question=FILE, "
                            "&scale=0-10")
        path = parts.path.rstrip("/") or "/v1"
        if not path.endswith("/chat/completions"):
            path += "/chat/completions"
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self.yes = query.get("yes") == "1"
        self.low = float(scale[1])
        self.high = float(scale[2])
        self.question = ASK_YES if self.yes else RATE
        if "question" in query:
            self.question = rewards.read_text(query["question"])
            if "{prompt}" not in self.question:
                raise UserError(f"{query['question']}: a question has {{prompt}} in it")
        self.silent = 0
        self.lock = threading.Lock()
        self.options = {"temperature": 0, "max_tokens": int(tokens)}
        if self.yes:
            self.options.update(max_tokens=1, logprobs=True, top_logprobs=20)
        elif "question" not in query:
            number = {"type": "number"}
            schema = {"type": "object", "properties": {"score": number}, "required": ["score"],
                      "additionalProperties": False}
            self.options["response_format"] = {"type": "json_schema", "json_schema": {
                "name": "score", "strict": True, "schema": schema}}

    def __call__(self, images, prompts):
        """list of PIL images, list of prompts -> list of floats; eight questions at a time."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.score, images, prompts))

    def post(self, content, options):
        """A message -> the first choice of the answer, {} where there is none.

        What an endpoint does not know (response_format, max_tokens, a temperature) is left out or
        said in its own words from then on. None: a content filter refused."""
        token = os.environ.get("VLM_TOKEN") or os.environ.get("OPENAI_API_KEY")
        message = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        while True:
            try:
                who = f"reward 'vlm' at {self.url}"
                answer = rewards.post_json(self.url, {**message, **options}, token, who)
                choices = answer.get("choices") if isinstance(answer, dict) else None
                choice = choices[0] if choices and isinstance(choices[0], dict) else {}
                return None if choice.get("finish_reason") == "content_filter" else choice
            except Refused as refusal:
                if FILTERED.search(refusal.text):
                    return None
                if refusal.status not in (400, 422):
                    raise
                if "response_format" in options and re.search("format|schema", refusal.text):
                    del options["response_format"]
                elif "max_tokens" in options and re.search("max_tokens|temperature", refusal.text):
                    options["max_completion_tokens"] = options.pop("max_tokens")
                    options.pop("temperature", None)
                else:
                    raise

    def first_is_better(self, prompt, a, b):
        """Two pictures of a prompt -> 1 for the first, 0 for the second, 0.5 for a tie, NaN for no
        answer."""
        content = [{"type": "text", "text": WHICH.format(prompt=prompt)}]
        for name, image in (("A", a), ("B", b)):
            content += [{"type": "text", "text": f"Picture {name}:"}, image_part(image)]
        options = {name: value for name, value in self.options.items() if "token" in name}
        reply = re.sub(r"[*_`]", "", text_of(self.post(content, options)))
        found = re.findall(r"answer\W*(a|b|tie)\b", reply, re.I)
        found = found or re.findall(r"^\W*(a|b|tie)\W*$", reply, re.I)
        said = found[-1].lower() if found else ""
        return {"a": 1.0, "b": 0.0, "tie": 0.5}.get(said, math.nan)

    def score(self, image, prompt):
        """One picture -> its score, or NaN; the first reply without one is shown."""
        question = self.question
        values = {"low": f"{self.low:g}", "high": f"{self.high:g}", "prompt": prompt}
        for name, value in values.items():
            question = question.replace(f"{{{name}}}", value)
        choice = self.post([image_part(image), {"type": "text", "text": question}], self.options)
        if choice is None:
            score = math.nan
        elif self.yes:
            score = self.probability_of_yes(choice)
        else:
            score = number_in(text_of(choice), self.low, self.high)
        if math.isnan(score):
            with self.lock:
                self.silent += 1
                first = self.silent == 1
            if first:
                shown = " ".join(text_of(choice).split())[:120]
                print(f"reward 'vlm': no score in the reply {shown!r}: no opinion", file=sys.stderr)
        return score

    def probability_of_yes(self, choice):
        """P(yes) / (P(yes) + P(no)) of the first token of a reply; NaN where neither is likely."""
        try:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            found = [(token["token"], math.exp(token["logprob"])) for token in tokens]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"reward 'vlm' at {self.url}: gives no top_logprobs, which yes=1 needs"
                            ) from None
        sums = {"yes": 0.0, "no": 0.0}
        for token, probability in found:
            word = re.sub(r"\W", "", token).lower()
            if word in sums:
                sums[word] += probability
        total = sums["yes"] + sums["no"]
        return sums["yes"] / total if total > 0 else math.nan


def text_of(choice):
    """The text of a choice; what a model thinks to itself (reasoning_content) is no answer."""
    message = choice.get("message") if choice else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def image_part(image):
    """PIL image -> the part of a message that shows it."""
    url = "data:image/jpeg;base64," + rewards.base64_image(image, "JPEG", quality=95)
    return {"type": "image_url", "image_url": {"url": url}}


def number_in(reply, low=0.0, high=10.0):
    """The score of a reply, or NaN where it is not beyond doubt: the number after `score` or
    `rating` (JSON or text), else the only one of a reply of at most five words. 7/10 is 7; a range,
    a percentage, two that differ, a number off the scale, unfinished thinking are none."""
    text = re.sub(r"<(think\w*|reason\w*)>.*?(</\1>|\Z)", " ", reply or "", flags=re.S | re.I)
    text = re.sub(r"\([^)]*\)|[*_`\"]", "", text)  # "Score (0-10): 8"
    text = re.sub(rf"\s*(/|out of)\s*{high:g}\b", "", re.sub(r"(?<=\d),(?=\d)", ".", text))
    number = r"([+-]?(?:\d+(?:\.\d+)?|\.\d+))(?!\s*[%/]|\s*(?:-|\u2013|to|or)\s*\d|\.?\d)"
    said = re.findall(rf"\b(?:score|rating)\b(?:\s+(?:is|of))?\W{{0,3}}?{number}", text, re.I)
    if not said and len(text.split()) <= 5 and len(re.findall(r"[\d.]*\d", text)) == 1:
        said = re.findall(rf"(?<![\w.,/-]){number}", text)
    value = float(said[0]) if len(set(map(float, said))) == 1 else math.nan
    return value if low <= value <= high else math.nan


def vlm(device="cpu", path=None):
    """A vision-language model asked for a number, at any OpenAI-compatible endpoint.

    model    the endpoint's
    licence  the endpoint's
    size     0
    scale    0 to 10, or &scale=1-5; with &yes=1 P(yes) of 0 to 1, almost without ties
    source   the questions are RATE and ASK_YES in this file, or &question=FILE with {prompt} in it
    compared nothing: the questions are ours
    path     the endpoint, as it is or without /chat/completions: vlm@http://host/v1?model=NAME,
             with &tokens=N the most tokens of a reply (1,024)
    """
    if not path:
        raise UserError("reward 'vlm': name the endpoint, vlm@http://host:port/v1?model=NAME")
    return Vlm(path)
