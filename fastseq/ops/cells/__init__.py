"""The cells: each module holds one cell's spec, its formula in torch ops and its public functions."""
