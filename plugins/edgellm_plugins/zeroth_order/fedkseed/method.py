"""FedKSeed, arXiv 2312.06353. Seeds are drawn uniformly.

Everything else is in `candidates`.
"""

from __future__ import annotations

from edgellm_plugins.zeroth_order.candidates import CandidateMethod, sampler
from edgellm_plugins.zeroth_order.fedkseed import PLUGIN

METHOD = CandidateMethod(PLUGIN.name, sampler, weighted=False)
