"""Helpers that callers of the older interface call, and that have nothing to do here."""

from __future__ import annotations

from torch import Tensor


class OlderVerbs:
    """Base of every wrapper."""

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor | None = None, int_workspace_buffer: object = None
    ) -> None:
        """Accepted for callers that have it; no workspace is used."""
        del float_workspace_buffer, int_workspace_buffer

    def workspace_size(self, *args: object, **options: object) -> int:
        """Bytes of workspace that a caller has to bring: 0, whatever the arguments."""
        del args, options
        return 0

    def end_forward(self) -> None:
        """Accepted for callers that have it; a plan holds until the next one."""
