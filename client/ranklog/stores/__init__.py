"""Object stores behind one protocol. `open_store` chooses by URL; each kind is imported only when it is asked for."""

from ranklog.stores.base import ObjectInfo, Store, Upload, open_store

__all__ = ["ObjectInfo", "Store", "Upload", "open_store"]
