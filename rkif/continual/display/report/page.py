"""The report's HTML template, with its style."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<style>
  :root { --page: #fff; --ink: #1d2733; --pale: #5d6b7a; --line: #d8dee6; --shaded: #eef1f5;
          --strong: 31, 95, 153; --good: #1d7a46; --fair: #8a6100; --bad: #a3261b; }
  @media (prefers-color-scheme: dark) {
    :root { --page: #14191f; --ink: #dfe6ee; --pale: #9aa8b6; --line: #36414d; --shaded: #212932;
            --strong: 84, 152, 214; --good: #57c088; --fair: #d9ad4a; --bad: #f0857a; }
  }
  body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
         max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.6rem; margin-bottom: .2rem; }
  h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
  .facts { color: var(--pale); margin-top: 0; }
  .headline { font-size: 1.15rem; }
  .tiles { display: flex; gap: 1rem; flex-wrap: wrap; }
  .tile { border: 1px solid var(--line); border-radius: 6px; padding: .6rem 1.4rem; text-align: center;
          color: var(--pale); }
  .tile b { display: block; font-size: 1.8rem; color: var(--ink); }
  .tile.good, .tile.fair, .tile.bad { border-width: 2px; }
  .good, .tile.good b { color: var(--good); border-color: var(--good); }
  .fair, .tile.fair b { color: var(--fair); border-color: var(--fair); }
  .bad, .tile.bad b { color: var(--bad); border-color: var(--bad); }
  p.bad { font-weight: 600; }
  .note { color: var(--pale); font-size: .9rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
  th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
  th:first-child { text-align: left; }
  td { background: rgba(var(--strong), calc(var(--shade, 0) * .55)); border: 1px solid var(--page); }
  td.learned { border: 2px solid var(--ink); }
  td.best { font-weight: 700; }
  table.text td { text-align: left; background: none; white-space: normal; border: 0;
                  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
  table.text th { text-align: left; border-top: 1px solid var(--line); vertical-align: top; }
  svg { width: 100%; min-width: 46rem; height: auto; }
  pre { background: var(--shaded); padding: 1rem; overflow-x: auto; font-size: .85rem; }
</style>
</head>
<body>
<h1>{{title}}</h1>
{{body}}
</body>
</html>
"""
