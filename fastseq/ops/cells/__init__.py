"""The cells. Each module has one cell: its spec, its formula in torch ops and its public functions."""
