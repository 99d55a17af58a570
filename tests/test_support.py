"""The helpers themselves: a poison that poisons nothing would hide what it is there to show."""

from __future__ import annotations

import torch
from support import normal, poisoned_memory, run_python, strided


def test_fresh_memory_is_nan(device: torch.device) -> None:
    with poisoned_memory(device):
        fresh = [torch.empty(n, dtype=torch.float16, device=device) for n in (3, 4096, 1 << 20)]
    assert all(t.isnan().all() for t in fresh)


def test_poison_leaves_the_mode_as_it_was(device: torch.device) -> None:
    with poisoned_memory(device):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_strided_view_steps_over_nan(device: torch.device, rng: torch.Generator) -> None:
    dense = normal((4, 3, 8), torch.float16, device, rng)
    view = strided(dense, dim=1)
    assert torch.equal(view, dense)
    assert view.stride() == (48, 16, 1)
    assert torch.as_strided(view, (1,), (1,), 8).isnan().item()


def test_run_python_reports_both_streams() -> None:
    result = run_python("import os, sys; print(os.environ['A']); sys.exit('bad')", {"A": "b"})
    assert (result.returncode, result.stdout.strip(), result.stderr.strip()) == (1, "b", "bad")
