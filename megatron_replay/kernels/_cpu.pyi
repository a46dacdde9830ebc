# Every tensor is the integer of its data pointer; csrc/cpu/bindings.cpp.
def level() -> str: ...
def use_level(name: str) -> None: ...
def dot_products(
    exp_avgs: list[int], grads: list[int], sizes: list[int], sums: int, threads: int
) -> None: ...
def square_sums(grads: list[int], sizes: list[int], sums: int, threads: int) -> None: ...
def momentum_step(
    params: list[int],
    grads: list[int],
    exp_avgs: list[int],
    exp_avg_sqs: list[int],
    copies: list[int],
    sizes: list[int],
    coefficients: int,
    scalars: int,  # in a row of the coefficients
    stride: int,  # 1: a row for each tensor; 0: one row
    bounded: bool,
    sums: int,
    threads: int,
) -> None: ...
def arctangent(y: int, x: int, out: int, size: int) -> None: ...
def row_maxima(
    logits: tuple[int, int, int, int, int],  # data pointer, type, rows, size, row stride
    maxima: int,
    threads: int,
) -> None: ...
def shard_tokens(
    logits: tuple[int, int, int, int, int],
    vocab_start: int,
    count: int,
    given: bool,
    maxima: int,
    totals: int,
    values: int,
    ids: int,
    threads: int,
) -> None: ...
def cut_tokens(
    values: int,
    candidate_ids: int,
    rows: int,
    count: int,
    totals: int,
    maxima: int,
    labels: int,
    label_logits: int,
    uncovered: float,
    ids: int,
    offsets: int,
    num_candidates: int,
    label_appended: int,
    inside: int,
    threads: int,
) -> None: ...

class RestrictedHead:
    """csrc/cpu/restricted_head.h. An operand is (data pointer, row stride, whether it is bf16)."""

    def __init__(
        self, ids: int, offsets: int, labels: int, positions: int, rows: int, threads: int
    ) -> None: ...
    def forward(
        self,
        hidden: tuple[int, int, bool],
        weight: tuple[int, int, bool],
        channels: int,
        max: int,
        sum: int,
        label_logit: int,
        threads: int,
    ) -> None: ...
    def backward(
        self,
        hidden: tuple[int, int, bool],
        weight: tuple[int, int, bool],
        channels: int,
        top: int,
        total: int,
        grad: int,
        hidden_grad: int,
        weight_grad: int,
        weight_grad_stride: int,
        threads: int,
    ) -> None: ...
