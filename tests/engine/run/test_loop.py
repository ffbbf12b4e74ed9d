"""The loop follows its state: told to go back, it takes the samples and the stage of the earlier step again."""

from pathlib import Path

from tests.engine.programs import Run, prepare, zero

STAGES = "[{name: first, max_steps: 3}, {name: second, max_steps: 5, weights: {long: 1, short: 5}}]"


def gone_back(folder: str, recipe: str, data: str) -> dict[str, list]:
    """Rows and learning rates of the steps 1 to 6, then again from 2 and from 5, each time to step 6."""
    run = Run(recipe, data, zero(0), Path(folder), {"stages": STAGES})
    states, done = [], {}

    def steps(name: str) -> None:
        done[name] = []
        while run.state.step < 6:
            if name == "first":
                states.append(run.state.model_copy(deep=True))
            (record,) = run.steps(1)
            rate = run.engine.optimizer.param_groups[0]["lr"]
            done[name].append((record["step"], record["rows"], rate, len(run.state.stage_samples)))

    steps("first")
    for step in (2, 5):
        run.loop.state = states[step - 1].model_copy(deep=True)
        steps(f"from {step}")
    run.close()
    return done


def test_a_loop_goes_back_within_and_over_stages(tmp_path, on_ranks):
    (done,) = on_ranks(1, gone_back, str(tmp_path / "run"), *prepare(tmp_path))
    first = done["first"]
    assert [stages for *_, stages in first] == [0, 0, 0, 1, 1, 1]
    assert len({tuple(rows) for _, rows, *_ in first}) == 6
    assert done["from 2"] == first[1:]
    assert done["from 5"] == first[4:]
