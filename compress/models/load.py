"""Building a model from its folder: the configuration, and a skeleton without weights."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers.initialization import no_init_weights

from compress.core.artifact import Artifact
from compress.core.errors import ModelError, UsageError
from compress.models.tasks import resolve


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own bars and warnings out of a block that loads a model piece by piece.

    They speak of a whole model (``Loading weights``, missing keys), which a block is not.
    """
    bars = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    if not bars and level >= logging.ERROR:
        # Inside another quiet block. A change of level makes every logger of the process forget its own.
        yield
        return
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def configuration(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a folder.

    Raises:
        ModelError: the configuration is not one that transformers understands.
    """
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise ModelError(
            f"{folder / 'config.json'} is not understood by transformers: {error}",
            "a newer transformers may know this architecture; custom code needs --trust-remote-code",
        ) from error


def skeleton(
    source: Artifact,
    *,
    task: str = "auto",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Any:
    """The model of a folder with its parameters on the meta device and its buffers real.

    Non-persistent buffers (rotary frequencies, masks) are in no file, so they must be computed while the
    model is built. Experts run one by one (``eager``), because a sweep has to see what reaches each.

    Args:
        dtype: of the parameters, and so of the computation once they are loaded.

    Raises:
        ModelError: the model cannot be built from its configuration.
        UsageError: the task is unknown.
    """
    config = configuration(source.path, trust_remote_code=trust_remote_code)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    model_class = resolve(task, source.config).model_class()
    try:
        # Nothing is initialised: every parameter comes from the files.
        with quiet(), no_init_weights(), init_empty_weights(include_buffers=False):
            model = model_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"the model of {source.path} cannot be built: {error}",
            "is the task right? give --task",
        ) from error
    if getattr(config, "_experts_implementation", None) is not None:
        model.config._experts_implementation = "eager"
    model.tie_weights()
    return model.eval()


def loaded_dtype(source: Artifact) -> torch.dtype:
    """The dtype in which stock transformers holds the floats of a model when nothing else is asked.

    Scales are stored in it: in any other dtype a loader would round them once more.
    """
    stated = source.config.get("dtype") or source.config.get("torch_dtype")
    if isinstance(stated, str) and isinstance(getattr(torch, stated, None), torch.dtype):
        return getattr(torch, stated)  # type: ignore[no-any-return]
    for file in source.weight_files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                dtype = handle.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype  # type: ignore[no-any-return]
    return torch.float32


def tokenizer(source: Artifact, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder.

    Raises:
        ModelError: there is none, or it is broken.
    """
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(
                source.path, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise ModelError(
            f"the tokenizer of {source.path} cannot be loaded: {error}",
            "put the tokenizer files of the original model into the folder",
        ) from error
