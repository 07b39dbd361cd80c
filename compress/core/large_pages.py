"""Large tensors in large pages of memory, where a machine has them for who asks.

The largest tensors of a run live for a moment and go back to the system: the logits of a few hundred
positions are 100 MB. Page by page of 4 KB, to get them takes as long as to compute something from them; in
pages of 2 MB it does not. Linux gives such pages to every program, to none, or to those that ask, and torch
asks only where its environment says so.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

ASKED: Final = "THP_MEM_ALLOC_ENABLE"
"""What torch looks for, once, when it takes memory for the first time."""
_POLICY: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for_large_pages(environment: MutableMapping[str, str] = os.environ, policy: Path = _POLICY) -> None:
    """Have torch ask for large pages, where that is what it takes; what the environment says already stands.

    Args:
        environment: of this process and of those that it starts.
        policy: the file in which the kernel says to whom it gives them.
    """
    if policy.is_file() and "[madvise]" in policy.read_text(encoding="ascii"):
        environment.setdefault(ASKED, "1")
