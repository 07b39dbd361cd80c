"""Facts about a model, by which a whole chain of passes is checked before a byte is loaded.

A pass names the facts it needs, gives and breaks. The engine walks the chain with the facts of the
source model and refuses the first step whose needs are not met.
"""

from enum import StrEnum


class Fact(StrEnum):
    """What can be true of an artifact."""

    TRANSFORMERS = "transformers"  # a folder that transformers' from_pretrained reads
    FLOAT_WEIGHTS = "float-weights"  # every weight is a float that a pass may change
    INTEGER_WEIGHTS = "integer-weights"  # some weights are stored as integers and scales
    ONNX_GRAPH = "onnx-graph"  # a graph that ONNX Runtime reads
    GPTQ_CHECKPOINT = "gptq-checkpoint"  # integers as GPTQ's kernels read them; stock transformers does not
    AWQ_CHECKPOINT = "awq-checkpoint"  # integers as AWQ's kernels read them; stock transformers does not
    GGUF_FILE = "gguf-file"  # a file that llama.cpp reads


MEANING: dict[Fact, str] = {
    Fact.TRANSFORMERS: "a transformers model folder",
    Fact.FLOAT_WEIGHTS: "float weights",
    Fact.INTEGER_WEIGHTS: "integer weights",
    Fact.ONNX_GRAPH: "an ONNX graph",
    Fact.GPTQ_CHECKPOINT: "a GPTQ checkpoint",
    Fact.AWQ_CHECKPOINT: "an AWQ checkpoint",
    Fact.GGUF_FILE: "a GGUF file",
}
