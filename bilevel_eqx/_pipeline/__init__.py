from .base import AbstractPipeline as AbstractPipeline
from .gradient import GradientPipeline as GradientPipeline
from .null_space import (
    NullSpaceAscent as NullSpaceAscent,
    NullSpaceDescent as NullSpaceDescent,
)
from .penalty import PenaltyAscent as PenaltyAscent
from .play import GradientPlay as GradientPlay, ProximalPlay as ProximalPlay
from .value_function import ValueFunctionDescent as ValueFunctionDescent
