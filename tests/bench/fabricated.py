"""Runners that measure nothing, for tests of an experiment's course."""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.bench.isolate import Reply
from compress.bench.material import Material
from compress.core.measurement import Measurement

SMALL = {
    "launches": 2,
    "repeats": 2,
    "sample_seconds": 0,
    "launch_seconds": 0,
    "prompt_length": 8,
    "new_tokens": 2,
    "tokens": 256,
    "threads": 1,
    "noise_floor": False,
    "budget": 0,
}
NOT_SLOWER = {"metric": "decode.tokens_per_second", "test": "non-inferiority", "margin": "8%"}


def one_by_one(measure: Any) -> Any:
    """A runner from what answers a single request; it knows no turns."""

    def run(requests: Sequence[Mapping[str, Any]], **circumstances: Any) -> list[Reply]:
        return [measure(request, **circumstances) for request in requests]

    return run


def fabricated(rates: Any) -> Any:
    """A runner that measures nothing: ``rates(artifact, launch)`` are the samples of a launch."""

    def run(request: Mapping[str, Any], *, stage: str, **_: Any) -> Reply:
        found: dict[str, Any] = {}
        if stage.startswith("timing"):
            launch = int(stage.split()[1])
            samples = rates("after" if "int4" in request["artifact"] else "before", launch)
            found = {
                "decode.tokens_per_second": Measurement.sampled(
                    samples, summary="geometric-mean", unit="token/s", better="higher"
                ).model_dump(mode="json")
            }
        if stage == "scoring":
            material = Material.load(Path(request["material"]))
            generator = torch.Generator().manual_seed(0)
            count = len(material.sequences)
            nats = torch.randn(count, generator=generator) * 0.1 + 3
            if "int4" in request["artifact"]:
                nats += 0.09 + torch.randn(count, generator=generator) * 0.02
            found = {
                "perplexity": Measurement.sampled(
                    nats.tolist(), summary="exponential-mean", better="lower"
                ).model_dump(mode="json")
            }
        return Reply({"measurements": found, "facts": {}})

    return one_by_one(run)


def steady(artifact: str, launch: int) -> list[float]:
    generator = random.Random(f"{artifact} {launch}")
    rate = 95 if artifact == "after" else 100
    return [rate * math.exp(generator.gauss(0, 0.05)) for _ in range(3)]
