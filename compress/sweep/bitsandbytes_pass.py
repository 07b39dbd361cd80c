"""What the methods of bitsandbytes have in common: no data, every linear layer, one format each."""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.sweep.bitsandbytes import Form


class Bitsandbytes(Pass):
    """A pass that rounds linear layers into a format of bitsandbytes."""

    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.INTEGER_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})

    ignore: tuple[str, ...] = Field(
        default=(), description="modules to leave in floats: globs or `re:` regular expressions"
    )

    @abstractmethod
    def form(self) -> "Form":
        """How matrices are stored."""

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse layers that cannot be held, and predict; see `compress.sweep.bitsandbytes`."""
        from compress.sweep.bitsandbytes import check

        return check(self.form(), self.ignore, source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Round every linear layer, block by block; see `compress.sweep.bitsandbytes`."""
        from compress.sweep.bitsandbytes import quantize

        return quantize(self.form(), self.ignore, source, target, run)
