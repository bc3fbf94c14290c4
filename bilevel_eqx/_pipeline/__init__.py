from .base import AbstractPipeline as AbstractPipeline
from .gradient import GradientPipeline as GradientPipeline
