from .base import (
    AbstractEquilibrium as AbstractEquilibrium,
    Certificate as Certificate,
    certify as certify,
)
from .cold_start import ColdStart as ColdStart
from .warm_start import WarmStart as WarmStart
