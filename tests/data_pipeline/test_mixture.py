"""The source of any window and every source's count, from the window's number alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import PERIOD, Mixture
from sisa_dist.config import UserError

SHARES = st.lists(st.floats(0.1, 50), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(SHARES, st.lists(st.integers(0, 3 * PERIOD), min_size=1, max_size=40))
def test_counts_are_those_of_the_windows_before(shares: list[float], cursors: list[int]) -> None:
    mixture = Mixture({f"s{i}": share for i, share in enumerate(shares)})
    assert sum(mixture.per_period.values()) == PERIOD
    for cursor in cursors:
        counts = mixture.counts(cursor)
        assert sum(counts.values()) == cursor
        name, served = mixture.source(cursor)
        assert served == counts[name]
        after = mixture.counts(cursor + 1)
        assert {other: after[other] - counts[other] for other in counts if after[other] != counts[other]} == {name: 1}


@settings(max_examples=25, deadline=None)
@given(SHARES, st.integers(0, 5 * PERIOD))
def test_every_source_keeps_to_its_share(shares: list[float], cursor: int) -> None:
    """Within the error diffusion's window a source, and the rounding of a share to the period."""
    mixture = Mixture({f"s{i}": share for i, share in enumerate(shares)})
    for (name, count), share in zip(mixture.counts(cursor).items(), shares, strict=True):
        assert abs(mixture.per_period[name] - share / sum(shares) * PERIOD) <= 1
        exact = cursor * mixture.per_period[name] / PERIOD
        assert exact - len(shares) < count < exact + 1


def test_a_short_mixture_is_written_down() -> None:
    """A change here is another data order for every mixture there is: raise MIXTURE_VERSION with it."""
    mixture = Mixture({"web": 5, "code": 2, "none": 0, "books": 1})
    assert "".join(mixture.source(i)[0][0] for i in range(16)) == "wcwwbwcwwcwwbwcw"
    assert mixture.counts(16 * PERIOD) == {"web": 10 * PERIOD, "code": 4 * PERIOD, "none": 0, "books": 2 * PERIOD}


def test_only_the_ratio_of_weights_counts() -> None:
    assert Mixture({"a": 1, "b": 3}).per_period == Mixture({"a": 0.25, "b": 0.75}).per_period
    assert Mixture({"a": 1, "b": 1, "c": 1}).per_period == {"a": 5462, "b": 5461, "c": 5461}


def test_a_share_below_one_window_in_a_period_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.mixture\.b: its share 1e-05 is less than one window in 16384"):
        Mixture({"a": 1, "b": 1e-5})
