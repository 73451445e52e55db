"""Progress of a model's construction, for models that take minutes: one line a layer once it has taken a while."""

from __future__ import annotations

import logging
import time

from sisa_dist.parallel.mesh import Mesh

_logger = logging.getLogger(__name__)
PATIENCE = 3.0  # seconds without a word


class BuildLog:
    """Call it with a module's full name before its parameters are made. Only the main rank logs."""

    def __init__(self, mesh: Mesh, *, n_layers: int) -> None:
        self._mesh, self._n_layers = mesh, n_layers
        self._started, self._last = time.monotonic(), ""

    def __call__(self, module_name: str) -> None:
        layer = ".".join(module_name.split(".")[:2])
        if layer in (self._last, "blocks"):
            return
        self._last = layer
        self._mesh.enter(f"build {layer}")  # a layer may take as long as the timeout allows, not the whole model
        seconds = time.monotonic() - self._started
        if self._mesh.is_main and seconds > PATIENCE:
            _logger.info("building %s (of %d blocks): %.0f s so far", layer, self._n_layers, seconds)
