"""fastseq.GRU beside torch.nn.GRU, inference and training step."""

from sequences import over_dtypes, over_shapes, run


@over_dtypes
@over_shapes
def test_forward(benchmark, race, shape, dtype):
    run(benchmark, race, "GRU", shape, dtype, "forward")


@over_dtypes
@over_shapes
def test_training(benchmark, race, shape, dtype):
    run(benchmark, race, "GRU", shape, dtype, "training")
