"""Distributions over two vocabularies brought to outcomes that can be compared one by one.

Two ways, for which a student and a teacher whose tokens differ need not share a number:

- *aligned*: the tokens that both have, each an outcome, and all others together as one more. The divergence
  over these outcomes is never more than a divergence of the distributions themselves could be.
- *sorted*: the k-th most likely token of the one against the k-th most likely of the other, whatever they are
  called, with zeros at the end of the shorter vocabulary. The sum of absolute differences, twice the total
  variation, is the Wasserstein distance for a cost that is the same for any two tokens (Boizard et al. 2024,
  "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", arXiv 2402.12030,
  section 4.1).
"""

import torch

_LEAST = 1e-30
"""What stands for a probability of zero under a logarithm."""


def aligned(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logarithms of the probabilities of some tokens, and of all others together.

    Args:
        logits: float ``[positions, vocabulary]``.
        tokens: int64 ``[n]``, different from each other.

    Returns:
        float32 ``[positions, n + 1]``, differentiable.
    """
    plain = logits.float()
    whole = plain.logsumexp(-1, keepdim=True)
    rest = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    rest[tokens] = False
    if not bool(rest.any()):
        others = torch.full_like(whole, _LEAST).log()
    else:
        others = plain[:, rest].logsumexp(-1, keepdim=True) - whole
    return torch.cat([plain[:, tokens] - whole, others], dim=-1)


def ordered(logits: torch.Tensor, width: int) -> torch.Tensor:
    """Logarithms of the probabilities from the most likely on, with (almost) zeros behind the last.

    Args:
        logits: float ``[positions, vocabulary]``.
        width: outcomes, at least the vocabulary.

    Returns:
        float32 ``[positions, width]``, differentiable.
    """
    values = logits.float().log_softmax(-1).sort(-1, descending=True).values
    missing = width - values.shape[-1]
    return torch.nn.functional.pad(values, (0, missing), value=float(torch.tensor(_LEAST).log()))
