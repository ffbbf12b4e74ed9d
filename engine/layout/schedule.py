"""In which order DeepSpeed's pipeline engine computes and exchanges, asked of its own schedule."""

from deepspeed.runtime.pipe.schedule import TrainSchedule


def instructions(stages: int, micro_batches: int) -> list[list[str]]:
    """What each stage of a pipeline does in a training step: names of DeepSpeed's instructions, in order.

    Loading a micro-batch, which takes no time here, is left out.
    """
    return [
        [
            instruction.name
            for together in TrainSchedule(micro_batches, stages, stage).steps()
            for instruction in together
            if instruction.name != "LoadMicroBatch"
        ]
        for stage in range(stages)
    ]
