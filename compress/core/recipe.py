"""A recipe: which model, which passes in which order, on which data, judged by which gates.

A recipe is a value, read from YAML or built in Python; every command makes one, so that there is a
single way to run. Its steps are checked against the passes they name when the recipe is made, in the
words of the person who wrote it, with the line of the file where there is one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress.core.bench import Bench
from compress.core.budget import bytes_of
from compress.core.errors import CompressError, UsageError, did_you_mean
from compress.core.gate import Arms, Gate
from compress.core.passes import Pass, build, find, invalid, name_of, names
from compress.core.run import LogService

if TYPE_CHECKING:
    from yaml.nodes import Node


def _a_size(value: str) -> str:
    bytes_of(value)
    return value


Size = Annotated[str, AfterValidator(_a_size)]
"""A number of bytes with a unit (``4GB``, ``600MiB``)."""
_STRICT = ConfigDict(frozen=True, extra="forbid", defer_build=True)
_STEP_FAULT = "step"


@final
class Step(BaseModel):
    """One pass of a recipe: its name under ``use``, its options beside it.

    Raises:
        pydantic.ValidationError: no such pass, no such option, or a value that does not fit.
    """

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    use: str = Field(description="name of the method, such as quantize.gptq")

    @model_validator(mode="after")
    def _fits_its_pass(self) -> "Step":
        try:
            self.built()
        except CompressError as error:
            # As pydantic's own kind of error it comes back with the number of the step.
            facts = {"message": error.message, "hint": error.hint}
            raise PydanticCustomError(_STEP_FAULT, "{message}", facts) from error
        return self

    @classmethod
    def of(cls, method: Pass) -> "Step":
        """The step that applies a pass object; options at their defaults stay unsaid."""
        return cls(use=name_of(method), **method.model_dump(mode="json", exclude_defaults=True))

    @property
    def options(self) -> Mapping[str, Any]:
        """The options as they were given; the defaults of the method are not filled in."""
        return self.model_extra or {}

    def built(self) -> Pass:
        """The pass with these options.

        Raises:
            UsageError: no such pass, no such option, or a value that does not fit.
        """
        return build(self.use, self.options)

    def document(self) -> dict[str, Any]:
        """The step as plain data, every option spelled out, for a canonical recipe."""
        method = self.built()
        fields = type(method).model_fields
        options = method.model_dump(mode="json", exclude_none=True)
        for name, field in fields.items():
            # An absent value says something only where the default is another.
            if name not in options and field.default is not None:
                options[name] = None
        return {"use": self.use, **options}


@final
class Data(BaseModel):
    """The texts of a run, and how calibration is drawn from them."""

    model_config = _STRICT

    calibration: str | None = Field(
        default=None,
        description="text that calibrated methods read: a text file (also .gz), JSON lines or a hub data set",
    )
    train: str | None = Field(
        default=None,
        description="text that training methods read: a text file (also .gz), JSON lines or a hub data set",
    )
    validation: str | None = Field(
        default=None,
        description="text that training is judged by while it runs; none holds out a part of `train`",
    )
    eval: str | None = Field(default=None, description="text that the before/after report is measured on")
    samples: PositiveInt = Field(default=128, description="calibration sequences")
    sequence_length: PositiveInt = Field(default=512, description="tokens in each calibration sequence")
    batch_size: PositiveInt = Field(default=8, description="calibration sequences in one forward pass")
    activations_memory: Size | None = Field(
        default=None,
        description="memory for what calibration sequences become from block to block, such as 4GB; the rest "
        "lies on disk, and the result is the same; none takes half of what is free",
    )


@final
class Recipe(BaseModel):
    """A whole run: source model, data, passes, report and gates.

    Attributes are described by their fields; `schema` gives them as JSON schema, with the options of
    every registered pass.
    """

    model_config = _STRICT

    version: Literal[1] = Field(default=1, description="version of the recipe format")
    model: str = Field(min_length=1, description="source model: a folder, a hub id or builtin:NAME")
    task: str = Field(default="auto", description="what the model does; auto takes it from the model")
    seed: NonNegativeInt = Field(default=0, description="seed of every random draw")
    data: Data = Field(default=Data(), description="texts of the run")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where blocks are computed")
    threads: PositiveInt | None = Field(
        default=None, description="threads of the arithmetic; none takes all cores. Part of a step's identity"
    )
    log: LogService | None = Field(
        default=None,
        description="where the progress of training is shown beside its table: `tensorboard` writes to the "
        "folder DIR.tensorboard, `mlflow` to where its own environment variables say",
    )
    keep: Literal["all", "last"] = Field(
        default="all", description="keep the artifact of every step, or of the last alone"
    )
    trust_remote_code: bool = Field(
        default=False, description="whether Python code inside the model folder may run"
    )
    steps: tuple[Step, ...] = Field(min_length=1, description="the passes, in order")
    bench: Bench | None = Field(
        default=None, description="what to measure before and after; none measures nothing"
    )
    gates: tuple[Gate, ...] = Field(default=(), description="what must hold for the result to ship")

    @classmethod
    def load(cls, path: Path, settings: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file.

        Args:
            path: a YAML file.
            settings: ``PATH=VALUE`` assignments made before the recipe is checked, so that a file may
                leave open what the command supplies.

        Raises:
            UsageError: no such file, broken YAML, or an entry that does not fit; with file and line.
        """
        if not path.is_file():
            raise UsageError(f"no recipe at {path}", "give the path of a YAML file; `recipes/` holds some")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text, expected a YAML recipe") from error
        return cls.from_yaml(text, source=str(path), settings=settings)

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "recipe", settings: Sequence[str] = ()) -> "Recipe":
        """Read a recipe from YAML text; ``source`` is its name in error messages.

        Raises:
            UsageError: broken YAML, or an entry that does not fit.
        """
        from compress.core import yaml_text

        tree, document = yaml_text.parse(text, source)
        if not isinstance(document, dict):
            raise UsageError(f"{source}: a recipe is a mapping, got {type(document).__name__}")
        for setting in settings:
            _assign(document, setting)
        return _validated(document, source, tree)

    @classmethod
    def of(cls, document: Mapping[str, Any], *, source: str = "recipe") -> "Recipe":
        """A recipe from plain data; ``source`` is its name in error messages.

        Raises:
            UsageError: an entry that does not fit.
        """
        return _validated(document, source)

    def with_settings(self, settings: Sequence[str]) -> "Recipe":
        """The recipe after assignments such as ``steps.0.bits=3``; values are typed as in YAML.

        Raises:
            UsageError: no such path, or a value that does not fit.
        """
        document = self._as_given()
        for setting in settings:
            _assign(document, setting)
        return _validated(document, "setting" if len(settings) == 1 else "settings")

    def dump(self) -> str:
        """The recipe as canonical YAML: everything spelled out but what is absent by default.

        Two recipes that mean the same give the same text, and a later change of a default does not
        change what a dumped recipe means.
        """
        from compress.core import yaml_text

        document = self.model_dump(mode="json", exclude={"steps"})
        document["steps"] = [step.document() for step in self.steps]
        ordered = {name: document[name] for name in Recipe.model_fields}
        return yaml_text.dump(_without_absent(ordered))

    @property
    def experiment(self) -> Bench | None:
        """The bench; what it leaves open and the recipe says for the whole run holds for it as well."""
        if self.bench is None:
            return None
        shared = ("seed", "device", "threads", "trust_remote_code")
        said = {name: getattr(self, name) for name in shared if name in self.model_fields_set}
        return self.bench.model_copy(
            update={name: value for name, value in said.items() if name not in self.bench.model_fields_set}
        )

    def _as_given(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


def schema(methods: Sequence[str] | None = None) -> dict[str, Any]:
    """The JSON schema of recipes: a step is one of the methods, told apart by ``use``.

    Args:
        methods: names of passes; all that are registered by default.
    """
    document = Recipe.model_json_schema()
    definitions: dict[str, Any] = document["$defs"]
    del definitions["Step"]
    choices = {}
    for name in names() if methods is None else methods:
        method = find(name)
        options = method.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for inner, definition in options.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = definition
        options["title"] = name
        options["description"] = method.summary
        options["properties"] = {"use": {"const": name, "type": "string"}, **options.get("properties", {})}
        options["required"] = ["use", *options.get("required", [])]
        definitions[name] = options
        choices[name] = f"#/$defs/{name}"
    document["properties"]["steps"]["items"] = {
        "oneOf": [{"$ref": reference} for reference in choices.values()],
        "discriminator": {"propertyName": "use", "mapping": choices},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **document,
        "$defs": dict(sorted(definitions.items())),
    }


def _without_absent(document: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what says nothing: absent values, empty lists and empty mappings."""
    kept: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping):
            value = _without_absent(value)
        if value is None or value in ([], {}):
            continue
        kept[name] = value
    return kept


def _validated(document: Mapping[str, Any], source: str, tree: "Node | None" = None) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        from compress.core import yaml_text

        # A misspelt key also leaves the right one missing: speak of the misspelling.
        first = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
        place = tuple(part for part in first["loc"])
        line = yaml_text.line_of(tree, place)
        subject = source if line is None else f"{source}:{line}"
        where = ".".join(str(part) for part in place)
        if first["type"] == _STEP_FAULT:
            context = first["ctx"]
            raise UsageError(f"{subject}: {where}: {context['message']}", context["hint"]) from error
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(str(place[-1]), _known_at(place[:-1]))
            raise UsageError(f"{subject}: unknown key '{where}'", hint) from error
        if first["type"] == "missing" and place == ("model",):
            raise UsageError(
                f"{subject}: the recipe names no model", "write `model: ...` or give --model MODEL"
            ) from error
        raise invalid(error, subject, Recipe.model_fields) from error


def _known_at(path: Sequence[int | str]) -> list[str]:
    """The keys that a recipe may have at a path; none where anything may stand."""
    kinds: dict[tuple[str, ...], type[BaseModel]] = {
        (): Recipe,
        ("data",): Data,
        ("bench",): Bench,
        ("gates", "*"): Gate,
        ("gates", "*", "arms"): Arms,
    }
    kind = kinds.get(tuple("*" if str(part).isdecimal() else str(part) for part in path))
    return list(kind.model_fields) if kind is not None else []


def _assign(document: dict[str, Any], setting: str) -> None:
    """Set one ``PATH=VALUE`` in a recipe document, in place."""
    from compress.core import yaml_text

    path, separator, text = setting.partition("=")
    if not separator or not path:
        raise UsageError(f"setting '{setting}' is not PATH=VALUE", "write, say, --set steps.0.bits=3")
    _, value = yaml_text.parse(text, f"setting '{path}'") if text.strip() else (None, None)
    parts: list[str] = path.split(".")
    node: Any = document
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            index = _index(part, node, ".".join(parts[:depth]), setting)
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            known = _known_keys(parts[:depth], document)
            if known and part not in known:
                raise UsageError(f"setting '{setting}': unknown key '{part}'", did_you_mean(part, known))
            if last:
                node[part] = value
            else:
                node = node.setdefault(part, {})
        else:
            above = ".".join(parts[:depth])
            raise UsageError(f"setting '{setting}': '{above}' is {node!r}, which has no '{part}'")


def _index(part: str, items: Sequence[Any], above: str, setting: str) -> int:
    if not part.isdecimal():
        raise UsageError(f"setting '{setting}': '{above}' is a list, expected a number, got '{part}'")
    index = int(part)
    if index >= len(items):
        count = f"{len(items)} {'entry' if len(items) == 1 else 'entries'}"
        raise UsageError(f"setting '{setting}': '{above}' has {count}, numbered from 0", f"got {index}")
    return index


def _known_keys(path: Sequence[str], document: Mapping[str, Any]) -> list[str]:
    if len(path) == 2 and path[0] == "steps":
        step = document["steps"][int(path[1])]
        method = step.get("use") if isinstance(step, dict) else None
        return ["use", *find(method).model_fields] if isinstance(method, str) else []
    return _known_at(tuple(path))
