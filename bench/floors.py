"""What the kernels are held to: torch's time over ours, with 1 thread and with 4. The report marks what falls short."""

from typing import NamedTuple

from shapes import AttentionShape, CellShape, Shape

ANY = range(1, 1 << 30)
ONE = range(1, 2)
EIGHT_UP = range(8, 1 << 30)
THIRTY_TWO_UP = range(32, 1 << 30)
TO_512 = range(1, 513)


class Floor(NamedTuple):
    """A row of the table: which cases it is for, and the floors; None where there is none."""

    names: str
    mode: str
    B: range
    H: range
    one_thread: float | None
    four_threads: float | None
    layout: str = "plain"
    dtype: str = "float32"


# The first row that fits a case counts.
FLOORS = (
    Floor("LSTM", "forward", ONE, range(128, 129), 2.0, 3.0),
    Floor("LSTM", "forward", ONE, range(512, 513), 1.45, 2.0),
    Floor("LSTM", "forward", range(8, 9), range(256, 257), 1.35, 1.8),
    Floor("LSTM", "forward", THIRTY_TWO_UP, ANY, 1.08, 1.2),
    Floor("LSTM", "forward", ANY, ANY, 1.0, 1.1, layout="bidirectional"),
    Floor("GRU", "forward", ONE, range(128, 129), 7.0, 15.0),
    Floor("GRU", "forward", ONE, range(512, 513), 1.8, 6.0),
    Floor("GRU", "forward", EIGHT_UP, ANY, 2.6, 3.4),
    Floor("GRU", "forward", EIGHT_UP, ANY, 2.6, 3.4, layout="bidirectional"),
    Floor("RNN", "forward", ONE, range(128, 129), 4.0, 8.0),
    Floor("RNN", "forward", EIGHT_UP, range(1024, 1025), 2.2, 3.0),
    Floor("RNN", "forward", EIGHT_UP, ANY, 2.4, 4.0),
    Floor("RNN", "forward", EIGHT_UP, ANY, 2.4, 4.0, layout="bidirectional"),
    Floor("LSTM", "training", ONE, ANY, 1.9, 3.5),
    Floor("LSTM", "training", range(8, 65), TO_512, 1.15, 1.5),
    Floor("LSTM", "training", ANY, range(1024, 1025), 1.0, 1.3),
    Floor("LSTM", "training", ANY, ANY, 1.0, 1.3, layout="bidirectional"),
    Floor("GRU RNN", "training", ONE, range(128, 129), 8.0, 12.0),
    Floor("GRU RNN", "training", ONE, range(512, 513), 2.5, 4.0),
    Floor("GRU RNN", "training", EIGHT_UP, range(1024, 1025), 2.0, 2.2),
    Floor("GRU RNN", "training", EIGHT_UP, ANY, 2.3, 2.5),
    Floor("GRU RNN", "training", EIGHT_UP, ANY, 2.3, 2.5, layout="bidirectional"),
    Floor("LSTM", "forward", ANY, ANY, 2.5, 4.0, layout="packed"),
    Floor("LSTM", "training", ANY, ANY, 3.2, 6.0, layout="packed"),
    Floor("GRU", "forward", ANY, ANY, 2.7, 4.0, layout="packed"),
    Floor("GRU", "training", ANY, ANY, 3.0, 6.0, layout="packed"),
    Floor("LSTM GRU RNN", "forward", ONE, ANY, 1.0, 1.0, layout="step"),
    Floor("LSTMCell GRUCell", "forward", ONE, range(1, 129), 3.0, None),
    Floor("RNNCell", "forward", ONE, ANY, 2.0, None),
    Floor("LSTMCell GRUCell RNNCell", "forward", THIRTY_TWO_UP, ANY, 2.2, None),
    Floor("LSTMCell GRUCell RNNCell", "forward with grad", ONE, ANY, 2.0, None),
    Floor("LSTMCell GRUCell", "training", ONE, ANY, 2.0, None),
    Floor("RNNCell", "training", ONE, ANY, 1.3, None),
    Floor("LSTM", "forward", ONE, ANY, 1.5, 1.5, dtype="bfloat16"),
    Floor("LSTM", "forward", EIGHT_UP, ANY, 0.95, 0.95, dtype="bfloat16"),
    Floor("GRU", "forward", ANY, ANY, 3.0, 3.0, dtype="bfloat16"),
    Floor("LSTM", "training", ONE, ANY, 4.0, 4.0, dtype="bfloat16"),
    Floor("LSTM", "training", EIGHT_UP, ANY, 1.2, 1.2, dtype="bfloat16"),
)

# The median over LSTM and GRU forward with B >= 8 in float32, of the FMA peak.
SHARE_OF_PEAK = (0.80, 0.75)
# Time per token of packed over padded input: a ceiling.
PACKED_OVER_PADDED = (1.15, 1.3)


def layout(shape: Shape | CellShape) -> str:
    if isinstance(shape, CellShape):
        return "plain"
    if shape.packed:
        return "packed"
    return "bidirectional" if shape.bidirectional else "step" if shape.T == 1 else "plain"


def floors(name: str, mode: str, shape: Shape | CellShape, dtype: str, threads: int) -> dict[str, float]:
    """What a case is held to: `ratio_floor`, `share_floor`, `packed_over_padded_ceiling`, each only where there is one.

    More than one thread is held to the floors of four.
    """
    column, form, found = threads > 1, layout(shape), {}
    for row in FLOORS:
        fits = name in row.names.split() and (mode, form, dtype) == (row.mode, row.layout, row.dtype)
        if fits and shape.B in row.B and shape.H in row.H:
            if (floor := row[4 + column]) is not None:
                found["ratio_floor"] = floor
            break
    if name in ("LSTM", "GRU") and mode == "forward" and dtype == "float32" and form != "packed" and shape.B >= 8:
        found["share_floor"] = SHARE_OF_PEAK[column]
    if form == "packed" and dtype == "float32":
        found["packed_over_padded_ceiling"] = PACKED_OVER_PADDED[column]
    return found


class AttentionFloor(NamedTuple):
    """A row of the table of attention; a case is named by its kind, a variant of full, decode or grouped decode."""

    kinds: str
    mode: str
    S: range
    one_thread: float
    four_threads: float
    dtype: str = "float32"


TO_1024 = range(1, 1025)
LONGER = range(1025, 1 << 30)
ATTENTION_FLOORS = (
    AttentionFloor("full", "forward", TO_1024, 2.1, 2.1),
    AttentionFloor("causal", "forward", TO_1024, 2.7, 2.6),
    AttentionFloor("full", "forward", LONGER, 2.2, 2.3),
    AttentionFloor("causal", "forward", LONGER, 2.4, 2.4),
    AttentionFloor("full", "forward", ANY, 3.5, 3.5, "bfloat16"),
    AttentionFloor("causal", "forward", ANY, 4.0, 4.0, "bfloat16"),
    AttentionFloor("full", "training", ANY, 1.8, 1.8),
    AttentionFloor("causal", "training", ANY, 2.4, 2.4),
    AttentionFloor("dropout", "training", ANY, 3.0, 3.0),
    AttentionFloor("mask_gradient", "training", ANY, 2.0, 2.0),
    AttentionFloor("decode", "forward", ANY, 1.8, 1.8),
    AttentionFloor("grouped_decode", "forward", ANY, 2.5, 2.5),
    AttentionFloor("decode grouped_decode", "forward", ANY, 8.0, 6.0, "bfloat16"),
    AttentionFloor("MultiheadAttention", "forward", ANY, 2.2, 2.3),
    AttentionFloor("MultiheadAttention", "training", ANY, 1.8, 1.8),
)
FMA_PEAK, BANDWIDTH = "share of the FMA peak", "share of the read bandwidth"
# Of the FMA peak, full attention forward in float32: at S = 512, and above.
ATTENTION_SHARES = ((range(512, 513), 0.65, 0.60), (range(1024, 1 << 30), 0.70, 0.65))
# Of the rate at which memory is read, decoding in float32 where the cache of keys and values comes from there.
BANDWIDTH_SHARE = (0.85, 0.90)
# The fastest other library's time over ours, where memory is not the limit.
FASTEST_PEER = 1.1
# The time of full causal attention over that with a window, at S = 1024.
CAUSAL_OVER_WINDOW = 4.0
# What fits in the last cache of a small server, so that a larger cache of keys and values is read from memory.
CACHE_BYTES = 16 << 20


def ratio_floor(kind: str, mode: str, S: int, dtype: str, threads: int) -> dict[str, float]:
    """`ratio_floor` of an attention case, if there is one."""
    for row in ATTENTION_FLOORS:
        if kind in row.kinds.split() and S in row.S and (mode, dtype) == (row.mode, row.dtype):
            return {"ratio_floor": row.four_threads if threads > 1 else row.one_thread}
    return {}


def attention_share(shape: AttentionShape, kind: str, mode: str, dtype: str, threads: int) -> dict[str, float]:
    """The floor of a share by the name of what is shared, if there is one."""
    if (mode, dtype) != ("forward", "float32"):
        return {}
    column, found = threads > 1, {}
    for sizes, *floors in ATTENTION_SHARES:
        if kind == "full" and shape.S in sizes:
            found[FMA_PEAK] = floors[column]
    if kind == "decode" and shape.cache_elements * 4 > CACHE_BYTES:
        found[BANDWIDTH] = BANDWIDTH_SHARE[column]
    return found
