from .identity_inverse import IdentityInverse as IdentityInverse
from .neumann import Neumann as Neumann
from .pseudoinverse import Pseudoinverse as Pseudoinverse
from .truncated_cg import TruncatedCG as TruncatedCG
