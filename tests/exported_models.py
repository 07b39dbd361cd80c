"""Graphs that several tests look at: an export takes seconds, so each is made once."""

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock

from compress.core.artifact import Artifact
from compress.graph import building, parity
from compress.graph.loading import load
from compress.models.tasks import resolve
from tests import models_zoo, quantized_models


@dataclass(frozen=True)
class Exported:
    """A graph that was written and not checked yet.

    Attributes:
        source: the transformers artifact.
        folder: with the graph.
    """

    source: Artifact
    folder: Path

    @cached_property
    def meant(self) -> building.Meant:
        """What the graph has to compute."""
        task = resolve("auto", self.source.config)
        loaded = load(self.source, task)
        return building.Meant(parity.reference(loaded.model, task), loaded.matrices, loaded.dense)

    def copy(self, target: Path) -> Path:
        """The graph again, free to be changed."""
        shutil.copytree(self.folder, target)
        return target


def decoder(folders: pytest.TempPathFactory) -> Exported:
    """A tied decoder with grouped heads, its linear layers of 4 bits with zero points.

    All workers of a test run share one.
    """
    root = folders.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    source, graph = root / "decoder-int4", root / "decoder-graph"
    with FileLock(root / "decoder.lock"):
        if not graph.is_dir():
            plain = models_zoo.write("llama-tied", root / "decoder")
            quantized_models.write(
                plain, source, bits=4, group=16, symmetric=False, leave=("lm_head", "o_proj")
            )
            artifact = Artifact.open(source)
            half = root / "decoder-graph.partial"
            half.mkdir()
            building.build(artifact, resolve("auto", artifact.config), half)
            shutil.copyfile(source / "config.json", half / "config.json")
            half.rename(graph)
    return Exported(Artifact.open(source), graph)


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
