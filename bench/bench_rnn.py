"""fastseq.RNN beside torch.nn.RNN, inference and training step."""

from sequences import over_dtypes, over_shapes, run


@over_dtypes
@over_shapes
def test_forward(race, shape, dtype):
    run(race, "RNN", shape, dtype, training=False)


@over_dtypes
@over_shapes
def test_training(race, shape, dtype):
    run(race, "RNN", shape, dtype, training=True)
