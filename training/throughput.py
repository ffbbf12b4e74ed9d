"""How fast a run is: tokens per second, the share of the hardware's peak, the share of time spent waiting for data."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# Dense bf16 FLOP/s with fp32 accumulation, from the vendors' data sheets (half of the figures "with sparsity"). The
# first name that stands as a word in the device's name counts, so special variants come before the general ones.
BF16_PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}


class PeakRate(NamedTuple):
    """What one device can do at most, and how that is known."""

    flops_per_second: float
    measured: bool

    @property
    def label(self) -> str:
        """MFU is defined against the vendor's figure; a share of a measured rate is called by another name."""
        return "peak" if self.measured else "mfu"


class Rates(NamedTuple):
    """Averages over the steps since the last reading; what was set aside is in none of them."""

    tokens_per_second: float
    """Over all devices together."""
    mfu: float
    """Model FLOPs per second as a share of the peak rate of all devices; recomputation does not count as work."""
    data_wait_fraction: float
    step_seconds: float


def peak_rate(device: torch.device, dtype: torch.dtype) -> PeakRate:
    """The data sheet's rate for bf16 and fp16 on a known GPU, otherwise the best matrix product measured here.

    Processes that share one CPU must call this at the same time, so that each measures its share of the machine.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        flops = data_sheet_flops(torch.cuda.get_device_name(device))
        if flops is not None:
            return PeakRate(flops, measured=False)
    return PeakRate(measured_flops(device, dtype), measured=True)


def data_sheet_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name its driver reports; None for unknown ones and for slices of one (MIG)."""
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((flops for name, flops in BF16_PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of the square matrix products that fit into about `seconds`."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + seconds
    for attempt in range(1000):
        began = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        ended = time.perf_counter()
        if attempt:  # the first product also pays for loading the kernel
            best = min(best, ended - began)
            if ended > deadline:
                break
    return 2 * size**3 / best


class StepClock:
    """Adds up the time of training steps between two log lines.

    with clock.waiting_for_data(): batch = next(loader)
    ...                                   # forward, backward, update
    clock.step_done(tokens)
    with clock.aside(): validate()        # not training: in no average
    rates = clock.read()                  # at a logging step
    """

    flops_per_token = 0.0
    """What the steps that follow cost, to be set before the first and wherever it changes."""

    def __init__(self, peak_flops_per_second: float) -> None:
        """`peak_flops_per_second` is that of all devices together."""
        self._peak = peak_flops_per_second
        self._reset()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """What is done in here is a wait for samples."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in here belongs to no step."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def step_done(self, tokens: int) -> None:
        """Counts one optimizer step over `tokens` tokens of all ranks."""
        self._steps += 1
        self._tokens += tokens
        self._flops += tokens * self.flops_per_token

    def read(self) -> Rates:
        """The averages since the last reading, and a new beginning."""
        assert self._steps, "no step since the last reading"
        elapsed = time.perf_counter() - self._began
        mfu = self._flops / elapsed / self._peak
        rates = Rates(self._tokens / elapsed, mfu, self._waited / elapsed, elapsed / self._steps)
        self._reset()
        return rates

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._waited, self._steps, self._tokens, self._flops = 0.0, 0, 0, 0.0
