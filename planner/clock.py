"""How long the steps of many layouts take on one hardware, each thing asked once."""

from engine.run.plan import RunPlan
from planner.calibration import calibrate
from planner.hardware import Hardware
from planner.lengths import StepRows, rows_of_steps
from planner.rates import PartRates, derived_rates
from planner.speed import step_time


class Clock:
    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.notes: list[str] = []
        """Where the rates are from, or why there are none."""
        self._rates: dict[tuple[int, bool], PartRates | None] = {}
        self._rows: dict[tuple[int, ...], StepRows] = {}

    def step_seconds(self, plan: RunPlan) -> float | None:
        """Of the first stage; None where nothing is known of the device."""
        if (rates := self._of(plan)) is None:
            return None
        batch = plan.batch
        key = plan.mesh.data, batch.micro_batch_samples, batch.accumulation
        if key not in self._rows:
            self._rows[key] = rows_of_steps(plan, plan.stages[0])
        return step_time(plan, rates, self._rows[key]).seconds

    def _of(self, plan: RunPlan) -> PartRates | None:
        key = plan.mesh.tensor, plan.half_precision
        if key not in self._rates:
            self._rates[key] = self._find(plan)
        return self._rates[key]

    def _find(self, plan: RunPlan) -> PartRates | None:
        try:
            if self.hardware.device.bf16_flops:
                rates = derived_rates(plan, self.hardware)
            else:
                rates = calibrate([plan], 10.0)[plan.mesh.tensor]
        except ValueError as error:
            self._note(f"no times: {error}")
            return None
        self._note(f"times: {rates.source}")
        return rates

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
