"""Runs in an environment with llama.cpp (the package xllamacpp): what it says after some tokens, as JSON.

Usage: python llama_cpp_log_probabilities.py MODEL.gguf TOKENS.json OUT.json

TOKENS.json holds lists of tokens; OUT.json gets for each the natural logarithm of the probability of every
token of the vocabulary to come next, in the order of the vocabulary.
"""

import json
import sys
from pathlib import Path

import xllamacpp

VOCABULARY = 1 << 20
"""More than any vocabulary has: all of it is wanted."""


def main() -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    # By default keys and values are rounded to float16, which is not of the file.
    parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    found = []
    for tokens in json.loads(Path(sys.argv[2]).read_text()):
        answer = server.handle_completions(
            {
                "prompt": tokens,
                "max_tokens": 1,
                "logprobs": VOCABULARY,
                "temperature": 0.0,
                "cache_prompt": False,
            }
        )
        said = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append([entry["logprob"] for entry in sorted(said, key=lambda entry: entry["id"])])
    Path(sys.argv[3]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
