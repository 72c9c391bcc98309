"""A person as the reward: a page shows a prompt and its pictures, clicks say which are best, worst.

    python drpo.py --model toy --reward lab/person.py:Person --batch 2 --candidates 12 \\
        --anchors 3 --steps 30 --preview-every 1

prints an address of this machine with a token in it; open it in a browser. The first click on a
picture marks it best, a second one worst, a third takes the mark away; keys 1 to 9 do the same for
the first nine. Enter sends, u undoes the last mark, s skips the prompt (no opinion). Beside stands
the newest preview of the run: the same noise through the base, above, and the tuned model, below.
Best scores 1, worst -1, the others 0. Answers are kept in the run's folder, answers.jsonl: a step
that --resume makes again does not ask again.
"""
import hashlib
import io
import json
import math
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = """<!doctype html><meta charset="utf-8"><title>Which is best?</title>
<style>
body { font: 16px system-ui, sans-serif; margin: 1.2em; background: #fafafa; color: #22262e }
#pictures { display: flex; flex-wrap: wrap; gap: 10px }
figure { margin: 0; padding: 5px; border: 5px solid #ddd; border-radius: 6px }
figure { cursor: pointer }
figure.best { border-color: #2a9d4e } figure.worst { border-color: #d43d3d }
figure img { width: 190px; display: block; image-rendering: pixelated }
#side img { max-width: 100%; image-rendering: pixelated }
button { font-size: 1em; margin-right: 8px }
</style>
<h2 id="prompt">waiting for the first pictures ...</h2>
<p>click: best (green), again: worst (red), again: neither.
Keys 1-9, Enter sends, u undoes, s skips.
<span id="count"></span></p>
<p><button onclick="send(false)">send (Enter)</button><button onclick="undo()">undo (u)</button>
<button onclick="send(true)">skip (s)</button></p>
<div id="pictures"></div><div id="side"></div>
<script>
const token = new URLSearchParams(location.search).get("token");
let number = null, marks = [], history = [];
const at = path => path + (path.includes("?") ? "&" : "?") + "token=" + token;
function show() {
  document.querySelectorAll("figure").forEach((figure, i) =>
    figure.className = marks[i] > 0 ? "best" : marks[i] < 0 ? "worst" : "");
}
function mark(i) {
  if (i >= marks.length) return;
  history.push([i, marks[i]]);
  marks[i] = marks[i] > 0 ? -1 : marks[i] < 0 ? 0 : 1;
  show();
}
function undo() { if (history.length) { const [i, old] = history.pop(); marks[i] = old; show(); } }
async function send(skip) {
  if (number === null) return;
  const body = JSON.stringify({number, marks: skip ? null : marks});
  number = null;
  await fetch(at("/answer"), {method: "POST", body});
  document.getElementById("prompt").textContent = "thank you; the next pictures are being made ...";
  document.getElementById("pictures").replaceChildren();
}
onkeydown = e => {
  if (e.key === "Enter") { e.preventDefault(); send(false); }
  else if (e.key === "u") undo();
  else if (e.key === "s") send(true);
  else if (e.key >= "1" && e.key <= "9") mark(e.key - 1);
};
async function poll() {
  try {
    const task = await (await fetch(at("/task"))).json();
    document.getElementById("count").textContent = task.count;
    if (task.number !== null && task.number !== number) {
      number = task.number; marks = Array(task.pictures).fill(0); history = [];
      document.getElementById("prompt").textContent = task.prompt;
      document.getElementById("pictures").replaceChildren(...marks.map((_, i) => {
        const figure = document.createElement("figure"), picture = new Image();
        picture.src = at(`/picture?number=${number}&i=${i}`);
        figure.append(picture); figure.onclick = () => mark(i);
        return figure;
      }));
      document.getElementById("side").innerHTML = task.preview
        ? "<h3>the same noise: base above, tuned below</h3>"
          + `<img src="${at("/preview?n=" + number)}">` : "";
    }
  } catch (error) { document.getElementById("count").textContent = "the run has ended or is away"; }
  setTimeout(poll, 400);
}
poll();
</script>"""


class Handler(BaseHTTPRequestHandler):
    """The page, its pictures, and the answers; everything wants the token."""

    def log_message(self, *_):
        """Quiet."""

    def reply(self, status, body, kind="application/json"):
        """Send bytes."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def known(self):
        """The path and the query of a request with the right token, else None."""
        path, _, query = self.path.partition("?")
        fields = dict(pair.partition("=")[::2] for pair in query.split("&"))
        if not secrets.compare_digest(fields.get("token", "").encode(), self.server.token.encode()):
            self.reply(403, b'{"error": "wrong or missing token"}')
            return None
        return path, fields

    def do_GET(self):
        """Page, task, pictures."""
        found = self.known()
        if found is None:
            return
        person = self.server.person
        path, fields = found
        task = person.task
        try:
            if path == "/":
                self.reply(200, PAGE.encode(), "text/html; charset=utf-8")
            elif path == "/task":
                self.reply(200, json.dumps(person.description()).encode())
            elif path == "/picture" and task and fields["number"] == str(task["number"]):
                self.reply(200, task["files"][int(fields["i"])], "image/png")
            elif path == "/preview" and person.preview():
                self.reply(200, person.preview().read_bytes(), "image/png")
            else:
                self.reply(404, b'{"error": "not found"}')
        except (KeyError, ValueError, IndexError):
            self.reply(404, b'{"error": "not found"}')

    def do_POST(self):
        """An answer: {"number": of the task, "marks": one of 1, 0, -1 a picture, or null}."""
        found = self.known()
        if found is None:
            return
        try:
            length = int(self.headers.get("Content-Length", 0))
            answer = json.loads(self.rfile.read(min(length, 10**6)))
            taken = self.server.person.take(answer["number"], answer["marks"])
        except (ValueError, KeyError, TypeError):
            taken = False
        self.reply(200 if taken else 409, json.dumps({"taken": taken}).encode())


class Person:
    """reward(images, prompts): asks for one prompt after the other, and waits for the answers."""

    run_folder = None  # set by the run

    def __init__(self):
        self.task = None
        self.answered = threading.Event()
        self.kept = None
        self.times = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.person, self.server.token = self, secrets.token_urlsafe(16)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/?token={self.server.token}"
        print(f"judge the pictures at {self.address}", flush=True)

    def __call__(self, images, prompts):
        """list of PIL images, list of prompts -> 1 for best, -1 for worst, 0, or NaN (skipped)."""
        scores = [math.nan] * len(images)
        for prompt in dict.fromkeys(prompts):
            index = [i for i, other in enumerate(prompts) if other == prompt]
            marks = self.ask(prompt, [images[i] for i in index])
            for i, score in zip(index, marks):
                scores[i] = score
        return scores

    def ask(self, prompt, images):
        """One prompt -> its scores, from answers.jsonl if these pictures were judged before."""
        files = []
        for image in images:
            file = io.BytesIO()
            image.convert("RGB").save(file, "PNG")
            files.append(file.getvalue())
        digest = hashlib.sha256(b"".join([prompt.encode(), *files])).hexdigest()
        known = self.answers()
        if digest not in known:
            began = time.monotonic()
            self.answered.clear()
            self.marks = None
            self.task = {"number": len(self.times), "prompt": prompt, "files": files}
            while not self.answered.wait(0.2):  # in short waits: Ctrl-C is heard
                pass
            self.times.append(time.monotonic() - began)
            known[digest] = self.marks
            if self.run_folder:
                with open(Path(self.run_folder) / "answers.jsonl", "a") as f:
                    line = {"pictures": digest, "prompt": prompt, "marks": self.marks}
                    f.write(json.dumps(line) + "\n")
        marks = known[digest]
        return [math.nan] * len(images) if marks is None else marks

    def answers(self):
        """{digest of prompt and pictures: marks} of this run so far."""
        if self.kept is None:
            self.kept = {}
            file = Path(self.run_folder or "/nowhere") / "answers.jsonl"
            for line in file.read_text().splitlines() if file.exists() else ():
                answer = json.loads(line)
                self.kept[answer["pictures"]] = answer["marks"]
        return self.kept

    def take(self, number, marks):
        """An answer from the page; False if it is of another task or no list of marks."""
        task = self.task
        if task is None or number != task["number"]:
            return False
        if marks is not None and (len(marks) != len(task["files"]) or set(marks) - {1, 0, -1}):
            return False
        self.marks = marks
        self.task = None
        self.answered.set()
        return True

    def preview(self):
        """The newest preview of the run, or None."""
        shots = sorted(Path(self.run_folder or "/nowhere").glob("samples/step-*.png"))
        return shots[-1] if shots else None

    def description(self):
        """What the page shows."""
        task = self.task
        seconds = sum(self.times) / len(self.times) if self.times else 0
        count = f"{len(self.times)} prompts judged, {seconds:.0f} s each"
        found = {"number": None, "count": count, "preview": self.preview() is not None}
        if task:
            found.update(number=task["number"], prompt=task["prompt"], pictures=len(task["files"]))
        return found
