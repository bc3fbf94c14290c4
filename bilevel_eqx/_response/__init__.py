from .aggregated import Aggregated as Aggregated
from .base import AbstractResponse as AbstractResponse, Response as Response
from .fixed import Fixed as Fixed
from .implicit import Implicit as Implicit, ImplicitPullback as ImplicitPullback
from .minimum_displacement import MinimumDisplacement as MinimumDisplacement
from .proximal import Proximal as Proximal
from .unrolled import Unrolled as Unrolled
