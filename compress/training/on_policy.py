"""Learning from what the student itself writes: a share of the passes goes over text that it has sampled.

Agarwal et al. 2024, "On-Policy Distillation of Language Models", arXiv 2306.13649, algorithm 1: with a
probability, a pass takes sequences of the student instead of those of the text, and the divergence from the
teacher is learned on what the student wrote, not on the prompt. No gradient goes through the sampling.

Prompts are the beginnings of the windows that the pass would have learned from. All sampled texts are equally
long: where the student ends one, it goes on with another, as windows of the text do, so that nothing is
padded.
"""

from typing import Any, final

import torch
from transformers import GenerationConfig

from compress.models.load import quiet
from compress.training.imitation import Distributions
from compress.training.objective import Losses, Objective
from compress.training.packing import JOINED, Packing
from compress.training.precision import Arithmetic, autocast


@final
class OnPolicy(Objective):
    """An imitation on the text, or on what the student makes of the beginnings of its windows.

    A sampled pass weighs as much as any other, though it predicts fewer positions. Draws come from torch's
    own generator, on the host for the choice of a pass and on the device for tokens, and depend on the step
    and the process alone: so many processes draw otherwise than one.

    Args:
        model: the student, which samples with transformers' own ``generate``.
        imitation: what is learned of windows.
        share: probability that a pass is sampled, in ``[0, 1]``.
        temperature: of the sampling.
        prompt: tokens at the start of each window that are given.
        length: tokens that are sampled after them.
        arithmetic: of the passes.
        packing: how documents share a window; the student goes on with the last one of its prompt.
    """

    def __init__(
        self,
        model: Any,
        imitation: Distributions,
        *,
        share: float,
        temperature: float,
        prompt: int,
        length: int,
        arithmetic: Arithmetic,
        packing: Packing = JOINED,
    ) -> None:
        self._model = model
        self._imitation = imitation
        self._share = share
        self._prompt = prompt
        self._arithmetic = arithmetic
        self._packing = packing
        self._sampling = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            pad_token_id=0,
            use_cache=True,
        )
        self.names = imitation.names

    def positions(self, windows: torch.Tensor) -> int:
        """See `Objective.positions`: as many as on the text."""
        return self._imitation.positions(windows)

    def learn(self, windows: torch.Tensor, positions: float) -> Losses:
        """See `Objective.learn`."""
        if float(torch.rand(())) >= self._share:
            return self._imitation.learn(windows, positions)
        sampled = self.sampled(windows)
        nominal = self._imitation.positions(windows)
        # What opens a document is not predicted, and may be all that was sampled.
        predicted = max(1, self._imitation.positions(sampled, self._prompt))
        found = self._imitation.learn_after(sampled, self._prompt, positions * predicted / nominal)
        sums = {name: total * (nominal / predicted) for name, total in found.sums.items()}
        return Losses(sums, nominal)

    def judge(self, windows: torch.Tensor) -> Losses:
        """See `Objective.judge`: on the text, so that evaluations can be compared."""
        return self._imitation.judge(windows)

    @torch.no_grad()
    def sampled(self, windows: torch.Tensor) -> torch.Tensor:
        """What the student makes of the beginnings of windows, int64 ``[batch, prompt + length]``.

        Args:
            windows: int64 ``[batch, length]``, on the device.
        """
        given = self._model.generation_config
        # Whatever the model's folder says of generating (an end, a penalty, a smaller nucleus) is not the
        # distribution that is trained.
        self._model.generation_config = GenerationConfig()
        try:
            with quiet(), autocast(self._arithmetic, windows.device):
                found: torch.Tensor = self._model.generate(
                    **self._packing.begun(windows[:, : self._prompt]), generation_config=self._sampling
                )
        finally:
            self._model.generation_config = given
        return found
