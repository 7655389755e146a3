"""fastseq.LSTM beside torch.nn.LSTM, inference and training step."""

from sequences import over_dtypes, over_shapes, run


@over_dtypes
@over_shapes
def test_forward(race, shape, dtype):
    run(race, "LSTM", shape, dtype, training=False)


@over_dtypes
@over_shapes
def test_training(race, shape, dtype):
    run(race, "LSTM", shape, dtype, training=True)
