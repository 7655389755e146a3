"""Drop-in torch.nn modules."""

from fastseq.nn.gru import GRU, GRUCell
from fastseq.nn.lstm import LSTM, LSTMCell
from fastseq.nn.rnn import RNN, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
