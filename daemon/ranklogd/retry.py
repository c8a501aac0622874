"""How long to wait before trying again. Pure: the dice are an argument.

Full jitter: a random part of a span that doubles with each failure. Many nodes that lost the same store at the same
moment then do not come back to it at the same moment. There is no last try.
"""

_DOUBLINGS_MAX = 60  # Beyond it the span is at its limit anyway, and 2.0 ** n would overflow in the end.


def backoff_s(failures: int, *, base_s: float, max_s: float, dice: float) -> float:
    """Return seconds to wait after that many failures in a row (1 = the first); `dice` is random in 0..1."""
    assert failures >= 1
    assert 0 <= dice <= 1
    return dice * float(min(max_s, base_s * 2.0 ** min(failures - 1, _DOUBLINGS_MAX)))
