"""The report's HTML template, style included."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
  :root { --ink: #1d2733; --pale: #5d6b7a; --line: #d8dee6; --strong: 31, 95, 153; }
  body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 66rem; margin: 2rem auto;
         padding: 0 1rem; }
  h1 { font-size: 1.6rem; }
  h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
  .tiles { display: flex; gap: 1rem; flex-wrap: wrap; }
  .tile { border: 1px solid var(--line); border-radius: 6px; padding: .6rem 1.4rem; text-align: center;
          color: var(--pale); }
  .tile b { display: block; font-size: 1.8rem; color: var(--ink); }
  .note { color: var(--pale); font-size: .9rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
  th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
  th:first-child { text-align: left; }
  td { background: rgba(var(--strong), calc(var(--shade) * .55)); border: 1px solid #fff; }
  td.learned { border: 2px solid var(--ink); }
  table.text td { text-align: left; background: none; white-space: normal; border: 0;
                  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
  table.text th { text-align: left; border-top: 1px solid var(--line); vertical-align: top; }
  .bad { color: #a3261b; font-weight: 600; }
  svg { max-width: 100%; height: auto; }
  pre { background: #f5f7fa; padding: 1rem; overflow-x: auto; font-size: .85rem; }
</style>
</head>
<body>
<h1>{{title}}</h1>
{{body}}
</body>
</html>
"""
