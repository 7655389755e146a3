"""Recurrent layers: the spec, the autograd Functions, the kernels' calls, the formula in torch ops, the graph op."""
