"""Quantize a model to 8 bits, look at the result, and load it as its users do.

python examples/quantize.py path/to/model path/to/result
"""

import sys
from pathlib import Path

import compress


def main(model: str, out: str) -> None:
    """Round a model to 8 bits, verify it, and show what came out."""
    recipe = compress.Recipe(
        model=model,
        steps=(compress.Step(use="quantize.rtn", bits=8, group_size="channel"),),
    )
    result = compress.run(recipe, Path(out), single=True)
    report = compress.verify(result.final)
    print(f"{report.path}: verified, digest {report.digest[:12]}")
    print(compress.inspect(result.final)["size"])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except compress.CompressError as error:
        sys.exit(f"error: {error}")
