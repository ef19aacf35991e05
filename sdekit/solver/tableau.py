"""Coefficients of explicit Runge-Kutta methods.

Rational where the source publishes rationals, so order conditions are tested exactly; floats where it publishes
decimals (Tsitouras 5, Dormand-Prince 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction as Q
from typing import TypeAlias

Number: TypeAlias = Q | float


@dataclass(frozen=True)
class Tableau:
    """Coefficients of one explicit Runge-Kutta method with s stages.

    Attributes:
        name: Of the method.
        order: Order p of the propagated solution.
        error_order: Order of the embedded solution, or None without one: such a method needs a fixed grid.
        c: Stage times, s numbers in [0, 1].
        a: Strictly lower triangle; row i holds i numbers that sum to c[i].
        b: Solution weights, s numbers that sum to 1.
        b_hat: Weights of the embedded solution, or None.
        source: Paper, year.
    """

    name: str
    order: int
    error_order: int | None
    c: tuple[Number, ...]
    a: tuple[tuple[Number, ...], ...]
    b: tuple[Number, ...]
    b_hat: tuple[Number, ...] | None
    source: str

    @property
    def stages(self) -> int:
        """The number s of stages."""
        return len(self.c)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is the next step's first."""
        return self.c[-1] == 1 and self.b[-1] == 0 and tuple(self.a[-1]) == tuple(self.b[:-1])


EULER = Tableau("Euler", 1, None, (Q(0),), ((),), (Q(1),), None, "Euler 1768")

HEUN = Tableau(
    *("Heun", 2, 1, (Q(0), Q(1)), ((), (Q(1),)), (Q(1, 2), Q(1, 2)), (Q(1), Q(0))), source="Heun 1900; embedded Euler"
)

MIDPOINT = Tableau(
    *("midpoint", 2, 1, (Q(0), Q(1, 2)), ((), (Q(1, 2),)), (Q(0), Q(1)), (Q(1), Q(0))),
    source="Runge 1895; embedded Euler",
)

RK4 = Tableau(
    name="RK4",
    order=4,
    error_order=None,
    c=(Q(0), Q(1, 2), Q(1, 2), Q(1)),
    a=((), (Q(1, 2),), (Q(0), Q(1, 2)), (Q(0), Q(0), Q(1))),
    b=(Q(1, 6), Q(1, 3), Q(1, 3), Q(1, 6)),
    b_hat=None,
    source="Kutta 1901",
)

BOGACKI_SHAMPINE = Tableau(
    name="Bogacki-Shampine 3(2)",
    order=3,
    error_order=2,
    c=(Q(0), Q(1, 2), Q(3, 4), Q(1)),
    a=((), (Q(1, 2),), (Q(0), Q(3, 4)), (Q(2, 9), Q(1, 3), Q(4, 9))),
    b=(Q(2, 9), Q(1, 3), Q(4, 9), Q(0)),
    b_hat=(Q(7, 24), Q(1, 4), Q(1, 3), Q(1, 8)),
    source="Bogacki and Shampine 1989",
)

DORMAND_PRINCE_5 = Tableau(
    name="Dormand-Prince 5(4)",
    order=5,
    error_order=4,
    c=(Q(0), Q(1, 5), Q(3, 10), Q(4, 5), Q(8, 9), Q(1), Q(1)),
    a=(
        (),
        (Q(1, 5),),
        (Q(3, 40), Q(9, 40)),
        (Q(44, 45), Q(-56, 15), Q(32, 9)),
        (Q(19372, 6561), Q(-25360, 2187), Q(64448, 6561), Q(-212, 729)),
        (Q(9017, 3168), Q(-355, 33), Q(46732, 5247), Q(49, 176), Q(-5103, 18656)),
        (Q(35, 384), Q(0), Q(500, 1113), Q(125, 192), Q(-2187, 6784), Q(11, 84)),
    ),
    b=(Q(35, 384), Q(0), Q(500, 1113), Q(125, 192), Q(-2187, 6784), Q(11, 84), Q(0)),
    b_hat=(Q(5179, 57600), Q(0), Q(7571, 16695), Q(393, 640), Q(-92097, 339200), Q(187, 2100), Q(1, 40)),
    source="Dormand and Prince 1980",
)

_TSIT_B = (
    *(0.09646076681806523, 0.01, 0.4798896504144996),
    *(1.379008574103742, -3.290069515436081, 2.324710524099774),
)
_TSIT_DEFECT = (
    *(-0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629),
    *(0.5823571654525552, -0.45808210592918697, 1.0 / 66.0),
)

TSITOURAS_5 = Tableau(
    name="Tsitouras 5(4)",
    order=5,
    error_order=4,
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT_B,
    ),
    b=(*_TSIT_B, 0.0),
    b_hat=tuple(b + e for b, e in zip((*_TSIT_B, 0.0), _TSIT_DEFECT, strict=True)),
    source="Tsitouras 2011",
)

_DOP8_B = (
    *(0.054293734116568765, 0.0, 0.0, 0.0),
    *(0.0, 4.450312892752409, 1.8915178993145003, -5.801203960010585),
    *(0.3111643669578199, -0.1521609496625161, 0.20136540080403034, 0.04471061572777259),
)

_DOP8_DEFECT = (
    *(0.01312004499419488, 0.0, 0.0, 0.0),
    *(0.0, -1.2251564463762044, -0.4957589496572502, 1.6643771824549864),
    *(-0.35032884874997366, 0.3341791187130175, 0.08192320648511571, -0.022355307863886294),
)

DORMAND_PRINCE_8 = Tableau(
    name="Dormand-Prince 8(5)",
    order=8,
    error_order=5,
    c=(
        *(0.0, 0.05260015195876773, 0.0789002279381516, 0.1183503419072274),
        *(0.2816496580927726, 0.3333333333333333, 0.25, 0.3076923076923077),
        *(0.6512820512820513, 0.6, 0.8571428571428571, 1.0),
    ),
    a=(
        (),
        (0.05260015195876773,),
        (0.0197250569845379, 0.0591751709536137),
        (0.02958758547680685, 0.0, 0.08876275643042054),
        (0.2413651341592667, 0.0, -0.8845494793282861, 0.924834003261792),
        (
            *(0.037037037037037035, 0.0, 0.0, 0.17082860872947386),
            *(0.12546768756682242,),
        ),
        (
            *(0.037109375, 0.0, 0.0, 0.17025221101954405),
            *(0.06021653898045596, -0.017578125),
        ),
        (
            *(0.03709200011850479, 0.0, 0.0, 0.17038392571223998),
            *(0.10726203044637328, -0.015319437748624402, 0.008273789163814023),
        ),
        (
            *(0.6241109587160757, 0.0, 0.0, -3.3608926294469414),
            *(-0.868219346841726, 27.59209969944671, 20.154067550477894, -43.48988418106996),
        ),
        (
            *(0.47766253643826434, 0.0, 0.0, -2.4881146199716677),
            *(-0.590290826836843, 21.230051448181193, 15.279233632882423, -33.28821096898486),
            *(-0.020331201708508627,),
        ),
        (
            *(-0.9371424300859873, 0.0, 0.0, 5.186372428844064),
            *(1.0914373489967295, -8.149787010746927, -18.52006565999696, 22.739487099350505),
            *(2.4936055526796523, -3.0467644718982196),
        ),
        (
            *(2.273310147516538, 0.0, 0.0, -10.53449546673725),
            *(-2.0008720582248625, -17.9589318631188, 27.94888452941996, -2.8589982771350235),
            *(-8.87285693353063, 12.360567175794303, 0.6433927460157636),
        ),
    ),
    b=_DOP8_B,
    b_hat=tuple(b - e for b, e in zip(_DOP8_B, _DOP8_DEFECT, strict=True)),
    source="Hairer, Norsett and Wanner 1993 (the method of DOP853, with its fifth-order error estimate)",
)
