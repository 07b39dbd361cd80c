"""Which split something belongs to: decided by what it says, not by when it was drawn."""

import hashlib
from enum import StrEnum
from typing import Final

_BUCKETS: Final = 16


class Split(StrEnum):
    """What a part of the text is for."""

    TRAIN = "train"
    CALIBRATION = "calibration"
    VALIDATION = "validation"
    TEST = "test"


_OF_BUCKET: Final = {0: Split.CALIBRATION, 1: Split.VALIDATION, 2: Split.TEST}
"""One bucket of 16 each; the other 13 are for training."""


def split_of(identity: str) -> Split:
    """The split of whatever has this identity.

    Args:
        identity: the same for two wordings of one problem, such as ``3 + 4`` and ``4 + 3``.
    """
    bucket = hashlib.sha256(identity.encode()).digest()[0] % _BUCKETS
    return _OF_BUCKET.get(bucket, Split.TRAIN)
