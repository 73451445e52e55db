"""ZeRO-3's gathers by hand, on four layers of ten weights; against DeepSpeed's own: test_estimate_traffic.py."""

from __future__ import annotations

import pytest

from sisa_dist.training.zero_gathers import Use, gathers, with_backward

LAYERS = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
FORWARD = [use for layer in LAYERS for use in (Use(True, layer, (layer,)), Use(False, layer, (layer,)))]
SIZES = dict.fromkeys(LAYERS, 10)
A, B, C, D = LAYERS


def _gathers(
    *, prefetch: int = 0, reuse: int = 0, live: int = 1000, kept: tuple[str, ...] = (), recomputed: bool = False
) -> list[list[str]]:
    trace = with_backward(FORWARD, recomputed=recomputed)
    return gathers(trace, SIZES, kept, prefetch=prefetch, reuse=reuse, live=live)


def test_what_is_let_go_of_is_gathered_again() -> None:
    assert _gathers() == [[A], [B], [C], [D], [D], [C], [B], [A]]
    assert _gathers(kept=(B, D)) == [[A], [C], [C], [A]]


def test_what_is_wanted_soon_is_kept() -> None:
    # Behind C's forward it is wanted again after 20 elements, behind B's after 40.
    assert _gathers(reuse=30) == [[A], [B], [C], [D], [B], [A]]
    assert _gathers(reuse=1000) == [[A], [B], [C], [D]]


def test_gathering_ahead() -> None:
    # A gathers two more ahead. B gathers D, passes what is there, and A again, which was let go of meanwhile. D is let
    # go of although the very next module wants it: it looks for what was passed from the module after that on.
    assert _gathers(prefetch=20) == [[A], [B, C], [D, A], [D]]
    assert _gathers(prefetch=1000, reuse=1000) == [[A], [B, C, D]]
    assert _gathers(prefetch=1000, reuse=1000, live=30) == [[A], [B, C], [D]]


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_backward_goes_the_other_way(recomputed: bool) -> None:
    trace = with_backward(FORWARD, recomputed=recomputed)
    begun = [use.module for use in trace if use.begins]
    back = [D, C, D, C, B, A, B, A] if recomputed else [D, C, B, A]
    assert begun == [A, B, C, D, *back]
    # What is recomputed stops inside the last module, whose weights are then still needed.
    assert len([use for use in trace if not use.begins]) == len(begun) - (2 if recomputed else 0)


@pytest.mark.parametrize("recomputed", [False, True])
def test_each_chunk_of_an_mlp_is_made_again(recomputed: bool) -> None:
    def of(module: str, *inside: Use) -> list[Use]:
        return [Use(True, module, ()), *inside, Use(False, module, ())]

    mlp = of("blocks.0.mlp", *of("blocks.0.mlp.up"), *of("blocks.0.mlp.down"))
    forward = of("blocks.0", *of("blocks.0.norm"), *mlp, *mlp)
    back = with_backward(forward, recomputed=recomputed)[len(forward) :]
    begun = [use.module.removeprefix("blocks.0").removeprefix(".mlp") for use in back if use.begins]
    chunk = ["", ".up", ".down"]
    before = [".norm", *chunk] if recomputed else []  # the last chunk is not made twice again
    assert begun == ["", "", ".down", *before, *chunk, ".up", "", ".down", *chunk, ".up", ".norm"]
