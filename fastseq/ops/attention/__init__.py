"""Scaled dot product attention: the public function, its spec, the autograd Functions, the formula in torch ops."""
