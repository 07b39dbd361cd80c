"""Writing text with a model, token by token, on any runtime: prompts, choices of tokens, where to stop.

For a person who wants to talk to an artifact. Nothing here is timed: the bench drives sessions itself.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, final

from compress.core.errors import CompressError, EnvironmentFault, ModelError, PlanError, UsageError
from compress.core.facts import Fact
from compress.core.run import Device
from compress.models.positions import positions
from compress.runtimes import Placement, Session, Unavailable, find

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from compress.core.artifact import Artifact
    from compress.models.tasks import Task

_UNFINISHED: Final = "\ufffd"
"""What a tokenizer shows for bytes that do not make a character yet."""


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen.

    Attributes:
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability are drawn from (Holtzman et
            al. 2020, "The Curious Case of Neural Text Degeneration", arXiv 1904.09751).
        seed: of the draws.

    Raises:
        UsageError: a number out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(
                f"a temperature of {self.temperature}", "give 0 for the likeliest token, or more"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}, expected more than 0 and at most 1")


@final
@dataclass
class Writing:
    """A text under way.

    Attributes:
        session: the model in memory.
        tokenizer: of the model.
        prompt: int64 ``[1, length]``.
        ends: tokens that end the text.
        limit: tokens at most.
        choice: how each is chosen.
        count: tokens that were chosen so far.
    """

    session: Session
    tokenizer: Any
    prompt: "Tensor"
    ends: frozenset[int]
    limit: int
    choice: Choice
    count: int = 0

    @classmethod
    def open(
        cls,
        model: str,
        prompt: str,
        choice: Choice,
        *,
        limit: int,
        chat: bool = False,
        runtime: str | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int | None = None,
        trust_remote_code: bool = False,
    ) -> "Writing":
        """Bring a model into memory and a prompt into tokens.

        Raises:
            CompressError: of the kind that fits; nothing has been written.
        """
        import torch

        from compress.core.artifact import Artifact
        from compress.models.load import tokenizer
        from compress.models.source import resolve as folder_of
        from compress.models.tasks import resolve

        if threads is not None:
            torch.set_num_threads(threads)
        artifact = Artifact.open(folder_of(model, trust_remote_code=trust_remote_code))
        words = tokenizer(artifact, trust_remote_code=trust_remote_code)
        tokens = prompt_tokens(words, prompt, chat=chat)
        room = room_for(artifact, tokens, limit)
        placement = Placement(device_for(artifact, device), trust_remote_code=trust_remote_code)
        session = open_session(artifact, resolve("auto", artifact.config), placement, runtime)
        return cls(session, words, tokens, end_tokens(artifact), room, choice)

    def pieces(self) -> Iterator[str]:
        """The text, piece by piece as it is written."""
        return stream(self.tokenizer, self._counted())

    def facts(self) -> dict[str, Any]:
        """For the record: how many tokens went in and came out, whether the model ended, what ran it."""
        return {
            "prompt_tokens": self.prompt.shape[1],
            "tokens": self.count,
            "ended": self.count < self.limit,
            "runs": dict(self.session.facts),
        }

    def _counted(self) -> Iterator[int]:
        for token in generate(self.session, self.prompt, self.ends, self.limit, self.choice):
            self.count += 1
            yield token


def open_session(
    artifact: "Artifact", task: "Task", placement: Placement, runtime: str | None = None
) -> Session:
    """The artifact in memory, on a named runtime or on the first that runs it.

    A graph runs on ``onnxruntime``, integer weights on their kernels where those take them, everything else
    in stock transformers.

    Raises:
        PlanError: the artifact does not generate text, or no runtime runs it; with each one's reason.
        CompressError: as `Runtime.load`.
    """
    if not task.generates:
        raise PlanError(f"{artifact.path.name} is for {task.name} and does not write text")
    names = [runtime] if runtime is not None else _candidates(artifact)
    reasons: list[str] = []
    for name in names:
        try:
            return find(name).load(artifact, task, placement)
        except Unavailable as error:
            reasons.append(f"{name}: {error.message}")
    raise PlanError(f"nothing here runs {artifact.path.name}: {'; '.join(reasons)}")


def device_for(artifact: "Artifact", asked: Literal["auto", "cpu", "cuda"]) -> Device:
    """Where to run: where it is asked, or else on the GPU if there is one and the runtime can use it."""
    if asked != "auto":
        return asked
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if Fact.ONNX_GRAPH not in artifact.facts:
        return "cuda"
    from compress.graph.running import providers_for

    try:
        providers_for("cuda")
    except EnvironmentFault:
        return "cpu"
    return "cuda"


def room_for(artifact: "Artifact", prompt: "Tensor", wanted: int) -> int:
    """How many tokens may follow a prompt, at most as many as wanted.

    Raises:
        UsageError: the prompt fills the model's positions.
    """
    limit = positions(artifact.config)
    if limit is None:
        return wanted
    length = prompt.shape[1]
    if length >= limit:
        raise UsageError(
            f"the prompt has {length} tokens, the model was made for {limit}", "give a shorter one"
        )
    return min(wanted, limit - length)


def prompt_tokens(tokenizer: Any, text: str, *, chat: bool) -> "Tensor":
    """A prompt as tokens, int64 ``[1, length]``.

    Args:
        chat: say it as a user's turn, in the model's own chat template.

    Raises:
        ModelError: the tokenizer has no chat template.
        UsageError: the text makes no tokens.
    """
    import torch

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the model has no chat template", "leave --chat out: the prompt is then continued"
            )
        said = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        tokens = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        tokens = tokenizer(text)["input_ids"]
        if tokens and tokens[-1] == tokenizer.eos_token_id:
            # Some tokenizers end every text; a text that has ended is not continued.
            tokens = tokens[:-1]
    if not tokens:
        raise UsageError("the prompt is empty, and the tokenizer begins no text by itself", "say something")
    return torch.tensor([tokens], dtype=torch.int64)


def end_tokens(artifact: "Artifact") -> frozenset[int]:
    """The tokens that end a text: those of the generation configuration, else of the model's own.

    Raises:
        ModelError: the generation configuration is broken.
    """
    file = artifact.path / "generation_config.json"
    said: Any = None
    if file.is_file():
        said = _read(file).get("eos_token_id")
    if said is None:
        said = artifact.config.get("eos_token_id")
    found = said if isinstance(said, list) else [said]
    return frozenset(token for token in found if isinstance(token, int))


def generate(
    session: Session, prompt: "Tensor", ends: Iterable[int], limit: int, choice: Choice
) -> Iterator[int]:
    """The tokens that follow a prompt, as they are chosen; the one that ends the text is not among them.

    Args:
        session: of a model that generates.
        prompt: int64 ``[1, length]``.
        ends: tokens that end the text.
        limit: how many tokens at most.
        choice: how each is chosen.
    """
    import torch

    stop = frozenset(ends)
    generator = torch.Generator().manual_seed(choice.seed)
    state = None
    for _ in range(limit):
        state = session.prefill(prompt) if state is None else session.decode(state)
        if choice.temperature > 0:
            token = _drawn(state.logits, choice, generator)
            state = replace(state, tokens=torch.tensor([token], device=state.tokens.device))
        else:
            token = int(state.tokens[0])
        if token in stop:
            return
        yield token


def stream(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come: pieces that, put together, are the text of them all.

    A piece is held back while its last character is not complete.
    """
    read: list[int] = []
    shown = ""
    for token in tokens:
        read.append(token)
        text: str = tokenizer.decode(read, skip_special_tokens=True)
        if not text.endswith(_UNFINISHED):
            yield text[len(shown) :]
            shown = text
    rest: str = tokenizer.decode(read, skip_special_tokens=True)
    if len(rest) > len(shown):
        yield rest[len(shown) :]


def _candidates(artifact: "Artifact") -> list[str]:
    if Fact.ONNX_GRAPH in artifact.facts:
        return ["onnxruntime"]
    return ["torch-int4", "torch-eager"] if Fact.INTEGER_WEIGHTS in artifact.facts else ["torch-eager"]


def _drawn(logits: "Tensor | None", choice: Choice, generator: "Generator") -> int:
    """One token out of the nucleus of a distribution, drawn on the CPU: one generator for every device."""
    import torch

    if logits is None:
        raise CompressError("this runtime gives no logits to draw from", "generate with --temperature 0")
    probabilities = (logits[0].float().cpu() / choice.temperature).softmax(-1)
    values, tokens = probabilities.sort(descending=True, stable=True)
    # A token stays while those before it have not reached the share: the first one always does.
    values[values.cumsum(0) - values >= choice.top_p] = 0
    return int(tokens[torch.multinomial(values, 1, generator=generator)])


def _read(file: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not JSON: {error}", "restore it from the original model") from error
    return document if isinstance(document, dict) else {}
