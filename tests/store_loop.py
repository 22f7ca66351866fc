"""A training loop small enough to be killed hundreds of times, and a server that forks, kills and resumes it.

The server imports torch once and forks a fresh process for each life of the loop. It reads one JSON request per line:
`{"folder", "failpoint", "kill_after"}`, and answers with how that process ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from posttrain.rng import key, uniforms
from posttrain.store import checkpoint, failpoints
from posttrain.store.failpoints import failpoint
from posttrain.store.run import EpisodeRow, Event, Run
from posttrain.types import Episode, Span

STEPS, EVERY, KEEP, SEED = 6, 2, 2, 7


def episode(step: int, index: int, weights: torch.Tensor) -> Episode:
    """An attempt whose tokens depend on the weights, so a wrong resume cannot go unseen."""
    draws = uniforms(key(SEED, "tokens", step, index), 5) + float(weights.sum())
    tokens, logprobs = (draws * 1000).astype(np.int64), -draws.astype(np.float32)
    spans = (Span("prompt", np.array([1, 2])), Span("model", tokens, logprobs))
    return Episode(
        f"task-{index}", 0, index, spans, f"answer {draws[0]}", float(draws[1]), parts={"a": float(draws[2])}
    )


def train(folder: Path) -> None:
    """Momentum SGD from wherever the folder left off to STEPS, with every failpoint of a real loop."""
    run = Run.open(folder) if (folder / "run.json").exists() else Run.create(folder, {"algorithm": "toy", "seed": SEED})
    saved = checkpoint.latest(folder)
    if saved is None:
        tensors, state = {"model": {"w": torch.ones(4, 4)}, "optim": {"w": torch.zeros(4, 4)}}, {"step": 0, "kl": 0.5}
    else:
        tensors, state = checkpoint.load(saved)
        run.note(saved.step, Event("info", "resumed", f"resumed from step {saved.step} by {os.getpid()}"))
    weights, momentum = tensors["model"]["w"], tensors["optim"]["w"]
    for step in range(state["step"], STEPS):
        failpoint("step:start")
        started = time.monotonic()
        rows = [EpisodeRow.of("train", step, episode(step, i, weights), "question", 0.5) for i in range(4)]
        failpoint("step:rollouts-done")
        noise = torch.tensor(uniforms(key(SEED, "gradient", step), 16), dtype=torch.float32).reshape(4, 4)
        momentum.mul_(0.9).add_(weights @ noise)
        weights.sub_(0.01 * momentum)
        state = {"step": step + 1, "kl": state["kl"] * 1.1}
        failpoint("step:updated")
        metrics = {"loss": float(weights.square().mean()), "kl": state["kl"], "undefined": float("nan")}
        events = [Event("warning", "flat", f"step {step} was flat")] if step % 3 == 0 else []
        failpoint("step:before-store")
        run.write(step, metrics, {"seconds": time.monotonic() - started}, rows, events)
        failpoint("step:after-store")
        if (step + 1) % EVERY == 0:
            failpoint("step:before-checkpoint")
            checkpoint.save(folder, step + 1, {"model": {"w": weights}, "optim": {"w": momentum}}, state, KEEP)
            failpoint("step:after-checkpoint")
    run.finish({"loss": float(weights.square().mean())})
    run.close()


def _life(request: dict[str, str]) -> None:
    os.environ[failpoints.VARIABLE] = request.get("failpoint") or ""
    try:
        train(Path(request["folder"]))
        Path(request["folder"] + ".hits").write_text(json.dumps(failpoints.hits))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def serve() -> None:
    """Answers requests until the input closes."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _life(request)
        if request.get("kill_after") is not None:
            time.sleep(request["kill_after"])
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(code), flush=True)


if __name__ == "__main__":
    serve()
