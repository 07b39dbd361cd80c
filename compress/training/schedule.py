"""The learning rate of each step: a linear rise, then a fall along half a cosine to a floor.

Loshchilov and Hutter 2017, "SGDR", arXiv 1608.03983, equation 5, without restarts.
"""

import math


def learning_rate(step: int, steps: int, peak: float, warmup: float, floor: float) -> float:
    """The learning rate of a step.

    Args:
        step: from 0.
        steps: of the whole training.
        peak: the highest learning rate.
        warmup: share of the steps over which it rises; the last of them has the peak.
        floor: share of the peak that the last step has.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - 1 - rising)
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))
