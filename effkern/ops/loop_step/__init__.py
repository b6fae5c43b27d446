"""What lies between two loops of a looped block."""

from effkern.ops.loop_step.api import LoopStepOutput, loop_step

__all__ = ["LoopStepOutput", "loop_step"]
