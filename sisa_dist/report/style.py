"""The page's style sheet: light and dark, and one column on a narrow screen."""

from __future__ import annotations

# Okabe and Ito's colours, which are told apart by all kinds of colour vision, without their yellow, which a white page
# swallows; brighter on a dark one.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c3e", "#555555")
DARK = ("#4aa3e0", "#ff8a3d", "#2fc79b", "#e39bc4", "#ffbe3d", "#8fd0f7", "#c9a27e", "#bbbbbb")
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2 1 2", "1 5")  # where there are more runs than colours

_COLOURS = "".join(f"--c{i}:{colour};" for i, colour in enumerate(LIGHT))
_DARK_COLOURS = "".join(f"--c{i}:{colour};" for i, colour in enumerate(DARK))

CSS = f"""
:root{{color-scheme:light dark;--page:#fdfdfc;--card:#fff;--ink:#1d1f23;--soft:#5c626b;--rule:#dfe1e4;--grid:#ececee;
--accent:#0b5fa5;{_COLOURS}}}
@media (prefers-color-scheme:dark){{:root{{--page:#15171a;--card:#1d2024;--ink:#e7e9ec;--soft:#a3a9b2;--rule:#363b42;
--grid:#2b2f35;--accent:#7ab8ec;{_DARK_COLOURS}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:1.2rem 1.2rem 4rem;max-width:1180px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
h1{{font-size:1.55rem;margin:.3rem 0 .1rem;overflow-wrap:anywhere}}
h2{{font-size:1.15rem;margin:2.4rem 0 .5rem;padding-top:.7rem;border-top:1px solid var(--rule)}}
h3{{font-size:1rem;margin:1.4rem 0 .3rem}}
p{{margin:.3rem 0;max-width:75ch}}
.soft,nav{{color:var(--soft)}}
nav{{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.6rem 0}}
a{{color:var(--accent);text-decoration:none}}
a:hover{{text-decoration:underline}}
.charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:.8rem;margin:.6rem 0}}
.charts.large{{grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr))}}
figure{{margin:0;padding:.7rem .7rem .4rem;background:var(--card);border:1px solid var(--rule);border-radius:6px;
min-width:0}}
figcaption{{font-weight:600;font-size:.9rem;margin:0 0 .3rem .2rem;overflow-wrap:anywhere}}
svg{{display:block;width:100%;height:auto;overflow:visible}}
svg text{{font-size:12px;fill:var(--soft);font-family:inherit;font-variant-numeric:tabular-nums}}
svg .grid{{stroke:var(--grid);fill:none}}
svg .axis,svg .tick{{stroke:var(--soft);fill:none}}
.line polyline{{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round;stroke-dasharray:var(--d,none)}}
.line circle{{fill:var(--c)}}
.line.faint polyline{{stroke-width:.8;opacity:.35}}
.line:hover polyline{{stroke-width:3.5}}
ul.legend{{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;margin:.5rem 0;padding:0;font-size:.88rem}}
ul.legend li{{display:flex;align-items:center;gap:.4rem;overflow-wrap:anywhere}}
ul.legend svg{{width:28px;height:10px;flex:none}}
.wide{{overflow-x:auto;margin:.6rem 0}}
table{{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.25rem .7rem .25rem 0;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top;
white-space:nowrap}}
td.long{{white-space:pre-line;overflow-wrap:anywhere;min-width:12rem;max-width:26rem}}
th{{font-weight:600;color:var(--soft)}}
td.number,th.number{{text-align:right}}
summary{{cursor:pointer;color:var(--accent);margin:.5rem 0}}
@media (max-width:520px){{body{{padding:.7rem .7rem 3rem}}figure{{padding:.5rem .3rem .3rem}}}}
@media print{{figure{{break-inside:avoid}}}}
"""
