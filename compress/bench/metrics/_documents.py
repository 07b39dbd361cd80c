"""One pass of classifiers and encoders over documents, read by accuracy and fidelity."""

from dataclasses import dataclass, field

import torch

from compress.bench.metrics import Subject


@dataclass
class Outputs:
    """Per document, in the order of the material, on the CPU.

    Attributes:
        after: of the measured model: logits ``[labels]`` or the mean hidden state ``[width]``.
        before: of the reference; empty without one.
    """

    after: list[torch.Tensor] = field(default_factory=list)
    before: list[torch.Tensor] = field(default_factory=list)


def document_outputs(subject: Subject) -> Outputs:
    """The outputs for every document, computed once for a subject."""
    if "documents" not in subject.memo:
        material = subject.given
        count = len(material.sequences)
        outputs = Outputs([torch.empty(0)] * count)
        if subject.reference is not None:
            outputs.before = [torch.empty(0)] * count
        for numbers in material.batches(subject.options.scoring_batch_size):
            tokens = torch.stack([material.sequences[number] for number in numbers])
            _place(outputs.after, numbers, subject.running.outputs(tokens))
            if subject.reference is not None:
                _place(outputs.before, numbers, subject.reference.outputs(tokens))
        subject.memo["documents"] = outputs
    found: Outputs = subject.memo["documents"]
    return found


def _place(into: list[torch.Tensor], numbers: list[int], outputs: torch.Tensor) -> None:
    for number, output in zip(numbers, outputs.cpu(), strict=True):
        # An encoder's hidden states are large; its embedding of a document is their mean.
        into[number] = output.mean(0) if output.dim() == 2 else output
