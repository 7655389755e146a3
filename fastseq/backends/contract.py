"""What a backend is to whoever calls it."""

__all__ = ["Refused"]


class Refused(Exception):
    """The one exception that means: not served, let torch speak.

    A backend raises it for arguments that it has no kernel for or that do not fit together, before anything is
    computed; the message names the argument, what was expected and what came. Whoever calls may let torch's own op
    compute the call or name the mistake. Every other exception is a failure and comes through: no memory, an error of a
    device, a fault.
    """
