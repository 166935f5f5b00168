"""Packs: their hooks, and finding, loading and diagnosing them."""

from kasmina_core.packs.scanning import PackReason, PackRecord, PackState, list_packs

__all__ = ["PackReason", "PackRecord", "PackState", "list_packs"]
