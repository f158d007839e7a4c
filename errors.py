"""One tree of errors that says who must act: the caller, the operator, or us.

Every class keeps all constructor arguments in ``args``, so that errors survive pickling between actors.
"""


class ConcertinaError(Exception):
    """Base of every error that Concertina raises on purpose."""


class CallerError(ConcertinaError):
    """The request cannot be served as it is; whoever sent it must change it."""


class OperatorError(ConcertinaError):
    """Configuration, a file or the machine does not allow this; whoever runs Concertina must act."""


class InternalError(ConcertinaError):
    """A fault of ours, or of a peer process; the operator needs to do nothing but report it."""


class Unreachable(InternalError):
    """A process did not take a call, or did not answer it; it may live."""


class PeerLost(InternalError):
    """A peer of the generation died or stopped answering.

    Parameters
    ----------
    rank : int
        Rank of the lost peer within the generation; -1 where the transport cannot tell.
    reason : str
        What was seen, for instance ``"process ended"`` or ``"no answer for 30.0 s"``.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(rank, reason)
        self.rank = rank
        self.reason = reason

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.rank >= 0 else "a peer"
        return f"{who} was lost: {self.reason}"
