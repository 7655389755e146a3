"""The loop over the steps of a sequence, forward and backward, around the step functions of any cell.

A cell's step takes x_t (N, D), its states (N, H) and its parameters, and returns the next states and a cache; its
backward takes the gradients of the next states and that cache, and returns those of x_t, the states and the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .steps import schedule


def loop_forward(
    step: Callable[..., tuple],
    x: np.ndarray,
    states: Sequence[np.ndarray],
    parameters: Sequence[np.ndarray],
    lengths: np.ndarray | None = None,
    reset: np.ndarray | None = None,
    reverse: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray], tuple]:
    """Every state after every step, the last states, and the cache for `loop_backward`.

    x (N, T, D), states (N, H) each; lengths, reset and reverse as in `schedule`.

    >>> def step(x, h, w):  # h' = h + x w
    ...     return h + x @ w, x
    >>> every, last, cache = loop_forward(step, np.ones((1, 3, 2)), [np.zeros((1, 1))], [np.ones((2, 1))])
    >>> every[0].ravel(), last[0].ravel()
    (array([2., 4., 6.]), array([6.]))
    """
    N, T, _ = x.shape
    steps = schedule(N, T, lengths, reset, reverse)
    dtype = np.result_type(x, *states, *parameters)
    every = [np.zeros((N, T, state.shape[1]), dtype=dtype) for state in states]
    initial, caches = states, []
    for t, active, cut in steps:
        states = [np.where(cut, 0, state) for state in states]
        *after, cache = step(np.where(active, x[:, t], 0), *states, *parameters)
        states = [np.where(active, new, old) for new, old in zip(after, states, strict=True)]
        for states_t, new in zip(every, after, strict=True):
            states_t[:, t] = np.where(active, new, 0)
        caches.append(cache)
    return every, list(states), (steps, caches, x, initial, parameters)


def loop_backward(
    step_backward: Callable[..., tuple],
    devery: Sequence[np.ndarray | None],
    dlast: Sequence[np.ndarray | None],
    cache: tuple,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Gradients of x, of the initial states and of the parameters.

    devery, dlast: gradients of every state (N, T, H) and of the last states (N, H); None for zeros.

    >>> def step(x, h, w):
    ...     return h + x @ w, x
    >>> *_, cache = loop_forward(step, np.ones((1, 3, 2)), [np.zeros((1, 1))], [np.ones((2, 1))])
    >>> def step_backward(dh, x):
    ...     return dh @ np.ones((1, 2)), dh, x.T @ dh
    >>> dx, (dh,), (dw,) = loop_backward(step_backward, [None], [np.ones((1, 1))], cache)
    >>> dw.ravel()
    array([3., 3.])
    """
    steps, caches, x, initial, parameters = cache
    dx, dparameters = np.zeros_like(x), [np.zeros_like(parameter) for parameter in parameters]
    dstates = [np.zeros_like(h) if d is None else d for h, d in zip(initial, dlast, strict=True)]
    for (t, active, cut), step_cache in zip(reversed(steps), reversed(caches), strict=True):
        dnext = [
            np.where(active, dstate if d is None else d[:, t] + dstate, 0)
            for d, dstate in zip(devery, dstates, strict=True)
        ]
        dx[:, t], *gradients = step_backward(*dnext, step_cache)
        dprevious, dparameters_t = gradients[: len(dstates)], gradients[len(dstates) :]
        dstates = [np.where(cut, 0, np.where(active, new, old)) for new, old in zip(dprevious, dstates, strict=True)]
        for total, d in zip(dparameters, dparameters_t, strict=True):
            total += d
    return dx, dstates, dparameters
