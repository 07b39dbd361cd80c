"""A transformers model in memory, whatever its linear layers run on."""

import inspect
from collections.abc import Mapping
from typing import Any, final

import torch

from compress.core.errors import EnvironmentFault, ModelError
from compress.core.run import Device
from compress.models.tasks import Task
from compress.runtimes import Generation, Session


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
        """See `Session.facts`."""
        return self._facts

    @torch.inference_mode()
    def outputs(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Session.outputs`."""
        batch = self._task.batch(tokens.to(self._device))
        return self._task.outputs(self._model(**batch, **self._without_cache))

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor) -> Generation:
        """See `Session.prefill`."""
        batch = self._task.batch(tokens.to(self._device))
        result = self._model(**batch, use_cache=True, **self._last_only)
        cache = result.past_key_values
        if cache is None:
            raise ModelError("the model returns no cache, so it cannot decode token by token")
        return Generation(result.logits[:, -1].argmax(-1), cache, tokens.shape[1])

    @torch.inference_mode()
    def decode(self, state: Generation) -> Generation:
        """See `Session.decode`."""
        result = self._model(input_ids=state.tokens[:, None], past_key_values=state.cache, use_cache=True)
        return Generation(result.logits[:, -1].argmax(-1), result.past_key_values, state.length + 1)

    def synchronize(self) -> None:
        """See `Session.synchronize`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; what several names share is counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())


def chosen_device(device: Device) -> torch.device:
    """The torch device.

    Raises:
        EnvironmentFault: ``cuda`` is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("no CUDA device is at hand", "measure with device: cpu")
    return torch.device(device)
