// Search and sort of the index, and links that keep the search. Runs from disk too, where nothing can be fetched.
"use strict";
(() => {
  const STEP = 50; // rows at a time
  const MOST = 2000; // rows that a link may ask for
  const DASH = "\u2013";

  /** Make every marked link carry the search in its hash, so that the way back leads to it. */
  const carry = (hash) => {
    for (const a of document.querySelectorAll("a[data-keep]")) a.hash = hash;
  };
  carry(location.hash);
  const results = document.getElementById("results");
  if (!results || !window.UNITS) {
    window.addEventListener("hashchange", () => carry(location.hash));
    return;
  }

  const units = window.UNITS;
  const size = units.unit.length;
  const $ = (id) => document.getElementById(id);
  const body = results.tBodies[0];
  const headings = [...results.querySelectorAll("th[data-key]")];
  const keys = headings.map((th) => th.dataset.key);
  const statistics = keys.filter((key) => key !== "unit");
  const inputs = ["q", "block", "task", "sort"].map($).filter(Boolean);
  const texts = units.unit.map((_, i) =>
    [
      units.description[i],
      ...units.promoted[i],
      ...units.top[i],
      ...units.won[i].map((task) => units.tasks[task]),
    ].join("\n").toLowerCase());

  // State: what the hash says.

  const options = (id) => ($(id) ? [...$(id).options].map((option) => option.value) : [""]);
  const choices = { block: options("block"), task: options("task") };
  const startsAscending = (sort) => sort === "unit";

  const read = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    const one = (name, valid, otherwise) => (valid.includes(given.get(name)) ? given.get(name) : otherwise);
    const sort = one("sort", keys, statistics[0] ?? "unit");
    return {
      q: given.get("q") ?? "",
      block: one("block", choices.block, ""),
      task: one("task", choices.task, ""),
      sort,
      ascending: one("order", ["ascending", "descending"], startsAscending(sort) ? "ascending" : "") === "ascending",
      rows: Math.min(MOST, Math.max(STEP, Number.parseInt(given.get("rows"), 10) || STEP)),
    };
  };

  const written = (state) => {
    const pairs = Object.entries({ q: state.q, block: state.block, task: state.task }).filter(([, value]) => value);
    if (state.sort !== (statistics[0] ?? "unit")) pairs.push(["sort", state.sort]);
    if (state.ascending !== startsAscending(state.sort)) pairs.push(["order", state.ascending ? "ascending" : "descending"]);
    if (state.rows !== STEP) pairs.push(["rows", state.rows]);
    return pairs.length ? `#${new URLSearchParams(pairs)}` : "";
  };

  // Order: sorted once for each statistic and kept, so that a search only walks it.

  const orders = new Map();
  const aucIn = (i, task) => units.aucs[i][units.won[i].indexOf(units.tasks.indexOf(task))] ?? null;
  const values = (sort, task) => (sort === "auc" && task ? units.won.map((_, i) => aucIn(i, task)) : units[sort]);
  const order = ({ sort, task, ascending }) => {
    const name = JSON.stringify([sort, sort === "auc" ? task : "", ascending]);
    if (!orders.has(name)) {
      const value = Float64Array.from(values(sort, task), (v) => v ?? NaN);
      const all = [...value.keys()];
      const known = all.filter((i) => !Number.isNaN(value[i]));
      known.sort((a, b) => (ascending ? value[a] - value[b] : value[b] - value[a]) || a - b);
      orders.set(name, known.concat(all.filter((i) => Number.isNaN(value[i]))));
    }
    return orders.get(name);
  };

  // Search.

  /** Words that must all occur, and the block and the index of "b1", "n532", "b1 n532" or "b1/n532". */
  const parse = (query) => {
    const wanted = { words: [], block: null, index: null };
    for (const [, quoted, bare] of query.toLowerCase().matchAll(/"([^"]*)"?|([^\s"]+)/g)) {
      const id = bare ? /^(?:b(\d+))?[/,.:]?(?:n(\d+))?$/.exec(bare) : null;
      if (id?.[1] || id?.[2]) {
        wanted.block = id[1] ? Number(id[1]) : wanted.block;
        wanted.index = id[2] ? Number(id[2]) : wanted.index;
      } else if (quoted || bare) wanted.words.push(quoted || bare);
    }
    return wanted;
  };

  const find = (state) => {
    const { words, block, index } = parse(state.q);
    const chosen = state.block === "" ? null : Number(state.block);
    const task = units.tasks.indexOf(state.task);
    return order(state).filter((i) => {
      const at = Math.floor(units.unit[i] / units.d_mlp);
      return (chosen === null || at === chosen) && (block === null || at === block) &&
        (index === null || units.unit[i] % units.d_mlp === index) &&
        (task < 0 || units.won[i].includes(task)) && words.every((word) => texts[i].includes(word));
    });
  };

  // Drawing.

  const element = (tag, kind, ...children) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    made.append(...children);
    return made;
  };

  // Not toLocaleString, which takes most of the time of drawing a page of rows.
  const digits = (value, places) => {
    const [whole, rest] = value.toFixed(places).split(".");
    return whole.replace(/\B(?=(\d{3})+$)/g, ",") + (rest ? `.${rest}` : "");
  };

  /** Three significant digits, as the other pages have them. */
  const number = (value) => {
    if (value === null || value === undefined) return DASH;
    const [mantissa, exponent] = value.toExponential(2).split("e").map(Number);
    const shown = value && (exponent <= -5 || exponent >= 6)
      ? `${mantissa.toFixed(2)} × 10${String(exponent).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)])}`
      : digits(Number(value.toPrecision(3)), Math.max(0, 2 - exponent));
    return shown.replace("-", "−");
  };

  const SYMBOLS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  const symbol = (c) => SYMBOLS[c] ?? `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

  /** A token without blanks at its ends; symbols for one that would be invisible. */
  const token = (piece) =>
    /[^\p{C}\p{Z}]/u.test(piece) ? piece.trim() : [...piece].map(symbol).join("") || "(empty)";

  // Few elements: they are what drawing costs. Only text that could turn others around is isolated.
  const TURNS = /[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufefe]|[\ud802-\ud83b]/;
  const isolated = (text) => (TURNS.test(text) ? element("bdi", "", text) : text);
  const joined = (parts) => parts.reduce((runs, part) => {
    if (typeof part === "string" && typeof runs.at(-1) === "string") runs[runs.length - 1] += part;
    else runs.push(part);
    return runs;
  }, []);

  const list = (label, pieces, most) => {
    if (!pieces.length) return [];
    const shown = pieces.slice(0, most).map((piece, i) => [i ? " · " : " ", isolated(token(piece))]);
    return [element("span", "", element("b", "", label), ...joined(shown.flat()))];
  };

  const cell = (key, value) => {
    if (key === "consistency" && value !== null) return String(value);
    return key === "share" && value !== null ? `${number(100 * value)}%` : number(value);
  };

  const row = (i, state, hash) => {
    const block = Math.floor(units.unit[i] / units.d_mlp);
    const index = units.unit[i] % units.d_mlp;
    const link = element("a", "", `b${block} n${index}`);
    link.href = `units/b${block}/n${index}.html${hash}`;
    const head = element("th", "", link);
    head.scope = "row";
    const said = units.description[i].trim();
    const tokens = [
      ...list("top", units.top[i], 6),
      ...list("promotes", units.promoted[i], 6),
      ...list("wins", units.won[i].map((task) => units.tasks[task]), 2),
    ];
    const what = element("td", "what", said ? element("bdi", "", said) : element("span", "none", "no description"));
    if (tokens.length) what.append(element("div", "tokens", ...tokens.flatMap((part) => [part, " "])));
    const cells = statistics.map((key) => {
      const value = key === "auc" && state.task ? aucIn(i, state.task) : units[key][i];
      return element("td", key === column(state) ? "stat on" : "stat", cell(key, value));
    });
    return element("tr", "", head, what, ...cells);
  };

  /** The statistic that narrow screens show. */
  const column = (state) => (state.sort === "unit" ? statistics[0] : state.sort);

  let state = read();
  let hits = [];

  const fill = (from) => {
    const hash = written(state);
    body.append(...hits.slice(from, state.rows).map((i) => row(i, state, hash)));
    const left = hits.length - state.rows;
    $("more").hidden = left <= 0;
    $("more").textContent = `Show ${Math.min(STEP, left)} more`;
    const first = left > 0 ? `, first ${digits(state.rows, 0)} shown` : "";
    $("count").textContent = hits.length
      ? `${digits(hits.length, 0)} of ${digits(size, 0)} units${first}`
      : "No unit matches: try fewer words, or all blocks.";
    carry(hash);
  };

  const draw = () => {
    hits = find(state);
    body.replaceChildren();
    for (const th of headings) {
      th.classList.toggle("on", th.dataset.key === column(state));
      if (th.dataset.key === state.sort) th.setAttribute("aria-sort", state.ascending ? "ascending" : "descending");
      else th.removeAttribute("aria-sort");
    }
    results.hidden = hits.length === 0;
    fill(0);
  };

  const show = () => {
    for (const input of inputs) if (input.value !== state[input.id]) input.value = state[input.id];
    draw();
  };

  // Events. Typing replaces the entry of the history, a choice makes a new one.

  const address = () => location.pathname + location.search + written(state);
  const settle = () => {
    clearTimeout(waiting);
    waiting = 0;
    if (location.hash !== written(state)) history.replaceState(null, "", address());
  };
  let waiting = 0;
  let frame = 0;

  $("q").addEventListener("input", () => {
    state = { ...state, q: $("q").value, rows: STEP };
    clearTimeout(waiting);
    waiting = setTimeout(settle, 300);
    if (!frame) {
      frame = requestAnimationFrame(() => {
        frame = 0;
        draw();
      });
    }
  });

  const choose = (change) => {
    settle();
    state = { ...state, ...change };
    history.pushState(null, "", address());
    show();
  };
  for (const id of ["block", "task"]) $(id)?.addEventListener("change", () => choose({ [id]: $(id).value, rows: STEP }));
  $("sort").addEventListener("change", () => {
    const sort = $("sort").value;
    choose({ sort, ascending: startsAscending(sort), rows: STEP });
  });
  for (const th of headings) {
    th.firstElementChild.addEventListener("click", () => {
      const sort = th.dataset.key;
      const ascending = sort === state.sort ? !state.ascending : startsAscending(sort);
      choose({ sort, ascending, rows: STEP });
    });
  }
  $("more").addEventListener("click", () => {
    const from = state.rows;
    state = { ...state, rows: Math.min(from + STEP, hits.length) };
    fill(from);
    settle();
    body.rows[from]?.querySelector("a").focus({ preventScroll: true });
  });
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    $("q").blur();
  });
  document.addEventListener("click", () => waiting && settle(), true);
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, select, textarea, [contenteditable]");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    $("q").focus();
    $("q").select();
  });
  window.addEventListener("popstate", () => {
    state = read();
    show();
  });

  $("search").hidden = false;
  show();
})();
