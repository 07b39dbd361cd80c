"""Low-rank adapters on a frozen model, through peft: trained, and added to the weights or saved beside them.

Behind integers the frozen weights are what the integers stand for. Adding adapters to them gives floats that
have to be rounded again, on the same grid: what that costs is measured on the validation text.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import nn

from compress.core.artifact import ADAPTER_FOLDER, Artifact
from compress.core.errors import EnvironmentFault, PlanError
from compress.core.passes import Meant
from compress.core.patterns import matches_any
from compress.core.run import Run
from compress.formats.shards import write_shard
from compress.models.blocks import find_blocks
from compress.models.load import quiet, skeleton
from compress.models.probe import is_linear
from compress.training.adapter_options import AdapterOptions
from compress.training.student import Student
from compress.training.trainee import Trainee

_WEIGHTS: Final = "adapter_model.safetensors"
_CONFIG: Final = "adapter_config.json"


def check(method: AdapterOptions, source: Artifact, run: Run) -> None:
    """Refuse a missing package, targets that are none, and options that would say nothing.

    Raises:
        EnvironmentFault: peft is not installed.
        PlanError: naming the option.
    """
    if find_spec("peft") is None:
        raise EnvironmentFault("adapters are those of peft", "pip install 'compress-models[peft]'")
    if method.scales != "keep" or method.origin is not None:
        raise PlanError(
            "adapters leave the weights behind them as they are, and scales and origin speak of these",
            "leave --scales and --origin out, or train the whole model: distill.logits",
        )
    _targets(skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code), method, source)


@final
class Adapted(Trainee):
    """A frozen student with adapters.

    Args:
        method: their shape, and what becomes of them.
        source: the artifact.
        run: names task, device and seed.
    """

    def __init__(self, method: AdapterOptions, source: Artifact, run: Run) -> None:
        from peft import LoraConfig, get_peft_model

        self._method = method
        self._source = source
        self._student = Student(source, run, rounds=False)
        self.model: Any = self._student.model
        names = _targets(self.model, method, source)
        torch.manual_seed(run.seed)
        config = LoraConfig(
            r=method.rank,
            lora_alpha=2 * method.rank if method.alpha is None else method.alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            bias="none",
            target_modules=_short(names, self.model),
            task_type="CAUSAL_LM",
        )
        with quiet(), warnings.catch_warnings():
            # It asks transformers for a flag by a name that will go.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            self._adapted: Any = get_peft_model(self.model, config)
        self.model.eval()
        self._count = len(names)

    def reload(self) -> None:
        """See `Trainee.reload`; there are no adapters afterwards."""
        self._drop()
        self._student.reload()

    def settle(self, target: Path, judged: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
        """See `Trainee.settle`; the losses before and after what is done to the adapters, where it is any."""
        told: dict[str, Any] = {"adapters": self._count}
        if self._adapted is None:
            return told
        if self._method.result == "adapter":
            self._save(target / ADAPTER_FOLDER)
            self._drop()
            self._student.reload()
            return told
        before = judged()
        zeros = _zeros(self.model) if self._method.zeros == "keep" and not self._student.quantized else {}
        self._adapted.merge_and_unload(progressbar=False, safe_merge=True)
        self._adapted = None
        with torch.no_grad():
            for name, mask in zeros.items():
                self.model.get_parameter(name).mul_(mask)
        self._student.round()
        return told | {"zeros_kept": _count(zeros), "merging": {"before": before, "after": judged()}}

    def write(self, target: Path, told: Callable[[str, str], None]) -> dict[str, Meant]:
        """See `Trainee.write`."""
        return self._student.write(target, told)

    def _drop(self) -> None:
        if self._adapted is not None:
            self._adapted.unload()
            self._adapted = None

    def _save(self, folder: Path) -> None:
        """What ``PeftModel.from_pretrained`` reads, in bytes that depend on the contents alone."""
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().to("cpu", torch.float32)
            for name, tensor in get_peft_model_state_dict(self._adapted).items()
        }
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_shard(folder / _WEIGHTS, layout, tensors.__getitem__, lambda _: None)
        document = self._adapted.peft_config["default"].to_dict()
        # Its model is the folder above, wherever that lies.
        document |= {"inference_mode": True, "base_model_name_or_path": None}
        text = json.dumps(document, indent=2, sort_keys=True, default=sorted)
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _targets(model: Any, method: AdapterOptions, source: Artifact) -> list[str]:
    """The linear layers that get an adapter, by their paths.

    Raises:
        PlanError: there are none; or one is smaller than the rank.
    """
    linear = [
        f"{block.name}.{name}"
        for block in find_blocks(model)
        for name, module in block.module.named_modules()
        if is_linear(module)
    ]
    found = [name for name in linear if matches_any(method.targets, name)]
    if not found:
        raise PlanError(
            f"no linear layer in the blocks of {source.path} matches {', '.join(method.targets)}",
            f"they are called like {linear[0]}" if linear else "adapters need linear layers",
        )
    for name in found:
        least = min(model.get_submodule(name).weight.shape)
        if method.rank > least:
            raise PlanError(
                f"adapters of rank {method.rank} are no smaller than {name}, which has {least}",
                f"give --rank {max(1, least // 4)}, or leave the layer out (--target)",
            )
    return found


def _short(names: list[str], model: Any) -> list[str]:
    """Last parts of the names where these name no other layer, as engines that serve adapters expect."""
    last = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if meant == set(names) else sorted(names)


def _zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where matrices under adapters are not zero, by their names without adapters, where zeros are pruned."""
    found = {}
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is None:
            continue
        mask = base.weight.detach() != 0
        if bool(mask.any()) and not bool(mask.all()):
            found[f"{name}.weight"] = mask
    return found


def _count(masks: Mapping[str, torch.Tensor]) -> int:
    return sum(int(mask.logical_not().sum()) for mask in masks.values())
