"""Where tests compute: THYROID_RLAR_DEVICE (cpu, cuda, ...) and THYROID_RLAR_DTYPE (float64, float32); one suite for every machine."""
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEVICE = torch.device(os.environ.get("THYROID_RLAR_DEVICE", "cpu"))
DTYPE = getattr(torch, os.environ.get("THYROID_RLAR_DTYPE", "float64"))
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
if DTYPE not in TOLERANCES: raise ValueError(f"THYROID_RLAR_DTYPE: found {DTYPE}, expected float64 or float32")
TOLERANCE = TOLERANCES[DTYPE]       # relative, of what is the same but for rounding
EXACT = DEVICE.type == "cpu"        # elsewhere two equal computations may be summed in another order


def free_port() -> int:
    "A port of this machine that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    "No file of this process can grow beyond so many bytes: the system refuses to write, as a full disk does, and no rights are needed for that."
    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
