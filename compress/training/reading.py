"""Rows of documents (`compress.data.documents`) as what a model's forward takes."""

from dataclasses import dataclass

import torch

from compress.data.documents import PADDING


@dataclass(frozen=True)
class Documents:
    """A batch of documents, cut to the longest of them.

    Attributes:
        labels: int64 ``[batch]``, -1 where none is known.
        tokens: int64 ``[batch, length]``, padded on the right.
        counted: bool ``[batch, length]``, false where there is padding.
    """

    labels: torch.Tensor
    tokens: torch.Tensor
    counted: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, padding: int) -> "Documents":
        """Take rows apart.

        Args:
            rows: int64 ``[batch, 1 + length]``.
            padding: the token that stands for padding; it is masked, and some models look for it.
        """
        tokens = rows[:, 1:]
        counted = tokens != PADDING
        length = int(counted.sum(1).max())
        tokens, counted = tokens[:, :length], counted[:, :length]
        return cls(rows[:, 0], tokens.masked_fill(~counted, padding), counted)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The keyword arguments of one forward pass."""
        return {"input_ids": self.tokens, "attention_mask": self.counted.long()}
