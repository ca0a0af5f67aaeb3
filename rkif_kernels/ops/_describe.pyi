from collections.abc import Sequence

def describe(
    tensors: Sequence[object], exchange_api: object, types: tuple[type, ...]
) -> tuple[bytes, bytes] | None: ...
