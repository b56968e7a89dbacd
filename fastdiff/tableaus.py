"""Embedded Runge–Kutta pairs, as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Tableau:
    """An embedded pair whose last stage is the next step's first: nodes c, rows a (the last are the weights b), b − b̂.

    `order` of b; b̂ has one less. `dense`: weights of the fourth-order term of the interpolant (none: cubic Hermite).
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    e: tuple[float, ...]
    dense: tuple[float, ...] = ()


def _exact(*values: str) -> tuple[float, ...]:
    return tuple(float(Fraction(value)) for value in values)


METHODS: dict[str, Tableau] = {
    # Bogacki & Shampine 1989
    "bosh3": Tableau(
        3,
        _exact("0", "1/2", "3/4", "1"),
        (_exact("1/2"), _exact("0", "3/4"), _exact("2/9", "1/3", "4/9")),
        _exact("-5/72", "1/12", "1/9", "-1/8"),
    ),
    # Dormand & Prince 1980; the interpolant: Hairer, Nørsett & Wanner, Solving ODEs I, II.6, as in their DOPRI5
    "dopri5": Tableau(
        5,
        _exact("0", "1/5", "3/10", "4/5", "8/9", "1", "1"),
        (
            _exact("1/5"),
            _exact("3/40", "9/40"),
            _exact("44/45", "-56/15", "32/9"),
            _exact("19372/6561", "-25360/2187", "64448/6561", "-212/729"),
            _exact("9017/3168", "-355/33", "46732/5247", "49/176", "-5103/18656"),
            _exact("35/384", "0", "500/1113", "125/192", "-2187/6784", "11/84"),
        ),
        _exact("71/57600", "0", "-71/16695", "71/1920", "-17253/339200", "22/525", "-1/40"),
        _exact(
            "-12715105075/11282082432", "0", "87487479700/32700410799", "-10690763975/1880347072",
            "701980252875/199316789632", "-1453857185/822651844", "69997945/29380423",
        ),
    ),
    # Tsitouras 2011
    "tsit5": Tableau(
        5,
        (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
        (
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
        ),
        (
            0.00178001105222577714, 0.0008164344596567469, -0.007880878010261995, 0.1447110071732629,
            -0.5823571654525552, 0.45808210592918697, -0.015151515151515152,
        ),
    ),
}  # fmt: skip
