"""What a pass is, and how passes are found by name.

A pass *is* its options: one frozen pydantic class per method, unknown keys forbidden. The command's
flags, the recipe's schema and the documentation page are made from its fields. A pass of ours is found
by its path (``compress/quantize/gptq.py`` is ``quantize.gptq``), other people's through the entry
point group ``compress.passes``. Nothing here imports torch: a pass imports it when it is applied.
"""

import importlib
import importlib.util
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.core.errors import PlanError, UsageError, did_you_mean
from compress.core.facts import Fact

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run

FAMILIES = ("transform", "quantize", "prune", "distill", "export")
ENTRY_POINT_GROUP = "compress.passes"
_NAME = re.compile(r"^(?P<family>[a-z]+)\.(?P<method>[a-z][a-z0-9_]*)$")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    url: str
    authors: str = ""
    year: int = 0


@dataclass(frozen=True)
class Needs:
    """What applying a pass is predicted to take, before anything starts. Bytes and seconds.

    Attributes:
        disk_bytes: on disk, the result and what lies there meanwhile.
        host_bytes: of memory.
        device_bytes: of the accelerator's memory.
        seconds: of time.
        activation_bytes: the part of ``host_bytes`` that may lie on disk instead: calibration activations.
        spilled_bytes: of activations that do.
    """

    disk_bytes: int
    host_bytes: int
    device_bytes: int
    seconds: float
    activation_bytes: int = 0
    spilled_bytes: int = 0

    def within(self, activations_memory: int | None) -> "Needs":
        """The needs where no more activations than that stay in memory."""
        if activations_memory is None or self.activation_bytes <= activations_memory:
            return self
        beyond = self.activation_bytes - activations_memory
        return replace(
            self,
            disk_bytes=self.disk_bytes + beyond,
            host_bytes=self.host_bytes - beyond,
            activation_bytes=activations_memory,
            spilled_bytes=self.spilled_bytes + beyond,
        )


@dataclass(frozen=True)
class Outcome:
    """What a pass decided and meant, written into the artifact's lineage.

    Attributes:
        decisions: what was settled while working (counts, the damping that was needed, the shape got).
        tensors: for every weight on disk, by its float name, the digest of the values that a loader
            must see, and whether the pass changed it. Verification holds the artifact against it.
    """

    decisions: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, "Meant"] = field(default_factory=dict)


@dataclass(frozen=True)
class Meant:
    """The values that one weight must have after loading.

    Attributes:
        digest: of dtype, shape and bytes of the loaded tensor (`compress.numerics.fingerprint`).
        changed: whether the last pass changed it.
        error: relative Frobenius distance to the weight before the pass; 0 where unchanged.
    """

    digest: str
    changed: bool
    error: float = 0.0


class Pass(BaseModel, ABC):
    """One method with its options. Maps an artifact to an artifact.

    A subclass is final, lives in the file that carries its name, and documents each field with
    ``Field(description=...)``, in the words that the help page will show.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    summary: ClassVar[str] = ""
    """One line for lists and help."""
    paper: ClassVar[Paper | None] = None
    examples: ClassVar[tuple[str, ...]] = ()
    """Flags of worked examples, shown behind ``compress FAMILY METHOD MODEL --out DIR``."""
    needs: ClassVar[frozenset[Fact]] = frozenset()
    needs_one_of: ClassVar[frozenset[Fact]] = frozenset()
    """Facts of which one is enough; empty where `needs` says all."""
    gives: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    calibrated: ClassVar[bool] = False
    """Whether it reads calibration text, whatever its options are."""
    calibrated_with: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Values of options with which it reads calibration text, though it needs none otherwise."""

    @property
    def reads_calibration(self) -> bool:
        """Whether it reads calibration text with these options."""
        return self.calibrated or any(
            getattr(self, option) in values for option, values in self.calibrated_with.items()
        )

    @abstractmethod
    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse at plan time what cannot work, and predict what the work will take.

        Reads configuration and headers only, never weights.

        Raises:
            PlanError: the source cannot be handled with these options, and what to change.
        """

    @abstractmethod
    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Write the compressed model into ``target``, a working folder that may hold earlier progress.

        Everything is a function of the source, the options and the run: the same inputs give the same
        bytes, whether the work was interrupted or not.
        """


class Delegating(Pass):
    """A pass that finds out options and lets another pass do the work with them."""

    @property
    @abstractmethod
    def delegate(self) -> Pass:
        """The other pass, with any options: its code belongs to the key of this one.

        Raises:
            UsageError: there is no such pass.
        """


class Expanding(Pass):
    """A pass that stands for others, one after the other, which are planned and run in its place.

    Each of them is a step with an artifact, a key and a place in the lineage of its own.
    """

    @abstractmethod
    def expand(self) -> tuple[Pass, ...]:
        """The passes that it stands for, in order; two or more, none of which expands.

        Each but the last leaves a model that all others would take or refuse as they do the first one's
        source, so that a plan can ask all of them about that.

        Raises:
            UsageError: an option does not fit one of them.
        """

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """What the first of the passes says of the source; the others see what it leaves."""
        return self.expand()[0].check(source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Refused: one folder cannot hold the artifacts of several passes.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{name_of(self)} stands for {' and '.join(map(name_of, self.expand()))}",
            "run it as a step of a recipe (compress.engine.run), or apply these one after the other",
        )


@cache
def _own_names() -> dict[str, str]:
    """Names of our own methods to module paths, from the files that exist."""
    root = Path(__file__).resolve().parent.parent
    return {
        f"{family}.{file.stem}": f"compress.{family}.{file.stem}"
        for family in FAMILIES
        for file in sorted((root / family).glob("*.py"))
        if not file.stem.startswith("_")
    }


@cache
def _foreign_entries() -> dict[str, EntryPoint]:
    """Names of other people's methods to their entry points; every installed package is read for them."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def own_names() -> list[str]:
    """The names of our own methods: what is known without looking into other packages."""
    return sorted(_own_names())


def names() -> list[str]:
    """The names of all methods, own and foreign, without importing any."""
    return sorted({*_own_names(), *_foreign_entries()})


def find(name: str) -> type[Pass]:
    """The pass class behind a name.

    Raises:
        UsageError: no method has this name.
        PlanError: the method breaks the contract of passes.
    """
    own = _own_names()
    if name in own:
        return _own(name, own[name])
    # Looks into every installed package, which a command line that names a method of ours need not.
    foreign = _foreign_entries()
    if name in foreign:
        return _foreign(name, foreign[name])
    raise UsageError(f"unknown method '{name}'", did_you_mean(name, names()))


def name_of(method: type[Pass] | Pass) -> str:
    """The name under which a pass class is registered (``quantize.gptq``).

    Raises:
        UsageError: the class is not registered, so no recipe could name it.
    """
    kind = method if isinstance(method, type) else type(method)
    for name in names():
        module = _own_names().get(name)
        if module is not None and kind.__module__ != module:
            continue
        if find(name) is kind:
            return name
    raise UsageError(
        f"{kind.__module__}.{kind.__qualname__} is not registered as a pass",
        f"declare it as an entry point of the group '{ENTRY_POINT_GROUP}'",
    )


def build(name: str, options: Mapping[str, Any]) -> Pass:
    """A pass from its name and options, with errors in the words of a recipe's reader.

    Raises:
        UsageError: an unknown name, an unknown option or a value that does not fit.
    """
    kind = find(name)
    try:
        return kind(**options)
    except ValidationError as error:
        raise invalid(error, name, kind.model_fields) from error


def invalid(error: ValidationError, subject: str, known: Mapping[str, Any]) -> UsageError:
    """The first complaint of pydantic as one clear line with a remedy."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        # A nested key is unknown to its own model, so only a top-level key has the list of names at hand.
        names_here = known if len(first["loc"]) == 1 else {}
        return UsageError(f"{subject}: unknown option '{where}'", did_you_mean(where, names_here))
    came = "" if first["type"] == "missing" else f"; got {first['input']!r}"
    return UsageError(f"{subject}: {where or 'value'}: {first['msg']}{came}")


@cache
def _own(name: str, module_name: str) -> type[Pass]:
    module = importlib.import_module(module_name)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Pass)
        and value.__module__ == module_name
        and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        raise PlanError(
            f"{module_name} must hold exactly one pass, it holds {len(found)}",
            "one method a file: move the others to files of their own",
        )
    return _checked(name, found[0])


def _foreign(name: str, entry: EntryPoint) -> type[Pass]:
    match = _NAME.match(name)
    if match is None or match["family"] not in FAMILIES:
        raise PlanError(
            f"entry point '{name}' ({entry.value}) is not named family.method",
            f"families: {', '.join(FAMILIES)}",
        )
    try:
        kind = entry.load()
    except Exception as error:
        raise PlanError(f"method '{name}' ({entry.value}) cannot be imported: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, Pass)) or inspect.isabstract(kind):
        raise PlanError(f"entry point '{name}' ({entry.value}) is not a concrete Pass")
    return _checked(name, kind)


def _checked(name: str, kind: type[Pass]) -> type[Pass]:
    if not kind.summary:
        raise PlanError(f"method '{name}' has no summary", "set the class variable `summary`")
    for field_name, info in kind.model_fields.items():
        if not info.description:
            raise PlanError(
                f"method '{name}': option '{field_name}' has no description",
                "describe it with pydantic.Field(description=...)",
            )
    return kind
