"""Rates are what they say, and MFU is taken against the right figure."""

import json

import pytest
import torch

from training import throughput
from training.environment import environment, peak_memory_bytes
from training.throughput import StepClock, data_sheet_flops, peak_rate

CPU = torch.device("cpu")


class Hands:
    """A clock that only moves when told."""

    def __init__(self, monkeypatch):
        self.seconds = 100.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.seconds)

    def move(self, seconds: float) -> None:
        self.seconds += seconds


def test_rates_cover_the_steps_since_the_last_reading(monkeypatch):
    hands = Hands(monkeypatch)
    clock = StepClock(peak_flops_per_second=12_000.0)
    clock.flops_per_token = 6.0
    for _ in range(2):
        with clock.waiting_for_data():
            hands.move(0.5)
        hands.move(1.5)
        clock.step_done(tokens=1000)
    with clock.aside():
        hands.move(50)
    rates = clock.read()
    assert rates == (2000 / 4, 500 * 6 / 12_000, 1 / 4, 2.0)

    hands.move(8)
    clock.step_done(tokens=1000)
    assert clock.read() == (125.0, 125 * 6 / 12_000, 0.0, 8.0)

    clock.step_done(tokens=1000)
    clock.flops_per_token = 12.0
    clock.step_done(tokens=1000)
    hands.move(2)
    assert clock.read().mfu == 18_000 / 2 / 12_000


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_names_that_drivers_report(name, flops):
    assert data_sheet_flops(name) == flops


def test_an_unknown_device_is_measured():
    rate = peak_rate(CPU, torch.float32)
    assert rate.measured
    assert rate.label == "peak"
    assert 1e8 < rate.flops_per_second < 1e15


def test_environment_is_json_and_names_what_ran():
    facts = json.loads(json.dumps(environment()))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["memory_bytes"] > 2**30
    assert facts["command"]
    assert peak_memory_bytes(CPU) > 10 * 2**20
