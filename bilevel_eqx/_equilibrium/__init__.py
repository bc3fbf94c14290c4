from .base import (
    AbstractEquilibrium as AbstractEquilibrium,
    Certificate as Certificate,
    certify as certify,
)
from .cold_start import ColdStart as ColdStart
from .nash import Nash as Nash
from .optimistic import Optimistic as Optimistic
from .pessimistic import Pessimistic as Pessimistic
from .proximal_equilibrium import ProximalEquilibrium as ProximalEquilibrium
from .stackelberg import Stackelberg as Stackelberg
from .warm_start import WarmStart as WarmStart
