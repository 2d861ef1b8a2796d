"""Tokens that skip blocks: `model.routing: tread`."""

from collections.abc import Mapping

from torch import Tensor

from pixart.model.layers import ROUTING, Routing
from pixart.seeds import Draw


@ROUTING.register("tread")
class Tread(Routing):
    """TREAD (arXiv 2501.04765, section 3): in training, a random share `route_ratio` of each image's tokens skips the
    blocks `route_blocks` (first and last, both inclusive) and returns as it left. Sampling routes nothing."""

    training_only = True
    conditions = {"route": Draw("uniform", "token")}  # noqa: RUF012

    def __init__(self, config):
        self.first, self.last = config.route_blocks
        self.ratio = config.route_ratio

    def choose(self, tokens: int, conditions: Mapping[str, Tensor]) -> Tensor | None:
        skipping = round(self.ratio * tokens)
        if "route" not in conditions or not skipping:
            return None
        return conditions["route"].argsort(dim=1)[:, : tokens - skipping]
