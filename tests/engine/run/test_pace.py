"""A rank that is slower than the others for many steps is named, and one that waits for it is not."""

import time

import pytest

from launch.rank import run_rank
from launch.signals import StopSignal
from model.llama import RMSNorm
from tests.engine.programs import prepare
from tests.ranks import RankError, run_ranks
from training.records import read_records


def run_with_a_slow_rank(victim: int, words: list[str]) -> None:
    import train
    from launch.topology import read_topology

    real = RMSNorm.forward

    def slow(self, *hidden):
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            pass
        return real(self, *hidden)

    if read_topology().rank == victim:
        RMSNorm.forward = slow
    run_rank(lambda: train.main(train.parse_arguments(words), StopSignal()))


@pytest.mark.parametrize("layout", ["zero3_fp32", "pipeline_fp32"])
def test_a_slow_rank_is_named(layout, tmp_path):
    recipe, data = prepare(tmp_path)
    words = ["--recipe", recipe, "--data", data, "--deepspeed_config", f"ds_configs/{layout}.json"]
    words += ["--output", str(tmp_path / "run"), "--training.max_steps", "50", "--validation.every_steps", "15"]
    with pytest.raises(RankError) as ended:  # train.py ends the process
        run_ranks(run_with_a_slow_rank, 2, 1, words, timeout=200, until_all_end=True)
    assert "step 50/50 | checkpoint" in str(ended.value), ended.value
    records = read_records(tmp_path / "run/metrics.jsonl")
    slow = [(r["step"], r["text"]) for r in records if r.get("event") == "notice" and "is slow" in r["text"]]
    if layout == "pipeline_fp32":  # its ranks hold other layers
        assert slow == []
        return
    assert slow
    for step, text in slow:  # a pause of the other rank may end a row and begin another
        assert step >= 20
        assert "(rank 1) is slow: in 20 steps in a row it worked more than 1.3 times as long as the median rank" in text
