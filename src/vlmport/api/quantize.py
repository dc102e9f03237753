"""Turns a bundle into one of lower precision, by statistics of real inputs."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.api.bundle_folder import check_target, new_bundle
from vlmport.api.collect import CollectOptions, collect
from vlmport.api.quantize_graphs import (
    GraphWork,
    first_probes,
    open_graphs,
    second_probes,
    smoothed,
    transform,
)
from vlmport.api.quantize_recipe import wanted_recipe
from vlmport.api.quantize_report import QuantizeReport, report_json
from vlmport.api.quantized_bundle import write_bundle
from vlmport.calibration.recipe import recipe_json
from vlmport.calibration.samples import load_samples
from vlmport.errors import CalibrationError
from vlmport.manifest import load_manifest, verify_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmport.api.progress import Progress
    from vlmport.calibration.samples import CalibrationSample
    from vlmport.calibration.statistics import Probe, Statistics
    from vlmport.contract import Manifest

__all__ = ["QuantizeOptions", "quantize"]
