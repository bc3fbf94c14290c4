from .gradient_descent import GradientDescent as GradientDescent
from .projection import Projection as Projection
