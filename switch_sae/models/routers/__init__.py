"""Routers. Add one by adding a file and a line to `ROUTERS`."""

from switch_sae.choices import Choice
from switch_sae.models.routers.base import LinearRouter, Rivals, Router, RouterKernel, Routing
from switch_sae.models.routers.bias_balanced import BiasBalancedRouter
from switch_sae.models.routers.competition import CompetitionRouter
from switch_sae.models.routers.cosine_kmeans import CosineKMeansRouter
from switch_sae.models.routers.renormalised import RenormalisedRouter
from switch_sae.models.routers.sigmoid import SigmoidRouter
from switch_sae.models.routers.softmax import Gate, SoftmaxRouter
from switch_sae.models.routers.two_level import TwoLevelRouter

ROUTERS: Choice[Router] = Choice(
    "router",
    "kind",
    {
        "softmax": SoftmaxRouter,  # the paper's
        "sigmoid": SigmoidRouter,
        "bias_balanced": BiasBalancedRouter,
        "competition": CompetitionRouter,
        "cosine_kmeans": CosineKMeansRouter,
        "renormalised": RenormalisedRouter,
        "two_level": TwoLevelRouter,
    },
)

__all__ = ["ROUTERS", "Gate", "LinearRouter", "Rivals", "Router", "RouterKernel", "Routing"]
