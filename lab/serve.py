"""Serves a reward over HTTP, for a model that needs libraries or a card of its own:

    python rewards.py serve NAME [--port 8000] [--host 127.0.0.1]     guarded by REWARD_TOKEN

and here --reward http://127.0.0.1:8000.
"""
import base64
import contextlib
import hmac
import io
import json
import math
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import rewards  # noqa: E402
from rewards import UserError  # noqa: E402

MAX_BODY = 256 * 2 ** 20  # bytes of a request


class Handler(BaseHTTPRequestHandler):
    """POST /score {"prompts": [...], "images": [base64 PNG, JPEG or WebP, ...]} -> {"scores":
    [number or null, ...]}; GET /health -> {"name": ...}; what is wrong -> {"error": one line}."""
    timeout = 60  # seconds of silence that a client may keep the server waiting

    def log_message(self, *_):
        """Quiet."""

    def answer(self, code, value):
        """Send a JSON value."""
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        """Health."""
        if self.path == "/health":
            return self.answer(200, {"name": self.server.reward.name})
        self.answer(404, {"error": "not found"})

    def do_POST(self):
        """Score."""
        token = self.server.token
        given = self.headers.get("Authorization", "")
        length = self.headers.get("Content-Length", "")
        try:
            if not length.isdecimal() or len(length) > 15 or int(length) > MAX_BODY:
                text = f"a body of {length or 'unknown'} bytes, at most {MAX_BODY}"
                return self.answer(413, {"error": text})
            body = self.rfile.read(int(length))
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return self.answer(401, {"error": "wrong or missing bearer token"})
            if self.path != "/score":
                return self.answer(404, {"error": "not found: POST /score or GET /health"})
            self.answer(*self.scores(body))
        except OSError:  # the client left, or fell silent
            self.close_connection = True

    def scores(self, body):
        """JSON bytes -> HTTP status, answer; null stands for NaN."""
        try:
            request = json.loads(body)
            prompts, texts = request["prompts"], request["images"]
            if len(prompts) != len(texts) or not all(isinstance(text, str) for text in prompts):
                raise ValueError(f"{len(prompts)} prompts, {len(texts)} images")
            files = [io.BytesIO(base64.b64decode(text, validate=True)) for text in texts]
            images = [rewards.read_picture(file, ("PNG", "JPEG", "WEBP")) for file in files]
        except (ValueError, KeyError, TypeError, RecursionError, UserError) as error:
            expected = '{"prompts": [text, ...], "images": [base64 of a PNG, JPEG or WebP, ...]}'
            return 400, {"error": f"expected {expected} ({rewards.one_line(error)})"}
        try:
            scores = self.server.reward(images, prompts).tolist()
        except Exception as error:
            return 500, {"error": rewards.one_line(error)}
        return 200, {"scores": [None if math.isnan(score) else score for score in scores]}


def server(reward, host, port, token=None):
    """A bound HTTP server for a Reward, which answers in the thread that calls serve_forever().

    UserError: several parts, which are z-scored over a prompt's candidates, at the client."""
    if len(reward.parts) > 1:
        raise UserError(f"serve one reward at a time, not {reward.name!r}: combine at the client")
    try:
        bound = HTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on {host}:{port}: {rewards.one_line(error)}") from None
    bound.reward = reward
    bound.token = token
    return bound


def serve(reward, args):
    """Serve a reward at args.host, args.port until interrupted."""
    bound = server(reward, args.host, args.port, os.environ.get("REWARD_TOKEN"))
    print(f"serving {reward.name} at http://{args.host}:{bound.server_port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        bound.serve_forever()
    bound.server_close()
