"""The style sheet and the script of the page of a run. Both stand in the page, whose security policy names their digests."""

from __future__ import annotations

from reinforce_ada.plots import DARK, LIGHT, Theme


def _variables(theme: Theme) -> str:
    names = ("background", "ink", "muted", "grid", "pale")
    return "".join(f"--{name}:{getattr(theme, name)};" for name in names) + f"--accent:{theme.series[1]};"


# Nothing is loaded: the fonts are those of the reader's system. A reversed column shows its end first, where a prompt has its question.
STYLE = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--background); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 20px 20px 60px; }}
h1 {{ font-size: 22px; line-height: 1.25; margin: 0 0 2px; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 34px 0 8px; padding-top: 14px; border-top: 1px solid var(--grid); }}
h3 {{ font-size: 15px; margin: 0; overflow-wrap: anywhere; }}
p {{ margin: 6px 0; max-width: 78ch; overflow-wrap: anywhere; }}
a {{ color: var(--accent); }}
nav {{ display: flex; flex-wrap: wrap; gap: 2px 18px; }}
.note {{ color: var(--muted); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 10px; margin: 16px 0 4px; padding: 0; }}
.tiles > div {{ border: 1px solid var(--grid); border-radius: 8px; padding: 10px 12px; }}
.tiles dt {{ color: var(--muted); font-size: 13px; }}
.tiles dd {{ margin: 0; font-size: 21px; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }}
.tiles dd + dd {{ font-size: 13px; font-weight: 400; color: var(--muted); }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 12px; margin: 12px 0; }}
.plots img {{ width: 100%; height: auto; display: block; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th, td {{ text-align: left; vertical-align: top; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--grid); overflow-wrap: anywhere; }}
th {{ color: var(--muted); font-weight: 500; font-size: 13px; overflow-wrap: normal; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.pairs td:first-child {{ width: 34%; color: var(--muted); }}
.sorts {{ cursor: pointer; text-decoration: underline dotted; }}
.tools {{ display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin: 12px 0; }}
.tools[hidden], [hidden] {{ display: none; }}
input, select {{ font: inherit; color: inherit; background: var(--background); }}
input, select {{ border: 1px solid var(--muted); border-radius: 6px; padding: 5px 8px; }}
input {{ flex: 1 1 220px; min-width: 0; }}
.card {{ border: 1px solid var(--grid); border-radius: 8px; padding: 12px 14px; margin: 12px 0; }}
.card header {{ display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; justify-content: space-between; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; unicode-bidi: isolate; }}
.prompt {{ display: flex; flex-direction: column-reverse; max-height: 10em; overflow-y: auto; }}
.prompt {{ margin: 8px 0; padding: 8px 10px; background: var(--grid); border-radius: 6px; }}
td.text {{ min-width: 16em; width: 100%; }}
tr.kept td:first-child {{ box-shadow: inset 3px 0 var(--accent); }}
.short {{ white-space: nowrap; }}
.answers td:first-child, .answers th:first-child {{ padding-left: 10px; }}
details {{ margin: 12px 0; }}
summary {{ cursor: pointer; color: var(--accent); }}
"""

# Without it the page is whole: the tools are hidden until it runs.
SCRIPT = """
"use strict";
{
  const list = document.getElementById("answers");
  const find = document.getElementById("find");
  const order = document.getElementById("order");
  const count = document.getElementById("count");
  const cards = list ? [...list.children].map((card) => ({
    card,
    about: card.querySelector(".about").textContent.toLowerCase(),
    rows: [...card.querySelectorAll("tbody tr")].map((row) => ({ row, text: row.textContent.toLowerCase() })),
  })) : [];
  const search = () => {
    const words = find.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const { card, about, rows } of cards) {
      let left = 0;
      for (const { row, text } of rows) {
        row.hidden = !words.every((word) => text.includes(word) || about.includes(word));
        left += row.hidden ? 0 : 1;
      }
      card.hidden = words.length > 0 && left === 0;
      shown += left;
    }
    count.textContent = words.length ? `${shown} completions found` : "";
  };
  const arrange = () => {
    const [name, direction] = order.value.split(" ");
    const sign = direction === "down" ? -1 : 1;
    const of = ({ card }) => Number(card.getAttribute(`data-${name}`));
    list.append(...[...cards].sort((a, b) => sign * (of(a) - of(b))).map(({ card }) => card));
  };
  const sortable = (table) => {
    table.querySelectorAll("thead th.number").forEach((head) => {
      let sign = -1;
      const sort = () => {
        sign = -sign;
        table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const value = (row) => parseFloat(row.cells[head.cellIndex].textContent.replaceAll(",", ""));
        const body = table.tBodies[0];
        const rank = (row) => (Number.isNaN(value(row)) ? Infinity : sign * value(row));
        body.append(...[...body.rows].sort((a, b) => (rank(a) === rank(b) ? 0 : rank(a) - rank(b))));
      };
      head.classList.add("sorts");
      head.tabIndex = 0;
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  };
  document.querySelectorAll("table.sortable").forEach(sortable);
  if (list) {
    find.addEventListener("input", search);
    order.addEventListener("change", arrange);
    document.getElementById("tools").hidden = false;
  }
}
"""
