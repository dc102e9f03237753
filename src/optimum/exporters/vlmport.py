"""Makes vlmport's model types known to optimum's TasksManager, under the exporter "vlmport".

    import optimum.exporters.vlmport

is how optimum's other exporters are made known as well.
"""

from __future__ import annotations

from vlmport.api.optimum_tasks import BundleExporterConfig, register_families

__all__ = ["BundleExporterConfig"]

register_families()
