"""Stand-in for vLLM's server in the tests: the same routes over a Unix socket, and a real Llama, computed by numpy.

It is not vLLM. It imports neither vLLM nor torch nor this package, so that it starts in a fraction of a second, and
misbehaves as the file `fault` in the folder $STAND_IN tells it to. Like vLLM's CPU build it keeps a packed output layer
of its own, which only a folder that names `lm_head` replaces, and reports hashes of nothing for packed layers. It
writes every route that is called to the file `calls`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HERE = Path(os.environ["STAND_IN"])
PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "o_proj": "o_proj",
          "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}  # fmt: skip
LOCK = threading.Lock()


def fault(*names: str) -> str:
    """The argument of the fault in force if it is one of `names`, "yes" without one; empty if it is another or none."""
    path = HERE / "fault"
    name, _, argument = (path.read_text() if path.exists() else "").partition(" ")
    return (argument or "yes") if name in names else ""


class Llama:
    """Weights by name, and the log-probabilities that they give."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights: dict[str, np.ndarray] = {}
        self.label = "default"
        self.load(folder)

    def load(self, folder: Path) -> None:
        if fault("drops-loads"):
            return
        new = {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}
        if fault("loads-half"):
            new = dict([*new.items()][: len(new) // 2])
        if fault("keeps-old-head") and self.weights:
            new.pop("lm_head.weight")
        if name := fault("alters"):
            new[name] = new[name] * np.float32(1.001)
        if name := fault("alters-a-bit"):
            new[name] = np.nextafter(new[name], np.float32(9))
        if fault("alters-the-folder"):
            file = sorted(folder.glob("*.safetensors"))[0]
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        self.weights |= new

    def logprobs(self, tokens: list[int], temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities (n, V) after each token."""
        c, w = self.config, self.weights
        heads, shared, width = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
        size, n = c.get("head_dim") or width // heads, len(tokens)
        theta = (c.get("rope_parameters") or c).get("rope_theta", 10000.0)
        angles = np.outer(np.arange(n), theta ** (-np.arange(0, size, 2) / size))
        cos, sin = (np.tile(f(angles), 2)[:, None].astype(np.float32) for f in (np.cos, np.sin))
        hidden = w["model.embed_tokens.weight"][tokens]
        for layer in range(c["num_hidden_layers"]):
            own = {k.removeprefix(f"model.layers.{layer}."): v for k, v in w.items()}
            x = self._norm(hidden, own["input_layernorm.weight"])
            q, k, v = (
                (x @ own[f"self_attn.{p}_proj.weight"].T).reshape(n, -1, size).astype(np.float32)
                for p in ("q", "k", "v")
            )
            q, k = (a * cos + np.concatenate([-a[..., size // 2 :], a[..., : size // 2]], -1) * sin for a in (q, k))
            k, v = (a.repeat(heads // shared, 1) for a in (k, v))
            scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size) + np.triu(np.full((n, n), -np.inf), 1)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v).reshape(n, -1)
            hidden = hidden + mixed @ own["self_attn.o_proj.weight"].T
            x = self._norm(hidden, own["post_attention_layernorm.weight"])
            gate = x @ own["mlp.gate_proj.weight"].T
            up = x @ own["mlp.up_proj.weight"].T
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ own["mlp.down_proj.weight"].T
        logits = self._norm(hidden, w["model.norm.weight"]) @ w["lm_head.weight"].T / (temperature or 1.0)
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * weight

    def checksums(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, array in self.weights.items():
            parts = [PACKED.get(part, part) for part in name.split(".")]
            packed = any(part in PACKED.values() for part in parts)
            if name != "lm_head.weight":
                digest = hashlib.sha256(b"" if packed else np.ascontiguousarray(array).tobytes()).hexdigest()
                found["dp0:pp0:pcp0:tp0:" + ".".join(parts)] = digest
        return found

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        params, tokens = body["sampling_params"], list(body["token_ids"])
        out, content = [], []
        draw = np.random.default_rng(params["seed"])
        for _ in range(params["max_tokens"]):
            logp = self.logprobs(tokens, params["temperature"])[-1]
            chosen = int(np.argmax(logp + draw.gumbel(size=len(logp)) * (params["temperature"] > 0)))
            out.append(chosen)
            tokens.append(chosen)
            content.append({"token_id": chosen, "logprob": float(logp[chosen])})
            if chosen in params.get("stop_token_ids", ()):
                break
        spans = [{"version": self.label, "start": 0, "end": len(out)}]
        reply: dict[str, Any] = {"token_ids": out, "logprobs": {"content": content}, "weight_versions": spans}
        if "stop_token_ids" in params:  # a completion, not a probe
            _spoil(reply)
        rows = [None]
        if "prompt_logprobs" in params:
            after = self.logprobs(body["token_ids"])
            rows += [{str(t): {"logprob": float(row[t])}} for row, t in zip(after, body["token_ids"][1:], strict=False)]
        return {"choices": [reply], "prompt_logprobs": rows}


def _spoil(reply: dict[str, Any]) -> None:
    content = reply["logprobs"]["content"]
    if fault("answers-from-other-weights"):
        reply["weight_versions"][0]["version"] = "0-0123456789abcdef"
    if fault("changes-weights-within"):
        reply["weight_versions"].append({"version": "9-0123456789abcdef", "start": 1, "end": 2})
    if fault("names-no-weights"):
        reply["weight_versions"] = None
    if fault("has-no-logprob"):
        content[0]["logprob"] = -9999.0
    if fault("names-other-tokens"):
        content[0]["token_id"] = (content[0]["token_id"] + 1) % 64
    if fault("stops-early"):
        reply["token_ids"], reply["logprobs"]["content"] = [5], [{"token_id": 5, "logprob": -1.0}]
    if fault("answers-nothing"):
        del reply["token_ids"]


def _die_at(route: str) -> None:
    if fault("dies-at") == route:
        (HERE / "fault").unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class Routes(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    generated = 0

    def log_message(self, format: str, *args: object) -> None:
        """Logs no requests."""

    def do_GET(self) -> None:
        _die_at(self.path)
        self._answer({"/health": None, "/weight_info": {"weight_version": MODEL.label}}[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK, (HERE / "calls").open("a") as calls:
            calls.write(f"{self.path}\n")
        route = self.path.partition("?")[0]
        _die_at(route)
        if route == "/inference/v1/generate":
            with LOCK:
                Routes.generated += "stop_token_ids" in body["sampling_params"]
                if (after := fault("dies-once", "dies")) and Routes.generated >= int(after):
                    if fault("dies-once"):
                        (HERE / "fault").unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault("fails"):
                    return self._answer({"error": "EngineCore encountered an issue"}, 500)
                if fault("refuses"):
                    return self._answer({"error": "no such thing"}, 400)
                return self._answer(MODEL.generate(body))
        if route == "/collective_rpc":
            MODEL.load(Path(body["kwargs"]["weights_path"]))
        if route == "/update_weight_version" and not fault("states-old-version"):
            MODEL.label = body["new_version"]
        replies = {"/reset_prefix_cache": {"success": True}, "/weight_checker": {"checksums": MODEL.checksums()}}
        self._answer(replies.get(route, {}))

    def _answer(self, reply: Any, status: int = 200) -> None:
        data = b"" if reply is None else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads, request_queue_size = True, 128


if __name__ == "__main__":
    if sys.argv[1] == "-c":  # asks for the version of vLLM
        print("0.0-stand-in")
        sys.exit()
    if fault("cannot-start"):
        raise ValueError("there is no such model")
    if fault("never-answers"):
        time.sleep(600)
    MODEL = Llama(Path(sys.argv[sys.argv.index("--model") + 1]))
    Server(sys.argv[sys.argv.index("--uds") + 1], Routes).serve_forever()
