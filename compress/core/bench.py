"""What a bench measures, on which runtimes, how often, how long, and on how much text."""

from collections.abc import Mapping
from typing import Any, Literal, final

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from compress.core.passes import invalid


@final
class Bench(BaseModel):
    """The settings of a before/after experiment, beside its models and its text."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    runtimes: tuple[str, ...] = Field(
        default=("torch-eager",),
        description="how the models are run; the first is the one that gates mean unless they name another",
    )
    launches: PositiveInt = Field(
        default=3, description="timed processes of each arm; an interval on speed needs at least 2"
    )
    looks: PositiveInt = Field(
        default=4,
        description="how often the gates may be looked at: while one is undecided, each look but the first "
        "measures twice as much, or what the budget leaves room for; bounds are widened so that all looks "
        "together err as rarely as one, and the last look's have what the others left",
    )
    budget: NonNegativeFloat = Field(
        default=600.0, description="seconds after which no further look is begun; 0 looks once"
    )
    noise_floor: bool = Field(
        default=True,
        description="launch BEFORE a second time in each round: what it differs from itself is the noise",
    )
    repeats: PositiveInt = Field(
        default=3, description="timed samples of each rate in a launch at least, after a warm-up"
    )
    launch_seconds: NonNegativeFloat = Field(
        default=6.0,
        description="seconds that the samples of each rate shall take in a launch: where they are short, "
        "there are more of them, at most 40; 0 takes `repeats`",
    )
    sample_seconds: NonNegativeFloat = Field(
        default=0.1, description="least time of a sample; what is done sooner is done again within it"
    )
    batch_size: PositiveInt = Field(default=1, description="sequences at once while timing")
    prompt_length: PositiveInt = Field(default=128, description="tokens of each timed prompt")
    shapes: tuple[str, ...] = Field(
        default=(),
        description="further shapes to time, BATCHxPROMPT such as 8x512, beside batch size and prompt length",
    )
    new_tokens: PositiveInt = Field(default=32, description="tokens that are decoded, never fewer")
    protocol: Literal["windows", "documents", "llama.cpp", "lm-eval"] = Field(
        default="windows",
        description="perplexity over disjoint windows of the joined text, over each document by itself, over "
        "the second half of each window as llama.cpp, or over whole documents as lm-evaluation-harness",
    )
    tokens: PositiveInt = Field(default=20_480, description="tokens of text that are scored")
    window: PositiveInt | None = Field(
        default=None,
        description="tokens of a scored window; none takes 2,048 (llama.cpp: 512) or the model's positions",
    )
    join: str = Field(default="\n\n", description="text between documents, for windows and llama.cpp")
    bos: bool | None = Field(
        default=None,
        description="whether each sequence starts with the beginning-of-text token; none says yes for "
        "documents, no for windows, and for the others what the tokenizer does by itself",
    )
    stored_log_probabilities: str | None = Field(
        default=None,
        description="file with BEFORE's most likely tokens at each position, written while BEFORE is scored "
        "if it is not there, and read instead of running BEFORE beside each AFTER; the divergence is then a "
        "lower bound",
    )
    documents: PositiveInt = Field(
        default=256, description="documents that classifiers and encoders are compared on"
    )
    suites: tuple[str, ...] = Field(
        default=(),
        description="JSON lines files of examples with known answers, each scored by itself; builtin:tasks "
        "stands for all suites that ship with the package, builtin:tasks/NAME for one; lm-eval:NAME is a "
        "task of lm-evaluation-harness, lm-eval:FILE.yaml one of your own",
    )
    suite_limit: PositiveInt | None = Field(
        default=None, description="examples of each suite; none takes all of them"
    )
    generated_tokens: PositiveInt = Field(
        default=64, description="tokens of an answer at most, where a suite has answers written"
    )
    scoring_batch_size: PositiveInt = Field(default=8, description="sequences at once while scoring")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="precision while timing; auto is the stored one"
    )
    scoring_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="precision while scoring, so that rounding does not hide a difference"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where models run")
    threads: PositiveInt | None = Field(
        default=None, description="threads of arithmetic; none takes as many as it may use"
    )
    seed: NonNegativeInt = Field(default=0, description="of the order of launches and of the bootstrap")
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, description="of the intervals in the report")
    resamples: PositiveInt = Field(default=2_000, description="bootstrap resamples of an interval")
    steal_limit: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="share of the processor time that the host of a virtual machine may steal during a timed "
        "launch, which is else not trusted; none only notes it",
    )
    time_limit: PositiveFloat = Field(
        default=1_800.0,
        description="seconds that a measured process may take, or of those that take turns each turn",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="whether code inside a model, or beside a task of lm-evaluation-harness, may run",
    )

    @classmethod
    def of(cls, document: "Mapping[str, Any] | Bench | None") -> "Bench":
        """Settings from plain data.

        Raises:
            UsageError: an unknown name or a value that does not fit.
        """
        if isinstance(document, Bench):
            return document
        try:
            return cls.model_validate(dict(document or {}))
        except ValidationError as error:
            raise invalid(error, "bench", cls.model_fields) from error
