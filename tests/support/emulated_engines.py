"""Engines for the emulated TensorRT, beside an engine.json made of a bundle's manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from vlmport.contract_engines import (
    ENGINES_SCHEMA_VERSION,
    BuildOptions,
    Engine,
    EnginePort,
    EngineProfile,
    EngineSet,
    PortRange,
)
from vlmport.engine_manifest import save_engine_set
from support.emulated_tensorrt import plan_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlmport.contract import Manifest, TensorSpec
