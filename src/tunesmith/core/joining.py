"""Which names belong together when some pairs of them do, directly or through others."""

from __future__ import annotations


class Joined:
    """Union-find over names. A name that was never joined belongs to itself."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._parent

    def root(self, name: str) -> str:
        """One name for all that belong together with this one."""
        parent = self._parent
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    def join(self, name: str, other: str) -> None:
        """Let two names, and all that belong with either, belong together."""
        own = self.root(name)
        self._parent[own] = self.root(other)
