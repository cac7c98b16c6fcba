"""FedKSeed-Pro, arXiv 2312.06353. Seeds are drawn by the softmax of their mean |g|.

Everything else is in `candidates`.
"""

from __future__ import annotations

from edgellm_plugins.zeroth_order.candidates import CandidateMethod, sampler
from edgellm_plugins.zeroth_order.fedkseed_pro import PLUGIN

METHOD = CandidateMethod(PLUGIN.name, sampler, weighted=True)
