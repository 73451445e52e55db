"""Says how many cases of the equivalence grid ran, and fails a run of it that held fewer than promised."""

from __future__ import annotations

from collections import Counter

import pytest

FLOORS = {
    "test_a_packed_step_is_the_documents_alone": 14,
    "test_a_moved_run_goes_on_as_if_it_had_stayed": 31,
    "test_layout_equals_one_process": 28,
    "test_another_familys_block_or_rope_equals_one_process": 7,
    "test_another_familys_block_or_rope_under_zero_equals_one_process": 5,
    "test_a_mistake_turns_the_grid_red": 29,
    "test_zero_equals_one_process": 18,
    "test_windows_cut_over_ranks_equal_one_process": 12,
}
SLOW_FLOORS = {
    "test_every_place_goes_on_from_every_other": 46,
    "test_full_product_equals_one_process": 216,
    "test_zero_full_product_equals_one_process": 48,
}


def check_floors(session: pytest.Session, exitstatus: int) -> None:
    """At the end of a session; of several processes in the one that reports."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:
        return
    names = [report.nodeid.split("::")[-1].split("[")[0] for report in reporter.stats.get("passed", [])]
    # With `-m slow` alone a test's fast cases do not run.
    fast = session.config.option.markexpr.strip() != "slow"
    floors = SLOW_FLOORS | (FLOORS if fast else {})
    ran = Counter(name for name in names if name in floors)
    if not ran:
        return
    reporter.write_line("")
    reporter.write_line("equivalence grid, cases passed: " + ", ".join(f"{name} {n}" for name, n in ran.items()))
    chosen = session.config.option.keyword or any("::" in argument for argument in session.config.args)
    short = [name for name, number in ran.items() if number < floors[name]]
    if short and not chosen and not exitstatus:
        reporter.write_line(f"fewer than promised: {', '.join(f'{name} {floors[name]}' for name in short)}", red=True)
        session.exitstatus = 1
