from .gradient_descent import GradientDescent as GradientDescent
from .projected_gradient import ProjectedGradient as ProjectedGradient
from .projection import Projection as Projection
