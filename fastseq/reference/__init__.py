"""The specification of every operation, in NumPy alone, written to be read beside a textbook.

Names, shapes and conventions are those of Stanford's CS231n: x (N, T, D), Wx (D, G*H), Wh (H, G*H), b (G*H,); forward
functions return their result and a cache, backward functions take the gradient of the result and that cache. Nothing
here is fast, and nothing here shares code with what it checks. Any floating dtype works: float32, float64, longdouble.
"""

from .attention import (
    AttentionCache,
    dropout_kept,
    scaled_dot_product_attention_backward,
    scaled_dot_product_attention_forward,
)
from .gru import gru_backward, gru_forward, gru_step_backward, gru_step_forward
from .layers import (
    affine_backward,
    affine_forward,
    layernorm_backward,
    layernorm_forward,
    sigmoid,
    temporal_affine_backward,
    temporal_affine_forward,
    temporal_softmax_loss,
    word_embedding_backward,
    word_embedding_forward,
)
from .lstm import lstm_backward, lstm_forward, lstm_step_backward, lstm_step_forward
from .multi_head_attention import (
    multi_head_attention_backward,
    multi_head_attention_forward,
    positional_encoding,
)
from .philox import philox4x32
from .rnn import rnn_backward, rnn_forward, rnn_step_backward, rnn_step_forward
from .steps import Step, schedule
from .torch_layout import recurrent_forward_backward
from .verdict import COMPUTATIONS, EPS, Verdict, error_rule

__all__ = [
    "COMPUTATIONS",
    "EPS",
    "AttentionCache",
    "Step",
    "Verdict",
    "affine_backward",
    "affine_forward",
    "dropout_kept",
    "error_rule",
    "gru_backward",
    "gru_forward",
    "gru_step_backward",
    "gru_step_forward",
    "layernorm_backward",
    "layernorm_forward",
    "lstm_backward",
    "lstm_forward",
    "lstm_step_backward",
    "lstm_step_forward",
    "multi_head_attention_backward",
    "multi_head_attention_forward",
    "philox4x32",
    "positional_encoding",
    "recurrent_forward_backward",
    "rnn_backward",
    "rnn_forward",
    "rnn_step_backward",
    "rnn_step_forward",
    "scaled_dot_product_attention_backward",
    "scaled_dot_product_attention_forward",
    "schedule",
    "sigmoid",
    "temporal_affine_backward",
    "temporal_affine_forward",
    "temporal_softmax_loss",
    "word_embedding_backward",
    "word_embedding_forward",
]
