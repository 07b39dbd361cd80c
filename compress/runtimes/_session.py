"""A transformers model in memory, whatever its linear layers run on."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, final

import torch
from torch import nn

from compress.core.errors import EnvironmentFault, ModelError
from compress.core.run import Device
from compress.models.tasks import Task
from compress.runtimes import Generation, Session
from compress.runtimes._packed import PackedLinear

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _without_gradients(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The method in inference mode, which is not entered where the caller is in it already.

    Entering it takes some microseconds, more than 1% of a step of the smallest models.
    """
    guarded = torch.inference_mode()(method)

    @wraps(method)
    def entered(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        chosen = method if torch.is_inference_mode_enabled() else guarded
        return chosen(*args, **kwargs)

    return entered


@final
class TorchSession(Session):
    """Runs a `torch.nn.Module` of transformers.

    Args:
        model: with its weights, on its device, in evaluation mode.
        task: decides what goes in and what comes out.
        facts: what the runtime knows of the model beside what the session finds itself.
    """

    def __init__(self, model: Any, task: Task, facts: Mapping[str, Any]) -> None:
        self._model = model
        self._task = task
        self._device = next(iter(model.parameters())).device
        parameters = inspect.signature(model.forward).parameters
        # Serving computes the logits of a prompt's last position alone; most models can be told so.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._without_cache = {"use_cache": False} if task.generates else {}
        self._facts = {
            "device": str(self._device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "weight_bytes": weight_bytes(model),
            **facts,
        }

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Session.facts`. After the first step of decoding also ``step_bytes``, what a step reads."""
        return self._facts

    @_without_gradients
    def outputs(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Session.outputs`."""
        batch = self._task.batch(tokens.to(self._device))
        return self._task.outputs(self._model(**batch, **self._without_cache))

    @_without_gradients
    def prefill(self, tokens: torch.Tensor) -> Generation:
        """See `Session.prefill`."""
        batch = self._task.batch(tokens.to(self._device))
        result = self._model(**batch, use_cache=True, **self._last_only)
        cache = result.past_key_values
        if cache is None:
            raise ModelError("the model returns no cache, so it cannot decode token by token")
        logits = result.logits[:, -1]
        if result.logits.shape[1] > 1:
            # A view would keep the logits of the whole prompt.
            logits = logits.clone()
        return Generation(logits.argmax(-1), cache, tokens.shape[1], logits)

    @_without_gradients
    def decode(self, state: Generation) -> Generation:
        """See `Session.decode`."""
        if "step_bytes" not in self._facts:
            with _used(self._model) as modules:
                following = self._step(state)
            self._facts["step_bytes"] = read_bytes(modules)
            return following
        return self._step(state)

    def _step(self, state: Generation) -> Generation:
        result = self._model(input_ids=state.tokens[:, None], past_key_values=state.cache, use_cache=True)
        logits = result.logits[:, -1]
        return Generation(logits.argmax(-1), result.past_key_values, state.length + 1, logits)

    def synchronize(self) -> None:
        """See `Session.synchronize`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what several names share is counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())


@contextmanager
def _used(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules that run while this is open."""
    used: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: used.append(module)) for module in model.modules()
    ]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


def read_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the weights that modules read whole when they run; shared ones count once.

    A bound from below: an embedding reads a few of its rows, and of experts fused into one tensor only the
    chosen ones are read, so neither counts.
    """
    read: dict[int, int] = {}
    for module in modules:
        own: list[torch.Tensor] = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding) or any(tensor.dim() > 2 for tensor in own):
            continue
        if isinstance(module, PackedLinear):
            own += module.buffers(recurse=False)
        read |= {tensor.data_ptr(): tensor.nbytes for tensor in own}
    return sum(read.values())


def chosen_device(device: Device) -> torch.device:
    """The torch device.

    Raises:
        EnvironmentFault: ``cuda`` is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("no CUDA device is at hand", "measure with device: cpu")
    return torch.device(device)
