"""Holds vllm.py, sglang.py and vllm-s3.sh to the calls they must make, against a
fake engine on loopback: python3 deploy/inference/test_engines.py"""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import unittest
import urllib.parse

HERE = pathlib.Path(__file__).resolve().parent


class Engine(http.server.ThreadingHTTPServer):
    """Records calls; answers those in `replies` as told and all others with 200."""

    def __init__(self, replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls, self.replies, self.tokens = [], replies, set()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        u = urllib.parse.urlsplit(self.path)
        self.server.calls.append((u.path, urllib.parse.parse_qs(u.query), json.loads(body) if body else None))
        self.server.tokens.add(self.headers.get("Authorization"))
        status, answer = self.server.replies.get(u.path, (200, b"{}"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def run(script, url, **more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRAINERD_", "VLLM", "SGLANG"))}
    env |= {"TRAINERD_DIR": "/models/policy", "TRAINERD_JOB": "job-1", "TRAINERD_STEP": "7"} | more
    return subprocess.run([sys.executable, HERE / script, *([url] if url else [])], env=env, capture_output=True, text=True, timeout=60)


SLEEP = ("/sleep", {"level": ["2"]}, None)
WEIGHTS = ("/wake_up", {"tags": ["weights"]}, None)
READ = ("/collective_rpc", {}, {"method": "reload_weights", "kwargs": {"weights_path": "/models/policy"}})
CACHE = ("/wake_up", {"tags": ["kv_cache"]}, None)
RESET = ("/reset_prefix_cache", {}, None)
PAUSE = ("/pause_generation", {}, {"mode": "retract"})
UPDATE = ("/update_weights_from_disk", {}, {"model_path": "/models/policy", "weight_version": "job-1@7", "flush_cache": True})
CONTINUE = ("/continue_generation", {}, {})
TAKEN = {"/update_weights_from_disk": (200, b'{"success": true, "message": "ok"}')}


class Engines(unittest.TestCase):
    def check(self, script, replies, calls, code, says="", **env):
        with Engine(replies) as e:
            r = run(script, e.url, **env)
        self.assertEqual(e.calls, calls, r.stderr)
        self.assertEqual(r.returncode, code, r.stderr)
        self.assertIn(says, r.stdout + r.stderr)
        return e

    def test_vllm(self):
        self.check("vllm.py", {}, [SLEEP, WEIGHTS, READ, CACHE, RESET], 0, "step 7")
        e = self.check("vllm.py", {}, [SLEEP, WEIGHTS, READ, CACHE, RESET], 0, VLLM_API_KEY="k")
        self.assertEqual(e.tokens, {"Bearer k"})

    def test_vllm_fails(self):
        self.check("vllm.py", {"/collective_rpc": (500, b"no such file")}, [SLEEP, WEIGHTS, READ], 1, "no such file")
        self.check("vllm.py", {"/sleep": (404, b"not found")}, [SLEEP], 1, "404")

    def test_sglang(self):
        self.check("sglang.py", TAKEN, [PAUSE, UPDATE, CONTINUE], 0, "step 7")
        e = self.check("sglang.py", TAKEN, [PAUSE, UPDATE, CONTINUE], 0, SGLANG_API_KEY="k")
        self.assertEqual(e.tokens, {"Bearer k"})

    def test_sglang_fails(self):
        for status, answer in ((200, b'{"success": false, "message": "shapes differ"}'), (400, b"shapes differ"), (200, b"shapes differ")):
            self.check("sglang.py", {"/update_weights_from_disk": (status, answer)}, [PAUSE, UPDATE, CONTINUE], 1, "shapes differ")
        self.check("sglang.py", {"/pause_generation": (503, b"starting")}, [PAUSE], 1, "starting")

    def test_usage_and_absence(self):
        for script in ("vllm.py", "sglang.py"):
            self.assertEqual(run(script, None).returncode, 1)
            with Engine({}) as e:
                gone = e.url
            r = run(script, gone)
            self.assertEqual(r.returncode, 1)
            self.assertIn("refused", r.stderr)
        self.assertIn("TRAINERD_DIR", subprocess.run([sys.executable, HERE / "vllm.py", "http://127.0.0.1:1"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True).stderr)

    def test_vllm_s3(self):
        def start(*args, **env):
            env = {"PATH": os.environ["PATH"], "VLLM": "echo"} | env
            return subprocess.run(["sh", HERE / "vllm-s3.sh", *args], env=env, capture_output=True, text=True)

        r = start("s3://b/p/", "job-1", "42", "--max-model-len", "512")
        self.assertEqual(r.stdout, "serve s3://b/p/jobs/job-1/checkpoints/00000042-0/hf --load-format runai_streamer --max-model-len 512\n", r.stderr)
        self.assertIn("00000042-3/hf", start("s3://b", "job-1", "42", TRAINERD_ATTEMPT="3").stdout)
        for args in (("s3://b", "job-1"), ("dir:x", "job-1", "1"), ("s3://b", "job-1", "latest")):
            r = start(*args)
            self.assertEqual((r.returncode, r.stdout), (2, ""), r.stderr)


if __name__ == "__main__":
    unittest.main()
