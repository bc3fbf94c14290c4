"""The classes that hypergradients and the audits return.

Users do not construct them: they come from [`bilevel_eqx.hypergradient`][],
[`bilevel_eqx.check_hypergradient`][],
[`bilevel_eqx.compare`][], [`bilevel_eqx.diagnose`][], [`bilevel_eqx.error_bound`][],
[`bilevel_eqx.reports.plan`][] and [`bilevel_eqx.retrain_gap`][]. They are here for the
docs and for type annotations; `plan` is the only function.
"""

from ._hypergradient import Hypergradient as Hypergradient
from ._trust.check_hypergradient import (
    CheckedResponse as CheckedResponse,
    HypergradientCheck as HypergradientCheck,
)
from ._trust.compare import Comparison as Comparison
from ._trust.diagnose import Diagnosis as Diagnosis
from ._trust.error_bound import ErrorBound as ErrorBound
from ._trust.plan import Plan as Plan, plan as plan, Planned as Planned
from ._trust.retrain_gap import RetrainGap as RetrainGap
