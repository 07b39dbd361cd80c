"""Graphs that several tests look at: an export takes seconds, so each is made once."""

import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers

from compress.core.artifact import Artifact
from compress.graph import building
from compress.models.tasks import resolve
from tests import models_zoo, quantized_models


@cache
def _root() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="exported-models-")


@dataclass(frozen=True)
class Exported:
    """A graph that was written and not checked yet.

    Attributes:
        source: the transformers artifact.
        folder: with the graph.
        meant: what it has to compute.
    """

    source: Artifact
    folder: Path
    meant: building.Meant

    def copy(self, target: Path) -> Path:
        """The graph again, free to be changed."""
        shutil.copytree(self.folder, target)
        return target


@cache
def decoder() -> Exported:
    """A tied decoder with grouped heads, its linear layers of 4 bits with zero points."""
    root = Path(_root().name)
    plain = models_zoo.write("llama-tied", root / "decoder")
    source = quantized_models.write(
        plain, root / "decoder-int4", bits=4, group=16, symmetric=False, leave=("lm_head", "o_proj")
    )
    return _built(Artifact.open(source), root / "decoder-graph")


def classifier(folder: Path) -> Path:
    """A random BERT that chooses one of three labels, as an ordinary checkpoint with a tokenizer."""
    torch.manual_seed(0)
    config = models_zoo.configuration("bert")
    config.num_labels = 3
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return quantized_models.add_tokenizer(folder, models_zoo.VOCABULARY)


def _built(source: Artifact, folder: Path) -> Exported:
    folder.mkdir()
    meant = building.build(source, resolve("auto", source.config), folder)
    (folder / "config.json").write_bytes((source.path / "config.json").read_bytes())
    return Exported(source, folder, meant)
