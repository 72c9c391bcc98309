"""README's first commands at a hub on this machine, whose repositories are tiny.

    python -m pytest -q -n 2 lab/test_hub.py
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import pytest  # noqa: E402
import torch  # noqa: E402

import drpo  # noqa: E402
import rewards  # noqa: E402

from test_drpo import TINY, models  # noqa: E402, F401
from test_rewards import clip_folder, running  # noqa: E402


class Hub(BaseHTTPRequestHandler):
    """Repositories in folders, as the hub serves them: HEAD and GET of files with ETag, commit and
    Range, and the list of a repository's files. server.broken: files whose connection breaks once
    in the middle."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Quiet."""

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((self.command, path))
        listed = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/\w+)?", path)
        file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path)
        repo = (listed or file or [None, ""])[1]
        if repo in hub.gated:
            return self.reply(401, b"{}", X_Error_Code="GatedRepo",
                              X_Error_Message="Access is restricted")
        folder = hub.folder / repo
        if not repo or not folder.is_dir():
            return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        if listed:
            files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
            siblings = [{"rfilename": str(f.relative_to(folder)), "size": f.stat().st_size}
                        for f in files]
            body = {"id": repo, "modelId": repo, "sha": "a" * 40, "siblings": siblings, "tags": [],
                    "private": False}
            return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
        if not (folder / file[2]).is_file():
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit="a" * 40)
        data = (folder / file[2]).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": "a" * 40,
                   "Accept_Ranges": "bytes"}
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if first:
            rest = data[int(first[1]):]
            headers["Content_Range"] = f"bytes {first[1]}-{len(data) - 1}/{len(data)}"
            hub.resumed.append(file[2])
            return self.reply(206, rest, **headers)
        if self.command == "GET" and file[2] in hub.broken:
            hub.broken.discard(file[2])
            self.send_response(200)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[:len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            return None
        return self.reply(200, data, **headers)

    do_HEAD = do_GET


@pytest.fixture
def hub(models, tmp_path):
    """A hub with SD-Turbo and SDXL-Turbo of tiny size, in both precisions, with what else lies
    beside them, and CLIP."""
    for kind, name in (("sd", "sd-turbo"), ("sdxl", "sdxl-turbo")):
        folder = tmp_path / "hub" / "stabilityai" / name
        shutil.copytree(models / kind, folder)
        for file in list(folder.rglob("*.safetensors")):
            shutil.copy(file, file.with_name(file.name.replace(".safetensors",
                                                               ".fp16.safetensors")))
            shutil.copy(file, file.with_suffix(".bin"))
        (folder / "sd_turbo.safetensors").write_bytes(b"the single-file checkpoint")
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "model.safetensors").write_bytes(b"not used")
        index = json.loads((folder / "model_index.json").read_text())
        index.update(safety_checker=[None, None], feature_extractor=[None, None])
        (folder / "model_index.json").write_text(json.dumps(index))
    clip = tmp_path / "hub" / "openai" / "clip-vit-large-patch14"
    clip.mkdir(parents=True)
    clip_folder(clip)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tmp_path / "hub"
    server.asked, server.resumed = [], []
    server.gated, server.broken = set(), set()
    with running(server) as (_, url):
        server.url = url
        yield server


def on_hub(hub, *argv, script="drpo.py", **env):
    """A program of ours in a process of its own, whose hub is this one."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(hub.folder.parent / "cache"),
           "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1", **env}
    return subprocess.run([sys.executable, str(HERE.parent / script), *map(str, argv)],
                          cwd=hub.folder.parent, env=env, text=True, capture_output=True)


XL = "stabilityai/stable-diffusion-xl-base-1.0"
ONE_STEP_UNETS = [
    ("tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin", ["--timestep", "399"]),
    ("ByteDance/SDXL-Lightning/sdxl_lightning_1step_unet_x0.safetensors",
     ["--prediction", "sample"])]


class TestAHubInABox:
    """README's commands as a stranger's first start, at a hub of tiny repositories."""

    def test_first_start_resume_eval_and_offline(self, hub):
        """What is used is fetched, once, with a line before and after; then nothing is asked of the
        hub's files."""
        done = on_hub(hub, "--model", "sd-turbo", "--watch", "clip", "--out", "sd", *TINY)
        assert done.returncode == 0, done.stderr
        for repo in ("stabilityai/sd-turbo", "openai/clip-vit-large-patch14"):
            assert f"fetching {repo}, " in done.stderr
            assert f"fetched {repo}" in done.stderr
        fetched = {path.split("/resolve/main/")[1] for command, path in hub.asked
                   if command == "GET" and "sd-turbo/resolve/" in path}
        weights = {name for name in fetched if name.endswith((".safetensors", ".bin"))}
        assert weights == {"unet/diffusion_pytorch_model.fp16.safetensors",
                           "vae/diffusion_pytorch_model.fp16.safetensors",
                           "text_encoder/model.fp16.safetensors"}
        hub.asked.clear()
        done = on_hub(hub, "--resume", "sd", "--steps", "2")
        assert done.returncode == 0, done.stderr
        assert "fetch" not in done.stderr
        done = on_hub(hub, "sd", "--limit", 1, "--samples", 1, "--prompts", "animals",
                      script="eval.py", HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        assert not [path for command, path in hub.asked if command == "GET" and "/resolve/" in path]

    def test_sdxl_turbo(self, hub):
        done = on_hub(hub, "--model", "sdxl-turbo", "--out", "xl", *TINY)
        assert done.returncode == 0, done.stderr
        assert (hub.folder.parent / "xl" / drpo.LORA_FILE).exists()

    @pytest.mark.parametrize("file,flags", ONE_STEP_UNETS)
    def test_one_step_unets_in_the_place_of_the_base_s(self, file, flags, hub, models):
        """README's lines: SDXL base has a leading schedule; its own UNet is not fetched; the LoRA
        says where it belongs."""
        base = hub.folder / XL
        shutil.copytree(models / "sdxl", base)
        scheduler = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
        scheduler.update(_class_name="EulerDiscreteScheduler", timestep_spacing="leading",
                         steps_offset=1)
        (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        (hub.folder / file).parent.mkdir(parents=True)
        weights = models / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors"
        if file.endswith(".bin"):
            torch.save(rewards.read_weights(weights), hub.folder / file)
        else:
            shutil.copy(weights, hub.folder / file)
        done = on_hub(hub, "--model", XL, "--unet", file, *flags, "--out", "xl", *TINY)
        assert done.returncode == 0, done.stderr
        assert not [path for command, path in hub.asked if command == "GET"
                    and "/unet/diffusion" in path]
        metadata = drpo.read_lora(hub.folder.parent / "xl")[1]
        assert (metadata["drpo_base"], metadata["unet"]) == (XL, file)
        assert ("--timestep" in flags) == (metadata["timestep"] != "-1")
        if "DMD2" in file:
            done = on_hub(hub, "xl", "--limit", 1, "--samples", 1, "--prompts", "animals",
                          script="eval.py", HF_HUB_OFFLINE="1")
            assert done.returncode == 0, done.stderr

    def test_what_goes_wrong_is_one_line(self, hub):
        hub.gated.add("stabilityai/sdxl-turbo")
        (hub.folder / "stabilityai" / "sd-turbo" / "vae" / "config.json").unlink()
        for argv, words in ((["--model", "sdxl-turbo"], "hf auth login"),
                            (["--model", "nobody/nothing"], "does not exist"),
                            (["--model", "sd-turbo"], "could not be read")):
            done = on_hub(hub, *argv, *TINY)
            assert done.returncode == 2, done.stderr
            assert words in done.stderr.strip().splitlines()[-1]
            assert "Traceback" not in done.stderr
        offline = on_hub(hub, "--model", "sd-turbo", *TINY, HF_HUB_OFFLINE="1",
                         HF_HOME=str(hub.folder / "empty"))
        assert offline.returncode == 2
        assert "--model toy" in offline.stderr
