from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def decode_records(
    records: Sequence[memoryview], *, vocab_size: int, high_bits: int, has_logits: bool
) -> (
    int
    | tuple[
        npt.NDArray[np.int64],
        npt.NDArray[np.int32],
        npt.NDArray[np.int64],
        npt.NDArray[np.uint16],
        npt.NDArray[np.int32],
        npt.NDArray[np.uint16],
    ]
): ...
def joined_crc(crc: int, crcs: npt.NDArray[np.uint32], sizes: npt.NDArray[np.int64]) -> int: ...
