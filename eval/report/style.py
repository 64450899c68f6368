"""The page's style sheet."""

CSS = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667; --line: #d8dbe3; --back: #fff; --card: #f6f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --soft: #9aa3b5; --line: #363c4a; --back: #14171e; --card: #1c2029; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
       max-width: 1180px; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 8px; }
p.note, span.note, small { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
thead th { color: var(--soft); font-weight: 600; }
td small { display: block; }
.better { color: #1d8a4c; } .worse { color: #c2402a; }
.scroll { overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 10px; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); } .grid { stroke: var(--line); }
.clip { display: grid; grid-template-columns: 190px 1fr; gap: 14px; align-items: center; background: var(--card);
        border-radius: 8px; padding: 10px; margin: 10px 0; }
.clip video { width: 190px; image-rendering: pixelated; border-radius: 4px; }
.strip { max-width: 100%; border-radius: 4px; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 5px 0 12px; }
details { margin: 10px 0; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
@media (max-width: 640px) { .clip { grid-template-columns: 1fr; } }
"""
