"""Checks of `posttrain doctor`: device, matrix-product speed by dtype, sandbox tiers, hub access; a cluster."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import time
from collections.abc import Callable, Mapping
from typing import TypedDict
from urllib.parse import urlparse

import torch
import torch.nn.functional as F

from posttrain import __version__, config
from posttrain.models.kernels.build import library, why_not
from posttrain.rewards.sandbox.pool import probe
from posttrain.rollout.products import product_of

WIDTH = 1024  # width of the weight whose products are timed


class Fact(TypedDict):
    """A fact about the machine; `ok` says whether it is as it should be, None for a plain fact."""

    name: str
    value: object
    ok: bool | None


def measure_machine() -> list[Fact]:
    """All findings, in display order. Takes a few seconds."""
    return [*_software(), *_speed(), *_sandbox(), _hub()]


def measure_cluster(settings: Mapping[str, str]) -> list[Fact]:
    """What the workers of a cluster with these settings of a GRPO recipe say, in display order."""
    from posttrain.cluster import checkup

    learners = max(2, int(settings.get("cluster.learners", "2")))
    recipe = config.resolve("grpo", {}, {"train.lanes": learners, **settings})
    return [_fact(name, value, ok) for name, value, ok in checkup.check(recipe)]


def _fact(name: str, value: object, ok: bool | None = None) -> Fact:
    return {"name": name, "value": value, "ok": ok}


def _software() -> list[Fact]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; everything runs on the CPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        _fact("posttrain", f"{__version__} on Python {platform.python_version()}, torch {torch.__version__}"),
        _fact("CPU", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {memory:.0f} GiB memory"),
        _fact("torch threads", torch.get_num_threads()),
        _fact("GPU", gpu),
    ]


def _speed() -> list[Fact]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[Fact] = []
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        rates[name] = _gflops(64, dtype, device)
        found.append(
            _fact(f"matrix products in {name}", f"{rates[name]:.0f} GFLOP/s at 64 rows (decoding), "
                  f"{_gflops(2048, dtype, device):.0f} at 2048 (training)")
        )  # fmt: skip
    decoding = rates["float32"]
    if device == "cpu" and library() is not None:
        packed = {rows: _packed_gflops(rows) for rows in (4, 16, 64)}
        decoding = max(decoding, packed[64])
        values = ", ".join(f"{rate:.0f} GFLOP/s at {rows} rows" for rows, rate in packed.items())
        found.append(_fact("packed products in float32", f"{values} (decoding Llama-like models)"))
    faster = rates["bfloat16"] > 1.2 * decoding
    advice = "bfloat16 (rollout.dtype, model.dtype)" if faster else "float32 (the default)"
    found.append(_fact("faster dtype for decoding", advice))
    return [*found, _kernels()]


def _kernels() -> Fact:
    made = library()
    if made is None:
        return _fact("fused kernels", f"none: {why_not()}; using torch's slower operations", False)
    return _fact("fused kernels", f"{made.identity}, compiled by {made.made_by}", True)


@torch.no_grad()
def _gflops(rows: int, dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of torch's product of `rows` rows with a WIDTH × WIDTH weight."""
    left = torch.randn(rows, WIDTH, device=device).to(dtype)
    weight = torch.randn(WIDTH, WIDTH, device=device).to(dtype)

    def call() -> None:
        F.linear(left, weight)
        if device == "cuda":
            torch.cuda.synchronize()

    return _rate(rows, call)


def _packed_gflops(rows: int) -> float:
    """GFLOP/s of the product that float32 decoding uses on a CPU."""
    product = product_of(torch.float32, torch.nn.Linear(WIDTH, WIDTH, bias=False))
    product.refresh()
    left = torch.randn(rows, WIDTH)
    return _rate(rows, product.into(left, torch.empty_like(left), ctypes.c_int64(rows)))


def _rate(rows: int, call: Callable[[], object]) -> float:
    """Median GFLOP/s of a product over about 0.3 s."""
    times: list[float] = []
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 2 * rows * WIDTH * WIDTH / sorted(times)[len(times) // 2] / 1e9


def _sandbox() -> list[Fact]:
    """Which sandbox tiers work for this user; each is started, and a program in it tries to escape."""
    if platform.system() != "Linux":
        return [_fact("code sandbox", f"not available on {platform.system()}", False)]
    return [_fact(f"sandbox: {name}", detail, works) for name, works, detail in probe()]


def _hub() -> Fact:
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname or ""
    try:
        with socket.create_connection((host, 443), timeout=2):
            return _fact("model hub", f"{host} is reachable", True)
    except OSError as error:
        return _fact("model hub", f"{host} cannot be reached ({error}); local models still work", False)
