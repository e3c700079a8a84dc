"""The look of report.html: one inline style sheet, light and dark, readable on paper."""

from __future__ import annotations

CSS = """
:root { --ink: #1f2933; --soft: #52606d; --line: #d9e0e7; --back: #ffffff; --card: #f5f7fa; --accent: #1d5fae;
  --good: #1b7f4b; --bad: #9aa5b1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9fb3c8; --line: #33404d; --back: #15191e;
  --card: #1e252c; --accent: #7fb2e5; --good: #57c98a; --bad: #616e7c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 66rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.9rem; }
h2 { margin: 2.4rem 0 .6rem; font-size: 1.25rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p, figcaption { max-width: 52rem; }
.lead { margin: .3rem 0 0; color: var(--soft); font-size: 1.05rem; }
.facts { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.4rem 0; }
.fact { flex: 1 1 11rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.fact b { display: block; font-size: 1.35rem; color: var(--accent); font-variant-numeric: tabular-nums; }
.fact span { color: var(--soft); font-size: .87rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.yes { color: var(--good); font-weight: 600; } td.no { color: var(--bad); }
tr.branch td:first-child { padding-left: 1.8rem; color: var(--soft); }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
figcaption { color: var(--soft); font-size: .9rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem;
  overflow-x: auto; font-size: .85rem; line-height: 1.4; }
code { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
footer { margin-top: 3rem; color: var(--soft); font-size: .87rem; }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } tr, figure { break-inside: avoid; } }
"""
