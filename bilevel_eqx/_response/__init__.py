from .base import AbstractResponse as AbstractResponse, Response as Response
from .fixed import Fixed as Fixed
from .implicit import Implicit as Implicit
from .proximal import Proximal as Proximal
from .unrolled import Unrolled as Unrolled
