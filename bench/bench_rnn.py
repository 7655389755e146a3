"""fastseq.RNN beside torch.nn.RNN, inference and training step."""

from sequences import over_dtypes, over_shapes, run


@over_dtypes
@over_shapes
def test_forward(benchmark, race, shape, dtype):
    run(benchmark, race, "RNN", shape, dtype, "forward")


@over_dtypes
@over_shapes
def test_training(benchmark, race, shape, dtype):
    run(benchmark, race, "RNN", shape, dtype, "training")
