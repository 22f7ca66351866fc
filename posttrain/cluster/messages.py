"""Messages between the driver and its workers: pickle, with tensors and arrays as buffers beside it.

Only processes that the driver started, or that hold the cluster's token, exchange them. Functions and classes that a
worker cannot import travel by value (cloudpickle).
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, cast

import cloudpickle
import numpy as np
import torch
from torch import nn

Buffer = bytes | bytearray | memoryview
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}  # dtypes that travel as integers of their size


class _Pickler(cloudpickle.Pickler):
    """Tensors are pickled through arrays, whose memory is not copied; they arrive on the CPU."""

    on_module: Callable[[nn.Module], None] | None = None

    def reducer_override(self, obj: Any) -> Any:
        if self.on_module and issubclass(type(obj), nn.Module):
            self.on_module(obj)
        if type(obj) in (torch.Tensor, nn.Parameter) and obj.layout == torch.strided and not obj.is_quantized:
            flat = obj.detach().cpu().contiguous()
            bits = _BITS.get(flat.dtype)
            array = flat.numpy() if bits is None else flat.view(bits).numpy()
            return _tensor, (
                array,
                str(flat.dtype).removeprefix("torch."),
                obj.requires_grad,
                type(obj) is nn.Parameter,
            )
        return super().reducer_override(obj)


def _tensor(array: np.ndarray, dtype: str, needs_grad: bool, parameter: bool) -> torch.Tensor:
    if not array.flags.writeable:  # memory that workers share
        array = array.copy()
    tensor = torch.from_numpy(array)
    kind = getattr(torch, dtype)
    tensor = tensor.view(kind) if kind in _BITS else tensor
    return nn.Parameter(tensor, needs_grad) if parameter else tensor.requires_grad_(needs_grad)


def encode(value: Any, on_module: Callable[[nn.Module], None] | None = None) -> list[Buffer]:
    """A value as a pickle and its buffers; tensors and arrays are not copied, so they must not change until sent.

    `on_module` is called with every module in it.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=5, buffer_callback=buffers.append)
    pickler.on_module = on_module
    pickler.dump(value)
    return [file.getvalue(), *(cast(Buffer, buffer.raw()) for buffer in buffers)]


def decode(parts: Sequence[Buffer]) -> Any:
    """The value of `encode`'s parts; arrays share their memory."""
    return pickle.loads(parts[0], buffers=parts[1:])


def write(sock: socket.socket, parts: Sequence[Buffer]) -> None:
    """Sends a message over a stream socket."""
    sizes = [memoryview(part).nbytes for part in parts]
    sock.sendall(struct.pack(f"<Q{len(parts)}Q", len(parts), *sizes))
    for part in parts:
        sock.sendall(part)


def read(sock: socket.socket) -> list[Buffer] | None:
    """The next message; None if the other side has closed the connection."""
    head = _exactly(sock, 8)
    if head is None:
        return None
    count = struct.unpack("<Q", head)[0]
    sizes = _exactly(sock, 8 * count)
    if sizes is None:
        return None
    parts: list[Buffer] = []
    for size in struct.unpack(f"<{count}Q", sizes):
        part = _exactly(sock, size)
        if part is None:
            return None
        parts.append(part)
    return parts


def _exactly(sock: socket.socket, size: int) -> bytearray | None:
    out = bytearray(size)
    view = memoryview(out)
    while len(view):
        try:
            got = sock.recv_into(view, min(len(view), 1 << 24))
        except ConnectionError:
            return None
        if not got:
            return None
        view = view[got:]
    return out
