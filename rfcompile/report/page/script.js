"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("panel");
  const body = document.querySelector("#sites tbody");
  const filter = document.getElementById("filter");
  const model = document.querySelector(".model");
  let only = null; // the rows of the table to which a box limits it

  const element = (tag, text, parent) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };
  const boxOf = (target) => target.closest && target.closest("button.r, summary");
  const numberOf = (box) => Number(box.id.slice(1));

  // ---- the panel --------------------------------------------------------------------------------

  const STATEMENT = /^\s*(\w+)(?:: (.+?))? = ([\w.<>]+)(?:\(([\s\S]*)\))?$/;
  const statementFacts = (side, line) => {
    const texts = data.texts[side];
    const [, name, type, target, given] = texts.lines[line].match(STATEMENT) || [];
    const size = texts.sizes[line];
    return [
      ["operator", target], ["name", name], ["result", type || "type not known"],
      ["bytes", size === null ? "not known" : size.toLocaleString("en")], ["arguments", given],
      ["module", texts.modules[texts.module[line]] || "not known"],
      ["line of code", texts.sources[texts.source[line]] || "not known"],
    ];
  };
  const list = (facts) => {
    const dl = element("dl", undefined, panel);
    for (const [label, value] of facts) {
      if (value === undefined || value === "") continue;
      element("dt", label, dl);
      element("dd", value, dl);
    }
  };
  const show = (box) => {
    const facts = data.boxes[numberOf(box)] || {};
    panel.textContent = "";
    element("h3", [...box.querySelectorAll("b")].map((b) => b.textContent)[0], panel);
    data.sides.forEach((name, side) => {
      const line = facts.at && facts.at[side];
      const own = (facts.facts || []).map(([label, ...values]) => [label, values[side]]);
      if (facts.at ? line === null : !own.some(([, value]) => value)) return;
      if (name) element("h4", name, panel);
      list(facts.at ? statementFacts(side, line) : own.slice(1));
    });
    if (facts.unknown) element("p", `Not known: ${facts.unknown}.`, panel);
    if (!facts.sites || !body) return;
    const sites = element("p", "In the table: ", panel);
    for (const i of facts.sites.slice(0, 8)) {
      element("button", body.rows ? nameOfLine(i) : i, sites).dataset.line = i;
    }
    const all = element("button", `Only these ${facts.sites.length}`, sites);
    all.dataset.only = numberOf(box);
  };
  const nameOfLine = (i) => document.getElementById(`t${i}`).cells[0].textContent;
  const mark = (box) => {
    document.querySelectorAll(".at").forEach((old) => old.classList.remove("at"));
    document.querySelectorAll("tr.hit").forEach((old) => old.classList.remove("hit"));
    (box.matches("summary") ? box.parentElement : box).classList.add("at");
    for (const i of (data.boxes[numberOf(box)] || {}).sites || []) {
      document.getElementById(`t${i}`).classList.add("hit");
    }
    show(box);
  };

  // ---- the model --------------------------------------------------------------------------------

  const reveal = (box) => {
    for (let at = box.parentElement; at; at = at.parentElement) {
      if (at.matches("details") && !at.firstElementChild.isSameNode(box)) at.open = true;
    }
    box.scrollIntoView({ block: "center" });
    box.focus({ preventScroll: true });
  };
  const visible = () =>
    [...model.querySelectorAll("button.r, summary")].filter((box) => box.checkVisibility());
  const step = (box, by) => {
    const boxes = visible();
    const next = boxes[boxes.indexOf(box) + by];
    if (next) next.focus();
  };
  const keys = {
    ArrowDown: (box) => step(box, 1),
    ArrowUp: (box) => step(box, -1),
    ArrowRight: (box) => {
      if (!box.matches("summary")) return;
      if (box.parentElement.open) step(box, 1);
      else box.parentElement.open = true;
    },
    ArrowLeft: (box) => {
      if (box.matches("summary") && box.parentElement.open) box.parentElement.open = false;
      else {
        const outer = box.closest(".g").parentElement;
        if (outer.matches("details")) outer.firstElementChild.focus();
      }
    },
  };
  if (model) {
    model.addEventListener("pointerover", (event) => {
      const box = boxOf(event.target);
      if (box) mark(box);
    });
    model.addEventListener("focusin", (event) => {
      const box = boxOf(event.target);
      if (box) mark(box);
    });
    model.addEventListener("keydown", (event) => {
      const box = boxOf(event.target);
      if (!box) return;
      if (keys[event.key]) {
        event.preventDefault();
        keys[event.key](box);
      } else if (event.key === "Enter" && box.matches("button")) {
        const lines = (data.boxes[numberOf(box)] || {}).sites;
        if (lines) go(lines[0]);
      }
    });
    panel.addEventListener("click", (event) => {
      const { line, only: box } = event.target.dataset;
      if (line !== undefined) go(Number(line));
      if (box !== undefined) {
        only = new Set(data.boxes[box].sites.map((i) => `t${i}`));
        filterLines();
        document.getElementById("sites").scrollIntoView();
      }
    });
    const first = model.querySelector("button.r, summary");
    if (first) show(first);
  }

  // ---- the table --------------------------------------------------------------------------------

  const go = (i) => {
    const line = document.getElementById(`t${i}`);
    line.hidden = false;
    line.scrollIntoView({ block: "center" });
    line.focus({ preventScroll: true });
  };
  const filterLines = () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    let count = 0;
    for (const line of body.rows) {
      const text = line.textContent.toLowerCase();
      line.hidden = !words.every((word) => text.includes(word)) || (only && !only.has(line.id));
      count += !line.hidden;
    }
    document.querySelector('[data-do="all"]').hidden = !only && !filter.value;
    document.getElementById("count").textContent = `${count} of ${body.rows.length}`;
  };
  const sort = (th) => {
    const column = th.cellIndex;
    const down = th.getAttribute("aria-sort") === "ascending";
    for (const other of th.parentElement.cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (line) => {
      const cell = line.cells[column];
      if (!th.classList.contains("n")) return cell.textContent;
      return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
    };
    const compare = (a, b) => {
      if (a === null || b === null) return (a === null) - (b === null); // unknown ones last
      const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
      return down ? -order : order;
    };
    const lines = [...body.rows].map((line) => [key(line), line]);
    lines.sort(([a], [b]) => compare(a, b));
    body.append(...lines.map(([, line]) => line));
  };
  if (body) {
    document.querySelector("#sites thead").addEventListener("click", (event) => {
      const th = event.target.closest("th");
      if (th) sort(th);
    });
    filter.addEventListener("input", filterLines);
    const open = (line) => reveal(document.getElementById(`b${line.dataset.box}`));
    body.addEventListener("click", (event) => {
      const line = event.target.closest("tr[data-box]");
      if (line) open(line);
    });
    body.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.dataset.box) open(event.target);
    });
    filterLines();
  }

  const buttons = {
    unfold: () => model.querySelectorAll("details").forEach((box) => { box.open = true; }),
    fold: () => model.querySelectorAll("details").forEach((box) => { box.open = false; }),
    all: () => {
      only = null;
      filter.value = "";
      filterLines();
    },
  };
  document.addEventListener("click", (event) => {
    const action = buttons[event.target.dataset && event.target.dataset.do];
    if (action) action();
  });
})();
