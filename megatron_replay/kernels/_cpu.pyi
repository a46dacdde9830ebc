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
    stride: int,
    bounded: bool,
    sums: int,
    threads: int,
) -> None: ...
def arctangent(y: int, x: int, out: int, size: int) -> None: ...
